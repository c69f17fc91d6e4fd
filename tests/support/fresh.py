"""Python in processes of its own that need not import torch and transformers anew: forked from one that has.

That one has a single thread, and has computed nothing: what it forks has its own memory, environment, files and end,
`atexit` included. It is another interpreter than the test's, so that hashes of strings differ; those of the processes
that it forks are alike.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import IO, Any

_PRELOADED = """
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from hf_attnstore import AttentionStoreCache, ChatSession, TurnQueue
from contextlib import suppress
with suppress(Exception):  # says what is missing
    from hf_attnstore.server import app, cli
"""
_SERVER = f"""
import sys
from {__name__} import _served
exec(_served(int(sys.argv[1])))
"""


class Process:
    """A process that runs Python; as `subprocess.Popen`, as far as tests need it.

    Args:
        command: `sys.executable` and its arguments: `-c` and code, `-m` and a module, or a script; `-u` and `-W ignore`
            may stand before them.
        stdin, stdout: descriptors, of which the process has copies; pipes where they are not given.
        stderr: another; this process's own where it is not given.
    """

    def __init__(
        self,
        command: Sequence[object],
        *,
        stdin: int = subprocess.PIPE,
        stdout: int = subprocess.PIPE,
        stderr: int = 2,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        assert command[0] == sys.executable
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        pipes = []
        if stdin == subprocess.PIPE:
            stdin, writing = os.pipe()
            self.stdin = os.fdopen(writing, "w", buffering=1)
            pipes.append(stdin)
        if stdout == subprocess.PIPE:
            reading, stdout = os.pipe()
            self.stdout = os.fdopen(reading)
            pipes.append(stdout)
        job = {
            "arguments": [str(argument) for argument in command[1:]],
            "env": dict(os.environ if env is None else env),
            "cwd": str(cwd or Path.cwd()),
        }
        self.args = command
        self.returncode: int | None = None
        self.pid = _server().ask(job, [stdin, stdout, stderr])
        for descriptor in pipes:
            os.close(descriptor)

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _server().ask({"ended": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = time.monotonic() + (3600 if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(list(map(str, self.args)), timeout or 0)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills it, waits for its end, and closes its pipes."""
        self.send_signal(signal.SIGKILL)
        self.wait()
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                pipe.close()


def run(
    command: Sequence[object],
    *,
    input: str = "",
    check: bool = False,
    timeout: float = 240,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    **others: Any,
) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` with `text` and `capture_output`, which may be said."""
    assert others.keys() <= {"text", "capture_output", "stdin"}
    with (
        tempfile.TemporaryFile("w+") as given,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        given.write(input)
        given.seek(0)
        process = Process(command, stdin=given.fileno(), stdout=out.fileno(), stderr=err.fileno(), env=env, cwd=cwd)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        said, complained = (_whole(stream) for stream in (out, err))
    if check and code:
        raise AssertionError(f"exit code {code}:\n{complained}")
    return subprocess.CompletedProcess(list(map(str, command)), code, said, complained)


def _whole(stream: IO[str]) -> str:
    stream.seek(0)
    return stream.read()


class _Server:
    """The process that forks, and its end of the talk with it."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        calm = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            number = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVER, str(number)], env={**os.environ, **calm}, pass_fds=[number]
            )
        atexit.register(self.close)

    def ask(self, what: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
        with self._lock:
            socket.send_fds(self._ours, [json.dumps(what).encode()], list(descriptors))
            return json.loads(self._ours.recv(100) or b"null")

    def close(self) -> None:
        self._ours.close()
        self._process.wait()


_servers: dict[int, _Server] = {}


def _server() -> _Server:
    """The one of this process, made when it is needed first."""
    return _servers.get(os.getpid()) or _servers.setdefault(os.getpid(), _Server())


# what happens in the process that forks, and in those that it forks


def _served(number: int) -> CodeType:
    """Forks for whoever asks. Returns in each forked process, with what that is to run; ends with the tests."""
    exec(_PRELOADED, {})
    gc.collect()
    gc.freeze()  # what was imported stays shared with what is forked
    with socket.socket(fileno=number) as talk:
        while True:
            said, descriptors, *_ = socket.recv_fds(talk, 1 << 20, 3)
            if not said:
                sys.exit()
            job = json.loads(said)
            if "ended" in job:
                pid, status = os.waitpid(job["ended"], os.WNOHANG)
                answer = os.waitstatus_to_exitcode(status) if pid else None
            else:
                answer = os.fork()
                if not answer:
                    break
            for descriptor in descriptors:
                os.close(descriptor)
            talk.send(json.dumps(answer).encode())
    for place, descriptor in enumerate(descriptors):
        os.dup2(descriptor, place)
        os.close(descriptor)
    return _become(**job)


def _become(arguments: list[str], env: dict[str, str], cwd: str) -> CodeType:
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-u":
            sys.stdout.reconfigure(write_through=True)
        else:
            warnings.simplefilter(arguments.pop(0))
    first = ""
    if arguments[0] == "-c":
        _, text, *rest = arguments
        code, sys.argv = compile(text, "<string>", "exec"), ["-c", *rest]
    elif arguments[0] == "-m":
        _, module, *rest = arguments
        code = compile(f"import runpy; runpy._run_module_as_main({module!r})", "<string>", "exec")
        sys.argv = ["-m", *rest]
    else:
        code, sys.argv = compile(Path(arguments[0]).read_text(), arguments[0], "exec"), arguments
        first = str(Path(arguments[0]).resolve().parent)
        sys.modules["__main__"].__file__ = arguments[0]
    sys.path[:0] = [first, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    return code
