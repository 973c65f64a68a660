"""What the gate's checkers find of planted defects, and what they say of the same pictures without: `make bench-gate`.

    python -m bench.gate [--shared ../shared --limit 4 --plants "moved eye" ... --accept]
    python -m bench.gate --controls [--adapters 2 --overfit 1]         (bench/controls.py)

Two sets of clean pictures: photos of rendered users, who had no part in the table of what is usual, each judged with portraits of their own; and samples
that the maquette draws of nobody in particular. In each picture every type of defect is planted once (`models.quality.planting`). Recall: planted
pictures with a finding of their type. Precision: of all pictures with that finding, planted ones and clean twins, those where it was planted.

A type is gated (`likeness.gate.GATED`) where both are 0.9 or more on both sets for each of its defects; if the constant says something else, this program ends with 1. Every
set and type is kept under bench-results/cells, so the same command goes on where it was stopped. --accept writes models/quality/planted.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench import controls
from bench.cells import Arrays, Cells
from bench.drawing import Bench, bytes_digest
from likeness.gate import GATED
from likeness.records import FindingCode
from likeness.settings import load_settings
from likeness.stages import fingerprint
from models.diffusion import bases
from models.diffusion.sampler import sample
from models.faces import align, dlib_faces, face
from models.faces.face import Face, Picture
from models.faces.tools import FaceTools, dlib_tools
from models.quality import features, findings, planting, planting_features, unsafe
from models.quality.planting_features import ALL_PLANTS as PLANTS
from models.quality.planting_features import CHECKERS, NAMES

PLANTED = Path(findings.__file__).with_name("planted.json")
ENOUGH = 0.9
PHOTOS = (3, 6, 9)                # of each user's sixteen: judged; the others up to OWN are their portraits
OWN = 8
PROMPTS = ("a photo of a {}", "a photo of a {} smiling", "a photo of a {} wearing a red shirt", "a photo of a {} on a beach")
SEEDS = 6                         # of each prompt and class noun
CLEAN = "none"


@dataclass(frozen=True)
class Clean:
    """Clean pictures with one face each, and what is usual for the person on each."""

    name: str
    pictures: list[Picture]
    faces: list[Face]
    usual: list[findings.Usual]
    depends: dict[str, Any]
    left_out: int                     # in which the detector did not see exactly one face: precision says nothing of them
    people: list[str]                 # whom each shows

    def spoilt(self, number: int, plant: str) -> Picture:
        """One picture with one defect; another of the set lends what is needed."""
        if plant == CLEAN:
            return self.pictures[number]
        other = (7 * number + 5) % len(self.pictures)
        rng = np.random.default_rng([list(PLANTS).index(plant), number])
        return PLANTS[plant](self.pictures[number], self.faces[number], self.pictures[other], self.faces[other], rng)


def rendered_users(folder: Path, tools: FaceTools, *, limit: int | None) -> Clean:
    """Photos of rendered users, each judged with portraits cut from other photos of theirs."""
    places = [p for p in sorted(folder.iterdir()) if p.is_dir()][:limit]
    pictures, faces, usual, people = [], [], [], []
    for place in tqdm(places, desc="users", unit="user", disable=None):
        files = sorted(place.glob("*.jpg"))
        seen = {n: (p, f[0]) for n in range(max(OWN, *PHOTOS) + 1) if len(f := tools.find_faces(p := _read(files[n]))) == 1}
        own = [align.crop(p, align.fit(f.points), side_px=128) for n, (p, f) in seen.items() if n < OWN and n not in PHOTOS]
        for n in PHOTOS:
            if n in seen:
                pictures.append(seen[n][0])
                faces.append(seen[n][1])
                people.append(place.name)
                usual.append(findings.usual(own, base="renders"))
    return Clean("renders", pictures, faces, usual, {"users": [p.name for p in places], "photos": PHOTOS, "own": OWN},
                 len(places) * len(PHOTOS) - len(pictures), people)


def drawn_samples(cells: Cells, tools: FaceTools, *, limit: int | None) -> Clean:
    """Samples of the maquette alone, with exactly one face."""
    base = bases.load("maquette")
    wanted = [(prompt.format(noun), 4000 + seed) for seed in range(SEEDS) for noun in ("man", "woman") for prompt in PROMPTS][:2 * limit if limit else None]
    depends = {"base": base.ref.revision, "wanted": wanted}
    images = cells.arrays("gate-samples", depends, lambda: {"images": sample(base, [p for p, _ in wanted], [s for _, s in wanted])})["images"]
    found = [(image, f[0]) for image in images if len(f := tools.find_faces(image)) == 1]
    usual = findings.usual([], base=base.ref.revision)
    return Clean("maquette", [i for i, _ in found], [f for _, f in found], [usual] * len(found), depends, len(images) - len(found), [f"sample {n}" for n in range(len(found))])


def _read(path: Path) -> Picture:
    with Image.open(path, formats=["JPEG"]) as picture:
        return np.asarray(picture.convert("RGB"))


def faces_on(cells: Cells, clean: Clean, plant: str, tools: FaceTools) -> list[list[Face]]:
    """What the detector finds on every picture of the set with this defect planted: nine tenths of the time, and the same whatever is looked for."""
    depends = {"set": clean.depends, "pictures": bytes_digest(np.concatenate([p.ravel()[::97] for p in clean.pictures])), "plant": plant, "backend": tools.recogniser_name,
               **_sources(planting=planting.__file__, features=planting_features.__file__, detector=dlib_faces.__file__, face=face.__file__)}

    def make() -> Arrays:
        numbers = tqdm(range(len(clean.pictures)), desc=f"{clean.name}: {plant}", unit="picture", leave=False, disable=None)
        found = [tools.find_faces(clean.spoilt(n, plant)) for n in numbers]
        every = [f for faces in found for f in faces]
        return {"counts": np.array([len(faces) for faces in found]), "boxes": np.array([f.box_px for f in every]).reshape(-1, 4),
                "points": np.array([f.points for f in every]).reshape(-1, 5, 2), "scores": np.array([f.score for f in every])}

    kept = cells.arrays(f"gate-faces-{clean.name}-{plant.replace(' ', '-')}", depends, make)
    every = [Face(tuple(box), points, float(score)) for box, points, score in zip(kept["boxes"].tolist(), kept["points"], kept["scores"])]
    ends = np.cumsum(kept["counts"])
    return [every[end - count:end] for end, count in zip(ends, kept["counts"])]


def look(cells: Cells, clean: Clean, plant: str, tools: FaceTools) -> list[list[FindingCode]]:
    """The codes found on every picture of the set with this defect planted; clean twins are asked whether they are unsafe too."""
    found = faces_on(cells, clean, plant, tools)
    depends = {"set": clean.depends, "faces": bytes_digest(np.array([[*f.box_px, *f.points.ravel()] for faces in found for f in faces])), "plant": plant,
               "pictures": bytes_digest(np.concatenate([p.ravel()[::97] for p in clean.pictures])), "table": findings.table_digest(),
               **_sources(planting=planting.__file__, planted=planting_features.__file__, findings=findings.__file__, features=features.__file__, unsafe=unsafe.__file__)}

    def make() -> list[list[str]]:
        reader, rows = unsafe.OpenNsfw(), []
        for number, (usual, faces) in enumerate(zip(clean.usual, found, strict=True)):
            picture = clean.spoilt(number, plant)
            noticed = (*findings.find_defects(picture, faces, usual), *(unsafe.find_unsafe(picture, reader) if plant == CLEAN else ()))
            rows.append(sorted({f.code for f in noticed}))
        return rows

    rows: list[list[FindingCode]] = cells.numbers(f"gate-{clean.name}-{plant.replace(' ', '-')}", depends, make)
    return rows


def _sources(**files: str) -> dict[str, str]:
    return {name: fingerprint(Path(file).read_text(encoding="utf-8")) for name, file in files.items()}


def figures(clean: Sequence[Sequence[FindingCode]], planted: Mapping[str, Sequence[Sequence[FindingCode]]]) -> dict[str, dict[str, float | None]]:
    """For each planted defect: recall and precision of its name, and the share that any gated finding holds back; of the clean twins likewise."""
    rows: dict[str, dict[str, float | None]] = {}
    for plant, codes in planted.items():
        hits = sum(bool(NAMES[plant] & {*found}) for found in codes)
        alarms = sum(bool(NAMES[plant] & {*found}) for found in clean)
        rows[plant] = {"recall": hits / len(codes), "precision": hits / (hits + alarms) if hits + alarms else None,
                       "held_back": float(np.mean([bool(GATED & {*found}) for found in codes]))}
    return rows


def earned(sets: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> frozenset[FindingCode]:
    """The codes that may be gated: recall and precision of each of their defects are enough on every set. `unmeasured` needs no proof, and of `unsafe` there can be none
    here: it is gated because the harm is somebody's, and its false alarms are in docs/gate.md.
    """
    poor = {code for plant, code in CHECKERS.items() if not all((rows[plant][f] or 0.0) >= ENOUGH for rows in sets.values() for f in ("recall", "precision"))}
    good = {*CHECKERS.values()} - poor
    return frozenset({*good, "unmeasured", "unsafe"})


def contact_sheet(sets: Sequence[Clean], path: Path, *, rows: int = 4, side_px: int = 128) -> None:
    """A few pictures of each set, clean and with each defect."""
    lines = []
    for clean in sets:
        for number in range(0, len(clean.pictures), max(1, len(clean.pictures) // rows)):
            tiles = [clean.spoilt(number, plant) for plant in (CLEAN, *PLANTS)]
            lines.append(np.hstack([cv2.resize(t, (side_px, side_px), interpolation=cv2.INTER_AREA if t.shape[0] > side_px else cv2.INTER_CUBIC) for t in tiles]))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.vstack(lines)).save(path)


def printed(results: Mapping[str, Any]) -> Table:
    """What is shown."""
    names = list(results["sets"])
    table = Table("planted", "finding", *[f"{n}: {f}" for n in names for f in ("recall", "precision", "held back")], "gated",
                  title="planted defects: " + ", ".join(f"{n} {results['pictures'][n]} pictures" for n in names))
    for plant in results["sets"][names[0]]:
        cells = ["-" if (v := results["sets"][n][plant][f]) is None else f"{v:.2f}" for n in names for f in ("recall", "precision", "held_back")]
        code = CHECKERS.get(plant)
        table.add_row(plant, code or "no checker", *cells, "yes" if code in GATED else "")
    return table


def main_controls(users: Path, out: Path, *, limit: int | None, adapters: int, overfit: int) -> int:
    """The other half: `bench.controls`. 1 if a control did not end as it must."""
    began, settings, base = time.monotonic(), load_settings(), bases.load("maquette")
    bench = Bench(base, dlib_tools(), np.zeros((0, 1, 1, 3), np.uint8), [], Cells(out / "cells"), settings.sampling.steps, settings.sampling.guidance)
    results = controls.run(controls.Controls(bench, settings, users, limit=limit), adapters=adapters, overfit=overfit, note=lambda words: print(words, file=sys.stderr, flush=True))
    (out / "gate-controls.json").write_text(json.dumps({"date": datetime.now(UTC).date().isoformat(), "policy": settings.gate.digest, "controls": results}, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 180).print(controls.printed(results))
    print(f"numbers {out / 'gate-controls.json'}; {time.monotonic() - began:.0f} s")
    return 0 if all(row["right"] == row["of"] for name, row in results.items() if name in controls.RIGHT) else 1


def main() -> int:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.gate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with portraits/users/")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--limit", type=int, help="so many users, and twice as many samples: a rehearsal")
    p.add_argument("--controls", action="store_true", help="the controls instead (bench/controls.py): samples that must be refused, each for its own reason")
    p.add_argument("--adapters", type=int, default=2, help="with --controls: so many honest adapters are trained and judged, on two minutes of one core each")
    p.add_argument("--overfit", type=int, default=0, help="with --controls: so many overfitted ones, on ten minutes each")
    p.add_argument("--plants", nargs="+", choices=list(PLANTS), metavar="PLANT", help=f"only these; what {PLANTED.name} says of the others stays")
    p.add_argument("--accept", action="store_true", help=f"write {PLANTED.name}, which a test compares with GATED")
    a = p.parse_args()
    users = a.shared / "portraits" / "users"
    if not users.is_dir():
        p.error(f"no rendered users in {users}: name the folder that holds portraits/users/ with --shared")
    if a.accept and a.limit:
        p.error("--accept needs all pictures: leave --limit out")
    if a.accept and a.controls:
        p.error("--accept is about planted defects: leave --controls out")
    cv2.setNumThreads(1)
    if a.controls:
        return main_controls(users, a.out, limit=a.limit, adapters=a.adapters, overfit=a.overfit)
    began, cells, tools = time.monotonic(), Cells(a.out / "cells"), dlib_tools()
    asked, kept = a.plants or list(PLANTS), json.loads(PLANTED.read_text(encoding="utf-8"))["sets"] if a.plants else {}
    sets = [rendered_users(users, tools, limit=a.limit), drawn_samples(cells, tools, limit=a.limit)]
    contact_sheet(sets, a.out / "gate-sheet.png")
    results: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "pictures": {s.name: len(s.pictures) for s in sets},
                               "left_out": {s.name: s.left_out for s in sets}, "sets": {}, "clean": {}}
    for clean in sets:
        plain = look(cells, clean, CLEAN, tools)
        rows = kept.get(clean.name, {}) | figures(plain, {plant: look(cells, clean, plant, tools) for plant in asked})
        results["sets"][clean.name] = {plant: rows[plant] for plant in PLANTS if plant in rows}
        results["clean"][clean.name] = {"held_back": float(np.mean([bool(GATED & {*found}) for found in plain])),
                                        **{code: sum(code in found for found in plain) / len(plain) for code in sorted({c for found in plain for c in found})}}
    proven = earned(results["sets"])
    (a.out / "gate.json").write_text(json.dumps(results, indent=1) + "\n")
    if a.accept:
        PLANTED.write_text(json.dumps(results, indent=1) + "\n")
    Console(width=None if sys.stdout.isatty() else 180).print(printed(results))
    print(f"clean twins with a finding: {results['clean']}; left out for want of exactly one face: {results['left_out']}")
    print(f"numbers {a.out / 'gate.json'}, contact sheet beside it; {time.monotonic() - began:.0f} s")
    if proven != GATED:
        print(f"likeness.gate.GATED should be {sorted(proven)}, it is {sorted(GATED)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
