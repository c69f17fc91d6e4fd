"""Sizes and times as people write them."""

import re

from .errors import AttentionStoreError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGTP", start=1):
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[_letter] = 1024**_power

_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Turns `"2GiB"`, `"500MB"`, `"1.5 TiB"` or a plain number into bytes.

    Raises:
        AttentionStoreError: the text is not a size, or is negative.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise AttentionStoreError(f'a size is an int of bytes or a string such as "2GiB", not {size!r}')
    if isinstance(size, int):
        if size < 0:
            raise AttentionStoreError(f"a size can't be negative: {size}")
        return size
    match = _PATTERN.fullmatch(size)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise AttentionStoreError(f'{size!r} is not a size; write a number of bytes, or one like "500MB" or "2GiB"')
    return int(float(match.group(1)) * unit)


def format_bytes(count: float) -> str:
    """Bytes for people: `1536` becomes `"1.5 KiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024 or unit == "TiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def format_seconds(seconds: float) -> str:
    """A time for people: 0.8 ms, 23 ms, 1.24 s, 26.3 s."""
    if seconds >= 1:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:,.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"
