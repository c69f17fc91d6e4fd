"""What the store does for a family of encoder-decoders: a document that is read again, and a decoder that goes on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...cache.cache import AttentionStoreCache
from ...cache.hooks import attach, detach
from ...cache.model.argument import as_generate_takes
from ...store.store import AttentionStore
from .encoder_decoders import encoder_input, make_seq2seq, prompt
from .feeding import difference

_BLOCK, _NEW = 8, 6
_ROUNDING = 1e-4
"""How far logits may be from those of plain `generate`, relative to the largest: forwards are of other sizes."""


@dataclass
class Readings:
    """What the turns of one family showed."""

    problems: list[str] = field(default_factory=list)
    kept: bool = True
    encoder_left_out: bool = False
    why_not: str = ""


def read_documents(family: str, folder: Path) -> Readings:
    """Four turns, each with a store that was opened anew: a document, the same with the same words of the decoder, the
    answer gone on with, and another document with the same words."""
    found = Readings()
    document, other, words = encoder_input(family), encoder_input(family, seed=7), prompt(5)
    answer = _turn(found, family, folder, "first turn", document, words, 0)
    _turn(found, family, folder, "the same again", document, words, words.shape[1] - 1)
    longer = torch.cat([answer, prompt(4, seed=9)[:, 1:]], dim=1)
    _turn(found, family, folder, "the answer gone on with", document, longer, answer.shape[1] - 1)
    _turn(found, family, folder, "another document", other, words, 0)
    _attached(found, family, folder, document, words)
    return found


def _attached(found: Readings, family: str, folder: Path, inputs: dict[str, Any], words: torch.Tensor) -> None:
    """Plain `generate` with a store attached, twice."""
    model, settings = make_seq2seq(family), {"max_new_tokens": _NEW, "do_sample": False, "decoder_input_ids": words}
    theirs = make_seq2seq(family).generate(**inputs, **settings)
    with AttentionStore(folder.with_name("attached"), block_size=_BLOCK) as store:
        attach(model, store)
        for _ in range(2):
            if not torch.equal(model.generate(**inputs, **settings), theirs):
                found.problems.append("attached: WRONG TOKENS, other than those of plain generate")
        detach(model)


def _turn(
    found: Readings, family: str, folder: Path, name: str, inputs: dict[str, Any], words: torch.Tensor, known: int
) -> torch.Tensor:
    model, settings = make_seq2seq(family), {"max_new_tokens": _NEW, "do_sample": False, "decoder_input_ids": words}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    theirs = make_seq2seq(family).generate(**inputs, **settings)
    with AttentionStore(folder, block_size=_BLOCK) as store:
        cache = AttentionStoreCache(model, "document", store)
        ours = model.generate(**inputs, **as_generate_takes(model, cache), **settings)
    stats = cache.stats
    if not torch.equal(ours.sequences, theirs.sequences):
        found.problems.append(f"{name}: WRONG TOKENS, other than those of plain generate")
    else:
        off = max(difference(a, b) for a, b in zip(ours.logits, theirs.logits, strict=True))
        if off > _ROUNDING:
            found.problems.append(f"{name}: logits are off by {off:.1g} from those of plain generate")
    if stats.recomputed and not stats.saved_bytes and not stats.reused_tokens:
        found.kept, found.why_not = False, stats.recomputed
    elif stats.reused_tokens != known:
        found.problems.append(f"{name}: reused {stats.reused_tokens} tokens instead of {known}")
    if known and found.kept and not stats.encoder_reused:
        found.problems.append(f"{name}: nothing of the encoder's output was reused")
    if not known and stats.encoder_reused:
        found.problems.append(f"{name}: another document's output was reused")
    found.encoder_left_out = found.encoder_left_out or stats.encoder_skipped
    sequences: torch.Tensor = ours.sequences
    return sequences
