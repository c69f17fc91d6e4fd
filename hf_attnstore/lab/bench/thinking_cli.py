"""`attnstore lab thinking`, and `templates`: conversations whose answers reason."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_attnstore.lab.bench.one_line import errors_in_one_line


def thinking(
    turns: Annotated[int, typer.Option(min=2, help="Turns of each conversation.")] = 20,
    message: Annotated[int, typer.Option(min=1, help="Tokens of a message, about.")] = 24,
    reasoning: Annotated[int, typer.Option(min=1, help="Tokens of an answer's reasoning.")] = 96,
    answer: Annotated[int, typer.Option(min=1, help="Tokens of an answer, beside its reasoning.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured.")] = 1,
    model: Annotated[
        str | None,
        typer.Option(help="Hub name or folder; without it, the small model of the repository.", show_default=False),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON, PNG and Markdown.")] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="Such as bfloat16 or float32; auto is what the checkpoint has.")] = "auto",
    seed: Annotated[int, typer.Option(help="For messages and reasoning.")] = 0,
) -> None:
    """Measure turns after answers that reasoned, for three ways in which chat templates treat reasoning.

    Without the store, with it, and with `ChatSession(canonicalize=True)`: tokens prefilled and time to the first token.
    """
    console = Console()
    with errors_in_one_line():
        _thinking(console, turns, message, reasoning, answer, repeats, model, output, device, dtype, seed)


def _thinking(
    console: Console,
    turns: int,
    message: int,
    reasoning: int,
    answer: int,
    repeats: int,
    name: str | None,
    output: Path | None,
    device: str | None,
    dtype: str,
    seed: int,
) -> None:
    from hf_attnstore.chat.model import load_chat_model
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.bench.thinking import Lengths, run
    from hf_attnstore.lab.bench.thinking_report import as_markdown, draw, print_talks
    from hf_attnstore.lab.bench.thinking_styles import STYLES, dress, fit

    lengths = Lengths(message, reasoning, answer)
    label = Path(name).name if name else "small-model"
    about = f"{label}, {turns} turns"
    others = ForeignLoad()
    talks = []
    with console.status("loading the model") as status:
        for style in STYLES:
            model, tokenizer = load_chat_model(name or "small", device=device, dtype=dtype)
            plain, _ = load_chat_model(name or "small", device=device, dtype=dtype)
            dressed = dress(tokenizer, style)
            dressed.model_max_length = 1 << 30  # there is no need to warn of long conversations
            for one in (model, plain):
                fit(one, dressed)
                # nothing is to leave the window here; what the model says so far out is of no interest
                positions = 2 * turns * (message + reasoning + answer)
                config = one.config.get_text_config(decoder=True)
                config.max_position_embeddings = max(config.max_position_embeddings, positions)
            talks.append(
                run(
                    model,
                    plain,
                    dressed,
                    style,
                    turns=turns,
                    lengths=lengths,
                    repeats=repeats,
                    seed=seed,
                    progress=status.update,
                )
            )
    print_talks(console, about, talks)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        machine, share = describe_machine(output), others.share()
        record: dict[str, Any] = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": label,
            "lengths": asdict(lengths),
            "repeats": repeats,
            "others_share_of_cpu": round(share, 3),
            "machine": machine,
            "versions": versions(),
            "talks": [asdict(talk) for talk in talks],
        }
        (output / "thinking.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(about, talks, output / "thinking.png")
        report = as_markdown(about, lengths, talks, in_words(machine), share, versions())
        (output / "thinking.md").write_text(f"{report}\n![{about}](thinking.png)\n")
        console.print(f"Report: {output / 'thinking'}.json, .md, .png", highlight=False)


def templates(
    folder: Annotated[Path, typer.Argument(help="A folder of chat templates, *.jinja.", show_default=False)],
    model: Annotated[str, typer.Option(help="Whose tokenizer counts: hub name, folder, or smollm2.")] = "smollm2",
    output: Annotated[Path | None, typer.Option(help="A Markdown file to write.")] = None,
) -> None:
    """See which chat templates cut reasoning out of earlier answers, and what that costs the next turn.

    No model computes; tokens are those of a tokenizer.
    """
    from rich.table import Table
    from transformers import AutoTokenizer

    from hf_attnstore.chat.model import model_source
    from hf_attnstore.lab.bench.template_survey import COLUMNS, CUT, read_templates, survey

    with errors_in_one_line():
        tokenizer = AutoTokenizer.from_pretrained(model_source(model))
        every = read_templates(folder)
        found = survey(tokenizer, every)
    table = Table()
    for number, column in enumerate(COLUMNS):
        table.add_column(column, justify="right" if number > 4 else "left")
    for one in found:
        table.add_row(*one.row)
    cut = [one for one in found if one.in_text == CUT]
    about = (
        f"{len(found)} of {len(every)} templates know of reasoning. In the text of an earlier answer {len(cut)} "
        f"cut it, in a field {sum(one.in_field == CUT for one in found)}, and while a tool's answer is looked at "
        f"{sum(one.after_tool == CUT for one in found)}."
    )
    console = Console()
    console.print(table, about, highlight=False)
    if output is not None:
        lines = [f"| {' | '.join(COLUMNS)} |", f"|---|---|---|---|---|{'---:|' * 3}"]
        lines += [f"| {' | '.join(one.row)} |" for one in found]
        notes = (
            "In the text: the answer comes back as it was generated, `<think>` tags and all, as a `ChatSession` "
            "gives it; where the template opens the reasoning, without that tag. A field: `reasoning_content`, "
            "`reasoning` and `thinking` beside the answer; `cut` is also a template that knows no such field. After"
            " a tool's answer: the same in the answer that called the tool. Known: tokens fed and generated before "
            "the next message, the reasoning in the text, by the tokenizer that was asked with; reused: those with "
            "which the next prompt of a `ChatSession` begins; prefilled: the rest of that prompt. Models that mark "
            "reasoning in other ways than `<think>` have their templates put marks around that text, so for them "
            "only the column of the field counts."
        )
        output.write_text("\n".join(["# Chat templates and reasoning", "", about, "", *lines, "", notes, ""]))
