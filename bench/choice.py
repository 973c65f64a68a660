"""`python -m bench.choice`: what choosing among the checkpoints of a training is worth, against its last step.

Reserved rendered users, the default recipe with checkpoints that are scored, half of the photos for training, the others as witnesses. The product's own
code scores each checkpoint on the pictures that a training draws of it, by one witness. What the chosen one is worth is then measured with what had no
part in choosing: the battery's own seeds, drawn as the stage `sample` draws them, and all other witnesses. Trainings are cells: kept, and not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.cells import Arrays, Cells
from bench.drawing import Bench, bytes_digest
from bench.personalisation import EPOCH, User, Wanted, read_users
from likeness.choice import knee
from likeness.recipe import Choice, Recipe
from likeness.records import BatteryPrompt, Caption, CurvePoint
from likeness.settings import load_settings
from models.captions import slots
from models.diffusion import bases
from models.diffusion.batches import encode
from models.diffusion.methods import train
from models.diffusion.sampler import sample
from models.faces.tools import dlib_tools
from models.maquette.companions import read_bank, read_class_pictures
from models.quality import measure
from models.quality.choice import Sheet, point

SCORES = ("identity", "obedience")


def captions_of(reader: slots.SlotReader, user: User, who: str) -> list[Caption]:
    """The product's own captions of the user's training photos."""
    return [Caption.model_validate(dict(portrait="0" * 64, text=text, slots=named, source=source))
            for text, named, source in slots.subject_captions(reader, user.crops, [None] * len(user.crops), who=who)]


def checkpoints(bench: Bench, user: User, recipe: Recipe, captions: list[Caption], sheet: Sheet, wanted: Wanted) -> Arrays:
    """One training. `choosing` (P, C, S, S, 3) and `judging` (P, J, S, S, 3): pictures of each of P checkpoints; `seconds` that a point's `choosing` took, and of all."""
    class_images, class_captions = read_class_pictures(user.noun, side_px=bench.base.ref.resolution_px)
    masks = np.stack([bench.faces.face_mask(crop) for crop in user.crops])
    inputs = encode(bench.base, crops_NSSC=user.crops, masks_NSS=masks, captions=[c.text for c in captions], class_images_MSSC=class_images,
                    class_captions=class_captions, noun=user.noun)
    choosing, judging, seconds, prompts = [], [], [], [t.format(who=f"{bench.base.trigger} {user.noun}") for t in wanted.templates]
    aside = 0.0

    def draw(step: int) -> CurvePoint:
        nonlocal aside
        began = time.monotonic()
        choosing.append(sample(bench.base, sheet.prompts, sheet.seeds, steps=recipe.choice.denoising_steps, guidance=bench.guidance))
        seconds.append(time.monotonic() - began)
        judging.append(sample(bench.base, prompts, list(wanted.seeds), steps=bench.steps, guidance=bench.guidance))
        aside += time.monotonic() - began
        return CurvePoint(step=step, identity=None, obedience=None, samples=len(sheet.seeds))        # scored later, and never a reason to stop

    began = time.monotonic()
    result = train(user.name, bench.base, inputs, recipe, score=draw)
    if result.error is not None:
        raise result.error
    return {"choosing": np.stack(choosing), "judging": np.stack(judging), "seconds": np.array([float(np.mean(seconds)), time.monotonic() - began - aside])}


def measured(bench: Bench, user: User, recipe: Recipe, reader: slots.SlotReader) -> dict[str, Any]:
    """The points of one user as the training scores them, and the same checkpoints judged by others."""
    settings, steps = load_settings(), recipe.choice.at(recipe.steps)
    wanted, who = Wanted.of(settings), f"{bench.base.trigger} {user.noun}"
    captions = captions_of(reader, user, who)
    sheet = Sheet.of(settings.battery.prompts, captions, who=who, seeds=recipe.choice.seeds)
    cell = bench.cells.arrays("choice", {"epoch": EPOCH, "base": bench.base.ref.revision, "recipe": recipe.digest, "user": bytes_digest(user.crops), "templates": wanted.templates,
                                         "seeds": [*wanted.seeds, *sheet.seeds], "prompts": sheet.prompts, "steps": bench.steps, "guidance": bench.guidance},
                              lambda: checkpoints(bench, user, recipe, captions, sheet, wanted))
    mine = measure.Identity(bench.faces.recogniser_name, read_bank().digest, user.witnesses[:1], user.witnesses, read_bank().embeddings)
    judges = judging_sheet(settings.battery.every(), sheet, settings.battery.prompts, who, seeds=recipe.choice.seeds)

    def looked(name: str, whole: Sheet, identity: measure.Identity) -> dict[str, Any]:
        def make() -> dict[str, Any]:
            began = time.monotonic()
            points = [point(step, images, whole, identity, faces=bench.faces, reader=reader).plain() for step, images in zip(steps, cell[name], strict=True)]
            return {"points": points, "seconds": (time.monotonic() - began) / len(points)}
        found: dict[str, Any] = bench.cells.numbers(f"choice-{name}", {"pictures": bytes_digest(cell[name]), "asked": whole.asked, "backend": bench.faces.recogniser_name,
                                                                       "witnesses": bytes_digest(identity.witnesses)}, make)
        return found

    scored, judged = looked("choosing", sheet, mine), looked("judging", judges, replace(mine, witnesses=user.witnesses[1:]))
    return {"user": user.name, "points": scored["points"], "judged": judged["points"], "chosen": knee([CurvePoint(**p) for p in scored["points"]]).step,
            "draw_s": float(cell["seconds"][0]), "train_s": float(cell["seconds"][1]), "look_s": scored["seconds"]}


def judging_sheet(every: list[tuple[BatteryPrompt, int]], sheet: Sheet, prompts: tuple[BatteryPrompt, ...], who: str, *, seeds: int) -> Sheet:
    """The whole battery, asked for the same contradictions as `sheet`."""
    asked = dict(zip((p.template for p in prompts), sheet.asked[::seeds], strict=True))
    return Sheet(tuple(p.text(who) for p, _ in every), tuple(s for _, s in every), tuple(p.category for p, _ in every), tuple(asked[p.template] for p, _ in every))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over users of what was judged: of the chosen checkpoint, of the last, of the one that the judging itself would have taken."""
    def of(row: dict[str, Any], step: int) -> dict[str, Any]:
        found: dict[str, Any] = next(p for p in row["judged"] if p["step"] == step)
        return found
    takes = {"chosen": lambda r: r["chosen"], "last": lambda r: r["judged"][-1]["step"], "in hindsight": lambda r: knee([CurvePoint(**p) for p in r["judged"]]).step}
    return {name: {score: float(np.mean([of(row, take(row))[score] for row in rows])) for score in SCORES} | {"steps": [take(row) for row in rows]} for name, take in takes.items()}


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.choice", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--users", type=Path, default=Path("../shared/portraits/users"), help="folder of rendered users, one folder each")
    p.add_argument("--count", type=int, default=2, help="how many users are personalised")
    p.add_argument("--points", type=int, default=4)
    p.add_argument("--first", type=float, default=0.25)
    p.add_argument("--seeds", type=int, default=1, help="pictures of each prompt that choose")
    p.add_argument("--denoising", type=int, default=Choice().denoising_steps, help="denoising steps of these")
    p.add_argument("--training-steps", type=int, help="instead of the recipe's")
    p.add_argument("--steps", type=int, default=load_settings().sampling.steps, help="denoising steps of the pictures that judge")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--threads", type=int)
    a = p.parse_args()
    if not a.users.is_dir():
        p.error(f"no rendered users in {a.users}: name their folder with --users")
    if a.threads:
        torch.set_num_threads(a.threads)
    settings = load_settings()
    choice = Choice(points=a.points, first=a.first, seeds=a.seeds, denoising_steps=a.denoising)
    recipe = settings.recipe.model_copy(update={"choice": choice, "steps": a.training_steps or settings.recipe.steps})
    bench = Bench(bases.load("maquette"), dlib_tools(), np.zeros((0, 1, 1, 3), np.uint8), [], Cells(a.out / "cells"), a.steps, settings.sampling.guidance)
    users, reader = read_users(bench, a.users), slots.SlotReader.load(bases.MAQUETTE / "weights" / "clip")
    some = [users[(1 + 7 * i) % len(users)] for i in range(a.count)]                # far apart in the list; when `count` grows the first ones stay
    rows = [measured(bench, user, recipe, reader) for user in tqdm(some, desc="users", unit="user", disable=None)]
    found = {"recipe": recipe.plain(), "users": rows, "summary": summary(rows)}
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "choice.json").write_text(json.dumps(found, indent=1) + "\n")
    table = Table("user", "step", "identity", "obedience", "identity, judged", "obedience, judged", "", title=f"{len(rows)} users, {recipe.method}, {recipe.steps} steps")
    for row in rows:
        for mine, theirs in zip(row["points"], row["judged"], strict=True):
            table.add_row(row["user"], str(mine["step"]), *("-" if q[s] is None else f"{q[s]:.3f}" for q in (mine, theirs) for s in SCORES), "chosen" if mine["step"] == row["chosen"] else "")
    Console().print(table)
    for name, means in found["summary"].items():
        print(f"{name}: identity {means['identity']:.3f}, obedience {means['obedience']:.3f}, steps {means['steps']}")
    print(f"seconds: training {np.median([r['train_s'] for r in rows]):.0f}, drawing a point {np.median([r['draw_s'] for r in rows]):.1f}, looking at it {np.median([r['look_s'] for r in rows]):.1f}")


if __name__ == "__main__":
    main()
