"""Traces from files, as workloads."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...errors import AttentionStoreError
from .workload import Conversation, Turn, Workload

MOONCAKE_BLOCK = 512
"""Tokens of a block in Mooncake's traces."""

Format = Literal["auto", "mooncake", "agent"]


class TraceError(AttentionStoreError):
    """A file is not a trace that can be read."""


def load_trace(path: Path, kind: Format = "auto", *, seed: int = 0, every: float = 120.0) -> Workload:
    """Reads a trace.

    Args:
        path: JSON lines, also gzipped.
        kind: "mooncake" (`timestamp` ms, `input_length`, `output_length`, `hash_ids`), "agent" (a coding agent's
            sessions, with think times), or "auto" to go by what is in the first line.
        seed: for when agents' sessions begin.
        every: mean seconds between the beginnings of agents' sessions, of which the trace says nothing.

    Raises:
        TraceError: it is neither, or damaged.
    """
    rows = _rows(path)
    if not rows:
        raise TraceError(f"{path} is empty")
    name = path.name.split(".")[0]
    found = kind
    if kind == "auto":
        found = "mooncake" if "hash_ids" in rows[0] else "agent" if "requests" in rows[0] else "auto"
    try:
        if found == "mooncake":
            return mooncake(name, rows)
        if found == "agent":
            return agent_sessions(name, rows, seed=seed, every=every)
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(f"{path} is not a trace of the format {found}: {error!r}") from error
    raise TraceError(f"{path} has neither hash_ids nor requests: it is a trace of no known format")


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path} can't be read: {error}") from error
    except ValueError as error:
        raise TraceError(f"{path} is not made of JSON lines: {error}") from error
    if not all(isinstance(row, dict) for row in rows):
        raise TraceError(f"{path} has lines that are not JSON objects")
    return rows


def mooncake(name: str, rows: list[dict[str, Any]]) -> Workload:
    """Requests with the chained hashes of their blocks, which come when they came.

    A request belongs to the session of the latest earlier one whose whole blocks its own begin with, more than one of
    them: the first block is often a system prompt that everybody has. Where rows have a `session`, that counts.
    """
    rows = sorted(rows, key=lambda row: float(row["timestamp"]))
    conversations: dict[Hashable, Conversation] = {}
    last_whole: dict[Hashable, Hashable] = {}
    ids_before: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        ids, tokens, at = list(row["hash_ids"]), int(row["input_length"]), float(row["timestamp"]) / 1000
        whole = ids[: tokens // MOONCAKE_BLOCK]
        session = row.get("session")
        if session is None:
            session = next((last_whole[key] for key in reversed(whole[1:]) if key in last_whole), number)
        if len(whole) > 1:
            last_whole[whole[-1]] = session
        conversation = conversations.setdefault(session, Conversation(session, at, []))
        before = ids_before.get(session, [])
        common = next(
            (n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), min(len(ids), len(before))
        )
        shared = min(common * MOONCAKE_BLOCK, tokens)
        conversation.turns.append(Turn(tokens - shared, int(row["output_length"]), at=at, shared=shared, ids=ids))
        ids_before[session] = ids
    return Workload(name, list(conversations.values()), MOONCAKE_BLOCK, keeps_answers=False)


def agent_sessions(name: str, rows: list[dict[str, Any]], *, seed: int = 0, every: float = 120.0) -> Workload:
    """Sessions of coding agents: a request comes when the one before has ended and the think time is over.

    A row's `requests` are lists of [second, think seconds, API seconds, input tokens, output tokens, tokens shared with
    the request before]. What two sessions may have in common is not in the trace: they share nothing.
    """
    starts = np.cumsum(np.random.default_rng(seed).exponential(every, len(rows))).tolist()
    conversations = []
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        turns = []
        for _, think, took, tokens, output, shared in row["requests"]:
            turns.append(
                Turn(int(tokens) - int(shared), int(output), float(think), shared=int(shared), took=float(took))
            )
        if turns:
            conversations.append(Conversation(row.get("session", number), start, turns))
    return Workload(name, conversations, keeps_answers=False)
