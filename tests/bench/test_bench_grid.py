"""Suite ``grid``: its sums and pictures, how few turns slow rivals get, floors of caches, runs clocked one by one."""

import ctypes
import math
import os
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from optional import needs

from bench import grid, rates, report
from bench.cases import SUITES, Case, select
from bench.ceilings import floor_seconds
from bench.cli import main
from bench.judge import allowed, inputs, reference
from bench.latency import clock_runs, latency, latency_table, summary
from bench.plots import plot
from bench.results_file import FORMAT, load, machine_line, write
from bench.rivals import RIVALS, missing, refuses
from bench.rivals.prepared import Prepared, prepare_jax
from bench.run import How, environment_of, merged

onnxruntime = pytest.mark.skipif(missing("onnxruntime") is not None, reason=str(missing("onnxruntime")))
compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


def invoke(*args):
    return CliRunner().invoke(main, list(map(str, args)))


def result(seconds, turns=3):
    return {"status": "timed", "samples": [{"host_s": seconds}] * turns, "median_s": seconds}


def row(cell, B, H, what="inference", floor=0.5, **seconds):
    case = Case(cell, 50, B, H, H, what=what)
    results = {name.replace("_", "-"): result(value) for name, value in seconds.items()}
    floors = {"cpu": [floor, "weights"]}
    return {"name": case.name, "case": case.as_dict(), "steps": case.steps, "floors": floors, "results": results}


def document(*rows, **more):
    return {
        "format": FORMAT, "cases": list(rows), "started": "2026-01-01", "rounds": 5, "threads": 1,
        "environment": {"cpu": "a processor", "gpu": None, "numpy": "2", "blas": "blas"},
    } | more  # fmt: skip


FOUR = document(
    row("lstm", 1, 64, gpurnn_cpu=1.0, torch_cpu=4.0, onnxruntime=2.0, gpurnn_numpy=0.1),  # 2
    row("lstm", 8, 64, gpurnn_cpu=2.0, torch_cpu=1.0, jax=3.0),  # 0.5
    row("gru", 1, 128, gpurnn_cpu=1.0, torch_cpu=8.0, jax=9.0),  # 8
    row("gru", 8, 128, gpurnn_cpu=1.0, onnxruntime_int8=0.1),  # nobody competes
    row("gru", 1, 128, "train", gpurnn_cpu=1.0, torch_cpu=5.0),
)


# ---- the cases


def test_the_grid_is_what_it_says():
    cases = SUITES["grid"][0]()
    assert len(cases) == 3 * 8 * 5 * 2 and {case.T for case in cases} == {50} and all(c.I == c.H for c in cases)
    assert {case.B for case in cases} == {1, 2, 4, 8, 16, 32, 64, 128} and {case.L for case in cases} == {1}
    assert {case.H for case in cases} == {64, 128, 256, 512, 1024}
    assert len(select("grid", B=(1, 4), cell=("gru",))) == 2 * 5 * 2


# ---- what points say


def test_the_best_of_the_others_counts():
    found = grid.points(FOUR, "inference")
    assert [(point.other, point.value) for point in found] == [
        ("onnxruntime", 2.0), ("torch-cpu", 0.5), ("torch-cpu", 8.0),
    ]  # fmt: skip
    assert [point.floor for point in found] == [2.0, 4.0, 2.0] and found[1].interval == (0.5, 0.5)
    assert grid.geometric_mean([point.value for point in found]) == pytest.approx(2.0)
    alone = grid.points(FOUR, "inference", "gpurnn-cpu", ("onnxruntime-int8",))
    assert [point.value for point in alone] == [0.1]
    quantized = document(row("lstm", 1, 64, gpurnn_cpu_int8=1.0, onnxruntime=3.0))
    (point,) = grid.points(quantized, "inference", "gpurnn-cpu-int8")
    assert (point.value, point.floor) == (3.0, None)


def test_the_table_of_a_grid():
    lines = list(grid.lines(FOUR, "inference"))
    assert lines[:2] == ["| inference, H | B 1 | B 8 |", "|---|---:|---:|"]
    assert lines[2:5] == ["| lstm 64 | 2.00 | 0.50 |", "| gru 128 | 8.00 | - |", ""]
    assert lines[5] == "3 points: geometric mean 2.00; 1 below 1, of 1 the whole interval."
    assert lines[6].startswith("Beside torch-cpu alone: 3 points: geometric mean 2.52;")  # of 4, 1/2 and 8
    assert [line.split()[1] for line in lines[7:9]] == ["onnxruntime", "jax"]
    slowest = "| lstm B8 H64 | torch-cpu | 1,000,000 us | 2,000,000 us | 0.50 [0.50, 0.50] | 4.00 |"
    assert lines[9] == "" and lines[12] == slowest and len(lines) == 15
    with pytest.raises(ValueError, match="no case of the pass step has times of gpurnn-cpu and of torch-cpu"):
        list(grid.lines(FOUR, "step"))


def test_an_interval_over_one_is_not_surely_slower():
    noisy = row("rnn", 1, 64, gpurnn_cpu=1.0, torch_cpu=1.0)
    noisy["results"]["torch-cpu"]["samples"] = [{"host_s": value} for value in (0.8, 0.9, 1.3)]
    noisy["results"]["torch-cpu"]["median_s"] = 0.9
    assert "1 below 1, of 0 the whole interval." in "\n".join(grid.lines(document(noisy), "inference"))


def test_the_table_of_floors():
    lines = list(
        grid.floor_lines(document(row("rnn", 1, 64, floor=0.8, gpurnn_cpu=1.0), FOUR["cases"][0]), "inference")
    )
    assert lines[2:] == ["| rnn 64 | 1.25 |", "| lstm 64 | 2.00 |", "", "2 points: geometric mean 1.58; 1 at most 1.3."]
    with pytest.raises(ValueError, match="no case of the pass train"):
        list(grid.floor_lines(document(FOUR["cases"][0]), "train"))


def test_the_overview_has_a_row_for_each_file_and_pass():
    other = document(row("rnn", 1, 64, "train", floor=0.9, gpurnn_cpu=1.0, jax=0.8), threads=2, isa="avx512")
    assert list(grid.overview([FOUR, other]))[2:] == [
        "| 1 | inference | 3 | 2.00 | 1 | 1 | lstm B8 H64: 0.50 | 0 |",
        "| 1 | train | 1 | 5.00 | 0 | 0 | gru B1 H128: 5.00 | 0 |",
        "| 2, avx512 | train | 1 | 0.80 | 1 | 1 | rnn B1 H64: 0.80 | 1 |",
    ]


def test_pages_show_grids_and_floors(tmp_path):
    write(tmp_path / "x.json", FOUR)
    marker = "<!-- bench x.json+x.json {} -->\n<!-- end -->\n"
    assert report.fill(marker.format("overview"), tmp_path).count("| gru B1 H128: 5.00 |") == 2
    with pytest.raises(ValueError, match="only an overview takes several files"):
        report.fill(marker.format("grid train"), tmp_path)
    text = "".join(f"<!-- bench x.json {words} -->\n<!-- end -->\n" for words in ("grid train", "floor inference"))
    filled = report.fill(text, tmp_path)
    assert "| gru 128 | 5.00 |" in filled and "| lstm 64 | 2.00 | 4.00 |" in filled


@needs("matplotlib")
def test_a_heat_map_has_a_number_in_each_square(tmp_path):
    plot(FOUR, tmp_path / "x.svg", "heat")
    text = (tmp_path / "x.svg").read_text()
    for number in ("2.00", "0.50", "8.00", "5.00"):
        assert text.count(f"<!-- {number} -->") == 1, number
    with pytest.raises(ValueError, match="no case was timed for gpurnn-cpu and for one of torch-cpu"):
        plot(document(FOUR["cases"][3]), tmp_path / "x.svg", "heat")
    assert invoke("plot", _written(tmp_path, FOUR), "--kind", "heat").output.strip().endswith("x.heat.png")
    assert (tmp_path / "x.heat.png").read_bytes()[:4] == b"\x89PNG"


def _written(folder, content):
    write(folder / "x.json", content)
    return folder / "x.json"


# ---- a run


def test_slow_rivals_have_fewer_turns():
    how = How(1, rounds=6, seconds=0.03, limit=2.0)
    assert how.turns({"a": {"host_s": 0.001}, "b": {"host_s": 0.01}}) == {"a": 6, "b": 6}
    assert how.turns({"a": {"host_s": 0.5}, "b": {"host_s": 0.7}, "c": {"host_s": 0.8}}) == {"a": 4, "b": 3, "c": 1}
    bytes_win = {"a": {"host_s": 0.5}, "b": {"host_s": 0.6}, "b-int8": {"host_s": 0.2}}
    assert how.turns(bytes_win) == {"a": 4, "b": 3, "b-int8": 6}  # only the like are compared
    assert How(1, rounds=6).turns({"a": {"host_s": 1.0}, "b": {"host_s": 9.0}}) == {"a": 6, "b": 6}
    assert How(1, rounds=2, limit=0.1).turns({"a": {"host_s": 1.0}}) == {"a": 2}


def test_the_line_of_a_machine_says_how_many_turns_there_were():
    mixed = document(row("rnn", 1, 64, gpurnn_cpu=1.0), limit=1.0, isa="avx2")
    mixed["cases"][0]["results"]["jax"] = result(1.0, turns=1)
    assert "1 threads, avx2;" in machine_line(mixed) and "median of 1 to 3 turns each." in machine_line(mixed)
    assert machine_line(FOUR).endswith("median of 5 turns each.")


@pytest.mark.long
def test_a_grid_is_timed_in_parts(tmp_path):
    """Two points through the command, then a third; what is there is not timed again unless it is asked for."""
    out = tmp_path / "grid.json"
    options = ("--suite", "grid", "--cell", "rnn", "-T", 3, "-H", 4, "--pass", "inference", "--rival", "gpurnn-cpu",
               "--rival", "gpurnn-numpy", "--threads", 1, "--isa", "baseline", "--rounds", 3, "--seconds", 0.001,
               "--limit", 0.01, "--out", out)  # fmt: skip
    assert invoke("run", *options, "-B", 1, "-B", 2, "--steps", 7, "--merge", "missing").exit_code == 0
    first = load(out)
    assert [r["name"] for r in first["cases"]] == [f"rnn T3 B{B} I4 H4 float32 inference" for B in (1, 2)]
    assert (first["isa"], first["threads"], first["limit"]) == ("baseline", 1, 0.01)
    ours = first["cases"][0]["results"]["gpurnn-cpu"]
    assert len(ours["samples"]) == 3 and ours["latency"]["steps"] == 10  # five turns of two
    assert invoke("run", *options, "-B", 2, "-B", 3, "--merge", "missing").exit_code == 0
    second = load(out)
    assert second["cases"][:2] == first["cases"] and len(second["cases"]) == 3 and len(second["merged"]) == 1
    assert invoke("run", *options, "-B", 2, "--merge", "all").exit_code == 0
    third = load(out)
    same = [a == b for a, b in zip(second["cases"], third["cases"], strict=True)]
    assert same == [True, False, True] and third["ceilings"] == first["ceilings"]
    refused = invoke("run", *options, "-B", 2, "--merge", "all", "--rounds", 4)
    assert refused.exit_code == 1 and "the file has rounds 3, this run 4: give another --out" in refused.output
    assert "give --out" in invoke("run", "--merge", "all").output
    lines = list(grid.lines(third, "inference", "gpurnn-cpu", "gpurnn-numpy"))
    assert lines[0] == "| inference, H | B 1 | B 2 | B 3 |" and lines[4].startswith("3 points: ")


def test_a_file_of_another_machine_is_not_added_to():
    new = {"threads": 1, "isa": None, "rounds": 5, "seconds": 0.1, "limit": None, "command": "x", "started": "today"}
    new["environment"] = {"cpu": "a processor", "gpu": None}
    assert merged(document(isa=None, seconds=0.1), new)["merged"][0]["command"] == "x"
    with pytest.raises(ValueError, match="the file is of a processor"):
        merged(document(seconds=0.1), new | {"environment": {"cpu": "another", "gpu": None}})
    with pytest.raises(ValueError, match="the file has isa None, this run avx2"):
        merged(document(seconds=0.1), new | {"isa": "avx2"})


def test_everybody_gets_the_threads_and_the_instruction_set(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    plain, bound, more = (environment_of(2, isa) for isa in (None, "avx2", "avx512"))
    assert {plain[f"{name}_NUM_THREADS"] for name in ("OMP", "OPENBLAS", "MKL", "GPURNN")} == {"2"}
    assert plain.get("GPURNN_ISA") is None and (bound["GPURNN_ISA"], more["GPURNN_ISA"]) == ("avx2", "avx512")
    assert bound["ONEDNN_MAX_CPU_ISA"] == "AVX2" and bound["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2"
    assert "ONEDNN_MAX_CPU_ISA" not in more
    for name in ("XLA_FLAGS", "OMP_NUM_THREADS", "JAX_PLATFORMS", "NPROC"):
        monkeypatch.setenv(name, environment_of(1, "avx2").get(name, ""))
    prepare_jax()
    assert os.environ["NPROC"] == "1" and os.environ["XLA_FLAGS"].startswith("--xla_cpu_max_isa=AVX2 --xla")


# ---- rivals


@onnxruntime
@pytest.mark.parametrize("name", ["onnxruntime-cell", "onnxruntime-cell-int8", "onnxruntime-int8"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_onnxruntime_agrees(cell, name):
    case = Case(cell, 1 if "cell" in name else 5, 3, 24, 24)
    if refuses(name, case):
        assert cell != "lstm" and name.endswith("int8")
        return
    expected = reference(case, *inputs(case))["output"]
    prepared = RIVALS[name][0](case, *inputs(case))
    first = prepared.results()["output"]
    prepared.run()  # goes on from the states before, which results() does not
    for got in (first, prepared.results()["output"]):
        assert np.abs(got - expected).max() <= allowed(case, name) * np.abs(expected).max()


@pytest.mark.parametrize("name", ["gpurnn-cpu-int8", "gpurnn-cpu-int8-stepper", "gpurnn-cpu-int8x8-stepper"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_weights_in_int8_agree(cell, name):
    if missing(name):
        pytest.skip(missing(name))
    case = Case(cell, 1 if name.endswith("stepper") else 5, 3, 24, 24)
    expected = reference(case, *inputs(case))["output"]
    error = np.abs(RIVALS[name][0](case, *inputs(case)).results()["output"] - expected).max()
    assert allowed(case) * np.abs(expected).max() < error <= allowed(case, name) * np.abs(expected).max()


@onnxruntime
def test_onnxruntime_goes_on_from_its_states():
    case = Case("lstm", 1, 2, 8, 8)
    weights, x, y = inputs(case)
    twice = Case("lstm", 2, 2, 8, 8)
    expected = reference(twice, weights, np.concatenate([x, x]), np.concatenate([y, y]))["output"][1]
    prepared = RIVALS["onnxruntime-cell"][0](case, weights, x, y)
    prepared.run()
    assert np.abs(prepared.run()[0, 0] - expected).max() <= allowed(twice)


def test_int8_is_judged_by_its_rounding():
    case = Case("lstm", 50, 1, 64, 64)
    assert allowed(case) < 0.001 < allowed(case, "onnxruntime-int8") == allowed(case, "gpurnn-cpu-int8-stepper") == 0.05
    assert refuses("onnxruntime-int8", case) is None and refuses("onnxruntime-cell", case)
    assert refuses("onnxruntime-int8", Case("gru", 50, 1, 64, 64)) == "quantizes no cell but the LSTM"
    assert refuses("onnxruntime-cell-int8", Case("lstm", 1, 1, 8, 8, what="train")) == "only inference"


# ---- floors


def test_the_floor_of_weights_is_the_cache_that_holds_them():
    ceilings = {"flops": {"float32": 1e12}, "bytes": 1.0, "step": {}, "threads": 2}
    ceilings["reads"] = [[1 << 13, 200e9], [1 << 18, 100e9], [1 << 24, 10e9]]
    small, large = Case("lstm", 50, 1, 64, 64), Case("lstm", 50, 1, 1024, 1024)
    assert small.weights_read == (4 * 64**2 * 4, 50 * 4 * 64**2 * 4)
    assert floor_seconds(small, ceilings) == (50 * 65536 / 200e9, "weights")  # 32 KiB a thread
    assert floor_seconds(large, ceilings) == (50 * 4 * 1024**2 * 4 / 100e9, "weights")  # 8 MiB a thread
    many = Case("lstm", 50, 128, 64, 64)
    assert floor_seconds(many, ceilings) == (many.flops / 1e12, "products")
    train, one = Case("gru", 50, 1, 64, 64, what="train"), Case("gru", 1, 1, 64, 64)
    assert train.weights_read == (3 * 64**2 * 4, 2 * 50 * 3 * 64**2 * 4)
    assert one.weights_read == (2 * 3 * 64**2 * 4,) * 2  # a stream reads W_ih in each step, too


def test_no_block_is_read_faster_than_smaller_ones():
    reads = [[8, 100.0], [16, 60.0], [32, 80.0], [64, 10.0]]
    found = {size: rates.read_rate(reads, size) for size in (1, 8, 15, 16, 32, 63, 64, 9999)}
    assert found == {1: 100, 8: 100, 15: 100, 16: 80, 32: 80, 63: 80, 64: 10, 9999: 10}


@compiler
def test_rates_count_what_the_loops_do(monkeypatch, tmp_path):
    counts, blocks = [], []
    monkeypatch.setattr(rates, "SIZES", (1 << 13, 1 << 29))
    monkeypatch.setattr(rates, "_block", lambda size: blocks.append(size))
    monkeypatch.setattr(rates, "_fastest", lambda calls: counts.append(len(calls)) or 10.0)
    found = rates.rates(2, "baseline")
    assert found == {"flops": 10 * 2 * 12 * 4 * 1e6, "reads": [[1 << 13, 10 * 2.0**28], [1 << 29, 10 * 2.0**29]]}
    assert counts == [2, 2, 2] and blocks == [1 << 13, 1 << 13, 1 << 29, 1 << 29]  # a block for each thread
    monkeypatch.setattr(rates.shutil, "which", lambda name: None)
    assert rates.rates(2, "baseline") is None


@compiler
def test_the_loops_read_and_multiply_everything(tmp_path):
    library = rates._compiled(shutil.which("cc"), 16, (), tmp_path)
    block = rates._block(1 << 13)
    assert block.nbytes == 1 << 13 and block.ctypes.data % 64 == 0
    assert library.read_block(ctypes.c_void_p(block.ctypes.data), (1 << 13) // 16, 3) == 3 * (1 << 13) // 16
    assert library.multiply(0) == sum(range(12)) and library.multiply(2) == sum(k / 4 + 1.5 for k in range(12))


def test_the_rate_of_several_threads_is_their_sum():
    calls = []
    assert rates._fastest([lambda: calls.append(1)] * 3) > 0 and len(calls) == 3 * rates._TURNS


# ---- runs clocked one by one


def test_runs_are_clocked_one_by_one():
    done = []
    found = clock_runs(Prepared(lambda: done.append("run"), None, lambda: done.append("wait")), 5)
    assert len(found) == 5 and all(isinstance(each, int) and each >= 0 for each in found)
    assert done.count("run") == 10 and done[-2:] == ["run", "wait"]  # five before them are not counted


def test_percentiles_are_of_all_turns():
    found = summary([[1000] * 98, [1000, 5000, 9000]])
    assert found["steps"] == 101 and found["p50_s"] == 1e-6 and found["p99_s"] == pytest.approx(5e-6)
    assert found["turns"][0] == [1e-6, 1e-6] and found["turns"][1][0] == 5e-6


def test_slow_rivals_make_fewer_runs_and_failing_ones_none():
    asked = []

    class Some:
        def __init__(self, answer):
            self.answer = answer

        def ask(self, case, do, count):
            asked.append(count)
            return self.answer or {"nanoseconds": [7] * count}

    results = {"fast": result(1e-6), "slow": result(4.0), "bad": result(1.0)}
    found = latency(None, {"fast": Some(None), "slow": Some(None), "bad": Some({"failed": "x"})}, results, 1000)
    assert found.keys() == {"fast", "slow"} and found["fast"]["steps"] == 1000 and asked[:2] == [200, 2]
    assert latency(None, {"fast": Some(None)}, results, 0) == {}


def test_the_table_of_latencies():
    one = row("lstm", 1, 64, gpurnn_cpu_stepper=1.0, torch_cell=1.0)
    one["results"]["torch-cell"]["latency"] = {"steps": 100000, "p50_s": 2.5e-6, "p99_s": 3e-3}
    assert list(latency_table(document(one)))[2] == "| lstm 1, 64 | 2.5 / 3,000.0 | 100,000 |"
    one["results"]["gpurnn-cpu-stepper"]["latency"] = {"steps": 50, "p50_s": 1e-6, "p99_s": 1e-6}
    assert list(latency_table(document(one), "torch-cell", "gpurnn-cpu-stepper", "jax"))[2] == (
        "| lstm 1, 64 | 2.5 / 3,000.0 | 1.0 / 1.0 | - | 50 to 100,000 |"
    )
    assert math.isclose(grid.geometric_mean([2.0, 8.0]), 4.0)
