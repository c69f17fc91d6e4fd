"""Conversations that outgrow the window: what is dropped, what is moved, and that the rest stays right."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import BLOCK, make_llama, make_model, tokens
from support.truncating import TruncatingReference
from support.turns import follow_up, turn
from transformers import DynamicCache

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, ContextWindowError, attach
from hf_attnstore.cache.probing.positions import GEOMETRIES, probe

attachment_module: Any = importlib.import_module("hf_attnstore.cache.hooks")

MOVABLE = ("llama-gqa", "qwen3", "mistral", "gemma3")
ROOM = 6


def assert_close(ours: Any, theirs: Any, prompt: torch.Tensor) -> None:
    """The same tokens, and logits up to rounding."""
    count = len(theirs.logits)
    assert torch.equal(ours.sequences[0, : prompt.shape[1]], prompt[0])
    assert torch.equal(ours.sequences[0, -count:], theirs.sequences[0, -count:])
    assert ours.sequences.shape[1] == prompt.shape[1] + count
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("tier", ["memory", "disk", "the same object"])
@pytest.mark.parametrize("keep_first", [0, 5])
@pytest.mark.parametrize("family", MOVABLE)
def test_a_conversation_of_five_windows_goes_on_as_done_by_hand(
    family: str, keep_first: int, tier: str, tmp_path: Path
) -> None:
    model = make_model(family)
    window = 80
    reference = TruncatingReference(make_model(family), window, keep_first)
    settings: dict[str, Any] = {"window": window, "keep_first": keep_first}
    store = AttentionStore(tmp_path / "store", block_size=BLOCK)
    cache = AttentionStoreCache(model, "alice", store, **settings)
    sequence = tokens(0)
    cuts = rotated = 0
    for number in range(18):
        prompt = follow_up(sequence, 17 + number % 3, seed=number)
        known = len(reference.ids)
        before = reference.dropped
        theirs = reference.turn(prompt, ROOM)
        if tier != "the same object":
            if tier == "disk":
                store.drop_memory()
            if number % 6 == 5:
                store.close()
                store = AttentionStore(tmp_path / "store", block_size=BLOCK)
            cache = AttentionStoreCache(model, "alice", store, **settings)
        ours = turn(model, prompt, cache)
        assert_close(ours, theirs, prompt)
        stats = cache.stats
        cuts += reference.dropped > before
        assert stats.dropped_tokens == reference.dropped
        assert stats.prefilled_tokens == prompt.shape[1] - known
        assert stats.reused_tokens == known - reference.dropped
        assert stats.truncation == ("rotated" if reference.dropped else "")
        assert cache.get_seq_length() <= window
        assert cache.token_ids == reference.shown
        assert cache.conversation_ids == reference.ids
        rotated += stats.rotated_tokens
        if reference.dropped and (tier != "the same object" or reference.dropped > before):
            assert stats.loaded_bytes > 0
            # of sliding layers alone only the last window is loaded, which may have been made where it is
            assert stats.rotated_tokens > 0 or family == "mistral"
        sequence = ours.sequences
        assert store.tokens("alice") == reference.shown
        assert store.tokens("alice", dropped=True) == reference.ids
    assert cuts > 5
    assert rotated > 100
    assert sequence.shape[1] > 5 * window
    store.close()


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_with_one_layer_moving_equals_computing_again(family: str, tmp_path: Path) -> None:
    """What a single layer caches depends on each token alone, so dropping others changes nothing of it."""
    changes: dict[str, Any] = {"num_hidden_layers": 1}
    model, other = make_llama(**changes), make_llama(**changes)
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        sequence = turn(model, tokens(60), AttentionStoreCache(model, "alice", store)).sequences
        prompt = follow_up(sequence, 10, 2)
        cache = AttentionStoreCache(model, "alice", store, window=64, keep_first=3)
        ours = turn(model, prompt, cache)
        shown = torch.cat([prompt[:, :3], prompt[:, 3 + cache.stats.dropped_tokens :]], dim=1)
        assert cache.stats.rotated_tokens == cache.reused_tokens - 3 > 20
        theirs = turn(other, shown, DynamicCache(config=other.config))
    for a, b in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def grown(model: Any, store: AttentionStore, session: str = "alice", turns: int = 6, **settings: Any) -> torch.Tensor:
    """A conversation of several turns in a small window."""
    sequence = tokens(20, 50)
    for number in range(turns):
        cache = AttentionStoreCache(model, session, store, **settings)
        sequence = turn(model, sequence, cache).sequences
        if number < turns - 1:
            sequence = follow_up(sequence, 15, number)
    return sequence


WINDOW: dict[str, Any] = {"window": 64, "keep_first": 4}


def test_dropping_reads_and_writes_no_file(store: AttentionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    sequence = turn(model, tokens(50), AttentionStoreCache(model, "alice", store)).sequences
    store.flush()
    before = {path: path.stat().st_mtime_ns for path in Path(store.path).rglob("*.safetensors")}
    written = store.stats()["written_bytes"]
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    seen: list[int] = []
    start = AttentionStore.load

    def load(self: AttentionStore, *args: Any) -> Any:
        seen.append(self.stats()["written_bytes"])
        return start(self, *args)

    monkeypatch.setattr(AttentionStore, "load", load)
    turn(model, follow_up(sequence, 9, 1), cache)
    assert cache.stats.dropped_tokens > 0
    assert seen == [written]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items() if path.exists())


def test_a_message_that_is_too_long_changes_nothing(store: AttentionStore) -> None:
    model = make_model()
    sequence = grown(model, store, **WINDOW)
    held = store.manifest("alice")
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    with pytest.raises(ContextWindowError, match=r"59 new tokens.*window of 64"):
        turn(model, follow_up(sequence[:, :-1], 59, 3), cache)
    assert store.manifest("alice") == held
    prompt = follow_up(sequence, 10, 4)
    ours = turn(model, prompt, cache)
    assert cache.prefilled_tokens == 11
    again = turn(model, prompt, AttentionStoreCache(model, "other", store, save=False, window=4096))
    assert ours.sequences.shape == again.sequences.shape
    with pytest.raises(ContextWindowError, match=r"100 new tokens.*window of 64"):
        turn(model, tokens(100), AttentionStoreCache(model, "new", store, **WINDOW))
    assert [s.name for s in store.sessions()] == ["alice"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"window": 1}, CacheUseError),
        ({"window": 64, "keep_first": -1}, CacheUseError),
        ({"window": 64, "drop": 1.5}, CacheUseError),
        ({"window": 64, "drop": -0.1}, CacheUseError),
        ({"window": 64, "keep_first": 64}, ContextWindowError),
    ],
)
def test_windows_that_make_no_sense(settings: dict[str, Any], error: type[Exception], store: AttentionStore) -> None:
    with pytest.raises(error):
        AttentionStoreCache(make_model(), "alice", store, **settings)


def test_of_a_message_that_takes_another_s_place_nothing_is_dropped(store: AttentionStore) -> None:
    """Templates that cut the reasoning out of earlier answers render a history that is shorter than what was held."""
    model = make_model()
    held = turn(model, tokens(60), AttentionStoreCache(model, "alice", store, window=80)).sequences
    prompt = torch.cat([held[:, :20], tokens(56, 7)], dim=1)
    cache = AttentionStoreCache(model, "alice", store, window=80)
    ours = turn(model, prompt, cache)
    assert cache.stats.dropped_tokens == 8  # half of the 16 that are old and not kept first, and nothing of what is new
    assert cache.prefilled_tokens == 56
    longer = torch.cat([held[:, :20], tokens(75, 8)], dim=1)
    with pytest.raises(ContextWindowError, match="75 new tokens"):
        turn(model, longer, AttentionStoreCache(model, "alice", store, window=80))
    assert torch.equal(ours.sequences[:, : prompt.shape[1]], prompt)


def test_the_first_tokens_are_kept_unless_somebody_says_otherwise(store: AttentionStore) -> None:
    model = make_model()
    held = turn(model, tokens(60), AttentionStoreCache(model, "alice", store, window=80)).sequences
    prompt = follow_up(held, 16, 7)
    shown = {}
    for keep_first in (None, 4, 0, 1):
        cache = AttentionStoreCache(model, "alice", store, window=80, keep_first=keep_first, save=False)
        turn(model, prompt, cache)
        assert cache.stats.truncation == "rotated"
        assert cache.prefilled_tokens == 17
        shown[keep_first] = cache.token_ids[: 80 - ROOM]
    first = prompt[0].tolist()
    assert shown[None] == shown[4]
    assert shown[None][:4] == first[:4]
    assert shown[0][0] != first[0]
    assert shown[1][0] == first[0]
    for window in (2, 3, 5, 9):  # however small a window is, the default leaves room in it
        AttentionStoreCache(model, "bob", store, window=window)


def test_no_room_for_the_answer_is_said_at_the_call(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store, window=64, keep_first=10)
    with pytest.raises(ContextWindowError, match="max_new_tokens=60"):
        turn(model, tokens(30), cache, max_new_tokens=60)
    turn(model, tokens(30), cache)


def test_the_window_defaults_to_the_model_s_positions_and_drop_0_never_drops(store: AttentionStore) -> None:
    model = make_llama(max_position_embeddings=48)
    assert AttentionStoreCache(model, "alice", store).window == 48
    assert AttentionStoreCache(model, "alice", store, drop=0).window is None
    prompt = tokens(60)
    plain = turn(make_llama(max_position_embeddings=48), prompt, None)
    ours = turn(model, prompt, AttentionStoreCache(model, "alice", store, drop=0))
    assert torch.equal(ours.sequences, plain.sequences)
    attach(model, store)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), plain.sequences)


def test_what_is_kept_first_stays_shared(store: AttentionStore) -> None:
    model = make_model()
    system = tokens(32, 77)
    settings = {"window": 96, "keep_first": 32}
    for name in ("alice", "bob"):
        sequence = follow_up(system, 10, hash(name) % 1000)
        for number in range(5):
            cache = AttentionStoreCache(model, name, store, **settings)
            sequence = follow_up(turn(model, sequence, cache).sequences, 14, number)
    assert cache.stats.dropped_tokens > 0
    first = [store.manifest(name).spans[:2] for name in ("alice", "bob")]
    assert first[0] == first[1]
    assert [row.stop for row in first[0]] == [16, 16]


def test_a_fork_of_a_truncated_session_goes_on_alike(store: AttentionStore) -> None:
    model = make_model()
    sequence = grown(model, store, **WINDOW)
    store.fork("alice", "bob")
    prompt = follow_up(sequence, 10, 4)
    results = []
    for name in ("alice", "bob"):
        store.drop_memory()
        cache = AttentionStoreCache(model, name, store, **WINDOW)
        results.append(turn(model, prompt, cache))
        assert cache.prefilled_tokens == (11 if name == "alice" else 1)  # what one computes serves the other
        assert cache.stats.rotated_tokens > 0
    assert_close(results[0], results[1], prompt)
    store.delete("alice")
    cache = AttentionStoreCache(model, "bob", store, **WINDOW)
    turn(model, follow_up(results[1].sequences, 3, 5), cache)
    assert cache.prefilled_tokens == 4


def test_an_answer_can_be_tried_again_and_a_message_edited(store: AttentionStore) -> None:
    model = make_model()
    sequence = grown(model, store, **WINDOW)
    prompt = follow_up(sequence, 10, 4)
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    first = turn(model, prompt, cache)
    view = cache.token_ids[: -ROOM + 1]
    retried = AttentionStoreCache(model, "alice", store, **WINDOW)
    second = turn(model, prompt, retried)
    assert torch.equal(first.sequences, second.sequences)
    assert retried.prefilled_tokens == 1
    edited = torch.cat([sequence, tokens(10, 98)], dim=1)
    other = AttentionStoreCache(model, "alice", store, **WINDOW)
    turn(model, edited, other)
    assert other.prefilled_tokens == 10
    assert other.token_ids[: len(view) - 10] == view[:-10]


def test_going_back_to_before_the_truncation_is_exact(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    sequence = grown(model, store, **WINDOW)
    early = sequence[:, :45]
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    ours = turn(model, early, cache)
    theirs = turn(plain, early, DynamicCache(config=plain.config))
    assert_close(ours, theirs, early)
    assert cache.stats.dropped_tokens == 0
    assert cache.reused_tokens > 20


def test_an_untruncated_conversation_never_takes_kv_of_a_truncated_one(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    sequence = grown(model, store, **WINDOW)
    wide = AttentionStoreCache(model, "bob", store, window=400)
    ours = turn(model, sequence, wide)
    theirs = turn(plain, sequence, DynamicCache(config=plain.config))
    assert_close(ours, theirs, sequence)
    in_window = store.manifest("alice").spans[-1].block
    assert in_window not in {row.block for row in store.manifest("bob").spans}


@pytest.mark.parametrize("window", [48, 80, 400])
def test_another_window_is_no_obstacle(window: int, store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    sequence = grown(model, store, **WINDOW)
    cache = AttentionStoreCache(model, "alice", store, window=window, keep_first=4)
    prompt = follow_up(sequence, 10, 4)
    ours = turn(model, prompt, cache)
    assert ours.sequences.shape[1] == prompt.shape[1] + ROOM
    assert cache.get_seq_length() <= window
    if window == 400:
        theirs = turn(plain, prompt, DynamicCache(config=plain.config))
        assert torch.equal(ours.sequences, theirs.sequences)
        assert cache.stats.dropped_tokens == 0
    else:
        assert cache.prefilled_tokens == 11
        assert cache.stats.rotated_tokens > 0


def test_positions_that_can_not_be_moved_are_computed_again(
    store: AttentionStore, caplog: pytest.LogCaptureFixture
) -> None:
    model, plain = make_model("gpt2"), make_model("gpt2")
    sequence = tokens(20, 50)
    for number in range(8):
        prompt = follow_up(sequence, 15, number)
        caplog.clear()
        cache = AttentionStoreCache(model, "alice", store, **WINDOW)
        ours = turn(model, prompt, cache)
        shown = torch.tensor([cache.token_ids[: -ROOM + 1]])
        theirs = turn(plain, shown, DynamicCache(config=plain.config))
        assert torch.equal(ours.sequences[:, -ROOM:], theirs.sequences[:, -ROOM:])
        dropped = cache.stats.dropped_tokens
        assert shown.shape[1] == prompt.shape[1] - dropped
        assert shown[0].tolist() == prompt[0, :4].tolist() + prompt[0, 4 + dropped :].tolist()
        assert cache.stats.rotated_tokens == 0
        if dropped:
            assert cache.stats.truncation == "recomputed"
        if cache.reused_tokens < 16 and dropped:
            assert len([r for r in caplog.records if "can't be moved" in r.message]) == 1
        sequence = ours.sequences
    assert dropped > 40
    store.drop_memory()
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    turn(model, torch.cat([sequence, tokens(1, 3)], dim=1), cache)
    assert cache.prefilled_tokens < 20  # what was computed again is reused as it is


@pytest.mark.parametrize("loss", ["weights", "blocks", "half the blocks"])
def test_lost_kv_is_computed_again_in_the_window(loss: str, store: AttentionStore) -> None:
    model = make_model()
    sequence = grown(model, store, **WINDOW)
    store.flush()
    store.drop_memory()
    if loss == "weights":
        model = make_model(seed=5)
    else:
        files = sorted(Path(store.path).rglob("*.safetensors"))
        for path in files[:: 1 if loss == "blocks" else 2]:
            path.unlink()
    prompt = follow_up(sequence, 10, 4)
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    ours = turn(model, prompt, cache)
    assert ours.sequences.shape[1] == prompt.shape[1] + ROOM
    assert cache.get_seq_length() <= 64
    stats = cache.stats
    assert stats.dropped_tokens + stats.reused_tokens + stats.prefilled_tokens == prompt.shape[1]
    if loss != "half the blocks":
        shown = torch.tensor([cache.token_ids[: -ROOM + 1]])
        plain = make_model(seed=5) if loss == "weights" else make_model()
        theirs = turn(plain, shown, DynamicCache(config=plain.config))
        assert torch.equal(ours.sequences[:, -ROOM:], theirs.sequences[:, -ROOM:])


@pytest.mark.parametrize("mode", ["sampling", "beams", "several", "prompt lookup", "streamer", "max_length", "chunks"])
def test_ways_to_generate_return_the_whole_conversation(mode: str, store: AttentionStore) -> None:
    model = make_model()
    sequence = grown(model, store, **WINDOW)
    prompt = follow_up(sequence, 10, 4)
    put: list[torch.Tensor] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            put.append(value)

        def end(self) -> None:
            pass

    settings: dict[str, Any] = {
        "sampling": {"do_sample": True},
        "beams": {"num_beams": 2},
        "several": {"do_sample": True, "num_return_sequences": 2},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "streamer": {"streamer": Streamer()},
        "max_length": {"max_new_tokens": None, "max_length": prompt.shape[1] + ROOM},
        "chunks": {"prefill_chunk_size": 4},
    }[mode]
    results = []
    for save in (False, True):
        torch.manual_seed(3)
        put.clear()
        cache = AttentionStoreCache(model, "alice", store, save=save, **WINDOW)
        ours = turn(model, prompt, cache, **settings).sequences
        assert ours.shape == (2 if mode == "several" else 1, prompt.shape[1] + ROOM)
        assert (ours[:, : prompt.shape[1]] == prompt).all()
        assert cache.stats.dropped_tokens > 0
        results.append(ours)
    assert torch.equal(*results)
    if mode == "streamer":
        assert torch.equal(put[0], prompt)
        assert torch.cat([value.reshape(-1) for value in put[1:]]).tolist() == ours[0, prompt.shape[1] :].tolist()
    if mode in ("prompt lookup", "max_length", "chunks", "streamer"):
        greedy = turn(model, prompt, AttentionStoreCache(model, "alice", store, save=False, **WINDOW)).sequences
        assert torch.equal(ours, greedy)


def test_a_loop_of_one_s_own_goes_on_in_the_window(store: AttentionStore) -> None:
    model = make_model()
    sequence = grown(model, store, **WINDOW)
    prompt = follow_up(sequence, 10, 4)
    ours = turn(model, prompt, AttentionStoreCache(model, "alice", store, save=False, **WINDOW))
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    done = cache.match(prompt, new_tokens=ROOM)
    assert done == sequence.shape[1] - 1
    with torch.no_grad():
        logits = model(input_ids=prompt[:, done:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(logits, ours.logits[0], rtol=1e-4, atol=1e-4)
    cache.save()
    again = AttentionStoreCache(model, "alice", store, **WINDOW)
    held = again.resume()
    assert held[0].tolist() == store.tokens("alice") == cache.token_ids
    assert again.get_seq_length() == held.shape[1]
    gpt2 = make_model("gpt2")
    sequence = grown(gpt2, store, "bob", **WINDOW)
    prompt = follow_up(sequence, 25, 4)
    cache = AttentionStoreCache(gpt2, "bob", store, **WINDOW)
    done = cache.match(prompt, new_tokens=ROOM)
    with torch.no_grad():
        logits = gpt2(input_ids=prompt[:, done:], past_key_values=cache).logits[:, -1]
        shown = torch.tensor([cache.token_ids])
        expected = make_model("gpt2")(input_ids=shown).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.stats.truncation == "recomputed"


def test_kv_that_was_not_saved_is_computed_again(store: AttentionStore) -> None:
    model, plain = make_model(), make_model()
    cache = AttentionStoreCache(model, "alice", store, save=False, **WINDOW)
    sequence = turn(model, tokens(50), cache).sequences
    prompt = follow_up(sequence, 10, 3)
    ours = turn(model, prompt, cache)
    shown = torch.tensor([cache.token_ids[: -ROOM + 1]])
    assert 4 <= cache.stats.prefilled_tokens == shown.shape[1]
    theirs = turn(plain, shown, DynamicCache(config=plain.config))
    assert torch.equal(ours.sequences[:, -ROOM:], theirs.sequences[:, -ROOM:])


def test_new_tokens_alone_with_the_whole_mask_continue_a_truncated_conversation(store: AttentionStore) -> None:
    model = make_model()
    sequence = grown(model, store, **WINDOW)
    cache = AttentionStoreCache(model, "alice", store, **WINDOW)
    first = turn(model, follow_up(sequence, 5, 4), cache)
    prompt = follow_up(first.sequences, 10, 5)
    whole = turn(model, prompt, AttentionStoreCache(model, "alice", store, save=False, **WINDOW))
    held = len(cache.conversation_ids)
    out = model.generate(
        prompt[:, held:],
        attention_mask=torch.ones_like(prompt),
        past_key_values=cache,
        max_new_tokens=ROOM,
        do_sample=False,
    )
    assert torch.equal(out[0], whole.sequences[0, held:])


def test_blocks_of_a_truncated_conversation_outlive_what_comes_after_them(tmp_path: Path) -> None:
    model = make_model()
    with AttentionStore(tmp_path / "s", memory="1MiB", disk=900_000, block_size=BLOCK) as store:
        sequence = tokens(20, 50)
        for number in range(30):
            cache = AttentionStoreCache(model, "alice", store, **WINDOW)
            prompt = follow_up(sequence, 15, number)
            sequence = turn(model, prompt, cache).sequences
            store.flush()
            store.drop_memory()
            assert store.stats()["disk_bytes"] <= 900_000
            stats = cache.stats
            assert stats.dropped_tokens + stats.reused_tokens + stats.prefilled_tokens == prompt.shape[1]
            for row in store.manifest("alice").spans:
                assert not row.block or store.has(row.block)


def test_a_model_is_probed_once_and_never_again_for_the_same_store(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    probed: list[str] = []

    def counted(model: Any) -> Any:
        probed.append(type(model).__name__)
        return probe(model)

    monkeypatch.setattr(attachment_module, "probe", counted)
    monkeypatch.setattr(GEOMETRIES, "_found", {})
    sequence = grown(make_model(seed=7), store, **WINDOW)
    assert probed == ["LlamaForCausalLM"]
    store.flush()
    GEOMETRIES.forget()  # as in another process
    cache = AttentionStoreCache(make_model(seed=7), "alice", store, **WINDOW)
    turn(make_model(seed=7), sequence[:, :40], None)
    turn(cache.model, follow_up(sequence, 5, 3), cache)
    assert cache.stats.rotated_tokens > 0
    assert probed == ["LlamaForCausalLM"]
    store.set_note(cache.model.__dict__["_attnstore_attachment"].fingerprint.current(), {"probe": "damaged"})
    store.flush()
    GEOMETRIES.forget()
    again = AttentionStoreCache(make_model(seed=7), "alice", store, **WINDOW)
    turn(again.model, follow_up(sequence, 5, 3), again)
    assert probed == ["LlamaForCausalLM"] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("family", MOVABLE)
def test_a_truncated_conversation_on_a_gpu_says_what_it_says_on_the_cpu(
    family: str, tier: str, store: AttentionStore
) -> None:
    model = make_model(family).to("cuda")
    reference = TruncatingReference(make_model(family), 64, 4)
    sequence = tokens(0)
    for number in range(8):
        prompt = follow_up(sequence, 15, number)
        theirs = reference.turn(prompt, ROOM)
        store.flush()
        if tier == "disk":
            store.drop_memory()
        cache = AttentionStoreCache(model, "alice", store, **WINDOW)
        ours = turn(model, prompt.to("cuda"), cache)
        assert cache.stats.dropped_tokens == reference.dropped
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))
        sequence = torch.cat([prompt, theirs.sequences[:, -ROOM:]], dim=1)
    assert reference.dropped > 0
