"""Clients other than OpenAI's own: equal answers, and each turn finds what the one before computed.

litellm, LangChain and LlamaIndex are of the extra `frameworks`; each is skipped where it is not installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from server.conftest import Plain
from support.api_server import NAME, ApiServer, agreed, serving
from support.chat_fixtures import plain_answer
from typer.testing import CliRunner

from hf_attnstore.cli.app import app
from hf_attnstore.server import answer

SAID = ["the old prince looked at the letter", "and the mother rose", "they were to march at three"]
Messages = list[dict[str, str]]
Answer = Callable[[Messages], tuple[str, int]]


def litellm(server: ApiServer) -> Answer:
    package = pytest.importorskip("litellm")

    def answer(messages: Messages) -> tuple[str, int]:
        found = package.completion(
            model=f"openai/{NAME}", api_base=server.url, api_key="none", messages=messages, max_tokens=12, temperature=0
        )
        return found.choices[0].message.content, found.usage.prompt_tokens_details.cached_tokens

    return answer


def langchain(server: ApiServer) -> Answer:
    package = pytest.importorskip("langchain_openai")
    chat = package.ChatOpenAI(model=NAME, base_url=server.url, api_key="none", max_tokens=12, temperature=0)

    def answer(messages: Messages) -> tuple[str, int]:
        found = chat.invoke(messages)
        return found.content, found.usage_metadata["input_token_details"]["cache_read"]

    return answer


def langchain_streamed(server: ApiServer) -> Answer:
    package = pytest.importorskip("langchain_openai")
    chat = package.ChatOpenAI(
        model=NAME, base_url=server.url, api_key="none", max_tokens=12, temperature=0, stream_usage=True
    )

    def answer(messages: Messages) -> tuple[str, int]:
        chunks = list(chat.stream(messages))
        used = next(chunk.usage_metadata for chunk in chunks if chunk.usage_metadata)
        return "".join(chunk.content for chunk in chunks), used["input_token_details"]["cache_read"]

    return answer


def llama_index(server: ApiServer) -> Answer:
    made = pytest.importorskip("llama_index.llms.openai_like").OpenAILike
    message = pytest.importorskip("llama_index.core.llms").ChatMessage
    llm = made(model=NAME, api_base=server.url, api_key="none", max_tokens=12, temperature=0, is_chat_model=True)

    def answer(messages: Messages) -> tuple[str, int]:
        found = llm.chat([message(**m) for m in messages])
        return str(found.message.content), found.raw.usage.prompt_tokens_details.cached_tokens

    return answer


def curl(server: ApiServer) -> Answer:
    program = shutil.which("curl")
    if program is None:
        pytest.skip("curl is not installed")

    def answer(messages: Messages) -> tuple[str, int]:
        body = json.dumps({"model": NAME, "messages": messages, "max_tokens": 12, "temperature": 0})
        asked = [program, "-sS", f"{server.url}/chat/completions", "-H", "Content-Type: application/json", "-d", body]
        found = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
        return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

    return answer


def huggingface_hub(server: ApiServer) -> Answer:
    """The client of `transformers chat`."""
    package = pytest.importorskip("huggingface_hub")
    client = package.InferenceClient(base_url=server.url)

    def answer(messages: Messages) -> tuple[str, int]:
        found = client.chat_completion(messages, model=NAME, max_tokens=12, temperature=0)
        return found.choices[0].message.content, found.usage["prompt_tokens_details"]["cached_tokens"]

    return answer


def conversation(plain: Plain) -> Iterator[tuple[Messages, list[int], list[int], int]]:
    """Turn by turn: the messages so far, the prompt's ids, what plain generate answers, and how many ids are known."""
    messages: Messages = []
    known: list[list[int]] = []
    for text in SAID:
        messages.append({"role": "user", "content": text})
        ids = plain.prompt(messages)
        expected = plain_answer(plain.model, ids, max_new_tokens=12, do_sample=False)
        yield messages, ids, expected, agreed(known, ids)
        known.append([*ids, *expected[:-1]])
        messages.append({"role": "assistant", "content": plain.text(expected)})


CLIENTS = (litellm, langchain, langchain_streamed, llama_index, curl, huggingface_hub)


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.__name__)
def test_a_client_hears_what_plain_generate_says_and_what_was_reused(
    client: Callable[[ApiServer], Answer], server: ApiServer, plain: Plain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the network for prices
    answer = client(server)
    known: list[int] = []
    for messages, ids, expected, reused in conversation(plain):
        assert answer(messages) == (plain.text(expected), reused)
        assert server.fed.take() == len(ids) - reused + 11
        known.append(len(ids) + len(expected) - 1)
    assert reused > known[0]


@pytest.mark.slow
def test_transformers_chat_talks_to_it(server: ApiServer, plain: Plain) -> None:
    ids = plain.prompt([{"role": "user", "content": SAID[0]}])
    expected = plain.text(plain_answer(plain.model, ids, max_new_tokens=12, do_sample=False))
    run = "from transformers.cli.transformers import main; main()"
    asked = [sys.executable, "-c", run, "chat", NAME, server.url, "max_new_tokens=12", "do_sample=False"]
    found = subprocess.run(
        asked,
        input=f"{SAID[0]}\n!exit\n",
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "COLUMNS": "200"},
    )
    heard = "".join(found.stdout.split())
    assert "".join(expected.split())[:20] in heard, found.stdout + found.stderr
    assert server.service.queue.stats().done == 1


def test_the_terminal_chats_with_a_server(server: ApiServer, plain: Plain) -> None:
    arguments = ["chat", "--session", "s", "--url", server.url, "--max-new-tokens", "12"]
    printed = CliRunner().invoke(app, arguments, input="\n".join([*SAID, "/quit"]), env={"COLUMNS": "300"})
    assert printed.exit_code == 0, printed.output
    for _, ids, expected, reused in conversation(plain):
        assert plain.text(expected) in printed.output
        assert f"{reused} of {len(ids)} tokens cached · 12 new" in printed.output
    assert [s["id"] for s in server.ask("GET", "/v1/sessions").json()["data"]] == ["s"]


def test_the_terminal_says_what_a_server_refuses(model_folder: Path, tmp_path: Path) -> None:
    with serving(model_folder, tmp_path / "store", "alice right") as server:
        for arguments, said in (
            (["--url", server.base], "a valid API key is needed"),
            (["--url", server.url, "--key", "wrong"], "a valid API key is needed"),
            (["--url", "http://127.0.0.1:9"], "no server of OpenAI's API answers"),
        ):
            printed = CliRunner().invoke(app, ["chat", "--session", "s", *arguments], env={"COLUMNS": "300"})
            assert printed.exit_code == 1
            assert said in printed.output
        arguments = ["chat", "--session", "s", "--url", server.url, "--key", "right"]
        printed = CliRunner().invoke(app, arguments, input="x " * 2000 + "\nhello", env={"COLUMNS": "300"})
        assert printed.exit_code == 0
        assert "context window is 1,024 tokens" in printed.output
        assert "0 of " in printed.output


def test_the_page_is_beside_the_api_on_the_same_queue(model_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    with serving(model_folder, tmp_path / "store", "alice right", page=True) as server:
        with httpx.Client(verify=False, timeout=60, follow_redirects=True) as browser:
            page = browser.get(f"{server.base}/ui")
            assert page.status_code == 200
            assert "gradio" in page.text
            assert "attnstore-ui" in page.headers["set-cookie"]
            assert browser.get(f"{server.base}/ui/config").json()["title"] == "hf-attnstore"
        assert server.ask("GET", "/v1/models").status_code == 401
        body = {"messages": [{"role": "user", "content": SAID[0]}], "max_tokens": 2}
        assert server.ask("POST", "/v1/chat/completions", "right", json=body).status_code == 200


@pytest.mark.parametrize("streaming", [True, False])
def test_gradio_s_page_for_any_server_hears_what_plain_generate_says(
    server: ApiServer, plain: Plain, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gradio.load_chat`, a chat in a browser for whatever speaks OpenAI's API: what it does with a message. It can't
    be told how long an answer may be."""
    load = pytest.importorskip("gradio").load_chat
    monkeypatch.setattr(answer.Answer, "_fitting", lambda *_: 12)
    page = load(server.url, model=NAME, token="none", streaming=streaming)
    for messages, ids, expected, reused in conversation(plain):
        *history, message = messages
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in history]
        found = page.fn(message["content"], parts)
        assert (found if isinstance(found, str) else list(found)[-1]) == plain.text(expected)
        assert server.fed.take() == len(ids) - reused + 11
