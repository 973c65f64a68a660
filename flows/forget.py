"""forget: erase one subject everywhere, prove it with a scan, leave a tombstone and a receipt.

    tombstone -> remember digests -> store -> MLflow -> reports -> Prefect -> scan -> receipt

Every step may be done twice; killed anywhere and run again, it goes on. It is no Prefect flow: Prefect would keep another run that names the subject.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from likeness import digest
from likeness.erasure import Area, Forgotten, Receipt, bury, receipt_of, remember, replace, tombstone_key
from likeness.errors import IntegrityError, TransientError
from likeness.lineage import check_subject
from likeness.scan import Needles, files_below, purge_free_pages, scan_database, scan_files, scan_store
from likeness.store import LocalStore, Store, delete_prefix
from tasks.runtime import Tools


def forget(tools: Tools, subject: str, *, canaries: Sequence[str] = (), on_step: Callable[[str], None] = lambda name: None) -> Receipt:
    """Erase a subject; the receipt of the first time if that was done before.

    Args:
        tools: settings, store and registry.
        subject: id of the Subject; nothing needs to be known of them, a tombstone keeps the id from being used.
        canaries: more words that the scan looks for, for example one planted in a caption file.
        on_step: called with a step's name when it is done.

    Raises:
        InputError: if this is no subject id.
        TransientError: if a database is held by another process, or another process forgets the same subject.
        IntegrityError: if Prefect's database is damaged.
    """
    check_subject(subject)
    store = tools.bare_store                                   # the fence would stand in the way
    mark = bury(store, subject, today=datetime.now(UTC).date().isoformat())
    if isinstance(mark, Forgotten):
        delete_prefix(store, f"subjects/{subject}/")           # a worker killed between a write and its look at the tombstone
        return mark.receipt
    on_step("tombstone")
    noted = remember(store, subject, mark)
    if noted != mark:
        replace(store, subject, old=mark, new=noted)
    mark = noted
    on_step("remember")
    delete_prefix(store, f"subjects/{subject}/")
    if mark.uploads is not None:
        delete_prefix(store, mark.uploads)
    on_step("store")
    tools.registry.erase(subject)
    tools.registry.sweep_scratch(mark.digests)
    on_step("mlflow")
    for path in _reports(tools, subject):
        path.unlink(missing_ok=True)
    on_step("reports")
    _erase_from_prefect(_prefect_home(tools) / "prefect.db", subject)
    on_step("prefect")
    needles = Needles(subject, frozenset(mark.digests) - _of_others(store), tuple(canaries))
    receipt = receipt_of(subject, mark, searched_for=needles.count, scan=_scan(tools, store, needles), left=_left(tools, mark.source_outside))
    on_step("scan")
    if receipt.clean:                                          # otherwise the tombstone stays open, and the next `forget` does all of it again
        replace(store, subject, old=mark, new=Forgotten(receipt=receipt))
        on_step("receipt")
    return receipt


def _reports(tools: Tools, subject: str) -> list[Path]:
    """The subject's report, and what a killed process left of one."""
    name = re.compile(re.escape(subject) + r"(\.\d+)?\.(html|part)")
    return [path for path in files_below(tools.settings.home / "reports") if name.fullmatch(path.name)]


def _scan(tools: Tools, store: Store, needles: Needles) -> dict[str, Area]:
    home = tools.settings.home
    address, artifacts, prefect = tools.registry.tracking_uri, tools.registry.artifact_root, _prefect_home(tools)
    areas: dict[str, list[Path]] = {"reports": files_below(home / "reports"), "prefect": files_below(prefect)}
    if address.startswith("sqlite:////"):
        database = Path(address.removeprefix("sqlite:///"))
        areas["mlflow database"] = sorted(database.parent.glob(f"{database.name}*"))       # the write-ahead log too
    if isinstance(artifacts, Path):
        areas["mlflow artifacts"] = files_below(artifacts)
    seen = {path for paths in areas.values() for path in paths}
    inside = store.root if isinstance(store, LocalStore) else None
    areas["elsewhere in the home"] = [path for path in files_below(home) if path not in seen
                                      and (inside is None or not path.is_relative_to(inside) or path.is_relative_to(inside / ".tmp"))]
    found = {"store": scan_store(store, needles, besides=[tombstone_key(needles.subject)])}
    if "mlflow database" not in areas and not tools.registry.remote:
        found["mlflow database"] = scan_database(address, needles)
    return found | {name: scan_files(paths, needles, root=home) for name, paths in areas.items()}


def _of_others(store: Store) -> frozenset[str]:
    """Digests that another subject holds as well: the same photo given for two people is still the other one's."""
    found: set[str] = set()
    for key in store.list("subjects/"):
        data = store.get(key) or b""
        found |= {key.rpartition("/")[2].partition(".")[0], digest.of_bytes(data)}
        if key.endswith(".json"):
            found |= {word.decode() for word in re.findall(rb"[0-9a-f]{64}", data)}
    return frozenset(found)


def _left(tools: Tools, source_outside: bool) -> tuple[str, ...]:
    left = ["backups, snapshots and older versions of whatever holds these stores"]
    if source_outside:
        left.append("the folder or archive that the photos were read from")
    registry = tools.registry
    if registry.remote:
        left.append("rows of the MLflow server's database that are marked as deleted, and its inputs (docs/erasure.md)")
    elif not registry.tracking_uri.startswith("sqlite:"):
        left.append("what the database server of MLflow keeps of deleted rows until it vacuums, and its log")
    if not isinstance(registry.artifact_root, Path):
        left.append("MLflow's artifacts: those of the subject's runs and models were deleted, the place they lay in was not searched")
    if os.environ.get("PREFECT_API_URL"):
        left.append("flow runs in the Prefect server's database (docs/erasure.md)")
    return tuple(left)


def _prefect_home(tools: Tools) -> Path:
    return Path(os.environ.get("PREFECT_HOME") or tools.settings.home / "prefect")


def _erase_from_prefect(database: Path, subject: str) -> None:
    """Delete the subject's flow runs from Prefect's own SQLite file, with every row that names one: task runs, states, artifacts, logs, events.

    Raises:
        TransientError: if a server holds the file for more than a minute.
    """
    if not database.exists():
        return
    try:
        with closing(sqlite3.connect(database, timeout=60)) as db:
            tables = {name: [c[1] for c in db.execute(f'PRAGMA table_info("{name}")')]
                      for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()}
            if {"flow_run", "task_run", "artifact"} <= tables.keys():
                runs = [row[0] for row in db.execute("SELECT DISTINCT r.id FROM flow_run r, json_tree(r.parameters) p WHERE p.atom = ?", (subject,))]
                words = [*runs, *_named(db, "task_run", runs), *_named(db, "artifact", runs)]
                with db:
                    for name, columns in tables.items():
                        for word in words:
                            where = " OR ".join(f'instr("{column}", ?)' for column in columns)
                            db.execute(f'DELETE FROM "{name}" WHERE {where}', [word] * len(columns))
        purge_free_pages(database)
    except sqlite3.OperationalError as e:
        raise TransientError(f"Prefect's database cannot be changed now ({e}): stop its server, then run the same command again") from e
    except sqlite3.DatabaseError as e:
        raise IntegrityError(f"Prefect's database {database.name} is damaged ({e}): restore it from a backup or, if its history is not needed, "
                             "delete it, then run the same command again") from e


def _named(db: sqlite3.Connection, table: str, runs: Sequence[str]) -> list[str]:
    return [row[0] for run in runs for row in db.execute(f'SELECT id FROM "{table}" WHERE flow_run_id = ?', (run,))]
