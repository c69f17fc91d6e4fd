"""What could be taken for something else without anybody noticing: users, sessions, models, templates, requests at the
same time. One at a time by the queue, and side by side by continuous batching."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from server.conftest import Plain
from support.api_server import ApiServer, agreed, held_up, serving
from support.chat_fixtures import FORGETFUL, plain_answer, save_tiny_chat_model, tiny_model
from support.turn_queue_fixtures import PATIENCE, until

SIZES = {"cache_tokens": 4096, "batch_tokens": 256}
KEYS = "alice sk-a\nbob sk-b\n"
SAID = "the old prince looked at the letter and said nothing to the others in the room"
OTHER = "the old prince looked at the letter and the mother of the young man rose"
NEW = 8

Messages = list[dict[str, Any]]


@pytest.fixture(params=["queue", "batches"])
def batched(request: pytest.FixtureRequest) -> dict[str, int] | None:
    if request.param == "queue":
        return None
    pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")
    return SIZES


def ask(server: ApiServer, messages: Messages, key: str | None = None, **more: Any) -> tuple[str, int]:
    """The answer, and how many tokens were cached."""
    body = {"messages": messages, "max_tokens": NEW, "temperature": 0, **more}
    answer = server.ask("POST", "/v1/chat/completions", key, json=body)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    return content["choices"][0]["message"]["content"], content["usage"]["prompt_tokens_details"]["cached_tokens"]


def asked(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def go_on(messages: Messages, answer: str, text: str) -> Messages:
    return [*messages, {"role": "assistant", "content": answer}, *asked(text)]


def answer_to(plain: Plain, messages: Messages, model: Any = None) -> tuple[list[int], list[int]]:
    """The prompt, and what plain `generate` answers."""
    ids = plain.prompt(messages)
    return ids, plain_answer(model or plain.model, ids, max_new_tokens=NEW, do_sample=False)


def sessions(server: ApiServer, key: str | None = None) -> dict[str, int]:
    listed = server.ask("GET", "/v1/sessions", key).json()["data"]
    return {one["id"]: one["tokens"] for one in listed}


def test_two_users_may_call_their_conversations_the_same(
    batched: dict[str, int] | None, model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    """They talk at the same time, under one `prompt_cache_key`; then one deletes it."""
    talks: dict[str, Messages] = {"sk-a": asked(SAID), "sk-b": asked(OTHER)}
    known: dict[str, list[list[int]]] = {key: [] for key in talks}
    with serving(model_folder, tmp_path / "store", KEYS, batched=batched) as server:
        for turn in range(3):
            with ThreadPoolExecutor(2) as threads:
                found = list(threads.map(lambda key: ask(server, talks[key], key, prompt_cache_key="talk"), talks))
            for key, (text, cached) in zip(talks, found, strict=True):
                ids, expected = answer_to(plain, talks[key])
                assert (text, cached) == (plain.text(expected), agreed(known[key], ids))
                assert (cached > 0) == (turn > 0)
                known[key].append([*ids, *expected[:-1]])
                talks[key] = go_on(talks[key], text, "and what then")
        server.service.store.flush()
        assert {key: sessions(server, key) for key in talks} == {key: {"talk": len(known[key][-1])} for key in talks}
        assert server.ask("DELETE", "/v1/sessions/talk", "sk-a").status_code == 200
        assert (sessions(server, "sk-a"), sessions(server, "sk-b")) == ({}, {"talk": len(known["sk-b"][-1])})
        for key, cached in (("sk-a", 0), ("sk-b", agreed(known["sk-b"], plain.prompt(talks["sk-b"])))):
            ids, expected = answer_to(plain, talks[key])
            assert ask(server, talks[key], key, prompt_cache_key="talk") == (plain.text(expected), cached)


def test_requests_of_one_session_at_the_same_time_are_each_answered(
    batched: dict[str, int] | None, model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    with serving(model_folder, tmp_path / "store", batched=batched) as server:
        first, _ = ask(server, asked(SAID), prompt_cache_key="talk")
        several = [go_on(asked(SAID), first, text) for text in ("and then", "and what then", "and then", "why")]
        with ThreadPoolExecutor(len(several)) as threads:
            found = list(threads.map(lambda messages: ask(server, messages, prompt_cache_key="talk")[0], several))
        assert found == [plain.text(answer_to(plain, messages)[1]) for messages in several]
        for messages, answer in zip(several, found, strict=True):  # none of them has spoilt another
            following = go_on(messages, answer, "and so on")
            _, expected = answer_to(plain, following)
            text, cached = ask(server, following, prompt_cache_key="talk")
            assert text == plain.text(expected)
            assert cached >= len(plain.prompt(messages))
        assert list(sessions(server)) == ["talk"]


def test_forks_go_their_own_ways(
    batched: dict[str, int] | None, model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    with serving(model_folder, tmp_path / "store", batched=batched) as server:
        first, _ = ask(server, asked(SAID), prompt_cache_key="trunk")
        server.service.store.flush()
        assert server.ask("POST", "/v1/sessions/trunk/fork", json={"to": "branch"}).status_code == 200
        ways = {"trunk": go_on(asked(SAID), first, "and then"), "branch": go_on(asked(SAID), first, "and the mother")}
        for _ in range(2):
            for name, messages in ways.items():
                _, expected = answer_to(plain, messages)
                text, cached = ask(server, messages, prompt_cache_key=name)
                assert text == plain.text(expected)
                assert cached >= len(plain.prompt(asked(SAID)))
                ways[name] = go_on(messages, text, "why")
        assert server.ask("DELETE", "/v1/sessions/trunk").status_code == 200
        _, expected = answer_to(plain, ways["branch"])
        assert ask(server, ways["branch"], prompt_cache_key="branch")[0] == plain.text(expected)


def test_another_model_of_the_same_name_takes_nothing_from_the_store(
    batched: dict[str, int] | None, model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    other = save_tiny_chat_model(tmp_path / "other", window=1024)
    changed = tiny_model(plain.tokenizer, window=1024)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(-2.0)
    changed.save_pretrained(other)
    kept = {"input": SAID, "max_output_tokens": NEW, "temperature": 0}
    responses: list[Any] = []
    messages: Messages = []
    for folder, model in ((model_folder, plain.model), (other, changed), (model_folder, plain.model)):
        with serving(folder, tmp_path / "store", batched=batched) as server:
            ids, expected = answer_to(plain, asked(SAID), model)
            text, cached = ask(server, asked(SAID), prompt_cache_key="talk")
            assert text == plain.text(expected)
            assert cached == (len(ids) - 1 if len(responses) == 2 else 0)
            more = {"previous_response_id": responses[-1]["id"]} if responses else {}
            response = server.ask("POST", "/v1/responses", json={**kept, **more}).json()
            said = response["output"][0]["content"][0]["text"]
            messages = [*messages, *asked(SAID)]
            assert said == plain.text(answer_to(plain, messages, model)[1])
            messages = [*messages, {"role": "assistant", "content": said}]
            responses.append(response)
    assert plain.text(answer_to(plain, asked(SAID))[1]) != plain.text(answer_to(plain, asked(SAID), changed)[1])


def test_another_chat_template_is_reused_as_far_as_it_says_the_same(
    batched: dict[str, int] | None, model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    forgets = save_tiny_chat_model(tmp_path / "forgets", window=1024, template=FORGETFUL)
    with serving(model_folder, tmp_path / "store", batched=batched) as server:
        answer, _ = ask(server, asked(SAID), prompt_cache_key="talk")
        ids, expected = answer_to(plain, asked(SAID))
        known = [[*ids, *expected[:-1]]]
    messages = go_on(asked(SAID), answer, "and then")
    with serving(forgets, tmp_path / "store", batched=batched) as server:
        text, cached = ask(server, messages, prompt_cache_key="talk")
    cut = [messages[0], {"role": "assistant", "content": answer[: len(answer) // 2]}, messages[2]]
    ids, expected = answer_to(plain, cut)
    assert (text, cached) == (plain.text(expected), agreed(known, ids))
    assert len(plain.prompt(asked(SAID))) <= cached < len(known[0])


@pytest.mark.parametrize("named", [{}, {"prompt_cache_key": "talk"}], ids=["by content", "named"])
def test_who_leaves_a_stream_and_asks_again_at_once_hears_all_of_it(
    batched: dict[str, int] | None, named: dict[str, str], model_folder: Path, tmp_path: Path, plain: Plain
) -> None:
    with serving(model_folder, tmp_path / "store", batched=batched) as server:
        body = {"messages": asked(SAID), "temperature": 0, "stream": True, **named}
        for left_after in (1, 4):
            with httpx.stream(
                "POST", f"{server.url}/chat/completions", json={**body, "max_tokens": 400}, timeout=PATIENCE
            ) as stream:
                lines = stream.iter_lines()
                heard = [next(lines) for _ in range(left_after)]
                assert heard
            ids, expected = answer_to(plain, asked(SAID))
            for _ in range(2):
                assert ask(server, asked(SAID), **named)[0] == plain.text(expected)
        follow = go_on(asked(SAID), plain.text(expected), "and then")
        until(lambda: _idle(server))
        text, cached = ask(server, follow, **named)
        assert text == plain.text(answer_to(plain, follow)[1])
        assert cached >= len(ids)


def _idle(server: ApiServer) -> bool:
    stats = (server.service.batches or server.service.queue).stats()
    return stats.running == stats.waiting == 0


def test_what_is_being_answered_in_is_not_deleted_so_that_it_would_come_back(
    batched: dict[str, int] | None, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(model_folder, tmp_path / "store", KEYS, batched=batched) as server:
        reached, go_on = held_up(batched is not None, monkeypatch)
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(ask, server, asked(SAID), "sk-a", prompt_cache_key="talk")
            assert reached.wait(PATIENCE)
            for path in ("/v1/sessions/talk", "/v1/sessions"):
                refused = server.ask("DELETE", path, "sk-a")
                assert refused.status_code == 409, refused.text
                assert refused.json()["error"]["code"] == "session_busy"
                assert int(refused.headers["retry-after"]) >= 1
            assert server.ask("DELETE", "/v1/sessions", "sk-b").json()["deleted"] == 0
            go_on.set()
            assert answer.result()
        until(lambda: server.ask("DELETE", "/v1/sessions/talk", "sk-a").status_code == 200)
        assert sessions(server, "sk-a") == {}


def test_a_seed_does_not_foretell_what_is_drawn_for_others(server: ApiServer) -> None:
    """Before each of two requests without a seed there is one with the same seed."""
    sampled = {"temperature": 1.5, "max_tokens": 40}
    found = []
    for _ in range(2):
        with_seed, _ = ask(server, asked(SAID), seed=5, **sampled)
        without, _ = ask(server, asked(SAID), **sampled)
        found.append((with_seed, without))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_beams_and_texts_that_stop_are_not_asked_for_together(server: ApiServer, plain: Plain) -> None:
    beams = {"generation_config": json.dumps({"num_beams": 2})}
    body = {"messages": asked(SAID), "max_tokens": NEW, "temperature": 0, **beams}
    refused = server.ask("POST", "/v1/chat/completions", json={**body, "stop": "x"})
    assert (refused.status_code, "beams" in refused.text) == (400, True)
    ids = plain.prompt(asked(SAID))
    expected = plain_answer(plain.model, ids, max_new_tokens=NEW, do_sample=False, num_beams=2)
    assert ask(server, asked(SAID), **beams)[0] == plain.text(expected)
    more = {"generation_config": json.dumps({"return_dict_in_generate": True, "output_scores": True})}
    assert ask(server, asked(SAID), **more)[0] == plain.text(answer_to(plain, asked(SAID))[1])
