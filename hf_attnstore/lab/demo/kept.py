"""The whole conversation once more, in one process and with a `DynamicCache` that never leaves its memory.

In 16 bits a prompt that is prefilled in parts is rounded otherwise than one that is prefilled in one go, whatever
keeps the parts. So there, what the store gives has to be what this gives, token by token.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...chat.model import load_chat_model
from ...chat.timed import GenerateRun, timed_generate
from ...session.chain import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class KeptTask:
    """What a process is asked to do: each of `prompts`, token ids, and how many tokens to generate after it."""

    model: str
    prompts: list[list[int]]
    max_new_tokens: list[int]
    device: str | None = None
    dtype: str = "auto"


def run_kept(task: KeptTask) -> list[list[int]]:
    """The answers' ids."""
    model, tokenizer = load_chat_model(task.model, device=task.device, dtype=task.dtype)
    kept = KeptCache(model, tokenizer)
    return [kept.answer(ids, count) for ids, count in zip(task.prompts, task.max_new_tokens, strict=True)]


class KeptCache:
    """What people do without the store: a `DynamicCache` that each prompt goes on with, as far as it agrees."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._held: list[int] = []
        self._cache: Any = self._empty()

    def answer(self, prompt: Sequence[int], max_new_tokens: int, **kwargs: Any) -> list[int]:
        """Generates after a prompt, greedily; what is held of it is not computed."""
        from ...cache.model.argument import as_generate_takes

        self._go_back(prompt, len(prompt) - 1)
        run = GenerateRun()
        taken = as_generate_takes(self.model, self._cache)
        options = {"do_sample": False, "pad_token_id": self.tokenizer.pad_token_id, **kwargs, **taken}
        timed_generate(self.model, self.tokenizer, list(prompt), run, max_new_tokens=max_new_tokens, **options)
        self._held = [*prompt, *run.ids][: self._cache.get_seq_length()]
        return run.ids

    def fork(self) -> KeptCache:
        """Another one with what this one has computed."""
        other = copy.copy(self)
        other._cache = copy.deepcopy(self._cache)
        return other

    def beginning(self, tokens: int) -> KeptCache:
        """Another one with the first `tokens` tokens of what this one holds."""
        other = self.fork()
        other._go_back(other._held, tokens)
        return other

    def shared_with(self, prompt: Sequence[int]) -> int:
        """How many of the first tokens of a prompt it holds."""
        return common_prefix(np.asarray(self._held), np.asarray(prompt))

    def feed(self, ids: Sequence[int], at_once: int) -> None:
        """Computes what is not held of `ids`, so many tokens at a time."""
        import torch

        from ...cache.model.argument import as_forward_takes

        self._go_back(ids, len(ids))
        forward: Any = self.model
        for start in range(len(self._held), len(ids), at_once):
            part = torch.tensor([list(ids[start : start + at_once])], device=self.model.device)
            with torch.no_grad():
                forward(input_ids=part, **as_forward_takes(self.model, self._cache))
        self._held = list(ids)

    def _go_back(self, prompt: Sequence[int], most: int) -> None:
        """Lets go of what is not the prompt's, and of what is beyond its first `most` tokens."""
        same = min(self.shared_with(prompt), most)
        if same < len(self._held):
            if same:
                self._cache.crop(same - len(self._held))  # so many tokens less
            else:
                self._cache = self._empty()
            self._held = self._held[:same]

    def _empty(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)
