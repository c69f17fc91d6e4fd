"""Answers by transformers' continuous batching: several at a time, each with its own settings, caller and end.

A manager of continuous batching has one way to choose tokens for all of its requests. So it takes the likeliest token
here, and what a request asked for is done to its row of logits before: by the processors that `generate` would use,
and where it samples by drawing a token and leaving no other.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from ..cache import attach
from ..cache.continuous.manager import told_to
from ..cache.continuous.told import Kept
from ..cache.stats import TurnStats
from ..errors import AttentionStoreError, QueueFullError, TurnQueueError, TurnTimeoutError
from ..serving.queue import QueueStats
from ..store import AttentionStore
from .errors import ApiError
from .seams import BatchProcessors, BatchSettings
from .stored import delete_if_there

logger = logging.getLogger("hf_attnstore")

_WAIT_FOR_COMMIT = 5.0
"""Seconds that an answer which is complete waits at most for its session to be kept."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "stop_strings": (None,),
    "max_time": (None,),
    "guidance_scale": (None, 1),
    "prompt_lookup_num_tokens": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "watermarking_config": (None,),
    "token_healing": (None, False),
    "assistant_early_exit": (None,),
}
"""Settings that continuous batching has no place for, and the values that ask for nothing."""


@dataclass
class _Row:
    """How the tokens of one request are chosen."""

    prompt: list[int]
    processors: LogitsProcessorList
    generator: torch.Generator | None
    """What draws; None takes the likeliest."""


class _Choosing(BatchProcessors):
    """Gives each request's row of logits what its settings ask for. Used by the thread that computes."""

    def __init__(self) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.rows: dict[str, _Row] = {}
        """By the id of the request."""
        self._batch: list[Any] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """There is nothing to be kept in tensors."""

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        self._batch = [request.state for request in requests_in_batch if request.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Any, scores: Any, logits_processor_args: torch.Tensor) -> Any:
        """Scores `[requests, vocabulary]`, in which the greatest of a row is the token that was chosen."""
        for number, state in enumerate(self._batch):
            row = self.rows.get(state.request_id)
            if row is None or (not row.processors and row.generator is None):
                continue
            new = [*state.initial_tokens[len(row.prompt) :], *state.generated_tokens]
            ids: Any = torch.tensor([[*row.prompt, *new]], device=scores.device)
            found = row.processors(ids, scores[number : number + 1].clone())
            if row.generator is not None:
                token = torch.multinomial(found.softmax(-1), 1, generator=row.generator)
                found = torch.full_like(found, -math.inf).scatter_(1, token, 0.0)
            scores[number] = found[0]
        return scores


class BatchTurn(Future[torch.Tensor]):
    """One answer that is being made in a batch. Its result is `[1, tokens]`, the prompt included."""

    def __init__(self, batches: Batches, request_id: str, stats: TurnStats, session: str | None) -> None:
        super().__init__()
        self.request_id, self.stats, self.session = request_id, stats, session
        self.ids: list[int] = []
        """What was generated so far."""
        self.answer: torch.Tensor | None = None
        """The result, as soon as it is complete: it may have to wait until it is `kept`."""
        self.kept = False
        self.unwanted = False
        """Whether its session is not to be kept."""
        self.began = time.monotonic()
        self.first_token: float | None = None
        self._batches = batches

    @property
    def generated_tokens(self) -> int:
        return len(self.ids)

    @property
    def running_seconds(self) -> float:
        """Since it was given to the loop, where it may have waited for its place in a batch."""
        return time.monotonic() - self.began

    def cancel(self) -> bool:
        """Nobody waits for it any more: it stops at the next token, and what is computed is kept."""
        return self._batches.end(self, CancelledError(), "cancelled")


@dataclass
class _Listening:
    """Who hears of an answer's tokens."""

    prompt: torch.Tensor
    streamer: Any
    stopping: Any
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)


class Batches:
    """transformers' continuous batching of one model, which is attached to a store. Used in the event loop.

    Args:
        max_waiting: requests that may wait for their first token; others are refused.
        cache_tokens: tokens that the paged cache has room for; None leaves it to transformers.
        batch_tokens: tokens that are fed at once at most; None leaves it to transformers.

    Raises:
        AttentionStoreError: the model can't be served so.
    """

    def __init__(
        self,
        model: Any,
        store: AttentionStore,
        *,
        max_waiting: int = 100,
        cache_tokens: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        self._model, self._max_waiting = model, max_waiting
        self._choosing = _Choosing()
        self._open: dict[str, BatchTurn] = {}
        self._counts: Counter[str] = Counter()
        self._waited = self._ran = 0.0
        self._closed = False
        self._answering: Counter[tuple[str, str | None]] = Counter()
        """How many answers are still to be kept, by namespace and session."""
        self._keeping = ThreadPoolExecutor(1, "attnstore-sessions")
        attach(model, store)
        page = BatchSettings.page_size
        config = BatchSettings(
            num_blocks=-(-cache_tokens // page) if cache_tokens is not None else None,
            max_batch_tokens=batch_tokens,
            use_cuda_graph=False,  # the rows' settings are done in Python
            use_async_batching=False,  # and need the tokens before
        )
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)
        told = told_to(self._manager)
        if told is None:
            raise AttentionStoreError("the store can't serve continuous batching of this transformers")
        self._told = told
        self._manager.logit_processor = self._choosing
        self._manager.start()

    # what a queue of turns is asked, too

    def stats(self) -> QueueStats:
        """What was done so far."""
        waiting = sum(1 for turn in list(self._open.values()) if turn.first_token is None)
        counts = {name: self._counts[name] for name in ("done", "failed", "cancelled", "timed_out", "refused")}
        ended = sum(count for name, count in counts.items() if name != "refused")
        return QueueStats(
            waiting=waiting,
            running=len(self._open) - waiting,
            submitted=len(self._open) + ended,
            waiting_seconds=self._waited,
            running_seconds=self._ran,
            prompt_tokens=self._counts["prompt"],
            reused_tokens=self._counts["reused"],
            generated_tokens=self._counts["generated"],
            **counts,
        )

    def close(self, *, cancel: bool = False) -> None:
        """Ends: what runs is kept. From any thread but the event loop's."""
        self._closed = True
        for turn in list(self._open.values()):
            turn.cancel()
        self._manager.stop(block=True, timeout=60)
        self._keeping.shutdown()

    def answers(self, store: AttentionStore, session: str | None = None) -> bool:
        """Whether an answer is being made in a session, or anywhere in a namespace. From any thread."""
        return any(store.namespace == where and session in (None, name) for where, name in list(self._answering))

    @property
    def is_alive(self) -> bool:
        """Whether the loop that computes goes on."""
        return self._manager.background_thread_status.fatal_error is None

    # answers

    def run(
        self,
        request_id: str,
        store: AttentionStore,
        session: str | None,
        given: Mapping[str, Any],
        *,
        seed: int | None,
        timeout: float | None,
    ) -> BatchTurn:
        """Begins an answer.

        Args:
            store: the view that it is in.
            given: what `generate` would be given.
            timeout: seconds that it may take.

        Raises:
            ApiError: a setting that continuous batching has no place for.
            QueueFullError, TurnQueueError: no more are taken.
        """
        prompt, config = given["input_ids"], given["generation_config"]
        if others := given.keys() - _GIVEN:
            raise ApiError(400, f"this server takes text only, without {', '.join(sorted(others))}")
        row = self._row(prompt, config, given.get("logits_processor"), seed)
        if self._closed or not self.is_alive:
            raise TurnQueueError("the server is stopping" if self._closed else "the loop that computes has ended")
        if self.stats().waiting > self._max_waiting:
            self._counts["refused"] += 1
            raise QueueFullError(f"{self._max_waiting} requests wait already")
        listening = _Listening(prompt, given.get("streamer"), given.get("stopping_criteria"))
        turns: list[BatchTurn] = []
        over = partial(self._over, turns, store, listening.loop)
        turn = BatchTurn(self, request_id, self._told.expect(request_id, store, over), session)
        turns.append(turn)
        turn.stats.prompt_tokens = len(row.prompt)
        self._choosing.rows[request_id] = row
        self._open[request_id] = turn
        self._answering[store.namespace, session] += 1
        if listening.streamer is not None:
            listening.streamer.put(prompt)
        self._manager.register_result_handler(request_id, partial(self._heard, turn, listening))
        added = self._manager.add_request(
            row.prompt,
            request_id=request_id,
            max_new_tokens=config.max_new_tokens,
            streaming=True,
            eos_token_id=_ends(self._model, config),
        )
        if added is None:
            self.end(turn, TurnQueueError("the loop that computes has ended"), "failed")
        elif timeout is not None:
            late = TurnTimeoutError(f"the answer took more than {timeout:g} seconds")
            listening.loop.call_later(timeout, self.end, turn, late, "timed_out")
        return turn

    def _row(self, prompt: torch.Tensor, config: Any, others: Any, seed: int | None) -> _Row:
        for name, neutral in _NEUTRAL.items():
            if getattr(config, name, None) not in neutral:
                raise ApiError(400, f"{name} is not something that continuous batching can do", param=name)
        model = self._model
        prepared = model._prepare_generation_config(config)[0]
        model._prepare_special_tokens(prepared, True, device=model.device)
        processors = model._get_logits_processor(
            prepared,
            input_ids_seq_length=prompt.shape[-1],
            logits_processor=others if others is not None else LogitsProcessorList(),
            device=model.device,
        )
        generator = None
        if prepared.do_sample:
            generator = torch.Generator(model.device)
            if seed is not None:
                generator.manual_seed(seed)
            else:
                generator.seed()
        return _Row(prompt[0].tolist(), processors, generator)

    def _heard(self, turn: BatchTurn, listening: _Listening, output: Any) -> None:
        """A request has new tokens, or has ended."""
        if turn.done():
            return
        if output.error is not None:
            self.end(turn, TurnQueueError(f"the answer failed: {output.error}"), "failed")
            return
        try:
            for token in output.generated_tokens[len(turn.ids) :]:
                if turn.first_token is None:
                    turn.first_token = time.monotonic()
                turn.ids.append(token)
                if listening.streamer is not None:
                    listening.streamer.put(torch.tensor([token]))
                if listening.stopping is not None:
                    ids = torch.cat([listening.prompt[0].cpu(), torch.tensor(turn.ids)])[None]
                    if bool(listening.stopping(ids, None).any()):
                        self._manager.cancel_request(turn.request_id)
                        self._complete(turn, listening)
                        return
            if output.is_finished():
                self._complete(turn, listening)
        except Exception as error:
            self.end(turn, error, "failed")

    def _complete(self, turn: BatchTurn, listening: _Listening) -> None:
        if listening.streamer is not None:
            listening.streamer.end()
        turn.answer = torch.cat([listening.prompt[0].cpu(), torch.tensor(turn.ids, dtype=torch.long)])[None]
        if turn.session is None or turn.kept:
            self._settle(turn)
        else:
            listening.loop.call_later(_WAIT_FOR_COMMIT, self._settle, turn)

    def _over(
        self, turns: list[BatchTurn], store: AttentionStore, loop: asyncio.AbstractEventLoop, kept: Kept | None
    ) -> None:
        """What a request computed was handed over. Called by the thread that computes, which does not wait for more."""
        with suppress(RuntimeError):  # the server has ended
            self._keeping.submit(self._keep, turns[0], store, loop, kept)

    def _keep(self, turn: BatchTurn, store: AttentionStore, loop: asyncio.AbstractEventLoop, kept: Kept | None) -> None:
        """Its session, if it has one, is that from now on."""
        try:
            if kept is not None and turn.session is not None and not turn.unwanted:
                lock = store.lock_session(turn.session, 0.0)
                try:
                    store.commit(turn.session, kept.fingerprint, kept.manifest)
                finally:
                    lock.release()
        except AttentionStoreError as error:  # somebody else is at it: what was computed is found by content
            logger.warning("session %r is not what was answered last: %s", turn.session, error)
        finally:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._kept, turn, store)

    def delete(self, turn: BatchTurn, store: AttentionStore) -> None:
        """Deletes the session of an answer that nobody can name; one that is still to be kept is not."""
        assert turn.session is not None
        turn.unwanted = True
        with suppress(RuntimeError):  # the server has ended
            self._keeping.submit(delete_if_there, store, turn.session)

    def _kept(self, turn: BatchTurn, store: AttentionStore) -> None:
        turn.kept = True
        name = store.namespace, turn.session
        self._answering[name] -= 1
        if not self._answering[name]:
            del self._answering[name]
        if turn.answer is not None:
            self._settle(turn)

    def _settle(self, turn: BatchTurn) -> None:
        """An answer is complete."""
        if not turn.done():
            assert turn.answer is not None
            self._close(turn, "done")
            turn.set_result(turn.answer)

    def end(self, turn: BatchTurn, error: BaseException, outcome: str) -> bool:
        """Ends an answer that is not complete."""
        if turn.done() or turn.answer is not None:
            return False
        self._manager.cancel_request(turn.request_id)
        self._close(turn, outcome)
        turn.set_exception(error)
        return True

    def _close(self, turn: BatchTurn, outcome: str) -> None:
        now = time.monotonic()
        began = turn.first_token if turn.first_token is not None else now
        self._open.pop(turn.request_id, None)
        self._choosing.rows.pop(turn.request_id, None)
        self._waited += began - turn.began
        self._ran += now - turn.began
        numbers = {"prompt": turn.stats.prompt_tokens, "reused": turn.stats.reused_tokens, "generated": len(turn.ids)}
        self._counts.update({outcome: 1, **numbers})


_GIVEN = frozenset({
    "input_ids", "attention_mask", "generation_config", "tokenizer", "logits_processor", "streamer",
    "stopping_criteria", "token_type_ids",
})  # fmt: skip
"""What of the arguments of `generate` is understood."""


def _ends(model: Any, config: Any) -> Any:
    """The ids that end an answer; -1 for none."""
    ends = config.eos_token_id if config.eos_token_id is not None else model.generation_config.eos_token_id
    return ends if ends is not None else -1
