"""Models that reason: what a template cuts out of earlier answers, and prefilling the rest before it is asked for."""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chat_fixtures import APPEND_ONLY, FORGETFUL, plain_answer, tiny_model
from transformers import AutoTokenizer, LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerBase
from typer.testing import CliRunner

from hf_attnstore import AttentionStore, ChatSession, SessionBusyError
from hf_attnstore.cache.generate import prefill as prefilling
from hf_attnstore.chat import prefill_ahead as canonical
from hf_attnstore.chat.channels import answer_content
from hf_attnstore.chat.model import small_model_path
from hf_attnstore.chat.prefill_ahead import PLACEHOLDERS, BackgroundWork, certain_beginning
from hf_attnstore.cli import app as cli
from hf_attnstore.lab.bench.template_survey import read_templates, survey
from hf_attnstore.lab.bench.thinking_styles import STYLES, Script, Style, dress, fit, reasoned
from hf_attnstore.lab.families.tiny import build, families

REASONING, ANSWER = 40, 12
MESSAGES = ["the old prince looked at the letter", "and then", "what did the mother say", "so"]
BACKGROUND = "attnstore-canonicalize"


class Talk:
    """A style, and models that speak in it: one that a store may touch, and one that none ever does."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        style: Style,
        make: Callable[[Any], Any] = lambda tokenizer: tiny_model(tokenizer, window=2048),
    ) -> None:
        self.style = style
        self.tokenizer: Any = dress(tokenizer, style)
        self.model, self.plain = (make(self.tokenizer) for _ in range(2))
        for model in (self.model, self.plain):
            fit(model, self.tokenizer)

    def steps(self, turn: int) -> list[int | None]:
        return reasoned(self.tokenizer, self.style, range(400 + turn, 400 + turn + REASONING), ANSWER)

    def kwargs(self, turn: int) -> dict[str, Any]:
        steps = self.steps(turn)
        script = LogitsProcessorList([Script(steps, self.tokenizer)])
        return {"logits_processor": script, "max_new_tokens": len(steps), "do_sample": False}

    def send(self, chat: ChatSession, text: str, turn: int) -> BackgroundWork | None:
        """A turn, whose tokens must be those of a model without a store."""
        prompt = chat.prompt_ids(text)
        chat.send(text, **self.kwargs(turn))
        expected = plain_answer(self.plain, prompt, **self.kwargs(turn))
        assert chat.token_ids == prompt + expected
        assert len(set(expected)) > REASONING  # most of the answer itself is the model's own
        assert chat.stats is not None
        assert chat.stats.reused_tokens + chat.stats.prefilled_tokens == len(prompt)
        return chat.stats.background

    def new_tokens(self, chat: ChatSession, text: str) -> int:
        """Tokens that the template makes of a message, and of what it writes around it, as part of a conversation."""
        return self.new_tokens_of(chat.tokenizer, text) - 1  # alone it begins with <|bos|>

    @staticmethod
    def new_tokens_of(tokenizer: Any, text: str) -> int:
        messages = [{"role": "user", "content": text}]
        alone = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer.encode(alone, add_special_tokens=False))


@pytest.fixture(scope="module")
def small_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(small_model_path())


@pytest.fixture(scope="module", params=STYLES, ids=lambda style: style.name)
def talk(request: pytest.FixtureRequest, small_tokenizer: Any) -> Talk:
    return Talk(small_tokenizer, request.param)


@pytest.fixture(scope="module")
def tags(small_tokenizer: Any) -> Talk:
    return Talk(small_tokenizer, STYLES[0])


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttentionStore]:
    with AttentionStore(tmp_path / "store", block_size=16) as opened:
        yield opened


def agreement(a: list[int], b: list[int]) -> int:
    return len(certain_beginning([a, b]))


def is_busy(store: AttentionStore, session: str) -> bool:
    try:
        store.lock_session(session, 0).release()
    except SessionBusyError:
        return True
    return False


class Meddler:
    """Does something in the background thread, before the forward of a given number."""

    def __init__(self, model: LlamaForCausalLM, act: Callable[[], object], number: int = 0) -> None:
        self.forwards = 0
        self._act, self._number = act, number
        self._hook = model.register_forward_pre_hook(self._before)

    def _before(self, *_: Any) -> None:
        if threading.current_thread().name == BACKGROUND:
            self.forwards += 1
            if self.forwards == self._number + 1:
                self._act()

    _before.__module__ = "hf_attnstore.testing"  # a hook of the package's own, which is no part of what computes

    def __enter__(self) -> Meddler:
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


# what is prefilled, and what comes out


def test_without_canonicalize_reuse_goes_to_the_divergence(talk: Talk, store: AttentionStore) -> None:
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice")
    for turn, text in enumerate(MESSAGES):
        held, prompt = chat.token_ids[:-1], chat.prompt_ids(text)
        assert talk.send(chat, text, turn) is None
        assert chat.stats is not None
        assert chat.stats.reused_tokens == agreement(held, prompt)
        assert turn == 0 or chat.stats.reused_tokens < len(held) - REASONING
        assert turn == 0 or chat.stats.prefilled_tokens > talk.new_tokens(chat, text) + ANSWER // 2


def test_with_canonicalize_a_turn_prefills_its_message_only(talk: Talk, store: AttentionStore) -> None:
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)
    before: BackgroundWork | None = None
    for turn, text in enumerate(MESSAGES):
        held = chat.token_ids[:-1]
        work = talk.send(chat, text, turn)
        assert chat.stats is not None
        if before is not None:
            assert agreement(held, chat.token_ids) < len(held) - REASONING  # what the template has cut out is gone
            assert chat.stats.reused_tokens == before.reused_tokens + before.prefilled_tokens
            assert chat.stats.prefilled_tokens <= talk.new_tokens(chat, text)
            assert chat.stats.cache.loaded_bytes == 0  # it is all in the cache
        chat.wait()
        assert work is not None
        assert work.outcome == "done"
        assert work.reused_tokens == agreement(chat.token_ids, chat.prompt_ids("so"))
        assert ANSWER // 2 < work.prefilled_tokens < ANSWER + REASONING
        assert work.seconds > 0
        before = work


def test_a_conversation_goes_on_in_a_store_opened_anew(talk: Talk, tmp_path: Path) -> None:
    for turn, text in enumerate(MESSAGES):
        with AttentionStore(tmp_path / "store", block_size=16) as store:
            chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)
            work = talk.send(chat, text, turn)
            assert chat.stats is not None
            if turn:
                assert chat.stats.prefilled_tokens <= talk.new_tokens(chat, text)
                assert chat.stats.cache.loaded_bytes > 0
        assert work is not None
        assert work.outcome == "done"  # closing the store waited for it
    with AttentionStore(tmp_path / "store") as store:
        messages = ChatSession(talk.model, talk.tokenizer, store, "alice").history
        assert [m["role"] for m in messages] == ["user", "assistant"] * len(MESSAGES)
        again = ChatSession(talk.model, talk.tokenizer, store, "alice")
        ids = again.prompt_ids("so")
        kept = store.tokens("alice")
        assert kept == ids[: len(kept)]
        assert len(ids) - len(kept) <= talk.new_tokens(again, "so")


def test_a_store_in_memory_alone_serves_too(tags: Talk, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "store", block_size=16, disk=0) as store:
        chat = ChatSession(tags.model, tags.tokenizer, store, "alice", canonicalize=True)
        for turn, text in enumerate(MESSAGES[:2]):
            tags.send(chat, text, turn)
            chat.wait()
        assert chat.stats is not None
        assert chat.stats.prefilled_tokens <= tags.new_tokens(chat, MESSAGES[1])


@pytest.mark.parametrize("family", ["qwen3_next", "mamba2", "lfm2"])
@pytest.mark.parametrize("style", STYLES, ids=lambda style: style.name)
def test_running_states_go_on_at_the_end_of_what_was_prefilled(
    small_tokenizer: Any, tmp_path: Path, style: Style, family: str
) -> None:
    if family not in families():
        pytest.skip(f"this transformers has no {family}")
    talk = Talk(small_tokenizer, style, lambda _: build(family))
    for turn, text in enumerate(MESSAGES[:3]):
        with AttentionStore(tmp_path / "store", block_size=16) as store:
            chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)
            work = talk.send(chat, text, turn)
            assert chat.stats is not None
            assert chat.stats.cache.recomputed == ""
            if turn:
                assert chat.stats.prefilled_tokens <= talk.new_tokens(chat, text)
        assert work is not None
        assert work.outcome == "done"
        assert work.prefilled_tokens > ANSWER // 2


def test_answers_in_channels_become_messages_that_their_template_takes(
    small_tokenizer: Any, store: AttentionStore
) -> None:
    talk = Talk(small_tokenizer, STYLES[2])
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)
    answer = chat.send("the letter", **talk.kwargs(0))
    reasoning = talk.tokenizer.decode(range(400, 400 + REASONING))
    assert chat.history[1] == {"role": "assistant", "content": answer, "thinking": reasoning}
    assert "analysis" not in answer
    assert ChatSession(talk.model, talk.tokenizer, store, "alice").history == chat.history
    cut = {**talk.kwargs(1), "max_new_tokens": 20}
    assert chat.send("and then", **cut) == ""  # it only reasoned
    assert len(chat.history[3]["thinking"]) > 10
    talk.send(chat, "so", 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", {"content": "hello"}),
        ("<|channel|>final<|message|>hello<|return|>", {"content": "hello"}),
        ("<|channel|>analysis<|message|>a <b<|end|><|start|>assistant<|channel|>final<|message|>x\ny<|return|>",
         {"content": "x\ny", "thinking": "a <b"}),
        ("<|channel|>analysis<|message|>cut of", {"content": "", "thinking": "cut of"}),
        ("<|channel|>commentary to=f <|constrain|>json<|message|>{}<|call|>", {"content": "", "thinking": "{}"}),
    ],
)  # fmt: skip
def test_channels_are_told_apart(text: str, message: dict[str, str]) -> None:
    assert answer_content(text, "hello") == message


def test_text_about_channels_is_text() -> None:
    said = "write <|channel|>final<|message|>"
    assert answer_content(said + "<|end|>", said) == {"content": said}


# templates that leave little or nothing to do


def test_a_template_that_only_appends_has_nothing_done(tags: Talk, store: AttentionStore) -> None:
    tokenizer = dress(tags.tokenizer, STYLES[0])
    tokenizer.chat_template = APPEND_ONLY
    chat = ChatSession(tags.model, tokenizer, store, "alice", canonicalize=True, max_new_tokens=8, do_sample=False)
    with Meddler(tags.model, lambda: None) as seen:
        for text in MESSAGES:
            held = len(chat.token_ids)
            chat.send(text)
            assert chat.stats is not None
            assert chat.stats.background == BackgroundWork()
            assert chat.stats.reused_tokens == max(held - 1, 0)
    assert seen.forwards == 0


@pytest.mark.parametrize("place", ["first", "before the last answer"])
def test_what_depends_on_the_next_message_is_left_to_the_next_turn(
    tags: Talk, store: AttentionStore, place: str
) -> None:
    mark = "{{- '<|system|>' + messages[-1]['content'] | trim -}}"
    where = "{%- for message in messages -%}\n  {%- set text" if place == "first" else "{{- '<|' + message['role']"
    condition = "" if place == "first" else "{%- if loop.index0 == messages | length - 2 -%}" + mark + "{%- endif -%}"
    tokenizer = dress(tags.tokenizer, STYLES[0])
    template = STYLES[0].template
    assert template.count(where) == 1
    tokenizer.chat_template = template.replace(where, (condition or mark) + where)
    chat = ChatSession(tags.model, tokenizer, store, "alice", canonicalize=True)
    for turn, text in enumerate(MESSAGES[:3]):
        prompt = chat.prompt_ids(text)
        chat.send(text, **tags.kwargs(turn))
        chat.wait()
        assert chat.token_ids == prompt + plain_answer(tags.plain, prompt, **tags.kwargs(turn))
        assert chat.stats is not None
        assert chat.stats.background is not None
        certain = certain_beginning([chat.prompt_ids(placeholder) for placeholder in PLACEHOLDERS])
        work = chat.stats.background
        if place == "first":
            assert len(certain) == 2  # <|bos|>, <|system|>
            assert work.outcome == "nothing to do"
        elif turn:
            assert chat.tokenizer.decode(certain).endswith("<|system|>")
            assert work.outcome in ("done", "nothing to do")
            assert work.prefilled_tokens + work.reused_tokens in (0, len(certain))


def test_only_what_no_message_changes_is_certain() -> None:
    assert certain_beginning([[1, 2, 3], [1, 2, 4, 5]]) == [1, 2]
    assert certain_beginning([[1, 2], [1, 2, 4], [1]]) == [1]
    assert certain_beginning([[], [1]]) == []


# beside the next turn


def test_a_message_that_comes_meanwhile_stops_it_and_is_answered_as_ever(
    talk: Talk, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefilling, "CHUNK", 8)
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)
    reached, free = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        assert free.wait(20)

    with Meddler(talk.model, hold):
        work = talk.send(chat, "the letter", 0)
        assert work is not None
        assert reached.wait(20)
        assert work.outcome == "running"
        release = threading.Timer(0.3, free.set)
        release.start()
        prompt, held = chat.prompt_ids("and then"), chat.token_ids[:-1]
        talk.send(chat, "and then", 1)
    assert (work.outcome, work.prefilled_tokens) == ("stopped", 8)
    assert chat.stats is not None
    assert chat.stats.reused_tokens == agreement(prompt, held) + 8  # what it had done is of use


def test_another_object_on_the_session_need_not_wait_either(
    tags: Talk, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefilling, "CHUNK", 8)
    chat = ChatSession(tags.model, tags.tokenizer, store, "alice", canonicalize=True)
    reached, free = threading.Event(), threading.Event()
    with Meddler(tags.model, lambda: (reached.set(), free.wait(20))):
        tags.send(chat, "the letter", 0)
        assert reached.wait(20)
        assert is_busy(store, "alice")
        threading.Timer(0.3, free.set).start()
        tags.send(ChatSession(tags.model, tags.tokenizer, store, "alice"), "and then", 1)
    assert chat.stats is not None
    assert chat.stats.background is not None
    assert chat.stats.background.outcome == "stopped"


@pytest.mark.parametrize("how", ["close the chat", "undo", "flush", "close the store"])
def test_who_ends_or_waits_is_not_kept_for_ever(
    tags: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(prefilling, "CHUNK", 8)
    store = AttentionStore(tmp_path / "store", block_size=16)
    chat = ChatSession(tags.model, tags.tokenizer, store, "alice", canonicalize=True)
    reached, free = threading.Event(), threading.Event()
    with Meddler(tags.model, lambda: (reached.set(), free.wait(20))):
        work = tags.send(chat, "the letter", 0)
        assert work is not None
        assert reached.wait(20)
        threading.Timer(0.2, free.set).start()
        {"close the chat": chat.close, "undo": chat.undo, "flush": store.flush, "close the store": store.close}[how]()
    assert work.outcome == ("stopped" if how in ("close the chat", "undo") else "done")
    assert (work.prefilled_tokens == 8) == (work.outcome == "stopped")
    store.close()
    with AttentionStore(tmp_path / "store") as store:
        text = "and then"
        chat = ChatSession(tags.model, tags.tokenizer, store, "alice")
        tags.send(chat, text, 1)
        assert chat.stats is not None
        if work.outcome == "done":
            assert chat.stats.prefilled_tokens <= tags.new_tokens(chat, text)
        assert not store.verify().problems


def test_an_error_is_said_once_and_disturbs_no_turn(
    talk: Talk, store: AttentionStore, caplog: pytest.LogCaptureFixture
) -> None:
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)

    def fail() -> None:
        seen.forwards = 0
        raise RuntimeError("out of memory")

    with Meddler(talk.model, fail) as seen, caplog.at_level(logging.WARNING, "hf_attnstore"):
        for turn, text in enumerate(MESSAGES[:3]):
            work = talk.send(chat, text, turn)
            chat.wait()
            assert work is not None
            assert (work.outcome, work.prefilled_tokens) == ("failed", 0)
    assert caplog.text.count("out of memory") == 1
    assert not is_busy(store, "alice")
    talk.send(chat, MESSAGES[3], 3)
    chat.wait()
    assert chat.stats is not None
    assert chat.stats.background is not None
    assert chat.stats.background.outcome == "done"


def test_a_template_that_refuses_the_placeholders_is_such_an_error(
    tags: Talk, store: AttentionStore, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = dress(tags.tokenizer, STYLES[0])
    refuse = "{%- if messages[-1]['content'] == 'So' -%}{{- raise_exception('not so') -}}{%- endif -%}"
    tokenizer.chat_template = refuse + STYLES[0].template
    chat = ChatSession(tags.model, tokenizer, store, "alice", canonicalize=True)
    for turn, text in enumerate(MESSAGES[:2]):
        work = tags.send(chat, text, turn)
        assert work is not None
        assert work.outcome == "failed"
    assert caplog.text.count("not so") == 1


def test_a_session_deleted_meanwhile_does_not_come_back(
    tags: Talk, store: AttentionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    really = canonical.prefill

    def later(*args: Any) -> bool:
        assert free.wait(20)
        return really(*args)

    monkeypatch.setattr(canonical, "prefill", later)
    chat = ChatSession(tags.model, tags.tokenizer, store, "alice", canonicalize=True)
    work = tags.send(chat, "the letter", 0)
    store.delete("alice")
    free.set()
    chat.wait()
    assert work is not None
    assert (work.outcome, work.prefilled_tokens) == ("stopped", 0)
    store.flush()
    assert store.session_count() == 0
    assert store.stats()["disk_blocks"] == 0


def test_nothing_is_kept_of_a_model_that_is_changed_meanwhile(
    small_tokenizer: Any, store: AttentionStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prefilling, "CHUNK", 8)
    talk = Talk(small_tokenizer, STYLES[0])
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)

    def change(model: LlamaForCausalLM) -> None:
        model.model.layers[0].self_attn.k_proj.weight.data.mul_(1.5)

    with Meddler(talk.model, lambda: change(talk.model), number=1):
        work = talk.send(chat, "the letter", 0)
        chat.wait()
    kept = chat.token_ids[:-1]
    change(talk.plain)
    assert work is not None
    assert (work.outcome, work.prefilled_tokens) == ("stopped", 16)
    assert "the model was changed" in caplog.text
    assert store.tokens("alice") == kept
    chat.canonicalize = False
    talk.send(chat, "and then", 1)
    assert chat.stats is not None
    assert chat.stats.reused_tokens == 0


# histories that change


def test_an_edited_history_is_answered_as_without_the_store(talk: Talk, store: AttentionStore) -> None:
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True)
    for turn, text in enumerate(MESSAGES[:3]):
        talk.send(chat, text, turn)
        chat.wait()
    assert chat.undo() == MESSAGES[2]
    talk.send(chat, "nothing more that she could say", 2)
    chat.wait()
    assert chat.stats is not None
    assert chat.stats.prefilled_tokens <= talk.new_tokens(chat, "nothing more that she could say")
    answer = chat.history[-1]
    chat.retry(**talk.kwargs(2))  # greedy: the same again
    assert chat.history[-1] == answer
    assert chat.stats.prefilled_tokens <= talk.new_tokens(chat, "nothing more that she could say")
    chat.wait()
    other = ChatSession(talk.model, talk.tokenizer, store, "alice", "You are an officer.", canonicalize=True)
    talk.send(other, "and then", 3)
    other.wait()
    talk.send(other, "so", 4)
    assert other.stats is not None
    assert other.stats.prefilled_tokens <= talk.new_tokens(other, "so")


def test_a_fork_has_what_was_prefilled(tags: Talk, store: AttentionStore) -> None:
    chat = ChatSession(tags.model, tags.tokenizer, store, "alice", canonicalize=True)
    tags.send(chat, "the letter", 0)
    chat.wait()
    store.fork("alice", "bob")
    fork = ChatSession(tags.model, tags.tokenizer, store, "bob")
    tags.send(fork, "and then", 1)
    assert fork.stats is not None
    assert fork.stats.prefilled_tokens <= tags.new_tokens(fork, "and then")


def test_autocast_and_inference_mode_are_those_of_the_turn(tags: Talk, store: AttentionStore) -> None:
    chat = ChatSession(tags.model, tags.tokenizer, store, "alice", canonicalize=True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for turn, text in enumerate(MESSAGES[:3]):
            chat.send(text, **tags.kwargs(turn))  # its tokens depend on how bfloat16 rounds
            chat.wait()
            assert chat.stats is not None
            assert chat.stats.background is not None
            assert chat.stats.background.outcome == "done"
            assert turn == 0 or chat.stats.prefilled_tokens <= tags.new_tokens(chat, text)
    tags.send(chat, MESSAGES[3], 3)  # without autocast, nothing of that is used
    assert chat.stats is not None
    assert chat.stats.reused_tokens == 0


def test_a_chat_that_reasons_outlives_its_window(talk: Talk, store: AttentionStore) -> None:
    chat = ChatSession(talk.model, talk.tokenizer, store, "alice", canonicalize=True, window=192)
    dropped = 0
    for turn in range(10):
        prompt = chat.prompt_ids("and then")
        chat.send("and then", **talk.kwargs(turn))
        assert chat.stats is not None
        cache = chat.stats.cache
        assert cache.reused_tokens + cache.prefilled_tokens + cache.dropped_tokens == len(prompt)
        dropped = max(dropped, cache.dropped_tokens)
        chat.wait()
        assert chat.stats.background is not None
        assert chat.stats.background.outcome in ("done", "nothing to do")
        if not cache.dropped_tokens:
            assert chat.token_ids == prompt + plain_answer(talk.plain, prompt, **talk.kwargs(turn))
    assert dropped > 0


# in the terminal, and measured


def test_the_terminal_prefills_while_nobody_types(tags: Talk, tmp_path: Path) -> None:
    tokenizer = dress(tags.tokenizer, STYLES[0])
    tokenizer.chat_template = FORGETFUL.replace("[:(", "[(")  # of an earlier answer, the second half is shown
    path = tmp_path / "model"
    tags.plain.save_pretrained(path)
    tokenizer.save_pretrained(path)
    arguments = ["chat", "--session", "alice", "--model", str(path), "--store", str(tmp_path / "kept")]
    arguments += ["--max-new-tokens", "30", "--canonicalize"]
    found = []
    for typed in ("the old prince\n/quit\n", "and then\n/switch bob\nso\n/delete bob\n/switch alice\nso\n"):
        result = CliRunner().invoke(cli.app, arguments, input=typed, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        found += [int(n) for n in re.findall(r"prefilled (\d+) tokens", result.output)]
    assert len(found) == 4
    assert found[0] == tags.new_tokens_of(tokenizer, "the old prince")
    assert found[1] == tags.new_tokens_of(tokenizer, "and then") - 1  # <|user|> was certain
    with AttentionStore(tmp_path / "kept") as store:
        assert [info.name for info in store.sessions()] == ["alice"]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_bench_counts_and_compares(dtype: str, tags: Talk, tmp_path: Path) -> None:
    tags.plain.save_pretrained(tmp_path / "model")
    tags.tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["bench", "thinking", "--turns", "3", "--message", "8", "--reasoning", "16", "--answer", "12"]
    arguments += ["--model", str(tmp_path / "model"), "--dtype", dtype]
    result = CliRunner().invoke(cli.app, [*arguments, "--output", str(tmp_path)], env={"COLUMNS": "220"})
    assert result.exit_code == 0, result.output
    assert "store, canonicalize" in result.output
    record = json.loads((tmp_path / "thinking.json").read_text())
    assert [talk["style"] for talk in record["talks"]] == ["tags", "opened", "channels"]
    for talk in record["talks"]:
        for turn in talk["turns"][1:]:
            prefilled = turn["prefilled"]
            assert prefilled["recompute"] == turn["prompt_tokens"]
            assert prefilled["canonicalize"] < prefilled["store"] < prefilled["recompute"]
            assert prefilled["canonicalize"] < 20
            assert turn["background_tokens"] > 0
    assert (tmp_path / "thinking.png").stat().st_size > 10_000
    assert "like Qwen3" in (tmp_path / "thinking.md").read_text()


def test_the_published_results_show_what_it_saves() -> None:
    record = json.loads((small_model_path().parents[1] / "docs/results/thinking.json").read_text())
    for talk in record["talks"]:
        turns = talk["turns"]
        assert len(turns) == 20
        longest = record["lengths"]["message"] + 10
        assert all(turn["prefilled"]["canonicalize"] <= longest for turn in turns[1:])
        assert all(turn["prefilled"]["store"] > longest + record["lengths"]["answer"] // 2 for turn in turns[1:])


def test_the_survey_of_templates_sees_who_cuts_reasoning_and_what_that_leaves_to_prefill(tmp_path: Path) -> None:
    for style in STYLES:
        (tmp_path / f"{style.name}.jinja").write_text(style.template)
    (tmp_path / "none.jinja").write_text(APPEND_ONLY)
    (tmp_path / "keeps.jinja").write_text("{# reasoning stays #}" + APPEND_ONLY)
    (tmp_path / "field.jinja").write_text(
        APPEND_ONLY.replace("m['content']", "(m['thinking'] | default('')) + m['content']")
    )
    tokenizer = AutoTokenizer.from_pretrained(small_model_path())
    found = {one.name: one for one in survey(tokenizer, read_templates(tmp_path))}
    assert set(found) == {"tags", "opened", "keeps", "field"}  # two know of no reasoning
    assert {name: (one.in_text, one.in_field, one.opened) for name, one in found.items()} == {
        "tags": ("cut", "cut", False),
        "opened": ("cut", "cut", True),
        "keeps": ("kept", "cut", False),
        "field": ("kept", "kept", False),
    }
    assert found["keeps"].reused == found["keeps"].known > found["tags"].known / 2 > found["tags"].reused > 0
    result = CliRunner().invoke(
        cli.app, ["lab", "templates", str(tmp_path), "--model", "small", "--output", str(tmp_path / "found.md")]
    )
    assert result.exit_code == 0, result.output
    assert "4 of 6 templates" in (tmp_path / "found.md").read_text()
    assert CliRunner().invoke(cli.app, ["lab", "templates", str(tmp_path / "nowhere")]).exit_code == 2
