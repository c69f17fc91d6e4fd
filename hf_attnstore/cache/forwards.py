"""Forwards of a model as its cache sees them, through the hooks: which tokens they add."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import CacheUseError, GradientError, SessionBusyError, StoreClosedError
from ..session.chain import common_prefix
from .content import Forward
from .inputs.content import NotIdentifiedError, has_stand_ins, read_content
from .inputs.foreign import brings_features, foreign_input, mask_problem, position_problem
from .inputs.forward import check_inputs, whole_types
from .model.compiled import outside_graphs
from .positions.spatial import places_in_space, spatial_positions
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
            replaced = self._begin_forward(named)
            if self._recorder is not None and self._forward is not None:
                count = self._forward.count
                decoding = count == 1 and (not self._checked or self._held >= self._prompt_tokens)
                self._recorder.begin_forward(count, decoding=decoding)
            return replaced

    def _begin_forward(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        if not self._in_turn:
            self._begin_own_turn()
        if self._runs_elsewhere():
            raise SessionBusyError("another thread runs a forward with this cache; make one object per thread")
        self._notice_hooks()
        self.note_first_token()
        self._settle(keep_load=True)
        if self._states:
            self._prepare_states()
        replaced = self._drop_reused(named) or {}
        named = {**named, **replaced}
        ids = named.get("input_ids")
        data = ids if ids is not None else named.get("inputs_embeds")
        if data is None:
            self._begin_unknown_forward()
            return replaced or None
        rows, count = data.shape[0], data.shape[1]
        added = self._fit_inputs(ids, count, named)
        replaced, named = {**replaced, **added}, {**named, **added}
        if self._starts_elsewhere(ids, named):
            # older transformers (5.17) prefill in chunks from the beginning, whatever the cache holds
            self._note(
                "generate does not go on where the cache does: what the cache held is computed again", "other input"
            )
            self._clear()
            self._stats.reused_tokens = 0
        if self.rows not in (0, rows) and not self._rows_apart:
            if self.rows != self._conversations or rows % self.rows:
                raise CacheUseError(f"the cache holds {self.rows} rows, the forward has {rows}")
            self.batch_repeat_interleave(rows // self.rows)
        self._track(ids, rows, count, named)
        if self._continues == "steps" and self._held and count > 1 and not self._untracked:
            raise CacheUseError(
                f"{type(self._model).__name__} goes on after its first forward one token at a time only: with {count} "
                "tokens at once its output would be wrong; `generate` with the whole conversation sees to that"
            )
        self._forward = Forward(count, rows, threading.get_ident())
        if self._states:
            self._states_at = None
        if self._saver is not None:
            self._saver.begin_forward(self._chain.full_blocks())
        if count > 1 and rows == 1 and self._content is None:
            self._gate.begin_forward(self._held, count, self._elsewhere())
        return replaced or None

    def _begin_unknown_forward(self) -> None:
        """A forward of something that is given neither as ids nor as embeddings, such as the codes of a sound."""
        self._untrack("the forward has neither input_ids nor inputs_embeds", once=True)
        self._forward = Forward(0, 0, threading.get_ident())  # its first layer will tell
        if self._states:
            self._states_at = None
        if self._saver is not None:
            self._saver.begin_forward(self._chain.full_blocks())

    def _fit_inputs(self, ids: torch.Tensor | None, count: int, named: Mapping[str, Any]) -> dict[str, Any]:
        """Looks at what comes beside ids. Returns inputs to replace."""
        replaced: dict[str, Any] = {}
        try:
            if self._content is None and not self._checked and not self._held and not self._untracked:
                self._content = read_content(self._model.config, ids, named)
            if self._content is not None and not self._untracked:
                replaced = whole_types(self._content, self._held, count, named)
                check_inputs(self._content, self._held, count, named, vouched=self._checked)
            if named.get("position_ids") is None and places_in_space(self._model):
                replaced |= self._spatial_positions(ids, count, named)
        except NotIdentifiedError as reason:
            if self._content is not None and not self._held:
                self._content = None
            self._untrack(f"{reason} are not identified")
        return replaced

    def _prepare_states(self) -> None:
        """Running states are about to change: if the forward is interrupted they are of no use."""
        if self._states_at != self._held:
            raise CacheUseError(
                f"the running states of the layers are not those after the {self._held} tokens held (a forward was "
                "interrupted, or the cache cropped): call match() with the whole conversation, or reset()"
            )
        if not self._attachment.sees_layers:
            for layer in self._states:
                layer.settle()

    def _spatial_positions(self, ids: torch.Tensor | None, count: int, named: Mapping[str, Any]) -> dict[str, Any]:
        """Positions for a forward that is given none, of a model that would take them from another conversation."""
        content = self._content
        if content is not None:
            if content.positions is None and not self._held:
                content.positions = spatial_positions(self._model, ids, named, content)
            positions = content.positions_at(self._held, self._held + count)
        elif self._held and has_stand_ins(self._chain.ids):
            raise CacheUseError(
                "where these tokens are depends on the pictures before them, which the cache does not have: call "
                "match() with the whole conversation and its inputs, or generate"
            )
        elif self._untracked or foreign_input(named) is not None:
            return {}  # as the model does it
        else:
            positions = torch.arange(self._held, self._held + count)[None, None].expand(3, 1, -1)
        data = ids if ids is not None else named["inputs_embeds"]
        assert positions is not None
        return {"position_ids": positions[-3:].expand(-1, data.shape[0], -1).to(data.device)}

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
        if self._content is not None and common_prefix(self._content.ids, self._chain.ids) < min(
            len(self._content), len(self._chain)
        ):
            self._content = None  # of another conversation
        if len(self._chain) < held:
            self._untrack("what came before is not identified by token ids", expected=True)
        if self._saver is not None:
            self._saver.continue_turn()

    def _drop_reused(self, named: Mapping[str, Any]) -> dict[str, Any] | None:
        """Assisted decoding feeds the whole prompt in its first forward, whatever the cache holds: leaves out
        what is held. (Its logits processors and candidates need the whole ids, so they can't be shortened before.)"""
        ids = named.get("input_ids")
        prompt = self._prompt_tokens
        if not (self._checked and 0 < self._held < prompt and ids is not None and ids.shape[1] >= prompt):
            return None
        width = ids.shape[1]
        names = {"input_ids", "position_ids", "cache_position", "token_type_ids", "mm_token_type_ids"}
        if not any(layer.by_token for layer in self.layers):
            names.add("attention_mask")  # a mask of what such a model is fed, not of all there is
        return {
            name: value[..., self._held :]
            for name, value in named.items()
            if name in names and isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == width
        }

    def _starts_elsewhere(self, ids: torch.Tensor | None, named: Mapping[str, Any]) -> bool:
        """Whether the first forward of a `generate` feeds other tokens than those that come after what is held."""
        if self._prompt is None or ids is None or not self._held or not self._is_first():
            return False
        expected = self._prompt[self._held : self._held + ids.shape[1]]
        fed = self._identity_of(ids[0])
        return (
            bool(self._position_problem(named.get("position_ids"), ids.shape[1]))
            or fed is None
            or not np.array_equal(fed[: len(expected)], expected)
        )

    def _identity_of(self, fed: torch.Tensor) -> np.ndarray | None:
        """What identifies the tokens of a forward, given as ids or embeddings; None if nothing does."""
        if self._content is not None:
            return self._content.identify(self._held, fed)
        row: np.ndarray | None = fed.detach().cpu().numpy() if fed.ndim == 1 else None
        return row

    def _position_problem(self, positions: Any, count: int) -> str | None:
        content = self._content
        expected = content.positions_at(self._held, self._held + count) if content is not None else None
        return position_problem(positions, self._held, count, expected)

    def _is_first(self) -> bool:
        return self._stats.prefilled_tokens == 0 and self._stats.generated_tokens == 0

    def _track(self, ids: torch.Tensor | None, rows: int, count: int, named: Mapping[str, Any]) -> None:
        """Takes down which tokens a forward adds, as long as ids identify them."""
        fed = ids if ids is not None else named["inputs_embeds"]
        if self._fed_beside is not None and ids is not None:
            self._fed_beside.append(ids.detach())
        if not self._untracked and ids is None and self._content is None:
            self._untrack("inputs_embeds are not identified by token ids")
        if not self._untracked and not self._checked:
            understood = self._content.understood if self._content is not None else ()
            foreign = foreign_input({name: value for name, value in named.items() if name not in understood})
            problem = (
                (f"{foreign} are not identified by token ids" if foreign else None)
                or mask_problem(named.get("attention_mask"), self._held + count)
                or self._position_problem(named.get("position_ids"), count)
                or position_problem(named.get("cache_position"), self._held, count)
            )
            if problem:
                self._untrack(problem)
                if foreign is not None and brings_features(named):
                    self._fed_beside = []
        if self._untracked:
            return
        if rows > 1 and not bool((fed == fed[0]).all()):
            self._untrack("several rows", expected=True)
            return
        row = self._identity_of(fed[0])
        if row is None:
            self._untrack("what is fed is not what was to come")
            return
        if self._limit is not None and self._held + count > self._limit:
            row = row[: max(self._limit - self._held, 0)]
            self._untrack(f"positions beyond {self._limit} change the rotary frequencies of all", expected=True)
        self._chain.append(row)

    def before_layer(self, number: int) -> None:
        """A decoder layer is about to compute."""
        if self._recorder is not None:
            self._recorder.before_layer(number)
        if self._restore is not None:
            self._restore.before_layer(number)

    def after_layer(self, number: int) -> None:
        """A decoder layer has computed."""
        recorder = self._recorder
        if recorder is not None:
            recorder.after_layer(number)
        if self._saver is not None and self._saver.due and self._forward is not None:
            try:
                began = recorder.now(number) if recorder is not None else 0.0
                self._saver.layer_done(number)
                if recorder is not None:
                    recorder.saved(number, began)
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
        forward = self._check_forward()
        layer: Any = self.layers[layer_idx]
        if layer.by_token and key_states.shape[0] != forward.rows:
            self._fit_rows(forward, layer_idx, key_states)
        if self._restore is not None and not self._attachment.sees_layers:
            self._restore.before_layer(layer_idx)
        keys, values = layer.update(key_states, value_states, *args, **kwargs)
        return keys, values

    def _fit_rows(self, forward: Forward, number: int, keys: torch.Tensor) -> None:
        """A layer adds another number of rows than ids had."""
        if not self._untracked or self.layers[number].rows not in (0, keys.shape[0]):
            raise CacheUseError(f"layer {number} adds {tuple(keys.shape)} where the forward has {forward.rows} rows")
        self._rows_apart = self._rows_apart or forward.count > 0
        self._forward = Forward(forward.count or keys.shape[-2], keys.shape[0], forward.thread)

    def _check_forward(self) -> Forward:
        """The forward that runs.

        Raises:
            CacheUseError: none does.
        """
        if self._forward is None:
            raise CacheUseError(
                "the cache did not see this forward begin, so it can't know its tokens: call the model that the "
                "cache was made with (not a part of it), and keep it attached"
            )
        return self._forward

    def end_forward(self) -> None:
        """A forward of the model has ended well."""
        with self._guard:
            if self._recorder is not None:
                self._recorder.end_forward()
            self._end_forward()

    def _end_forward(self) -> None:
        forward, self._forward = self._forward, None
        if forward is None:
            return
        if forward.count > 1:
            self._gate.end_forward(self._elsewhere())
        self._changed = True
        before, self._held = self._held, self._held + forward.count
        for layer in self.layers:
            layer.end_forward(forward.count)
        if self._states:
            self._states_at = self._held
        if any(layer.length != self._held for layer in self.layers) and not self._uneven:
            self._take_as_uneven()
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
                if self._held in self._stops or self._is_due():
                    self._take_checkpoint(wait=False)
            except StoreClosedError:
                self._stop_saving()

    def _take_as_uneven(self) -> None:
        """The model's KV is not one entry per token: it serves this turn, as in any cache, and is not kept."""
        lengths = sorted({layer.length for layer in self.layers})
        self._uneven = True
        if self._saver is not None:
            self._saver.begin_turn(0, None)
        self._chain.crop(0)
        self._untrack(f"after {self._held} tokens the layers of {type(self._model).__name__} hold {lengths}", once=True)
        self._stats.missed = "not one entry per token"

    def _is_due(self) -> bool:
        """Whether a checkpoint was asked for at every so many tokens, and it is so many now."""
        return bool(self._checkpoint_every and self._held % self._checkpoint_every == 0)
