"""What a turn did, in numbers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TurnStats:
    """One turn of a cache: one `generate`, or the manual forwards since the last `save`."""

    prompt_tokens: int = 0
    """Tokens of the whole prompt: those reused, prefilled and dropped."""
    reused_tokens: int = 0
    """Tokens of the prompt whose KV was there already: in this cache, or from the store."""
    prefilled_tokens: int = 0
    """Tokens of the prompt that the model was really given, counted in its forwards."""
    generated_tokens: int = 0
    """Tokens after the prompt that the model was given."""
    loaded_bytes: int = 0
    """Bytes of KV put in place from the store."""
    saved_bytes: int = 0
    """Bytes of KV handed to the store; what it had already is not handed over."""
    load_seconds: float = 0.0
    """Time the I/O threads spent on loading."""
    exposed_load_seconds: float = 0.0
    """Time the model had to wait for a load: what overlap did not hide."""
    save_seconds: float = 0.0
    """Time the model had to wait for saving: handing over."""
    blocks_from: Mapping[str, int] = field(default_factory=dict)
    """Number of blocks loaded, by tier."""
    dropped_tokens: int = 0
    """Tokens of the prompt that are not in the window."""
    rotated_tokens: int = 0
    """Reused tokens whose keys were rotated to other positions as they were loaded."""
    truncation: Literal["", "rotated", "recomputed"] = ""
    """How the kept tokens came to their places, where some were dropped: by rotation, or computed again."""
    recomputed: str = ""
    """Why something that could have been reused was not; empty if nothing was."""
    missed: str = ""
    """The kind of that reason, in few words."""
    encoder_reused: int = 0
    """Positions of an encoder's output whose keys and values were there already; encoder-decoder models only."""
    encoder_skipped: bool = False
    """Whether the encoder did not run at all."""
