"""`likeness up`, `status`, `down`: what is started, what is elsewhere, what is in the way. The real servers: test_server.py."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from flows import services
from likeness.errors import BadSettings, RecipeError, ServerUnreachable
from likeness.processes import Services
from likeness.settings import Settings, load_settings
from tests.servers import free_port, has_postgres


@pytest.fixture
def settings(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return load_settings(overrides={"home": str(own_home), "up.prefect_port": free_port(), "up.mlflow_port": free_port()})


def deploy_nothing(address: str) -> None:
    pytest.fail(f"deployed to {address}")


def test_before_up_everything_is_stopped_and_down_has_nothing_to_do(settings: Settings, own_home: Path) -> None:
    assert [(s.name, s.state) for s in services.seen(settings)] == [("prefect", "stopped"), ("mlflow", "stopped"), ("worker-control", "stopped"),
                                                                        ("worker-cpu", "stopped"), ("worker-gpu", "stopped")]
    assert services.down(settings) == []
    assert not own_home.exists()                                 # looking leaves nothing behind


def test_a_server_that_is_named_is_not_started_and_its_password_not_shown(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://ops:secret@prefect.internal:4200/api")
    named = settings.model_copy(update={"registry": load_settings(overrides={"registry.tracking_uri": "http://u:secret@mlflow.internal"}).registry})
    prefect, mlflow, *workers = services.seen(named)
    assert (prefect.state, prefect.address) == ("elsewhere", "http://prefect.internal:4200/api")
    assert (mlflow.state, mlflow.address) == ("elsewhere", "http://mlflow.internal")
    assert {worker.state for worker in workers} == {"stopped"}
    assert services.prefect_api(named).endswith("prefect.internal:4200/api")


def test_the_address_that_up_itself_told_is_not_elsewhere(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", services.own_address(settings))
    assert services.seen(settings)[0].state == "stopped"


def test_a_port_that_is_taken_is_named_before_anything_is_started(settings: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", settings.up.prefect_port))
        taken.listen()
        with pytest.raises(RecipeError, match=rf"port {settings.up.prefect_port} is taken.*up\.prefect_port"):
            services.up(settings, None, deploy=deploy_nothing)
    assert Services(settings.home).names() == []


def test_a_server_that_ends_at_once_leads_to_its_log_and_is_seen_as_crashed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = services.Wanted("prefect", ("sh", "-c", "sleep 0.3; echo no space left >&2; exit 1"), page="http://127.0.0.1:1", health=lambda _: False)
    monkeypatch.setattr(services, "servers", lambda _: [broken])
    with pytest.raises(ServerUnreachable, match=r"prefect ended: .*prefect\.log"):
        services.up(settings, None, deploy=deploy_nothing)
    prefect, *workers = services.seen(settings)
    assert [prefect.state, *(worker.state for worker in workers)] == ["crashed", *["stopped"] * 3]
    assert prefect.log is not None
    assert "no space left" in prefect.log.read_text()
    assert services.down(settings) == ["prefect"]
    assert services.seen(settings)[0].state == "stopped"


def test_a_service_that_lives_without_an_answer_is_silent_and_workers_stop_first(settings: Settings) -> None:
    running = Services(settings.home)
    with running.changing():
        for name in ("mlflow", "prefect", "worker-control", "worker-cpu", "worker-gpu"):
            running.start(name, ["sleep", "600"], environment=os.environ)
    assert [s.state for s in services.seen(settings)] == ["silent"] * 5
    assert services.down(settings) == ["worker-control", "worker-cpu", "worker-gpu", "mlflow", "prefect"]


def test_what_is_written_stays_in_the_home(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_HOME")
    monkeypatch.delenv("PREFECT_LOGGING_LEVEL", raising=False)
    environment = services._environment(settings, tmp_path / "mine.toml")
    assert {Path(environment[name]).is_relative_to(settings.home) for name in ("PREFECT_HOME", "PREFECT_SERVER_UI_STATIC_DIRECTORY", "LIKENESS_HOME")} == {True}
    assert environment["LIKENESS_CONFIG"] == str(tmp_path / "mine.toml")          # flow runs start in a folder of their own
    assert environment["PREFECT_LOGGING_LEVEL"] == "WARNING"                      # at INFO the names of runs, and with them subjects, are in the logs
    assert environment["PREFECT_API_URL"] == services.own_address(settings)


STACK = {"up.postgres_port": 25_432, "up.bucket_port": 29_000, "registry.tracking_uri": "http://127.0.0.1:25000", "up.mlflow_port": 25_000, "store.kind": "s3",
         "store.bucket": "likeness", "store.endpoint_url": "http://127.0.0.1:29000"}


@pytest.fixture
def stack(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return load_settings(overrides={"home": str(own_home), **STACK})


def test_servers_that_stand_on_postgres_and_a_bucket_have_their_addresses_and_no_password_in_a_command(stack: Settings, lacking: Callable[[str], NoReturn]) -> None:
    if not has_postgres():
        lacking("PostgreSQL is not installed (Debian: postgresql)")
    (stack.home / "postgres").mkdir(parents=True)
    (stack.home / "postgres" / "password").write_text("hunter2")
    prefect, mlflow = services.servers(stack)
    assert prefect.environment()["PREFECT_API_DATABASE_CONNECTION_URL"] == "postgresql+asyncpg://likeness@127.0.0.1:25432/prefect"
    assert mlflow.environment()["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg://likeness@127.0.0.1:25432/mlflow"
    assert mlflow.environment()["MLFLOW_S3_ENDPOINT_URL"] == "http://127.0.0.1:29000"
    assert mlflow.elsewhere is None                              # its address is the one that the settings name
    assert "s3://likeness/mlflow-artifacts" in mlflow.command
    for wanted in (*services.foundations(stack), prefect, mlflow, *services.workers(stack)):
        assert not any("hunter2" in word for word in wanted.command)
    assert "PGPASSWORD" not in services._environment(stack, None)                 # workers reach no database


def test_without_postgres_the_error_says_what_to_install(stack: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.postgres.shutil.which", lambda _: None)
    monkeypatch.setattr("flows.postgres.DEBIAN", Path("/nowhere"))
    with pytest.raises(RecipeError, match=r"up\.postgres_port needs PostgreSQL's server programs: install them"):
        services.up(stack, None, deploy=deploy_nothing)


@pytest.mark.parametrize(("change", "said"), [
    ({"registry.tracking_uri": "sqlite:////tmp/mlflow.db"}, r"registry\.tracking_uri = 'http://127\.0\.0\.1:25000' with up\.postgres_port"),
    ({"store.endpoint_url": "http://127.0.0.1:9001"}, r"store\.kind = 's3' and store\.endpoint_url = 'http://127\.0\.0\.1:29000' with up\.bucket_port"),
])
def test_settings_of_half_a_stack_are_refused_with_the_other_half(change: dict[str, str], said: str, own_home: Path) -> None:
    with pytest.raises(BadSettings, match=said):
        load_settings(overrides={"home": str(own_home), **STACK, **change})


def test_forget_opens_the_databases_that_the_servers_name_or_that_up_made(settings: Settings, stack: Settings) -> None:
    assert services.own_database(settings, "mlflow", {}) is None
    said = {"PREFECT_API_DATABASE_CONNECTION_URL": "postgresql+asyncpg://ops@db/prefect", "MLFLOW_BACKEND_STORE_URI": "postgresql+psycopg://ops@db/mlflow"}
    assert services.own_database(settings, "prefect", said) == "postgresql+psycopg://ops@db/prefect"
    assert services.own_database(settings, "mlflow", said) == "postgresql+psycopg://ops@db/mlflow"
    behind = load_settings(overrides={"home": str(settings.home), "up.mlflow_port": 25_000, "registry.tracking_uri": "http://127.0.0.1:25000/"})
    assert services.own_database(behind, "mlflow", {}) == f"sqlite:///{settings.home}/mlflow.db"          # the server of `up` on the file of this home
    assert services.own_database(behind, "prefect", {}) is None                                            # its file is erased in any case
    (stack.home / "postgres").mkdir(parents=True)
    (stack.home / "postgres" / "password").write_text("a/b")
    assert services.own_database(stack, "prefect", {}) == "postgresql+psycopg://likeness:a%2Fb@127.0.0.1:25432/prefect"
