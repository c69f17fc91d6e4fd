"""What a result was measured with, in words: no names of people, hosts or paths."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch


def describe_machine(store: Path) -> dict[str, str | int]:
    """CPU, cores, memory, GPU, and the kind of file system that the store lies on."""
    facts: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "file_system": file_system(store),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


class ForeignLoad:
    """What other processes use of the CPUs while this one measures."""

    def __init__(self) -> None:
        self._start = self._now()

    def share(self) -> float:
        """Share of all CPUs that others have used since this was made, 0 to 1. Child processes are not others."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return min(1.0, max(0.0, busy - own) / max(wall * (psutil.cpu_count() or 1), 1e-9))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guest = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # counted in user and nice
        own = os.times()
        return time.monotonic(), sum(times) - idle - guest, sum(own[:4])


def in_words(facts: dict[str, str | int]) -> str:
    """One line for a report."""
    gpu = f", {facts['gpu']}" if "gpu" in facts else ""
    return (
        f"{facts['cores']} cores ({facts['cpu']}), {facts['memory_gib']} GiB memory{gpu}, "
        f"{facts['torch_threads']} torch threads, store on {facts['file_system']}, {facts['system']}"
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here."""
    found = {"python": platform.python_version()}
    for name in ("hf-attnstore", "torch", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def versions_in_words(found: Mapping[str, Any]) -> str:
    """What `versions` gives, for a line of a report."""
    return ", ".join(f"{name} {version}" for name, version in found.items())


def file_system(path: Path) -> str:
    """Kind of the file system that holds `path`, such as ext4 or tmpfs."""
    path = path.resolve()
    best = (-1, "an unknown file system")
    for part in psutil.disk_partitions(all=True):
        mount = Path(part.mountpoint)
        if path == mount or mount in path.parents:
            best = max(best, (len(mount.parts), part.fstype))
    return best[1]


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
