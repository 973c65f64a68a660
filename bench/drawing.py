"""Figures 1, 2, 3, 4 and 6 of `make bench-maquette`: what the base draws, before anybody is personalised."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from bench import attributes
from bench.cells import Arrays, Cells
from models.captions.slots import SlotReader
from models.diffusion import bases
from models.diffusion.sampler import sample
from models.faces.tools import FaceTools
from models.maquette.training import split
from models.maquette.vocabulary import SLOTS, compose

CHUNK = 64             # samples per cell: what is lost when the program is stopped
DETECT_PX = 256        # samples are enlarged before the detector looks, as a person would hold a small picture nearer


@dataclass
class Bench:
    """What every figure reads."""

    base: bases.Base
    faces: FaceTools
    crops: NDArray[np.uint8]            # (N, S, S, 3): crops of the training data, held-out identities among them
    rows: list[dict[str, str]]
    cells: Cells
    steps: int
    guidance: float
    pictures: dict[str, Any] = field(default_factory=dict)      # for the contact sheet

    @property
    def held(self) -> NDArray[np.int64]:
        return split(self.rows)[1]

    def draw(self, name: str, prompts: Sequence[str], *, seed: int) -> NDArray[np.uint8]:
        """One sample per prompt, (N, S, S, 3), kept chunk by chunk."""
        chunks = []
        for start in tqdm(range(0, len(prompts), CHUNK), desc=name, unit=f"{CHUNK} samples", disable=None):
            part = list(prompts[start:start + CHUNK])
            seeds = [seed + start + i for i in range(len(part))]
            depends = {"base": self.base.ref.revision, "prompts": part, "seeds": seeds, "steps": self.steps, "guidance": self.guidance}
            chunks.append(self.cells.arrays(f"samples-{name}", depends, lambda part=part, seeds=seeds: {
                "images": sample(self.base, part, seeds, steps=self.steps, guidance=self.guidance, batch=16)})["images"])
        return np.concatenate(chunks)

    def see(self, name: str, images: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Per picture, how many faces are in it (HOG, then CNN) and the embedding of the largest (NaN without one)."""
        counts, vectors = [], []
        for start in tqdm(range(0, len(images), 4 * CHUNK), desc=f"{name}: faces", unit=f"{4 * CHUNK} pictures", disable=None):
            part = images[start:start + 4 * CHUNK]
            seen = self.cells.arrays(f"seen-{name}", {"pictures": bytes_digest(part), "backend": self.faces.recogniser_name},
                                     lambda part=part: see_faces(self.faces, part))
            counts.append(seen["counts"])
            vectors.append(seen["vectors"])
        return np.concatenate(counts), np.concatenate(vectors)


def bytes_digest(images: NDArray[Any]) -> str:
    """sha256 of an array's bytes."""
    import hashlib

    return hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()


def see_faces(faces: FaceTools, images: NDArray[np.uint8]) -> Arrays:
    """`counts` (N) and `vectors` (N, D) of pictures (N, S, S, 3)."""
    counts, vectors = [], []
    for image in images:
        large = np.asarray(cv2.resize(image, (DETECT_PX, DETECT_PX), interpolation=cv2.INTER_CUBIC), np.uint8)
        found = faces.find_faces(large)
        counts.append(len(found))
        vectors.append(faces.embed_faces(large, found[:1])[0] if found else np.full(128, np.nan, np.float32))
    return {"counts": np.array(counts, np.int64), "vectors": np.stack(vectors).astype(np.float32)}


def plain_prompts(rows: Sequence[dict[str, str]], count: int) -> list[str]:
    """Plain portraits: who somebody is, as for held-out people, and nothing else."""
    rng = random.Random(1)
    keep = frozenset(("style", "sex", "age", "hair_colour", "hair_cut", "beard"))
    return [compose(rng.choice(rows) | {"style": "photo"}, keep=keep) for _ in range(count)]


def full_prompts(rows: Sequence[dict[str, str]], count: int) -> tuple[list[str], list[dict[str, str]]]:
    """(prompts, what they ask for): every judged slot is named, its values are drawn evenly, so that a base deaf to it scores by chance.

    Clothes with their colours and places with theirs are taken together from one row each, because not every pair exists.
    """
    rng = random.Random(2)
    by_place: dict[str, list[dict[str, str]]] = {}
    by_garment: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_place.setdefault(row["place"], []).append(row)
        by_garment.setdefault(row["garment"], []).append(row)
    prompts, asked = [], []
    for _ in range(count):
        who, where = rng.choice(rows), rng.choice(by_place[rng.choice(sorted(by_place))])
        wear = rng.choice(by_garment[rng.choice(sorted(by_garment))])
        a = {k: who[k] for k in ("sex", "age", "hair_colour", "hair_cut", "beard")} | {k: where[k] for k in ("place", "place_colour")}
        a |= {k: wear[k] for k in ("garment", "colour", "second_colour", "pattern")}
        a |= {slot: rng.choice(sorted(SLOTS[slot].phrases)) for slot in ("expression", "eyewear", "hat", "light")}
        a |= {"style": rng.choice(("photo", "photo", "photo", "black and white", "painting")), "hat_colour": rng.choice(("black", "red", "blue", "brown"))}
        a["view"] = "frontal"
        asked.append(a)
        prompts.append(compose(a, keep=frozenset(a) & frozenset(SLOTS)))
    return prompts, asked


def figure_faces(bench: Bench, *, count: int) -> tuple[dict[str, float], NDArray[np.float32]]:
    """1: share of plain samples with exactly one face; also their embeddings, for novelty."""
    images = bench.draw("plain", plain_prompts([bench.rows[i] for i in bench.held], count), seed=10_000)
    counts, vectors = bench.see("plain", images)
    bench.pictures["plain"] = images[:24]
    bench.pictures["faceless"] = images[counts != 1][:8]
    return {"samples": len(images), "one_face": float((counts == 1).mean()), "no_face": float((counts == 0).mean()),
            "several_faces": float((counts > 1).mean())}, vectors[counts == 1]


def figure_adherence(bench: Bench, *, count: int, classifier: Path) -> dict[str, Any]:
    """2: per slot, the share of samples in which the independent classifier sees what the prompt asked for."""
    net, own = attributes.load(classifier)
    prompts, asked = full_prompts([bench.rows[i] for i in bench.held], count)
    images = bench.draw("full", prompts, seed=20_000)
    agreed = attributes.accuracy(attributes.predict(net, images), asked)
    bench.pictures["full"] = images[:24]
    bench.pictures["full_prompts"] = prompts[:24]
    return {"samples": count, "agreed": agreed, "classifier_on_held_out_renders": own,
            "chance": {slot: chance(slot, asked) for slot in attributes.JUDGED}, "mean_agreed": float(np.mean(list(agreed.values())))}


def chance(slot: str, asked: Sequence[dict[str, str]]) -> float:
    """What always answering the most frequent value would score."""
    values = [a[slot] for a, truth in zip(asked, attributes.labels(asked)[slot].tolist(), strict=True) if truth >= 0]
    return max(values.count(v) for v in set(values)) / len(values)


def figure_clip(bench: Bench, *, folder: Path) -> dict[str, Any]:
    """3: zero-shot accuracy of the image tower per slot, on held-out renders, beside the share of the most frequent value."""
    rows = [bench.rows[i] for i in bench.held]

    def make() -> dict[str, Any]:
        answers = SlotReader.load(folder).read(np.asarray(bench.crops[bench.held]))
        right, usual = {}, {}
        for slot in SLOTS:
            known = [i for i, r in enumerate(rows) if r[slot] in SLOTS[slot].phrases]
            right[slot] = sum(answers[i][slot][0] == rows[i][slot] for i in known) / len(known)
            values = [rows[i][slot] for i in known]
            usual[slot] = max(values.count(v) for v in set(values)) / len(values)
        return {"renders": len(rows), "accuracy": right, "most_frequent": usual, "mean": float(np.mean(list(right.values())))}

    result: dict[str, Any] = bench.cells.numbers("clip", {"base": bench.base.ref.revision, "held": len(rows)}, make)
    return result


@torch.no_grad()
def figure_vae(bench: Bench, *, count: int) -> dict[str, float]:
    """4: PSNR of reconstructions of held-out renders, and how far the recogniser finds a face from its own reconstruction."""
    chosen = bench.held[:: max(1, len(bench.held) // count)][:count]
    real = np.asarray(bench.crops[chosen])
    vae = bench.base.pipe.vae

    def make() -> Arrays:
        latents = bench.base.encode_images(torch.from_numpy(real)) / vae.config.scaling_factor
        made = torch.cat([vae.decode(z.to(bench.base.device, bench.base.dtype)).sample.float().cpu() for z in latents.split(8)])
        return {"images": ((made.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()}

    made = bench.cells.arrays("vae", {"base": bench.base.ref.revision, "chosen": chosen.tolist()}, make)["images"]
    mse = ((real.astype(np.float64) - made) ** 2).mean((1, 2, 3))
    counts_real, vectors_real = bench.see("held-out", real)
    counts_made, vectors_made = bench.see("reconstructed", made)
    both = (counts_real == 1) & (counts_made == 1)
    distance = np.linalg.norm(vectors_real[both] - vectors_made[both], axis=1)
    bench.pictures["vae"] = np.concatenate([real[:8], made[:8]])
    return {"renders": len(real), "psnr_db": float((10 * np.log10(255**2 / mse)).mean()), "median_distance": float(np.median(distance)),
            "distance_below_0.6": float((distance < 0.6).mean()), "face_kept": float(both.sum() / max(1, (counts_real == 1).sum()))}


def figure_novelty(bench: Bench, samples: NDArray[np.float32], *, per_identity: int) -> dict[str, Any]:
    """6: how near the nearest training identity is to a generated face, and to a held-out person's; alike means that the base invents people."""
    training, held = split(bench.rows)

    def plain(numbers: NDArray[np.int64], limit: int) -> list[int]:
        taken: dict[str, int] = {}
        found = []
        for i in numbers.tolist():
            row = bench.rows[i]
            if row["style"] == "photo" and row["eyewear"] != "sunglasses" and abs(float(row["yaw"])) < 25 and taken.get(row["identity"], 0) < limit:
                taken[row["identity"]] = taken.get(row["identity"], 0) + 1
                found.append(i)
        return found

    known, strangers = plain(training, per_identity), plain(held, 4)
    _, reference = bench.see("training", np.asarray(bench.crops[known]))
    _, others = bench.see("strangers", np.asarray(bench.crops[strangers]))
    reference, others = reference[~np.isnan(reference[:, 0])], others[~np.isnan(others[:, 0])]
    near = {name: [float(np.linalg.norm(reference - v, axis=1).min()) for v in vectors] for name, vectors in (("generated", samples), ("held_out", others))}
    return {"training_pictures": len(reference), "median_generated": float(np.median(near["generated"])), "median_held_out": float(np.median(near["held_out"])),
            "generated_below_0.3": float(np.mean(np.array(near["generated"]) < 0.3)), "held_out_below_0.3": float(np.mean(np.array(near["held_out"]) < 0.3)),
            "distances": near}
