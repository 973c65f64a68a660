"""Erasure: the tombstone that outlives a subject, and the fence that keeps what comes too late outside.

    tombstones/<subject>.json     erasing{receipt, forgotten_on, digests, uploads} -> forgotten{receipt, forgotten_on, ...}

The tombstone is written before anything is deleted. Who writes below a subject's prefix looks for it *after* the write: either it is there, and
what was written is taken back, or it comes later, and what was written lies there when the prefix is listed. No lock is needed for that.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from likeness import digest
from likeness.errors import IntegrityError, SubjectForgotten, TransientError
from likeness.records import Enrolment, Record
from likeness.store import Store

SCHEME = "store:"


class Area(Record):
    """What the scan saw of one store: objects looked at, and how many still name the subject."""

    objects: int = Field(ge=0)
    hits: int = Field(ge=0)


class Receipt(Record):
    """What an operator may file: nothing in it says who it was. Whoever knows the id can prove that it is theirs: `proof` is the sha256 of "receipt:id"."""

    receipt: str
    forgotten_on: str                     # UTC, YYYY-MM-DD
    proof: str
    searched_for: int = Field(ge=0)       # words and digests
    scan: dict[str, Area]
    left: tuple[str, ...]                 # what Likeness cannot delete and somebody else must

    @property
    def clean(self) -> bool:
        """Whether no store names the subject any more."""
        return not any(area.hits for area in self.scan.values())


class Erasing(Record):
    """Erasure has begun. The digests are what the scan will look for; they go with the last step."""

    state: Literal["erasing"] = "erasing"
    receipt: str
    forgotten_on: str
    digests: tuple[str, ...] = ()
    uploads: str | None = None            # prefix of the store from which this subject alone was read
    source_outside: bool = False          # the photos were read from a place that is not ours to delete


class Forgotten(Record):
    """Erasure is done."""

    state: Literal["forgotten"] = "forgotten"
    receipt: Receipt


Tombstone = Erasing | Forgotten
_TOMBSTONE: TypeAdapter[Tombstone] = TypeAdapter(Annotated[Tombstone, Field(discriminator="state")])


def tombstone_key(subject: str) -> str:
    """Where the tombstone of a subject lies."""
    return f"tombstones/{subject}.json"


def read_tombstone(store: Store, subject: str) -> Tombstone | None:
    """The subject's tombstone, or None.

    Raises:
        IntegrityError: if it is no tombstone; the subject counts as forgotten all the same.
    """
    data = store.get(tombstone_key(subject))
    try:
        return None if data is None else _TOMBSTONE.validate_json(data)
    except ValidationError as e:
        raise IntegrityError(f"{tombstone_key(subject)} holds {len(data or b'')} bytes that are no tombstone: restore it from a backup, or delete it and "
                             "run `likeness forget` again at once") from e


def check_not_forgotten(store: Store, subject: str) -> None:
    """Refuse a subject that has a tombstone, readable or not.

    Raises:
        SubjectForgotten: if there is one.
    """
    if store.get(tombstone_key(subject)) is not None:
        raise SubjectForgotten(f"subject {subject!r} was forgotten: nothing about them may be made again; use another id for another person")


def bury(store: Store, subject: str, *, today: str) -> Tombstone:
    """The subject's tombstone, written now if there is none: from here on nothing of them may be made.

    Args:
        store: where it is written.
        subject: id of the Subject.
        today: UTC date, YYYY-MM-DD.
    """
    store.put_if_absent(tombstone_key(subject), _dump(Erasing(receipt=secrets.token_hex(8), forgotten_on=today)))
    found = read_tombstone(store, subject)
    if found is None:
        raise TransientError("the tombstone was removed while it was written: run the same command again")
    return found


def replace(store: Store, subject: str, *, old: Tombstone, new: Tombstone) -> Tombstone:
    """Change a tombstone that nobody else changed meanwhile.

    Raises:
        TransientError: if another process erases the same subject.
    """
    if not store.compare_and_swap(tombstone_key(subject), expected=_dump(old), new=_dump(new)):
        raise TransientError("another process is forgetting the same subject: run the same command again when it is done")
    return new


def remember(store: Store, subject: str, mark: Erasing) -> Erasing:
    """`mark` with everything that the scan must look for, as far as the prefix still holds it: digests of all objects, all digests in all records."""
    found: set[str] = set(mark.digests)
    prefix, uploads, outside = f"subjects/{subject}/", mark.uploads, mark.source_outside
    for key in store.list(prefix):
        found |= set(_digests(key.rpartition("/")[2].partition(".")[0]))
        data = store.get(key) or b""
        found.add(digest.of_bytes(data))
        if "/stages/" in key and key.endswith(".json"):
            found |= set(_own(data, subject))
        elif key == f"{prefix}enrolment.json":
            source = Enrolment.read(data).source
            outside = not source.startswith(SCHEME)
            folder = source.removeprefix(SCHEME)
            # Only a folder that bears the subject's id is theirs alone: "uploads/" may hold everybody's
            uploads = folder if not outside and folder.rstrip("/").rpartition("/")[2] == subject else uploads
            outside = outside or uploads is None
    return mark.model_copy(update={"digests": tuple(sorted(found)), "uploads": uploads, "source_outside": outside})


def receipt_of(subject: str, mark: Erasing, *, searched_for: int, scan: Mapping[str, Area], left: Iterable[str]) -> Receipt:
    """The receipt of a finished erasure."""
    return Receipt(receipt=mark.receipt, forgotten_on=mark.forgotten_on, proof=digest.of_bytes(f"{mark.receipt}:{subject}".encode()),
                   searched_for=searched_for, scan=dict(scan), left=tuple(left))


class Fenced:
    """A Store in which nothing of a forgotten subject stays, whoever writes it and however late."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    def get(self, key: str, /) -> bytes | None:
        """See Store."""
        return self.inner.get(key)

    def put_if_absent(self, key: str, data: bytes, /) -> bool:
        """See Store. Raises SubjectForgotten, the write taken back, if the subject has a tombstone."""
        made = self.inner.put_if_absent(key, data)
        return made and self._stays(key)

    def compare_and_swap(self, key: str, /, *, expected: bytes, new: bytes) -> bool:
        """See Store. Raises SubjectForgotten, the object deleted, if the subject has a tombstone."""
        made = self.inner.compare_and_swap(key, expected=expected, new=new)
        return made and self._stays(key)

    def list(self, prefix: str, /) -> Iterator[str]:
        """See Store."""
        return self.inner.list(prefix)

    def delete(self, key: str, /) -> None:
        """See Store."""
        self.inner.delete(key)

    def _stays(self, key: str) -> bool:
        top, _, rest = key.partition("/")
        if top == "subjects":
            try:
                check_not_forgotten(self.inner, rest.partition("/")[0])
            except SubjectForgotten:
                self.inner.delete(key)
                raise
        return True


def _own(data: bytes, subject: str) -> Iterator[str]:
    """Digests that are this subject's alone: what a stage record was given and gave, not which base, battery or policy it was made with."""
    try:
        plain = json.loads(data)
    except ValueError:
        return
    if plain.get("state") != "published":
        return
    yield plain["digest"]
    yield plain["key"]
    output = plain["output"]
    if plain["stage"] == "train":
        # the scratch folders of a registration bear this name
        yield digest.of_json({"subject": subject, "training_set": output["training_set"], "recipe": output["recipe"]})
    for photo in output.get("photos", ()):
        yield from (photo["sha256"], photo["source_sha256"], digest.of_json(photo))
    for portrait in output.get("portraits", ()):
        yield digest.of_json(portrait)


def _digests(word: str) -> Iterator[str]:
    if len(word) == 64 and all(c in "0123456789abcdef" for c in word):
        yield word


def _dump(mark: Tombstone) -> bytes:
    plain: dict[str, Any] = mark.plain()
    return json.dumps(plain, sort_keys=True).encode()
