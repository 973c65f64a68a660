"""The same flow against a real Prefect server: what the server keeps of a run, and that it holds nothing personal."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.flows.test_run import CONFIG, OPEN_GATE, PHOTOS, finish, likeness
from tests.processes import SERVER

pytestmark = pytest.mark.timeout(900)


def ask(what: str, run: str | None = None) -> Any:
    """What the server has of flow_runs, task_runs or artifacts; of one flow run, if its id is given."""
    wanted = {"flow_runs": {"id": {"any_": [run]}} if run else {"name": {"any_": ["personalize zoe"]}}}
    request = urllib.request.Request(f"{SERVER.api}/{what}/filter", data=json.dumps(wanted).encode(), headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_a_real_server_shows_the_run_and_knows_nobody(tmp_path: Path) -> None:
    home = tmp_path / "home"
    code, result, err = finish(likeness(home, "run", str(PHOTOS), "--subject", "zoe", "--class", "man", "--consent", "ticket-canary", "--json", config=CONFIG + OPEN_GATE))
    assert code == 0, err
    (run,) = ask("flow_runs")
    assert (run["name"], run["state_type"], run["parameters"]) == ("personalize zoe", "COMPLETED", {"subject": "zoe"})
    tasks = ask("task_runs", run["id"])
    assert {t["name"].removesuffix(" zoe") for t in tasks} == set(result["executed"])
    assert {t["state_type"] for t in tasks} == {"COMPLETED"}
    artifacts = {a["key"]: a for a in ask("artifacts", run["id"])}
    assert {"photos", "stages", "summary", "verdict"} <= artifacts.keys()
    assert float(artifacts["stages"]["data"]) == 100.0
    # neither where the photos lie nor what they are called, neither consent nor captions
    kept = json.dumps([run, tasks, list(artifacts.values())])
    assert not [word for word in (str(PHOTOS), ".jpg", "ticket-canary", "a photo of") if word in kept]
