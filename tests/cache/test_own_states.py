"""RWKV and xLSTM, whose running states have names of their own: kept by checkpoint, as those of any other model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, attach, detach
from hf_attnstore.cache.model.argument import as_generate_takes
from hf_attnstore.lab.families.feeding import some_ids
from hf_attnstore.lab.families.tiny import build

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
FAMILIES = ("rwkv", "xlstm")
both = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def model(family: str) -> Iterator[Any]:
    made = build(family)
    yield made
    detach(made)


def logits(output: Any) -> torch.Tensor:
    return torch.stack(output.logits)


class Kept:
    """A model whose own state is kept in memory, and fed in the same steps."""

    def __init__(self, family: str) -> None:
        self.model, self.state, self.length = build(family), None, 0
        self.name = "state" if family == "rwkv" else next(iter(as_generate_takes(self.model, 1)))

    @torch.no_grad()
    def feed(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits after the last of a conversation's new tokens."""
        given = {self.name: self.state} if self.state is not None else {}
        output = self.model(ids[:, self.length :], use_cache=True, **given)
        self.state, self.length = getattr(output, self.name), ids.shape[1]
        return output.logits[:, -1]

    def generate(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Six tokens more, and the logits of them `[6, 1, vocabulary]`."""
        found = []
        self.feed(ids[:, :-1])  # a checkpoint is taken there
        for _ in range(6):
            found.append(self.feed(ids))
            ids = torch.cat([ids, found[-1].argmax(-1, keepdim=True)], dim=1)
        return ids, torch.stack(found)


@both
@pytest.mark.parametrize("how", ["new objects", "one object", "attach"])
def test_a_conversation_is_that_of_a_state_that_was_kept(
    how: str, family: str, model: Any, store: AttentionStore
) -> None:
    theirs, plain, ids, cache = Kept(family), build(family), some_ids(30, 1), None
    kept = attach(model, store) if how == "attach" else None
    for turn, reused in enumerate((0, 35, 50, 65)):
        if how == "new objects" or (how == "one object" and not turn):
            cache = AttentionStoreCache(model, "alice", store)
        given = as_generate_takes(model, cache)
        output = model.generate(ids, return_dict_in_generate=True, output_logits=True, **given, **GREEDY)
        expected, said = theirs.generate(ids)
        assert torch.equal(output.sequences, expected)
        assert torch.equal(logits(output), said)
        stats = kept.last if kept is not None else cache.stats
        assert stats is not None
        assert (stats.reused_tokens, stats.prefilled_tokens) == (reused, ids.shape[1] - reused)
        alone = plain.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY)
        assert torch.allclose(logits(output), logits(alone), atol=1e-4)
        ids = torch.cat([expected, some_ids(9, 7 + turn)], dim=1)


@both
def test_another_model_with_the_same_weights_goes_on_from_disk(family: str, model: Any, tmp_path: Path) -> None:
    theirs, ids = Kept(family), some_ids(30, 1)
    with AttentionStore(tmp_path, block_size=16) as store:
        said = model.generate(ids, **as_generate_takes(model, AttentionStoreCache(model, "alice", store)), **GREEDY)
    ids = torch.cat([said, some_ids(9, 7)], dim=1)
    theirs.generate(some_ids(30, 1))
    expected, _ = theirs.generate(ids)
    twin = build(family)
    with AttentionStore(tmp_path, block_size=16) as store:
        cache = AttentionStoreCache(twin, "alice", store)
        assert torch.equal(twin.generate(ids, **as_generate_takes(twin, cache), **GREEDY), expected)
        assert cache.reused_tokens == 35
        assert cache.stats.loaded_bytes > 0
        # what the model wrote to in place is not what was kept
        again = AttentionStoreCache(twin, "bob", store)
        assert torch.equal(twin.generate(ids, **as_generate_takes(twin, again), **GREEDY), expected)
        assert again.reused_tokens >= 35


@both
def test_another_ending_goes_on_from_the_last_checkpoint(family: str, model: Any, store: AttentionStore) -> None:
    ids = some_ids(30, 1)
    first = AttentionStoreCache(model, "alice", store, checkpoint_every=10)
    said = model.generate(ids, **as_generate_takes(model, first), **GREEDY)
    for place, reused in ((33, 30), (25, 20), (3, 0)):
        other = said.clone()
        other[0, place] = (other[0, place] - 16 + 1) % 80 + 16
        cache = AttentionStoreCache(model, None, store)
        ours = model.generate(other, **as_generate_takes(model, cache), **GREEDY)
        assert torch.equal(ours, build(family).generate(other, **GREEDY))
        assert (cache.reused_tokens, cache.granularity) == (reused, "checkpoint")


@both
def test_a_loop_of_ones_own_and_copies(family: str, model: Any, store: AttentionStore) -> None:
    ids, theirs = some_ids(40, 1), Kept(family)
    with torch.no_grad():
        cache = AttentionStoreCache(model, "alice", store)
        assert cache.match(ids[:, :30]) == 0
        model(ids[:, :30], use_cache=True, **as_generate_takes(model, cache))
        cache.save()
        twin = copy.deepcopy(cache)
        theirs.feed(ids[:, :30])
        expected = theirs.feed(ids)
        for one in (cache, twin):
            output = model(ids[:, 30:], use_cache=True, **as_generate_takes(model, one))
            assert torch.equal(output.logits[:, -1], expected)
        cache.save()
        later = AttentionStoreCache(model, "alice", store)
        assert later.resume().tolist() == ids.tolist()
        assert later.get_seq_length() == 40
        assert torch.equal(later.layers[0].states[0], cache.layers[0].states[0])


@both
def test_samples_and_batches_are_those_of_plain_generate(family: str, model: Any, store: AttentionStore) -> None:
    ids, settings = some_ids(30, 1), {**GREEDY, "do_sample": True, "num_return_sequences": 3}
    torch.manual_seed(1)
    expected = build(family).generate(ids, **settings)
    for reused in (0, 29):
        cache = AttentionStoreCache(model, None, store)
        torch.manual_seed(1)
        assert torch.equal(model.generate(ids, **as_generate_takes(model, cache), **settings), expected)
        assert cache.reused_tokens == reused
    rows = torch.cat([ids, some_ids(30, 2)])
    attach(model, store)
    assert torch.equal(model.generate(rows, **GREEDY), build(family).generate(rows, **GREEDY))
    cache = AttentionStoreCache(model, ["alice", "bob"], store)
    with pytest.raises(CacheUseError, match="one conversation at a time"):
        model.generate(rows, **as_generate_takes(model, cache), **GREEDY)


@both
def test_a_window_shows_the_model_what_is_left(family: str, model: Any, store: AttentionStore) -> None:
    cache = AttentionStoreCache(model, "alice", store, window=48, keep_first=4)
    ids = torch.cat(
        [model.generate(some_ids(30, 1), **as_generate_takes(model, cache), **GREEDY), some_ids(9, 7)], dim=1
    )
    said = model.generate(ids, **as_generate_takes(model, cache), **GREEDY)
    assert cache.stats.truncation == "recomputed"
    shown = torch.cat([ids[:, :4], ids[:, 4 + cache.stats.dropped_tokens :]], dim=1)
    expected = build(family).generate(shown, **GREEDY)
    assert torch.equal(said, torch.cat([ids, expected[:, shown.shape[1] :]], dim=1))
