"""Tiers whose transfers take time: fetching ahead, loading, saving, on the clock of a simulation."""

from __future__ import annotations

import heapq
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from ...store.eviction.lookahead import fetch_window, keep_window
from ...store.eviction.policies import Policy
from ...store.memory.device_tier import DeviceTier, Owner
from .chains import Chain, Prompt, common_blocks
from .machine import Links
from .tiers import Tiers


@dataclass(slots=True)
class Loaded:
    """What a turn reuses.

    Attributes:
        tokens: all of them; `slow` of them were on disk when the turn began, `kept` on the device.
        seconds: that the load takes if nothing hides it.
    """

    tokens: int
    slow: int
    kept: int
    seconds: float


@dataclass(slots=True)
class _Transfer:
    """Blocks on their way: into memory, or onto disk."""

    blocks: list[Hashable]
    start: int
    sizes: list[int]
    whole: list[Hashable]
    before: Hashable | None


class TimedTiers:
    """A store on a virtual clock.

    Args:
        memory, disk: bytes.
        kv_bytes: bytes of a token's KV.
        stored_bytes: bytes of it as memory and disk keep it; None: as it is.
        ahead: whether it is told of the turns that wait (`schedule`).
        depth: how many times as far as the paper it looks ahead.
        device: bytes of KV that stay on the device, of whole sessions.
    """

    def __init__(
        self,
        memory: int,
        disk: int,
        policy: str | Policy,
        *,
        kv_bytes: int,
        stored_bytes: float | None = None,
        block_tokens: int,
        links: Links,
        ahead: bool = True,
        depth: float = 1.0,
        device: int = 0,
    ) -> None:
        me = weakref.proxy(self)  # no cycle: what a run leaves goes without being looked for
        self.tiers = Tiers(memory, disk, policy, lambda keys: me._gone(keys))
        self.links = links
        self.device = DeviceTier(device) if device else None
        self._owner = Owner()
        self.not_saved = 0
        """Blocks for which there was no room."""
        self.fetched_bytes = self.written_bytes = 0
        self._kv_bytes, self._block_tokens = kv_bytes, block_tokens
        self._stored_bytes = stored_bytes or kv_bytes
        self._ahead, self._depth = ahead, depth
        self._events: list[tuple[float, int, _Over, _Transfer]] = []
        self._numbers = itertools.count()
        self._reader = self._writer = 0.0
        """When the disk is free to read, and to write."""
        self._arriving: dict[Hashable, float] = {}
        self._waiting: deque[tuple[Hashable, Chain]] = deque()
        """Turns beyond what the look-ahead counts."""
        self._counted: deque[tuple[Hashable, Chain]] = deque()
        self._fetched = 0
        """How many of the counted turns have been fetched for."""
        self._begun = 0
        """Number of the first counted turn."""
        self._session_bytes, self._sessions = 0.0, 0
        self._set_windows(0.0)

    # the queue

    def queued(self, name: Hashable, chain: Chain) -> None:
        """A turn waits, behind all others."""
        if self._ahead:
            self._waiting.append((name, chain))

    def look_ahead(self, now: float) -> None:
        """Takes what waits into account, and fetches what runs soon."""
        if not self._ahead:
            return
        counted = self._counted
        while self._waiting and len(counted) < self._keep:
            name, chain = self._waiting.popleft()
            counted.append((name, chain))
            self.tiers.queued(name, chain.blocks)
        while (
            not self._arriving
            and self._fetched < self._reach
            and self._fetched < len(counted)
            and self._fetch(counted[self._fetched][1], self._begun + self._fetched, now)
        ):
            self._fetched += 1

    def _set_windows(self, mean: float) -> None:
        """Works out how far it is worth looking ahead, from the mean bytes of a session."""
        memory = self.tiers.memory.capacity
        disk = self.tiers.disk.capacity if self.tiers.disk is not None else 0
        self._keep = int(keep_window(memory, disk, mean) * self._depth)
        # farther than memory reaches there is nothing to fetch; and what is under way can't be evicted, so it is little
        self._reach = int(fetch_window(memory, mean) * min(self._depth, 1.0))

    def _gone(self, keys: Sequence[Hashable]) -> None:
        """Memory gave up blocks: a turn that needs them is fetched for again, as soon as there is room."""
        jobs = self.tiers.lookahead.jobs
        if not jobs.keys().isdisjoint(keys):
            first = min(jobs[key][0] for key in keys if key in jobs)
            self._fetched = min(self._fetched, max(0, first - self._begun))

    def _next_runs(self) -> None:
        if not self._ahead:
            return
        if not self._counted:
            self._waiting.popleft()
            return
        self._counted.popleft()
        self._begun += 1
        self._fetched = max(0, self._fetched - 1)
        self.tiers.started()

    # transfers

    def advance(self, now: float) -> None:
        """Lets everything happen that is over by `now`."""
        events = self._events
        while events and events[0][0] <= now:
            at, _, over, transfer = heapq.heappop(events)
            over(self, at, transfer)

    def _later(self, at: float, over: _Over, transfer: _Transfer) -> None:
        heapq.heappush(self._events, (at, next(self._numbers), over, transfer))

    def _fetch(self, chain: Chain, job: int, now: float) -> bool:
        """Begins to read what a waiting turn needs from disk into memory, where nothing else is on its way. False if
        there is no room for all of it."""
        memory, disk = self.tiers.memory, self.tiers.disk
        if disk is None:
            return True
        needed = memory.absent(chain.blocks)
        wanted = needed[: disk.leading(needed)] if needed else needed
        if not wanted:
            return True
        sizes = disk.sizes(wanted)
        count = memory.reserve_leading(sizes, now, job=job)
        if count:
            taken, sizes = wanted[:count], sizes[:count]
            total = sum(sizes)
            self._reader = max(now, self._reader) + total / self.links.read
            self.fetched_bytes += total
            self._arriving = dict.fromkeys(taken, self._reader)
            self._later(
                self._reader,
                TimedTiers._arrived,
                _Transfer(taken, chain.start, sizes, list(chain.blocks), chain.before),
            )
        return count == len(wanted)

    def _arrived(self, now: float, transfer: _Transfer) -> None:
        memory, disk = self.tiers.memory, self.tiers.disk
        assert disk is not None
        place = self.tiers.newcomer(now)
        self._arriving.clear()
        for number, keys, sizes in _runs(transfer):
            parent = transfer.whole[number - 1] if number else transfer.before
            if disk.leading(keys) == len(keys) and not memory.has_any(keys):
                memory.add_chain(keys, parent, transfer.start + number, sizes, place)
                continue
            for key, size in zip(keys, sizes, strict=True):
                if key in disk:
                    memory.add(key, parent, transfer.start + number, size, place)
                else:  # it went while it was read: nobody has any more use for it
                    memory.release(size)
                parent, number = key, number + 1
        self.look_ahead(now)

    # a turn

    def begin(self, session: Hashable, prompt: Prompt, chain: Chain, now: float) -> Loaded:
        """Finds and loads what a turn's prompt has in common with what is there."""
        self._next_runs()
        found = self.tiers.find(prompt.blocks)
        kept = self._take(session, prompt.blocks)
        tokens = self._tokens(prompt, max(found.blocks, kept))
        if not tokens:
            return Loaded(0, 0, 0, 0.0)
        on_device = self._tokens(prompt, kept)
        slow = found.slow
        if kept:
            on_it = set(prompt.blocks[:kept])
            slow = [key for key in slow if key not in on_it]
        seconds = (tokens - on_device) * self._kv_bytes / self.links.device
        if slow:
            seconds = max(seconds, self._read(slow, now))
        slow_tokens = min(len(slow) * self._block_tokens, tokens)
        self.tiers.loaded(prompt.blocks[: found.blocks], now)
        if found.slow:
            self._promote(prompt.blocks[: found.blocks], chain, now)
        return Loaded(tokens, slow_tokens, on_device, seconds)

    def _take(self, session: Hashable, blocks: Sequence[Hashable]) -> int:
        """Takes what the device has of a session. Returns how many blocks of the prompt, from the first on, that is."""
        if self.device is None:
            return 0
        there = [self.device.take(entry) for entry in self.device.entries(self._owner, str(session))]
        return common_blocks(blocks, there[0]) if there else 0

    def _park(self, session: Hashable, chain: Chain) -> None:
        """Leaves a session's KV on the device, if that is worth it."""
        if self.device is not None:
            self.device.expect([("", str(name)) for name, _ in (*self._counted, *self._waiting)])
            self.device.park(self._owner, str(session), chain.tokens * self._kv_bytes, list(chain.blocks))

    def _tokens(self, prompt: Prompt, blocks: int) -> int:
        if blocks == len(prompt.blocks) and prompt.short:
            return (blocks - 1) * self._block_tokens + prompt.short
        return min(blocks * self._block_tokens, prompt.tokens)

    def _read(self, blocks: Sequence[Hashable], now: float) -> float:
        """Seconds until blocks are read from disk for a turn that runs; it goes before what is fetched ahead."""
        disk = self.tiers.disk
        assert disk is not None
        until = now
        total = 0
        for key in blocks:
            arrives = self._arriving.get(key)
            if arrives is None:
                total += disk.size(key)
            else:
                until = max(until, min(arrives, now + disk.size(key) * len(blocks) / self.links.read))
        own = total / self.links.read
        self._reader = max(now, self._reader) + own
        self.fetched_bytes += total
        return max(until - now, own)

    def _promote(self, blocks: Sequence[Hashable], chain: Chain, now: float) -> None:
        """What a turn has read from disk stays in memory, if there is room."""
        disk = self.tiers.disk
        assert disk is not None
        if not self._arriving.keys().isdisjoint(blocks):
            return  # the fetch that is under way brings it
        tiers = self.tiers
        place = tiers.newcomer(now)
        tiers.admit(tiers.memory, now, blocks, chain.start, disk.sizes(blocks), place, before=chain.before)

    def end(self, session: Hashable, prompt: Prompt, chain: Chain, loaded: Loaded, now: float) -> None:
        """Keeps what a turn made: in memory at once, on disk as soon as that is written."""
        tiers = self.tiers
        blocks = list(chain.blocks)
        if not blocks:
            return
        short = chain.short > 0
        self._session_bytes += chain.tokens * self._stored_bytes
        self._sessions += 1
        self._set_windows(self._session_bytes / self._sessions)
        old = prompt.blocks[-1] if prompt.short and prompt.blocks and prompt.blocks[-1] != blocks[-1] else None
        went_on_from = None
        if loaded.tokens:
            went_on_from = prompt.blocks[min(-(-loaded.tokens // self._block_tokens), len(prompt.blocks)) - 1]
        place = tiers.newcomer(now)
        first = tiers.find(blocks).blocks
        sizes = [int(self._block_tokens * self._stored_bytes)] * (len(blocks) - first)
        if short and sizes:
            sizes[-1] = int(chain.short * self._stored_bytes)
        self._park(session, chain)
        dirty = tiers.disk is not None
        added = tiers.admit(
            tiers.memory, now, blocks, chain.start, sizes, place,
            first=first, dirty=dirty, protect=not dirty, before=chain.before,
        )  # fmt: skip
        self.not_saved += len(blocks) - first - len(added)
        tiers.turn_is_over(
            now, blocks, tokens=chain.tokens, short=short, went_on_from=went_on_from,
            conversation=None if chain.named else chain,
        )  # fmt: skip
        if old is not None and prompt.history:
            tiers.supersede(old)
        if added and tiers.disk is not None:
            sizes = sizes[: len(added)]
            total = sum(sizes)
            self.written_bytes += total
            self._writer = max(now, self._writer) + total / self.links.write
            self._later(self._writer, TimedTiers._written, _Transfer(added, chain.start, sizes, blocks, chain.before))

    def _written(self, now: float, transfer: _Transfer) -> None:
        memory, disk = self.tiers.memory, self.tiers.disk
        assert disk is not None
        first, sizes = transfer.whole.index(transfer.blocks[0]), transfer.sizes
        if not first or transfer.whole[first - 1] in disk:  # else it would be of no use there
            number = first
            for place, run in groupby(transfer.blocks, memory.order.place):
                if place is None:
                    break  # superseded while it waited
                count = len(list(run))
                added = self.tiers.admit(
                    disk, now, transfer.whole[: number + count], transfer.start, sizes[number - first :][:count], place,
                    first=number, protect=True, before=transfer.before,
                )  # fmt: skip
                if len(added) < count:
                    break
                number += count
        memory.dirty.difference_update(transfer.blocks)


_Over = Callable[[TimedTiers, float, _Transfer], None]


def _runs(transfer: _Transfer) -> Iterator[tuple[int, list[Hashable], list[int]]]:
    """Blocks that follow one another, with the number of the first in their chain, and their sizes."""
    first = transfer.whole.index(transfer.blocks[0])
    if transfer.whole[first : first + len(transfer.blocks)] == transfer.blocks:
        yield first, transfer.blocks, transfer.sizes
        return
    numbers = {key: number for number, key in enumerate(transfer.whole)}
    begin = 0
    for end in range(1, len(transfer.blocks) + 1):
        first = numbers[transfer.blocks[begin]]
        if end == len(transfer.blocks) or numbers[transfer.blocks[end]] != first + end - begin:
            yield first, transfer.blocks[begin:end], transfer.sizes[begin:end]
            begin = end
