"""What a store's index costs as it grows: synthetic stores of many blocks and sessions, and what people do with them.

Every size is filled and measured in a process of its own. Blocks have rows but no files, except for the ends of the
sessions that are looked up, so that a look-up does all it does in earnest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from ...session.chain import TokenChain
from ...session.matching import match_prefix
from ...store import AttentionStore
from ...store.blocks.block import Block, BlockMeta
from ...store.blocks.keys import prefix_codes
from ...store.eviction.policies import Place, make_policy
from ...store.eviction.victims import Order, VictimSearch
from ...store.records.manifest import Manifest, SpanRow

BLOCK = 256
LONG = 100
"""Blocks of the sessions that are looked up and committed."""
_PROBED = 60
_FINGERPRINT = "0" * 40


@dataclass
class IndexFigures:
    """Seconds, unless said otherwise, of one size. Lists hold every measurement."""

    blocks: int
    sessions: int
    fill: float = 0.0
    file_bytes: int = 0
    resident_bytes: int = 0
    """What the process grew by when it opened the store and did everything that is measured."""
    opening: list[float] = field(default_factory=list)
    lookup: list[float] = field(default_factory=list)
    commit: list[float] = field(default_factory=list)
    listing: list[float] = field(default_factory=list)
    victim: list[float] = field(default_factory=list)


def p99(seconds: list[float]) -> float:
    """The value that 99 of 100 measurements do not exceed."""
    return float(np.quantile(seconds, 0.99))


def run(blocks: int, sessions: int, folder: Path, seed: int = 0) -> IndexFigures:
    """Fills a store in a process of its own, and measures it in another one, whose memory nothing else has touched."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="index-") as root:
        figures = IndexFigures(**_child("fill", root, blocks, sessions, seed))
        measured = IndexFigures(**_child("measure", root, blocks, sessions, seed))
        measured.fill = figures.fill
        return measured


def _child(what: str, root: str, blocks: int, sessions: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, what, root, str(blocks), str(sessions), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise RuntimeError(f"measuring an index of {blocks} blocks failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ids(session: int, seed: int) -> np.ndarray:
    """The conversation of a session that is looked up `[tokens]`; all share their first 40 tokens."""
    random = np.random.default_rng([seed, session])
    ids = random.integers(0, 150_000, LONG * BLOCK - 100)
    ids[:40] = np.arange(40)
    return ids


def _probed(blocks: int, sessions: int) -> int:
    """How many sessions are looked up and go on: up to half of all blocks are theirs."""
    found = min(_PROBED, sessions // 2, blocks // (2 * LONG))
    if found < 1:
        raise ValueError(f"{blocks} blocks in {sessions} sessions are too few: {2 * LONG} in 2 will do")
    return found


def _fill(root: Path, blocks: int, sessions: int, seed: int) -> IndexFigures:
    figures = IndexFigures(blocks, sessions)
    random = np.random.default_rng(seed)
    began = time.perf_counter()
    with AttentionStore(root, block_size=BLOCK, disk="100TiB", memory="64MiB") as store:
        probed = _probed(blocks, sessions)
        for number in range(probed):
            _add_probed(store, number, seed)
        rest = blocks - probed * LONG
        _add_many(store, random, rest, sessions - probed, probed)
        store._disk.index.recount()
    figures.fill = time.perf_counter() - began
    return figures


def _chain(store: AttentionStore, number: int, seed: int) -> TokenChain:
    return TokenChain(store.root(_FINGERPRINT), BLOCK, _ids(number, seed))


def _add_probed(store: AttentionStore, number: int, seed: int) -> None:
    """A session of `LONG` blocks, of which the last has a file."""
    chain = _chain(store, number, seed)
    disk = store._disk
    spans = []
    for block in range(LONG):
        start, stop = chain.bounds(block)
        meta = BlockMeta(chain.key(block), chain.parent(block), _FINGERPRINT, start, chain.tokens(block))
        if block == LONG - 1:
            disk.put(Block(meta, {"layers.0.keys": torch.zeros(1, stop - start, 8)}))
        else:
            disk.index.add_block(meta, prefix_codes(meta.tokens), 3 << 20, Place(0, time.time()))
        spans.append(SpanRow(meta.key, 0, stop - start))
    disk.commit("", f"session {number}", _FINGERPRINT, Manifest(tuple(spans), length=len(chain)))


def _add_many(store: AttentionStore, random: np.random.Generator, blocks: int, sessions: int, first: int) -> None:
    """Sessions of few blocks with keys and codes that are noise, which is what digests look like."""
    index = store._disk.index
    root = store.root(_FINGERPRINT)
    per_session = np.full(sessions, blocks // sessions)
    per_session[: blocks - int(per_session.sum())] += 1
    done = 0
    while done < sessions:
        some = per_session[done : done + 2000]
        with index.database.transaction() as db:
            db.execute("PRAGMA cache_size = -262144")
            number = db.execute("SELECT COALESCE(MAX(id), 0) FROM blocks").fetchone()[0]
            rows, spans, owners = [], [], []
            for session, count in enumerate(some.tolist(), first + done + 1):
                noise = random.bytes(count * (32 + BLOCK))
                parent = root
                for place in range(count):
                    at = place * (32 + BLOCK)
                    key, codes = noise[at : at + 32], noise[at + 32 : at + 32 + BLOCK]
                    number += 1
                    follower = int(place < count - 1)
                    rows.append(
                        (
                            number,
                            key,
                            parent,
                            parent,
                            codes,
                            place * BLOCK,
                            BLOCK,
                            3 << 20,
                            follower,
                            session % 9,
                            done,
                            _FINGERPRINT,
                        )
                    )
                    spans.append((session, place, number, 0, BLOCK, 0, b"", 0))
                    owners.append((session, number))
                    parent = key
            # rows of later blocks come first, so that no trigger counts followers that are counted already
            db.executemany("INSERT INTO blocks VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", rows[::-1])
            db.executemany("INSERT INTO spans VALUES(?, ?, ?, ?, ?, ?, ?, ?)", spans)
            db.executemany("INSERT INTO owners VALUES(?, ?)", owners)
            for session in range(first + done, first + done + len(some)):
                index.sessions.fill(db, "", f"session {session}", _FINGERPRINT, float(done))
        done += len(some)


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def _measure(root: Path, blocks: int, sessions: int, seed: int) -> IndexFigures:
    with tempfile.TemporaryDirectory() as empty, AttentionStore(empty, disk="1GiB", memory=0) as store:
        store.sessions()  # what opening any store needs is not the index's
    process = psutil.Process()
    before = process.memory_info().rss
    figures = IndexFigures(blocks, sessions)
    for _ in range(5):
        began = time.perf_counter()
        AttentionStore(root, disk="100TiB", memory="64MiB").close()
        figures.opening.append(time.perf_counter() - began)
    with AttentionStore(root, disk="100TiB", memory="64MiB") as store:
        index = store._disk.index
        random = np.random.default_rng(seed)
        prompts = [np.concatenate([_ids(n, seed), np.arange(20)]) for n in range(_probed(blocks, sessions))]
        for _ in range(5):
            for number, ids in enumerate(prompts):
                began = time.perf_counter()
                spans = match_prefix(ids, store.root(_FINGERPRINT), BLOCK, store)
                figures.lookup.append(time.perf_counter() - began)
                if sum(span.stop - span.start for span in spans) != LONG * BLOCK - 100:
                    raise AssertionError(f"session {number} was not found whole")
        for turn, manifest in _turns(store, seed, _probed(blocks, sessions)):
            figures.commit.append(_timed(partial(store._disk.commit, "", turn, _FINGERPRINT, manifest)))
        pages = max(1, sessions // 50)
        for _ in range(100):
            offset = int(random.integers(0, pages)) * 50
            figures.listing.append(_timed(partial(store.sessions, 50, offset)))
        for _ in range(200):
            figures.victim.append(_timed(VictimSearch(index, Order(make_policy("predictive")), time.time()).next))
        figures.file_bytes = index.database.file_bytes()
    figures.resident_bytes = process.memory_info().rss - before
    return figures


def _turns(store: AttentionStore, seed: int, probed: int) -> Iterator[tuple[str, Manifest]]:
    """Sessions that go on by a few tokens, whose blocks are on disk but not in their manifest yet."""
    for turn in range(5):
        for number in range(probed):
            name = f"session {number}"
            manifest = store._disk.index.sessions.manifest("", name)
            chain = _chain(store, number, seed)
            chain.append(np.arange(10 * (turn + 1)))
            last = chain.block_at(len(chain) - 1)
            start, stop = chain.bounds(last)
            meta = BlockMeta(chain.key(last), chain.parent(last), _FINGERPRINT, start, chain.tokens(last))
            block = Block(meta, {"layers.0.keys": torch.zeros(1, stop - start, 8)})
            store._disk.put(block, manifest.spans[-1].block)
            spans = (*manifest.spans[:last], SpanRow(meta.key, 0, stop - start))
            yield name, Manifest(spans, length=len(chain))


def _main() -> None:
    what, root, blocks, sessions, seed = sys.argv[1:]
    act = _fill if what == "fill" else _measure
    figures = act(Path(root), int(blocks), int(sessions), int(seed))
    sys.stdout.write(json.dumps(asdict(figures)) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _main()
