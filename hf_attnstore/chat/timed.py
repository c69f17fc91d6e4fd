"""Timing one call of `generate`: when the first token came, what came, and its text while it comes.

The chat, the demo and anything that compares runs with and without the store measure through this one
function, so that both sides are measured alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import TextStreamer

from ..cache.generate.settings import setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class GenerateRun:
    """What one `generate` gave. Times in seconds from the call; `ids` are the new tokens only.

    Filled while it runs, so that it says what was produced even if `generate` raised.
    """

    ids: list[int] = field(default_factory=list)
    ttft_seconds: float | None = None
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Decoding speed after the first token; `None` for fewer than two tokens."""
        if self.ttft_seconds is None or len(self.ids) < 2 or self.seconds <= self.ttft_seconds:
            return None
        return (len(self.ids) - 1) / (self.seconds - self.ttft_seconds)


def timed_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: tuple[int, ...] | list[int],
    run: GenerateRun,
    *,
    on_text: Callable[[str], None] | None = None,
    **generate_kwargs: Any,
) -> None:
    """`model.generate` for the one prompt `ids`, recorded in `run`.

    Pieces of text go to `on_text` as soon as they are final. `run` is right up to the last complete token
    whatever `generate` raises. Beams and several sequences can't be observed token by token: with them
    `run.ttft_seconds` stays `None`, and `on_text` gets the answer, that of the first sequence, as a whole.
    """
    input_ids = torch.tensor([list(ids)], device=model.device)
    kwargs: dict[str, Any] = {"attention_mask": torch.ones_like(input_ids), **generate_kwargs}
    recorder = _Recorder(tokenizer, run, on_text)
    if can_be_streamed(model, kwargs):
        kwargs["streamer"] = recorder
    if setting(model, kwargs, "stop_strings"):
        kwargs.setdefault("tokenizer", tokenizer)
    run.ids.clear()
    generate: Any = model.generate
    recorder.started = time.perf_counter()
    try:
        output = generate(input_ids=input_ids, **kwargs)
        sequences = getattr(output, "sequences", output)
        run.ids[:] = sequences[0, input_ids.shape[1] :].tolist()
        if len(sequences) > 1:
            _cut_padding(run.ids, setting(model, kwargs, "eos_token_id"))
    finally:
        run.seconds = time.perf_counter() - recorder.started
    if "streamer" not in kwargs and on_text is not None:
        on_text(str(tokenizer.decode(run.ids, skip_special_tokens=True)))


def can_be_streamed(model: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether `generate` takes a streamer with these arguments: which beam it will be shows at the end only, and
    several sequences are no one text."""
    return all(int(setting(model, arguments, name) or 1) == 1 for name in ("num_beams", "num_return_sequences"))


def _cut_padding(ids: list[int], ends: Any) -> None:
    """Takes off what fills a sequence up that ended before the others."""
    known = set(torch.as_tensor([] if ends is None else ends).reshape(-1).tolist())
    last = next((place for place, token in enumerate(ids) if token in known), len(ids))
    del ids[last + 1 :]


class _Recorder(TextStreamer):
    """Notes each token and the time of the first one, then hands text on."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, run: GenerateRun, on_text: Callable[[str], None] | None
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.run = run
        self.on_text = on_text
        self.started = 0.0

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            if self.run.ttft_seconds is None:
                self.run.ttft_seconds = time.perf_counter() - self.started
            self.run.ids.extend(value.flatten().tolist())
            if self.on_text is None:
                return
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text and self.on_text is not None:
            self.on_text(text)
