"""The process under the page ends in order, also while the model is still being loaded."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from support import fresh

from hf_attnstore import AttentionStoreError
from hf_attnstore.ui.model import Loaded, ModelLoader

LOADS_FOR_EVER = """
import sys
import torch
from hf_attnstore import AttentionStore
from hf_attnstore.ui.serve import serve

def load():
    values = torch.ones(1 << 21)
    while True:
        values.exp_()

serve(load, AttentionStore(sys.argv[1], memory="64MiB", disk="64MiB"), port=0, ready=print)
print("ended in order")
"""


def test_an_interruption_ends_the_process_while_native_code_loads_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-c", LOADS_FOR_EVER, str(tmp_path / "store")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = fresh.Process(command, env=environment)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("http://")
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "ended in order\n"
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_who_waits_for_a_model_that_is_not_loaded_any_more_is_told() -> None:
    begun = threading.Event()
    told: list[str] = []

    def load() -> Loaded:
        begun.set()
        while True:
            time.sleep(0.001)

    def wait() -> None:
        with pytest.raises(AttentionStoreError) as raised:
            loader.result()
        told.append(str(raised.value))

    loader = ModelLoader(load)
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert begun.wait(60)
    loader.close()
    waiting.join(60)
    assert told == ["the process is ending; try again in a moment"]
    assert loader.ready
    loader.close()  # again, and harmless


def test_a_model_that_is_there_stays_when_the_loading_is_closed() -> None:
    model, tokenizer = object(), object()
    loader = ModelLoader(lambda: (model, tokenizer))  # type: ignore[arg-type, return-value]
    assert loader.result() == (model, tokenizer)
    loader.close()
    assert loader.result() == (model, tokenizer)
