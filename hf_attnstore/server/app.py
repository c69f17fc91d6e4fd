"""The server as an ASGI application: transformers' own routes for answers, and what is beside them."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..errors import AttentionStoreError
from .callers import Doorkeeper, Keys, current
from .errors import ApiError, answer_error
from .handlers import HEADER, ChatHandler, StoredResponseHandler, TextHandler
from .seams import build_server
from .service import Service
from .sessions import add_sessions
from .stored import stored_response

ANSWERED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})
"""Of transformers' routes, those that are kept: others load and unload models, or compute beside the queue."""


def application(service: Service, keys: Keys | None = None, chat_template_kwargs: dict[str, Any] | None = None) -> Any:
    """The application. It closes the service's queue and store when it ends.

    Args:
        keys: None lets everybody in.
        chat_template_kwargs: for every chat template, unless a request has its own.
    """
    handlers: dict[str, Any] = {
        "chat_handler": ChatHandler(service.loaded, service.state, chat_template_kwargs),
        "completion_handler": TextHandler(service.loaded, service.state),
        "response_handler": StoredResponseHandler(service.loaded, service.state, chat_template_kwargs),
    }
    for handler in handlers.values():
        handler.service = service
    given = {"model_manager": service.loaded, "generation_state": service.state, **handlers}
    needed = [name for name, p in inspect.signature(build_server).parameters.items() if p.default is p.empty]
    build: Callable[..., FastAPI] = build_server
    app = build(**{name: given.get(name) for name in needed})
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") in ANSWERED]
    app.user_middleware.clear()  # gives requests their ids, which the `Doorkeeper` does
    for kind in (ApiError, AttentionStoreError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, answer_error)
    _add_routes(app, service)
    add_sessions(app, service)
    app.add_middleware(Doorkeeper, store=service.store, keys=keys)
    app.router.lifespan_context = _lifespan(service)
    return app


def _lifespan(service: Service) -> Any:
    """SIGTERM ends a process of uvicorn after this, with neither `finally` nor `atexit`."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await asyncio.to_thread(service.close)

    return lifespan


def _add_routes(app: FastAPI, service: Service) -> None:
    def model() -> dict[str, Any]:
        created, name = service.began, service.name
        return {"id": name, "object": "model", "created": created, "owned_by": "hf-attnstore"}

    @app.get("/health")
    async def health() -> Response:
        if service.batches is not None and not service.batches.is_alive:
            return JSONResponse({"status": "the loop that computes has ended"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/load_model")
    async def load_model(body: dict[str, Any]) -> Response:
        """What `transformers chat` asks for at first: the model is there already."""
        if body.get("model") != service.name:
            raise ApiError(404, f"the model here is {service.name!r}", param="model", code="model_not_found")
        ready = json.dumps({"status": "ready", "model": service.name, "cached": True})
        return Response(f"data: {ready}\n\n", media_type="text/event-stream")

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [model()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        if name != service.name:
            raise ApiError(404, f"there is no model {name!r}", code="model_not_found")
        return JSONResponse(model())

    @app.get("/v1/responses/{name}")
    def response(name: str, _request: Request) -> Response:
        return JSONResponse(stored_response(current().store, name))

    @app.delete("/v1/responses/{name}")
    def delete_response(name: str) -> Response:
        stored_response(current().store, name)
        current().store.delete(name)
        return JSONResponse({"id": name, "object": "response", "deleted": True})


__all__ = ["ANSWERED", "HEADER", "application"]
