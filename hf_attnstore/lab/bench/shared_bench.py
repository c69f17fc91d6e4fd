"""What a shared tier costs and gives: its engine beside a file in the page cache and a plain socket, and turns whose KV
is nowhere else, over networks that are simulated."""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch

from ...cache import AttentionStoreCache
from ...cache.hooks import feed
from ...store import AttentionStore
from ...store.shared.deadline import Deadline
from ...store.shared.engine import Edges, Engine, Put, open_engine
from ...store.shared.tier import HEAD
from ...store.shared.url import SharedURL
from ...store.shared.values import Reading, Value
from .methods import check_reuse
from .network import Link, ask_bytes, give_bytes, plain_bytes, through
from .shapes import BenchError
from .timing import Sample, timed_generate

SIZES = (1 << 20, 8 << 20, 64 << 20)
LAYERS, BLOCKS, LAYER = 32, 16, 256 << 10
"""What is read layer by layer: so many blocks, each of so many layers of so many bytes."""
KEYS = (1, 64, 1000)
FILE, SOCKET = "file in the page cache", "plain socket"
_SECONDS = 120.0

T = TypeVar("T")
Progress = Callable[[str], None]


@dataclass
class Times:
    """Seconds, of the clock and of this process's CPU, of each repeat."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def of(self, step: Callable[[], T]) -> T:
        """Measures a step."""
        cpu, wall = time.process_time(), time.perf_counter()
        found = step()
        self.wall.append(time.perf_counter() - wall)
        self.cpu.append(time.process_time() - cpu)
        return found


Steps = Mapping[str, Callable[[], object]]
Found = dict[str, dict[str, Times]]
"""By what was done, and by what it was done with."""


def patient(url: str) -> str:
    """A URL whose deadlines do not end what is measured."""
    return url + ("&" if urlsplit(url).query else "?") + "timeout=120&lookup=120"


def values(urls: Mapping[str, str], repeats: int, folder: Path, progress: Progress) -> Found:
    """Gets, puts, layers and look-ups of each engine, by turns with a file and a socket.

    Raises:
        BenchError: an engine has no room.
    """
    found: Found = {}
    with ExitStack() as stack:
        connection = socket.create_connection(("127.0.0.1", stack.enter_context(plain_bytes())))
        stack.callback(connection.close)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        engines = {name: stack.enter_context(_Values(name, url)) for name, url in urls.items()}
        target = memoryview(bytearray(SIZES[-1]))
        data = memoryview(os.urandom(SIZES[-1]))
        file = folder / "value"
        file.write_bytes(data)
        with file.open("rb", buffering=0) as open_file:
            for size in SIZES:
                into, out = target[:size], data[:size]
                gets: Steps = {
                    FILE: partial(os.preadv, open_file.fileno(), [into], 0),
                    SOCKET: partial(ask_bytes, connection, into),
                    **{name: partial(engine.get, into) for name, engine in engines.items()},
                }
                puts: Steps = {
                    SOCKET: partial(give_bytes, connection, out),
                    **{name: partial(engine.put, out) for name, engine in engines.items()},
                }
                for what, steps in (("put", puts), ("get", gets)):  # what is got was put
                    progress(f"{what} {size >> 20} MiB")
                    _by_turns(found, f"{what} {size >> 20} MiB", steps, repeats)
        for name, engine in engines.items():
            progress(f"layers from {name}")
            engine.put_blocks(data)
        for what in ("first layer", "all layers", "whole"):
            _by_turns(found, what, {name: partial(each.layers, what) for name, each in engines.items()}, repeats)
        for count in KEYS:
            steps = {name: partial(engine.look_up, count) for name, engine in engines.items()}
            _by_turns(found, f"{count:,} keys looked up", steps, repeats)
    return found


def _by_turns(found: Found, what: str, steps: Steps, repeats: int) -> None:
    for number in range(repeats + 1):
        for name in sorted(steps, reverse=bool(number % 2)):
            times = found.setdefault(what, {}).setdefault(name, Times())
            (times if number else Times()).of(steps[name])


class _Values:
    """An engine, and what the bench has put there."""

    def __init__(self, name: str, url: str) -> None:
        self._name = name
        where = SharedURL(url)
        self._prefix = f"{where.option('prefix', 'attnstore')}:bench:{secrets.token_hex(8)}"
        self._engine: Engine = open_engine(where)
        self._names: list[str] = []

    def __enter__(self) -> _Values:
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.delete(self._names, Deadline(_SECONDS))
        self._engine.close()

    def put(self, data: memoryview, name: str = "value") -> None:
        full_name = f"{self._prefix}:{name}"
        self._names.append(full_name)
        if self._engine.put(full_name, [data], Deadline(_SECONDS), 600) is Put.FULL:
            raise BenchError(f"{self._name} has no room for {data.nbytes >> 20} MiB.")

    def get(self, target: memoryview) -> None:
        """As the tier does: the beginning and the end first, and then the rest."""
        name, size = f"{self._prefix}:value", target.nbytes
        ((_, head, tail),) = self._engine.edges([name], HEAD, HEAD, Deadline(_SECONDS))
        stream = self._engine.open_stream(Deadline(_SECONDS))
        stream.ask(name, len(head), size - len(head) - len(tail), Deadline(_SECONDS))
        came = stream.take([target[len(head) : size - len(tail)]], Deadline(_SECONDS))
        stream.close(reuse=True)
        if came != size - len(head) - len(tail):
            raise BenchError(f"{self._name} gave {came} of {size} bytes.")

    def put_blocks(self, data: memoryview) -> None:
        for number in range(BLOCKS):
            self.put(data[: LAYERS * LAYER], f"block {number}")
        self._engine.edges(self._names[-BLOCKS:], HEAD, HEAD, Deadline(_SECONDS))

    def layers(self, what: str) -> None:
        """Reads the blocks as a load does, by layers or whole."""
        reading = Reading(self._engine, _SECONDS, lambda _: None, lambda _: None)
        size = LAYERS * LAYER
        edges = Edges(size, b"", b"")
        blocks = [Value(reading, f"{self._prefix}:block {number}", edges) for number in range(BLOCKS)]
        layers, ranges = (1, size) if what == "whole" else (1 if what == "first layer" else LAYERS, LAYER)
        buffer = memoryview(bytearray(ranges))
        for layer in range(layers):
            for block in blocks:
                block.will_need(layer * ranges, ranges)
        for layer in range(layers):
            for block in blocks:
                if block.read([buffer], layer * ranges) != ranges:
                    raise BenchError(f"{self._name} gave less than a layer.")
        for block in blocks:
            block.close()

    def look_up(self, count: int) -> None:
        self._engine.leading([f"{self._prefix}:{number}" for number in range(count)], Deadline(_SECONDS))


# turns


@dataclass
class Turns:
    """Turns that resume a history; samples by where its KV came from."""

    history: int
    kv_bytes: int
    samples: dict[str, list[Sample]] = field(default_factory=dict)


def turns(
    model: Any, urls: Mapping[str, str], links: Sequence[Link], history: int, repeats: int, folder: Path,
    progress: Progress,
) -> Turns:  # fmt: skip
    """Times the first token of turns whose KV is in an engine only, against disk and recomputing. Links lead to servers
    of 127.0.0.1.

    Raises:
        BenchError: a turn did not do what is measured, or gave other tokens.
    """
    ids = torch.randint(5, model.config.vocab_size - 1, (1, history + 32), generator=torch.Generator().manual_seed(0))
    result = Turns(history, 0)
    with ExitStack() as stack:
        settings: dict[str, Any] = {"memory": "8GiB", "on_device": 0}
        disk = stack.enter_context(AttentionStore(folder / f"disk {history}", shared="", **settings))
        progress(f"computing {history:,} tokens")
        result.kv_bytes = _save(model, disk, ids[:, :history])
        afar: dict[str, AttentionStore] = {}
        for name, url in urls.items():
            with AttentionStore(folder / f"computed {name} {history}", shared=patient(url), **settings) as writer:
                _save(model, writer, ids[:, :history])
            port = re.search(r"(?<=127\.0\.0\.1:)\d+", url)
            for link in (None, *(links if port else ())):
                label, where = name, url
                if link is not None and port is not None:
                    label = f"{name}, {link.name}"
                    near = stack.enter_context(through(link, int(port[0])))
                    where = f"{url[: port.start()]}{near}{url[port.end() :]}"
                # nothing is kept here, so that the next turn finds it there only, too
                reader = AttentionStore(
                    folder / f"{len(afar)} {name} {history}", shared=patient(where), disk=0, **settings
                )
                afar[label] = stack.enter_context(reader)
        plain = timed_generate(model, ids, 1, lambda: None)[0]
        result.samples["recomputed"] = [plain]
        for number in range(repeats + 1):
            if number > 1 and number * plain.ttft < 20:
                result.samples["recomputed"].append(timed_generate(model, ids, 1, lambda: None)[0])
            ways = [("disk", disk), *afar.items()]
            for label, store in ways if number % 2 else reversed(ways):
                progress(f"{history:,} tokens from {label}")
                store.flush()
                store.drop_memory()
                if store is not disk:
                    assert store._shared is not None
                    store._shared._seen.clear()  # it is looked up, as in a turn that is the first here
                sample, cache = timed_generate(model, ids, 1, partial(_cache, model, store))
                check_reuse(cache, label, history, result.kv_bytes, "disk" if store is disk else "shared")
                if sample.tokens != plain.tokens:
                    raise BenchError(f"{label}: WRONG TOKENS.")
                if number:
                    result.samples.setdefault(label, []).append(sample)
    return result


def _cache(model: Any, store: AttentionStore) -> AttentionStoreCache:
    return AttentionStoreCache(model, None, store, save=False, gate=False)


def _save(model: Any, store: AttentionStore, ids: torch.Tensor) -> int:
    """Has a store keep the KV of a text. Returns its bytes."""
    cache = AttentionStoreCache(model, None, store, gate=False)
    with torch.inference_mode():
        for start in range(0, ids.shape[1], 512):
            feed(model, cache, ids[:, start : start + 512])
    cache.save()
    store.flush()
    return cache.stats.saved_bytes


def beside(model: Any, url: str, tokens: int, repeats: int, folder: Path, progress: Progress) -> Found:
    """What a tier costs turns that do not need it: of turns that save, until `generate` returns, and of turns that find
    all in memory, with it and without, by turns.

    Raises:
        BenchError: a turn did not do what is measured.
    """
    ids = torch.randint(5, model.config.vocab_size - 1, (1, tokens), generator=torch.Generator().manual_seed(1))
    found: Found = {}
    settings: dict[str, Any] = {"memory": "8GiB", "on_device": 0}
    with (
        AttentionStore(folder / "with", shared=patient(url), **settings) as with_tier,
        AttentionStore(folder / "without", shared="", **settings) as without,
    ):
        ways = [("with", with_tier), ("without", without)]
        for number in range(repeats + 1):
            ids[0, 0] = 5 + number  # a text of its own
            for name, store in ways if number % 2 else reversed(ways):
                for what in ("saves", "finds all in memory"):
                    progress(f"a turn that {what}, {name} the tier")
                    times = found.setdefault(what, {}).setdefault(name, Times()) if number else Times()
                    make = partial(AttentionStoreCache, model, f"session {number}", store, gate=False)
                    cache = times.of(partial(timed_generate, model, ids, 8, make))[1]
                    if what != "saves" and cache.stats.blocks_from.keys() != {"memory"}:
                        raise BenchError(f"blocks came from {cache.stats.blocks_from}, not from memory alone.")
                    store.flush()
    return found
