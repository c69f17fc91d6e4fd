"""A turn, as data: what belongs to one `generate`, or to the forwards of a loop of one's own up to `save`.

Made anew for every turn, and again where a load failed and the turn is begun again. What is done with it is in
`reuse`, `loads`, `forwards` and `commit`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from ..store.blocks.keys import Key
from ..store.processes.locks import SessionLock
from .held import Held
from .probing.continuing import Continues
from .setup import Setup
from .stats import TurnStats
from .transfer.load import Restore
from .transfer.record import TurnRecorder

logger = logging.getLogger("hf_attnstore")


class Phase(Enum):
    """Where a turn is."""

    RUNS = auto()
    FAILED = auto()
    """A load failed: everything held was let go, the session is still the turn's, and it is to be begun again."""
    OVER = auto()


@dataclass(frozen=True)
class Forward:
    """A forward that is running: so many new tokens in so many rows."""

    count: int
    rows: int
    thread: int


@dataclass(eq=False)
class Turn:
    """One turn of a cache."""

    setup: Setup
    held: Held
    phase: Phase = Phase.OVER
    thread: int = 0
    """Who began it."""
    began: float = 0.0
    """When, on the clock of `time.perf_counter`."""
    lock: SessionLock | None = None
    stats: TurnStats = field(default_factory=TurnStats)
    recorder: TurnRecorder | None = None
    untracked: str = ""
    """Why the tokens are not identified by ids, from some point on: nothing more is reused or kept; empty if they
    are."""
    checked: bool = False
    """Whether the caller vouches for masks and positions, as `generate` does: forwards need not look at them."""
    computed: bool = False
    """Whether anything was computed, so that there may be something to keep."""
    speculating: bool = False
    """Whether tokens are fed that may be taken back."""
    confirmed: int = 0
    """Tokens that will not be taken back."""
    continues: Continues = "parts"
    """How the model may be fed what comes after what is held."""
    hooks: int = 0
    """How many hooks were on the model when it was last looked at."""
    prompt: np.ndarray | None = None
    """The tokens of the prompt that are in view, where the caller vouches for what will be fed."""
    prompt_tokens: int = 0
    stops: Sequence[int] = ()
    """Positions at which the prefill is to pause."""
    computes_known: bool = False
    """Whether some of what the store has is computed, as that is faster."""
    holds_for_additions: bool = False
    """Whether blocks wait for the turn's end only because code was added to the model, which may yet change it.
    States can't wait: they are asked for before that each time."""
    from_disk: list[Key] = field(default_factory=list)
    """Blocks that came from disk."""
    taken: int = 0
    """How many leading tokens of the prompt came with what was taken over from the device tier."""
    keeps: int | None = None
    """How many leading tokens are worth keeping; None for all."""
    forward: Forward | None = None

    @property
    def is_open(self) -> bool:
        """Whether the session is this turn's."""
        return self.phase is not Phase.OVER

    def again(self) -> "Turn":
        """The same turn, begun again."""
        return Turn(
            self.setup,
            self.held,
            thread=self.thread,
            began=self.began,
            lock=self.lock,
            stats=TurnStats(recomputed=self.stats.recomputed, missed=self.stats.missed),
            recorder=self.recorder if self.setup.records else None,
        )

    def note(self, reason: str, missed: str) -> None:
        """Says, here and in the log, why something that could have been reused is not."""
        self.stats.recomputed, self.stats.missed = reason, missed
        logger.warning(reason)

    def note_failed_load(self, error: object, *, log: bool = True) -> None:
        """Says why tokens whose KV was to be loaded are computed again.

        Args:
            log: False where the store has said it.
        """
        reason, missed = f"a load failed, its tokens are computed again: {error}", "load failed"
        if log:
            self.note(reason, missed)
        else:
            self.stats.recomputed, self.stats.missed = reason, missed

    def as_wanted(self, load: Restore) -> Restore:
        """A load of this turn as it is to be: recorded, begun in another way."""
        load.recorder, load.begin = self.recorder, self.setup.begin_load
        return load

    def untrack(self, reason: str, *, expected: bool = False, once: bool = False) -> None:
        """From here on the cache holds tokens that ids do not identify: they serve this turn and are not kept.

        Args:
            expected: nothing to tell anybody about.
            once: tell the log only the first time for this model.
        """
        if self.untracked:
            return
        self.untracked = reason
        if not expected:
            told = self.setup.attachment.told
            self.stats.recomputed, self.stats.missed = reason, "not identified by ids"
            level = logging.DEBUG if once and reason in told else logging.WARNING
            told.add(reason)
            logger.log(level, "not reused and not saved from token %d on: %s", len(self.held.chain), reason)

    def is_of_its_model(self) -> bool:
        """Whether the model is still the one that the turn began with. Where nobody can tell, it is not."""
        try:
            return self.setup.attachment.fingerprint.current() == self.held.fingerprint
        except Exception:
            return False

    def elsewhere(self) -> float:
        """Seconds of this turn that were spent on loading and saving, and not on computing."""
        load, saver = self.held.load, self.held.saver
        return (load.exposed_seconds if load is not None else 0.0) + (saver.seconds if saver is not None else 0.0)

    def note_first_token(self) -> None:
        """Records the time to first token. Called when the second forward begins or `generate` returns: by then
        `generate` has read the first token, so the kernels of the prompt are done."""
        if self.checked and self.stats.ttft_seconds is None and 0 < self.prompt_tokens <= self.held.length:
            self.stats.ttft_seconds = time.perf_counter() - self.began
