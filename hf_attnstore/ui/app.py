"""The page: what is where, and which event calls which handler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from ..store import AttentionStore
from .handlers import Handlers, Parts, title
from .panel import conversation_panel
from .restart import Restart
from .turns import Turns

STATIC = Path(__file__).parent / "static"
STYLE = STATIC / "style.css"
LEAVING = STATIC / "leaving.js"

_READ_ADDRESS = """() => {
  const narrow = window.innerWidth < 768
  if (narrow) document.querySelectorAll(".sidebar.open .toggle-button").forEach((button) => button.click())
  document.documentElement.classList.add("ready")
  return decodeURIComponent(location.hash.slice(1))
}"""
"""What the address says is open. On a phone there is room for the chat alone, so what is beside it is closed first."""
_WRITE_ADDRESS = (
    "(name) => { history.replaceState(null, '', name ? '#' + encodeURIComponent(name) : location.pathname) }"
)
_RESTART = "(ticket) => { if (ticket) location.href = 'restarting?ticket=' + ticket + location.hash }"


def theme() -> Any:
    """Gradio's, with fonts that every machine has: nothing is fetched from elsewhere."""
    return gr.themes.Soft(
        primary_hue="teal",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def build(
    store: AttentionStore, turns: Turns, restart: Restart, *, model_name: str, store_every: float = 5.0
) -> gr.Blocks:
    """The page, for all users.

    Args:
        model_name: shown at the top.
        store_every: seconds after which the store's numbers are shown anew.
    """
    with gr.Blocks(title="hf-attnstore", analytics_enabled=False, fill_height=True, fill_width=True) as page:
        current = gr.Textbox(visible=False)
        ticket = gr.Textbox(visible=False)
        with gr.Sidebar(width=270, position="left", elem_id="left"):
            gr.HTML("<h2>Conversations</h2>")
            new = gr.Button("New conversation", variant="primary", size="sm")
            search = gr.Textbox(placeholder="Search", show_label=False, container=False, elem_id="search")
            entries = gr.Radio([], show_label=False, elem_id="entries", container=False, interactive=True)
            more = gr.HTML()
            with gr.Row():
                rename = gr.Button("Rename", size="sm", min_width=60)
                fork = gr.Button("Fork", size="sm", min_width=60)
                delete = gr.Button("Delete", size="sm", min_width=60)
            with gr.Group(visible=False) as rename_row:
                new_name = gr.Textbox(label="New name", max_lines=1, elem_id="new-name")
                rename_now = gr.Button("Rename it", size="sm", variant="primary")
            with gr.Group(visible=False) as delete_row:
                delete_now = gr.Button("Delete it for good", size="sm", variant="stop")
        with gr.Sidebar(width=310, position="right", elem_id="right"):
            gr.HTML("<h2>What it took</h2>")
            panel = gr.HTML(conversation_panel(None))
            numbers = gr.HTML(elem_id="numbers")
            restart_now = gr.Button("Restart the process", size="sm", visible=restart.allowed)
        with gr.Row(elem_id="head"):
            heading = gr.HTML(title(""), elem_id="title")
            without = gr.Checkbox(label="without the store", elem_id="without", container=False)
        chat = gr.Chatbot(
            elem_id="chat",
            show_label=False,
            editable="user",
            latex_delimiters=[],
            buttons=["copy"],
            feedback_options=None,
            allow_tags=False,
            allow_file_downloads=False,
            reasoning_tags=[("<think>", "</think>")],
            placeholder=f"Say something to {model_name}.",
            height="100%",
        )
        note = gr.HTML(elem_id="note")
        box = gr.Textbox(
            placeholder="Your message",
            show_label=False,
            lines=1,
            max_lines=8,
            submit_btn=True,
            elem_id="message",
        )
        parts = Parts(
            current=current, title=heading, chat=chat, note=note, box=box, entries=entries, search=search, more=more,
            panel=panel, store=numbers, rename_row=rename_row, new_name=new_name, delete_row=delete_row,
        )  # fmt: skip
        on = Handlers(store, turns, restart, parts)
        everything = parts.all()
        # handlers take turns by themselves; a page may ask for the next thing while it follows an answer
        common: dict[str, Any] = {
            "show_progress": "hidden",
            "trigger_mode": "multiple",
            "concurrency_limit": None,
            "api_visibility": "private",
        }
        at_once: dict[str, Any] = {**common, "queue": False}

        page.load(on.loaded, current, everything, js=_READ_ADDRESS, **common)
        current.change(None, current, None, js=_WRITE_ADDRESS)
        # what was chosen holds at once: a message that is sent before it is open is for it
        entries.input(None, entries, current, js="(name) => name")
        entries.select(on.selected, search, everything, **common)
        new.click(None, None, current, js="() => ''")
        new.click(on.new, search, everything, **common)
        search.change(on.searched, [search, current], [entries, more, note], **common)
        gr.on([box.input, box.focus], on.typing, current, None, **{**at_once, "trigger_mode": "once"})
        box.submit(on.send, [box, current, without, search], everything, **common)
        box.stop(on.stop, current, None, **at_once)
        chat.retry(on.retry, [current, without, search], everything, **common)
        chat.undo(on.undo, [current, search], everything, **common)
        chat.edit(on.edit, [chat, current, without, search], everything, **common)
        rename.click(on.ask_name, current, [rename_row, delete_row, new_name, note], **at_once)
        delete.click(on.ask_delete, current, [rename_row, delete_row, note], **at_once)
        gr.on([rename_now.click, new_name.submit], on.rename, [current, new_name, search], everything, **common)
        fork.click(on.fork, [current, search], everything, **common)
        delete_now.click(on.delete, [current, search], everything, **common)
        gr.Timer(store_every).tick(on.tick, None, numbers, **at_once)
        restart_now.click(on.arm_restart, None, [ticket, note], **at_once).then(None, ticket, None, js=_RESTART)
    return page
