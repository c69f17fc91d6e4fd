#!/usr/bin/env python3
"""Train the small chat model of the examples, from plain text files to a loadable directory.

    python examples/train_small_model.py --text novel.txt plays.txt --minutes 30

Each text is split into a training part and one contiguous held-out slice. A byte-level BPE tokenizer is
trained first, then a Llama of a few million parameters on a mixture of plain windows and of chat windows,
in which successive speakers (plays) or successive paragraphs (novels) become user and assistant turns.

The output directory holds everything ``AutoModelForCausalLM`` and ``AutoTokenizer`` need, ``training.json``
with every figure of the run, and a model card (``README.md``) that is rendered from those figures only.

With ``--minutes`` the learning-rate schedule follows the clock; with ``--steps`` it follows the step count,
and the same command, seed and thread count give the same weights again on the same kind of machine.

On a CPU that is busy with other work as well, set ``OMP_WAIT_POLICY=PASSIVE``: threads that spin while they wait
for one another can make each step several times slower. The weights do not depend on it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import re
import shlex
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, SYSTEM, USER, ASSISTANT, END = (
    "<|pad|>",
    "<|bos|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
)
SPECIAL_TOKENS = [PAD, BOS, SYSTEM, USER, ASSISTANT, END]

# Append-only: a message never changes how an earlier one is rendered, nothing is trimmed, and every turn is
# fenced by special tokens (which BPE cannot merge across). The ids of messages[:k] are therefore a prefix of
# the ids of messages[:k + 1], and attention keys and values computed for a conversation stay usable.
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

SYSTEM_MESSAGES = {
    "play": "You answer as a character in an old play.",
    "novel": "You answer as a voice in an old novel.",
}
HEAD_DIM = 32
KV_HEADS = 2
SHORT_CONTEXT = 256
SPEECH = re.compile(r"^[A-Z][^\n:]{0,40}:\n")


# --------------------------------------------------------------------------------------------- the texts


@dataclass
class Text:
    """One source text, cut into blocks (paragraphs or speeches)."""

    name: str
    kind: str
    train: list[str]
    held_out: list[str]


def clean(raw: str) -> str:
    """Drop the Project Gutenberg header and footer and make the typography plain ASCII quotes."""
    raw = raw.replace("\r\n", "\n").lstrip("\ufeff")
    start = re.search(r"^\*\*\* ?START OF TH.*$", raw, re.MULTILINE)
    end = re.search(r"^\*\*\* ?END OF TH.*$", raw, re.MULTILINE)
    raw = raw[start.end() if start else 0 : end.start() if end else len(raw)]
    # People type straight quotes; with curly ones in the training text their prompts would look foreign.
    return raw.translate(str.maketrans("“”‘’", "\"\"''"))


def read_text(path: Path, held_out_share: float) -> Text:
    """Read a file, recognise plays by their speaker lines, and hold out one contiguous slice."""
    blocks = [block.strip("\n") for block in re.split(r"\n\s*\n", clean(path.read_text(encoding="utf-8")))]
    blocks = [block for block in blocks if block.strip()]
    is_play = sum(bool(SPEECH.match(block)) for block in blocks) > len(blocks) / 2
    if not is_play:
        # A novel's line breaks are those of the printed page; a play's are its verse and are kept.
        blocks = [" ".join(block.split()) for block in blocks]
    total = sum(map(len, blocks))
    # Not the end of the text: books tend to end in a manner of their own (epilogues, appendices).
    low, high = 0.6 * total, (0.6 + held_out_share) * total
    train: list[str] = []
    held_out: list[str] = []
    position = 0
    for block in blocks:
        (held_out if low <= position < high else train).append(block)
        position += len(block)
    if not held_out:
        raise SystemExit(f"{path.name}: too short to hold anything out")
    return Text(path.name, "play" if is_play else "novel", train, held_out)


def turns(text: Text, blocks: list[str]) -> list[str]:
    """What is said in each block: the speech without its speaker in a play, the paragraph in a novel.

    A novel's headings ("CHAPTER I") are left out: nobody answers with one.
    """
    if text.kind == "play":
        return [SPEECH.sub("", block) for block in blocks if SPEECH.match(block)]
    return [block for block in blocks if block != block.upper()]


# ----------------------------------------------------------------------------------------- the tokenizer


def train_tokenizer(texts: list[Text], vocab_size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the training parts and wrap it as a transformers fast tokenizer."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator((block + "\n\n" for text in texts for block in text.train), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


# -------------------------------------------------------------------------------------------- the batches


@dataclass
class Encoded:
    """A part of one text as ids: the running stream, and its turns one by one."""

    kind: str
    stream: np.ndarray
    turns: list[np.ndarray]
    n_bytes: int


def encode(text: Text, blocks: list[str], tokenizer: PreTrainedTokenizerFast, max_turn: int) -> Encoded:
    """Tokenize blocks both as plain text and as chat turns of at most ``max_turn`` tokens."""

    def ids(strings: list[str]) -> list[np.ndarray]:
        encoded = tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]
        return [np.asarray(row, dtype=np.int64) for row in encoded]

    plain = [block + "\n\n" for block in blocks]
    # Endless paragraphs make poor answers (no sampled answer would ever reach its end): plain windows only.
    spoken = [turn for turn in ids(turns(text, blocks)) if 0 < len(turn) <= max_turn]
    if not spoken:
        raise SystemExit(f"{text.name}: no paragraph or speech short enough for a chat turn")
    return Encoded(text.kind, np.concatenate(ids(plain)), spoken, sum(len(b.encode()) for b in plain))


class Windows:
    """Draws training windows, each beginning with ``<|bos|>`` and filled to the last position."""

    def __init__(self, parts: list[Encoded], tokenizer: PreTrainedTokenizerFast, chat_share: float, seed: int) -> None:
        self.parts = parts
        self.weights = [len(part.stream) for part in parts]
        self.chat_share = chat_share
        self.random = random.Random(seed)
        self.ids: dict[str, int] = tokenizer.get_added_vocab()
        self.system = {
            kind: np.asarray(tokenizer(message, add_special_tokens=False)["input_ids"], dtype=np.int64)
            for kind, message in SYSTEM_MESSAGES.items()
        }

    def _turn(self, role: str, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([[self.ids[role]], ids, [self.ids[END]]])

    def plain(self, part: Encoded, length: int) -> np.ndarray:
        """A slice of the running text from anywhere."""
        start = self.random.randrange(max(1, len(part.stream) - length + 2))
        body = part.stream[start : start + length - 1]
        if len(body) < length - 1:  # a text shorter than the window is repeated
            body = np.resize(part.stream, length - 1)
        return np.concatenate([[self.ids[BOS]], body])

    def chat(self, part: Encoded, length: int, start: int | None = None, system: bool | None = None) -> np.ndarray:
        """A conversation made of successive turns, cut at the end of the window."""
        start = self.random.randrange(len(part.turns)) if start is None else start
        system = self.random.random() < 0.5 if system is None else system
        pieces = [np.asarray([self.ids[BOS]])]
        if system:
            pieces.append(self._turn(SYSTEM, self.system[part.kind]))
        filled = sum(map(len, pieces))
        count = 0
        while filled < length:
            turn = part.turns[(start + count) % len(part.turns)]
            pieces.append(self._turn(ASSISTANT if count % 2 else USER, turn))
            filled += len(pieces[-1])
            count += 1
        return np.concatenate(pieces)[:length]

    def batch(self, rows: int, length: int) -> torch.Tensor:
        """A batch of windows, texts in proportion to their size."""
        drawn = []
        for part in self.random.choices(self.parts, self.weights, k=rows):
            make = self.chat if self.random.random() < self.chat_share else self.plain
            drawn.append(make(part, length))
        return torch.from_numpy(np.stack(drawn))


# ---------------------------------------------------------------------------------------------- measuring


def losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy, in nats, of every token after the first of each row."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def plain_nats(
    model: LlamaForCausalLM, stream: np.ndarray, bos: int, context: int, max_windows: int | None = None
) -> tuple[float, int]:
    """Sum of nats and number of tokens over a stream, in windows that do not overlap.

    Every window starts afresh with ``<|bos|>``, so each token of the stream is predicted exactly once.
    """
    model.eval()
    total, count = 0.0, 0
    starts = range(0, len(stream), context - 1)
    for start in list(starts)[:max_windows]:
        ids = np.concatenate([[bos], stream[start : start + context - 1]])
        nats = losses(model, torch.from_numpy(ids)[None].to(model.device))
        total += nats.double().sum().item()
        count += nats.numel()
    model.train()
    return total, count


@torch.no_grad()
def chat_nats(model: LlamaForCausalLM, windows: Windows, part: Encoded, context: int) -> tuple[float, int]:
    """Sum of nats and number of tokens over the turns of a part, laid out as conversations."""
    model.eval()
    total, count = 0.0, 0
    n_tokens = sum(len(turn) + 2 for turn in part.turns)
    n_windows = max(1, n_tokens // context)
    for index in range(n_windows):
        start = index * len(part.turns) // n_windows
        ids = windows.chat(part, context, start=start, system=False)
        nats = losses(model, torch.from_numpy(ids)[None].to(model.device))
        total += nats.double().sum().item()
        count += nats.numel()
    model.train()
    return total, count


def unigram_nats(counts: np.ndarray, stream: np.ndarray) -> float:
    """Nats of a stream under token frequencies alone (add-one smoothing)."""
    smoothed = counts + 1.0
    return float(-np.log(smoothed / smoothed.sum())[stream].sum())


@torch.no_grad()
def make_samples(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, max_tokens: int
) -> list[dict[str, Any]]:
    """Let the finished model speak: two conversations and one continuation, sampled with a fixed seed."""
    conversations: list[list[dict[str, str]]] = [
        [
            {"role": "system", "content": SYSTEM_MESSAGES["play"]},
            {"role": "user", "content": "Good morrow, my lord. What news from the city?"},
        ],
        [
            {"role": "system", "content": SYSTEM_MESSAGES["novel"]},
            {"role": "user", "content": '"And where is the prince now?" asked the old countess.'},
        ],
    ]
    samples: list[dict[str, Any]] = []
    model.eval()
    for messages in conversations:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        samples.append({"messages": messages, **_sample(model, tokenizer, str(rendered), seed, max_tokens)})
    opening = "The snow had fallen all night, and in the morning the soldiers"
    samples.append({"text": opening, **_sample(model, tokenizer, BOS + opening, seed, max_tokens)})
    model.train()
    return samples


def _sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, seed: int, max_tokens: int
) -> dict[str, Any]:
    torch.manual_seed(seed)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_tokens,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[0, ids.shape[1] :]
    ended = bool(out.numel()) and int(out[-1]) == tokenizer.eos_token_id
    return {"answer": tokenizer.decode(out, skip_special_tokens=True), "ended": ended}


# ----------------------------------------------------------------------------------------------- training


def build_model(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A small Llama with grouped-query attention and tied embeddings, freshly initialised."""
    heads = args.hidden_size // HEAD_DIM
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=64 * round(args.hidden_size * 8 / 3 / 64),
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=min(KV_HEADS, heads),
        head_dim=HEAD_DIM,
        tie_word_embeddings=True,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def learning_rate(fraction: float, peak: float, warmup: float = 0.03, floor: float = 0.03) -> float:
    """Linear warmup, then a cosine down to a small share of the peak."""
    if fraction < warmup:
        return peak * max(fraction, 1e-3) / warmup
    progress = min(1.0, (fraction - warmup) / (1 - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: LlamaForCausalLM,
    windows: Windows,
    held_out: list[Encoded],
    args: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """Run the training loop; returns step and token counts, the time and the loss history."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    bos = windows.ids[BOS]
    history: list[dict[str, float]] = []
    step, tokens, running = 0, 0, math.nan
    started = time.monotonic()
    model.train()
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:5.1f}%  step {task.fields[step]}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("train", total=1.0, step=0, loss=math.nan)
        while True:
            elapsed = time.monotonic() - started
            fraction = step / args.steps if args.steps else elapsed / (60 * args.minutes)
            finished = fraction >= 1.0
            if finished or (step and step % args.eval_every == 0):
                sums = [plain_nats(model, part.stream, bos, args.context, 8) for part in held_out]
                loss = sum(s for s, _ in sums) / sum(n for _, n in sums)
                history.append({"step": step, "train_loss": round(running, 4), "held_out_loss": round(loss, 4)})
                progress.console.print(
                    f"step {step:5d}  {elapsed / 60:5.1f} min  train {running:.3f}  held-out {loss:.3f}"
                )
            if finished:
                break
            # Short windows first: attention over them is cheap and most of what is to be learned early is
            # local. The whole context follows, so that every position up to the last has been trained.
            length = min(args.context, SHORT_CONTEXT) if fraction < args.short_share else args.context
            batch = windows.batch(max(1, args.batch_tokens // length), length).to(model.device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(fraction, args.lr)
            mean = losses(model, batch).mean()
            mean.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens += batch.numel()
            running = mean.item() if math.isnan(running) else 0.98 * running + 0.02 * mean.item()
            progress.update(bar, completed=min(1.0, fraction), step=step, loss=running)
        progress.update(bar, completed=1.0)
    seconds = time.monotonic() - started
    return {"steps": step, "tokens_seen": tokens, "minutes": round(seconds / 60, 1), "history": history}


def measure(
    model: LlamaForCausalLM,
    windows: Windows,
    train_parts: list[Encoded],
    held_out: list[Encoded],
    context: int,
) -> dict[str, Any]:
    """All held-out figures: in all, per text, as chat, and for the unigram model on the same tokens."""
    counts = sum(np.bincount(part.stream, minlength=model.config.vocab_size) for part in train_parts)
    assert isinstance(counts, np.ndarray)
    per_text, totals = [], np.zeros(6)
    for part in held_out:
        nats, count = plain_nats(model, part.stream, windows.ids[BOS], context)
        spoken, spoken_count = chat_nats(model, windows, part, context)
        row = np.array([nats, count, part.n_bytes, unigram_nats(counts, part.stream), spoken, spoken_count])
        totals += row
        per_text.append(_figures(row))
    return {"held_out": _figures(totals), "per_text": per_text, "unigram_counts": counts.tolist()}


def _figures(row: np.ndarray) -> dict[str, float]:
    nats, count, n_bytes, unigram, spoken, spoken_count = row.tolist()
    return {
        "tokens": int(count),
        "bytes": int(n_bytes),
        "loss": round(nats / count, 4),
        "perplexity": round(math.exp(nats / count), 2),
        "bits_per_byte": round(nats / math.log(2) / n_bytes, 4),
        "perplexity_per_byte": round(math.exp(nats / n_bytes), 3),
        "unigram_perplexity": round(math.exp(unigram / count), 2),
        "chat_loss": round(spoken / spoken_count, 4),
        "chat_perplexity": round(math.exp(spoken / spoken_count), 2),
    }


# ----------------------------------------------------------------------------------------------- the card


def render_card(run: dict[str, Any]) -> str:
    """The model card, from nothing but the figures in ``training.json``."""
    model, held = run["model"], run["held_out"]
    names = [source["name"] for source in run["sources"]]
    columns = ("tokens", "loss", "perplexity", "bits_per_byte", "unigram_perplexity", "chat_perplexity")
    rows = "\n".join(
        f"| {name} | " + " | ".join(str(figures[column]) for column in columns) + " |"
        for name, figures in zip([*names, "**all**"], [*run["per_text"], held], strict=True)
    )
    sources = "\n".join(
        f"- {source['name']} (`{source['file']}`, read as a {source['kind']}, "
        f"{source['train_bytes']} bytes for training, {source['held_out_bytes']} held out)"
        for source in run["sources"]
    )
    samples = "\n\n".join(_render_sample(sample) for sample in run["samples"])
    system = " and ".join(f'"{message}"' for message in SYSTEM_MESSAGES.values())
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    prose = {
        "intro": f"""
        A Llama of {model["parameters"]} parameters. It exists so that the examples and the tests have a model
        that was really trained, loads in a moment and runs on any CPU. `examples/train_small_model.py`
        trained it from nothing and wrote this card; every figure of the run is read from `training.json` in
        this directory.""",
        "template": f"""
        The tokenizer puts `<|bos|>` before a text. A conversation is rendered as
        `<|bos|><|system|>…<|end|><|user|>…<|end|><|assistant|>…<|end|>`; the system message is optional. The
        chat template only ever appends: the ids of a conversation's beginning are a prefix of the ids of the
        whole, so its keys and values can be kept. An answer ends with `<|end|>`. The system messages known
        from training are {system}""",
        "data": f"""
        Headers and footers of the files were removed, curly quotes made straight, and a novel's paragraphs
        put on one line each. From each text one contiguous slice ({run["held_out_share"]:.0%} of it,
        beginning at 60%) was held out from the tokenizer and from the model. {run["chat_share"]:.0%} of the
        training windows are laid out as chat (successive speeches of a play, successive paragraphs of a
        novel, alternately as user and assistant), the others are plain text.""",
        "training": f"""
        {run["steps"]} steps of {run["batch_tokens"]} tokens, {run["tokens_seen"]} tokens in all, in
        {run["minutes"]} minutes on {run["machine"]} with {run["threads"]} threads. AdamW with a peak learning
        rate of {run["lr"]:g}, warmup and cosine; windows of {min(SHORT_CONTEXT, model["context"])} tokens for
        the first {run["short_share"]:.0%} of the run, of {model["context"]} tokens after that. Seed
        {run["seed"]}; {versions}.""",
        "reproduction": f"""
        The schedule follows the step count, so the command gives these weights again on the same kind of
        machine with the same versions (sha256 of `model.safetensors`: `{run["weights_sha256"]}`)."""
        if run["reproducible"]
        else f"""
        The schedule followed the clock. `--steps {run["steps"]}` in place of `--minutes` gives the same
        number of steps, and weights that are close to these but not the same.""",
        "results": f"""
        Over all held-out text the loss is {held["loss"]} nats per token: a perplexity of
        {held["perplexity"]} per token and of {held["perplexity_per_byte"]} per byte, or
        {held["bits_per_byte"]} bits per byte. The unigram model, which knows only how often each token occurs
        in the training text, has a perplexity of {held["unigram_perplexity"]} on the same tokens. Measured in
        windows of {model["context"]} tokens that do not overlap, each beginning with `<|bos|>`.""",
        "limits": """
        It is not clever. It has learned spelling, common phrases, punctuation, turn-taking and the tone of
        its sources. It knows no facts, does not follow instructions and loses the thread within a sentence or
        two. What it says about persons, peoples and history is an echo of old books. Use it to exercise
        software, not to learn anything.""",
    }
    text = {
        name: textwrap.fill(" ".join(words.split()), 110, break_long_words=False, break_on_hyphens=False)
        for name, words in prose.items()
    }
    return f"""\
---
language: en
library_name: transformers
pipeline_tag: text-generation
---

# A small chat model for the examples

{text["intro"]}

## Architecture

| | |
|---|---|
| class | `LlamaForCausalLM`, float32, tied embeddings |
| parameters | {model["parameters"]} (`model.safetensors`: {model["weights_bytes"]} bytes) |
| layers | {model["layers"]} |
| hidden and intermediate size | {model["hidden_size"]} and {model["intermediate_size"]} |
| attention | {model["heads"]} heads, {model["kv_heads"]} key/value heads, of dimension {model["head_dim"]} |
| context | {model["context"]} tokens, rotary positions, theta {model["rope_theta"]:g} |
| tokenizer | byte-level BPE, {model["vocab_size"]} entries, trained on the same texts |

{text["template"]}

## Data

{sources}

{text["data"]}

## Training

With the texts in the current directory:

```
{run["command"]}
```

{text["training"]}

{text["reproduction"]}

## Held-out results

| text | tokens | nats per token | perplexity | bits per byte | unigram perplexity | perplexity as chat |
|---|---|---|---|---|---|---|
{rows}

{text["results"]}

## Samples

Sampled once by the script (temperature 0.7, top-p 0.9, at most {run["sample_tokens"]} tokens), not chosen:

{samples}

## Limits

{text["limits"]}
"""


def _render_sample(sample: dict[str, Any]) -> str:
    lines: list[str] = []
    if "text" in sample:
        lines.append(f"{sample['text']}[…]{sample['answer']}")
    else:
        lines += [f"{message['role']}: {message['content']}" for message in sample["messages"]]
        lines.append(f"assistant: {sample['answer']}{' <|end|>' if sample['ended'] else ' […]'}")
    return "```\n" + "\n".join(lines) + "\n```"


# --------------------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the small chat model of the examples.")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="UTF-8 texts: novels or plays")
    parser.add_argument("--source", nargs="+", metavar="NAME", help="each text's name and licence, for the card")
    parser.add_argument("--output", type=Path, default=Path("examples/small-model"))
    parser.add_argument("--minutes", type=float, default=30.0, help="wall-clock budget of the training loop")
    parser.add_argument("--steps", type=int, help="number of steps, instead of --minutes; reproducible")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; they affect rounding")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--machine", help="the machine in words, for the card")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=192, help=f"a multiple of {HEAD_DIM}")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--short-share", type=float, default=0.6, help="share of the run in short windows")
    parser.add_argument("--chat-share", type=float, default=0.4, help="share of windows laid out as chat")
    parser.add_argument("--max-turn", type=int, default=160, help="tokens of the longest chat turn")
    parser.add_argument("--held-out", type=float, default=0.03, help="share of each text not trained on")
    parser.add_argument("--eval-every", type=int, default=250)
    parser.add_argument("--sample-tokens", type=int, default=80, help="longest sample in the card")
    parser.add_argument("--card-only", action="store_true", help="write the card again from training.json")
    args = parser.parse_args(argv)
    if not args.card_only and not args.text:
        parser.error("--text is required")
    if args.source and len(args.source) != len(args.text):
        parser.error("--source needs one name for each --text")
    if args.hidden_size % HEAD_DIM or (args.hidden_size // HEAD_DIM) % KV_HEADS:
        parser.error(f"--hidden-size must be a multiple of {HEAD_DIM * KV_HEADS}")
    if args.minutes <= 0 or (args.steps is not None and args.steps < 1):
        parser.error("--minutes and --steps must be positive")
    return args


def command_line(args: argparse.Namespace) -> str:
    """The command that repeats a run, with file names in place of paths and without defaults."""
    defaults = vars(parse_arguments(["--text", "x"]))
    words = ["python", "examples/train_small_model.py", "--text", *(path.name for path in args.text)]
    # What goes only into the card is left out, and so is where this one run happened to be written.
    elsewhere = {
        "text",
        "source",
        "machine",
        "output",
        "card_only",
        "sample_tokens",
        "steps",
        "minutes",
        "seed",
    }
    for name in sorted(set(defaults) - elsewhere):
        if getattr(args, name) != defaults[name]:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    words += ["--steps", str(args.steps)] if args.steps else ["--minutes", f"{args.minutes:g}"]
    return shlex.join([*words, "--seed", str(args.seed)])


def main(argv: list[str] | None = None) -> None:
    """Train, measure, and write the output directory."""
    args = parse_arguments(argv)
    console = Console()
    if args.card_only:
        run = json.loads((args.output / "training.json").read_text(encoding="utf-8"))
        (args.output / "README.md").write_text(render_card(run), encoding="utf-8")
        return
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    texts = [read_text(path, args.held_out) for path in args.text]
    tokenizer = train_tokenizer(texts, args.vocab_size, args.context)
    max_turn = min(args.max_turn, args.context // 2)
    train_parts = [encode(text, text.train, tokenizer, max_turn) for text in texts]
    held_out = [encode(text, text.held_out, tokenizer, max_turn) for text in texts]
    windows = Windows(train_parts, tokenizer, args.chat_share, args.seed)
    model = build_model(args, tokenizer).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    for text, part, held in zip(texts, train_parts, held_out, strict=True):
        console.print(
            f"{text.name}: a {text.kind}, {len(part.stream)} tokens and {len(part.turns)} turns to train on, "
            f"{len(held.stream)} tokens held out, {part.n_bytes / len(part.stream):.2f} bytes per token"
        )
    console.print(f"{parameters} parameters, {args.threads} threads, device {args.device}")

    progress = train(model, windows, held_out, args, console)
    measured = measure(model, windows, train_parts, held_out, args.context)

    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    weights = (args.output / "model.safetensors").read_bytes()
    config = model.config
    run = {
        "command": command_line(args),
        "reproducible": args.steps is not None and args.device == "cpu",
        **progress,
        "seed": args.seed,
        "threads": args.threads,
        "machine": args.machine or (f"{args.threads} CPU threads" if args.device == "cpu" else args.device),
        "batch_tokens": args.batch_tokens,
        "lr": args.lr,
        "short_share": args.short_share,
        "chat_share": args.chat_share,
        "held_out_share": args.held_out,
        "sample_tokens": args.sample_tokens,
        "model": {
            "parameters": parameters,
            "weights_bytes": len(weights),
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "context": args.context,
            "rope_theta": config.rope_parameters["rope_theta"],
            "vocab_size": config.vocab_size,
        },
        "sources": [
            {
                "name": (args.source or [t.name for t in texts])[index],
                "file": text.name,
                "kind": text.kind,
                "train_bytes": train_parts[index].n_bytes,
                "held_out_bytes": held_out[index].n_bytes,
            }
            for index, text in enumerate(texts)
        ],
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        **{key: measured[key] for key in ("held_out", "per_text")},
        "samples": make_samples(model, tokenizer, args.seed, args.sample_tokens),
        "unigram_counts": measured["unigram_counts"],
    }
    dumped = json.dumps({**run, "unigram_counts": None}, indent=1, ensure_ascii=False)
    # Indenting thousands of counts would put each on a line of its own.
    counts = json.dumps(run["unigram_counts"])
    dumped = dumped.replace('"unigram_counts": null', f'"unigram_counts": {counts}')
    (args.output / "training.json").write_text(dumped + "\n", encoding="utf-8")
    (args.output / "README.md").write_text(render_card(run), encoding="utf-8")
    console.print(f"held-out perplexity {run['held_out']['perplexity']}, written to {args.output}")


if __name__ == "__main__":
    main()
