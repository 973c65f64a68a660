"""Lineage: from a Release back to the photos, each link verified against the Store; and forwards again, from a photo to the Releases.

The stages' published records form a Merkle chain: a record names its inputs by stage, key and digest, and its key is computed from them.
Nothing here trusts a name: every record is digested again, every key computed again, every blob read and hashed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from likeness import digest
from likeness.digest import Digest
from likeness.erasure import check_not_forgotten, tombstone_key
from likeness.errors import DigestMismatch, InputError, RecipeError
from likeness.records import BaseRef, BlobRef, Release, SubjectId
from likeness.stages import STAGES, Call, Published, StageRef
from likeness.store import Store, read_blob

log = logging.getLogger(__name__)

_DIGEST: TypeAdapter[str] = TypeAdapter(Digest)
_SUBJECT: TypeAdapter[str] = TypeAdapter(SubjectId)
# An output names what it was made from; the stage that made that must be among the inputs, directly or further back.
_NAMES: Mapping[str, Mapping[str, str]] = {
    "train": {"training_set": "assemble"},
    "sample": {"adapter": "train"},
    "register": {"adapter": "train", "verdict": "judge"},
}


@dataclass(frozen=True)
class Link:
    """One published stage, and what does not hold in it: nothing, if it is verified."""

    stage: str
    key: str
    digest: str
    inputs: tuple[StageRef, ...]
    faults: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether record, key and blobs all hold."""
        return not self.faults


@dataclass(frozen=True)
class Chain:
    """Everything a Release was made from, Release first, photos last."""

    subject: str
    release: Release | None
    links: tuple[Link, ...]
    photos: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every link is verified and the chain reaches the photos."""
        return bool(self.links) and all(link.verified for link in self.links) and any(link.stage == "ingest" for link in self.links)

    def as_json(self) -> dict[str, Any]:
        """The document of `likeness lineage --json`."""
        return {
            "subject": self.subject,
            "release": None if self.release is None else {"model": self.release.model, "version": self.release.version},
            "chain": [{"stage": link.stage, "key": link.key, "digest": link.digest,
                       "inputs": [i.model_dump(mode="json") for i in link.inputs], "verified": link.verified} for link in self.links],
            "photos": list(self.photos),
            "ok": self.ok,
        }


def walk(store: Store, subject: str, start: Release | StageRef | int | None = None) -> Chain:
    """The chain of a Release, or of a stage, each link verified.

    Args:
        store: where the records and blobs lie.
        subject: id of the Subject.
        start: the Release, its version, or None for the newest one; where there is no Release at all, the furthest stage is walked from.
            A reference to a stage walks that stage, whatever other chains the subject has.

    Raises:
        InputError: if nothing is published for the subject, or there is no such Release or stage.
        SubjectForgotten: if the subject has a tombstone.
    """
    check_subject(subject)
    check_not_forgotten(store, subject)
    shelf = _Shelf(store, subject)
    roots = _roots(shelf, start)
    links: dict[tuple[str, str], Link] = {}
    waiting: list[tuple[StageRef, Published | None]] = [(root.ref, root) for root in roots]
    while waiting:
        ref, held = waiting.pop(0)
        link = links.get((ref.stage, ref.key))
        if link is None:
            link = _verify(shelf, ref, held)
            found = shelf.read(ref) if held is None else held
            waiting += [(i, None) for i in (found.inputs if found else ())]
        elif held is None and ref.digest != link.digest:
            link = Link(link.stage, link.key, link.digest, link.inputs, (*link.faults, f"digest {ref.digest[:12]}... is what a later stage was given"))
        links[ref.stage, ref.key] = link
    _check_names(shelf, links)
    order: list[str] = list(STAGES)
    ordered = sorted(links.values(), key=lambda link: (-order.index(link.stage), link.key))
    root_record = roots[0]
    chosen = _as_release(root_record) if root_record.stage == "register" else None
    return Chain(subject=subject, release=chosen, links=tuple(ordered), photos=_photos(shelf, links.values()))


def note_code(store: Store, call: Call, code: str) -> None:
    """Remember which code made (or tried to make) the output of `call`: outside the digested record, since equal content has equal digests
    whoever makes it. Called by the one who makes, before the output is published; each code that did leaves one note, and `audit` reads them.
    """
    store.put_if_absent(_note_path(call.subject, call.stage, call.key, code), code.encode())


def note_base(store: Store, base: BaseRef) -> None:
    """Remember which files a base digest stands for, so that `audit` finds a base by one of its files. The records hold the digest alone."""
    store.put_if_absent(f"bases/{base.digest}.json", digest.canonical(base.plain()))


def audit(store: Store, *, photo: str | None = None, base: str | None = None, code: str | None = None) -> list[Release]:
    """Releases of any Subject that were made from this photo, on this base, or by this code; sorted by model and version.

    Args:
        store: all subjects' stages are scanned.
        photo: sha256 of the pixels as stored, of the file as it was given, or of the Photo record.
        base: digest of the BaseRef, or sha256 of one of its files (of a base that `note_base` has seen).
        code: a code version as `code_version` writes it, or a commit of which it holds at least the first 7 digits.

    Raises:
        RecipeError: unless exactly one of the three is given and has the form of what it should be.
    """
    given = {name: value for name, value in {"photo": photo, "base": base, "code": code}.items() if value is not None}
    if len(given) != 1:
        raise RecipeError(f"{len(given)} of photo, base, code are given, exactly one is needed")
    if code is None:
        _check_digest(*next(iter(given.items())))
    elif len(code) < 7:
        raise RecipeError(f"code {code!r} is too short: a code version or at least 7 digits of a commit are needed")
    bases: set[str] = set() if base is None else _bases_with(store, base)
    touched: dict[tuple[str, int], Release] = {}
    for subject in sorted({key.split("/")[1] for key in store.list("subjects/") if key.count("/") > 1}):
        if store.get(tombstone_key(subject)) is not None:
            continue                                   # being erased
        shelf = _Shelf(store, subject)
        guilty = {p.key for p in shelf.all() if _concerns(shelf, p, photo=photo, bases=bases, code=code)}
        for published in shelf.all("register"):
            if guilty & shelf.ancestry(published):
                release = _as_release(published)
                if release is not None:
                    touched[release.model, release.version] = release
    return [touched[name] for name in sorted(touched)]


def attempts(store: Store, subject: str) -> tuple[dict[str, frozenset[str]], set[str]]:
    """Every published record of train, sample and judge by its key in the store, with the keys of the blobs that it names; and which of them Releases were made of."""
    shelf = _Shelf(store, subject)
    made_of = {key for published in shelf.all("register") for key in shelf.ancestry(published)}
    every = {shelf.path(p.stage, p.key): p for stage in ("train", "sample", "judge") for p in shelf.all(stage)}
    return {path: frozenset(b.key for b in blobs(p.output)) for path, p in every.items()}, {path for path, p in every.items() if p.key in made_of}


def notes_of(store: Store, record: str) -> list[str]:
    """Keys of the notes of `note_code` beside a stage's record, by that record's key in the store."""
    _, subject, _, stage, name = record.split("/")
    return list(store.list(f"subjects/{subject}/code/{stage}/{name.removesuffix('.json')}/"))


def check_subject(subject: str) -> str:
    """`subject`, if it is a subject's id; raises InputError otherwise."""
    try:
        return _SUBJECT.validate_python(subject)
    except ValidationError:
        raise InputError(f"{subject[:80]!r} is no subject id: small letters, digits, - and _ are needed, up to 63, the first a letter or digit") from None


@dataclass
class _Shelf:
    """Published records of one subject, each read once."""

    store: Store
    subject: str
    _read: dict[str, Published | None] = field(default_factory=dict)

    def path(self, stage: str, key: str) -> str:
        return f"subjects/{self.subject}/stages/{stage}/{key}.json"

    def load(self, path: str) -> Published | None:
        """What is published at this path; None if it is absent, still being made, or no record at all."""
        if path not in self._read:
            data = self.store.get(path)
            try:
                self._read[path] = None if data is None else Published.model_validate_json(data)
            except ValidationError:
                self._read[path] = None
        return self._read[path]

    def read(self, ref: StageRef) -> Published | None:
        return self.load(self.path(ref.stage, ref.key))

    def all(self, stage: str | None = None) -> Iterator[Published]:
        folder = f"subjects/{self.subject}/stages/" + (f"{stage}/" if stage else "")
        for path in self.store.list(folder):
            published = self.load(path)
            if published is not None:
                yield published

    def ancestry(self, published: Published) -> set[str]:
        """Keys of this record and of everything it was made from."""
        seen: set[str] = set()
        waiting = [published]
        while waiting:
            current = waiting.pop()
            if current.key in seen:
                continue
            seen.add(current.key)
            for ref in current.inputs:
                found = self.read(ref)
                if found is None:
                    seen.add(ref.key)              # removed: what is known of it is its key
                else:
                    waiting.append(found)
        return seen


def _roots(shelf: _Shelf, start: Release | StageRef | int | None) -> list[Published]:
    if isinstance(start, StageRef):
        published = shelf.read(start)
        if published is None:
            raise InputError(f"{start.stage} {start.key[:12]}... of {shelf.subject} is not published: run the same command again to make it")
        return [published]
    registered = [(r, p) for p in shelf.all("register") if (r := _as_release(p)) is not None]
    if start is not None:
        version = start if isinstance(start, int) else start.version
        found = [p for r, p in registered if r.version == version and (isinstance(start, int) or r == start)]
        if not found:
            known = ", ".join(str(r.version) for r, _ in sorted(registered, key=lambda item: item[0].version)) or "none"
            raise InputError(f"{shelf.subject} has no release {version}, known versions: {known}")
        return found[:1]
    if registered:
        return [max(registered, key=lambda item: (item[0].version, item[1].key))[1]]
    for stage in reversed(list(STAGES)):
        if reached := list(shelf.all(stage)):
            return reached
    raise InputError(f"nothing is published for {shelf.subject}: `likeness run PHOTOS --subject {shelf.subject} --class ...` makes it")


def _verify(shelf: _Shelf, ref: StageRef, held: Published | None) -> Link:
    published = shelf.read(ref) if held is None else held
    if published is None:
        there = shelf.store.get(shelf.path(ref.stage, ref.key)) is not None
        return Link(ref.stage, ref.key, ref.digest, (), ("the record is not readable" if there else "the record is not in the store",))
    faults = published.faults()
    if (published.stage, published.key) != (ref.stage, ref.key):
        faults.append(f"the record is of {published.stage} {published.key[:12]}...")
    if published.digest != ref.digest:
        faults.append(f"the record has digest {published.digest[:12]}..., a later stage was given {ref.digest[:12]}...")
    for blob in blobs(published.output):
        try:
            read_blob(shelf.store, blob)
        except DigestMismatch as e:
            faults.append(e.message)
    return Link(ref.stage, ref.key, published.digest, published.inputs, tuple(faults))


def _check_names(shelf: _Shelf, links: dict[tuple[str, str], Link]) -> None:
    """What an output says it was made from must be what the chain says."""
    for (stage, key), link in list(links.items()):
        published = shelf.load(shelf.path(stage, key))
        for name, maker in _NAMES.get(stage, {}).items():
            if published is None or stage != published.stage:
                continue
            before = shelf.ancestry(published)
            made = {p.digest for p in links.values() if p.stage == maker and p.key in before}
            # judge publishes its Verdict together with what was measured, under the name the Release gives it
            made |= {digest.of_json(p.output[name]) for p in shelf.all(maker) if p.key in before and isinstance(p.output.get(name), dict)}
            if published.output.get(name) not in made:
                fault = f"its {name} is not what {maker} made"
                links[stage, key] = Link(link.stage, link.key, link.digest, link.inputs, (*link.faults, fault))


def blobs(plain: Any) -> Iterator[BlobRef]:
    """Every BlobRef inside plain data, whatever record it is part of."""
    if isinstance(plain, dict):
        if plain.keys() == BlobRef.model_fields.keys():
            yield BlobRef.model_validate(plain)
        else:
            for value in plain.values():
                yield from blobs(value)
    elif isinstance(plain, list | tuple):
        for value in plain:
            yield from blobs(value)


def _photos(shelf: _Shelf, links: Any) -> tuple[str, ...]:
    """sha256 of each photo that ingest handed on, in its order."""
    found: dict[str, None] = {}
    for link in links:
        published = shelf.load(shelf.path(link.stage, link.key)) if link.stage == "ingest" else None
        for photo in published.output.get("photos", []) if published else []:
            found[photo["sha256"]] = None
    return tuple(found)


def _as_release(published: Published) -> Release | None:
    try:
        return Release.read(json.dumps(published.output))
    except ValidationError:
        log.warning("%s of register holds no Release", published.key[:12])
        return None


def _concerns(shelf: _Shelf, published: Published, *, photo: str | None, bases: set[str], code: str | None) -> bool:
    if photo is not None:
        pictures = published.output.get("photos", []) if published.stage == "ingest" else []
        return any(photo in (p["sha256"], p["source_sha256"], digest.of_json(p)) for p in pictures)
    if code is None:
        # The base is a parameter of several stages: training, sampling
        return any(_holds(published.params, base) or _holds(published.output, base) for base in bases)
    folder = f"subjects/{shelf.subject}/code/{published.stage}/{published.key}/"
    return any(_same_code(note.decode(), code) for path in shelf.store.list(folder) if (note := shelf.store.get(path)) is not None)


def _bases_with(store: Store, wanted: str) -> set[str]:
    """Digests of the bases that are `wanted` or have a file that is."""
    found = {wanted}
    for path in store.list("bases/"):
        data = store.get(path)
        base = None if data is None else BaseRef.read(data)
        if base is not None and wanted in base.files.values():
            found.add(base.digest)
    return found


def _holds(plain: Any, wanted: str) -> bool:
    if isinstance(plain, dict):
        return any(_holds(value, wanted) for value in plain.values())
    if isinstance(plain, list | tuple):
        return any(_holds(value, wanted) for value in plain)
    return bool(plain == wanted)


def _same_code(noted: str, wanted: str) -> bool:
    return noted == wanted or noted.partition("+g")[2].partition(".")[0].startswith(wanted)


def _note_path(subject: str, stage: str, key: str, code: str) -> str:
    return f"subjects/{subject}/code/{stage}/{key}/{digest.of_json(code)[:16]}.txt"


def _check_digest(what: str, value: str) -> None:
    try:
        _DIGEST.validate_python(value)
    except ValidationError:
        raise RecipeError(f"{what} {value[:80]!r} is no digest: 64 hexadecimal digits are needed, as `likeness lineage` prints them") from None
