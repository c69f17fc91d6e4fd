"""lm-evaluation-harness with a store: shots that many questions have in common are computed once for all runs.

pip install lm_eval
python examples/lm_eval_model.py --model Qwen/Qwen3-0.6B --tasks hellaswag --shots 10 --limit 50
"""

import argparse
from itertools import groupby
from typing import Any

import lm_eval
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from hf_attnstore import AttentionStore, AttentionStoreCache, attach, score_tokens


class StoreLM(HFLM):  # type: ignore[misc]
    """`HFLM` of a decoder-only model, whose requests find the beginnings of their contexts in a store."""

    def __init__(self, pretrained: Any, store: AttentionStore, **settings: Any) -> None:
        super().__init__(pretrained, **settings)
        attach(self.model, store)  # for tasks that generate
        self.cache = AttentionStoreCache(self.model, store=store, drop=0)
        self.fed_tokens = 0
        """Tokens of contexts that were computed before what comes after them."""

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Scores `((context, continuation), context tokens, continuation tokens)`; requests with the same context
        together, and those next to each other whose contexts begin alike.

        Raises:
            ValueError: a continuation is longer than what the model can be given.
        """
        longest = max((len(end) for _, _, end in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"a continuation of {longest} tokens is longer than the model's {self.max_length}")
        contexts = [tuple(begin[-(self.max_length + 1 - len(end)) :]) for _, begin, end in requests]  # as HFLM cuts
        order = sorted(range(len(requests)), key=contexts.__getitem__)
        found: dict[int, tuple[float, bool]] = {}
        rows = override_bs or (self.batch_size if isinstance(self.batch_size, int) else 8)
        for context, group in groupby(tqdm(order, disable=disable_tqdm), key=contexts.__getitem__):
            numbers = list(group)
            ends = [requests[number][2] for number in numbers]
            scores = score_tokens(self.cache, context, ends, batch_size=rows)
            self.fed_tokens += self.cache.stats.prefilled_tokens
            for number, score in zip(numbers, scores, strict=True):
                found[number] = (score.log_likelihood, score.is_greedy)
                if requests[number][0] is not None:  # a part of a rolling one
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], found[number])
        return [found[number] for number in range(len(requests))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", default="examples/small-model")
    parser.add_argument("--tasks", nargs="+", default=["hellaswag"])
    parser.add_argument("--shots", type=int, default=10)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--store", default=None, help="folder of the store; default as everywhere")
    given = parser.parse_args()
    with AttentionStore(given.store) as store:
        model = StoreLM(given.model, store, batch_size=8)
        results = lm_eval.simple_evaluate(model, tasks=given.tasks, num_fewshot=given.shots, limit=given.limit)
        print(lm_eval.utils.make_table(results))
        print(store.stats())


if __name__ == "__main__":
    main()
