"""What becomes of sampled answers that come back as text: how often a tokenizer cuts them otherwise than the model did.

A client of an HTTP API sends text, and KV is found by ids: where they part, the rest of the conversation is computed
again. `resegment=True` feeds what is known for the same text; a `ChatSession` keeps the ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_attnstore.chat.transcript import Transcript, decode, encode
from hf_attnstore.lab.bench.dialogues import ANOTHER, chatting
from hf_attnstore.session.chain import common_prefix
from hf_attnstore.session.segments import same_beginning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Returned:
    """One sampled answer, and the next prompt of its conversation. All in tokens."""

    tokens: int
    """Of the answer."""
    known: int
    """Of the conversation up to its end, as it was fed and generated."""
    as_text: int
    """Of these, those with which the next prompt begins if the client sends text."""
    resegmented: int
    """As many with `resegment=True`."""
    in_session: int
    """As many in a `ChatSession`."""


def summary(found: Sequence[Returned]) -> dict[str, float]:
    """What they say, in numbers."""
    other = [answer for answer in found if answer.as_text < answer.known]
    return {
        "answers": len(found),
        "tokens_of_answers": sum(answer.tokens for answer in found),
        "otherwise": len(other),
        "computed_again_as_text": sum(answer.known - answer.as_text for answer in found),
        "computed_again_resegmented": sum(answer.known - answer.resegmented for answer in found),
        "computed_again_in_session": sum(answer.known - answer.in_session for answer in found),
    }


def study(
    model: PreTrainedModel,
    tokenizer: Any,
    messages: Sequence[str],
    *,
    max_new_tokens: int,
    batch: int,
    temperature: float,
    top_k: int,
    seed: int,
    tell: Callable[[int], object] = lambda done: None,
) -> Iterator[Returned]:
    """Samples an answer to each message, `batch` at a time, and renders the conversation with one more message.

    Args:
        top_k: as in `generate`; 0 samples from all tokens.
        tell: is given the number of answers so far.
    """
    from transformers import set_seed

    tokenizer = chatting(tokenizer)
    set_seed(seed)
    for start in range(0, len(messages), batch):
        opened = [Transcript().added(text, "user") for text in messages[start : start + batch]]
        prompts = [encode(tokenizer, _rendered(tokenizer, one)) for one in opened]
        answers = _sampled(model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k)
        for one, prompt, answer in zip(opened, prompts, answers, strict=True):
            yield _returned(tokenizer, one, prompt, answer)
        tell(start + len(prompts))


def _returned(tokenizer: Any, opened: Transcript, ids: tuple[int, ...], answer: tuple[int, ...]) -> Returned:
    text = opened.messages[-1]["content"]
    prompt = Transcript().prompt(_rendered(tokenizer, opened), tokenizer)
    answered = opened.closed().answered(text, prompt, answer, tokenizer).added(ANOTHER, "user")
    whole = _rendered(tokenizer, answered)
    sent, known = encode(tokenizer, whole), ids + answer
    # as `known_ids`: nobody is to be given another text
    joined = same_beginning(tokenizer, known, sent)
    same = decode(tokenizer, known[: joined[0]] + sent[joined[1] :]) == decode(tokenizer, sent)
    as_text = _common(sent, known)
    in_session = _common(answered.prompt(whole, tokenizer).ids, known)
    return Returned(len(answer), len(known), as_text, max(joined[0] if same else 0, as_text), in_session)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return common_prefix(np.asarray(a), np.asarray(b))


def _rendered(tokenizer: Any, transcript: Transcript) -> str:
    messages = [{"role": message["role"], "content": message["content"]} for message in transcript.messages]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


@torch.no_grad()
def _sampled(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[tuple[int, ...]]:
    """An answer to each prompt, with the token that ended it, if one did."""
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    longest, pad = max(map(len, prompts)), min(stops)
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    made = model.generate(ids, attention_mask=mask, do_sample=True, pad_token_id=pad, **settings)[:, longest:].tolist()
    found = []
    for answer in made:
        end = next((place + 1 for place, token in enumerate(answer) if token in stops), len(answer))
        found.append(tuple(answer[:end]))
    return found
