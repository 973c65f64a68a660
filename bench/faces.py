"""How well each face backend finds and recognises people, and what it costs: `make bench-faces`.

    python -m bench.faces [--shared ../shared --limit 20 --json]

Detection on every set of pictures; verification on photos of real and of rendered people, photo against photo and photo against the
centroid of the person's other photos. Every chunk of pictures is kept under bench-results/cells, so the same command goes on where it was
stopped; all numbers are in bench-results/faces.json. Times are medians on the machine that made the chunk, one thread if OMP_NUM_THREADS=1.

With --insightface FOLDER another pack is measured; `cosine` is then what to state as backends.insightface.same_person_cosine. A recogniser
that Likeness has not measured needs --cosine for a start (0.3 will do): the cosine that is reported does not depend on it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from bench.cells import Arrays, Cells
from bench.clarity import spoil_and_read
from bench.strangers import SET_SIZE, TRIALS, plant
from likeness.errors import LikenessError
from likeness.gate import GatePolicy
from likeness.intake.decode import Decoder
from likeness.intake.policy import IntakePolicy
from likeness.settings import Backends, InsightfaceWeights, LocalWeights
from models.faces import align
from models.faces.clarity import ClarityReader
from models.faces.face import SAME_PERSON_DISTANCE, Face, FaceDetector, FaceEmbedder, Picture
from models.faces.tools import DETECTORS, EMBEDDERS
from tasks.pictures import encode_png

EPOCH = 1              # raise it when the code of this file changes what is measured
CHUNK = 50             # pictures per cell: what is lost when the program is stopped
REAL = ("persons/suaresito", "persons/obama", "persons/biden", "persons/orl")
PICTURES = {".jpg", ".jpeg", ".png", ".pgm", ".webp"}


@dataclass(frozen=True)
class Pictures:
    """A set of pictures: who is on each (empty: nobody to recognise), how many people a sane viewer sees on each."""

    name: str
    files: tuple[Path, ...]
    people: tuple[str, ...]
    shown: int


@dataclass(frozen=True)
class Seen:
    """What one detector saw on a set: faces per picture (N,), the largest one's box and points (NaN without), milliseconds (N,)."""

    count: NDArray[np.int64]
    boxes: NDArray[np.float64]
    points: NDArray[np.float64]
    ms: NDArray[np.float64]


def read_sets(shared: Path, limit: int | None) -> list[Pictures]:
    """Every set of the shared data; of each folder at most `limit` pictures."""
    data = shared / "testdata"

    def pictures(name: str, folder: Path, *, shown: int = 1, who: Callable[[Path], str] = lambda path: "") -> Pictures:
        folders = [folder, *sorted(p for p in folder.rglob("*") if p.is_dir())]
        files = [p for place in folders for p in [p for p in sorted(place.iterdir()) if p.suffix.lower() in PICTURES][:limit]]
        return Pictures(name, tuple(files), tuple(who(p) for p in files), shown)

    sets = [pictures(name, data / name, who=lambda path: path.parent.name) for name in REAL]
    sets.append(pictures("rendered users", shared / "portraits" / "users", who=lambda path: path.parent.name))
    sets.append(pictures("persons_multi", data / "persons_multi", shown=3))
    sets += [pictures(f"generated/{p.name}", p) for p in sorted((data / "generated").iterdir())]
    sets += [pictures(f"objects/{p.name}", p, shown=0) for p in sorted((data / "objects").iterdir())]
    return [s for s in sets if s.files]


def read_picture(path: Path) -> Picture:
    """Upright RGB, reduced as intake reduces."""
    with Image.open(path) as picture:
        upright = ImageOps.exif_transpose(picture).convert("RGB")
    side_px = IntakePolicy().working_side_px
    upright.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    return np.asarray(upright)


@dataclass(frozen=True)
class Bench:
    """What every figure reads."""

    cells: Cells
    detectors: dict[str, FaceDetector]
    embedders: dict[str, FaceEmbedder]

    def see(self, detector: FaceDetector, pictures: Pictures) -> Seen:
        """What this detector sees on this set."""
        def look(files: tuple[Path, ...]) -> Arrays:
            detector.find_faces(read_picture(files[0]))           # networks are read on first use: not what is timed
            rows = [_timed(lambda picture=picture: detector.find_faces(picture)) for picture in map(read_picture, files)]
            main = [faces[0] if faces else None for faces, _ in rows]
            return {"count": np.array([len(faces) for faces, _ in rows]), "boxes": np.array([f.box_px if f else [np.nan] * 4 for f in main]),
                    "points": np.array([f.points if f else np.full((5, 2), np.nan) for f in main]), "ms": np.array([ms for _, ms in rows])}

        found = self._chunks(f"faces-{pictures.name}", {"detector": detector.name}, pictures, lambda start, files: look(files))
        return Seen(found["count"], found["boxes"], found["points"], found["ms"])

    def embed(self, detector: FaceDetector, embedder: FaceEmbedder, pictures: Pictures, seen: Seen) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """Identity vectors (N, D) of the largest faces, NaN where none was found; milliseconds (N,)."""
        def look(start: int, files: tuple[Path, ...]) -> Arrays:
            vectors, ms = [], []
            for number, path in enumerate(files, start):
                face = Face(tuple(seen.boxes[number]), seen.points[number], 1.0)
                picture = read_picture(path)
                known = [face] if seen.count[number] else []
                if number == start:
                    embedder.embed_faces(picture, known)
                vector, spent = _timed(lambda picture=picture, known=known: embedder.embed_faces(picture, known))
                vectors.append(vector[0] if known else np.full(vector.shape[1], np.nan, np.float32))
                ms.append(spent)
            return {"vectors": np.stack(vectors), "ms": np.array(ms)}

        made = self._chunks(f"identity-{pictures.name}", {"detector": detector.name, "embedder": embedder.name}, pictures, look)
        return made["vectors"], made["ms"]

    def _chunks(self, name: str, depends: dict[str, Any], pictures: Pictures, look: Callable[[int, tuple[Path, ...]], Arrays]) -> Arrays:
        parts = []
        for start in tqdm(range(0, len(pictures.files), CHUNK), desc=f"{name} {'/'.join(depends.values())}", unit=f"{CHUNK} pictures", leave=False, disable=None):
            files = pictures.files[start:start + CHUNK]
            known = depends | {"epoch": EPOCH, "files": [hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files]}
            parts.append(self.cells.arrays(name.replace("/", "-").replace(" ", "-"), known, lambda start=start, files=files: look(start, files)))
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _timed(act: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = act()
    return result, 1000 * (time.perf_counter() - began)


def figure_detection(bench: Bench, sets: list[Pictures]) -> dict[str, Any]:
    """Per detector and set: pictures, how many show a face, how many as many as are there, median milliseconds."""
    figure: dict[str, Any] = {}
    for name, detector in bench.detectors.items():
        rows = {}
        for pictures in sets:
            seen = bench.see(detector, pictures)
            rows[pictures.name] = {"pictures": len(pictures.files), "people_on_each": pictures.shown, "found": int((seen.count > 0).sum()),
                                   "right_number": int((seen.count == pictures.shown).sum()), "ms": round(float(np.median(seen.ms)), 1)}
        figure[name] = rows
    return figure


def figure_intake(bench: Bench, sets: list[Pictures]) -> dict[str, dict[str, float]]:
    """Where the time of one photo goes with the default networks: median milliseconds of reading it in the child process, finding the face,
    recognising it, and writing what the store keeps. Photos in colour only: what users send.
    """
    def look(pictures: Pictures) -> dict[str, float]:
        spent: dict[str, list[float]] = {"decode": [], "find": [], "embed": [], "encode": []}
        detector, embedder = bench.detectors["dlib"], bench.embedders["dlib"]
        with Decoder(IntakePolicy()) as decoder:
            decoder.decode(pictures.files[0].read_bytes())
            for path in pictures.files:
                decoded, ms = _timed(lambda path=path: decoder.decode(path.read_bytes()))
                faces, found = _timed(lambda decoded=decoded: detector.find_faces(decoded.pixels))
                for name, value in (("decode", ms), ("find", found), ("embed", _timed(lambda d=decoded, f=faces: embedder.embed_faces(d.pixels, f[:1]))[1]),
                                    ("encode", _timed(lambda d=decoded: encode_png(d.pixels))[1])):
                    spent[name].append(value)
        return {name: round(float(np.median(values)), 1) for name, values in spent.items()}

    return {p.name: bench.cells.numbers(f"intake-{p.name.replace('/', '-').replace(' ', '-')}", {"epoch": EPOCH, "files": [f.name for f in p.files]}, lambda p=p: look(p))
            for p in sets if p.name in ("persons/suaresito", "persons/obama", "persons/biden", "rendered users")}


def figure_clarity(bench: Bench, sets: list[Pictures]) -> dict[str, dict[str, Any]]:
    """Covered faces and drawings among aligned crops of the default detector's faces: see `bench.clarity`."""
    reader, detector, figure = ClarityReader(), bench.detectors["dlib"], {}
    for pictures in sets:
        if pictures.shown == 1:
            seen = bench.see(detector, pictures)

            def look(pictures: Pictures = pictures, seen: Seen = seen) -> dict[str, Any]:
                return spoil_and_read(np.stack([align.crop(read_picture(f), align.fit(points), side_px=128) for f, points, count in
                                                zip(pictures.files, seen.points, seen.count, strict=True) if count]), reader)
            depends = {"epoch": EPOCH, "network": reader.digest, "detector": detector.name, "files": [f.name for f in pictures.files]}
            figure[pictures.name] = bench.cells.numbers(f"clarity-{pictures.name.replace('/', '-').replace(' ', '-')}", depends, look)
    return figure


def figure_verification(bench: Bench, sets: list[Pictures]) -> dict[str, Any]:
    """Per detector and recogniser, on real and rendered people: see `verify`."""
    figure: dict[str, Any] = {}
    for found_by, known_by, detector, embedder in _pairs(bench):
        vectors: dict[str, NDArray[np.float32]] = {}
        spent = []
        for pictures in sets:
            if any(pictures.people) or pictures.name == "generated/suaresito_dreambooth":
                vectors[pictures.name], ms = bench.embed(detector, embedder, pictures, bench.see(detector, pictures))
                spent.append(ms[np.isfinite(vectors[pictures.name]).all(1)])
        people = {p.name: np.array(p.people) for p in sets if p.name in vectors}
        row: dict[str, Any] = {"embed_ms": round(float(np.median(np.concatenate(spent))), 1), "metric": embedder.metric}
        for label, names in (("real", [n for n in REAL if n in vectors]), ("rendered", ["rendered users"])):
            both = np.concatenate([vectors[n] for n in names]), np.concatenate([people[n] for n in names])
            row[label] = verify(*both) | {"strangers": plant(*both)}
        own, drawn = vectors.get("persons/suaresito"), vectors.get("generated/suaresito_dreambooth")
        if own is not None and drawn is not None:
            near = np.linalg.norm(drawn - np.nanmean(own, axis=0), axis=1) <= GatePolicy().max_distance
            row["generated_recognised"] = f"{int(near.sum())} of {len(drawn)}"
        figure[f"{found_by}/{known_by}"] = row
    return figure


def _pairs(bench: Bench) -> Iterator[tuple[str, str, FaceDetector, FaceEmbedder]]:
    for found_by, detector in bench.detectors.items():
        for known_by, embedder in bench.embedders.items():
            yield found_by, known_by, detector, embedder


def verify(vectors: NDArray[np.float32], people: NDArray[np.str_]) -> dict[str, Any]:
    """Verification figures of identity vectors (N, D), NaN where no face was found, and who each is.

    `auc` and `true_accepts` (at 0.1 % and 1 % false accepts) over all pairs of photos; `at_same_person` (true, false) accepts of pairs within
    SAME_PERSON_DISTANCE; `to_centroid_at_gate` the same for photos against the centroid of a person's (other) photos, within the gate's
    max_distance.
    """
    here = np.isfinite(vectors).all(1)
    v, who = vectors[here].astype(np.float64), people[here]
    upper = np.triu_indices(len(v), 1)
    distance = np.linalg.norm(v[:, None] - v[None], axis=2)[upper]
    same = (who[:, None] == who[None])[upper]
    genuine, impostor = distance[same], distance[~same]
    to_own, to_others = [], []
    for person in np.unique(who):
        mine = who == person
        total = v[mine].sum(0)
        if mine.sum() > 2:
            to_own += [float(np.linalg.norm(x - (total - x) / (mine.sum() - 1))) for x in v[mine]]
            to_others += np.linalg.norm(v[~mine] - total / mine.sum(), axis=1).tolist()
    limit = GatePolicy().max_distance
    return {"photos": len(v), "people": len(np.unique(who)), "without_face": int((~here).sum()), "auc": _auc(genuine, impostor),
            "true_accepts": {str(rate): float(np.mean(genuine <= np.quantile(impostor, rate))) for rate in (0.001, 0.01)},
            "at_same_person": [float(np.mean(d <= SAME_PERSON_DISTANCE)) for d in (genuine, impostor)],
            "median": {"same": float(np.median(genuine)), "different": float(np.median(impostor))},
            "to_centroid_at_gate": [float(np.mean(np.array(d) <= limit)) for d in (to_own, to_others)]}


def _auc(genuine: NDArray[np.float64], impostor: NDArray[np.float64]) -> float:
    return float(roc_auc_score(np.r_[np.ones(len(genuine)), np.zeros(len(impostor))], -np.r_[genuine, impostor]))


def calibrate(bench: Bench, sets: list[Pictures]) -> dict[str, float]:
    """For each recogniser compared by cosine, the cosine that means what SAME_PERSON_DISTANCE means to dlib.

    Both are asked about the same pairs of photos of one person, real and rendered, found by dlib; at this cosine the recogniser's median
    genuine distance is the same share of its limit as dlib's is of its own. (Medians, because they are what both know best; the tails of real
    and rendered people pull in different directions.)
    """
    detector = bench.detectors["dlib"]

    def medians(embedder: FaceEmbedder) -> list[float]:
        found = []
        for names in (REAL, ("rendered users",)):
            chosen = [p for p in sets if p.name in names]
            vectors = np.concatenate([bench.embed(detector, embedder, p, bench.see(detector, p))[0] for p in chosen])
            found.append(verify(vectors, np.concatenate([np.array(p.people) for p in chosen]))["median"]["same"])
        return found

    reference = np.array(medians(bench.embedders["dlib"]))
    cosines = {}
    for name, embedder in bench.embedders.items():
        if embedder.metric == "cosine":
            picture = read_picture(sets[0].files[0])
            length = float(np.linalg.norm(embedder.embed_faces(picture, detector.find_faces(picture))[0]))
            limit = SAME_PERSON_DISTANCE * float(np.mean(np.array(medians(embedder)) / reference)) / length      # of vectors of length one
            cosines[name] = round(1 - limit**2 / 2, 3)
    return cosines


def tables(results: dict[str, Any]) -> list[Table]:
    """What is printed."""
    found = results["detection"]
    first = Table("pictures", *[f"{name}: found, right number, ms" for name in found], title="detection")
    for pictures in next(iter(found.values())):
        cells = [f"{r['found']} of {r['pictures']}, {r['right_number']}, {r['ms']:.0f}" for r in (rows[pictures] for rows in found.values())]
        first.add_row(pictures, *cells)
    second = Table("detector/recogniser", "photos of", "AUC", "true at 0.1 % false", "at 1 % false", f"within {SAME_PERSON_DISTANCE}: true, false",
                   f"to centroid within {GatePolicy().max_distance}: true, false", "ms", title="verification")
    for name, row in results["verification"].items():
        for label in ("real", "rendered"):
            r = row[label]
            second.add_row(name, f"{r['photos']} {label}", f"{r['auc']:.4f}", *[f"{v:.1%}" for v in r["true_accepts"].values()],
                           *["{:.1%}, {:.2%}".format(*r[k]) for k in ("at_same_person", "to_centroid_at_gate")], f"{row['embed_ms']:.0f}")
    third = Table("photos", *(phases := next(iter(results["intake_ms"].values()))), title="intake with the default networks: ms per photo, median")
    for name, row in results["intake_ms"].items():
        third.add_row(name, *[f"{row[phase]:.0f}" for phase in phases])
    fourth = Table("detector/recogniser", "people", "sets", "strangers found", "of 1, 2, 3, 4", "good photos refused",
                   title=f"1 to 4 strangers in sets of {SET_SIZE}, {TRIALS} sets for each person and number")
    for name, row in results["verification"].items():
        for label in ("real", "rendered"):
            s = row[label]["strangers"]
            fourth.add_row(name, label, str(s["sets"]), f"{s['recall']:.1%}", ", ".join(f"{v:.0%}" for v in s["recall_by_number"].values()), f"{s['good_refused']:.1%}")
    fifth = Table("faces of", "photos", "clean: called covered", "clean: called drawn", "covers found", "made unrecognisable: found", "drawings found", title="clarity")
    for name, c in results["clarity"].items():
        fifth.add_row(name, str(c["photos"]), str(c["clean_called_covered"]), str(c["clean_called_drawn"]), *[f"{v:.0%} of {c['made'][k]}" for k, v in c["found"].items()])
    return [first, second, third, fourth, fifth]


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.faces", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with testdata/ and portraits/users/")
    p.add_argument("--insightface", type=Path, help="folder of a pack; default: SHARED/testdata/weights/face")
    p.add_argument("--facexlib", type=Path, help="folder of facexlib's files; default: the same")
    p.add_argument("--cosine", type=float, help="backends.insightface.same_person_cosine, for a recogniser that Likeness has not measured")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    p.add_argument("--limit", type=int, help="at most so many pictures of each folder (of each person), at least 3")
    p.add_argument("--json", action="store_true", help="print the numbers instead of the tables")
    a = p.parse_args()
    if not (a.shared / "testdata").is_dir():
        p.error(f"no testdata in {a.shared}: name the folder that holds testdata/ and portraits/ with --shared")
    cv2.setNumThreads(1)
    weights = (a.shared / "testdata" / "weights" / "face").resolve()
    began = time.monotonic()
    try:
        chosen = Backends(insightface=InsightfaceWeights(folder=(a.insightface or weights).resolve(), same_person_cosine=a.cosine),
                          facexlib=LocalWeights(folder=(a.facexlib or weights).resolve()))
        bench = Bench(Cells(a.out / "cells"), {name: make(chosen) for name, make in DETECTORS.items()}, {name: make(chosen) for name, make in EMBEDDERS.items()})
        sets = read_sets(a.shared, a.limit)
        results: dict[str, Any] = {"backends": {name: {"name": b.name, "licence": b.licence} for name, b in (bench.detectors | bench.embedders).items()},
                                   "detection": figure_detection(bench, sets), "verification": figure_verification(bench, sets), "clarity": figure_clarity(bench, sets),
                                   "cosine": calibrate(bench, sets),
                                   "intake_ms": figure_intake(bench, sets)}
    except LikenessError as e:
        p.error(e.message)
    results["seconds"] = round(time.monotonic() - began, 1)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "faces.json").write_text(json.dumps(results, indent=1) + "\n")
    if a.json:
        print(json.dumps(results, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for table in tables(results):
        console.print(table)
    print(f"cosine that means what {SAME_PERSON_DISTANCE} means to dlib: {results['cosine']}; numbers {a.out / 'faces.json'}; {results['seconds']:.0f} s")


if __name__ == "__main__":
    main()
