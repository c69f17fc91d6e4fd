"""`attnstore bench codecs`: what each way to write KV costs and gives, on a model and texts of one's own."""

from __future__ import annotations

from enum import StrEnum
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


class Half(StrEnum):
    """What can be measured by itself."""

    quality = "quality"
    speed = "speed"


def codecs(
    model: Annotated[
        str | None,
        typer.Option(help="Hub name or folder; without it, the small model of the repository.", show_default=False),
    ] = None,
    text: Texts = None,
    only: Annotated[Half | None, typer.Option(help="One half: figures that depend on no clock, or times.")] = None,
    codec: Annotated[
        list[str] | None, typer.Option(help="Judge these by quality, and nothing beside them; repeat it.")
    ] = None,
    history: Annotated[int, typer.Option(min=256, help="Tokens that go through the codec.")] = 1024,
    scored: Annotated[int, typer.Option(min=2, help="Tokens after them that are scored.")] = 256,
    new: Annotated[int, typer.Option(min=1, help="Tokens after them that a timed turn computes.")] = 32,
    texts: Annotated[int, typer.Option(min=1, help="Passages of each text at most.")] = 8,
    answers: Annotated[int, typer.Option(min=0, help="Tokens of greedy answers that are compared; 0 for none.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Times that resumed turns are measured.")] = 7,
    floor: Annotated[bool, typer.Option(help="Also the model in bfloat16; of one in bfloat16, in float32.")] = True,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the report: JSON, PNG and Markdown. What it has of other types, lengths of history "
            "and codecs stays in it."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Such as bfloat16 or float32; auto is what the checkpoint has.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.", show_default=False)] = None,
) -> None:
    """Measure codecs: bytes, what becomes of the next tokens, and the time to the first one from several media."""
    console = Console()
    with errors_in_one_line():
        from hf_attnstore.chat.model import load_chat_model
        from hf_attnstore.lab.bench import codec_bench as bench
        from hf_attnstore.lab.bench.codec_report import Record
        from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine
        from hf_attnstore.lab.demo.script import CHAPTER

        record = Record.opened(output, Path(model).name if model else "small-model")
        loaded, tokenizer = load_chat_model(model, device=device, dtype=dtype)
        kind, paths = str(loaded.dtype).removeprefix("torch."), text or [CHAPTER]
        with console.status("preparing the texts") as status:
            after = max(0 if only == Half.speed else scored, 0 if only == Half.quality else new)
            found = [ids.to(loaded.device) for ids in bench.read_texts(tokenizer, paths, history + after, texts)]
            if only != Half.speed:
                named = codec or bench.CODECS
                passages = [ids[:, : history + scored] for ids in found]
                theirs = "bfloat16" if kind == "float32" else "float32"
                other = load_chat_model(model, device=device, dtype=theirs)[0] if floor and not codec else None
                judged = bench.quality(
                    loaded, other, passages, named, history, answers, status.update,
                    references={} if codec else bench.REFERENCES,
                )  # fmt: skip
                record.judge(kind, history, scored, len(passages), [path.name for path in paths], judged)
            if only != Half.quality:
                ids = found[0][:, : history + new]
                others = ForeignLoad()
                resumed = bench.resume(loaded, ids, bench.CODECS, list(bench.MEDIA), new, repeats, status.update)
                record.time(kind, resumed, others.share(), describe_machine(output or Path.cwd()))
        console.print(Markdown(record.as_markdown()))
        if output is not None:
            record.write()
            console.print(f"Report: {output / record.stem}.json, .md, .png", highlight=False)


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
        from hf_attnstore.lab.bench.codec_report import QUALITY_COLUMNS, quality_rows
        from hf_attnstore.lab.demo.script import CHAPTER
        from hf_attnstore.lab.markdown import markdown_table
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
