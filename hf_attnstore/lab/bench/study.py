"""The truncation study: what a text costs, in perplexity and in prefill, when it outgrows the window.

A text is streamed through the model in chunks, each predicted from what the window holds. Where a chunk does not fit
any more, the oldest half of the window goes, and the methods differ in what becomes of the rest:

- `TT`, token truncation: the kept tokens are computed again, from nothing.
- `CA`, this library: their keys and values are kept, the keys rotated to the new positions.
- `NKVT`, naive truncation: keys and values are kept as they are, made for positions that they are not at any more.

The names are those of the CachedAttention paper (USENIX ATC'24), section 4.3.
"""

from __future__ import annotations

import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.model.argument import as_forward_takes, as_generate_takes
from hf_attnstore.chat.message_cuts import MessageCuts
from hf_attnstore.chat.transcript import Message, Transcript
from hf_attnstore.lab.bench.dialogues import chatting, read_dialogues
from hf_attnstore.lab.bench.shapes import BenchError, random_ids
from hf_attnstore.session.window import KEEP_FIRST

METHODS = ("TT", "CA", "NKVT")
SYSTEM: Final = "system"
"""In place of a number of leading tokens: the system part with which a text of messages begins."""

_FILLING = 512
"""Tokens fed at a time until the window is full: nothing is predicted there."""

Progress = Callable[[str], None]


@dataclass
class Stream:
    """How one method did on one text."""

    method: str
    keep_first: int | str
    """Leading tokens kept, or `SYSTEM`."""
    nats: list[float] = field(default_factory=list)
    """By chunk, summed over its tokens; those after the first truncation only."""
    tokens: list[int] = field(default_factory=list)
    by_text: dict[str, float] = field(default_factory=dict)
    """Nats a token of each text, where there are several."""
    prefilled: int = 0
    """Tokens computed, beyond those of the text itself."""
    truncations: int = 0
    truncation_seconds: list[float] = field(default_factory=list)
    """By truncation: from the chunk's arrival until its prediction, the chunk included."""

    @property
    def label(self) -> str:
        if self.keep_first == SYSTEM:
            return f"{self.method}, system part kept"
        return f"{self.method}, {self.keep_first} first kept" if self.keep_first else self.method

    def add(self, text: str, found: Stream) -> None:
        """Puts what the same method did on another text behind it."""
        self.by_text[text] = found.nats_per_token
        self.nats += found.nats
        self.tokens += found.tokens
        self.prefilled += found.prefilled
        self.truncations += found.truncations
        self.truncation_seconds += found.truncation_seconds

    @property
    def nats_per_token(self) -> float:
        """After the first truncation."""
        return sum(self.nats) / max(sum(self.tokens), 1)

    @property
    def perplexity(self) -> float:
        """Per token, after the first truncation."""
        return math.exp(self.nats_per_token)


def methods_for(model: PreTrainedModel) -> tuple[str, ...]:
    """The methods that a model can be streamed by: cutting keys by hand needs layers that all attend to everything."""
    plain = all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)
    return METHODS if plain else METHODS[:2]


def stream(
    model: PreTrainedModel, ids: torch.Tensor, method: str, *, window: int, chunk: int, keep_first: int = 0
) -> Stream:
    """Streams a text `[1, tokens]` through the model by one method.

    Raises:
        BenchError: the text never outgrows the window.
    """
    if ids.shape[1] <= window + chunk:
        raise BenchError(
            f"The text has {ids.shape[1]} tokens: too few for a window of {window}. Give a longer --text, or a "
            "smaller --window."
        )
    result = Stream(method, keep_first)
    folders = tempfile.TemporaryDirectory(prefix="attnstore-study-")
    with folders as folder, AttentionStore(folder, memory="4GiB", disk=0, on_device=0) as store:
        walk = _WALKS[method](model, store, window, keep_first)
        start, full = 0, window // chunk * chunk
        while start < ids.shape[1] - 1:
            stop = min(start + _FILLING, full) if start < full else min(start + chunk, ids.shape[1] - 1)
            began = time.perf_counter()
            logits, truncated = walk.step(ids[:, :stop], start)
            seconds = time.perf_counter() - began
            if truncated:
                result.truncations += 1
                result.truncation_seconds.append(seconds)
            if result.truncations:
                losses = torch.nn.functional.cross_entropy(
                    logits[0].float(), ids[0, start + 1 : stop + 1], reduction="sum"
                )
                result.nats.append(float(losses))
                result.tokens.append(stop - start)
            start = stop
        result.prefilled = walk.computed - (ids.shape[1] - 1)
        walk.close()
    return result


class _Walk:
    """One method, chunk by chunk."""

    def __init__(self, model: PreTrainedModel, store: AttentionStore, window: int, keep_first: int) -> None:
        self.model, self.store, self.window, self.keep_first = model, store, window, keep_first
        self.computed = 0
        """Tokens that the model was given."""

    def step(self, ids: torch.Tensor, start: int) -> tuple[torch.Tensor, bool]:
        """Predicts what follows each token of the chunk `ids[start:]`; the text so far is `ids`.

        Returns:
            Logits `[1, chunk, vocabulary]`, and whether tokens had to be dropped for it.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of everything."""

    @torch.no_grad()
    def _feed(self, ids: torch.Tensor, cache: Any) -> torch.Tensor:
        self.computed += ids.shape[1]
        logits: torch.Tensor = self.model(input_ids=ids, **as_forward_takes(self.model, cache)).logits
        return logits


class _ByHand(_Walk):
    """With a DynamicCache of full-attention layers."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.held: torch.Tensor | None = None
        self.cache = DynamicCache(config=self.model.config)

    def step(self, ids: torch.Tensor, start: int) -> tuple[torch.Tensor, bool]:
        held = self.held if self.held is not None else ids[:, :0]
        new = ids[:, start:]
        excess = held.shape[1] + new.shape[1] - self.window
        if excess > 0:
            low = min(self.keep_first, held.shape[1])
            count = max(excess, math.ceil((held.shape[1] - low) / 2))
            held = torch.cat([held[:, :low], held[:, low + count :]], dim=1)
            self._drop(low, count)
            if not self.cache.get_seq_length():  # what is kept is computed again
                self._feed(held, self.cache)
        self.held = torch.cat([held, new], dim=1)
        return self._feed(new, self.cache), excess > 0

    def _drop(self, low: int, count: int) -> None:
        raise NotImplementedError


class _TokenTruncation(_ByHand):
    def _drop(self, low: int, count: int) -> None:
        self.cache = DynamicCache(config=self.model.config)


class _NaiveTruncation(_ByHand):
    def _drop(self, low: int, count: int) -> None:
        for layer in self.cache.layers:
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys, layer.values = (
                torch.cat([t[:, :, :low], t[:, :, low + count :]], dim=2) for t in (layer.keys, layer.values)
            )


class _Moved(_Walk):
    """With this library."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.cache = AttentionStoreCache(
            self.model, store=self.store, window=self.window, keep_first=self.keep_first, drop=0.5, gate=False
        )

    def step(self, ids: torch.Tensor, start: int) -> tuple[torch.Tensor, bool]:
        if start == 0:
            return self._feed(ids, self.cache), False
        before = self.cache.stats.dropped_tokens
        done = self.cache.match(ids)
        self.computed += self.cache.stats.prefilled_tokens
        truncated = self.cache.stats.dropped_tokens > before
        if truncated and self.cache.stats.truncation != "rotated":
            raise BenchError(f"This model's keys can't be moved: {self.cache.stats.recomputed}")
        if done != start:
            raise BenchError(f"{start - done} tokens of the text were lost on the way")
        return self._feed(ids[:, start:], self.cache), truncated

    def close(self) -> None:
        self.cache.reset()


_WALKS: dict[str, type[_Walk]] = {"TT": _TokenTruncation, "CA": _Moved, "NKVT": _NaiveTruncation}


def leading(tokenizer: Any, path: Path, keep_first: int | str) -> int | None:
    """How many leading tokens of a text are kept; None: its system part, and it has none.

    Raises:
        BenchError: the file can't be read.
    """
    if not isinstance(keep_first, str):
        return keep_first
    if ".jsonl" not in path.name:
        return None
    messages = [{"role": "user", "content": read_dialogues(path)[0][0]}]

    def render(other: Sequence[Message]) -> str:
        return str(chatting(tokenizer).apply_chat_template(list(other), tokenize=False, add_generation_prompt=True))

    return MessageCuts(messages, Transcript().prompt(render(messages), tokenizer), render, tokenizer, SYSTEM).first


def tokenised(tokenizer: Any, path: Path, *, by_paragraph: bool) -> torch.Tensor:
    """The ids `[1, tokens]` of a text, begun as the tokenizer begins a text; of dialogues (`.jsonl`, `.jsonl.gz`) as
    chat templates render them, one after the other.

    Raises:
        BenchError: the file can't be read.
    """
    if ".jsonl" in path.name:
        return torch.tensor(
            [[number for said in read_dialogues(path, whole=True) for number in _chat(tokenizer, said)]]
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{path} can't be read as a text ({error}).") from error
    parts = re.split(r"(?<=\n\n)(?=\S)", text) if by_paragraph else [text]
    begin = tokenizer("").input_ids[:1] if tokenizer.bos_token_id in tokenizer("").input_ids[:1] else []
    ids = [number for part in parts for number in tokenizer(part, add_special_tokens=False, verbose=False).input_ids]
    return torch.tensor([[*begin, *ids]])


def _chat(tokenizer: Any, said: Sequence[str]) -> list[int]:
    """A dialogue of which users and assistant say every other message."""
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
    return list(chatting(tokenizer).apply_chat_template(messages, tokenize=True, return_dict=False))


def own_text(model: PreTrainedModel, tokens: int, seed: int, begin: int | None = None) -> torch.Tensor:
    """A text `[1, tokens]` that the model itself has sampled, for want of a better one.

    It is sampled in windows of half the model's positions, each continuing the end of the one before.
    """
    config: Any = model.config.get_text_config(decoder=True)
    half = max(int(getattr(config, "max_position_embeddings", None) or 2048) // 2, 2)
    device = model.device
    start = begin if begin is not None else int(random_ids(model, 1, (seed,))[0, 0])
    ids = torch.tensor([[start]], device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while ids.shape[1] < tokens:
            context = ids[:, -half // 2 :]
            wanted = min(half, tokens - ids.shape[1])
            out: Any = model.generate(  # type: ignore[operator]
                context,
                attention_mask=torch.ones_like(context),
                do_sample=True,
                max_new_tokens=wanted,
                min_new_tokens=wanted,
            )
            ids = torch.cat([ids, out[:, context.shape[1] :]], dim=1)
    return ids


@dataclass
class Resumed:
    """Seconds to the first token of turns resumed with the same number of tokens in the window."""

    tokens: int
    """Tokens in the window, the new ones included."""
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """By kind (`whole`, `truncated`) and tier: "whole/memory" …; and "recompute"."""

    def ratio(self, tier: str) -> float:
        """A truncated resume against an untruncated one: the median of the ratios within each repeat."""
        pairs = zip(self.seconds[f"truncated/{tier}"], self.seconds[f"whole/{tier}"], strict=True)
        return statistics.median(a / b for a, b in pairs)


def resume(model: PreTrainedModel, history: int, new: int, repeats: int, seed: int, progress: Progress) -> Resumed:
    """Measures resumed turns of `history` tokens of KV and `new` tokens of prompt, truncated and not.

    The truncated conversation is one that had grown to twice as many tokens and lost half of them.
    """
    window = 2 * history - KEEP_FIRST  # of which what is kept first and half of the others stay: `history` tokens
    result = Resumed(history + new)
    folders = tempfile.TemporaryDirectory(prefix="attnstore-study-")
    with folders as folder, AttentionStore(folder, memory="8GiB", on_device=0) as store:
        long, short = random_ids(model, window + new, (seed, 1)), random_ids(model, history + new, (seed, 2))
        settings: dict[str, Any] = {"window": window, "drop": 0.5}
        progress("saving two conversations")
        with torch.no_grad():
            for name, ids in (("truncated", long), ("whole", short)):
                cache = AttentionStoreCache(model, name, store, gate=False)
                for start in range(0, ids.shape[1] - new, 512):
                    fed = ids[:, start : min(start + 512, ids.shape[1] - new)]
                    model(input_ids=fed, **as_forward_takes(model, cache))
                cache.save()
                del cache
        store.flush()
        for number in range(repeats + 1):
            for tier in ("memory", "disk"):
                progress(f"repeat {number} of {repeats}, from {tier}")
                if tier == "disk":
                    store.drop_memory()
                order = [("whole", short), ("truncated", long)]
                for name, ids in order if number % 2 else reversed(order):
                    began = time.perf_counter()
                    cache = AttentionStoreCache(model, name, store, save=False, gate=False, **settings)
                    _first_token(model, ids, cache)
                    seconds = time.perf_counter() - began
                    _check(cache, name, history, tier)
                    store.flush()
                    if number:
                        result.seconds.setdefault(f"{name}/{tier}", []).append(seconds)
                    if name == "truncated" and number and tier == "memory":
                        began = time.perf_counter()
                        shown = ids[:, -(history + new) :]
                        _first_token(model, shown, DynamicCache(config=model.config))
                        result.seconds.setdefault("recompute", []).append(time.perf_counter() - began)
                    del cache
    return result


def _first_token(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> None:
    model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **as_generate_takes(model, cache)
    )
    if ids.device.type == "cuda":
        torch.cuda.synchronize()


def _check(cache: AttentionStoreCache, name: str, history: int, tier: str) -> None:
    """Stops a measurement that does not measure what it says."""
    stats = cache.stats
    rotated = history - KEEP_FIRST if name == "truncated" else 0
    if (stats.reused_tokens, stats.rotated_tokens) != (history, rotated) or not stats.blocks_from.get(tier):
        raise BenchError(
            f"A resumed turn ({name}, from {tier}) reused {stats.reused_tokens} of {history} tokens: {stats}"
        )


def medians(result: Resumed) -> dict[str, float]:
    """Median seconds by kind and tier."""
    return {name: statistics.median(seconds) for name, seconds in result.seconds.items()}


def by_distance(found: Stream, window: int, parts: int = 12) -> tuple[Sequence[float], Sequence[float]]:
    """The course of perplexity: positions in the text, in windows, and the perplexity there."""
    size = max(len(found.nats) // parts, 1)
    places, values = [], []
    tokens = 0
    for start in range(0, len(found.nats) - size + 1, size):
        count = sum(found.tokens[start : start + size])
        places.append(1 + (tokens + count / 2) / window)
        values.append(math.exp(sum(found.nats[start : start + size]) / count))
        tokens += count
    return places, values
