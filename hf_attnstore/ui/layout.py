"""What is where on the page. No events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from .panel import conversation_panel
from .sessions import EXPORTED
from .settings import HOTTEST, MOST_NEW_TOKENS, Settings
from .view import Parts, title


@dataclass(frozen=True)
class Controls:
    """The components that only begin something."""

    new: gr.Button
    rename: gr.Button
    rename_now: gr.Button
    fork: gr.Button
    delete: gr.Button
    delete_now: gr.Button
    export: gr.Button
    take_in: gr.UploadButton
    edit_now: gr.Button
    edit_copy: gr.Button
    edit_not: gr.Button
    restart: gr.Button
    ticket: gr.Textbox


@dataclass(frozen=True)
class Offered:
    """What the page offers, beside the chat."""

    model_name: str = "the model"
    restart: bool = False
    imports: bool = False
    log_out: bool = False


def lay_out(offered: Offered, settings: Settings) -> tuple[Parts, Controls]:
    """Makes the components, within `gr.Blocks`. `settings` are those of a new conversation."""
    made: dict[str, Any] = {
        "sent": gr.Textbox(visible=False),
        "current": gr.Textbox(visible=False),
        "draft": gr.Textbox("0", visible=False),
        "settings_of": gr.Textbox(visible=False),
        "ticket": gr.Textbox(visible=False),
        "edited": gr.State(),
    }
    with gr.Sidebar(width=270, position="left", elem_id="left"):
        made |= _conversations(offered)
    with gr.Sidebar(width=310, position="right", elem_id="right"):
        made |= _beside(offered, settings)
    made |= _chat(offered)
    return (
        Parts(**{name: made[name] for name in Parts.__dataclass_fields__}),
        Controls(**{name: made[name] for name in Controls.__dataclass_fields__}),
    )


def _conversations(offered: Offered) -> dict[str, Any]:
    gr.HTML("<h2>Conversations</h2>")
    made: dict[str, Any] = {"new": gr.Button("New conversation", variant="primary", size="sm")}
    made["search"] = gr.Textbox(
        label="Search conversations", placeholder="Search", show_label=False, container=False, elem_id="search"
    )
    made["entries"] = gr.Radio(
        [], label="Conversations", show_label=False, elem_id="entries", container=False, interactive=True
    )
    made["more"] = gr.HTML()
    with gr.Row(elem_classes="actions"):
        made["rename"] = gr.Button("Rename", size="sm", min_width=60)
        made["fork"] = gr.Button("Fork", size="sm", min_width=60)
        made["delete"] = gr.Button("Delete", size="sm", min_width=60)
    with gr.Row(elem_classes="actions"):
        made["export"] = gr.Button("Export", size="sm", min_width=60)
        made["take_in"] = gr.UploadButton(
            "Import", size="sm", min_width=60, file_types=[EXPORTED], visible=offered.imports
        )
    made["download"] = gr.DownloadButton("Download", size="sm", variant="primary", visible=False)
    with gr.Group(visible=False) as made["rename_row"]:
        made["new_name"] = gr.Textbox(label="New name", max_lines=1, elem_id="new-name")
        made["rename_now"] = gr.Button("Rename it", size="sm", variant="primary")
    with gr.Group(visible=False) as made["delete_row"]:
        made["delete_now"] = gr.Button("Delete it for good", size="sm", variant="stop")
    gr.Button("Log out", size="sm", link="logout?all_session=false", visible=offered.log_out)
    return made


def _beside(offered: Offered, settings: Settings) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Accordion("Settings of this conversation", open=False, elem_id="settings"):
        made["system"] = gr.Textbox(settings.system, label="System message", lines=2, max_lines=6)
        made["temperature"] = gr.Slider(
            0, HOTTEST, settings.temperature, step=0.05, label="Temperature", info="0: always the likeliest token"
        )
        made["top_p"] = gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top-p")
        made["max_new_tokens"] = gr.Number(
            settings.max_new_tokens, label="Longest answer, in tokens", precision=0, minimum=1, maximum=MOST_NEW_TOKENS
        )
    gr.HTML("<h2>What it took</h2>")
    made["panel"] = gr.HTML(conversation_panel(None))
    made["numbers"] = gr.HTML(elem_id="numbers")
    made["restart"] = gr.Button("Restart the process", size="sm", visible=offered.restart)
    return made


def _chat(offered: Offered) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Row(elem_id="head"):
        made["title"] = gr.HTML(title(""), elem_id="title")
        made["without"] = gr.Checkbox(label="without the store", elem_id="without", container=False)
    made["chat"] = gr.Chatbot(
        label="Messages",
        elem_id="chat",
        show_label=False,
        editable="user",
        latex_delimiters=[],
        buttons=["copy", "copy_all"],
        feedback_options=None,
        allow_tags=False,
        allow_file_downloads=False,
        reasoning_tags=[("<think>", "</think>")],
        placeholder=f"Say something to {offered.model_name}.",
        height="100%",
    )
    made["note"] = gr.HTML(elem_id="note")
    with gr.Group(visible=False, elem_classes="asking") as made["asking"]:
        made["question"] = gr.HTML()
        with gr.Row():
            made["edit_copy"] = gr.Button("Edit a copy instead", size="sm", variant="primary", min_width=90)
            made["edit_now"] = gr.Button("Edit and drop them", size="sm", variant="stop", min_width=90)
            made["edit_not"] = gr.Button("Cancel", size="sm", min_width=60)
    made["go_on"] = gr.Button("Continue the answer", size="sm", visible=False, elem_id="go-on")
    made["box"] = gr.Textbox(
        label="Your message",
        placeholder="Your message",
        show_label=False,
        lines=1,
        max_lines=8,
        submit_btn=True,
        elem_id="message",
    )
    return made
