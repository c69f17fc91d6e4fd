"""What comes next: the upcoming turns, and how far it is worth looking ahead (pure bookkeeping).

The windows are those of CachedAttention (USENIX ATC 2024, sections 3.3.1 and 3.3.2).
"""

from collections import deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import islice


def fetch_window(memory: float, session_bytes: float) -> int:
    """For how many upcoming turns KV is fetched into memory: as many as fit there; at least the next one."""
    return max(1, int(memory / session_bytes)) if session_bytes > 0 else 1


def keep_window(memory: float, disk: float, session_bytes: float) -> int:
    """How many upcoming turns keep their KV from being dropped: as many as fit into all tiers."""
    return max(1, int((memory + disk) / session_bytes)) if session_bytes > 0 else 1


class Lookahead:
    """The turns that will run, in order, and the blocks that they need.

    Turns are numbered as they come. Only the first `window` of them count: their blocks have a job.
    """

    def __init__(self, window: int | None = None) -> None:
        self._window = window
        self._numbers: deque[int] = deque()
        self._names: deque[Hashable] = deque()
        self._next = 0
        self._blocks: dict[int, tuple[Hashable, ...]] = {}
        """The blocks of the turns that count."""
        self.jobs: dict[Hashable, tuple[int, ...]] = {}
        """Numbers of the turns that need a block, rising, where there are any; to be read only. They are never changed
        in place, so that other threads may do that."""

    def __len__(self) -> int:
        return len(self._names)

    @property
    def upcoming(self) -> Sequence[Hashable]:
        """The names of what runs next, in order."""
        return tuple(self._names)

    @property
    def window(self) -> int:
        """How many of the turns count."""
        return len(self._names) if self._window is None else min(self._window, len(self._names))

    def job(self, key: Hashable) -> int | None:
        """The number of the first turn that needs a block; None if none does. A smaller number is sooner."""
        jobs = self.jobs.get(key)
        return jobs[0] if jobs else None

    def fetches(self, count: int) -> Iterator[tuple[int, Hashable]]:
        """Number and key of the blocks that the first `count` turns need, in the order of need."""
        seen: set[Hashable] = set()
        for number in islice(self._numbers, min(count, self.window)):
            for key in self._blocks.get(number, ()):
                if key not in seen:
                    seen.add(key)
                    yield number, key

    def schedule(
        self,
        upcoming: Sequence[Hashable],
        blocks: Mapping[Hashable, Sequence[Hashable]],
        window: int | None = None,
    ) -> set[Hashable]:
        """Sets what runs next. Turns that were there before, in the same order, keep their numbers.

        Args:
            blocks: the blocks of each name that is within the window; those of turns that counted before need not
                be there.
            window: how many of the turns count from now on; None: as before.

        Returns:
            The blocks whose job has changed.
        """
        if window is not None:
            self._window = window
        numbers = self._renumber(upcoming)
        self._names, self._numbers = deque(upcoming), deque(numbers)
        counting = dict(islice(zip(numbers, upcoming, strict=True), self.window))
        changed: set[Hashable] = set()
        for number in [number for number in self._blocks if number not in counting]:
            changed.update(self._forget(number))
        for number, name in counting.items():
            wanted = tuple(blocks[name]) if name in blocks else self._blocks.get(number, ())
            if self._blocks.get(number) != wanted:
                changed.update(self._forget(number))
                self._blocks[number] = wanted
                for key in wanted:
                    jobs = self.jobs.get(key, ())
                    self.jobs[key] = tuple(sorted({*jobs, number}))
                changed.update(wanted)
        return changed

    def push(self, name: Hashable, blocks: Sequence[Hashable]) -> set[Hashable]:
        """Adds one turn behind the others; for long queues. Returns the blocks whose job has changed."""
        counts = self._window is None or len(self._names) < self._window
        self._names.append(name)
        self._numbers.append(self._next)
        self._next += 1
        if not counts:
            return set()
        number = self._numbers[-1]
        self._blocks[number] = tuple(blocks)
        needed = set(blocks)
        changed = {key for key in needed if key not in self.jobs}
        alone = (number,)
        for key in needed:
            if self.jobs.setdefault(key, alone) is not alone:
                self.jobs[key] += alone
        return changed

    def pop(self) -> set[Hashable]:
        """The first turn runs now, or is over. Returns the blocks whose job has changed."""
        self._names.popleft()
        return self._forget(self._numbers.popleft())

    def _renumber(self, upcoming: Sequence[Hashable]) -> list[int]:
        """Numbers in rising order: the old ones for turns that go on to stand in the order of before."""
        old = iter(zip(self._names, self._numbers, strict=True))
        numbers: list[int] = []
        fits = True
        for name in upcoming:
            number = next((number for was, number in old if was == name), None) if fits else None
            if number is None:
                fits = False
                number = self._next
                self._next += 1
            numbers.append(number)
        return numbers

    def _forget(self, number: int) -> set[Hashable]:
        blocks = self._blocks.pop(number, ())
        alone = (number,)
        for key in blocks:
            jobs = self.jobs.get(key, alone)
            if jobs != alone:
                self.jobs[key] = tuple(job for job in jobs if job != number)
            else:
                self.jobs.pop(key, None)
        return set(blocks)
