"""Whom the gate's recognisers know less well: errors by group on rendered people, of whom the truth is known: `make bench-groups`.

    python -m bench.groups --data PORTRAITS.tar ... [--people 120 --insightface FOLDER]

Each person of the tars who is not in the impostor bank gives six photos as portraits, two of them witnesses; the gate is asked about their other photos (refused: a false refusal) and
about those of the others of the same sex (recognised: a false accept). The rule is the gate's own for one sample (`likeness.gate.is_person`), thresholds from bank and portraits.
What a person is (skin, age, sex, beard) groups both errors; what a photo shows (glasses) groups the photos asked about. People are cells: kept, and not looked at again.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.cells import Arrays, Cells
from likeness import gate, settings
from models.faces.tools import FaceTools, dlib_tools, face_tools
from models.maquette.companions import BANK_FOLDER, Bank, bank_for
from models.maquette.data import RESERVED_FROM, read_pictures
from models.quality import measure

PORTRAITS, WITNESSES, ASKED = 6, 2, 2      # photos of a person, and fewest that the gate is asked about
LUMINANCES = (0.2, 0.4)                    # linear; where skin tones are parted
UNTRACED: NDArray[np.float32] = np.zeros((1, 32, 32, 3), np.float32)


@dataclass(frozen=True)
class Person:
    """Photos with one dominant face: what they show (N rows), and their embeddings (N, D)."""

    name: str
    rows: list[dict[str, Any]]
    vectors: NDArray[np.float32]


def groups_of(row: Mapping[str, Any]) -> dict[str, str]:
    """The groups that a photo belongs to."""
    tone = sum(row["skin_luminance"] >= limit for limit in LUMINANCES)
    bounds = (f"below {LUMINANCES[0]}", f"{LUMINANCES[0]} to {LUMINANCES[1]}", f"{LUMINANCES[1]} and more")
    return {"everybody": "everybody", "skin luminance": bounds[tone], "age": row["age"], "sex": row["sex"], "beard": "none" if row["beard"] == "none" else "with beard",
            "eyewear": row["eyewear"]}


def read_people(tars: Sequence[Path], count: int, tools: FaceTools, cells: Cells) -> list[Person]:
    """The first people of each tar, as many of each, who have photos enough."""
    bank = {Path(p["file"]).stem for p in json.loads((BANK_FOLDER / "people.json").read_text())}
    people: list[Person] = []
    for tar in tars:
        here = 0
        for name, items in _photos(tar):
            if here >= count // len(tars):
                break
            if name in bank or int(name) >= RESERVED_FROM:
                continue
            found = cells.arrays("group-person", {"person": name, "tar": tar.name, "backend": tools.recogniser_name}, lambda items=items: _look(items, tools))
            rows = [items[i][0] for i in found["which"]]
            if len(rows) >= PORTRAITS + ASKED:
                people.append(Person(name, rows, found["vectors"]))
                here += 1
    return people


def _photos(tar: Path) -> Iterator[tuple[str, list[tuple[dict[str, Any], bytes]]]]:
    for name, items in groupby(read_pictures(tar), key=lambda item: str(item[0]["identity"])):
        yield name, [(row, data) for row, data in items if row["style"] == "photo"]


def _look(items: Sequence[tuple[dict[str, Any], bytes]], tools: FaceTools) -> Arrays:
    which, vectors = [], []
    for number, (_, data) in enumerate(items):
        with Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        face = tools.main_face(pixels)
        if face is not None:
            which.append(number)
            vectors.append(tools.embed_faces(pixels, [face])[0])
    return {"which": np.array(which, np.int64), "vectors": np.asarray(vectors, np.float32).reshape(len(vectors), -1)}


def recognised(person: Person, asked: NDArray[np.float32], bank: Bank, policy: gate.GatePolicy) -> list[bool]:
    """What the gate says of each of these vectors (N, D): is it this person?"""
    own = person.vectors[:PORTRAITS]
    seen = [measure.Seen(f"{n:064x}", "plain", 1, vector, UNTRACED[0]) for n, vector in enumerate(asked)]
    measured = measure.measure(seen, measure.References(measure.Identity(bank.backend, bank.digest, own[:WITNESSES], own, bank.embeddings), UNTRACED))
    return [gate.is_person(score, measured, policy) for score in measured.scores]


def table(people: Sequence[Person], bank: Bank, policy: gate.GatePolicy) -> dict[str, dict[str, dict[str, int]]]:
    """By kind of group and group: own photos asked about and refused, photos of others asked about and recognised, people."""
    counts: dict[str, dict[str, dict[str, int]]] = {}

    def count(groups: Mapping[str, str], **more: int) -> None:
        for kind, group in groups.items():
            cell = counts.setdefault(kind, {}).setdefault(group, {"people": 0, "own": 0, "refused": 0, "others": 0, "accepted": 0})
            for name, number in more.items():
                cell[name] += number

    for person in tqdm(people, desc=bank.backend, unit="person", disable=None):
        whole = groups_of(person.rows[0])
        whole.pop("eyewear")
        count(whole, people=1)
        for row, known in zip(person.rows[PORTRAITS:], recognised(person, person.vectors[PORTRAITS:], bank, policy), strict=True):
            count(groups_of(row), own=1, refused=int(not known))
        others = [p for p in people if p.name != person.name and p.rows[0]["sex"] == person.rows[0]["sex"]]
        strangers = np.concatenate([p.vectors[PORTRAITS:] for p in others]) if others else person.vectors[:0]
        count(whole, others=len(strangers), accepted=sum(recognised(person, strangers, bank, policy)))
    return counts


def printed(results: Mapping[str, Any]) -> Table:
    """What is shown: a row for each group, two columns for each recogniser."""
    names = list(results["recognisers"])
    shown = Table("", "group", "people", *[f"{n}: {what}" for n in names for what in ("own photos refused", "others accepted")], title="errors by group, rendered people")
    for kind, groups in results["recognisers"][names[0]].items():
        for group in sorted(groups):
            cells = []
            for name in names:
                c = results["recognisers"][name].get(kind, {}).get(group, {"own": 0, "refused": 0, "others": 0, "accepted": 0})
                cells += [f"{c['refused']} of {c['own']}{_share(c['refused'], c['own'])}", f"{c['accepted']} of {c['others']}{_share(c['accepted'], c['others'])}" if c["others"] else "-"]
            shown.add_row(kind, group, str(groups[group]["people"] or "-"), *cells)
    return shown


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / whole:.1f} %)" if whole else ""


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.groups", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, nargs="+", help="tars of rendered portraits; default: ../shared/portraits/data/*.tar")
    p.add_argument("--people", type=int, default=120, help="how many, from all tars together")
    p.add_argument("--insightface", type=Path, help="folder of a pack: its recogniser is asked too, on dlib's faces")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    a = p.parse_args()
    tars = a.data or sorted(Path("../shared/portraits/data").glob("*.tar"))
    if not tars:
        p.error("no tars of rendered portraits in ../shared/portraits/data: name them with --data")
    recognisers = [dlib_tools()]
    if a.insightface is not None:
        folder = settings.InsightfaceWeights(folder=a.insightface.resolve())
        recognisers.append(face_tools(settings.Backends(identity="insightface", insightface=folder)))
    cells, policy = Cells(a.out / "cells"), settings.load_settings().gate
    results = {"date": datetime.now(UTC).date().isoformat(), "policy": policy.digest, "data": [t.name for t in tars], "recognisers": {
        tools.embedder.name: table(read_people(tars, a.people, tools, cells), bank_for(tools, cache=a.out / "cells"), policy) for tools in recognisers}}
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "groups.json").write_text(json.dumps(results, indent=1) + "\n")
    Console(width=180).print(printed(results))


if __name__ == "__main__":
    main()
