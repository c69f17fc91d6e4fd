"""Texts that are cut into tokens in several ways: how far two of them are the same, in whole tokens of both."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .chain import common_prefix


def same_beginning(tokenizer: Any, a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> tuple[int, int]:
    """How many ids at the beginning of `a`, and how many of `b`, stand for the same text. A special token is the same
    as itself only, not as text that is spelled like it.
    """
    equal = common_prefix(np.asarray(a), np.asarray(b))
    taken = same_text(_spelled(tokenizer, a[equal:]), _spelled(tokenizer, b[equal:]))
    return equal + taken[0], equal + taken[1]


def _spelled(tokenizer: Any, ids: Sequence[int] | np.ndarray) -> list[str]:
    """Each token as it is spelled, and added ones as nothing else can be."""
    listed = [int(i) for i in ids]
    if not listed:
        return []
    added = tokenizer.added_tokens_decoder
    spelled = tokenizer.convert_ids_to_tokens(listed)
    return [f"\0{token}\0" if i in added else f"{token}" for i, token in zip(listed, spelled, strict=True)]


def same_text(a: Sequence[str], b: Sequence[str]) -> tuple[int, int]:
    """The longest beginnings of two sequences of tokens, each given as its text, that are the same text.

    Returns:
        How many tokens of `a`, and how many of `b`.
    """
    best = taken_a, taken_b = 0, 0
    ahead_a = ahead_b = ""  # what one of them has, and the other not yet
    while True:
        if not ahead_a and not ahead_b:
            best = taken_a, taken_b
        if ahead_a:
            if taken_b == len(b):
                return best
            ahead_a, ahead_b = _after(b[taken_b], ahead_a)
            taken_b += 1
        else:
            if taken_a == len(a):
                return best
            ahead_b, ahead_a = _after(a[taken_a], ahead_b)
            taken_a += 1
        if ahead_a and ahead_b:
            return best


def _after(token: str, ahead: str) -> tuple[str, str]:
    """What is left of both after `token` was laid beside what the other text is ahead; both where they differ."""
    if ahead.startswith(token):
        return ahead[len(token) :], ""
    if token.startswith(ahead):
        return "", token[len(ahead) :]
    return ahead, token
