"""A conversation as messages and, beside them, the exact token ids that the model saw.

A chat template renders the whole conversation anew each turn, and text does not always go back to the ids
that it came from: a model may have written "hel" + "lo" where the tokenizer would say "hello". Stored KV is
found by token ids, so such an answer would lose its reuse. A transcript therefore keeps the ids that were
really fed and generated as far as a new rendering says the same, and only takes the rest from the tokenizer.

Everything here is bookkeeping on immutable values: no model, no store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..session.segments import same_beginning
from .channels import answer_content

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]
"""One message of a conversation: {"role": …, "content": …}, and "thinking" where a model reasons in a channel.
"written" is an answer with the special tokens in it, where it has any that its reader is not to see."""

FORMAT = 1
_OPTIONAL = ("thinking", "written")


class NewerFormatError(ValueError):
    """A conversation was saved in a format that this version does not know yet."""


@dataclass(frozen=True)
class Prompt:
    """What is fed to the model for one answer: the rendered text, and the ids that stand for it."""

    text: str
    ids: tuple[int, ...]
    kept: tuple[int, int] = (0, 0)
    """How many ids and characters of the transcript that it continues it begins with."""


@dataclass(frozen=True)
class Transcript:
    """The messages so far, and the ids and the text that they were for the model.

    `text` is what `ids` stand for. `marks` has (number of ids, number of characters of text) at the end of
    each earlier turn whose ids are a prefix of `ids`, so that a turn can be taken back exactly.
    """

    messages: tuple[Message, ...] = ()
    ids: tuple[int, ...] = ()
    text: str = ""
    marks: tuple[tuple[int, int], ...] = ()

    @property
    def turns(self) -> int:
        """How many messages were answered."""
        return sum(message["role"] == "assistant" for message in self.messages)

    def with_system(self, content: str | None) -> Transcript:
        """The same conversation under the system message `content`; `None` leaves what is there, "" takes it away."""
        if content is None:
            return self
        system: Message = {"role": "system", "content": content}
        has_one = bool(self.messages) and self.messages[0]["role"] == "system"
        return replace(self, messages=(*([system] if content else []), *self.messages[has_one:]))

    def added(self, text: str, role: str) -> Transcript:
        """The same conversation with one more message, which is not answered yet."""
        return replace(self, messages=(*self.messages, {"role": role, "content": text}))

    @property
    def open_messages(self) -> tuple[Message, ...]:
        """The messages after the last answer; the system message is none of them."""
        last = max((n for n, m in enumerate(self.messages) if m["role"] in ("assistant", "system")), default=-1)
        return self.messages[last + 1 :]

    def closed(self) -> Transcript:
        """The same conversation up to its last answer."""
        return replace(self, messages=self.messages[: len(self.messages) - len(self.open_messages)])

    def prompt(self, rendered: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """The ids for `rendered`, the chat template's rendering of this conversation and what follows.

        They are the exact ids so far as long as `rendered` says the same (all of them, unless a template drops
        reasoning or trims an answer, or a message was edited), and those of the tokenizer from there on.
        """
        if self.ids and rendered.startswith(self.text):
            added = rendered[len(self.text) :]
            ids = self.ids + encode(tokenizer, added)
            if decode(tokenizer, ids) == decode(tokenizer, self.ids) + added:
                return Prompt(rendered, ids, (len(self.ids), len(self.text)))
        whole = encode(tokenizer, rendered)
        kept, told = same_beginning(tokenizer, self.ids, whole) if self.ids else (0, 0)
        ids = self.ids[:kept] + whole[told:]
        if ids != whole and decode(tokenizer, ids) != decode(tokenizer, whole):
            return Prompt(rendered, whole)
        beginning = decode(tokenizer, ids[:kept])
        return Prompt(rendered, ids, (kept, len(beginning)) if rendered.startswith(beginning) else (0, 0))

    def answered(
        self,
        text: str,
        prompt: Prompt,
        answer_ids: tuple[int, ...],
        tokenizer: PreTrainedTokenizerBase,
        role: str = "user",
        written: str | None = None,
    ) -> Transcript:
        """The conversation after the message `text` of `role`, fed as `prompt`, was answered with `answer_ids`.

        `written` is what the chat template is to be given of the answer in place of its plain text, if anything.
        """
        ids = prompt.ids + answer_ids
        said = decode(tokenizer, answer_ids)
        answer: Message = {"role": "assistant", **answer_content(said, decode(tokenizer, answer_ids, plain=True))}
        if written is not None:
            answer["written"] = written
        return Transcript(
            messages=(*self.messages, {"role": role, "content": text}, answer),
            ids=ids,
            text=prompt.text + said,
            marks=(*(min(mark, prompt.kept) for mark in self.marks), prompt.kept),
        )

    def undone(self) -> tuple[Transcript, str]:
        """The conversation without its last answer and the message before that, and what this said; without what was
        added since. What was added before that message is still there, and not answered.

        Raises `ValueError` when there is no turn to take back.
        """
        if self.open_messages:
            return self.closed().undone()
        if len(self.messages) < 2 or self.messages[-1]["role"] != "assistant":
            raise ValueError("there is no turn to take back")
        ids, characters = self.marks[-1] if self.marks else (0, 0)
        earlier = Transcript(self.messages[:-2], self.ids[:ids], self.text[:characters], self.marks[:-1])
        return earlier, self.messages[-2]["content"]

    def to_json(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """This transcript as JSON values, for `from_json`."""
        return {
            "format": FORMAT,
            "messages": [dict(message) for message in self.messages],
            "ids": list(self.ids),
            "text": self.text,
            "marks": [list(mark) for mark in self.marks],
            "ids_decode_to": _digest(decode(tokenizer, self.ids)),
        }

    @classmethod
    def from_json(cls, saved: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Transcript:
        """The transcript that `to_json` made.

        The ids are taken only if they mean the same to `tokenizer`; with another model's tokenizer the
        messages alone go on. Raises `ValueError` for a format that this version does not know.
        """
        if isinstance(saved.get("format"), int) and saved["format"] > FORMAT:
            raise NewerFormatError(f"a newer version kept its messages (format {saved['format']}, not {FORMAT})")
        if saved.get("format") != FORMAT:
            raise ValueError(f"the conversation was saved in format {saved.get('format')!r}, not {FORMAT}")
        messages: tuple[Message, ...] = tuple(
            {"role": m["role"], "content": m["content"], **{name: m[name] for name in _OPTIONAL if name in m}}
            for m in saved["messages"]
        )
        ids = tuple(saved["ids"])
        try:
            same = _digest(decode(tokenizer, ids)) == saved["ids_decode_to"]
        except (OverflowError, IndexError, KeyError, TypeError, ValueError):  # ids beyond this vocabulary
            same = False
        if not same:  # marks of another tokenizer are no text either
            return cls(tuple({n: value for n, value in m.items() if n != "written"} for m in messages))
        return cls(messages, ids, saved["text"], tuple((n, c) for n, c in saved["marks"]))


def marked(tokenizer: PreTrainedTokenizerBase, answer_ids: tuple[int, ...]) -> str | None:
    """An answer with the special tokens in it, without the one that ends it; None where there are no others."""
    said = answer_ids[:-1] if not decode(tokenizer, answer_ids[-1:], plain=True) else answer_ids
    written = decode(tokenizer, said)
    return written if written != decode(tokenizer, said, plain=True) else None


def as_rendered(messages: Iterable[Message]) -> list[Message]:
    """Messages as a chat template is to be given them."""
    return [
        {n: value for n, value in {**m, "content": m.get("written", m["content"])}.items() if n != "written"}
        for m in messages
    ]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """The ids of `text` as it stands: the chat template already wrote the special tokens."""
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()


def decode(tokenizer: PreTrainedTokenizerBase, ids: tuple[int, ...], *, plain: bool = False) -> str:
    """The text of `ids`; `plain` leaves out special tokens, as for a reader."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=plain, clean_up_tokenization_spaces=False))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
