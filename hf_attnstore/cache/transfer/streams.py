"""Copies of KV from devices to host memory, on streams of their own."""

from collections.abc import Callable

import torch

from ...store.blocks.uninitialised import uninitialised


def copy_to_host(
    tensor: torch.Tensor,
    arriving: list[torch.cuda.Event],
    take: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """A contiguous copy in host memory. One that comes from an accelerator is there when the event is done that this
    adds to `arriving`.

    Args:
        take: memory of the shape of a tensor in host memory.
    """
    with torch.inference_mode(False):
        if tensor.device.type != "cuda":
            return take(tensor).copy_(tensor)
        copy = uninitialised(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True))
    stream = save_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    with torch.cuda.stream(stream):
        copy.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
        event = torch.cuda.Event()
        event.record(stream)
    arriving.append(event)
    return copy


_streams: dict[torch.device, torch.cuda.Stream] = {}


def save_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream, one for each device, on which KV leaves it."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]
