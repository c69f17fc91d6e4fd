"""Scoring: how likely a model finds each of several continuations of one prefix.

The prefix is a turn like any other: what is known of it is loaded, the rest is computed once and kept. The
continuations are computed in the rows of batches behind copies of it, padded on the right, where nothing before sees
the padding. Nothing of them is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import CacheUseError, UnsupportedModelError
from ..session.chain import common_prefix
from ..store.store import AttentionStore
from .cache import AttentionStoreCache
from .hooks import feed
from .model.structure import device_of, is_encoder_decoder, position_limit


@dataclass(frozen=True)
class Score:
    """What a model makes of one continuation."""

    token_log_likelihoods: tuple[float, ...]
    """The natural logarithm of the probability of each of its tokens, after all that come before."""
    is_greedy: bool
    """Whether each of its tokens is the likeliest one where it stands."""

    @property
    def log_likelihood(self) -> float:
        """Of the whole continuation."""
        return float(np.sum(self.token_log_likelihoods, dtype=np.float64))

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.token_log_likelihoods)


def score(
    model: nn.Module,
    tokenizer: Any,
    prefix: str,
    continuations: Sequence[str],
    store: AttentionStore | None = None,
    *,
    batch_size: int = 8,
) -> list[Score]:
    """How likely `model` finds each of `continuations` after `prefix`: for labels, multiple choice, reranking.

    Each text is cut into tokens as a whole, so that the tokens are those of prefix and continuation in one piece.
    Spaces at the end of the prefix count as the beginning of the continuations, with which tokenizers join them. Where
    the first token of one has letters of the prefix in it, all are scored from before these: from the same place.

    Args:
        store: where the prefix is kept; default as for `AttentionStoreCache`.
        batch_size: how many continuations are computed at once, each behind a copy of the prefix's KV.

    Raises:
        CacheUseError: the prefix is empty even with what the tokenizer adds, or a continuation is.
        UnsupportedModelError: the model has an encoder.
    """
    text = prefix.rstrip()
    spaces = prefix[len(text) :]
    begin = _ids(tokenizer, text)
    whole = [_ids(tokenizer, text + spaces + continuation) for continuation in continuations]
    end = getattr(tokenizer, "eos_token_id", None)
    if len(begin) > 1 and begin[-1] == end:  # tokenizers that end every text with it
        begin, whole = begin[:-1], [ids[:-1] for ids in whole]
    given = min((common_prefix(begin, ids) for ids in whole), default=0)
    return _score(AttentionStoreCache(model, store=store, drop=0), [(ids, given) for ids in whole], batch_size)


def score_tokens(
    cache: AttentionStoreCache, prefix: Sequence[int], continuations: Sequence[Sequence[int]], *, batch_size: int = 8
) -> list[Score]:
    """As `score`, of token ids, with a cache that may serve many calls: `cache.stats` are those of the prefix.

    Raises:
        CacheUseError: the prefix or a continuation is empty, or the cache drops tokens.
        UnsupportedModelError: the model has an encoder.
    """
    begin = np.asarray(prefix, dtype=np.int64)
    texts = [np.concatenate([begin, np.asarray(continuation, dtype=np.int64)]) for continuation in continuations]
    return _score(cache, [(text, len(begin)) for text in texts], batch_size)


def _ids(tokenizer: Any, text: str) -> np.ndarray:
    return np.asarray(tokenizer(text)["input_ids"], dtype=np.int64)


def _score(cache: AttentionStoreCache, texts: Sequence[tuple[np.ndarray, int]], batch_size: int) -> list[Score]:
    """Scores texts, each with the number of its tokens that are given, and not scored."""
    if is_encoder_decoder(cache.model):
        raise UnsupportedModelError(f"{type(cache.model).__name__} has an encoder; score is for decoder-only models")
    if batch_size < 1:
        raise CacheUseError(f"batch_size is a number of rows, not {batch_size}")
    if cache.window is not None:
        raise CacheUseError("a cache that drops tokens can't score: make it with drop=0")
    for ids, given in texts:
        if not given or len(ids) <= given:
            raise CacheUseError(
                f"a text of {len(ids)} tokens of which {given} are given can't be scored: at least one has to come "
                "before what is scored (such as the token with which texts begin), and one is to be scored"
            )
    if not texts:
        return []
    with torch.no_grad():
        return _Scorer(cache, texts).run(batch_size)


class _Scorer:
    """One call: the texts' common beginning, and what of each comes after it."""

    def __init__(self, cache: AttentionStoreCache, texts: Sequence[tuple[np.ndarray, int]]) -> None:
        self._cache = cache
        self._model = cache.model
        self._texts = texts
        self._given = min(given for _, given in texts)
        first = texts[0][0]
        # a last token is scored, and never fed
        self._common = min(min(common_prefix(first, ids), len(ids) - 1) for ids, _ in texts)

    @property
    def _tails(self) -> list[tuple[int, ...]]:
        """What is fed of each text after what all have in common."""
        return [tuple(ids[self._common : -1].tolist()) for ids, _ in self._texts]

    def run(self, batch_size: int) -> list[Score]:
        """Computes and scores."""
        begun = self._begin()
        if begun is None:
            return [self._score(number, self._alone(ids), 0) for number, (ids, _) in enumerate(self._texts)]
        tails = self._tails
        # what begins another is computed with it
        longest = {tail for tail in tails if tail}
        ordered = sorted(longest)
        for one, after in pairwise(ordered):
            if after[: len(one)] == one:
                longest.discard(one)
        rows = sorted(longest, key=len)
        found: list[Score | None] = [
            None if tail else self._score(number, begun, self._given - 1) for number, tail in enumerate(tails)
        ]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            logits = self._compute(batch)
            for row, tail in enumerate(batch):
                for number, own in enumerate(tails):
                    if own and found[number] is None and tail[: len(own)] == own:
                        behind = logits[row, : len(own)]
                        whole = torch.cat([begun, behind]) if len(begun) else behind
                        found[number] = self._score(number, whole, self._given - 1)
        return [one for one in found if one is not None]

    def _begin(self) -> torch.Tensor | None:
        """Brings the common beginning into the cache, but for its last token if all before that is known and something
        comes after it: then that is computed in the rows, in one forward with what comes after it. Returns the logits
        `[tokens, vocabulary]` after each of its tokens from the last one that all texts are given; None if the model
        can't go on after what a cache holds, or nobody knows."""
        cache = self._cache
        config: Any = cache.model.config
        limit = position_limit(config.get_text_config(decoder=True))
        ids = torch.from_numpy(self._texts[0][0][None, : self._common])
        done = cache.match(ids[:, : self._given])
        try:
            too_long = limit is not None and max(len(text) for text, _ in self._texts) > limit
            if too_long or cache.unidentified or not cache.continues_in_parts:
                return None
            if 0 < done == self._common - 1 and cache.session is None and any(self._tails):
                self._common = done
                return torch.empty(0)
            ends = sorted({end for end in cache.stops if done < end < self._given} | {self._common})
            for start, stop in pairwise([done, *ends]):
                logits = self._forward(ids[:, start:stop], cache, self._common - self._given + 1)[0]
        finally:
            cache.save()
        # all is let go where the model turned out to have changed meanwhile
        return logits if cache.get_seq_length() == self._common else None

    def _compute(self, tails: Sequence[tuple[int, ...]]) -> torch.Tensor:
        """The logits `[rows, tokens, vocabulary]` after each token of the tails."""
        width = max(map(len, tails))
        ids = torch.zeros(len(tails), width, dtype=torch.long)
        for row, tail in enumerate(tails):
            ids[row, : len(tail)] = torch.tensor(tail)
        return self._forward(ids, self._cache.in_rows(len(tails), width), width)

    def _forward(self, ids: torch.Tensor, cache: AttentionStoreCache, wanted: int) -> torch.Tensor:
        """The logits of the last `wanted` tokens."""
        logits: torch.Tensor = feed(self._model, cache, ids.to(device_of(self._model)), wanted).logits
        return logits[:, -wanted:]

    def _alone(self, ids: np.ndarray) -> torch.Tensor:
        """The logits `[tokens, vocabulary]` of a text in one forward, without a cache."""
        whole = torch.from_numpy(ids[None, :-1]).to(device_of(self._model))
        logits: torch.Tensor = self._model(input_ids=whole).logits[0]
        return logits

    def _score(self, number: int, logits: torch.Tensor, first: int) -> Score:
        """Scores a text by the logits after its tokens from position `first` on, up to the last but one."""
        ids, given = self._texts[number]
        wanted = torch.from_numpy(ids[given:]).to(logits.device)
        after = logits[given - 1 - first : len(ids) - 1 - first].float()
        likely = torch.log_softmax(after, dim=-1).gather(-1, wanted[:, None])[:, 0]
        return Score(tuple(likely.tolist()), bool((after.argmax(dim=-1) == wanted).all()))
