"""A shared tier whose engine or network fails: what comes is right or does not come, and in time."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import Valkey
from support.faulty import Fault, FaultyProxy
from support.seaweed import Seaweed
from support.store_blocks import load, make_chain, same, save

from hf_attnstore.errors import LoadError
from hf_attnstore.store import AttentionStore
from hf_attnstore.store.blocks.block import Block
from hf_attnstore.store.shared import deadline, tier

TIMEOUT, LOOKUP = 0.3, 0.15
SLACK = 60.0
"""Seconds; the machine may be busy. What hangs takes the test's own limit."""


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Valkey | Seaweed:
    """A server with nothing in it; the parameter is the fixture that has it."""
    found: Valkey | Seaweed = request.getfixturevalue(request.param)
    found.empty()
    return found


@pytest.fixture
def proxy(engine: Valkey | Seaweed) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(engine.port)
    yield proxy
    proxy.close()


def opened(folder: Path, url: str, *, patient: bool = False, **settings: object) -> AttentionStore:
    url += "&" if "?" in url else "?"
    url += "timeout=60&lookup=60" if patient else f"timeout={TIMEOUT}&lookup={LOOKUP}"
    return AttentionStore(folder, block_size=16, disk=0, shared=url, **settings)  # type: ignore[arg-type]


def as_a_turn(store: AttentionStore, chain: list[Block]) -> int:
    """Finds as much of a chain as is there, and loads it, as a turn does; what fails is left out. Returns the blocks
    that came, which are right."""
    for _ in range(8):
        known = store.known([block.meta.key for block in chain])
        if not known:
            return 0
        try:
            loaded = load(store, chain[:known])
        except LoadError:
            continue
        assert same(chain[:known], loaded)
        return known
    return 0


def some_fault(chance: random.Random, size: int) -> Fault:
    kind = chance.choice(["refuse", "stop", "trickle", "cut", "flip", "late", "half"])
    after = chance.choice([0, chance.randrange(300), chance.randrange(size)])
    return Fault(kind, after, seconds=chance.choice([0.02, 2 * TIMEOUT]))


def try_faults(
    number: int, folder: Path, engine: Valkey | Seaweed, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fault after the other, while a chain is found and loaded, whole or layer by layer, or goes up."""
    chance = random.Random(number)
    monkeypatch.setattr(deadline, "FIRST_PAUSE", 0.01)
    chain = make_chain(list(range(160)), 16)
    size = sum(block.nbytes for block in chain) + 30_000
    whole = 0
    with opened(folder / "one", engine.url, patient=True) as sound:
        save(sound, chain)
    for attempt in range(number):
        memory = chance.choice([0, "1MiB"])
        monkeypatch.setattr(tier, "HEAD", chance.choice([500, 3000, 16_384]))
        up = chance.random() < 0.25
        with opened(folder / f"{attempt}", engine.at(proxy.port), memory="1MiB" if up else memory) as store:
            proxy.set(some_fault(chance, size))
            began = time.monotonic()
            if up:
                save(store, [*chain, *make_chain([attempt, *range(40)], 16)])
                store.flush()
            else:
                whole += as_a_turn(store, chain) == len(chain)
        assert time.monotonic() - began < 4 * TIMEOUT + SLACK
        proxy.set(Fault("none"))
        with opened(
            folder / f"{attempt} again", engine.at(proxy.port), patient=True
        ) as store:  # what is left there is right, or computed again
            as_a_turn(store, chain)
            store.drop_memory()
            save(store, chain)
            store.flush()
        with opened(folder / f"{attempt} at last", engine.at(proxy.port), patient=True) as store:
            assert as_a_turn(store, chain) == len(chain)
    assert whole < number  # some did harm
    assert whole or number < 60  # and some did none


@pytest.mark.parametrize(("engine", "number"), [("server", 60), ("seaweed", 6)], indirect=["engine"])
def test_some_faults(
    number: int, tmp_path: Path, engine: Valkey | Seaweed, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_faults(number, tmp_path, engine, proxy, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "number"), [("server", 1000), ("seaweed", 200)], indirect=["engine"])
def test_many_faults(
    number: int, tmp_path: Path, engine: Valkey | Seaweed, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_faults(number, tmp_path, engine, proxy, monkeypatch)
