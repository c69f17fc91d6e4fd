"""`attnstore bench` at a tiny size: what it reports is complete and right; no figure of time is asserted."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support import fresh
from typer.testing import CliRunner

from hf_attnstore.lab.bench import baselines, cli, figures, index_bench, pagecache
from hf_attnstore.lab.bench import rss as rss_module
from hf_attnstore.lab.bench.cli import app, parse_histories, parse_steps
from hf_attnstore.lab.bench.machine import ForeignLoad
from hf_attnstore.lab.bench.measure import PROBES, Measured, Workload, measure, same_tokens, step_order
from hf_attnstore.lab.bench.methods import METHODS, check_reuse
from hf_attnstore.lab.bench.report import TITLES, Result, as_markdown, as_record, tables, verdict_lines
from hf_attnstore.lab.bench.rss import Rss, RssJob, measure_rss
from hf_attnstore.lab.bench.shapes import BenchError, ModelSpec, choose_model, load_model, random_ids
from hf_attnstore.lab.bench.timing import Sample, page_faults, timed_generate

HISTORY, NEW, DECODE, BLOCK = 72, 8, 4, 16
TURNS = {method.key for method in METHODS} | {"first", "saving", "not_saving"}
SPEC = ModelSpec("tiny", None, "cpu", seed=0, max_tokens=HISTORY + NEW + DECODE + 1)


@pytest.fixture(scope="module")
def model():
    return load_model(SPEC)


@pytest.fixture(scope="module")
def measured(model, tmp_path_factory):
    """One tiny run in full, and the folder it left."""
    folder = tmp_path_factory.mktemp("bench")
    work = Workload(HISTORY, NEW, DECODE, repeats=2, seed=0)
    seen: list[tuple[str, int]] = []
    result = measure(model, work, folder, block_size=BLOCK, progress=lambda doing, total: seen.append((doing, total)))
    return result, folder, seen


# The whole of it


def test_every_method_is_measured_in_every_repeat(measured):
    result, _, _ = measured
    assert set(result.samples) == TURNS
    assert {len(samples) for samples in result.samples.values()} == {2}
    assert set(result.probes) == set(PROBES)
    assert {len(seconds) for seconds in result.probes.values()} == {2}
    assert len(result.evictions) == 2


def test_every_method_gives_the_tokens_of_plain_generate(measured):
    result, _, _ = measured
    plain = result.samples["recompute"][0].tokens
    assert len(plain) == DECODE + 1
    own_tokens = ("saving", "not_saving")  # these turns have new tokens of their own
    for key, samples in result.samples.items():
        if key not in own_tokens:
            assert {sample.tokens for sample in samples} == {plain}, key


def test_what_is_loaded_is_the_whole_history(measured):
    result, _, _ = measured
    tiny = 2 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, head dimension, bytes of float32
    assert result.kv_bytes == HISTORY * tiny
    for key in ("memory", "disk", "cold", "torch", "safetensors", "saving", "not_saving"):
        assert {sample.loaded_bytes for sample in result.samples[key]} == {result.kv_bytes}, key
    assert result.file_bytes > result.kv_bytes
    assert result.saved_bytes["first"] >= (HISTORY + NEW + DECODE) * tiny
    assert 0 < result.saved_bytes["saving"] < result.saved_bytes["first"]


def test_progress_ends_where_it_said(measured):
    _, _, seen = measured
    assert {total for _, total in seen} == {len(seen)}


def test_the_model_is_left_as_it_was(measured, model):
    assert "generate" not in vars(model)
    assert not model._forward_pre_hooks
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


def test_wrong_keys_and_values_stop_the_bench(model, tmp_path, monkeypatch):
    read = baselines.read_torch
    monkeypatch.setattr(baselines, "read_torch", lambda path: {name: tensor * 0 for name, tensor in read(path).items()})
    work = Workload(HISTORY, NEW, DECODE, repeats=1, seed=0)
    with pytest.raises(BenchError, match=r"torch\.load.*WRONG TOKENS"):
        measure(model, work, tmp_path, block_size=BLOCK, steps=("first", "kept", "torch"))


def test_a_few_steps_alone_have_plain_generate_and_a_kept_cache_beside_them(model, tmp_path):
    steps = parse_steps("disk")
    result = measure(model, Workload(HISTORY, NEW, DECODE, repeats=1, seed=0), tmp_path, block_size=BLOCK, steps=steps)
    assert {key: len(samples) for key, samples in result.samples.items()} == {"recompute": 1, "kept": 1, "disk": 1}
    assert len({samples[0].tokens for samples in result.samples.values()}) == 1
    assert result.samples["disk"][0].loaded_bytes == result.kv_bytes
    assert parse_steps(None) is None
    with pytest.raises(BenchError, match="not tape"):
        parse_steps("disk,tape")


def test_everything_is_computed_anew_in_as_many_repeats_as_are_asked_for(model, tmp_path):
    work = Workload(HISTORY, NEW, DECODE, repeats=3, seed=0, recompute=1)
    seen: list[tuple[str, int]] = []
    result = measure(
        model, work, tmp_path, block_size=BLOCK, steps=parse_steps("memory,first"), progress=lambda *at: seen.append(at)
    )
    counts = {key: len(samples) for key, samples in result.samples.items()}
    assert counts == {"recompute": 1, "first": 1, "kept": 3, "memory": 3}
    assert {total for _, total in seen} == {len(seen)}
    found = Result(result, {})
    assert any("in the first 1 of 3 repeats only" in note for note in found.notes)
    row = next(row for row in tables(found)[0].rows if row[0] == "store, from memory")
    assert row[3] == f"{result.samples['memory'][0].ttft / result.samples['recompute'][0].ttft:.3f}"


@pytest.mark.parametrize("mode", ["kept", "memory", "disk"])
def test_memory_is_measured_in_a_process_of_its_own(measured, mode, monkeypatch):
    monkeypatch.setattr(rss_module.subprocess, "run", fresh.run)
    result, folder, _ = measured
    job = RssJob(
        model=SPEC,
        mode=mode,
        history=HISTORY,
        new=NEW,
        decode=DECODE,
        seed=0,
        block_size=BLOCK,
        kv_bytes=result.kv_bytes,
        folder=str(folder),
        threads=1,
        tokens=result.samples["kept"][0].tokens,
    )
    rss = measure_rss(job)
    assert 50 * 2**20 < rss.loaded <= rss.peak
    assert rss.before <= rss.peak
    if mode == "memory":
        assert rss.blocks >= result.kv_bytes
    else:
        assert rss.blocks == 0


# The report


def test_the_report_names_every_method_and_every_bar(measured):
    result = Result(measured[0], {"kept": [Rss(1, 2, 100)], "memory": [Rss(1, 2, 120)]})
    text = as_markdown("tiny", dict.fromkeys(_MACHINE, "x"), {"torch": "1"}, [result])
    for title in [*TITLES.values(), *PROBES.values(), *(bar.text for bar in figures.BARS)]:
        assert title in text
    for table in tables(result):
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert len(verdict_lines(result.verdicts)) == len(figures.BARS)
    verdicts = {verdict.bar.key: verdict for verdict in result.verdicts}
    assert verdicts["rss_memory"].passed is True
    assert verdicts["rss_memory"].ratio.paired == pytest.approx(1.2)
    assert verdicts["rss_disk"].passed is None


_MACHINE = ("cpu", "cores", "torch_threads", "memory_gib", "system", "file_system")


def test_the_record_is_plain_json_with_the_raw_samples(measured):
    record = json.loads(json.dumps(as_record(Result(measured[0], {}))))
    assert record["history"] == HISTORY
    assert set(record["samples"]) == TURNS
    for samples in record["samples"].values():
        assert len(samples) == 2
        for sample in samples:
            assert set(sample) == {"ttft", "decode", "total", "setup", "load", "exposed", "loaded_bytes", "faults"}
            assert 0 < sample["ttft"] <= sample["total"]
            assert (sample["faults"] is None) == (page_faults() is None)
    assert [bar["key"] for bar in record["bars"]] == [bar.key for bar in figures.BARS]


@pytest.mark.skipif(page_faults() is None, reason="nobody counts page faults here")
def test_memory_that_is_fresh_shows(model):
    def fresh():
        torch.ones(64 << 20, dtype=torch.uint8)

    ids = random_ids(model, 8, (0,))
    used = [timed_generate(model, ids, 2, lambda: None)[0].faults for _ in range(4)]
    assert None not in used
    assert timed_generate(model, ids, 2, fresh)[0].faults >= min(used) + 32, "in pages of 2 MiB, if they are so large"


def test_the_command_writes_json_picture_and_markdown_and_cleans_up(tmp_path):
    disk, output = tmp_path / "disk", tmp_path / "out"
    arguments = [
        "--shape", "tiny", "--history", "40,72", "--new", str(NEW), "--decode", str(DECODE), "--repeats", "1",
        "--block-size", str(BLOCK), "--output", str(output), "--store", str(disk), "--no-rss", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed == json.loads((output / "bench-tiny.json").read_text())
    assert [result["history"] for result in printed["results"]] == [40, 72]
    assert {"torch", "transformers", "python"} <= set(printed["versions"])
    assert set(_MACHINE) <= set(printed["machine"])
    picture = (output / "bench-tiny.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 10_000
    assert "40 tokens of history" in (output / "bench-tiny.md").read_text()
    assert list(disk.iterdir()) == []


def test_a_missed_bar_changes_the_exit_code_only_when_asked(monkeypatch):
    monkeypatch.setattr(cli, "_bench", lambda *args, **options: True)
    assert CliRunner().invoke(app, []).exit_code == 0
    assert CliRunner().invoke(app, ["--check"]).exit_code == 1


def test_the_gpu_shape_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(app, ["--shape", "llama-8b"])
    assert done.exit_code == 2
    assert "needs a CUDA GPU" in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("shape", "name"),
    [("small", "some/model"), (None, None), ("huge", None)],
    ids=["both", "none", "unknown"],
)
def test_a_model_that_cannot_be_chosen_is_refused(shape, name):
    with pytest.raises(BenchError):
        choose_model(shape, name, max_tokens=10)


def test_histories_come_repeated_or_in_a_list():
    assert parse_histories(["4096, 16384", "8"]) == [4096, 16384, 8]
    for wrong in ("x", "0", "-3", "", "1.5"):
        with pytest.raises(BenchError):
            parse_histories([wrong])


# Figures and bars


def test_a_ratio_pairs_the_figures_of_a_repeat():
    found = figures.ratio([1.0, 20.0, 3.0], [1.0, 10.0, 2.0])
    assert found.paired == 1.5
    assert found.medians == 1.5
    assert (found.low, found.high) == (1.25, 1.75)
    assert figures.ratio([3.0, 2.0, 8.0], [1.0, 1.0, 4.0]).smallest == 2.0
    with pytest.raises(ValueError, match="nothing"):
        figures.ratio([], [])
    with pytest.raises(ValueError, match="nothing"):
        figures.ratio([1.0], [])
    # what takes long may be measured in the first repeats only
    assert figures.ratio([3.0, 9.0], [1.0]) == figures.ratio([3.0], [1.0])


def test_a_spread_is_median_and_middle_half():
    assert figures.spread([4.0]) == figures.Spread(4.0, 4.0, 4.0, 1)
    assert figures.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == figures.Spread(3.0, 2.0, 4.0, 5)


SERIES = {
    "ttft/kept": [1.0, 1.0, 1.0],
    "ttft/memory": [1.05, 1.05, 9.0],
    "ttft/disk": [1.2, 1.13, 1.0],
    "ttft/recompute": [30.0, 30.0, 30.0],
    "decode/kept": [2.0, 2.0, 2.0],
    "decode/memory": [2.1, 2.0, 1.9],
    "total/saving": [1.04, 1.04, 1.0],
    "total/not_saving": [1.0, 1.0, 1.0],
}


def test_bars_are_passed_up_to_their_limit_and_missed_above():
    passed = {verdict.bar.key: verdict.passed for verdict in figures.evaluate(SERIES, 4096)}
    assert passed == {
        "ttft_device": None,
        "ttft_memory": True,
        "ttft_disk": False,
        "ttft_recompute": True,
        "ttft_disk_recompute": True,
        "decode": True,
        "saving": False,
        "first": None,
        "rss_memory": None,
        "rss_disk": None,
    }


def test_the_bar_against_recompute_is_for_a_long_history():
    slow = {**SERIES, "ttft/recompute": [2.0, 2.0, 2.0]}
    assert {v.bar.key: v.passed for v in figures.evaluate(slow, 4096)}["ttft_recompute"] is False
    short = {v.bar.key: v for v in figures.evaluate(slow, 1024)}["ttft_recompute"]
    assert short.passed is None
    assert "4096" in short.why_not


# The parts


def test_each_repeat_has_every_step_once_in_an_order_of_its_own():
    steps = [str(number) for number in range(12)]
    orders = [step_order(steps, repeat, seed=3) for repeat in range(4)]
    assert all(sorted(order) == sorted(steps) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[2] == step_order(steps, 2, seed=3)


def test_steps_that_are_compared_come_one_after_the_other():
    steps = [str(number) for number in range(12)]
    together = {"2", "7", "11", "none of them"}
    orders = [step_order(steps, repeat, 3, together) for repeat in range(20)]
    assert all(sorted(order) == sorted(steps) for order in orders)
    places = [sorted(order.index(step) for step in ("2", "7", "11")) for order in orders]
    assert all(last - first == 2 for first, _, last in places)
    assert len({first for first, _, _ in places}) > 3
    assert len({tuple(step for step in order if step in together) for order in orders}) > 3


def test_other_tokens_are_an_error_except_where_a_kept_cache_gives_them_too():
    assert same_tokens("x", [1, 2], [1, 2], [1, 2], exact=True) is None
    for kept, exact in (([1, 3], True), ([1, 2], False), (None, True)):
        with pytest.raises(BenchError, match=r"WRONG TOKENS.*token 1 "):
            same_tokens("x", [1, 3], kept, [1, 2], exact=exact)
    assert "rounding" in str(same_tokens("x", [1, 3], [1, 3], [1, 2], exact=False))
    assert "rounding" in str(same_tokens("kept", [1, 3], None, [1, 2], exact=False))


@pytest.mark.parametrize(
    "change",
    [
        {"reused_tokens": 99},
        {"loaded_bytes": 500},
        {"blocks_from": {"memory": 1, "disk": 1}},
        {"blocks_from": {}},
    ],
)
def test_a_figure_for_something_else_is_refused(change):
    right = {"reused_tokens": 100, "loaded_bytes": 1000, "blocks_from": {"memory": 2, "disk": 0}}
    check_reuse(SimpleNamespace(stats=SimpleNamespace(**right)), "x", 100, 1000, "memory")
    with pytest.raises(BenchError):
        check_reuse(SimpleNamespace(stats=SimpleNamespace(**{**right, **change})), "x", 100, 1000, "memory")


def test_every_way_to_read_a_file_gives_the_kept_cache_back(model, tmp_path):
    with torch.inference_mode():
        ids = random_ids(model, HISTORY + NEW, (1,))
        kept = baselines.filled_cache(model, ids[:, :HISTORY])
        named = baselines.tensors_of(kept)
        baselines.write_torch(kept, tmp_path / "kept.pt")
        baselines.write_safetensors(kept, tmp_path / "kept.safetensors")
        expected, _ = timed_generate(model, ids, DECODE, lambda: copy.deepcopy(kept))
        for read in (
            baselines.read_torch(tmp_path / "kept.pt"),
            baselines.read_safetensors(tmp_path / "kept.safetensors"),
            baselines.read_safetensors_lean(tmp_path / "kept.safetensors"),
        ):
            assert set(read) == set(named)
            assert all(torch.equal(read[name], named[name]) for name in named)
            cache = baselines.cache_of(model, read, HISTORY)
            assert cache.get_seq_length() == HISTORY
            got, _ = timed_generate(model, ids, DECODE, lambda cache=cache: cache)
            assert got.tokens == expected.tokens


def test_bfloat16_files_are_read_without_a_map(tmp_path):
    cache = SimpleNamespace(layers=[SimpleNamespace(keys=torch.randn(1, 2, 3, 4).bfloat16(), values=torch.ones(2))])
    baselines.write_safetensors(cache, tmp_path / "x.safetensors")
    read, expected = (
        baselines.read_safetensors_lean(tmp_path / "x.safetensors"),
        load_file(tmp_path / "x.safetensors"),
    )
    assert all(torch.equal(read[name], expected[name]) for name in expected)


def test_plain_reads_fill_the_buffer_and_the_page_cache(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number + 1]) * 10_000)
    buffer = bytearray(20_000)
    assert pagecache.read_into(paths, memoryview(buffer)) > 0
    assert buffer == bytes([1]) * 10_000 + bytes([2]) * 10_000
    with pytest.raises(ValueError, match="buffer"):
        pagecache.read_into(paths, memoryview(bytearray(19_999)))
    if pagecache.resident_fraction(paths) is not None:
        assert pagecache.resident_fraction(paths) == 1.0
    pagecache.evict(paths)
    assert [path.stat().st_size for path in paths] == [10_000, 10_000]


def test_a_page_cache_that_was_not_dropped_is_reported():
    sample = Sample(1.0, 1.0, 2.0, 0.0, (1,), 0.5, 0.1, 10)
    kept = Measured(Workload(1, 1, 1, 1, 0), 10, samples={"cold": [sample]}, evictions=[(1.0, 0.9)])
    assert any("NOT fully dropped" in note for note in tables(Result(kept, {}))[0].notes)
    gone = replace(kept, evictions=[(1.0, 0.0)])
    assert any("really dropped" in note for note in tables(Result(gone, {}))[0].notes)
    unknown = replace(kept, evictions=[(None, None)])
    assert any("could not be checked" in note for note in tables(Result(unknown, {}))[0].notes)


def test_ids_are_seeded(model):
    assert torch.equal(random_ids(model, 20, (1, 2)), random_ids(model, 20, (1, 2)))
    assert not torch.equal(random_ids(model, 20, (1, 2)), random_ids(model, 20, (2, 1)))


def test_the_folder_of_a_report_is_made(tmp_path: Path, measured):
    from hf_attnstore.lab.bench.plot import draw

    draw("tiny", [Result(measured[0], {})], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_other_processes_and_missing_parts_are_reported():
    sample = Sample(1.0, 1.0, 2.0, 0.0, (1,))
    busy = Measured(Workload(1, 1, 1, 1, 0), 10, samples={"kept": [sample]}, others=0.3)
    found = as_record(Result(busy, {}, failure="no memory figures"))
    assert any("30%" in note for note in found["notes"])
    assert "no memory figures" in found["notes"]
    assert as_record(Result(replace(busy, others=0.0), {}))["notes"] == []


def test_the_load_of_others_is_a_share():
    others = ForeignLoad()
    sum(range(200_000))
    assert 0.0 <= others.share() <= 1.0


def test_bench_index_reports_growth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_bench.subprocess, "run", fresh.run)
    result = CliRunner().invoke(app, ["index", "--sizes", "700,1300", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "longest prefix" in result.output
    text = (tmp_path / "index.md").read_text()
    assert "700 blocks, 70 sessions" in text
    assert "1,300 blocks, 130 sessions" in text
    found = json.loads((tmp_path / "index.json").read_text())["figures"]
    assert [size["blocks"] for size in found] == [700, 1300]
    for size in found:
        assert all(len(size[name]) >= 5 for name in ("opening", "lookup", "commit", "listing", "victim"))
        assert size["file_bytes"] > 100_000
    assert (tmp_path / "index.png").stat().st_size > 10_000


def test_bench_store_compares_durability_and_encryption(tmp_path: Path) -> None:
    options = ["--layers", "1", "--blocks", "2", "--repeats", "1", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["store", *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "store.json").read_text())["speeds"]
    assert set(found) == {"as it comes", "durability=power", "encrypted", "encrypted, durability=power"}
    assert all(speeds["write"][0] > 0 and speeds["load"][0] > 0 for speeds in found.values())
    assert "encrypted" in (tmp_path / "store.md").read_text()
