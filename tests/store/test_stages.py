"""How the pieces of a stage get to host memory."""

from __future__ import annotations

import pytest
import torch
from support import store_blocks
from support.store_blocks import make_chain, on_disk_only

from hf_attnstore import AttentionStore
from hf_attnstore.errors import LoadError
from hf_attnstore.store.blocks.block import Block, BlockMeta
from hf_attnstore.store.blocks.stored import StoredBlock
from hf_attnstore.store.transfer.stages import Joint, Piece, Stage, Ways

HEADS, DIM = 2, 4


def block(name: bytes, tokens: int, rows: int | None = None) -> Block:
    key = name.ljust(32, b"\0")
    meta = BlockMeta(key, b"p" * 32, "f", 0, b"\0\0\0\0" * tokens)
    shape = (HEADS, tokens if rows is None else rows, DIM)
    return Block(meta, {"keys": torch.rand(shape), "values": torch.rand(shape)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_in_memory_are_put_in_place_to_the_bit(dtype: torch.dtype, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        blocks = [block(b"a", 300), block(b"b", 300), block(b"c", 7)]
        for held in blocks:
            held.tensors = {name: (tensor * 100).to(dtype) for name, tensor in held.tensors.items()}
        pieces = [Piece(blocks[0].meta.key, 0, 300), Piece(blocks[1].meta.key, 5, 100), Piece(blocks[2].meta.key, 0, 7)]
        ways = Ways(pieces, {held.meta.key: ("memory", held) for held in blocks})
        buffers = {name: torch.zeros(HEADS, 450, DIM).to(dtype) for name in ("keys", "values")}
        stage = Stage(pieces, {name: buffer[:, 10:412] for name, buffer in buffers.items()})
        stage.join(ways.runs)
        assert ways.tokens_from == {"memory": 402}
        assert not ways.files
        assert len(ways.runs) == 1
        for name, buffer in buffers.items():
            wanted = [held.tensors[name][:, p.start : p.stop] for held, p in zip(blocks, pieces, strict=True)]
            found = buffer.view(torch.uint8)
            assert torch.equal(found[:, 10:412], torch.cat(wanted, dim=1).view(torch.uint8))
            assert not torch.cat([found[:, :10], found[:, 412:]], dim=1).any(), "nothing else was written to"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [3, 5])
def test_a_block_with_other_tokens_than_its_name_says_moves_none_of_the_others(rows: int) -> None:
    wrong = block(b"a", 4, rows)
    with pytest.raises(LoadError, match="other tokens"):
        Ways([Piece(wrong.meta.key, 0, 4)], {wrong.meta.key: ("memory", wrong)})


def test_what_is_wanted_beyond_a_blocks_end_is_refused() -> None:
    short = block(b"a", 4)
    with pytest.raises(LoadError, match="other tokens"):
        Ways([Piece(short.meta.key, 0, 5)], {short.meta.key: ("memory", short)})


NAMES = tuple(f"layers.{layer}.{name}" for layer in range(store_blocks.LAYERS) for name in ("keys", "values"))


def together(found: Block) -> Block:
    """The block, with its tensors one after the other in memory."""
    parts = torch.cat([found.tensors[name] for name in NAMES]).split(store_blocks.HEADS)
    return Block(found.meta, dict(zip(NAMES, parts, strict=True)))


def test_tensors_that_lie_together_are_one_and_others_are_not() -> None:
    (made,) = make_chain(list(range(4)), 4)
    joined = together(made)
    whole = joined.together(NAMES)
    assert whole is not None
    assert torch.equal(whole, torch.cat([made.tensors[name] for name in NAMES]))
    assert whole.data_ptr() == joined.tensors[NAMES[0]].data_ptr()
    assert joined.together(NAMES) is whole
    tail = joined.together(NAMES[1:])
    assert tail is not None
    assert torch.equal(tail, whole[store_blocks.HEADS :])
    for names in (NAMES[::-1], NAMES[::2], (*NAMES, "layers.9.keys"), ("none",)):
        assert joined.together(names) is None
    assert made.together(NAMES) is None
    single = torch.arange(12.0).view(2, 3, 2)
    odd = Block(made.meta, {"a": single[:1].as_strided((1, 3, 2), (99, 2, 1)), "b": single[1:]})
    assert torch.equal(odd.together(("a", "b")), single), "whatever the stride of a dimension of one is"
    joined = together(made)
    joined.tensors[NAMES[1]] = joined.tensors[NAMES[1]].to(torch.int32)
    assert joined.together(NAMES) is None


@pytest.mark.parametrize("where", ["memory", "disk", "both"])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_stages_that_lie_together_are_put_in_place_once(
    where: str, apart: bool, order: list[int], store: AttentionStore
) -> None:
    chain = make_chain(list(range(14)), 4)
    for held in chain if apart else [together(made) for made in chain]:
        assert store.reserve(held.nbytes, wait=True)
        store.put(held)
    store.flush()
    if where != "memory":
        store._memory.resize(0 if where == "disk" else 2 * chain[0].nbytes)
        assert store.stats()["memory_blocks"] == (0 if where == "disk" else 2)
    pieces = [Piece(made.meta.key, 1 if made is chain[0] else 0, made.meta.token_count) for made in chain]
    heads = store_blocks.HEADS
    whole = torch.zeros(len(NAMES) * heads, 20, store_blocks.DIM)
    target = whole[:, 3:16]
    parts = dict(zip(NAMES, target.split(heads), strict=True))
    stages = [Stage(pieces, {name: parts[name] for name in names}) for names in (NAMES[:2], NAMES[2:])]
    stages[0].joint = Joint(NAMES, target, 2)
    running = store.load(stages)
    expected = torch.cat([torch.cat([made.tensors[name] for made in chain], dim=1) for name in NAMES])[:, 1:]
    try:
        running.wait(order[0])
        there = slice(0, None) if order[0] == 0 else slice(2 * heads, None)
        assert torch.equal(target[there], expected[there])
        assert bool(target[: 2 * heads].any()) == (order[0] == 0)
        target[2 * heads :] += 1  # what has been put in place is the consumer's
        running.wait(order[1])
        expected[2 * heads :] += 1
        assert torch.equal(target, expected)
        assert not torch.cat([whole[:, :3], whole[:, 16:]], dim=1).any()
        assert running.stats.bytes == target.nbytes
        assert sum(running.stats.bytes_from.values()) == target.nbytes
        assert set(running.stats.bytes_from) == ({"memory", "disk"} if where == "both" else {where})
    finally:
        running.finish()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What the kernel is asked to read ahead, file by file."""
    found: list[list[str]] = []
    monkeypatch.setattr(StoredBlock, "will_need", lambda self, names: found.append(list(names)))
    return found


def test_the_kernel_is_asked_for_every_stage_that_is_requested(store: AttentionStore, asked: list[list[str]]) -> None:
    """Whatever it has already: only a file knows that, and benches stand in for it."""
    chain = on_disk_only(store, list(range(12)), 4)
    pieces = [Piece(block.meta.key, 0, 4) for block in chain]
    stages = [
        Stage(pieces, {f"layers.{layer}.keys": torch.zeros(store_blocks.HEADS, 12, store_blocks.DIM)})
        for layer in range(store_blocks.LAYERS)
    ]
    running = store.load(stages)
    try:
        running.request(0)
        assert asked == [["layers.0.keys"]] * 3
        running.request(1)
        assert asked[3:] == [["layers.1.keys"]] * 3
    finally:
        running.finish()


def test_what_is_put_in_place_together_is_asked_for_together(store: AttentionStore, asked: list[list[str]]) -> None:
    chain = on_disk_only(store, list(range(8)), 4)
    target = torch.zeros(len(NAMES) * store_blocks.HEADS, 8, store_blocks.DIM)
    parts = dict(zip(NAMES, target.split(store_blocks.HEADS), strict=True))
    pieces = [Piece(block.meta.key, 0, 4) for block in chain]
    stages = [Stage(pieces, {name: parts[name] for name in names}) for names in (NAMES[:2], NAMES[2:])]
    stages[0].joint = Joint(NAMES, target, 2)
    running = store.load(stages)
    try:
        running.request(0)
        assert asked == [list(NAMES[:2])] * 2 + [list(NAMES[2:])] * 2
        running.request(1)
        assert len(asked) == 4
    finally:
        running.finish()
