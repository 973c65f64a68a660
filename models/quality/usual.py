"""Measure the table of `models.quality.findings`: two minutes on one core.

    python -m models.quality.usual --data PORTRAITS.tar ...        (tars of rendered people; reserved users are left out)

Two rows: clean renders, whole pictures; and what the maquette draws when nobody is personalised, its shipped class pictures. A limit is the
quantile beyond which FALSE_ALARMS of the row's own clean pictures lie; `alarms` says how many of the *other* half lie beyond the quantile of one half.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from likeness.records import FindingCode
from models.diffusion import bases
from models.faces import align
from models.faces.face import Picture
from models.faces.tools import FaceTools, dlib_tools
from models.maquette.companions import CLASS_FOLDER
from models.maquette.data import RESERVED_FROM, read_pictures
from models.quality import findings

FALSE_ALARMS = 0.01
PEOPLE = 84                  # of each tar's beginning: with 12 shots each about a thousand pictures

Signs = Mapping[FindingCode, float | None]


def limits_of(signs: Sequence[Signs]) -> dict[FindingCode, float]:
    """For each sign the value beyond which FALSE_ALARMS of these pictures lie, on its bad side."""
    limits: dict[FindingCode, float] = {}
    for code, sign in findings.SIGNS.items():
        values = [v for s in signs if (v := s[code]) is not None]
        if values:
            limits[code] = round(float(np.quantile(values, FALSE_ALARMS if sign.bad == "low" else 1 - FALSE_ALARMS)), 4)
    return limits


def medians_of(signs: Sequence[Signs]) -> dict[FindingCode, float]:
    """For each sign the middle of these pictures: with the limit it says how far off a picture is."""
    values = {code: [v for s in signs if (v := s[code]) is not None] for code in findings.SIGNS}
    return {code: round(float(np.median(seen)), 4) for code, seen in values.items() if seen}


def alarms_of(signs: Sequence[Signs]) -> dict[FindingCode, float]:
    """Share of the second half of these pictures beyond the limits of the first: what to expect of pictures that had no part in the table."""
    limits, rest = limits_of(signs[:len(signs) // 2]), signs[len(signs) // 2:]
    shares: dict[FindingCode, float] = {}
    for code, limit in limits.items():
        values = np.array([v for s in rest if (v := s[code]) is not None])
        shares[code] = round(float(np.mean(values < limit if findings.SIGNS[code].bad == "low" else values > limit)), 4)
    return shares


def signs_of_people(people: Iterator[list[Picture]], tools: FaceTools) -> list[Signs]:
    """Signs of every picture with one face; colours are compared with the same person's other pictures."""
    found: list[Signs] = []
    for pictures in people:
        faces = [(p, f[0]) for p in pictures if len(f := tools.find_faces(p)) == 1]
        skin = np.array([findings.skin_colour(align.crop(p, align.fit(f.points), side_px=findings.SIDE_PX)) for p, f in faces]).reshape(-1, 2)
        found += [findings.signs_of(p, f, np.delete(skin, i, 0)) for i, (p, f) in enumerate(faces)]
    return found


def rendered(tars: Sequence[Path]) -> Iterator[list[Picture]]:
    """Person by person, the pictures that are photos."""
    for tar in tars:
        people = groupby(read_pictures(tar), key=lambda item: str(item[0]["identity"]))
        for number, (identity, items) in enumerate(people):
            if number >= PEOPLE // len(tars):
                break
            if int(identity) < RESERVED_FROM:
                yield [_read(data) for row, data in items if row["style"] == "photo"]


def _read(data: bytes) -> Picture:
    with Image.open(io.BytesIO(data), formats=["WEBP"]) as picture:
        return np.asarray(picture.convert("RGB"))


def measure(tars: Sequence[Path]) -> dict[str, Any]:
    """The whole table."""
    tools = dlib_tools()
    renders = signs_of_people(tqdm(rendered(tars), desc="renders", unit="person", total=PEOPLE, disable=None), tools)
    nobody: NDArray[np.float64] = np.zeros((0, 2))
    drawn = [findings.signs_of(p, f[0], nobody) for path in sorted(CLASS_FOLDER.glob("*.webp")) if len(f := tools.find_faces(p := _read(path.read_bytes()))) == 1]
    order = np.random.default_rng(0).permutation(len(drawn))
    rows = []
    for data, revision, signs in ((f"renders {', '.join(t.stem.removeprefix('portraits-') for t in tars)}, photos of {PEOPLE} people", None, renders),
                                  ("the maquette's class pictures", bases.reference("maquette").revision, [drawn[i] for i in order])):
        rows.append({"data": data, "revision": revision, "date": datetime.now(UTC).date().isoformat(), "pictures": len(signs), "false_alarms": FALSE_ALARMS,
                     "limits": limits_of(signs), "medians": medians_of(signs), "alarms": alarms_of(signs)})
    return {"rows": rows}


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m models.quality.usual", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, nargs="+", required=True, help="tars of rendered portraits")
    p.add_argument("--out", type=Path, default=findings.TABLE)
    a = p.parse_args()
    made = measure(a.data)
    a.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    for row in made["rows"]:
        print(f"{row['pictures']} pictures, {row['data']}: limits {row['limits']}; beyond those of the other half {row['alarms']}")


if __name__ == "__main__":
    main()
