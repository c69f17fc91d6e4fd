"""Who asks: keys and namespaces, sessions of one's own, clients that leave, and more requests than fit."""

from __future__ import annotations

import hashlib
import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server.conftest import Plain
from support.api_server import NAME, ApiServer, Paused, agreed, serving
from support.chat_fixtures import plain_answer
from support.turn_queue_fixtures import PATIENCE, Gate, until

from hf_attnstore import AttentionStoreError
from hf_attnstore.server.callers import Keys

SAID = "the old prince looked at the letter and said nothing to the others in the room"
BOB = "bobs-key"
KEYS = f"""
# a name and a key
alice  one-key
alice  another-key
bob    sha256:{hashlib.sha256(BOB.encode()).hexdigest()}
"""


@pytest.fixture
def guarded(model_folder: Path, tmp_path: Path) -> Iterator[ApiServer]:
    with serving(model_folder, tmp_path / "store", KEYS) as running:
        yield running


def chat(server: ApiServer, text: str = SAID, key: str | None = None, **more: Any) -> Any:
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **more}
    return server.ask("POST", "/v1/chat/completions", key, json=body)


def cached(answer: Any) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def names(server: ApiServer, key: str | None = None) -> set[str]:
    return {session["id"] for session in server.ask("GET", "/v1/sessions", key).json()["data"]}


# keys


def test_without_a_key_there_is_nothing_but_health(guarded: ApiServer) -> None:
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/v1/sessions"),
        ("DELETE", "/v1/sessions"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/no-such-thing"),
    ):
        for key in (None, "wrong", "alice"):
            refused = guarded.ask(method, path, key)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
    assert guarded.ask("GET", "/health").json() == {"status": "ok"}
    assert guarded.ask("GET", "/v1/models", BOB).status_code == 200


def test_nothing_is_shared_between_namespaces(guarded: ApiServer, plain: Plain) -> None:
    prompt = plain.prompt([{"role": "user", "content": SAID}])
    assert cached(chat(guarded, key="one-key", prompt_cache_key="s")) == 0
    assert cached(chat(guarded, key="another-key")) == len(prompt) - 1
    assert cached(chat(guarded, key=BOB, user="alice")) == 0
    assert cached(chat(guarded, key=BOB)) == len(prompt) - 1
    assert (names(guarded, "another-key"), names(guarded, BOB)) == ({"s"}, set())
    kept = guarded.ask("POST", "/v1/responses", "one-key", json={"model": NAME, "input": "x", "max_output_tokens": 2})
    for path in (f"/v1/responses/{kept.json()['id']}", "/v1/sessions/s"):
        assert guarded.ask("DELETE", path, BOB).status_code == 404
    body = {"model": NAME, "input": "y", "previous_response_id": kept.json()["id"]}
    assert guarded.ask("POST", "/v1/responses", BOB, json=body).status_code == 400


def test_keys_that_make_no_sense_are_refused() -> None:
    for text in ("", "# nobody\n", "alice", "alice a b", "alice x\nbob x", "alice sha256:xyz", "alice sha256:00"):
        with pytest.raises(AttentionStoreError):
            Keys(text)
    with pytest.raises(AttentionStoreError, match="can't be read"):
        Keys.read(Path("/no/such/file"))


# sessions


def test_sessions_are_listed_forked_and_deleted(server: ApiServer, plain: Plain) -> None:
    prompt = plain.prompt([{"role": "user", "content": SAID}])
    chat(server, prompt_cache_key="a/b c")
    server.service.store.flush()
    (session,) = server.ask("GET", "/v1/sessions").json()["data"]
    assert (session["id"], session["tokens"]) == ("a/b c", len(prompt) + 7)
    assert session["bytes"] > 0
    fork = "/v1/sessions/a%2Fb%20c/fork"
    assert server.ask("POST", fork, json={"to": "copy"}).json()["id"] == "copy"
    assert server.ask("POST", fork, json={"to": "copy"}).status_code == 409
    assert server.ask("POST", "/v1/sessions/none/fork", json={"to": "x"}).status_code == 404
    assert server.ask("POST", fork, json={"name": "x"}).status_code == 400
    assert server.ask("DELETE", "/v1/sessions/a%2Fb%20c").json()["deleted"] is True
    assert names(server) == {"copy"}
    assert cached(chat(server, prompt_cache_key="copy")) == len(prompt) - 1
    assert server.ask("DELETE", "/v1/sessions/a%2Fb%20c").status_code == 404
    assert server.ask("GET", "/v1/sessions?limit=0").status_code == 400


def test_deleting_all_of_a_namespace_leaves_the_others(guarded: ApiServer, plain: Plain) -> None:
    prompt = plain.prompt([{"role": "user", "content": SAID}])
    for key in ("one-key", BOB):
        chat(guarded, key=key, prompt_cache_key="named")
        chat(guarded, "and the mother of the young man rose", key=key)  # kept by content alone
    assert guarded.ask("DELETE", "/v1/sessions", "one-key").json()["deleted"] == 1
    assert (names(guarded, "one-key"), names(guarded, BOB)) == (set(), {"named"})
    assert cached(chat(guarded, "and the mother of the young man rose", key="one-key")) == 0
    assert cached(chat(guarded, "and the mother of the young man rose", key=BOB)) > 0
    assert cached(chat(guarded, key=BOB)) == len(prompt) - 1
    assert guarded.service.store.verify().problems == []


# many requests, and clients that leave


def test_more_requests_than_may_wait_are_told_to_come_later(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, tmp_path / "store", max_waiting=0) as server:
        gate = Gate(server.service.queue)
        for stream in (False, True):
            refused = chat(server, stream=stream)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
        gate.go_on.set()
        gate.turn.result(PATIENCE)
        assert chat(server).status_code == 200


def test_an_answer_that_takes_too_long_ends(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, tmp_path / "store", deadline=0.05) as server:
        gate = Gate(server.service.queue)
        late = chat(server)
        gate.go_on.set()
        assert late.status_code == 504
        assert late.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer_and_what_is_computed_is_kept(
    server: ApiServer, plain: Plain, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    messages = [{"role": "user", "content": SAID}]
    prompt = plain.prompt(messages)
    paused = Paused(monkeypatch, at=4)
    body = {"model": NAME, "messages": messages, "max_tokens": 200, "temperature": 0, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
    assert paused.reached.wait(PATIENCE)
    if stream:
        assert connection.getresponse().read(6) == b"data: "
    running = server.service.queue.running
    assert running is not None
    assert connection.sock is not None
    connection.sock.close()
    connection.close()
    until(lambda: running.stop_requested)
    paused.go_on.set()
    until(lambda: server.service.queue.stats().cancelled == 1)
    made = server.fed.take() - len(prompt) + 1
    assert 4 <= made < 10
    answer = plain_answer(plain.model, prompt, max_new_tokens=made, do_sample=False)
    follow_up = [*messages, {"role": "assistant", "content": plain.text(answer)}, {"role": "user", "content": "and"}]
    again = server.ask(
        "POST", "/v1/chat/completions", json={"model": NAME, "messages": follow_up, "max_tokens": 4, "temperature": 0}
    )
    ids = plain.prompt(follow_up)
    assert cached(again) == agreed([[*prompt, *answer[:-1]]], ids)
    assert cached(again) > len(prompt)


def test_a_request_that_waits_is_withdrawn_when_its_client_leaves(server: ApiServer) -> None:
    gate = Gate(server.service.queue)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    body = json.dumps({"model": NAME, "messages": [{"role": "user", "content": SAID}]})
    connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    until(lambda: len(server.service.queue.waiting) == 1)
    connection.close()
    until(lambda: len(server.service.queue.waiting) == 0)
    gate.go_on.set()
    assert server.fed.take() == 0
