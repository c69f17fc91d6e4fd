"""Memory that is freed stays with a process that asks for it, until memory becomes short."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from support import fresh

from hf_attnstore.store.memory.freed import _SETTINGS

CODE = """
import resource, torch
from hf_attnstore import keep_freed_memory
from hf_attnstore.store.memory import size
from hf_attnstore.store.memory.freed import widen_heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def layers(count):
    "Pages that were touched for the first time."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        parts = [torch.ones(6 << 20, dtype=torch.uint8) for _ in range(8)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

"""

KEPT = """
layers(2)
print(keep_freed_memory(), keep_freed_memory())
layers(1)
print(layers(10))
full = resident()
for relieve in size._pressure:
    relieve()
print(full - resident())
"""

WIDE = """
widen_heap()
layers(3)
print(layers(10))
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in _SETTINGS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def run(code: str) -> list[str]:
    return fresh.run([sys.executable, "-c", CODE + code], cwd=Path(__file__).parent, check=True).stdout.split()


def test_what_is_freed_is_used_again_until_memory_is_short(environment: pytest.MonkeyPatch) -> None:
    found = run(KEPT)
    if found[0] == "False":
        pytest.skip("memory is not glibc's here")
    assert found[:2] == ["True", "True"]
    assert int(found[2]) < 12_000  # ten times 48 MiB are 120,000 pages
    assert int(found[3]) > 32 << 20


def test_an_environment_that_sets_memory_up_is_left_as_it_is(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MALLOC_ARENA_MAX", "2")
    assert run(KEPT)[:2] == ["False", "False"]


def test_a_wide_heap_has_room_for_a_layers_activations(environment: pytest.MonkeyPatch) -> None:
    if run(KEPT)[0] == "False":
        pytest.skip("memory is not glibc's here")
    assert int(run(WIDE)[0]) < 12_000
