"""What `bench.ladder` runs and counts: recipes that are wrong and valid, attempts that were accepted, at once or later."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.ladder import AS_IT_IS, WRONG, chosen, table, told, wrong
from likeness.settings import load_settings


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_valid_and_differs_in_one_number(name: str, tmp_path: Path) -> None:
    (tmp_path / "likeness.toml").write_text(wrong(load_settings().recipe, name))
    was, now = load_settings().recipe.plain(), load_settings(tmp_path / "likeness.toml").recipe.plain()
    key, factor = WRONG[name]
    assert {k for k in was if was[k] != now[k]} == {key}
    assert now[key] == pytest.approx(was[key] * factor, rel=0.05)


def test_the_same_users_meet_every_wrong_recipe_and_other_sets_the_one_in_force(tmp_path: Path) -> None:
    (tmp_path / "bob-1").mkdir()
    climbs = chosen(tmp_path, {f"{n}": "man" for n in range(8)}, count=4, sets=[("woman", tmp_path / "bob-1")])
    assert [(c.name, c.recipe) for c in climbs] == [(n, r) for n in "0246" for r in WRONG] + [("bob-1", AS_IT_IS)]
    assert len({c.subject for c in climbs}) == 9 and climbs[-1].noun == "woman"
    assert wrong(load_settings().recipe, AS_IT_IS) == ""


def attempt(verdict: str, share: float | None = 0.2) -> dict[str, Any]:
    return {"verdict": verdict, "why": "more steps", "reasons": [{"code": "identity"}], "scores": {"identity_share": share}}


def test_acceptance_is_counted_by_attempt() -> None:
    climbs = chosen(Path(), {"1": "man", "2": "man", "3": "man"}, count=3, sets=[])
    ends = [["accepted"], ["retry", "accepted"], ["retry", "retry", "retry"]]
    done = {c.subject: {"attempts": [attempt(v) for v in e]} for c, e in zip([c for c in climbs if c.recipe == "too short"], ends, strict=True)}
    shown = table(done, climbs, attempts=3)
    assert [list(column.cells) for column in shown.columns] == [["too short"], ["3"], ["1"], ["2"], ["2"]]
    assert told([attempt("retry", None), attempt("accepted", 0.5)]) == ["1. at first -> retry (identity), identity 0 %", "2. more steps -> accepted, identity 50 %"]
