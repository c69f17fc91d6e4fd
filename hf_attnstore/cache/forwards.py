"""Forwards of a model as its cache sees them, through the hooks: which tokens they add."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import CacheUseError, GradientError, SessionBusyError, StoreClosedError
from .compiled import outside_graphs
from .content import Forward
from .inputs import foreign_input, mask_problem, position_problem
from .turns import CacheTurns


class CacheForwards(CacheTurns):
    """A cache that knows which tokens it is given."""

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
            self._note(
                "generate does not go on where the cache does: what the cache held is computed again", "other input"
            )
            self._clear()
            self._stats.reused_tokens = 0
        if self.rows not in (0, rows):
            if self.rows != 1:
                raise CacheUseError(f"the cache holds {self.rows} rows, the forward has {rows}")
            self.batch_repeat_interleave(rows)
        self._track(ids, rows, count, named)
        self._forward = Forward(count, rows, threading.get_ident())
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

    @outside_graphs
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
