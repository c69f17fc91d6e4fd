#!/usr/bin/env bash
# DiffusionGemma (transformers 5.24.0): `generate` adds its temperature schedule to the caller's own LogitsProcessorList.
#
# Guess before running: as with every other `generate` of transformers, which makes a list of its own, a list that is
# passed is as it was afterwards, and the same call with the same seed gives the same again.
# Seen: each call leaves one LinearTemperatureScheduleLogitsProcessor more in the caller's list, so that the next call
# applies the temperatures twice, then three times; with the same seed the second answer is another than the first.
# Who keeps a list for a conversation has to hand over a copy of it in each turn.
#
# Fails if this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0
"$folder/venv/bin/python" -m pip install --quiet transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, LogitsProcessorList

torch.manual_seed(0)
text = dict(
    vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, global_head_dim=16, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
    layer_types=["sliding_attention", "full_attention"], max_position_embeddings=256,
)
vision = dict(
    model_type="gemma4_vision", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, head_dim=16, pooling_kernel_size=2, patch_size=4, position_embedding_size=64,
)
config = DiffusionGemmaConfig(text_config=text, vision_config=vision, image_token_id=97, canvas_length=8)
model = DiffusionGemmaForBlockDiffusion(config).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
prompt = torch.randint(5, 90, (1, 12))
mine = LogitsProcessorList()
answers = []
for call in range(4):
    torch.manual_seed(1)
    settings = dict(max_new_tokens=16, max_denoising_steps=6, t_min=0.2, t_max=0.8)
    answers.append(model.generate(prompt, logits_processor=mine, **settings).sequences)
    print(f"call {call + 1}: the caller's list holds {[type(one).__name__ for one in mine]}")
torch.manual_seed(1)
plain = model.generate(prompt, logits_processor=LogitsProcessorList(), **settings).sequences
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
same = [bool(torch.equal(plain, answer)) for answer in answers]
print(f"the same call four times, the same seed: {same} are what a fresh list gives")
assert len(mine) == 4
assert same[0] and not all(same)
PYTHON
