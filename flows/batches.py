"""Batches: what workers make for many subjects, gathered, sent and awaited by whoever orchestrates.

    advance(subject) -> finished | needs -> gathered -> a flow run on pool `cpu` or `gpu` -> advance(subject) again

Nothing comes back from a worker but that its run ended, and its numbers. What it made lies in the Store, and so does the code of the error with which it gave
a stage up: so a batch may be lost, sent twice or finish late, and a parent that is started again asks the Store like everybody else.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelling

from flows.deploying import NAME
from flows.turns import answer, settle, turn
from likeness import digest
from likeness.errors import BadSettings, RecipeError, ServerUnreachable, error_of
from likeness.night import Outcome
from tasks.runtime import Tools

log = logging.getLogger(__name__)

FlowName = Literal["preparing", "training"]
LOOK_S = 5.0                    # between two looks at what is under way
COMES_BACK_S = 90.0             # a crashed run is set to run again by an automation of `deploy`; after so long it was not
MOST_SENDS = 2                  # of one subject's need, where a batch does not end by itself


@dataclass(frozen=True)
class Ended:
    """How a batch ended, and how long it was worked on; `completed` if it went through all of its subjects."""

    completed: bool
    state: str
    busy_s: float = 0.0
    seconds: Mapping[str, float] = field(default_factory=dict)          # per stage, summed over subjects


class Pools(Protocol):
    """Where batches are sent."""

    def send(self, flow: FlowName, parameters: Mapping[str, Any]) -> str:
        """Have a flow carried out by a worker; its id."""

    def ended(self, run: str) -> Ended | None:
        """How it ended, None while it is under way or will be."""

    def cancel(self, run: str) -> None:
        """Nobody waits for it any more."""


@dataclass
class Turn:
    """A subject between its beginning and its outcome. `needs`: what it waits for (`flows.personalize.advance`); `sent`: how often that was sent."""

    subject: str
    asked: str
    needs: Mapping[str, Any] | None = None
    sent: int = 0


@dataclass(frozen=True)
class _Batch:
    flow: FlowName
    run: str
    turns: Sequence[Turn]
    sent_at: float                      # monotonic


@dataclass
class Batches:
    """The turns of a night whose stages workers make. One thread: workers are what runs side by side."""

    tools: Tools
    night: str
    tonight: dict[str, Outcome]
    pools: Pools
    advance: Callable[[str], Mapping[str, Any]]
    pause: Callable[[float], None] = time.sleep
    seconds: dict[str, float] = field(default_factory=dict)             # per stage, of what workers made
    busy_s: dict[str, float] = field(default_factory=dict)              # per flow
    _ready: deque[tuple[Turn, Ended | None]] = field(default_factory=deque)
    _waiting: dict[FlowName, deque[Turn]] = field(default_factory=lambda: {"preparing": deque(), "training": deque()})
    _under_way: list[_Batch] = field(default_factory=list)

    def run(self, turns: Iterator[tuple[str, str]]) -> None:
        """Every turn to its outcome: as many are begun as keep the workers busy, those that are back come first."""
        night, deploy = self.tools.settings.night, self.tools.settings.deploy
        ahead = night.batch * (deploy.training_slots + 2)
        more = True
        while True:
            happened = self._collect()
            if self._ready:
                self._advance(*self._ready.popleft())
                happened = True
            elif more and self._active() < ahead:
                begun = next(turns, None)
                if (more := begun is not None) and begun is not None:
                    self._advance(Turn(*begun), None)
                happened = True
            happened |= self._send(more and self._active() < ahead)
            if not more and not self._active():
                return
            if not happened:
                self.pause(LOOK_S)

    def _active(self) -> int:
        return len(self._ready) + sum(map(len, self._waiting.values())) + sum(len(batch.turns) for batch in self._under_way)

    def _advance(self, at: Turn, ended: Ended | None) -> None:
        with turn(self.tools, at.subject, self.night, self.tonight, at.asked):
            result = self.advance(at.subject)
            if (needs := result.get("needs")) is None:
                settle(self.tools, at.subject, self.night, self.tonight, answer(result, self.night, at.asked))
            else:
                _check(at, needs, ended)
                at.sent = at.sent if ended is not None and _same(at.needs, needs) else 0
                at.needs = needs
                flow: FlowName = needs["flow"]
                self._waiting[flow].append(at)

    def _collect(self) -> bool:
        """Take back what has ended, and give up what takes too long."""
        back = []
        for batch in self._under_way:
            ended = self.pools.ended(batch.run)
            if ended is None and time.monotonic() - batch.sent_at > self.tools.settings.night.batch_wait_s:
                self.pools.cancel(batch.run)
                ended = Ended(False, "too late")
                for at in batch.turns:
                    at.sent = MOST_SENDS
            if ended is not None:
                back.append((batch, ended))
        for batch, ended in back:
            self._under_way.remove(batch)
            self.busy_s[batch.flow] = round(self.busy_s.get(batch.flow, 0.0) + ended.busy_s, 3)
            for stage, seconds in ended.seconds.items():
                self.seconds[stage] = round(self.seconds.get(stage, 0.0) + seconds, 3)
            self._ready.extend((at, ended) for at in batch.turns)
        return bool(back)

    def _send(self, beginning: bool) -> bool:
        """Send every full batch, and what there is where nobody else can join it; `beginning`: further turns will begin now."""
        night, deploy = self.tools.settings.night, self.tools.settings.deploy
        before = len(self._under_way)
        # one batch more than there are slots lies ready, so that no GPU waits for us
        self._send_of("preparing", math.ceil(night.batch / deploy.cpu_slots), most=2 * deploy.cpu_slots, joining=beginning or bool(self._ready))
        joining = beginning or bool(self._ready or self._waiting["preparing"]) or any(b.flow == "preparing" for b in self._under_way)
        self._send_of("training", night.batch, most=deploy.training_slots + 1, joining=joining)
        return len(self._under_way) > before

    def _send_of(self, flow: FlowName, size: int, *, most: int, joining: bool) -> None:
        waiting = self._waiting[flow]
        while waiting and sum(b.flow == flow for b in self._under_way) < most and (len(waiting) >= size or not joining):
            turns = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            try:
                run = self.pools.send(flow, _parameters(flow, turns))
            except (RecipeError, ServerUnreachable) as e:
                for at in turns:
                    with turn(self.tools, at.subject, self.night, self.tonight, at.asked):
                        raise e
                continue
            for at in turns:
                at.sent += 1
            self._under_way.append(_Batch(flow, run, turns, time.monotonic()))


def _parameters(flow: FlowName, turns: Sequence[Turn]) -> dict[str, Any]:
    """Ids, digests and recipes: they stay in Prefect's database."""
    if flow == "preparing":
        return {"subjects": [at.subject for at in turns]}
    return {"trainings": [{"subject": at.subject, "training_set": at.needs["training_set"], "recipe": at.needs["recipe"], "more": at.needs["more"]} for at in turns if at.needs]}


def _same(before: Mapping[str, Any] | None, needs: Mapping[str, Any]) -> bool:
    return before is not None and all(before[name] == needs[name] for name in ("flow", "training_set", "recipe", "more"))


def _check(at: Turn, needs: Mapping[str, Any], ended: Ended | None) -> None:
    """Whether what a subject needs is worth sending.

    Raises:
        LikenessError: of the class with which a worker gave it up; or a worker has not published what it was sent for.
    """
    if ended is None or at.needs is None or not _same(at.needs, needs):
        return
    tried = needs["stage"] != at.needs["stage"] or needs["attempts"] > at.needs["attempts"]
    if needs["error"] is not None and tried:
        raise error_of(needs["error"], f"{needs['stage']} failed on a worker ({needs['error']}): the worker's log says more")
    if ended.completed:
        raise BadSettings(f"a worker went through {needs['flow']} and {needs['stage']} is not published under the key that is expected here: give all workers the "
                          "same code, settings and base")
    if at.sent >= MOST_SENDS:
        raise ServerUnreachable(f"{needs['flow']} on a worker ended as {ended.state!r} and is not sent again tonight: the Prefect server and the worker's log say why")


def one_on_workers(tools: Tools, subject: str, advance: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """One subject by hand: batches of one. Returns the document of `likeness run --json`.

    Raises:
        LikenessError: what a turn of a night would note.
    """
    pools, at, ended = PrefectPools(), Turn(subject, ""), None
    while (needs := (result := advance(subject)).get("needs")) is not None:
        _check(at, needs, ended)
        at.sent, at.needs = (at.sent if ended is not None and _same(at.needs, needs) else 0) + 1, needs
        run = pools.send(needs["flow"], _parameters(needs["flow"], [at]))
        sent_at = time.monotonic()
        while (ended := pools.ended(run)) is None:
            if time.monotonic() - sent_at > tools.settings.night.batch_wait_s:
                pools.cancel(run)
                ended, at.sent = Ended(False, "too late"), MOST_SENDS
                break
            time.sleep(LOOK_S)
    return result


class PrefectPools:
    """The deployments that `likeness deploy` made, through the Prefect server of this process."""

    def __init__(self) -> None:
        self._client: SyncPrefectClient = get_client(sync_client=True)
        self._crashed: dict[str, float] = {}

    def send(self, flow: FlowName, parameters: Mapping[str, Any]) -> str:
        """See Pools.

        Raises:
            RecipeError: there is no such deployment.
            ServerUnreachable.
        """
        # a request that is repeated by the client makes one run; a parent that is started again makes another, which finds in the Store what is there
        key = digest.of_json([flow, parameters, flow_run.id, flow_run.run_count, time.monotonic()])
        try:
            run = cast(FlowRun, run_deployment(f"{flow}/{NAME}", parameters=dict(parameters), timeout=0, idempotency_key=key))
        except ObjectNotFound as e:
            raise RecipeError(f"the Prefect server has no deployment {flow}/{NAME}: run `likeness deploy`") from e
        except httpx.HTTPError as e:
            raise ServerUnreachable(f"the Prefect server did not take a batch ({type(e).__name__}): the next night tries again") from e
        return str(run.id)

    def ended(self, run: str) -> Ended | None:
        """See Pools. A server that does not answer now may in a moment."""
        try:
            found = self._client.read_flow_run(UUID(run))
        except httpx.HTTPError as e:
            log.warning("the Prefect server does not say how a batch fares (%s)", type(e).__name__)
            return None
        except ObjectNotFound:
            return Ended(False, "deleted")                   # by `forget` of one of its subjects: the others are sent again
        state = found.state
        if state is None or not state.is_final():
            self._crashed.pop(run, None)
            return None
        if state.is_crashed() and time.monotonic() - self._crashed.setdefault(run, time.monotonic()) < COMES_BACK_S:
            return None
        return Ended(state.is_completed(), state.name or "", found.total_run_time.total_seconds(), _seconds(state.message) if state.is_completed() else {})

    def cancel(self, run: str) -> None:
        """See Pools."""
        try:
            self._client.set_flow_run_state(UUID(run), Cancelling())
        except httpx.HTTPError as e:
            log.warning("a batch that takes too long could not be cancelled (%s)", type(e).__name__)


def told(seconds: Mapping[str, float], failed: Mapping[str, int]) -> str:
    """The message with which a worker's run ends: its numbers, no ids."""
    return json.dumps({"seconds": {stage: round(s, 3) for stage, s in seconds.items()}, "failed": failed}, sort_keys=True)


def _seconds(message: str | None) -> dict[str, float]:
    try:
        return {str(stage): float(s) for stage, s in json.loads(message or "")["seconds"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
