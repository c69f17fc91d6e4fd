"""Small chat templates that treat reasoning as those of well-known model families do, and answers that fit them.

For measuring and testing without such a model: `dress` gives any tokenizer a style's template and marks, and `Script`
makes any model reason as long as wanted before it answers by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

_TAGS = """\
{{- bos_token -}}
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set text = message['content'] -%}
  {%- if message['role'] == 'assistant' and loop.index0 < last.user and '</think>' in text -%}
    {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
  {%- endif -%}
  {{- '<|' + message['role'] + '|>\\n' + text + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

_OPENED = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- set text = message['content'] -%}
  {%- if message['role'] == 'assistant' -%}{%- set text = text.split('</think>')[-1] -%}{%- endif -%}
  {{- '<|' + message['role'] + '|>' + text + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|><think>\\n' -}}{%- endif -%}
"""

_CHANNELS = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if '<|channel|>' in message['content'] -%}{{- raise_exception('channels are no content') -}}{%- endif -%}
  {{- '<|start|>' + message['role'] -}}
  {%- if message['role'] == 'assistant' -%}{{- '<|channel|>final' -}}{%- endif -%}
  {{- '<|message|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""


@dataclass(frozen=True)
class Style:
    """One way of treating reasoning."""

    name: str
    like: str
    """Whose templates do so."""
    template: str
    special: tuple[str, ...]
    """Marks that are special tokens."""
    words: tuple[str, ...]
    """Marks that are tokens, but stay in an answer's text."""
    before: str
    """What the model writes before its reasoning, after what the template put there."""
    between: str
    """What it writes between reasoning and answer."""
    end: str
    """What ends an answer."""


STYLES = (
    Style(
        "tags",
        "Qwen3: reasoning between tags is cut from answers before the last message",
        _TAGS,
        ROLES,
        ("<think>", "</think>"),
        "<think>\n",
        "\n</think>\n\n",
        "<|end|>",
    ),
    Style(
        "opened",
        "DeepSeek-R1: the template opens the reasoning, and of an answer keeps what follows it",
        _OPENED,
        ROLES,
        ("<think>", "</think>"),
        "",
        "\n</think>\n\n",
        "<|end|>",
    ),
    Style(
        "channels",
        "gpt-oss: reasoning has a channel of its own, and only the final one is kept",
        _CHANNELS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        (),
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|return|>",
    ),
)


def dress(tokenizer: PreTrainedTokenizerBase, style: Style) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer that speaks in a style. It may have more tokens than the model has embeddings for."""
    dressed = copy.deepcopy(tokenizer)
    known = set(dressed.get_vocab())
    dressed.add_tokens([mark for mark in style.special if mark not in known], special_tokens=True)
    dressed.add_tokens([mark for mark in style.words if mark not in known])
    dressed.chat_template = style.template
    dressed.eos_token = style.end
    return dressed


def fit(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> None:
    """Gives a model embeddings for all of a dressed tokenizer's tokens, and lets its answers end where they do."""
    embeddings: Any = model.get_input_embeddings()
    if embeddings.weight.shape[0] < len(tokenizer):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer))
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def reasoned(
    tokenizer: PreTrainedTokenizerBase, style: Style, reasoning: Sequence[int], answer: int
) -> list[int | None]:
    """What an answer consists of, for a `Script`: given tokens of reasoning, and as many of the model's own."""
    before, between, end = (
        tokenizer.encode(text, add_special_tokens=False) for text in (style.before, style.between, style.end)
    )
    return [*before, *reasoning, *between, *[None] * answer, *end]


class Script(LogitsProcessor):
    """Has a model generate `steps`: each a token, or None for one of its own choice that ends nothing."""

    def __init__(self, steps: Sequence[int | None], tokenizer: PreTrainedTokenizerBase) -> None:
        self.steps = list(steps)
        marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self._marks = torch.tensor(sorted(marks))
        self._begin: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._begin is None:
            self._begin = input_ids.shape[1]
        step = self.steps[input_ids.shape[1] - self._begin]
        if step is None:
            return scores.index_fill(1, self._marks.to(scores.device), -torch.inf)
        return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([step], device=scores.device), 0.0)
