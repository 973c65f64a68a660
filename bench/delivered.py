"""Whether what owners are handed is good, by eyes that had no part in choosing it: `python -m bench.delivered`, after `python -m bench.acceptance`.

    python -m bench.delivered [--home bench-results/acceptance] [--weights FOLDER]

Reads the judgement of the newest Release of each subject in that home: rendered users who went through a night of the product. Beside the delivered samples stand random sets of as many
samples of the same Adapter, of all of them those about as diverse. Two witnesses, neither of which the gate asks:

* **who it is**: insightface's recogniser on its own detector's faces, against the user's photos that were not enrolled (or all of them, where all were) and those of all others: AUC.
* **defects**: a classifier trained here on planted defects (`models.quality.planting`) and their clean twins, renders and samples of the maquette, from the base's picture features and
  the other detector's count and score; cross-validated by person, its threshold where 1 % of the clean twins lie beyond. Its recall is shown beside what it says.

A sheet of everything delivered, what the classifier calls defective framed, is written to be looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from bench.cells import Arrays, Cells
from bench.drawing import bytes_digest
from bench.gate import CLEAN, PLANTS, Clean, drawn_samples, rendered_users
from bench.paired import auc
from likeness.records import Release, Sample, SampleSet
from likeness.settings import Backends, InsightfaceWeights, load_settings
from likeness.stages import Published, StageRef
from models.captions.slots import SlotReader
from models.diffusion import bases
from models.faces import align
from models.faces.face import Picture
from models.faces.tools import FaceTools, dlib_tools, face_tools
from models.quality.measure import appearance_distance, thumbnail
from tasks import pictures
from tasks.judging import Judgement, drawn_besides
from tasks.runtime import Tools

EPOCH = 1                  # raise it when the code of this file changes what a witness sees
FALSE_ALARMS = 0.01
DRAWS, NEAREST = 1000, 50  # random sets of each user, and how many of them are kept: those whose diversity is nearest to the delivered ones'
RESAMPLES = 1000
SIDE_PX = 128
PHOTO = 0                  # of each user, shown at the beginning of their row


@dataclass(frozen=True)
class Handed:
    """One accepted subject: samples (N, S, S, 3), which of them are delivered, appearance distance of every two (N, N)."""

    name: str
    person: str
    images: NDArray[np.uint8]
    delivered: NDArray[np.intp]
    apart: NDArray[np.float64]


def accepted(tools: Tools) -> list[Handed]:
    """Subjects of the home who have a Release, in order of their id."""
    store, found = tools.store, []
    for subject in sorted({key.split("/")[1] for key in store.list("subjects/")}):
        newest = _newest(tools, subject)
        if newest is None:
            continue
        judgement, samples = newest
        images = np.stack([pictures.get(store, s.image) for s in samples])
        names = [s.image.sha256 for s in samples]
        small = [thumbnail(i) for i in images]
        found.append(Handed(subject, subject.split("-")[1], images, np.array([names.index(d) for d in judgement.verdict.delivered]),
                            np.array([[appearance_distance(a, b) for b in small] for a in small])))
    return found


def _newest(tools: Tools, subject: str) -> tuple[Judgement, list[Sample]] | None:
    """The judgement of the newest Release, with all samples that it looked at."""
    released: list[tuple[int, StageRef]] = []
    for key in tools.store.list(f"subjects/{subject}/stages/register/"):
        try:
            published = Published.model_validate_json(tools.store.get(key) or b"{}")
        except ValidationError:
            continue                                            # a claim
        version = Release.read(json.dumps(published.output)).version
        released += [(version, ref) for ref in published.inputs if ref.stage == "judge"]
    if not released:
        return None
    _, judged = max(released, key=lambda item: item[0])
    [drawn, *_] = [ref for ref in tools.published(judged, subject).inputs if ref.stage == "sample"]
    return tools.open(judged, subject, Judgement), [*tools.open(drawn, subject, SampleSet).samples, *drawn_besides(tools, subject, judged)]


# -- who it is, by another recogniser

def vectors_of(cells: Cells, tools: FaceTools, name: str, images: Sequence[Picture]) -> NDArray[np.float64]:
    """Identity vectors (N, D) of pictures, NaN without exactly one face."""
    def make() -> Arrays:
        rows = []
        for image in images:
            faces = tools.find_faces(image)
            rows.append(np.asarray(tools.embed_faces(image, faces)[0], np.float64) if len(faces) == 1 else None)
        width = next((len(r) for r in rows if r is not None), 1)
        return {"vectors": np.stack([np.full(width, np.nan) if r is None else r for r in rows])}

    depends = {"epoch": EPOCH, "backend": tools.recogniser_name, "pictures": [bytes_digest(np.ascontiguousarray(i)) for i in images]}
    return cells.arrays(f"delivered-who-{name}", depends, make)["vectors"]


def centre(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """The direction in which a person lies (D), of unit length: the mean of few vectors is longer than that of many."""
    mean = np.nanmean(vectors, axis=0)
    return np.asarray(mean / np.linalg.norm(mean))


def photos_of(cells: Cells, folder: Path, tools: FaceTools, person: str) -> NDArray[np.float64]:
    """Identity vectors of a user's photos, by file name."""
    files = sorted((folder / person).glob("*.jpg"))
    return vectors_of(cells, tools, person, [np.asarray(Image.open(f).convert("RGB")) for f in files])


# -- defects, by a classifier of our own

def features_of(cells: Cells, detector: FaceTools, reader: SlotReader, name: str, images: Sequence[Picture]) -> NDArray[np.float64]:
    """What the classifier reads of pictures (N, D + 3): the base's picture features, and faces, score and height of the largest one as the other detector sees them."""
    def make() -> Arrays:
        seen = []
        for image in images:
            faces = detector.find_faces(image)
            seen.append([len(faces), faces[0].score if faces else 0.0, faces[0].height_px / image.shape[0] if faces else 0.0])
        small = np.stack([cv2.resize(i, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA) for i in images])
        return {"features": np.hstack([reader.embed(small).numpy().astype(np.float64), np.array(seen, np.float64)])}

    depends = {"epoch": EPOCH, "detector": detector.detector.name, "reader": bases.reference("maquette").revision, "pictures": [bytes_digest(np.ascontiguousarray(i)) for i in images]}
    return cells.arrays(f"delivered-features-{name}", depends, make)["features"]


def face_crop(picture: Picture, points: NDArray[np.float64]) -> Picture:
    """A render as samples are: aligned, of the base's side."""
    return align.crop(picture, align.fit(points), side_px=SIDE_PX)


@dataclass(frozen=True)
class Classifier:
    """Trained on everything; `threshold` and `recall` (by planted defect) are of the cross-validation."""

    model: Any
    threshold: float
    recall: Mapping[str, float]
    clean: float

    def defective(self, features: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which pictures lie beyond the threshold."""
        return np.asarray(self.model.decision_function(features) > self.threshold)


def classifier(cells: Cells, sets: Sequence[Clean], detector: FaceTools, reader: SlotReader) -> Classifier:
    """Learn planted defects from clean twins. A person with all their pictures and all defects is in one fold."""
    rows, names = [], []
    groups: list[str] = []
    for clean in sets:
        for plant in (CLEAN, *PLANTS):
            spoilt = [clean.spoilt(n, plant) for n in tqdm(range(len(clean.pictures)), desc=f"{clean.name}: {plant}", leave=False, disable=None)]
            if clean.name == "renders":
                spoilt = [face_crop(p, clean.faces[n].points) for n, p in enumerate(spoilt)]
            rows.append(features_of(cells, detector, reader, f"{clean.name}-{plant.replace(' ', '-')}", spoilt))
            groups += clean.people
            names += [plant] * len(spoilt)
    x, kinds = np.concatenate(rows), np.array(names)
    y = kinds != CLEAN
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=2000))
    scores = cross_val_predict(model, x, y, groups=groups, cv=GroupKFold(8), method="decision_function")
    threshold = float(np.quantile(scores[~y], 1 - FALSE_ALARMS))
    return Classifier(model.fit(x, y), threshold, {plant: float((scores[kinds == plant] > threshold).mean()) for plant in PLANTS}, float((scores[~y] > threshold).mean()))


# -- sets

def spread_of(apart: NDArray[np.float64], chosen: NDArray[np.intp]) -> float:
    """Mean appearance distance of two of the chosen samples; 0 of one."""
    pairs = apart[np.ix_(chosen, chosen)][~np.eye(len(chosen), dtype=bool)]
    return float(pairs.mean()) if len(pairs) else 0.0


def random_sets(one: Handed, rng: np.random.Generator) -> list[NDArray[np.intp]]:
    """As many samples as are delivered, by chance, of all: those draws whose diversity is nearest to that of the delivered ones."""
    wanted, count = spread_of(one.apart, one.delivered), len(one.delivered)
    draws = [rng.choice(len(one.images), count, replace=False) for _ in range(DRAWS)]
    return sorted(draws, key=lambda chosen: abs(spread_of(one.apart, chosen) - wanted))[:NEAREST]


def auc_of(genuine: Sequence[NDArray[np.float64]], impostor: Sequence[NDArray[np.float64]]) -> float:
    """Over all users; samples without one face are left out on both sides."""
    own, others = np.concatenate(list(genuine)), np.concatenate([i.ravel() for i in impostor])
    return auc(own[~np.isnan(own)], np.sort(others[~np.isnan(others)]))


def compared(handed: Sequence[Handed], distances: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> dict[str, Any]:
    """AUC of delivered and of random sets, and the difference with its interval by user.

    Args:
        distances: of each user's samples, to the user (N) and to all others (N, U).
    """
    rng = np.random.default_rng(0)
    sets = [random_sets(one, rng) for one in handed]

    def both(users: Sequence[int], draw: int | None) -> tuple[float, float]:
        chosen = [handed[u].delivered for u in users]
        pulled = [sets[u][draw if draw is not None else rng.integers(NEAREST)] for u in users]
        return tuple(auc_of([distances[u][0][c] for u, c in zip(users, cs, strict=True)], [distances[u][1][c] for u, c in zip(users, cs, strict=True)])      # type: ignore[return-value]
                     for cs in (chosen, pulled))

    everybody = list(range(len(handed)))
    at = np.array([both(everybody, draw) for draw in range(NEAREST)])
    resampled = np.array([np.subtract(*both(rng.integers(0, len(handed), len(handed)).tolist(), None)) for _ in range(RESAMPLES)])
    return {"delivered": float(at[0, 0]), "random": float(at[:, 1].mean()), "difference": float(at[0, 0] - at[:, 1].mean()),
            "low": float(np.quantile(resampled, 0.025)), "high": float(np.quantile(resampled, 0.975)),
            "diversity": float(np.mean([spread_of(one.apart, one.delivered) for one in handed])),
            "diversity_of_random": float(np.mean([spread_of(one.apart, chosen) for one, own in zip(handed, sets, strict=True) for chosen in own]))}


def sheet(handed: Sequence[Handed], flagged: Sequence[NDArray[np.bool_]], firsts: Sequence[Picture]) -> Image.Image:
    """A row for each user: a photo, then what is delivered; framed in red what the classifier calls defective."""
    across = 1 + max(len(one.delivered) for one in handed)
    page = np.full((len(handed) * SIDE_PX, across * SIDE_PX, 3), 255, np.uint8)
    for y, (one, bad, first) in enumerate(zip(handed, flagged, firsts, strict=True)):
        page[y * SIDE_PX:(y + 1) * SIDE_PX, :SIDE_PX] = cv2.resize(first, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
        for x, number in enumerate(one.delivered, 1):
            tile = cv2.resize(one.images[number], (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA)
            if bad[number]:
                cv2.rectangle(tile, (0, 0), (SIDE_PX - 1, SIDE_PX - 1), (220, 30, 30), 3)
            page[y * SIDE_PX:(y + 1) * SIDE_PX, x * SIDE_PX:(x + 1) * SIDE_PX] = tile
    return Image.fromarray(page)


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m bench.delivered", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with portraits/users/")
    p.add_argument("--home", type=Path, default=Path("bench-results/acceptance"), help="home of bench.acceptance")
    p.add_argument("--weights", type=Path, help="folder of an insightface pack; default: SHARED/testdata/weights/face")
    p.add_argument("--out", type=Path, default=Path("bench-results"))
    a = p.parse_args()
    users, weights = a.shared / "portraits" / "users", a.weights or a.shared / "testdata" / "weights" / "face"
    for folder, cure in ((users, "--shared names the folder that holds portraits/users/"), (weights, "--weights names an insightface pack"), (a.home, "run python -m bench.acceptance first")):
        if not folder.is_dir():
            p.error(f"there is no {folder}: {cure}")
    cv2.setNumThreads(1)
    cells, tools = Cells(a.out / "cells"), Tools(load_settings(overrides={"home": str(a.home.resolve())}))
    other = face_tools(Backends(detect="insightface", identity="insightface", insightface=InsightfaceWeights(folder=weights.resolve())))
    reader = SlotReader.load(bases.MAQUETTE / "weights" / "clip")
    handed = [one for one in accepted(tools) if (users / one.person).is_dir()]
    if not handed:
        p.error(f"nobody was accepted in {a.home}: run python -m bench.acceptance first")
    judge = classifier(cells, [rendered_users(users, dlib_tools(), limit=None), drawn_samples(cells, dlib_tools(), limit=None)], other, reader)
    features = [features_of(cells, other, reader, one.name, list(one.images)) for one in handed]
    flagged = [judge.defective(f) for f in features]
    people = {name: photos_of(cells, users, other, name) for name in tqdm(sorted(f.name for f in users.iterdir() if f.is_dir()), desc="photos", unit="user", disable=None)}
    centres = {name: centre(v) for name, v in people.items()}
    distances = []
    for one in handed:
        seen = vectors_of(cells, other, one.name, list(one.images))
        seen = seen / np.linalg.norm(seen, axis=1, keepdims=True)
        unseen = np.stack([v for v, name in zip(people[one.person], _names(users / one.person), strict=True) if name not in _enrolled(a.home, one.name)] or people[one.person])
        distances.append((np.linalg.norm(seen - centre(unseen), axis=1), np.stack([np.linalg.norm(seen - middle, axis=1) for name, middle in centres.items() if name != one.person], axis=1)))
    sets = compared(handed, distances)
    delivered = np.concatenate([bad[one.delivered] for one, bad in zip(handed, flagged, strict=True)])
    every = np.concatenate(flagged)
    results = {"date": datetime.now(UTC).date().isoformat(), "users": [one.name for one in handed], "delivered": len(delivered), "samples": len(every), "auc": sets,
               "defective": {"delivered": float(delivered.mean()), "all samples": float(every.mean()), "clean twins": judge.clean}, "recall": judge.recall}
    (a.out / "delivered.json").write_text(json.dumps(results, indent=1) + "\n")
    sheet(handed, flagged, [np.asarray(Image.open(sorted((users / one.person).glob("*.jpg"))[PHOTO]).convert("RGB")) for one in handed]).save(a.out / "delivered.png")
    table = Table("", "delivered", "random sets", "difference (95 %)", title=f"{len(handed)} users, {len(delivered)} delivered of {len(every)} samples")
    table.add_row("AUC, another recogniser", f"{sets['delivered']:.3f}", f"{sets['random']:.3f}", f"{sets['difference']:+.3f} ({sets['low']:+.3f} to {sets['high']:+.3f})")
    table.add_row("diversity", f"{sets['diversity']:.3f}", f"{sets['diversity_of_random']:.3f}", "")
    table.add_row("defective, the classifier", f"{100 * delivered.mean():.1f} %", f"{100 * every.mean():.1f} % of all", f"{100 * judge.clean:.1f} % of clean twins, by construction")
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    print("recall of the classifier: " + ", ".join(f"{plant} {100 * share:.0f} %" for plant, share in sorted(judge.recall.items(), key=lambda item: -item[1])))
    print(f"sheet {a.out / 'delivered.png'}, numbers {a.out / 'delivered.json'}")


def _names(folder: Path) -> list[str]:
    return [f.name for f in sorted(folder.glob("*.jpg"))]


def _enrolled(home: Path, subject: str) -> set[str]:
    return {*_names(home / "photos" / subject)}


if __name__ == "__main__":
    main()
