"""What a model computes by beside its tensors: code, hooks, numbers in its modules, switches of torch.

Read once in full, then watched: before every turn it is only looked whether anything is another object than it was.
"""

import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from operator import is_, itemgetter, methodcaller
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from .adapters import is_adapted, is_inert
from .callables import SIMPLE, Checks, CodeReader, UnknownCodeError, is_librarys, own_attributes
from .observers import only_looks
from .weights import keeps_more

_NEUTRAL = ("hf_attnstore.", "transformers.utils.output_capturing", "peft.", "accelerate.")
"""Whose hooks change nothing that is not identified otherwise."""
_LENGTH_SEEN = "max_seq_len_cached"
"""What rotary embeddings remember of the longest text so far: nothing is reused where frequencies depend on it."""
_KNOWN_MOVERS = frozenset({"AlignDevicesHook", "SequentialHook", "CpuOffload", "AddHook", "ModelHook"})
"""Of accelerate's hooks, those that only say where something is computed."""
_NOT_OF_COMPUTING = frozenset(
    "generate init_continuous_batching prepare_inputs_for_generation config generation_config".split()
)
_RANDOM = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._NormBase)
"""Modules of torch's that compute something else in training mode."""
BESIDE = "_attnstore_computes_by"
"""An attribute of forwards of ours in a module's place: gives what stood there before, if anything."""
_PLACE = "_attnstore_computing"
"""Where a model keeps what is watched of it. Nobody else may: what is watched may know the model."""
_TRAINING = methodcaller("get", "training")
"""None of a wrapper of `torch.compile`, which has the mode of the module in it."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_SWITCHES = (
    ("float32 products", torch.get_float32_matmul_precision, "highest"),
    ("default dtype", torch.get_default_dtype, torch.float32),
)

Named = Sequence[tuple[str, nn.Module]]


class _Watched:
    """What a model's modules were when they were read: their kinds, plain attributes and hooks. Kept in the model;
    copies and files of it are without.

    Args:
        modules: all of the model's.
        own: of each, the attributes that count.
    """

    def __init__(
        self, reader: "Computing", checks: Checks, modules: Sequence[nn.Module], own: Sequence[Sequence[str]]
    ) -> None:
        self.reader = reader
        self.checks = checks
        self._modules = list(map(weakref.ref, modules))
        self._kinds = list(map(type, modules))
        attributes = list(map(vars, modules))
        self._ends = _ends(attributes)
        self._picks = [
            itemgetter(*_HOOKS, *(("training",) if "training" in held else ()), *names)
            for held, names in zip(attributes, own, strict=True)
        ]
        self._values = self._picked(attributes)
        self._modes = list(map(_TRAINING, attributes))
        self.hooks = [held[name] for held in attributes for name in _HOOKS]
        self._filled = [(hooks, list(hooks.items())) for hooks in self.hooks if hooks]

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """Whether all of it is as it was. A few passes over all modules: some steps for each of some hundreds take
        twice as long."""
        attributes = [module.__dict__ for module in modules]
        return (
            len(modules) == len(self._modules)
            and all(map(is_, [module() for module in self._modules], modules))
            and list(map(type, modules)) == self._kinds
            and _ends(attributes) == self._ends
            and self._values is not None
            and self._picked(attributes) == self._values
            and self._hooks_hold()
            and self.checks.hold()
        )

    def same_modes(self, modules: Sequence[nn.Module]) -> bool:
        """Whether modules, which are the same ones, have the same hooks, and are in training mode where they were."""
        return list(map(_TRAINING, map(vars, modules))) == self._modes and self._hooks_hold()

    def _hooks_hold(self) -> bool:
        return self.count_hooks() == sum(len(items) for _, items in self._filled) and all(
            list(hooks.items()) == items for hooks, items in self._filled
        )

    def _picked(self, attributes: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]] | None:
        """The attributes that count, of each module; None if one is not there."""
        try:
            return [pick(held) for pick, held in zip(self._picks, attributes, strict=True)]
        except KeyError:
            return None

    def count_hooks(self) -> int:
        return sum(map(len, self.hooks))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> Any:
        return types.NoneType, ()


def _ends(attributes: Sequence[dict[str, Any]]) -> list[Any]:
    """How many attributes each module has, and which came last: one that is added is the last one, whatever else goes.
    All their names would be some thousands, from all over memory."""
    return [*map(len, attributes), *map(next, map(reversed, attributes))]


class Computing:
    """What one model computes by."""

    def __init__(self) -> None:
        self.words = ""
        """The same for models that compute alike, in every process. Empty as long as nothing was read."""
        self.problem = ""
        """What of it can't be told, if something can't."""
        self.additions = False
        """Whether there is code that is neither the model's own nor a library's, which may change while it runs."""
        self.reads = 0
        """How often it was read in full."""

    def unchanged(self, model: nn.Module, modules: Sequence[nn.Module]) -> bool:
        """Whether all is as it was when it was read.

        Args:
            modules: all of the model's, in the order of the last look.
        """
        watched: _Watched | None = model.__dict__.get(_PLACE)
        return watched is not None and watched.reader is self and watched.holds(modules)

    def same_modes(self, model: nn.Module, modules: Sequence[nn.Module]) -> bool:
        """Whether hooks and training modes, at least, are as they were when it was read; modules as in `unchanged`."""
        watched: _Watched | None = model.__dict__.get(_PLACE)
        return watched is not None and watched.reader is self and watched.same_modes(modules)

    def read(self, model: nn.Module, named: Named, modules: Sequence[nn.Module]) -> None:
        """Reads what the model computes by.

        Args:
            named: the modules that count, by the names under which they do.
        """
        self.reads += 1
        reader = CodeReader({id(module): name for name, module in named} | {id(model): ""}, _choices(modules))
        model.__dict__.setdefault(_PLACE, None)  # before the names of attributes are noted
        self.problem = ""
        lines: list[str] = []
        watched: dict[int, list[str]] = {}
        try:
            lines += _around(reader)
            beside = set(_of_adapters(modules))
            for name, module in named:
                said, own = _of_module(model, name, module, reader, beside=id(module) in beside)
                watched[id(module)] = own
                if said:
                    lines.append(said)
        except UnknownCodeError as error:
            self.problem = str(error)
        self.additions = reader.additions
        names = [watched.get(id(module), []) for module in modules]
        model.__dict__[_PLACE] = _Watched(self, reader.checks, modules, names)
        self.words = self.problem or "\n".join(sorted(lines))


def count_hooks(model: nn.Module) -> int:
    """How many hooks are on a model: cheap enough for every forward, where all else is looked at before a turn only."""
    watched: _Watched | None = model.__dict__.get(_PLACE)
    return watched.count_hooks() if watched is not None else 0


def forget(model: nn.Module) -> None:
    """Takes off a model what was put there to watch it."""
    model.__dict__.pop(_PLACE, None)


def switches() -> list[str]:
    """Settings of torch, for the whole process or around a call, that change what is computed by more than rounding.

    Raises:
        UnknownCodeError: something stands between the model and torch, and nobody can tell what it does.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        _check_modes()
    return [f"{name} {value}" for name, read, usual in _SWITCHES if (value := read()) != usual]


def _check_modes() -> None:
    modes: list[Any] = [torch._C._get_function_stack_at(n) for n in range(torch._C._len_torch_function_stack())]
    modes += [torch._C._get_dispatch_stack_at(n) for n in range(torch._C._len_torch_dispatch_stack())]
    for mode in modes:
        if type(mode).__module__ != "torch.utils._device":  # a default device
            raise UnknownCodeError(f"a {type(mode).__name__} stands between the model and torch")


def _choices(modules: Iterable[nn.Module]) -> set[str]:
    """The names by which a model's settings choose among implementations."""
    configs = {id(config): config for module in modules if (config := module.__dict__.get("config")) is not None}
    names = ("_attn_implementation", "_experts_implementation")
    chosen = {getattr(config, name, None) for config in configs.values() for name in names}
    return {name for name in chosen if isinstance(name, str)}


def _around(reader: CodeReader) -> list[str]:
    """Hooks on all modules there are."""
    said = []
    for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
        reader.checks.container(hooks)
        for hook in hooks.values():
            said.append(f"every module: {_hook_words('every module', hook, reader)}")
    return said


def _of_module(
    model: nn.Module, name: str, module: nn.Module, reader: CodeReader, *, beside: bool
) -> tuple[str, list[str]]:
    """What one module computes by, and which of its attributes are to be watched.

    Args:
        beside: whether it is a part of an adapter, which is identified by its tensors and its layer's settings.
    """
    where = f"{name or 'the model'} ({type(module).__name__})"
    said = [
        part for hook in module._forward_pre_hooks.values() if (part := _hook_words(f"before {where}", hook, reader))
    ]
    said += [part for hook in module._forward_hooks.values() if (part := _hook_words(f"after {where}", hook, reader))]
    forward = _forward_words(where, module, reader)
    if forward:
        said.append(forward)
    if beside or is_adapted(module):
        if not beside and not is_inert(module):
            said.append(reader.of_class(type(module))[0])
        return (f"{name}: {' '.join(said)}" if said else ""), []
    code, names, sets = reader.of_class(type(module))
    if module.training and not model.training and ("training" in names or isinstance(module, _RANDOM)):
        raise UnknownCodeError(f"{where} is in training mode (model.eval() makes its KV reproducible)")
    attributes, watched = _attributes(module, where, names, sets, reader)
    return f"{name}: {type(module).__qualname__} {code} {attributes} {' '.join(said)}", watched


def _of_adapters(modules: Iterable[nn.Module]) -> Iterator[int]:
    """The identities of modules that belong to adapters."""
    for module in modules:
        if is_adapted(module):
            layer: Any = module
            for container in (*getattr(layer, "adapter_layer_names", ()), *getattr(layer, "other_param_names", ())):
                held = module._modules.get(container)
                yield from map(id, held.modules() if held is not None else ())


def _attributes(
    module: nn.Module, where: str, names: frozenset[str], sets: frozenset[str], reader: CodeReader
) -> tuple[str, list[str]]:
    """A module's plain attributes in words, and which of them are to be watched.

    Numbers count unless the module's own code sets them; tensors and functions if it uses them and does not set them.
    Of a whole model, whose attributes say where it comes from, only those that are used.
    """
    said, watched = [], []
    whole = hasattr(type(module), "base_model_prefix")
    scratch = sets - {"attention_scaling"}  # set again by rotary embeddings, and always to the same
    for name, value in sorted(own_attributes(module).items()):
        used = name in names
        if name in scratch or name in _NOT_OF_COMPUTING or name.endswith(_LENGTH_SEEN) or (whole and not used):
            continue
        if isinstance(value, SIMPLE):
            said.append(f"{name}={value!r}")
            watched.append(name)
        elif name not in ("forward", "_old_forward") and not isinstance(value, nn.Module):
            counts = used or (callable(value) and hasattr(type(module), name))
            if not counts or (keeps_more(module) and not callable(value)):  # its state is looked at with the tensors
                continue
            reader.checks.entry(vars(module), name, value)
            said.append(f"{name}={reader.of_value(f'{where}.{name}', value, strict=not whole)}")
    return " ".join(said), watched


def _hook_words(where: str, hook: Any, reader: CodeReader) -> str:
    """What a hook does, in words; nothing if that is known to change nothing."""
    function = getattr(hook, "func", hook)
    module = getattr(function, "__module__", None) or type(function).__module__
    owned = is_librarys(function) or (is_librarys(type(function)) and not isinstance(function, types.FunctionType))
    owned = owned or module.startswith("hf_attnstore.")
    if owned and module.startswith(_NEUTRAL):
        return ""
    if only_looks(hook):
        return ""
    reader.additions = True
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{where}: {name} {reader.of_value(f'the hook {name} {where}', hook, strict=not owned)}"


def _forward_words(where: str, module: nn.Module, reader: CodeReader) -> str:
    """What stands in the place of a module's own forward, in words."""
    mover = module.__dict__.get("_hf_hook")
    for hook in getattr(mover, "hooks", (mover,)) if mover is not None else ():
        known = type(hook).__module__.startswith("accelerate.") and type(hook).__name__ in _KNOWN_MOVERS
        if not known:
            raise UnknownCodeError(f"{where} has a {type(hook).__name__}, which may change what it computes")
    forward = module.__dict__.get("_old_forward" if mover is not None else "forward")
    if hasattr(forward, BESIDE):  # one of ours: what stood there before it is what computes
        forward = getattr(forward, BESIDE)(module)
    if forward is None or getattr(forward, "__func__", None) is type(module).forward:
        return ""
    reader.additions = True
    name = getattr(forward, "__qualname__", type(forward).__qualname__)
    return f"forward {name} {reader.of_value(f'the forward of {where}, {name},', forward, strict=True)}"
