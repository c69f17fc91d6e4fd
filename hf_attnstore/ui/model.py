"""The model, loaded while the page can be seen already."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


class ModelLoader:
    """Calls `load` in a thread, at once.

    Args:
        load: returns model and tokenizer.
    """

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._future: Future[Loaded] = Future()
        self._own: Any = None
        self._own_lock = threading.Lock()
        threading.Thread(target=self._run, args=(load,), name="attnstore-load", daemon=True).start()

    def _run(self, load: Callable[[], Loaded]) -> None:
        try:
            self._future.set_result(load())
        except BaseException as error:
            self._future.set_exception(error)

    @property
    def ready(self) -> bool:
        """Whether it is there, or will never be."""
        return self._future.done()

    def result(self) -> Loaded:
        """Waits for it. Raises what loading raised."""
        return self._future.result()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer for who is not in the thread of the turns: one is not for two threads at once."""
        with self._own_lock:
            if self._own is None:
                self._own = copy.deepcopy(self.result()[1])
            return self._own
