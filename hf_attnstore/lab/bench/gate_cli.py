"""`attnstore bench gate`: what it costs to choose between loading and computing, and to choose wrongly."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_attnstore.lab.bench.one_line import errors_in_one_line

_HISTORIES = [64, 256, 1024, 4096, 8192]


def gate(
    shape: Annotated[str | None, typer.Option(help="A named model with random weights; default small.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub name or folder, instead of a shape.", show_default=False)
    ] = None,
    history: Annotated[
        list[int] | None, typer.Option(min=16, help="Tokens of history; repeat it.", show_default=str(_HISTORIES))
    ] = None,
    new: Annotated[int, typer.Option(min=1, help="New tokens of each prompt.")] = 32,
    bandwidth: Annotated[
        list[float] | None,
        typer.Option(
            help="MB/s of a disk that is made slow; repeat it. Default: five around where loading takes as long as "
            "computing.",
            show_default=False,
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times that everything is measured.")] = 9,
    store: Annotated[
        Path | None, typer.Option(help="Folder in which a temporary store is made.", show_default=False)
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for the report: JSON, PNG and Markdown.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Such as bfloat16; auto is that of the shape or checkpoint.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Torch threads.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="For weights and tokens.")] = 0,
    check: Annotated[bool, typer.Option(help="Exit with 1 if the mean regret is above its bar.")] = False,
) -> None:
    """Resume conversations from memory and from disks of different speed: always loading, always computing, the gate.

    Regret is how much longer the gate's choice takes than the better of the other two.
    """
    console = Console()
    with errors_in_one_line():
        missed = _gate(
            console, shape, model, history or _HISTORIES, new, [value * 1e6 for value in bandwidth or []], repeats,
            store, output, device, dtype, threads, seed,
        )  # fmt: skip
    if check and missed:
        raise typer.Exit(1)


def _gate(
    console: Console,
    shape: str | None,
    name: str | None,
    histories: list[int],
    new: int,
    bandwidths: list[float],
    repeats: int,
    folder: Path | None,
    output: Path | None,
    device: str,
    dtype: str,
    threads: int | None,
    seed: int,
) -> bool:
    import torch

    from hf_attnstore.lab.bench.gate_bench import measure
    from hf_attnstore.lab.bench.gate_report import (
        REGRET_BAR,
        as_markdown,
        draw,
        mean_choice_regret,
        mean_regret,
        print_cells,
        worst,
    )
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.bench.shapes import choose_model, load_model

    if threads is not None:
        torch.set_num_threads(threads)
    spec = choose_model(
        shape or (None if name else "small"),
        name,
        device=device,
        seed=seed,
        max_tokens=max(histories) + new + 8,
        dtype=dtype,
    )
    with console.status("loading the model") as status:
        model = load_model(spec)
        others = ForeignLoad()
        cells = measure(model, histories, new, bandwidths, repeats, seed, folder, status.update)
    about = f"{spec.label} on {spec.device}, {new} new tokens"
    print_cells(console, about, cells)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        machine, share = describe_machine(folder or output), others.share()
        record: dict[str, Any] = {
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "model": spec.label,
            "new": new,
            "repeats": repeats,
            "mean_regret": mean_regret(cells),
            "mean_choice_regret": mean_choice_regret(cells),
            "largest_regret": worst(cells).regret,
            "others_share_of_cpu": round(share, 3),
            "machine": machine,
            "versions": versions(),
            "cells": [{**asdict(cell), "regret": cell.regret, "choice_regret": cell.choice_regret} for cell in cells],
        }
        stem = output / (f"gate-{Path(name).name}" if name else "gate")
        stem.with_name(f"{stem.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        draw(about, cells, stem.with_name(f"{stem.name}.png"))
        report = as_markdown(about, cells, new, repeats, in_words(machine), share, versions())
        stem.with_name(f"{stem.name}.md").write_text(f"{report}\n![{about}]({stem.name}.png)\n")
        console.print(f"Report: {stem}.json, .md, .png", highlight=False)
    return mean_regret(cells) > REGRET_BAR
