"""Whom the gate's recognisers know less well: errors by group on rendered people, of whom the truth is known: `make bench-groups`.

    python -m bench.groups --data PORTRAITS.tar ... [--people 280 --insightface FOLDER]

Each person of the tars who is not in the impostor bank gives eight photos as portraits, of which witnesses are chosen as the product chooses them; the gate is asked about their other photos (refused: a false refusal) and
about those of the others of the same sex (recognised: a false accept). The rule is the gate's own for one sample (`likeness.gate.is_person`), thresholds from bank and portraits.
What a person is (skin, age, sex, beard) groups both errors; what a photo shows (glasses, the view) groups the photos asked about. Intervals know that photos of one person err together.
Groups whose intervals do not meet are named. People are cells: kept, and not looked at again.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import combinations, groupby
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
from likeness.calibration import Rate
from likeness.intake.policy import IntakePolicy
from models.faces.portraits import choose_witnesses
from models.faces.tools import FaceTools, dlib_tools, face_tools
from models.maquette.companions import BANK_FOLDER, Bank, bank_for
from models.maquette.data import RESERVED_FROM, read_pictures
from models.quality import measure

PORTRAITS, ASKED = 8, 2                    # photos of a person, and fewest that the gate is asked about
OF_A_PHOTO = ("eyewear", "view")           # kinds of groups that a photo belongs to, and nobody
LUMINANCES = (0.2, 0.4)                    # linear; where skin tones are parted
CHUNK = 4                                  # vectors that are measured together: what is between them is measured too, and not needed here
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
            "eyewear": row["eyewear"], "view": "profile" if "profile" in row["view"] else "frontal" if row["view"] == "frontal" else "turned"}


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
    known = measure.References(measure.Identity(bank.backend, bank.digest, own[choose_witnesses(own, IntakePolicy().held_out)], own, bank.embeddings), UNTRACED)
    found: list[bool] = []
    for start in range(0, len(asked), CHUNK):
        measured = measure.measure([measure.Seen(f"{n:064x}", "plain", 1, vector, UNTRACED[0]) for n, vector in enumerate(asked[start:start + CHUNK])], known)
        found += [gate.is_person(score, measured, policy) for score in measured.scores]
    return found


class Tallies:
    """By kind of group and group: what was asked and what the gate got wrong, by person; of false accepts by who was asked for and by who was on the photo."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], dict[str, dict[str, list[int]]]] = {}

    def count(self, groups: Mapping[str, str], what: str, person: str, wrong: Sequence[bool]) -> None:
        """So many answers about a person, and which were wrong."""
        for kind, group in groups.items():
            tally = self._counts.setdefault((kind, group), {}).setdefault(what, {}).setdefault(person, [0, 0])
            tally[0] += sum(wrong)
            tally[1] += len(wrong)

    def rates(self) -> dict[str, dict[str, dict[str, Any]]]:
        """For each group: people, and both errors with counts and 95 % interval (`likeness.calibration.Rate`)."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for (kind, group), counts in sorted(self._counts.items()):
            row: dict[str, Any] = {"people": len(counts.get("people", {}))}
            for name, *by in (("refused", "own"), ("accepted", "others", "on the photo")):
                tallies = [[(float(wrong), float(asked)) for wrong, asked in counts.get(what, {}).values()] for what in by]
                row[name] = {"wrong": round(sum(w for w, _ in tallies[0])), **Rate.of(*tallies).plain()} if sum(n for _, n in tallies[0]) else None
            found.setdefault(kind, {})[group] = row
        return found


def table(people: Sequence[Person], bank: Bank, policy: gate.GatePolicy) -> dict[str, dict[str, dict[str, Any]]]:
    """By kind of group and group: own photos refused, photos of others of the same sex recognised, how many people."""
    tallies = Tallies()
    for person in tqdm(people, desc=bank.backend, unit="person", disable=None):
        whole = {kind: group for kind, group in groups_of(person.rows[0]).items() if kind not in OF_A_PHOTO}
        tallies.count(whole, "people", person.name, [])
        for row, known in zip(person.rows[PORTRAITS:], recognised(person, person.vectors[PORTRAITS:], bank, policy), strict=True):
            tallies.count(groups_of(row), "own", person.name, [not known])
        others = [p for p in people if p.name != person.name and p.rows[0]["sex"] == person.rows[0]["sex"]]
        for other, found in zip(others, _by_person(person, others, bank, policy), strict=True):
            tallies.count(whole, "others", person.name, found)
            tallies.count(whole, "on the photo", other.name, found)
    return tallies.rates()


def _by_person(person: Person, others: Sequence[Person], bank: Bank, policy: gate.GatePolicy) -> list[list[bool]]:
    photos = [p.vectors[PORTRAITS:] for p in others]
    every = iter(recognised(person, np.concatenate(photos), bank, policy) if photos else ())
    return [[next(every) for _ in one] for one in photos]


def differing(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Pairs of groups of one kind whose intervals of an error do not meet."""
    found = []
    for error, words in (("refused", "own photos refused"), ("accepted", "others accepted")):
        for (a, one), (b, other) in combinations(sorted(groups.items()), 2):
            if one[error] and other[error] and (one[error]["high"] < other[error]["low"] or other[error]["high"] < one[error]["low"]):
                more, less = ((a, one), (b, other)) if one[error]["rate"] > other[error]["rate"] else ((b, other), (a, one))
                found.append(f"{words}: {more[0]} {100 * more[1][error]['rate']:.1f} %, {less[0]} {100 * less[1][error]['rate']:.1f} %")
    return found


def printed(results: Mapping[str, Any]) -> Table:
    """What is shown: a row for each group, two columns for each recogniser."""
    names = list(results["recognisers"])
    shown = Table("", "group", "people", *[f"{n}: {what}" for n in names for what in ("own photos refused", "others accepted")],
                  title="errors by group, rendered people: count, % (95 % interval)")
    for kind, groups in results["recognisers"][names[0]].items():
        for group in sorted(groups):
            cells = [_cell(results["recognisers"][name].get(kind, {}).get(group, {}).get(error)) for name in names for error in ("refused", "accepted")]
            shown.add_row(kind, group, str(groups[group]["people"] or "-"), *cells)
    return shown


def _cell(rate: Mapping[str, Any] | None) -> str:
    return "-" if rate is None else f"{rate['wrong']} of {rate['n']}, {100 * rate['rate']:.2f} ({100 * rate['low']:.2f} to {100 * rate['high']:.2f})"


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.groups", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, nargs="+", help="tars of rendered portraits; default: ../shared/portraits/data/*.tar")
    p.add_argument("--people", type=int, default=280, help="how many, from all tars together")
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
    for name, kinds in results["recognisers"].items():
        for kind, groups in kinds.items():
            for words in differing(groups):
                print(f"{name}, {kind}: intervals do not meet: {words}")


if __name__ == "__main__":
    main()
