"""A pytest plugin that runs each of somebody else's tests several times, with the product put into every `generate`.

It is given to a pytest of its own, in another process, with the tests of a checkout of transformers. A mode says how
the product is put in (`plain` not at all, `attach`, `explicit` as a cache in the call), how often (`once`, or `again`:
the test sees a second run, from a store that was closed and opened again), and which inputs the tests have (`one` row
without padding, `left` for padded on the left, `asis`). Caches that a test brings itself stay. `ATTNSTORE_RESULTS`
names the file that gets a line of JSON for each test.
"""

from __future__ import annotations

import functools
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from _pytest.runner import runtestprotocol
from transformers import GenerationMixin
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hf_attnstore import AttentionStore, AttentionStoreCache, attach
from hf_attnstore.cache.generate.wrapper import generate_with_store
from hf_attnstore.cache.hooks import attachment_of
from hf_attnstore.cache.inputs import content
from hf_attnstore.cache.layers.states import HybridLayer, StateLayer

MODES = (
    "plain once one",
    "attach once one",
    "attach again one",
    "explicit again one",
    "plain once left",
    "attach again left",
    "plain once asis",
    "attach again asis",
)
RESULTS = Path(os.environ.get("ATTNSTORE_RESULTS", "results.jsonl"))
ABOUT = "generat cache past_key_values assisted prompt_lookup beam".split()
"""Words in the names of tests that are about generating or about caches."""
ELSEWHERE = "compil static fa2 fa3 fa4 flash parallel padding_free quant export onnx tp_ pipeline".split()
"""Words in the names of those that need another device, the network, other packages, or minutes."""

_NAMES = ("past_key_values", "cache", "cache_params")
_STAND_FOR = {StateLayer: LinearAttentionLayer, HybridLayer: LinearAttentionAndFullAttentionLayer}
"""Whose layers' tensors a test is to look at: it asks `type(layer) is …`, which is no subclass's."""
_ONCE = ("streamer", "assistant_model", "logits_processor", "stopping_criteria", "generator")
"""Arguments that may be used up by one run."""


class _Run:
    """One run of one test."""

    def __init__(self, mode: str) -> None:
        self.how, self.often, self.inputs = mode.split()
        self.counts: Counter[str] = Counter()
        """`calls` of `generate`, those `served` from the store, and outputs `compared` and `differing`."""
        self.words = ""
        """What pytest says of it: passed, skipped or failed, and how."""
        self.inside = False
        self._folder = tempfile.TemporaryDirectory()
        self.store = self._open()

    def _open(self) -> AttentionStore:
        return AttentionStore(Path(self._folder.name) / "store", block_size=4)

    def reopen(self) -> None:
        self.store.close()
        self.store = self._open()

    def close(self) -> None:
        self.store.close()
        self._folder.cleanup()


_run: _Run | None = None


def pytest_configure() -> None:
    content.FEWEST = 1  # pictures of the tests are of a token or two, too few to be identified beyond doubt


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def is_meant(name: str) -> bool:
        return any(word in name for word in ABOUT) and not any(word in name for word in ELSEWHERE)

    items[:] = [item for item in items if is_meant(item.name)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    global _run
    here: Any = SimpleNamespace(listchain=lambda: item.listchain()[:-1])
    lines: dict[str, Any] = {}
    for mode in MODES:
        plain = lines.get(f"plain once {mode.split()[-1]}")
        if plain is not None and (plain["words"] != "passed" or not plain.get("calls")):
            continue
        _run = _Run(mode)
        try:
            for kind in (random, np.random):
                kind.seed(0)
            torch.manual_seed(0)
            reports = runtestprotocol(item, log=False, nextitem=here)
            lines[mode] = {"words": _outcome(reports), **_run.counts}
        finally:
            _run.close()
            _run = None
        if mode == MODES[0]:
            for report in reports:
                item.ihook.pytest_runtest_logreport(report=report)
    item.session._setupstate.teardown_exact(nextitem)
    with RESULTS.open("a") as file:
        print(json.dumps({"test": item.nodeid, "runs": lines}), file=file)
    return True


def _outcome(reports: list[pytest.TestReport]) -> str:
    for report in reports:
        if report.outcome == "failed":
            return f"failed: {report.longreprtext[-3000:]}"
    return "skipped" if any(report.outcome == "skipped" for report in reports) else "passed"


@pytest.fixture(autouse=True)
def _as_the_mode_says(request: pytest.FixtureRequest) -> None:
    instance = request.instance
    _put_into(GenerationMixin)  # by now, the test's models are there
    if hasattr(instance, "setUp"):
        instance.setUp = functools.partial(_set_up, instance, instance.setUp)
    checks = getattr(type(instance), "_check_past_key_values_for_generate", None)
    if checks is not None:
        checks.__globals__["type"] = _type


def _put_into(owner: Any) -> None:
    """Puts the product into the `generate` of a class and of those below it. Some have one of their own that calls
    transformers' inside, with other arguments: what a test calls is what is to be called again."""
    plain = owner.__dict__.get("generate")
    if plain is not None and not hasattr(plain, "put_in"):

        @functools.wraps(plain)
        def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            return _generate(plain, model, *args, **kwargs)

        generate.put_in = True  # type: ignore[attr-defined]
        owner.generate = generate
    for below in owner.__subclasses__():
        _put_into(below)


def _generate(plain: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """What a class's `generate`, `plain`, is while one of the tests runs."""
    run = _run
    if run is None or run.inside:
        return plain(model, *args, **kwargs)
    run.counts["calls"] += 1
    if run.how == "plain":
        return plain(model, *args, **kwargs)
    run.inside = True
    try:
        if any(kwargs.get(name) is not None for name in _NAMES) or any(kwargs.get(name) for name in _ONCE):
            return _with_store(run, model, args, kwargs)
        state = torch.get_rng_state()
        if run.often == "once":
            first = plain(model, *args, **kwargs)
        else:
            first = _with_store(run, model, args, kwargs)
            run.reopen()
        torch.set_rng_state(state)
        second = _with_store(run, model, args, kwargs)
        run.counts["compared"] += 1
        run.counts["differing"] += not torch.equal(_sequences(first), _sequences(second))
        return second
    finally:
        run.inside = False


def _with_store(run: _Run, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if run.how == "attach":
        attach(model, run.store)
    elif not any(kwargs.get(name) is not None for name in (*_NAMES, "cache_implementation")):
        kwargs = {**kwargs, "past_key_values": AttentionStoreCache(model, None, run.store, drop=0)}
    before = _reused(run.store)
    try:
        generate = generate_with_store if attachment_of(model) is not None else type(model).generate
        output = generate(model, *args, **kwargs)
    finally:
        model.__dict__.pop("generate", None)  # the next call comes through here again
    run.counts["served"] += _reused(run.store) > before
    return output


def _reused(store: AttentionStore) -> float:
    """Tokens that were not computed, and bytes of encoders' outputs."""
    stats = store.stats()
    return stats["reused_tokens"] + stats["loaded_bytes"]


def _sequences(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else output.sequences
    assert isinstance(found, torch.Tensor)
    return found


def _set_up(instance: Any, made: Callable[[], None]) -> None:
    """What the set-up of a test case is: its own, and then its inputs are made to be as wanted."""
    made()
    assert _run is not None
    tester = getattr(instance, "model_tester", None)
    if _run.inputs == "one" and hasattr(tester, "batch_size"):
        tester.batch_size = 1
    for owner, name in (
        (instance, "prepare_config_and_inputs_for_generate"),
        (tester, "prepare_config_and_inputs_for_common"),
    ):
        prepare = getattr(owner, name, None)
        if prepare is not None:
            setattr(owner, name, functools.partial(_fitted, _run.inputs, prepare))


def _fitted(wanted: str, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    config, inputs = prepare(*args, **kwargs)
    mask = inputs.get("attention_mask")
    if wanted != "asis" and isinstance(mask, torch.Tensor) and mask.ndim == 2 and not mask.is_floating_point():
        mask = torch.ones_like(mask)
        if wanted == "left":
            mask[0, :1], mask[1:, :2] = 0, 0
        inputs["attention_mask"] = mask
    return config, inputs


def _type(value: Any) -> Any:
    """What `type` is for the checks of caches in transformers' tests."""
    return _STAND_FOR.get(type(value), type(value))
