"""What reasoning costs the turns that follow it, and what prefilling between the turns saves them.

Conversations whose answers reason for a known number of tokens, then go on as the model likes. Every turn is run in
three ways, one right after the other, and all must say the same:

- `recompute`: plain `generate`, which prefills the whole conversation.
- `store`: a `ChatSession`. What comes after the place where the last answer's reasoning stood is prefilled again.
- `canonicalize`: one that prefills that between the turns.

In 16 bits prompts that are prefilled in parts are rounded otherwise than in one go. There, each session has to say what
a `DynamicCache` says that is kept in memory and prefilled in the same parts.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import LogitsProcessorList

from hf_attnstore import AttentionStore, ChatSession
from hf_attnstore.cache.generate.prefill import CHUNK
from hf_attnstore.chat.timed import GenerateRun, timed_generate
from hf_attnstore.lab.bench.shapes import BenchError, is_exact
from hf_attnstore.lab.bench.thinking_styles import Script, Style, reasoned
from hf_attnstore.lab.demo.kept import KeptCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METHODS = ("recompute", "store", "canonicalize")

_WORDS = (
    "the old prince looked at letter and said nothing to others in room then officer answered that they were march "
    "hour of three mother young man rose there was more she could say about road winter army"
).split()

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Lengths:
    """Tokens of each message, of each answer's reasoning, and of the answer itself, as they are generated."""

    message: int
    reasoning: int
    answer: int


@dataclass
class Turn:
    """One turn; by method where methods differ, and of each repeat where that may differ."""

    prompt_tokens: int
    prefilled: dict[str, int] = field(default_factory=dict)
    """Tokens of the prompt that were computed in the turn, by method."""
    ttft: dict[str, list[float]] = field(default_factory=dict)
    """Seconds to the first token, by method."""
    background_tokens: int = 0
    """Tokens computed after the turn, by `canonicalize`."""
    background_seconds: list[float] = field(default_factory=list)


@dataclass
class Talk:
    """A conversation in one style."""

    style: str
    like: str
    turns: list[Turn] = field(default_factory=list)


def run(
    model: PreTrainedModel,
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    *,
    turns: int,
    lengths: Lengths,
    repeats: int,
    seed: int,
    progress: Progress,
) -> Talk:
    """Measures one style.

    Args:
        model: what the sessions use, fit for the tokenizer; see `thinking_styles.fit`.
        plain: the same model once more, which nothing is attached to.
        tokenizer: dressed in the style.

    Raises:
        BenchError: the methods do not give the same tokens, or do not prefill what they should.
    """
    talk = Talk(style.name, style.like)
    for repeat in range(repeats):
        folder = tempfile.TemporaryDirectory(prefix="attnstore-thinking-")
        with folder as root, AttentionStore(Path(root) / "a") as one, AttentionStore(Path(root) / "b") as other:
            sessions = {
                "store": ChatSession(model, tokenizer, one, "chat"),
                "canonicalize": ChatSession(model, tokenizer, other, "chat", canonicalize=True),
            }
            kept = {} if is_exact(model) else {method: KeptCache(plain, tokenizer) for method in sessions}
            random = np.random.default_rng(seed)
            for number in range(turns):
                progress(f"{style.name}: repeat {repeat + 1} of {repeats}, turn {number + 1} of {turns}")
                found = _turn(sessions, kept, plain, tokenizer, style, lengths, random, number + repeat)
                if repeat == 0:
                    talk.turns.append(found)
                else:
                    _merge(talk.turns[number], found)
    return talk


def _turn(
    sessions: dict[str, ChatSession],
    kept: dict[str, KeptCache],
    plain: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    lengths: Lengths,
    random: np.random.Generator,
    first: int,
) -> Turn:
    message = _message(tokenizer, lengths.message, random)
    reasoning = random.choice(_plain_ids(tokenizer), lengths.reasoning).tolist()
    steps = reasoned(tokenizer, style, reasoning, lengths.answer)
    prompts = {method: chat.prompt_ids(message) for method, chat in sessions.items()}
    prompt = prompts["store"]
    if prompts["canonicalize"] != prompt and not kept:
        raise BenchError(f"{style.name}: the two sessions do not have the same conversation any more.")
    turn = Turn(len(prompt))
    answers: dict[str, list[int]] = {}
    order = [*METHODS[first % 3 :], *METHODS[: first % 3]]
    for method in order:
        kwargs: dict[str, Any] = {
            "logits_processor": LogitsProcessorList([Script(steps, tokenizer)]),
            "max_new_tokens": len(steps),
            "do_sample": False,
            "pad_token_id": tokenizer.pad_token_id,
        }
        gc.collect()
        if method == "recompute":
            generated = GenerateRun()
            timed_generate(plain, tokenizer, prompt, generated, **kwargs)
            turn.prefilled[method], seconds, answers[method] = len(prompt), generated.ttft_seconds, generated.ids
        else:
            chat = sessions[method]
            chat.send(message, **kwargs)
            chat.store.flush()  # and so waits for the background: nothing is to run while others are measured
            assert chat.stats is not None
            turn.prefilled[method], seconds = chat.stats.prefilled_tokens, chat.stats.ttft_seconds
            answers[method] = chat.token_ids[len(prompts[method]) :]
            work = chat.stats.background
            if work is not None:
                if work.outcome != "done":
                    raise BenchError(f"{style.name}: the background is not done, but {work.outcome}.")
                turn.background_tokens = work.prefilled_tokens
                turn.background_seconds = [work.seconds]
        assert seconds is not None
        turn.ttft[method] = [seconds]
    for method, chat in sessions.items():
        expected = answers["recompute"]
        if kept:
            steering = LogitsProcessorList([Script(steps, tokenizer)])
            expected = kept[method].answer(prompts[method], len(steps), logits_processor=steering)
            kept[method].feed(chat.store.tokens("chat"), CHUNK)  # what the session computed between the turns
        if answers[method] != expected:
            other = "a cache kept in memory" if kept else "plain generate"
            raise BenchError(f"{style.name}: with the store, other tokens came out than by {other}.")
    if not turn.prefilled["canonicalize"] <= turn.prefilled["store"] <= turn.prefilled["recompute"]:
        raise BenchError(f"{style.name}: {turn.prefilled} tokens were prefilled, which can't be.")
    return turn


def _merge(turn: Turn, again: Turn) -> None:
    """Takes the times of another repeat over; all else is the same."""
    same = ("prompt_tokens", "prefilled", "background_tokens")
    if any(getattr(turn, name) != getattr(again, name) for name in same):
        raise BenchError("Another repeat had other counts of tokens.")
    for method, seconds in again.ttft.items():
        turn.ttft[method] += seconds
    turn.background_seconds += again.background_seconds


def _message(tokenizer: PreTrainedTokenizerBase, tokens: int, random: np.random.Generator) -> str:
    """A text of about so many tokens."""
    words: list[str] = []
    while len(tokenizer.encode(" ".join(words), add_special_tokens=False)) < tokens:
        words.append(str(random.choice(_WORDS)))
    return " ".join(words)


def _plain_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are words, or begin some."""
    vocabulary = tokenizer.get_vocab().items()
    return sorted(number for token, number in vocabulary if token[:1] in "Ġ▁" and token[1:].isalpha())
