"""`likeness gate` as a user has it: what is in force with its rates, and what the measuring of nobody says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli import app
from likeness.calibration import shipped
from likeness.errors import InputError, RecipeError
from likeness.gate import GatePolicy


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIKENESS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def test_show_prints_every_threshold_with_its_rates(home: Path) -> None:
    document = json.loads(CliRunner().invoke(app, ["gate", "show", "--json"], catch_exceptions=False).stdout)
    assert document["digest"] == GatePolicy().digest
    assert document["calibrations"] == {"digest": shipped()[0].digest, **shipped()[0].plain()}
    table = CliRunner().invoke(app, ["gate", "show"], catch_exceptions=False).stdout
    for row in shipped()[0].rows:
        assert row.threshold.split()[-1] in table
        assert row.unmeasured is not None or (row.false_accept is not None and row.false_accept.words in table)


def test_show_says_where_nobody_knows(home: Path, tmp_path: Path) -> None:
    (tmp_path / "likeness.toml").write_text("[gate]\nmin_position = 0.6\n")
    document = json.loads(CliRunner().invoke(app, ["gate", "show", "--json"], catch_exceptions=False).stdout)
    assert document["calibrations"] is None
    assert "other thresholds" in document["message"]
    table = CliRunner().invoke(app, ["gate", "show"], catch_exceptions=False).stdout
    assert "0.6" in table and "likeness gate calibrate" in table


def test_calibrating_on_nobody_or_with_a_broken_list_of_nouns_says_what_is_needed(home: Path, tmp_path: Path) -> None:
    (tmp_path / "users" / "ada").mkdir(parents=True)
    with pytest.raises(InputError, match="0 of 1 folders hold 9 usable photos of one person, 4 are needed"):
        CliRunner().invoke(app, ["gate", "calibrate", "--users", "users"], catch_exceptions=False)
    (tmp_path / "nouns.json").write_text('["ada"]')
    with pytest.raises(RecipeError, match="no JSON object of folder names and class nouns"):
        CliRunner().invoke(app, ["gate", "calibrate", "--users", "users", "--nouns", "nouns.json"], catch_exceptions=False)
    assert CliRunner().invoke(app, ["gate", "calibrate", "--users", "nowhere"]).exit_code == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_calibrate_measures_keeps_and_writes(home: Path, tmp_path: Path, rendered_users: Path) -> None:
    (tmp_path / "users").mkdir()
    for user in ("900000", "900002", "900001", "900005"):                  # two women, two men
        (tmp_path / "users" / user).symlink_to(rendered_users / user)
    (tmp_path / "nouns.json").write_text(json.dumps({"900000": "woman", "900002": "woman", "900001": "man", "900005": "man"}))
    (tmp_path / "likeness.toml").write_text("[gate]\nmax_drift_share = 0.25\n")
    done = CliRunner().invoke(app, ["gate", "calibrate", "--users", "users", "--nouns", "nouns.json", "--out", "out.json", "--json"], catch_exceptions=False)
    found = json.loads(done.stdout)
    [written] = json.loads((tmp_path / "out.json").read_text())
    assert {"digest": found["digest"], **written} == found
    rows = {row["threshold"]: row for row in found["rows"]}
    assert (found["people"], rows["min_position"]["false_accept"]["people"], rows["min_position"]["false_refusal"]["people"]) == (4, 4, 4)
    assert rows["min_position"]["false_refusal"]["rate"] < 0.2
    assert rows["min_position"]["false_accept"]["rate"] < 0.2
    assert rows["max_drift_share"]["unmeasured"] is None
    assert json.loads(CliRunner().invoke(app, ["gate", "show", "--json"], catch_exceptions=False).stdout)["calibrations"] == found
