"""How a turn ends: what is complete is handed over to the store, and the session is committed."""

import logging
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..errors import NotFiniteError, StoreClosedError
from ..session.chain import common_prefix
from ..session.manifests import write_manifest
from ..session.spans import Span, crop
from ..store.blocks.keys import Key
from . import encoder_output as encoders
from . import loads
from .identity.model_parts import note_name
from .parking import Parking
from .transfer.checkpoints import take_checkpoint as _take_checkpoint
from .turn import Turn

logger = logging.getLogger("hf_attnstore")

NOT_FINITE = "there is NaN or infinity in what the model computed"


def end_turn(turn: Turn, parking: Parking) -> None:
    """Hands over what is complete, and leaves what is held to the next turn. Also after an exception."""
    settle_turn(turn)
    try:
        _check_additions(turn)
        hand_over(turn)
        parking.park(turn)
    except StoreClosedError:
        stop_saving(turn)


def settle_turn(turn: Turn) -> None:
    """What is held is that of all complete forwards, without drafts that nobody has confirmed."""
    loads.settle(turn)
    if turn.speculating and turn.confirmed < turn.held.length:
        loads.crop_to(turn, turn.confirmed)


def _check_additions(turn: Turn) -> None:
    """Code that somebody added to a model may change what it goes by while it runs. Then what the turn computed belongs
    to no model that could be named."""
    added = turn.setup.attachment.fingerprint.computing.additions and not turn.untracked
    if added and turn.computed and not turn.is_of_its_model():
        turn.untrack("the model, or code that was added to it, changed while the turn ran")
        turn.held.clear()


def stop_saving(turn: Turn) -> None:
    """The store was closed: what the turn computed is not kept."""
    turn.held.stop_saving()
    logger.warning("the store was closed in the middle of a turn: what the turn computed is not saved")


def take_checkpoint(turn: Turn, *, wait: bool) -> None:
    """Hands the layers' running states to the store, if they are right for what is held.

    Args:
        wait: for room in host memory, where that will come.
    """
    setup, held = turn.setup, turn.held
    if not held.states or held.saver is None or setup.store is None or turn.untracked:
        return
    if not held.length or held.states_at != held.length or len(held.chain) != held.length or held.rows != 1:
        return
    if held.saver.holds_back and not (turn.holds_for_additions and turn.is_of_its_model()):
        return
    try:
        key, nbytes = _take_checkpoint(held.layers, held.chain, setup.store, held.fingerprint, wait=wait)
    except NotFiniteError:
        turn.untrack(NOT_FINITE, once=True)
        return
    held.checkpoints[held.length] = key
    turn.stats.saved_bytes += nbytes
    turn.stats.checkpoints += nbytes > 0
    setup.attachment.state_bytes = nbytes or setup.attachment.state_bytes


def hand_over(turn: Turn) -> None:
    """Gives the store what is new, and tells it what the turn did."""
    setup, held, stats = turn.setup, turn.held, turn.stats
    store = setup.store
    if held.encoder is not None:
        encoders.hand_over(turn, held.encoder)
    if store is None:
        return
    if held.saver is not None and turn.computed:  # what was not computed now was handed over before, or let go
        began = time.perf_counter()
        saved = held.saver.finish(len(held.chain), turn.prompt_tokens)
        if turn.recorder is not None:
            turn.recorder.saved("end of the turn", began)
        if held.saver.unfit_from is not None:  # it serves this turn, and no other
            held.chain.crop(saved)
            turn.untrack(NOT_FINITE, once=True)
        take_checkpoint(turn, wait=True)
        # a turn that computed nothing that ids identify leaves the session as it was, and so does one that was
        # interrupted while it computed again what the store has
        if len(held.chain) >= held.known and (len(held.chain) or not turn.untracked):
            _commit(turn, saved)
        stats.saved_bytes += held.saver.saved_bytes
        stats.save_seconds += held.saver.seconds
    setup.gate.end_turn(held.layers, store)
    stats.recompute_seconds = setup.gate.estimate(turn.prompt_tokens) if stats.reused_tokens else stats.ttft_seconds
    store.count_turn(
        stats.reused_tokens,
        stats.prompt_tokens,
        stats.loaded_bytes,
        stats.load_seconds,
        stats.exposed_load_seconds,
        stats.missed,
    )
    # not earlier: the copying would take cores from the turn itself
    from_disk, turn.from_disk = turn.from_disk, []
    store.promote(from_disk)


def _commit(turn: Turn, tokens: int) -> None:
    """The session is, from now on, what is held, of which the store has the first `tokens` tokens."""
    setup, held = turn.setup, turn.held
    store, chain, name = setup.store, held.chain, setup.kept_as
    assert store is not None
    spans = crop(held.view.prefix, tokens)
    for block in range(-(-max(tokens - chain.base, 0) // chain.block_size)):
        start, stop = chain.bounds(block)
        stop = min(stop, tokens)
        spans.append(Span(chain.key(block), 0, stop - start, start, stop - start))
    if name is not None:
        manifest = write_manifest(held.view, spans, held.view.logical(len(chain)))
        manifest = replace(manifest, beside=_blocks_beside(turn))
        _say_if_it_shrinks(turn, name, manifest.length)
        store.commit(name, held.fingerprint, manifest)
        _remember_parts(turn)
    if spans:
        short = spans[-1].block_tokens < chain.block_size
        blocks = [span.block for span in spans]
        store.used(blocks, tokens, short=short, went_on_from=held.went_on_from, session=name)
    if held.saver is not None:
        store.let_windows_go(held.saver.let_go, name)
    beside = [*held.checkpoints.values(), *_windows(turn)]
    if beside:
        store.touch(beside)
    if held.encoder is not None and held.encoder.blocks:
        store.touch(held.encoder.blocks)


def _windows(turn: Turn) -> Sequence[Key]:
    """What is kept of windows beside blocks."""
    return turn.held.saver.kept if turn.held.saver is not None else ()


def _blocks_beside(turn: Turn) -> tuple[Key, ...]:
    """Blocks that belong to the session though it consists of others: checkpoints, windows, an encoder's output."""
    held = turn.held
    if held.encoder is not None:
        return held.encoder.blocks
    return *_windows(turn), *(
        key
        for tokens, key in held.checkpoints.items()
        if tokens <= len(held.chain) and held.chain.checkpoint_key(tokens) == key
    )


def _say_if_it_shrinks(turn: Turn, name: str, length: int) -> None:
    """A session that loses more than half of its tokens to others is seldom meant to."""
    store = turn.setup.store
    assert store is not None
    if 2 * turn.stats.reused_tokens >= length:
        return
    before = store.latest_manifest(name)
    if before is None or 2 * length >= before.length:
        return
    known, now = np.asarray(store.tokens(name, dropped=True)), turn.held.conversation
    if common_prefix(known, now) < min(len(known), len(now)):
        logger.warning(
            "session %r had %d tokens, and %d others replace them: pass the whole conversation, not new tokens "
            "alone; what was there before is still found by its text",
            turn.setup.session,
            before.length,
            length,
        )


def _remember_parts(turn: Turn) -> None:
    """Keeps what the model is made of with the store, once, for who has to say what has changed."""
    store, attachment, fingerprint = turn.setup.store, turn.setup.attachment, turn.held.fingerprint
    assert store is not None
    kept = (str(store.path), fingerprint)
    if kept not in attachment.parts_kept:
        attachment.parts_kept.add(kept)
        if store.note(note_name(fingerprint)) is None:
            store.set_note(note_name(fingerprint), attachment.fingerprint.parts())
            store.set_model_name(fingerprint, _name_of(turn))


def _name_of(turn: Turn) -> str:
    """What people call the model: the last part of where it was loaded from, and its class."""
    kind, config = type(turn.setup.model).__name__, getattr(turn.setup.model, "config", None)
    loaded_from = str(getattr(config, "_name_or_path", "") or "").rstrip("/").rpartition("/")[2]
    return f"{loaded_from} ({kind})" if loaded_from else kind
