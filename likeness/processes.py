"""Processes of this machine: whether one lives, and background services that are started once, watched and stopped.

A process is its pid together with its start time, on one boot of one machine: a pid alone may long be somebody else's. A service leaves one record,
`run/<name>.json` below the home, from its start until it is stopped; its children are known by a word in their environment that only they inherit.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from likeness.errors import IntegrityError, RecipeError, TransientError, translated
from likeness.records import Record

MARK = "STARTED_BY_LIKENESS"        # not LIKENESS_...: those are settings
MARK_HERE = "{mark}"                # in a command, stands for the mark


class Owner(Record):
    """A process, named so that another process of the same machine can tell whether it lives."""

    boot: str
    pid_namespace: int
    pid: int
    started_ticks: int


def this_process() -> Owner | None:
    """This process; None where the system does not tell (no /proc)."""
    return process_of(os.getpid())


def process_of(pid: int) -> Owner | None:
    """A living process of this machine; None if there is none, or the system does not tell (no /proc)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        started = _started_ticks(pid)
        return None if started is None else Owner(boot=boot, pid_namespace=os.stat("/proc/self/ns/pid").st_ino, pid=pid, started_ticks=started)
    except OSError:
        return None


def _started_ticks(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot; None if it is a zombie. Raises OSError if there is none."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()       # the command before may hold spaces and parentheses
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def alive(owner: Owner | None) -> bool | None:
    """Whether the owner lives; None if that cannot be told from here."""
    here = this_process()
    if owner is None or here is None or (owner.boot, owner.pid_namespace) != (here.boot, here.pid_namespace):
        return None
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return None                                            # somebody else's process, and /proc may hide it
    try:
        return _started_ticks(owner.pid) == owner.started_ticks
    except OSError:
        return None


class Service(Record):
    """A background process that was started here, until it is stopped."""

    name: str
    owner: Owner
    mark: str                       # value of MARK in its environment and in that of its children
    started_at: str                 # UTC, ISO 8601
    address: str | None = None      # for people: where its pages are
    stop_signal: int = signal.SIGTERM

    @property
    def lives(self) -> bool:
        """False once it has ended, however that came about; also after the machine was started again."""
        return alive(self.owner) is True


@dataclass(frozen=True)
class Services:
    """The services of one home: their records under `run/`, their output under `logs/`."""

    home: Path

    def log(self, name: str) -> Path:
        """The file to which a service's output is appended."""
        return self.home / "logs" / f"{name}.log"

    def read(self, name: str) -> Service | None:
        """The record of a service that was started and not stopped, whether or not it still lives.

        Raises:
            IntegrityError: if the record is damaged.
        """
        try:
            return Service.read((self.home / "run" / f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as e:
            raise IntegrityError(f"run/{name}.json below the home is no record of a service: see with `ps` whether it runs, end it, and delete the file") from e

    def names(self) -> list[str]:
        """Of all services that were started and not stopped."""
        return sorted(p.stem for p in (self.home / "run").glob("*.json"))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Alone among those who start and stop services of this home.

        Raises:
            TransientError: if another process is at it.
        """
        with translated("opening run/ below the home"):
            (self.home / "run").mkdir(parents=True, exist_ok=True, mode=0o700)
            (self.home / "logs").mkdir(exist_ok=True, mode=0o700)
            lock = (self.home / "run" / "lock").open("a")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise TransientError("another `likeness up` or `down` is at work in this home: wait until it is done, then run the same command again") from e
            yield

    def start(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], address: str | None = None, stop_signal: signal.Signals = signal.SIGTERM) -> Service:
        """Start a service in a session of its own; one that lives is returned as it is. Only within `changing`.

        Raises:
            RecipeError: where processes cannot be told apart (no /proc).
        """
        there = self.read(name)
        if there is not None and there.lives:
            return there
        if there is not None:
            self.stop(name)                                    # children that outlived it hold its port
        mark = secrets.token_hex(8)
        with translated(f"starting {name}"), self.log(name).open("ab") as log:
            process = subprocess.Popen([word.replace(MARK_HERE, mark) for word in command], cwd=self.home, env={**environment, MARK: mark}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                       start_new_session=True)
        owner = process_of(process.pid)
        if owner is None:
            process.kill()
            process.wait()
            raise RecipeError(f"{name} ended at once, or this system has no /proc to tell processes apart by: see logs/{name}.log below the home")
        made = Service(name=name, owner=owner, mark=mark, started_at=datetime.now(UTC).isoformat(timespec="seconds"), address=address, stop_signal=stop_signal)
        path = self.home / "run" / f"{name}.json"
        path.with_suffix(".part").write_bytes(made.model_dump_json().encode())
        path.with_suffix(".part").replace(path)
        return made

    def stop(self, name: str, *, patience_s: float = 30.0) -> bool:
        """Stop a service with its children: asked first, killed when `patience_s` are over. Only within `changing`.

        Nothing but what was started here is touched: the process whose start time is on record, and those that inherited its mark.

        Returns:
            Whether it was on record.
        """
        service = self.read(name)
        if service is None:
            return False
        if service.lives:
            os.kill(service.owner.pid, service.stop_signal)    # it tells its children in its own way
            _wait(lambda: not service.lives, patience_s)
        for sign, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
            for pid in _marked(service.mark):
                try:
                    os.kill(pid, sign)
                except ProcessLookupError:
                    pass
            _wait(lambda: not _marked(service.mark), patience)
        (self.home / "run" / f"{name}.json").unlink(missing_ok=True)
        return True


def _marked(mark: str) -> list[int]:
    """Living processes of this machine that inherited a service's mark."""
    found, wanted = [], f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0") and _started_ticks(int(folder.name)) is not None:
                found.append(int(folder.name))
        except OSError:                                        # somebody else's, or gone
            continue
    return found


def _wait(until: Callable[[], bool], patience_s: float) -> None:
    end = time.monotonic() + patience_s
    while not until() and time.monotonic() < end:
        time.sleep(0.1)
