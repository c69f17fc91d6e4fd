"""Answer: one answer that is being made, from the request to the last token."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import LogitsProcessorList, SequenceBiasLogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode

from ..cache import AttentionStoreCache, TurnStats
from ..cache.generate.settings import setting
from ..chat.session import context_window
from ..errors import ContextWindowError
from ..serving import work as turn_work
from ..serving.turn import Turn
from .callers import Exchange
from .errors import ApiError
from .logprobs import Scored, Scores
from .parameters import Penalties
from .seams import DirectStreamer
from .stored import delete_if_there

if TYPE_CHECKING:
    from .batching import BatchTurn
    from .service import Service

_PREFIXES = {"chat": "chatcmpl-", "completions": "cmpl-", "responses": ""}


class Answer:
    """One answer: what its request asked for beside what transformers' server reads, its turn, and what that did.

    Args:
        kind: "chat", "completions" or "responses".
        body: the request, checked. What is done here is taken out: seed, penalties, logprobs, and texts that end the
            answer.
        when_over: called in the event loop when the turn is over.
        number: of several answers to a request, which it is, from 0. Each has a seed of its own, and only the first is
            what a named session goes on with: the others are found by content.
    """

    def __init__(
        self,
        service: Service,
        kind: str,
        body: dict[str, Any],
        exchange: Exchange,
        when_over: Callable[[Answer], object],
        number: int = 0,
    ) -> None:
        self.id = _PREFIXES[kind] + uuid.uuid4().hex
        """No other answer has it, whatever a client names its request."""
        self.kind = kind
        self.exchange = exchange
        self.asked = body
        """The request, without what is done here."""
        self.session: str | None = body.pop("prompt_cache_key", None)
        """The name that its conversation is kept under; None: by content."""
        if self.session is not None:
            exchange.store.check_name(self.session)
        if number:
            self.session = None
        self.stops: list[str] = body.pop("stop", [])
        """Texts that end it."""
        self.stopped = False
        """Whether one of them did."""
        seed = body.pop("seed", None)
        self._seed: int | None = seed + number if seed is not None else None
        self._logprobs: int | None = body.pop("logprobs", None)
        self.scores: Scores | None = None
        """How likely its tokens were, where that was asked for."""
        self._frequency = float(body.pop("frequency_penalty", 0))
        self._presence = float(body.pop("presence_penalty", 0))
        self._asked = next((body[n] for n in body if n.startswith("max_") and n.endswith("_tokens")), None)
        self._service = service
        self._when_over = when_over
        self._loop, self._context = asyncio.get_running_loop(), copy_context()
        self._begun, self._over = asyncio.Event(), asyncio.Event()
        self._turned: AttentionStoreCache | BatchTurn | None = None
        """What has the numbers of its turn."""
        self.first_token: float | None = None
        """When it came, on the monotonic clock."""
        self._prompt_tokens = 0
        self._decode: Callable[[Sequence[int]], str] | None = None
        """Ids in words, where the turn did not have them."""
        self.turn: Turn[Any] | BatchTurn | None = None
        self.streamer: AnswerStreamer | None = None
        self.keeps: list[dict[str, Any]] | None = None
        """For a response that is to be kept: what it answers."""
        self.session_is_its_own = False
        """Whether its session has the name of a response that is not there yet: nobody else could find it."""
        exchange.when_left(self.cancel)

    # making it

    def start(
        self, model: Any, processor: Any, inputs: dict[str, Any], config: Any, streamer: AnswerStreamer | None
    ) -> None:
        """Queues its turn.

        Raises:
            ContextWindowError: prompt and answer are longer than the model's window.
            QueueFullError, TurnQueueError: see `TurnQueue.run`.
        """
        self.streamer = streamer
        prompt_tokens = self._prompt_tokens = inputs["input_ids"].shape[-1]
        config.max_new_tokens = self._fitting(model, prompt_tokens, config.max_new_tokens or _MOST_NEW)
        given: dict[str, Any] = {**inputs, "generation_config": config, "tokenizer": processor}
        if hasattr(model, "has_talker"):  # as transformers' server does: text only
            given["generation_mode"] = "text"
        if config.pad_token_id is None:
            ends = setting(model, given, "eos_token_id")
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        tokenizer = getattr(processor, "tokenizer", processor)
        processors = LogitsProcessorList()
        if self._logprobs is not None:
            if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
                raise ApiError(400, "logprobs are there of tokens that are chosen one by one", param="logprobs")
            self.scores = Scores(tokenizer, inputs["input_ids"][0].tolist(), self._logprobs)
            processors.append(self.scores)
        if config.sequence_bias:  # after what is said of logprobs
            processors.append(SequenceBiasLogitsProcessor(config.sequence_bias))
            config.sequence_bias = None
        if self._frequency or self._presence:
            processors.append(Penalties(prompt_tokens, self._frequency, self._presence))
        if processors:
            given["logits_processor"] = processors
        by_beams = config.num_beams not in (None, 1)
        if config.num_return_sequences not in (None, 1) or (by_beams and (streamer is not None or self.stops)):
            raise ApiError(
                400,
                "one sequence is returned, and one that is searched by beams can't be streamed nor stopped by texts",
            )
        config.return_dict_in_generate = False  # nobody could see more than the tokens
        if not by_beams:
            given["streamer"] = _Both(self, streamer)
        if self.stops:
            given["stopping_criteria"] = StoppingCriteriaList([_StopTexts(self, prompt_tokens, tokenizer._tokenizer)])
        if self._service.batches is not None:
            self._decode = partial(tokenizer.decode, skip_special_tokens=False)
            self.turn = self._turned = self._service.batches.run(
                self.id, self.exchange.store, self.session, given, seed=self._seed, timeout=self._service.deadline
            )
        else:
            self.turn = self._queued(model, tokenizer, given)
        if self.exchange.left:
            self.turn.cancel()
        self.turn.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._end, context=self._context))

    def _queued(self, model: Any, tokenizer: Any, given: dict[str, Any]) -> Turn[Any]:
        """Its turn among those that run one at a time."""
        service = self._service

        def work(turn: Turn[Any]) -> Any:
            if self._seed is None:
                return made(turn)
            devices = [model.device] if model.device.type == "cuda" else []
            with torch.random.fork_rng(devices):  # what others draw afterwards is not foretold by this one's seed
                torch.manual_seed(self._seed)
                return made(turn)

        def made(turn: Turn[Any]) -> Any:
            every = service.checkpoint_every
            # nobody asked for a window, so nothing is dropped: the answer is that of plain `generate`
            cache = AttentionStoreCache(model, self.session, turn.store, drop=0, checkpoint_every=every)
            cache.describe_prompt(decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)))
            self._turned = cache
            return turn_work.generate(turn, cache, model, given)

        return service.queue.run(self.session, work, store=self.exchange.store, timeout=service.deadline)

    def _fitting(self, model: Any, prompt_tokens: int, wanted: int) -> int:
        window = context_window(model)
        if window is None or prompt_tokens + wanted <= window:
            return wanted
        if self._asked is None and prompt_tokens < window:
            return window - prompt_tokens
        raise ContextWindowError(
            f"the model's context window is {window:,} tokens: the prompt has {prompt_tokens:,}, and {wanted:,} are to "
            "be generated"
        )

    def heard(self) -> None:
        """The first token is there. Called in the thread of the turns."""
        self.first_token = time.monotonic()
        self._loop.call_soon_threadsafe(self._begun.set)

    def _end(self) -> None:
        self._begun.set()
        self._over.set()
        self._when_over(self)

    def cancel(self) -> None:
        """Nobody waits for it any more: it stops at the next token, and what is computed is kept."""
        if self.turn is not None:
            self.turn.cancel()

    def forget(self) -> None:
        """Where nobody can name its session, since its response did not come to its end, that goes with its turn."""
        if self.session_is_its_own and self.turn is not None:
            self.cancel()
            self.turn.add_done_callback(self._delete_session)

    def _delete_session(self, _: Any) -> None:
        assert self.session is not None
        if self._service.batches is not None:
            assert not isinstance(self.turn, Turn | None)
            self._service.batches.delete(self.turn, self.exchange.store)
        else:
            delete_if_there(self.exchange.store, self.session)

    # waiting for it

    async def begun(self) -> None:
        """Waits for the first token.

        Raises:
            BaseException: what the turn raised, if it did before there was any.
        """
        await self._wait_for(self._begun)
        if self.first_token is None:
            self.raise_if_failed()

    async def over(self) -> None:
        """Waits for the end.

        Raises:
            BaseException: what the turn raised.
        """
        await self._wait_for(self._over)
        self.raise_if_failed()

    async def _wait_for(self, event: asyncio.Event) -> None:
        try:
            await event.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise

    def raise_if_failed(self) -> None:
        """Raises what its turn raised."""
        assert self.turn is not None
        if self.turn.done():
            self.turn.result()

    @property
    def ids(self) -> list[int]:
        """What was generated, once it is over."""
        assert self.turn is not None
        found: list[int] = self.turn.result()[0, self._prompt_tokens :].tolist()
        return found

    @property
    def scored(self) -> list[Scored]:
        """Its tokens with how likely they were, up to the text that ended it."""
        entries = self.scores.entries if self.scores is not None else []
        said = len(cut_at("".join(entry.text for entry in entries), self.stops))
        return [entry for entry in entries if entry.offset < said]

    # what it was

    @property
    def stats(self) -> TurnStats:
        """What its turn did, as far as it has come."""
        return self._turned.stats if self._turned is not None else TurnStats()

    @property
    def ttft_seconds(self) -> float | None:
        """From the request to the first token, waiting included; None before that."""
        return None if self.first_token is None else self.first_token - self.exchange.began

    @property
    def tier(self) -> str:
        """Where what was reused came from: tiers in the order of the alphabet; `held` is what was left where it was
        computed; `none` where nothing was reused."""
        if not self.stats.reused_tokens:
            return "none"
        return "+".join(sorted(self.stats.blocks_from)) or "held"

    @property
    def header(self) -> str:
        """What the turn was, as a dictionary of RFC 8941: seconds to the first token, tokens of the prompt and how many
        of them were reused, from where, and why not more."""
        stats = self.stats
        said = [f"reused={stats.reused_tokens}", f"prompt={stats.prompt_tokens}", f"tier={self.tier}"]
        if self.ttft_seconds is not None:
            said.insert(0, f"ttft={self.ttft_seconds:.3f}")
        diverged = stats.diverged
        if diverged is not None and self._decode is not None:
            diverged = diverged.in_text(self._decode)
        why = stats.recomputed or (str(diverged) if diverged is not None else "")
        if why:
            plain = why.encode("ascii", "backslashreplace").decode()[:_LONGEST]
            quoted = "".join(c if " " <= c <= "~" else "?" for c in plain).replace("\\", "\\\\").replace('"', '\\"')
            said.append(f'why="{quoted}"')
        return ", ".join(said)


_MOST_NEW = 1024
"""Tokens of an answer where nothing says how many."""
_LONGEST = 300
"""Characters of a reason in a header."""


class ScoredText(str):
    """A piece of an answer, and its tokens."""

    entries: list[Scored]
    most: int


class AnswerStreamer(DirectStreamer):
    """transformers' streamer, which takes tool calls and reasoning out of the text, without the texts that stop it.

    What may be the beginning of such a text is held back until it is known.
    """

    def __init__(self, answer: Answer, *args: Any, **kwargs: Any) -> None:
        self._answer = answer
        self._held = ""
        self._stopped = False
        self._said = self._scored = 0
        super().__init__(*args, **kwargs)

    def cancel(self) -> None:
        self._answer.cancel()

    def _enqueue(self, item: Any) -> None:
        if type(item) is not str or not self._answer.stops:
            if self._held and not self._stopped:
                self._say(self._held)
            self._held = ""
            if type(item) is str:
                self._say(item)
            else:
                super()._enqueue(item)
            return
        if self._stopped:
            return
        self._held += item
        whole = cut_at(self._held, self._answer.stops)
        self._stopped = len(whole) < len(self._held)
        kept = 0 if self._stopped else _may_begin(whole, self._answer.stops)
        said, self._held = whole[: len(whole) - kept], whole[len(whole) - kept :]
        if said:
            self._say(said)

    def _say(self, text: str) -> None:
        self._said += len(text)
        if self._answer.scores is not None:
            scored = ScoredText(text)
            scored.most = self._answer.scores.most
            scored.entries = self._entries(self._said if self._answer.stops else None)
            text = scored
        super()._enqueue(text)

    def rest(self) -> list[Scored]:
        """Tokens that no piece of text came with, once the answer is over."""
        return [] if self._stopped else self._entries(None)

    def _entries(self, up_to: int | None) -> list[Scored]:
        scores = self._answer.scores
        assert scores is not None
        new = [e for e in scores.entries[self._scored :] if up_to is None or e.offset < up_to]
        self._scored += len(new)
        return new


def cut_at(text: str, stops: list[str]) -> str:
    """A text up to the first of the texts that end it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def _may_begin(text: str, stops: list[str]) -> int:
    """How many characters at the end of a text may be the beginning of one that ends it."""
    longest = min(max(map(len, stops)) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)


class _StopTexts(StoppingCriteria):
    """Ends an answer as soon as one of its stops is in the text. transformers' own goes by the prompt's end too, and
    refuses texts that no tokens of the vocabulary make."""

    def __init__(self, answer: Answer, prompt_tokens: int, tokenizer: Any) -> None:
        self._answer, self._tokenizer = answer, tokenizer
        self._seen = prompt_tokens
        self._stream = DecodeStream([], skip_special_tokens=True)
        self._tail = ""
        self._longest = max(map(len, answer.stops))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any) -> torch.BoolTensor:
        for token in input_ids[0, self._seen :].tolist():
            self._tail += self._stream.step(self._tokenizer, token) or ""
        self._seen = input_ids.shape[1]
        self._answer.stopped = any(stop in self._tail for stop in self._answer.stops)
        self._tail = self._tail[-self._longest :]
        stop: Any = torch.full((input_ids.shape[0],), self._answer.stopped, device=input_ids.device)
        return stop


class _Both:
    """Tells an answer of its first token, and hands everything to its streamer, if it has one."""

    def __init__(self, answer: Answer, streamer: AnswerStreamer | None) -> None:
        self._answer, self._streamer = answer, streamer
        self._count = 0

    def put(self, value: torch.Tensor) -> None:
        self._count += 1
        if self._count == 2:  # the first is the prompt
            self._answer.heard()
        if self._count > 1 and self._answer.scores is not None:
            for token in value.flatten().tolist():
                self._answer.scores.chosen(token)
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()
