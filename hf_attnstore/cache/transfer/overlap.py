"""How loading and saving go beside computing: as it is best, or as a measurement wants it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Overlap:
    """What a cache does beside computing. As it stands here, what is best; benches set it otherwise to show why."""

    depth: int | None = None
    """How many layers are asked for beyond the one that computes; None: by what was measured."""
    load_first: bool = False
    """Whether everything is in place before the first layer computes."""
    io_threads: bool = False
    """Whether I/O threads bring what is for host memory too, and not only what is for devices."""
    save_late: bool = False
    """Whether nothing is handed over to the store before the turn ends."""

    @property
    def as_it_comes(self) -> bool:
        """Whether nothing is set that a load goes by."""
        return self.depth is None and not self.load_first and not self.io_threads
