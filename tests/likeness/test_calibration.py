"""Calibrations: intervals that know that pictures of one person err together, the point of equal errors, and that rates stand beside no other conditions than theirs."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.calibration import FILE, Calibration, Calibrations, Conditions, Point, Rate, at_least, choose, curve_of, equal_of, shipped, wilson
from likeness.gate import GATED, GatePolicy, chances
from likeness.settings import load_settings
from likeness.stages import STAGES

CONDITIONS = Conditions(thresholds=GatePolicy().thresholds, recogniser="dlib", second=None, bank="b", base="maquette", revision="1", drawn="0" * 64, slots="0" * 64, usual="0" * 64, unsafe="n", epoch=5)


def measured(date: str = "2026-01-01", **conditions: object) -> Calibrations:
    return Calibrations(conditions=CONDITIONS.model_copy(update=conditions), date=date, command="c", people=4, pictures=40, source="0" * 64, left_out=0,
                        rows=(Calibration(threshold="min_position", value=0.45, data="", false_accept=Rate.of([(1, 10)] * 4), false_refusal=Rate.of([(0, 10)] * 4)),))


@pytest.mark.parametrize(("p", "n", "low", "high"), [(0.5, 100, 0.404, 0.596), (0.0, 10, 0.0, 0.278), (1.0, 10, 0.722, 1.0), (0.1, 50, 0.043, 0.214)])
def test_wilson(p: float, n: float, low: float, high: float) -> None:
    assert wilson(p, n) == pytest.approx((low, high), abs=0.001)
    for q in wilson(p, n):                                   # both ends solve the equation that defines them
        assert q in (0.0, 1.0) or abs(p - q) == pytest.approx(1.96 * math.sqrt(q * (1 - q) / n), rel=1e-6)


def test_pictures_of_one_person_are_worth_less_than_pictures_of_many() -> None:
    alike = Rate.of([(10, 10)] * 3 + [(0, 10)] * 27)         # three people are never recognised: thirty people, not three hundred pictures
    apart = Rate.of([(1, 10)] * 30)
    assert alike.rate == apart.rate == 0.1
    assert (alike.low, alike.high) == pytest.approx(wilson(0.1, 29), abs=0.002)
    assert (apart.low, apart.high) == pytest.approx(wilson(0.1, 30), abs=1e-4), "all alike: what is between people is not known"
    spread = Rate.of([(k % 3, 10) for k in range(30)])
    assert spread.high - spread.low < alike.high - alike.low
    assert (spread.low, spread.high) == pytest.approx(wilson(0.1, min(300, 0.09 / (30 / 29 * sum((k % 3 - 1) ** 2 for k in range(30)) / 300 ** 2))), abs=1e-4)


def test_of_two_ways_to_count_people_the_wider_interval_counts() -> None:
    by_target, by_other = [(1.0, 10.0), (2.0, 10.0)] * 6, [(18.0, 60.0), (0.0, 60.0)]
    both, one = Rate.of(by_target, by_other), Rate.of(by_target)
    assert both.rate == one.rate
    assert both.high - both.low > one.high - one.low


@pytest.mark.parametrize("tally", [[(0, 10)] * 5, [(10, 10)] * 5, [(0, 3)]])
def test_where_nothing_errs_the_interval_is_that_of_people(tally: list[tuple[float, float]]) -> None:
    found = Rate.of(tally)
    assert (found.low, found.high) == pytest.approx(wilson(found.rate, len(tally)), abs=1e-4)
    assert found.high - found.low > 0.3


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 20)), min_size=1, max_size=30))
def test_a_rate_lies_in_its_interval(tally: list[tuple[float, int]]) -> None:
    found = Rate.of([(share * n, n) for share, n in tally])
    assert 0 <= found.low <= found.rate <= found.high <= 1


def test_equal_errors() -> None:
    crossing = curve_of([0.0, 0.1, 0.2, 0.3], lambda v: 0.3 - v, lambda v: v)
    assert equal_of(crossing) in (crossing[1], crossing[2])
    flat = curve_of([0.0, 0.1, 0.2, 0.3, 0.4], lambda v: 1.0 if v == 0 else 0.0, lambda v: 1.0 if v == 0.4 else 0.0)
    assert equal_of(flat) == Point(value=0.2, false_accept=0.0, false_refusal=0.0), "the middle of the range without errors"
    assert equal_of([]) is None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7), st.floats(0, 1))
def test_chances_are_those_of_every_outcome_summed(probabilities: list[float], share: float) -> None:
    counted = [0.0] * (len(probabilities) + 1)
    for outcome in itertools.product((0, 1), repeat=len(probabilities)):
        counted[sum(outcome)] += math.prod(p if happens else 1 - p for p, happens in zip(probabilities, outcome, strict=True))
    assert chances(probabilities) == pytest.approx(counted)
    assert at_least(probabilities, share) == pytest.approx(sum(c for k, c in enumerate(counted) if k >= share * len(probabilities) - 1e-9), abs=1e-12)


def test_rates_stand_beside_their_own_conditions_alone() -> None:
    old, new = measured("2026-01-01"), measured("2026-02-01")
    found, words = choose([old, new], GatePolicy(), CONDITIONS)
    assert found == new
    assert "2026-02-01" in words
    for name, value, said in (("recogniser", "arcface", "another recogniser"), ("epoch", 6, "an earlier version"), ("thresholds", "1" * 64, "other thresholds"),
                              ("revision", "2", "another revision of the base"), ("second", "arcface", "another second recogniser")):
        found, words = choose([old], GatePolicy(), CONDITIONS.model_copy(update={name: value}))
        assert found is None
        assert said in words and "likeness gate calibrate" in words
    assert choose([], GatePolicy(), CONDITIONS)[0] is None


def test_a_policy_that_names_its_calibrations_has_those_or_none() -> None:
    old, new = measured("2026-01-01"), measured("2026-02-01")
    naming = GatePolicy(calibration=old.digest)
    assert naming.thresholds == GatePolicy().thresholds == GatePolicy().digest != naming.digest
    assert choose([old, new], naming, CONDITIONS)[0] == old
    found, words = choose([new], naming, CONDITIONS)
    assert found is None
    assert "not kept here" in words


# -- what ships

def test_the_shipped_calibrations_are_of_the_shipped_policy_and_of_the_gate_as_it_is() -> None:
    again = f"run `likeness gate calibrate --users FOLDER --nouns bench/users.json --out {FILE.name}`"
    [known] = shipped()
    assert known.conditions.thresholds == load_settings().gate.thresholds, again
    assert known.conditions.epoch == STAGES["judge"], again
    assert known.people >= 20


def test_every_threshold_of_the_shipped_policy_and_every_gated_finding_has_its_rates_or_says_why_not() -> None:
    [known] = shipped()
    decides = set(GatePolicy.model_fields) - {"max_delivered", "max_more_seeds", "few_widening", "calibration"}
    rows = {r.threshold: r for r in known.rows}
    assert decides | {f"finding {code}" for code in GATED - {"unmeasured"}} <= rows.keys()
    for row in rows.values():
        assert (row.unmeasured is None) == (row.false_accept is not None) == (row.false_refusal is not None), row.threshold
        if row.threshold in decides:
            assert row.value == getattr(GatePolicy(), row.threshold), row.threshold
    assert {name for name, row in rows.items() if row.unmeasured} == {"second_identity", "max_drift_share", "min_samples", "few_portraits", "finding unsafe"}
    assert rows["min_position"].words.startswith("wrongly let through ")
