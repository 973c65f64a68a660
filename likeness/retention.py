"""Retention: what attempts leave behind that no Release was made of, deleted when it was seen unneeded for long enough.

    subjects/<id>/retention.json     key -> the day on which it was first seen unneeded

What a Release was made of is needed for as long as the subject is: photos, portraits, captions, its adapter and its samples, with every record between. Of the rest only
attempts are deleted: records of train, sample and judge, their adapters and samples, and checkpoints of trainings that nobody goes on with. A deleted attempt is made anew if
it is asked for again; so a wrong clock, a crash in between or two who prune at once cost time and nothing else.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from datetime import date

from pydantic import Field, ValidationError

from likeness.errors import TransientError
from likeness.lineage import attempts, notes_of
from likeness.once import held_claims
from likeness.records import Record
from likeness.store import Store

log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"subjects/[^/]+/stages/train/(?P<training>[0-9a-f]{64})/checkpoint-\d+\.safetensors")


class Unneeded(Record):
    """What a subject's attempts left, by the day on which that was first seen (UTC, YYYY-MM-DD)."""

    since: Mapping[str, date] = Field(default_factory=dict)


class Pruned(Record):
    """What was deleted of one subject, or would be; `waiting`: unneeded, and not for long enough; `busy`: somebody is making a stage of theirs, nothing was touched."""

    subject: str
    records: int = 0
    blobs: int = 0
    checkpoints: int = 0
    waiting: int = 0
    busy: bool = False


def prune(store: Store, subject: str, *, today: date, days: int, dry_run: bool = False) -> Pruned:
    """Delete what was seen unneeded `days` ago or earlier, and remember what is seen so today.

    Records go before the bytes that they name: a process that dies in between leaves bytes without a record, which are unneeded like any other.

    Args:
        store: fenced or not.
        subject: id of the Subject.
        today: UTC.
        days: 0 deletes at once.
        dry_run: only count; nothing is remembered either.

    Raises:
        TransientError: if others prune the same subject at the same time.
    """
    if _busy(store, subject):
        return Pruned(subject=subject, busy=True)
    records, needed = attempts(store, subject)
    found = [*_loose(records, needed), *_held(store, subject, records, needed), *_checkpoints(store, subject)]
    before = _read(store, subject)
    since = {key: before.since.get(key, today) for key in found}
    old = [key for key in found if (today - since[key]).days >= days]
    # bytes that an attempt of yesterday names as well wait for it
    named = {blob for key, blobs in records.items() if key not in set(old) for blob in blobs}
    old = [key for key in old if key not in named]
    if not dry_run:
        for key in old:
            if key in records:
                for note in notes_of(store, key):
                    store.delete(note)
            elif _busy(store, subject):                       # somebody began meanwhile: what they name may be these bytes
                return Pruned(subject=subject, busy=True)
            store.delete(key)
        _write(store, subject, Unneeded(since={key: day for key, day in since.items() if key not in set(old)}))
    gone, checkpoints = sum(key in records for key in old), sum(_CHECKPOINT.fullmatch(key) is not None for key in old)
    return Pruned(subject=subject, records=gone, checkpoints=checkpoints, blobs=len(old) - gone - checkpoints, waiting=len(found) - len(old))


def _loose(records: Mapping[str, frozenset[str]], needed: set[str]) -> list[str]:
    return sorted(set(records) - needed)


def _held(store: Store, subject: str, records: Mapping[str, frozenset[str]], needed: set[str]) -> list[str]:
    """Bytes that no record names of which a Release was made."""
    named = {blob for key in needed for blob in records[key]}
    return [key for place in ("adapters", "samples") for key in store.list(f"subjects/{subject}/{place}/") if key not in named]


def _checkpoints(store: Store, subject: str) -> list[str]:
    """Of trainings that nobody is at: they wait for somebody to go on from them, or were forgotten when the adapter was written."""
    return [key for key in store.list(f"subjects/{subject}/stages/train/") if _CHECKPOINT.fullmatch(key)]


def _busy(store: Store, subject: str) -> bool:
    return any(claim.lives is not False for claim in held_claims(store, subject))


def _path(subject: str) -> str:
    return f"subjects/{subject}/retention.json"


def _read(store: Store, subject: str) -> Unneeded:
    data = store.get(_path(subject))
    try:
        return Unneeded() if data is None else Unneeded.read(data)
    except ValidationError:
        log.warning("a list of what is unneeded could not be read: counting begins anew")
        return Unneeded()


def _write(store: Store, subject: str, wanted: Unneeded) -> None:
    path, new = _path(subject), wanted.model_dump_json().encode()
    for _ in range(10):
        found = store.get(path)
        if not wanted.since:
            store.delete(path)
            return
        if found == new or (store.put_if_absent(path, new) if found is None else store.compare_and_swap(path, expected=found, new=new)):
            return
    raise TransientError("others prune the same subject at the same time: try again")

