"""`attnstore bench codecs`: what each way to write KV costs and gives, on a model and texts of one's own."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

from hf_attnstore.cli.options import Device, Dtype, Model
from hf_attnstore.lab.bench.one_line import errors_in_one_line

Texts = Annotated[
    list[Path] | None,
    typer.Option(
        help="A plain text, or dialogues as JSON lines (.jsonl, .jsonl.gz); repeat it. Without any, the chapter "
        "of a book that the demo talks about.",
        show_default=False,
    ),
]


def codecs(
    model: Annotated[
        str | None,
        typer.Option(help="Hub name or folder; without it, the small model of the repository.", show_default=False),
    ] = None,
    text: Texts = None,
    history: Annotated[int, typer.Option(min=256, help="Tokens that go through the codec.")] = 1024,
    scored: Annotated[int, typer.Option(min=2, help="Tokens after them that are scored.")] = 256,
    texts: Annotated[int, typer.Option(min=1, help="Passages of each text at most.")] = 8,
    answers: Annotated[int, typer.Option(min=0, help="Tokens of greedy answers that are compared; 0 for none.")] = 32,
    repeats: Annotated[int, typer.Option(min=0, help="Times that resumed turns are measured; 0 leaves it out.")] = 7,
    floor: Annotated[bool, typer.Option(help="Also the same model in bfloat16.")] = True,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON, PNG and Markdown.")] = None,
    dtype: Annotated[str, typer.Option(help="Such as bfloat16 or float32; auto is what the checkpoint has.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default=False)] = None,
) -> None:
    """Measure codecs: bytes, what becomes of the next tokens, and the time to the first one from several media."""
    console = Console()
    with errors_in_one_line():
        from hf_attnstore.lab.demo.script import CHAPTER

        _codecs(
            console, model, text or [CHAPTER], history, scored, texts, answers, repeats, floor, output, dtype, device
        )  # fmt: skip


def _codecs(
    console: Console,
    name: str | None,
    paths: list[Path],
    history: int,
    scored: int,
    count: int,
    answers: int,
    repeats: int,
    floor: bool,
    output: Path | None,
    dtype: str,
    device: str | None,
) -> None:
    from hf_attnstore.chat.model import load_chat_model
    from hf_attnstore.lab.bench.codec_bench import CODECS, MEDIA, quality, read_texts, resume
    from hf_attnstore.lab.bench.codec_report import as_markdown, draw
    from hf_attnstore.lab.bench.machine import describe_machine, in_words, versions

    loaded, tokenizer = load_chat_model(name, device=device, dtype=dtype)
    with console.status("preparing the texts") as status:
        found = [ids.to(loaded.device) for ids in read_texts(tokenizer, paths, history + scored, count)]
        other = load_chat_model(name, device=device, dtype="bfloat16")[0] if floor else None
        judged = quality(loaded, other, found, CODECS, history, answers, status.update)
        timed = resume(loaded, found[0], CODECS, list(MEDIA), scored, repeats, status.update) if repeats else None
    label = Path(name).name if name else "small-model"
    kind = str(loaded.dtype).removeprefix("torch.")
    about = f"{label}, {kind}, {history:,} tokens of history, {len(found)} passages of {scored:,} tokens scored"
    machine = describe_machine(output if output is not None else Path.cwd())
    report = as_markdown(about, judged, timed, in_words(machine), versions())
    console.print(Markdown(report))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        record = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": label,
            "dtype": kind,
            "history": history,
            "scored": scored,
            "texts": [path.name for path in paths],
            "quality": {codec: asdict(one) for codec, one in judged.items()},
            "resumed": asdict(timed) if timed is not None else None,
            "machine": machine,
            "versions": versions(),
        }
        stem = f"codecs-{label}"
        (output / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(about, judged, output / f"{stem}.png")
        (output / f"{stem}.md").write_text(f"{report}\n![Bytes against quality]({stem}.png)\n")
        console.print(f"Report: {output / stem}.json, .md, .png", highlight=False)


def doctor(
    model: Model = None,
    codec: Annotated[str, typer.Option(help="The codec to judge: fp16, int8, int8z or int4.")] = "int8",
    text: Texts = None,
    history: Annotated[int, typer.Option(min=256, help="Tokens that go through the codec.")] = 1024,
    scored: Annotated[int, typer.Option(min=2, help="Tokens after them that are scored.")] = 128,
    texts: Annotated[int, typer.Option(min=1, help="Passages of each text at most.")] = 4,
    bound: Annotated[float, typer.Option(min=0, help="Divergence of the next token, in nats, to warn above.")] = 0.005,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Measure what a lossy codec changes of a model's next tokens, on texts of your own; fails above a bound."""
    console = Console()
    with errors_in_one_line():
        from hf_attnstore.chat.model import load_chat_model
        from hf_attnstore.lab.bench.codec_bench import quality, read_texts
        from hf_attnstore.lab.bench.codec_report import QUALITY_COLUMNS, markdown_table, quality_rows
        from hf_attnstore.lab.demo.script import CHAPTER
        from hf_attnstore.store.blocks.codecs import chosen_codec

        judged_codec = chosen_codec(codec)
        loaded, tokenizer = load_chat_model(model, device=device, dtype=dtype)
        with console.status("preparing the texts") as status:
            found = [ids.to(loaded.device) for ids in read_texts(tokenizer, text or [CHAPTER], history + scored, texts)]
            judged = quality(loaded, None, found, [judged_codec], history, 0, status.update, references={})
        console.print(Markdown("\n".join(markdown_table(QUALITY_COLUMNS[:-1], [r[:-1] for r in quality_rows(judged)]))))
        worst = max((max(one.kl) for one in judged.values()), default=0.0)
        if worst > bound:
            console.print(
                f"[yellow]On one of {len(found)} passages the next tokens diverge by {worst:.4f} nats, more than "
                f"{bound}:[/] keep conversations of this model by a finer codec, or raw."
            )
            raise typer.Exit(1)
        console.print(f"At most {worst:.6f} nats on {len(found)} passages, within the bound of {bound}.")
