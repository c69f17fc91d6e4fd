"""Stages of a load that are put in place in host memory together."""

from collections.abc import Sequence

from .read import Rows
from .stages import Joint, Stage, Ways


class Group:
    """One stage, or several with a joint."""

    def __init__(self, number: int, stages: Sequence[Stage], ways: Ways, joint: Joint | None) -> None:
        self.number = number
        """Of the first."""
        self.stages = stages
        self.ways = ways
        self._joint = joint
        self.rows = Rows({name: t for stage in stages for name, t in stage.targets.items()} if ways.files else {})
        """What the pieces that are in files are read into."""

    def join(self) -> None:
        """Puts the pieces in place that blocks in memory have."""
        if self._joint is None or not self._joint.join(self.ways.runs):
            for stage in self.stages:
                stage.join(self.ways.runs)

    def bytes_from(self) -> dict[str, int]:
        """Bytes of all pieces, by tier."""
        token_bytes = sum(stage.token_bytes for stage in self.stages)
        return {tier: tokens * token_bytes for tier, tokens in self.ways.tokens_from.items()}
