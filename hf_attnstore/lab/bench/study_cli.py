"""`attnstore bench truncation`: what it costs to outgrow the window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_attnstore.lab.bench.one_line import errors_in_one_line
from hf_attnstore.lab.record import write_record


def truncation(
    model: Annotated[
        str | None,
        typer.Option(help="Hub name or folder; without it, the small model of the repository.", show_default=False),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="A text that the model was not trained on, or dialogues (.jsonl, .jsonl.gz); repeat it. Without any, "
            "the model samples its own.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of each text at most.")] = 16384,
    window: Annotated[int | None, typer.Option(min=16, help="Tokens; by default the model's positions.")] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens fed at a time.")] = 64,
    keep_first: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Leading tokens kept, in further runs of TT and CA; repeat it. [default: 1 and 4]"),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this method, keeping so many leading tokens, such as CA:4, or of dialogues the system part, "
            "CA:system; repeat it. Instead of --keep-first.",
            show_default=False,
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instead of streaming, take so many single truncations of each text apart: whose KV would have to be "
            "computed anew.",
            show_default=False,
        ),
    ] = None,
    resume_shape: Annotated[
        str, typer.Option(help="Shape on which resumed turns are timed; 'none' leaves that out.")
    ] = "small",
    resume_history: Annotated[int, typer.Option(min=32, help="Tokens of KV in a resumed turn.")] = 4096,
    repeats: Annotated[int, typer.Option(min=1, help="Times that resumed turns are measured.")] = 9,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the report: JSON, PNG and Markdown; the first as each text and method ends."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda or cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="Such as bfloat16 or float32; auto is what the checkpoint has.")] = "auto",
    seed: Annotated[int, typer.Option(help="For sampled text and random weights.")] = 0,
    check: Annotated[bool, typer.Option(help="Exit with 1 if a truncated resume costs more than its bar.")] = False,
) -> None:
    """Stream a text far past the window, by truncation with recompute, by moved keys, and by naively cut keys.

    Reports perplexity, tokens computed again, and what a resumed turn costs with truncation and without.
    """
    console = Console()
    with errors_in_one_line():
        if parts is not None:
            _parts(console, model, text or [], parts, window, chunk, device, dtype)
            return
        missed = _truncation(
            console, model, text or [], tokens, window, chunk, run or [], keep_first or [1, 4], resume_shape,
            resume_history, repeats, output, device, dtype, seed,
        )  # fmt: skip
    if check and missed:
        raise typer.Exit(1)


def _parts(
    console: Console,
    name: str | None,
    texts: list[Path],
    count: int,
    window: int | None,
    chunk: int,
    device: str | None,
    dtype: str,
) -> None:
    import statistics

    import torch

    from hf_attnstore.chat.model import load_chat_model
    from hf_attnstore.lab.bench.shapes import BenchError
    from hf_attnstore.lab.bench.study import tokenised
    from hf_attnstore.lab.bench.study_parts import parts

    if not texts or window is None:
        raise BenchError("--parts takes truncations of a --text apart: give one, and a --window.")
    model, tokenizer = load_chat_model(name or "small", device=device, dtype=dtype)
    for path in texts:
        ids = tokenised(tokenizer, path, by_paragraph=name is None).to(model.device)
        step = window + chunk
        places = range(1, ids.shape[1] - step, step)[:count]
        if not places:
            raise BenchError(f"{path.name} has {ids.shape[1]} tokens: too few for a window of {window}.")
        # each begins as the text does
        begun = [torch.cat([ids[:, :1], ids[:, place : place + step]], dim=1) for place in places]
        found = [parts(model, one, window, chunk) for one in begun]
        console.print(
            f"{path.name}: {chunk} tokens after each of {len(places)} truncations, nats a token", highlight=False
        )
        for title in found[0]:
            values = [one[title] for one in found]
            more = statistics.mean(one[title] - one["computed anew"] for one in found)
            console.print(f"  {title:36} {statistics.mean(values):.4f}  {more:+.4f}", highlight=False)


def _run(text: str, methods: Sequence[str]) -> tuple[str, int | str]:
    """A method and how many tokens it keeps, of `CA:4` or `CA:system`."""
    from hf_attnstore.lab.bench.shapes import BenchError
    from hf_attnstore.lab.bench.study import SYSTEM

    method, _, first = text.partition(":")
    if method not in methods or not (first.isdecimal() or first == SYSTEM):
        raise BenchError(
            f"--run takes {', '.join(methods)} with a number of tokens or {SYSTEM}, such as CA:4, not {text!r}."
        )
    return method, first if first == SYSTEM else int(first)


def _truncation(
    console: Console,
    name: str | None,
    texts: list[Path],
    tokens: int,
    window: int | None,
    chunk: int,
    runs: list[str],
    keep_first: list[int],
    resume_shape: str,
    resume_history: int,
    repeats: int,
    output: Path | None,
    device: str | None,
    dtype: str,
    seed: int,
) -> bool:
    from hf_attnstore.cache.model.structure import positions_of
    from hf_attnstore.chat.model import load_chat_model
    from hf_attnstore.lab.bench.machine import describe_machine, in_words, versions
    from hf_attnstore.lab.bench.shapes import BenchError, choose_model, load_model
    from hf_attnstore.lab.bench.study import (
        Resumed,
        Stream,
        leading,
        methods_for,
        own_text,
        resume,
        stream,
        tokenised,
    )
    from hf_attnstore.lab.bench.study_report import RESUME_BAR, as_markdown, draw, print_study

    loaded, tokenizer = load_chat_model(name or "small", device=device, dtype=dtype)
    size = window or positions_of(loaded.config.get_text_config(decoder=True))
    if size is None:
        raise BenchError("This model states no number of positions: give a --window.")
    label = Path(name).name if name else "small-model"
    stem = (output or Path()) / f"truncation-{label}"
    record: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"), "model": label, "window": size, "chunk": chunk,
        "versions": versions(),
    }  # fmt: skip
    streams: list[Stream] = []
    resumed: Resumed | None = None

    def write() -> None:
        record["streams"] = [{**asdict(found), "perplexity": found.perplexity} for found in streams]
        record["resumed"] = asdict(resumed) if resumed is not None else None
        write_record(stem.with_name(f"{stem.name}.json"), record)

    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        record["machine"] = describe_machine(output)
    with console.status("preparing the text") as status:
        plan: list[tuple[str, int | str]] = [(method, 0) for method in methods_for(loaded)]
        plan += [(method, first) for first in keep_first for method in ("TT", "CA")]
        if runs:
            plan = [_run(text, methods_for(loaded)) for text in runs]
        if texts:
            # the small model was trained on texts that were tokenised paragraph by paragraph
            sources = [(path, tokenised(tokenizer, path, by_paragraph=name is None)) for path in texts]
        else:
            sampled = own_text(loaded, tokens, seed, tokenizer.bos_token_id)
            sources = [(Path("text sampled by the model"), sampled)]
        ids = [(path, found[:, :tokens].to(loaded.device)) for path, found in sources]
        record["texts"] = [{"name": path.name, "tokens": text.shape[1]} for path, text in ids]
        for method, first in plan:
            kept = {path: leading(tokenizer, path, first) for path, _ in ids}
            if all(count is None for count in kept.values()):
                raise BenchError("None of these texts has a system part: give dialogues, or numbers of tokens.")
            merged = Stream(method, first)
            streams.append(merged)
            for path, text in ids:
                count = kept[path]
                if count is None:
                    continue
                status.update(f"{merged.label}: {path.name}, {text.shape[1]:,} tokens")
                merged.add(path.name, stream(loaded, text, method, window=size, chunk=chunk, keep_first=count))
                if output is not None:
                    write()
        if resume_shape != "none":
            status.update("building a model to time resumed turns")
            spec = choose_model(resume_shape, None, device=device or "auto", max_tokens=2 * resume_history + 64)
            other = load_model(spec)
            resumed = resume(other, resume_history, 32, repeats, seed, status.update)
    about = f"{label}, window {size:,}, {', '.join(path.name for path, _ in ids)}"
    print_study(console, about, streams, resumed)
    if output is not None:
        write()
        draw(about, streams, resumed, size, stem.with_name(f"{stem.name}.png"))
        report = as_markdown(about, streams, resumed, in_words(record["machine"]), record["versions"])
        stem.with_name(f"{stem.name}.md").write_text(f"{report}\n![{about}]({stem.name}.png)\n")
        console.print(f"Report: {stem}.json, .md, .png", highlight=False)
    return resumed is not None and any(resumed.ratio(tier) > RESUME_BAR for tier in ("memory", "disk"))
