"""Several answers to one request, and how likely tokens were: by OpenAI's client, one at a time and side by side."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from server.conftest import Plain
from support.api_server import NAME, ApiServer, held_up, serving
from support.turn_queue_fixtures import PATIENCE, until

from hf_attnstore.server.callers import Exchange

SAID = "the old prince looked at the letter and said nothing to the others in the room"
MESSAGES: list[Any] = [{"role": "user", "content": SAID}]
NEW = 8


@pytest.fixture(params=["queue", "batches"])
def server(request: pytest.FixtureRequest, model_folder: Path, tmp_path: Path) -> Iterator[ApiServer]:
    sizes = None
    if request.param == "batches":
        pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")
        sizes = {"cache_tokens": 4096, "batch_tokens": 256}
    with serving(model_folder, tmp_path / "store", batched=sizes) as running:
        yield running


def client(server: ApiServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", max_retries=0)


@contextmanager
def left(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is asked for in the block comes no further than its third token until the server knows that nobody waits."""
    gone, leave = threading.Event(), Exchange.leave

    def leaving(exchange: Exchange) -> None:
        leave(exchange)
        gone.set()

    monkeypatch.setattr(Exchange, "leave", leaving)
    _, go_on = held_up(server.service.batches is not None, monkeypatch)
    try:
        yield
        assert gone.wait(PATIENCE)
    finally:
        go_on.set()


def alone(plain: Plain, **more: Any) -> tuple[list[int], list[int], list[torch.Tensor]]:
    """What plain `generate` makes of the prompt: its ids, those of the answer, and the model's own logits."""
    prompt = plain.prompt(MESSAGES)
    ids = torch.tensor([prompt])
    made = plain.model.generate(
        ids, max_new_tokens=NEW, return_dict_in_generate=True, output_logits=True, **{"do_sample": False, **more}
    )
    return prompt, made.sequences[0, len(prompt) :].tolist(), [row[0].log_softmax(-1) for row in made.logits]


def test_choices_are_those_of_requests_with_seeds_in_a_row_and_the_prompt_is_computed_once(
    server: ApiServer, plain: Plain
) -> None:
    options: dict[str, Any] = {"model": NAME, "max_tokens": NEW, "temperature": 1.5, "messages": MESSAGES}
    answer = client(server).chat.completions.create(n=3, seed=7, prompt_cache_key="talk", **options)
    prompt = len(plain.prompt(MESSAGES))
    block = server.service.store.block_size if server.service.batches is not None else 1
    fed = server.fed.take()
    assert prompt <= fed - 3 * (NEW - 1) <= prompt + 2 * block
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert usage == (prompt, 3 * NEW, prompt + 3 * NEW)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    singly = [client(server).chat.completions.create(seed=7 + number, **options) for number in range(3)]
    assert [c.message.content for c in answer.choices] == [one.choices[0].message.content for one in singly]
    assert len({choice.message.content for choice in answer.choices}) == 3
    listed = server.ask("GET", "/v1/sessions").json()["data"]
    assert [(one["id"], one["tokens"]) for one in listed] == [("talk", prompt + NEW - 1)]


def test_choices_are_streamed_with_their_numbers_and_one_usage(server: ApiServer) -> None:
    options: dict[str, Any] = {"model": NAME, "max_tokens": NEW, "temperature": 1.5, "seed": 7, "n": 3}
    for asking, given in (
        (client(server).chat.completions.create, {"messages": MESSAGES}),
        (client(server).completions.create, {"prompt": SAID}),
    ):
        whole = asking(**given, **options)  # type: ignore[operator]
        texts, usages, ids, ends = ["", "", ""], [], set(), []
        for chunk in asking(**given, **options, stream=True):  # type: ignore[operator]
            ids.add(chunk.id)
            usages += [chunk.usage] if chunk.usage else []
            for choice in chunk.choices:
                delta = choice.delta.content if hasattr(choice, "delta") else choice.text
                texts[choice.index] += delta or ""
                ends += [choice.index] if choice.finish_reason else []
        said = [c.message.content if hasattr(c, "message") else c.text for c in whole.choices]
        assert texts == said
        assert sorted(ends) == [0, 1, 2]
        assert len(ids) == 1
        (usage,) = usages
        assert usage.completion_tokens == 3 * NEW


def test_who_leaves_in_the_middle_of_several_leaves_all_of_them(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, plain: Plain
) -> None:
    options: dict[str, Any] = {"model": NAME, "max_tokens": 400, "temperature": 0, "messages": MESSAGES}
    with left(server, monkeypatch):
        client(server).chat.completions.create(n=3, stream=True, **options).close()
    stats = (server.service.batches or server.service.queue).stats
    until(lambda: stats().cancelled == 3 and not stats().running and not stats().waiting)
    _, expected, _ = alone(plain)
    answer = client(server).chat.completions.create(**{**options, "max_tokens": NEW})
    assert answer.choices[0].message.content == plain.text(expected)


def test_too_many_at_once_are_none(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, tmp_path / "store", max_waiting=1) as server:
        refused = server.ask("POST", "/v1/chat/completions", json={"messages": MESSAGES, "n": 4, "max_tokens": 300})
        assert refused.status_code == 429
        until(lambda: server.service.queue.running is None and not server.service.queue.waiting)
        assert server.service.answers == {}


def test_logprobs_are_the_model_s_own_whatever_chose_the_tokens(server: ApiServer, plain: Plain) -> None:
    options: dict[str, Any] = {"model": NAME, "max_tokens": NEW, "messages": MESSAGES, "logprobs": True}
    biased = {"logit_bias": {"100": 3, "101": -100}, "frequency_penalty": 0.5}
    for more in ({"temperature": 0}, {"temperature": 0.7, "seed": 3, **biased}):
        asking = client(server).chat.completions
        answer = asking.create(top_logprobs=3, **options, **more)
        without = asking.create(**{**options, "logprobs": False}, **more)
        (choice,) = answer.choices
        assert choice.message.content == without.choices[0].message.content
        assert choice.logprobs is not None
        found = choice.logprobs.content
        assert found is not None
        assert len(found) == NEW
        assert "".join(one.token for one in found) == choice.message.content
        chunks = list(asking.create(stream=True, top_logprobs=3, **options, **more))
        streamed = [e for c in chunks if c.choices[0].logprobs for e in c.choices[0].logprobs.content or ()]
        assert [e.token for e in streamed] == [e.token for e in found]
        assert [e.logprob for e in streamed] == pytest.approx([e.logprob for e in found], abs=1e-3)
        likeliest = [[[other.token for other in e.top_logprobs] for e in entries] for entries in (streamed, found)]
        assert likeliest[0] == likeliest[1]
        ids = plain.prompt(MESSAGES)
        for one in found:
            with torch.no_grad():
                logits = plain.model(torch.tensor([ids])).logits[0, -1]
            logits[plain.model.generation_config.suppress_tokens] = -torch.inf  # as the model's settings say
            row = logits.log_softmax(-1)
            best = row.topk(3).values.tolist()
            assert [other.logprob for other in one.top_logprobs] == pytest.approx(best, abs=1e-3)
            matching = [n for n in range(len(row)) if plain.tokenizer.decode([n]) == one.token]
            chosen = min(matching, key=lambda n: abs(float(row[n]) - one.logprob))
            assert float(row[chosen]) == pytest.approx(one.logprob, abs=1e-3)
            assert one.bytes == list(one.token.encode())
            ids = [*ids, chosen]


def test_logprobs_end_where_the_answer_does(server: ApiServer, plain: Plain) -> None:
    _, ids, _ = alone(plain)
    text = plain.text(ids)
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    body = {"messages": MESSAGES, "max_tokens": NEW, "temperature": 0, "logprobs": True, "stop": stop}
    (choice,) = server.ask("POST", "/v1/chat/completions", json=body).json()["choices"]
    said = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert said.startswith(choice["message"]["content"])
    assert len(choice["logprobs"]["content"]) < NEW
    lines = server.ask("POST", "/v1/chat/completions", json={**body, "stream": True}).text.splitlines()
    chunks = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    streamed = [entry for chunk in chunks for entry in (chunk.get("logprobs") or {}).get("content", ())]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in choice["logprobs"]["content"]]


def test_logprobs_of_completions(server: ApiServer) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": SAID, "max_tokens": NEW, "temperature": 0}
    for most in (0, 2):
        (choice,) = client(server).completions.create(logprobs=most, n=1, **options).choices
        found = choice.logprobs
        assert found is not None
        assert found.tokens is not None
        assert "".join(found.tokens) == choice.text
        assert found.text_offset == [len("".join(found.tokens[:n])) for n in range(NEW)]
        assert found.token_logprobs is not None
        if most:
            assert found.top_logprobs is not None
            assert all(t in top and max(top.values()) == p for t, p, top in zip(
                found.tokens, found.token_logprobs, found.top_logprobs, strict=True
            ))  # fmt: skip
        else:
            assert found.top_logprobs is None


def test_a_response_whose_client_left_keeps_no_session(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"model": NAME, "input": SAID, "temperature": 0}
    asking = client(server)
    kept = asking.responses.create(max_output_tokens=NEW, **options)
    with left(server, monkeypatch):
        asking.responses.create(max_output_tokens=400, stream=True, **options).close()
    stats = (server.service.batches or server.service.queue).stats
    until(lambda: stats().cancelled == 1)
    until(lambda: [one["id"] for one in server.ask("GET", "/v1/sessions").json()["data"]] == [kept.id])
    assert asking.responses.create(max_output_tokens=NEW, previous_response_id=kept.id, **options).usage is not None
