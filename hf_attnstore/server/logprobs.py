"""How likely the tokens of an answer were, and which others there were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor

_LEAST = -9999.0
"""What OpenAI's API says of a token that can't come: JSON has no infinity."""


@dataclass(frozen=True)
class Scored:
    """A token of an answer."""

    text: str
    logprob: float
    top: tuple[Scored, ...] = ()
    """The likeliest ones in its place, the likeliest first."""
    offset: int = 0
    """Characters of the answer before it."""

    def as_of_chat(self) -> dict[str, Any]:
        """As an entry of `logprobs.content`."""
        return {**self._alone(), "top_logprobs": [other._alone() for other in self.top]}

    def _alone(self) -> dict[str, Any]:
        whole = "\ufffd" not in self.text  # else a part of a character
        return {"token": self.text, "logprob": self.logprob, "bytes": list(self.text.encode()) if whole else None}


def as_of_completions(entries: Sequence[Scored], most: int) -> dict[str, Any]:
    """The `logprobs` of a choice of `/v1/completions`."""
    tops = [{one.text: one.logprob for one in (*entry.top, entry)} for entry in entries]
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops if most else None,
        "text_offset": [entry.offset for entry in entries],
    }


class Scores(LogitsProcessor):
    """Keeps what the model says of each next token until that is chosen. It comes before what lowers or raises logits
    for the request (bias, penalties of OpenAI's, temperature, `top_p`), and changes nothing.

    Args:
        prompt: ids of the prompt.
        most: how many of the likeliest tokens are wanted beside the one that was chosen.
    """

    def __init__(self, tokenizer: Any, prompt: list[int], most: int) -> None:
        self.most = most
        self.entries: list[Scored] = []
        """Of the tokens so far that are text."""
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.all_special_ids)
        self._rows: dict[int, torch.Tensor] = {}
        """By the number of tokens before."""
        self._tokens = len(prompt)
        self._last = prompt[-1:]
        self._offset = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`[1, tokens]` and `[1, vocabulary]`; the scores as they are."""
        self._rows[input_ids.shape[1]] = scores[0].float().log_softmax(-1)
        return scores

    def chosen(self, token: int) -> None:
        """The next token is this one."""
        row = self._rows.pop(self._tokens)
        self._tokens += 1
        if token not in self._special:
            top = row.topk(min(self.most, len(row)))
            others = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            likeliest = tuple(Scored(self._text(other), max(value, _LEAST)) for other, value in others)
            entry = Scored(self._text(token), max(float(row[token]), _LEAST), likeliest, self._offset)
            self._offset += len(entry.text)
            self.entries.append(entry)
        self._last = [token]

    def _text(self, token: int) -> str:
        """What a token says after the one before: some tokenizers take the space from the first one of a text."""
        before, both = (self._decoded(ids) for ids in (self._last, [*self._last, token]))
        return both.removeprefix(before) if both.startswith(before) else self._decoded([token])

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
