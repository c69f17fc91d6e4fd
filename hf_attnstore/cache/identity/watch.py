"""What tells that a model may not be what it was, looked at before every turn: it does little and names nothing.

The version counter, the address and a few values of every tensor; settings, adapters, autocast.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..model.structure import has_length_dependent_rope
from .adapters import is_adapted, state_of
from .samples import Peephole, comparable, few_values, peephole, raw_bytes
from .weights import Part, attribute_parts, hidden_parts, offloaded_in_memory, plain_parts

Marks = tuple[Any, ...]
"""Equal as long as nothing changed that shows."""
Versions = list[tuple[int, Any]]
"""The identity and the version counter of each parameter."""


class Watch:
    """Looks at one model."""

    def __init__(self) -> None:
        self._config: Any = None
        self._described = ""
        self._text: Any = None
        self._varying = False
        self._peepholes: dict[int, Peephole] = {}
        """Of plain tensors on the CPU, by identity: those that were there at the last look."""

    @torch.no_grad()
    def look(
        self, model: nn.Module, unusual: Sequence[weakref.ref[nn.Module]], visited: list[nn.Module]
    ) -> tuple[Marks, Versions]:
        """The marks of a model as it is now.

        Args:
            unusual: modules that compute with more than their parameters and buffers.
            visited: gets all modules, in an order that stays the same as long as they do.
        """
        settings = self._settings(model)
        varying = self._varying
        seen = _Seen(self._peepholes)
        versions: Versions = []
        adapters: list[Any] = []
        modules = [model]
        while modules:
            module = modules.pop()
            visited.append(module)
            if module._modules:
                modules.extend([child for child in module._modules.values() if child is not None])
            if is_adapted(module):
                adapters.append(state_of(module))
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or (varying and name.endswith("inv_freq")):
                        continue
                    version = seen.note_again(tensor) or seen.note_own(module, name, tensor)
                    if version is not None and tensors is module._parameters:
                        versions.append(version)
        for reference in unusual:
            more = reference()
            if more is not None:
                seen.note_parts(hidden_parts("", more, unpack=False))
        self._peepholes = seen.peepholes
        autocast = [autocast_dtype(kind) for kind in sorted(seen.device_types)]
        return (settings, autocast, model.training, adapters, seen.marks, seen.values()), versions

    def _settings(self, model: nn.Module) -> list[str]:
        """The model's settings in words; what follows from them is found out again only when they change."""
        config: Any = model.config
        described = str(config.__dict__)
        if config is not self._config or described != self._described:
            self._config, self._described = config, described
            self._text = config.get_text_config(decoder=True)
            self._varying = has_length_dependent_rope(self._text)
        return [described] if self._text is config else [described, str(self._text.__dict__)]


class _Seen:
    """What was seen of tensors."""

    def __init__(self, known: Mapping[int, Peephole]) -> None:
        self._known = known
        """Of tensors that were there at the last look, by identity."""
        self.marks: list[Any] = []
        self.device_types: set[str] = set()
        self.peepholes: dict[int, Peephole] = {}
        """For the next look."""
        self._samples: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}

    def note_again(self, tensor: torch.Tensor) -> tuple[int, int] | None:
        """Looks at a tensor that is what and where it was at the last look, as nearly all are; returns its identity and
        its version counter. None if it is another, or one that is looked at in another way."""
        hole = self._known.get(id(tensor))
        if hole is None or not hole.fits(tensor):
            return None
        return id(tensor), self._note_through(hole, id(tensor), tensor._version)

    def note_own(self, module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[int, Any] | None:
        """Looks at whatever a module has under a name; returns its identity and its version counters. None if there is
        nothing to be seen of it."""
        if tensor.is_meta:
            held = offloaded_in_memory(module, name)
            if held is None:
                self.marks.append(name)
                return None
            tensor = held
        if tensor.is_quantized:
            self.marks.append((id(tensor), tensor._version, tensor.data_ptr()))
            return id(tensor), tensor._version
        if type(tensor) in (nn.Parameter, torch.Tensor):
            return id(tensor), self.note(tensor, id(tensor))
        version = self.note_parts(plain_parts("", tensor))
        self.note_parts(attribute_parts("", tensor))
        return id(tensor), version

    def note(self, tensor: torch.Tensor, identity: int) -> int:
        """Looks at a plain tensor; returns its version counter."""
        try:
            version = tensor._version
        except RuntimeError:  # inference tensors have none; nothing but the sample watches them
            version = -1
        hole = peephole(tensor)
        if hole is not None:
            return self._note_through(hole, identity, version)
        self.marks.append((identity, version, tensor.data_ptr()))
        tensor = comparable(tensor)
        self.device_types.add(tensor.device.type)
        self._samples.setdefault((tensor.device, tensor.dtype), []).append(few_values(tensor))
        return version

    def _note_through(self, hole: Peephole, identity: int, version: int) -> int:
        if identity and version >= 0:
            self.peepholes[identity] = hole
        self.marks.append((identity, version, hole.address, hole.read()))
        self.device_types.add("cpu")
        return version

    def note_parts(self, parts: Iterator[Part]) -> list[int]:
        """Looks at the parts of a tensor that is not plain."""
        found = list(parts)
        self.marks.append([part for _, part in found if isinstance(part, str)])
        # the object may be made anew every time; the memory is the same
        return [self.note(part, 0) for _, part in found if isinstance(part, torch.Tensor)]

    def values(self) -> list[bytes]:
        """A few values of those tensors of which none are in `marks`."""
        return [raw_bytes(torch.cat(values)) for values in self._samples.values()]


def autocast_dtype(device_type: str) -> str:
    """What is computed in under autocast; empty without."""
    try:
        return str(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else ""
    except RuntimeError:  # a device type without autocast
        return ""
