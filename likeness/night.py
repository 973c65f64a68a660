"""A night: which subjects are due, what became of each, and whether the night as a whole went wrong. Pure, over a Store.

What concerns one subject lies inside their prefix, so that erasing them erases it: `subjects/<id>/night.json`, the last outcome. What is kept of a night
itself, `nights/<id>.json`, holds numbers and no ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from likeness import digest
from likeness.digest import Digest
from likeness.errors import InputError
from likeness.records import Enrolment, Reason, Record
from likeness.store import Store

OutcomeKind = Literal["accepted", "retry", "needs_photos", "rejected", "failed"]
NIGHT_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")


class Outcome(Record):
    """What the last night made of a subject.

    `asked` digests all that could change it: photos, consent, settings. `failures` counts nights in a row that failed on the same question.
    """

    night: str
    asked: Digest
    kind: OutcomeKind
    reasons: tuple[Reason, ...] = ()
    ours: bool = False                      # a failure that the subject has no part in
    failures: int = Field(0, ge=0)
    version: int | None = None              # of the Release
    seconds: Mapping[str, float] = Field(default_factory=dict)


class Night(Record):
    """Numbers of one night; no ids."""

    night: str
    counts: Mapping[str, int]
    seconds: Mapping[str, float]            # per stage, summed over subjects
    ok: bool
    reasons: Mapping[str, int] = Field(default_factory=dict)          # why not, by code: subjects of which it was said
    took_s: float | None = None             # of the last start of this night
    busy_s: Mapping[str, float] = Field(default_factory=dict)         # of the last start: how long workers were at each flow


def check_night(name: str) -> str:
    """`name`, if it can be a night's id; raises InputError otherwise."""
    if not NIGHT_ID.fullmatch(name):
        raise InputError(f"{name[:60]!r} is no id of a night: small letters, digits and - are needed, up to 40; a date, for example")
    return name


def enrolled(store: Store) -> list[str]:
    """Ids of all enrolled subjects, sorted. Lists all keys below `subjects/`."""
    return sorted(k.split("/")[1] for k in store.list("subjects/") if k.count("/") == 2 and k.endswith("/enrolment.json"))


def last_outcome(store: Store, subject: str) -> Outcome | None:
    """What the last night made of them."""
    data = store.get(_path(subject))
    return None if data is None else Outcome.read(data)


def note_outcome(store: Store, subject: str, outcome: Outcome) -> None:
    """Remember it. The last one to write wins: whoever runs the same subject at the same time gets the same stages from the Store."""
    _replace(store, _path(subject), outcome.model_dump_json().encode())


def clear_outcome(store: Store, subject: str) -> None:
    """Forget what the last night made of them, so that the next one tries."""
    store.delete(_path(subject))


def note_night(store: Store, night: Night) -> None:
    """Remember the numbers; a night that is joined writes them again."""
    _replace(store, f"nights/{check_night(night.night)}.json", night.model_dump_json().encode())


def last_nights(store: Store, count: int) -> list[Night]:
    """The numbers of the last nights by their ids, which are dates unless somebody named them; newest first."""
    found = (store.get(key) for key in sorted(store.list("nights/"), reverse=True)[:count])
    return [Night.read(data) for data in found if data is not None]


def why_not_due(outcome: Outcome | None, asked: str, *, set_aside_after: int) -> str | None:
    """Why a subject has nothing to do tonight, in one word; None if they are due.

    The same photos under the same settings give the same verdict, so only what is new is worth a night, and what failed for a reason of ours: credentials,
    disks and servers are mended without a trace in photos or settings.
    """
    if outcome is None or outcome.asked != asked:
        return None
    if outcome.kind != "failed":
        return "unchanged"
    if outcome.failures >= set_aside_after:
        return "set_aside"
    return None if outcome.ours else "unchanged"


def priority(outcome: Outcome | None) -> tuple[int, str]:
    """Sorts subjects: who never had a night first, then whose last one is longest ago, those that failed last."""
    if outcome is None:
        return (0, "")
    return (2 if outcome.kind == "failed" else 1, outcome.night)


def asked_of(enrolment: Enrolment, *, photos: str, settings: Mapping[str, Any]) -> str:
    """Digest of everything that could change what a night makes of a subject."""
    return digest.of_json({"subject": enrolment.subject.plain(), "photos": photos, "settings": settings})


def summary(night: str, tonight: Mapping[str, Outcome], *, others: Mapping[str, int], max_failed_share: float, took_s: float | None = None,
            on_workers: Mapping[str, float] | None = None, busy_s: Mapping[str, float] | None = None) -> Night:
    """Numbers of a night. It failed if more than a share of those that were tried failed for reasons of ours.

    Args:
        night: its id.
        tonight: outcome by subject.
        others: how many were left alone, by reason.
        max_failed_share: 0..1.
        took_s: how long it took.
        on_workers: seconds by stage that workers took, added to those of the outcomes.
        busy_s: how long workers were at each flow.
    """
    kinds = [o.kind for o in tonight.values()]
    counts = {kind: kinds.count(kind) for kind in ("accepted", "retry", "needs_photos", "rejected", "failed")} | dict(others)
    ours = sum(o.kind == "failed" and o.ours for o in tonight.values())
    codes = [code for o in tonight.values() if o.kind != "accepted" for code in sorted({reason.code for reason in o.reasons})]
    return Night(night=night, counts=counts, seconds=_added([*(o.seconds for o in tonight.values()), on_workers or {}]), ok=ours <= max_failed_share * len(tonight),
                 reasons={code: codes.count(code) for code in sorted(set(codes))}, took_s=took_s, busy_s=busy_s or {})


def _added(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for stage, seconds in part.items():
            total[stage] = round(total.get(stage, 0.0) + seconds, 3)
    return total


def _path(subject: str) -> str:
    return f"subjects/{subject}/night.json"


def _replace(store: Store, path: str, new: bytes) -> None:
    for _ in range(20):
        found = store.get(path)
        if found == new or (store.put_if_absent(path, new) if found is None else store.compare_and_swap(path, expected=found, new=new)):
            return
    raise InputError("others write the same night at the same time: try again")
