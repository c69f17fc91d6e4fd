"""What the user says in the demonstration: a chapter of a book and questions about it; for small windows, a scene."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CHAPTER = Path(__file__).with_name("alice.txt")
"""Lewis Carroll, Alice's Adventures in Wonderland (1865), chapter I: in the public domain."""
BOOKMARK = "However, this bottle was not marked"
"""Where the reader goes on the next day."""


@dataclass(frozen=True)
class Script:
    """A conversation.

    Args:
        answer_tokens: the longest answer.
        one_sentence: whether an answer ends with its first sentence: very small models begin to repeat themselves.
        repeats: how often each turn is measured, unless somebody says so.
    """

    system: str
    messages: tuple[str, ...]
    answer_tokens: int
    repeats: int
    one_sentence: bool = False


def reading() -> Script:
    """Eight turns over the chapter, the last four of them on the next day, with what was read since."""
    evening, found, rest = CHAPTER.read_text(encoding="utf-8").partition(BOOKMARK)
    assert found
    messages = (
        f"I am reading a book. This is how far I came:\n\n{evening.strip()}\n\nWhom does Alice follow down the hole?",
        "What did Alice see on the sides of the well while she fell?",
        "Who is Dinah?",
        "What was on the little glass table, and what did Alice want to do with it?",
        f"Good morning! I read on:\n\n{BOOKMARK}{rest.rstrip()}\n\nWhat happened when Alice drank from the bottle?",
        "Why could she not go into the garden then?",
        "What was written on the cake?",
        "Sum up the whole chapter in one sentence, for somebody who has not read it.",
    )
    system = "You answer questions about a book in one short sentence."
    return Script(system, messages, answer_tokens=32, repeats=1, one_sentence=True)


OPENING = (
    "Let me tell you how matters stood on the evening of which I wish to speak. The rain had fallen since noon, and "
    "the road before the old house was so deep in mud that the carriage of the princess was an hour late. In the "
    "drawing room the candles were already lit. The old count sat by the fire with a letter in his hand, which he "
    "had read three times and had not yet understood. His daughter stood at the window and looked out into the dark "
    "garden, where the wind bent the trees, and she said nothing. Her brother, a young officer who had come from "
    "the army that morning, walked up and down the room with quick steps, as men do who have made up their minds "
    "and are afraid to say so. Two guests played cards at the small table near the door, and they did not look at "
    "the cards. Everyone in the house knew that the French had crossed the river, that the regiment was to march at "
    "dawn, and that the letter came from the commander in chief himself; but no one wished to be the first to speak "
    "of it. At last the count folded the paper, put it into his pocket, took off his spectacles and looked round at "
    "his family and at his guests with tears in his eyes. What did he say to them?"
)

QUESTIONS = (
    "And the young officer, when he heard these words, did he answer his father, or did he leave the room in silence?",
    "At that moment the door was opened and the princess came in, wet from the rain. How did the countess receive her?",
    "Tell me what the daughter was thinking of while she stood at the window and looked out into the dark garden.",
    "Late in the night, when the candles burned low, the two guests spoke. What did the older man say of the war?",
    "In the morning the regiment stood before the house. What did the old count say to his son at the door?",
    "They marched all day along the road to the river. Tell me what the soldiers saw from the top of the hill.",
    "When the battle was over and the smoke had gone up from the field, whom did the young officer look for first?",
    "A letter came to the old house at the end of that week. Who opened it, and what was written in it?",
    "So tell me, for the last time, what became of the family after the war, and who lived on in the old house?",
)

EVENING = Script("You answer as a voice in an old novel.", (OPENING, *QUESTIONS), answer_tokens=48, repeats=3)
"""Ten turns that fit into a window of 1,024 tokens."""


def scripts() -> tuple[Script, ...]:
    """All of them, the longest first."""
    return (reading(), EVENING)
