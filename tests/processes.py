"""`likeness` as a process for tests: its own environment, folder, session and signals, its exit code and its output.

A test starts many, and each would first spend ten seconds of CPU on importing torch, diffusers, transformers, peft and MLflow, and ten more on a
Prefect server of its own. So processes are forked from one that has imported those (Prefect and `flows`, which read the environment when they are
imported, are left to each process), and where a test does not say otherwise they talk to one real Prefect server per pytest process. `cold` is
the other way: a new interpreter, which starts its own server, as at a user's.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.context import ForkServerContext
from pathlib import Path

from tests.servers import PrefectServer

ROOT = Path(__file__).resolve().parents[1]
SLOW_IMPORTS = ("likeness.registry", "models.captions.slots", "models.diffusion.methods", "models.faces.tools", "models.quality.measure", "tests.processes")


def environment(home: Path, config: str, *, api: str | None = None) -> dict[str, str]:
    """What `likeness` sees: a home with this likeness.toml, and the Prefect server at `api`, or one that it starts itself."""
    home.mkdir(exist_ok=True)
    (home / "likeness.toml").write_text(config)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("LIKENESS_", "PREFECT_", "MLFLOW_"))}
    own = {"LIKENESS_HOME": str(home), "LIKENESS_CONFIG": str(home / "likeness.toml"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return keep | own | ({"PREFECT_API_URL": api} if api else {})


def cold(home: Path, *words: str, config: str) -> subprocess.Popen[str]:
    """A new interpreter with a Prefect server of its own."""
    return subprocess.Popen([sys.executable, "-m", "flows.cli", *words], env=environment(home, config), cwd=home, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


class Warm:
    """A process forked from one that has imported the slow libraries; the part of `subprocess.Popen` that tests use."""

    def __init__(self, words: tuple[str, ...], env: Mapping[str, str], cwd: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="likeness-process-")
        self._out, self._err = (Path(self._folder.name) / name for name in ("out", "err"))
        self._process = _context().Process(target=_main, args=(words, dict(env), str(cwd), str(self._out), str(self._err)), daemon=False)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def kill(self) -> None:
        """SIGKILL to it and to everything that it started."""
        while not _leads_a_session(self.pid):
            time.sleep(0.001)
        os.killpg(self.pid, signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait; (standard output, standard error)."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("likeness", timeout, self._err.read_text() if self._err.exists() else "")
        said = tuple(p.read_text() if p.exists() else "" for p in (self._out, self._err))
        self._folder.cleanup()
        return said[0], said[1]


def _leads_a_session(pid: int) -> bool:
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return True


def _main(words: tuple[str, ...], env: dict[str, str], cwd: str, out: str, err: str) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    sys.argv = ["likeness", *words]
    from flows.cli import main

    try:
        main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()          # a fork ends without them; a Prefect server that was started is stopped by one


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(SLOW_IMPORTS))
    return context


class SharedServer:
    """One Prefect server for a pytest process, started when it is first needed."""

    def __init__(self) -> None:
        self._server: PrefectServer | None = None

    @property
    def api(self) -> str:
        if self._server is None:
            self._server = PrefectServer(Path(tempfile.mkdtemp(prefix="likeness-prefect-")))
        return self._server.api

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None


SERVER = SharedServer()          # stopped at the end of the session: tests/conftest.py
