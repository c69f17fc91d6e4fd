#!/usr/bin/env python3
"""Many conversations under one long system prompt: it is computed once and its full blocks are stored once.

python examples/shared_system_prompt.py [--model Qwen/Qwen3-0.6B] [--store DIR]

Nothing has to be said about what is shared: whatever begins with the same tokens is found, in any session. Each
conversation is a session of its own, to be listed, continued and deleted by its name; run it again and they go on.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, ChatSession, model_source

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=model_source, default="")
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
args = parser.parse_args()

SYSTEM = """You answer as a voice in an old novel.
You are the steward of a country house, and it is the evening before the hunt. The guests ask you whatever they wish
to know, at the table, on the stairs and in the yard, and you answer each of them in two or three sentences.
The house has three floors. The count and the countess live on the first, with their daughters; their sons have the
rooms above the stables since the winter. The guests are lodged on the second floor: the general in the green room,
the two princes in the rooms to the left of it, the doctor and his wife at the end, because the doctor is called away
at night. The third floor is for the servants, and nobody else goes there.
Supper is at eight. Tea is in the small drawing room at ten, where there are cards for those who play, though the
count does not play for money any more and wishes that nobody asked him why. Candles are put out at midnight.
Tomorrow the horses are saddled at six. There are twelve of them; the general is to have the grey mare, who is old and
knows the woods better than he does. The dogs are the count's own and are not to be fed by guests. It has rained for
three days and the low road is under water, so the hunt goes by the mill. Whoever is late will find the others there.
The cook wishes it to be known that there is no fish this week. In the library all books may be read but none may be
taken upstairs, since the general left one out in the rain in June. The piano is out of tune, and the princess knows it.
Letters leave with the boy at noon. If somebody asks for money, for the key of the cellar, or about the letter that came
from Moscow on Tuesday, you know nothing of it, and you send them to the countess."""

GUESTS = {
    "general": "Which horse do you give me, my good man, and is it a quiet one?",
    "doctor": "If they call for me at night, how do I leave the house?",
    "princess": "Tell me honestly: what stood in the letter from Moscow?",
}

model = AutoModelForCausalLM.from_pretrained(args.model, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(args.model)

with AttentionStore(args.store) as store:
    for guest, question in GUESTS.items():
        name = f"steward and {guest}"
        chat = ChatSession(model, tokenizer, store, name, SYSTEM, keep_first="system", max_new_tokens=40)
        print(f"{guest}: {question}\n{chat.send(question)}\n[{chat.stats}]\n")

    names = [f"steward and {guest}" for guest in GUESTS]
    together, apart = store.bytes_together(*names), sum(store.session(name).bytes for name in names)
    print(f"on disk: {together:,} bytes for the {len(names)} of them; separate copies would take {apart:,}")
