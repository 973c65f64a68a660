"""infra/ is what the code says and what its readers accept: prefect.yaml, the compose file, the image, the systemd unit."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import click
import pytest
import typer
import yaml

from flows import services
from flows.automations import HEARTBEAT_S
from flows.cli import app
from flows.deploying import as_prefect_yaml, plan_of
from likeness.settings import load_settings
from tasks.runtime import Tools
from tests.s3_server import S3Server

PREFECT_OPTIONS = {"--host", "--port", "--pool", "--type", "--limit", "--with-healthcheck"}       # its command line is not click's: `prefect --help`
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY")


@pytest.fixture(scope="module", params=["compose.yaml", "compose.yaml and compose.s3.yaml"])
def compose(root: Path, request: pytest.FixtureRequest) -> Any:
    """As `docker compose -f ... -f ...` puts them together."""
    merged: Any = {}
    for name in request.param.split(" and "):
        merged = _merged(merged, yaml.safe_load((root / "infra" / name).read_text()))
    return merged


def _merged(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merged(base[key], value) if key in base else value for key, value in over.items()}
    return over


@pytest.fixture(scope="module")
def unit(root: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str                                     # type: ignore[assignment,method-assign]
    parser.read_string((root / "infra" / "likeness-worker@.service").read_text())
    return parser


def test_prefect_yaml_is_what_deploy_makes_and_prefect_reads_it(root: Path) -> None:
    from prefect.cli.deploy._models import PrefectYamlModel

    text = (root / "infra" / "prefect.yaml").read_text()
    plan = plan_of(load_settings())
    assert text == as_prefect_yaml(plan), "run `likeness deploy --yaml > infra/prefect.yaml`"
    read = PrefectYamlModel.model_validate(yaml.safe_load(text))
    assert [(d.name, d.entrypoint, d.work_pool.name if d.work_pool else None, d.description, d.tags) for d in read.deployments] == \
        [("likeness", d.entrypoint, d.pool, d.description, ["likeness"]) for d in plan.deployments]
    assert [d.work_pool.work_queue_name or "default" for d in read.deployments if d.work_pool] == [d.queue for d in plan.deployments]
    for queue in plan.queues:
        assert re.search(rf"work-queue [a-z-]+ {queue.name} .*\b{queue.slots}\b", text)
    assert [[(s.cron, s.timezone, s.slug) for s in d.schedules or ()] for d in read.deployments] == \
        [[(d.cron, d.timezone, "likeness")] if d.cron else [] for d in plan.deployments]
    for pool in plan.pools:
        assert f"set-concurrency-limit {pool.name} {pool.slots}" in text


def test_services_wait_only_for_services_that_can_be_waited_for(compose: Any) -> None:
    services = compose["services"]
    assert {"postgres", "prefect", "mlflow", "worker-cpu", "worker-gpu"} <= services.keys()
    for service in services.values():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other]
            assert how["condition"] != "service_completed_successfully" or services[other]["restart"] == "no"
    named = {v.split(":")[0] for s in services.values() for v in s.get("volumes", ()) if not v.startswith(".")}
    assert named == compose["volumes"].keys()


def test_no_registry_no_credential_and_nothing_open_to_the_world(root: Path, compose: Any) -> None:
    for name, service in compose["services"].items():
        image, _, tag = service["image"].rpartition(":") if ":" in service["image"] else (service["image"], "", "")
        assert "." not in image.split("/")[0], name              # no host: images by their plain names
        assert (tag, "build" in service) != ("", False), f"{name}: a foreign image needs a version"
        assert [p for p in service.get("ports", ()) if not p.startswith("127.0.0.1:")] == []
        for key, value in service.get("environment", {}).items():
            assert not SECRET.search(key) or value.startswith("${"), f"{name}: {key}"
            assert not re.search(r"://[^/@]*:[^/@]*@", str(value)), f"{name}: {key} holds a password"
    assert "/infra/.env" in (root / ".gitignore").read_text().splitlines()


def programs() -> dict[str, Any]:
    from mlflow.cli import cli as mlflow

    likeness = typer.main.get_command(app)
    assert isinstance(mlflow, click.Group)
    return {"mlflow": mlflow.commands, "likeness": likeness.commands}         # type: ignore[attr-defined]


def commands(compose: Any) -> Iterator[tuple[str, list[str]]]:
    for name, service in compose["services"].items():
        if "command" in service:
            yield name, service["command"]


def test_every_command_has_the_options_that_it_is_given(compose: Any) -> None:
    known = programs()
    for name, (program, command, *words) in commands(compose):
        if program == "python":
            assert command == "-c"
            compile(words[0], name, "exec")
            continue
        if program == "prefect":                                 # test_server.py starts both
            assert (command, words[0]) in (("server", "start"), ("worker", "start")), name
            assert {w for w in words if w.startswith("--")} <= PREFECT_OPTIONS, name
            continue
        options = {option for parameter in known[program][command].params for option in parameter.opts}
        assert {w for w in words if w.startswith("--")} <= options, name


def test_workers_serve_the_pools_that_deploy_makes_and_their_settings_are_settings(compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    services = compose["services"]
    pools = {s["command"][s["command"].index("--pool") + 1] for s in services.values() if "--pool" in s.get("command", ())}
    assert pools == {p.name for p in plan_of(load_settings()).pools}
    for service in (services["deploy"], services["worker-control"], services["worker-cpu"], services["worker-gpu"]):
        for key, value in service["environment"].items():
            monkeypatch.setenv(key, re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value))
        settings = load_settings()
        assert settings.store.kind == ("s3" if "s3" in services else "local")
        assert str(settings.home) in {v.split(":")[1] for v in services["worker-cpu"]["volumes"]}
        assert settings.registry.tracking_uri is not None
        assert settings.registry.tracking_uri.get_secret_value() in [f"http://{s}:5000" for s in services]
        assert settings.deploy.trains_on == "cpu"                # without a GPU nothing waits for one


def instructions(root: Path) -> dict[str, list[list[str]]]:
    """Words of each line of the Dockerfile, by stage."""
    stages: dict[str, list[list[str]]] = {}
    for line in (root / "infra" / "Dockerfile").read_text().replace("\\\n", " ").splitlines():
        words = line.split()
        if line and not line.startswith("#") and words[0] == "FROM":
            stages[words[3]] = []
        if line and not line.startswith("#") and stages:
            stages[next(reversed(stages))].append(words)
    return stages


def test_the_image_is_made_of_what_is_there_and_nobody_in_it_is_root(root: Path) -> None:
    stages = instructions(root)
    copied = [word for stage in stages.values() for line in stage if line[0] == "COPY" for word in line[1:-1]]
    assert [name for name in copied if not (root / name).exists()] == []
    let_in = {line[1:] for line in (root / "infra" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert set(copied) == let_in
    for name in ("likeness", "jobs"):                            # what is built; the other stages are steps on the way
        assert [line[1] for line in stages[name] if line[0] == "USER"][-1] == "10001:10001"
        assert stages[name][-1][0] == "CMD"
    assert {line[1] for stage in stages.values() for line in stage if line[0] == "FROM"} == {"python:3.11-slim", "system", "torch-${TORCH}"}


def test_what_the_image_installs_is_pinned_and_the_cpus_has_no_cuda(root: Path) -> None:
    pins = dict(line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    stages = instructions(root)
    for stage in stages.values():
        for line in stage:
            for command in " ".join(line).split("&&") if line[:3] == ["RUN", "pip", "install"] or "pip install" in " ".join(line) else ():
                if "pip install" not in command:
                    continue
                assert "--constraint constraints.txt" in command
                words = command.split("install", 1)[1].split()
                asked = [re.split(r"[\[>=]", word.strip("'"))[0] for at, word in enumerate(words)
                         if not word.startswith("--") and word != "." and words[at - 1] not in ("--constraint", "--index-url")]
                assert [name for name in asked if name not in pins] == []
    [cpu], [cuda] = [[" ".join(line) for line in stages[f"torch-{kind}"] if line[0] == "RUN"] for kind in ("cpu", "cuda")]
    assert "--index-url https://download.pytorch.org/whl/cpu" in cpu
    assert "--no-deps" in cpu                                    # all else is PyPI's, in the pinned versions
    assert "index-url" not in cuda


def test_only_the_worker_with_a_gpu_gets_the_image_with_cuda(compose: Any) -> None:
    for name, service in compose["services"].items():
        if service["image"].startswith("likeness"):
            kind = service["build"].get("args", {}).get("TORCH", "cpu")
            assert service["image"] == f"likeness-{kind}"
            assert (kind == "cuda") == (name == "worker-gpu")


def test_the_unit_starts_a_worker_that_exists_and_keeps_to_the_home(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    program, *words = service["ExecStart"].split()
    assert Path(program).name == "prefect"
    assert words == ["worker", "start", "--pool", "%i", "--type", "process", "$WORKER_OPTIONS"]       # systemd leaves an unset one out
    assert service["User"] != "root"
    assert service["ReadWritePaths"] == service["WorkingDirectory"] == "/srv/likeness"
    assert "PrivateDevices" not in service                       # it would hide the GPUs
    assert not SECRET.search(service["Environment"])


def test_systemd_accepts_the_unit(root: Path, tmp_path: Path, lacking: Callable[[str], NoReturn]) -> None:
    if shutil.which("systemd-analyze") is None:
        lacking("systemd-analyze is not installed")
    # with paths of this machine: it looks whether the program is there
    text = (root / "infra" / "likeness-worker@.service").read_text().replace("/opt/likeness/.venv/bin/prefect", "/bin/true")
    (tmp_path / "likeness-worker@gpu.service").write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(tmp_path / "likeness-worker@gpu.service")], capture_output=True, text=True, check=False)
    complaints = [line for line in done.stderr.splitlines() if "likeness-worker@gpu.service" in line and not line.startswith("/lib")]
    assert complaints == []


def test_every_deployment_of_the_file_can_be_imported(root: Path) -> None:
    for deployment in yaml.safe_load((root / "infra" / "prefect.yaml").read_text())["deployments"]:
        module, _, name = deployment["entrypoint"].rpartition(".")
        assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize("role", ["control", "cpu", "gpu"])
def test_bucket_policies_are_what_the_docs_say_and_amazons_grammar_takes_them(root: Path, role: str) -> None:
    from moto.iam.policy_validation import IAMPolicyDocumentValidator

    text = (root / "infra" / "bucket" / f"{role}.json").read_text()
    IAMPolicyDocumentValidator(text).validate()
    statements = {s["Sid"]: s for s in json.loads(text)["Statement"]}
    [row] = [line.split("|") for line in (root / "docs" / "store.md").read_text().splitlines() if line.startswith(f"| {role}")]
    writes = re.findall(r"`([^`]*/\*)`", row[3]) or ["*"]
    assert [w.removeprefix("arn:aws:s3:::BUCKET/") for w in statements["Write"]["Resource"]] == writes
    assert statements["Write"]["Action"] == ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    assert statements["Read"]["Resource"] == "arn:aws:s3:::BUCKET/*"
    never = re.findall(r"everything but `([^`]*)`", row[2])
    assert [s["Resource"].removeprefix("arn:aws:s3:::BUCKET/") for s in statements.values() if (s["Effect"], s["Action"]) == ("Deny", "s3:GetObject")] == never
    assert ("s3:ListBucketMultipartUploads" in statements["Bucket"]["Action"]) == (role == "control")


def test_the_bucket_takes_the_rule_that_aborts_what_nobody_finished(root: Path, s3: S3Server) -> None:
    rule = json.loads((root / "infra" / "bucket" / "lifecycle.json").read_text())
    bucket = s3.bucket().bucket
    s3.client.put_bucket_lifecycle_configuration(Bucket=bucket, LifecycleConfiguration=rule)
    [kept] = s3.client.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert (kept["Status"], kept["AbortIncompleteMultipartUpload"]) == ("Enabled", {"DaysAfterInitiation": 1})
    assert not {"Expiration", "Transitions"} & kept.keys()                     # nothing that is an object goes by itself


def test_the_bucket_of_the_compose_file_is_made_once_and_the_store_works_in_it(root: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its containers run, with the environment that they have, on another server."""
    services = yaml.safe_load((root / "infra" / "compose.s3.yaml").read_text())["services"]
    program, flag, script = services["bucket"]["command"]
    name = f"test-{uuid.uuid4().hex}"
    environment = services["bucket"]["environment"] | {"LIKENESS_STORE__ENDPOINT_URL": s3.url, "LIKENESS_STORE__BUCKET": name, "AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    for _ in range(2):
        subprocess.run([sys.executable, flag, script], env=os.environ | environment, check=True)
    assert (program, [b["Name"] for b in s3.client.list_buckets()["Buckets"]].count(name)) == ("python", 1)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    store = Tools(load_settings()).bare_store
    assert (store.put_if_absent("probes/a", b"1"), store.put_if_absent("probes/a", b"2"), store.get("probes/a")) == (True, False, b"1")


def test_prefects_database_does_not_grow_for_ever(root: Path, compose: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own settings read what the files give it."""
    from prefect.settings.models.server.services import ServerServicesDBVacuumSettings

    kubernetes = dict(line.split("=", 1) for line in (root / "infra" / "kubernetes" / "servers.env").read_text().splitlines() if line)
    for given in (compose["services"]["prefect"]["environment"], kubernetes):
        for key, value in given.items():
            if "DB_VACUUM" in key:
                monkeypatch.setenv(key, value)
        read = ServerServicesDBVacuumSettings()
        assert {"events", "flow_runs"} <= read.enabled_vacuum_types
        assert read.retention_period.days == 30
        for key in given:
            monkeypatch.delenv(key, raising=False)


def test_a_silent_worker_is_noticed_wherever_one_is_started(compose: Any, unit: configparser.ConfigParser) -> None:
    for name in ("worker-control", "worker-cpu", "worker-gpu"):
        assert compose["services"][name]["environment"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_S)
    assert f"PREFECT_FLOWS_HEARTBEAT_FREQUENCY={HEARTBEAT_S}" in unit["Service"]["Environment"].split()
    assert services._environment(load_settings(), None)["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_S)
    assert load_settings().deploy.silent_after_s >= 3 * HEARTBEAT_S
