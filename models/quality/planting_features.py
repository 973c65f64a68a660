"""Features of a face spoilt one by one, to be planted beside the defects of `models.quality.planting`, in its frame and units.

What is drawn here was not drawn for training the network that looks for it (`models.quality.train_features` spoils aligned crops by code of its own).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from likeness.records import FindingCode
from models.faces import align
from models.faces.face import Face, Picture
from models.quality import planting
from models.quality.planting import PLANTS, Plant, _mixed, _place, _shifted, _soft_ellipse

MOUTH = 1.1                # below the middle of the eyes, in eye distances: by eye, on renders seen from the front


def _ellipse(picture: Picture, face: Face, at: tuple[float, float], reach: tuple[float, float], *, edge: float = 0.05) -> NDArray[np.float32]:
    """(H, W, 1): an ellipse about a place of the face; all sizes in eye distances."""
    a = align.fit(face.points)
    return _soft_ellipse(picture.shape, _place(face, *at), (reach[0] * a.eye_distance_px, reach[1] * a.eye_distance_px), a.roll_deg, edge_px=edge * a.eye_distance_px)


def _offset(face: Face, start: tuple[float, float], end: tuple[float, float]) -> tuple[float, float]:
    """From one place of the face to another, in pixels."""
    (x0, y0), (x1, y1) = _place(face, *start), _place(face, *end)
    return x1 - x0, y1 - y0


def _copied(picture: Picture, under: Picture, face: Face, start: tuple[float, float], end: tuple[float, float], reach: tuple[float, float]) -> Picture:
    """What lies about `start` once more about `end`."""
    return _mixed(under, _shifted(picture, *_offset(face, start, end)), _ellipse(picture, face, end, reach))


def missing_eye(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """Skin in place of one eye: the cheek below it, or drawn in from around."""
    side = rng.choice([-0.5, 0.5])
    if rng.random() < 0.5:
        return _mixed(picture, _shifted(picture, *_offset(face, (side, 0.6), (side, 0.0))), _ellipse(picture, face, (side, 0.0), (0.36, 0.22), edge=0.1))
    hole = (_ellipse(picture, face, (side, 0.0), (0.36, 0.22))[..., 0] > 0.1).astype(np.uint8)
    return np.asarray(cv2.inpaint(np.ascontiguousarray(picture), hole, max(2, 0.1 * align.fit(face.points).eye_distance_px), cv2.INPAINT_TELEA), np.uint8)


def enlarged_eye(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """One eye half as large again to twice as large."""
    side, scale = rng.choice([-0.5, 0.5]), rng.uniform(1.5, 2.0)
    x, y = _place(face, side, 0)
    grown = cv2.warpAffine(picture, np.array([[scale, 0, x - scale * x], [0, scale, y - scale * y]]), picture.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return _mixed(picture, grown, _ellipse(picture, face, (side, 0.0), (0.32 * scale, 0.2 * scale)))


def crossed_eyes(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """Both irises a seventh to a fifth of an eye distance towards the nose, or both away from it."""
    inwards, spoilt = rng.choice([-1, 1]) * rng.uniform(0.14, 0.2), picture
    for side in (-0.5, 0.5):
        spoilt = _copied(picture, spoilt, face, (side, 0.0), (side - 2 * side * inwards, 0.0), (0.14, 0.13))
    return spoilt


def smeared_mouth(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """The mouth drawn out along a line two fifths to four fifths of an eye distance long."""
    a = align.fit(face.points)
    length, angle = a.eye_distance_px * rng.uniform(0.4, 0.8), rng.uniform(0, math.pi)
    side = 2 * math.ceil(length / 2) + 1
    kernel = np.zeros((side, side), np.float32)
    dx, dy = length / 2 * math.cos(angle), length / 2 * math.sin(angle)
    cv2.line(kernel, (round(side // 2 - dx), round(side // 2 - dy)), (round(side // 2 + dx), round(side // 2 + dy)), 1.0)
    smeared = cv2.filter2D(picture, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)
    return _mixed(picture, smeared, _ellipse(picture, face, (0.0, MOUTH), (0.55, 0.32), edge=0.08))


def doubled_mouth(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """A second mouth below, above or beside the first."""
    across, down = ((0.0, 0.36), (0.0, -0.32), (0.5, 0.1), (-0.5, 0.1))[rng.integers(4)]
    return _copied(picture, picture, face, (0.0, MOUTH), (across, MOUTH + down), (0.45, 0.2))


def third_eye(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """An eye once more: on a cheek, the forehead or the chin."""
    place = ((-0.55, 0.65), (0.55, 0.65), (0.0, -0.55), (0.0, 1.5))[rng.integers(4)]
    return _copied(picture, picture, face, (rng.choice([-0.5, 0.5]), 0.0), place, (0.32, 0.19))


def dented_face(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """A round patch of the face, two fifths to three quarters of an eye distance in radius, sucked towards its middle or blown up."""
    unit = align.fit(face.points).eye_distance_px
    cx, cy = _place(face, rng.uniform(-0.5, 0.5), rng.uniform(-0.1, 1.2))
    radius, power = unit * rng.uniform(0.4, 0.75), rng.choice([-1, 1]) * rng.uniform(0.5, 0.7)
    y, x = np.mgrid[:picture.shape[0], :picture.shape[1]].astype(np.float32)
    near = np.clip(1 - np.hypot(x - cx, y - cy) / radius, 0, 1)
    scale = 1 + power * np.sin(np.pi / 2 * near)
    return np.asarray(cv2.remap(picture, (cx + (x - cx) * scale).astype(np.float32), (cy + (y - cy) * scale).astype(np.float32), cv2.INTER_LINEAR,
                                borderMode=cv2.BORDER_REFLECT_101), np.uint8)


FEATURE_PLANTS: Mapping[str, Plant] = {
    "missing eye": missing_eye, "enlarged eye": enlarged_eye, "crossed eyes": crossed_eyes, "smeared mouth": smeared_mouth, "doubled mouth": doubled_mouth,
    "third eye": third_eye, "dented face": dented_face,
}
ALL_PLANTS: Mapping[str, Plant] = {**PLANTS, **FEATURE_PLANTS}

_CODES: Mapping[str, FindingCode] = {
    **dict.fromkeys(("moved eye", "mirrored eye", "missing eye", "enlarged eye", "crossed eyes"), "eyes"), **dict.fromkeys(("smeared mouth", "doubled mouth"), "mouth"),
    **dict.fromkeys(("melted patch", "third eye", "dented face"), "melted"),
}
# What each type of defect must be called; a face so spoilt that the detector sees none is noticed too.
NAMES: Mapping[str, frozenset[FindingCode]] = {**planting.NAMES, **{plant: frozenset({code, "no_face"}) for plant, code in _CODES.items()}}
CHECKERS: Mapping[str, FindingCode] = {**planting.CHECKERS, **_CODES}
