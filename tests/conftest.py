"""What every test stands on: a home that is not yours, no network beyond this machine, and the shared data.

Everything in the first half happens when pytest starts, before any test module is imported: Prefect, MLflow, Hugging Face and torch
read their environment at import. Child processes inherit it.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from tests.s3_server import S3Server

ROOT = Path(__file__).resolve().parents[1]
SESSION_HOME = Path(tempfile.mkdtemp(prefix="likeness-tests-"))

for name in list(os.environ):
    if name.startswith(("AWS_", "PREFECT_", "MLFLOW_", "HF_", "XDG_")) or (name.startswith("LIKENESS_") and name != "LIKENESS_REQUIRE_ALL"):
        del os.environ[name]       # what the contributor has set up for real must not decide a test
os.environ.update({
    "HOME": str(SESSION_HOME),
    "XDG_DATA_HOME": str(SESSION_HOME / "share"),
    "XDG_CACHE_HOME": str(SESSION_HOME / "cache"),
    "XDG_CONFIG_HOME": str(SESSION_HOME / "config"),
    "LIKENESS_HOME": str(SESSION_HOME / "likeness"),
    "PREFECT_HOME": str(SESSION_HOME / "prefect"),
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",     # 20 to 40 s on a busy machine
    "MLFLOW_TRACKING_URI": f"sqlite:///{SESSION_HOME}/mlflow.db",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "OMP_NUM_THREADS": "1",        # tests run side by side, and the number of threads changes the last bits of a training
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
})


class OutsideNetwork(RuntimeError):
    """A test tried to leave this machine. No OSError, so that no retry loop takes it for bad weather."""


def _check(sock: socket.socket, address: Any) -> None:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    host = str(address[0]).split("%")[0]
    try:
        local = ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified
    except ValueError:
        local = host in ("localhost", "localhost.localdomain", "")
    if not local:
        raise OutsideNetwork(f"a test connected to {host}:{address[1]}: tests may use this machine only; start a server here instead")


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    def connect(self: socket.socket, address: Any) -> Any:
        _check(self, address)
        return method(self, address)
    return connect


socket.socket.connect = _guarded(socket.socket.connect)            # type: ignore[method-assign]
socket.socket.connect_ex = _guarded(socket.socket.connect_ex)      # type: ignore[method-assign]


def pytest_configure() -> None:
    from hypothesis import HealthCheck, settings

    # on a machine that does other things too, slow is not broken
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")


def pytest_unconfigure() -> None:
    shutil.rmtree(SESSION_HOME, ignore_errors=True)                # a server that is still closing may write into it


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own empty LIKENESS_HOME and MLflow database. Prefect's home is the session's: it is read once, at import."""
    home = tmp_path / "likeness-home"
    monkeypatch.setenv("LIKENESS_HOME", str(home))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return home


@pytest.fixture(scope="session")
def lacking() -> Callable[[str], NoReturn]:
    """`lacking("Postgres is not installed")` skips the test, or fails it where nothing may be lacking (LIKENESS_REQUIRE_ALL=1)."""
    def leave(reason: str) -> NoReturn:
        if os.environ.get("LIKENESS_REQUIRE_ALL") == "1":
            pytest.fail(f"{reason}, and LIKENESS_REQUIRE_ALL=1 allows no skip", pytrace=False)
        pytest.skip(reason)
    return leave


@pytest.fixture(scope="session")
def running_s3() -> Iterator[S3Server]:
    from tests.s3_server import S3Server

    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(running_s3: S3Server) -> Iterator[S3Server]:
    """An S3 server of this process, in calm weather. Take a bucket of your own from it."""
    yield running_s3
    running_s3.calm()


@pytest.fixture(scope="session", autouse=True)
def _prefect_server() -> Iterator[None]:
    """The server that `tests.processes` starts if a test needs one."""
    yield
    from tests.processes import SERVER

    SERVER.stop()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared(lacking: Callable[[str], NoReturn]) -> Path:
    """The folder of shared data beside the repository: portraits, testdata."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        lacking("the folder 'shared' with portraits and testdata does not lie beside the repository")
    return folder


@pytest.fixture(scope="session")
def testdata(shared: Path) -> Path:
    """Photos, prompts and small weights for tests. Real people: nothing from here enters the repository."""
    return shared / "testdata"


@pytest.fixture(scope="session")
def rendered_users(shared: Path) -> Path:
    """One folder per rendered user (900000 to 900023), 16 photos each, 512 px."""
    return shared / "portraits" / "users"
