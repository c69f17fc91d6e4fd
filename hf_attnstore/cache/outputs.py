"""Outputs of encoders, kept by content: the same input as a whole, the same output.

An encoder's tokens see each other in both directions, so nothing of an input is of use to another that only begins like
it. Rows of a batch do not see each other: each is kept by itself, under a digest of all that the model is given of it,
below the root of the model as it is. What is not known of a batch is computed together, as a smaller batch.
"""

import hashlib
import inspect
import logging
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from ..errors import CacheUseError, NotFiniteError, StoreClosedError, UnsupportedModelError
from ..session.units import unit_ids
from ..store.blocks.block import Block, BlockMeta
from ..store.blocks.keys import Key, block_key, encode_tokens, input_root
from ..store.store import AttentionStore
from .identity.adapters import adapter_problem
from .identity.computing import BESIDE, forget
from .identity.fingerprint import Fingerprint, fingerprint_of

logger = logging.getLogger("hf_attnstore")

Keep = Literal["last_hidden_state", "pooler_output", "image_features"]
_PLACE = "_attnstore_outputs"
_ONE = encode_tokens(unit_ids(1, 1))
TRIED = frozenset(
    "albert bert camembert deberta deberta-v2 distilbert electra ernie gemma3_text llama mistral modernbert mpnet "
    "qwen2 qwen3 roberta t5 xlm-roberta".split()
)
"""Models of which it was tried that tokens behind the end, which the mask leaves out, change nothing: of these a row
is the same row in any batch. Of others, such as those with convolutions over a text, its padding is a part of it."""


class _NotKeptError(CacheUseError, AttributeError):
    """An output was asked for that is not kept."""


@dataclass
class PooledOutput(ModelOutput):
    """The output of an encoder of which the pooled output alone is kept: that is `[1]` as ever, and `[0]` an error."""

    pooler_output: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "last_hidden_state":
            _refuse_hidden()
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and key != "last_hidden_state":
            return super().__getitem__(key)
        return self.pooler_output if key == 1 else _refuse_hidden()


def _refuse_hidden() -> Any:
    raise _NotKeptError(
        'of this encoder the pooled output alone is kept: attach(encoder, store, keep="last_hidden_state") keeps both'
    )


@dataclass(frozen=True)
class _Row:
    """One input of a batch."""

    digest: bytes
    length: int
    """How many of its columns count."""


class _NotKnownError(Exception):
    """Why a call is left to the model alone."""


def keep_outputs(model: Any, store: AttentionStore, keep: str, *, frozen: bool = False) -> "KeptOutputs":
    """Has a model's forward look up its output in `store`, by the content of each row, and keep what it computes.

    Args:
        frozen: nobody changes the model while this is on it but as `Fingerprint.unless_moved` notices.

    Raises:
        CacheUseError: `keep` is something else.
        UnsupportedModelError: it is no model of transformers.
    """
    if keep not in get_args(Keep):
        raise CacheUseError(f"keep is one of {', '.join(get_args(Keep))}, not {keep!r}")
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no model of transformers; of a SentenceTransformer, attach model[0].auto_model"
        )
    forget_outputs(model)
    kind = KeptOutputs
    if keep == "image_features":
        kind = KeptPictures
        makers = [module for module in model.modules() if hasattr(type(module), kind.method)]
        if not makers:
            raise UnsupportedModelError(f"{type(model).__name__} makes no embeddings of pictures")
        model = makers[-1]  # those around it pass on to it
    cls: Any = type(model)
    made = model.__dict__[_PLACE] = kind(model, store, keep, model.__dict__.get(kind.method), frozen)
    model.__dict__[kind.method] = types.MethodType(_stand_in(cls, kind.method), model)
    return made


def forget_outputs(model: nn.Module) -> None:
    """Takes off a model what `keep_outputs` put there. Harmless if nothing is."""
    for module in model.modules():
        kept = module.__dict__.pop(_PLACE, None)
        for method in (KeptOutputs.method, KeptPictures.method):
            if hasattr(module.__dict__.get(method), BESIDE):
                del module.__dict__[method]
                if kept is not None and kept.before is not None:
                    module.__dict__[method] = kept.before
        if kept is not None:
            forget(module)


def _before(model: nn.Module) -> Any:
    kept: KeptOutputs | None = model.__dict__.get(_PLACE)
    return kept.before if kept is not None else None


@cache
def _stand_in(cls: Any, method: str) -> Callable[..., Any]:
    """What stands in for a method of a class's attached models; with its name, by which a pickled one finds that."""
    original = getattr(cls, method)

    @wraps(original)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        before = _before(self)
        if torch.compiler.is_compiling():  # a graph has no way to look anything up
            return before(*args, **kwargs) if before else original(self, *args, **kwargs)
        computes = before or types.MethodType(original, self)
        kept: KeptOutputs | None = self.__dict__.get(_PLACE)
        return kept.run(computes, args, kwargs) if kept is not None else computes(*args, **kwargs)

    setattr(run, BESIDE, _before)
    return run


class KeptOutputs:
    """What `attach(encoder, store, keep=…)` puts on a model, and returns. As a context manager, detaches at its end."""

    method = "forward"
    """What it stands in for."""

    def __init__(self, model: nn.Module, store: AttentionStore, keep: str, before: Any, frozen: bool) -> None:
        self.store = store
        self.keep = keep
        self.before = before
        """A forward that was on the model itself, if any."""
        self.rows = 0
        """Inputs that were looked up."""
        self.reused_rows = 0
        """Those of them that were not computed."""
        self._fingerprint: Fingerprint = fingerprint_of(model)
        self._names = list(inspect.signature(getattr(type(model), self.method)).parameters)[1:]
        self._trims = str(getattr(model.config, "model_type", "")) in TRIED
        self._told: set[str] = set()
        self._frozen = frozen

    def detach(self) -> None:
        """Leaves the model as it was before `attach`, unless it was detached and attached anew meanwhile."""
        if self._fingerprint.model.__dict__.get(_PLACE) is self:
            forget_outputs(self._fingerprint.model)

    def __enter__(self) -> "KeptOutputs":
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    def __reduce__(self) -> Any:
        """A model that is pickled comes back as one that nothing is attached to."""
        return types.NoneType, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> "KeptOutputs":
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(self.__dict__)
        model = self._fingerprint.model
        twin._fingerprint = fingerprint_of(memo.get(id(model), model))
        twin.rows = twin.reused_rows = 0
        return twin

    def run(self, computes: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward of the model: what is known of its rows is looked up, the rest computed and kept."""
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        try:
            rows, tensors = self._read(named)
            fingerprint = self._identify()
            root = self.store.root(fingerprint)
            keys = [self._key(root, row) for row in rows]
            found = self._look_up(keys)
        except _NotKnownError as reason:
            self._tell(str(reason))
            return computes(*args, **kwargs)
        missing = [number for number, key in enumerate(keys) if key not in found and keys.index(key) == number]
        if missing:
            if len(missing) == len(rows):
                output = computes(*args, **kwargs)
            else:
                width = max(rows[number].length for number in missing)
                part = {name: tensor[missing, :width] for name, tensor in tensors.items()}
                output = computes(**{**named, **part})
            columns = max(rows[number].length for number in missing)
            made = self._rows_of(output, len(missing), columns, [rows[number].length for number in missing])
            if made is None:
                self._tell("its output is not one vector for each token")
                return output if len(missing) == len(rows) else computes(*args, **kwargs)
            still = self._still(fingerprint)
            for number, tensors_of_row in zip(missing, made, strict=True):
                found[keys[number]] = tensors_of_row
                if still:
                    self._save(fingerprint, rows[number], keys[number], tensors_of_row)
        lengths = [row.length for row in rows]
        reused = sum(lengths) - sum(lengths[number] for number in missing)
        self.rows, self.reused_rows = self.rows + len(rows), self.reused_rows + len(rows) - len(missing)
        self.store.count_turn(reused, sum(lengths), 0, 0.0, 0.0)
        return self._put_together([found[key] for key in keys], lengths, tensors["input_ids"])

    def _identify(self) -> str:
        model = self._fingerprint.model
        if model.training:
            raise _NotKnownError("it is in training mode")
        if torch.is_grad_enabled():
            raise _NotKnownError("gradients are on (torch.no_grad() or torch.inference_mode() turn them off)")
        try:
            problem = adapter_problem(model)
            if problem is None:
                known = self._fingerprint.unless_moved() if self._frozen else None
                return known if known is not None else self._fingerprint.current()
        except Exception as error:
            raise _NotKnownError(f"what it computes by can't be identified ({error})") from error
        raise _NotKnownError(problem)

    def _still(self, fingerprint: str) -> bool:
        """Whether the model is what it was before it computed: else nobody knows by which weights that was done."""
        try:
            if self._identify() == fingerprint:
                return True
            self._tell("it changed while it computed")
        except _NotKnownError as reason:
            self._tell(str(reason))
        return False

    def _read(self, named: Mapping[str, Any]) -> tuple[list[_Row], dict[str, torch.Tensor]]:
        """The rows of a call, and its tensors by name, each `[rows, columns]`."""
        # a configuration's own way to look attributes up takes as long as all else
        config: Any = vars(self._fingerprint.model.config)
        ids = named.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or not ids.numel():
            raise _NotKnownError("it is not given input_ids [rows, tokens]")
        settings: list[str] = []
        tensors: dict[str, torch.Tensor] = {}
        for name, value in named.items():
            if isinstance(value, torch.Tensor):
                if value.shape != ids.shape:
                    raise _NotKnownError(f"{name} have nothing of each token")
                tensors[name] = value
            elif value is not None and not isinstance(value, (bool, int, float, str)):
                raise _NotKnownError(f"{name} are not identified by content")
            elif value is not None and name != "return_dict":
                settings.append(f"{name}={value!r}")
        for name in ("output_hidden_states", "output_attentions"):
            if named.get(name) or (named.get(name) is None and (config.get(name) or config.get(f"_{name}"))):
                raise _NotKnownError(f"{name} were asked for")
        if named.get("use_cache") is True or not named.get("return_dict", config.get("return_dict", True)):
            raise _NotKnownError("it was asked for a tuple, or for a cache")
        plain = {name: _as_array(name, tensor) for name, tensor in tensors.items()}
        lengths = _lengths(plain.get("attention_mask") if self._trims else None, *ids.shape)
        described = [(f"{name} {_dtype_in_words(plain[name].dtype)} ", plain[name]) for name in sorted(plain)]
        begin = hashlib.blake2b(repr(sorted(settings)).encode(), digest_size=32, person=b"attnstore-input")
        rows = []
        for number, length in enumerate(lengths):
            hasher = begin.copy()
            for words, values in described:
                hasher.update(f"{words}({length},)".encode())
                hasher.update(values[number, :length].tobytes())
            rows.append(_Row(hasher.digest(), length))
        return rows, tensors

    def _key(self, root: Key, row: _Row) -> Key:
        return block_key(self._root(root, row), _ONE, self.store.secret)

    def _root(self, root: Key, row: _Row) -> Key:
        return input_root(root, self.keep, row.digest, self.store.secret)

    def _look_up(self, keys: list[Key]) -> dict[Key, Mapping[str, torch.Tensor]]:
        try:
            found = self.store.read(list(dict.fromkeys(keys)))
        except StoreClosedError:
            raise _NotKnownError("the store is closed") from None
        return {
            key: {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()} for key, tensors in found.items()
        }

    def _rows_of(
        self, output: Any, rows: int, columns: int, lengths: list[int]
    ) -> list[dict[str, torch.Tensor]] | None:
        """What is kept of an output, row by row; None if it is not made of rows and columns."""
        hidden, pooled = getattr(output, "last_hidden_state", None), getattr(output, "pooler_output", None)
        if self.keep == "pooler_output" and pooled is None:
            raise UnsupportedModelError(
                f'{type(self._fingerprint.model).__name__} has no pooler_output: keep="last_hidden_state"'
            )
        if hidden is None or hidden.ndim != 3 or hidden.shape[0] != rows or hidden.shape[1] < columns:
            return None
        if pooled is not None and (pooled.ndim != 2 or len(pooled) != rows):
            return None
        made = []
        for number, length in enumerate(lengths):
            parts = {} if self.keep == "pooler_output" else {"last_hidden_state": hidden[number, :length]}
            parts |= {} if pooled is None else {"pooler_output": pooled[number : number + 1]}
            made.append({name: part.detach().to("cpu", copy=True).contiguous() for name, part in parts.items()})
        return made

    def _save(self, fingerprint: str, row: _Row, key: Key, tensors: Mapping[str, torch.Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in tensors.values())
        try:
            if not self.store.reserve(size, wait=True):
                return
            meta = BlockMeta(
                key=key,
                parent=self._root(self.store.root(fingerprint), row),
                fingerprint=fingerprint,
                start=0,
                tokens=_ONE,
                codec=self.store.codec,
                state="{}",
            )
            made = Block(meta, {f"layers.0.{name}": tensor for name, tensor in tensors.items()})
            try:
                made.check_finite()
                self.store.put(made)
            except BaseException:
                self.store.release(size)
                raise
        except NotFiniteError:
            self._tell("there is NaN or infinity in what it computed")
        except StoreClosedError:
            self._tell("the store is closed")

    def _put_together(self, found: list[Mapping[str, torch.Tensor]], lengths: list[int], like: torch.Tensor) -> Any:
        """The output of a batch of rows; zeros at padding."""
        pooled = None
        if "pooler_output" in found[0]:
            pooled = _joined([tensors["pooler_output"] for tensors in found], like)
        if self.keep == "pooler_output":
            return PooledOutput(pooler_output=pooled)
        first = found[0]["last_hidden_state"]
        hidden = first.new_zeros(len(found), like.shape[1], first.shape[-1])
        for number, (tensors, length) in enumerate(zip(found, lengths, strict=True)):
            hidden[number, :length] = tensors["last_hidden_state"]
        return BaseModelOutputWithPooling(last_hidden_state=hidden.to(like.device), pooler_output=pooled)

    def _tell(self, reason: str) -> None:
        level = logging.DEBUG if reason in self._told else logging.WARNING
        self._told.add(reason)
        name = type(self._fingerprint.model).__name__
        logger.log(level, "the output of %s is neither looked up nor kept: %s", name, reason)


def _as_array(name: str, tensor: torch.Tensor) -> np.ndarray:
    """A tensor's content.

    Raises:
        _NotKnownError: of a dtype such as bfloat16, which numpy does not have.
    """
    try:
        return tensor.detach().cpu().numpy()
    except TypeError:
        raise _NotKnownError(f"{name} are {tensor.dtype}") from None


@cache
def _dtype_in_words(dtype: Any) -> str:
    return str(dtype)


def _lengths(mask: np.ndarray | None, rows: int, columns: int) -> list[int]:
    """How many columns of each row count: all, or those before what a mask `[rows, columns]` leaves out at the end."""
    if mask is None or (mask == 1).all():
        return [columns] * rows
    lengths = []
    for row in mask:
        ones = int((row == 1).sum())
        whole = ones and bool((row[:ones] == 1).all()) and not row[ones:].any()
        lengths.append(ones if whole else columns)
    return lengths


def _joined(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Rows as one tensor, which shares no memory with them."""
    return (torch.cat(list(parts)) if len(parts) > 1 else parts[0].clone()).to(like.device)


@dataclass
class PictureOutput(PooledOutput):
    """The embeddings of pictures, as a model's `get_image_features` returns them."""

    deepstack_features: Any = None


class KeptPictures(KeptOutputs):
    """What `attach(model, store, keep="image_features")` puts on a model: what its vision tower makes of the pictures
    of a prompt that are not reused, found by their content whatever stands before them. The pictures of one call are
    kept together, so that what is found is what a call with them gives."""

    method = "get_image_features"

    def run(self, computes: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            pictures = _Row(_digest_of(dict(zip(self._names, args, strict=False)) | kwargs), 1)
            fingerprint = self._identify()
            key = self._key(self.store.root(fingerprint), pictures)
            found = self._look_up([key]).get(key)
        except _NotKnownError as reason:
            self._tell(str(reason))
            return computes(*args, **kwargs)
        self.rows, self.reused_rows = self.rows + 1, self.reused_rows + (found is not None)
        self.store.count_turn(int(found is not None), 1, 0, 0.0, 0.0)
        if found is None:
            output = computes(*args, **kwargs)
            found = _parts_of(output)
            if not found:
                self._tell("what it makes of pictures is not as it is known")
                return output
            if self._still(fingerprint):
                self._save(fingerprint, pictures, key, found)
        return _of_parts(found, next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)))


def _digest_of(named: Mapping[str, Any]) -> bytes:
    """A digest of all arguments of a call.

    Raises:
        _NotKnownError: one is not identified by content.
    """
    hasher = hashlib.blake2b(digest_size=32, person=b"attnstore-image")
    for name in sorted(named):
        value = named[name]
        if value is None or name in ("return_dict", "use_cache"):
            continue
        if name in ("output_hidden_states", "output_attentions") and value:
            raise _NotKnownError(f"{name} were asked for")
        if isinstance(value, torch.Tensor):
            plain = value.detach().cpu().contiguous()
            hasher.update(repr((name, str(plain.dtype), tuple(plain.shape))).encode())
            hasher.update(plain.view(-1).view(torch.uint8).numpy().data)
        elif isinstance(value, (bool, int, float, str)) or (
            isinstance(value, (list, tuple)) and all(type(one) is int for one in value)
        ):
            hasher.update(repr((name, value)).encode())
        else:
            raise _NotKnownError(f"{name} are not identified by content")
    return hasher.digest()


def _parts_of(output: Any) -> dict[str, torch.Tensor]:
    """The tensors of an output by name, with the places of those in lists; none if there is something else."""
    try:
        found = dict(_parts("pooler_output", output.pooler_output))
        deep = getattr(output, "deepstack_features", None)
        found |= dict(_parts("deepstack_features", deep)) if deep is not None else {}
    except (AttributeError, TypeError):
        return {}
    return {name: part.detach().to("cpu", copy=True).contiguous() for name, part in found.items()}


def _parts(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for place, one in enumerate(value):
            yield from _parts(f"{name}-{'l' if isinstance(value, list) else 't'}{place}", one)
    else:
        raise TypeError(f"{name} is a {type(value).__name__}")


def _of_parts(parts: Mapping[str, torch.Tensor], like: torch.Tensor) -> PictureOutput:
    """The output that `_parts_of` took apart, on the device of `like`; it shares no memory with the parts."""
    tree: dict[str, Any] = {}
    for name, part in parts.items():
        *steps, last = name.split("-")
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = part.to(like.device, copy=True)
    return PictureOutput(**{field: _built(node) for field, node in tree.items()})


def _built(node: Any) -> Any:
    if isinstance(node, torch.Tensor):
        return node
    places = sorted(node, key=lambda place: int(place[1:]))
    built = [_built(node[place]) for place in places]
    return built if places[0][0] == "l" else tuple(built)
