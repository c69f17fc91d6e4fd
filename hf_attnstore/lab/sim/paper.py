"""The workload, the models and the machines of the CachedAttention paper (USENIX ATC 2024, section 4.1).

What the paper leaves open is a parameter here: the gap between the turns of a session, and what distributions the turn
counts and lengths of its 9,000 ShareGPT sessions have, of which it states the moments in `PUBLISHED`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .machine import Accelerator, Model
from .workload import Conversation, Turn, Workload

GB = 10**9

PUBLISHED = {"turns": 5.75, "multi": 0.73, "over_2k": 0.47, "over_4k": 0.30}
"""Mean turns of a session, shares of sessions with several turns, and with more than 2,048 and 4,096 tokens."""

SESSIONS = 9_000
ARRIVALS = 1.0
"""Sessions a second."""
WARM_UP = 10_000
"""Turns that are not counted."""
BATCH = 24
BLOCK = 1024
"""Tokens of a block. What is left of a conversation is a short one: smaller blocks find the same, and take longer."""
MEMORY = 128 * GB
DISK = 10_000 * GB
DISKS = (2_000 * GB, 5_000 * GB, 10_000 * GB)

A100 = Accelerator("A100-80G", flops=312e12, bandwidth=2.04e12)


@dataclass(frozen=True)
class Setting:
    """A model as the paper ran it, and what it says of it.

    Attributes:
        window: tokens.
        hit_rate, ttft_cut: shares.
        prefill, gpu_time: how many times as good as recomputing.
    """

    model: Model
    window: int
    hit_rate: float
    ttft_cut: float
    prefill: float
    gpu_time: float


SETTINGS = (
    Setting(Model("LLaMA-2 13B", 13.0e9, 40, 5120, 819_200, A100, 2), 4096, 0.86, 0.85, 6.8, 4.0),
    Setting(Model("LLaMA-1 65B", 65.2e9, 80, 8192, 2_621_440, A100, 4), 2048, 0.71, 0.61, 2.6, 1.9),
    Setting(Model("LLaMA-2 70B", 69.0e9, 80, 8192, 327_680, A100, 4), 4096, 0.89, 0.87, 7.8, 3.3),
    Setting(Model("Falcon-40B", 41.3e9, 60, 8192, 122_880, A100, 4), 4096, 0.90, 0.86, 7.2, 3.4),
)

# Fitted to PUBLISHED: lognormal, with one factor for all turns of a session, which is long or short as a whole.
_TURNS_MEAN, _TURNS_SPREAD, _TURNS_MOST = 6.05, 1.05, 98
_QUESTION, _QUESTION_SPREAD, _QUESTION_MOST = 75, 1.3, 8192
_ANSWER, _ANSWER_SPREAD, _ANSWER_MOST = 300, 0.8, 2048
_SESSION_SPREAD = 1.1


def paper_workload(
    sessions: int = SESSIONS, *, arrivals: float = ARRIVALS, gap: float = 30.0, seed: int = 0
) -> Workload:
    """Sessions whose turns and lengths are distributed as those of the paper's.

    Args:
        arrivals: sessions a second (a Poisson process).
        gap: mean seconds from an answer to the session's next turn, exponentially distributed; the paper does not say.
        seed: equal seeds give equal workloads.
    """
    random = np.random.default_rng(seed)
    starts = np.cumsum(random.exponential(1 / arrivals, sessions))
    more = random.lognormal(math.log(_TURNS_MEAN) - _TURNS_SPREAD**2 / 2, _TURNS_SPREAD, sessions)
    several = 2 + np.minimum(more.astype(int), _TURNS_MOST)
    counts = np.where(random.random(sessions) < PUBLISHED["multi"], several, 1)
    scale = np.repeat(random.lognormal(0, _SESSION_SPREAD, sessions), counts)
    total = int(counts.sum())
    questions = np.clip(random.lognormal(math.log(_QUESTION), _QUESTION_SPREAD, total) * scale, 1, _QUESTION_MOST)
    answers = np.clip(random.lognormal(math.log(_ANSWER), _ANSWER_SPREAD, total) * scale, 1, _ANSWER_MOST)
    gaps = random.exponential(gap, total) if gap > 0 else np.zeros(total)
    turns = list(map(Turn, questions.astype(int).tolist(), answers.astype(int).tolist(), gaps.tolist()))
    ends = np.cumsum(counts).tolist()
    conversations = [
        Conversation(number, start, turns[end - count : end])
        for number, (start, end, count) in enumerate(zip(starts.tolist(), ends, counts.tolist(), strict=True))
    ]
    return Workload(f"{sessions:,} sessions, {arrivals:g}/s, gap {gap:g} s", conversations, facts=facts(conversations))


def facts(conversations: list[Conversation]) -> dict[str, float]:
    """What the paper publishes of its sessions, of these."""
    lengths = [sum(turn.new + turn.output for turn in c.turns) for c in conversations]
    count = max(1, len(conversations))
    return {
        "turns": sum(len(c.turns) for c in conversations) / count,
        "multi": sum(len(c.turns) > 1 for c in conversations) / count,
        "over_2k": sum(length > 2048 for length in lengths) / count,
        "over_4k": sum(length > 4096 for length in lengths) / count,
    }
