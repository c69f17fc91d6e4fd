"""Turns as spans of OpenTelemetry, where that is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import AttentionStoreError

if TYPE_CHECKING:
    from .answer import Answer

_OPERATIONS = {"chat": "chat", "completions": "text_completion", "responses": "chat"}


def tracer(model: str) -> Callable[[Answer], object]:
    """What is called, in its request's context, with each answer that is over. Its span is made then, with the times
    that it had, so that a turn itself has nothing to do; it continues the trace that the request names (`traceparent`).
    Neither texts nor names of sessions are in it. Whether and where spans go is up to the process's tracer provider.

    Raises:
        AttentionStoreError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import propagate, trace
    except ImportError as error:
        raise AttentionStoreError('spans need OpenTelemetry: pip install "hf-attnstore[tracing]"') from error
    spans = trace.get_tracer("hf_attnstore")

    def record(answer: Answer) -> None:
        turn, stats = answer.turn, answer.stats
        assert turn is not None
        to_clock = time.time() - time.monotonic()

        def at(seconds: float) -> int:
            return int((seconds + to_clock) * 1e9)

        around = None  # FastAPI's span of the request, where it makes one
        if not trace.get_current_span().get_span_context().is_valid:
            headers = answer.exchange.headers.items()
            around = propagate.extract({k.decode("latin-1"): v.decode("latin-1") for k, v in headers})
        came, over = answer.exchange.began, time.monotonic()
        operation = _OPERATIONS[answer.kind]
        span = spans.start_span(
            f"{operation} {model}",
            context=around,
            start_time=at(came),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": stats.prompt_tokens,
                "gen_ai.usage.output_tokens": turn.generated_tokens,
                "gen_ai.usage.cache_read.input_tokens": stats.reused_tokens,
                "attnstore.tier": answer.tier,
                "attnstore.prefilled_tokens": stats.prefilled_tokens,
                "attnstore.loaded_bytes": stats.loaded_bytes,
                "attnstore.load_seconds": stats.load_seconds,
                "attnstore.exposed_load_seconds": stats.exposed_load_seconds,
                "attnstore.saved_bytes": stats.saved_bytes,
                "attnstore.why_not_more": stats.missed,
            },
        )
        inside = trace.set_span_in_context(span)
        began, first = over - turn.running_seconds, answer.first_token
        ends = {"waiting": began, "first token": first, "tokens": over if first is not None else None}
        start = came
        for name, end in ends.items():
            if end is not None:
                spans.start_span(name, context=inside, start_time=at(start)).end(at(end))
                start = end
        try:
            answer.raise_if_failed()
        except BaseException as error:
            span.set_status(trace.StatusCode.ERROR, type(error).__name__)
        span.end(at(over))

    return record
