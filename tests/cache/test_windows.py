"""Windows of sliding layers as blocks of their own: let go deep inside a conversation, computed where one goes back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import BLOCK, WINDOW, make_model, tokens
from support.turns import Reference, assert_reused, assert_same, expected_load, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, AttentionStoreError, CacheUseError
from hf_attnstore.store.blocks.keys import window_key
from hf_attnstore.store.disk.block_files import BlockFiles
from hf_attnstore.store.disk.disk_store import DiskStore

FAMILIES = ["gemma3", "mistral"]
PROMPTS = (100, 20, 33, 1, 40)


def opened(folder: Path, every: int | None = 0, **settings: Any) -> AttentionStore:
    return AttentionStore(folder, block_size=BLOCK, windows_every=every, on_device=0, **settings)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttentionStore]:
    with opened(tmp_path / "apart") as store:
        yield store


def on_disk(store: AttentionStore) -> int:
    """Bytes of all blocks."""
    store.flush()
    return store._disk.index.usage().bytes


def windows_of(store: AttentionStore) -> list[int]:
    """Where the blocks begin whose windows are there."""
    rows = list(store._disk.index.blocks())
    return sorted(row.start for row in rows if row.key == window_key(row.continues, store.secret))


def talk(model: Any, store: AttentionStore, session: str | None, prompts: Sequence[int] = PROMPTS) -> torch.Tensor:
    """A conversation of some turns, each by a cache of its own."""
    sequence = tokens(0)
    for number, count in enumerate(prompts):
        prompt = follow_up(sequence, count, seed=number)
        sequence = turn(model, prompt, AttentionStoreCache(model, session, store)).sequences
    return sequence


def answer(family: str, prompt: torch.Tensor) -> torch.Tensor:
    return turn(make_model(family), prompt, None).sequences


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_as_with_all_windows_and_takes_fewer_bytes(
    family: str, tier: str, store: AttentionStore, tmp_path: Path
) -> None:
    model, reference = make_model(family), Reference(make_model(family))
    sequence, known = tokens(0), 0
    for number, count in enumerate(PROMPTS):
        prompt = follow_up(sequence, count, seed=number)
        if tier == "disk":
            store.drop_memory()
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, prompt, cache)
        assert_same(ours, reference.turn(prompt))
        assert_reused(cache, prompt, known)
        assert cache.stats.loaded_bytes == expected_load(cache, reference.cache, known)
        assert set(cache.stats.blocks_from) == ({tier} if known else set())
        sequence, known = ours.sequences, ours.sequences.shape[1] - 1
        store.flush()
        needed = min(number and known - 6 - count, known - 6) if count <= BLOCK else known - 6
        assert windows_of(store) == list(range((needed - WINDOW + 1) // BLOCK * BLOCK, known, BLOCK))
    with opened(tmp_path / "whole", None) as whole:
        assert torch.equal(talk(model, whole, "alice"), sequence)
        assert on_disk(store) < (0.4 if family == "mistral" else 0.6) * on_disk(whole)
    assert store.session_codec("alice") == "raw+windows"
    assert not store.verify().problems


@pytest.mark.parametrize("every", [0, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_before_the_last_window_is_computed_from_the_last_point_that_is_whole(
    family: str, every: int, tmp_path: Path
) -> None:
    model = make_model(family)
    with opened(tmp_path, every) as store:
        sequence = talk(model, store, "alice")
        for at, reused in ((30, 0), (100, every), (150, 2 * every), (sequence.shape[1] - 1, sequence.shape[1] - 1)):
            edited = follow_up(sequence[:, :at], 9, seed=70 + at)
            cache = AttentionStoreCache(model, "alice", store)
            ours = turn(model, edited, cache).sequences
            assert torch.equal(ours, answer(family, edited))
            assert_reused(cache, edited, reused)
            if reused < at:
                assert cache.stats.missed == "windows let go"
                assert f"before token {at} were let go: computed from token {reused} on" in cache.stats.recomputed
            longer = follow_up(ours, 5, seed=at)  # the branch has its windows now
            store.drop_memory()
            cache = AttentionStoreCache(model, "alice", store)
            assert torch.equal(turn(model, longer, cache).sequences, answer(family, longer))
            assert_reused(cache, longer, ours.shape[1] - 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_answer_is_given_again_without_computing_the_prompt(family: str, store: AttentionStore) -> None:
    model = make_model(family)
    prompt = follow_up(talk(model, store, "alice"), 20, seed=9)
    for _ in range(2):
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, prompt, cache, max_new_tokens=40).sequences
        assert torch.equal(ours, turn(make_model(family), prompt, None, max_new_tokens=40).sequences)
    assert_reused(cache, prompt, prompt.shape[1] - 1)


def test_a_crop_to_where_no_window_is_says_where_one_is(tmp_path: Path) -> None:
    model = make_model("gemma3")
    with opened(tmp_path, 128) as store:
        _crop(model, store)


def _crop(model: Any, store: AttentionStore) -> None:
    sequence = talk(model, store, "alice")
    store.flush()
    cache = AttentionStoreCache(model, "alice", store)
    with torch.no_grad():
        assert cache.match(sequence) == sequence.shape[1] - 1
        model(sequence[:, -1:], past_key_values=cache)
    cache.crop(-5)
    assert cache.get_seq_length() == sequence.shape[1] - 5
    for length, instead in ((40, ""), (130, r" \(to 128 tokens it could go back\)")):
        with pytest.raises(CacheUseError, match=rf"can't go back to {length} tokens: .* have it{instead};"):
            cache.crop(length - cache.get_seq_length())


def test_a_fork_keeps_the_window_at_its_end_until_both_have_gone_on(store: AttentionStore) -> None:
    model = make_model("gemma3")
    sequence = talk(model, store, "alice", (100,))
    store.flush()
    store.fork("alice", "bob")
    end = [start for start in windows_of(store) if start < sequence.shape[1] - BLOCK]
    longer = follow_up(sequence, 90, seed=3)
    turn(model, longer, AttentionStoreCache(model, "alice", store))
    store.flush()
    assert set(end) <= set(windows_of(store))
    prompt = follow_up(sequence, 90, seed=4)
    cache = AttentionStoreCache(model, "bob", store)
    assert torch.equal(turn(model, prompt, cache).sequences, answer("gemma3", prompt))
    # the short block at the end of both became a full one, deep inside, by what the other one said
    assert_reused(cache, prompt, (sequence.shape[1] - 1) // BLOCK * BLOCK)
    store.flush()
    assert not set(end) & set(windows_of(store))


@pytest.mark.parametrize("moment", ["before a window is written", "before its files go", "before it is let go"])
def test_a_process_killed_in_the_middle_leaves_a_conversation_that_goes_on(
    moment: str, store: AttentionStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is copied as the process would leave it."""
    model, copies = make_model("gemma3"), []

    def copied(original: Callable[..., Any], when: Callable[..., bool]) -> Callable[..., Any]:
        def first(self: Any, *args: Any) -> Any:
            if when(*args):
                copies.append(shutil.copytree(store.path, tmp_path / f"killed-{len(copies)}"))
            return original(self, *args)

        return first

    sequence = talk(model, store, "alice", (100,))
    store.flush()
    is_window = lambda meta: meta.key == window_key(meta.continues, store.secret)  # noqa: E731
    if moment == "before a window is written":
        monkeypatch.setattr(BlockFiles, "write", copied(BlockFiles.write, lambda block: is_window(block.meta)))
    elif moment == "before its files go":
        monkeypatch.setattr(DiskStore, "_remove_files", copied(DiskStore._remove_files, lambda rows: bool(rows)))
    else:
        monkeypatch.setattr(DiskStore, "let_go", copied(DiskStore.let_go, lambda *_: True))
    prompt = follow_up(sequence, 40, seed=3)
    turn(model, prompt, AttentionStoreCache(model, "alice", store))
    store.flush()
    monkeypatch.undo()
    assert copies
    expected = answer("gemma3", prompt)
    for copy in copies:
        with opened(copy) as again:
            assert not again.verify().problems
            cache = AttentionStoreCache(model, "alice", again)
            assert torch.equal(turn(model, prompt, cache).sequences, expected)
            assert cache.reused_tokens >= 48, "what was whole before is reused"
            again.flush()
            assert windows_of(again) == windows_of(store)


def test_an_exported_conversation_takes_its_windows_along(store: AttentionStore, tmp_path: Path) -> None:
    model = make_model("gemma3")
    sequence = talk(model, store, "alice")
    store.export_session("alice", tmp_path / "alice.safetensors")
    with opened(tmp_path / "other", namespace="team") as other:
        other.import_session(tmp_path / "alice.safetensors")
        assert windows_of(other) == windows_of(store)
        prompt = follow_up(sequence, 3, seed=5)
        cache = AttentionStoreCache(model, "alice", other)
        assert torch.equal(turn(model, prompt, cache).sequences, answer("gemma3", prompt))
        assert_reused(cache, prompt, sequence.shape[1] - 1)


def test_a_beginning_is_copied_between_namespaces_with_its_windows(store: AttentionStore) -> None:
    model = make_model("gemma3")
    beginning = tokens(48)
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, beginning, cache)
    there = store.in_namespace("bob")
    copied = there.with_windows_apart().copy_beginning(
        beginning[0].tolist(), cache.model_fingerprint(), store.with_windows_apart()
    )
    assert copied == 48
    prompt = follow_up(beginning, 9, seed=8)
    cache = AttentionStoreCache(model, "carol", there)
    assert torch.equal(turn(model, prompt, cache).sequences, answer("gemma3", prompt))
    assert_reused(cache, prompt, 48)


def test_codecs_write_windows_as_they_write_blocks(store: AttentionStore, tmp_path: Path) -> None:
    model = make_model("gemma3")
    found = []
    for every in (0, None):
        with opened(tmp_path / f"int8-{every}", every, codec="int8") as coded:
            sequence = talk(model, coded, "alice")
            coded.drop_memory()
            cache = AttentionStoreCache(model, "alice", coded)
            found.append(turn(model, follow_up(sequence, 3, seed=5), cache))
            assert cache.reused_tokens == sequence.shape[1] - 1
    assert_same(*found)
    talk(model, store, "alice")
    assert on_disk_of(tmp_path / "int8-0") < on_disk(store)


def on_disk_of(folder: Path) -> int:
    with opened(folder) as store:
        return on_disk(store)


def test_a_full_disk_lets_windows_go_first_and_no_token_changes(tmp_path: Path) -> None:
    model = make_model("gemma3")
    with opened(tmp_path, memory="96KiB", disk="640KiB") as store:
        for number in range(8):
            prompt = tokens(150, seed=20 + number)
            for session in (f"s{number}", f"s{number // 2}"):
                cache = AttentionStoreCache(model, session, store)
                assert torch.equal(turn(model, prompt, cache).sequences, answer("gemma3", prompt))
        store.flush()
        assert store.stats()["evicted_blocks"] > 0
        assert not store.verify().problems


def test_models_without_sliding_layers_and_other_stores_know_nothing_of_it(store: AttentionStore) -> None:
    model = make_model("llama-gqa")
    cache = AttentionStoreCache(model, "alice", store)
    assert cache.store is store
    turn(model, tokens(100), cache)
    store.flush()
    assert store.session_codec("alice") == "raw"
    assert not windows_of(store)


@pytest.mark.parametrize("every", [-1, "often"])
def test_a_number_of_tokens_that_is_none_is_refused(every: Any, tmp_path: Path) -> None:
    with pytest.raises(AttentionStoreError, match="windows_every is a number of tokens"):
        opened(tmp_path, every)


@pytest.mark.parametrize(("cuts", "reused"), [((85, 3), [128, 198]), ((110, 3), [0, 64])])
def test_rows_of_a_batch_go_back_to_columns_where_all_of_them_have_their_windows(
    cuts: tuple[int, int], reused: list[int], tmp_path: Path
) -> None:
    """Where one row's window is gone, all go back; and there another row's may be gone, which is no error."""
    model, plain = make_model("mistral"), make_model("mistral")
    with opened(tmp_path / "apart", 64) as store:
        kept = (talk(model, store, "alice"), talk(model, store, "bob", (37, 60, 50, 41)))
        store.flush()
        prompts = [follow_up(ids[:, :-cut], 9, seed=8 + cut) for ids, cut in zip(kept, cuts, strict=True)]
        pads = [max(prompt.shape[1] for prompt in prompts) - prompt.shape[1] for prompt in prompts]
        ids = torch.cat([torch.nn.functional.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, pads, strict=True)])
        mask = torch.cat([torch.arange(ids.shape[1])[None] >= pad for pad in pads]).long()
        cache = AttentionStoreCache(model, ["alice", "bob"], store)
        call: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(ids, past_key_values=cache, **call), plain.generate(ids, **call))
        assert [row.reused_tokens for row in cache.row_stats] == reused
        assert cache.stats.loaded_bytes > 0
