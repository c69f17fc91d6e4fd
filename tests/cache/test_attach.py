"""Loops of one's own, pipelines, offloaded models; attaching and taking everything off again."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import make_model, tokens
from support.turns import GREEDY, assert_reused, assert_same, follow_up, layer_hooks, turn
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.generation import GenerationMixin

from hf_attnstore import (
    AttentionStore,
    AttentionStoreCache,
    CacheUseError,
    SessionNotFoundError,
    UnsupportedModelError,
    attach,
    detach,
)
from hf_attnstore.cache.generate.dispatch import install

accelerate = pytest.importorskip("accelerate")


# loops of one's own


def greedy_loop(model: Any, ids: torch.Tensor, cache: Any, start: int, count: int) -> torch.Tensor:
    with torch.no_grad():
        new = ids[:, start:]
        for _ in range(count):
            new = model(input_ids=new, past_key_values=cache).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], dim=1)
    return ids


@pytest.mark.parametrize("end", ["save", "flush", "close", "next match"])
@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
def test_a_loop_of_ones_own_is_kept_and_continued(family: str, end: str, store: AttentionStore, tmp_path: Any) -> None:
    model = make_model(family)
    cache = AttentionStoreCache(model, "alice", store)
    assert cache.match(tokens(40)) == 0
    ids = greedy_loop(model, tokens(40), cache, 0, 6)
    assert torch.equal(ids, turn(make_model(family), tokens(40), None).sequences)
    if end == "save":
        cache.save()
    elif end == "flush":
        store.flush()
    elif end == "close":
        store.close()
        store = AttentionStore(store.path, block_size=16)
    else:
        assert cache.match(ids) == 45
    cache = cache if end == "next match" else AttentionStoreCache(model, "alice", store)
    prompt = follow_up(ids, 5, 2)
    start = cache.match(prompt)
    assert start == 45
    ours = greedy_loop(model, prompt, cache, start, 6)
    assert torch.equal(ours, turn(make_model(family), prompt, None).sequences)
    assert cache.prefilled_tokens + cache.stats.generated_tokens == 11
    cache.save()
    assert store.tokens("alice") == ours[0, :-1].tolist()
    store.close()


def test_resume_brings_back_all_that_the_store_has(store: AttentionStore) -> None:
    model = make_model("gemma3")
    sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    cache = AttentionStoreCache(model, "alice", store)
    held = cache.resume()
    assert torch.equal(held, sequence[:, :-1])
    assert cache.get_seq_length() == 45
    assert cache.stats.loaded_bytes > 0
    ours = greedy_loop(model, sequence, cache, 45, 5)
    plain = DynamicCache(config=model.config)
    assert torch.equal(ours, greedy_loop(model, sequence, plain, 0, 5))
    cache.save()
    assert store.tokens("alice") == ours[0, :-1].tolist()


def test_resume_of_what_there_is_not_is_a_clear_error(store: AttentionStore) -> None:
    model = make_model()
    with pytest.raises(SessionNotFoundError, match="alice"):
        AttentionStoreCache(model, "alice", store).resume()
    with pytest.raises(CacheUseError):
        AttentionStoreCache(model, store=store).resume()
    with pytest.raises(CacheUseError, match=r"\[1, tokens\]"):
        AttentionStoreCache(model, "alice", store).match(torch.ones(2, 5, dtype=torch.long))


def test_match_and_save_without_a_forward_leave_the_session_as_it_was(store: AttentionStore) -> None:
    model = make_model()
    sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    cache = AttentionStoreCache(model, "alice", store)
    assert cache.match(tokens(20)) == 19
    cache.save()
    assert store.tokens("alice") == sequence[0, :-1].tolist()


def test_a_crop_in_a_loop_of_ones_own_shortens_the_session(store: AttentionStore) -> None:
    model = make_model()
    sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    cache = AttentionStoreCache(model, "alice", store)
    cache.resume()
    cache.crop(-15)
    cache.save()
    assert store.tokens("alice") == sequence[0, :30].tolist()


def test_saving_after_every_token_leaves_one_file_for_each_block(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    with torch.no_grad():
        for position in range(40):
            model(input_ids=tokens(40)[:, position : position + 1], past_key_values=cache)
            cache.save()
    store.flush()
    assert store.tokens("alice") == tokens(40)[0].tolist()
    assert len(list(store.path.glob("blocks/*/*/*"))) == 3


def test_generate_goes_on_after_a_loop_of_ones_own_on_the_same_object(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    ids = greedy_loop(model, tokens(40), cache, 0, 6)
    prompt = follow_up(ids, 5, 2)
    ours = turn(model, prompt, cache)
    assert torch.equal(ours.sequences, turn(make_model(), prompt, None).sequences)
    assert_reused(cache, prompt, 45)
    with torch.no_grad():
        logits = model(input_ids=ours.sequences[:, -1:], past_key_values=cache).logits[:, -1]
        expected = make_model()(input_ids=ours.sequences).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    store.flush()
    assert store.tokens("alice") == ours.sequences[0].tolist()


def test_positional_arguments_of_a_forward_are_understood(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    with torch.no_grad():
        model(tokens(20), None, None, cache)
        model(tokens(5, 2), torch.ones(1, 25), torch.arange(20, 25)[None], cache)
    assert cache.token_ids == [*tokens(20)[0].tolist(), *tokens(5, 2)[0].tolist()]
    assert cache.stats.recomputed == ""


# pipelines


def words() -> PreTrainedTokenizerFast:
    vocabulary = {f"w{number}": number for number in range(101)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w0")


@pytest.mark.parametrize("passed", [True, False], ids=["cache passed", "attached"])
def test_a_text_generation_pipeline_reuses(passed: bool, store: AttentionStore) -> None:
    model, other = make_model(), make_model()
    ours, theirs = (pipeline("text-generation", model=m, tokenizer=words()) for m in (model, other))
    text = " ".join(f"w{token}" for token in tokens(30)[0].tolist())
    if not passed:
        attach(model, store)
    for number, known in enumerate((0, 35)):
        extra: dict[str, Any] = {"past_key_values": AttentionStoreCache(model, "alice", store)} if passed else {}
        call: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
        said = ours(text, **call, **extra)[0]["generated_text"]
        assert said == theirs(text, **call)[0]["generated_text"]
        if passed:
            assert extra["past_key_values"].reused_tokens == known
        else:
            assert store.stats()["reused_tokens"] == known
        text = " ".join([text, said, *(f"w{token}" for token in tokens(4, number + 2)[0].tolist())])


# attaching and detaching


def full_state(model: Any) -> tuple[Any, ...]:
    return layer_hooks(model), {name: id(value) for name, value in vars(model).items()}, list(vars(model))


def test_detach_leaves_the_model_exactly_as_it_was(store: AttentionStore) -> None:
    model = make_model("gemma3")
    turn(model, tokens(5), None)
    before = full_state(model)
    attach(model, store)
    assert full_state(model) != before
    AttentionStoreCache(model, "alice", store)
    turn(model, tokens(20), None)
    detach(model)
    assert full_state(model) == before
    assert model.generate.__func__ is GenerationMixin.generate
    detach(model)
    assert full_state(model) == before
    assert torch.equal(turn(model, tokens(20), None).sequences, turn(make_model("gemma3"), tokens(20), None).sequences)


def test_detach_leaves_foreign_hooks_and_a_foreign_generate_in_place(store: AttentionStore) -> None:
    model = make_model()
    calls: list[str] = []

    def generate(*arguments: Any, **keywords: Any) -> Any:
        calls.append("generate")
        return GenerationMixin.generate(model, *arguments, **keywords)

    model.generate = generate
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.model.layers[0].register_forward_hook(lambda *_: calls.append("layer"), always_call=True)
    before = full_state(model)
    attach(model, store)
    later = model.model.layers[1].register_forward_pre_hook(
        lambda *_, **__: calls.append("later") or None, with_kwargs=True
    )
    ours = turn(model, tokens(20), AttentionStoreCache(model, "alice", store)).sequences
    assert torch.equal(ours, turn(make_model(), tokens(20), None).sequences)
    assert {*calls} == {"generate", "before", "layer", "later"}
    detach(model)
    assert len(model.model.layers[1]._forward_pre_hooks) == 1
    later.remove()
    assert full_state(model) == before


def test_attaching_twice_and_with_another_store_keeps_one_set_of_hooks(store: AttentionStore, tmp_path: Any) -> None:
    model = make_model()
    before = full_state(model)
    attach(model, store)
    once = layer_hooks(model)
    with AttentionStore(tmp_path / "other", block_size=16) as other:
        attach(model, other)
        assert layer_hooks(model) == once
        model.generate(tokens(20), **GREEDY)
        assert other.stats()["turns"] == 1
        assert store.stats()["turns"] == 0
    detach(model)
    assert full_state(model) == before


def test_a_cache_whose_model_was_detached_says_so(store: AttentionStore) -> None:
    model = make_model()
    cache = AttentionStoreCache(model, "alice", store)
    detach(model)
    with pytest.raises(CacheUseError, match="attached"):
        turn(model, tokens(20), cache)
    cache = AttentionStoreCache(model, "alice", store)
    assert turn(model, tokens(20), cache).sequences.shape[1] == 26


def test_a_deep_copy_of_an_attached_model_works_and_is_independent(store: AttentionStore) -> None:
    model = make_model()
    attach(model, store)
    sequence = model.generate(tokens(30), **GREEDY)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    prompt = follow_up(sequence, 4, 2)
    changed = copy.deepcopy(twin)
    detach(changed)
    ours = twin.generate(prompt, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(ours.sequences, changed.generate(prompt, **GREEDY))
    assert_reused(ours.past_key_values, prompt, 0)
    detach(twin)
    assert not twin._forward_pre_hooks
    assert "generate" not in vars(twin)
    ours = model.generate(prompt, return_dict_in_generate=True, **GREEDY)
    assert_reused(ours.past_key_values, prompt, 35)
    cache = AttentionStoreCache(model, "alice", store)
    assert torch.equal(turn(model, prompt, cache).sequences, turn(make_model(), prompt, None).sequences)


def test_the_state_of_an_attached_model_can_be_saved(store: AttentionStore, tmp_path: Any) -> None:
    model = make_model()
    attach(model, store)
    model.generate(tokens(20), **GREEDY)
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    cache = AttentionStoreCache(again, store=store)
    turn(again, tokens(24), cache)
    assert cache.reused_tokens == 20
    assert pickle.loads(pickle.dumps(model.state_dict())).keys() == model.state_dict().keys()


def test_models_that_can_not_be_kept_are_refused_by_name_and_left_alone(store: AttentionStore) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    empty = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=0, intermediate_size=32))
    before = full_state(empty)
    with pytest.raises(UnsupportedModelError, match="does not say which layers it has"):
        attach(empty, store)
    with pytest.raises(UnsupportedModelError):
        AttentionStoreCache(empty, "alice", store)
    assert full_state(empty) == before


# offloading


@pytest.mark.parametrize("family", ["llama-gqa", "gemma3"])
@pytest.mark.parametrize("where", ["cpu", "disk", "dispatch"])
def test_an_offloaded_model_reuses_and_is_right(
    where: str, family: str, store: AttentionStore, tmp_path: Any, log: pytest.LogCaptureFixture
) -> None:
    model = make_model(family)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif where == "disk":
        accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device="cpu")
    else:
        names = {f"model.layers.{number}": "cpu" for number in range(model.config.num_hidden_layers)}
        device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map |= names | {"model.layers.1": "disk"}
        accelerate.dispatch_model(
            model, device_map=device_map, main_device="cpu", offload_dir=str(tmp_path / "w"), force_hooks=True
        )
    plain = make_model(family)
    sequence = tokens(0)
    computed = []
    cache = AttentionStoreCache(model, "alice", store)
    compute = cache._setup.attachment.fingerprint._compute
    cache._setup.attachment.fingerprint._compute = lambda: (computed.append(1), compute())[1]  # type: ignore[method-assign]
    for number, count in enumerate((40, 5, 9)):
        prompt = follow_up(sequence, count, number)
        cache = AttentionStoreCache(model, "alice", store)
        ours = turn(model, prompt, cache)
        assert_reused(cache, prompt, max(sequence.shape[1] - 1, 0))
        assert torch.equal(ours.sequences, turn(plain, prompt, None).sequences)
        sequence = ours.sequences
    assert len(computed) == 1
    assert not [record for record in log.records if record.name == "hf_attnstore"]
    cache = AttentionStoreCache(plain, "alice", store)  # the same weights, wherever they lie
    turn(plain, sequence, cache)
    assert cache.reused_tokens == sequence.shape[1] - 1


def test_weights_of_an_offloaded_model_that_change_are_noticed(store: AttentionStore) -> None:
    model = make_model()
    weights = {name: parameter.detach().clone() for name, parameter in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device="cpu", state_dict=weights)
    sequence = turn(model, tokens(40), AttentionStoreCache(model, "alice", store)).sequences
    with torch.no_grad():
        weights["model.layers.0.self_attn.k_proj.weight"].mul_(-1)
    cache = AttentionStoreCache(model, "alice", store)
    prompt = follow_up(sequence, 3, 2)
    turn(model, prompt, cache)
    assert_reused(cache, prompt, 0)


# where there is a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["memory", "disk", "same object"])
@pytest.mark.parametrize("family", ["llama-gqa", "mistral", "gemma3", "deepseek-v3"])
def test_turns_on_a_gpu_have_the_logits_of_a_kept_dynamic_cache(family: str, tier: str, store: AttentionStore) -> None:
    model, other = (make_model(family, torch.bfloat16).to("cuda") for _ in range(2))
    plain = DynamicCache(config=other.config)
    sequence = tokens(0).to("cuda")
    cache = AttentionStoreCache(model, "alice", store)
    for number, count in enumerate((100, 9, 40)):
        prompt = follow_up(sequence, count, number)
        if tier == "disk":
            store.drop_memory()
        if tier != "same object":
            cache = AttentionStoreCache(model, "alice", store)
        ours, theirs = turn(model, prompt, cache), turn(other, prompt, plain)
        assert_same(ours, theirs)
        assert_reused(cache, prompt, max(sequence.shape[1] - 1, 0))
        assert bool(cache.stats.loaded_bytes) == (tier != "same object" and number > 0)
        assert cache.layers[0].device.type == "cuda"
        sequence = ours.sequences


@pytest.mark.gpu
def test_what_leaves_a_gpu_while_it_decodes_and_crops_is_what_was_computed(store: AttentionStore) -> None:
    from test_threads import assert_files_equal

    model = make_model(dtype=torch.bfloat16).to("cuda")
    cache, plain = AttentionStoreCache(model, "alice", store), DynamicCache(config=model.config)
    with torch.no_grad():
        for step in range(80):
            new = tokens((1, 17, 5, 33)[step % 4], step).to("cuda")
            for past in (cache, plain):
                model(input_ids=new, past_key_values=past)
                if step % 5 == 4:
                    past.crop(-20)
    store.flush()
    for layer in plain.layers:
        layer.keys, layer.values = layer.keys.cpu(), layer.values.cpu()
    assert_files_equal(store, "alice", plain)


@pytest.mark.gpu
def test_a_session_moves_between_gpu_and_cpu_offload(store: AttentionStore) -> None:
    model = make_model(dtype=torch.bfloat16).to("cuda")
    sequence = turn(model, tokens(60).to("cuda"), AttentionStoreCache(model, "alice", store)).sequences
    store.drop_memory()
    offloaded = accelerate.cpu_offload(make_model(dtype=torch.bfloat16), execution_device=0)
    cache = AttentionStoreCache(offloaded, "alice", store)
    prompt = follow_up(sequence, 4, 2)
    assert torch.equal(turn(offloaded, prompt, cache).sequences, turn(model, prompt, None).sequences)
    assert cache.reused_tokens in (0, 65)  # the fingerprint may tell devices apart; never wrong tokens
    assert {str(layer.device) for layer in cache.layers} == {"cuda:0"}


# the one-liner


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_a_cache_made_in_the_call_itself_reuses_and_saves_from_the_first_call_on(family: str, tmp_path: Path) -> None:
    """`model.generate` is looked up before the cache is made, and with it the model attached."""
    ids = tokens(40)
    forwards: list[int] = []
    for number in range(2):
        model = make_model(family)  # as in a new process: nothing is attached
        model.register_forward_pre_hook(
            lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        plain = make_model(family).generate(ids, max_new_tokens=4, do_sample=False)
        with AttentionStore(tmp_path / "store", block_size=16) as store:
            ours = model.generate(
                ids, max_new_tokens=4, do_sample=False, past_key_values=AttentionStoreCache(model, "alice", store)
            )
            assert [(info.name, info.tokens) for info in store.sessions()] == [("alice", 43)]
        assert torch.equal(ours, plain)
        assert forwards[0] == (1 if number else 40)
        forwards.clear()


def test_calls_without_our_cache_go_straight_through_transformers_generate() -> None:
    model = make_model()
    before = full_state(model)
    ids = tokens(20)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache), first)
    assert full_state(model) == before
    assert inspect.signature(GenerationMixin.generate) == inspect.signature(inspect.unwrap(GenerationMixin.generate))


def wrapped(function: Any, calls: list[str], *, says_so: bool, in_a_thread: bool = False) -> Any:
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(self).__name__)
        if not in_a_thread:
            return function(self, *args, **kwargs)
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(function, self, *args, **kwargs).result()

    return functools.wraps(function)(generate) if says_so else generate


@pytest.mark.parametrize("says_so", [True, False], ids=["functools.wraps", "plain"])
@pytest.mark.parametrize("when", ["after", "before", "after, in a thread", "put back"])
def test_generate_that_others_wrap_reuses_and_saves_and_runs_their_wrapper_once(
    when: str, says_so: bool, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = inspect.unwrap(GenerationMixin.generate, stop=lambda function: not hasattr(function, "_attnstore_dispatched"))
    calls: list[str] = []
    made = functools.partial(wrapped, calls=calls, says_so=says_so, in_a_thread="thread" in when)
    if when.startswith("after"):
        monkeypatch.setattr(GenerationMixin, "generate", made(GenerationMixin.generate))
    else:
        monkeypatch.setattr(GenerationMixin, "generate", made(raw))
        if when == "before":
            install()
    ids = tokens(40)
    plain = make_model().generate(ids, **GREEDY)
    for number in range(3):
        model = make_model()
        if when == "put back" and number == 0:
            AttentionStoreCache(make_model(), "alice", store)  # with a cache made, calls are passed on again
        calls.clear()
        ours = model.generate(ids, **GREEDY, past_key_values=(cache := AttentionStoreCache(model, "alice", store)))
        assert torch.equal(ours, plain)
        assert cache.reused_tokens == (39 if number else 0)
        assert calls == ["LlamaForCausalLM"]
        attached = model.generate(ids, **GREEDY, past_key_values=(cache := AttentionStoreCache(model, "alice", store)))
        assert torch.equal(attached, plain)
        assert cache.reused_tokens == 39
        assert calls == ["LlamaForCausalLM"] * 2
        store.drop_memory()


def test_a_class_with_a_generate_of_its_own_goes_through_the_store_once(store: AttentionStore) -> None:
    calls: list[int] = []

    class Own(LlamaForCausalLM):
        def generate(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            calls.append(inputs.shape[1])
            return super().generate(inputs, **kwargs)

    ids = tokens(40)
    plain = make_model().generate(ids, **GREEDY)
    for number in range(2):
        model = Own(make_model().config).eval()
        model.load_state_dict(make_model().state_dict())
        ours = model.generate(ids, **GREEDY, past_key_values=(cache := AttentionStoreCache(model, "alice", store)))
        assert torch.equal(ours, plain)
        assert cache.reused_tokens == (39 if number else 0)
    assert calls == [40, 40]
