"""What a cache holds between turns and during them: tokens in its layers, seen through a view, and what is known of
them."""

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CacheUseError
from ..session.chain import TokenChain
from ..session.spans import Span, total_tokens
from ..session.view import View
from ..store.blocks.keys import Key, chain_root
from .inputs.content import Content, has_places
from .inputs.held import go_on_after, held_ids
from .layers.by_token import StoreLayer
from .layers.kept import KeptLayer
from .layers.kinds import granularity
from .setup import Setup
from .transfer.load import Restore
from .transfer.save import BlockSaver
from .transfer.windows import SplitSaver, sliding_layers, whole_until

if TYPE_CHECKING:
    from .encoder_output import EncoderOutput

_UNKNOWN = "unknown"


class Held:
    """The tokens of a conversation that layers hold.

    `length`, the layers, the chain of ids and what is being saved agree after every method.
    """

    def __init__(self, setup: Setup, layers: list[KeptLayer]) -> None:
        self.setup = setup
        self.layers = layers
        self.busy = threading.Lock()
        """Taken while a turn is running."""
        self.guard = threading.RLock()
        """Held while the state changes: `store.flush()` in another thread must find it whole."""
        self.fingerprint = _UNKNOWN
        """Of the model that computed what is held."""
        self.view = View.plain(chain_root(_UNKNOWN, ""))
        self.chain = TokenChain(self.view.root, setup.store.block_size if setup.store else 256)
        """The ids of the tokens held, as far as they are identified."""
        self.saver: BlockSaver | None = None
        self.length = 0
        self.known = 0
        """How many leading tokens of the turn's prompt the store has; fewer are reused where computing is faster."""
        self.in_store = 0
        """How many of the tokens held when the turn began the store had."""
        self.went_on_from: Key | None = None
        """The last block that was reused when the prompt was taken up."""
        self.granularity = granularity(layers)
        """What can be reused of a text: up to any `token`, up to a `checkpoint`, or nothing (`none`)."""
        apart = setup.store is not None and setup.store.keeps_windows_apart
        self.sliding: Sequence[int] = sliding_layers(layers) if apart else ()
        """The layers whose windows the store keeps apart from blocks, so that they may be gone."""
        self.ending = [layer for layer in layers if type(layer).end_forward is not StoreLayer.end_forward]
        """The layers that have something to do at the end of a forward: those that do not see every token."""
        self.states: list[Any] = [layer for layer in layers if layer.has_state]
        self.states_at: int | None = 0
        """The number of tokens that the layers' running states are right for; None if for none, after an interrupt."""
        self.checkpoints: dict[int, Key] = {}
        """Checkpoints that were taken or used, by their number of tokens."""
        self.uneven = False
        """Whether layers hold other numbers of tokens than they were fed: then nothing is known of what they hold."""
        self.rows_apart = False
        """Whether layers hold another number of rows than the ids that they were fed, such as one for the codes of
        several codebooks together: then nothing is known of what they hold."""
        self.content: Content | None = None
        """What of the conversation's beginning is not text; None if all of it is, or nothing is known of that."""
        self.fed_beside: list[torch.Tensor] | None = None
        """The ids `[rows, tokens]` of all that is held, where inputs that are not identified went into it too."""
        self.load: Restore | None = None
        """What is still on its way into the layers."""
        self.encoder: EncoderOutput | None = None
        """What is held of an encoder's output, of models that have one."""

    # what is held

    @property
    def rows(self) -> int:
        """The batch size of what is held; 0 if nothing is."""
        return next(filter(None, (layer.rows for layer in self.layers)), 0)

    @property
    def model_root(self) -> Key:
        """What the chains of the model begin with."""
        store = self.setup.store
        return store.root(self.fingerprint) if store is not None else chain_root(self.fingerprint, "")

    @property
    def secret(self) -> bytes:
        """What keys are made with beside content; empty where the store has none."""
        return self.setup.store.secret if self.setup.store is not None else b""

    @property
    def conversation(self) -> np.ndarray:
        """The ids `[tokens]` of the conversation, those dropped from the window included."""
        return self.view.whole(self.chain.ids)

    def going_on(self, ids: np.ndarray, named: Mapping[str, Any], *, alone: bool = False) -> Content | None:
        """What of a prompt `[tokens]`, given without pictures, stands for those that are held: see `go_on_after`.

        Args:
            named: what is given beside the ids.
            alone: the ids are new ones alone, which come after all that is held.
        """
        held = self.chain.ids
        raw = np.concatenate([held_ids(self.content, held), ids]) if alone else ids
        return go_on_after(self.content, held, raw, named)

    @property
    def has_unknown_inputs(self) -> bool:
        """Whether inputs that are not identified, such as pictures, went into what is held."""
        return self.fed_beside is not None and self.length > 0

    def is_begun_by(self, ids: torch.Tensor) -> bool:
        """Whether the tokens held are those that `ids` `[rows, tokens]` begin with, where they are not identified."""
        if not self.fed_beside:
            return False
        fed = torch.cat(self.fed_beside, dim=1)
        same = fed.shape[1] == self.length < ids.shape[1] and len(fed) == len(ids) == self.rows
        return same and torch.equal(fed, ids[:, : self.length].to(fed))

    def refuse_places(self, ids: torch.Tensor) -> None:
        """Raises `CacheUseError` if `ids`, which come without pictures, have places of some, and ones that are not
        identified are held: without them the text would be another."""
        if self.has_unknown_inputs and has_places(self.setup.model.config, ids):
            raise CacheUseError(
                "the prompt has places of pictures or sounds, and none are given, but what the cache holds is another "
                "text: pass all of its inputs, or another cache for another conversation"
            )

    def whole(self, length: int) -> int:
        """The longest beginning of at most `length` tokens that has no part of a picture."""
        return self.content.floor(length) if self.content is not None else length

    def whole_from(self, length: int) -> int:
        """Position from which layers need their KV so that what follows `length` can be saved in whole blocks; where
        nothing is saved, no block need be whole."""
        return self.chain.bounds(self.chain.block_at(length))[0] if self.saver is not None else length

    def covers(self, length: int, spans: Sequence[Span]) -> bool:
        """Whether the layers hold, or the spans have, all that is needed to go on at `length`."""
        whole_from = self.whole_from(length)
        if total_tokens(spans) >= length:
            return self._windows_until(length, spans) == length
        return all(layer.missing_from(length, whole_from) >= length for layer in self.layers)

    def whole_until(self, length: int, spans: Sequence[Span]) -> int:
        """The longest beginning, of at most `length` tokens in `spans`, that all layers can go on after: where windows
        may be gone, not every one; and none with a part of a picture."""
        before = -1
        while length != before:
            before, length = length, self._windows_until(self.whole(length), spans)
        return length

    def _windows_until(self, length: int, spans: Sequence[Span]) -> int:
        store = self.setup.store
        if not self.sliding or store is None:
            return length
        return whole_until(length, spans, self._windows_missing_from, store.there, self.secret)

    def _windows_missing_from(self, length: int) -> int:
        whole_from = self.whole_from(length)
        return min(self.layers[number].missing_from(length, whole_from) for number in self.sliding)

    # changing it

    def see_through(self, view: View) -> None:
        """From now on what is held is that of `view`; KV that belongs to another is let go."""
        if not view.same(self.view):
            for layer in self.layers:
                layer.reset()
            self.length = self.states_at = 0
            self.change_view(view, np.empty(0, dtype=np.int64))

    def change_view(self, view: View, ids: np.ndarray) -> None:
        """Sets the view, where the layers hold the tokens `ids` of it."""
        store = self.setup.store
        self.view = view
        self.checkpoints = {}
        self.chain = TokenChain(view.root, self.chain.block_size, ids, view.base, view.secret)
        if self.saver is not None:
            self.saver.release()
        self.saver = None
        if store is not None and self.setup.saves:
            continues = view.prefix[-1].block if view.prefix else b""
            settings = self.chain, store, self.fingerprint, continues
            split = SplitSaver(self.layers, self.sliding, *settings) if self.sliding else None
            self.saver = split or BlockSaver(self.layers, *settings)

    def crop_chain(self, length: int) -> None:
        """Forgets the ids of what comes after `length` tokens, which the layers have let go."""
        self.chain.crop(length)
        if self.saver is not None:
            self.saver.crop(length)

    def drop_from(self, length: int) -> None:
        """Lets go of what is held beyond `length`, though a sliding layer may then lack the window before it."""
        for layer in self.layers:
            if layer.first < length:
                layer.crop_to(length)
            else:
                layer.reset()
                if layer.has_state:
                    self.states_at = None if length else 0
        self.length = min(self.length, length)
        self.crop_chain(length)

    def step_back(self, length: int) -> None:
        """Takes running states back to `length`, if that can be done without the store."""
        if length == 0:
            for layer in self.states:
                layer.reset()
            self.states_at = 0
        elif self.states and self.states_at is not None:
            count = self.states_at - length
            undone = [count >= 0 and layer.step_back(count) for layer in self.states]
            self.states_at = length if all(undone) else None

    def clear(self) -> None:
        """Lets go of everything held."""
        if self.load is not None:
            self.load.abandon()
            self.load = None
        for layer in self.layers:
            layer.reset()
        self.length = self.states_at = 0
        self.fed_beside = None
        self.uneven = self.rows_apart = False
        self.known = 0
        if self.view.base:
            self.change_view(self.view.rebased(0), np.empty(0, dtype=np.int64))
        self.crop_chain(0)

    def stop_saving(self) -> None:
        """What comes is not kept any more."""
        if self.saver is not None:
            self.saver.release()
            self.saver = None

    def hold_back(self) -> None:
        """Until the turn ends, what it computes is not handed over."""
        if self.saver is not None:
            self.saver.hold()

    # rows

    def select_rows(self, indices: torch.Tensor) -> None:
        """Keeps some rows, in this order."""
        for layer in self._all_layers():
            layer.batch_select_indices(indices)

    def repeat_rows(self, repeats: int) -> None:
        """Has every row so many times, one after the other."""
        for layer in self._all_layers():
            layer.batch_repeat_interleave(repeats)

    def _all_layers(self) -> list[Any]:
        layers: list[Any] = [*self.layers]
        return layers if self.encoder is None else [*layers, *self.encoder.side.layers]
