"""A night with workers: who is gathered into which batch, what is sent again, and what ends one subject alone. Workers here are a few lines that keep a promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from flows import training
from flows.batches import COMES_BACK_S, Batches, Ended, FlowName, _seconds, told
from flows.turns import Due, next_turns
from likeness.errors import BadSettings, InputError, LikenessError, RecipeError, UnusablePhotos, error_of
from likeness.night import Outcome, last_outcome
from likeness.records import Consent, Enrolment, Subject
from likeness.settings import load_settings
from likeness.stages import StageRef
from likeness.store import MemoryStore
from tasks.runtime import Tools

ASKED = "a" * 64
RESULT = {"verdict": "accepted", "reasons": [], "release": {"model": "likeness.x", "version": 1}, "seconds": {"judge": 1.0}}


class Workers:
    """The Store of a night in a dictionary, and workers who finish a batch when it has been looked at `looks` times."""

    def __init__(self, *, looks: int = 2, trainings: int = 1) -> None:
        self.looks, self.trainings = looks, trainings
        self.made: dict[str, int] = {}                   # stages that are published, by subject: 1 prepared, 2 trained, 3 trained twice...
        self.errors: dict[str, tuple[str, int]] = {}     # code and attempts of the stage that was given up
        self.broken: dict[str, str] = {}                 # subject -> error code of their training
        self.crashes = 0                                 # batches of trainings that die before anything is made
        self.idle: set[str] = set()                      # subjects whose workers publish under another key
        self.log: list[tuple[str, str, tuple[str, ...]]] = []
        self.cancelled: list[str] = []
        self._under_way: dict[str, tuple[FlowName, tuple[str, ...], int]] = {}

    def send(self, flow: FlowName, parameters: Mapping[str, Any]) -> str:
        who = tuple(parameters["subjects"] if flow == "preparing" else [t["subject"] for t in parameters["trainings"]])
        self.log.append(("send", flow, who))
        self._under_way[run := f"run-{len(self.log)}"] = (flow, who, 0)
        return run

    def ended(self, run: str) -> Ended | None:
        flow, who, looked = self._under_way[run]
        self._under_way[run] = (flow, who, looked + 1)
        if looked < self.looks:
            return None
        self.log.append(("end", flow, who))
        if flow == "training" and self.crashes:
            self.crashes -= 1
            return Ended(False, "Crashed", 1.0)
        for subject in who:
            if flow == "training" and subject in self.broken:
                self.errors[subject] = (self.broken[subject], self.errors.get(subject, ("", 0))[1] + 1)
            elif subject not in self.idle:
                self.made[subject] = self.made.get(subject, 0) + 1
        return Ended(True, "Completed", 10.0, {"train": 5.0})

    def cancel(self, run: str) -> None:
        self.cancelled.append(run)

    def advance(self, subject: str) -> dict[str, Any]:
        made = self.made.get(subject, 0)
        if made == 0:
            return {"subject": subject, "needs": needs("preparing", "ingest")}
        if made <= self.trainings:
            error, attempts = self.errors.get(subject, (None, 0))
            return {"subject": subject, "needs": needs("training", "train", error, attempts, recipe=made)}
        return RESULT

    def sent(self, flow: str) -> list[tuple[str, ...]]:
        return [who for what, which, who in self.log if (what, which) == ("send", flow)]


def needs(flow: str, stage: str, error: str | None = None, attempts: int = 0, *, recipe: int = 0) -> dict[str, Any]:
    return {"flow": flow, "stage": stage, "error": error, "attempts": attempts, "training_set": {"key": "k"} if recipe else None, "recipe": {"n": recipe}, "more": 0}


def night(own_home: Path, workers: Any, subjects: str, *, limit: int | None = None, **settings: Any) -> tuple[dict[str, Outcome], list[str], Batches]:
    tools = Tools(load_settings(overrides={"home": str(own_home), "night.batch": 2, **settings}))
    tools.bare_store = MemoryStore()
    due: list[Due] = []
    for subject in subjects:
        tools.enrol(Enrolment(subject=Subject(id=subject * 3, noun="man", consent=Consent(source="ticket 7")), source="store:uploads/"))
        due.append((subject * 3, None, ASKED))
    tonight: dict[str, Outcome] = {}
    deferred: list[str] = []
    batches = Batches(tools, "n1", tonight, workers, workers.advance, pause=lambda seconds: None)
    batches.run(next_turns(tools, "n1", due, tonight, deferred, limit=limit, ends=None))
    assert {s: last_outcome(tools.store, s) for s in tonight} == tonight
    return tonight, deferred, batches


def test_subjects_are_trained_in_batches_while_the_next_ones_are_prepared(own_home: Path) -> None:
    workers = Workers(looks=6)
    tonight, deferred, batches = night(own_home, workers, "abcdefg")
    assert {o.kind for o in tonight.values()} == {"accepted"}
    assert (len(tonight), deferred) == (7, [])
    assert [len(who) for who in workers.sent("training")] == [2, 2, 2, 1]
    assert sorted(s for who in workers.sent("training") for s in who) == [c * 3 for c in "abcdefg"]        # each once
    first_end = next(i for i, (what, flow, _) in enumerate(workers.log) if (what, flow) == ("end", "training"))
    assert ("end", "preparing") in [(what, flow) for what, flow, _ in workers.log[workers.log.index(("send", "training", workers.sent("training")[0])):first_end]]
    assert (batches.busy_s["training"], batches.seconds["train"]) == (40.0, 5.0 * len([x for x in workers.log if x[0] == "end"]))


def test_no_more_is_begun_than_keeps_the_workers_busy(own_home: Path) -> None:
    class Watched(Workers):
        most = 0

        def advance(self, subject: str) -> dict[str, Any]:
            begun.add(subject)
            found = super().advance(subject)
            begun.difference_update([subject] if "verdict" in found else [])
            self.most = max(self.most, len(begun))
            return found

    begun: set[str] = set()
    workers = Watched(looks=4)
    tonight, _, _ = night(own_home, workers, "abcdefghijklmnop")
    assert len(tonight) == 16
    assert workers.most <= 2 * (1 + 2)


def test_what_fails_on_a_worker_ends_one_subject_with_its_own_code(own_home: Path) -> None:
    workers = Workers()
    workers.broken = {"bbb": "unusable_photos", "ccc": "resource", "ddd": "ZeroDivisionError"}
    tonight, _, _ = night(own_home, workers, "abcd")
    assert {s: (o.kind, o.ours, [r.code for r in o.reasons]) for s, o in tonight.items()} == {
        "aaa": ("accepted", False, []), "bbb": ("failed", False, ["unusable_photos"]), "ccc": ("failed", True, ["resource"]),
        "ddd": ("failed", True, ["likeness_error"])}
    assert sorted(s for who in workers.sent("training") for s in who) == ["aaa", "bbb", "ccc", "ddd"]          # what was tried is not sent again


def test_an_error_of_an_earlier_night_is_not_taken_for_tonights(own_home: Path) -> None:
    workers = Workers()
    workers.errors = {"aaa": ("resource", 3)}
    tonight, _, _ = night(own_home, workers, "a")
    assert tonight["aaa"].kind == "accepted"


@pytest.mark.parametrize(("crashes", "kind"), [(1, "accepted"), (2, "failed")])
def test_a_batch_that_dies_is_sent_once_more(own_home: Path, crashes: int, kind: str) -> None:
    workers = Workers()
    workers.crashes = crashes
    tonight, _, _ = night(own_home, workers, "ab")
    assert {(o.kind, o.ours) for o in tonight.values()} == {(kind, kind == "failed")}
    assert [sorted(who) for who in workers.sent("training")] == [["aaa", "bbb"]] * 2


def test_a_worker_that_publishes_under_another_key_is_named_and_not_asked_again(own_home: Path) -> None:
    workers = Workers()
    workers.idle = {"aaa"}
    tonight, _, _ = night(own_home, workers, "ab")
    assert (tonight["aaa"].kind, tonight["aaa"].reasons[0].code, tonight["bbb"].kind) == ("failed", BadSettings.code, "accepted")
    assert "same code, settings and base" in tonight["aaa"].reasons[0].message
    assert sorted(s for who in workers.sent("preparing") for s in who) == ["aaa", "bbb"]


def test_a_second_attempt_goes_through_a_batch_too(own_home: Path) -> None:
    workers = Workers(trainings=2)
    tonight, _, _ = night(own_home, workers, "ab")
    assert {o.kind for o in tonight.values()} == {"accepted"}
    assert [sorted(who) for who in workers.sent("training")] == [["aaa", "bbb"]] * 2


def test_samples_besides_are_asked_of_the_workers_that_train(own_home: Path) -> None:
    class Watched(Workers):
        asked: ClassVar[list[int]] = []

        def send(self, flow: FlowName, parameters: Mapping[str, Any]) -> str:
            self.asked += [t["more"] for t in parameters.get("trainings", [])]
            return super().send(flow, parameters)

        def advance(self, subject: str) -> dict[str, Any]:
            found = super().advance(subject)
            if self.made.get(subject) == 2:
                found["needs"] |= {"recipe": {"n": 1}, "more": 2}
            return found

    tonight, _, _ = night(own_home, workers := Watched(trainings=2), "a")
    assert (tonight["aaa"].kind, workers.asked) == ("accepted", [0, 2])


@pytest.mark.parametrize("more", [None, 0, 3])
def test_a_worker_draws_besides_what_it_is_told_to(more: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def stage(name: Any) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            calls.append((name, *given[4:]))
            return SimpleNamespace(ref=StageRef(stage=name, key="a" * 64, digest="b" * 64), seconds=1.5, executed=True)
        return made

    monkeypatch.setattr(training, "train", stage("train"))
    monkeypatch.setattr(training, "sample_battery", stage("sample"))
    told = training.training.fn([{"subject": "ada", "training_set": {"stage": "assemble", "key": "c" * 64, "digest": "d" * 64}, "recipe": {"method": "lora", "base": "maquette"}}
                                 | ({} if more is None else {"more": more})])
    assert calls == [("train",), ("sample",), *([("sample", more)] if more else [])]
    assert ("sample-more" in told.message) == bool(more)


def test_who_has_no_turn_is_deferred_and_nothing_is_sent_for_them(own_home: Path) -> None:
    workers = Workers()
    tonight, deferred, _ = night(own_home, workers, "abc", limit=1)
    assert (set(tonight), deferred) == ({"aaa"}, ["bbb", "ccc"])
    assert workers.sent("preparing") == [("aaa",)]


def test_a_batch_that_takes_too_long_is_cancelled(own_home: Path) -> None:
    workers = Workers(looks=1_000_000)
    tonight, _, _ = night(own_home, workers, "a", **{"night.batch_wait_s": 1e-6})
    assert (tonight["aaa"].kind, tonight["aaa"].ours, workers.cancelled) == ("failed", True, ["run-1"])
    assert "too late" in tonight["aaa"].reasons[0].message


def test_a_server_without_our_deployments_fails_turns_and_not_the_night(own_home: Path) -> None:
    class Refusing(Workers):
        def send(self, flow: FlowName, parameters: Mapping[str, Any]) -> str:
            raise RecipeError("no deployment: run `likeness deploy`")

    tonight, _, _ = night(own_home, Refusing(), "ab")
    assert {(o.kind, o.reasons[0].code) for o in tonight.values()} == {("failed", "recipe")}


def test_a_workers_numbers_come_back_in_its_message_and_another_message_is_no_number() -> None:
    assert _seconds(told({"train": 1.23456}, {"resource": 1})) == {"train": 1.235}
    assert [_seconds(message) for message in (None, "Worker died", "[]", '{"seconds": 3}', '{"seconds": {"train": "x"}}')] == [{}] * 5
    assert COMES_BACK_S > 0


@pytest.mark.parametrize(("code", "kind"), [("unusable_photos", UnusablePhotos), ("input", InputError), ("ValueError", LikenessError)])
def test_an_error_is_found_again_by_its_code(code: str, kind: type[LikenessError]) -> None:
    assert type(error_of(code, "words")) is kind
    assert error_of(code, "words").message == "words"
