"""Continuous batching of an attached model: its manager gets a scheduler that asks the store.

transformers finds schedulers by name, and imports all of continuous batching where it is begun: so does this.
"""

import copy
import functools
import itertools
import logging
import weakref
from typing import Any

from ..hooks import attachment_of
from .told import Told

logger = logging.getLogger("hf_attnstore")

_numbers = itertools.count()
_served: "weakref.WeakKeyDictionary[Any, Told]" = weakref.WeakKeyDictionary()


def init_with_store(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands in for `model.init_continuous_batching`, with the same arguments and the same result."""
    attachment = attachment_of(model)
    assert attachment is not None
    manager = attachment.original(model, "init_continuous_batching")(*args, **kwargs)
    if attachment.store is None or manager in _served:  # transformers keeps some, and hands them out again
        return manager
    try:
        from transformers.generation.continuous_batching import cache_allocators  # noqa: F401 from 5.20 on
        from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

        from .scheduler import with_store
    except ImportError:
        logger.warning("continuous batching of this transformers is not served from the store: 5.20 and newer are")
    else:
        config = manager.continuous_batching_config = copy.copy(manager.continuous_batching_config)  # it is somebody's
        name = f"attnstore-{next(_numbers)}"
        base = SCHEDULER_MAPPING.get(config.scheduler_type, FIFOScheduler)
        scheduler: Any = with_store(base)
        told = _served[manager] = Told()
        wake = getattr(manager, "_wake_up_loop", None)
        SCHEDULER_MAPPING[name] = functools.partial(  # type: ignore[assignment]
            scheduler, weakref.ref(model), attachment.store, told, wake.set if wake is not None else _not_awake
        )
        weakref.finalize(manager, SCHEDULER_MAPPING.pop, name, None)
        config.scheduler_type = name
    return manager


def _not_awake() -> None:
    """The loop looks by itself now and then."""


def told_to(manager: Any) -> Told | None:
    """By what a manager's requests can be told which namespace they are in; None where the store does not serve it."""
    return _served.get(manager)


init_with_store.__name__ = "init_continuous_batching"  # see `generate_with_store`
