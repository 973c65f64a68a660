"""One contract for every Store, and what only a folder can get wrong."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from likeness.errors import DigestMismatch, InputError, LikenessError, RecipeError
from likeness.records import BlobRef
from likeness.store import LocalStore, MemoryStore, Store, delete_prefix, put_blob, read_blob


@pytest.fixture(params=["local", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        from likeness.s3 import S3Store

        return S3Store(request.getfixturevalue("s3").bucket(prefix="below/"))
    return LocalStore(tmp_path / "store") if request.param == "local" else MemoryStore()


# -- the contract

def test_absent_is_none(store: Store) -> None:
    assert store.get("a/b") is None
    assert list(store.list("")) == []


def test_first_writer_wins(store: Store) -> None:
    assert store.put_if_absent("a/b", b"one")
    assert not store.put_if_absent("a/b", b"two")
    assert store.get("a/b") == b"one"


@pytest.mark.parametrize("data", [b"", b"\x00" * 3, os.urandom(1 << 20)], ids=["empty", "zeros", "1 MiB"])
def test_bytes_come_back(store: Store, data: bytes) -> None:
    store.put_if_absent("x", data)
    assert store.get("x") == data


def test_swap_only_from_what_is_expected(store: Store) -> None:
    assert not store.compare_and_swap("k", expected=b"", new=b"new")           # absent is not empty
    assert store.get("k") is None
    store.put_if_absent("k", b"old")
    assert not store.compare_and_swap("k", expected=b"other", new=b"new")
    assert store.get("k") == b"old"
    assert store.compare_and_swap("k", expected=b"old", new=b"new")
    assert store.get("k") == b"new"


def test_deleted_is_absent_and_can_be_made_again(store: Store) -> None:
    store.put_if_absent("a/b/c", b"1")
    store.delete("a/b/c")
    store.delete("a/b/c")
    assert store.get("a/b/c") is None
    assert not store.compare_and_swap("a/b/c", expected=b"1", new=b"2")
    assert store.put_if_absent("a/b/c", b"3")


def test_list_is_sorted_by_key_and_stays_inside_the_folder(store: Store) -> None:
    # sorted folder by folder, "a/b" would come before "a-b" and "a.b"
    keys = ["a/b", "a-b", "a.b", "a/b-c/d", "a/b.c", "z", "A"]
    for key in keys:
        store.put_if_absent(key, b"")
    assert list(store.list("")) == sorted(keys)
    assert list(store.list("a/")) == ["a/b", "a/b-c/d", "a/b.c"]
    assert list(store.list("none/")) == []


@pytest.mark.parametrize("key", ["", "/", "/etc/passwd", "a//b", "a/", "../a", "a/../b", "a/./b", ".", "..", ".tmp/x", "a/.hidden", "a\\b", "a b",
                                 "ä", "a\x00", "a\n", "x" * 513])
def test_what_is_no_key_is_refused_by_every_verb(store: Store, key: str) -> None:
    for verb in (lambda: store.get(key), lambda: store.put_if_absent(key, b""), lambda: store.delete(key),
                 lambda: store.compare_and_swap(key, expected=b"", new=b"")):
        with pytest.raises(RecipeError, match="is no key"):
            verb()


@pytest.mark.parametrize("prefix", ["subjects/ada", "/", "../", "a//"])
def test_what_is_no_folder_is_not_listed(store: Store, prefix: str) -> None:
    with pytest.raises(RecipeError, match=r"is no (prefix|key)"):
        store.list(prefix)


def test_one_of_many_threads_creates_and_no_swap_is_lost(store: Store) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(lambda n: store.put_if_absent("counter", b"0"), range(16))) == 1

        def count(_: int) -> None:
            for _ in range(5):
                while True:
                    old = store.get("counter")
                    assert old is not None
                    if store.compare_and_swap("counter", expected=old, new=b"%d" % (int(old) + 1)):
                        break
        list(pool.map(count, range(8)))
    assert store.get("counter") == b"40"


# -- blobs

def test_a_blob_is_named_by_its_content(store: Store) -> None:
    ref = put_blob(store, "subjects/ada/photos", b"pixels", media="image/png")
    assert ref == put_blob(store, "subjects/ada/photos", b"pixels", media="image/png")
    assert ref.key == f"subjects/ada/photos/{ref.sha256}.png"
    assert list(store.list("")) == [ref.key]
    assert read_blob(store, ref) == b"pixels"


@pytest.mark.parametrize(("found", "words"), [(None, "not in the store"), (b"pixel", "has 5 bytes, 6 needed"), (b"PIXELS", "has sha256")],
                         ids=["absent", "truncated", "changed"])
def test_a_damaged_blob_is_not_read(store: Store, found: bytes | None, words: str) -> None:
    ref = put_blob(store, "f", b"pixels", media="image/png")
    store.delete(ref.key)
    if found is not None:
        store.put_if_absent(ref.key, found)
    with pytest.raises(DigestMismatch, match=words) as caught:
        read_blob(store, ref)
    assert "restore" in caught.value.message


def test_storing_again_repairs_a_damaged_blob(store: Store) -> None:
    ref = put_blob(store, "f", b"pixels", media="image/png")
    store.compare_and_swap(ref.key, expected=b"pixels", new=b"pix")
    assert put_blob(store, "f", b"pixels", media="image/png") == ref
    assert read_blob(store, ref) == b"pixels"


def test_unknown_media_are_not_stored(store: Store) -> None:
    with pytest.raises(RecipeError, match="application/x-python-pickle"):
        put_blob(store, "f", b"", media="application/x-python-pickle")


def test_erasing_a_person_erases_nobody_else(store: Store) -> None:
    for key in ("subjects/ada/photos/1", "subjects/ada/stages/crop/2", "subjects/ada2/photos/1", "subjects/ad/photos/1", "tombstones/ada"):
        store.put_if_absent(key, b"")
    assert delete_prefix(store, "subjects/ada/") == 2
    assert list(store.list("")) == ["subjects/ad/photos/1", "subjects/ada2/photos/1", "tombstones/ada"]
    assert delete_prefix(store, "subjects/ada/") == 0


@pytest.mark.parametrize("prefix", ["", "subjects/ada"])
def test_erasing_needs_a_folder(store: Store, prefix: str) -> None:
    store.put_if_absent("subjects/ada2", b"")
    with pytest.raises(RecipeError):
        delete_prefix(store, prefix)
    assert list(store.list("")) == ["subjects/ada2"]


# -- a folder

RACE = """
import sys
from pathlib import Path
from likeness.store import LocalStore
store, me = LocalStore(Path(sys.argv[1])), sys.argv[2].encode()
print("ready", flush=True); sys.stdin.readline()
created = sum(store.put_if_absent(f"race/{n}", me) for n in range(40))
swapped = 0
for n in range(30):
    while True:
        old = store.get("counter")
        if store.compare_and_swap("counter", expected=old, new=b"%d" % (int(old) + 1)):
            swapped += 1
            break
for n in range(60):                       # a folder that comes and goes under everybody's feet
    store.put_if_absent(f"busy/deep/{me.decode()}-{n}", b"x"); store.delete(f"busy/deep/{me.decode()}-{n}")
print(created, swapped)
"""


@pytest.fixture
def folder(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def _temporary_files(store: LocalStore) -> list[Path]:
    return list((store.root / ".tmp").iterdir())


def test_racing_processes_create_once_and_lose_no_swap(folder: LocalStore, root: Path) -> None:
    folder.put_if_absent("counter", b"0")
    racers = [subprocess.Popen([sys.executable, "-c", RACE, str(folder.root), str(n)], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True) for n in range(4)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    scores = [racer.communicate(timeout=60)[0].split() for racer in racers]
    assert [racer.returncode for racer in racers] == [0] * 4
    assert sum(int(created) for created, _ in scores) == 40
    assert folder.get("counter") == b"120"
    assert _temporary_files(folder) == []
    assert list(folder.list("busy/")) == []


def test_a_folder_made_and_removed_by_others_between_two_looks_is_made_again(folder: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, lost = Path.mkdir, []

    def lose_the_first_race(self: Path, *arguments: object, **named: object) -> None:
        if self.name == "busy" and not lost:
            lost.append(self)
            raise FileExistsError(17, "File exists", str(self))      # another process made it, and `delete` removed it at once
        real(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", lose_the_first_race)
    assert folder.put_if_absent("busy/deep/a", b"x")
    assert folder.get("busy/deep/a") == b"x"
    assert lost


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_what_is_no_folder_is_named_not_waited_for(folder: LocalStore, kind: str) -> None:
    folder.put_if_absent("a", b"")
    obstacle = folder.root / "busy"
    obstacle.write_bytes(b"") if kind == "file" else obstacle.symlink_to("nowhere")
    with pytest.raises(InputError):
        folder.put_if_absent("busy/deep/a", b"x")


def test_reading_creates_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    assert store.get("a/b") is None
    assert list(store.list("")) == []
    store.delete("a/b")
    assert not (tmp_path / "store").exists()


def test_left_overs_of_a_crash_are_invisible_and_swept_those_in_use_stay(folder: LocalStore) -> None:
    with folder._temporary(b"in use") as living:
        left = folder.root / ".tmp" / "left-over"
        left.write_bytes(b"half")
        other = LocalStore(folder.root)
        assert list(other.list("")) == []
        other.put_if_absent("a", b"")
        assert not left.exists()
        assert living.read_bytes() == b"in use"
    assert _temporary_files(folder) == []


CRASH = """
import os, sys
from pathlib import Path
import likeness.store as module
store = module.LocalStore(Path(sys.argv[1]))
verb, moment = sys.argv[2], sys.argv[3]
def die(*arguments, **named): os.kill(os.getpid(), 9)
setattr(os, moment, die)
store.put_if_absent("new", b"N" * 100) if verb == "put" else store.compare_and_swap("old", expected=b"O" * 100, new=b"N" * 100)
"""


@pytest.mark.parametrize(("verb", "moment"), [("put", "fsync"), ("put", "link"), ("swap", "fsync"), ("swap", "replace")])
def test_killed_at_any_moment_the_old_or_the_new_is_there_whole(folder: LocalStore, root: Path, verb: str, moment: str) -> None:
    folder.put_if_absent("old", b"O" * 100)
    folder.compare_and_swap("old", expected=b"O" * 100, new=b"O" * 100)      # so that the folder of locks is there
    done = subprocess.run([sys.executable, "-c", CRASH, str(folder.root), verb, moment], cwd=root, check=False)
    assert done.returncode == -9
    assert len(_temporary_files(folder)) == 1
    after = LocalStore(folder.root)
    assert after.get("old") == b"O" * 100
    assert after.get("new") is None
    assert list(after.list("")) == ["old"]
    assert after.put_if_absent("new", b"N" * 100)
    assert after.compare_and_swap("old", expected=b"O" * 100, new=b"N" * 100)          # no lock outlives its process
    assert _temporary_files(after) == []


def test_a_reader_never_sees_half_a_swap(folder: LocalStore) -> None:
    sides = [bytes([n]) * 200_000 for n in (1, 2)]
    folder.put_if_absent("k", sides[0])
    stop = threading.Event()
    torn = []

    def read() -> None:
        while not stop.is_set():
            if folder.get("k") not in sides:
                torn.append(1)
    reader = threading.Thread(target=read)
    reader.start()
    until = time.monotonic() + 0.5
    turn = 0
    while time.monotonic() < until:
        assert folder.compare_and_swap("k", expected=sides[turn], new=sides[turn := 1 - turn])
    stop.set()
    reader.join()
    assert torn == []


def test_only_the_owner_may_look(folder: LocalStore) -> None:
    folder.put_if_absent("subjects/ada/photos/1", b"face")
    for path in [folder.root, *folder.root.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_an_erased_person_leaves_no_folder(folder: LocalStore) -> None:
    folder.put_if_absent("subjects/ada/photos/1", b"face")
    delete_prefix(folder, "subjects/ada/")
    assert not (folder.root / "subjects").exists()


def test_a_folder_that_cannot_be_read_does_not_pass_for_empty(folder: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.put_if_absent("subjects/ada/photos/1", b"face")

    def refuse(path: object) -> object:          # root may read everything, so the system is made to refuse
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match="listing subjects/ada/"):
        delete_prefix(folder, "subjects/ada/")


def test_a_file_where_a_folder_is_needed_is_told(folder: LocalStore) -> None:
    folder.put_if_absent("a", b"")
    assert folder.get("a/b") is None
    with pytest.raises(InputError, match="writing a/b"):
        folder.put_if_absent("a/b", b"")


@pytest.fixture
def no_room(folder: LocalStore) -> Iterator[LocalStore]:
    resource = pytest.importorskip("resource")
    import signal

    folder.put_if_absent("before", b"b")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_what_does_not_fit_is_not_half_there(no_room: LocalStore) -> None:
    with pytest.raises(LikenessError, match="writing big"):
        no_room.put_if_absent("big", b"x" * 4096)
    with pytest.raises(LikenessError, match="changing before"):
        no_room.compare_and_swap("before", expected=b"b", new=b"x" * 4096)
    assert list(no_room.list("")) == ["before"]
    assert no_room.get("before") == b"b"
    assert _temporary_files(no_room) == []


def test_a_ref_to_another_place_is_checked_like_any_key(store: Store) -> None:
    with pytest.raises(RecipeError, match="is no key"):
        read_blob(store, BlobRef(key="../../etc/passwd", sha256="0" * 64, size=0, media="text/plain"))
