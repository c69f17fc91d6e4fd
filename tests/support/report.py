"""The full run of the reliability tests' harnesses, as a table: fault, times tried, times wrong, times recomputed.

`python -m tests.support.report --output docs/results/reliability.md`; about half an hour on two cores. `--quick` is
for seeing that it works.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import corruption, crashes, soak

Row = tuple[str, int, int, int]


def rows_of(outcome: Any) -> list[Row]:
    """An outcome, part by part."""
    parts = getattr(outcome, "parts", None) or [outcome]
    return [(part.fault, part.tried, part.wrong, part.recomputed) for part in parts]


def exhaustive(root: Path, step: int) -> list[Row]:
    """Every `step`th bit of a whole block file and of a record, and a bit of every fourth byte of the index."""
    closed = corruption.make_sample(root)
    block = min(closed.block_files(), key=lambda name: len(closed.files[name]))
    record = closed.record_files()[0]
    block_bits = range(0, 8 * len(closed.files[block]), step)
    record_bits = range(0, 8 * len(closed.files[record]), step)
    index_bits = [8 * at + at * 5 % 8 for at in range(0, len(closed.files[corruption.INDEX]), 4 * step)]
    found = {
        "every bit of a block file": corruption.block_flips(root, closed, block, block_bits),
        "every bit of a session's record": corruption.record_flips(root, closed, record, record_bits, repair=False),
        "a bit of every fourth byte of the index": corruption.index_flips(root, closed, index_bits, skip_unread=True),
    }
    return [(title, outcome.tried, outcome.wrong, outcome.recomputed) for title, outcome in found.items()]


def soaked(folder: Path, seconds: float) -> tuple[Row, str]:
    """Processes that share a store, evict, delete and are killed, and a sentence about them."""
    plan = soak.Plan(processes=8, sessions=16, turns=8, seconds=seconds, cap=1_300_000, kill_seconds=1.5, seed=3)
    result = soak.run(plan, folder, timeout=20 * seconds + 120)
    wrong = len(result["wrong"]) + len(result["problems"])
    reused = result["reused_tokens"] / max(result["prompt_tokens"], 1)
    about = (
        f"The soak: {plan.processes} processes, {plan.sessions} sessions, {seconds:.0f} s, {result['turns']:,} turns "
        f"of a model, every token compared to plain `generate`; {result['kills']} processes killed, {result['busy']} "
        f"times a session was busy, {result['evicted_blocks']:,} blocks evicted, {reused:.0%} of the prompts' "
        f"tokens reused; at most {result['peak_bytes']:,} of {result['cap']:,} bytes on disk."
    )
    title = "turns of 8 processes that are killed, evict and delete"
    return (title, result["turns"], wrong, result["recomputed_turns"]), about


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    console = Console(stderr=True)
    began = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        console.print("killing processes")
        rows += rows_of(crashes.run_kills(folder / "kills", given.seed, 20 if given.quick else 1000))
        console.print("losing power")
        rows += rows_of(crashes.run_power_losses(folder / "power", given.seed, 24 if given.quick else 504))
        console.print("damaging files")
        for outcome in corruption.everything(folder / "damage", given.seed):
            rows += rows_of(outcome)
        console.print("flipping every bit")
        rows += exhaustive(folder / "bits", 101 if given.quick else 1)
        console.print("sharing a store")
        row, about = soaked(folder / "soak", 5 if given.quick else 120)
        rows.append(row)
    tried, wrong, recomputed = (sum(row[place] for row in rows) for place in (1, 2, 3))
    lines = [
        "# Reliability",
        "",
        f"`python -m tests.support.report`, {datetime.now(UTC).date()}, seed {given.seed}; "
        f"{(time.monotonic() - began) / 60:.0f} minutes.",
        "",
        "Each fault was tried on a store of several sessions. *Wrong*: a tensor, token, name or metadata other than",
        "what was written was given out; something intact or acknowledged was lost; a damaged file stayed in sight;",
        "or the accounts of bytes were off. *Recomputed*: something was noticed to be missing or damaged, and its KV",
        "computed or saved anew.",
        "",
        "| fault | tried | wrong | recomputed |",
        "| --- | ---: | ---: | ---: |",
        *(f"| {fault} | {n:,} | {bad:,} | {again:,} |" for fault, n, bad, again in rows),
        f"| **all** | **{tried:,}** | **{wrong:,}** | **{recomputed:,}** |",
        "",
        about,
        "",
        "`make test` runs samples of all of it; full disks, failing calls, vanishing folders and forged files are",
        "tests of their own (`tests/reliability/test_disk_faults.py`, `tests/store/`).",
        "",
    ]
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text("\n".join(lines))
    console.print(f"{tried:,} tried, {wrong:,} wrong; wrote {given.output}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
