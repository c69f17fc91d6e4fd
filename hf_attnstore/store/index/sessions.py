"""Sessions in the index: what each consists of, and which blocks hold its text.

Names, metadata and ids of dropped tokens go through the vault. Every row has a digest, without which it is not
believed: unlike blocks, rows have no file that says the same with a checksum of its own.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from ...errors import LoadError, SessionNotFoundError
from ..blocks.keys import Key, name_digest
from ..blocks.vault import Vault
from ..processes.parts import is_part
from ..records.manifest import Manifest, SessionInfo, SpanRow
from ..records.session_record import SessionRecord
from .database import DamagedDatabaseError, Database
from .schema import row_digest

Keep = Callable[[SessionRecord], int]
"""Stages a session's record, before the transaction that changes the session is committed; returns its bytes."""


class SessionTable:
    """The tables `sessions`, `spans` and `owners`. Methods with `keep` change a session, with its record."""

    def __init__(self, database: Database, vault: Vault, store: str) -> None:
        self._database = database
        self._vault = vault
        self._store = store

    def _digest(self, fields: Sequence[Any]) -> int:
        return row_digest(self._store, fields)

    def _handle(self, namespace: str, name: str) -> bytes:
        return name_digest("session", namespace, name, secret=self._vault.secret)

    def _space(self, namespace: str, name: str = "") -> bytes:
        """What is listed together: the sessions of a namespace, and apart from them those that are parts of one."""
        kind = "parts" if is_part(name) else "namespace"
        return name_digest(kind, namespace, secret=self._vault.secret)[:16]

    # one session

    def _row(self, namespace: str, name: str) -> tuple[Any, ...]:
        """id, fingerprint, created, last_used, metadata, root, base, length; checked."""
        rows = self._database.read(
            f"SELECT {_COLUMNS} FROM sessions WHERE handle = ?", (self._handle(namespace, name),)
        )
        if not rows:
            raise SessionNotFoundError(f"there is no session {name!r}; `sessions()` lists those there are")
        return self._checked(rows[0])

    def _checked(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        """A row, without the columns that are there for the digest only."""
        number, handle, label, fingerprint, created, last_used, metadata, root, base, length, digest = row
        if digest != self._digest((handle, label, fingerprint, created, metadata, root, base, length)):
            raise self._database.damaged("the row of a session")
        return number, fingerprint, created, last_used, metadata, root, base, length

    def find(self, namespace: str, name: str) -> int:
        """Raises:
        SessionNotFoundError: there is no such session.
        """
        return int(self._row(namespace, name)[0])

    def last_used(self, namespace: str, name: str) -> float | None:
        """When a session was changed last; None if there is no such session."""
        try:
            return float(self._row(namespace, name)[3])
        except SessionNotFoundError:
            return None

    def fingerprint(self, namespace: str, name: str) -> str | None:
        """The model fingerprint that a session was last saved with; None if there is no such session."""
        try:
            return str(self._row(namespace, name)[1])
        except SessionNotFoundError:
            return None

    def manifest(self, namespace: str, name: str) -> Manifest:
        with self._database.snapshot():
            number, _, _, _, _, root, base, length = self._row(namespace, name)
            rows = self._spans(number)
        return Manifest(tuple(span for _, span, _ in rows), root, base, length)

    def _spans(self, session: int) -> list[tuple[int, SpanRow, int]]:
        """Number of the block, span, tokens of the block; up to the first whose block is gone."""
        rows = self._database.read(
            "SELECT p.seq, p.block, b.key, p.start, p.stop, p.shift, p.dropped, p.digest, b.count "
            "FROM spans p LEFT JOIN blocks b ON b.id = p.block WHERE p.session = ? ORDER BY p.seq",
            (session,),
        )
        found = []
        for place, (seq, block, key, start, stop, shift, dropped, digest, count) in enumerate(rows):
            if seq != place or (block and key is None):
                break  # a block that is gone took its spans with it: what comes after that is of no use
            key = key if block else b""
            if digest != self._digest((session, seq, key, start, stop, shift, dropped)):
                raise self._database.damaged("what a session consists of")
            ids = self._vault.unseal(dropped) if dropped else b""
            found.append((block, SpanRow(key, start, stop, shift, ids), count or 0))
        return found

    def record(self, namespace: str, name: str) -> SessionRecord:
        """All that is known of a session."""
        with self._database.snapshot():
            number, fingerprint, created, last_used, metadata, root, base, length = self._row(namespace, name)
            spans = self._spans(number)
            owned = self._database.read(
                "SELECT o.block, b.key FROM owners o JOIN blocks b ON b.id = o.block WHERE o.session = ?", (number,)
            )
        used = {block for block, _, _ in spans}
        manifest = Manifest(tuple(span for _, span, _ in spans), root, base, length)
        return SessionRecord(
            namespace, name, fingerprint, created, last_used, self._vault.unseal(metadata).decode(), manifest,
            tuple(count for _, _, count in spans), tuple(key for block, key in owned if block not in used),
        )  # fmt: skip

    # changing

    def _write(self, db: sqlite3.Connection, record: SessionRecord, keep: Keep) -> int:
        """Writes the row of a session, and its record. Returns its number."""
        handle = self._handle(record.namespace, record.name)
        label = self._vault.seal(json.dumps([record.namespace, record.name]).encode())
        metadata = self._vault.seal(record.metadata.encode())
        manifest = record.manifest
        root, base, length = manifest.root, manifest.base, manifest.length
        digest = self._digest((handle, label, record.fingerprint, record.created, metadata, root, base, length))
        db.execute(
            "INSERT INTO sessions(handle, space, label, fingerprint, created, last_used, metadata, root, base, length, "
            "bytes, digest) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT(handle) DO UPDATE SET "
            "label = excluded.label, fingerprint = excluded.fingerprint, created = excluded.created, "
            "last_used = excluded.last_used, metadata = excluded.metadata, root = excluded.root, base = excluded.base, "
            "length = excluded.length, bytes = excluded.bytes, digest = excluded.digest",
            (
                handle, self._space(record.namespace, record.name), label, record.fingerprint, record.created,
                record.last_used, metadata, root, base, length, keep(record), digest,
            ),
        )  # fmt: skip
        ((number,),) = db.execute("SELECT id FROM sessions WHERE handle = ?", (handle,))
        return int(number)

    def _before(self, namespace: str, name: str) -> SessionRecord:
        """The record of a session as it is, or of one that is to be made."""
        try:
            return self.record(namespace, name)
        except SessionNotFoundError:
            now = time.time()
            return SessionRecord(namespace, name, "", now, now, "{}", Manifest(()), (), ())

    def commit(self, namespace: str, name: str, fingerprint: str, manifest: Manifest, keep: Keep) -> None:
        """Replaces a session's manifest, up to the first span whose block is not on disk. The session goes on owning
        the blocks of earlier manifests."""
        now = time.time()
        with self._database.transaction() as db:
            before = self._before(namespace, name)
            earlier = [span.block for span in before.manifest.spans if span.block]
            blocks = _blocks(db, [span.block for span in manifest.spans if span.block])
            spans = []
            for span in manifest.spans:
                if span.block and span.block not in blocks:
                    break
                spans.append(span)
            there = {span.block for span in spans}
            blocks = {key: found for key, found in blocks.items() if key in there}
            owned = {key for key in (*before.owned, *earlier, *manifest.beside) if key not in there}
            still = _blocks(db, list(owned))
            record = SessionRecord(
                namespace, name, fingerprint, before.created, now, before.metadata,
                Manifest(tuple(spans), manifest.root, manifest.base, manifest.length),
                tuple(blocks[span.block][1] if span.block else 0 for span in spans), tuple(sorted(still)),
            )  # fmt: skip
            number = self._write(db, record, keep)
            self._set_spans(db, number, spans, {key: found[0] for key, found in blocks.items()})
            beside = [(number, still[key][0]) for key in manifest.beside if key in still]
            db.executemany("INSERT OR IGNORE INTO owners VALUES(?, ?)", beside)

    def _set_spans(
        self, db: sqlite3.Connection, session: int, spans: Sequence[SpanRow], blocks: dict[Key, int]
    ) -> None:
        """Sets what a session consists of; most of it has not changed."""
        before = db.execute(
            "SELECT p.block, p.start, p.stop, p.shift, p.dropped FROM spans p WHERE p.session = ? ORDER BY p.seq",
            (session,),
        ).fetchall()
        same = 0
        for old, span in zip(before, spans, strict=False):
            ids = self._vault.unseal(old[4]) if old[4] else b""
            if (*old[:4], ids) != (blocks.get(span.block, 0), span.start, span.stop, span.shift, span.dropped):
                break
            same += 1
        if same < len(before):
            db.execute("DELETE FROM spans WHERE session = ? AND seq >= ?", (session, same))
        rows = []
        for seq, span in enumerate(spans[same:], same):
            dropped = self._vault.seal(span.dropped) if span.dropped else b""
            digest = self._digest((session, seq, span.block, span.start, span.stop, span.shift, dropped))
            rows.append((session, seq, blocks.get(span.block, 0), span.start, span.stop, span.shift, dropped, digest))
        db.executemany("INSERT INTO spans VALUES(?, ?, ?, ?, ?, ?, ?, ?)", rows)
        db.executemany("INSERT OR IGNORE INTO owners VALUES(?, ?)", [(session, row[2]) for row in rows if row[2]])

    def restore(self, record: SessionRecord, keep: Keep) -> None:
        """Puts a session back, or in, as its record says, as far as its blocks are there."""
        with self._database.transaction() as db:
            self._restore(db, record, keep)

    def _restore(self, db: sqlite3.Connection, record: SessionRecord, keep: Keep) -> None:
        keys = [span.block for span in record.manifest.spans if span.block]
        blocks = {key: found[0] for key, found in _blocks(db, [*keys, *record.owned]).items()}
        number = self._write(db, record, keep)
        db.execute("DELETE FROM spans WHERE session = ?", (number,))
        spans = []
        for span in record.manifest.spans:
            if span.block and span.block not in blocks:
                break
            spans.append(span)
        self._set_spans(db, number, spans, blocks)
        owned = [(number, blocks[key]) for key in (*keys, *record.owned) if key in blocks]
        db.executemany("INSERT OR IGNORE INTO owners VALUES(?, ?)", owned)

    def point_elsewhere(self, db: sqlite3.Connection, old: int, new: int, key: Key) -> None:
        """What points to block `old` points to `new`, of that key, from now on."""
        rows = db.execute(
            "SELECT session, seq, start, stop, shift, dropped FROM spans WHERE block = ?", (old,)
        ).fetchall()
        db.executemany(
            "UPDATE spans SET block = ?, digest = ? WHERE session = ? AND seq = ?",
            [(new, self._digest((row[0], row[1], key, *row[2:])), row[0], row[1]) for row in rows],
        )
        db.execute("UPDATE OR IGNORE owners SET block = ? WHERE block = ?", (new, old))

    def metadata(self, namespace: str, name: str) -> dict[str, Any]:
        return dict(json.loads(self._vault.unseal(self._row(namespace, name)[4])))

    def set_metadata(self, namespace: str, name: str, metadata: str, keep: Keep) -> None:
        """`metadata` is JSON."""
        with self._database.transaction() as db:
            before = self._before(namespace, name)
            self._write(db, replace(before, metadata=metadata, last_used=time.time()), keep)

    def copy(self, namespace: str, source: str, target: str, keep: Keep) -> None:
        """Gives a new session `target` all that `source` has."""
        now = time.time()
        with self._database.transaction() as db:
            record = self.record(namespace, source)
            self._restore(db, replace(record, name=target, created=now, last_used=now), keep)

    def exists(self, namespace: str, name: str) -> bool:
        return bool(self.existing(namespace, [name]))

    def existing(self, namespace: str, names: Sequence[str]) -> set[str]:
        """Which of so many names, 500 at most, are those of sessions."""
        handles = {self._handle(namespace, name): name for name in names}
        marks = ",".join("?" * len(handles))
        rows = self._database.read(f"SELECT handle FROM sessions WHERE handle IN ({marks})", list(handles))
        return {handles[handle] for (handle,) in rows}

    def rename(self, namespace: str, source: str, target: str, keep: Keep) -> None:
        """Gives a session another name, which no other has. The old record is left."""
        with self._database.transaction() as db:
            record = self.record(namespace, source)
            # the row stays the same, with its spans: only what is made of the name changes
            db.execute(
                "UPDATE sessions SET handle = ? WHERE handle = ?",
                (self._handle(namespace, target), self._handle(namespace, source)),
            )
            self._write(db, replace(record, name=target), keep)

    def fill(self, db: sqlite3.Connection, namespace: str, name: str, fingerprint: str, last_used: float) -> None:
        """Adds the row of a session without a record, within a transaction: for who fills a store for a trial."""
        record = SessionRecord(namespace, name, fingerprint, last_used, last_used, "{}", Manifest(()), (), ())
        self._write(db, record, lambda _: 0)

    # many sessions

    def listing(self, namespace: str, limit: int | None = None, offset: int = 0) -> list[SessionInfo]:
        """The sessions of a namespace, last used first."""
        with self._database.snapshot():
            rows = self._database.read(
                f"SELECT {_COLUMNS} FROM sessions WHERE space = ? ORDER BY last_used DESC LIMIT ? OFFSET ?",
                (self._space(namespace), -1 if limit is None else limit, offset),
            )
            return [self._info(row) for row in rows]

    def info(self, namespace: str, name: str) -> SessionInfo:
        """Raises:
        SessionNotFoundError: there is no such session.
        """
        handle = self._handle(namespace, name)
        with self._database.snapshot():
            self.find(namespace, name)
            return self._info(self._database.read(f"SELECT {_COLUMNS} FROM sessions WHERE handle = ?", (handle,))[0])

    def _info(self, row: tuple[Any, ...]) -> SessionInfo:
        number, fingerprint, created, last_used, _, _, _, length = self._checked(row)
        ((tokens, nbytes),) = self._database.read(
            "SELECT (SELECT COALESCE(SUM(stop - start), 0) FROM spans WHERE session = ?1 AND block <> 0), "
            "(SELECT COALESCE(SUM(bytes), 0) FROM blocks WHERE id IN (SELECT block FROM spans WHERE session = ?1))",
            (number,),
        )
        name = json.loads(self._vault.unseal(row[2]))[1]
        return SessionInfo(name, tokens, nbytes, created, last_used, fingerprint, length)

    def with_block(self, namespace: str, key: Key) -> str | None:
        """The name of the session used last of those that own a block; None if none does."""
        rows = self._database.read(
            f"SELECT {_COLUMNS} FROM sessions WHERE space = ? AND id IN "
            "(SELECT session FROM owners WHERE block = (SELECT id FROM blocks WHERE key = ?)) "
            "ORDER BY last_used DESC LIMIT 1",
            (self._space(namespace), key),
        )
        if not rows:
            return None
        self._checked(rows[0])
        return str(json.loads(self._vault.unseal(rows[0][2]))[1])

    def bytes_together(self, namespace: str, names: Iterable[str]) -> int:
        """Bytes of the blocks in the conversations of these sessions, or of all, each block once.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        if not names:
            ((nbytes,),) = self._database.read(
                "SELECT COALESCE(SUM(bytes), 0) FROM blocks WHERE id IN (SELECT block FROM spans WHERE session IN "
                "(SELECT id FROM sessions WHERE space = ?))",
                (self._space(namespace),),
            )
            return int(nbytes)
        with self._database.snapshot():
            blocks: dict[int, int] = {}
            for name in names:
                session = self.find(namespace, name)
                blocks |= self._database.read(
                    "SELECT id, bytes FROM blocks WHERE id IN (SELECT block FROM spans WHERE session = ?)", (session,)
                )
        return sum(blocks.values())

    def bytes_only_in(self, namespace: str, names: Iterable[str]) -> int:
        """Bytes of the blocks that go when these sessions are deleted: that no other has, and what follows those.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        with self._database.snapshot():
            found = sorted({self.find(namespace, name) for name in names})
            ours = ", ".join(map(str, found))
            ((nbytes,),) = self._database.read(
                "WITH RECURSIVE gone(key) AS ("
                f" SELECT b.key FROM owners o JOIN blocks b ON b.id = o.block WHERE o.session IN ({ours})"
                f"  AND NOT EXISTS (SELECT 1 FROM owners x WHERE x.block = o.block AND x.session NOT IN ({ours}))"
                " UNION SELECT b.key FROM blocks b JOIN gone ON b.continues = gone.key) "
                "SELECT COALESCE(SUM(bytes), 0) FROM blocks WHERE key IN gone"
            )
        return int(nbytes)

    def number(self, namespace: str) -> int:
        """How many sessions a namespace has."""
        ((count,),) = self._database.read("SELECT COUNT(*) FROM sessions WHERE space = ?", (self._space(namespace),))
        return int(count)

    def all_names(self, unused_since: float | None = None) -> list[tuple[str, str]]:
        """Namespace and name of every session, for who looks after the store as a whole; or of those that were last
        used before a date."""
        before = unused_since if unused_since is not None else float("inf")
        rows = self._database.read(f"SELECT {_COLUMNS} FROM sessions WHERE last_used < ? ORDER BY id", (before,))
        found = []
        for row in rows:
            self._checked(row)
            namespace, name = json.loads(self._vault.unseal(row[2]))
            found.append((namespace, name))
        return found

    def problems(self) -> list[str]:
        """Rows that are not what was written."""
        try:
            for namespace, name in self.all_names():
                self.record(namespace, name)
        except SessionNotFoundError:  # deleted meanwhile
            return []
        except (DamagedDatabaseError, LoadError, ValueError) as error:
            return [str(error)]
        return []


_COLUMNS = "id, handle, label, fingerprint, created, last_used, metadata, root, base, length, digest"


def _blocks(db: sqlite3.Connection, keys: Sequence[Key]) -> dict[Key, tuple[int, int]]:
    """Number and tokens of those blocks that are there."""
    found: dict[Key, tuple[int, int]] = {}
    for first in range(0, len(keys), 500):
        some = keys[first : first + 500]
        marks = ",".join("?" * len(some))
        for number, key, count in db.execute(f"SELECT id, key, count FROM blocks WHERE key IN ({marks})", some):
            found[key] = (number, count)
    return found
