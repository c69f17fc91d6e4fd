"""Conversations with the store, each compared bit for bit with a `DynamicCache` that was fed in the same steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ...cache.cache import AttentionStoreCache
from ...store.store import AttentionStore
from .feeding import Said, difference, feed, generate, greedy, new_cache, positions, recorded, some_ids

FIRST, SECOND, THIRD, NEW = 41, 19, 9, 6
"""Tokens of the first prompt, of the messages after it, and of each answer."""
EDITED_AT = 7
"""Token of the second message that another one takes the place of, in the edited history."""
BLOCK = 16
_ROUNDING = 1e-2
"""How far logits may be from those of plain `generate`, which computes everything at once; relative to the largest.
(Zamba 2's step for a single token is off by 2e-3, and several turns add up.)"""


@dataclass
class Step:
    """One turn, and what it should have done."""

    name: str
    reused: int
    expected: int
    problems: list[str] = field(default_factory=list)
    recomputed: str = ""
    """Why something was not reused, as the package says."""


@dataclass
class Outcome:
    """All turns of one model."""

    granularity: str
    """How exactly a conversation can be taken up: `token`, `checkpoint`, or `none` where nothing was reused."""
    steps: list[Step]

    @property
    def problems(self) -> list[str]:
        """What went wrong, in words."""
        where: dict[str, list[str]] = {}
        for step in self.steps:
            for problem in step.problems:
                where.setdefault(problem, []).append(step.name)
        return [f"{', '.join(dict.fromkeys(names))}: {problem}" for problem, names in where.items()]

    @property
    def unused(self) -> str:
        """Why nothing was ever reused, where that is all that can be said against it; else empty."""
        if any(step.reused or any(p != _reuse_problem(step) for p in step.problems) for step in self.steps):
            return ""
        return next((step.recomputed for step in self.steps if step.recomputed), "nothing was reused")


def _reuse_problem(step: Step) -> str:
    return f"reused {step.reused} tokens instead of {step.expected}"


def by_token(model: Any) -> bool:
    """Whether everything that the model caches belongs to single tokens, so that it can be cut anywhere."""
    return all(_cut_anywhere(layer) for layer in new_cache(model).layers)


def _cut_anywhere(layer: Any) -> bool:
    if type(layer).__name__ == "DummyLayer":
        return True
    return isinstance(layer, DynamicLayer) and not hasattr(layer, "conv_states") and "compress" not in _states(layer)


def _states(layer: Any) -> str:
    return " ".join([type(layer).__name__.lower(), *vars(layer)])


class _Conversation:
    """A conversation in a store, with a record of the forwards that computed its tokens."""

    def __init__(self, model: Any, twin: Any, folder: Path) -> None:
        self.model, self.twin, self.folder = model, twin, folder
        self.made: list[int] = []
        """Lengths of the forwards that computed what is known, from the first token on."""
        self.ends: list[int] = []
        """Token counts at which a checkpoint may lie."""
        self.text = torch.empty(1, 0, dtype=torch.long)
        self.by_token = by_token(model)
        self.reused_any = False

    def cache(self, store: AttentionStore) -> AttentionStoreCache:
        """A cache of the session in which it is kept, that reuses all it can."""
        return AttentionStoreCache(self.model, "talk", store, gate=False)

    def known(self, prompt: torch.Tensor) -> int:
        """How many tokens of a prompt should be reused."""
        longest = min(prompt.shape[1] - 1, self.text.shape[1])
        agreed = int((prompt[0, :longest] == self.text[0, :longest]).int().cumprod(0).sum())
        if self.by_token:
            return agreed
        return max((end for end in self.ends if end <= agreed), default=0)

    def turn(self, name: str, prompt: torch.Tensor, cache: AttentionStoreCache, *, loads: bool) -> tuple[Step, Any]:
        """One `generate` with a cache; checked in every way.

        Args:
            loads: whether what is reused has to come from the store.
        """
        expected = self.known(prompt)
        with recorded(self.model, cache) as fed:
            ours = generate(self.model, prompt, cache, NEW)
        stats = cache.stats
        step = Step(name, stats.reused_tokens, expected, recomputed=stats.recomputed)
        lengths = [ids.shape[1] for ids in fed]
        prefill = lengths[: len(lengths) - (NEW - 1)]
        if step.reused != expected:
            step.problems.append(_reuse_problem(step))
        if stats.prefilled_tokens != prompt.shape[1] - step.reused or sum(prefill) != stats.prefilled_tokens:
            step.problems.append(f"prefilled {sum(prefill)} tokens, says {stats.prefilled_tokens}")
        if loads and bool(stats.loaded_bytes) != bool(step.reused):
            step.problems.append(f"loaded {stats.loaded_bytes} bytes for {step.reused} tokens")
        theirs = self._reference(prompt, step.reused, prefill)
        step.problems += compare(ours, theirs)
        step.problems += against_plain(ours, generate(self.twin, prompt, None, NEW))
        self.reused_any = self.reused_any or step.reused > 0
        self._remember(step.reused, lengths, prompt.shape[1], ours.sequences)
        return step, ours

    def unreferenced_turn(self, name: str, prompt: torch.Tensor, cache: AttentionStoreCache) -> tuple[Step, Any]:
        """One `generate` with a cache, of which nothing is asked but the tokens of plain `generate`."""
        with recorded(self.model, cache) as fed:
            ours = generate(self.model, prompt, cache, NEW)
        reused = cache.stats.reused_tokens
        lengths = [ids.shape[1] for ids in fed]
        step = Step(name, reused, reused, against_plain(ours, generate(self.twin, prompt, None, NEW)))
        if step.problems and self._kept_gives(ours, prompt, reused, lengths[: len(lengths) - (NEW - 1)]):
            step.problems.append("a DynamicCache that is kept gives the same")
        self.reused_any = self.reused_any or reused > 0
        self._remember(reused, lengths, prompt.shape[1], ours.sequences)
        return step, ours

    def _kept_gives(self, ours: Any, prompt: torch.Tensor, reused: int, prefill: Sequence[int]) -> bool:
        try:
            return not compare(ours, self._reference(prompt, reused, prefill))
        except Exception:
            return False

    def _remember(self, reused: int, lengths: Sequence[int], prompt: int, sequences: torch.Tensor) -> None:
        made, at = [], 0
        for length in self.made:
            if at >= reused:
                break
            made.append(length)
            at += length
        if at == reused:  # in an edited history, what is fed next goes on from a part of the last forward
            self.made = [*made, *lengths]
        self.ends = [end for end in self.ends if end <= reused] + [prompt - 1, sequences.shape[1] - 1]
        self.text = sequences[:, :-1]

    def _reference(self, prompt: torch.Tensor, reused: int, prefill: Sequence[int]) -> Said:
        """The turn with a `DynamicCache`, in the same forwards. In a loop: `generate` does not continue every cache
        that is continued correctly."""
        return greedy(self.twin, prompt, self._replayed(reused), reused, prefill, NEW)

    def _replayed(self, reused: int) -> Cache:
        """A `DynamicCache` with so many tokens of the conversation, computed in the forwards that the store's were."""
        cache, at = new_cache(self.twin), 0
        for length in self.made:
            if at >= reused:
                break
            if at + length > reused:
                cache.activate_past_recording()
            ids = self.text[:, at : at + length]
            feed(self.twin, ids, cache, **positions(self.twin, at, length))
            at += length
        if at > reused:
            cache.crop(reused - at)
            for layer in cache.layers:
                if hasattr(layer, "record_past"):
                    layer.record_past = False
        return cache


def compare(ours: Any, theirs: Any) -> list[str]:
    """How the results of two `generate`s differ, bit for bit; empty if they do not."""
    if not torch.equal(ours.sequences, theirs.sequences):
        return ["WRONG TOKENS"]
    for step, (a, b) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        if not torch.equal(a, b):
            return [f"the logits of step {step} differ by {difference(a, b):.1g}"]
    return []


def against_plain(ours: Any, plain: Any) -> list[str]:
    """How a result differs from that of a `generate` without the store, beyond rounding."""
    if not torch.equal(ours.sequences, plain.sequences):
        return ["WRONG TOKENS, other than those of plain generate"]
    off = max(difference(a, b) for a, b in zip(ours.logits, plain.logits, strict=True))
    return [f"logits are off by {off:.1g} from those of plain generate"] if off > _ROUNDING else []


def run_scenarios(model: Any, twin: Any, folder: Path) -> Outcome:
    """Runs all conversations.

    Args:
        model: the store is attached to it.
        twin: a model with the same weights that no store touches.
        folder: an empty one, for stores.
    """
    steps: list[Step] = []
    reused = False
    for play in (_in_process, _across_a_restart, _edited_history, _exact_repeat):
        place = folder / play.__name__.strip("_")
        conversation = _Conversation(model, twin, place)
        steps += play(conversation)
        reused = reused or conversation.reused_any
    granularity = "none" if not reused else "token" if by_token(model) else "checkpoint"
    return Outcome(granularity, steps)


def run_unreferenced(model: Any, twin: Any, folder: Path) -> Outcome:
    """Runs turns of a model that no `DynamicCache` continues: whatever is reused, the tokens must be those of plain
    `generate`. The arguments are those of `run_scenarios`."""
    steps: list[Step] = []
    talk = _Conversation(model, twin, folder / "store")
    prompt = some_ids(FIRST, 11)
    for name, message in (("first turn", SECOND), ("second turn", THIRD), ("after a restart", 0), ("exact repeat", 0)):
        with _opened(talk) as store:
            step, said = talk.unreferenced_turn(name, prompt, talk.cache(store))
        steps.append(step)
        if message:
            prompt = _prompt(said, message, len(steps))
    return Outcome("some" if talk.reused_any else "none", steps)


def _prompt(before: Any, count: int, seed: int) -> torch.Tensor:
    return torch.cat([before.sequences, some_ids(count, seed)], dim=1)


def _opened(talk: _Conversation) -> AttentionStore:
    return AttentionStore(talk.folder, block_size=BLOCK)


def _in_process(talk: _Conversation) -> list[Step]:
    with _opened(talk) as store:
        cache = talk.cache(store)
        one, said = talk.turn("first turn", some_ids(FIRST, 11), cache, loads=True)
        two, said = talk.turn("second turn", _prompt(said, SECOND, 12), cache, loads=False)
        three, _ = talk.turn("third turn", _prompt(said, THIRD, 13), cache, loads=False)
        return [one, two, three]


def _across_a_restart(talk: _Conversation) -> list[Step]:
    with _opened(talk) as store:
        first, said = talk.turn("first turn", some_ids(FIRST, 21), talk.cache(store), loads=True)
    with _opened(talk) as store:
        step, said = talk.turn("after a restart", _prompt(said, SECOND, 22), talk.cache(store), loads=True)
    with _opened(talk) as store:
        again, _ = talk.turn("after another restart", _prompt(said, THIRD, 23), talk.cache(store), loads=True)
    return [first, step, again]


def _edited_history(talk: _Conversation) -> list[Step]:
    with _opened(talk) as store:
        _, said = talk.turn("first turn", some_ids(FIRST, 31), talk.cache(store), loads=True)
        prompt = _prompt(said, SECOND, 32)
        talk.turn("second turn", prompt, talk.cache(store), loads=True)
    edited = prompt.clone()
    edited[:, -SECOND + EDITED_AT :] = some_ids(SECOND - EDITED_AT, 33)
    if edited[0, -SECOND + EDITED_AT] == prompt[0, -SECOND + EDITED_AT]:
        edited[0, -SECOND + EDITED_AT] += 1
    with _opened(talk) as store:
        step, _ = talk.turn("edited history", edited, talk.cache(store), loads=True)
    return [step]


def _exact_repeat(talk: _Conversation) -> list[Step]:
    prompt = some_ids(FIRST, 41)
    with _opened(talk) as store:
        talk.turn("first turn", prompt, talk.cache(store), loads=True)
    with _opened(talk) as store:
        step, _ = talk.turn("exact repeat", prompt, talk.cache(store), loads=True)
    return [step]
