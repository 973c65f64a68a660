"""Portraits of one photo: the aligned tight crop, and the wider one where a base wants it and the photo has room; and which photos are held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from models.faces import align
from models.faces.face import Face, Picture
from models.faces.tools import FaceTools

Framing = Literal["tight", "wide"]
SIDE_IOD: Mapping[Framing, float] = {"tight": align.TIGHT_SIDE_IOD, "wide": align.WIDE_SIDE_IOD}
MIN_VISIBLE_WIDE = 0.97      # a wide crop is cut only where the photo fills it: what lies outside would be its mirror image


@dataclass(frozen=True)
class Cut:
    """One aligned crop (S, S, 3) with its face mask (S, S), and the share of it that lies inside the photo."""

    framing: Framing
    crop: Picture
    mask: NDArray[np.uint8]
    visible: float


def cut_portraits(photo: Picture, face: Face, tools: FaceTools, *, side_px: int, framings: Sequence[Framing]) -> list[Cut]:
    """Every crop of `framings` that this photo allows; the tight one always."""
    alignment = align.fit(face.points)
    tight = align.crop(photo, alignment, side_px=side_px)
    mask = tools.face_mask(tight)
    cuts = [Cut("tight", tight, mask, align.visible_share(photo.shape, alignment))]
    visible = align.visible_share(photo.shape, alignment, side_iod=SIDE_IOD["wide"])
    if "wide" in framings and visible >= MIN_VISIBLE_WIDE:
        cuts.append(Cut("wide", align.crop(photo, alignment, side_px=side_px, side_iod=SIDE_IOD["wide"]), widened(mask), visible))
    return cuts


def choose_witnesses(vectors_ND: NDArray[np.floating[Any]], held_out: int) -> list[int]:
    """Which of a person's N photos are held out of training, the fairest first.

    Those nearest to the person's centre: a witness must be a fair picture of them, since everything the gate says rests on it. At most a quarter of the photos, at least one;
    none of a single photo.
    """
    distance = np.linalg.norm(vectors_ND - np.median(vectors_ND, axis=0), axis=1)
    count = max(1, min(held_out, len(vectors_ND) // 4)) if len(vectors_ND) > 1 else 0
    return [int(i) for i in np.argsort(distance, kind="stable")[:count]]


def widened(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mask of a tight crop (S, S) as it lies in the wide crop of the same photo: both put the eyes at one place."""
    side, scale = mask.shape[0], SIDE_IOD["tight"] / SIDE_IOD["wide"]
    move = np.array([[scale, 0, (1 - scale) * 0.5 * side], [0, scale, (1 - scale) * align.EYE_LINE_REL * side]])
    return np.asarray(cv2.warpAffine(mask, move, (side, side), flags=cv2.INTER_AREA, borderValue=0), np.uint8)
