"""The tables of the index.

Accounts are kept by triggers: whatever way a row comes or goes, `usage` counts its bytes in the same transaction.
"""

from collections.abc import Sequence
from typing import Any

import xxhash

SCHEMA = """
CREATE TABLE IF NOT EXISTS blocks(
  id INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE, parent BLOB NOT NULL, continues BLOB NOT NULL,
  codes BLOB NOT NULL, start INTEGER NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL,
  children INTEGER NOT NULL DEFAULT 0, grp INTEGER NOT NULL, stamp REAL NOT NULL, fingerprint TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS blocks_by_content ON blocks(parent, codes);
CREATE INDEX IF NOT EXISTS blocks_by_predecessor ON blocks(continues);
CREATE INDEX IF NOT EXISTS blocks_by_place ON blocks(grp, stamp, start DESC) WHERE children = 0;
CREATE TABLE IF NOT EXISTS pending(
  key BLOB PRIMARY KEY, fingerprint TEXT NOT NULL, bytes INTEGER NOT NULL, goes INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sessions(
  id INTEGER PRIMARY KEY, handle BLOB NOT NULL UNIQUE, space BLOB NOT NULL, label BLOB NOT NULL,
  fingerprint TEXT NOT NULL DEFAULT '', created REAL NOT NULL, last_used REAL NOT NULL, metadata BLOB NOT NULL,
  root BLOB NOT NULL DEFAULT x'', base INTEGER NOT NULL DEFAULT 0, length INTEGER NOT NULL DEFAULT 0,
  bytes INTEGER NOT NULL DEFAULT 0, digest INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS sessions_by_age ON sessions(space, last_used);
CREATE TABLE IF NOT EXISTS spans(
  session INTEGER NOT NULL, seq INTEGER NOT NULL, block INTEGER NOT NULL, start INTEGER NOT NULL,
  stop INTEGER NOT NULL, shift INTEGER NOT NULL, dropped BLOB NOT NULL, digest INTEGER NOT NULL,
  PRIMARY KEY(session, seq)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS spans_by_block ON spans(block);
CREATE TABLE IF NOT EXISTS owners(session INTEGER NOT NULL, block INTEGER NOT NULL, PRIMARY KEY(session, block))
  WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS owners_by_block ON owners(block);
CREATE TABLE IF NOT EXISTS models(fingerprint TEXT PRIMARY KEY, note TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS usage(
  id INTEGER PRIMARY KEY CHECK(id = 0), bytes INTEGER NOT NULL, blocks INTEGER NOT NULL, session_bytes INTEGER NOT NULL,
  sessions INTEGER NOT NULL, pending INTEGER NOT NULL);
INSERT OR IGNORE INTO usage VALUES(0, 0, 0, 0, 0, 0);
CREATE TRIGGER IF NOT EXISTS block_added AFTER INSERT ON blocks BEGIN
  UPDATE usage SET bytes = bytes + NEW.bytes, blocks = blocks + 1;
  UPDATE blocks SET children = children + 1 WHERE key = NEW.continues;
END;
CREATE TRIGGER IF NOT EXISTS block_removed AFTER DELETE ON blocks BEGIN
  UPDATE usage SET bytes = bytes - OLD.bytes, blocks = blocks - 1;
  UPDATE blocks SET children = children - 1 WHERE key = OLD.continues;
  DELETE FROM spans WHERE block = OLD.id;
  DELETE FROM owners WHERE block = OLD.id;
END;
CREATE TRIGGER IF NOT EXISTS pending_added AFTER INSERT ON pending BEGIN
  UPDATE usage SET pending = pending + NEW.bytes;
END;
CREATE TRIGGER IF NOT EXISTS pending_removed AFTER DELETE ON pending BEGIN
  UPDATE usage SET pending = pending - OLD.bytes;
END;
CREATE TRIGGER IF NOT EXISTS session_added AFTER INSERT ON sessions BEGIN
  UPDATE usage SET session_bytes = session_bytes + NEW.bytes, sessions = sessions + 1;
END;
CREATE TRIGGER IF NOT EXISTS session_changed AFTER UPDATE OF bytes ON sessions BEGIN
  UPDATE usage SET session_bytes = session_bytes - OLD.bytes + NEW.bytes;
END;
CREATE TRIGGER IF NOT EXISTS session_removed AFTER DELETE ON sessions BEGIN
  UPDATE usage SET session_bytes = session_bytes - OLD.bytes, sessions = sessions - 1;
  DELETE FROM spans WHERE session = OLD.id;
  DELETE FROM owners WHERE session = OLD.id;
END;
"""


def row_digest(store: str, fields: Sequence[Any]) -> int:
    """A checksum (63 bits) over a row's fields and the store's identity: a row that was not written is not believed,
    nor is one of another store's."""
    return xxhash.xxh3_64_intdigest(repr((store, *fields)).encode()) >> 1
