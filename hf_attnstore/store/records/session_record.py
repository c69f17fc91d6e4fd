"""Session records: one small file for each session, so that the index can be rebuilt without losing a name.

A record begins with a checksum of what follows: JSON, or in an encrypted store what JSON was sealed to. It is staged in
the transaction that changes the session, and takes the old one's place after the commit; what is about to be deleted
is marked before. So what is staged or marked when a process was killed tells what is to be finished, or dropped.
"""

import base64
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash

from ...errors import LoadError
from ..blocks.keys import Key, decode_tokens, encode_tokens, name_digest
from ..blocks.vault import Vault
from .files import publish_file, stage_file, sync_folder
from .manifest import Manifest, SpanRow

_FORMAT = 1
_SUFFIX = ".session"
_MARKER = ".gone"


@dataclass(frozen=True)
class SessionRecord:
    """A session with everything that belongs to it but the KV."""

    namespace: str
    name: str
    fingerprint: str
    created: float
    last_used: float
    metadata: str
    """JSON."""
    manifest: Manifest
    counts: tuple[int, ...]
    """Tokens of the block of each span; 0 for dropped tokens."""
    owned: tuple[Key, ...]
    """Blocks of earlier branches, which go when the session goes."""


def encode_record(record: SessionRecord, vault: Vault) -> bytes:
    manifest = record.manifest
    content = {
        "format": _FORMAT,
        "namespace": record.namespace,
        "name": record.name,
        "fingerprint": record.fingerprint,
        "created": record.created,
        "last_used": record.last_used,
        "metadata": record.metadata,
        "root": manifest.root.hex(),
        "base": manifest.base,
        "length": manifest.length,
        "spans": [
            [span.block.hex(), span.start, span.stop, span.shift, count]
            if span.block
            else decode_tokens(span.dropped).tolist()
            for span, count in zip(manifest.spans, record.counts, strict=True)
        ],
        "owned": base64.b85encode(b"".join(record.owned)).decode(),
    }
    sealed = vault.seal(json.dumps(content, separators=(",", ":")).encode())
    return xxhash.xxh3_64_hexdigest(sealed).encode() + b"\n" + sealed


def decode_record(encoded: bytes, vault: Vault) -> SessionRecord:
    """Raises:
    LoadError: it is not what was encoded.
    """
    check, _, sealed = encoded.partition(b"\n")
    if check != xxhash.xxh3_64_hexdigest(sealed).encode():
        raise LoadError("the checksum of the session's record is wrong")
    try:
        content = json.loads(vault.unseal(sealed))
        if content["format"] != _FORMAT:
            raise LoadError(f"the session's record has format {content['format']!r}")
        spans: list[SpanRow] = []
        counts: list[int] = []
        for span in content["spans"]:
            if span and isinstance(span[0], str):
                spans.append(SpanRow(bytes.fromhex(span[0]), *span[1:4]))
                counts.append(span[4])
            else:
                spans.append(SpanRow(b"", 0, 0, 0, encode_tokens(span)))
                counts.append(0)
        owned = base64.b85decode(content["owned"])
        return SessionRecord(
            content["namespace"], content["name"], content["fingerprint"], content["created"], content["last_used"],
            content["metadata"],
            Manifest(tuple(spans), bytes.fromhex(content["root"]), content["base"], content["length"]),
            tuple(counts), tuple(owned[at : at + 32] for at in range(0, len(owned), 32)),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise LoadError(f"the session's record is none ({error})") from error


class RecordFiles:
    """The records below a store's folder."""

    suffix = _SUFFIX

    def __init__(self, root: Path, vault: Vault, *, sync: bool) -> None:
        self.folder = root / "sessions"
        self._partial = root / "partial"
        self._vault = vault
        self._sync = sync

    def path(self, namespace: str, name: str) -> Path:
        """A session's name never becomes a path: a digest of it does."""
        digest = name_digest("record", namespace, name, secret=self._vault.secret)[:20].hex()
        return self.folder / digest[:2] / (digest + _SUFFIX)

    def stage(self, record: SessionRecord) -> int:
        """Writes a session's record, which `publish` puts in place. Returns its bytes.

        Raises:
            OSError: from the file system.
        """
        encoded = encode_record(record, self._vault)
        size = stage_file(self._staged(record.namespace, record.name), [encoded], sync=self._sync)
        if self._sync:
            sync_folder(self._partial)
        return size

    def publish(self, namespace: str, name: str) -> None:
        """Puts the staged record in place of the one there was.

        Raises:
            OSError: from the file system; it stays staged.
        """
        publish_file(self._staged(namespace, name), self.path(namespace, name), sync=self._sync)

    def drop(self, namespace: str, name: str) -> None:
        """What is staged is not to be."""
        self._staged(namespace, name).unlink(missing_ok=True)

    def _staged(self, namespace: str, name: str) -> Path:
        return self._partial / self.path(namespace, name).name

    def mark(self, namespace: str, name: str) -> Path:
        """Marks a record that is about to be deleted with its session. Returns the marker.

        Raises:
            OSError: from the file system.
        """
        marker = self._staged(namespace, name).with_suffix(_MARKER)
        stage_file(marker, [self._vault.seal(json.dumps([namespace, name]).encode())], sync=self._sync)
        if self._sync:
            sync_folder(self._partial)
        return marker

    def finish(self, path: Path, last_used: Callable[[str, str], float | None]) -> None:
        """Finishes or drops what a killed process has staged or marked; `last_used` is asked about the session."""
        try:
            if path.suffix == _MARKER:
                namespace, name = json.loads(self._vault.unseal(path.read_bytes()))
                if last_used(namespace, name) is None:
                    self.delete(namespace, name)
            elif path.suffix == _SUFFIX:
                record = decode_record(path.read_bytes(), self._vault)
                if last_used(record.namespace, record.name) == record.last_used:
                    self.publish(record.namespace, record.name)
        except (LoadError, ValueError):  # half written: what it was for has not happened
            pass
        path.unlink(missing_ok=True)

    def read(self, path: Path) -> SessionRecord:
        """Raises:
        LoadError: it can't be read, or is not what was written.
        """
        try:
            encoded = path.read_bytes()
        except OSError as error:
            raise LoadError(f"{path}: {error.strerror}", transient=not isinstance(error, FileNotFoundError)) from error
        record = decode_record(encoded, self._vault)
        if self.path(record.namespace, record.name) != path:
            raise LoadError(f"{path}: this is another session's record")
        return record

    def delete(self, namespace: str, name: str) -> None:
        self.path(namespace, name).unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """All records."""
        return [Path(p) for folder in _folders(self.folder) for p in _files(folder) if p.endswith(_SUFFIX)]


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.path for entry in os.scandir(path) if entry.is_dir(follow_symlinks=False))


def _files(path: str) -> list[str]:
    return sorted(entry.path for entry in os.scandir(path) if entry.is_file(follow_symlinks=False))
