"""``bench on-gpu`` without a GPU: its deadline, its files under a kill, its processes, its choice, its rehearsal."""

import ast
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT

from bench import gpu_items, gpu_workers, on_gpu
from bench import run as bench_run
from bench.cases import Case
from bench.cli import main
from bench.gpu_items import Item
from bench.rivals.prepared import Prepared
from gpurnn.testing import worst_error


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


@pytest.mark.long
def test_a_case_that_hangs_is_killed_at_its_limit_and_the_next_one_runs(tmp_path):
    code, rows = run(tmp_path, [ask(SLEEP), ask({"do": "hang"}, 1.0), ask(SLEEP)])
    assert code == 1 and statuses(rows) == ["right", "timed out", "right"]
    assert 1.0 <= rows[1]["seconds"] < 3 and re.search(r"in 1\.\d s: killed", rows[1]["reason"])


@pytest.mark.long
@pytest.mark.parametrize("how", ["SIGSEGV", "SIGKILL"])
def test_a_process_that_dies_is_told_and_the_next_case_runs(tmp_path, how):
    code, rows = run(tmp_path, [ask({"do": "die", "how": how}), ask({"do": "fail", "text": "no\nluck"}), ask(SLEEP)])
    assert code == 1 and statuses(rows) == ["failed", "failed", "right"]
    assert how in rows[0]["reason"] and rows[1]["reason"] == "ValueError: no luck"


@pytest.mark.long
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


@pytest.mark.long
def test_a_group_gives_way_when_its_time_is_over(tmp_path):
    items = [ask({"do": "sleep", "seconds": 0.6}, name=str(k), group="first") for k in range(5)] + [ask(SLEEP)]
    _, rows = run(tmp_path, items, minutes=10 / 60, ends={"first": 0.1})
    assert statuses(rows)[0] == statuses(rows)[-1] == "right"
    assert statuses(rows)[3:5] == ["left out"] * 2 and rows[4]["reason"] == "the time of 'first' was over"


@pytest.mark.long
def test_a_process_that_does_not_start_is_tried_again_after_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu_workers.REST_SECONDS", 1)
    kept, tried = gpu_workers.command_of, []

    def command(*arguments):
        tried.append(arguments)
        return kept(*arguments) if len(tried) > 2 else [sys.executable, "-c", "raise SystemExit(3)"]

    monkeypatch.setattr(gpu_workers, "command_of", command)
    pause = Item("g", "pause", lambda pool, seconds: time.sleep(1.1) or {}, 5)
    code, rows = run(tmp_path, [*(ask(SLEEP, name=str(k)) for k in range(4)), pause, ask(SLEEP)])
    assert code == 1 and statuses(rows) == ["failed"] * 4 + ["right"] * 2
    assert "exit code 3 (at its start)" in rows[0]["reason"] and "not tried again" in rows[3]["reason"]


@pytest.mark.long
def test_an_error_of_the_script_itself_is_told(tmp_path):
    def broken(pool, seconds):
        raise KeyError("nothing")

    code, rows = run(tmp_path, [Item("g", "broken", broken, 1), ask(SLEEP)])
    assert code == 1 and statuses(rows) == ["failed", "right"] and "in the script itself" in rows[0]["reason"]


@pytest.mark.long
def test_a_spare_process_stands_by(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_workers.Pool, "spared", ("test",))
    started, new = [], gpu_workers.Pool._new
    monkeypatch.setattr(gpu_workers.Pool, "_new", lambda pool, kind: started.append(kind) or new(pool, kind))
    _, rows = run(tmp_path, [ask(SLEEP), ask({"do": "die", "how": "SIGKILL"}), ask(SLEEP, name="last")])
    assert statuses(rows) == ["right", "failed", "right"] and len(started) == 3  # two at first, one for the spare


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


def lines_in(folder):
    """Whole lines of the records so far; ``on_gpu.read`` refuses a file that grows while it is read."""
    path = folder / on_gpu.RESULTS
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_at_any_moment_leaves_whole_lines(tmp_path, how):
    draw = random.Random(int(how))
    for n in range(4):
        process = planted(tmp_path)
        before = lines_in(tmp_path)
        wait_for(lambda before=before: lines_in(tmp_path) >= before + 3)
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


@pytest.mark.long
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


# ---- the command


def test_the_folder_is_where_out_says(tmp_path, monkeypatch):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(on_gpu, "missing_gpu", lambda rehearsal: None)
    monkeypatch.setattr(on_gpu, "run_part", lambda *given, mirror, **_: seen.append((*given[:3], mirror)) or 0)
    monkeypatch.setenv("OUT", str(tmp_path))
    assert CliRunner().invoke(main, ["on-gpu", "--part", "B", "--minutes", "5"]).exit_code == 0
    monkeypatch.delenv("OUT")
    CliRunner().invoke(main, ["on-gpu"])
    CliRunner().invoke(main, ["on-gpu", "--out", "here"])
    assert seen == [
        ("B", 5.0, "runs/on-gpu", str(tmp_path)), ("A", 5.5, "runs/on-gpu", None), ("A", 5.5, "here", None),
    ]  # fmt: skip


def test_without_a_driver_it_says_so(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_library)
    done = CliRunner().invoke(main, ["on-gpu"])
    assert done.exit_code == 1 and "no NVIDIA driver was found" in done.output and "--rehearse" in done.output


# ---- the rehearsal


def record(item, status):
    base = {"run": "1", "part": "A", "rehearsal": True, "group": item.group, "name": item.name, "status": status}
    return base | {"parameters": item.parameters, "seconds": 1.0}


@pytest.mark.emulated
@pytest.mark.slow
def test_both_parts_rehearse(tmp_path):
    command = [sys.executable, "-m", "bench", "on-gpu", "--rehearse", "--minutes", "1.5", "--out", str(tmp_path)]
    for part in "AB":
        start = time.monotonic()
        done = subprocess.run([*command, "--part", part], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert time.monotonic() - start < 93 and done.returncode in (0, 1), done.stderr
        rows = on_gpu.latest(on_gpu.read(tmp_path), part, True)
        assert all(row["rehearsal"] for row in rows) and rows[-1]["how"] == "ended"
        # a fast machine leaves part B nothing of part A to do: only what is of part B itself
        least = 8 if part == "A" else 3
        assert len([row for row in rows if row["status"] in ("right", "done")]) >= least, done.stdout
        bad = [
            row for row in rows if row["status"] in ("wrong", "failed") and row["group"] != "probe"
        ]  # which need CuPy
        assert not bad, bad
    assert len(os.listdir(tmp_path)) <= 3


@pytest.mark.emulated
@pytest.mark.slow
def test_a_good_part_a_leads_to_tuning(tmp_path):
    with open(tmp_path / on_gpu.RESULTS, "w") as file:
        for item in gpu_items.part_a(True)[0]:
            if item.group in ("smoke", "headline"):
                file.write(json.dumps(record(item, "right")) + "\n")
    command = [sys.executable, "-m", "bench", "on-gpu", "--rehearse", "--minutes", "2", "--part", "B"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=150)
    rows = {row["group"]: row for row in on_gpu.latest(on_gpu.read(tmp_path), "B", True)}
    assert rows["begin"]["decision"] == "everything was right in part A", done.stdout + done.stderr
    assert rows["tune"]["status"] == "done" and (tmp_path / "rehearsal-tuned.json").exists()
    assert rows["tests"]["status"] == "done" and "skipped" in rows["tests"]["last"][-1]


def test_a_folder_that_is_emptied_between_two_commands_is_no_loss(tmp_path):
    """Part B reads what part A has left in the folder itself; the other folder gets both."""
    kept, mirror = tmp_path / "kept", tmp_path / "out"
    for part in "AB":
        shutil.rmtree(mirror, ignore_errors=True)
        journal = on_gpu.Journal(kept, {"run": part, "part": part, "rehearsal": True}, mirror)
        journal.record(group="smoke", name="a case", status="right")
        journal.log(f"part {part}")
        (kept / "tuned.json").write_text("{}")
        journal.close()
        assert [row["part"] for row in on_gpu.read(kept)] == [row["part"] for row in on_gpu.read(mirror)]
        assert (mirror / on_gpu.LOG).read_bytes() == (kept / on_gpu.LOG).read_bytes()
        assert (mirror / "tuned.json").read_text() == "{}"
    assert [row["part"] for row in on_gpu.latest(on_gpu.read(mirror), "A", True)] == ["A"]


@pytest.mark.long
def test_what_is_imported_late_exists():
    """Branches that only a GPU reaches import inside functions: every name of ours that a file asks for is there."""
    root = Path(on_gpu.__file__).resolve().parents[1]
    missing = []
    for path in [*(root / "gpurnn").rglob("*.py"), *(root / "bench").rglob("*.py")]:
        package = ".".join(path.relative_to(root).with_suffix("").parts[:-1])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom):
                continue
            up = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            name = ".".join(filter(None, (*up, node.module)))
            if name.partition(".")[0] not in ("gpurnn", "bench"):
                continue
            try:
                module = importlib.import_module(name)
            except ModuleNotFoundError as error:  # a rival's package, which need not be here
                if error.name in ("jax", "keras"):
                    continue
                raise
            for alias in node.names:
                if not hasattr(module, alias.name) and importlib.util.find_spec(f"{name}.{alias.name}") is None:
                    missing.append(f"{path.name}:{node.lineno}: {name}.{alias.name}")
    assert not missing


def test_no_result_that_is_not_a_number_is_hidden_by_a_later_one(tmp_path):
    expected = {name: np.ones(3) for name in ("output", "dx", "state")}
    for broken in expected:
        got = expected | {broken: np.full(3, np.nan)}
        assert worst_error(got, expected, expected, "float32", 10)[0] == np.inf
        for name, arrays in (("right", expected), ("got", got)):
            np.savez(tmp_path / f"{name}.npz", **arrays)
        found = gpu_items.compare(Case("lstm", 3, 2, 4, 4), tmp_path / "got.npz", tmp_path / "right.npz")
        assert found["status"] == "wrong" and broken in found["reason"]
        prepared = Prepared(lambda: None, lambda got=got: got)
        assert bench_run._errors(prepared, tmp_path / "right.npz") == {"error": np.inf, "where": broken}
