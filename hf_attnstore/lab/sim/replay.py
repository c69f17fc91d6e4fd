"""A trace against a store of some size, without time: what is found, what goes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...store.eviction.policies import Place, Policy
from .chains import Chain, common_blocks
from .tiers import Tiers
from .workload import Workload

BLOCK = 256


@dataclass(slots=True)
class Request:
    """A turn as the tiers see it.

    Attributes:
        at: second.
        session: number of the conversation.
        prompt: blocks to look for.
        blocks: those that the conversation has after it.
        tokens: of the prompt.
        history: tokens of it that were there before.
        kept: tokens in `blocks`.
        short: whether the last of `blocks` is a short one.
        start: number of the first of `blocks` in its conversation.
        foreseen: those of `prompt` that are known to be of this conversation before it runs.
        prompt_short: tokens of the last block of `prompt` if that is short, else 0.
        superseded: the short block that the first new one takes the place of.
        before: what the first of `blocks` follows where that is out of view.
    """

    at: float
    session: int
    prompt: Sequence[Hashable]
    blocks: Sequence[Hashable]
    tokens: int
    history: int
    kept: int
    short: bool
    start: int
    foreseen: Sequence[Hashable]
    prompt_short: int
    superseded: Hashable | None
    before: Hashable | None = None


@dataclass
class Requests:
    """All turns of a workload, in the order in which they come, with the names of their blocks."""

    name: str
    block_tokens: int
    rows: list[Request] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(row.tokens for row in self.rows)

    @cached_property
    def unique(self) -> int:
        """How many different blocks there are; short ones count as the whole blocks that they become."""
        return len(set(itertools.chain.from_iterable(row.blocks for row in self.rows)))

    @property
    def per_session(self) -> float:
        """Mean blocks of a turn."""
        return sum(len(row.blocks) for row in self.rows) / max(1, len(self.rows))


def requests_of(workload: Workload, block_tokens: int | None = None, window: int | None = None) -> Requests:
    """Names the blocks of a workload's turns, in the order of `in_order`."""
    size = workload.block_tokens or block_tokens or BLOCK
    names = itertools.count()
    chains = [Chain(size, names, window, answers=workload.keeps_answers) for _ in workload.conversations]
    found = Requests(workload.name, size)
    for at, session, place in workload.in_order():
        turn, chain = workload.conversations[session].turns[place], chains[session]
        before = list(chain.blocks)
        short_before = before[-1] if chain.short else None
        prompt = chain.prompt(turn)
        chain.answer(turn)
        blocks = list(chain.blocks)
        foreseen: Sequence[Hashable] = prompt.blocks
        if turn.ids is not None:
            foreseen = blocks[: common_blocks(blocks, before)]
            short_before = None
        gone = short_before is not None and (not blocks or short_before not in blocks[-1:])
        found.rows.append(
            Request(
                at, session, prompt.blocks, blocks, prompt.tokens, prompt.history, chain.tokens, chain.short > 0,
                chain.start, foreseen, prompt.short, short_before if gone else None, chain.before,
            )
        )  # fmt: skip
    return found


@dataclass
class Hits:
    """What a replay found.

    Attributes:
        tokens, found: of prompts, and those of them found; of these, `fast` in memory.
        turns, resumed, whole, some: turns; those with a history, those of them that found all of it, and some of it.
        evictions, by_turn, fast_by_turn: keys that memory gave up, blocks found, and those of them in memory, in order,
            if they were asked for.
    """

    tokens: int = 0
    found: int = 0
    fast: int = 0
    turns: int = 0
    resumed: int = 0
    whole: int = 0
    some: int = 0
    evictions: list[Hashable] = field(default_factory=list)
    by_turn: list[int] = field(default_factory=list)
    fast_by_turn: list[int] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens found, as a share of all."""
        return self.found / self.tokens if self.tokens else 0.0


def replay(
    requests: Requests,
    capacity: int,
    policy: str | Policy = "lru",
    *,
    disk: int = 0,
    window: int = 0,
    wrong: float = 0.0,
    seed: int = 0,
    trace: bool = False,
    progress: Callable[[int], None] = lambda done: None,
    after: Callable[[int, Tiers, Hits], None] = lambda number, tiers, hits: None,
) -> Hits:
    """Runs all turns against a store of `capacity` blocks.

    Args:
        disk: blocks of a second tier below; 0: none.
        window: upcoming turns, in their true order, that the store is told of (`schedule`); 0: none.
        wrong: share of what it is told that is another session's turn instead.
        trace: keep what was found turn by turn, and what was evicted.
        progress: called now and then with the number of turns done.
        after: called after every turn with its number, the tiers, and what was found until then.
    """
    hits = Hits()
    tiers = Tiers(capacity, disk, policy, hits.evictions.extend if trace else lambda keys: None)
    ahead = _foreseen(requests.rows, wrong, seed) if window else iter(())
    for blocks, name in itertools.islice(ahead, window):
        tiers.queued(name, blocks)
    for number, row in enumerate(requests.rows):
        if window:
            if len(tiers.lookahead):
                tiers.started()
            following = next(ahead, None)
            if following is not None:
                tiers.queued(following[1], following[0])
        _turn(tiers, row, requests.block_tokens, hits, trace)
        after(number, tiers, hits)
        if number % 500 == 0:
            progress(number)
    progress(len(requests.rows))
    return hits


def _foreseen(rows: list[Request], wrong: float, seed: int) -> Iterator[tuple[Sequence[Hashable], Hashable]]:
    """Blocks and session of what comes, as the store is told of it."""
    random = np.random.default_rng(seed)
    recent: deque[Request] = deque(maxlen=2000)
    for row in rows:
        told = row
        if wrong and recent and random.random() < wrong:
            told = recent[int(random.integers(len(recent)))]
        yield told.foreseen, told.session
        recent.append(row)


def count_hits(hits: Hits, row: Request, count: int, slow: int, block_tokens: int) -> None:
    """Adds a turn of which the first `count` blocks were found, `slow` of them not in memory."""
    tokens = min(count * block_tokens, row.tokens)
    if row.prompt_short and count == len(row.prompt):
        tokens = min(tokens, (count - 1) * block_tokens + row.prompt_short)
    hits.turns += 1
    hits.tokens += row.tokens
    hits.found += tokens
    hits.fast += max(0, tokens - slow * block_tokens)
    if row.history:
        hits.resumed += 1
        hits.whole += tokens >= row.history
        hits.some += tokens > 0


def _turn(tiers: Tiers, row: Request, block_tokens: int, hits: Hits, trace: bool) -> None:
    found = tiers.find(row.prompt)
    count = found.blocks
    count_hits(hits, row, count, len(found.slow), block_tokens)
    if trace:
        hits.by_turn.append(count)
        hits.fast_by_turn.append(count - len(found.slow))
    went_on_from = row.prompt[count - 1] if count else None
    place = tiers.newcomer(row.at)
    if tiers.disk is not None:
        tiers.loaded(row.prompt[:count], row.at)
    first = tiers.find(row.blocks).blocks
    sizes = [1] * (len(row.blocks) - first)
    single = tiers.disk is None
    new = tiers.admit(
        tiers.memory,
        row.at,
        row.blocks,
        row.start,
        sizes,
        place,
        first=first,
        dirty=not single,
        protect=single,
        before=row.before,
    )
    if tiers.disk is not None:  # what found no room in memory is never handed over
        upto = row.blocks[: first + len(new)]
        tiers.admit(
            tiers.disk, row.at, upto, row.start, sizes[: len(new)], place, first=first, protect=True, before=row.before
        )
        tiers.memory.dirty.difference_update(new)
    tiers.turn_is_over(row.at, row.blocks, tokens=row.kept, short=row.short, went_on_from=went_on_from)
    if found.slow:
        _promote(tiers, row, count, set(found.slow), place)
    if row.superseded is not None:
        tiers.supersede(row.superseded)


def _promote(tiers: Tiers, row: Request, count: int, slow: set[Hashable], place: Place) -> None:
    """What a turn has read from disk stays in memory, if there is room."""
    for number, key in enumerate(row.prompt[:count]):
        if key in slow:
            tiers.admit(
                tiers.memory, row.at, row.prompt[: number + 1], row.start, [1], place, first=number, before=row.before
            )
