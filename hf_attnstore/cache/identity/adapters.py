"""Adapters on a model (PEFT): which of them compute, and which make KV that can't be kept.

Nothing here imports PEFT: a layer with adapters is known by the properties that PEFT gives it.
"""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any

from torch import nn

_KNOWN_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")
"""Variants of LoRA in which a layer's adapters know nothing of each other."""


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer that has adapters, or stands for one that a fine-tuning replaced."""
    return _has_adapters(type(module))  # type: ignore[arg-type]


def adapted_of(modules: Sequence[nn.Module]) -> Sequence[nn.Module]:
    """Those of some modules that are adapted. Most models are made of a few kinds, none of which is."""
    if not any(map(_has_adapters, set(map(type, modules)))):
        return ()
    return [module for module in modules if is_adapted(module)]


@cache
def _has_adapters(kind: type) -> bool:
    return isinstance(getattr(kind, "active_adapters", None), property) and isinstance(
        getattr(kind, "disable_adapters", None), property
    )


def adapters_of(layer: Any) -> list[Any]:
    """Which adapters are active, merged and disabled in a layer, and their settings; cheap, and JSON-able."""
    used = _used(layer)
    if used is not None:
        return [len(used), _numbers(layer, "scaling", used)]
    return [
        list(map(str, layer.active_adapters)),
        sorted(map(str, getattr(layer, "merged_adapters", ()))),
        bool(layer.disable_adapters),
        [[name, _numbers(layer, name, None)] for name in ("scaling", *_setting_names(layer))],
        _call_hooks(layer),
    ]


def state_of(layer: Any) -> list[Any]:
    """What tells that something about a layer's adapters changed."""
    merged = list(map(str, getattr(layer, "merged_adapters", ())))
    return [*adapters_of(layer), list(map(str, layer.active_adapters)), merged, bool(layer.disable_adapters)]


def is_inert(layer: Any) -> bool:
    """Whether a layer computes what it would without its adapters, bit for bit."""
    return _used(layer) == []


def names_of_parts(layer: Any) -> dict[tuple[str, ...], tuple[str, ...] | None]:
    """How the parts of a layer are called where names must not matter, by path below the layer; None for a part that
    takes no part in computing.

    An adapter that is loaded but not used does not count, and neither does what a used one is called. Only known for
    LoRA: for others every part counts under its own name.
    """
    used = _used(layer)
    if used is None:
        return {}
    names: dict[tuple[str, ...], tuple[str, ...] | None] = {}
    for container in layer.adapter_layer_names:
        for adapter in list(getattr(layer, container, None) or ()):
            place = (f"adapter {used.index(adapter)}",) if adapter in used else None
            names[container, adapter] = (container, *place) if place else None
    if not used:
        names[("base_layer",)] = ()
    return names


def _used(layer: Any) -> list[str] | None:
    """The adapters that take part in computing a LoRA layer, in order; None where that can't be told."""
    if not type(layer).__module__.startswith("peft.tuners.lora.") or not hasattr(layer, "lora_A") or _call_hooks(layer):
        return None
    variants = getattr(layer, "lora_variant", {}).values()
    if any(type(variant).__name__ not in _KNOWN_VARIANTS for variant in variants):
        return None
    if layer.disable_adapters or layer.merged_adapters:
        return []
    there = {*layer.lora_A, *getattr(layer, "lora_embedding_A", ())}
    return [str(name) for name in layer.active_adapters if name in there]


def _call_hooks(layer: nn.Module) -> list[str]:
    """Adapters chosen for one call (`adapter_names=`), which come as a hook for as long as it lasts."""
    return [str(hook.keywords) for hook in layer._forward_pre_hooks.values() if isinstance(hook, partial)]


def _setting_names(layer: Any) -> list[str]:
    return sorted(set(getattr(layer, "other_param_names", ())) - {"scaling"})


def _numbers(layer: Any, name: str, used: list[str] | None) -> list[Any]:
    """The plain values among a setting's, in order of `used`, or by adapter's name."""
    values: Any = getattr(layer, name, None)
    if not hasattr(values, "items"):
        return [str(values)] if isinstance(values, (bool, int, float, str)) else []
    if used is not None:
        return [float(values[name]) for name in used if name in values]
    return sorted(
        (str(key), str(value)) for key, value in values.items() if isinstance(value, (bool, int, float, str, list))
    )


def adapter_problem(model: nn.Module) -> str | None:
    """Why adapters keep a model's KV from being reusable; None if they don't.

    Args:
        model: the transformers model itself, below PEFT's wrapper.
    """
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    wrapper = getattr(prepare, "__self__", None)
    if wrapper is not None and wrapper is not model:
        problem = prompt_learning(wrapper)
        if problem:
            return problem
    configs = list(_configs(model))
    for name, config in configs:
        kind = str(getattr(config, "peft_type", "")).rpartition(".")[2]
        if getattr(config, "alora_invocation_tokens", None):
            return f"adapter {name!r} is an activated LoRA: what it does to a token depends on later ones"
        if kind == "XLORA":
            return f"adapter {name!r} is an X-LoRA, which runs the model twice"
        if getattr(config, "sample_at_inference", False):
            return f"adapter {name!r} is random ({kind})"
    for module in model.modules() if configs else ():
        layer: Any = module
        if is_adapted(module) and getattr(layer, "merged_adapters", None) and layer.disable_adapters:
            return "its merged adapters are disabled, and will be taken out of the weights by this forward"
    return None


def prompt_learning(wrapper: Any) -> str | None:
    """Why KV made through PEFT's wrapper of a model can't be kept: its adapter puts tokens of its own before the
    prompt. None if it does not."""
    config = getattr(wrapper, "active_peft_config", None) if hasattr(wrapper, "peft_config") else None
    if not getattr(config, "is_prompt_learning", False):
        return None
    kind = str(getattr(config, "peft_type", "prompt learning")).rpartition(".")[2]
    return f"the active adapter puts learned tokens before the prompt ({kind})"


def _configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict):
        yield from ((str(name), config) for name, config in configs.items())
