"""Calibrating: the arithmetic on people made by hand, the edits, and the whole command's measuring on a few people who were rendered."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from likeness.calibration import Calibration
from likeness.gate import GATED, GatePolicy
from likeness.records import BaseScores, BatteryPrompt, Finding
from likeness.settings import Battery
from models.faces.portraits import choose_witnesses
from models.maquette.companions import Bank
from models.quality import measure
from models.quality.albums import FOLDS, Album, Looked, Spoilt
from models.quality.calibrating import Study, calibrate
from models.quality.edits import EDITS, mirrored
from models.quality.planting import CHECKERS, NAMES

SIDE, PHOTOS = 64, 9
BATTERY = Battery(name="made", seeds=2, prompts=(*[BatteryPrompt(category="place", template="a {who}", slots={"place": "beach"})] * 6, BatteryPrompt(category="style", template="b {who}")))
BASE = BaseScores(revision="1", battery="0" * 64, steps=20, guidance=3.0, noun="man", samples=64, one_face_share=1.0, editability=0.5, by_category={}, slots={"place": (40, 80)}, diversity=0.2,
                  spread=0.2)


def photos(seed: int) -> NDArray[np.uint8]:
    """Nine pictures that are unlike each other: broad stripes at other angles."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    turns = np.linspace(0, np.pi, PHOTOS, endpoint=False) + seed
    return np.stack([np.clip(128 + 90 * np.sin(7 * (x * np.cos(t) + y * np.sin(t)))[..., None].repeat(3, 2), 0, 255).astype(np.uint8) for t in turns])


def person(number: int, *, noun: str = "man", odd: int = 0, alike: int | None = None, beaches: int = 0, missed: int = 0, blurred: int = 0) -> Looked:
    """Somebody of nine photos with a direction of their own.

    Args:
        odd: photos on which nobody would recognise them.
        alike: another person whose direction they have.
        beaches: photos that show a beach.
        missed: of six planted defects of each kind, those that nobody finds.
        blurred: photos with a finding.
    """
    direction = np.zeros(8, np.float32)
    direction[number if alike is None else alike] = 0.5
    vectors = direction + np.random.default_rng(number).normal(0, 0.02, (PHOTOS, 8)).astype(np.float32)
    vectors[PHOTOS - odd:] *= -1
    crops = photos(number)
    album = Album(f"{number}", noun, crops, vectors, None)
    seen = [measure.Seen(f"{number:02x}{i:062x}", "plain", 1, vectors[i], measure.thumbnail(crops[i]), findings=(Finding(code="blur"),) if i < blurred else ()) for i in range(PHOTOS)]
    found = {plant: [Spoilt(2, frozenset() if k < missed else frozenset(sorted(NAMES[plant])[:1])) for k in range(6)] for plant in CHECKERS}
    return Looked(album, album.folds(2), seen, [{"place": ("beach" if i < beaches else "park", 0.9)} for i in range(PHOTOS)], found)


def rows(people: list[Looked], policy: GatePolicy | None = None, *, base: BaseScores | None = BASE, bare: int = 4) -> dict[str, Calibration]:
    impostors = np.eye(8, dtype=np.float32)[np.random.default_rng(1).integers(6, 8, 60)] * 0.5
    study = Study(people, policy or GatePolicy(), BATTERY, "dlib", Bank("dlib", "d" * 64, impostors), None, lambda noun: base, {"blur": -1.0}, bare)
    return {row.threshold: row for row in calibrate(study)}


def test_every_photo_is_unseen_once_and_witnesses_are_chosen_as_the_product_chooses_them() -> None:
    album = person(0).album
    folds = album.folds(2)
    assert sorted(i for fold in folds for i in fold.unseen) == list(range(PHOTOS))
    for fold in folds:
        assert sorted([*fold.own, *fold.unseen]) == list(range(PHOTOS))
        assert not {*fold.trained} & {*fold.witnesses}
        rest = sorted(fold.own)
        assert fold.witnesses == [rest[i] for i in choose_witnesses(album.vectors[rest], 2)]
        assert len(fold.unseen) == PHOTOS // FOLDS


def test_identity_counts_who_is_not_recognised_and_who_is_taken_for_another() -> None:
    found = rows([person(0, odd=1), person(1), person(2), person(3, alike=2), person(4, noun="woman")])
    row = found["min_position"]
    assert row.false_refusal and row.false_accept
    assert (row.false_refusal.n, row.false_refusal.people, row.false_refusal.rate) == (45, 5, pytest.approx(1 / 45, abs=1e-5))
    # 12 pairs of men, each man's nine photos against three folds; of these 2 as 3 and 3 as 2 are taken for each other
    assert (row.false_accept.n, row.false_accept.people, row.false_accept.rate) == (12 * 27, 4, pytest.approx(2 / 12, abs=1e-5))
    assert row.parts["people of the bank"].rate == 0
    sets = found["min_identity_share"]
    assert sets.false_refusal and sets.false_accept
    assert sets.false_accept.rate == pytest.approx(2 / 12, abs=1e-4)
    assert sets.false_refusal.rate < 1e-3, "eight of nine recognised photos fill every set with enough"
    assert row.equal is not None and row.curve[0].false_accept >= row.curve[-1].false_accept


def test_copies_are_caught_mirrored_ones_too_and_real_photos_are_none() -> None:
    row = rows([person(k) for k in range(4)])["min_copy_distance"]
    assert row.false_refusal and row.false_accept
    assert row.false_refusal.rate < 0.1, "one of these invented people is nearly as symmetrical as a mirror"
    assert row.false_accept.n == 4 * PHOTOS * (len(EDITS) + 1)
    assert row.parts["mirrored"].rate == 0.0
    assert row.parts["compressed"].rate == 0


def test_findings_are_missed_and_alarm_as_they_were_counted_and_a_set_of_half_defects_is_refused() -> None:
    found = rows([person(0, missed=3, blurred=1), *(person(k) for k in (1, 2, 3))])
    blur = found["finding blur"]
    assert blur.false_accept and blur.false_refusal
    assert (blur.value, blur.false_accept.rate, blur.false_refusal.rate) == (-1.0, pytest.approx(3 / 24), pytest.approx(1 / 36, abs=1e-5))
    assert {f"finding {code}" for code in GATED - {"unmeasured"}} <= found.keys()
    whole = found["max_defect_share"]
    assert whole.false_accept and whole.false_refusal
    caught = 0.5 + (0.5 * (1 / 9))                    # of the half that is spoilt half is found; of the clean half a ninth alarms
    assert 0 < whole.false_accept.rate < 1 - caught
    assert found["min_face_share"].false_accept is not None
    assert found["min_face_share"].false_accept.rate == 0, "two faces on each of seven of fourteen"


def test_answers_that_ignore_the_prompts_pass_by_chance_and_the_base_alone_hardly_fails() -> None:
    deaf, lucky = rows([person(k) for k in range(4)]), rows([person(k, beaches=PHOTOS) for k in range(4)])
    for name in ("editability_doubt", "min_editability_share"):
        one, other = deaf[name], lucky[name]
        assert one.false_accept and other.false_accept and one.false_refusal
        assert (one.false_accept.rate, other.false_accept.rate) == (0.0, 1.0)
        assert 0 < one.false_refusal.rate < GatePolicy().editability_doubt
        assert one.false_refusal.low <= one.false_refusal.rate <= one.false_refusal.high
    for changed in ({"slots": {}}, {"spread": None}):
        row = rows([person(k) for k in range(4)], base=BASE.model_copy(update=changed))
        assert (row["editability_doubt"].unmeasured is None) == ("slots" not in changed)
        assert (row["min_diversity_share"].unmeasured is None) == ("spread" not in changed)
    assert rows([person(k) for k in range(4)], base=None)["editability_doubt"].unmeasured == "what the base alone follows of this battery was not measured"


def test_one_picture_over_and_over_is_refused_for_its_spread_and_different_ones_are_not() -> None:
    row = rows([person(k) for k in range(4)])["min_diversity_share"]
    assert row.false_accept and row.false_refusal
    assert row.false_accept.rate < 0.1
    assert row.false_refusal.rate < 0.5
    assert row.curve[0].false_accept == 1.0
    assert row.curve[0].false_refusal == 0.0


def test_drift_has_rates_where_it_is_asked_about() -> None:
    people = [person(0), person(1), person(2), person(3, alike=2)]
    assert "asks nothing" in (rows(people)["max_drift_share"].unmeasured or "")
    row = rows(people, GatePolicy(max_drift_share=0.25))["max_drift_share"]
    assert row.false_accept and row.false_refusal
    assert row.false_accept.rate == 0
    assert row.false_refusal.rate == pytest.approx(2 / 12, abs=1e-4), "2 and 3 are taken for each other"


@pytest.mark.parametrize("name", list(EDITS))
def test_an_edit_is_slight_and_grows_with_its_strength(name: str) -> None:
    picture = photos(0)[0]
    weak, strong = (measure.appearance_distance(measure.thumbnail(EDITS[name](picture, s)), measure.thumbnail(picture)) for s in (0.5 if name == "lighter or darker" else 0.0, 1.0))
    assert EDITS[name](picture, 0.3).shape == picture.shape
    assert weak < 0.02
    assert weak <= strong < 0.12
    assert (mirrored(mirrored(picture, 0), 0) == picture).all()


def test_where_nothing_can_be_asked_about_a_row_says_so() -> None:
    nobody = [person(0), person(1, noun="woman")]                # no two of one class noun
    found = rows(nobody)
    for name in ("max_distance", "min_position", "min_identity_share"):
        assert found[name].unmeasured == "among these people there is nothing to ask it about"
    assert found["min_copy_distance"].unmeasured is None
