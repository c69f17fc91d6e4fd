"""Where the prefill of a prompt pauses so that running states are kept: where other prompts are likely to part from it.

A running state is of use to texts that begin with exactly the tokens that it sums up. So it is worth keeping where
messages begin and end, as other conversations have the same system prompt, edited ones the same history, and templates
drop what they wrote before an answer; and where another text has parted from this one already.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

NEAR = 16
"""Tokens that are rather computed again than to keep another state for their sake."""
BUDGET = 256 << 20
"""Bytes that the states kept within a prompt may take in a turn, those at its end not counted."""


def choose_pauses(
    first: int, last: int, *, parted: int = 0, boundaries: Sequence[int] = (), most: int | None = None
) -> list[int]:
    """Positions, ascending, at which a prefill of `[first, last]` is to pause: within the prompt, and at its end.

    Args:
        parted: where what is known of the prompt ends: there another text went on otherwise.
        boundaries: where messages begin or end, in ascending order. The first and the last two count: there system
            prompts end, edited messages begin, and answers follow.
        most: how many there may be within the prompt; where a text has parted counts before where one may.
    """
    places = [place for place in boundaries if NEAR <= place <= last]
    # what a template writes before an answer is often not in the next prompt any more
    end = places[-1] if places and last - NEAR < places[-1] >= first else last
    within = list(dict.fromkeys([*places[:-3:-1], *places[:1]]))
    if all(abs(parted - place) >= NEAR for place in (*within, end)):
        within.insert(0, parted)
    within = [place for place in within if first + NEAR <= place < end][:most]
    return sorted({*within, end} - {first})


def ends_of_messages(ids: np.ndarray, ends: frozenset[int]) -> list[int]:
    """Positions in `ids` `[tokens]` that follow a token which ends a message."""
    return (np.flatnonzero(np.isin(ids, list(ends))) + 1).tolist() if ends else []


def end_ids(model: nn.Module) -> frozenset[int]:
    """The ids with which a model's messages end, as far as its configuration says so."""
    found: set[int] = set()
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        end: Any = getattr(config, "eos_token_id", None)
        found.update([end] if isinstance(end, int) else end or ())
    return frozenset(found)
