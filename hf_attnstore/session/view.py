"""Views: which part of a conversation is in the window, and where the KV of its beginning comes from.

Positions in the view count the tokens in the window; logical positions count those of the whole conversation,
dropped ones included. A view that has dropped nothing is plain: both are the same.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from ..store.blocks.keys import Key, cut_root
from .chain import common_prefix
from .spans import Span, crop, overlapping, total_tokens

_NONE = np.empty(0, dtype=np.int64)
_ALL = np.empty(0, dtype=bool)


@dataclass(frozen=True, eq=False)
class View:
    """What of a conversation is in the window. Immutable.

    The KV of the first tokens in view, `prefix`, was made at other positions and beside tokens that are gone. What
    is computed after it depends on it, so its blocks are a chain of their own, whose root names the prefix.
    """

    model_root: Key
    """The root of the model's untruncated chains."""
    root: Key
    """The root of the chain that goes on where `prefix` ends."""
    prefix: tuple[Span, ...] = ()
    ids: np.ndarray = field(default_factory=lambda: _NONE)
    """The conversation's first tokens `[tokens]`, dropped ones included, as far as the view depends on them."""
    kept: np.ndarray = field(default_factory=lambda: _ALL)
    """Whether each of `ids` is in view."""
    secret: bytes = b""
    """Keys the digests of roots."""

    @classmethod
    def plain(cls, root: Key, secret: bytes = b"") -> "View":
        """The view of a conversation of which nothing was dropped."""
        return cls(root, root, secret=secret)

    def as_plain(self) -> "View":
        """The view of the same model's conversations of which nothing was dropped."""
        return View.plain(self.model_root, self.secret)

    @property
    def base(self) -> int:
        """Tokens in `prefix`: where the chain begins, as a position in the view."""
        return total_tokens(self.prefix)

    @property
    def dropped(self) -> int:
        """Number of tokens that are not in view."""
        return len(self.kept) - self.settled

    @property
    def is_plain(self) -> bool:
        return not len(self.ids)

    def same(self, other: "View") -> bool:
        """Whether KV that belongs to one belongs to the other."""
        return (
            self.root == other.root
            and self.prefix == other.prefix
            and np.array_equal(self.ids, other.ids)
            and np.array_equal(self.kept, other.kept)
        )

    def agreement(self, ids: np.ndarray) -> int:
        """Number of leading tokens of a conversation that this view knows of."""
        return common_prefix(self.ids, ids)

    def in_view(self, ids: np.ndarray) -> np.ndarray:
        """The tokens of a conversation that are in view; it must begin with `self.ids`."""
        return np.concatenate([self.ids[self.kept], ids[len(self.ids) :]])

    def whole(self, in_view: np.ndarray) -> np.ndarray:
        """The conversation whose tokens in view are these: the opposite of `in_view`."""
        return np.concatenate([self.ids, in_view[self.settled :]])

    def logical(self, position: int) -> int:
        """How many tokens of the conversation come before a position in the view, dropped ones included; those
        dropped right before it not."""
        inside = np.flatnonzero(self.kept)
        if position >= len(inside):
            return position + self.dropped
        return int(inside[position - 1]) + 1 if position else 0

    def position(self, logical: int) -> int:
        """How many of the conversation's first `logical` tokens are in view."""
        return int(np.count_nonzero(self.kept[:logical])) + max(logical - len(self.kept), 0)

    def cropped(self, logical: int) -> "View":
        """The view of a conversation that agrees in its first `logical` tokens only."""
        if logical >= len(self.ids):
            return self
        shorter = replace(self, ids=self.ids[:logical], kept=self.kept[:logical])
        if not shorter.dropped:
            shorter = replace(shorter, ids=_NONE, kept=_ALL)
        return shorter.rebased(shorter.settled if shorter.ids.size else 0)

    def rebased(self, tokens: int) -> "View":
        """The same tokens in view, but only the first `tokens` with KV from the prefix."""
        if tokens >= self.base:
            return self
        return self.put_together(crop(self.prefix, tokens))

    def without(self, low: int, high: int, ids: np.ndarray, known: Sequence[Span], *, movable: bool) -> "View":
        """The view after positions `[low, high)` were dropped.

        Args:
            ids: the whole conversation, which this view agrees with.
            known: where the KV of the first tokens in view is.
            movable: whether KV can be moved to other positions; if not, what follows is to be computed again.
        """
        length = max(len(self.ids), self.logical(max(high, total_tokens(known) if movable else 0)))
        kept = np.ones(length, dtype=bool)
        kept[: len(self.kept)] = self.kept
        kept[np.flatnonzero(kept)[low:high]] = False
        gone = high - low
        before = list(overlapping(known, 0, low))
        after = [
            span._replace(first=span.first - gone, shift=span.shift - gone)
            for span in overlapping(known, high, total_tokens(known))
        ]
        view = replace(self, ids=np.array(ids[:length], dtype=np.int64), kept=kept)
        if not movable:
            return view.put_together([])
        if not after and self.root == self.model_root:
            return view.put_together([])  # nothing has moved: what is kept is the beginning of a plain chain
        return view.put_together([*before, *after])

    def put_together(self, prefix: Sequence[Span]) -> "View":
        """The same tokens in view, with the KV of the first ones from `prefix`, and a root that names it."""
        parts = [(span.block, span.start, span.stop) for span in prefix]
        root = cut_root(self.model_root, parts, self.secret) if parts else self.model_root
        return replace(self, prefix=tuple(prefix), root=root)

    @property
    def settled(self) -> int:
        """How many tokens in view the view depends on: what comes after them may differ."""
        return int(np.count_nonzero(self.kept))

    def shape(self) -> int:
        """A number that tells views apart by what they show and how it is put together, not by where that lies."""
        parts = [(span.first, span.last, span.shift) for span in self.prefix]
        told = hashlib.blake2b(repr(parts).encode() + self.kept.tobytes() + self.ids.tobytes(), digest_size=7)
        return int.from_bytes(told.digest())

    def runs(self) -> list[tuple[int, int, bool]]:
        """The runs `[start, stop)` of `ids` that are all in view, or all dropped."""
        if not len(self.kept):
            return []
        edges = [0, *(np.flatnonzero(np.diff(self.kept)) + 1).tolist(), len(self.kept)]
        return [(a, b, bool(self.kept[a])) for a, b in pairwise(edges)]
