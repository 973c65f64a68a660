"""A subject's turn in a night: who has one, what becomes of it, and that its failure ends nothing else."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from prefect import Flow, Task
from prefect.context import FlowRunContext
from pydantic import ValidationError

from likeness.errors import InputError, LikenessError, SubjectForgotten, TransientError
from likeness.night import Outcome, last_outcome, note_outcome
from likeness.once import held_claims
from likeness.records import Reason
from tasks.runtime import Tools

log = logging.getLogger(__name__)

NOT_ASKED = "0" * 64            # of a turn that ended before its photos could be read
Due = tuple[str, Outcome | None, str]        # subject, last outcome, what is asked


def next_turns(tools: Tools, night: str, due: Sequence[Due], tonight: dict[str, Outcome], deferred: list[str], *, limit: int | None,
               ends: float | None) -> Iterator[tuple[str, str]]:
    """Who has a turn now and what is asked, one after the other; who is being made elsewhere right now comes last.

    Args:
        tools: store and watcher.
        night: id of the night.
        due: in order.
        tonight: outcomes by subject; those that another start of this night made meanwhile are added.
        deferred: who had no turn is added.
        limit: turns at most.
        ends: monotonic time after which no turn is begun.
    """
    queue, postponed, turns = deque(due), set[str](), 0
    while queue:
        subject, last, asked = queue.popleft()
        mine = False
        with turn(tools, subject, night, tonight, asked):
            now = last_outcome(tools.store, subject)
            if now is not None and now != last and (now.night, now.asked) == (night, asked):
                tonight[subject] = now
            elif (limit is not None and turns >= limit) or (ends is not None and time.monotonic() >= ends):
                deferred.append(subject)
            elif subject not in postponed and busy(tools, subject):
                postponed.add(subject)
                queue.append((subject, last, asked))
            else:
                mine = True
        if mine:
            tools.watch("night", len(due) - len(queue) - 1, len(due), subject)
            turns += 1
            yield subject, asked


def take_turns(tools: Tools, night: str, due: Sequence[Due], tonight: dict[str, Outcome], run: Callable[[str], Mapping[str, Any]], *,
               limit: int | None, ends: float | None) -> list[str]:
    """One turn for each who is due, one after the other.

    Args:
        tools, night, due, tonight, limit, ends: as `next_turns`; all outcomes are added to `tonight`.
        run: personalises one subject; returns the document of `likeness run --json`.

    Returns:
        Who was deferred.
    """
    deferred: list[str] = []
    for subject, asked in next_turns(tools, night, due, tonight, deferred, limit=limit, ends=ends):
        with turn(tools, subject, night, tonight, asked):
            settle(tools, subject, night, tonight, answer(run(subject), night, asked))
    return deferred


def settle(tools: Tools, subject: str, night: str, tonight: dict[str, Outcome], outcome: Outcome) -> None:
    """Note what became of a subject."""
    tonight[subject] = outcome
    note_outcome(tools.store, subject, outcome)


def busy(tools: Tools, subject: str) -> bool:
    """Whether somebody is making a stage of them, as far as can be told: it decides an order, no more, for stages have their claims."""
    try:
        return any(claim.lives is not False for claim in held_claims(tools.store, subject))
    except LikenessError:
        return False


def answer(result: Mapping[str, Any], night: str, asked: str) -> Outcome:
    """The outcome that a document of `likeness run --json` tells."""
    release = result["release"]
    return Outcome(night=night, asked=asked, kind=result["verdict"], reasons=tuple(Reason.read(json.dumps(r)) for r in result["reasons"]),
                   version=None if release is None else release["version"], seconds=result["seconds"])


@contextmanager
def turn(tools: Tools, subject: str, night: str, tonight: dict[str, Outcome], asked: str = NOT_ASKED) -> Iterator[None]:
    """One subject's turn: whatever goes wrong in it is noted as theirs alone, and the night goes on. Of a forgotten subject nothing is said."""
    try:
        try:
            yield
        except SubjectForgotten:
            raise
        except Exception as e:
            if not isinstance(e, LikenessError):
                log.exception("night %s: an unexpected error in one subject's turn", night)
            settle(tools, subject, night, tonight, failed(e, night, asked=asked, last=last_known(tools, subject)))
    except SubjectForgotten:
        tonight.pop(subject, None)
    except LikenessError as e:                                   # the store does not even take the note: the report still says it
        log.error("night %s: an outcome could not be noted (%s)", night, e.code)


def last_known(tools: Tools, subject: str) -> Outcome | None:
    """The last outcome, if it can be read."""
    try:
        return last_outcome(tools.store, subject)
    except (ValidationError, TransientError):                    # unreadable, or out of reach: counting begins anew
        return None


def failed(error: Exception, night: str, *, asked: str, last: Outcome | None) -> Outcome:
    """Input errors are the subject's; everything else is ours."""
    theirs = isinstance(error, InputError)
    code, message = (error.code, error.message) if isinstance(error, LikenessError) else ("unexpected", f"{type(error).__name__}: the log says more")
    again = last is not None and last.asked == asked and last.kind == "failed" and last.night != night
    failures = 1 if last is None or last.asked != asked or last.kind != "failed" else last.failures + again
    return Outcome(night=night, asked=asked, kind="failed", reasons=(Reason(code=code, message=message),), ours=not theirs, failures=failures)


def count_from_elsewhere(*subflows: Flow[..., Any]) -> None:
    """Prefect finds the subflows of an earlier start of this run by their number, and would give one subject's turn the record of another's: a later start
    counts on from a number that no earlier one reached.
    """
    context = FlowRunContext.get()
    if context is not None and (starts := context.flow_run.run_count if context.flow_run else 0) > 1:
        for each in subflows:
            context.task_run_dynamic_keys[Task(name=each.name, fn=each.fn, version=each.version).task_key] = starts * 1_000_000
