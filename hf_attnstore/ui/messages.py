"""Conversations as the messages that Gradio's chatbot shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .records import TurnRecord, footer
from .sessions import Exchange

Message = dict[str, Any]


def shown(exchanges: Sequence[Exchange]) -> list[Message]:
    """Message, answer and footer of each turn. The footer is a message of its own, so that nothing in an answer, such
    as code that was not closed, can swallow it."""
    records: list[TurnRecord | None] = [exchange.record for exchange in exchanges]
    messages: list[Message] = []
    for number, exchange in enumerate(exchanges):
        answer = f"<think>{exchange.thinking}</think>\n\n{exchange.answer}" if exchange.thinking else exchange.answer
        messages += [_message("user", exchange.message), _message("assistant", answer)]
        words = footer(records, number)
        if words:
            messages.append(aside(" · ".join(words), "turn"))
    return messages


def running(exchanges: Sequence[Exchange], message: str, answer: str, position: int | None) -> list[Message]:
    """A conversation whose last turn waits or runs. `position` is how many turns of others come first."""
    messages = [*shown(exchanges), _message("user", message)]
    if answer:
        return [*messages, _message("assistant", answer)]
    if position is not None:
        others = "the turn that runs" if position == 0 else f"{position + 1} other turns"
        return [*messages, aside(f"waiting for {others}", "turn")]
    return messages


def aside(words: str, kind: str) -> Message:
    """What is not part of the conversation: "turn" for a footer, "wrong" for an error."""
    return _message("assistant", f'<p class="aside {kind}">{escape(words)}</p>')


def turn_at(messages: Sequence[Any], index: Any) -> int:
    """The number of the turn, from 0, whose message is at `index` of what the chatbot shows."""
    place = index[0] if isinstance(index, (list, tuple)) else index
    return sum(message["role"] == "user" for message in messages[: int(place)])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
