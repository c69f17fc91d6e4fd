"""Where a prompt parts from what the store knows: how far they agree, what each has there, and why, if that shows."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..session.chain import common_prefix
from ..session.spans import Span, total_tokens
from ..store.blocks.keys import Key, decode_tokens
from ..store.records.manifest import Manifest, SpanRow
from ..store.store import AttentionStore
from .inputs.content import has_stand_ins

Cause = Literal["", "date", "reasoning", "first token", "tokenisation", "gone", "unreadable"]
"""What may explain it: a date or time; reasoning that only one of them has; a first token (BOS) that one has twice, or
not at all; the same text in other tokens. Or there is nothing to compare with: the store has it no more, or can't read
it."""

_HINTS: dict[Cause, str] = {
    "": "",
    "date": "a date or time in the prompt: where it changes, everything after it does",
    "reasoning": "the template shows reasoning in only one of them: see ChatSession(canonicalize=True)",
    "first token": "one of them begins with a token more, such as a BOS that both template and tokenizer write",
    "tokenisation": "the same text in other tokens: pass on the ids that were generated, as ChatSession does",
    "gone": "from there on its KV is not in the store",
    "unreadable": "its tokens can't be read",
}
WORTH = 64
"""Tokens: whoever computes so many can as well find out why."""
_SHOWN, _BEFORE, _CHARACTERS = 16, 8, 24
_MOST_READ = 8
"""Blocks that are read, at most, to find the place."""
_APART = frozenset(" \t\n\r>]|\"'(")
"""Characters at which words end."""
_ALIKE = 4
"""Tokens that have to agree for one text to be taken for the other, moved by one token."""
_DATE = re.compile(
    r"\d{4}-\d\d|\d\d?:\d\d|\d\d?[./]\d\d?[./]\d\d|\b(19|20)\d\d\b"
    r"|\b(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b|\b(mon|tues|wednes|thurs|fri|satur|sun)day\b",
    re.IGNORECASE,
)
_REASONING = re.compile(r"</?think|\[/?think\]|<\|channel\|>|</?reason|</?thought|◁/?think", re.IGNORECASE)


@dataclass(frozen=True)
class Divergence:
    """The place where a prompt parts from a conversation that the store knows."""

    agreed: int
    """Leading tokens on which they agree."""
    prompt_tokens: int
    """Tokens of the whole prompt."""
    session: str | None
    """Who has the other text; None if it is kept by content only."""
    here: tuple[int, ...]
    """The prompt's next ids, the first of which differs."""
    there: tuple[int, ...]
    """The other text's next ids; empty where there are none, or they can't be read."""
    before: tuple[int, ...] = ()
    """The last ids on which they agree."""
    cause: Cause = ""
    here_text: str = ""
    """The words that the prompt has there; empty where no tokenizer is known."""
    there_text: str = ""

    def __str__(self) -> str:
        """One sentence for people: "agrees up to token 8 of 445; then '30 Nov' where 'alice' had '29 Nov'"."""
        agreed = f"agrees up to token {self.agreed:,} of {self.prompt_tokens:,}"
        whose = repr(self.session) if self.session is not None else "another text"
        hint = f" ({_HINTS[self.cause]})" if self.cause else ""
        if not self.there:
            return f"{agreed} with {whose}{hint}"
        here = repr(self.here_text) if self.here_text else str(list(self.here[:4]))
        there = repr(self.there_text) if self.there_text else str(list(self.there[:4]))
        return f"{agreed}; then {here} where {whose} had {there}{hint}"

    def in_text(self, decode: Callable[[Sequence[int]], str]) -> "Divergence":
        """The same in words, and with the cause that these show."""
        ids = np.asarray([*self.before, *self.here, *self.there])
        if not self.there or has_stand_ins(ids):
            return self
        before = decode(self.before)
        here, there = decode([*self.before, *self.here]), decode([*self.before, *self.there])
        start = len(before) if here.startswith(before) and there.startswith(before) else _agreed_characters(here, there)
        cause = self.cause or _cause_in(here, there, start)
        while start and cause != "tokenisation" and here[start - 1] not in _APART and len(before) - start < 12:
            start -= 1  # whole words are easier to read
        here, there = _until_alike(here[start:], there[start:])
        return replace(self, cause=cause, here_text=_short(here), there_text=_short(there))


def find_divergence(
    store: AttentionStore, root: Key, ids: np.ndarray, spans: Sequence[Span], session: str | None, bos: int | None
) -> Divergence | None:
    """Where the conversation `ids` `[tokens]` parts from its session, or from the text that agrees with it furthest.

    Args:
        root: of the model's chains.
        spans: where the KV of its first tokens is, as far as any is known.
        session: its name, if it has one; the store may not know it.
        bos: the id with which texts of the model begin.

    Returns:
        None where it goes on after all that is known, or nothing is.
    """
    manifest = store.latest_manifest(session) if session is not None else None
    if manifest is not None and manifest.spans:
        return _from_session(store, ids, spans, manifest, session)
    agreed = total_tokens(spans)
    if not agreed:
        return _from_moved(store, root, ids, bos)
    last = spans[-1]
    key, start = (last.block, last.stop) if last.stop < last.block_tokens else (store.follower(last.block), 0)
    there = _ids_of(store, SpanRow(key, start, store.block_size)) if key is not None else None
    return _described(ids, agreed, there, store.session_with(key)) if key is not None and there is not None else None


def _from_session(
    store: AttentionStore, ids: np.ndarray, spans: Sequence[Span], manifest: Manifest, session: str | None
) -> Divergence | None:
    known = {span.block: span for span in spans}
    position = read = 0
    for number, row in enumerate(manifest.spans):
        span = known.get(row.block)
        if span is not None and (span.first, span.start) == (position, row.start) and span.stop >= row.stop:
            position += row.stop - row.start
            continue
        read += bool(row.block)
        theirs = _ids_of(store, row) if read <= _MOST_READ else None
        if theirs is None:
            return replace(_described(ids, position, ids[:0], session), cause="unreadable") if read <= 1 else None
        agreed = common_prefix(theirs, ids[position:])
        position += agreed
        if agreed < len(theirs):
            theirs = theirs[agreed:]
            if len(theirs) < _SHOWN and number + 1 < len(manifest.spans):
                more = _ids_of(store, manifest.spans[number + 1])
                theirs = np.concatenate([theirs, more]) if more is not None else theirs
            return _described(ids, position, theirs, session) if position < len(ids) else None
    if position < min(manifest.length, len(ids) - 1):
        return replace(_described(ids, position, ids[:0], session), cause="gone")
    return None


def _from_moved(store: AttentionStore, root: Key, ids: np.ndarray, bos: int | None) -> Divergence | None:
    """A text that is the same but for its first token."""
    moved = [ids[1:]] if bos is None else [ids[1:], np.concatenate([[bos], ids])]
    for other in moved:
        nearest = store.nearest(root, other[: store.block_size].tolist())
        if nearest is not None and nearest.common > _ALIKE:
            there = _ids_of(store, SpanRow(nearest.key, 0, nearest.token_count))
            found = _described(ids, 0, there, store.session_with(nearest.key)) if there is not None else None
            return found if found is None or found.cause else None
    return None


def _ids_of(store: AttentionStore, row: SpanRow) -> np.ndarray | None:
    """The ids of a run of tokens; None where they can't be read."""
    if not row.block:
        return decode_tokens(row.dropped)
    found = store.describe_block(row.block)
    return found[1][row.start : row.stop] if found is not None else None


def _described(ids: np.ndarray, agreed: int, theirs: np.ndarray, session: str | None) -> Divergence:
    here = tuple(ids[agreed : agreed + _SHOWN].tolist())
    there = tuple(theirs[:_SHOWN].tolist())
    before = tuple(ids[max(agreed - _BEFORE, 0) : agreed].tolist())
    moved = agreed <= 1 and (_is_moved(here, there) or _is_moved(there, here))
    return Divergence(agreed, len(ids), session, here, there, before, "first token" if moved else "")


def _is_moved(longer: tuple[int, ...], shorter: tuple[int, ...]) -> bool:
    """Whether one is the other with a token before it."""
    count = min(len(longer) - 1, len(shorter), 2 * _ALIKE)
    return count >= _ALIKE and longer[1 : count + 1] == shorter[:count]


def _cause_in(here: str, there: str, start: int) -> Cause:
    """What two texts show that begin to differ, in tokens, at character `start`."""
    count = min(len(here), len(there))
    if count > start and here[start : count - 1] == there[start : count - 1] and count - start > _ALIKE:
        return "tokenisation"
    if bool(_REASONING.search(here[start : start + _CHARACTERS])) != bool(
        _REASONING.search(there[start : start + _CHARACTERS])
    ):
        return "reasoning"
    near = slice(max(start - _CHARACTERS // 2, 0), start + _CHARACTERS // 2)
    differ = _agreed_characters(here, there)
    digits = any(text[differ : differ + 1].isdigit() for text in (here, there))
    names = any(_DATE.match(text[_word_begin(text, differ) :]) for text in (here, there))
    return "date" if (digits or names) and _DATE.search(here[near]) and _DATE.search(there[near]) else ""


def _word_begin(text: str, place: int) -> int:
    while place and text[place - 1].isalnum():
        place -= 1
    return place


def _agreed_characters(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _until_alike(a: str, b: str) -> tuple[str, str]:
    """The beginnings of two texts up to the first word from which on they are alike again, that word included."""
    words, others = re.findall(r"\S+\s*", a), re.findall(r"\S+\s*", b)
    places = [(i + j, i, j) for i in range(len(words) - 1) for j in range(len(others) - 1)]
    for _, i, j in sorted(places):
        if words[i : i + 2] == others[j : j + 2] and i + j:
            return "".join(words[: i + 1]).rstrip(), "".join(others[: j + 1]).rstrip()
    return a, b


def _short(text: str) -> str:
    return text if len(text) <= _CHARACTERS else text[: _CHARACTERS - 1] + "…"
