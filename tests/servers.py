"""Servers of the tests' own, on loopback and a free port: PostgreSQL (Debian's binaries) and MLflow."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from flows.postgres import Postgres as Cluster
from flows.postgres import programs
from likeness.errors import RecipeError


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_health(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until the server answers 200; fails with its log if it ends, or stays silent for three minutes."""
    for _ in range(360):
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text())


def has_postgres() -> bool:
    """Whether PostgreSQL's server programs are installed."""
    try:
        programs()
    except RecipeError:
        return False
    return True


class Postgres:
    """The cluster of `likeness up` (flows/postgres.py) in a folder of its own, in a hurry: nothing is synced."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="likeness-postgres-"))
        self.cluster = Cluster(self.folder / "cluster", free_port())
        self.cluster.prepare()
        with (self.folder / "log").open("w") as log:
            self._process = subprocess.Popen([*self.cluster.command, "-c", "fsync=off"], stdout=log, stderr=log, cwd=self.folder, start_new_session=True)
        for _ in range(240):
            assert self._process.poll() is None, (self.folder / "log").read_text()
            if self.cluster.answers:
                return
            time.sleep(0.25)
        raise AssertionError((self.folder / "log").read_text())

    def database(self, name: str, *, like: str = "template1") -> str:
        """Make a database, as a copy of another one if it is named; its SQLAlchemy address."""
        import psycopg

        with psycopg.connect(self.cluster.address("postgres").replace("+psycopg", ""), autocommit=True) as db:
            db.execute(f'CREATE DATABASE "{name}" TEMPLATE "{like}"'.encode())
        return self.cluster.address(name)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)           # fast shutdown: sessions are ended
        self._process.wait(timeout=60)
        shutil.rmtree(self.folder, ignore_errors=True)


class PrefectServer:
    """`prefect server` on loopback, with its database and log in `folder`, which `stop` removes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.api = f"http://127.0.0.1:{(port := free_port())}/api"
        log_file = folder / "server.log"
        env = os.environ | {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_API_URL": self.api}
        with log_file.open("w") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"], env=env,
                                             stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for_health(f"{self.api}/health", self._process, log_file)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        _end(self._process)
        shutil.rmtree(self.folder, ignore_errors=True)


class MlflowServer:
    """`mlflow server` on a database; artifacts go through it into a folder."""

    def __init__(self, database: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.artifacts = folder / "artifacts"
        self.address = f"http://127.0.0.1:{(port := free_port())}"
        self._log = folder / "mlflow.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen([sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
                                              "--backend-store-uri", database, "--artifacts-destination", str(self.artifacts)],
                                             stdout=log, stderr=log, cwd=folder, start_new_session=True)
        try:
            wait_for_health(f"{self.address}/health", self._process, self._log)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        _end(self._process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a process and to what it started; SIGKILL after half a minute."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
