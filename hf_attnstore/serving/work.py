"""What the turns of a queue do: `generate` on a session, or the turn of a chat, both heard piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from transformers.generation.streamers import BaseStreamer

from ..cache.generate.settings import setting
from ..cache.model.argument import as_generate_takes

if TYPE_CHECKING:
    from ..cache import AttentionStoreCache
    from ..chat.session import ChatSession
    from .turn import Turn


def generate(turn: Turn[Any], cache: AttentionStoreCache, model: Any, arguments: dict[str, Any]) -> Any:
    """`model.generate` as a turn of a queue. Returns what that returns."""
    arguments = {**arguments, "stopping_criteria": turn.stopping_criteria(arguments.get("stopping_criteria"))}
    if setting(model, arguments, "num_beams") in (None, 1):
        arguments["streamer"] = _Pieces(turn, arguments.get("streamer"))
    try:
        return model.generate(**as_generate_takes(model, cache), **arguments)
    finally:
        turn.stats = replace(cache.stats)
        turn.generated_tokens = len(turn.pieces) or turn.stats.generated_tokens


def answer(
    turn: Turn[str],
    chat: ChatSession,
    call: Callable[..., str],
    stream: Callable[[str], None] | None,
    arguments: dict[str, Any],
) -> str:
    """`send` or `retry` of a chat as a turn of a queue. Returns the answer."""
    given = arguments.get("stopping_criteria", chat.generate_defaults.get("stopping_criteria"))
    arguments = {**arguments, "stopping_criteria": turn.stopping_criteria(given)}

    def heard(text: str) -> None:
        turn.put(text)
        if stream is not None:
            stream(text)

    before = chat.stats
    try:
        return call(stream=heard, **arguments)
    finally:
        after = chat.stats
        if after is not None and after is not before:
            turn.chat_turn, turn.stats, turn.generated_tokens = after, after.cache, after.generated_tokens


class _Pieces(BaseStreamer):
    """Hands new tokens to a turn, one by one, and all that comes to a streamer that somebody gave."""

    def __init__(self, turn: Turn[Any], given: BaseStreamer | None) -> None:
        self._turn = turn
        self._given = given
        self._rows = 0

    def put(self, value: Any) -> None:
        if not self._rows:  # the prompt
            self._rows = value.shape[0] if value.ndim > 1 else 1
        elif self._rows == 1:  # tokens of several rows would be mixed
            for token in value.flatten().tolist():
                self._turn.put(token)
        if self._given is not None:
            self._given.put(value)

    def end(self) -> None:
        if self._given is not None:
            self._given.end()
