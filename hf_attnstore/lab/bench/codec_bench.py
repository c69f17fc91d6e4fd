"""What codecs cost and give: bytes, what becomes of the next tokens, and the time to the first of them.

The history of a text goes through a codec block by block, the tokens after it are exact, as in a turn that was
restored; what the model makes of them is compared with what it makes of the exact history. Beside the codecs stand the
whole model in bfloat16 as a floor, and keys and values in llama.cpp's formats, which group 32 channels of a token.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.model.argument import as_forward_takes, as_generate_takes
from hf_attnstore.lab.bench.shapes import BenchError
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.session.chain import TokenChain
from hf_attnstore.store.blocks.block import Block, BlockMeta
from hf_attnstore.store.blocks.codecs import codec_named
from hf_attnstore.store.disk.surroundings import Surroundings

BLOCK = 256
CODECS = ("raw", "lossless", "fp16", "int8", "int8z", "int4")
MEDIA: dict[str, float | None] = {"memory": None, "page cache": None, "1 GB/s": 1e9, "0.5 GB/s": 5e8, "1 Gbit/s": 125e6}
"""What turns are resumed from, with bytes a second where they are limited."""

Progress = Callable[[str], None]
Rounding = Callable[[str, torch.Tensor, int], tuple[torch.Tensor, int]]
"""Name, `[heads, tokens, dim]` of a block and its first token: what is made of it, and its bytes."""


@dataclass
class Quality:
    """What became of the tokens after a history that went through a codec."""

    kl: list[float] = field(default_factory=list)
    """By text: nats a token, of the exact distribution of the next token from this one."""
    loss: list[float] = field(default_factory=list)
    """By text: nats a token more than with the exact history."""
    top: list[float] = field(default_factory=list)
    """By text: share of tokens whose likeliest next one is the same."""
    same: list[bool] = field(default_factory=list)
    """By text: whether the greedy answer is the same."""
    bytes: float = 0.0
    """Of a full block, against what it is raw."""

    @property
    def perplexity(self) -> tuple[float, float]:
        """By how much perplexity is greater, and its standard error over the texts: shares."""
        mean = statistics.fmean(self.loss)
        error = statistics.stdev(self.loss) / math.sqrt(len(self.loss)) if len(self.loss) > 1 else 0.0
        return math.expm1(mean), error


KEPT = "nothing to load"
"""In the place of a codec: a turn whose history is in the model's own cache. No codec can be faster."""


@dataclass
class Resumed:
    """Seconds of turns that were resumed with so many tokens of history, by medium and codec, one for each repeat."""

    history: int
    new: int
    """Tokens after it that are computed."""
    raw_bytes: int
    """Of the history."""
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    loading: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """Of these what the load took, as `cache.stats.load_seconds` has it."""

    def ratio(self, medium: str, codec: str) -> float:
        """Of turns against raw: the median of the ratios within each repeat."""
        return _ratio(self.seconds[medium], codec)

    def loading_ratio(self, medium: str, codec: str) -> float:
        """The same of loads alone."""
        return _ratio(self.loading[medium], codec)


def _ratio(found: Mapping[str, Sequence[float]], codec: str) -> float:
    return statistics.median(a / b for a, b in zip(found[codec], found["raw"], strict=True))


class _Recorder(DynamicCache):
    """Remembers the KV of every token, whatever a layer lets go of."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.made: Made = {}

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.made[layer_idx] = (key_states.clone(), value_states.clone())
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def by_codec(name: str) -> Rounding:
    """What a codec of the package makes of blocks."""
    codec = codec_named(name)

    def through(label: str, block: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
        meta = BlockMeta(b"", b"", "", start, bytes(4 * block.shape[1]))
        parts = codec.encode(label, block, meta)
        if parts is None:
            return block, block.nbytes
        found = torch.empty_like(block)
        codec.decode(parts, found)
        return found, sum(part.nbytes for part in parts.values())

    return through


def llama_cpp(bits: int) -> Rounding:
    """What llama.cpp's q8_0 and q4_0 make of blocks: 32 channels of a token share a step of 16 bits."""

    def through(label: str, block: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
        width = 32 if block.shape[2] % 32 == 0 else block.shape[2]
        groups = block.float().reshape(*block.shape[:2], -1, width)
        largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        step = (largest / -8 if bits == 4 else largest.abs() / 127).half().float()
        codes = (groups / step.masked_fill(step == 0, 1)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        found = (codes * step).reshape(block.shape).to(block.dtype)
        return found, block.numel() * bits // 8 + step.numel() * 2

    return through


def by_token(label: str, block: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
    """What optimum-quanto makes of transformers' quantised caches at 4 bits with their default axis: 64 channels of a
    token, of keys as of values, share a step and a lowest value."""
    width = 64 if block.shape[2] % 64 == 0 else block.shape[2]
    groups = block.float().reshape(*block.shape[:2], -1, width)
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / 15
    codes = ((groups - low) / step.masked_fill(step == 0, 1)).round()
    return (codes * step + low).reshape(block.shape).to(block.dtype), block.numel() // 2 + step.numel() * 4


REFERENCES: dict[str, Rounding] = {
    "q8_0 (llama.cpp)": llama_cpp(8),
    "q4_0 (llama.cpp)": llama_cpp(4),
    "4 bits by token (quanto's axis 0)": by_token,
}


@torch.inference_mode()
def quality(
    model: PreTrainedModel,
    floor: PreTrainedModel | None,
    texts: Sequence[torch.Tensor],
    codecs: Sequence[str],
    history: int,
    answer_tokens: int,
    progress: Progress,
    references: Mapping[str, Rounding] = REFERENCES,
) -> dict[str, Quality]:
    """Sends the first `history` tokens of texts `[1, tokens]` through codecs; the others are scored.

    Args:
        answer_tokens: of greedy answers that are compared; 0 for none.
        floor: the same model in bfloat16, or of one in bfloat16 in float32, which computes both by itself.
    """
    ways = {name: by_codec(name) for name in codecs if name != "raw"} | dict(references)
    floor_name = f"{str(floor.dtype).removeprefix('torch.')} model" if floor is not None else ""
    found = {name: Quality() for name in (*ways, *([floor_name] if floor_name else ()))}
    for number, ids in enumerate(texts):
        progress(f"text {number + 1} of {len(texts)}")
        recorder = _Recorder(model.config)
        model(ids[:, :history], past_key_values=recorder)
        begun, rest = recorder.made, ids[:, history:]
        exact = _logits(model, _filled(model, begun), rest)
        prompt = ids[:, : history + 1]
        answer = _answer(model, _filled(model, begun), prompt, answer_tokens)
        for name, way in ways.items():
            through, found[name].bytes = _rounded(begun, way)
            _score(found[name], exact, _logits(model, _filled(model, through), rest), rest)
            if answer:
                theirs = _answer(model, _filled(model, through), prompt, answer_tokens)
                found[name].same.append(answer == theirs)
        if floor is not None:
            own = _Recorder(floor.config)
            floor(ids[:, :history], past_key_values=own)
            _score(found[floor_name], exact, _logits(floor, _filled(floor, own.made), rest), rest)
            if answer:
                theirs = _answer(floor, _filled(floor, own.made), prompt, answer_tokens)
                found[floor_name].same.append(answer == theirs)
    return found


Made = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""Keys and values by layer, each `[1, heads, tokens, dim]`."""


def _filled(model: PreTrainedModel, made: Made) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for number, kv in made.items():
        cache.update(*kv, number)
    return cache


def _rounded(made: Made, way: Rounding) -> tuple[Made, float]:
    """A history whose full blocks went through a codec, and what these take against raw ones."""
    coded = raw = 0
    found: Made = {}
    for number, kv in made.items():
        both = kv[0].clone(), kv[1].clone()
        for name, whole in zip(("keys", "values"), both, strict=True):
            for start in range(0, whole.shape[2] - BLOCK + 1, BLOCK):
                block = whole[0, :, start : start + BLOCK].contiguous()
                rounded, nbytes = way(f"layers.{number}.{name}", block, start)
                whole[0, :, start : start + BLOCK] = rounded
                coded, raw = coded + nbytes, raw + block.nbytes
        found[number] = both
    return found, coded / raw if raw else 1.0


def _logits(model: PreTrainedModel, cache: DynamicCache, rest: torch.Tensor) -> torch.Tensor:
    found: Any = model(rest, past_key_values=cache)
    return torch.log_softmax(found.logits[0].float(), dim=-1)


def _answer(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor, count: int) -> list[int]:
    """The greedy answer to a text of which all but the last token is in the cache."""
    token, answer = ids[:, -1:], []
    for _ in range(count):
        out: Any = model(token, past_key_values=cache)
        token = out.logits[:, -1:].argmax(-1)
        answer.append(int(token))
    return answer


def _score(found: Quality, exact: torch.Tensor, other: torch.Tensor, rest: torch.Tensor) -> None:
    found.kl.append(float((exact.exp() * (exact - other)).sum(-1).mean()))
    after = rest[0, 1:]
    gained = exact[:-1].gather(1, after[:, None]) - other[:-1].gather(1, after[:, None])
    found.loss.append(float(gained.mean()))
    found.top.append(float((exact.argmax(-1) == other.argmax(-1)).float().mean()))


def resume(
    model: PreTrainedModel,
    ids: torch.Tensor,
    codecs: Sequence[str],
    media: Sequence[str],
    new: int,
    repeats: int,
    progress: Progress,
) -> Resumed:
    """Times turns that resume all but the last `new` tokens of `[1, tokens]`, each codec in each repeat.

    Raises:
        BenchError: a turn did not do what is measured.
    """
    history = ids.shape[1] - new
    disk = SlowDisk()
    folders = tempfile.TemporaryDirectory(prefix="attnstore-codecs-")
    with (
        folders as folder,
        AttentionStore(
            folder, memory="8GiB", on_device=0, block_size=BLOCK, codec="raw", surroundings=Surroundings(disk=disk)
        ) as store,
    ):
        progress("computing the history")
        cache, kept = AttentionStoreCache(model, None, store, gate=False), DynamicCache(config=model.config)
        with torch.inference_mode():
            for start in range(0, history, 512):
                for each in (cache, kept):
                    model(ids[:, start : min(start + 512, history)], **as_forward_takes(model, each))
        cache.save()
        stores = {name: store.with_codec(name) for name in codecs}
        blocks = _blocks(store, cache, ids[0, :history].numpy())
        result = Resumed(history, new, sum(block.nbytes for block in blocks))
        for view in stores.values():
            if view is not store:
                _copy(blocks, view, cache.model_fingerprint(), ids[0, :history].numpy())
        del cache, blocks
        store.flush()
        for medium in media:
            for number in range(repeats + 1):
                progress(f"from {medium}, repeat {number} of {repeats}")
                order = [*stores, KEPT]
                for name in order if number % 2 else reversed(order):
                    if medium != "memory":
                        store.drop_memory()
                    with disk.at(MEDIA[medium]):
                        seconds, loading = (
                            (_generate(model, ids, deepcopy(kept)), None)
                            if name == KEPT
                            else _first_token(model, ids, history, name, stores[name], medium)
                        )
                    if number:
                        result.seconds.setdefault(medium, {}).setdefault(name, []).append(seconds)
                    if number and loading is not None:
                        result.loading.setdefault(medium, {}).setdefault(name, []).append(loading)
    return result


def _blocks(store: AttentionStore, cache: AttentionStoreCache, ids: np.ndarray) -> list[Block]:
    """What a cache has just handed to its store, from memory."""
    chain = TokenChain(store.root(cache.model_fingerprint()), BLOCK, ids)
    found = [store._memory.get(chain.key(number)) for number in range(-(-len(ids) // BLOCK))]
    return [block for block in found if block is not None]


def _copy(blocks: Sequence[Block], other: AttentionStore, fingerprint: str, ids: np.ndarray) -> None:
    """Hands blocks to a store with another codec."""
    theirs = TokenChain(other.root(fingerprint), BLOCK, ids)
    for number, held in enumerate(blocks):
        meta = replace(held.meta, key=theirs.key(number), parent=theirs.parent(number), codec=other.codec)
        full = meta.token_count == BLOCK
        other.reserve(held.nbytes, wait=True)
        other.put(Block(meta, held.tensors, codable=frozenset(held.tensors if full else ())))


def _generate(model: PreTrainedModel, ids: torch.Tensor, cache: Any) -> float:
    """Seconds to the first token."""
    began = time.perf_counter()
    model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, **as_generate_takes(model, cache)
    )
    return time.perf_counter() - began


def _first_token(
    model: PreTrainedModel, ids: torch.Tensor, history: int, name: str, store: AttentionStore, medium: str
) -> tuple[float, float]:
    """Seconds to the first token, and those of the load."""
    began = time.perf_counter()
    cache = AttentionStoreCache(model, None, store, save=False, gate=False)
    seconds = time.perf_counter() - began + _generate(model, ids, cache)
    tier = "memory" if medium == "memory" else "disk"
    if cache.stats.reused_tokens != history or set(cache.stats.blocks_from) != {tier}:
        raise BenchError(f"A turn by {name} reused {cache.stats.reused_tokens} of {history} tokens: {cache.stats}")
    return seconds, cache.stats.load_seconds


def read_texts(tokenizer: Any, paths: Sequence[Path], tokens: int, count: int) -> list[torch.Tensor]:
    """The beginnings `[1, tokens]` of at most `count` passages: of plain texts from all over them, of JSON lines with a
    `history` of `user` and `bot` one dialogue after the other, by the model's chat template.

    Raises:
        BenchError: a file can't be read, or is too short.
    """
    found: list[torch.Tensor] = []
    for path in paths:
        try:
            text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise BenchError(f"{path} can't be read as a text ({error}).") from error
        if ".jsonl" in path.name:
            whole = [_dialogue(tokenizer, json.loads(line)["history"]) for line in text.splitlines()]
            ids, passages = [], []
            for dialogue in whole:
                ids += dialogue
                if len(ids) >= tokens:
                    passages.append(ids[:tokens])
                    ids = []
        else:
            all_ids = tokenizer(text, verbose=False).input_ids
            last = max(len(all_ids) - tokens, 0)
            places = range(0, last + 1, max(last // max(count - 1, 1), tokens // 4))
            passages = [all_ids[start : start + tokens] for start in places]
        found += [torch.tensor([passage]) for passage in passages[:count] if len(passage) == tokens]
    if not found:
        raise BenchError(f"No text has {tokens} tokens: give a longer --text, or fewer tokens.")
    return found


def _dialogue(tokenizer: Any, history: Sequence[dict[str, str]]) -> list[int]:
    roles = (("user", "user"), ("assistant", "bot"))
    if tokenizer.chat_template is None:  # a model that was not taught to chat
        text = "\n".join(f"{role}: {part[key]}" for part in history for role, key in roles)
        return list(tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False).input_ids)
    messages = [{"role": role, "content": part[key]} for part in history for role, key in roles]
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))
