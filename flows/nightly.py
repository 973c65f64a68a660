"""nightly: every due subject through `personalize`, one after the other in this process, so that the base is loaded once.

    enrolments -> due? -> personalize -> outcome, and at the end the numbers of the night

A night has an id, and a second start joins it: whoever had their turn is not due any more, and stages are shared through the Store. One subject's
failure never ends the night. The flow's parameter is the night's id, nothing personal.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from pydantic import ValidationError

from flows.personalize import personalize
from likeness.errors import InputError, LikenessError, SubjectForgotten, TransientError, translated
from likeness.intake.sources import open_source
from likeness.night import Night, Outcome, asked_of, check_night, enrolled, last_outcome, note_night, note_outcome, priority, summary, why_not_due
from likeness.night_registry import show_night
from likeness.once import held_claims
from likeness.records import Reason
from likeness.report import render_night
from likeness.version import code_version
from tasks.ingesting import source_digest
from tasks.runtime import Tools, runtime

log = logging.getLogger(__name__)

NOT_ASKED = "0" * 64            # of a turn that ended before its photos could be read


def _tonight() -> str:
    """Id of a night that was not named: the date (UTC) for which the run was scheduled, so that one that is run again after a crash joins its own night."""
    scheduled: datetime = flow_run.scheduled_start_time
    return scheduled.astimezone(UTC).date().isoformat()


def _name_of_run() -> str:
    return f"night {flow_run.parameters.get('night') or _tonight()}"


@flow(name="nightly", flow_run_name=_name_of_run, persist_result=False, validate_parameters=False)
def nightly(night: str | None = None, limit: int | None = None, deadline_s: float | None = None) -> dict[str, Any]:
    """Personalise everybody who is due.

    Args:
        night: id of the night; the same id again joins it. None: the date (UTC) for which the run was scheduled.
        limit: subjects at most; the others are deferred.
        deadline_s: after so many seconds no further subject is begun; the others are deferred.

    Returns:
        The document of `likeness nightly --json` (docs/night.md).

    Raises:
        InputError: if that is no id of a night.
    """
    night = check_night(night or _tonight())
    tools = runtime()
    began, policy = time.monotonic(), tools.settings.night
    tonight: dict[str, Outcome] = {}
    left: dict[str, list[str]] = {"unchanged": [], "paused": [], "set_aside": [], "deferred": []}
    due: list[tuple[str, Outcome | None, str]] = []
    settings = _what_counts(tools)
    for subject in enrolled(tools.store):
        with _turn(tools, subject, night, tonight):
            last = last_outcome(tools.store, subject)
            why, asked = _why_not(tools, subject, last, settings)
            if why is None:
                due.append((subject, last, asked))
            elif why != "paused" and last is not None and last.night == night:
                tonight[subject] = last                          # an earlier start of this night did it
            else:
                left[why].append(subject)
    due.sort(key=lambda item: (priority(item[1]), item[0]))
    ends = None if deadline_s is None else began + deadline_s
    left["deferred"] = _take_turns(tools, night, due, tonight, lambda subject: personalize(subject), limit=limit, ends=ends)
    tools.watch("night", len(due), max(1, len(due)), "")
    numbers = summary(night, tonight, others={why: len(who) for why, who in left.items()}, max_failed_share=policy.max_failed_share,
                      took_s=round(time.monotonic() - began, 3))
    note_night(tools.store, numbers)
    page = _show(tools, numbers)
    create_table_artifact(key="night", description=f"night {night}: {'ok' if numbers.ok else 'too many failed'}",
                          table=[{"outcome": name, "subjects": count} for name, count in numbers.counts.items()])
    return {"night": night, "ok": numbers.ok, "page": None if page is None else str(page), "counts": dict(numbers.counts), "seconds": dict(numbers.seconds),
            "accepted": [{"subject": s, "version": o.version} for s, o in sorted(tonight.items()) if o.kind == "accepted"],
            "refused": [{"subject": s, "verdict": o.kind, "reasons": [r.plain() for r in o.reasons]} for s, o in sorted(tonight.items())
                        if o.kind not in ("accepted", "failed")],
            "failed": [{"subject": s, "ours": o.ours, "failures": o.failures, "reasons": [r.plain() for r in o.reasons]} for s, o in sorted(tonight.items())
                       if o.kind == "failed"],
            **{why: sorted(who) for why, who in left.items()}}


def _take_turns(tools: Tools, night: str, due: Sequence[tuple[str, Outcome | None, str]], tonight: dict[str, Outcome], run: Callable[[str], Mapping[str, Any]], *,
                limit: int | None, ends: float | None) -> list[str]:
    """One turn for each who is due, unless another start of this night had it meanwhile; who is being made elsewhere right now comes last.

    Args:
        tools: store and watcher.
        night: id of the night.
        due: subject, last outcome and what is asked, in order.
        tonight: outcomes by subject, added to.
        run: personalises one subject; returns the document of `likeness run --json`.
        limit: turns at most.
        ends: monotonic time after which no turn is begun.

    Returns:
        Who was deferred.
    """
    queue, postponed, deferred, turns = deque(due), set[str](), list[str](), 0
    while queue:
        subject, last, asked = queue.popleft()
        with _turn(tools, subject, night, tonight, asked):
            now = last_outcome(tools.store, subject)
            if now is not None and now != last and (now.night, now.asked) == (night, asked):
                tonight[subject] = now
                continue
            if (limit is not None and turns >= limit) or (ends is not None and time.monotonic() >= ends):
                deferred.append(subject)
                continue
            if subject not in postponed and _busy(tools, subject):
                postponed.add(subject)
                queue.append((subject, last, asked))
                continue
            tools.watch("night", len(due) - len(queue) - 1, len(due), subject)
            turns += 1
            tonight[subject] = _answer(run(subject), night, asked)
            note_outcome(tools.store, subject, tonight[subject])
    return deferred


def _busy(tools: Tools, subject: str) -> bool:
    """Whether somebody is making a stage of them, as far as can be told: it decides an order, no more, for stages have their claims."""
    try:
        return any(claim.lives is not False for claim in held_claims(tools.store, subject))
    except LikenessError:
        return False


def _show(tools: Tools, numbers: Night) -> Path | None:
    """The night as a page below the home, and in MLflow. Neither is worth failing a night for: what could not be shown is logged."""
    html = render_night(numbers, code=code_version())
    path = tools.settings.home / "nights" / f"{numbers.night}.html"
    shown: Path | None = None
    try:
        with translated("writing the night's page"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(html, encoding="utf-8")
            part.replace(path)
        shown = path
        show_night(tools.registry, numbers, html)
    except LikenessError as e:
        log.error("night %s: its %s could not be written (%s)", numbers.night, "page" if shown is None else "run in MLflow", e.code)
    return shown


def due_now(tools: Tools) -> tuple[list[str], dict[str, list[str]]]:
    """Whom a night that began now would try, in its order, and who would be left alone, by reason. Reads and hashes all photos; writes nothing.

    Subjects whose photos or records cannot be read are due: the night says what is wrong with them.
    """
    due: list[tuple[tuple[int, str], str]] = []
    left: dict[str, list[str]] = {"unchanged": [], "paused": [], "set_aside": []}
    subjects = enrolled(tools.store)
    settings = _what_counts(tools) if subjects else {}
    for subject in subjects:
        last = _last(tools, subject)
        try:
            why, _ = _why_not(tools, subject, last, settings)
        except SubjectForgotten:
            continue
        except (LikenessError, ValidationError, OSError):
            why = None
        if why is None:
            due.append((priority(last), subject))
        else:
            left[why].append(subject)
    return [subject for _, subject in sorted(due)], left


def _why_not(tools: Tools, subject: str, last: Outcome | None, settings: Mapping[str, Any]) -> tuple[str | None, str]:
    """Why a subject has no turn in one word, None if they have one; and what would be asked."""
    enrolment = tools.standing(subject)
    if enrolment.paused:
        return "paused", NOT_ASKED
    asked = asked_of(enrolment, photos=source_digest(open_source(enrolment.source, store=tools.store, policy=tools.settings.intake)), settings=settings)
    return why_not_due(last, asked, set_aside_after=tools.settings.night.set_aside_after), asked


def _what_counts(tools: Tools) -> dict[str, Any]:
    """The settings that could change a verdict."""
    plain = tools.settings.model_dump(mode="json")
    names = ("recipe", "ladder", "max_attempts", "battery", "gate", "intake", "backends", "sampling")
    return {name: plain[name] for name in names} | {"base": tools.base_ref.digest}


def _answer(result: Mapping[str, Any], night: str, asked: str) -> Outcome:
    release = result["release"]
    return Outcome(night=night, asked=asked, kind=result["verdict"], reasons=tuple(Reason.read(json.dumps(r)) for r in result["reasons"]),
                   version=None if release is None else release["version"], seconds=result["seconds"])


@contextmanager
def _turn(tools: Tools, subject: str, night: str, tonight: dict[str, Outcome], asked: str = NOT_ASKED) -> Iterator[None]:
    """One subject's turn: whatever goes wrong in it is noted as theirs alone, and the night goes on. Of a forgotten subject nothing is said."""
    try:
        try:
            yield
        except SubjectForgotten:
            raise
        except Exception as e:
            if not isinstance(e, LikenessError):
                log.exception("night %s: an unexpected error in one subject's turn", night)
            tonight[subject] = _failed(e, night, asked=asked, last=_last(tools, subject))
            note_outcome(tools.store, subject, tonight[subject])
    except SubjectForgotten:
        tonight.pop(subject, None)
    except LikenessError as e:                                   # the store does not even take the note: the report still says it
        log.error("night %s: an outcome could not be noted (%s)", night, e.code)


def _last(tools: Tools, subject: str) -> Outcome | None:
    try:
        return last_outcome(tools.store, subject)
    except (ValidationError, TransientError):                    # unreadable, or out of reach: counting begins anew
        return None


def _failed(error: Exception, night: str, *, asked: str, last: Outcome | None) -> Outcome:
    """Input errors are the subject's; everything else is ours."""
    theirs = isinstance(error, InputError)
    code, message = (error.code, error.message) if isinstance(error, LikenessError) else ("unexpected", f"{type(error).__name__}: the log says more")
    again = last is not None and last.asked == asked and last.kind == "failed" and last.night != night
    failures = 1 if last is None or last.asked != asked or last.kind != "failed" else last.failures + again
    return Outcome(night=night, asked=asked, kind="failed", reasons=(Reason(code=code, message=message),), ours=not theirs, failures=failures)
