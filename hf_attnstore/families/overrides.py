"""What the general recipe for tiny configurations can't know of a family."""

from __future__ import annotations

from typing import Any

CHANGES: dict[str, dict[str, Any]] = {}
"""By family: arguments of its configuration, nested for nested configurations."""
