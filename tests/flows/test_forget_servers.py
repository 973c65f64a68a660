"""`forget` where production has it: MLflow's tables in PostgreSQL, and a real MLflow server in front of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NoReturn

import psycopg
import pytest

from flows.forget import forget
from likeness.errors import ServerUnreachable
from likeness.records import Consent, Enrolment, Subject
from likeness.scan import Needles, scan_database
from likeness.settings import load_settings
from likeness.unregistering import _pages
from tasks.runtime import Tools
from tests.likeness.fabricated import World, build, register_once
from tests.servers import MlflowServer, Postgres, has_postgres

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def postgres(lacking: Callable[[str], NoReturn]) -> Iterator[Postgres]:
    if not has_postgres():
        lacking("PostgreSQL is not installed (Debian: postgresql)")
    server = Postgres()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def pristine(postgres: Postgres, root: Path) -> str:
    """Name of a database with MLflow's empty tables, to be copied. Another process makes them: sessions of this one would stay open."""
    address = postgres.database("pristine")
    make = f"from likeness.registry import Registry; Registry({address!r}, '/nowhere').client.search_experiments()"
    subprocess.run([sys.executable, "-c", make], check=True, cwd=root, capture_output=True, timeout=300)
    return "pristine"


@pytest.fixture(scope="module")
def database(postgres: Postgres, pristine: str) -> str:
    """A database of MLflow's."""
    return postgres.database("mlflow", like=pristine)


@pytest.fixture
def tools(own_home: Path, database: str, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """MLflow's rows in PostgreSQL, its artifacts in a folder."""
    own_home.mkdir()
    monkeypatch.setenv("PREFECT_HOME", str(own_home / "prefect"))
    monkeypatch.setenv("LIKENESS_REGISTRY__TRACKING_URI", database)
    monkeypatch.setenv("LIKENESS_REGISTRY__ARTIFACT_ROOT", str(own_home / "mlflow-artifacts"))
    return Tools(load_settings())


def lived(tools: Tools, subject: str) -> World:
    tools.enrol(Enrolment(subject=Subject(id=subject, noun="woman", consent=Consent(source="ticket 1")), source=f"store:uploads/{subject}/"))
    world = build(tools.store, subject=subject, weights=f"weights of {subject}".encode())
    register_once(world, tools.registry)
    return world


def holds(database: str, world: World) -> bool:
    """Whether any cell says who it was."""
    digests = frozenset({world.adapter.digest, world.training_set.digest, *(p.sha256 for p in world.intake.photos)})
    return scan_database(database, Needles(world.subject.id, digests)).hits > 0


def test_in_postgres_every_row_is_deleted_and_the_tables_are_searched(tools: Tools, database: str) -> None:
    ada, bea = lived(tools, "ada"), lived(tools, "bea")
    assert holds(database, ada)                                # the test can fail
    receipt = forget(tools, "ada")
    assert receipt.clean, receipt.scan
    assert receipt.scan["mlflow database"].objects > 30        # tables
    assert any("vacuum" in words for words in receipt.left)
    assert not holds(database, ada)
    assert holds(database, bea)
    assert tools.registry.champion("bea") is not None
    assert forget(tools, "ada") == receipt


def test_a_row_that_was_left_in_postgres_is_found(tools: Tools) -> None:
    lived(tools, "eve")
    run = tools.registry.client.create_run(tools.registry.client.create_experiment("somebody else's"), tags={"note": "about eve"})
    receipt = forget(tools, "eve")
    assert (receipt.clean, receipt.scan["mlflow database"].hits) == (False, 1)
    tools.registry.client.delete_tag(run.info.run_id, "note")
    assert forget(tools, "eve").clean


@pytest.mark.parametrize("cell", ["'{\"who\": \"nobody-else\"}'::jsonb", "'about nobody-else'::bytea", "'about nobody-else'::text"])
def test_a_cell_of_any_type_is_searched(postgres: Postgres, cell: str) -> None:
    name = f"cells{abs(hash(cell))}"
    address, needles = postgres.database(name), Needles("nobody-else", frozenset())
    with psycopg.connect(address.replace("postgresql+psycopg", "postgresql"), autocommit=True) as db:
        db.execute(b"CREATE TABLE t AS SELECT 1 AS number")
        assert scan_database(address, needles).hits == 0
        db.execute(f"CREATE TABLE u AS SELECT {cell} AS cell".encode())
    assert scan_database(address, needles).hits == 1


def test_through_a_server_nothing_is_shown_any_more_and_the_receipt_says_what_its_database_keeps(
        own_home: Path, postgres: Postgres, pristine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_home.mkdir()
    monkeypatch.setenv("PREFECT_HOME", str(own_home / "prefect"))
    server = MlflowServer(postgres.database("served", like=pristine), tmp_path / "server")
    try:
        monkeypatch.setenv("LIKENESS_REGISTRY__TRACKING_URI", server.address)
        tools = Tools(load_settings())
        client = tools.registry.client
        lived(tools, "ada")
        lived(tools, "bea")
        stored = [p for p in server.artifacts.rglob("*") if p.is_file() and b"weights of ada" in p.read_bytes()]
        assert stored                                          # the test can fail
        runs = _pages(partial(client.search_runs, [e.experiment_id for e in client.search_experiments()], max_results=1))
        assert {r.data.tags["likeness.subject"] for r in runs} == {"ada", "bea"}
        receipt = forget(tools, "ada")
        assert receipt.clean, receipt.scan
        assert {"mlflow database", "mlflow artifacts"}.isdisjoint(receipt.scan)
        assert any("MLflow server's database" in words for words in receipt.left)
        assert any("was not searched" in words for words in receipt.left)
        assert not [p for p in server.artifacts.rglob("*") if p.is_file() and b"weights of ada" in p.read_bytes()]
        experiments = [e.experiment_id for e in client.search_experiments()]
        assert {r.data.tags["likeness.subject"] for r in client.search_runs(experiments) if "likeness.subject" in r.data.tags} == {"bea"}
        assert [m.name for m in client.search_registered_models()] == ["likeness.bea"]
        assert {m.tags["likeness.subject"] for m in client.search_logged_models(experiments) if "likeness.subject" in m.tags} == {"bea"}
        assert not Needles("ada", frozenset()).in_text(receipt.model_dump_json())
        tools.registry.erase("ada")                            # once more, on what is marked as deleted
    finally:
        server.stop()


def test_a_database_that_does_not_answer_is_weather() -> None:
    with pytest.raises(ServerUnreachable, match="could not be searched"):
        scan_database("postgresql+psycopg://likeness@127.0.0.1:1/none", Needles("ada", frozenset()))
