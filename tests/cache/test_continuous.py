"""The store behind transformers' continuous batching: the same tokens, no more fed than has to be, whatever happens."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

pytest.importorskip(
    "transformers.generation.continuous_batching.cache_allocators", reason="a paged cache of before transformers 5.20"
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators.cache_allocator import (
    BlockLedger,
    CacheAllocator,
    compute_block_hash,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, Scheduler

from hf_attnstore import AttentionStore, AttentionStoreCache, LoadError, attach, detach
from hf_attnstore.cache.continuous import admission, requests, saving
from hf_attnstore.cache.continuous.manager import told_to
from hf_attnstore.cache.continuous.pages import Pages
from hf_attnstore.store.disk.surroundings import Disk, OpenFile, Surroundings

NEW = 6


def greedy(**settings: Any) -> GenerationConfig:
    """Likeliest tokens and no end before there are enough, unless told otherwise."""
    return GenerationConfig(**{"max_new_tokens": NEW, "do_sample": False, "eos_token_id": -1, **settings})


class Batches:
    """A model whose batches are counted."""

    def __init__(self, kind: str = "llama-gqa", model: Any = None) -> None:
        self.model = model if model is not None else make_model(kind)
        self.fed: list[int] = []
        fed = self.fed
        self.model.register_forward_pre_hook(
            lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )

    def config(self, blocks: int = 24, **more: Any) -> ContinuousBatchingConfig:
        return ContinuousBatchingConfig(**{"num_blocks": blocks, "max_batch_tokens": 256, "page_size": 32, **more})

    def run(
        self, prompts: list[list[int]], new: int = NEW, rows: int = 1, **config: Any
    ) -> tuple[list[list[int]], int]:
        """The answers, and how many tokens were fed for them."""
        self.fed.clear()
        several: dict[str, Any] = {"do_sample": True, "top_k": 1, "num_return_sequences": rows} if rows > 1 else {}
        found = self.outputs(prompts, self.config(**config), max_new_tokens=new, **several)
        assert all(output.error is None for output in found)
        return [output.generated_tokens for output in found], sum(self.fed)

    def outputs(self, prompts: list[list[int]], config: ContinuousBatchingConfig, **settings: Any) -> list[Any]:
        """What `generate_batch` gives."""
        found = self.model.generate_batch(
            prompts, generation_config=greedy(**settings), continuous_batching_config=config, warmup=False
        )
        return list(found.values())

    def plain(self, prompts: list[list[int]], new: int = NEW, rows: int = 1) -> tuple[list[list[int]], int]:
        """The same without a store, by a model that nothing is attached to."""
        attachment = self.model.__dict__.get("_attnstore_attachment")
        detach(self.model)
        found = self.run(prompts, new, rows)
        if attachment is not None:
            attach(self.model, attachment.store)
        return found


@pytest.fixture
def batches() -> Iterator[Batches]:
    made = Batches()
    yield made
    detach(made.model)


@contextmanager
def managed(batches: Batches, **settings: Any) -> Iterator[Any]:
    """A manager that runs meanwhile."""
    manager = batches.model.init_continuous_batching(
        generation_config=greedy(**settings), continuous_batching_config=batches.config()
    )
    manager.start()
    try:
        yield manager
    finally:
        manager.stop(block=True, timeout=60)


def result_of(manager: Any, name: str) -> list[int]:
    """A request's answer, when it is there."""
    while True:
        output = manager.get_result(timeout=60)
        assert output is not None
        if output.request_id == name and output.is_finished():
            assert output.error is None
            return list(output.generated_tokens)


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [tokens(length, seed + number)[0].tolist() for number, length in enumerate(lengths)]


def go_on(prompts: list[list[int]], answers: list[list[int]], seed: int = 90) -> list[list[int]]:
    return [p + a + tokens(3, seed + n)[0].tolist() for n, (p, a) in enumerate(zip(prompts, answers, strict=True))]


def fed_after(history: int, prompts: list[list[int]], new: int = NEW) -> int:
    """Tokens that have to be fed where the first `history` of each prompt are known: what is new, and what is
    generated but for the last."""
    return sum(len(prompt) - history for prompt in prompts) + (new - 1) * len(prompts)


def test_turns_feed_what_is_new_in_this_process_and_the_next(batches: Batches, tmp_path: Path) -> None:
    prompts = prompts_of(70, 33, 101)
    with AttentionStore(tmp_path, block_size=16) as store:
        attach(batches.model, store)
        answers, fed = batches.run(prompts)
        assert (answers, fed) == batches.plain(prompts)
        second = go_on(prompts, answers)
        found, fed = batches.run(second)
        assert found == batches.plain(second)[0]
        assert fed == sum(1 + 3 + NEW - 1 for _ in second)  # the last token of an answer was never fed
        stats = store.stats()
        assert stats["reused_tokens"] == sum(len(p) + NEW - 1 for p in prompts)
        assert stats["loaded_bytes"] == stats["reused_tokens"] * 2 * 2 * 2 * 12 * 4  # layers, keys and values, heads
        assert stats["saved_blocks"] > 0
    detach(batches.model)
    with AttentionStore(tmp_path, memory=0) as store:
        attach(batches.model, store)
        third = go_on(second, found)
        again, fed = batches.run(third)
        assert again == batches.plain(third)[0]
        assert fed == sum(1 + 3 + NEW - 1 for _ in third)
        assert store.stats()["loaded_bytes"] > 0


def test_it_finds_what_generate_saved_and_generate_what_it_saved(batches: Batches, store: AttentionStore) -> None:
    model = batches.model
    attach(model, store)
    prompt = tokens(90)
    cache = AttentionStoreCache(model, "a", store)
    whole = model.generate(prompt, past_key_values=cache, max_new_tokens=NEW, do_sample=False)
    longer = [[*whole[0].tolist(), 5, 6, 7]]
    answers, fed = batches.run(longer)
    assert answers == batches.plain(longer)[0]
    assert fed == 4 + NEW - 1
    following = torch.tensor([longer[0] + answers[0] + [8, 9]])
    batches.fed.clear()
    found = model.generate(following, max_new_tokens=NEW, do_sample=False)
    assert batches.fed[0] == 3
    detach(model)
    assert torch.equal(found, model.generate(following, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("common", [1, 15, 16, 31, 32, 33, 40, 63, 64])
def test_prompts_that_part_anywhere_share_their_beginning_token_by_token(
    batches: Batches, store: AttentionStore, common: int
) -> None:
    """Blocks have 16 tokens, pages 32: what is filled of a page is the request's own."""
    attach(batches.model, store)
    first, other = prompts_of(80, 80)
    batches.run([first])
    parted = first[:common] + [(t + 1) % 100 for t in first[common : common + 1]] + other[common + 1 :]
    answers, fed = batches.run([parted, first])
    expected, _ = batches.plain([parted, first])
    assert answers == expected
    assert fed == (80 - common) + 1 + 2 * (NEW - 1)


def test_a_cancelled_request_keeps_what_it_has(batches: Batches, store: AttentionStore) -> None:
    attach(batches.model, store)
    prompt = tokens(75)[0].tolist()
    with managed(batches, max_new_tokens=400) as manager:
        name = manager.add_request(prompt, streaming=True)
        seen: list[int] = []
        while len(seen) < 3:
            output = manager.get_result(timeout=60)
            assert output is not None
            seen = list(output.generated_tokens)
        manager.cancel_request(name)
    following = [prompt + seen + [4, 5]]
    answers, fed = batches.run(following)
    assert answers == batches.plain(following)[0]
    assert fed <= 2 + 1 + NEW - 1


@pytest.mark.parametrize("rows", [2, 3])
def test_several_answers_to_one_prompt(batches: Batches, store: AttentionStore, rows: int) -> None:
    attach(batches.model, store)
    prompts = prompts_of(70, 50)
    batches.run(prompts)
    answers, fed = batches.run(prompts, rows=rows)
    expected, all_of_it = batches.plain(prompts, rows=rows)
    assert answers == expected
    assert fed <= all_of_it - 100


def test_all_answers_to_one_prompt_are_kept(batches: Batches, store: AttentionStore) -> None:
    """Three that part at their first tokens, in a namespace: each is gone on with; its last token was not fed."""
    model, prompt = batches.model, tokens(70)[0].tolist()
    attach(model, store)
    with managed(batches, max_new_tokens=20, do_sample=True, temperature=3.0, num_return_sequences=3) as manager:
        told = told_to(manager)
        assert told is not None
        told.expect("a", store.in_namespace("alice"))
        manager.add_request(prompt, request_id="a")
        answers: dict[str, list[int]] = {}
        while len(answers) < 3:
            output = manager.get_result(timeout=60)
            assert output is not None
            assert output.error is None
            answers[output.request_id] = list(output.generated_tokens)
    assert len({tuple(answer) for answer in answers.values()}) == 3
    following = [prompt + answer + [4, 5] for answer in answers.values()]
    expected = batches.plain(following)[0]
    attach(model, store.in_namespace("alice"))
    assert batches.run(following) == (expected, 3 * (3 + NEW - 1))
    attach(model, store)
    assert batches.run(following[:1])[1] == 92 + NEW - 1, "they were hers"


def test_requests_that_had_to_give_way_come_back_from_the_store(batches: Batches, store: AttentionStore) -> None:
    """Pages for one of them at most: the others are soft-reset again and again."""
    prompts = prompts_of(90, 91, 92, 93)
    small: dict[str, Any] = {"blocks": 5, "max_batch_tokens": 128, "cpu_offload_space": 0.0}
    expected = batches.plain(prompts, new=40)[0]
    _, without = batches.run(prompts, new=40, **small)
    attach(batches.model, store)
    answers, fed = batches.run(prompts, new=40, **small)
    assert answers == expected
    assert fed <= without
    following = go_on(prompts, answers)
    answers, fed = batches.run(following, **small)
    assert answers == batches.plain(following)[0]
    assert fed < 4 * 130 / 4


def test_weights_that_change_in_a_pause_leave_no_old_page_behind(
    batches: Batches, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = batches.model
    attach(model, store)
    prompt = tokens(100)[0].tolist()
    with managed(batches) as manager:
        if not hasattr(manager, "pause"):
            pytest.skip("the manager of this transformers can't be paused")

        def ask() -> tuple[list[int], int]:
            batches.fed.clear()
            return result_of(manager, manager.add_request(prompt)), sum(batches.fed)

        before, _ = ask()
        with manager.pause(), torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(7, 0))
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight.mul_(-3.0)
        after = ask()
        again = ask()
    expected, _ = batches.plain([prompt])
    assert before != expected[0]
    assert after == (expected[0], 100 + NEW - 1)
    assert again == (expected[0], NEW)
    assert "go on with KV of before" not in log.text, "none ran"


def test_requests_that_run_while_weights_change_leave_nothing_to_others(
    batches: Batches, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = batches.model
    attach(model, store)
    prompt = tokens(100)[0].tolist()
    with managed(batches, max_new_tokens=300) as manager:
        if not hasattr(manager, "pause"):
            pytest.skip("the manager of this transformers can't be paused")
        running = manager.add_request(prompt, streaming=True)
        assert manager.get_result(running, timeout=60) is not None
        with manager.pause(), torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.v_proj.weight.mul_(-3.0)
        answer = result_of(manager, manager.add_request(prompt, max_new_tokens=NEW))
        manager.cancel_request(running)
    assert answer == batches.plain([prompt])[0][0]
    assert "1 requests of continuous batching that run now go on with KV of before" in log.text
    batches.fed.clear()
    assert batches.run([prompt])[0][0] == answer


def test_one_manager_serves_several_namespaces_and_none_gets_what_another_computed(
    batches: Batches, store: AttentionStore
) -> None:
    attach(batches.model, store)
    prompt = tokens(100)[0].tolist()
    views = {name: store.in_namespace(name) for name in ("alice", "bob")}
    answers, fed, reused = [], [], []
    with managed(batches) as manager:
        told = told_to(manager)
        assert told is not None
        for number, user in enumerate(("alice", "bob", "alice", "bob", "alice")):
            stats = told.expect(f"{user}-{number}", views[user])
            batches.fed.clear()
            answers.append(result_of(manager, manager.add_request(prompt, request_id=f"{user}-{number}")))
            fed.append(sum(batches.fed))
            reused.append(stats.reused_tokens)
    assert answers == 5 * batches.plain([prompt])[0]
    assert fed == [100 + NEW - 1] * 2 + [NEW] * 3
    assert reused == [0, 0, 99, 99, 99]
    attach(batches.model, store)
    assert batches.run([prompt])[1] == 100 + NEW - 1, "the store's own namespace has none of it"


@pytest.mark.parametrize("fault", ["load", "anything", "save", "identity"])
def test_a_fault_costs_the_store_and_not_the_loop(
    batches: Batches, store: AttentionStore, fault: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    prompts = prompts_of(70, 60)
    attach(batches.model, store)
    batches.run(prompts)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise LoadError("made up") if fault == "load" else RuntimeError("made up")

    if fault == "save":
        monkeypatch.setattr(saving.BlockSaver, "finish", fail)
    elif fault == "identity":
        monkeypatch.setattr(requests, "adapter_problem", fail)
    else:
        monkeypatch.setattr(Pages, "fill", fail)
    answers, fed = batches.run(prompts)
    monkeypatch.undo()
    expected, without = batches.plain(prompts)
    assert answers == expected
    assert (fed == without) == (fault in ("load", "anything", "identity"))
    assert ("goes on without the store" in log.text) == (fault != "load")
    assert batches.run(prompts)[1] == 2 * NEW, "the next manager tries again"


def test_a_damaged_block_is_computed(batches: Batches, tmp_path: Path) -> None:
    prompts = prompts_of(70)
    with AttentionStore(tmp_path, block_size=16) as store:
        attach(batches.model, store)
        batches.run(prompts)
    for file in (tmp_path / "blocks").rglob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 64
        file.write_bytes(bytes(content))
    with AttentionStore(tmp_path, memory=0) as store:
        attach(batches.model, store)
        answers, fed = batches.run(prompts)
        assert (answers, fed) == batches.plain(prompts)
        assert store.stats()["reused_tokens"] == 0


def test_pages_of_a_failed_batch_are_not_kept(
    batches: Batches, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = batches.model
    attach(model, store)
    prompt = tokens(70)[0].tolist()
    attention = model.model.layers[1].self_attn
    forward = type(attention).forward

    def broken(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self is attention:
            raise RuntimeError("made up")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(attention), "forward", broken)
    batches.outputs([prompt], batches.config())
    monkeypatch.undo()
    store.flush()
    answers, fed = batches.run([prompt])
    assert (answers, fed) == batches.plain([prompt])


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
@pytest.mark.parametrize("length", [9, 16, 31, 32, 75])
def test_layers_whose_attention_slides_find_what_generate_saved_and_the_other_way_round(
    kind: str, length: int, tmp_path: Path
) -> None:
    """Rings of pages hold a window, blocks hold every token."""
    batches = Batches(kind)
    model = batches.model
    with AttentionStore(tmp_path, block_size=8) as store:
        attach(model, store)
        prompts = prompts_of(length, length + 3)
        answers, fed = batches.run(prompts)
        assert answers == batches.plain(prompts)[0]
        assert fed == fed_after(0, prompts)
        following = torch.tensor([prompts[0] + answers[0] + [8, 9]])
        batches.fed.clear()
        found = model.generate(following, max_new_tokens=NEW, do_sample=False)
        assert batches.fed[0] == 3
        detach(model)
        assert torch.equal(found, model.generate(following, max_new_tokens=NEW, do_sample=False))
        attach(model, store)
        longer = [[*found[0].tolist(), 5, 6, 7], *go_on(prompts[1:], answers[1:])]
        again, fed = batches.run(longer)
        assert again == batches.plain(longer)[0]
        assert fed == 2 * (4 + NEW - 1)
        assert batches.run(go_on(longer, again))[1] == 2 * (4 + NEW - 1), "what came after a restore was kept"


def test_a_window_that_is_smaller_than_blocks_is_served_without_and_said(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    batches = Batches("gemma3")
    prompts = prompts_of(60)
    expected = batches.run(prompts)
    with AttentionStore(tmp_path, block_size=32) as store:
        attach(batches.model, store)
        assert batches.run(prompts) == expected
        assert batches.run(prompts) == expected
        assert "AttentionStore(block_size=24) has smaller ones" in log.text


class HeldUp(Disk):
    """A disk that gives nothing before it is let go."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.may.set()

    def open(self, path: str | Path) -> OpenFile:
        assert self.may.wait(timeout=60)
        return super().open(path)


@pytest.mark.parametrize("in_time", [True, False])
def test_a_slow_disk_stops_nobody_else(
    batches: Batches, tmp_path: Path, in_time: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = prompts_of(90, 40)
    with AttentionStore(tmp_path, block_size=16) as store:
        attach(batches.model, store)
        batches.run([first])
    disk = HeldUp()
    monkeypatch.setattr(admission, "PATIENCE", 60.0 if in_time else 0.05)
    with AttentionStore(tmp_path, surroundings=Surroundings(disk=disk)) as store:
        attach(batches.model, store)
        disk.may.clear()
        batches.fed.clear()
        with managed(batches) as manager:
            told = told_to(manager)
            assert told is not None
            stats = told.expect("first", store)
            manager.add_request(first, request_id="first")
            answers = [result_of(manager, manager.add_request(other))]
            assert (in_time, stats.prompt_tokens) in ((True, 0), (False, 0), (False, 90))
            if in_time:
                assert sum(batches.fed) == 40 + NEW - 1
                disk.may.set()
            answers.append(result_of(manager, "first"))
            disk.may.set()
        assert answers == batches.plain([other, first])[0]
        assert stats.reused_tokens == (89 if in_time else 0)
        assert stats.blocks_from == ({"disk": 6} if in_time else {})


def test_what_another_namespace_computed_is_not_found(batches: Batches, tmp_path: Path) -> None:
    prompts = prompts_of(70)
    with AttentionStore(tmp_path, block_size=16, encryption_key=bytes(range(32)).hex()) as store:
        for user, fed in (("alice", 70 + NEW - 1), ("bob", 70 + NEW - 1), ("alice", NEW)):
            attach(batches.model, store.in_namespace(user))
            assert batches.run(prompts) == (batches.plain(prompts)[0], fed)


def test_one_configuration_may_serve_two_models(batches: Batches, store: AttentionStore) -> None:
    other = Batches()
    with torch.no_grad():
        other.model.model.layers[0].self_attn.k_proj.weight.mul_(-2.0)
    prompts = prompts_of(70)
    config = batches.config()
    before = set(SCHEDULER_MAPPING)
    answers = []
    for made in (batches, other, batches, other):
        attach(made.model, store)
        answers.append([output.generated_tokens for output in made.outputs(prompts, config)])
    assert config.scheduler_type == batches.config().scheduler_type
    assert answers == 2 * [batches.plain(prompts)[0], other.plain(prompts)[0]]
    assert set(SCHEDULER_MAPPING) <= before, "schedulers of managers that are gone are gone"


def test_many_users_over_many_turns(batches: Batches, store: AttentionStore) -> None:
    """Eight users, five turns, pages for about half of them at once."""
    attach(batches.model, store)
    prompts = prompts_of(*range(30, 70, 5))
    total = 0
    for turn in range(5):
        answers, fed = batches.run(prompts, blocks=14)
        expected, all_of_it = batches.plain(prompts)
        assert answers == expected
        if turn:
            assert fed <= 8 * (4 + NEW - 1) + 64, all_of_it
        total += len(prompts)
        prompts = go_on(prompts, answers, seed=200 + 10 * turn)
    assert total == 40


def test_the_seams_are_where_they_were() -> None:
    """What the scheduler and the pages use of transformers, so that a release that moves it is noticed here."""

    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(Scheduler.__init__)[:2] == ["self", "cache"]
    assert names(Scheduler._infer_request_tokens)[:2] == ["self", "state"]
    assert names(Scheduler._get_waiting_candidates) == ["self"]
    assert names(Scheduler._schedule_request)[:4] == ["self", "state", "request_tokens", "token_budget"]
    assert names(Scheduler.finish_request) == ["self", "request_id"]
    assert names(Scheduler.clear_cancelled_requests) == ["self"]
    assert names(PagedAttentionCache.can_store_request_tokens) == ["self", "state", "request_len", "dry_run"]
    assert hasattr(PagedAttentionCache, "evict_cached_blocks")
    assert names(CacheAllocator.acquire_prefix_blocks) == ["self", "request_id", "prefix_len", "block_ids"]
    assert names(BlockLedger.register_new_hash) == ["self", "block_id", "block_hash"]
    assert names(compute_block_hash) == ["parent_hash", "tokens"]
    assert {"hash_to_block", "block_to_hash"} <= {*vars(BlockLedger())}
    source = inspect.getsource(PagedAttentionCache.count_new_complete_blocks)
    assert "if not self.use_prefix_sharing" in source


@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3"])
def test_tokens_lie_where_transformers_writes_them(kind: str) -> None:
    made = Batches(kind)
    model = made.model
    cache = PagedAttentionCache(
        model.config.get_text_config(),
        made.config(max_memory_percent=0.5),
        "cpu",
        DistributedHelper(None, None),
        model.dtype,
    )
    request = RequestState("a", list(range(75)))
    assert cache.can_store_request_tokens(request, 75)
    pages = Pages(cache, model.config.get_text_config().num_hidden_layers, 16)
    held = 0
    for count in (40, 3, 20, 12):
        rows: list[list[int]] = [[] for _ in pages._groups]
        cache.extend_read_and_write_indices("a", held, count, None, rows)
        held += count
        for group, wanted in zip(pages._groups, rows, strict=True):
            stride, start = group.allocator.block_physical_stride, max(held - count, group.kept_from(held))
            runs = list(group.runs("a", start, held))
            found = [run.page * stride + run.offset + n for run in runs for n in range(run.tokens)]
            assert found == wanted[-len(found) :]
            assert len(found) == held - start
            first, layer = group.pages[runs[0].page, 0, runs[0].offset], group.layers[0]
            assert first.data_ptr() == group.allocator._kv_token_views[layer][0][found[0]].data_ptr()


def test_inference_mode_of_the_caller_is_that_of_the_loop(batches: Batches, store: AttentionStore) -> None:
    attach(batches.model, store)
    prompts = prompts_of(70, 40)
    with torch.inference_mode():
        first, _ = batches.run(prompts)
        again, fed = batches.run(prompts)
    assert first == again == batches.plain(prompts)[0]
    assert fed == 2 * NEW
    store.flush()
    with torch.no_grad():
        assert batches.run(prompts) == (first, 2 * NEW)


@pytest.mark.parametrize("codec", ["lossless", "int8"])
def test_codecs_hold_for_it_as_for_generate(batches: Batches, tmp_path: Path, codec: str) -> None:
    if codec == "lossless":
        pytest.importorskip("zstandard")
    model, prompts = batches.model, prompts_of(70)
    with AttentionStore(tmp_path, block_size=16, codec=codec) as store:
        attach(model, store)
        batches.run(prompts)
        store.flush()
        found, fed = batches.run(prompts)
        assert fed == NEW
        whole = model.generate(torch.tensor(prompts), max_new_tokens=NEW, do_sample=False)
        assert found[0] == whole[0, 70:].tolist()
        assert codec != "lossless" or found == batches.plain(prompts)[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama-gqa", "gemma3"])
def test_hundreds_of_requests_get_the_tokens_that_they_get_without_a_store(kind: str, tmp_path: Path) -> None:
    """Eight users, forty turns, pages for half of them, the store opened anew every ten turns."""
    batches = Batches(kind)
    prompts = prompts_of(*range(20, 60, 5))
    compared = fed_with = fed_without = 0
    for opened in range(4):
        with AttentionStore(tmp_path, block_size=16) as store:
            attach(batches.model, store)
            for turn in range(10):
                answers, fed = batches.run(prompts, blocks=24)
                expected, without = batches.plain(prompts)
                assert answers == expected
                compared, fed_with, fed_without = compared + 8, fed_with + fed, fed_without + without
                prompts = go_on(prompts, answers, seed=1000 + 100 * opened + 10 * turn)
                if len(prompts[0]) > 150:
                    prompts = [prompt[:40] for prompt in prompts]
    assert compared == 320
    assert fed_with < 0.3 * fed_without


@pytest.mark.slow
def test_gemma_s_full_and_sliding_layers_go_on_from_disk(
    real_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Gemma 3 270M, past its window of 512 tokens: by rings and pages what was saved by them, and by `generate`."""
    path = real_model_folder("gemma3")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    batches, words = Batches(model=model), AutoTokenizer.from_pretrained(path)
    text = (Path(__file__).parents[2] / "hf_attnstore" / "lab" / "demo" / "alice.txt").read_text()
    prompts = [words(text).input_ids[:640], words(text).input_ids[2000:2300]]
    for turn in range(3):
        with AttentionStore(tmp_path) as store:
            attach(model, store)
            found, fed = batches.run(prompts, blocks=64)
            assert found == batches.plain(prompts)[0]
            assert fed == (fed_after(0, prompts) if not turn else 2 * (4 + NEW - 1))
            prompts = go_on(prompts, found)
    with AttentionStore(tmp_path) as store:
        attach(model, store)
        batches.fed.clear()
        whole = model.generate(torch.tensor(prompts[:1]), max_new_tokens=NEW, do_sample=False)
        assert batches.fed[0] == 4
        detach(model)
        assert torch.equal(whole, model.generate(torch.tensor(prompts[:1]), max_new_tokens=NEW, do_sample=False))
