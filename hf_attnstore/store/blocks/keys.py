"""Names for content: block keys, which chain, and codes by which similar beginnings sort together.

All digests are BLAKE2b. With a `secret` they are keyed: who does not have it can neither make the name of a text to
see whether it is in the store, nor tell anything from a name but equality.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

from ...lazy import np

RAW = "raw"
"""The codec that stores tensors as they are."""

APART = "+windows"
"""What a codec's name ends with where windows of sliding layers are blocks of their own (`window_key`)."""

Key = bytes
"""32 bytes naming a block and, as a chain, the whole prefix that ends with it."""


def encode_tokens(ids: Sequence[int] | np.ndarray) -> bytes:
    """Token ids as big-endian 32-bit integers."""
    return np.ascontiguousarray(ids, dtype=">u4").tobytes()


def decode_tokens(encoded: bytes) -> np.ndarray:
    """The ids `[tokens]` (int64) behind `encode_tokens`."""
    return np.frombuffer(encoded, dtype=">u4").astype(np.int64)


def common_prefix(a: bytes, b: bytes) -> int:
    """Number of leading tokens on which two encodings agree."""
    length = min(len(a), len(b)) // 4
    differ = np.frombuffer(a, ">u4", length) != np.frombuffer(b, ">u4", length)
    return int(differ.argmax()) if differ.any() else length


_LENGTH = struct.Struct("<Q").pack
_KEY_LENGTH = _LENGTH(32)


def _digest(kind: bytes, secret: bytes, *parts: bytes) -> Key:
    joined = b"".join([piece for part in parts for piece in (_LENGTH(len(part)), part)])
    return hashlib.blake2b(joined, digest_size=32, person=kind, key=secret).digest()


def chain_root(fingerprint: str, namespace: str, codec: str = RAW, secret: bytes = b"") -> Key:
    """The parent of every first block of one model, namespace and codec. Chains of different roots never meet."""
    return _digest(b"attnstore-root", secret, fingerprint.encode(), namespace.encode(), codec.encode())


def cut_root(root: Key, parts: Iterable[tuple[Key, int, int]], secret: bytes = b"") -> Key:
    """The parent of the first block after KV that was put together from `parts` (block, start, stop) of chains
    below `root`. It is no block's key, and no plain chain's root."""
    encoded = [key + struct.pack("<QQ", start, stop) for key, start, stop in parts]
    return _digest(b"attnstore-cut", secret, root, *encoded)


def state_root(before: Key, secret: bytes = b"") -> Key:
    """The parent of the checkpoints within the block that follows `before`. It is no block's key."""
    return _digest(b"attnstore-state", secret, before)


def window_root(block: Key, secret: bytes = b"") -> Key:
    """The parent of what the layers with a sliding window have of a block's tokens. It is no block's key."""
    return _digest(b"attnstore-window", secret, block)


def window_key(block: Key, secret: bytes = b"") -> Key:
    """The name of what the layers with a sliding window have of a block's tokens, where that is a block of its own."""
    return block_key(window_root(block, secret), b"", secret)


def input_root(root: Key, part: str, digest: bytes, secret: bytes = b"") -> Key:
    """The parent of first blocks whose KV depends, beside the model that `root` stands for, on an input that their
    ids do not name. `part` tells apart what is kept under the same `digest` of that input."""
    return _digest(b"attnstore-input", secret, root, part.encode(), digest)


def block_key(parent: Key, tokens: bytes, secret: bytes = b"") -> Key:
    """The key of the block that follows `parent` and holds `tokens` (as from `encode_tokens`)."""
    joined = _KEY_LENGTH + parent + _LENGTH(len(tokens)) + tokens  # as in `_digest`: this one is needed often
    return hashlib.blake2b(joined, digest_size=32, person=b"attnstore-block", key=secret).digest()


def name_digest(kind: str, *names: str, secret: bytes = b"") -> bytes:
    """32 bytes that stand for a session or a namespace where its name must not be seen, or not become a path."""
    return _digest(b"attnstore-name", secret, kind.encode(), *(name.encode() for name in names))


def prefix_codes(tokens: bytes, secret: bytes = b"") -> bytes:
    """One byte for each token, which depends on it and all before it.

    Two codes share a beginning where their tokens do, and almost never go on sharing it: in an ordered index the
    neighbours of a text's codes are those of the texts that share the longest beginning with it. It takes a quarter
    of the room of the ids, and does not give them away.
    """
    hasher = hashlib.blake2b(digest_size=1, person=b"attnstore-prefix", key=secret)
    codes = bytearray()
    for place in range(0, len(tokens), 4):
        hasher.update(tokens[place : place + 4])
        codes += hasher.copy().digest()
    return bytes(codes)


def common_codes(a: bytes, b: bytes) -> int:
    """Number of leading codes on which two agree."""
    length = min(len(a), len(b))
    differ = np.frombuffer(a, np.uint8, length) != np.frombuffer(b, np.uint8, length)
    return int(differ.argmax()) if differ.any() else length
