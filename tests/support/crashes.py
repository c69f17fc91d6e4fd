"""Kills processes in the middle of their work, damages files as a loss of power may, and checks what is left.

`run_kills` and `run_power_losses` start an interpreter of their own, which imports torch once and forks whoever works,
dies and checks. It never has a thread or an open store itself: what it forks is as good as a fresh process.

Whoever works says in a log what a session may become before it begins to change it, and what it is when the store has
acknowledged the change. What is found after a kill must be one of the states from the last acknowledged one on.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_attnstore import AttentionStore, LoadError, repair_store
from hf_attnstore.store.blocks.block import Block
from hf_attnstore.store.blocks.keys import chain_root
from hf_attnstore.store.disk.disk_store import DAMAGED
from hf_attnstore.store.index.database import DamagedDatabaseError
from hf_attnstore.store.records.manifest import Manifest, SpanRow
from hf_attnstore.store.transfer.stages import Piece, Stage

from . import fresh
from .store_blocks import FINGERPRINT, LAYERS, load, make_block, make_chain, same, save

SIZE = 16
"""Tokens of a block."""
SYSTEM = list(range(1, 33))
"""Tokens that many sessions begin with."""
KEEPER = "the system prompt"
"""A session that is never deleted, so that its blocks stay, whoever else has them."""
PATIENCE = 120.0
"""Seconds after which a process is taken to hang."""

Tokens = tuple[int, ...]
Say = Callable[..., None]


@dataclass
class Outcome:
    """What became of the faults of one kind."""

    fault: str
    tried: int = 0
    wrong: int = 0
    """Faults after which something was not as it has to be."""
    recomputed: int = 0
    """Faults after which something that had been handed over, or saved, has to be computed again."""
    details: list[str] = field(default_factory=list)
    """What was wrong, with the seed that shows it again."""
    served: int = 0
    """Sessions that were read back equal after the faults."""
    counts: dict[str, int] = field(default_factory=dict)
    parts: list[Outcome] = field(default_factory=list)
    """The same for each kind of this kind."""

    def __str__(self) -> str:
        said = f"{self.fault}: {self.tried} tried, {self.wrong} wrong, {self.recomputed} recomputed"
        return "\n  ".join([said, *self.details[:20]])

    def part(self, fault: str) -> Outcome:
        found = next((part for part in self.parts if part.fault == fault), None)
        if found is None:
            found = Outcome(fault)
            self.parts.append(found)
        return found

    def count(self, what: str, amount: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + amount

    def add(self, fault: str, wrong: Sequence[str], *, recomputed: bool, served: int) -> None:
        """Counts one fault."""
        for outcome in (self, self.part(fault)):
            outcome.tried += 1
            outcome.wrong += bool(wrong)
            outcome.recomputed += recomputed
            outcome.details += wrong
            outcome.served += served


def run_kills(path: Path, seed: int, count: int) -> Outcome:
    """Kills so many processes that work with stores below `path`; what is wrong stays there to be looked at."""
    return _run("kills", path, seed, count)


def run_power_losses(path: Path, seed: int, count: int) -> Outcome:
    """Damages so many copies of stores below `path` as a loss of power may."""
    return _run("power", path, seed, count)


def _run(what: str, path: Path, seed: int, count: int) -> Outcome:
    path.mkdir(parents=True, exist_ok=True)
    result = path / f"{what}.json"
    fresh.run([sys.executable, "-m", __name__, what, path, seed, count, result], check=True, timeout=7200)
    found = json.loads(result.read_text())
    return Outcome(**{**found, "parts": [Outcome(**part) for part in found["parts"]]})


def serve(what: str, path: str, seed: str, count: str, result: str) -> None:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported stays shared with what is forked
    run = {"kills": _kills, "power": _power_losses}[what]
    outcome = run(Path(path), int(seed), int(count))
    Path(result).write_text(json.dumps(asdict(outcome)))


# processes


def forked(task: Callable[[], None]) -> int:
    """Runs a task in a process of its own, and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        task()
        code = 0
    except BaseException:
        logging.getLogger("crashes").exception("a forked process failed")
    finally:
        os._exit(code)


def ended(pid: int, *, within: float) -> int | None:
    """A process's exit code (negative for a signal); None if it has not ended after so many seconds."""
    deadline = time.monotonic() + within
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.001)


def answer(task: Callable[[], dict[str, Any]], where: Path) -> dict[str, Any]:
    """What a task returns that runs in a process of its own."""
    where.unlink(missing_ok=True)
    pid = forked(lambda: _keep(where, json.dumps(task())))
    code = ended(pid, within=PATIENCE)
    if code is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if code != 0:
        return {"wrong": ["it hung" if code is None else f"it ended with {code}"]}
    return dict(json.loads(where.read_text()))


def _keep(where: Path, text: str) -> None:
    where.write_text(text)


class Hear(logging.Handler):
    """Tells somebody what the package warns of."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record.getMessage())

    def install(self) -> None:
        logger = logging.getLogger("hf_attnstore")
        logger.handlers[:] = [self]
        logger.propagate = False


# working


@dataclass
class Kind:
    """How a store is opened."""

    name: str
    disk: int = 1 << 30
    durability: str = "process"
    memory: str = "64MiB"

    @property
    def capped(self) -> bool:
        return self.disk < 1 << 30

    def open(self, path: Path) -> AttentionStore:
        return AttentionStore(
            path,
            block_size=SIZE,
            disk=self.disk,
            memory=self.memory,
            durability=self.durability,  # type: ignore[arg-type]
            io_threads=1,
        )


PLAIN = Kind("no cap")
CAPPED = Kind("small cap", disk=640_000, memory="256KiB")
SYNCED = Kind("synced", durability="power")


@dataclass
class State:
    """What a session is."""

    tokens: Tokens
    mark: int = 0
    """In its metadata; 0 for none."""


class Worker:
    """One thread's sessions: what it does with them, and what it says of that."""

    def __init__(
        self, store: AttentionStore, kind: Kind, say: Say, number: int, sessions: Mapping[str, State], seed: str
    ) -> None:
        self._store = store
        self._kind = kind
        self._say = say
        self._dice = random.Random(f"{seed} {number}")
        self._prefix = f"{number}:"
        self._own = {name: State(s.tokens, s.mark) for name, s in sessions.items() if name.startswith(self._prefix)}
        self._unsure: set[str] = set()
        """Sessions with commits that are not acknowledged."""
        self._there = set(self._own)
        """Sessions that are certainly there."""
        self._longest = 400 if kind.capped else 150

    def run(self, steps: int) -> None:
        try:
            for _ in range(steps):
                self._step()
            self._flush()
        except Exception as error:
            self._say("error", f"{self._prefix} {error!r}")

    def _step(self) -> None:
        steps: list[tuple[int, Callable[[], None]]] = [
            (50, self._turn),
            (14, self._flush),
            (6, self._fork),
            (5, self._rename),
            (6, self._delete),
            (7, self._mark),
            (6, self._read),
            (1, self._collect),
        ]
        self._dice.choices([step for _, step in steps], [weight for weight, _ in steps])[0]()

    def _new_name(self) -> str:
        return self._prefix + str(self._dice.randrange(10**9))

    def _any(self) -> str | None:
        return self._dice.choice(sorted(self._own)) if self._own else None

    def _turn(self) -> None:
        name = self._any()
        new = name is None or (len(self._own) < 4 and self._dice.random() < 0.3)
        if name is None or new:
            name = self._new_name()
            self._own[name] = State(())
            begin = tuple(SYSTEM) if self._dice.random() < 0.5 else ()
        else:
            begin = self._own[name].tokens
            if len(begin) > self._longest or self._dice.random() < 0.15:
                begin = begin[: self._dice.randrange(len(begin) // 2 + 1)]  # another branch
        more = self._dice.randint(1, 90 if self._kind.capped else 36)
        tokens = (*begin, *(self._dice.randrange(100, 30_000) for _ in range(more)))
        lock = self._store.lock_session(name, wait=10) if self._dice.random() < 0.5 else None
        self._hand_over(name, tokens)
        if lock is not None:
            lock.release()
        if self._dice.random() < 0.3:
            self._flush()

    def _hand_over(self, name: str, tokens: Tokens) -> None:
        self._say("tokens", name, tokens, False)
        before = make_chain(list(self._own[name].tokens), SIZE)
        short = before[-1].meta if before and before[-1].meta.token_count < SIZE else None
        chain = make_chain(list(tokens), SIZE)
        self._own[name].tokens = tokens
        self._unsure.add(name)
        for block in chain:
            meta = block.meta
            if self._store.has(meta.key):
                continue
            longer = short is not None and meta.parent == short.parent and meta.tokens.startswith(short.tokens)
            if not self._store.reserve(block.nbytes, wait=True):
                raise MemoryError("there is no room for a block")
            self._store.put(block, supersedes=short.key if short is not None and longer else None)
        rows = tuple(SpanRow(block.meta.key, 0, block.meta.token_count) for block in chain)
        self._store.commit(name, FINGERPRINT, Manifest(rows, length=len(tokens)))

    def _flush(self) -> None:
        if self._dice.random() < 0.1:
            self._store.drop_memory()
        self._store.flush()
        stats = self._store.stats()
        for what in ("write_errors", "read_errors", "rejected", *(() if self._kind.capped else ("not_saved_blocks",))):
            if stats[what]:
                self._say("error", f"{stats[what]} {what}")
        if stats["evicted_blocks"]:
            self._say("evicted", stats["evicted_blocks"])
        self._settled()

    def _settled(self) -> None:
        for name in sorted(self._unsure):
            self._say("tokens", name, self._own[name].tokens, True)
        self._there |= self._unsure
        self._unsure.clear()

    def _fork(self) -> None:
        name, target = self._any(), self._new_name()
        if name is None or len(self._own) > 5:
            return
        source = self._own[name]
        self._say("tokens", target, source.tokens, False)
        self._say("mark", target, source.mark, False)
        self._store.fork(name, target)
        self._own[target] = State(source.tokens, source.mark)
        self._there.add(target)
        self._settled()
        self._say("tokens", target, source.tokens, True)
        self._say("mark", target, source.mark, True)

    def _rename(self) -> None:
        name, target = self._any(), self._new_name()
        if name is None:
            return
        source = self._own[name]
        self._unsure.discard(name)
        self._say("rename", name, target, False)
        self._say("tokens", target, source.tokens, False)
        self._say("mark", target, source.mark, False)
        self._say("tokens", name, None, False)
        self._store.rename(name, target)
        self._settled()
        self._own[target] = self._own.pop(name)
        self._there.add(target)
        self._say("rename", name, target, True)
        self._say("tokens", target, source.tokens, True)
        self._say("mark", target, source.mark, True)
        self._say("tokens", name, None, True)

    def _delete(self) -> None:
        name = self._any()
        if name is None:
            return
        self._unsure.discard(name)
        self._say("tokens", name, None, False)
        self._store.delete(name, secure=self._dice.random() < 0.2)
        self._settled()
        del self._own[name]
        self._say("tokens", name, None, True)

    def _mark(self) -> None:
        name = self._any()
        if name is None or self._dice.random() < 0.2:
            name = self._new_name()
            self._own[name] = State(())
            self._say("tokens", name, (), False)
        elif name not in self._there:
            self._flush()
        mark = self._own[name].mark = self._dice.randrange(1, 10**9)
        self._say("mark", name, mark, False)
        self._store.set_metadata(name, {"mark": mark, "text": "x" * self._dice.randrange(300)})
        self._say("mark", name, mark, True)
        if not self._own[name].tokens:
            self._say("tokens", name, (), True)
        self._there.add(name)

    def _read(self) -> None:
        name = self._any()
        if name is None or name in self._unsure:
            return
        try:
            wrong = wrong_content(self._store, name)
        except LoadError:
            if not self._kind.capped:  # where there is a cap, a block may be evicted between finding and reading it
                raise
            return
        if wrong:
            self._say("error", f"read while working: {wrong}")
        self._store.touch([span.block for span in self._store.manifest(name).spans])
        self._store.promote([span.block for span in self._store.manifest(name).spans])

    def _collect(self) -> None:
        self._store.collect_garbage()


def sayer(log: Path) -> Say:
    """Writes what is said to a log, each time at once: what a process said is there however it ends."""
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def say(*event: object) -> None:
        os.write(fd, f"\n{json.dumps(event)}\n".encode())

    return say


def work(
    path: Path,
    kind: Kind,
    say: Say,
    sessions: Mapping[str, State],
    seed: str,
    *,
    threads: Sequence[int] = (0, 1, 2),
    rounds: Sequence[Callable[[], None]] = (lambda: None,),
    alone: bool = True,
    steps: int = 8,
) -> None:
    """Opens a store, works with it in several threads, and closes it. What is in `rounds` is called while it is open
    and everything is on disk, after one round of work each."""
    begun = time.monotonic()
    Hear(lambda text: None if kind.capped and "is full" in text else say("error", text)).install()
    store = kind.open(path)
    say("opened")
    if alone and random.Random(seed).random() < 0.1:
        store.collect_garbage(unowned=True)
    if KEEPER not in sessions:
        say("tokens", KEEPER, SYSTEM, False)
        save(store, make_chain(SYSTEM, SIZE), KEEPER)
        store.flush()
        say("tokens", KEEPER, SYSTEM, True)
    workers = [Worker(store, kind, say, number, sessions, seed) for number in threads]
    for afterwards in rounds:
        running = [threading.Thread(target=worker.run, args=(steps,), daemon=True) for worker in workers]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        store.flush()
        afterwards()
    say("closing")
    store.close()
    say("closed", time.monotonic() - begun)


# what is expected


class Expected:
    """What sessions may be, given what those who worked said."""

    def __init__(self, sessions: Mapping[str, State]) -> None:
        self.tokens: dict[str, list[Tokens | None]] = {name: [state.tokens] for name, state in sessions.items()}
        self.marks: dict[str, list[int]] = {name: [state.mark] for name, state in sessions.items()}
        self.moving: dict[tuple[str, str], bool] = {}
        """Renames that were begun and not acknowledged, and whether the session was certainly there."""
        self.errors: list[str] = []
        self.said: Counter[str] = Counter()
        self.seconds = 0.0
        self.operations: list[int] = []
        """Done when the store was open, and when it was closed."""
        self.ever: dict[str, set[Tokens]] = {}
        self.ever_marks: dict[str, set[int]] = {}

    def read(self, log: Path) -> None:
        lines = log.read_bytes().split(b"\n") if log.exists() else []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:  # the line that was being written at the end: what it speaks of was not begun
                continue
            self._take(*event)

    def _take(self, what: str, *about: Any) -> None:
        self.said[what] += 1
        if what == "tokens":
            name, tokens, sure = about
            tokens = tuple(tokens) if tokens is not None else None
            self.tokens[name] = [tokens] if sure else [*self.tokens.get(name, [None]), tokens]
            if tokens is not None:
                self.ever.setdefault(name, set()).add(tokens)
        elif what == "mark":
            name, mark, sure = about
            self.marks[name] = [mark] if sure else [*self.marks.get(name, [0]), mark]
            self.ever_marks.setdefault(name, {0}).add(mark)
        elif what == "rename":
            source, target, sure = about
            if sure:
                self.moving.pop((source, target))
            else:
                self.moving[source, target] = None not in self.tokens[source]
        elif what == "error":
            self.errors.append(f"while working: {about[0]}")
        elif what == "evicted":
            self.said["evicted blocks"] = max(self.said["evicted blocks"], about[0])
        elif what == "killed":
            self.said[f"killed at {about[0]}"] += 1
        elif what == "operations":
            self.operations += about
        elif what == "closed":
            self.seconds = about[0]

    @property
    def unacknowledged(self) -> int:
        """Sessions of which somebody was in the middle."""
        names = {name for name, states in self.tokens.items() if len(set(states)) > 1}
        return len(names | {name for name, states in self.marks.items() if len(set(states)) > 1})

    def wrong(self, found: Mapping[str, State], *, capped: bool) -> list[str]:
        """What of the sessions that were found should not be."""
        wrong = []
        for name in sorted(set(found) | set(self.tokens)):
            may = self.tokens.get(name, [None])
            state = found.get(name)
            if state is None:
                if None not in may:
                    wrong.append(f"session {name} is gone")
                continue
            if not any(_is(state.tokens, tokens, capped) for tokens in may):
                lengths = [len(tokens) if tokens is not None else None for tokens in may]
                wrong.append(f"session {name} has {len(state.tokens)} tokens that are none of its states {lengths}")
            if state.mark not in self.marks.get(name, [0]):
                wrong.append(f"session {name} has mark {state.mark}, not one of {self.marks.get(name)}")
        for (source, target), certain in self.moving.items():
            there = (source in found) + (target in found)
            if there > 1 or (certain and not there):
                wrong.append(f"session {source}, when it was renamed to {target}, is there {there} times")
        return wrong

    def lost(self, found: Mapping[str, State]) -> int:
        """Sessions whose last state did not make it."""
        return sum(
            states[-1] is not None and (name not in found or found[name].tokens != states[-1])
            for name, states in self.tokens.items()
        )


def _is(found: Tokens, tokens: Tokens | None, capped: bool) -> bool:
    if tokens is None:
        return False
    return found == tokens or (capped and len(found) % SIZE == 0 and found == tokens[: len(found)])


# checking


def wrong_content(store: AttentionStore, name: str) -> str:
    """What is wrong with what a session's blocks hold; nothing for a session that is read back equal.

    Raises:
        LoadError: a block can't be read.
    """
    chain, pieces, expected = [], [], []
    parent, position = chain_root(FINGERPRINT, ""), 0
    for span in store.manifest(name).spans:
        found = store.describe_block(span.block)
        if found is None:
            raise LoadError(f"a block of session {name} can't be read")
        ids = found[1].tolist()
        block = make_block(parent, ids, position)
        if found[0] != position or block.meta.key != span.block:
            return f"session {name} has a wrong block at {position}"
        if span.start != 0 or not 0 < span.stop <= len(ids):
            return f"session {name} has a wrong span {span.start}:{span.stop} of {len(ids)}"
        chain.append(block)
        pieces.append(Piece(span.block, span.start, span.stop))
        expected += ids[: span.stop]
        parent, position = span.block, position + span.stop
    told = store.tokens(name)
    if told != expected:
        if told == expected[: len(told)]:
            raise LoadError(f"a block of session {name} is gone")
        return f"session {name} has other tokens than its blocks"
    return "" if _loads_equal(store, chain, pieces) else f"session {name} was loaded wrong"


def _loads_equal(store: AttentionStore, chain: Sequence[Block], pieces: Sequence[Piece]) -> bool:
    if not pieces:
        return True
    stages, wanted = [], []
    for layer in range(LAYERS):
        names = [f"layers.{layer}.{name}" for name in ("keys", "values")]
        cut = {
            name: torch.cat([b.tensors[name][:, p.start : p.stop] for b, p in zip(chain, pieces, strict=True)], dim=1)
            for name in names
        }
        wanted.append(cut)
        stages.append(Stage(list(pieces), {name: torch.zeros_like(tensor) for name, tensor in cut.items()}))
    running = store.load(stages)
    try:
        for number in range(LAYERS):
            running.wait(number)
    finally:
        running.finish()
    return all(
        torch.equal(tensor, stage.targets[name])
        for stage, cut in zip(stages, wanted, strict=True)
        for name, tensor in cut.items()
    )


def state_of(store: AttentionStore, name: str) -> State:
    return State(tuple(store.tokens(name)), int(store.metadata(name).get("mark", 0)))


def files_below(path: Path) -> dict[str, int]:
    """Sizes of all files, by their path below a folder."""
    found = {}
    for folder, _, names in os.walk(path):
        for name in names:
            file = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):
                found[str(file.relative_to(path))] = file.lstat().st_size
    return found


EXPECTED_FILES = {"store.json", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm"}


def check(path: Path, kind: Kind) -> dict[str, Any]:
    """Opens a store after a kill and looks at everything; returns what is wrong, and the sessions."""
    wrong: list[str] = []
    Hear(lambda text: wrong.append(f"a warning: {text}")).install()
    if sum(files_below(path).values()) > kind.disk:
        wrong.append(f"{sum(files_below(path).values())} bytes on disk, the cap is {kind.disk}")
    try:
        store = kind.open(path)
    except Exception as error:
        return {"wrong": [f"it can't be opened: {error!r}"]}
    with store:
        sessions = {}
        for info in store.sessions():
            try:
                sessions[info.name] = asdict(state_of(store, info.name))
                wrong += filter(None, [wrong_content(store, info.name)])
            except Exception as error:
                wrong.append(f"session {info.name} can't be read: {error!r}")
        wrong += wrong_files(store)
        wrong += [f"verify: {p.kind} {p.where.removeprefix(str(path))}: {p.detail}" for p in store.verify().problems]
        if sum(files_below(path).values()) > kind.disk:
            wrong.append(f"{sum(files_below(path).values())} bytes on disk once opened, the cap is {kind.disk}")
    return {"wrong": wrong, "sessions": sessions}


def wrong_files(store: AttentionStore) -> list[str]:
    """What of the files in the folder does not fit the index, or should not be there."""
    wrong = []
    index = store._disk.index
    there = files_below(store.path)
    blocks = {name: size for name, size in there.items() if name.startswith("blocks/")}
    records = {name: size for name, size in there.items() if name.startswith("sessions/")}
    known = {
        str(store._disk.files.path(row.fingerprint, row.key).relative_to(store.path)): row.bytes
        for row in index.blocks()
    }
    if known != blocks:
        wrong.append(f"block files without a row {sorted(set(blocks) - set(known))}, rows without a file "
                     f"{sorted(set(known) - set(blocks))}, or of other sizes")  # fmt: skip
    named = {str(store._disk.records.path(*n).relative_to(store.path)) for n in index.sessions.all_names()}
    if named != set(records):
        wrong.append(f"records without a session {sorted(set(records) - named)}, "
                     f"sessions without a record {sorted(named - set(records))}")  # fmt: skip
    usage = index.usage()
    if (usage.bytes, usage.blocks) != (sum(blocks.values()), len(blocks)):
        wrong.append(f"the accounts say {usage.bytes} bytes of {usage.blocks} blocks, there are {sum(blocks.values())} "
                     f"of {len(blocks)}")  # fmt: skip
    if (usage.session_bytes, usage.sessions) != (sum(records.values()), len(records)):
        wrong.append(f"the accounts say {usage.session_bytes} bytes of {usage.sessions} records, there are "
                     f"{sum(records.values())} of {len(records)}")  # fmt: skip
    if usage.pending or index.pending():
        wrong.append(f"{usage.pending} bytes are pending")
    if index.wrong_accounts():
        wrong.append("the accounts are wrong")
    others = set(there) - set(blocks) - set(records) - EXPECTED_FILES
    others = {name for name in others if not name.startswith("locks/")}
    if others:
        wrong.append(f"files that should not be there: {sorted(others)}")
    return wrong


# kills


class Operations:
    """Counts what a process does to files and to the index, and ends it right before a certain one."""

    NAMES = ("open", "rename", "replace", "unlink", "writev", "fsync", "mkdir", "ftruncate", "link", "pwrite")

    def __init__(self, say: Say, fatal: int | None, *, half: bool) -> None:
        self._say = say
        self._fatal = fatal
        self._half = half
        self._numbers = itertools.count(1)
        self.done = 0

    def _next(self, what: str) -> bool:
        """Whether this is the one."""
        self.done = number = next(self._numbers)
        if self._fatal is None or number < self._fatal or (self._half and what != "writev"):
            return False
        if number == self._fatal or self._half:
            self._say("killed", what)
            return True
        return False

    def install(self) -> None:
        for name in self.NAMES:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        connect = sqlite3.connect

        @functools.wraps(connect)
        def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            connection = connect(*args, **kwargs)
            connection.set_trace_callback(self._statement)
            return connection

        sqlite3.connect = traced  # type: ignore[assignment]

    def _statement(self, statement: str) -> None:
        words = statement.split()
        if self._next(f"SQL {words[0].upper()}" if not statement.startswith("--") else "SQL in a trigger"):
            die()

    def _wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if self._next(name):
                if self._half:
                    fd, views = args
                    content = b"".join(views)
                    os.write(fd, content[: len(content) // 2])
                die()
            return function(*args, **kwargs)

        return wrapped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PATIENCE)


INSTANT = "killed at a random instant"
BETWEEN = "killed between two operations"
HALFWAY = "killed in the middle of a write"


@dataclass
class Measured:
    """What a whole run of `work` takes."""

    operations: int
    opening: int
    seconds: float


def _counted_work(
    path: Path, kind: Kind, log: Path, sessions: Mapping[str, State], seed: str, fatal: int | None, half: bool,
    threads: Sequence[int], alone: bool,
) -> None:  # fmt: skip
    say = sayer(log)
    operations = Operations(say, fatal, half=half)
    operations.install()

    def count_too(*event: object) -> None:
        say(*event)
        if event[0] in ("opened", "closed"):
            say("operations", operations.done)

    work(path, kind, count_too, sessions, seed, threads=threads, alone=alone)


def _measure(path: Path, kind: Kind, seed: str) -> Measured:
    """Works with a store without being killed, to see how many operations that takes."""
    path.mkdir()
    log = path / "log"
    pid = forked(lambda: _counted_work(path / "store", kind, log, {}, seed, None, False, (0, 1, 2), True))
    expected = _after(pid, log)
    shutil.rmtree(path)
    return Measured(*reversed(expected.operations), expected.seconds)


def _after(pid: int, log: Path) -> Expected:
    """What somebody said who has worked without being killed."""
    code = ended(pid, within=PATIENCE)
    expected = Expected({})
    expected.read(log)
    if code != 0 or expected.errors:
        raise RuntimeError(f"working without any fault failed ({code}, {expected.errors}): see {log.parent}")
    return expected


def _kills(path: Path, seed: int, count: int) -> Outcome:
    outcome = Outcome("kill -9")
    kinds = (PLAIN, CAPPED, PLAIN, SYNCED, CAPPED)
    measured = {kind.name: _measure(path / "dry", kind, f"{seed} {kind.name}") for kind in (PLAIN, CAPPED, SYNCED)}
    stores = itertools.count()
    left = 0
    kind, root = PLAIN, path
    sessions: dict[str, State] = {}
    for number in itertools.count():
        if outcome.tried == count:
            break
        dice = random.Random(f"{seed} {number}")
        if left == 0:
            turn = next(stores)
            kind, root, left, sessions = kinds[turn % len(kinds)], path / f"store-{turn}", dice.randint(8, 40), {}
            left = min(left, max(count // 4, 1))
            root.mkdir()
        left -= 1
        found = _kill(root, kind, dice, sessions, f"{seed} {number}", measured[kind.name], outcome)
        if found is None:
            left = 0  # and what is wrong stays to be looked at
        else:
            sessions = found
            if left == 0:
                shutil.rmtree(root)
    outcome.count("stores", next(stores))
    for kind_name, measure in measured.items():
        outcome.count(f"operations of a run, {kind_name}", measure.operations)
        outcome.count(f"milliseconds of a run, {kind_name}", round(measure.seconds * 1000))
    return outcome


def _kill(
    root: Path, kind: Kind, dice: random.Random, sessions: dict[str, State], seed: str, usual: Measured,
    outcome: Outcome,
) -> dict[str, State] | None:  # fmt: skip
    """Has somebody work and be killed. Returns the sessions that are there afterwards; None if something is wrong."""
    fault = dice.choices((INSTANT, BETWEEN, HALFWAY), (40, 45, 15))[0]
    fatal = delay = None
    if fault == INSTANT:
        delay = dice.uniform(0, usual.seconds)
    else:
        early = dice.random() < 0.25
        fatal = dice.randint(1, usual.opening if early else usual.operations)
    pair = dice.random() < 0.15
    store = root / "store"
    logs = [root / "log-0", root / "log-1"]
    for log in logs:
        log.unlink(missing_ok=True)
    where = f"[seed {seed}, {kind.name}, {fault}{f' {fatal}' if fatal else ''}{', two processes' if pair else ''}]"

    def begin(log: Path, threads: tuple[int, ...], fatal: int | None) -> int:
        half = fault == HALFWAY
        return forked(lambda: _counted_work(store, kind, log, sessions, seed, fatal, half, threads, not pair))

    pids = [begin(logs[0], (0, 1, 2), fatal)]
    if pair:
        pids.append(begin(logs[1], (3, 4), None))
    codes = [ended(pids[0], within=PATIENCE if delay is None else delay)]
    if codes[0] is None and delay is not None:
        os.kill(pids[0], signal.SIGKILL)
        codes[0] = ended(pids[0], within=PATIENCE)
    for other in pids[1:]:
        code = ended(other, within=dice.choice([0, 0.02, 0.1, PATIENCE]))
        if code is None:
            os.kill(other, signal.SIGKILL)
            code = ended(other, within=PATIENCE)
            outcome.count("second processes killed")
        codes.append(code)
    expected = Expected(sessions)
    for log in logs:
        expected.read(log)
    wrong = list(expected.errors)
    for pid, code in zip(pids, codes, strict=True):
        if code is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            wrong.append("a process hung")
        elif code not in (0, -signal.SIGKILL):
            wrong.append(f"a process ended with {code}")
    answered = answer(lambda: check(store, kind), root / "answer.json")
    wrong += answered["wrong"]
    found = {name: State(tuple(s["tokens"]), s["mark"]) for name, s in answered.get("sessions", {}).items()}
    if "sessions" in answered:
        wrong += expected.wrong(found, capped=kind.capped)
    wrong = [f"{where} {text}" for text in wrong]
    killed = codes[0] == -signal.SIGKILL
    if killed:
        outcome.add(fault, wrong, recomputed=expected.lost(found) > 0, served=len(found))
        _count_kill(outcome, expected, found, pair=pair)
    else:
        outcome.count("ended before they were killed")
        outcome.wrong += bool(wrong)
        outcome.details += wrong
    return None if wrong else found


def _count_kill(outcome: Outcome, expected: Expected, found: Mapping[str, State], *, pair: bool) -> None:
    said = expected.said
    for what, amount in said.items():
        if what.startswith("killed at"):
            outcome.count(what, amount)
    outcome.count("sessions with states that were not acknowledged", expected.unacknowledged)
    outcome.count("sessions without", sum(states == states[-1:] for states in expected.tokens.values()))
    outcome.count("evicted blocks", said["evicted blocks"])
    outcome.count("in the middle of work", int(expected.unacknowledged > 0))
    outcome.count("while two processes worked", int(pair))
    outcome.count("while opening" if not said["opened"] else "while closing" if said["closing"] else "while working")
    shortened = [
        name for name, state in found.items() if state.tokens not in expected.tokens.get(name, []) and state.tokens
    ]
    outcome.count("sessions cut short by eviction", len(shortened))


# loss of power


@dataclass
class Made:
    """A store that somebody worked with, in several states of its life, and what its sessions ever were."""

    live: list[Path]
    closed: Path
    expected: Expected


def _make(path: Path, seed: str) -> Made:
    path.mkdir()
    store, log = path / "store", path / "log"
    live = [path / f"live-{number}" for number in range(4)]
    rounds = [functools.partial(shutil.copytree, store, copy) for copy in live]
    pid = forked(lambda: work(store, PLAIN, sayer(log), {}, seed, rounds=rounds, steps=5))
    expected = _after(pid, log)
    return Made(live, store, expected)


def _spoil(file: Path, dice: random.Random, synced: int = 0) -> None:
    """What a loss of power may make of a file whose name was on disk and whose content was not, or only its first
    so many bytes."""
    size = max(file.stat().st_size, synced)
    keep = synced if dice.random() < 0.3 else dice.randint(synced, size)
    if dice.random() < 0.5:
        os.truncate(file, keep)
    else:
        with file.open("r+b") as stream:
            stream.seek(keep)
            stream.write(bytes(size - keep))


def _spoil_some(files: Sequence[Path], dice: random.Random) -> None:
    for file in dice.sample(list(files), min(len(files), dice.choice([1, 1, 2, 5]))):
        _spoil(file, dice)


def _block_files(root: Path) -> list[Path]:
    return sorted((root / "blocks").glob("*/*/*.safetensors"))


def _records(root: Path) -> list[Path]:
    return sorted((root / "sessions").glob("*/*.session"))


def _blocks_emptied(root: Path, dice: random.Random) -> None:
    _spoil_some(_block_files(root), dice)


def _blocks_missing(root: Path, dice: random.Random) -> None:
    for file in dice.sample(_block_files(root), 2):
        file.unlink()


def _records_emptied(root: Path, dice: random.Random) -> None:
    _spoil_some(_records(root), dice)


def _log_lost(root: Path, dice: random.Random) -> None:
    (root / "index.sqlite-wal").unlink()
    if dice.random() < 0.5:
        (root / "index.sqlite-shm").unlink()


def _log_cut(root: Path, dice: random.Random) -> None:
    """SQLite syncs the log before it moves anything from there into the database: that much is never lost."""
    (moved,) = struct.unpack_from("<I", (root / "index.sqlite-shm").read_bytes(), 96)
    _spoil(root / "index.sqlite-wal", dice, min(32 + moved * 4120, (root / "index.sqlite-wal").stat().st_size))


def _log_cut_anywhere(root: Path, dice: random.Random) -> None:
    """... unless the disk says that it has synced and has not."""
    _spoil(root / "index.sqlite-wal", dice)


def _log_and_files(root: Path, dice: random.Random) -> None:
    dice.choice([_log_lost, _log_cut])(root, dice)
    _blocks_emptied(root, dice)
    _records_emptied(root, dice)


def _index_emptied(root: Path, dice: random.Random) -> None:
    _spoil(root / "index.sqlite", dice)
    if dice.random() < 0.5:
        _blocks_emptied(root, dice)
        _records_emptied(root, dice)


@dataclass(frozen=True)
class Loss:
    """Something that a loss of power may do."""

    spoil: Callable[[Path, random.Random], None]
    live: bool = False
    """To the copy of a store that was open."""
    lied: bool = False
    """By a disk that says that it has synced and has not: an index may then prove damaged later than it is opened."""


LOSSES = {
    "block files cut or zeroed": Loss(_blocks_emptied),
    "block files missing": Loss(_blocks_missing),
    "session records cut or zeroed": Loss(_records_emptied),
    "the index's log lost": Loss(_log_lost, live=True),
    "the index's log cut or zeroed": Loss(_log_cut, live=True),
    "the index's log and files": Loss(_log_and_files, live=True),
    "the index cut or zeroed": Loss(_index_emptied, lied=True),
    "the index's log cut by a disk that lies": Loss(_log_cut_anywhere, live=True, lied=True),
}


def _power_losses(path: Path, seed: int, count: int) -> Outcome:
    outcome = Outcome("loss of power")
    made: Made | None = None
    for number in range(count):
        dice = random.Random(f"{seed} {number}")
        if number % 25 == 0 or made is None:
            shutil.rmtree(path / f"made-{number // 25 - 1}", ignore_errors=True)
            made = _make(path / f"made-{number // 25}", f"{seed} {number}")
        fault = list(LOSSES)[number % len(LOSSES)]
        loss = LOSSES[fault]
        copy, before = path / f"case-{number}", path / f"case-{number}-before"
        shutil.copytree(dice.choice(made.live) if loss.live else made.closed, copy)
        whole = {file: file.read_bytes() for file in _block_files(copy)}
        loss.spoil(copy, dice)
        damaged = {file.stem for file, content in whole.items() if not file.exists() or file.read_bytes() != content}
        shutil.copytree(copy, before)  # to look at where something is wrong
        repaired = dice.random() < 0.25
        look = functools.partial(_check_loss, copy, made.expected, damaged, repaired=repaired, lied=loss.lied)
        answered = answer(look, path / "answer.json")
        where = f"[seed {seed}, case {number}, {fault}{', repaired' if repaired else ''}]"
        wrong = [f"{where} {text}" for text in answered["wrong"]]
        recomputed = answered.get("recomputed", 0)
        outcome.add(fault, wrong, recomputed=recomputed > 0, served=answered.get("served", 0))
        outcome.count("sessions recomputed", recomputed)
        for what, amount in answered.get("counts", {}).items():
            outcome.count(what, amount)
        if not wrong:
            shutil.rmtree(copy)
            shutil.rmtree(before)
    return outcome


def _check_loss(path: Path, expected: Expected, damaged: set[str], *, repaired: bool, lied: bool) -> dict[str, Any]:
    """Opens a store that was damaged: what it says must be true, the rest must come back when it is computed again.

    Where the disk lied, an index may prove damaged only when it is used. It is not believed then, and the next who
    opens the store, or repairs it, makes it anew.
    """
    wrong: list[str] = []
    counts: Counter[str] = Counter({"damaged blocks": len(damaged)})
    Hear(lambda text: counts.update(["warnings"])).install()
    for attempt in range(3 if lied else 1):
        try:
            if repaired or attempt == 2:
                repair_store(path)
            with PLAIN.open(path) as store:
                if repaired and not lied:
                    wrong += [f"verify after repair: {p.kind} {p.where}: {p.detail}" for p in store.verify().problems]
                served, lost = _use(store, expected, damaged, wrong, counts)
            return {"wrong": wrong, "recomputed": len(lost), "served": served, "counts": counts}
        except DamagedDatabaseError:
            counts["indexes that proved damaged in use"] += 1
        except Exception as error:
            return {"wrong": [*wrong, f"it can't be opened or used: {error!r}"]}
    return {"wrong": [*wrong, "the index proved damaged"]}


def _use(
    store: AttentionStore, expected: Expected, damaged: set[str], wrong: list[str], counts: Counter[str]
) -> tuple[int, set[str]]:
    """Reads every session, and saves those again of which something is missing. Returns how many were whole, and the
    names of those that were not."""
    whole = {file.stem for file in _block_files(store.path)} - damaged
    names = {info.name for info in store.sessions()}
    broken = {name for name in sorted(names) if _serve(store, name, expected, whole, wrong, counts)}
    final = {name: states[-1] for name, states in expected.tokens.items() if states[-1] is not None}
    lost = {n for n, tokens in final.items() if n in broken or n not in names or tuple(store.tokens(n)) != tokens}
    for name in sorted(lost):
        chain = make_chain(list(final[name]), SIZE)
        for block in chain:  # what is still offered is used, or found to be damaged too
            with contextlib.suppress(LoadError):
                if store.has(block.meta.key) and not same([block], load(store, [block])):
                    wrong.append(f"session {name} was loaded wrong at {block.meta.start}")
        save(store, chain, name)
    store.drop_memory()
    if store.stats()["write_errors"]:
        if (store.path / DAMAGED).exists():
            raise DamagedDatabaseError("found when something was saved")
        wrong.append("saving again failed")
    for name in sorted(lost):
        _check_again(store, name, final[name], wrong)
    there = files_below(store.path)
    unknown = sum(size for name, size in there.items() if name.startswith(("blocks/", "sessions/")))
    counts["bytes that are not in the accounts"] += max(unknown - store._disk.index.usage().total, 0)
    return len(names - broken), lost


def _serve(
    store: AttentionStore, name: str, expected: Expected, whole: set[str], wrong: list[str], counts: Counter[str]
) -> bool:
    """Reads a session of a damaged store, block by block. Returns whether anything is missing."""
    ever = expected.ever.get(name, set())
    hurt = False
    parent, position = chain_root(FINGERPRINT, ""), 0
    ids: list[int] = []
    for span in store.manifest(name).spans:
        found = store.describe_block(span.block)
        try:
            if found is None:
                raise LoadError("it can't be described")
            block = make_block(parent, found[1].tolist(), position)
            if block.meta.key != span.block:
                wrong.append(f"session {name} has a wrong block at {position}")
            if not hurt:
                ids += found[1][span.start : span.stop].tolist()
            if not _loads_equal(store, [block], [Piece(span.block, span.start, span.stop)]):
                wrong.append(f"session {name} was loaded wrong at {position}")
            counts["blocks read equal"] += 1
        except LoadError as error:
            counts["blocks refused"] += 1
            hurt = True
            if span.block.hex() in whole:
                wrong.append(f"session {name}: a block at {position} is whole and was refused: {error}")
            if store.has(span.block):
                wrong.append(f"session {name}: a block at {position} was refused and is still offered")
        parent, position = span.block, position + span.stop
    if not any(tuple(ids) == tokens[: len(ids)] for tokens in ever):
        wrong.append(f"session {name} has {len(ids)} tokens that it never had")
    told = tuple(store.tokens(name))
    if not any(told == tokens[: len(told)] for tokens in ever):
        wrong.append(f"session {name} says it has {len(told)} tokens that it never had")
    if int(store.metadata(name).get("mark", 0)) not in expected.ever_marks.get(name, {0}):
        wrong.append(f"session {name} has metadata that it never had")
    return hurt


def _check_again(store: AttentionStore, name: str, tokens: Tokens, wrong: list[str]) -> None:
    """A session that was computed and saved again is there as ever."""
    chain = make_chain(list(tokens), SIZE)
    try:
        found = tuple(store.tokens(name))
        if found != tokens:
            wrong.append(f"session {name} was saved again with {len(tokens)} tokens and has {len(found)}")
        elif chain and not same(chain, load(store, chain)):
            wrong.append(f"session {name} was saved again and is not what it was")
    except LoadError as error:
        wrong.append(f"session {name} was saved again and can't be loaded: {error}")


if __name__ == "__main__":
    serve(*sys.argv[1:])
