"""transformers' own continuous batching under an attached model: what its forwards show."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from support.tiny_models import make_model, tokens
from transformers import DynamicCache, GenerationConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.cache import PagedAttentionCache as Theirs

from hf_attnstore import AttentionStore, attach


class PagedAttentionCache(DynamicCache):
    """Stands for the manager's cache: an attached model knows it by name."""


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


@pytest.mark.skipif(
    not hasattr(ContinuousBatchingManager, "pause"), reason="the manager of this transformers can't be paused"
)
@pytest.mark.skipif(
    find_spec("transformers.generation.continuous_batching.cache_allocators") is not None,
    reason="the store looks after the manager of this transformers",
)
def test_the_manager_itself_leads_to_a_word_too(store: AttentionStore, log: pytest.LogCaptureFixture) -> None:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    model = make_model()
    attach(model, store)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
    )
    manager.start()
    try:

        def ask() -> int:
            request = manager.add_request(tokens(40)[0].tolist(), max_new_tokens=4)
            answer = manager.get_result(request, timeout=120)
            assert answer is not None
            assert len(answer.generated_tokens) == 4
            return log.text.count("continuous batching runs")

        assert (ask(), ask()) == (0, 0)
        with manager.pause(), torch.no_grad():
            model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)
        assert ask() == 1
    finally:
        manager.stop(block=True, timeout=60)
