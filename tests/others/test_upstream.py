"""transformers' own tests with the product put in: each that passes without it passes with it. See `upstream.py`."""

from __future__ import annotations

import importlib.util

import put_in
import pytest
from upstream import CHECKOUT, DECODERS, MODES, OTHERS, SECONDS, count, losses, run

needs_checkout = pytest.mark.skipif(
    not (CHECKOUT / "tests" / "generation" / "test_utils.py").is_file(),
    reason="ATTNSTORE_TRANSFORMERS names no checkout of transformers' repository",
)
needs_parameterized = pytest.mark.skipif(
    importlib.util.find_spec("parameterized") is None, reason="needs the package parameterized"
)


def test_the_plugin_knows_the_modes_that_are_counted() -> None:
    assert set(MODES) <= set(put_in.MODES)
    assert {f"plain once {mode.split()[-1]}" for mode in MODES} <= set(put_in.MODES)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 60)
@needs_checkout
@needs_parameterized
@pytest.mark.parametrize("family", [*DECODERS, *OTHERS])
def test_every_test_that_passes_without_the_store_passes_with_it(family: str) -> None:
    tests = run(family)
    assert losses(tests) == {}
    for mode in MODES:
        assert count(tests, mode)["calls"] > 0
