"""`attnstore bench peers`."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hf_attnstore.lab.bench.one_line import errors_in_one_line


def peers(
    model: Annotated[str, typer.Option(help="Hub name or folder; llama.cpp is run for smollm2.")] = "smollm2",
    history: Annotated[int, typer.Option(min=2, help="Tokens of history.")] = 2000,
    new: Annotated[int, typer.Option(min=1, help="New prompt tokens on top of the history.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Times everything is measured, after a warm-up.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads that every system computes with.")] = 2,
    dtype: Annotated[str, typer.Option(help="Of the model in transformers.")] = "float32",
    seed: Annotated[int, typer.Option(help="For the token ids.")] = 0,
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.", show_default=False)] = None,
) -> None:
    """Beside other ways to resume a turn, in one run: ratios within each system.

    llama.cpp's server needs the package xllamacpp, and the model as its package has it; without them it is left out.
    """
    import torch

    from hf_attnstore.lab.bench.llama_server import LlamaServer
    from hf_attnstore.lab.bench.machine import ForeignLoad, describe_machine, in_words, versions
    from hf_attnstore.lab.bench.measure import Workload
    from hf_attnstore.lab.bench.peers import edited_in_llama_cpp, in_llama_cpp, in_transformers
    from hf_attnstore.lab.bench.shapes import BenchError, choose_model, load_model, random_ids

    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(threads)
    others, left_out, edited = ForeignLoad(), "", None
    with errors_in_one_line(), tempfile.TemporaryDirectory(prefix="attnstore-peers-") as folder:
        machine = describe_machine(Path(folder))
        most = history + new + 2
        loaded = load_model(choose_model(None, model, device="cpu", seed=seed, max_tokens=most, dtype=dtype))
        work = Workload(history, new, 1, repeats, seed)
        with console.status("") as status:
            rows = in_transformers(
                loaded, work, Path(folder) / "ours", lambda doing, total: status.update(f"transformers: {doing}")
            )
            ids = random_ids(loaded, history, (seed, history))[0].tolist()
            try:
                status.update("llama.cpp's server")
                server = LlamaServer(model, most + 256, threads, Path(folder) / "slots")
                rows.append(in_llama_cpp(server, ids, work, int(loaded.config.vocab_size)))
                edited = edited_in_llama_cpp(server, ids)
            except BenchError as error:
                left_out = str(error)
    table = Table("", "resumed / kept", "resumed / computed again", "KiB a token", box=None)
    for row in rows:
        table.add_row(
            escape(row.title),
            f"{row.against_kept:.2f}",
            f"{row.against_recompute:.3f}",
            f"{row.bytes_per_token / 1024:.1f}",
        )
    share = others.share()
    console.print(
        f"{escape(model)}, {dtype}, {history:,} + {new} tokens, {threads} threads, {escape(in_words(machine))}"
    )
    console.print(table)
    console.print(
        f"Seconds to the first token, medians of ratios of {repeats} repeats; others used {share:.0%} of the CPUs."
    )
    if edited is not None:
        console.print(f"With its middle token changed, llama.cpp's slot reuses {edited:,} of {history:,} tokens.")
    if left_out:
        console.print(escape(left_out), style="yellow")
    if output is not None:
        record = {"machine": machine, "versions": versions(), "model": model, "dtype": dtype, "threads": threads}
        record |= {"history": history, "new": new, "others": share, "edited": edited, "left_out": left_out}
        output.write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
