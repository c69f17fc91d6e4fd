"""Outputs of encoders: a whole input that is known is not computed, whatever batch it comes in."""

from __future__ import annotations

import copy
import importlib.util
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import tokens
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BigBirdConfig,
    BigBirdModel,
    ConvBertConfig,
    ConvBertModel,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from hf_attnstore import AttentionStore, CacheUseError, UnsupportedModelError, attach, detach
from hf_attnstore.cache.identity.fingerprint import fingerprint_of
from hf_attnstore.cache.outputs import TRIED, PooledOutput
from hf_attnstore.lab.families.tiny import of_class

SMALL: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
CLOSE = 5e-5
LENGTHS = (9, 5, 12)


def bert(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SMALL)).eval()


def batch(*lengths: int, pad: int = 0, first: int = 0) -> dict[str, torch.Tensor]:
    """Texts of so many tokens, padded on the right; the same length is the same text."""
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), pad), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, :length] = tokens(length, seed=100 + first + length)
        mask[row, :length] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[int, ...]]]:
    """Takes down the shapes of the ids with which a model's own forward runs."""

    def of(model: Any) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        kept = model.__dict__["_attnstore_outputs"]
        run = kept.run

        def counted(computes: Any, args: Any, kwargs: Any) -> Any:
            def through(*own: Any, **named: Any) -> Any:
                shapes.append(tuple(named["input_ids"].shape))
                return computes(*own, **named)

            return run(through, args, kwargs)

        kept.run = counted
        return shapes

    return of


def hidden(model: Any, inputs: dict[str, torch.Tensor], row: int, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).last_hidden_state[row, :length]


@pytest.mark.parametrize("family", sorted(TRIED))
def test_padding_behind_a_text_changes_nothing_and_known_rows_are_not_computed(
    family: str, store: AttentionStore, computed: Any
) -> None:
    name = "T5EncoderModel" if family == "t5" else MODEL_MAPPING_NAMES[family]
    changes = {"use_bidirectional_attention": True} if family == "gemma3_text" else {}
    model = of_class(family, name, **changes)
    pad = getattr(model.config, "pad_token_id", 0) or 0
    plain = {length: hidden(model, batch(length, pad=pad), 0, length) for length in (*LENGTHS, 7)}
    kept = attach(model, store, keep="last_hidden_state")
    shapes = computed(model)
    first = batch(*LENGTHS, pad=pad)
    made = {length: hidden(model, first, row, length) for row, length in enumerate(LENGTHS)}
    assert shapes == [(3, 12)]
    for length, ours in made.items():
        assert torch.allclose(ours, plain[length], atol=CLOSE), (ours - plain[length]).abs().max()
    shapes.clear()
    second = batch(7, 5, 12, 12, pad=pad)
    for row, length in ((1, 5), (2, 12), (3, 12)):
        assert torch.equal(hidden(model, second, row, length), made[length])
    assert shapes == [(1, 7)]  # the one that was not known, in the first of these calls
    assert torch.allclose(hidden(model, second, 0, 7), plain[7], atol=CLOSE)
    assert (kept.rows, kept.reused_rows) == (25, 21)


@pytest.mark.parametrize("keep", ["last_hidden_state", "pooler_output"])
def test_outputs_are_found_on_disk_by_another_process_and_are_those_that_the_model_gave(
    keep: Any, tmp_path: Path, computed: Any
) -> None:
    made = []
    for _ in range(2):
        with AttentionStore(tmp_path, memory="1MiB") as store:
            model = bert()
            attach(model, store, keep=keep)
            shapes = computed(model)
            with torch.inference_mode():
                made.append(model(**batch(*LENGTHS)))
            store.flush()
            assert store.verify().problems == []
    assert shapes == []
    assert torch.equal(made[0].pooler_output, made[1].pooler_output)
    if keep == "last_hidden_state":
        assert torch.equal(made[0].last_hidden_state, made[1].last_hidden_state)
        assert not made[1].last_hidden_state[1, 5:].any()  # padding
    with torch.no_grad():
        assert torch.equal(made[0].pooler_output, bert()(**batch(*LENGTHS)).pooler_output)


def test_other_weights_types_positions_and_masks_are_other_outputs(store: AttentionStore, computed: Any) -> None:
    model = bert()
    attach(model, store, keep="last_hidden_state")
    shapes = computed(model)
    inputs = batch(9)
    ids = inputs["input_ids"]
    others: list[dict[str, torch.Tensor]] = [
        inputs,
        {**inputs, "token_type_ids": torch.ones_like(ids)},
        {**inputs, "position_ids": torch.arange(3, 12)[None]},
        {**inputs, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])},
        {"input_ids": ids},
    ]
    for other in others:
        for _ in range(2):
            assert torch.equal(hidden(model, other, 0, 9), hidden(bert(), other, 0, 9))
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight.add_(0.1)
    hidden(model, inputs, 0, 9)
    assert len(shapes) == len(others) + 1


def test_a_frozen_model_is_looked_at_by_its_tensors_and_by_what_surrounds_a_call(
    store: AttentionStore, computed: Any
) -> None:
    model, ids = bert(), batch(9)
    kept = attach(model, store, keep="pooler_output", frozen=True)
    shapes = computed(model)

    def pooled() -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = model(**ids).pooler_output
        return found

    first = pooled()
    reads = []
    kept._fingerprint.current, current = lambda: reads.append(1) or current(), kept._fingerprint.current  # type: ignore[method-assign,func-returns-value]
    assert torch.equal(pooled(), first)
    assert (len(shapes), len(reads), kept.reused_rows) == (1, 0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(pooled(), first)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.bias.add_(0.5)
    assert torch.allclose(pooled(), bert_with(model)(**ids).pooler_output, atol=CLOSE)
    assert (len(shapes), len(reads), kept.reused_rows) == (3, 2, 1)
    model.train()
    pooled()
    assert (len(shapes), len(reads)) == (4, 2)
    with pytest.raises(CacheUseError, match="frozen is for outputs"):
        attach(model, store, frozen=True)  # type: ignore[call-overload]


Change = Callable[[Any], object]
CHANGES: dict[str, Change] = {
    "a tensor that is alive elsewhere": lambda m: (m.pooler.dense.bias, setattr(m.pooler.dense, "bias", other_bias())),
    "a module that is alive elsewhere": lambda m: (m.encoder.layer[0], swap_layer(m)),
    "a data of its own": lambda m: setattr(m.pooler.dense.bias, "data", torch.ones(32)),
    "another dtype": lambda m: m.to(torch.bfloat16),
    "a hook": lambda m: m.pooler.register_forward_hook(lambda module, given, made: made * 2),
    "loaded": lambda m: m.load_state_dict(bert(5).state_dict()),
    "loaded and assigned": lambda m: (list(m.parameters()), m.load_state_dict(bert(5).state_dict(), assign=True)),
    "identified by somebody else": lambda m: (add_to_bias(m), fingerprint_of(m).current()),
}


def other_bias() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(32))


def swap_layer(model: Any) -> None:
    model.encoder.layer[0] = bert(3).encoder.layer[1]


@torch.no_grad()
def add_to_bias(model: Any) -> None:
    model.pooler.dense.bias.add_(0.5)


@pytest.mark.parametrize("frozen", [False, True], ids=["looked at", "frozen"])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_replaces_tensors_is_noticed(change: str, frozen: bool, store: AttentionStore) -> None:
    model, ids = bert(), batch(9)
    attach(model, store, keep="pooler_output", frozen=frozen)
    with torch.no_grad():
        before = model(**ids).pooler_output
        assert torch.equal(model(**ids).pooler_output, before)
        held = CHANGES[change](model)  # what was there before stays alive
        after = model(**ids).pooler_output
        assert not torch.equal(after, before)
        assert torch.equal(after, BertModel.forward(model, **ids).pooler_output)
    del held


@pytest.mark.parametrize("frozen", [False, True], ids=["looked at", "frozen"])
def test_adapters_are_told_apart(frozen: bool, store: AttentionStore) -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model, ids = peft.get_peft_model(bert(), settings), batch(9)
    model.add_adapter("other", settings)
    model.eval()
    kept = attach(model, store, keep="pooler_output", frozen=frozen)

    def is_right() -> torch.Tensor:
        with torch.no_grad():
            found = [model(**ids).pooler_output for _ in range(2)]
            plain = BertModel.forward(model.get_base_model(), **ids).pooler_output
        assert torch.equal(found[0], found[1])
        assert torch.allclose(found[0], plain, atol=CLOSE)
        return found[0]

    made = [is_right()]
    model.set_adapter("other")
    made.append(is_right())
    with model.disable_adapter():
        made.append(is_right())
    model.set_adapter("default")
    assert torch.equal(is_right(), made[0])
    assert not any(torch.equal(made[0], one) for one in made[1:])
    assert (kept.rows, kept.reused_rows) == (8, 5)


def test_what_is_computed_while_the_model_changes_is_not_kept(store: AttentionStore, log: Any) -> None:
    model, ids = bert(), batch(9)
    kept = attach(model, store, keep="last_hidden_state")
    hook = model.encoder.layer[0].register_forward_pre_hook(lambda module, given: add_to_bias(model))
    for _ in range(2):
        expected = bert_with(model)
        add_to_bias(expected)
        with torch.no_grad():
            assert torch.allclose(model(**ids).pooler_output, expected(**ids).pooler_output, atol=CLOSE)
    hook.remove()
    assert (kept.reused_rows, store.stats()["memory_blocks"]) == (0, 0)
    assert "it changed while it computed" in log.text


def test_an_output_may_be_written_to_and_a_mask_be_of_any_dtype(store: AttentionStore, computed: Any) -> None:
    model, ids = bert(), batch(9)
    attach(model, store, keep="last_hidden_state")
    shapes = computed(model)
    expected = hidden(bert(), ids, 0, 9)
    for _ in range(3):
        found = hidden(model, ids, 0, 9)
        assert torch.equal(found, expected)
        found.zero_()
    assert len(shapes) == 1
    for dtype in (torch.bool, torch.float16, torch.bfloat16):
        given = {**ids, "attention_mask": ids["attention_mask"].to(dtype)}
        for _ in range(2):
            assert torch.allclose(hidden(model, given, 0, 9), hidden(bert(), given, 0, 9), atol=CLOSE)
    assert len(shapes) == 5  # of bfloat16, which numpy does not have, none is kept


def bert_with(model: Any) -> Any:
    """A model of the same weights, that nothing is attached to."""
    twin = bert(1)
    twin.load_state_dict(model.state_dict())
    return twin


def test_without_memory_nothing_is_kept_the_log_says_what_to_do_and_what_is_on_disk_is_found(
    tmp_path: Path, computed: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = bert(), batch(7)
    with AttentionStore(tmp_path) as store, attach(model, store, keep="pooler_output"):
        made = model.eval()
        with torch.no_grad():
            expected = made(**batch(9)).pooler_output
    with AttentionStore(tmp_path, memory=0) as store:
        attach(model, store, keep="pooler_output")
        shapes = computed(model)
        with torch.no_grad():
            for _ in range(2):
                assert torch.equal(model(**batch(9)).pooler_output, expected)
                model(**other)
        assert shapes == [(1, 7)] * 2
        assert store.stats()["not_saved_blocks"] == 2
    [said] = [record.getMessage() for record in caplog.records if "memory" in record.getMessage()]
    assert "it is not kept" in said
    assert said.endswith("give it more with memory=")


def test_what_can_not_be_kept_is_left_to_the_model(
    store: AttentionStore, computed: Any, log: pytest.LogCaptureFixture
) -> None:
    model = bert()
    attach(model, store, keep="last_hidden_state")
    shapes = computed(model)
    inputs = batch(9)
    hidden(model, inputs, 0, 9)
    assert model(**inputs).last_hidden_state.requires_grad
    with torch.no_grad():
        assert len(model(**inputs, output_hidden_states=True).hidden_states) == 3
        assert isinstance(model(**inputs, return_dict=False), tuple)
        model.train()
        model(**inputs)
        model.eval()
    assert len(shapes) == 5
    for reason in ("gradients are on", "output_hidden_states", "a tuple", "training mode"):
        assert reason in log.text
    hidden(model, inputs, 0, 9)
    assert len(shapes) == 5


def test_a_compiled_model_is_one_graph_as_without_a_store(store: AttentionStore) -> None:
    model, ids = bert(), batch(9)
    kept = attach(model, store, keep="last_hidden_state")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.allclose(hidden(compiled, ids, 0, 9), hidden(bert(), ids, 0, 9), atol=CLOSE)
    assert kept.rows == 0
    for _ in range(2):
        hidden(model, ids, 0, 9)
    assert (kept.rows, kept.reused_rows) == (2, 1)


def test_where_padding_plays_a_part_a_row_is_its_own_with_its_padding(store: AttentionStore, computed: Any) -> None:
    torch.manual_seed(0)
    convolving = ConvBertModel(ConvBertConfig(**SMALL, embedding_size=32)).eval()
    torch.manual_seed(0)
    sparse = BigBirdModel(BigBirdConfig(**SMALL, attention_type="original_full")).eval()
    for model in (convolving, sparse):
        plain = {length: hidden(model, batch(5, length), 0, 5) for length in (9, 12)}
        attach(model, store, keep="last_hidden_state")
        shapes = computed(model)
        for _ in range(2):
            for length, expected in plain.items():
                assert torch.allclose(hidden(model, batch(5, length), 0, 5), expected, atol=CLOSE)
        assert shapes == [(2, 9), (2, 12)]


def test_of_the_pooled_output_alone_hidden_states_are_an_error_and_not_something_else(store: AttentionStore) -> None:
    model = bert()
    attach(model, store, keep="pooler_output")
    for _ in range(2):
        with torch.no_grad():
            output = model(**batch(*LENGTHS))
        assert isinstance(output, PooledOutput)
        assert torch.equal(output[1], output.pooler_output)
        assert torch.equal(output["pooler_output"], output.pooler_output)
        for ask in (lambda o: o.last_hidden_state, lambda o: o[0], lambda o: o["last_hidden_state"]):
            with pytest.raises(CacheUseError, match="pooled output alone"):
                ask(output)
        assert not hasattr(output, "last_hidden_state")
    torch.manual_seed(0)
    without = BertModel(BertConfig(**SMALL), add_pooling_layer=False).eval()
    attach(without, store, keep="pooler_output")
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="no pooler_output"):
        without(**batch(9))
    with pytest.raises(CacheUseError, match="keep is one of"):
        attach(model, store, keep="logits")  # type: ignore[call-overload]
    with pytest.raises(UnsupportedModelError, match="no model of transformers"):
        attach(torch.nn.Linear(2, 2), store, keep="pooler_output")


def test_a_damaged_file_is_computed_again(tmp_path: Path, computed: Any, log: pytest.LogCaptureFixture) -> None:
    with AttentionStore(tmp_path, memory="1MiB") as store:
        with attach(bert(), store, keep="last_hidden_state"):
            pass
        model = bert()
        attach(model, store, keep="last_hidden_state")
        made = hidden(model, batch(9), 0, 9)
    [file] = (tmp_path / "blocks").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-400] ^= 1
    file.write_bytes(data)
    with AttentionStore(tmp_path, memory="1MiB") as store:
        model = bert()
        attach(model, store, keep="last_hidden_state")
        shapes = computed(model)
        assert torch.equal(hidden(model, batch(9), 0, 9), made)
        assert len(shapes) == 1
        assert "computed again" in log.text


def test_detach_copies_and_files_of_a_model(store: AttentionStore, caplog: pytest.LogCaptureFixture) -> None:
    model = bert()
    before = list(vars(model))
    fingerprints = []
    kept = attach(model, store, keep="last_hidden_state")
    expected = hidden(model, batch(9), 0, 9)
    twin = copy.deepcopy(model)
    assert torch.equal(hidden(twin, batch(9), 0, 9), expected)
    fingerprints = [vars(one)["_attnstore_outputs"].reused_rows for one in (model, twin)]
    assert fingerprints == [0, 1]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(hidden(loaded, batch(9), 0, 9), expected)
    kept.detach()
    assert list(vars(model)) == before
    attach(model, store, keep="last_hidden_state")
    detach(model)
    assert list(vars(model)) == before
    with caplog.at_level(logging.DEBUG, logger="hf_attnstore"):
        store.close()
        attach(twin, store, keep="last_hidden_state")
        assert torch.equal(hidden(twin, batch(9), 0, 9), expected)
        assert "the store is closed" in caplog.text


@pytest.mark.skipif(
    importlib.util.find_spec("sentence_transformers") is None, reason="sentence_transformers is not installed"
)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_sentence_transformers_encode_only_what_is_not_known(
    pooling: str, store: AttentionStore, tmp_path: Path, computed: Any
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    tokenizer = AutoTokenizer.from_pretrained("examples/small-model")
    torch.manual_seed(0)
    BertModel(BertConfig(**{**SMALL, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = Transformer(str(tmp_path), max_seq_length=64)
    model = SentenceTransformer(modules=[words, Pooling(words.get_word_embedding_dimension(), pooling)], device="cpu")
    texts = ["The king came.", "Who sat down by the fire, and what did he say?", "No.", "The river rose all night."]
    plain = model.encode(texts)
    kept = attach(words.auto_model, store, keep="last_hidden_state")
    first = model.encode(texts)
    again = model.encode([*reversed(texts), "And then?"])
    assert (kept.rows, kept.reused_rows) == (9, 4)
    assert abs(first - plain).max() < CLOSE
    assert abs(again[:4][::-1] - plain).max() < CLOSE
