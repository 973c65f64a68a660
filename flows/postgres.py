"""PostgreSQL for one home: this machine's own programs on a cluster below the home, on loopback, with a password that only this home knows.

    prepare -> the server of `likeness up` -> make_databases          address, purge: for `forget`

PostgreSQL refuses to run as root. Then it runs as the account `postgres`, which Debian's package makes, with leave to pass through the home's closed folders.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from likeness.errors import RecipeError, ResourceError, ServerUnreachable, translated
from likeness.settings import Settings

USER = "likeness"
DATABASES = ("prefect", "mlflow")
ACCOUNT = "postgres"
DEBIAN = Path("/usr/lib/postgresql")         # a folder per version, none of them on PATH
# A log names nobody: no statements, no details. Deleted rows leave the write-ahead log with its next file: none is used again
_OPTIONS = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "log_error_verbosity": "terse", "log_min_error_statement": "panic", "log_checkpoints": "off",
            "wal_level": "minimal", "max_wal_senders": "0", "wal_recycle": "off", "max_connections": "100"}


@dataclass(frozen=True)
class Postgres:
    """The cluster of a home."""

    folder: Path
    port: int

    @classmethod
    def of(cls, settings: Settings) -> Postgres | None:
        """None if `up` keeps tables in SQLite files."""
        return None if settings.up.postgres_port is None else cls(settings.home / "postgres", settings.up.postgres_port)

    @property
    def command(self) -> tuple[str, ...]:
        """Of the server.

        Raises:
            RecipeError: if PostgreSQL is not installed.
        """
        binary = programs() / "postgres"
        options = [word for name, value in _OPTIONS.items() for word in ("-c", f"{name}={value}")]
        return (*_as_account(), str(binary), "-D", str(self._data), "-p", str(self.port), *options)

    def prepare(self) -> None:
        """Make an empty cluster, unless there is one.

        Raises:
            RecipeError: if PostgreSQL is not installed, or there is no account for it to run as.
            ResourceError: if the cluster could not be made.
        """
        if (self._data / "PG_VERSION").exists():
            return
        binary = programs() / "initdb"
        words = (*_as_account(), str(binary), "-D", str(self._data), "-U", USER, "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", f"--pwfile={self._password_file}")
        with translated("making the database cluster"):
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            shutil.rmtree(self._data, ignore_errors=True)              # of an attempt that was killed
            self._password_file.unlink(missing_ok=True)
            with open(os.open(self._password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_urlsafe(24))
            if os.geteuid() == 0:
                account = pwd.getpwnam(ACCOUNT)
                for path in (self.folder, self._password_file):
                    os.chown(path, account.pw_uid, account.pw_gid)
            made = subprocess.run(words, capture_output=True, text=True, cwd=self.folder, check=False)
        if made.returncode != 0:
            raise ResourceError(f"PostgreSQL could not make its cluster in postgres/ below the home: {(made.stderr.strip().splitlines() or ['no reason given'])[-1]}")

    def environment(self, database: str) -> dict[str, str]:
        """Of a server that keeps its tables here: the password stands in no command."""
        name = {"prefect": "PREFECT_API_DATABASE_CONNECTION_URL", "mlflow": "MLFLOW_BACKEND_STORE_URI"}[database]
        driver = {"prefect": "asyncpg", "mlflow": "psycopg"}[database]
        return {name: f"postgresql+{driver}://{USER}@127.0.0.1:{self.port}/{database}", "PGPASSWORD": self.password}

    def address(self, database: str) -> str:
        """SQLAlchemy's, with the password."""
        return f"postgresql+psycopg://{USER}:{quote(self.password, safe='')}@127.0.0.1:{self.port}/{database}"

    @property
    def password(self) -> str:
        """Made with the cluster.

        Raises:
            RecipeError: if there is no cluster.
        """
        try:
            return self._password_file.read_text()
        except FileNotFoundError as e:
            raise RecipeError("there is no postgres/ below this home: `likeness up` makes it") from e

    @property
    def answers(self) -> bool:
        """Whether connections are taken."""
        asked = [str(programs() / "pg_isready"), "--quiet", "--host=127.0.0.1", f"--port={self.port}"]
        return subprocess.run(asked, check=False, capture_output=True).returncode == 0

    def make_databases(self) -> None:
        """Of the two servers, unless they are there.

        Raises:
            RecipeError: without psycopg.
            ServerUnreachable: if the cluster does not answer.
        """
        try:
            import psycopg
        except ImportError as e:
            raise RecipeError("up.postgres_port needs psycopg, for MLflow's server too: pip install 'likeness[service]'") from e
        try:
            with psycopg.connect(host="127.0.0.1", port=self.port, user=USER, password=self.password, dbname="postgres", autocommit=True, connect_timeout=30) as db:
                there = {name for (name,) in db.execute("SELECT datname FROM pg_database")}
                for name in (name for name in DATABASES if name not in there):
                    db.execute(f'CREATE DATABASE "{name}"'.encode())
        except psycopg.Error as e:
            raise ServerUnreachable(f"PostgreSQL of this home does not make databases ({type(e).__name__}): logs/postgres.log says more") from e

    def purge(self) -> None:
        """Rewrite every table, its statistics and the write-ahead log, so that nothing deleted is left in the cluster's files.

        Raises:
            ServerUnreachable: if the cluster does not answer.
        """
        import psycopg

        try:
            for database in DATABASES:
                with psycopg.connect(host="127.0.0.1", port=self.port, user=USER, password=self.password, dbname=database, autocommit=True, connect_timeout=30) as db:
                    # statistics hold the commonest values of columns, and stay as they are where a table is empty now; they lie in a table themselves
                    for statement in ("DELETE FROM pg_statistic", "VACUUM (FULL, ANALYZE)", "VACUUM FULL pg_statistic", "CHECKPOINT", "SELECT pg_switch_wal()", "CHECKPOINT"):
                        db.execute(statement.encode())
        except psycopg.Error as e:
            raise ServerUnreachable(f"PostgreSQL of this home could not be swept ({type(e).__name__}): see that `likeness status` shows it running, then run the same command again") from e

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    @property
    def _password_file(self) -> Path:
        return self.folder / "password"


def programs() -> Path:
    """Where `initdb` and `postgres` lie.

    Raises:
        RecipeError: if PostgreSQL is not installed.
    """
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    found = sorted(DEBIAN.glob("*/bin/initdb"), key=lambda p: int(p.parents[1].name) if p.parents[1].name.isdigit() else 0)
    if not found:
        raise RecipeError("up.postgres_port needs PostgreSQL's server programs: install them (Debian, Ubuntu: the package postgresql), or leave the setting away")
    return found[-1].parent


def _as_account() -> tuple[str, ...]:
    if os.geteuid() != 0:
        return ()
    try:
        pwd.getpwnam(ACCOUNT)
    except KeyError as e:
        raise RecipeError("PostgreSQL refuses to run as root, and there is no account 'postgres': run `likeness up` as another user, or make the account") from e
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise RecipeError("PostgreSQL refuses to run as root: run `likeness up` as another user, or install setpriv (util-linux)")
    return (setpriv, f"--reuid={ACCOUNT}", f"--regid={ACCOUNT}", "--clear-groups", "--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--")
