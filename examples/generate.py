#!/usr/bin/env python3
"""Plain `generate` with a cache that is still there tomorrow: run it twice, and the second run prefills almost nothing.

python examples/generate.py [--model Qwen/Qwen3-0.6B] [--store DIR]
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, AttentionStoreCache, model_source

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=model_source, default="")
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)
question = "The old prince looked at the letter for a long time. What did he say at last? " * 8
messages = [{"role": "user", "content": question}]

# The five lines: without the store it is the same, but for `past_key_values`.
store = AttentionStore(args.store)
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
cache = AttentionStoreCache(model, session="example", store=store)
output = model.generate(**inputs.to(model.device), past_key_values=cache, max_new_tokens=40, do_sample=False)
store.close()

print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(f"[{cache.stats}]")
