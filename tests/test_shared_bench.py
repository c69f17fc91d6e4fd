"""`attnstore bench shared`: a real server, a small model, and a network that is not there."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path

import pytest
from support.engines import Valkey
from typer.testing import CliRunner

from hf_attnstore.lab.bench import shared_bench
from hf_attnstore.lab.bench.cli import app
from hf_attnstore.lab.bench.network import Link, ask_bytes, give_bytes, plain_bytes, through


def test_the_bench_measures_what_it_says_and_leaves_nothing_in_the_engine(
    server: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ask("FLUSHALL")
    monkeypatch.setattr(shared_bench, "SIZES", (1 << 20,))
    monkeypatch.setattr(shared_bench, "LAYER", 2 << 10)
    options = ["--shape", "tiny", "--history", "300", "--repeats", "1", "--no-network", "--json"]
    result = CliRunner().invoke(app, ["shared", "--url", server.url, *options, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert set(found["values"]["get 1 MiB"]) == {"file in the page cache", "plain socket", server.url}
    for what in ("put 1 MiB", "first layer", "all layers", "whole", "1,000 keys looked up"):
        assert len(found["values"][what][server.url]["wall"]) == 1
    (turns,) = found["turns"]
    assert turns["samples"].keys() == {"recomputed", "disk", server.url}
    assert turns["samples"][server.url][0]["tokens"] == turns["samples"]["recomputed"][0]["tokens"]
    assert found["beside"][server.url].keys() == {"saves", "finds all in memory"}
    assert "time to the first token" in (tmp_path / "shared.md").read_text()
    assert server.keys("attnstore:bench:*") == []


def test_a_link_lets_so_much_through_and_not_before_its_time() -> None:
    size, link = 1 << 20, Link("", 400e6, 0.02)
    with plain_bytes() as port, through(link, port) as near, socket.create_connection(("127.0.0.1", near)) as talk:
        began = time.monotonic()
        given, found = memoryview(bytes(size)), memoryview(bytearray(b"1") * size)
        give_bytes(talk, given)
        ask_bytes(talk, found)
        assert time.monotonic() - began >= 2 * (size * 8 / link.bits + 2 * link.delay)
    assert found == given
