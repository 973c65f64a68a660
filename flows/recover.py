"""recover: what goes on by itself between the nights, every few minutes, on workers of pool `control`.

    runs of dead workers -> crashed      a night that crashed for good -> the same night again      subjects left half made -> personalize

A crashed run starts again by itself, some times (flows.automations). What is left when it does not is looked for among runs that crashed for good within a day, for
listing every claim of a large store every few minutes would cost more than the nights. The Store decides: a subject goes on if a claim of theirs has expired, or if
their own `personalize` is what crashed. Everything is begun again once: by a key that names the claim or the run, never because of a run that was itself begun
again, and not where so many have died over one stage that the next may too.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterEndTime,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterIdempotencyKey,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed

from flows.batches import COMES_BACK_S
from flows.deploying import NAME
from flows.recovering import PAGE, UNDER_WAY, declare_crashed, lost_runs, unfinished_uploads
from flows.turns import last_known
from likeness import digest
from likeness.errors import LikenessError
from likeness.once import HeldClaim, expired_claims, held_claims
from likeness.records import Record
from tasks.runtime import Tools, runtime

WORKING = ("nightly", "personalize", "preparing", "training")
AGAIN = "likeness-again"                # the tag of runs that were begun here: one that crashes is no reason for another
LOOKS_BACK = timedelta(days=1)          # the next night has them all
FINISHED = [StateType.COMPLETED, StateType.CRASHED, StateType.CANCELLED, StateType.FAILED]


class Recovered(Record):
    """Numbers of one recovery; no ids."""

    declared_crashed: int = 0
    uploads: int = 0
    nights: int = 0
    subjects: int = 0


@flow(name="recover", flow_run_name="recover", persist_result=False, validate_parameters=False)
async def recover() -> Any:
    """End what dead workers hold, begin again what they left half made.

    Returns:
        A state whose message is a Recovered.
    """
    async with get_client() as client:
        numbers = await recovered(client, runtime())
    return Completed(message=json.dumps(numbers.plain(), sort_keys=True))


async def recovered(client: PrefectClient, tools: Tools) -> Recovered:
    """One recovery; two at once do no harm.

    Raises:
        LikenessError: the bucket does not say which uploads are unfinished. What comes before is done.
    """
    deploy = tools.settings.deploy
    await _sweep_own_runs(client)
    declared = await declare_crashed(client, await lost_runs(client, (deploy.control_pool, deploy.cpu_pool, deploy.gpu_pool)))
    seen = await _look(client, deploy.most_starts)
    nights = subjects = 0
    if not seen.night_under_way:                               # it takes everybody who is left
        nights = await _night_again(client, seen)
        if not nights:
            subjects = await _subjects_again(client, tools, seen)
    uploads = len(unfinished_uploads(tools, abort=True))
    return Recovered(declared_crashed=len(declared), uploads=uploads, nights=nights, subjects=subjects)


@dataclass(frozen=True)
class _Seen:
    """What the server knows of our deployments: what is under way or should be, what crashed for good within a day, when a night was last done."""

    deployments: Mapping[str, DeploymentResponse]
    under_way: Sequence[tuple[str, FlowRun]]
    crashed: Sequence[tuple[str, FlowRun]]
    nights_done_at: datetime | None

    @property
    def night_under_way(self) -> bool:
        return any(name == "nightly" for name, _ in self.under_way)


async def _look(client: PrefectClient, most_starts: int) -> _Seen:
    deployments = {name: await client.read_deployment_by_name(f"{name}/{NAME}") for name in WORKING}
    names = {there.id: name for name, there in deployments.items()}
    now = datetime.now(UTC)

    async def runs(states: Iterable[StateType], **more: Any) -> list[tuple[str, FlowRun]]:
        return [(names[run.deployment_id], run) for run in await _runs(client, list(names), states, **more) if run.deployment_id is not None]

    under_way = await runs(UNDER_WAY) + await runs([StateType.SCHEDULED], expected_start_time=FlowRunFilterExpectedStartTime(before_=now))
    ended = await runs([StateType.CRASHED, StateType.COMPLETED], end_time=FlowRunFilterEndTime(after_=now - LOOKS_BACK))
    # one that may still be set to run again is left alone
    for_good = [(name, run) for name, run in ended if run.state_type == StateType.CRASHED and AGAIN not in run.tags
                and (run.run_count >= most_starts or _ended(run) < now - timedelta(seconds=COMES_BACK_S))]
    done = [_ended(run) for name, run in ended if name == "nightly" and run.state_type == StateType.COMPLETED]
    return _Seen(deployments, under_way, for_good, max(done, default=None))


def _ended(run: FlowRun) -> datetime:
    return run.end_time or datetime.min.replace(tzinfo=UTC)


async def _runs(client: PrefectClient, deployments: Sequence[UUID], states: Iterable[StateType], **more: Any) -> list[FlowRun]:
    found: list[FlowRun] = []
    while True:
        page = await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))), **more),
                                           deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=list(deployments))), limit=PAGE, offset=len(found))
        found += page
        if len(page) < PAGE:
            return found


async def _night_again(client: PrefectClient, seen: _Seen) -> int:
    """The last night that crashed for good, under its own id, unless one was done since or nobody wants nights now: their schedule is paused."""
    there = seen.deployments["nightly"]
    crashed = [run for name, run in seen.crashed if name == "nightly" and (seen.nights_done_at is None or _ended(run) > seen.nights_done_at)]
    if not crashed or there.paused or not any(schedule.active for schedule in there.schedules):
        return 0
    last = max(crashed, key=_ended)
    night = last.parameters.get("night") or (last.expected_start_time or _ended(last)).astimezone(UTC).date().isoformat()
    parameters = {name: value for name, value in last.parameters.items() if value is not None} | {"night": night}
    return await _begin(client, there, parameters, digest.of_json(["recover", "night", night]))


async def _subjects_again(client: PrefectClient, tools: Tools, seen: _Seen) -> int:
    deploy = tools.settings.deploy
    taken = {subject for name, run in seen.under_way for subject in _subjects_of(name, run)}
    room = max(1, deploy.control_slots - 1) - sum(name == "personalize" and AGAIN in run.tags for name, run in seen.under_way)      # the night has a slot to come into
    own: dict[str, str] = {}                                   # subject to the run of theirs alone that crashed
    named: set[str] = set()
    for name, run in seen.crashed:
        named.update(_subjects_of(name, run))
        if name == "personalize":
            own.update(dict.fromkeys(_subjects_of(name, run), str(run.id)))
    left: dict[str, tuple[str, list[HeldClaim]]] = {}          # subject to the key of what would be begun, and the claims that must have expired
    for subject in sorted(named - taken):
        if not _may(tools, subject):
            continue
        claims = held_claims(tools.store, subject)
        if any(claim.attempt >= deploy.most_starts for claim in claims):
            continue                                           # too many died over it
        if claims or subject in own:
            left[subject] = digest.of_json(["recover", claims[0].key, claims[0].token] if claims else ["recover", own[subject]]), claims
    before = await _begun(client, [key for key, _ in left.values()])
    left = {subject: (key, claims) for subject, (key, claims) in left.items() if key not in before}
    watched = [claim for _, claims in left.values() for claim in claims]
    expired = {claim.key for claim in await asyncio.to_thread(expired_claims, tools.store, watched)}
    ready = [(subject, key) for subject, (key, claims) in left.items() if all(claim.key in expired for claim in claims)]
    return sum([await _begin(client, seen.deployments["personalize"], {"subject": subject}, key) for subject, key in ready[:max(0, room)]])


def _subjects_of(name: str, run: FlowRun) -> list[str]:
    """Whom a run is for, by its parameters. A night names nobody."""
    given = run.parameters
    found = {"personalize": [given.get("subject")], "preparing": given.get("subjects") or [],
             "training": [asked.get("subject") for asked in given.get("trainings") or []]}.get(name, [])
    return [subject for subject in found if isinstance(subject, str)]


def _may(tools: Tools, subject: str) -> bool:
    """Whether a subject may go on without a person: enrolled, not forgotten, not paused, not set aside by the nights."""
    try:
        if tools.standing(subject).paused:
            return False
    except LikenessError:
        return False
    last = last_known(tools, subject)
    return last is None or last.kind != "failed" or last.failures < tools.settings.night.set_aside_after


async def _begin(client: PrefectClient, deployment: DeploymentResponse, parameters: Mapping[str, Any], key: str) -> int:
    """One run for one key, ever; how many were made now."""
    if await _begun(client, [key]):
        return 0
    await client.create_flow_run_from_deployment(deployment.id, parameters=dict(parameters), tags=[AGAIN], idempotency_key=key)
    return 1


async def _begun(client: PrefectClient, keys: Sequence[str]) -> set[str]:
    """Those of these keys for which a run was made."""
    found: set[str] = set()
    for at in range(0, len(keys), PAGE):
        some = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(keys[at:at + PAGE])))
        found |= {run.idempotency_key for run in await client.read_flow_runs(flow_run_filter=some, limit=PAGE) if run.idempotency_key is not None}
    return found


async def _sweep_own_runs(client: PrefectClient) -> None:
    """Delete recoveries that are overdue, which this one stands for, and those that ended more than a day ago: hundreds a day would fill the server's database."""
    own = [(await client.read_deployment_by_name(f"recover/{NAME}")).id]
    now = datetime.now(UTC)
    overdue = await _runs(client, own, [StateType.SCHEDULED], expected_start_time=FlowRunFilterExpectedStartTime(before_=now))
    for run in overdue + await _runs(client, own, FINISHED, end_time=FlowRunFilterEndTime(before_=now - LOOKS_BACK)):
        try:
            await client.delete_flow_run(run.id)
        except ObjectNotFound:                                 # another recovery was quicker
            pass
