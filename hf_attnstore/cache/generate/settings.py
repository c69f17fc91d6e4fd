"""Generation settings, wherever they were given."""

from collections.abc import Mapping
from typing import Any


def setting(model: Any, arguments: Mapping[str, Any], name: str) -> Any:
    """A generation setting as `generate` will see it: of the call, of the config given to it, or of the model's own."""
    given = (arguments.get("generation_config"), getattr(model, "generation_config", None))
    found = (arguments.get(name), *(getattr(config, name, None) for config in given))
    return next((value for value in found if value is not None), None)
