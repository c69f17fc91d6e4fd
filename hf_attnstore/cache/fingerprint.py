"""The identity of what computes the KV: two models with the same fingerprint make the same keys and values.

Weights are identified by content, from bounded samples of every tensor, so that a name never decides. Changes
in place are noticed by the tensors' version counters and, since `.data` bypasses those, by a few values of each
tensor that are compared before every turn.
"""

import hashlib
import json
import secrets
import threading
import weakref
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

LAYOUT_VERSION = 1

_RUNS, _RUN_LENGTH = 16, 64
_QUICK_VALUES = 4

_IRRELEVANT = frozenset(
    "_name_or_path _commit_hash transformers_version architectures dtype torch_dtype use_cache return_dict "
    "output_attentions output_hidden_states bos_token_id eos_token_id pad_token_id id2label label2id".split()
)
"""Settings that say nothing about how KV is computed (dtypes are taken from the weights)."""


def _sample(tensor: torch.Tensor, runs: int, length: int) -> torch.Tensor:
    """Up to `runs` evenly spread runs of `length` neighbouring values of `tensor`, as one dimension."""
    tensor = tensor.detach()
    if tensor.numel() <= runs * length:
        return tensor.reshape(-1)
    step = (tensor.numel() - length) // (runs - 1)
    if tensor.is_contiguous():
        return tensor.as_strided((runs, length), (step, 1), tensor.storage_offset()).reshape(-1)
    places = (torch.arange(runs)[:, None] * step + torch.arange(length)).reshape(-1).to(tensor.device)
    return tensor[torch.unravel_index(places, tensor.shape)]


def _few_values(tensor: torch.Tensor) -> torch.Tensor:
    """Some values of a tensor, spread over it, in one cheap step."""
    if not tensor.is_contiguous():
        return _sample(tensor, _QUICK_VALUES, 1)
    count = min(tensor.numel(), _QUICK_VALUES)
    step = (tensor.numel() - 1) // (count - 1) if count > 1 else 1
    return tensor.as_strided((count,), (step,), tensor.storage_offset())


def _raw_bytes(values: torch.Tensor) -> bytes:
    return values.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _offloaded(module: nn.Module, name: str) -> torch.Tensor | None:
    """The content of a parameter that accelerate has moved away."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", (hook,)):
        weights = getattr(candidate, "weights_map", None)
        if weights is not None:
            try:
                return weights[name]
            except KeyError:
                continue
    return None


def _offloaded_in_memory(module: nn.Module, name: str) -> torch.Tensor | None:
    """The content of a parameter that accelerate keeps in host memory; None for one on disk, or not offloaded."""
    hook = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", (hook,)):
        weights = getattr(candidate, "weights_map", None)
        dataset, prefix = getattr(weights, "dataset", weights), getattr(weights, "prefix", "")
        held = getattr(dataset, "state_dict", dataset)
        if isinstance(held, Mapping) and isinstance(held.get(prefix + name), torch.Tensor):
            tensor: torch.Tensor = held[prefix + name]
            return tensor
    return None


def _tensors(model: nn.Module, *, fetch_offloaded: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by name, shared ones by each of their names (once they are offloaded, nobody can
    tell any more); offloaded ones with their content if asked."""
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            if tensor.device.type == "meta" and fetch_offloaded:
                tensor = _offloaded(module, name)
                if tensor is None:
                    raise ValueError(f"the content of {prefix}.{name} is not available")
            yield f"{prefix}.{name}", tensor


def _is_adapted(module: nn.Module) -> bool:
    return hasattr(type(module), "merged_adapters") or "merged_adapters" in module.__dict__


def _layer_adapters(layer: Any) -> list[Any]:
    """Which adapters are active, merged and disabled in a layer that can have some (PEFT)."""
    return [
        sorted(map(str, layer.active_adapters)),
        sorted(map(str, layer.merged_adapters)),
        bool(layer.disable_adapters),
        sorted((str(name), float(scale)) for name, scale in getattr(layer, "scaling", {}).items()),
        # adapters chosen for one call (`adapter_names=`) come as a hook for as long as it lasts
        [str(hook.keywords) for hook in layer._forward_pre_hooks.values() if isinstance(hook, partial)],
    ]


def _relevant(config: Any) -> Any:
    if isinstance(config, dict):
        return {str(key): _relevant(value) for key, value in config.items() if key not in _IRRELEVANT}
    if isinstance(config, (list, tuple)):
        return [_relevant(value) for value in config]
    return config if isinstance(config, (int, float, bool, str, type(None))) else str(config)


def has_length_dependent_rope(config: Any) -> bool:
    """Whether the rotary frequencies change with the length of the text (dynamic NTK, LongRoPE)."""
    return any(rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope") for rope in _ropes(config))


def _ropes(config: Any) -> Iterator[dict[str, Any]]:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(found, dict):
        yield found
        yield from (rope for rope in found.values() if isinstance(rope, dict))


def position_limit(config: Any) -> int | None:
    """The number of tokens up to which KV depends on nothing that comes later; None if that is always so."""
    # models that state this number themselves (Phi) let go of their cache when a text grows beyond it
    original = getattr(config, "original_max_position_embeddings", None)
    if not has_length_dependent_rope(config):
        return original if isinstance(original, int) and original > 0 else None
    limits = [config.max_position_embeddings, original]
    limits += [rope.get("original_max_position_embeddings") for rope in _ropes(config)]
    return min(int(limit) for limit in limits if limit)


def positions_of(config: Any) -> int | None:
    """How many positions a model is made for, in tokens; None if it does not say."""
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    kinds = [rope for rope in _ropes(config) if rope.get("rope_type", rope.get("type")) == "dynamic"]
    return int(
        stated * max((float(rope.get("factor") or 1) for rope in kinds), default=1.0)
    )  # dynamic NTK reaches beyond


class Fingerprint:
    """The fingerprint of one model, kept up to date cheaply.

    `current()` costs a pass over the tensors' version counters and a few of their values; only when those have
    changed is the sample of all weights taken again. Where parameters were written to and the sample does not show
    it (a few rows of an embedding were trained, say), the fingerprint becomes one that no other model has.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()  # threads may be under different autocast, and must not get each other's
        self._marks: Any = None
        self._parameters: list[tuple[int, int]] = []
        self._content = ""
        self._salt = ""

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None, "the model is gone, and nothing but the model should ask for its fingerprint"
        return model

    def current(self) -> str:
        """The fingerprint (40 hex digits) of the model as it is now.

        Raises:
            ValueError, RuntimeError: the weights can't be read.
        """
        with self._lock:
            marks, parameters = self._current_marks()
            if marks != self._marks:
                content = self._compute()
                if content != self._content:
                    self._salt = ""
                elif parameters != self._parameters and _same_tensors(parameters, self._parameters):
                    self._salt = secrets.token_hex(20)
                self._content, self._marks, self._parameters = content, marks, parameters
            return self._salt or self._content

    def _settings(self) -> str:
        config: Any = self.model.config
        settings = {
            "class": type(self.model).__name__,
            "config": _relevant(config.to_dict()),
            "attention": str(getattr(config, "_attn_implementation", "")),
            "autocast": self._autocast(),
            "adapters": [_layer_adapters(module) for module in self.model.modules() if _is_adapted(module)],
            "layout": LAYOUT_VERSION,
        }
        return json.dumps(settings, sort_keys=True)

    def _wanted(self, *, fetch_offloaded: bool) -> Iterator[tuple[str, torch.Tensor]]:
        config: Any = self.model.config
        varying = has_length_dependent_rope(config.get_text_config(decoder=True))
        for name, tensor in _tensors(self.model, fetch_offloaded=fetch_offloaded):
            if not (varying and name.endswith("inv_freq")):
                yield name, tensor

    @torch.no_grad()
    def _current_marks(self) -> tuple[tuple[Any, ...], list[tuple[int, int]]]:
        """What tells that something changed, and the version counter of each parameter. Runs before every turn, so
        it does little and names nothing."""
        config: Any = self.model.config
        text = config.get_text_config(decoder=True)
        varying = has_length_dependent_rope(text)
        versions: list[Any] = []
        parameters: list[tuple[int, int]] = []
        adapters: list[Any] = []
        samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        modules = [self.model]
        while modules:
            module = modules.pop()
            modules.extend(child for child in module._modules.values() if child is not None)
            if _is_adapted(module):
                adapters.append(_layer_adapters(module))
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or (varying and name.endswith("inv_freq")):
                        continue
                    if tensor.device.type == "meta":
                        held = _offloaded_in_memory(module, name)
                        if held is None:
                            versions.append(name)
                            continue
                        tensor = held
                    device = tensor.device
                    # inference tensors have no version counter; nothing but the sample watches them
                    version = -1 if tensor.is_inference() else tensor._version
                    versions.append((id(tensor), version, tensor.data_ptr()))
                    if tensors is module._parameters:
                        parameters.append((id(tensor), version))
                    if tensor.numel():
                        samples.setdefault((device, tensor.dtype), []).append(_few_values(tensor))
        quick = [_raw_bytes(torch.cat(values)) for values in samples.values()]
        settings = (str(config.__dict__), str(text.__dict__), self._autocast(), self.model.training)
        return (settings, adapters, versions, quick), parameters

    def _autocast(self) -> str:
        device = next(self.model.parameters()).device.type
        return str(torch.get_autocast_dtype(device)) if _autocast_enabled(device) else ""

    def _compute(self) -> str:
        hasher = hashlib.blake2b(digest_size=20, person=b"attnstore-model")
        hasher.update(self._settings().encode())
        described: list[str] = []
        samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for name, tensor in sorted(self._wanted(fetch_offloaded=True), key=lambda item: item[0]):
            described.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.numel():
                # the few values that are watched between turns count too: a change of them must be one of the digest
                part = torch.cat([_sample(tensor, _RUNS, _RUN_LENGTH), _few_values(tensor.detach())])
                # where a weight lies must not matter, so samples are put in order by dtype alone
                samples.setdefault((torch.device("cpu"), tensor.dtype), []).append(part.cpu())
        hasher.update("\n".join(described).encode())
        for key in sorted(samples, key=str):
            hasher.update(_raw_bytes(torch.cat(samples[key])))
        return hasher.hexdigest()


def _same_tensors(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
    return [tensor for tensor, _ in a] == [tensor for tensor, _ in b]


def _autocast_enabled(device_type: str) -> bool:
    try:
        return torch.is_autocast_enabled(device_type)
    except RuntimeError:  # a device type without autocast
        return False


_fingerprints: "weakref.WeakKeyDictionary[nn.Module, Fingerprint]" = weakref.WeakKeyDictionary()


def fingerprint_of(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model, the same object as long as the model lives: what it knows outlasts `detach`."""
    found = _fingerprints.get(model)
    if found is None:
        found = _fingerprints[model] = Fingerprint(model)
    return found
