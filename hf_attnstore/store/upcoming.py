"""What a store does for turns that have not begun, and what it takes notice of when one is over."""

import threading
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Literal, TypeAlias

from ..errors import SessionNotFoundError, StoreIOError
from .block_store import BlockStore
from .blocks.keys import Key, window_key
from .disk.surroundings import Clock
from .eviction.lookahead import fetch_window, keep_window
from .eviction.policies import Place, Use
from .processes.parts import is_part
from .records.manifest import Manifest
from .records.session_record import SessionRecord
from .shared.sessions import as_record

Session = tuple[str, str]
"""Namespace and name."""

LastUsed: TypeAlias = Callable[[], float | None]
SessionNews: TypeAlias = SessionRecord | Literal[False] | None


@dataclass
class _Plans:
    """What is to come, in all namespaces of a store: they share the memory that it is fetched into."""

    clock: Clock
    lock: threading.Lock = field(default_factory=threading.Lock)
    scheduled: dict[str, list[str]] = field(default_factory=dict)
    """Names by namespace."""
    expected: dict[Session, float] = field(default_factory=dict)
    """Until when, on the clock's monotonic time."""
    number: int = 0
    """Of the plan that holds; counts up."""
    blocks: dict[Session, dict[Key, int]] = field(default_factory=dict)
    """Blocks, with their bytes, of sessions that are to come."""

    def in_order(self) -> list[Session]:
        """The sessions that are scheduled or expected, in the order in which they are thought to run. What is scheduled
        in several namespaces takes turns. Call it with the lock."""
        now = self.clock.monotonic()
        self.expected = {session: until for session, until in self.expected.items() if until > now}
        rounds = zip_longest(*([(space, name) for name in names] for space, names in self.scheduled.items()))
        scheduled = [session for round_ in rounds for session in round_ if session is not None]
        soon = sorted(self.expected, key=self.expected.__getitem__)
        return [*scheduled, *(session for session in soon if session not in scheduled)]


class UpcomingTurns(BlockStore):
    """The part of an `AttentionStore` that looks ahead, and back at what was used."""

    def _prepare_upcoming(self) -> None:
        self._plans = _Plans(self._clock)

    def schedule(self, upcoming: Sequence[str]) -> None:
        """Says which sessions run next, in order; a name may come more than once. Replaces what was said before.

        KV of the first of them is fetched from disk into memory, as much as fits, in the background; what any of them
        needs is evicted last, that of the farthest first. A turn that is saved leaves the list by itself.

        Raises:
            SessionNameError: a name that can't be one.
        """
        self._check_open()
        names = [self.check_name(name) for name in upcoming]
        with self._plans.lock:
            if names == self._plans.scheduled.get(self.namespace, []):
                return
            self._plans.scheduled[self.namespace] = names
            if not names:
                del self._plans.scheduled[self.namespace]
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
        place = self.namespace, session
        with self._plans.lock:
            if within > 0:
                self._plans.expected[place] = self._clock.monotonic() + within
            elif self._plans.expected.pop(place, None) is None:
                return
        self._replan()

    @property
    def upcoming(self) -> Sequence[str]:
        """The sessions of this namespace that are scheduled or expected, in the order in which they are to run."""
        with self._plans.lock:
            return [name for namespace, name in self._plans.in_order() if namespace == self.namespace]

    def residence(self, session: str) -> dict[str, int]:
        """Bytes of a session's blocks by tier, such as `memory` and `disk`; a block may be in several.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        manifest = self.manifest(session)
        keys = list(dict.fromkeys(span.block for span in manifest.spans if span.block))
        return {tier.name: sum(tier.sizes(keys).values()) for tier in self._tiers}

    def manifest(self, session: str) -> Manifest:
        """What a session consists of.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        self._settle()
        self._learn((self.namespace, session))
        found = self._disk.index.sessions.manifest(self.namespace, session)
        return self._whole_manifests.get((self.namespace, session), found)

    def latest_manifest(self, session: str) -> Manifest | None:
        """What a session consists of, or will when what was handed over is on disk; None if there is none."""
        self._check_open()
        return self._manifest_of((self.namespace, session))

    def _manifest_of(self, session: Session) -> Manifest | None:
        pending = self._committing.get(session)
        if pending is not None:
            return pending[1]
        return self._whole_manifests.get(session) or self._disk.manifest(*session)

    def _learn(self, session: Session, *, settled: bool = False) -> None:
        """Takes in what other machines made of a session; `settled`: that of a turn that has just ended, too."""
        if self._shared_sessions is None or is_part(session[1]) or session in self._committing:
            return
        self._take_in(session, partial(self._shared_sessions.news, settled=settled))

    def _take_in(self, session: Session, news_of: Callable[[Session, LastUsed], SessionNews]) -> None:
        try:
            news = news_of(session, partial(self._disk.index.sessions.last_used, *session))
            if news is None:
                return
            if news is False:
                self._whole_manifests.pop(session, None)
                with suppress(SessionNotFoundError):
                    self._disk.delete_session(*session, self._forget, secure=False)
            else:
                self._disk.take_in(news)
                self._keep_whole(session, news.manifest)
            assert self._shared_sessions is not None
            self._shared_sessions.taken_in(session)
            self.device_tier.forget(session[1], session[0])
        except StoreIOError as error:
            self._accounts.warn_once("take in", f"a session of another machine can't be taken in: {error}")

    def _keep_whole(self, session: Session, manifest: Manifest) -> None:
        """A session that is shared consists of this; kept here only if the index knows of less."""
        if self._shared_sessions is None:
            return
        known = self._disk.manifest(*session)
        if known is not None and len(known.spans) == len(manifest.spans):
            self._whole_manifests.pop(session, None)
        else:
            self._whole_manifests[session] = manifest

    def _learn_all(self) -> None:
        """The same of all sessions of this namespace."""
        for name in self._shared_sessions.changed(self.namespace) if self._shared_sessions is not None else ():
            self._learn((self.namespace, name))

    def _publish(self, session: Session, done: Callable[[], None] = lambda: None) -> None:
        """Has other machines know what a session is now, or that it is no more; behind what was handed over before."""
        if self._shared_sessions is None or is_part(session[1]):
            done()
            return

        def record() -> SessionRecord | None:
            try:
                found = self._disk.index.sessions.record(*session)
            except SessionNotFoundError:
                return None
            whole = self._whole_manifests.get(session)
            return as_record(found, whole) if whole is not None else found

        self._shared_sessions.publish(session, record, done)

    def _forget(self, key: Key) -> None:
        """The disk has let go of a block for good. What is shared stays: others may use it."""
        for tier in self._tiers:
            if tier is not self._disk and not tier.shared:
                tier.delete([key])

    # fetching

    def _replan(self) -> None:
        with self._plans.lock:
            self._plans.number += 1
            plan = self._plans.number
            self.device_tier.expect(self._plans.in_order())
        self._fetcher.submit(partial(self._guarded, partial(self._look_ahead, plan)))

    def _outdated(self, plan: int) -> bool:
        return self.closed or plan != self._plans.number

    def _look_ahead(self, plan: int) -> None:
        """Gives the blocks of upcoming turns their jobs, and fetches those of the next ones."""
        if self._outdated(plan):
            return
        plans = self._plans
        with plans.lock:
            sessions = plans.in_order()
            plans.blocks = {session: plans.blocks[session] for session in sessions if session in plans.blocks}
        lookahead = self._order.lookahead
        sizes: list[int] = []
        blocks: dict[Hashable, Sequence[Key]] = {}
        window = len(sessions)
        for place, session in enumerate(sessions):
            if self._outdated(plan):
                return
            self._learn(session)
            found = self._blocks_of(session)
            blocks[session] = tuple(found)
            if found:
                sizes.append(sum(found.values()))
                mean = sum(sizes) / len(sizes)
                window = keep_window(self._memory.capacity, self._disk.capacity, mean)
            if place + 1 >= window:
                break
        mean = sum(sizes) / len(sizes) if sizes else 0.0
        self._memory.reschedule(partial(lookahead.schedule, sessions, blocks, window))
        for number, key in list(lookahead.fetches(fetch_window(self._memory.capacity, mean))):
            assert isinstance(key, bytes)
            if self._outdated(plan) or not self._fetch(key, number):
                return

    def _blocks_of(self, session: Session) -> dict[Key, int]:
        """The blocks of a session, in order, with their bytes."""
        with self._plans.lock:
            known = self._plans.blocks.get(session)
        if known is not None:
            return known
        manifest = self._manifest_of(session)
        keys = [span.block for span in manifest.spans if span.block] if manifest is not None else []
        keys += [key for key in manifest.beside if key not in keys] if manifest is not None else []
        found = dict.fromkeys(keys, 0)
        if self.windows_every is not None:
            keys += [window_key(key, self.secret) for key in keys]
        for tier in reversed(self._tiers):
            found |= tier.sizes(keys)
        with self._plans.lock:
            self._plans.blocks[session] = found
        return found

    def _fetch(self, key: Key, job: int) -> bool:
        """Brings a block into memory for an upcoming turn. False where what is there is needed sooner."""
        nbytes = self._promote(key, job)
        if nbytes is None:
            return False
        if nbytes:
            self._accounts.count_all({"fetched_blocks": 1, "fetched_bytes": nbytes})
        return True

    def _turn_is_over(self, session: str) -> None:
        """A turn that was scheduled or expected has run: what the session consists of is not what it was."""
        place = self.namespace, session
        with self._plans.lock:
            self._plans.blocks.pop(place, None)
            expected = self._plans.expected.pop(place, None) is not None
            names = self._plans.scheduled.get(self.namespace, [])
            scheduled = session in names
            if scheduled:
                names.remove(session)
        if expected or scheduled:
            self._replan()

    # looking back

    def used(
        self, blocks: Sequence[Key], tokens: int, *, short: bool, went_on_from: Key | None = None,
        session: str | None = None,
    ) -> None:  # fmt: skip
        """Takes notice of a turn on a conversation, in the background.

        Args:
            blocks: all of the conversation's blocks, in order, those that the turn made included.
            tokens: their tokens.
            short: the last of them is not full.
            went_on_from: the last block that the turn reused.
            session: whose turn it was; None for one without a session.
        """
        self._check_open()
        if blocks:
            conversation = (self.namespace, session) if session is not None else None
            note = partial(self._note_use, tuple(blocks), tokens, short, went_on_from, conversation)
            self._writer.submit(partial(self._guarded, note))

    def _note_use(
        self, blocks: tuple[Key, ...], tokens: int, short: bool, went_on_from: Key | None, conversation: Session | None
    ) -> None:
        if self._shared is not None:
            self._shared.touch(blocks)
        policy, now = self._order.policy, self._clock.time()
        chain, end = (blocks[:-1], blocks[-1]) if short else (blocks, None)
        matched = self._place_of_end(went_on_from) if went_on_from is not None else None
        known = (went_on_from,) if went_on_from is not None else ()
        group = policy.group(Use(now, chain, tokens, end, known, matched, self._holds, conversation))
        self._memory.used_by_turn(chain, group, now, short=end)
        rows = self._disk.rows([*chain[-_ENDS:], *([end] if end is not None else [])])
        last = next((key for key in reversed(chain) if key in rows), None)
        places = {
            key: policy.place(rows[key].place, group, now, short=key == end) for key in (last, end) if key in rows
        }
        self._disk.move({key: place for key, place in places.items() if key is not None})

    def _holds(self, key: Hashable) -> bool:
        assert isinstance(key, bytes)
        return self.has(key)

    def _place_of_end(self, key: Key) -> Place | None:
        """Where a block stands after which there was nothing before the turn that went on from it."""
        row = self._disk.row(key)
        if row is None or self._disk.index.followers(key) > 1:
            return None
        return row.place


_ENDS = 8
"""How far from its end a chain's last block on disk is looked for: later ones may not have found room there."""
