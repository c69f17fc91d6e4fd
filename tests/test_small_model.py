"""The small model of the examples, and the script that trains it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL_DIR = EXAMPLES / "small-model"

PIECE = (
    "The old general rose from the table and went slowly to the window. It was already evening, and in "
    "the street below the soldiers were still passing, one after another, with their heads bent against "
    'the wind. "They will not come back," said the young officer in a low voice, and he looked at the '
    "princess. She did not answer him. She was thinking of her brother, of the last letter he had "
    'written to her, and of what the count had said to her father that morning. "My dear," her father '
    'began at last, taking her by the hand, "you must not be afraid. Everything is as God wills." But '
    "she saw from his face that he was himself afraid, and that he knew no more than the others what "
    "was going to happen to them all."
)

CONVERSATION = [
    {"role": "system", "content": "You answer as a voice in an old novel."},
    {"role": "user", "content": '"Is the count at home?" he asked.'},
    {"role": "assistant", "content": " He is, your excellency.\n\n"},
    {"role": "user", "content": "\n  Naïve — «déjà vu», 雪 and 🙂 | >  "},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "Then I shall wait."},
    {"role": "assistant", "content": "As you please."},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval()


@pytest.fixture(scope="module")
def run() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((MODEL_DIR / "training.json").read_text(encoding="utf-8"))
    return figures


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script as a module; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("train_small_model", EXAMPLES / "train_small_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while it is being executed.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
    return module


def rendered(tokenizer: Any, messages: list[dict[str, str]], answer_next: bool = False) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=answer_next, return_dict=True)[
        "input_ids"
    ]
    return ids


def test_model_is_small_and_complete(model: Any, run: dict[str, Any]) -> None:
    assert isinstance(model, LlamaForCausalLM)
    weights = [path for path in MODEL_DIR.iterdir() if path.suffix in {".safetensors", ".bin", ".pt"}]
    assert [path.name for path in weights] == ["model.safetensors"]
    assert weights[0].stat().st_size <= 12_000_000
    config = model.config
    assert config.max_position_embeddings == 1024
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 32)
    assert config.tie_word_embeddings
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == run["model"]["parameters"]
    assert hashlib.sha256(weights[0].read_bytes()).hexdigest() == run["weights_sha256"]


def test_special_tokens_agree(model: Any, tokenizer: Any) -> None:
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert tokenizer.eos_token == "<|end|>"
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer("It snowed.")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("text", [PIECE, "  two  spaces\n\n\ttab ", "Naïve — «déjà vu», 雪 🙂", "\x00\x7f"])
def test_tokenizer_loses_nothing(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_fences(tokenizer: Any) -> None:
    """What stands on one side of a special token does not change the ids on the other."""

    def ids(text: str) -> list[int]:
        encoded: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return encoded

    for token in ("<|bos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"):
        assert len(ids(token)) == 1
        for left, right in (("a word", "another"), ("a ", " b"), ("x\n", "\ny"), ("<|", "|>")):
            assert ids(left + token + right) == [*ids(left), *ids(token), *ids(right)]


@pytest.mark.parametrize("system", [True, False])
def test_chat_template_only_appends(tokenizer: Any, system: bool) -> None:
    messages = CONVERSATION if system else CONVERSATION[1:]
    end = tokenizer.eos_token_id
    assert rendered(tokenizer, messages[:1])[0] == tokenizer.bos_token_id
    for k in range(1, len(messages)):
        shorter, longer = rendered(tokenizer, messages[:k]), rendered(tokenizer, messages[: k + 1])
        assert longer[: len(shorter)] == shorter
        assert len(longer) > len(shorter)
        if messages[k]["role"] == "assistant":
            prompt = rendered(tokenizer, messages[:k], answer_next=True)
            answer = tokenizer(messages[k]["content"], add_special_tokens=False)["input_ids"]
            assert [*prompt, *answer, end] == longer


def test_chat_template_refuses_unknown_roles(tokenizer: Any) -> None:
    with pytest.raises(Exception, match="unknown role"):
        rendered(tokenizer, [{"role": "narrator", "content": "It was night."}])


def test_model_has_learned(model: Any, tokenizer: Any, run: dict[str, Any]) -> None:
    """Unseen sentences are far less surprising to it than their token frequencies are."""
    ids = tokenizer(PIECE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = math.exp(model(input_ids=ids, labels=ids).loss.item())
    counts = torch.tensor(run["unigram_counts"], dtype=torch.float64) + 1
    unigram = math.exp(-(counts / counts.sum()).log()[ids[0, 1:]].mean().item())
    assert perplexity < unigram / 3
    assert perplexity < 3 * run["held_out"]["perplexity"]


def test_every_position_is_usable(model: Any, tokenizer: Any) -> None:
    """The end of a full window is predicted no worse than an earlier part of it."""
    body = tokenizer(" ".join([PIECE] * 8), add_special_tokens=False)["input_ids"][:1023]
    ids = torch.tensor([[tokenizer.bos_token_id, *body]])
    assert ids.shape[1] == 1024
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert nats[-128:].mean() < 1.1 * nats[:128].mean()


def test_answers_come_to_an_end(model: Any, tokenizer: Any) -> None:
    prompt = rendered(tokenizer, CONVERSATION[:2], answer_next=True)
    ids = torch.tensor([prompt] * 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=80)
    answers = out[:, len(prompt) :]
    ended = (answers == tokenizer.eos_token_id).any(dim=1)
    assert ended.any()
    roles = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|system|>", "<|user|>", "<|assistant|>"])
    assert not torch.isin(answers, torch.tensor(roles)).any()


def test_card_is_rendered_from_the_figures(script: ModuleType, run: dict[str, Any], tmp_path: Path) -> None:
    card = (MODEL_DIR / "README.md").read_text(encoding="utf-8")
    shutil.copy(MODEL_DIR / "training.json", tmp_path)
    script.main(["--card-only", "--output", str(tmp_path)])
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card
    held = run["held_out"]
    for figure in ("loss", "perplexity", "bits_per_byte", "perplexity_per_byte", "unigram_perplexity"):
        assert str(held[figure]) in card
    for value in (run["steps"], run["minutes"], run["command"], run["weights_sha256"], run["machine"]):
        assert str(value) in card


def test_figures_agree_with_each_other(run: dict[str, Any]) -> None:
    held = run["held_out"]
    assert held["perplexity"] == pytest.approx(math.exp(held["loss"]), rel=1e-3)
    assert held["bits_per_byte"] == pytest.approx(held["loss"] * held["tokens"] / held["bytes"] / math.log(2), rel=1e-3)
    assert held["perplexity_per_byte"] == pytest.approx(2 ** held["bits_per_byte"], rel=1e-3)
    for figure in ("tokens", "bytes"):
        assert held[figure] == sum(text[figure] for text in run["per_text"])
    assert len(run["unigram_counts"]) == run["model"]["vocab_size"]
    assert f"--steps {run['steps']} " in run["command"]
    assert run["history"][-1]["step"] == run["steps"]


@pytest.fixture
def tiny_texts(tmp_path: Path) -> list[Path]:
    """A "novel" with what Project Gutenberg puts around one, and a "play"."""
    paragraphs = [
        f"The {who} looked at the {what}\nand said nothing. “It’s late,” said the {other}."
        for who in ("prince", "doctor", "old nurse")
        for what in ("snow", "river", "empty road")
        for other in ("count", "soldier")
    ]
    header = "\ufeffA licence text.\n\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n\n"
    footer = "\n\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\n\nMore of the licence.\n"
    novel, play = tmp_path / "novel.txt", tmp_path / "play.txt"
    novel.write_text(header + "CHAPTER I\n\n" + "\n\n".join(paragraphs) + footer, encoding="utf-8")
    speeches = [
        f"{name}:\nWhat say you, {whom}?\nThe night is dark."
        for name in ("KING", "Fool", "First Lord")
        for whom in ("sir", "my lord", "friend", "cousin")
    ]
    play.write_text("\n\n".join(speeches), encoding="utf-8")
    return [novel, play]


def test_texts_are_read_as_what_they_are(script: ModuleType, tiny_texts: list[Path]) -> None:
    novel, play = (script.read_text(path, 0.1) for path in tiny_texts)
    assert (novel.kind, play.kind) == ("novel", "play")
    whole = "\n".join([*novel.train, *novel.held_out])
    assert "licence" not in whole
    assert "PROJECT GUTENBERG" not in whole
    assert novel.train[1] == 'The prince looked at the snow and said nothing. "It\'s late," said the count.'
    assert "CHAPTER I" not in script.turns(novel, novel.train)
    assert script.turns(play, play.train)[0] == "What say you, sir?\nThe night is dark."
    for text in (novel, play):
        assert text.held_out
        assert not set(text.held_out) & set(text.train)


def test_training_is_reproducible(script: ModuleType, tiny_texts: list[Path], tmp_path: Path) -> None:
    def trained(name: str, *more: str) -> dict[str, Any]:
        command = ["--text", *map(str, tiny_texts), "--output", str(tmp_path / name), "--device", "cpu"]
        command += ["--vocab-size", "300", "--hidden-size", "64", "--layers", "1", "--context", "64"]
        command += [
            "--batch-tokens",
            "128",
            "--held-out",
            "0.1",
            "--sample-tokens",
            "4",
            "--threads",
            str(torch.get_num_threads()),
        ]
        with torch.random.fork_rng(devices=[]):
            script.main([*command, *more])
        figures: dict[str, Any] = json.loads((tmp_path / name / "training.json").read_text(encoding="utf-8"))
        return figures

    first = trained("first", "--steps", "3", "--seed", "5")
    again = trained("again", "--steps", "3", "--seed", "5")
    other = trained("other", "--steps", "3", "--seed", "6")
    timed = trained("timed", "--minutes", "0.005")

    assert first["weights_sha256"] == again["weights_sha256"]
    for figure in ("held_out", "history", "samples", "command"):
        assert first[figure] == again[figure]
    assert first["weights_sha256"] != other["weights_sha256"]
    assert first["steps"] == 3
    assert first["tokens_seen"] == 3 * 128
    assert str(tmp_path) not in (tmp_path / "first" / "README.md").read_text(encoding="utf-8")
    assert timed["steps"] >= 1
    assert not timed["reproducible"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    ids = tokenizer("The prince", return_tensors="pt")["input_ids"]
    assert model(ids).logits.shape == (1, ids.shape[1], 300)
