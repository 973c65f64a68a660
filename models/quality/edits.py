"""Slight edits of a picture: what a copy of a photo may have gone through and still be that photo. Each takes a picture (S, S, 3) and a strength from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import cv2
import numpy as np

from models.faces.face import Picture

Edit = Callable[[Picture, float], Picture]


def lit(picture: Picture, strength: float) -> Picture:
    """Lighter or darker by up to 14 grey levels; in the middle of the strengths not at all."""
    return np.asarray(np.clip(picture.astype(np.int16) + round(28 * (strength - 0.5)), 0, 255), np.uint8)


def shifted(picture: Picture, strength: float) -> Picture:
    """Moved to the right by up to a fiftieth of its width; what comes in is mirrored."""
    return _warped(picture, np.array([[1.0, 0, strength * picture.shape[1] / 50], [0, 1.0, 0]]))


def closer(picture: Picture, strength: float) -> Picture:
    """Enlarged by up to 5 %."""
    size = 1 + 0.05 * strength
    return _warped(picture, np.array([[size, 0, (1 - size) * picture.shape[1] / 2], [0, size, (1 - size) * picture.shape[0] / 2]]))


def compressed(picture: Picture, strength: float) -> Picture:
    """Through JPEG at quality 80 to 30."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, round(80 - 50 * strength)])
    decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
    assert decoded is not None, "what this library encoded it decodes"
    return np.ascontiguousarray(np.asarray(decoded, np.uint8)[..., ::-1])


def softened(picture: Picture, strength: float) -> Picture:
    """Blurred by up to a hundredth of its width."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 0.1 + strength * picture.shape[1] / 100), np.uint8)


def mirrored(picture: Picture, strength: float) -> Picture:
    """Left to right, whatever the strength."""
    return np.ascontiguousarray(picture[:, ::-1])


def _warped(picture: Picture, matrix: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Picture:
    return np.asarray(cv2.warpAffine(picture, matrix, picture.shape[1::-1], flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101), np.uint8)


EDITS: Mapping[str, Edit] = {"lighter or darker": lit, "shifted": shifted, "closer": closer, "compressed": compressed, "softened": softened}
