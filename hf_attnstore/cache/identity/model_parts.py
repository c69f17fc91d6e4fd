"""What a fingerprint was made of, part by part: kept with the store, so that it can be said which part changed."""

import json
from collections.abc import Mapping
from typing import Any

import torch
import xxhash

_MOST = 2000
"""Tensors that are told apart. Of models with more, those with a common beginning of their names are one."""
_NAMED = 3
_LONGEST = 40


def note_name(fingerprint: str) -> str:
    return f"{fingerprint}/parts"


def short_digest(values: torch.Tensor) -> str:
    """8 hex digits for a tensor in host memory."""
    return xxhash.xxh32_hexdigest(values.contiguous().view(torch.uint8).numpy().tobytes())


def described(settings: str, tensors: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What is to be kept of a fingerprint.

    Args:
        settings: all that is in it beside tensors, as JSON.
        tensors: their short digests, by name.
    """
    return {"settings": _flat("", json.loads(settings)), "tensors": _grouped(tensors)}


def difference(before: Any, now: Mapping[str, Mapping[str, str]]) -> str:
    """What of `now` is not as in `before`, which was `described` and kept, in words; empty where that can't be told."""
    if not isinstance(before, Mapping) or not all(isinstance(before.get(kind), Mapping) for kind in now):
        return ""
    said = []
    for kind in ("settings", "tensors"):
        old, new = before[kind], now[kind]
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        if not changed:
            continue
        changed = [name for name in changed if name != "computing"] or changed  # a digest, which settings change too
        names = ", ".join(_change(name, old, new) if kind == "settings" else name for name in changed[:_NAMED])
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        said.append(f"{'other settings' if kind == 'settings' else 'other weights'}: {names}{more}")
    return "; ".join(said)


def _change(name: str, old: Mapping[str, str], new: Mapping[str, str]) -> str:
    return f"{name} was {old.get(name, 'not there')}, now {new.get(name, 'not there')}"


def _flat(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, dict) and (value or not name):
        return {key: said for inner, item in value.items() for key, said in _flat(f"{name}.{inner}", item).items()}
    said = json.dumps(value)
    return {name.removeprefix("."): said if len(said) <= _LONGEST else xxhash.xxh32_hexdigest(said.encode())}


def _grouped(tensors: Mapping[str, str]) -> dict[str, str]:
    found = dict(tensors)
    while len(found) > _MOST and any("." in name for name in found):
        together: dict[str, list[str]] = {}
        for name, digest in found.items():
            together.setdefault(name.rpartition(".")[0] or name, []).append(digest)
        found = {name: xxhash.xxh32_hexdigest("".join(digests).encode()) for name, digests in together.items()}
    return found
