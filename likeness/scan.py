"""The scan: does any store still name a subject? Raw bytes are searched, free pages of databases included, and every object is hashed."""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from likeness.erasure import Area
from likeness.errors import ServerUnreachable
from likeness.store import Store

log = logging.getLogger(__name__)

# Three letters between two other bytes occur by chance in any picture: a short id is searched where text is, not in raw bytes.
SHORT_ID = 8
_EDGE_BEFORE, _EDGE_AFTER = rb"(?<![A-Za-z0-9])", rb"(?![A-Za-z0-9])"


@dataclass(frozen=True)
class Needles:
    """What must not be found: the subject's id as a word, digests, and words that somebody planted."""

    subject: str
    digests: frozenset[str]
    canaries: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many words and digests are searched for."""
        return 1 + len(self.digests) + len(self.canaries)

    def in_name(self, name: str) -> bool:
        """Whether a key or file name says who it is."""
        return self._word.search(name.encode()) is not None or self._long(name.encode())

    def in_bytes(self, data: bytes) -> bool:
        """Whether an object holds a needle, or is one: its own digest is among them."""
        if hashlib.sha256(data).hexdigest() in self.digests or self._long(data):
            return True
        return (len(self.subject) >= SHORT_ID or _is_text(data)) and self._word.search(data) is not None

    def in_text(self, text: str) -> bool:
        """Whether a cell of a database holds a needle."""
        return self.in_name(text)

    def _long(self, data: bytes) -> bool:
        return any(found.decode() in self.digests for found in _HEX.findall(data)) or any(c.encode() in data for c in self.canaries)

    @property
    def _word(self) -> re.Pattern[bytes]:
        return re.compile(_EDGE_BEFORE + re.escape(self.subject.encode()) + _EDGE_AFTER)


# Overlapping: in a database two hexadecimal values may stand side by side without anything between them.
_HEX = re.compile(rb"(?=([0-9a-f]{64}))")


def scan_store(store: Store, needles: Needles, *, besides: Iterable[str] = ()) -> Area:
    """Search every key and object of the store, except the keys `besides`."""
    hits = objects = 0
    skipped = set(besides)
    for key in store.list(""):
        if key in skipped:
            continue
        objects += 1
        if needles.in_name(key) or needles.in_bytes(store.get(key) or b""):
            hits += 1
            log.warning("the store still names the subject: %s", key)
    return Area(objects=objects, hits=hits)


def scan_files(paths: Iterable[Path], needles: Needles, *, root: Path) -> Area:
    """Search files: names below `root`, raw bytes, and the cells of SQLite databases."""
    hits = objects = 0
    for path in paths:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue                                 # somebody's temporary file
        objects += 1
        named = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        if needles.in_name(named) or needles.in_bytes(data) or (data.startswith(b"SQLite format 3\0") and _in_cells(path, needles)):
            hits += 1
            log.warning("a file still names the subject: %s", named)
    return Area(objects=objects, hits=hits)


def scan_database(address: str, needles: Needles, *, whose: str = "MLflow") -> Area:
    """Search every cell of every table of a database that is no file of ours (PostgreSQL, MySQL). What the server keeps of deleted rows until it
    vacuums, and its log, are out of reach.

    Args:
        address: an SQLAlchemy address.
        needles: what must not be found.
        whose: for messages.

    Raises:
        ServerUnreachable: if the database does not answer.
    """
    import sqlalchemy

    hits = objects = 0
    engine = sqlalchemy.create_engine(address)
    try:
        known = sqlalchemy.MetaData()
        known.reflect(engine)
        with engine.connect() as db:
            for table in known.tables.values():
                objects += 1
                rows = db.execution_options(stream_results=True).execute(sqlalchemy.select(table))
                if any(needles.in_text(_words_of(cell)) for row in rows for cell in row):
                    hits += 1
                    log.warning("table %s of %s's database still names the subject", table.name, whose)
    except sqlalchemy.exc.SQLAlchemyError as e:
        raise ServerUnreachable(f"{whose}'s database could not be searched ({type(e).__name__}): run the same command again") from e
    finally:
        engine.dispose()
    return Area(objects=objects, hits=hits)


def _words_of(cell: object) -> str:
    """A cell as text, whatever its type: JSON columns are read as dicts, binary ones as bytes."""
    return bytes(cell).decode("utf-8", "replace") if isinstance(cell, bytes | memoryview) else str(cell)


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder, hidden ones too; none if there is no folder."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def purge_free_pages(database: Path) -> None:
    """Rewrite an SQLite file so that nothing deleted is left in free pages or its log.

    Raises:
        sqlite3.OperationalError: if another process holds the database for more than a minute.
    """
    with closing(sqlite3.connect(database, timeout=60, isolation_level=None)) as db:
        db.execute("PRAGMA secure_delete = ON")
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _in_cells(path: Path, needles: Needles) -> bool:
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=60)) as db:
        db.text_factory = lambda raw: raw.decode("utf-8", "replace")
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL%'").fetchall():
            for row in db.execute(f'SELECT * FROM "{table}"'):
                if any(needles.in_text(cell) for cell in row if isinstance(cell, str)):
                    log.warning("table %s of %s still names the subject", table, path.name)
                    return True
    return False


def _is_text(data: bytes) -> bool:
    if b"\0" in data[:4096]:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
