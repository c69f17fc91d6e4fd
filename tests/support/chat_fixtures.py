"""A tiny tokenizer with a chat template and a tiny random model: for the tests of chat, command line and demo."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEXT = [
    "the old prince looked at the letter and said nothing to the others in the room",
    "then the other officer answered that they were to march at the hour of three",
    "and the mother of the young man rose, and there was nothing more that she could say",
]

APPEND_ONLY = (
    "{%- for m in messages -%}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
# Like templates that drop reasoning: once a newer message follows, only the first half of an answer is shown.
FORGETFUL = (
    "{%- for m in messages -%}"
    "{%- set text = m['content'][:(m['content'] | length) // 2] if m['role'] == 'assistant' else m['content'] -%}"
    "{{ '<|' + m['role'] + '|>' + text + '<|end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
# Like Llama 3's and Gemma's: what a message begins and ends with is not text of the template.
TRIMMING = APPEND_ONLY.replace("m['content']", "(m['content'] | trim)")
NO_SYSTEM = (
    "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system role here') }}{%- endif -%}" + APPEND_ONLY
)


def tiny_tokenizer(
    template: str | None = APPEND_ONLY, *, vocabulary: int = 160, all_bytes: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE; of ASCII characters only, unless `all_bytes`, so that any ids are valid text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if all_bytes else [*string.ascii_letters, *".,:;!?'", "Ġ", "Ċ"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary + (200 if all_bytes else 0),
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=SPECIAL[1:4],
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(
    tokenizer: PreTrainedTokenizerFast, *, window: int = 512, seed: int = 0, layers: int = 2, **config: Any
) -> LlamaForCausalLM:
    """A random Llama of few layers in float32, which never says a special token of itself."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=window,
            initializer_range=0.2,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    ).eval()
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=tokenizer.convert_tokens_to_ids(SPECIAL),
    )
    return model


class Says(LogitsProcessor):
    """Leaves the model one token to say at each step."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(scores, -torch.inf)
        scores[:, self.tokens.pop(0)] = 0.0
        return scores


def saying(tokens: list[int]) -> dict[str, Any]:
    """Arguments for a `generate` that answers with `tokens`."""
    return {"logits_processor": LogitsProcessorList([Says(tokens)]), "max_new_tokens": len(tokens)}


def save_tiny_chat_model(path: Path, *, window: int = 512, template: str | None = APPEND_ONLY) -> Path:
    """The tiny model and tokenizer as a folder that `from_pretrained` reads."""
    tokenizer = tiny_tokenizer(template)
    tiny_model(tokenizer, window=window).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def plain_answer(model: LlamaForCausalLM, ids: list[int], **kwargs: Any) -> list[int]:
    """What plain `generate` answers to the prompt `ids`."""
    prompt = torch.tensor([ids])
    output: Any = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **kwargs)
    return output[0, len(ids) :].tolist()
