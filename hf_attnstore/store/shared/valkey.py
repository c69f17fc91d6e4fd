"""Valkey and Redis as the engine of a shared tier: `valkey://`, `redis://`, and with TLS `valkeys://`, `rediss://`.

One primary server: a cluster would have to be asked by slot.
"""

from __future__ import annotations

import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from ...errors import SharedTierError
from ...sizes import format_bytes
from ..blocks.block import Bytes
from .deadline import Deadline
from .engine import TAG_BYTES, About, Edges, Engine, EngineError, FullError, Put, Stream, Taken
from .resp import Connection, Refused, Reply, command, open_bulk
from .url import SharedURL

T = TypeVar("T")

_AT_ONCE = 64
"""Names whose beginnings and ends are asked for at once: the server holds all of the replies."""
_IDLE = 8
"""Connections that are kept open while nobody uses them."""
_NOTES = 64
_MOST_SEEN = 4096
_LARGE = 256 << 10
"""Bytes from which on most of a value is asked for as all of it: Valkey sends that from where it lies, and a part from
a copy, for which it takes three times as long."""

_NOTE = """if redis.call('HLEN', KEYS[1]) >= tonumber(ARGV[3]) then
  redis.call('HDEL', KEYS[1], redis.call('HRANDFIELD', KEYS[1]))
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
if ARGV[4] ~= '0' then redis.call('EXPIRE', KEYS[1], ARGV[4]) end
return 1"""


_REPLACE = f"""if redis.call('GETRANGE', KEYS[1], 0, {TAG_BYTES - 1}) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
if KEYS[2] then redis.call('HSET', KEYS[2], ARGV[3], ARGV[4]) end
return 1"""

_NOW = """local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
"""
_TAKE = (
    _NOW
    + """local head = redis.call('GETRANGE', KEYS[1], 0, 47)
local number, free = 0, true
if #head == 48 then
  local holder, till, length, state
  number, holder, till, length, state = struct.unpack('>I8c8I8I4I4', head, 17)
  local kin = tonumber(ARGV[2])
  free = holder == string.rep('\\0', 8) or till <= now or state == 2
    or string.sub(holder, 1, kin) == string.sub(ARGV[1], 1, kin)
end
if not free then return head end
local till = now + tonumber(ARGV[3])
local hold = struct.pack('>I8c8I8I4I4', number + 1, ARGV[1], till, tonumber(ARGV[3]), 0)
if #head < 48 then redis.call('SET', KEYS[1], string.rep('\\0', 16) .. hold)
else redis.call('SETRANGE', KEYS[1], 16, hold) end
return redis.call('GETRANGE', KEYS[1], 0, string.sub(head, 1, 16) == ARGV[4] and 47 or -1)"""
)
_RENEW = (
    _NOW
    + """if redis.call('GETRANGE', KEYS[1], 16, 31) ~= ARGV[1] then return -1 end
local till = now + tonumber(ARGV[3])
local hold = struct.pack('>c8I8I4I4', ARGV[2], till, tonumber(ARGV[3]), tonumber(ARGV[4]))
redis.call('SETRANGE', KEYS[1], 24, hold)
return till"""
)


class ValkeyEngine(Engine):
    """See `Engine`. Options of the URL: `ca`, `cert` and `key` (files, for TLS); the path is the database's number."""

    def __init__(self, url: SharedURL) -> None:
        self._url = url
        if not url.host or (url.path and not url.path.isdigit()):
            raise SharedTierError(f"{url}: a URL of {url.scheme} is host, port and the number of a database")
        self._address = url.host, url.port or 6379
        self._tls = _tls(url) if url.scheme in ("valkeys", "rediss") else None
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._capacity = 0
        self._seen: dict[str, int] = {}

    @property
    def largest(self) -> int:  # type: ignore[override]
        """A value is 512 MiB at most. One that is larger than all of its memory makes Redis let go of everything, and
        say that it has stored it."""
        return min(512 << 20, self._capacity // 4 or 512 << 20) - 4096

    # blocks

    def put(self, name: str, parts: Sequence[Bytes], deadline: Deadline, seconds: int = 0) -> Put:
        size = sum(part.nbytes for part in parts)
        expiry = ("EX", seconds) if seconds else ()
        head = open_bulk(["SET", name], size, len(expiry))
        tail = b"\r\n" + command(*expiry).partition(b"\r\n")[2]

        def store(connection: Connection) -> Put:
            if size > self.largest:
                return Put.FULL
            connection.send([head, *parts, tail], deadline)
            reply = connection.reply(deadline)
            if isinstance(reply, Refused) and reply.code == "OOM":
                return Put.FULL
            _check(reply)
            return Put.STORED

        return self._with_connection(store, deadline)

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int]:
        # a script takes as long, and has to be permitted
        asked = "".join([f"*2\r\n$6\r\nSTRLEN\r\n${len(name)}\r\n{name}\r\n" for name in names]).encode()

        def talk(connection: Connection) -> list[int]:
            connection.send([asked], deadline)
            found = connection.integers(len(names), deadline)
            if isinstance(found, Refused):
                raise found
            return found

        return self._with_connection(talk, deadline) if names else []

    def edges(self, names: Sequence[str], head: int, tail: int, deadline: Deadline) -> list[Edges]:
        found: list[Edges] = []
        for first in range(0, len(names), _AT_ONCE):
            asked: list[tuple[str | int, ...]] = []
            for name in names[first : first + _AT_ONCE]:
                asked += [("STRLEN", name), ("GETRANGE", name, 0, head - 1), ("GETRANGE", name, -tail, -1)]
            replies = iter(self._ask(asked, deadline))
            for size, begin, end in zip(replies, replies, replies, strict=True):
                if not isinstance(size, int) or not isinstance(begin, bytes) or not isinstance(end, bytes):
                    raise self._error("its answer makes no sense")
                found.append(Edges(size, begin, end))
        with self._lock:
            if len(self._seen) > _MOST_SEEN:
                self._seen.clear()
            self._seen |= {name: edges.size for name, edges in zip(names, found, strict=True)}
        return found

    def size_seen(self, name: str) -> int:
        """The bytes that a value had when its edges were asked for; 0 if that is not remembered."""
        return self._seen.get(name, 0)

    def open_stream(self, deadline: Deadline) -> Stream:
        return _Stream(self, *self._take(deadline))

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        if names:
            self._ask([("UNLINK", *names)], deadline)

    def touch(self, names: Sequence[str], deadline: Deadline, seconds: int = 0) -> None:
        if names:
            asked = [("EXPIRE", name, seconds) for name in names] if seconds else [("TOUCH", *names)]
            self._ask(asked, deadline)

    # entries

    def note(self, name: str, member: bytes, entry: bytes, deadline: Deadline, seconds: int = 0) -> None:
        self._ask([("EVAL", _NOTE, 1, name, member, entry, _NOTES, seconds)], deadline)

    def noted(self, names: Sequence[str], deadline: Deadline) -> list[dict[bytes, bytes]]:
        replies = self._ask([("HGETALL", name) for name in names], deadline)
        found = []
        for reply in replies:
            pairs = iter(reply if isinstance(reply, list) else [])
            found.append({m: e for m, e in zip(pairs, pairs, strict=False) if isinstance(m, bytes | bytearray)})
        return found  # type: ignore[return-value]

    def drop_note(self, name: str, member: bytes, deadline: Deadline) -> None:
        self._ask([("HDEL", name, member)], deadline)

    def names(self, begin: str, deadline: Deadline) -> list[str]:
        found: dict[str, None] = {}
        cursor, pattern = b"0", "".join(f"\\{c}" if c in "*?[]^\\" else c for c in begin) + "*"
        while True:
            (reply,) = self._ask([("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)], deadline)
            if not isinstance(reply, list) or not isinstance(reply[0], bytes) or not isinstance(reply[1], list):
                raise self._error("its answer makes no sense")
            found |= dict.fromkeys(name.decode() for name in reply[1] if isinstance(name, bytes))
            cursor = reply[0]
            if cursor == b"0":
                return list(found)

    def value(self, name: str, deadline: Deadline) -> bytes:
        (reply,) = self._ask([("GET", name)], deadline)
        return reply if isinstance(reply, bytes) else b""

    def replace(
        self, name: str, old: bytes, new: bytes, listed: str, member: bytes, entry: bytes, deadline: Deadline
    ) -> bool:
        names = (2, name, listed) if listed else (1, name)
        return self._ask([("EVAL", _REPLACE, *names, old, new, member, entry)], deadline) == [1]

    def take(self, name: str, taken: Taken, deadline: Deadline) -> bytes | None:
        (reply,) = self._ask([("EVAL", _TAKE, 1, name, *taken)], deadline)
        if not isinstance(reply, bytes):
            raise self._error("its answer makes no sense")
        return reply

    def renew(
        self, name: str, fence: bytes, holder: bytes, milliseconds: int, state: int, deadline: Deadline
    ) -> int | None:
        (reply,) = self._ask([("EVAL", _RENEW, 1, name, fence, holder, milliseconds, state)], deadline)
        if not isinstance(reply, int):
            raise self._error("its answer makes no sense")
        return reply

    # what it is

    def about(self, deadline: Deadline) -> About:
        (reply,) = self._ask([("INFO",)], deadline)
        assert isinstance(reply, bytes)
        info = _fields(reply)
        name = "Valkey" if "valkey_version" in info else "Redis"
        version = info.get("valkey_version") or info.get("redis_version", "")
        policy, role = info.get("maxmemory_policy", ""), info.get("role", "")
        limit = int(info.get("maxmemory", 0))
        snapshots = "yes" if info.get("rdb_last_save_time", "0") != "0" else "no"
        facts = {
            "version": version,
            "TLS": "yes" if self._tls is not None else "no",
            "eviction": policy,
            "memory": f"{format_bytes(int(info.get('used_memory', 0)))} of {format_bytes(limit) if limit else 'all'}",
            "append-only file": "on" if info.get("aof_enabled") == "1" else "off",
            "snapshots": snapshots,
            "role": role,
        }
        local = self._address[0] in ("localhost", "127.0.0.1", "::1")
        unsafe = {
            "the connection is not encrypted: use TLS, or a network that nobody else is in": not (self._tls or local),
            "nobody has to say a password: whoever reaches it can read and write": not self._url.secret,
            "it has no memory limit: set maxmemory, or it takes all of the machine's": not limit,
            "it evicts nothing: once it is full nothing more is kept (maxmemory-policy volatile-lru, with ttl= in the "
            "URL, keeps sessions and lets blocks go)": policy == "noeviction",
            "it is a replica, which takes no blocks: name the primary": role == "slave",
            "it is a cluster, which is not supported": info.get("redis_mode") == "cluster",
        }
        warnings = [text for text, holds in unsafe.items() if holds]
        return About(f"{name} {version}", limit, int(info.get("used_memory", 0)), facts, warnings)

    # connections

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self.close()

    def _ask(self, commands: Sequence[tuple[str | bytes | int, ...]], deadline: Deadline) -> list[Reply]:
        """Replies to commands that may as well be carried out twice.

        Raises:
            EngineError: one was refused, or there is no answer.
        """
        sent = b"".join(command(*each) for each in commands)

        def talk(connection: Connection) -> list[Reply]:
            connection.send([sent], deadline)
            replies = [connection.reply(deadline) for _ in commands]
            for reply in replies:
                _check(reply)
            return replies

        return self._with_connection(talk, deadline)

    def _with_connection(self, talk: Callable[[Connection], T], deadline: Deadline) -> T:
        while True:
            connection, fresh = self._take(deadline)
            try:
                with self.naming_errors():
                    found = talk(connection)
            except BaseException as error:
                connection.close()
                # the server ended it while nobody used it, and perhaps all the others
                if fresh or connection.answered or not isinstance(error.__cause__, ConnectionError):
                    raise
                self.close()
                continue
            self.give(connection)
            return found

    def _take(self, deadline: Deadline) -> tuple[Connection, bool]:
        """A connection, and whether it was just made."""
        with self._lock:
            connection = self._idle.pop() if self._idle else None
        if connection is not None:
            connection.answered = False
            return connection, False
        with self.naming_errors():
            connection = Connection(*self._address, self._tls, deadline)
            try:
                self._greet(connection, deadline)
            except BaseException:
                connection.close()
                raise
        return connection, True

    def give(self, connection: Connection) -> None:
        """Takes a connection back in which nothing is under way."""
        with self._lock:
            if len(self._idle) < _IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _greet(self, connection: Connection, deadline: Deadline) -> None:
        url = self._url
        asked = [("AUTH", *filter(None, [url.user]), url.secret)] if url.secret else []
        asked += [("SELECT", url.path)] if url.path else []
        connection.send([b"".join(command(*each) for each in [*asked, ("INFO", "memory")])], deadline)
        for each in asked:
            reply = connection.reply(deadline)
            if isinstance(reply, Refused) and each[0] == "AUTH":  # what else it says may quote the command
                raise Refused(f"{reply.code} (user or password)")
            _check(reply)
        info = connection.reply(deadline)
        if isinstance(info, Refused) and info.code == "NOAUTH":
            raise info
        self._capacity = int(_fields(info).get("maxmemory", 0)) if isinstance(info, bytes) else 0

    def _error(self, why: object) -> EngineError:
        return EngineError(f"{self._url}: {why}")

    @contextmanager
    def naming_errors(self) -> Iterator[None]:
        """What goes wrong is an EngineError that says where."""
        try:
            yield
        except Refused as error:
            kind = FullError if error.code == "OOM" else EngineError
            raise kind(f"{self._url}: the server refused: {error}") from error
        except TimeoutError as error:
            raise self._error("no answer in time") from error
        except (OSError, ValueError) as error:
            raise self._error(error) from error


class _Stream(Stream):
    """A connection on which ranges have been asked for."""

    def __init__(self, engine: ValkeyEngine, connection: Connection, _fresh: bool) -> None:
        self._engine = engine
        self._connection: Connection | None = connection
        self._left: deque[tuple[int, int]] = deque()
        """Of what was asked for: bytes that come before and after it, and are let go of."""

    def ask(self, name: str, offset: int, nbytes: int, deadline: Deadline) -> None:
        after = self._engine.size_seen(name) - offset - nbytes
        all_of_it = nbytes >= _LARGE and after >= 0 and 8 * (offset + after) <= nbytes
        asked = command("GET", name) if all_of_it else command("GETRANGE", name, offset, offset + nbytes - 1)
        with self._talking() as connection:
            connection.send([asked], deadline)
        self._left.append((offset, after) if all_of_it else (0, 0))

    def take(self, buffers: Sequence[Bytes], deadline: Deadline) -> int:
        before, after = self._left.popleft()
        around = [memoryview(bytearray(nbytes)) for nbytes in (before, after)]
        with self._talking() as connection:
            found = connection.bulk_into([around[0], *buffers, around[1]], deadline)
            if isinstance(found, Refused):
                raise found
            return min(max(found - before, 0), sum(buffer.nbytes for buffer in buffers))

    @contextmanager
    def _talking(self) -> Iterator[Connection]:
        """An error ends the connection: nothing arrives in anybody's buffers any more."""
        if self._connection is None:
            raise EngineError("the connection was lost")
        try:
            with self._engine.naming_errors():
                yield self._connection
        except BaseException:
            self.close(reuse=False)
            raise

    def close(self, *, reuse: bool) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        if reuse and not self._left:
            self._engine.give(connection)
        else:
            connection.close()


def _check(reply: Reply) -> None:
    if isinstance(reply, Refused):
        raise reply


def _fields(info: bytes) -> dict[str, str]:
    """What INFO says."""
    lines = (line.partition(":") for line in bytes(info).decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


def _tls(url: SharedURL) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=url.option("ca") or None)
        if url.option("cert"):
            context.load_cert_chain(url.option("cert"), url.option("key") or None)
        return context
    except OSError as error:
        raise SharedTierError(f"{url}: the files for TLS can't be used: {error.strerror or error}") from error
