"""Pictures and sounds are reused where they are the same, by content, and computed where they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.picture_models import ALL_FAMILIES, FAMILIES, PICTURE, VIDEO, Picture, make_picture_model, prompt, text

from hf_attnstore import AttentionStore, AttentionStoreCache

GREEDY: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "suppress_tokens": [94, VIDEO, PICTURE],
    "return_dict_in_generate": True,
    "output_logits": True,
}
families = pytest.mark.parametrize("family", FAMILIES)


class Chat:
    """A conversation with pictures: what has been said, with the store and, from nothing, without it."""

    def __init__(self, family: str, store: AttentionStore, session: str | None = "alice") -> None:
        self.family, self.store, self.session = family, store, session
        self.restart()
        self.other = make_picture_model(family)
        self.parts: list[list[int] | Picture] = []

    def restart(self, store: AttentionStore | None = None) -> None:
        """As in another process: a model that has seen nothing, and nothing in memory."""
        self.store = store or self.store
        self.model = make_picture_model(self.family)
        self.cache = AttentionStoreCache(self.model, self.session, self.store)

    def say(self, *parts: list[int] | Picture | None) -> None:
        self.parts += [part for part in parts if part is not None]

    def ask(self, reused: int, **settings: Any) -> Any:
        """A turn, which must reuse so many tokens, encode the pictures after these and no others, and give what it
        gives from nothing. The answer becomes part of the conversation."""
        inputs = prompt(self.family, self.parts)
        length = inputs["input_ids"].shape[1]
        with features_encoded(self.model) as encoded:
            ours = self.model.generate(**inputs, past_key_values=self.cache, **{**GREEDY, **settings})
        with features_encoded(self.other) as all_encoded:
            theirs = self.other.generate(**inputs, **{**GREEDY, **settings})
        assert_same(ours, theirs)
        assert self.cache.reused_tokens == reused
        assert self.cache.prefilled_tokens == length - reused
        assert not self.cache.stats.recomputed
        before = sum(1 for start in picture_starts(self.parts) if start < reused)
        assert (sum(encoded) == 0) == (before == len(picture_starts(self.parts)))
        assert (sum(encoded) < sum(all_encoded)) == (before > 0)
        self.parts.append(ours.sequences[0, length:].tolist())
        return ours

    @property
    def tokens(self) -> int:
        """What the store has after a turn: all but the last token, which was never fed."""
        return lengths(self.parts)[-1] - 1


def lengths(parts: list[list[int] | Picture]) -> list[int]:
    """Tokens up to the end of each part."""
    total, ends = 0, []
    for part in parts:
        total += len(part.ids) if isinstance(part, Picture) else len(part)
        ends.append(total)
    return ends


def picture_starts(parts: list[list[int] | Picture]) -> list[int]:
    return [end - len(p.ids) for p, end in zip(parts, lengths(parts), strict=True) if isinstance(p, Picture)]


@contextmanager
def features_encoded(model: Any) -> Iterator[list[int]]:
    """Sizes of what the model's encoder of pictures or sounds is given."""
    names = ("vision_tower", "visual", "audio_tower")
    encoder = next(getattr(model.model, name) for name in names if hasattr(model.model, name))
    sizes: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, kwargs.get("pixel_values"), kwargs.get("hidden_states"), kwargs.get("input_features")):
            if value is not None:
                sizes.append(value.numel())
                return

    handle = encoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def assert_same(ours: Any, theirs: Any) -> None:
    """The same tokens, and logits that are equal but for the rounding of computing pictures together or apart."""
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7, msg=lambda m, step=step: f"step {step}: {m}")


@pytest.fixture
def chat(store: AttentionStore) -> Callable[..., Chat]:
    """Chats of a family that begin with a picture between words."""

    def begin(family: str, picture: int = 1, session: str | None = "alice") -> Chat:
        begun = Chat(family, store, session)
        begun.say(text(21, 1), ALL_FAMILIES[family].picture(picture), text(9, 2))
        return begun

    return begin


@families
def test_a_picture_of_the_first_turn_is_not_computed_again(family: str, chat: Callable[..., Chat]) -> None:
    alice = chat(family)
    alice.ask(reused=0)
    for seed in (3, 4):
        known = alice.tokens
        alice.say(text(5, seed))
        alice.ask(reused=known)


@families
def test_a_picture_is_reused_by_a_model_that_never_saw_it(family: str, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        alice = Chat(family, store)
        alice.say(text(21, 1), ALL_FAMILIES[family].picture(1), text(9, 2))
        alice.ask(reused=0)
    for seed in (3, 4):
        with AttentionStore(tmp_path / "store", block_size=16) as store:
            known = alice.tokens
            alice.restart(store)
            alice.say(text(5, seed))
            alice.ask(reused=known)
            assert alice.cache.stats.loaded_bytes > 0


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("restarted", [False, True], ids=["same object", "restart"])
def test_a_second_picture_in_a_later_turn_is_the_only_one_computed(
    restarted: bool, family: str, chat: Callable[..., Chat]
) -> None:
    alice = chat(family)
    alice.ask(reused=0)
    for seed in (2, 3):
        known = alice.tokens
        if restarted:
            alice.store.drop_memory()
            alice.restart()
        alice.say(text(4, seed + 3), ALL_FAMILIES[family].picture(seed), text(6, seed + 5))
        alice.ask(reused=known)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_another_picture_between_the_same_words_is_not_taken_for_the_first(
    family: str, chat: Callable[..., Chat]
) -> None:
    first = chat(family, picture=1)
    answer = first.ask(reused=0)
    second = chat(family, picture=3)  # of the same size
    other = second.ask(reused=21)
    assert not torch.allclose(answer.logits[0], other.logits[0])
    again = chat(family, picture=1)
    known = again.parts
    again.ask(reused=lengths(known)[-1] - 1)


@families
def test_two_pictures_changing_places_are_two_other_pictures(family: str, chat: Callable[..., Chat]) -> None:
    pictures = [ALL_FAMILIES[family].picture(seed) for seed in (1, 3)]
    for order, reused in (((0, 1), 0), ((1, 0), 21)):
        alice = chat(family)
        alice.parts = [text(21, 1), pictures[order[0]], text(4, 2), pictures[order[1]], text(5, 3)]
        alice.ask(reused)


@families
def test_the_first_of_two_pictures_is_reused_without_the_second(family: str, chat: Callable[..., Chat]) -> None:
    for session, seed, reused in (("alice", 3, 0), ("bob", 5, 1)):
        alice = chat(family, session=session)
        alice.say(ALL_FAMILIES[family].picture(seed), text(5, 3))
        alice.ask(reused and lengths(alice.parts)[2])


@families
def test_another_session_reuses_the_same_picture(family: str, chat: Callable[..., Chat]) -> None:
    chat(family).ask(reused=0)
    bob = chat(family, session="bob")
    known = lengths(bob.parts)[-1]
    bob.say(text(7, 8))
    bob.ask(reused=known)


@families
def test_the_same_prompt_again_reuses_all_but_its_last_token(family: str, chat: Callable[..., Chat]) -> None:
    alice = chat(family)
    parts = list(alice.parts)
    alice.ask(reused=0)
    alice.parts = parts
    alice.ask(reused=lengths(parts)[-1] - 1)


@families
def test_text_edited_before_a_picture_has_the_picture_computed_again(family: str, chat: Callable[..., Chat]) -> None:
    chat(family).ask(reused=0)
    alice = chat(family)
    alice.parts[0] = text(21, 1)[:13] + text(8, 9)
    alice.ask(reused=13)
    alice = chat(family)
    alice.parts[2] = text(9, 2)[:4] + text(5, 9)
    alice.ask(reused=lengths(alice.parts)[1] + 4)
