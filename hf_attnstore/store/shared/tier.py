"""The tier below the disk that machines share: looked up within a deadline, written to behind the turn, never relied
on."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from ...errors import LoadError, NotFiniteError, SharedTierError
from ...sizes import format_bytes
from ..blocks.block import Block, BlockMeta, Bytes, Match
from ..blocks.codecs import Codec, written_by
from ..blocks.format import encode_block
from ..blocks.keys import RAW, Key, block_key, common_prefix
from ..blocks.stored import StoredBlock
from ..blocks.tier import Source, Tier
from ..blocks.vault import Vault
from ..disk.rebuild import Progress
from ..index.counts import Accounts
from ..processes.forking import watch
from ..processes.threads import RightOfWay
from .deadline import Breaker, Deadline
from .engine import Edges, Engine, EngineError, FullError, Put, open_engine
from .uploads import Task, Uploads
from .url import SharedURL
from .values import Reading, Value

HEAD = 16 << 10
"""Bytes of a block that are asked for first: most headers are in them."""
_FAILED, _GONE = 5.0, 30.0
"""Seconds for which a block that did not come, or that could not be used, is not looked for again."""
_SLOWEST = 16 << 20
"""Bytes a second below which a put is given up."""
_PATIENT = 60.0
"""Seconds for what nobody's turn waits for."""
_REMEMBERED = 65_536
_LAST = 10
"""Blocks of a text after which running states are looked for, where each takes a request."""
_FINGERPRINT = re.compile("[0-9a-f]{16,128}")


class SharedTier(Tier):
    """See `Tier`. Options of the URL, beside those of the engine:

    `prefix` (begins all names, `attnstore` if not said), `timeout` (seconds that a turn waits for it in all, 1),
    `lookup` (seconds for one look-up, 0.25), `ttl` (seconds after which what nobody used may go; never),
    `queue` (bytes that wait to go up, 256MiB), `lease` (seconds after which a machine that runs a turn and gives no
    sign of life is taken for dead, 10).

    Args:
        block_size: of the store: tokens of a block at most.
        local: where a block is beside the engine, to be sent from there; None if it is not.
        codec: by which what nothing has coded is sent; it is without loss.
    """

    name = "shared"
    shared = True
    whole = True

    def __init__(
        self,
        url: SharedURL,
        accounts: Accounts,
        right_of_way: RightOfWay,
        clock: Callable[[], float],
        block_size: int,
        local: Callable[[Key], Source | None],
        codec: Codec,
    ) -> None:
        self.url = url
        self.prefix = url.option("prefix", "attnstore")
        self.timeout, self.lookup = url.number("timeout", 1.0), url.number("lookup", 0.25)
        self._ttl, self.lease = int(url.number("ttl", 0)), url.number("lease", 10.0)
        most = int(url.number("queue", 256 << 20, "bytes"))
        self.engine: Engine = open_engine(url)
        url.check_options()
        self._accounts, self._clock, self._local, self._right_of_way = accounts, clock, local, right_of_way
        self._codec = codec
        self._tail = 8 * block_size
        self.breaker = Breaker(clock)
        self._lock = threading.Lock()
        self._seen: OrderedDict[Key, tuple[int, float]] = OrderedDict()
        """Bytes of blocks that are known to be there, 0 of those that could not be used; and until when."""
        self._about = (0, 0)
        dropped = partial(accounts.count, "shared_dropped_blocks")
        self._uploads = Uploads(self.breaker, self._probe, right_of_way, most, dropped)
        watch(self)

    def after_fork_in_child(self) -> None:
        self._lock = threading.Lock()
        self.engine.after_fork_in_child()

    @property
    def capacity(self) -> int:
        """As the engine said last, when somebody asked it; 0 where there is no limit, or it is not known."""
        return self._about[0]

    @property
    def used(self) -> int:
        return self._about[1]

    def value(self, key: Key) -> str:
        """The name of a block's value."""
        return f"{self.prefix}:b:{key.hex()}"

    def _followers(self, parent: Key) -> str:
        """The name of the entries of what follows a block."""
        return f"{self.prefix}:f:{parent.hex()}"

    # whether it answers

    @contextmanager
    def asking(self) -> Iterator[None]:
        """An exchange with the engine, for who has been admitted.

        Raises:
            EngineError: it failed; that is known here, and has been said once.
        """
        try:
            yield
        except FullError as error:
            self._went(None)
            self._is_full(str(error.strerror))
            raise
        except EngineError as error:
            self._went(error)
            raise
        except TimeoutError as error:
            failed = EngineError(f"{self.url}: no answer in time")
            self._went(failed)
            raise failed from error
        self._went(None)

    def _went(self, error: EngineError | None) -> None:
        if error is None:
            self.breaker.worked()
            self._accounts.over("shared")
            return
        self.breaker.failed()
        self._uploads.wake()
        self._accounts.count("shared_errors")
        self._accounts.warn_once(
            "shared", f"the shared tier does not answer, KV is taken from here or computed meanwhile: {error.strerror}"
        )

    def _is_full(self, why: str) -> None:
        self._accounts.count("shared_refused_blocks")
        self._accounts.warn_once("shared full", f"the shared tier has no room, new KV is not shared: {why}")

    def _probe(self) -> None:
        self._guarded(lambda: self.engine.sizes([f"{self.prefix}:probe"], Deadline(self.timeout)))

    # looking up

    def sizes(self, keys: Sequence[Key]) -> dict[Key, int]:
        if not self.breaker.well:
            return {}
        known, ask = {}, []
        now = self._clock()
        with self._lock:
            for key in keys:
                size, until = self._seen.get(key, (0, 0.0))
                if until < now:
                    ask.append(key)
                elif size:
                    known[key] = size
        if ask:
            with suppress(EngineError), self.asking():
                found = self.engine.leading([self.value(key) for key in ask], Deadline(self.lookup))
                there = {key: size for key, size in zip(ask, found, strict=True) if size}
                self._saw(there)
                known |= there
        return known

    def _saw(self, sizes: Mapping[Key, int], seconds: float | None = None) -> None:
        until = self._clock() + (self.engine.fresh if seconds is None else seconds)
        with self._lock:
            for key, size in sizes.items():
                self._seen[key] = size, until
                self._seen.move_to_end(key)
            while len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)

    def find(self, keys: Sequence[Key]) -> set[Key]:
        return set(self.sizes(keys))

    def lacks(self, key: Key) -> bool:
        return False  # who sends a block looks whether what it follows is there

    def sources(self, keys: Sequence[Key]) -> Mapping[Key, Callable[[], StoredBlock]]:
        """See `Tier`. All that are opened are read over one stream, for which there is one deadline."""
        wanted = list(self.sizes(keys))
        if not wanted or not self.breaker.well:
            return {}
        try:
            return self._opened(wanted, self.timeout)
        except EngineError:
            return {}

    def _opened(self, wanted: Sequence[Key], seconds: float) -> Mapping[Key, Callable[[], StoredBlock]]:
        with self.asking():
            names = [self.value(key) for key in wanted]
            edges = self.engine.edges(names, HEAD, self._tail, Deadline(seconds))
        self._saw({key: 0 for key, edge in zip(wanted, edges, strict=True) if not edge.size}, _FAILED)
        came = partial(self._accounts.count, "shared_read_bytes")
        came(sum(len(edge.head) + len(edge.tail) for edge in edges))
        reading = Reading(self.engine, seconds, self._went, came, self._right_of_way)
        return {
            key: partial(self._open, key, reading, edge) for key, edge in zip(wanted, edges, strict=True) if edge.size
        }

    def _open(self, key: Key, reading: Reading, edges: Edges) -> StoredBlock:
        """A block that is what was asked for, as far as its header and ids tell: its key names both what it follows
        and its ids."""
        name = self.value(key)
        block = StoredBlock(f"{self.url}: {name}", Value(reading, name, edges), self.vault, key)
        try:
            meta = block.read_meta()
            if not _FINGERPRINT.fullmatch(meta.fingerprint):
                raise LoadError(f"{block.path}: the fingerprint is none")
        except BaseException:
            block.close()
            raise
        return block

    def failed(self, key: Key, error: LoadError) -> None:
        """A block that is not what it should be is removed for everybody: whoever computes it next puts it there."""
        self._saw({key: 0}, _FAILED if error.transient else _GONE)
        if not error.transient:
            self._accounts.count("rejected")
            self._accounts.warn_once("rejected", f"a block of the shared tier can't be used, it is recomputed: {error}")
            self.delete([key])

    def check(self, report: Callable[[str, int, LoadError | None], None], progress: Progress) -> None:
        """Reads all blocks of the prefix. Changes nothing.

        Args:
            report: told of each its name, its bytes, and what is wrong with it.

        Raises:
            SharedTierError: the engine does not answer.
        """
        try:
            with self.asking():
                keys = [_key_of(name) for name in self.engine.names(self.value(b""), Deadline(_PATIENT))]
            for number, key in enumerate(keys):
                progress("shared blocks", number + 1, len(keys))
                for opens in self._opened([key], _PATIENT).values():
                    self._check(key, opens, report)
        except EngineError as error:
            raise SharedTierError(str(error.strerror)) from error

    def _check(
        self,
        key: Key,
        opens: Callable[[], StoredBlock],
        report: Callable[[str, int, LoadError | None], None],
    ) -> None:
        try:
            with opens() as block:
                block.verify()
                report(self.value(key), block.layout.file_bytes, None)
        except LoadError as error:
            if error.transient:
                raise SharedTierError(f"the shared tier can't be read: {error}") from error
            report(self.value(key), 0, error)

    # by content

    def nearest(self, parent: Key, tokens: bytes, beyond: int) -> Match | None:
        found = [(common_prefix(theirs, tokens), key, theirs) for key, theirs in self._noted([parent])[0].items()]
        for common, key, theirs in sorted(found, reverse=True):
            if common > beyond and self.find([key]):
                return Match(key, common, len(theirs) // 4)
        return None

    def followed(self, parents: Sequence[Key]) -> set[Key]:
        last = parents[-_LAST:] if self.engine.one_by_one else parents
        return {parent for parent, found in zip(last, self._noted(last), strict=True) if found}

    def longest_beginning(self, parent: Key, tokens: bytes) -> tuple[Key, int] | None:
        found = [(len(t), key) for key, t in self._noted([parent])[0].items() if tokens.startswith(t)]
        return next(((key, nbytes // 4) for nbytes, key in sorted(found, reverse=True) if self.find([key])), None)

    def _noted(self, parents: Sequence[Key]) -> list[dict[Key, bytes]]:
        """By parent the blocks that are said to follow it, with their ids, which their keys prove."""
        nothing: list[dict[Key, bytes]] = [{} for _ in parents]
        if not parents or not self.breaker.well:
            return nothing
        try:
            with self.asking():
                found = self.engine.noted([self._followers(parent) for parent in parents], Deadline(self.lookup))
        except EngineError:
            return nothing
        return [dict(self._proven(parent, entries)) for parent, entries in zip(parents, found, strict=True)]

    def _proven(self, parent: Key, entries: Mapping[bytes, bytes]) -> Iterator[tuple[Key, bytes]]:
        for key, sealed in entries.items():
            with suppress(LoadError):
                tokens = self.vault.unseal(sealed)
                if tokens and len(tokens) % 4 == 0 and block_key(parent, tokens, self.vault.secret) == key:
                    yield key, tokens

    # putting in: behind the turn

    def put(self, block: Block, supersedes: Key | None = None) -> bool:
        """Has a block sent from where it is by then; the tier holds no copy of what waits."""
        key = block.meta.key
        if self._is_fresh(key):
            return True
        self._uploads.submit(Task(partial(self._send, key, supersedes), block.nbytes))
        return True

    def _is_fresh(self, key: Key) -> bool:
        size, until = self._seen.get(key, (0, 0.0))
        return bool(size) and until >= self._clock()

    def touch(self, keys: Sequence[Key]) -> None:
        self._uploads.submit(Task(partial(self._guarded, partial(self._touch, list(keys)))))

    def _touch(self, keys: list[Key]) -> None:
        # the end of a chain first: it is the first that may go
        names = [name for key in reversed(keys) for name in (self._followers(key), self.value(key))]
        self.engine.touch(names, Deadline(self.timeout), self._ttl)
        about = self.engine.about(Deadline(self.timeout))
        self._about = about.capacity, about.used

    def delete(self, keys: Sequence[Key]) -> None:
        names = [self.value(key) for key in keys]
        self._uploads.submit(Task(partial(self._guarded, lambda: self.engine.delete(names, Deadline(self.timeout)))))

    def _remove(self, blocks: Sequence[tuple[Key, Key]]) -> None:
        """Removes blocks, each with its parent before it, and all that tells of them."""
        names = [name for _, key in blocks for name in (self.value(key), self._followers(key))]
        self.engine.delete(names, Deadline(self.timeout))
        for parent, key in blocks:
            self.engine.drop_note(self._followers(parent), key, Deadline(self.timeout))

    def delete_now(self, blocks: Sequence[tuple[Key, Key]]) -> None:
        """Removes blocks, each with its parent before it, for good and for everybody.

        Raises:
            SharedTierError: the engine did not say that it has.
        """
        self._uploads.drain()
        self._saw({key: 0 for _, key in blocks}, 0.0)
        try:
            with self.asking():
                self._remove(blocks)
        except EngineError as error:
            raise SharedTierError(f"blocks may still be in the shared tier: {error.strerror}") from error

    def behind(self, task: Callable[[], None], left_out: Callable[[], None]) -> None:
        """Has something done after all that was put in before; `left_out` instead, where too much waits."""
        self._uploads.submit(Task(task, left_out=left_out))

    def complete(self, keys: Sequence[Key]) -> bool:
        """Sends those of these blocks that are not there, if they are here; for what runs `behind`. Whether all are
        there then.

        Raises:
            EngineError: it is not known.
        """
        keys = list(dict.fromkeys(keys))
        for key in self._absent(keys):
            self._send(key, None)
        return not self._absent(keys)

    def _absent(self, keys: Sequence[Key]) -> list[Key]:
        """Those of these blocks that the engine does not have, as it says now."""
        ask = [key for key in keys if not self._is_fresh(key)]
        if not ask:
            return []
        with self.asking():
            found = self.engine.sizes([self.value(key) for key in ask], Deadline(self.timeout))
        self._saw({key: size for key, size in zip(ask, found, strict=True) if size})
        return [key for key, size in zip(ask, found, strict=True) if not size]

    def warn(self, kind: str, message: str) -> None:
        """Warns once of something."""
        self._accounts.warn_once(kind, message)

    def flush(self) -> None:
        self._uploads.drain()

    def close(self) -> None:
        self._uploads.close()
        self.engine.close()

    def _guarded(self, change: Callable[[], object]) -> None:
        """Runs a change in the thread of the uploads, which outlives whatever happens."""
        with suppress(EngineError), self.asking():
            change()

    def _send(self, key: Key, supersedes: Key | None) -> None:
        """Sends a block, after those that it follows, where these are not there though they are here."""
        try:
            with self.asking():
                for lacking in reversed(list(self._lacking(key))):
                    parent = self._send_one(lacking)
                    if lacking == key and parent is not None and supersedes is not None:
                        self._remove([(parent, supersedes)])
        except EngineError:
            pass
        except NotFiniteError:
            return
        except LoadError as error:
            self._accounts.warn_once("share", f"a block can't be read to be shared: {error}")

    def _lacking(self, key: Key) -> Iterator[Key]:
        """A block, if the engine does not have it, and backwards those before it that it does not have and that are
        here."""
        while not self._is_fresh(key):
            (size,) = self.engine.sizes([self.value(key)], Deadline(self.timeout))
            source = self._local(key) if not size else None
            if source is None:
                self._saw({key: size} if size else {})
                return
            if isinstance(source, Block):
                meta = source.meta
            else:
                with source:
                    meta = source.read_meta()
            yield key
            if meta.start == 0 and not meta.continues:
                return
            key = meta.predecessor

    def _send_one(self, key: Key) -> Key | None:
        """Returns the block's parent; None where it is not there now."""
        source = self._local(key)
        if source is None:
            return None
        meta, parts = _encoded(source, self.vault, self._codec)
        size = sum(part.nbytes for part in parts)
        full = size > self.engine.largest
        if not full:
            patience = Deadline(self.timeout + size / _SLOWEST)
            full = self.engine.put(self.value(key), parts, patience, self._ttl) is Put.FULL
        if full:
            self._is_full(f"{self.url} refused a block of {format_bytes(size)}")
            return None
        self._accounts.over("shared full")
        self._saw({key: size})
        sealed, patience = self.vault.seal(meta.tokens), Deadline(self.timeout)
        self.engine.note(self._followers(meta.parent), key, sealed, patience, self._ttl)
        self._accounts.count_all({"shared_blocks": 1, "shared_bytes": size})
        return meta.parent


def _key_of(name: str) -> Key:
    """Of the block that a value is; of one that is none, a key that no block has."""
    try:
        return bytes.fromhex(name.rpartition(":")[2])
    except ValueError:
        return name.encode()


def _encoded(source: Source, vault: Vault, codec: Codec) -> tuple[BlockMeta, Sequence[Bytes]]:
    """A block as it is written, after all of it was checked; of one in memory nothing is copied, of a file only what
    `codec` is to have.

    Raises:
        LoadError: it is damaged.
    """
    if not isinstance(source, Block):
        with source:
            meta = source.verify()
            if source.coded or codec.name == RAW or meta.state is not None:
                return meta, [source.raw()]
            source = source.as_kept()
    header, chunks = encode_block(written_by(source, codec), vault)
    return source.meta, [memoryview(header), *chunks]
