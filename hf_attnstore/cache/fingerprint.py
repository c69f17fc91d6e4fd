"""The identity of what computes the KV: two models with the same fingerprint make the same keys and values.

Weights are identified by content, from bounded samples of every tensor, so that a name never decides; quantised ones
with all that says what their bytes mean (see `weights`). Changes in place are noticed by the tensors' version
counters and, since `.data` bypasses those, by a few values of each tensor that are compared before every turn.
"""

import hashlib
import json
import secrets
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .adapters import adapters_of, is_adapted, is_inert, names_of_parts, state_of
from .ranks import ranks_of
from .weights import Part, attribute_parts, hidden_parts, module_parts, plain_parts

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
    values = tensor.numel()
    if values < _QUICK_VALUES:
        return tensor.detach().reshape(-1)
    return tensor.as_strided((_QUICK_VALUES,), ((values - 1) // (_QUICK_VALUES - 1),))


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


_Names = Mapping[tuple[str, ...], tuple[str, ...] | None]


def _step(name: str, child: str, names: _Names) -> tuple[str | None, _Names]:
    """The name of a part of what is called `name`, None if it does not count; and how the parts below it are called."""
    below = {path[1:]: to if to is None else to[1:] for path, to in names.items() if path[0] == child and path[1:]}
    to = names.get((child,), (child,))
    return (None if to is None else ".".join(filter(None, (name, *to)))), below


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Names]]:
    """Every module that computes, once, by the name under which it counts, and how its parts are called."""
    seen: set[int] = set()

    def visit(name: str, module: nn.Module, names: _Names) -> Iterator[tuple[str, nn.Module, _Names]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if is_adapted(module):
            names = names_of_parts(module)
        yield name, module, names
        for child_name, child in module._modules.items():
            if child is not None:
                called, below = _step(name, child_name, names)
                if called is not None:
                    yield from visit(called, child, below)

    yield from visit("", model, {})


def _tensors(name: str, module: nn.Module, names: _Names) -> Iterator[tuple[str, torch.Tensor]]:
    """A module's own parameters and buffers by name, offloaded ones with their content; shared ones by each of their
    names (once they are offloaded, nobody can tell any more)."""
    for own, tensor in (*module._parameters.items(), *module._buffers.items()):
        called = names.get((own,), (own,))
        if tensor is None or called is None:
            continue
        if tensor.device.type == "meta":
            tensor = _offloaded(module, own)
            if tensor is None:
                raise ValueError(f"the content of {name}.{own} is not available")
        yield f"{name}.{'.'.join(called)}", tensor


_COMPARED_AS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ORDINARY_DTYPES = frozenset(
    getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128".split()
)


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of a dtype that everything can be done with, and the same bytes."""
    return tensor if tensor.dtype in _ORDINARY_DTYPES else tensor.view(_COMPARED_AS[tensor.dtype.itemsize])


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
        self._parameters: list[tuple[int, Any]] = []
        self._content = ""
        self._salt = ""
        self._unusual: list[weakref.ref[nn.Module]] = []
        """Modules that compute with more than their parameters and buffers."""
        self._failure: tuple[Any, str] | None = None

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
            return self._current()

    def _current(self) -> str:
        marks, parameters = self._current_marks()
        if marks != self._marks:
            if self._failure is not None and self._failure[0] == marks:
                raise ValueError(self._failure[1])
            found = self._unusual
            try:
                content = self._compute()
            except Exception as error:
                self._failure = marks, str(error)
                raise
            if found != self._unusual:  # there is more to be watched: what was there before it is taken as it is now
                marks, parameters = self._current_marks()
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
            "adapters": [
                [name, *adapters_of(module)]
                for name, module, _ in _named_modules(self.model)
                if is_adapted(module) and not is_inert(module)
            ],
            "layout": LAYOUT_VERSION,
        }
        ranks = ranks_of(self.model)
        if not ranks.alone:
            settings["rank"] = [ranks.rank, ranks.size]
        return json.dumps(settings, sort_keys=True)

    @torch.no_grad()
    def _current_marks(self) -> tuple[tuple[Any, ...], list[tuple[int, Any]]]:
        """What tells that something changed, and the version counter of each parameter. Runs before every turn, so
        it does little and names nothing."""
        config: Any = self.model.config
        text = config.get_text_config(decoder=True)
        varying = has_length_dependent_rope(text)
        versions: list[Any] = []
        parameters: list[tuple[int, Any]] = []
        adapters: list[Any] = []
        samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

        def watch(tensor: torch.Tensor, identity: int) -> int:
            try:
                version = tensor._version
            except RuntimeError:  # inference tensors have none; nothing but the sample watches them
                version = -1
            versions.append((identity, version, tensor.data_ptr()))
            tensor = _comparable(tensor)
            values = _few_values(tensor)
            samples.setdefault((tensor.device, tensor.dtype), []).append(values)
            return version

        def watch_parts(parts: Iterator[Part]) -> list[int]:
            found = list(parts)
            versions.append([part for _, part in found if isinstance(part, str)])
            # the object may be made anew every time; the memory is the same
            return [watch(part, 0) for _, part in found if isinstance(part, torch.Tensor)]

        modules = [self.model]
        while modules:
            module = modules.pop()
            modules.extend(child for child in module._modules.values() if child is not None)
            if is_adapted(module):
                adapters.append(state_of(module))
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or (varying and name.endswith("inv_freq")):
                        continue
                    if tensor.is_meta:
                        held = _offloaded_in_memory(module, name)
                        if held is None:
                            versions.append(name)
                            continue
                        tensor = held
                    version: Any
                    if tensor.is_quantized:
                        version = tensor._version
                        versions.append((id(tensor), version, tensor.data_ptr()))
                    elif type(tensor) in (nn.Parameter, torch.Tensor):
                        version = watch(tensor, id(tensor))
                    else:
                        version = watch_parts(plain_parts("", tensor))
                        watch_parts(attribute_parts("", tensor))
                    if tensors is module._parameters:
                        parameters.append((id(tensor), version))
        for reference in self._unusual:
            unusual = reference()
            if unusual is not None:
                watch_parts(hidden_parts("", unusual, unpack=False))
        quick = [_raw_bytes(torch.cat(values)) for values in samples.values()]
        settings = [str(each.__dict__) for each in ((config,) if text is config else (config, text))]
        autocast = [_autocast_dtype(kind) for kind in sorted({device.type for device, _ in samples})]
        return (settings, autocast, self.model.training, adapters, versions, quick), parameters

    def _autocast(self) -> str:
        first = next(self.model.parameters(), None)
        return _autocast_dtype(first.device.type if first is not None else "cpu")

    def _parts(self) -> Iterator[Part]:
        config: Any = self.model.config
        varying = has_length_dependent_rope(config.get_text_config(decoder=True))
        self._unusual = []
        for name, module, names in _named_modules(self.model):
            for called, tensor in _tensors(name, module, names):
                if not (varying and called.endswith("inv_freq")):
                    yield from plain_parts(called, tensor)
            beside = list(module_parts(name, module))
            if beside:
                self._unusual.append(weakref.ref(module))
                yield from beside

    @torch.no_grad()
    def _compute(self) -> str:
        hasher = hashlib.blake2b(digest_size=20, person=b"attnstore-model")
        hasher.update(self._settings().encode())
        described: list[str] = []
        samples: dict[torch.dtype, list[torch.Tensor]] = {}
        for name, part in sorted(self._parts(), key=lambda item: item[0]):
            if isinstance(part, str):
                described.append(f"{name} {part}")
                continue
            described.append(f"{name} {part.dtype} {tuple(part.shape)}")
            if part.numel():
                plain = _comparable(part.detach())
                # the few values that are watched between turns count too: a change of them must be one of the digest
                sample = torch.cat([_sample(plain, _RUNS, _RUN_LENGTH), _few_values(plain)])
                # where a weight lies must not matter, so samples are put in order by dtype alone
                samples.setdefault(plain.dtype, []).append(sample.cpu())
        hasher.update("\n".join(described).encode())
        for dtype in sorted(samples, key=str):
            hasher.update(_raw_bytes(torch.cat(samples[dtype])))
        return hasher.hexdigest()


def _same_tensors(a: list[tuple[int, Any]], b: list[tuple[int, Any]]) -> bool:
    return [tensor for tensor, _ in a] == [tensor for tensor, _ in b]


def _autocast_dtype(device_type: str) -> str:
    """What is computed in under autocast; empty without."""
    try:
        return str(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else ""
    except RuntimeError:  # a device type without autocast
        return ""


_fingerprints: "weakref.WeakKeyDictionary[nn.Module, Fingerprint]" = weakref.WeakKeyDictionary()


def fingerprint_of(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model, the same object as long as the model lives: what it knows outlasts `detach`."""
    found = _fingerprints.get(model)
    if found is None:
        found = _fingerprints[model] = Fingerprint(model)
    return found
