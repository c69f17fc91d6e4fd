"""A streamer that hears of the whole prompt, whatever of it the model is fed."""

from typing import Any

import torch


class WholePromptStreamer:
    """A streamer that is given the whole prompt, or none where it had it already, instead of what the model is fed."""

    def __init__(self, streamer: Any, prompt: torch.Tensor | None) -> None:
        self._streamer = streamer
        self._prompt = prompt
        self._begun = False

    def put(self, value: Any) -> None:
        if self._begun:
            self._streamer.put(value)
        elif self._prompt is not None:
            self._streamer.put(self._prompt)
        self._begun = True

    def end(self) -> None:
        self._streamer.end()

    def __getattr__(self, name: str) -> Any:
        """What else it has, such as `put_draft`, of which `generate` asks whether it is there."""
        return getattr(self._streamer, name)
