"""`make bench-methods`: the four methods beside the reference scripts of huggingface/diffusers, on the maquette, on a CPU.

    REFERENCE_SCRIPTS=FOLDER python -m bench.methods [--count 4] [--rates | --checkpoints | --ablations] [--show]

Reserved rendered users; half of each one's photos train, the other half are witnesses, as in `make bench-decoder`; the witnesses of all other users are the
impostors. Both sides get the same base, crops, steps, batch and seeds; both run as a process of their own on one thread, and
what they trained is drawn by one sampler with the same prompts and seeds. Everything is a cell: the command goes on where it was stopped, user by
user, and says how many cells are there. Without REFERENCE_SCRIPTS only cells that are there already stand for the scripts.

--rates draws the first user with every learning rate of every script. --checkpoints draws the checkpoints of `lora` and of its script. --ablations leaves one ingredient of `lora` out at a time, or puts one in. --show makes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from bench import charts, paired, rivals
from bench.cells import Arrays, Cells
from bench.drawing import Bench, bytes_digest
from bench.paired import Look
from bench.personalisation import User, read_users
from bench.rivals import RIVALS, Rival
from bench.spent import run_measured
from bench.training import ADAPTER, prepare
from likeness import gate
from likeness.recipe import PRESERVATION, RECIPE, Recipe, preset
from likeness.records import BatteryPrompt
from likeness.settings import load_settings
from models.captions.slots import SlotReader, subject_captions
from models.diffusion import bases
from models.diffusion.bases import Base
from models.diffusion.decoder import PREFIX
from models.diffusion.methods import adapted
from models.diffusion.sampler import sample
from models.faces import align
from models.faces.tools import dlib_tools
from models.maquette.companions import read_class_pictures
from models.quality import findings
from models.quality.measure import appearance_distance, nearest, thumbnail

EPOCH = 1              # raise it when the code of this file changes what is trained, drawn or seen
BARE = 8               # pictures of the class noun alone
FIRST = 3              # users begin here: other benches took their numbers from those at 0, 1, 2
OWN_DECODER = ", base's decoder"
ALONE = "base alone"

Wanted = Sequence[tuple[BatteryPrompt, int]]


@dataclass(frozen=True)
class Row:
    """One line of the table: a training of ours, of a script, or none; `tuned`: drawn with the decoder that it tuned, if it tuned one; `step`: drawn
    from a checkpoint of a LoRA; `classless`: the decoder saw the portraits alone; without `network` the base draws the class noun, and the decoder is all that is the training's.
    """

    name: str
    recipe: Recipe | None = None
    rival: Rival | None = None
    tuned: bool = True
    step: int | None = None
    classless: bool = False
    network: bool = True


@dataclass
class Study:
    """What every row reads."""

    bench: Bench
    users: list[User]                     # all, as impostors
    chosen: list[User]
    wanted: Wanted
    reader: SlotReader
    scripts: Path | None
    work: Path
    steps: int | None = None              # of every training, for a rehearsal
    make: bool = True
    missing: list[str] = field(default_factory=list)

    def recipe(self, recipe: Recipe) -> Recipe:
        """The recipe as it is trained."""
        if self.steps is None:
            return recipe
        return recipe.model_copy(update={"steps": self.steps, "decoder_steps": min(self.steps, recipe.decoder_steps), "checkpoint_every": max(1, self.steps // 2)})


def recipe_of(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values."""
    recipe: Recipe = RECIPE.validate_json(json.dumps(values))
    return recipe


def method_rows() -> list[Row]:
    """The four methods, with the tuned decoder and with the base's own, and the scripts; a method, then its script."""
    made: list[Row] = []
    for method in ("lora", "textual_inversion", "dreambooth", "pivotal"):          # what costs less comes first
        recipe = recipe_of(preset(method, "maquette"))
        made.append(Row(method, recipe))
        if method in RIVALS:
            made.append(Row(RIVALS[method].script, rival=RIVALS[method]))
        if recipe.decoder_steps:
            made.append(Row(method + OWN_DECODER, recipe, tuned=False))
    return [*made, Row(ALONE)]


def rate_rows() -> list[Row]:
    """Every script at every rate."""
    return [Row(f"{rival.script} at {rate:g}", rival=rival.at(rate)) for rival in RIVALS.values() for rate in rival.rates]


def checkpoint_rows() -> list[Row]:
    """`lora` and its script at each checkpoint, from the same trainings as in the table."""
    recipe, rival = recipe_of(preset("lora", "maquette")), RIVALS["lora"]
    assert rival.checkpoint_every is not None
    steps = [*range(rival.checkpoint_every, recipe.steps, rival.checkpoint_every), None]
    return [Row(f"{name} at {step or recipe.steps}", recipe=ours, rival=theirs, step=step)
            for name, ours, theirs in (("lora", recipe, None), (rival.script, None, rival)) for step in steps]


def ablation_rows() -> list[Row]:
    """`lora`, and `lora` without one ingredient; what an ingredient is for stands in ABLATIONS. The other methods that keep a class, and those with other priors."""
    lora = recipe_of(preset("lora", "maquette"))
    made = [Row("lora", lora), Row("lora" + OWN_DECODER, lora, tuned=False), *(Row(name, changed("lora", name)) for name in ABLATIONS), Row(ALONE)]
    made += [Row(CLASSLESS, lora, classless=True), Row(MASK, lora, network=False), Row(CLASSLESS_MASK, lora, classless=True, network=False)]
    for method in ALSO_KEEP:
        made += [Row(method, recipe_of(preset(method, "maquette"))), *(Row(f"{method}, {name}", changed(method, name)) for name in PRIORS)]
    return made


def changed(method: str, name: str) -> Recipe:
    """The preset of a method with one change of ABLATIONS."""
    plain, (_, change) = preset(method, "maquette"), ABLATIONS[name]
    return recipe_of({**plain, **change} | ({"objective": {**plain.get("objective", {}), **change["objective"]}} if "objective" in change else {}))


ALSO_KEEP = ("dreambooth", "pivotal")
PRIORS = (CLASS_PICTURES, PRESERVED) = ("class pictures", "output preservation")
CLASSLESS, MASK, CLASSLESS_MASK = "decoder of portraits alone", "base alone, tuned decoder", "base alone, decoder of portraits alone"
# what is left out, or put in: (the measure that it is for, the change). The decoder is left out by drawing with the base's own: the other half of the training is the same.
ABLATIONS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "no min-SNR weights": ("auc", {"objective": {"min_snr": 1000.0}}),
    "no face mask": ("auc", {"objective": {"background_weight": 1.0}}),
    "no factors in convolutions": ("auc", {"targets": ["attention"]}),
    CLASS_PICTURES: ("drift", {"objective": {"prior": "class_pictures", "prior_weight": 0.25}}),
    PRESERVED: ("drift", {"objective": dict(PRESERVATION)}),
    f"{PRESERVED}, weight 4": ("drift", {"objective": {**PRESERVATION, "prior_weight": 4.0}}),
    "with empty captions": ("editability", {"objective": {"caption_dropout": 0.1}}),
}


def comparisons(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(row of ours, row that it is compared with)."""
    names = [row.name for row in rows]
    if any(name.endswith(tuple(ABLATIONS)) for name in names):
        pairs = [("lora", name) for name in ("lora" + OWN_DECODER, CLASSLESS, *ABLATIONS)] + [(method, f"{method}, {name}") for method in ALSO_KEEP for name in PRIORS]
        pairs += [(MASK, ALONE), (MASK, CLASSLESS_MASK)]
        return [(ours, other) for ours, other in pairs if ours in names and other in names]
    pairs = [(m, RIVALS[m if m in RIVALS else "lora"].script) for m in ("lora", "dreambooth", "textual_inversion", "pivotal")]
    pairs = [p for ours, theirs in pairs for p in ((ours, theirs), (ours + OWN_DECODER, theirs))]
    return [(ours, theirs) for ours, theirs in pairs if ours in names and theirs in names]


# -- one training, once

def training(study: Study, row: Row, user: User) -> tuple[str, dict[str, Any], Callable[[Path], None]]:
    """(name, what it depends on, how it is made) of the cell that holds a row's training of one user."""
    bench = study.bench
    base = bench.base
    class_images, class_captions = read_class_pictures(user.noun, side_px=base.ref.resolution_px)
    depends: dict[str, Any] = {"epoch": EPOCH, "base": base.ref.revision, "user": bytes_digest(user.crops), "class": bytes_digest(class_images)}
    if row.rival is not None:
        rival, like = row.rival, study.recipe(recipe_of(preset("lora", "maquette")))
        arguments = rival.arguments(trigger=base.trigger, noun=user.noun, steps=like.steps, batch=like.batch, seed=like.seed, side_px=base.ref.resolution_px,
                                    class_count=len(class_images))

        def by_script(folder: Path) -> None:
            if study.scripts is None:
                raise rivals.NoScripts("unreachable: a cell of a script is asked for without the scripts")
            told = study.work / f"base-{base.ref.revision[:12]}"
            if not (told / "model_index.json").is_file():
                rivals.write_base(base, told)
            spent = rivals.train_rival(rival, folder, scripts=study.scripts.resolve(), base=told.resolve(), arguments=arguments, crops_NSSC=user.crops,
                                       class_images_MSSC=class_images)
            _say_spent(folder, spent.plain(), rival.pictures(like.batch))

        return "trained-script", depends | {"script": rivals.SHA256[rival.script], "arguments": arguments}, by_script
    assert row.recipe is not None
    recipe = study.recipe(row.recipe)

    def by_us(folder: Path) -> None:
        who = f"{base.trigger} {user.noun}"
        captions = [text for text, _, _ in subject_captions(study.reader, user.crops, [None] * len(user.crops), who=who)]
        wants = recipe.objective.wants_class_pictures or (recipe.decoder_steps > 0 and not row.classless)
        prepare(folder, recipe, noun=user.noun, crops=user.crops, masks=np.stack([bench.faces.face_mask(crop) for crop in user.crops]), captions=captions,
                class_images=class_images[:None if wants else 0], class_captions=class_captions[:None if wants else 0])
        spent = run_measured([sys.executable, "-m", "bench.training", str(folder.resolve())], log=folder / "log.txt", cwd=Path(__file__).parents[1],
                             env=rivals.quiet(folder))
        (folder / "inputs.npz").unlink()
        priors = getattr(recipe.objective, "prior_weight", 0) > 0
        _say_spent(folder, spent.plain(), recipe.batch + (max(1, recipe.batch // 2) if priors else 0))

    return "trained-ours", depends | {"recipe": recipe.digest} | ({"decoder": "sees the class"} if recipe.decoder_steps and not recipe.objective.wants_class_pictures and not row.classless else {}), by_us


def _say_spent(folder: Path, spent: dict[str, Any], pictures: int) -> None:
    (folder / "spent.json").write_text(json.dumps(spent | {"pictures_per_step": pictures}))


# -- its samples, once

@dataclass(frozen=True)
class Drawing:
    """What a row draws of one user: samples (N, S, S, 3), the class noun alone (B, S, S, 3), and what the training cost."""

    images: NDArray[np.uint8]
    bare: NDArray[np.uint8]
    spent: Mapping[str, Any]


def drawn(study: Study, row: Row, user: User) -> Drawing | None:
    """The samples of a row; None where a cell is missing and is not to be made."""
    bench, source, spent, alone = study.bench, {}, {}, row.recipe is None and row.rival is None
    folder = Path()
    if alone:
        source |= {"epoch": EPOCH, "base": bench.base.ref.revision, "noun": user.noun}
    else:
        name, trained_from, make = training(study, row, user)
        if not bench.cells.has(name, trained_from) and (not study.make or (row.rival is not None and study.scripts is None)):
            return None
        folder = bench.cells.files(name, trained_from, make)
        source |= {"trained": trained_from, "tuned": row.tuned, "step": row.step} | ({} if row.network else {"network": False})
        spent |= json.loads((folder / "spent.json").read_text())
    sets = {"methods-alone" if alone else "methods-samples": ([p.template for p, _ in study.wanted], [s for _, s in study.wanted]),
            "methods-alone-bare" if alone else "methods-bare": ([f"a photo of a {user.noun}"] * BARE, list(range(BARE)))}
    cells = {kind: {"prompts": templates, "seeds": seeds, "steps": bench.steps, "guidance": bench.guidance, **source} for kind, (templates, seeds) in sets.items()}
    if not study.make and not all(bench.cells.has(kind, depends) for kind, depends in cells.items()):
        return None

    def images(kind: str) -> NDArray[np.uint8]:
        templates, seeds = sets[kind]

        def make_samples() -> Arrays:
            with trained(study, row, user, folder) as (base, who):
                return {"images": sample(base, [t.format(who=who) for t in templates], seeds, steps=bench.steps, guidance=bench.guidance)}

        return bench.cells.arrays(kind, cells[kind], make_samples)["images"]

    samples, bare = map(images, sets)
    return Drawing(samples, bare, spent)


@contextmanager
def trained(study: Study, row: Row, user: User, folder: Path) -> Iterator[tuple[Base, str]]:
    """(base, what it calls the user) with what a row's training left in `folder`."""
    base = study.bench.base
    if row.rival is not None:
        yield rivals.base_with(row.rival, folder, step=row.step), row.rival.who(base.trigger, user.noun)
    elif row.recipe is None:
        yield base, user.noun
    else:
        recipe, tensors = study.recipe(row.recipe), load_file(folder / ADAPTER)
        if row.step is not None:
            tensors = {k: v for k, v in tensors.items() if k.startswith(PREFIX)} | load_file(folder / f"at-{row.step}.safetensors")
        if not row.tuned:
            recipe, tensors = recipe.model_copy(update={"decoder_steps": 0}), {k: v for k, v in tensors.items() if not k.startswith(PREFIX)}
        if not row.network:
            tensors = {k: v if k.startswith(PREFIX) else torch.zeros_like(v) for k, v in tensors.items()}
        with adapted(base, tensors, recipe):
            yield base, f"{base.trigger} {user.noun}" if row.network else user.noun


# -- what is seen in them, once

def look(study: Study, user: User, made: Drawing) -> Look:
    """Everything that is measured of one user's samples."""
    images = made.images
    bench, policy = study.bench, load_settings().gate
    backend = bench.faces.recogniser_name
    depends = {"epoch": EPOCH, "pictures": bytes_digest(images), "user": bytes_digest(user.crops), "backend": backend, "usual": findings.table_digest(),
               "base": bench.base.ref.revision, "wanted": [[p.category, p.slots] for p, _ in study.wanted], "gated": sorted(gate.GATED)}
    seen = bench.cells.arrays("methods-seen", depends, lambda: _see(study, user, images))
    bare = bench.cells.arrays("methods-seen-bare", {"epoch": EPOCH, "pictures": bytes_digest(made.bare), "backend": backend}, lambda: {"vectors": _people(study, made.bare)})["vectors"]
    own = user.witnesses.mean(0)
    others = np.stack([u.witnesses.mean(0) for u in study.users if u.name != user.name])
    vectors = np.where((seen["faces"] == 1)[:, None], seen["vectors"], np.nan).astype(np.float64)
    small, crops = [thumbnail(i) for i in images], [thumbnail(c) for c in user.crops]
    apart = np.array([[appearance_distance(a, b) for b in small] for a in small])
    near = np.array([nearest(a, crops) for a in small])
    return Look(np.linalg.norm(vectors - own, axis=1), np.linalg.norm(vectors[:, None] - others, axis=2), np.array([p.category != gate.STYLISED for p, _ in study.wanted]),
                seen["right"], seen["asked"], apart, seen["yaw"], seen["defect"], near < policy.min_copy_distance, np.linalg.norm(bare - own, axis=1))


def _people(study: Study, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Who is in each picture (N, 128), NaN without exactly one face."""
    faces = study.bench.faces
    found = [faces.find_faces(image) for image in images]
    return np.stack([faces.embed_faces(image, those)[0].astype(np.float64) if len(those) == 1 else np.full(128, np.nan) for image, those in zip(images, found, strict=True)])


def _see(study: Study, user: User, images: NDArray[np.uint8]) -> Arrays:
    bench = study.bench
    usual = findings.usual(list(user.crops), base=bench.base.ref.revision)
    contradicting = contradictions(study.reader.read(user.crops), [p.slots for p, _ in study.wanted])
    answers = study.reader.read(images)
    faces, vectors, yaw, defect, right, asked = [], [], [], [], [], []
    for image, (prompt, _), answer, slots in zip(images, study.wanted, answers, contradicting, strict=True):
        found = bench.faces.find_faces(image)
        faces.append(len(found))
        vectors.append(bench.faces.embed_faces(image, found[:1])[0] if found else np.full(128, np.nan, np.float32))
        yaw.append(yaw_of(found[0].points) if found else np.nan)
        codes = {f.code for f in findings.find_defects(image, found, usual, stylised=prompt.category == gate.STYLISED)}
        defect.append(bool(codes & gate.GATED))
        right.append(sum(answer[slot][0] == value for slot, value in slots.items()))
        asked.append(len(slots))
    return {"faces": np.array(faces), "vectors": np.stack(vectors), "yaw": np.array(yaw), "defect": np.array(defect), "right": np.array(right), "asked": np.array(asked)}


def contradictions(portraits: Sequence[Mapping[str, tuple[str, float]]], asked: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """For each prompt, the slots whose asked value is not what most of the portraits show: what an adapter that repeats its photos gets wrong."""
    usual = {}
    for slot in portraits[0]:
        values = [p[slot][0] for p in portraits]
        usual[slot] = max(sorted(set(values)), key=values.count)
    return [{slot: value for slot, value in slots.items() if usual.get(slot) != value} for slots in asked]


def yaw_of(points: NDArray[np.float64]) -> float:
    """How far the base of the nose is from the middle of the eyes along their line, in eye distances: 0 is frontal, 0.3 a head well turned."""
    fitted = align.fit(points)
    turn = np.deg2rad(fitted.roll_deg)
    eyes = points[:4].mean(0)
    return float((points[4] - eyes) @ np.array([np.cos(turn), np.sin(turn)]) / fitted.eye_distance_px)


# -- all of it

def measure_all(study: Study, rows: Sequence[Row]) -> dict[str, Any]:
    """Make what is missing, user by user, and measure what is there. A row counts over the users that it has; two rows are compared over those that both have."""
    looks: dict[str, dict[str, Look]] = {row.name: {} for row in rows}
    spent: dict[str, dict[str, dict[str, Any]]] = {row.name: {} for row in rows}
    for user in study.chosen:
        for row in rows:
            got = drawn(study, row, user)
            if got is None:
                study.missing.append(f"{row.name}, user {user.name}")
                continue
            looks[row.name][user.name] = look(study, user, got)
            spent[row.name][user.name] = dict(got.spent)
            print(f"{user.name} {row.name}: {_said(paired.measure([looks[row.name][user.name]], paired.whole([looks[row.name][user.name]])))} {got.spent}", flush=True)
    made: dict[str, Any] = {"cells": len(rows) * len(study.chosen) - len(study.missing), "of": len(rows) * len(study.chosen), "missing": study.missing,
                            "users": [u.name for u in study.chosen], "samples_each": len(study.wanted), "rows": {}, "compared": {}}
    for row in rows:
        seen = list(looks[row.name].values())
        if not seen:
            continue
        costs = [c for c in spent[row.name].values() if c]
        made["rows"][row.name] = {"users": list(looks[row.name]), **paired.measure(seen, paired.whole(seen)),
                                  "by_user": {name: paired.measure([one], paired.whole([one])) for name, one in looks[row.name].items()},
                                  **{k: float(np.median([c[k] for c in costs])) for k in ("core_s_per_step", "core_s", "peak_mib", "pictures_per_step") if costs}}
    for ours, theirs in comparisons(rows):
        both = [name for name in looks[ours] if name in looks[theirs]]
        if not both:
            continue
        found = paired.differences([looks[ours][n] for n in both], [looks[theirs][n] for n in both])
        good, why = paired.held(found)
        pairs = [(spent[ours][n], spent[theirs][n]) for n in both if spent[ours][n] and spent[theirs][n]]
        made["compared"][f"{ours} - {theirs}"] = {
            "users": both, "differences": found, "bars_held": good, "because": why,
            "time_per_step": float(np.median([a["core_s_per_step"] / b["core_s_per_step"] for a, b in pairs])) if pairs else None,
            "time_per_picture": float(np.median([a["core_s_per_step"] / a["pictures_per_step"] / (b["core_s_per_step"] / b["pictures_per_step"]) for a, b in pairs]))
            if pairs else None, "peak_memory": float(np.median([a["peak_mib"] / b["peak_mib"] for a, b in pairs])) if pairs else None}
    return made


def tables(found: Mapping[str, Any]) -> list[Table]:
    """What is shown."""
    rows = Table("row", "users", "AUC", "true accepts at 1 %", "contradicting slots", "diversity", "pose spread", "drift", "defects / 100", "copies / 100", "core-s / step",
                 "core-s", "peak MiB", title=f"{found['cells']} of {found['of']} cells; {len(found['users'])} users, {found['samples_each']} samples each")
    for name, r in found["rows"].items():
        costs = (f"{r['core_s_per_step']:.3f}", f"{r['core_s']:.0f}", f"{r['peak_mib']:.0f}") if "core_s" in r else ("-", "-", "-")
        rows.add_row(name, str(len(r["users"])), *(f"{r[m]:.3f}" for m in (*paired.HIGHER_IS_BETTER, "drift")), f"{r['defects_per_100']:.0f}", f"{r['copies_per_100']:.0f}", *costs)
    pairs = Table("ours - theirs", "users", *paired.MEASURES, "time / step", "time / picture", "memory", "bars",
                  title="differences with paired bootstrap 95 % intervals; with one user only over its samples")
    for name, c in found["compared"].items():
        shown = [f"{d:+.3f} [{low:+.3f}, {high:+.3f}]" for d, low, high in (c["differences"][m] for m in paired.MEASURES)]
        ratios = ["-" if c[k] is None else f"{c[k]:.2f}x" for k in ("time_per_step", "time_per_picture", "peak_memory")]
        pairs.add_row(name, str(len(c["users"])), *shown, *ratios, ("held: " if c["bars_held"] else "not held: ") + c["because"])
    return [rows, pairs]


def _said(measured: Mapping[str, float]) -> str:
    return " ".join(f"{k} {v:.3f}" for k, v in measured.items())


def main() -> int:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--users", type=Path, default=Path("../shared/portraits/users"), help="folder of rendered users, one folder each")
    p.add_argument("--count", type=int, default=4, help="how many users are personalised by every row")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--threads", type=int, default=1, help="of both sides")
    p.add_argument("--steps", type=int, help="training steps of every row, 20 or more: a rehearsal")
    p.add_argument("--samples", type=int, help="only the first so many of the battery: a rehearsal")
    p.add_argument("--rows", nargs="+", metavar="NAME", help="only the rows of these names")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--rates", action="store_true", help="every learning rate of the scripts, on the first user")
    what.add_argument("--checkpoints", action="store_true", help="lora and its script at each checkpoint")
    what.add_argument("--ablations", action="store_true", help="lora without one ingredient at a time")
    p.add_argument("--show", action="store_true", help="make nothing, show what is there")
    a = p.parse_args()
    if not a.users.is_dir():
        p.error(f"no rendered users in {a.users}: name their folder with --users")
    named = os.environ.get("REFERENCE_SCRIPTS")
    try:
        scripts = rivals.scripts_folder(named)
    except rivals.NoScripts as e:
        if named:
            p.error(str(e))
        scripts = None
        print(f"{e}\nonly ours is made", file=sys.stderr)
    torch.set_num_threads(a.threads)
    os.environ["OMP_NUM_THREADS"] = str(a.threads)
    settings, base = load_settings(), bases.load("maquette")
    bench = Bench(base, dlib_tools(), np.zeros((0, 1, 1, 3), np.uint8), [], Cells(a.out / "cells"), settings.sampling.steps, settings.sampling.guidance)
    users = read_users(bench, a.users)
    chosen = users[FIRST % len(users):: max(1, len(users) // a.count)][:1 if a.rates else a.count]
    kind = next((k for k in ("rates", "checkpoints", "ablations") if getattr(a, k)), "")
    rows = {"rates": rate_rows, "checkpoints": checkpoint_rows, "ablations": ablation_rows, "": method_rows}[kind]()
    if a.rows:
        unknown = sorted({*a.rows} - {row.name for row in rows})
        if unknown:
            p.error(f"no row is called {', '.join(map(repr, unknown))}; there are {', '.join(repr(row.name) for row in rows)}")
        rows = [row for row in rows if row.name in a.rows]
    study = Study(bench, users, chosen, settings.battery.every()[:a.samples], SlotReader.load(bases.MAQUETTE / "weights" / "clip"), scripts, a.out, a.steps, not a.show)
    found = measure_all(study, rows)
    name = f"methods-{kind}".rstrip("-")
    (a.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    charts.plane(found["rows"], a.out / f"{name}.png")
    for table in tables(found):
        Console(width=None if sys.stdout.isatty() else 220).print(table)
    if found["missing"]:
        print(f"missing: {'; '.join(found['missing'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
