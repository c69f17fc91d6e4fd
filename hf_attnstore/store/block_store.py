"""Blocks by key, wherever they are: found, loaded, and saved behind the caller's back."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import LoadError, NotFiniteError
from ..lazy import np
from ..sizes import format_bytes
from ..timeline import Timeline
from .blocks.block import Block, BlockMeta, Match, TensorSpec
from .blocks.codecs import CodedBlock, as_kept, as_kept_already, as_written, written_by
from .blocks.keys import Key, block_key, chain_root, decode_tokens, encode_tokens, window_key, window_root
from .blocks.stored import StoredBlock
from .blocks.tier import Source, Tier
from .index.counts import CODED
from .opened import OpenStore

if TYPE_CHECKING:
    import torch

    from .transfer.load import Load
    from .transfer.stages import Stage

logger = logging.getLogger("hf_attnstore")


class BlockStore(OpenStore):
    """The part of an `AttentionStore` that deals in blocks."""

    # finding blocks

    def root(self, fingerprint: str) -> Key:
        """The parent of every first block of a model, in this namespace and codec."""
        return chain_root(fingerprint, self.namespace, self.codec, self.secret)

    def has(self, key: Key) -> bool:
        """Whether a block is in some tier of this store's own: what only a shared one has is kept here, too, where it
        is computed."""
        self._check_open()
        return any(tier.find([key]) for tier in self._tiers if not tier.shared)

    def known(self, keys: Sequence[Key]) -> int:
        """How many of these blocks, from the first on, are in some tier."""
        self._check_open()
        missing = list(keys)
        for tier in self._tiers:
            there = tier.find(missing)
            missing = [key for key in missing if key not in there]
            if not missing:
                return len(keys)
        return list(keys).index(missing[0])

    def there(self, keys: Sequence[Key]) -> set[Key]:
        """Which of these blocks are in some tier."""
        self._check_open()
        found: set[Key] = set()
        for tier in self._tiers:
            found |= tier.find([key for key in keys if key not in found])
        return found

    def tier_of(self, key: Key) -> str:
        """The tier that a block, which is somewhere, would be loaded from."""
        *others, last = self._tiers
        return next((tier.name for tier in others if tier.find([key])), last.name)

    def nearest(self, parent: Key, ids: Sequence[int], *, resident: bool = False) -> Match | None:
        """The block after `parent` that shares the longest beginning with `ids`; None if none shares a token.

        Args:
            resident: only what is in memory is asked for, so that nothing is waited for.
        """
        self._check_open()
        tokens = encode_tokens(ids)
        best: Match | None = None
        for tier in self._tiers[:1] if resident else self._tiers:
            best = tier.nearest(parent, tokens, best.common if best else 0) or best
            if best is not None and best.common == len(ids):
                break  # no other can share more
        return best

    def follower(self, parent: Key) -> Key | None:
        """A block after `parent`, whichever; None if there is none."""
        found = (tier.follower(parent, self.block_size) for tier in self._tiers)
        return next((key for key in found if key is not None), None)

    def describe(self, key: Key) -> Mapping[str, TensorSpec]:
        """Name, dtype and shape of a block's tensors. Raises what `describe_checkpoint` does."""
        return self.describe_checkpoint(key)[0]

    def describe_checkpoint(self, key: Key) -> tuple[Mapping[str, TensorSpec], str | None]:
        """Name, dtype and shape of a block's tensors, and the JSON that goes with running states.

        Raises:
            LoadError: it is not there, or damaged (it is then in quarantine).
        """
        _, source = self._open([key])[key]
        if isinstance(source, Block):
            return source.specs(), source.meta.state
        with source:
            return source.specs(), source.layout.meta.state

    def latest_checkpoint(self, parents: Sequence[Key], ids: Sequence[np.ndarray]) -> tuple[int, Key, int] | None:
        """The checkpoint that sums up most of a text.

        Args:
            parents: the `state_root` of each block of the text, in order.
            ids: the ids of each block of the text, as far as the checkpoint may go.

        Returns:
            The number of its block, its key, and how many of that block's tokens it includes.
        """
        self._check_open()
        there = [(tier, tier.followed(parents)) for tier in self._tiers]
        for number in range(len(parents) - 1, -1, -1):
            parent, tokens = parents[number], encode_tokens(ids[number])
            found = [tier.longest_beginning(parent, tokens) for tier, followed in there if parent in followed]
            best = max((one for one in found if one is not None), key=lambda one: one[1], default=None)
            if best is not None:
                return number, *best
        return None

    def describe_block(self, key: Key, fingerprint: str = "") -> tuple[int, np.ndarray] | None:
        """The position for which a block's first keys were made, and its ids `[tokens]`.

        Returns:
            None if it is in no tier, can't be read, or is of another model than that of `fingerprint`.
        """
        self._check_open()
        for tier in self._tiers:
            found = tier.describe(key, fingerprint)
            if found is not None:
                return found[0], decode_tokens(found[1])
        return None

    # loading blocks

    def _open(self, keys: Sequence[Key]) -> dict[Key, tuple[str, Source]]:
        """Opens blocks, each in the first tier that has it.

        Raises:
            LoadError: one is missing or damaged; none is left open.
        """
        self._check_open()
        found: dict[Key, tuple[str, Source]] = {}
        left = list(keys)
        try:
            for tier in self._tiers:
                for key, opens in tier.sources(left).items():
                    try:
                        found[key] = tier.name, self._as_kept(opens())
                    except LoadError as error:
                        self._reject(key, error, tier.name)
                        raise
                left = [key for key in left if key not in found]
                if not left:
                    return found
            raise LoadError(f"block {left[0].hex()} is not in the store any more")
        except BaseException:
            for _, source in found.values():
                if not isinstance(source, Block):
                    source.close()
            raise

    def _as_kept(self, source: Source) -> Source:
        """What a lossy codec makes of a block in memory that it has not come to yet; else the source itself.

        Raises:
            LoadError: the codec is not known here, or there is NaN or infinity in it.
        """
        if isinstance(source, StoredBlock):
            return source
        kept = self._counted(as_kept, source)
        if kept is not source:
            self._memory.replace(source, kept)
        return kept

    def _counted(self, code: Callable[[Block], Block], block: Block) -> Block:
        """What `code` makes of a block, in the numbers of its codec and of all."""
        began = time.perf_counter()
        made = code(block)
        if made is not block:
            spent = round((time.perf_counter() - began) * 1e6)
            counts = dict(zip(CODED, (block.nbytes, made.nbytes, spent), strict=True))
            by = made.by if isinstance(made, CodedBlock) else made.meta.codec
            self._accounts.count_all(counts | {f"{by}_{name}": count for name, count in counts.items()})
        return made

    def load(self, stages: Sequence[Stage], patience: Callable[[], float | None] | None = None) -> Load:
        """Opens the blocks of all stages and returns a load, of which nothing is requested yet.

        Args:
            patience: tells for how many seconds an engine may be waited, all told: what computing would take. Not asked
                where none has to be waited for.

        Raises:
            LoadError: a block is missing or damaged.
        """
        from .transfer.load import Load  # here, as who only looks after a store needs no torch

        apart = {(id(stage.pieces), stage.checkpoint): stage for stage in stages}  # most stages have the same pieces
        keys = list(dict.fromkeys(key for stage in apart.values() for key in stage.needs()))
        found = self._open(keys)
        names = {key: name for key, (name, _) in found.items()}
        afar = {tier.name for tier in self._lower if tier.shared}
        awaited = [source for name, source in found.values() if name in afar and isinstance(source, StoredBlock)]
        seconds = patience() if patience is not None and awaited else None
        if seconds is not None:
            for source in awaited:
                source.wait_at_most(seconds)
        if all(stage.in_host_memory for stage in stages):
            self._bring_whole(found)
        self._memory.touch(keys)
        further = {tier.name for tier in self._lower[1:]}
        # before what follows them is written
        self.promote([key for key in keys if names[key] in further and isinstance(found[key][1], StoredBlock)])
        return Load(
            self._readers,
            stages,
            {key: found[key] for key in keys},
            lambda key, error: self._reject(key, error, names[key]),
        )

    def _bring_whole(self, found: dict[Key, tuple[str, Source]]) -> None:
        """Brings blocks whole into memory, and from there to disk, as far as memory has room for them.

        Args:
            found: blocks that were opened, with their tiers; those that are in memory then take their places.

        Raises:
            LoadError: one can't be read, or is damaged; all are closed.
        """
        eager = {tier.name for tier in self._lower if tier.whole}
        bring: list[tuple[Key, StoredBlock, int]] = []
        for key, (name, source) in found.items():
            if name in eager and isinstance(source, StoredBlock):
                size = source.kept_bytes
                if not self.reserve(size):
                    break  # the rest comes layer by layer
                bring.append((key, source, size))
        for _, source, _ in bring:
            source.will_need(source.specs())
        while bring:
            key, source, size = bring[0]
            name = found[key][0]
            try:
                block = source.as_kept()
                block.check_finite()
            except BaseException as error:
                self._memory.release(sum(size for _, _, size in bring))
                for _, other in found.values():
                    if isinstance(other, StoredBlock):
                        other.close()
                if isinstance(error, LoadError):
                    self._reject(key, error, name)
                raise
            source.close()
            found[key] = name, block
            del bring[0]
            if self._memory.put(block):
                self._writer.submit(partial(self._write, block, None))

    def resident(self, key: Key) -> Block | None:
        """A block that is in memory as it is to be used; None where it is not, or is coded there."""
        self._check_open()
        block = self._memory.get(key)
        return block if block is not None and type(block) is Block and as_kept_already(block) else None

    def bring(self, keys: Sequence[Key]) -> Iterator[Block]:
        """Blocks as they are to be used, one after the other, in host memory: in that tier, where it has room. May take
        as long as disks and networks do.

        Raises:
            LoadError: one is missing or damaged.
        """
        for key in keys:
            block = self.resident(key)
            if block is None:
                self._promote_one(key)
                block = self.resident(key)
            yield block if block is not None else self._read_whole(key)

    def _read_whole(self, key: Key) -> Block:
        """A block that memory has no room for, or has coded."""
        name, source = self._open([key])[key]
        try:
            if not isinstance(source, StoredBlock):
                return Block(source.meta, source.fetch(source.specs())) if isinstance(source, CodedBlock) else source
            with source:
                return Block(source.read_meta(), source.fetch(source.specs()))
        except LoadError as error:
            self._reject(key, error, name)
            raise

    def _local_source(self, key: Key) -> Source | None:
        """Where a block is in memory or on disk; None if it is in neither."""
        for tier in (self._memory, self._disk):
            opens = tier.sources([key]).get(key)
            if opens is not None:
                return opens()
        return None

    def read(self, keys: Sequence[Key]) -> dict[Key, Mapping[str, torch.Tensor]]:
        """The tensors of small blocks, all of them and at once, which nobody may write to. Those that are in no tier,
        or can't be read, are left out."""
        self._check_open()
        found: dict[Key, Mapping[str, torch.Tensor]] = {}
        from_below: list[Key] = []
        for tier in self._tiers:
            left = [key for key in keys if key not in found]
            there = tier.find(left)
            for key, opens in tier.sources([key for key in left if key in there]).items():
                try:
                    source = self._as_kept(opens())
                    if isinstance(source, Block):
                        source.wait_ready()
                        found[key] = source.tensors
                        continue
                    with source:
                        block = source.as_kept()
                    found[key] = block.fetch(block.specs()) if isinstance(block, CodedBlock) else block.tensors
                    if tier.shared:
                        from_below.append(key)
                    elif self.reserve(block.nbytes):
                        self.keep_in_memory(block)
                except LoadError as error:
                    logger.warning("a block could not be read, it is computed again: %s", error)
                    self._reject(key, error, tier.name)
        self._memory.touch(list(found))
        if from_below:
            self._writer.submit(partial(self._promote_each, from_below))
        return found

    def _promote_each(self, keys: Sequence[Key]) -> None:
        for key in keys:
            self._promote_one(key)

    def _reject(self, key: Key, error: LoadError, name: str) -> None:
        """A block from the tier `name` could not be used, nor then what is above it, or a copy of it on disk."""
        last = max(1, [tier.name for tier in self._tiers].index(name))
        for tier in self._tiers[: last + 1]:
            if tier.name == name or tier.find([key]):
                tier.failed(key, error)

    def fetching(self, task: Callable[[], None]) -> None:
        """Has a task run that looks something up, or fetches it, beside who computes."""
        self._readers.submit(task)

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
        if any(tier.capacity for tier in self._tiers):  # else nobody asked for blocks to be kept
            self._accounts.warn_once(
                "room",
                f"the memory of the store {self.path} (cap {format_bytes(self._memory.capacity)}) has no room for what "
                "was computed, it is not kept: what is written passes through memory, give it more with memory=",
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
        if not self._memory.put(block):
            held = self._memory.get(block.meta.key)
            if held is not None:  # what is about to be written may take its place: then it is to be written again
                self._writer.submit(partial(self._write, held, supersedes))
            return
        self._accounts.over("room")
        self._accounts.count_all({"saved_blocks": 1, "saved_bytes": block.nbytes})
        self._writer.submit(partial(self._write, block, supersedes))

    def keep_in_memory(self, block: Block) -> None:
        """Takes over a complete block, whose bytes were reserved, that is on disk already."""
        self._memory.put(block, dirty=False)
        if block.codable:
            self._writer.submit(partial(self._guarded, partial(self._as_kept, block)))

    def copy_beginning(self, ids: Sequence[int], fingerprint: str, source: BlockStore) -> int:
        """Copies to this namespace what another has of a text's beginning and this one has not, in whole blocks. In
        memory both have the same tensors.

        Args:
            source: this store, seen from the other namespace.

        Returns:
            How many tokens of the beginning are here now.

        Raises:
            LoadError: a block of the other is damaged, or can't be read.
        """
        own, theirs = self.root(fingerprint), source.root(fingerprint)
        for start in range(0, len(ids) - self.block_size + 1, self.block_size):
            tokens = encode_tokens(ids[start : start + self.block_size])
            parent, own, theirs = own, *(block_key(root, tokens, self.secret) for root in (own, theirs))
            if not self._copy(theirs, source, key=own, parent=parent):
                return start
            if self.keeps_windows_apart:
                part, window = window_key(own, self.secret), window_root(own, self.secret)
                self._copy(window_key(theirs, self.secret), source, key=part, parent=window, continues=own)
        return len(ids) // self.block_size * self.block_size

    def _copy(self, theirs: Key, source: BlockStore, **names: Any) -> bool:
        """Copies a block from another namespace, where it has other names. False where it is not there, or finds no
        room here."""
        if self.has(names["key"]):
            return True
        if not source.known([theirs]):
            return False
        _, found = source._open([theirs])[theirs]
        if isinstance(found, StoredBlock):
            with found:
                found = found.as_kept()
        if not self.reserve(found.nbytes):
            return False
        meta = replace(found.meta, **names)
        self.put(replace(found, meta=meta, arriving=list(found.arriving), _together={}))
        return True

    def let_windows_go(self, blocks: Sequence[Key], session: str | None) -> None:
        """Deletes what the sliding layers have of these blocks, behind the caller's back and after all that was handed
        over before: but for what other sessions need of blocks that are still there.

        Args:
            session: the one that needs it no more.
        """
        self._check_open()

        def let_go() -> None:
            there = self.there(blocks)
            keys = {block: window_key(block, self.secret) for block in blocks}
            self._disk.delete([key for block, key in keys.items() if block not in there])
            kept = self._disk.let_go(self.namespace, session, [key for block, key in keys.items() if block in there])
            self._memory.delete([key for key in keys.values() if key not in kept])

        if blocks:
            self._writer.submit(partial(self._guarded, let_go))

    def touch(self, keys: Sequence[Key]) -> None:
        """Marks blocks as just used."""
        self._check_open()
        self._memory.touch(list(keys))
        for tier in self._lower:
            self._writer.submit(partial(self._guarded, partial(tier.touch, list(keys))))

    def promote(self, keys: Sequence[Key]) -> None:
        """Copies blocks from lower tiers into free or reclaimable memory, in the background and in order. What upcoming
        turns need is not evicted for them."""
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
        key = block.meta.key
        try:
            kept = self._as_kept(block)
            assert isinstance(kept, Block)
            if any(tier.capacity for tier in self._lower):  # by a lossless codec for all of them at once
                kept = self._counted(as_written, kept)
            written = [self._write_to(tier, kept, supersedes) for tier in self._lower]
            if not any(written):
                self._accounts.count("not_saved_blocks", int(None not in written))
            elif supersedes is not None and not self._disk.find([supersedes]):
                self._memory.delete([supersedes])
        except NotFiniteError as error:  # it came from an accelerator: nobody could look at it before
            self._memory.delete([key])
            self._accounts.count("not_saved_blocks")
            self._accounts.warn_once("not finite", f"not kept: {error}")
        except Exception as error:
            self._accounts.count("write_errors")
            self._accounts.warn_once(
                "coding", f"a block can't be written as {block.meta.codec}, it is not kept: {error}"
            )
        finally:
            self.recorders.add("write", _described(block.meta), began)
            self._memory.mark_clean(key)

    def _write_to(self, tier: Tier, block: Block, supersedes: Key | None = None) -> bool | None:
        """Writes a block, and before it those that it follows, where these did not get there when they should have and
        are still in memory. False where the tier does not want it, None where it failed.

        Raises:
            NotFiniteError: there is NaN or infinity in it.
        """
        blocks = [block]
        before = self._memory.get(block.meta.predecessor) if tier.capacity else None
        try:
            while before is not None and tier.lacks(before.meta.key):
                blocks.append(before)
                before = self._memory.get(before.meta.predecessor)
            while len(blocks) > 1:
                if not tier.put(self._written_by(tier, blocks.pop())):
                    return False
            if not tier.put(self._written_by(tier, block), supersedes):
                return False
        except NotFiniteError:
            raise
        except Exception as error:
            self._accounts.count("write_errors")
            where = f"{self.path}" if tier is self._disk else f"the {tier.name} tier"
            self._accounts.warn_once(
                f"write to {tier.name}", f"saving to {where} failed, conversations are not kept for now: {error}"
            )
            return None
        self._accounts.over(f"write to {tier.name}")
        return True

    def _written_by(self, tier: Tier, block: Block) -> Block:
        """A block as a tier writes it. The shared one does so itself, when it sends it."""
        if tier is not self._disk or not tier.capacity:
            return block
        return self._counted(partial(written_by, codec=self._disk_codec), block)

    def _promote(self, key: Key, job: int | None = None) -> int | None:
        """Copies a block from a lower tier into memory, if that makes room for it, for the upcoming turn `job` if any;
        and into the tiers between.

        Returns:
            The bytes copied; None where there is no room.
        """
        import torch

        began = time.perf_counter()
        if self._memory.get(key) is not None:
            return 0
        tier: Tier | None = None
        try:
            tier = next((tier for tier in self._lower if tier.find([key])), None)
            opens = tier.sources([key]).get(key) if tier is not None else None
            if tier is None or opens is None:
                return 0
            source = opens()
            assert isinstance(source, StoredBlock)
            with source:
                size = source.kept_bytes
                if self._automatic is not None:
                    self._automatic.before_reserving()
                if not self._memory.reserve(size, job=job) and not self._reserve_once_written(size, job):
                    return None
                try:
                    block = source.as_kept(pinned=torch.cuda.is_available())
                    block.check_finite()
                except BaseException:
                    self._memory.release(size)
                    raise
            self.recorders.add("fetch", _described(block.meta), began)
            if not self._memory.put(block, dirty=False):
                return 0
            for above in self._lower[: self._lower.index(tier)]:
                self._write_to(above, block)
            return size
        except LoadError as error:
            if tier is not None:
                self._reject(key, error, tier.name)
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


def _described(meta: BlockMeta) -> str:
    """What a block is, for a timeline."""
    return f"tokens {meta.start:,}–{meta.stop:,}" if meta.state is None else f"states at {meta.stop:,}"
