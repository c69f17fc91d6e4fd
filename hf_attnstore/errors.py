"""The errors of this package. All of them are `AttentionStoreError`s and say what to do."""


class AttentionStoreError(Exception):
    """Base of every error that this package raises on purpose."""


class StoreFormatError(AttentionStoreError):
    """The directory is not a store, or one that this version (or these settings) can't read."""


class SettingsError(AttentionStoreError):
    """The file with settings can't be read, or a setting is none; see `attnstore config`."""


class StoreClosedError(AttentionStoreError):
    """The store was used after `close()`."""


class LoadError(AttentionStoreError):
    """A block could not be read: missing, damaged, or not what its key promises.

    `transient` tells whether it may be readable later: the disk failed, the file as such was not found wrong.

    `generate` catches it and recomputes; manual loops see it only from `AttentionStoreCache.match`'s smaller count.
    """

    def __init__(self, message: str, *, transient: bool = False) -> None:
        super().__init__(message)
        self.transient = transient


class NotFiniteError(LoadError):
    """A block has NaN or infinity in it: whatever made it, nobody is to go on from there."""


class StoreIOError(AttentionStoreError):
    """The disk would not read or write: full, failing, forbidden, or gone."""


class SharedTierError(AttentionStoreError):
    """The URL of a shared tier is none, or its engine is not known here or would not do what somebody waits for."""


class EncryptionKeyError(AttentionStoreError):
    """The key of an encrypted store is missing, wrong, or none."""


class SessionNameError(AttentionStoreError, ValueError):
    """A session name that can't be used."""


class SessionNotFoundError(AttentionStoreError, KeyError):
    """No session of that name in this store and namespace."""

    def __str__(self) -> str:  # KeyError shows the repr of its argument, which hides the message
        return str(self.args[0]) if self.args else ""


class SessionBusyError(AttentionStoreError):
    """Another turn is running on the session, here or in another process."""


class UnsupportedModelError(AttentionStoreError):
    """The model has something that this version can't keep, such as a layer kind."""


class GradientError(AttentionStoreError):
    """A forward with gradients enabled was given a store-backed cache."""


class ContextWindowError(AttentionStoreError):
    """Something does not fit into the window: a message, or the room for an answer."""


class CacheUseError(AttentionStoreError):
    """The cache was used in a way that would give wrong tokens."""


class TurnQueueError(AttentionStoreError):
    """A `TurnQueue` was used in a way that can't work: it is closed, or a turn would wait for itself."""


class QueueFullError(TurnQueueError):
    """As many turns wait as may wait."""


class TurnTimeoutError(TurnQueueError, TimeoutError):
    """A turn of a queue was not done within the time it was given."""
