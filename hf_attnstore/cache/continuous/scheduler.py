"""Schedulers of continuous batching that ask the store: when a request begins its pages are filled, when it ends they
are handed over."""

import functools
import weakref
from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler

from ..hooks import attachment_of
from .requests import StoredRequests


@functools.cache
def with_store(base: type[Scheduler]) -> type[Scheduler]:
    """A scheduler that decides as `base` does."""

    class StoreScheduler(base):  # type: ignore[valid-type, misc]
        def __init__(self, model: "weakref.ref[Any]", store: Any, cache: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(cache, *args, **kwargs)
            found = model()
            self._stored = StoredRequests(found, attachment_of(found), store, cache)  # type: ignore[arg-type]

        def schedule_batch(self, *args: Any, **kwargs: Any) -> Any:
            for state in self.active_requests.values():
                self._stored.save_complete(state)
            return super().schedule_batch(*args, **kwargs)

        def _infer_request_tokens(self, state: Any, gone: set[str]) -> list[int]:
            fresh = state.status == RequestStatus.PENDING and not state.is_cpu_offloaded
            model = self._stored.identify() if fresh else ""
            tokens: list[int] = super()._infer_request_tokens(state, gone)
            if not fresh:
                return tokens
            # a request that is to be forked has to be fed one token before that, and one after
            most = len(state.initial_tokens) - (2 if state.num_children else 1)
            filled = self._stored.fill(state, most, model)
            if filled:
                self.active_requests[state.request_id] = state
                self.waiting_requests.pop(state.request_id, None)
                gone.add(state.request_id)
                state.status = RequestStatus.PREFILLING
                state.position_offset += filled
                state.remaining_prefill_tokens = state.remaining_prefill_tokens[filled:]
            return tokens if not filled else list(state.remaining_prefill_tokens)

        def finish_request(self, request_id: str) -> None:
            self._hand_over(request_id)
            super().finish_request(request_id)

        def clear_cancelled_requests(self) -> Any:
            for request_id in list(self._requests_to_cancel):
                self._hand_over(request_id)
            return super().clear_cancelled_requests()

        def _hand_over(self, request_id: str) -> None:
            state = self.active_requests.get(request_id)
            if state is None or state.status == RequestStatus.FAILED:
                self._stored.drop(request_id)
            else:
                self._stored.finish(state)

    return StoreScheduler
