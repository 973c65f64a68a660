"""The knee of a curve and the early stop: properties that any rule must have, and the cases it was made for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from likeness.choice import knee, stop_early
from likeness.recipe import RECIPE, Choice, Lora
from likeness.records import Curve, CurvePoint

SHARES = st.none() | st.floats(0.0, 1.0)
PAIRS = st.lists(st.tuples(SHARES, SHARES), min_size=1, max_size=8)


def curve(*pairs: tuple[float | None, float | None]) -> list[CurvePoint]:
    return [CurvePoint(step=50 * (i + 1), identity=identity, obedience=obedience, samples=8) for i, (identity, obedience) in enumerate(pairs)]


@pytest.mark.parametrize(("pairs", "step"), [
    ([(0.2, 0.9), (0.6, 0.8), (0.75, 0.7), (0.77, 0.6)], 150),
    ([(0.2, 0.5), (0.5, 0.5), (0.8, 0.5)], 150),
    ([(0.8, 0.5), (0.8, 0.5)], 50),
    ([(0.4, 0.8), (0.8, 0.4)], 50),
    ([(0.43, 3 / 16), (0.56, 2 / 16)], 100),
    ([(0.0, 0.4), (0.0, 0.5)], 100),
    ([(0.3, 0.0), (0.5, 0.0), (0.4, 0.0)], 100),
    ([(None, 1.0), (0.1, 0.1), (None, None)], 100),
    ([(0.9, None), (0.1, 0.1)], 100),
    ([(0.5, None), (0.7, None), (0.6, None)], 100),
    ([(None, 0.9), (None, 0.5), (None, None)], 150),
    ([(None, None)], 50),
], ids=["the knee", "likeness alone moves", "equal: the earlier", "equal sums: the earlier", "one detail of sixteen is not half of the worth", "nobody at all: obedience",
        "deaf: likeness", "unmeasured never wins", "half measured never wins", "nothing was asked", "nothing can be compared: the last", "one"])
def test_knee(pairs: list[tuple[float | None, float | None]], step: int) -> None:
    assert knee(curve(*pairs)).step == step


def test_a_curve_without_points_has_no_knee() -> None:
    with pytest.raises(ValueError, match="empty"):
        knee([])


@given(PAIRS)
def test_the_knee_is_on_the_curve_and_nothing_beats_it_in_both(pairs: list[tuple[float | None, float | None]]) -> None:
    points = curve(*pairs)
    chosen = knee(points)
    assert chosen in points
    assert knee(points[::-1]) == chosen
    for p in points:
        if None not in (p.identity, p.obedience, chosen.identity, chosen.obedience):
            assert not (p.identity > chosen.identity + 1e-8 and p.obedience > chosen.obedience + 1e-8)  # type: ignore[operator]
    if any(p.identity is not None for p in points):
        assert chosen.identity is not None
    if any(None not in (p.identity, p.obedience) for p in points):
        assert chosen.obedience is not None


@given(PAIRS, st.tuples(SHARES, SHARES))
def test_of_what_was_beaten_nothing_comes_back(pairs: list[tuple[float | None, float | None]], more: tuple[float | None, float | None]) -> None:
    # a training keeps the tensors of the winner so far and of no other point
    points = curve(*pairs, more)
    assert knee(points) in (knee(points[:-1]), points[-1])


@given(PAIRS, st.data())
def test_a_chosen_point_that_improves_stays_chosen(pairs: list[tuple[float | None, float | None]], data: st.DataObject) -> None:
    points = curve(*pairs)
    chosen = knee(points)
    if chosen.identity is None or chosen.obedience is None:
        return
    better = chosen.model_copy(update={"identity": data.draw(st.floats(chosen.identity, 1.0)), "obedience": data.draw(st.floats(chosen.obedience, 1.0))})
    assert knee([better if p == chosen else p for p in points]).step == chosen.step


@pytest.mark.parametrize(("pairs", "stop"), [
    ([(0.5, 0.5), (0.4, 0.4), (0.3, 0.3)], True),
    ([(0.9, 0.9), (0.5, 0.9), (0.4, 0.4), (0.3, 0.3)], True),
    ([(0.5, 0.5), (0.4, 0.4), (0.3, 0.3), (0.4, 0.2)], False),
    ([(0.5, 0.5), (0.4, 0.4)], False),
    ([(0.5, 0.5), (0.4, 0.4), (0.4, 0.3)], False),
    ([(0.5, 0.5), (0.6, 0.4), (0.5, 0.3)], False),
    ([(0.5, None), (0.4, None), (0.3, None)], False),
    ([(0.5, 0.5), (None, 0.4), (0.3, 0.3)], False),
    ([], False),
], ids=["both, twice", "the last two count", "it has turned", "once is chance", "one stands still", "one rises first", "nothing was asked", "one was not measured", "none"])
def test_stop_early(pairs: list[tuple[float | None, float | None]], stop: bool) -> None:
    assert stop_early(curve(*pairs)) is stop


@given(PAIRS)
def test_a_training_is_never_stopped_at_its_best(pairs: list[tuple[float | None, float | None]]) -> None:
    points = curve(*pairs)
    if stop_early(points):
        assert knee(points).step < points[-2].step


@pytest.mark.parametrize(("choice", "steps", "at"), [
    (Choice(), 200, ()), (Choice(points=1), 200, (200,)), (Choice(points=3), 200, (100, 150, 200)), (Choice(points=4, first=0.25), 200, (50, 100, 150, 200)),
    (Choice(points=3, first=1.0), 200, (200,)), (Choice(points=8), 3, (2, 3)), (Choice(points=50, first=0.001), 1, (1,)),
], ids=["off", "the last alone", "three", "four from a quarter on", "all at the end", "more than steps", "one step"])
def test_the_last_step_is_always_scored_and_each_step_once(choice: Choice, steps: int, at: tuple[int, ...]) -> None:
    assert choice.at(steps) == at


def test_a_recipe_that_does_not_choose_is_the_recipe_it_always_was() -> None:
    assert "choice" not in Lora().model_dump_json()
    assert Lora(choice=Choice(points=3)).digest != Lora().digest
    assert RECIPE.validate_json(Lora(choice=Choice(points=3, first=0.25)).model_dump_json()).choice == Choice(points=3, first=0.25)
    with pytest.raises(ValidationError, match="are for a recipe with points"):
        Choice(seeds=2)


@pytest.mark.parametrize("values", [{"identity": float("nan")}, {"identity": 1.5}, {"obedience": -0.1}, {"step": 0}], ids=lambda v: next(iter(v)))
def test_a_point_holds_no_number_that_is_none(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        CurvePoint.model_validate({"step": 1, "identity": 0.5, "obedience": 0.5, "samples": 1} | values)


@pytest.mark.parametrize(("steps", "chosen"), [((50, 100), 75), ((100, 50), 50), ((50, 50), 50)], ids=["not a point", "not in order", "one twice"])
def test_a_curve_that_cannot_be_is_refused(steps: tuple[int, ...], chosen: int) -> None:
    points = tuple(CurvePoint(step=s, identity=0.5, obedience=0.5, samples=1) for s in steps)
    with pytest.raises(ValidationError, match="chosen"):
        Curve(points=points, chosen=chosen)
