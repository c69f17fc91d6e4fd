"""Two servers in processes of their own, on one shared tier: a conversation goes to either, and one of them dies."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from server.conftest import Plain
from server.test_metrics import samples
from server.test_restart import SAID, body, command
from support.api_server import agreed, noted
from support.chat_fixtures import plain_answer
from support.engines import Valkey
from support.turn_queue_fixtures import PATIENCE, until

SENT = "attnstore_store_shared_blocks_total"
OTHER = "nothing was said to the others in the room"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """As `server` of other tests, which is another one here."""
    started = Valkey(tmp_path_factory.mktemp("valkey"))
    yield started
    started.kill()


class Replica:
    """A server, and what it has sent to the engine."""

    def __init__(self, process: Any, url: str) -> None:
        self.process, self.url = process, url
        self.sent = 0.0

    def ask(self, path: str, **given: Any) -> httpx.Response:
        answer = httpx.post(f"{self.url}/{path}", json=given, timeout=PATIENCE)
        assert answer.status_code == 200, answer.text
        return answer

    def dies_while_it_answers(self, messages: list[dict[str, str]]) -> None:
        given = body(messages, stream=True, max_tokens=700)
        with httpx.stream("POST", f"{self.url}/chat/completions", json=given, timeout=PATIENCE) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
            self.process.kill()

    def metric(self, *name: str) -> float:
        return samples(httpx.get(f"{self.url.removesuffix('/v1')}/metrics", timeout=PATIENCE).text).get(name, 0.0)

    def wait_until_sent(self) -> None:
        """The block of a turn, which is not as long as one may be, is with the engine."""
        until(lambda: self.metric(SENT) > self.sent)
        self.sent = self.metric(SENT)


def test_a_conversation_goes_to_either_of_two_replicas_and_on_after_one_was_killed(
    model_folder: Path, tmp_path: Path, plain: Plain, engine: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNSTORE_SHARED", f"{engine.url}?lookup=30&timeout=30")
    messages: list[dict[str, str]] = []
    known = [plain.prompt([{"role": "user", "content": OTHER}])]
    tiers = []
    with ExitStack() as ended:
        replicas = [
            Replica(*ended.enter_context(command(model_folder, tmp_path / name, "--no-warm-up"))) for name in "ab"
        ]
        responses_and_names_are_those_of_both(*replicas)
        for number in range(8):
            messages.append({"role": "user", "content": SAID[number % len(SAID)]})
            ids = plain.prompt(messages)
            assert len(ids) < 256, "so that a turn makes one block"
            if number == 4:
                replicas.pop(0).dies_while_it_answers(messages)
            replica = replicas[number % len(replicas)]
            answer = replica.ask("chat/completions", **body(messages))
            found = answer.json()
            content = found["choices"][0]["message"]["content"]
            expected = plain_answer(plain.model, ids, max_new_tokens=12, do_sample=False)
            assert content == plain.text(expected)
            assert found["usage"]["prompt_tokens_details"]["cached_tokens"] == agreed(known, ids)
            tiers.append(noted(answer.headers["x-attnstore"])["tier"])
            replica.wait_until_sent()
            known.append([*ids, *expected[:-1]])
            messages.append({"role": "assistant", "content": content})
        assert replicas[0].metric("attnstore_loaded_blocks_total", "shared") >= 2
    assert all("shared" in tier for tier in tiers[1:4]), "each has the turn before from the other"
    assert tiers[4:] == ["memory"] * 4, "who is left had the last turn itself"


def responses_and_names_are_those_of_both(one: Replica, other: Replica) -> None:
    given: dict[str, Any] = {"max_output_tokens": 5, "temperature": 0}
    first = one.ask("responses", input=OTHER, **given).json()
    second = other.ask("responses", input=SAID[1], previous_response_id=first["id"], **given).json()
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["input_tokens"]
    third = one.ask("responses", input=SAID[2], previous_response_id=second["id"], **given).json()
    assert third["usage"]["input_tokens_details"]["cached_tokens"] >= second["usage"]["input_tokens"]
    for replica in (one, other):
        listed = httpx.get(f"{replica.url}/sessions", timeout=PATIENCE).json()["data"]
        assert {session["id"] for session in listed} == {first["id"], second["id"], third["id"]}
        replica.sent = replica.metric(SENT)
