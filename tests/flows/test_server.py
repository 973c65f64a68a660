"""The same flow against a real Prefect server: what the server keeps of a run, and that it holds nothing personal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.test_run import CONFIG, OPEN_GATE, PHOTOS, environment
from tests.servers import free_port, wait_for_health

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a Prefect server of our own, on loopback."""
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    env = os.environ | {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_API_URL": api}
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"], env=env,
                                   stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_health(f"{api}/health", process, tmp_path / "server.log")
            yield api
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=60)


def ask(api: str, what: str) -> Any:
    request = urllib.request.Request(f"{api}/{what}/filter", data=b"{}", headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_a_real_server_shows_the_run_and_knows_nobody(server: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    env = environment(home, CONFIG + OPEN_GATE) | {"PREFECT_API_URL": server}
    done = subprocess.run([sys.executable, "-m", "flows.cli", "run", str(PHOTOS), "--subject", "ada", "--class", "man", "--consent", "ticket-canary", "--json"], env=env,
                          cwd=home, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["executed"]
    (run,) = ask(server, "flow_runs")
    assert (run["name"], run["state_type"], run["parameters"]) == ("personalize ada", "COMPLETED", {"subject": "ada"})
    tasks = ask(server, "task_runs")
    assert {t["name"].removesuffix(" ada") for t in tasks} == set(stages)
    assert {t["state_type"] for t in tasks} == {"COMPLETED"}
    artifacts = {a["key"]: a for a in ask(server, "artifacts/latest")}
    assert {"photos", "stages", "summary", "verdict"} <= artifacts.keys()
    assert float(artifacts["stages"]["data"]) == 100.0
    # neither where the photos lie nor what they are called, neither consent nor captions
    kept = json.dumps([run, tasks, list(artifacts.values())])
    assert not [word for word in (str(PHOTOS), ".jpg", "ticket-canary", "a photo of") if word in kept]
