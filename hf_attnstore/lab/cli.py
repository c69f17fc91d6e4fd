"""`attnstore lab`: the studies, by their names alone; each is imported when it is invoked."""

from __future__ import annotations

import typer

from ..cli.lazy import add_lazily

_STUDIES = {
    "models": (
        "families.cli:models",
        "Build a tiny model of every family of transformers, and see what the store does for it.",
    ),
    "sim": (
        "sim.cli:app",
        "Simulate the store's tiers and policies: the paper's workload, traces, and the report on both.",
    ),
    "shared": (
        "demo.shared:shared_demo",
        "A conversation that moves between two machines every turn, with a shared tier and without.",
    ),
    "truncation": (
        "bench.study_cli:truncation",
        "Stream a text far past the window, by truncation with recompute, by moved keys, and by naively cut keys.",
    ),
    "thinking": (
        "bench.thinking_cli:thinking",
        "Measure turns after answers that reasoned, for three ways in which chat templates treat reasoning.",
    ),
    "templates": (
        "bench.thinking_cli:templates",
        "See which chat templates cut reasoning out of earlier answers, and what that costs the next turn.",
    ),
    "dialogues": (
        "bench.dialogues_cli:dialogues",
        "Compare whole conversations, token by token: with a store that is opened anew for each turn, and without.",
    ),
    "retokenise": (
        "bench.dialogues_cli:retokenise",
        "Sample answers, and count how many become other tokens when their text comes back, and what that costs.",
    ),
    "gate": (
        "bench.gate_cli:gate",
        "Resume conversations from memory and from slow disks: always loading, always computing, the gate.",
    ),
    "queue": (
        "bench.queue_cli:queue",
        "Let many sessions share a memory tier for a few of them, with a queue and without; time the policies.",
    ),
    "serve": (
        "bench.serve_cli:serve",
        "Talk to `attnstore serve`, restarted on the way, and to `transformers serve`, turn by turn.",
    ),
    "batches": (
        "bench.batches_cli:batches",
        "Serve requests by continuous batching, with a store and without: tokens fed, first tokens, answers, copies.",
    ),
    "overlap": (
        "bench.overlap_cli:overlap",
        "Measure resumed turns with overlap of loading and computing, with less of it, and without; and saving.",
    ),
    "index": (
        "bench.reliability_cli:index",
        "Fill synthetic stores, of ten blocks a session, and measure their index: opening, look-ups, commits, lists.",
    ),
    "store": (
        "bench.reliability_cli:store",
        "Measure what durability and encryption cost: writing, committing and loading, against the store as it comes.",
    ),
}
app = typer.Typer(
    help="Studies of the store: families of models, truncation, policies, load or recompute.", no_args_is_help=True
)
for _name, (_target, _help) in _STUDIES.items():
    add_lazily(app, _name, f"hf_attnstore.lab.{_target}", _help)
