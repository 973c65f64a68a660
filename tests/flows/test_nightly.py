"""`likeness nightly` as an operator has it: subjects are added, a night is run, joined, and followed by another one."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from flows.nightly import _answer, _failed, _turn
from likeness.erasure import tombstone_key
from likeness.errors import BadSettings, IntegrityError, LikenessError, ServerUnreachable, UnusablePhotos
from likeness.night import Outcome, last_outcome
from likeness.records import Consent, Enrolment, Subject
from likeness.settings import load_settings
from likeness.store import MemoryStore
from tasks.runtime import Tools
from tests.flows.test_run import CONFIG, OPEN_GATE, PHOTOS, finish, likeness

pytestmark = pytest.mark.timeout(900)
ASKED = "a" * 64


def test_four_subjects_one_night_and_the_next_has_nothing_to_do(tmp_path: Path) -> None:
    home, few, empty = tmp_path / "home", tmp_path / "few", tmp_path / "empty"
    few.mkdir()
    empty.mkdir()
    shutil.copy(PHOTOS / "00.jpg", few)
    config = CONFIG + OPEN_GATE

    def command(*words: str) -> tuple[int, dict, str]:
        return finish(likeness(home, *words, "--json", config=config))

    for subject, photos in (("ada", PHOTOS), ("bea", few), ("canary-cleo", empty), ("dora", PHOTOS)):
        code, row, err = command("subject", "add", subject, "--class", "man", "--photos", str(photos), "--consent", "ticket 7")
        assert (code, row["last"], row["consent"]) == (0, None, "ticket 7"), err
    assert command("subject", "pause", "dora")[1]["paused"] is True
    code, night, err = command("nightly", "--id", "n1")
    assert code == 0, err
    assert night["accepted"] == [{"subject": "ada", "version": 1}]
    assert [(r["subject"], r["verdict"]) for r in night["refused"]] == [("bea", "needs_photos")]
    assert [(f["subject"], f["ours"]) for f in night["failed"]] == [("canary-cleo", False)]
    assert (night["paused"], night["unchanged"], night["deferred"]) == (["dora"], [], [])
    assert night["counts"]["accepted"] == 1
    assert night["seconds"]["train"] > 0
    assert b"ada" not in (home / "store" / "nights" / "n1.json").read_bytes()
    page = Path(night["page"]).read_text()
    assert "4 enrolled, 1 accepted" in page
    assert [subject for subject in ("ada", "bea", "canary-cleo", "dora") if re.search(rf"\b{subject}\b", page)] == []
    code, joined, err = command("nightly", "--id", "n1")
    assert (code, joined["accepted"], joined["refused"]) == (0, night["accepted"], night["refused"]), err
    shutil.copy(PHOTOS / "01.jpg", few)                         # new photos: due again
    code, following, err = command("nightly", "--id", "n2")
    assert (code, following["accepted"], following["unchanged"]) == (0, [], ["ada"]), err
    assert [r["subject"] for r in following["refused"]] == ["bea"]
    rows = {row["subject"]: row for row in command("subject", "list")[1]["subjects"]}
    assert {s: (r["last"] or {}).get("night") for s, r in rows.items()} == {"ada": "n1", "bea": "n2", "canary-cleo": "n2", "dora": None}
    command("subject", "resume", "dora")
    assert command("subject", "show", "dora")[1]["paused"] is False
    code, receipt, err = command("forget", "canary-cleo", "--yes")
    assert (code, receipt["clean"]) == (0, True), err
    left = [p for p in home.rglob("*") if p.is_file() and b"canary-cleo" in p.read_bytes()]
    assert [p for p in left if "tombstones" not in p.parts] == []
    code, receipt, err = command("forget", "ada", "--yes")       # a subflow of two nights
    assert (code, receipt["clean"]) == (0, True), err
    assert set(command("subject", "list")[1]["subjects"][0]) == {"subject", "class", "consent", "photos", "paused", "last"}


def test_a_subject_that_nobody_enrolled_and_photos_that_are_nowhere_say_so(tmp_path: Path) -> None:
    code, out, err = finish(likeness(tmp_path / "home", "subject", "pause", "nobody", "--json"))
    assert (code, out) == (2, None)
    assert "not enrolled" in err
    code, out, err = finish(likeness(tmp_path / "home", "subject", "add", "ada", "--photos", str(tmp_path / "nowhere"), "--consent", "x"))
    assert (code, out) == (2, None)
    assert "nothing at --photos" in err


@pytest.fixture
def tools(own_home: Path) -> Tools:
    """Tools over a memory, with one enrolled subject."""
    made = Tools(load_settings(overrides={"home": str(own_home)}))
    made.bare_store = MemoryStore()
    made.enrol(Enrolment(subject=Subject(id="ada", noun="man", consent=Consent(source="ticket 7")), source="store:uploads/ada/"))
    return made


@pytest.mark.parametrize(("error", "ours"), [
    (UnusablePhotos("none"), False), (ServerUnreachable("no answer"), True), (BadSettings("wrong"), True), (IntegrityError("other bytes"), True),
    (RuntimeError("with a path of ada"), True), (OSError("a disk"), True),
])
def test_an_error_ends_one_subjects_turn_and_not_the_night(tools: Tools, error: Exception, ours: bool) -> None:
    tonight: dict[str, Outcome] = {}
    with _turn(tools, "ada", "n1", tonight, ASKED):
        raise error
    assert tonight["ada"] == last_outcome(tools.store, "ada")
    assert (tonight["ada"].kind, tonight["ada"].ours, tonight["ada"].failures) == ("failed", ours, 1)
    assert "path of ada" not in tonight["ada"].reasons[0].message


@pytest.mark.parametrize("key", ["enrolment", "night"])
def test_a_damaged_record_ends_one_subjects_turn_and_is_reported(tools: Tools, key: str) -> None:
    path, tonight = f"subjects/ada/{key}.json", {}
    tools.bare_store.delete(path)
    tools.bare_store.put_if_absent(path, b"{damaged")
    with _turn(tools, "ada", "n1", tonight):
        tools.standing("ada")
        last_outcome(tools.store, "ada")
        pytest.fail("it was read")
    assert (tonight["ada"].kind, tonight["ada"].ours) == ("failed", True)


def test_what_the_store_does_not_take_is_still_in_the_report(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise ServerUnreachable("no answer")

    tonight: dict[str, Outcome] = {}
    monkeypatch.setattr(tools.bare_store, "put_if_absent", refuse)
    with _turn(tools, "ada", "n1", tonight, ASKED):
        raise IntegrityError("other bytes")
    assert tonight["ada"].reasons[0].code == "integrity"
    assert last_outcome(tools.store, "ada") is None


def test_a_forgotten_subject_leaves_no_outcome(tools: Tools) -> None:
    tonight = {"ada": _failed(ServerUnreachable("no answer"), "n1", asked=ASKED, last=None)}
    tools.bare_store.put_if_absent(tombstone_key("ada"), b"forgotten while it ran")
    with _turn(tools, "ada", "n1", tonight, ASKED):
        raise ServerUnreachable("no answer")
    assert tonight == {}
    assert last_outcome(tools.store, "ada") is None


def test_failures_count_nights_not_starts() -> None:
    error: LikenessError = ServerUnreachable("no answer")
    first = _failed(error, "n1", asked=ASKED, last=None)
    joined = _failed(error, "n1", asked=ASKED, last=first)
    second = _failed(error, "n2", asked=ASKED, last=joined)
    changed = _failed(error, "n3", asked="b" * 64, last=second)
    assert [o.failures for o in (first, joined, second, changed)] == [1, 1, 2, 1]


def test_an_accepted_run_is_noted_with_its_version() -> None:
    made = _answer({"verdict": "accepted", "reasons": [], "release": {"model": "likeness.ada", "version": 3}, "seconds": {"train": 1.0}}, "n1", ASKED)
    assert (made.kind, made.version, made.seconds, made.failures) == ("accepted", 3, {"train": 1.0}, 0)
