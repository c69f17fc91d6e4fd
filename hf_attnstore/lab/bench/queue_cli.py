"""`attnstore bench queue`: whether the sessions that run next are in memory, and what it costs to decide."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_attnstore.lab.bench.one_line import errors_in_one_line

if TYPE_CHECKING:
    from hf_attnstore.lab.bench.queue_bench import Decision, Way


def queue(
    shape: Annotated[str | None, typer.Option(help="A named model with random weights; default small.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name or folder, instead of a shape.", show_default=False)
    ] = None,
    sessions: Annotated[int, typer.Option(min=2, help="Sessions.")] = 16,
    room: Annotated[int, typer.Option(min=1, help="Sessions for which there is memory.")] = 4,
    history: Annotated[int, typer.Option(min=16, help="Tokens of each at the beginning.")] = 1024,
    new: Annotated[int, typer.Option(min=1, help="New tokens of each prompt.")] = 32,
    decode: Annotated[int, typer.Option(min=1, help="Tokens generated in each turn.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every session.")] = 4,
    blocks: Annotated[int, typer.Option(min=0, help="Blocks in the tier for which decisions are timed; 0: not.")] = (
        1_000_000
    ),
    store: Annotated[
        Path | None, typer.Option(help="Folder in which a temporary store is made.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON and Markdown.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Such as bfloat16; auto is that of the shape or checkpoint.")] = "auto",
    seed: Annotated[int, typer.Option(help="For weights, tokens and order.")] = 0,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Let many sessions share a memory tier for a few of them, with a queue and without; time the policies."""
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.bench.queue_bench import BAR_DECISION_SECONDS, BAR_IN_MEMORY, decisions, measure
    from hf_attnstore.lab.bench.shapes import choose_model, load_model

    console = Console()
    with errors_in_one_line():
        longest = history + (rounds + 1) * (new + decode)
        spec = choose_model(
            shape or (None if model else "small"), model, device=device, seed=seed, max_tokens=longest, dtype=dtype
        )
        with console.status("loading the model") as status:
            others = ForeignLoad()
            loaded = load_model(spec)
            ways = measure(loaded, sessions, room, history, new, decode, rounds, seed, store, status.update)
            timed = decisions(blocks, 20_000, status.update) if blocks else []
    about = (
        f"{spec.label} on {spec.device}: {sessions} sessions of {history:,} tokens, memory for {room}, {rounds} turns "
        f"each of {new} new and {decode} generated tokens"
    )
    table = Table(title=escape(about))
    for column in _COLUMNS:
        table.add_column(column)
    for row in _rows(ways):
        table.add_row(*row)
    console.print(table)
    for decision in timed:
        console.print(f"{decision.policy}: {decision.median * 1e6:.1f} µs a decision at {decision.blocks:,} blocks")
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        machine, share = describe_machine(store or output), others.share()
        record = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "about": about,
            "ways": {name: {**asdict(way), "in_memory": way.in_memory} for name, way in ways.items()},
            "decisions": [asdict(decision) for decision in timed],
            "others_share_of_cpu": round(share, 3),
            "machine": machine,
            "versions": versions(),
        }
        (output / "queue.json").write_text(json.dumps(record, indent=1) + "\n")
        (output / "queue.md").write_text(_as_markdown(about, ways, timed, in_words(machine), share))
        console.print(f"Report: {output / 'queue'}.json, .md", highlight=False)
    slow = any(decision.median > BAR_DECISION_SECONDS for decision in timed)
    if check and (ways["queue"].in_memory < BAR_IN_MEMORY or slow):
        raise typer.Exit(1)


_COLUMNS = ("", "turns", "all of it in memory", "blocks from memory", "recomputed", "waited for loads, ms", "seconds")


def _rows(ways: Mapping[str, Way]) -> list[list[str]]:
    return [
        [
            name,
            f"{way.turns}",
            f"{way.in_memory:.1%}",
            f"{way.blocks_in_memory / max(way.blocks, 1):.1%}",
            f"{way.recomputed}",
            f"{statistics.median(way.exposed) * 1e3:.1f}" if way.exposed else "–",
            f"{way.seconds:.1f}",
        ]
        for name, way in ways.items()
    ]


def _as_markdown(about: str, ways: Mapping[str, Way], timed: Sequence[Decision], machine: str, share: float) -> str:
    lines = [
        "# attnstore bench queue",
        "",
        f"Measured on {machine}; other processes took {share:.0%} of its cores meanwhile.",
        "",
        f"{about}. With the queue every session has a turn that waits, which the store is told of; one by one, each "
        "comes when the one before is over, and nobody says anything before.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(_COLUMNS) - 1),
        *("| " + " | ".join(row) + " |" for row in _rows(ways)),
        "",
    ]
    if timed:
        lines += [
            f"A decision in a full tier of {timed[0].blocks:,} blocks (one block goes, another comes), in µs:",
            "",
            "| policy | median | mean |",
            "| --- | ---: | ---: |",
            *(f"| {d.policy} | {d.median * 1e6:.1f} | {d.mean * 1e6:.1f} |" for d in timed),
            "",
        ]
    return "\n".join(lines)
