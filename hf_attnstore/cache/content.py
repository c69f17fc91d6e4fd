"""What a cache holds: tokens in its layers, seen through a view, and what is known of them."""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CacheUseError, NotFiniteError
from ..session.chain import TokenChain, common_prefix
from ..session.spans import Span, total_tokens
from ..session.view import View
from ..session.window import Window
from ..store.blocks.keys import Key, chain_root
from ..store.processes.locks import SessionLock
from ..store.processes.parts import part_name
from ..store.store import AttentionStore
from .costs.gate import Gate
from .hooks import Attachment
from .inputs.content import Content, has_places
from .inputs.held import go_on_after, held_ids
from .layers.by_token import KeptLayer
from .layers.kinds import granularity
from .layers.states import RunningState
from .model.compiled import OutsideGraphsCache
from .model.ranks import Ranks
from .probing.continuing import Continues
from .stats import TurnStats
from .transfer.checkpoints import take_checkpoint
from .transfer.load import Restore, as_it_comes
from .transfer.record import TurnRecorder
from .transfer.save import BlockSaver

logger = logging.getLogger("hf_attnstore")

_UNKNOWN = "unknown"
NOT_FINITE = "there is NaN or infinity in what the model computed"


@dataclass(frozen=True)
class Forward:
    """A forward that is running: so many new tokens in so many rows."""

    count: int
    rows: int
    thread: int


class CacheContent(OutsideGraphsCache):
    """A cache that holds tokens of a conversation, seen through a view.

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
    boundaries: Sequence[int] | None = None
    """Where messages of the next prompt begin or end, in tokens of the conversation, for who knows that: there running
    states are kept. None goes by the ids with which messages end."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Makes text of ids, for who has a tokenizer: `stats.diverged` then speaks in words."""
    _gate: Gate
    record_timeline = False
    """Whether turns are recorded, from the next one on: see `timeline`."""
    begin_load: Callable[[Restore], None] = staticmethod(as_it_comes)
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
        self._holds_for_additions = False
        """Whether blocks wait for the turn's end only because code was added to the model, which may yet change it.
        States can't wait: they are asked for before that each time."""
        self._rows_apart = False
        """Whether layers hold another number of rows than the ids that they were fed, such as one for the codes of
        several codebooks together: then nothing is known of what they hold."""
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
        self.passed_on = False
        """Whether a turn that runs has called a `generate`, which has not begun yet."""
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
        self._fed_beside: list[torch.Tensor] | None = None
        """The ids `[rows, tokens]` of all that is held, where inputs that are not identified went into it too."""
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

    def going_on(self, ids: np.ndarray, named: Mapping[str, Any], *, alone: bool = False) -> Content | None:
        """What of a prompt `[tokens]`, given without pictures, stands for those that are held: see `go_on_after`.

        Args:
            named: what is given beside the ids.
            alone: the ids are new ones alone, which come after all that is held.
        """
        held = self._chain.ids
        raw = np.concatenate([held_ids(self._content, held), ids]) if alone else ids
        return go_on_after(self._content, held, raw, named)

    @property
    def holds_inputs(self) -> bool:
        """Whether inputs that are not identified, such as pictures, went into what is held."""
        return self._fed_beside is not None and self._held > 0

    def is_begun_by(self, ids: torch.Tensor) -> bool:
        """Whether the tokens held are those that `ids` `[rows, tokens]` begin with, where they are not identified."""
        if not self._fed_beside:
            return False
        fed = torch.cat(self._fed_beside, dim=1)
        same = fed.shape[1] == self._held < ids.shape[1] and len(fed) == len(ids) == self.rows
        return same and torch.equal(fed, ids[:, : self._held].to(fed))

    def refuse_places(self, ids: torch.Tensor) -> None:
        """Raises `CacheUseError` if `ids`, which come without pictures, have places of some, and ones that are not
        identified are held: without them the text would be another."""
        if self.holds_inputs and has_places(self._model.config, ids):
            raise CacheUseError(
                "the prompt has places of pictures or sounds, and none are given, but what the cache holds is another "
                "text: pass all of its inputs, or another cache for another conversation"
            )

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

    def is_of_its_model(self) -> bool:
        """Whether the model is still the one that the turn began with. Where nobody can tell, it is not."""
        try:
            return self._attachment.fingerprint.current() == self._fingerprint
        except Exception:
            return False

    def _take_checkpoint(self, *, wait: bool) -> None:
        """Hands the layers' running states to the store, if they are right for what is held."""
        held = self._held
        if not self._states or self._saver is None or self._store is None or self._untracked:
            return
        if not held or self._states_at != held or len(self._chain) != held or self.rows != 1:
            return
        if self._saver.holds_back and not (self._holds_for_additions and self.is_of_its_model()):
            return
        try:
            key, nbytes = take_checkpoint(self.layers, self._chain, self._store, self._fingerprint, wait=wait)
        except NotFiniteError:
            self._untrack(NOT_FINITE, once=True)
            return
        self._checkpoints[held] = key
        self._stats.saved_bytes += nbytes
        self._stats.checkpoints += nbytes > 0
        self._attachment.state_bytes = nbytes or self._attachment.state_bytes

    def _whole(self, length: int) -> int:
        """The longest beginning of at most `length` tokens that has no part of a picture."""
        return self._content.floor(length) if self._content is not None else length

    def _whole_from(self, length: int) -> int:
        """Position from which layers need their KV so that what follows `length` can be saved in whole blocks; where
        nothing is saved, no block need be whole."""
        return self._chain.bounds(self._chain.block_at(length))[0] if self._saver is not None else length

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

    def _clear(self) -> None:
        """Lets go of everything held."""
        if self._restore is not None:
            self._restore.abandon()
            self._restore = None
        for layer in self.layers:
            layer.reset()
        self._held = self._states_at = 0
        self._fed_beside = None
        self._uneven = self._rows_apart = False
        self._known = 0
        if self._view.base:
            self._change_view(self._view.rebased(0), np.empty(0, dtype=np.int64))
        self._chain.crop(0)
        if self._saver is not None:
            self._saver.crop(0)

    def _elsewhere(self) -> float:
        """Seconds of this turn that were spent on loading and saving, and not on computing."""
        waited = self._restore.exposed_seconds if self._restore is not None else 0.0
        return waited + (self._saver.seconds if self._saver is not None else 0.0)

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
