"""The safetensors layout of a block's file: its header, written and parsed.

A block file is an ordinary safetensors file that anyone can open. This module writes and parses that format itself
because the layout (layer order, one contiguous read per layer) and the byte offsets (reads straight into the
destination) are the point, and the library offers neither.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from ...errors import LoadError
from ...lazy import np
from .block import TOKEN_IDS, Block, BlockMeta, TensorSpec
from .codecs import CodedBlock, as_written
from .keys import APART, decode_tokens
from .vault import Vault

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = "2"
MAX_HEADER_BYTES = 16 << 20

_OPENING = '{"__metadata__":{"check":"'
_DECODER = json.JSONDecoder()
_CHECK_DIGITS = 16
_REMEMBERED = 512
"""Headers whose layout is kept: 131,072 tokens in blocks of 256, about 10 KiB each."""
_ALIGNMENT = 64
"""Bytes: where the data begin is a multiple of it. From anywhere else the kernel copies a quarter more slowly."""
_MOST_PARTS = 4
"""Of a coded tensor, for an upper bound of a header's bytes."""
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Safetensors' names of dtypes, and torch's."""


@cache
def _dtypes() -> dict[str, torch.dtype]:
    """torch's dtypes by safetensors' names; made for the first header, as the index is read without torch."""
    import torch

    return {name: getattr(torch, dtype) for name, dtype in _DTYPES.items()}


@cache
def _dtype_names() -> dict[torch.dtype, str]:
    return {dtype: name for name, dtype in _dtypes().items()}


class StoredTensor(NamedTuple):
    """Where a tensor lies in a block file: `offset` is from the end of the header, in bytes. The same object in all
    blocks alike."""

    spec: TensorSpec
    offset: int
    number: int
    """Its place in the file."""


class Coded(NamedTuple):
    """A tensor that a codec wrote in parts."""

    spec: TensorSpec
    """What it is decoded to."""
    parts: Mapping[str, StoredTensor]
    """By the codec's own names."""


@dataclass(frozen=True)
class Layout:
    """A parsed and checked header of a block file."""

    meta: BlockMeta
    tensors: Mapping[str, StoredTensor]
    """By name, in file order: what is written, of coded tensors the parts."""
    coded: Mapping[str, Coded]
    """By name; empty in most files."""
    specs: dict[str, TensorSpec]
    """The tensors that were handed over, in file order, without the ids."""
    begin: int
    """Where the header ends, in bytes."""
    proofs: Mapping[str, str]
    """By tensor: a checksum; in an encrypted file the tag."""
    file_bytes: int
    by: str
    """The codec that wrote those that are coded."""
    salt: bytes = b""
    """Of the file's encryption; empty where it is not encrypted."""

    def written(self, name: str) -> Mapping[str, StoredTensor]:
        """What is written of a tensor, by the codec's names of its parts; nothing where there is no such tensor."""
        if name in self.coded:
            return self.coded[name].parts
        return {"": self.tensors[name]} if name in self.tensors else {}


def encode_block(block: Block, vault: Vault) -> tuple[bytes, list[np.ndarray]]:
    """The header and the data, in order, of `block`'s file. Without encryption, no tensor is copied.

    Tensors lie in the order of `block.tensors`, so a layer's tensors are one contiguous range; the token ids
    come last.
    """
    import torch

    from .tensors import as_bytes

    block = as_written(block)
    meta = block.meta
    salt = vault.new_salt()
    guard = vault.guard(salt)
    ids = torch.from_numpy(decode_tokens(meta.tokens))
    wholes = block.coded if isinstance(block, CodedBlock) else {}
    coded = {name: [_dtype_names()[whole.spec.dtype], list(whole.spec.shape)] for name, whole in wholes.items()}
    described: dict[str, object] = {}
    proofs: dict[str, str] = {}
    chunks: list[np.ndarray] = []
    offset = 0
    for number, (name, tensor) in enumerate({**block.tensors, TOKEN_IDS: ids}.items()):
        spec = TensorSpec(name, tensor.dtype, tuple(tensor.shape))
        data, proofs[name] = guard.close(meta, number, spec, as_bytes(tensor).reshape(-1))
        described[name] = {
            "dtype": _dtype_names()[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
        chunks.append(data)
    metadata = {
        "format": FORMAT_VERSION,
        "key": meta.key.hex(),
        "parent": meta.parent.hex(),
        "fingerprint": meta.fingerprint,
        "first_position": str(meta.start),
        "token_count": str(meta.token_count),
        "codec": meta.codec,
        "proofs": json.dumps(proofs, separators=(",", ":")),
    }
    if meta.continues:
        metadata["continues"] = meta.continues.hex()
    if meta.state is not None:
        metadata["state"] = meta.state
    if coded:
        metadata["coded"] = json.dumps(coded, separators=(",", ":"))
    if isinstance(block, CodedBlock) and block.by != meta.codec.removesuffix(APART):
        metadata["coded_by"] = block.by
    if salt:
        metadata["salt"] = salt.hex()
    # metadata first: the rest is the same in every block of a model, which makes it cheap to parse
    fields = json.dumps({"__metadata__": metadata, **described}, separators=(",", ":"))
    return _with_check(fields.removeprefix('{"__metadata__":{')), chunks


def _with_check(fields: str) -> bytes:
    """A header (with its length) whose metadata begin with a checksum of all that follows it."""
    rest = f'",{fields}'.encode()
    rest += b" " * (-(8 + len(_OPENING) + _CHECK_DIGITS + len(rest)) % _ALIGNMENT)
    length = struct.pack("<Q", len(_OPENING) + _CHECK_DIGITS + len(rest))
    return length + _OPENING.encode() + _check(length, rest) + rest


def _check(length: bytes, rest: bytes) -> bytes:
    return xxhash.xxh3_64_hexdigest(length + rest).encode()


def encoded_size(block: Block) -> int:
    """An upper bound, in bytes, for the file that `encode_block` makes, without computing checksums."""
    parts = _MOST_PARTS if block.codable and not isinstance(block, CodedBlock) else 1
    tensors = len(block.tensors) * parts + 1
    header = 1024 + len(block.meta.fingerprint) + 2 * len(block.meta.state or "") + 256 * tensors
    return header + block.nbytes + 2 * len(block.meta.tokens)


def _split_header(encoded: bytes) -> tuple[dict[str, str], str]:
    """The metadata, which come first, and the description of the tensors (a JSON object); both are as written."""
    opening = 8 + len(_OPENING)
    if encoded[8:opening] != _OPENING.encode():
        raise LoadError("the header does not begin with its checksum")
    if encoded[opening : opening + _CHECK_DIGITS] != _check(encoded[:8], encoded[opening + _CHECK_DIGITS :]):
        raise LoadError("the checksum of the header is wrong")
    header = encoded[8:].decode()
    metadata, end = _DECODER.raw_decode(header, len('{"__metadata__":'))
    if header[end] != ",":
        raise LoadError("the header describes no tensors")
    return metadata, "{" + header[end + 1 :]


class _Described(NamedTuple):
    """What a header says of its tensors. The same in every full block of a model, so it is parsed once."""

    tensors: Mapping[str, StoredTensor]
    nbytes: int
    coded: Mapping[str, Coded]
    specs: dict[str, TensorSpec]
    token_counts: frozenset[int]
    """Tokens of the tensors that were handed over; one number, if all is well."""


@lru_cache(maxsize=256)
def _parse_described(described: str, coded: str) -> _Described:
    """The tensors of a block, from their JSON and that of those that are coded; they lie one after the other without
    gaps."""
    tensors: dict[str, StoredTensor] = {}
    end = 0
    for number, (name, entry) in enumerate(json.loads(described).items()):
        begin, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(size) is int and size >= 0 for size in (begin, stop, *shape)):
            raise LoadError(f"tensor {name!r} has sizes that are none")
        spec = TensorSpec(name, _dtypes()[entry["dtype"]], shape)
        if begin != end or spec.nbytes != stop - begin:
            raise LoadError(f"tensor {name!r} has impossible offsets")
        tensors[name] = StoredTensor(spec, begin, number)
        end = stop
    wholes: dict[str, Coded] = {}
    parts_of: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        owner, _, part = name.rpartition(".")
        parts_of.setdefault(owner, {})[part] = tensor
    for name, (dtype, shape) in json.loads(coded).items():
        parts = parts_of.get(name)
        if not parts:
            raise LoadError(f"nothing is written of {name!r}")
        wholes[name] = Coded(TensorSpec(name, _dtypes()[dtype], tuple(map(int, shape))), parts)
    owners = {t.spec.name: whole.spec for whole in wholes.values() for t in whole.parts.values()}
    handed_over = [owners.get(name, t.spec) for name, t in tensors.items()]
    specs = {spec.name: spec for spec in handed_over if spec.name != TOKEN_IDS}
    counts = frozenset(map(_tokens_of, handed_over))
    return _Described(MappingProxyType(tensors), end, MappingProxyType(wholes), specs, counts)


def _tokens_of(spec: TensorSpec) -> int:
    """Tokens of a tensor, where it has something of every token."""
    if spec.name == TOKEN_IDS:
        return spec.shape[-1]
    return spec.shape[-2] if len(spec.shape) > 1 else -1


@lru_cache(maxsize=_REMEMBERED)
def parse_header(encoded: bytes, file_bytes: int) -> Layout:
    """Parses a block file's header (with its 8 bytes of length) and checks all of it. One that was there before is
    known by its bytes, which takes a tenth of the time.

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
    metadata, described = _split_header(encoded)
    if metadata["format"] != FORMAT_VERSION:
        raise LoadError(f"block format {metadata['format']!r} is not {FORMAT_VERSION!r}")
    proofs = json.loads(metadata["proofs"])
    found = _parse_described(described, metadata.get("coded", "{}"))
    begin = 8 + header_bytes
    if file_bytes != begin + found.nbytes:
        raise LoadError(f"the file has {file_bytes} bytes, its header needs {begin + found.nbytes}")
    if proofs.keys() != found.tensors.keys():
        raise LoadError("not every tensor has its checksum")
    count = int(metadata["token_count"])
    if found.tensors[TOKEN_IDS].spec != TensorSpec(TOKEN_IDS, _dtypes()["I64"], (count,)):
        raise LoadError("the token ids are not as the header says")
    state = metadata.get("state")
    if state is None and found.token_counts != {count}:
        raise LoadError("a tensor does not have one row per token")
    meta = BlockMeta(
        key=bytes.fromhex(metadata["key"]),
        parent=bytes.fromhex(metadata["parent"]),
        fingerprint=metadata["fingerprint"],
        start=int(metadata["first_position"]),
        tokens=b"\0\0\0\0" * count,  # placeholder of the right length until the reader has the ids
        codec=metadata["codec"],
        continues=bytes.fromhex(metadata.get("continues", "")),
        state=state,
    )
    if meta.start < 0 or len(meta.key) != 32 or len(meta.parent) != 32:
        raise LoadError("the header's metadata are none")
    salt = bytes.fromhex(metadata.get("salt", ""))
    by = metadata.get("coded_by", meta.codec)
    return Layout(meta, found.tensors, found.coded, found.specs, begin, MappingProxyType(proofs), file_bytes, by, salt)
