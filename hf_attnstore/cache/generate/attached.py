"""Plain `generate` of an attached model: what a store can serve as a batch, and a word on what it can't serve."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..batch import batch_problem
from ..hooks import Attachment
from ..identity.adapters import adapter_problem
from ..inputs.content import NotIdentifiedError, read_content
from ..inputs.foreign import asks_for_all, foreign_input
from ..model.cacheless import needs_all_states
from ..model.structure import takes_one_conversation
from ..positions.spatial import places_in_space
from ..stats import TurnStats
from .settings import setting

logger = logging.getLogger("hf_attnstore")

_OTHER_WAYS = ("prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size", "token_healing")


def settings_problem(model: nn.Module, arguments: Mapping[str, Any]) -> tuple[str, str] | None:
    """Why a call can't be served whatever its prompt is: the kind of reason, and what to say; None if it can."""
    if getattr(arguments.get("generation_config"), "is_assistant", False):
        return "assistant", ""  # it serves another model's generate
    if setting(model, arguments, "use_cache") is False:
        return "use_cache", "use_cache=False"
    implementation = setting(model, arguments, "cache_implementation")
    if implementation not in (None, "hybrid"):  # that one `generate` takes for the default itself
        return "cache_implementation", f"cache_implementation={implementation!r} asks for another cache"
    if arguments.get("custom_generate") is not None:
        return "custom_generate", "custom_generate has a loop of its own"
    if arguments.get("use_model_defaults") is False:
        return "use_model_defaults", "use_model_defaults=False"
    if needs_all_states(partial(setting, model, arguments)):
        return "drafts", "its drafts are made from what the model makes of every token of the prompt"
    return None


def is_batch(model: nn.Module, prompt: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether a prompt is a left-padded batch, of one row perhaps, that is identified by ids and mask alone."""
    if not isinstance(prompt, torch.Tensor) or prompt.ndim != 2 or prompt.is_floating_point() or not prompt.numel():
        return False
    others = {name: value for name, value in arguments.items() if name not in ("attention_mask", "input_ids", "inputs")}
    if foreign_input(others) is not None or adapter_problem(model) is not None or places_in_space(model):
        return False
    if takes_one_conversation(model):
        return False
    if any(others.get(name) is not None for name in ("position_ids", "cache_position", "assistant_model", "streamer")):
        return False
    named = partial(setting, model, arguments)
    if any(named(name) for name in _OTHER_WAYS) or asks_for_all(named, model):
        return False
    try:
        if read_content(model.config, prompt, arguments) is not None:
            return False
    except NotIdentifiedError:
        return False
    mask = arguments.get("attention_mask")
    if mask is None:
        pad = setting(model, arguments, "pad_token_id")
        return pad is None or not bool((prompt == int(pad)).any())
    return isinstance(mask, torch.Tensor) and batch_problem(prompt, mask, len(prompt)) is None


def say_left_alone(attachment: Attachment, kind: str, reason: str, prompt: Any) -> None:
    """A call runs as without a store: a line in the log for every kind of reason, and a turn in the store's totals."""
    if attachment.store is None or not reason or attachment.store.closed:
        return
    tokens = prompt.numel() if isinstance(prompt, torch.Tensor) else 0
    missed = f"left alone ({kind})"
    attachment.store.count_turn(0, tokens, 0, 0.0, 0.0, missed)
    attachment.turn_is_over(TurnStats(tokens, prefilled_tokens=tokens, recomputed=reason, missed=missed))
    if f"left alone: {kind}" not in attachment.told:
        attachment.told.add(f"left alone: {kind}")
        logger.warning("a generate of an attached model is neither reused nor kept: %s", reason)


def kind_of(problem: str) -> str:
    """A reason why a prompt is not identified, without what is different every time."""
    if problem.startswith("a batch"):
        return "batch"
    if "padding" in problem or "attention mask" in problem:
        return "mask"
    return "positions" if "position" in problem else "input"
