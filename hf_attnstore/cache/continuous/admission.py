"""What the store knows of a prompt that waits, and its way into memory while others are served."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from ...errors import AttentionStoreError
from ...session.matching import match_prefix
from ...session.spans import Span, total_tokens
from ...store.blocks.block import Block, Match
from ...store.blocks.keys import Key
from ...store.store import AttentionStore
from ..divergence import WORTH, Divergence, find_divergence

logger = logging.getLogger("hf_attnstore")

PATIENCE = 10.0
"""Seconds that a prompt waits for what is on its way, before it is computed."""


class _Resident:
    """What a store has in memory, for `match_prefix`: nothing is waited for."""

    def __init__(self, store: AttentionStore) -> None:
        self.secret, self._store = store.secret, store

    def known(self, keys: Sequence[Key]) -> int:
        return next((n for n, key in enumerate(keys) if self._store.resident(key) is None), len(keys))

    def nearest(self, parent: Key, ids: Sequence[int]) -> Match | None:
        found = self._store.nearest(parent, ids, resident=True)
        return found if found is not None and self._store.resident(found.key) is not None else None

    def latest_checkpoint(self, parents: Sequence[Key], ids: Sequence[np.ndarray]) -> None:
        """Nobody asks: such models are not served."""


class Known:
    """What a store knows of a prompt. Found out at once where all that is known is in memory, else beside who computes.

    Args:
        ids: those of the prompt whose KV may be there already.
        root: of the model and the namespace; empty where nothing is to be reused.
        bos: the id with which texts of the model begin.
        asked: how many requests had ended then: each may have made more known.
        when_over: called when there is nothing to wait for any more, by any thread.
    """

    def __init__(
        self,
        store: AttentionStore,
        ids: np.ndarray,
        root: Key,
        bos: int | None,
        asked: int,
        when_over: Callable[[], object],
    ) -> None:
        self.store, self.asked = store, asked
        self.spans: list[Span] = []
        """Where the KV of the prompt's beginning is."""
        self.blocks: dict[Key, Block] = {}
        """Those of them that are there, in order."""
        self.tiers: dict[Key, str] = {}
        """Those that were not in memory, by where they were."""
        self.diverged: Divergence | None = None
        """Where it parts from the text that agrees with it furthest, if much is new."""
        self._ids, self._root, self._bos, self._when_over = ids, root, bos, when_over
        self._over, self._given_up = threading.Event(), False
        self._until = time.monotonic() + PATIENCE
        self.fetched = bool(root) and not self._all_resident()
        """Whether something had to be waited for."""
        if self.fetched:
            store.fetching(self._fetch)
        else:
            self._over.set()

    def _all_resident(self) -> bool:
        """Finds what is in memory. False where there may be more than that, but for a part of a block."""
        size = self.store.block_size
        spans = match_prefix(self._ids, self._root, size, _Resident(self.store))
        if len(self._ids) - total_tokens(spans) >= size or len(spans) * size < len(self._ids):
            return False
        self.spans = spans
        for span in spans:
            block = self.store.resident(span.block)
            if block is not None:
                self.blocks[span.block] = block
        return True

    def _fetch(self) -> None:
        try:
            store = self.store
            spans = match_prefix(self._ids, self._root, store.block_size, store)
            keys = [span.block for span in spans]
            self.tiers = {key: store.tier_of(key) for key in keys if store.resident(key) is None}
            self.spans = spans
            for block in store.bring(keys):
                if self._given_up:
                    return
                block.wait_ready()
                self.blocks[block.meta.key] = block
            if len(self._ids) - total_tokens(spans) >= WORTH:
                self.diverged = find_divergence(store, self._root, self._ids, spans, None, self._bos)
        except AttentionStoreError as error:  # the store has said what it is; the rest is computed
            logger.debug("a prompt is not fetched: %s", error)
        except Exception:
            logger.warning("a prompt can't be fetched, it is computed", exc_info=True)
        finally:
            self._over.set()
            self._when_over()

    @property
    def is_awaited(self) -> bool:
        """Whether it is worth waiting for what is on its way."""
        return self.is_late and time.monotonic() < self._until

    @property
    def is_late(self) -> bool:
        """Whether something is on its way still."""
        return not self._over.is_set()

    def at_hand(self) -> list[tuple[Span, Block]]:
        """The first of the spans whose blocks are there, with them."""
        found: list[tuple[Span, Block]] = []
        for span in self.spans:
            block = self.blocks.get(span.block)
            if block is None:
                break
            found.append((span, block))
        return found

    def give_up(self) -> None:
        """Nobody waits for it any more."""
        self._given_up = True
