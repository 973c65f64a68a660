"""nightly: every due subject through `personalize`, one after the other in this process, so that the base is loaded once.

    enrolments -> due? -> personalize -> outcome, and at the end the numbers of the night

A night has an id, and a second start joins it: whoever had their turn is not due any more, and stages are shared through the Store. One subject's
failure never ends the night. The flow's parameter is the night's id, nothing personal.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact

from flows.personalize import personalize
from likeness.errors import InputError, IntegrityError, LikenessError, RecipeError, SubjectForgotten
from likeness.intake.sources import open_source
from likeness.night import Outcome, asked_of, check_night, enrolments, last_outcome, note_night, note_outcome, priority, summary, why_not_due
from likeness.records import Enrolment, Reason
from tasks.ingesting import source_digest
from tasks.runtime import Tools, runtime

log = logging.getLogger(__name__)


@flow(name="nightly", flow_run_name="night {night}", persist_result=False, validate_parameters=False)
def nightly(night: str, limit: int | None = None, deadline_s: float | None = None) -> dict[str, Any]:
    """Personalise everybody who is due.

    Args:
        night: id of the night; the same id again joins it.
        limit: subjects at most; the others are deferred.
        deadline_s: after so many seconds no further subject is begun; the others are deferred.

    Returns:
        The document of `likeness nightly --json` (docs/night.md).

    Raises:
        InputError: if that is no id of a night.
    """
    check_night(night)
    tools = runtime()
    began, policy = time.monotonic(), tools.settings.night
    tonight: dict[str, Outcome] = {}
    left: dict[str, list[str]] = {"unchanged": [], "paused": [], "set_aside": [], "deferred": []}
    due: list[tuple[Enrolment, Outcome | None, str]] = []
    for enrolment in enrolments(tools.store):
        subject = enrolment.subject.id
        last = last_outcome(tools.store, subject)
        if enrolment.paused:
            left["paused"].append(subject)
            continue
        try:
            asked = _asked(tools, enrolment)
        except LikenessError as e:                               # the folder is gone, or holds nothing: their turn, and it ends here
            tonight[subject] = _failed(e, night, asked=asked_of(enrolment, photos="", settings={}), last=last)
            note_outcome(tools.store, subject, tonight[subject])
            continue
        why = why_not_due(last, asked, set_aside_after=policy.set_aside_after)
        if why is None:
            due.append((enrolment, last, asked))
        elif last is not None and last.night == night:
            tonight[subject] = last                              # an earlier start of this night did it
        else:
            left[why].append(subject)
    due.sort(key=lambda item: (priority(item[1]), item[0].subject.id))
    for number, (enrolment, last, asked) in enumerate(due):
        subject = enrolment.subject.id
        if (limit is not None and number >= limit) or (deadline_s is not None and time.monotonic() - began >= deadline_s):
            left["deferred"].append(subject)
            continue
        tools.watch("night", number, len(due), subject)
        try:
            tonight[subject] = _one(subject, night, asked, last)
            note_outcome(tools.store, subject, tonight[subject])
        except SubjectForgotten:
            tonight.pop(subject, None)                           # forgotten since: nothing of them is said
    tools.watch("night", len(due), max(1, len(due)), "")
    numbers = summary(night, tonight, others={why: len(who) for why, who in left.items()}, max_failed_share=policy.max_failed_share)
    note_night(tools.store, numbers)
    create_table_artifact(key="night", description=f"night {night}: {'ok' if numbers.ok else 'too many failed'}",
                          table=[{"outcome": name, "subjects": count} for name, count in numbers.counts.items()])
    return {"night": night, "ok": numbers.ok, "counts": dict(numbers.counts), "seconds": dict(numbers.seconds),
            "accepted": [{"subject": s, "version": o.version} for s, o in sorted(tonight.items()) if o.kind == "accepted"],
            "refused": [{"subject": s, "verdict": o.kind, "reasons": [r.plain() for r in o.reasons]} for s, o in sorted(tonight.items())
                        if o.kind not in ("accepted", "failed")],
            "failed": [{"subject": s, "ours": o.ours, "failures": o.failures, "reasons": [r.plain() for r in o.reasons]} for s, o in sorted(tonight.items())
                       if o.kind == "failed"],
            **{why: sorted(who) for why, who in left.items()}}


def _asked(tools: Tools, enrolment: Enrolment) -> str:
    settings = tools.settings
    photos = source_digest(open_source(enrolment.source, store=tools.store, policy=settings.intake))
    counts = ("recipe", "ladder", "max_attempts", "battery", "gate", "intake", "backends", "sampling")
    return asked_of(enrolment, photos=photos, settings={name: settings.model_dump(mode="json")[name] for name in counts} | {"base": tools.base_ref.digest})


def _one(subject: str, night: str, asked: str, last: Outcome | None, run: Callable[[str], dict[str, Any]] = personalize) -> Outcome:
    try:
        result = run(subject)
    except SubjectForgotten:
        raise
    except LikenessError as e:
        return _failed(e, night, asked=asked, last=last)
    except Exception as e:
        log.exception("night %s: an unexpected error in one subject's run", night)
        return _failed(e, night, asked=asked, last=last)
    release = result["release"]
    return Outcome(night=night, asked=asked, kind=result["verdict"], reasons=tuple(Reason.read(json.dumps(r)) for r in result["reasons"]),
                   version=None if release is None else release["version"], seconds=result["seconds"])


def _failed(error: Exception, night: str, *, asked: str, last: Outcome | None) -> Outcome:
    """Input errors are the subject's and not tried again until something changes; everything else is ours and gets another night."""
    theirs = isinstance(error, InputError)
    code, message = (error.code, error.message) if isinstance(error, LikenessError) else ("unexpected", f"{type(error).__name__}: the log says more")
    again = last is not None and last.asked == asked and last.kind == "failed" and last.night != night
    failures = 1 if last is None or last.asked != asked or last.kind != "failed" else last.failures + again
    return Outcome(night=night, asked=asked, kind="failed", reasons=(Reason(code=code, message=message),), ours=not theirs,
                   retried=not theirs and not isinstance(error, RecipeError | IntegrityError), failures=failures)
