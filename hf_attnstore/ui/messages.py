"""Conversations as the messages that Gradio's chatbot shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .records import TurnRecord, footer
from .sessions import Exchange

if TYPE_CHECKING:
    from .turns import Running

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


def running(turns: Sequence[Running]) -> list[Message]:
    """A conversation with the turns of it that wait or run, in order."""
    first = turns[0]
    messages = [*shown(first.earlier or ()), _message("user", first.message)]
    if first.answer:
        messages.append(_message("assistant", first.answer))
    words = progress(first)
    return [
        *messages,
        *([aside(words, "progress")] if words else []),
        *(_message("user", t.message) for t in turns[1:]),
    ]


def progress(turn: Running) -> str:
    """What a turn is at, until there is an answer; empty where there is nothing to say."""
    position, prefill = turn.turn.position, turn.prefill
    if position is not None:
        return "waiting for " + ("the turn that runs" if position == 0 else f"{position + 1} other turns")
    if prefill is not None and prefill[0] > 1:
        return f"computing {prefill[0]:,} tokens: {prefill[1]:.0%}"
    return ""


def aside(words: str, kind: str) -> Message:
    """What is not part of the conversation: "turn" for a footer, "progress" until there is an answer."""
    return _message("assistant", f'<p class="aside {kind}">{escape(words)}</p>')


def question(later: int) -> str:
    """What is asked before an edit that drops so many turns."""
    those = f"the {later} turns" if later > 1 else "the turn"
    return f'<p role="alert">This takes back {those} after the message.</p>'


def turn_at(messages: Sequence[Any], index: Any) -> int:
    """The number of the turn, from 0, whose message is at `index` of what the chatbot shows."""
    place = index[0] if isinstance(index, (list, tuple)) else index
    return sum(message["role"] == "user" for message in messages[: int(place)])


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}
