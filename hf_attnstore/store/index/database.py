"""A SQLite database in WAL mode, for several threads and processes: one connection writes, one reads."""

import ctypes
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...errors import StoreIOError
from ..processes.forking import closed_error, rest

_BUSY_SECONDS = 30.0
_FORK_SECONDS = 5.0
"""How long a fork waits for what is being read or written."""
_LOG_PAGES = 32
"""After so many pages the log is moved into the database; it counts towards the disk cap."""


_NOT_DAMAGE = frozenset({3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15, 22, 23})
"""Codes of SQLite for what the system would not do: permissions, locks, memory, reading, writing, room."""
_READ_ONLY = 8


_carried: set[Path] = set()
"""Databases of which a fork took connections along, which then can't be opened again in the child."""


class DamagedDatabaseError(StoreIOError):
    """The database's content is not what was written."""


class Database:
    """Transactions and reads. Reads do not wait for writes.

    Errors of SQLite come as `StoreIOError`, those that speak of damage as `DamagedDatabaseError`.
    """

    def __init__(self, path: Path, schema: str, *, sync: bool, on_damage: Callable[[], None]) -> None:
        self.path = path
        self._on_damage = on_damage
        self._sync = sync
        self._write_lock = threading.Lock()
        self._read_lock = threading.RLock()
        self._closed = self._left_behind = self._at_rest = False
        self._writer: sqlite3.Connection | None = None
        self._reader: sqlite3.Connection | None = None
        opened: list[sqlite3.Connection] = []
        if path in _carried:
            raise StoreIOError(
                f"{path} was just being used when this process was forked, and can't be opened here: fork before the "
                'store is opened, or use multiprocessing\'s "spawn" or "forkserver"'
            )
        try:
            with self._translated():
                # SQLite gives its log the same mode. A file that exists is not opened here: to close it again would let
                # go of all locks that SQLite holds on it in this process (sqlite.org/howtocorrupt.html, 2.2)
                with suppress(FileExistsError):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
                for _ in range(2):
                    opened.append(self._connect())
                opened[0].executescript(schema)
                if _tables(opened[0]) != _expected_tables(schema):
                    raise self.damaged("its tables are not those of an index")
                opened[1].execute("PRAGMA query_only = 1")
                self._writer, self._reader = opened
        except BaseException:
            for connection in opened:
                connection.close()
            raise
        rest(self)

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        _use_log(connection)
        connection.execute(f"PRAGMA synchronous = {'FULL' if self._sync else 'NORMAL'}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        connection.execute("PRAGMA journal_size_limit = 524288")
        connection.execute("PRAGMA cache_size = -16384")
        connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten, in the database at least
        return connection

    def damaged(self, what: str) -> DamagedDatabaseError:
        """The error to raise where the content proves wrong; who opened the database is told."""
        self._on_damage()
        return DamagedDatabaseError(f"{self.path} is damaged ({what}); `attnstore repair` makes it anew")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", None)
            failed = "disk" in str(error) if code is None else (code & 0xFF) in _NOT_DAMAGE
            if code == _READ_ONLY and os.access(self.path, os.W_OK) and os.access(self.path.parent, os.W_OK):
                failed = False  # its header says that a later version of SQLite wrote it
            if failed:
                raise StoreIOError(f"{self.path}: {error}") from error
            raise self.damaged(str(error)) from error
        except (UnicodeDecodeError, OverflowError) as error:
            raise self.damaged(str(error)) from error
        except OSError as error:
            raise StoreIOError(f"{error.filename or self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._closed = True
            self._disconnect()

    def _disconnect(self) -> None:
        for connection in (self._reader, self._writer):
            if connection is not None:
                connection.close()
        self._reader = self._writer = None

    def before_fork(self) -> None:
        """Closes the connections, unless somebody is using them for long: then they are carried into the child."""
        if not self._write_lock.acquire(timeout=_FORK_SECONDS):
            return
        if not self._read_lock.acquire(timeout=_FORK_SECONDS):
            self._write_lock.release()
            return
        self._at_rest = True
        with suppress(sqlite3.Error):
            self._disconnect()

    def after_fork_in_parent(self) -> None:
        if self._at_rest:
            self._at_rest = False
            self._read_lock.release()
            self._write_lock.release()

    def after_fork_in_child(self) -> None:
        if not self._at_rest:
            for connection in (self._reader, self._writer):
                if connection is not None:
                    _carried.add(self.path)
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))  # it must never be closed here
        self._reader = self._writer = None
        self._at_rest, self._closed, self._left_behind = False, True, True
        self._write_lock, self._read_lock = threading.Lock(), threading.RLock()

    def _check_open(self) -> None:
        if self._closed:
            raise closed_error(self.path.parent, self._left_behind)

    def _writing(self) -> sqlite3.Connection:
        """For who holds the write lock."""
        self._check_open()
        if self._writer is None:  # there was a fork
            self._writer = self._connect()
        return self._writer

    def _reading(self) -> sqlite3.Connection:
        """For who holds the read lock."""
        self._check_open()
        if self._reader is None:
            self._reader = self._connect()
            self._reader.execute("PRAGMA query_only = 1")
        return self._reader

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Everything or nothing of what is done with the connection is visible afterwards."""
        with self._write_lock, self._translated():
            writer = self._writing()
            writer.execute("BEGIN IMMEDIATE")
            try:
                yield writer
            except BaseException:
                with suppress(sqlite3.Error):  # on a full disk SQLite has rolled back by itself
                    writer.execute("ROLLBACK")
                raise
            try:
                writer.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    writer.execute("ROLLBACK")
                raise

    def read(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._read_lock, self._translated():
            return self._reading().execute(query, parameters).fetchall()

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read meanwhile, by this thread, is of one and the same state."""
        with self._read_lock:
            self.read("BEGIN")
            try:
                yield
            finally:
                self.read("COMMIT")

    def log_bytes(self) -> int:
        """Bytes of the log."""
        with suppress(FileNotFoundError):
            return self.files()[1].stat().st_size
        return 0

    def truncate_log(self) -> bool:
        """Moves the log's content into the database, so that its file takes no room. False, at once, where a reader or
        a writer in another process stood in the way."""
        with self._write_lock, self._read_lock, self._translated():
            writer = self._writing()
            writer.execute("PRAGMA busy_timeout = 0")
            try:
                return not writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            finally:
                writer.execute(f"PRAGMA busy_timeout = {round(1000 * _BUSY_SECONDS)}")

    def compact(self) -> None:
        """Gives the room of what was deleted back to the file system."""
        with self._write_lock, self._translated():
            self._writing().execute("VACUUM")

    def problems(self) -> list[str]:
        """What SQLite finds wrong with the file; reads all of it."""
        try:
            found = [str(row[0]) for row in self.read("PRAGMA integrity_check(20)")]
        except DamagedDatabaseError as error:
            return [str(error)]
        return [] if found == ["ok"] else found

    def files(self) -> list[Path]:
        """The database's files; not all of them need exist."""
        return [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]

    def file_bytes(self) -> int:
        """Bytes of the database's files."""
        total = 0
        for path in self.files():
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total


def _use_log(connection: sqlite3.Connection) -> None:
    """Sets WAL mode. Of several who open a new database at once SQLite refuses all but one, whatever their timeout."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _tables(connection: sqlite3.Connection) -> list[Any]:
    """Definitions of all tables, indexes and triggers."""
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()


@lru_cache(maxsize=4)
def _expected_tables(schema: str) -> list[Any]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(schema)
        return _tables(connection)
