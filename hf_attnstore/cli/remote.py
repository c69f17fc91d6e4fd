"""The chat in a terminal with a server of OpenAI's API: `attnstore chat --url`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape

from ..errors import AttentionStoreError
from ..sizes import format_seconds


class RemoteChat:
    """Reads messages from standard input and streams a server's answers. The conversation is sent whole each time.

    Args:
        url: with or without `/v1` at its end.
        session: the name under which the server keeps the conversation's KV.
        options: of every request, such as `max_tokens`.
    """

    def __init__(
        self, url: str, key: str | None, session: str, system: str | None, console: Console, options: dict[str, Any]
    ) -> None:
        base = url.rstrip("/").removesuffix("/v1") + "/v1/"
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            self._client = httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10, read=None))
        except (httpx.InvalidURL, ValueError) as error:
            raise AttentionStoreError(f"{url!r} can't be read: {error}") from error
        self._console = console
        self._options = {"prompt_cache_key": session, **options}
        self._messages = [{"role": "system", "content": system}] if system else []
        self._session = session

    def run(self) -> None:
        """Until `/quit` or the end of the input. Ctrl-C ends an answer, which the server then keeps as far as it is.

        Raises:
            AttentionStoreError: the server can't be reached, or refuses the key.
        """
        with self._client:
            model = self._model()
            self._console.print(f"session [bold]{escape(self._session)}[/] with {escape(model)}. /quit leaves.")
            while True:
                try:
                    line = self._console.input(f"[bold]{escape(self._session)} ›[/] ").strip()
                except (EOFError, KeyboardInterrupt):
                    self._console.print()
                    return
                if line == "/quit":
                    return
                if line:
                    self._say(line, model)

    def _model(self) -> str:
        try:
            answer = self._client.get("models")
            _raise_if_refused(answer)
            return str(answer.json()["data"][0]["id"])
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise AttentionStoreError(
                f"no server of OpenAI's API answers at {self._client.base_url}: {error}"
            ) from error

    def _say(self, text: str, model: str) -> None:
        """One turn. A mistake is shown, and the message is dropped."""
        asked = {"role": "user", "content": text}
        body = {"model": model, "messages": [*self._messages, asked], "stream": True, **self._options}
        body["stream_options"] = {"include_usage": True}
        said: list[str] = []
        usage: dict[str, Any] = {}
        began, first = time.perf_counter(), None
        try:
            for chunk in self._chunks(body):
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        first = first or time.perf_counter() - began
                        said.append(piece)
                        self._console.out(piece, end="", highlight=False)
                        self._console.file.flush()
        except KeyboardInterrupt:
            self._console.print("\n[dim]interrupted: what was said is kept[/]")
        except (httpx.HTTPError, AttentionStoreError, ValueError) as error:
            self._console.print(f"[red]{escape(str(error))}[/]")
            return
        self._messages += [asked, {"role": "assistant", "content": "".join(said)}]
        self._console.print()
        if first is not None and usage:
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            self._console.print(
                f"[dim]first token after {format_seconds(first)} · {cached:,} of {usage['prompt_tokens']:,} tokens "
                f"cached · {usage['completion_tokens']:,} new[/]"
            )

    def _chunks(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        with self._client.stream("POST", "chat/completions", json=body) as answer:
            if answer.is_error:
                answer.read()
                _raise_if_refused(answer)
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    chunk: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise AttentionStoreError(f"the server stopped: {chunk['error']}")
                    yield chunk


def _raise_if_refused(answer: httpx.Response) -> None:
    if answer.is_error:
        try:
            said = answer.json()["error"]["message"]
        except (ValueError, LookupError, TypeError):
            said = answer.text
        raise AttentionStoreError(f"the server refuses ({answer.status_code}): {said}")
