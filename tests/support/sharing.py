"""Machines that share sessions: processes with folders and clocks of their own that run turns at random."""

from __future__ import annotations

import random
import signal
import sys
import threading
from pathlib import Path

from hf_attnstore.store import AttentionStore
from hf_attnstore.store.disk.surroundings import Clock, Surroundings
from support import fresh
from support.store_blocks import make_chain, save

SESSIONS = 16
MACHINE = """
import sys
from support.sharing import run_machine
run_machine(*sys.argv[1:])
"""


class Skewed(Clock):
    """A machine whose clock is wrong."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def time(self) -> float:
        return super().time() + self._seconds


def run_machine(folder: str, url: str, seed: str, first: str, count: str) -> None:
    """Turns, each of one token of its own at the end of a session, which is said on a line when others can know."""
    chance = random.Random(int(seed))
    surroundings = Surroundings(clock=Skewed(chance.uniform(-1e6, 1e6)))
    with AttentionStore(folder, block_size=16, shared=url, surroundings=surroundings) as store:
        for turn in range(int(first), int(first) + int(count)):
            number = chance.randrange(SESSIONS)
            name = f"session {number}"
            lock = store.lock_session(name, wait=120)
            manifest = store.latest_manifest(name)
            before = store.tokens(name) if manifest is not None else [number]
            print("begins", turn, flush=True)
            save(store, make_chain([*before, turn], 16), name)
            if chance.random() < 0.2:
                store.set_metadata(name, {"turn": turn})
            lock.release()
            if chance.random() < 0.5:
                store.flush()
                print("is there", turn, flush=True)
        store.flush()
        print("over", flush=True)


class Machine:
    """A process, and what it said."""

    def __init__(self, folder: Path, url: str, seed: int, first: int, count: int) -> None:
        self._process = fresh.Process([sys.executable, "-c", MACHINE, folder, url, seed, first, count])
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # it may have been killed in the middle of it
                self.lines.append(line.strip())

    def said(self, what: str) -> list[int]:
        """The turns of which it said so."""
        return [int(line.rpartition(" ")[2]) for line in self.lines if line.startswith(what)]

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._reader.join()

    def end(self) -> None:
        self._reader.join()
        assert self.lines[-1] == "over"
