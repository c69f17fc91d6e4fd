"""A shared tier over TLS: a server's certificate that is trusted, and one that is not."""

from __future__ import annotations

import datetime
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.engines import Valkey
from support.ports import free_port

from hf_attnstore.store.shared.deadline import Deadline
from hf_attnstore.store.shared.engine import EngineError, Put, open_engine
from hf_attnstore.store.shared.url import SharedURL

SIZE = 3 << 20


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    x509 = pytest.importorskip("cryptography.x509", reason="needs cryptography to make a certificate")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(1))
        .not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "ca.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return files


@pytest.fixture(params=["Valkey behind a proxy", "redis-server"])
def port(request: pytest.FixtureRequest, certificate: tuple[Path, Path], tmp_path: Path) -> Iterator[int]:
    """Of a server that speaks TLS. The Valkey that comes by pip does not, so something before it does."""
    if request.param == "redis-server":
        yield from _redis(certificate, tmp_path)
        return
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = request.getfixturevalue("server")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_serve, args=(listening, context, server), daemon=True).start()
        yield listening.getsockname()[1]


def _redis(certificate: tuple[Path, Path], folder: Path) -> Iterator[int]:
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("needs redis-server, which Debian and others build with TLS")
    port = free_port()
    options = {"port": 0, "tls-port": port, "tls-cert-file": certificate[0], "tls-key-file": certificate[1]}
    options |= {"tls-ca-cert-file": certificate[0], "tls-auth-clients": "no", "bind": "127.0.0.1", "dir": folder}
    command = [binary, *(str(word) for name, value in options.items() for word in (f"--{name}", value))]
    process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert time.monotonic() < until
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def _serve(listening: socket.socket, context: ssl.SSLContext, server: Valkey) -> None:
    with suppress(OSError):
        while True:
            plain, _ = listening.accept()
            with suppress(OSError):
                inside = context.wrap_socket(plain, server_side=True)
                inside.setblocking(False)
                behind = socket.create_connection(("127.0.0.1", server.port))
                threading.Thread(target=_pass_on, args=(inside, behind), daemon=True).start()


def _pass_on(inside: ssl.SSLSocket, behind: socket.socket) -> None:
    """One thread for both directions: a TLS connection is not for two at a time."""
    behind.setblocking(False)
    waiting = {inside: b"", behind: b""}
    while True:
        idle = True
        for source, target in ((inside, behind), (behind, inside)):
            try:
                if not waiting[target]:
                    waiting[target] = source.recv(1 << 18)
                    if not waiting[target]:
                        inside.close()
                        behind.close()
                        return
                sent = target.send(waiting[target])
                waiting[target] = waiting[target][sent:]
                idle = False
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError):
                continue
            except OSError:
                inside.close()
                behind.close()
                return
        if idle:
            time.sleep(0.0005)


def test_values_go_to_and_fro_over_tls(port: int, certificate: tuple[Path, Path]) -> None:
    engine = open_engine(SharedURL(f"valkeys://127.0.0.1:{port}?ca={certificate[0]}"))
    data, found = os.urandom(SIZE), bytearray(SIZE)
    assert engine.put("name", [memoryview(data)[:1000], memoryview(data)[1000:]], Deadline(60)) is Put.STORED
    assert engine.sizes(["name", "none"], Deadline(60)) == [SIZE, 0]
    stream = engine.open_stream(Deadline(60))
    stream.ask("name", 0, SIZE, Deadline(60))
    assert stream.take([memoryview(found)], Deadline(60)) == SIZE
    stream.close(reuse=True)
    assert found == data
    assert engine.about(Deadline(60)).facts["TLS"] == "yes"
    engine.close()


def test_a_server_that_cannot_prove_its_name_is_not_spoken_to(port: int) -> None:
    engine = open_engine(SharedURL(f"valkeys://:secret@127.0.0.1:{port}"))
    with pytest.raises(EngineError, match="certificate verify failed") as caught:
        engine.sizes(["name"], Deadline(60))
    assert "secret" not in str(caught.value)
