"""Serving the page: one process, one model, one store, any number of browsers."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from ..cache import AttentionStoreCache
from ..listening import is_loopback
from ..store import AttentionStore
from .app import LEAVING, STYLE, build, theme
from .identity import IdentityCookie
from .layout import Offered
from .model import Loaded, ModelLoader
from .restart import RESTARTING_PAGE, Restart, listening_socket, replace_process
from .turns import Turns

GRACE_SECONDS = 1
"""How long open connections (pages that listen for news) may hold up the end of the process."""


def mount(
    app: FastAPI,
    turns: Turns,
    *,
    path: str = "/",
    model_name: str = "the model",
    restart: Restart | None = None,
    accounts: Sequence[tuple[str, str]] = (),
) -> FastAPI:
    """Puts the page into an ASGI application, beside what that serves already. Who made `turns` closes it.

    For an application with a model and a queue of its own:

        turns = Turns(store, ModelLoader(lambda: (model, tokenizer)), queue=queue)
        mount(app, turns, path="/ui", model_name="SmolLM2")

    Args:
        path: where the page is.
        model_name: shown on the page.
        restart: what the page asks for a new process; None offers none.
        accounts: names and passwords; without any, whoever reaches the page may use it.

    Conversations can be imported where not everybody may use the page: what is uploaded takes room on the disk.
    """
    path = "/" + path.strip("/")
    restart = restart or Restart(allowed=False)
    imports = restart.allowed or bool(accounts)
    offered = Offered(model_name, restart=restart.allowed, imports=imports, log_out=bool(accounts))
    served: Any = gr.mount_gradio_app(
        app,
        build(turns.store, turns, restart, offered),
        path=path,
        auth=list(accounts) or None,
        theme=theme(),
        css=STYLE.read_text(),
        head=f"<script>{LEAVING.read_text()}</script>",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        show_error=False,
        ssr_mode=False,
        max_file_size=int(turns.store.stats().get("disk_capacity") or 0) if imports else 1024,
    )
    served.add_middleware(IdentityCookie, path=path)
    return cast(FastAPI, served)


def web_app(
    turns: Turns, restart: Restart, *, model_name: str = "the model", accounts: Sequence[tuple[str, str]] = ()
) -> FastAPI:
    """The page alone, and the routes by which its process is restarted, as an ASGI application; see `mount`."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    began = secrets.token_hex(8)

    @app.get("/process")
    async def process() -> Response:
        """Tells one process from the next."""
        return PlainTextResponse(began)

    @app.get("/restarting")
    async def restarting(ticket: str = "") -> Response:
        if not restart.armed_with(ticket):
            return RedirectResponse("./")
        return HTMLResponse(RESTARTING_PAGE, background=BackgroundTask(restart.redeem, ticket))

    return mount(app, turns, model_name=model_name, restart=restart, accounts=accounts)


class _Server(uvicorn.Server):
    """Says when it can be asked. From then on an interruption ends it in order: it listens to signals already."""

    ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()


def serve(
    load: Callable[[], Loaded],
    store: AttentionStore,
    *,
    model_name: str = "the model",
    host: str = "127.0.0.1",
    port: int = 7860,
    accounts: Sequence[tuple[str, str]] = (),
    ready: Callable[[str], None] = lambda address: None,
    **options: Any,
) -> None:
    """Serves until it is interrupted. Then the store is closed, and what was complete is in it.

    Args:
        load: returns model and tokenizer; called at once, in a thread.
        store: is closed at the end.
        accounts: see `mount`.
        ready: is told the address when the page can be asked for.
        options: of every `ChatSession`, such as `max_new_tokens`.

    Raises:
        AttentionStoreError: the address can't be had.
    """
    listening = listening_socket(host, port)
    restart = Restart(allowed=is_loopback(host))

    def prepared() -> Loaded:
        loaded = load()
        AttentionStoreCache(loaded[0], store=store).model_fingerprint()  # of all weights: not for the first turn
        return loaded

    # uvicorn passes an interruption on after it has ended in order
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as closing:
        closing.callback(store.close)
        turns = Turns(store, ModelLoader(prepared), **options)
        closing.callback(turns.close)
        app = web_app(turns, restart, model_name=model_name, accounts=accounts)
        server = _Server(
            uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS)
        )
        server.ready = partial(ready, _address(host, listening))
        restart.shut_down = partial(setattr, server, "should_exit", True)
        # the server closes what it is given; the socket itself is to go on listening
        server.run(sockets=[listening.dup()])
    if restart.requested:
        replace_process(listening)
    listening.close()


def _address(host: str, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}/"
