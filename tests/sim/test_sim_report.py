"""The report on the hierarchy: what is kept of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from hf_attnstore.lab.sim.plan import Plan, Trace
from hf_attnstore.lab.sim.report import as_record, from_record


def test_a_report_can_be_resumed_from_its_record(tmp_path: Path) -> None:
    plan = Plan(mooncake=Trace(str(tmp_path / "chats.jsonl"), "Chats", 512), sessions=50)
    runs = list(plan.runs())
    assert {type(run).__name__ for run in runs} == {"PaperRun", "TraceRun", "ServedTrace"}
    found = {run: {"turns": number} for number, run in enumerate(runs)}
    record = json.loads(json.dumps(as_record(plan, found, None)))
    assert from_record(record, plan) == found
    assert from_record(record, replace(plan, sessions=60)).keys() < found.keys(), "others are not taken for these"
