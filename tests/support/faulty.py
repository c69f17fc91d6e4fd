"""A proxy on the loopback that does to a connection what networks and sick servers do."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import NamedTuple


class Fault(NamedTuple):
    """What goes wrong, and where."""

    kind: str
    """"none"; "refuse"; "stop", "trickle", "cut", "flip", "late" in what the server says, "half" in what it is told."""
    after: int = 0
    """Bytes that pass before, in that direction."""
    seconds: float = 0.0


class FaultyProxy:
    """Passes on what is said to a port and by it; `fault` holds for connections made from then on, and `set` ends those
    that there are."""

    def __init__(self, port: int) -> None:
        self._target = port
        self.fault = Fault("none")
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"valkey://127.0.0.1:{self.port}"

    def set(self, fault: Fault) -> None:
        self.fault = fault
        self._end_all()

    def _end_all(self) -> None:
        with self._lock:
            for end in self._open:
                _shut(end)
            self._open.clear()

    def close(self) -> None:
        _shut(self._listening)
        self._end_all()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            fault = self.fault
            if fault.kind == "refuse":
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open |= {client, server}
            half = fault if fault.kind == "half" else Fault("none")
            back = fault if fault.kind != "half" else Fault("none")
            for source, target, its in ((client, server, half), (server, client, back)):
                threading.Thread(target=self._pass_on, args=(source, target, its), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, fault: Fault) -> None:
        passed = 0
        try:
            while data := source.recv(1 << 16):
                begins = max(fault.after - passed, 0)
                if fault.kind != "none" and passed + len(data) > fault.after:
                    target.sendall(data[:begins])
                    data = self._faulty(fault, data[begins:], target)
                    fault = fault if fault.kind == "trickle" else Fault("none")
                    passed += begins
                target.sendall(data)
                passed += len(data)
        except OSError:
            pass
        for end in (source, target):
            _shut(end)

    def _faulty(self, fault: Fault, data: bytes, target: socket.socket) -> bytes:
        if fault.kind in ("cut", "half"):
            raise OSError
        if fault.kind == "flip":
            return bytes([data[0] ^ 0x10]) + data[1:]
        if fault.kind == "late":
            time.sleep(fault.seconds)
            return data
        while fault.kind == "stop" or data:
            time.sleep(0.02)
            if fault.kind == "trickle":
                target.sendall(data[:1])
                data = data[1:]
            elif target.fileno() < 0 or target not in self._open:
                raise OSError
        return b""


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
