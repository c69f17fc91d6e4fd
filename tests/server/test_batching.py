"""Answers by continuous batching over HTTP: each as if it were alone, with its own settings and namespace."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from server.conftest import Plain
from support.api_server import ApiServer, noted, serving
from support.turn_queue_fixtures import PATIENCE, until

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")

from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from hf_attnstore.server.batching import _Choosing

SIZES = {"cache_tokens": 4096, "batch_tokens": 256}
KEYS = "alice sk-a\nbob sk-b\n"
ASKED = [{"role": "user", "content": "the old prince went to the window and looked at the road"}]
SAID = " and looked at the letter and said nothing to the others in the room" * 6


@pytest.fixture(scope="module")
def running(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with serving(model_folder, tmp_path_factory.mktemp("store"), keys=KEYS, batched=SIZES) as server:
        yield server


def chat(server: ApiServer, messages: list[dict[str, Any]], key: str = "sk-a", **more: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": messages, "max_tokens": 8, **more}
    answer = server.ask("POST", "/v1/chat/completions", key, json=body)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


def streamed(server: ApiServer, messages: list[dict[str, Any]], **more: Any) -> tuple[str, dict[str, Any], str]:
    """The text, the usage and the header."""
    body = {"messages": messages, "max_tokens": 8, "stream": True, **more}
    answer = server.ask("POST", "/v1/chat/completions", "sk-a", json=body)
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    text = "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])
    return text, next(event["usage"] for event in events if event.get("usage")), answer.headers["x-attnstore"]


def text_of(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


def cached(answer: dict[str, Any]) -> int:
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def alone(plain: Plain, messages: list[dict[str, Any]], seed: int | None = None, **settings: Any) -> str:
    """The answer of `generate` to a conversation."""
    prompt = plain.prompt(messages)
    if seed is not None:
        torch.manual_seed(seed)
    ids = torch.tensor([prompt])
    found = plain.model.generate(ids, **{"max_new_tokens": 8, "do_sample": False, **settings})
    return plain.text(found[0, len(prompt) :].tolist())


def said(messages: list[dict[str, Any]], answer: str, more: str) -> list[dict[str, Any]]:
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": more}]


def test_a_conversation_feeds_what_is_new_and_goes_on_after_a_restart(
    model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    messages = ASKED
    for turn in range(3):
        with serving(model_folder, tmp_path / "store", keys=KEYS, batched=SIZES) as server:
            answer = chat(server, messages, prompt_cache_key="talk")
            assert text_of(answer) == alone(plain, messages)
            prompt = answer["usage"]["prompt_tokens"]
            assert server.fed.take() == prompt - cached(answer) + 7
            assert (cached(answer) > 0) == (turn > 0)
            messages = said(messages, text_of(answer), "and what then")
            text, usage, header = streamed(server, messages)
            assert text == alone(plain, messages)
            assert usage["prompt_tokens_details"]["cached_tokens"] >= prompt
            assert int(noted(header)["reused"]) == usage["prompt_tokens_details"]["cached_tokens"]
            assert noted(header)["tier"] == "memory"
            listed = server.ask("GET", "/v1/sessions", "sk-a").json()["data"]
            until(lambda: server.ask("GET", "/v1/sessions", "sk-a").json()["data"])
            assert not listed or [one["id"] for one in listed] == ["talk"]
            messages = said(messages, text, "and then")


def test_requests_beside_one_another_have_each_their_own_settings(running: ApiServer, plain: Plain) -> None:
    tokenizer = plain.tokenizer
    banned = tokenizer.encode(alone(plain, ASKED), add_special_tokens=False)[0]
    asked: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        (
            {"seed": 3, "temperature": 1.5, "top_p": 0.9},
            {"seed": 3, "do_sample": True, "temperature": 1.5, "top_p": 0.9},
        ),
        ({"seed": 4, "temperature": 0.7}, {"seed": 4, "do_sample": True, "temperature": 0.7}),
        ({"logit_bias": {str(banned): -100}}, {"sequence_bias": {(banned,): -100.0}}),
        ({"max_tokens": 3}, {"max_new_tokens": 3}),
        ({"temperature": 0}, {}),
    ]
    with ThreadPoolExecutor(len(asked)) as threads:
        found = list(threads.map(lambda one: text_of(chat(running, ASKED, **one[0])), asked))
    # a seed is that of one generator for each request: what the tokens are drawn by is the same as alone
    assert found == [alone(plain, ASKED, **one[1]) for one in asked]
    assert len(set(found)) >= 4


def test_a_stop_ends_an_answer_before_it_and_what_was_computed_is_kept(running: ApiServer, plain: Plain) -> None:
    whole = alone(plain, ASKED, max_new_tokens=200)
    stop = whole.split()[3]
    before = whole[: whole.index(stop)]
    answer = chat(running, ASKED, stop=stop, max_tokens=200)
    assert (text_of(answer), answer["choices"][0]["finish_reason"]) == (before, "stop")
    assert streamed(running, ASKED, stop=stop, max_tokens=200)[0] == before
    assert not running.service.batches._open  # type: ignore[union-attr]


def test_nobody_gets_what_was_computed_in_another_namespace(running: ApiServer) -> None:
    messages = [{"role": "user", "content": "A long road to Moscow in the snow, " * 9}]
    found = [cached(chat(running, messages, key)) for key in ("sk-a", "sk-b", "sk-a", "sk-b")]
    assert found[0] <= 2, "where her other prompts begin as this one"
    assert found[1] == 0
    assert found[2] == found[3] > 50


@pytest.mark.parametrize("batched", [None, SIZES], ids=["queue", "batches"])
def test_the_header_says_where_a_prompt_parts_from_what_is_known(
    batched: dict[str, int] | None, model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    before, after = ([{"role": "user", "content": "the old prince " * 6 + day + SAID}] for day in ("rose", "sat"))
    with serving(model_folder, tmp_path / "store", batched=batched) as server:
        for messages in (before, after, after):
            answer = server.ask("POST", "/v1/chat/completions", json={"messages": messages, "max_tokens": 4})
            said = noted(answer.headers["x-attnstore"])
            assert said["reused"] == str(cached(answer.json()))
            if messages is before:
                assert "why" not in said
        assert "why" not in said
        other = [{"role": "user", "content": "the old prince " * 6 + "went" + SAID}]
        answer = server.ask("POST", "/v1/chat/completions", json={"messages": other, "max_tokens": 4})
        said = noted(answer.headers["x-attnstore"])
        assert said["why"].startswith(f"agrees up to token {cached(answer.json())} of {len(plain.prompt(other))}; then")
        assert "went" in said["why"]
        assert 'attnstore_missed_turns_total{why="not in the store"} 1.0' in server.ask("GET", "/metrics").text


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"generation_config": '{"num_beams": 2}'}, "beams"),
        ({"generation_config": '{"stop_strings": ["a"]}'}, "stop_strings"),
        ({"generation_config": '{"max_time": 3}'}, "max_time"),
        ({"max_tokens": 5000}, "context window is 1,024"),
    ],
    ids=str,
)
def test_what_it_has_no_place_for_is_refused(running: ApiServer, more: dict[str, Any], said: str) -> None:
    for stream in (False, True):
        body = {"messages": ASKED, "stream": stream, **more}
        answer = running.ask("POST", "/v1/chat/completions", "sk-a", json=body)
        assert answer.status_code == 400, answer.text
        assert said in answer.text
    assert chat(running, ASKED)


def test_responses_are_kept_and_gone_on_after(running: ApiServer) -> None:
    first = running.ask("POST", "/v1/responses", "sk-a", json={"input": "the prince", "max_output_tokens": 5}).json()
    body = {"input": "and then", "previous_response_id": first["id"], "max_output_tokens": 5}
    second = running.ask("POST", "/v1/responses", "sk-a", json=body).json()
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["input_tokens"]
    assert running.ask("POST", "/v1/responses", "sk-b", json=body).status_code == 400


def test_who_leaves_frees_its_place_and_what_was_computed_is_found(running: ApiServer) -> None:
    import httpx

    messages = [{"role": "user", "content": "whoever leaves in the middle of an answer"}]
    body = {"messages": messages, "max_tokens": 700, "stream": True}
    headers = {"authorization": "Bearer sk-a"}
    with httpx.stream(
        "POST", f"{running.url}/chat/completions", json=body, headers=headers, timeout=PATIENCE
    ) as answer:
        next(answer.iter_lines())
    until(lambda: not running.service.batches._open)  # type: ignore[union-attr]
    until(lambda: cached(chat(running, messages, max_tokens=1)) > 0)
    text = running.ask("GET", "/metrics", "sk-a").text
    assert 'attnstore_requests_total{outcome="cancelled"} ' in text


def test_too_many_and_too_late_are_told_so(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, tmp_path / "store", batched=SIZES, max_waiting=1, deadline=0.01) as server:
        body = {"messages": ASKED, "max_tokens": 900}
        assert server.ask("POST", "/v1/chat/completions", json=body).status_code == 504
        with ThreadPoolExecutor(12) as threads:
            asked = range(12)
            codes = list(
                threads.map(lambda _: server.ask("POST", "/v1/chat/completions", json=body).status_code, asked)
            )
        assert set(codes) <= {429, 504}


def test_a_server_that_ends_parks_what_runs(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, tmp_path / "store", batched=SIZES) as server:
        service = server.service
        assert service.batches is not None
        body = {"messages": ASKED, "max_tokens": 900, "prompt_cache_key": "parked"}
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(server.ask, "POST", "/v1/chat/completions", json=body)
            until(lambda: any(turn.first_token is not None for turn in service.batches._open.values()))  # type: ignore[union-attr]
            service.close()
            assert answer.result().status_code == 503
    with serving(model_folder, tmp_path / "store", batched=SIZES) as server:
        assert [one["id"] for one in server.ask("GET", "/v1/sessions").json()["data"]] == ["parked"]
        again = server.ask("POST", "/v1/chat/completions", json={"messages": ASKED, "max_tokens": 2}).json()
        assert cached(again) == again["usage"]["prompt_tokens"] - 1


def test_the_seams_of_the_manager() -> None:
    import inspect

    def parameters(function: Any) -> set[str]:
        return {*inspect.signature(function).parameters}

    manager = ContinuousBatchingManager
    assert parameters(manager.add_request) >= {"request_id", "max_new_tokens", "streaming", "eos_token_id"}
    assert parameters(manager.register_result_handler) == {"self", "request_id", "callback"}
    assert "logit_processor=self.logit_processor" in inspect.getsource(manager._create_batch_processor)
    ours, theirs = _Choosing, ContinuousBatchingLogitsProcessorList
    for name in ("fill_defaults", "prepare_tensor_args", "__call__"):
        assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))
    assert theirs.__init__ is not ours.__init__
