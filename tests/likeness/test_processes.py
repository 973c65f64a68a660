"""Background services: started once, known again, stopped with their children, and nobody else with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from likeness.errors import IntegrityError, TransientError
from likeness.processes import MARK_HERE, Service, Services, alive, process_of, this_process

# A server with a worker of its own, both silent: it writes the worker's pid and waits.
PARENT = """
import pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path("child.part").write_text(f"{child.pid} {sys.argv[1]}")
pathlib.Path("child.part").rename("child")
time.sleep(600)
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-c", PARENT, MARK_HERE, *words]


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.05)
    return true()


def child_of(services: Services) -> int:
    file = services.home / "child"
    assert within(20, file.exists), services.log("server").read_text()
    pid = int(file.read_text().split()[0])
    file.unlink()
    return pid


def start(services: Services, *words: str) -> Service:
    with services.changing():
        return services.start("server", command(*words), environment=os.environ, address="http://127.0.0.1:1")


def stop(services: Services, patience_s: float = 30.0) -> bool:
    with services.changing():
        return services.stop("server", patience_s=patience_s)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    made = Services(tmp_path)
    yield made
    stop(made, 0.1)


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process that has nothing to do with it."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_a_service_is_started_once_and_stopped_with_its_children(services: Services, bystander: subprocess.Popen[bytes]) -> None:
    service = start(services)
    child = child_of(services)
    assert start(services) == service == services.read("server")
    assert (service.lives, services.names(), service.address) == (True, ["server"], "http://127.0.0.1:1")
    assert service.started_at.endswith("+00:00")
    assert stop(services) is True
    assert (service.lives, process_of(child), services.names(), services.read("server")) == (False, None, [], None)
    assert bystander.poll() is None
    assert stop(services) is False


def test_a_service_that_crashed_is_seen_and_started_anew_without_what_it_left(services: Services) -> None:
    first = start(services)
    orphan = child_of(services)
    os.kill(first.owner.pid, signal.SIGKILL)
    assert within(10, lambda: not first.lives)
    assert services.names() == ["server"]                       # a crash is no stop: the record says that it should run
    second = start(services)
    assert second.owner != first.owner
    assert process_of(orphan) is None
    child_of(services)


def test_a_service_that_does_not_listen_is_killed(services: Services) -> None:
    service = start(services, "stubborn")
    child_of(services)
    began = time.monotonic()
    assert stop(services, 0.5) is True
    assert not service.lives
    assert time.monotonic() - began < 20


def test_a_pid_that_was_given_to_somebody_else_is_not_touched(services: Services, bystander: subprocess.Popen[bytes]) -> None:
    theirs = process_of(bystander.pid)
    assert theirs is not None
    stale = Service(name="server", owner=theirs.model_copy(update={"started_ticks": theirs.started_ticks - 1}), mark="0" * 16, started_at="2026-11-26T00:00:00+00:00")
    (services.home / "run").mkdir()
    (services.home / "run" / "server.json").write_text(stale.model_dump_json())
    assert not stale.lives
    assert stop(services) is True
    assert bystander.poll() is None


def test_after_a_reboot_nothing_lives(services: Services) -> None:
    service = start(services)
    child_of(services)
    assert not service.model_copy(update={"owner": service.owner.model_copy(update={"boot": "another"})}).lives


def test_the_mark_stands_in_the_command_and_the_output_in_the_log(services: Services) -> None:
    with services.changing():
        service = services.start("printer", ["sh", "-c", f"echo {MARK_HERE}; sleep 600"], environment=os.environ)
    assert within(10, lambda: service.mark in services.log("printer").read_text())
    with services.changing():
        services.stop("printer")


def test_two_that_start_and_stop_at_once_are_told_apart(services: Services) -> None:
    with services.changing(), pytest.raises(TransientError, match="another `likeness up` or `down`"), services.changing():
        pytest.fail("both were let in")


def test_a_damaged_record_is_named(services: Services) -> None:
    (services.home / "run").mkdir()
    (services.home / "run" / "server.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"run/server\.json"):
        services.read("server")
    (services.home / "run" / "server.json").unlink()


def test_this_process_lives() -> None:
    assert alive(this_process()) is True
    assert alive(None) is None
