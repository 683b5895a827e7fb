"""The ledger of a key-value store: which entries it has, their size and checksum, and when they were last used.

A SQLite database in WAL mode: processes read while one writes, and a killed process leaves the last complete transaction. Its
commits are not flushed to the disk one by one: after a power failure the last ones may be missing, never half there.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from unified_lm.core.errors import OutputError

_VERSION = 1
_BUSY_SECONDS = 30.0
"""How long a transaction waits for that of another process. They last milliseconds."""
_PAGE = 1000
"""Rows of one short transaction, or of one query."""
_MOST_PENDING = 10_000
"""Uses that are remembered while the ledger cannot be written."""

_SCHEMA = (
    """CREATE TABLE entries (id TEXT NOT NULL, states TEXT NOT NULL, bytes INTEGER NOT NULL, checksum TEXT NOT NULL,
        last_use INTEGER NOT NULL, PRIMARY KEY (id, states)) WITHOUT ROWID""",
    "CREATE INDEX entries_by_use ON entries (last_use)",
    "CREATE TABLE totals (entries INTEGER NOT NULL, bytes INTEGER NOT NULL)",  # so that neither is ever counted
    "INSERT INTO totals VALUES (0, 0)",
    """CREATE TRIGGER added AFTER INSERT ON entries
        BEGIN UPDATE totals SET entries = entries + 1, bytes = bytes + new.bytes; END""",
    """CREATE TRIGGER removed AFTER DELETE ON entries
        BEGIN UPDATE totals SET entries = entries - 1, bytes = bytes - old.bytes; END""",
    f"PRAGMA user_version = {_VERSION}",
)
_INSERT = "INSERT INTO entries VALUES (?, ?, ?, ?, (SELECT coalesce(max(last_use), 0) + 1 FROM entries))"
_DELETE = "DELETE FROM entries WHERE id = ? AND states = ? AND checksum = ?"
_USE = "UPDATE entries SET last_use = (SELECT max(last_use) + 1 FROM entries) WHERE id = ? AND states = ?"
_FIND = "SELECT id, states, bytes, checksum FROM entries WHERE id = ? AND states = ?"
_OLDEST = "SELECT id, states, bytes, checksum FROM entries ORDER BY last_use"
_AFTER = "SELECT id, states, bytes, checksum FROM entries WHERE (id, states) > (?, ?) ORDER BY id, states LIMIT ?"

Key = tuple[str, str]
"""Id of a document, and its states."""


class Row(NamedTuple):
    """What the ledger knows of an entry.

    Attributes:
        id: of the document, any text.
        states: how it was read, "bidirectional" or "causal".
        num_bytes: size of its file.
        checksum: of its file, XXH3-64 in hexadecimal.
    """

    id: str
    states: str
    num_bytes: int
    checksum: str


class Ledger:
    """Rows by id and states, in the order of their last use; shared by threads and processes, not by forks.

    A missing or torn ledger is built again from the files.

    Args:
        path: the database's file; its folder must exist.
        found: gives what the files say, the least recently written first.

    Raises:
        OutputError: the database cannot be opened or created.
    """

    def __init__(self, path: Path, found: Callable[[], Iterable[Row]]) -> None:
        self.path = path
        self.closed = False
        self._lock = threading.RLock()
        self._pending = dict[Key, None]()  # uses that are not recorded yet, in their order
        # Without the right to write in the folder no lock file can be made: the ledger is read as it is.
        self.writable = os.access(path.parent, os.W_OK)
        with self._explained():
            self._database = self._open() or self._rebuild(found)

    def find(self, id: str, states: str) -> Row | None:
        """The row of an entry."""
        with self._explained():
            row = self._database.execute(_FIND, (_text(id), states)).fetchone()
        return None if row is None else _row(row)

    def record(self, row: Row) -> None:
        """Insert a row as the most recently used one, in place of the one with its id and states."""
        with self._transaction():
            self._remove([found] if (found := self.find(row.id, row.states)) else [])
            self._database.execute(_INSERT, (_text(row.id), *row[1:]))

    def remove(self, keys: Iterable[Key]) -> Iterator[list[Row]]:
        """Remove entries by id and states; yields the removed rows, one short transaction after the other."""
        keys = list(keys)
        for start in range(0, len(keys), _PAGE):
            with self._transaction():
                rows = [row for key in keys[start : start + _PAGE] if (row := self.find(*key))]
                self._remove(rows)
            yield rows

    def drop(self, row: Row) -> None:
        """Remove exactly this row, if it is still there and the ledger can be written."""
        if self.writable:
            with self._transaction():
                self._remove([row])

    def make_room(self, num_bytes: int, budget: int, first: Key) -> list[Row]:
        """Remove the least recently used rows until an entry of this size fits.

        Args:
            num_bytes: of the new entry.
            budget: most bytes of all entries.
            first: the entry that the new one will replace; it goes before all others.

        Returns:
            The removed rows.
        """
        if self.totals()[1] + num_bytes <= budget:
            return []
        with self._transaction():
            self._record_uses()
            excess = self.totals()[1] + num_bytes - budget
            own = self.find(*first)
            gone = [own] if own else []
            oldest = self._database.execute(_OLDEST)
            while sum(row.num_bytes for row in gone) < excess and (found := oldest.fetchone()):
                gone += [row] if (row := _row(found)) != own else []
            oldest.close()
            self._remove(gone)
        return gone

    def use(self, id: str, states: str) -> None:
        """Note that an entry was read. While another process writes, the note is kept for the next occasion."""
        if not self.writable:
            return
        with self._lock:
            self._pending.pop((id, states), None)
            self._pending[id, states] = None
            if len(self._pending) > _MOST_PENDING:
                self._pending.pop(next(iter(self._pending)))
            with (
                self._explained(),
                suppress(sqlite3.OperationalError),
            ):  # busy, or the disk is full: a reader does not fail for that
                self._write_uses(wait=False)

    def totals(self) -> tuple[int, int]:
        """Number of entries, and bytes of their files."""
        with self._explained():
            entries, num_bytes = self._database.execute("SELECT entries, bytes FROM totals").fetchone()
        return int(entries), int(num_bytes)

    def __iter__(self) -> Iterator[Row]:
        last = ("", "")
        while True:
            with self._explained():
                page = self._database.execute(_AFTER, (*last, _PAGE)).fetchall()
            if not page:
                return
            yield from map(_row, page)
            last = page[-1][:2]

    def flush(self) -> None:
        """Write everything into the database's file, durably."""
        if self.writable:
            with self._explained():
                if self._pending:
                    self._write_uses(wait=True)
                self._database.execute("PRAGMA wal_checkpoint(FULL)")

    def close(self) -> None:
        """Flush and close the database, once."""
        with self._lock:
            if not self.closed:
                self.flush()
                self._database.close()
                self.closed = True

    def _remove(self, rows: Sequence[Row]) -> None:
        self._database.executemany(_DELETE, [(_text(row.id), row.states, row.checksum) for row in rows])

    def _write_uses(self, wait: bool) -> None:
        self._database.execute(f"PRAGMA busy_timeout = {int(1000 * _BUSY_SECONDS) if wait else 0}")
        try:
            with self._begin():
                self._record_uses()
        finally:
            self._database.execute(f"PRAGMA busy_timeout = {int(1000 * _BUSY_SECONDS)}")

    def _record_uses(self) -> None:
        self._database.executemany(_USE, [(_text(id), states) for id, states in self._pending])
        self._pending.clear()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained(), self._begin():
            yield

    @contextmanager
    def _begin(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # SQLite has rolled back some errors by itself
                self._database.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """One thread at a time, and errors of SQLite that name the file."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise OutputError(
                    f"{self.path}: {error}. What was stored before is untouched. Make room on the disk, check the permissions, "
                    "or end the process that holds the file; a damaged ledger is built again when the store is next opened."
                ) from error

    def _open(self) -> sqlite3.Connection | None:
        """The database, or None if it is missing or torn."""
        if not self.path.is_file():
            return None
        # A database in WAL mode wants files of its own beside it, unless it is told that nobody writes.
        read_only = "ro" if self.path.with_name(f"{self.path.name}-wal").exists() else "ro&immutable=1"
        database = self._connect("rw" if self.writable else read_only)
        try:
            database.execute("PRAGMA synchronous = NORMAL")
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == _VERSION and database.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
                return database
        except sqlite3.DatabaseError as error:
            if any(passing in str(error) for passing in ("locked", "unable to open")):
                database.close()
                raise
        database.close()
        return None

    def _rebuild(self, found: Callable[[], Iterable[Row]]) -> sqlite3.Connection:
        if not self.writable:
            raise OutputError(f"{self.path} is missing or torn, and cannot be built again without the right to write there.")
        with FileLock(self.path.with_name(f".{self.path.name}.lock")):
            if (database := self._open()) is not None:  # another process has done it meanwhile
                return database
            lost = "torn" if self.path.exists() else "missing"
            for ending in ("", "-wal", "-shm"):
                self.path.with_name(f"{self.path.name}{ending}").unlink(missing_ok=True)
            self._database = self._connect("rwc")
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            with self._begin():  # a process that is killed in here leaves a file without a version
                for statement in _SCHEMA:
                    self._database.execute(statement)
                for row in found():
                    self._remove([known] if (known := self.find(row.id, row.states)) else [])
                    self._database.execute(_INSERT, (_text(row.id), *row[1:]))
            if entries := self.totals()[0]:
                warnings.warn(f"{self.path} was {lost}; it is built again from the files of {entries} entries", stacklevel=5)
            return self._database

    def _connect(self, mode: str) -> sqlite3.Connection:
        return sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            uri=True,
            timeout=_BUSY_SECONDS,
            isolation_level=None,
            check_same_thread=False,
        )


def _text(id: str) -> str:
    """An id as ASCII: SQLite takes neither every text (lone surrogates), nor compares what follows a NUL."""
    return json.dumps(id)


def _row(values: tuple[str, str, int, str]) -> Row:
    return Row(json.loads(values[0]), *values[1:])
