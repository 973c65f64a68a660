"""forget: erase one subject everywhere, prove it with a scan, leave a tombstone and a receipt.

    tombstone -> remember digests -> store -> MLflow -> reports -> Prefect -> scan -> receipt

Every step may be done twice; killed anywhere and run again, it goes on. It is no Prefect flow: Prefect would keep another run that names the subject.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from flows.erasing import erase_runs
from flows.postgres import Postgres
from flows.services import ARTIFACTS, PAGES, own_database
from likeness import digest
from likeness.erasure import Area, Forgotten, Receipt, bury, receipt_of, remember, replace, tombstone_key
from likeness.lineage import check_subject
from likeness.scan import Needles, files_below, scan_database, scan_files, scan_store
from likeness.settings import S3StoreSettings
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
    tools.registry.erase(subject, database=own_database(tools.settings, "mlflow"))
    tools.registry.sweep_scratch(mark.digests)
    on_step("mlflow")
    for path in _reports(tools, subject):
        path.unlink(missing_ok=True)
    on_step("reports")
    erase_runs(f"sqlite:///{_prefect_home(tools) / 'prefect.db'}", subject)
    if (database := own_database(tools.settings, "prefect")) is not None:
        erase_runs(database, subject)
    if (cluster := Postgres.of(tools.settings)) is not None:
        cluster.purge()
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
    pages = set(files_below(prefect / PAGES))                  # Prefect's own, copied out of its package: they hold words of many languages
    areas: dict[str, list[Path]] = {"reports": files_below(home / "reports"), "prefect": [path for path in files_below(prefect) if path not in pages]}
    if address.startswith("sqlite:////"):
        database = Path(address.removeprefix("sqlite:///"))
        areas["mlflow database"] = sorted(database.parent.glob(f"{database.name}*"))       # the write-ahead log too
    if isinstance(artifacts, Path):
        areas["mlflow artifacts"] = files_below(artifacts)
    seen = pages | {path for paths in areas.values() for path in paths} | _tombstones_file(tools, needles.subject)
    inside = store.root if isinstance(store, LocalStore) else None
    areas["elsewhere in the home"] = [path for path in files_below(home) if path not in seen
                                      and (inside is None or not path.is_relative_to(inside) or path.is_relative_to(inside / ".tmp"))]
    found = {"store": scan_store(store, needles, besides=[tombstone_key(needles.subject)])}
    databases = {"mlflow": own_database(tools.settings, "mlflow"), "prefect": own_database(tools.settings, "prefect")}
    if "mlflow database" not in areas and not tools.registry.remote:
        databases["mlflow"] = address
    found |= {f"{name} database": scan_database(where, needles, whose={"mlflow": "MLflow", "prefect": "Prefect"}[name]) for name, where in databases.items() if where is not None}
    if (bucket := _artifacts_bucket(tools)) is not None:
        found["mlflow artifacts"] = scan_store(bucket, needles)
    return found | {name: scan_files(paths, needles, root=home) for name, paths in areas.items()}


def _artifacts_bucket(tools: Tools) -> Store | None:
    """Where MLflow's server of `likeness up` keeps artifacts, if that is a bucket."""
    settings = tools.settings.store
    if tools.settings.up.bucket_port is None or not isinstance(settings, S3StoreSettings):
        return None
    from likeness.s3 import S3Store

    return S3Store(settings.model_copy(update={"prefix": f"{ARTIFACTS}/"}))


def _tombstones_file(tools: Tools, subject: str) -> set[Path]:
    """That of the tombstone, which may name the subject, where the bucket of `likeness up` keeps it below the home."""
    settings = tools.settings.store
    if tools.settings.up.bucket_port is None or not isinstance(settings, S3StoreSettings):
        return set()
    from flows.bucket import file_of

    return {file_of(tools.settings.home / "bucket", settings.bucket, settings.prefix + tombstone_key(subject))}


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
    own = Postgres.of(tools.settings) is not None
    if registry.remote and own_database(tools.settings, "mlflow") is None:
        left.append("rows of the MLflow server's database that are marked as deleted, and its inputs (docs/erasure.md)")
    elif not own and not registry.tracking_uri.startswith("sqlite:"):
        left.append("what the database server of MLflow keeps of deleted rows until it vacuums, and its log")
    if not isinstance(registry.artifact_root, Path) and _artifacts_bucket(tools) is None:
        left.append("MLflow's artifacts: those of the subject's runs and models were deleted, the place they lay in was not searched")
    if os.environ.get("PREFECT_API_URL") and own_database(tools.settings, "prefect") is None:
        left.append("flow runs in the Prefect server's database (docs/erasure.md)")
    return tuple(left)


def _prefect_home(tools: Tools) -> Path:
    return Path(os.environ.get("PREFECT_HOME") or tools.settings.home / "prefect")
