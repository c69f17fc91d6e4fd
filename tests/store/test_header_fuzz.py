"""Block files with headers that nobody should have written: they are refused, never believed."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.store_blocks import make_block

from hf_attnstore.errors import LoadError
from hf_attnstore.store.blocks.format import Layout, _with_check, encode_block, parse_header
from hf_attnstore.store.blocks.keys import chain_root
from hf_attnstore.store.blocks.vault import Vault

BLOCK = make_block(chain_root("f" * 40, ""), list(range(16)), 0)
HEADER, CHUNKS = encode_block(BLOCK, Vault())
SIZE = len(HEADER) + sum(chunk.nbytes for chunk in CHUNKS)
FIELDS: dict[str, Any] = json.loads(HEADER[8:])
del FIELDS["__metadata__"]["check"]

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def encoded(fields: Any) -> bytes:
    """A header whose own checksum is right, whatever else is wrong."""
    return _with_check(json.dumps(fields, separators=(",", ":")).removeprefix('{"__metadata__":{'))


@pytest.mark.parametrize("tokens", range(1, 20))
def test_data_begin_where_the_kernel_copies_fast_from(tokens: int) -> None:
    header, _ = encode_block(make_block(chain_root("f" * 40, ""), list(range(tokens)), 0), Vault())
    assert len(header) % 64 == 0


def check(layout: Layout) -> None:
    """Whatever is believed lies inside the file, whole and in its place."""
    end = layout.file_bytes
    for stored in layout.tensors.values():
        assert 8 <= layout.begin <= layout.begin + stored.offset + stored.spec.nbytes <= end
        assert stored.offset >= 0
    assert layout.proofs.keys() == layout.tensors.keys()
    assert layout.meta.token_count == layout.tensors["token_ids"].spec.shape[0]


def test_the_header_itself_is_believed() -> None:
    layout = parse_header(HEADER, SIZE)
    assert layout.meta.key == BLOCK.meta.key
    check(layout)


@settings(max_examples=400)
@given(st.binary(max_size=300))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(LoadError):
        parse_header(noise, SIZE)
    with pytest.raises(LoadError):
        parse_header(struct.pack("<Q", len(noise)) + noise, SIZE)


@settings(max_examples=600)
@given(st.data())
def test_a_field_replaced_by_anything_is_refused_or_harmless(data: st.DataObject) -> None:
    fields = json.loads(json.dumps(FIELDS))
    name = data.draw(st.sampled_from(list(fields)))
    inner = data.draw(st.sampled_from(list(fields[name])))
    if data.draw(st.booleans()):
        del fields[name][inner]
    else:
        fields[name][inner] = data.draw(JSON)
    changed = encoded(fields)
    try:
        layout = parse_header(changed, len(changed) + SIZE - len(HEADER))
    except LoadError:
        return
    check(layout)
    if name != "__metadata__":
        assert layout.tensors[name].spec == parse_header(HEADER, SIZE).tensors[name].spec


@settings(max_examples=400)
@given(st.integers(0, len(HEADER) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused(place: int, value: int) -> None:
    changed = bytearray(HEADER)
    changed[place] = value
    if changed != HEADER:
        with pytest.raises(LoadError):
            parse_header(bytes(changed), SIZE)


@given(st.integers(0, 2 * SIZE))
def test_a_file_of_another_size_is_refused(size: int) -> None:
    if size != SIZE:
        with pytest.raises(LoadError):
            parse_header(HEADER, size)
