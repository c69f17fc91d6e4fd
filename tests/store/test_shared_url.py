"""The URL of a shared tier: what it may say, and that its secrets are seen nowhere."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path

import pytest
from support.engines import Valkey
from support.store_blocks import make_chain, save

from hf_attnstore.errors import SharedTierError
from hf_attnstore.store import AttentionStore
from hf_attnstore.store.shared.engine import Engine, open_engine
from hf_attnstore.store.shared.url import SharedURL

SECRET = "s3cr3tpass"


@pytest.mark.parametrize("place", ["URL", "option", "file", "environment"])
def test_a_password_is_taken_from_where_it_is_and_shown_nowhere(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "password").write_text(SECRET + "\n")
    if place == "environment":
        monkeypatch.setenv("ATTNSTORE_SHARED_PASSWORD", SECRET)
    text = {
        "URL": f"valkey://ann:{SECRET}@host:6379/0",
        "option": f"valkey://ann@host:6379/0?password={SECRET}",
        "file": f"valkey://ann@host:6379/0?password_file={tmp_path}/password",
        "environment": "valkey://ann@host:6379/0",
    }[place]
    url = SharedURL(text)
    assert (url.secret, url.user, url.host, url.port, url.path) == (SECRET, "ann", "host", 6379, "0")
    assert SECRET not in f"{url} {url!r} {open_engine(url)!r}"
    assert str(url).startswith("valkey://ann@host:6379/0")


@pytest.mark.parametrize(
    "text",
    [
        f"valkey://:{SECRET}", f"{SECRET}", f"valkey://ann:12#{SECRET}@host", f"valkey://ann:12/{SECRET}@host",
        f"valkey://ann:12?{SECRET}@host", f"valkey://ann:{SECRET}@host:port", f"valkey://ann:{SECRET}@[host",
        f"valkey://ann:{SECRET}@host/database", f"valkey://ann:{SECRET}@host?timeout=soon",
        f"valkey://ann:{SECRET}@host?timeout=-1", f"valkey://ann@host?pasword={SECRET}", f"what://ann:{SECRET}@host",
        f"valkey://ann:{SECRET}@host?password_file=/nowhere", f"valkey://ann:{SECRET}@host?queue=much",
    ],
)  # fmt: skip
def test_a_url_that_is_none_is_an_error_without_its_secret(text: str, tmp_path: Path) -> None:
    with pytest.raises(SharedTierError) as caught:
        AttentionStore(tmp_path, shared=text).close()
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    AttentionStore(tmp_path).close()  # nothing was left open


def test_a_password_is_in_no_file_log_or_error_even_where_it_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = Valkey(tmp_path, "--requirepass", "another")
    try:
        with caplog.at_level(logging.DEBUG):
            url = server.patient_url.replace("//", f"//:{SECRET}@")
            with AttentionStore(tmp_path / "store", block_size=16, shared=url) as store:
                save(store, make_chain(list(range(64)), 16), "alice")
                store.flush()
                assert store.stats()["shared_errors"] >= 1
                assert SECRET not in f"{store!r} {store.stats()} {store._shared!r}"
    finally:
        server.kill()
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage().count("WRONGPASS") for record in said] == [1]  # said, once, and why
    assert SECRET not in caplog.text
    for file in (tmp_path / "store").rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes()


def test_engines_of_others_are_found_by_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of somebody else, as pip installs it."""
    described = tmp_path / "somebody_s_engine-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: somebody-s-engine\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[hf_attnstore.engines]\nmine = somebody_s_engine:Mine\n")
    (tmp_path / "somebody_s_engine.py").write_text(
        "from hf_attnstore.store.shared.engine import Engine\n\n"
        "class Mine(Engine):\n    def __init__(self, url):\n        self.url = url\n\n"
        "Mine.__abstractmethods__ = frozenset()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = open_engine(SharedURL("mine://host"))
    assert type(found).__module__ == "somebody_s_engine"
    assert isinstance(found, Engine)
    with pytest.raises(SharedTierError, match="only for mine, mooncake, redis, rediss, s3, valkey, valkeys"):
        open_engine(SharedURL("yours://host"))
