"""TurnQueue: turns from many threads, one at a time on one model, with a store that knows what comes."""

from __future__ import annotations

import atexit
import logging
import math
import queue
import threading
import time
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..cache import AttentionStoreCache
from ..cache.hooks import owner_of
from ..cache.model.argument import cache_in
from ..chat.openmp import leave_computing_to_others
from ..chat.prefill_ahead import Surroundings, give_way
from ..chat.session import ChatSession
from ..errors import QueueFullError, SessionBusyError, TurnQueueError, TurnTimeoutError
from ..store import AttentionStore
from . import work as turn_work
from .order import WaitingTurns
from .turn import Turn

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger("hf_attnstore")

T = TypeVar("T")

_BUSY_POLL_SECONDS = 0.05

_open_queues: weakref.WeakSet[TurnQueue] = weakref.WeakSet()


@atexit.register
def _close_open_queues() -> None:
    """Before the stores are closed: what runs stops at the next token and is kept, and nobody waits for ever."""
    for opened in list(_open_queues):
        opened.close(cancel=True)


@dataclass(frozen=True)
class QueueStats:
    """What a queue has done since it was made. Times in seconds, summed over all turns."""

    waiting: int
    running: int
    submitted: int
    """All that were taken: those waiting, running, done, failed, cancelled and timed out."""
    done: int
    failed: int
    cancelled: int
    timed_out: int
    refused: int
    """Not taken, because the queue was full."""
    waiting_seconds: float
    """How long the turns that have begun had waited."""
    running_seconds: float
    """How long the turns that have ended ran."""
    prompt_tokens: int
    reused_tokens: int
    """Of these tokens, how many were not computed."""
    generated_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens by second of running, prefilling included; 0 before anything ran."""
        return self.generated_tokens / self.running_seconds if self.running_seconds else 0.0


class TurnQueue:
    """Runs turns from many threads one at a time on one model, and tells the store which sessions come next.

    While a turn computes, the store fetches the KV of the next ones from disk to memory, and does not drop what is
    about to be used. First come, first served, unless priorities say otherwise; turns of one session keep their order.

    Args:
        model: the model. Nobody else needs to be kept from using it, but what else uses it slows the turns down.
        store: where the sessions are, those of turns that do not name another store, such as one of another namespace.
        max_waiting: how many turns may wait beside the one that runs; None for any number.
        patience: what a step of priority is worth, in seconds: a turn of priority 1 goes before those of priority 0
            that came up to so many seconds earlier, one of priority 2 before those of twice as many, but never before
            one that has waited for longer. So nobody starves. `math.inf`: priority is everything, and whoever gives
            priorities sees to it that others have their turn; 0: priorities mean nothing.
        session_wait: seconds that a turn waits, while others run, for a session that somebody else holds: another
            process, or a cache of one's own. After that, and with 0 at once, it fails with `SessionBusyError`.
        cache_options: of every `AttentionStoreCache` that `submit` makes: `window`, `keep_first`, `drop`,
            `checkpoint_every`, `save`.

    Raises:
        UnsupportedModelError, CacheUseError, ContextWindowError: as `AttentionStoreCache` does.
        TurnQueueError: a number that makes no sense.

    Use it as a context manager, or `close()` it. Turns run as in the thread that makes the queue, as far as autocast
    and CUDA streams go.
    """

    def __init__(
        self,
        model: nn.Module,
        store: AttentionStore,
        *,
        max_waiting: int | None = 100,
        patience: float = 30.0,
        session_wait: float = 0.0,
        **cache_options: Any,
    ) -> None:
        if max_waiting is not None and max_waiting < 0:
            raise TurnQueueError(f"max_waiting is a number of turns, not {max_waiting}")
        if not patience >= 0 or not session_wait >= 0:
            raise TurnQueueError(f"patience and session_wait are seconds, not {patience} and {session_wait}")
        self.model = model
        self.store = store
        self._cache = partial(AttentionStoreCache, model, store=store, wait=session_wait, **cache_options)
        self._cache(session=None)  # what is wrong with the model or the options is said here
        self._max_waiting = max_waiting
        self._session_wait = session_wait
        self._surroundings = Surroundings(owner_of(model))
        self._changed = threading.Condition()
        self._waiting: WaitingTurns[Turn[Any]] = WaitingTurns(patience)
        self._running: Turn[Any] | None = None
        self._busy_since: dict[Turn[Any], float] = {}
        self._last_chat: ChatSession | None = None
        self._closing = False
        self._counts: Counter[str] = Counter()
        self._waited = self._ran = 0.0
        self._told: dict[AttentionStore, list[str]] = {}
        """The sessions that each store was last told of."""
        self._to_be_told: set[AttentionStore] = set()
        """Stores that took a session off their list by themselves, because a turn on it was saved."""
        self._running_was_told = False
        # takes notes from destructors too, which no lock may stop
        self._news: queue.SimpleQueue[Turn[Any] | bool] = queue.SimpleQueue()
        self._warned = False
        self._ended = threading.Event()
        self._worker = threading.Thread(target=self._work, name="attnstore-turns", daemon=True)
        self._herald = threading.Thread(target=self._tell, name="attnstore-turns-news", daemon=True)
        leave_computing_to_others()  # who makes a queue has loaded the model, most often, and so computed something
        self._worker.start()
        self._herald.start()
        _open_queues.add(self)

    # giving it turns

    def submit(
        self,
        session: str | None,
        input_ids: Any = None,
        *,
        priority: float = 0,
        timeout: float | None = None,
        wait: float = 0.0,
        store: AttentionStore | None = None,
        **generate_kwargs: Any,
    ) -> Turn[Any]:
        """Queues `model.generate` for a conversation; the turn's `result()` is what that returns.

        Args:
            session: the conversation's name in the store; None keeps blocks only, found again by content.
            input_ids: `[1, tokens]`, the whole conversation so far, as for `generate`. Do not change it, or anything
                else that is passed, before the turn is over.
            priority: the higher, the sooner; see `patience`.
            timeout: seconds from now in which the turn is to be done. One that still waits then does not run, one that
                runs stops at the next token, and what is complete is kept; the result is a `TurnTimeoutError`.
            wait: seconds to wait for room where the queue is full.
            store: where the session is, if not in the queue's store: in another namespace, for instance.
            generate_kwargs: passed on, such as `attention_mask`, `max_new_tokens` or a `streamer`, which is called in
                the thread of the turns.

        Raises:
            QueueFullError: `max_waiting` turns are waiting.
            SessionNameError: the name can't be used.
            TurnQueueError: the queue is closed.

        The turn's `stream()` has the new tokens one by one; none under beam search or for several sequences.
        """
        if cache_in(generate_kwargs) is not None:
            raise TurnQueueError("the queue makes the cache of a turn itself: leave it out")
        if input_ids is not None:
            generate_kwargs["input_ids"] = input_ids

        def work(turn: Turn[Any]) -> Any:
            cache = self._cache(session=session, store=turn.store)
            return turn_work.generate(turn, cache, self.model, generate_kwargs)

        return self.run(session, work, priority=priority, timeout=timeout, wait=wait, store=store)

    def send(
        self,
        chat: ChatSession,
        text: str,
        stream: Callable[[str], None] | None = None,
        *,
        priority: float = 0,
        timeout: float | None = None,
        wait: float = 0.0,
        **generate_kwargs: Any,
    ) -> Turn[str]:
        """Queues `chat.send(text)`; the turn's `result()` is the answer, its `stream()` the answer's text as it comes.

        A turn that is cancelled, or whose time is over, leaves what was said until then in `chat.history`. What `chat`
        computes in the background after a turn (`canonicalize`) gives way to the next turn of the queue.

        Args:
            stream: called with each piece of text too, in the thread of the turns.

        Raises:
            TurnQueueError: the chat has another model, or the queue is closed.
            QueueFullError: see `submit`, also for the other arguments.
        """
        return self._answer(chat, partial(chat.send, text), stream, priority, timeout, wait, generate_kwargs)

    def retry(
        self,
        chat: ChatSession,
        stream: Callable[[str], None] | None = None,
        *,
        priority: float = 0,
        timeout: float | None = None,
        wait: float = 0.0,
        **generate_kwargs: Any,
    ) -> Turn[str]:
        """Queues `chat.retry()`, as `send` does `chat.send`."""
        return self._answer(chat, chat.retry, stream, priority, timeout, wait, generate_kwargs)

    def _answer(
        self,
        chat: ChatSession,
        call: Callable[..., str],
        stream: Callable[[str], None] | None,
        priority: float,
        timeout: float | None,
        wait: float,
        generate_kwargs: dict[str, Any],
    ) -> Turn[str]:
        if owner_of(chat.model) is not owner_of(self.model):
            raise TurnQueueError(f"the chat {chat.session!r} has another model than this queue")

        def work(turn: Turn[str]) -> str:
            if chat.canonicalize:
                self._last_chat = chat
            return turn_work.answer(turn, chat, call, stream, generate_kwargs)

        return self.run(chat.session, work, priority=priority, timeout=timeout, wait=wait, store=chat.store)

    def run(
        self,
        session: str | None,
        work: Callable[[Turn[T]], T],
        *,
        priority: float = 0,
        timeout: float | None = None,
        wait: float = 0.0,
        store: AttentionStore | None = None,
    ) -> Turn[T]:
        """Queues a piece of work of one's own on a session: what `submit` and `send` are made of.

        Args:
            work: called in the thread of the turns, with its turn. It makes its own `AttentionStoreCache`, if it needs
                one; asks `turn.stop_requested`, or gives `turn.stopping_criteria()` to `generate`; may hand pieces of
                an answer to `turn.put`, and set `turn.stats`. What it returns is the result.

        See `submit` for the other arguments and what is raised.
        """
        if session is not None:
            self.store.check_name(session)
        if not math.isfinite(priority):
            raise TurnQueueError(f"a priority is a finite number, not {priority}")
        turn = Turn(self, store or self.store, session, work, priority, timeout)
        with self._changed:
            self._wait_for_room(turn, wait)
            self._waiting.add(turn, turn.key, priority, turn._submitted)
            self._counts["submitted"] += 1
            self._changed.notify_all()
        self._news.put(True)
        return turn

    def _wait_for_room(self, turn: Turn[Any], wait: float) -> None:
        while True:
            if self._closing:
                raise TurnQueueError("the queue is closed: it takes no more turns")
            if self._max_waiting is None or len(self._waiting) + (self._running is not None) <= self._max_waiting:
                return
            left = wait - turn.waiting_seconds
            if left <= 0 or self.runs_here():  # in the thread of the turns nothing would make room meanwhile
                self._counts["refused"] += 1
                raise QueueFullError(
                    f"{len(self._waiting)} turns are waiting already (max_waiting={self._max_waiting}): try again "
                    "later, or give a time to wait for room (`wait=` seconds)"
                )
            self._changed.wait(min(left, threading.TIMEOUT_MAX))

    # looking at it

    @property
    def waiting(self) -> list[Turn[Any]]:
        """The turns that wait, in the order in which they will run as things are."""
        with self._changed:
            return self._waiting.order()

    @property
    def running(self) -> Turn[Any] | None:
        """The turn that runs."""
        return self._running

    def stats(self) -> QueueStats:
        """Lengths, times and tokens since the queue was made."""
        with self._changed:
            counts = ("submitted", "done", "failed", "cancelled", "timed_out", "refused")
            tokens = ("prompt_tokens", "reused_tokens", "generated_tokens")
            return QueueStats(
                waiting=len(self._waiting),
                running=int(self._running is not None),
                waiting_seconds=self._waited,
                running_seconds=self._ran,
                **{name: self._counts[name] for name in (*counts, *tokens)},
            )

    # its life

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(cancel=kind is not None)

    def close(self, *, cancel: bool = False) -> None:
        """Takes no more turns, and returns when all that it has are over. Idempotent.

        Args:
            cancel: cancel all of them: those that wait do not run, the one that runs stops at the next token.

        A KeyboardInterrupt meanwhile cancels them. Called by a turn or a callback of one it returns at once.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if cancel:
            self._cancel_all()
        if threading.current_thread() in (self._worker, self._herald):
            return
        # not `join`: in Python 3.11, one that was interrupted takes the thread to be over
        try:
            self._ended.wait()
        except BaseException:
            self._cancel_all()
            self._ended.wait()
            raise

    def _cancel_all(self) -> None:
        with self._changed:
            turns = self._waiting.order()
            running = self._running
        for turn in [*turns, *([running] if running is not None else [])]:
            turn.cancel()

    # what turns ask of their queue

    def withdraw(self, turn: Turn[Any]) -> bool:
        """See `Turn.cancel`."""
        with self._changed:
            if turn._over:
                return turn._cancel_requested
            turn._cancel_requested = True
            if not self._waiting.remove(turn):
                return True  # it runs, and will see that it is to stop
            self._leave(turn, "cancelled")
        self._news.put(True)
        try:
            Future.cancel(turn)
        finally:
            turn.set_running_or_notify_cancel()  # tells those in `concurrent.futures.wait`
        return True

    def abandoned(self, turn: Turn[Any]) -> None:
        """Nobody listens to a turn any more: it is cancelled, soon and in another thread."""
        self._news.put(turn)

    def progressed(self) -> None:
        """The running turn has its KV: the store may use its room for those that come."""
        self._news.put(True)

    def place(self, turn: Turn[Any]) -> int | None:
        """See `Turn.position`."""
        with self._changed:
            return self._waiting.order().index(turn) if turn in self._waiting else None

    def runs_here(self) -> bool:
        """Whether this is the thread that turns run in."""
        return threading.current_thread() is self._worker

    # the thread of the turns

    def _work(self) -> None:
        try:
            while (turn := self._next()) is not None:
                self._perform(turn)
                del turn  # not kept while waiting for the next
        finally:
            with self._changed:
                self._closing = True
            self._cancel_all()  # there are some only if this thread dies of something unheard of
            self._news.put(False)

    def _next(self) -> Turn[Any] | None:
        """Waits for the next turn and begins it; None when there will be none."""
        while True:
            with self._changed:
                while (turn := self._waiting.first(time.monotonic())) is None:
                    if self._closing and not len(self._waiting):
                        return None
                    self._changed.wait(self._waiting.seconds_to_next(time.monotonic()))
            error = self._held_up(turn)
            with self._changed:
                if error is None and self._waiting.is_deferred(turn.key, time.monotonic()):
                    continue
                if not self._waiting.remove(turn):  # cancelled meanwhile
                    continue
                self._busy_since.pop(turn, None)
                self._begin(turn)
            if error is None:
                return turn
            self._end(turn, None, error)

    def _begin(self, turn: Turn[Any]) -> None:
        turn.set_running_or_notify_cancel()
        turn._began = time.monotonic()
        self._waited += turn.waiting_seconds
        self._running = turn
        self._running_was_told = self._has_told(turn)
        self._news.put(True)

    def _held_up(self, turn: Turn[Any]) -> Exception | None:
        """Sees whether a turn's session is free. If it is not, the turn is put off, or its error is returned."""
        if turn.session is None:
            return None
        try:
            give_way(turn.store, turn.session)
            turn.store.lock_session(turn.session, wait=0, patient=False).release()
        except SessionBusyError as error:
            now = time.monotonic()
            with self._changed:
                if turn not in self._waiting:
                    return None
                if now - self._busy_since.setdefault(turn, now) >= self._session_wait:
                    return error
                self._waiting.defer(turn.key, now + _BUSY_POLL_SECONDS)
        except Exception as error:
            return error
        return None

    def _perform(self, turn: Turn[Any]) -> None:
        result, error = None, None
        work, turn._work = turn._work, None
        assert work is not None
        try:
            if self._last_chat is not None:  # what it computes in the background gives way to who waits
                self._last_chat.close()
                self._last_chat = None
            if not turn.stop_requested:
                with self._surroundings.taken_over():
                    result = work(turn)
        except BaseException as raised:
            error = raised
            traceback.clear_frames(raised.__traceback__)  # or they hold the KV of the turn for as long as the error is
        try:
            self._end(turn, result, error)
        finally:
            del work, turn, result, error  # the error's traceback has this frame, and so would keep them

    def _end(self, turn: Turn[Any], result: Any, error: BaseException | None) -> None:
        """Settles how a turn that has begun ended, and says so."""
        with self._changed:
            if isinstance(error, CancelledError):
                turn._cancel_requested = True
            if turn._cancel_requested:
                outcome = "cancelled"
            elif turn._timed_out:
                outcome = "timed_out"
            else:
                outcome = "done" if error is None else "failed"
            self._leave(turn, outcome)
            self._running = None
            self._to_be_told.add(turn.store)
            self._ran += turn.running_seconds
            self._counts["generated_tokens"] += turn.generated_tokens
            if turn.stats is not None:
                self._counts["prompt_tokens"] += turn.stats.prompt_tokens
                self._counts["reused_tokens"] += turn.stats.reused_tokens
            self._changed.notify_all()
        self._news.put(True)
        if outcome == "cancelled":
            self._fail(turn, CancelledError("the turn was cancelled"), error)
        elif outcome == "timed_out":
            self._fail(turn, self._too_late(turn), error)
        elif error is not None:
            self._fail(turn, error)
        else:
            _guarded(partial(turn.set_result, result))

    def _leave(self, turn: Turn[Any], outcome: str) -> None:
        """Notes, under the lock, that how a turn ends is settled, and gives up what it held."""
        turn._over = True
        turn._ended = time.monotonic()
        turn._work = None
        self._busy_since.pop(turn, None)
        self._counts[outcome] += 1
        self._changed.notify_all()

    @staticmethod
    def _fail(turn: Turn[Any], error: BaseException, cause: BaseException | None = None) -> None:
        if cause is not None and not isinstance(cause, CancelledError):
            error.__cause__ = cause
        _guarded(partial(turn.set_exception, error))

    @staticmethod
    def _too_late(turn: Turn[Any]) -> TurnTimeoutError:
        return TurnTimeoutError(
            f"the turn was not done within {turn._timeout:.3g} seconds: it waited for {turn.waiting_seconds:.3g} and "
            f"ran for {turn.running_seconds:.3g}"
        )

    # the thread that tells the store what comes, and sees to those whose time is over

    def _tell(self) -> None:
        try:
            self._tell_until_the_end()
        finally:
            self._ended.set()

    def _tell_until_the_end(self) -> None:
        goes_on = True
        while goes_on:
            for note in self._notes():
                if note is False:
                    goes_on = False
                elif isinstance(note, Turn):
                    _guarded(note.cancel)
            self._end_late_ones()
            with self._changed:
                upcoming = self._upcoming() if goes_on else {}
                told, self._told = self._told, upcoming
                anew, self._to_be_told = self._to_be_told, set()
            for store in {**told, **upcoming}:
                if store in anew or upcoming.get(store) != told.get(store):
                    self._schedule(store, upcoming.get(store, []))
            del told, upcoming, anew  # while waiting for news, no store is kept that nobody needs

    def _notes(self) -> list[Turn[Any] | bool]:
        """Waits for news, or for the end of somebody's time; all of it that has come."""
        notes: list[Turn[Any] | bool] = []
        try:
            notes.append(self._news.get(timeout=self._seconds_to_deadline()))
            while True:
                notes.append(self._news.get_nowait())
        except queue.Empty:
            return notes

    def _has_told(self, turn: Turn[Any]) -> bool:
        return turn.session in self._told.get(turn.store, [])

    def _upcoming(self) -> dict[AttentionStore, list[str]]:
        """The sessions of the turns that will run, in order, by store.

        The one that runs is among them until it has what it came for, if its store had heard of it; if not, it loads by
        itself, and so does one that is about to begin.
        """
        turns = self._waiting.order()
        if self._running is not None:
            if self._running_was_told and self._running._first_piece is None:
                turns = [self._running, *turns]
        else:
            begins = self._waiting.first(time.monotonic())
            turns = [turn for turn in turns if turn is not begins or self._has_told(turn)]
        upcoming: dict[AttentionStore, list[str]] = {}
        for turn in turns:
            if turn.session is not None:
                upcoming.setdefault(turn.store, []).append(turn.session)
        return upcoming

    def _schedule(self, store: AttentionStore, upcoming: list[str]) -> None:
        try:
            if not store.closed:
                store.schedule(upcoming)
        except Exception as error:
            if not self._warned:
                self._warned = True
                logger.warning("the store could not be told which sessions come next: %s", error, exc_info=True)

    def _seconds_to_deadline(self) -> float | None:
        with self._changed:
            ends = [turn._submitted + turn._timeout for turn in self._waiting.order() if turn._timeout is not None]
        return min(max(min(ends) - time.monotonic(), 0.0), threading.TIMEOUT_MAX) if ends else None

    def _end_late_ones(self) -> None:
        with self._changed:
            late = [turn for turn in self._waiting.order() if turn.stop_requested and self._waiting.remove(turn)]
            for turn in late:
                self._leave(turn, "timed_out")
        for turn in late:
            self._fail(turn, self._too_late(turn))


def _guarded(call: Callable[[], Any]) -> None:
    """Calls what runs callbacks of others: whatever they raise, the thread goes on."""
    try:
        call()
    except BaseException:
        logger.exception("a callback of a turn failed")
