#!/usr/bin/env python3
"""A chat in a few lines: each line of standard input is a message. Run it again and the conversation goes on.

python examples/chat_cli.py [--session NAME] [--model Qwen/Qwen3-0.6B] [--store DIR]
"""

import argparse
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, ChatSession, model_source

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--session", default="chat-example")
parser.add_argument("--model", type=model_source, default="")
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)

with AttentionStore(args.store) as store:
    chat = ChatSession(model, tokenizer, store, args.session, max_new_tokens=60)
    for line in sys.stdin:
        if line.strip():
            chat.send(line.strip(), stream=True)
            print(f"[{chat.stats}]", flush=True)
