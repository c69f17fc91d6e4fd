"""What a request may ask for: what can't be done right is refused, by name, and nothing is generated for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from server.conftest import Plain
from support.api_server import ApiServer, serving
from support.chat_fixtures import NO_SYSTEM, save_tiny_chat_model

MESSAGES = [{"role": "user", "content": "the old prince"}]

REFUSED: dict[str, list[tuple[str, dict[str, Any], str]]] = {
    "/v1/chat/completions": [
        ("n", {"n": 0}, "1 to 16"),
        ("n", {"n": 17}, "1 to 16"),
        ("n", {"n": True}, "1 to 16"),
        ("logprobs", {"logprobs": 1}, "true or false"),
        ("top_logprobs", {"top_logprobs": 2}, "goes with logprobs"),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}, "0 to 20"),
        ("logprobs", {"logprobs": True, "generation_config": '{"num_beams": 2}'}, "one by one"),
        ("response_format", {"response_format": {"type": "json_object"}}, "response_format"),
        ("tool_choice", {"tool_choice": "required"}, "no model is forced"),
        ("tools", {"tools": [{"type": "web_search"}]}, "of the kind function"),
        ("store", {"store": True}, "store"),
        ("unheard_of", {"unheard_of": 1}, "unheard_of"),
        ("temperature", {"temperature": -1}, "temperature"),
        ("temperature", {"temperature": "warm"}, "temperature"),
        ("max_tokens", {"max_tokens": 0}, "max_tokens"),
        ("max_tokens", {"max_tokens": 1.5}, "max_tokens"),
        ("top_p", {"top_p": 2}, "top_p"),
        ("seed", {"seed": "x"}, "seed"),
        ("stop", {"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ("stop", {"stop": ""}, "stop"),
        ("messages", {"messages": None}, "messages is missing"),
        ("messages", {"messages": []}, "at least one"),
        ("messages", {"messages": ["x"]}, "a role"),
        ("messages", {"messages": [{"role": "user", "content": 3}]}, "a list of parts"),
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
            "no part of type 'image_url'",
        ),
        ("", {"prompt_cache_key": "x" * 2000}, "at most 1024 bytes"),
        ("", {"generation_config": "{"}, "JSONDecodeError"),
        ("", {"generation_config": 5}, "TypeError"),
        ("", {"logit_bias": {"x": 1}}, "ValueError"),
        ("", {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "can't be read"),
        ("", {"chat_template_kwargs": 5}, "can't be read"),
        ("", {"max_tokens": 5000}, "context window is 1,024"),
        ("", {"generation_config": '{"num_return_sequences": 2, "do_sample": true}'}, "one sequence"),
    ],
    "/v1/completions": [
        ("suffix", {"suffix": "x"}, "suffix"),
        ("echo", {"echo": True}, "echo"),
        ("logprobs", {"logprobs": 6}, "0 to 5"),
        ("logprobs", {"logprobs": True}, "0 to 5"),
        ("logit_bias", {"logit_bias": {"5": 1}}, "logit_bias"),
        ("", {"prompt": ["a", "b"]}, "must be a string"),
    ],
    "/v1/responses": [
        ("background", {"background": True}, "background"),
        ("conversation", {"conversation": "c"}, "conversation"),
        ("reasoning", {"reasoning": {"effort": "high"}}, "reasoning"),
        ("text", {"text": {"format": {"type": "json_schema"}}}, "text"),
        ("truncation", {"truncation": "auto"}, "truncation"),
        ("input", {"input": 5}, "a text or a list"),
        ("input", {"input": [{"type": "web_search_call"}]}, "web_search_call"),
        ("previous_response_id", {"previous_response_id": "resp_x"}, "was not stored, or deleted"),
    ],
}
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 2},
    "/v1/completions": {"prompt": "the old prince", "max_tokens": 2},
    "/v1/responses": {"input": "the old prince", "max_output_tokens": 2},
}


@pytest.mark.parametrize("path", REFUSED)
def test_what_can_t_be_done_is_refused_by_name(server: ApiServer, path: str) -> None:
    for param, more, said in REFUSED[path]:
        for stream in (False, True):
            answer = server.ask("POST", path, json={**LEAST[path], "stream": stream, **more})
            assert answer.status_code == 400, (more, answer.text)
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert said in error["message"], (more, error)
            assert (error["param"] or "") == param
    assert server.fed.take() == 0
    assert server.ask("POST", path, json=LEAST[path]).status_code == 200
    assert server.fed.take() > 0


@pytest.mark.parametrize("path", LEAST)
def test_what_asks_for_nothing_is_taken(server: ApiServer, path: str) -> None:
    plain = server.ask("POST", path, json={**LEAST[path], "temperature": 0}).json()
    nothing = {"metadata": {"a": "b"}, "user": "somebody", "service_tier": "auto", "top_p": None}
    if path != "/v1/responses":
        nothing |= {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "stream_options": {"include_usage": True}}
    answer = server.ask("POST", path, json={**LEAST[path], "temperature": 0, **nothing})
    assert answer.status_code == 200, answer.text
    for name in ("choices", "output"):
        if name in plain:
            assert _texts(answer.json()[name]) == _texts(plain[name])


def _texts(found: list[dict[str, Any]]) -> list[Any]:
    return [one.get("text") or one.get("message") or one["content"][0]["text"] for one in found]


def test_no_tools_are_offered_where_none_may_be_chosen(server: ApiServer) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = server.ask(
        "POST", "/v1/chat/completions", json={**LEAST["/v1/chat/completions"], "tools": tools, "tool_choice": "none"}
    )
    assert answer.status_code == 200


def test_a_body_that_is_none_and_paths_that_are_none(server: ApiServer) -> None:
    for content in (b"", b"x", b"[1]", b'"text"', b"\xff"):
        answer = server.ask("POST", "/v1/chat/completions", content=content)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["message"]
    for method, path in (("POST", "/load_model/x"), ("POST", "/reset"), ("POST", "/v1/systemone"), ("GET", "/docs")):
        assert server.ask(method, path, json={}).status_code == 404


def test_who_asks_to_load_the_model_hears_that_it_is_loaded(server: ApiServer) -> None:
    answer = server.ask("POST", "/load_model", json={"model": "tiny"})
    assert answer.text == 'data: {"status": "ready", "model": "tiny", "cached": true}\n\n'
    assert server.ask("POST", "/load_model", json={"model": "other"}).status_code == 404


def test_an_answer_is_as_long_as_the_window_leaves_room_for(server: ApiServer, plain: Plain) -> None:
    messages = [{"role": "user", "content": "the old prince looked at the letter. " * 100}]
    prompt = plain.prompt(messages)
    assert 400 < len(prompt) < 1000
    answer = server.ask("POST", "/v1/chat/completions", json={"messages": messages}).json()
    assert answer["usage"]["completion_tokens"] == 1024 - len(prompt)
    too_long = [{"role": "user", "content": "the old prince looked at the letter. " * 140}]
    refused = server.ask("POST", "/v1/chat/completions", json={"messages": too_long})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_template_that_refuses_says_so(tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model", template=NO_SYSTEM)
    with serving(model, tmp_path / "store") as server:
        messages = [{"role": "system", "content": "x"}, *MESSAGES]
        refused = server.ask("POST", "/v1/chat/completions", json={"messages": messages})
        assert refused.status_code == 400
        assert "no system role here" in refused.json()["error"]["message"]


def test_a_failure_while_generating_is_an_error_and_the_server_goes_on(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_attnstore.server import answer as module

    def fails(*_: Any) -> Any:
        raise RuntimeError('the "device" is gone')

    body = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0}
    with monkeypatch.context() as patched:
        patched.setattr(module.turn_work, "generate", fails)
        for stream in (False, True):
            answer = server.ask("POST", "/v1/chat/completions", json={**body, "stream": stream})
            assert answer.status_code == 500
            assert answer.json()["error"]["message"] == 'RuntimeError: the "device" is gone'
    put = module._Both.put

    def fails_late(both: Any, value: Any) -> None:
        if both._count == 3:
            raise RuntimeError('the "device" is gone')
        put(both, value)

    with monkeypatch.context() as patched:
        patched.setattr(module._Both, "put", fails_late)
        answer = server.ask("POST", "/v1/chat/completions", json={**body, "stream": True})
        (error,) = [json.loads(line[6:]) for line in answer.text.splitlines() if '"error"' in line]
        assert error == {"error": 'RuntimeError: the "device" is gone'}
    assert server.ask("POST", "/v1/chat/completions", json=body).status_code == 200
    assert server.service.answers == {}
