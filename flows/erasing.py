"""Erasing a subject's flow runs from Prefect's own database, an SQLite file or PostgreSQL, with every row that names one: task runs, states, artifacts, logs, events.

Prefect's API deletes a run and keeps what its events, logs and artifacts say of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from likeness.errors import IntegrityError, ServerUnreachable, TransientError
from likeness.scan import purge_free_pages

_TABLES = {"flow_run", "task_run", "artifact"}
_AT_ONCE = 20                   # ids in one statement


def erase_runs(address: str, subject: str) -> None:
    """Delete flow runs whose parameters name the subject, and all that names those. May be called any number of times, also while the server runs on PostgreSQL.

    Args:
        address: SQLAlchemy's, of Prefect's database; a file that is not there holds nothing.
        subject: id of the Subject.

    Raises:
        TransientError: if a server holds the file for more than a minute.
        IntegrityError: if the file is damaged.
        ServerUnreachable: if the database does not answer.
    """
    url = sa.make_url(address)
    file = Path(url.database or "") if url.get_backend_name() == "sqlite" else None
    if file is not None and not file.exists():
        return
    engine = sa.create_engine(url, connect_args={} if file is None else {"timeout": 60})
    try:
        with engine.begin() as db:
            known = sa.inspect(db)
            tables = {name: [c["name"] for c in known.get_columns(name)] for name in known.get_table_names()}
            if tables.keys() >= _TABLES:
                runs = _runs_of(db, subject)
                words = [*runs, *_ids_of(db, "task_run", runs), *_ids_of(db, "artifact", runs)]
                for name, columns in tables.items():
                    _delete_rows(db, name, columns, words)
        if file is not None:
            engine.dispose()
            purge_free_pages(file)
    except sa.exc.DBAPIError as e:
        if file is None:
            raise ServerUnreachable(f"Prefect's database could not be changed ({type(e).__name__}): see that it answers, then run the same command again") from e
        if isinstance(e, sa.exc.OperationalError):
            raise TransientError(f"Prefect's database cannot be changed now ({e.orig}): stop its server, then run the same command again") from e
        raise IntegrityError(f"Prefect's database {file.name} is damaged ({e.orig}): restore it from a backup or, if its history is not needed, "
                             "delete it, then run the same command again") from e
    finally:
        engine.dispose()


def _runs_of(db: sa.Connection, subject: str) -> list[str]:
    rows = db.execute(sa.text("SELECT CAST(id AS TEXT), CAST(parameters AS TEXT) FROM flow_run WHERE CAST(parameters AS TEXT) LIKE :word"), {"word": f"%{subject}%"})
    return [run for run, parameters in rows if subject in _strings(json.loads(parameters))]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)


def _ids_of(db: sa.Connection, table: str, runs: Sequence[str]) -> list[str]:
    return [row[0] for run in runs for row in db.execute(sa.text(f'SELECT CAST(id AS TEXT) FROM "{table}" WHERE CAST(flow_run_id AS TEXT) = :run'), {"run": run})]


def _delete_rows(db: sa.Connection, table: str, columns: Sequence[str], words: Sequence[str]) -> None:
    for first in range(0, len(words), _AT_ONCE):
        some = words[first:first + _AT_ONCE]
        where = " OR ".join(f'CAST("{column}" AS TEXT) LIKE :word{n}' for column in columns for n in range(len(some)))
        db.execute(sa.text(f'DELETE FROM "{table}" WHERE {where}'), {f"word{n}": f"%{word}%" for n, word in enumerate(some)})
