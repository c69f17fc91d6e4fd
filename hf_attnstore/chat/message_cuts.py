"""Where a conversation in messages may be cut when it outgrows the window: found by rendering it with other messages.

What a chat template writes before the first message's text is the system part: a system prompt, wherever the template
has it, or a default one, and what a message begins with. A cut goes from its end to where the text of a later message
begins, so that what is left is what the template makes of the later messages alone.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from ..session.segments import same_beginning
from .prefill_ahead import PLACEHOLDERS
from .transcript import Message, Prompt, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_JOINED = 3
"""Tokens before a text that a tokenizer may join to it or not, such as a space."""


class MessageCuts:
    """The cuts of one prompt. Nothing is rendered before somebody asks.

    Args:
        messages: all of them; the last one is not answered yet.
        prompt: what they are for the model.
        render: what the template makes of other messages.
        keep_first: leading tokens that are never dropped, made up to whole turns, beside the system part.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        prompt: Prompt,
        render: Callable[[Sequence[Message]], str],
        tokenizer: PreTrainedTokenizerBase,
        keep_first: int | Literal["system"],
    ) -> None:
        self._messages = list(messages)
        self._prompt = prompt
        self._render = render
        self._tokenizer = tokenizer
        self._least = 1 if keep_first == "system" else max(keep_first, 1)  # models need their first token
        said = [number for number, message in enumerate(messages) if message["role"] != "system"] or [0]
        role = messages[said[0]]["role"]
        self._turns = [number for number in said if messages[number]["role"] == role]
        self._found: dict[int, int] = {}

    @property
    def first(self) -> int:
        """Leading tokens that stay."""
        system = max(self._begin(0), 1)
        if self._least <= system:
            return system
        turn = self._turn_at(self._least)
        return self._begin(turn) if turn < len(self._turns) - 1 else self._least

    @property
    def last(self) -> int:
        """What comes before this token may be dropped."""
        return self._begin(len(self._turns) - 1) if len(self._turns) > 1 else 0

    def end(self, least: int, wanted: int) -> int:
        """Where a cut ends, in tokens of the prompt: where a turn begins, at `wanted` or after it, if that leaves a
        turn before the last; else at `least` or after it. `wanted` where no turn begins there.
        """
        newest = len(self._turns) - 1
        turn = self._turn_at(wanted)
        if turn >= newest:
            turn = next((n for n in (newest - 1, newest) if n > 0 and self._begin(n) >= least), 0)
        return self._begin(turn) if turn else wanted

    def _turn_at(self, position: int) -> int:
        """The number of the first turn whose text begins at `position` or after it."""
        return bisect_left(range(len(self._turns)), position, key=self._begin)

    def _begin(self, turn: int) -> int:
        """How many tokens come before the text of the message that begins a turn."""
        if turn not in self._found:
            ids, text = self._prompt.ids, self._prompt.text
            end = min(_agreement(text, other) for other in self._with_other_texts(self._turns[turn]))
            # no more ids than there can be: a character may be one of four bytes
            found, _ = same_beginning(self._tokenizer, ids[: 4 * end], encode(self._tokenizer, text[:end]))
            if turn:  # as at the end of the system part
                system = ids[self._begin(0) - 1] if self._begin(0) else None
                found = next((n for n in range(found, max(found - _JOINED, 0), -1) if ids[n - 1] == system), found)
            self._found[turn] = found
        return self._found[turn]

    def _with_other_texts(self, number: int) -> list[str]:
        """Renderings with other texts in place of a message's."""
        before, after = self._messages[:number], self._messages[number + 1 :]
        role = self._messages[number]["role"]
        return [self._render([*before, {"role": role, "content": text}, *after]) for text in PLACEHOLDERS]


def _agreement(a: str, b: str) -> int:
    """Number of leading characters on which two texts agree."""
    lengths = range(1, min(len(a), len(b)) + 1)
    return bisect_left(lengths, True, key=lambda n: not b.startswith(a[:n]))
