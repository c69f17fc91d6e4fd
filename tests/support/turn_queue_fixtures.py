"""For the tests of `TurnQueue`: turns that are held up, and a store that notes what it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import AttentionStore, Turn, TurnQueue

from .turns import GREEDY

LONG = {**GREEDY, "max_new_tokens": 400}
PATIENCE = 60
"""Seconds after which a test that waits gives up."""


class Recording(AttentionStore):
    """A store that notes what it is told, beside doing it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.told: list[list[str]] = []

    def schedule(self, upcoming: Sequence[str]) -> None:
        self.told.append(list(upcoming))
        super().schedule(upcoming)


class Gate:
    """A turn that runs until it is let go, so that what comes after it has to wait."""

    def __init__(self, queue: TurnQueue, session: str | None = None) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.turn = queue.run(session, self._hold)
        assert self.reached.wait(PATIENCE)

    def _hold(self, turn: Turn[str]) -> str:
        self.reached.set()
        assert self.go_on.wait(PATIENCE)
        return "gate"


class Held(BaseStreamer):
    """Holds a generate up before its token number `at` until it is let go."""

    def __init__(self, at: int) -> None:
        self.at, self.count = at, 0
        self.reached, self.go_on = threading.Event(), threading.Event()

    def put(self, value: torch.Tensor) -> None:
        if self.count == self.at + 1:  # the prompt comes first
            self.reached.set()
            assert self.go_on.wait(PATIENCE)
        self.count += 1

    def end(self) -> None: ...


def next_token(streamer: Held) -> tuple[int, int]:
    """How many tokens there may be when a turn was told to stop while it was held: transformers asks whether to stop
    before it streams a token, or after that."""
    return streamer.at + 1, streamer.at + 2


def until(condition: Callable[[], bool]) -> None:
    """Waits for something that another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def noting(order: list[str], name: str) -> Callable[[Turn[None]], None]:
    return lambda _: order.append(name)


def fails(_: Turn[Any]) -> Any:
    raise LookupError("this one fails")
