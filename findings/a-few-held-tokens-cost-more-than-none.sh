#!/usr/bin/env bash
# transformers 5.24.0 on torch 2.13.0 (CPU): a long prompt behind a cache of four tokens takes longer than the whole
# prompt, those four included, with no cache before it.
#
# Guess before running: 1,996 tokens behind 4 held ones cost about what 2,000 do, a little less.
# Seen: 1.2 to 1.4 times the CPU time (thread time, one thread, SmolLM2's shape). With an empty cache the causal mask is
# left out and attention is told that it is causal, which skips the masked half; with anything held, a mask
# [1, 1, new, held + new] is made, and all pairs are computed. At this shape more than two hundred held tokens are
# needed until going on from them is as fast as none.
#
# Fails if this changes: if there is a mask without a cache or none behind one, or if it costs less than 1.08 times as much.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import statistics
import time

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=512)
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=4, **shape)).eval()
ids = torch.randint(3, 512, (1, 2000))
masks = []
inner = model.model.layers[0].self_attn
forward = inner.forward


def seen(*args, **kwargs):
    masks.append(kwargs.get("attention_mask"))
    return forward(*args, **kwargs)


inner.forward = seen


def seconds(held: int) -> float:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        if held:
            model(ids[:, :held], cache=cache, logits_to_keep=1)
        began = time.thread_time()
        model(ids[:, held:], cache=cache, logits_to_keep=1)
        return time.thread_time() - began


seconds(0)
alone, behind = [], []
for _ in range(5):
    alone.append(seconds(0))
    without = masks[-1]
    behind.append(seconds(4))
    masked = masks[-1]
ratio = statistics.median(b / a for a, b in zip(alone, behind))
shown = None if masked is None else tuple(masked.shape)
print(f"mask without a cache: {without}; behind four tokens: {shown}; CPU time {ratio:.2f} times")
assert without is None and shown == (1, 1, 1996, 2000) and ratio > 1.08
PYTHON
