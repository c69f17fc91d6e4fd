"""A block as it was written, open for reading: in a file, or wherever else its bytes can be had by ranges."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from ...errors import LoadError, NotFiniteError
from ...lazy import np
from .block import TOKEN_IDS, Block, BlockMeta, Bytes, TensorSpec, is_finite
from .codecs import CodedBlock, CodedTensor, codec_named
from .format import MAX_HEADER_BYTES, Coded, Layout, StoredTensor, parse_header
from .keys import Key, block_key, encode_tokens, window_key
from .vault import Vault

if TYPE_CHECKING:
    import torch


class Ranges(ABC):
    """Bytes that can be read from anywhere on. What a tier opens a block as; its errors are OSErrors and LoadErrors."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many there are."""

    @abstractmethod
    def read(self, buffers: Sequence[Bytes], offset: int) -> int:
        """Reads from `offset` on into buffers, one after the other. Returns the bytes read, which may be fewer; 0 at
        the end only."""

    def head(self, nbytes: int, offset: int = 0) -> bytes:
        """At most so many bytes from `offset` on."""
        buffer = memoryview(bytearray(nbytes))
        return bytes(buffer[: self.read([buffer], offset)])

    def will_need(self, offset: int, nbytes: int) -> None:  # noqa: B027 some are at hand
        """A range will be read: has it brought near, in the background; returns at once."""

    def wait_at_most(self, seconds: float) -> None:  # noqa: B027 files are not waited for
        """From now on its bytes, and those that were opened with them, are waited for so long, all told."""

    def at_hand(self, size: int) -> bool:
        """Whether nothing of the `size` bytes need be waited for."""
        return False

    def close(self) -> None:  # noqa: B027 some hold nothing
        """Ends reading."""


def failed(where: object, error: OSError) -> LoadError:
    """A file that is gone is gone; whatever else the system says may be otherwise the next time."""
    return LoadError(f"{where}: {error.strerror}", transient=not isinstance(error, FileNotFoundError))


class Reading(NamedTuple):
    """What is to be read of blocks that are written alike, and where to."""

    wanted: Sequence[tuple[StoredTensor, Sequence[Bytes]]]
    tensors: Mapping[str, torch.Tensor]
    """What is written, by name."""
    coded: Mapping[str, CodedTensor]


class StoredBlock:
    """A block open for reading. Stays readable when it is deleted meanwhile; close it after use.

    Args:
        path: what to call it in errors.
        ranges: its bytes, as `encode_block` made them. They are closed with it.
        key: of the block that it should be.

    Raises:
        LoadError: it is damaged, or another block.
    """

    def __init__(self, path: object, ranges: Ranges, vault: Vault, key: Key | None = None) -> None:
        self.path = str(path)
        self._secret = vault.secret
        self._ranges = ranges
        try:
            self.layout = self._read_layout()
            found = self.layout.meta.key
            if key not in (None, found):
                raise LoadError(f"{self.path}: this is another block ({found.hex()})")
            self._guard = vault.guard(self.layout.salt)
        except BaseException:
            self.close()
            raise

    def _read_layout(self) -> Layout:
        try:
            size = self._ranges.size
            head = self._ranges.head(16384)
            if len(head) < 8:
                raise LoadError(f"{self.path}: the file is too short to be a block")
            (header_bytes,) = struct.unpack_from("<Q", head)
            if header_bytes > min(MAX_HEADER_BYTES, size - 8):
                raise LoadError(f"{self.path}: the header declares {header_bytes} bytes")
            end = 8 + header_bytes
            while len(head) < end:
                more = self._ranges.head(end - len(head), len(head))
                if not more:
                    raise LoadError(f"{self.path}: the file ends within its header")
                head += more
        except OSError as error:
            raise failed(self.path, error) from error
        self._at_hand = self._ranges.at_hand(size)
        try:
            return parse_header(head[:end], size)
        except LoadError as error:
            raise LoadError(f"{self.path}: {error}") from error

    @property
    def in_page_cache(self) -> bool:
        """Whether all of it was at hand when it was opened, as far as can be told from a few places: then asking for
        it ahead of use brings nothing."""
        return self._at_hand

    def wait_at_most(self, seconds: float) -> None:
        """See `Ranges`."""
        self._ranges.wait_at_most(seconds)

    def close(self) -> None:
        self._ranges.close()

    def __enter__(self) -> StoredBlock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # as it is written

    def read(self, wanted: Sequence[tuple[StoredTensor, Sequence[Bytes]]]) -> int:
        """Reads whole tensors that lie one after the other into buffers, decrypts and checks them.

        Args:
            wanted: in file order, each tensor with the contiguous buffers that together take its bytes.

        Returns:
            The bytes read.

        Raises:
            LoadError: an I/O error, the end of the file, or a checksum that is not right. The buffers then hold
                anything.
        """
        buffers = [buffer for _, parts in wanted for buffer in parts]
        layout = self.layout
        total = self._read_into(buffers, layout.begin + wanted[0][0].offset)
        closed = [(tensor.number, tensor.spec, parts, layout.proofs[tensor.spec.name]) for tensor, parts in wanted]
        wrong = self._guard.open(layout.meta, closed)
        if wrong:
            raise LoadError(f"{self.path}: the checksum of {wrong} is wrong")
        return total

    def _read_into(self, buffers: list[Bytes], offset: int) -> int:
        expected = sum(buffer.nbytes for buffer in buffers)
        done = 0
        while done < expected:
            try:
                count = self._ranges.read(buffers, offset + done)
            except OSError as error:
                raise failed(self.path, error) from error
            if count == 0:
                raise LoadError(f"{self.path}: the file ends {expected - done} bytes early")
            done += count
            if done < expected:  # seldom: a read comes in parts
                while count >= buffers[0].nbytes:
                    count -= buffers.pop(0).nbytes
                buffers[0] = buffers[0][count:]
        return done

    def raw(self) -> np.ndarray:
        """All of its bytes, as they are written and unchecked.

        Raises:
            LoadError: an I/O error, or the end of the file.
        """
        whole = np.empty(self.layout.file_bytes, dtype=np.uint8)
        self._read_into([whole], 0)
        return whole

    def read_adjacent(self, wanted: list[tuple[StoredTensor, Sequence[Bytes]]]) -> None:
        """Reads whole tensors into buffers, those that lie one after the other in one call.

        Raises:
            LoadError: see `read`.
        """
        wanted.sort(key=lambda item: item[0].offset)
        run: list[tuple[StoredTensor, Sequence[Bytes]]] = []
        for item in wanted:
            if run and run[-1][0].offset + run[-1][0].spec.nbytes != item[0].offset:
                self.read(run)
                run = []
            run.append(item)
        if run:
            self.read(run)

    def tensor(self, name: str) -> StoredTensor:
        """Where a tensor lies.

        Raises:
            LoadError: there is none of that name.
        """
        try:
            return self.layout.tensors[name]
        except KeyError:
            raise LoadError(f"{self.path}: there is no tensor {name}") from None

    def will_need(self, names: Iterable[str]) -> None:
        """Has what is written of tensors brought near, in the background; returns at once."""
        if self.in_page_cache:
            return
        for name in names:
            for stored in self.layout.written(name).values():
                self._ranges.will_need(self.layout.begin + stored.offset, stored.spec.nbytes)

    # as it was handed over

    @property
    def coded(self) -> Mapping[str, Coded]:
        """Its tensors that a codec wrote in parts."""
        return self.layout.coded

    def specs(self) -> dict[str, TensorSpec]:
        """Its tensors, without the ids."""
        return self.layout.specs

    def spec(self, name: str) -> TensorSpec:
        """One of its tensors, or the ids.

        Raises:
            LoadError: there is none of that name.
        """
        return self.layout.specs.get(name) or self.tensor(name).spec

    def fetch(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, torch.Tensor]:
        """Whole tensors in host memory.

        Raises:
            LoadError: see `read`; there is none of that name; or its codec is not known here.
        """
        from .tensors import host_memory

        found = host_memory([self.spec(name) for name in names], pinned=pinned)
        self.read_into(found)
        return found

    def read_into(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Reads whole tensors, of their dtypes and shapes, by name, and decodes those that are coded; the others'
        targets are contiguous.

        Raises:
            LoadError: see `fetch`.
        """
        from .tensors import as_bytes

        plain = [name for name in targets if name not in self.coded]
        coded = self.reading([name for name in targets if name in self.coded])
        self.read_adjacent([*((self.tensor(n), [as_bytes(targets[n]).reshape(-1)]) for n in plain), *coded.wanted])
        for name, whole in coded.coded.items():
            codec_named(self.layout.by).decode(whole.parts, targets[name])

    def reading(self, names: Iterable[str], *, pinned: bool = False) -> Reading:
        """Host memory for what is written of tensors, those that are coded in parts.

        Raises:
            LoadError: there is none of that name.
        """
        from .tensors import as_bytes, host_memory

        names = list(names)
        written = [
            stored for name in names for stored in (self.layout.written(name) or {"": self.tensor(name)}).values()
        ]
        tensors = host_memory([stored.spec for stored in written], pinned=pinned)
        wanted = [(stored, [as_bytes(tensors[stored.spec.name]).reshape(-1)]) for stored in written]
        wholes = [(name, self.coded[name]) for name in names if name in self.coded]
        coded = {n: CodedTensor(w.spec, {p: tensors[t.spec.name] for p, t in w.parts.items()}) for n, w in wholes}
        return Reading(wanted, tensors, coded)

    @property
    def kept_bytes(self) -> int:
        """Bytes that it takes in memory, as `as_kept` makes it."""
        specs = self.layout.specs
        lossy = self.coded and codec_named(self.layout.by).lossy
        return sum(
            sum(part.spec.nbytes for part in self.coded[name].parts.values())
            if lossy and name in self.coded
            else spec.nbytes
            for name, spec in specs.items()
        )

    def as_kept(self, *, pinned: bool = False) -> Block:
        """The block as memory keeps it.

        Raises:
            LoadError: see `fetch`.
        """
        meta = self.read_meta()
        if not self.coded or not codec_named(self.layout.by).lossy:
            return Block(meta, self.fetch(self.specs(), pinned=pinned), codable=frozenset(self.coded))
        reading = self.reading(self.specs(), pinned=pinned)
        self.read_adjacent(list(reading.wanted))
        return CodedBlock(meta, dict(reading.tensors), coded=reading.coded, by=self.layout.by)

    def read_meta(self) -> BlockMeta:
        """The block's identity with its token ids, checked against its key."""
        stored = self.layout.tensors[TOKEN_IDS]
        ids = np.empty(stored.spec.nbytes, dtype=np.uint8)
        self.read([(stored, [ids])])
        meta = replace(self.layout.meta, tokens=encode_tokens(ids.view(np.int64)))
        named = block_key(meta.parent, meta.tokens, self._secret) == meta.key
        if not named and window_key(meta.continues, self._secret) != meta.key:
            raise LoadError(f"{self.path}: the token ids are not those of the key")
        return meta

    def verify(self) -> BlockMeta:
        """Reads all of the file and checks it. Returns the block's identity, with its token ids.

        Raises:
            LoadError: something is not as it was written.
            NotFiniteError: it is, but should not have been: there is NaN or infinity in it.
        """
        import torch

        for name, stored in self.layout.tensors.items():
            buffer = np.empty(stored.spec.nbytes, dtype=np.uint8)
            self.read([(stored, [buffer])])
            if not is_finite(torch.from_numpy(buffer).view(stored.spec.dtype)):
                raise NotFiniteError(f"{self.path}: {name} has NaN or infinity in it")
        return self.read_meta()
