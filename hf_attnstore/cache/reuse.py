"""What a turn reuses of its prompt: the view of it that fits into the window, and as much of that as is known and worth
loading."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from ..errors import LoadError
from ..session.chain import common_prefix
from ..session.manifests import read_manifest
from ..session.spans import Span, crop, total_tokens
from ..session.view import View
from ..store.records.manifest import Manifest
from . import loads
from .costs.decide import Choice
from .inputs.content import last_stand_in
from .plan import CostModel, Plan, Resident, plan_reuse
from .positions.truncation import choose_view
from .turn import Turn


def view_of(turn: Turn, ids: np.ndarray, limit: int, new_tokens: int) -> View:
    """Which part of the conversation `ids` `[tokens]` the model is to see.

    Raises:
        ContextWindowError: what is new, or `new_tokens`, does not fit into the window.
    """
    setup, held = turn.setup, turn.held
    plain, store, name = held.view.as_plain(), setup.store, setup.kept_as
    if setup.window is None or not setup.window.overflows(len(ids), new_tokens):
        return plain
    manifest = store.latest_manifest(name) if store is not None and name is not None else None
    views = [held.view]
    if store is not None and manifest is not None:
        describe = partial(store.describe_block, fingerprint=held.fingerprint)
        views.append(read_manifest(manifest, plain, describe))
    history = max(common_prefix(held.conversation, ids), _old_tokens(turn, manifest, ids))
    find = partial(loads.find, turn) if not turn.untracked else _find_nothing
    choose = partial(choose_view, ids, limit, new_tokens, setup.window, plain, cuts=setup.cuts)
    if setup.ranks.alone:
        return choose(views, find, history, partial(_can_move_keys, turn))
    history = -setup.ranks.least(-history)  # what one of them remembers is not new
    movable = _can_move_keys(turn)  # by a forward of all ranks, perhaps: not only where one finds that it matters
    view = setup.ranks.attempt(partial(choose, views, find, history, lambda: movable))
    if setup.ranks.same(view.shape()):
        return view
    # what the ranks know of it differs: none makes use of it
    return choose([plain], _find_nothing, history, lambda: False)


def _find_nothing(view: View, ids: np.ndarray) -> list[Span]:
    return []


def _old_tokens(turn: Turn, manifest: Manifest | None, ids: np.ndarray) -> int:
    """How many of a conversation's leading tokens its session had before, though their KV may be gone."""
    store, name = turn.setup.store, turn.setup.kept_as
    if store is None or name is None or manifest is None:
        return 0
    kept = np.asarray(store.tokens(name, dropped=True), dtype=np.int64)
    agreed = common_prefix(kept, ids)
    # where all that is there agrees, so did the rest; a prompt that differs somewhere is new from there on
    return manifest.length if agreed == len(kept) else agreed


def _can_move_keys(turn: Turn) -> bool:
    setup = turn.setup
    geometry = setup.attachment.geometry(setup.model, turn.held.fingerprint, setup.store, setup.ranks)
    if not geometry.movable:
        turn.note(
            f"kept keys can't be moved, so their tokens are computed again: {geometry.refused}", "keys not movable"
        )
    return geometry.movable


def take_up(turn: Turn, ids: np.ndarray, limit: int) -> list[Span]:
    """Gets as much of the first `limit` tokens of `ids` as is worth it into the layers: keeps what is there, loads what
    is known, which may still be on its way. `held.length` says how much that is.

    Returns:
        Where the store has the first tokens.
    """
    held = turn.held
    if turn.untracked:
        held.clear()
        return []
    if held.rows > 1:
        held.select_rows(torch.tensor([0]))
    own = held.whole(min(common_prefix(held.chain.ids, ids), limit))
    held.drop_from(own)
    lost, failure = 0, LoadError("")
    for _ in range(loads.MAX_ATTEMPTS):
        plan = _plan(turn, ids, limit, own)
        try:
            _carry_out(turn, plan)
            if plan.known < lost:
                turn.note_failed_load(failure)
            return list(plan.spans)
        except LoadError as error:
            # a short block may just have been superseded by a longer one: it is said if a second look finds less
            lost, failure = max(lost, plan.known), error
            held.clear()
            own = 0
    held.clear()
    turn.note_failed_load(failure)
    return []


def _plan(turn: Turn, ids: np.ndarray, limit: int, own: int) -> Plan:
    held = turn.held
    spans = crop(loads.find(turn, held.view, ids[:limit]), limit)
    resident = Resident(own, held.covers, bool(held.states), held.states_at)
    whole = partial(held.whole_until, spans=spans)
    plan = plan_reuse(ids, limit, spans, resident, whole, partial(loads.find_checkpoint, turn), _cost_model(turn, ids))
    stats, choice = turn.stats, plan.choice
    stats.matched_tokens = plan.matched
    if held.sliding and plan.matched < held.whole(total_tokens(spans)):
        stats.recomputed = (
            f"the sliding layers' windows before token {total_tokens(spans)} were let go: computed from token "
            f"{plan.matched} on, the last one before it at which they are whole"
        )
        stats.missed = "windows let go"
    turn.computes_known = plan.computes_known
    if choice is not None:
        stats.gate = choice.reason
        if plan.computes_known:
            stats.recomputed, stats.missed = f"computing is faster: {choice.reason}", "computing is faster"
    return plan


def _cost_model(turn: Turn, ids: np.ndarray) -> CostModel | None:
    """Keys that were moved are always loaded, since computing them again would not give the same, and so is all up to
    the last picture, whose encoder takes nobody knows how long."""
    setup, held = turn.setup, turn.held
    store, gate = setup.store, setup.gate
    if store is None or not gate.enabled or not setup.ranks.alone:
        return None

    def choose(lengths: Sequence[int], spans: Sequence[Span], prompt: int, checkpoints: dict[int, bytes]) -> Choice:
        return gate.choose(held.layers, lengths, spans, prompt, held.whole_from, store.tier_of, checkpoints)

    return CostModel(lambda length: max(held.view.base, last_stand_in(ids[:length])), gate.can_choose, choose)


def _carry_out(turn: Turn, plan: Plan) -> None:
    """Begins what a plan says.

    Raises:
        LoadError: a block is missing or damaged.
    """
    held = turn.held
    if plan.length == 0:
        held.clear()
        return
    held.length = plan.length
    loads.plan_load(turn, plan.spans, plan.length, plan.checkpoint)
    if held.load is not None:
        turn.setup.gate.look_ahead(held.load, plan.choice, len(held.layers))
        held.load.start()


def adopt(turn: Turn, ids: np.ndarray, spans: Sequence[Span]) -> None:
    """The layers hold `ids` now; `spans` say what of it the store has."""
    held = turn.held
    if len(ids) < held.view.base:  # what comes after depends on KV that was put together otherwise
        held.change_view(held.view.rebased(len(ids)), ids)
        spans = []
    agreed = common_prefix(held.chain.ids, ids)
    held.chain.crop(agreed)
    held.chain.append(ids[agreed:])
    held.length = len(ids)
    held.went_on_from = spans[-1].block if spans else None
    held.known = total_tokens(spans)
    held.in_store = min(held.known, len(ids))
    if held.saver is None:
        return
    chain = held.chain
    whole = [span for span in spans if span.whole and span.first >= chain.base]
    tail = next(((chain.block_at(s.first), s.block) for s in whole if s.block_tokens < chain.block_size), None)
    again = [s for s in whole if s.last > len(ids) and s.block_tokens == chain.block_size]
    refill = frozenset(chain.block_at(s.first) for s in again) if turn.computes_known else frozenset()
    held.saver.begin_turn(held.in_store, tail, refill)


def take_up_together(turn: Turn, ids: np.ndarray, limit: int) -> None:
    """What `take_up` and `adopt` do, for ranks that have to agree on how much: as much as all of them have.

    Everything is loaded before any of them computes: a load that failed in the middle of a forward would leave the
    others waiting there.
    """
    ranks = turn.setup.ranks
    for _ in range(loads.MAX_ATTEMPTS):
        reused = ranks.attempt(partial(_take_up_whole, turn, ids, limit))
        limit = ranks.least(reused)
        if ranks.same(reused):
            return
    turn.held.clear()
    adopt(turn, ids[:0], [])


def _take_up_whole(turn: Turn, ids: np.ndarray, limit: int) -> int:
    for _ in range(loads.MAX_ATTEMPTS):
        spans = take_up(turn, ids, limit)
        reused = turn.held.length
        try:
            loads.finish(turn)
        except LoadError as error:
            turn.note_failed_load(error)
            continue
        adopt(turn, ids[:reused], spans)
        return reused
    turn.held.clear()
    adopt(turn, ids[:0], [])
    return 0
