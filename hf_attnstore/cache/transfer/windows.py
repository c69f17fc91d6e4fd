"""Windows of sliding layers as blocks of their own: which of them are kept, where they are, and saving them.

What follows a text needs all of it in the layers with full attention, and in those with a sliding window the last
`window - 1` tokens. So where a store keeps windows apart a block has nothing of sliding layers: what these have of its
tokens is another one, named by it, which follows it and is let go when no turn will need it.
"""

from collections.abc import Callable, Iterable, Sequence

from ...session.chain import TokenChain
from ...session.spans import Span, overlapping
from ...store.blocks.block import BlockMeta
from ...store.blocks.keys import Key, window_key, window_root
from ...store.store import AttentionStore
from ..layers.by_token import SlidingLayer
from ..layers.kept import KeptLayer
from .save import BlockSaver


def sliding_layers(layers: Sequence[KeptLayer]) -> list[int]:
    """The numbers of the layers whose windows can be kept apart: none where a layer keeps a running state, which is
    right for one number of tokens only."""
    if any(layer.has_state or not layer.reusable for layer in layers):
        return []
    return [number for number, layer in enumerate(layers) if type(layer) is SlidingLayer]


def whole_until(
    length: int,
    spans: Sequence[Span],
    missing_from: Callable[[int], int],
    there: Callable[[Sequence[Key]], Iterable[Key]],
    secret: bytes,
) -> int:
    """The longest beginning, of at most `length` tokens, that sliding layers can go on after.

    Args:
        spans: where the beginning is.
        missing_from: position from which they need their KV from blocks, to go on after so many tokens.
        there: which of some blocks there are.
    """
    while length > 0:
        needed = {window_key(s.block, secret): s.first for s in overlapping(spans, missing_from(length), length)}
        lacking = needed.keys() - set(there(list(needed)))
        if not lacking:
            return length
        length = max(needed[key] for key in lacking)
    return 0


class _WindowSaver(BlockSaver):
    """Saves what sliding layers have of the blocks of a chain that are within reach."""

    def __init__(
        self, layers: Sequence[KeptLayer], numbers: Sequence[int], chain: TokenChain, store: AttentionStore, model: str
    ) -> None:
        super().__init__(layers, chain, store, model, numbers=numbers)
        self._sliding = [layers[number] for number in numbers]
        self._reach = max(layer.window or 1 for layer in self._sliding) - 1
        self._every = store.windows_every

    def begin_turn(self, in_store: int, tail: tuple[int, Key] | None, refill: frozenset[int] = frozenset()) -> None:
        first = min((layer.first for layer in self._sliding if layer.rows), default=0)
        super().begin_turn(min(first, in_store), tail)

    def keeps(self, block: int, end: int) -> bool:
        """Whether the windows of a block are kept where turns may go on after `end` tokens."""
        start, stop = self._chain.bounds(block)
        if self._every is None or stop > end - self._reach:
            return True
        return self._every > 0 and stop > (start // self._every + 1) * self._every - self._reach

    def _key(self, block: int) -> Key:
        return window_key(self._chain.key(block), self._store.secret)

    def _in_store(self, block: int) -> bool:
        """Whether nothing is to be done for a block: what is out of reach, or has left the layers, is not missed."""
        start, _ = self._chain.bounds(block)
        away = any(layer.first > start for layer in self._sliding)
        return away or not self.keeps(block, len(self._chain)) or super()._in_store(block)

    def _meta(self, block: int) -> BlockMeta:
        of = self._chain.key(block)
        return BlockMeta(
            key=self._key(block),
            parent=window_root(of, self._store.secret),
            fingerprint=self._fingerprint,
            start=self._chain.bounds(block)[0],
            tokens=self._chain.tokens(block),
            continues=of,
            codec=self._store.codec,
        )


class SplitSaver(BlockSaver):
    """Saves blocks without their sliding layers, and windows beside them."""

    def __init__(
        self,
        layers: Sequence[KeptLayer],
        sliding: Sequence[int],
        chain: TokenChain,
        store: AttentionStore,
        fingerprint: str,
        continues: Key = b"",
    ) -> None:
        others = [number for number in range(len(layers)) if number not in set(sliding)]
        super().__init__(layers, chain, store, fingerprint, continues, others)
        self._windows = _WindowSaver(layers, sliding, chain, store, fingerprint)
        self._began_at = 0

    def begin_turn(self, in_store: int, tail: tuple[int, Key] | None, refill: frozenset[int] = frozenset()) -> None:
        self._began_at = len(self._chain)
        self.kept = self.let_go = ()
        super().begin_turn(in_store, tail, refill)
        window = (tail[0], window_key(tail[1], self._store.secret)) if tail is not None else None
        self._windows.begin_turn(in_store, window)

    def hold(self) -> None:
        super().hold()
        self._windows.hold()

    def crop(self, tokens: int) -> None:
        super().crop(tokens)
        self._windows.crop(tokens)

    @property
    def unfit_from(self) -> int | None:
        found = [at for at in (super().unfit_from, self._windows.unfit_from) if at is not None]
        return min(found, default=None)

    def release(self) -> None:
        super().release()
        self._windows.release()

    def begin_forward(self, full_blocks: int) -> None:
        super().begin_forward(full_blocks)
        self._windows.begin_forward(full_blocks)
        self.due = self.due or self._windows.due

    def layer_done(self, number: int) -> None:
        if number in self._numbers:
            super().layer_done(number)
        else:
            self._windows.layer_done(number)

    def end_forward(self) -> None:
        super().end_forward()
        self._windows.end_forward()

    def finish(self, tokens: int, prompt: int = 0) -> int:
        """Returns the number of leading tokens that the store has, windows aside.

        Windows stay that are needed to go on where the turn's prompt ends, so that it can be answered again, and where
        it began, if that is not more than a block before.
        """
        saved = super().finish(tokens)
        windows, chain = self._windows, self._chain
        windows.finish(saved)
        if windows.unfit_from is not None:
            saved = min(saved, windows.unfit_from)
        end = min(prompt or saved, saved)
        if 0 <= end - self._began_at <= chain.block_size:
            end = self._began_at
        blocks = range(chain.block_at(saved - 1) + 1) if saved > chain.base else ()
        keys = [(chain.key(block), windows.keeps(block, end)) for block in blocks]
        self.kept = [window_key(key, self._store.secret) for key, kept in keys if kept]
        self.let_go = [*(key for key, kept in keys if not kept), *self._superseded]
        self.saved_bytes += windows.saved_bytes
        self.seconds += windows.seconds
        return saved
