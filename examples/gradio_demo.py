#!/usr/bin/env python3
"""A chat in the browser, in a few lines: old conversations answer as fast as new ones, and the page says why.

python examples/gradio_demo.py [--model Qwen/Qwen3-0.6B] [--store DIR] [--port 7860]

Needs the extra `ui`. `attnstore ui` is the same with more options.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, model_source
from hf_attnstore.ui.serve import serve

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=model_source, default="")
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
parser.add_argument("--port", type=int, default=7860)
args = parser.parse_args()


def load():
    """Called in a thread, while the page can be seen already."""
    return AutoModelForCausalLM.from_pretrained(args.model).eval(), AutoTokenizer.from_pretrained(args.model)


# each browser has its own conversations; the caps hold for all of them together
store = AttentionStore(args.store, memory="2GiB", disk="20GiB")
serve(load, store, model_name=Path(args.model).name, port=args.port, ready=print, max_new_tokens=100)
print("the conversations are in", store.path)
