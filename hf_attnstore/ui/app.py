"""The page: which event calls which handler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..store import AttentionStore
from .answering import Answering
from .keeping import Keeping
from .layout import Controls, Offered, lay_out
from .pages import Pages
from .restart import Restart
from .turns import Turns
from .view import Parts, View

STATIC = Path(__file__).parent / "static"
STYLE = STATIC / "style.css"
LEAVING = STATIC / "leaving.js"
EXPORTS_FOR = 3600
"""Seconds for which an exported conversation can be downloaded."""

_READ_ADDRESS = """() => {
  const narrow = window.innerWidth < 768
  if (narrow) document.querySelectorAll(".sidebar.open .toggle-button").forEach((button) => button.click())
  document.documentElement.classList.add("ready")
  return decodeURIComponent(location.hash.slice(1))
}"""
"""What the address says is open. On a phone there is room for the chat alone, so what is beside it is closed first."""
_FOLLOW_NAME = """(name, draft) => {
  history.replaceState(null, "", name ? "#" + encodeURIComponent(name) : location.pathname)
  document.title = name ? name + " · hf-attnstore" : "hf-attnstore"
  return name ? String(Date.now()) : draft
}"""
"""Address and title are those of what is open, and the next new conversation is another one."""
_ECHO = """(text, chat) => {
  const said = text.trim()
  if (!said) return [chat, text]
  const sent = (window.attnstoreSent ??= {count: 0, waiting: []})
  sent.waiting.push(`${sent.count++} ${said}`)
  return [[...(chat || []), {role: "user", content: [{type: "text", text: said}], metadata: {}, options: []}], ""]
}"""
"""A message is shown before the server knows of it, and waits to be sent. It has a number, as requests of a browser
overtake each other."""
_SEND = "(sent, ...others) => [window.attnstoreSent?.waiting.shift() ?? '', ...others]"
"""The first message that waits: who types quickly may have several there."""
_RESTART = "(ticket) => { if (ticket) location.href = 'restarting?ticket=' + ticket + location.hash }"

_COMMON: dict[str, Any] = {
    "show_progress": "hidden",
    "trigger_mode": "multiple",
    "concurrency_limit": None,
    "api_visibility": "private",
}
"""Of all events: handlers take turns by themselves; a page may ask for the next thing while it follows an answer."""
_AT_ONCE: dict[str, Any] = {**_COMMON, "queue": False}


def theme() -> Any:
    """Gradio's, with fonts that every machine has (nothing is fetched from elsewhere), and colours that contrast enough
    to be read by all."""
    soft = gr.themes.Soft(
        primary_hue="teal",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    strong = ("button_primary_background_fill", "checkbox_label_background_fill_selected")
    colours = {f"{name}{mode}": "*primary_700" for name in strong for mode in ("", "_dark")}
    colours |= {f"button_primary_background_fill_hover{mode}": "*primary_800" for mode in ("", "_dark")}
    colours |= {f"block_title_text_color{mode}": "*body_text_color" for mode in ("", "_dark")}
    colours |= {f"block_title_background_fill{mode}": "transparent" for mode in ("", "_dark")}
    colours |= {"block_info_text_color": "*neutral_600", "body_text_color_subdued": "*neutral_600"}
    colours["background_fill_primary"] = "*neutral_50"  # as Soft has it; `set` forgets that
    return soft.set(**colours, button_secondary_background_fill_hover_dark="*neutral_600")


def build(
    store: AttentionStore, turns: Turns, restart: Restart, offered: Offered, *, store_every: float = 5.0
) -> gr.Blocks:
    """The page, for all users.

    Args:
        store_every: seconds after which the store's numbers are shown anew.
    """
    with gr.Blocks(
        title="hf-attnstore",
        analytics_enabled=False,
        fill_height=True,
        fill_width=True,
        delete_cache=(EXPORTS_FOR // 4, EXPORTS_FOR),
    ) as page:
        parts, controls = lay_out(offered, turns.settings)
        pages = Pages(store, turns, View(parts, turns.settings))
        _chat_events(page, pages, Answering(pages), controls)
        _list_events(pages, Keeping(pages, restart), controls)
        ticks = gr.Timer(store_every).tick
        ticks(pages.tick, [parts.search, parts.current], [parts.numbers, parts.entries, parts.more], **_AT_ONCE)
    return page


def _chat_events(page: gr.Blocks, pages: Pages, on: Answering, controls: Controls) -> None:
    parts: Parts = pages.parts
    shown, asked = parts.shown(), parts.asked()
    page.load(pages.loaded, parts.current, shown, js=_READ_ADDRESS, **_COMMON)
    parts.current.change(None, [parts.current, parts.draft], parts.draft, js=_FOLLOW_NAME)
    gr.on([parts.box.input, parts.box.focus], pages.typing, parts.current, None,
          **{**_AT_ONCE, "trigger_mode": "once"})  # fmt: skip
    parts.box.submit(None, [parts.box, parts.chat], [parts.chat, parts.box], js=_ECHO, **_AT_ONCE)
    # what is told to a handler by component comes in the order in which the page has it: what is sent is the first
    parts.box.submit(on.send, asked | {parts.sent}, shown, js=_SEND, **_COMMON)
    parts.box.stop(on.stop, parts.current, None, **_AT_ONCE)
    parts.go_on.click(on.go_on, asked, shown, **_COMMON)
    parts.chat.retry(on.retry, asked, shown, **_COMMON)
    parts.chat.undo(on.undo, [parts.current, parts.search], shown, **_COMMON)
    parts.chat.edit(on.edit, asked | {parts.chat}, shown, **_COMMON)
    controls.edit_now.click(on.edit_now, asked | {parts.edited}, shown, **_COMMON)
    controls.edit_copy.click(on.edit_copy, asked | {parts.edited}, shown, **_COMMON)
    controls.edit_not.click(pages.view.nothing_asked, None, shown, **_AT_ONCE)


def _list_events(pages: Pages, on: Keeping, controls: Controls) -> None:
    parts = pages.parts
    shown, current, search = parts.shown(), parts.current, parts.search
    # what was chosen holds at once: a message that is sent before it is open is for it
    parts.entries.input(None, parts.entries, current, js="(name) => name")
    parts.entries.select(pages.selected, search, shown, **_COMMON)
    controls.new.click(None, None, current, js="() => ''")
    controls.new.click(pages.new, search, shown, **_COMMON)
    search.change(pages.searched, [search, current], [parts.entries, parts.more, parts.note], **_COMMON)
    controls.rename.click(on.ask_name, current, shown, **_AT_ONCE)
    controls.delete.click(on.ask_delete, current, shown, **_AT_ONCE)
    named = [controls.rename_now.click, parts.new_name.submit]
    gr.on(named, on.rename, [current, parts.new_name, search], shown, **_COMMON)
    controls.fork.click(on.fork, [current, search], shown, **_COMMON)
    controls.delete_now.click(on.delete, [current, search], shown, **_COMMON)
    controls.export.click(on.export, current, shown, **_COMMON)
    controls.take_in.upload(on.take_in, [controls.take_in, search], shown, **_COMMON)
    armed = controls.restart.click(on.arm_restart, None, [controls.ticket, parts.note], **_AT_ONCE)
    armed.then(None, controls.ticket, None, js=_RESTART)
