"""Which part of a prompt is reused: the rows of prompts that extend, equal, shorten or leave a session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import BLOCK, make_model, tokens
from support.turns import Reference, assert_reused, assert_same, follow_up, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, SessionNameError

FAMILIES = ("llama-gqa", "mistral", "gemma3")


def plain(model: Any, prompt: torch.Tensor, **settings: Any) -> torch.Tensor:
    return turn(model, prompt, None, **settings).sequences


def block_files(store: AttentionStore) -> list[Path]:
    store.flush()
    return sorted(store.path.glob("blocks/*/*/*.safetensors"))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["same object", "memory", "disk"])
def where(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Speaker:
    """Turns of one session, with the cache object kept or made anew, checked against a model without a store."""

    def __init__(self, family: str, store: AttentionStore, where: str, session: str = "alice") -> None:
        self.model, self.plain = make_model(family), make_model(family)
        self.store, self.where, self.session = store, where, session
        self.cache = AttentionStoreCache(self.model, session, store)

    def say(self, prompt: torch.Tensor, *, reused: int, session: str | None = None) -> torch.Tensor:
        if self.where == "disk":
            self.store.drop_memory()
        if self.where != "same object" or session is not None:
            self.cache = AttentionStoreCache(self.model, session or self.session, self.store)
        ours = turn(self.model, prompt, self.cache)
        assert torch.equal(ours.sequences, plain(self.plain, prompt))
        assert_reused(self.cache, prompt, reused)
        return ours.sequences


def test_a_prompt_that_extends_the_session_prefills_only_what_is_new(
    family: str, where: str, store: AttentionStore
) -> None:
    speaker = Speaker(family, store, where)
    first = speaker.say(tokens(50), reused=0)
    speaker.say(follow_up(first, 6, 2), reused=55)


def test_a_prompt_that_equals_the_session_is_reused_but_for_its_last_token(
    family: str, where: str, store: AttentionStore
) -> None:
    speaker = Speaker(family, store, where)
    first = speaker.say(tokens(50), reused=0)
    speaker.say(tokens(50), reused=49)
    speaker.say(first[:, :55], reused=54)
    speaker.say(first[:, :55], reused=54)


def test_a_prompt_that_is_a_prefix_is_reused_but_for_its_last_token(
    family: str, where: str, store: AttentionStore
) -> None:
    speaker = Speaker(family, store, where)
    speaker.say(tokens(90), reused=0)
    for length in (80, 49, 17, 16, 2, 1):
        speaker.say(tokens(90)[:, :length], reused=length - 1)
    speaker.say(tokens(90), reused=89)


def test_a_prompt_that_diverges_is_reused_up_to_there_and_the_old_branch_stays(
    family: str, where: str, store: AttentionStore
) -> None:
    speaker = Speaker(family, store, where)
    beginning = tokens(53)
    old, new = follow_up(beginning, 40, 2), follow_up(beginning, 44, 3)
    speaker.say(old, reused=0)
    speaker.say(new, reused=53)
    speaker.say(old, reused=92)
    speaker.say(new, reused=96)
    speaker.say(old, reused=92, session="bob")
    speaker.say(follow_up(new, 5, 4), reused=97, session="carol")


def test_switching_to_a_branch_that_another_session_computed_uses_that_branch(
    family: str, store: AttentionStore
) -> None:
    speaker = Speaker(family, store, "same object")
    mine, yours = follow_up(tokens(20), 80, 2), follow_up(tokens(20), 90, 3)
    turn(speaker.model, yours, AttentionStoreCache(speaker.model, "bob", store))
    speaker.say(mine, reused=20)
    speaker.say(yours, reused=109)
    assert speaker.cache.stats.loaded_bytes > 0
    speaker.say(mine, reused=99)


def test_sessions_with_the_same_beginning_share_its_blocks_on_disk(family: str, store: AttentionStore) -> None:
    model, other = make_model(family), make_model(family)
    system = tokens(4 * BLOCK)
    counts = []
    for number in range(3):
        prompt = follow_up(system, 10, seed=number + 5)
        cache = AttentionStoreCache(model, f"user {number}", store)
        ours = turn(model, prompt, cache)
        assert torch.equal(ours.sequences, plain(other, prompt))
        assert_reused(cache, prompt, 64 if number else 0)
        counts.append(len(block_files(store)))
    own = -(-(10 + 5) // BLOCK)
    assert counts == [4 + own, 4 + 2 * own, 4 + 3 * own]


def test_without_a_session_blocks_are_found_by_content(family: str, store: AttentionStore) -> None:
    model, other = make_model(family), make_model(family)
    first = turn(model, tokens(40), AttentionStoreCache(model, store=store)).sequences
    store.drop_memory()
    prompt = follow_up(first, 7, 2)
    cache = AttentionStoreCache(model, store=store)
    assert torch.equal(turn(model, prompt, cache).sequences, plain(other, prompt))
    assert_reused(cache, prompt, first.shape[1] - 1)
    assert store.sessions() == []


def test_a_cache_that_does_not_save_reads_only(store: AttentionStore) -> None:
    model, reference = make_model(), Reference(make_model())
    sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    reference.turn(tokens(40))
    files = block_files(store)
    prompt = follow_up(sequence, 40, 2)
    for _ in range(2):
        cache = AttentionStoreCache(model, "alice", store, save=False)
        ours = turn(model, prompt, cache)
        assert_reused(cache, prompt, 45)
        assert block_files(store) == files
        assert cache.stats.saved_bytes == 0
    assert_same(ours, reference.turn(prompt))
    assert len(store.tokens("alice")) == 45


def test_interleaved_sessions_do_not_mix(family: str, store: AttentionStore) -> None:
    models = make_model(family), make_model(family)
    sequences = {name: tokens(0) for name in "abc"}
    for number in range(4):
        for name in sequences:
            prompt = follow_up(sequences[name], 13 + number, seed=10 * number + ord(name))
            cache = AttentionStoreCache(models[0], name, store)
            sequences[name] = turn(models[0], prompt, cache).sequences
            assert torch.equal(sequences[name], plain(models[1], prompt))
            assert cache.prefilled_tokens == 13 + number + bool(number)


def test_new_tokens_alone_with_a_mask_over_all_continue_what_the_cache_holds(
    family: str, store: AttentionStore
) -> None:
    model, other = make_model(family), make_model(family)
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(50), cache).sequences
    prompt = follow_up(sequence, 6, 2)
    expected = plain(other, prompt)
    # the store knows the new tokens, too: they must be fed all the same, as generate will not leave any out
    turn(model, follow_up(prompt, 6, 3), AttentionStoreCache(model, "bob", store))
    new = prompt[:, cache.get_seq_length() :]
    ours = model.generate(
        new, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(ours, expected[:, -ours.shape[1] :])
    assert cache.prefilled_tokens == new.shape[1]
    assert store.tokens("alice") == expected[0, :-1].tolist()


def test_new_tokens_alone_after_the_weights_changed_are_computed_with_their_history(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    sequence = turn(model, tokens(50), cache).sequences
    changed = make_model(seed=7)
    model.load_state_dict(changed.state_dict())
    prompt = follow_up(sequence, 6, 2)
    new = prompt[:, cache.get_seq_length() :]
    ours = model.generate(
        new, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(ours, plain(changed, prompt)[:, -ours.shape[1] :])
    assert cache.prefilled_tokens == prompt.shape[1]


def test_new_tokens_alone_that_do_not_fit_what_the_cache_holds_are_refused(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    turn(model, tokens(50), cache)
    with pytest.raises(CacheUseError, match="whole conversation"):
        model.generate(tokens(3), attention_mask=torch.ones(1, 40, dtype=torch.long), past_key_values=cache)
    assert len(store.tokens("alice")) == 55


@pytest.mark.parametrize(
    "name", ["a/b", "../../etc/passwd", "..", ".", "/", "a\\b", "naïve 名前 🙂", "a\nb", "\0", " ", "x" * 1000, "'; --"]
)
def test_any_name_is_a_session_and_never_a_path(name: str, store: AttentionStore, tmp_path: Path) -> None:
    model = make_model()
    sequence = turn(model, tokens(20), AttentionStoreCache(model, name, store)).sequences
    cache = AttentionStoreCache(model, name, store)
    turn(model, follow_up(sequence, 4, 2), cache)
    assert cache.reused_tokens == 25
    assert [info.name for info in store.sessions()] == [name]
    store.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    for path in store.path.rglob("*"):
        assert set(path.name) <= set("0123456789abcdefghijklmnopqrstuvwxyz.-"), path


@pytest.mark.parametrize("name", ["", "x" * 10_000, "\ud800", 3, b"alice"])
def test_what_can_not_be_a_name_is_a_clear_error(name: Any, store: AttentionStore) -> None:
    with pytest.raises(SessionNameError):
        AttentionStoreCache(make_model(), name, store)
