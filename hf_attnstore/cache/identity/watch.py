"""What tells that a model may not be what it was, looked at before every turn: it does little and names nothing.

The version counter, the address and a few values of every tensor; settings, adapters, autocast.
"""

import weakref
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import nn

from ..model.structure import has_length_dependent_rope
from .adapters import adapted_of, state_of
from .samples import comparable, few_values, peephole, raw_bytes, seen_through
from .weights import Part, attribute_parts, hidden_parts, offloaded_in_memory, plain_parts

Marks = tuple[Any, ...]
"""Equal as long as nothing changed that shows."""
Versions = list[tuple[int, Any]]
"""The identity and the version counter of each parameter."""
_PLACES = itemgetter("_modules", "_parameters", "_buffers")
"""Where a module has modules and tensors."""
_VERSION = attrgetter("_version")
_PLACED = (_VERSION, torch.Tensor.data_ptr, attrgetter("nbytes"), torch.Tensor.is_contiguous)
_VARIES = "inv_freq"
"""How buffers end that are made anew where frequencies depend on the length of the text: these are not looked at."""


class Watch:
    """Looks at one model."""

    def __init__(self) -> None:
        self._config: Any = None
        self._described = ""
        self._text: Any = None
        self._varying = False
        self._seen: _Seen
        """What was seen at the last look."""
        self._last: _Unchanged | None = None
        """Tells whether the same would be seen now. None where that can't be told."""
        self._around: Marks = ()
        """What surrounded the model at the last look."""

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
        modules = self._last.modules_if_unchanged() if self._last is not None and not unusual else None
        if modules is None:
            modules = _all_modules(model)
            seen = self._seen = _Seen(modules, varying=self._varying)
            for reference in unusual:
                more = reference()
                if more is not None:
                    seen.note_parts(hidden_parts("", more, unpack=False))
            self._last = _Unchanged(modules, seen.tensors, varying=self._varying) if seen.usual else None
        seen = self._seen
        visited += modules
        self._around = self._surroundings(model, modules)
        return (settings, *self._around, seen.marks, seen.values()), seen.versions

    def in_place(self, model: nn.Module) -> list[nn.Module] | None:
        """The model's modules, if at least these and the tensors are the ones of the last look, where they were, and
        neither a version counter nor an adapter nor what surrounds the model has changed: a third of what a look takes.
        None if one has, or where that can't be told."""
        modules = self._last.modules_in_place() if self._last is not None else None
        return modules if modules is not None and self._surroundings(model, modules) == self._around else None

    def _surroundings(self, model: nn.Module, modules: Sequence[nn.Module]) -> Marks:
        """Autocast, mode and adapters."""
        adapters = [state_of(module) for module in adapted_of(modules)]
        return [autocast_dtype(kind) for kind in sorted(self._seen.device_types)], model.training, adapters

    def glance(self) -> bool:
        """Whether nothing has been written to since the last look, as far as version counters tell: a hundredth of what
        a look takes, and no more than a hint. False where even that is not known."""
        return self._last is not None and self._last.versions_unchanged()

    def _settings(self, model: nn.Module) -> list[str]:
        """The model's settings in words; what follows from them is found out again only when they change."""
        config: Any = model.config
        described = str(config.__dict__)
        if config is not self._config or described != self._described:
            self._config, self._described = config, described
            self._text = config.get_text_config(decoder=True)
            self._varying = has_length_dependent_rope(self._text)
            self._last = None
        return [described] if self._text is config else [described, str(self._text.__dict__)]


def _all_modules(model: nn.Module) -> list[nn.Module]:
    found, waiting = [], [model]
    while waiting:
        module = waiting.pop()
        found.append(module)
        if module._modules:
            waiting.extend([child for child in module._modules.values() if child is not None])
    return found


class _Seen:
    """What was seen of the tensors of all modules of a model.

    Args:
        varying: whether there are buffers that are not to be looked at.
    """

    def __init__(self, modules: Sequence[nn.Module], *, varying: bool) -> None:
        self.marks: list[Any] = []
        self.versions: Versions = []
        self.device_types: set[str] = set()
        self.tensors: list[torch.Tensor] = []
        """What was looked at."""
        self.usual = True
        """Whether these are ordinary tensors, which modules have under their names, and all that there is."""
        self._values: list[bytes] | None = None
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or (varying and name.endswith(_VARIES)):
                        continue
                    version = self._note_own(module, name, tensor)
                    if version is not None and tensors is module._parameters:
                        self.versions.append(version)

    def _note_own(self, module: nn.Module, name: str, tensor: torch.Tensor) -> tuple[int, Any] | None:
        """Looks at whatever a module has under a name; returns its identity and its version counters. None if there is
        nothing to be seen of it."""
        if tensor.is_meta:
            self.usual = False
            held = offloaded_in_memory(module, name)
            if held is None:
                self.marks.append(name)
                return None
            tensor = held
        if tensor.is_quantized:
            self.usual = False
            self.marks.append((id(tensor), tensor._version, tensor.data_ptr()))
            return id(tensor), tensor._version
        if type(tensor) in (nn.Parameter, torch.Tensor):
            return id(tensor), self._note(tensor, id(tensor))
        version = self.note_parts(plain_parts("", tensor))
        self.note_parts(attribute_parts("", tensor))
        return id(tensor), version

    def _note(self, tensor: torch.Tensor, identity: int) -> int:
        """Looks at a plain tensor; returns its version counter."""
        try:
            version = tensor._version
        except RuntimeError:  # inference tensors have none; nothing but the sample watches them
            version, self.usual = -1, False
        self.marks.append((identity, version, tensor.data_ptr()))
        self.device_types.add(tensor.device.type)
        self.tensors.append(tensor)
        return version

    def note_parts(self, parts: Iterator[Part]) -> list[int]:
        """Looks at the parts of a tensor that is not plain."""
        self.usual = False
        found = list(parts)
        self.marks.append([part for _, part in found if isinstance(part, str)])
        # the object may be made anew every time; the memory is the same
        return [self._note(part, 0) for _, part in found if isinstance(part, torch.Tensor)]

    def values(self) -> list[bytes]:
        """A few values of every tensor."""
        if self._values is None:
            self._values, self.tensors = _few_values(self.tensors), []  # none is kept
        return self._values


class _Unchanged:
    """Tells that all that a model has is what and where it was, of a model of ordinary tensors. A few passes over all
    modules and tensors, instead of some steps for each of some hundreds: a fifth of the time. Keeps none of them.

    Args:
        modules: all of the model's.
        tensors: what was seen of them.
    """

    def __init__(self, modules: list[nn.Module], tensors: list[torch.Tensor], *, varying: bool) -> None:
        self._varying = varying
        self._modules = list(map(weakref.ref, modules))
        self._lengths, self._names, entries = self._contents(modules)
        self._entries = list(map(weakref.ref, entries))
        self._tensors = list(map(weakref.ref, tensors))
        self._placed = _placed(tensors)
        holes = list(map(peephole, tensors))
        self._holes = [hole for hole in holes if hole is not None]
        self._others = [number for number, hole in enumerate(holes) if hole is None]
        self._values = self._read(tensors)

    def modules_if_unchanged(self) -> list[nn.Module] | None:
        """The model's modules; None if anything has changed."""
        modules = self._modules_if_same()
        if modules is None:
            return None
        tensors: list[Any] = [tensor() for tensor in self._tensors]  # all there: they are among the entries
        return modules if _placed(tensors) == self._placed and self._read(tensors) == self._values else None

    def modules_in_place(self) -> list[nn.Module] | None:
        """As `modules_if_unchanged`, by version counters and addresses alone: without the values of tensors."""
        modules = self._modules_if_same()
        if modules is None:
            return None
        tensors: list[Any] = [tensor() for tensor in self._tensors]
        versions, places = (list(map(look, tensors)) for look in _PLACED[:2])
        return modules if [versions, places] == self._placed[:2] else None

    def _modules_if_same(self) -> list[nn.Module] | None:
        """The model's modules, if these and their tensors are the same objects under the same names."""
        modules = [module for reference in self._modules if (module := reference()) is not None]
        if len(modules) != len(self._modules):
            return None
        lengths, names, entries = self._contents(modules)
        same = (
            lengths == self._lengths
            and names == self._names
            and all(map(is_, [entry() for entry in self._entries], entries))
        )
        return modules if same else None

    def versions_unchanged(self) -> bool:
        """Whether no tensor that was seen has been written to since, as far as version counters tell."""
        try:
            return list(map(_VERSION, [tensor() for tensor in self._tensors])) == self._placed[0]
        except AttributeError:  # one of them is gone
            return False

    def _contents(self, modules: Sequence[nn.Module]) -> tuple[list[int], list[str], list[Any]]:
        """How many entries there are in each of the modules' places, what they are called, and what there is."""
        places = list(chain.from_iterable(map(_PLACES, map(vars, modules))))
        filled = list(filter(None, places))
        if self._varying:
            filled = [{name: entry for name, entry in place.items() if not name.endswith(_VARIES)} for place in filled]
        entries = [entry for entry in chain.from_iterable(map(dict.values, filled)) if entry is not None]
        return list(map(len, places)), list(chain.from_iterable(filled)), entries

    def _read(self, tensors: Sequence[torch.Tensor]) -> tuple[list[bytes], list[bytes]]:
        """A few values of the tensors, which are where they were."""
        return seen_through(self._holes), _few_values([tensors[number] for number in self._others])


def _placed(tensors: Sequence[torch.Tensor]) -> list[Any]:
    """Version counters, and where in memory the tensors are, in which shape."""
    return [list(map(look, tensors)) for look in _PLACED]


def _few_values(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """A few values of each tensor, in one piece for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in map(comparable, tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(few_values(tensor))
    return [raw_bytes(torch.cat(values)) for values in groups.values()]


def autocast_dtype(device_type: str) -> str:
    """What is computed in under autocast; empty without."""
    try:
        return str(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else ""
    except RuntimeError:  # a device type without autocast
        return ""
