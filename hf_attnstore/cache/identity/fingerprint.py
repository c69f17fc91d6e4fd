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
from typing import Any, TypeVar

import torch
from torch import nn

from ..model.ranks import ranks_of
from ..model.structure import has_length_dependent_rope
from .adapters import adapters_of, is_adapted, is_inert, names_of_parts
from .callables import UnknownCodeError
from .computing import Computing, switches
from .model_parts import described as describe_parts
from .model_parts import short_digest
from .samples import comparable, few_values, raw_bytes, sample_of
from .watch import Watch, autocast_dtype
from .weights import Part, module_parts, offloaded, plain_parts

LAYOUT_VERSION = 1
_REMEMBERED = 256

Key = TypeVar("Key")
Value = TypeVar("Value")

_IRRELEVANT = frozenset(
    "_name_or_path _commit_hash transformers_version architectures dtype torch_dtype use_cache return_dict "
    "output_attentions output_hidden_states bos_token_id eos_token_id pad_token_id id2label label2id".split()
)
"""Settings that say nothing about how KV is computed (dtypes are taken from the weights)."""


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
            tensor = offloaded(module, own)
            if tensor is None:
                raise ValueError(f"the content of {name}.{own} is not available")
        yield f"{name}.{'.'.join(called)}", tensor


def _relevant(config: Any) -> Any:
    if isinstance(config, dict):
        return {str(key): _relevant(value) for key, value in config.items() if key not in _IRRELEVANT}
    if isinstance(config, (list, tuple)):
        return [_relevant(value) for value in config]
    return config if isinstance(config, (int, float, bool, str, type(None))) else str(config)


class Fingerprint:
    """The fingerprint of one model, kept up to date cheaply.

    `current()` costs a pass over the tensors' version counters and a few of their values; only when those have
    changed is the sample of all weights taken again. Where parameters were written to and the sample does not show
    it (a few rows of an embedding were trained, say), the fingerprint becomes one that no other model has, under all
    settings, until the sample shows another change.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()  # threads may be under different autocast, and must not get each other's
        self._watch = Watch()
        self.computing = Computing()
        self._marks: Any = None
        self.changes = 0
        """How often `current` has found that something is not as it was: as long as this stays the same, the weights'
        tensors are the same ones, in the same places."""
        self._parameters: list[tuple[int, Any]] = []
        self._salt = ""
        """What tells the model from all others, where its content does not."""
        self._identity = ""
        self._settled = False
        """Whether `current` has come to its end since the model was last looked at."""
        self._unusual: list[weakref.ref[nn.Module]] = []
        """Modules that compute with more than their parameters and buffers."""
        self._failure: tuple[Any, str] | None = None
        self._made_of: tuple[str, dict[str, str]] = "{}", {}

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

    def unless_moved(self) -> str | None:
        """What `current` would say, for who promises that settings, code and numbers in modules stay as they are, and
        that nobody writes to a tensor's `.data`. None where it has to be asked: something else has changed."""
        with self._lock:
            if not self._settled or switches() != self._marks[2]:
                return None
            modules = self._watch.in_place(self.model)
            same = modules is not None and self.computing.same_modes(self.model, modules)
            return self._identity if same else None

    def glance(self) -> bool:
        """A hint whether it is what `current` said last: see `Watch.glance`."""
        with self._lock:
            return self._watch.glance()

    def parts(self) -> dict[str, dict[str, str]]:
        """What the fingerprint was made of when that was last read, by name (`model_parts`)."""
        with self._lock:
            return describe_parts(*self._made_of)

    def _current(self) -> str:
        self._settled = False
        marks, parameters = self._look()
        if marks != self._marks:
            self.changes += 1
            if self._failure is not None and self._failure[0] == marks:
                raise ValueError(self._failure[1])
            found, before = self._unusual, self._made_of[1]
            try:
                content = self._compute()
            except Exception as error:
                self._failure = marks, str(error)
                raise
            if found != self._unusual:  # there is more to be watched: what was there before it is taken as it is now
                marks, parameters = self._look()
                content = self._compute()
            digests = self._made_of[1]
            if any(digests[name] != digest for name, digest in before.items() if name in digests):
                self._salt = ""
            elif parameters != self._parameters and _same_tensors(parameters, self._parameters):
                self._salt = secrets.token_hex(20)
            self._identity = _salted(content, self._salt) if self._salt else content
            self._marks, self._parameters = marks, parameters
        self._settled = True
        return self._identity

    def _look(self) -> tuple[Any, list[tuple[int, Any]]]:
        """The marks of the model as it is now, and its parameters' versions. What it computes by is read again if that,
        or which of its modules count, may have changed."""
        modules: list[nn.Module] = []
        marks, parameters = self._watch.look(self.model, self._unusual, modules)
        computing = self.computing
        if not computing.unchanged(self.model, modules) or (self._marks and self._marks[0] != marks[:4]):
            named = [(name, module) for name, module, _ in _named_modules(self.model)]
            computing.read(self.model, named, modules)
        if computing.problem:
            raise UnknownCodeError(computing.problem)
        return (marks[:4], marks, switches(), computing.words), parameters

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
            "computing": hashlib.blake2b(self.computing.words.encode()).hexdigest(),
        }
        if switched := switches():
            settings["switches"] = switched
        ranks = ranks_of(self.model)
        if not ranks.alone:
            settings["rank"] = [ranks.rank, ranks.size]
        return json.dumps(settings, sort_keys=True)

    def _autocast(self) -> str:
        first = next(self.model.parameters(), None)
        return autocast_dtype(first.device.type if first is not None else "cpu")

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
        settings = self._settings()
        hasher.update(settings.encode())
        described: list[str] = []
        digests: dict[str, str] = {}
        samples: dict[torch.dtype, list[torch.Tensor]] = {}
        for name, part in sorted(self._parts(), key=lambda item: item[0]):
            if isinstance(part, str):
                described.append(f"{name} {part}")
                continue
            described.append(f"{name} {part.dtype} {tuple(part.shape)}")
            if part.numel():
                plain = comparable(part.detach())
                # the few values that are watched between turns count too: a change of them must be one of the digest
                sample = torch.cat([sample_of(plain), few_values(plain)])
                # where a weight lies must not matter, so samples are put in order by dtype alone
                samples.setdefault(plain.dtype, []).append(sample := sample.cpu())
                digests[name] = short_digest(sample)
        hasher.update("\n".join(described).encode())
        for dtype in sorted(samples, key=str):
            hasher.update(raw_bytes(torch.cat(samples[dtype])))
        self._made_of = settings, digests
        return hasher.hexdigest()


def _salted(content: str, salt: str) -> str:
    return hashlib.blake2b(f"{salt} {content}".encode(), digest_size=20, person=b"attnstore-salted").hexdigest()


def _same_tensors(a: list[tuple[int, Any]], b: list[tuple[int, Any]]) -> bool:
    return [tensor for tensor, _ in a] == [tensor for tensor, _ in b]


def remember(known: dict[Key, Value], key: Key, value: Value) -> Value:
    """Keeps what was found out of a model while the process lives, but not of any number of models: one that is being
    trained is another with every step."""
    while len(known) >= _REMEMBERED:
        known.pop(next(iter(known)), None)
    known[key] = value
    return value


_fingerprints: "weakref.WeakKeyDictionary[nn.Module, Fingerprint]" = weakref.WeakKeyDictionary()


def fingerprint_of(model: nn.Module) -> Fingerprint:
    """The fingerprint of a model, the same object as long as the model lives: what it knows outlasts `detach`."""
    found = _fingerprints.get(model)
    if found is None:
        found = _fingerprints[model] = Fingerprint(model)
    return found
