"""up, status, down: the servers and workers of the nights as background processes of this machine.

    [PostgreSQL, an S3 server] -> Prefect server -> deploy -> one worker for each pool          MLflow server, beside Prefect's

All of it lies in the home. Without the two in brackets Prefect's and MLflow's databases are the files that `likeness run` uses without any server. Nothing
here imports Prefect or MLflow.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.postgres import Postgres
from likeness.errors import RecipeError, ServerUnreachable
from likeness.processes import MARK_HERE, Service, Services
from likeness.settings import S3StoreSettings, Settings

# Prefect's own formats name runs, whose names hold subjects
NAMELESS_LOGS = {f"PREFECT_LOGGING_FORMATTERS_STANDARD_{kind.upper()}_FMT": f"%(asctime)s.%(msecs)03d | %(levelname)-7s | {kind.replace('_', ' ')} %({kind}_id)s - %(message)s"
                 for kind in ("flow_run", "task_run")}
PATIENCE_S = 300.0              # a server on a busy machine takes up to 40 s; the first start makes its database besides
ARTIFACTS = "mlflow-artifacts"      # prefix within the bucket
PAGES = "ui"                        # folder below PREFECT_HOME
State = Literal["running", "silent", "crashed", "stopped", "elsewhere"]


@dataclass(frozen=True)
class Wanted:
    """One service that `up` starts; `elsewhere` is the address of a server that the settings or the environment name instead."""

    name: str
    command: tuple[str, ...]
    port: int | None = None
    page: str | None = None             # for people
    health: Callable[[Service], bool] = lambda service: True
    elsewhere: str | None = None
    environment: Callable[[], Mapping[str, str]] = dict         # besides that of all of them, once what it stands on runs
    before: Callable[[], None] = lambda: None           # it is started
    after: Callable[[], None] = lambda: None            # it answers
    stop_signal: signal.Signals = signal.SIGTERM


@dataclass(frozen=True)
class Seen:
    """How a service is found."""

    name: str
    state: State
    pid: int | None = None
    since: str | None = None            # UTC
    address: str | None = None
    log: Path | None = None

    def as_json(self) -> dict[str, Any]:
        """One entry of `services` of `likeness status --json`."""
        return {"name": self.name, "state": self.state, "pid": self.pid, "since": self.since, "address": self.address, "log": None if self.log is None else str(self.log)}


def own_address(settings: Settings) -> str:
    """Of the Prefect server that `up` starts."""
    return f"http://127.0.0.1:{settings.up.prefect_port}/api"


def prefect_api(settings: Settings) -> str:
    """Of the Prefect server that counts: PREFECT_API_URL, or the one of `up`."""
    return os.environ.get("PREFECT_API_URL") or own_address(settings)


def started_prefect(settings: Settings) -> bool:
    """Whether the Prefect server of this home's `up` lives."""
    service = Services(settings.home).read("prefect")
    return service is not None and service.lives


def foundations(settings: Settings) -> list[Wanted]:
    """What the servers stand on, if the settings ask for it: PostgreSQL for their tables, a bucket for artifacts and the store."""
    up, cluster, made = settings.up, Postgres.of(settings), []
    if cluster is not None:
        made.append(Wanted("postgres", cluster.command, up.postgres_port, health=lambda _: cluster.answers, before=cluster.prepare, after=cluster.make_databases,
                           stop_signal=signal.SIGINT))           # fast: it does not wait for clients
    if up.bucket_address is not None and isinstance(settings.store, S3StoreSettings):
        command = (sys.executable, "-m", "flows.bucket", "--port", str(up.bucket_port), "--folder", str(settings.home / "bucket"), "--bucket", settings.store.bucket)
        made.append(Wanted("bucket", command, up.bucket_port, health=lambda _: _answers(str(up.bucket_address))))
    return made


def servers(settings: Settings) -> list[Wanted]:
    """Prefect's and MLflow's server."""
    up, home, api, cluster = settings.up, settings.home, prefect_api(settings), Postgres.of(settings)
    tracking = settings.registry.tracking_uri
    prefect = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(up.prefect_port))
    mlflow = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(up.mlflow_port), "--workers", "1", "--uvicorn-opts", "--no-access-log --log-level warning", *([] if cluster else ["--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]),
              "--artifacts-destination", artifacts(settings))
    on_bucket = {} if up.bucket_address is None else {"MLFLOW_S3_ENDPOINT_URL": up.bucket_address}
    return [Wanted("prefect", (sys.executable, "-m", *prefect), up.prefect_port, f"http://127.0.0.1:{up.prefect_port}", lambda _: _answers(f"{own_address(settings)}/health"),
                   elsewhere=None if api == own_address(settings) else _without_password(api),
                   environment=lambda: {} if cluster is None else cluster.environment("prefect")),
            Wanted("mlflow", (sys.executable, "-m", *mlflow), up.mlflow_port, up.mlflow_address, lambda _: _answers(f"{up.mlflow_address}/health"),
                   elsewhere=None if tracking is None or _is_own_mlflow(settings) else _without_password(tracking.get_secret_value()),
                   environment=lambda: on_bucket | ({} if cluster is None else cluster.environment("mlflow")))]


def artifacts(settings: Settings) -> str:
    """Where MLflow's server of `up` keeps artifacts."""
    if settings.up.bucket_address is not None and isinstance(settings.store, S3StoreSettings):
        return f"s3://{settings.store.bucket}/{ARTIFACTS}"
    return str(settings.home / "mlflow-artifacts")


def own_database(settings: Settings, name: Literal["prefect", "mlflow"], environment: Mapping[str, str] = os.environ) -> str | None:
    """SQLAlchemy's address of a server's own database, where we may open it: what the server's own variable says, else that of `likeness up` of this home.

    Args:
        settings: of this home.
        name: of the server.
        environment: read for PREFECT_API_DATABASE_CONNECTION_URL and MLFLOW_BACKEND_STORE_URI.
    """
    if said := environment.get({"prefect": "PREFECT_API_DATABASE_CONNECTION_URL", "mlflow": "MLFLOW_BACKEND_STORE_URI"}[name]):
        return said.replace("+asyncpg", "+psycopg").replace("+aiosqlite", "")
    if (cluster := Postgres.of(settings)) is not None:
        return cluster.address(name)
    if name == "mlflow" and _is_own_mlflow(settings):
        return f"sqlite:///{settings.home / 'mlflow.db'}"
    return None


def _is_own_mlflow(settings: Settings) -> bool:
    """Whether workers register at the server that `up` starts."""
    tracking = settings.registry.tracking_uri
    return tracking is not None and tracking.get_secret_value().rstrip("/") == settings.up.mlflow_address


def workers(settings: Settings) -> list[Wanted]:
    """One for each pool that a deployment uses."""
    return [_worker(settings, pool) for pool in settings.deploy.pools]


def _worker(settings: Settings, pool: str) -> Wanted:
    # named after one start alone: the server believes in a worker for 90 s after its death
    command = (sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", f"{pool}-{MARK_HERE}")
    return Wanted(f"worker-{pool}", command, health=lambda service: _online(prefect_api(settings), pool, f"{pool}-{service.mark}"))


def up(settings: Settings, config: Path | None, *, deploy: Callable[[str], None], tell: Callable[[str], None] = lambda words: None) -> list[Seen]:
    """Start what does not run, wait until all of it answers, and tell the Prefect server what the nights need. May be called any number of times.

    Args:
        settings: home, ports and pools.
        config: the likeness.toml that workers read; None: the shipped one.
        deploy: makes pools and deployments on the Prefect server at an address.
        tell: called with words for a person.

    Raises:
        RecipeError: if a port is taken by something that is not ours.
        ServerUnreachable: if something ends at once, or does not answer in five minutes.
    """
    services = Services(settings.home)
    with services.changing():
        environment = _environment(settings, config)
        for together in (foundations(settings), servers(settings)):
            _bring_up(services, together, environment, tell)
        deploy(prefect_api(settings))
        tell("work pools, deployments and schedule: as the settings say")
        _bring_up(services, workers(settings), environment, tell)
    return seen(settings)


def down(settings: Settings, tell: Callable[[str], None] = lambda words: None) -> list[str]:
    """Stop everything that `up` started in this home, workers first; returns the names."""
    services = Services(settings.home)
    if not services.names():
        return []
    with services.changing():
        names = sorted(services.names(), key=lambda name: (*(name.startswith(kind) for kind in ("postgres", "bucket", "prefect", "mlflow")), name))
        for name in names:
            tell(f"stopping {name}")
            services.stop(name)
    return names


def seen(settings: Settings) -> list[Seen]:
    """Every service that `up` would start, and any other that it once started, as it is now."""
    services = Services(settings.home)
    every = {w.name: w for w in (*foundations(settings), *servers(settings), *workers(settings))}
    found = []
    for name in (*every, *(n for n in services.names() if n not in every)):
        wanted, service = every.get(name), services.read(name)
        if service is None:
            elsewhere = wanted.elsewhere if wanted is not None else None
            found.append(Seen(name, "stopped" if elsewhere is None else "elsewhere", address=elsewhere))
        else:
            found.append(Seen(name, _state(service, wanted), service.owner.pid, service.started_at, service.address, services.log(name)))
    return found


def _state(service: Service, wanted: Wanted | None) -> State:
    if not service.lives:
        return "crashed"
    return "running" if wanted is None or wanted.health(service) else "silent"


def _bring_up(services: Services, together: Sequence[Wanted], environment: Mapping[str, str], tell: Callable[[str], None]) -> None:
    for wanted in together:
        _start(services, wanted, environment, tell)
    for wanted in together:
        _await(services, wanted)
        wanted.after()


def _start(services: Services, wanted: Wanted, environment: Mapping[str, str], tell: Callable[[str], None]) -> None:
    there = services.read(wanted.name)
    if wanted.elsewhere is not None or (there is not None and there.lives):
        return
    if there is not None:
        tell(f"{wanted.name} had crashed; {services.log(wanted.name)} may say why")
        services.stop(wanted.name)
    if wanted.port is not None and _taken(wanted.port):
        raise RecipeError(f"port {wanted.port} is taken by a program that `likeness up` of this home did not start: end it, or choose another with up.{wanted.name}_port")
    tell(f"starting {wanted.name}")
    wanted.before()
    services.start(wanted.name, wanted.command, environment={**environment, **wanted.environment()}, address=wanted.page, stop_signal=wanted.stop_signal)


def _await(services: Services, wanted: Wanted) -> None:
    if wanted.elsewhere is not None:
        return
    end = time.monotonic() + PATIENCE_S
    while True:
        lives, service = False, services.read(wanted.name)
        if service is not None and (lives := service.lives) and wanted.health(service):
            return
        if not lives or time.monotonic() > end:
            raise ServerUnreachable(f"{wanted.name} {'ended' if not lives else f'did not answer within {PATIENCE_S:.0f} s'}: {services.log(wanted.name)} says more; "
                                    "mend it and run `likeness up` again, or `likeness down`")
        time.sleep(0.5)


def _environment(settings: Settings, config: Path | None) -> dict[str, str]:
    """Of the background processes: ours, with everything that is written kept to the home."""
    home = settings.home
    given = {"LIKENESS_HOME": str(home), "PREFECT_API_URL": prefect_api(settings)} | ({} if config is None else {"LIKENESS_CONFIG": str(config.resolve())})
    # WARNING: at INFO Prefect and MLflow write the names of runs and models, which hold subjects, into every log
    kept = {"PREFECT_LOGGING_LEVEL": "WARNING", "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_HOME": str(home / "prefect"), "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(home / "prefect" / PAGES), "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "MLFLOW_LOGGING_LEVEL": "WARNING", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    return kept | settings.up.credentials | NAMELESS_LOGS | dict(os.environ) | given


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _online(api: str, pool: str, name: str) -> bool:
    """Whether the server has heard of that worker lately."""
    request = urllib.request.Request(f"{api}/work_pools/{pool}/workers/filter", data=b"{}", headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return any(worker["name"] == name and worker["status"] == "ONLINE" for worker in json.load(answer))
    except (OSError, ValueError):
        return False


def _without_password(address: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", address)
