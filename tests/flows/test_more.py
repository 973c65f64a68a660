"""Samples drawn besides: an accepted Adapter gets them where it can, and is not lost where it cannot; workers are asked for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flows import personalize
from flows.personalize import Run
from likeness.errors import LikenessError, ResourceError, ServerUnreachable, SubjectForgotten
from likeness.once import Absent
from likeness.recipe import Lora
from likeness.settings import load_settings
from likeness.stages import StageRef
from tasks.runtime import NotMade

TRAINING_SET = StageRef(stage="assemble", key="0" * 64, digest="0" * 64)
FIRST, SECOND = "accepted at first", "accepted with more"


class Stages:
    """Stages that publish nothing but references; `fails` is raised by the second call of `sample` or of `judge`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, at: str = "", fails: BaseException | None = None, more: int = 2) -> None:
        self.given: list[tuple[Any, ...]] = []
        self.at, self.fails = at, fails
        for name, stage in (("train", "train"), ("sample_battery", "sample"), ("judge_samples", "judge")):
            made = self._stage(stage)
            monkeypatch.setattr(personalize, name, made)
        monkeypatch.setattr(personalize, "more_seeds", lambda verdict, *_, **__: more if verdict == FIRST else 0)
        self.tools: Any = SimpleNamespace(settings=load_settings(), open=lambda ref, subject, kind: SimpleNamespace(verdict=FIRST if ref.key[0] == "1" else SECOND, measured=None))

    def _stage(self, stage: Any) -> Any:
        def made(*given: Any) -> Any:
            again = sum(call[0] == stage for call in self.given) + 1
            self.given.append((stage, *given))
            if (stage, again) == (self.at, 2) and self.fails is not None:
                raise self.fails
            return SimpleNamespace(ref=StageRef(stage=stage, key=str(again) * 64, digest=str(again) * 64), executed=True, seconds=1.0)
        return made


def attempt(stages: Stages) -> tuple[Any, Run]:
    run = Run("ada")
    return personalize._attempt(stages.tools, run, TRAINING_SET, Lora()), run


def test_what_is_drawn_besides_is_judged_with_the_first_judgement(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages(monkeypatch)
    verdict, run = attempt(stages)
    assert verdict == SECOND
    assert [call[0] for call in stages.given] == ["train", "sample", "judge", "sample", "judge"]
    assert stages.given[3][5:] == (2,)
    samples, besides, first = stages.given[4][3:]
    assert [(r.stage, r.key[0]) for r in (samples, besides, first)] == [("sample", "1"), ("sample", "2"), ("judge", "1")]
    assert (run.refs["sample"].key[0], run.refs["judge"].key[0]) == ("1", "2"), "the samples that decided, and the judgement that delivers"
    assert run.executed == ["train", "sample", "judge", "sample-more", "judge-more"]


@pytest.mark.parametrize("at", ["sample", "judge"])
@pytest.mark.parametrize("error", [ResourceError("no memory"), ServerUnreachable("gone"), NotMade("sample", Absent(attempts=1, error="resource"))], ids=["resource", "transient", "given up by a worker"])
def test_an_accepted_adapter_is_not_lost_for_want_of_more(at: str, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    verdict, run = attempt(Stages(monkeypatch, at=at, fails=error))
    assert (verdict, run.refs["judge"].key[0], run.refs["sample"].key[0]) == (FIRST, "1", "1")
    assert "what was drawn besides is left out" in caplog.text


@pytest.mark.parametrize("error", [SubjectForgotten("ada is forgotten"), NotMade("sample", Absent(attempts=0, error=None))], ids=["forgotten", "not made yet"])
def test_what_must_be_heard_is_heard(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((LikenessError, NotMade)) as raised:
        attempt(Stages(monkeypatch, at="sample", fails=error))
    assert raised.value is error


@pytest.mark.parametrize(("stage", "more"), [("sample", 3), ("ingest", 0)])
def test_workers_are_asked_for_so_many_more(stage: Any, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tools: Any, run: Run) -> dict[str, Any]:
        run.refs["assemble"], run.recipe, run.more = TRAINING_SET, Lora(), 3
        raise NotMade(stage, Absent(attempts=0, error=None))

    monkeypatch.setattr(personalize, "_personalized", half)
    monkeypatch.setattr(personalize, "runtime", lambda: None)
    needs = personalize.advance.fn("ada")["needs"]
    assert (needs["stage"], needs["more"]) == (stage, more)
