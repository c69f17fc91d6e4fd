"""Prefilling, between two turns, the conversation as the next prompt will render it.

Chat templates of reasoning models show the last answer's reasoning no more once another message follows. All that
comes after the place where the reasoning stood is then other tokens than those that were generated, and would be
computed in the next turn, while the user waits. What of the next prompt is certain is computed here instead, in a
thread, as soon as the turn has ended.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from ..cache.generate.prefill import prefill
from ..cache.hooks import ensure_hooks
from ..errors import SessionBusyError, StoreClosedError
from ..session.chain import common_prefix
from .openmp import leave_computing_to_others

if TYPE_CHECKING:
    from ..cache import AttentionStoreCache
    from ..store import AttentionStore

logger = logging.getLogger("hf_attnstore")

PLACEHOLDERS = ("So", "\n\nAnd then?")
"""Two messages that nobody has sent yet. One begins with a line's end, which tokenizers like to join to what the
template writes before a message: only what neither changes is certain."""

Outcome = Literal["nothing to do", "running", "done", "stopped", "failed"]


@dataclass
class BackgroundWork:
    """What was computed after a turn, in the background. Filled in when that ends."""

    prefilled_tokens: int = 0
    """Tokens that the model was given."""
    reused_tokens: int = 0
    """Tokens before these, whose KV was there."""
    seconds: float = 0.0
    """From its beginning to its end, saving included."""
    outcome: Outcome = "nothing to do"


def certain_beginning(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The ids with which all of `prompts` begin."""
    first = np.asarray(prompts[0])
    return first[: min(common_prefix(first, np.asarray(prompt)) for prompt in prompts)].tolist()


class BackgroundPrefill:
    """One prefill in a thread of its own. It has the cache, and a turn on its session, until it is done.

    `stop` ends it at the next chunk; what it computed until then is kept. `flush` and `close` of the store wait for it.
    Errors are given to `failed`, in that thread.
    """

    def __init__(
        self, cache: AttentionStoreCache, ids: Sequence[int], work: BackgroundWork, failed: Callable[[Exception], None]
    ) -> None:
        self.cache_is_whole = True
        """Whether the cache can be used again."""
        self._cache = cache
        self._ids = np.asarray(ids, dtype=np.int64)
        self._work = work
        self._before = cache.stats
        self._failed = failed
        self._stop = threading.Event()
        self._done = threading.Event()
        self._under = Surroundings(cache.model)
        self._model = ensure_hooks(cache.model).fingerprint.current()

    def start(self) -> None:
        """Returns at once."""
        assert self._cache.store is not None
        assert self._cache.session is not None
        self._work.outcome = "running"
        with _registering:
            _running.setdefault(self._cache.store, {})[self._cache.session] = self
        self._cache.store.register(self)
        leave_computing_to_others()
        try:
            threading.Thread(target=self._run, name="attnstore-canonicalize").start()
        except RuntimeError:  # no more threads
            self._end("failed")
            raise

    def stop(self) -> None:
        """Returns when it has ended: at the next chunk, if not by itself before."""
        self._stop.set()
        self._done.wait()

    def wait(self) -> None:
        """Returns when it has ended by itself."""
        self._done.wait()

    save = wait
    """What `AttentionStore.flush` asks of who has something to hand over."""

    def _run(self) -> None:
        began = time.perf_counter()
        outcome: Outcome = "failed"
        try:
            with self._under.taken_over():
                complete = self._is_there() and prefill(self._cache, self._ids, self._goes_on)
            outcome = "done" if complete else "stopped"
        except (SessionBusyError, StoreClosedError) as error:  # somebody else comes first
            outcome = "stopped"
            logger.debug("nothing is prefilled in the background: %s", error)
        except Exception as error:
            self.cache_is_whole = False
            self._failed(error)
        finally:
            stats = self._cache.stats
            if stats is not self._before:
                self._work.prefilled_tokens, self._work.reused_tokens = stats.prefilled_tokens, stats.reused_tokens
            self._work.seconds = time.perf_counter() - began
            self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self._work.outcome = outcome
        assert self._cache.store is not None
        assert self._cache.session is not None
        with _registering:
            running = _running.get(self._cache.store, {})
            if running.get(self._cache.session) is self:
                del running[self._cache.session]
        self._done.set()

    def _goes_on(self) -> bool:
        """Whether nobody wants it to stop. Asked in the turn, so with the session held, before each chunk."""
        if not self._is_there():
            # what the cache holds is not to come back, neither under a name that was deleted nor without one
            self._cache.drop_turn("the session is gone, or another model's now", expected=True)
            return False
        # the process ends: threads are waited for, so this one does not keep it
        return not self._stop.is_set() and threading.main_thread().is_alive()

    def _is_there(self) -> bool:
        """Whether the session still is, and by the model that the turn was of."""
        store, session = self._cache.store, self._cache.session
        return store is not None and session is not None and store.session_fingerprint(session) == self._model


_registering = threading.Lock()
_running: weakref.WeakKeyDictionary[AttentionStore, dict[str, BackgroundPrefill]] = weakref.WeakKeyDictionary()
"""By store and session: whoever begins a turn on a session has what runs there stopped, whichever object began it."""


def give_way(store: AttentionStore, session: str) -> None:
    """Stops what runs on a session in the background, so that a turn can begin. Harmless if nothing does."""
    with _registering:
        running = _running.get(store, {}).get(session)
    if running is not None:
        running.stop()


class Surroundings:
    """What torch keeps for each thread, and what a model computes depends on: taken over into another thread."""

    def __init__(self, model: nn.Module) -> None:
        devices = {parameter.device for parameter in model.parameters()}
        self._streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]
        self._autocast: dict[str, torch.dtype] = {}
        for kind in {device.type for device in devices}:
            with contextlib.suppress(RuntimeError):  # a device without autocast
                if torch.is_autocast_enabled(kind):
                    self._autocast[kind] = torch.get_autocast_dtype(kind)

    @contextlib.contextmanager
    def taken_over(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            for kind, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield
