"""One turn of the demonstration, measured in a process of its own.

With and without the store are measured in this one process, in turn, so that the machine's moods meet both
alike. A turn with the store changes the store, so its repeats run on copies of it that were made before.
Excluded on both sides: loading the model, and a small generation on other tokens that takes first-use costs
away.
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...cache import detach
from ...cache.identity.fingerprint import Fingerprint
from ...chat.model import load_chat_model
from ...chat.session import ChatSession
from ...chat.timed import GenerateRun, timed_generate
from ...errors import AttentionStoreError
from ...store import AttentionStore
from .kept import KeptTask, run_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SESSION = "demo"
WARM_UP_TOKENS = 32


@dataclass(frozen=True)
class TurnTask:
    """What a turn's process is asked to do. `store` is a store's directory; copies of it are made in
    `scratch`.
    """

    model: str
    store: str
    scratch: str
    system: str
    message: str
    max_new_tokens: int
    repeats: int
    store_first: bool
    stop_strings: list[str] | None = None
    device: str | None = None
    dtype: str = "auto"


@dataclass
class TurnResult:
    """What a turn was. Times in seconds, one per repeat; the first one with the store is that of the real
    turn.
    """

    history_tokens: int
    prompt_tokens: int
    reused_tokens: int
    prefilled_tokens: int
    loaded_bytes: int
    recomputed: str
    answer: str
    answer_tokens: int
    same_tokens: bool
    """Whether the answer is that of `reference`, in every repeat."""
    first_difference: int | None
    ttft_with: list[float]
    ttft_without: list[float]
    identify_seconds: float
    parameters: int
    dtype: str
    device: str
    as_plain: bool = True
    """Whether it is that of plain generate, which in 16 bits is not what it is compared with."""
    same_with_store: bool = True
    """Whether all repeats with the store gave the same."""
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)

    @property
    def exact(self) -> bool:
        """Whether the dtype has so many bits that prefilling in parts changes no token."""
        return self.dtype in ("float32", "float64")

    @property
    def reference(self) -> str:
        """What the answer is compared with, in words."""
        return "plain generate" if self.exact else "a cache kept in memory"

    def compare(self, kept: list[int]) -> None:
        """Has `same_tokens` say whether the answer is that of a kept cache."""
        if self.same_with_store:
            self.first_difference = first_difference(kept, [self.answer_ids])
            self.same_tokens = self.first_difference is None


@dataclass
class _Runs:
    """The answers' ids and the times of one side."""

    answers: list[list[int]] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)

    def add(self, ids: list[int], ttft: float | None) -> None:
        if ttft is None:
            raise AttentionStoreError("the model answered with no token at all")
        self.answers.append(ids)
        self.ttft.append(ttft)


def main(task_file: Path, result_file: Path) -> None:
    """Runs the task in `task_file` and writes a `TurnResult`, the answers of a `KeptTask`, or `{"error": …}` to
    `result_file`; both are JSON.
    """
    task = json.loads(task_file.read_text())
    try:
        result: dict[str, Any] = (
            {"answers": run_kept(KeptTask(**task))} if "prompts" in task else asdict(run_turn(TurnTask(**task)))
        )
    except AttentionStoreError as error:
        result = {"error": str(error)}
    result_file.write_text(json.dumps(result))


def run_turn(task: TurnTask) -> TurnResult:
    """The turn with the store and without, `task.repeats` times each, alternating."""
    model, tokenizer = load_chat_model(task.model, device=task.device, dtype=task.dtype)
    _warm_up(model, tokenizer, task)
    stores = [Path(task.store), *_copies(Path(task.store), Path(task.scratch), task.repeats)]
    spare = stores.pop()
    history, prompt = _prompt(model, tokenizer, spare, task)
    shutil.rmtree(spare)

    with_store, without = _Runs(), _Runs()
    turns: list[ChatSession] = []

    def run_with(path: Path) -> None:
        with AttentionStore(path) as store:
            chat = _chat(model, tokenizer, store, task)
            gc.collect()
            chat.send(task.message)
            assert chat.stats is not None
            with_store.add(chat.token_ids[len(prompt) :], chat.stats.ttft_seconds)
            turns.append(chat)
            store.flush()

    def run_without() -> None:
        detach(model)
        run = GenerateRun()
        gc.collect()
        timed_generate(
            model,
            tokenizer,
            prompt,
            run,
            **_settings(tokenizer, task),
        )
        without.add(run.ids, run.ttft_seconds)

    for path in stores:
        if task.store_first:
            run_with(path)
            run_without()
        else:
            run_without()
            run_with(path)
    for copy in stores[1:]:
        shutil.rmtree(copy)

    turn = turns[0].stats
    assert turn is not None
    difference = first_difference(without.answers[0], [*with_store.answers, *without.answers[1:]])
    repeated = first_difference(with_store.answers[0], with_store.answers[1:])
    return TurnResult(
        history_tokens=history,
        prompt_tokens=turn.prompt_tokens,
        reused_tokens=turn.reused_tokens,
        prefilled_tokens=turn.prefilled_tokens,
        loaded_bytes=turn.cache.loaded_bytes,
        recomputed=turn.cache.recomputed,
        answer=turns[0].history[-1]["content"],
        answer_tokens=turn.generated_tokens,
        same_tokens=difference is None,
        first_difference=difference,
        ttft_with=with_store.ttft,
        ttft_without=without.ttft,
        identify_seconds=_identify_seconds(model),
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        as_plain=difference is None,
        prompt_ids=prompt,
        answer_ids=with_store.answers[0],
        same_with_store=repeated is None,
    )


def first_difference(expected: Sequence[int], answers: Sequence[Sequence[int]]) -> int | None:
    """The first position at which any of `answers` is not `expected`; `None` if all are the same."""
    found = [
        next(
            (i for i, (a, b) in enumerate(zip(expected, answer, strict=False)) if a != b),
            min(len(expected), len(answer)),
        )
        for answer in answers
        if list(answer) != list(expected)
    ]
    return min(found, default=None)


def _chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store: AttentionStore, task: TurnTask
) -> ChatSession:
    return ChatSession(
        model,
        tokenizer,
        store,
        SESSION,
        system=task.system,
        template_kwargs={"enable_thinking": False},
        **_settings(tokenizer, task),
    )


def _settings(tokenizer: PreTrainedTokenizerBase, task: TurnTask) -> dict[str, Any]:
    """What `generate` is told on both sides."""
    ends = {"stop_strings": task.stop_strings} if task.stop_strings else {}
    return {"max_new_tokens": task.max_new_tokens, "do_sample": False, "pad_token_id": _pad(tokenizer), **ends}


def _prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, store_path: Path, task: TurnTask
) -> tuple[int, list[int]]:
    """How many tokens the conversation has, and the ids with which this turn's message makes the prompt."""
    with AttentionStore(store_path) as store:
        chat = _chat(model, tokenizer, store, task)
        return len(chat.token_ids), chat.prompt_ids(task.message)


def _identify_seconds(model: PreTrainedModel) -> float:
    """What a process pays once for a model before it can reuse anything; it is part of each time with the store."""
    started = time.perf_counter()
    Fingerprint(model).current()
    return time.perf_counter() - started


def _copies(store: Path, scratch: Path, count: int) -> list[Path]:
    copies = [scratch / f"copy-{i}" for i in range(count)]
    for copy in copies:
        shutil.copytree(store, copy)
    return copies


def _warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: TurnTask) -> None:
    """Two short generations on tokens that have nothing to do with the conversation; with its stop strings, for which
    transformers looks through the whole vocabulary the first time."""
    ids = [i % model.config.get_text_config().vocab_size for i in range(WARM_UP_TOKENS, 0, -1)]
    for _ in range(2):
        timed_generate(model, tokenizer, ids, GenerateRun(), **{**_settings(tokenizer, task), "max_new_tokens": 2})


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad) if isinstance(pad, int) else 0
