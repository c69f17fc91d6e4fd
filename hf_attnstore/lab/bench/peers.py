"""Other ways to go on with a conversation, beside this one: the same model, history and machine, in one run.

Systems compute at different speeds and in different precisions, so that only ratios within each of them are compared: a
resumed turn against one whose KV never left memory, and against computing everything again.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_attnstore.lab.bench.measure import Measured, Workload, measure
from hf_attnstore.lab.bench.shapes import BenchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_attnstore.lab.bench.llama_server import LlamaServer

STEPS = ("first", "kept", "device", "memory", "disk", "torch", "safetensors")
OURS = {
    "device": "hf-attnstore, left in place",
    "memory": "hf-attnstore, from memory",
    "disk": "hf-attnstore, from disk",
    "torch": "torch.save by hand",
    "safetensors": "safetensors by hand",
}
SLOT = "history.bin"


@dataclass
class Row:
    """One way to resume a turn. Lists have one entry per repeat, seconds to the first token."""

    title: str
    system: str
    bytes_per_token: float
    resumed: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    recomputed: list[float] = field(default_factory=list)

    @property
    def against_kept(self) -> float:
        """The median of resumed / kept, repeat by repeat."""
        return statistics.median(a / b for a, b in zip(self.resumed, self.kept, strict=True))

    @property
    def against_recompute(self) -> float:
        """The median of resumed / computed again, repeat by repeat."""
        return statistics.median(a / b for a, b in zip(self.resumed, self.recomputed, strict=True))


def in_transformers(
    model: PreTrainedModel, work: Workload, folder: Path, progress: Callable[[str, int], None]
) -> list[Row]:
    """This library and what people do by hand, on transformers' model; tokens are compared on the way.

    Raises:
        BenchError: as `measure`.
    """
    measured = measure(model, work, folder, progress=progress, steps=STEPS)
    return [_row(measured, key, title) for key, title in OURS.items()]


def _row(measured: Measured, key: str, title: str) -> Row:
    times = {name: [sample.ttft for sample in samples] for name, samples in measured.samples.items()}
    size = 0 if key == "device" else measured.file_bytes if key == "disk" else measured.kv_bytes
    per_token = size / measured.workload.history
    return Row(title, "transformers", per_token, times[key], times["kept"], times["recompute"])


def in_llama_cpp(server: LlamaServer, history: Sequence[int], work: Workload, vocabulary: int) -> Row:
    """The same in llama.cpp's server: a slot that holds the history, one restored from a file, one that is empty.

    Raises:
        BenchError: the server refused, or did not reuse what it should.
    """
    ids = list(history)
    server.answer(ids)
    row = Row("llama.cpp's server, slot from a file", "llama.cpp", server.save(SLOT) / len(ids))
    for repeat in range(-1, work.repeats):
        kept = server.answer([*ids, *_new(work, vocabulary, 3 * repeat)])
        server.erase()
        restoring = server.restore(SLOT)
        resumed = server.answer([*ids, *_new(work, vocabulary, 3 * repeat + 1)])
        for reply in (kept, resumed):
            if reply.reused_tokens != len(ids):
                raise BenchError(f"llama.cpp's server reused {reply.reused_tokens} tokens of {len(ids)}")
        if repeat < 0:  # a warm-up
            continue
        server.erase()
        again = server.answer([*ids, *_new(work, vocabulary, 3 * repeat + 2)])
        row.kept.append(kept.seconds)
        row.resumed.append(restoring + resumed.seconds)
        row.recomputed.append(again.seconds)
        server.restore(SLOT)
    return row


def edited_in_llama_cpp(server: LlamaServer, history: Sequence[int]) -> int:
    """Tokens that its slot reuses of a history whose middle token is another one."""
    ids = list(history)
    server.restore(SLOT)
    ids[len(ids) // 2] += 1
    return server.answer(ids).reused_tokens


def _new(work: Workload, vocabulary: int, seed: int) -> Iterator[int]:
    dice = random.Random(f"{work.seed}/{seed}")
    return (dice.randrange(3, vocabulary) for _ in range(work.new))
