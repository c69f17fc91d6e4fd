"""A bucket: requests that obstore signs and connections of our own carry, all ending by a deadline; puts with a
condition.

obstore finds the credentials, signs, lists, and deletes many objects at once. Its own transfers have no deadline for
all of a request, and its threads take the interpreter down where it ends before they do.
"""

from __future__ import annotations

import os
import queue
import re
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

try:
    import obstore
    from obstore.exceptions import BaseError
    from obstore.store import S3Store
except ImportError as error:
    raise ImportError("it needs obstore: pip install 'hf-attnstore[s3]'") from error

from ...errors import SharedTierError
from ..blocks.block import Bytes
from .deadline import Deadline
from .engine import EngineError, FullError
from .http import Answer, Http
from .url import SharedURL

T = TypeVar("T")

_AT_ONCE = 16
"""Requests under way at once for one call, each on a connection."""
_IDLE = 64
"""Connections that are kept open while nobody uses them."""
_VALID = timedelta(hours=1)
_STATIC = "AWS_ACCESS_KEY_ID"
_FULL = re.compile("Full|Quota|InsufficientStorage|EntityTooLarge|507")


class Ask(NamedTuple):
    """A request for a value."""

    method: Literal["GET", "HEAD", "PUT"]
    name: str
    headers: Mapping[str, str] = {}
    body: Sequence[bytes | Bytes] = ()


class Bucket:
    """The part of a bucket that a URL names. Names become keys with `/` for `:`, down to a kind of values.

    All methods raise EngineError, whose text has no secret in it: not what obstore says, as that may.

    Raises:
        SharedTierError: obstore makes no client of the URL.
    """

    def __init__(self, url: SharedURL) -> None:
        self._url, self._folder = url, url.path
        if url.port is not None:
            raise SharedTierError(f"{url}: a URL of s3 is a bucket and a folder; the server is said by endpoint=")
        endpoint = url.option("endpoint").rstrip("/")
        keys = {"access_key_id": url.user, "secret_access_key": url.secret}
        given = {"endpoint": endpoint, "region": url.option("region"), **keys}
        certificate = url.option("ca")
        client: Any = {"timeout": "5s", "allow_http": endpoint.startswith("http://")}
        try:
            if certificate:
                client["root_certificate"] = Path(certificate).expanduser().read_bytes()
            self._tls = ssl.create_default_context(cafile=certificate or None)
            said: Any = {name: value for name, value in given.items() if value}
            self._store = S3Store(url.host, client_options=client, retry_config={"max_retries": 0}, **said)
        except OSError as error:
            raise SharedTierError(f"{url}: the certificate can't be used: {error.strerror or error}") from error
        except (BaseError, ValueError):
            raise SharedTierError(f"{url}: obstore can't make a client of it: endpoint=, region= or ca=") from None
        prefix = url.option("prefix", "attnstore")
        self._probes = f"{prefix}:try"
        self._depth = prefix.count(":") + 2
        """Of a name's colons so many separate folders: no key may go on where another ends, since servers that keep
        objects as files take the shorter one for a folder."""
        self._lock = threading.Lock()
        self._idle: list[Http] = []
        self._forked = False
        self._tag_form: Callable[[str], str] | bool | None = None
        """How an ETag is said to a server that compares; False for one that does not, None where that is not known."""

    # values

    def read(self, asked: Sequence[Ask], deadline: Deadline) -> list[tuple[Answer, bytes]]:
        """Answers to requests, with their bodies; some are made at once. What is not there has status 404, what is
        empty 416."""
        found: list[tuple[Answer, bytes]] = []
        for first in range(0, len(asked), _AT_ONCE):
            several = asked[first : first + _AT_ONCE]
            talks: list[Http] = []
            with self._telling(talks):
                for ask in several:
                    talks.append(self.ask(ask, deadline))
                for ask, talk in zip(several, talks, strict=True):
                    answer = talk.answer(deadline, head_only=ask.method == "HEAD")
                    found.append((answer, talk.body(deadline)))
            for talk in talks:
                self.give(talk)
        for answer, body in found:
            self.check(answer, body)
        return found

    def value(self, name: str, deadline: Deadline) -> tuple[bytes, str]:
        """A value and its ETag; both are empty if there is none."""
        ((answer, body),) = self.read([Ask("GET", name)], deadline)
        return (body, answer.headers.get("etag", "")) if answer.status == 200 else (b"", "")

    def put(
        self, name: str, parts: Sequence[bytes | Bytes], deadline: Deadline, headers: Mapping[str, str] = {}
    ) -> bool:
        """Stores a value. Whether it was: what `headers` ask for may not hold."""
        ((answer, body),) = self.read([Ask("PUT", name, headers, parts)], deadline)
        if answer.status == 404 and not headers:
            raise self._error(f"the server refused: {_code(answer, body)}")
        return answer.status < 300

    def put_if(self, name: str, data: bytes, tag: str, deadline: Deadline) -> bool:
        """Stores a value if the one there has this ETag (empty: if there is none)."""
        said = self._tag_form(tag) if callable(self._tag_form) else tag
        return self.put(name, [data], deadline, {"If-Match": said} if said else {"If-None-Match": "*"})

    def compares(self, deadline: Deadline) -> bool:
        """Whether a put with a condition is one: tried once, as some servers say that they have stored what they should
        have refused, and some know an ETag only without its quotes."""
        if self._tag_form is None:
            name = f"{self._probes}:{os.urandom(8).hex()}"
            found: Callable[[str], str] | bool = False
            if self.put_if(name, b"1", "", deadline) and not self.put_if(name, b"22", "", deadline):
                tag = self.value(name, deadline)[1]
                for form in (str, _unquoted):
                    if tag and self.put(name, [b"333"], deadline, {"If-Match": form(tag)}):
                        refused = not self.put(name, [b"4444"], deadline, {"If-Match": form(tag)})
                        found = refused and self.value(name, deadline)[0] == b"333" and form
                        break
            self.delete([name], deadline)
            self._tag_form = found
        return bool(self._tag_form)

    # many at once

    def names(self, begin: str, deadline: Deadline) -> list[str]:
        """All that begin like this."""
        folder = self._key(begin.rpartition(":")[0])
        found = self._aside(lambda: obstore.list(self._store, folder).collect(), deadline)
        skip = len(self._folder) + 1 if self._folder else 0
        names = (entry["path"][skip:].replace("/", ":") for entry in found)
        return [name for name in names if name.startswith(begin)]

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        """Removes values, if they are there."""
        keys = [self._key(name) for name in names]
        self._aside(lambda: obstore.delete(self._store, keys), deadline)

    def _aside(self, call: Callable[[], T], deadline: Deadline) -> T:
        """Has obstore do something that knows no deadline; a thread that is stuck in it is left behind, for as long as
        a request may take."""
        if self._forked:
            raise self._error("obstore can't be used in a process that was forked from one that used it")
        ended: queue.SimpleQueue[tuple[Literal[True], T] | tuple[Literal[False], Exception]] = queue.SimpleQueue()

        def run() -> None:
            try:
                ended.put((True, call()))
            except Exception as error:
                ended.put((False, error))

        threading.Thread(target=run, name="attnstore-s3").start()
        with self._telling([]):
            try:
                well, found = ended.get(timeout=deadline.left())
            except queue.Empty:
                raise TimeoutError from None
            if not well:
                raise cast(Exception, found)
            return cast(T, found)

    # the server

    def server(self, deadline: Deadline) -> tuple[str, bool, bool]:
        """What it calls itself, whether the connection is encrypted, and whether it lists the bucket for anybody.

        Raises:
            EngineError: the bucket is not there, or not to be listed with this key.
        """
        self.names(f"{self._probes}:", deadline)
        where = urlsplit(self._signed(Ask("GET", self._probes), deadline))
        with self._telling(talks := [self._take(where.scheme, where.hostname or "", where.port, deadline)]):
            headers = {"Host": where.netloc, "Connection": "close"}
            talks[0].request("GET", f"/{self._url.host}?list-type=2&max-keys=1", headers, (), deadline)
            answer = talks[0].answer(deadline)
            talks[0].close()
        return answer.headers.get("server", where.netloc), where.scheme == "https", answer.status == 200

    # requests

    def ask(self, ask: Ask, deadline: Deadline) -> Http:
        """Sends a request, on a connection that is then its own until it is given back or closed."""
        where = urlsplit(self._signed(ask, deadline))
        talk = self._take(where.scheme, where.hostname or "", where.port, deadline)
        with self._telling([talk]):
            talk.request(
                ask.method, f"{where.path}?{where.query}", {"Host": where.netloc, **ask.headers}, ask.body, deadline
            )
        return talk

    def check(self, answer: Answer, body: bytes) -> None:
        """Raises:
        EngineError: an answer is none that says something of a value.
        """
        code = _code(answer, body)
        if answer.status not in (200, 204, 206, 404, 409, 412, 416) or code == "NoSuchBucket":
            raise (FullError if _FULL.search(code) else EngineError)(f"{self._url}: the server refused: {code}")

    def take_answer(self, talk: Http, deadline: Deadline) -> Answer:
        """The head of the answer to a request for a range, with its body read if that is none of the value's."""
        with self._telling([talk]):
            answer = talk.answer(deadline)
            if answer.status not in (200, 206):
                self.check(answer, talk.body(deadline))
            return answer

    def take_body(self, talk: Http, view: memoryview, deadline: Deadline) -> int:
        """What comes next of a body, as much as there is of it, into a buffer. Returns the bytes."""
        with self._telling([talk]):
            return talk.into(view, deadline)

    def give(self, talk: Http) -> None:
        """Takes a connection back."""
        with self._lock:
            if len(self._idle) < _IDLE and talk.usable:
                self._idle.append(talk)
                return
        talk.close()

    def _take(self, scheme: str, host: str, port: int | None, deadline: Deadline) -> Http:
        while True:
            with self._lock:
                talk = self._idle.pop() if self._idle else None
            if talk is None:
                tls = self._tls if scheme == "https" else None
                with self._telling([]):
                    return Http(host, port or (443 if tls else 80), tls, deadline)
            if talk.usable:
                return talk
            talk.close()

    def _signed(self, ask: Ask, deadline: Deadline) -> str:
        key = self._key(ask.name)
        if self._url.user or _STATIC in os.environ:
            with self._telling([]):
                return str(obstore.sign(self._store, ask.method, key, _VALID))
        return str(self._aside(lambda: obstore.sign(self._store, ask.method, key, _VALID), deadline))

    def _key(self, name: str) -> str:
        return "/".join(filter(None, [self._folder, *name.split(":", self._depth)]))

    @contextmanager
    def _telling(self, talks: Sequence[Http]) -> Iterator[None]:
        """What goes wrong ends connections, and is told."""
        try:
            yield
        except BaseException as error:
            for talk in talks:
                talk.close()
            if isinstance(error, EngineError):
                raise
            if isinstance(error, TimeoutError):
                raise self._error("no answer in time") from None
            if isinstance(error, BaseError | FileNotFoundError):
                raise self._error(_reason(str(error))) from None
            if isinstance(error, OSError | ValueError):
                raise self._error(error) from None
            raise

    def _error(self, why: object) -> EngineError:
        return EngineError(f"{self._url}: {why}")

    def close(self) -> None:
        """Lets go of all connections that nobody uses."""
        with self._lock:
            idle, self._idle = self._idle, []
        for talk in idle:
            talk.close()

    def after_fork_in_child(self) -> None:
        """Connections and the threads of obstore are the parent's."""
        self._lock, self._forked = threading.Lock(), True
        self.close()


def _unquoted(tag: str) -> str:
    return tag.strip('"')


def _code(answer: Answer, body: bytes) -> str:
    """What an answer says of itself."""
    code = re.search(rb"<Code>(\w{1,60})</Code>", body[:4096])
    return code[1].decode() if code is not None else f"{answer.status} {answer.said}"


def _reason(text: str) -> str:
    """What obstore says, as far as it has nothing secret in it: the server's code, or the kind of error."""
    code = re.search(r"<Code>(\w{1,60})</Code>", text) or re.search(r"status code: (\d{3} [A-Z][\w ]{1,40})", text)
    if code is not None:
        return f"the server refused: {code[1]}"
    kind = re.search(r"kind: (\w{1,40})", text)
    return (
        "connection refused" if "Connection refused" in text else f"the request failed{f' ({kind[1]})' if kind else ''}"
    )
