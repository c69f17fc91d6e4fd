"""What a cache holds: tokens in its layers, where their KV comes from, and how it changes."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import numpy as np
import torch
from torch import nn

from ..errors import CacheUseError, LoadError
from ..session.chain import TokenChain, common_prefix
from ..session.manifests import read_manifest
from ..session.matching import match_checkpoint, match_prefix
from ..session.spans import Span, crop, total_tokens
from ..session.view import View
from ..session.window import Window
from ..store.keys import Key, chain_root
from ..store.locks import SessionLock
from ..store.manifest import Manifest
from ..store.parts import part_name
from ..store.store import AttentionStore
from .attach import Attachment
from .checkpoints import take_checkpoint
from .compiled import OutsideGraphsCache
from .continuing import Continues
from .gate import Choice
from .gating import Gate, lengths_between
from .kinds import granularity
from .layers import KeptLayer, SlidingLayer
from .modalities import Content, last_stand_in
from .overlap import Overlap
from .ranks import Ranks
from .recording import TurnRecorder
from .restore import Checkpoint, Restore, plan_restore, resident_from
from .saver import BlockSaver
from .states import RunningState
from .stats import TurnStats
from .truncation import choose_view

logger = logging.getLogger("hf_attnstore")

_UNKNOWN = "unknown"
_MAX_PLANS = 8
_MAX_CHECKPOINTS = 3
"""How many checkpoints of a text are considered: the longest, then each of clearly fewer tokens than the one before."""


@dataclass(frozen=True)
class Forward:
    """A forward that is running: so many new tokens in so many rows."""

    count: int
    rows: int
    thread: int


class CacheContent(OutsideGraphsCache):
    """A cache that holds tokens of a conversation, seen through a view, and can load more of them.

    What it counts as held, its layers, the chain of ids and what is being saved agree after every method.
    """

    layers: list[KeptLayer]  # type: ignore[assignment]
    session: str | None
    _ranks: Ranks
    _model: nn.Module
    _given_model: nn.Module
    """The model as it was given: with PEFT's wrapper, if it has one."""
    _attachment: Attachment
    _store: AttentionStore | None
    _saving: bool
    _wait: float
    _limit: int | None
    _window: Window | None
    _checkpoint_every: int | None
    _gate: Gate
    record_timeline = False
    """Whether turns are recorded, from the next one on: see `timeline`."""
    overlap = Overlap()
    _recorder: TurnRecorder | None = None

    def _prepare_empty(self) -> None:
        self._busy = threading.Lock()
        self._guard = threading.RLock()
        """Held while the state changes: `store.flush()` in another thread must find it whole."""
        self._fingerprint = _UNKNOWN
        self._view = View.plain(chain_root(_UNKNOWN, ""))
        self._chain = TokenChain(self._view.root, self._store.block_size if self._store else 256)
        self._saver: BlockSaver | None = None
        self._held = 0
        self._in_store = 0
        """How many leading tokens of the turn's prompt the store had when it began."""
        self._conversations = 1
        """How many conversations there are; a forward may have several rows of each (beams, samples)."""
        self.granularity = granularity(self.layers)
        """What can be reused of a text: up to any `token`, up to a `checkpoint`, or nothing (`none`)."""
        self._states = [layer for layer in self.layers if isinstance(layer, RunningState)]
        self._uneven = False
        """Whether layers hold other numbers of tokens than they were fed: then nothing is known of what they hold."""
        self._states_at: int | None = 0
        """The number of tokens that the layers' running states are right for; None if for none, after an interrupt."""
        self._checkpoints: dict[int, Key] = {}
        """Checkpoints that were taken or used, by their number of tokens."""
        self._untracked = ""
        self._forward: Forward | None = None
        self._restore: Restore | None = None
        self._from_disk: list[Key] = []
        self._went_on_from: Key | None = None
        """The last block that the turn reused."""
        self._known = 0
        """The tokens of the turn's prompt that the store has; fewer are reused where computing them is faster."""
        self._computes_known = False
        """Whether that is so in this turn."""
        self._in_turn = False
        self._turn_thread = 0
        self._checked = False
        self._changed = False
        self._speculating = False
        self._confirmed = 0
        self._prompt: np.ndarray | None = None
        """The tokens of the prompt that are in view, where the caller vouches for what will be fed."""
        self._prompt_tokens = 0
        self._stops: list[int] = []
        self._continues: Continues = "parts"
        self._content: Content | None = None
        """What of the conversation's beginning is not text; None if all of it is, or nothing is known of that."""
        self._reopening = False
        self._lock: SessionLock | None = None
        self._stats = TurnStats()

    @property
    def _kept_as(self) -> str | None:
        """The name of the session in the store: on further ranks of a tensor-parallel model, of their part of it."""
        return part_name(self.session, self._ranks.rank) if self.session is not None else None

    @property
    def rows(self) -> int:
        """The batch size of what is held; 0 if nothing is."""
        return max((layer.rows for layer in self.layers), default=0)

    def _choose_view(self, ids: np.ndarray, limit: int, new_tokens: int) -> View:
        plain = self._view.as_plain()
        if self._window is None or not self._window.overflows(len(ids), new_tokens):
            return plain
        manifest = None
        name = self._kept_as
        if self._store is not None and name is not None:
            manifest = self._store.latest_manifest(name)
        views = [self._view]
        if self._store is not None and manifest is not None:
            describe = partial(self._store.describe_block, fingerprint=self._fingerprint)
            views.append(read_manifest(manifest, plain, describe))
        own = common_prefix(self._view.whole(self._chain.ids), ids)
        history = max(own, self._old_tokens(name, manifest, ids))
        find = self._find if not self._untracked else lambda view, ids: []
        choose = partial(choose_view, ids, limit, new_tokens, self._window, plain)
        if self._ranks.alone:
            return choose(views, find, history, self._can_move_keys)
        history = -self._ranks.least(-history)  # what one of them remembers is not new
        movable = self._can_move_keys()  # by a forward of all ranks, perhaps: not only where one finds that it matters
        view = self._ranks.attempt(partial(choose, views, find, history, lambda: movable))
        if self._ranks.same(view.shape()):
            return view
        # what the ranks know of it differs: none makes use of it
        return choose([plain], lambda view, ids: [], history, lambda: False)

    def _old_tokens(self, name: str | None, manifest: Manifest | None, ids: np.ndarray) -> int:
        """How many of a conversation's leading tokens its session had before, though their KV may be gone."""
        if self._store is None or name is None or manifest is None:
            return 0
        kept = np.asarray(self._store.tokens(name, dropped=True), dtype=np.int64)
        agreed = common_prefix(kept, ids)
        # where all that is there agrees, so did the rest; a prompt that differs somewhere is new from there on
        return manifest.length if agreed == len(kept) else agreed

    def _can_move_keys(self) -> bool:
        geometry = self._attachment.geometry(self._model, self._fingerprint, self._store, self._ranks)
        if not geometry.movable:
            self._note(
                f"kept keys can't be moved, so their tokens are computed again: {geometry.refused}", "keys not movable"
            )
        return geometry.movable

    def _see_through(self, view: View) -> None:
        """From now on the cache holds what is in `view`; KV that belongs to another is let go."""
        if not view.same(self._view):
            for layer in self.layers:
                layer.reset()
            self._held = self._states_at = 0
            self._change_view(view, np.empty(0, dtype=np.int64))

    def _change_view(self, view: View, ids: np.ndarray) -> None:
        """Sets the view, where the layers hold the tokens `ids` of it."""
        self._view = view
        self._checkpoints = {}
        self._chain = TokenChain(view.root, self._chain.block_size, ids, view.base, view.secret)
        if self._saver is not None:
            self._saver.release()
        self._saver = None
        if self._store is not None and self._saving:
            continues = view.prefix[-1].block if view.prefix else b""
            self._saver = BlockSaver(self.layers, self._chain, self._store, self._fingerprint, continues)

    def _take_up(self, ids: np.ndarray, limit: int) -> tuple[int, list[Span]]:
        """Gets as much of `ids` as possible into the layers: keeps what is there, loads what is known."""
        if self._untracked:
            self._clear()
            return 0, []
        if self.rows > 1:
            self.batch_select_indices(torch.tensor([0]))
        own = self._whole(min(common_prefix(self._chain.ids, ids), limit))
        self._drop_from(own)
        for _ in range(_MAX_PLANS):
            spans = crop(self._find(self._view, ids[:limit]), limit)
            known = self._whole(total_tokens(spans))
            spans = crop(spans, known)
            length = max(own, known)
            if own > known and not self._covers(own, spans):
                length = known  # a sliding layer has let go of what it would need to stay at `own`
            self._stats.matched_tokens = length
            choice = None
            self._computes_known = False
            try:
                checkpoint = None
                if self._states:
                    length, checkpoint = self._choose_states(ids[:length], own, spans)
                if limit < len(ids):  # else all is wanted here, and not for the sake of what comes after
                    length, checkpoint, choice = self._load_or_compute(ids, own, spans, length, checkpoint)
                if length == 0:
                    self._clear()
                    return 0, spans
                self._held = length
                self._restore = self._plan(spans, length, checkpoint)
                if self._restore is not None:
                    self._gate.look_ahead(self._restore, choice, len(self.layers))
                    self._restore.start()
                return length, spans
            except LoadError as error:
                self._note(f"a load failed, its tokens are computed again: {error}", "load failed")
                self._clear()
                own = 0
        self._clear()
        return 0, []

    def _load_or_compute(
        self, ids: np.ndarray, own: int, spans: Sequence[Span], length: int, checkpoint: Checkpoint | None
    ) -> tuple[int, Checkpoint | None, Choice | None]:
        """How much of the `length` known tokens of `ids` to reuse: as much as is faster to load than to compute.

        What the layers hold is free. Keys that were moved are always loaded, since computing them again would not give
        the same, and so is all up to the last picture, whose encoder takes nobody knows how long.
        """
        store = self._store
        if store is None or not self._gate.enabled or not self._ranks.alone or not length:
            return length, checkpoint, None
        floor = min(max(self._view.base, last_stand_in(ids[:length])), length)
        found: dict[int, Checkpoint] = {}
        if self._states:
            resident = self._states_at or 0
            lengths = [resident if resident <= own and self._covers(resident, spans) else 0]
            shorter = checkpoint
            while shorter is not None and shorter.tokens > lengths[0]:
                found[shorter.tokens] = shorter
                again = self._gate.can_choose() and len(found) < _MAX_CHECKPOINTS
                shorter = self._find_checkpoint(ids[: shorter.tokens * 3 // 4]) if again else None
            lengths = sorted({n for n in (*lengths, *found) if n >= floor} | {length})
        else:
            floor = max(floor, own if self._covers(own, spans) else 0)
            lengths = sorted({self._whole(n) for n in lengths_between(floor, length, spans)} | {length})
        if len(lengths) < 2:
            return length, checkpoint, None
        choice = self._gate.choose(
            self.layers,
            lengths,
            spans,
            len(ids),
            self._whole_from,
            store.tier_of,
            {tokens: point.key for tokens, point in found.items()},
        )
        self._stats.gate = choice.reason
        chosen = lengths[choice.place]
        self._computes_known = chosen < length
        if chosen < length:
            self._stats.recomputed, self._stats.missed = f"computing is faster: {choice.reason}", "computing is faster"
        return chosen, found.get(chosen), choice

    def _choose_states(self, ids: np.ndarray, own: int, spans: Sequence[Span]) -> tuple[int, Checkpoint | None]:
        """How much of `ids`, all of which is known, running states are there for: those in the layers, or those of
        the longest checkpoint. Of them the layers themselves hold the first `own`."""
        at = self._states_at or 0
        resident = at if at <= own and self._covers(at, spans) else 0
        found = self._find_checkpoint(ids)
        if found is not None and not self._covers(found.tokens, spans):
            found = self._find_checkpoint(ids[: total_tokens(spans)])
        if found is None or found.tokens <= resident:
            return resident, None
        return found.tokens, found

    def _find_checkpoint(self, ids: np.ndarray) -> Checkpoint | None:
        """The longest checkpoint of a text that is in the view's chain."""
        if self._store is None or not len(ids):
            return None
        found = match_checkpoint(ids, self._view.root, self._chain.block_size, self._store, self._view.base)
        return Checkpoint(*found) if found is not None else None

    def _take_checkpoint(self, *, wait: bool) -> None:
        """Hands the layers' running states to the store, if they are right for what is held."""
        held = self._held
        if not self._states or self._saver is None or self._store is None or self._untracked:
            return
        if self._saver.holds_back or not held or self._states_at != held or len(self._chain) != held or self.rows != 1:
            return
        key, nbytes = take_checkpoint(self.layers, self._chain, self._store, self._fingerprint, wait=wait)
        self._checkpoints[held] = key
        self._stats.saved_bytes += nbytes
        self._stats.checkpoints += nbytes > 0

    def _whole(self, length: int) -> int:
        """The longest beginning of at most `length` tokens that has no part of a picture."""
        return self._content.floor(length) if self._content is not None else length

    def _take_up_together(self, ids: np.ndarray, limit: int) -> None:
        """What `_take_up` and `_adopt` do, for ranks that have to agree on how much: as much as all of them have.

        Everything is loaded before any of them computes: a load that failed in the middle of a forward would leave
        the others waiting there.
        """
        for _ in range(_MAX_PLANS):
            reused = self._ranks.attempt(partial(self._take_up_whole, ids, limit))
            limit = self._ranks.least(reused)
            if self._ranks.same(reused):
                return
        self._clear()
        self._adopt(ids[:0], [])

    def _take_up_whole(self, ids: np.ndarray, limit: int) -> int:
        for _ in range(_MAX_PLANS):
            reused, spans = self._take_up(ids, limit)
            try:
                self._finish_restore()
            except LoadError as error:
                self._note(f"a load failed, its tokens are computed again: {error}", "load failed")
                continue
            self._adopt(ids[:reused], spans)
            return reused
        self._clear()
        self._adopt(ids[:0], [])
        return 0

    def _drop_from(self, length: int) -> None:
        """Lets go of what is held beyond `length`, though a sliding layer may then lack the window before it."""
        for layer in self.layers:
            if layer.first < length:
                layer.crop_to(length)
            else:
                layer.reset()
                if layer.has_state:
                    self._states_at = None if length else 0
        self._held = min(self._held, length)
        self._chain.crop(length)
        if self._saver is not None:
            self._saver.crop(length)

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
        """A load as the user wants to have it: recorded, or not as it is best."""
        if restore is not None:
            restore.recorder, restore.overlap = self._recorder, self.overlap
        return restore

    def _whole_from(self, length: int) -> int:
        """Position from which layers need their KV so that what follows `length` can be saved in whole blocks; where
        nothing is saved, no block need be whole."""
        return self._chain.bounds(self._chain.block_at(length))[0] if self._saver is not None else length

    def _adopt(self, ids: np.ndarray, spans: Sequence[Span]) -> None:
        """The layers hold `ids` now; `spans` say what of it the store has."""
        if len(ids) < self._view.base:  # what comes after depends on KV that was put together otherwise
            self._change_view(self._view.rebased(len(ids)), ids)
            spans = []
        agreed = common_prefix(self._chain.ids, ids)
        self._chain.crop(agreed)
        self._chain.append(ids[agreed:])
        self._held = len(ids)
        self._went_on_from = spans[-1].block if spans else None
        self._known = total_tokens(spans)
        self._in_store = min(self._known, len(ids))
        if self._saver is not None:
            chain = self._chain
            whole = [span for span in spans if span.whole and span.first >= chain.base]
            tail = next(((chain.block_at(s.first), s.block) for s in whole if s.block_tokens < chain.block_size), None)
            again = [s for s in whole if s.last > len(ids) and s.block_tokens == chain.block_size]
            refill = frozenset(chain.block_at(s.first) for s in again) if self._computes_known else frozenset()
            self._saver.begin_turn(self._in_store, tail, refill)

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
            load = restore.load.stats
            stats = self._stats
            stats.loaded_bytes += load.bytes
            stats.load_seconds += load.seconds
            stats.exposed_load_seconds += restore.exposed_seconds
            stats.blocks_from = {**stats.blocks_from, **load.blocks_from}
        self._from_disk = restore.load.from_disk

    def _elsewhere(self) -> float:
        """Seconds of this turn that were spent on loading and saving, and not on computing."""
        waited = self._restore.exposed_seconds if self._restore is not None else 0.0
        return waited + (self._saver.seconds if self._saver is not None else 0.0)

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

    def _clear(self) -> None:
        """Lets go of everything held."""
        if self._restore is not None:
            self._restore.abandon()
            self._restore = None
        for layer in self.layers:
            layer.reset()
        self._held = self._states_at = 0
        self._uneven = False
        self._known = 0
        if self._view.base:
            self._change_view(self._view.rebased(0), np.empty(0, dtype=np.int64))
        self._chain.crop(0)
        if self._saver is not None:
            self._saver.crop(0)

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

    def _step_back(self, length: int) -> None:
        """Takes running states back to `length`, if that can be done without the store."""
        if length == 0:
            for layer in self._states:
                layer.reset()
            self._states_at = 0
        elif self._states and self._states_at is not None:
            count = self._states_at - length
            undone = [count >= 0 and layer.step_back(count) for layer in self._states]
            self._states_at = length if all(undone) else None

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

    def _note(self, reason: str, missed: str) -> None:
        self._stats.recomputed, self._stats.missed = reason, missed
        logger.warning(reason)

    def _untrack(self, reason: str, *, expected: bool = False, once: bool = False) -> None:
        """From here on the cache holds tokens that ids do not identify: they serve this turn and are not kept.

        Args:
            expected: nothing to tell anybody about.
            once: tell the log only the first time for this model.
        """
        if not self._untracked:
            self._untracked = reason
            if not expected:
                self._stats.recomputed, self._stats.missed = reason, "not identified by ids"
                level = logging.DEBUG if once and reason in self._attachment.told else logging.WARNING
                self._attachment.told.add(reason)
                logger.log(level, "not reused and not saved from token %d on: %s", len(self._chain), reason)


def resident_from_window(layer: KeptLayer, length: int) -> bool:
    """Whether a layer can be cropped to `length` with what it holds."""
    return not isinstance(layer, SlidingLayer) or layer.has_window(length)
