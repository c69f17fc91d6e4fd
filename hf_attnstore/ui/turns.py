"""Turns of many users, one after the other on one model, whether or not the page that asked is still there."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn

from ..chat.model import first_line
from ..chat.session import ChatSession
from ..errors import AttentionStoreError, SessionNotFoundError
from ..serving.queue import TurnQueue
from ..serving.turn import Turn
from ..store import AttentionStore
from .expecting import Expectations
from .model import ModelLoader
from .records import TIMELINE, TURNS, TurnRecord, from_json, record_of, replaced, to_json
from .sessions import Exchange, UserSessions

logger = logging.getLogger("hf_attnstore")

MOST_TURNS_OF_ONE_USER = 4
MOST_EVENTS = 400
"""How many events of a turn's timeline are kept."""


class UserTurnError(AttentionStoreError):
    """The turn can't begin: the conversation is answering already, or has no such message."""


class _Stopped(Exception):
    """Raised within the model to end a prefill."""


@dataclass(frozen=True)
class Wish:
    """What a user wants of a conversation.

    Attributes:
        kind: "send" a new message, "retry" the last one, or "edit" that of an earlier `turn` (counted from 0).
        text: the message; None for a retry.
        reuse: False to answer without the store.
    """

    kind: Literal["send", "retry", "edit"]
    text: str = ""
    turn: int = 0
    reuse: bool = True


@dataclass
class Running:
    """A turn that waits or runs, as the page shows it."""

    name: str
    wish: Wish
    earlier: tuple[Exchange, ...]
    """What stands above it."""
    message: str
    turn: Turn[str] = field(init=False)

    @property
    def answer(self) -> str:
        """As far as it has come."""
        return "".join(self.turn.pieces)

    @property
    def done(self) -> bool:
        return self.turn.done()

    def stop(self) -> None:
        """Has it end at the next layer, or the next token; what is complete is kept."""
        self.turn.cancel()

    def failure(self) -> str:
        """Why there is no (whole) answer, in words for the user; empty if nothing is wrong. Of one that is done."""
        try:
            error = self.turn.exception()
        except CancelledError:
            return "" if self.answer else "stopped before anything was answered"
        return in_words(error) if error is not None else ""


class Turns:
    """Runs turns, and knows which ones run.

    Args:
        store: the store, in any namespace.
        model: what loads the model; turns wait for it.
        queue: where turns of others than this page's run on that model, too; it is closed by who made it. None makes
            one when the model is there.
        options: for every `ChatSession`.
    """

    def __init__(
        self, store: AttentionStore, model: ModelLoader, *, queue: TurnQueue | None = None, **options: Any
    ) -> None:
        self.store = store
        self.model = model
        self.options = options
        self.expectations = Expectations()
        self._lock = threading.Lock()
        self._queue, self._owned = queue, queue is None
        self._busy: set[tuple[str, str]] = set()
        """Namespace and name of conversations on which something is done."""
        self._running: dict[tuple[str, str], Running] = {}
        self._closing = False

    # what runs

    def running(self, sessions: UserSessions, name: str) -> Running | None:
        """The turn that waits or runs on a conversation of a user."""
        return self._running.get((sessions.store.namespace, name))

    def begin(self, sessions: UserSessions, name: str, wish: Wish) -> Running:
        """Queues a turn. It goes on whoever listens; `running` has it until it is over. Waits for the model.

        Raises:
            UserTurnError: it can't begin.
            AttentionStoreError: from loading the model.
        """
        queue = self._opened()
        place = self._reserve(sessions, name)
        try:
            try:
                exchanges = sessions.open(name).exchanges
            except SessionNotFoundError:
                exchanges = ()
            running = Running(name, wish, *_split(exchanges, wish))
            self.expectations.expect(sessions.store, name)
            running.turn = queue.run(name, partial(self._work, sessions, running), store=sessions.store)
        except BaseException:
            self._free(place)
            raise
        self._running[place] = running
        running.turn.add_done_callback(lambda _: self._free(place))  # at once, if it is over already
        return running

    def undo(self, sessions: UserSessions, name: str) -> str:
        """Takes the last turn back and returns its message.

        Raises:
            UserTurnError: there is none, or it is being answered.
        """
        with self.untouched(sessions, name):
            chat = self._chat(sessions.store, name, tokenizer=self.model.tokenizer())
            try:
                message = chat.undo()
            except ValueError as error:
                raise UserTurnError(str(error)) from error
            records = from_json(chat.annotation(TURNS), sum(m["role"] == "assistant" for m in chat.history))
            chat.annotate(TURNS, to_json(records))
            return message

    @contextmanager
    def untouched(self, sessions: UserSessions, name: str) -> Iterator[None]:
        """No turn begins on a conversation within this.

        Raises:
            UserTurnError: one waits or runs.
        """
        place = self._reserve(sessions, name)
        try:
            yield
        finally:
            self._free(place)

    def close(self) -> None:
        """Stops all turns, keeps what is complete, and ends the loading of the model."""
        self._closing = True
        with self._lock:
            queue, running = self._queue, list(self._running.values())
        for turn in running:
            turn.stop()
        if queue is not None and self._owned:
            queue.close(cancel=True)
        self.model.close()

    def _opened(self) -> TurnQueue:
        model, _ = self.model.result()
        with self._lock:
            if self._closing:
                raise UserTurnError("the process is ending; try again in a moment")
            if self._queue is None:
                self._queue = TurnQueue(model, self.store, max_waiting=200, session_wait=5.0)
            return self._queue

    def _reserve(self, sessions: UserSessions, name: str) -> tuple[str, str]:
        place = sessions.store.namespace, name
        with self._lock:
            if place in self._busy:
                raise UserTurnError(f"{name!r} is being answered: wait for it, or stop it")
            if sum(namespace == place[0] for namespace, _ in self._busy) >= MOST_TURNS_OF_ONE_USER:
                raise UserTurnError("several of your conversations are being answered: wait for one, or stop one")
            self._busy.add(place)
        return place

    def _free(self, place: tuple[str, str]) -> None:
        with self._lock:
            self._busy.discard(place)
            self._running.pop(place, None)

    # in the thread of the turns

    def _chat(self, store: AttentionStore, name: str, **changes: Any) -> ChatSession:
        model, tokenizer = self.model.result()
        options = {"tokenizer": tokenizer, "store": store, "session": name, **self.options, **changes}
        return ChatSession(model, **options)

    def _work(self, sessions: UserSessions, running: Running, turn: Turn[str]) -> str:
        wish = running.wish
        store, number = sessions.store, len(running.earlier)
        fetched = self.expectations.take(store, running.name)
        chat = self._chat(store, running.name, reuse=wish.reuse, record=True)
        waited = turn.waiting_seconds
        kwargs: dict[str, Any] = {"stream": turn.put, "stopping_criteria": turn.stopping_criteria()}
        call: Callable[..., str]
        if wish.kind == "retry":
            # the likeliest answer again would be the same one; but who compares the two ways wants just that
            (before,) = from_json(chat.annotation(TURNS), number + 1)[number:]
            compares = before is not None and before.with_store != wish.reuse
            call = chat.retry if compares else partial(chat.retry, do_sample=True)
        elif wish.kind == "edit":
            call = partial(chat.edit, wish.turn, running.message)
        else:
            call = partial(chat.send, running.message)
        try:
            with _interruptible(chat.model, turn):
                return call(**kwargs)
        except _Stopped:
            return ""
        finally:
            if chat.stats is not None:
                turn.chat_turn, turn.stats = chat.stats, chat.stats.cache
                self._keep(chat, number, record_of(chat.stats, with_store=wish.reuse, waited=waited, fetched=fetched))
                self.expectations.learn(chat.stats.cache)
            self.expectations.forget(store, running.name)
            chat.close()

    @staticmethod
    def _keep(chat: ChatSession, number: int, record: TurnRecord) -> None:
        records = replaced(from_json(chat.annotation(TURNS), number + 1), number, record)
        chat.annotate(TURNS, to_json(records))
        chat.annotate(TIMELINE, _beginning(chat.timeline, record.ttft))


def _beginning(events: Sequence[Any], ttft: float | None) -> list[list[Any]]:
    """What happened until about the first token, as (track, name, begin, end): after that there is only decoding."""
    if not events:
        return []
    begin = min(event.begin for event in events)
    until = begin + 1.1 * ttft if ttft is not None else float("inf")
    shown = sorted((e for e in events if e.begin <= until), key=lambda event: float(event.begin))
    # what is written and fetched in the background may be of others: their blocks have no names here
    return [
        [
            e.track,
            "" if e.track in ("write", "fetch") else e.name,
            round(e.begin - begin, 6),
            round(min(e.end, until) - begin, 6),
        ]
        for e in shown[:MOST_EVENTS]
    ]


def _split(exchanges: tuple[Exchange, ...], wish: Wish) -> tuple[tuple[Exchange, ...], str]:
    """What stays above the turn, and its message."""
    if wish.kind == "send":
        number = len(exchanges)
    else:
        number = len(exchanges) - 1 if wish.kind == "retry" else wish.turn
        if not 0 <= number < len(exchanges):
            raise UserTurnError("there is no such message in this conversation any more; open it again")
    message = exchanges[number].message if wish.kind == "retry" else wish.text.strip()
    if not message:
        raise UserTurnError("an empty message has no answer")
    return exchanges[:number], message


@contextmanager
def _interruptible(model: nn.Module, turn: Turn[Any]) -> Iterator[None]:
    """Has a forward end between two modules when the turn is to stop: a long prefill has no tokens to stop at."""

    def check(*_: Any) -> None:
        if turn.stop_requested and not turn.pieces:
            raise _Stopped

    lists = [found for found in model.modules() if isinstance(found, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    hooks = [layer.register_forward_pre_hook(check) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def in_words(error: BaseException) -> str:
    """What went wrong, for a user: errors of this package as they are, the first line of others; the log has all."""
    if isinstance(error, AttentionStoreError):
        return str(error)
    logger.error("a turn failed", exc_info=error)
    return f"the model failed: {first_line(error)}"
