"""Looking after what machines share: what is there, and what of it nobody needs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ...errors import LoadError, SharedTierError
from ..blocks.keys import Key
from ..disk.rebuild import Progress
from ..records.manifest import SessionInfo
from ..records.session_record import SessionRecord, decode_record
from .deadline import Deadline
from .engine import EngineError
from .leases import Head, body_of
from .sessions import GONE
from .tier import SharedTier

_SECONDS = 60.0
_AT_ONCE = 256
_REMEMBERED = 30 * 86_400
"""Seconds for which it is kept that a session was deleted: machines that were away so long may bring it back."""


@dataclass
class Listed:
    """A session of a shared tier."""

    namespace: str
    info: SessionInfo
    there: int
    """How many of its blocks are there."""
    blocks: int
    held: bool
    """Whether a machine has it: for a turn, or until what that made is there."""


@dataclass
class Unneeded:
    """What is in a shared tier that nobody needs."""

    blocks: list[str]
    """Values of blocks that belong to no session."""
    nbytes: int
    entries: list[tuple[str, bytes]]
    """Entries of what follows blocks, that name blocks which are gone."""
    gone: list[str]
    """Records of sessions that were deleted long ago."""


class Upkeep:
    """Everything under the prefix of a tier. All methods raise `SharedTierError` where the engine does not answer."""

    def __init__(self, tier: SharedTier) -> None:
        self._tier, self._engine = tier, tier.engine

    def stats(self) -> dict[str, int | str]:
        """What the engine is and has room for, and what is there under the prefix: blocks, bytes, sessions."""
        with self._asking():
            about = self._engine.about(Deadline(_SECONDS))
            sizes = self._sizes(self._names("b"))
            heads = [(Head.of(value), body_of(value)) for _, value in self._records()]
        return {
            "engine": about.what,
            "engine_used": about.used,
            "engine_capacity": about.capacity,
            "blocks": len(sizes),
            "bytes": sum(sizes.values()),
            "sessions": sum(bool(body) and not body.startswith(GONE) for _, body in heads),
            "held_sessions": sum(any(head.holder) for head, _ in heads),
        }

    def sessions(self) -> list[Listed]:
        """All sessions that this store's key can read, last used first."""
        found = []
        with self._asking():
            for _, value in self._records():
                record = self._read(body_of(value))
                if record is not None:
                    found.append(self._listed(record, Head.of(value)))
        return sorted(found, key=lambda each: each.info.last_used, reverse=True)

    def _listed(self, record: SessionRecord, head: Head) -> Listed:
        spans = record.manifest.spans
        names = {span.block: self._tier.value(span.block) for span in spans if span.block}
        sizes = self._sizes(list(names.values()))
        there = sum(span.stop - span.start for span in spans if sizes.get(names.get(span.block, "")))
        info = SessionInfo(
            record.name, there, sum(sizes.values()), record.created, record.last_used, record.fingerprint,
            record.manifest.length,
        )  # fmt: skip
        return Listed(record.namespace, info, len(sizes), len(names), any(head.holder))

    def unneeded(self, *, unowned: bool, progress: Progress) -> Unneeded:
        """What nobody needs.

        Args:
            unowned: also blocks that belong to no session.

        Raises:
            SharedTierError: there are sessions of another key, whose blocks can't be told.
        """
        found = Unneeded([], 0, [], [])
        with self._asking():
            values = self._names("b")
            owned, unread = self._owned(found.gone)
            if unowned and unread:
                raise SharedTierError(
                    f"{unread} sessions of this prefix can't be read with this store's key, so nobody knows which "
                    "blocks are theirs; nothing was removed"
                )
            if unowned:
                sizes = self._sizes([name for name in values if name not in owned])
                found.blocks, found.nbytes = list(sizes), sum(sizes.values())
            there = set(values).difference(found.blocks)
            parents = self._names("f")
            for number in range(0, len(parents), _AT_ONCE):
                progress("shared entries", number, len(parents))
                some = parents[number : number + _AT_ONCE]
                noted = self._engine.noted(some, Deadline(_SECONDS))
                for name, entries in zip(some, noted, strict=True):
                    found.entries += [(name, key) for key in entries if self._tier.value(key) not in there]
        return found

    def _owned(self, gone: list[str]) -> tuple[set[str], int]:
        """The values of all blocks that sessions have, and how many sessions can't be read."""
        owned: set[Key] = set()
        unread = 0
        for name, value in self._records():
            body = body_of(value)
            if body.startswith(GONE):
                if time.time() - int(body[len(GONE) :] or 0) > _REMEMBERED and not any(Head.of(value).holder):
                    gone.append(name)
                continue
            record = self._read(body)
            if record is not None:
                owned.update(record.owned, record.manifest.beside, (s.block for s in record.manifest.spans if s.block))
            elif body:
                unread += 1
        return {self._tier.value(key) for key in owned}, unread

    def remove(self, found: Unneeded) -> None:
        """Removes what `unneeded` has found."""
        with self._asking():
            for number in range(0, len(found.blocks), _AT_ONCE):
                self._engine.delete(found.blocks[number : number + _AT_ONCE], Deadline(_SECONDS))
            for name, key in found.entries:
                self._engine.drop_note(name, key, Deadline(_SECONDS))
            lists = self._names("n") if found.gone else []
            for name in found.gone:
                for listed in lists:
                    self._engine.drop_note(listed, bytes.fromhex(name.rpartition(":")[2]), Deadline(_SECONDS))
            self._engine.delete(found.gone, Deadline(_SECONDS))

    # reading

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            with self._tier.asking():
                yield
        except EngineError as error:
            raise SharedTierError(str(error.strerror)) from error

    def _names(self, kind: str) -> list[str]:
        return self._engine.names(f"{self._tier.prefix}:{kind}:", Deadline(_SECONDS))

    def _sizes(self, names: Sequence[str]) -> dict[str, int]:
        """Of those that are there."""
        sizes: list[int] = []
        for number in range(0, len(names), _AT_ONCE):
            sizes += self._engine.sizes(names[number : number + _AT_ONCE], Deadline(_SECONDS))
        return {name: size for name, size in zip(names, sizes, strict=True) if size}

    def _records(self) -> Iterator[tuple[str, bytes]]:
        for name in self._names("s"):
            yield name, self._engine.value(name, Deadline(_SECONDS))

    def _read(self, body: bytes) -> SessionRecord | None:
        """A session's record; None of one that is deleted, or can't be read."""
        try:
            return decode_record(body, self._tier.vault) if body and not body.startswith(GONE) else None
        except LoadError:
            return None
