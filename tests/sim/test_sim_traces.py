"""Loaders, on tiny files made here."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from hf_attnstore.lab.sim.replay import replay, requests_of
from hf_attnstore.lab.sim.traces import TraceError, load_trace

MOONCAKE = [
    {"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 500, "input_length": 1100, "output_length": 5, "hash_ids": [0, 7, 8]},
    {"timestamp": 9000, "input_length": 2000, "output_length": 5, "hash_ids": [0, 1, 3, 4]},
    {"timestamp": 12000, "input_length": 2100, "output_length": 5, "hash_ids": [0, 1, 3, 5, 6]},
]
AGENT = [
    {"session": "x", "requests": [[0, 0, 4, 3000, 100, 0], [9, 5, 2, 3500, 50, 2944], [30, 19, 2, 1200, 9, 1024]]},
    {"session": "y", "requests": [[0, 0, 1, 500, 10, 0]]},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "\n".join(map(json.dumps, rows)) + "\n"
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["m.jsonl", "m.jsonl.gz"])
def test_mooncake_requests_find_their_conversation(tmp_path: Path, name: str) -> None:
    workload = load_trace(write(tmp_path / name, MOONCAKE))
    turns = [len(conversation.turns) for conversation in workload.conversations]
    assert turns == [3, 1]  # the second shares only the first block, which everybody has
    assert workload.block_tokens == 512
    last = workload.conversations[0].turns[-1]
    assert (last.at, last.shared, last.new) == (12.0, 1536, 564)
    hits = replay(requests_of(workload), 100, "lru", trace=True)
    assert hits.by_turn == [0, 1, 2, 3]
    assert hits.tokens == 6400
    assert hits.found == 512 * 6


def test_a_column_with_sessions_counts(tmp_path: Path) -> None:
    rows = [{**row, "session": number % 2} for number, row in enumerate(MOONCAKE)]
    workload = load_trace(write(tmp_path / "m.jsonl", rows), "mooncake")
    assert [len(conversation.turns) for conversation in workload.conversations] == [2, 2]


def test_agent_sessions_are_closed_loops(tmp_path: Path) -> None:
    workload = load_trace(write(tmp_path / "a.jsonl", AGENT))
    first = workload.conversations[0]
    assert [turn.think for turn in first.turns] == [0, 5, 19]
    assert [turn.new for turn in first.turns] == [3000, 556, 176]
    order = workload.in_order()
    mine = [at - first.start for at, session, _ in order if session == 0]
    assert mine == pytest.approx([0, 9, 30])  # the end of the answer before, and the time to think
    hits = replay(requests_of(workload, 512), 100, "lru", trace=True)
    assert sum(hits.by_turn) == 2944 // 512 + 1024 // 512
    assert hits.tokens == 3000 + 3500 + 1200 + 500


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "empty"),
        ("nonsense\n", "JSON lines"),
        ("[1]\n", "not JSON objects"),
        ('{"a": 1}\n', "no known format"),
        ('{"hash_ids": [1]}\n', "mooncake"),
        ('{"requests": [[1, 2]]}\n', "agent"),
    ],
)
def test_what_is_no_trace_is_said(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(TraceError, match=says):
        load_trace(tmp_path / "t.jsonl")


def test_a_missing_or_damaged_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="can't be read"):
        load_trace(tmp_path / "missing.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"requests": []}\n' * 99)[:-20])
    with pytest.raises(TraceError, match="can't be read"):
        load_trace(tmp_path / "cut.jsonl.gz")
