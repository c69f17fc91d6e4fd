"""Several processes that share one store, for a while: turns, deletions, forks, evictions and kills at random.

What every turn must say is known before: the conversations follow from the names of the sessions, and a model that no
store touches has answered them. `python -m tests.support.soak --processes 8 --sessions 16 --seconds 120` runs a
soak and prints what came of it; `--scenarios` first runs what is to be looked at more closely than at random.

Everything happens in processes forked from one that has one thread: it makes the models and never opens the store
before the others have ended.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NoReturn
from zlib import crc32

import torch
from transformers.generation.streamers import BaseStreamer

from hf_attnstore import (
    AttentionStore,
    AttentionStoreCache,
    AttentionStoreError,
    LoadError,
    SessionBusyError,
    SessionNotFoundError,
)
from hf_attnstore.store.blocks.block import Block
from hf_attnstore.store.disk.surroundings import Disk, Surroundings
from hf_attnstore.store.records.files import tree_bytes
from hf_attnstore.store.records.manifest import Manifest, SpanRow
from hf_attnstore.store.transfer.load import Load
from hf_attnstore.store.transfer.stages import Piece, Stage

from . import fresh
from .store_blocks import FINGERPRINT, LAYERS, make_chain, same, save
from .tiny_models import BLOCK, make_model, tokens
from .turns import follow_up, turn

FAMILIES = ("llama-gqa", "gemma3")
COPY = " copy "
_MARGIN = 1e-3
_fork = multiprocessing.get_context("fork")


# what is said


@dataclass
class Conversation:
    """A session's conversation: all that is fed in each turn, and what that is with the answer."""

    family: str
    prompts: list[torch.Tensor]
    sequences: list[torch.Tensor]

    @property
    def ids(self) -> list[int]:
        """The whole of it."""
        return self.sequences[-1][0].tolist()

    def next_turn(self, length: int) -> int:
        """The first turn whose answer is not among the first `length` tokens."""
        return next((t for t, seq in enumerate(self.sequences) if seq.shape[1] - 1 > length), len(self.sequences) - 1)


def converse(model: Any, family: str, name: str, turns: int) -> Conversation:
    """The conversation that belongs to a session's name. Four at a time begin alike."""
    sequence = tokens(35, seed=crc32(f"{family} {int(name.split()[-1]) // 8}".encode()))
    prompts: list[torch.Tensor] = []
    sequences: list[torch.Tensor] = []
    for number in range(turns):
        for attempt in range(20):
            seed = crc32(f"{name} {number} {attempt}".encode())
            prompt = follow_up(sequence, 3 + seed % 14, seed)
            answer = turn(model, prompt, None)
            top = torch.stack([logits[0].topk(2).values for logits in answer.logits])
            if (top[:, 0] - top[:, 1]).min() > _MARGIN:  # no answer hangs on the order of a sum
                break
        sequence = answer.sequences
        prompts.append(prompt)
        sequences.append(sequence)
    return Conversation(family, prompts, sequences)


class World:
    """Models and conversations, made once, for all processes."""

    def __init__(self, sessions: int, turns: int) -> None:
        torch.set_num_threads(1)
        self.models = {family: make_model(family) for family in FAMILIES}
        plain = {family: make_model(family) for family in FAMILIES}
        self.names = [f"session {number}" for number in range(sessions)]
        self.said: dict[str, Conversation] = {}
        for number, name in enumerate(self.names):
            family = FAMILIES[number % len(FAMILIES)]
            self.said[name] = converse(plain[family], family, name, turns)

    def of(self, name: str) -> Conversation:
        """The conversation of a session, or of the one that it is a copy of."""
        return self.said[name.split(COPY)[0]]

    def all_names(self) -> list[str]:
        return [*self.names, *(f"{name}{COPY}{number}" for name in self.names for number in range(2))]


# one process


class Diary:
    """What a process did: one line each in a file of its own, which survives its being killed."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, kind: str, **more: Any) -> None:
        os.write(self._fd, json.dumps({"kind": kind, **more}).encode() + b"\n")


def read_diaries(folder: Path) -> Iterator[dict[str, Any]]:
    """All lines of all processes."""
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            with suppress(ValueError):  # a line that was being written when the process was killed
                yield json.loads(line)


class _Told(logging.Handler):
    """Writes down what the package warns of."""

    def __init__(self, diary: Diary) -> None:
        super().__init__(logging.WARNING)
        self._diary = diary

    def emit(self, record: logging.LogRecord) -> None:
        self._diary.note("warning", text=record.getMessage()[:300])


@dataclass(frozen=True)
class Plan:
    """What a soak does."""

    processes: int = 3
    sessions: int = 6
    turns: int = 6
    seconds: float = 2.0
    """How long it goes on at least; then until there were `least` turns, and evictions, and some of all else."""
    least: int = 60
    patience: float = 120.0
    """Seconds after which it ends in any case: a busy machine takes longer for as much."""
    cap: int = 700_000
    """Bytes on disk; about a third of what all sessions take."""
    kill_seconds: float = 0.7
    """How often a process is killed, on average."""
    seed: int = 0


class Worker:
    """A process that does at random what can be done with a store."""

    def __init__(self, plan: Plan, world: World, root: Path, diary: Diary, who: str) -> None:
        self._plan = plan
        self._world = world
        self._root = root
        self._diary = diary
        self._dice = random.Random(f"{plan.seed} {who}")
        self._caches: dict[str, AttentionStoreCache] = {}
        self._store = self._open()

    def _open(self) -> AttentionStore:
        memory = self._dice.choice(["200KB", "1MB", "50MB"])
        return AttentionStore(self._root, block_size=BLOCK, memory=memory, disk=self._plan.cap, io_threads=1)

    def run(self, stop: Path) -> None:
        """Goes on until there is a file `stop`; then closes the store."""
        doings = [
            (self.speak, 60), (self.look, 8), (self.delete, 6), (self.fork, 5), (self.rename, 2), (self.forget, 6),
            (self.reopen, 4), (self.annotate, 3), (self.verify, 1), (self.clean, 1),
        ]  # fmt: skip
        choices, weights = zip(*doings, strict=True)
        while not stop.exists():
            (doing,) = self._dice.choices(choices, weights)
            try:
                doing()
            except SessionBusyError:
                self._diary.note("busy", what=doing.__name__)
            except SessionNotFoundError:
                self._diary.note("absent", what=doing.__name__)
        self._store.close()
        self._diary.note("closed")

    def _name(self) -> str:
        name = self._dice.choice(self._world.names)
        return name if self._dice.random() < 0.8 else f"{name}{COPY}{self._dice.randrange(2)}"

    def speak(self) -> None:
        name = self._name()
        said = self._world.of(name)
        number = self._dice.randrange(len(said.prompts))
        if self._dice.random() < 0.8:
            with suppress(SessionNotFoundError):
                number = said.next_turn(self._store.session(name).length)
        cache = self._caches.pop(name, None)
        if cache is None:
            wait = self._dice.choice([0.0, 0.0, 0.3, 60.0])
            cache = AttentionStoreCache(self._world.models[said.family], name, self._store, wait=wait)
        found = turn(cache.model, said.prompts[number], cache).sequences
        if not torch.equal(found, said.sequences[number]):
            self.wrong(
                f"turn {number} of {name} ({cache.stats})", found[0].tolist(), said.sequences[number][0].tolist()
            )
        stats = cache.stats
        self._diary.note(
            "turn", reused=stats.reused_tokens, prompt=stats.prompt_tokens, loaded=stats.loaded_bytes,
            recomputed=stats.recomputed, evicted=int(self._store.totals().get("evicted_blocks", 0)),
        )  # fmt: skip
        if self._dice.random() < 0.2:
            self._caches[name] = cache

    def look(self) -> None:
        name = self._name()
        ids = self._store.tokens(name, dropped=True)
        expected = self._world.of(name).ids
        if ids != expected[: len(ids)]:
            self.wrong(f"the tokens of {name}", ids, expected)
        self._diary.note("look", tokens=len(ids))
        for info in self._store.sessions(limit=5):
            if info.name not in self._world.all_names():
                self.wrong("a session", info.name, "one of those there are")

    def delete(self) -> None:
        self._store.delete(self._name(), secure=self._dice.random() < 0.2)
        self._diary.note("delete")

    def fork(self) -> None:
        name = self._dice.choice(self._world.names)
        with self._may_exist():
            self._store.fork(name, f"{name}{COPY}{self._dice.randrange(2)}")
            self._diary.note("fork")

    def rename(self) -> None:
        name = self._dice.choice(self._world.names)
        with self._may_exist():
            self._store.rename(f"{name}{COPY}0", f"{name}{COPY}1")
            self._diary.note("rename")

    @staticmethod
    @contextmanager
    def _may_exist() -> Iterator[None]:
        try:
            yield
        except AttentionStoreError as error:
            if "exists already" not in str(error):
                raise

    def annotate(self) -> None:
        name = self._name()
        about = name.split(COPY)[0]
        found = self._store.metadata(name)
        if found not in ({}, {"about": about}):
            self.wrong(f"metadata of {name}", found, about)
        self._store.set_metadata(name, {"about": about})
        self._diary.note("annotate")

    def forget(self) -> None:
        self._caches.clear()
        self._store.drop_memory()

    def reopen(self) -> None:
        self._caches.clear()
        self._store.close()
        self._store = self._open()
        self._diary.note("reopen")

    def verify(self) -> None:
        problems = self._store.verify().problems
        self._diary.note("verify")
        if problems:
            self._diary.note(
                "problem", text=f"verify() in the middle: {[(p.kind, p.detail) for p in problems[:3]]}"[:700]
            )

    def clean(self) -> None:
        self._store.collect_garbage()
        self._diary.note("clean")

    def wrong(self, what: str, found: object, expected: object) -> None:
        self._diary.note("wrong", text=f"{what}: {found}, not {expected}")


def _work(plan: Plan, world: World, root: Path, diaries: Path, who: str, stop: Path) -> None:
    """What a forked process does."""
    diary = Diary(diaries / who)
    logger = logging.getLogger("hf_attnstore")
    logger.addHandler(_Told(diary))
    logger.propagate = False
    try:
        Worker(plan, world, root, diary, who).run(stop)
    except BaseException:
        diary.note("error", text=traceback.format_exc())


# all of them


@dataclass
class Soaked:
    """What came of a soak."""

    turns: int = 0
    reused_tokens: int = 0
    prompt_tokens: int = 0
    loaded_bytes: int = 0
    recomputed_turns: int = 0
    """Turns in which something was found missing or unreadable while it was being loaded."""
    busy: int = 0
    kills: int = 0
    done: dict[str, int] = field(default_factory=dict)
    """How often the processes did what."""
    warnings: dict[str, int] = field(default_factory=dict)
    """How often the package warned of what."""
    evicted_blocks: int = 0
    rejected_blocks: int = 0
    peak_bytes: int = 0
    """The most that was seen on disk, while nobody was changing anything."""
    peak: dict[str, int] = field(default_factory=dict)
    """What it consisted of."""
    end_bytes: int = 0
    cap: int = 0
    seconds: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """Tokens that are not the right ones."""
    problems: list[str] = field(default_factory=list)
    """Whatever else is not as it has to be."""


def one_thread() -> bool:
    """Whether this process can be forked without a second thought."""
    return len(os.listdir("/proc/self/task")) == 1


def _measure(root: Path) -> dict[str, int]:
    """Bytes by what is directly in the folder, while nobody writes."""
    with (root / "locks" / "write.lock").open("r+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        sizes: dict[str, int] = {}
        for path in root.iterdir():
            with suppress(FileNotFoundError):
                sizes[path.name] = tree_bytes(path) if path.is_dir() else path.stat().st_size
        return sizes


def soak(plan: Plan, folder: Path, world: World) -> Soaked:
    """Runs a soak in `folder`, with a store that is made there."""
    assert one_thread()
    root, diaries = folder / "store", folder / "diaries"
    diaries.mkdir(parents=True)
    dice = random.Random(plan.seed)
    stop = folder / "stop"
    began = time.monotonic()
    result = Soaked(cap=plan.cap)

    def start(number: int, generation: int) -> BaseProcess:
        who = f"{number}-{generation}"
        process = _fork.Process(target=_work, args=(plan, world, root, diaries, who, stop), name=who)
        process.start()
        return process

    with Child(partial(_make_store, root)):
        pass
    running = [start(number, 0) for number in range(plan.processes)]
    generations = [0] * plan.processes
    next_kill = began + plan.kill_seconds
    while not _is_enough(plan, time.monotonic() - began, result.kills, diaries):
        time.sleep(0.05)
        found = _measure(root)
        if sum(found.values()) > result.peak_bytes:
            result.peak_bytes, result.peak = sum(found.values()), found
        if time.monotonic() > next_kill:
            number = dice.randrange(plan.processes)
            if running[number].is_alive():
                running[number].kill()
                result.kills += 1
            running[number].join()
            generations[number] += 1
            running[number] = start(number, generations[number])
            next_kill = time.monotonic() + dice.uniform(0.2, 1.8) * plan.kill_seconds
    stop.touch()
    for process in running:
        process.join(60)
        if process.is_alive():
            result.problems.append(f"process {process.name} does not end")
            process.kill()
            process.join()
    _sum_up(result, diaries)
    _check_end(result, plan, root, world)
    result.seconds = time.monotonic() - began
    return result


def _is_enough(plan: Plan, seconds: float, kills: int, diaries: Path) -> bool:
    """Whether enough has happened that something could have gone wrong."""
    if not plan.seconds <= seconds < plan.patience:
        return seconds >= plan.seconds
    lines = list(read_diaries(diaries))
    turns = [line for line in lines if line["kind"] == "turn"]
    rest = {"delete", "fork"} <= {line["kind"] for line in lines}
    return kills > 1 and rest and len(turns) >= plan.least and any(turn["evicted"] for turn in turns)


def _sum_up(result: Soaked, diaries: Path) -> None:
    done: Counter[str] = Counter()
    warned: Counter[str] = Counter()
    for line in read_diaries(diaries):
        done[line["kind"]] += 1
        if line["kind"] == "turn":
            result.reused_tokens += line["reused"]
            result.prompt_tokens += line["prompt"]
            result.loaded_bytes += line["loaded"]
            result.recomputed_turns += bool(line["recomputed"])
        elif line["kind"] == "warning":
            warned[line["text"].split(":")[0][:100]] += 1
        elif line["kind"] == "wrong":
            result.wrong.append(line["text"])
        elif line["kind"] in ("error", "problem"):
            result.problems.append(line["text"])
    result.turns, result.busy = done["turn"], done["busy"]
    result.done, result.warnings = dict(done), dict(warned)


def _check_end(result: Soaked, plan: Plan, root: Path, world: World) -> None:
    """What is left is right: files, accounts, locks, and every session."""
    result.end_bytes = tree_bytes(root)
    if max(result.end_bytes, result.peak_bytes) > plan.cap:
        result.problems.append(
            f"{result.end_bytes} bytes on disk, {result.peak_bytes} at most ({result.peak}); the cap is {plan.cap}"
        )
    with AttentionStore(root, block_size=BLOCK, disk=plan.cap, io_threads=1) as store:
        report = store.verify()
        result.problems += [f"at the end: {problem}" for problem in report.problems]
        index = store._disk.index
        if index.wrong_accounts():
            result.problems.append("the accounts are wrong")
        usage = index.usage()
        real = {
            "blocks": tree_bytes(root / "blocks"), "session_bytes": tree_bytes(root / "sessions"),
            "pending": tree_bytes(root / "partial"),
        }  # fmt: skip
        said = {"blocks": usage.bytes, "session_bytes": usage.session_bytes, "pending": usage.pending}
        if real != said:
            result.problems.append(f"the accounts say {said}, the files have {real}")
        totals = store.totals()
        result.evicted_blocks = int(totals.get("evicted_blocks", 0))
        result.rejected_blocks = int(totals.get("rejected", 0))
        for name in world.all_names():
            try:
                store.lock_session(name, 0).release()
            except SessionBusyError as error:
                result.problems.append(f"still locked: {error}")
        for info in store.sessions():
            said_there, ids = world.of(info.name), store.tokens(info.name, dropped=True)
            if ids != said_there.ids[: len(ids)]:
                result.wrong.append(f"at the end {info.name} has {ids}, not {said_there.ids}")
            number = said_there.next_turn(info.length)
            cache = AttentionStoreCache(world.models[said_there.family], info.name, store)
            found = turn(cache.model, said_there.prompts[number], cache).sequences
            if not torch.equal(found, said_there.sequences[number]):
                result.wrong.append(f"at the end, turn {number} of {info.name}: {found[0].tolist()}")


# scenarios: two processes, step by step


class Child:
    """A forked process to talk to."""

    def __init__(self, target: Callable[[Connection], object]) -> None:
        assert one_thread()
        self._ours, theirs = _fork.Pipe()
        self._process = _fork.Process(target=partial(_converse_with, target), args=(theirs,))
        self._process.start()
        theirs.close()

    def hear(self, seconds: float = 60.0) -> Any:
        """The next that it says."""
        if not self._ours.poll(seconds):
            raise TimeoutError("a process says nothing")
        said = self._ours.recv()
        if isinstance(said, _Failure):
            raise RuntimeError(said.text)
        return said

    def tell(self, what: Any = None) -> None:
        self._ours.send(what)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join(0 if sys.exc_info()[0] else 60)
        self.kill()
        self._ours.close()


@dataclass
class _Failure:
    text: str


def _converse_with(target: Callable[[Connection], object], connection: Connection) -> None:
    torch.set_num_threads(1)
    try:
        target(connection)
    except BaseException:
        connection.send(_Failure(traceback.format_exc()))


class _SlowWrites(Disk):
    """Every file takes some time to be written."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def write(self, path: Path, chunks: Sequence[memoryview | bytes], folder: Path, *, sync: bool) -> int:
        time.sleep(self._seconds)
        return super().write(path, chunks, folder, sync=sync)


class _Stops(BaseStreamer):
    """Says so in the middle of an answer, and waits for ever."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._count = connection, 0

    def put(self, value: torch.Tensor) -> None:
        self._count += 1
        if self._count == 3:
            self._connection.send("in the middle")
            time.sleep(600)

    def end(self) -> None: ...


def _store(root: Path, **settings: Any) -> AttentionStore:
    return AttentionStore(root, **{"block_size": BLOCK, "io_threads": 1, **settings})


def _make_store(root: Path, _: Connection) -> None:
    _store(root).close()


def _run_turn(world: World, name: str, number: int, store: AttentionStore, **settings: Any) -> list[str]:
    """Runs a turn that must be able to begin at once; returns what is wrong with it."""
    said = world.said[name]
    cache = AttentionStoreCache(world.models[said.family], name, store)
    began = time.monotonic()
    try:
        found = turn(cache.model, said.prompts[number], cache, **settings).sequences
    except SessionBusyError:
        return [f"turn {number}: the session counts as busy after {time.monotonic() - began:.3f} s"]
    took = time.monotonic() - began
    wrong = [] if torch.equal(found, said.sequences[number]) else [f"turn {number} says {found[0].tolist()}"]
    expected = said.sequences[number - 1].shape[1] - 1 if number else 0
    if cache.reused_tokens < expected:
        wrong.append(f"turn {number} reused {cache.reused_tokens} tokens of {expected}; it took {took:.2f} s")
    return wrong


def made_by_several_at_once(folder: Path, world: World, rounds: int = 5) -> list[str]:
    """Several processes open a store that is not there yet."""
    barrier = _fork.Barrier(4)

    def opener(connection: Connection) -> None:
        for number in range(rounds):
            barrier.wait(60)
            try:
                with _store(folder / str(number)) as store:
                    store.set_metadata(f"from {os.getpid()}", {})
            except AttentionStoreError as error:
                connection.send(f"round {number}: {type(error).__name__}: {error}")
        connection.send(None)

    wrong: list[str] = []
    with contextlib.ExitStack() as stack:
        for child in [stack.enter_context(Child(opener)) for _ in range(barrier.parties)]:
            while (said := child.hear()) is not None:
                wrong.append(said)
    return wrong


def killed_in_a_turn(folder: Path, world: World) -> list[str]:
    """A process that is killed in the middle of a turn holds nobody up, nor does one whose writes were not done."""
    wrong: list[str] = []
    name = world.names[0]

    def victim(connection: Connection) -> None:
        with _store(folder) as store:
            _run_turn(world, name, 0, store)
            store.flush()
            _run_turn(world, name, 1, store, streamer=_Stops(connection))

    def drained_victim(connection: Connection) -> None:
        store = _store(folder, surroundings=Surroundings(disk=_SlowWrites(0.5)))
        _run_turn(world, name, 1, store)
        connection.send("the turn is over")
        time.sleep(600)

    def next_one(number: int, reused: bool, connection: Connection) -> None:
        with _store(folder) as store:
            connection.send("ready")
            connection.recv()
            began = time.monotonic()
            store.lock_session(name, 0).release()
            took = time.monotonic() - began
            found = [f"the lock took {took:.2f} s"] if took > 0.2 else []
            found += [w for w in _run_turn(world, name, number, store) if reused or "reused" not in w]
            connection.send(found)

    for kind, number, reused in ((victim, 1, True), (drained_victim, 2, False)):
        with Child(partial(next_one, number, reused)) as follower, Child(kind) as killed:
            follower.hear()
            killed.hear()
            killed.kill()
            follower.tell()
            wrong += [f"{kind.__name__}: {what}" for what in follower.hear()]
    return wrong


def busy_while_another_runs(folder: Path, world: World) -> list[str]:
    """While a turn runs in one process, another that does not wait is told so, and one that waits gets its turn."""
    name = world.names[1]
    said = world.said[name]

    class Pauses(BaseStreamer):
        def __init__(self, connection: Connection) -> None:
            self._connection, self._count = connection, 0

        def put(self, value: torch.Tensor) -> None:
            self._count += 1
            if self._count == 3:
                self._connection.send("in the middle")
                self._connection.recv()

        def end(self) -> None: ...

    def first(connection: Connection) -> None:
        with _store(folder) as store:
            connection.send(_run_turn(world, name, 0, store, streamer=Pauses(connection)))

    def second(connection: Connection) -> None:
        with _store(folder) as store:
            model = world.models[said.family]
            connection.recv()
            try:
                turn(model, said.prompts[1], AttentionStoreCache(model, name, store))
                connection.send(["a turn began in the middle of another"])
            except SessionBusyError:
                connection.send([])
            cache = AttentionStoreCache(model, name, store, wait=60)
            found = turn(model, said.prompts[1], cache).sequences
            wrong = [] if torch.equal(found, said.sequences[1]) else ["other tokens after waiting"]
            if cache.reused_tokens < said.sequences[0].shape[1] - 1:
                wrong.append(f"after waiting {cache.reused_tokens} tokens were reused")
            connection.send(wrong)

    with Child(second) as waiting, Child(first) as running:
        running.hear()
        waiting.tell()
        wrong = waiting.hear()
        time.sleep(0.3)
        running.tell()
        return [*wrong, *running.hear(), *waiting.hear()]


def handed_to_and_fro(folder: Path, world: World) -> list[str]:
    """Two processes take turns: each begins when the other's answer is complete, while that is still being written,
    and finds all of it in the store."""
    wrong: list[str] = []
    for name in world.names[:2]:

        def talk(first: int, connection: Connection, name: str = name) -> None:
            with _store(folder, surroundings=Surroundings(disk=_SlowWrites(0.05))) as store:
                for number in range(first, len(world.said[name].prompts), 2):
                    connection.recv()
                    connection.send(_run_turn(world, name, number, store))

        with Child(partial(talk, 0)) as one, Child(partial(talk, 1)) as other:
            for number in range(len(world.said[name].prompts)):
                speaker = (one, other)[number % 2]
                speaker.tell()
                wrong += [f"{name}: {what}" for what in speaker.hear()]
    return wrong


def _begin_load(store: AttentionStore, chain: Sequence[Block]) -> tuple[Load, list[dict[str, torch.Tensor]]]:
    """Opens a load of whole blocks, a stage for each layer; returns it with where each block's tensors will be."""
    pieces = [Piece(block.meta.key, 0, block.meta.token_count) for block in chain]
    stages = []
    for layer in range(LAYERS):
        names = [f"layers.{layer}.{name}" for name in ("keys", "values")]
        targets = {name: torch.cat([block.tensors[name] for block in chain], dim=1).zero_() for name in names}
        stages.append(Stage(pieces, targets))
    parts = [stage.parts() for stage in stages]
    found = [{name: t for part in parts for name, t in part[place].items()} for place in range(len(chain))]
    return store.load(stages), found


def removed_under_a_load(folder: Path, world: World, rounds: int = 8) -> list[str]:
    """Blocks are deleted, or evicted, by one process while another is in the middle of loading them."""
    wrong: list[str] = []
    cap = 700_000
    chains = [make_chain([1000 * n + i for i in range(BLOCK * 20)], BLOCK) for n in range(rounds)]
    crowd = [make_chain([1_000_000 + 1000 * n + i for i in range(BLOCK * 120)], BLOCK) for n in range(rounds)]

    def reader(connection: Connection) -> None:
        with _store(folder, disk=cap) as store:
            for number, chain in enumerate(chains):
                save(store, chain, f"session {number}")
                store.drop_memory()
                running, found = _begin_load(store, chain)
                outcome = "right"
                try:
                    running.wait(0)
                    connection.send("in the middle")
                    connection.recv()
                    running.wait(1)
                    outcome = "right" if same(chain, found) else "WRONG TENSORS"
                except LoadError as error:
                    outcome = f"refused: {error}"
                finally:
                    running.finish()
                try:
                    again, found = _begin_load(store, chain)
                    try:
                        again.wait(1)
                        again.wait(0)
                        second = "right" if same(chain, found) else "WRONG TENSORS"
                    finally:
                        again.finish()
                except LoadError:
                    second = "refused"
                connection.send((outcome, second, store.known([block.meta.key for block in chain])))

    def remover(connection: Connection) -> None:
        with _store(folder, disk=cap) as store:
            for number in range(rounds):
                connection.recv()
                if number % 2:
                    store.delete(f"session {number}")
                else:
                    save(store, crowd[number], f"crowd {number}")
                    store.drop_memory()
                connection.send("done")

    seen: Counter[str] = Counter()
    with Child(reader) as one, Child(remover) as other:
        for number in range(rounds):
            one.hear()
            other.tell()
            other.hear()
            one.tell()
            first, second, known = one.hear()
            seen[f"{first.split(':')[0]}, then {second}"] += 1
            if "WRONG" in first + second:
                wrong.append(f"round {number}: {first}, then {second}")
            if number % 2 and known:
                wrong.append(f"round {number}: {known} blocks of a deleted session are still there")
    if not any(kind.endswith("refused") for kind in seen):
        wrong.append(f"nothing was removed: {dict(seen)}")
    return wrong


def committed_by_two(folder: Path, world: World, seconds: float = 2.0) -> list[str]:
    """Two processes set what a session consists of, again and again; a third always finds what one of them set."""
    branches = [make_chain([*range(BLOCK), *range(n, n + BLOCK * (2 + n // 1000))], BLOCK) for n in (1000, 3000)]
    manifests = []
    for number, chain in enumerate(branches):
        rows = tuple(SpanRow(block.meta.key, 0, block.meta.token_count) for block in chain)
        manifests.append(Manifest(rows, bytes([number]) * 32, 16 + number, sum(row.stop for row in rows)))
    until = time.monotonic() + seconds

    def writer(which: int, connection: Connection) -> None:
        with _store(folder) as store:
            save(store, branches[which])
            store.flush()
            connection.send("ready")
            count = 0
            while time.monotonic() < until:
                with suppress(SessionBusyError):
                    lock = store.lock_session("shared", 0.05)
                    store.commit("shared", FINGERPRINT, manifests[which])
                    lock.release()
                    store.flush()
                    count += 1
            connection.send(count)

    def reader(connection: Connection) -> None:
        ids = [[number for row in chain for number in _ids_of(row)] for chain in branches]
        wrong: list[str] = []
        seen: Counter[int] = Counter()
        with _store(folder) as store:
            while time.monotonic() < until and len(wrong) < 3:
                with suppress(SessionNotFoundError):
                    for _ in range(20):
                        manifest = store.manifest("shared")
                        if manifest not in manifests:
                            whose = [[m.length for m in manifests if part(m) == part(manifest)] for part in _PARTS]
                            wrong.append(f"a manifest that nobody wrote: spans, root, base, length are of {whose}")
                    found = store.tokens("shared")
                    if found not in ids:
                        wrong.append(f"tokens that nobody wrote: {found}")
                    seen[len(found)] += 1
        connection.send((wrong, dict(seen)))

    with Child(partial(writer, 0)) as one, Child(partial(writer, 1)) as two:
        one.hear()
        two.hear()
        with Child(reader) as reading:
            wrong, seen = reading.hear()
            counts = one.hear(), two.hear()
    if min(counts) < 5 or len(seen) < 2:
        wrong.append(f"too little happened: {counts} commits, lengths seen {seen}")
    return wrong


def never_alone_with_another(folder: Path, world: World, seconds: float = 0.5) -> list[str]:
    """Of two processes that have the store open neither is ever told that it is alone."""
    barrier = _fork.Barrier(2)

    def asks(connection: Connection) -> None:
        with _store(folder) as store:
            barrier.wait(60)
            until = time.monotonic() + seconds
            asked = alone = 0
            while time.monotonic() < until:
                with store._open_lock.exclusive() as told:
                    asked += 1
                    alone += told
            barrier.wait(60)
        connection.send((asked, alone))

    with Child(asks) as one, Child(asks) as two:
        answers = [one.hear(), two.hear()]
    return [f"told {alone} times of {asked} that it is alone" for asked, alone in answers if alone]


def locks_outlive_garbage(folder: Path, world: World, seconds: float = 1.0) -> list[str]:
    """Two processes collect garbage, lock files too, again and again: a session that one holds stays held."""
    until = time.monotonic() + seconds

    def holder(connection: Connection) -> None:
        with _store(folder) as store:
            held = store.lock_session("alice", 0)
            connection.send("held")
            while time.monotonic() < until:
                store.collect_garbage()
            connection.recv()
            held.release()

    def other(connection: Connection) -> None:
        wrong: list[str] = []
        with _store(folder) as store:
            while time.monotonic() < until and not wrong:
                store.collect_garbage()
                try:
                    store.lock_session("alice", 0)
                    wrong.append("a session that another process holds can be locked")
                except SessionBusyError:
                    continue
        connection.send(wrong)

    with Child(holder) as one:
        one.hear()
        with Child(other) as two:
            wrong: list[str] = two.hear()
        one.tell()
    return wrong


def two_stores_in_one_process(folder: Path, world: World) -> list[str]:
    """A process has the store open twice: that must not make another think, when it closes the store, that it is the
    last one, and delete the index's log."""

    def twice(connection: Connection) -> None:
        with _store(folder) as one, _store(folder):
            for number in range(3):
                connection.recv()
                save(one, make_chain([number], BLOCK), f"ours {number}")
                one.flush()
                connection.send([])

    def once(connection: Connection) -> None:
        for number in range(3):
            connection.recv()
            with _store(folder) as store:
                there = {info.name for info in store.sessions()}
                missing = {f"ours {n}" for n in range(number + 1)} - there
                for other in range(20):
                    store.set_metadata(f"theirs {number} {other}", {"text": "x" * 300})
            connection.send([f"what another process saved is not seen: {sorted(missing)}"] if missing else [])

    def last(connection: Connection) -> None:
        warned = _Heard()
        with _store(folder) as store:
            wrong = [f"at the end: {problem}" for problem in store.verify().problems]
            if store.session_count() != 63:
                wrong.append(f"{store.session_count()} sessions of 63")
        connection.send(wrong + [f"at the end: {text}" for text in warned.texts])

    wrong: list[str] = []
    with Child(twice) as one, Child(once) as two:
        for _ in range(3):
            for child in (one, two):
                child.tell()
                wrong += child.hear()
    with Child(last) as child:
        wrong += child.hear()
    return wrong


class _Heard(logging.Handler):
    """What the package warns of from now on, in this process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        logger = logging.getLogger("hf_attnstore")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def full_while_another_checkpoints(folder: Path, world: World) -> list[str]:
    """The index's log can't be emptied for a moment, since another process is about to do that: a full store stays
    within its cap then, and does not throw away what it has to make up for the log."""
    cap = 1_300_000
    checkpoint_lock = 121  # its place in the index of the log, see sqlite.org/walformat.html

    def chain(number: int) -> list[Block]:
        return make_chain([1000 * number + i for i in range(BLOCK * 8)], BLOCK)

    def saver(connection: Connection) -> None:
        _Heard()
        with _store(folder, disk=cap) as store:
            for number in range(60):
                save(store, chain(number), f"session {number}")
                store.flush()
            before = store.stats()["disk_blocks"]
            connection.send("full")
            connection.recv()
            wrong: list[str] = []
            for number in range(100, 103):
                save(store, chain(number), f"session {number}")
                store.flush()
                if (used := tree_bytes(folder)) > cap:
                    wrong.append(f"{used} bytes of {cap}")
                if (blocks := store.stats()["disk_blocks"]) < before / 2:
                    wrong.append(f"{blocks} blocks are left of {before}")
            connection.send(wrong)

    def checkpointer(connection: Connection) -> None:
        with (folder / "index.sqlite-shm").open("r+b") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX, 1, checkpoint_lock)
            connection.send("locked")
            time.sleep(0.5)

    with Child(saver) as one:
        one.hear()
        with Child(checkpointer) as two:
            two.hear()
            one.tell()
        wrong: list[str] = one.hear()
    return wrong


_PARTS: tuple[Callable[[Manifest], Any], ...] = (
    lambda m: m.spans,
    lambda m: m.root,
    lambda m: m.base,
    lambda m: m.length,
)


def _ids_of(block: Block) -> list[int]:
    return [int.from_bytes(block.meta.tokens[at : at + 4], "big") for at in range(0, len(block.meta.tokens), 4)]


SCENARIOS: dict[str, Callable[[Path, World], list[str]]] = {
    scenario.__name__: scenario
    for scenario in (
        made_by_several_at_once,
        killed_in_a_turn,
        busy_while_another_runs,
        handed_to_and_fro,
        removed_under_a_load,
        committed_by_two,
        never_alone_with_another,
        locks_outlive_garbage,
        two_stores_in_one_process,
        full_while_another_checkpoints,
    )
}


def run_scenarios(folder: Path, world: World) -> dict[str, list[str]]:
    """What is wrong, by scenario."""
    found: dict[str, list[str]] = {}
    for name, scenario in SCENARIOS.items():
        began = time.monotonic()
        try:
            if scenario is not made_by_several_at_once:
                with Child(partial(_make_store, folder / name)):
                    pass
            found[name] = scenario(folder / name, world)
        except Exception:
            found[name] = [traceback.format_exc()]
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
    return found


# the process that has one thread


def run(plan: Plan, folder: Path, *, scenarios: bool = False, timeout: float = 600.0) -> dict[str, Any]:
    """Runs a soak in a process of its own.

    Returns:
        A `Soaked` as a dict; with `scenarios`, what is wrong in those, by name.
    """
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(plan).items()]
    arguments += ["--scenarios"] if scenarios else []
    command = [sys.executable, "-m", __name__, f"--folder={folder}", "--json", *arguments]
    done = fresh.run(command, check=True, timeout=timeout)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def main() -> NoReturn:
    parser = argparse.ArgumentParser(description="Several processes that share a store.")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--folder", type=Path, help="where to make the store; a temporary folder if not said")
    parser.add_argument("--scenarios", action="store_true")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    folder, scenarios, as_json = given.pop("folder"), given.pop("scenarios"), given.pop("json")
    plan = Plan(**given)
    made = Path(tempfile.mkdtemp(prefix="soak-")) if folder is None else folder
    world = World(plan.sessions, plan.turns)
    result: dict[str, Any] = {"scenarios": run_scenarios(made / "scenarios", world)} if scenarios else {}
    result |= asdict(soak(plan, made / "soak", world)) if plan.seconds else {}
    if folder is None:
        shutil.rmtree(made)
    print(json.dumps(result, indent=None if as_json else 2))
    failed = result.get("wrong") or result.get("problems") or any(result.get("scenarios", {}).values())
    sys.exit(0 if as_json else bool(failed))


if __name__ == "__main__":
    os.environ.setdefault("ATTNSTORE_GATE", "off")  # how much is reused must not depend on the machine
    main()
