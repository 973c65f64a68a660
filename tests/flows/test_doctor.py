"""doctor: it asks the store that is configured, and believes what it sees."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
from moto.s3.models import S3Backend

from flows import doctor
from likeness.errors import IntegrityError, RecipeError
from likeness.settings import S3StoreSettings, load_settings
from likeness.store import LocalStore
from tasks.runtime import Tools
from tests.models.captions import tiny
from tests.s3_server import S3Server, refuse


def tools(store: S3StoreSettings | None = None) -> Tools:
    settings = load_settings()
    return Tools(settings if store is None else settings.model_copy(update={"store": store}))


def test_a_folder_is_probed_and_left_as_it_was(own_home: Path) -> None:
    assert doctor._store(tools()) == "local: creates exclusively, swaps by comparison, also when 8 do so at once"
    assert list(LocalStore(own_home / "store").list("")) == []


def test_a_bucket_is_probed_and_left_as_it_was(s3: S3Server) -> None:
    asked = tools(s3.bucket(prefix="a/"))
    assert doctor._store(asked) == "s3: creates exclusively, swaps by comparison, also when 8 do so at once"
    assert list(asked.store.list("")) == []


@pytest.mark.parametrize(("header", "words"), [("If-None-Match", "does not create exclusively"), ("If-Match", "does not compare and swap")])
def test_a_server_that_ignores_conditions_is_found_out(s3: S3Server, header: str, words: str) -> None:
    asked = tools(s3.bucket())
    s3.deaf_to.add(header)
    with pytest.raises(IntegrityError, match=words):
        doctor._store(asked)
    assert list(asked.store.list("")) == []


def test_a_server_that_looks_first_and_writes_later_is_found_out_when_two_meet(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, write, meeting = tools(s3.bucket()), S3Backend.put_object, threading.Barrier(2)

    def write_together(self: S3Backend, bucket: str, key: str, *arguments: Any, **named: Any) -> Any:
        if key.endswith("-raced"):                          # both have looked, neither has written
            with contextlib.suppress(threading.BrokenBarrierError):
                meeting.wait(20)
        return write(self, bucket, key, *arguments, **named)

    monkeypatch.setattr(S3Backend, "put_object", write_together)
    s3.orderly = False
    with pytest.raises(IntegrityError, match="does not create exclusively"):
        doctor._store(asked)


def test_a_contest_that_two_win_is_noticed() -> None:
    assert not doctor._one_wins(lambda mine: mine in (b"contender 1", b"contender 2"))
    assert not doctor._one_wins(lambda mine: False)
    assert doctor._one_wins(lambda mine: mine == b"contender 7")


def test_old_versions_are_told(s3: S3Server) -> None:
    asked = tools(s3.bucket())
    s3.client.put_bucket_versioning(Bucket=asked.settings.store.bucket, VersioningConfiguration={"Status": "Enabled"})       # type: ignore[union-attr]
    assert "the bucket keeps old versions" in doctor._store(asked)
    s3.next("GET", refuse(403, "AccessDenied"))
    assert "s3:GetBucketVersioning" in doctor._old_versions(asked.bare_store)


def test_the_captioner_is_loaded_and_asked(own_home: Path, tmp_path: Path) -> None:
    asked = tools()
    assert doctor._captions(asked).startswith("slots, the maquette's own CLIP, loads; of a grey wall it says: a ")
    backends = asked.settings.backends.model_copy(update={"captions": "blip", "captions_folder": tiny.build(tmp_path / "blip", "blip")})
    asked = Tools(asked.settings.model_copy(update={"backends": backends}))
    assert doctor._captions(asked).startswith("blip, 6 files, loads; of a grey wall it says: a photo of nobody")
    (tmp_path / "blip" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="holds no safetensors"):
        doctor._captions(Tools(asked.settings))


def test_a_store_that_refuses_is_told_with_the_cure(s3: S3Server) -> None:
    asked = tools(s3.bucket())
    s3.next("PUT", refuse(403, "AccessDenied"))
    with pytest.raises(RecipeError, match=r"docs/store\.md"):
        doctor._store(asked)
    assert s3.seen[-1][0] == "PUT"                          # nothing was made, nothing has to be deleted
