"""The gate: pure decisions. A score that improves never refuses; what was not measured never passes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from likeness.gate import GATED, GatePolicy, is_copy, is_person, judge, position
from likeness.records import Finding, FindingCode, Measurements, SampleScore

DIGEST = "0" * 64
POLICY = GatePolicy()


def score(distance: float | None = 0.3, *, faces: int | None = 1, nearest: float | None = 0.2, category: str = "plain", codes: Iterable[str] = (),
          image: str = DIGEST) -> SampleScore:
    where = None if distance is None else position(distance, floor=0.65, ceiling=0.25)
    return SampleScore(image=image, category=category, faces=faces, identity_distance=distance, position=where, nearest_training=nearest,
                       findings=tuple(Finding(code=code, score=1.0, threshold=0.5) for code in codes))      # type: ignore[arg-type]


def measured(*scores: SampleScore, ceiling: float = 0.25, floor: float = 0.65, portraits: int = 10, apart: tuple[tuple[float, ...], ...] = ()) -> Measurements:
    return Measurements(backend="dlib", bank=DIGEST, threshold=0.45, ceiling=ceiling, floor=floor, usable_portraits=portraits, scores=scores, apart=apart)


@pytest.mark.parametrize(("scores", "kind", "code"), [
    ([score()] * 10, "accepted", "accepted"),
    ([score(0.6)] * 10, "retry", "identity"),
    ([score(None)] * 10, "retry", "identity"),
    ([score(faces=2)] * 10, "retry", "faces"),
    ([score(faces=None)] * 10, "retry", "faces"),
    ([score(nearest=0.01)] * 10, "retry", "copies"),
    ([score(nearest=None)] * 10, "retry", "copies"),
    ([score(codes=["blur"])] * 3 + [score()] * 7, "retry", "defects"),
    ([score(codes=["unmeasured"])] * 10, "retry", "defects"),
    ([score(codes=["blur"])] * 2 + [score()] * 8, "accepted", "accepted"),
    ([score(codes=["plastic_skin", "colour_cast"])] * 10, "accepted", "accepted"),
    ([score()] * 3, "rejected", "too_few_samples"),
    ([], "rejected", "too_few_samples"),
    ([score(category="style")] * 10, "rejected", "too_few_samples"),
], ids=["good", "stranger", "unmeasured identity", "two faces", "detector failed", "copier", "unmeasured copy", "defects", "unmeasured defects", "few defects", "defects that are not gated", "few", "none", "only stylised"])
def test_each_failing_measure_refuses_for_its_own_reason(scores: list[SampleScore], kind: str, code: str) -> None:
    verdict = judge(measured(*scores), POLICY)
    assert verdict.kind == kind
    assert code in {r.code for r in verdict.reasons}
    assert (verdict.delivered != ()) == (kind == "accepted")


def test_photos_that_do_not_agree_need_other_photos() -> None:
    assert judge(measured(*[score()] * 10, ceiling=0.63), POLICY).kind == "needs_photos"


CODES = st.sets(st.sampled_from(get_args(FindingCode)), max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 3), st.floats(0.0, 0.5), st.one_of(st.just(set()), CODES)), min_size=8, max_size=20), st.data())
def test_improving_one_sample_never_turns_accepted_into_refused(raw: list[tuple[float, int, float, set[str]]], data: st.DataObject) -> None:
    before = [score(d, faces=f, nearest=n, codes=sorted(c)) for d, f, n, c in raw]
    which = data.draw(st.integers(0, len(before) - 1))
    d, _, n, codes = raw[which]
    after = [*before]
    kept = data.draw(st.sets(st.sampled_from(sorted(codes)))) if codes else set()
    after[which] = score(data.draw(st.floats(0.0, d)), faces=1, nearest=data.draw(st.floats(n, 1.0)), codes=sorted(kept))
    if judge(measured(*before), POLICY).kind == "accepted":
        assert judge(measured(*after), POLICY).kind == "accepted"


@settings(max_examples=50, deadline=None)
@given(st.lists(CODES, min_size=10, max_size=10))
def test_a_finding_taken_away_never_refuses_and_the_share_counts_samples_not_findings(codes: list[set[str]]) -> None:
    verdict = judge(measured(*[score(codes=sorted(c)) for c in codes]), POLICY)
    share = sum(bool(c & GATED) for c in codes) / 10
    assert verdict.scores["defect_share"] == pytest.approx(share)
    assert (verdict.kind == "accepted") == (share <= POLICY.max_defect_share)


def test_the_reason_names_the_defects_that_count() -> None:
    scores = [score(codes=["blur", "grid", "plastic_skin"])] * 2 + [score(codes=["blur"])] * 6
    [reason] = [r for r in judge(measured(*scores), POLICY).reasons if r.code == "defects"]
    assert reason.message == "100% of the samples have a defect (blur 8, grid 2), at most 25% may"


# -- what is delivered

def names(count: int) -> list[str]:
    return [f"{i:064x}" for i in range(count)]


def on_a_line(*places: float) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(abs(a - b) for b in places[:i]) for i, a in enumerate(places))


def test_the_most_alike_comes_first_then_each_time_what_is_farthest_from_all_so_far() -> None:
    images = names(10)
    scores = [score(0.3 if i != 4 else 0.25, image=image) for i, image in enumerate(images)]
    found = judge(measured(*scores, apart=on_a_line(0, 1, 2, 3, 4, 5, 6, 7, 8, 10)), POLICY.model_copy(update={"max_delivered": 4}))
    assert found.delivered == (images[4], images[9], images[0], images[7])
    assert judge(measured(*scores, apart=on_a_line(*[0.0] * 10)), POLICY).delivered[:3] == (images[4], images[0], images[1])


def test_no_more_than_the_policy_says_no_picture_twice_none_with_a_finding() -> None:
    images = names(12)
    scores = [score(image=image, codes=["plastic_skin"] if i == 3 else ["blur"] if i == 5 else []) for i, image in enumerate(images)]
    found = judge(measured(*scores, *scores[:2], apart=on_a_line(*range(14))), POLICY.model_copy(update={"max_delivered": 20})).delivered
    assert sorted(found) == [image for i, image in enumerate(images) if i not in (3, 5)]
    assert len(judge(measured(*scores), POLICY).delivered) == POLICY.max_delivered


def test_where_every_sample_has_a_finding_those_that_are_not_gated_may_be_delivered() -> None:
    images = names(10)
    scores = [score(image=image, codes=["colour_cast"] if i else ["colour_cast", "blur"]) for i, image in enumerate(images)]
    found = judge(measured(*scores), POLICY.model_copy(update={"max_delivered": 20}))
    assert sorted(found.delivered) == images[1:]


def test_distances_must_be_of_the_scores() -> None:
    with pytest.raises(ValidationError, match="row i with i distances"):
        measured(score(), score(), apart=((), (), ()))


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
