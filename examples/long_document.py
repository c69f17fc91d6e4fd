#!/usr/bin/env python3
"""One document, many questions, over days: the document is prefilled once, and then only the questions are.

python examples/long_document.py [FILE.txt] [--ask QUESTION …] [--model Qwen/Qwen3-0.6B] [--store DIR]

Run it again tomorrow, with other questions: the document is still there. It is a session by the name of its file, and
every question is put to the document alone, as if the others had never been asked. What the prompt has in common with
any earlier one is reused; when the file was edited, that is everything before the first change.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, AttentionStoreCache, model_source

CHAPTER = Path(__file__).parent.parent / "hf_attnstore" / "lab" / "demo" / "alice.txt"  # of a book, public domain
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("file", nargs="?", type=Path, default=CHAPTER)
parser.add_argument("--ask", nargs="+", default=["Whom does Alice follow?", "Who is Dinah?", "What was on the table?"])
parser.add_argument("--model", type=model_source, default="")
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
args = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)

document = args.file.read_text(encoding="utf-8")
tokens = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
room = model.config.get_text_config().max_position_embeddings - 200  # for a question, its answer and the template
if len(tokens) > room:
    print(f"the model's window has room for the first {room:,} of the {len(tokens):,} tokens of {args.file.name}\n")
    document = tokenizer.decode(tokens[:room])

with AttentionStore(args.store) as store:
    for question in args.ask:
        # The document comes first: what stands before it, or in it, must not depend on the question.
        messages = [{"role": "user", "content": f"{document}\n\nA question about this text: {question}"}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        cache = AttentionStoreCache(model, session=str(args.file.resolve()), store=store)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{question}\n{answer}\n[{cache.stats}]\n")
