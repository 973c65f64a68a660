"""The scheduled recovery: what a crash left half made begins again, once, and only where nobody else sees to it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter, FlowRunFilterTags
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Crashed, Running, Scheduled

import flows.recover
from flows import cli_operating
from flows.deploying import Plan, apply, plan_of
from flows.recover import AGAIN, Recovered, recover, recovered
from likeness.erasure import tombstone_key
from likeness.night import Outcome, note_outcome
from likeness.once import Claim, Claimed
from likeness.records import Consent, Enrolment, Subject
from likeness.settings import load_settings
from likeness.stages import Call
from likeness.store import MemoryStore
from tasks.runtime import Tools
from tests.processes import SERVER

Ask = Callable[[Callable[[PrefectClient], Awaitable[Any]]], Any]
CALL = Call(stage="crop", subject="ada")
TTL_S = 0.4
# no night is due while these tests run
SETTINGS = {"deploy.control_pool": "again-control", "deploy.cpu_pool": "again-cpu", "deploy.gpu_pool": "again-gpu", "schedule.cron": "0 2 29 2 *"}


def plan() -> Plan:
    return plan_of(load_settings(overrides=SETTINGS))


@pytest.fixture(scope="module")
def deployed() -> Iterator[Ask]:
    """Runs a coroutine with a client of the session's Prefect server, which has our deployments, and not the automations, which would start again what crashes here, some time later."""
    async def without_automations(client: PrefectClient) -> None:
        for planned in plan().automations:
            for there in await client.read_automations_by_name(planned.name):
                await client.delete_automation(there.id)

    async def without_deployments(client: PrefectClient) -> None:
        for planned in plan().deployments:
            await client.delete_deployment((await client.read_deployment_by_name(planned.full_name)).id)

    with asyncio.Runner() as runner:
        client = PrefectClient(SERVER.api)
        runner.run(client.__aenter__())
        try:
            runner.run(without_automations(client))
            runner.run(apply(client, replace(plan(), automations=())))
            yield lambda what: runner.run(what(client))
            runner.run(without_deployments(client))                            # so that its schedules end here
        finally:
            runner.run(client.__aexit__(None, None, None))


@pytest.fixture
def server(deployed: Ask) -> Ask:
    """With our deployments and none of their runs."""
    async def emptied(client: PrefectClient) -> None:
        for run in await client.read_flow_runs(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["likeness"])), limit=200):
            await client.delete_flow_run(run.id)

    deployed(emptied)
    return deployed


@pytest.fixture
def tools(own_home: Path) -> Tools:
    """Tools over a memory, with one enrolled subject whose photos nobody reads here."""
    made = Tools(load_settings(overrides={"home": str(own_home), **SETTINGS}))
    made.bare_store = MemoryStore()
    enrol(made)
    return made


def enrol(tools: Tools, **changed: Any) -> None:
    tools.enrol(Enrolment(subject=Subject(id="ada", noun="man", consent=Consent(source="ticket 7")), source="store:uploads/ada/", **changed))


def held(tools: Tools, *, attempt: int = 1, token: str = "of a worker elsewhere") -> Claim:
    """Ada's crop is claimed, by a process of which nothing can be told from here."""
    tools.store.delete(CALL.path)
    state = Claimed(token=token, beat=3, ttl_s=TTL_S, attempt=attempt)
    assert tools.store.put_if_absent(CALL.path, json.dumps(state.model_dump(mode="json"), sort_keys=True).encode())
    return Claim(tools.store, CALL, state)


def run_of(server: Ask, flow: str, parameters: dict[str, Any], *, crashes: int = 3, **more: Any) -> UUID:
    """A run that was started and crashed so often; 0: it runs."""
    async def made(client: PrefectClient) -> Any:
        deployment = await client.read_deployment_by_name(f"{flow}/likeness")
        run = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters, **more)
        for start in range(max(1, crashes)):
            if start:
                await client.set_flow_run_state(run.id, Scheduled(), force=True)
            await client.set_flow_run_state(run.id, Running(), force=True)
            if crashes:
                await client.set_flow_run_state(run.id, Crashed(), force=True)
        return run.id

    return UUID(str(server(made)))


def begun(server: Ask) -> list[tuple[str, dict[str, Any]]]:
    """What recoveries began, in order of time: (flow, parameters)."""
    async def read(client: PrefectClient) -> list[tuple[str, dict[str, Any]]]:
        runs = await client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[AGAIN])))
        names = {run.id: (await client.read_flow(run.flow_id)).name for run in runs}
        return [(names[run.id], run.parameters) for run in sorted(runs, key=lambda run: run.created or datetime.min.replace(tzinfo=UTC))]

    return server(read)                       # type: ignore[no-any-return]


def of_training(subject: str = "ada") -> dict[str, Any]:
    return {"trainings": [{"subject": subject, "training_set": None, "recipe": None}]}


def test_a_subject_whose_worker_died_for_good_goes_on_once(server: Ask, tools: Tools) -> None:
    held(tools)
    run_of(server, "training", of_training())
    assert server(lambda c: recovered(c, tools)) == Recovered(subjects=1)
    assert begun(server) == [("personalize", {"on_workers": True, "subject": "ada"})]
    assert server(lambda c: recovered(c, tools)) == Recovered()                 # that run is on its way
    [again] = server(lambda c: c.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[AGAIN]))))
    server(lambda c: c.set_flow_run_state(again.id, Completed(), force=True))
    assert server(lambda c: recovered(c, tools)) == Recovered()                 # the same claim is no reason twice
    held(tools, token="of the next one", attempt=2)
    assert server(lambda c: recovered(c, tools)) == Recovered(subjects=1)       # another one died over it
    assert len(begun(server)) == 2


@pytest.mark.parametrize("flow", ["preparing", "training"])
def test_of_a_batch_only_those_go_on_of_whom_something_was_in_the_making(server: Ask, tools: Tools, flow: str) -> None:
    run_of(server, flow, {"subjects": ["ada"]} if flow == "preparing" else of_training())
    assert server(lambda c: recovered(c, tools)) == Recovered()
    held(tools)
    assert server(lambda c: recovered(c, tools)) == Recovered(subjects=1)


def test_a_subject_by_hand_goes_on_between_two_stages_too(server: Ask, tools: Tools) -> None:
    run_of(server, "personalize", {"subject": "ada", "on_workers": True})
    assert server(lambda c: recovered(c, tools)) == Recovered(subjects=1)


def test_what_was_begun_again_is_no_reason_to_begin(server: Ask, tools: Tools) -> None:
    held(tools)
    run_of(server, "personalize", {"subject": "ada"}, tags=[AGAIN])
    assert server(lambda c: recovered(c, tools)) == Recovered()


def paused(tools: Tools) -> None:
    enrol(tools, paused=True)


def forgotten(tools: Tools) -> None:
    tools.bare_store.put_if_absent(tombstone_key("ada"), b"forgotten")


def not_enrolled(tools: Tools) -> None:
    tools.bare_store.delete("subjects/ada/enrolment.json")


def set_aside(tools: Tools) -> None:
    note_outcome(tools.store, "ada", Outcome(night="n1", asked="a" * 64, kind="failed", ours=True, failures=3))


def died_too_often(tools: Tools) -> None:
    held(tools, attempt=3)


@pytest.mark.parametrize("why", [paused, forgotten, not_enrolled, set_aside, died_too_often])
def test_who_must_wait_for_a_person_or_the_night_does(server: Ask, tools: Tools, why: Callable[[Tools], None]) -> None:
    held(tools)
    run_of(server, "training", of_training())
    why(tools)
    assert server(lambda c: recovered(c, tools)) == Recovered()


@contextmanager
def beating(claim: Claim) -> Iterator[None]:
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(TTL_S / 20):
            claim.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_claim_that_beats_is_somebodys(server: Ask, tools: Tools) -> None:
    run_of(server, "training", of_training())
    with beating(held(tools)):
        assert server(lambda c: recovered(c, tools)) == Recovered()
    assert server(lambda c: recovered(c, tools)) == Recovered(subjects=1)


@pytest.mark.parametrize(("flow", "parameters"), [
    ("nightly", {"night": "n2"}), ("personalize", {"subject": "ada"}), ("preparing", {"subjects": ["bea", "ada"]}), ("training", of_training()),
])
def test_whom_a_run_is_for_is_left_to_it(server: Ask, tools: Tools, flow: str, parameters: dict[str, Any]) -> None:
    held(tools)
    run_of(server, "training", of_training())
    under_way = run_of(server, flow, parameters, crashes=0)
    assert server(lambda c: recovered(c, tools)) == Recovered()
    server(lambda c: c.set_flow_run_state(under_way, Completed(), force=True))
    assert server(lambda c: recovered(c, tools)) == Recovered(subjects=1)


def test_a_run_that_may_still_start_again_is_left_to_the_automation(server: Ask, tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    held(tools)
    run_of(server, "training", of_training(), crashes=1)
    assert server(lambda c: recovered(c, tools)) == Recovered()
    monkeypatch.setattr(flows.recover, "COMES_BACK_S", 0.0)                    # and after so long it did not
    assert server(lambda c: recovered(c, tools)) == Recovered(subjects=1)


def test_subjects_that_go_on_leave_a_slot_to_the_night(server: Ask, tools: Tools) -> None:
    for subject in ("ada", "bea", "cleo"):
        tools.enrol(Enrolment(subject=Subject(id=subject, noun="man", consent=Consent(source="ticket 7")), source=f"store:uploads/{subject}/"))
        run_of(server, "personalize", {"subject": subject})
    assert [server(lambda c: recovered(c, tools)).subjects for _ in range(2)] == [1, 0]                # control_slots is 2
    assert begun(server)[0][1]["subject"] == "ada"


def test_a_night_that_crashed_for_good_is_begun_again_once_under_its_id(server: Ask, tools: Tools) -> None:
    run_of(server, "nightly", {"night": None, "limit": 5, "on_workers": True})
    held(tools)
    run_of(server, "training", of_training())                                   # the night takes them all
    assert server(lambda c: recovered(c, tools)) == Recovered(nights=1)
    night = datetime.now(UTC).date().isoformat()
    assert begun(server) == [("nightly", {"night": night, "limit": 5, "on_workers": True})]
    [again] = server(lambda c: c.read_flow_runs(flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[AGAIN]))))
    for _ in range(3):
        server(lambda c: c.set_flow_run_state(again.id, Running(), force=True))
        server(lambda c: c.set_flow_run_state(again.id, Crashed(), force=True))
    assert server(lambda c: recovered(c, tools)).nights == 0                    # it crashed too: a person is needed


def test_no_night_is_begun_where_one_was_done_since_or_nobody_wants_any(server: Ask, tools: Tools) -> None:
    run_of(server, "nightly", {"night": "n1"})
    nightly = server(lambda c: c.read_deployment_by_name("nightly/likeness"))
    for schedule in nightly.schedules:                                          # other tests may have made more of them
        server(lambda c, s=schedule: c.update_deployment_schedule(nightly.id, s.id, active=False))
    assert server(lambda c: recovered(c, tools)) == Recovered()
    server(lambda c: c.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True))
    done = run_of(server, "nightly", {"night": "n1"}, crashes=0)
    server(lambda c: c.set_flow_run_state(done, Completed(), force=True))
    assert server(lambda c: recovered(c, tools)) == Recovered()


def test_a_dead_workers_run_is_declared_crashed(server: Ask, tools: Tools) -> None:
    run = run_of(server, "preparing", {"subjects": ["ada"]}, crashes=0)
    server(lambda c: c.update_flow_run_labels(run, {"prefect.worker.name": "dead"}))
    assert server(lambda c: recovered(c, tools)) == Recovered(declared_crashed=1)
    assert server(lambda c: c.read_flow_run(run)).state_type.value == "CRASHED"


def test_recoveries_that_are_overdue_are_not_made_up_for(server: Ask, tools: Tools) -> None:
    async def due(client: PrefectClient) -> list[UUID]:
        deployment = await client.read_deployment_by_name("recover/likeness")
        return [(await client.create_flow_run_from_deployment(deployment.id)).id for _ in range(3)]

    made = set(server(due))
    server(lambda c: recovered(c, tools))
    left = server(lambda c: c.read_flow_runs(deployment_filter=DeploymentFilter(name=DeploymentFilterName(any_=["likeness"])), limit=200))
    assert not made & {run.id for run in left}


def test_the_command_still_says_the_same_of_a_claim(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Tools(load_settings(overrides={"home": str(own_home)}))
    enrol(made)
    held(made)
    cli_operating.recover(as_json=True)
    assert json.loads(capsys.readouterr().out) == {"server": None, "runs": [], "declared_crashed": [], "uploads": [], "claims": [
        {"subject": "ada", "stage": "crop", "attempt": 1, "progress": None, "lives": None}]}


def test_the_flow_runs_on_a_server_and_says_its_numbers_only(server: Ask) -> None:
    with temporary_settings(updates={PREFECT_API_URL: SERVER.api}):
        state = asyncio.run(recover(return_state=True))
    assert json.loads(state.message) == {"declared_crashed": 0, "nights": 0, "subjects": 0, "uploads": 0}


def test_a_recovery_finds_a_slot_when_every_other_one_is_taken_and_takes_none_from_a_night(server: Ask) -> None:
    personalize, recovery = [server(lambda c, n=name: c.read_deployment_by_name(f"{n}/likeness")) for name in ("personalize", "recover")]
    assert (recovery.work_pool_name, recovery.work_queue_name) == ("again-control", "recover")

    def runs(deployment: Any, number: int) -> list[UUID]:
        given = {"subject": "ada"} if deployment is personalize else {}
        return [server(lambda c: c.create_flow_run_from_deployment(deployment.id, parameters=given)).id for _ in range(number)]

    def offered(*made: UUID) -> set[UUID]:
        """Which of these runs a worker of the pool would be given now."""
        return {item.flow_run.id for item in server(lambda c: c.get_scheduled_flow_runs_for_work_pool("again-control"))} & set(made)

    def begin(*made: UUID) -> None:
        for run in made:
            server(lambda c, r=run: c.set_flow_run_state(r, Running(), force=True))

    taken, waiting, rescue = runs(personalize, 2), runs(personalize, 1), runs(recovery, 3)
    begin(*taken)                                              # control_slots is 2
    rescued = offered(*rescue)
    assert len(rescued) == 2
    assert offered(*waiting) == set()
    begin(*rescued)
    server(lambda c: c.set_flow_run_state(taken[0], Completed(), force=True))
    assert offered(*waiting, *rescue) == set(waiting)
