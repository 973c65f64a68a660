"""Erasing a subject from MLflow: artifact bytes first, then the rows that say where they are, so that a crash in between loses no trace.

MLflow's own deletion marks rows as deleted, and keeps tags, inputs, versions and bytes. Where the database is ours to open it is emptied of the
subject in one transaction; through a server only what its API offers is done, and the rest is its operator's (docs/erasure.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from likeness.dossier import model_name
from likeness.scan import purge_free_pages

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from sqlalchemy import Connection

_TAG = "likeness.subject"
# (table, column, which ids), children before parents
_ROWS = (
    ("logged_model_metrics", "run_id", "runs"), ("logged_model_metrics", "model_id", "models"), ("logged_model_params", "model_id", "models"),
    ("logged_model_tags", "model_id", "models"), ("logged_models", "model_id", "models"),
    ("metrics", "run_uuid", "runs"), ("latest_metrics", "run_uuid", "runs"), ("params", "run_uuid", "runs"), ("tags", "run_uuid", "runs"),
    ("runs", "run_uuid", "runs"),
    ("registered_model_aliases", "name", "names"), ("model_version_tags", "name", "names"), ("model_versions", "name", "names"),
    ("registered_model_tags", "name", "names"), ("registered_models", "name", "names"),
)


def erase_from_database(uri: str, subject: str, *, delete_artifacts: Callable[[str], None], step: Callable[[str], None]) -> None:
    """Delete the subject's artifacts, then every row of theirs for good; an SQLite file is rewritten, so that its free pages hold nothing either.

    Args:
        uri: an SQLAlchemy address of MLflow's database.
        subject: id of the Subject.
        delete_artifacts: deletes what lies at an artifact address.
        step: told what was done.
    """
    import sqlalchemy

    file = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:////") else None
    if file is not None and not file.exists():
        return
    engine = sqlalchemy.create_engine(uri)
    try:
        with engine.connect() as db:
            for location in _locations(db, _ids(db, subject)):
                delete_artifacts(location)
                step("artifacts erased")
        with engine.begin() as db:
            _delete_rows(db, _ids(db, subject))
        step("rows erased")
    finally:
        engine.dispose()
    if file is not None:
        purge_free_pages(file)
        step("free pages erased")


def erase_through_server(client: MlflowClient, subject: str, *, delete_artifacts: Callable[[str], None], step: Callable[[str], None]) -> None:
    """Delete the subject's artifacts, and mark as deleted what MLflow's API can: registered model with versions, logged models, runs.

    The server's database keeps runs, logged models and inputs until its operator removes them.
    """
    from mlflow.entities import ViewType

    mine, name = f"tags.`{_TAG}` = '{subject}'", model_name(subject)
    for experiment in [e.experiment_id for e in _pages(partial(client.search_experiments, view_type=ViewType.ALL))]:
        for model in _pages(partial(client.search_logged_models, [experiment], mine)):
            delete_artifacts(model.artifact_location)
            client.delete_logged_model(model.model_id)
            step("model erased")
        for run in _pages(partial(client.search_runs, [experiment], mine, run_view_type=ViewType.ALL)):
            delete_artifacts(run.info.artifact_uri)
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
            step("run erased")
    if client.search_registered_models(f"name = '{name}'"):
        client.delete_registered_model(name)
        step("registered model erased")


def _pages(search: Callable[..., Any]) -> list[Any]:
    """Everything a search of MLflow's finds, page by page, before anything of it is deleted: that would move the pages."""
    found: list[Any] = []
    token = None
    while True:
        page = search(page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _ids(db: Connection, subject: str) -> dict[str, list[str]]:
    """Runs (also those marked as deleted), logged models and names of registered models of the subject."""
    runs = _column(db, "SELECT run_uuid FROM tags WHERE key = :tag AND value = :subject", tag=_TAG, subject=subject)
    models = _column(db, "SELECT model_id FROM logged_model_tags WHERE tag_key = :tag AND tag_value = :subject", tag=_TAG, subject=subject)
    models += _column(db, "SELECT model_id FROM logged_models WHERE source_run_id IN :runs", runs=runs)
    return {"runs": runs, "models": sorted(set(models)), "names": [model_name(subject)]}


def _locations(db: Connection, ids: dict[str, list[str]]) -> list[str]:
    return (_column(db, "SELECT artifact_uri FROM runs WHERE run_uuid IN :runs", runs=ids["runs"])
            + _column(db, "SELECT artifact_location FROM logged_models WHERE model_id IN :models", models=ids["models"]))


def _delete_rows(db: Connection, ids: dict[str, list[str]]) -> None:
    ends = ids["runs"] + ids["models"]
    inputs = _column(db, "SELECT input_uuid FROM inputs WHERE source_id IN :ends OR destination_id IN :ends", ends=ends)
    datasets = _column(db, "SELECT source_id FROM inputs WHERE source_type = 'DATASET' AND destination_id IN :ends", ends=ends)
    _execute(db, "DELETE FROM input_tags WHERE input_uuid IN :inputs", inputs=inputs)
    _execute(db, "DELETE FROM inputs WHERE input_uuid IN :inputs", inputs=inputs)
    # the same photo may have been given for two subjects
    _execute(db, "DELETE FROM datasets WHERE dataset_uuid IN :datasets AND dataset_uuid NOT IN (SELECT source_id FROM inputs)", datasets=datasets)
    for table, column, kind in _ROWS:
        _execute(db, f"DELETE FROM {table} WHERE {column} IN :ids", ids=ids[kind])


def _column(db: Connection, sql: str, **values: Any) -> list[str]:
    return [str(row[0]) for row in _execute(db, sql, **values)]


def _execute(db: Connection, sql: str, **values: Any) -> Any:
    from sqlalchemy import String, bindparam, text

    lists: list[Any] = [bindparam(name, expanding=True, type_=String()) for name, value in values.items() if isinstance(value, list)]
    return db.execute(text(sql).bindparams(*lists), values)
