"""transformers' own continuous batching under an attached model: what its forwards show."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import make_model, tokens
from transformers import DynamicCache
from transformers.generation.continuous_batching.cache import PagedAttentionCache as Theirs

from hf_attnstore import AttentionStore, attach


class PagedAttentionCache(DynamicCache):
    """Stands for the manager's cache, whose forwards need a thread of their own: an attached model knows it by name."""


def test_weights_that_change_between_its_forwards_lead_to_a_word(
    store: AttentionStore, log: pytest.LogCaptureFixture
) -> None:
    assert Theirs.__name__ == PagedAttentionCache.__name__
    model = make_model()
    attach(model, store)
    cache = PagedAttentionCache(config=model.config)
    words = []
    with torch.no_grad():
        for change in (False, False, True, False):
            if change:
                model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)
            model(input_ids=tokens(4), past_key_values=cache)
            words.append(log.text.count("continuous batching runs"))
        model(input_ids=tokens(4), past_key_values=PagedAttentionCache(config=model.config))
    assert words == [0, 0, 1, 1]
    assert log.text.count("continuous batching runs") == 1, "another manager has blocks of its own"
