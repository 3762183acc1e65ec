"""The benchmark's own tests: its clock, its judgement of rivals, its statistics, its files."""

import copy
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT
from optional import needs

from bench import plots, report
from bench.cases import PASSES, SUITES, Case, select
from bench.ceilings import floor_seconds
from bench.cells import PLAIN
from bench.cli import main
from bench.judge import allowed, inputs, reference
from bench.plots import KINDS, plot
from bench.results_file import FORMAT, load, times, write
from bench.rivals import HIDDEN, RIVALS, missing, refuses
from bench.rivals.gpurnn import build
from bench.rivals.prepared import Prepared
from bench.run import How, Worker, _run_case
from bench.run import run as run_cases

SMALL = Case("gru", 3, 2, 5, 4, what="train")


def invoke(*args):
    return CliRunner().invoke(main, list(map(str, args)))


# ---- cases


def test_suites_have_no_doubles_and_names_are_unique():
    for suite, (cases, _) in SUITES.items():
        names = [case.name for case in cases()]
        assert len(names) == len(set(names)) > 0, suite


def test_axes_replace_and_multiply():
    cases = select("quick", H=(10, 20), B=(3,), what=("train",), cell=("gru",))
    assert [(c.H, c.I, c.B, c.what, c.cell) for c in cases] == [
        (10, 10, 3, "train", "gru"),
        (20, 20, 3, "train", "gru"),
    ]


def test_flops_are_those_of_the_products():
    case = Case("lstm", 7, 3, 5, 4, L=2, bidirectional=True)
    for some in (case, Case("gru", 7, 3, 5, 4, what="step", V=11)):
        assert some.parameters == build(some, "numpy", "float32").parameter_count
    first = 2 * 7 * 3 * (4 * 5) * (4 + 5) * 2  # multiply-add; T, B; rows; columns; directions
    second = 2 * 7 * 3 * (4 * 5) * (10 + 5) * 2
    assert case.flops == first + second and case.steps == 14
    assert Case("lstm", 7, 3, 5, 4, L=3).steps == 9  # a layer may follow the one below by a step
    train = Case("lstm", 7, 3, 5, 4, L=2, bidirectional=True, what="train")
    assert train.flops == 3 * case.flops and train.steps == 28 and train.bytes > case.bytes


# ---- rivals


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("cell", PLAIN)
def test_rivals_agree_with_the_reference(cell, what, dtype):
    case = Case(cell, 6, 3, 9, 5, L=2, bidirectional=True, dtype=dtype, what=what, V=11 * (what == "step"))
    expected = reference(case, *inputs(case))
    assert len(expected) == {"train": 2 + 4 * 2, "step": 2 + 4 * 2}.get(what, 1)
    for name in ("gpurnn-cpu", "gpurnn-numpy", "onnxruntime", "jax", "torch-cpu"):
        if missing(name) or refuses(name, case):
            continue
        prepare = RIVALS[name][0]
        try:
            got = prepare(case, *inputs(case)).results()
        except RuntimeError as error:
            if name == "torch-cpu" and "could not create a primitive" in str(error):
                pytest.skip("torch has no bfloat16 LSTM for this processor")
            raise
        for key, value in expected.items():
            assert np.abs(got[key] - value).max() <= allowed(case) * np.abs(value).max(), (name, key)


@pytest.mark.long
@needs("torch")
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_rivals_agree_on_sequences_of_different_lengths(cell):
    case = Case(cell, 9, 5, 8, 8, what="train", ragged=True)
    assert case.lengths[0] == 9 and case.tokens == sum(case.lengths) < 45 and case.name.endswith("ragged float32 train")
    assert case.flops < Case(cell, 9, 5, 8, 8, what="train").flops
    expected = reference(case, *inputs(case))
    assert not expected["output"][case.lengths[1] :, 1].any()
    for name in ("gpurnn-cpu", "gpurnn-numpy", "torch-cpu"):
        if missing(name):
            continue
        got = RIVALS[name][0](case, *inputs(case)).results()
        for key, value in expected.items():
            assert np.abs(got[key] - value).max() <= allowed(case) * np.abs(value).max(), (name, key)
    assert refuses("jax", case) == "all sequences of one length" and refuses("torch-cpu", case) is None


@pytest.mark.slow
@needs("torch")
def test_torch_compile_agrees():
    """In a process of its own, as in a run: torch.compile leaves threads and pipes behind, which warn when they end."""
    cases = [Case("lstm", 6, 3, 9, 5, what="train"), Case("lstm", 6, 3, 9, 5, what="step", V=11)]
    document = run_cases(cases, ["torch-cpu-compile"], threads=1, rounds=1, seconds=0.001)
    for row in document["cases"]:
        result = row["results"]["torch-cpu-compile"]
        assert result["status"] == "timed" and result["error"] <= result["allowed"], result


@pytest.mark.skipif(missing("flashrnn-vanilla") is not None, reason=str(missing("flashrnn-vanilla")))
@pytest.mark.parametrize("what", ["inference", "forward", "train"])
@pytest.mark.parametrize("cell", PLAIN)
def test_flashrnn_gets_our_weights(cell, what):
    """Through its backend for the CPU: the order of gates, biases and axes."""
    case = Case(cell, 6, 3, 9, 5, what=what)
    got = HIDDEN["flashrnn-vanilla"][0](case, *inputs(case)).results()
    for key, value in reference(case, *inputs(case)).items():
        assert np.abs(got[key] - value).max() <= allowed(case) * np.abs(value).max(), key


def test_a_step_without_its_optimiser_is_seen(monkeypatch):
    case = Case("lstm", 6, 3, 9, 5, what="step", V=11)
    expected = reference(case, *inputs(case))
    assert expected["loss"][1] < expected["loss"][0]
    monkeypatch.setattr("gpurnn.Adam.step", lambda self: None)
    got = RIVALS["gpurnn-numpy"][0](case, *inputs(case)).results()
    assert abs(got["loss"] - expected["loss"]).max() > 10 * allowed(case) * expected["loss"].max()


@pytest.mark.long
@pytest.mark.parametrize("what", PASSES)
def test_products_are_a_bound_and_are_not_judged(what):
    case = Case("gru", 6, 3, 9, 5, L=2, bidirectional=True, what=what, V=11 * (what == "step"))
    document = run_cases([case], ["products"], threads=1, rounds=1, seconds=0.001)
    result = document["cases"][0]["results"]["products"]
    assert result["status"] == "timed" and result["bound"] and result["median_s"] > 0 and "error" not in result


def test_a_large_case_is_judged_by_the_gpu_where_there_is_one(monkeypatch):
    asked = []

    def rival(backend):
        return lambda case, *inputs: asked.append((backend, case.dtype)) or Prepared(None, dict)

    monkeypatch.setattr("bench.judge.gpurnn_rival", rival)
    monkeypatch.setattr("bench.judge.unavailable", lambda backend: None)
    for case in (SMALL, Case("lstm", 512, 128, 1024, 1024, dtype="bfloat16")):
        reference(case, None, None, None)
    assert asked == [("numpy", "float64"), ("cupy", "float64")]


@pytest.mark.long
def test_a_wrong_rival_is_refused_and_a_failing_one_reported(tmp_path):
    out = tmp_path / "run.json"
    document = run_cases([SMALL], ["gpurnn-numpy", "liar"], threads=1, rounds=1, seconds=0.001, out=out)
    results = document["cases"][0]["results"]
    assert results["gpurnn-numpy"]["status"] == "timed"
    assert results["liar"]["status"] == "wrong" and "off by 0.5" in results["liar"]["reason"]
    assert "samples" not in results["liar"]
    assert any("liar: wrong in 1 of 1 cases" in line for line in report.table(document))
    document = run_cases([Case("gru", 3, 2, 0, 4)], ["gpurnn-numpy"], threads=1, rounds=1)
    broken = document["cases"][0]["results"]["gpurnn-numpy"]
    assert broken["status"] == "failed" and "hidden_size should be at least 1" in broken["reason"]


def test_a_rival_whose_process_dies_is_reported():
    worker = Worker("gpurnn-numpy", 1)
    worker.process.kill()
    worker.process.wait()
    results = _run_case(SMALL, {"gpurnn-numpy": worker}, "right.npz", How(1, rounds=1, seconds=0.001))
    assert results["gpurnn-numpy"]["status"] == "failed" and "ended" in results["gpurnn-numpy"]["reason"]
    worker.close()


# ---- the clock


@pytest.mark.long
def test_a_sleep_is_measured():
    document = run_cases([SMALL], ["sleeper"], threads=1, rounds=3, seconds=0.1)
    samples = times(document["cases"][0]["results"]["sleeper"]["samples"])
    assert 0.02 <= min(samples) < 0.04  # the least disturbed of them; a busy machine adds milliseconds


# ---- statistics


def made(name, middle, noise, seed, count=15):
    draw = random.Random(seed)
    samples = [{"host_s": middle * (1 + noise * draw.uniform(-1, 1))} for _ in range(count)]
    row = {"status": "timed", "samples": samples, "median_s": middle}
    floors = {"cpu": [middle / 2, "products"]}
    return {
        "name": name, "case": SMALL.as_dict(), "floors": floors, "flops": 3e9, "bytes": 1e6, "steps": 6,
        "results": {"ours": row},
    }  # fmt: skip


def document(*rows):
    return {
        "format": FORMAT, "cases": list(rows), "started": "2026-01-01", "rounds": 15, "threads": 1,
        "environment": {"cpu": "a processor", "gpu": None, "numpy": "2", "blas": "blas"},
        "ceilings": {"cpu": {"flops": {"float32": 1e11}, "bytes": 1e10, "step": {}}, "gpu": None},
    }  # fmt: skip


def test_compare_finds_a_tenth_and_calls_noise_noise(tmp_path):
    old = document(made("same", 1.0, 0.05, 1), made("faster", 1.0, 0.05, 2), made("gone", 1.0, 0.1, 3))
    new = document(made("same", 1.0, 0.05, 4), made("faster", 0.9, 0.05, 5), made("slower", 2.0, 0.1, 6))
    rows = {row[0]: row for row in report.compare(old, new)}
    assert set(rows) == {"same", "faster"}
    assert not rows["same"][-1]
    assert rows["faster"][-1] and rows["faster"][2] == pytest.approx(1 / 0.9, rel=0.05)
    paths = [tmp_path / name for name in ("old.json", "new.json")]
    for path, content in zip(paths, (old, new), strict=True):
        write(path, content)
    done = invoke("compare", *paths)
    assert done.exit_code == 0 and "not significant" in done.output
    assert invoke("compare", *paths, "--fail-below", "0.9").exit_code == 0
    assert invoke("compare", *paths[::-1], "--fail-below", "0.98").exit_code == 1


def test_crossings():
    def row(B, a, b):
        results = {name: {"status": "timed", "median_s": t} for name, t in (("gpu", a), ("cpu", b))}
        return {"case": {"cell": "gru", "what": "train", "H": 64, "B": B}, "results": results}

    rows = [row(1, 9, 1), row(4, 1, 2), row(16, 3, 2), row(64, 1, 5), row(256, 1, 9)]
    assert report.crossings({"cases": rows}, "gpu", "cpu") == {("gru", "train", 64): 64}
    assert report.crossings({"cases": rows[:3]}, "gpu", "cpu") == {("gru", "train", 64): None}


@pytest.mark.slow
@needs("torch")
def test_crossover_runs():
    done = invoke("crossover", "--fast", "torch-cpu", "-H", 3, "-B", 1, "-B", 2, "--threads", 1)
    assert done.exit_code == 0, done.output
    assert done.output.count("torch-cpu is faster than gpurnn-cpu") == 6


@pytest.mark.skipif(missing("gpurnn-cuda") is None, reason="there is a GPU here")
def test_crossover_without_a_gpu_says_so():
    done = invoke("crossover")
    assert done.exit_code == 1 and "gpurnn-cuda cannot run here" in done.output


# ---- files


@pytest.mark.slow
@needs("torch")
@needs("matplotlib")
def test_run_show_plot_report(tmp_path):
    out = tmp_path / "run.json"
    axes = ("--cell", "rnn", "-T", 3, "-B", 2, "-H", 4, "--rival", "gpurnn-cpu", "--rival", "torch-cpu")
    done = invoke("run", *axes, "--rounds", 2, "--seconds", 0.001, "--out", out)
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text())
    assert written["format"] == FORMAT and written["environment"]["numpy"] == np.__version__
    results = [r for row in written["cases"] for r in row["results"].values()]
    assert all(len(r["samples"]) == 2 and r["peak_host_bytes"] > 10**7 and r["setup_s"] > 0 for r in results)
    assert "torch-cpu" in invoke("show", out).output
    assert "| rnn T3 B2 I4 H4 float32 train |" in invoke("report", out).output
    for kind in KINDS:
        picture = Path(invoke("plot", out, "--kind", kind).output.strip())
        assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size > 5000, kind
    page = tmp_path / "page.html"
    assert invoke("report", out, "--html", page).exit_code == 0
    text = page.read_text()
    assert "rnn T3 B2 I4 H4 float32 train" in text and text.count("<svg") >= 3
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "https://matplotlib.org", ""
    ).replace("http://creativecommons.org", "")  # nothing is fetched: these are names in SVG's own headers


def test_cases_are_picked_by_name():
    assert "no case of this suite has V77" in invoke("run", "--suite", "applications", "--only", "V77").output


def test_what_is_no_results_file_is_refused(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    assert "expected a benchmark file" in str(invoke("show", path).exception)


@pytest.mark.long
def test_a_killed_run_leaves_a_valid_file(tmp_path):
    out = tmp_path / "run.json"
    command = [
        sys.executable,
        "-m",
        "bench",
        "run",
        "--cell",
        "rnn",
        "--rival",
        "gpurnn-numpy",
        "--rounds",
        "50",
        "--out",
    ]
    process = subprocess.Popen([*command, str(out)], cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not out.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = load(out)
    assert 1 <= len(found["cases"]) < 6
    assert found["command"].endswith("--out run.json")  # results are committed: no folder of one machine


def test_the_command_is_part_of_gpurnn():
    from gpurnn.cli import main as gpurnn

    done = CliRunner().invoke(gpurnn, ["bench", "list"])
    assert done.exit_code == 0 and "kernelbench" in done.output
    assert "bench" in CliRunner().invoke(gpurnn, ["--help"]).output


def test_the_list_has_no_glued_names_and_fits_the_terminal():
    lines = invoke("list").output.splitlines()
    assert max(map(len, lines)) <= 80
    for name in (*SUITES, *RIVALS):
        assert any(re.match(rf"{re.escape(name)} {{2,}}\S", line) for line in lines), name


def test_the_help_shows_summaries_whole():
    output = CliRunner().invoke(main, ["--help"]).output.partition("Commands:")[2]
    assert "..." not in output and "worker" not in output
    assert "a panel for each cell and pass." in " ".join(output.split())


@pytest.mark.long
def test_what_beats_its_floor_is_marked_wherever_it_is_shown(tmp_path, monkeypatch):
    """The time of one case is a fifth less than its floor allows, and the other's is twice its floor."""
    both = document(made("impossible", 1.0, 0.0, 1), made("possible", 1.0, 0.0, 1))
    both["cases"][0]["floors"]["cpu"] = [1.25, "bytes"]
    both["cases"][0] |= {"flops": 1.25e10, "bytes": 1.25e10}  # above the roof of 1e10 bytes/s, by as much
    lines = list(report.table(both))
    assert lines[1].endswith(" 125%!") and lines[2].endswith(" 50%")
    text = " ".join(" ".join(lines).split())
    assert "!: faster than the floor, 1 times: " in text and text.endswith("on an idle machine")
    assert sum("125%!" in line for line in report.markdown(both)) == 1
    assert any(line.startswith("!: faster") for line in report.markdown(both))
    assert not any("!" in line for line in report.markdown(document(made("possible", 1.0, 0.0, 1))))
    rings = []
    monkeypatch.setattr(plots, "_ring", lambda axis, points, what: rings.append((what, list(points))))
    plot(both, tmp_path / "x.png", "roofline")
    plot(both, tmp_path / "x.png", "size")
    assert rings == [("above the roof", [(1.0, 1.25e10)]), ("below the floor", [(0, 1e6 / 6)])]


@pytest.mark.long
@pytest.mark.parametrize("kind, text", [("size", "below the floor"), ("roofline", "above the roof")])
@pytest.mark.parametrize("times_the_floor", [0.8, 2.0])
def test_a_ring_says_to_measure_again(tmp_path, kind, text, times_the_floor):
    one = document(made("a case", 1.0, 0.0, 1))
    one["cases"][0]["floors"]["cpu"][0] = 1 / times_the_floor
    one["cases"][0] |= {"flops": 1e11 / times_the_floor, "bytes": 1.0}
    plot(one, tmp_path / "x.svg", kind)
    label = f"<!-- {text}: a rate was measured too low, measure again -->"
    assert (label in (tmp_path / "x.svg").read_text()) == (times_the_floor < 1)


def test_the_table_fits_the_terminal():
    one = document(made("a case with a rather long name, as they are", 1.0, 0.05, 1))
    one["cases"][0]["results"] |= {f"rival {k}": one["cases"][0]["results"]["ours"] for k in range(4)}
    narrow, wide = list(report.table(one)), list(report.table(one, columns=200))
    assert max(map(len, narrow)) <= 80 and len(narrow) == 1 + 5 + 2
    assert len(wide) == 4 and wide[1].count("1.00x") == 4


def test_floors_name_what_sets_them():
    slow, fast = (
        {"flops": {"float32": 1e9}, "bytes": 1e12, "step": {}},
        {"flops": {"float32": 1e15}, "bytes": 1e3, "step": {}},
    )
    case = Case("lstm", 10, 4, 16, 16)
    assert floor_seconds(case, slow) == (case.flops / 1e9, "products")
    assert floor_seconds(case, fast) == (case.bytes / 1e3, "bytes")
    gpu = {"flops": {"float32": 1e15, "tf32": 1e15}, "bytes": 1e15, "step": {"block": 1e-7, "grid": 1e-6}}
    assert floor_seconds(case, gpu) == (10 * 1e-7, "steps")
    assert floor_seconds(Case("lstm", 10, 4, 1024, 16, precision="tf32"), gpu) == (10 * 1e-6, "steps")
    assert floor_seconds(Case("lstm", 10, 4, 16, 16, dtype="float16"), gpu) is None


def test_pages_are_filled_from_results(tmp_path):
    both = document(made("one", 1.0, 0.0, 1), made("two", 3.0, 0.0, 1))
    for row, other in zip(both["cases"], (2.0, 1.5), strict=True):
        row["results"]["theirs"] = made("x", other, 0.0, 1)["results"]["ours"]
        row["results"]["bound"] = made("x", 0.5, 0.0, 1)["results"]["ours"]
    both["cases"][1]["case"] = SMALL.as_dict() | {"B": 9}
    write(tmp_path / "x.json", both)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench x.json ours theirs bound -->\nold\n<!-- end -->\nafter\n")
    assert invoke("readme", page, "--results", tmp_path, "--check").exit_code == 1
    assert "changed" in invoke("readme", page, "--results", tmp_path).output
    text = page.read_text()
    assert "| 2, 5 | 2.00 (4.00) |\n| 9, 5 | 0.50 (3.00) |\n<!-- end -->\nafter" in text and "old" not in text
    assert invoke("readme", page, "--results", tmp_path, "--check").exit_code == 0
    page.write_text("<!-- bench x.json -->\nno end\n")
    assert "has no <!-- end -->" in str(invoke("readme", page, "--results", tmp_path).exception)


def test_one_pass_is_shown_where_a_page_asks_for_it():
    both = document(made("one", 1.0, 0.0, 1), made("two", 3.0, 0.0, 1))
    both["cases"][1]["case"] = SMALL.as_dict() | {"what": "inference"}
    for row in both["cases"]:
        row["results"]["theirs"] = row["results"]["bound"] = made("x", 2.0, 0.0, 1)["results"]["ours"]
    table = ["| B, H | gru train |", "|---|---:|", "| 2, 5 | 2.00 |"]
    assert list(report.summary(both, "ours", "theirs", "-", "train")) == table
    assert list(report.summary(both, "ours", "theirs", "bound", "inference"))[2] == "| 2, 5 | 0.67 (1.00) |"


def test_the_pages_say_what_the_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert invoke("readme", "--check").exit_code == 0, "python -m bench readme"


def test_a_table_of_nothing_and_a_plot_of_nothing(tmp_path):
    empty = document(made("one", 1.0, 0.0, 1))
    empty["cases"][0]["results"] = {"ours": {"status": "wrong", "reason": "off"}}
    assert list(report.table(empty)) == ["nothing was timed", "ours: wrong in 1 of 1 cases: off"]
    with pytest.raises(ValueError, match="nothing was timed"):
        plot(empty, tmp_path / "x.png")
    assert "<svg" not in report.html({"x": empty})


def test_documents_are_not_changed_by_reading():
    one = document(made("same", 1.0, 0.05, 1))
    before = copy.deepcopy(one)
    list(report.table(one))
    assert one == before


def test_the_python_of_a_call_is_measured_without_a_gpu(monkeypatch):
    from bench import host

    monkeypatch.setattr(host.measure, "__defaults__", (1, 2))
    done = CliRunner().invoke(main, ["host", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.output)
    assert list(found) == list(host.CASES)
    for seconds in found.values():  # how many says nothing on a busy machine
        assert seconds.keys() == {"inference", "train"} and min(seconds.values()) > 0
    table = CliRunner().invoke(main, ["host"]).output.splitlines()
    assert len(table) == 1 + len(host.CASES) and max(map(len, table)) <= 60


@pytest.mark.parametrize("case", ["lstm block", "lstm grid", "lstm step, recorded"])
def test_the_device_that_launches_nothing_takes_the_schedule_that_it_names(case):
    import gpurnn
    from bench import host
    from gpurnn.backends.cuda.ops import CudaOps

    kind, options = host.CASES[case]
    sizes = host.I, options.get("hidden_size", host.H)
    layer = getattr(gpurnn, kind)(*sizes, schedule=options["schedule"], backend=CudaOps(host.Device()))
    assert layer.plan(host.T, host.B).schedule == case.split()[1].rstrip(",")
