"""What a cache serves: a model, a store and a session, and how it is to keep what is computed.

It is the same from turn to turn, but for what whoever knows the next prompt sets before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import nn

from ..session.window import Cuts, Window
from ..store.processes.parts import part_name
from ..store.store import AttentionStore
from .costs.gate import Gate
from .hooks import Attachment
from .model.ranks import Ranks
from .stats import TurnStats
from .transfer.load import Restore, as_it_comes


@dataclass(eq=False)
class Setup:
    """The parts that a cache's turns work with."""

    model: nn.Module
    given_model: nn.Module
    """The model as it was given: with PEFT's wrapper, if it has one."""
    attachment: Attachment
    ranks: Ranks
    gate: Gate
    store: AttentionStore | None = None
    """None for a copy made by `deepcopy`."""
    session: str | None = None
    saves: bool = False
    """Whether what is computed is kept."""
    wait: float = 0.0
    """Seconds to wait for another turn on the session."""
    limit: int | None = None
    """Tokens beyond which the model computes all of them with other rotary frequencies; None for no such limit."""
    window: Window | None = None
    """None where nothing is ever dropped."""
    checkpoint_every: int | None = None
    parks: bool = True
    """Whether what is held takes part in the device tier: not where it is no conversation of its own."""
    tell: Callable[[TurnStats], None] | None = None
    """Who is to hear of turns when they are over."""
    conversations: int = 1
    """How many conversations there are; a forward may have several rows of each (beams, samples)."""
    records: bool = False
    """Whether turns are recorded, from the next one on."""
    begin_load: Callable[[Restore], None] = as_it_comes
    """How loads are begun; benches do it otherwise to show why."""
    cuts: Cuts | None = None
    """Where the next prompt may be cut, for who knows of what it consists; None: anywhere after what is kept first."""
    boundaries: Sequence[int] | None = None
    """Where messages of the next prompt begin or end, in tokens of the conversation, for who knows that: there running
    states are kept. None goes by the ids with which messages end."""
    decode: Callable[[Sequence[int]], str] | None = None
    """Makes text of ids, for who has a tokenizer: `stats.diverged` then speaks in words."""

    @property
    def kept_as(self) -> str | None:
        """The name of the session in the store: on further ranks of a tensor-parallel model, of their part of it."""
        return part_name(self.session, self.ranks.rank) if self.session is not None else None

    def without_store(self) -> "Setup":
        """That of a copy which keeps nothing."""
        gate = Gate(enabled=False, devices=self.attachment.devices, learns=False)
        return replace(self, store=None, session=None, saves=False, wait=0.0, gate=gate, parks=False, tell=None)
