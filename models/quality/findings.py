"""Typed defects of one picture: what a viewer would see at once, each measured and held against what is usual. Pure.

A defect begins where clean pictures end. Three distributions say where that is:

* clean renders, in the shipped table `usual.json` (`python -m models.quality.usual` measures it) with data, date, counts and the share of
  clean pictures beyond each limit;
* what the base draws when nobody is personalised, in the same table, where it was measured: an Adapter cannot be sharper than its base;
* the subject's own portraits: what lies within them is no defect (a soft camera, harsh light). The last two may widen a limit, never narrow it.

Which findings the gate counts against an Adapter is decided in `likeness.gate.GATED`, by what `make bench-gate` measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from likeness import digest
from likeness.records import Box, Finding, FindingCode
from models.faces import align
from models.faces.face import Face, Picture
from models.quality import features

TABLE = Path(__file__).with_name("usual.json")
SIDE_PX = 128              # of the aligned crop that signs of the face are read from: all pictures at one scale, eyes 25 px apart
SEAM_SIDE_PX = 128         # of the picture that lines are looked for in
SEAM_ROWS = 0.15           # a line may be interrupted for so much of its length: 0.25 and more let curtains and window frames through
SEAM_MARGIN = 0.22         # of the picture on each side where no line is looked for: collages are cut in the middle third
_SKIN = ((-0.55, 0.75, 0.2, 0.2), (0.55, 0.75, 0.2, 0.2), (0.0, -0.55, 0.35, 0.15))     # cheeks and forehead: centre and half size in eye distances


@dataclass(frozen=True)
class View:
    """What signs are read from: the picture (H, W, 3), its main face, the aligned crop (128, 128, 3), the skin (P, 2) of the subject's own portraits."""

    picture: Picture
    face: Face
    crop: Picture
    own_skin: NDArray[np.float64]

    @cached_property
    def features(self) -> features.Features:
        """What the network says of eyes, mouth and the rest; asked once."""
        return features.reader().read(self.crop)


@dataclass(frozen=True)
class Sign:
    """One number read from a picture, and on which side of its limit the defect lies.

    Attributes:
        of_the_face: read from the aligned crop, so the subject's own portraits say what is usual too.
        of_paintings: asked of stylised samples as well.
        where: the place of the defect in the picture; None: the face.
    """

    read: Callable[[View], float]
    bad: Literal["low", "high"]
    of_the_face: bool = True
    of_paintings: bool = False
    where: Callable[[View], Box] | None = None


def inside_share(view: View) -> float:
    """Share of the face, brow to chin, that lies inside the picture."""
    return align.face_inside_share(view.picture.shape, align.fit(view.face.points))


def face_height(view: View) -> float:
    """Brow to chin, in heights of the picture."""
    return float(view.face.height_px / view.picture.shape[0])


def sharpness(view: View) -> float:
    """Log(spread of details of 1 px / spread of details of 2 to 4 px) within the face, in the crop: contrast cancels out, softness does not."""
    grey = cv2.cvtColor(view.crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    fine, middle, coarse = (cv2.GaussianBlur(grey, (0, 0), sigma) for sigma in (0.7, 1.4, 4.0))
    face = _inner_face(view.crop.shape[0])
    return _log((fine - middle)[face].std()) - _log((middle - coarse)[face].std())


def seam(view: View) -> float:
    """The strongest straight line through the whole picture, up and down or across, in grey levels above what lies beside it.

    A column (or row) counts with the step that 85 % of its pixels exceed: things end, the edge of a picture in a collage does not.
    """
    small = cv2.resize(view.picture, (SEAM_SIDE_PX, SEAM_SIDE_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    keep = round(SEAM_MARGIN * SEAM_SIDE_PX)
    strongest = 0.0
    for way in (small, small.transpose(1, 0, 2)):
        step = np.abs(way[:, 2:] - way[:, :-2]).max(2)
        beside = np.mean([np.roll(step, by, 1) for by in (-5, -4, 4, 5)], axis=0)
        strongest = max(strongest, float(np.quantile(step - beside, SEAM_ROWS, axis=0)[keep:-keep].max()))
    return strongest


def skin_distance(view: View) -> float:
    """Distance of the skin's colour (a*, b* of CIELAB) to that of the nearest own portrait."""
    return float(np.linalg.norm(view.own_skin - skin_colour(view.crop), axis=1).min())


def face_chroma(view: View) -> float:
    """Mean distance from grey within the face, in CIELAB."""
    lab = _lab(view.crop)[_inner_face(view.crop.shape[0])]
    return float(np.hypot(lab[:, 1], lab[:, 2]).mean())


def skin_detail(view: View) -> float:
    """Log of the spread of details of 1 to 2 px on cheeks and forehead, in grey levels, the median of the three: pores, wrinkles, grain."""
    grey = cv2.cvtColor(view.crop, cv2.COLOR_RGB2GRAY).astype(np.float32)
    details = grey - cv2.GaussianBlur(grey, (0, 0), 1.4)
    return math.log(float(np.median([details[place].std() for place in _skin_places(view.crop.shape[0])])) + 1e-3)


def whole_picture(view: View) -> Box:
    """Corners of the picture."""
    return 0.0, 0.0, float(view.picture.shape[1]), float(view.picture.shape[0])


def _of_feature(kind: str) -> Sign:
    """How sure the network is of its surest cell that this is spoilt: a logit; and around which cells."""
    return Sign(lambda view: view.features.logits[kind], "high", where=lambda view: _in_picture(view, view.features.boxes_px[kind]))


SIGNS: Mapping[FindingCode, Sign] = {
    "cropped_face": Sign(inside_share, "low", of_the_face=False, of_paintings=True),
    "tiny_face": Sign(face_height, "low", of_the_face=False, of_paintings=True),
    "grid": Sign(seam, "high", of_the_face=False, of_paintings=True, where=whole_picture),
    "blur": Sign(sharpness, "low"),
    "colour_cast": Sign(skin_distance, "high"),
    "over_saturated": Sign(face_chroma, "high"),
    "plastic_skin": Sign(skin_detail, "low"),
    "eyes": _of_feature("eyes"),
    "mouth": _of_feature("mouth"),
    "melted": _of_feature("melted"),
}


@dataclass(frozen=True)
class Usual:
    """Where defects begin, for one subject on one base."""

    limits: Mapping[FindingCode, float]
    own_skin: NDArray[np.float64]          # (P, 2)


def usual(portraits: Sequence[Picture], *, base: str) -> Usual:
    """Limits of a subject with these aligned portraits (S, S, 3) on the base of this revision.

    Clean renders are the beginning; what the base draws where somebody measured it, and then the portraits, widen the limits.
    """
    renders, *bases = table()["rows"]
    limits: dict[FindingCode, float] = dict(renders["limits"])
    rows: list[Mapping[FindingCode, float | None]] = [row["limits"] for row in bases if row["revision"] == base]
    rows += [{code: _measured(sign, view) for code, sign in SIGNS.items() if sign.of_the_face and code != "colour_cast"} for view in map(view_of_crop, portraits)]
    for row in rows:
        for code, value in row.items():
            if value is not None:
                limits[code] = min(limits[code], value) if SIGNS[code].bad == "low" else max(limits[code], value)
    return Usual(limits, np.array([skin_colour(_resized(p)) for p in portraits]).reshape(-1, 2))


def find_defects(picture: Picture, faces: Sequence[Face] | None, usual: Usual, *, stylised: bool = False) -> tuple[Finding, ...]:
    """Everything that is not as usual in one picture (H, W, 3), upright RGB.

    Args:
        faces: what the detector found, largest first; None if it failed.
        stylised: a painting has no skin and no focus; only how many faces there are, how they are framed, and collages are looked at.

    Returns:
        findings with what was measured, its limit and where, in pixels; `unmeasured` for a sign that failed or gave no number.
    """
    if faces is None:
        return (Finding(code="unmeasured"),)
    found = [Finding(code="extra_face", score=float(len(faces)), threshold=1.0, box_px=_box(face)) for face in faces[1:]]
    if not faces:
        found.append(Finding(code="no_face", score=0.0, threshold=1.0))
    view = _view(picture, faces[0], usual.own_skin) if faces else None
    for code, sign in SIGNS.items():
        asked = bool(faces) and (sign.of_paintings or not stylised) and (code != "colour_cast" or len(usual.own_skin) > 0)
        if not asked:
            continue
        value, limit = _measured(sign, view), usual.limits.get(code, math.nan)
        if value is None or not math.isfinite(limit):
            found.append(Finding(code="unmeasured", of=code, box_px=_box(faces[0])))
        elif value < limit if sign.bad == "low" else value > limit:
            found.append(Finding(code=code, score=round(value, 4), threshold=round(limit, 4), box_px=_box(faces[0]) if sign.where is None or view is None else sign.where(view)))
    return tuple(found)


def signs_of(picture: Picture, face: Face, own_skin: NDArray[np.float64]) -> dict[FindingCode, float | None]:
    """Every sign of one picture, None where it could not be read: what the table is measured from."""
    view = _view(picture, face, own_skin)
    return {code: _measured(sign, view) for code, sign in SIGNS.items()}


def skin_colour(crop: Picture) -> NDArray[np.float64]:
    """(2,): median a* and b* of cheeks and forehead of an aligned crop."""
    lab = _lab(crop)
    return np.asarray(np.median(np.concatenate([lab[place].reshape(-1, 3) for place in _skin_places(crop.shape[0])]), axis=0)[1:], np.float64)


def view_of_crop(portrait: Picture) -> View:
    """A portrait (S, S, 3) as it is: alignment put the face where the template is."""
    side = float(portrait.shape[0])
    return View(portrait, Face((0.0, 0.0, side, side), align.template_in_crop(portrait.shape[0]), 1.0), _resized(portrait), np.zeros((0, 2)))


@cache
def table() -> dict[str, Any]:
    """The shipped table: `rows`, the first one of renders, each other of one base by its revision."""
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


def table_digest() -> str:
    """What the key of a judgement names: the table, and the network that its limits are of."""
    return digest.of_json({"table": table(), "features": features.reader().digest})


def _view(picture: Picture, face: Face, own_skin: NDArray[np.float64]) -> View | None:
    try:
        return View(picture, face, align.crop(picture, align.fit(face.points), side_px=SIDE_PX), own_skin)
    except (ValueError, cv2.error):              # points that are no face
        return None


def _measured(sign: Sign, view: View | None) -> float | None:
    """The number, None if reading it failed in whatever way: that must not end a run, and must not pass."""
    if view is None:
        return None
    try:
        value = float(sign.read(view))
    except MemoryError:
        raise
    except Exception:
        return None
    return value if math.isfinite(value) else None


def _box(face: Face) -> Box:
    left, top, right, bottom = (round(float(v), 1) for v in face.box_px)
    return left, top, right, bottom


def _in_picture(view: View, box_px: tuple[float, float, float, float]) -> Box:
    """The upright box in the picture around a box in the crop."""
    left, top, right, bottom = box_px
    back = np.asarray(cv2.invertAffineTransform(align.crop_matrix(align.fit(view.face.points), side_px=SIDE_PX)))
    corners = back @ np.array([[left, right, left, right], [top, top, bottom, bottom], [1.0, 1.0, 1.0, 1.0]])
    size = np.array([[view.picture.shape[1]], [view.picture.shape[0]]])
    (x0, y0), (x1, y1) = (np.clip(side, 0, size[:, 0]) for side in (corners.min(1), corners.max(1)))
    return round(float(x0), 1), round(float(y0), 1), round(float(x1), 1), round(float(y1), 1)


def _resized(crop: Picture) -> Picture:
    return crop if crop.shape[0] == SIDE_PX else np.asarray(cv2.resize(crop, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_AREA), np.uint8)


def _log(value: float) -> float:
    return math.log(value) if value > 1e-3 else math.nan          # a face without any detail is no face


def _lab(crop: Picture) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(crop.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), np.float32)


@cache
def _inner_face(side: int) -> NDArray[np.bool_]:
    """(S, S): brow to chin of an aligned crop."""
    unit, mask = side / align.TIGHT_SIDE_IOD, np.zeros((side, side), np.uint8)
    cv2.ellipse(mask, (side // 2, round(align.EYE_LINE_REL * side + 0.45 * unit)), (round(0.85 * unit), round(1.15 * unit)), 0, 0, 360, 1, -1)
    return mask.astype(bool)


@cache
def _skin_places(side: int) -> tuple[tuple[slice, slice], ...]:
    unit, eye = side / align.TIGHT_SIDE_IOD, align.EYE_LINE_REL * side
    return tuple((slice(round(eye + (y - h) * unit), round(eye + (y + h) * unit) + 1), slice(round(side / 2 + (x - w) * unit), round(side / 2 + (x + w) * unit) + 1))
                 for x, y, w, h in _SKIN)
