"""What fields of a request mean here: those that are honoured, those that change nothing, and a refusal of all others.

transformers' server warns once of fields that it ignores, so that an answer may silently be another than was asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessor

from .errors import ApiError
from .seams import Modality

_SAMPLING = frozenset({"model", "stream", "temperature", "top_p", "generation_config", "seed", "prompt_cache_key"})
_CHOICES = frozenset({"frequency_penalty", "presence_penalty", "max_tokens", "stop", "n", "logprobs"})
HONOURED: Mapping[str, frozenset[str]] = {
    "chat": _SAMPLING | _CHOICES
    | {"messages", "max_completion_tokens", "top_logprobs", "logit_bias", "tools", "tool_choice",
       "chat_template_kwargs"},
    "completions": _SAMPLING | _CHOICES | {"prompt"},
    "responses": _SAMPLING
    | {"input", "instructions", "max_output_tokens", "previous_response_id", "store", "tools", "tool_choice",
       "chat_template_kwargs"},
}  # fmt: skip
"""Fields by endpoint."""
_REQUIRED = {"chat": "messages", "completions": "prompt", "responses": "input"}

_HARMLESS = frozenset({
    "metadata", "prediction", "prompt_cache_options", "prompt_cache_retention", "safety_identifier", "service_tier",
    "stream_options", "user",
})  # fmt: skip
"""Hints and notes: an answer that does without them is as right. Usage is in the last chunk of every stream."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "background": (False,),
    "best_of": (1,),
    "echo": (False,),
    "include": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "reasoning": ({},),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": ("",),
    "text": ({}, {"format": {"type": "text"}}),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
}
"""Values of other fields that ask for nothing."""

_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "max_tokens": (1, float("inf")),
    "max_completion_tokens": (1, float("inf")),
    "max_output_tokens": (1, float("inf")),
}
MOST_STOPS = 4
MOST_CHOICES = 16
"""Answers to one request."""
MOST_LOGPROBS = {"chat": 20, "completions": 5}
"""OpenAI's limits of likeliest tokens that are asked for in each place."""


def checked(kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A request without the fields that say nothing.

    Args:
        kind: "chat", "completions" or "responses".

    Raises:
        ApiError: 400, for a field that can't be honoured.
    """
    given = {name: value for name, value in body.items() if value is not None and name not in _HARMLESS}
    for name in [name for name in given if name not in HONOURED[kind]]:
        value = given.pop(name)
        if not any(value == it and (type(value) is bool) == (type(it) is bool) for it in _NEUTRAL.get(name, ())):
            raise ApiError(
                400, f"{name}={body[name]!r} is not something that this server can do: leave it out", param=name
            )
    if _REQUIRED[kind] not in given:
        raise ApiError(400, f"{_REQUIRED[kind]} is missing", param=_REQUIRED[kind])
    for name, (least, most) in _RANGES.items():
        _check_number(name, given.get(name, least), least, most)
    if isinstance(given.get("seed", 0), bool) or not isinstance(given.get("seed", 0), int):
        raise ApiError(400, "seed is a whole number", param="seed")
    if not _is_whole(given.get("n", 1), 1, MOST_CHOICES):
        raise ApiError(400, f"n is a whole number of 1 to {MOST_CHOICES}", param="n")
    _choose_logprobs(kind, given)
    if "stop" in given:
        given["stop"] = _stops(given["stop"])
    if isinstance(given.get("logit_bias"), dict):  # transformers takes no whole numbers
        given["logit_bias"] = {k: float(v) if type(v) is int else v for k, v in given["logit_bias"].items()}
    _choose_tools(given)
    return given


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _choose_logprobs(kind: str, given: dict[str, Any]) -> None:
    """`logprobs` becomes how many of the likeliest tokens are told of beside the one that was chosen; without it none
    are told of."""
    if kind not in MOST_LOGPROBS:
        return
    most = MOST_LOGPROBS[kind]
    wanted = given.pop("logprobs", False)
    top = given.pop("top_logprobs", 0)
    if not _is_whole(top, 0, most) or (top and wanted is not True):
        raise ApiError(
            400, f"top_logprobs is a whole number of 0 to {most}, and goes with logprobs", param="top_logprobs"
        )
    if kind == "chat" and isinstance(wanted, bool):
        wanted = top if wanted else None
    elif kind == "completions" and (wanted is False or _is_whole(wanted, 0, most)):
        wanted = None if wanted is False else wanted
    else:
        whole = "true or false" if kind == "chat" else f"a whole number of 0 to {most}"
        raise ApiError(400, f"logprobs is {whole}", param="logprobs")
    if wanted is not None:
        given["logprobs"] = wanted


def _check_number(name: str, value: Any, least: float, most: float) -> None:
    whole = most == float("inf")
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise ApiError(400, f"{name} is a number of {least} to {most}, not {value!r}", param=name)


def _stops(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    fine = isinstance(stops, list) and len(stops) <= MOST_STOPS and all(isinstance(s, str) and s for s in stops)
    if not fine:
        raise ApiError(400, f"stop is a text, or a list of up to {MOST_STOPS}, none of them empty", param="stop")
    return stops


def _choose_tools(given: dict[str, Any]) -> None:
    tools, choice = given.get("tools"), given.pop("tool_choice", "auto")
    if choice == "none":
        given.pop("tools", None)
    elif choice != "auto":
        raise ApiError(
            400, f"tool_choice is auto or none here, not {choice!r}: no model is forced", param="tool_choice"
        )
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) and tool.get("type") == "function" for tool in tools)
    ):
        raise ApiError(400, "tools are a list, and of the kind function", param="tools")


def check_messages(messages: Any, modality: Any) -> None:
    """Looks for parts of messages that transformers' server would drop without a word.

    Raises:
        ApiError: 400; also for a picture or sound that is not in the request itself: this server fetches nothing.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages are a list of at least one", param="messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ApiError(400, "a message is an object with a role", param="messages")
        content = message.get("content")
        if content is not None and not isinstance(content, str | list):
            raise ApiError(400, "the content of a message is a text or a list of parts", param="messages")
        for part in content if isinstance(content, list) else []:
            _check_part(part, modality)


def _check_part(part: Any, modality: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        if not isinstance(part.get("text"), str):
            raise ApiError(400, f"a part of type {kind} has a text", param="messages")
        return
    seen = ("image_url", "input_image", "video_url")
    takes = {Modality.VLM: seen, Modality.MULTIMODAL: (*seen, "input_audio", "audio_url")}
    if kind not in takes.get(modality, ()):
        raise ApiError(400, f"this model takes no part of type {kind!r} in a message", param="messages")
    if kind != "input_audio":
        place = part.get("image_url") or part.get("video_url") or part.get("audio_url")
        place = place.get("url") if isinstance(place, dict) else place
        if not isinstance(place, str) or not place.startswith("data:"):
            raise ApiError(400, "pictures and sounds come as data: URLs; nothing is fetched", param="messages")


class Penalties(LogitsProcessor):
    """OpenAI's penalties: of what was generated so far, the logits of each token are lowered by `presence`, and by
    `frequency` for each time that it is there. transformers' server makes a repetition penalty of the one, which goes
    by the prompt too and multiplies, and ignores the other."""

    def __init__(self, prompt_tokens: int, frequency: float, presence: float) -> None:
        self._start, self._frequency, self._presence = prompt_tokens, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`[rows, tokens]` and `[rows, vocabulary]` to scores of the same shape."""
        counts = torch.zeros_like(scores)
        new = input_ids[:, self._start :]
        counts.scatter_add_(1, new, torch.ones_like(new, dtype=scores.dtype))
        penalised: Any = scores - self._frequency * counts - self._presence * (counts > 0)
        return penalised
