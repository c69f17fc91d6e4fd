"""Numbers for Prometheus: they are those of the answers, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client import values
from prometheus_client.parser import text_string_to_metric_families
from server.conftest import Plain
from support.api_server import ApiServer, serving
from support.turn_queue_fixtures import Gate, until
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


def test_metrics_say_what_the_store_had_to_do_and_who_waits(model_folder: Path, tmp_path: Path, plain: Plain) -> None:
    """Loads from disk, what is evicted from tiers that are too small, a block that is damaged, a request that waits."""
    count, config = len(plain.prompt(MESSAGES)), plain.model.config
    of_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0}

    def found() -> dict[tuple[str, ...], float]:
        return samples(server.ask("GET", "/metrics").text)

    with serving(model_folder, tmp_path / "store", memory=128 * of_token, disk=64 << 20) as server:
        for text in ("a long road", "the prince was silent", "and the mother rose"):
            asked = [{"role": "user", "content": f"{text} and so on " * 5}]
            server.ask("POST", "/v1/chat/completions", json={**body, "messages": asked})
        server.service.store.flush()
        first = found()
        assert first["attnstore_tier_evictions_total", "memory"] > 0
        assert first["attnstore_tier_capacity_bytes", "memory"] == 128 * of_token
        assert first["attnstore_tier_capacity_bytes", "disk"] == 64 << 20
        assert first["attnstore_tier_bytes", "disk"] == server.service.store.stats()["disk_bytes"] > 0
        assert first["attnstore_store_written_bytes_total",] > 0
    with serving(model_folder, tmp_path / "store", memory=0) as server:
        server.ask("POST", "/v1/chat/completions", json={**body, "messages": asked})
        second = found()
        assert second["attnstore_reusing_turns_total", "disk"] == 1
        assert min(second[f"attnstore_store_{which}_seconds_total",] for which in ("load", "exposed_load")) > 0
        tokens = second["attnstore_tokens_total", "reused"]
        assert second["attnstore_store_loaded_bytes_total",] == tokens * of_token
        assert second["attnstore_failures_total", "rejected"] == 0
        gate = Gate(server.service.queue)
        with ThreadPoolExecutor(1) as threads:
            waits = threads.submit(server.ask, "POST", "/v1/chat/completions", json=body)
            until(lambda: found()["attnstore_queue_waiting",] == 1)
            assert found()["attnstore_queue_running",] == 1
            gate.go_on.set()
            assert waits.result().status_code == 200
        third = found()
        assert third["attnstore_queue_waiting",] == third["attnstore_queue_running",] == 0
        assert third["attnstore_requests_total", "done"] == 3
        assert third["attnstore_queue_waiting_seconds_total",] > 0
        server.service.store.flush()
        for file in (tmp_path / "store" / "blocks").rglob("*.safetensors"):
            file.write_bytes(file.read_bytes()[:-9] + b"x" * 9)
        server.ask("POST", "/v1/chat/completions", json=body)
        last = found()
        assert last["attnstore_failures_total", "rejected"] >= 1
        assert last["attnstore_reusing_turns_total", "none"] == 1
        assert last["attnstore_tokens_total", "prefilled"] == third["attnstore_tokens_total", "prefilled"] + count


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


def test_processes_that_share_a_folder_are_counted_together(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two servers, each as in a process of its own; of the first is known what it counted when it has ended."""
    (folder := tmp_path / "metrics").mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    for number in (1, 2):
        monkeypatch.setattr(values, "ValueClass", values.MultiProcessValue(lambda number=number: number))
        with serving(model_folder, tmp_path / str(number)) as server:
            for _ in range(number):
                server.ask("POST", "/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 5})
            assert len(server.service.answers) == 0
            found = samples(server.ask("GET", "/metrics").text)
            assert found["attnstore_ttft_seconds_count",] == number * (number + 1) / 2
            assert found["attnstore_requests_total", "done"] == number * (number + 1) / 2
            assert found["attnstore_tokens_total", "generated"] == 5 * number * (number + 1) / 2
            assert found["attnstore_store_turns_total",] == number * (number + 1) / 2
            assert found["attnstore_tier_bytes", str(number), "memory"] > 0
            again = samples(server.ask("GET", "/metrics").text)
            assert again["attnstore_store_turns_total",] == found["attnstore_store_turns_total",]


def test_a_turn_is_a_span_where_that_is_asked_for(model_folder: Path, tmp_path: Path, plain: Plain) -> None:
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor

    made = memory.InMemorySpanExporter()
    trace.set_tracer_provider(TracerProvider())
    trace.get_tracer_provider().add_span_processor(SimpleSpanProcessor(made))  # type: ignore[attr-defined]
    count = len(plain.prompt(MESSAGES))
    body = {"messages": MESSAGES, "max_tokens": 5, "temperature": 0}
    with serving(model_folder, tmp_path / "plain") as server:
        server.ask("POST", "/v1/chat/completions", json=body)
    assert [span for span in made.get_finished_spans() if span.instrumentation_scope.name != "fastapi"] == []
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with serving(model_folder, tmp_path / "traced", traced=True) as server:
        for _ in range(2):
            server.ask("POST", "/v1/chat/completions", json=body, headers={"traceparent": caller})
        server.ask("POST", "/v1/chat/completions", json={**body, "max_tokens": 5000})
    spans = [span for span in made.get_finished_spans() if span.instrumentation_scope.name == "hf_attnstore"]
    turns = [span for span in spans if span.name == "chat tiny"]
    assert [span.attributes["gen_ai.usage.cache_read.input_tokens"] for span in turns] == [0, count - 1]
    assert [span.attributes["gen_ai.usage.output_tokens"] for span in turns] == [5, 5]
    assert [span.attributes["attnstore.tier"] for span in turns] == ["none", "memory"]
    assert [f"{span.context.trace_id:x}" for span in turns] == 2 * ["af7651916cd43dd8448eb211c80319c"]
    for turn in turns:
        inside = [span for span in spans if span.parent is not None and span.parent.span_id == turn.context.span_id]
        assert [span.name for span in inside] == ["waiting", "first token", "tokens"]
        times = [turn.start_time, *(time for span in inside for time in (span.start_time, span.end_time))]
        assert times == sorted(times)
        assert times[-1] == turn.end_time
