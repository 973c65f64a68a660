"""The estimate of acceptance: what a regression over a few dozen sets may and may not say."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.acceptance import ENOUGH_ROWS, Estimate, Fit, Prospect, Trial, left_out


def trial(kept: float, photos: int, accepted: bool) -> Trial:
    return Trial(prospect=Prospect(photos=photos, kept=kept), accepted=accepted, identity_share=1.0 if accepted else 0.0)


def trials(count: int = 40, *, seed: int = 0, edge: float = 0.45, slope: float = 40.0) -> list[Trial]:
    """Sets whose chance falls with the distance that is kept, and not with the number of photos."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        kept = rng.uniform(0.3, 0.6)
        rows.append(trial(kept, rng.choice((5, 8, 12, 16)), rng.random() < 1 / (1 + math.exp(slope * (kept - edge)))))
    return rows


def of(fit: Fit, kept: float, photos: int = 8) -> Estimate:
    return fit.estimate(Prospect(photos=photos, kept=kept), date="2026-11-27")


def test_a_face_that_the_base_keeps_is_likely_accepted_and_one_that_it_loses_is_not() -> None:
    fit = Fit(trials(200))
    near, edge, far = of(fit, 0.35), of(fit, 0.45), of(fit, 0.55)
    assert near.accepted > 0.9 > 0.65 > edge.accepted > 0.35 > 0.1 > far.accepted
    for e in (near, edge, far):
        assert e.low < e.accepted < e.high
    assert (near.sets, near.date, near.photos) == (200, "2026-11-27", 8)


def test_few_sets_give_a_wider_interval_than_many() -> None:
    few, many = of(Fit(trials(20)), 0.45), of(Fit(trials(400)), 0.45)
    assert few.high - few.low > 1.5 * (many.high - many.low)


def test_sets_that_were_all_accepted_are_no_certainty() -> None:
    e = of(Fit([trial(0.3 + 0.01 * i, 8 + i % 3, True) for i in range(24)]), 0.4)
    assert 0.8 < e.accepted < 1.0
    assert e.low < 0.97
    assert "to 99%" in e.words                                    # never 100 %, however it rounds


def test_a_set_unlike_all_that_were_measured_says_so() -> None:
    fit = Fit(trials(60))
    assert not of(fit, 0.45).outside
    assert of(fit, 0.9).outside
    assert of(fit, 0.45, photos=100).outside
    assert "no set like this one was measured" in of(fit, 0.9).words
    assert "no set like" not in of(fit, 0.45).words


def test_too_few_sets_are_refused_with_the_number_that_is_needed() -> None:
    with pytest.raises(ValueError, match=f"{ENOUGH_ROWS - 1} sets were measured, {ENOUGH_ROWS} are needed"):
        Fit(trials(ENOUGH_ROWS - 1))


def test_a_person_is_estimated_without_their_own_sets() -> None:
    rows = trials(30)
    groups = [str(i % 15) for i in range(30)]
    own = [i for i, g in enumerate(groups) if g == "3"]
    flipped = [r if i not in own else r.model_copy(update={"accepted": not r.accepted}) for i, r in enumerate(rows)]
    before, after = left_out(rows, groups), left_out(flipped, groups)
    assert [before[i] for i in own] == [after[i] for i in own]
    assert before != after


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200), st.booleans()), min_size=ENOUGH_ROWS, max_size=40), st.floats(0, 3), st.integers(1, 1000))
def test_any_rows_give_a_probability_inside_its_interval(rows: list[tuple[float, int, bool]], kept: float, photos: int) -> None:
    e = of(Fit([trial(*r) for r in rows]), kept, photos)
    assert 0 <= e.low <= e.high <= 1
    assert e.low - 1e-3 <= e.accepted <= e.high + 1e-3 or e.outside
