"""What every face backend speaks: a face, and the three things that can be done with it.

All pictures are upright RGB arrays (H, W, 3) uint8; boxes and points are in their pixels, x to the right, y down.

One scale of distances. Likeness compares identity vectors by their Euclidean distance, and its thresholds (`IntakePolicy`, `GatePolicy`)
are shares of `SAME_PERSON_DISTANCE`. dlib's vectors are meant so and are handed out as they are. A recogniser whose vectors are meant to be
compared by cosine hands them out at one length r, so that the distance d of two of them says their cosine and nothing else:

    d^2 = 2 r^2 (1 - cos),   r = SAME_PERSON_DISTANCE / sqrt(2 (1 - cos_same))

where `cos_same` is the cosine at which two photos still show one person: it belongs to the recogniser and was measured
(`models.faces.weights.CATALOGUE`, docs/faces.md) or is stated in the settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from models.faces import align

Picture = NDArray[np.uint8]
Vectors = NDArray[np.float32]
Metric = Literal["euclidean", "cosine"]

SAME_PERSON_DISTANCE = 0.6      # dlib's own: 59 photos of 19 people, TPR 0.98 at FPR 0.003


@dataclass(frozen=True)
class Face:
    """One face: its box (left, top, right, bottom), five points (5, 2) in `align`'s order, the detector's score."""

    box_px: tuple[float, float, float, float]
    points: NDArray[np.float64]
    score: float

    @property
    def height_px(self) -> float:
        """Brow to chin, from the points: detectors draw their boxes differently."""
        return 2.3 * align.fit(self.points).eye_distance_px


class FaceDetector(Protocol):
    """Finds faces. `name` says which network with which weights; `licence` who may use them."""

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def find_faces(self, picture: Picture) -> list[Face]:
        """All faces, largest first; boxes lie inside the picture."""


class FaceEmbedder(Protocol):
    """Recognises faces. Its `metric` is what the network was trained for; the vectors' Euclidean distance is right for either."""

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    @property
    def metric(self) -> Metric: ...

    @property
    def same_person_distance(self) -> float:
        """Distance up to which two photos show one person."""

    def embed_faces(self, picture: Picture, faces: Sequence[Face]) -> Vectors:
        """Identity vectors (N, D) of faces found in this picture."""


class FaceParser(Protocol):
    """Says which pixels are face."""

    @property
    def name(self) -> str: ...

    @property
    def licence(self) -> str: ...

    def face_mask(self, crop: Picture) -> NDArray[np.uint8]:
        """(S, S) of an aligned crop (S, S, 3): 255 is face, 0 is not, with a soft edge."""


def scaled(picture: Picture, side_px: int) -> tuple[Picture, float]:
    """The picture with its long side at `side_px`, and the factor."""
    scale = side_px / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(np.ascontiguousarray(picture), size, interpolation=way), np.uint8), scale


def inside(box_px: Sequence[float], picture: Picture) -> tuple[float, float, float, float]:
    """The part of a box that lies in the picture: faces are cut by its edge, boxes need not be."""
    height, width = picture.shape[:2]
    left, top, right, bottom = (float(v) for v in box_px)
    return min(max(left, 0.0), width), min(max(top, 0.0), height), min(max(right, 0.0), width), min(max(bottom, 0.0), height)


def largest_first(faces: Sequence[Face]) -> list[Face]:
    """By the width of the box, which hats and chins change least."""
    return sorted(faces, key=lambda f: -(f.box_px[2] - f.box_px[0]))


def once_each(faces: Sequence[Face]) -> list[Face]:
    """One face for each head: of two boxes of which one lies by more than half in the other, the surer."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda f: -f.score):
        if all(_shared(face.box_px, k.box_px) <= 0.5 for k in kept):
            kept.append(face)
    return kept


def _shared(a: Sequence[float], b: Sequence[float]) -> float:
    """What two boxes share, of the smaller one."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0.0, width) * max(0.0, height) / smaller if smaller > 0 else 0.0


def soft_edge(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A mask (S, S) whose edge is a 64th of its side wide: the loss must not learn a line."""
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), mask.shape[0] / 64), np.uint8)
