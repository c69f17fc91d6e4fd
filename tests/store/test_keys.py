"""Names for content: chained keys, keyed digests, and codes that sort like beginnings."""

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from support.store_blocks import make_block, save

from hf_attnstore import AttentionStore
from hf_attnstore.store.blocks.keys import (
    block_key,
    chain_root,
    common_codes,
    common_prefix,
    cut_root,
    encode_tokens,
    name_digest,
    prefix_codes,
)

IDS = st.lists(st.integers(0, 3), max_size=12)
SECRET = bytes(range(32))


@given(IDS, IDS, st.sampled_from([b"", SECRET]))
def test_codes_agree_where_tokens_do(a: list[int], b: list[int], secret: bytes) -> None:
    one, two = prefix_codes(encode_tokens(a), secret), prefix_codes(encode_tokens(b), secret)
    assert len(one) == len(a)
    assert common_codes(one, two) >= common_prefix(encode_tokens(a), encode_tokens(b))


def test_codes_depend_on_all_that_comes_before_and_on_the_secret() -> None:
    many = [prefix_codes(encode_tokens([first, *range(200)])) for first in range(50)]
    later = [codes[1:] for codes in many]
    for number, codes in enumerate(later):
        for other in later[:number]:
            same = sum(a == b for a, b in zip(codes, other, strict=True))
            assert same < 12, "after another first token the codes agree by accident only"
    assert prefix_codes(encode_tokens(range(50))) != prefix_codes(encode_tokens(range(50)), SECRET)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=16), min_size=1, max_size=12), IDS)
def test_the_nearest_block_is_the_one_that_shares_most(siblings: list[list[int]], wanted: list[int]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, AttentionStore(Path(folder) / "s", block_size=16) as store:
        root = chain_root("f" * 40, "")
        unique = {tuple(ids) for ids in siblings}
        save(store, [make_block(root, list(ids), 0) for ids in unique])
        for where in ("memory", "disk"):
            if where == "disk":
                store.drop_memory()
            found = store.nearest(root, wanted)
            shared = max(common_prefix(encode_tokens(ids), encode_tokens(wanted)) for ids in unique)
            assert (found.common if found else 0) == shared
            if found is not None:
                (match,) = [ids for ids in unique if block_key(root, encode_tokens(ids)) == found.key]
                assert match[:shared] == tuple(wanted[:shared])
                assert found.token_count == len(match)


def test_every_part_of_a_name_matters() -> None:
    tokens = encode_tokens([1, 2, 3])
    names = [
        chain_root("a", "b"), chain_root("a", "c"), chain_root("ab", ""), chain_root("a", "b", "other"),
        chain_root("a", "b", secret=SECRET), chain_root("a", "b", secret=SECRET[::-1]),
        block_key(chain_root("a", "b"), tokens), block_key(chain_root("a", "b"), tokens, SECRET),
        block_key(chain_root("a", "b"), tokens[:8]), block_key(chain_root("a", "c"), tokens),
        cut_root(chain_root("a", "b"), [(bytes(32), 0, 4)]), cut_root(chain_root("a", "b"), [(bytes(32), 0, 5)]),
        cut_root(chain_root("a", "b"), []), cut_root(chain_root("a", "b"), [], SECRET),
        name_digest("session", "a", "b"), name_digest("session", "ab", ""), name_digest("lock", "a", "b"),
        name_digest("session", "a", "b", secret=SECRET),
    ]  # fmt: skip
    assert len(set(names)) == len(names)
    assert {len(name) for name in names} == {32}
