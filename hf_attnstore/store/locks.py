"""One turn at a time on a session, across threads and processes. A lock ends with the process that held it."""

import hashlib
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import SessionBusyError
from .disk import make_private_directory


class SessionLock:
    """Held from `acquire` to `release`; not reentrant."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    def release(self) -> None:
        self._lock.release()


class SessionLocks:
    """The lock files of a store's sessions. Their names are digests: a session's name never becomes a path."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "locks"
        make_private_directory(self._folder)

    def acquire(self, namespace: str, session: str, wait: float) -> SessionLock:
        """Takes the lock of a session.

        Args:
            wait: seconds to wait for a turn that is running; 0 to fail at once.

        Raises:
            SessionBusyError: another turn is still running.
        """
        name = hashlib.blake2b(f"{namespace}\0{session}".encode(), digest_size=16).hexdigest()
        lock = FileLock(self._folder / f"{name}.lock", mode=0o600, thread_local=False)
        try:
            lock.acquire(timeout=wait, poll_interval=0.02)
        except Timeout:
            raise SessionBusyError(
                f"session {session!r} is in the middle of another turn; wait for it (`wait=` seconds), "
                "or `store.fork` the session and use the copy"
            ) from None
        return SessionLock(lock)
