"""A session as one file that can be taken elsewhere: exported, and imported after all of it was checked.

The file is an ordinary safetensors file: `<block>.<tensor>` for each tensor of each block, `<block>.token_ids`, and in
its metadata what the session consists of. It is never encrypted and names no keys of this store: importing makes the
names anew, for the namespace and the secret of the store that takes it.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...errors import AttentionStoreError, LoadError
from ..blocks.block import TOKEN_IDS, Block, BlockMeta
from ..blocks.format import FORMAT_VERSION
from ..blocks.keys import (
    RAW,
    Key,
    block_key,
    chain_root,
    cut_root,
    decode_tokens,
    encode_tokens,
    name_digest,
    window_key,
    window_root,
)  # fmt: skip
from ..blocks.tensors import as_bytes
from ..blocks.vault import checksum
from ..index.rows import BlockRow
from ..records.manifest import Manifest, SpanRow
from ..records.session_record import SessionRecord
from .disk_store import DiskStore

FORMAT = "hf-attnstore session 1"

_ROOT, _CUT, _ELSEWHERE, _WINDOWS = "root", "cut", "elsewhere", "windows"


@dataclass(frozen=True)
class Exported:
    """What was written, or read."""

    session: str
    blocks: int
    tokens: int
    bytes: int


def export_session(disk: DiskStore, namespace: str, session: str, path: Path) -> Exported:
    """Writes a session, with all of its KV, to a file of its own.

    The whole session is in memory while it is written. The file is private to the user; it is not encrypted.

    Raises:
        SessionNotFoundError: there is no such session.
        AttentionStoreError: a block can't be read, or the file not be written.
    """
    record = disk.index.sessions.record(namespace, session)
    tensors: dict[str, torch.Tensor] = {}
    metas: list[BlockMeta] = []
    for row in _blocks_of(disk, record):
        try:
            with disk.files.open(row.fingerprint, row.key) as file:
                meta = file.read_meta()
                for name, tensor in file.fetch([*file.specs(), TOKEN_IDS]).items():
                    tensors[f"{len(metas)}.{name}"] = tensor
        except LoadError as error:
            disk.failed(row.key, error)
            raise AttentionStoreError(f"session {session!r} can't be exported as a whole: {error}") from error
        metas.append(meta)
    numbers = {meta.key: number for number, meta in enumerate(metas)}
    codec = metas[0].codec if metas else RAW
    root = chain_root(record.fingerprint, namespace, codec, disk.vault.secret)
    content = {
        **({"codec": codec} if codec != RAW else {}),
        "format": FORMAT,
        "layout": FORMAT_VERSION,
        "session": session,
        "fingerprint": record.fingerprint,
        "created": record.created,
        "metadata": record.metadata,
        "base": record.manifest.base,
        "length": record.manifest.length,
        "spans": [
            [numbers[span.block], span.start, span.stop, span.shift]
            if span.block
            else decode_tokens(span.dropped).tolist()
            for span in record.manifest.spans
        ],
        "dropped": [number for number, span in enumerate(record.manifest.spans) if not span.block],
        "blocks": [
            {
                "parent": numbers.get(meta.parent, _parent_kind(meta, root, record.manifest.root, disk.vault.secret)),
                "continues": numbers.get(meta.continues, -1),
                "start": meta.start,
                "fingerprint": meta.fingerprint,
            }
            for meta in metas
        ],
        "sums": {name: checksum([as_bytes(tensor).reshape(-1)]) for name, tensor in tensors.items()},
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    described = {"attnstore": text, "check": checksum([np.frombuffer(text.encode(), np.uint8)])}
    temporary = path.with_name(path.name + ".partial")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600))
        save_file(tensors, temporary, metadata=described)
        temporary.chmod(0o600)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise AttentionStoreError(f"can't write {path}: {error}") from error
    tokens = sum(span.stop - span.start for span in record.manifest.spans)
    return Exported(session, len(metas), tokens, path.stat().st_size)


def _parent_kind(meta: BlockMeta, root: Key, cut: Key, secret: bytes) -> str:
    if meta.key == window_key(meta.continues, secret):
        return _WINDOWS
    return _ROOT if meta.parent == root else _CUT if cut and meta.parent == cut else _ELSEWHERE


def _blocks_of(disk: DiskStore, record: SessionRecord) -> list[BlockRow]:
    """The blocks that a session uses, each after what it follows, and what is kept of their windows apart."""
    keys = list(dict.fromkeys(span.block for span in record.manifest.spans if span.block))
    chosen = set(keys)
    queue = list(keys)
    rows = {}
    while queue:  # what a block follows is needed too, though the window may have left it behind
        key = queue.pop()
        row = disk.index.block(key)
        if row is None:
            continue
        rows[key] = row
        if row.continues not in chosen and disk.index.block(row.continues) is not None:
            chosen.add(row.continues)
            queue.append(row.continues)
    for key in record.owned:
        row = disk.index.block(key)
        if row is not None and row.continues in rows and key == window_key(row.continues, disk.vault.secret):
            rows[key] = row
    depths = _depths(rows)
    return sorted(rows.values(), key=lambda row: (depths[row.key], row.start))


def _depths(rows: Mapping[Key, BlockRow]) -> dict[Key, int]:
    """How many blocks each one follows, itself included."""
    depths: dict[Key, int] = {}
    for key in rows:
        way = []
        while key in rows and key not in depths:
            way.append(key)
            key = rows[key].continues
        for later in reversed(way):
            depths[later] = depths.get(rows[later].continues, 0) + 1
    return depths


@contextmanager
def _imported(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """The content and the open file."""
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            text = described.get("attnstore", "")
            if described.get("check") != checksum([np.frombuffer(text.encode(), np.uint8)]):
                raise AttentionStoreError(f"{path} is not an exported session, or is damaged")
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise AttentionStoreError(f"{path} has format {content['format']!r}; this version reads {FORMAT!r}")
            yield content, file
    except AttentionStoreError:
        raise
    except (SafetensorError, OSError) as error:
        raise AttentionStoreError(f"can't read {path}: {error}") from error
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise AttentionStoreError(f"{path} is damaged ({error!r})") from error


def import_session(
    disk: DiskStore,
    namespace: str,
    path: Path,
    block_size: int,
    session: str | None = None,
    check_name: Callable[[str], str] = str,
) -> Exported:
    """Takes an exported session into a store, after all of it was checked: nothing of a file that is damaged is taken.

    Args:
        block_size: of the store.
        session: the name it gets; default is the one it had.
        check_name: raises where a name can't be one.

    Raises:
        AttentionStoreError: the file can't be read, is damaged, or is of another block size; the session exists; or
            there is no room under the store's cap.
    """
    with _imported(path) as (content, file):
        name = check_name(session or content["session"])
        if disk.index.sessions.exists(namespace, name):
            raise AttentionStoreError(f"session {name!r} exists already; delete it first or choose another name")
        names = set(file.keys())
        if names != set(content["sums"]):
            raise AttentionStoreError(f"{path} is damaged: its tensors are not those it should have")
        for tensor in names:
            if checksum([as_bytes(file.get_tensor(tensor).contiguous()).reshape(-1)]) != content["sums"][tensor]:
                raise AttentionStoreError(f"{path} is damaged: the checksum of {tensor} is wrong")
        _check(content, file, names)
        metas = _renamed(content, file, namespace, block_size, disk.vault.secret, path)
        parts = _parts(names)
        for number, meta in enumerate(metas):
            tensors = {tensor: file.get_tensor(f"{number}.{tensor}").contiguous() for tensor in parts[number]}
            if not disk.put(Block(meta, tensors), wanted=True):
                raise AttentionStoreError(f"there is no room for {path} under the store's cap")
        manifest = _manifest(content, metas, namespace, disk.vault.secret)
        counts = {meta.key: meta.token_count for meta in metas}
        record = SessionRecord(
            namespace, name, content["fingerprint"], content["created"], content["created"], content["metadata"],
            manifest, tuple(counts.get(span.block, 0) for span in manifest.spans),
            tuple(m.key for m, block in zip(metas, content["blocks"], strict=True) if block["parent"] == _WINDOWS),
        )  # fmt: skip
        with disk.writing():
            disk.restore(record)
        tokens = sum(span.stop - span.start for span in manifest.spans)
        return Exported(name, len(metas), tokens, path.stat().st_size)


def _check(content: Mapping[str, Any], file: Any, names: set[str]) -> None:
    """Whether the content is such as an export writes, so that nothing in it can do harm.

    Raises:
        ValueError: it is not.
    """
    lengths = [len(file.get_tensor(f"{number}.{TOKEN_IDS}")) for number in range(len(content["blocks"]))]
    for name in names:
        place, _, tensor = name.partition(".")
        shape = file.get_slice(name).get_shape()
        tokens = shape[0] if tensor == TOKEN_IDS and len(shape) == 1 else shape[1] if len(shape) == 3 else -1
        if tokens != lengths[int(place)] or not tokens or int(place) < 0:
            raise ValueError(f"the shape of {name}")
    for number, block in enumerate(content["blocks"]):
        parent, continues, start = block["parent"], block["continues"], block["start"]
        ordered = parent in (_ROOT, _CUT, _ELSEWHERE) or (type(parent) is int and 0 <= parent < number)
        ordered = ordered or (parent == _WINDOWS and continues != -1)
        if not ordered or type(continues) is not int or not -1 <= continues < number:
            raise ValueError(f"what block {number} follows")
        if type(start) is not int or start < 0 or block["fingerprint"] != content["fingerprint"]:
            raise ValueError(f"block {number}")
    if not re.fullmatch("[0-9a-f]{16,128}", content["fingerprint"]):  # it becomes the name of a folder
        raise ValueError("the fingerprint")
    for number, span in enumerate(content["spans"]):
        if not all(type(part) is int for part in span):
            raise ValueError(f"span {number}")
        if number not in content["dropped"] and not 0 <= span[0] <= span[0] + span[1] < span[0] + span[2]:
            raise ValueError(f"span {number}")
        if number not in content["dropped"] and span[2] > lengths[span[0]]:
            raise ValueError(f"span {number}")
    if not isinstance(json.loads(content["metadata"]), dict) or not isinstance(content["session"], str):
        raise ValueError("the session")
    if type(content["base"]) is not int or type(content["length"]) is not int or content["created"] < 0:
        raise ValueError("the session's numbers")


def _parts(names: Iterable[str]) -> dict[int, list[str]]:
    """The tensors of each block, by its number, without its ids: layer by layer, as the file of a block has them."""

    def place(name: str) -> tuple[Any, ...]:
        return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))

    parts: defaultdict[int, list[str]] = defaultdict(list)
    for name in sorted(names, key=place):
        number, _, tensor = name.partition(".")
        if tensor != TOKEN_IDS:
            parts[int(number)].append(tensor)
    return parts


def _renamed(
    content: Mapping[str, Any], file: Any, namespace: str, block_size: int, secret: bytes, path: Path
) -> list[BlockMeta]:
    """The blocks of a file, under the names that they have in this store."""
    codec = content.get("codec", RAW)
    root = chain_root(content["fingerprint"], namespace, codec, secret)
    metas: list[BlockMeta] = []
    for number, block in enumerate(content["blocks"]):
        ids = file.get_tensor(f"{number}.{TOKEN_IDS}").numpy()
        if len(ids) > block_size:
            raise AttentionStoreError(
                f"{path} has blocks of {len(ids)} tokens, the store those of {block_size}; import it into a store "
                f"made with block_size={len(ids)}"
            )
        tokens = encode_tokens(ids)
        parent = block["parent"]
        continues = metas[block["continues"]].key if block["continues"] >= 0 else b""
        if isinstance(parent, int):
            before = metas[parent].key
        elif parent == _ROOT:
            before = root
        elif parent == _CUT:
            before = _cut(content, metas, root, secret)
        elif parent == _WINDOWS:
            before = window_root(continues, secret)
        else:  # what came before was left behind: nothing else begins like that
            before = name_digest("elsewhere", content["session"], str(number), str(block["start"]), secret=secret)
        key = window_key(continues, secret) if parent == _WINDOWS else block_key(before, tokens, secret)
        metas.append(BlockMeta(key, before, block["fingerprint"], block["start"], tokens, codec, continues))
    return metas


def _spans(content: Mapping[str, Any], metas: list[BlockMeta]) -> list[SpanRow]:
    dropped = set(content["dropped"])
    return [
        SpanRow(b"", 0, 0, 0, encode_tokens(span))
        if number in dropped
        else SpanRow(metas[span[0]].key if span[0] < len(metas) else b"?", *span[1:])  # `_cut` sees those there are
        for number, span in enumerate(content["spans"])
    ]


def _cut(content: Mapping[str, Any], metas: list[BlockMeta], root: Key, secret: bytes) -> Key:
    """The root of the chain that goes on after the session's last truncation."""
    parts: list[SpanRow] = []
    position = 0
    for span in _spans(content, metas):
        if not span.block or position >= content["base"]:
            continue
        position += span.stop - span.start
        last = parts[-1] if parts else None
        if last is not None and (last.block, last.stop, last.shift) == (span.block, span.start, span.shift):
            parts[-1] = replace(last, stop=span.stop)  # it was written in two: tokens were dropped between
        else:
            parts.append(span)
    return cut_root(root, [(part.block, part.start, part.stop) for part in parts], secret)


def _manifest(content: Mapping[str, Any], metas: list[BlockMeta], namespace: str, secret: bytes) -> Manifest:
    base = content["base"]
    root = chain_root(content["fingerprint"], namespace, content.get("codec", RAW), secret)
    manifest = Manifest(tuple(_spans(content, metas)), b"", base, content["length"])
    return replace(manifest, root=_cut(content, metas, root, secret)) if base else manifest
