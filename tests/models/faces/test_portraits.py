"""Portraits of one photo: tight always, wide where the photo has room; masks lie on the face in both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.faces import align
from models.faces.portraits import SIDE_IOD, cut_portraits
from models.faces.tools import FaceTools, dlib_tools


@pytest.fixture(scope="module")
def tools() -> FaceTools:
    return dlib_tools()


def photo(root: Path, *, border: int = 0) -> np.ndarray:
    with Image.open(root / "examples" / "demo" / "03.jpg") as picture:
        return np.pad(np.asarray(picture.convert("RGB")), ((border, border), (border, border), (0, 0)), mode="edge")


def test_both_framings_put_the_eyes_at_one_place_and_the_mask_on_the_face(root: Path, tools: FaceTools) -> None:
    pixels = photo(root, border=300)
    face = tools.main_face(pixels)
    assert face is not None
    tight, wide = cut_portraits(pixels, face, tools, side_px=256, framings=("tight", "wide"))
    assert (tight.framing, wide.framing) == ("tight", "wide")
    for cut in (tight, wide):
        found = tools.main_face(cut.crop)
        assert found is not None
        again = align.fit(found.points)
        assert again.eyes_px[0] == pytest.approx(128, abs=8)
        assert again.eyes_px[1] == pytest.approx(align.EYE_LINE_REL * 256, abs=8)
        assert again.eye_distance_px == pytest.approx(256 / SIDE_IOD[cut.framing], rel=0.1)
        inside = cut.mask > 127
        for x, y in found.points:
            assert inside[round(y), round(x)]
        assert 0.05 < inside.mean() < 0.45
    assert (wide.mask > 127).mean() == pytest.approx((tight.mask > 127).mean() * (SIDE_IOD["tight"] / SIDE_IOD["wide"]) ** 2, rel=0.1)


def test_no_wide_crop_where_it_would_show_a_mirror_image_or_the_base_wants_none(root: Path, tools: FaceTools) -> None:
    close = photo(root)[40:420, 80:440]
    face = tools.main_face(np.ascontiguousarray(close))
    assert face is not None
    assert [c.framing for c in cut_portraits(close, face, tools, side_px=64, framings=("tight", "wide"))] == ["tight"]
    pixels = photo(root, border=300)
    face = tools.main_face(pixels)
    assert face is not None
    assert [c.framing for c in cut_portraits(pixels, face, tools, side_px=64, framings=("tight",))] == ["tight"]


@pytest.mark.parametrize(("shift", "whole"), [((0.0, 0.0), True), ((0.0, 0.6), False), ((0.5, 0.0), False)], ids=["inside", "chin below the edge", "cheek beyond it"])
def test_the_share_of_a_face_inside_its_photo(shift: tuple[float, float], whole: bool) -> None:
    # eye distance 100 px; the photo ends 1.7 of them below the eyes and 1.0 beside their middle
    at = align.Alignment((200.0 + 100 * shift[0], 200.0 + 100 * shift[1]), 0.0, 100.0)
    share = align.face_inside_share((370, 300, 3), at)
    assert (share == 1.0) is whole
    assert 0.6 < share <= 1.0
    turned = align.Alignment(at.eyes_px, 90.0, 100.0)
    assert 0 <= align.face_inside_share((370, 300, 3), turned) <= 1
