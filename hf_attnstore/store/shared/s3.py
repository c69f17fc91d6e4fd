"""S3, and what speaks it (SeaweedFS, MinIO, Ceph …): a stream for each block, records by conditional puts."""

from __future__ import annotations

import base64
import json
import time
from collections import deque
from collections.abc import Sequence

from ..blocks.block import Bytes
from .bucket import Ask, Bucket
from .deadline import Deadline
from .engine import TAG_BYTES, About, Edges, Engine, EngineError, FullError, Put, Stream
from .http import Http
from .url import SharedURL

_MOST_ASKED = 10
"""Requests for finding out how much of a chain is there."""
_MOST_OPEN = 64
"""Values that are read in file order at the same time; of more, every range is a request."""
_SKIP = 256 << 10
"""Bytes of a value that are rather read and left out than asked for anew."""
_LINGER = 0.05
"""Seconds for which the rest of a value is waited for, for the sake of its connection."""
_NOTES = 64
_REMEMBERED = 1024
_TRIES = 8
_PAUSES = 0.02, 0.05, 0.1, 0.2, 0.4
"""Seconds between tries to replace what is refused though it is as it was."""


class S3Engine(Engine):
    """See `Engine`. The URL is `s3://key:secret@bucket/folder`; where it has no key they are those of the environment
    (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` …) or of the machine's role. Options: `endpoint` (of another server
    than Amazon's), `region`, `ca` (a file).

    What is noted under a name is one object. Nothing is touched: a bucket lets things go by their age, if at all.
    """

    largest = 5 << 30
    fresh = 300.0
    one_by_one = True

    def __init__(self, url: SharedURL) -> None:
        self._bucket = Bucket(url)
        self._about: About | None = None
        self._known: dict[str, tuple[bytes, str]] = {}
        """Of records the tag and the ETag, as they were when they were read last."""

    # blocks

    def put(self, name: str, parts: Sequence[Bytes], deadline: Deadline, seconds: int = 0) -> Put:
        if sum(part.nbytes for part in parts) > self.largest:
            return Put.FULL
        try:
            self._bucket.put(name, parts, deadline)
        except FullError:
            return Put.FULL
        return Put.STORED

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int]:
        found = self._bucket.read([Ask("HEAD", name) for name in names], deadline)
        return [answer.size if answer.status == 200 else 0 for answer, _ in found]

    def leading(self, names: Sequence[str], deadline: Deadline) -> list[int]:
        sizes = [0] * len(names)
        least, most, left = 0, len(names), _MOST_ASKED
        while least < most:
            outcomes = most - least + 1
            count = min(at_once(outcomes, left), outcomes - 1)
            places = [least + outcomes * (n + 1) // (count + 1) - 1 for n in range(count)]
            for place, size in zip(places, self.sizes([names[place] for place in places], deadline), strict=True):
                sizes[place] = size
            most = next((place for place in places if not sizes[place]), most)
            least = max((place + 1 for place in places if place < most), default=least)
            left = max(left - count, 1)
        supposed = 0
        for place in reversed(range(least)):
            supposed = sizes[place] = sizes[place] or supposed
        return sizes

    def edges(self, names: Sequence[str], head: int, tail: int, deadline: Deadline) -> list[Edges]:
        ranges = [{"Range": f"bytes=0-{head - 1}"}, {"Range": f"bytes=-{tail}"}]
        found = iter(self._bucket.read([Ask("GET", name, part) for name in names for part in ranges], deadline))
        edges = []
        for (first, begin), (last, end) in zip(found, found, strict=True):
            there = first.status in (200, 206) and last.status in (200, 206)
            edges.append(Edges(first.size, begin[:head], end[-tail:]) if there else Edges(0, b"", b""))
        return edges

    def open_stream(self, deadline: Deadline) -> Stream:
        return _Stream(self._bucket)

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        if names:
            self._bucket.delete(names, deadline)

    def names(self, begin: str, deadline: Deadline) -> list[str]:
        return self._bucket.names(begin, deadline)

    # entries

    def note(self, name: str, member: bytes, entry: bytes, deadline: Deadline, seconds: int = 0) -> None:
        self._change(name, member, entry, _NOTES, deadline)

    def drop_note(self, name: str, member: bytes, deadline: Deadline) -> None:
        self._change(name, member, None, 0, deadline)

    def noted(self, names: Sequence[str], deadline: Deadline) -> list[dict[bytes, bytes]]:
        found = self._bucket.read([Ask("GET", name) for name in names], deadline)
        return [_unpack(body) if answer.status == 200 else {} for answer, body in found]

    def _change(self, name: str, member: bytes, entry: bytes | None, most: int, deadline: Deadline) -> None:
        """Changes an entry, others being left as they are. Where the server does not compare, or many change them at
        once, a change may be lost: they are hints."""
        compares = self._bucket.compares(deadline)
        for _ in range(_TRIES):
            value, tag = self._bucket.value(name, deadline)
            entries = _unpack(value)
            if entries.pop(member, None) == entry:
                return
            if entry is not None:
                while most and len(entries) >= most:
                    del entries[next(iter(entries))]
                entries[member] = entry
            elif not entries:
                self._bucket.delete([name], deadline)
                return
            packed = json.dumps({m.hex(): base64.b64encode(e).decode() for m, e in entries.items()}).encode()
            if not compares:
                self._bucket.put(name, [packed], deadline)
                return
            if self._bucket.put_if(name, packed, tag, deadline):
                return

    # records

    def value(self, name: str, deadline: Deadline) -> bytes:
        value, tag = self._bucket.value(name, deadline)
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        self._known[name] = value[:TAG_BYTES], tag
        return value

    def replace(
        self, name: str, old: bytes, new: bytes, listed: str, member: bytes, entry: bytes, deadline: Deadline
    ) -> bool:
        """See `Engine`. The entry comes before the value: who finds one that is of no value there looks, and that is
        all."""
        if not self._bucket.compares(deadline):
            return False
        begin, tag = self._known.pop(name, (b"", ""))
        noted, pauses = False, iter(_PAUSES)
        while True:
            if begin == old:
                if listed and not noted:
                    self._change(listed, member, entry, 0, deadline)
                noted = True
                if self._bucket.put_if(name, new, tag, deadline):
                    return True
            value, now = self._bucket.value(name, deadline)
            if value[:TAG_BYTES] != old:
                return False
            if (begin, tag) == (old, now):  # another write is on its way: such as a sign of life of the same hold
                pause = next(pauses, None)
                if pause is None:
                    return False
                time.sleep(pause)
            begin, tag = old, now

    # what it is

    def about(self, deadline: Deadline) -> About:
        if self._about is None:
            server, encrypted, open_to_all = self._bucket.server(deadline)
            compares = self._bucket.compares(deadline)
            facts = {
                "TLS": "yes" if encrypted else "no",
                "eviction": "none; by age, if the bucket has a lifecycle rule",
                "compares before it sets": "yes" if compares else "no: names of sessions stay local",
            }
            unsafe = {
                "the connection is not encrypted: use https://, or a network that nobody else is in": not encrypted,
                "nobody has to say a key: whoever reaches it can read": open_to_all,
                "it evicts nothing: have a lifecycle rule let old objects go, or run attnstore gc --shared": True,
            }
            self._about = About(f"S3 ({server})", facts=facts, unsafe=[text for text, holds in unsafe.items() if holds])
        return self._about

    def close(self) -> None:
        self._bucket.close()

    def after_fork_in_child(self) -> None:
        self._bucket.after_fork_in_child()


class _Stream(Stream):
    """Requests for values from some place on, each for all ranges that follow."""

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket
        self._open: dict[str, _Get] = {}
        """By name the newest request that goes to the end of the value."""
        self._asked: deque[tuple[_Get, int, int]] = deque()

    def ask(self, name: str, offset: int, nbytes: int, deadline: Deadline) -> None:
        get = self._open.get(name)
        if get is None or not get.end <= offset <= get.end + _SKIP:
            all_of_it = len(self._open) < _MOST_OPEN or get is not None
            get = _Get(self._bucket, name, offset, "" if all_of_it else f"{offset + nbytes - 1}", deadline)
            if all_of_it:
                self._open[name] = get
        get.end = offset + nbytes
        self._asked.append((get, offset, nbytes))

    def take(self, buffers: Sequence[Bytes], deadline: Deadline) -> int:
        get, offset, nbytes = self._asked.popleft()
        get.skip(offset, deadline)
        done = 0
        for buffer in buffers:
            view = memoryview(buffer)[: nbytes - done]  # type: ignore[arg-type]
            came = get.into(view, deadline)
            done += came
            if came < view.nbytes:
                break
        if self._open.get(get.name) is not get and all(get is not later for later, _, _ in self._asked):
            get.close()
        return done

    def close(self, *, reuse: bool) -> None:
        for get in {*self._open.values(), *(get for get, _, _ in self._asked)}:
            get.close(reuse=reuse)
        self._open.clear()
        self._asked.clear()


class _Get:
    """A value from some place on, on its way."""

    def __init__(self, bucket: Bucket, name: str, offset: int, last: str, deadline: Deadline) -> None:
        self._bucket, self.name = bucket, name
        self._place = self.end = offset
        """Of the next byte; and of the one after the last that was asked for."""
        self._answered = self._there = False
        self._talk: Http = bucket.ask(Ask("GET", name, {"Range": f"bytes={offset}-{last}"}), deadline)

    def into(self, view: memoryview, deadline: Deadline) -> int:
        """The next bytes, into a buffer. Returns how many: fewer at the end only."""
        if not self._answered:
            answer = self._bucket.take_answer(self._talk, deadline)
            self._answered, self._there = True, answer.status == 206 or (answer.status == 200 and not self._place)
        came = self._bucket.take_body(self._talk, view, deadline) if self._there else 0
        self._place += came
        return came

    def skip(self, offset: int, deadline: Deadline) -> None:
        """Goes on to some place."""
        if offset > self._place:
            self.into(memoryview(bytearray(offset - self._place)), deadline)

    def close(self, *, reuse: bool = True) -> None:
        """Ends it. Little that is left is read, so that the connection can be used again."""
        if reuse and self._answered and self._talk.left <= _SKIP:
            try:
                self._bucket.take_body(self._talk, memoryview(bytearray(self._talk.left)), Deadline(_LINGER))
            except EngineError:
                return
            self._bucket.give(self._talk)
        else:
            self._talk.close()


def at_once(outcomes: int, requests: int) -> int:
    """How many requests to make at once, if so many may be made in all and one of so many outcomes is to be found: as
    many as it takes for the fewest rounds."""
    for rounds in range(1, requests + 1):
        each, more = divmod(requests, rounds)
        if (each + 2) ** more * (each + 1) ** (rounds - more) >= outcomes:
            return each + bool(more)
    return 1


def _unpack(value: bytes) -> dict[bytes, bytes]:
    """Entries; of an object that is no such thing, none."""
    try:
        return {bytes.fromhex(member): base64.b64decode(entry) for member, entry in json.loads(value or b"{}").items()}
    except (ValueError, AttributeError, TypeError):
        return {}
