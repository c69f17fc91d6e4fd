"""`attnstore bench overlap` and `attnstore bench --timeline` at a tiny size; no figure of time is asserted."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.store_blocks import make_chain
from test_timeline import assert_is_a_trace
from typer.testing import CliRunner

from hf_attnstore import AttentionStore
from hf_attnstore.lab.bench.cli import app
from hf_attnstore.lab.bench.methods import SESSION
from hf_attnstore.lab.bench.overlap import ARMS, MEASURED, TURNS, Bench, Disk, ways_of
from hf_attnstore.lab.bench.overlap_cli import disks_of, parse_points
from hf_attnstore.lab.bench.overlap_report import summary_table
from hf_attnstore.lab.bench.shapes import BenchError, ModelSpec, load_model
from hf_attnstore.lab.bench.slow_disk import SlowDisk
from hf_attnstore.store.blocks.block import Block
from hf_attnstore.store.blocks.stored import StoredBlock
from hf_attnstore.store.disk.surroundings import Surroundings
from hf_attnstore.timeline import Event

CPU = torch.device("cpu")


class Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def read_keys(file: StoredBlock, layer: int) -> np.ndarray:
    stored = file.tensor(f"layers.{layer}.keys")
    found = np.empty(stored.spec.nbytes, dtype=np.uint8)
    assert file.read([(stored, [found])]) == stored.spec.nbytes
    return found


def test_a_slow_disk_gives_what_was_asked_for_ahead_without_further_waiting(tmp_path: Path) -> None:
    clock = Clock()
    disk = SlowDisk(None, clock.perf_counter, clock.sleep)
    block = make_chain(list(range(16)), 16)[0]
    with AttentionStore(tmp_path, block_size=16, surroundings=Surroundings(disk=disk)) as store:
        _check_slow_disk(store, block, disk, clock)


def _check_slow_disk(store: AttentionStore, block: Block, disk: SlowDisk, clock: Clock) -> None:
    assert store.reserve(block.nbytes)
    store.put(block)
    store.flush()
    name = "layers.0.keys"
    size = block.tensors[name].nbytes
    plain = block.tensors[name].numpy().reshape(-1).view(np.uint8)
    assert clock.slept == []
    opens = store._disk.sources([block.meta.key])[block.meta.key]
    with disk.at(size), opens() as file:  # a tensor takes a second
        assert np.array_equal(read_keys(file, 0), plain)
        assert clock.slept == [1.0]
        file.will_need([name, name, "no such tensor"])
        clock.now += 0.75
        assert np.array_equal(read_keys(file, 0), plain)
        assert clock.slept == [1.0, 0.25]
        file.will_need([name])
        clock.now += 5
        read_keys(file, 0)
        assert clock.slept == [1.0, 0.25]
        read_keys(file, 0)  # asked for once, it came once
        assert clock.slept == [1.0, 0.25, 1.0]
    with opens() as file:
        read_keys(file, 0)
    assert clock.slept == [1.0, 0.25, 1.0]


def test_the_command_measures_every_way_and_writes_json_pictures_and_markdown(tmp_path: Path) -> None:
    arguments = [
        "overlap", "--shape", "tiny", "--points", "40/8", "--decode", "2", "--repeats", "1", "--block-size", "16",
        "--slow", "20MiB", "--device", "cpu", "--store", str(tmp_path / "disk"), "--output", str(tmp_path / "out"),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "disk").iterdir()) == []
    out = tmp_path / "out"
    record = json.loads((out / "overlap.json").read_text())
    (point,) = record["points"]
    ways = [way.key for way in ways_of(CPU)]
    steps = {"kept", "memory", *(f"{disk}/{way}" for disk in ("warm", "cold", "slow") for way in ways)}
    assert set(point["samples"]) == steps
    for name, (sample,) in point["samples"].items():
        assert 0 < sample["ttft"] <= sample["total"]
        assert (sample["loaded_bytes"] > 0) == (name != "kept")
        assert name == "kept" or 0 < sample["exposed"] < sample["ttft"]
    assert set(point["fetched_share"]) == {f"{disk}/fetched" for disk in ("warm", "cold", "slow")}
    saving = record["saving"]
    assert set(saving["seconds"]) == {
        f"{turn}/{disk}/{arm}" for turn in TURNS for disk in ("warm", "slow") for arm in ARMS
    }
    assert saving["saved_bytes"]["first"] > saving["saved_bytes"]["resumed"] > 0
    text = (out / "overlap.md").read_text()
    assert "40 + 8 tokens" in text
    assert "no overlap" in text
    for picture in ("overlap.png", "overlap-timeline.png"):
        assert (out / picture).stat().st_size > 10_000
        assert picture in text
    trace = json.loads((out / "overlap-trace.json").read_text())
    assert {entry["cat"] for entry in trace["traceEvents"] if entry["ph"] == "X"} >= {"compute", "wait", "load", "save"}


def test_a_timeline_of_one_turn_is_written_and_put_into_numbers(tmp_path: Path) -> None:
    file = tmp_path / "made" / "trace.json"
    arguments = [
        "--shape", "tiny", "--history", "72", "--new", "16", "--decode", "3", "--block-size", "16", "--device", "cpu",
        "--timeline", str(file), "--output", str(tmp_path),
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_text())
    complete = [entry for entry in found["traceEvents"] if entry["ph"] == "X"]
    assert_is_a_trace(found, [Event(entry["cat"], entry["name"], 0, 0) for entry in complete])
    assert {entry["cat"] for entry in complete} == {"compute", "wait", "load", "save", "write", "fetch"}
    assert "Exposed load time" in " ".join(done.output.split())
    assert (tmp_path / "timeline-tiny.png").stat().st_size > 10_000


def test_what_is_fetched_for_the_next_job_is_in_the_timeline_of_this_one(tmp_path: Path) -> None:
    model = load_model(ModelSpec("tiny", None, "cpu", seed=0, max_tokens=200))
    with torch.inference_mode():
        bench = Bench(model, 40, tmp_path, decode=3, seed=0, block_size=16)
        try:
            events, sample = bench.trace(8, Disk("warm", "warm"), MEASURED.begin, upcoming=96)
        finally:
            bench.close()
    fetched = {event.name for event in events if event.track == "fetch"}
    assert {"tokens 64–80", "tokens 80–96"} <= fetched  # the turn itself has no such tokens
    assert len(set(events)) == len(events)
    assert sample.loaded_bytes > 0


def test_nothing_is_on_its_way_into_memory_when_the_next_turn_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(ModelSpec("tiny", None, "cpu", seed=0, max_tokens=200))
    with torch.inference_mode():
        bench = Bench(model, 40, tmp_path, decode=3, seed=0, block_size=16)
    began, promote = threading.Event(), bench.store._promote

    def slowly(key: bytes, job: int | None = None) -> int | None:
        began.set()
        time.sleep(0.3)
        return promote(key, job)

    monkeypatch.setattr(bench.store, "_promote", slowly)
    try:
        bench.store.drop_memory()
        with torch.inference_mode(), bench._scheduled(SESSION):
            model(bench.history[:, :1])
            assert began.wait(60)
        assert bench.store.residence(SESSION)["memory"] > 0  # what had begun is there, and not on its way
    finally:
        bench.close()


def test_the_numbers_of_a_timeline() -> None:
    events = [
        Event("compute", "layer 0", 0.0, 1.0),
        Event("wait", "layer 0", 0.25, 0.5),
        Event("load", "layer 0", 0.0, 0.5),
        Event("load", "layer 1", 0.25, 0.75),
        Event("write", "tokens 0–16", 0.5, 2.0),
    ]
    table = summary_table(events)
    assert table.rows == [
        ("compute", "1", "1,000.0", "–"),
        ("wait", "1", "250.0", "–"),
        ("load", "2", "750.0", "500.0"),
        ("write", "1", "1,500.0", "500.0"),
    ]
    assert "Exposed load time: 250.0 ms, of 750.0 ms" in table.notes[0]


def test_points_and_disks_are_read_from_options() -> None:
    assert [(point.history, point.new) for point in parse_points("1024/100, 40/8")] == [(1024, 100), (40, 8)]
    for wrong in ("", "1024", "1024/0", "a/b", "1/2/3", "1024/100,"):
        with pytest.raises(BenchError, match="--points"):
            parse_points(wrong)
    assert [disk.bytes_per_second for disk in disks_of("2MiB")] == [None, None, 2 << 20]
    assert [disk.key for disk in disks_of("0")] == ["warm", "cold"]
    done = CliRunner().invoke(app, ["overlap", "--points", "many"])
    assert done.exit_code == 2
    assert "--points" in done.output


def test_io_threads_are_a_way_of_their_own_on_the_cpu_only() -> None:
    keys = [way.key for way in ways_of(CPU)]
    assert keys == ["first", "one", "measured", "all", "threads", "fetched"]
    assert "threads" not in [way.key for way in ways_of(torch.device("cuda"))]
