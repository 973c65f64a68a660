"""`python -m bench.decoder`: what tuning the VAE's decoder on a subject's portraits is worth, with and without it, everything else equal.

Reserved rendered users, the default recipe, half of the photos for training, the other half as witnesses, the product's battery; scores as in
figure 5 of `make bench-maquette` (bench/personalisation.py). `near` is the share of unstylised samples nearer to the witnesses' centroid than the
distance that the gate asks of the demo subject. Trainings are cells: kept, and not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.cells import Arrays, Cells
from bench.drawing import Bench, bytes_digest
from bench.personalisation import EPOCH, Seen, User, Wanted, personalise, read_users, score
from likeness.settings import load_settings
from models.captions.slots import SlotReader
from models.diffusion import bases
from models.faces.tools import dlib_tools

NEAR = 0.455


def measure(bench: Bench, users: list[User], count: int) -> dict[str, Any]:
    """Scores of all samples, and of each user's, by whether the decoder was tuned."""
    settings = load_settings()
    wanted, reader = Wanted.of(settings), SlotReader.load(bases.MAQUETTE / "weights" / "clip")
    plain = ~np.array(wanted.stylised)
    chosen = users[1:: max(1, len(users) // count)][:count]
    recipes = {"as shipped": settings.recipe, "without": settings.recipe.model_copy(update={"decoder_steps": 0})}
    seen: dict[str, list[Seen]] = {name: [] for name in recipes}
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for user in tqdm(chosen, desc="users", unit="user", disable=None):
        for name, recipe in recipes.items():
            def make(user: User = user, recipe: Any = recipe) -> Arrays:
                images, parts = personalise(bench, user, recipe=recipe, reader=reader, wanted=wanted)
                return {"images": images, "train": np.array(parts["train"])}
            cell = bench.cells.arrays("decoder", {"epoch": EPOCH, "base": bench.base.ref.revision, "recipe": recipe.digest, "user": bytes_digest(user.crops),
                                                  "templates": wanted.templates, "seeds": wanted.seeds, "steps": bench.steps, "guidance": bench.guidance}, make)
            seen[name].append(bench.see(f"decoder-{name.replace(' ', '-')}-{user.name}", cell["images"]))
            seconds[name].append(float(cell["train"]))
    results = {}
    for name in recipes:
        whole = score(seen[name], chosen, users, plain)
        results[name] = {k: whole[k] for k in ("auc", "auc_by_user", "true_accepts", "median_genuine", "median_impostor", "one_face")} | {
            "near": float(np.mean(np.array(whole["genuine"]) < NEAR)), "train_s": float(np.median(seconds[name]))}
    return {"users": [u.name for u in chosen], "results": results}


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.decoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--users", type=Path, default=Path("../shared/portraits/users"), help="folder of rendered users, one folder each")
    p.add_argument("--count", type=int, default=4, help="how many users are personalised, twice each")
    p.add_argument("--steps", type=int, default=load_settings().sampling.steps, help="denoising steps of a sample")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if not a.users.is_dir():
        p.error(f"no rendered users in {a.users}: name their folder with --users")
    if a.threads:
        torch.set_num_threads(a.threads)
    base, guidance = bases.load("maquette"), load_settings().sampling.guidance
    bench = Bench(base, dlib_tools(), np.zeros((0, 1, 1, 3), np.uint8), [], Cells(a.out / "cells"), a.steps, base.guidance if guidance is None else guidance)
    found = measure(bench, read_users(bench, a.users), a.count)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "decoder.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table("decoder", "AUC", "true accepts at 1 %", f"nearer than {NEAR}", "median distance", "to impostors", "one face", "train s", title=f"{len(found['users'])} users")
    for name, r in found["results"].items():
        table.add_row(name, *(f"{r[k]:.3f}" for k in ("auc", "true_accepts", "near", "median_genuine", "median_impostor", "one_face")), f"{r['train_s']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
