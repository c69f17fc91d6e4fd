"""The page in a real browser: a server in this process, and pages whose consoles are listened to."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from hf_attnstore import AttentionStore
from hf_attnstore.ui.model import ModelLoader
from hf_attnstore.ui.restart import Restart, listening_socket
from hf_attnstore.ui.serve import web_app
from hf_attnstore.ui.turns import Turns

WAIT = 60_000
"""Milliseconds that a page may take on a busy machine."""


def chromium() -> str:
    """Where a browser is; skips the test where there is none."""
    pytest.importorskip("playwright", reason="browser tests need playwright, of the extra dev")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = os.environ.get("ATTNSTORE_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("browser tests need a chromium: install one, or say where it is in ATTNSTORE_CHROMIUM")
    return found


@contextmanager
def launched() -> Iterator[Any]:
    """A headless browser."""
    path = chromium()
    from playwright.sync_api import Error, sync_playwright

    with sync_playwright() as playwright:
        try:
            # as root there is no sandbox, and in containers little shared memory
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        except Error as error:
            pytest.skip(f"the browser {path} does not start: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@contextmanager
def served(
    load: Callable[[], Any], store: AttentionStore, accounts: Sequence[tuple[str, str]] = (), **options: Any
) -> Iterator[str]:
    """The address of a page that is served by a thread of this process."""
    listening = listening_socket("127.0.0.1", 0)
    turns = Turns(store, ModelLoader(load), **options)
    restart = Restart(allowed=False)
    app = web_app(turns, restart, model_name="a tiny model", accounts=accounts)
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=1, lifespan="on")
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()
        turns.close()


class User:
    """Somebody with a browser of their own, on one page of it."""

    def __init__(self, browser: Any, address: str, login: Sequence[str] = (), **context: Any) -> None:
        self.address = address
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        self.context.set_default_timeout(WAIT)
        self.problems: list[str] = []
        self.page = self.context.new_page()
        self.page.on("console", lambda said: said.type == "error" and self.problems.append(said.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.goto(address)
        if login:
            self.log_in(*login)
        self.wait_until_there()

    def log_in(self, name: str, *passwords: str) -> None:
        """Tries one password after the other; all but the last are refused."""
        for number, password in enumerate(passwords):
            self.page.get_by_test_id("textbox").fill(name)
            self.page.get_by_test_id("password").fill(password)
            self.page.get_by_role("button", name="Login", exact=True).click()
            if number < len(passwords) - 1:
                self.page.get_by_text("Incorrect Credentials").wait_for()
                self.problems.clear()  # the browser itself logs the refusal

    def wait_until_there(self) -> None:
        """The page answers: what its loading asks of the server has come."""
        self.page.wait_for_selector("#numbers svg", state="attached", timeout=4 * WAIT)  # a process may begin anew

    def say(self, text: str) -> None:
        self.page.fill("#message textarea", text)
        self.page.press("#message textarea", "Enter")

    def ask(self, text: str, turn: int) -> str:
        """Says something, waits until turn `turn`, from 1, is answered, and returns its footer."""
        self.say(text)
        return self.footers(turn)[-1]

    def footers(self, count: int) -> list[str]:
        """The footers, once there are so many of them."""
        self.page.wait_for_function(
            "count => document.querySelectorAll('#chat .aside.turn').length === count", arg=count
        )
        self.idle()
        return self.page.locator("#chat .aside.turn").all_text_contents()

    def idle(self) -> None:
        """Nothing is being answered on the page."""
        self.page.wait_for_selector("#message .submit-button")

    def settle(self) -> None:
        """What is shown is shown: Gradio sends the last of an answer twice, and the second time ends an edit."""
        self.page.wait_for_timeout(1000)

    def messages(self) -> list[str]:
        """What was asked, and answered, without footers."""
        found = self.page.locator("#chat [data-testid=user], #chat [data-testid=bot]").all_text_contents()
        return [text.strip() for text in found if "tokens reused" not in text]

    def listed(self, *names: str) -> None:
        """Waits until just these conversations are listed, the last used first."""
        self.page.wait_for_function(
            "names => JSON.stringify([...document.querySelectorAll('#entries label')]"
            ".map(e => e.textContent.trim().split('\\n')[0])) === names",
            arg=_json(names),
        )

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def note(self, words: str) -> None:
        """Waits for a note that says these words."""
        self.page.locator("#note .note", has_text=words).wait_for()

    def close(self) -> None:
        """Nothing went wrong on the page."""
        self.page.wait_for_timeout(700)  # what goes wrong is said late: see static/leaving.js
        self.context.close()
        assert not self.problems, "\n".join(self.problems)


def _json(names: tuple[str, ...]) -> str:
    import json

    return json.dumps(list(names), ensure_ascii=False, separators=(",", ":"))


def number(footer: str, what: str) -> int:
    """A number of tokens that a footer tells, such as that of those "reused"."""
    found = re.search(r"([\d,]+) (?:tokens )?" + what, footer)
    assert found is not None, footer
    return int(found.group(1).replace(",", ""))
