"""Prompts whose text was known, but in other tokens: the ids that the store has for it in place of the prompt's.

Where an answer comes back as text, a tokenizer may cut it otherwise than the model did. Ids decide what can be reused,
so all that follows would be computed again. The same text is the same conversation, though not the same tokens: who
asks for it (`resegment=True`) has the model see what it wrote itself.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn

from ...errors import SessionNotFoundError
from ...session.matching import match_prefix
from ...session.segments import same_beginning
from ...session.spans import Span, total_tokens
from ...store.blocks.keys import Key
from ...store.store import AttentionStore
from ..cache import AttentionStoreCache
from .settings import setting
from .streamer import WholePromptStreamer


def known_ids(cache: AttentionStoreCache, ids: np.ndarray) -> np.ndarray:
    """The ids `[tokens]` of a prompt, those at its beginning as the cache, its session or the store have them."""
    store, tokenizer = cache.store, cache.resegments_with
    assert store is not None
    found = _joined(tokenizer, np.asarray(cache.conversation_ids, dtype=np.int64), ids)
    if cache.session is not None:
        with suppress(SessionNotFoundError):
            found = _joined(tokenizer, np.asarray(store.tokens(cache.session, dropped=True), dtype=np.int64), found)
    found = _by_content(tokenizer, store, store.root(cache.model_fingerprint()), found)
    # nobody is to be given another text, whatever the tokenizer makes of single tokens
    return found if tokenizer.decode(found.tolist()) == tokenizer.decode(ids.tolist()) else ids


def _joined(tokenizer: Any, known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`ids` with what stands for the same text in `known` at its beginning."""
    ours, theirs = same_beginning(tokenizer, known, ids)
    return np.concatenate([known[:ours], ids[theirs:]])


def _by_content(tokenizer: Any, store: AttentionStore, root: Key, ids: np.ndarray) -> np.ndarray:
    """`ids` with those of the blocks of any conversation where these are the same text."""
    agreed = -1
    while True:
        spans = match_prefix(ids, root, store.block_size, store)
        before, agreed = agreed, total_tokens(spans)
        if agreed <= before or agreed == len(ids):
            return ids
        ids = np.concatenate([ids[:agreed], _joined(tokenizer, _after(store, root, spans), ids[agreed:])])


def _after(store: AttentionStore, root: Key, spans: Sequence[Span]) -> np.ndarray:
    """Some ids `[tokens]` that a text goes on with after `spans`: the rest of a block, and one block after that, as a
    token may be of two blocks for one tokenizer."""
    last = spans[-1].block if spans else root
    start = spans[-1].stop if spans else 0
    found = [np.empty(0, dtype=np.int64)]
    if spans:
        described = store.describe_block(last)
        found.append(described[1][start:] if described is not None else found[0])
    following = store.follower(last)
    described = store.describe_block(following) if following is not None else None
    if described is not None:
        found.append(described[1])
    return np.concatenate(found)


def generate_resegmented(
    cache: AttentionStoreCache,
    model: nn.Module,
    prompt: torch.Tensor,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    run: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], Any],
) -> Any:
    """`generate` with the ids that are known for the text of `prompt` `[1, tokens]`. The result begins with `prompt`.

    Args:
        run: goes on with another prompt.
    """
    known = known_ids(cache, prompt[0].detach().cpu().numpy())
    fed = torch.from_numpy(known[None]).to(prompt)
    if torch.equal(fed, prompt):
        return run(prompt, args, dict(kwargs))
    changed = {name: value for name, value in kwargs.items() if name not in ("input_ids", "inputs")}
    changed["input_ids"] = fed
    if changed.get("attention_mask") is not None:
        changed["attention_mask"] = torch.ones_like(fed)
    for name, instead in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        length = setting(model, kwargs, name)
        if length and setting(model, kwargs, instead) is None:  # a limit on the whole conversation
            changed[name] = max(int(length) + fed.shape[1] - prompt.shape[1], 0)
    if changed.get("streamer") is not None:
        changed["streamer"] = WholePromptStreamer(changed["streamer"], prompt.cpu())
    output = run(fed, (), changed)
    cache.stats.resegmented_tokens = int(prompt.shape[1]) - _same_end(prompt, fed)
    sequences = output if isinstance(output, torch.Tensor) else output["sequences"]
    begin = prompt.to(sequences.device).expand(len(sequences), -1)
    whole = torch.cat([begin, sequences[:, fed.shape[1] :]], dim=1)
    if output is sequences:
        return whole
    output["sequences"] = whole
    return output


def _same_end(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many tokens two prompts `[1, tokens]` that begin otherwise have in common at their beginning and end."""
    length = min(a.shape[1], b.shape[1])
    differ = torch.nonzero(a[0, :length] != b[0, :length])
    begin = int(differ[0]) if len(differ) else length
    differ = torch.nonzero(a[0].flip(0)[: length - begin] != b[0].flip(0)[: length - begin])
    return begin + (int(differ[0]) if len(differ) else length - begin)
