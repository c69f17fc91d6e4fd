"""Several answers to one request: each is a turn of its own, and the prompt is computed by the first of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

from .answer import Answer

T = TypeVar("T")


async def begin_all(
    make: Callable[[Answer], Awaitable[T]], answers: Sequence[Answer], *, side_by_side: bool
) -> list[T]:
    """What is made of each answer. If one fails, none goes on.

    Args:
        side_by_side: whether turns run at the same time. Then the others begin when the first has computed the prompt;
            else they wait for it in their queue.
    """

    async def made(answer: Answer) -> T:
        if side_by_side and answer is not answers[0]:
            await answers[0].begun()
        return await make(answer)

    tasks = [asyncio.ensure_future(made(answer)) for answer in answers]
    try:
        return list(await asyncio.gather(*tasks))
    except BaseException:
        for answer in answers:
            answer.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def put_together(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One complete answer of several: tokens of the prompt count once, and as cached what the first found."""
    choices = [{**content["choices"][0], "index": number} for number, content in enumerate(contents)]
    return {**contents[0], "choices": choices, "usage": _sum([content["usage"] for content in contents])}


def _sum(usages: Sequence[dict[str, Any]]) -> dict[str, Any]:
    completion = sum(usage["completion_tokens"] for usage in usages)
    total = usages[0]["prompt_tokens"] + completion
    return {**usages[0], "completion_tokens": completion, "total_tokens": total}


async def stream_together(streams: Sequence[AsyncIterator[str]]) -> AsyncIterator[str]:
    """One stream of several, as they come; chunks have the number of their choice, and the last one has the usage."""
    arrived: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()

    async def listen(number: int, stream: AsyncIterator[str]) -> None:
        try:
            async for chunk in stream:
                arrived.put_nowait((number, chunk))
        finally:
            arrived.put_nowait((number, None))

    tasks = [asyncio.ensure_future(listen(number, stream)) for number, stream in enumerate(streams)]
    usages: dict[int, dict[str, Any]] = {}
    name: str | None = None
    running = len(tasks)
    try:
        while running:
            number, chunk = await arrived.get()
            running -= chunk is None
            for event in (chunk or "").split("\n\n"):
                if not event.startswith("data: {"):
                    continue
                content = json.loads(event.removeprefix("data: "))
                if "error" in content:
                    yield f"{event}\n\n"
                    return
                name = content["id"] = name or content["id"]
                for choice in content["choices"]:
                    choice["index"] = number
                usage = content.pop("usage", None)
                if usage:
                    usages[number] = usage
                    if len(usages) == len(tasks):
                        content["usage"] = _sum([usages[n] for n in sorted(usages)])
                yield f"data: {json.dumps(content)}\n\n"
        for task in tasks:
            task.result()
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
