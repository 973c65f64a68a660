"""`forget`: nothing that names the subject is left in any store, whoever dies on the way and whoever comes back."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.forget import forget
from likeness.erasure import Fenced, check_not_forgotten, tombstone_key
from likeness.errors import InputError, LikenessError, SubjectForgotten
from likeness.lineage import audit, walk
from likeness.once import once
from likeness.records import Consent, Enrolment, Release, Subject
from likeness.scan import Needles
from likeness.settings import load_settings
from tasks.runtime import Tools
from tests.likeness.fabricated import CLAIMS, World, build, register_once

CANARY = "zebrafinch-canary"
STEPS = ["tombstone", "remember", "store", "mlflow", "reports", "prefect", "scan", "receipt"]
pytestmark = pytest.mark.timeout(900)


class Died(BaseException):
    """The process ends here."""


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: 8 seconds."""
    from likeness.registry import Registry

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Registry(f"sqlite:///{path}", path.parent / "artifacts").client.search_experiments()
    return path


@pytest.fixture
def tools(own_home: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    own_home.mkdir()
    shutil.copy(empty_database, own_home / "mlflow.db")
    monkeypatch.setenv("PREFECT_HOME", str(own_home / "prefect"))
    return Tools(load_settings())


def enrol(tools: Tools, subject: str, source: str) -> None:
    tools.enrol(Enrolment(subject=Subject(id=subject, noun="woman", consent=Consent(source="ticket 1")), source=source))


def lived(tools: Tools, subject: str = "ada", *, source: str | None = None) -> World:
    """A subject as a run leaves them, with a canary in every store."""
    world = build(tools.store, subject=subject, weights=f"{subject} weights {CANARY}-{subject}".encode())
    enrol(tools, subject, source or f"store:uploads/{subject}/")
    register_once(world, tools.registry)
    reports = tools.settings.home / "reports"
    reports.mkdir(exist_ok=True)
    (reports / f"{subject}.html").write_text(f"<p>{CANARY}-{subject}")
    (reports / f"{subject}.77.part").write_text(f"<p>{CANARY}-{subject}")
    tools.store.put_if_absent(f"uploads/{subject}/1.jpg", f"photo {CANARY}-{subject}".encode())
    run = tools.registry.client.search_runs([tools.registry.client.get_experiment_by_name("likeness/maquette").experiment_id],
                                            f"tags.`likeness.subject` = '{subject}'")[0].info.run_id
    tools.registry.client.set_tag(run, "note", f"{CANARY}-{subject} " * 200)
    prefect = tools.settings.home / "prefect" / "prefect.db"
    prefect.parent.mkdir(exist_ok=True)
    with sqlite3.connect(prefect) as db:
        for table in ("flow_run (id, name, parameters)", "task_run (id, flow_run_id, name)", "artifact (id, flow_run_id, data)", "events (id, payload)"):
            db.execute(f"create table if not exists {table}")
        db.execute("insert into flow_run values (?, ?, ?)", (f"run-{subject}-0", f"personalize {subject}", json.dumps({"subject": subject})))
        db.execute("insert into task_run values (?, ?, ?)", (f"task-{subject}-0", f"run-{subject}-0", f"ingest {subject}"))
        db.execute("insert into artifact values (?, ?, ?)", (f"artifact-{subject}-0", f"run-{subject}-0", f"{CANARY}-{subject} " * 500))
        db.execute("insert into events values (?, ?)", ("e", json.dumps({"id": f"prefect.task-run.task-{subject}-0", "name": f"ingest {subject}"})))
    return world


def traces(home: Path, world: World) -> list[str]:
    """Files whose name or raw bytes say who it was; the tombstone, which may, aside."""
    subject = world.subject.id
    words = [f"{CANARY}-{subject}", world.adapter.digest, world.adapter.weights.sha256, world.training_set.digest, f"subjects/{subject}/", f"personalize {subject}",
             *(p.sha256 for p in world.intake.photos), *(p.source_sha256 for p in world.intake.photos)]
    found = []
    for path in home.rglob("*"):
        name = path.relative_to(home).as_posix()
        if path.is_file() and name != f"store/{tombstone_key(subject)}" and (f"/{subject}/" in name or any(w.encode() in path.read_bytes() for w in words)):
            found.append(name)
    return found


def test_nothing_is_left_in_any_store_and_others_keep_everything(tools: Tools) -> None:
    ada, bea = lived(tools), lived(tools, "bea")
    home = tools.settings.home
    assert {name.partition("/")[0] for name in traces(home, ada)} == {"store", "mlflow.db", "mlflow-artifacts", "reports", "prefect"}      # the test can fail
    before = set(traces(home, bea))
    receipt = forget(tools, "ada", canaries=[f"{CANARY}-ada"])
    assert receipt.clean, receipt.scan
    assert traces(home, ada) == []
    assert set(traces(home, bea)) == before
    assert walk(tools.store, "bea").ok
    assert [r.subject for r in audit(tools.store, photo=bea.intake.photos[0].sha256)] == ["bea"]
    assert tools.registry.champion("bea") is not None
    assert tools.registry.champion("ada") is None
    with sqlite3.connect(home / "prefect" / "prefect.db") as db:
        assert db.execute("select id from flow_run").fetchall() == [("run-bea-0",)]
        assert len(db.execute("select * from task_run").fetchall()) == 1


def test_the_receipt_and_the_tombstone_hold_no_personal_data(tools: Tools) -> None:
    world = lived(tools)
    receipt = forget(tools, "ada")
    tombstone = (tools.store.get(tombstone_key("ada")) or b"").decode()
    assert receipt.receipt in tombstone
    for text in (tombstone, receipt.model_dump_json()):
        assert not Needles("ada", frozenset()).in_text(text)         # as a word: hexadecimal digits spell it by chance
        assert not any(p.sha256 in text for p in world.intake.photos)
    assert "the folder" not in " ".join(receipt.left)


def test_a_second_forget_changes_nothing_and_gives_the_same_receipt(tools: Tools) -> None:
    lived(tools)
    first = forget(tools, "ada")
    steps: list[str] = []
    assert forget(tools, "ada", on_step=steps.append) == first
    assert steps == []


@pytest.mark.parametrize("last", STEPS)
def test_killed_after_any_step_it_goes_on_where_it_was(tools: Tools, last: str) -> None:
    world = lived(tools)

    def die(name: str) -> None:
        if name == last:
            raise Died

    with pytest.raises(Died):
        forget(tools, "ada", on_step=die)
    with pytest.raises(SubjectForgotten):
        walk(tools.store, "ada")
    receipts = [forget(tools, "ada", canaries=[f"{CANARY}-ada"]), forget(tools, "ada")]
    assert receipts[0] == receipts[1]
    assert receipts[0].clean
    assert receipts[0].searched_for > 20, "the digests were lost on the way"
    assert traces(tools.settings.home, world) == []


@pytest.mark.parametrize("step", ["artifacts erased", "rows erased"])
def test_killed_inside_mlflow_it_goes_on(tools: Tools, step: str) -> None:
    world = lived(tools)

    def die(name: str) -> None:
        if name == step:
            raise Died

    tools.registry._on_step = die
    with pytest.raises(Died):
        forget(tools, "ada")
    tools.registry._on_step = None
    assert forget(tools, "ada").clean
    assert traces(tools.settings.home, world) == []


@pytest.mark.parametrize("at", ["experiment", "run", "params and tags", "inputs", "run artifacts", "model", "model artifacts", "version", "alias"])
def test_a_worker_that_wakes_up_in_the_middle_of_registering_leaves_nothing(tools: Tools, at: str) -> None:
    world = build(tools.store, weights=f"weights {CANARY}-ada".encode())
    enrol(tools, "ada", "store:uploads/ada/")
    other = Tools(tools.settings)

    def forgotten_meanwhile(name: str) -> None:
        if name == at:
            tools.registry._on_step = None
            forget(other, "ada")

    tools.registry._on_step = forgotten_meanwhile

    def make(claim: object) -> Release:
        return tools.registry.register(world.dossier(), check=lambda: check_not_forgotten(tools.store, "ada"))

    with pytest.raises(LikenessError):
        once(tools.store, world.register_call(), make, output=Release, claims=CLAIMS)
    assert tools.registry.champion("ada") is None
    assert forget(tools, "ada").clean
    assert traces(tools.settings.home, world) == []


def test_what_is_written_after_the_tombstone_is_taken_back(tools: Tools) -> None:
    lived(tools)
    forget(tools, "ada")
    with pytest.raises(SubjectForgotten):
        tools.store.put_if_absent("subjects/ada/photos/late.png", b"late")
    with pytest.raises(SubjectForgotten):
        enrol(tools, "ada", "store:uploads/ada/")
    with pytest.raises(SubjectForgotten, match="another id"):
        tools.standing("ada")
    assert list(tools.store.list("subjects/ada/")) == []
    assert tools.store.put_if_absent("subjects/ada2/photos/1.png", b"somebody else")


def test_a_swap_after_the_tombstone_leaves_nothing() -> None:
    from likeness.store import MemoryStore

    inner = MemoryStore()
    fenced = Fenced(inner)
    assert fenced.put_if_absent("subjects/ada/a", b"1")
    inner.put_if_absent(tombstone_key("ada"), b"anything at all counts")
    with pytest.raises(SubjectForgotten):
        fenced.compare_and_swap("subjects/ada/a", expected=b"1", new=b"2")
    assert fenced.get("subjects/ada/a") is None


@pytest.mark.parametrize("plant", [
    lambda home: (home / "store" / "bases").mkdir() or (home / "store" / "bases" / "x.json").write_text('{"who": "ada"}'),
    lambda home: (home / "notes.txt").write_text(f"seen: {CANARY}"),
    lambda home: (home / "mlflow-artifacts" / "ada").mkdir() or (home / "mlflow-artifacts" / "ada" / "x.bin").write_bytes(b"\0"),
    lambda home: (home / "mlflow-artifacts" / "copy.bin").write_bytes(b"ada photo 0"),
    lambda home: sqlite3.connect(home / "other.db").executescript("create table t (a); insert into t values ('about ada')"),
], ids=["store object", "canary", "file name", "copy of a photo", "cell of a database"])
def test_the_scan_finds_what_was_left_and_the_next_forget_is_clean(tools: Tools, plant: Callable[[Path], object]) -> None:
    lived(tools)
    home = tools.settings.home
    before = {p for p in home.rglob("*") if p.is_file()}
    plant(home)
    planted = {p for p in home.rglob("*") if p.is_file()} - before
    receipt = forget(tools, "ada", canaries=[CANARY])
    assert not receipt.clean
    assert sum(area.hits for area in receipt.scan.values()) == 1
    for path in planted:
        path.unlink()
    again = forget(tools, "ada", canaries=[CANARY])
    assert again.clean
    assert again.receipt == receipt.receipt


def test_photos_of_a_folder_or_a_shared_prefix_are_not_deleted_and_the_receipt_says_so(tools: Tools, tmp_path: Path) -> None:
    lived(tools, source=str(tmp_path))
    lived(tools, "bea", source="store:uploads/")
    assert any("read from" in words for words in forget(tools, "ada").left)
    assert tools.store.get("uploads/bea/1.jpg") is not None
    assert tmp_path.exists()


def test_an_id_that_is_none_is_refused(tools: Tools) -> None:
    with pytest.raises(InputError, match="no subject id"):
        forget(tools, "../ada")


def command(tools: Tools, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flows.cli", *words], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
                          env=os.environ | {"LIKENESS_HOME": str(tools.settings.home), "PYTHONPATH": str(Path(__file__).parents[2])})


def test_the_command_asks_prints_a_receipt_and_what_comes_later_says_forgotten(tools: Tools) -> None:
    lived(tools)
    asked = command(tools, "forget", "ada")
    assert (asked.returncode, asked.stdout) == (2, "")
    assert "--yes" in asked.stderr
    assert walk(tools.store, "ada").links
    done = command(tools, "forget", "ada", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clean"] is True
    lineage = command(tools, "lineage", "ada", "--json")
    assert (lineage.returncode, lineage.stdout) == (2, "")
    assert "was forgotten" in lineage.stderr
    audited = command(tools, "audit", "--code", "0.1.0+gccccccc", "--json")
    assert json.loads(audited.stdout) == {"releases": [], "forgotten": 1}
