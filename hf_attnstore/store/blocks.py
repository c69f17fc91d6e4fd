"""What a block is: its key, its safetensors layout, its checksums.

A block is the KV of a run of consecutive tokens. On disk it is an ordinary safetensors file that anyone can
open; this module writes and parses that format itself because the layout (layer order, one contiguous read
per layer) and the byte offsets (reads straight into the destination) are the point, and the library offers
neither.
"""

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
import xxhash

from ..errors import LoadError

FORMAT_VERSION = "1"
RAW = "raw"
"""The codec that stores tensors as they are."""

TOKEN_IDS = "token_ids"
MAX_HEADER_BYTES = 16 << 20

Key = bytes
"""32 bytes naming a block and, as a chain, the whole prefix that ends with it."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def encode_tokens(ids: Sequence[int] | np.ndarray) -> bytes:
    """Token ids as big-endian 32-bit integers: equal-length encodings sort like the ids, so that in an ordered
    index the neighbours of a text are those that share the longest beginning with it."""
    return np.ascontiguousarray(ids, dtype=">u4").tobytes()


def decode_tokens(encoded: bytes) -> np.ndarray:
    """The ids `[tokens]` (int64) behind `encode_tokens`."""
    return np.frombuffer(encoded, dtype=">u4").astype(np.int64)


def common_prefix(a: bytes, b: bytes) -> int:
    """Number of leading tokens on which two encodings agree."""
    length = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, ">u4", length) != np.frombuffer(b, ">u4", length)
    return int(differ.argmax()) if differ.any() else length


def _digest(kind: bytes, *parts: bytes) -> Key:
    hasher = hashlib.blake2b(digest_size=32, person=kind)
    for part in parts:
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
    return hasher.digest()


def chain_root(fingerprint: str, namespace: str, codec: str = RAW) -> Key:
    """The parent of every first block of one model, namespace and codec. Chains of different roots never meet."""
    return _digest(b"attnstore-root", fingerprint.encode(), namespace.encode(), codec.encode())


def cut_root(root: Key, parts: Iterable[tuple[Key, int, int]]) -> Key:
    """The parent of the first block after KV that was put together from `parts` (block, start, stop) of chains
    below `root`. It is no block's key, and no plain chain's root."""
    encoded = [key + struct.pack("<QQ", start, stop) for key, start, stop in parts]
    return _digest(b"attnstore-cut", root, *encoded)


def block_key(parent: Key, tokens: bytes) -> Key:
    """The key of the block that follows `parent` and holds `tokens` (as from `encode_tokens`)."""
    return _digest(b"attnstore-block", parent, tokens)


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a block; the token axis is the last but one."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BlockMeta:
    """Everything about a block but its tensors."""

    key: Key
    parent: Key
    fingerprint: str
    namespace: str
    start: int
    """Position of the first token in the chain, in tokens."""
    tokens: bytes
    """As from `encode_tokens`."""
    codec: str = RAW
    continues: Key = b""
    """The block before this one, where `parent` does not name it: in the first block after a truncation."""

    @property
    def predecessor(self) -> Key:
        """The block without which this one is worth nothing; for the first of a chain, its root."""
        return self.continues or self.parent

    @property
    def token_count(self) -> int:
        return len(self.tokens) // 4

    @property
    def stop(self) -> int:
        return self.start + self.token_count


@dataclass
class Block:
    """A block in host memory: tensors by name, in layer order, each `[heads, tokens, dim]` and contiguous.

    On an accelerator the tensors may still be arriving: `wait_ready` returns when they are there.
    """

    meta: BlockMeta
    tensors: dict[str, torch.Tensor]
    arriving: list[torch.cuda.Event] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def wait_ready(self) -> None:
        while self.arriving:
            self.arriving[-1].synchronize()
            self.arriving.pop()

    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()}


@dataclass(frozen=True)
class Match:
    """A block that begins like the wanted tokens."""

    key: Key
    common: int
    """Number of leading tokens that agree."""
    token_count: int
    """Number of tokens in the block."""


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    """A uint8 view of a CPU tensor whose last dimension is contiguous; the last axis counts bytes."""
    return tensor.view(torch.uint8).numpy()


def checksum(chunks: Iterable[np.ndarray]) -> str:
    """xxh3-64 (hex) over the chunks one after the other."""
    hasher = xxhash.xxh3_64()
    for chunk in chunks:
        hasher.update(chunk)  # type: ignore[arg-type]
    return hasher.hexdigest()


class StoredTensor(NamedTuple):
    """Where a tensor lies in a block file: `offset` is from the beginning of the file, in bytes."""

    spec: TensorSpec
    offset: int
    checksum: str


@dataclass(frozen=True)
class Layout:
    """A parsed and checked header of a block file."""

    meta: BlockMeta
    tensors: Mapping[str, StoredTensor]
    file_bytes: int


def encode_block(block: Block) -> tuple[bytes, list[np.ndarray]]:
    """The header and the data, in order, of `block`'s file. Computes the checksums; copies no tensor.

    Tensors lie in the order of `block.tensors`, so a layer's tensors are one contiguous range; the token ids
    come last.
    """
    block.wait_ready()
    ids = torch.from_numpy(decode_tokens(block.meta.tokens))
    tensors = {**block.tensors, TOKEN_IDS: ids}
    described: dict[str, object] = {}
    sums: dict[str, str] = {}
    chunks: list[np.ndarray] = []
    offset = 0
    for name, tensor in tensors.items():
        data = as_bytes(tensor).reshape(-1)
        sums[name] = checksum([data])
        described[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
        chunks.append(data)
    meta = block.meta
    metadata = {
        "format": FORMAT_VERSION,
        "key": meta.key.hex(),
        "parent": meta.parent.hex(),
        "fingerprint": meta.fingerprint,
        "namespace": meta.namespace,
        "first_position": str(meta.start),
        "token_count": str(meta.token_count),
        "codec": meta.codec,
        "xxh3_64": json.dumps(sums, separators=(",", ":")),
    }
    if meta.continues:
        metadata["continues"] = meta.continues.hex()
    # metadata first: the rest is the same in every block of a model, which makes it cheap to parse
    encoded = json.dumps({"__metadata__": metadata, **described}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded, chunks


def encoded_size(block: Block) -> int:
    """An upper bound, in bytes, for the file that `encode_block` makes, without computing checksums."""
    header = 1024 + len(block.meta.fingerprint) + 6 * len(block.meta.namespace) + 256 * (len(block.tensors) + 1)
    return header + block.nbytes + 2 * len(block.meta.tokens)


def _split_header(header: str) -> tuple[dict[str, str], str]:
    """The metadata, which come first, and the description of the tensors (a JSON object)."""
    opening = '{"__metadata__":'
    if not header.startswith(opening):
        raise LoadError("the header does not begin with its metadata")
    metadata, end = json.JSONDecoder().raw_decode(header, len(opening))
    if header[end] != ",":
        raise LoadError("the header describes no tensors")
    return metadata, "{" + header[end + 1 :]


class _Described(NamedTuple):
    """What a header says of its tensors. The same in every full block of a model, so it is parsed once."""

    specs: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]
    """From the end of the header, in bytes."""
    nbytes: int
    token_counts: frozenset[int]
    """Tokens of the tensors; one number, if all is well."""


@lru_cache(maxsize=256)
def _parse_described(described: str) -> _Described:
    """The tensors of a block, from their JSON; they lie one after the other without gaps."""
    specs = []
    offsets = []
    end = 0
    for name, entry in json.loads(described).items():
        begin, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(size) is int and size >= 0 for size in (begin, stop, *shape)):
            raise LoadError(f"tensor {name!r} has sizes that are none")
        spec = TensorSpec(name, _DTYPES[entry["dtype"]], shape)
        if begin != end or spec.nbytes != stop - begin:
            raise LoadError(f"tensor {name!r} has impossible offsets")
        specs.append(spec)
        offsets.append(begin)
        end = stop
    counts = frozenset(spec.shape[-1 if spec.name == TOKEN_IDS else -2] for spec in specs)
    return _Described(tuple(specs), tuple(offsets), end, counts)


def parse_header(encoded: bytes, file_bytes: int) -> Layout:
    """Parses a block file's header (with its 8 bytes of length) and checks all of it.

    Raises:
        LoadError: anything is not as this version writes it: sizes, offsets, dtypes, version, metadata, or a key
            that does not follow from parent and ids' count. The token ids themselves are checked by the reader.
    """
    try:
        return _parse_header(encoded, file_bytes)
    except LoadError:
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise LoadError(f"the header is damaged ({error})") from error


def _parse_header(encoded: bytes, file_bytes: int) -> Layout:
    (header_bytes,) = struct.unpack_from("<Q", encoded)
    if header_bytes > MAX_HEADER_BYTES or 8 + header_bytes != len(encoded):
        raise LoadError(f"the header declares {header_bytes} bytes")
    metadata, described = _split_header(encoded[8:].decode())
    if metadata["format"] != FORMAT_VERSION:
        raise LoadError(f"block format {metadata['format']!r} is not {FORMAT_VERSION!r}")
    sums = json.loads(metadata["xxh3_64"])
    found = _parse_described(described)
    begin = 8 + header_bytes
    if file_bytes != begin + found.nbytes:
        raise LoadError(f"the file has {file_bytes} bytes, its header needs {begin + found.nbytes}")
    tensors = {
        spec.name: StoredTensor(spec, begin + offset, sums[spec.name])
        for spec, offset in zip(found.specs, found.offsets, strict=True)
    }
    count = int(metadata["token_count"])
    if tensors[TOKEN_IDS].spec != TensorSpec(TOKEN_IDS, torch.int64, (count,)):
        raise LoadError("the token ids are not as the header says")
    if found.token_counts != {count}:
        raise LoadError("a tensor does not have one row per token")
    meta = BlockMeta(
        key=bytes.fromhex(metadata["key"]),
        parent=bytes.fromhex(metadata["parent"]),
        fingerprint=metadata["fingerprint"],
        namespace=metadata["namespace"],
        start=int(metadata["first_position"]),
        tokens=b"\0\0\0\0" * count,  # placeholder of the right length until the reader has the ids
        codec=metadata["codec"],
        continues=bytes.fromhex(metadata.get("continues", "")),
    )
    return Layout(meta, tensors, file_bytes)
