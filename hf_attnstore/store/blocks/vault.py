"""What stands between content and the disk: checksums, or encryption where the store has a key.

Encryption is AES-256-GCM from the `cryptography` package. From the caller's key and the store's salt come three keys
by keyed BLAKE2b: one makes names (see `keys`), one seals small records, one is the parent of the keys of files, of
which every file has its own.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import xxhash

from ...errors import EncryptionKeyError, LoadError
from ...lazy import np
from .block import BlockMeta, Bytes, TensorSpec, identity

KEY_VARIABLE = "ATTNSTORE_KEY"
"""The environment variable that a key is taken from where none is given."""

_SCHEME = "AES-256-GCM"
_NONCE_BYTES = 12
_TAG_BYTES = 16


def checksum(chunks: Iterable[Bytes]) -> str:
    """xxh3-64 (hex) over the chunks one after the other."""
    hasher = xxhash.xxh3_64()
    for chunk in chunks:
        hasher.update(chunk)  # type: ignore[arg-type]
    return hasher.hexdigest()


Closed = tuple[int, TensorSpec, Sequence[Bytes], str]
"""A tensor's number in its file, what it is, its bytes as they were read, and its proof."""


class Guard(Protocol):
    """Makes sure that the tensors of one file are those that were written."""

    def close(self, meta: BlockMeta, number: int, spec: TensorSpec, data: np.ndarray) -> tuple[np.ndarray, str]:
        """What to write for the bytes of a block's tensor, the `number`th of its file, and the proof to keep."""

    def open(self, meta: BlockMeta, read: Iterable[Closed]) -> str:
        """Turns tensors of a block that were read into what was closed, in place. Returns the name of the first that is
        not that, empty if there is none."""


class _Checksums:
    """Finds accidents, not forgeries."""

    def close(self, meta: BlockMeta, number: int, spec: TensorSpec, data: np.ndarray) -> tuple[np.ndarray, str]:
        return data, checksum([data])

    def open(self, meta: BlockMeta, read: Iterable[Closed]) -> str:
        return next((spec.name for _, spec, parts, proof in read if checksum(parts) != proof), "")


class _Encryption:
    """A file's key is used for that file alone, so a counter makes a nonce."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @staticmethod
    def _nonce(number: int) -> bytes:
        return struct.pack(">I8x", number)

    def close(self, meta: BlockMeta, number: int, spec: TensorSpec, data: np.ndarray) -> tuple[np.ndarray, str]:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        encryptor = Cipher(algorithms.AES(self._key), modes.GCM(self._nonce(number))).encryptor()
        encryptor.authenticate_additional_data(identity(meta, spec))
        closed = np.empty_like(data)
        encryptor.update_into(data, closed)  # type: ignore[arg-type]
        encryptor.finalize()
        return closed, encryptor.tag.hex()

    def open(self, meta: BlockMeta, read: Iterable[Closed]) -> str:
        return next((one[1].name for one in read if not self._open(meta, *one)), "")

    def _open(self, meta: BlockMeta, number: int, spec: TensorSpec, parts: Sequence[Bytes], proof: str) -> bool:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        try:
            tag = bytes.fromhex(proof)
            decryptor = Cipher(algorithms.AES(self._key), modes.GCM(self._nonce(number), tag)).decryptor()
            decryptor.authenticate_additional_data(identity(meta, spec))
            for part in parts:
                decryptor.update_into(part, part)  # type: ignore[arg-type]
            decryptor.finalize()
        except (InvalidTag, ValueError):
            return False
        return True


class Vault:
    """A store without encryption: content lies open, checksums find damage."""

    secret = b""
    """Keys the digests in `keys`; empty without encryption."""
    encrypted = False

    def guard(self, salt: bytes) -> Guard:
        """For the file with that salt."""
        if salt:
            raise LoadError("the file is encrypted, the store is not")
        return _Checksums()

    def new_salt(self) -> bytes:
        """For a file that is about to be written."""
        return b""

    def seal(self, data: bytes) -> bytes:
        """A small record for the disk."""
        return data

    def unseal(self, sealed: bytes) -> bytes:
        """The opposite of `seal`.

        Raises:
            LoadError: it is not what was sealed.
        """
        return sealed


class EncryptedVault(Vault):
    """A store whose content is encrypted under a key of the user's."""

    encrypted = True

    def __init__(self, key: bytes, salt: bytes) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError as error:
            raise EncryptionKeyError(
                "encryption needs the cryptography package: pip install 'hf-attnstore[encryption]'"
            ) from error
        self.secret = _derive(key, b"names", salt)
        self._records: Any = AESGCM(_derive(key, b"records", salt))
        self._files = _derive(key, b"files", salt)

    def guard(self, salt: bytes) -> Guard:
        if not salt:
            raise LoadError("the file is not encrypted, the store is")
        return _Encryption(_derive(self._files, b"file", salt))

    def new_salt(self) -> bytes:
        return os.urandom(16)

    def seal(self, data: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + bytes(self._records.encrypt(nonce, data, b""))

    def unseal(self, sealed: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag

        try:
            return bytes(self._records.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], b""))
        except (InvalidTag, ValueError) as error:
            raise LoadError("a record can't be decrypted: it is damaged, or not this store's") from error


def _derive(key: bytes, purpose: bytes, salt: bytes) -> bytes:
    return hashlib.blake2b(salt, digest_size=32, key=key, person=b"attnstore-" + purpose[:6]).digest()


def parse_key(key: str | bytes | None) -> bytes | None:
    """A key of 32 bytes, from the caller (bytes, or a text in hex or base64) or the environment; None if there is none.

    Raises:
        EncryptionKeyError: it is no key.
    """
    if key is None:
        key = os.environ.get(KEY_VARIABLE) or None
    if key is None:
        return None
    if isinstance(key, str):
        text = key.strip()
        try:
            key = bytes.fromhex(text) if len(text) == 64 else base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            key = b""
    if len(key) != 32:
        raise EncryptionKeyError(
            "an encryption key has 32 bytes, given as such or as a text in hex or base64; "
            "`python -c 'import secrets; print(secrets.token_hex(32))'` makes one"
        )
    return key


def common_salt(key: bytes) -> bytes:
    """The salt of stores that share blocks with others under the same key: names made with it are the same in all."""
    return _derive(key, b"common", b"")[:16]


def new_settings(key: bytes | None, *, common: bool = False) -> dict[str, str] | None:
    """What a new store keeps about its encryption; None without a key.

    Args:
        common: names are to be those of all stores of that key, and not its own.
    """
    if key is None:
        return None
    salt = common_salt(key) if common else os.urandom(16)
    return {"scheme": _SCHEME, "salt": salt.hex(), "check": _derive(key, b"check", salt).hex()}


def open_vault(key: bytes | None, settings: dict[str, str] | None, where: object) -> Vault:
    """The vault of the store at `where`, of which `settings` were kept.

    Raises:
        EncryptionKeyError: the key is missing, wrong, or not wanted.
    """
    if settings is None:
        if key is not None:
            raise EncryptionKeyError(
                f"the store {where} is not encrypted: open it without a key (and without {KEY_VARIABLE}), or make a "
                "new store with the key"
            )
        return Vault()
    if key is None:
        raise EncryptionKeyError(f"the store {where} is encrypted: pass encryption_key=, or set {KEY_VARIABLE}")
    if settings["scheme"] != _SCHEME:
        raise EncryptionKeyError(f"the store {where} is encrypted with {settings['scheme']}, which is not known here")
    salt = bytes.fromhex(settings["salt"])
    if not hmac.compare_digest(_derive(key, b"check", salt).hex(), settings["check"]):
        raise EncryptionKeyError(f"the key is not that of the store {where}")
    return EncryptedVault(key, salt)
