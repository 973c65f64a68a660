"""Alignment: a face's five points to an upright square crop, by a similarity transform.

The frame is that of image arrays: x to the right, y down, pixels. `points` are five (x, y) rows in dlib's order: outer and inner corner
of the eye on the viewer's right, outer and inner corner of the eye on the viewer's left, base of the nose.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Points = NDArray[np.float64]

# Unit: the distance between the eye centres. Origin: midway between them.
# Medians over 42 frontal renders (docs/log.md, 2026-11-24), made symmetric.
FACE_TEMPLATE: Points = np.array([[0.697, -0.018], [0.302, 0.018], [-0.697, -0.018], [-0.302, 0.018], [0.0, 0.761]])

TIGHT_SIDE_IOD = 5.2   # crop side in eye distances: brow to chin is then about 45 % of the side
WIDE_SIDE_IOD = 8.5    # head and shoulders
EYE_LINE_REL = 0.43    # height of the eyes in the crop, from the top


@dataclass(frozen=True)
class Alignment:
    """Where an upright square of a photo lies: centre of the eyes, roll and scale."""

    eyes_px: tuple[float, float]
    roll_deg: float          # > 0: the head leans to the viewer's right (clockwise)
    eye_distance_px: float   # by the least-squares fit over all five points, so that a profile is not over-magnified


def fit(points: Points) -> Alignment:
    """Least-squares similarity transform from FACE_TEMPLATE to `points` (5, 2).

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991, in the plane, where the
    rotation and scale are one complex number: s * exp(i * roll) = sum(conj(t) * p) / sum(|t|^2) over centred points.

    Raises:
        ValueError: if `points` is not five finite rows, or all five coincide.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.shape != (5, 2) or not np.isfinite(points).all():
        raise ValueError(f"five finite (x, y) points needed, got an array of shape {points.shape}")
    t = FACE_TEMPLATE[:, 0] + 1j * FACE_TEMPLATE[:, 1]
    p = points[:, 0] + 1j * points[:, 1]
    t_mean, p_mean = t.mean(), p.mean()
    turn = np.vdot(t - t_mean, p - p_mean) / np.vdot(t - t_mean, t - t_mean).real
    if abs(turn) < 1e-9:
        raise ValueError("the five points coincide")
    eyes = p_mean - turn * t_mean
    return Alignment((float(eyes.real), float(eyes.imag)), math.degrees(math.atan2(turn.imag, turn.real)), float(abs(turn)))


def template_in_crop(side_px: int) -> Points:
    """Where FACE_TEMPLATE lies in a crop of this side made by `crop`."""
    return np.asarray(FACE_TEMPLATE * (side_px / TIGHT_SIDE_IOD) + np.array([0.5 * side_px, EYE_LINE_REL * side_px]), np.float64)


def corners_of(five: Points) -> Points:
    """FACE_TEMPLATE's five points from those that most networks find: eye centres, tip of the nose, corners of the mouth.

    Args:
        five: (5, 2): eye on the viewer's left, eye on the viewer's right, nose, mouth left, mouth right.

    An eye's corners lie where the template has them, along the line between the eyes; the base of the nose lies at 0.42 of the way from its
    tip to the middle of the mouth: the median over 153 photos against dlib's points, with SCRFD (0.43) and RetinaFace (0.41).
    """
    left, right, tip = five[0], five[1], five[2]
    along = right - left
    down = np.array([-along[1], along[0]])
    half, slant = (FACE_TEMPLATE[0] - FACE_TEMPLATE[1]) / 2
    out, up = half * along, slant * down
    return np.stack([right + out + up, right - out - up, left - out + up, left + out - up, tip + 0.42 * (five[3:].mean(0) - tip)])


def crop_matrix(alignment: Alignment, *, side_px: int, side_iod: float = TIGHT_SIDE_IOD) -> NDArray[np.float64]:
    """The (2, 3) matrix that takes photo pixels to crop pixels."""
    scale = side_px / (side_iod * alignment.eye_distance_px)
    angle = math.radians(-alignment.roll_deg)
    rotation = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    target = np.array([0.5 * side_px, EYE_LINE_REL * side_px])
    return np.hstack([rotation, (target - rotation @ np.array(alignment.eyes_px))[:, None]])


def crop(photo: Image, alignment: Alignment, *, side_px: int, side_iod: float = TIGHT_SIDE_IOD) -> Image:
    """Cut the upright square (side_px, side_px, 3) out of an RGB photo (H, W, 3).

    What lies outside the photo is mirrored from inside. Large photos are first reduced by area averaging, because the bicubic
    kernel of the warp has a fixed width and would alias.
    """
    shrink = side_iod * alignment.eye_distance_px / side_px
    if shrink > 1.5:
        height, width = photo.shape[:2]
        small = (max(1, round(width / shrink)), max(1, round(height / shrink)))
        sx, sy = small[0] / width, small[1] / height
        photo = np.asarray(cv2.resize(photo, small, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        # pixel centres: x' = (x + 0.5) * s - 0.5
        x, y = alignment.eyes_px
        scale = math.sqrt(sx * sy)
        alignment = Alignment(((x + 0.5) * sx - 0.5, (y + 0.5) * sy - 0.5), alignment.roll_deg, alignment.eye_distance_px * scale)
    matrix = crop_matrix(alignment, side_px=side_px, side_iod=side_iod)
    warped = cv2.warpAffine(photo, matrix, (side_px, side_px), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    return np.asarray(warped, dtype=np.uint8)


def face_inside_share(photo_shape: tuple[int, ...], alignment: Alignment, *, grid: int = 24) -> float:
    """Share of the face, an ellipse from brow to chin, that lies inside a photo of shape (H, W, ...)."""
    y, x = np.meshgrid(np.linspace(-1, 1, grid), np.linspace(-1, 1, grid), indexing="ij")
    inside = x**2 + y**2 <= 1
    # in eye distances from the middle of the eyes, as in FACE_TEMPLATE
    across, down = 0.95 * x[inside], 0.45 + 1.2 * y[inside]
    angle, unit = math.radians(alignment.roll_deg), alignment.eye_distance_px
    px = alignment.eyes_px[0] + unit * (math.cos(angle) * across - math.sin(angle) * down)
    py = alignment.eyes_px[1] + unit * (math.sin(angle) * across + math.cos(angle) * down)
    return float(((px >= 0) & (px < photo_shape[1]) & (py >= 0) & (py < photo_shape[0])).mean())


def visible_share(photo_shape: tuple[int, ...], alignment: Alignment, *, side_iod: float = TIGHT_SIDE_IOD, grid: int = 16) -> float:
    """Share of the crop's area that lies inside a photo of shape (H, W, ...)."""
    matrix = crop_matrix(alignment, side_px=grid, side_iod=side_iod)
    inverse = np.asarray(cv2.invertAffineTransform(matrix))
    xs, ys = np.meshgrid(np.arange(grid) + 0.5, np.arange(grid) + 0.5)
    places = inverse @ np.stack([xs.ravel(), ys.ravel(), np.ones(grid * grid)])
    inside = (places[0] >= 0) & (places[0] < photo_shape[1]) & (places[1] >= 0) & (places[1] < photo_shape[0])
    return float(inside.mean())
