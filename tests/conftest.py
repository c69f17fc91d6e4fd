"""What every test needs: a store in a folder of its own, and GPU tests skipped where there is no GPU."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from support.engines import Valkey
from support.seaweed import Seaweed

from hf_attnstore import AttentionStore, detach
from hf_attnstore.chat.pretrained import ModelNotFoundError, real_model_path
from hf_attnstore.store.blocks import uninitialised
from hf_attnstore.store.blocks.stored import StoredBlock
from hf_attnstore.store.transfer import load as transfer

# what is reused must not depend on how fast the machine is just now; tests of that choice switch it on
os.environ["ATTNSTORE_GATE"] = "off"
os.environ["ATTNSTORE_MODEL"] = "small"  # nor on which models are on this machine
_own_store = tempfile.mkdtemp(prefix="attnstore-tests-")
for _folder in (_own_store, f"{_own_store}-config"):
    atexit.register(shutil.rmtree, _folder, ignore_errors=True)
os.environ["ATTNSTORE_STORE"] = _own_store  # nor what is kept on it
os.environ["XDG_CONFIG_HOME"] = f"{_own_store}-config"  # whoever runs the tests may have settings of their own
settings.register_profile("no deadline", deadline=None)  # how long something takes is not for tests to say
settings.load_profile("no deadline")
torch.set_num_threads(1)  # the models are tiny; two test runs side by side must not fight for cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="module")
def garbage_is_looked_for_among_what_is_new() -> None:
    """What is there before a module's tests, a million objects of what was imported, is not looked at again and again:
    a collection of garbage, of which a bench has one before whatever it times, would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read before it is written makes NaN of what is computed with it."""
    monkeypatch.setattr(uninitialised, "fill", 0xFF)


@pytest.fixture(autouse=True)
def freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that run in the tests' process leave its memory as it is: others look at how much that has."""
    monkeypatch.setattr("hf_attnstore.store.memory.freed.keep_freed_memory", lambda: False)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[AttentionStore]:
    """An open store with blocks of 16 tokens."""
    with AttentionStore(tmp_path / "store", block_size=16) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Valkey]:
    """A Valkey server for all tests of a module; skips them where its package is not installed."""
    started = Valkey(tmp_path_factory.mktemp("valkey"))
    yield started
    started.kill()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    """A SeaweedFS server, which takes seconds to start; skips tests where its packages are not installed."""
    started = Seaweed(tmp_path_factory.mktemp("seaweed"))
    yield started
    started.kill()


@pytest.fixture(scope="session")
def real_model_folder() -> Callable[[str], Path]:
    """Finds the checkpoint of `smollm2` or `gemma3`; skips the test where their packages are not installed."""

    def find(name: str) -> Path:
        try:
            return real_model_path(name)
        except ModelNotFoundError as error:
            pytest.skip(str(error))

    return find


@pytest.fixture
def left_alone(request: pytest.FixtureRequest) -> Iterator[None]:
    """Models that tests share are detached after each of them."""
    yield
    for name in ("model", "hybrid"):
        if name in request.fixturenames:
            detach(request.getfixturevalue(name))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads of any size are read at once by several threads, as large ones are; whatever the file system can tell of
    the page cache."""
    monkeypatch.setattr(transfer, "WORTH_SHARING", 1)
    monkeypatch.setattr(StoredBlock, "in_page_cache", True)
    monkeypatch.setattr(transfer, "cores_to_spare", lambda: 2)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the package logs, from its warnings up."""
    with caplog.at_level(logging.WARNING, logger="hf_attnstore"):
        yield caplog
