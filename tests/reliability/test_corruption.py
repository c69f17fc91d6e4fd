"""Files that are not what was written: noticed, put aside, computed again, and never a wrong token or tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.corruption import (
    INDEX,
    LOG,
    SEED,
    Outcome,
    Sample,
    block_faults,
    block_flips,
    damaged_blocks_repaired,
    damaged_while_open,
    index_bits,
    index_damages,
    index_faults,
    index_flips,
    log_bits,
    make_sample,
    misfits,
    model_faults,
    record_and_index,
    record_flips,
    repaired,
    sampled_bits,
    use_all,
    warnings,
)

SHARDS = 8


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A store as it is when it was closed."""
    return make_sample(tmp_path_factory.mktemp("sample") / "store")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A store as a killed process leaves it."""
    return make_sample(tmp_path_factory.mktemp("sample") / "store", killed=True)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A store with other content."""
    return make_sample(tmp_path_factory.mktemp("sample") / "store", killed=True, shift=1000)


def check(outcome: Outcome, at_least: int = 1) -> None:
    """Faults were tried, and all was well."""
    assert outcome.tried >= at_least
    assert not outcome.wrong, str(outcome)


@pytest.mark.parametrize("kind", ["closed", "killed"])
def test_without_a_fault_all_is_there(tmp_path: Path, kind: str, request: pytest.FixtureRequest) -> None:
    sample: Sample = request.getfixturevalue(kind)
    assert (LOG in sample.files) == (kind == "killed")
    sample.put(tmp_path / "store")
    with warnings() as said:
        use = use_all(tmp_path / "store", sample)
        assert (use.wrong, use.lost) == ([], 0)
        assert repaired(tmp_path / "store", sample) == []
    assert said == []


# block files


def test_a_flipped_bit_of_a_block_is_noticed_put_aside_and_saved_again(tmp_path: Path, closed: Sample) -> None:
    name = closed.block_files()[SEED % len(closed.block_files())]
    check(block_flips(tmp_path / "store", closed, name, sampled_bits(closed.files[name], 100)), 100)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_every_flipped_bit_of_a_block_is_noticed_put_aside_and_saved_again(
    tmp_path: Path, closed: Sample, shard: int
) -> None:
    name = min(closed.block_files(), key=lambda name: len(closed.files[name]))
    check(block_flips(tmp_path / "store", closed, name, range(shard, 8 * len(closed.files[name]), SHARDS)), 1000)


def test_a_damaged_block_file_is_noticed_put_aside_and_saved_again(tmp_path: Path, closed: Sample) -> None:
    check(block_faults(tmp_path / "store", closed, closed.block_files()[SEED % 6 :: 6]), 25)


@pytest.mark.slow
def test_any_damaged_block_file_is_noticed_put_aside_and_saved_again(tmp_path: Path, closed: Sample) -> None:
    check(block_faults(tmp_path / "store", closed, closed.block_files(), seed=SEED + 1), 150)


def test_a_whole_block_file_with_tensors_that_do_not_fit_is_put_aside(tmp_path: Path, closed: Sample) -> None:
    check(misfits(tmp_path / "store", closed), 10)


def test_repair_keeps_all_that_comes_before_a_damaged_block(tmp_path: Path, closed: Sample) -> None:
    check(damaged_blocks_repaired(tmp_path / "store", closed), 10)


# session records


def test_no_flipped_bit_of_a_record_is_believed(tmp_path: Path, closed: Sample) -> None:
    for name in closed.record_files():
        bits = range(8 * len(closed.files[name]))
        check(record_flips(tmp_path / "store", closed, name, bits, repair=False), 1000)


def test_a_damaged_record_is_written_anew_by_repair(tmp_path: Path, closed: Sample) -> None:
    for name in closed.record_files():
        bits = range(SEED % 800, 8 * len(closed.files[name]), 800)
        check(record_flips(tmp_path / "store", closed, name, bits), 3)


def test_a_damaged_record_without_an_index_costs_that_session_only(tmp_path: Path, closed: Sample) -> None:
    check(record_and_index(tmp_path / "store", closed), 3)


# the index


def test_a_flipped_bit_of_the_index_never_misleads_and_loses_nothing(tmp_path: Path, closed: Sample) -> None:
    check(index_flips(tmp_path / "store", closed, index_bits(closed.files[INDEX], 40)), 40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_flipped_bit_of_the_index_misleads_or_loses_anything(tmp_path: Path, closed: Sample, shard: int) -> None:
    size = len(closed.files[INDEX])
    bits = [8 * place + (place * 5 + SEED) % 8 for place in range(shard, size, SHARDS)]
    check(index_flips(tmp_path / "store", closed, bits, skip_unread=True), size // SHARDS)


def test_a_flipped_bit_of_an_index_with_a_log_loses_nothing(tmp_path: Path, killed: Sample) -> None:
    check(index_flips(tmp_path / "store", killed, index_bits(killed.files[INDEX], 12)), 12)


def test_a_flipped_bit_of_the_log_of_the_index_loses_nothing(tmp_path: Path, killed: Sample) -> None:
    check(index_flips(tmp_path / "store", killed, log_bits(killed.files[LOG]), file=LOG), 20)


@pytest.mark.parametrize("kind", ["closed", "killed"])
def test_an_index_that_is_gone_cut_or_noise_loses_nothing(
    tmp_path: Path, kind: str, other: Sample, request: pytest.FixtureRequest
) -> None:
    check(index_faults(tmp_path / "store", request.getfixturevalue(kind), other), 40)


def test_an_index_that_is_damaged_while_it_is_in_use_loses_nothing(tmp_path: Path, closed: Sample) -> None:
    check(damaged_while_open(tmp_path / "store", closed, 10), 10)


def test_damages_are_of_many_kinds(closed: Sample, killed: Sample, other: Sample) -> None:
    assert len(index_damages(closed, other)) > 20
    assert len(index_damages(killed, other)) > len(index_damages(closed, other)) + 8


# a model


def test_a_fault_in_the_middle_of_a_conversation_changes_no_token(tmp_path: Path) -> None:
    outcome = model_faults(tmp_path / "store", 10)
    check(outcome, 10)
    assert outcome.recomputed, "no fault made a difference"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_faults_in_the_middle_of_conversations_change_no_token(tmp_path: Path) -> None:
    outcome = model_faults(tmp_path / "store", 200, seed=SEED + 1)
    check(outcome, 200)
    assert outcome.recomputed >= 50
