"""Models with running states: what of a conversation is reused where texts part from each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import APPEND_ONLY, SPECIAL, TEXT, plain_answer, tiny_tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast

from hf_attnstore import AttentionStore, ChatSession, attach, detach
from hf_attnstore.cache.pauses import BUDGET, choose_pauses
from hf_attnstore.errors import CacheUseError
from hf_attnstore.lab.families.tiny import build, families, tiny_config

pytestmark = pytest.mark.usefixtures("left_alone")

FAMILIES = ("qwen3_next", "falcon_h1", "lfm2", "mamba2", "bamba", "granitemoehybrid", "nemotron_h")
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
SYSTEM = " ".join(TEXT * 4)
# like templates that write an empty thought, or open one, before an answer, and have it in no earlier answer
TAIL_DROPPED = APPEND_ONLY.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|>there was nothing in the room: ' }}")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer(TAIL_DROPPED)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast) -> Any:
    return _built(request.param, tokenizer)


@pytest.fixture(scope="module")
def hybrid(tokenizer: PreTrainedTokenizerFast) -> Any:
    return _built("qwen3_next", tokenizer)


def _built(family: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    longer = {"max_position_embeddings": 2048} if hasattr(tiny_config(family), "max_position_embeddings") else {}
    model = build(family, vocab_size=len(tokenizer), **longer)
    model.config.eos_token_id = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=tokenizer.convert_tokens_to_ids(SPECIAL),
    )
    return model


def answers_as_plain(chat: ChatSession, model: Any, text: str) -> None:
    """`send(text)`, and the tokens that come out are those of plain `generate`."""
    prompt = chat.prompt_ids(text)
    chat.send(text)
    answer = chat.token_ids[len(prompt) :]
    detach(model)
    assert answer == plain_answer(model, prompt, **GREEDY)
    assert chat.stats is not None
    assert chat.stats.reused_tokens + chat.stats.prefilled_tokens == len(prompt)


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("template", [APPEND_ONLY, TAIL_DROPPED], ids=["append only", "tail dropped"])
def test_the_second_conversation_reuses_the_system_prompt(model: Any, store: AttentionStore, template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    shared = tokens_of(tokenizer, f"<|system|>{SYSTEM}<|end|>")
    assert shared > 150
    answers_as_plain(ChatSession(model, tokenizer, store, "alice", SYSTEM, **GREEDY), model, "what did he say?")
    chat = ChatSession(model, tokenizer, store, "bob", SYSTEM, **GREEDY)
    answers_as_plain(chat, model, "and the mother of the young man?")
    assert chat.stats is not None
    assert shared <= chat.stats.reused_tokens <= shared + 2
    assert chat.stats.cache.loaded_bytes > 0


def test_history_is_reused_though_the_template_drops_what_it_wrote_before_answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for number in range(4):
        with AttentionStore(tmp_path / "store", block_size=16) as store:  # each turn as in a process of its own
            chat = ChatSession(model, tokenizer, store, "alice", SYSTEM, **GREEDY)
            history = len(chat.token_ids)
            answers_as_plain(chat, model, TEXT[number % 3])
            assert chat.stats is not None
            assert chat.stats.reused_tokens >= 0.9 * history, number


def test_an_edited_last_message_reuses_the_history_before_it(
    model: Any, tokenizer: PreTrainedTokenizerFast, store: AttentionStore
) -> None:
    chat = ChatSession(model, tokenizer, store, "alice", SYSTEM, **GREEDY)
    for text in TEXT:
        chat.send(text)
    prompt = list(chat._prompt(chat._transcript.undone()[0], "nothing of that").ids)
    kept = len(prompt) - tokens_of(tokenizer, "nothing of that<|end|><|assistant|>there was nothing in the room: ")
    chat.edit(2, "nothing of that")
    assert chat.stats is not None
    assert 0.9 * kept <= chat.stats.reused_tokens <= kept
    assert chat.stats.prefilled_tokens == len(prompt) - chat.stats.reused_tokens
    answer = chat.token_ids[len(prompt) :]
    detach(model)
    assert answer == plain_answer(model, prompt, **GREEDY)


def test_plain_generate_knows_where_messages_end_by_the_tokens_that_end_them(model: Any, store: AttentionStore) -> None:
    """As templates of reasoning models do it: what was written before an answer is gone in the next prompt."""
    tokenizer = tiny_tokenizer(TAIL_DROPPED)
    attach(model, store)
    messages = [{"role": "system", "content": SYSTEM}]
    history = 0
    for number, text in enumerate(TEXT):
        messages.append({"role": "user", "content": text})
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer.encode(rendered, add_special_tokens=False)])
        store.flush()
        before = store.stats()["reused_tokens"]
        ours = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0, ids.shape[1] :].tolist()
        reused = store.stats()["reused_tokens"] - before
        detach(model)
        assert ours == plain_answer(model, ids[0].tolist(), **GREEDY)
        attach(model, store)
        answer = tokenizer.decode(ours, skip_special_tokens=True)
        kept = ids.shape[1] - tokens_of(tokenizer, f"<|assistant|>there was nothing in the room: <|user|>{text}<|end|>")
        assert reused >= (0.9 * history if number else 0)
        assert reused <= kept
        messages.append({"role": "assistant", "content": answer})
        history = ids.shape[1] - tokens_of(tokenizer, "<|assistant|>there was nothing in the room: ")
    other = [messages[0], {"role": "user", "content": "nothing of that"}]
    rendered = tokenizer.apply_chat_template(other, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([tokenizer.encode(rendered, add_special_tokens=False)])
    store.flush()
    before = store.stats()["reused_tokens"]
    model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    shared = tokens_of(tokenizer, f"<|system|>{SYSTEM}<|end|>")
    assert store.stats()["reused_tokens"] - before == shared


def test_where_nothing_says_where_messages_end_the_third_text_reuses_what_the_second_parted_from(
    model: Any, store: AttentionStore
) -> None:
    attach(model, store)
    shared = torch.arange(180)[None] % 100 + 8
    reused = []
    for number in range(3):
        ids = torch.cat([shared, torch.arange(30)[None] % 7 + 20 * (number + 1)], dim=1)
        store.flush()
        before = store.stats()["reused_tokens"]
        model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        reused.append(store.stats()["reused_tokens"] - before)
    assert reused == [0, 0, 180]


def test_checkpoints_within_a_prompt_keep_to_their_budget(
    hybrid: Any, tokenizer: PreTrainedTokenizerFast, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = ChatSession(hybrid, tokenizer, store, "alice", SYSTEM, **GREEDY)
    chat.send(TEXT[0])
    assert chat.stats is not None
    assert chat.stats.cache.checkpoints == 3  # after the system prompt, after the message, at the end of the turn
    monkeypatch.setattr("hf_attnstore.cache.begin.BUDGET", 100)
    other = ChatSession(hybrid, tokenizer, store, "bob", "another one: " + SYSTEM, **GREEDY)
    other.send(TEXT[0])
    assert other.stats is not None
    assert other.stats.cache.checkpoints == 2


@pytest.mark.parametrize("way", ["attach", "chat"])
def test_checkpoints_at_every_so_many_tokens_can_be_had_everywhere(
    hybrid: Any, tokenizer: PreTrainedTokenizerFast, store: AttentionStore, way: str
) -> None:
    ids = torch.arange(100)[None] % 90 + 8
    if way == "attach":
        attach(hybrid, store, checkpoint_every=40)
        hybrid.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        hybrid.generate(ids[:, :90], attention_mask=torch.ones_like(ids[:, :90]), **GREEDY)
        assert store.stats()["reused_tokens"] == 80
        with pytest.raises(CacheUseError, match="checkpoint_every"):
            attach(hybrid, store, checkpoint_every=0)
        return
    chat = ChatSession(hybrid, tokenizer, store, "alice", SYSTEM, checkpoint_every=40, **GREEDY)
    chat.send(TEXT[0])
    assert chat.stats is not None
    assert chat.stats.cache.checkpoints == 3 + len(range(40, len(chat.token_ids), 40))
    with pytest.raises(CacheUseError, match="checkpoint_every"):
        ChatSession(hybrid, tokenizer, store, "bob", checkpoint_every=0)


def test_pauses_are_few_in_order_and_within_the_prompt() -> None:
    marks = ([], [1], [20, 60], [20, 40, 60, 80, 95], [97, 98, 99, 100, 101])
    cases = itertools.product((0, 10, 60, 98), (99, 100), (0, 10, 58, 99), (None, 0, 1), marks)
    for first, last, parted, most, boundaries in cases:
        found = choose_pauses(first, last, parted=parted, boundaries=boundaries, most=most)
        assert found == sorted(set(found))
        assert all(first < place <= last for place in found)
        assert len(found) <= 1 + (4 if most is None else most)
        assert found == [] or found[-1] == last or found[-1] in boundaries
        assert boundaries or found[-1] == last


def test_what_a_template_writes_before_an_answer_is_left_out_of_the_last_checkpoint() -> None:
    assert choose_pauses(0, 199, boundaries=[100, 190]) == [100, 190]
    assert choose_pauses(0, 199, boundaries=[100, 150]) == [100, 150, 199]
    assert choose_pauses(190, 199, boundaries=[100, 190]) == []  # the same prompt again
    assert choose_pauses(193, 199, boundaries=[100, 190]) == [199]
    assert choose_pauses(0, 199, parted=104, boundaries=[100, 190]) == [100, 190]
    assert choose_pauses(0, 199, parted=140, boundaries=[100, 190]) == [100, 140, 190]
    assert choose_pauses(0, 199, parted=140, boundaries=[100, 190], most=1) == [140, 190]
    assert choose_pauses(0, 199, boundaries=[*range(20, 200, 20)]) == [20, 160, 180, 199]
    assert BUDGET >= 64 << 20
