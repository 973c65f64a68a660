"""The stack of `likeness up` on files of the home, real servers and real workers: what they keep of a run, and that they hold nothing personal. A night: test_stack.py."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from likeness.processes import process_of
from tests.flows.test_run import CONFIG, OPEN_GATE, PHOTOS, finish, likeness
from tests.servers import free_port

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home in which `likeness up` was called: Prefect's server, MLflow's and a worker, on loopback."""
    home = tmp_path / "home"
    try:
        code, shown, err = command(home, "up")
        assert code == 0, err
        assert {s["name"]: s["state"] for s in shown["services"]} == {"prefect": "running", "mlflow": "running", "worker-control": "running", "worker-cpu": "running"}
        yield home
    finally:
        command(home, "down")


CONFIGURED = CONFIG + OPEN_GATE + f"""
[up]
prefect_port = {free_port()}
mlflow_port = {free_port()}
[deploy]
trains_on = "cpu"
"""


def command(home: Path, *words: str, **environment: str) -> tuple[int, Any, str]:
    return asked(home, *words, config=CONFIGURED, **environment)


def asked(home: Path, *words: str, config: str, **environment: str) -> tuple[int, Any, str]:
    """(exit code, JSON document, standard error) of a command."""
    return finish(likeness(home, *words, "--json", config=config, own_server=True, more=environment))


def state_of(home: Path) -> tuple[int, dict[str, str], Any]:
    code, shown, err = command(home, "status")
    assert shown is not None, err
    return code, {s["name"]: s["state"] for s in shown["services"]}, shown


def ask(api: str, what: str, body: object = {}) -> Any:
    """What a server answers; asked again while it says that it is too busy (503), as Prefect's own client does. `body` None: GET."""
    request = urllib.request.Request(f"{api}/{what}", data=None if body is None else json.dumps(body).encode(), headers={"Content-Type": "application/json"})
    for pause in (1.0, 2.0, 4.0, 8.0, 16.0):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as e:
            if e.code != 503:
                raise
            time.sleep(pause)
    raise AssertionError(f"{what}: still too busy")


def wait_for(what: Callable[[], Any], seconds: float = 600.0) -> Any:
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"nothing after {seconds:.0f} s"
        time.sleep(1.0)
    return found


def test_servers_show_a_run_and_know_nobody(home: Path) -> None:
    code, states, shown = state_of(home)
    assert (code, set(states.values()), shown["due"], shown["nights"]) == (0, {"running"}, [], [])
    api = shown["services"][0]["address"] + "/api"
    started = {s["name"]: s["pid"] for s in shown["services"]}

    # one subject by hand, shown by the server
    code, result, err = command(home, "run", str(PHOTOS), "--subject", "ada", "--class", "man", "--consent", "ticket-canary", PREFECT_API_URL=api)
    assert code == 0, err
    (run,) = ask(api, "flow_runs/filter", {"flows": {"name": {"any_": ["personalize"]}}})
    assert (run["name"], run["state_type"], run["parameters"]) == ("personalize ada", "COMPLETED", {"subject": "ada", "on_workers": False})
    tasks = ask(api, "task_runs/filter")
    assert {t["name"].removesuffix(" ada") for t in tasks} == set(result["executed"])
    assert {t["state_type"] for t in tasks} == {"COMPLETED"}
    artifacts = {a["key"]: a for a in ask(api, "artifacts/latest/filter")}
    assert {"photos", "stages", "summary", "verdict"} <= artifacts.keys()
    assert float(artifacts["stages"]["data"]) == 100.0
    # neither where the photos lie nor what they are called, neither consent nor captions
    kept = json.dumps([run, tasks, list(artifacts.values())])
    assert not [word for word in (str(PHOTOS), ".jpg", "ticket-canary", "a photo of") if word in kept]

    # a server that dies is seen, and up brings back that one alone
    os.kill(started["mlflow"], signal.SIGKILL)
    code, states, _ = state_of(home)
    assert (code, states) == (1, {"prefect": "running", "mlflow": "crashed", "worker-control": "running", "worker-cpu": "running"})
    code, shown, err = command(home, "up")
    assert code == 0, err
    again = {s["name"]: s["pid"] for s in shown["services"]}
    assert {name: pid for name, pid in again.items() if name != "mlflow"} == {name: pid for name, pid in started.items() if name != "mlflow"}
    assert again["mlflow"] != started["mlflow"]
    assert command(home, "deploy", PREFECT_API_URL=api)[1]["differences"] == []

    code, stopped, err = command(home, "down")
    assert (code, stopped["stopped"]) == (0, ["worker-control", "worker-cpu", "mlflow", "prefect"]), err
    assert set(state_of(home)[1].values()) == {"stopped"}
    assert [pid for pid in (*started.values(), *again.values()) if process_of(pid) is not None] == []
