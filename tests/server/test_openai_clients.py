"""OpenAI's own client: answers are those of plain generate, usage says what was reused, and that was not computed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from server.conftest import Plain
from support.api_server import NAME, ApiServer, agreed, noted, serving
from support.chat_fixtures import Says, plain_answer, tiny_model, tiny_tokenizer
from transformers.cli.serving import utils as serving_utils

from hf_attnstore.server import answer

GREEDY: dict[str, Any] = {"model": NAME, "max_tokens": 12, "temperature": 0}
SAID = ["the old prince looked at the letter", "and the mother rose", "they were to march at three", "nothing more"]


def client(server: ApiServer, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key=key, max_retries=0)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


class Told:
    """A conversation as the client tells it, and which of its tokens the server has computed."""

    def __init__(self, plain: Plain) -> None:
        self.plain = plain
        self.messages: list[Any] = []
        self.known: list[list[int]] = []

    def say(self, text: str) -> tuple[list[int], int, str]:
        """The prompt, how much of it is to be reused, and what plain generate answers."""
        self.messages.append(user(text))
        ids = self.plain.prompt(self.messages)
        answer = plain_answer(self.plain.model, ids, max_new_tokens=12, do_sample=False)
        reused = agreed(self.known, ids)
        self.known.append([*ids, *answer[:-1]])
        self.messages.append({"role": "assistant", "content": self.plain.text(answer)})
        return ids, reused, self.plain.text(answer)


def test_a_conversation_is_answered_as_by_plain_generate_and_only_new_tokens_are_computed(
    server: ApiServer, plain: Plain
) -> None:
    told = Told(plain)
    for number, text in enumerate(SAID):
        ids, reused, expected = told.say(text)
        raw = client(server).chat.completions.with_raw_response.create(messages=told.messages[:-1], **GREEDY)
        answer = raw.parse()
        assert answer.choices[0].message.content == expected
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == reused
        assert (reused > 0) == (number > 0)
        assert server.fed.take() == len(ids) - reused + 11
        said = noted(raw.headers["x-attnstore"])
        assert (said["reused"], said["prompt"]) == (str(reused), str(len(ids)))
        assert said["tier"] == ("memory" if number else "none")
        assert float(said["ttft"]) > 0


def test_streams_too_with_usage_in_the_last_chunk_and_by_the_asynchronous_client(
    server: ApiServer, plain: Plain
) -> None:
    told = Told(plain)

    async def talk() -> None:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as asking:
            for text in SAID:
                ids, reused, expected = told.say(text)
                heard, usage = "", None
                async for chunk in await asking.chat.completions.create(
                    messages=told.messages[:-1], stream=True, stream_options={"include_usage": True}, **GREEDY
                ):
                    heard += chunk.choices[0].delta.content or ""
                    usage = chunk.usage or usage
                assert heard == expected
                assert usage is not None
                assert usage.prompt_tokens_details.cached_tokens == reused
                assert server.fed.take() == len(ids) - reused + 11

    asyncio.run(talk())


def test_a_named_session_and_content_find_each_other(server: ApiServer, plain: Plain) -> None:
    ids = plain.prompt([user(SAID[0])])
    asking = client(server)
    first = asking.chat.completions.create(messages=[user(SAID[0])], **GREEDY)
    named = asking.chat.completions.create(messages=[user(SAID[0])], prompt_cache_key="alice", **GREEDY)
    other = asking.chat.completions.create(messages=[user(SAID[1])], prompt_cache_key="alice", **GREEDY)
    again = asking.chat.completions.create(messages=[user(SAID[0])], prompt_cache_key="alice", **GREEDY)
    cached = [a.usage.prompt_tokens_details.cached_tokens for a in (first, named, other, again)]  # type: ignore[union-attr]
    ids_of_other = plain.prompt([user(SAID[1])])
    assert cached == [0, len(ids) - 1, agreed([ids], ids_of_other), len(ids) - 1]
    assert first.choices[0].message.content == again.choices[0].message.content
    assert [s["id"] for s in server.ask("GET", "/v1/sessions").json()["data"]] == ["alice"]


def test_completions_of_plain_text(server: ApiServer, plain: Plain) -> None:
    text = "the old prince looked at the letter and said"
    ids = plain.tokenizer(text)["input_ids"]
    expected = plain.text(plain_answer(plain.model, ids, max_new_tokens=12, do_sample=False))
    for cached in (0, len(ids) - 1):
        answer = client(server).completions.create(prompt=text, **GREEDY)
        assert answer.choices[0].text == expected
        assert answer.usage.prompt_tokens_details.cached_tokens == cached  # type: ignore[union-attr]
    chunks = list(client(server).completions.create(prompt=text, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == len(ids) - 1  # type: ignore[union-attr]


def test_responses_are_kept_and_gone_on_with(server: ApiServer, plain: Plain) -> None:
    asking = client(server)
    told = Told(plain)
    options: dict[str, Any] = {"model": NAME, "max_output_tokens": 12, "temperature": 0}
    before = None
    for text in SAID:
        ids, reused, expected = told.say(text)
        answer = asking.responses.create(input=text, previous_response_id=before, **options)
        assert answer.output_text == expected
        assert answer.usage is not None
        assert answer.usage.input_tokens == len(ids)
        assert answer.usage.input_tokens_details.cached_tokens == reused
        assert server.fed.take() == len(ids) - reused + 11
        before = answer.id
    assert before is not None
    assert asking.responses.retrieve(before).output_text == expected
    ids, reused, expected = told.say("and so on")
    with asking.responses.stream(input="and so on", previous_response_id=before, **options) as events:
        last = events.get_final_response()
    assert last.output_text == expected
    assert last.usage is not None
    assert last.usage.input_tokens_details.cached_tokens == reused
    assert asking.responses.retrieve(last.id).output_text == expected
    asking.responses.delete(before)
    with pytest.raises(openai.BadRequestError, match="was not stored, or deleted"):
        asking.responses.create(input="again", previous_response_id=before, **options)
    with pytest.raises(openai.NotFoundError):
        asking.responses.retrieve(before)
    assert asking.responses.create(input="again", previous_response_id=last.id, **options).usage is not None


def test_a_response_in_a_named_session_goes_without_taking_that_along(server: ApiServer) -> None:
    asking = client(server)
    options: dict[str, Any] = {"model": NAME, "max_output_tokens": 4, "prompt_cache_key": "alice"}
    first = asking.responses.create(input="the old prince", **options)
    second = asking.responses.create(input="and the mother", previous_response_id=first.id, **options)
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 0
    asking.responses.delete(first.id)
    names = {session["id"] for session in server.ask("GET", "/v1/sessions").json()["data"]}
    assert names == {"alice", second.id}


def test_a_response_that_is_not_stored_leaves_no_session(server: ApiServer) -> None:
    answer = client(server).responses.create(model=NAME, input="the old prince", max_output_tokens=4, store=False)
    with pytest.raises(openai.NotFoundError):
        client(server).responses.retrieve(answer.id)
    assert server.ask("GET", "/v1/sessions").json()["data"] == []


def test_models_are_listed_without_a_hub(server: ApiServer) -> None:
    assert [model.id for model in client(server).models.list()] == [NAME]
    assert client(server).models.retrieve(NAME).owned_by == "hf-attnstore"
    with pytest.raises(openai.NotFoundError, match="the model here is 'tiny'"):
        client(server).chat.completions.create(model="other", messages=[user("x")])


def test_a_seed_makes_samples_repeat_whatever_runs_beside_and_is_reused(server: ApiServer, plain: Plain) -> None:
    sampled: dict[str, Any] = {"model": NAME, "max_tokens": 12, "temperature": 1.5, "messages": [user(SAID[0])]}
    ids = plain.prompt([user(SAID[0])])
    torch.manual_seed(5)
    expected = plain.text(plain_answer(plain.model, ids, max_new_tokens=12, do_sample=True, temperature=1.5))

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as asking:
            answers = await asyncio.gather(
                *(asking.chat.completions.create(seed=seed, **sampled) for seed in (5, 6, 5, 7, 5))
            )
        return [answer.choices[0].message.content for answer in answers]

    texts = asyncio.run(ask())
    assert [texts[0], texts[2], texts[4]] == [expected] * 3
    assert len(set(texts)) == 3


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_the_text_that_stops_it(server: ApiServer, plain: Plain, stream: bool) -> None:
    ids = plain.prompt([user(SAID[0])])
    whole = plain.text(plain_answer(plain.model, ids, max_new_tokens=24, do_sample=False))
    stop = whole[9:12]
    expected = whole[: whole.index(stop)]
    given: dict[str, Any] = {**GREEDY, "max_tokens": 24, "messages": [user(SAID[0])], "stop": [stop, "\x00"]}
    if stream:
        chunks = list(client(server).chat.completions.create(stream=True, **given))
        text, finish = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        answer = client(server).chat.completions.create(**given)
        text, finish = answer.choices[0].message.content or "", answer.choices[0].finish_reason
    assert text == expected
    assert finish == "stop"
    unstopped = client(server).chat.completions.create(**{**given, "stop": ["\x00"]})
    assert unstopped.choices[0].message.content == whole


def test_penalties_are_openai_s(server: ApiServer, plain: Plain) -> None:
    ids = plain.prompt([user(SAID[0])])
    sequence = list(ids)
    for _ in range(12):
        with torch.no_grad():
            logits = plain.model(torch.tensor([sequence])).logits[0, -1]
        logits[torch.tensor(plain.model.generation_config.suppress_tokens)] = -torch.inf
        for token in range(len(logits)):
            times = sequence[len(ids) :].count(token)
            logits[token] -= 1.5 * times + 0.5 * (times > 0)
        sequence.append(int(logits.argmax()))
    answer = client(server).chat.completions.create(
        messages=[user(SAID[0])], frequency_penalty=1.5, presence_penalty=0.5, **GREEDY
    )
    assert answer.choices[0].message.content == plain.text(sequence[len(ids) :])
    unpenalised = plain_answer(plain.model, ids, max_new_tokens=12, do_sample=False)
    assert unpenalised != sequence[len(ids) :]


THOUGHT = (
    '<think>who knows</think>One moment.<tool_call>{"name": "weather", "arguments": {"city": "Moscow"}}</tool_call>'
)
FIELDS: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close": "</think>", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": ["<|end|>"], "content": "text"},
    },
}
"""How a model writes what it thinks and which tools it calls, as tokenizers say it (`response_template`)."""


@pytest.mark.parametrize("batched", [None, {"cache_tokens": 4096, "batch_tokens": 256}], ids=["queue", "batches"])
def test_tool_calls_and_reasoning_are_fields_of_their_own(
    batched: dict[str, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(serving_utils, "get_response_template"):
        pytest.skip("this transformers finds them in another way")
    tokenizer = tiny_tokenizer(all_bytes=True)
    tokenizer.save_pretrained(tmp_path / "model")
    tiny_model(tokenizer, window=1024).save_pretrained(tmp_path / "model")
    said = tokenizer(THOUGHT)["input_ids"] + [tokenizer.eos_token_id]
    monkeypatch.setattr(answer, "Penalties", lambda *_: Says(said))  # whose place it takes
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with serving(tmp_path / "model", tmp_path / "store", batched=batched) as server:
        server.service.loaded.processor.response_template = FIELDS
        asking = client(server).chat.completions
        given: dict[str, Any] = {**GREEDY, "max_tokens": 400, "tools": tools, "frequency_penalty": 1}
        messages: list[Any] = [user("how is it in Moscow")]
        whole = asking.create(messages=messages, **given).choices[0]
        chunks = list(asking.create(messages=messages, stream=True, **given))
        assert whole.finish_reason == chunks[-1].choices[0].finish_reason == "tool_calls"
        (call,) = whole.message.tool_calls or ()
        (streamed,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        for found in (call.function, streamed.function):  # type: ignore[union-attr]
            assert (found.name, json.loads(found.arguments)) == ("weather", {"city": "Moscow"})
        assert whole.message.content == "".join(c.choices[0].delta.content or "" for c in chunks) == "One moment."
        thought = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks)
        assert whole.message.reasoning_content == thought == "who knows"  # type: ignore[attr-defined]
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]},
            {"role": "tool", "tool_call_id": call.id, "content": "cold"},
        ]
        usage = asking.create(messages=messages, **{**given, "frequency_penalty": 0, "max_tokens": 4}).usage
        assert usage is not None
        assert usage.prompt_tokens_details.cached_tokens >= len(tokenizer("how is it in Moscow")["input_ids"])
        assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
