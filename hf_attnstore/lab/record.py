"""Records of measurements that are written while more is measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as JSON, whole or not at all: what was there before stays until then."""
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    unfinished.replace(path)
