"""Routes by which callers look after their own sessions: list, fork, delete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

from ..errors import SessionBusyError, SessionNotFoundError
from .callers import current
from .errors import ApiError

if TYPE_CHECKING:
    from .service import Service

_MOST = 1000
"""Sessions in one answer."""


def add_sessions(app: FastAPI, service: Service) -> None:
    """Adds the routes."""

    def ask_whether_free(name: str | None = None) -> None:
        if service.is_answering(current().store, name):
            what = "these sessions" if name is None else f"session {name!r}"
            raise SessionBusyError(f"an answer is being made in {what}: ask again when it is there")

    @app.get("/v1/sessions")
    def sessions(limit: int = 100, offset: int = 0) -> Response:
        if not 1 <= limit <= _MOST or offset < 0:
            raise ApiError(400, f"limit is a number of 1 to {_MOST}, offset one of at least 0")
        store = current().store
        data = [
            {
                "id": info.name,
                "object": "session",
                "tokens": info.tokens,
                "bytes": info.bytes,
                "created": int(info.created),
                "last_used": int(info.last_used),
            }
            for info in store.sessions(limit, offset)
        ]
        more = offset + len(data) < store.session_count()
        return JSONResponse({"object": "list", "data": data, "has_more": more})

    @app.delete("/v1/sessions")
    def clear() -> Response:
        """All of the caller's sessions, and all KV that is kept by content in the caller's namespace."""
        ask_whether_free()
        return JSONResponse({"object": "list", "deleted": current().store.clear_namespace()})

    @app.delete("/v1/sessions/{name:path}")
    def delete(name: str) -> Response:
        ask_whether_free(name)
        current().store.delete(name)
        return JSONResponse({"id": name, "object": "session", "deleted": True})

    @app.post("/v1/sessions/{name:path}/fork")
    def fork(name: str, body: dict[str, Any]) -> Response:
        target = body.get("to")
        if not isinstance(target, str) or body.keys() != {"to"}:
            raise ApiError(400, 'the body is {"to": NAME}', param="to")
        store = current().store
        store.session(name)
        try:
            store.session(store.check_name(target))
        except SessionNotFoundError:
            store.fork(name, target)
        else:
            raise ApiError(409, f"session {target!r} exists already", code="exists")
        return JSONResponse({"id": target, "object": "session"})
