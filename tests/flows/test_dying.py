"""A flow run that dies with its worker, on a real server: declared crashed because it is silent, started again by the next worker, and so often only."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import PrefectClient

from flows.automations import HEARTBEAT_S, automations_of
from flows.deploying import TAGS, DeploymentPlan, Plan, PoolPlan, apply
from tests.servers import PrefectServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_that_dies_with_its_worker_is_started_again_and_not_for_ever(tmp_path: Path) -> None:
    server = PrefectServer(tmp_path / "server")
    try:
        dies_twice(server.api, tmp_path, silent_after_s=60.0)
    finally:
        server.stop()


def dies_twice(api: str, folder: Path, *, silent_after_s: float) -> None:
    notes = folder / "notes"
    plan = Plan(pools=(PoolPlan("silent", 1, "test"),), deployments=(DeploymentPlan("silent", "tests.flows.silent.wait", "silent", "test", {}, {"notes": str(notes)}),),
                automations=automations_of(TAGS[0], silent_after_s=silent_after_s, most_starts=2))

    async def begin() -> Any:
        async with PrefectClient(api) as client:
            await apply(client, plan)
            deployment = await client.read_deployment_by_name("silent/likeness")
            return (await client.create_flow_run_from_deployment(deployment.id)).id

    async def look() -> tuple[str, int]:
        async with PrefectClient(api) as client:
            run = await client.read_flow_run(run_id)
            return str(run.state_name), run.run_count

    def worker(name: str) -> subprocess.Popen[bytes]:
        env = os.environ | {"PREFECT_API_URL": api, "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S), "PYTHONPATH": str(ROOT), "PREFECT_HOME": str(folder / name)}
        return subprocess.Popen([sys.executable, "-m", "prefect", "worker", "start", "--pool", "silent", "--type", "process", "--name", name], env=env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)

    def started(times: int) -> int:
        pids = until(lambda: (p := notes.read_text().split() if notes.exists() else []) and len(p) == times and p)
        return int(pids[-1])

    run_id = asyncio.run(begin())
    first = worker("first")
    second = None
    try:
        pid = started(1)
        time.sleep(5.0)                                                # so that its first heartbeat is on its way
        for victim in (first.pid, pid):                                # worker and run at once: nobody is left who could say so
            os.kill(victim, signal.SIGKILL)
        first.wait()
        assert asyncio.run(look()) == ("Running", 1)
        until(lambda: asyncio.run(look())[0] in ("Scheduled", "Late"))
        second = worker("second")
        pid = started(2)
        assert asyncio.run(look()) == ("Running", 2)
        os.kill(pid, signal.SIGKILL)                                   # its worker lives and says so; it was started often enough
        until(lambda: asyncio.run(look())[0] == "Crashed")
        time.sleep(15.0)
        assert asyncio.run(look()) == ("Crashed", 2)
        assert len(notes.read_text().split()) == 2
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for pid in notes.read_text().split() if notes.exists() else ():  # a run has a session of its own
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


def until(what: Callable[[], Any], seconds: float = 600.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"nothing after {seconds:.0f} s"
        time.sleep(1.0)
    return found
