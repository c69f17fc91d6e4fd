#!/usr/bin/env bash
# BigBird (transformers 5.24.0): what a long text gives depends on whether a short one was fed before it.
#
# Guess before running: a model in eval mode gives the same logits for the same long text, whatever it was fed before.
# Seen: the same twice in a row; after one forward over 32 tokens the logits of the same 256 tokens are others, for the
# rest of the model's life. The short text switched the attention from block sparse to full, and nothing switches it
# back; `config.attention_type` says "block_sparse" all the while. So KV of such a model belongs to a configuration that
# can't be read from its configuration.
#
# Fails if this changes: if the second long forward differs from the first, if the third one is the same again, or if
# the configuration tells.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import BigBirdConfig, BigBirdForCausalLM

torch.manual_seed(0)
config = BigBirdConfig(
    vocab_size=101, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=512, block_size=16, num_random_blocks=2, is_decoder=True, attention_type="block_sparse",
)
model = BigBirdForCausalLM(config).eval()
text = torch.randint(5, 100, (1, 256))
with torch.no_grad():
    first, second = model(text).logits, model(text).logits
    model(text[:, :32])
    third = model(text).logits
same, moved = (first - second).abs().max().item(), (first - third).abs().max().item()
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"the same 256 tokens twice: logits differ by {same:.2g}")
print(f"and again after one forward over 32 tokens: {moved:.2g}; config.attention_type is {config.attention_type!r}")
assert same == 0.0
assert moved > 1e-3
assert model.config.attention_type == "block_sparse"
PYTHON
