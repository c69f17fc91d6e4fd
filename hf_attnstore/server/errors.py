"""Errors as OpenAI's API has them: a status, and a JSON object that clients read."""

from __future__ import annotations

import logging
from concurrent.futures import CancelledError
from typing import Any

import jinja2
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from ..errors import (
    AttentionStoreError,
    ContextWindowError,
    QueueFullError,
    SessionBusyError,
    SessionNameError,
    SessionNotFoundError,
    StoreClosedError,
    TurnQueueError,
    TurnTimeoutError,
)

logger = logging.getLogger("hf_attnstore")


class ApiError(Exception):
    """What a client is told instead of an answer.

    Args:
        status: of HTTP.
        param: the field of the request that it is about.
        code: a word for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = {"retry-after": str(retry_after)} if retry_after is not None else {}

    @property
    def body(self) -> dict[str, Any]:
        """What OpenAI's clients take an error from."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


_STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (ContextWindowError, 400, "context_length_exceeded"),
    (SessionNameError, 400, "invalid_name"),
    (SessionNotFoundError, 404, "not_found"),
    (SessionBusyError, 409, "session_busy"),
    (QueueFullError, 429, "queue_full"),
    (TurnTimeoutError, 504, "timeout"),
    (StoreClosedError, 503, "stopping"),
    (TurnQueueError, 503, "stopping"),
    (CancelledError, 503, "cancelled"),
    (jinja2.TemplateError, 400, "chat_template"),
)


def as_api_error(error: BaseException, retry_after: int = 1) -> ApiError:
    """What a client is told of an error of this package, of transformers or of a chat template."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        problem = error.errors()[0]
        return ApiError(400, f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}")
    if isinstance(error, HTTPException):
        return ApiError(400 if error.status_code == 422 else error.status_code, str(error.detail))
    for kind, status, code in _STATUS:
        if isinstance(error, kind):
            said = str(error) or "the turn was stopped"
            if status == 400 and code == "chat_template":
                said = f"the model's chat template refuses the conversation: {said}"
            return ApiError(status, said, code=code, retry_after=retry_after if status in (409, 429, 503) else None)
    if not isinstance(error, AttentionStoreError):
        logger.error("a request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__}: {error}")


async def answer_error(_request: Request, error: Exception) -> JSONResponse:
    """For `FastAPI.exception_handlers`."""
    said = as_api_error(error)
    return JSONResponse(said.body, said.status, said.headers)
