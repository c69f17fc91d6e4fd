"""How long things take and what they cost: models, accelerators, links and prices. Plain arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9

CODECS = {"raw": 1.0, "int8": 0.52, "int4": 0.29}
"""Bytes of a full block as a codec writes it, as a share of 16-bit KV's: twice what docs/results/codecs-smollm2.md has
of float32's. Decoding is taken to keep up with the link to the device, over which goes what is computed with."""


@dataclass(frozen=True)
class Accelerator:
    """What data sheets say.

    Attributes:
        flops: of matrix products, a second.
        bandwidth: bytes a second from its own memory.
    """

    name: str
    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Model:
    """A model on some accelerators.

    Attributes:
        parameters: those that every token is multiplied with; 2 bytes each.
        kv_bytes: bytes of KV per token.
        used_flops, used_bandwidth: the share of an accelerator's that prefill and decoding reach. 0.58 makes 2,000
            tokens of LLaMA-65B on 4 A100 take the 360 ms that the paper states.
        decode_factor: how many times as long decoding takes as the arithmetic says.
    """

    name: str
    parameters: float
    layers: int
    hidden: int
    kv_bytes: int
    accelerator: Accelerator
    count: int = 1
    used_flops: float = 0.58
    used_bandwidth: float = 0.6
    decode_factor: float = 1.0

    def prefill_seconds(self, new: int, history: int = 0) -> float:
        """Seconds to prefill `new` tokens after `history`."""
        products = 2 * self.parameters * new
        attention = 4 * self.layers * self.hidden * new * (history + new / 2)
        return (products + attention) / (self.accelerator.flops * self.count * self.used_flops)

    def step_seconds(self, tokens: float) -> float:
        """Seconds of one decoding step of a batch whose contexts have `tokens` altogether."""
        read = 2 * self.parameters + tokens * self.kv_bytes
        return self.decode_factor * read / (self.accelerator.bandwidth * self.count * self.used_bandwidth)


@dataclass(frozen=True)
class Links:
    """Bytes a second between tiers, the paper's by default.

    Attributes:
        device: between host memory and device.
        read, write: from and to the disk.
        buffer: the share of the layers that is loaded during the job before (the paper's read buffer).
        overlap: whether a layer is loaded while the one before computes.
    """

    device: float = 26 * GB
    read: float = 5 * GB
    write: float = 5 * GB
    buffer: float = 15 / 40
    overlap: bool = True


@dataclass(frozen=True)
class Prices:
    """Dollars an hour: of an accelerator, of a GB of memory, of a GB of disk.

    The paper takes AWS EC2 on-demand prices; these are of that kind, and an assumption.
    """

    accelerator: float = 5.0
    memory: float = 0.0088
    disk: float = 0.000082

    def cost(self, seconds: float, accelerators: int, memory: int = 0, disk: int = 0) -> float:
        """Dollars for `seconds` of a machine with `memory` and `disk` bytes for KV."""
        hourly = self.accelerator * accelerators + self.memory * memory / GB + self.disk * disk / GB
        return hourly * seconds / 3600
