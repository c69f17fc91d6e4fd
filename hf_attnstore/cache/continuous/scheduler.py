"""Schedulers of continuous batching that ask the store: when a request begins its pages are filled, when it ends they
are handed over."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import Scheduler

from ..hooks import attachment_of
from .requests import StoredRequests
from .told import Told


@functools.cache
def with_store(base: type[Scheduler]) -> type[Scheduler]:
    """A scheduler that decides as `base` does, but for requests that wait for what the store knows of them."""

    class StoreScheduler(base):  # type: ignore[valid-type, misc]
        _stored: StoredRequests

        def __init__(
            self, model: "weakref.ref[Any]", store: Any, told: Told, wake: Callable[[], Any], *args: Any, **kwargs: Any
        ) -> None:
            super().__init__(*args, **kwargs)
            found: Any = model()
            attachment = attachment_of(found)
            assert attachment is not None
            self._stored = StoredRequests(found, attachment, store, self.cache, told, wake)

        def reset(self) -> None:
            super().reset()
            if hasattr(self, "_stored"):  # else this is being made
                self._stored.reset()

        def schedule_batch(self, *args: Any, **kwargs: Any) -> Any:
            self._stored.begin_batch()
            for state in self.active_requests.values():
                self._stored.save_complete(state)
            return super().schedule_batch(*args, **kwargs)

        def _get_waiting_candidates(self) -> list[Any]:
            others = bool(self.active_requests)
            waiting: list[Any] = super()._get_waiting_candidates()
            return [s for s in waiting if s.is_cpu_offloaded or self._stored.is_ready(s, others=others)]

        def _infer_request_tokens(self, state: Any, gone: set[str]) -> list[int]:
            if state.status == RequestStatus.PENDING:
                if state.is_cpu_offloaded:
                    self._stored.begin(state)
                else:
                    self._begin(state, self._stored.admit(state), gone)
            tokens: list[int] = super()._infer_request_tokens(state, gone)
            return tokens

        def _begin(self, state: Any, held: int, gone: set[str]) -> None:
            """A request has pages that hold its first tokens."""
            if held:
                self.active_requests[state.request_id] = state
                self.waiting_requests.pop(state.request_id, None)
                gone.add(state.request_id)
                state.status = RequestStatus.PREFILLING
                state.position_offset += held
                state.remaining_prefill_tokens = state.remaining_prefill_tokens[held:]

        def _schedule_request(self, state: Any, tokens: list[int], budget: int, gone: set[str]) -> None:
            most = self._stored.most_at_once(state)
            super()._schedule_request(state, tokens, budget if most is None else min(budget, most), gone)

        def finish_request(self, request_id: str) -> None:
            self._hand_over(request_id)
            super().finish_request(request_id)

        def clear_cancelled_requests(self) -> Any:
            if self._requests_to_cancel:
                self._stored.begin_batch()
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
