"""What a turn takes up of its prompt: which view of it, how much, and what of that is loaded or computed again."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from ..errors import LoadError
from ..session.chain import common_prefix
from ..session.manifests import read_manifest
from ..session.spans import Span, crop, total_tokens
from ..session.view import View
from ..session.window import Cuts
from ..store.records.manifest import Manifest
from .costs.decide import Choice
from .costs.gate import lengths_between
from .inputs.content import last_stand_in
from .loads import CacheLoads
from .positions.truncation import choose_view
from .transfer.load import Checkpoint

_MAX_PLANS = 8
_MAX_CHECKPOINTS = 3
"""How many checkpoints of a text are considered: the longest, then each of clearly fewer tokens than the one before."""


class CacheChoices(CacheLoads):
    """A cache that takes up as much of a prompt as is known and worth it."""

    cuts: Cuts | None = None
    """Where the next prompt may be cut, for who knows of what it consists; None: anywhere after what is kept first."""

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
        choose = partial(choose_view, ids, limit, new_tokens, self._window, plain, cuts=self.cuts)
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

    def _take_up(self, ids: np.ndarray, limit: int) -> tuple[int, list[Span]]:
        """Gets as much of `ids` as possible into the layers: keeps what is there, loads what is known."""
        if self._untracked:
            self._clear()
            return 0, []
        if self.rows > 1:
            self.batch_select_indices(torch.tensor([0]))
        own = self._whole(min(common_prefix(self._chain.ids, ids), limit))
        self._drop_from(own)
        lost, failure = 0, ""
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
                known = length
                if limit < len(ids):  # else all is wanted here, and not for the sake of what comes after
                    length, checkpoint, choice = self._load_or_compute(ids, own, spans, length, checkpoint)
                if length == 0:
                    self._clear()
                else:
                    self._held = length
                    self._restore = self._plan(spans, length, checkpoint)
                if self._restore is not None:
                    self._gate.look_ahead(self._restore, choice, len(self.layers))
                    self._restore.start()
                if known < lost:
                    self._note(failure, "load failed")
                return length, spans
            except LoadError as error:
                # a short block may just have been superseded by a longer one: it is said if a second look finds less
                lost, failure = max(lost, known), f"a load failed, its tokens are computed again: {error}"
                self._clear()
                own = 0
        self._clear()
        self._note(failure, "load failed")
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
