"""What Prefect remembers of a run's first start, and a night must not be told in its second."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import SERVER, environment

TWICE = """
import json, sys
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.flow_engine import run_flow
from prefect.states import Pending, Running, Scheduled
from flows.turns import count_from_elsewhere

starts = []

class Killed(BaseException):
    pass

@flow(name="turn-of-a-test", persist_result=False)
def turn(subject):
    if len(starts) == 1:
        raise Killed
    return subject

@flow(name="night-of-a-test", persist_result=False)
def night(guarded):
    starts.append(1)
    if guarded:
        count_from_elsewhere(turn)
    return [turn(subject) for subject in (["ada"] if len(starts) == 1 else ["bea", "cleo"])]

client, given = get_client(sync_client=True), {"guarded": sys.argv[1] == "guarded"}
run = client.create_flow_run(night, parameters=given, state=Pending())
try:
    run_flow(night, flow_run=run, parameters=given)
except Killed:
    pass
turns = FlowFilter(name=FlowFilterName(any_=["turn-of-a-test"]))
[first] = [r for r in client.read_flow_runs(flow_filter=turns) if r.parent_task_run_id and not r.state.is_completed() and r.state.is_crashed()]
client.set_flow_run_state(first.id, Running(), force=True)              # as a killed process leaves it
for state in (Scheduled(), Pending()):
    client.set_flow_run_state(run.id, state, force=True)
assert run_flow(night, flow_run=client.read_flow_run(run.id), parameters=given) == ["bea", "cleo"]
since = [r for r in client.read_flow_runs(flow_filter=turns) if r.created >= first.created]
print(json.dumps([sorted((r.parameters["subject"], r.state.type.value) for r in since), len({r.id for r in since})]))
client.set_flow_run_state(first.id, Scheduled(), force=True)            # so that the other way does not find it
"""


@pytest.mark.parametrize(("way", "expected"), [
    ("guarded", [["ada", "RUNNING"], ["bea", "COMPLETED"], ["cleo", "COMPLETED"]]),
    ("as prefect counts", [["ada", "COMPLETED"], ["cleo", "COMPLETED"]]),          # bea's turn under ada's name: when this fails, the guard has had its day
])
def test_a_turn_of_a_second_start_has_a_record_of_its_own(tmp_path: Path, way: str, expected: list[list[str]]) -> None:
    done = subprocess.run([sys.executable, "-c", TWICE, way], env=environment(tmp_path / "home", "", api=SERVER.api) | {"PREFECT_LOGGING_LEVEL": "CRITICAL"},
                          cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    turns, count = json.loads(done.stdout.splitlines()[-1])
    assert (turns, count) == (expected, len(expected))
