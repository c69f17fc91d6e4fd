"""One row for each family: built, examined, and taken through its conversations, in a process that can be ended."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ...cache.model.structure import decoder_config
from ...errors import UnsupportedModelError
from .attached import AS_WITHOUT, run_attached
from .encoder_decoders import class_of, family_of, make_seq2seq
from .feeding import generate, new_cache, some_ids
from .notes import NOTES
from .others import build_other, other_class, others
from .reference import examine, in_words
from .tiny import build, class_name, families
from .variants import WRONG as VARIANT_WRONG
from .variants import Variant, examine_variants

SAME, NOT_KEPT, WRONG, OUTSIDE, NOT_BUILT, FAILED = "same", "not kept", "wrong", "outside", "not built", "failed"
LIMIT = 120.0
"""Seconds that a family may take."""
_START_LIMIT = 300.0
"""Seconds that a worker process may take to start: on a busy machine imports alone take long."""


@dataclass
class Row:
    """What was found out about a family."""

    family: str
    model_class: str
    layers: str = ""
    """The kinds of its layers, in the tiny model."""
    reference: bool = False
    """Whether a `DynamicCache` continues it correctly."""
    reuse: str = ""
    """What a conversation is taken up by: `token`, `checkpoint` or `none`; empty if that was not measured."""
    truncation: str = ""
    """What happens to kept keys when the window overflows: `rotated` or `recomputed`."""
    verdict: str = FAILED
    reason: str = ""
    seconds: float = 0.0
    attached: str = ""
    """What `attach` and plain `generate` do: `kept`, or `as without`; empty where `generate` does not run anyway."""
    variants: list[Variant] = field(default_factory=list)
    """Other classes of the family, and twins whose tokens see ahead."""

    @property
    def well(self) -> bool:
        """Whether this is nothing that has to be looked into."""
        if any(variant.verdict == VARIANT_WRONG for variant in self.variants):
            return False
        return self.verdict == SAME if self.reference else self.verdict in (OUTSIDE, NOT_BUILT)


def examine_family(family: str) -> Row:
    """Everything about one family. Never raises: what fails is the verdict."""
    encoder_decoder = family_of(family)
    row = Row(family, _class_name(family))
    begun = time.perf_counter()
    try:
        if encoder_decoder is not None:
            _fill_encoder_decoder(row, encoder_decoder)
        elif family in others():
            row.verdict, row.reason = OUTSIDE, NOTES[family]
            _attach(row, lambda: build_other(family))
        else:
            _fill(row)
            if row.verdict != NOT_BUILT:
                _attach(row, lambda: build(family))
    except Exception as error:
        row.verdict, row.reason = FAILED, in_words(error)
    row.seconds = time.perf_counter() - begun
    return row


def _class_name(family: str) -> str:
    encoder_decoder = family_of(family)
    if encoder_decoder is not None:
        return class_of(encoder_decoder)
    return other_class(family) if family in others() else class_name(family)


def _attach(row: Row, make: Callable[[], Any]) -> None:
    """Plain `generate` with a store attached; what goes wrong there is said of the family."""
    with tempfile.TemporaryDirectory(prefix="attnstore-models-") as folder:
        row.attached, problems = run_attached(make(), make(), Path(folder))
    if problems:
        row.verdict, row.reason = WRONG, _joined("; ".join(problems), row.reason)


def _fill(row: Row) -> None:
    from ...cache.probing.positions import probe
    from .scenarios import run_scenarios, run_unreferenced

    note = NOTES.get(row.family, "")
    try:
        model, twin = build(row.family), build(row.family)
    except Exception as error:
        row.verdict, row.reason = NOT_BUILT, _joined(note, in_words(error))
        return
    row.layers = layers_in_words(twin)
    found = examine(twin)
    row.reference = found.continues
    geometry = probe(twin)
    try:
        with tempfile.TemporaryDirectory(prefix="attnstore-models-") as folder:
            run = run_scenarios if found.continues else run_unreferenced
            outcome = run(model, twin, Path(folder))
    except UnsupportedModelError as error:
        row.verdict, row.reason = (
            (NOT_KEPT, _joined(str(error), found.note)) if found.continues else (OUTSIDE, _joined(note, found.reason))
        )
        return
    except Exception as error:
        if found.continues or (found.runs and _takes_a_cache(twin)):
            row.verdict, row.reason = FAILED, _joined(in_words(error), found.reason)
        else:  # nor does it work without the store
            row.verdict, row.reason = OUTSIDE, _joined(note, found.reason)
        return
    row.reuse = outcome.granularity
    row.truncation = "rotated" if geometry.movable and row.reuse != "none" else "recomputed"
    if found.continues and outcome.unused:
        row.verdict, row.reason = NOT_KEPT, _joined(outcome.unused, found.note)
    elif outcome.problems:
        row.verdict, row.reason = WRONG, _joined("; ".join(outcome.problems), found.reason)
    else:
        row.verdict = SAME if found.continues else OUTSIDE
        row.reason = _joined(note, found.reason, found.note)


def _fill_encoder_decoder(row: Row, family: str) -> None:
    from .encoder_sweep import read_documents

    row.layers = layers_in_words(SimpleNamespace(config=decoder_config(make_seq2seq(family))))
    with tempfile.TemporaryDirectory(prefix="attnstore-models-") as folder:
        found = read_documents(family, Path(folder) / "store")
    row.reuse = "token" if found.kept else "none"
    row.truncation = "nothing is dropped"
    row.attached = "kept" if found.kept else AS_WITHOUT
    row.reference = found.kept
    row.reason = "; ".join(found.problems)
    if found.problems:
        row.verdict = WRONG
    elif found.kept:
        row.verdict = SAME
        row.reason = "" if found.encoder_left_out else "the encoder runs every time"
    else:
        row.verdict, row.reason = OUTSIDE, found.why_not


def _takes_a_cache(model: Any) -> bool:
    """Whether `generate` runs at all with a `DynamicCache`, rightly or wrongly."""
    prompt = some_ids(20, 1)
    try:
        for _ in range(2):
            prompt = generate(model, prompt, new_cache(model)).sequences
    except Exception:
        return False
    return True


def examine_with_variants(family: str) -> Row:
    """As `examine_family`, with the family's other classes and its twins that see ahead."""
    row = examine_family(family)
    if family in families() and row.verdict != NOT_BUILT:
        row.variants = examine_variants(family)
    return row


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def layers_in_words(model: Any) -> str:
    """The kinds of a model's cache layers, such as "2 × conv, full_attention"."""
    text: Any = model.config.get_text_config(decoder=True)
    try:
        layers = new_cache(model).layers
    except Exception:
        return ""
    names = getattr(text, "layer_types", None) or []
    kinds = []
    for number, layer in enumerate(layers):
        kind = str(names[number]) if number < len(names) else _KINDS.get(type(layer).__name__, type(layer).__name__)
        if type(layer).__name__ == "DummyLayer":
            kind = f"{kind} (keeps nothing)"
        elif "attention" in kind and "linear" not in kind and _is_latent(text):
            kind = f"{kind} (MLA)"
        kinds.append(kind)
    counted = [(kind, len(list(group))) for kind, group in groupby(kinds)]
    return ", ".join(f"{count} × {kind}" if count > 1 else kind for kind, count in counted)


def _is_latent(text: Any) -> bool:
    """Whether attention layers cache a compressed KV (MLA)."""
    try:
        return bool(getattr(text, "kv_lora_rank", None))
    except RuntimeError:  # it differs from layer to layer, so there is one
        return True


_KINDS = {
    "DynamicLayer": "full_attention",
    "DynamicSlidingWindowLayer": "sliding_attention",
    "LinearAttentionLayer": "linear_attention",
}


@dataclass
class _Worker:
    process: Any
    connection: Any
    family: str = ""
    ready: bool = False
    since: float = field(default_factory=time.monotonic)

    def give(self, family: str) -> None:
        self.family, self.since = family, time.monotonic()
        self.connection.send(family)


def sweep(
    names: Sequence[str],
    workers: int = 1,
    limit: float = LIMIT,
    tell: Callable[[Row], None] = lambda row: None,
    work: Callable[[str], Row] = examine_family,
) -> list[Row]:
    """The rows of families, in the order of their names, each made in a worker process.

    Args:
        workers: processes at once.
        limit: seconds for each family; who takes longer is ended, and its row says so.
        tell: is called with each row as it is done.
        work: makes a row in a worker process; must be importable there.
    """
    todo, rows = list(reversed(names)), list[Row]()
    running, free = list[_Worker](), list[_Worker]()
    try:
        while todo or running:
            while todo and len(running) < workers:
                worker = free.pop() if free else _started(work)
                worker.give(todo.pop())
                running.append(worker)
            multiprocessing.connection.wait([worker.connection for worker in running], timeout=0.5)
            for worker in list(running):
                row = _row_of(worker, limit)
                if row is None:
                    continue
                running.remove(worker)
                if not worker.connection.closed:
                    free.append(worker)
                rows.append(row)
                tell(row)
    finally:
        for worker in [*free, *running]:
            _end(worker)
    return sorted(rows, key=lambda row: row.family)


def _row_of(worker: _Worker, limit: float) -> Row | None:
    """What a worker has found out; None if it is still at it."""
    try:
        if worker.connection.poll():
            said = worker.connection.recv()
            if said is not None:
                row: Row = said
                return row
            worker.ready, worker.since = True, time.monotonic()
        if time.monotonic() - worker.since <= (limit if worker.ready else _START_LIMIT):
            return None
        reason = f"took longer than {limit:g} seconds"
    except (EOFError, OSError):
        worker.process.join(5)
        reason = f"its process ended (exit code {worker.process.exitcode})"
    _end(worker)
    return Row(worker.family, _class_name(worker.family), verdict=FAILED, reason=reason)


def _started(work: Callable[[str], Row]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _end(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join()


def _work(connection: Any, work: Callable[[str], Row]) -> None:
    """A worker process: rows for names, until nobody asks any more."""
    silence()
    connection.send(None)  # ready
    while True:
        try:
            family = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(work(family))


def silence() -> None:
    """Nothing that a family's code says gets between the rows; one thread, as processes are many."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)


def counted(rows: Iterable[Row]) -> dict[str, int]:
    """How many rows there are of each verdict."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.verdict] = counts.get(row.verdict, 0) + 1
    return counts
