"""What the store has to do with the requests of continuous batching: what it knows of them, and what it keeps."""

import logging
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import torch

from ...errors import LoadError, UnsupportedModelError
from ...session.chain import TokenChain
from ...session.matching import match_prefix
from ...session.spans import Span, crop, overlapping, total_tokens
from ...store.store import AttentionStore
from ...store.transfer.stages import Piece, Stage
from ..hooks import Attachment
from ..identity.adapters import adapter_problem
from ..layers.by_token import FullLayer
from ..layers.kinds import make_layers
from ..model.ranks import ranks_of
from ..model.structure import position_limit
from ..transfer.names import tensor_name
from ..transfer.save import BlockSaver
from .pages import Pages, Runs

T = TypeVar("T")

logger = logging.getLogger("hf_attnstore")


class _Layer:
    """A layer of one request, for `BlockSaver`."""

    def __init__(self, pages: Pages, number: int, where: Callable[[int, int], Runs], may_be_rounded: bool) -> None:
        self._pages, self._number, self._where = pages, number, where
        self.may_be_rounded = may_be_rounded

    def holds(self, start: int, stop: int) -> bool:
        return True

    def piece(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        return self._pages.take(self._number, self._where(start, stop))

    def tensors(self) -> list[torch.Tensor]:
        return []

    def keep_until_saved(self, position: int | None) -> None:
        pass


class _Saving:
    """What is kept of one request.

    Args:
        computed_by: the model's fingerprint, and how often it had changed.
    """

    def __init__(
        self, pages: Pages, request_id: str, chain: TokenChain, store: AttentionStore, computed_by: tuple[str, int]
    ) -> None:
        self.computed_by = computed_by
        self.chain = chain
        # all layers ask for the same one after the other
        self._where = where = lru_cache(maxsize=1)(partial(pages.runs, request_id))
        layers = [_Layer(pages, number, where, may) for number, may in enumerate(pages.may_be_rounded)]
        self.saver = BlockSaver(layers, chain, store, computed_by[0])

    def grow(self, ids: list[int]) -> None:
        """The request holds the KV of these tokens by now."""
        self._where.cache_clear()  # pages of equal content are made one now and then
        self.chain.append(ids[len(self.chain) :])


class StoredRequests:
    """The requests of one paged cache. Used by the thread that computes.

    Nothing that goes wrong here may leave: it would end the loop for everybody. What fails is said once, and from
    then on requests are served as without a store.
    """

    def __init__(self, model: Any, attachment: Attachment, store: AttentionStore, cache: Any) -> None:
        self._model, self._attachment, self._store, self._paged = model, attachment, store, cache
        self._limit = position_limit(model.config.get_text_config(decoder=True))
        self._saving: dict[str, _Saving] = {}
        self._fingerprint = ""
        self._off = False
        self._pages = self._safely(type(model).__name__, self._find_pages)

    def _find_pages(self) -> Pages:
        layers = make_layers(self._model)
        others = {layer.kind for layer in layers if type(layer) is not FullLayer}
        if others:
            raise UnsupportedModelError(f"it has layers of kind {', '.join(sorted(others))}")
        return Pages(self._paged, [layer.may_be_rounded for layer in layers])

    # what is known of a request

    def identify(self) -> str:
        """The identity of what computes now, empty where nothing is to be reused. To be asked before a request is given
        pages that another one has computed: lets go of those if the model has changed."""
        return self._safely("the model", self._identify) or ""

    def fill(self, request: Any, most: int, model: str) -> int:
        """Puts what the store knows of a request's prompt into its pages, beyond what it has there already.

        Args:
            most: tokens that the request may have then.
            model: what `identify` has just said.

        Returns:
            The tokens that its pages hold more than before; nothing else of the request has changed.
        """
        return self._safely("a prompt", partial(self._fill, request, most, model)) or 0

    def _fill(self, request: Any, most: int, model: str) -> int:
        if not model or self._pages is None:
            return 0
        ids, have = np.array(request.initial_tokens), request.position_offset
        saving = self._begin(request, model)
        if self._limit is not None and len(ids) > self._limit:
            return 0
        spans = crop(match_prefix(ids, saving.chain.root, self._store.block_size, self._store), most)
        found = total_tokens(spans)
        began, loaded = time.perf_counter(), 0
        if found > have and self._pages.make_room(request, found - have):
            try:
                loaded = self._load(self._pages, request.request_id, spans, have)
            except LoadError:  # the store has said what it is; the prompt is computed
                found = have
        else:
            found = have
        seconds = time.perf_counter() - began if loaded else 0.0
        self._store.count_turn(found, len(ids), loaded, seconds, seconds)
        return found - have

    def _load(self, pages: Pages, request_id: str, spans: list[Span], have: int) -> int:
        """Loads tokens from `have` on; returns the bytes.

        Raises:
            LoadError: a block could not be read.
        """
        found = total_tokens(spans)
        pieces = [Piece(span.block, span.start, span.stop) for span in overlapping(spans, have, found)]
        runs = pages.runs(request_id, have, found)
        staging = pages.staging(0, found - have)  # one after the other, layers share it
        stages = [
            Stage(pieces, {tensor_name(number, name): target for name, target in staging.items()})
            for number in range(pages.layers)
        ]
        load = self._store.load(stages)
        try:
            for number in range(pages.layers):
                load.request(number + 2)  # files are read ahead by the kernel, and nothing is written yet
                load.wait(number)
                pages.fill(number, runs, staging)
        finally:
            load.finish()
        return load.stats.bytes

    # what is kept of it

    def save_complete(self, request: Any) -> None:
        """Hands over the blocks of a request that are complete by now, behind the next batch."""
        saving = self._saving.get(request.request_id)
        held = _held(request)
        if saving is None or held // self._store.block_size <= len(saving.chain) // self._store.block_size:
            return
        self._safely("complete blocks", partial(self._hand_over, saving, _ids(request)[:held], whole=False))

    def finish(self, request: Any) -> None:
        """Hands over all that a request has computed. Its pages must be there still."""
        saving = self._saving.pop(request.request_id, None)
        if saving is None:
            return
        if self._pages is not None and self._pages.holds(request.request_id):
            self._safely("a request", partial(self._hand_over, saving, _ids(request)[: _held(request)], whole=True))
        saving.saver.release()

    def _hand_over(self, saving: _Saving, ids: list[int], *, whole: bool) -> None:
        """Hands over the KV of tokens: all of it, or that of complete blocks."""
        if (self._identify(), self._attachment.fingerprint.changes) != saving.computed_by:
            return  # something of it was computed by another model
        saving.grow(ids[: self._limit])
        if whole:
            saving.saver.finish(len(saving.chain))
        else:
            saving.saver.begin_forward(saving.chain.full_blocks())
            saving.saver.end_forward()

    def drop(self, request_id: str) -> None:
        """A request has failed: what its pages have may be anything."""
        saving = self._saving.pop(request_id, None)
        if saving is not None:
            saving.saver.release()

    def _begin(self, request: Any, model: str) -> _Saving:
        self.drop(request.request_id)  # it may be begun again
        assert self._pages is not None
        root = self._store.root(model)
        chain = TokenChain(root, self._store.block_size, secret=self._store.secret)
        computed_by = model, self._attachment.fingerprint.changes
        saving = _Saving(self._pages, request.request_id, chain, self._store, computed_by)
        saving.saver.begin_turn(0, None)
        self._saving[request.request_id] = saving
        return saving

    # whose it is

    def _identify(self) -> str:
        """The identity of what computes now; empty where it has none, or nothing is to be kept."""
        if self._off or self._store.closed or self._model.training or adapter_problem(self._model) is not None:
            return ""
        fingerprint = self._attachment.fingerprint
        now = fingerprint.current()
        if fingerprint.computing.additions or not ranks_of(self._model).alone:
            return ""
        if self._fingerprint not in ("", now) and self._pages is not None:
            logger.warning("the model's weights or settings changed: continuous batching shares no pages any more")
            self._pages.stop_sharing()
        self._fingerprint = now
        return now

    def _safely(self, what: str, do: Callable[[], T]) -> T | None:
        try:
            return do()
        except Exception as error:
            self._switch_off(what, error)
            return None

    def _switch_off(self, what: str, error: Exception) -> None:
        if not self._off:
            self._off = True
            reason = str(error) if isinstance(error, UnsupportedModelError) else repr(error)
            logger.warning("continuous batching goes on without the store, because of %s: %s", what, reason)


def _ids(request: Any) -> list[int]:
    return [*request.initial_tokens, *request.generated_tokens]


def _held(request: Any) -> int:
    """Tokens of a request whose KV is in its pages for sure: of the newest, another batch may be on its way."""
    return min(request.position_offset, max(len(_ids(request)) - bool(request.generated_tokens), 0))
