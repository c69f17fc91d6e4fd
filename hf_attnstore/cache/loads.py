"""What a cache loads: finding its tokens in the store, bringing them into its layers, and back again after a crop."""

import time
from collections.abc import Sequence
from itertools import takewhile

import numpy as np

from ..errors import CacheUseError, LoadError
from ..session.matching import match_checkpoint, match_prefix
from ..session.spans import Span, crop, total_tokens
from ..session.view import View
from .content import CacheContent
from .layers.by_token import KeptLayer, SlidingLayer
from .transfer.load import Checkpoint, Restore, plan_restore, resident_from


class CacheLoads(CacheContent):
    """A cache that gets what it is to hold from the store."""

    def _find(self, view: View, ids: np.ndarray) -> list[Span]:
        """Where the KV of the first tokens is, of those in `view`."""
        if self._store is None or not len(ids):
            return []
        failures = self._store.failures
        there = takewhile(lambda span: self._store is not None and self._store.has(span.block), view.prefix)
        spans = crop(there, len(ids))
        if total_tokens(spans) == view.base < len(ids):
            spans += match_prefix(ids, view.root, self._chain.block_size, self._store, view.base)
        if self._store.failures != failures:  # the store has said what and why
            self._stats.recomputed = "a load failed, its tokens are computed again: a block could not be read"
            self._stats.missed = "load failed"
        return spans

    def _find_checkpoint(self, ids: np.ndarray) -> Checkpoint | None:
        """The longest checkpoint of a text that is in the view's chain."""
        if self._store is None or not len(ids):
            return None
        found = match_checkpoint(ids, self._view.root, self._chain.block_size, self._store, self._view.base)
        return Checkpoint(*found) if found is not None else None

    def _covers(self, length: int, spans: Sequence[Span]) -> bool:
        """Whether the layers hold, or the spans have, all that is needed to go on at `length`."""
        whole_from = self._whole_from(length)
        return all(
            resident_from(layer, length, whole_from) >= length or total_tokens(spans) >= length for layer in self.layers
        )

    def _plan(self, spans: Sequence[Span], length: int, checkpoint: Checkpoint | None = None) -> Restore | None:
        if self._states and checkpoint is None and self._states_at != length:
            raise AssertionError("nothing brings the running states")
        if checkpoint is not None:
            self._states_at = None  # until it is certain that the load begins
        if self._store is None:
            for layer in self.layers:
                layer.crop_to(length)
            return None
        attachment = self._attachment
        geometry = None
        if any(span.shift for span in crop(spans, length)):
            geometry = attachment.geometry(self._model, self._fingerprint, self._store)
        whole_from = self._whole_from(length)
        began = time.perf_counter()
        restore = plan_restore(
            self.layers, attachment.devices, spans, length, whole_from, self._store, attachment.pace, geometry,
            checkpoint,
        )  # fmt: skip
        if restore is not None:
            restore.planning_seconds = time.perf_counter() - began
        self._states_at = length
        if checkpoint is not None:
            self._checkpoints[length] = checkpoint.key
        self._stats.rotated_tokens = restore.rotated_tokens if restore is not None else 0
        return self._watched(restore)

    def _watched(self, restore: Restore | None) -> Restore | None:
        """A load as it is to be: recorded, begun in another way."""
        if restore is not None:
            restore.recorder, restore.begin = self._recorder, self.begin_load
        return restore

    def _finish_restore(self) -> None:
        restore, self._restore = self._restore, None
        if restore is None:
            return
        try:
            restore.finish()
        except BaseException:
            self._clear()
            raise
        else:
            self._gate.loaded(restore)
        finally:
            self._stats.add_load(restore.load.stats, restore.exposed_seconds)
        self._from_disk = restore.load.from_disk

    def _settle(self, *, keep_load: bool = False) -> None:
        """Puts the cache into a consistent state whatever happened: every layer holds the tokens of all complete
        forwards and nothing else."""
        self._forward = None
        if self._restore is not None and not keep_load:
            try:
                self._finish_restore()
            except LoadError as error:
                self._note(f"a load failed, its tokens are computed again: {error}", "load failed")
                self._clear()
                return
        if self._uneven:
            return
        if any(layer.length != self._held for layer in self.layers):
            self._crop_to(min(self._held, *(layer.length for layer in self.layers)))
        elif len(self._chain) > self._held:
            self._chain.crop(self._held)
            if self._saver is not None:
                self._saver.crop(self._held)

    def _crop_to(self, length: int) -> None:
        if all(resident_from_window(layer, length) for layer in self.layers):
            self._step_back(length)
            for layer in self.layers:
                layer.crop_to(length)
        else:
            self._reload(length)
        self._held = length
        if length < self._view.settled:
            self._change_view(self._view.cropped(self._view.logical(length)), self._chain.ids[:length])
        self._chain.crop(length)
        if self._saver is not None:
            self._saver.crop(length)

    def _reload(self, length: int) -> None:
        """What layers would need at `length`, a window or a running state, they have let go: gets it back from the
        store.

        Raises:
            CacheUseError: the store does not have it.
        """
        ids = self._chain.ids[:length]
        spans = crop(self._find(self._view, ids), length)
        checkpoint = self._find_checkpoint(ids) if self._states and self._states_at != length else None
        if checkpoint is not None and checkpoint.tokens != length:
            checkpoint = None
        if not self._covers(length, spans) or (self._states and self._states_at != length and checkpoint is None):
            what = "a running state" if self._states else "the window before it"
            raise CacheUseError(
                f"can't go back to {length} tokens: a layer does not hold {what} any more and the store does not have "
                "it; call activate_past_recording() before, or reset()"
            )
        try:
            self._restore = self._plan(spans, length, checkpoint)
            self._finish_restore()
        except BaseException:
            self._clear()
            raise


def resident_from_window(layer: KeptLayer, length: int) -> bool:
    """Whether a layer can be cropped to `length` with what it holds."""
    return not isinstance(layer, SlidingLayer) or layer.has_window(length)
