"""`likeness deploy` and `recover`, against Prefect's own server, in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any
from uuid import UUID

import pytest
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import State
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Completed, Pending, Running

from flows.cli_operating import deploy
from flows.deploying import Plan, apply, connected, differences, plan_of
from flows.recovering import declare_crashed, lost_runs
from likeness.errors import BadSettings, RecipeError, ServerUnreachable
from likeness.settings import load_settings

Ask = Callable[[Callable[[PrefectClient], Awaitable[Any]]], Any]


@contextmanager
def _undone(patch: pytest.MonkeyPatch) -> Iterator[None]:
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """Runs a coroutine with a client of a Prefect server in this process, its database the session's own."""
    from prefect.client import base
    from prefect.server.api.server import create_app

    patient = pytest.MonkeyPatch()          # Prefect waits 30 s for its own server, a busy machine takes longer
    start = base.LifespanManager
    patient.setattr(base, "LifespanManager", lambda app, **_: start(app, startup_timeout=300, shutdown_timeout=60))
    with asyncio.Runner() as runner, _undone(patient):
        client = PrefectClient(create_app(ephemeral=True))
        runner.run(client.__aenter__())
        try:
            yield lambda what: runner.run(what(client))
        finally:
            runner.run(client.__aexit__(None, None, None))


def plan(**changed: object) -> Plan:
    return plan_of(load_settings(overrides={"deploy.control_pool": "test-control", "deploy.cpu_pool": "test-cpu", "deploy.gpu_pool": "test-gpu", **changed}))


def test_deploy_makes_everything_once_and_changes_only_what_differs(ask: Ask) -> None:
    planned = ask(lambda c: differences(c, plan()))
    assert [d.as_json()["action"] for d in planned] == ["create"] * 12
    assert ask(lambda c: apply(c, plan())) == planned
    assert ask(lambda c: differences(c, plan())) == []
    nightly = ask(lambda c: c.read_deployment_by_name("nightly/likeness"))
    assert (nightly.entrypoint, nightly.work_pool_name) == ("flows.nightly.nightly", "test-control")
    assert nightly.parameters == {"on_workers": True}
    training = ask(lambda c: c.read_deployment_by_name("training/likeness"))
    assert (training.entrypoint, training.work_pool_name, training.parameters) == ("flows.training.training", "test-gpu", {})
    assert [(s.schedule.cron, s.schedule.timezone, s.active) for s in nightly.schedules] == [("0 2 * * *", "UTC", True)]
    assert ask(lambda c: c.read_work_pool("test-gpu")).concurrency_limit == 1

    changed = plan(**{"deploy.gpu_slots": 4, "schedule.cron": "30 1 * * *", "schedule.timezone": "Europe/Zurich"})
    assert {(d.what, d.field, d.found, d.wanted) for d in ask(lambda c: apply(c, changed))} == {
        ("work pool test-gpu", "slots", 1, 4), ("deployment nightly/likeness", "cron", "0 2 * * *", "30 1 * * *"),
        ("deployment nightly/likeness", "timezone", "UTC", "Europe/Zurich")}
    after = ask(lambda c: c.read_deployment_by_name("nightly/likeness"))
    assert after.id == nightly.id
    assert [(s.id, s.schedule.cron, s.schedule.timezone) for s in after.schedules] == [(nightly.schedules[0].id, "30 1 * * *", "Europe/Zurich")]
    assert ask(lambda c: c.read_work_pool("test-gpu")).concurrency_limit == 4


def test_automations_follow_the_settings_and_one_that_is_switched_off_stays_so(ask: Ask) -> None:
    ask(lambda c: apply(c, plan()))
    silent, again = (ask(lambda c, n=a.name: c.read_automations_by_name(n))[0] for a in plan().automations)
    assert (silent.trigger.within.total_seconds(), silent.actions[0].state.value, silent.enabled) == (120.0, "CRASHED", True)
    assert (again.trigger.match["prefect.run-count"], again.actions[0].state.value) == (["1", "2"], "SCHEDULED")         # the third crash is the last
    ask(lambda c: c.pause_automation(again.id))
    changed = plan(**{"deploy.most_starts": 2, "deploy.silent_after_s": 60})
    assert {(d.what, d.field) for d in ask(lambda c: apply(c, changed)) if d.field == "trigger"} == {(a.label, "trigger") for a in changed.automations}
    assert ask(lambda c: differences(c, changed)) == []
    now = ask(lambda c: c.read_automations_by_name(again.name))
    assert [(a.id, a.enabled, a.trigger.match["prefect.run-count"]) for a in now] == [(again.id, False, ["1"])]
    ask(lambda c: apply(c, plan()))


def test_what_an_operator_changed_by_hand_and_no_setting_names_stays(ask: Ask) -> None:
    ask(lambda c: apply(c, plan()))
    nightly = ask(lambda c: c.read_deployment_by_name("nightly/likeness"))
    ask(lambda c: c.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=False))
    ask(lambda c: c.create_deployment_schedules(nightly.id, [DeploymentScheduleCreate(schedule=CronSchedule(cron="0 12 * * 0"), slug="by hand")]))
    ask(lambda c: c.update_work_pool("test-cpu", WorkPoolUpdate(is_paused=True)))
    ask(lambda c: apply(c, plan(**{"schedule.cron": "0 3 * * *", "deploy.cpu_slots": 7})))
    schedules = {s.slug: s for s in ask(lambda c: c.read_deployment_by_name("nightly/likeness")).schedules}
    assert (schedules["likeness"].schedule.cron, schedules["likeness"].active) == ("0 3 * * *", False)
    assert (schedules["by hand"].schedule.cron, schedules["by hand"].active) == ("0 12 * * 0", True)
    pool = ask(lambda c: c.read_work_pool("test-cpu"))
    assert (pool.concurrency_limit, pool.is_paused) == (7, True)


def test_recover_comes_every_few_minutes_in_a_queue_of_its_own(ask: Ask) -> None:
    ask(lambda c: apply(c, plan(**{"deploy.recover_every_min": 7, "deploy.control_slots": 3})))
    recover = ask(lambda c: c.read_deployment_by_name("recover/likeness"))
    assert [(s.schedule.cron, s.schedule.timezone) for s in recover.schedules] == [("*/7 * * * *", "UTC")]
    assert (recover.work_pool_name, recover.work_queue_name) == ("test-control", "recover")
    queues = {q.name: q.concurrency_limit for q in ask(lambda c: c.read_work_queues(work_pool_name="test-control"))}
    assert (queues, ask(lambda c: c.read_work_pool("test-control")).concurrency_limit) == ({"default": 3, "recover": 2}, 5)
    ask(lambda c: apply(c, plan()))


def test_a_pool_of_another_type_keeps_it(ask: Ask) -> None:
    ask(lambda c: c.create_work_pool(WorkPoolCreate(name="test-pods", type="kubernetes")))
    ask(lambda c: apply(c, plan(**{"deploy.gpu_pool": "test-pods", "deploy.gpu_slots": 3})))
    pool = ask(lambda c: c.read_work_pool("test-pods"))
    assert (pool.type, pool.concurrency_limit) == ("kubernetes", 3)


def test_runs_whose_worker_is_gone_are_declared_crashed_and_give_their_slot_back(ask: Ask) -> None:
    pools = ("test-cpu", "test-gpu")
    ask(lambda c: apply(c, plan(**{"deploy.gpu_slots": 9})))
    deployment = ask(lambda c: c.read_deployment_by_name("training/likeness"))

    def taken(worker: str | None, state: State | None) -> UUID:
        run = ask(lambda c: c.create_flow_run_from_deployment(deployment.id))
        if worker is not None:
            ask(lambda c: c.update_flow_run_labels(run.id, {"prefect.worker.name": worker}))
        if state is not None:
            ask(lambda c: c.set_flow_run_state(run.id, state, force=True))
        return UUID(str(run.id))

    ask(lambda c: c.send_worker_heartbeat("test-gpu", "living", heartbeat_interval_seconds=30))
    dead, dead_too = taken("dead", Running()), taken("dead", Pending())
    others = [taken("living", Running()), taken("dead", Completed()), taken(None, Running()), taken(None, None)]      # by hand; and scheduled
    before = [ask(lambda c, r=r: c.read_flow_run(r)).state_type for r in others]
    lost = ask(lambda c: lost_runs(c, pools))
    assert {(r.id, r.pool, r.worker, r.state) for r in lost} == {(dead, "test-gpu", "dead", "Running"), (dead_too, "test-gpu", "dead", "Pending")}
    held = ask(lambda c: c.read_work_pool("test-gpu")).active_slots
    ask(lambda c: c.set_flow_run_state(dead_too, Completed(), force=True))                  # it ended between the look and the word
    assert [r.id for r in ask(lambda c: declare_crashed(c, lost))] == [dead]
    run = ask(lambda c: c.read_flow_run(dead))
    assert (run.state_type.value, "likeness recover" in run.state.message) == ("CRASHED", True)
    assert ask(lambda c: c.read_work_pool("test-gpu")).active_slots == held - 2
    assert ask(lambda c: lost_runs(c, pools)) == []
    assert [ask(lambda c, r=r: c.read_flow_run(r)).state_type for r in others] == before


def test_a_pod_outlives_its_worker_and_is_not_declared_crashed(ask: Ask) -> None:
    ask(lambda c: c.create_work_pool(WorkPoolCreate(name="test-more-pods", type="kubernetes"), overwrite=True))
    ask(lambda c: apply(c, plan(**{"deploy.gpu_pool": "test-more-pods"})))
    deployment = ask(lambda c: c.read_deployment_by_name("training/likeness"))
    run = ask(lambda c: c.create_flow_run_from_deployment(deployment.id))
    ask(lambda c: c.update_flow_run_labels(run.id, {"prefect.worker.name": "gone"}))
    ask(lambda c: c.set_flow_run_state(run.id, Running(), force=True))
    assert ask(lambda c: lost_runs(c, ("test-more-pods", "test-nowhere"))) == []
    ask(lambda c: c.set_flow_run_state(run.id, Completed(), force=True))


def test_every_deployment_leads_to_its_flow_and_the_schedule_needs_no_parameter() -> None:
    for deployment in plan().deployments:
        module, _, name = deployment.entrypoint.rpartition(".")
        flow = getattr(import_module(module), name)
        assert isinstance(flow, Flow)
        assert (flow.name, set(deployment.schema["properties"])) == (deployment.flow, set(flow.parameters.properties))
    assert {d.flow: d.schema.get("required", []) for d in plan().deployments} == {
        "nightly": [], "personalize": ["subject"], "preparing": ["subjects"], "training": ["trainings"], "recover": []}


def test_training_may_run_on_the_cpu_pool() -> None:
    assert {d.flow: d.pool for d in plan(**{"deploy.trains_on": "cpu"}).deployments} == {
        "nightly": "test-control", "personalize": "test-control", "preparing": "test-cpu", "training": "test-cpu", "recover": "test-control"}


@pytest.mark.parametrize(("key", "value", "words"), [
    ("schedule.cron", "99 2 * * *", "schedule.cron: found '99 2"), ("deploy.gpu_pool", "test-cpu", "three names"), ("deploy.cpu_pool", "a b", "deploy.cpu_pool"),
])
def test_settings_that_no_server_takes_are_refused_before_it_is_asked(key: str, value: str, words: str) -> None:
    with pytest.raises(BadSettings, match=words):
        plan(**{key: value})


def test_without_an_address_deploy_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(RecipeError, match=r"PREFECT_API_URL is not set.*for example http"):
        deploy()


def test_a_server_that_does_not_answer_is_named_and_is_no_traceback() -> None:
    async def connect() -> None:
        async with connected("http://127.0.0.1:9/api"):
            pytest.fail("something answered on the discard port")

    with pytest.raises(ServerUnreachable, match=r"127\.0\.0\.1.*does not answer.*check the address"):
        asyncio.run(connect())
