#!/usr/bin/env python3
"""A batch of conversations that goes on: each row of a left-padded batch is continued from its own session.

python examples/batch.py [--model Qwen/Qwen3-0.6B] [--store DIR]

A batch computes the same columns of all its rows, so the row with most that is new decides how much is computed of
each: batches pay where the rows' new messages are of similar length.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, AttentionStoreCache, model_source

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=model_source, default="")
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token

WHAT_THEY_SAY = {
    "andrew": [
        "What news from the army? They say that the bridge was burnt before all of our men were over it.",
        "And the general, did he know of it?",
    ],
    "natasha": [
        "Did you sleep at all, my child? I heard you walk about in your room until the candles were brought.",
        "You need not tell me why.",
    ],
    "pierre": ["So you have sold the wood. For how much?", "Then I hope that you were paid at once, in silver."],
}
conversations = {name: [] for name in WHAT_THEY_SAY}

with AttentionStore(args.store) as store:
    for turn in range(2):
        for name, messages in conversations.items():
            messages.append({"role": "user", "content": WHAT_THEY_SAY[name][turn]})
        prompts = list(conversations.values())
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        cache = AttentionStoreCache(model, session=[f"batch {name}" for name in conversations], store=store)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=30, do_sample=False)

        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for (name, messages), answer, row in zip(conversations.items(), answers, cache.row_stats, strict=True):
            messages.append({"role": "assistant", "content": answer})
            print(f"{name}: {answer}\n  [{row}]")
        print(f"[all rows: {cache.stats}]\n")
