"""Codecs that round keys and values of attention: `fp16`, `int8`, `int4`.

Keys have channels that are large for all tokens, so that they get a step for each channel and some tokens; values have
tokens that are large or small as a whole, and get theirs by token (as KIVI does, arXiv 2402.02750). The first tokens of
a conversation, which all others attend to and which are far from all of them, are kept as they are.

Steps are rounded up to 16 bits before anything is divided by them, so that nothing is clipped. Everything is computed
in float32; rounding in pieces that torch computes with one thread, as a team of threads for the thread that writes
would slow the model down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch

from ...errors import LoadError
from . import kernels
from .block import BlockMeta
from .codecs import register

FIRST = 4
"""Tokens at the beginning of a conversation that are kept as they are."""
GROUP = 64
"""Tokens, or channels, that share a step."""
LONG_GROUP = 128
"""Tokens that share one where steps are small."""
_KNOWN = (torch.float32, torch.bfloat16, torch.float16)
_PIECE = 32_768
"""Values: of no more torch computes with one thread."""

Parts = dict[str, torch.Tensor]
_INT8 = frozenset(("codes", "scale", "first"))
_INT4 = frozenset(("codes", "scale", "first", "lowest", "order", "widths"))


def by_channel(name: str) -> bool:
    """Whether a tensor is rounded by channel, and not by token."""
    return name.endswith(".keys")


def pieces(tokens: int, dim: int) -> Iterator[slice]:
    """Runs of tokens of one head that are small enough, in whole groups."""
    step = max(_PIECE // max(dim, 1) // LONG_GROUP, 1) * LONG_GROUP
    return (slice(start, start + step) for start in range(0, tokens, step))


def rounded_up(steps: torch.Tensor) -> torch.Tensor:
    """The least numbers of 16 bits that are not below these, which are not negative. float32 in, float16 out."""
    halves = steps.half()
    return torch.where(halves.float() < steps, (halves.view(torch.int16) + 1).view(torch.float16), halves)


class Grouped:
    """What is rounded in groups that share a step: `[heads, tokens, dim]` seen as `[tokens / a, a, dim / b, b]` by
    head."""

    def __init__(self, shape: tuple[int, ...], *, channels: bool, whole_rows: bool, group: int = GROUP) -> None:
        self.heads, self.tokens, self.dim = shape
        self.tokens_each = (group if self.tokens % group == 0 else self.tokens) if channels else 1
        self.channels_each = 1 if channels else GROUP if self.dim % GROUP == 0 and not whole_rows else self.dim

    def seen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Some tokens of one head, `[tokens, dim]`, by group. A view."""
        tokens = tensor.shape[0]
        return tensor.view(
            tokens // self.tokens_each, self.tokens_each, self.dim // self.channels_each, self.channels_each
        )

    def pieces(self) -> Iterator[tuple[int, slice, slice]]:
        """Head, tokens and rows of steps of every piece."""
        whole = self.tokens_each not in (1, GROUP, LONG_GROUP)
        for head in range(self.heads):
            for tokens in [slice(0, self.tokens)] if whole else pieces(self.tokens, self.dim):
                yield head, tokens, slice(tokens.start // self.tokens_each, -(-tokens.stop // self.tokens_each))

    def new_steps(self) -> torch.Tensor:
        """Room for steps, `[heads, tokens / a, dim / b]` float16."""
        shape = self.heads, self.tokens // self.tokens_each, self.dim // self.channels_each
        return torch.empty(shape, dtype=torch.float16)


def is_known(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one that codecs can have."""
    return tensor.dtype in _KNOWN and tensor.ndim == 3 and tensor.numel() > 0


def first_tokens(tensor: torch.Tensor, meta: BlockMeta) -> Parts:
    """The part with the first tokens of a conversation, in the first of its blocks."""
    return {"first": tensor[:, :FIRST].clone()} if meta.start == 0 else {}


def prepared(tensor: torch.Tensor, head: int, tokens: slice, meta: BlockMeta) -> torch.Tensor:
    """Some tokens of one head as float32; in the place of those that are kept as they are, the next one. A copy."""
    piece = tensor[head, tokens].to(torch.float32, copy=True)
    if meta.start == 0 and tokens.start == 0:
        piece[:FIRST] = piece[FIRST] if len(piece) > FIRST else 0
    return piece


def only(known: frozenset[str], parts: Mapping[str, torch.Tensor]) -> None:
    """Refuses parts that later versions may write: what they mean can't be left out.

    Raises:
        LoadError: there are others than these.
    """
    if not parts.keys() <= known:
        raise LoadError(f"a coded tensor has parts that are not known here: {sorted(parts.keys() - known)}")


def put_first(parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
    """Puts the first tokens in place, where there are any."""
    if "first" in parts:
        out[..., :FIRST, :].copy_(parts["first"])


def by_group(tensor: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """`[..., tokens, dim]` as `[..., tokens / a, a, dim / b, b]`, for steps `[..., tokens / a, dim / b]`. A view.

    Raises:
        LoadError: these are no steps of such a tensor.
    """
    tokens, dim = tensor.shape[-2:]
    if steps.shape[:-2] != tensor.shape[:-2] or tokens % max(steps.shape[-2], 1) or dim % max(steps.shape[-1], 1):
        raise LoadError(f"steps of shape {tuple(steps.shape)} are none of a tensor of shape {tuple(tensor.shape)}")
    rows, columns = steps.shape[-2:]
    return tensor.view(*tensor.shape[:-2], rows, tokens // rows, columns, dim // columns)


def spread(steps: torch.Tensor) -> torch.Tensor:
    """Steps as float32, to go with what `by_group` gives."""
    return steps.float().unsqueeze(-2).unsqueeze(-1)


def scaled(
    codes: torch.Tensor,
    steps: torch.Tensor,
    out: torch.Tensor,
    lowest: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
    widths: torch.Tensor | None = None,
) -> None:
    """Writes codes times steps, plus the lowest, into `out`, all of it by float32. See `kernels.scaled`.

    Raises:
        LoadError: these are none of such a tensor.
    """
    groups = by_group(out, steps)
    if lowest is not None and lowest.shape != steps.shape:
        raise LoadError("a coded tensor has other steps than lowest values")
    if kernels.scaled(codes, steps, lowest, out, order, widths):
        return
    exact = out if out.dtype == torch.float32 else torch.empty(out.shape)
    exact.copy_(_unpacked(codes, order, widths) if codes.dtype == torch.uint8 else codes)
    groups = groups if exact is out else by_group(exact, steps)
    groups.mul_(spread(steps))
    if lowest is not None:
        groups.add_(spread(lowest))
    if exact is not out:
        out.copy_(exact)


class Halves:
    """float32 as float16: ten bits of the mantissa instead of 23."""

    name: ClassVar[str] = "fp16"
    lossy: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Parts | None:
        if tensor.dtype != torch.float32 or not is_known(tensor):
            return None
        halves = torch.empty(tensor.shape, dtype=torch.float16)
        for head in range(tensor.shape[0]):
            for tokens in pieces(*tensor.shape[1:]):
                halves[head, tokens].copy_(tensor[head, tokens])
                if not halves[head, tokens].isfinite().all():
                    return None  # beyond 65,504
        return {"halves": halves}

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        out.copy_(parts["halves"])


class Compiled:
    """A codec whose `decode` is compiled loops, where there was a compiler."""

    @property
    def alone(self) -> bool:
        """Whether `decode` computes by one thread, so that several do not get in each other's way."""
        return kernels.library() is not None


class Int8(Compiled):
    """One byte a value: the nearest of 255 multiples of a step, which is as large as the group needs."""

    name: ClassVar[str] = "int8"
    lossy: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    centred: ClassVar[bool] = False
    """Whether what is rounded of keys is how far they are from the mean of their group."""

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Parts | None:
        if not is_known(tensor):
            return None
        grouped = Grouped(tuple(tensor.shape), channels=by_channel(name), whole_rows=True, group=LONG_GROUP)
        codes, steps, means = torch.empty(tensor.shape, dtype=torch.int8), grouped.new_steps(), grouped.new_steps()
        centred = self.centred and by_channel(name)
        for head, tokens, rows in grouped.pieces():
            piece = prepared(tensor, head, tokens, meta)
            groups = grouped.seen(piece)
            mean = groups.mean(dim=(1, 3)).half() if centred else torch.zeros(())
            groups.sub_(mean.float()[:, None, :, None] if centred else mean)
            found = rounded_up(self.steps(groups, by_channel(name)))
            if not (found.float().mul(127) + mean.float().abs()).le(torch.finfo(tensor.dtype).max).all():
                return None
            steps[head, rows], means[head, rows] = found, mean
            groups.div_(found.float().masked_fill(found == 0, 1)[:, None, :, None])
            codes[head, tokens] = piece.round_().clamp_(-127, 127)
        return {"codes": codes, "scale": steps} | ({"mean": means} if centred else {}) | first_tokens(tensor, meta)

    def steps(self, groups: torch.Tensor, keys: bool) -> torch.Tensor:
        """A step for each group of `[tokens / a, a, dim / b, b]`: `[tokens / a, dim / b]`."""
        return groups.abs().amax(dim=(1, 3)) / 127

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        only(_INT8, parts)
        scaled(parts["codes"], parts["scale"], out)
        put_first(parts, out)


class Int4(Compiled):
    """Half a byte a value: evenly spaced numbers between the least and the greatest of the group. Of values 16; of keys
    two channels share a byte, and the one that varies more has the more bits of it, which makes the error of what
    attention makes of them three times smaller."""

    name: ClassVar[str] = "int4"
    lossy: ClassVar[bool] = True
    stacks: ClassVar[bool] = True

    def encode(self, name: str, tensor: torch.Tensor, meta: BlockMeta) -> Parts | None:
        if not is_known(tensor) or tensor.shape[2] % 2:
            return None
        grouped = Grouped(tuple(tensor.shape), channels=by_channel(name), whole_rows=False)
        half = tensor.shape[2] // 2
        sharing = Sharing(grouped, tensor, meta) if by_channel(name) and tensor.shape[2] <= 256 else None
        codes = torch.empty((*tensor.shape[:2], half), dtype=torch.uint8)
        steps, lowest = grouped.new_steps(), grouped.new_steps()
        for head, tokens, rows in grouped.pieces():
            piece = prepared(tensor, head, tokens, meta)
            groups = grouped.seen(piece)
            most = sharing.most[head] if sharing is not None else torch.full((1,), 15.0)
            low = groups.amin(dim=(1, 3)).half()
            step = rounded_up((groups.amax(dim=(1, 3)) - low.float()).clamp_(min=0) / most)
            bound = low.float().abs() + most * step.float()
            if not bound.le(torch.finfo(tensor.dtype).max).all():
                return None
            steps[head, rows], lowest[head, rows] = step, low
            groups.sub_(low.float()[:, None, :, None]).div_(step.float().masked_fill(step == 0, 1)[:, None, :, None])
            found = torch.minimum(piece.round_().clamp_(min=0), most).to(torch.uint8)
            if sharing is not None:
                found = found[:, sharing.order[head].long()]
            codes[head, tokens] = found[:, :half] | (found[:, half:] << (sharing.widths[head] if sharing else 4))
        shared = {"order": sharing.order, "widths": sharing.widths} if sharing is not None else {}
        return {"codes": codes, "scale": steps, "lowest": lowest, **shared, **first_tokens(tensor, meta)}

    def decode(self, parts: Mapping[str, torch.Tensor], out: torch.Tensor) -> None:
        only(_INT4, parts)
        scaled(parts["codes"], parts["scale"], out, parts["lowest"], parts.get("order"), parts.get("widths"))
        put_first(parts, out)


class Sharing:
    """How the channels of each head share bytes: the one that varies most with the one that varies least, and so on."""

    def __init__(self, grouped: Grouped, tensor: torch.Tensor, meta: BlockMeta) -> None:
        ranges = torch.zeros(grouped.heads, grouped.dim)
        for head, tokens, _ in grouped.pieces():
            groups = grouped.seen(prepared(tensor, head, tokens, meta))
            range_ = (groups.amax(dim=(1, 3)) - groups.amin(dim=(1, 3))).amax(dim=0)
            ranges[head] = torch.maximum(ranges[head], range_)
        falling = ranges.argsort(dim=-1, descending=True, stable=True)
        half = grouped.dim // 2
        order = torch.cat([falling[:, :half], falling[:, half:].flip(-1)], dim=-1)
        size = ranges.gather(1, order).clamp_(min=torch.finfo(torch.float32).tiny).log2_()
        # half of the difference would give both the same step; a third errs less where keys of some channels are small
        # and queries large (Gemma 3: 0.0035 instead of 0.0062 nats; SmolLM2 0.0020 and 0.0018)
        widths = (4 + (size[:, :half] - size[:, half:]) / 3).nan_to_num_(4).round_().clamp_(4, 7)
        self.order, self.widths = order.to(torch.uint8), widths.to(torch.uint8)
        """`[heads, dim]`: the channels that have the low bits, then those that have the high ones. `[heads, dim / 2]`:
        how many bits are low."""
        both = torch.cat([widths, 8 - widths], dim=-1)
        self.most = torch.empty_like(ranges).scatter_(1, order, both.exp2_() - 1)
        """The greatest code of each channel."""


def _unpacked(codes: torch.Tensor, order: torch.Tensor | None, widths: torch.Tensor | None) -> torch.Tensor:
    """Codes of two channels in a byte, `[..., tokens, dim / 2]`, as `[..., tokens, dim]`."""
    if order is None or widths is None:
        return torch.cat([codes & 15, codes >> 4], dim=-1)
    places = torch.arange(order.shape[-1]).expand(order.shape)
    if not torch.equal(order.long().sort(dim=-1).values, places) or widths.shape[-1] * 2 != order.shape[-1]:
        raise LoadError("codes are in an order that is none")
    low = widths.unsqueeze(-2)
    both = torch.cat([codes & ((1 << low) - 1), codes >> low], dim=-1)
    return both.gather(-1, order.long().argsort(dim=-1).unsqueeze(-2).expand(both.shape))


for codec in (Halves(), Int8(), Int4()):
    register(codec)
