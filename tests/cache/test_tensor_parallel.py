"""Tensor parallelism: each rank keeps its own share, and all of them reuse the same."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import fresh
from support import tensor_parallel as ranks
from support.ports import free_port
from support.tiny_models import make_model

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="torch without gloo"
)


def alive(stages: list[Callable[..., None]], folder: Path) -> None:
    """Two ranks go through the stages; both end well, and in time."""
    port = free_port()
    names = ", ".join(f"ranks.{stage.__name__}" for stage in stages)
    script = (
        "import sys\nfrom support import tensor_parallel as ranks\n"
        f"ranks.run(int(sys.argv[1]), [{names}], sys.argv[2], {port})\n"
    )
    processes = [
        fresh.Process([sys.executable, "-c", script, number, folder], stdout=2) for number in range(ranks.RANKS)
    ]
    deadline = time.monotonic() + 3 * ranks.SECONDS
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            assert time.monotonic() < deadline, "the ranks wait for each other"
            time.sleep(0.02)
        assert codes == [0] * ranks.RANKS
    finally:
        for process in processes:
            process.kill()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make_model("llama-gqa")
    # transformers 5.17 shares out a vocabulary in equal parts only
    model.resize_token_embeddings(pad_to_multiple_of=ranks.RANKS, mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    return tmp_path


def test_ranks_take_up_a_conversation_and_agree_on_what_one_of_them_lost(folder: Path) -> None:
    alive([ranks.first_turn], folder)
    alive(
        [
            ranks.after_a_restart,
            ranks.a_block_is_gone,
            ranks.a_block_is_damaged,
            ranks.one_rank_is_busy,
            ranks.one_rank_can_not_identify_its_weights,
            ranks.out_of_the_window,
            ranks.deleted_by_one_rank,
            ranks.sharded_by_hand,
        ],
        folder,
    )
