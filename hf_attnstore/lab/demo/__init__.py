"""The demonstration: one scripted conversation, each turn in a new process, with the store and without it.

`run_demo` is what `attnstore demo` calls. `script` has the conversation, `turn` is what runs in a turn's
process, `runner` starts those processes and budgets the context window, `report` shows the result.
"""

from .runner import DemoError, DemoResult, run_demo
from .turn import TurnResult

__all__ = ["DemoError", "DemoResult", "TurnResult", "run_demo"]
