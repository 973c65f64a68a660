"""Exactly one make per key: races, kills, pauses, failures, damage."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from likeness import once as module
from likeness.errors import ClaimLost, IntegrityError, NonFiniteLoss, StillClaimed, TransientError
from likeness.once import Claim, ClaimPolicy, Done, expired_claims, held_claims, once
from likeness.processes import Owner, alive, this_process
from likeness.records import Consent, Subject
from likeness.stages import Call
from likeness.store import LocalStore, MemoryStore, Store

CALL = Call(stage="crop", subject="ada", params={"side_px": 128})
QUICK = ClaimPolicy(ttl_s=0.4, wait_s=20.0)
PATIENT = ClaimPolicy(ttl_s=600.0, wait_s=20.0)          # if this has to wait for a TTL, the test runs into its time limit

WORKER = """
import os, sys, time
from pathlib import Path
from likeness.errors import ClaimLost
from likeness.once import ClaimPolicy, once
from likeness.records import Consent
from likeness.stages import Call
from likeness.store import LocalStore

folder, name, seconds, ttl_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
def make(claim):
    claim.beat("half way")
    with open(folder / "makes", "a") as file:
        file.write(name + "\\n")
    print("making", flush=True)
    if seconds == 99:                     # held back by the test, from outside
        sys.stdin.readline()
    else:
        time.sleep(seconds)
    if "effect" in sys.argv:
        claim.check()
        (folder / f"effect-{name}").touch()
    return Consent(source=name if "naming" in sys.argv else "made")
print("ready", flush=True)
if "start" in sys.argv:
    sys.stdin.readline()
try:
    done = once(LocalStore(folder / "store"), Call(stage="crop", subject="ada", params={"side_px": 128}), make, output=Consent,
                claims=ClaimPolicy(ttl_s=ttl_s, wait_s=60.0))
    print("done", done.executed, done.record.source, flush=True)
except ClaimLost as e:
    print("lost", flush=True)
"""


class Worker:
    """Another process that makes the same stage."""

    def __init__(self, folder: Path, root: Path, name: str, *words: str, seconds: float = 0.0, ttl_s: float = 0.4) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", WORKER, str(folder), name, str(seconds), str(ttl_s), *words], cwd=root,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def expect(self, line: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == line

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def rest(self) -> list[str]:
        words = self.process.communicate(timeout=60)[0].split("\n")
        assert self.process.returncode == 0
        return [w for w in words if w]


@pytest.fixture
def start(tmp_path: Path, root: Path) -> Iterator[Any]:
    workers: list[Worker] = []

    def begin(name: str, *words: str, **options: float) -> Worker:
        workers.append(Worker(tmp_path, root, name, *words, **options))
        return workers[-1]
    yield begin
    for worker in workers:
        if worker.process.poll() is None:
            worker.process.kill()
        worker.process.communicate()


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def makes(tmp_path: Path) -> list[str]:
    return (tmp_path / "makes").read_text().split()


def made(source: str = "made") -> Any:
    return lambda claim: Consent(source=source)


def must_not_make(claim: Claim) -> Consent:
    raise AssertionError("made again")


def ask(store: Store, make: Any = must_not_make, claims: ClaimPolicy = QUICK, **options: Any) -> Done[Consent]:
    return once(store, CALL, make, output=Consent, claims=claims, **options)


def state(store: Store) -> dict[str, Any]:
    data = store.get(CALL.path)
    assert data is not None
    loaded: dict[str, Any] = json.loads(data)
    return loaded


# -- one process

def test_the_second_run_makes_nothing_and_returns_the_same() -> None:
    store = MemoryStore()
    first = ask(store, made())
    before = store.get(CALL.path)
    second = ask(store)
    assert (first.executed, second.executed) == (True, False)
    assert (first.record, first.ref) == (second.record, second.ref)
    assert first.ref.model_dump() == {"stage": "crop", "key": CALL.key, "digest": first.record.digest}
    assert store.get(CALL.path) == before
    assert list(store.list("")) == [CALL.path]


def test_what_is_published_is_content_only() -> None:
    store = MemoryStore()
    ask(store, made())
    assert set(state(store)) == {"state", "stage", "epoch", "key", "inputs", "params", "output", "digest"}


@pytest.mark.parametrize(("error", "code"), [(NonFiniteLoss("diverged"), "non_finite_loss"), (ValueError("bug"), "ValueError"), (KeyboardInterrupt(), "KeyboardInterrupt")],
                         ids=["ours", "a bug", "Ctrl-C"])
def test_a_failed_make_is_raised_and_nobody_has_to_wait(error: BaseException, code: str) -> None:
    store = MemoryStore()

    def fail(claim: Claim) -> Consent:
        raise error
    with pytest.raises(type(error)):
        ask(store, fail)
    assert state(store) == {"state": "open", "attempts": 1, "error": code}
    attempts = []
    done = ask(store, lambda claim: attempts.append(claim.attempt) or Consent(source="made"), PATIENT)
    assert done.executed
    assert attempts == [2]


def test_a_record_of_another_class_is_not_published() -> None:
    store = MemoryStore()
    with pytest.raises(TypeError, match="made a Subject, Consent was announced"):
        ask(store, lambda claim: Subject(id="ada", noun="woman", consent=Consent(source="x")))
    assert state(store)["state"] == "open"


def test_a_long_make_is_kept_alive_by_its_beat_and_waiters_see_its_progress() -> None:
    store = MemoryStore()
    making, seen = threading.Event(), []
    results = []

    def slow(claim: Claim) -> Consent:
        claim.beat("step 3 of 9")
        making.set()
        time.sleep(3 * QUICK.ttl_s)
        return Consent(source="made")
    worker = threading.Thread(target=lambda: results.append(ask(store, slow)))
    worker.start()
    making.wait()
    done = ask(store, on_wait=seen.append)
    worker.join()
    assert not done.executed
    assert results[0].executed
    assert set(seen) == {"step 3 of 9"}


def test_waiting_has_an_end() -> None:
    store = MemoryStore()
    held = module.Claimed(token="t", beat=0, ttl_s=600.0, progress="step 3 of 9")
    store.put_if_absent(CALL.path, module._dump(held))
    with pytest.raises(StillClaimed, match="step 3 of 9"):
        ask(store, claims=ClaimPolicy(ttl_s=600.0, wait_s=0.1))


def test_a_silent_claim_of_an_unknown_machine_is_believed_for_its_ttl_and_no_longer() -> None:
    store = MemoryStore()
    elsewhere = Owner(boot="another machine", pid_namespace=1, pid=1, started_ticks=1)
    store.put_if_absent(CALL.path, module._dump(module.Claimed(token="t", beat=7, ttl_s=0.5, owner=elsewhere, attempt=2)))
    began = time.monotonic()
    attempts = []
    assert ask(store, lambda claim: attempts.append(claim.attempt) or Consent(source="made")).executed
    assert 0.5 <= time.monotonic() - began < 5
    assert attempts == [3]


def test_an_observer_that_slept_itself_does_not_count_its_sleep() -> None:
    patience = module._Patience(ClaimPolicy(ttl_s=60.0))
    assert not patience.expired(b"same", 60.0)
    patience._looked_at = time.monotonic() - 3600           # a lid was closed for an hour
    assert not patience.expired(b"same", 60.0)


def test_a_lost_claim_is_noticed_before_an_effect_and_at_the_end() -> None:
    store = MemoryStore()
    thief = module.Claimed(token="thief", beat=0, ttl_s=60.0)
    checked = []

    def robbed(claim: Claim) -> Consent:
        old = store.get(CALL.path)
        assert old is not None
        assert store.compare_and_swap(CALL.path, expected=old, new=module._dump(thief))
        with pytest.raises(ClaimLost):
            claim.check()
        checked.append(1)
        return Consent(source="late")
    with pytest.raises(ClaimLost, match=CALL.path):
        ask(store, robbed, PATIENT)
    assert checked
    assert state(store)["token"] == "thief"


def test_a_make_that_fails_after_losing_its_claim_does_not_open_the_thiefs() -> None:
    store = MemoryStore()

    def robbed(claim: Claim) -> Consent:
        old = store.get(CALL.path)
        assert old is not None
        store.compare_and_swap(CALL.path, expected=old, new=module._dump(module.Claimed(token="thief", beat=0, ttl_s=60.0)))
        raise NonFiniteLoss("diverged")
    with pytest.raises(NonFiniteLoss):
        ask(store, robbed, PATIENT)
    assert state(store)["token"] == "thief"


def test_a_late_publish_returns_what_another_published() -> None:
    store = MemoryStore()

    def overtaken(claim: Claim) -> Consent:
        store.delete(CALL.path)
        ask(store, made("the other"))
        return Consent(source="late")
    done = ask(store, overtaken, PATIENT)
    assert (done.executed, done.record.source) == (False, "the other")


def test_a_person_forgotten_meanwhile_does_not_come_back() -> None:
    store = MemoryStore()

    def erased(claim: Claim) -> Consent:
        store.delete(CALL.path)
        return Consent(source="late")
    with pytest.raises(ClaimLost):
        ask(store, erased, PATIENT)
    assert list(store.list("")) == []


class Hiccup(MemoryStore):
    """A store whose swaps succeed but whose answer is lost, or that does not answer, once each."""

    def __init__(self) -> None:
        super().__init__()
        self.lie = self.fail = False

    def compare_and_swap(self, key: str, /, *, expected: bytes, new: bytes) -> bool:
        if self.fail:
            self.fail = False
            raise TransientError("no answer")
        swapped = super().compare_and_swap(key, expected=expected, new=new)
        if self.lie:
            self.lie = False
            return False
        return swapped


def test_a_swap_whose_answer_was_lost_is_recognised() -> None:
    store = Hiccup()

    def make(claim: Claim) -> Consent:
        store.lie = True
        claim.check()
        store.lie = True
        return Consent(source="made")
    assert ask(store, make, PATIENT).executed
    assert state(store)["state"] == "published"


def test_a_beat_that_was_not_written_is_no_loss() -> None:
    store = Hiccup()

    def make(claim: Claim) -> Consent:
        store.fail = True
        time.sleep(QUICK.ttl_s)
        assert not store.fail                    # the beat in the background met it
        claim.check()
        return Consent(source="made")
    assert ask(store, make).executed


# -- damage

def _damage(store: Store, **changes: Any) -> None:
    ask(store, made())
    old = store.get(CALL.path)
    assert old is not None
    store.compare_and_swap(CALL.path, expected=old, new=json.dumps(state(store) | changes).encode())


@pytest.mark.parametrize("changes", [
    {"output": {"source": "forged"}}, {"digest": "0" * 64}, {"params": {"side_px": 64}}, {"epoch": 99}, {"stage": "train"}, {"key": "0" * 64},
    {"output": {"sauce": "x"}}, {"extra": 1}, {"state": "finished"},
], ids=lambda c: next(iter(c)))
def test_a_published_record_that_does_not_hold_is_named(changes: dict[str, Any]) -> None:
    store = MemoryStore()
    _damage(store, **changes)
    with pytest.raises(IntegrityError, match=CALL.path) as caught:
        ask(store)
    assert "restore it" in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"state": "claimed"}'], ids=["empty", "cut", "binary", "list", "null", "half"])
def test_what_is_no_stage_record_is_named(data: bytes) -> None:
    store = MemoryStore()
    store.put_if_absent(CALL.path, data)
    with pytest.raises(IntegrityError, match=CALL.path):
        ask(store)
    assert store.get(CALL.path) == data


# -- many processes

def test_eight_processes_at_once_make_it_once(start: Any, tmp_path: Path) -> None:
    workers = [start(str(n), "start", seconds=0.2, ttl_s=600.0) for n in range(8)]
    for worker in workers:
        worker.expect("ready")
    for worker in workers:
        worker.go()
    lines = [line for worker in workers for line in worker.rest()]
    assert sorted(lines) == ["done False made"] * 7 + ["done True made", "making"]
    assert len(makes(tmp_path)) == 1


def test_a_killed_worker_of_this_machine_is_replaced_without_waiting(start: Any, store: LocalStore) -> None:
    victim = start("victim", seconds=99, ttl_s=600.0)
    victim.expect("ready")
    victim.expect("making")
    assert state(store)["progress"] == "half way"
    victim.process.send_signal(signal.SIGKILL)
    # Not reaped yet: a zombie has a pid and a start time, and is dead all the same.
    os.waitid(os.P_PID, victim.process.pid, os.WEXITED | os.WNOWAIT)
    began = time.monotonic()
    assert ask(store, made(), PATIENT).executed
    assert time.monotonic() - began < 5


def test_a_pid_that_was_given_to_somebody_else_is_dead(store: LocalStore) -> None:
    me = this_process()
    assert me is not None
    reused = me.model_copy(update={"started_ticks": me.started_ticks - 1})
    store.put_if_absent(CALL.path, module._dump(module.Claimed(token="t", beat=0, ttl_s=600.0, owner=reused)))
    assert ask(store, made(), PATIENT).executed


@pytest.mark.parametrize("change", [{"boot": "another"}, {"pid_namespace": 1}], ids=["machine", "container"])
def test_a_pid_of_elsewhere_says_nothing(change: dict[str, Any]) -> None:
    me = this_process()
    assert me is not None
    assert alive(me) is True
    assert alive(me.model_copy(update={"started_ticks": 1, **change})) is None


def test_claims_are_listed_with_what_can_be_told_of_their_process() -> None:
    me, store = this_process(), MemoryStore()
    assert me is not None
    ask(store, made())                                          # published: no claim
    owners = {"dead": me.model_copy(update={"started_ticks": me.started_ticks - 1}), "elsewhere": me.model_copy(update={"boot": "another"}), "living": me}
    for name, owner in owners.items():
        call = CALL.model_copy(update={"subject": name})
        store.put_if_absent(call.path, module._dump(module.Claimed(token="t", beat=3, ttl_s=60.0, owner=owner, attempt=2, progress="step 3")))
    store.put_if_absent("subjects/dora/enrolment.json", b"{}")
    assert {c.subject: c.lives for c in held_claims(store)} == {"dead": False, "elsewhere": None, "living": True}
    assert {(c.stage, c.attempt, c.progress) for c in held_claims(store)} == {("crop", 2, "step 3")}


def test_an_observer_says_which_claims_may_be_taken_over() -> None:
    me, store = this_process(), MemoryStore()
    assert me is not None
    claimed = {"dead": (600.0, me.model_copy(update={"started_ticks": me.started_ticks - 1})), "silent": (0.3, None), "stopped": (0.3, me), "beats": (0.3, None),
               "published": (600.0, None), "taken over": (600.0, None), "gone": (600.0, None)}
    paths, states = {}, {}
    for number, (name, (ttl_s, owner)) in enumerate(claimed.items()):
        call = CALL.model_copy(update={"subject": f"s{number}"})
        paths[name], states[name] = call.path, module.Claimed(token="t", beat=3, ttl_s=ttl_s, owner=owner)
        store.put_if_absent(call.path, module._dump(states[name]))
    held = held_claims(store)

    def change(name: str, new: bytes) -> None:
        assert store.compare_and_swap(paths[name], expected=module._dump(states[name]), new=new)

    change("beats", module._dump(states["beats"].model_copy(update={"beat": 4})))
    change("taken over", module._dump(states["taken over"].model_copy(update={"token": "another"})))
    change("published", module._dump(module.Open(attempts=1, error="transient")))
    store.delete(paths["gone"])
    began = time.monotonic()
    assert {claim.key for claim in expired_claims(store, held)} == {paths[name] for name in ("dead", "silent", "stopped")}
    assert 0.3 <= time.monotonic() - began < 60.0                              # a whole TTL of those who might still live, and not that of anybody else
    assert expired_claims(store, []) == []


@pytest.mark.parametrize("words", [(), ("effect",)], ids=["content", "effect"])
def test_a_stopped_worker_is_replaced_and_fenced_when_it_wakes(start: Any, store: LocalStore, tmp_path: Path, words: tuple[str, ...]) -> None:
    sleeper = start("sleeper", "naming", *words, seconds=99)
    sleeper.expect("ready")
    sleeper.expect("making")
    sleeper.process.send_signal(signal.SIGSTOP)
    done = ask(store, made("successor"))
    assert done.executed
    before = store.get(CALL.path)
    sleeper.go()
    sleeper.process.send_signal(signal.SIGCONT)
    assert sleeper.rest() == (["lost"] if words else ["done False successor"])
    assert store.get(CALL.path) == before
    assert not (tmp_path / "effect-sleeper").exists()
