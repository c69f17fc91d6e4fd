"""Block files that are missing or damaged: the same tokens, a warning, the file aside; also in mid-prefill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import BLOCK, make_llama, make_model, tokens
from support.turns import assert_reused, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, LoadError
from hf_attnstore.cache import begin
from hf_attnstore.cache.identity.fingerprint import fingerprint_of
from hf_attnstore.cache.model.ranks import Ranks
from hf_attnstore.store.blocks.stored import StoredBlock


def flip(path: Path, where: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * where)] ^= 16
    path.write_bytes(bytes(data))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "bit flipped in the data of the first layer": lambda path: flip(path, 0.5),
    "bit flipped in the data of the last layer": lambda path: flip(path, 0.96),
    "bit flipped in the header": lambda path: flip(path, 0.05),
    "another block": lambda path: path.write_bytes(
        next(p for p in sorted(path.parents[1].rglob("*.safetensors")) if p != path).read_bytes()
    ),
}


def files_in_order(store: AttentionStore, session: str) -> list[Path]:
    spans = store.manifest(session).spans
    return [next(store.path.glob(f"blocks/*/*/{span.block.hex()}.safetensors")) for span in spans]


@pytest.mark.parametrize("keep_lock", [None, "alice"], ids=["by content", "session"])
@pytest.mark.parametrize("which", [0, 2, -1], ids=["first", "middle", "last"])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("together", [False, True], ids=["layer by layer", "at once"])
def test_a_damaged_block_is_recomputed_with_a_warning_and_put_aside(
    damage: str,
    which: int,
    keep_lock: str | None,
    together: bool,
    store: AttentionStore,
    log: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    if together:
        request.getfixturevalue("at_once")
    model, other = make_model(), make_model()
    sequence = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    path = files_in_order(store, "alice")[which]
    DAMAGES[damage](path)
    prompt = follow_up(sequence, 5, 2)
    cache = AttentionStoreCache(model, keep_lock, store)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, [0, 16, 32, 48, 64][which])
    assert "recomputed" in log.text
    assert cache.stats.recomputed
    store.flush()
    aside = [p.name for p in (store.path / "quarantine").iterdir()]
    assert aside == ([] if damage == "missing" else [path.name])
    assert store.stats()["rejected"] == 1
    again = AttentionStoreCache(model, "alice", store)
    log.clear()
    assert torch.equal(turn(model, prompt, again).sequences, turn(other, prompt, None).sequences)
    assert_reused(again, prompt, prompt.shape[1] - 1)
    assert not log.records


@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma3"])
def test_damage_found_in_the_middle_of_a_prefill_is_recomputed(
    family: str, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = make_model(family), make_model(family)
    sequence = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    flip(files_in_order(store, "alice")[3], 0.9)
    read = StoredBlock.read
    reads = []

    def slowly(self: StoredBlock, wanted: Any) -> int:
        reads.append(1)
        time.sleep(0.02 if len(reads) < 8 else 0)
        return read(self, wanted)

    monkeypatch.setattr(StoredBlock, "read", slowly)
    heard: list[list[int]] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            heard.append(value.flatten().tolist())

        def end(self) -> None:
            heard.append([])

    prompt = follow_up(sequence, 5, 2)
    cache = AttentionStoreCache(model, "alice", store)
    started = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: started.append(1))
    ours = turn(model, prompt, cache, streamer=Streamer()).sequences
    handle.remove()
    assert torch.equal(ours, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, 48)
    assert reads
    assert heard[0] == prompt[0].tolist()
    assert heard[1:] == [*([token] for token in ours[0, prompt.shape[1] :].tolist()), []]


def test_another_thread_can_not_take_the_session_between_a_failed_load_and_the_next_try(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    sequence = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    flip(files_in_order(store, "alice")[1], 0.9)
    releases = []
    cache = AttentionStoreCache(model, "alice", store)
    release = begin.release
    monkeypatch.setattr(begin, "release", lambda turn: (releases.append(1), release(turn))[1])
    turn(model, follow_up(sequence, 5, 2), cache)
    assert_reused(cache, follow_up(sequence, 5, 2), 16)
    assert len(releases) == 1


@pytest.mark.parametrize("keep", [True, False], ids=["same object", "new object"])
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize("family", ["llama of 8 layers", "gemma3"])
def test_an_interrupt_while_kv_is_put_in_place_leaves_nothing_half_done(
    family: str, tier: str, nth: int, keep: bool, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (make_model(family) if family == "gemma3" else make_llama(num_hidden_layers=8) for _ in range(2))
    sequence = turn(model, tokens(70), AttentionStoreCache(model, "alice", store)).sequences
    owner: Any = torch if tier == "memory" else StoredBlock
    name = "cat" if tier == "memory" else "read"
    if tier == "disk":
        store.drop_memory()
    original = getattr(owner, name)
    calls = []

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        if tier == "disk" or "out" in settings:  # models use `torch.cat` too, though not to write into what is there
            calls.append(1)
            if len(calls) == nth:
                raise KeyboardInterrupt
        return original(*arguments, **settings)

    prompt = follow_up(sequence, 20, 2)
    cache = AttentionStoreCache(model, "alice", store)
    fingerprint = fingerprint_of(model)  # a function of torch's that is replaced is another computation, rightly
    known = fingerprint.current()
    monkeypatch.setattr(fingerprint, "current", lambda: known)
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        turn(model, prompt, cache)
    monkeypatch.undo()
    assert store.tokens("alice") == sequence[0, :-1].tolist()
    if not keep:
        cache = AttentionStoreCache(model, "alice", store)
    ours = turn(model, prompt, cache).sequences
    assert torch.equal(ours, turn(other, prompt, None).sequences)
    assert cache.reused_tokens == 75
    again = AttentionStoreCache(model, "bob", store)
    longer = follow_up(ours, 5, 3)
    assert torch.equal(turn(model, longer, again).sequences, turn(other, longer, None).sequences)


def test_every_block_damaged_still_gives_the_right_tokens(store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    sequence = turn(model, tokens(15 * BLOCK), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    for path in reversed(files_in_order(store, "alice")):
        flip(path, 0.9)
    prompt = follow_up(sequence, 5, 2)
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert cache.reused_tokens < prompt.shape[1] - 5
    assert cache.prefilled_tokens == prompt.shape[1] - cache.reused_tokens


def test_reads_that_always_fail_end_in_a_plain_prefill(store: AttentionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = make_model("gemma3"), make_model("gemma3")
    sequence = turn(model, tokens(15 * BLOCK), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()

    def fails(self: StoredBlock, wanted: Any) -> int:
        raise RuntimeError("a driver that gives up")

    monkeypatch.setattr(StoredBlock, "read", fails)
    prompt = follow_up(sequence, 5, 2)
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, 0)
    assert "failed" in cache.stats.recomputed
    manual = AttentionStoreCache(model, "bob", store)
    assert manual.match(prompt) == 0


@pytest.mark.parametrize("which", [0, 2, -1])
def test_a_manual_match_counts_only_what_can_be_read(which: int, store: AttentionStore) -> None:
    model = make_model()
    turn(model, tokens(70), AttentionStoreCache(model, "alice", store))
    store.drop_memory()
    flip(files_in_order(store, "alice")[which], 0.9)
    cache = AttentionStoreCache(model, "alice", store)
    count = cache.match(tokens(70))
    assert count == [0, 16, 32, 48, 64][which]
    with torch.no_grad():
        ours = model(input_ids=tokens(70)[:, count:], past_key_values=cache).logits[:, -1]
        theirs = model(input_ids=tokens(70)).logits[:, -1]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_sliding_window_that_can_not_be_got_back_is_computed_again(store: AttentionStore) -> None:
    model, other = make_model("mistral"), make_model("mistral")
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, tokens(60), cache, max_new_tokens=150)
    assert cache.layers[0].first > 60  # type: ignore[attr-defined]
    store.drop_memory()
    for path in files_in_order(store, "alice"):
        path.unlink()
    prompt = tokens(60)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, 0)


def test_a_short_block_that_is_superseded_between_look_up_and_opening_is_no_failed_load(
    store: AttentionStore, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer, here that of another process, puts a longer block in its place at that moment."""
    model, other = make_model(), make_model()
    sequence = turn(model, tokens(36), AttentionStoreCache(model, "alice", store)).sequences
    prompt = follow_up(sequence, 20, 1)
    store.drop_memory()
    load = AttentionStore.load
    superseded: list[str] = []

    def load_later(self: AttentionStore, *args: Any) -> Any:
        if self is store and not superseded:
            before = {path.name for path in store.path.glob("blocks/*/*/*")}
            with AttentionStore(store.path) as elsewhere:
                turn(other, prompt, AttentionStoreCache(other, "bob", elsewhere))
            superseded.extend(before - {path.name for path in store.path.glob("blocks/*/*/*")})
        return load(self, *args)

    monkeypatch.setattr(AttentionStore, "load", load_later)
    cache = AttentionStoreCache(model, "alice", store)
    ours = turn(model, prompt, cache)
    assert len(superseded) == 1
    assert torch.equal(ours.sequences, turn(make_model(), prompt, None).sequences)
    assert cache.reused_tokens >= 41
    assert cache.stats.loaded_bytes > 0
    assert (cache.stats.missed, cache.stats.recomputed, log.messages) == ("", "", [])


def test_ranks_agree_on_every_beginning_of_a_turn_on_the_save_before_it_and_on_one_begun_again(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(Ranks):
        def __init__(self) -> None:
            self.said: list[int] = []

        def least(self, value: int) -> int:
            self.said.append(value)
            return value

    cache = AttentionStoreCache(make_model(), "alice", store)
    told = cache._setup.ranks = Told()
    ids = tokens(40)[0].numpy()
    beginnings = []
    for _ in range(2):
        cache.begin_turn(ids, limit=39, checked=True)
        beginnings.append(told.said[:2])
        told.said.clear()
        cache.abandon(LoadError("it is gone"))
    cache.end_turn()
    assert beginnings == [[1, 1], [1, 1]]
    told.said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "save", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.begin_turn(ids, limit=39)
    assert told.said == [0], "the others wait for a rank that is gone"
