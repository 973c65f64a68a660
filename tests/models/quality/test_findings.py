"""Typed findings on pictures of toys and of the shipped bank: each defect is named, clean pictures are left alone, nothing unmeasured passes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from likeness.gate import GATED
from models.diffusion import bases
from models.faces import align
from models.faces.face import Face, Picture
from models.maquette.companions import BANK_FOLDER
from models.quality import findings
from models.quality.findings import SIGNS, Sign, Usual, find_defects, usual
from models.quality.usual import alarms_of, limits_of

SIDE = 128
FACE = Face((36.0, 40.0, 92.0, 96.0), align.template_in_crop(SIDE), 1.0)


def bank(count: int) -> list[Picture]:
    """Aligned crops of rendered people, as the package has them."""
    people = json.loads((BANK_FOLDER / "people.json").read_text())[:count]
    return [np.asarray(Image.open(BANK_FOLDER / p["file"]).convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)) for p in people]


@pytest.fixture(scope="module")
def people() -> list[Picture]:
    return bank(40)


def named(picture: Picture, who: Usual, face: Face = FACE, *, stylised: bool = False) -> set[str]:
    return {f.code for f in find_defects(picture, [face], who, stylised=stylised)}


def smooth(picture: Picture) -> Picture:
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), 3.0), np.uint8)


def halves(picture: Picture) -> Picture:
    made = picture.copy()
    made[:, SIDE // 2:] = 255 - picture[:, SIDE // 2:]
    made[:, SIDE // 2:SIDE // 2 + 2] = 0
    return made


def green(picture: Picture) -> Picture:
    return np.clip(picture * np.array([0.35, 1.6, 0.35]), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("spoil", "code"), [(smooth, "blur"), (halves, "grid"), (green, "colour_cast"), (green, "over_saturated"), (smooth, "plastic_skin")],
                         ids=["blur", "grid", "cast", "saturation", "skin"])
def test_a_spoilt_picture_is_named_where_the_clean_one_is_not(people: list[Picture], spoil: Callable[[Picture], Picture], code: str) -> None:
    own = usual(people[:4], base="renders")
    clean = [code in named(p, own) for p in people[4:24]]
    spoilt = [code in named(spoil(p), own) for p in people[4:24]]
    assert sum(clean) <= 1
    assert sum(spoilt) >= 14, sum(spoilt)


def test_findings_say_what_was_measured_where_a_defect_begins_and_where_it_is(people: list[Picture]) -> None:
    own = usual([], base="renders")
    [found] = [f for f in find_defects(smooth(people[0]), [FACE], own) if f.code == "blur"]
    assert found.score is not None and found.threshold is not None
    assert found.score < found.threshold == own.limits["blur"]
    assert found.box_px == FACE.box_px
    [line] = [f for f in find_defects(halves(people[0]), [FACE], own) if f.code == "grid"]
    assert line.box_px == (0.0, 0.0, SIDE, SIDE)


def test_faces_are_counted_and_each_further_one_has_its_box(people: list[Picture]) -> None:
    own = usual([], base="renders")
    others = [Face((float(x), 0.0, x + 20.0, 20.0), FACE.points, 1.0) for x in (0, 30)]
    found = [f for f in find_defects(people[0], [FACE, *others], own) if f.code == "extra_face"]
    assert [f.box_px for f in found] == [o.box_px for o in others]
    assert {f.code for f in find_defects(people[0], [], own)} == {"no_face"}


def test_a_face_over_the_border_and_a_tiny_one_are_named(people: list[Picture]) -> None:
    own = usual([], base="renders")
    moved = Face(FACE.box_px, FACE.points + np.array([45.0, 0.0]), 1.0)
    assert "cropped_face" in named(people[0], own, moved)
    small = Face(FACE.box_px, (FACE.points - SIDE / 2) * 0.2 + SIDE / 2, 1.0)
    assert "tiny_face" in named(people[0], own, small)
    assert not {"cropped_face", "tiny_face"} & named(people[0], own)


def test_paintings_are_asked_for_faces_framing_and_collages_only(people: list[Picture]) -> None:
    assert named(smooth(green(people[0])), usual([], base="renders"), stylised=True) == set()
    assert "grid" in named(halves(people[0]), usual([], base="renders"), stylised=True)


# -- what is usual

def test_own_portraits_widen_a_limit_and_never_narrow_it(people: list[Picture]) -> None:
    plain = usual([], base="renders")
    for portraits in (people[:5], [smooth(p) for p in people[:5]], [green(p) for p in people[:5]]):
        own = usual(portraits, base="renders")
        for code, sign in SIGNS.items():
            assert own.limits[code] <= plain.limits[code] if sign.bad == "low" else own.limits[code] >= plain.limits[code]
    soft = usual([smooth(people[0])], base="renders")
    assert "blur" in named(smooth(people[0]), plain) and "blur" not in named(smooth(people[0]), soft)


def test_a_base_that_was_measured_widens_a_limit_too() -> None:
    plain, maquette = usual([], base="another"), usual([], base=bases.reference("maquette").revision)
    assert maquette.limits["blur"] < plain.limits["blur"], "the table is of another maquette: run python -m models.quality.usual"
    assert maquette.limits["grid"] == plain.limits["grid"]           # its own limit is narrower


def test_the_table_says_where_it_comes_from() -> None:
    renders, *others = findings.table()["rows"]
    assert set(renders["limits"]) == set(SIGNS)
    assert renders["pictures"] >= 500
    for row in (renders, *others):
        assert row["date"] and row["data"]
        for code, share in row["alarms"].items():                    # half of a base's pictures are 48: two of them are 0.042
            assert share <= (0.03 if code in GATED else 0.05), f"clean pictures of the other half are called defective: {code}"


def test_limits_are_quantiles_on_the_bad_side_and_alarms_are_counted_on_pictures_that_had_no_part() -> None:
    signs = [dict.fromkeys(SIGNS, float(v)) | {"colour_cast": None} for v in range(101)]
    limits = limits_of(signs)
    assert (limits["blur"], limits["grid"]) == (1.0, 99.0)
    assert "colour_cast" not in limits
    alarms = alarms_of(signs)
    assert (alarms["blur"], alarms["grid"]) == (0.0, 1.0)            # the second half lies wholly above the first


# -- what cannot be measured

def test_a_failing_detector_is_a_finding_that_is_gated(people: list[Picture]) -> None:
    [found] = find_defects(people[0], None, usual([], base="renders"))
    assert found.code == "unmeasured"
    assert found.code in GATED


@pytest.mark.parametrize("read", [lambda view: math.nan, lambda view: math.inf, lambda view: 1 / 0, lambda view: view.picture["x"]],
                         ids=["nan", "inf", "raises", "raises another"])
@pytest.mark.parametrize("code", list(SIGNS))
def test_a_sign_that_fails_is_a_finding(people: list[Picture], monkeypatch: pytest.MonkeyPatch, read: Callable[..., float], code: str) -> None:
    own = usual(people[1:3], base="renders")
    monkeypatch.setattr(findings, "SIGNS", dict(SIGNS) | {code: Sign(read, SIGNS[code].bad)})      # type: ignore[index]
    assert [f.of for f in find_defects(people[0], [FACE], own) if f.code == "unmeasured"] == [code]


def test_a_limit_that_is_missing_or_no_number_passes_nothing(people: list[Picture]) -> None:
    own = usual([], base="renders")
    for limits in ({c: v for c, v in own.limits.items() if c != "blur"}, dict(own.limits) | {"blur": math.nan}):
        assert [f.of for f in find_defects(people[0], [FACE], Usual(limits, own.own_skin)) if f.code == "unmeasured"] == ["blur"]


def test_a_picture_without_any_detail_and_points_that_are_no_face_pass_nothing() -> None:
    own = usual([], base="renders")
    grey: NDArray[np.uint8] = np.full((SIDE, SIDE, 3), 128, np.uint8)
    assert "unmeasured" in named(grey, own)
    for points in (np.full((5, 2), np.nan), np.zeros((5, 2))):
        assert {f.of for f in find_defects(grey, [Face(FACE.box_px, points, 1.0)], own)} == {*SIGNS} - {"colour_cast"}
