"""Encoder-decoder models: what is reused is what the same forwards give with caches kept in memory, bit for bit."""

from __future__ import annotations

import copy
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import fresh
from transformers import DynamicCache, EncoderDecoderCache, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutput

from hf_attnstore import (
    AttentionStore,
    AttentionStoreCache,
    CacheUseError,
    ChatSession,
    UnsupportedModelError,
    attach,
    describe,
    detach,
)
from hf_attnstore.cache.model.structure import decoder_config
from hf_attnstore.lab.families.encoder_decoders import (
    FAMILIES,
    MAIN_FAMILIES,
    START,
    encoder_input,
    make_seq2seq,
    prompt,
)

BLOCK = 16
NEW = 12
NOT_FROM_CACHE = ("fsmt", "prophetnet")
"""Decoders that don't go on from a DynamicCache either."""
READS_OUTPUT = ("moonshine",)
"""Models whose decoder needs more of the encoder than keys and values: a mask that comes with its output."""
QUICK = tuple(family for family in FAMILIES if family not in NOT_FROM_CACHE)


class Runs:
    """How often the encoder of a model ran."""

    def __init__(self, model: Any) -> None:
        self._ran = ran = list[int]()
        model.get_encoder().register_forward_hook(lambda *_: ran.append(1))

    def take(self) -> int:
        count = len(self._ran)
        self._ran.clear()
        return count


class Reference:
    """A decoder by hand, with caches kept in memory, on a model that no store touches: the encoder ran once."""

    def __init__(self, model: Any, inputs: dict[str, torch.Tensor]) -> None:
        self.model = model
        with torch.no_grad():
            self.output = model.get_encoder()(**inputs, return_dict=True)
        self.others = {name: value for name, value in inputs.items() if name == "attention_mask"}
        self._start()
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}

    def _start(self) -> None:
        config = decoder_config(self.model).get_text_config(decoder=True)
        self.cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache())
        self.past: dict[int, EncoderDecoderCache] = {}
        """Copies of the cache by the number of tokens it held, so that it can go back."""

    def turn(self, ids: torch.Tensor, known: int, new: int = NEW) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Greedy tokens after `ids`, of which the cache shall hold the first `known`; and the logits of each step."""
        held = min((length for length in self.past if length >= known), default=0)
        if held:
            self.cache = copy.deepcopy(self.past[held])
            self.cache.crop(known - held)
        assert self.cache.get_seq_length() == known
        self.past = {length: cache for length, cache in self.past.items() if length < known or length == held}
        logits = []
        for _ in range(new):
            self.cache.activate_past_recording()
            with torch.no_grad():
                out = self.model(
                    encoder_outputs=self.output,
                    decoder_input_ids=ids[:, self.cache.get_seq_length() :],
                    past_key_values=self.cache,
                    use_cache=True,
                    **self.others,
                    **self.keep,
                )
            self.past[self.cache.get_seq_length()] = copy.deepcopy(self.cache)
            self.cache.crop(0)
            logits.append(out.logits[:, -1].float())
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], dim=1)
        return ids, logits

    def goes_on(self) -> bool:
        """Whether tokens one after the other give what they give at once. One model does not in older transformers."""
        logits = []
        for lengths in ((5,), (1, 5)):
            self._start()
            for length in lengths:
                step = self.turn(prompt(5)[:, :length], self.cache.get_seq_length(), new=1)[1]
            logits.append(step[0])
        self._start()
        return torch.allclose(*logits, rtol=1e-3, atol=1e-3)

    def bytes_of_encoder(self) -> int:
        """Bytes of the cross attention's keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.cross_attention_cache.layers)

    def bytes_per_token(self) -> int:
        return sum(
            (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
            for layer in self.cache.self_attention_cache.layers
            if layer.is_initialized
        )


def turn(model: Any, inputs: dict[str, torch.Tensor], ids: torch.Tensor | None, cache: Any, **settings: Any) -> Any:
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    if ids is not None:
        settings["decoder_input_ids"] = ids
    return model.generate(**inputs, past_key_values=cache, return_dict_in_generate=True, output_logits=True, **settings)


def assert_same(ours: Any, ids: torch.Tensor, logits: Any) -> None:
    assert torch.equal(ours.sequences, ids)
    assert len(ours.logits) == len(logits)
    for step, (a, b) in enumerate(zip(ours.logits, logits, strict=True)):
        assert torch.equal(a, b), f"the logits of step {step} differ by up to {(a - b).abs().max()}"


@pytest.mark.parametrize("family", QUICK)
def test_a_document_is_encoded_once_and_its_decoder_goes_on(family: str, tmp_path: Path) -> None:
    model, inputs = make_seq2seq(family), encoder_input(family, padding=5)
    runs, reference = Runs(model), Reference(make_seq2seq(family), inputs)
    first, again = prompt(5), prompt(7, seed=8)
    if not reference.goes_on():
        pytest.skip("its decoder does not go on from a DynamicCache either")
    with AttentionStore(tmp_path, block_size=BLOCK) as store:
        cache = AttentionStoreCache(model, "document", store)
        assert isinstance(cache, EncoderDecoderCache)
        ours = turn(model, inputs, first, cache)
        assert_same(ours, *reference.turn(first, 0))
        assert (runs.take(), cache.reused_tokens, cache.prefilled_tokens) == (1, 0, 5)
        assert cache.stats.encoder_reused == cache.stats.loaded_bytes == 0
        assert store.tokens("document") == ours.sequences[0, :-1].tolist()

    encoder_bytes = reference.bytes_of_encoder()
    positions = reference.cache.cross_attention_cache.layers[0].keys.shape[-2]
    with AttentionStore(tmp_path) as store:  # the same decoder's text goes on, after a restart
        longer = torch.cat([ours.sequences, prompt(3, seed=9)[:, 1:]], dim=1)
        cache = AttentionStoreCache(model, "document", store)
        ours = turn(model, inputs, longer, cache)
        known = 5 + NEW - 1
        assert_same(ours, *reference.turn(longer, known))
        assert (cache.reused_tokens, cache.prefilled_tokens) == (known, longer.shape[1] - known)
        assert runs.take() == (1 if family in READS_OUTPUT else 0)
        assert cache.stats.encoder_skipped == (family not in READS_OUTPUT)
        assert cache.stats.encoder_reused == positions
        low = known - known % BLOCK  # sliding layers, of T5Gemma, need their window and the block to be continued
        loaded = cache.stats.loaded_bytes - encoder_bytes
        assert (known - low) * reference.bytes_per_token() <= loaded <= known * reference.bytes_per_token()
        assert loaded == known * reference.bytes_per_token() or family == "t5gemma"

    with AttentionStore(tmp_path) as store:  # another text for the decoder: only what the encoder gave is known
        cache = AttentionStoreCache(model, "document", store)
        ours = turn(model, inputs, again, cache)
        assert_same(ours, *reference.turn(again, 1))
        assert (cache.reused_tokens, cache.prefilled_tokens) == (1, 6)  # both begin with the same token
        assert runs.take() == (1 if family in READS_OUTPUT else 0)
        assert cache.stats.encoder_reused == positions


@pytest.mark.parametrize("family", NOT_FROM_CACHE)
def test_a_decoder_that_does_not_go_on_from_a_cache_is_not_kept(
    family: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model, inputs = make_seq2seq(family), encoder_input(family)
    plain = turn(make_seq2seq(family), inputs, prompt(1), None)
    for _ in range(2):
        cache = AttentionStoreCache(model, "document", store)
        ours = turn(model, inputs, prompt(1), cache)
        assert_same(ours, plain.sequences, plain.logits)
        assert (cache.reused_tokens, cache.stats.loaded_bytes, cache.stats.saved_bytes) == (0, 0, 0)
    assert "does not go on from its cache" in log.text
    assert not store.sessions()


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_an_exact_repeat_runs_neither_the_encoder_nor_known_tokens(family: str, store: AttentionStore) -> None:
    model, inputs = make_seq2seq(family), encoder_input(family, padding=3)
    runs, reference = Runs(model), Reference(make_seq2seq(family), inputs)
    ids = prompt(20)
    expected = reference.turn(ids, 0)
    for known in (0, 19, 19):
        if known:
            expected = reference.turn(ids, 19)
        cache = AttentionStoreCache(model, "document", store)
        assert_same(turn(model, inputs, ids, cache), *expected)
        assert (cache.reused_tokens, cache.prefilled_tokens) == (known, 20 - known)
        assert runs.take() == (0 if known else 1)
        store.flush()
        store.drop_memory()


def test_a_plain_repeat_without_a_text_for_the_decoder_leaves_out_the_encoder(store: AttentionStore) -> None:
    model, inputs = make_seq2seq("bart"), encoder_input("bart")
    runs = Runs(model)
    plain = turn(make_seq2seq("bart"), inputs, None, None)
    for count in (1, 0):
        cache = AttentionStoreCache(model, "document", store)
        ours = turn(model, inputs, None, cache)
        assert torch.equal(ours.sequences, plain.sequences)
        assert runs.take() == count
        assert cache.prefilled_tokens == 1
        assert ours.sequences[0, 0] == START


@pytest.mark.parametrize("family", MAIN_FAMILIES)
def test_another_input_of_the_encoder_reuses_nothing(family: str, store: AttentionStore) -> None:
    model, ids = make_seq2seq(family), prompt(20)
    runs = Runs(model)
    turn(model, encoder_input(family, seed=1), ids, AttentionStoreCache(model, "document", store))
    other = encoder_input(family, seed=2)
    masked = encoder_input(family, seed=1)
    if "attention_mask" in masked:
        masked["attention_mask"][:, -4:] = 0
    else:
        masked["input_features"][..., -1, -1] += 1e-3
    for inputs in (other, masked):
        runs.take()
        reference = Reference(make_seq2seq(family), inputs)
        cache = AttentionStoreCache(model, "document", store)
        assert_same(turn(model, inputs, ids, cache), *reference.turn(ids, 0))
        assert (runs.take(), cache.reused_tokens, cache.prefilled_tokens) == (1, 0, 20)
        assert cache.stats.encoder_reused == cache.stats.loaded_bytes == 0


def run_turn(family: str, root: Path, known: torch.Tensor) -> dict[str, torch.Tensor]:
    model, inputs = make_seq2seq(family), encoder_input(family, padding=5)
    runs = Runs(model)
    with AttentionStore(root, block_size=BLOCK) as store:
        cache = AttentionStoreCache(model, "document", store)
        output = turn(model, inputs, known, cache)
    counts = [runs.take(), cache.reused_tokens, cache.prefilled_tokens, int(cache.stats.loaded_bytes > 0)]
    return {"ids": output.sequences, "logits": torch.stack(output.logits), "counts": torch.tensor(counts)}


def test_another_process_goes_on(tmp_path: Path) -> None:
    reference = Reference(make_seq2seq("t5"), encoder_input("t5", padding=5))
    found = run_turn("t5", tmp_path / "store", prompt(5))
    assert found["counts"].tolist() == [1, 0, 5, 0]
    expected, _ = reference.turn(prompt(5), 0)
    assert torch.equal(found["ids"], expected)
    ids = torch.cat([expected, prompt(3, seed=6)[:, 1:]], dim=1)
    save_file({"ids": ids}, tmp_path / "prompt.safetensors")
    fresh.run([sys.executable, __file__, tmp_path], check=True)
    found = load_file(tmp_path / "turn.safetensors")
    known = 5 + NEW - 1
    expected, logits = reference.turn(ids, known)
    assert torch.equal(found["ids"], expected)
    assert torch.equal(found["logits"], torch.stack(logits))
    assert found["counts"].tolist() == [0, known, ids.shape[1] - known, 1]


# damage


def files_of(store: AttentionStore) -> list[Path]:
    return sorted((Path(store.path) / "blocks").rglob("*.safetensors"))


@pytest.mark.parametrize("how", ["damaged", "missing"])
@pytest.mark.parametrize("family", ["t5", "whisper", "t5gemma"])
def test_the_encoder_runs_again_where_a_block_of_its_output_can_not_be_read(
    family: str, how: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    model, inputs, ids = make_seq2seq(family), encoder_input(family), prompt(20)
    runs, reference = Runs(model), Reference(make_seq2seq(family), inputs)
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        ours = turn(model, inputs, ids, AttentionStoreCache(model, "document", store))
        assert_same(ours, *reference.turn(ids, 0))
        cross = AttentionStoreCache(model, "document", store)
        turn(model, inputs, ids, cross)
        keys = [key.hex() for key in cross._encoder.blocks]
        assert len(keys) > 1
        store.flush()
        store.drop_memory()
        victim = next(path for path in files_of(store) if path.stem == keys[1])
        if how == "missing":
            victim.unlink()
        else:
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 1
            victim.write_bytes(content)
        runs.take()
        for again in (True, False):  # the second time it is there again
            cache = AttentionStoreCache(model, "document", store)
            assert_same(turn(model, inputs, ids, cache), *reference.turn(ids, 19))
            assert runs.take() == int(again)
            assert (cache.reused_tokens, cache.prefilled_tokens) == (19, 1)
            assert bool(cache.stats.encoder_reused) == (not again)
            assert bool(cache.stats.recomputed) == again
            store.flush()
            store.drop_memory()
    assert "load failed" in log.text


def test_damaged_tokens_of_the_decoder_are_computed_again_without_the_encoder(store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq("bart"), encoder_input("bart"), prompt(20)
    runs, reference = Runs(model), Reference(make_seq2seq("bart"), inputs)
    cache = AttentionStoreCache(model, "document", store)
    assert_same(turn(model, inputs, ids, cache), *reference.turn(ids, 0))
    store.flush()
    store.drop_memory()
    keys = {key.hex() for key in cache._encoder.blocks}
    for path in files_of(store):
        if path.stem not in keys:
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    runs.take()
    cache = AttentionStoreCache(model, "document", store)
    assert_same(turn(model, inputs, ids, cache), *reference.turn(ids, 0))
    assert (runs.take(), cache.reused_tokens, cache.prefilled_tokens) == (0, 0, 20)
    assert cache.stats.missed == "load failed"


# ways to generate

MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 1.3},
    "beams": {"num_beams": 3},
    "beams that sample": {"num_beams": 3, "do_sample": True, "num_return_sequences": 2},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "repetition penalty": {"repetition_penalty": 1.8},
    "penalties for the encoder's ids": {"encoder_no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.5},
    "end of text": {"eos_token_id": list(range(3, 101, 4))},
    "prompt lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2},
    "prefill in chunks": {"prefill_chunk_size": 4},
    "attentions": {"output_attentions": True},
    "hidden states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma"])
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_gives_what_it_gives_without_a_store(family: str, mode: str, store: AttentionStore) -> None:
    model, plain, settings = make_seq2seq(family), make_seq2seq(family), MODES[mode]
    inputs, ids = encoder_input(family, padding=4), torch.cat([prompt(20), prompt(20)[:, 8:16]], dim=1)
    if mode in ("penalties for the encoder's ids", "prefill in chunks"):
        inputs.pop("attention_mask")
    if "output_attentions" in settings:
        for one in (model, plain):
            one.set_attn_implementation("eager")
    runs = Runs(model)
    turn(model, inputs, ids[:, :20], AttentionStoreCache(model, "document", store))
    for known in (19, 27):
        runs.take()
        cache = AttentionStoreCache(model, "document", store)
        set_seed(3)
        ours = turn(model, inputs, ids, cache, output_scores=True, **settings)
        set_seed(3)
        theirs = turn(plain, inputs, ids, None, output_scores=True, **settings)
        assert torch.equal(ours.sequences, theirs.sequences)
        for a, b in zip(ours.scores, theirs.scores, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        if mode == "attentions":
            assert len(ours.encoder_attentions) == len(theirs.encoder_attentions)
            assert all(map(torch.equal, ours.encoder_attentions, theirs.encoder_attentions))
        if mode == "hidden states":
            assert all(map(torch.equal, ours.encoder_hidden_states, theirs.encoder_hidden_states))
        needs_encoder = mode in ("prompt lookup", "attentions", "hidden states")
        assert runs.take() == int(needs_encoder)
        if mode != "prefill in chunks":  # only the first chunk is known to be a prompt
            if mode in ("attentions", "hidden states"):  # who asks for these gets those of all tokens
                assert cache.reused_tokens == 0
            else:
                assert cache.reused_tokens >= known
            assert cache.prefilled_tokens == ids.shape[1] - cache.reused_tokens
        saved = store.tokens("document")
        assert len(saved) >= ids.shape[1]
        assert saved == ours.sequences[0, : len(saved)].tolist()
        if settings.get("num_beams", 1) == settings.get("num_return_sequences", 1) == 1:
            assert len(saved) == ours.sequences.shape[1] - 1


def test_a_prefill_in_chunks_that_cuts_the_encoders_mask_is_not_kept(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model, inputs, ids = make_seq2seq("bart"), encoder_input("bart", padding=4), prompt(20)
    turn(model, inputs, ids, AttentionStoreCache(model, "document", store))
    cache = AttentionStoreCache(model, "other", store)
    ours = turn(model, inputs, ids, cache, prefill_chunk_size=7)
    theirs = turn(make_seq2seq("bart"), inputs, ids, None, prefill_chunk_size=7)
    assert_same(ours, theirs.sequences, theirs.logits)
    assert cache.reused_tokens == 0
    assert "another mask than the encoder" in log.text
    assert [session.name for session in store.sessions()] == ["document"]


def test_an_assistant_gives_what_it_gives_without_a_store(store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq("t5"), encoder_input("t5"), prompt(20)
    turn(model, inputs, ids, AttentionStoreCache(model, "document", store))
    for assistant in (make_seq2seq("t5"), make_seq2seq("t5", seed=4)):
        cache = AttentionStoreCache(model, "document", store)
        ours = turn(model, inputs, ids, cache, assistant_model=assistant)
        theirs = turn(make_seq2seq("t5"), inputs, ids, None, assistant_model=assistant)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert cache.reused_tokens == 19
        assert store.tokens("document") == ours.sequences[0, :-1].tolist()


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_a_batch_runs_as_ever_and_is_not_kept(
    family: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model = make_seq2seq(family)
    rows = [encoder_input(family, seed=seed) for seed in (1, 2)]
    inputs = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    theirs = turn(make_seq2seq(family), inputs, None, None)
    cache = AttentionStoreCache(model, "document", store)
    for _ in range(2):
        ours = turn(model, inputs, None, cache)
        assert_same(ours, theirs.sequences, theirs.logits)
        assert cache.stats.saved_bytes == cache.stats.encoder_reused == 0
    assert "a batch of 2 inputs of the encoder" in log.text
    assert not store.sessions()
    single = turn(model, rows[1], prompt(20), cache)  # the same object serves one conversation afterwards
    assert_same(single, *Reference(make_seq2seq(family), rows[1]).turn(prompt(20), 0))
    assert store.tokens("document") == single.sequences[0, :-1].tolist()


def test_an_attached_model_reuses_in_plain_generate(store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq("mbart"), encoder_input("mbart"), prompt(20)
    runs, reference = Runs(model), Reference(make_seq2seq("mbart"), inputs)
    attach(model, store)
    assert_same(turn(model, inputs, ids, None), *reference.turn(ids, 0))
    assert_same(turn(model, inputs, ids, None), *reference.turn(ids, 19))
    assert runs.take() == 1
    assert store.stats()["reused_tokens"] == 19
    detach(model)
    turn(model, inputs, ids, None)
    assert runs.take() == 1
    assert store.stats()["turns"] == 2


def test_what_an_attached_encoder_decoder_leaves_alone_is_said_once(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    model, inputs, ids = make_seq2seq("t5"), encoder_input("t5"), prompt(20)
    attach(model, store)
    for _ in range(2):
        ours = model.generate(**inputs, decoder_input_ids=ids, use_cache=False, max_new_tokens=4, do_sample=False)
    theirs = make_seq2seq("t5").generate(**inputs, decoder_input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(ours, theirs)
    assert log.text.count("neither reused nor kept") == 1
    assert store.stats()["missed: left alone (use_cache)"] == 2
    detach(model)


@pytest.mark.parametrize("beams", [1, 3])
def test_use_cache_false_runs_without_the_cache(beams: int, store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq("bart"), encoder_input("bart"), prompt(20)
    wanted = {"decoder_input_ids": ids, "use_cache": False, "num_beams": beams, "max_new_tokens": 4, "do_sample": False}
    ours = model.generate(**inputs, past_key_values=AttentionStoreCache(model, "document", store), **wanted)
    assert torch.equal(ours, make_seq2seq("bart").generate(**inputs, **wanted))
    assert store.sessions() == []


def test_one_object_serves_many_turns_and_loads_nothing(store: AttentionStore) -> None:
    model = make_seq2seq("t5gemma")
    documents = [encoder_input("t5gemma", seed=seed) for seed in (1, 2)]
    runs, cache = Runs(model), AttentionStoreCache(model, "document", store)
    references = [Reference(make_seq2seq("t5gemma"), inputs) for inputs in documents]
    ids = prompt(20)
    for number, known, loads in ((0, 0, False), (0, 19, False), (1, 0, False), (1, 19, False), (0, 19, True)):
        ours = turn(model, documents[number], ids, cache)
        assert_same(ours, *references[number].turn(ids, known))
        assert (cache.reused_tokens, bool(cache.stats.loaded_bytes)) == (known, loads)
        assert runs.take() == int(not known)


class Pieces(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_a_load_that_fails_in_the_middle_starts_over_and_streams_once(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_attnstore.errors import LoadError
    from hf_attnstore.store.transfer.load import Load

    model, inputs, ids = make_seq2seq("bart"), encoder_input("bart"), prompt(20)
    runs, reference = Runs(model), Reference(make_seq2seq("bart"), inputs)
    assert_same(turn(model, inputs, ids, AttentionStoreCache(model, "document", store)), *reference.turn(ids, 0))
    runs.take()
    wait, failures = Load.wait, [2]

    def fails(self: Load, number: int) -> float:
        if number == 1 and failures[0]:
            failures[0] -= 1
            raise LoadError("the disk went away", transient=True)
        return wait(self, number)

    monkeypatch.setattr(Load, "wait", fails)
    streamer = Pieces()
    cache = AttentionStoreCache(model, "document", store)
    ours = turn(model, inputs, ids, cache, streamer=streamer)
    assert_same(ours, *reference.turn(ids, 19))
    assert streamer.ids == ours.sequences[0].tolist()
    assert not failures[0]
    assert "a load failed" in cache.stats.recomputed
    assert runs.take() == 0


# Whisper, whose generate is its own


def test_whisper_with_other_prompt_tokens_encodes_the_same_audio_once(store: AttentionStore) -> None:
    model, inputs = make_seq2seq("whisper"), encoder_input("whisper")
    for one in (model, plain := make_seq2seq("whisper")):
        one.generation_config.prev_sot_token_id = 90
    runs = Runs(model)
    for number, tokens in enumerate((None, [90, 11, 12], [90, 11, 13])):
        given = torch.tensor(tokens) if tokens else None
        cache = AttentionStoreCache(model, "audio", store)
        ours = turn(model, inputs, None, cache, prompt_ids=given)
        theirs = turn(plain, inputs, None, None, prompt_ids=given)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert runs.take() == int(not number)
        assert cache.reused_tokens == (0, 0, 2)[number]
        assert cache.stats.encoder_reused == (60 if number else 0)


@pytest.mark.parametrize("how", ["long audio", "timestamps", "temperatures", "several sequences"])
def test_whisper_runs_as_ever_where_it_may_decode_more_than_once(
    how: str, store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"return_dict_in_generate": False, "output_logits": None, "max_new_tokens": 8}
    inputs = encoder_input("whisper")
    models = [make_seq2seq("whisper") for _ in range(2)]
    for model in models:
        model.generation_config.no_timestamps_token_id = 80
    if how == "long audio":
        inputs = {
            "input_features": torch.cat([inputs["input_features"]] * 3, dim=-1),
            "attention_mask": torch.ones((1, 360), dtype=torch.long),
        }
        settings |= {"return_timestamps": True}
    elif how == "timestamps":
        settings |= {"return_timestamps": True}
    elif how == "temperatures":
        settings |= {"temperature": (0.0, 0.5), "logprob_threshold": 10.0, "compression_ratio_threshold": 1.0}
    else:
        settings |= {"num_return_sequences": 2, "do_sample": True, "temperature": 0.7}
    cache = AttentionStoreCache(models[0], "audio", store)
    results = []
    for model, given in zip(models, (cache, None), strict=True):
        set_seed(1)
        results.append(model.generate(**inputs, past_key_values=given, **settings))
    assert torch.equal(*results)
    assert "not reused and not saved" in log.text
    assert not store.sessions()


def test_whisper_that_decodes_again_starts_over_with_its_encoder(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = make_seq2seq("whisper"), encoder_input("whisper")
    plain = turn(make_seq2seq("whisper"), inputs, None, None)
    turn(model, inputs, None, AttentionStoreCache(model, "audio", store))
    runs, once = Runs(model), model.generate_with_fallback

    def twice(**arguments: Any) -> Any:
        once(**arguments)
        return once(**arguments)

    monkeypatch.setattr(model, "generate_with_fallback", twice)
    cache = AttentionStoreCache(model, "audio", store)
    ours = turn(model, inputs, None, cache)
    assert torch.equal(ours.sequences, plain.sequences)
    assert runs.take() == 2  # the encoder was left out at first, then ran for each
    assert not cache.stats.encoder_skipped
    assert "decodes several times" in cache.stats.recomputed
    before = store.tokens("audio")
    assert torch.equal(turn(model, inputs, None, cache).sequences, plain.sequences)
    assert store.tokens("audio") == before


# the surface of the cache


def test_the_surface_of_a_cache(store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq("bart"), encoder_input("bart"), prompt(20)
    cache = AttentionStoreCache(model, "document", store)
    assert cache.get_seq_length() == len(cache.token_ids) == 0
    ours = turn(model, inputs, ids, cache)
    held = ours.sequences.shape[1] - 1
    assert cache.get_seq_length() == held == len(cache.token_ids)
    assert len(cache) == 2
    assert cache.is_updated == {0: True, 1: True}
    assert cache.self_attention_cache.layers[0].keys.shape[-2] == held
    assert cache.cross_attention_cache.layers[1].values.shape[-2] == 40
    assert not cache.is_compileable
    cache.crop(-3)
    assert cache.get_seq_length() == held - 3
    assert cache.cross_attention_cache.layers[1].values.shape[-2] == 40
    twin = copy.deepcopy(cache)
    assert isinstance(twin, EncoderDecoderCache)
    assert twin.store is None
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.layers[0].keys.shape[0] == cache.cross_attention_cache.layers[0].keys.shape[0] == 2
    cache.batch_select_indices(torch.tensor([0]))
    for held_by, other in zip(
        (*cache.layers, *cache.cross_attention_cache.layers),
        (*twin.layers, *twin.cross_attention_cache.layers),
        strict=True,
    ):
        assert torch.equal(held_by.keys, other.keys)
        assert torch.equal(held_by.values, other.values)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.is_updated == {0: False, 1: False}
    assert twin.get_seq_length() == held - 3
    assert "2 × full_attention" in describe(model)


def test_settings_and_calls_that_make_no_sense_are_refused(store: AttentionStore) -> None:
    model, inputs = make_seq2seq("bart"), encoder_input("bart")
    for settings in ({"window": 10}, {"keep_first": 2}):
        with pytest.raises(CacheUseError, match="no window"):
            AttentionStoreCache(model, "document", store, **settings)  # type: ignore[arg-type]
    cache = AttentionStoreCache(model, "document", store)
    with pytest.raises(CacheUseError, match="can't be resumed"):
        cache.resume()
    with pytest.raises(CacheUseError, match="nothing can be matched"):
        cache.match(prompt(5))
    with pytest.raises(CacheUseError, match="pass all of the decoder's ids"):
        turn(model, inputs, prompt(3), cache, decoder_attention_mask=torch.ones((1, 8), dtype=torch.long))
    with pytest.raises(CacheUseError, match="another model"):
        turn(make_seq2seq_attached(store), inputs, prompt(3), cache)

    class Tokenizer:
        chat_template = "{{ messages }}"

        def decode(self, ids: Any) -> str:
            return ""

    with pytest.raises(UnsupportedModelError, match="encoder"):
        ChatSession(model, Tokenizer(), store, "chat")  # type: ignore[arg-type]


def make_seq2seq_attached(store: AttentionStore) -> Any:
    model = make_seq2seq("bart")
    attach(model, store)
    return model


def test_padding_among_the_ids_of_a_decoder_that_counts_positions_by_it_is_not_kept(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    for family, counts in (("m2m-100", True), ("bart", False)):
        model, inputs, ids = make_seq2seq(family), encoder_input(family), prompt(20)
        turn(model, inputs, ids, AttentionStoreCache(model, family, store))
        padded = torch.cat([ids[:, :9], torch.zeros((1, 1), dtype=torch.long), ids[:, 10:]], dim=1)
        cache = AttentionStoreCache(model, family, store)
        ours = turn(model, inputs, padded, cache)
        theirs = turn(make_seq2seq(family), inputs, padded, None)
        assert torch.equal(ours.sequences, theirs.sequences)
        assert cache.reused_tokens == 9
        assert ("padding tokens among" in cache.stats.recomputed) == counts
        again = AttentionStoreCache(model, family, store)
        turn(model, inputs, padded, again)
        assert again.reused_tokens == (9 if counts else 19)


@pytest.mark.parametrize(
    "settings",
    [
        {"decoder_attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
        {"encoder_outputs": "tuple"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_inputs_that_ids_do_not_identify_are_not_kept(settings: dict[str, Any], store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq("bart"), encoder_input("bart"), prompt(5)
    plain = make_seq2seq("bart")
    if "encoder_outputs" in settings:
        with torch.no_grad():
            settings = {"encoder_outputs": plain.get_encoder()(**inputs, return_dict=True)}
    theirs = turn(plain, inputs, ids, None, **settings)
    for number in range(2):
        cache = AttentionStoreCache(model, "document", store)
        ours = turn(model, inputs, ids, cache, **settings)
        assert torch.equal(ours.sequences, theirs.sequences)
        identified = "encoder_outputs" in settings  # what an encoder gave is content too
        assert cache.reused_tokens == (4 if number and identified else 0)
        assert bool(store.sessions()) == identified


# sessions and the store


def test_a_session_owns_what_its_decoder_keeps_of_the_encoder(tmp_path: Path) -> None:
    model, inputs, ids = make_seq2seq("t5"), encoder_input("t5"), prompt(20)
    runs = Runs(model)
    with AttentionStore(tmp_path / "store", block_size=BLOCK) as store:
        turn(model, inputs, ids, AttentionStoreCache(model, "one", store))
        turn(model, inputs, prompt(9, seed=3), AttentionStoreCache(model, "two", store))
        store.fork("one", "three")
        store.collect_garbage(unowned=True)
        for gone, left in (("one", "two"), ("two", "three")):
            store.delete(gone)
            store.drop_memory()
            cache = AttentionStoreCache(model, left, store, save=False)
            runs.take()
            turn(model, inputs, ids, cache)
            assert runs.take() == 0
            assert cache.stats.encoder_reused == 40
        store.delete("three")
        assert store.stats()["disk_blocks"] == 0
        assert store.verify().problems == []


def test_namespaces_and_other_weights_do_not_meet(tmp_path: Path) -> None:
    inputs, ids = encoder_input("t5"), prompt(20)
    model = make_seq2seq("t5")
    runs = Runs(model)
    for namespace in ("a", "b"):
        with AttentionStore(tmp_path, block_size=BLOCK, namespace=namespace) as store:
            turn(model, inputs, ids, AttentionStoreCache(model, "one", store))
            assert runs.take() == 1
    with torch.no_grad():
        model.get_encoder().block[0].layer[0].SelfAttention.q.weight.mul_(1.5)
    with AttentionStore(tmp_path, namespace="a") as store:
        cache = AttentionStoreCache(model, "one", store)
        theirs = turn(copy.deepcopy(model), inputs, ids, None)
        assert torch.equal(turn(model, inputs, ids, cache).sequences, theirs.sequences)
        assert (cache.reused_tokens, cache.stats.encoder_reused) == (0, 0)


# loops of one's own


@pytest.mark.parametrize("family", ["t5", "bart", "t5gemma"])
def test_a_loop_of_ones_own_is_kept_and_matched(family: str, store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq(family), encoder_input(family, padding=4), prompt(24)
    reference = Reference(make_seq2seq(family), inputs)
    mask = {"attention_mask": inputs["attention_mask"]}
    given = {"inputs": inputs["input_ids"], **mask}
    with torch.no_grad():
        cache = AttentionStoreCache(model, "document", store)
        out = model(**inputs, decoder_input_ids=ids[:, :10], past_key_values=cache)
        outputs = BaseModelOutput(last_hidden_state=out.encoder_last_hidden_state)
        for start, stop in ((10, 11), (11, 20)):
            out = model(encoder_outputs=outputs, decoder_input_ids=ids[:, start:stop], past_key_values=cache, **mask)
        cache.save()
        for start, stop in ((0, 10), (10, 11), (11, 20)):
            expected = reference.model(
                encoder_outputs=outputs, decoder_input_ids=ids[:, start:stop], past_key_values=reference.cache, **mask
            )
        assert torch.equal(out.logits, expected.logits)
        assert store.tokens("document") == ids[0, :20].tolist()

        again = AttentionStoreCache(model, "document", store)
        assert again.match(ids, **given) == 20
        assert again.stats.encoder_reused == 40
        out = model(encoder_outputs=outputs, decoder_input_ids=ids[:, 20:], past_key_values=again, **mask)
        expected = reference.model(
            encoder_outputs=outputs, decoder_input_ids=ids[:, 20:], past_key_values=reference.cache, **mask
        )
        assert torch.equal(out.logits, expected.logits)
        again.save()
        assert store.tokens("document") == ids[0].tolist()

        other = encoder_input(family, seed=7, padding=4)
        assert (
            AttentionStoreCache(model, "document", store).match(
                ids, inputs=other["input_ids"], attention_mask=other["attention_mask"]
            )
            == 0
        )
        with pytest.raises(CacheUseError, match="others than those"):
            model(**other, decoder_input_ids=ids[:, :2], past_key_values=again)
        again.save()


def test_a_loop_of_ones_own_can_use_the_output_of_an_encoder(store: AttentionStore) -> None:
    model, inputs, ids = make_seq2seq("bart"), encoder_input("bart"), prompt(24)
    reference = Reference(make_seq2seq("bart"), inputs)
    with torch.no_grad():
        for start, stop in ((0, 12), (12, 24)):
            cache = AttentionStoreCache(model, "document", store)
            assert cache.match(ids[:, :stop], encoder_outputs=reference.output, **reference.others) == start
            assert cache.stats.encoder_reused == (40 if start else 0)
            ours = model(
                encoder_outputs=reference.output,
                decoder_input_ids=ids[:, start:stop],
                past_key_values=cache,
                **reference.others,
            )
            theirs = reference.model(
                encoder_outputs=reference.output,
                decoder_input_ids=ids[:, start:stop],
                past_key_values=reference.cache,
                **reference.others,
            )
            assert torch.equal(ours.logits, theirs.logits)
            cache.save()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    done = run_turn("t5", folder / "store", load_file(folder / "prompt.safetensors")["ids"])
    save_file(done, folder / "turn.safetensors")
