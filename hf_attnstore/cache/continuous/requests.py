"""What the store has to do with the requests of continuous batching: what it knows of them, and what it keeps."""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from ...errors import LoadError, UnsupportedModelError
from ...session.spans import Span, overlapping, total_tokens
from ...store.blocks.block import Block
from ...store.blocks.keys import RAW
from ...store.store import AttentionStore
from ..hooks import Attachment
from ..identity.adapters import adapter_problem
from ..layers.by_token import FullLayer, SlidingLayer
from ..layers.kinds import make_layers
from ..model.ranks import ranks_of
from ..model.structure import position_limit
from ..paged import look_after
from ..stats import TurnStats
from .admission import Known
from .pages import Pages
from .saving import ComputedBy, Saving
from .told import Kept, Told, parent_of

T = TypeVar("T")

logger = logging.getLogger("hf_attnstore")

AHEAD = 4
"""Prompts that are fetched at once: what memory has no room for is held beside it."""


class StoredRequests:
    """The requests of one paged cache. Used by the thread that computes.

    Nothing that goes wrong here may leave: it would end the loop for everybody. What fails is said once, and from
    then on requests are served as without a store, and share no pages.

    Args:
        told: which of the store's namespaces requests belong to, and where they are told what was reused.
        wake: ends the waiting of a loop that has nothing to do. Called from any thread.
    """

    def __init__(
        self, model: Any, attachment: Attachment, store: AttentionStore, cache: Any, told: Told, wake: Callable[[], Any]
    ) -> None:
        self._model, self._attachment, self._store, self._paged = model, attachment, store, cache
        self._told, self._wake = told, wake
        self._limit = position_limit(model.config.get_text_config(decoder=True))
        self._saving: dict[str, Saving] = {}
        self._known: dict[str, Known] = {}
        self._ended = 0
        self._model_now: str | None = None
        self._fingerprint = ""
        self._off = False
        self._may_be_rounded: list[bool] = []
        self._pages = self._safely(type(model).__name__, self._find_pages)

    def _find_pages(self) -> Pages:
        layers = make_layers(self._model)
        others = {layer.kind for layer in layers if type(layer) not in (FullLayer, SlidingLayer)}
        if others:
            raise UnsupportedModelError(f"it has layers of kind {', '.join(sorted(others))}")
        self._may_be_rounded = [layer.may_be_rounded for layer in layers]
        pages = Pages(self._paged, len(layers), self._store.block_size)
        look_after(self._paged)
        return pages

    def reset(self) -> None:
        """No request of before is there any more."""
        for request_id in [*self._saving, *self._known]:
            self.drop(request_id)

    def begin_batch(self) -> None:
        """A batch is about to be put together: the model may have changed since the one before."""
        self._model_now = None

    # what is known of a request

    def is_ready(self, request: Any, *, others: bool) -> bool:
        """Whether a request that waits may begin: what the store knows of it is in memory, or will not come in time,
        and there is room for it.

        Args:
            others: whether there are requests whose end would make room.
        """
        ready = self._safely("a prompt", partial(self._is_ready, request, others))
        return True if ready is None else ready

    def _is_ready(self, request: Any, others: bool) -> bool:
        known = self._known.get(request.request_id)
        if known is None or (not known.fetched and known.asked != self._ended):
            if sum(1 for one in self._known.values() if one.fetched) >= AHEAD:
                return not others
            known = self._known[request.request_id] = self._look_up(request)
        if known.is_awaited:
            return False
        found = total_tokens([span for span, _ in known.at_hand()])
        if not (found and others) or self._pages is None:
            return True
        return self._pages.has_room(request, found + 1)

    def _look_up(self, request: Any) -> Known:
        store = self._told.store_of(request.request_id) or self._store
        model, ids = self._identify(), np.array(request.initial_tokens)
        fits = self._limit is None or len(ids) <= self._limit
        root = store.root(model) if model and fits and self._pages is not None else b""
        bos = getattr(self._model.config, "bos_token_id", None)
        return Known(store, ids[: _most(request)], root, bos, self._ended, self._wake)

    def admit(self, request: Any) -> int:
        """A request that has no pages is about to begin: gives it those that others have computed, and puts what else
        the store knows of its prompt into its own.

        Returns:
            The tokens that its pages hold then; nothing else of the request has changed.
        """
        return self._safely("a prompt", partial(self._admit, request)) or 0

    def _admit(self, request: Any) -> int:
        pages, saving = self._pages, self.begin(request)
        if pages is None or saving is None:
            return 0
        known = self._known.get(request.request_id) or self._look_up(request)
        began = time.perf_counter()
        ids, most = request.initial_tokens, _most(request)
        have = pages.share(request.request_id, ids, most, saving.salt)
        parts = known.at_hand()
        found = max(have, total_tokens([span for span, _ in parts]))
        request.position_offset, before = have, request.position_offset
        try:
            loaded = 0
            if found > have and pages.make_room(request, found - have):
                loaded = self._fill(pages, request.request_id, parts, have, found)
            else:
                found = have
        except LoadError:  # the store has said what it is; the prompt is computed
            found = have
        finally:
            request.position_offset = before
        self._account(request, saving, known, parts, found, loaded, time.perf_counter() - began)
        return found

    def _fill(self, pages: Pages, request_id: str, parts: list[tuple[Span, Block]], have: int, found: int) -> int:
        """Puts tokens `[have, found)` in place; returns the bytes."""
        blocks = {span.block: block for span, block in parts}
        for block in blocks.values():
            block.wait_ready()
        pages.settle()
        nbytes = 0
        for span in overlapping([span for span, _ in parts], have, found):
            nbytes += pages.fill(request_id, blocks[span.block], span.start, span.stop, span.first, found)
        pages.settle()
        return nbytes

    def _account(
        self,
        request: Any,
        saving: Saving,
        known: Known,
        parts: list[tuple[Span, Block]],
        found: int,
        loaded: int,
        seconds: float,
    ) -> None:
        """Says what a request has reused."""
        self._close(request.request_id)
        used = [span.block for span, _ in parts if span.first < found]
        seconds = seconds if loaded else 0.0
        if request._true_initial_tokens:  # it had begun before, and had to give way
            return
        store = known.store
        stats = self._told.stats_of(request.request_id) or TurnStats()
        stats.prompt_tokens, stats.reused_tokens = len(request.initial_tokens), found
        stats.prefilled_tokens = stats.prompt_tokens - found
        stats.loaded_bytes, stats.load_seconds, stats.exposed_load_seconds = loaded, seconds, seconds
        if loaded:
            stats.blocks_from = Counter(known.tiers.get(key, "memory") for key in used)
        stats.rounded_by = store.codec if found and store.codec != RAW and store.is_lossy else ""
        if known.is_late:
            stats.recomputed, stats.missed = "what the store has of it did not come in time", "too slow"
        elif known.diverged is not None:
            stats.diverged = replace(known.diverged, prompt_tokens=stats.prompt_tokens)
            stats.missed = "other text" if known.diverged.there else "not in the store"
        store.count_turn(found, stats.prompt_tokens, loaded, seconds, seconds, stats.missed)
        if used:
            saving.went_on_from = used[-1]
            store.touch(used)

    # what is kept of it

    def begin(self, request: Any) -> Saving | None:
        """From now on a request's KV is kept."""
        return self._safely("a request", partial(self._begin, request))

    def _begin(self, request: Any) -> Saving | None:
        model, request_id = self._identify(), request.request_id
        self._stop_saving(request_id)  # it may be begun again
        if not model or self._pages is None:
            return None
        store = self._told.store_of(request_id) or self._store
        computed_by = ComputedBy(model, self._attachment.fingerprint.changes)
        saving = Saving(self._pages, request_id, store, store.root(model), computed_by, self._may_be_rounded)
        self._saving[request_id] = saving
        return saving

    def save_complete(self, request: Any) -> None:
        """Hands over the blocks of a request that are complete by now, behind the next batch."""
        saving = self._saving.get(request.request_id) or self._forked(request.request_id)
        if saving is None:
            return
        held = _held(request)
        if not self._is_computed_by(saving):  # also where that is put right again later
            self._stop_saving(request.request_id)
        elif saving.is_due(held):
            self._safely("complete blocks", partial(self._hand_over, saving, _ids(request)[:held], whole=False))

    def _forked(self, request_id: str) -> Saving | None:
        """What is to be kept of another answer to the prompt of a request that runs."""
        parent = self._saving.get(parent_of(request_id))
        if parent is None:
            return None
        forked = self._saving[request_id] = parent.fork(request_id)
        return forked

    def most_at_once(self, request: Any) -> int | None:
        """How many of its tokens may be fed in one batch, for what it computes to be kept; None for any number."""
        if self._pages is None or request.request_id not in self._saving:
            return None
        return self._pages.most_at_once(request.position_offset)

    def finish(self, request: Any) -> None:
        """Hands over all that a request has computed. Who had to give way for others has no pages any more, and comes
        back."""
        request_id = request.request_id
        if self._pages is not None and not self._pages.holds(request_id):
            self._stop_saving(request_id)
            return
        saving, kept = self._saving.get(request_id), None
        if saving is not None:
            ids = _ids(request)[: _held(request)]
            kept = self._safely("a request", partial(self._hand_over, saving, ids, whole=True))
        self._stop_saving(request_id)
        self._end(request_id, kept)

    def _hand_over(self, saving: Saving, ids: list[int], *, whole: bool) -> Kept | None:
        """Hands over the KV of tokens: all of it, or that of complete blocks."""
        if not self._is_computed_by(saving):
            return None
        return saving.hand_over(ids, self._limit, whole=whole)

    def _is_computed_by(self, saving: Saving) -> bool:
        """Whether nothing of it was computed by another model than there is now."""
        return (self._identify(), self._attachment.fingerprint.changes) == saving.computed_by

    def drop(self, request_id: str) -> None:
        """A request has failed, or never began: what its pages have may be anything."""
        self._stop_saving(request_id)
        self._end(request_id)

    def _stop_saving(self, request_id: str) -> None:
        saving = self._saving.pop(request_id, None)
        if saving is not None:
            saving.release()

    def _end(self, request_id: str, kept: Kept | None = None) -> None:
        self._close(request_id)
        self._ended += 1
        self._safely("who waits for a request", partial(self._told.over, request_id, kept))

    def _close(self, request_id: str) -> None:
        """A request waits no more."""
        known = self._known.pop(request_id, None)
        if known is not None:
            known.give_up()

    # whose it is

    def _identify(self) -> str:
        """The identity of what computes now; empty where it has none, or nothing is to be kept. Found out once for a
        batch."""
        if self._model_now is None:
            self._model_now = self._find_identity()
        return self._model_now

    def _find_identity(self) -> str:
        if self._off or self._store.closed or self._model.training or adapter_problem(self._model) is not None:
            return ""
        fingerprint = self._attachment.fingerprint
        now = fingerprint.current()
        if fingerprint.computing.additions or not ranks_of(self._model).alone:
            return ""
        if self._fingerprint not in ("", now) and self._saving:
            logger.warning(
                "the model's weights or settings changed: %d requests of continuous batching that run now go on with "
                "KV of before, and are not kept",
                len(self._saving),
            )
        self._fingerprint = now
        return now

    def _safely(self, what: str, do: Callable[[], T]) -> T | None:
        try:
            with torch.no_grad():
                return do()
        except Exception as error:
            self._switch_off(what, error)
            return None

    def _switch_off(self, what: str, error: Exception) -> None:
        self._model_now = None
        if not self._off:
            self._off = True
            reason = str(error) if isinstance(error, UnsupportedModelError) else repr(error)
            logger.warning("continuous batching goes on without the store, because of %s: %s", what, reason)


def _ids(request: Any) -> list[int]:
    return [*request.initial_tokens, *request.generated_tokens]


def _held(request: Any) -> int:
    """Tokens of a request whose KV is in its pages for sure: of the newest, another batch may be on its way."""
    length = len(request.initial_tokens) + len(request.generated_tokens)
    return min(request.position_offset, max(length - bool(request.generated_tokens), 0))


def _most(request: Any) -> int:
    """Tokens of a prompt that may be there already: one is fed, and of a request that is to be forked one before that
    and one after."""
    return len(request.initial_tokens) - (2 if request.num_children else 1)
