"""What a turn loads: finding its tokens in the store, bringing them into the layers, and back again after a crop."""

import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from ..errors import CacheUseError, LoadError
from ..session.matching import Checkpoint, match_checkpoint, match_prefix
from ..session.spans import Span, crop, total_tokens
from ..session.view import View
from . import encoder_output as encoders
from .transfer.load import plan_restore
from .turn import Turn

MAX_ATTEMPTS = 8
"""Loads that may fail one after the other before everything is computed."""


def find(turn: Turn, view: View, ids: np.ndarray) -> list[Span]:
    """Where the KV of the first tokens is, of those in `view`."""
    store = turn.setup.store
    if store is None or not len(ids):
        return []
    failures = store.failures
    spans = crop(view.prefix[: store.known([span.block for span in view.prefix])], len(ids))
    if total_tokens(spans) == view.base < len(ids):
        spans += match_prefix(ids, view.root, turn.held.chain.block_size, store, view.base)
    if store.failures != failures:  # the store has said what and why
        turn.note_failed_load("a block could not be read", log=False)
    return spans


def find_checkpoint(turn: Turn, ids: np.ndarray) -> Checkpoint | None:
    """The longest checkpoint of a text that is in the view's chain."""
    store, held = turn.setup.store, turn.held
    if store is None or not len(ids):
        return None
    return match_checkpoint(ids, held.view.root, held.chain.block_size, store, held.view.base)


def plan_load(turn: Turn, spans: Sequence[Span], length: int, checkpoint: Checkpoint | None = None) -> None:
    """Sets `held.load` to what brings everything that the layers lack at `length` tokens; nothing is moved yet.

    Raises:
        LoadError: a block is missing or damaged.
    """
    setup, held = turn.setup, turn.held
    if held.states and checkpoint is None and held.states_at != length:
        raise AssertionError("nothing brings the running states")
    if checkpoint is not None:
        held.states_at = None  # until it is certain that the load begins
    held.load = None
    if setup.store is None:
        for layer in held.layers:
            layer.crop_to(length)
        return
    attachment = setup.attachment
    geometry = None
    if any(span.shift for span in crop(spans, length)):
        geometry = attachment.geometry(setup.model, held.fingerprint, setup.store)
    began = time.perf_counter()
    load = plan_restore(
        held.layers, attachment.devices, spans, length, held.whole_from(length), setup.store, attachment.pace, geometry,
        checkpoint, partial(setup.gate.estimate, length) if setup.gate.enabled else None, held.sliding,
    )  # fmt: skip
    held.states_at = length
    if checkpoint is not None:
        held.checkpoints[length] = checkpoint.key
    turn.stats.rotated_tokens = load.rotated_tokens if load is not None else 0
    if load is not None:
        load.planning_seconds = time.perf_counter() - began
        held.load = turn.as_wanted(load)


def finish(turn: Turn) -> None:
    """Waits for all that is on its way.

    Raises:
        LoadError: some of it will not come. Nothing is held then.
    """
    held = turn.held
    load, held.load = held.load, None
    if load is not None:
        try:
            load.finish()
        except BaseException:
            held.clear()
            raise
        else:
            turn.setup.gate.loaded(load)
        finally:
            turn.stats.add_load(load.load.stats, load.exposed_seconds)
        turn.from_disk = load.load.from_disk
    if held.encoder is not None:
        encoders.finish(turn, held.encoder)


def settle(turn: Turn, *, keep_load: bool = False) -> None:
    """Puts what is held into a consistent state whatever happened: every layer holds the tokens of all complete
    forwards and nothing else."""
    held = turn.held
    turn.forward = None
    _settle_layers(turn, keep_load=keep_load)
    if held.encoder is not None:
        held.encoder.settle()


def _settle_layers(turn: Turn, *, keep_load: bool) -> None:
    held = turn.held
    if held.load is not None and not keep_load:
        try:
            finish(turn)
        except LoadError as error:
            turn.note_failed_load(error)
            held.clear()
            return
    if held.uneven:
        return
    if any(layer.length != held.length for layer in held.layers):
        crop_to(turn, min(held.length, *(layer.length for layer in held.layers)))
    elif len(held.chain) > held.length:
        held.crop_chain(held.length)


def crop_to(turn: Turn, length: int) -> None:
    """Goes back to `length` tokens.

    Raises:
        CacheUseError: what is needed there is neither held nor in the store.
        LoadError: it was in the store, but can't be read any more; nothing is held then.
    """
    held = turn.held
    if all(layer.may_crop_to(length) for layer in held.layers):
        held.step_back(length)
        for layer in held.layers:
            layer.crop_to(length)
    else:
        reload(turn, length)
    held.length = length
    if length < held.view.settled:
        held.change_view(held.view.cropped(held.view.logical(length)), held.chain.ids[:length])
    held.crop_chain(length)


def last_place(turn: Turn, length: int) -> int:
    """The last place, at most `length` tokens from the beginning, that one can go back to: windows may be gone before
    others."""
    held = turn.held
    if all(layer.may_crop_to(length) for layer in held.layers):
        return length
    spans = crop(find(turn, held.view, held.chain.ids[:length]), length)
    return held.whole_until(total_tokens(spans), spans)


def reload(turn: Turn, length: int) -> None:
    """What layers would need at `length`, a window or a running state, they have let go: gets it back from the store.

    Raises:
        CacheUseError: the store does not have it.
    """
    held = turn.held
    ids = held.chain.ids[:length]
    spans = crop(find(turn, held.view, ids), length)
    lacks_state = bool(held.states) and held.states_at != length
    checkpoint = find_checkpoint(turn, ids) if lacks_state else None
    if checkpoint is not None and checkpoint.tokens != length:
        checkpoint = None
    if not held.covers(length, spans) or (lacks_state and checkpoint is None):
        what = "a running state" if held.states else "the window before it"
        last = last_place(turn, length) if held.sliding else 0
        instead = f" (to {last} tokens it could go back)" if last else ""
        raise CacheUseError(
            f"can't go back to {length} tokens: a layer does not hold {what} any more and the store does not have "
            f"it{instead}; call activate_past_recording() before, or reset()"
        )
    try:
        plan_load(turn, spans, length, checkpoint)
        finish(turn)
    except BaseException:
        held.clear()
        raise
