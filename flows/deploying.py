"""deploy: what a Prefect server must hold for the nights, compared with what it holds, and made so.

    settings -> plan_of -> read what is there -> differences -> apply

Work pools and their queues carry the limits: a slot of a pool frees itself with its run, one of Prefect's global limits was seen to outlive it (docs/log.md). What an
operator changed by hand and the settings do not speak of stays: paused pools and schedules, other schedules, the type of a pool that was there.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import httpx
import yaml
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, DeploymentUpdate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from pydantic import ValidationError

from flows.automations import AutomationPlan, automation_facts, automations_of, make_automation
from likeness.errors import BadSettings, ServerUnreachable
from likeness.settings import Settings

if TYPE_CHECKING:
    from uuid import UUID

NAME = "likeness"               # of every deployment: nightly/likeness, personalize/likeness
TAGS = ["likeness"]
SLUG = "likeness"               # by which a later deploy finds its own schedule again
RECOVERY = "recover"            # the queue of pool `control` that only `recover` is in
RECOVERY_SLOTS = 2              # one may be held by a recovery that died with its worker: the other one ends it


@dataclass(frozen=True)
class PoolPlan:
    """A work pool; `slots` flow runs at once, over all its workers."""

    name: str
    slots: int
    description: str

    @property
    def label(self) -> str:
        """What people read."""
        return f"work pool {self.name}"

    def facts(self) -> dict[str, Any]:
        """What is compared with the server's."""
        return {"slots": self.slots, "description": self.description}


@dataclass(frozen=True)
class QueuePlan:
    """A queue of a work pool with a limit of its own, within that of the pool."""

    pool: str
    name: str
    slots: int
    description: str

    @property
    def label(self) -> str:
        """What people read."""
        return f"queue {self.name} of work pool {self.pool}"

    def facts(self) -> dict[str, Any]:
        """What is compared with the server's."""
        return {"slots": self.slots, "description": self.description}


@dataclass(frozen=True)
class DeploymentPlan:
    """A flow by its module path, the pool it runs on, and when."""

    flow: str
    entrypoint: str
    pool: str
    description: str
    schema: dict[str, Any]              # of the flow's parameters, JSON Schema
    values: dict[str, Any]              # of those that are not left to whoever starts it
    cron: str | None = None
    timezone: str | None = None
    queue: str = "default"

    @property
    def full_name(self) -> str:
        """As Prefect has it: flow/deployment."""
        return f"{self.flow}/{NAME}"

    @property
    def label(self) -> str:
        """What people read."""
        return f"deployment {self.full_name}"

    def facts(self) -> dict[str, Any]:
        """What is compared with the server's."""
        return {"entrypoint": self.entrypoint, "pool": self.pool, "queue": self.queue, "description": self.description, "tags": TAGS, "cron": self.cron, "timezone": self.timezone,
                "values": self.values, "parameters": self.schema}


@dataclass(frozen=True)
class Plan:
    """Everything that `deploy` makes."""

    pools: tuple[PoolPlan, ...]
    deployments: tuple[DeploymentPlan, ...]
    automations: tuple[AutomationPlan, ...] = ()
    queues: tuple[QueuePlan, ...] = ()


@dataclass(frozen=True)
class Difference:
    """One thing that is missing on the server, or one field of it that is otherwise there."""

    what: str
    field: str | None                   # None: the whole thing is missing
    found: Any = None
    wanted: Any = None

    def as_json(self) -> dict[str, Any]:
        """One entry of `likeness deploy --json`."""
        return {"what": self.what, "action": "create" if self.field is None else "change", "field": self.field, "from": self.found, "to": self.wanted}


def plan_of(settings: Settings) -> Plan:
    """What the settings ask of a Prefect server.

    Raises:
        BadSettings: if `schedule.cron` looks like a cron line and is none.
    """
    deploy, schedule = settings.deploy, settings.schedule
    try:
        CronSchedule(cron=schedule.cron, timezone=schedule.timezone)
    except ValidationError as e:
        raise BadSettings(f"settings:\n  schedule.cron: found {schedule.cron!r}, which no clock reads; needed are minute, hour, day of month, month and day of "
                          "week within their limits, for example '0 2 * * *'") from e
    return Plan(
        pools=(PoolPlan(deploy.control_pool, deploy.control_slots + RECOVERY_SLOTS, "Likeness: workers that orchestrate, judge and register"),
               PoolPlan(deploy.cpu_pool, deploy.cpu_slots, "Likeness: workers without a GPU"),
               PoolPlan(deploy.gpu_pool, deploy.gpu_slots, "Likeness: workers with a GPU, one slot for each")),
        deployments=(_deployment("nightly", deploy.control_pool, "Personalise everybody who is due", values={"on_workers": True}, cron=schedule.cron,
                                 timezone=schedule.timezone),
                     _deployment("personalize", deploy.control_pool, "Personalise one enrolled subject", values={"on_workers": True}),
                     _deployment("preparing", deploy.cpu_pool, "Photos to training sets, for a batch of subjects"),
                     _deployment("training", deploy.training_pool, "Training sets to adapters and samples, for a batch of subjects"),
                     _deployment("recover", deploy.control_pool, "End what dead workers hold, begin again what they left half made", cron=f"*/{deploy.recover_every_min} * * * *",
                                 timezone="UTC", queue=RECOVERY)),
        # whoever fills the one queue leaves the other one its slots: a night waits for no recovery, and a recovery finds room when every other slot is held by the dead
        queues=(QueuePlan(deploy.control_pool, "default", deploy.control_slots, "Likeness: nights, and subjects by hand"),
                QueuePlan(deploy.control_pool, RECOVERY, RECOVERY_SLOTS, "Likeness: recover alone")),
        automations=automations_of(TAGS[0], silent_after_s=deploy.silent_after_s, most_starts=deploy.most_starts))


def _deployment(name: str, pool: str, description: str, *, values: dict[str, Any] | None = None, cron: str | None = None,
                timezone: str | None = None, queue: str = "default") -> DeploymentPlan:
    flow = getattr(import_module(f"flows.{name}"), name)
    # By module path: the file form would put flows/ first on the path of imports
    return DeploymentPlan(name, f"flows.{name}.{name}", pool, description, flow.parameters.model_dump(mode="json"), values or {}, cron, timezone, queue)


def as_prefect_yaml(plan: Plan) -> str:
    """The deployments of a plan as `prefect deploy --all` reads them. Pools have no place in that file: they are named in its comments."""
    head = ["# Written by `likeness deploy --yaml`; a test compares the two. `likeness deploy` makes the same, and the work pools besides.",
            "# With Prefect's own tool:"]
    head += [f"#   prefect work-pool create {p.name} --type process && prefect work-pool set-concurrency-limit {p.name} {p.slots}" for p in plan.pools]
    head += [f"#   prefect work-queue create {q.name} --pool {q.pool} --limit {q.slots} --priority 1" if q.name == RECOVERY else
             f"#   prefect work-queue set-concurrency-limit {q.name} {q.slots} --pool {q.pool}" for q in plan.queues]
    head += ["#   prefect --no-prompt deploy --all --prefect-file infra/prefect.yaml"]
    deployments = []
    for d in plan.deployments:
        entry: dict[str, Any] = {"name": NAME, "description": d.description, "tags": [*TAGS], "entrypoint": d.entrypoint, "work_pool": {"name": d.pool}}
        if d.queue != "default":
            entry["work_pool"]["work_queue_name"] = d.queue
        if d.values:
            entry["parameters"] = d.values
        if d.cron is not None:
            entry["schedules"] = [{"cron": d.cron, "timezone": d.timezone, "slug": SLUG}]
        deployments.append(entry)
    # no pull steps: the code is installed where the worker is, and imported by its module path
    return "\n".join([*head, yaml.safe_dump({"name": NAME, "pull": [], "deployments": deployments}, sort_keys=False, width=150, allow_unicode=True)])


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[PrefectClient]:
    """A client of the server at `address`.

    Raises:
        ServerUnreachable: if it does not answer, or answers with an error.
    """
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    host = httpx.URL(address).host
    try:
        with temporary_settings(updates={PREFECT_CLIENT_MAX_RETRIES: 1}):
            async with PrefectClient(address) as client:
                if (trouble := await client.api_healthcheck()) is not None:
                    raise ServerUnreachable(f"the Prefect server at {host!r} (PREFECT_API_URL) does not answer ({type(trouble).__name__}): check the address, which "
                                            "ends with /api, and that `prefect server start` runs there")
                yield client
    except httpx.HTTPStatusError as e:
        raise ServerUnreachable(f"the Prefect server at {host!r} refused {e.request.method} {e.request.url.path} with status {e.response.status_code}: check that it "
                                "is of version 3.8 and that you may change work pools and deployments") from e
    except httpx.TransportError as e:
        raise ServerUnreachable(f"the Prefect server at {host!r} stopped answering ({type(e).__name__}): run the same command again") from e


async def differences(client: PrefectClient, plan: Plan) -> list[Difference]:
    """What `apply` would do; empty if the server holds the plan already."""
    found: list[Difference] = []
    for pool in plan.pools:
        found += _compared(pool, await _pool_facts(client, pool.name))
    for queue in plan.queues:
        found += _compared(queue, await _queue_facts(client, queue))
    for deployment in plan.deployments:
        found += _compared(deployment, await _deployment_facts(client, deployment.full_name))
    for automation in plan.automations:
        found += _compared(automation, await automation_facts(client, automation.name))
    return found


def _compared(wanted: PoolPlan | QueuePlan | DeploymentPlan | AutomationPlan, there: dict[str, Any] | None) -> list[Difference]:
    if there is None:
        return [Difference(wanted.label, None)]
    return [Difference(wanted.label, name, there[name], value) for name, value in wanted.facts().items() if there[name] != value]


async def _pool_facts(client: PrefectClient, name: str) -> dict[str, Any] | None:
    try:
        pool = await client.read_work_pool(name)
    except ObjectNotFound:
        return None
    return {"slots": pool.concurrency_limit, "description": pool.description}


async def _queue_facts(client: PrefectClient, plan: QueuePlan) -> dict[str, Any] | None:
    try:
        queue = await client.read_work_queue_by_name(plan.name, work_pool_name=plan.pool)
    except ObjectNotFound:
        return None
    return {"slots": queue.concurrency_limit, "description": queue.description}


async def _deployment_facts(client: PrefectClient, full_name: str) -> dict[str, Any] | None:
    try:
        there = await client.read_deployment_by_name(full_name)
    except ObjectNotFound:
        return None
    schedule = _own(there.schedules)
    cron = schedule.schedule if schedule is not None and isinstance(schedule.schedule, CronSchedule) else None
    return {"entrypoint": there.entrypoint, "pool": there.work_pool_name, "queue": there.work_queue_name, "description": there.description, "tags": there.tags,
            "cron": None if cron is None else cron.cron, "timezone": None if cron is None else cron.timezone, "values": there.parameters or {},
            "parameters": there.parameter_openapi_schema}


def _own(schedules: Sequence[DeploymentSchedule]) -> DeploymentSchedule | None:
    return next((s for s in schedules if s.slug == SLUG), None)


async def apply(client: PrefectClient, plan: Plan) -> list[Difference]:
    """Make the server hold the plan; returns what was different. May be called any number of times."""
    found = await differences(client, plan)
    different = {d.what for d in found}
    for pool in plan.pools:
        if pool.label in different:
            await _make_pool(client, pool)
    for queue in plan.queues:
        if queue.label in different:
            await _make_queue(client, queue)
    for deployment in plan.deployments:
        if deployment.label in different:
            await _make_deployment(client, deployment)
    for automation in plan.automations:
        if automation.label in different:
            await make_automation(client, automation)
    return found


async def _make_pool(client: PrefectClient, pool: PoolPlan) -> None:
    if await _pool_facts(client, pool.name) is None:
        await client.create_work_pool(WorkPoolCreate(name=pool.name, type="process", description=pool.description, concurrency_limit=pool.slots,
                                                     base_job_template=await _process_template()), overwrite=True)
    else:
        await client.update_work_pool(pool.name, WorkPoolUpdate(description=pool.description, concurrency_limit=pool.slots))


async def _make_queue(client: PrefectClient, plan: QueuePlan) -> None:
    """A pool that was made just now has its default queue."""
    if await _queue_facts(client, plan) is None:
        await client.create_work_queue(plan.name, work_pool_name=plan.pool, concurrency_limit=plan.slots, description=plan.description, priority=1)
    else:
        there = await client.read_work_queue_by_name(plan.name, work_pool_name=plan.pool)
        await client.update_work_queue(there.id, concurrency_limit=plan.slots, description=plan.description)


async def _process_template() -> dict[str, Any]:
    """The job template of the worker that is installed here: without it the pool would not take working_dir and env."""
    from prefect.workers.process import ProcessWorker

    return ProcessWorker.get_default_base_job_template()


async def _make_deployment(client: PrefectClient, plan: DeploymentPlan) -> None:
    try:
        there = await client.read_deployment_by_name(plan.full_name)
    except ObjectNotFound:
        flow_id = await client.create_flow_from_name(plan.flow)
        made = await client.create_deployment(flow_id, NAME, entrypoint=plan.entrypoint, work_pool_name=plan.pool, work_queue_name=plan.queue,
                                              description=plan.description, tags=TAGS, parameters=plan.values, parameter_openapi_schema=plan.schema, enforce_parameter_schema=False)
        await _make_schedule(client, made, plan, None)
        return
    await client.update_deployment(there.id, DeploymentUpdate(entrypoint=plan.entrypoint, work_pool_name=plan.pool, work_queue_name=plan.queue, description=plan.description,
                                                              tags=TAGS, parameters=plan.values, parameter_openapi_schema=plan.schema))
    await _make_schedule(client, there.id, plan, _own(there.schedules))


async def _make_schedule(client: PrefectClient, deployment: UUID, plan: DeploymentPlan, there: DeploymentSchedule | None) -> None:
    if plan.cron is None:
        if there is not None:
            await client.delete_deployment_schedule(deployment, there.id)
        return
    schedule = CronSchedule(cron=plan.cron, timezone=plan.timezone)
    if there is None:
        await client.create_deployment_schedules(deployment, [DeploymentScheduleCreate(schedule=schedule, slug=SLUG)])
    elif there.schedule != schedule:
        await client.update_deployment_schedule(deployment, there.id, schedule=schedule)       # whether it is paused is the operator's to say
