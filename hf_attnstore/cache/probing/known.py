"""What was found out about models by asking them: by fingerprint, as models that compute the same share it; asked for
once, remembered by the process and by stores."""

import threading
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from ...store.store import AttentionStore
from ..identity.fingerprint import remember
from ..model.ranks import Ranks

Fact = TypeVar("Fact")

_asking = threading.RLock()
"""Held while a model is asked, which computes with it."""


class Known(Generic[Fact]):
    """One kind of facts about models.

    Args:
        suffix: what the name of a store's note has after the fingerprint.
        version_key: the entry of a note that says which version of the question it answers.
        version: answers to others are not believed.
        encode: a fact as the entries of a note.
        decode: a fact of these; `KeyError`, `TypeError` or `ValueError` where they are something else.
    """

    def __init__(
        self,
        suffix: str,
        version_key: str,
        version: int,
        encode: Callable[[Fact], Mapping[str, Any]],
        decode: Callable[[Mapping[str, Any]], Fact],
    ) -> None:
        self._suffix, self._version_key, self._version = suffix, version_key, version
        self._encode, self._decode = encode, decode
        self._found: dict[str, Fact] = {}

    def of(
        self, fingerprint: str, store: AttentionStore | None, ask: Callable[[], Fact], ranks: Ranks | None = None
    ) -> Fact:
        """The fact about the model of a fingerprint.

        Args:
            store: which may remember it, and is to.
            ask: finds it out.
            ranks: who all ask for it at this moment: if one does not know it, all find it out, together.
        """
        with _asking:
            known = self._found.get(fingerprint) or self._noted(fingerprint, store)
            if ranks is not None and not ranks.all(known is not None):
                known = None
                self._found.pop(fingerprint, None)
            if known is None:
                known = ask()
                if store is not None:
                    note = {self._version_key: self._version, **self._encode(known)}
                    store.set_note(fingerprint + self._suffix, note)
            return known if fingerprint in self._found else remember(self._found, fingerprint, known)

    def _noted(self, fingerprint: str, store: AttentionStore | None) -> Fact | None:
        note = store.note(fingerprint + self._suffix) if store is not None else None
        if note is None or note.get(self._version_key) != self._version:
            return None
        try:
            return self._decode({name: value for name, value in note.items() if name != self._version_key})
        except (KeyError, TypeError, ValueError):
            return None

    def forget(self) -> None:
        """Forgets what this process has found out; what stores remember stays."""
        with _asking:
            self._found.clear()
