"""Turns on shared sessions from two machines at random, of which one is killed now and then."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from support.engines import Valkey
from support.sharing import Machine
from support.store_blocks import make_chain

from hf_attnstore.store import AttentionStore


@pytest.mark.parametrize(
    ("turns", "kills"), [(24, 1), pytest.param(500, 10, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_turns_of_two_machines_are_never_lost_or_mixed_though_one_is_killed(
    turns: int, kills: int, tmp_path: Path, server: Valkey
) -> None:
    server.ask("FLUSHALL")
    url = server.patient_url + "&lease=10"  # a busy machine stands still for seconds
    chance = random.Random(turns)
    stays = Machine(tmp_path / "stays", url, 1, 0, turns)
    fragile: list[Machine] = []
    for life in range(kills + 1):
        first, share = 100_000 * (life + 1), turns // (kills + 1)
        machine = Machine(tmp_path / "dies", url, 2 + life, first, share if life == kills else 10 * share)
        fragile.append(machine)
        if life < kills:
            while len(machine.said("begins")) < share:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            machine.kill()
    for machine in (stays, fragile[-1]):
        machine.end()
    whole = set(stays.said("begins")) | set(fragile[-1].said("begins"))
    surely = whole.union(*(machine.said("is there") for machine in fragile))
    begun = whole.union(*(machine.said("begins") for machine in fragile))
    found: list[int] = []
    with AttentionStore(tmp_path / "third", block_size=16, shared=url) as store:
        for info in store.sessions():
            number, *rest = store.tokens(info.name)
            assert info.name == f"session {number}"
            assert store.known([block.meta.key for block in make_chain([number, *rest], 16)]) == len(rest) // 16 + 1
            found += rest
    assert len(found) == len(set(found))
    assert surely <= set(found) <= begun
