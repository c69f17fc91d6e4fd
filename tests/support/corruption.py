"""Faults in the files of a closed store, and what the store has to make of them: never a wrong token or tensor.

Every function that runs faults returns an `Outcome`, so that a report can be made of them:
`python -m tests.support.corruption` prints one. `ATTNSTORE_TEST_SEED` chooses other samples: the runs with the
seeds from 0 to `STRIDE - 1` together flip something in every byte of a block file's header.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hf_attnstore import AttentionStore, AttentionStoreCache, AttentionStoreError, LoadError
from hf_attnstore.store.blocks.block import Block
from hf_attnstore.store.blocks.format import _with_check, encode_block
from hf_attnstore.store.blocks.keys import Key, chain_root, cut_root, decode_tokens
from hf_attnstore.store.blocks.vault import Vault
from hf_attnstore.store.disk.block_files import BlockFiles
from hf_attnstore.store.records.manifest import Manifest, SpanRow
from hf_attnstore.store.records.session_record import decode_record
from hf_attnstore.store.store import repair_store
from hf_attnstore.store.transfer.stages import Piece, Stage

from .store_blocks import FINGERPRINT, load, make_block, make_chain, same, save
from .tiny_models import BLOCK, make_model, tokens
from .turns import follow_up, turn

SEED = int(os.environ.get("ATTNSTORE_TEST_SEED", "0"))
SIZE = 16
STRIDE = 12
INDEX = "index.sqlite"
LOG = "index.sqlite-wal"


@dataclass
class Outcome:
    """What became of the faults of one kind."""

    fault: str
    tried: int = 0
    wrong: int = 0
    """Faults after which something was not as it has to be: above all a wrong token or tensor."""
    recomputed: int = 0
    """Faults after which something that had been saved had to be computed again, or would have to be."""
    details: list[str] = field(default_factory=list)
    """What was wrong."""

    def add(self, case: object, wrong: list[str], recomputed: bool) -> None:
        """Counts one fault."""
        self.tried += 1
        self.wrong += bool(wrong)
        self.recomputed += recomputed
        self.details += [f"{case}: {what}" for what in wrong]

    def __str__(self) -> str:
        said = f"{self.fault}: {self.tried} tried, {self.wrong} wrong, {self.recomputed} recomputed"
        return "\n  ".join([said, *self.details[:20]])


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@contextmanager
def warnings() -> Iterator[list[str]]:
    """What the package warns of; nothing is printed."""
    logger = logging.getLogger("hf_attnstore")
    listener, propagate = _Listener(), logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield listener.said
    finally:
        logger.removeHandler(listener)
        logger.propagate = propagate


def flipped(content: bytes, bit: int) -> bytes:
    """`content` with one bit changed."""
    altered = bytearray(content)
    altered[bit // 8] ^= 1 << (bit % 8)
    return bytes(altered)


# a store to damage


@dataclass
class Known:
    """A session as it has to be."""

    ids: list[int]
    """With the dropped ones."""
    metadata: list[dict[str, Any]]
    """As it is, and before that as it was earlier."""
    manifest: Manifest
    chain: list[Block]


@dataclass
class Sample:
    """A small store: its files, and what is in them."""

    files: dict[str, bytes]
    sessions: dict[str, Known]
    blocks: dict[Key, Block]

    def put(self, root: Path) -> None:
        """Writes the store, in place of what is there."""
        shutil.rmtree(root, ignore_errors=True)
        put_files(root, self.files)

    def block_files(self) -> list[str]:
        return sorted(name for name in self.files if name.startswith("blocks/"))

    def record_files(self) -> list[str]:
        return sorted(name for name in self.files if name.startswith("sessions/"))

    def file_of(self, key: Key) -> str:
        """Where a block's file is."""
        return next(name for name in self.block_files() if Path(name).stem == key.hex())


def put_files(root: Path, files: dict[str, bytes]) -> None:
    """Writes files into a folder, which is made."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_bytes(content)


def snapshot(root: Path) -> dict[str, bytes]:
    """The files of a store, but for those that a machine makes anew when it starts."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(root)): path.read_bytes() for path in files if not path.name.endswith("-shm")}


def _rows(chain: Iterable[Block]) -> tuple[SpanRow, ...]:
    return tuple(SpanRow(block.meta.key, 0, block.meta.token_count) for block in chain)


def _ids(blocks: Iterable[Block]) -> list[int]:
    return [number for block in blocks for number in decode_tokens(block.meta.tokens).tolist()]


def make_sample(root: Path, *, killed: bool = False, shift: int = 0) -> Sample:
    """A store of three sessions: one of two turns, one that begins like it, and one of which tokens were dropped.

    Args:
        killed: as a process leaves it that is killed when all is written: with a log.
        shift: added to all token ids, for a store with other content.
    """
    shutil.rmtree(root, ignore_errors=True)
    first = [shift + number for number in range(40)]
    longer = [*first, *(shift + 100 + number for number in range(21))]
    short, alice = make_chain(first, SIZE), make_chain(longer, SIZE)
    bob = make_chain([*first[:32], *(shift + 200 + number for number in range(13))], SIZE)
    old = make_chain([shift + 300 + number for number in range(40)], SIZE)
    made_of = [(old[0].meta.key, 0, SIZE), (old[2].meta.key, 0, 8)]
    new_root = cut_root(chain_root(FINGERPRINT, ""), made_of)
    new = make_block(new_root, [shift + 400 + number for number in range(SIZE)], 24)
    new = Block(replace(new.meta, continues=old[2].meta.key), new.tensors)
    cut = Manifest(
        (
            SpanRow(old[0].meta.key, 0, SIZE),
            SpanRow(b"", 0, 0, 0, old[1].meta.tokens),
            SpanRow(old[2].meta.key, 0, 8, -SIZE),
            SpanRow(new.meta.key, 0, SIZE),
        ),
        new_root,
        24,
        56,
    )
    store = AttentionStore(root, block_size=SIZE, io_threads=1)
    save(store, short, "alice")
    store.set_metadata("alice", {"turn": shift + 1})
    save(store, old, "carol")
    save(store, bob, "bob")
    for block in alice[2:]:
        assert store.reserve(block.nbytes, wait=True)
        store.put(block, short[2].meta.key if block is alice[2] else None)
    store.commit("alice", FINGERPRINT, Manifest(_rows(alice), length=len(longer)))
    store.flush()
    store.set_metadata("alice", {"turn": shift + 2})
    save(store, [new])
    store.commit("carol", FINGERPRINT, cut)
    store.flush()
    store.set_metadata("carol", {"title": "a talk", "shift": shift})
    store.flush()
    files = snapshot(root)
    assert LOG in files
    store.close()
    if not killed:
        files = snapshot(root)
    turns = [{"turn": shift + 2}, {"turn": shift + 1}, {}]
    sessions = {
        "alice": Known(longer, turns, Manifest(_rows(alice), length=len(longer)), alice),
        "bob": Known(_ids(bob), [{}], Manifest(_rows(bob), length=45), bob),
        "carol": Known(_ids([*old, new]), [{"title": "a talk", "shift": shift}, {}], cut, [*old, new]),
    }
    blocks = {block.meta.key: block for block in [*short, *alice, *bob, *old, new]}
    return Sample(files, sessions, blocks)


# using a store after a fault


@dataclass
class Use:
    """What came out when a store was used."""

    wrong: list[str] = field(default_factory=list)
    lost: int = 0
    """Answers that were less than what had been saved."""

    def differs(self, what: str, found: object, expected: object) -> None:
        self.wrong.append(f"{what}: {found!r}, not {expected!r}"[:500])


def load_piece(store: AttentionStore, block: Block, start: int, stop: int) -> dict[str, torch.Tensor]:
    """Tokens `[start, stop)` of what the store gives for a block; raises what the load raises."""
    targets = {name: tensor[:, start:stop].clone().zero_() for name, tensor in block.tensors.items()}
    running = store.load([Stage([Piece(block.meta.key, start, stop)], targets)])
    try:
        running.wait(0)
    finally:
        running.finish()
    return targets


def _compare_piece(use: Use, store: AttentionStore, sample: Sample, key: Key, start: int, stop: int, how: str) -> None:
    block = sample.blocks.get(key)
    if block is None:
        use.wrong.append(f"{how} leads to the block {key.hex()}, which was never saved")
        return
    try:
        found = load_piece(store, block, start, stop)
    except LoadError:
        use.lost += 1
        return
    if not all(torch.equal(tensor[:, start:stop], found[name]) for name, tensor in block.tensors.items()):
        use.wrong.append(f"{how} leads to other tensors")


def use_sessions(store: AttentionStore, sample: Sample) -> Use:
    """Asks for all that is known of the sessions of a store. Anything may be missing, nothing may be otherwise."""
    use = Use()
    for name, known in sample.sessions.items():
        try:
            ids = store.tokens(name, dropped=True)
            use.lost += ids != known.ids
            if ids != known.ids[: len(ids)]:
                use.differs(f"tokens of {name}", ids, known.ids)
        except AttentionStoreError:
            use.lost += 1
        try:
            metadata = store.metadata(name)
            use.lost += metadata != known.metadata[0]
            if metadata not in known.metadata:
                use.differs(f"metadata of {name}", metadata, known.metadata)
        except AttentionStoreError:
            use.lost += 1
        try:
            spans = store.manifest(name).spans
        except AttentionStoreError:
            spans = ()
        for span in spans:
            if span.block:
                _compare_piece(use, store, sample, span.block, span.start, span.stop, f"{name}'s manifest")
    try:
        unknown = {info.name for info in store.sessions()} - {*sample.sessions, "dave"}
        if unknown:
            use.wrong.append(f"sessions that nobody made: {unknown}")
    except AttentionStoreError:
        use.lost += 1
    return use


def use_blocks(store: AttentionStore, sample: Sample) -> Use:
    """Looks for blocks by key and by content, and loads what is found."""
    use = Use()
    for name, known in sample.sessions.items():
        keys = [block.meta.key for block in known.chain]
        there = store.known(keys)
        use.lost += there < len(keys)
        for block in known.chain[:there]:
            _compare_piece(use, store, sample, block.meta.key, 0, block.meta.token_count, f"known({name})")
        for block in known.chain:
            asked = [*decode_tokens(block.meta.tokens).tolist(), 7]
            found = store.nearest(block.meta.parent, asked)
            if found is None:
                use.lost += 1
            elif found.key not in sample.blocks or _ids([sample.blocks[found.key]])[: found.common] != asked[:-1]:
                if (
                    found.key in sample.blocks
                    and _ids([sample.blocks[found.key]])[: found.common] == (asked[: found.common])
                ):
                    use.lost += 1  # a block that shares less
                else:
                    use.wrong.append(f"nearest({name}) says {found}, whose tokens are others")
            else:
                _compare_piece(use, store, sample, found.key, 0, found.common, f"nearest({name})")
    return use


def go_on(store: AttentionStore) -> Use:
    """Saves a new session: what it says of itself afterwards is right, if anything."""
    use = Use()
    chain = make_chain([*range(32), 500, 501, 502], SIZE)
    save(store, chain, "dave")
    try:
        ids = store.tokens("dave")
        if ids != _ids(chain)[: len(ids)]:
            use.differs("tokens of what was saved after the fault", ids, _ids(chain))
        store.drop_memory()
        if not same(chain, load(store, chain)):
            use.wrong.append("what was saved after the fault comes back otherwise")
    except AttentionStoreError:
        use.lost += 1
    return use


def use_all(root: Path, sample: Sample) -> Use:
    """Opens a store after a fault and does everything with it. Only errors of the package may come of that."""
    total = Use()
    try:
        with AttentionStore(root, block_size=SIZE, io_threads=1) as store:
            for step in (use_sessions, use_blocks, lambda store, _: go_on(store), use_sessions):
                use = step(store, sample)
                total.wrong += use.wrong
                total.lost += use.lost
    except AttentionStoreError as error:
        total.lost += 1
        if "repair" not in str(error) and "close the other" not in str(error):
            total.wrong.append(f"an error that does not say what to do: {error!r}")
    except Exception as error:
        total.wrong.append(f"{type(error).__name__}: {error}")
    return total


def repaired(root: Path, sample: Sample, *, lost: Iterable[Key] = ()) -> list[str]:
    """Repairs a store. What is not right then: all sessions have to be there, whole up to blocks that are `lost`."""
    gone = set(lost)
    try:
        report = repair_store(root)
        again = repair_store(root, dry_run=True)
    except Exception as error:
        return [f"repairing: {type(error).__name__}: {error}"]
    wrong = [] if report.repaired else ["repairing left something"]
    wrong += [f"after repairing: {problem}" for problem in again.problems]
    try:
        with AttentionStore(root, block_size=SIZE, io_threads=1) as store:
            for name, known in sample.sessions.items():
                ids: list[int] = []
                for span in known.manifest.spans:
                    if span.block in gone:
                        break
                    part = decode_tokens(span.dropped).tolist() if not span.block else _ids([sample.blocks[span.block]])
                    ids += part[span.start : span.stop] if span.block else part
                found = store.tokens(name, dropped=True)
                if found != ids:
                    wrong.append(f"repaired, {name} has {len(found)} tokens of {len(ids)}")
                if store.metadata(name) != known.metadata[0]:
                    wrong.append(f"repaired, {name} has metadata {store.metadata(name)}")
                whole = [block for block in known.chain if block.meta.key not in gone]
                if not same(whole, load(store, whole)):
                    wrong.append(f"repaired, the tensors of {name} are others")
            if {info.name for info in store.sessions()} - {"dave"} != set(sample.sessions):
                wrong.append(f"repaired, the sessions are {[info.name for info in store.sessions()]}")
    except Exception as error:
        wrong.append(f"repaired: {type(error).__name__}: {error}")
    return wrong


# faults in block files

Damage = Callable[[Path], object]


def _use_damaged_block(
    root: Path, sample: Sample, name: str, *, noticed_whole: bool = True, ids_only: bool = False
) -> list[str]:
    """What is not as it has to be with a damaged block file, from its first use to its being saved again.

    Args:
        noticed_whole: whether reading all of the file shows the damage.
        ids_only: only the token ids are damaged. A load reads the KV alone, and may succeed; who asks for the ids
            notices.
    """
    key = bytes.fromhex(Path(name).stem)
    block = sample.blocks[key]
    path = root / name
    wrong: list[str] = []
    if noticed_whole:
        try:
            with BlockFiles(root, Vault()).open(FINGERPRINT, key) as file:
                file.verify()
            wrong.append("verify() finds nothing")
        except LoadError as error:
            if error.transient:
                wrong.append(f"taken for a failure of the disk: {error}")
    with warnings() as said, AttentionStore(root, block_size=SIZE, io_threads=1) as store:
        try:
            found = load_piece(store, block, 0, block.meta.token_count)
            equal = all(torch.equal(tensor, found[name]) for name, tensor in block.tensors.items())
            wrong.append(f"it was loaded, with {'right' if equal else 'WRONG'} tensors")
            if ids_only and equal and store.describe_block(key) is None:
                wrong.pop()
        except LoadError:
            pass
        if path.exists() or not (root / "quarantine" / path.name).exists():
            wrong.append("the file is not in quarantine")
        if not any("recomputed" in line for line in said):
            wrong.append(f"no warning but {said}")
        if store.stats()["rejected"] != 1:
            wrong.append(f"rejected: {store.stats()['rejected']}")
        if store.has(key):
            wrong.append("the block still counts as there")
        save(store, [block])
        store.drop_memory()
        try:
            if not same([block], load(store, [block])):
                wrong.append("saved again, it comes back otherwise")
        except LoadError as error:
            wrong.append(f"saved again, it can't be loaded: {error}")
        problems = [p for p in store.verify().problems if p.kind != "unknown file"]
        wrong += [f"afterwards: {problem}" for problem in problems]
    return wrong


def block_flips(root: Path, sample: Sample, name: str, bits: Iterable[int]) -> Outcome:
    """Single bits of a block file."""
    outcome = Outcome("one bit of a block file")
    content = sample.files[name]
    ids_from = len(content) - 8 * sample.blocks[bytes.fromhex(Path(name).stem)].meta.token_count
    for bit in bits:
        sample.put(root)
        (root / name).write_bytes(flipped(content, bit))
        outcome.add(f"bit {bit}", _use_damaged_block(root, sample, name, ids_only=bit // 8 >= ids_from), True)
    return outcome


def sampled_bits(content: bytes, count: int, seed: int = SEED) -> list[int]:
    """Bits of a block file: one in every `STRIDE`th byte of the header (the seed says which), the rest anywhere."""
    dice = random.Random(seed)
    (length,) = struct.unpack_from("<Q", content)
    places = list(range(seed % STRIDE, 8 + length, STRIDE))
    places += [dice.randrange(8 + length, len(content)) for _ in range(count - len(places))]
    return [8 * place + dice.randrange(8) for place in places]


def _with_header(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A block file whose header says something else, with a right checksum."""
    (length,) = struct.unpack_from("<Q", content)
    fields = json.loads(content[8 : 8 + length])
    del fields["__metadata__"]["check"]
    change(fields)
    header = _with_check(json.dumps(fields, separators=(",", ":")).removeprefix('{"__metadata__":{'))
    return header + content[8 + length :]


def _encoded(block: Block) -> bytes:
    header, chunks = encode_block(block, Vault())
    return header + b"".join(chunk.tobytes() for chunk in chunks)


def block_damages(sample: Sample, name: str, seed: int = SEED) -> dict[str, Damage]:
    """Ways to damage a block file, but for single bits."""
    dice = random.Random(seed)
    content = sample.files[name]
    block = sample.blocks[bytes.fromhex(Path(name).stem)]
    other = next(other for other in sample.block_files() if other != name)
    (length,) = struct.unpack_from("<Q", content)
    stranger = make_block(block.meta.parent, _ids([block]), block.meta.start, fingerprint="e" * 40)
    tensors: dict[str, torch.Tensor] = dict(block.tensors)

    def save_wrong_shape(path: Path) -> None:
        shapes = {name: torch.zeros(3, block.meta.token_count, 5) for name in tensors}
        save_file({**shapes, "token_ids": torch.tensor(_ids([block]))}, path)

    def write(content: bytes) -> Damage:
        return lambda path: path.write_bytes(content)

    damages: dict[str, Damage] = {
        "empty": write(b""),
        "cut in its first 8 bytes": write(content[: dice.randrange(1, 8)]),
        "cut in its header": write(content[: dice.randrange(8, length + 8)]),
        "cut behind its header": write(content[: 8 + length]),
        "without its last byte": write(content[:-1]),
        "with a byte more": write(content + b"\0"),
        "another block's file": write(sample.files[other]),
        "another model's block": write(_encoded(stranger)),
        "another format version": write(
            _with_header(content, lambda fields: fields["__metadata__"].update(format="99"))
        ),
        "another block's key": write(_with_header(content, lambda fields: fields["__metadata__"].update(key="0" * 64))),
        "a header of 2**63 bytes": write(struct.pack("<Q", 2**63) + content[8:]),
        "a header of 2**64 - 1 bytes": write(struct.pack("<Q", 2**64 - 1) + content[8:]),
        "a header as long as the file": write(struct.pack("<Q", len(content) - 8) + content[8:]),
        "a header of no bytes": write(struct.pack("<Q", 0) + content[8:]),
        "a safetensors file of another shape": save_wrong_shape,
        "a safetensors file of the library": lambda path: save_file(
            {**tensors, "token_ids": torch.tensor(_ids([block]))}, path
        ),
        "noise": write(dice.randbytes(len(content))),
        "zeros": write(bytes(len(content))),
        "a page of zeros": write(content[: len(content) // 2] + bytes(len(content) - len(content) // 2)),
    }
    for _ in range(5):
        length = dice.randrange(len(content))
        damages[f"cut to {length} bytes"] = write(content[:length])
    return damages


def block_faults(root: Path, sample: Sample, names: Iterable[str], seed: int = SEED) -> Outcome:
    """Every damage of `block_damages` to some block files."""
    outcome = Outcome("a damaged block file")
    for name in names:
        for kind, damage in block_damages(sample, name, seed).items():
            sample.put(root)
            damage(root / name)
            outcome.add(f"{kind}, {name[-20:]}", _use_damaged_block(root, sample, name), True)
    return outcome


def misfits(root: Path, sample: Sample) -> Outcome:
    """Block files that are right in themselves, with a right key and right ids, but whose tensors do not fit."""
    outcome = Outcome("a block file with tensors that do not fit")
    for name in sample.block_files():
        block = sample.blocks[bytes.fromhex(Path(name).stem)]
        others: dict[str, dict[str, torch.Tensor]] = {
            "more heads": {n: torch.cat([t, t]) for n, t in block.tensors.items()},
            "another dim": {n: torch.cat([t, t], dim=2) for n, t in block.tensors.items()},
            "another dtype": {n: t.to(torch.float16) for n, t in block.tensors.items()},
            "other names": {f"other.{n}": t for n, t in block.tensors.items()},
        }
        for kind, tensors in others.items():
            sample.put(root)
            (root / name).write_bytes(_encoded(Block(block.meta, tensors)))
            wrong = _use_damaged_block(root, sample, name, noticed_whole=False)
            # the index knows the old size, so the check of the whole store may say so
            outcome.add(f"{kind}, {name[-20:]}", wrong, True)
    return outcome


def damaged_blocks_repaired(root: Path, sample: Sample, seed: int = SEED) -> Outcome:
    """Repairing with a damaged block file: everything before it is there, and it is in quarantine."""
    outcome = Outcome("a damaged block file, repaired")
    for name in sample.block_files():
        for index in ("sound", "deleted"):
            sample.put(root)
            content = sample.files[name]
            (root / name).write_bytes(flipped(content, random.Random(seed).randrange(8 * len(content))))
            if index == "deleted":
                (root / INDEX).unlink()
            with warnings():
                wrong = repaired(root, sample, lost=[bytes.fromhex(Path(name).stem)])
            if not (root / "quarantine" / Path(name).name).exists():
                wrong.append("the file is not in quarantine")
            outcome.add(f"{name[-20:]}, index {index}", wrong, True)
    return outcome


# faults in session records


def record_flips(root: Path, sample: Sample, name: str, bits: Iterable[int], *, repair: bool = True) -> Outcome:
    """Single bits of a session's record. With a sound index, repairing writes it anew."""
    outcome = Outcome("one bit of a session record")
    content = sample.files[name]
    for bit in bits:
        wrong: list[str] = []
        altered = flipped(content, bit)
        try:
            decode_record(altered, Vault())
            wrong.append("it is believed")
        except LoadError:
            pass
        if repair:
            sample.put(root)
            (root / name).write_bytes(altered)
            with warnings():
                use = use_all(root, sample)
                wrong += use.wrong
                if use.lost:
                    wrong.append("a damaged record made a difference to the use of the store")
                wrong += repaired(root, sample)
            if (root / name).read_bytes() == altered:
                wrong.append("repairing left the record as it was")
        outcome.add(f"bit {bit}", wrong, False)
    return outcome


def record_and_index(root: Path, sample: Sample, seed: int = SEED) -> Outcome:
    """A damaged record and no index: that session is gone, the others are not."""
    outcome = Outcome("a session record, and the index")
    for name in sample.record_files():
        sample.put(root)
        content = sample.files[name]
        lost = decode_record(content, Vault()).name
        (root / name).write_bytes(flipped(content, random.Random(seed).randrange(8 * len(content))))
        (root / INDEX).unlink()
        others = replace(sample, sessions={n: known for n, known in sample.sessions.items() if n != lost})
        with warnings() as said:
            use = use_all(root, sample)
            wrong = use.wrong + repaired(root, others)
        if not any("quarantine" in line for line in said):
            wrong.append(f"no warning but {said}")
        if not (root / "quarantine" / Path(name).name).exists():
            wrong.append("the record is not in quarantine")
        outcome.add(name, wrong, True)
    return outcome


# faults in the index


def index_fault(root: Path, sample: Sample, damage: Damage, *, use: bool = True) -> tuple[list[str], bool]:
    """Damages a store's index, uses the store, and repairs it.

    Args:
        use: whether it is used before it is repaired.

    Returns:
        What was wrong, and whether something was missing before it was repaired.
    """
    sample.put(root)
    damage(root)
    with warnings():
        found = use_all(root, sample) if use else Use()
        return found.wrong + repaired(root, sample), found.lost > 0


def index_flips(
    root: Path, sample: Sample, bits: Iterable[int], *, file: str = INDEX, skip_unread: bool = False
) -> Outcome:
    """Single bits of the index; every other time it is repaired without having been used.

    Args:
        skip_unread: count a bit that SQLite never looks at as harmless, without more ado.
    """
    outcome = Outcome(f"one bit of {file}" + (", with a log" if LOG in sample.files and file == INDEX else ""))
    content = sample.files[file]
    rows = read_all(content) if skip_unread else None
    for number, bit in enumerate(bits):
        altered = flipped(content, bit)
        if rows is not None and bit >= 800 and read_all(altered) == rows:
            outcome.add(bit, [], False)
            continue
        used = number % 2 == 0
        wrong, lost = index_fault(root, sample, partial(_overwrite, file, altered), use=used)
        outcome.add(f"bit {bit % 8} of byte {bit // 8}, {'used' if used else 'repaired at once'}", wrong, lost)
    return outcome


def _overwrite(name: str, content: bytes, root: Path) -> None:
    (root / name).write_bytes(content)


def read_all(content: bytes) -> list[Any] | None:
    """All that SQLite reads from a database file (without a log); None if it finds something wrong."""
    connection = sqlite3.connect(":memory:")
    connection.text_factory = bytes
    try:
        # as if it never had a log, which a database in memory can't have
        connection.deserialize(content[:18] + b"\1\1" + content[20:])
        if connection.execute("PRAGMA integrity_check").fetchall() != [(b"ok",)]:
            return None
        schema = connection.execute("SELECT * FROM sqlite_master").fetchall()
        tables = [row[1].decode() for row in schema if row[0] == b"table"]
        return [schema, *(connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables)]
    except (sqlite3.Error, UnicodeDecodeError):
        return None
    finally:
        connection.close()


def index_bits(content: bytes, count: int, seed: int = SEED) -> list[int]:
    """Bits of an index: most of them where something is written."""
    dice = random.Random(seed)
    written = [place for place, byte in enumerate(content) if byte]
    places = dice.sample(written, min(count * 3 // 4, len(written)))
    places += [dice.randrange(len(content)) for _ in range(count - len(places))]
    return [8 * place + dice.randrange(8) for place in places]


def log_bits(content: bytes, seed: int = SEED) -> list[int]:
    """Bits of a log: some of its header, and one of each of its frames."""
    dice = random.Random(seed)
    places = [dice.randrange(32) for _ in range(4)]
    places += [frame + dice.randrange(24 + 4096) for frame in range(32, len(content) - 4119, 24 + 4096)]
    return [8 * place + dice.randrange(8) for place in places]


def index_damages(sample: Sample, other: Sample, seed: int = SEED) -> dict[str, Damage]:
    """Ways to damage an index, but for single bits; `other` is a store with other content."""
    dice = random.Random(seed)
    content = sample.files[INDEX]

    def write(content: bytes, name: str = INDEX) -> Damage:
        return partial(_overwrite, name, content)

    damages: dict[str, Damage] = {
        "deleted": lambda root: (root / INDEX).unlink(),
        "emptied": write(b""),
        "noise": write(dice.randbytes(len(content))),
        "short noise": write(dice.randbytes(100)),
        "the right beginning, then noise": write(content[:100] + dice.randbytes(len(content) - 100)),
        "zeros": write(bytes(len(content))),
        "another store's": write(other.files[INDEX]),
        "noise for a log": write(dice.randbytes(50_000), LOG),
        "another store's log": write(other.files.get(LOG, b""), LOG),
    }
    for _ in range(8):
        length = dice.randrange(len(content))
        damages[f"cut to {length} bytes"] = write(content[:length])
    for _ in range(4):
        page = 4096 * dice.randrange(len(content) // 4096)
        damages[f"no page at {page}"] = write(content[:page] + bytes(4096) + content[page + 4096 :])
        damages[f"noise in the page at {page}"] = write(content[:page] + dice.randbytes(4096) + content[page + 4096 :])
    one, two = (4096 * page for page in dice.sample(range(1, len(content) // 4096), 2))
    swapped = bytearray(content)
    swapped[one : one + 4096], swapped[two : two + 4096] = content[two : two + 4096], content[one : one + 4096]
    damages["two pages swapped"] = write(bytes(swapped))
    if LOG in sample.files:
        log = sample.files[LOG]
        damages["without its log"] = lambda root: (root / LOG).unlink()
        damages["deleted, but for its log"] = lambda root: (root / INDEX).unlink()
        for _ in range(8):
            length = dice.randrange(len(log))
            damages[f"log cut to {length} bytes"] = write(log[:length], LOG)
    return damages


def index_faults(root: Path, sample: Sample, other: Sample, seed: int = SEED) -> Outcome:
    """Every damage of `index_damages`, with the store used before it is repaired, and without."""
    outcome = Outcome("a damaged index" + (", with a log" if LOG in sample.files else ""))
    for kind, damage in index_damages(sample, other, seed).items():
        for use in (True, False):
            wrong, lost = index_fault(root, sample, damage, use=use)
            outcome.add(f"{kind}, {'used' if use else 'repaired at once'}", wrong, lost)
    return outcome


def damaged_while_open(root: Path, sample: Sample, cases: int, seed: int = SEED) -> Outcome:
    """Noise in a page of an index that somebody has open, when somebody else opens it too."""
    outcome = Outcome("a damaged index that is in use")
    size = len(sample.files[INDEX])
    for case in range(cases):
        dice = random.Random(1000 * seed + case)
        page = 4096 * dice.randrange(size // 4096)
        sample.put(root)
        lost = 0
        with warnings():
            first = AttentionStore(root, block_size=SIZE, io_threads=1)
            use = use_sessions(first, sample)
            wrong = [*use.wrong, *(["something is missing before the fault"] if use.lost else [])]
            with (root / INDEX).open("r+b") as stream:
                stream.seek(page)
                stream.write(dice.randbytes(4096))
            try:
                with AttentionStore(root, block_size=SIZE, io_threads=1) as second:
                    for step in (use_sessions, use_blocks):
                        use = step(second, sample)
                        wrong += use.wrong
                        lost += use.lost
            except AttentionStoreError as error:
                lost += 1
                if "close the other processes" not in str(error):
                    wrong.append(f"an error that does not say what to do: {error!r}")
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
            try:
                wrong += use_sessions(first, sample).wrong
                wrong += use_blocks(first, sample).wrong
                first.close()
            except Exception as error:
                wrong.append(f"who had it open: {type(error).__name__}: {error}")
            wrong += repaired(root, sample)
        outcome.add(f"noise at {page}", wrong, lost > 0)
    return outcome


# in the middle of a conversation

_FAMILIES = ("llama-gqa", "mistral", "gemma3")
_KEY = "5" * 64


def _open(root: Path, key: str | None) -> AttentionStore:
    return AttentionStore(root, block_size=BLOCK, io_threads=1, encryption_key=key)


def _paths(root: Path, folder: str) -> list[Path]:
    return sorted(path for path in (root / folder).rglob("*") if path.is_file())


def _harm(path: Path, dice: random.Random) -> str:
    """Damages one file in one of many ways."""
    content = path.read_bytes()
    others = [other for other in path.parents[1].rglob(f"*{path.suffix}") if other != path]
    middle = len(content) // 2  # of a block file: beyond its header
    ways: dict[str, bytes | None] = {
        "one bit of": flipped(content, dice.randrange(8 * len(content))),
        "many bits of": bytes(byte ^ (64 * (dice.random() < 0.01)) for byte in content),
        "much in the middle of": content[:middle] + dice.randbytes(len(content) // 4) + content[middle * 3 // 2 :],
        "the end of": content[: dice.randrange(len(content))],
        "all of": None,
        "noise over": content[:100] + dice.randbytes(len(content)),
        "another for": dice.choice(others).read_bytes() if others else b"",
    }
    way = dice.choice(list(ways))
    altered = ways[way]
    if altered is None:
        path.unlink()
    else:
        path.write_bytes(altered)
    return f"{way} {path.suffix}"


def _damage_and_reopen(store: AttentionStore, root: Path, key: str | None, dice: random.Random) -> AttentionStore:
    """One fault in a store in use: the store to go on with."""
    what = dice.choice(["block", "block", "blocks", "record", "index", "index", "log"])
    store.drop_memory()
    if what == "log":  # as if the process had been killed, and what it left were damaged
        files = snapshot(root)
        store.close()
        shutil.rmtree(root)
        put_files(root, files)
        if (root / LOG).exists():
            _harm(root / LOG, dice)
        return _open(root, key)
    if what.startswith("block"):
        for path in dice.sample(_paths(root, "blocks"), 1 if what == "block" else 3):
            _harm(path, dice)
        if dice.random() < 0.5:
            return store
        store.close()
        return _open(root, key)
    store.close()
    _harm(root / INDEX if what == "index" else dice.choice(_paths(root, "sessions")), dice)
    return _open(root, key)


def model_faults(root: Path, cases: int, seed: int = SEED) -> Outcome:
    """Faults at random in the middle of conversations: the tokens are those of plain `generate`."""
    outcome = Outcome("a fault in the middle of a conversation")
    for case in range(cases):
        dice = random.Random(1000 * seed + case)
        family = _FAMILIES[case % len(_FAMILIES)]
        key = _KEY if case % 2 else None
        model, plain = make_model(family), make_model(family)
        shutil.rmtree(root, ignore_errors=True)
        wrong: list[str] = []
        recomputed = False
        with warnings():
            store = _open(root, key)
            try:
                sequence = tokens(50, seed=100 * seed + case)
                for number in range(5):
                    prompt = follow_up(sequence, dice.randrange(3, 25), seed=1000 * seed + 10 * case + number)
                    if number:
                        store = _damage_and_reopen(store, root, key, dice)
                    cache = AttentionStoreCache(model, "alice", store)
                    ours = turn(model, prompt, cache).sequences
                    sequence = turn(plain, prompt, None).sequences
                    if not torch.equal(ours, sequence):
                        wrong.append(f"turn {number} says {ours[0].tolist()}, not {sequence[0].tolist()}")
                    recomputed |= number > 0 and cache.reused_tokens < int(sequence.shape[1]) - 40
                    try:
                        known = store.tokens("alice", dropped=True)
                    except AttentionStoreError:
                        continue
                    if known != sequence[0, : len(known)].tolist():
                        wrong.append(f"after turn {number} the store says {known}")
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
            finally:
                store.close()
        outcome.add(f"{family}, seed {seed}, case {case}", wrong, recomputed)
    return outcome


# all of it


def everything(root: Path, seed: int = SEED) -> list[Outcome]:
    """Runs samples of all faults, in the folder `root`."""
    closed, killed = make_sample(root), make_sample(root, killed=True)
    other = make_sample(root, killed=True, shift=1000)
    block, record = closed.block_files()[0], closed.record_files()[0]
    dice = random.Random(seed)
    record_bits = [dice.randrange(8 * len(closed.files[record])) for _ in range(20)]
    return [
        block_flips(root, closed, block, sampled_bits(closed.files[block], 150, seed)),
        block_faults(root, closed, closed.block_files(), seed),
        misfits(root, closed),
        damaged_blocks_repaired(root, closed, seed),
        record_flips(root, closed, record, record_bits),
        record_and_index(root, closed, seed),
        index_flips(root, closed, index_bits(closed.files[INDEX], 100, seed)),
        index_flips(root, killed, index_bits(killed.files[INDEX], 30, seed)),
        index_flips(root, killed, log_bits(killed.files[LOG], seed), file=LOG),
        index_faults(root, closed, other, seed),
        index_faults(root, killed, other, seed),
        damaged_while_open(root, closed, 20, seed),
        model_faults(root, 10, seed),
    ]


if __name__ == "__main__":
    os.environ["ATTNSTORE_GATE"] = "off"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(*everything(Path(folder) / "store"), sep="\n")
