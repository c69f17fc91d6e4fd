"""Taking checkpoints: the running states of a cache's layers, at exact numbers of tokens, handed to the store."""

import logging
from collections.abc import Sequence

import torch

from ...session.chain import TokenChain
from ...store.blocks.block import Block, BlockMeta
from ...store.blocks.keys import Key, encode_tokens
from ...store.store import AttentionStore
from ..layers.buffers import empty
from ..layers.kept import KeptLayer
from ..layers.states import RunningState, encode_numbers
from .names import tensor_name
from .streams import copy_to_host

logger = logging.getLogger("hf_attnstore")


def take_checkpoint(
    layers: Sequence[KeptLayer], chain: TokenChain, store: AttentionStore, fingerprint: str, *, wait: bool
) -> tuple[Key, int]:
    """Hands the running states over, which are those after all of `chain`, of at least one token.

    Args:
        wait: for room in host memory, where that will come.

    Returns:
        The checkpoint's key, and the bytes handed over: 0 where the store has it, or has no room for it.

    Raises:
        NotFiniteError: there is NaN or infinity in the states.
    """
    tokens = len(chain)
    key = chain.checkpoint_key(tokens)
    if store.has(key):
        return key, 0
    captured = {number: layer.capture() for number, layer in enumerate(layers) if isinstance(layer, RunningState)}
    sources = {tensor_name(number, name): t for number, (found, _) in captured.items() for name, t in found.items()}
    size = sum(tensor.nbytes for tensor in sources.values())
    if not store.reserve(size, wait=wait):
        logger.debug("the states after %d tokens are not kept: no room", tokens)
        return key, 0
    arriving: list[torch.cuda.Event] = []
    try:
        tensors = {name: copy_to_host(tensor, arriving, _contiguous) for name, tensor in sources.items()}
        parent, before, start = chain.checkpoint(tokens)
        meta = BlockMeta(
            key=key,
            parent=parent,
            fingerprint=fingerprint,
            start=start,
            tokens=encode_tokens(chain.ids[start:tokens]),
            continues=before,
            codec=store.codec,
            state=encode_numbers({number: numbers for number, (_, numbers) in captured.items()}),
        )
        made = Block(meta, tensors, arriving)
        if not arriving:
            made.check_finite()
        store.put(made)
    except BaseException:
        store.release(size)
        raise
    return key, size


def _contiguous(like: torch.Tensor) -> torch.Tensor:
    return empty(tuple(like.shape), like.dtype, torch.device("cpu"))
