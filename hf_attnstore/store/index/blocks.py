"""The index: which blocks are on disk, and what room they take.

Rows are written after the files they speak of, so whatever a reader sees is complete. While a file comes or goes its
key stands in `pending`: after a crash that row tells what may lie on disk without a block's row. Nothing in the index
says what is in a block; who needs to know reads the file.
"""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...errors import SessionNotFoundError
from ..blocks.block import BlockMeta
from ..blocks.keys import Key, block_key, window_key
from ..blocks.vault import Vault
from ..eviction.policies import Place, Policy
from .database import DamagedDatabaseError, Database
from .rows import BlockRow
from .schema import SCHEMA
from .sessions import SessionTable

_BATCH = 500


_CHILDREN = "(SELECT COUNT(*) FROM blocks f WHERE f.continues = blocks.key)"
_WRONG_CHILDREN = f"children <> {_CHILDREN}"
_COLUMNS = "key, parent, continues, start, count, bytes, fingerprint, grp, stamp"


@dataclass(frozen=True)
class Usage:
    """What is on disk, in bytes and numbers."""

    bytes: int
    blocks: int
    session_bytes: int
    sessions: int
    pending: int

    @property
    def total(self) -> int:
        """Bytes of all files but those of the index itself and of the quarantine."""
        return self.bytes + self.session_bytes + self.pending


_MANY_NOTES = 1000
"""Above so many, those on models of which nothing is in the store go when another comes."""
_UNUSED_NOTE = (
    f"fingerprint GLOB '{'[0-9a-f]' * 16}*' AND substr(fingerprint, 1, instr(fingerprint || '/', '/') - 1) NOT IN "
    "(SELECT fingerprint FROM blocks UNION SELECT fingerprint FROM sessions UNION SELECT fingerprint FROM pending)"
)
"""Notes are named by fingerprint, and by what else they are of behind a slash."""


class Index:
    """Blocks, sessions and accounts of one store directory. Safe to use from several threads.

    Raises:
        StoreIOError: from every method, where the disk would not.
        DamagedDatabaseError: where what is in the file is not what was written.
    """

    def __init__(
        self, path: Path, vault: Vault, store: str, *, sync: bool = False, on_damage: Callable[[], None] = lambda: None
    ) -> None:
        """`store` tells the store from others; `on_damage` is called before a `DamagedDatabaseError` is raised."""
        self.database = Database(path, SCHEMA, sync=sync, on_damage=on_damage)
        self.sessions = SessionTable(self.database, vault, store)
        self._secret = vault.secret

    def close(self) -> None:
        self.database.close()

    # blocks

    def has(self, keys: Sequence[Key]) -> set[Key]:
        """Which of these blocks are there."""
        found: set[Key] = set()
        for some in _batches(keys):
            marks = ",".join("?" * len(some))
            found.update(row[0] for row in self.database.read(f"SELECT key FROM blocks WHERE key IN ({marks})", some))
        return found

    def block(self, key: Key) -> BlockRow | None:
        rows = self.database.read(f"SELECT {_COLUMNS} FROM blocks WHERE key = ?", (key,))
        return BlockRow(*rows[0]) if rows else None

    def rows(self, keys: Sequence[Key]) -> list[BlockRow]:
        """The rows of those of these blocks that are there."""
        found = []
        for some in _batches(keys):
            marks = ",".join("?" * len(some))
            found += self.database.read(f"SELECT {_COLUMNS} FROM blocks WHERE key IN ({marks})", some)
        return [BlockRow(*row) for row in found]

    def neighbours(self, parent: Key, codes: bytes) -> list[tuple[BlockRow, bytes]]:
        """The blocks that follow `parent` and whose codes sort next to `codes`, with their codes: among them is the
        one that shares the longest beginning with it."""
        query = f"SELECT {_COLUMNS}, codes FROM blocks WHERE parent = ? AND codes"
        rows = self.database.read(f"{query} <= ? ORDER BY codes DESC LIMIT 1", (parent, codes))
        rows += self.database.read(f"{query} > ? ORDER BY codes ASC LIMIT 1", (parent, codes))
        return [(BlockRow(*row[:-1]), row[-1]) for row in rows]

    def before(self, parent: Key, codes: bytes) -> tuple[BlockRow | None, bytes]:
        """Of the blocks that follow `parent`, the last one whose codes do not sort after `codes`, and its codes."""
        rows = self.database.read(
            f"SELECT {_COLUMNS}, codes FROM blocks WHERE parent = ? AND codes <= ? ORDER BY codes DESC LIMIT 1",
            (parent, codes),
        )
        return (BlockRow(*rows[0][:-1]), rows[0][-1]) if rows else (None, b"")

    def followed(self, parents: Sequence[Key]) -> set[Key]:
        """Which of these are the parent of some block."""
        found: set[Key] = set()
        for some in _batches(parents):
            marks = ",".join("?" * len(some))
            rows = self.database.read(f"SELECT DISTINCT parent FROM blocks WHERE parent IN ({marks})", some)
            found.update(row[0] for row in rows)
        return found

    def blocks(self) -> Iterator[BlockRow]:
        """All of them, a beginning before what follows it within a chain. For long work: others may change them."""
        last = -1
        while True:
            rows = self.database.read(
                f"SELECT id, {_COLUMNS} FROM blocks WHERE id > ? ORDER BY id LIMIT {_BATCH}", (last,)
            )
            if not rows:
                return
            yield from (BlockRow(*row[1:]) for row in rows)
            last = rows[-1][0]

    def begin_write(self, key: Key, fingerprint: str, nbytes: int) -> None:
        """A file of at most so many bytes is about to be written."""
        with self.database.transaction() as db:
            _set_pending(db, [(key, fingerprint, nbytes, 0)])

    def add_block(
        self, meta: BlockMeta, codes: bytes, file_bytes: int, place: Place, supersedes: Key | None = None
    ) -> BlockRow | None:
        """Makes a complete file visible. `supersedes` names a short block whose tokens this one begins with, or for
        windows kept apart those of such a block: what pointed to it points here from now on.

        Returns:
            The superseded block, now pending.
        """
        with self.database.transaction() as db:
            db.execute("DELETE FROM pending WHERE key = ?", (meta.key,))
            db.execute(
                "INSERT INTO blocks"
                "(key, parent, continues, codes, start, count, bytes, children, grp, stamp, fingerprint) "
                "VALUES(?, ?, ?, ?, ?, ?, ?, (SELECT COUNT(*) FROM blocks WHERE continues = ?), ?, ?, ?) "
                "ON CONFLICT DO NOTHING",
                (
                    meta.key, meta.parent, meta.predecessor, codes, meta.start, meta.token_count, file_bytes, meta.key,
                    place.group, place.stamp, meta.fingerprint,
                ),
            )  # fmt: skip
            if supersedes is None or supersedes == meta.key:
                return None
            rows = db.execute(f"SELECT {_COLUMNS}, id FROM blocks WHERE key = ?", (supersedes,)).fetchall()
            if not rows:
                return None
            old, old_id = BlockRow(*rows[0][:-1]), rows[0][-1]
            begins = meta.tokens[: 4 * old.count]
            begun = old.parent == meta.parent and block_key(meta.parent, begins, self._secret) == old.key
            windows = old.continues == meta.continues and window_key(meta.continues, self._secret) == meta.key
            if not begun and not windows:
                return None
            ((new_id,),) = db.execute("SELECT id FROM blocks WHERE key = ?", (meta.key,))
            self.sessions.point_elsewhere(db, old_id, new_id, meta.key)
            moved = db.execute("UPDATE blocks SET continues = ? WHERE continues = ?", (meta.key, old.key)).rowcount
            db.execute("UPDATE blocks SET children = children + ? WHERE id = ?", (moved, new_id))
            self._remove(db, [old])
            return old

    def remove_blocks(self, rows: Sequence[BlockRow], policy: Policy | None = None) -> None:
        """Takes blocks out of sight; they are pending until their files are gone (`settle`).

        Args:
            policy: says where what comes before them stands from now on; None: where it stood.
        """
        with self.database.transaction() as db:
            if policy is not None:
                for row in rows:
                    _inherit(db, row, policy)
            self._remove(db, rows)

    @staticmethod
    def _remove(db: sqlite3.Connection, rows: Sequence[BlockRow]) -> None:
        db.executemany("DELETE FROM blocks WHERE key = ?", [(row.key,) for row in rows])
        _set_pending(db, [(row.key, row.fingerprint, row.bytes, 1) for row in rows])

    def pending(self) -> list[tuple[Key, str, bool]]:
        """Key and fingerprint of files that may lie on disk without being in sight, and whether they are to go."""
        return [
            (key, model, bool(goes))
            for key, model, goes in self.database.read("SELECT key, fingerprint, goes FROM pending")
        ]

    def settle(self, keys: Iterable[Key]) -> None:
        """The files are gone."""
        with self.database.transaction() as db:
            db.executemany("DELETE FROM pending WHERE key = ?", [(key,) for key in keys])

    def move(self, places: Mapping[Key, Place]) -> None:
        """Sets where blocks stand in the order of eviction. Those that are not there are passed over."""
        with self.database.transaction() as db:
            move_blocks(db, places)

    def leaves(self, group: int, limit: int, offset: int = 0) -> list[BlockRow]:
        """Blocks of a group with nothing after them, by stamp, the end of a chain before its beginning."""
        rows = self.database.read(
            f"SELECT {_COLUMNS} FROM blocks WHERE children = 0 AND grp = ? ORDER BY stamp, start DESC LIMIT ? OFFSET ?",
            (group, limit, offset),
        )
        return [BlockRow(*row) for row in rows]

    def followers(self, key: Key) -> int:
        """How many blocks come after one; 0 if that is not there."""
        rows = self.database.read("SELECT children FROM blocks WHERE key = ?", (key,))
        return int(rows[0][0]) if rows else 0

    def delete_session(self, namespace: str, name: str) -> list[BlockRow]:
        """Removes a session, the blocks that only it used, and what follows those.

        Returns:
            The blocks, the end of a chain first; they are pending.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        session = self.sessions.find(namespace, name)
        with self.database.transaction() as db:
            rows = db.execute(
                "WITH RECURSIVE gone(key) AS ("
                " SELECT b.key FROM owners o JOIN blocks b ON b.id = o.block WHERE o.session = ?1"
                "  AND NOT EXISTS (SELECT 1 FROM owners x WHERE x.block = o.block AND x.session <> ?1)"
                " UNION SELECT b.key FROM blocks b JOIN gone ON b.continues = gone.key) "
                f"SELECT {_COLUMNS} FROM blocks WHERE key IN gone ORDER BY start DESC",
                (session,),
            ).fetchall()
            gone = [BlockRow(*row) for row in rows]
            db.execute("DELETE FROM sessions WHERE id = ?", (session,))
            self._remove(db, gone)
        return gone

    def let_go(self, namespace: str, name: str | None, keys: Sequence[Key]) -> list[BlockRow]:
        """A session, if it is one, needs these blocks no more.

        Returns:
            Those of them that no other has, and that nothing comes after; they are pending.
        """
        gone: list[BlockRow] = []
        with self.database.transaction() as db:
            with suppress(SessionNotFoundError):
                ours = self.sessions.find(namespace, name) if name is not None else 0
                db.executemany(
                    "DELETE FROM owners WHERE session = ? AND block = (SELECT id FROM blocks WHERE key = ?)",
                    [(ours, key) for key in keys],
                )
            for some in _batches(keys):
                marks = ",".join("?" * len(some))
                rows = db.execute(
                    f"SELECT {_COLUMNS} FROM blocks WHERE key IN ({marks}) AND children = 0 "
                    "AND NOT EXISTS (SELECT 1 FROM owners o WHERE o.block = blocks.id)",
                    some,
                )
                gone += [BlockRow(*row) for row in rows]
            self._remove(db, gone)
        return gone

    def unowned(self) -> list[BlockRow]:
        """Blocks that no session has, nor any block that a session has comes after; the end of a chain first."""
        rows = self.database.read(
            "WITH RECURSIVE needed(key) AS (SELECT b.key FROM owners o JOIN blocks b ON b.id = o.block"
            " UNION SELECT b.continues FROM blocks b JOIN needed ON b.key = needed.key) "
            f"SELECT {_COLUMNS} FROM blocks WHERE key NOT IN (SELECT key FROM needed) ORDER BY start DESC"
        )
        return [BlockRow(*row) for row in rows]

    def fingerprints(self) -> list[str]:
        """Of all blocks."""
        return [name for (name,) in self.database.read("SELECT DISTINCT fingerprint FROM blocks")]

    def under(self, root: Key) -> list[BlockRow]:
        """All blocks of the chains that begin at a root, the end of a chain first."""
        rows = self.database.read(
            "WITH RECURSIVE chain(key) AS (SELECT key FROM blocks WHERE parent = ?1 OR continues = ?1"
            " UNION SELECT b.key FROM blocks b JOIN chain ON b.continues = chain.key) "
            f"SELECT {_COLUMNS} FROM blocks WHERE key IN chain ORDER BY start DESC",
            (root,),
        )
        return [BlockRow(*row) for row in rows]

    def problems(self) -> list[str]:
        """What is wrong with the index, for all that can be told without the files; reads all of it."""
        try:
            self.usage()
            return self.database.problems() or self.sessions.problems()
        except (DamagedDatabaseError, TypeError, ValueError) as error:
            return [repr(error)]

    # accounts

    def usage(self) -> Usage:
        rows = self.database.read("SELECT bytes, blocks, session_bytes, sessions, pending FROM usage")
        if len(rows) != 1 or not all(type(number) is int and number >= 0 for number in rows[0]):
            raise self.database.damaged("its accounts")
        return Usage(*rows[0])

    def correct(self, key: Key, file_bytes: int) -> None:
        """Sets the bytes of a block's file right; `recount` is to follow."""
        with self.database.transaction() as db:
            db.execute("UPDATE blocks SET bytes = ? WHERE key = ?", (file_bytes, key))

    def wrong_accounts(self) -> bool:
        """Whether the accounts, or the numbers of followers, are not what the rows add up to."""
        (right,) = self.database.read(
            "SELECT (SELECT COALESCE(SUM(bytes), 0) FROM blocks), (SELECT COUNT(*) FROM blocks), "
            "(SELECT COALESCE(SUM(bytes), 0) FROM sessions), (SELECT COUNT(*) FROM sessions), "
            "(SELECT COALESCE(SUM(bytes), 0) FROM pending), "
            "(SELECT bytes || ' ' || blocks || ' ' || session_bytes || ' ' || sessions || ' ' || pending FROM usage)"
        )
        if " ".join(str(number) for number in right[:-1]) != right[-1]:
            return True
        return bool(self.database.read(f"SELECT 1 FROM blocks WHERE {_WRONG_CHILDREN} LIMIT 1"))

    def recount(self) -> None:
        """Sets the accounts, and the numbers of followers, right from the rows."""
        with self.database.transaction() as db:
            db.execute(
                "UPDATE usage SET bytes = b.bytes, blocks = b.count, session_bytes = s.bytes, sessions = s.count, "
                "pending = p.bytes FROM "
                "(SELECT COALESCE(SUM(bytes), 0) AS bytes, COUNT(*) AS count FROM blocks) AS b, "
                "(SELECT COALESCE(SUM(bytes), 0) AS bytes, COUNT(*) AS count FROM sessions) AS s, "
                "(SELECT COALESCE(SUM(bytes), 0) AS bytes FROM pending) AS p"
            )
            db.execute(f"UPDATE blocks SET children = {_CHILDREN} WHERE {_WRONG_CHILDREN}")

    def add_totals(self, counts: Mapping[str, int]) -> None:
        """Adds to the numbers that outlive the process."""
        with self.database.transaction() as db:
            db.executemany(
                "INSERT INTO totals VALUES(?, ?) ON CONFLICT(name) DO UPDATE SET value = value + excluded.value",
                list(counts.items()),
            )

    def totals(self) -> dict[str, int]:
        """The numbers that outlive the process, of all that used the store."""
        return dict(self.database.read("SELECT name, value FROM totals"))

    # models

    def note(self, fingerprint: str) -> str | None:
        rows = self.database.read("SELECT note FROM models WHERE fingerprint = ?", (fingerprint,))
        return str(rows[0][0]) if rows else None

    def set_note(self, fingerprint: str, note: str) -> None:
        with self.database.transaction() as db:
            db.execute(
                "INSERT INTO models VALUES(?, ?) ON CONFLICT(fingerprint) DO UPDATE SET note = excluded.note",
                (fingerprint, note),
            )
            if db.execute("SELECT count(*) FROM models").fetchone()[0] > _MANY_NOTES:
                db.execute(f"DELETE FROM models WHERE {_UNUSED_NOTE} AND fingerprint != ?", (fingerprint,))

    def unused_notes(self) -> list[str]:
        """The names of notes on models of which nothing is in the store."""
        return [str(name) for (name,) in self.database.read(f"SELECT fingerprint FROM models WHERE {_UNUSED_NOTE}")]

    def drop_notes(self, names: Sequence[str]) -> None:
        with self.database.transaction() as db:
            db.executemany("DELETE FROM models WHERE fingerprint = ?", [(name,) for name in names])


def move_blocks(db: sqlite3.Connection, places: Mapping[Key, Place]) -> None:
    """Sets where blocks stand in the order of eviction, in a transaction that is under way."""
    db.executemany(
        "UPDATE blocks SET grp = ?, stamp = ? WHERE key = ?", [(*place, key) for key, place in places.items()]
    )


def _inherit(db: sqlite3.Connection, row: BlockRow, policy: Policy) -> None:
    """Gives what comes before a block that goes the place that it has from now on."""
    for group, stamp in db.execute("SELECT grp, stamp FROM blocks WHERE key = ?", (row.continues,)).fetchall():
        move_blocks(db, {row.continues: policy.left(Place(group, stamp), row.place)})


def _set_pending(db: sqlite3.Connection, rows: Sequence[tuple[Key, str, int, int]]) -> None:
    db.executemany("DELETE FROM pending WHERE key = ?", [row[:1] for row in rows])  # replacing runs no trigger
    db.executemany("INSERT INTO pending VALUES(?, ?, ?, ?)", rows)


def _batches(keys: Sequence[Key]) -> Iterator[Sequence[Key]]:
    for first in range(0, len(keys), _BATCH):
        yield keys[first : first + _BATCH]
