"""Turns of a cache: from finding what is known of a conversation to handing over what is new."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import CacheUseError, ContextWindowError, LoadError, SessionBusyError, StoreClosedError
from ..session.chain import common_prefix
from ..session.manifests import write_manifest
from ..session.spans import Span, crop, total_tokens
from ..session.view import View
from ..store.blocks.keys import Key, chain_root
from .content import NOT_FINITE
from .divergence import WORTH, find_divergence
from .identity.adapters import adapter_problem, prompt_learning
from .identity.callables import UnknownCodeError
from .identity.computing import count_hooks
from .identity.model_parts import difference, note_name
from .inputs.content import Content, has_stand_ins
from .layers.by_token import FullLayer
from .layers.states import RunningState
from .model.ranks import OtherRankError
from .parking import ParkingCache
from .pauses import BUDGET, choose_pauses, end_ids, ends_of_messages
from .stats import TurnStats
from .transfer.record import TurnRecorder
from .transfer.save import BlockSaver

logger = logging.getLogger("hf_attnstore")

_MAX_EXPECTED_NEW = 4096
_LITTLE = 16
"""New tokens, of however short a prompt, for which it is not asked why they are new."""


class CacheTurns(ParkingCache):
    """A cache that has turns: one `generate` each, or the forwards of a loop of one's own up to `save`."""

    _hooks = 0
    """How many hooks were on the model when it was last looked at."""
    _began = 0.0
    """When the turn began, on the clock of `time.perf_counter`."""

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

    def begin_turn(
        self,
        ids: np.ndarray,
        *,
        limit: int,
        new_tokens: int = 0,
        checked: bool = False,
        unreadable: str = "",
        content: Content | None = None,
    ) -> int:
        """Starts a turn on the conversation `ids` `[tokens]`: finds and begins to load what is known of it.

        Args:
            limit: reuse at most so many of its leading tokens.
            new_tokens: how many tokens are expected on top: for the capacity of the layers, and for the window.
            checked: the caller vouches for masks and positions, so that forwards need not look at them.
            unreadable: why nothing is to be loaded, if so; nothing is saved then.
            content: what of the conversation is not text; `ids` are its ids then.

        Returns:
            The tokens reused; `get_seq_length()` says the same from now on, though the data may still be coming.
            What is to be fed is `prompt_in_view(ids)`, without these.

        Raises:
            ContextWindowError: what is new, or `new_tokens`, does not fit into the window.
        """
        self._acquire_with_others()
        with self._guard:
            try:
                self._ranks.attempt(self._open)
                self._checked = checked
                self._content = content
                self._fed_beside = None
                if unreadable:
                    self._untrack(unreadable)
                if content is not None and self._continues != "parts":
                    self._untrack("the model takes tokens one by one, and pictures or embeddings can't be fed so")
                self._untrack_with_others()
                self._refuse_to_cut(ids, new_tokens)
                self._take_parked(ids)
                self._see_through(self._choose_view(ids, limit, new_tokens))
                shown, limit = self._view.in_view(ids), limit - self._view.dropped
                if self._limit is not None and len(shown) > self._limit:
                    self._untrack(f"positions beyond {self._limit} change the rotary frequencies of all")
                for layer in self.layers:
                    if isinstance(layer, FullLayer):
                        layer.expected = len(shown) + min(new_tokens, max(_MAX_EXPECTED_NEW, len(shown)))
                    if getattr(layer, "record_past", False):  # of an earlier turn; who needs it asks again
                        if isinstance(layer, RunningState):
                            layer.step_back(0)
                        layer.record_past = False  # type: ignore[attr-defined]
                if self._ranks.alone:
                    reused, spans = self._take_up(shown, limit)
                    self._adopt(shown[:reused], spans)
                    self._report_taken(reused)
                else:
                    self._take_up_together(shown, limit)
                    reused, spans = self._held, []
                # where little is new, all of the session was found; else what comes now takes longer than to ask
                if not self._untracked and (not reused or len(shown) - reused > self._chain.block_size):
                    self._say_if_of_another_model()
                if self._ranks.alone and not self._untracked:
                    self._explain(ids, spans)
            except ContextWindowError:
                self._park()  # nothing has changed
                self._close_turn()
                raise
            except BaseException:
                self._clear()  # half of what was planned may be in place
                self._close_turn()
                raise
            self._prompt = shown if checked else None
            self._prompt_tokens = len(shown)
            added = bool(self._attachment.fingerprint.computing.additions)
            if added:
                self.hold_back()
            self._holds_for_additions = added
            self._stops = self._choose_stops(reused, len(shown) - 1, shown) if checked else []
            stats = self._stats
            stats.prompt_tokens = len(ids)
            stats.reused_tokens = reused
            stats.dropped_tokens = self._view.dropped
            if self._view.dropped:
                stats.truncation = "rotated" if self._view.base else "recomputed"
        return reused

    def _choose_stops(self, first: int, last: int, shown: np.ndarray) -> list[int]:
        """Where a prefill of `[first, last]` of the tokens `shown` is to pause, so that running states can be kept:
        where other texts may part from it, and where the user wants checkpoints. Nothing beyond `last` could ever be
        used for the same prompt. Models that continue in steps only pause after every token."""
        if self._untracked or self._content is not None:  # pictures go with the ids that they belong to, in one forward
            return []
        if self._continues == "steps":
            return list(range(first + 1, last + 1)) if first else [last] if last else []
        if self._saver is None or not self._states or first >= last:
            return []
        every = self._checkpoint_every or last + 1
        if self.boundaries is not None:
            boundaries = sorted(self._view.position(place) for place in self.boundaries)
        else:
            boundaries = ends_of_messages(shown[:last], end_ids(self._model))
        pauses = choose_pauses(
            first,
            last,
            parted=0 if self._computes_known else self._stats.matched_tokens,
            boundaries=boundaries,
            most=BUDGET // self._attachment.state_bytes if self._attachment.state_bytes else None,
        )
        return sorted({*range((first // every + 1) * every, last, every), *pauses})

    @property
    def continues_in_parts(self) -> bool:
        """Whether the model goes on correctly after what is held when it is fed several tokens at once."""
        return self._continues == "parts"

    @property
    def stops(self) -> list[int]:
        """Positions at which the prefill of this turn's prompt is to pause, by feeding it in parts."""
        return self._stops

    def _refuse_to_cut(self, ids: np.ndarray, new_tokens: int) -> None:
        if self._window is not None and self._window.overflows(len(ids), new_tokens) and has_stand_ins(ids):
            raise ContextWindowError(
                f"{len(ids)} tokens and room for {new_tokens} do not fit into the window of {self._window.size} "
                "tokens, and of a conversation with pictures, sounds or embeddings nothing can be dropped: leave out "
                "its oldest messages with their pictures, or set a larger window"
            )

    def prompt_in_view(self, ids: np.ndarray) -> np.ndarray:
        """Of the conversation `ids` that a turn was begun on, the tokens that the model is to see."""
        return self._view.in_view(ids)

    def begin_unidentified_turn(
        self,
        reason: str,
        prompt_tokens: int = 0,
        *,
        expected: bool = False,
        with_inputs: bool = False,
        goes_on: bool = False,
    ) -> None:
        """Starts a turn whose content token ids do not identify: nothing is reused and nothing kept.

        Args:
            expected: it is not logged.
            with_inputs: what ids do not identify are inputs beside them, which nobody can compute from the ids again.
            goes_on: it goes on after the tokens held, of another such turn.

        Raises:
            CacheUseError: it is to go on, and what was held is of no use any more.
        """
        self._acquire_with_others()
        with self._guard:
            try:
                self._ranks.attempt(self._open)
                self._checked = True
                self._content = None
                if not goes_on:
                    self._clear()
                    self._see_through(self._view.as_plain())
                    self._fed_beside = [] if with_inputs else None
                elif not self._held:
                    raise CacheUseError(
                        "what the cache held is gone: pass the whole conversation with all of its inputs"
                    )
                self._untrack(reason, expected=expected)
            except BaseException:
                self._close_turn()
                raise
            self._stats.prompt_tokens = self._prompt_tokens = prompt_tokens

    @property
    def in_generate(self) -> bool:
        """Whether a `generate` of this thread is running with this cache."""
        return self._in_turn and self._checked and self._turn_thread == threading.get_ident()

    def note_first_token(self) -> None:
        """`generate` has a new token, as it goes on or has returned. On a GPU that is when there really is one: it
        has looked at it by then, so nothing of the prompt is still being computed."""
        if self._checked and self._stats.ttft_seconds is None and 0 < self._prompt_tokens <= self._held:
            self._stats.ttft_seconds = time.perf_counter() - self._began

    def end_of_generate(self) -> None:
        """`generate` has returned: notes it if the model computed without the cache that it was given."""
        self.note_first_token()
        stats = self._stats
        if not stats.prefilled_tokens and not stats.generated_tokens:
            if not self._untracked:
                self._note("the model let go of its cache and computed all of the prompt", "cache not used")
            stats.reused_tokens, stats.prefilled_tokens = 0, stats.prompt_tokens

    def abandon(self, error: LoadError) -> None:
        """A load failed in the middle of a turn: lets go of everything held. The turn, which still has the session
        to itself, is to be begun again, or ended."""
        with self._guard:
            self._note(f"a load failed, its tokens are computed again: {error}", "load failed")
            self._forward = None
            self._clear()
            self._reopening = True

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
                    self._check_additions()
                    self._hand_over()
                    self._park()
                except StoreClosedError:
                    self._stop_saving()
            finally:
                self._stats.seconds = time.perf_counter() - self._began
                self._close_turn()

    def _check_additions(self) -> None:
        """Code that somebody added to a model may change what it goes by while it runs. Then what the turn computed
        belongs to no model that could be named."""
        added = self._attachment.fingerprint.computing.additions and not self._untracked
        if added and self._changed and not self.is_of_its_model():
            self._untrack("the model, or code that was added to it, changed while the turn ran")
            self._clear()

    def _notice_hooks(self) -> None:
        """Notices hooks that came or went since the turn began, before a forward computes with them."""
        count = count_hooks(self._model)
        if count != self._hooks:
            self._hooks = count
            if not self._untracked and not self.is_of_its_model():
                self._untrack("hooks were put on the model, or taken off, in the middle of a turn")

    def hold_back(self) -> None:
        """Until the turn ends, what it computes is not handed over."""
        self._holds_for_additions = False
        if self._saver is not None:
            self._saver.hold()

    def drop_turn(self, reason: str, *, expected: bool = False) -> None:
        """Ends the turn and lets go of everything held: none of it is to be kept. What is `expected` is not logged."""
        with self._guard:
            self._untrack(reason, expected=expected)
            self._clear()
            self.end_turn()

    @property
    def unidentified(self) -> str:
        """Why token ids do not identify what the turn computes, so that nothing is kept; empty if they do."""
        return self._untracked

    def _acquire_with_others(self) -> None:
        try:
            self._ranks.attempt(self._acquire)
        except OtherRankError:
            self._close_turn()
            raise

    def _untrack_with_others(self) -> None:
        """What one rank of a tensor-parallel model can't keep, none does."""
        if not self._ranks.all(not self._untracked):
            self._untrack("another rank of this tensor-parallel model can't keep it")

    def _acquire(self) -> None:
        """Makes this thread the only one that has a turn on this object, and this object the only one with a turn
        on the session."""
        if self._reopening:
            return
        self._began = time.perf_counter()
        self.save()
        if not self._busy.acquire(blocking=False):
            raise SessionBusyError("this cache object is in the middle of another turn; make one object per thread")
        self._turn_thread = threading.get_ident()
        try:
            if self._store is not None:
                self._store.check_not_left_behind()
                if self._store.closed:
                    raise StoreClosedError(
                        f"the store {self._store.path} of this cache is closed; make a new cache with an open store"
                    )
                name = self._kept_as
                if name is not None and self._saving:
                    self._lock = self._store.lock_session(name, self._wait)
            self._unpark()
            self._begin_taking()
        except BaseException:
            self._close_turn()
            raise

    def _open(self) -> None:
        self._in_turn = True
        if self._store is not None and self._attachment.computes_on_cpu:
            self._store.begin_computing(id(self))
        self._begin_recording()
        before = self._stats if self._reopening else TurnStats()
        self._stats = TurnStats(recomputed=before.recomputed, missed=before.missed)
        self._reopening = False
        self._untracked = ""
        self._changed = False
        self._speculating = False
        self._prompt = None
        self._stops = []
        for layer in self._states:
            layer.thaw()
        self._settle()
        self._identify()
        self._gate.begin_turn(self._fingerprint, self._store if not self._untracked else None)
        self._continues = "parts"
        asks = self.granularity != "none" and not self._attachment.is_verified(self._model, self._fingerprint)
        if asks and self._ranks.all(not self._untracked):
            # ranks have to ask together, whatever one of them may know
            store = self._store if self._ranks.alone else None
            found = self._attachment.continues(self._model, self._fingerprint, store)
            self._continues = found.how
            if not found.how:
                self._untrack(f"no cache continues {type(self._model).__name__}: {found.problem}", once=True)
                self._stats.missed = "model does not continue"
        if self.granularity == "none":
            kinds = ", ".join(sorted({layer.kind for layer in self.layers if not layer.reusable}))
            self._untrack(f"nothing is known of layers of kind {kinds}", expected=True)
            self._stats.recomputed, self._stats.missed = self._untracked, "unknown kind of layer"

    def _begin_recording(self) -> None:
        """Where turns are recorded, this one has a recorder of its own, unless it goes on after a load that failed."""
        if not self._reopening or not self.record_timeline:
            self._end_recording()
            self._recorder = TurnRecorder(self._store, self._attachment.devices) if self.record_timeline else None

    def _end_recording(self) -> None:
        """What was recorded stays until the next turn."""
        if self._recorder is not None:
            self._recorder.end()

    def _finish_saving(self, saver: BlockSaver) -> int:
        """Hands over what was not yet. Returns how many leading tokens the store has."""
        began = time.perf_counter()
        saved = saver.finish(len(self._chain))
        if self._recorder is not None:
            self._recorder.saved("end of the turn", began)
        return saved

    def _close_turn(self) -> None:
        self._end_recording()
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
        adapters = adapter_problem(self._model) or prompt_learning(self._given_model)
        if adapters is not None:
            self._untrack(adapters)
        try:
            fingerprint = self._attachment.fingerprint.current()
        except UnknownCodeError as error:
            self._untrack(f"what the model computes by can't be identified: {error}", once=True)
            return
        except Exception as error:
            self._untrack(f"the model's weights can't be identified ({error})", once=True)
            return
        self._hooks = count_hooks(self._model)
        if fingerprint != self._fingerprint:
            if self._held:
                self._note(
                    "the model's weights or settings changed: what the cache held is computed again", "other model"
                )
            self._clear()
            self._fingerprint = fingerprint
            if self._store is not None:
                plain = View.plain(self._store.root(fingerprint), self._store.secret)
            else:
                plain = View.plain(chain_root(fingerprint, ""))
            self._change_view(plain, np.empty(0, dtype=np.int64))

    def _say_if_of_another_model(self) -> None:
        """Tells why what is known of the session is not reused, if it is that."""
        name, fingerprint = self._kept_as, self._fingerprint
        if self._store is None or name is None:
            return
        before = self._store.session_fingerprint(name)
        if before not in (None, "", fingerprint):
            what = difference(self._store.note(note_name(before)), self._attachment.fingerprint.parts())
            self._note(
                f"session {self.session!r} was computed by a model with other weights or settings "
                f"({before[:12]}, now {fingerprint[:12]}{'; ' + what if what else ''}): that KV is not reused",
                "other model",
            )

    def _remember_parts(self) -> None:
        """Keeps what the model is made of with the store, once, for who has to say what has changed."""
        assert self._store is not None
        kept = (str(self._store.path), self._fingerprint)
        if kept not in self._attachment.parts_kept:
            self._attachment.parts_kept.add(kept)
            if self._store.note(note_name(self._fingerprint)) is None:
                self._store.set_note(note_name(self._fingerprint), self._attachment.fingerprint.parts())

    def _explain(self, ids: np.ndarray, spans: Sequence[Span]) -> None:
        """Finds out where the conversation `ids` parts from what is known, if enough is new for that to be worth it."""
        new = len(ids) - max(self._stats.matched_tokens, total_tokens(spans))
        worth_asking = new >= min(WORTH, max(_LITTLE, len(ids) // 10))
        if self._store is None or not self._view.is_plain or not worth_asking or self._stats.missed:
            return
        bos = getattr(self._model.config, "bos_token_id", None)
        found = find_divergence(self._store, self._view.model_root, ids, spans, self._kept_as, bos)
        if found is None:
            return
        if self.decode is not None:
            found = found.in_text(self.decode)
        self._stats.diverged, self._stats.missed = found, "other text" if found.there else "not in the store"
        logger.info("session %r: the prompt %s", self.session, found)

    def _hand_over(self) -> None:
        if self._store is None:
            return
        stats = self._stats
        if self._saver is not None and self._changed:  # what was not computed now was handed over before, or let go
            saved = self._finish_saving(self._saver)
            if self._saver.unfit_from is not None:  # it serves this turn, and no other
                self._chain.crop(saved)
                self._untrack(NOT_FINITE, once=True)
            self._take_checkpoint(wait=True)
            # a turn that computed nothing that ids identify leaves the session as it was, and so does one that was
            # interrupted while it computed again what the store has
            if len(self._chain) >= self._known and (len(self._chain) or not self._untracked):
                self._commit(saved)
            stats.saved_bytes += self._saver.saved_bytes
            stats.save_seconds = self._saver.seconds
        self._gate.end_turn(self.layers, self._store)
        stats.recompute_seconds = self._gate.estimate(self._prompt_tokens)
        self._store.count_turn(
            stats.reused_tokens,
            stats.prompt_tokens,
            stats.loaded_bytes,
            stats.load_seconds,
            stats.exposed_load_seconds,
            stats.missed,
        )
        # not earlier: the copying would take cores from the turn itself
        from_disk, self._from_disk = self._from_disk, []
        self._store.promote(from_disk)

    def _say_if_it_shrinks(self, name: str, length: int) -> None:
        """A session that loses more than half of its tokens to others is seldom meant to."""
        assert self._store is not None
        if 2 * self._stats.reused_tokens >= length:
            return
        before = self._store.latest_manifest(name)
        if before is None or 2 * length >= before.length:
            return
        known, now = np.asarray(self._store.tokens(name, dropped=True)), self._view.whole(self._chain.ids)
        if common_prefix(known, now) < min(len(known), len(now)):
            logger.warning(
                "session %r had %d tokens, and %d others replace them: pass the whole conversation, not new tokens "
                "alone; what was there before is still found by its text",
                self.session,
                before.length,
                length,
            )

    def _blocks_beside(self) -> tuple[Key, ...]:
        """Blocks that belong to the session though none of its tokens is in them: checkpoints of what is held."""
        return tuple(
            key
            for tokens, key in self._checkpoints.items()
            if tokens <= len(self._chain) and self._chain.checkpoint_key(tokens) == key
        )

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
        name = self._kept_as
        if name is not None:
            manifest = write_manifest(self._view, spans, self._view.logical(len(chain)))
            manifest = replace(manifest, beside=self._blocks_beside())
            self._say_if_it_shrinks(name, manifest.length)
            self._store.commit(name, self._fingerprint, manifest)
            self._remember_parts()
        if spans:
            short = spans[-1].block_tokens < chain.block_size
            blocks = [span.block for span in spans]
            self._store.used(blocks, tokens, short=short, went_on_from=self._went_on_from, session=name)
        if self._checkpoints:
            self._store.touch(list(self._checkpoints.values()))
