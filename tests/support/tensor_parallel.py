"""What each of two ranks does in the tests of tensor parallelism. On the CPU."""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_attnstore import AttentionStore, AttentionStoreCache, AttentionStoreError, SessionNotFoundError, attach, detach
from hf_attnstore.cache import loads

from .tiny_models import make_model, tokens
from .turns import Reference, assert_reused, assert_same, follow_up, turn

RANKS = 2
SECONDS = 60
"""After which a collective that the other rank does not join is an error."""


def run(number: int, stages: list[Callable[..., None]], folder: str, port: int) -> None:
    """The life of a process."""
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(
        "gloo", rank=number, world_size=RANKS, timeout=datetime.timedelta(seconds=SECONDS)
    )
    try:
        model = by_plan(folder)
        for stage in stages:
            stage(number, model, folder)
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def by_plan(folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(f"{folder}/model", tp_plan="auto").eval()


def by_hand() -> Any:
    """Sharded with torch's own means, as a user would who has no plan."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = make_model("llama-gqa")
    plan = {name: ColwiseParallel() for name in ("q_proj", "k_proj", "v_proj")}
    for layer in model.model.layers:
        parallelize_module(layer.self_attn, init_device_mesh("cpu", (RANKS,)), {**plan, "o_proj": RowwiseParallel()})
    return model


def opened(folder: str) -> AttentionStore:
    return AttentionStore(f"{folder}/store", block_size=16)


def first_turn(number: int, model: Any, folder: str) -> None:
    with opened(folder) as store:
        cache = AttentionStoreCache(model, "alice", store)
        sequence = turn(model, tokens(50), cache).sequences
        assert cache.reused_tokens == 0
        assert cache.layers[0].keys.shape[1] == 1  # of two heads
    assert torch.equal(sequence, Reference(model).turn(tokens(50)).sequences)


def after_a_restart(number: int, model: Any, folder: str) -> None:
    reference = Reference(model)
    prompt = follow_up(reference.turn(tokens(50)).sequences, 6, 2)
    with opened(folder) as store:
        cache = AttentionStoreCache(model, "alice", store)
        assert_same(turn(model, prompt, cache), reference.turn(prompt))
        assert_reused(cache, prompt, 55)
        assert cache.stats.loaded_bytes == 55 * 2 * 2 * 12 * 4  # of this rank's head alone
        assert cache.stats.recomputed == ""
        store.flush()
        torch.distributed.barrier()
        assert [session.name for session in store.sessions()] == ["alice"]
        assert store.session_count() == 1
        again = AttentionStoreCache(model, "alice", store)
        assert again.resume().shape[1] == 67


def _own_blocks(model: Any, folder: str) -> list[Path]:
    """This rank's block files, oldest first."""
    from hf_attnstore.cache.identity.fingerprint import Fingerprint

    found = Path(f"{folder}/store/blocks").glob(f"{Fingerprint(model).current()}/*/*.safetensors")
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def _harmed(number: int, model: Any, folder: str, harm: Callable[[Path], object], session: str) -> None:
    """Something happens to a block of the second rank only; the prompt is computed again from there by both."""
    reference = Reference(model)
    with opened(folder) as store:
        sequence = turn(model, tokens(50, 7), AttentionStoreCache(model, session, store)).sequences
    before = len(_own_blocks(model, folder))
    assert before >= 4
    if number == 1:
        with opened(folder) as store:
            second = store.manifest(f"{session}\x1f1").spans[1].block
        (path,) = (p for p in _own_blocks(model, folder) if p.stem == second.hex())
        harm(path)
    torch.distributed.barrier()
    with opened(folder) as store:
        prompt = follow_up(sequence, 6, 2)
        reference.turn(tokens(50, 7))
        cache = AttentionStoreCache(model, session, store)
        ours = turn(model, prompt, cache)
        assert torch.equal(ours.sequences, reference.turn(prompt).sequences)
        assert_reused(cache, prompt, 16)
        store.flush()
        torch.distributed.barrier()
        cache = AttentionStoreCache(model, session, store)
        turn(model, prompt, cache)
        assert_reused(cache, prompt, 61)


def a_block_is_gone(number: int, model: Any, folder: str) -> None:
    _harmed(number, model, folder, lambda path: path.unlink(), "gone")


def a_block_is_damaged(number: int, model: Any, folder: str) -> None:
    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 100] = bytes(100)
        path.write_bytes(content)

    with opened(folder) as store:
        if number == 0:
            store.delete("gone")
        torch.distributed.barrier()
    _harmed(number, model, folder, harm, "damaged")


def one_rank_is_busy(number: int, model: Any, folder: str) -> None:
    with opened(folder) as store:
        lock = store.lock_session("bob", 0) if number == 0 else None
        cache = AttentionStoreCache(model, "bob", store)
        with pytest.raises(AttentionStoreError, match="another turn" if number == 0 else "another rank"):
            turn(model, tokens(30), cache)
        if lock is not None:
            lock.release()
        torch.distributed.barrier()
        sequence = turn(model, tokens(30), cache).sequences
        assert torch.equal(sequence, turn(model, tokens(30), None).sequences)
        reused = store.stats()["reused_tokens"]
        attach(model, store)
        prompt = follow_up(sequence, 5, 3)
        assert torch.equal(turn(model, prompt, None).sequences, Reference(model).turn(prompt).sequences)
        assert store.stats()["reused_tokens"] == reused + 35
        detach(model)


def one_rank_can_not_identify_its_weights(number: int, model: Any, folder: str) -> None:
    with opened(folder) as store:
        turn(model, tokens(30, 5), AttentionStoreCache(model, "carol", store))
        cache = AttentionStoreCache(model, "carol", store)
        if number == 1:
            cache._setup.attachment.fingerprint._watch.look = lambda *_: 1 / 0  # type: ignore[method-assign]
        ours = turn(model, tokens(30, 5), cache)
        assert_reused(cache, tokens(30), 0)
        assert torch.equal(ours.sequences, turn(model, tokens(30, 5), None).sequences)
        cache._setup.attachment.fingerprint._watch.__dict__.pop("look", None)


def out_of_the_window(number: int, model: Any, folder: str) -> None:
    with opened(folder) as store:
        ids, find = tokens(40, 9), loads.find
        for step in range(4):
            cache = AttentionStoreCache(model, "dave", store, window=64)
            if step == 3 and number == 1:  # what one rank knows of the conversation, the other does not
                loads.find = lambda turn, view, ids: []  # in this process only
                store.latest_manifest = lambda name: None  # type: ignore[method-assign]
            ids = follow_up(turn(model, ids, cache).sequences, 10, step)
            loads.find = find
            told = torch.tensor([cache.reused_tokens, cache.stats.dropped_tokens, *ids[0].tolist()])
            both = [torch.zeros_like(told) for _ in range(RANKS)]
            torch.distributed.all_gather(both, told)
            assert torch.equal(*both)
            assert cache.stats.truncation == ("", "", "rotated", "recomputed")[step]


def deleted_by_one_rank(number: int, model: Any, folder: str) -> None:
    with opened(folder) as store:
        if number == 0:
            store.rename("alice", "other")
            store.fork("other", "copy")
            store.delete("other")
        torch.distributed.barrier()
        assert "copy" in [session.name for session in store.sessions()]
        assert len(store.tokens("copy\x1f1")) == 67
        torch.distributed.barrier()
        if number == 0:
            for session in store.sessions():
                store.delete(session.name)
        torch.distributed.barrier()
        for name in ("copy", "copy\x1f1", "alice\x1f1"):
            with pytest.raises(SessionNotFoundError):
                store.session(name)


def sharded_by_hand(number: int, model: Any, folder: str) -> None:
    model, folder = by_hand(), f"{folder}/hand"
    first_turn(number, model, folder)
    torch.distributed.barrier()
    after_a_restart(number, model, folder)
