"""What of a chat stays when it outgrows the window: the system part, wherever a template has it, and whole messages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.chat_fixtures import plain_answer, tiny_model, tiny_tokenizer
from transformers import LlamaForCausalLM

from hf_attnstore import AttentionStore, ChatSession
from hf_attnstore.chat.session import ContextWindowError

WINDOW = 160
SYSTEM = "the old prince said that nothing was there"
TEXTS = ("the letter", "what did the mother of the other say", "and then", "so the officer rose and answered")
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


@dataclass(frozen=True)
class Style:
    """A chat template, and its tokens."""

    name: str
    template: str
    special: tuple[str, ...]
    end: str
    takes_system: bool = True


def _loop(before: str, message: str, generation: str) -> str:
    return (
        f"{before}{{%- for m in messages -%}}{message}{{%- endfor -%}}"
        f"{{%- if add_generation_prompt -%}}{generation}{{%- endif -%}}"
    )


_CHATML = (
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}",
    "{{ '<|im_start|>assistant\\n' }}",
)
_INST = (
    "{%- if m['role'] == 'user' -%}{{ '[INST] ' + (system if WHICH else '') + m['content'] + '[/INST]' }}"
    "{%- elif m['role'] == 'assistant' -%}{{ ' ' + (m['content'] | trim) + '</s>' }}{%- endif -%}"
)
_SYSTEM_OF_INST = (
    "{{- '<s>' -}}{%- set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}"
    "{%- set first = 1 if system else 0 -%}"
)
STYLES = (
    Style("chatml", _loop("", *_CHATML), ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    Style(
        "default system text",
        _loop(
            "{%- if messages[0]['role'] != 'system' -%}"
            "{{- '<|im_start|>system\\nYou are a helpful AI assistant named SmolLM<|im_end|>\\n' -}}{%- endif -%}",
            *_CHATML,
        ),
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    Style(
        "llama 3",
        _loop(
            "{{- '<|begin_of_text|>' -}}",
            "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
            "{{ (m['content'] | trim) + '<|eot_id|>' }}",
            "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}",
        ),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    Style(
        "gemma",
        _loop(
            "{{- '<bos>' -}}{%- set ns = namespace(system='') -%}",
            "{%- if m['role'] == 'system' -%}{%- set ns.system = m['content'] + '\\n\\n' -%}{%- else -%}"
            "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' + ns.system }}"
            "{{ (m['content'] | trim) + '<end_of_turn>\\n' }}{%- set ns.system = '' -%}{%- endif -%}",
            "{{ '<start_of_turn>model\\n' }}",
        ),
        ("<bos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
    ),
    Style(
        "mistral, system in the first message",
        _loop(_SYSTEM_OF_INST, _INST.replace("WHICH", "loop.index0 == first"), ""),
        ("<s>", "[INST]", "[/INST]", "</s>"),
        "</s>",
    ),
    Style(
        "mistral, system in the last message",
        _loop(_SYSTEM_OF_INST, _INST.replace("WHICH", "loop.last"), ""),
        ("<s>", "[INST]", "[/INST]", "</s>"),
        "</s>",
    ),
    Style(
        "no special tokens", _loop("", "{{ m['role'] + ': ' + m['content'] + '\\n' }}", "{{ 'assistant: ' }}"), (), ""
    ),
)


def dressed(style: Style, window: int = WINDOW) -> tuple[Any, LlamaForCausalLM, LlamaForCausalLM]:
    """A tokenizer that speaks in a style, and a model of one layer, twice. What one layer keeps of a token depends on
    that token alone, so where others are dropped it answers as if they had never been there."""
    tokenizer = tiny_tokenizer(style.template, vocabulary=190)
    tokenizer.add_tokens(list(style.special), special_tokens=True)
    models = []
    for _ in range(2):
        model = tiny_model(tokenizer, window=window, layers=1)
        assert model.generation_config is not None
        model.generation_config.suppress_tokens += tokenizer.convert_tokens_to_ids(list(style.special))
        models.append(model)
    return tokenizer, models[0], models[1]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttentionStore]:
    with AttentionStore(tmp_path / "store", block_size=16) as opened:
        yield opened


def rendered(chat: ChatSession, dropped: int, messages: list[dict[str, str]]) -> str:
    """What the template makes of the conversation up to its last message, without its first turns."""
    first = 1 if messages[0]["role"] == "system" else 0
    some = [*messages[:first], *messages[first + 2 * dropped :]]
    return str(chat.tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=True))


@pytest.mark.parametrize("system", [SYSTEM, None], ids=["system", "none"])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_a_chat_past_its_window_is_its_system_part_and_its_last_turns(
    style: Style, system: str | None, store: AttentionStore
) -> None:
    tokenizer, model, plain = dressed(style)
    gone = cuts = reused = 0
    for number in range(15):
        chat = ChatSession(model, tokenizer, store, "alice", system, **GREEDY)
        chat.send(TEXTS[number % 4])
        assert chat.stats is not None
        stats = chat.stats.cache
        assert chat.stats.finish == "length"
        assert stats.prompt_tokens == stats.reused_tokens + stats.prefilled_tokens + stats.dropped_tokens
        held = store.tokens("alice")
        shown, answer = held[:-9], chat.token_ids[-10:]
        assert len(held) <= WINDOW
        assert answer == plain_answer(plain, shown, **GREEDY)
        if stats.dropped_tokens:
            # what is in view is what the template makes of whole turns, and of the system message; but for a space
            # before a word, which is in a token with the word
            earlier = chat.history[:-1]
            text = tokenizer.decode(shown)
            found = [n for n in range(gone, number + 1) if rendered(chat, n, earlier).split() == text.split()]
            assert found, text
            cuts += found[0] > gone
            gone = found[0]
            assert system is None or system in text
        if number and stats.reused_tokens > 1 and stats.truncation != "recomputed":
            reused += stats.reused_tokens
    assert cuts > 1
    assert gone < 15
    assert reused > 200 or "last" in style.name  # where the system text moves, what follows its old place is new
    if style.name.startswith("default") and system is None:
        assert "named SmolLM" in tokenizer.decode(store.tokens("alice"))


def test_a_number_of_tokens_to_keep_is_made_up_to_whole_turns(store: AttentionStore) -> None:
    tokenizer, model, plain = dressed(STYLES[0])
    first: list[int] = []
    for number in range(16):
        chat = ChatSession(model, tokenizer, store, "alice", SYSTEM, keep_first=30, **GREEDY)
        chat.send(TEXTS[number % 4])
        first = first or chat.token_ids
    assert chat.stats is not None
    assert chat.stats.cache.dropped_tokens > 100
    held = store.tokens("alice")
    assert held[: len(first)] == first  # the first turn ends after the 30th token
    assert chat.token_ids[-10:] == plain_answer(plain, held[:-9], **GREEDY)
    text = tokenizer.decode(held[:-9])
    assert any(text == tokenizer.decode(first) + rest for rest in _ends(chat, tokenizer))


def _ends(chat: ChatSession, tokenizer: Any) -> list[str]:
    """What the template writes after the first turn, without the turns that follow it."""
    ends = []
    for dropped in range(1, 16):
        messages = [*chat.history[:3], *chat.history[3 + 2 * dropped : -1]]
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        before = str(tokenizer.apply_chat_template(chat.history[:3], tokenize=False))
        ends.append(whole[len(before) - len("<|im_end|>\n") :])
    return ends


def test_only_what_has_to_go_goes_if_a_whole_share_would_be_everything(store: AttentionStore) -> None:
    """One long turn and a short one: dropping half of the tokens, in whole turns, would leave nothing."""
    tokenizer, model, _ = dressed(STYLES[0], window=128)
    chat = ChatSession(model, tokenizer, store, "alice", **GREEDY)
    chat.send("the letter")
    chat.send("nothing and the other officer answered that " * 6)
    chat.send("and then")
    assert chat.stats is not None
    assert 0 < chat.stats.cache.dropped_tokens < 60
    assert tokenizer.decode(store.tokens("alice")).count("nothing and the other") == 6


def test_where_no_turn_can_be_dropped_tokens_are(store: AttentionStore) -> None:
    """Tools answer all the time, and there is one message of the user's."""
    tokenizer, model, plain = dressed(STYLES[0])
    chat = ChatSession(model, tokenizer, store, "alice", SYSTEM, **GREEDY)
    chat.send("the letter")
    for number in range(10):
        chat.send(TEXTS[number % 4], role="tool")
    assert chat.stats is not None
    assert chat.stats.cache.dropped_tokens > 0
    held = store.tokens("alice")
    assert SYSTEM in tokenizer.decode(held)
    assert chat.token_ids[-10:] == plain_answer(plain, held[:-9], **GREEDY)


def test_a_system_part_without_room_beside_it_is_an_error(store: AttentionStore) -> None:
    tokenizer, model, _ = dressed(STYLES[0], window=64)
    chat = ChatSession(model, tokenizer, store, "alice", f"{SYSTEM} " * 3, max_new_tokens=4, do_sample=False)
    chat.send("the letter")
    history = chat.history
    with pytest.raises(ContextWindowError, match="leaves no room"):
        chat.send("and then the letter " * 10)
    assert chat.history == history


def test_nothing_is_rendered_twice_before_the_window_is_full(
    store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, model, _ = dressed(STYLES[0], window=512)
    chat = ChatSession(model, tokenizer, store, "alice", SYSTEM, **GREEDY)
    renderings = []
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(
        type(tokenizer), "apply_chat_template", lambda *args, **kw: (renderings.append(1), render(*args, **kw))[1]
    )
    for text in TEXTS:
        chat.send(text)
    assert len(renderings) == len(TEXTS)
