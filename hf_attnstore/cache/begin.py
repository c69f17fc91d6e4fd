"""How a turn begins: it gets the session to itself, finds out whether the model can be identified, and plans what to
reuse of the prompt."""

import logging
import threading
import time
from collections.abc import Sequence

import numpy as np

from ..errors import ContextWindowError, SessionBusyError, StoreClosedError
from ..session.spans import Span, total_tokens
from ..session.view import View
from . import encoder_output as encoders
from . import loads, reuse
from .divergence import WORTH, find_divergence
from .held import Held
from .identity.adapters import adapter_problem, prompt_learning
from .identity.callables import UnknownCodeError
from .identity.computing import count_hooks
from .identity.model_parts import difference, note_name
from .inputs.content import has_stand_ins
from .parking import Parking
from .pauses import BUDGET, choose_pauses, end_ids, ends_of_messages
from .setup import Setup
from .transfer.record import TurnRecorder
from .turn import Phase, Turn

logger = logging.getLogger("hf_attnstore")

_MAX_EXPECTED_NEW = 4096
_LITTLE = 16
"""New tokens, of however short a prompt, for which it is not asked why they are new."""


def acquire(setup: Setup, held: Held, parking: Parking) -> Turn:
    """A turn of this thread, which is the only one on what is held, and the only one on the session.

    Raises:
        SessionBusyError: another is running.
        StoreClosedError: the store is closed.
    """
    began = time.perf_counter()
    if not held.busy.acquire(blocking=False):
        raise SessionBusyError("this cache object is in the middle of another turn; make one object per thread")
    turn = Turn(setup, held, thread=threading.get_ident(), began=began)
    store, name = setup.store, setup.kept_as
    try:
        if store is not None:
            store.check_not_left_behind()
            if store.closed:
                raise StoreClosedError(
                    f"the store {store.path} of this cache is closed; make a new cache with an open store"
                )
            if name is not None and setup.saves:
                turn.lock = store.lock_session(name, setup.wait)
        parking.begin_turn()
    except BaseException:
        release(turn)
        raise
    return turn


def release(turn: Turn) -> None:
    """The turn is over, however it went: others may have the session."""
    if turn.recorder is not None:
        turn.recorder.end()
    if turn.setup.store is not None:
        turn.setup.store.end_computing(id(turn.held))
    if turn.lock is not None:
        turn.lock.release()
        turn.lock = None
    turn.phase, turn.checked = Phase.OVER, False
    if turn.held.busy.locked():
        turn.held.busy.release()


def open_turn(turn: Turn, encoder_digest: bytes | None = None) -> None:
    """Finds out whether what the turn computes can be identified, and lets go of what is held where it belongs to
    another model.

    Args:
        encoder_digest: of what the turn's encoder is given, where it has one and that is known.
    """
    setup, held = turn.setup, turn.held
    attachment = setup.attachment
    turn.phase = Phase.RUNS
    if setup.store is not None and attachment.computes_on_cpu:
        setup.store.begin_computing(id(held))
    if setup.records and turn.recorder is None:
        turn.recorder = TurnRecorder(setup.store, attachment.devices)
    for layer in held.states:
        layer.thaw()
    loads.settle(turn)
    identify(turn)
    if held.encoder is not None:
        encoders.identify(turn, held.encoder, encoder_digest)
    setup.gate.begin_turn(held.fingerprint, setup.store if not turn.untracked else None)
    asks = held.granularity != "none" and not attachment.is_verified(setup.model, held.fingerprint)
    if asks and setup.ranks.all(not turn.untracked):
        # ranks have to ask together, whatever one of them may know
        found = attachment.continues(setup.model, held.fingerprint, setup.store if setup.ranks.alone else None)
        turn.continues = found.how
        if not found.how:
            turn.untrack(f"no cache continues {type(setup.model).__name__}: {found.problem}", once=True)
            turn.stats.missed = "model does not continue"
    if held.granularity == "none":
        kinds = ", ".join(sorted({layer.kind for layer in held.layers if not layer.reusable}))
        turn.untrack(f"nothing is known of layers of kind {kinds}", expected=True)
        turn.stats.recomputed, turn.stats.missed = turn.untracked, "unknown kind of layer"


def identify(turn: Turn) -> None:
    """Makes sure that what is held, and the chain it goes by, belong to the model as it is now."""
    setup, held = turn.setup, turn.held
    if setup.model.training:
        turn.untrack("the model is in training mode (model.eval() makes its KV reproducible)")
    adapters = adapter_problem(setup.model) or prompt_learning(setup.given_model)
    if adapters is not None:
        turn.untrack(adapters)
    try:
        fingerprint = setup.attachment.fingerprint.current()
    except UnknownCodeError as error:
        turn.untrack(f"what the model computes by can't be identified: {error}", once=True)
        return
    except Exception as error:
        turn.untrack(f"the model's weights can't be identified ({error})", once=True)
        return
    turn.hooks = count_hooks(setup.model)
    if fingerprint == held.fingerprint:
        return
    if held.length:
        turn.note("the model's weights or settings changed: what the cache held is computed again", "other model")
    held.clear()
    held.fingerprint = fingerprint
    held.change_view(View.plain(held.model_root, held.secret), np.empty(0, dtype=np.int64))


def take_up_prompt(turn: Turn, parking: Parking, ids: np.ndarray, *, limit: int, new_tokens: int) -> int:
    """Finds what is known of the conversation `ids` `[tokens]`, and begins to load it.

    Args:
        limit: reuse at most so many of its leading tokens.
        new_tokens: how many tokens are expected on top: for the capacity of the layers, and for the window.

    Returns:
        The tokens reused.

    Raises:
        ContextWindowError: what is new, or `new_tokens`, does not fit into the window.
    """
    setup, held, stats = turn.setup, turn.held, turn.stats
    # what one rank of a tensor-parallel model can't keep, none does
    if not setup.ranks.all(not turn.untracked):
        turn.untrack("another rank of this tensor-parallel model can't keep it")
    _refuse_to_cut(setup, ids, new_tokens)
    parking.take(turn, ids)
    held.see_through(reuse.view_of(turn, ids, limit, new_tokens))
    shown, limit = held.view.in_view(ids), limit - held.view.dropped
    if setup.limit is not None and len(shown) > setup.limit:
        turn.untrack(f"positions beyond {setup.limit} change the rotary frequencies of all")
    for layer in held.layers:
        layer.expect(len(shown) + min(new_tokens, max(_MAX_EXPECTED_NEW, len(shown))))
        layer.forget_past()  # that of an earlier turn; who needs it asks again
    spans: Sequence[Span] = []
    if setup.ranks.alone:
        spans = reuse.take_up(turn, shown, limit)
        reused = held.length
        reuse.adopt(turn, shown[:reused], spans)
        _report_taken(turn, reused)
    else:
        reuse.take_up_together(turn, shown, limit)
        reused = held.length
    if not turn.untracked:
        # where little is new, all of the session was found; else what comes now takes longer than to ask
        if not reused or len(shown) - reused > held.chain.block_size:
            _say_if_of_another_model(turn)
        if setup.ranks.alone:
            _explain(turn, ids, spans)
    turn.prompt = shown if turn.checked else None
    turn.prompt_tokens = len(shown)
    added = bool(setup.attachment.fingerprint.computing.additions)
    if added:
        held.hold_back()
    turn.holds_for_additions = added
    turn.stops = stops_of(turn, reused, len(shown) - 1, shown) if turn.checked else []
    stats.prompt_tokens, stats.reused_tokens, stats.dropped_tokens = len(ids), reused, held.view.dropped
    stats.rounded_by = setup.store.codec if reused and setup.store is not None and setup.store.is_lossy else ""
    if held.view.dropped:
        stats.truncation = "rotated" if held.view.base else "recomputed"
    return reused


def _refuse_to_cut(setup: Setup, ids: np.ndarray, new_tokens: int) -> None:
    if setup.window is not None and setup.window.overflows(len(ids), new_tokens) and has_stand_ins(ids):
        raise ContextWindowError(
            f"{len(ids)} tokens and room for {new_tokens} do not fit into the window of {setup.window.size} "
            "tokens, and of a conversation with pictures, sounds or embeddings nothing can be dropped: leave out "
            "its oldest messages with their pictures, or set a larger window"
        )


def stops_of(turn: Turn, first: int, last: int, shown: np.ndarray) -> list[int]:
    """Where a prefill of `[first, last]` of the tokens `shown` is to pause, so that running states can be kept: where
    other texts may part from it, and where the user wants checkpoints. Nothing beyond `last` could ever be used for
    the same prompt. Models that continue in steps only pause after every token."""
    setup, held = turn.setup, turn.held
    if turn.untracked or held.content is not None:  # pictures go with the ids that they belong to, in one forward
        return []
    if turn.continues == "steps":
        return list(range(first + 1, last + 1)) if first else [last] if last else []
    if held.saver is None or not held.states or first >= last:
        return []
    every = setup.checkpoint_every or last + 1
    if setup.boundaries is not None:
        boundaries = sorted(held.view.position(place) for place in setup.boundaries)
    else:
        boundaries = ends_of_messages(shown[:last], end_ids(setup.model))
    state_bytes = setup.attachment.state_bytes
    pauses = choose_pauses(
        first,
        last,
        parted=0 if turn.computes_known else turn.stats.matched_tokens,
        boundaries=boundaries,
        most=BUDGET // state_bytes if state_bytes else None,
    )
    return sorted({*range((first // every + 1) * every, last, every), *pauses})


# words for what was not reused


def _report_taken(turn: Turn, reused: int) -> None:
    """Says where the `reused` tokens of the prompt, of which a load may still bring some, come from."""
    load = turn.held.load
    tokens = min(turn.taken, reused, load.first_loaded if load is not None else reused)
    if tokens:
        turn.stats.blocks_from = {"device": -(-tokens // turn.held.chain.block_size)}


def _say_if_of_another_model(turn: Turn) -> None:
    """Tells why what is known of the session is not reused, if it is that."""
    setup, fingerprint = turn.setup, turn.held.fingerprint
    if setup.store is None or setup.kept_as is None:
        return
    before = setup.store.session_fingerprint(setup.kept_as)
    if before not in (None, "", fingerprint):
        what = difference(setup.store.note(note_name(before)), setup.attachment.fingerprint.parts())
        turn.note(
            f"session {setup.session!r} was computed by a model with other weights or settings "
            f"({before[:12]}, now {fingerprint[:12]}{'; ' + what if what else ''}): that KV is not reused",
            "other model",
        )


def _explain(turn: Turn, ids: np.ndarray, spans: Sequence[Span]) -> None:
    """Finds out where the conversation `ids` parts from what is known, if enough is new for that to be worth it."""
    setup, held, stats = turn.setup, turn.held, turn.stats
    new = len(ids) - max(stats.matched_tokens, total_tokens(spans))
    worth_asking = new >= min(WORTH, max(_LITTLE, len(ids) // 10))
    if setup.store is None or not held.view.is_plain or not worth_asking or stats.missed:
        return
    bos = getattr(setup.model.config, "bos_token_id", None)
    found = find_divergence(setup.store, held.view.model_root, ids, spans, setup.kept_as, bos)
    if found is None:
        return
    if setup.decode is not None:
        found = found.in_text(setup.decode)
    stats.diverged, stats.missed = found, "other text" if found.there else "not in the store"
    logger.info("session %r: the prompt %s", setup.session, found)
