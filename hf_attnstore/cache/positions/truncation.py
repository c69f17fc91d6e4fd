"""Choosing what of a conversation to show the model when all of it does not fit into the window."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ...session.spans import Span, total_tokens
from ...session.view import View
from ...session.window import KEEP_FIRST, Cuts, Window
from ..model.structure import positions_of

logger = logging.getLogger("hf_attnstore")


def window_of(config: Any, size: int | None, keep_first: int | None, drop: float) -> Window | None:
    """The window as a user asked for it; by default as large as the text model's positions go, and keeping `KEEP_FIRST`
    tokens where there is room for others.

    Returns:
        None where nothing is ever dropped: `drop=0`, or a model that states no limit.

    Raises:
        CacheUseError: a number that makes no sense.
        ContextWindowError: `keep_first` leaves no room.
    """
    if size is None:
        size = positions_of(config.get_text_config(decoder=True))
    if drop == 0 or not size or (isinstance(size, int) and size < 0):
        return None
    if keep_first is None:
        keep_first = min(KEEP_FIRST, max(int(size) // 2 - 1, 0))
    return Window(int(size), keep_first, drop)


def choose_view(
    ids: np.ndarray,
    limit: int,
    room: int,
    window: Window,
    plain: View,
    views: Iterable[View],
    find: Callable[[View, np.ndarray], list[Span]],
    history: int,
    movable: Callable[[], bool],
    cuts: Cuts | None = None,
) -> View:
    """The view of a conversation that does not fit into the window.

    Args:
        ids: the whole conversation `[tokens]`.
        limit: at most so many leading tokens may come from what is known.
        room: tokens to keep free.
        views: through which the conversation was seen before; the one that agrees with most of it goes on.
        find: where the KV of a view's first tokens is.
        history: leading tokens of the conversation that are not new, though their KV may be gone.
        movable: whether keys can be rotated to other positions.
        cuts: where the conversation may be cut, if not anywhere.

    Raises:
        ContextWindowError: what is new is too long, or `room`.
    """
    window.check_room(room)
    best = plain
    for view in views:
        agreed = view.cropped(min(view.agreement(ids), limit))
        if (len(agreed.ids), agreed.base) > (len(best.ids), best.base):
            best = agreed
    in_view = best.in_view(ids)
    if not window.overflows(len(in_view), room):
        return best
    known = find(best, in_view[: limit - best.dropped])
    old = max(total_tokens(known), best.position(min(history, limit)))
    if cuts is None:
        low, high = window.choose(len(in_view), old, room)
    else:
        window = replace(window, keep_first=best.position(cuts.first))
        window.check_room(room)
        old = max(old, best.position(min(cuts.last, limit)))
        low, high = window.choose(len(in_view), old, room, partial(_cut_end, best, cuts))
    moves = total_tokens(known) <= high or movable()
    view = best.without(low, high, ids, known, movable=moves)
    how = f"the KV of {view.base} others is kept" if view.base else "the others are computed again"
    logger.info("%d tokens do not fit into the window of %d: dropped %d, %s", len(ids), window.size, high - low, how)
    return view


def _cut_end(view: View, cuts: Cuts, least: int, wanted: int) -> int:
    """Where to end a cut, in positions of the view."""
    return view.position(cuts.end(view.logical(least), view.logical(wanted)))
