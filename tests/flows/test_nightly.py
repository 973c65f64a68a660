"""`likeness nightly` as an operator has it: subjects are added, a night is run, joined, and followed by another one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.turns import answer, failed, take_turns, turn
from likeness.erasure import tombstone_key
from likeness.errors import BadSettings, IntegrityError, LikenessError, ServerUnreachable, UnusablePhotos
from likeness.night import Outcome, last_outcome, note_outcome
from likeness.once import Claimed
from likeness.processes import this_process
from likeness.records import Consent, Enrolment, Subject
from likeness.settings import load_settings
from likeness.store import LocalStore, MemoryStore
from tasks.runtime import Tools
from tests.flows.test_run import CONFIG, OPEN_GATE, PHOTOS, finish, likeness
from tests.processes import environment

pytestmark = pytest.mark.timeout(1800)
ASKED = "a" * 64


def test_four_subjects_one_night_and_the_next_has_nothing_to_do(tmp_path: Path) -> None:
    home, few, empty = tmp_path / "home", tmp_path / "few", tmp_path / "empty"
    few.mkdir()
    empty.mkdir()
    shutil.copy(PHOTOS / "00.jpg", few)
    config = CONFIG + OPEN_GATE

    def command(*words: str) -> tuple[int, dict, str]:
        return finish(likeness(home, *words, "--json", config=config, own_server=True))

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
    (home / "store" / "subjects" / "bea" / "enrolment.json").write_bytes(b"{")
    damaged, whole = command("subject", "list")[1]["subjects"]                # one that cannot be read does not hide the others
    assert (damaged["subject"], damaged["error"]) == ("bea", "integrity")
    assert set(whole) == {"subject", "class", "consent", "photos", "paused", "last"}


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
    with turn(tools, "ada", "n1", tonight, ASKED):
        raise error
    assert tonight["ada"] == last_outcome(tools.store, "ada")
    assert (tonight["ada"].kind, tonight["ada"].ours, tonight["ada"].failures) == ("failed", ours, 1)
    assert "path of ada" not in tonight["ada"].reasons[0].message


@pytest.mark.parametrize("key", ["enrolment", "night"])
def test_a_damaged_record_ends_one_subjects_turn_and_is_reported(tools: Tools, key: str) -> None:
    path, tonight = f"subjects/ada/{key}.json", {}
    tools.bare_store.delete(path)
    tools.bare_store.put_if_absent(path, b"{damaged")
    with turn(tools, "ada", "n1", tonight):
        tools.standing("ada")
        last_outcome(tools.store, "ada")
        pytest.fail("it was read")
    assert (tonight["ada"].kind, tonight["ada"].ours) == ("failed", True)


def test_what_the_store_does_not_take_is_still_in_the_report(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise ServerUnreachable("no answer")

    tonight: dict[str, Outcome] = {}
    monkeypatch.setattr(tools.bare_store, "put_if_absent", refuse)
    with turn(tools, "ada", "n1", tonight, ASKED):
        raise IntegrityError("other bytes")
    assert tonight["ada"].reasons[0].code == "integrity"
    assert last_outcome(tools.store, "ada") is None


def test_a_forgotten_subject_leaves_no_outcome(tools: Tools) -> None:
    tonight = {"ada": failed(ServerUnreachable("no answer"), "n1", asked=ASKED, last=None)}
    tools.bare_store.put_if_absent(tombstone_key("ada"), b"forgotten while it ran")
    with turn(tools, "ada", "n1", tonight, ASKED):
        raise ServerUnreachable("no answer")
    assert tonight == {}
    assert last_outcome(tools.store, "ada") is None


def test_failures_count_nights_not_starts() -> None:
    error: LikenessError = ServerUnreachable("no answer")
    first = failed(error, "n1", asked=ASKED, last=None)
    joined = failed(error, "n1", asked=ASKED, last=first)
    second = failed(error, "n2", asked=ASKED, last=joined)
    changed = failed(error, "n3", asked="b" * 64, last=second)
    assert [o.failures for o in (first, joined, second, changed)] == [1, 1, 2, 1]


def test_an_accepted_run_is_noted_with_its_version() -> None:
    made = answer({"verdict": "accepted", "reasons": [], "release": {"model": "likeness.ada", "version": 3}, "seconds": {"train": 1.0}}, "n1", ASKED)
    assert (made.kind, made.version, made.seconds, made.failures) == ("accepted", 3, {"train": 1.0}, 0)


RESULT = {"verdict": "retry", "reasons": [], "release": None, "seconds": {}}


def four() -> list[tuple[str, Outcome | None, str]]:
    return [(subject, None, ASKED) for subject in ("ada", "bea", "cleo", "dora")]


def test_two_starts_of_a_night_at_once_give_each_subject_oneturn(tools: Tools) -> None:
    """While the first has ada, whose claim it holds, the second takes the others; the first then finds them done."""
    turns: list[tuple[int, str]] = []
    one: dict[str, Outcome] = {}
    two: dict[str, Outcome] = {}
    claim = Claimed(token="t", beat=0, ttl_s=60.0, owner=this_process())
    path = "subjects/ada/stages/train/" + "c" * 64 + ".json"

    def second(subject: str) -> dict:
        turns.append((2, subject))
        return RESULT

    def first(subject: str) -> dict:
        turns.append((1, subject))
        tools.store.put_if_absent(path, claim.model_dump_json().encode())
        assert take_turns(tools, "n1", four()[1:] + four()[:1], two, second, limit=3, ends=None) == ["ada"]
        tools.store.delete(path)
        return RESULT

    assert take_turns(tools, "n1", four(), one, first, limit=None, ends=None) == []
    assert turns == [(1, "ada"), (2, "bea"), (2, "cleo"), (2, "dora")]
    assert one.keys() == {"ada", "bea", "cleo", "dora"}
    assert {s: one[s] for s in two} == two


def test_who_is_being_made_elsewhere_comes_last_and_is_waited_for_only_then(tools: Tools) -> None:
    claim = Claimed(token="t", beat=0, ttl_s=60.0, owner=this_process())
    tools.store.put_if_absent("subjects/ada/stages/train/" + "c" * 64 + ".json", claim.model_dump_json().encode())
    turns: list[str] = []
    tonight: dict[str, Outcome] = {}
    assert take_turns(tools, "n1", four(), tonight, lambda s: turns.append(s) or RESULT, limit=None, ends=None) == []
    assert turns == ["bea", "cleo", "dora", "ada"]


def test_a_limit_and_a_deadline_defer_and_a_dead_process_is_not_busy(tools: Tools) -> None:
    me = this_process()
    assert me is not None
    dead = Claimed(token="t", beat=0, ttl_s=60.0, owner=me.model_copy(update={"started_ticks": me.started_ticks - 1}))
    tools.store.put_if_absent("subjects/ada/stages/train/" + "c" * 64 + ".json", dead.model_dump_json().encode())
    turns: list[str] = []
    assert take_turns(tools, "n1", four(), {}, lambda s: turns.append(s) or RESULT, limit=1, ends=None) == ["bea", "cleo", "dora"]
    assert turns == ["ada"]
    assert take_turns(tools, "n2", four(), {}, lambda s: turns.append(s) or RESULT, limit=None, ends=0.0) == ["ada", "bea", "cleo", "dora"]


def test_another_question_or_another_night_is_no_turn_of_this_one(tools: Tools) -> None:
    for night, asked in (("n0", ASKED), ("n1", "b" * 64)):
        note_outcome(tools.store, "ada", Outcome(night=night, asked=asked, kind="retry"))
        turns: list[str] = []
        take_turns(tools, "n1", [("ada", None, ASKED)], {}, lambda s, turns=turns: turns.append(s) or RESULT, limit=None, ends=None)
        assert turns == ["ada"]


@pytest.mark.slow
def test_two_processes_at_one_night_make_every_stage_once(tmp_path: Path) -> None:
    """Two machines: a home and a Prefect each, one store."""
    store, made = tmp_path / "store", tmp_path / "made"
    config = CONFIG.replace("steps = 12", "steps = 4") + f'[store]\nroot = "{store}"\n'
    homes = [tmp_path / "one", tmp_path / "two"]
    for subject in ("ada", "bea", "cleo", "dora"):
        photos = tmp_path / subject                              # other names, so that no stage of one is another's
        photos.mkdir()
        for file in sorted(PHOTOS.glob("*.jpg"))[:7]:
            shutil.copy(file, photos / f"{subject}-{file.name}")
        code, _, err = finish(likeness(homes[0], "subject", "add", subject, "--class", "man", "--photos", str(photos), "--consent", "x", "--json", config=config))
        assert code == 0, err
    both = [subprocess.Popen([sys.executable, "-c", NOTING, str(made)], env=environment(home, config), cwd=home, text=True, stderr=subprocess.PIPE) for home in homes]
    for process in both:
        _, err = process.communicate(timeout=800)
        assert process.returncode == 0, err
    lines = made.read_text().split("\n")[:-1]
    assert {line.split()[0] for line in lines} == {"ada", "bea", "cleo", "dora"}
    assert {line.split()[1] for line in lines} >= {"ingest", "train", "sample", "judge"}
    assert len(lines) == len(set(lines)), "a stage was made twice"
    outcomes = [last_outcome(LocalStore(store), subject) for subject in ("ada", "bea", "cleo", "dora")]
    assert {o.night for o in outcomes if o is not None} == {"n1"}
    assert None not in outcomes


NOTING = """
import os, sys
from pathlib import Path
from flows.terminal import keep_to_home
from likeness.settings import load_settings
settings = load_settings()
keep_to_home(settings.home)
from flows.nightly import nightly
from tasks import runtime

class Noting(runtime.Tools):
    def once(self, call, make, output):
        done = super().once(call, make, output)
        if done.executed:
            with open(sys.argv[1], "a") as file:                 # one short line: appended whole
                file.write(f"{call.subject} {call.stage} {call.key}\\n")
        return done

runtime.configure(Noting(settings))
report = nightly("n1")
assert sum(report["counts"][kind] for kind in ("accepted", "retry", "needs_photos", "rejected")) == 4, report
"""
