"""What a store does for turns that have not begun, and what it takes notice of when one is over."""

import threading
import time
from collections.abc import Hashable, Sequence
from functools import partial

from .block_store import BlockStore
from .keys import Key
from .lookahead import fetch_window, keep_window
from .manifest import Manifest
from .policies import Place, Use


class UpcomingTurns(BlockStore):
    """The part of an `AttentionStore` that looks ahead, and back at what was used."""

    def _prepare_upcoming(self) -> None:
        self._plans = threading.Lock()
        self._scheduled: list[str] = []
        self._expected: dict[str, float] = {}
        self._plan = 0
        self._known_blocks: dict[str, dict[Key, int]] = {}
        """Blocks, with their bytes, of sessions that are expected."""

    def schedule(self, upcoming: Sequence[str]) -> None:
        """Says which sessions run next, in order; a name may come more than once. Replaces what was said before.

        KV of the first of them is fetched from disk into memory, as much as fits, in the background; what any of them
        needs is evicted last, that of the farthest first. A turn that is saved leaves the list by itself.

        Raises:
            SessionNameError: a name that can't be one.
        """
        self._check_open()
        names = [self.check_name(name) for name in upcoming]
        with self._plans:
            if names == self._scheduled:
                return
            self._scheduled = names
        self._replan()

    def expect(self, session: str, within: float = 60.0) -> None:
        """Says that a turn on a session is likely soon, as when somebody opens it or begins to type: its KV is fetched
        into memory, in the background, and kept there before what nobody expects. Turns in `schedule` come first.

        Args:
            within: for how many seconds that holds; 0 takes it back.

        Raises:
            SessionNameError: a name that can't be one.
        """
        self._check_open()
        self.check_name(session)
        with self._plans:
            if within > 0:
                self._expected[session] = time.monotonic() + within
            elif self._expected.pop(session, None) is None:
                return
        self._replan()

    @property
    def upcoming(self) -> Sequence[str]:
        """The sessions that are scheduled or expected, in the order in which they are thought to run."""
        with self._plans:
            now = time.monotonic()
            self._expected = {name: until for name, until in self._expected.items() if until > now}
            soon = sorted(self._expected, key=self._expected.__getitem__)
            return [*self._scheduled, *(name for name in soon if name not in self._scheduled)]

    def residence(self, session: str) -> dict[str, int]:
        """Bytes of a session's blocks by tier, `memory` and `disk`; a block may be in both.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        manifest = self._disk.index.sessions.manifest(self.namespace, session)
        keys = list(dict.fromkeys(span.block for span in manifest.spans if span.block))
        held = [block.nbytes for block in map(self._memory.get, keys) if block is not None]
        return {"memory": sum(held), "disk": sum(self._disk.sizes(keys).values())}

    def latest_manifest(self, session: str) -> Manifest | None:
        """What a session consists of, or will when what was handed over is on disk; None if there is none."""
        pending = self._committing.get(session)
        return pending[1] if pending is not None else self._disk.manifest(self.namespace, session)

    # fetching

    def _replan(self) -> None:
        with self._plans:
            self._plan += 1
            plan = self._plan
        self._fetcher.submit(partial(self._guarded, partial(self._look_ahead, plan)))

    def _outdated(self, plan: int) -> bool:
        return self._closed or plan != self._plan

    def _look_ahead(self, plan: int) -> None:
        """Gives the blocks of upcoming turns their jobs, and fetches those of the next ones."""
        if self._outdated(plan):
            return
        names = self.upcoming
        with self._plans:
            self._known_blocks = {name: self._known_blocks[name] for name in names if name in self._known_blocks}
        lookahead = self._order.lookahead
        sizes: list[int] = []
        blocks: dict[Hashable, Sequence[Key]] = {}
        window = len(names)
        for place, name in enumerate(names):
            if self._outdated(plan):
                return
            found = self._blocks_of(name)
            blocks[name] = tuple(found)
            if found:
                sizes.append(sum(found.values()))
                mean = sum(sizes) / len(sizes)
                window = keep_window(self._memory.capacity, self.disk_capacity, mean)
            if place + 1 >= window:
                break
        mean = sum(sizes) / len(sizes) if sizes else 0.0
        self._memory.reschedule(partial(lookahead.schedule, names, blocks, window))
        for number, key in list(lookahead.fetches(fetch_window(self._memory.capacity, mean))):
            assert isinstance(key, bytes)
            if self._outdated(plan) or not self._fetch(key, number):
                return

    def _blocks_of(self, name: str) -> dict[Key, int]:
        """The blocks of a session, in order, with their bytes."""
        with self._plans:
            known = self._known_blocks.get(name)
        if known is not None:
            return known
        manifest = self.latest_manifest(name)
        keys = [span.block for span in manifest.spans if span.block] if manifest is not None else []
        keys += [key for key in manifest.beside if key not in keys] if manifest is not None else []
        on_disk = self._disk.sizes(keys)
        found = {}
        for key in keys:
            held = self._memory.get(key)
            found[key] = held.nbytes if held is not None else on_disk.get(key, 0)
        with self._plans:
            self._known_blocks[name] = found
        return found

    def _fetch(self, key: Key, job: int) -> bool:
        """Brings a block into memory for an upcoming turn. False where what is there is needed sooner."""
        if self._memory.get(key) is not None or not self._disk.has([key]):
            return True
        nbytes = self._promote(key, job)
        if nbytes is None:
            return False
        if nbytes:
            self._accounts.count_all({"fetched_blocks": 1, "fetched_bytes": nbytes})
        return True

    def _turn_is_over(self, session: str) -> None:
        """A turn that was scheduled or expected has run: what the session consists of is not what it was."""
        with self._plans:
            self._known_blocks.pop(session, None)
            expected = self._expected.pop(session, None) is not None
            scheduled = session in self._scheduled
            if scheduled:
                self._scheduled.remove(session)
        if expected or scheduled:
            self._replan()

    # looking back

    def used(self, blocks: Sequence[Key], tokens: int, *, short: bool, went_on_from: Key | None = None) -> None:
        """Takes notice of a turn on a conversation, in the background.

        Args:
            blocks: all of the conversation's blocks, in order, those that the turn made included.
            tokens: their tokens.
            short: the last of them is not full.
            went_on_from: the last block that the turn reused.
        """
        if blocks:
            note = partial(self._note_use, tuple(blocks), tokens, short, went_on_from)
            self._writer.submit(partial(self._guarded, note))

    def _note_use(self, blocks: tuple[Key, ...], tokens: int, short: bool, went_on_from: Key | None) -> None:
        policy, now = self._order.policy, time.time()
        chain, end = (blocks[:-1], blocks[-1]) if short else (blocks, None)
        matched = self._place_of_end(went_on_from) if went_on_from is not None else None
        known = (went_on_from,) if went_on_from is not None else ()
        group = policy.group(Use(now, chain, tokens, end, known, matched))
        self._memory.used_by_turn(chain, group, now, short=end)
        rows = self._disk.rows([*chain[-_ENDS:], *([end] if end is not None else [])])
        last = next((key for key in reversed(chain) if key in rows), None)
        places = {
            key: policy.place(rows[key].place, group, now, short=key == end) for key in (last, end) if key in rows
        }
        self._disk.move({key: place for key, place in places.items() if key is not None})

    def _place_of_end(self, key: Key) -> Place | None:
        """Where a block stands after which there was nothing before the turn that went on from it."""
        row = self._disk.row(key)
        if row is None or self._disk.index.followers(key) > 1:
            return None
        return row.place


_ENDS = 8
"""How far from its end a chain's last block on disk is looked for: later ones may not have found room there."""
