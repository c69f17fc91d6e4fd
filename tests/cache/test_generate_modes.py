"""Every way to generate gives on a turn with reuse what it gives without a cache of ours."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, make_model, tokens
from support.turns import CHUNKS_CONTINUE, assert_reused, follow_up, turn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria, set_seed
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import AttentionStore, AttentionStoreCache, attach
from hf_attnstore.cache.model.argument import cache_in

FAMILIES = ("llama-gqa", "mistral", "gemma3")

MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 30},
    "repetition penalty": {"repetition_penalty": 1.8},
    "no repeated ngrams": {"no_repeat_ngram_size": 2},
    "min length": {"min_length": 70, "eos_token_id": list(range(60)), "pad_token_id": 0},
    "min new tokens": {"min_new_tokens": 5, "eos_token_id": list(range(60)), "pad_token_id": 0},
    "eos": {"eos_token_id": list(range(0, VOCABULARY, 4)), "pad_token_id": 0},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "max length": {"max_new_tokens": None, "max_length": 75},
    "guidance": {"guidance_scale": 1.5},
}
LOOKUP = {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2}


def conversation(model: Any, store: AttentionStore) -> torch.Tensor:
    """A first turn in session alice, and a prompt for the next that repeats itself, so that lookup finds something."""
    prompt = torch.cat([tokens(20), tokens(20)], dim=1)
    sequence = turn(model, prompt, AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    return torch.cat([sequence, sequence[:, 38:45], tokens(3, 8), sequence[:, 10:16]], dim=1)


def both(model: Any, store: AttentionStore, **settings: Any) -> tuple[Any, Any, AttentionStoreCache]:
    """A second turn with the store and the same without a cache; the cache, which must have reused the first turn."""
    prompt = conversation(model, store)
    cache = AttentionStoreCache(model, "alice", store)
    call = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    call |= {"attention_mask": torch.ones_like(prompt)} | settings
    other = make_model_like(model)
    set_seed(5)
    ours = model.generate(prompt, past_key_values=cache, **call)
    set_seed(5)
    theirs = other.generate(prompt, **call)
    assert_reused(cache, prompt, 45 if CHUNKS_CONTINUE or "prefill_chunk_size" not in settings else 0)
    assert (cache.stats.loaded_bytes > 0) == (cache.reused_tokens > 0)
    return ours, theirs, cache


def make_model_like(model: Any) -> Any:
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    return other


def assert_alike(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.sequences, theirs.sequences)
    assert len(ours.scores) == len(theirs.scores)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert torch.equal(a.isinf().sum(dim=-1), b.isinf().sum(dim=-1))
        torch.testing.assert_close(_without_cut(a), _without_cut(b), rtol=1e-3, atol=1e-3)


def _without_cut(scores: torch.Tensor) -> torch.Tensor:
    """Scores with what was cut off as low as the least of the others: rounding decides which of two as good as equal
    tokens is the last one that counts."""
    least = scores.masked_fill(scores.isinf(), torch.inf).amin(dim=-1, keepdim=True)
    return torch.maximum(scores, least)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_gives_what_it_gives_without_a_cache(family: str, mode: str, store: AttentionStore) -> None:
    ours, theirs, cache = both(make_model(family), store, **MODES[mode])
    assert_alike(ours, theirs)
    saved = len(store.tokens("alice"))
    if MODES[mode].get("num_beams", 1) > 1 or MODES[mode].get("num_return_sequences", 1) > 1:
        assert 61 <= saved <= 61 + cache.stats.generated_tokens  # the prompt, and what all rows have in common
        assert store.tokens("alice") == ours.sequences[0, :saved].tolist()
        assert (ours.sequences[:, :saved] == ours.sequences[0, :saved]).all()
    else:
        assert store.tokens("alice") == ours.sequences[0, :-1].tolist()


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampling"])
@pytest.mark.parametrize(
    ("how", "family"),
    [
        *((how, family) for how in ("prompt lookup", "assistant") for family in (*FAMILIES, "gpt2", "deepseek-v3")),
        *(("early exit", family) for family in ("llama-gqa", "mistral")),
    ],
)
def test_assisted_decoding_gives_what_it_gives_without_a_cache(
    family: str, how: str, sample: bool, store: AttentionStore
) -> None:
    settings: dict[str, Any] = {"do_sample": sample}
    if how == "prompt lookup":
        settings |= LOOKUP
    elif how == "assistant":
        settings["assistant_model"] = make_model(family)
    else:
        settings["assistant_early_exit"] = 1
    model = make_model(family)
    ours, theirs, _ = both(model, store, **settings)
    assert_alike(ours, theirs)
    assert store.tokens("alice") == ours.sequences[0, :-1].tolist()
    prompt = follow_up(ours.sequences, 5, 9)  # what was saved is what a model without assistant computes
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(model, prompt, None).sequences)
    assert_reused(cache, prompt, ours.sequences.shape[1] - 1)


def test_assisted_decoding_really_accepts_candidates(store: AttentionStore) -> None:
    model = make_model()
    forwards = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    *_, cache = both(model, store, assistant_model=make_model())
    assert cache.stats.generated_tokens > 8
    assert len(forwards) - 6 < 11  # without an assistant: 12 forwards, after the 6 of the first turn


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_assisted_decoding_leaves_sliding_layers_bounded_on_later_turns(family: str, store: AttentionStore) -> None:
    model = make_model(family)
    cache = AttentionStoreCache(model, "alice", store)
    prompt = torch.cat([tokens(20), tokens(20)], dim=1)
    sequence = turn(model, prompt, cache, **LOOKUP).sequences
    sequence = turn(model, follow_up(sequence, 5, 2), cache, max_new_tokens=120).sequences
    assert cache.layers[0].keys.shape[-2] == 23  # the window, less the token that comes
    assert cache.layers[0].get_seq_length() == sequence.shape[1] - 1


class Pieces(BaseStreamer):
    """What a streamer is given, like transformers' iterators: pieces in a queue, then an end."""

    def __init__(self, fail_at: int | None = None, error: type[BaseException] = RuntimeError) -> None:
        self.pieces: queue.Queue[list[int] | None] = queue.Queue()
        self.fail_at, self.error = fail_at, error
        self.count = 0

    def put(self, value: torch.Tensor) -> None:
        if self.count == self.fail_at:
            raise self.error("the listener went away")
        self.count += 1
        self.pieces.put(value.flatten().tolist())

    def end(self) -> None:
        self.pieces.put(None)

    def __iter__(self) -> Iterator[list[int] | None]:
        while not self.pieces.empty():
            yield self.pieces.get()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True}, LOOKUP, {"prefill_chunk_size": 3}], ids=str)
def test_a_streamer_gets_the_same_pieces(settings: dict[str, Any], store: AttentionStore) -> None:
    model = make_model()
    prompt = conversation(model, store)
    heard = []
    for cache in (AttentionStoreCache(model, "alice", store), None):
        set_seed(3)
        streamer = Pieces()
        turn(model, prompt, cache, streamer=streamer, **settings)
        heard.append(list(streamer))
        if cache is not None:
            assert_reused(cache, prompt, 45 if CHUNKS_CONTINUE or "prefill_chunk_size" not in settings else 0)
    assert heard[0] == heard[1]
    assert heard[0][0] == prompt[0].tolist()
    assert heard[0][-1] is None


class StopsAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class SeesEverything(LogitsProcessor):
    """Chooses by the whole of the ids: wrong if they do not begin with the conversation."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, int(input_ids.sum()) % VOCABULARY] += 1e4
        return scores


@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_criteria_and_processors_see_the_whole_conversation(family: str, store: AttentionStore) -> None:
    ours, theirs, _ = both(
        make_model(family), store, stopping_criteria=[StopsAt(66)], logits_processor=[SeesEverything()]
    )
    assert_alike(ours, theirs)
    assert ours.sequences.shape[1] == 66
    assert len(store.tokens("alice")) == 65


def test_settings_in_a_generation_config_work_alike(store: AttentionStore) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=False, repetition_penalty=1.5, num_beams=2)
    ours, theirs, _ = both(make_model(), store, generation_config=config, max_new_tokens=9)
    assert_alike(ours, theirs)


@pytest.mark.parametrize("first", ["beams", "several sequences", "greedy", "lookup"])
@pytest.mark.parametrize("second", ["greedy", "beams", "several sequences", "lookup"])
def test_modes_follow_each_other_on_one_cache_object(first: str, second: str, store: AttentionStore) -> None:
    modes = MODES | {"lookup": LOOKUP}
    model, other = make_model("gemma3"), make_model("gemma3")
    cache = AttentionStoreCache(model, "alice", store)
    prompt = tokens(40)
    outputs = []
    for number, mode in enumerate((first, second, "greedy")):
        settings = {"do_sample": False, "max_new_tokens": 10} | modes[mode]
        set_seed(number)
        ours = model.generate(prompt, past_key_values=cache, **settings)
        set_seed(number)
        theirs = other.generate(prompt, **settings)
        assert torch.equal(ours, theirs)
        assert cache.reused_tokens >= (prompt.shape[1] - 16 if number else 0)
        outputs.append(ours)
        prompt = follow_up(ours[:1], 6, number + 2)
    assert store.tokens("alice") == outputs[-1][0, :-1].tolist()


def test_beams_save_the_prompt_and_not_what_they_generated(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    model.generate(tokens(40), past_key_values=cache, num_beams=4, max_new_tokens=30, do_sample=False)
    assert store.tokens("alice") == tokens(40)[0].tolist()
    assert sum(path.is_file() for path in store.path.glob("blocks/*/*/*")) == 3
    assert cache.layers[0].keys.shape[0] == 4


@pytest.mark.parametrize("beams", [1, 3])
def test_use_cache_false_runs_without_the_cache(
    beams: int, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    wanted = {"use_cache": False, "num_beams": beams, "max_new_tokens": 6, "do_sample": False}
    ours = model.generate(tokens(30), past_key_values=AttentionStoreCache(model, "alice", store), **wanted)
    assert torch.equal(ours, make_model().generate(tokens(30), **wanted))
    assert "use_cache" in log.text
    assert store.sessions() == []


def test_a_custom_decoding_loop_works(store: AttentionStore) -> None:
    def loop(model: Any, input_ids: torch.Tensor, generation_config: Any, **kwargs: Any) -> torch.Tensor:
        cache = cache_in(kwargs)
        for _ in range(6):
            new = input_ids[:, cache.get_seq_length() :]
            logits = model(input_ids=new, past_key_values=cache).logits
            input_ids = torch.cat([input_ids, logits[:, -1:].argmax(-1)], dim=1)
        return input_ids

    model = make_model()
    prompt = conversation(model, store)
    cache = AttentionStoreCache(model, "alice", store)
    ours = model.generate(prompt, past_key_values=cache, custom_generate=loop)
    assert torch.equal(ours, turn(model, prompt, None).sequences)
    assert_reused(cache, prompt, 45)


@pytest.mark.parametrize("mode", ["greedy", "beams", "sampling", "several sequences"])
def test_plain_generate_on_an_attached_model_reuses_across_calls(mode: str, store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    attach(model, store)
    sequence = model.generate(tokens(40), max_new_tokens=6, do_sample=False)
    prompt = follow_up(sequence, 5, 2)
    settings = {"do_sample": False, "max_new_tokens": 6} | MODES[mode]
    set_seed(1)
    ours = model.generate(prompt, return_dict_in_generate=True, **settings)
    set_seed(1)
    assert torch.equal(ours.sequences, other.generate(prompt, **settings))
    assert_reused(ours.past_key_values, prompt, 45)


def first_turn(model: Any, store: AttentionStore, **settings: Any) -> tuple[AttentionStoreCache, BaseException]:
    cache = AttentionStoreCache(model, "alice", store)
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        turn(model, tokens(40), cache, max_new_tokens=20, **settings)
    return cache, caught.value


class Interrupts(LogitsProcessor):
    def __init__(self, after: int, error: type[BaseException]) -> None:
        self.left, self.error = after, error

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.left == 0:
            raise self.error("stop")
        self.left -= 1
        return scores


INTERRUPTIONS: dict[str, tuple[Callable[[], dict[str, Any]], int, type[BaseException]]] = {
    # settings of the call, tokens whose KV is complete when it ends, what it ends with
    "streamer at the prompt": (lambda: {"streamer": Pieces(0)}, 0, RuntimeError),
    "streamer at token 1": (lambda: {"streamer": Pieces(1)}, 40, RuntimeError),
    "streamer at token 9": (lambda: {"streamer": Pieces(9, KeyboardInterrupt)}, 48, KeyboardInterrupt),
    "processor": (lambda: {"logits_processor": [Interrupts(5, KeyboardInterrupt)]}, 45, KeyboardInterrupt),
    "lookup": (lambda: {"streamer": Pieces(3), **LOOKUP}, -1, RuntimeError),
    "invalid setting": (lambda: {"num_beams": 2, "streamer": Pieces()}, 0, ValueError),
}


@pytest.mark.parametrize("keep", [True, False], ids=["same object", "new object"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_an_interrupted_generate_keeps_every_complete_token(
    how: str, family: str, keep: bool, store: AttentionStore
) -> None:
    model, other = make_model(family), make_model(family)
    expected = turn(other, tokens(40), None, max_new_tokens=20).sequences[0].tolist()
    make, complete, error = INTERRUPTIONS[how]
    cache, caught = first_turn(model, store, **make())
    assert type(caught) is error
    names = [info.name for info in store.sessions()]
    assert names == (["alice"] if complete else [])
    if complete:
        known = store.tokens("alice")
        assert known == expected[: len(known)]
        assert len(known) == complete if complete > 0 else len(known) > 40
        complete = len(known)
    if not keep:
        store.drop_memory()
        cache = AttentionStoreCache(model, "alice", store)
    prompt = torch.tensor([expected])
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, complete)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_an_exception_inside_a_forward_leaves_the_tokens_before_it(
    family: str, layer: int, store: AttentionStore
) -> None:
    model, other = make_model(family), make_model(family)
    calls = []

    def breaks(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 7:
            raise MemoryError("no memory")

    handle = model.model.layers[layer].register_forward_hook(breaks)
    cache, caught = first_turn(model, store)
    assert type(caught) is MemoryError
    handle.remove()
    assert len(store.tokens("alice")) == 45
    prompt = turn(other, tokens(40), None, max_new_tokens=20).sequences
    assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
    assert_reused(cache, prompt, 45)


def test_a_turn_that_computed_nothing_leaves_the_session_as_it_was(store: AttentionStore) -> None:
    model = make_model()
    sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    cache = AttentionStoreCache(model, "alice", store)
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(tokens(30, seed=9), past_key_values=cache, nonsense=3)
    assert store.tokens("alice") == sequence[0, :-1].tolist()
