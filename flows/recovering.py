"""recover: runs that Prefect believes to be under way and whose worker is gone, claims that a dead process left, and uploads in parts that it did not finish.

A run of a dead worker keeps the slot of its pool for ever, so that no night begins after it: it is declared crashed. A claim needs nothing: whoever comes
next takes it over, at once on the machine of the dead process, after its TTL elsewhere. So claims are shown and left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkerFilter,
    WorkerFilterStatus,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

from flows.deploying import NAME
from likeness.settings import S3StoreSettings

if TYPE_CHECKING:
    from likeness.s3 import Upload
    from tasks.runtime import Tools

UNDER_WAY = [StateType.PENDING, StateType.RUNNING, StateType.CANCELLING]        # the states that hold a slot
WORKER = "prefect.worker.name"                                                  # the label by which Prefect notes who took a run
PAGE = 200
UPLOAD_S = 86_400.0             # an upload in parts takes minutes; one that was begun a day ago is nobody's any more


@dataclass(frozen=True)
class LostRun:
    """A flow run that is under way for the server, and whose worker has not been heard of for its 90 s."""

    id: UUID
    name: str
    pool: str
    worker: str
    state: str
    since: str | None           # UTC

    def as_json(self) -> dict[str, Any]:
        """One entry of `runs` of `likeness recover --json`."""
        return asdict(self) | {"id": str(self.id)}


async def lost_runs(client: PrefectClient, pools: Iterable[str]) -> list[LostRun]:
    """Our deployments' runs whose worker is gone. A run that no worker took, or that was started by hand, is nobody's to judge.

    Only in pools of type process is a run a child of its worker: a pod outlives it, and its own heartbeat is what tells.
    """
    found = []
    for pool in pools:
        for run in await _under_way(client, pool) if await _of_processes(client, pool) else ():
            worker = str(run.labels.get(WORKER, ""))
            if worker and not await _online(client, pool, worker):
                found.append(LostRun(run.id, run.name, pool, worker, run.state_name or "", None if run.start_time is None else run.start_time.isoformat()))
    return found


async def declare_crashed(client: PrefectClient, lost: Iterable[LostRun]) -> list[LostRun]:
    """Say so to the server; returns those that were still under way when it was their turn."""
    declared = []
    for run in lost:
        now = await client.read_flow_run(run.id)
        if now.state_type in UNDER_WAY and now.labels.get(WORKER) == run.worker:
            await client.set_flow_run_state(run.id, Crashed(message=f"worker {run.worker} is gone: declared by `likeness recover`"), force=True)
            declared.append(run)
    return declared


def unfinished_uploads(tools: Tools, *, abort: bool = False) -> Sequence[Upload]:
    """What writers that were killed left in the bucket, none if the store is a folder; with `abort` it is deleted."""
    if not isinstance(tools.settings.store, S3StoreSettings):
        return []
    from likeness.s3 import S3Store  # boto3 takes its time to load

    store = tools.bare_store
    assert isinstance(store, S3Store)
    found = store.unfinished(older_than_s=UPLOAD_S)
    for upload in found if abort else ():
        store.abort(upload)
    return found


async def _of_processes(client: PrefectClient, pool: str) -> bool:
    try:
        return (await client.read_work_pool(pool)).type == "process"
    except ObjectNotFound:
        return False


async def _under_way(client: PrefectClient, pool: str) -> list[Any]:
    found: list[Any] = []
    while True:
        page = await client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=UNDER_WAY))),
                                           deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=[NAME])),
                                           work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])), limit=PAGE, offset=len(found))
        found += page
        if len(page) < PAGE:
            return found


async def _online(client: PrefectClient, pool: str, worker: str) -> bool:
    """Whether the server has heard of a worker lately. Asked for each run: workers may come back while we look."""
    online = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    offset = 0
    while True:
        page = await client.read_workers_for_work_pool(pool, online, offset=offset, limit=PAGE)
        if any(w.name == worker for w in page):
            return True
        if len(page) < PAGE:
            return False
        offset += PAGE
