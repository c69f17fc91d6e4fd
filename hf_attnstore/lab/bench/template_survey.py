"""What chat templates make of reasoning: whether an earlier answer's is still there when the next message comes.

Templates alone are asked, with any tokenizer: no model computes. Reasoning is given in both ways that clients have:
inside the answer's text, between `<think>` tags, and as a field beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_attnstore.chat.transcript import Transcript, encode
from hf_attnstore.lab.bench.shapes import BenchError
from hf_attnstore.session.chain import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT, CUT, REFUSED = "kept", "cut", "–"
_FIELDS = ("reasoning_content", "reasoning", "thinking")
_THOUGHTS = "the guests are many so bread and milk have to be bought before noon " * 4
_SAID = "Buy bread and milk."
_ASKED = "What shall I buy?"
_NEXT = {"role": "user", "content": "And where shall I put all of it in the end?"}
_WORDS = re.compile(r"think|reasoning", re.IGNORECASE)
_TAG = re.compile(r"<[a-z_:]*think[a-z_:]*>\s*$")


@dataclass(frozen=True)
class Treated:
    """What one template does. Verdicts are `kept`, `cut`, or `–` where it does not take such messages."""

    name: str
    in_text: str
    """Reasoning in the text of the answer before the last message."""
    in_field: str
    """Reasoning in a field of that answer."""
    after_tool: str
    """Reasoning in a field of an answer that called a tool, when the tool has answered: the same turn still."""
    opened: bool
    """Whether the template itself opens the reasoning of an answer."""
    known: int
    """Tokens of the conversation before the next message, the reasoning in the answer's text."""
    reused: int
    """Of these, those with which the next prompt begins in a `ChatSession`."""
    prefilled: int
    """The other tokens of that prompt."""

    @property
    def row(self) -> tuple[str, ...]:
        """As text, for `COLUMNS`."""
        opens = "template" if self.opened else "model"
        numbers = (f"{number:,}" for number in (self.known, self.reused, self.prefilled))
        return self.name, opens, self.in_text, self.in_field, self.after_tool, *numbers


COLUMNS = (
    "template", "opens the reasoning", "in the text", "in a field", "after a tool's answer", "known", "reused",
    "prefilled",
)  # fmt: skip


def read_templates(folder: Path) -> dict[str, str]:
    """Chat templates by the names of their files, `*.jinja`.

    Raises:
        BenchError: there is none, or one can't be read.
    """
    try:
        found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"The templates in {folder} can't be read: {error}") from error
    if not found:
        raise BenchError(f"{folder} has no *.jinja: give a folder of chat templates.")
    return found


def survey(tokenizer: PreTrainedTokenizerBase, templates: Mapping[str, str]) -> list[Treated]:
    """Asks every template; left out are those that know of no reasoning, or refuse three plain messages."""
    found = ((template, _treated(tokenizer, name, template)) for name, template in templates.items())
    return [one for template, one in found if one is not None and _knows(one, template)]


def _knows(one: Treated, template: str) -> bool:
    """Whether a template was written with reasoning in mind."""
    return one.opened or one.in_text == CUT or KEPT in (one.in_field, one.after_tool) or bool(_WORDS.search(template))


def _treated(tokenizer: Any, name: str, template: str) -> Treated | None:
    first: list[dict[str, Any]] = [{"role": "user", "content": _ASKED}]
    begun = _render(tokenizer, template, first)
    if begun is None or _render(tokenizer, template, [*first, _answer(_SAID), _NEXT]) is None:
        return None
    opened = _TAG.search(begun) is not None
    rest = f"{_THOUGHTS}\n</think>\n\n{_SAID}"
    wrote = rest if opened else f"<think>\n{rest}"
    text = _render(tokenizer, template, [*first, _answer(wrote), _NEXT])
    field = _render(tokenizer, template, [*first, _answer(_SAID, thoughts=True), _NEXT])
    call = {**_answer("", thoughts=True), "tool_calls": [_CALL]}
    tool = _render(tokenizer, template, [*first, call, _RESULT])
    talk = Transcript().answered(_ASKED, Transcript().prompt(begun, tokenizer), encode(tokenizer, wrote), tokenizer)
    sent = talk.prompt(text, tokenizer).ids if text is not None else ()
    reused = common_prefix(np.asarray(talk.ids), np.asarray(sent))
    return Treated(
        name, _verdict(text), _verdict(field), _verdict(tool), opened, len(talk.ids), reused, len(sent) - reused
    )


# of nine characters: some templates ask for that
_CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "shop", "arguments": {"what": "bread"}}}


_RESULT = {"role": "tool", "name": "shop", "content": "open", "tool_call_id": "a1b2c3d4e"}


def _answer(content: str, *, thoughts: bool = False) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **(dict.fromkeys(_FIELDS, _THOUGHTS) if thoughts else {})}


def _verdict(rendered: str | None) -> str:
    if rendered is None:
        return REFUSED
    return KEPT if _THOUGHTS.strip() in rendered else CUT


def _render(tokenizer: Any, template: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """What a template makes of messages; None where it refuses them."""
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=True
            )
        )
    except Exception:  # a template may raise what it likes
        return None
