"""Sources of photos: what is listed, what is read, and what no archive, name or link can make them do."""

from __future__ import annotations

import io
import os
import stat
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from likeness.errors import InputError, LikenessError, RecipeError
from likeness.intake.policy import IntakePolicy
from likeness.intake.reasons import Refusal
from likeness.intake.sources import Folder, Source, StorePrefix, ZipArchive, open_source, sidecars
from likeness.store import LocalStore, MemoryStore, Store

POLICY = IntakePolicy(max_file_bytes=4096, max_zip_unpacked_bytes=8192)


def read(source: Source) -> dict[str, bytes | str]:
    """Bytes of each entry, or the reason why there are none."""
    return {e.name: (data.reason if isinstance(data := e.read(), Refusal) else data) for e in source.entries()}


def archive(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], compression: int = zipfile.ZIP_DEFLATED) -> ZipArchive:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members:
            file.writestr(name, data)
    return ZipArchive(path, POLICY)


def fill(kind: str, tmp_path: Path) -> Source:
    members = {"a.jpg": b"A", "a.txt": b"in a park", "trip/b.jpg": b"B"}
    if kind == "zip":
        return archive(tmp_path / "photos.zip", *members.items())
    if kind == "folder":
        for name, data in members.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(data)
        return Folder(tmp_path, POLICY)
    store: Store = MemoryStore() if kind == "memory store" else LocalStore(tmp_path)
    for name, data in members.items():
        store.put_if_absent(f"uploads/ada/{name}", data)
    store.put_if_absent("uploads/ada2/c.jpg", b"C")
    return StorePrefix(store, "uploads/ada/", POLICY)


@pytest.mark.parametrize("kind", ["folder", "zip", "store", "memory store"])
def test_every_source_answers_alike(kind: str, tmp_path: Path) -> None:
    source = fill(kind, tmp_path)
    assert read(source) == {"a.jpg": b"A", "a.txt": b"in a park", "trip/b.jpg": b"B"}
    assert read(source) == read(source)                       # asked twice: for the digest, and to judge
    beside = sidecars(source.entries())
    assert list(beside) == ["a.jpg"]
    assert beside["a.jpg"].read() == b"in a park"


def test_what_a_source_is_called(tmp_path: Path) -> None:
    store = MemoryStore()
    archive(tmp_path / "photos.ZIP", ("a.jpg", b"A"))
    assert isinstance(open_source(str(tmp_path), store=store, policy=POLICY), Folder)
    assert isinstance(open_source(str(tmp_path / "photos.ZIP"), store=store, policy=POLICY), ZipArchive)
    assert isinstance(open_source("store:uploads/ada/", store=store, policy=POLICY), StorePrefix)
    (tmp_path / "words.zip").write_bytes(b"PK no archive")
    for nothing in ("words.zip", "gone", "gone.zip"):
        with pytest.raises(InputError, match="neither a folder nor a zip"):
            open_source(str(tmp_path / nothing), store=store, policy=POLICY)


@pytest.mark.parametrize("prefix", ["", "uploads/ada", "../", "/", "uploads//ada/", "uploads/../users/"])
def test_a_prefix_ends_with_a_slash_and_leads_nowhere_else(prefix: str) -> None:
    with pytest.raises(LikenessError) as caught:
        open_source(f"store:{prefix}", store=MemoryStore(), policy=POLICY)
    assert isinstance(caught.value, InputError | RecipeError)


def member(name: str, **fields: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    for key, value in fields.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(("info", "data", "reason"), [
    (member("../evil.jpg"), b"A", "unsafe_path"),
    (member("a/../../evil.jpg"), b"A", "unsafe_path"),
    (member("/etc/passwd.jpg"), b"A", "unsafe_path"),
    (member("..\\..\\windows\\evil.jpg"), b"A", "unsafe_path"),
    (member("C:\\evil.jpg"), b"A", "unsafe_path"),
    (member(""), b"A", "unsafe_path"),
    (member("\0.jpg"), b"A", "unsafe_path"),
    (member("/".join(["d"] * 300) + "/deep.jpg"), b"A", "unsafe_path"),
    (member("link.jpg", external_attr=(stat.S_IFLNK | 0o777) << 16), b"/etc/passwd", "not_a_regular_file"),
    (member("pipe.jpg", external_attr=(stat.S_IFIFO | 0o666) << 16), b"", "not_a_regular_file"),
    (member("large.jpg"), bytes(4097), "too_large_bytes"),
    (member("rare.jpg", compress_type=zipfile.ZIP_LZMA), b"A", "unsupported_format"),
    (member("rare2.jpg", compress_type=zipfile.ZIP_BZIP2), b"A", "unsupported_format"),
], ids=["up", "up inside", "absolute", "backslashes", "drive", "no name", "NUL", "deep", "link", "pipe", "large", "lzma", "bzip2"])
def test_a_hostile_member_is_refused_by_name_and_the_good_one_is_read(info: zipfile.ZipInfo, data: bytes, reason: str, tmp_path: Path) -> None:
    found = read(archive(tmp_path / "photos.zip", (info, data), ("good.jpg", b"G")))
    assert found.pop("good.jpg") == b"G"
    assert list(found.values()) == [reason]
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["photos.zip"]        # nothing was unpacked to disk


def lie(path: Path, *, declared: int) -> None:
    """Make both headers of the only member declare another size."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at:at + 4] = struct.pack("<I", declared)
    path.write_bytes(data)


def test_a_member_that_unpacks_to_more_than_it_declares_is_cut_off(tmp_path: Path) -> None:
    source = archive(tmp_path / "photos.zip", ("bomb.jpg", bytes(50_000_000)))
    assert (tmp_path / "photos.zip").stat().st_size < 60_000
    lie(source.path, declared=10)
    assert read(source)["bomb.jpg"] in ("corrupt", "too_large_bytes")


def test_the_whole_archive_has_a_budget_of_really_unpacked_bytes(tmp_path: Path) -> None:
    source = archive(tmp_path / "photos.zip", *[(f"{i}.jpg", bytes([i]) * 3000) for i in range(5)])
    for _ in range(2):                                        # each listing begins anew
        kinds = [d if isinstance(d, str) else "read" for d in read(source).values()]
        assert kinds == ["read", "read", "too_large_bytes", "too_large_bytes", "too_large_bytes"]


def test_two_members_of_one_name_are_two_files(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        source = archive(tmp_path / "photos.zip", ("a.jpg", b"A"), ("a.jpg", b"B"))
    assert read(source) == {"a.jpg": b"A", "a.jpg (2)": b"B"}


def test_an_encrypted_member_asks_for_no_password(tmp_path: Path) -> None:
    source = archive(tmp_path / "photos.zip", ("a.jpg", b"A"), compression=zipfile.ZIP_STORED)
    data = bytearray(source.path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    source.path.write_bytes(data)
    assert read(source) == {"a.jpg": "unreadable"}


def test_an_archive_that_is_too_large_or_lists_too_much_is_refused_as_a_whole(tmp_path: Path) -> None:
    source = archive(tmp_path / "photos.zip", *[(f"{'n' * 200}{i}.jpg", b"") for i in range(9000)])
    with pytest.raises(InputError, match="lists far more files"):
        source.entries()
    small = ZipArchive(source.path, IntakePolicy(max_zip_bytes=1024))
    with pytest.raises(InputError, match="MB are read"):
        small.entries()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_mutated_archive_is_read_or_refused_never_a_crash(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.jpg", b"A" * 300)
        file.writestr("trip/b.jpg", os.urandom(100))
    whole = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        whole = whole[: data.draw(st.integers(0, len(whole)))]
    path = tmp_path_factory.mktemp("mutants") / "photos.zip"
    path.write_bytes(whole)
    try:
        found = read(ZipArchive(path, POLICY))
    except InputError:
        return
    assert all(isinstance(v, bytes | str) for v in found.values())
