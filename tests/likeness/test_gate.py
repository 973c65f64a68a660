"""The gate: pure decisions. A score that improves never refuses; what was not measured never passes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.gate import GatePolicy, is_copy, is_person, judge, position
from likeness.records import Measurements, SampleScore

DIGEST = "0" * 64
POLICY = GatePolicy()


def score(distance: float | None = 0.3, *, faces: int | None = 1, nearest: float | None = 0.2, category: str = "plain") -> SampleScore:
    where = None if distance is None else position(distance, floor=0.65, ceiling=0.25)
    return SampleScore(image=DIGEST, category=category, faces=faces, identity_distance=distance, position=where, nearest_training=nearest)


def measured(*scores: SampleScore, ceiling: float = 0.25, floor: float = 0.65, portraits: int = 10) -> Measurements:
    return Measurements(backend="dlib", bank=DIGEST, threshold=0.45, ceiling=ceiling, floor=floor, usable_portraits=portraits, scores=scores)


@pytest.mark.parametrize(("scores", "kind", "code"), [
    ([score()] * 10, "accepted", "accepted"),
    ([score(0.6)] * 10, "retry", "identity"),
    ([score(None)] * 10, "retry", "identity"),
    ([score(faces=2)] * 10, "retry", "faces"),
    ([score(faces=None)] * 10, "retry", "faces"),
    ([score(nearest=0.01)] * 10, "retry", "copies"),
    ([score(nearest=None)] * 10, "retry", "copies"),
    ([score()] * 3, "rejected", "too_few_samples"),
    ([], "rejected", "too_few_samples"),
    ([score(category="style")] * 10, "rejected", "too_few_samples"),
], ids=["good", "stranger", "unmeasured identity", "two faces", "detector failed", "copier", "unmeasured copy", "few", "none", "only stylised"])
def test_each_failing_measure_refuses_for_its_own_reason(scores: list[SampleScore], kind: str, code: str) -> None:
    verdict = judge(measured(*scores), POLICY)
    assert verdict.kind == kind
    assert code in {r.code for r in verdict.reasons}
    assert (verdict.delivered != ()) == (kind == "accepted")


def test_photos_that_do_not_agree_need_other_photos() -> None:
    assert judge(measured(*[score()] * 10, ceiling=0.63), POLICY).kind == "needs_photos"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 3), st.floats(0.0, 0.5)), min_size=8, max_size=20), st.data())
def test_improving_one_sample_never_turns_accepted_into_refused(raw: list[tuple[float, int, float]], data: st.DataObject) -> None:
    before = [score(d, faces=f, nearest=n) for d, f, n in raw]
    which = data.draw(st.integers(0, len(before) - 1))
    d, _, n = raw[which]
    after = [*before]
    after[which] = score(data.draw(st.floats(0.0, d)), faces=1, nearest=data.draw(st.floats(n, 1.0)))
    if judge(measured(*before), POLICY).kind == "accepted":
        assert judge(measured(*after), POLICY).kind == "accepted"


def test_few_portraits_ask_for_a_clearer_result() -> None:
    borderline = score(0.45)
    assert is_person(borderline, measured(borderline), POLICY)
    assert not is_person(borderline, measured(borderline, portraits=3), POLICY)


def test_position_is_between_floor_and_ceiling_and_none_without_a_difference() -> None:
    assert position(0.65, floor=0.65, ceiling=0.25) == 0.0
    assert position(0.1, floor=0.65, ceiling=0.25) == 1.0
    assert position(0.45, floor=0.65, ceiling=0.25) == pytest.approx(0.5)
    assert position(0.45, floor=0.5, ceiling=0.5) is None
    assert position(float("nan"), floor=0.65, ceiling=0.25) is None
    assert is_copy(score(nearest=0.05), POLICY)


def test_editability_is_the_share_of_asked_slots_and_none_when_none_is_asked() -> None:
    scores = [score().model_copy(update={"slots_right": right, "slots_asked": asked}) for right, asked in ((1, 2), (0, 1), (0, 0))]
    assert judge(measured(*scores), POLICY).scores["editability"] == pytest.approx(1 / 3)
    assert judge(measured(*scores[2:]), POLICY).scores["editability"] is None
