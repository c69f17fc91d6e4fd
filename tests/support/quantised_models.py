"""Models with quantised projections: the forms in which weights come, imitated small, so that no package is needed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .tiny_models import make_model

CODES = torch.linspace(-1, 1, 16)


def _codes(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """16 levels and a scale for each row."""
    weight = linear.weight.detach()
    scale = weight.abs().amax(dim=1)
    return ((weight / scale[:, None] + 1) * 7.5).round().to(torch.uint8), scale


class Wrapped(torch.Tensor):
    """A tensor subclass, as torchao has them: inner tensors, and words on how they belong together."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, block: int) -> Wrapped:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)  # type: ignore[attr-defined]

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, block: int) -> None:
        self.codes, self.scale, self.block = codes, scale, block

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["codes", "scale"], {"block": self.block, "dtype": torch.float32}

    def dense(self) -> torch.Tensor:
        return CODES[self.codes.long()] * self.scale[:, None]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear:
            return functional.linear(args[0], args[1].dense())
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale, args[0].block)
        raise NotImplementedError(f"{func} on a quantised tensor")


class Opaque(Wrapped):
    """A tensor subclass that shows nothing of what it is made of."""

    __tensor_flatten__ = None  # type: ignore[assignment]


class Params4(nn.Parameter):
    """A parameter with a quantisation state beside its bytes, as bitsandbytes has them."""

    quant_state: Any


class Linear4(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = _codes(linear)
        self.weight = Params4(codes, requires_grad=False)
        nested = SimpleNamespace(absmax=scale.amax(), code=None, blocksize=256)
        self.weight.quant_state = SimpleNamespace(
            absmax=scale / scale.amax(), code=CODES.clone(), blocksize=48, quant_type="nf4", state2=nested
        )
        self.weight.module = self  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = self.weight.quant_state
        return functional.linear(x, state.code[self.weight.data.long()] * (state.absmax * state.state2.absmax)[:, None])


class LinearWithBuffers(nn.Module):
    """All in buffers, as GPTQ and AWQ have it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = _codes(linear)
        self.register_buffer("qweight", codes.to(torch.int32))
        self.register_buffer("scales", scale)
        self.register_buffer("qzeros", torch.full_like(scale, 7.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = (self.qweight - self.qzeros[:, None]) / 7.5 * self.scales[:, None]  # type: ignore[index,operator]
        return functional.linear(x, weight)


class LinearWithMeta(nn.Module):
    """Scales in a plain dict beside the parameter, as HQQ has it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scale = _codes(linear)
        self.W_q = nn.Parameter(codes, requires_grad=False)
        self.meta = {"scale": scale, "zero": torch.full_like(scale, 7.5), "nbits": 4}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.W_q - self.meta["zero"][:, None]) / 7.5 * self.meta["scale"][:, None]
        return functional.linear(x, weight)


class LinearFloat8(nn.Module):
    """Eight-bit floats, and scales in a buffer."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax() / 448
        self.weight = nn.Parameter((linear.weight.detach() / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.register_buffer("weight_scale_inv", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.weight.float() * self.weight_scale_inv)


class LinearWithState(nn.Module):
    """State of its own kind, kept in nothing but an attribute and in `state_dict`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.state = SimpleNamespace(codes=_codes(linear)[0], scale=_codes(linear)[1], calls=0)

    def get_extra_state(self) -> Any:
        return {"codes": self.state.codes, "scale": self.state.scale}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state.calls += 1
        return functional.linear(x, CODES[self.state.codes.long()] * self.state.scale[:, None])


def _wrapped(kind: type[Wrapped]) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        linear.weight = nn.Parameter(kind(*_codes(linear), 48), requires_grad=False)
        return linear

    return make


FORMS: dict[str, tuple[Callable[[nn.Linear], nn.Module], Callable[[Any], list[torch.Tensor]]]] = {
    "tensor subclass": (_wrapped(Wrapped), lambda m: [m.weight.codes, m.weight.scale]),
    "parameter with a state": (
        Linear4,
        lambda m: [
            m.weight.data,
            m.weight.quant_state.absmax,
            m.weight.quant_state.code,
            m.weight.quant_state.state2.absmax,
        ],
    ),
    "buffers": (LinearWithBuffers, lambda m: [m.qweight, m.scales, m.qzeros]),
    "a dict beside the parameter": (LinearWithMeta, lambda m: [m.W_q.data, m.meta["scale"], m.meta["zero"]]),
    "float8": (LinearFloat8, lambda m: [m.weight.data, m.weight_scale_inv]),
    "extra state": (LinearWithState, lambda m: [m.state.codes, m.state.scale]),
}
"""How to quantise a projection, and the tensors that it then consists of."""


def quantised(make: Callable[[nn.Linear], nn.Module], seed: int = 0) -> Any:
    """A model whose keys and values come from quantised projections."""
    model: Any = make_model(seed=seed)
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            setattr(layer.self_attn, name, make(getattr(layer.self_attn, name)))
    return model


def dynamically_quantised(seed: int = 0) -> Any:
    """torch's own: weights are packed objects, neither parameters nor buffers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(make_model(seed=seed), {nn.Linear}, dtype=torch.qint8)


def changed(tensor: torch.Tensor) -> None:
    """Changes all of a tensor's values, in place and as quietly as possible."""
    with torch.no_grad():
        other = (tensor.float() * 0.5 + 1).to(tensor.dtype)
        tensor.data.copy_(other)
