"""Turns of many users, one after the other on one model, whether or not the page that asked is still there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
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
from .settings import SETTINGS, Settings

logger = logging.getLogger("hf_attnstore")

MOST_TURNS_OF_ONE_USER = 4
MOST_MESSAGES = 20
"""How many messages of one conversation may wait or be answered."""
MOST_EVENTS = 400
"""How many events of a turn's timeline are kept."""


Place = tuple[str, str]
"""Namespace and name of a conversation."""


class UserTurnError(AttentionStoreError):
    """The turn can't begin: the conversation is answering already, or has no such message."""


class _Stopped(Exception):
    """Raised within the model to end a prefill."""


@dataclass(frozen=True)
class Wish:
    """What a user wants of a conversation.

    Attributes:
        kind: "send" a new message, "retry" the last one, "edit" that of an earlier `turn` (counted from 0), or "go_on"
            with the last answer.
        text: the message, of "send" and "edit".
        reuse: False to answer without the store.
        settings: from this turn on; None leaves those of the conversation.
    """

    kind: Literal["send", "retry", "edit", "go_on"]
    text: str = ""
    turn: int = 0
    reuse: bool = True
    settings: Settings | None = None


@dataclass(eq=False)
class Running:
    """A turn that waits or runs, as the page shows it."""

    name: str
    wish: Wish
    message: str
    earlier: tuple[Exchange, ...] | None = None
    """What stands above it; None while other turns of this conversation come before it."""
    begun: str = ""
    """What was there already of an answer that goes on."""
    prefill: tuple[int, float] | None = None
    """Until the first token: tokens of the forward that runs, and what share of the layers they went through."""
    turn: Turn[str] = field(init=False)
    when: float = field(default_factory=time.monotonic)
    """When it was asked for, in seconds."""

    @property
    def answer(self) -> str:
        """As far as it has come."""
        return self.begun + "".join(self.turn.pieces)

    @property
    def done(self) -> bool:
        return self.turn.done()

    @property
    def state(self) -> Literal["waiting", "answering"]:
        return "waiting" if self.turn.state == "waiting" else "answering"

    @property
    def lost(self) -> str:
        """A message that nothing answered, to be sent again; empty if there is none. Of one that is done."""
        return self.message if self.wish.kind == "send" and not self.answer and not self.succeeded else ""

    @property
    def succeeded(self) -> bool:
        return self.done and not self.turn.cancelled() and self.turn.exception() is None

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

    Messages that are sent to a conversation while it is being answered wait their turn, in order; an answer that fails
    or is stopped takes those that wait back.

    Args:
        store: the store, in any namespace.
        model: what loads the model; turns wait for it.
        queue: where turns of others than this page's run on that model, too; it is closed by who made it. None makes
            one when the model is there.
        options: for every `ChatSession`; what of them is in `Settings` is for conversations that have none.
    """

    def __init__(
        self, store: AttentionStore, model: ModelLoader, *, queue: TurnQueue | None = None, **options: Any
    ) -> None:
        self.store = store
        self.model = model
        self.options = options
        self.settings = Settings.from_options(options)
        self.expectations = Expectations()
        self._queue, self._owned = queue, queue is None
        self._beginning = threading.Lock()
        """Held while a turn is begun, so that turns come to the queue in the order in which they are here."""
        self._lock = threading.Lock()
        self._changing: set[Place] = set()
        self._running: dict[Place, list[Running]] = {}
        """By conversation, those that wait or run, in order; never an empty list."""
        self._closing = False

    def running(self, sessions: UserSessions, name: str) -> tuple[Running, ...]:
        """The turns of a conversation, in order: one that runs or is the next to, and those that wait for it."""
        with self._lock:
            return tuple(self._running.get((sessions.store.namespace, name), ()))

    def states(self, sessions: UserSessions) -> dict[str, str]:
        """What is "answering" or "waiting" of a user's conversations, by name."""
        with self._lock:
            mine = {n: turns[0] for (space, n), turns in self._running.items() if space == sessions.store.namespace}
        return {name: turn.state for name, turn in mine.items()}

    def begin(self, sessions: UserSessions, name: str, wish: Wish) -> Running:
        """Queues a turn. It goes on whoever listens; `running` has it until it is over. Waits for the model.

        Raises:
            UserTurnError: it can't begin.
            AttentionStoreError: from loading the model.
        """
        queue, place = self._opened(), (sessions.store.namespace, name)
        with self._beginning:
            first = not self._queued(place, wish)
            running = _planned(name, wish, self._exchanges(sessions, name) if first else None)
            self.expectations.expect(sessions.store, name)
            running.turn = queue.run(name, partial(self._work, sessions, running), store=sessions.store)
            with self._lock:
                self._running.setdefault(place, []).append(running)
        running.turn.add_done_callback(lambda _: self._over(sessions, running))  # at once, if it is over already
        return running

    def stop(self, sessions: UserSessions, name: str) -> None:
        """Stops the turn that runs on a conversation, and takes those back that wait for it."""
        for running in reversed(self.running(sessions, name)):
            running.stop()

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
        place = sessions.store.namespace, name
        with self._lock:
            if place in self._running or place in self._changing:
                raise _being_answered(name)
            self._changing.add(place)
        try:
            yield
        finally:
            with self._lock:
                self._changing.discard(place)

    def close(self) -> None:
        """Stops all turns, keeps what is complete, and ends the loading of the model."""
        self._closing = True
        with self._lock:
            queue, running = self._queue, [turn for turns in self._running.values() for turn in reversed(turns)]
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

    def _queued(self, place: Place, wish: Wish) -> bool:
        """Whether other turns of the conversation come first.

        Raises:
            UserTurnError: this one can't come after them, or there are too many.
        """
        with self._lock:
            before = self._running.get(place, [])
            if place in self._changing or (before and wish.kind != "send"):
                raise _being_answered(place[1])
            if len(before) >= MOST_MESSAGES:
                raise UserTurnError(f"{len(before)} messages wait for an answer: wait for one, or stop them")
            if not before and sum(space == place[0] for space, _ in self._running) >= MOST_TURNS_OF_ONE_USER:
                raise UserTurnError("several of your conversations are being answered: wait for one, or stop one")
            return bool(before)

    def _over(self, sessions: UserSessions, running: Running) -> None:
        """A turn has ended; those that wait for it are taken back if it has no whole answer."""
        place = sessions.store.namespace, running.name
        with self._lock:
            turns = self._running[place]
            rest = turns[1:] if turns[0] is running else []
            turns.remove(running)
            if not turns:
                del self._running[place]
        if not running.succeeded:
            for after in reversed(rest):
                after.stop()

    @staticmethod
    def _exchanges(sessions: UserSessions, name: str) -> tuple[Exchange, ...]:
        try:
            return sessions.open(name).exchanges
        except SessionNotFoundError:
            return ()

    # in the thread of the turns

    def _chat(self, store: AttentionStore, name: str, **changes: Any) -> ChatSession:
        model, tokenizer = self.model.result()
        options = {"tokenizer": tokenizer, "store": store, "session": name, **self.options, **changes}
        return ChatSession(model, **options)

    def _work(self, sessions: UserSessions, running: Running, turn: Turn[str]) -> str:
        wish = running.wish
        store = sessions.store
        if running.earlier is None:
            running.earlier = self._exchanges(sessions, running.name)
        number = len(running.earlier)
        fetched = self.expectations.take(store, running.name)
        settings = wish.settings or sessions.settings(running.name, self.settings)
        chat = self._chat(
            store, running.name, reuse=wish.reuse, record=True, system=settings.system, **settings.generating
        )
        waited = turn.waiting_seconds
        kwargs: dict[str, Any] = {"stream": turn.put, "stopping_criteria": turn.stopping_criteria()}
        try:
            with _watched(chat.model, running, turn):
                return self._call(chat, running)(**kwargs)
        except _Stopped:
            return ""
        finally:
            if chat.stats is not None:
                turn.chat_turn, turn.stats = chat.stats, chat.stats.cache
                chat.annotate(SETTINGS, settings.to_json())
                self._keep(chat, number, record_of(chat.stats, with_store=wish.reuse, waited=waited, fetched=fetched))
                self.expectations.learn(chat.stats.cache)
            self.expectations.forget(store, running.name)
            chat.close()

    @staticmethod
    def _call(chat: ChatSession, running: Running) -> Callable[..., str]:
        """What of a chat does what was wished."""
        wish, number = running.wish, len(running.earlier or ())
        if wish.kind == "retry":
            # the likeliest answer again would be the same one; but who compares the two ways wants just that
            (before,) = from_json(chat.annotation(TURNS), number + 1)[number:]
            compares = before is not None and before.with_store != wish.reuse
            return chat.retry if compares else partial(chat.retry, do_sample=True)
        if wish.kind == "edit":
            return partial(chat.edit, wish.turn, running.message)
        return chat.go_on if wish.kind == "go_on" else partial(chat.send, running.message)

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


def _planned(name: str, wish: Wish, exchanges: tuple[Exchange, ...] | None) -> Running:
    """A turn on a conversation of these exchanges; None for one that comes after others.

    Raises:
        UserTurnError: there is no such turn, or no message.
    """
    text = wish.text.strip()
    if wish.kind in ("send", "edit") and not text:
        raise UserTurnError("an empty message has no answer")
    if wish.kind == "send":
        return Running(name, wish, text, exchanges)
    exchanges = exchanges or ()
    number = wish.turn if wish.kind == "edit" else len(exchanges) - 1
    if not 0 <= number < len(exchanges):
        raise UserTurnError("there is no such message in this conversation any more; open it again")
    at = exchanges[number]
    if wish.kind == "go_on" and (at.record is None or not at.record.cut):
        raise UserTurnError("the last answer is complete: send a message instead")
    begun = at.answer if wish.kind == "go_on" else ""
    return Running(name, wish, text if wish.kind == "edit" else at.message, exchanges[:number], begun)


@contextmanager
def _watched(model: nn.Module, running: Running, turn: Turn[Any]) -> Iterator[None]:
    """Says how far a prefill has come, and has it end between two layers when the turn is to stop: it has no tokens to
    stop at."""
    lists = [found for found in model.modules() if isinstance(found, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())

    def reached(number: int, _: Any, args: tuple[Any, ...]) -> None:
        if turn.ttft_seconds is not None:
            return
        if turn.stop_requested:
            raise _Stopped
        hidden = args[0] if args else None
        if isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
            running.prefill = hidden.shape[1], number / len(layers)

    hooks = [layer.register_forward_pre_hook(partial(reached, number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        running.prefill = None
        for hook in hooks:
            hook.remove()


def _being_answered(name: str) -> UserTurnError:
    return UserTurnError(f"{name!r} is being answered: wait for it, or stop it")


def in_words(error: BaseException) -> str:
    """What went wrong, for a user: errors of this package as they are, the first line of others; the log has all."""
    if isinstance(error, AttentionStoreError):
        return str(error)
    logger.error("a turn failed", exc_info=error)
    return f"the model failed: {first_line(error)}"
