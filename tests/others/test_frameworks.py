"""Frameworks that people build on transformers with, over an attached model: equal answers, and the history reused.

Their packages are the extra `frameworks`; each test is skipped where its package is not installed. docs/frameworks.md
has the same lines as recipes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from hf_attnstore import Attached, AttentionStore, TurnStats, attach

MODEL = str(Path(__file__).parents[2] / "examples" / "small-model")
SAID = (
    "What news from the army?",
    "And what did the prince say of it?",
    "Who came to the house that evening?",
    "Then what was to be done?",
)
NEW = 20
Messages = list[dict[str, str]]
Answer = Callable[[Messages], str]


def load() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(MODEL)


def text_generation() -> tuple[Any, Any]:
    model, tokenizer = load()
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
    return model, pipeline("text-generation", model=model, tokenizer=tokenizer, **settings)


def smolagents() -> tuple[Any, Answer]:
    models = pytest.importorskip("smolagents")
    llm = models.TransformersModel(MODEL, device_map="cpu", torch_dtype="float32", max_new_tokens=NEW, do_sample=False)

    def answer(messages: Messages) -> str:
        parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return str(llm.generate(parts).content)

    return llm.model, answer


def smolagents_streamed() -> tuple[Any, Answer]:
    models = pytest.importorskip("smolagents")
    llm = models.TransformersModel(MODEL, device_map="cpu", torch_dtype="float32", max_new_tokens=NEW, do_sample=False)

    def answer(messages: Messages) -> str:  # it generates in a thread of its own
        parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        return "".join(delta.content or "" for delta in llm.generate_stream(parts))

    return llm.model, answer


def langchain() -> tuple[Any, Answer]:
    huggingface = pytest.importorskip("langchain_huggingface")
    kinds = pytest.importorskip("langchain_core.messages")
    model, pipe = text_generation()
    chat = huggingface.ChatHuggingFace(llm=huggingface.HuggingFacePipeline(pipeline=pipe), tokenizer=pipe.tokenizer)
    made = {"user": kinds.HumanMessage, "assistant": kinds.AIMessage}
    return model, lambda messages: str(chat.invoke([made[m["role"]](m["content"]) for m in messages]).content)


def langchain_without_chat() -> tuple[Any, Answer]:
    huggingface = pytest.importorskip("langchain_huggingface")
    model, pipe = text_generation()
    llm = huggingface.HuggingFacePipeline(pipeline=pipe)

    def answer(messages: Messages) -> str:
        return str(llm.invoke(pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)))

    return model, answer


def llama_index() -> tuple[Any, Answer]:
    made = pytest.importorskip("llama_index.llms.huggingface")
    message = pytest.importorskip("llama_index.core.llms").ChatMessage
    model, tokenizer = load()
    llm = made.HuggingFaceLLM(
        model=model, tokenizer=tokenizer, max_new_tokens=NEW, context_window=1024, generate_kwargs={"do_sample": False}
    )
    return model, lambda messages: str(llm.chat([message(**m) for m in messages]).message.content)


def haystack() -> tuple[Any, Answer]:
    made = pytest.importorskip("haystack_integrations.components.generators.transformers")
    message = pytest.importorskip("haystack.dataclasses").ChatMessage
    settings = {"max_new_tokens": NEW, "do_sample": False}
    generator = made.TransformersChatGenerator(model=MODEL, task="text-generation", generation_kwargs=settings)
    generator.warm_up()
    kinds = {"user": message.from_user, "assistant": message.from_assistant}

    def answer(messages: Messages) -> str:
        return str(generator.run([kinds[m["role"]](m["content"]) for m in messages])["replies"][0].text)

    return generator.pipeline.model, answer


def outlines() -> tuple[Any, Answer]:
    package = pytest.importorskip("outlines")
    model, tokenizer = load()
    llm, shape = package.from_transformers(model, tokenizer), package.regex("[A-Za-z ,.']{10,60}")
    chat = pytest.importorskip("outlines.inputs").Chat
    return model, lambda messages: str(llm(chat(messages), shape, max_new_tokens=NEW, do_sample=False))


def xgrammar() -> tuple[Any, Answer]:
    package = pytest.importorskip("xgrammar")
    processor = pytest.importorskip("xgrammar.contrib.hf").LogitsProcessor
    model, tokenizer = load()
    info = package.TokenizerInfo.from_huggingface(tokenizer, vocab_size=model.config.vocab_size)
    shape = package.GrammarCompiler(info).compile_regex("[A-Za-z ,.']{10,60}")
    return model, lambda messages: generate(model, tokenizer, messages, logits_processor=[processor(shape)])


def peft() -> tuple[Any, Answer]:
    package = pytest.importorskip("peft")
    base, tokenizer = load()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = package.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = package.get_peft_model(base, config).eval()
    return model, partial(generate, model, tokenizer)


def generate(model: Any, tokenizer: Any, messages: Messages, **settings: Any) -> str:
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=NEW, do_sample=False, **settings)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


FRAMEWORKS = (
    smolagents, smolagents_streamed, langchain, langchain_without_chat, llama_index, haystack, outlines, xgrammar, peft,
)  # fmt: skip


@pytest.mark.parametrize("framework", FRAMEWORKS, ids=lambda framework: framework.__name__)
def test_a_framework_gives_the_same_answers_and_reuses_the_history(
    framework: Callable[[], tuple[Any, Answer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "1"))
    model, answer = framework()

    def talk(attached: Attached | None) -> Messages:
        messages: Messages = []
        for said in SAID:
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": answer(messages)})
            if attached is not None and attached.last is not None:
                turns.append(attached.last)
        return messages

    turns: list[TurnStats] = []
    expected = talk(None)
    with AttentionStore(tmp_path / "store", block_size=16) as store, attach(model, store) as attached:
        assert talk(attached) == expected
    assert len(turns) == len(SAID)
    for before, now in pairwise(turns):
        assert now.reused_tokens >= 0.9 * before.prompt_tokens
        assert now.prefilled_tokens == now.prompt_tokens - now.reused_tokens
    history = turns[2].prompt_tokens + turns[2].generated_tokens
    assert turns[3].reused_tokens >= 0.9 * history
