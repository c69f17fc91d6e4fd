"""Other people's data: namespaces, private files, encryption, and deleting so that nothing is left."""

import logging
import os
import secrets
from pathlib import Path

import numpy as np
import pytest
import torch
from support.store_blocks import load, make_block, make_chain, same, save
from support.tiny_models import make_model
from support.turns import follow_up, tokens, turn

from hf_attnstore import AttentionStore, AttentionStoreCache, EncryptionKeyError, LoadError, SessionNotFoundError
from hf_attnstore.store.blocks.block import BlockMeta
from hf_attnstore.store.blocks.format import encode_block, parse_header
from hf_attnstore.store.blocks.keys import block_key, chain_root, encode_tokens
from hf_attnstore.store.blocks.vault import EncryptedVault, Guard

KEY = secrets.token_bytes(32)


def contents(root: Path) -> bytes:
    """The bytes of every file, with the names of files and folders."""
    found = b""
    for path in sorted(root.rglob("*")):
        found += str(path.relative_to(root)).encode() + b"\0"
        if path.is_file():
            found += path.read_bytes()
    return found


def little_endian(ids: list[int]) -> bytes:
    return torch.tensor(ids).numpy().tobytes()


def test_namespaces_share_nothing_and_list_nothing_of_each_other(tmp_path: Path) -> None:
    model = make_model()
    prompt = tokens(70)
    with AttentionStore(tmp_path, block_size=16, namespace="ann") as ann:
        turn(model, prompt, AttentionStoreCache(model, "talk", ann))
        ann.set_metadata("talk", {"title": "a secret"})
        ann.flush()
        with AttentionStore(tmp_path, namespace="bob") as bob:
            assert bob.sessions() == []
            assert bob.session_count() == 0
            for name in ("talk",):
                with pytest.raises(SessionNotFoundError):
                    bob.tokens(name)
                with pytest.raises(SessionNotFoundError):
                    bob.delete(name)
                with pytest.raises(SessionNotFoundError):
                    bob.export_session(name, tmp_path / "out")
            cache = AttentionStoreCache(model, "talk", bob)
            turn(model, prompt, cache)
            assert cache.reused_tokens == 0
            assert cache.stats.loaded_bytes == 0
            bob.flush()
            assert ann.metadata("talk") == {"title": "a secret"}
            assert bob.metadata("talk") == {}
            bob.delete("talk")
        assert ann.tokens("talk")[:70] == prompt[0].tolist()


def test_a_folder_that_others_can_look_into_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "open"
    root.mkdir(mode=0o755)
    os.chmod(root, 0o755)
    with caplog.at_level(logging.WARNING):
        AttentionStore(root, block_size=16).close()
    assert "chmod 700" in caplog.text
    caplog.clear()
    os.chmod(root, 0o700)
    with caplog.at_level(logging.WARNING):
        AttentionStore(root).close()
    assert not caplog.records


# encryption


@pytest.mark.parametrize("form", [KEY, KEY.hex(), "base64"], ids=["bytes", "hex", "base64"])
def test_a_key_may_be_bytes_hex_or_base64_or_in_the_environment(
    form: str | bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    key = base64.b64encode(KEY).decode() if form == "base64" else form
    chain = make_secret_chain(tmp_path, list(range(40)))
    monkeypatch.setenv("ATTNSTORE_KEY", KEY.hex())
    with AttentionStore(tmp_path) as store:
        assert store.tokens("a") == list(range(40))
    monkeypatch.delenv("ATTNSTORE_KEY")
    with AttentionStore(tmp_path, encryption_key=key) as store:
        assert same(chain, load(store, chain))


def make_secret_chain(root: Path, ids: list[int], session: str = "a") -> list:  # type: ignore[type-arg]
    """A chain in an encrypted store, saved."""
    with AttentionStore(root, block_size=16, encryption_key=KEY) as store:
        parent, chain = store.root("f" * 40), []
        for start in range(0, len(ids), 16):
            block = make_block(parent, ids[start : start + 16], start)
            key = block_key(parent, block.meta.tokens, store.secret)
            chain.append(type(block)(BlockMeta(key, parent, "f" * 40, start, block.meta.tokens), block.tensors))
            parent = key
        save(store, chain, session)
    return chain


@pytest.mark.parametrize("key", [None, bytes(32), "no key", b"short"], ids=["none", "wrong", "no key", "short"])
def test_without_the_right_key_there_is_a_clear_error(key: str | bytes | None, tmp_path: Path) -> None:
    make_secret_chain(tmp_path, list(range(20)))
    before = contents(tmp_path / "blocks")
    with pytest.raises(EncryptionKeyError, match=r"ATTNSTORE_KEY|not that of the store|32 bytes"):
        AttentionStore(tmp_path, encryption_key=key)
    assert contents(tmp_path / "blocks") == before


def test_a_store_is_encrypted_from_its_beginning_or_not_at_all(tmp_path: Path) -> None:
    AttentionStore(tmp_path, block_size=16).close()
    with pytest.raises(EncryptionKeyError, match="not encrypted"):
        AttentionStore(tmp_path, encryption_key=KEY)


def test_an_encrypted_store_gives_the_same_tokens_and_shows_none(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    plain, hidden = tmp_path / "plain", tmp_path / "hidden"
    prompt = tokens(70)
    for root, key in ((plain, None), (hidden, KEY)):
        with AttentionStore(root, block_size=16, namespace="ann", encryption_key=key) as store:
            sequence = turn(model, prompt, AttentionStoreCache(model, "a-private-name", store)).sequences
            store.set_metadata("a-private-name", {"title": "a-private-title"})
        with AttentionStore(root, namespace="ann", encryption_key=key) as store:
            longer = follow_up(sequence, 5, 1)
            cache = AttentionStoreCache(model, "a-private-name", store)
            assert torch.equal(turn(model, longer, cache).sequences, turn(other, longer, None).sequences)
            assert cache.reused_tokens == sequence.shape[1] - 1
            assert cache.stats.loaded_bytes > 0
            assert store.metadata("a-private-name") == {"title": "a-private-title"}
            ids = store.tokens("a-private-name")
            keys = [span.block for span in store.manifest("a-private-name").spans]
            assert store.verify().problems == []
    model_keys = [chain_root(cache._held.fingerprint, "ann")]
    visible, secret = contents(plain), contents(hidden)
    probes = {
        "name": b"a-private-name",
        "metadata": b"a-private-title",
        "ids": little_endian(ids[:16]),
        "root": model_keys[0].hex().encode(),
    }
    for what, probe in probes.items():
        assert probe in visible, f"the probe for {what} finds nothing where nothing is hidden"
        assert probe not in secret, what
    unkeyed = block_key(model_keys[0], encode_tokens(ids[:16]))
    assert unkeyed.hex().encode() in visible
    assert unkeyed.hex().encode() not in secret, "who guesses a text could see whether it is there"
    assert keys[0].hex().encode() in secret


def test_the_keys_and_values_themselves_are_hidden(tmp_path: Path) -> None:
    chain = make_secret_chain(tmp_path, list(range(40)))
    found = contents(tmp_path)
    for block in chain:
        for tensor in block.tensors.values():
            assert tensor.numpy().tobytes()[:64] not in found


def test_an_encrypted_block_that_was_tampered_with_is_refused(tmp_path: Path) -> None:
    """Unlike a checksum, a tag can't be made to fit."""
    vault = EncryptedVault(KEY, bytes(16))
    block = make_block(chain_root("f" * 40, "", secret=vault.secret), list(range(16)), 0)
    header, chunks = encode_block(block, vault)
    layout = parse_header(header, len(header) + sum(chunk.nbytes for chunk in chunks))
    guard = vault.guard(layout.salt)
    stored, proof = layout.tensors["layers.0.keys"], layout.proofs["layers.0.keys"]

    def opens(guard: Guard, meta: BlockMeta, number: int, data: np.ndarray) -> bool:
        return not guard.open(meta, [(number, stored.spec, [data], proof)])

    good = chunks[0].copy()
    assert opens(guard, layout.meta, stored.number, good)
    assert good.tobytes() == block.tensors["layers.0.keys"].numpy().tobytes()
    moved = BlockMeta(layout.meta.key, layout.meta.parent, layout.meta.fingerprint, 16, layout.meta.tokens)
    assert not opens(guard, moved, stored.number, chunks[0].copy()), "another position"
    assert not opens(guard, layout.meta, 1, chunks[0].copy()), "another tensor's place"
    bad = chunks[0].copy()
    bad[5] ^= 1
    assert not opens(guard, layout.meta, stored.number, bad)
    other = EncryptedVault(bytes(32), bytes(16)).guard(layout.salt)
    assert not opens(other, layout.meta, stored.number, chunks[0].copy()), "another key"
    again, _ = encode_block(block, vault)
    assert again != header, "every file has a key of its own"


def test_a_plain_file_in_an_encrypted_store_is_refused(tmp_path: Path) -> None:
    chain = make_secret_chain(tmp_path / "hidden", list(range(16)))
    with AttentionStore(tmp_path / "plain", block_size=16) as store:
        save(store, chain)
    (file,) = (tmp_path / "plain").glob("blocks/*/*/*")
    (target,) = (tmp_path / "hidden").glob("blocks/*/*/*")
    target.write_bytes(file.read_bytes())
    with (
        AttentionStore(tmp_path / "hidden", encryption_key=KEY) as store,
        pytest.raises(LoadError, match="not encrypted"),
    ):
        load(store, chain)


def test_encryption_without_its_package_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(EncryptionKeyError, match=r"hf-attnstore\[encryption\]"):
        AttentionStore(tmp_path, encryption_key=KEY)


# deleting


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])
def test_secure_delete_leaves_nothing_of_a_session(key: bytes | None, tmp_path: Path) -> None:
    model = make_model()
    root = tmp_path / "store"
    with AttentionStore(root, block_size=16, encryption_key=key) as store:
        prompt = tokens(70)
        for number in range(4):  # short blocks are superseded, metadata grow, branches end
            sequence = turn(model, prompt, AttentionStoreCache(model, "doomed-session", store)).sequences
            store.set_metadata("doomed-session", {"title": f"doomed-title {number} " * (number + 1)})
            prompt = follow_up(sequence, 5, number)
        branch = torch.cat([prompt[:, :40], tokens(30, seed=77)], dim=1)
        turn(model, branch, AttentionStoreCache(model, "doomed-session", store))
        turn(model, tokens(40, seed=5), AttentionStoreCache(model, "other-session", store))
        store.flush()
        files = {path.name: path.read_bytes() for path in root.glob("blocks/*/*/*")}
        spans = store.manifest("doomed-session").spans
        damaged = next(root.glob(f"blocks/*/*/{spans[1].block.hex()}.safetensors"))
        damaged.write_bytes(damaged.read_bytes()[:-9] + b"doomed-in")
        store.drop_memory()
        turn(model, prompt, AttentionStoreCache(model, "doomed-session", store))
        store.flush()
        assert list((root / "quarantine").iterdir()), "there is a copy in quarantine to be found"
        kept = {path.name for path in root.glob("blocks/*/*/*")}
        mine = {span.block.hex() for span in store.manifest("other-session").spans}
        ids = store.tokens("doomed-session", dropped=True)
        assert store.stats()["memory_blocks"] > 0
        if key is None:
            assert b"doomed-title" in contents(root)
        store.delete("doomed-session", secure=True)
        left = contents(root)
        for probe in (b"doomed-session", b"doomed-title", b"doomed-in"):
            assert probe not in left, probe
        for start in range(len(ids) - 8):
            assert little_endian(ids[start : start + 8]) not in left
            assert encode_tokens(ids[start : start + 8]) not in left
        for name in kept - {f"{block}.safetensors" for block in mine}:
            assert name.removesuffix(".safetensors").encode() not in left
            assert bytes.fromhex(name.removesuffix(".safetensors")) not in left, "the index still has its key"
        for name, content in files.items():
            if name.removesuffix(".safetensors") not in mine:
                assert content[-200:] not in left
        assert [info.name for info in store.sessions()] == ["other-session"]
        assert {path.stem for path in root.glob("blocks/*/*/*")} == mine
        assert store.verify().problems == []
        assert store.stats()["memory_blocks"] == 0


def test_what_two_sessions_share_stays_for_the_other(tmp_path: Path) -> None:
    with AttentionStore(tmp_path, block_size=16) as store:
        chain = make_chain(list(range(40)), 16)
        save(store, chain, "a")
        store.flush()
        store.fork("a", "b")
        store.delete("a", secure=True)
        store.drop_memory()
        assert same(chain, load(store, chain))
        store.delete("b", secure=True)
        assert not list(tmp_path.glob("blocks/*/*/*"))
        assert not any(bytes(block.meta.key) in contents(tmp_path) for block in chain)
