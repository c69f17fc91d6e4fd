"""What is kept of every model folder of transformers, and why: from its lists of classes, without building a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import DynamicCache
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from ...cache.inputs.styles import STYLES
from ...cache.layers.kinds import is_state
from ...cache.outputs import TRIED

TOKEN, CHECKPOINT, BOTH, WHOLE, NOT = (
    "by token", "by checkpoint", "decoder by token, encoder's output whole", "whole inputs", "not"
)  # fmt: skip

_SINGLE: Mapping[str, tuple[str, str]] = {
    "diffusion_gemma": (TOKEN, "of its encoder; the decoder that refines blocks keeps none"),
    "rwkv": (CHECKPOINT, "its own state"),
    "xlstm": (CHECKPOINT, "its own state"),
    "xlnet": (NOT, "its mems depend on where segments end: no cache of a prefix"),
    "reformer": (NOT, "takes a cache of its own kind"),
    "openai": (NOT, "takes no cache"),
    "xlm": (NOT, "takes no cache"),
    "recurrent_gemma": (NOT, "keeps its state in its modules"),
}
_TEXT_ENCODERS = (
    "MASKED_LM", "TEXT_ENCODING", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION", "QUESTION_ANSWERING",
    "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "RETRIEVAL",
)  # fmt: skip
_ONE_SHOT: Sequence[tuple[str, str]] = (
    ("TEXT_TO", "one-shot speech or sound: there is no conversation"),
    ("TIME_SERIES", "time series"),
    ("CTC", "speech in, once"),
    ("AUDIO", "sound in, once"),
    ("RNNT", "speech in, once"),
    ("TDT", "speech in, once"),
    ("", "pictures or videos in, once"),
)
_VISUAL = (
    "IMAGE", "BACKBONE", "DETECTION", "SEGMENTATION", "DEPTH", "MASK_GENERATION", "KEYPOINT", "VIDEO", "VISUAL",
    "RECOGNITION", "POSE", "NORMAL", "POINTMAP", "DECISION",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One folder."""

    folder: str
    kept: str
    why: str


def kinds() -> list[Kind]:
    """Every model folder of this transformers, by name."""
    types: dict[str, list[str]] = {}
    for name in CONFIG_MAPPING_NAMES:
        types.setdefault(model_type_to_module_name(name), []).append(name)
    return [Kind(folder, *_kept(folder, types.get(folder, []))) for folder in _folders()]


def _folders() -> list[str]:
    root = Path(next(iter(transformers.models.__path__)))
    found = (path.parent.name for path in root.glob("*/__init__.py"))
    return sorted(name for name in found if name not in ("auto", "deprecated"))


def _kept(folder: str, types: Sequence[str]) -> tuple[str, str]:
    """What is kept of a folder's models, and why not more."""
    if folder in _SINGLE:
        return _SINGLE[folder]
    heads = {head for name in types for head in _heads(name)}
    if not types:
        return NOT, "a tokenizer or a processor alone"
    if heads & {"SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"} and "CAUSAL_LM" not in heads:
        return BOTH, "an answer that is gone on with, and the same document or sound again"
    if {"MASKED_LM", "CAUSAL_LM"} <= heads:
        return WHOLE, "with `keep`, as encoders; told to be decoders, by token"
    if heads & {"CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"}:
        return _of_decoders(types, heads)
    if heads & set(_TEXT_ENCODERS) and not any(_is_of_others(head) for head in heads):
        tried = "" if set(types) & TRIED else "; padding is a part of a row"
        return WHOLE, f"with `keep`: every token sees what comes after it{tried}"
    for part, why in _ONE_SHOT:
        if any(part in head and _is_of_others(head) for head in heads):
            return NOT, why
    return NOT, "a part of other models, or of another task"


def _heads(name: str) -> Iterator[str]:
    for mapping in dir(modeling_auto):
        listed = mapping.startswith("MODEL_FOR_") and mapping.endswith("_MAPPING_NAMES")
        if listed and name in getattr(modeling_auto, mapping):
            yield mapping.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES")


def _is_of_others(head: str) -> bool:
    """Whether a head is not for texts."""
    return any(part in head for part in (*_VISUAL, *(part for part, _ in _ONE_SHOT if part)))


def _of_decoders(types: Sequence[str], heads: set[str]) -> tuple[str, str]:
    states = [found for name in types if (found := _has_state(name)) is not None]
    kept, why = (CHECKPOINT, "a state is right for one number of tokens") if any(states) else (TOKEN, "")
    if "CAUSAL_LM" in heads:
        return kept, why
    pictures = "pictures too" if set(types) & set(STYLES) else "turns with pictures or sounds are computed each time"
    return kept, f"{why}; {pictures}" if why else pictures


def _has_state(name: str) -> bool | None:
    """Whether a model's cache has running states, by its configuration as it comes; None where that can't be told."""
    try:
        config: Any = CONFIG_MAPPING[name]()
        return any(map(is_state, DynamicCache(config=config.get_text_config(decoder=True)).layers))
    except Exception:
        return None


_HEAD = "why not more, or what of it"
_PAGE = """# What is kept of which kind of model

All {count} model folders of transformers {version}, by its lists of classes; `attnstore models kinds --output FILE`
writes this page. What was tried, family by family, is in [Models](../models.md). Whether a model that was not goes on
after its own cache is asked before anything of it is reused.

{grouped}

| folder | kept | {head} |
|---|---|---|
{rows}
"""


def grouped(found: Sequence[Kind]) -> str:
    """How many folders there are of each kind, as a table."""
    lines = [f"| kept | folders | {_HEAD} |", "|---|---:|---|"]
    for kept in (TOKEN, CHECKPOINT, BOTH, WHOLE, NOT):
        reasons = Counter(kind.why for kind in found if kind.kept == kept)
        for why, count in sorted(reasons.items(), key=lambda one: (-one[1], one[0])):
            lines.append(f"| {kept} | {count} | {why} |")
    return "\n".join(lines)


def markdown(found: Sequence[Kind]) -> str:
    """The page: groups first, then every folder."""
    rows = "\n".join(f"| {kind.folder} | {kind.kept} | {kind.why} |" for kind in found)
    return _PAGE.format(
        count=len(found), version=transformers.__version__, grouped=grouped(found), rows=rows, head=_HEAD
    )
