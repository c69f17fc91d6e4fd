"""Forwards of a model as a turn sees them, through the hooks: which tokens they add."""

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import CacheUseError, SessionBusyError, StoreClosedError
from . import loads
from .commit import stop_saving, take_checkpoint
from .identity.computing import count_hooks
from .inputs.content import NotIdentifiedError, has_stand_ins, read_content
from .inputs.foreign import brings_features, foreign_input, mask_problem, position_problem
from .inputs.forward import check_inputs, whole_types
from .positions.spatial import places_in_space, spatial_positions
from .turn import Forward, Turn


def runs_elsewhere(turn: Turn) -> bool:
    """Whether a forward is running in another thread. One of this thread's own was left by an exception."""
    return turn.forward is not None and turn.forward.thread != threading.get_ident()


def begin_forward(turn: Turn, named: Mapping[str, Any]) -> dict[str, Any] | None:
    """A forward of the model begins. Returns inputs to replace, if any.

    Args:
        named: what the model is given, by name.

    Raises:
        CacheUseError: it does not go on after what is held.
    """
    if runs_elsewhere(turn):
        raise SessionBusyError("another thread runs a forward with this cache; make one object per thread")
    replaced = _begin(turn, named)
    if turn.recorder is not None and turn.forward is not None:
        count = turn.forward.count
        decoding = count == 1 and (not turn.checked or turn.held.length >= turn.prompt_tokens)
        turn.recorder.begin_forward(count, decoding=decoding)
    return replaced


def _begin(turn: Turn, named: Mapping[str, Any]) -> dict[str, Any] | None:
    setup, held = turn.setup, turn.held
    _notice_hooks(turn)
    turn.note_first_token()
    loads.settle(turn, keep_load=True)
    if held.states:
        _prepare_states(turn)
    replaced = _drop_reused(turn, named) or {}
    named = {**named, **replaced}
    ids = named.get("input_ids")
    data = ids if ids is not None else named.get("inputs_embeds")
    if data is None:
        # something that is given neither as ids nor as embeddings, such as the codes of a sound
        turn.untrack("the forward has neither input_ids nor inputs_embeds", once=True)
        _start(turn, 0, 0)  # its first layer will tell
        return replaced or None
    rows, count = data.shape[0], data.shape[1]
    added = _fit_inputs(turn, ids, count, named)
    replaced, named = {**replaced, **added}, {**named, **added}
    if _starts_elsewhere(turn, ids, named):
        # older transformers (5.17) prefill in chunks from the beginning, whatever the cache holds
        turn.note("generate does not go on where the cache does: what the cache held is computed again", "other input")
        held.clear()
        turn.stats.reused_tokens = 0
    if held.rows not in (0, rows) and not held.rows_apart:
        if held.rows != setup.conversations or rows % held.rows:
            raise CacheUseError(f"the cache holds {held.rows} rows, the forward has {rows}")
        loads.finish(turn)
        held.repeat_rows(rows // held.rows)
    _track(turn, ids, rows, count, named)
    if turn.continues == "steps" and held.length and count > 1 and not turn.untracked:
        raise CacheUseError(
            f"{type(setup.model).__name__} goes on after its first forward one token at a time only: with {count} "
            "tokens at once its output would be wrong; `generate` with the whole conversation sees to that"
        )
    _start(turn, count, rows)
    if count > 1 and rows == 1 and held.content is None:
        setup.gate.begin_forward(held.length, count, turn.elsewhere())
    return replaced or None


def _start(turn: Turn, count: int, rows: int) -> None:
    held = turn.held
    turn.forward = Forward(count, rows, threading.get_ident())
    if held.states:
        held.states_at = None
    if held.saver is not None:
        held.saver.begin_forward(held.chain.full_blocks())


def _notice_hooks(turn: Turn) -> None:
    """Notices hooks that came or went since the turn began, before a forward computes with them."""
    count = count_hooks(turn.setup.model)
    if count != turn.hooks:
        turn.hooks = count
        if not turn.untracked and not turn.is_of_its_model():
            turn.untrack("hooks were put on the model, or taken off, in the middle of a turn")


def _fit_inputs(turn: Turn, ids: torch.Tensor | None, count: int, named: Mapping[str, Any]) -> dict[str, Any]:
    """Looks at what comes beside ids. Returns inputs to replace."""
    held, config = turn.held, turn.setup.model.config
    replaced: dict[str, Any] = {}
    try:
        if held.content is None and not turn.checked and not held.length and not turn.untracked:
            held.content = read_content(config, ids, named)
        if held.content is not None and not turn.untracked:
            replaced = whole_types(held.content, held.length, count, named)
            check_inputs(held.content, held.length, count, named, vouched=turn.checked)
        if named.get("position_ids") is None and places_in_space(turn.setup.model):
            replaced |= _spatial_positions(turn, ids, count, named)
    except NotIdentifiedError as reason:
        if held.content is not None and not held.length:
            held.content = None
        turn.untrack(f"{reason} are not identified")
    return replaced


def _prepare_states(turn: Turn) -> None:
    """Running states are about to change: if the forward is interrupted they are of no use."""
    held = turn.held
    if held.states_at != held.length:
        raise CacheUseError(
            f"the running states of the layers are not those after the {held.length} tokens held (a forward was "
            "interrupted, or the cache cropped): call match() with the whole conversation, or reset()"
        )
    if not turn.setup.attachment.sees_layers:
        for layer in held.states:
            layer.settle()


def _spatial_positions(turn: Turn, ids: torch.Tensor | None, count: int, named: Mapping[str, Any]) -> dict[str, Any]:
    """Positions for a forward that is given none, of a model that would take them from another conversation."""
    held, content = turn.held, turn.held.content
    if content is not None:
        if content.positions is None and not held.length:
            content.positions = spatial_positions(turn.setup.model, ids, named, content)
        positions = content.positions_at(held.length, held.length + count)
    elif held.length and has_stand_ins(held.chain.ids):
        raise CacheUseError(
            "where these tokens are depends on the pictures before them, which the cache does not have: call "
            "match() with the whole conversation and its inputs, or generate"
        )
    elif turn.untracked or foreign_input(named) is not None:
        return {}  # as the model does it
    else:
        positions = torch.arange(held.length, held.length + count)[None, None].expand(3, 1, -1)
    data = ids if ids is not None else named["inputs_embeds"]
    assert positions is not None
    return {"position_ids": positions[-3:].expand(-1, data.shape[0], -1).to(data.device)}


def _drop_reused(turn: Turn, named: Mapping[str, Any]) -> dict[str, Any] | None:
    """Assisted decoding feeds the whole prompt in its first forward, whatever the cache holds: leaves out what is held.
    (Its logits processors and candidates need the whole ids, so they can't be shortened before.)"""
    held, prompt = turn.held, turn.prompt_tokens
    ids = named.get("input_ids")
    if not (turn.checked and 0 < held.length < prompt and ids is not None and ids.shape[1] >= prompt):
        return None
    width = ids.shape[1]
    names = {"input_ids", "position_ids", "cache_position", "token_type_ids", "mm_token_type_ids"}
    if not any(layer.by_token for layer in held.layers):
        names.add("attention_mask")  # a mask of what such a model is fed, not of all there is
    return {
        name: value[..., held.length :]
        for name, value in named.items()
        if name in names and isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] == width
    }


def _starts_elsewhere(turn: Turn, ids: torch.Tensor | None, named: Mapping[str, Any]) -> bool:
    """Whether the first forward of a `generate` feeds other tokens than those that come after what is held."""
    held, stats = turn.held, turn.stats
    first = stats.prefilled_tokens == 0 and stats.generated_tokens == 0
    if turn.prompt is None or ids is None or not held.length or not first:
        return False
    expected = turn.prompt[held.length : held.length + ids.shape[1]]
    fed = _identity_of(turn, ids[0])
    return (
        bool(_position_problem(turn, named.get("position_ids"), ids.shape[1]))
        or fed is None
        or not np.array_equal(fed[: len(expected)], expected)
    )


def _identity_of(turn: Turn, fed: torch.Tensor) -> np.ndarray | None:
    """What identifies the tokens of a forward, given as ids or embeddings; None if nothing does."""
    held = turn.held
    if held.content is not None:
        return held.content.identify(held.length, fed)
    row: np.ndarray | None = fed.detach().cpu().numpy() if fed.ndim == 1 else None
    return row


def _position_problem(turn: Turn, positions: Any, count: int) -> str | None:
    held = turn.held
    expected = held.content.positions_at(held.length, held.length + count) if held.content is not None else None
    return position_problem(positions, held.length, count, expected)


def _track(turn: Turn, ids: torch.Tensor | None, rows: int, count: int, named: Mapping[str, Any]) -> None:
    """Takes down which tokens a forward adds, as long as ids identify them."""
    held, limit = turn.held, turn.setup.limit
    fed = ids if ids is not None else named["inputs_embeds"]
    if held.fed_beside is not None and ids is not None:
        held.fed_beside.append(ids.detach())
    special = held.encoder.special if held.encoder is not None else None
    if special is not None and not turn.untracked and ids is not None and bool((ids == special).any()):
        turn.untrack("padding tokens among the decoder's ids, which this model does not count as positions")
    if not turn.untracked and ids is None and held.content is None:
        turn.untrack("inputs_embeds are not identified by token ids")
    if not turn.untracked and not turn.checked:
        understood = held.content.understood if held.content is not None else ()
        foreign = foreign_input({name: value for name, value in named.items() if name not in understood})
        problem = (
            (f"{foreign} are not identified by token ids" if foreign else None)
            or mask_problem(named.get("attention_mask"), held.length + count)
            or _position_problem(turn, named.get("position_ids"), count)
            or position_problem(named.get("cache_position"), held.length, count)
        )
        if problem:
            turn.untrack(problem)
            if foreign is not None and brings_features(named):
                held.fed_beside = []
    if turn.untracked:
        return
    if rows > 1 and not bool((fed == fed[0]).all()):
        turn.untrack("several rows", expected=True)
        return
    row = _identity_of(turn, fed[0])
    if row is None:
        turn.untrack("what is fed is not what was to come")
        return
    if limit is not None and held.length + count > limit:
        row = row[: max(limit - held.length, 0)]
        turn.untrack(f"positions beyond {limit} change the rotary frequencies of all", expected=True)
    if turn.keeps is not None and len(held.chain) + len(row) > turn.keeps:
        row = row[: max(turn.keeps - len(held.chain), 0)]
        turn.untrack("more than was to be kept", expected=True)
    held.chain.append(row)


# layers


def running_forward(turn: Turn) -> Forward:
    """The forward that runs.

    Raises:
        CacheUseError: none does.
    """
    if turn.forward is None:
        raise CacheUseError(
            "the cache did not see this forward begin, so it can't know its tokens: call the model that the "
            "cache was made with (not a part of it), and keep it attached"
        )
    return turn.forward


def fit_rows(turn: Turn, number: int, keys: torch.Tensor) -> None:
    """A layer adds another number of rows than ids had."""
    held, forward = turn.held, running_forward(turn)
    if not turn.untracked or held.layers[number].rows not in (0, keys.shape[0]):
        raise CacheUseError(f"layer {number} adds {tuple(keys.shape)} where the forward has {forward.rows} rows")
    held.rows_apart = held.rows_apart or forward.count > 0
    turn.forward = Forward(forward.count or keys.shape[-2], keys.shape[0], forward.thread)


# the end


def end_forward(turn: Turn) -> None:
    """A forward of the model has ended well."""
    setup, held, stats = turn.setup, turn.held, turn.stats
    if turn.recorder is not None:
        turn.recorder.end_forward()
    forward, turn.forward = turn.forward, None
    if forward is None:
        return
    if forward.count > 1:
        setup.gate.end_forward(turn.elsewhere())
    turn.computed = True
    before, held.length = held.length, held.length + forward.count
    for layer in held.ending:
        layer.end_forward(forward.count)
    if held.states:
        held.states_at = held.length
    if any(layer.length != held.length for layer in held.layers) and not held.uneven:
        _take_as_uneven(turn)
    prompt = turn.prompt_tokens if turn.checked else held.length
    prefilled = max(0, min(held.length, prompt) - before)
    stats.prefilled_tokens += prefilled
    stats.generated_tokens += forward.count - prefilled
    if not turn.checked:
        stats.prompt_tokens = held.length
    # of the tokens fed when drafts are checked only the first is sure, until `crop` removes the wrong ones
    turn.confirmed = max(before + 1, min(held.length, prompt))
    loads.finish(turn)
    if held.saver is not None:
        try:
            held.saver.end_forward()
            if held.length in turn.stops or _is_due(turn):
                take_checkpoint(turn, wait=False)
        except StoreClosedError:
            stop_saving(turn)


def _take_as_uneven(turn: Turn) -> None:
    """The model's KV is not one entry per token: it serves this turn, as in any cache, and is not kept."""
    held = turn.held
    lengths = sorted({layer.length for layer in held.layers})
    held.uneven = True
    if held.saver is not None:
        held.saver.begin_turn(0, None)
    held.chain.crop(0)
    name = type(turn.setup.model).__name__
    turn.untrack(f"after {held.length} tokens the layers of {name} hold {lengths}", once=True)
    turn.stats.missed = "not one entry per token"


def _is_due(turn: Turn) -> bool:
    """Whether a checkpoint was asked for at every so many tokens, and it is so many now."""
    every = turn.setup.checkpoint_every
    return bool(every and turn.held.length % every == 0)
