"""A scripted client of two servers: `attnstore serve`, which is restarted on the way, and `transformers serve`."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from hf_attnstore.errors import AttentionStoreError

_PATIENCE = 600
_OURS = "from hf_attnstore.cli.app import app; app()"
_THEIRS = "from transformers.cli.transformers import main; main()"


@dataclass(frozen=True)
class Answered:
    """One answer of one server, as its client saw it."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    ttft_seconds: float
    cpu_seconds: float
    """CPU time of the server's process up to the first token: what a busy machine does not change."""


@dataclass(frozen=True)
class Turn:
    """The same turn by both servers."""

    ours: Answered
    plain: Answered
    restarted: bool
    """Whether `attnstore serve` was started anew before it."""

    @property
    def same(self) -> bool:
        """Whether both said the same."""
        return self.ours.text == self.plain.text


class Served:
    """A server in a process of its own, on the loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, name: str) -> None:
        self._process = psutil.Process(process.pid)
        self._url = f"http://127.0.0.1:{port}"
        self._name = name
        self._wait_until_it_answers(process)

    def _wait_until_it_answers(self, process: subprocess.Popen[bytes]) -> None:
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and process.poll() is None:
            try:
                httpx.get(f"{self._url}/health", timeout=_PATIENCE)
                return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AttentionStoreError(f"the server of {self._name!r} did not start")

    def ask(self, messages: Sequence[dict[str, str]], answer_tokens: int) -> Answered:
        """One answer, streamed and greedy."""
        body = {
            "model": self._name,
            "messages": messages,
            "max_tokens": answer_tokens,
            "temperature": 0,
            "stream": True,
        }
        text, first = "", None
        usage: dict[str, Any] = {}
        began, cpu = time.perf_counter(), self._cpu()
        with httpx.stream("POST", f"{self._url}/v1/chat/completions", json=body, timeout=_PATIENCE) as stream:
            if stream.status_code != httpx.codes.OK:
                raise AttentionStoreError(f"the server of {self._name!r} said: {stream.read().decode()}")
            for line in stream.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk: dict[str, Any] = json.loads(line[6:])
                if "error" in chunk:
                    raise AttentionStoreError(f"the server of {self._name!r} said: {chunk['error']}")
                choice = chunk["choices"][0]
                said = choice["delta"].get("content") or ""
                if first is None and (said or choice.get("finish_reason")):
                    first = time.perf_counter() - began, self._cpu() - cpu
                text += said
                usage = chunk.get("usage") or usage
        if first is None:
            raise AttentionStoreError(f"the server of {self._name!r} answered nothing")
        details = usage.get("prompt_tokens_details") or {}
        return Answered(text, usage["prompt_tokens"], details.get("cached_tokens", 0), *first)

    def _cpu(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system


@contextmanager
def _running(code: str, arguments: Sequence[object], port: int, name: str, log: Path) -> Iterator[Served]:
    with log.open("ab") as written:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-c", code, "serve", *map(str, arguments)], stdout=written, stderr=written
        )
        try:
            yield Served(process, port, name)
        finally:
            process.terminate()
            process.wait(_PATIENCE)


class Servers:
    """`transformers serve`, which runs, and `attnstore serve`, which is started anew as often as that is asked for.

    Args:
        plain: the one that runs.
        start: starts the other, until the end of the block.
    """

    def __init__(self, plain: Served, start: Callable[[], AbstractContextManager[Served]]) -> None:
        self.plain, self.start = plain, start
        self._asked = 0

    def ask_both(self, ours: Served, said: Sequence[dict[str, str]], answer_tokens: int, *, anew: bool = False) -> Turn:
        """The same turn by both, one or the other first."""
        self._asked += 1
        order = [ours, self.plain] if self._asked % 2 else [self.plain, ours]
        answers = {server: server.ask(said, answer_tokens) for server in order}
        return Turn(answers[ours], answers[self.plain], anew)


@contextmanager
def both_servers(source: str, folder: Path, *, dtype: str, device: str) -> Iterator[Servers]:
    """Servers of one model.

    Args:
        source: what `from_pretrained` takes.
        folder: for the store and the servers' logs.

    Raises:
        AttentionStoreError: one did not start.
    """
    port, their_port = _free_port(), _free_port()
    shared = ["--dtype", dtype, "--device", device]
    ours = ["--model", source, "--store", folder / "store", "--port", port, *shared]
    theirs = [source, "--port", their_port, "--host", "127.0.0.1", *shared]
    start = partial(_running, _OURS, ours, port, Path(source).name, folder / "attnstore.log")
    with _running(_THEIRS, theirs, their_port, source, folder / "transformers.log") as plain:
        yield Servers(plain, start)


def converse(
    servers: Servers,
    system: str,
    messages: Sequence[str],
    answer_tokens: int,
    *,
    restart_before: int,
    tell: Callable[[str], object],
    heard: Callable[[Turn], object],
) -> tuple[list[Turn], list[dict[str, str]]]:
    """Has the conversation with both servers, turn by turn.

    Args:
        restart_before: the number of the turn, counted from 0, before which `attnstore serve` is ended and started.
        tell: what is being done.
        heard: called with each turn.

    Returns:
        The turns, and all that was said.

    Raises:
        AttentionStoreError: a server did not start, or did not answer.
    """
    turns: list[Turn] = []
    said: list[dict[str, str]] = [{"role": "system", "content": system}]
    for number, part in enumerate([messages[:restart_before], messages[restart_before:]]):
        with servers.start() as ours:
            for place, text in enumerate(part):
                tell(f"turn {len(turns) + 1} of {len(messages)}")
                said.append({"role": "user", "content": text})
                turn = servers.ask_both(ours, said, answer_tokens, anew=bool(number) and place == 0)
                said.append({"role": "assistant", "content": turn.ours.text})
                turns.append(turn)
                heard(turn)
    return turns, said


def first_turns(servers: Servers, text: str, pairs: int, tell: Callable[[str], object]) -> list[Turn]:
    """First turns of conversations that nobody had before, by servers that have answered one already."""
    turns: list[Turn] = []
    with servers.start() as ours:
        for number in range(-1, pairs):
            tell(f"first turns, {number + 1} of {pairs}")
            asked = text if number >= 0 else "Say yes."
            said = [{"role": "system", "content": f"Book {number}."}, {"role": "user", "content": asked}]
            turns.append(servers.ask_both(ours, said, _FEW))
    return turns[1:]


def after_restarts(
    servers: Servers, said: Sequence[dict[str, str]], pairs: int, tell: Callable[[str], object]
) -> list[Turn]:
    """A question to a conversation that was had with servers before, each time the first one that a server hears."""
    turns: list[Turn] = []
    for number in range(pairs):
        tell(f"restarts, {number + 1} of {pairs}")
        question = {"role": "user", "content": f"And what is said of it on page {number + 1}?"}
        with servers.start() as ours:
            turns.append(servers.ask_both(ours, [*said, question], _FEW, anew=True))
    return turns


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


_CLIENT = """
import http.client, json, sys
talk = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
for line in sys.stdin:
    talk.request("POST", "/v1/chat/completions", line, {"content-type": "application/json"})
    print(json.dumps(talk.getresponse().read().decode()), flush=True)
"""


def overhead(source: str, turns: int, folder: Path) -> dict[str, list[float]]:
    """The CPU time of turns over HTTP, without the client's, and of the same turns by a `ChatSession` that is made for
    each, on one model and store, in turn; answers of four tokens.

    Returns:
        Seconds by way: `http`, `streamed` and `ChatSession`; without the first turn, in which all is done once.
    """
    import uvicorn

    from hf_attnstore import AttentionStore, ChatSession
    from hf_attnstore.server.app import application
    from hf_attnstore.server.generating import LoadedModel
    from hf_attnstore.server.service import Service

    loaded = LoadedModel(source, "model", device="cpu", dtype="float32")
    service = Service(loaded, AttentionStore(folder, shared=""))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application(service), log_level="warning"))
    running = threading.Thread(target=server.run, args=([listening],))
    running.start()
    found: dict[str, list[float]] = {"http": [], "streamed": [], "ChatSession": []}
    said: list[dict[str, str]] = []
    command = [sys.executable, "-c", _CLIENT, str(listening.getsockname()[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:  # noqa: S603

        def ask(stream: bool) -> str:
            assert client.stdin is not None
            assert client.stdout is not None
            body = {"messages": said, "max_tokens": _FEW, "temperature": 0, "stream": stream}
            client.stdin.write(json.dumps(body) + "\n")
            client.stdin.flush()
            return str(json.loads(client.stdout.readline()))

        def chat() -> str:
            tokenizer: Any = loaded.processor
            session = ChatSession(loaded.model, tokenizer, session="chat", store=service.store)
            answer = session.send(said[-1]["content"], max_new_tokens=_FEW, do_sample=False)
            session.close()
            return answer

        ways: dict[str, Callable[[], str]] = {
            "http": partial(ask, False),
            "streamed": partial(ask, True),
            "ChatSession": chat,
        }
        for turn in range(turns):
            said.append({"role": "user", "content": f"And what came then, after {turn}?"})
            for name in list(ways)[turn % 3 :] + list(ways)[: turn % 3]:
                began = time.process_time()
                answer = ways[name]()
                time.sleep(0.03)  # what is done behind the turn is part of it
                if turn:
                    found[name].append(time.process_time() - began)
                if name == "http":
                    heard = json.loads(answer)["choices"][0]["message"]["content"]
            said.append({"role": "assistant", "content": heard})
        client.stdin.close()  # type: ignore[union-attr]
    server.should_exit = True
    running.join()
    return found


_FEW = 4
