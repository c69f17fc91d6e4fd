"""Handing new KV to the store, block by block, as the layers compute it."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Protocol

import torch

from ...errors import NotFiniteError
from ...session.chain import TokenChain
from ...store.blocks.block import Block, BlockMeta, padded
from ...store.blocks.codecs import codec_named
from ...store.blocks.keys import RAW, Key
from ...store.store import AttentionStore
from ..layers.buffers import empty
from .names import tensor_name
from .streams import copy_to_host, save_stream

logger = logging.getLogger("hf_attnstore")


@cache
def _say_once(what: str, codec: str) -> None:
    logger.warning("%s of a model are kept as they are: what %s does to such was not measured", what, codec)


MEASURED = frozenset({"llama", "gemma3_text"})
"""Types of models of which docs/results has what lossy codecs do to them."""


@cache
def say_if_unmeasured(kind: str, codec: str) -> None:
    """Says, once a process, how to find out what a lossy codec does to a type of model that it was never tried on."""
    if codec_named(codec).lossy and codec_named(codec).name != "fp16" and kind not in MEASURED:
        logger.warning(
            "KV of %s is kept with loss: what %s does to such models was not measured; `attnstore doctor --model … "
            "--codec %s --text …` does, on texts of your own",
            kind, codec, codec,
        )  # fmt: skip


class SavedLayer(Protocol):
    """What is asked of a layer whose KV is saved: a `KeptLayer`, or whoever has KV elsewhere."""

    may_be_rounded: bool
    lets_go: bool

    def holds(self, start: int, stop: int) -> bool: ...

    def piece(self, start: int, stop: int) -> dict[str, torch.Tensor]: ...

    def tensors(self) -> Iterable[torch.Tensor]: ...

    def keep_until_saved(self, position: int | None) -> None: ...


class Piecewise:
    """A block that is being put together, layer by layer."""

    def __init__(self, layers: int, reserved: int = 0) -> None:
        self.layers: dict[int, dict[str, torch.Tensor]] = {}
        self.reserved = reserved
        self.arriving: list[torch.cuda.Event] = []
        self._layers = layers
        self._room: torch.Tensor | None = None
        self._used = 0

    def add(self, number: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """A layer has contributed these, by its own names."""
        self.layers[number] = {tensor_name(number, name): tensor for name, tensor in tensors.items()}

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Host memory for a tensor of the block. All layers' lies together: one large piece of memory is much
        cheaper to get than many small ones, and what lies together is copied faster."""
        if self._room is None:
            self._room = empty((2 * self._layers * padded(like.nbytes),), torch.uint8, torch.device("cpu"))
        start, self._used = self._used, self._used + padded(like.nbytes)
        if self._used > len(self._room):  # layers of different sizes
            return empty(tuple(like.shape), like.dtype, torch.device("cpu"))
        return self._room[start : start + like.nbytes].view(like.dtype).view(like.shape)


class BlockSaver:
    """Copies complete blocks out of a cache's layers and gives them to the store.

    During a forward each layer's part is copied as soon as the layer is done; nothing is ever waited for there.
    What could not be handed over then, and the short block at the end, follow in `finish`.
    """

    kept: Sequence[Key] = ()
    """What is kept of windows beside blocks, once the turn has ended."""
    let_go: Sequence[Key] = ()
    """Blocks whose windows are not."""

    def __init__(
        self,
        layers: Sequence[SavedLayer],
        chain: TokenChain,
        store: AttentionStore,
        fingerprint: str,
        continues: Key = b"",
        numbers: Sequence[int] | None = None,
    ) -> None:
        """`numbers` are those of the layers whose KV is saved; default: of all."""
        self._layers = layers
        self._numbers = range(len(layers)) if numbers is None else numbers
        self._letting_go = [layers[number] for number in self._numbers if layers[number].lets_go]
        self._chain = chain
        self._store = store
        self._fingerprint = fingerprint
        self._continues = continues
        self._next = 0
        self._open: dict[int, Piecewise] = {}
        self._known: dict[int, bool] = {}
        self._tail: tuple[int, Key] | None = None
        self._superseded: set[Key] = set()
        """Short blocks that others took the place of: the store may have them now, and not when it has written."""
        self._refill: frozenset[int] = frozenset()
        self._stalled = False
        self._unfit: int | None = None
        """The first block that has NaN or infinity in it: neither that nor what comes after is handed over."""
        self.due = False
        """Whether the forward that runs now completes a block: if not, its layers have nothing to hand over."""
        self.holds_back = False
        """Whether nothing is to be handed over before `finish`, checkpoints included."""
        self.saved_bytes = 0
        self.seconds = 0.0

    def begin_turn(self, in_store: int, tail: tuple[int, Key] | None, refill: frozenset[int] = frozenset()) -> None:
        """Sets where saving starts.

        Args:
            in_store: number of leading tokens of which nothing has to be saved.
            tail: the short block that ends what the store has, by its number, which the next block at its place will
                supersede.
            refill: numbers of blocks that the store has on disk alone, and that are about to be computed all the same:
                where there is room they are kept in memory, so that this is not needed again.
        """
        self._drop_open()
        self._next = self._chain.block_at(in_store)
        self._tail = tail
        self._refill = refill
        self._unfit = None
        self._stalled = self.holds_back = False
        self.saved_bytes = 0
        self.seconds = 0.0
        self._mark_saved()

    def continue_turn(self) -> None:
        """Another turn on what the layers hold already; what the store still has of it shows block by block."""
        tail = self._tail
        self.begin_turn(0, None)
        self._tail = tail

    def hold(self) -> None:
        """Nothing is handed over before `finish`."""
        self._stalled = self.holds_back = True

    def crop(self, tokens: int) -> None:
        """The cache went back to `tokens` tokens: blocks behind that are put together anew."""
        block = self._chain.block_at(tokens)
        self._next = min(self._next, block)
        if self._unfit is not None and self._unfit >= block:
            self._unfit = None
        for number in [number for number in self._open if number >= block]:
            self._store.release(self._open.pop(number).reserved)
        self._known = {number: known for number, known in self._known.items() if number < block}
        if torch.cuda.is_initialized():
            for device in {tensor.device for layer in self._layers for tensor in layer.tensors() if tensor.is_cuda}:
                # what is on its way to the host must not be overwritten before it is there
                torch.cuda.current_stream(device).wait_stream(save_stream(device))
        self._mark_saved()

    @property
    def unfit_from(self) -> int | None:
        """Position of the first token of a block that is not handed over because of NaN or infinity in it."""
        return self._chain.bounds(self._unfit)[0] if self._unfit is not None else None

    def _mark_saved(self) -> None:
        first = self._chain.bounds(self._next)[0]
        for layer in self._letting_go:
            layer.keep_until_saved(first)

    def release(self) -> None:
        """Saving has ended: layers need not keep tokens for it."""
        self._drop_open()
        for layer in self._letting_go:
            layer.keep_until_saved(None)

    def _drop_open(self) -> None:
        for piecewise in self._open.values():
            self._store.release(piecewise.reserved)
        self._open.clear()
        self._known.clear()

    def __del__(self) -> None:
        # a cache that is dropped in the middle of a forward must not leave memory reserved
        for piecewise in self.__dict__.get("_open", {}).values():
            self._store.release(piecewise.reserved)

    # during a forward

    def begin_forward(self, full_blocks: int) -> None:
        """A forward begins after which `full_blocks` blocks of the chain are complete."""
        self.due = full_blocks > self._next and not self._stalled
        self._until = full_blocks

    def layer_done(self, number: int) -> None:
        """Copies a layer's part of the blocks that this forward completes."""
        began = time.perf_counter()
        for block in range(self._next, self._until):
            if not self._in_store(block) and not self._copy(block, number, wait=False):
                break
        self.seconds += time.perf_counter() - began

    def end_forward(self) -> None:
        """Gives the store the blocks that all layers have contributed to."""
        if not self.due:
            return
        began = time.perf_counter()
        while self._next < self._until:
            block = self._next
            if not self._in_store(block) and not (self._copy_all(block, wait=False) and self._put(block)):
                break
            self._next += 1
        self._mark_saved()
        self.due = False
        self.seconds += time.perf_counter() - began

    def _key(self, block: int) -> Key:
        """The name under which a block of the chain is saved."""
        return self._chain.key(block)

    def _in_store(self, block: int) -> bool:
        if block not in self._known:
            key = self._key(block)
            known = key not in self._superseded and self._store.has(key)
            if known and block in self._refill:
                known = self._store.tier_of(key) == "memory"
            self._known[block] = known
        return self._known[block]

    def _copy_all(self, block: int, *, wait: bool) -> bool:
        """Copies what is missing of a block to host memory; False if there is no room for it, or it is not there."""
        return all(self._copy(block, number, wait=wait) for number in self._numbers)

    def _copy(self, block: int, number: int, *, wait: bool) -> bool:
        """Copies one layer's part of a block to host memory; False if there is no room for it."""
        if self._stalled or (self._unfit is not None and block >= self._unfit):
            return False
        piecewise = self._open.setdefault(block, Piecewise(len(self._numbers)))
        if number in piecewise.layers:
            return True
        layer = self._layers[number]
        start, stop = self._chain.bounds(block)
        if not layer.holds(start, stop):
            return False
        source = layer.piece(start, stop)
        size = sum(tensor.nbytes for tensor in source.values())
        if not self._store.reserve(size, wait=wait):
            # bytes of a block that can't be completed now would be missing where they could be used
            self._store.release(self._open.pop(block).reserved)
            if block in self._refill:
                self._end_refill()
            else:
                self._stalled = not wait
            return False
        piecewise.reserved += size
        copies = {name: copy_to_host(t, piecewise.arriving, piecewise.take) for name, t in source.items()}
        piecewise.add(number, copies)
        return True

    def _put(self, block: int) -> bool:
        """Gives the store a block that is complete; False if nobody should have it."""
        piecewise = self._open.pop(block, None) or Piecewise(0)  # of ids alone, where all layers' are apart
        tensors = {name: t for number in self._numbers for name, t in piecewise.layers[number].items()}
        meta = self._meta(block)
        made = Block(meta, tensors, piecewise.arriving, self._codable(block, piecewise))
        try:
            self._check(made)
        except NotFiniteError:
            self._store.release(piecewise.reserved)
            self._unfit = block
            return False
        if block in self._refill and self._store.has(meta.key):
            self._store.keep_in_memory(made)
            return True
        supersedes = self._tail[1] if self._tail is not None and self._tail[0] == block else None
        self._superseded.discard(meta.key)
        if supersedes is not None:
            self._superseded.add(supersedes)
        self._store.put(made, supersedes)
        self.saved_bytes += piecewise.reserved
        if meta.token_count < self._chain.block_size:
            self._tail = (block, meta.key)
        elif self._tail is not None and self._tail[0] <= block:
            self._tail = None
        return True

    def _meta(self, block: int) -> BlockMeta:
        """What identifies a block."""
        return BlockMeta(
            key=self._key(block),
            parent=self._chain.parent(block),
            fingerprint=self._fingerprint,
            start=self._chain.bounds(block)[0],
            tokens=self._chain.tokens(block),
            continues=self._continues if block == 0 else b"",
            codec=self._store.codec,
        )

    def _check(self, made: Block) -> None:
        """Looks through a block before it is handed over. Raises NotFiniteError."""
        if not made.arriving:  # else that is done when it is there, before anything is done with it
            made.check_finite()

    def _codable(self, block: int, piecewise: Piecewise) -> frozenset[str]:
        """What of a block the codec may have: nothing of a short one, which is written anew when it grows."""
        start, stop = self._chain.bounds(block)
        if codec_named(self._store.codec).name == RAW or stop - start < self._chain.block_size:
            return frozenset()
        lossy = codec_named(self._store.codec).lossy
        there = [number for number, tensors in piecewise.layers.items() if tensors]
        fit = [number for number in there if self._layers[number].may_be_rounded or not lossy]
        if len(fit) < len(there):
            _say_once(f"{len(there) - len(fit)} of {len(there)} layers", self._store.codec)
        return frozenset(name for number in fit for name in piecewise.layers[number])

    def _end_refill(self) -> None:
        """What the store has on disk is left there from now on."""
        for block in self._refill:
            if block in self._open:
                self._store.release(self._open.pop(block).reserved)
            self._known.pop(block, None)
        self._refill = frozenset()

    # after the turn

    def finish(self, tokens: int, prompt: int = 0) -> int:
        """Hands over everything up to `tokens` that was not handed over yet, the short last block included.

        Waits for room in host memory where that will come. Returns the number of leading tokens that the store has.

        Args:
            prompt: how many tokens the turn's prompt has, 0 where that is not known.
        """
        began = time.perf_counter()
        self._stalled = self.holds_back = False
        self._end_refill()
        size = self._chain.block_size
        while self._chain.bounds(self._next)[0] < tokens:
            block = self._next
            start, stop = self._chain.bounds(block)
            if not self._in_store(block) and not (self._copy_all(block, wait=True) and self._put(block)):
                self._drop_open()
                logger.debug("KV from token %d on is not saved: no room, not there any more, or not finite", start)
                break
            if stop - start < size:
                self._known.pop(block, None)  # the tail's key changes when it grows
                self._mark_saved()
                self.seconds += time.perf_counter() - began
                return stop
            self._next += 1
        self._mark_saved()
        self.seconds += time.perf_counter() - began
        return min(self._chain.bounds(self._next)[0], tokens)
