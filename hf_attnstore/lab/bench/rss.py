"""Peak resident memory of one resumed turn, each in a process of its own.

What makes the comparison fair:

- Every process imports the same modules, loads the same model and warms it up with a few tokens.
- Only the turn itself counts: the kernel's high-water mark is reset just before it (where the kernel
  allows that), so neither loading the model nor filling the kept cache can be the peak. What they leave
  behind counts.
- `kept` gets its history from a file, tensor by tensor straight into its own memory: a prefill or a mapped
  file would leave a peak that a kept cache does not have.
- `memory` holds the history twice, in the memory tier and in the cache, as it does in use. Its tier is
  filled by a turn from disk before.
- `disk` begins with an empty memory tier.

`getrusage` is not used for it on Linux: there, a new process inherits the peak of the one that started it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_attnstore.lab.bench.shapes import BenchError, ModelSpec

MODES: dict[str, str] = {
    "kept": "DynamicCache kept in memory",
    "memory": "store, from memory",
    "disk": "store, from disk",
    "recompute": "recompute",
}


@dataclass(frozen=True)
class Rss:
    """Resident memory of one process, in bytes.

    Attributes:
        loaded: with the model loaded and warm, before there is any KV.
        before: just before the turn: with a kept cache or a filled memory tier, where there is one.
        peak: the highest during the turn.
        gpu_peak: bytes of device memory at most, 0 without a GPU.
        blocks: just before the turn, in the memory tier.
        buffers: just before the turn, waiting to be used by layers again.
    """

    loaded: int
    before: int
    peak: int
    gpu_peak: int = 0
    blocks: int = 0
    buffers: int = 0


@dataclass(frozen=True)
class RssJob:
    """What a child process is to run; the ids come from the seed again."""

    model: ModelSpec
    mode: str
    history: int
    new: int
    decode: int
    seed: int
    block_size: int
    kv_bytes: int
    folder: str
    threads: int
    tokens: tuple[int, ...]


def measure_rss(job: RssJob) -> Rss:
    """Run one turn in a fresh process and return its memory.

    Args:
        job: its folder is the one that `measure` left: a closed store and the file of a kept cache.

    Raises:
        BenchError: the process failed, or gave other tokens than `job.tokens`.
    """
    with tempfile.TemporaryDirectory(prefix="attnstore-rss-") as temporary:
        request, answer = Path(temporary) / "job.json", Path(temporary) / "rss.json"
        request.write_text(json.dumps(asdict(job)))
        done = subprocess.run(  # noqa: S603 (our own interpreter and module)
            [sys.executable, "-m", "hf_attnstore.lab.bench.rss", str(request), str(answer)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        if done.returncode or not answer.exists():
            tail = "\n".join(done.stderr.strip().splitlines()[-8:])
            raise BenchError(f"The process that measures memory ({job.mode}) ended with {done.returncode}:\n{tail}")
        return Rss(**json.loads(answer.read_text()))


def _child(job: RssJob) -> Rss:
    import torch

    from hf_attnstore import AttentionStore, AttentionStoreCache, detach
    from hf_attnstore.cache.layers.buffers import host_buffers
    from hf_attnstore.lab.bench import baselines
    from hf_attnstore.lab.bench.measure import memory_cap
    from hf_attnstore.lab.bench.methods import SESSION, check_reuse
    from hf_attnstore.lab.bench.shapes import load_model, random_ids
    from hf_attnstore.lab.bench.timing import timed_generate

    torch.set_num_threads(job.threads)
    blocks = buffers = 0
    model = load_model(job.model)
    ids = random_ids(model, job.history + job.new, (job.seed, job.history))
    folder = Path(job.folder)
    with torch.inference_mode():
        timed_generate(model, ids[:, :8], 2, lambda: None)
        gc.collect()
        loaded = _status("VmRSS")
        if job.mode in ("kept", "recompute"):
            cache = None
            if job.mode == "kept":
                tensors = baselines.read_safetensors_lean(folder / "kept.safetensors")
                cache = baselines.cache_of(model, tensors, job.history)
                del tensors
            before = _reset_peak()
            sample, _ = timed_generate(model, ids, job.decode, lambda: cache)
            peak = _status("VmHWM")
        else:
            with AttentionStore(
                folder / "store", memory=memory_cap(job.kv_bytes), disk="1TiB", on_device=0, block_size=job.block_size
            ) as store:

                def resumed() -> AttentionStoreCache:
                    return AttentionStoreCache(model, SESSION, store, save=False, gate=False)

                if job.mode == "memory":
                    timed_generate(model, ids, 0, resumed)
                    store.flush()  # the blocks come into the memory tier behind the turn
                before = _reset_peak()
                blocks, buffers = int(store.stats()["memory_bytes"]), host_buffers.idle_bytes
                sample, turn = timed_generate(model, ids, job.decode, resumed)
                peak = _status("VmHWM")
                check_reuse(turn, f"memory of a turn, {job.mode}", job.history, job.kv_bytes, job.mode)
                detach(model)
    if job.tokens and sample.tokens != tuple(job.tokens):
        raise BenchError(f"memory of a turn, {job.mode}: WRONG TOKENS, other than in the timed turns.")
    gpu = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else 0
    return Rss(loaded, before, peak, gpu, blocks, buffers)


def _reset_peak() -> int:
    """Set the high-water mark to what is resident now, and return that, in bytes."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # Not Linux, or not allowed: then the peak is that of the whole process.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> int:
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    if field == "VmRSS":
        return int(psutil.Process().memory_info().rss)
    import resource

    # macOS counts bytes, others kilobytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _read_job(raw: dict[str, Any]) -> RssJob:
    raw["model"] = ModelSpec(**raw["model"])
    raw["tokens"] = tuple(raw["tokens"])
    return RssJob(**raw)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(_child(_read_job(json.loads(Path(sys.argv[1]).read_text()))))))
