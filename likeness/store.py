"""The Store: the one truth. Five verbs on keys and bytes, and content-addressed blobs on top of them.

A key is a relative path of plain segments, "subjects/ada/stages/crop/<key>.json". Creation and change are atomic and exclusive, so that a
claim in the Store is the only lock there is. A prefix is a folder and ends with "/": erasing "subjects/ada/" never touches "subjects/ada2/".
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from likeness import digest
from likeness.errors import DigestMismatch, RecipeError, TransientError, translated
from likeness.records import BlobRef

log = logging.getLogger(__name__)

# A segment may not start with a dot: "." and ".." would leave the folder, and dotted names are the store's own (.tmp, .locks).
_KEY = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*")
_KEY_LENGTH = 512

MEDIA: Mapping[str, str] = {
    "image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "application/json": "json", "text/plain": "txt", "text/html": "html",
    "application/vnd.safetensors": "safetensors", "application/octet-stream": "bin",
}


class Store(Protocol):
    """Bytes under keys, with exclusive creation and change."""

    def get(self, key: str, /) -> bytes | None:
        """The bytes under `key`, or None."""

    def put_if_absent(self, key: str, data: bytes, /) -> bool:
        """Create `key`; False, and nothing changed, if it exists. Durable when it returns."""

    def compare_and_swap(self, key: str, /, *, expected: bytes, new: bytes) -> bool:
        """Replace the bytes of `key` if they are `expected`; False, and nothing changed, if they are not or the key is absent."""

    def list(self, prefix: str, /) -> Iterator[str]:
        """Every key below the folder `prefix` ("" or ending with "/"), sorted by code point."""

    def delete(self, key: str, /) -> None:
        """Remove `key`; an absent key is no error."""


def is_key(key: str) -> bool:
    """Whether `key` may name an object."""
    return len(key) <= _KEY_LENGTH and _KEY.fullmatch(key) is not None


def check_key(key: str) -> str:
    """`key`, if it may name an object.

    Raises:
        RecipeError: on an absolute path, a segment that is empty or starts with a dot, or any character but A-Z a-z 0-9 . _ - /.
    """
    if not is_key(key):
        raise RecipeError(f"{key[:80]!r} is no key: up to {_KEY_LENGTH} characters, segments of A-Z a-z 0-9 . _ - that do not start "
                          "with a dot, separated by single slashes")
    return key


def check_prefix(prefix: str) -> str:
    """`prefix`, if it is "" or a key followed by "/"; raises RecipeError otherwise."""
    if prefix:
        if not prefix.endswith("/"):
            raise RecipeError(f"{prefix[:80]!r} is no prefix: it ends with '/', so that 'subjects/ada' cannot mean 'subjects/ada2' as well")
        check_key(prefix[:-1])
    return prefix


def put_blob(store: Store, folder: str, data: bytes, *, media: str) -> BlobRef:
    """Store `data` below `folder` under its own sha256; storing the same bytes twice is one object.

    A damaged object under that key is repaired: its name says what it must hold.

    Raises:
        RecipeError: if `media` is not in MEDIA, or `folder` is no key.
        TransientError: if another writer changes a damaged object at the same moment.
    """
    if media not in MEDIA:
        raise RecipeError(f"media type {media!r} is not stored, allowed: {', '.join(MEDIA)}")
    sha256 = digest.of_bytes(data)
    key = f"{folder}/{sha256}.{MEDIA[media]}"
    if not store.put_if_absent(key, data):
        found = store.get(key)
        if found != data:
            log.warning("%s holds %s bytes that are not its content; it is repaired", key, "no" if found is None else len(found))
            if not (store.put_if_absent(key, data) if found is None else store.compare_and_swap(key, expected=found, new=data)):
                raise TransientError(f"{key} was changed while it was repaired; the same command may work in a moment")
    return BlobRef(key=key, sha256=sha256, size=len(data), media=media)


def read_blob(store: Store, ref: BlobRef) -> bytes:
    """The bytes of `ref`, verified.

    Raises:
        DigestMismatch: if they are absent, or size or sha256 is not as recorded.
    """
    data = store.get(ref.key)
    cure = (f"restore {ref.key} from a backup, or delete it with the stage record that names it (`likeness lineage` shows which) "
            "and run the same command again")
    if data is None:
        raise DigestMismatch(f"{ref.key} is not in the store, {ref.size} bytes needed: {cure}")
    if len(data) != ref.size:
        raise DigestMismatch(f"{ref.key} has {len(data)} bytes, {ref.size} needed: {cure}")
    if (found := digest.of_bytes(data)) != ref.sha256:
        raise DigestMismatch(f"{ref.key} has sha256 {found[:12]}..., {ref.sha256[:12]}... needed: {cure}")
    return data


def delete_prefix(store: Store, prefix: str) -> int:
    """Delete everything below the folder `prefix`, and what is written there meanwhile; the number of objects deleted.

    Raises:
        RecipeError: if `prefix` is empty or does not end with "/".
        TransientError: if objects keep appearing.
    """
    if not prefix:
        raise RecipeError("the whole store is never deleted: name a folder, ending with '/'")
    count = 0
    for _ in range(10):
        keys = list(store.list(prefix))
        if not keys:
            return count
        for key in keys:
            store.delete(key)
        count += len(keys)
    raise TransientError(f"objects keep appearing below {prefix} while it is deleted: stop what writes there and run the same command again")


class MemoryStore:
    """The fake: a dict under a lock. For contract tests and docs, never a default."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def get(self, key: str, /) -> bytes | None:
        """See Store."""
        return self._objects.get(check_key(key))

    def put_if_absent(self, key: str, data: bytes, /) -> bool:
        """See Store."""
        check_key(key)
        with self._lock:
            if key in self._objects:
                return False
            self._objects[key] = bytes(data)
            return True

    def compare_and_swap(self, key: str, /, *, expected: bytes, new: bytes) -> bool:
        """See Store."""
        check_key(key)
        with self._lock:
            if self._objects.get(key) != expected:
                return False
            self._objects[key] = bytes(new)
            return True

    def list(self, prefix: str, /) -> Iterator[str]:
        """See Store."""
        check_prefix(prefix)
        with self._lock:
            return iter(sorted(k for k in self._objects if k.startswith(prefix)))

    def delete(self, key: str, /) -> None:
        """See Store."""
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)


class LocalStore:
    """A folder. An object is a file; whatever the moment of a crash, it holds all of its old or all of its new bytes.

    Photos lie here: folders are 0700 and files 0600. The folder must be on a file system with hard links and flock.
    """

    def __init__(self, root: Path) -> None:
        """Use the folder `root`, created with the first write."""
        self.root = root
        self._swept = False

    def get(self, key: str, /) -> bytes | None:
        """See Store."""
        path = self.root / check_key(key)
        with translated(f"reading {key}"):
            try:
                return path.read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return None

    def put_if_absent(self, key: str, data: bytes, /) -> bool:
        """See Store."""
        path = self.root / check_key(key)
        with translated(f"writing {key}"):
            if path.exists():
                return False
            with self._temporary(data) as temporary:
                while True:
                    _make_folder(path.parent)
                    try:
                        os.link(temporary, path)     # fails if the name exists: this is what makes creation exclusive
                    except FileExistsError:
                        return False
                    except FileNotFoundError:
                        if not temporary.exists():
                            raise
                        continue                     # `delete` removed the empty folder in between
                    break
            _sync_folder(path.parent)
            return True

    def compare_and_swap(self, key: str, /, *, expected: bytes, new: bytes) -> bool:
        """See Store."""
        path = self.root / check_key(key)
        with translated(f"changing {key}"), self._locked(key):
            if self.get(key) != expected:
                return False
            with self._temporary(new) as temporary:
                os.replace(temporary, path)
            _sync_folder(path.parent)
            return True

    def list(self, prefix: str, /) -> Iterator[str]:
        """See Store."""
        folder = self.root / check_prefix(prefix)
        keys: list[str] = []
        with translated(f"listing {prefix or 'the store'}"):
            for at, folders, files in os.walk(folder, onerror=_unless_gone):
                folders[:] = [f for f in folders if not f.startswith(".")]
                inside = Path(at).relative_to(self.root)
                keys += [(inside / f).as_posix() for f in files if not f.startswith(".")]
        return iter(sorted(keys))

    def delete(self, key: str, /) -> None:
        """See Store. Folders that become empty go too: their names name people."""
        path = self.root / check_key(key)
        if not self.root.exists():
            return
        with translated(f"deleting {key}"), self._locked(key):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return
            folder = path.parent
            _sync_folder(folder)
            while folder != self.root:
                try:
                    folder.rmdir()
                except OSError:
                    return                           # not empty, or gone already: both are fine
                folder = folder.parent
                _sync_folder(folder)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the lock of `key` against other processes and threads; the system drops it when a process dies."""
        folder = self.root / ".locks"
        _make_folder(folder)
        # 64 lock files, never deleted: deleting a lock file under flock is a race that cannot be won
        descriptor = os.open(folder / f"{int(digest.of_bytes(key.encode())[:8], 16) % 64:02d}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
            fcntl.flock(descriptor, fcntl.LOCK_UN)   # a forked child may still hold the descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def _temporary(self, data: bytes) -> Iterator[Path]:
        """A durable file with `data` in the store's own folder, removed afterwards if its name is still there.

        Its flock is held while it is in use; a temporary file that nobody holds is the left-over of a crash.
        """
        folder = self.root / ".tmp"
        _make_folder(folder)
        if not self._swept:
            self._swept = True
            _sweep(folder)
        while True:
            path = folder / secrets.token_hex(16)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                break
            os.close(descriptor)                     # a sweep took it between open and flock
        try:
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(data)
                file.flush()
                os.fsync(descriptor)
            yield path
        finally:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _unless_gone(error: OSError) -> None:
    """A folder that went away while it was listed is empty; one that may not be read must not pass for empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _sweep(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            continue                                 # its writer finished
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            continue                                 # its writer lives
        finally:
            os.close(descriptor)


def _make_folder(folder: Path) -> None:
    while not folder.is_dir():
        _make_folder(folder.parent)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            try:
                made = folder.stat()
            except FileNotFoundError:
                if folder.is_symlink():              # it dangles: mkdir will never succeed here
                    raise
                continue                             # another process made it and `delete` removed it again, both since we looked
            if not stat.S_ISDIR(made.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "a file is where a folder is needed") from None
        except FileNotFoundError:
            continue                                 # `delete` removed the empty parent in between
        _sync_folder(folder.parent)
        return


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return                                       # deleted since: nothing to make durable
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
