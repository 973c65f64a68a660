"""Defects that are planted in clean pictures, so that what a checker finds can be counted: `bench.gate`, `models.quality.calibrate`.

Every function takes an upright RGB picture (H, W, 3), the one face found in it, another clean picture with its face, and a random generator;
the label says what was done, so it is exact. Sizes are in eye distances, so that a picture of any size is spoilt alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from likeness.records import FindingCode
from models.faces import align
from models.faces.face import Face, Picture

Plant = Callable[[Picture, Face, Picture, Face, np.random.Generator], Picture]


def _soft_ellipse(shape: tuple[int, ...], centre: tuple[float, float], reach: tuple[float, float], roll_deg: float, *, edge_px: float) -> NDArray[np.float32]:
    """(H, W, 1) in [0, 1]: an ellipse with a soft edge."""
    mask = np.zeros(shape[:2], np.uint8)
    cv2.ellipse(mask, (round(centre[0]), round(centre[1])), (max(1, round(reach[0])), max(1, round(reach[1]))), roll_deg, 0, 360, 255, -1)
    return np.asarray(np.asarray(cv2.GaussianBlur(mask, (0, 0), max(0.3, edge_px)), np.float32)[..., None] / 255, np.float32)


def _mixed(picture: Picture, other: NDArray[Any], mask: NDArray[np.float32]) -> Picture:
    return np.asarray(np.clip(picture * (1 - mask) + other * mask, 0, 255).round(), np.uint8)


def _place(face: Face, across: float, down: float) -> tuple[float, float]:
    """Pixel of a point given in eye distances from the middle of the eyes, as in `align.FACE_TEMPLATE`."""
    a = align.fit(face.points)
    c, s = math.cos(math.radians(a.roll_deg)), math.sin(math.radians(a.roll_deg))
    return a.eyes_px[0] + a.eye_distance_px * (c * across - s * down), a.eyes_px[1] + a.eye_distance_px * (s * across + c * down)


def _shifted(picture: Picture, x: float, y: float) -> Picture:
    move = np.array([[1.0, 0, x], [0, 1.0, y]])
    return np.asarray(cv2.warpAffine(picture, move, picture.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def second_face(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """The head of `other`, half as large as the first one or as large, beside it; a fifth of it may lie outside the picture."""
    height, width = picture.shape[:2]
    unit = align.fit(face.points).eye_distance_px
    largest = min(1.0, 0.45 * width / (1.9 * unit))                  # there must be room for it
    size = unit * rng.uniform(0.55, 1.0) * largest
    side = max(24, round(align.TIGHT_SIDE_IOD * size))
    head = align.crop(other, align.fit(other_face.points), side_px=side)
    left = face.box_px[0] + face.box_px[2] > width
    x = 0.85 * size if left else width - 0.85 * size
    if rng.random() < 0.25 and min(face.box_px[0], width - face.box_px[2]) > 2.2 * size:
        x = width - x                                                # the narrower side, where it fits too
    y = rng.uniform(1.4 * size, max(1.4 * size + 1, min(height - 1.6 * size, face.box_px[3])))
    mask = _soft_ellipse(head.shape, (side / 2, align.EYE_LINE_REL * side + 0.35 * size), (1.2 * size, 1.75 * size), 0, edge_px=0.06 * size)
    frame = np.array([[1.0, 0, x - side / 2], [0, 1.0, y - align.EYE_LINE_REL * side]])
    layer = cv2.warpAffine(head, frame, (width, height))
    return _mixed(picture, layer, np.asarray(cv2.warpAffine(mask, frame, (width, height)), np.float32)[..., None])


def erased_face(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """The face smeared until no feature is left, the outline of the head kept."""
    a = align.fit(face.points)
    smeared = cv2.GaussianBlur(picture, (0, 0), a.eye_distance_px * rng.uniform(0.9, 1.2))
    return _mixed(picture, smeared, _soft_ellipse(picture.shape, _place(face, 0, 0.45), (1.2 * a.eye_distance_px, 1.5 * a.eye_distance_px), a.roll_deg, edge_px=0.15 * a.eye_distance_px))


def moved_eye(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """One eye a quarter to two fifths of an eye distance higher or lower, skin where it was."""
    a = align.fit(face.points)
    side = rng.choice([-0.5, 0.5])
    turn = rng.uniform(0, 2 * math.pi)
    down = rng.choice([-1, 1]) * rng.uniform(0.25, 0.4)
    dx, dy = (q - p for p, q in zip(_place(face, side, 0), _place(face, side + 0.05 * math.cos(turn), down), strict=True))
    here = _soft_ellipse(picture.shape, _place(face, side, 0), (0.34 * a.eye_distance_px, 0.2 * a.eye_distance_px), a.roll_deg, edge_px=0.05 * a.eye_distance_px)
    hole = (here[..., 0] > 0.1).astype(np.uint8)
    skin = cv2.inpaint(np.ascontiguousarray(picture), hole, max(2, 0.1 * a.eye_distance_px), cv2.INPAINT_TELEA)
    there = np.asarray(cv2.warpAffine(here, np.array([[1.0, 0, dx], [0, 1.0, dy]]), picture.shape[1::-1]), np.float32)[..., None]
    return _mixed(np.asarray(skin, np.uint8), _shifted(picture, dx, dy), there)


def mirrored_eye(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """One eye turned upside down or left to right in its place."""
    a = align.fit(face.points)
    centre = _place(face, rng.choice([-0.5, 0.5]), 0)
    angle = math.radians(a.roll_deg)
    axis = np.array([math.cos(angle), math.sin(angle)]) if rng.random() < 0.5 else np.array([-math.sin(angle), math.cos(angle)])
    flip = 2 * np.outer(axis, axis) - np.eye(2)
    frame = np.hstack([flip, (np.array(centre) - flip @ np.array(centre))[:, None]])
    flipped = cv2.warpAffine(picture, frame, picture.shape[1::-1], flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    mask = _soft_ellipse(picture.shape, centre, (0.36 * a.eye_distance_px, 0.24 * a.eye_distance_px), a.roll_deg, edge_px=0.05 * a.eye_distance_px)
    return _mixed(picture, flipped, mask)


def melted_patch(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """A round patch of the face, half to nine tenths of an eye distance in radius, wrung by a third to a whole turn."""
    unit = align.fit(face.points).eye_distance_px
    cx, cy = _place(face, rng.uniform(-0.5, 0.5), rng.uniform(-0.1, 1.2))
    radius, turn = unit * rng.uniform(0.5, 0.9), rng.choice([-1, 1]) * rng.uniform(2.0, 6.0)
    y, x = np.mgrid[:picture.shape[0], :picture.shape[1]].astype(np.float32)
    r = np.hypot(x - cx, y - cy)
    angle = np.arctan2(y - cy, x - cx) + turn * np.clip(1 - r / radius, 0, 1) ** 1.5
    near = r < radius
    map_x = np.where(near, cx + r * np.cos(angle), x).astype(np.float32)
    map_y = np.where(near, cy + r * np.sin(angle), y).astype(np.float32)
    return np.asarray(cv2.remap(picture, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101), np.uint8)


def plastic_skin(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """The skin smoothed until no pore is left, edges kept: what a beauty filter does."""
    a = align.fit(face.points)
    smooth = np.ascontiguousarray(picture)
    for _ in range(3):
        smooth = np.asarray(cv2.bilateralFilter(smooth, -1, rng.uniform(25, 45), 0.09 * a.eye_distance_px), np.uint8)
    return _mixed(picture, smooth, _soft_ellipse(picture.shape, _place(face, 0, 0.35), (1.3 * a.eye_distance_px, 1.8 * a.eye_distance_px), a.roll_deg, edge_px=0.1 * a.eye_distance_px))


def blur(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """Out of focus: Gaussian of a sixteenth to an eighth of an eye distance."""
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), align.fit(face.points).eye_distance_px * rng.uniform(1 / 16, 1 / 8)), np.uint8)


def crop(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """The border of the picture goes through the face: half to four fifths of its box are left, enlarged to the size of the picture."""
    height, width = picture.shape[:2]
    left, top, right, bottom = face.box_px
    share = rng.uniform(0.5, 0.8)
    edge = rng.integers(0, 3)                                        # left, right, below: a cut above the brows is how many portraits are framed
    if edge == 0:
        part = picture[:, round(right - share * (right - left)):]
    elif edge == 1:
        part = picture[:, :round(left + share * (right - left))]
    else:
        part = picture[:round(top + share * (bottom - top))]
    scale = min(height / part.shape[0], width / part.shape[1])
    part = np.asarray(cv2.resize(part, (round(part.shape[1] * scale), round(part.shape[0] * scale)), interpolation=cv2.INTER_CUBIC), np.uint8)
    if part.shape[1] < width:                                        # square again: cut the longer way, about the face
        keep = round(part.shape[1] * height / part.shape[0])
        at = min(max(0, round((top + bottom) / 2 * scale - keep / 2)), part.shape[0] - keep)
        part = part[at:at + keep]
    else:
        keep = round(part.shape[0] * width / height)
        at = min(max(0, round((left + right) / 2 * scale - keep / 2)), part.shape[1] - keep)
        part = part[:, at:at + keep]
    return np.asarray(cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def grid(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """A collage: two halves, or four or nine small pictures, half of them with a line between."""
    height, width = picture.shape[:2]
    rows, columns = [(1, 2), (2, 1), (2, 2), (3, 3)][rng.integers(0, 4)]
    made = np.zeros_like(picture)
    for r in range(rows):
        for c in range(columns):
            y, x = slice(height * r // rows, height * (r + 1) // rows), slice(width * c // columns, width * (c + 1) // columns)
            source, at = (picture, face) if (r + c) % 2 == 0 else (other, other_face)
            high, wide = y.stop - y.start, x.stop - x.start
            scale = max(high / source.shape[0], wide / source.shape[1])
            small = cv2.resize(source, (math.ceil(source.shape[1] * scale), math.ceil(source.shape[0] * scale)), interpolation=cv2.INTER_AREA)
            middle = ((at.box_px[0] + at.box_px[2]) / 2 * scale, (at.box_px[1] + at.box_px[3]) / 2 * scale)
            left, top = (min(max(0, round(m - n / 2)), size - n) for m, n, size in zip(middle, (wide, high), small.shape[1::-1], strict=True))
            made[y, x] = small[top:top + high, left:left + wide]
    if rng.random() < 0.5:
        line, colour = max(1, round(min(height, width) * rng.uniform(0.006, 0.02))), rng.choice([0, 255])
        for r in range(1, rows):
            made[height * r // rows - line // 2:height * r // rows - line // 2 + line] = colour
        for c in range(1, columns):
            made[:, width * c // columns - line // 2:width * c // columns - line // 2 + line] = colour
    return made


def colour_cast(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """Gains of the three channels that differ by a factor of 1.5 to 2.2."""
    gains = rng.permutation([0.0, rng.uniform(0.2, 0.8), 1.0]) * math.log(rng.uniform(1.5, 2.2))
    return np.asarray(np.clip(picture * np.exp(gains - gains.mean()), 0, 255).round(), np.uint8)


def over_saturation(picture: Picture, face: Face, other: Picture, other_face: Face, rng: np.random.Generator) -> Picture:
    """Colours 2 to 3 times as far from grey."""
    level = picture.astype(np.float32).mean(2, keepdims=True)
    return np.asarray(np.clip(level + (picture - level) * rng.uniform(2.0, 3.0), 0, 255).round(), np.uint8)


PLANTS: Mapping[str, Plant] = {
    "second face": second_face, "erased face": erased_face, "moved eye": moved_eye, "mirrored eye": mirrored_eye, "melted patch": melted_patch, "plastic skin": plastic_skin,
    "blur": blur, "crop": crop, "grid": grid, "colour cast": colour_cast, "over-saturation": over_saturation,
}

# What each type of defect must be called; a face cut so far that the detector sees none is noticed too. Three have no checker yet.
NAMES: Mapping[str, frozenset[FindingCode]] = {
    "second face": frozenset({"extra_face"}), "erased face": frozenset({"no_face"}), "crop": frozenset({"cropped_face", "no_face"}), "grid": frozenset({"grid"}),
    "blur": frozenset({"blur", "no_face"}), "colour cast": frozenset({"colour_cast"}), "over-saturation": frozenset({"over_saturated"}), "plastic skin": frozenset({"plastic_skin"}),
}
CHECKERS: Mapping[str, FindingCode] = {"second face": "extra_face", "erased face": "no_face", "crop": "cropped_face", "grid": "grid", "blur": "blur",
                                       "colour cast": "colour_cast", "over-saturation": "over_saturated", "plastic skin": "plastic_skin"}
