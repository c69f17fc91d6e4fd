"""The page as people use it, in a real browser."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Gate
from support.browsers import User, launched, number, served
from support.chat_fixtures import APPEND_ONLY, save_tiny_chat_model, tiny_model, tiny_tokenizer

from hf_attnstore import AttentionStore

ROOT = Path(__file__).parents[2]
PRINCE, OFFICER, MOTHER = "the old prince", "the other officer", "the mother"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.fixture(scope="module")
def site(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Gate]]:
    tokenizer = tiny_tokenizer(APPEND_ONLY)
    model = tiny_model(tokenizer)
    model.lm_head = Gate(model.lm_head)
    with (
        AttentionStore(tmp_path_factory.mktemp("site") / "store", block_size=16) as store,
        served(lambda: (model, tokenizer), store, max_new_tokens=12, do_sample=False) as address,
    ):
        yield address, model.lm_head


@pytest.fixture
def gate(site: tuple[str, Gate]) -> Iterator[Gate]:
    yield site[1]
    site[1].failure = None
    site[1].open.set()


@pytest.fixture
def come(browser: Any, site: tuple[str, Gate]) -> Iterator[Callable[..., User]]:
    """Has somebody new open the page."""
    users: list[User] = []

    def open_page(**context: Any) -> User:
        users.append(User(browser, site[0], **context))
        return users[-1]

    yield open_page
    for user in users:
        user.close()


@pytest.mark.slow  # a process has to import all there is, twice
@pytest.mark.timeout(600)
def test_five_turns_then_a_reload_then_a_new_process_and_the_conversation_goes_on(browser: Any, tmp_path: Path) -> None:
    model = save_tiny_chat_model(tmp_path / "model")
    command = [sys.executable, "-m", "hf_attnstore.cli", "ui", "--port", "0", "--max-new-tokens", "12"]
    command += ["--model", str(model), "--store", str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        assert address is not None
        user = User(browser, address.group())
        texts = [PRINCE, OFFICER, MOTHER, "the letter", "the young man"]
        footers = [user.ask(text, turn) for turn, text in enumerate(texts, 1)]
        assert [number(footer, "reused") > 0 for footer in footers] == [False, True, True, True, True]
        before = user.messages()
        assert before[::2] == texts

        user.page.reload()
        assert user.footers(5) == footers
        assert user.messages() == before

        process = user.page.evaluate("fetch('process').then(answer => answer.text())")
        user.press("Restart the process")
        user.page.wait_for_selector("h1:has-text('Restarting')")
        user.wait_until_there()
        assert user.footers(5) == footers
        assert user.messages() == before
        assert user.page.evaluate("fetch('process').then(answer => answer.text())") != process
        after = user.ask("and then", 6)
        last = number(footers[-1], "reused") + number(footers[-1], "prefilled")
        assert number(after, "reused") >= last  # the whole conversation up to the last answer
        assert number(after, "prefilled") < 20
        user.close()
    finally:
        server.terminate()
        server.wait(60)
        server.stdout.close()


def test_two_browsers_at_once_have_nothing_of_each_other(come: Callable[..., User], gate: Gate) -> None:
    ann, bob = come(), come()
    gate.hold_after(3)
    ann.say(PRINCE)
    assert gate.reached.wait(60)
    bob.say(OFFICER)
    bob.page.locator("#chat .aside", has_text="waiting for").wait_for()
    gate.open.set()
    assert number(ann.footers(1)[0], "reused") == number(bob.footers(1)[0], "reused") == 0
    ann.listed(PRINCE)
    bob.listed(OFFICER)
    bob.page.goto(ann.page.url)
    bob.page.reload()
    bob.note("there is no conversation")
    bob.listed(OFFICER)
    assert bob.messages() == []


def test_a_reload_in_the_middle_of_an_answer_shows_it_go_on_and_stop_keeps_it(
    come: Callable[..., User], gate: Gate
) -> None:
    user = come()
    gate.hold_after(4)
    user.say(PRINCE)
    assert gate.reached.wait(60)
    user.page.wait_for_selector("#chat [data-testid=bot]")
    user.page.reload()
    user.page.wait_for_selector("#chat [data-testid=bot]")
    part = user.messages()
    assert part[0] == PRINCE
    user.page.click("#message .stop-button")
    gate.free_forwards = 1
    gate.open.set()
    (footer,) = user.footers(1)
    assert footer.endswith("stopped")
    question, answer = user.messages()
    assert (question, answer.startswith(part[1])) == (PRINCE, True)
    user.press("Continue the answer")
    user.page.wait_for_function(
        "!(document.querySelector('#chat .aside.turn')?.textContent.endsWith('stopped') ?? true)"
    )
    user.footers(1)
    stopped, (_, answer) = answer, user.messages()
    assert (answer.startswith(stopped), len(answer) > len(stopped)) == (True, True)
    assert number(user.ask("go on", 2), "reused") > 0
    user.page.reload()
    user.footers(2)
    assert user.messages()[:2] == [PRINCE, answer]


def test_edit_retry_and_undo_go_back_and_reuse(come: Callable[..., User]) -> None:
    user = come()
    first = [user.ask(text, turn) for turn, text in enumerate((PRINCE, OFFICER, MOTHER), 1)]
    user.settle()
    user.page.locator("#chat [aria-label=Edit]").nth(1).click()
    user.page.locator("#chat textarea").fill("the three letters")
    user.page.locator("#chat [aria-label=Submit]").click()
    user.press("Edit and drop them")
    user.page.wait_for_function("document.querySelectorAll('#chat [data-testid=user]').length === 2")
    edited = user.footers(2)
    assert edited[0] == first[0]
    assert number(edited[1], "reused") >= number(first[0], "prefilled")
    assert user.messages()[2] == "the three letters"

    user.page.locator("#without input").check()
    user.settle()
    user.page.locator("#chat [aria-label=Retry]").click()
    user.page.locator("#chat .aside", has_text="without the store").wait_for()
    compared = user.footers(2)[1]
    assert (number(compared, "reused"), "(measured)" in compared) == (0, True)

    user.page.locator("#chat [aria-label=Undo]").click()
    user.footers(1)
    user.page.wait_for_function("document.querySelector('#message textarea').value === 'the three letters'")
    assert user.messages()[0] == PRINCE


def with_two_conversations(come: Callable[..., User]) -> User:
    """Somebody who has asked one thing in each, and has the second one open."""
    user = come()
    user.ask(PRINCE, 1)
    user.press("New conversation")
    user.page.wait_for_function("document.querySelectorAll('#chat .aside').length === 0")
    user.ask(OFFICER, 1)
    user.listed(OFFICER, PRINCE)
    return user


def test_conversations_are_found_renamed_copied_and_deleted(come: Callable[..., User]) -> None:
    user = with_two_conversations(come)
    user.page.fill("#search textarea, #search input", "prince")
    user.listed(PRINCE)
    user.page.fill("#search textarea, #search input", "")
    user.listed(OFFICER, PRINCE)

    user.press("Rename")
    user.page.fill("#new-name textarea, #new-name input", "a new name")
    user.press("Rename it")
    user.listed("a new name", PRINCE)
    user.press("Fork")
    user.listed("a new name, copy", "a new name", PRINCE)
    assert user.messages()[0] == OFFICER
    user.press("Delete")
    user.press("Delete it for good")
    user.listed("a new name", PRINCE)
    assert user.messages() == []
    user.page.locator("#entries label", has_text=PRINCE).click()
    user.footers(1)
    assert user.messages()[0] == PRINCE


HOLD_REQUESTS = """() => {
    const send = window.fetch, sent = new Promise(resolve => { window.release = resolve });
    window.fetch = async (...request) => {
        if (String(request[0]?.url ?? request[0]).includes("queue/join")) await sent;
        return send(...request);
    };
}"""


def test_messages_show_before_the_server_knows_of_them_and_quick_ones_make_one_conversation(
    come: Callable[..., User],
) -> None:
    user = come()
    user.page.evaluate(HOLD_REQUESTS)
    texts = [f"message {n}" for n in range(10)]
    for count, text in enumerate(texts, 1):
        user.say(text)
        user.page.wait_for_function(
            "n => document.querySelectorAll('#chat [data-testid=user]').length === n", arg=count
        )
    assert (user.messages(), user.page.title()) == (texts, "hf-attnstore")
    user.page.evaluate("window.release()")
    user.footers(10)
    assert user.messages()[::2] == texts
    user.listed(texts[0])
    assert user.page.title().startswith(texts[0])
    user.page.locator("#settings button").first.click()
    user.page.get_by_label("System message").fill("Be brief.")
    user.press("Export")
    with user.page.expect_download() as downloaded:
        user.page.get_by_text("Download (").click()
    assert downloaded.value.suggested_filename == f"{texts[0]}.safetensors"


HOLD_THE_NEXT_REQUEST = """() => {
    const send = window.fetch;
    let held = false;
    window.fetch = (...request) => {
        if (held || !String(request[0]?.url ?? request[0]).includes("queue/join")) return send(...request);
        held = true;
        return new Promise(resolve => window.release = () => resolve(send(...request)));
    };
}"""


def test_a_message_is_for_the_conversation_that_was_chosen_though_it_is_not_open_yet(come: Callable[..., User]) -> None:
    user = with_two_conversations(come)
    user.page.evaluate(HOLD_THE_NEXT_REQUEST)
    user.page.locator("#entries label", has_text=PRINCE).click()
    assert user.messages()[0] == OFFICER, "it is not open yet"
    user.say(MOTHER)
    user.footers(2)
    assert [user.messages()[place] for place in (0, 2)] == [PRINCE, MOTHER]
    user.page.evaluate("window.release()")
    user.page.wait_for_timeout(1000)  # what was held back is there now
    assert [user.messages()[place] for place in (0, 2)] == [PRINCE, MOTHER]


def test_a_model_error_is_a_message_and_the_conversation_goes_on(come: Callable[..., User], gate: Gate) -> None:
    user = come()
    user.ask(PRINCE, 1)
    gate.failure = RuntimeError("out of memory\nTraceback (most recent call last)")
    user.say(OFFICER)
    user.note("the model failed: out of memory")
    user.idle()
    box = user.page.locator("#message").bounding_box()
    assert box is not None
    assert box["y"] + box["height"] <= 800, "what is said is above the box"
    assert "Traceback" not in user.page.content()
    assert user.page.input_value("#message textarea") == OFFICER
    assert user.messages()[0] == PRINCE
    gate.failure = None
    user.page.press("#message textarea", "Enter")
    assert number(user.footers(2)[1], "reused") > 0


def test_on_a_phone_the_chat_comes_first_and_nothing_is_cut_off(come: Callable[..., User]) -> None:
    user = come(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    user.page.wait_for_selector(".sidebar:not(.open)", state="attached")
    assert user.page.locator(".sidebar.open").count() == 0
    user.ask(PRINCE, 1)
    assert user.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    box = user.page.locator("#message").bounding_box()
    assert box is not None
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] <= 844
    user.page.locator(".sidebar .toggle-button").first.tap()
    user.listed(PRINCE)


def test_an_account_has_its_conversations_in_every_browser_and_nobody_elses(
    browser: Any, model: Any, tokenizer: Any, store: AttentionStore
) -> None:
    accounts = [("ann", "secret"), ("bob", "other")]
    with served(lambda: (model, tokenizer), store, accounts, max_new_tokens=12, do_sample=False) as address:
        ann = User(browser, address, ("ann", "wrong", "secret"))
        ann.ask(PRINCE, 1)
        again = User(browser, address, ("ann", "secret"))
        again.listed(PRINCE)
        again.page.locator("#entries label").first.click()
        again.footers(1)
        assert number(again.ask("go on", 2), "reused") > 0
        bob = User(browser, address, ("bob", "other"))
        bob.page.goto(again.page.url)
        bob.page.reload()
        bob.note("there is no conversation")
        assert bob.messages() == []
        bob.listed()
        bob.page.get_by_text("Log out").click()
        bob.page.get_by_test_id("password").wait_for()
        for user in (ann, again, bob):
            user.close()
