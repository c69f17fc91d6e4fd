"""`attach` and plain `generate`: whatever a model is like, its tokens are those of before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ...cache.cache import AttentionStoreCache
from ...cache.hooks import attach, detach
from ...store.store import AttentionStore
from .feeding import some_ids

AS_WITHOUT = "as without"
_SETTINGS = {"max_new_tokens": 6, "do_sample": False}
_CODEBOOKS = 4
_MORE = 10


def run_attached(model: Any, twin: Any, folder: Path) -> tuple[str, list[str]]:
    """Three turns of plain `generate` with a store attached, the second one on the first one's prompt again.

    Args:
        model: the store is attached to it.
        twin: a model with the same weights that nothing is attached to.

    Returns:
        `kept` where something was reused, `as without` where nothing was, empty where plain `generate` does not run
        without a store either; and what went wrong.
    """
    prompt = _more(twin, 4 * _MORE)
    try:
        _sequences(twin, prompt)
    except Exception:
        return "", []
    reused, problems = 0, list[str]()
    with AttentionStore(folder, block_size=16) as store:
        attach(model, store)
        try:
            for turn in ("first turn", "the same again", "another turn"):
                theirs, _ = _sequences(twin, prompt)
                ours, count = _sequences(model, prompt)
                reused += count
                if not torch.equal(ours, theirs):
                    problems.append(f"attached, {turn}: WRONG TOKENS, other than those of plain generate")
                if turn == "the same again" and theirs.ndim == prompt.ndim and len(theirs) == len(prompt):
                    prompt = torch.cat([theirs, _more(twin, _MORE)], dim=1)
        except Exception as error:
            problems.append(f"attached: {type(error).__name__}: {error}")
        finally:
            detach(model)
    return ("kept" if reused else AS_WITHOUT), problems


def _more(model: Any, count: int) -> torch.Tensor:
    """Ids `[1, count]`, or of every codebook a row."""
    rows = _CODEBOOKS if _of_codes(model) else 1
    return some_ids(rows * count, 51).view(rows, count)


def _of_codes(model: Any) -> bool:
    """Whether a model takes the codes of several codebooks at once (Musicgen)."""
    return hasattr(model, "build_delay_pattern_mask")


def _sequences(model: Any, prompt: torch.Tensor) -> tuple[torch.Tensor, int]:
    """What `generate` makes, with equal random numbers, and how many tokens a store gave."""
    settings: dict[str, Any] = {**_SETTINGS}
    if "Diffusion" in type(model).__name__:
        settings = {"max_new_tokens": 8, "max_denoising_steps": 2}
    if _of_codes(model):
        settings |= {"guidance_scale": 1.0, "decoder_start_token_id": 0, "num_return_sequences": 1, "num_beams": 1}
    torch.manual_seed(0)
    said = model.generate(prompt, return_dict_in_generate=True, **settings)
    held = next((v for v in said.values() if isinstance(v, AttentionStoreCache)), None)
    return said.sequences, held.reused_tokens if held is not None else 0
