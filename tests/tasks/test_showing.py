"""Attempts in MLflow: shown once, again when there is something new, never at the cost of a verdict, and not of somebody who was forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from likeness import attempt_registry
from likeness.errors import ServerUnreachable, SubjectForgotten
from likeness.ladder import Attempt
from likeness.records import Enrolment, Release, Verdict
from likeness.settings import load_settings
from tasks import runtime
from tasks.runtime import Tools
from tasks.showing import show_attempts
from tests.likeness.fabricated import World, build


@pytest.fixture
def tools(tmp_path: Path) -> Iterator[Tools]:
    before = [*runtime._TOOLS]
    tools = Tools(load_settings(overrides={"home": str(tmp_path / "home")}))
    runtime.configure(tools)
    yield tools
    runtime._TOOLS[:] = before


@pytest.fixture
def world(tools: Tools) -> World:
    world = build(tools.bare_store)
    tools.enrol(Enrolment(subject=world.subject, source="store:uploads/"))
    return world


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was shown; a call does what it is told to by the exception in front of the list."""
    shown: list[Any] = []

    def fake(registry: Any, attempts: Any, *, check: Any) -> str:
        if shown and isinstance(shown[0], Exception):
            raise shown[0]
        check()
        shown.append(attempts)
        return "run"

    monkeypatch.setattr(attempt_registry, "show_attempts", fake)
    return shown


def show(world: World, *, kind: str = "retry", release: Release | None = None) -> None:
    verdict = Verdict.model_validate({**dict(world.verdict), "kind": kind})
    refs = {name: published.ref for name, published in world.published.items()}
    show_attempts.fn("ada", [Attempt(world.recipe, verdict, "why")], [refs], release)


def test_the_same_attempts_are_shown_once_and_new_ones_again(tools: Tools, world: World, calls: list[Any]) -> None:
    show(world)
    show(world)
    assert [(c.training_set, c.adapters) for c in calls] == [(world.training_set.digest, [world.adapter.digest])]
    show(world, kind="accepted", release=Release(subject="ada", model="likeness.ada", version=1, adapter=world.adapter.digest, verdict=world.verdict.digest))
    assert len(calls) == 2
    notes = [tools.store.get(key) for key in tools.store.list("subjects/ada/shown/")]
    assert sorted(note.decode() for note in notes if note) == sorted(c.digest for c in calls)


def test_a_server_that_is_gone_costs_no_verdict_and_is_asked_again_next_time(tools: Tools, world: World, calls: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    calls.append(ServerUnreachable("gone"))
    show(world)
    assert "ada: the attempts could not be shown in MLflow (server_unreachable)" in caplog.text
    assert list(tools.store.list("subjects/ada/shown/")) == []
    calls.clear()
    show(world)
    assert len(calls) == 1


def test_who_was_forgotten_is_not_shown(tools: Tools, world: World, calls: list[Any]) -> None:
    calls.append(SubjectForgotten("ada is forgotten"))
    with pytest.raises(SubjectForgotten):
        show(world)
    assert list(tools.store.list("subjects/ada/shown/")) == []
