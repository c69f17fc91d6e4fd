"""What a load has done, in numbers."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class LoadStats:
    """What a load has done so far."""

    bytes: int = 0
    """Bytes put in place."""
    seconds: float = 0.0
    """Time spent reading and copying, summed over I/O threads; where these help to read all at once, it counts once."""
    blocks_from: Counter[str] = field(default_factory=Counter)
    """Number of blocks by tier."""
    bytes_from: Counter[str] = field(default_factory=Counter)
    """`bytes` by tier."""
    seconds_from: dict[str, float] = field(default_factory=dict)
    """`seconds` by tier."""

    def add(self, seconds: float, bytes_from: Mapping[str, int], reading: Mapping[str, float]) -> None:
        """Adds a part of a load that took so long, of which some tiers are known to have taken a share by themselves;
        what is left went by the others."""
        self.seconds += seconds
        for tier, nbytes in bytes_from.items():
            self.bytes += nbytes
            self.bytes_from[tier] += nbytes
        others = {tier: nbytes for tier, nbytes in bytes_from.items() if tier not in reading}
        left = seconds - (sum(reading.values()) if others else 0.0)
        for tier, nbytes in bytes_from.items():
            share = nbytes / max(sum((others or bytes_from).values()), 1)
            taken = reading[tier] if others and tier in reading else left * share
            self.seconds_from[tier] = self.seconds_from.get(tier, 0.0) + taken
