"""Code by content: what a model's functions do and which numbers they go by, in words that every process has alike.

A library's own functions say nothing here: whoever calls them names them. What somebody put in their place counts with
its bytecode, its constants and closures, and all that it uses in turn. Docstrings, comments, annotations, names of
variables and places in files do not count.
"""

import functools
import hashlib
import opcode
import operator
import os
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from .samples import comparable, few_values, raw_bytes, sample_of

SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.Size, Enum)
"""Values whose words are their content."""

_LIBRARIES = (
    "torch transformers accelerate peft numpy safetensors tokenizers triton kernels hf_attnstore "
    "packaging huggingface_hub tqdm regex yaml filelock sympy einops typing_extensions"
).split()
"""What models rest on: transformers, torch, and what these use."""
_COMPUTES = ("models/", "activations.py", "pytorch_utils.py")
"""Of transformers, the code of models: its content counts."""
_LEADS_ON = ("masking_utils.py", "modeling_rope_utils.py", "integrations/")
"""Of transformers, what all models share: its text changes with every version, and hardly ever what it computes. So it
counts for nothing; but it leads to functions that may have been replaced."""
_UNSTABLE = frozenset(
    "random rand randn randint rand_like randn_like randint_like randperm bernoulli bernoulli_ multinomial normal_ "
    "uniform_ manual_seed urandom time time_ns perf_counter monotonic environ getenv open input exec eval globals "
    "locals __import__ import_module data_ptr".split()
)
_RENAMED = {"past_key_values": "cache", "past_key_value": "cache", "layer_past": "cache", "cache_params": "cache"}
"""Names of arguments that mean the same, whichever transformers one has."""
_SMALL = 1 << 20
_DEPTH, _ENTRIES, _FUNCTIONS = 6, 256, 4000
_MISSING = object()


class UnknownCodeError(ValueError):
    """What a model computes by can't be identified; the message names the place."""


@cache
def _roots() -> dict[str, str]:
    """Folders of libraries, and what is in them."""
    found = {os.path.realpath(sysconfig.get_paths()[name]): "python" for name in ("stdlib", "platstdlib")}
    for name in _LIBRARIES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            found[os.path.dirname(os.path.realpath(file))] = name
    return found


@cache
def home_of_file(filename: str) -> str:
    """Whose code a file has: the name of a library, `computes` for what counts by content without being anybody's
    addition, `leads on`, or nothing for other code."""
    if filename.startswith("<frozen"):
        return "python"
    real = os.path.realpath(filename)
    folders = _roots()
    folder = os.path.dirname(real)
    while folder not in folders:
        parent = os.path.dirname(folder)
        if parent == folder or os.path.basename(folder) in ("site-packages", "dist-packages"):
            return "computes" if f"{os.sep}transformers_modules{os.sep}" in real else ""
        folder = parent
    if folders[folder] == "transformers":
        inside = real[len(folder) + 1 :].replace(os.sep, "/")
        if inside.startswith(_COMPUTES):
            return "computes"
        if inside.startswith(_LEADS_ON):
            return "leads on"
    return folders[folder]


def is_librarys(value: Any) -> bool:
    """Whether something that is called is a library's own."""
    if isinstance(value, types.FunctionType):
        return home_of_file(value.__code__.co_filename) not in ("", "computes", "leads on")
    if isinstance(value, type):
        return _is_library(value.__module__) and not _is_model_code(value.__module__)
    module = getattr(value, "__module__", None) or getattr(getattr(value, "__objclass__", None), "__module__", None)
    return _is_library(module or "builtins")


def _is_library(module: str) -> bool:
    top = module.partition(".")[0]
    return top in _LIBRARIES or top in sys.stdlib_module_names


def _is_model_code(module: str) -> bool:
    return module.startswith(("transformers.models.", "transformers.activations", "transformers_modules."))


class Checks:
    """What tells cheaply that code is as it was read. It keeps what it watches, and so must be kept by the model and by
    nobody else."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        self._codes: dict[int, tuple[types.FunctionType, Any, Any, Any]] = {}
        self._cells: list[tuple[types.CellType, Any]] = []
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._sequences: list[tuple[Any, tuple[Any, ...]]] = []
        self._others: list[Callable[[], bool]] = []

    def hold(self) -> bool:
        """Whether nothing has changed."""
        for namespace, name, value in self._entries.values():
            if namespace.get(name, _MISSING) is not value:
                return False
        for function, code, defaults, named in self._codes.values():
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if named is not None and function.__kwdefaults__ != named:
                return False
        for cell, value in self._cells:
            if cell_content(cell) is not value:
                return False
        for sized, size in self._sizes.values():
            if len(sized) != size:
                return False
        for sequence, values in self._sequences:
            if len(sequence) != len(values) or not all(map(operator.is_, sequence, values)):
                return False
        return all(check() for check in self._others)

    def entry(self, namespace: Any, name: str, value: Any) -> None:
        """Something in a namespace: a module's, a class's or an object's. `_MISSING` is what is not there."""
        self._entries[id(namespace), name] = (namespace, name, value)

    def size(self, sized: Any) -> None:
        self._sizes[id(sized)] = (sized, len(sized))

    def function(self, function: types.FunctionType) -> None:
        named = dict(function.__kwdefaults__) if function.__kwdefaults__ else None
        self._codes[id(function)] = (function, function.__code__, function.__defaults__, named)
        self._cells += [(cell, cell_content(cell)) for cell in function.__closure__ or ()]

    def container(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self.size(value)
            for name, entry in value.items():
                self.entry(value, name, entry)
        elif not isinstance(value, (tuple, frozenset)):
            self._sequences.append((value, tuple(value)))

    def content(self, read: Callable[[], Any]) -> None:
        """Something that has to be read to be compared."""
        before = read()
        self._others.append(lambda: read() == before)


class CodeReader:
    """Reads the code of one model.

    Args:
        inside: the names of the model's own modules, by identity: what is known of these by itself.
        choices: which entries of transformers' registries of functions the model uses.
    """

    def __init__(self, inside: Mapping[int, str], choices: Iterable[str]) -> None:
        self.checks = Checks()
        self.additions = False
        """Whether there is code that is neither the model's own nor a library's."""
        self._inside = inside
        self._choices = sorted(choices)
        self._classes: dict[type, tuple[str, frozenset[str], frozenset[str]]] = {}
        self._budget = _FUNCTIONS

    def of_class(self, kind: type) -> tuple[str, frozenset[str], frozenset[str]]:
        """What the modules of a class compute by: a digest of it; the names that this code uses; and the attributes
        that it sets itself, which are no settings."""
        found = self._classes.get(kind)
        if found is None:
            self._classes[kind] = (kind.__qualname__, frozenset(), frozenset())  # for code that leads back to it
            reading = _Reading(self, kind.__qualname__)
            reading.read_class(kind)
            found = self._classes[kind] = (reading.digest(), frozenset(reading.names), frozenset(reading.sets))
        return found

    def of_value(self, where: str, value: Any, *, strict: bool) -> str:
        """A digest of a value: a function, a hook, a tensor, a number.

        Args:
            strict: whether what can't be told is an error, rather than left out.

        Raises:
            UnknownCodeError: there is something in it that can't be told.
        """
        reading = _Reading(self, where)
        reading.out.append(reading.words(value, 0, strict=strict))
        reading.follow()
        return reading.digest()

    def spend(self, where: str) -> None:
        self._budget -= 1
        if self._budget < 0:
            raise UnknownCodeError(f"{where} uses more than {_FUNCTIONS} functions")

    def name_of(self, module: nn.Module) -> str | None:
        return self._inside.get(id(module))

    def chosen(self, registry: Any) -> Iterator[tuple[str, Any]]:
        """The entries of a registry that the model uses."""
        for name in self._choices:
            for mapping in (registry._local_mapping, registry._global_mapping):
                self.checks.entry(mapping, name, mapping.get(name, _MISSING))
            value = registry._local_mapping.get(name, registry._global_mapping.get(name))
            if value is not None:
                yield name, value


class _Reading:
    """One class or value, with all that it leads to: numbered as it is met, so that cycles end."""

    def __init__(self, reader: CodeReader, where: str) -> None:
        self.out: list[str] = []
        self.names: set[str] = set()
        self.sets: set[str] = set()
        self._reader = reader
        self._where = where
        self._numbers: dict[int, int] = {}
        self._wrappers: set[int] = set()
        self._kinds: tuple[type, ...] = ()
        self._met: list[Any] = []  # kept, so that no number stands for two
        self._queue: list[tuple[Callable[[Any, bool], None], Any, bool]] = []

    def digest(self) -> str:
        return hashlib.blake2b("\n".join(self.out).encode(), digest_size=16).hexdigest()

    def follow(self) -> None:
        """Reads what is still to be read."""
        while self._queue:
            read, value, strict = self._queue.pop(0)
            read(value, strict)

    # classes

    def read_class(self, kind: type) -> None:
        """What runs when a module of a class is called, found by name, as the code itself finds it."""
        self.out.append(kind.__qualname__)
        self._kinds = kind.__mro__
        for owner in kind.__mro__:
            self._reader.checks.size(owner.__dict__)
        done: set[str] = set()
        self.names |= {"forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__"}
        while True:
            for name in sorted(self.names - done):
                self._class_attribute(kind, name)
            done |= self.names
            self.follow()
            if self.names == done:
                return
            done &= self.names

    def _is_own(self, function: types.FunctionType) -> bool:
        """Whether a function was written in the class that is read: whoever wrote the class may be anybody."""
        return any(
            function.__module__ == kind.__module__ and function.__qualname__.startswith(f"{kind.__qualname__}.")
            for kind in self._kinds
        )

    def _class_attribute(self, kind: type, name: str) -> None:
        for owner in kind.__mro__:
            value = owner.__dict__.get(name, _MISSING)
            if value is _MISSING:
                continue
            self._reader.checks.entry(owner.__dict__, name, value)
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, property):
                value = value.fget
            if is_librarys(owner):
                if isinstance(value, SIMPLE):
                    return
                if name == "forward" and isinstance(value, types.FunctionType) and is_librarys(value):
                    self._later(self._lead_on, value, False)
            said = self.words(value, 0, strict=False)
            if said:
                self.out.append(f"{name}: {said}")
            return

    # values

    def words(self, value: Any, depth: int, *, strict: bool) -> str:
        """A value in words; functions and objects as numbers of what is read later, nothing for what says nothing."""
        if isinstance(value, SIMPLE):
            return repr(value)
        if depth > _DEPTH:
            return self._unknown("something nested too deeply", strict)
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, np.ndarray):
            return self._array(value, strict)
        if isinstance(value, (list, tuple, set, frozenset, Mapping)):
            return self._container(value, depth, strict)
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return "partial " + " ".join(self.words(part, depth + 1, strict=strict) for part in parts)
        if isinstance(value, types.MethodType):
            owner = value.__self__
            said = "" if isinstance(owner, type) else self.words(owner, depth + 1, strict=strict)
            return f"{self.words(value.__func__, depth + 1, strict=strict)} of {said}"
        if isinstance(value, types.FunctionType):
            return self._function_words(value, strict)
        if isinstance(value, nn.Module):
            name = self._reader.name_of(value)
            return f"module {name}" if name is not None else self._later(self._module, value, strict)
        if _is_registry(value):
            chosen = self._reader.chosen(value)
            return " ".join(f"{name} {self.words(entry, depth + 1, strict=strict)}" for name, entry in chosen)
        if isinstance(value, type):
            return "" if is_librarys(value) else self._later(self._type, value, strict)
        return self._object(value, depth, strict)

    def _unknown(self, what: str, strict: bool) -> str:
        if strict:
            raise UnknownCodeError(f"{self._where} goes by {what}, which says nothing of its content")
        return what

    def _later(self, read: Callable[[Any, bool], None], value: Any, strict: bool) -> str:
        number = self._numbers.get(id(value))
        if number is None:
            number = self._numbers[id(value)] = len(self._numbers)
            self._met.append(value)
            self._queue.append((read, value, strict))
        return f"#{number}"

    def _tensor(self, tensor: torch.Tensor) -> str:
        plain = comparable(tensor.detach())
        small = plain.nbytes <= _SMALL
        content = raw_bytes(plain.reshape(-1) if small else torch.cat([sample_of(plain), few_values(plain)]))
        reference = weakref.ref(tensor)

        def look() -> Any:
            now = reference()
            if now is None:
                return None
            return now.data_ptr(), _version(now), raw_bytes(few_values(comparable(now.detach())))

        self._reader.checks.content(look)
        return f"tensor {tensor.dtype} {tuple(tensor.shape)} {_digest(content)}"

    def _array(self, array: np.ndarray, strict: bool) -> str:
        if array.nbytes > _SMALL or array.dtype.hasobject:
            return self._unknown("a large array", strict)
        self._reader.checks.content(array.tobytes)
        return f"array {array.dtype} {array.shape} {_digest(array.tobytes())}"

    def _container(self, value: Any, depth: int, strict: bool) -> str:
        if len(value) > _ENTRIES:
            return self._unknown(f"a {type(value).__name__} of {len(value)} entries", strict)
        self._reader.checks.container(value)
        said = [
            self.words(item, depth + 1, strict=strict)
            for item in (value.items() if isinstance(value, Mapping) else value)
        ]
        if isinstance(value, (set, frozenset, Mapping)):
            said.sort()
        return f"{type(value).__name__}[{', '.join(said)}]"

    def _object(self, value: Any, depth: int, strict: bool) -> str:
        kind = type(value)
        if isinstance(value, torch.jit.ScriptFunction):
            return f"script {value.code}"
        if kind.__module__ == "torch._ops":  # an operator of torch's, or one that somebody registered
            return "" if str(value).startswith("aten") else self._unknown(f"the operator {value}", strict)
        inside = {functools._lru_cache_wrapper: "__wrapped__", functools.cached_property: "func"}.get(kind)
        if inside is None and kind.__module__.startswith("triton"):
            inside = "fn"
        if inside is not None and callable(getattr(value, inside, None)):
            return f"{kind.__qualname__} {self.words(getattr(value, inside), depth + 1, strict=strict)}"
        if callable(value) and hasattr(value, "__qualname__"):
            if is_librarys(value):
                return ""
            return self._unknown(f"{value.__module__}.{value.__qualname__}, compiled code", strict)
        if isinstance(value, (torch.device, types.ModuleType)) or (not strict and is_librarys(kind)):
            return ""
        if kind.__module__ in ("logging", "_thread", "threading", "weakref"):
            return ""
        if isinstance(value, np.generic):
            return repr(value)
        if not hasattr(value, "__dict__"):
            return self._unknown(f"a {kind.__name__}", strict)
        return self._later(self._instance, value, strict)

    # what is read later

    def _instance(self, value: Any, strict: bool) -> None:
        attributes = vars(value)
        self._reader.checks.container(attributes)
        kind = type(value)
        said = [self.words(kind, 0, strict=strict) or kind.__qualname__]
        said += [f"{name}={self.words(attributes[name], 1, strict=strict)}" for name in sorted(attributes)]
        self.out.append("object " + " ".join(said))

    def _module(self, module: nn.Module, strict: bool) -> None:
        said = [type(module).__qualname__, str(module.training), self._reader.of_class(type(module))[0]]
        self._reader.checks.size(vars(module))
        for kept in (module._parameters, module._buffers, module._modules):
            self._reader.checks.container(kept)
            said += [f"{name}={self.words(kept[name], 1, strict=strict)}" for name in sorted(kept)]
        for name, value in sorted(own_attributes(module).items()):
            self._reader.checks.entry(vars(module), name, value)
            said.append(f"{name}={self.words(value, 1, strict=strict)}")
        self.out.append("module " + " ".join(said))

    def _type(self, kind: type, strict: bool) -> None:
        self.out.append(f"class {kind.__qualname__}")
        if home_of_file(getattr(sys.modules.get(kind.__module__), "__file__", None) or "") == "computes":
            return  # a model's own classes do not compute unless they are modules, which are looked at by themselves
        for owner in kind.__mro__:
            if is_librarys(owner):
                continue
            self._reader.checks.size(owner.__dict__)
            for name in sorted(owner.__dict__):
                if name in ("__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__qualname__"):
                    continue
                value = owner.__dict__[name]
                self._reader.checks.entry(owner.__dict__, name, value)
                if isinstance(value, (staticmethod, classmethod)):
                    value = value.__func__
                elif isinstance(value, property):
                    value = value.fget
                said = self.words(value, 1, strict=False)
                if said:
                    self.out.append(f"{name}: {said}")

    def _function_words(self, function: types.FunctionType, strict: bool) -> str:
        original = getattr(function, "_torchdynamo_orig_callable", None)
        if original is not None:  # compiled, or kept from being compiled
            return self.words(original, 1, strict=strict)
        home = home_of_file(function.__code__.co_filename)
        if home == "leads on":
            self._later(self._lead_on, function, False)
            return ""
        if home in ("", "computes"):
            return self._later(self._function, function, strict)
        if id(function) in self._wrappers:
            return ""
        self._wrappers.add(id(function))
        # a library's wrapper around something: that counts
        cells = [cell_content(cell) for cell in function.__closure__ or ()]
        inner = [v for v in cells if isinstance(v, (types.FunctionType, types.MethodType, functools.partial))]
        said = [self.words(value, 1, strict=strict) for value in inner]
        return " ".join(filter(None, said))

    def _function(self, function: types.FunctionType, strict: bool) -> None:
        self._reader.spend(self._where)
        code = function.__code__
        self._reader.checks.function(function)
        names = _names(code)
        self.names |= names
        addition = home_of_file(code.co_filename) == "" and not self._is_own(function)
        if addition:
            self._reader.additions = True
            unstable = sorted(names & _UNSTABLE)
            if unstable and strict:
                raise UnknownCodeError(f"{self._where} uses {unstable[0]!r} in {function.__qualname__}")
            if strict and {"torch", "ops"} <= names:
                raise UnknownCodeError(f"{self._where} uses an operator of torch.ops in {function.__qualname__}")
        else:
            self.sets |= _stored(code)
        strict = strict and addition
        said = [f"function {_code_words(code)}"]
        said += [self.words(value, 1, strict=strict) for value in (function.__defaults__, function.__kwdefaults__)]
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            said.append(f"{_RENAMED.get(name, name)}={self.words(cell_content(cell), 1, strict=strict)}")
        said += self._globals(function, names, strict)
        self.out.append("\n".join(said))

    def _lead_on(self, function: types.FunctionType, strict: bool) -> None:
        self._reader.spend(self._where)
        self._reader.checks.function(function)
        self.sets |= _stored(function.__code__)
        said = [self.words(cell_content(cell), 1, strict=False) for cell in function.__closure__ or ()]
        said += self._globals(function, _names(function.__code__), False, plain=False)
        self.out += filter(None, said)

    def _globals(self, function: types.FunctionType, names: set[str], strict: bool, *, plain: bool = True) -> list[str]:
        """What a function finds under the names that it uses, in words; without what says nothing."""
        said = []
        for place, namespace, name in _used(function.__globals__, names):
            value = namespace[name]
            self._reader.checks.entry(namespace, name, value)
            skipped = isinstance(value, types.ModuleType) or (not plain and not callable(value))
            if skipped and not _is_registry(value):
                continue
            words = self.words(value, 1, strict=strict)
            if words:
                said.append(f"{place} {words}")
        return said


def _used(
    namespace: Mapping[str, Any], names: set[str], place: str = "", depth: int = 0
) -> Iterator[tuple[str, Any, str]]:
    """Where names are found: in a module's namespace, and in those of modules that are in it."""
    for name in sorted(names):
        value = namespace.get(name, _MISSING)
        if value is _MISSING or name.startswith("__"):
            continue
        if isinstance(value, types.ModuleType):
            yield f"{place}{name}", namespace, name
            if depth < 3 and name not in ("ops", "os", "sys"):
                yield from _used(vars(value), names, f"{place}{name}.", depth + 1)
        else:
            yield f"{place}{name}", namespace, name


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes, without those that every module has and those that say where it lies."""
    return {
        name: value
        for name, value in vars(module).copy().items()  # another thread may be attaching something
        if name not in _OF_MODULES and not name.startswith(("_hf", "_is_hf", "gradient_checkpointing", "_attnstore"))
    }


_OF_MODULES = frozenset({*vars(nn.Module()), "_compiled_call_impl", "_gradient_checkpointing_func"})


def _is_registry(value: Any) -> bool:
    """Whether something is one of transformers' registries of functions by name."""
    return isinstance(getattr(type(value), "_global_mapping", None), dict) and "_local_mapping" in value.__dict__


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def cell_content(cell: Any) -> Any:
    """What a variable of a closure holds; None if it holds nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


@cache
def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes that a function uses, also as strings."""
    found: set[str] = set()
    for part in _nested(code):
        found.update(part.co_names)
        found.update(c for c in part.co_consts if isinstance(c, str) and c.isidentifier())
    return found


@cache
def _stored(code: types.CodeType) -> frozenset[str]:
    """The attributes that a function sets, of whatever object."""
    store, extended = opcode.opmap["STORE_ATTR"], opcode.opmap["EXTENDED_ARG"]
    found = set()
    for part in _nested(code):
        argument = 0
        raw = part.co_code
        for operation, low in zip(raw[::2], raw[1::2], strict=True):
            argument = argument << 8 | low
            if operation == store:
                found.add(part.co_names[argument])
            if operation != extended:
                argument = 0
    return frozenset(found)


@cache
def _code_words(code: types.CodeType) -> str:
    """What code does, without where it stands and how its variables are called."""
    constants = list(code.co_consts)
    documented = code.co_flags & 0x4000000 if sys.version_info >= (3, 13) else not code.co_name.startswith("<")
    if documented and constants and isinstance(constants[0], str):
        constants[0] = None
    flags = code.co_flags & 0x2EF
    said = [
        f"{code.co_argcount} {code.co_posonlyargcount} {code.co_kwonlyargcount} {flags} {code.co_code.hex()}",
        " ".join(_RENAMED.get(name, name) for name in code.co_names),
        code.co_exceptiontable.hex(),
    ]
    for constant in constants:
        said.append(f"({_code_words(constant)})" if isinstance(constant, types.CodeType) else _constant(constant))
    return hashlib.blake2b("\n".join(said).encode(), digest_size=16).hexdigest()


def _constant(constant: Any) -> str:
    if isinstance(constant, frozenset):
        return f"frozenset{sorted(map(repr, constant))}"
    if isinstance(constant, tuple):
        return f"({', '.join(map(_constant, constant))})"
    return repr(_RENAMED.get(constant, constant) if isinstance(constant, str) else constant)
