"""The model, loaded while the page can be seen already."""

from __future__ import annotations

import copy
import ctypes
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ..errors import AttentionStoreError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Loaded = tuple["PreTrainedModel", "PreTrainedTokenizerBase"]


class ModelLoader:
    """Calls `load` in a thread, at once, until `close`.

    Args:
        load: returns model and tokenizer.
    """

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._future: Future[Loaded] = Future()
        self._own: Any = None
        self._own_lock = threading.Lock()
        self._ending = threading.Lock()
        self._over = self._closed = False
        self._thread = threading.Thread(target=self._run, args=(load,), name="attnstore-load", daemon=True)
        self._thread.start()

    def _run(self, load: Callable[[], Loaded]) -> None:
        loaded: Loaded | None = None
        error: BaseException | None = None
        try:
            try:
                loaded = load()
            except BaseException as raised:
                error = raised
            with self._ending:  # `close` interrupts nothing from here on
                self._over = True
        except KeyboardInterrupt as raised:
            error = raised
        if self._closed:
            error = AttentionStoreError("the process is ending; try again in a moment")
        if error is not None:
            self._future.set_exception(error)
        elif loaded is not None:
            self._future.set_result(loaded)

    def close(self) -> None:
        """Interrupts the loading and waits for its end: a thread that is at work in native code while the interpreter
        ends would abort the process. Who waits for the model gets an `AttentionStoreError`. Idempotent."""
        with self._ending:
            if not self._over and not self._closed:
                self._closed = True
                thread = ctypes.c_ulong(self._thread.ident or 0)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(KeyboardInterrupt))
        self._thread.join()

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
