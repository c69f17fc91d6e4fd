"""transformers' handlers of OpenAI's endpoints, with what is asked of this server beside."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse, StreamingResponse

from ..errors import AttentionStoreError
from .answer import Answer, ScoredText, cut_at
from .callers import current
from .choices import begin_all, put_together, stream_together
from .errors import ApiError, as_api_error
from .logprobs import Scored, as_of_completions
from .parameters import check_messages, checked
from .seams import BaseHandler, ChatCompletionHandler, CompletionHandler, ResponseHandler
from .stored import as_items, keep_response, stored_items

if TYPE_CHECKING:
    from .service import Service

HEADER = "x-attnstore"
_USAGE = '"usage":{'
"""Only in chunks that have an object of that name: in texts its quotation marks are escaped."""


class _OnStore(BaseHandler):
    """What the three have in common: a request is checked, becomes an `Answer`, and is told what was reused."""

    service: Service
    kind: str

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        try:
            given = checked(self.kind, body)
            if given.get("model", self.service.name) != self.service.name:
                raise ApiError(404, f"the model here is {self.service.name!r}", param="model", code="model_not_found")
            count = given.pop("n", 1)
            answers = [self._answer(dict(given), number) for number in range(count)]
            return await self._respond(answers)
        except Exception as error:
            raise as_api_error(error, self.service.retry_after) from error

    def _answer(self, given: dict[str, Any], number: int) -> Answer:
        return Answer(self.service, self.kind, given, current(), self.service.over, number)

    async def _respond(self, answers: list[Answer]) -> Any:
        first = answers[0]
        made = await begin_all(self._made, answers, side_by_side=self.service.batches is not None)
        if isinstance(made[0], StreamingResponse):
            response = made[0]
            if len(made) > 1:
                response.body_iterator = stream_together([one.body_iterator for one in made])
            await first.begun()  # headers say how the turn began, and an error before that has its own status
            response.headers[HEADER] = first.header
            return response
        content = made[0] if len(made) == 1 else put_together(made)
        return JSONResponse(content, headers={HEADER: first.header})

    async def _made(self, answer: Answer) -> Any:
        """A stream of an answer that is being made, or the content of one that is complete."""
        try:
            with self.service.known(answer):
                response = await super().handle_request(answer.asked, answer.id)  # type: ignore[misc]
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            if answer.turn is not None or isinstance(error, AttentionStoreError):
                raise
            said = f"the request can't be read ({type(error).__name__}: {error})"  # before anything was generated
            raise ApiError(400, said) from error
        if isinstance(response, StreamingResponse):
            response.body_iterator = self._stream(response.body_iterator, answer)
            return response
        content = json.loads(response.body)
        self._complete(content, answer)
        return content

    def _validate_request(self, body: dict[str, Any]) -> None:
        """Was done, with a refusal of what transformers' server ignores."""

    def _build_generation_config(self, body: dict[str, Any], model_generation_config: Any, use_cb: bool = False) -> Any:
        config = super()._build_generation_config(body, model_generation_config, use_cb=use_cb)
        if body.get("temperature") or body.get("top_p") is not None:
            config.do_sample = body.get("temperature") != 0
        if not config.do_sample:  # so that `generate` does not warn of them
            config.temperature = config.top_p = config.top_k = None
        return config

    def _complete(self, content: dict[str, Any], answer: Answer) -> None:
        """Says in a complete answer, or in the last chunk of one, what was reused."""
        usage = (content.get("response") or content).get("usage")
        if isinstance(usage, dict):
            details = "input_tokens_details" if "input_tokens" in usage else "prompt_tokens_details"
            usage.setdefault(details, {})["cached_tokens"] = answer.stats.reused_tokens
        for choice in content.get("choices", ()):
            if answer.stopped and choice.get("finish_reason") == "length":  # the last token that was allowed
                choice["finish_reason"] = "stop"
            if answer.scores is not None and choice.get("finish_reason"):
                entries = answer.streamer.rest() if answer.streamer is not None else answer.scored
                self._score(choice, answer.scores.most, entries)

    def _score(self, choice: dict[str, Any], most: int, entries: list[Scored]) -> None:
        """Says in a choice how likely its tokens were."""

    def _build_chunk_sse(self, *args: Any, **given: Any) -> str:
        event: str = super()._build_chunk_sse(*args, **given)  # type: ignore[misc]
        text = given.get("content", given.get("text"))
        if not isinstance(text, ScoredText):
            return event
        content = json.loads(event.removeprefix("data: "))
        self._score(content["choices"][0], text.most, text.entries)
        return f"data: {json.dumps(content)}\n\n"

    async def _stream(self, chunks: Any, answer: Answer) -> AsyncIterator[str]:
        try:
            async for chunk in chunks:
                yield "\n\n".join([self._said(event, answer) for event in str(chunk).split("\n\n")])
            if self.kind != "responses":
                yield "data: [DONE]\n\n"
        finally:
            await chunks.aclose()

    def _said(self, event: str, answer: Answer) -> str:
        if _USAGE not in event:
            return event
        content = json.loads(event.removeprefix("data: "))
        self._complete(content, answer)
        return f"data: {json.dumps(content)}"


class ChatHandler(_OnStore, ChatCompletionHandler):
    """`/v1/chat/completions`."""

    kind = "chat"

    def _answer(self, given: dict[str, Any], number: int = 0) -> Answer:
        check_messages(given["messages"], self.service.modality)
        return super()._answer(given, number)

    def _score(self, choice: dict[str, Any], most: int, entries: list[Scored]) -> None:
        choice["logprobs"] = {"content": [entry.as_of_chat() for entry in entries], "refusal": None}

    def _complete(self, content: dict[str, Any], answer: Answer) -> None:
        super()._complete(content, answer)
        for choice in content["choices"]:
            message = choice.get("message") or {}
            if answer.stops and message.get("content"):
                message["content"] = cut_at(message["content"], answer.stops)


class TextHandler(_OnStore, CompletionHandler):
    """`/v1/completions`."""

    kind = "completions"

    def _score(self, choice: dict[str, Any], most: int, entries: list[Scored]) -> None:
        choice["logprobs"] = as_of_completions(entries, most)


class StoredResponseHandler(_OnStore, ResponseHandler):
    """`/v1/responses`: not streamed unless asked for, and kept so that the next one can name it."""

    kind = "responses"

    def _answer(self, given: dict[str, Any], number: int = 0) -> Answer:
        given["stream"] = bool(given.get("stream"))
        keeps = given.pop("store", True)
        store = current().store
        before = stored_items(store, given.pop("previous_response_id")) if "previous_response_id" in given else []
        given["input"] = [*before, *as_items(given["input"])]
        check_messages([item for item in given["input"] if "role" in item] or [{"role": "user"}], self.service.modality)
        answer = super()._answer(given, number)
        answer.keeps = given["input"] if keeps else None
        if keeps and answer.session is None:
            answer.session = f"resp_{answer.id}"
            answer.session_is_its_own = True
        return answer

    async def _made(self, answer: Answer) -> Any:
        try:
            return await super()._made(answer)
        except BaseException:
            answer.forget()
            raise

    async def _stream(self, chunks: Any, answer: Answer) -> AsyncIterator[str]:
        try:
            async for chunk in super()._stream(chunks, answer):
                yield chunk
        finally:
            answer.forget()

    def _complete(self, content: dict[str, Any], answer: Answer) -> None:
        super()._complete(content, answer)
        response = content.get("response") or content
        if answer.keeps is not None and response.get("status") == "completed":
            keep_response(answer.exchange.store, response, answer.keeps)
            answer.session_is_its_own = False
