"""How a conversation is answered: what its user sets on the page, kept with the conversation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

SETTINGS = "ui-settings"
"""Under which key they are kept with a conversation."""
MOST_NEW_TOKENS = 8192
HOTTEST = 2.0
SAMPLED: Mapping[str, float] = {"temperature": 0.7, "top_p": 0.95}
"""Where answers are sampled and nothing else is said."""


@dataclass(frozen=True)
class Settings:
    """Settings of one conversation.

    Attributes:
        system: the system message; empty for none of its own, which some chat templates fill in.
        temperature: 0 takes the likeliest token.
        top_p: sampling is among the likeliest tokens that have this probability together.
        max_new_tokens: the longest answer, in tokens.
    """

    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 200

    @classmethod
    def of(cls, values: Mapping[str, Any], default: Settings | None = None) -> Settings:
        """From whatever a page or a store says: what is missing or makes no sense is as in `default`."""
        default = default or cls()
        found: dict[str, Any] = {}
        for entry in fields(cls):
            kind = type(getattr(default, entry.name))
            try:
                found[entry.name] = kind(values[entry.name])
            except (KeyError, TypeError, ValueError, OverflowError):
                found[entry.name] = getattr(default, entry.name)
        within = {"temperature": (0.0, HOTTEST), "top_p": (0.01, 1.0), "max_new_tokens": (1, MOST_NEW_TOKENS)}
        for name, (low, high) in within.items():
            found[name] = min(max(found[name], low), high)
        return cls(**found)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Settings:
        """Those of options of a `ChatSession`."""
        sampled = SAMPLED if options.get("do_sample") else {"temperature": 0.0}
        return cls.of({**sampled, **{name: value for name, value in options.items() if value is not None}})

    @property
    def generating(self) -> dict[str, Any]:
        """Arguments of `generate`."""
        if not self.temperature:
            return {"max_new_tokens": self.max_new_tokens, "do_sample": False}
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {"max_new_tokens": self.max_new_tokens, **sampling}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
