"""`attnstore sim`: the hierarchy on a virtual clock, on the paper's workload or a trace."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .live import Turns
    from .plan import Plan
    from .replay import Requests
    from .runs import Run

app = typer.Typer(
    help="Simulate the store's tiers and policies: the paper's workload, traces, and the report on both.",
    no_args_is_help=True,
)

Policies = Annotated[
    list[str] | None, typer.Option("--policy", help="Eviction policy; repeat it.", show_default="all that matter")
]
Output = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file, too.", show_default=False)]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at the same time.")]
_CORES = os.cpu_count() or 1
_REPLAYED = ["lru", "fifo", "predictive"]
"""Policies that a live store is driven with."""
_COMPUTED = ["predictive"]
"""Those where a model computes the turns."""
Codecs = Annotated[list[str] | None, typer.Option("--codec", help="raw, int8 or int4; repeat it.", show_default="raw")]
Blocks = Annotated[int, typer.Option("--block-tokens", min=16, help="Tokens of a block, where the trace does not say.")]


@app.command()
def paper(
    model: Annotated[int | None, typer.Option(min=0, max=3, help="13B, 65B, 70B, Falcon; by default all.")] = None,
    sessions: Annotated[int, typer.Option(min=1, help="Conversations.")] = 9000,
    gap: Annotated[float, typer.Option(min=0, help="Mean seconds between an answer and the next turn.")] = 30.0,
    policy: Policies = None,
    queue: Annotated[bool, typer.Option("--queue/--no-queue", help="Whether the store knows what waits.")] = True,
    memory: Annotated[str, typer.Option(help="Host memory for KV.")] = "128GB",
    disk: Annotated[str, typer.Option(help="Disk for KV.")] = "10TB",
    decode: Annotated[float, typer.Option(min=0.001, help="Decoding time, as a multiple of the arithmetic's.")] = 1.0,
    depth: Annotated[float, typer.Option(min=0.01, help="Look-ahead, as a multiple of the paper's windows.")] = 1.0,
    decoupled: Annotated[
        bool, typer.Option("--decoupled/--invalidate", help="Whether KV stays of use when the window overflows.")
    ] = True,
    block_tokens: Blocks = 1024,
    seed: Annotated[int, typer.Option(help="For the workload.")] = 0,
    codec: Codecs = None,
    jobs: Jobs = 1,
    output: Output = None,
) -> None:
    """The paper's sessions on its models and machines, against recomputing everything."""
    from ...sizes import parse_bytes
    from .paper import SETTINGS
    from .runs import NO_STORE, PaperRun

    chosen = range(len(SETTINGS)) if model is None else [model]
    runs = [
        PaperRun(
            number, name, queue, sessions=sessions, gap=gap, seed=seed, memory=parse_bytes(memory),
            disk=parse_bytes(disk), depth=depth, decode=decode, moved=decoupled, block_tokens=block_tokens, codec=kept,
        )
        for number in chosen
        for name in (NO_STORE, *_policies(policy, ["predictive", "lru"]))
        for kept in (_codecs(codec) if name != NO_STORE else ["raw"])
    ]  # fmt: skip
    found = _do(runs, jobs)
    table = Table(title=f"{sessions:,} sessions, gap {gap:g} s, {memory} + {disk}")
    _served_columns(table)
    for run in runs:
        figures = found[run]
        kept = f", {run.codec}" if codec else ""
        _served_row(table, f"{SETTINGS[run.setting].model.name}, {run.policy}{kept}", figures)
    Console().print(table)
    _write(output, runs, found)


@app.command()
def trace(
    file: Annotated[Path, typer.Argument(help="JSON lines, also gzipped.")],
    kind: Annotated[str, typer.Option("--format", help="auto, mooncake or agent.")] = "auto",
    policy: Policies = None,
    capacity: Annotated[
        list[float] | None,
        typer.Option(help="Percent of the trace's different blocks; repeat it.", show_default="1 to 50"),
    ] = None,
    depth: Annotated[float, typer.Option(min=0, help="Look-ahead, in turns that fit into the store; 0: none.")] = 0.0,
    wrong: Annotated[float, typer.Option(min=0, max=1, help="Share of what is foreseen that is wrong.")] = 0.0,
    serve: Annotated[
        int | None,
        typer.Option(
            min=0, max=3, help="Also serve it, in its own time, on one of the paper's settings.", show_default=False
        ),
    ] = None,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests come so many times as fast.")] = 1.0,
    thinking: Annotated[float, typer.Option(min=0, help="People think so many times as long.")] = 1.0,
    block_tokens: Blocks = 256,
    codec: Codecs = None,
    jobs: Jobs = 1,
    output: Output = None,
) -> None:
    """A trace against stores of several sizes; with --serve also on a clock."""
    from .plan import CAPACITIES, CURVES
    from .runs import NO_STORE, ServedTrace, TraceRun

    _check_kind(kind)
    shares = [share / 100 for share in capacity] if capacity else list(CAPACITIES)
    names = _policies(policy, list(CURVES))
    ways = [(name, kept) for name in names for kept in _codecs(codec)]
    curves = [
        TraceRun(
            str(file), name, share, depth=depth, wrong=wrong, thinking=thinking, block_tokens=block_tokens, kind=kind,
            codec=kept,
        )
        for name, kept in ways
        for share in shares
    ]  # fmt: skip
    served = []
    if serve is not None:
        stored = [name for name in names if " " not in name and name != "optimum"]
        served = [
            ServedTrace(
                str(file), serve, name, rate=rate, thinking=thinking, block_tokens=block_tokens, kind=kind, codec=kept
            )
            for name, kept in ((NO_STORE, "raw"), *((name, kept) for name, kept in ways if name in stored))
        ]
    runs: list[Run] = [*curves, *served]
    found = _do(runs, jobs)
    table = Table(title=f"{file.name}: share of prompt tokens found", caption="capacity in percent of all blocks")
    table.add_column("policy")
    for share in shares:
        table.add_column(f"{100 * share:g} %", justify="right")
    for number, (name, kept) in enumerate(ways):
        row = curves[number * len(shares) : (number + 1) * len(shares)]
        table.add_row(f"{name}, {kept}" if codec else name, *(f"{found[run]['token_hit_rate']:.3f}" for run in row))
    console = Console()
    console.print(table)
    if served:
        table = Table(title="served, in its own time")
        _served_columns(table)
        for run in served:
            _served_row(table, f"{run.policy}, {run.codec}" if codec else run.policy, found[run])
        console.print(table)
    _write(output, runs, found)


@app.command()
def replay(
    file: Annotated[
        Path | None, typer.Argument(help="A trace; without it, sessions like the paper's.", show_default=False)
    ] = None,
    kind: Annotated[str, typer.Option("--format", help="auto, mooncake or agent.")] = "auto",
    sessions: Annotated[int, typer.Option(min=1, help="Conversations with several turns, from the first on.")] = 200,
    memory: Annotated[float, typer.Option(min=0.1, help="Memory tier, percent of all different blocks.")] = 10.0,
    policy: Policies = None,
    block_tokens: Blocks = 1024,
    shape: Annotated[
        str | None,
        typer.Option(
            help="A model of this shape (tiny, small) computes a trace's turns, in blocks of 16 tokens.",
            show_default="no model",
        ),
    ] = None,
    check: Annotated[bool, typer.Option(help="Exit with 1 if the two do not agree.")] = False,
) -> None:
    """Drive a real store through a trace, without a model or with one, and compare it with the simulation."""
    from .traces import TraceError

    _check_kind(kind)
    if shape is not None and file is None:
        raise TraceError("--shape needs a trace: in sessions like the paper's the context window overflows")
    requests = _small(file, kind, sessions, block_tokens)
    if shape is None:
        results = _replays(requests, memory / 100, _policies(policy, _REPLAYED))
    else:
        results = _computed(requests, memory / 100, _policies(policy, _COMPUTED), shape)
    table = Table(title=f"{requests.name}: {len(requests.rows):,} turns, live / simulated")
    for name in ("policy", "blocks found", "in memory", "evicted", "turns that differ", "wrong", "seconds"):
        table.add_column(name, justify="left" if name == "policy" else "right")
    for name, result in results.items():
        table.add_row(
            name,
            f"{result['found']:,} / {result['found_simulated']:,}",
            f"{result['fast']:,} / {result['fast_simulated']:,}",
            f"{result['evicted']:,} / {result['evicted_simulated']:,}",
            str(len(result["differing"])),
            str(result["wrong"]),
            f"{result['seconds']:.1f}",
        )
    Console().print(table)
    if check and not all(result["agrees"] for result in results.values()):
        raise typer.Exit(1)


@app.command()
def report(
    mooncake: Annotated[Path | None, typer.Option(help="Mooncake's conversation trace.", show_default=False)] = None,
    agent: Annotated[Path | None, typer.Option(help="Sessions of coding agents.", show_default=False)] = None,
    output: Annotated[Path, typer.Option(help="Folder for hierarchy.md, .json and .png.")] = Path("docs/results"),
    sessions: Annotated[int, typer.Option(min=1, help="Conversations of the paper's workload.")] = 9000,
    block_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a block of the paper's workload.")] = 1024,
    agent_block_tokens: Annotated[int, typer.Option(min=16, help="Tokens of a block of the agents' sessions.")] = 2048,
    live_sessions: Annotated[int, typer.Option(min=1, help="Conversations of the live replay.")] = 200,
    shape: Annotated[
        str, typer.Option(help="Of the model that computes the live replay of Mooncake's trace.")
    ] = "small",
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Keep what hierarchy.json has, the live store's turns too; for changes of the report.",
        ),
    ] = False,
    jobs: Jobs = _CORES,
) -> None:
    """The whole report: the paper's table, what is assumed, the traces, and a live store beside the simulator."""
    from .plan import Plan, Trace
    from .report import from_record

    plan = Plan(sessions=sessions, block_tokens=block_tokens)
    if mooncake is not None:
        plan.mooncake = Trace(str(mooncake), "An hour of chats (Mooncake, conversation)", 512)
    else:
        plan.left_out.append("Mooncake's conversation trace: no `--mooncake` was given")
    if agent is not None:
        plan.agent = Trace(str(agent), "Sessions of coding agents", agent_block_tokens)
    else:
        plan.left_out.append("Sessions of coding agents: no `--agent` was given")
    earlier = output / "hierarchy.json"
    record = json.loads(earlier.read_text()) if resume and earlier.exists() else {"runs": []}
    known = from_record(record, plan)
    found = known | _do([run for run in plan.runs() if run not in known], jobs)
    live = record.get("live") or {}
    if not live:
        small = _small(mooncake, "auto", live_sessions, 1024)
        live = _replays(small, 0.1, _REPLAYED)
        if mooncake is not None:
            live |= _computed(small, 0.1, _COMPUTED, shape)
    _save_report(plan, found, live, output, record)
    Console().print(f"Report: {output / 'hierarchy.md'}", highlight=False)


def _save_report(
    plan: Plan,
    found: dict[Run, dict[str, Any]],
    live: dict[str, dict[str, Any]],
    output: Path,
    earlier: dict[str, Any],
) -> None:
    """`earlier` is the record of which something was kept: then the report says on what machine that was made."""
    from ..bench.machine import describe_machine, in_words, versions, versions_in_words
    from .paper import SETTINGS
    from .pictures import draw_curves, draw_models
    from .plan import CURVES, PAPER_POLICIES
    from .report import as_markdown, as_record, called, coded_rates, hit_rates, live_part, picture_of

    output.mkdir(parents=True, exist_ok=True)
    machine = earlier.get("machine") or describe_machine(output)
    made_by = earlier.get("versions") or versions()
    text = as_markdown(plan, found, live_part(live), in_words(machine), versions_in_words(made_by))
    (output / "hierarchy.md").write_text(text)
    record = {**as_record(plan, found, live), "machine": machine, "versions": made_by}
    (output / "hierarchy.json").write_text(json.dumps(record, indent=1) + "\n")
    draw_models(
        [setting.model.name for setting in SETTINGS],
        {
            called(policy, ahead): [
                found[plan.paper(number, policy, ahead)]["session_hit_rate"] for number in range(len(SETTINGS))
            ]
            for policy, ahead in PAPER_POLICIES
        },
        output / "hierarchy.png",
    )
    for each in plan.traces:
        curves = {policy: hit_rates(plan, each, policy, found) for policy in CURVES}
        limit = found[plan.trace(each, "lru", 2.0)]["token_hit_rate"]
        draw_curves(each.title, plan.capacities, curves, limit, output / picture_of(each))
        coded = coded_rates(plan, each, found)
        draw_curves(each.title, plan.capacities, coded, limit, output / picture_of(each, "hierarchy-codecs"))


def _policies(given: Sequence[str] | None, default: list[str]) -> list[str]:
    from ...errors import AttentionStoreError
    from ...store.eviction.policies import POLICIES
    from .runs import OPTIMUM, PLAIN_FIFO

    known = [*POLICIES, OPTIMUM, PLAIN_FIFO]
    for name in given or []:
        if name not in known:
            raise AttentionStoreError(f"there is no policy {name!r}; there are {', '.join(known)}")
    return list(given) if given else default


def _codecs(given: Sequence[str] | None) -> list[str]:
    from ...errors import AttentionStoreError
    from .machine import CODECS

    for name in given or []:
        if name not in CODECS:
            raise AttentionStoreError(f"there are figures of the codecs {', '.join(CODECS)}, not of {name!r}")
    return list(given) if given else ["raw"]


def _check_kind(kind: str) -> None:
    from .traces import TraceError

    if kind not in ("auto", "mooncake", "agent"):
        raise TraceError(f"--format is auto, mooncake or agent, not {kind!r}")


def _do(runs: Sequence[Run], jobs: int) -> dict[Run, dict[str, Any]]:
    """Does all runs behind a progress bar; a single process shows how far it is within a run."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .runs import run_all

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("simulating", total=len(runs))

        def done(run: Run, found: dict[str, Any]) -> None:
            bar.advance(task)

        return run_all(runs, min(jobs, max(1, len(runs))), done)


def _small(file: Path | None, kind: str, sessions: int, block_tokens: int) -> Requests:
    """The first conversations of a trace that have several turns."""
    from dataclasses import replace

    from .paper import paper_workload
    from .replay import requests_of
    from .traces import load_trace

    workload = load_trace(file, kind) if file is not None else paper_workload(2 * sessions)  # type: ignore[arg-type]
    several = [c for c in workload.conversations if len(c.turns) > 1][:sessions]
    return requests_of(replace(workload, conversations=several), block_tokens, None if file is not None else 4096)


def _computed(requests: Requests, share: float, policies: Sequence[str], shape: str) -> dict[str, dict[str, Any]]:
    """What a model of a shape does of the turns, by policy and shape."""
    from ..bench.shapes import choose_model, load_model
    from .live_model import ModelTurns, scaled_down

    requests = scaled_down(requests)
    longest = max(row.kept for row in requests.rows)
    model = load_model(choose_model(shape, None, max_tokens=longest + 1))
    found = _replays(requests, share, policies, ModelTurns.of(model))
    return {f"{policy}, {shape} model": result for policy, result in found.items()}


def _replays(
    requests: Requests, share: float, policies: Sequence[str], turns: Turns | None = None
) -> dict[str, dict[str, Any]]:
    from dataclasses import asdict

    from rich.progress import Progress

    from .live import compare

    found = {}
    count = len({row.session for row in requests.rows})
    with (
        tempfile.TemporaryDirectory(prefix="attnstore-sim-") as folder,
        Progress(console=Console(stderr=True), transient=True) as bar,
    ):
        for number, policy in enumerate(policies):
            task = bar.add_task(f"live store, {policy}", total=len(requests.rows))
            memory = max(1, int(share * requests.unique))
            result = compare(
                requests,
                Path(folder) / str(number),
                memory,
                policy,
                lambda done, task=task: bar.update(task, completed=done),  # type: ignore[misc]
                turns,
            )
            found[policy] = {
                **asdict(result),
                "agrees": result.agrees,
                "blocks": requests.unique,
                "memory": memory,
                "sessions": count,
            }
    return found


def _served_columns(table: Table) -> None:
    table.add_column("run")
    for name in (
        "hits (turns)", "hits (tokens)", "in memory", "TTFT mean", "p50", "p99", "prefill tok/s", "GPU h", "cost",
        "queue",
    ):  # fmt: skip
        table.add_column(name, justify="right")


def _served_row(table: Table, name: str, found: dict[str, Any]) -> None:
    table.add_row(
        name,
        f"{100 * found['session_hit_rate']:.1f} %",
        f"{100 * found['token_hit_rate']:.1f} %",
        f"{100 * found['memory_share']:.1f} %",
        *(f"{1000 * found[key]:,.0f} ms" for key in ("ttft_mean", "ttft_p50", "ttft_p99")),
        f"{found['prefill_tokens_per_second']:,.0f}",
        f"{found['gpu_seconds'] / 3600:.2f}",
        f"${found['dollars']:,.0f}",
        f"{found['deepest_queue']:,}",
    )


def _write(output: Path | None, runs: Sequence[Run], found: dict[Run, dict[str, Any]]) -> None:
    from .runs import record_of

    if output is not None:
        record = [{"run": record_of(run), "found": found[run]} for run in runs]
        output.write_text(json.dumps(record, indent=1) + "\n")
