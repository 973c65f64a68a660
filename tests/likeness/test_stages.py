"""Keys, published records, and the snapshot of stage sources."""

from __future__ import annotations

import json
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from likeness import stages
from likeness.errors import RecipeError
from likeness.records import Consent
from likeness.stages import SNAPSHOT, SOURCES, STAGES, Call, Published, StageName, StageRef

PHOTOS = StageRef(stage="ingest", key="a" * 64, digest="b" * 64)
CALL = Call(stage="crop", subject="ada", inputs=(PHOTOS,), params={"side_px": 128})


def test_every_stage_has_an_epoch_and_sources() -> None:
    assert tuple(STAGES) == get_args(StageName) == ("ingest", "crop", "caption", "assemble", "train", "sample", "judge", "register")
    assert set(SOURCES) == set(STAGES)
    assert all(SOURCES.values())
    assert all(epoch >= 1 for epoch in STAGES.values())


def test_stage_sources_have_not_changed_since_they_were_accepted() -> None:
    lines = stages.compare_sources(json.loads(SNAPSHOT.read_text()), stages.current_sources())
    assert not lines, "\n" + "\n".join(lines)


@pytest.mark.parametrize(("changes", "same"), [
    ({}, True),
    ({"subject": "bob"}, True),
    ({"inputs": (StageRef(stage="ingest", key="c" * 64, digest="b" * 64),)}, True),      # other work, same content
    ({"inputs": (StageRef(stage="ingest", key="a" * 64, digest="c" * 64),)}, False),
    ({"inputs": ()}, False),
    ({"inputs": (PHOTOS, PHOTOS)}, False),
    ({"params": {"side_px": 64}}, False),
    ({"params": {}}, False),
    ({"stage": "caption"}, False),
], ids=["same", "subject", "input key", "input content", "no input", "two inputs", "parameter", "no parameter", "stage"])
def test_the_key_is_of_content_and_parameters_only(changes: dict[str, Any], same: bool) -> None:
    assert (CALL.model_copy(update=changes).key == CALL.key) is same


def test_the_key_is_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    before = CALL.key
    monkeypatch.setitem(STAGES, "crop", STAGES["crop"] + 1)      # type: ignore[arg-type]
    assert CALL.key != before


def test_a_known_key_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    # A change here makes everything that was ever published be made again.
    monkeypatch.setitem(STAGES, "crop", 1)      # type: ignore[arg-type]
    assert Call(stage="crop", subject="ada", params={"b": 1.5, "a": None}).key == "5cc560712e5075e2530d1962531a9c5c4072539a5f94933b6216550da0cc8d1c"


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_parameters_is_nothing(names: list[str]) -> None:
    assert Call(stage="crop", subject="ada", params={n: n for n in names}).key == Call(stage="crop", subject="ada", params={n: n for n in "abcd"}).key


def test_the_path_lies_inside_the_subjects_folder() -> None:
    assert CALL.path == f"subjects/ada/stages/crop/{CALL.key}.json"
    with pytest.raises(ValidationError):
        Call(stage="crop", subject="../bob")
    with pytest.raises(ValidationError):
        Call.model_validate({"stage": "polish", "subject": "ada"})


def test_published_holds_and_every_change_shows() -> None:
    whole = Published.of(CALL, Consent(source="x"))
    assert whole.faults() == []
    assert Published.model_validate_json(whole.model_dump_json()) == whole
    assert whole.ref == StageRef(stage="crop", key=CALL.key, digest=Consent(source="x").digest)
    for change in ({"output": {"source": "y"}}, {"digest": "0" * 64}, {"key": "0" * 64}, {"inputs": ()}, {"params": {}}, {"epoch": 9}, {"stage": "train"}):
        assert len(whole.model_copy(update=change).faults()) == 1, change


# -- the snapshot

CODE = "def f(x):\n    return x + 1\n"


@pytest.mark.parametrize(("changed", "same"), [
    ('"""Prose."""\n# more\ndef f(x):\n    """What it does."""\n\n    return (x\n        + 1)  # why\n', True),
    ("def f(x):\n    return x + 2\n", False),
    ("def f(x):\n    return x + True\n", False),
    ("def f(y):\n    return y + 1\n", False),
    ("def f(x=None):\n    return x + 1\n", False),
    ("def f(x):\n    'a'\n    'b'\n    return x + 1\n", False),
], ids=["prose", "number", "type of a constant", "name", "default", "second string"])
def test_the_fingerprint_is_of_code_not_of_prose(changed: str, same: bool) -> None:
    assert (stages.fingerprint(changed) == stages.fingerprint(CODE)) is same


def test_constants_that_compare_equal_differ() -> None:
    assert len({stages.fingerprint(f"x = {value}") for value in ("1", "1.0", "True", "'1'", "b'1'", "None", "1j", "...")}) == 8


def _snapshot(epoch: int, sha: str) -> dict[str, Any]:
    return {"crop": {"epoch": epoch, "sources": {"a.py": sha, "b.py": "same"}}}


def test_a_change_without_a_new_epoch_says_what_to_do() -> None:
    assert stages.compare_sources(_snapshot(1, "x"), _snapshot(1, "x")) == []
    (line,) = stages.compare_sources(_snapshot(1, "x"), _snapshot(1, "y"))
    assert "crop: a.py changed" in line
    assert "STAGES['crop']" in line
    assert "python -m likeness.stages --accept" in line
    (line,) = stages.compare_sources(_snapshot(1, "x"), _snapshot(2, "y"))
    assert "--accept" in line
    (line,) = stages.compare_sources({}, _snapshot(1, "x"))
    assert "--accept" in line


def test_a_source_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SOURCES, "crop", ("models/faces/gone.py",))      # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"crop: models/faces/gone\.py"):
        stages.current_sources()


def test_accept_writes_the_snapshot_that_then_holds(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(stages, "SNAPSHOT", tmp_path / "stage_sources.json")
    assert stages.main([]) == 1
    assert stages.main(["--accept"]) == 0
    assert stages.main([]) == 0
    assert "nothing has changed" in capsys.readouterr().out
    assert stages.main(["--acept"]) == 2
