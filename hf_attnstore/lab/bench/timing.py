"""One timed `generate`: when each token came, and the plain record of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from transformers import Cache, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from hf_attnstore.cache.model.argument import as_generate_takes

CacheT = TypeVar("CacheT", bound=Cache | None)


@dataclass(frozen=True)
class Sample:
    """One turn.

    Attributes:
        ttft: seconds from the call to the first new token. Making the cache object, and reading a
            file into it where a method does that, is part of it.
        decode: seconds per token after the first.
        total: seconds until `generate` returned, what it does after the last token included.
        setup: seconds of `ttft` that went before the call of `generate`.
        tokens: the new token ids.
        load: seconds spent loading KV, or None where nothing is loaded.
        exposed: seconds of `load` during which compute had to wait, or None where nothing is loaded.
        loaded_bytes: bytes of KV loaded.
        faults: pages of memory that the process got from the system before the first new token, or None where that
            is not known. Many of them mean that memory was not there to be used again: they cost more than the copy
            that goes into them.
    """

    ttft: float
    decode: float
    total: float
    setup: float
    tokens: tuple[int, ...]
    load: float | None = None
    exposed: float | None = None
    loaded_bytes: int = 0
    faults: int | None = None


class TokenClock(BaseStreamer):
    """A streamer that notes when each token arrives.

    `generate` hands a streamer the prompt first, then every token as soon as its value is on the host; on a
    GPU that includes waiting for the device, so the times are real without further synchronisation.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        self.faults: int | None = None
        """Page faults of the process until the first token came."""
        self._saw_prompt = False

    def put(self, value: torch.Tensor) -> None:
        if self._saw_prompt:
            self.times.append(time.perf_counter())
            if self.faults is None:
                self.faults = page_faults()
        self._saw_prompt = True

    def end(self) -> None:
        pass


def page_faults() -> int | None:
    """Pages that this process has got from the system without reading them from a disk; None where nobody counts."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def settle(device: torch.device) -> None:
    """What must not fall into a timed region: garbage collection and work still queued on the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_generate(
    model: PreTrainedModel, ids: torch.Tensor, decode: int, make_cache: Callable[[], CacheT]
) -> tuple[Sample, CacheT]:
    """Run one turn greedily and time it.

    Args:
        ids: the whole conversation, `[1, tokens]`.
        decode: tokens to decode after the first one; `decode + 1` are generated.
        make_cache: makes the cache, inside the timed region; None for plain generate.

    Returns:
        The sample, without load figures, and the cache that was used.
    """
    clock = TokenClock()
    settle(model.device)
    faults = page_faults()
    start = time.perf_counter()
    cache = make_cache()
    # Looked up only now: making a cache may put a wrapper around it.
    generate: Callable[..., torch.Tensor] = model.generate  # type: ignore[assignment]
    made = time.perf_counter()
    out = generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=decode + 1,
        do_sample=False,
        streamer=clock,
        **as_generate_takes(model, cache),
    )
    end = time.perf_counter()
    times = clock.times
    per_token = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else float("nan")
    sample = Sample(
        ttft=times[0] - start,
        decode=per_token,
        total=end - start,
        setup=made - start,
        tokens=tuple(out[0, ids.shape[1] :].tolist()),
        faults=clock.faults - faults if clock.faults is not None and faults is not None else None,
    )
    return sample, cache
