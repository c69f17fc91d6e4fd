"""AttentionStoreCache: the `Cache` that continues conversations."""

import copy
import threading
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Cache

from ..errors import CacheUseError, LoadError
from ..store.store import AttentionStore
from .attach import Attachment, ensure_hooks, owner_of
from .fingerprint import position_limit
from .forwards import CacheForwards
from .layers import SlidingLayer, make_layer
from .ranks import known_ranks
from .stats import TurnStats
from .structure import layer_kinds
from .truncation import window_of

_MAX_PLANS = 8


class AttentionStoreCache(CacheForwards):
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

    max_cache_len = -1
    """PEFT asks caches for it when it puts learned KV before a prompt; this is how it says that there is no limit."""

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
        self._given_model = model
        config: Any = self._model.config
        kinds = layer_kinds(config)
        super().__init__(layers=[make_layer(kind.window) for kind in kinds])
        self._attachment: Attachment = ensure_hooks(self._model)
        self._store: AttentionStore | None = store or self._attachment.store or _default_store()
        self.session = self._store.check_name(session) if session is not None else None
        self._ranks = known_ranks(self._model)
        self._saving = save
        self._wait = wait
        self._limit = position_limit(config.get_text_config(decoder=True))
        self._window = window_of(config, window, keep_first, drop)
        self._prepare_empty()
        self._store.register(self)

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
        known = self._ranks.attempt(partial(self._store.tokens, self._kept_as or "", dropped=True))
        ids = np.asarray(known[: self._ranks.least(len(known))], dtype=np.int64)
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
            self._change_view(self._view.as_plain(), np.empty(0, dtype=np.int64))

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
        twin._given_model = self._given_model
        twin._attachment = self._attachment
        twin._ranks = self._ranks
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
