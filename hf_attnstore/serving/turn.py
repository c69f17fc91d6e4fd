"""Turn: one turn that was given to a `TurnQueue`, from waiting to its result."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..errors import TurnQueueError

if TYPE_CHECKING:
    from ..cache import TurnStats
    from ..chat.session import ChatTurn
    from ..store import AttentionStore

T = TypeVar("T")

State = Literal["waiting", "running", "done", "failed", "cancelled"]


class Owner(Protocol):
    """What a turn asks of its queue."""

    def withdraw(self, turn: Turn[Any]) -> bool:
        """Takes a waiting turn out, or has a running one stop. False if it is over already."""

    def abandoned(self, turn: Turn[Any]) -> None:
        """Nobody listens any more. May come from a destructor, whatever its thread is holding."""

    def progressed(self) -> None:
        """The running turn has begun to answer."""

    def place(self, turn: Turn[Any]) -> int | None:
        """How many turns run before it."""

    def runs_here(self) -> bool:
        """Whether the calling thread is the one that turns run in."""


class Turn(Future[T], Generic[T]):
    """A turn in a queue: a `concurrent.futures.Future` that knows its place, can be listened to, and stops when asked.

    All that takes futures takes it: `concurrent.futures.wait`, `as_completed`, `asyncio.wrap_future`. Callbacks run in
    the thread of the turns (those of a turn that was cancelled while it waited: in the thread that cancelled it); they
    may submit, but not wait for other turns.
    """

    def __init__(
        self,
        queue: Owner,
        store: AttentionStore,
        session: str | None,
        work: Callable[[Turn[T]], T],
        priority: float,
        timeout: float | None,
    ) -> None:
        super().__init__()
        self.store = store
        """The store that the session is in."""
        self.session = session
        """The session's name; None for a turn that is of none."""
        self.priority = priority
        self.stats: TurnStats | None = None
        """What the turn was, in numbers, from its end on. A work of one's own may set it."""
        self.chat_turn: ChatTurn | None = None
        """For a turn of a `ChatSession`: what its `stats` were after it."""
        self.generated_tokens = 0
        """New tokens, as far as it is known."""
        self._queue = queue
        self._work: Callable[[Turn[T]], T] | None = work
        self._pieces: list[Any] = []
        self._news = threading.Condition()
        self._submitted = time.monotonic()
        self._began: float | None = None
        self._ended: float | None = None
        self._first_piece: float | None = None
        self._timeout = timeout
        self._cancel_requested = False
        self._timed_out = False
        self._over = False
        """Whether how it ends is settled; the queue's lock is held by who reads or sets it."""
        self.add_done_callback(_wake_listeners)

    # what people ask

    @property
    def state(self) -> State:
        """ "waiting", "running", "done", "failed" or "cancelled"."""
        if not self.done():
            return "waiting" if self._began is None else "running"
        if self.cancelled():
            return "cancelled"
        return "failed" if super().exception() is not None else "done"

    @property
    def key(self) -> tuple[AttentionStore, str] | None:
        """What tells sessions apart: names of different namespaces may be equal."""
        return (self.store, self.session) if self.session is not None else None

    @property
    def position(self) -> int | None:
        """How many waiting turns run before this one, as things are; None unless it waits."""
        return self._queue.place(self)

    @property
    def waiting_seconds(self) -> float:
        """How long it waited, or has until now."""
        return (self._began or self._ended or time.monotonic()) - self._submitted

    @property
    def running_seconds(self) -> float:
        """How long it ran, or has until now; 0 before it runs."""
        return (self._ended or time.monotonic()) - self._began if self._began is not None else 0.0

    @property
    def ttft_seconds(self) -> float | None:
        """From the beginning of its running to the first piece of the answer; None if none came. Who waits for the
        answer waits for `waiting_seconds` on top."""
        if self._first_piece is None or self._began is None:
            return None
        return self._first_piece - self._began

    @property
    def pieces(self) -> list[Any]:
        """What came so far: token ids, or pieces of text for a turn of a `ChatSession`. A copy."""
        with self._news:
            return list(self._pieces)

    def stream(self, *, cancel: bool = True) -> TurnStream:
        """What comes, from the beginning and as it comes: token ids, or pieces of text for a turn of a `ChatSession`.

        Ends when the turn does, and raises what the turn raised; of one that was cancelled it just ends.

        Args:
            cancel: whether an iterator that is closed or dropped before its end cancels the turn.
        """
        return TurnStream(self, cancel)

    def cancel(self) -> bool:
        """Takes the turn out of the queue; one that runs stops at the next token, and what is complete is kept: its KV
        in the store, and the answer so far in the history of a `ChatSession`, and in `pieces`.

        Returns whether it is, or will be, cancelled; False if it had ended already. Waiting for the result of a
        cancelled turn raises `CancelledError`.
        """
        return self._queue.withdraw(self)

    def cancelled(self) -> bool:
        return super().cancelled() or (self._cancel_requested and self._over and super().done())

    def result(self, timeout: float | None = None) -> T:
        """What the turn gave: what `generate` returned, a `ChatSession`'s answer, or what the work returned.

        Raises:
            concurrent.futures.CancelledError: it was cancelled.
            TimeoutError: it is not there within `timeout` seconds. The turn goes on.
            TurnTimeoutError: the turn was not done within the time that it was given when it was submitted.
            TurnQueueError: asked for in the thread of the turns, which would wait for itself.
        """
        self._refuse_to_wait_for_itself()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the turn raised; None if nothing. Raises what `result` raises of cancelling and waiting."""
        self._refuse_to_wait_for_itself()
        error = super().exception(timeout)
        if isinstance(error, CancelledError):
            raise error
        return error

    def __repr__(self) -> str:
        return f"<Turn session={self.session!r} {self.state}>"

    # what a work asks

    @property
    def stop_requested(self) -> bool:
        """Whether the turn is to stop: it was cancelled, or its time is over. Cheap; a long work asks it often."""
        if self._timeout is not None and time.monotonic() - self._submitted > self._timeout:
            self._timed_out = True
        return self._cancel_requested or self._timed_out

    def stopping_criteria(self, others: Any = None) -> StoppingCriteriaList:
        """For `generate(stopping_criteria=…)`: `others`, and that the turn is to stop."""
        return StoppingCriteriaList([*(others or ()), _StopRequested(self)])

    def put(self, piece: Any) -> None:
        """Hands a piece of the answer to those who listen."""
        with self._news:
            self._pieces.append(piece)
            first = self._first_piece is None
            if first:
                self._first_piece = time.monotonic()
            self._news.notify_all()
        if first:
            self._queue.progressed()

    # what its queue and its listeners do

    def _piece(self, number: int) -> list[Any]:
        """Waits for a piece, and returns it alone; nothing where there will be no such piece."""
        with self._news:
            while number >= len(self._pieces) and not self.done():
                self._refuse_to_wait_for_itself()
                self._news.wait()
            return self._pieces[number : number + 1]

    def _refuse_to_wait_for_itself(self) -> None:
        if not self.done() and self._queue.runs_here():
            raise TurnQueueError(
                "this would wait, in the thread that turns run in, for a turn that can't run meanwhile; in a callback, "
                "submit the next turn and leave"
            )

    def _raise_if_failed(self) -> None:
        if not self.cancelled():
            error = super().exception()
            if error is not None:
                raise error


def _wake_listeners(turn: Future[Any]) -> None:
    assert isinstance(turn, Turn)
    with turn._news:
        turn._news.notify_all()


class TurnStream(Iterator[Any]):
    """What a turn says, as it comes; see `Turn.stream`. One thread at a time uses it."""

    def __init__(self, turn: Turn[Any], cancel: bool) -> None:
        self._turn = turn
        self._count = 0
        self._cancels = cancel

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        for piece in self._turn._piece(self._count):
            self._count += 1
            return piece
        self._cancels = False
        self._turn._raise_if_failed()
        raise StopIteration

    def close(self) -> None:
        """Listens no more; cancels the turn if it has not ended, unless it was asked not to."""
        if self._cancels:
            self._cancels = False
            self._turn.cancel()

    def __del__(self) -> None:
        # a destructor may run while its thread holds any lock, so it only leaves a note
        if getattr(self, "_cancels", False):
            self._turn._queue.abandoned(self._turn)


class _StopRequested(StoppingCriteria):
    """True for every row when a turn is to stop."""

    def __init__(self, turn: Turn[Any]) -> None:
        self._turn = turn

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        stop: Any = torch.full((input_ids.shape[0],), self._turn.stop_requested, device=input_ids.device)
        return stop
