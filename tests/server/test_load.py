"""Many users at once, some of whom leave in the middle, and a server that is restarted: every answer is right."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import openai
import pytest
from server.conftest import Plain
from support.api_server import NAME, ApiServer, agreed, serving
from support.chat_fixtures import plain_answer
from support.turn_queue_fixtures import PATIENCE

USERS, TURNS, TOKENS = 32, 10, 8
WORDS = "the old prince looked at the letter and said nothing to the others in the room then march at three".split()

pytestmark = pytest.mark.slow


class User:
    """Somebody who talks, and checks what comes."""

    def __init__(self, number: int, plain: Plain) -> None:
        self.number, self.plain = number, plain
        self.random = random.Random(number)
        self.messages: list[Any] = []
        self.known: list[list[int]] = []
        """What was answered in full, in tokens: committed, whatever happens to the server."""
        self.turns = self.left = 0

    async def talk(self, asking: openai.AsyncOpenAI, until: int) -> None:
        while self.turns < until:
            self.messages.append({"role": "user", "content": " ".join(self.random.choices(WORDS, k=6))})
            while self.random.random() < 0.2:
                await self.leave(asking)
            ids = self.plain.prompt(self.messages)
            expected = plain_answer(self.plain.model, ids, max_new_tokens=TOKENS, do_sample=False)
            text, cached = await self.ask(asking, stream=self.random.random() < 0.5)
            assert text == self.plain.text(expected)
            assert cached >= agreed(self.known, ids)
            self.known.append([*ids, *expected[:-1]])
            self.messages.append({"role": "assistant", "content": text})
            self.turns += 1

    def arguments(self, tokens: int) -> dict[str, Any]:
        named = {"prompt_cache_key": f"user {self.number}"} if self.number % 2 else {}
        return {"model": NAME, "messages": self.messages, "max_tokens": tokens, "temperature": 0, **named}

    async def ask(self, asking: openai.AsyncOpenAI, *, stream: bool) -> tuple[str, int]:
        if not stream:
            answer = await asking.chat.completions.create(**self.arguments(TOKENS))
            return answer.choices[0].message.content or "", answer.usage.prompt_tokens_details.cached_tokens
        text, usage = "", None
        async for chunk in await asking.chat.completions.create(stream=True, **self.arguments(TOKENS)):
            text += chunk.choices[0].delta.content or ""
            usage = chunk.usage or usage
        assert usage is not None
        return text, usage.prompt_tokens_details.cached_tokens

    async def leave(self, asking: openai.AsyncOpenAI) -> None:
        """Asks for a long answer, and does not wait for its end."""
        self.left += 1
        stream = await asking.chat.completions.create(stream=True, **self.arguments(100))
        async for _ in stream:
            if self.random.random() < 0.5:
                break
        await stream.close()


def test_many_users_with_cancels_and_restarts(model_folder: Path, tmp_path: Path, plain: Plain) -> None:
    users = [User(number, plain) for number in range(USERS)]

    async def all_of_them(server: ApiServer, until: int) -> None:
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key="none", timeout=PATIENCE * 5, max_retries=0
        ) as asking:
            await asyncio.gather(*(user.talk(asking, until) for user in users))

    for until in (TURNS // 3, 2 * TURNS // 3, TURNS):
        with serving(model_folder, tmp_path / "store") as server:
            asyncio.run(all_of_them(server, until))
            stats = server.service.queue.stats()
            assert (stats.failed, stats.timed_out, stats.refused) == (0, 0, 0)
    assert [user.turns for user in users] == [TURNS] * USERS
    assert sum(user.left for user in users) > USERS
