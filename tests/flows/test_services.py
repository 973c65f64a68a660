"""`likeness up`, `status`, `down`: what is started, what is elsewhere, what is in the way. The real servers: test_server.py."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from flows import services
from likeness.errors import RecipeError, ServerUnreachable
from likeness.processes import Services
from likeness.settings import Settings, load_settings
from tests.servers import free_port


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
