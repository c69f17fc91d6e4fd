#!/usr/bin/env python3
"""Plain `generate` with a cache that is still there tomorrow: run it twice, and the second run prefills almost nothing.

python examples/generate.py [--model Qwen/Qwen3-0.6B] [--store DIR]
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, AttentionStoreCache

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(Path(__file__).parent / "small-model"))
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model)
tokenizer = AutoTokenizer.from_pretrained(args.model)
messages = [
    {
        "role": "user",
        "content": "The old prince looked at the letter for a long time. What did he say at last? " * 8,
    }
]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

with AttentionStore(args.store) as store:
    cache = AttentionStoreCache(model, session="example", store=store)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"reused {cache.reused_tokens} tokens, prefilled {cache.prefilled_tokens}")
