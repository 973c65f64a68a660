"""nightly: everybody who is due to a verdict, in this process one after the other, or with workers, in batches.

    enrolments -> due? -> personalize -> outcome, and at the end the numbers of the night

A night has an id, and a second start joins it: whoever had their turn is not due any more, and stages are shared through the Store. One subject's
failure never ends the night. The flow's parameters are the night's id and numbers, nothing personal.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import flow_run
from pydantic import ValidationError

from flows.batches import Batches, PrefectPools
from flows.personalize import advance, personalize
from flows.turns import NOT_ASKED, Due, count_from_elsewhere, last_known, next_turns, take_turns, turn
from likeness.errors import LikenessError, SubjectForgotten, translated
from likeness.intake.sources import open_source
from likeness.night import Night, Outcome, asked_of, check_night, enrolled, last_outcome, note_night, priority, summary, why_not_due
from likeness.night_registry import show_night
from likeness.report import render_night
from likeness.version import code_version
from tasks.ingesting import source_digest
from tasks.runtime import Tools, runtime

log = logging.getLogger(__name__)


def _tonight() -> str:
    """Id of a night that was not named: the date (UTC) for which the run was scheduled, so that one that is run again after a crash joins its own night."""
    scheduled: datetime = flow_run.scheduled_start_time
    return scheduled.astimezone(UTC).date().isoformat()


def _name_of_run() -> str:
    return f"night {flow_run.parameters.get('night') or _tonight()}"


@flow(name="nightly", flow_run_name=_name_of_run, persist_result=False, validate_parameters=False)
def nightly(night: str | None = None, limit: int | None = None, deadline_s: float | None = None, on_workers: bool = False) -> dict[str, Any]:
    """Personalise everybody who is due.

    Args:
        night: id of the night; the same id again joins it. None: the date (UTC) for which the run was scheduled.
        limit: subjects at most; the others are deferred.
        deadline_s: after so many seconds no further subject is begun; the others are deferred.
        on_workers: send batches to the pools that prepare and train; what they have made is judged and registered here. False: everything here.

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
    due: list[Due] = []
    settings = _what_counts(tools)
    for subject in enrolled(tools.store):
        with turn(tools, subject, night, tonight):
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
    count_from_elsewhere(personalize, advance)
    workers: Batches | None = None
    if on_workers:
        workers = Batches(tools, night, tonight, PrefectPools(), lambda subject: advance(subject))
        workers.run(next_turns(tools, night, due, tonight, left["deferred"], limit=limit, ends=ends))
    else:
        left["deferred"] = take_turns(tools, night, due, tonight, lambda subject: personalize(subject), limit=limit, ends=ends)
    tools.watch("night", len(due), max(1, len(due)), "")
    numbers = summary(night, tonight, others={why: len(who) for why, who in left.items()}, max_failed_share=policy.max_failed_share,
                      took_s=round(time.monotonic() - began, 3), on_workers=workers.seconds if workers else {}, busy_s=workers.busy_s if workers else {})
    note_night(tools.store, numbers)
    page = _show(tools, numbers)
    create_table_artifact(key="night", description=f"night {night}: {'ok' if numbers.ok else 'too many failed'}",
                          table=[{"outcome": name, "subjects": count} for name, count in numbers.counts.items()])
    return {"night": night, "ok": numbers.ok, "page": None if page is None else str(page), "counts": dict(numbers.counts), "seconds": dict(numbers.seconds), "busy_s": dict(numbers.busy_s),
            "accepted": [{"subject": s, "version": o.version} for s, o in sorted(tonight.items()) if o.kind == "accepted"],
            "refused": [{"subject": s, "verdict": o.kind, "reasons": [r.plain() for r in o.reasons]} for s, o in sorted(tonight.items())
                        if o.kind not in ("accepted", "failed")],
            "failed": [{"subject": s, "ours": o.ours, "failures": o.failures, "reasons": [r.plain() for r in o.reasons]} for s, o in sorted(tonight.items())
                       if o.kind == "failed"],
            **{why: sorted(who) for why, who in left.items()}}


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
        last = last_known(tools, subject)
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
