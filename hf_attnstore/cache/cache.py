"""AttentionStoreCache: the `Cache` that continues conversations."""

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..errors import CacheUseError, LoadError
from ..store.store import AttentionStore
from ..timeline import Event
from .costs.gate import Gate, wanted
from .forwards import CacheForwards
from .hooks import Attachment, checked_every, checked_tokenizer, ensure_hooks, feed, owner_of
from .inputs.content import TYPES, Content, NotIdentifiedError, read_content
from .inputs.foreign import brings_features, foreign_input
from .layers.by_token import KeptLayer, SlidingLayer, StoreLayer
from .layers.kinds import make_layers
from .layers.states import ConvolutionState
from .model.cacheless import check_generator
from .model.compiled import outside_graphs
from .model.ranks import known_ranks
from .model.structure import is_encoder_decoder, position_limit
from .positions.spatial import places_in_space, spatial_positions
from .positions.truncation import window_of
from .stats import TurnStats

_MAX_PLANS = 8


class AttentionStoreCache(CacheForwards):
    """A cache for `generate` that takes up a conversation where it was left, and keeps it afterwards.

    Pass it as `past_key_values` together with the whole conversation so far. What the store knows of it, from
    this session or any other text that begins alike, is loaded instead of computed; the tokens that come out are
    those of plain `generate`.

    Args:
        model: the model; its hooks are attached by this (see `attach`).
        session: the name to keep the conversation under; None keeps its blocks only, found again by content. A list
            of names (or None) is for a batch of left-padded prompts, a conversation in each row: see `BatchCache`.
        store: the store; default is the one given to `attach`, else one at the default path.
        window: tokens that the model is to see at once, those still to be generated included; by default as many
            as it has positions for. A conversation that outgrows it loses its oldest tokens.
        keep_first: leading tokens that are never dropped, such as a system prompt. By default 4: models answer badly
            when the very first tokens are gone.
        drop: the share of the other tokens that goes when there is no room. 0 drops nothing, ever: past the
            window the model then does what it does without this cache.
        checkpoint_every: for models with layers that keep a running state (linear attention, SSM, convolution): keep
            it at every so many tokens too, beside the end of every prompt and of every turn. Prompts are then fed in
            parts of at most so many tokens.
        record: whether `timeline` is to say what happened when; `record_timeline` changes it later.
        save: whether to keep what is computed. False reads only.
        wait: seconds to wait where another turn is running on the session, instead of failing at once.
        gate: whether to compute again what would take longer to load, as measured on this machine; the tokens are the
            same either way. False reuses all that is known. Default: yes, unless the environment variable
            `ATTNSTORE_GATE` is `off`.
        resegment: for `generate` with one prompt: where the text of its beginning is known in other tokens, feed those
            in place of the prompt's. An answer that comes back as text, and that `tokenizer` cuts otherwise than the
            model did, is reused then. The model sees the same text in other ids, so what it says may differ.
        tokenizer: the model's, for `resegment`.

    Raises:
        UnsupportedModelError: the model is of a kind that can't be kept; the message says why.
        SessionNameError: the name can't be used.
        CacheUseError: a window, `keep_first` or `drop` that makes no sense.
        ContextWindowError: `keep_first` fills the window.

    An object may serve one turn or many; between turns it holds the KV, so that nothing is loaded twice. In a
    loop of one's own (`model(input_ids=new, past_key_values=cache)`), `match` or `resume` load, and `save` ends
    the turn. One thread at a time uses an object.
    """

    max_cache_len = -1
    """PEFT asks caches for it when it puts learned KV before a prompt; this is how it says that there is no limit."""

    def __new__(cls, model: Any = None, session: Any = None, *args: Any, **kwargs: Any) -> "AttentionStoreCache":
        """An encoder-decoder model gets the cache that its `generate` needs, a list of sessions that of a batch."""
        several = isinstance(session, (list, tuple))
        if kwargs.get("resegment") and (several or (model is not None and is_encoder_decoder(owner_of(model)))):
            raise CacheUseError("resegment=True is for one prompt of a decoder-only model: leave it out")
        if cls is AttentionStoreCache and model is not None and is_encoder_decoder(owner_of(model)):
            from .seq2seq import SequenceToSequenceCache

            return object.__new__(SequenceToSequenceCache)
        if cls is AttentionStoreCache and several:
            from .batch import BatchCache

            return object.__new__(BatchCache)
        return object.__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        session: str | Sequence[str | None] | None = None,
        store: AttentionStore | None = None,
        *,
        window: int | None = None,
        keep_first: int | None = None,
        drop: float = 0.5,
        checkpoint_every: int | None = None,
        record: bool = False,
        save: bool = True,
        wait: float = 0.0,
        gate: bool | None = None,
        resegment: bool = False,
        tokenizer: Any = None,
    ) -> None:
        self.resegments_with = checked_tokenizer(resegment, tokenizer)
        self._model = owner_of(model)
        self._given_model = model
        config: Any = self._model.config
        self._checkpoint_every = checked_every(checkpoint_every)
        self.record_timeline = record
        check_generator(self._model)
        layers: list[Any] = list(make_layers(self._model))
        Cache.__init__(self, layers=layers)
        self._attachment: Attachment = ensure_hooks(self._model)
        self._store: AttentionStore | None = store or self._attachment.store or _default_store()
        self.session = self._store.check_name(session) if session is not None else None  # type: ignore[arg-type]
        self._ranks = known_ranks(self._model)
        self._saving = save
        self._wait = wait
        self._limit = position_limit(config.get_text_config(decoder=True))
        self._window = window_of(config, window, keep_first, drop)
        # what an encoder takes can't be told by tokens
        learns = not is_encoder_decoder(self._model)
        self._gate = Gate(enabled=wanted(gate), devices=self._attachment.devices, learns=learns)
        self._prepare_empty()
        self._inputs: dict[str, Any] = {}
        self._store.register(self)

    @property
    def store(self) -> AttentionStore | None:
        """Where the KV is kept; None for a copy made by `deepcopy`."""
        return self._store

    @property
    def model(self) -> nn.Module:
        """The model whose KV this is."""
        return self._model

    def model_fingerprint(self) -> str:
        """The identity of the model as it is now."""
        return self._attachment.fingerprint.current()

    @property
    def stats(self) -> TurnStats:
        """The numbers of the last turn, or of the one that runs."""
        return self._stats

    @property
    def timeline(self) -> tuple[Event, ...]:
        """What happened when in the last turn, or in the one that runs, in the order of beginning; empty if that is not
        recorded. Files that are written behind a turn come in until all of them are."""
        return self._recorder.events() if self._recorder is not None else ()

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
        """The ids of the tokens held, as far as they are identified. Stand-ins, from 2³¹ up, are in the places of
        pictures, sounds and embeddings."""
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

    def match(self, input_ids: torch.Tensor, new_tokens: int = 0, **inputs: Any) -> int:
        """Loads what is known of a conversation, for a loop of one's own.

        Args:
            input_ids: `[1, tokens]`, the whole conversation so far.
            new_tokens: how many more are to be generated: the window keeps room for them.
            inputs: what goes with the ids, such as `pixel_values`: all of it, as for `generate`.

        Returns:
            The number of leading tokens that are done with, at most `tokens - 1`: they are in the cache, or were
            dropped from the window. Feed the model the rest, with `remaining_inputs()`.

        Raises:
            SessionBusyError: another turn is running on the session.
            ContextWindowError: what is new does not fit into the window.
        """
        ids = _one_row(input_ids)
        try:
            content = read_content(self._model.config, input_ids, inputs)
            if content is None and not brings_features(inputs):
                self.refuse_places(input_ids)
                content = self.going_on(ids, inputs)
            foreign = foreign_input({n: v for n, v in inputs.items() if content is None or n not in content.understood})
            if content is not None and content.positions is None and places_in_space(self._model):
                content.positions = spatial_positions(self._model, input_ids, inputs, content)
            problem = f"{foreign} are not identified by token ids" if foreign else ""
        except NotIdentifiedError as reason:
            problem = f"{reason} are not identified"
        if problem:
            self._inputs = dict(inputs)
            return self._load_now(ids, 0, new_tokens, unreadable=problem)
        self._inputs = {}
        done = self._load_now(content.ids if content else ids, len(ids) - 1, new_tokens, content=content)
        if content is not None:
            self._inputs = {name: value for name, value in inputs.items() if name not in content.understood}
            self._inputs |= content.inputs(done, len(ids))
            if inputs.get("inputs_embeds") is not None:
                self._inputs["inputs_embeds"] = inputs["inputs_embeds"][:, done:]
            self._inputs |= {name: content.types(name, len(ids)) for name in TYPES if inputs.get(name) is not None}
            self._inputs["position_ids"] = content.positions_at(done, len(ids))
        return done

    def remaining_inputs(self) -> dict[str, Any]:
        """Of the inputs that `match` was given, those that go with what is to be fed: without pictures that are in
        the cache already, and with positions where the model needs to be told."""
        return {name: value for name, value in self._inputs.items() if value is not None}

    def resume(self) -> torch.Tensor:
        """Loads all that the store has of the session, for a loop of one's own.

        Returns:
            The ids `[1, tokens]` of what is now in the cache, without those dropped from the window: feed the
            model what comes after. Stand-ins are among them where there were pictures (see `token_ids`).

        Raises:
            SessionNotFoundError: there is no such session.
        """
        if self._store is None or self.session is None:
            raise CacheUseError("resume() needs a cache with a session and a store")
        known = self._ranks.attempt(partial(self._store.tokens, self._kept_as or "", dropped=True))
        ids = np.asarray(known[: self._ranks.least(len(known))], dtype=np.int64)
        self._load_now(ids, len(ids), 0)
        return torch.from_numpy(self._chain.ids.copy())[None]

    # what models ask of a cache with running states

    @outside_graphs
    def get_seq_length(self, layer_idx: int = 0) -> int:
        if not any(layer.by_token for layer in self.layers) and self.granularity != "none":
            return self._held
        length: int = super().get_seq_length(layer_idx)
        return length

    @outside_graphs
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if not any(isinstance(layer, CacheLayerMixin) for layer in self.layers):
            return self._held + query_length, 0
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    @outside_graphs
    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.layers[layer_idx].settle()
        return super().get_conv_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.layers[layer_idx].settle()
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    @outside_graphs
    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._check_forward()
        self.layers[layer_idx].settle()
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    @outside_graphs
    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self._check_forward()
        self.layers[layer_idx].settle()
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    # what a batch does with the caches of its rows

    def load(self, ids: np.ndarray, limit: int, new_tokens: int) -> int:
        """Begins a turn on the conversation `ids` and loads what is known of its first `limit` tokens, which ends
        only with `end_turn`. Returns how many tokens are held."""
        self._load_now(ids, limit, new_tokens, own=False)
        return self._held

    def parts(self, ids: np.ndarray, first: int) -> list[np.ndarray]:
        """The tokens from `first` up to the last but one, in parts that the model may be fed."""
        last = len(ids) - 1
        bounds = sorted({first, *self._choose_stops(first, last, ids), last})
        return [ids[a:b] for a, b in pairwise(bounds)]

    def go_back(self, length: int) -> None:
        """Lets go of what is held beyond `length` tokens."""
        with self._guard:
            self._crop_to(min(length, self._held))

    def keep_states(self) -> None:
        """Hands a checkpoint of what is held to the store."""
        with self._guard:
            self._take_checkpoint(wait=False)

    def keep_tail(self) -> None:
        """Lets go of all KV but that of the last block, which is needed to save what comes; of nothing that is still to
        be saved when the turn ends."""
        if self._saver is not None and self._saver.holds_back:
            return
        first = self._chain.bounds(self._chain.block_at(self._held))[0]
        for layer in self.layers:
            if isinstance(layer, StoreLayer):
                layer.keep_from(first)

    def absorb(
        self, ids: np.ndarray, layers: Sequence[KeptLayer], place: int, start: int, stop: int, *, states: bool
    ) -> None:
        """Adds tokens that were computed in a row of a batch.

        Args:
            layers: the batch's.
            place: the row.
            start, stop: the columns of the tokens.
            states: whether the running states of the batch's layers are those after the last of them.
        """
        with self._guard:
            for own, theirs in zip(self.layers, layers, strict=True):
                if isinstance(own, StoreLayer) and isinstance(theirs, StoreLayer):
                    own.absorb(theirs.columns(place, start, stop))
                if states and isinstance(own, ConvolutionState) and isinstance(theirs, ConvolutionState):
                    own.take_row(theirs, place)
                own.length = self._held + len(ids)
            self._held += len(ids)
            self._states_at = self._held if states or not self._states else None
            if not self._untracked:
                self._chain.append(ids)
            self._changed = True

    def _load_now(
        self,
        ids: np.ndarray,
        limit: int,
        new_tokens: int,
        unreadable: str = "",
        content: Content | None = None,
        *,
        own: bool = True,
    ) -> int:
        # `checked` until everything is there, so that a `flush` in another thread leaves the turn alone
        begin = partial(
            self.begin_turn,
            ids,
            limit=limit,
            new_tokens=new_tokens,
            checked=True,
            unreadable=unreadable,
            content=content,
        )
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
                feed(self._model, self, torch.from_numpy(missing).to(device_of(self._model)))
        except BaseException:
            self.end_turn()
            raise
        self._checked, self._prompt = not own, None
        return self._view.logical(self._held)

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
            self._unpark()
            self._finish_restore()
            if self._uneven:
                super().crop(tokens_to_remove)
                self._held = max(0, self._held + tokens_to_remove)
                return
            self._crop_to(max(0, self._held + tokens_to_remove))
            self._known = 0
            if self._states and self._states_at != self._held:
                self._reload(self._held)
            self._changed = True
            self._confirmed = self._held

    def reset(self) -> None:
        """Lets go of everything held; session and store stay. In a loop of one's own, `save` comes before that."""
        with self._guard:
            self.save()
            self._forward = None
            self._clear()
            self._change_view(self._view.as_plain(), np.empty(0, dtype=np.int64))

    def activate_past_recording(self) -> None:
        """From now on the cache can go back by `crop` however far: what comes may be drafts to be checked."""
        self._speculating = self._checked
        super().activate_past_recording()

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._finish_restore()
        super().batch_repeat_interleave(repeats)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheUseError(
            "a cache can't be pickled: what it holds is kept by its store. Make one where it is needed, with "
            "AttentionStoreCache(model, session=..., store=AttentionStore(path)), or copy it with copy.deepcopy"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "AttentionStoreCache":
        """An independent copy of what is held, without session and store: nothing of it is saved."""
        self._finish_restore()
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        layers: list[Any] = [copy.deepcopy(layer, memo) for layer in self.layers]
        Cache.__init__(twin, layers=layers)
        for layer in twin.layers:
            if isinstance(layer, SlidingLayer):
                layer.saved_to = None
        twin._model = self._model
        twin._given_model = self._given_model
        twin._attachment = self._attachment
        twin._ranks = self._ranks
        twin._store = None
        twin.session = None
        twin._saving = False
        twin._wait = 0.0
        twin._limit = self._limit
        twin._window = self._window
        twin._checkpoint_every = self._checkpoint_every
        twin.resegments_with = None
        twin._gate = Gate(enabled=False, devices=self._attachment.devices, learns=False)
        twin._prepare_empty()
        twin._fingerprint = self._fingerprint
        twin._change_view(self._view, self._chain.ids)
        twin._held = self._held
        twin._states_at = self._states_at
        twin._content = self._content
        twin._inputs = {}
        twin._stats = replace(self._stats)
        return twin


def device_of(model: nn.Module) -> torch.device:
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
