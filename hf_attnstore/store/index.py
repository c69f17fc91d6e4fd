"""The index: which blocks are on disk, which sessions exist and what they consist of. SQLite in WAL mode.

Rows are written after the files they speak of, in one transaction per change, so whatever a reader sees is
complete. Reads use a connection of their own and do not wait for writes.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SessionNotFoundError, StoreClosedError
from .blocks import BlockMeta, Key

_SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks(
  key BLOB PRIMARY KEY, parent BLOB NOT NULL, continues BLOB NOT NULL, tokens BLOB NOT NULL, start INTEGER NOT NULL,
  bytes INTEGER NOT NULL, children INTEGER NOT NULL DEFAULT 0, last_used REAL NOT NULL,
  fingerprint TEXT NOT NULL, namespace TEXT NOT NULL, codec TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS blocks_by_content ON blocks(parent, tokens);
CREATE INDEX IF NOT EXISTS blocks_by_predecessor ON blocks(continues);
CREATE INDEX IF NOT EXISTS blocks_by_age ON blocks(last_used, start DESC) WHERE children = 0;
CREATE TABLE IF NOT EXISTS sessions(
  id INTEGER PRIMARY KEY, namespace TEXT NOT NULL, name TEXT NOT NULL, fingerprint TEXT NOT NULL DEFAULT '',
  created REAL NOT NULL, last_used REAL NOT NULL, metadata TEXT NOT NULL DEFAULT '{}',
  root BLOB NOT NULL DEFAULT x'', base INTEGER NOT NULL DEFAULT 0, length INTEGER NOT NULL DEFAULT 0,
  UNIQUE(namespace, name));
CREATE TABLE IF NOT EXISTS spans(
  session INTEGER NOT NULL, seq INTEGER NOT NULL, block BLOB NOT NULL, start INTEGER NOT NULL,
  stop INTEGER NOT NULL, shift INTEGER NOT NULL DEFAULT 0, dropped BLOB NOT NULL DEFAULT x'',
  PRIMARY KEY(session, seq)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS spans_by_block ON spans(block);
CREATE TABLE IF NOT EXISTS models(fingerprint TEXT PRIMARY KEY, note TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS owners(
  session INTEGER NOT NULL, block BLOB NOT NULL, PRIMARY KEY(session, block)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS owners_by_block ON owners(block);
CREATE TABLE IF NOT EXISTS usage(id INTEGER PRIMARY KEY CHECK(id = 0), bytes INTEGER NOT NULL, blocks INTEGER NOT NULL);
INSERT OR IGNORE INTO usage VALUES(0, 0, 0);
CREATE TRIGGER IF NOT EXISTS block_added AFTER INSERT ON blocks BEGIN
  UPDATE usage SET bytes = bytes + NEW.bytes, blocks = blocks + 1;
  UPDATE blocks SET children = children + 1 WHERE key = NEW.continues;
END;
CREATE TRIGGER IF NOT EXISTS block_removed AFTER DELETE ON blocks BEGIN
  UPDATE usage SET bytes = bytes - OLD.bytes, blocks = blocks - 1;
  UPDATE blocks SET children = children - 1 WHERE key = OLD.continues;
  DELETE FROM spans WHERE block = OLD.key;
  DELETE FROM owners WHERE block = OLD.key;
END;
"""


@dataclass(frozen=True)
class SessionInfo:
    """A session as `AttentionStore.sessions()` lists it."""

    name: str
    tokens: int
    """Tokens whose KV is in the store."""
    bytes: int
    """Bytes of the blocks it uses; blocks shared with other sessions count in each."""
    created: float
    """Seconds since the epoch."""
    last_used: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class SpanRow:
    """Tokens `[start, stop)` of a block, or tokens that were dropped, as a session's manifest lists them."""

    block: Key
    """Empty for dropped tokens."""
    start: int
    stop: int
    shift: int = 0
    """How far from where its keys were made the span is now, in tokens."""
    dropped: bytes = b""
    """The ids of dropped tokens, as from `encode_tokens`."""


@dataclass(frozen=True)
class Manifest:
    """What a session consists of, in the order of the conversation."""

    spans: tuple[SpanRow, ...]
    """Up to the first that is not there any more."""
    root: Key = b""
    """The root of the chain that goes on after a truncation; empty for one that was never truncated."""
    base: int = 0
    """Tokens in the window before that chain begins."""
    length: int = 0
    """Tokens of the conversation, those included that were dropped or are not there any more."""


@dataclass(frozen=True)
class BlockRow:
    """What the index knows of a block on disk."""

    key: Key
    parent: Key
    tokens: bytes
    start: int
    bytes: int
    fingerprint: str


_BLOCK_COLUMNS = "key, parent, tokens, start, bytes, fingerprint"


class Index:
    """Sessions, spans and blocks of one store directory. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))  # SQLite gives its log the mode of the database
        self._write_lock = threading.Lock()
        self._read_lock = threading.Lock()
        self._closed = False
        self._writer = self._connect()
        self._writer.executescript(_SCHEMA)
        self._reader = self._connect()
        self._reader.execute("PRAGMA query_only = 1")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30, isolation_level=None, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA wal_autocheckpoint = 32")  # pages; the log counts towards the disk cap
        connection.execute("PRAGMA journal_size_limit = 524288")
        return connection

    def close(self) -> None:
        with self._write_lock, self._read_lock:
            self._closed = True
            self._reader.close()
            self._writer.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._write_lock:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise
            self._writer.execute("COMMIT")

    def _read(self, query: str, parameters: Sequence[Any] = ()) -> list[Any]:
        with self._read_lock:
            if self._closed:
                raise StoreClosedError(f"the store {self.path.parent} is closed; open it again")
            return self._reader.execute(query, parameters).fetchall()

    def truncate_log(self) -> None:
        """Moves the log's content into the database, so that its file takes no room."""
        with self._write_lock:
            self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def file_bytes(self) -> int:
        """Bytes of the index's own files on disk."""
        names = (self.path, self.path.with_name(self.path.name + "-wal"), self.path.with_name(self.path.name + "-shm"))
        total = 0
        for name in names:
            with suppress(FileNotFoundError):
                total += name.stat().st_size
        return total

    # blocks

    def block(self, key: Key) -> BlockRow | None:
        rows = self._read(f"SELECT {_BLOCK_COLUMNS} FROM blocks WHERE key = ?", (key,))
        return BlockRow(*rows[0]) if rows else None

    def neighbours(self, parent: Key, tokens: bytes) -> list[BlockRow]:
        """The blocks that follow `parent` and sort next to `tokens`: among them is the one that shares the
        longest beginning with it."""
        query = f"SELECT {_BLOCK_COLUMNS} FROM blocks WHERE parent = ? AND tokens"
        below = self._read(f"{query} <= ? ORDER BY tokens DESC LIMIT 1", (parent, tokens))
        above = self._read(f"{query} > ? ORDER BY tokens ASC LIMIT 1", (parent, tokens))
        return [BlockRow(*row) for row in below + above]

    def add_block(self, meta: BlockMeta, file_bytes: int, supersedes: Key | None = None) -> BlockRow | None:
        """Makes a complete file visible. `supersedes` names a short block whose tokens this one begins with:
        what pointed to it points here from now on. Returns the superseded block, now gone from the index."""
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "INSERT INTO blocks"
                "(key, parent, continues, tokens, start, bytes, children, last_used, fingerprint, namespace, codec) "
                "VALUES(?, ?, ?, ?, ?, ?, (SELECT COUNT(*) FROM blocks WHERE continues = ?), ?, ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (
                    meta.key, meta.parent, meta.predecessor, meta.tokens, meta.start, file_bytes, meta.key, now,
                    meta.fingerprint, meta.namespace, meta.codec,
                ),
            )  # fmt: skip
            if supersedes is None:
                return None
            rows = db.execute(f"SELECT {_BLOCK_COLUMNS} FROM blocks WHERE key = ?", (supersedes,)).fetchall()
            if not rows:
                return None
            old = BlockRow(*rows[0])
            if old.parent != meta.parent or old.key == meta.key or not meta.tokens.startswith(old.tokens):
                return None
            db.execute("UPDATE spans SET block = ? WHERE block = ?", (meta.key, old.key))
            moved = db.execute("UPDATE blocks SET continues = ? WHERE continues = ?", (meta.key, old.key)).rowcount
            db.execute("UPDATE blocks SET children = children + ? WHERE key = ?", (moved, meta.key))
            db.execute("UPDATE OR IGNORE owners SET block = ? WHERE block = ?", (meta.key, old.key))
            db.execute("DELETE FROM blocks WHERE key = ?", (old.key,))
            return old

    def remove_blocks(self, keys: Iterable[Key]) -> None:
        with self._transaction() as db:
            db.executemany("DELETE FROM blocks WHERE key = ?", [(key,) for key in keys])

    def touch(self, keys: Iterable[Key]) -> None:
        now = time.time()
        with self._transaction() as db:
            db.executemany("UPDATE blocks SET last_used = ? WHERE key = ?", [(now, key) for key in keys])

    def eviction_candidates(self, limit: int) -> list[BlockRow]:
        """Blocks with nothing after them, least recently used first, the end of a chain before its beginning."""
        rows = self._read(
            f"SELECT {_BLOCK_COLUMNS} FROM blocks WHERE children = 0 ORDER BY last_used, start DESC LIMIT ?", (limit,)
        )
        return [BlockRow(*row) for row in rows]

    def usage(self) -> tuple[int, int]:
        """Bytes and number of the blocks on disk."""
        ((total, blocks),) = self._read("SELECT bytes, blocks FROM usage")
        return total, blocks

    # models

    def note(self, fingerprint: str) -> str | None:
        rows = self._read("SELECT note FROM models WHERE fingerprint = ?", (fingerprint,))
        return str(rows[0][0]) if rows else None

    def set_note(self, fingerprint: str, note: str) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO models VALUES(?, ?) ON CONFLICT(fingerprint) DO UPDATE SET note = excluded.note",
                (fingerprint, note),
            )

    # sessions

    def commit_session(self, namespace: str, name: str, fingerprint: str, manifest: Manifest) -> None:
        """Replaces a session's manifest, up to the first span whose block is not on disk. The session goes on
        owning the blocks of earlier manifests, for `delete_session`."""
        spans = manifest.spans
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "INSERT INTO sessions(namespace, name, fingerprint, created, last_used, root, base, length) "
                "VALUES(?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(namespace, name) DO UPDATE "
                "SET last_used = excluded.last_used, fingerprint = excluded.fingerprint, root = excluded.root, "
                "base = excluded.base, length = excluded.length",
                (namespace, name, fingerprint, now, now, manifest.root, manifest.base, manifest.length),
            )
            ((session,),) = db.execute("SELECT id FROM sessions WHERE namespace = ? AND name = ?", (namespace, name))
            db.execute("DELETE FROM spans WHERE session = ?", (session,))
            for seq, span in enumerate(spans):
                if span.block and not db.execute("SELECT 1 FROM blocks WHERE key = ?", (span.block,)).fetchall():
                    break
                db.execute(
                    "INSERT INTO spans VALUES(?, ?, ?, ?, ?, ?, ?)",
                    (session, seq, span.block, span.start, span.stop, span.shift, span.dropped),
                )
            db.executemany(
                "INSERT OR IGNORE INTO owners SELECT ?, key FROM blocks WHERE key = ?",
                [(session, span.block) for span in spans],
            )
            db.executemany("UPDATE blocks SET last_used = ? WHERE key = ?", [(now, span.block) for span in spans])

    def sessions(self, namespace: str) -> list[SessionInfo]:
        """All sessions of the namespace, last used first."""
        rows = self._read(
            "SELECT s.name, COALESCE(SUM(p.stop - p.start), 0), COALESCE(SUM(b.bytes), 0), s.created, s.last_used "
            "FROM sessions s LEFT JOIN spans p ON p.session = s.id LEFT JOIN blocks b ON b.key = p.block "
            "WHERE s.namespace = ? GROUP BY s.id ORDER BY s.last_used DESC, s.id DESC",
            (namespace,),
        )
        return [SessionInfo(*row) for row in rows]

    def _session_id(self, namespace: str, name: str) -> tuple[int, str, str]:
        rows = self._read(
            "SELECT id, fingerprint, metadata FROM sessions WHERE namespace = ? AND name = ?", (namespace, name)
        )
        if not rows:
            raise SessionNotFoundError(f"there is no session {name!r}; `sessions()` lists those there are")
        return rows[0]

    def fingerprint(self, namespace: str, name: str) -> str | None:
        """The fingerprint that a session was last used with; None where there is no such session."""
        try:
            return self._session_id(namespace, name)[1]
        except SessionNotFoundError:
            return None

    def manifest(self, namespace: str, name: str) -> Manifest:
        session = self._session_id(namespace, name)[0]
        rows = self._read(
            "SELECT seq, block, start, stop, shift, dropped FROM spans WHERE session = ? ORDER BY seq", (session,)
        )
        # a block that is gone took its spans with it: what comes after that is of no use
        spans = tuple(SpanRow(*row[1:]) for place, row in enumerate(rows) if row[0] == place)
        ((root, base, length),) = self._read("SELECT root, base, length FROM sessions WHERE id = ?", (session,))
        return Manifest(spans, root, base, length)

    def metadata(self, namespace: str, name: str) -> dict[str, Any]:
        return dict(json.loads(self._session_id(namespace, name)[2]))

    def set_metadata(self, namespace: str, name: str, metadata: dict[str, Any]) -> None:
        now = time.time()
        with self._transaction() as db:
            db.execute(
                "INSERT INTO sessions(namespace, name, created, last_used, metadata) VALUES(?, ?, ?, ?, ?) "
                "ON CONFLICT(namespace, name) DO UPDATE "
                "SET metadata = excluded.metadata, last_used = excluded.last_used",
                (namespace, name, now, now, json.dumps(metadata)),
            )

    def fork_session(self, namespace: str, source: str, target: str) -> bool:
        """Gives `target` the spans and metadata of `source`. False if `target` exists already."""
        session = self._session_id(namespace, source)[0]
        now = time.time()
        with self._transaction() as db:
            cursor = db.execute(
                "INSERT OR IGNORE INTO sessions"
                "(namespace, name, fingerprint, created, last_used, metadata, root, base, length) "
                "SELECT namespace, ?, fingerprint, ?, ?, metadata, root, base, length FROM sessions WHERE id = ?",
                (target, now, now, session),
            )
            if cursor.rowcount == 0:
                return False
            copy = cursor.lastrowid
            db.execute(
                "INSERT INTO spans SELECT ?, seq, block, start, stop, shift, dropped FROM spans WHERE session = ?",
                (copy, session),
            )
            db.execute("INSERT INTO owners SELECT ?, block FROM owners WHERE session = ?", (copy, session))
        return True

    def delete_session(self, namespace: str, name: str) -> list[BlockRow]:
        """Removes a session, the blocks that only it used, and what follows those; returns the blocks."""
        session = self._session_id(namespace, name)[0]
        with self._transaction() as db:
            rows = db.execute(
                "WITH RECURSIVE gone(key) AS ("
                " SELECT block FROM owners WHERE session = ?1"
                "  AND block NOT IN (SELECT block FROM owners WHERE session <> ?1)"
                " UNION SELECT b.key FROM blocks b JOIN gone ON b.continues = gone.key) "
                f"SELECT {_BLOCK_COLUMNS} FROM blocks WHERE key IN gone ORDER BY start DESC",
                (session,),
            ).fetchall()
            gone = [BlockRow(*row) for row in rows]
            db.execute("DELETE FROM spans WHERE session = ?", (session,))
            db.execute("DELETE FROM owners WHERE session = ?", (session,))
            db.execute("DELETE FROM sessions WHERE id = ?", (session,))
            db.executemany("DELETE FROM blocks WHERE key = ?", [(block.key,) for block in gone])
        return gone
