"""One night of four subjects on everything that production has: PostgreSQL, a bucket, both servers, a worker per pool. Things die in it, and nothing is lost.

    ada, cleo, dan    photos that will do; dan's lie in the bucket, with a word planted in a caption, and he is forgotten afterwards
    bea               two photos, which are too few
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import boto3
import psycopg
import pytest

from flows.postgres import Postgres
from likeness.once import Claimed
from likeness.processes import process_of
from likeness.settings import Settings, load_settings
from tests.flows.test_run import CONFIG, OPEN_GATE, PHOTOS
from tests.flows.test_server import ask, asked, wait_for
from tests.processes import environment
from tests.servers import free_port, has_postgres

CANARY = "zebrafinch-canary"
TTL_S = 20
pytestmark = pytest.mark.timeout(2400)


def settings_text() -> str:
    mlflow, bucket = free_port(), free_port()
    return CONFIG.replace("steps = 12", "steps = 60", 1).replace("checkpoint_every = 4", "checkpoint_every = 5", 1) + OPEN_GATE + f"""
[up]
prefect_port = {free_port()}
mlflow_port = {mlflow}
postgres_port = {free_port()}
bucket_port = {bucket}
[store]
kind = "s3"
bucket = "likeness"
endpoint_url = "http://127.0.0.1:{bucket}"
addressing = "path"
timeout_s = 8.0
patience_s = 8.0
[registry]
tracking_uri = "http://127.0.0.1:{mlflow}"
[claims]
ttl_s = {TTL_S}
[deploy]
silent_after_s = 60
"""


class Stack:
    """The home in which `likeness up` was called, and what a test looks at behind its back."""

    def __init__(self, home: Path) -> None:
        self.home, self.config = home, settings_text()
        environment(home, self.config)
        self.settings: Settings = load_settings(home / "likeness.toml", overrides={"home": str(home)})
        self.api = f"http://127.0.0.1:{self.settings.up.prefect_port}/api"
        self.bucket = boto3.session.Session().client("s3", endpoint_url=self.settings.up.bucket_address)

    def likeness(self, *words: str) -> tuple[int, Any]:
        """(exit code, JSON document) of a command."""
        code, said, err = asked(self.home, *words, config=self.config, PREFECT_API_URL=self.api)
        assert said is not None, err
        return code, said

    def pids(self) -> dict[str, int]:
        return {s["name"]: s["pid"] for s in self.likeness("status")[1]["services"]}

    def keys(self) -> list[str]:
        pages = self.bucket.get_paginator("list_objects_v2").paginate(Bucket="likeness")
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def read(self, key: str) -> bytes:
        return bytes(self.bucket.get_object(Bucket="likeness", Key=key)["Body"].read())

    def training(self) -> Claimed | None:
        """The claim on whichever training is under way."""
        for key in self.keys():
            if "/stages/train/" in key and key.endswith(".json") and (state := json.loads(self.read(key)))["state"] == "claimed" and state["progress"]:
                return Claimed.model_validate_json(json.dumps(state))
        return None

    def cells(self) -> Iterator[str]:
        """Every cell of both databases."""
        cluster = Postgres.of(self.settings)
        assert cluster is not None
        for database in ("prefect", "mlflow"):
            with psycopg.connect(cluster.address(database).replace("+psycopg", "")) as db:
                for (table,) in db.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'").fetchall():
                    for (row,) in db.execute(f'SELECT CAST(t AS TEXT) FROM "{table}" t'.encode()):
                        yield f"{database} {table} {row}"

    def traces(self, *words: str) -> list[str]:
        """Wherever one of the words stands: keys, objects, cells, names and raw bytes of files."""
        raw = [word.encode() for word in words]
        found = [key for key in self.keys() if any(word in key for word in words) or any(word in self.read(key) for word in raw)]
        found += [cell[:200] for cell in self.cells() if any(word in cell for word in words)]
        for path in self.home.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and (any(word in path.name for word in words) or any(word in path.read_bytes() for word in raw)):
                    found.append(path.relative_to(self.home).as_posix())
        return found


@pytest.fixture
def stack(tmp_path: Path, lacking: Callable[[str], NoReturn]) -> Iterator[Stack]:
    if not has_postgres():
        lacking("PostgreSQL is not installed (Debian: postgresql)")
    found = Stack(tmp_path / "home")
    try:
        code, shown = found.likeness("up")
        assert code == 0
        names = ["postgres", "bucket", "prefect", "mlflow", "worker-control", "worker-cpu", "worker-gpu"]
        assert [(s["name"], s["state"]) for s in shown["services"]] == [(name, "running") for name in names]
        yield found
    finally:
        found.likeness("down")


def test_a_night_in_which_workers_and_servers_die_ends_with_one_release_for_each_and_nobody_is_lost(stack: Stack, tmp_path: Path) -> None:
    enrol(stack, tmp_path)
    (deployment,) = ask(stack.api, "deployments/filter", {"deployments": {"name": {"any_": ["likeness"]}}, "flows": {"name": {"any_": ["nightly"]}}})
    scheduled = wait_for(lambda: ask(stack.api, "flow_runs/filter", {"deployments": {"id": {"any_": [deployment["id"]]}}}))
    assert {(r["state_type"], r["expected_start_time"][11:16]) for r in scheduled} == {("SCHEDULED", "02:00")}
    night = ask(stack.api, f"deployments/{deployment['id']}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]

    def batch() -> Any:
        return (ask(stack.api, "flow_runs/filter", {"flows": {"name": {"any_": ["training"]}}}) or [None])[0]

    # the GPU worker dies with the training that it was at; a new one goes on with the batch
    first = wait_for(stack.training)
    before = stack.pids()
    assert (batch()["name"], batch()["run_count"], batch()["work_pool_name"]) == ("training 3", 1, "gpu")
    for pid in (before["worker-gpu"], first.owner.pid):
        os.kill(pid, signal.SIGKILL)
    assert {s["name"] for s in stack.likeness("status")[1]["services"] if s["state"] == "crashed"} == {"worker-gpu"}
    assert stack.likeness("up")[0] == 0
    second = wait_for(lambda: (now := stack.training()) and now.token != first.token and now)
    assert batch()["run_count"] == 2

    # that one is stopped for longer than its claim is believed: another takes its place, while MLflow's server dies
    os.kill(second.owner.pid, signal.SIGSTOP)
    os.killpg(before["mlflow"], signal.SIGKILL)                      # its own child would go on answering
    third = wait_for(lambda: (now := stack.training()) and now.token != second.token and now)
    assert third.owner.pid != second.owner.pid
    assert batch()["run_count"] == 3

    # registering meets a server that is not there, tries again by itself, and succeeds when it is back
    wait_for(lambda: ask(stack.api, "task_runs/filter", {"task_runs": {"name": {"like_": "register"}, "state": {"name": {"any_": ["AwaitingRetry"]}}}}))
    assert stack.likeness("up")[0] == 0

    # the one that was stopped wakes up: it may not publish, and its run is over
    os.kill(second.owner.pid, signal.SIGCONT)
    done = wait_for(lambda: (r := ask(stack.api, f"flow_runs/{night}", None))["state_type"] in ("COMPLETED", "FAILED", "CRASHED") and r)
    assert done["state_type"] == "COMPLETED"
    wait_for(lambda: process_of(second.owner.pid) is None)
    assert (batch()["state_type"], batch()["run_count"]) == ("COMPLETED", 3)
    retried = [t["name"] for t in ask(stack.api, "task_runs/filter", {"task_runs": {"name": {"like_": "register"}}}) if t["run_count"] > 1]
    assert retried

    code, shown = stack.likeness("status")
    assert code == 0
    (record,) = shown["nights"]
    assert (record["ok"], record["counts"]["accepted"], record["counts"]["needs_photos"], record["counts"]["failed"]) == (True, 3, 1, 0)
    assert shown["due"] == []
    assert [s for s in ("ada", "cleo", "dan") if releases(stack, s) != ["1"]] == []
    assert releases(stack, "bea") == []
    for subject in ("ada", "cleo", "dan"):
        assert stack.likeness("lineage", subject)[1]["ok"]
    code, left = stack.likeness("recover")
    assert (left["runs"], left["claims"]) == ([], [])

    # dan is forgotten while everything runs
    digests = [link["digest"] for link in stack.likeness("lineage", "dan")[1]["chain"]]
    planted = (f"{CANARY}-consent", f"{CANARY}-caption", "subjects/dan/", "uploads/dan/", "likeness.dan", *digests)
    assert {trace.partition("/")[0] for trace in stack.traces(*planted)} >= {"subjects", "uploads", "mlflow-artifacts", "bucket", "postgres"}      # the test can fail
    code, receipt = stack.likeness("forget", "dan", "--yes", "--canary", f"{CANARY}-caption", "--canary", f"{CANARY}-consent")
    assert {area for area, seen in receipt["scan"].items() if seen["objects"]} >= {"store", "mlflow database", "prefect database", "mlflow artifacts", "elsewhere in the home"}
    assert {area: seen["hits"] for area, seen in receipt["scan"].items() if seen["hits"]} == {}
    assert code == 0
    assert stack.traces(*planted) == []
    assert (releases(stack, "dan"), releases(stack, "ada")) == ([], ["1"])
    assert stack.likeness("lineage", "ada")[1]["ok"]

    started = [*before.values(), *stack.pids().values()]
    assert stack.likeness("down")[1]["stopped"] == ["worker-control", "worker-cpu", "worker-gpu", "mlflow", "prefect", "bucket", "postgres"]
    assert [pid for pid in started if process_of(pid) is not None] == []


def enrol(stack: Stack, folder: Path) -> None:
    few, fewer = folder / "few", folder / "fewer"
    few.mkdir()
    for name in ("00.jpg", "01.jpg"):
        shutil.copy(PHOTOS / name, few)
    shutil.copytree(PHOTOS, fewer)
    (fewer / "11.jpg").unlink()
    for photo in sorted(PHOTOS.glob("*.jpg"))[:-2]:
        stack.bucket.upload_file(str(photo), "likeness", f"uploads/dan/{photo.name}")
    stack.bucket.put_object(Bucket="likeness", Key="uploads/dan/00.txt", Body=f"a photo of a man, {CANARY}-caption".encode())
    for subject, photos, consent in (("ada", PHOTOS, "ticket 1"), ("bea", few, "ticket 2"), ("cleo", fewer, "ticket 3"), ("dan", "store:uploads/dan/", f"{CANARY}-consent")):
        code, _ = stack.likeness("subject", "add", subject, "--class", "man", "--photos", str(photos), "--consent", consent)
        assert code == 0


def releases(stack: Stack, subject: str) -> list[str]:
    """Versions that MLflow's server shows."""
    found = ask(f"http://127.0.0.1:{stack.settings.up.mlflow_port}/api/2.0/mlflow", f"model-versions/search?filter=name%3D'likeness.{subject}'", None)
    return [v["version"] for v in found.get("model_versions", ())]
