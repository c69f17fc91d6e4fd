"""Batches of conversations: every row has its own history, and gives what it would give in any batch."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tokens
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.cache.batch import BatchCache
from hf_attnstore.errors import CacheUseError, SessionBusyError
from hf_attnstore.lab.families.tiny import build, families

PAD = 1
SETTINGS: dict[str, Any] = {
    "max_new_tokens": 5,
    "min_new_tokens": 5,
    "do_sample": False,
    "pad_token_id": PAD,
    "suppress_tokens": [PAD],  # else an answer of random weights may have some
    "return_dict_in_generate": True,
    "output_logits": True,
}
TOKEN = ("llama", "mistral", "gemma3_text", "gemma4_text", "glm_moe_dsa", "deepseek_v3")
STATE = ("qwen3_next", "lfm2", "mamba2")


def _model(family: str) -> Any:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    return build(family)


@pytest.fixture(scope="module")
def llama() -> Any:
    return _model("llama")


def ids(count: int, seed: int) -> list[int]:
    return tokens(count, seed).clamp_min(8)[0].tolist()


def padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded prompts and their mask, each `[rows, tokens]`."""
    width = max(len(row) for row in rows)
    prompts = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(prompts)
    for number, row in enumerate(rows):
        prompts[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    return {"input_ids": prompts, "attention_mask": mask}


def answers(output: Any, width: int) -> list[list[int]]:
    return output.sequences[:, width:].tolist()


def alone(model: Any, row: list[int], **settings: Any) -> list[int]:
    """What the model answers to one conversation by itself."""
    output = model.generate(torch.tensor([row]), **{**SETTINGS, **settings})
    return output.sequences[0, len(row) :].tolist()


def check_turn(model: Any, cache: BatchCache, rows: list[list[int]], **settings: Any) -> list[list[int]]:
    """One turn of a batch, compared with the same batch without a store, and with every conversation alone."""
    inputs = padded(rows)
    ours = model.generate(**inputs, past_key_values=cache, **{**SETTINGS, **settings})
    theirs = model.generate(**inputs, **{**SETTINGS, **settings})
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    found = answers(ours, inputs["input_ids"].shape[1])
    assert found == [alone(model, row, **settings) for row in rows]
    for row, stats in zip(rows, cache.row_stats, strict=True):
        assert stats.prompt_tokens == len(row)
        assert stats.reused_tokens + stats.prefilled_tokens == len(row)
    assert cache.stats.prompt_tokens == sum(len(row) for row in rows)
    return found


@pytest.mark.parametrize("family", TOKEN + STATE)
def test_turns_of_a_batch_with_restarts_between(family: str, tmp_path: Path) -> None:
    model = _model(family)
    rows = [ids(20, 1), ids(33, 2), ids(27, 3)]
    before = [0, 0, 0]
    for number in range(3):
        with AttentionStore(tmp_path / "store", block_size=8) as store:
            cache = AttentionStoreCache(model, ["a", "b", "c"], store)
            assert isinstance(cache, BatchCache)
            found = check_turn(model, cache, rows)
            fed = [len(row) - reused for row, reused in zip(rows, before, strict=True)]
            for row, stats, known, new in zip(rows, cache.row_stats, before, fed, strict=True):
                # of what a row has, as much is reused as all rows have: the one with most that is new decides
                expected = known if family in STATE else len(row) - max(fed)
                assert stats.reused_tokens == (max(expected, 0) if number else 0)
                assert (stats.loaded_bytes > 0) == (number > 0)
                assert new > 0
            assert {info.name: info.tokens for info in store.sessions()} == {
                name: len(row) + 4 for name, row in zip("abc", rows, strict=True)
            }
        before = [len(row) + 4 for row in rows]
        rows = [
            row + answer + ids((6, 3, 9)[place], 10 * number + place)
            for place, (row, answer) in enumerate(zip(rows, found, strict=True))
        ]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next"])
def test_what_a_batch_computed_is_what_a_conversation_alone_needs(family: str, store: AttentionStore) -> None:
    model = _model(family)
    rows = [ids(20, 1), ids(33, 2)]
    found = check_turn(model, AttentionStoreCache(model, ["a", "b"], store), rows)
    for name, row, answer in zip("ab", rows, found, strict=True):
        longer = torch.tensor([row + answer + ids(7, 5)])
        cache = AttentionStoreCache(model, name, store)
        ours = model.generate(longer, past_key_values=cache, **SETTINGS)
        theirs = model.generate(longer, **SETTINGS)
        assert cache.reused_tokens == len(row) + 4
        assert torch.equal(ours.sequences, theirs.sequences)
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_rows_may_be_new_replaced_or_in_another_order(llama: Any, store: AttentionStore) -> None:
    rows = {"a": ids(30, 1), "b": ids(25, 2), "c": ids(28, 3)}
    found = check_turn(llama, AttentionStoreCache(llama, list(rows), store), list(rows.values()))
    rows = {n: row + answer + ids(4, 9) for (n, row), answer in zip(rows.items(), found, strict=True)}
    rows["new"] = ids(12, 4)
    order = ["c", "new", "a"]
    cache = AttentionStoreCache(llama, order, store)
    check_turn(llama, cache, [rows[name] for name in order])
    # the new row has 12 tokens to compute, so all rows are fed their last 12
    assert [stats.prefilled_tokens for stats in cache.row_stats] == [12, 12, 12]
    assert [stats.reused_tokens for stats in cache.row_stats] == [len(rows["c"]) - 12, 0, len(rows["a"]) - 12]


def test_rows_without_a_name_are_found_by_their_content(llama: Any, store: AttentionStore) -> None:
    rows = [ids(33, 1), ids(40, 2)]
    check_turn(llama, AttentionStoreCache(llama, [None, None], store), rows)
    cache = AttentionStoreCache(llama, [None, "b"], store)
    check_turn(llama, cache, rows)
    assert [stats.prefilled_tokens for stats in cache.row_stats] == [1, 1]


def test_rows_that_end_early_keep_their_real_tokens_only(llama: Any, store: AttentionStore) -> None:
    rows = [ids(20, 1), ids(26, 2), ids(23, 3)]
    usual = [alone(llama, row, max_new_tokens=8, min_new_tokens=8) for row in rows]
    end = usual[0][2]  # the first row ends with its third token
    settings = {"max_new_tokens": 8, "min_new_tokens": 0, "eos_token_id": end}
    cache = AttentionStoreCache(llama, ["a", "b", "c"], store)
    ours = llama.generate(**padded(rows), past_key_values=cache, **{**SETTINGS, **settings})
    theirs = llama.generate(**padded(rows), **{**SETTINGS, **settings})
    assert torch.equal(ours.sequences, theirs.sequences)
    longest = ours.sequences.shape[1] - 26
    for name, row, whole in zip("abc", rows, usual, strict=True):
        real = whole[: whole.index(end) + 1] if end in whole[:longest] else whole[:longest]
        kept = store.tokens(name)
        assert kept == (row + real)[: len(kept)]
        assert len(kept) in (len(row) + len(real), len(row) + len(real) - 1)
    assert len(store.tokens("a")) <= len(rows[0]) + 3
    spoken = [whole[: whole.index(end) + 1] if end in whole else whole for whole in usual]
    longer = [row + whole + ids(5, 6) for row, whole in zip(rows, spoken, strict=True)]
    check_turn(llama, AttentionStoreCache(llama, ["a", "b", "c"], store), longer)


@pytest.mark.parametrize("family", ["llama", "qwen3_next"])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True, "top_k": 5}])
def test_beams_and_samples_inside_a_batch(family: str, settings: dict[str, Any], store: AttentionStore) -> None:
    model = _model(family)
    rows = [ids(20, 1), ids(26, 2)]
    found = check_turn(model, AttentionStoreCache(model, ["a", "b"], store), rows)
    rows = [row + answer + ids(6, 7) for row, answer in zip(rows, found, strict=True)]
    cache = AttentionStoreCache(model, ["a", "b"], store)
    settings = {**SETTINGS, "output_logits": False, **settings}
    torch.manual_seed(3)
    ours = model.generate(**padded(rows), past_key_values=cache, **settings)
    torch.manual_seed(3)
    theirs = model.generate(**padded(rows), **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(stats.reused_tokens > 0 for stats in cache.row_stats)
    # of beams and samples only the prompt is one conversation
    assert [store.tokens(name) for name in "ab"] == rows


def test_a_row_whose_blocks_are_lost_is_computed_again(llama: Any, tmp_path: Path) -> None:
    rows = [ids(40, 1), ids(44, 2)]
    with AttentionStore(tmp_path / "store", block_size=8) as store:
        found = check_turn(llama, AttentionStoreCache(llama, ["a", "b"], store), rows)
        store.flush()
        kept = store.manifest("a").spans
    rows = [row + answer + ids(6, 7) for row, answer in zip(rows, found, strict=True)]
    with AttentionStore(tmp_path / "store", block_size=8) as store:
        next((tmp_path / "store").rglob(f"{kept[2].block.hex()}.safetensors")).unlink()
        cache = AttentionStoreCache(llama, ["a", "b"], store)
        check_turn(llama, cache, rows)
        assert cache.row_stats[0].reused_tokens == 16
        assert cache.row_stats[1].reused_tokens == len(rows[1]) - (len(rows[0]) - 16)


def test_an_interrupted_batch_keeps_what_is_complete(llama: Any, store: AttentionStore) -> None:
    rows = [ids(20, 1), ids(26, 2)]
    count = 0

    def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return torch.zeros(len(ids), dtype=torch.bool)

    with pytest.raises(KeyboardInterrupt):
        llama.generate(
            **padded(rows), past_key_values=AttentionStoreCache(llama, ["a", "b"], store), stopping_criteria=[stop],
            **SETTINGS,
        )  # fmt: skip
    assert [len(store.tokens(name)) for name in "ab"] == [22, 28]
    found = [alone(llama, row) for row in rows]
    longer = [row + answer + ids(4, 8) for row, answer in zip(rows, found, strict=True)]
    cache = AttentionStoreCache(llama, ["a", "b"], store)
    check_turn(llama, cache, longer)
    assert [stats.reused_tokens for stats in cache.row_stats] == [22, 28]


def test_a_loop_of_ones_own(llama: Any, store: AttentionStore) -> None:
    rows = [ids(20, 1), ids(26, 2)]
    check_turn(llama, AttentionStoreCache(llama, ["a", "b"], store), rows)
    rows = [row + ids(5, 4) for row in rows]
    inputs = padded(rows)
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cache = AttentionStoreCache(llama, ["a", "b"], store)
    done = cache.match(inputs["input_ids"], 3, attention_mask=mask)
    assert done == inputs["input_ids"].shape[1] - 5
    reference = DynamicCache(config=llama.config)
    with torch.no_grad():
        first = {name: value[:, :done] for name, value in {**inputs, "position_ids": positions}.items()}
        llama(**first, past_key_values=reference)
        rest = inputs["input_ids"][:, done:]
        theirs = llama(rest, attention_mask=mask, position_ids=positions[:, done:], past_key_values=reference).logits
        ours = llama(rest, attention_mask=mask, position_ids=positions[:, done:], past_key_values=cache).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    cache.save()
    assert [store.tokens(name) for name in "ab"] == rows
    cache = AttentionStoreCache(llama, ["a", "b"], store)
    done = cache.match(inputs["input_ids"], 3, attention_mask=mask)
    with torch.no_grad(), pytest.raises(CacheUseError, match="position_ids"):
        llama(inputs["input_ids"][:, done:], attention_mask=mask, past_key_values=cache)
    cache.save()


@pytest.mark.parametrize("family", ["bloom", "deepseek_v4"])
def test_models_whose_rows_can_not_be_kept_run_as_without(
    family: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = _model(family)
    rows = [ids(20, 1), ids(26, 2)]
    for _ in range(2):
        cache = AttentionStoreCache(model, ["a", "b"], store)
        ours = model.generate(**padded(rows), past_key_values=cache, **SETTINGS)
        theirs = model.generate(**padded(rows), **SETTINGS)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert cache.reused_tokens == 0
    assert "neither loaded nor kept" in log.text
    assert store.sessions() == []


def test_embeddings_in_a_batch_are_computed_and_not_kept(llama: Any, store: AttentionStore) -> None:
    inputs = padded([ids(20, 1), ids(26, 2)])
    embeds = llama.get_input_embeddings()(inputs["input_ids"]).detach()
    cache = AttentionStoreCache(llama, ["a", "b"], store)
    ours = llama.generate(**inputs, inputs_embeds=embeds, past_key_values=cache, **SETTINGS)
    theirs = llama.generate(**inputs, inputs_embeds=embeds, **SETTINGS)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert store.sessions() == []


def test_what_is_no_batch_is_refused(llama: Any, store: AttentionStore) -> None:
    inputs = padded([ids(20, 1), ids(26, 2)])
    right = {name: value.flip(1) for name, value in inputs.items()}
    for wrong, message in (
        ({name: value[:1] for name, value in inputs.items()}, "2 sessions"),
        (right, "padded on the left"),
        ({"input_ids": inputs["input_ids"]}, "attention_mask"),
    ):
        with pytest.raises(CacheUseError, match=message):
            llama.generate(**wrong, past_key_values=AttentionStoreCache(llama, ["a", "b"], store), **SETTINGS)
    for sessions, message in ((["a", "a"], "same session"), ([], "at least one row")):
        with pytest.raises(CacheUseError, match=message):
            AttentionStoreCache(llama, sessions, store)
    with pytest.raises(CacheUseError, match="drops nothing"):
        AttentionStoreCache(llama, ["a", "b"], store, drop=0.5)
    with pytest.raises(CacheUseError, match="one conversation"):
        AttentionStoreCache(llama, ["a", "b"], store).resume()


def test_a_session_that_is_busy_leaves_the_others_free(llama: Any, store: AttentionStore) -> None:
    lock = store.lock_session("b", 0.0)
    inputs = padded([ids(20, 1), ids(26, 2)])
    with pytest.raises(SessionBusyError):
        llama.generate(**inputs, past_key_values=AttentionStoreCache(llama, ["a", "b"], store), **SETTINGS)
    lock.release()
    check_turn(llama, AttentionStoreCache(llama, ["a", "b"], store), [ids(20, 1), ids(26, 2)])


def test_flush_in_the_middle_of_a_batch_leaves_it_alone(llama: Any, store: AttentionStore) -> None:
    rows = [ids(20, 1), ids(26, 2)]
    cache = AttentionStoreCache(llama, ["a", "b"], store)

    def flush(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        store.flush()
        return torch.zeros(len(ids), dtype=torch.bool)

    ours = llama.generate(**padded(rows), past_key_values=cache, stopping_criteria=[flush], **SETTINGS)
    assert torch.equal(ours.sequences, llama.generate(**padded(rows), **SETTINGS).sequences)
    assert [len(store.tokens(name)) for name in "ab"] == [24, 30]


def check_padded(model: Any, cache: BatchCache, rows: list[list[int]], width: int, **settings: Any) -> Any:
    """One turn of a batch all of whose rows are padded to a width, compared with the same batch without a store."""
    inputs = padded([*rows, [PAD] * width])
    inputs = {name: value[:-1] for name, value in inputs.items()}
    ours = model.generate(**inputs, past_key_values=cache, **{**SETTINGS, **settings})
    theirs = model.generate(**inputs, **{**SETTINGS, **settings})
    assert torch.equal(ours.sequences, theirs.sequences)
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
    return ours


@pytest.mark.parametrize("family", TOKEN + STATE)
@pytest.mark.parametrize("lengths", [(20, 33), (5, 1), (1, 9), (1, 1)])
def test_rows_that_are_all_padded_are_computed_over_nothing_but_what_was_written(
    family: str, lengths: tuple[int, ...], store: AttentionStore
) -> None:
    model = _model(family)
    rows = [ids(length, length + number) for number, length in enumerate(lengths)]
    cache = AttentionStoreCache(model, ["a", "b"], store)
    found = check_padded(model, cache, rows, 40)
    assert cache.stats.reused_tokens == 0
    assert cache.stats.prefilled_tokens == (sum(lengths) if max(lengths) > 1 or family in TOKEN else 0)
    for number, row in enumerate(rows):  # what was kept of them is as good as what is computed anew
        longer = torch.tensor([row + found.sequences[number, 40:].tolist() + ids(3, 7)])
        again = AttentionStoreCache(model, None, store)
        ours = model.generate(longer, past_key_values=again, **SETTINGS)
        theirs = model.generate(longer, **SETTINGS)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert again.reused_tokens == (len(row) + 4 if max(lengths) > 1 or family in TOKEN else 0)
    assert not store.verify().problems


@pytest.mark.parametrize("family", STATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_running_states_are_there_whether_or_not_they_are_saved(
    family: str, dtype: torch.dtype, store: AttentionStore
) -> None:
    model = _model(family).to(dtype)
    rows = [ids(20, 1), ids(1, 2), ids(33, 3)]
    try:
        for number in range(2):
            cache = AttentionStoreCache(model, ["a", "b", "c"], store, save=number == 1)
            inputs = padded(rows)
            ours = model.generate(**inputs, past_key_values=cache, **SETTINGS)
            theirs = model.generate(**inputs, **SETTINGS)
            for a, b in zip(ours.logits[:1], theirs.logits[:1], strict=True):
                assert (a - b).abs().max() <= {torch.float32: 1e-4}.get(dtype, 5e-2) * b.abs().max()
            if dtype == torch.float32:
                assert torch.equal(ours.sequences, theirs.sequences)
                assert cache.stats.prefilled_tokens == 54
            assert (len(store.sessions()) > 0) == (number == 1 and not cache.row_stats[0].missed)
    finally:
        model.to(torch.float32)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_next"])
def test_a_copy_of_a_batch_goes_on_by_itself_and_keeps_nothing(family: str, store: AttentionStore) -> None:
    model = _model(family)
    rows = [ids(20, 1), ids(33, 2)]
    cache = AttentionStoreCache(model, ["a", "b"], store)
    found = check_turn(model, cache, rows)
    twin = copy.deepcopy(cache)
    assert isinstance(twin, BatchCache)
    assert (twin.store, twin.sessions, twin.row_stats) == (None, [None, None], [])
    inputs = padded(rows)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
    new = torch.tensor([answer[4:] for answer in found])
    positions = (mask.cumsum(1) - 1)[:, -1:]
    with torch.no_grad():
        ours = model(new, attention_mask=mask, position_ids=positions, past_key_values=twin).logits
    whole = torch.cat([inputs["input_ids"], torch.tensor(found)], dim=1)
    every = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        theirs = model(whole, attention_mask=mask, position_ids=every).logits[:, -1:]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert twin.get_seq_length() == 38
    twin.save()
    check = model.generate(**inputs, past_key_values=twin, **SETTINGS)
    assert answers(check, 33) == found
    assert [len(store.tokens(name)) for name in "ab"] == [24, 37]
    assert store.stats()["turns"] == 2


def test_settings_that_a_batch_or_an_encoder_can_not_have_are_refused_in_words(
    llama: Any, store: AttentionStore
) -> None:
    for settings in ({"window": 64}, {"keep_first": 4}, {"drop": 0.5}):
        with pytest.raises(CacheUseError, match="a batch of conversations drops nothing"):
            AttentionStoreCache(llama, ["a", "b"], store, **settings)
    t5 = _encoder_decoder()
    with pytest.raises(CacheUseError, match="leave out checkpoint_every"):
        AttentionStoreCache(t5, "a", store, checkpoint_every=16)
    with pytest.raises(CacheUseError, match="a cache for each session"):
        AttentionStoreCache(t5, ["a", "b"], store)


def _encoder_decoder() -> Any:
    small: dict[str, Any] = {"vocab_size": 101, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**small)).eval()
