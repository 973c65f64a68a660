"""Figure 5 of `make bench-maquette`: is a personalised person recognised as themselves?

Users are rendered people that the maquette never saw. Half of each one's photos train an adapter, by the product's own code and default
recipe; the other half are witnesses. A recogniser then compares every sample with the witnesses of its own user and with those of all
other users of the same class noun. The base alone, without adapter and trigger word, draws the same prompts with the same seeds.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from bench.cells import Arrays
from bench.drawing import Bench, bytes_digest
from likeness.recipe import Recipe
from likeness.settings import Settings
from models.captions import slots
from models.diffusion.batches import encode
from models.diffusion.methods import adapted, train
from models.diffusion.sampler import sample
from models.faces import align
from models.maquette.companions import read_class_pictures

TRAIN_PHOTOS = 8
FALSE_ACCEPTS = 0.01
EPOCH = 1              # raise it when the code of this file changes what is measured


@dataclass(frozen=True)
class User:
    """One rendered user: aligned crops to train on (T, S, S, 3), embeddings of the witnesses (W, D)."""

    name: str
    noun: str
    crops: NDArray[np.uint8]
    witnesses: NDArray[np.float32]


@dataclass(frozen=True)
class Wanted:
    """What is drawn of every user: prompts with `{who}`, one seed each, whether the prompt asks for another style."""

    templates: tuple[str, ...]
    seeds: tuple[int, ...]
    stylised: tuple[bool, ...]

    @staticmethod
    def of(settings: Settings) -> Wanted:
        """The product's own battery."""
        every = settings.battery.every()
        return Wanted(tuple(p.template for p, _ in every), tuple(s for _, s in every), tuple(p.category == "style" for p, _ in every))


def read_users(bench: Bench, folder: Path) -> list[User]:
    """Every user of `folder` whose class noun is known (bench/users.json), cropped and embedded once.

    Raises:
        ValueError: if there is none.
    """
    users = []
    for place, noun in tqdm(read_nouns(folder), desc="users", unit="user", disable=None):
        seen = read_photos(bench, place)
        if len(seen["crops"]) < TRAIN_PHOTOS + 2:
            continue          # too few faces found to leave witnesses
        users.append(User(place.name, noun, seen["crops"][:TRAIN_PHOTOS], seen["vectors"][TRAIN_PHOTOS:]))
    if not users:
        raise ValueError(f"no rendered user with {TRAIN_PHOTOS + 2} usable photos in {folder}: name their folder with --users")
    return users


def read_nouns(folder: Path) -> list[tuple[Path, str]]:
    """(folder, class noun) of every rendered user that bench/users.json knows."""
    nouns: dict[str, str] = json.loads((Path(__file__).with_name("users.json")).read_text())
    return [(p, nouns[p.name]) for p in sorted(folder.iterdir()) if p.name in nouns]


def read_photos(bench: Bench, place: Path) -> Arrays:
    """`crops` (P, S, S, 3) and `vectors` (P, D) of a user's photos in which a face is found, cropped and embedded once."""
    files, side_px = sorted(place.glob("*.jpg")), bench.base.ref.resolution_px
    names = {"user": place.name, "files": [f"{f.name} {f.stat().st_size}" for f in files], "side_px": side_px, "backend": bench.faces.recogniser_name}
    return bench.cells.arrays("user", names, lambda: _read_photos(bench, files, side_px))


def _read_photos(bench: Bench, files: list[Path], side_px: int) -> Arrays:
    crops, vectors = [], []
    for file in files:
        with Image.open(file, formats=["JPEG"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        face = bench.faces.main_face(pixels)
        if face is not None:
            crops.append(align.crop(pixels, align.fit(face.points), side_px=side_px))
            vectors.append(bench.faces.embed_faces(pixels, [face])[0])
    return {"crops": np.stack(crops) if crops else np.zeros((0, side_px, side_px, 3), np.uint8),
            "vectors": np.stack(vectors) if vectors else np.zeros((0, 128), np.float32)}


def personalise(bench: Bench, user: User, *, recipe: Recipe, reader: slots.SlotReader, wanted: Wanted) -> tuple[NDArray[np.uint8], dict[str, float]]:
    """(samples (N, S, S, 3), seconds of each part): the product's own captions, trainer and sampler, with cold caches."""
    seconds = {}
    began = time.monotonic()
    who = f"{bench.base.trigger} {user.noun}"
    captions = [text for text, _, _ in slots.subject_captions(reader, user.crops, [None] * len(user.crops), who=who)]
    class_images, class_captions = read_class_pictures(user.noun, side_px=bench.base.ref.resolution_px)
    masks = np.stack([bench.faces.face_mask(crop) for crop in user.crops])
    inputs = encode(bench.base, crops_NSSC=user.crops, masks_NSS=masks, captions=captions, class_images_MSSC=class_images, class_captions=class_captions,
                    noun=user.noun)
    seconds["prepare"] = time.monotonic() - began
    began = time.monotonic()
    result = train(user.name, bench.base, inputs, recipe)
    if result.error is not None:
        raise result.error
    seconds["train"] = time.monotonic() - began
    began = time.monotonic()
    with adapted(bench.base, result.tensors, recipe):
        images = sample(bench.base, [t.format(who=who) for t in wanted.templates], list(wanted.seeds), steps=bench.steps, guidance=bench.guidance)
    seconds["sample"] = time.monotonic() - began
    return images, seconds


def figure(bench: Bench, users: list[User], *, count: int, settings: Settings, clip: Path) -> dict[str, Any]:
    """5: personalise `count` users and score their samples; see `score` for the numbers."""
    wanted, recipe, reader = Wanted.of(settings), settings.recipe, slots.SlotReader.load(clip)
    depends = {"epoch": EPOCH, "base": bench.base.ref.revision, "recipe": recipe.digest, "templates": wanted.templates, "seeds": wanted.seeds,
               "steps": bench.steps, "guidance": bench.guidance}
    chosen = users[:: max(1, len(users) // count)][:count]
    drawn, seconds = [], []
    for user in tqdm(chosen, desc="personalise", unit="user", disable=None):
        def make(user: User = user) -> Arrays:
            images, parts = personalise(bench, user, recipe=recipe, reader=reader, wanted=wanted)
            return {"images": images, "seconds": np.array([parts["prepare"], parts["train"], parts["sample"]])}
        cell = bench.cells.arrays("personalised", depends | {"user": bytes_digest(user.crops)}, make)
        drawn.append(cell["images"])
        seconds.append(cell["seconds"])
    by_noun = {noun: bench.cells.arrays("base-alone", depends | {"noun": noun}, lambda noun=noun: {"images": sample(
        bench.base, [t.format(who=noun) for t in wanted.templates], list(wanted.seeds), steps=bench.steps, guidance=bench.guidance)})["images"]
        for noun in sorted({u.noun for u in chosen})}
    alone = [by_noun[user.noun] for user in chosen]
    plain = ~np.array(wanted.stylised)
    bench.pictures["users"] = [(user, images) for user, images in zip(chosen, drawn, strict=True)]
    return {"users": [u.name for u in chosen], "photos": TRAIN_PHOTOS, "samples_each": len(wanted.seeds), "recipe": recipe.plain(),
            "personalised": score([bench.see(f"personalised-{u.name}", i) for u, i in zip(chosen, drawn, strict=True)], chosen, users, plain),
            "base_alone": score([bench.see(f"alone-{u.noun}", i) for u, i in zip(chosen, alone, strict=True)], chosen, users, plain),
            "seconds": dict(zip(("prepare", "train", "sample"), np.median(seconds, axis=0).round(1).tolist(), strict=True))
            | {"total": round(float(np.median(np.sum(seconds, axis=1))), 1)}}


Seen = tuple[NDArray[np.int64], NDArray[np.float32]]      # per sample: how many faces (N), the largest one's embedding (N, D)


def score(seen_by_user: list[Seen], chosen: list[User], users: list[User], plain: NDArray[np.bool_]) -> dict[str, Any]:
    """How well distances tell a sample's own user from impostors.

    A genuine distance is from a sample to the centroid of its user's witnesses; impostor distances are from the same sample to the
    centroids of every other user of the same noun. Stylised samples are left out; samples without exactly one face count as not accepted.

    Returns:
        `auc` over all pairs, `auc_by_user`, `true_accepts` (share of samples nearer than the distance that FALSE_ACCEPTS of the impostor
        pairs stay under), that `threshold`, `one_face`, the distances themselves.
    """
    genuine, impostor, by_user = [], [], {}
    asked = seen = 0
    for user, (counts, vectors) in zip(chosen, seen_by_user, strict=True):
        good = plain & (counts == 1)
        asked, seen = asked + int(plain.sum()), seen + int(good.sum())
        own = np.linalg.norm(vectors[good] - user.witnesses.mean(0), axis=1)
        others = [u.witnesses.mean(0) for u in users if u.noun == user.noun and u.name != user.name]
        theirs = np.concatenate([np.linalg.norm(vectors[good] - c, axis=1) for c in others]) if others else np.zeros(0)
        genuine.append(own)
        impostor.append(theirs)
        by_user[user.name] = _auc(own, theirs)
    own, theirs = np.concatenate(genuine), np.concatenate(impostor)
    threshold = float(np.quantile(theirs, FALSE_ACCEPTS)) if len(theirs) else float("nan")
    return {"auc": _auc(own, theirs), "auc_by_user": by_user, "true_accepts": float((own < threshold).sum() / max(1, asked)), "threshold": threshold,
            "one_face": seen / max(1, asked), "median_genuine": _median(own), "median_impostor": _median(theirs), "impostor_pairs": len(theirs),
            "genuine": own.tolist(), "impostor": theirs[:: max(1, len(theirs) // 2000)].tolist()}


def ceiling(users: list[User]) -> dict[str, float]:
    """What the recogniser reaches on the users' own photos: each witness against the centroid of the person's other witnesses."""
    own, theirs = [], []
    for user in users:
        for i, vector in enumerate(user.witnesses):
            own.append(np.linalg.norm(vector - np.delete(user.witnesses, i, axis=0).mean(0)))
            theirs += [np.linalg.norm(vector - u.witnesses.mean(0)) for u in users if u.noun == user.noun and u.name != user.name]
    threshold = float(np.quantile(theirs, FALSE_ACCEPTS)) if theirs else float("nan")
    return {"auc": _auc(np.array(own), np.array(theirs)), "true_accepts": float(np.mean(np.array(own) < threshold)), "median_genuine": _median(np.array(own))}


def _auc(genuine: NDArray[np.float64], impostor: NDArray[np.float64]) -> float | None:
    """Chance that a genuine distance is smaller than an impostor's; None when there is none of one kind."""
    if not len(genuine) or not len(impostor):
        return None
    return float(roc_auc_score(np.r_[np.ones(len(genuine)), np.zeros(len(impostor))], -np.r_[genuine, impostor]))


def _median(values: NDArray[np.float64]) -> float | None:
    return float(np.median(values)) if len(values) else None
