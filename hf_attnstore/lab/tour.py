"""Pictures of the page, and how fast it is: a browser is driven through a conversation, as a visitor would.

`attnstore ui --screenshots DIR` and `attnstore ui --measure`. Both need playwright and a chromium.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image
from rich.console import Console
from rich.markup import escape

from ..errors import AttentionStoreError
from ..store import AttentionStore
from ..ui.model import Loaded, ModelLoader
from ..ui.restart import Restart, listening_socket
from ..ui.serve import web_app
from ..ui.sessions import UserSessions
from ..ui.turns import Turns
from .demo.script import EVENING

WAIT_MS = 300_000
DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}


def find_browser() -> str:
    """Where a chromium is.

    Raises:
        AttentionStoreError: there is none.
    """
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("ATTNSTORE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        raise AttentionStoreError("no chromium was found: install one, or say where it is in ATTNSTORE_CHROMIUM")
    return found


@contextmanager
def served(load: Callable[[], Loaded], store: AttentionStore, **options: Any) -> Iterator[tuple[str, Turns]]:
    """The address of a page that a thread of this process serves, and its turns. `options` are for every chat."""
    listening = listening_socket("127.0.0.1", 0)
    turns = Turns(store, ModelLoader(load), **options)
    restart = Restart(allowed=True)
    app = web_app(turns, restart, model_name="the small model")
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/", turns
    finally:
        server.should_exit = True
        thread.join()
        turns.close()


@contextmanager
def _visit(load: Callable[[], Loaded], **options: Any) -> Iterator[tuple[Any, str, Turns]]:
    """A browser, and a page over a store of its own."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise AttentionStoreError("this needs playwright: pip install playwright") from error
    with (
        tempfile.TemporaryDirectory() as folder,
        AttentionStore(folder, memory="64MiB", disk="1GiB") as store,
        served(load, store, **options) as (address, turns),
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        yield browser, address, turns
        browser.close()


def _open(context: Any, address: str) -> Any:
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#numbers svg", state="attached")
    return page


def _say(page: Any, text: str, turn: int) -> None:
    page.fill("#message textarea", text)
    page.press("#message textarea", "Enter")
    _answered(page, turn)


def _answered(page: Any, turns: int) -> None:
    page.wait_for_function("count => document.querySelectorAll('#chat .aside.turn').length === count", arg=turns)
    page.wait_for_selector("#message .submit-button")


def look(console: Console, load: Callable[[], Loaded], screenshots: Path | None, *, measured: bool) -> None:
    """Takes pictures into a folder, where one is given, and measures, where that is wanted; says what came of it."""
    if screenshots is not None:
        for file in take_screenshots(load, screenshots):
            console.print(f"{escape(str(file))}, {file.stat().st_size:,} bytes")
    if measured:
        for what, value in measure(load).items():
            console.print(f"{what}: {value:.3g}")


def take_screenshots(load: Callable[[], Loaded], folder: Path) -> list[Path]:
    """A conversation on a desktop and on a phone, as `desktop.png` and `phone.png`, and in the dark.

    Raises:
        AttentionStoreError: there is no browser, or what drives it is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _visit(load, max_new_tokens=60) as (browser, address, turns):
        desk = browser.new_context(**DESKTOP)
        page = _open(desk, address)
        _say(page, "Speak to me of the road to Moscow.", 1)
        page.get_by_role("button", name="New conversation").click()
        page.wait_for_function("document.querySelectorAll('#chat .aside').length === 0")
        for turn, text in enumerate(EVENING.messages[:5], 1):
            if turn == 5:  # the conversation is opened again after it left the memory
                turns.store.drop_memory()
                page.reload()
                _answered(page, turn - 1)
                turns.store.flush()
            _say(page, text, turn)
            if turn == 3:
                page.locator("#without input").check()
                page.locator("#chat [aria-label=Retry]").click()
                page.locator("#chat .aside", has_text="without the store").wait_for()
                _answered(page, turn)
                page.locator("#without input").uncheck()
        found = []
        for name, device in (("desktop", DESKTOP), ("phone", {**PHONE, "device_scale_factor": 2})):
            for scheme in ("light", "dark"):
                context = browser.new_context(**device, color_scheme=scheme)
                context.add_cookies(desk.cookies())
                visit = _open(context, page.url)
                _answered(visit, 5)
                if device is not DESKTOP:
                    visit.wait_for_selector(".sidebar:not(.open)", state="attached")
                found.append(_picture(visit, folder / f"{name}{'-dark' if scheme == 'dark' else ''}.png"))
                context.close()
    return found


def _picture(page: Any, file: Path) -> Path:
    page.evaluate("document.querySelector('#chat .bubble-wrap')?.scrollTo(0, 1e6)")
    page.evaluate("document.activeElement.blur()")
    page.screenshot(path=file, animations="disabled")
    with Image.open(file) as taken:
        taken.convert("RGB").quantize(255, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)
    return file


def measure(load: Callable[[], Loaded]) -> dict[str, float]:
    """How fast the page is, on this machine: seconds, and tokens per second.

    Decoding is measured with nobody looking, as in a terminal, and with the page open, by turns.
    """
    found: dict[str, float] = {}
    lengths: dict[str, Any] = {"max_new_tokens": 256, "min_new_tokens": 256, "do_sample": False}
    with _visit(load, **lengths, system=None) as (browser, address, turns):
        model, tokenizer = turns.model.result()
        context = browser.new_context(**DESKTOP)
        page = _open(context, address)  # once, as who comes first pays for what the server does only once
        page = _open(context, address)
        paints = page.evaluate("performance.getEntriesByType('paint').map(e => [e.name, e.startTime / 1000])")
        found["first paint"] = dict(paints)["first-paint"]
        found["first paint of content"] = dict(paints)["first-contentful-paint"]

        from ..chat.session import ChatSession

        speeds: dict[str, list[float]] = {"terminal": [], "page": []}
        work: dict[str, list[float]] = {"terminal": [], "page": []}
        with tempfile.TemporaryDirectory() as terminal, AttentionStore(terminal, disk="1GiB") as other:
            for number in range(4):
                said: list[str] = []
                began = time.process_time()
                chat = ChatSession(model, tokenizer, other, f"talk {number}", **lengths)
                chat.send(EVENING.messages[0], stream=said.append)
                work["terminal"].append(time.process_time() - began)
                assert chat.stats is not None
                speeds["terminal"].append(chat.stats.tokens_per_second or 0.0)
                page.get_by_role("button", name="New conversation").click()
                page.wait_for_function("document.querySelectorAll('#chat .aside').length === 0")
                began = time.process_time()
                _say(page, EVENING.messages[0], 1)
                work["page"].append(time.process_time() - began)
        cookie = {entry["name"]: entry["value"] for entry in context.cookies()}
        from ..ui.identity import namespace_of

        sessions = UserSessions(turns.store.in_namespace(namespace_of(cookie)))
        names = [entry.name for entry in sessions.entries()[0]]
        for name in names:
            record = sessions.open(name).records[0]
            speeds["page"].append((record.tokens_per_second if record is not None else None) or 0.0)
        for where, measured in speeds.items():
            found[f"tokens/s, {where}"] = max(measured)
            found[f"CPU seconds of this process by turn, {where}"] = min(work[where])

        for number in range(2):
            _say(page, EVENING.messages[number + 1], number + 2)
        found["tokens of the conversation that is opened"] = float(sessions.store.session(names[0]).length)
        times = []
        for _ in range(5):
            page.get_by_role("button", name="New conversation").click()
            page.wait_for_function("document.querySelectorAll('#chat .aside').length === 0")
            line = page.locator("#entries label").first
            began = time.perf_counter()
            line.click()
            page.wait_for_function("document.querySelectorAll('#chat .aside.turn').length === 3", polling=5)
            times.append(time.perf_counter() - began)
        found["opening that conversation"] = sorted(times)[len(times) // 2]
    return found
