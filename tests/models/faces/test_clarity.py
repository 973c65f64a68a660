"""A covered face and a drawing are told from a photo; glasses, hats and beards are no cover."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.faces import align
from models.faces.clarity import Clarity, ClarityReader, shrink
from models.faces.tools import dlib_tools
from models.faces.train_clarity import MAX_STRAY, MIN_COVER, cover, inner_face, spoil


@pytest.fixture(scope="module")
def crops(root: Path) -> NDArray[np.uint8]:
    tools, found = dlib_tools(), []
    for path in sorted((root / "examples" / "demo").glob("*.jpg")):
        with Image.open(path) as picture:
            photo = np.asarray(picture.convert("RGB"))
        face = tools.main_face(photo)
        if face is not None:
            found.append(align.crop(photo, align.fit(face.points), side_px=256))
    return np.stack(found)


def refused(reader: ClarityReader, crops: NDArray[np.uint8]) -> list[tuple[bool, bool]]:
    answers = [reader.read(c) for c in crops]
    return [(a.covered > reader.limits.covered, a.drawn > reader.limits.drawn) for a in answers]


def test_photos_with_hats_and_glasses_are_clear(crops: NDArray[np.uint8]) -> None:
    assert refused(ClarityReader(), crops) == [(False, False)] * len(crops)


def mask_over_mouth(crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    made = crop.copy()
    cv2.fillPoly(made, [np.array([[85, 130], [128, 122], [171, 130], [160, 196], [96, 196]])], (170, 200, 215))
    return made


def hand_over_face(crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    made = crop.copy()
    for i in range(4):
        cv2.line(made, (95 + 22 * i, 70), (60 + 22 * i, 255), (205, 160, 130), 20)
    return made


@pytest.mark.parametrize("spoilt", [mask_over_mouth, hand_over_face])
def test_covered_faces_are_found(crops: NDArray[np.uint8], spoilt: object) -> None:
    assert callable(spoilt)
    found = [covered for covered, _ in refused(ClarityReader(), np.stack([spoilt(c) for c in crops]))]
    assert np.mean(found) >= 0.75, found


def test_edges_are_no_photograph(crops: NDArray[np.uint8]) -> None:
    edges = np.stack([np.repeat(255 - cv2.Canny(cv2.cvtColor(c, cv2.COLOR_RGB2GRAY), 60, 140)[..., None], 3, 2) for c in crops])
    assert np.mean([drawn for _, drawn in refused(ClarityReader(), edges)]) >= 0.9


def test_what_is_spoilt_is_labelled_by_what_was_done(crops: NDArray[np.uint8]) -> None:
    small = np.stack([cv2.resize(c, (64, 64), interpolation=cv2.INTER_AREA) for c in crops])
    rng = np.random.default_rng(0)
    for _ in range(40):
        made, hidden = cover(small[0], small[1], rng)
        changed = (np.abs(made.astype(int) - small[0]).max(2) > 24)[inner_face(64)].mean()
        assert changed <= hidden + 0.12                         # a cover may look like what it covers, never the other way round
    labels = [spoil(small[i % len(small)], small[0], rng)[1] for i in range(300)]
    shares = [np.mean([label == kind for label in labels]) for kind in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0))]
    assert 0.35 < shares[0] < 0.7
    assert min(shares[1:]) > 0.07
    assert 0 < MAX_STRAY < MIN_COVER


def test_the_answer_is_a_probability_and_does_not_depend_on_the_size(crops: NDArray[np.uint8]) -> None:
    reader = ClarityReader()
    large, half = reader.read(crops[0]), reader.read(np.asarray(cv2.resize(crops[0], (128, 128), interpolation=cv2.INTER_AREA)))
    assert isinstance(large, Clarity)
    assert 0 <= large.covered <= 1
    assert abs(large.covered - half.covered) < 0.05
    assert shrink(crops[:2]).shape == (2, 3, 64, 64)
