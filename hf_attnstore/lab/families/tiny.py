"""A tiny random model of every family in transformers' causal-LM mapping, from its configuration class alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .overrides import CHANGES, DEFAULTS
from .shrink import shrunk


def families() -> list[str]:
    """The names in the mapping: `config.model_type` of every causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def class_name(family: str) -> str:
    """The model class that the mapping names."""
    name: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    return name if isinstance(name, str) else name[0]


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """A tiny configuration of a family.

    Args:
        changes: arguments of the configuration that are to be other than the recipe makes them.

    Raises:
        KeyError: there is no such family.
    """
    config_class: Any = CONFIG_MAPPING[family]
    return shrunk(config_class(**DEFAULTS.get(family, {})), {**CHANGES.get(family, {}), **changes})


def _config_of_class(config: PreTrainedConfig, model_class: Any) -> PreTrainedConfig:
    """The part of a configuration that a model class takes: usually all of it."""
    wanted = model_class.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [value for value in vars(config).values() if isinstance(value, PreTrainedConfig)]
    return next((part for part in parts if isinstance(part, wanted)), config)


def build(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny model: float32, on the CPU, in eval mode; equal seeds give equal weights.

    Args:
        seed: for the weights.
        changes: arguments of the configuration that are to be other than the recipe makes them.

    Raises:
        Exception: whatever the family's own code says where it can't be built.
    """
    return of_class(family, class_name(family), seed, **changes)


def of_class(family: str, name: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """As `build`, of another class of the family: the model without a head, or with another one."""
    model_class: Any = getattr(transformers, name)
    config = _config_of_class(tiny_config(family, **changes), model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class._from_config(config, dtype=torch.float32)
        spread(model)
    # no length, no suppressed or forced tokens: the likeliest token is the next one
    model.generation_config = GenerationConfig(pad_token_id=0, use_cache=True)
    return model.eval()


@torch.no_grad()
def spread(model: PreTrainedModel) -> None:
    """Moves parameters that begin all alike (gates at 0, scales at 1) a little, so that all of them play a part."""
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and bool((parameter == parameter.view(-1)[0]).all()):
            parameter.add_(0.05 * torch.randn_like(parameter))
