"""AttentionStoreCache: the `Cache` that continues conversations."""

import copy
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache

from ..errors import CacheUseError, ContextWindowError, GradientError, LoadError, SessionBusyError, StoreClosedError
from ..session.chain import TokenChain, common_prefix
from ..session.manifests import read_manifest, write_manifest
from ..session.matching import match_prefix
from ..session.spans import Span, crop, total_tokens
from ..session.view import View
from ..store.blocks import Key, chain_root
from ..store.locks import SessionLock
from ..store.store import AttentionStore
from .attach import Attachment, ensure_hooks, owner_of
from .fingerprint import position_limit
from .inputs import foreign_input, mask_problem, position_problem
from .layers import FullLayer, SlidingLayer, StoreLayer, make_layer
from .restore import Restore, plan_restore, resident_from
from .saver import BlockSaver
from .stats import TurnStats
from .structure import layer_kinds
from .truncation import choose_view, window_of

logger = logging.getLogger("hf_attnstore")

_UNKNOWN = "unknown"
_MAX_EXPECTED_NEW = 4096
_MAX_PLANS = 8


@dataclass(frozen=True)
class _Forward:
    """A forward that is running: so many new tokens in so many rows."""

    count: int
    rows: int
    thread: int


class AttentionStoreCache(Cache):
    """A cache for `generate` that takes up a conversation where it was left, and keeps it afterwards.

    Pass it as `past_key_values` together with the whole conversation so far. What the store knows of it, from
    this session or any other text that begins alike, is loaded instead of computed; the tokens that come out are
    those of plain `generate`.

    Args:
        model: the model; its hooks are attached by this (see `attach`).
        session: the name to keep the conversation under; None keeps its blocks only, found again by content.
        store: the store; default is the one given to `attach`, else one at the default path.
        window: tokens that the model is to see at once, those still to be generated included; by default as many
            as it has positions for. A conversation that outgrows it loses its oldest tokens.
        keep_first: leading tokens that are never dropped, such as a system prompt.
        drop: the share of the other tokens that goes when there is no room. 0 drops nothing, ever: past the
            window the model then does what it does without this cache.
        save: whether to keep what is computed. False reads only.
        wait: seconds to wait where another turn is running on the session, instead of failing at once.

    Raises:
        UnsupportedModelError: the model has layers that this version can't keep; the message names the kind.
        SessionNameError: the name can't be used.
        CacheUseError: a window, `keep_first` or `drop` that makes no sense.
        ContextWindowError: `keep_first` fills the window.

    An object may serve one turn or many; between turns it holds the KV, so that nothing is loaded twice. In a
    loop of one's own (`model(input_ids=new, past_key_values=cache)`), `match` or `resume` load, and `save` ends
    the turn. One thread at a time uses an object.
    """

    layers: list[StoreLayer]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        session: str | None = None,
        store: AttentionStore | None = None,
        *,
        window: int | None = None,
        keep_first: int = 0,
        drop: float = 0.5,
        save: bool = True,
        wait: float = 0.0,
    ) -> None:
        self._model = owner_of(model)
        config: Any = self._model.config
        kinds = layer_kinds(config)
        super().__init__(layers=[make_layer(kind.window) for kind in kinds])
        self._attachment: Attachment = ensure_hooks(self._model)
        self._store: AttentionStore | None = store or self._attachment.store or _default_store()
        self.session = self._store.check_name(session) if session is not None else None
        self._saving = save
        self._wait = wait
        self._limit = position_limit(config.get_text_config(decoder=True))
        self._window = window_of(config, window, keep_first, drop)
        self._prepare_empty()
        self._store.register(self)

    def _prepare_empty(self) -> None:
        self._busy = threading.Lock()
        self._guard = threading.RLock()
        """Held while the state changes: `store.flush()` in another thread must find it whole."""
        self._fingerprint = _UNKNOWN
        self._view = View.plain(chain_root(_UNKNOWN, ""))
        self._chain = TokenChain(self._view.root, self._store.block_size if self._store else 256)
        self._saver: BlockSaver | None = None
        self._held = 0
        self._untracked = ""
        self._forward: _Forward | None = None
        self._restore: Restore | None = None
        self._from_disk: list[Key] = []
        self._in_turn = False
        self._checked = False
        self._changed = False
        self._speculating = False
        self._confirmed = 0
        self._prompt: np.ndarray | None = None
        """The tokens of the prompt that are in view, where the caller vouches for what will be fed."""
        self._prompt_tokens = 0
        self._reopening = False
        self._lock: SessionLock | None = None
        self._stats = TurnStats()

    # what users look at

    @property
    def store(self) -> AttentionStore | None:
        """Where the KV is kept; None for a copy made by `deepcopy`."""
        return self._store

    @property
    def model(self) -> nn.Module:
        """The model whose KV this is."""
        return self._model

    @property
    def stats(self) -> TurnStats:
        """The numbers of the last turn, or of the one that runs."""
        return self._stats

    @property
    def reused_tokens(self) -> int:
        """Tokens of the last prompt that were not computed again."""
        return self._stats.reused_tokens

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of the last prompt that were computed."""
        return self._stats.prefilled_tokens

    @property
    def token_ids(self) -> list[int]:
        """The ids of the tokens held, as far as ids identify them."""
        return self._chain.ids.tolist()

    @property
    def conversation_ids(self) -> list[int]:
        """The ids of the whole conversation up to the last token held, those dropped from the window included."""
        return self._view.whole(self._chain.ids).tolist()

    @property
    def window(self) -> int | None:
        """Tokens that the model is to see at once; None where nothing is ever dropped."""
        return self._window.size if self._window is not None else None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(session={self.session!r}, tokens={self._held}, layers={len(self.layers)})"

    # loops of one's own

    def match(self, input_ids: torch.Tensor, new_tokens: int = 0) -> int:
        """Loads what is known of a conversation, for a loop of one's own.

        Args:
            input_ids: `[1, tokens]`, the whole conversation so far.
            new_tokens: how many more are to be generated: the window keeps room for them.

        Returns:
            The number of leading tokens that are done with, at most `tokens - 1`: they are in the cache, or were
            dropped from the window. Feed the model the rest.

        Raises:
            SessionBusyError: another turn is running on the session.
            ContextWindowError: what is new does not fit into the window.
        """
        ids = _one_row(input_ids)
        return self._load_now(ids, len(ids) - 1, new_tokens)

    def resume(self) -> torch.Tensor:
        """Loads all that the store has of the session, for a loop of one's own.

        Returns:
            The ids `[1, tokens]` of what is now in the cache, without those dropped from the window: feed the
            model what comes after.

        Raises:
            SessionNotFoundError: there is no such session.
        """
        if self._store is None or self.session is None:
            raise CacheUseError("resume() needs a cache with a session and a store")
        ids = np.asarray(self._store.tokens(self.session, dropped=True), dtype=np.int64)
        self._load_now(ids, len(ids), 0)
        return torch.from_numpy(self._chain.ids.copy())[None]

    def _load_now(self, ids: np.ndarray, limit: int, new_tokens: int) -> int:
        # `checked` until everything is there, so that a `flush` in another thread leaves the turn alone
        begin = partial(self.begin_turn, ids, limit=limit, new_tokens=new_tokens, checked=True)
        reused = begin()
        try:
            for _ in range(_MAX_PLANS):
                try:
                    self._finish_restore()
                    break
                except LoadError as error:
                    self.abandon(error)
                    reused = begin()
            else:
                self._clear()
                reused = self._stats.reused_tokens = 0
            if reused < self._view.settled:  # dropped tokens come after these: only together can they be left out
                missing = self._view.in_view(ids)[None, reused : self._view.settled]
                with torch.no_grad():
                    self._model(input_ids=torch.from_numpy(missing).to(_device_of(self._model)), past_key_values=self)
        except BaseException:
            self.end_turn()
            raise
        self._checked, self._prompt = False, None
        return self._view.logical(self._held)

    def save(self) -> None:
        """Ends a turn of one's own loop: everything complete is handed to the store, the session updated.

        `generate` does this by itself, and so do `store.flush()` and `store.close()`.
        """
        with self._guard:
            if self._in_turn and not self._checked and not self._runs_elsewhere():
                self.end_turn()

    def _runs_elsewhere(self) -> bool:
        """Whether a forward is running in another thread. One of this thread's own was left by an exception."""
        return self._forward is not None and self._forward.thread != threading.get_ident()

    # turns

    def begin_turn(
        self, ids: np.ndarray, *, limit: int, new_tokens: int = 0, checked: bool = False, unreadable: str = ""
    ) -> int:
        """Starts a turn on the conversation `ids` `[tokens]`: finds and begins to load what is known of it.

        Args:
            limit: reuse at most so many of its leading tokens.
            new_tokens: how many tokens are expected on top: for the capacity of the layers, and for the window.
            checked: the caller vouches for masks and positions, so that forwards need not look at them.
            unreadable: why nothing is to be loaded, if so; nothing is saved then.

        Returns:
            The tokens reused; `get_seq_length()` says the same from now on, though the data may still be coming.
            What is to be fed is `prompt_in_view(ids)`, without these.

        Raises:
            ContextWindowError: what is new, or `new_tokens`, does not fit into the window.
        """
        self._acquire()
        with self._guard:
            try:
                self._open()
                self._checked = checked
                if unreadable:
                    self._untrack(unreadable)
                self._see_through(self._choose_view(ids, limit, new_tokens))
                shown, limit = self._view.in_view(ids), limit - self._view.dropped
                if self._limit is not None and len(shown) > self._limit:
                    self._untrack(f"positions beyond {self._limit} change the rotary frequencies of all")
                for layer in self.layers:
                    if isinstance(layer, FullLayer):
                        layer.expected = len(shown) + min(new_tokens, max(_MAX_EXPECTED_NEW, len(shown)))
                    elif isinstance(layer, SlidingLayer):
                        layer.record_past = False  # of an earlier turn; who needs it asks again
                reused, spans = self._take_up(shown, limit)
                self._adopt(shown[:reused], spans)
            except ContextWindowError:
                self._close_turn()
                raise
            except BaseException:
                self._clear()  # half of what was planned may be in place
                self._close_turn()
                raise
            self._prompt = shown if checked else None
            self._prompt_tokens = len(shown)
            stats = self._stats
            stats.prompt_tokens = len(ids)
            stats.reused_tokens = reused
            stats.dropped_tokens = self._view.dropped
            if self._view.dropped:
                stats.truncation = "rotated" if self._view.base else "recomputed"
        return reused

    def prompt_in_view(self, ids: np.ndarray) -> np.ndarray:
        """Of the conversation `ids` that a turn was begun on, the tokens that the model is to see."""
        return self._view.in_view(ids)

    def _choose_view(self, ids: np.ndarray, limit: int, new_tokens: int) -> View:
        plain = View.plain(self._view.model_root)
        if self._window is None or not self._window.overflows(len(ids), new_tokens):
            return plain
        manifest = None
        if self._store is not None and self.session is not None:
            manifest = self._store.latest_manifest(self.session)
        views = [self._view]
        if self._store is not None and manifest is not None:
            describe = partial(self._store.describe_block, fingerprint=self._fingerprint)
            views.append(read_manifest(manifest, plain.root, describe))
        own = common_prefix(self._view.whole(self._chain.ids), ids)
        history = max(own, manifest.length if manifest is not None else 0)
        find = self._find if not self._untracked else lambda view, ids: []
        return choose_view(ids, limit, new_tokens, self._window, plain, views, find, history, self._can_move_keys)

    def _can_move_keys(self) -> bool:
        geometry = self._attachment.geometry(self._model, self._fingerprint)
        if not geometry.movable:
            self._note(f"kept keys can't be moved, so their tokens are computed again: {geometry.refused}")
        return geometry.movable

    def _see_through(self, view: View) -> None:
        """From now on the cache holds what is in `view`; KV that belongs to another is let go."""
        if not view.same(self._view):
            for layer in self.layers:
                layer.reset()
            self._held = 0
            self._change_view(view, np.empty(0, dtype=np.int64))

    def _change_view(self, view: View, ids: np.ndarray) -> None:
        """Sets the view, where the layers hold the tokens `ids` of it."""
        self._view = view
        self._chain = TokenChain(view.root, self._chain.block_size, ids, view.base)
        if self._saver is not None:
            self._saver.release()
        self._saver = None
        if self._store is not None and self._saving:
            continues = view.prefix[-1].block if view.prefix else b""
            self._saver = BlockSaver(self.layers, self._chain, self._store, self._fingerprint, continues)

    def begin_unidentified_turn(self, reason: str, prompt_tokens: int = 0) -> None:
        """Starts a turn whose content token ids do not identify: nothing is reused and nothing kept."""
        self._acquire()
        with self._guard:
            try:
                self._open()
                self._checked = True
                self._clear()
                self._see_through(View.plain(self._view.model_root))
                self._untrack(reason)
            except BaseException:
                self._close_turn()
                raise
            self._stats.prompt_tokens = self._prompt_tokens = prompt_tokens

    def _acquire(self) -> None:
        """Makes this thread the only one that has a turn on this object, and this object the only one with a turn
        on the session."""
        if self._reopening:
            return
        self.save()
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError("this cache object is in the middle of another turn; make one object per thread")
        try:
            if self._store is not None:
                if self._store.closed:
                    raise StoreClosedError(
                        f"the store {self._store.path} of this cache is closed; make a new cache with an open store"
                    )
                if self.session is not None and self._saving:
                    self._lock = self._store.lock_session(self.session, self._wait)
        except BaseException:
            self._close_turn()
            raise

    def _open(self) -> None:
        self._in_turn = True
        if self._store is not None and self._attachment.computes_on_cpu:
            self._store.begin_computing(id(self))
        self._stats = TurnStats(recomputed=self._stats.recomputed if self._reopening else "")
        self._reopening = False
        self._untracked = ""
        self._changed = False
        self._speculating = False
        self._prompt = None
        self._settle()
        self._identify()

    def _close_turn(self) -> None:
        if self._store is not None:
            self._store.end_computing(id(self))
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._in_turn = self._checked = self._reopening = False
        if self._busy.locked():
            self._busy.release()

    def _identify(self) -> None:
        """Makes sure that what is held, and the chain it goes by, belong to the model as it is now."""
        if self._model.training:
            self._untrack("the model is in training mode (model.eval() makes its KV reproducible)")
        try:
            fingerprint = self._attachment.fingerprint.current()
        except Exception as error:
            self._untrack(f"the model's weights can't be identified ({error})")
            return
        if fingerprint != self._fingerprint:
            if self._held:
                self._note("the model's weights or settings changed: what the cache held is computed again")
            self._clear()
            self._fingerprint = fingerprint
            root = chain_root(fingerprint, self._store.namespace if self._store is not None else "")
            self._change_view(View.plain(root), np.empty(0, dtype=np.int64))
        if self._store is not None and self.session is not None:
            before = self._store.session_fingerprint(self.session)
            if before not in (None, "", fingerprint):
                self._note(
                    f"session {self.session!r} was computed by a model with other weights or settings "
                    f"({before[:12]}, now {fingerprint[:12]}): that KV is not reused"
                )

    def _take_up(self, ids: np.ndarray, limit: int) -> tuple[int, list[Span]]:
        """Gets as much of `ids` as possible into the layers: keeps what is there, loads what is known."""
        if self._untracked:
            self._clear()
            return 0, []
        if self.rows > 1:
            self.batch_select_indices(torch.tensor([0]))
        own = min(common_prefix(self._chain.ids, ids), limit)
        self._drop_from(own)
        for _ in range(_MAX_PLANS):
            spans = crop(self._find(self._view, ids[:limit]), limit)
            known = total_tokens(spans)
            length = max(own, known)
            if own > known and not self._covers(own, spans):
                length = known  # a sliding layer has let go of what it would need to stay at `own`
            if length == 0:
                break
            try:
                self._held = length
                self._restore = self._plan(spans, length)
                if self._restore is not None:
                    self._restore.start()
                return length, spans
            except LoadError as error:
                self._note(f"a load failed, its tokens are computed again: {error}")
                self._clear()
                own = 0
        self._clear()
        return 0, []

    def _drop_from(self, length: int) -> None:
        """Lets go of what is held beyond `length`, though a sliding layer may then lack the window before it."""
        for layer in self.layers:
            if layer.first < length:
                layer.crop_to(length)
            else:
                layer.reset()
        self._held = min(self._held, length)
        self._chain.crop(length)
        if self._saver is not None:
            self._saver.crop(length)

    def _find(self, view: View, ids: np.ndarray) -> list[Span]:
        """Where the KV of the first tokens is, of those in `view`."""
        if self._store is None or not len(ids):
            return []
        there = takewhile(lambda span: self._store is not None and self._store.has(span.block), view.prefix)
        spans = crop(there, len(ids))
        if total_tokens(spans) == view.base < len(ids):
            spans += match_prefix(ids, view.root, self._chain.block_size, self._store, view.base)
        return spans

    def _covers(self, length: int, spans: Sequence[Span]) -> bool:
        """Whether the layers hold, or the spans have, all that is needed to go on at `length`."""
        whole_from = self._whole_from(length)
        return all(
            resident_from(layer, length, whole_from) >= length or total_tokens(spans) >= length for layer in self.layers
        )

    def _plan(self, spans: Sequence[Span], length: int) -> Restore | None:
        if self._store is None:
            for layer in self.layers:
                layer.crop_to(length)
            return None
        attachment = self._attachment
        geometry = None
        if any(span.shift for span in crop(spans, length)):
            geometry = attachment.geometry(self._model, self._fingerprint)
        whole_from = self._whole_from(length)
        restore = plan_restore(
            self.layers, attachment.devices, spans, length, whole_from, self._store, attachment.pace, geometry
        )
        self._stats.rotated_tokens = restore.rotated_tokens if restore is not None else 0
        return restore

    def _whole_from(self, length: int) -> int:
        """Position from which layers need their KV so that what follows `length` can be saved in whole blocks; where
        nothing is saved, no block need be whole."""
        return self._chain.bounds(self._chain.block_at(length))[0] if self._saver is not None else length

    def _adopt(self, ids: np.ndarray, spans: Sequence[Span]) -> None:
        """The layers hold `ids` now; `spans` say what of it the store has."""
        if len(ids) < self._view.base:  # what comes after depends on KV that was put together otherwise
            self._change_view(self._view.rebased(len(ids)), ids)
        agreed = common_prefix(self._chain.ids, ids)
        self._chain.crop(agreed)
        self._chain.append(ids[agreed:])
        self._held = len(ids)
        if self._saver is not None:
            last = spans[-1] if spans else None
            short = last is not None and last.whole and last.block_tokens < self._chain.block_size
            tail = last.block if last is not None and short and last.first >= self._chain.base else None
            self._saver.begin_turn(min(total_tokens(spans), len(ids)), tail)

    def end_turn(self) -> None:
        """Ends the turn: hands over what is complete and commits the session. Also after an exception."""
        with self._guard:
            if not self._in_turn:
                return
            try:
                self._settle()
                if self._speculating and self._confirmed < self._held:
                    self._crop_to(self._confirmed)
                try:
                    self._hand_over()
                except StoreClosedError:
                    self._stop_saving()
            finally:
                self._close_turn()

    def _hand_over(self) -> None:
        if self._store is None:
            return
        stats = self._stats
        if self._saver is not None:
            saved = self._saver.finish(len(self._chain))
            # a turn that computed nothing, or nothing that ids identify, leaves the session as it was
            if self._changed and (len(self._chain) or not self._untracked):
                self._commit(saved)
            stats.saved_bytes = self._saver.saved_bytes
            stats.save_seconds = self._saver.seconds
        self._store.count_turn(
            stats.reused_tokens,
            stats.prompt_tokens,
            stats.loaded_bytes,
            stats.load_seconds,
            stats.exposed_load_seconds,
        )
        # not earlier: the copying would take cores from the turn itself
        from_disk, self._from_disk = self._from_disk, []
        self._store.promote(from_disk)

    def _stop_saving(self) -> None:
        if self._saver is not None:
            self._saver.release()
            self._saver = None
        logger.warning("the store was closed in the middle of a turn: what the turn computed is not saved")

    def _commit(self, tokens: int) -> None:
        assert self._store is not None
        chain = self._chain
        spans = crop(self._view.prefix, tokens)
        for block in range(-(-max(tokens - chain.base, 0) // chain.block_size)):
            start, stop = chain.bounds(block)
            stop = min(stop, tokens)
            spans.append(Span(chain.key(block), 0, stop - start, start, stop - start))
        if self.session is not None:
            manifest = write_manifest(self._view, spans, self._view.logical(len(chain)))
            self._store.commit(self.session, self._fingerprint, manifest)
        elif spans:
            self._store.touch([span.block for span in spans])

    def abandon(self, error: LoadError) -> None:
        """A load failed in the middle of a turn: lets go of everything held. The turn, which still has the session
        to itself, is to be begun again, or ended."""
        with self._guard:
            self._note(f"a load failed, its tokens are computed again: {error}")
            self._forward = None
            self._clear()
            self._reopening = True

    def _note(self, reason: str) -> None:
        self._stats.recomputed = reason
        logger.warning(reason)

    def _untrack(self, reason: str, *, expected: bool = False) -> None:
        """From here on the cache holds tokens that ids do not identify: they serve this turn and are not kept."""
        if not self._untracked:
            self._untracked = reason
            if not expected:
                self._stats.recomputed = reason
                logger.warning("not reused and not saved from token %d on: %s", len(self._chain), reason)

    # forwards (called by the hooks)

    def begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        """A forward of the model begins. Returns inputs to replace, if any."""
        if torch.is_grad_enabled():
            raise GradientError(
                "an AttentionStoreCache can't be part of a backward pass: run the model under torch.no_grad() "
                "or torch.inference_mode(), or train without a cache"
            )
        with self._guard:
            return self._begin_forward(named)

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        if not self._in_turn:
            self._begin_own_turn()
        if self._runs_elsewhere():
            raise SessionBusyError("another thread runs a forward with this cache; make one object per thread")
        self._settle(keep_load=True)
        replaced = self._drop_reused(named)
        if replaced:
            named = {**named, **replaced}
        ids = named.get("input_ids")
        data = ids if ids is not None else named.get("inputs_embeds")
        if data is None:
            raise CacheUseError("the forward has neither input_ids nor inputs_embeds")
        rows, count = data.shape[0], data.shape[1]
        if self._starts_elsewhere(ids, named):
            # older transformers (5.17) prefill in chunks from the beginning, whatever the cache holds
            self._note("generate does not go on where the cache does: what the cache held is computed again")
            self._clear()
            self._stats.reused_tokens = 0
        if self.rows not in (0, rows):
            if self.rows != 1:
                raise CacheUseError(f"the cache holds {self.rows} rows, the forward has {rows}")
            self.batch_repeat_interleave(rows)
        self._track(ids, rows, count, named)
        self._forward = _Forward(count, rows, threading.get_ident())
        if self._saver is not None:
            self._saver.begin_forward(self._chain.full_blocks())
        return replaced

    def _begin_own_turn(self) -> None:
        """The first forward of a loop of one's own, or since its last `save`."""
        held = self._held
        self._acquire()
        try:
            self._open()
            if self._held < held:
                raise CacheUseError(
                    f"of the {held} tokens before these the cache holds {self._held} now ({self._stats.recomputed}): "
                    "call match() with the whole conversation, then feed the model what is new"
                )
        except BaseException:
            self._close_turn()
            raise
        if len(self._chain) < held:
            self._untrack("what came before is not identified by token ids", expected=True)
        if self._saver is not None:
            self._saver.continue_turn()

    def _drop_reused(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        """Assisted decoding feeds the whole prompt in its first forward, whatever the cache holds: leaves out
        what is held. (Its logits processors and candidates need the whole ids, so they can't be shortened before.)"""
        ids = named.get("input_ids")
        prompt = self._prompt_tokens
        if not (
            self._checked and self._is_first() and self._held and ids is not None and prompt and ids.shape[1] >= prompt
        ):
            return None
        width = ids.shape[1]
        return {
            name: value[..., self._held :]
            for name, value in named.items()
            if isinstance(value, torch.Tensor)
            and name != "attention_mask"
            and value.ndim
            and value.shape[-1] == width
            and name in ("input_ids", "position_ids", "cache_position", "token_type_ids", "mm_token_type_ids")
        }

    def _starts_elsewhere(self, ids: torch.Tensor | None, named: Mapping[str, Any]) -> bool:
        """Whether the first forward of a `generate` feeds other tokens than those that come after what is held."""
        if self._prompt is None or ids is None or not self._held or not self._is_first():
            return False
        expected = self._prompt[self._held : self._held + ids.shape[1]]
        fed = ids[0, : len(expected)].detach().cpu().numpy()
        positions = position_problem(named.get("position_ids"), self._held, ids.shape[1])
        return bool(positions) or not np.array_equal(fed, expected)

    def _is_first(self) -> bool:
        return self._stats.prefilled_tokens == 0 and self._stats.generated_tokens == 0

    def _track(self, ids: torch.Tensor | None, rows: int, count: int, named: Mapping[str, Any]) -> None:
        """Takes down which tokens a forward adds, as long as ids identify them."""
        if not self._untracked and ids is None:
            self._untrack("inputs_embeds are not identified by token ids")
        if not self._untracked and not self._checked:
            foreign = foreign_input(named)
            problem = (
                (f"{foreign} are not identified by token ids" if foreign else None)
                or mask_problem(named.get("attention_mask"), self._held + count)
                or position_problem(named.get("position_ids"), self._held, count)
                or position_problem(named.get("cache_position"), self._held, count)
            )
            if problem:
                self._untrack(problem)
        if self._untracked or ids is None:
            return
        host = ids.detach().cpu().numpy()
        if rows > 1 and not (host == host[0]).all():
            self._untrack("several rows", expected=True)
            return
        row = host[0]
        if self._limit is not None and self._held + count > self._limit:
            row = row[: max(self._limit - self._held, 0)]
            self._untrack(f"positions beyond {self._limit} change the rotary frequencies of all", expected=True)
        self._chain.append(row)

    def before_layer(self, number: int) -> None:
        """A decoder layer is about to compute."""
        if self._restore is not None:
            self._restore.before_layer(number)

    def after_layer(self, number: int) -> None:
        """A decoder layer has computed."""
        if self._saver is not None and self._saver.due and self._forward is not None:
            try:
                self._saver.layer_done(number)
            except StoreClosedError:
                self._stop_saving()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the KV of new tokens, `[batch, heads, tokens, dim]`, to a layer; returns all that queries may see.

        Raises:
            CacheUseError: not within a forward of the model that this cache was made for.
            LoadError: what was to be loaded can't be (`generate` catches it and recomputes).
        """
        forward = self._forward
        if forward is None:
            raise CacheUseError(
                "the cache did not see this forward begin, so it can't know its tokens: call the model that the "
                "cache was made with (not a part of it), and keep it attached"
            )
        if (key_states.shape[0], key_states.shape[-2]) != (forward.rows, forward.count):
            raise CacheUseError(
                f"layer {layer_idx} adds {tuple(key_states.shape)} where the forward has {forward.count} tokens in "
                f"{forward.rows} rows: this model's KV is not one entry per token"
            )
        if self._restore is not None and not self._attachment.sees_layers:
            self._restore.before_layer(layer_idx)
        keys, values = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return keys, values

    def end_forward(self) -> None:
        """A forward of the model has ended well."""
        with self._guard:
            self._end_forward()

    def _end_forward(self) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        self._changed = True
        before, self._held = self._held, self._held + forward.count
        if any(layer.length != self._held for layer in self.layers):
            lengths = sorted({layer.length for layer in self.layers})
            raise CacheUseError(f"after {self._held} tokens the layers hold {lengths}: this model can't be kept")
        prompt = self._prompt_tokens if self._checked else self._held
        prefilled = max(0, min(self._held, prompt) - before)
        self._stats.prefilled_tokens += prefilled
        self._stats.generated_tokens += forward.count - prefilled
        if not self._checked:
            self._stats.prompt_tokens = self._held
        # of the tokens fed when drafts are checked only the first is sure, until `crop` removes the wrong ones
        self._confirmed = max(before + 1, min(self._held, prompt))
        if self._restore is not None:
            self._finish_restore()
        if self._saver is not None:
            try:
                self._saver.end_forward()
            except StoreClosedError:
                self._stop_saving()

    # content

    @property
    def rows(self) -> int:
        """The batch size of what is held; 0 if nothing is."""
        return self.layers[0].rows if self.layers else 0

    def _finish_restore(self) -> None:
        restore, self._restore = self._restore, None
        if restore is None:
            return
        try:
            restore.finish()
        except BaseException:
            self._clear()
            raise
        finally:
            load = restore.load.stats
            stats = self._stats
            stats.loaded_bytes += load.bytes
            stats.load_seconds += load.seconds
            stats.exposed_load_seconds += restore.exposed_seconds
            stats.blocks_from = dict(load.blocks_from)
        self._from_disk = restore.load.from_disk

    def _settle(self, *, keep_load: bool = False) -> None:
        """Puts the cache into a consistent state whatever happened: every layer holds the tokens of all complete
        forwards and nothing else."""
        self._forward = None
        if self._restore is not None and not keep_load:
            try:
                self._finish_restore()
            except LoadError as error:
                self._note(f"a load failed, its tokens are computed again: {error}")
                self._clear()
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
        self._held = 0
        if self._view.base:
            self._change_view(self._view.rebased(0), np.empty(0, dtype=np.int64))
        self._chain.crop(0)
        if self._saver is not None:
            self._saver.crop(0)

    def _crop_to(self, length: int) -> None:
        if all(resident_from_window(layer, length) for layer in self.layers):
            for layer in self.layers:
                layer.crop_to(length)
        else:
            self._reload_windows(length)
        self._held = length
        if length < self._view.settled:
            self._change_view(self._view.cropped(self._view.logical(length)), self._chain.ids[:length])
        self._chain.crop(length)
        if self._saver is not None:
            self._saver.crop(length)

    def _reload_windows(self, length: int) -> None:
        """A sliding layer has let go of the window before `length`: gets it back from the store."""
        spans = crop(self._find(self._view, self._chain.ids[:length]), length)
        if total_tokens(spans) < length:
            raise CacheUseError(
                f"can't go back to {length} tokens: a sliding-window layer does not hold the window before it any "
                "more and the store does not have it; call activate_past_recording() before, or reset()"
            )
        try:
            self._restore = self._plan(spans, length)
            self._finish_restore()
        except BaseException:
            self._clear()
            raise

    # the rest of the Cache contract

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens from every layer.

        Raises:
            ValueError: the number is positive.
            CacheUseError: the window before that is neither in a sliding layer nor in the store.
            LoadError: it was in the store, but can't be read any more; nothing is held then.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the number of tokens to remove as a negative number, not {tokens_to_remove}")
        with self._guard:
            self._finish_restore()
            self._crop_to(max(0, self._held + tokens_to_remove))
            self._changed = True
            self._confirmed = self._held

    def reset(self) -> None:
        """Lets go of everything held; session and store stay. In a loop of one's own, `save` comes before that."""
        with self._guard:
            self.save()
            self._forward = None
            self._clear()
            self._change_view(View.plain(self._view.model_root), np.empty(0, dtype=np.int64))

    def activate_past_recording(self) -> None:
        """From now on the cache can go back by `crop` however far: what comes may be drafts to be checked."""
        self._speculating = self._checked
        super().activate_past_recording()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._finish_restore()
        super().batch_repeat_interleave(repeats)

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionStoreCache":
        """An independent copy of what is held, without session and store: nothing of it is saved."""
        self._finish_restore()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        Cache.__init__(twin, layers=[copy.deepcopy(layer, memo) for layer in self.layers])
        for layer in twin.layers:
            if isinstance(layer, SlidingLayer):
                layer.saved_to = None
        twin._model = self._model
        twin._attachment = self._attachment
        twin._store = None
        twin.session = None
        twin._saving = False
        twin._wait = 0.0
        twin._limit = self._limit
        twin._window = self._window
        twin._prepare_empty()
        twin._fingerprint = self._fingerprint
        twin._change_view(self._view, self._chain.ids)
        twin._held = self._held
        twin._stats = replace(self._stats)
        return twin


def resident_from_window(layer: StoreLayer, length: int) -> bool:
    """Whether a layer can be cropped to `length` with what it holds."""
    return not isinstance(layer, SlidingLayer) or layer.has_window(length)


def _device_of(model: nn.Module) -> torch.device:
    """Where a model wants its input."""
    embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embeddings, "weight", None)
    if weight is None or weight.device.type == "meta":
        device: torch.device = getattr(model, "device", torch.device("cpu"))
        return device
    return torch.device(weight.device)


def _one_row(input_ids: torch.Tensor) -> np.ndarray:
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or input_ids.shape[1] == 0:
        raise CacheUseError(f"input_ids must be [1, tokens], not {list(input_ids.shape)}")
    ids: np.ndarray = input_ids[0].detach().cpu().numpy()
    return ids


_default: AttentionStore | None = None
_default_lock = threading.Lock()


def _default_store() -> AttentionStore:
    """The store at the default path, opened once per process."""
    global _default
    with _default_lock:
        if _default is None or _default.closed:
            _default = AttentionStore()
        return _default
