"""How often thresholds err, as a report and `likeness gate show` ask: shipped for the defaults, of the Store where it was measured here, of nobody for other conditions."""

from __future__ import annotations

from pathlib import Path

import pytest

from likeness.calibration import shipped
from likeness.settings import load_settings
from tasks.calibrations import PREFIX, conditions_of, keep, known_of
from tasks.runtime import Tools


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return Tools(load_settings(overrides={"home": str(tmp_path)}))


def test_the_defaults_are_calibrated(tools: Tools) -> None:
    found, words = known_of(tools)
    assert (found,) == shipped(), words
    assert f"of {shipped()[0].people} people" in words


def test_other_thresholds_are_not_until_somebody_measures_them(tmp_path: Path, tools: Tools) -> None:
    other = Tools(load_settings(overrides={"home": str(tmp_path), "gate.min_position": 0.5}))
    found, words = known_of(other)
    assert (found, "of other thresholds" in words) == (None, True)
    mine = shipped()[0].model_copy(update={"conditions": conditions_of(other), "date": "2020-01-01"})
    keep(other, mine)
    keep(other, mine.model_copy(update={"date": "2020-01-02"}))
    assert known_of(other)[0] == mine.model_copy(update={"date": "2020-01-02"}), "the newer one is in the place of the older"
    assert known_of(tools)[0] == shipped()[0]


def test_what_cannot_be_read_is_as_if_it_were_not_there(tools: Tools) -> None:
    tools.store.put_if_absent(f"{PREFIX}{conditions_of(tools).digest}.json", b"{}")
    assert known_of(tools)[0] == shipped()[0]
