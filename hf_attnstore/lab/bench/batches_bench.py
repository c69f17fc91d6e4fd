"""Continuous batching of one model, with the store behind it and plain: tokens fed, first tokens, answers, copies."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState

from hf_attnstore import AttentionStore, attach, detach
from hf_attnstore.cache import AttentionStoreCache
from hf_attnstore.cache.continuous.manager import told_to
from hf_attnstore.cache.continuous.pages import Pages
from hf_attnstore.cache.layers.buffers import empty, host_buffers
from hf_attnstore.lab.bench.wanted import Figure
from hf_attnstore.session.matching import match_prefix

Progress = Callable[[str], object]

USERS, REQUESTS_EACH_TIME = 8, 8
_NEW_TEXT, _ANSWER = 16, 8
"""Tokens that a turn brings, and that are generated."""


class Bench:
    """One model and texts for it.

    Args:
        ids: of a text that prompts are cut from; at least twice as many as the longest history.
        folder: where stores are made.
    """

    def __init__(self, model: Any, ids: Sequence[int], folder: Path, progress: Progress) -> None:
        self.model, self._ids, self._folder, self._progress = model, list(ids), folder, progress
        self._fed: list[int] = []
        self._compared = self._different = 0
        fed = self._fed
        model.register_forward_pre_hook(
            lambda _m, _a, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def text(self, start: int, tokens: int) -> list[int]:
        """Tokens of the text from anywhere on, which begins again at its end."""
        return [self._ids[(start + n) % len(self._ids)] for n in range(tokens)]

    def _store(self, name: str) -> AttentionStore:
        return AttentionStore(self._folder / name, shared="")

    def _manager(self, pages: int) -> Any:
        config = ContinuousBatchingConfig(num_blocks=pages, max_batch_tokens=1024, use_cuda_graph=False)
        greedy = GenerationConfig(max_new_tokens=_ANSWER, do_sample=False, eos_token_id=-1)
        return self.model.init_continuous_batching(generation_config=greedy, continuous_batching_config=config)

    def run(self, prompts: Sequence[list[int]], pages: int, namespace: Any = None) -> tuple[list[list[int]], int]:
        """The answers of requests that are there at once, and how many tokens were fed."""
        self._fed.clear()
        manager = self._manager(pages)
        told = told_to(manager)
        manager.start()
        try:
            names = [str(number) for number in range(len(prompts))]
            for name, prompt in zip(names, prompts, strict=True):
                if namespace is not None and told is not None:
                    told.expect(name, namespace)
                manager.add_request(prompt, request_id=name)
            found: dict[str, list[int]] = {}
            while len(found) < len(names):
                output = manager.get_result(timeout=600)
                found[output.request_id] = list(output.generated_tokens)
        finally:
            manager.stop(block=True, timeout=60)
        return [found[name] for name in names], sum(self._fed)

    def both(self, store: AttentionStore, prompts: Sequence[list[int]], pages: int) -> tuple[list[list[int]], int, int]:
        """The answers, and the tokens that were fed with the store and without; what differs is counted."""
        detach(self.model)
        plain, fed_plain = self.run(prompts, pages)
        attach(self.model, store)
        found, fed = self.run(prompts, pages)
        detach(self.model)
        self._compared += len(prompts)
        self._different += sum(ours != theirs for ours, theirs in zip(found, plain, strict=True))
        return plain, fed, fed_plain

    # what is measured

    def users(self, history: int, turns: int) -> list[Figure]:
        """Eight users with a paged cache for half of them."""
        pages = USERS // 2 * -(-(history + turns * (_NEW_TEXT + _ANSWER)) // 256)
        prompts = [self.text(97 * user, history) for user in range(USERS)]
        least = fed = plain = 0
        with self._store("users") as store:
            for turn in range(turns):
                self._progress(f"{USERS} users, turn {turn + 1} of {turns}")
                answers, ours, theirs = self.both(store, prompts, pages)
                if turn:
                    fed, plain = fed + ours, plain + theirs
                    least += USERS * (1 + _NEW_TEXT + _ANSWER - 1)
                more = self.text(2000 + 31 * turn, _NEW_TEXT)
                prompts = [p + a + more for p, a in zip(prompts, answers, strict=True)]
        return [
            Figure("tokens fed, new and generated", fed / least, 1.0),
            Figure("8 users, paged cache for half of them: tokens fed / plain", fed / plain, 0.08),
        ]

    def first_token(self, history: int, repeats: int) -> Figure:
        """The CPU time to the first token of a turn after a restart, from disk, in pairs."""
        prompt = self.text(0, history)
        with self._store("restart") as store:
            attach(self.model, store)
            (answer,), _ = self.run([prompt], 16)
        prompt += answer + self.text(500, _NEW_TEXT)
        times: dict[bool, list[float]] = {True: [], False: []}
        for number in range(repeats):
            for with_store in (True, False) if number % 2 else (False, True):
                self._progress(f"first tokens, {number + 1} of {repeats}")
                detach(self.model)
                with self._store("restart") as store:
                    if with_store:
                        attach(self.model, store)
                        AttentionStoreCache(
                            self.model, store=store
                        ).model_fingerprint()  # as a server does at its start
                    times[with_store].append(self._time_to_first(prompt))
                    detach(self.model)
        ratio = statistics.median(times[True]) / statistics.median(times[False])
        return Figure(f"first token after a restart / plain, {history:,} tokens", ratio, 0.08)

    def _time_to_first(self, prompt: list[int]) -> float:
        manager = self._manager(16)
        manager.start()
        try:
            manager.add_request(self.text(1000, 4), request_id="warm")
            while manager.get_result(timeout=600).request_id != "warm":
                pass
            began = time.process_time()
            manager.add_request(prompt, request_id="timed", streaming=True)
            manager.get_result("timed", timeout=600)
            return time.process_time() - began
        finally:
            manager.stop(block=True, timeout=60)

    def equal(self, requests: int, history: int) -> list[Figure]:
        """Whether greedy answers are those of plain continuous batching, in conversations that begin anew now and
        then; the store is opened anew on the way."""
        done = 0
        prompts: list[list[int]] = []
        while done < requests:
            with self._store("equal") as store:
                for _ in range(8):
                    if not prompts or len(prompts[0]) > 3 * history:
                        prompts = [self.text(done + 61 * n, history + 5 * n) for n in range(REQUESTS_EACH_TIME)]
                    self._progress(f"answers, {done} of {requests}")
                    answers, _, _ = self.both(store, prompts, 24)
                    done += len(prompts)
                    prompts = [p + a + self.text(done, _NEW_TEXT) for p, a in zip(prompts, answers, strict=True)]
        return [
            Figure("greedy answers that were compared", self._compared, 500, at_least=True),
            Figure("greedy answers that are another", self._different, 0),
        ]

    def namespaces(self, history: int) -> Figure:
        """What of one user's prompt another gets, on one manager's pages and from one store."""
        prompt = self.text(300, history)
        with self._store("namespaces") as store:
            attach(self.model, store)
            self.run([prompt], 16, store.in_namespace("alice"))
            _, fed = self.run([prompt], 16, store.in_namespace("bob"))
            detach(self.model)
        return Figure("tokens shared between namespaces", len(prompt) + _ANSWER - 1 - fed, 0)

    def copies(self, tokens: int, repeats: int) -> list[Figure]:
        """The CPU time of filling pages from blocks in memory, and of taking blocks out, by that of a plain copy of as
        many bytes; into memory that was used before, and into fresh memory."""
        self._progress("copies")
        ids = self.text(0, tokens)
        with self._store("copies") as store:
            attach(self.model, store)
            self.run([[*ids, ids[0]]], -(-tokens // 256) + 4)
            fingerprint = AttentionStoreCache(self.model, store=store).model_fingerprint()
            detach(self.model)
            spans = match_prefix(np.array(ids), store.root(fingerprint), store.block_size, store)
            blocks = [store.resident(span.block) for span in spans]
            config = ContinuousBatchingConfig(
                num_blocks=-(-tokens // 256) + 4, max_batch_tokens=256, max_memory_percent=0.5
            )
            text = self.model.config.get_text_config(decoder=True)
            paged = PagedAttentionCache(text, config, "cpu", DistributedHelper(None, None), self.model.dtype)
            assert paged.can_store_request_tokens(RequestState("a", ids), tokens)
            pages = Pages(paged, text.num_hidden_layers, store.block_size)
            shape = pages.room(store.block_size)

            # of layers whose attention slides the last tokens are in a ring, and older ones in blocks only
            kept = [n for n in range(tokens // store.block_size) if pages.has(n * store.block_size, tokens)]

            def fill() -> int:
                return sum(
                    pages.fill("a", block, span.start, span.stop, span.first, tokens)
                    for span, block in zip(spans, blocks, strict=True)
                    if block is not None
                )

            def take(into: Sequence[torch.Tensor] | None) -> list[torch.Tensor]:
                taken = []
                for place, number in enumerate(kept):
                    start = number * store.block_size
                    whole = into[place] if into is not None else empty(shape, pages.dtype, pages.device)
                    pages.take("a", start, start + store.block_size, whole)
                    taken.append(whole)
                return taken

            filled = fill()
            one, other = take(None), take(None)
            ways: dict[str, Callable[[], object]] = {
                "plain": lambda: [a.copy_(b) for a, b in zip(one, other, strict=True)],
                "fill": fill,
                "take": lambda: take(one),
                "plain fresh": lambda: [torch.empty(shape, dtype=pages.dtype).copy_(b) for b in other],
                "take fresh": lambda: take(None),
            }
            times: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(repeats):
                for name, way in ways.items():
                    host_buffers.clear()
                    began = time.process_time()
                    made = way()  # given back after it was timed
                    times[name].append(time.process_time() - began)
                    del made
        took = {name: statistics.median(found) for name, found in times.items()}
        as_many = filled / sum(whole.nbytes for whole in one)
        return [
            Figure("fill from memory / a plain copy of the bytes", took["fill"] / took["plain"] / as_many, 1.6),
            Figure("taking out / a plain copy of the bytes", took["take"] / took["plain"], 2.0),
            Figure("taking out / a plain copy, both to fresh memory", took["take fresh"] / took["plain fresh"], 2.0),
        ]
