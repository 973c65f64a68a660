"""The gate: pure decisions. A score that improves never refuses; what was not measured never passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from likeness.gate import GATED, GatePolicy, fewest_followed, is_copy, is_person, judge, more_seeds, position, spread
from likeness.records import BaseScores, Finding, FindingCode, Measurements, Recogniser, SampleScore

DIGEST = "0" * 64
POLICY = GatePolicy()


def base_scores(spread: float | None = 0.2, **slots: tuple[int, int]) -> BaseScores:
    return BaseScores(revision="1", battery=DIGEST, steps=20, guidance=3.0, noun="man", samples=64, one_face_share=1.0, editability=0.5, by_category={}, slots=slots, diversity=0.25,
                      spread=spread)


BASE = base_scores()


def score(distance: float | None = 0.3, *, faces: int | None = 1, nearest: float | None = 0.2, category: str = "plain", codes: Iterable[str] = (),
          image: str = DIGEST) -> SampleScore:
    where = None if distance is None else position(distance, floor=0.65, ceiling=0.25)
    return SampleScore(image=image, category=category, faces=faces, identity_distance=distance, position=where, nearest_training=nearest,
                       findings=tuple(Finding(code=code, score=1.0, threshold=0.5) for code in codes))      # type: ignore[arg-type]


def on_a_line(*places: float) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(abs(a - b) for b in places[:i]) for i, a in enumerate(places))


def measured(*scores: SampleScore, ceiling: float = 0.25, floor: float = 0.65, portraits: int = 10, apart: tuple[tuple[float, ...], ...] | None = None) -> Measurements:
    """Samples that differ, and strangers where nobody in particular was asked for, unless a test says something else."""
    return Measurements(backend="dlib", bank=DIGEST, threshold=0.45, ceiling=ceiling, floor=floor, usable_portraits=portraits, scores=scores,
                        apart=on_a_line(*range(len(scores))) if apart is None else apart, bare=(score(0.6),) * 4, base=BASE)


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


def test_the_most_alike_comes_first_then_each_time_what_is_farthest_from_all_so_far() -> None:
    images = names(10)
    scores = [score(0.3 if i != 4 else 0.25, image=image) for i, image in enumerate(images)]
    found = judge(measured(*scores, apart=on_a_line(0, 1, 2, 3, 4, 5, 6, 7, 8, 10)), POLICY.model_copy(update={"max_delivered": 4}))
    assert found.delivered == (images[4], images[9], images[0], images[7])
    alike = judge(measured(*scores, apart=on_a_line(*[0.0] * 10)), POLICY.model_copy(update={"min_diversity_share": 0.0}))
    assert alike.delivered[:3] == (images[4], images[0], images[1])


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


@pytest.mark.parametrize(("fit", "prompts", "most", "seeds"), [
    (8, 8, 2, 0),            # enough
    (12, 8, 2, 0),
    (6, 8, 2, 1),            # two are missing, 6 of 16 are fit: six pictures would do
    (4, 8, 2, 2),            # four are missing, at 4 of 16: sixteen
    (4, 8, 1, 1),            # no more than the policy allows
    (4, 8, 0, 0),
    (5, 3, 9, 4),            # three are missing, at 5 of 16: ten pictures, four seeds of three prompts
    (0, 8, 64, 32),          # none at all: as if half a sample had been
])
def test_so_many_more_are_drawn_as_the_pass_rate_asks_for(fit: int, prompts: int, most: int, seeds: int) -> None:
    policy = POLICY.model_copy(update={"max_more_seeds": most, "min_identity_share": 0.0, "min_diversity_share": 0.0})
    found = measured(*[score(0.3 if n < fit else 0.6, image=image) for n, image in enumerate(names(16))])
    verdict = judge(found, policy)
    assert (verdict.kind, len(verdict.delivered)) == ("accepted", min(8, fit))
    assert more_seeds(verdict, found, policy, prompts=prompts) == seeds


def test_nobody_who_is_refused_has_more_drawn() -> None:
    found = measured(*[score(0.6, image=image) for image in names(16)])
    assert more_seeds(judge(found, POLICY), found, POLICY, prompts=8) == 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.2, 0.7), CODES), min_size=8, max_size=12), st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 2), CODES), min_size=1, max_size=8))
def test_what_is_drawn_besides_decides_nothing_and_is_delivered_by_the_same_rules(own: list[tuple[float, set[str]]], besides: list[tuple[float, int, set[str]]]) -> None:
    images, policy = names(len(own) + len(besides)), POLICY.model_copy(update={"max_delivered": 20})
    scores = [score(d, codes=sorted(c), image=image) for (d, c), image in zip(own, images, strict=False)]
    more = [score(d, faces=f, codes=sorted(c), image=image) for (d, f, c), image in zip(besides, images[len(own):], strict=True)]
    found = measured(*scores)
    both = Measurements.model_validate({**dict(found), "more": tuple(more), "apart": on_a_line(*range(len(images)))})
    before, after = judge(found, policy), judge(both, policy)
    assert (after.kind, after.reasons, after.scores) == (before.kind, before.reasons, before.scores)
    fit = {s.image for s in more if is_person(s, both, policy) and not {f.code for f in s.findings} & GATED}
    assert set(after.delivered) - set(before.delivered) <= fit
    assert set(before.delivered) <= set(after.delivered)
    if after.kind == "accepted":
        assert {s.image for s in more if s.image in fit and not s.findings} <= set(after.delivered)


def test_distances_must_be_of_the_scores() -> None:
    with pytest.raises(ValidationError, match="row i with i distances"):
        measured(score(), score(), apart=((), (), ()))


def test_few_portraits_ask_for_a_clearer_result() -> None:
    borderline = score(0.45)
    assert is_person(borderline, measured(borderline), POLICY)
    assert not is_person(borderline, measured(borderline, portraits=3), POLICY)


@pytest.mark.parametrize(("portraits", "distance", "kind", "said"), [
    (3, 0.3, "accepted", "; with 3 usable portraits a sample must lie 55% of the way from strangers to the own photos, with 4 and more 45%"),
    (1, 0.6, "retry", "; with 1 usable portrait a sample must lie 55%"), (4, 0.3, "accepted", ""), (4, 0.6, "retry", ""),
])
def test_the_verdict_says_where_few_portraits_asked_for_more(portraits: int, distance: float, kind: str, said: str) -> None:
    verdict = judge(measured(*[score(distance)] * 10, portraits=portraits), POLICY)
    [reason] = [r for r in verdict.reasons if r.code in ("accepted", "identity")]
    assert verdict.kind == kind
    assert said in reason.message and ("usable portrait" in reason.message) == bool(said)


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


# -- against the base alone

STRICT = POLICY.model_copy(update={"max_drift_share": 0.25})


def codes_of(found: Measurements, policy: GatePolicy = POLICY) -> set[str]:
    return {r.code for r in judge(found, policy).reasons}


@pytest.mark.parametrize(("change", "code"), [
    ({"bare": (score(0.6),) * 2 + (score(0.3),) * 2}, "drift"),
    ({"bare": (score(0.6),) * 2 + (score(faces=0),) * 2}, "drift"),
    ({"bare": ()}, "drift"),
    ({"apart": on_a_line(*[0.0] * 9, 5.0)}, "diversity"),
    ({"apart": ()}, "diversity"),
    ({"base": None}, "diversity"),
    ({"base": base_scores(None)}, "diversity"),
    ({"base": base_scores(50.0)}, "diversity"),
], ids=["two of four are the subject", "two of four show no face", "no bare samples", "all alike but one", "distances unmeasured", "base unmeasured", "base without spread", "base far more varied"])
def test_what_is_held_against_the_base_refuses_for_its_own_reason(change: dict[str, Any], code: str) -> None:
    good = measured(*[score()] * 10)
    assert codes_of(good, STRICT) == {"accepted"}
    assert codes_of(good.model_copy(update=change), STRICT) == {code}


def test_one_bare_sample_in_four_may_be_taken_for_the_subject() -> None:
    assert codes_of(measured(*[score()] * 10).model_copy(update={"bare": (score(0.6),) * 3 + (score(0.3),)}), STRICT) == {"accepted"}


def test_drift_is_reported_where_it_is_not_asked_about() -> None:
    verdict = judge(measured(*[score()] * 10).model_copy(update={"bare": (score(0.3),) * 4}), POLICY)
    assert (verdict.kind, verdict.scores["drift_share"]) == ("accepted", 1.0)


def test_a_stranger_is_refused_for_identity_alone_however_alike_his_samples_are() -> None:
    assert codes_of(measured(*[score(0.6)] * 10, apart=on_a_line(*[0.0] * 10))) == {"identity"}


@pytest.mark.parametrize(("asked", "base", "fewest"), [
    (2, (8, 8), 0),            # at 0.8 x 8.5/9 both are missed in 6 of 100
    (4, (8, 8), 2),
    (16, (0, 64), 0),          # a base that follows nothing asks for nothing
    (16, (32, 64), 3),
    (160, (32, 64), 54),
], ids=["two", "four", "deaf base", "half of sixteen", "half of many"])
def test_fewest_followed_is_a_quantile_of_what_the_base_alone_would_do(asked: int, base: tuple[int, int], fewest: int) -> None:
    found = fewest_followed({"place": asked}, base_scores(place=base), POLICY)
    rate = POLICY.min_editability_share * (base[0] + 0.5) / (base[1] + 1)
    below = sum(math.comb(asked, k) * rate ** k * (1 - rate) ** (asked - k) for k in range(found or 0))
    assert below < POLICY.editability_doubt <= below + math.comb(asked, found or 0) * rate ** (found or 0) * (1 - rate) ** (asked - (found or 0))
    assert found == fewest


def test_prompts_that_are_not_followed_refuse_and_so_does_a_base_that_nobody_asked() -> None:
    def with_slots(right: int, **base: tuple[int, int]) -> Measurements:
        place = score(category="place").model_copy(update={"slots_right": right, "slots_asked": 1})
        return measured(*[score()] * 6, *[place] * 6).model_copy(update={"base": base_scores(**base)})
    assert codes_of(with_slots(0, place=(32, 64))) == {"editability"}
    assert codes_of(with_slots(1, place=(32, 64))) == {"accepted"}
    assert codes_of(with_slots(0, place=(1, 64))) == {"accepted"}
    assert codes_of(with_slots(1, hat=(32, 64))) == {"editability"}
    assert judge(with_slots(1, place=(32, 64)), POLICY).scores["editability.place"] == 1.0


def test_a_policy_that_asks_nothing_wants_nothing_measured() -> None:
    open_policy = POLICY.model_copy(update={"min_editability_share": 0.0, "min_diversity_share": 0.0, "max_drift_share": 1.0})
    assert codes_of(measured(*[score()] * 10).model_copy(update={"base": None, "bare": (), "apart": ()}), open_policy) == {"accepted"}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=3, max_size=9), st.integers(2, 5))
def test_spread_is_the_best_choice_of_samples_and_one_more_sample_never_lowers_it(places: list[float], count: int) -> None:
    apart, everything = on_a_line(*places), range(len(places))
    best = max((min(apart[max(pair)][min(pair)] for pair in itertools.combinations(chosen, 2)) for chosen in itertools.combinations(everything, count)), default=None)
    assert spread(apart, everything, count=count) == best
    fewer = spread(apart, everything[:-1], count=count)
    assert fewer is None or (best is not None and best >= fewer)


# -- a second recogniser

SECOND = Recogniser(backend="other", bank=DIGEST, threshold=0.5, ceiling=0.2, floor=0.7)


@pytest.mark.parametrize(("distance", "where", "person"), [(0.3, 0.8, True), (0.51, 0.8, False), (0.3, 0.3, False), (None, None, False)],
                         ids=["both", "too far", "too near to strangers", "unmeasured"])
def test_a_sample_is_the_person_if_both_recognisers_say_so(distance: float | None, where: float | None, person: bool) -> None:
    sample = score().model_copy(update={"second_distance": distance, "second_position": where})
    found = measured(sample).model_copy(update={"second": SECOND})
    assert is_person(sample, found, POLICY) is person
    assert is_person(sample, measured(sample), POLICY)
    everything = measured(*[sample] * 10).model_copy(update={"second": SECOND, "bare": (score(0.6).model_copy(update={"second_distance": 0.6, "second_position": 0.2}),) * 4})
    assert codes_of(everything) == ({"accepted"} if person else {"identity"})


def test_a_second_recogniser_that_cannot_tell_the_subject_from_strangers_needs_other_photos() -> None:
    assert judge(measured(*[score()] * 10).model_copy(update={"second": SECOND.model_copy(update={"ceiling": 0.68})}), POLICY).kind == "needs_photos"


def test_the_policy_does_not_change_by_accident() -> None:
    assert POLICY.digest == "fc9d4dbe40db0801c9577d629f5e228f803d483eced1c86b56a4252e52814099", (
        "the shipped policy is another one: every adapter will be judged anew. Say in CHANGELOG.md and docs/log.md what changed and why")
