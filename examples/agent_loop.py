#!/usr/bin/env python3
"""An agent with two tools: every step appends a little to a long prompt, and only that little is computed.

python examples/agent_loop.py [--model Qwen/Qwen3-0.6B] [--store DIR] [--no-scripted]

Tools and loop are real. A small model calls no tools of itself, so without --model the two calls are scripted: fed to
it token by token, as if it had chosen them. Its other answers are its own, such as they are, and what is reused and
what is computed is what it would be with a clever model.
"""

import argparse
import ast
import json
import operator
import re
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attnstore import AttentionStore, ChatSession, model_source

HERE = Path(__file__).resolve().parent
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="")
parser.add_argument("--store", help="the store's directory; without it, attnstore in the Hugging Face home")
parser.add_argument("--scripted", action=argparse.BooleanOptionalAction, help="default: only without --model")
args = parser.parse_args()


def list_files(folder: str) -> str:
    """Lists the files of a folder with their sizes in bytes.

    Args:
        folder: A folder of the examples, such as "small-model".
    """
    place = (HERE / folder).resolve()
    if not place.is_relative_to(HERE):
        raise ValueError("only folders of the examples can be listed")
    return "\n".join(f"{file.name} {file.stat().st_size}" for file in sorted(place.iterdir()) if file.is_file())


def calculate(expression: str) -> str:
    """Calculates with numbers and + - * /.

    Args:
        expression: What to calculate, such as "(3 + 4) / 2".
    """
    signs = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.BinOp):
            return signs[type(node.op)](value(node.left), value(node.right))
        return float(ast.literal_eval(node))

    return f"{value(ast.parse(expression, mode='eval').body):g}"


TOOLS = {"list_files": list_files, "calculate": calculate}
TASK = "How many bytes does the small model take for each of its 2755008 parameters?"
CALLS = [
    '<tool_call>{"name": "list_files", "arguments": {"folder": "small-model"}}</tool_call>',
    '<tool_call>{"name": "calculate", "arguments": {"expression": "11026008 / 2755008"}}</tool_call>',
]

source = model_source(args.model)
model = AutoModelForCausalLM.from_pretrained(source, device_map="auto")
tokenizer = AutoTokenizer.from_pretrained(source)
script = CALLS if args.scripted or (args.scripted is None and not args.model) else []
has_tools = "tools" in str(tokenizer.chat_template)  # else the system message tells of them
options = {"template_kwargs": {"tools": list(TOOLS.values())} if has_tools else {}}
options["max_new_tokens"] = 40 if script else 500
system = "You answer questions with the help of tools." + ("" if has_tools else f" Call them like this: {CALLS[1]}")


def say(chat: ChatSession, text: str, role: str = "user") -> str:
    """One step: something is appended, the model answers, and what that took is printed."""
    forced = {}
    if script:
        ids = [*tokenizer.encode(script.pop(0), add_special_tokens=False), tokenizer.eos_token_id]
        start = len(chat.prompt_ids(text, role))
        forced = {"prefix_allowed_tokens_fn": lambda _, known: [ids[len(known) - start]], "max_new_tokens": len(ids)}
    answer = chat.send(text, role=role, **forced)
    print(f"{role}: {text}\nassistant: {answer}\n[{chat.stats}]\n")
    return answer


def use_tool(call: str) -> str:
    """What a tool gives, or what went wrong: that too is for the model to read."""
    try:
        wanted = json.loads(call)
        return TOOLS[wanted["name"]](**wanted["arguments"])
    except Exception as error:
        return f"{type(error).__name__}: {error}"


with AttentionStore(args.store) as store:
    name = time.strftime("agent of %Y-%m-%d %H:%M:%S")
    agent = ChatSession(model, tokenizer, store, name, system=system, **options)
    answer = say(agent, TASK)
    while call := re.search(r"<tool_call>(.*?)</tool_call>", answer, re.DOTALL):
        result = use_tool(call[1])
        if has_tools:
            answer = say(agent, result, role="tool")
        else:
            answer = say(agent, f"<tool_response>\n{result}\n</tool_response>")

    for number, wish in enumerate(("Say it in one sentence.", "Say it to a child."), 1):
        store.fork(name, f"{name}, branch {number}")  # no KV is copied, and none is computed again
        print(f"branch {number}")
        say(ChatSession(model, tokenizer, store, f"{name}, branch {number}", **options), wish)
