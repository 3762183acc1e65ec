"""``bench on-gpu`` without a GPU: its deadline, its files under a kill, its processes, its choice, its rehearsal."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from bench import gpu_items, gpu_rehearsal, gpu_results, gpu_smoke, on_gpu, report
from bench.cases import Case
from bench.cli import main
from bench.gpu_cases import HEADLINE, KERNELS, PROBES, SMOKE, Smoke, from_dict, small, variants
from bench.gpu_items import Item
from bench.probe import MEASUREMENTS

ROOT = Path(__file__).resolve().parent.parent
emulated = pytest.mark.skipif(gpu_rehearsal.missing() is not None, reason=str(gpu_rehearsal.missing()))


def ask(order, seconds=5.0, group="g", name=None, needs=0.1):
    """An item that a process of kind "test" does."""
    return Item(group, name or json.dumps(order), gpu_items._asked("test", order), seconds, needs)


SLEEP = {"do": "sleep", "seconds": 0.01}


def run(folder, items, minutes=0.5, ends=None, part="A"):
    """One part over planted items, in this process: (exit code, its records)."""
    kept = {number: signal.getsignal(number) for number in on_gpu.SIGNALS}
    try:
        code = on_gpu.run_part(part, minutes, folder, True, lambda rehearsal, before: (items, ends or {}, "planted"))
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
    rows = on_gpu.latest(on_gpu.read(folder), part, True)
    assert [row["group"] for row in (rows[0], rows[-1])] == ["begin", "end"]
    return code, rows[1:-1]


def statuses(rows):
    return [row["status"] for row in rows]


# ---- time


def test_a_case_that_hangs_is_killed_at_its_limit_and_the_next_one_runs(tmp_path):
    code, rows = run(tmp_path, [ask(SLEEP), ask({"do": "hang"}, 1.0), ask(SLEEP)])
    assert code == 1 and statuses(rows) == ["right", "timed out", "right"]
    assert 1.0 <= rows[1]["seconds"] < 3 and "in 1.0 s: killed" in rows[1]["reason"]


@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL"])
def test_a_process_that_dies_is_told_and_the_next_case_runs(tmp_path, how):
    code, rows = run(tmp_path, [ask({"do": "die", "how": how}), ask({"do": "fail", "text": "no\nluck"}), ask(SLEEP)])
    assert code == 1 and statuses(rows) == ["failed", "failed", "right"]
    assert how in rows[0]["reason"] and rows[1]["reason"] == "ValueError: no luck"


def test_the_deadline_is_kept(tmp_path):
    items = [ask({"do": "sleep", "seconds": 0.8}, name=str(k), needs=1.0) for k in range(20)]
    start = time.monotonic()
    code, rows = run(tmp_path, items, minutes=8 / 60)
    taken = time.monotonic() - start
    assert code == 0 and taken < 8
    assert statuses(rows)[:2] == ["right", "right"] and statuses(rows)[-1] == "left out"
    assert len(rows) == 20 and "left of all" in rows[-1]["reason"]
    start = time.monotonic()
    code, rows = run(tmp_path, [ask({"do": "hang"}, 99)], minutes=7 / 60)
    assert time.monotonic() - start < 7 and code == 0
    assert statuses(rows) == ["left out"] and "cut short by the end" in rows[0]["reason"]  # no fault of the case


def test_a_group_gives_way_when_its_time_is_over(tmp_path):
    items = [ask({"do": "sleep", "seconds": 0.6}, name=str(k), group="first") for k in range(5)] + [ask(SLEEP)]
    _, rows = run(tmp_path, items, minutes=10 / 60, ends={"first": 0.1})
    assert statuses(rows)[0] == statuses(rows)[-1] == "right"
    assert statuses(rows)[3:5] == ["left out"] * 2 and rows[4]["reason"] == "the time of 'first' was over"


def test_a_process_that_does_not_start_is_not_tried_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu_workers.command_of", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    code, rows = run(tmp_path, [ask(SLEEP, name=str(k)) for k in range(4)])
    assert code == 1 and statuses(rows) == ["failed"] * 4
    assert "exit code 3 (at its start)" in rows[0]["reason"] and "not tried again" in rows[3]["reason"]


def test_an_error_of_the_script_itself_is_told(tmp_path):
    def broken(pool, seconds):
        raise KeyError("nothing")

    code, rows = run(tmp_path, [Item("g", "broken", broken, 1), ask(SLEEP)])
    assert code == 1 and statuses(rows) == ["failed", "right"] and "in the script itself" in rows[0]["reason"]


# ---- files


PLANTED = """
import sys, time
from bench import on_gpu
from bench.gpu_items import Item, _asked
order = {"do": "sleep", "seconds": 0.02}
items = [Item("g", f"case {k} " + "x" * 2000, _asked("test", order), 5, 0.1) for k in range(3000)]
sys.exit(on_gpu.run_part("A", 5, sys.argv[1], True, lambda *_: (items, {}, "planted")))
"""


def planted(folder):
    command = [sys.executable, "-c", PLANTED, str(folder)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def children(pid):
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            text = (folder / "stat").read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_at_any_moment_leaves_whole_lines(tmp_path, how):
    draw = random.Random(int(how))
    for n in range(4):
        process = planted(tmp_path)
        before = len(on_gpu.read(tmp_path))
        wait_for(lambda before=before: len(on_gpu.read(tmp_path)) >= before + 3)
        time.sleep(draw.uniform(0, 0.5))
        workers = children(process.pid)
        process.send_signal(how)
        errors = process.communicate(timeout=20)[1]
        lines = (tmp_path / on_gpu.RESULTS).read_bytes().split(b"\n")
        assert lines[-1] == b""  # a line is written by one call: none is cut
        rows = [json.loads(line) for line in lines[:-1]]
        assert rows == on_gpu.read(tmp_path) and len({row["run"] for row in rows}) == n + 1
        if how == signal.SIGTERM:
            assert process.returncode == 143, errors
            assert rows[-1]["group"] == "end" and rows[-1]["how"] == "stopped by SIGTERM"
            assert "stopped by SIGTERM after" in (tmp_path / on_gpu.LOG).read_text()
        if sys.platform == "linux":
            wait_for(lambda workers=workers: not any(Path(f"/proc/{pid}").exists() for pid in workers), 10)


def test_half_a_line_is_left_out_by_the_reader_and_cut_by_the_next_run(tmp_path):
    row = {"run": "1", "part": "A", "rehearsal": False, "group": "smoke", "name": "x", "status": "right"}
    (tmp_path / on_gpu.RESULTS).write_text(json.dumps(row) + "\n" + json.dumps(row)[:30])
    assert on_gpu.read(tmp_path) == [row]
    run(tmp_path, [ask(SLEEP)], part="B")
    rows = on_gpu.read(tmp_path)
    assert rows[0] == row and [r["part"] for r in rows] == ["A", "B", "B", "B"] and rows[1]["rehearsal"] is True


def test_records_are_json_whatever_is_in_them(tmp_path):
    journal = on_gpu.Journal(tmp_path, {"run": "1"})
    journal.record(
        worst=float("inf"), at=np.float32(1.5), index=np.arange(2).tolist(), inner={"x": [np.nan, np.int64(3)]}
    )
    journal.close()
    (row,) = on_gpu.read(tmp_path)
    assert row == {"run": "1", "worst": "inf", "at": 1.5, "index": [0, 1], "inner": {"x": ["nan", 3]}}


# ---- what is asked, and the choice of part B


def record(item, status, **more):
    base = {"run": "1", "part": "A", "rehearsal": False, "group": item.group, "name": item.name, "status": status}
    return base | {"parameters": item.parameters, "seconds": 1.0} | more


def all_records(**changed):
    items = [item for item in gpu_items.part_a(False)[0] if item.group in ("smoke", "headline")]
    return [record(item, changed.get(item.group, "right")) for item in items]


def test_the_lists_are_what_they_should_be():
    assert len(SMOKE) == 27 and {(case.cell, case.kernel) for case in SMOKE[:24]} == {
        (cell, kernel) for cell in ("lstm", "gru") for kernel in KERNELS
    }
    assert any(case.norm and case.I == 3 and case.H == 32 for case in SMOKE)
    assert any(case.ragged and case.dtype == "bfloat16" for case in SMOKE) and any(case.bidirectional for case in SMOKE)
    assert len(HEADLINE) == len(set(HEADLINE)) == 31 and set(PROBES) <= set(MEASUREMENTS)
    for case in (*SMOKE, *HEADLINE):
        assert from_dict(json.loads(json.dumps(case.as_dict()))) == case
        assert small(case).H < 60
        assert gpu_smoke.problems(case)
    items, ends, _ = gpu_items.part_a(False)
    assert list(dict.fromkeys(item.group for item in items)) == list(ends)


def test_part_b_follows_part_a():
    items, ends, decision = gpu_items.part_b(False, all_records())
    assert decision == "everything was right in part A" and not any(item.group == "headline" for item in items)
    assert {"ablation", "profile", "tune", "tests"} == {item.group for item in items} <= ends.keys()
    items, _, decision = gpu_items.part_b(False, [])
    assert "no part A here" in decision and len([item for item in items if item.group == "headline"]) == 31
    rows = all_records(headline="left out")
    rows[5]["status"] = "wrong"
    items, ends, decision = gpu_items.part_b(False, rows)
    assert decision.startswith("1 not right in part A") and SMOKE[5].name in decision
    groups = [item.group for item in items]
    assert groups[:2] == ["sanitizer"] * 2 and groups[-31:] == ["headline"] * 31 and set(groups) <= ends.keys()
    assert 5 <= groups.count("variants") <= 12


def test_a_wrong_large_case_is_looked_for_in_every_kernel():
    rows = all_records()
    rows[-5]["status"] = "timed out"
    items, _, _ = gpu_items.part_b(False, rows)
    looked = {from_dict(item.parameters).kernel for item in items if item.group == "variants"}
    assert looked == set(KERNELS)


def test_variants_change_one_thing():
    case = Smoke("lstm", "grid", "bfloat16", ragged=True)
    for other in variants(case):
        different = {key for key, value in other.as_dict().items() if value != case.as_dict()[key]}
        assert len(different) == 1, different
    assert variants(Smoke("gru", "step recorded", "float32"))[0].kernel == "step"


def test_part_b_reads_only_its_own_kind(tmp_path):
    with open(tmp_path / on_gpu.RESULTS, "w") as file:
        for row in all_records(smoke="wrong"):
            file.write(json.dumps(row) + "\n")
    seen = []
    choose = lambda rehearsal, before: (seen.append(before), ([], {}, ""))[1]  # noqa: E731
    for rehearsal in (False, True):
        on_gpu.run_part("B", 0.2, tmp_path, rehearsal, choose)
    for number in on_gpu.SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    assert [len(before) for before in seen] == [58, 0]


# ---- right and wrong


def test_a_wrong_result_names_its_first_index():
    rng = np.random.default_rng(0)
    expected = {"output": rng.normal(size=(4, 3, 5)), "dx": rng.normal(size=(4, 3, 2))}
    usual = {name: value * (1 + 1e-7) for name, value in expected.items()}
    got = {name: value.copy() for name, value in expected.items()}
    assert gpu_smoke.judge(got, usual, expected, "float32", 0)["status"] == "right"
    got["output"][2, 1, 3] += 0.01
    got["output"][3, 0, 0] = np.nan
    found = gpu_smoke.judge(got, usual, expected, "float32", 0)
    assert found["status"] == "wrong" and found["first_wrong"]["index"] == [2, 1, 3]
    assert found["first_wrong"]["wrong"] == 2 and found["worst"] == np.inf
    assert "output[2, 1, 3]: expected" in found["reason"] and "2 of 60 wrong" in found["reason"]


def test_results_are_compared_with_torchs(tmp_path):
    case, rng = Case("lstm", 8, 2, 16, 16, what="train"), np.random.default_rng(0)
    arrays = {"output": rng.normal(size=100), "dx": rng.normal(size=100)}
    for name, factor in (("ours", 1 + 1e-7), ("wrong", 1.01), ("nan", np.nan), ("torch", 1)):
        np.savez(tmp_path / f"{name}.npz", **{key: value * factor for key, value in arrays.items()})
    judged = {
        n: gpu_items.compare(case, tmp_path / f"{n}.npz", tmp_path / "torch.npz") for n in ("ours", "wrong", "nan")
    }
    assert [row["status"] for row in judged.values()] == ["right", "wrong", "wrong"]


class Silent:
    """Ops with nothing to say of recordings, or with an answer."""

    def __init__(self, rows=None):
        self.pool = type("Pool", (), {"free": {}})
        if rows is not None:
            self.recordings = lambda: rows


def test_recordings_are_asked_in_one_place():
    assert gpu_smoke.recordings(Silent()) == []
    rows = [{"loop": "x", "way": "forward", "recorded": False, "reason": "no"}]
    assert gpu_smoke.recordings(Silent(rows)) == rows


@emulated
@pytest.mark.parametrize("kernel", KERNELS)
def test_smoke_cases_take_the_kernel_they_name(kernel, monkeypatch):
    dtype = "bfloat16" if kernel.endswith("mma") else "float32"
    case = Smoke("gru", kernel, dtype, T=4, B=3, I=5, H=40, ragged=True)
    device, loaded = gpu_rehearsal.device(), []
    load = device.load
    monkeypatch.setattr(device, "load", lambda file, name: loaded.append(file) or load(file, name))
    found = gpu_smoke.run(case, device)
    assert found["status"] == "right", found
    assert kernel.split()[0] + ".cu" in loaded
    others = {name.split()[0] + ".cu" for name in KERNELS} - {kernel.split()[0] + ".cu"}
    assert not others & set(loaded)
    if kernel == "step recorded":
        assert found["recordings"] and all(row["recorded"] for row in found["recordings"])


@emulated
def test_a_planted_error_is_found_by_a_smoke_case():
    device = gpu_rehearsal.device()
    right = device.gemm

    def wrong(a, b, out, **how):
        right(a, b, out, **how)
        out *= 1.001

    device.gemm = wrong
    found = gpu_smoke.run(Smoke("gru", "step", "float32", T=4, B=3, I=5, H=8), device)
    assert found["status"] == "wrong" and found["first_wrong"]["array"] == "output", found
    assert found["first_wrong"]["expected"] == pytest.approx(found["first_wrong"]["got"], rel=0.01)


@emulated
def test_what_no_kernel_takes_is_left_out():
    found = gpu_smoke.run(Smoke("lstm", "block_mma", "float32", T=2, B=2, I=3, H=8), gpu_rehearsal.device())
    assert found == {"status": "left out", "reason": "block_mma has no tile for this size"}


# ---- the document for the README


def finished(tmp_path, rehearsal=False):
    """A folder with the records of a part A, times planted."""
    row = {"run": "1", "part": "A", "rehearsal": rehearsal}
    machine = {"cpu": "a processor", "cpus": 16, "numpy": "2", "blas": "blas", "gpu": {
        "name": "a GPU", "driver": "580", "cuda": 13000, "cupy": "14"}}  # fmt: skip
    rows = [
        row | {"group": "begin", "name": "part A", "status": "done", "started": "2026-01-01T00:00:00Z"},
        row | {"group": "versions", "name": "versions", "status": "done", "environment": machine, "sources": "abc",
               "torch": "2", "torch_cuda": "13", "cudnn": 91000, "nvrtc": [13, 0]},
        row | {"group": "probe", "name": "hop_all", "status": "right", "probe": {"8 blocks": {"seconds": 1e-6}}},
        row | {"group": "probe", "name": "copy", "status": "right", "probe": {"bytes_per_second": 4e12}},
    ]  # fmt: skip
    for item in gpu_items.part_a(False)[0]:
        if item.group == "smoke":
            rows.append(row | {"group": "smoke", "name": item.name, "status": "right", "parameters": item.parameters})
        if item.group == "headline":
            rivals = {kind: {"setup_s": 1.0, "samples": [{"device_s": s, "host_s": s}] * 3}
                      for kind, s in (("gpurnn", 1e-3), ("torch", 3e-3))}  # fmt: skip
            rows.append(row | {"group": "headline", "name": item.name, "status": "right", "worst": 0.01, "where": "dx",
                               "allowed": 0.1, "parameters": item.parameters, "rivals": rivals})  # fmt: skip
    rows[-1] |= {"status": "failed", "reason": "no luck", "rivals": {}}
    (tmp_path / on_gpu.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_results_become_a_document_and_a_table(tmp_path):
    finished(tmp_path)
    out = tmp_path / "results" / "gpu.json"
    done = CliRunner().invoke(main, ["on-gpu", "--collect", str(tmp_path), "--to", str(out)])
    assert done.exit_code == 0, done.output
    document = report.load(out)
    assert document["environment"]["cudnn"] == 91000 and document["environment"]["nvrtc"] == [13, 0]
    assert document["ceilings"]["gpu"]["step"] == {"grid": 1e-6} and len(document["smoke"]) == 27
    page = tmp_path / "page.md"
    marks = ("gpu.json", "gpu.json gpurnn-cuda torch-cuda", "gpu.json probe")
    page.write_text("".join(f"<!-- bench {mark} -->\nold\n<!-- end -->\n" for mark in marks))
    assert CliRunner().invoke(main, ["readme", str(page), "--results", str(out.parent)]).exit_code == 0
    text = page.read_text()
    assert "a GPU, driver 580, CUDA 13000, CuPy 14" in text and "cuDNN 91000" in text and "old" not in text
    assert "27 of 27 layers agree with float64, forward and backward." in text
    assert f"| {HEADLINE[0].name} | 1,000 us" in text and "3,000 us 0.33x" in text and "failed" in text
    assert "| 16, 768 | 3.00" in text and "| hop_all | 8 blocks: 1,000 ns |" in text


def test_a_rehearsal_never_becomes_a_table(tmp_path):
    finished(tmp_path, rehearsal=True)
    done = CliRunner().invoke(main, ["on-gpu", "--collect", str(tmp_path), "--to", str(tmp_path / "x.json")])
    assert done.exit_code == 1 and "rehearsal" in done.output and not (tmp_path / "x.json").exists()
    lines = list(gpu_results.lines(on_gpu.read(tmp_path)))
    assert "REHEARSAL" in lines[0] and not any("us " in line and "1,000" in line for line in lines)
    finished(tmp_path)
    on_gpu.collected(tmp_path, tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps(json.loads((tmp_path / "x.json").read_text()) | {"rehearsal": True}))
    with pytest.raises(ValueError, match="rehearsal"):
        report.fill("<!-- bench x.json -->\n<!-- end -->", tmp_path)


def test_the_folder_is_where_out_says(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(on_gpu, "run_part", lambda part, minutes, out, *_, **__: seen.append((part, minutes, out)) or 0)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert CliRunner().invoke(main, ["on-gpu", "--part", "B", "--minutes", "5"]).exit_code == 0
    monkeypatch.delenv("OUT")
    CliRunner().invoke(main, ["on-gpu"])
    assert seen[0] == ("B", 5.0, str(tmp_path)) and seen[1][:2] == ("A", 5.5) and seen[1][2].startswith("gpu-20")


# ---- the rehearsal


@emulated
@pytest.mark.slow
def test_both_parts_rehearse(tmp_path):
    command = [sys.executable, "-m", "bench", "on-gpu", "--rehearse", "--minutes", "1.5", "--out", str(tmp_path)]
    for part in "AB":
        start = time.monotonic()
        done = subprocess.run([*command, "--part", part], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert time.monotonic() - start < 93 and done.returncode in (0, 1), done.stderr
        rows = on_gpu.latest(on_gpu.read(tmp_path), part, True)
        assert all(row["rehearsal"] for row in rows) and rows[-1]["how"] == "ended"
        assert len([row for row in rows if row["status"] in ("right", "done")]) >= 8, done.stdout
        for row in rows:  # what is known to be wrong in the kernels is told as such; the script itself is whole
            assert "in the script itself" not in row.get("reason", ""), row
    assert len(os.listdir(tmp_path)) <= 3


@emulated
@pytest.mark.slow
def test_a_good_part_a_leads_to_tuning(tmp_path):
    with open(tmp_path / on_gpu.RESULTS, "w") as file:
        for item in gpu_items.part_a(True)[0]:
            if item.group in ("smoke", "headline"):
                file.write(json.dumps(record(item, "right") | {"rehearsal": True}) + "\n")
    command = [sys.executable, "-m", "bench", "on-gpu", "--rehearse", "--minutes", "2", "--part", "B"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=150)
    rows = {row["group"]: row for row in on_gpu.latest(on_gpu.read(tmp_path), "B", True)}
    assert rows["begin"]["decision"] == "everything was right in part A", done.stdout + done.stderr
    assert rows["tune"]["status"] == "done" and (tmp_path / "rehearsal-tuned.json").exists()
    assert rows["tests"]["status"] == "done" and "skipped" in rows["tests"]["last"][-1]
