"""Blocks by key, wherever they are: found, loaded, and saved behind the caller's back."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..errors import LoadError, NotFiniteError
from ..sizes import format_bytes
from ..timeline import Timeline
from .blocks.block import TOKEN_IDS, Block, BlockMeta, Match, TensorSpec
from .blocks.keys import Key, chain_root, common_prefix, decode_tokens, encode_tokens
from .disk.block_files import BlockFile
from .index.rows import BlockRow
from .opened import OpenStore

if TYPE_CHECKING:
    from .transfer.load import Load
    from .transfer.stages import Source, Stage

logger = logging.getLogger("hf_attnstore")


class BlockStore(OpenStore):
    """The part of an `AttentionStore` that deals in blocks."""

    # finding blocks

    def root(self, fingerprint: str) -> Key:
        """The parent of every first block of a model, in this namespace."""
        return chain_root(fingerprint, self.namespace, secret=self.secret)

    def has(self, key: Key) -> bool:
        """Whether a block is in some tier."""
        return bool(self.known([key]))

    def known(self, keys: Sequence[Key]) -> int:
        """How many of these blocks, from the first on, are in some tier."""
        self._check_open()
        elsewhere = [key for key in keys if self._memory.get(key) is None]
        missing = set(elsewhere) - self._disk.has(elsewhere)
        return next((place for place, key in enumerate(keys) if key in missing), len(keys))

    def tier_of(self, key: Key) -> str:
        """The tier that a block, which is somewhere, would be loaded from."""
        return "memory" if self._memory.get(key) is not None else "disk"

    def nearest(self, parent: Key, ids: Sequence[int]) -> Match | None:
        """The block after `parent` that shares the longest beginning with `ids`; None if none shares a token."""
        self._check_open()
        tokens = encode_tokens(ids)
        best: Match | None = None
        for block in self._memory.followers(parent):
            common = common_prefix(block.meta.tokens, tokens)
            if common > (best.common if best else 0):
                best = Match(block.meta.key, common, block.meta.token_count)
        found = self._disk.nearest(parent, tokens, best.common if best else 0)
        return Match(*found) if found is not None else best

    def follower(self, parent: Key) -> Key | None:
        """A block after `parent`, whichever; None if there is none."""
        block = next(self._memory.followers(parent), None)
        return block.meta.key if block is not None else self._disk.follower(parent, self.block_size)

    def describe(self, key: Key) -> Mapping[str, TensorSpec]:
        """Name, dtype and shape of a block's tensors. Raises what `describe_checkpoint` does."""
        return self.describe_checkpoint(key)[0]

    def describe_checkpoint(self, key: Key) -> tuple[Mapping[str, TensorSpec], str | None]:
        """Name, dtype and shape of a block's tensors, and the JSON that goes with running states.

        Raises:
            LoadError: it is not there, or damaged (it is then in quarantine).
        """
        _, source = self._open(key)
        if isinstance(source, Block):
            return source.specs(), source.meta.state
        with source:
            specs = {name: t.spec for name, t in source.layout.tensors.items() if name != TOKEN_IDS}
            return specs, source.layout.meta.state

    def latest_checkpoint(self, parents: Sequence[Key], ids: Sequence[np.ndarray]) -> tuple[int, Key, int] | None:
        """The checkpoint that sums up most of a text.

        Args:
            parents: the `state_root` of each block of the text, in order.
            ids: the ids of each block of the text, as far as the checkpoint may go.

        Returns:
            The number of its block, its key, and how many of that block's tokens it includes.
        """
        self._check_open()
        there = self._disk.followed(parents)
        for number in range(len(parents) - 1, -1, -1):
            parent = parents[number]
            tokens = encode_tokens(ids[number])
            best: tuple[Key, int] | None = None
            for block in self._memory.followers(parent):
                count = block.meta.token_count
                if tokens.startswith(block.meta.tokens) and count > (best[1] if best else 0):
                    best = block.meta.key, count
            if parent in there:
                found = self._disk.longest_beginning(parent, tokens)
                if found is not None and found[1] > (best[1] if best else 0):
                    best = found
            if best is not None:
                return number, *best
        return None

    def _open(self, key: Key, row: BlockRow | None = None) -> tuple[str, Source]:
        self._check_open()
        block = self._memory.get(key)
        if block is not None:
            return "memory", block
        try:
            return "disk", self._disk.open(key, row)
        except LoadError as error:
            self._reject(key, error)
            raise

    def load(self, stages: Sequence[Stage]) -> Load:
        """Opens the blocks of all stages and returns a load, of which nothing is requested yet.

        Raises:
            LoadError: a block is missing or damaged.
        """
        from .transfer.load import Load  # here, as who only looks after a store needs no torch

        self._check_open()
        sources: dict[Key, tuple[str, Source]] = {}
        keys = list(dict.fromkeys(key for stage in stages for key in stage.needs()))
        rows = self._disk.rows([key for key in keys if self._memory.get(key) is None])
        try:
            for key in keys:
                sources[key] = self._open(key, rows.get(key))
        except BaseException:
            for _, source in sources.values():
                if not isinstance(source, Block):
                    source.close()
            raise
        self._memory.touch(list(sources))
        return Load(self._readers, stages, sources, self._reject)

    def _reject(self, key: Key, error: LoadError) -> None:
        """A block on disk could not be used."""
        if not error.transient:
            self._memory.discard(key)
        self._disk.failed(key, error)

    # saving blocks

    def begin_computing(self, owner: object) -> None:
        """`owner` (hashable) computes on the CPU from now on: writing stands back, for a few seconds at most."""
        self._right_of_way.take(owner)

    def end_computing(self, owner: object) -> None:
        """Ends what `begin_computing` began. Harmless if nothing did."""
        self._right_of_way.give(owner)

    def reserve(self, nbytes: int, *, wait: bool = False) -> bool:
        """Reserves host memory for a block that is being filled; False where the cap leaves no room for it.

        Args:
            wait: for what is being written to make room, and say so where that is not enough.
        """
        if self._automatic is not None:
            self._automatic.before_reserving()
        if self._memory.reserve(nbytes):
            return True
        self._right_of_way.overrule()  # what waits to be written is what fills the memory
        if not wait:
            return False
        if self._memory.reserve(nbytes, wait=True):
            return True
        self._accounts.count("not_saved_blocks")
        if self._memory.capacity or self.disk_capacity:  # else nobody asked for blocks to be kept
            self._accounts.warn_once(
                "room",
                f"the memory of the store {self.path} (cap {format_bytes(self._memory.capacity)}) has no room for a "
                "block that a turn has made, the session is not saved: give it more with memory=",
            )
        return False

    def release(self, nbytes: int) -> None:
        """Gives back what `reserve` took, for a block that will not be handed over."""
        self._memory.release(nbytes)

    def put(self, block: Block, supersedes: Key | None = None) -> None:
        """Takes over a complete block, whose bytes were reserved, and writes it behind the caller's back.

        Args:
            supersedes: a short block whose tokens this one begins with; it is dropped when this one is on disk.
        """
        self._check_open()
        if not self._memory.insert(block, dirty=True):
            held = self._memory.get(block.meta.key)
            if held is not None:  # what is about to be written may take its place: then it is to be written again
                self._writer.submit(partial(self._write, held, supersedes))
            return
        self._accounts.over("room")
        self._accounts.count_all({"saved_blocks": 1, "saved_bytes": block.nbytes})
        self._writer.submit(partial(self._write, block, supersedes))

    def keep_in_memory(self, block: Block) -> None:
        """Takes over a complete block, whose bytes were reserved, that is on disk already."""
        self._memory.insert(block, dirty=False)

    def touch(self, keys: Sequence[Key]) -> None:
        """Marks blocks as just used."""
        self._check_open()
        self._memory.touch(list(keys))
        self._writer.submit(partial(self._guarded, partial(self._touch_on_disk, list(keys))))

    def _touch_on_disk(self, keys: Sequence[Key]) -> None:
        policy, now = self._order.policy, self._clock.time()
        rows = self._disk.rows(keys)
        self._disk.move({key: policy.place(row.place, row.group, now) for key, row in rows.items()})

    def promote(self, keys: Sequence[Key]) -> None:
        """Copies blocks from disk into free or reclaimable memory, in the background and in order. What upcoming turns
        need is not evicted for them."""
        self._check_open()
        for key in keys:
            self._writer.submit(partial(self._promote_one, key))

    def _promote_one(self, key: Key) -> None:
        self._promote(key, job=sys.maxsize)

    def stop_recording(self, timeline: Timeline) -> None:
        """Takes a timeline out of `recorders` when everything that was handed over so far is on disk."""
        self._writer.submit(partial(self.recorders.leave_out, timeline))

    def _write(self, block: Block, supersedes: Key | None) -> None:
        began = time.perf_counter()
        try:
            written = self._write_after_its_beginning(block, supersedes)
        except NotFiniteError as error:  # it came from an accelerator: nobody could look at it before
            self._memory.discard(block.meta.key)
            self._accounts.count("not_saved_blocks")
            self._accounts.warn_once("not finite", f"not kept: {error}")
        except Exception as error:
            self._accounts.count("write_errors")
            self._accounts.warn_once(
                "write", f"saving to {self.path} failed, conversations are not kept for now: {error}"
            )
        else:
            if written:
                self._accounts.over("write")
                if supersedes is not None and not self._disk.has([supersedes]):
                    self._memory.discard(supersedes)
            else:
                self._accounts.count("not_saved_blocks")
        finally:
            self.recorders.add("write", _described(block.meta), began)
            self._memory.mark_clean(block.meta.key)

    def _write_after_its_beginning(self, block: Block, supersedes: Key | None) -> bool:
        """Writes a block, and before it those that it follows, where these did not get to the disk when they should
        have and are still in memory."""
        beginning: list[Block] = []
        before = self._memory.get(block.meta.predecessor) if self.disk_capacity else None
        while before is not None and not self._disk.has([before.meta.key]):
            beginning.append(before)
            before = self._memory.get(before.meta.predecessor)
        for missing in reversed(beginning):
            if not self._disk.write(missing, None):
                return False
        return self._disk.write(block, supersedes)

    def _promote(self, key: Key, job: int | None = None) -> int | None:
        """Copies a block from disk into memory, if that makes room for it, for the upcoming turn `job` if any.

        Returns:
            The bytes copied; None where there is no room.
        """
        import torch

        from .transfer.devices import host_tensors

        began = time.perf_counter()
        try:
            if self._memory.get(key) is not None or not self._disk.has([key]):
                return 0
            with self._disk.open(key) as file:
                meta = file.read_meta()
                stored = {name: t for name, t in file.layout.tensors.items() if name != TOKEN_IDS}
                size = sum(t.spec.nbytes for t in stored.values())
                if self._automatic is not None:
                    self._automatic.before_reserving()
                if not self._memory.reserve(size, job=job) and not self._reserve_once_written(size, job):
                    return None
                try:
                    block = Block(meta, host_tensors(file, stored, BlockFile.read, pinned=torch.cuda.is_available()))
                    block.check_finite()
                except BaseException:
                    self._memory.release(size)
                    raise
            self.recorders.add("fetch", _described(meta), began)
            return size if self._memory.insert(block, dirty=False) else 0
        except LoadError as error:
            self._reject(key, error)
        except Exception as error:
            logger.debug("promoting block %s failed: %r", key.hex(), error)
        return 0

    def _reserve_once_written(self, nbytes: int, job: int | None) -> bool:
        """Room for an upcoming turn's block, where what waits to be written takes it: that then is written at once.
        While turns follow one another there is always somebody computing, and memory would fill up with it."""
        if job is None or job == sys.maxsize or not self._memory.dirty:
            return False
        self._writer.drain()
        return self._memory.reserve(nbytes, job=job)

    def describe_block(self, key: Key, fingerprint: str = "") -> tuple[int, np.ndarray] | None:
        """The position for which a block's first keys were made, and its ids `[tokens]`.

        Returns:
            None if it is in no tier, can't be read, or is of another model than that of `fingerprint`.
        """
        self._check_open()
        held = self._memory.get(key)
        if held is None:
            found = self._disk.describe(key, fingerprint)
        else:
            found = (held.meta.start, held.meta.tokens) if fingerprint in ("", held.meta.fingerprint) else None
        return (found[0], decode_tokens(found[1])) if found is not None else None


def _described(meta: BlockMeta) -> str:
    """What a block is, for a timeline."""
    return f"tokens {meta.start:,}–{meta.stop:,}" if meta.state is None else f"states at {meta.stop:,}"
