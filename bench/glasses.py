"""`python -m bench.glasses`: does what a caption names stay editable? "Without glasses", of people who wear glasses in every photo.

Reserved rendered users who nearly always wear glasses; all of their photos with glasses train, the others are left away. Each user is trained three
times by the default recipe, and only the word for glasses differs: every caption names them, no caption does, or the product's own captioner decides.
Then each adapter draws the same prompts with the same seeds, and a classifier that shares nothing with the base (bench/attributes.py) says who wears
glasses. Trainings are cells: kept, and not made again.

    python -m models.maquette.pretrain prepare --data PORTRAITS.tar --work WORK && python -m bench.attributes --work WORK     # the classifier, once
    python -m bench.glasses --work WORK
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from bench import attributes
from bench.cells import Arrays, Cells
from bench.drawing import Bench, bytes_digest
from bench.personalisation import read_nouns, read_photos
from likeness.settings import load_settings
from models.captions import slots
from models.diffusion import bases
from models.diffusion.batches import encode
from models.diffusion.methods import adapted, train
from models.diffusion.sampler import sample
from models.faces.tools import dlib_tools
from models.maquette.companions import read_class_pictures

EPOCH = 1
PROMPTS = ("a photo of {who} without glasses", "a photo of {who}", "a photo of {who} wearing glasses")
SAID = ("named", "unnamed", "by the captioner")
ALONE = "base alone"
FEWEST = 8             # photos with glasses


def captions(reader: slots.SlotReader, crops: NDArray[np.uint8], said: str, *, who: str) -> list[str]:
    """The product's own captions, in which glasses are named always, never, or when CLIP is sure of them."""
    probability = {"named": 1.0, "unnamed": 0.0}
    answers = reader.read(crops)
    if said in probability:
        answers = [{**answer, "eyewear": ("glasses", probability[said])} for answer in answers]
    return [slots.caption(answer, who=who)[0] for answer in answers]


def samples(bench: Bench, crops: NDArray[np.uint8], noun: str, said: str, reader: slots.SlotReader, *, seeds: Sequence[int]) -> NDArray[np.uint8]:
    """(prompts, seeds, S, S, 3) of one adapter, or of the base alone."""
    recipe = load_settings().recipe
    who = noun if said == ALONE else f"{bench.base.trigger} {noun}"
    prompts = [p.format(who=who) for p in PROMPTS for _ in seeds]
    depends: dict[str, Any] = {"epoch": EPOCH, "base": bench.base.ref.revision, "prompts": prompts, "seeds": list(seeds), "steps": bench.steps, "guidance": bench.guidance}

    def draw() -> NDArray[np.uint8]:
        return sample(bench.base, prompts, list(seeds) * len(PROMPTS), steps=bench.steps, guidance=bench.guidance)

    def make() -> Arrays:
        if said == ALONE:
            return {"images": draw()}
        class_images, class_captions = read_class_pictures(noun, side_px=bench.base.ref.resolution_px)
        inputs = encode(bench.base, crops_NSSC=crops, masks_NSS=np.stack([bench.faces.face_mask(crop) for crop in crops]), captions=texts,
                        class_images_MSSC=class_images, class_captions=class_captions, noun=noun)
        result = train("glasses", bench.base, inputs, recipe)
        if result.error is not None:
            raise result.error
        with adapted(bench.base, result.tensors, recipe):
            return {"images": draw()}

    if said != ALONE:
        texts = captions(reader, crops, said, who=who)
        depends |= {"recipe": recipe.digest, "user": bytes_digest(crops), "captions": texts}
    images = bench.cells.arrays("glasses", depends, make)["images"]
    return images.reshape(len(PROMPTS), len(seeds), *images.shape[1:])


def wearing(net: attributes.AttributeNet, images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pictures (N, S, S, 3) show glasses or sunglasses."""
    return np.array([answer["eyewear"] != "none" for answer in attributes.predict(net, images)])


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.glasses", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--users", type=Path, default=Path("../shared/portraits/users"), help="folder of rendered users, one folder each")
    p.add_argument("--work", type=Path, default=Path("build/maquette"), help="holds attributes.safetensors")
    p.add_argument("--count", type=int, default=3, help="users at most")
    p.add_argument("--seeds", type=int, default=16, help="pictures of each prompt")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    settings = load_settings()
    bench = Bench(bases.load("maquette"), dlib_tools(), np.zeros((0, 1, 1, 3), np.uint8), [], Cells(a.out / "cells"), settings.sampling.steps, settings.sampling.guidance)
    reader = slots.SlotReader.load(bases.MAQUETTE / "weights" / "clip")
    net, right = attributes.load(a.work / "attributes.safetensors")
    print(f"the classifier names eyewear of held-out people rightly in {right['eyewear']:.1%}")
    chosen: list[tuple[str, str, NDArray[np.uint8]]] = []
    for place, noun in read_nouns(a.users):
        crops = read_photos(bench, place)["crops"]
        crops = crops[wearing(net, crops)]
        if len(crops) >= FEWEST and len(chosen) < a.count:
            chosen.append((place.name, noun, crops[:FEWEST]))
    if not chosen:
        p.error(f"nobody in {a.users} has {FEWEST} photos with glasses")
    found: dict[str, Any] = {"users": [name for name, _, _ in chosen], "classifier": right["eyewear"], "shares": {}, "named": {}}
    shown: dict[tuple[str, str], list[NDArray[np.bool_]]] = {}
    for name, noun, crops in chosen:
        for said in (*SAID, ALONE):
            images = samples(bench, crops, noun, said, reader, seeds=range(a.seeds))
            for prompt, row in zip(PROMPTS, images, strict=True):
                shown.setdefault((said, prompt), []).append(wearing(net, row))
            print(f"{name} {said}: " + ", ".join(f"{shown[said, p][-1].mean():.0%} {p!r}" for p in PROMPTS), flush=True)
        texts = captions(reader, crops, "by the captioner", who=noun)
        found["named"][name] = sum("glasses" in text and "without" not in text for text in texts) / len(texts)
    table = Table("captions say glasses", *PROMPTS, title=f"share of pictures that show glasses; {len(chosen)} users, {a.seeds} pictures each")
    for said in (*SAID, ALONE):
        rows = {prompt: np.concatenate(shown[said, prompt]) for prompt in PROMPTS}
        found["shares"][said] = {prompt: [float(v.mean()), *binomtest(int(v.sum()), len(v)).proportion_ci(method="wilson")] for prompt, v in rows.items()}
        table.add_row(said, *(f"{mean:.0%} [{low:.0%}, {high:.0%}]" for mean, low, high in found["shares"][said].values()))
    (a.out / "glasses.json").write_text(json.dumps(found, indent=1) + "\n")
    Console().print(table)
    print("of the captioner's captions, name glasses: " + ", ".join(f"{share:.0%} of {name}" for name, share in found["named"].items()))


if __name__ == "__main__":
    main()
