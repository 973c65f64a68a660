"""`once`: make a stage's output exactly once, however many ask for it and whoever dies on the way.

One object per stage key, changed only by compare-and-swap:

    absent -> claimed{token, beat, ...} -> published
                 |        ^
                 v        |
               open{attempts, error}

A claim is *expired* when an observer has seen it unchanged for the claim's whole TTL on the observer's own monotonic clock: wall clocks
are never compared. Expiry may be wrong (a stopped process, a long pause); then the token protects: the first owner's next swap fails.
"""

from __future__ import annotations

import json
import logging
import random
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from likeness.errors import ClaimLost, IntegrityError, LikenessError, StillClaimed, TransientError
from likeness.processes import Owner, alive, this_process
from likeness.records import Record
from likeness.stages import Call, Published, StageRef
from likeness.store import Store

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Record)


class ClaimPolicy(Record):
    """How long a silent claim is believed, and how long a live one is waited for."""

    ttl_s: float = Field(60.0, gt=0, le=3600, description="a claim without a beat for this long is taken over; it beats every ttl_s / 6")
    wait_s: float = Field(900.0, ge=0, le=86_400, description="how long to wait for another worker that is making the same thing")


class Claimed(Record):
    """Somebody is making it."""

    state: Literal["claimed"] = "claimed"
    token: str
    beat: int = Field(ge=0)
    ttl_s: float = Field(gt=0, le=3600)
    progress: str | None = None
    owner: Owner | None = None
    attempt: int = Field(1, ge=1)


class Open(Record):
    """Nobody is making it; somebody tried."""

    state: Literal["open"] = "open"
    attempts: int = Field(ge=1)
    error: str


@dataclass(frozen=True)
class Done(Generic[R]):
    """The published record, and whether this very call made it."""

    record: R
    ref: StageRef
    executed: bool


class Claim:
    """The right to make one stage's output, kept alive by its beat. Given to `make`; safe to use from several threads."""

    def __init__(self, store: Store, call: Call, state: Claimed) -> None:
        self._store, self._path = store, call.path
        self._state, self._bytes = state, _dump(state)
        self._lock = threading.Lock()
        self._trouble: LikenessError | None = None

    @property
    def attempt(self) -> int:
        """1 for the first attempt at this key, counting those of dead and failed workers."""
        return self._state.attempt

    def beat(self, progress: str | None = None) -> None:
        """Say that we live, and how far we are; None keeps what was said before.

        Raises:
            ClaimLost: if the claim is no longer ours.
            TransientError: if the store does not answer.
        """
        with self._lock:
            state = self._state.model_copy(update={"beat": self._state.beat + 1, "progress": progress or self._state.progress})
            self._swap(_dump(state))
            self._state = state

    def check(self) -> None:
        """Prove that the claim is ours, and that it stays so for another TTL: call it right before an effect.

        Raises:
            ClaimLost: if it is no longer ours.
            LikenessError: if the beats in the background met anything that a retry does not cure.
        """
        if self._trouble is not None:
            raise self._trouble
        self.beat()

    def _swap(self, new: bytes) -> None:
        if self._trouble is not None:
            raise self._trouble
        for _ in range(3):
            if self._store.compare_and_swap(self._path, expected=self._bytes, new=new):
                self._bytes = new
                return
            # The swap of an earlier call may have succeeded although its answer was lost: then the token is still ours.
            found = self._store.get(self._path)
            if found == new:
                self._bytes = new
                return
            state = None if found is None else _load(found, self._path)
            if found is None or not isinstance(state, Claimed) or state.token != self._state.token:
                break
            self._bytes = found
        self._trouble = ClaimLost(f"{self._path}: another worker took this stage over, or it was deleted; what was made here is dropped, "
                                  "and the same command uses what the other one publishes")
        raise self._trouble

    def _finish(self, new: bytes) -> None:
        with self._lock:
            self._swap(new)

    def _keep_alive(self, stop: threading.Event) -> None:
        while not stop.wait(self._state.ttl_s / 6):
            try:
                self.beat()
            except TransientError as e:
                if isinstance(e, ClaimLost):
                    return                                    # kept in _trouble, raised by the next check or publish
                log.warning("%s: the beat was not written (%s); the next one may be", self._path, e.message)
            except LikenessError as e:
                self._trouble = e
                return


def once(store: Store, call: Call, make: Callable[[Claim], R], *, output: type[R], claims: ClaimPolicy,
         on_wait: Callable[[str | None], None] | None = None) -> Done[R]:
    """The output of `call`: what is published, or else what `make` returns, published.

    `make` publishes its blobs itself, by content; an effect (registering, deleting) calls `claim.check()` first. Whatever it raises
    gives the claim up at once and is raised here.

    Args:
        store: where the stage's object lies.
        call: which stage, from which inputs and parameters.
        make: does the work, given the claim.
        output: the record class that `make` returns.
        claims: TTL and waiting time.
        on_wait: called with the other worker's progress, each time the wait for it is looked at.

    Raises:
        StillClaimed: if another worker is alive and was not done within `claims.wait_s`.
        ClaimLost: if the claim was lost while making and nothing is published yet.
        IntegrityError: if the object is unreadable, or does not hold what its digest or key says.
    """
    patience = _Patience(claims)
    while True:
        found = store.get(call.path)
        state = None if found is None else _load(found, call.path)
        if isinstance(state, Published):
            return _done(state, call, output, executed=False)
        if isinstance(state, Claimed) and alive(state.owner) is not False and not patience.expired(found, state.ttl_s):
            if on_wait is not None:
                on_wait(state.progress)
            patience.wait(call, state)
            continue
        before = state.attempt if isinstance(state, Claimed) else state.attempts if isinstance(state, Open) else 0
        mine = Claimed(token=secrets.token_hex(16), beat=0, ttl_s=claims.ttl_s, owner=this_process(), attempt=before + 1)
        claim = Claim(store, call, mine)
        won = store.put_if_absent(call.path, _dump(mine)) if found is None else store.compare_and_swap(call.path, expected=found, new=_dump(mine))
        if won:
            return _make(store, call, make, claim, output)


@dataclass(frozen=True)
class Absent:
    """Nothing is published: how often that was tried, and the code of the error with which the last attempt gave up; None if nobody did, or somebody is at it."""

    attempts: int
    error: str | None


def find(store: Store, call: Call, *, output: type[R]) -> Done[R] | Absent:
    """What `once` would find, without making or claiming anything.

    Raises:
        IntegrityError: as `once`.
    """
    found = store.get(call.path)
    state = None if found is None else _load(found, call.path)
    if isinstance(state, Published):
        return _done(state, call, output, executed=False)
    if isinstance(state, Open):
        return Absent(state.attempts, state.error)
    return Absent(0 if state is None else state.attempt, None)


@dataclass(frozen=True)
class HeldClaim:
    """A claim as it lies in the Store. `lives`: whether its process does; None if that cannot be told from here, then only its TTL can.

    `key` is where it lies; a claim with another `token` is somebody else's, with another `beat` a sign of life.
    """

    subject: str
    stage: str
    attempt: int
    progress: str | None
    lives: bool | None
    key: str
    token: str
    beat: int
    ttl_s: float


def held_claims(store: Store, subject: str | None = None) -> list[HeldClaim]:
    """Every claim that somebody holds, or held when they died. Reads every stage record of the subject, None: of all.

    Raises:
        IntegrityError: if a record is unreadable.
    """
    found = []
    for key in store.list("subjects/" if subject is None else f"subjects/{subject}/stages/"):
        parts = key.split("/")
        if len(parts) != 5 or parts[2] != "stages" or (data := store.get(key)) is None:
            continue
        state = _load(data, key)
        if isinstance(state, Claimed):
            found.append(HeldClaim(parts[1], parts[3], state.attempt, state.progress, alive(state.owner), key, state.token, state.beat, state.ttl_s))
    return found


def expired_claims(store: Store, held: Sequence[HeldClaim], *, pause: Callable[[float], None] = time.sleep) -> list[HeldClaim]:
    """Those of `held` that whoever comes next may take over: their process is dead, or they lie unchanged for their whole TTL on this process's own clock.

    Takes as long as the longest TTL of a claim that stays silent, and a moment if none does: one that beats, ends or changes hands is let go at once.

    Raises:
        IntegrityError: if a record is unreadable.
    """
    watched = [(claim, _Patience(ClaimPolicy(ttl_s=claim.ttl_s, wait_s=0.0))) for claim in held]
    expired: list[HeldClaim] = []
    while watched:
        still = []
        for claim, patience in watched:
            found = store.get(claim.key)
            state = None if found is None else _load(found, claim.key)
            if not isinstance(state, Claimed) or (state.token, state.beat) != (claim.token, claim.beat):
                continue
            if alive(state.owner) is False or patience.expired(found, state.ttl_s):
                expired.append(claim)
            else:
                still.append((claim, patience))
        watched = still
        if watched:
            pause(min(1.0, *(claim.ttl_s / 10 for claim, _ in watched)))
    return expired


def _make(store: Store, call: Call, make: Callable[[Claim], R], claim: Claim, output: type[R]) -> Done[R]:
    stop = threading.Event()
    beating = threading.Thread(target=claim._keep_alive, args=(stop,), name=f"beat-{call.stage}", daemon=True)
    beating.start()
    try:
        record = make(claim)
        if type(record) is not output:
            raise TypeError(f"{call.stage} made a {type(record).__name__}, {output.__name__} was announced")
        published = Published.of(call, record)
    except BaseException as e:
        stop.set()
        beating.join()
        _release(claim, e)
        raise
    stop.set()
    beating.join()
    try:
        claim._finish(_dump(published))
    except ClaimLost:
        # Content is content: what another worker published under this key serves as well as ours.
        found = store.get(call.path)
        state = None if found is None else _load(found, call.path)
        if not isinstance(state, Published):
            raise
        return _done(state, call, output, executed=False)
    return Done(record=record, ref=published.ref, executed=True)


def _release(claim: Claim, error: BaseException) -> None:
    code = error.code if isinstance(error, LikenessError) else type(error).__name__
    try:
        claim._finish(_dump(Open(attempts=claim.attempt, error=code)))
    except LikenessError as e:
        # The first error is the one to raise; an unreleased claim only costs the others one TTL.
        log.warning("%s: the claim was not given up: %s", claim._path, e.message)


def _done(state: Published, call: Call, output: type[R], *, executed: bool) -> Done[R]:
    faults = state.faults()
    if state.key != call.key or state.stage != call.stage:
        faults.append(f"it is of {state.stage} {state.key[:12]}...")
    try:
        record = output.read(json.dumps(state.output))
    except ValidationError as e:
        faults += [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors(include_input=False, include_url=False)]
    if faults:
        raise IntegrityError(f"{call.path} is not what was published: {'; '.join(faults)}: {_CURE}")
    return Done(record=record, ref=state.ref, executed=executed)


_STATE: TypeAdapter[Open | Claimed | Published] = TypeAdapter(Annotated[Open | Claimed | Published, Field(discriminator="state")])
_CURE = "restore it from a backup, or delete it and run the same command again to make it anew"


def _load(data: bytes, path: str) -> Open | Claimed | Published:
    try:
        return _STATE.validate_json(data)
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False)[0]
        raise IntegrityError(f"{path} holds {len(data)} bytes that are no stage record ({'.'.join(map(str, first['loc']))}: {first['msg']}): "
                             f"{_CURE}") from e


def _dump(state: Open | Claimed | Published) -> bytes:
    return json.dumps(state.model_dump(mode="json"), sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


class _Patience:
    """One observer's own clock: how long the same bytes were seen, and how long it has waited in all."""

    def __init__(self, claims: ClaimPolicy) -> None:
        self._claims = claims
        self._pause_s = 0.02
        self._waited_s = self._same_s = 0.0
        self._seen: bytes | None = None
        self._looked_at: float | None = None

    def expired(self, found: bytes | None, ttl_s: float) -> bool:
        now = time.monotonic()
        # At most a few pauses count per look: if this process was itself stopped for an hour (a suspended machine), the other one
        # may have been too, and gets the chance to beat.
        passed_s = 0.0 if self._looked_at is None else min(now - self._looked_at, 3 * self._pause_s + 1.0)
        self._looked_at = now
        self._waited_s += passed_s
        self._same_s = self._same_s + passed_s if found == self._seen else 0.0
        self._seen = found
        return self._same_s >= ttl_s

    def wait(self, call: Call, state: Claimed) -> None:
        if self._waited_s >= self._claims.wait_s:
            raise StillClaimed(f"{call.stage} of {call.subject} is being made by another worker ({state.progress or 'no progress reported'}), "
                               f"waited {self._waited_s:.0f} s of {self._claims.wait_s:.0f} s: run the same command again later")
        # Jitter, so that many waiters do not ask in step; from 20 ms, since most stages are short, to a tenth of the TTL or 2 s.
        self._pause_s = min(self._pause_s * 1.5, 2.0, state.ttl_s / 10)
        time.sleep(self._pause_s * random.uniform(0.5, 1.5))
