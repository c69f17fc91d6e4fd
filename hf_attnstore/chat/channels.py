"""What a model generated, as the message that a chat template expects.

Most templates take an answer as the text that it was, and cut the reasoning out themselves. Those of models that
speak in channels (gpt-oss) want the channels apart: their marks are special tokens, which a message's text has not.
"""

from __future__ import annotations

import re

CHANNEL, MESSAGE = "<|channel|>", "<|message|>"
_PARTS = re.compile(
    r"<\|channel\|>([^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>"  # which channel
    r"(.*?)(?=<\|(?:start|end|return|call|channel)\|>|\Z)",  # what it says, as far as it came
    re.DOTALL,
)


def answer_content(text: str, plain: str) -> dict[str, str]:
    """The `content` of an answer: its text, or what its final channel says, and as `thinking` what the others say.

    Args:
        text: the answer with its special tokens.
        plain: the answer without them.
    """
    if CHANNEL not in text or MESSAGE not in text or CHANNEL in plain:  # in `plain`: somebody writes about channels
        return {"content": plain}
    parts = [(channel.strip().split(" ")[0], said) for channel, said in _PARTS.findall(text)]
    message = {"content": "".join(said for channel, said in parts if channel == "final")}
    thinking = "\n".join(said for channel, said in parts if channel != "final")
    return {**message, "thinking": thinking} if thinking else message
