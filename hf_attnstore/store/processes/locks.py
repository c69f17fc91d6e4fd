"""Who may do what at the same time, across threads and processes. Locks end with the process that held them."""

import contextlib
import fcntl
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import SessionBusyError, StoreFormatError, StoreIOError
from ..blocks.keys import name_digest
from .forking import let_go, watch
from .parts import whole_name

logger = logging.getLogger("hf_attnstore")

_OPEN_SECONDS = 30.0
_WRITE_SECONDS = 60.0
DRAIN_SECONDS = 20.0
_POLL_SECONDS = 0.01
_NAME_DIGITS = 32


def this_machine() -> str:
    """Tells machines apart, and a machine from itself after it was started again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


class StoreLock:
    """Held by everybody who has the store open; shared, but for who must be alone."""

    def __init__(self, path: Path, machine: str | None = None) -> None:
        """Takes the lock.

        Raises:
            StoreFormatError: the store is open on another machine.
            StoreIOError: somebody else is alone with it, and does not end.
        """
        machine = machine or this_machine()
        # a lock that is asked for more is let go of first: only who holds the gate asks
        self._gate = FileLock(path.with_name("gate.lock"), mode=0o600, thread_local=False)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._open(path, machine)
        except BaseException:
            os.close(self._fd)
            raise
        watch(self)

    def after_fork_in_child(self) -> None:
        let_go(self._gate)
        self.release()  # the parent has it until its own descriptor is closed

    def _open(self, path: Path, machine: str) -> None:
        deadline = time.monotonic() + _OPEN_SECONDS
        while True:
            with self._at_the_gate():
                if self._try(fcntl.LOCK_EX):
                    os.ftruncate(self._fd, 0)
                    os.pwrite(self._fd, machine.encode(), 0)
                    fcntl.flock(self._fd, fcntl.LOCK_SH)
                    return
                if self._try(fcntl.LOCK_SH):
                    break
            if time.monotonic() > deadline:
                raise StoreIOError(f"the store {path.parent.parent} is being repaired; try again later")
            time.sleep(_POLL_SECONDS)
        there = os.pread(self._fd, 256, 0).decode(errors="replace")
        if there and there != machine:
            raise StoreFormatError(
                f"the store {path.parent.parent} is open on another machine ({there}): one machine at a time can "
                "use a store; give each its own folder"
            )

    @contextlib.contextmanager
    def _at_the_gate(self) -> Iterator[None]:
        try:
            self._gate.acquire(timeout=_OPEN_SECONDS, poll_interval=0.002)
        except Timeout:
            raise StoreIOError(f"another process holds {self._gate.lock_file} and does not let go of it") from None
        try:
            yield
        finally:
            self._gate.release()

    def _try(self, how: int) -> bool:
        try:
            fcntl.flock(self._fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[bool]:
        """For as long as this is held nobody else has the store open, nor opens it; yields False where others do."""
        with self._at_the_gate():
            alone = self._try(fcntl.LOCK_EX)
            if not alone:
                fcntl.flock(self._fd, fcntl.LOCK_SH)
        try:
            yield alone
        finally:
            if alone:
                with self._at_the_gate():
                    fcntl.flock(self._fd, fcntl.LOCK_SH)

    def release(self) -> None:
        """Harmless when repeated."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class WriteLock:
    """Held by whoever changes what is on disk: the bytes there are then those of the accounts. Reentrant."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = threading.RLock()
        self._lock = FileLock(path, mode=0o600, thread_local=False)
        watch(self)

    def after_fork_in_child(self) -> None:
        let_go(self._lock)
        self._threads = threading.RLock()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Waits for the lock.

        Raises:
            OSError: it can't be had; a process that holds it for a minute is taken to hang.
        """
        with self._threads:
            try:
                self._lock.acquire(timeout=_WRITE_SECONDS, poll_interval=0.002)
            except Timeout:
                raise StoreIOError(f"another process holds {self._path} and does not let go of it") from None
            try:
                yield
            finally:
                self._lock.release()


@dataclass
class _Held:
    lock: FileLock | None
    busy: bool = True
    """Whether a turn runs."""
    commits: int = 0
    """Of earlier turns, on their way to the disk."""


class SessionLock:
    """One turn's hold on a session, from `acquire` to `release`, or until it is dropped."""

    def __init__(self, locks: "SessionLocks", name: str) -> None:
        self._locks = locks
        self._name = name
        self._released = False
        self.then: Callable[[], None] = lambda: None
        """Called when the turn is over."""

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._locks._end(self._name, turn=True)
            self.then()

    __del__ = release


class SessionLocks:
    """One turn at a time on a session.

    Between processes a session is held until what its turns saved is on disk, so that the next sees it and nothing
    late overwrites what that one does; within the process the next turn may begin before. The names of lock files
    are digests: a session's name never becomes a path.
    """

    def __init__(self, folder: Path, secret: bytes = b"") -> None:
        self._folder = folder
        self._secret = secret
        self._changed = threading.Condition()
        self._sessions: dict[str, _Held] = {}
        self._warned = False
        watch(self)

    def after_fork_in_child(self) -> None:
        for held in self._sessions.values():
            if held.lock is not None:
                let_go(held.lock)
        self._changed, self._sessions = threading.Condition(), {}

    def _name(self, namespace: str, session: str) -> str:
        return name_digest("lock", namespace, session, secret=self._secret).hex()[:_NAME_DIGITS]

    def acquire(self, namespace: str, session: str, wait: float) -> SessionLock:
        """Takes the lock of a session.

        Args:
            wait: seconds to wait for a turn that is running; 0 to fail at once.

        Raises:
            SessionBusyError: another turn is still running.
        """
        name = self._name(namespace, session)
        deadline = time.monotonic() + wait
        with self._changed:
            while name in self._sessions and self._sessions[name].busy:
                if not self._changed.wait(max(deadline - time.monotonic(), 0)):
                    raise self._busy(session)
            if name in self._sessions:
                self._sessions[name].busy = True
                return SessionLock(self, name)
            held = self._sessions[name] = _Held(None)
        try:
            held.lock = self._between_processes(name, session, deadline)
        except BaseException:
            with self._changed:
                del self._sessions[name]
                self._changed.notify_all()
            raise
        return SessionLock(self, name)

    def _between_processes(self, name: str, session: str, deadline: float) -> FileLock | None:
        lock = FileLock(self._folder / f"{name}.lock", mode=0o600, thread_local=False)
        patience = time.monotonic() + DRAIN_SECONDS
        was_draining = True
        while True:
            try:
                lock.acquire(timeout=max(deadline - time.monotonic(), 0), poll_interval=0.02)
            except Timeout:
                # the turn may be over and only its KV still be written: that is no reason to fail. It may have become
                # free after this attempt and before the look, so a look that sees nothing is followed by one attempt
                draining = self._draining(name).exists()
                if time.monotonic() > patience or not (draining or was_draining):
                    raise self._busy(session) from None
                was_draining = draining
                time.sleep(_POLL_SECONDS)
                continue
            except OSError as error:
                if not self._warned:
                    self._warned = True
                    logger.warning("sessions can't be locked against other processes for now: %s", error)
                return None
            self._warned = False
            self._draining(name).unlink(missing_ok=True)
            return lock

    def _draining(self, name: str) -> Path:
        return self._folder / f"{name}.draining"

    @staticmethod
    def _busy(session: str) -> SessionBusyError:
        return SessionBusyError(
            f"session {whole_name(session)!r} is in the middle of another turn; wait for it (`wait=` seconds), "
            "or `store.fork` the session and use the copy"
        )

    def keep(self, namespace: str, session: str) -> "Commit | None":
        """Holds on to a session, which a turn holds, until what the turn saved is on disk."""
        name = self._name(namespace, session)
        with self._changed:
            held = self._sessions.get(name)
            if held is None:
                return None
            held.commits += 1
        return Commit(self, name)

    def _end(self, name: str, *, turn: bool) -> None:
        with self._changed:
            held = self._sessions.get(name)
            if held is None:
                return
            if turn:
                held.busy = False
                self._changed.notify_all()
            else:
                held.commits -= 1
            if held.busy:
                return
            if held.commits == 0:
                del self._sessions[name]
                if held.lock is not None:
                    with contextlib.suppress(OSError):
                        self._draining(name).unlink(missing_ok=True)
                    held.lock.release()
            elif turn and held.lock is not None:
                with contextlib.suppress(OSError):
                    self._draining(name).touch(mode=0o600)

    def remove_unused(self) -> int:
        """Deletes the lock files of sessions, for who is alone with the store. Returns their number."""
        found = [*self._folder.glob("*.lock"), *self._folder.glob("*.draining")]
        found = [path for path in found if len(path.stem) == _NAME_DIGITS and path.stem not in self._sessions]
        for path in found:
            path.unlink(missing_ok=True)
        return len(found)


class Commit:
    """What `SessionLocks.keep` returns: a commit that is on its way."""

    def __init__(self, locks: SessionLocks, name: str) -> None:
        self._locks = locks
        self._name = name

    def done(self) -> None:
        self._locks._end(self._name, turn=False)
