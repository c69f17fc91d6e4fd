"""DiffusionGemma, which refines whole blocks of tokens: what its encoder caches is kept, and every step of the
denoising is that of a cache that was kept in memory."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fresh
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteriaList
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_attnstore import AttentionStore, AttentionStoreCache, CacheUseError, ContextWindowError, attach, detach
from hf_attnstore.cache.model.argument import generate_cache_name
from hf_attnstore.lab.families.feeding import some_ids
from hf_attnstore.lab.families.others import build_other

if "diffusion_gemma" not in CONFIG_MAPPING:
    pytest.skip("this transformers has no diffusion_gemma", allow_module_level=True)

CANVAS = 8
SETTINGS: dict[str, Any] = {"max_new_tokens": 3 * CANVAS, "max_denoising_steps": 3}
REUSED = [0, 46, 73, 100, 127]
CACHE = generate_cache_name(None)
PICTURE = 97


class Kept:
    """A model with a cache that is kept in memory, as its documentation has it: new tokens alone, behind the cache."""

    def __init__(self, model: Any | None = None) -> None:
        self.model = model or build_other("diffusion_gemma")
        self.logits: list[torch.Tensor] = []
        self.model.lm_head.register_forward_hook(lambda module, args, output: self.logits.append(output.clone()))
        self.cache: Any = None

    def generate(self, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        """The whole conversation after a turn; logits of all its steps are in `logits`."""
        torch.manual_seed(ids.shape[1])
        self.logits.clear()
        if self.cache is None:
            self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        done = self.cache.get_seq_length()
        output = self.model.generate(ids[:, done:], **{CACHE: self.cache}, **{**SETTINGS, **more})
        return torch.cat([ids[:, :done], output.sequences], dim=1)


class Ours(Kept):
    """The same with a store."""

    def generate(self, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        torch.manual_seed(ids.shape[1])
        self.logits.clear()
        given = {} if self.cache is None else {CACHE: self.cache}
        output: torch.Tensor = self.model.generate(ids, **given, **{**SETTINGS, **more}).sequences
        return output


def assert_same(ours: Kept, theirs: Kept) -> None:
    """Bit for bit, in every step of the denoising."""
    assert len(ours.logits) == len(theirs.logits) > 0
    for one, other in zip(ours.logits, theirs.logits, strict=True):
        assert torch.equal(one, other)


@pytest.fixture
def ours() -> Iterator[Ours]:
    made = Ours()
    yield made
    detach(made.model)


def more(ids: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.cat([ids, some_ids(3, seed)], dim=1)


@pytest.mark.parametrize("how", ["new objects", "one object", "attach"])
def test_every_step_is_that_of_a_cache_that_was_kept(how: str, ours: Ours, store: AttentionStore) -> None:
    theirs, ids = Kept(), some_ids(30, 1)
    kept = attach(ours.model, store) if how == "attach" else None
    for turn, reused in enumerate(REUSED):
        if how == "new objects" or (how == "one object" and not turn):
            ours.cache = AttentionStoreCache(ours.model, "alice", store)
        said = ours.generate(ids)
        assert torch.equal(said, theirs.generate(ids))
        assert_same(ours, theirs)
        stats = kept.last if kept is not None else ours.cache.stats
        assert stats is not None
        assert (stats.reused_tokens, stats.prefilled_tokens) == (reused, ids.shape[1] - reused)
        assert stats.generated_tokens == 2 * CANVAS  # the last canvas is encoded by nobody
        ids = more(said, 50 + turn)


_RESTARTED = """
import torch
from hf_attnstore import AttentionStore, AttentionStoreCache
from hf_attnstore.lab.families.others import build_other
torch.set_num_threads(1)
model, logits = build_other("diffusion_gemma"), []
model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output.clone()))
with AttentionStore({path!r}, block_size=16) as store:
    ids = torch.tensor([{ids}])
    torch.manual_seed(ids.shape[1])
    cache = AttentionStoreCache(model, "alice", store)
    said = model.generate(ids, {name}=cache, max_new_tokens=24, max_denoising_steps=3).sequences
    print(cache.reused_tokens, *said[0].tolist())
torch.save(logits, {logits!r})
"""


def test_a_new_process_goes_on(ours: Ours, tmp_path: Path) -> None:
    theirs, ids = Kept(), some_ids(30, 1)
    with AttentionStore(tmp_path / "store", block_size=16) as store:
        ours.cache = AttentionStoreCache(ours.model, "alice", store)
        ids = more(ours.generate(ids), 50)
    theirs.generate(some_ids(30, 1))
    expected = theirs.generate(ids)
    paths = {"path": str(tmp_path / "store"), "logits": str(tmp_path / "logits")}
    code = _RESTARTED.format(ids=ids[0].tolist(), name=CACHE, **paths)
    reused, *said = map(int, fresh.run([sys.executable, "-c", code], check=True).stdout.split())
    assert (reused, said) == (46, expected[0].tolist())
    ours.logits = torch.load(tmp_path / "logits")
    assert_same(ours, theirs)


def test_forks_and_edits_reuse_up_to_where_they_part(ours: Ours, store: AttentionStore) -> None:
    ours.cache = AttentionStoreCache(ours.model, "alice", store)
    first = ours.generate(some_ids(30, 1))
    store.fork("alice", "bob")
    for name, place, reused in (("bob", 40, 40), ("alice", 17, 17), (None, 29, 29)):
        ids = first.clone()
        ids[0, place] = (ids[0, place] - 16 + 1) % 80 + 16
        ours.cache = AttentionStoreCache(ours.model, name, store)
        said = ours.generate(ids)
        assert ours.cache.reused_tokens == reused
        theirs = Kept()
        theirs.cache = DynamicCache(config=theirs.model.config.get_text_config(decoder=True))
        with torch.no_grad():  # what was kept, up to there: its first prompt, then canvas by canvas
            for start, stop in ((0, min(30, place)), (30, min(38, place)), (38, place)):
                if start < stop:
                    theirs.model.model.encoder(ids[:, start:stop], **{CACHE: theirs.cache})
        assert torch.equal(said, theirs.generate(ids))
        for one, other in zip(ours.logits, theirs.logits, strict=True):  # parts of a canvas are rounded otherwise
            assert torch.allclose(one, other, atol=1e-3)


class Heard:
    """A streamer that takes down what it hears."""

    def __init__(self) -> None:
        self.said: list[list[int]] = []
        self.drafts = 0

    def put(self, value: torch.Tensor) -> None:
        self.said.append(value.flatten().tolist())

    def put_draft(self, value: torch.Tensor) -> None:
        self.drafts += 1

    def end(self) -> None:
        self.said.append([])


def test_streamers_criteria_and_processors_hear_of_the_whole_text(ours: Ours, store: AttentionStore) -> None:
    widths: list[int] = []

    def watch(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        widths.append(input_ids.shape[1])
        return scores

    def end(input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        widths.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= 66])

    ours.cache = AttentionStoreCache(ours.model, "alice", store)
    ids = more(ours.generate(some_ids(30, 1)), 50)
    told = {"logits_processor": LogitsProcessorList([watch]), "stopping_criteria": StoppingCriteriaList([end])}
    heard = [Heard(), Heard()]
    plain = Kept()
    found = []
    for streamer, one in zip(heard, (ours, plain), strict=True):
        widths.clear()
        if one is plain:
            torch.manual_seed(ids.shape[1])
            said = plain.model.generate(
                ids, streamer=streamer, **told, **SETTINGS
            ).sequences  # fmt: skip
        else:
            said = one.generate(ids, streamer=streamer, **told)
        found.append((said.shape, [len(part) for part in streamer.said], streamer.drafts, list(widths)))
    assert ours.cache.reused_tokens == 46
    assert found[0] == found[1]
    assert found[0][0] == (1, 57 + 2 * CANVAS)
    assert heard[0].said[0] == ids[0].tolist()
    assert max(widths) == 57 + 2 * CANVAS


@pytest.mark.parametrize("longest", [60, 80])
def test_a_largest_length_is_one_of_the_whole_text(longest: int, ours: Ours, store: AttentionStore) -> None:
    ours.cache = AttentionStoreCache(ours.model, "alice", store)
    ids = more(ours.generate(some_ids(30, 1)), 50)
    twin = build_other("diffusion_gemma")
    for new in (256, 32):  # the first of which it takes for nobody having said so
        settings = {"max_length": longest, "max_new_tokens": new}
        theirs = twin.generate(ids, **{**SETTINGS, **settings})
        assert ours.generate(ids, **settings).shape == theirs.sequences.shape
        assert ours.cache.reused_tokens >= 46


def test_a_window_that_overflows_shows_the_model_what_is_left(ours: Ours, store: AttentionStore) -> None:
    ours.cache = AttentionStoreCache(ours.model, "alice", store, window=64, keep_first=4)
    ids = more(ours.generate(some_ids(30, 1)), 50)
    said = ours.generate(ids)
    stats = ours.cache.stats
    assert stats.dropped_tokens > 0
    assert torch.equal(said[:, : ids.shape[1]], ids)
    assert said.shape[1] == ids.shape[1] + 3 * CANVAS
    assert ours.cache.get_seq_length() + CANVAS <= 64
    if stats.truncation == "recomputed":
        shown = torch.cat([ids[:, :4], ids[:, 4 + stats.dropped_tokens :]], dim=1)
        theirs = Kept()
        torch.manual_seed(ids.shape[1])
        theirs.model.generate(shown, **SETTINGS)
        assert_same(ours, theirs)
    with pytest.raises(ContextWindowError, match="window"):
        ours.generate(ids, max_new_tokens=64)


def test_a_loop_of_ones_own_takes_the_encoder(ours: Ours, store: AttentionStore) -> None:
    encoder, ids = ours.model.model.encoder, some_ids(40, 1)
    with torch.no_grad():
        plain = encoder(ids).last_hidden_state
        for done in (0, 39):
            cache = AttentionStoreCache(ours.model, None, store)
            assert cache.model is encoder
            assert cache.match(ids) == done
            output = encoder(ids[:, done:], **{CACHE: cache}).last_hidden_state
            cache.save()
            assert torch.allclose(output, plain[:, done:], atol=1e-5)


def test_padded_batches_run_as_without_a_store(ours: Ours, store: AttentionStore, log: Any) -> None:
    ids = torch.cat([some_ids(20, 1), some_ids(20, 2)])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    torch.manual_seed(ids.shape[1])
    theirs = build_other("diffusion_gemma").generate(ids, attention_mask=mask, **SETTINGS).sequences
    attach(ours.model, store)
    assert torch.equal(ours.generate(ids, attention_mask=mask), theirs)
    assert "a batch of 2 prompts" in log.text
    ours.cache = AttentionStoreCache(ours.model, ["alice", "bob"], store)
    with pytest.raises(CacheUseError, match="one conversation at a time"):
        ours.generate(ids, attention_mask=mask)


def test_it_is_as_before_when_it_is_detached(ours: Ours, store: AttentionStore) -> None:
    model = ours.model
    before = set(vars(model)), set(vars(model.model.encoder))
    attach(model, store)
    ours.generate(some_ids(30, 1))
    twin = copy.deepcopy(model)
    detach(model)
    assert (set(vars(model)), set(vars(model.model.encoder))) == before
    again = Ours(twin)
    assert torch.equal(again.generate(some_ids(30, 1)), Kept().generate(some_ids(30, 1)))
    assert store.stats()["reused_tokens"] == 29  # a copy of an attached model is attached, too
    detach(twin)
    assert (set(vars(twin)), set(vars(twin.model.encoder))) == before


# pictures


def picture(seed: int) -> dict[str, torch.Tensor]:
    """A picture of 4 × 4 patches, which make 4 tokens."""
    pixels = torch.rand(1, 16, 48, generator=torch.Generator().manual_seed(seed))
    places = torch.tensor([[x, y] for y in range(4) for x in range(4)])[None]
    return {"pixel_values": pixels, "image_position_ids": places}


def no_places() -> LogitsProcessorList:
    """By which no place of a picture is made. A list for each call: `generate` adds its own to it."""
    return LogitsProcessorList([lambda ids, scores: scores.index_fill(-1, torch.tensor([PICTURE]), -torch.inf)])


def test_pictures_are_reused_and_told_apart(ours: Ours, store: AttentionStore) -> None:
    theirs = Kept()
    seen: list[int] = []
    tower = ours.model.model.encoder.vision_tower
    tower.patch_embedder.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    ids = torch.cat([some_ids(9, 1), torch.full((1, 4), PICTURE), some_ids(9, 2)], dim=1)
    first = picture(1)
    types = (ids == PICTURE).long()
    ours.cache = AttentionStoreCache(ours.model, "alice", store)
    said = ours.generate(ids, mm_token_type_ids=types, **first, logits_processor=no_places())
    assert torch.equal(said, theirs.generate(ids, mm_token_type_ids=types, **first, logits_processor=no_places()))
    assert_same(ours, theirs)
    ids = torch.cat([said, torch.full((1, 4), PICTURE), some_ids(5, 3)], dim=1)
    both = {name: torch.cat([value, picture(2)[name]]) for name, value in first.items()}
    ours.cache = AttentionStoreCache(ours.model, "alice", store)
    done = theirs.cache.get_seq_length()
    again = ours.generate(ids, mm_token_type_ids=(ids == PICTURE).long(), **both, logits_processor=no_places())
    rest = {"mm_token_type_ids": (ids == PICTURE).long()[:, done:], **picture(2)}
    assert torch.equal(again, theirs.generate(ids, **rest, logits_processor=no_places()))
    assert_same(ours, theirs)
    assert ours.cache.reused_tokens == done == 22 + 2 * CANVAS
    assert seen == [1, 1]
    ours.cache = AttentionStoreCache(ours.model, "alice", store)
    ours.generate(said, mm_token_type_ids=(said == PICTURE).long(), **picture(3), logits_processor=no_places())
    assert ours.cache.reused_tokens == 9
