"""Where photos come from: a folder, a zip archive, or a prefix of the Store. All three answer in one way, and none can lead outside itself.

A source lists entries; nothing is read until an entry is asked for its bytes. What may not be read is refused by name, so that one hostile
entry never stops the good ones.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from likeness.errors import InputError, translated
from likeness.intake.policy import IntakePolicy
from likeness.intake.reasons import Refusal
from likeness.store import Store, check_prefix

STORE_SCHEME = "store:"
PHOTO_ENDINGS = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".heic", ".heif", ".avif", ".tif", ".tiff", ".bmp"}
MAX_DIRECTORY_BYTES = 2 * 2**20         # of a zip's table of contents: about 20,000 names
NO_FILE = "this is no ordinary file: copy the photo itself into the folder"


@dataclass(frozen=True)
class Entry:
    """One file of a source. `name` is printable: relative, with "/" between folders, undecodable bytes as \\xNN."""

    name: str
    read: Callable[[], bytes | Refusal] = field(repr=False)


class Source(Protocol):
    """A place that holds photos of one person."""

    def entries(self) -> list[Entry]:
        """Every entry, in a stable order."""


def open_source(where: str, *, store: Store, policy: IntakePolicy) -> Source:
    """The source that `where` names: a folder, a .zip file, or "store:PREFIX/".

    Raises:
        InputError: if there is nothing of that name.
    """
    if where.startswith(STORE_SCHEME):
        return StorePrefix(store, where.removeprefix(STORE_SCHEME), policy)
    path = Path(where)
    if path.is_dir():
        return Folder(path, policy)
    if path.is_file() and zipfile.is_zipfile(path):
        return ZipArchive(path, policy)
    raise InputError("the source of photos is neither a folder nor a zip archive: name a folder or a .zip that holds photos of one person, "
                     f"or {STORE_SCHEME}PREFIX/ for photos in the store")


def sidecars(entries: list[Entry]) -> Mapping[str, Entry]:
    """For each name, the .txt entry beside it that holds its caption, if there is one."""
    by_name = {e.name: e for e in entries}
    stems = {name: f"{os.path.splitext(name)[0]}.txt" for name in by_name}
    return {name: by_name[words] for name, words in stems.items() if words in by_name and words != name}


# -- a folder

@dataclass(frozen=True)
class Folder:
    """A folder and those below it. Links are named, never followed; pipes, sockets and devices are never opened."""

    root: Path
    policy: IntakePolicy

    def entries(self) -> list[Entry]:
        """See Source; folders that are named like photos, and links to folders, are entries too, so that nobody wonders where they went."""
        found = []
        for at, folders, files in os.walk(self.root, followlinks=False):
            folders.sort()
            odd = [f for f in folders if os.path.islink(os.path.join(at, f)) or os.path.splitext(f)[1].lower() in PHOTO_ENDINGS]
            for name in sorted([*files, *odd]):
                path = os.path.join(at, name)
                relative = os.path.relpath(path, self.root).replace(os.sep, "/")
                found.append(Entry(os.fsencode(relative).decode("utf-8", "backslashreplace"), lambda path=path: read_file(path, self.policy)))  # type: ignore[misc]
        return found


def read_file(path: str, policy: IntakePolicy) -> bytes | Refusal:
    """The bytes of a regular file within the size limit, opened so that neither a link nor a pipe can catch us."""
    try:
        before = os.lstat(path)
        if stat.S_ISDIR(before.st_mode):
            return Refusal("not_a_regular_file", "a folder named like a photo: not counted, what lies in it is judged", ignored=True)
        if stat.S_ISREG(before.st_mode) and not before.st_mode & 0o444:      # root may read it all the same: its owner meant nobody to
            return Refusal("unreadable", "the file may not be read: check its permissions")
        if not stat.S_ISREG(before.st_mode):
            return Refusal("not_a_regular_file", NO_FILE)
        if before.st_size > policy.max_file_bytes:
            return _too_large(before.st_size, policy)
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return Refusal("not_a_regular_file", NO_FILE)
            data = file.read(policy.max_file_bytes + 1)
    except OSError:
        return Refusal("unreadable", "the file may not be read: check its permissions")
    return _too_large(len(data), policy) if len(data) > policy.max_file_bytes else data


def _too_large(size: int, policy: IntakePolicy) -> Refusal:
    return Refusal("too_large_bytes", f"{size / 1e6:.0f} MB, at most {policy.max_file_bytes / 1e6:.0f} MB are read: export the photo as JPEG")


# -- a zip archive

@dataclass(frozen=True)
class ZipArchive:
    """A zip archive, read member by member and never unpacked to disk.

    Refused by name: members that lead outside, links, encrypted ones, ones in other compressions than deflate, and everything after
    `max_zip_unpacked_bytes` have really been unpacked, whatever the headers declare. An archive inside the archive is no photo.
    """

    path: Path
    policy: IntakePolicy
    _spent: list[int] = field(default_factory=lambda: [0])

    def entries(self) -> list[Entry]:
        """See Source.

        Raises:
            InputError: if the archive is too large, or damaged as a whole.
        """
        self._spent[0] = 0
        with self._opened() as archive:
            infos = archive.infolist()
        seen: dict[str, int] = {}
        entries = []
        for number, info in sorted(enumerate(infos), key=lambda pair: (pair[1].filename, pair[0])):
            if info.filename.endswith("/"):
                continue
            name = info.filename.encode("utf-8", "backslashreplace").decode() or "(no name)"
            seen[name] = seen.get(name, 0) + 1
            shown = name if seen[name] == 1 else f"{name} ({seen[name]})"       # two members of one name are two files
            entries.append(Entry(shown, lambda number=number: self._read(number)))  # type: ignore[misc]
        return entries

    @contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        with translated("reading the zip archive"), self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > self.policy.max_zip_bytes:
                raise InputError(f"the zip archive has {size / 1e6:.0f} MB, at most {self.policy.max_zip_bytes / 1e6:.0f} MB are read: "
                                 "unpack it and name the folder")
            if _directory_bytes(file, size) > MAX_DIRECTORY_BYTES:
                raise InputError("the zip archive lists far more files than photos of one person: pack the photos alone")
            try:
                with zipfile.ZipFile(file) as archive:
                    yield archive
            except (zipfile.BadZipFile, struct.error, UnicodeError, ValueError, NotImplementedError) as e:
                raise InputError("the zip archive is damaged: pack the photos again, or name a folder") from e

    def _read(self, number: int) -> bytes | Refusal:
        with self._opened() as archive:
            info = archive.infolist()[number]
            if (refusal := _unsafe_member(info, self.policy)) is not None:
                return refusal
            left = min(self.policy.max_file_bytes + 1, self.policy.max_zip_unpacked_bytes - self._spent[0])
            try:
                with archive.open(info) as member:
                    data = member.read(max(0, left))       # fewer bytes than asked for: the end, where the checksum was compared
            except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError, RuntimeError):
                return Refusal("corrupt", "this file is damaged inside the archive: pack it again")
            self._spent[0] += len(data)
            if len(data) > self.policy.max_file_bytes:
                return _too_large(len(data), self.policy)
            if len(data) >= left:
                return Refusal("too_large_bytes", f"the archive unpacks to more than {self.policy.max_zip_unpacked_bytes / 1e6:.0f} MB: pack the photos alone")
            return data


def _unsafe_member(info: zipfile.ZipInfo, policy: IntakePolicy) -> Refusal | None:
    # `orig_filename` is what the archive says; zipfile cuts `filename` at a NUL
    name = info.orig_filename.replace("\\", "/")
    parts = name.split("/")
    if not info.filename or "\0" in name or name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name) or len(parts) > policy.max_depth:
        return Refusal("unsafe_path", "its name leads out of the archive: pack the photo under a plain name")
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        return Refusal("not_a_regular_file", "a link or device inside the archive: pack the photo itself")
    if info.flag_bits & 0x1:
        return Refusal("unreadable", "it is encrypted: pack the photo without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return Refusal("unsupported_format", "it is packed in a rare way: pack it as an ordinary zip")
    if info.file_size > policy.max_file_bytes:
        return _too_large(info.file_size, policy)
    return None


def _directory_bytes(file: BinaryIO, size: int) -> int:
    """Length of the table of contents as the end record declares it; a zip64 archive counts as endless."""
    file.seek(max(0, size - 65_557))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise InputError("the zip archive ends too early: copy or download it again")
    length = int(struct.unpack("<I", tail[at + 12:at + 16])[0])
    file.seek(0)
    return length


# -- a prefix of the Store

@dataclass(frozen=True)
class StorePrefix:
    """Objects below a prefix of the Store, e.g. uploads of one subject."""

    store: Store
    prefix: str
    policy: IntakePolicy

    def __post_init__(self) -> None:
        if not self.prefix:
            raise InputError(f"{STORE_SCHEME} needs a prefix: {STORE_SCHEME}uploads/ada/")
        check_prefix(self.prefix)

    def entries(self) -> list[Entry]:
        """See Source."""
        return [Entry(key.removeprefix(self.prefix), lambda key=key: self._read(key)) for key in self.store.list(self.prefix)]  # type: ignore[misc]

    def _read(self, key: str) -> bytes | Refusal:
        data = self.store.get(key)
        if data is None:
            return Refusal("unreadable", "it was removed while the photos were read: run the same command again")
        return _too_large(len(data), self.policy) if len(data) > self.policy.max_file_bytes else data
