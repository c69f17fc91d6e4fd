"""Work for the sweep's processes that goes wrong; in a module of its own, so that they can import it."""

from __future__ import annotations

import os
import time

from hf_attnstore.lab.families.sweep import SAME, Row


def well(family: str) -> Row:
    """A row as of a family that has nothing to complain of."""
    return Row(family, "AnyForCausalLM", "full_attention", True, "token", "rotated", SAME)


def crash(family: str) -> Row:
    """Ends the process at gpt2."""
    if family == "gpt2":
        os._exit(3)
    return well(family)


def dawdle(family: str) -> Row:
    """Does not come to an end with gpt2."""
    if family == "gpt2":
        time.sleep(600)
    return well(family)
