"""What all requests to a server share: its model, its store, its queue of turns, and the answers being made."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..cache import AttentionStoreCache
from ..errors import AttentionStoreError
from ..serving import TurnQueue
from ..store import AttentionStore
from .answer import Answer
from .batching import Batches
from .generating import LoadedModel, TurnState
from .metrics import Metrics
from .seams import Modality
from .tracing import tracer


class Service:
    """One model, one store, one queue.

    Args:
        loaded: the model, and the name by which clients ask for it.
        max_waiting: requests that may wait beside the one that is answered; others get 429.
        deadline: seconds that an answer may take, waiting included; None for any.
        checkpoint_every: as for `AttentionStoreCache`.
        batched: answers are made several at a time, by continuous batching; with what `Batches` takes.
        counted: False leaves its answers out of the metrics.
        traced: turns are spans of OpenTelemetry.

    Raises:
        AttentionStoreError: the model can't be served so.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        store: AttentionStore,
        *,
        max_waiting: int = 100,
        deadline: float | None = None,
        checkpoint_every: int | None = None,
        batched: Mapping[str, Any] | None = None,
        counted: bool = True,
        traced: bool = False,
    ) -> None:
        self.loaded, self.store, self.name = loaded, store, loaded.name
        self.deadline, self.checkpoint_every = deadline, checkpoint_every
        self.began = int(time.time())
        self.modality: Any = loaded.get_model_modality(loaded.model, processor=loaded.processor)
        self.queue = TurnQueue(loaded.model, store, max_waiting=max_waiting, checkpoint_every=checkpoint_every)
        AttentionStoreCache(loaded.model, store=store).model_fingerprint()  # of all weights: not for the first request
        self.batches: Batches | None = None
        if batched is not None:
            if self.modality != Modality.LLM:
                raise AttentionStoreError("continuous batching is for models of text")
            self.batches = Batches(loaded.model, store, max_waiting=max_waiting, **batched)
        self.metrics = Metrics(self.batches or self.queue, store.stats)
        self._told: list[Callable[[Answer], object]] = [self.metrics.count] if counted else []
        if traced:
            self._told.append(tracer(self.name))
        self.answers: dict[str, Answer] = {}
        """Those that a handler is about to start, by id."""
        self.state = TurnState(self)
        self.before_closing: Callable[[], object] | None = None
        """Ends what else uses the queue."""

    @contextmanager
    def known(self, answer: Answer) -> Iterator[None]:
        """While this lasts, an answer is found by its id."""
        self.answers[answer.id] = answer
        try:
            yield
        finally:
            del self.answers[answer.id]

    def over(self, answer: Answer) -> None:
        """An answer's turn is over."""
        for tell in self._told:
            tell(answer)

    def is_answering(self, store: AttentionStore, session: str | None = None) -> bool:
        """Whether what is being computed would come back, if a session or all of a namespace were deleted now. Of
        sessions of the queue's turns the store itself knows that they are held."""
        if self.batches is not None:
            return self.batches.answers(store, session)
        running = self.queue.running
        return session is None and running is not None and running.store.namespace == store.namespace

    @property
    def retry_after(self) -> int:
        """Seconds after which there may be room: as long as a turn has taken so far."""
        stats = (self.batches or self.queue).stats()
        ended = stats.done + stats.failed + stats.cancelled + stats.timed_out
        return max(1, math.ceil(stats.running_seconds / ended)) if ended else 1

    def close(self) -> None:
        """What runs stops at the next token; all that is complete is on disk after that."""
        if self.before_closing is not None:
            self.before_closing()
        if self.batches is not None:
            self.batches.close()
        self.queue.close(cancel=True)
        self.metrics.close()
        self.store.close()
