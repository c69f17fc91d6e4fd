"""Responses that were kept, with the conversation up to them, so that a request can go on after one.

Each is metadata of the session that is called as the response is: in its caller's namespace, deleted with it.
"""

from __future__ import annotations

import logging
from typing import Any

from ..errors import AttentionStoreError, SessionNotFoundError
from ..store import AttentionStore
from .errors import ApiError

logger = logging.getLogger("hf_attnstore")

_KEY = "openai_response"


def as_items(given: Any) -> list[dict[str, Any]]:
    """The input of a request as a list of items.

    Raises:
        ApiError: 400, it is none.
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given or not all(isinstance(item, dict) for item in given):
        raise ApiError(400, "input is a text or a list of items", param="input")
    if "role" not in given[0] and str(given[0].get("type", "")).startswith("input_"):  # parts of one message
        return [{"role": "user", "content": given}]
    for item in given:
        if "role" not in item and item.get("type") not in ("reasoning", "function_call", "function_call_output"):
            raise ApiError(400, f"this server takes no item of type {item.get('type')!r}", param="input")
    return given


def keep_response(store: AttentionStore, response: dict[str, Any], items: list[dict[str, Any]]) -> None:
    """Keeps a response with the items that it answers; what the session has of others stays."""
    name = response["id"]
    record = {"response": response, "items": [*items, *response["output"]]}
    store.set_metadata(name, {_KEY: record})


def stored_items(store: AttentionStore, name: Any) -> list[dict[str, Any]]:
    """The conversation up to a response, and the response.

    Raises:
        ApiError: 400, there is none of that name.
    """
    record = _record(store, name)
    if record is None:
        raise ApiError(
            400,
            f"there is no response {name!r}: it was not stored, or deleted",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    items: list[dict[str, Any]] = record["items"]
    return items


def stored_response(store: AttentionStore, name: str) -> dict[str, Any]:
    """A response as it was answered.

    Raises:
        ApiError: 404, there is none of that name.
    """
    record = _record(store, name)
    if record is None:
        raise ApiError(404, f"there is no response {name!r}", code="not_found")
    response: dict[str, Any] = record["response"]
    return response


def delete_if_there(store: AttentionStore, name: str) -> None:
    """Deletes the session of a response that did not come to its end."""
    try:
        store.delete(name)
    except SessionNotFoundError:
        pass
    except AttentionStoreError as error:
        logger.warning("what was left of response %r stays: %s", name, error)


def _record(store: AttentionStore, name: Any) -> dict[str, Any] | None:
    try:
        found = store.metadata(name).get(_KEY) if isinstance(name, str) and name else None
    except SessionNotFoundError:
        return None
    return found if isinstance(found, dict) and found["response"].get("id") == name else None
