"""Hooks on a model. They keep no state: the cache is found in the call, so threads and sessions never meet."""

import copy
import functools
import inspect
import logging
import threading
import types
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, overload

import torch
from torch import nn

from ..errors import CacheUseError
from ..store.memory.device_tier import Owner
from ..store.store import AttentionStore
from .identity.computing import forget
from .identity.fingerprint import fingerprint_of
from .model.argument import CACHE_NAMES, cache_name, generate_cache_name, take_cache
from .model.cacheless import cacheless, is_generator
from .model.compiled import outside_graphs, uncompiled
from .model.ranks import Ranks
from .model.structure import cache_writer, compute_device, decoder_layers, decoder_of, is_encoder_decoder, own_state
from .outputs import Keep, KeptOutputs, forget_outputs, keep_outputs
from .paged import notice
from .positions.geometry import Geometry
from .probing.continuing import CONTINUING, Continuing, is_verified, probe_continuing
from .probing.positions import GEOMETRIES, probe
from .stats import TurnStats, TurnTotals
from .transfer.load import Pace

logger = logging.getLogger("hf_attnstore")

_ATTRIBUTE = "_attnstore_attachment"
_attaching = threading.Lock()
_stand_ins: dict[str, Callable[..., Any]] = {}
"""What stands in for methods of an attached model, by their names."""
_before: list[Callable[[nn.Module], object]] = []
"""What is done before a model is given those."""


def stand_in(name: str, method: Callable[..., Any], *prepare: Callable[[nn.Module], object]) -> None:
    """Sets what stands in for a method of models that are attached from now on, and what is done before that."""
    _stand_ins[name] = method
    _before.extend(prepare)


class Attachment:
    """What `attach` put on a model, and what is measured of it."""

    def __init__(self, model: nn.Module) -> None:
        self.store: AttentionStore | None = None
        self.checkpoint_every: int | None = None
        """For plain `generate`: see `AttentionStoreCache`."""
        self.parts_kept: set[tuple[str, str]] = set()
        """Path and fingerprint of what a store was told of what the model is made of."""
        self.resegments_with: Any = None
        """The tokenizer by whose text plain `generate` finds what is known in other tokens; None: it does not."""
        self.state_bytes = 0
        """Bytes of a checkpoint, as far as one was taken."""
        self.last: TurnStats | None = None
        self.totals = TurnTotals()
        self.fingerprint = fingerprint_of(model)
        self.pace = Pace()
        self.parked = Owner()
        """What the model left in device tiers; gone with it, and with `detach`."""
        self.told: set[str] = set()
        """What the log has said of the model, and need not say again."""
        self.parameter_names = [
            name
            for name, parameter in inspect.signature(model.forward).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
        self.cache_name = cache_name(self.parameter_names) or generate_cache_name(None)
        """The name under which the model's forward takes a cache."""
        self.generate_cache_name = generate_cache_name(self.cache_name)
        """The name under which its `generate` takes one."""
        self.cacheless = cacheless(model)
        """Why its `generate` can't be given a cache; empty if it can."""
        self._verified = "", False
        """Whether it need not be asked whether it continues, and of which fingerprint that was said."""
        count = _layer_count(model)
        layers = decoder_layers(decoder_of(model), count)
        self.sees_layers = bool(layers)
        self.devices: list[torch.device | None] = [compute_device(layer) for layer in layers] or [None] * count
        self.computes_on_cpu = all(device is None or device.type == "cpu" for device in self.devices)
        self.replaced: dict[str, Any] = {}
        """Attributes of the instance that were there before, under the names of what stands in for them now."""
        self.whole = model
        """The model that has the `generate`; what the hooks are on may be a part of it."""
        self._install(model, layers)

    def _install(self, model: nn.Module, layers: list[nn.Module]) -> None:
        for module in model.modules():  # a model that was pickled while it was attached comes with hooks and no more
            _remove_hooks(module)
        model.register_forward_pre_hook(_before_model, with_kwargs=True)
        model.register_forward_hook(_after_model, with_kwargs=True)
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(functools.partial(_before_layer, number), with_kwargs=True)
            layer.register_forward_hook(functools.partial(_after_layer, number), with_kwargs=True)
        self.stand_in_for(model)

    def stand_in_for(self, model: nn.Module) -> None:
        """Puts what stands in for methods on the model that has them."""
        self.whole = model
        if is_generator(model):
            for prepare in _before:
                prepare(model)
            for name, method in _stand_ins.items():
                if hasattr(model, name):
                    if name in model.__dict__:
                        self.replaced[name] = model.__dict__[name]
                    model.__dict__[name] = types.MethodType(method, model)

    def geometry(
        self, model: nn.Module, fingerprint: str, store: AttentionStore | None, ranks: Ranks | None = None
    ) -> Geometry:
        """How positions are in the model's KV. Found out once for each fingerprint, by a few forwards; the store
        remembers it beyond the process.

        Args:
            ranks: who all ask for it at this moment: if one does not know it, all find it out, together.
        """
        return GEOMETRIES.of(fingerprint, store, functools.partial(probe, model), ranks)

    def is_verified(self, model: nn.Module, fingerprint: str) -> bool:
        """Whether the model, as it is now, is known to continue its cache, and need not be asked."""
        if self._verified[0] != fingerprint:
            known = is_encoder_decoder(model) or bool(own_state(model))  # the former have a probe of their own
            self._verified = fingerprint, known or is_verified(model, len(self.devices))
        return self._verified[1]

    def continues(self, model: nn.Module, fingerprint: str, store: AttentionStore | None) -> Continuing:
        """How the model goes on after what its cache holds. Found out and remembered as the geometry is."""
        return CONTINUING.of(fingerprint, store, functools.partial(probe_continuing, model, self.cache_name))

    def turn_is_over(self, stats: TurnStats) -> None:
        """A turn of plain `generate` has ended."""
        with _attaching:
            self.last, self.totals = stats, self.totals.plus(stats)
        logger.info("generate: %s", stats)

    def remove(self, model: nn.Module) -> None:
        self.parked.drop()
        # by what they are, not by handle: in a deep copy of a model, the handles are still those of the original
        for module in model.modules():
            _remove_hooks(module)
        attributes = self.whole.__dict__
        attributes.pop(_ATTRIBUTE, None)
        for name, method in _stand_ins.items():
            if getattr(attributes.get(name), "__func__", None) is method:
                del attributes[name]
                if name in self.replaced:
                    attributes[name] = self.replaced[name]

    def original(self, model: nn.Module, name: str) -> Callable[..., Any]:
        """The method that is stood in for."""
        found: Callable[..., Any] = self.replaced.get(name) or types.MethodType(getattr(type(model), name), model)
        return found

    def __reduce__(self) -> Any:
        """A model that is pickled, or saved with `torch.save`, comes back as one that nothing is attached to."""
        return types.NoneType, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Attachment":
        """A copy of an attached model is attached too (its hooks are copied with it), with a fingerprint of its own."""
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        twin.replaced = copy.deepcopy(self.replaced, memo)
        original = self.fingerprint.model
        twin.fingerprint = fingerprint_of(memo.get(id(original), original))
        twin.whole = memo.get(id(self.whole), self.whole)
        twin.pace = Pace()
        twin.parked = Owner()
        twin.last, twin.totals = None, TurnTotals()
        return twin


class Attached:
    """What `attach` returns: what plain `generate` has reused since then. As a context manager, detaches at its end."""

    def __init__(self, model: nn.Module, attachment: Attachment) -> None:
        self._model = model
        self._attachment = attachment

    @property
    def last(self) -> TurnStats | None:
        """What the last `generate` was, one that could not be served included; None before the first."""
        return self._attachment.last

    @property
    def totals(self) -> TurnTotals:
        """All of them together."""
        return self._attachment.totals

    def detach(self) -> None:
        """Leaves the model as it was before `attach`, unless it was detached and attached anew meanwhile."""
        if attachment_of(self._model) is self._attachment:
            detach(self._model)

    def __enter__(self) -> "Attached":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        return f"Attached({type(self._model).__name__}: {self.totals})"


def _layer_count(model: nn.Module) -> int:
    from .layers.kinds import make_layers

    return len(make_layers(model))


def owner_of(model: nn.Module) -> nn.Module:
    """The model whose forwards a cache sees: what is below the wrappers of PEFT and of `torch.compile`, in whatever
    order, or the part of it that adds to its cache."""
    return cache_writer(_unwrapped(model))


def _unwrapped(model: nn.Module) -> nn.Module:
    given: Any = model
    if not isinstance(given, nn.Module):
        raise CacheUseError(f"what takes a model was given a {type(given).__name__}: the model comes first")
    while True:
        inside = uncompiled(model)
        base = getattr(inside, "get_base_model", None)
        inner = base() if callable(base) else inside
        if inner is model:
            return model
        model = inner


def attachment_of(model: nn.Module) -> Attachment | None:
    """What is attached to a model; None if nothing is."""
    return model.__dict__.get(_ATTRIBUTE)


def ensure_hooks(model: nn.Module) -> Attachment:
    """Attaches the hooks, once."""
    whole = _unwrapped(model)
    owner = cache_writer(whole)
    with _attaching:
        attachment = attachment_of(owner)
        if attachment is None:
            attachment = owner.__dict__[_ATTRIBUTE] = Attachment(owner)
        if whole is not owner and attachment_of(whole) is not attachment:
            attachment.stand_in_for(whole)
            whole.__dict__[_ATTRIBUTE] = attachment
        return attachment


def feed(model: nn.Module, cache: Any, ids: torch.Tensor, wanted: int = 1) -> Any:
    """Runs tokens `[rows, tokens]`, which come after what a cache holds, through an attached model.

    Args:
        wanted: of how many of the last ones logits are needed, where the model leaves out the others.

    Returns:
        The model's output; most have no use for it, and want what is in the cache then.
    """
    attachment = attachment_of(model)
    assert attachment is not None
    more: dict[str, Any] = {attachment.cache_name: cache}
    if "logits_to_keep" in attachment.parameter_names:
        more["logits_to_keep"] = wanted
    if "position_ids" in attachment.parameter_names:  # as `generate` does: not all models ask the cache
        start = cache.get_seq_length()
        more["position_ids"] = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    with torch.no_grad():
        return model(input_ids=ids, use_cache=True, **more)


@overload
def attach(
    model: nn.Module,
    store: AttentionStore,
    *,
    checkpoint_every: int | None = None,
    resegment: bool = False,
    tokenizer: Any = None,
    keep: None = None,
) -> Attached: ...


@overload
def attach(model: nn.Module, store: AttentionStore, *, keep: Keep, frozen: bool = False) -> KeptOutputs: ...


def attach(
    model: nn.Module,
    store: AttentionStore,
    *,
    checkpoint_every: int | None = None,
    resegment: bool = False,
    tokenizer: Any = None,
    keep: Keep | None = None,
    frozen: bool = False,
) -> Attached | KeptOutputs:
    """Makes plain `model.generate(**inputs)` reuse and save through `store`, by content and without a session.

    Left-padded batches and padded prompts are kept row by row. What can't be (padding on the right, other caches …)
    runs as without it: the log says so once for each kind of reason, and the store's `stats` count it.

    Args:
        checkpoint_every: as for `AttentionStoreCache`.
        resegment: as for `AttentionStoreCache`, with `tokenizer`.
        keep: of an encoder, what its forward is called for: "last_hidden_state" (and the pooled output, if it has one)
            or "pooler_output" alone. Outputs are then kept by content, of whole inputs, row by row, in eval mode and
            without gradients; the other arguments have no effect. Of a model that takes pictures, "image_features":
            what its vision tower makes of them, beside whatever else is attached.
        frozen: with `keep`, a promise: meanwhile nobody writes numbers into the `.data` of the model's tensors, nor
            changes its settings, numbers in its modules, or code. Training, loading, replaced tensors and modules,
            hooks and adapters are still noticed. A row is then looked up in half of the time.

    Returns:
        What says how much was reused, and detaches again; it need not be kept.

    Raises:
        CacheUseError: `checkpoint_every` is no number of tokens, a tokenizer is missing, or `keep` is something else.
        UnsupportedModelError: the model has layers that this version can't keep.
    """
    owner = owner_of(model)
    given: Any = store
    if not isinstance(given, AttentionStore):
        kind = type(given).__name__
        raise CacheUseError(f"attach(model, store) takes a store, such as AttentionStore(), not a {kind}")
    if keep is not None:
        return keep_outputs(owner, store, keep, frozen=frozen)
    if frozen:
        raise CacheUseError("frozen is for outputs that are kept by attach(model, store, keep=…)")
    checked_every(checkpoint_every)
    by_text = checked_tokenizer(resegment, tokenizer)
    attachment = ensure_hooks(model)
    attachment.resegments_with = by_text
    attachment.store, attachment.checkpoint_every = store, checkpoint_every
    return Attached(owner, attachment)


def checked_tokenizer(resegment: bool, tokenizer: Any) -> Any:
    """The tokenizer to resegment prompts with; None where that was not asked for.

    Raises:
        CacheUseError: it was, and there is none.
    """
    if resegment and tokenizer is None:
        raise CacheUseError("resegment=True compares texts, for which it needs the model's tokenizer: pass tokenizer=…")
    return tokenizer if resegment else None


def checked_every(tokens: int | None) -> int | None:
    """`tokens`, if that can be a distance between checkpoints.

    Raises:
        CacheUseError: it can't.
    """
    if tokens is not None and tokens < 1:
        raise CacheUseError(f"checkpoint_every is a number of tokens, not {tokens}")
    return tokens


def detach(model: nn.Module) -> None:
    """Takes everything off a model that `attach` or an `AttentionStoreCache` put on it. Harmless if nothing is."""
    model = owner_of(model)
    forget_outputs(model)
    with _attaching:
        attachment = model.__dict__.pop(_ATTRIBUTE, None)
        if attachment is not None:
            attachment.remove(model)
        else:  # it may have been pickled while it was attached
            for module in model.modules():
                _remove_hooks(module)
        forget(model)


def _remove_hooks(module: nn.Module) -> None:
    ours = (_before_model, _after_model, _before_layer, _after_layer)
    for hooks, *marks in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
    ):
        for number in [n for n, hook in hooks.items() if getattr(hook, "func", hook) in ours]:
            del hooks[number]
            for mark in marks:
                mark.pop(number, None)


def _cache_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The cache of ours that a call has."""
    for name in CACHE_NAMES:
        value = kwargs.get(name)
        if value is not None and _is_ours(value):
            return value
    return next(filter(_is_ours, args), None)


def _is_ours(value: Any) -> bool:
    return getattr(type(value), "sees_forwards", False)


@outside_graphs
def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = _cache_in(args, kwargs)
    if cache is None:
        attachment = attachment_of(module)
        if attachment is not None:
            notice(attachment.fingerprint, kwargs)
        return None
    if cache.model is not module:
        raise CacheUseError(f"the cache was made for another model than this {type(module).__name__}")
    attachment = attachment_of(module)
    assert attachment is not None
    named = {**dict(zip(attachment.parameter_names, args, strict=False)), **kwargs}
    replaced = cache.begin_forward(named) or {}
    if attachment.cache_name not in named:  # passed under the name that another version of transformers has for it
        take_cache(named)
        replaced[attachment.cache_name] = cache
    return ((), {**named, **replaced}) if replaced else None


@outside_graphs
def _after_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_in(args, kwargs)
    if cache is not None:
        cache.end_forward()


@outside_graphs
def _before_layer(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _cache_in(args, kwargs)
    if cache is not None:
        cache.before_layer(number)


@outside_graphs
def _after_layer(number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _cache_in(args, kwargs)
    if cache is not None:
        cache.after_layer(number)
