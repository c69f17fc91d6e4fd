"""Threads that torch computes with are let go of when another thread is to compute."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support import fresh

from hf_attnstore.chat.openmp import leave_computing_to_others

COUNT = """
import os, threading, time, torch
from hf_attnstore.chat.openmp import leave_computing_to_others
torch.set_num_threads(3)

def compute():
    return (torch.ones(500, 500) @ torch.ones(500, 500)).sum().item()

def teams():
    "Threads that are not Python's, once those that are ending have ended."
    for _ in range(200):
        found = len(os.listdir("/proc/self/task")) - threading.active_count()
        if found == before:
            break
        time.sleep(0.01)
    return found - before
"""


def run(code: str, tests: Path) -> list[str]:
    return fresh.run([sys.executable, "-c", COUNT + code], cwd=tests, check=True).stdout.split()


@pytest.fixture
def tests() -> Path:
    if not leave_computing_to_others():
        pytest.skip("torch computes with another OpenMP than GNU's here, or with none")
    if not Path("/proc/self/task").is_dir():
        pytest.skip("threads can't be counted here")
    return Path(__file__).parent


def test_a_team_ends_and_comes_back(tests: Path) -> None:
    found = run(
        """
before = len(os.listdir("/proc/self/task")) - threading.active_count()
wanted = compute()
print(len(os.listdir("/proc/self/task")) - threading.active_count() - before)
print(leave_computing_to_others(), teams(), leave_computing_to_others())
print(compute() == wanted)
""",
        tests,
    )
    assert found == ["2", "True", "0", "True", "True"]


def test_a_queue_computes_with_the_only_team(tests: Path) -> None:
    found = run(
        """
from support.tiny_models import make_model
from hf_attnstore import AttentionStore, TurnQueue
import tempfile

before = len(os.listdir("/proc/self/task")) - threading.active_count()
with tempfile.TemporaryDirectory() as folder, AttentionStore(folder) as store:
    model = make_model()
    compute()
    with TurnQueue(model, store) as queue:
        print(teams())
        queue.run(None, lambda turn: compute()).result()
        print(len(os.listdir("/proc/self/task")) - threading.active_count() - before)
""",
        tests,
    )
    assert found == ["0", "2"], "whoever made the queue has none, who computes has one"


def test_where_it_can_not_be_done_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_attnstore.chat.openmp._pause", lambda: None)
    assert leave_computing_to_others() is False
    assert torch.ones(300, 300).sum() == 90_000
