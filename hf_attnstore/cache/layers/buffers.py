"""Host memory for layers, used again instead of given back.

The first touch of fresh memory costs several times what writing to it does (measured: 45 ms against 8 ms for
64 MiB), and every turn of a new cache object would pay it. Freed buffers therefore wait here, up to a bound, for
the next layer that needs one. A buffer returns only when no tensor refers to its memory any more.
"""

import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

from ...store.blocks.uninitialised import uninitialised
from ...store.memory.freed import widen_heap
from ...store.memory.size import on_pressure

MAX_IDLE_BYTES = 512 << 20
"""Bytes that may wait for their next use; what does not fit goes back to the system."""

_GRANULE = 1 << 16
_PAGE, _HUGE_PAGE = 4 << 10, 2 << 20
"""What buffers are aligned to. numpy aligns to 16 bytes, into which the kernel reads up to three times as slowly."""


class _Lease(np.ndarray):
    """A view of a buffer in use. Tensors made from it keep it alive, and unlike a plain array it can be watched."""


class HostBuffers:
    """Buffers in host memory by size. Safe to use from several threads."""

    def __init__(self, max_idle_bytes: int = MAX_IDLE_BYTES) -> None:
        self.max_idle_bytes = max_idle_bytes
        self.idle_bytes = 0
        self._idle: dict[int, list[np.ndarray]] = {}
        self._lock = threading.RLock()  # a finaliser may run while this thread holds it

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor, in memory that was used before if there is some of about its size."""
        values = math.prod(shape)
        buffer = self._take(values * dtype.itemsize)
        lease = buffer.view(_Lease)  # all of it: the tensor's storage is then as large as what is in use
        weakref.finalize(lease, self._give_back, buffer).atexit = False
        return torch.frombuffer(lease, dtype=dtype)[:values].view(shape)

    def _take(self, nbytes: int) -> np.ndarray:
        size = max(-(-nbytes // _GRANULE) * _GRANULE, _GRANULE)
        with self._lock:
            sizes = list(self._idle)  # a finaliser that runs meanwhile may add one
            fitting = min((s for s in sizes if size <= s <= size + size // 4 and self._idle.get(s)), default=None)
            if fitting is not None:
                self.idle_bytes -= fitting
                return self._idle[fitting].pop()
        widen_heap()
        alignment = _HUGE_PAGE if size >= 2 * _HUGE_PAGE else _PAGE
        room = np.empty(size + alignment, dtype=np.uint8)  # numpy asks for huge pages from 4 MiB on
        return room[-room.ctypes.data % alignment :][:size]

    def _give_back(self, buffer: np.ndarray) -> None:
        with self._lock:
            if self.idle_bytes + buffer.nbytes <= self.max_idle_bytes:
                self.idle_bytes += buffer.nbytes
                self._idle.setdefault(buffer.nbytes, []).append(buffer)

    def clear(self) -> None:
        """Gives everything idle back to the system."""
        with self._lock:
            self._idle.clear()
            self.idle_bytes = 0


host_buffers = HostBuffers()
"""The process's buffers."""
on_pressure(host_buffers.clear)


@contextmanager
def outliving_inference_mode() -> Iterator[None]:
    """Tensors made within outlive inference mode: one that is made in it could not be written to outside of it, by
    the next turn say. To leave it takes as long as making a tensor does, so who makes many leaves it for all of them.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor that outlives inference mode; see `HostBuffers` for those in host memory."""
    if torch.is_inference_mode_enabled():
        with outliving_inference_mode():
            return empty(shape, dtype, device)
    if device.type == "cpu" and math.prod(shape) * dtype.itemsize >= _GRANULE:
        return uninitialised(host_buffers.empty(shape, dtype))
    return uninitialised(torch.empty(shape, dtype=dtype, device=device))


GROWTH = 1.5
GRANULE = 64
"""Tokens: buffers have room for a multiple of so many."""


@lru_cache
def none_of(heads: int, dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[1, heads, 0, dim]`, to make buffers like."""
    return torch.empty((1, heads, 0, dim), dtype=dtype, device=device)


def with_capacity(like: torch.Tensor, capacity: int) -> torch.Tensor:
    """A buffer `[…, at least capacity, dim]` for tokens like those of `like` `[…, tokens, dim]`."""
    capacity = -(-capacity // GRANULE) * GRANULE
    return empty((*like.shape[:-2], capacity, like.shape[-1]), like.dtype, like.device)


def grown(buffer: torch.Tensor | None, held: int, tokens: int, like: torch.Tensor) -> torch.Tensor:
    """A buffer with the first `held` tokens of `buffer`, and room for `tokens` more: itself, where there is room."""
    if buffer is None or not held:
        return with_capacity(like, tokens)
    if like.device != buffer.device:
        buffer = buffer.to(like.device)
    if held + tokens <= buffer.shape[-2]:
        return buffer
    larger = with_capacity(buffer, max(held + tokens, int(held * GROWTH)))
    larger[..., :held, :].copy_(buffer[..., :held, :])
    return larger
