"""Sessions as files: exported, taken elsewhere, imported after all of it was checked."""

import json
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.store_blocks import make_chain, save
from support.tiny_models import make_model
from support.turns import follow_up, tokens, turn

from hf_attnstore import (
    AttentionStore,
    AttentionStoreCache,
    AttentionStoreError,
    SessionNameError,
    SessionNotFoundError,
)
from hf_attnstore.store.blocks.tensors import as_bytes
from hf_attnstore.store.blocks.vault import checksum

KEY = bytes(range(32))


@pytest.mark.parametrize(
    ("target", "namespace"), [(None, ""), (None, "somebody"), (KEY, "somebody")], ids=["plain", "renamed", "encrypted"]
)
@pytest.mark.parametrize("source", [None, KEY], ids=["from plain", "from encrypted"])
def test_a_session_goes_on_in_another_store(
    source: bytes | None, target: bytes | None, namespace: str, tmp_path: Path
) -> None:
    model, other = make_model(), make_model()
    with AttentionStore(tmp_path / "a", block_size=16, encryption_key=source) as store:
        sequence = turn(model, tokens(70), AttentionStoreCache(model, "talk", store)).sequences
        store.set_metadata("talk", {"title": "moved"})
        done = store.export_session("talk", tmp_path / "talk.safetensors")
        assert (done.tokens, done.blocks) == (75, 5)
    assert stat.S_IMODE((tmp_path / "talk.safetensors").stat().st_mode) == 0o600
    with AttentionStore(tmp_path / "b", block_size=16, namespace=namespace, encryption_key=target) as store:
        done = store.import_session(tmp_path / "talk.safetensors", "taken")
        assert (done.session, done.tokens, done.blocks) == ("taken", 75, 5)
        assert store.metadata("taken") == {"title": "moved"}
        assert store.tokens("taken") == sequence[0, :75].tolist()
        prompt = follow_up(sequence, 5, 1)
        cache = AttentionStoreCache(model, "taken", store)
        assert torch.equal(turn(model, prompt, cache).sequences, turn(other, prompt, None).sequences)
        assert cache.reused_tokens == 75
        assert store.verify().problems == []
        with pytest.raises(AttentionStoreError, match="exists already"):
            store.import_session(tmp_path / "talk.safetensors", "taken")
        store.delete("taken")
        assert not list((tmp_path / "b").glob("blocks/*/*/*"))


def test_a_truncated_session_goes_on_in_another_store_with_its_moved_keys(tmp_path: Path) -> None:
    model = make_model()
    prompt = tokens(40)
    options: dict[str, Any] = {"window": 64, "keep_first": 4}
    with AttentionStore(tmp_path / "a", block_size=16) as store:
        for number in range(6):
            sequence = turn(model, prompt, AttentionStoreCache(model, "talk", store, **options)).sequences
            prompt = follow_up(sequence, 12, number)
        store.flush()
        store.export_session("talk", tmp_path / "talk.safetensors")
        assert any(not span.block for span in store.manifest("talk").spans), "something was dropped"
        here = AttentionStoreCache(model, "talk", store, save=False, **options)
        expected = turn(model, prompt, here).sequences
    with AttentionStore(tmp_path / "b", block_size=16, namespace="other") as store:
        store.import_session(tmp_path / "talk.safetensors")
        there = AttentionStoreCache(model, "talk", store, **options)
        assert torch.equal(turn(model, prompt, there).sequences, expected)
        assert there.stats.reused_tokens == here.stats.reused_tokens > 20
        assert there.stats.truncation == here.stats.truncation
        assert store.verify().problems == []


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    with AttentionStore(tmp_path / "a", block_size=16) as store:
        save(store, make_chain(list(range(40)), 16), "talk")
        store.export_session("talk", tmp_path / "talk.safetensors")
    return tmp_path / "talk.safetensors"


def test_any_damage_is_found_and_nothing_is_taken(exported: Path, tmp_path: Path) -> None:
    content = exported.read_bytes()
    refused = 0
    with AttentionStore(tmp_path / "b", block_size=16) as store:
        for position in range(0, len(content), 7):
            altered = bytearray(content)
            altered[position] ^= 1 << (position % 8)
            exported.write_bytes(altered)
            with pytest.raises(AttentionStoreError):
                store.import_session(exported)
            refused += 1
        for length in (0, 7, 100, len(content) // 2, len(content) - 1):
            exported.write_bytes(content[:length])
            with pytest.raises(AttentionStoreError):
                store.import_session(exported)
        assert refused > 300
        assert store.sessions() == []
        assert store.stats()["disk_blocks"] == 0
        exported.write_bytes(content)
        assert store.import_session(exported).tokens == 40


def forge(path: Path, change: Any) -> None:
    """Writes a file whose checksums are right, whatever else is not."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()["attnstore"])
    change(content, tensors)
    content["sums"] = {name: checksum([as_bytes(tensor).reshape(-1)]) for name, tensor in tensors.items()}
    text = json.dumps(content)
    check = checksum([as_bytes(torch.tensor(list(text.encode()), dtype=torch.uint8))])
    save_file(tensors, path, metadata={"attnstore": text, "check": check})


def set_in(*path: Any, to: Any) -> Any:
    def change(content: Any, tensors: dict[str, torch.Tensor]) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = to

    return change


FORGERIES = {
    "a fingerprint that is a path": set_in("fingerprint", to="../../../../etc"),
    "a block of another model": set_in("blocks", 1, "fingerprint", to="../x"),
    "a block that follows itself": set_in("blocks", 1, "parent", to=1),
    "a block that follows a later one": set_in("blocks", 0, "parent", to=2),
    "a start that is none": set_in("blocks", 0, "start", to=-1),
    "a span of a block that is not there": set_in("spans", 0, to=[9, 0, 16, 0]),
    "a span before the first block": set_in("spans", 0, to=[-1, 0, 8, 0]),
    "a span longer than its block": set_in("spans", 0, to=[0, 0, 17, 0]),
    "a span that is none": set_in("spans", 0, to=["x", None, 1, 2]),
    "metadata that are none": set_in("metadata", to="[1]"),
    "a name that is none": set_in("session", to=5),
    "another format": set_in("format", to="hf-attnstore session 99"),
    "a tensor that is missing": lambda content, tensors: tensors.pop("1.token_ids"),
    "a tensor of another length": lambda content, tensors: tensors.update({"0.layers.0.keys": torch.zeros(2, 3, 4)}),
    "a tensor of no block": lambda content, tensors: tensors.update({"7.layers.0.keys": torch.zeros(2, 16, 4)}),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_file_is_refused(forgery: str, exported: Path, tmp_path: Path) -> None:
    forge(exported, FORGERIES[forgery])
    before = sorted(path for path in tmp_path.rglob("*") if "b/" not in str(path))
    with AttentionStore(tmp_path / "b", block_size=16) as store:
        with pytest.raises(AttentionStoreError):
            store.import_session(exported)
        assert store.sessions() == []
        assert store.stats()["disk_blocks"] == 0
    assert sorted(path for path in tmp_path.rglob("*") if "b/" not in str(path) and path.name != "b") == before


def test_a_file_rewritten_unchanged_is_taken(exported: Path, tmp_path: Path) -> None:
    forge(exported, lambda content, tensors: None)
    with AttentionStore(tmp_path / "b", block_size=16) as store:
        assert store.import_session(exported).tokens == 40


def test_what_does_not_fit_is_refused(exported: Path, tmp_path: Path) -> None:
    with (
        AttentionStore(tmp_path / "b", block_size=8) as store,
        pytest.raises(AttentionStoreError, match="block_size=16"),
    ):
        store.import_session(exported)
    with (
        AttentionStore(tmp_path / "c", block_size=16, disk=300_000) as store,
        pytest.raises(AttentionStoreError, match="no room"),
    ):
        store.import_session(exported)


def test_what_somebody_imports_is_not_refused_by_the_policy(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AttentionStore(tmp_path / "b", block_size=16, disk=600_000) as store:
        monkeypatch.setattr(store._order.policy, "admits", lambda newcomer, victim, now: False)
        number = 0
        while not store.stats()["not_admitted_blocks"]:  # until it is full
            save(store, make_chain(list(range(1000 * number, 1000 * number + 160)), 16))
            store.flush()
            number += 1
        assert store.stats()["evicted_blocks"] == 0
        assert store.import_session(exported).tokens == 40
        assert store.stats()["evicted_blocks"] > 0
        assert len(store.tokens("talk")) == 40


def test_exporting_what_is_not_there_or_not_whole_is_an_error(tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "a", block_size=16) as store:
        save(store, make_chain(list(range(40)), 16), "talk")
        store.drop_memory()
        with pytest.raises(SessionNotFoundError):
            store.export_session("nobody", tmp_path / "out")
        with pytest.raises(AttentionStoreError, match="can't write"):
            store.export_session("talk", tmp_path / "no" / "such" / "folder" / "out")
        path = next((tmp_path / "a").glob("blocks/*/*/*"))
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(AttentionStoreError, match="exported as a whole"):
            store.export_session("talk", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "x\x1f1", "x" * 1025])
def test_a_name_that_cannot_be_one_is_not_taken_from_a_file_either(name: str, tmp_path: Path) -> None:
    with AttentionStore(tmp_path / "a", block_size=16) as store:
        save(store, make_chain([1, 2], 16), "talk")
        store.export_session("talk", tmp_path / "talk.safetensors")
        with safe_open(tmp_path / "talk.safetensors", "pt") as file:
            content = json.loads(file.metadata()["attnstore"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        text = json.dumps({**content, "session": name})
        check = checksum([np.frombuffer(text.encode(), np.uint8)])
        save_file(tensors, tmp_path / "other.safetensors", metadata={"attnstore": text, "check": check})
        with pytest.raises(SessionNameError):
            store.import_session(tmp_path / "other.safetensors")
        assert store.session_count() == 1
        assert store.import_session(tmp_path / "other.safetensors", "fine").session == "fine"


def calls_of(work: Callable[[], object]) -> int:
    """How many functions are called meanwhile: unlike time, that is the same whenever it is counted."""
    count = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(called)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def test_the_work_of_taking_a_session_elsewhere_grows_as_the_session_does(tmp_path: Path) -> None:
    work: dict[str, list[int]] = {"export": [], "import": []}
    for blocks in (48, 192):
        path = tmp_path / f"{blocks}.safetensors"
        with AttentionStore(tmp_path / f"a{blocks}", block_size=4) as store:
            save(store, make_chain(list(range(4 * blocks)), 4), "talk")
            store.flush()
            work["export"].append(calls_of(lambda s=store, p=path: s.export_session("talk", p)))
        with AttentionStore(tmp_path / f"b{blocks}", block_size=4) as store:
            work["import"].append(calls_of(lambda s=store, p=path: s.import_session(p)))
            assert store.tokens("talk") == list(range(4 * blocks))
    for what, (few, many) in work.items():
        assert many < 4.5 * few, f"{what}: {few} calls for 48 blocks, {many} for 192"
