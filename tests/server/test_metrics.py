"""Numbers for Prometheus: they are those of the answers, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from server.conftest import Plain
from support.api_server import ApiServer
from typer.testing import CliRunner

from hf_attnstore.cli.app import app

MESSAGES = [{"role": "user", "content": "the old prince looked at the letter"}]


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_answered(server: ApiServer, plain: Plain) -> None:
    count = len(plain.prompt(MESSAGES))
    for _ in range(3):
        server.ask("POST", "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 5, "temperature": 0})
    answer = server.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    assert found["attnstore_ttft_seconds_count",] == 3
    assert found["attnstore_ttft_seconds_sum",] > 0
    tokens = {what: found["attnstore_tokens_total", what] for what in ("reused", "prefilled", "generated")}
    assert tokens == {"reused": 2 * (count - 1), "prefilled": count + 2, "generated": 15}
    assert found["attnstore_reusing_turns_total", "none"] == 1
    assert found["attnstore_reusing_turns_total", "memory"] == 2
    assert found["attnstore_loaded_blocks_total", "memory"] == 2 * -(-(count - 1) // 16)
    assert found["attnstore_store_reused_tokens_total",] == tokens["reused"]
    assert found["attnstore_requests_total", "done"] == 3
    assert found["attnstore_queue_waiting",] == 0
    assert 0 < found["attnstore_tier_bytes", "memory"] < found["attnstore_tier_capacity_bytes", "memory"]
    assert {key[1] for key in found if key[0] == "attnstore_missed_turns_total"} == {"not in the store"}


def test_the_command_prints_what_the_store_did_in_all_processes(server: ApiServer) -> None:
    server.ask("POST", "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 5})
    server.service.store.flush()
    path = server.service.store.path
    server.service.store.totals()
    printed = CliRunner().invoke(app, ["stats", "--prometheus", "--store", str(path)])
    assert printed.exit_code == 0, printed.output
    found = samples(printed.output)
    assert found["attnstore_store_turns_total",] == 1
    assert found["attnstore_disk_blocks",] > 0


def test_the_dashboard_asks_for_metrics_that_are_there(server: ApiServer) -> None:
    server.ask("POST", "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 5})
    there = {name for name, *_ in samples(server.ask("GET", "/metrics").text)}
    page = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
    asked = {
        name
        for panel in page["panels"]
        for target in panel["targets"]
        for name in re.findall(r"attnstore_\w+", target["expr"])
    }
    assert len(asked) > 12
    assert asked <= there
