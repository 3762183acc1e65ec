"""What reaches a terminal or a spreadsheet, where input is split, and how signals end a command."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hostile
import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT

from gpurnn._interrupt import is_command
from gpurnn.checkpoint import load_checkpoint
from gpurnn.cli import main, options
from gpurnn.cli.options import say_pieces
from gpurnn.errors import one_line, printable
from gpurnn.tasks.series import csv_text

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
TINY = ["--hidden", "4", "--epochs", "1", "--seed", "1", "--backend", "cpu", "--no-progress"]
BAD = "\x1b]0;owned\x07\x1b[31mred\x9b2J\r\x08\x7f\u202egnp"


@pytest.fixture
def call(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)

    def call(*arguments, code=0, **more):
        done = CliRunner().invoke(main, list(map(str, arguments)), **more)
        assert done.exit_code == code, done.output
        assert not set(done.output) & set("\x00\x07\x08\x1b\x7f\x9b\u202e\r"), repr(done.output)
        return done

    return call


def test_printable():
    assert printable("a\tb\nc\r\nd \u00e9 \u4e2d \U0001f600") == "a\tb\nc\r\nd \u00e9 \u4e2d \U0001f600"
    assert printable("\x1b[0m\r\x00\x85\u2028\u202e") == r"\x1b[0m\r\x00\x85\u2028\u202e"
    assert one_line(KeyError("name")) == "'name' is missing"
    assert one_line(ValueError("a\nb" + 300 * "c")) == "a b" + 194 * "c" + "..."


def test_text_in_pieces(capsys):
    say_pieces("a\r\nb\rc\x1b\r")
    assert capsys.readouterr().out == "a\r\nb\\rc\\x1b\\r\n"


# ---- C12: text of data and models


@pytest.mark.long
def test_a_language_model_of_escapes(call):
    Path("book.txt").write_text(BAD * 60, encoding="utf-8", newline="")
    done = call("train", "text", "book.txt", "--out", "run", "--steps", 8, "--batch", 4, *TINY)
    assert r"\x1b" in done.output
    assert r"\x" in call("sample", "run", "--prompt", "\x1b[2J").output
    document = json.loads(call("sample", "run", "--prompt", "\x1b[2J", "--json").stdout)
    assert document["prompt"] == "\x1b[2J"  # exactly
    assert r"\x00" in call("sample", "run", "--prompt", "\x00").output  # the model never saw it: said on stderr


def test_classes_of_escapes(call):
    lines = [f"text {n} here\t{BAD if n % 2 else 'plain'}" for n in range(24)]
    Path("a.tsv").write_text("\n".join(lines), encoding="utf-8", newline="")
    call("train", "classify", "a.tsv", "--out", "run", *TINY)
    call("evaluate", "run", "a.tsv")
    call("classify", "run", BAD)
    Path("b.tsv").write_text(f"text\t{BAD}x\n", encoding="utf-8", newline="")
    assert r"\x1b" in call("evaluate", "run", "b.tsv", code=2).output


def test_names_of_escapes(call):
    Path("\x1b[31m.txt").write_bytes(b"\xff")
    assert r"\x1b[31m.txt" in call("train", "text", "\x1b[31m.txt", *TINY, code=2).output
    assert r"\x1b" in call("train", "text", "\x1b[2J.txt", *TINY, code=2).output
    assert r"\x1b" in call("train", "\x1b[2J", code=2).output


@pytest.mark.long
def test_translations_and_columns_of_escapes(call):
    Path("pairs.tsv").write_text(f"word {BAD}\tmot {BAD}\n" * 12, encoding="utf-8", newline="")
    call("train", "translate", "pairs.tsv", "--out", "words", "--valid", 0, "--batch", 4, *TINY)
    call("translate", "words", f"word {BAD}")
    rows = "".join(f"{n},{np.sin(n):.3f}\n" for n in range(60))
    Path("x.csv").write_text(f"n,{BAD.replace(chr(13), '')}\n{rows}", encoding="utf-8")
    call("train", "series", "x.csv", "--window", 6, "--horizon", 2, "--out", "run", *TINY)
    call("forecast", "run", "--out", "y.csv", "--plot", "y.png")
    call("evaluate", "run", "x.csv")


# ---- narrow terminals


def test_lines_are_broken_under_their_values(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    long = "Perplexity  10.3 for each token given those before\nA sentence that goes on and on."
    assert options.wrapped(long) == long and options.joined(["a" * 20, "b" * 20]) == "a" * 20 + "  " + "b" * 20
    monkeypatch.setenv("COLUMNS", "30")  # which asks for it without a terminal, too
    broken = "Perplexity  10.3 for each\n            token given those\n            before"
    assert options.wrapped(long) == f"{broken}\nA sentence that goes on and\non."
    assert options.wrapped("     under a value, in words, too") == "     under a value, in words,\n     too"
    assert options.joined(["2020-01-01  1.5", "80 %: 1 to 2"]) == "2020-01-01  1.5  80 %: 1 to 2"
    assert options.joined(["2020-01-01  1.5", "80 %: 1.25 to 2"]) == "2020-01-01  1.5\n    80 %: 1.25 to 2"
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setattr("gpurnn.cli.options.is_terminal", lambda stream: True)
    monkeypatch.setattr("gpurnn.cli.options.width", lambda: 30)
    assert options.wrapped(long) == f"{broken}\nA sentence that goes on and\non."


# ---- C12: spreadsheets


def test_cells_that_a_spreadsheet_would_compute():
    cells = ["=1+1", "+SUM(A1)", "-2+3", "@cmd", " =1", "\tx", "\uff1d1", "-", "name", "+1", "-1.5e-3", "a=b", ""]
    text = csv_text([cells])
    (found,) = csv.reader(io.StringIO(text))
    assert found == ["'" + cell for cell in cells[:8]] + cells[8:]
    assert next(csv.reader(io.StringIO(csv_text([cells], escape=False)))) == cells


def test_cells_that_would_split():
    """By a line end, by a quote, and where the spreadsheet's separator is a semicolon or a tab."""
    cells = ["a\r=1+1", "a\n=1+1", "a\r\n@x", "a\rb", 'a"b', "a,=1", "a;=1+1", "a; -2", "a\t+1", "a;b", "\r=1"]
    assert list(csv.reader(io.StringIO(csv_text([cells, ["x"]], escape=False), newline=""))) == [cells, ["x"]]
    assert csv_text([cells, ["x"]]).endswith("\nx\n")
    (found,) = csv.reader(io.StringIO(csv_text([cells]), newline=""))
    assert found[:3] == ["a\r'=1+1", "a\n'=1+1", "a\r\n'@x"] and found[3:6] == cells[3:6]
    assert found[6:] == ["a;'=1+1", "a; '-2", "a\t'+1", "a;b", "'\r'=1"]
    assert csv_text([["2020-01-01;", "1.5", "-2", "+3"]]) == "2020-01-01;,1.5,-2,+3\n"


def test_forecasts_for_a_spreadsheet(call):
    rows = "".join(f"{n},{np.sin(n) - 3:.3f}\n" for n in range(60))
    Path("x.csv").write_text(f"n,=HYPERLINK(1)\n{rows}")
    call("train", "series", "x.csv", "--window", 6, "--horizon", 2, "--out", "run", *TINY)
    call("forecast", "run", "--out", "y.csv")
    header, *rows = csv.reader(Path("y.csv").read_text().splitlines())
    assert header[1] == "'=HYPERLINK(1)" and rows[0][0] == "+1" and float(rows[0][1]) < 0
    call("forecast", "run", "--out", "y.csv", "--no-escape")
    assert Path("y.csv").read_text().startswith("row,=HYPERLINK(1)\n")


# ---- C12: standard input


def test_standard_input_is_split_at_newlines_only(call):
    Path("a.tsv").write_text("".join(f"text {n} here\t{'ab'[n % 2]}\n" for n in range(24)))
    call("train", "classify", "a.tsv", "--out", "run", *TINY)
    lines = "one\x0btwo\x0cthree\x1cfour\u2028five\x85six\r seven\r\neight"
    found = json.loads(call("classify", "run", "--json", input=lines.encode()).stdout)
    assert [one["text"] for one in found] == ["one\x0btwo\x0cthree\x1cfour\u2028five\x85six\r seven", "eight"]
    assert json.loads(call("classify", "run", "--json", input=b"\xef\xbb\xbfone\n").stdout)[0]["text"] == "one"
    done = call("classify", "run", input=b"good\nb\xffd\n", code=2)
    assert "standard input, line 2: is not UTF-8" in done.output


# ---- C12: signals


def start(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "gpurnn", "train", "text", "--json", *map(str, arguments)], cwd=folder, env=ENVIRONMENT,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143)])
def test_an_interrupted_run_resumed_ends_as_one_that_was_not(tmp_path, name, status):
    (tmp_path / "book.txt").write_text("a gate keeps the state, a state opens the gate. " * 200)
    new = ["book.txt", *TINY, "--epochs", 2, "--steps", 8, "--batch", 4]
    stopped = start(tmp_path, *new, "--out", "stopped")
    log = tmp_path / "stopped" / "history.jsonl"
    while stopped.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.005)
    stopped.send_signal(getattr(signal, name))
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == status, errors
    assert "gpurnn train text --out stopped --resume" in errors and "Traceback" not in errors
    assert '"kind": "epoch", "epoch": 2' not in log.read_text()
    assert (tmp_path / "stopped" / "last.json").exists() and not (tmp_path / "stopped" / ".lock").exists()
    for run in (start(tmp_path, "--out", "stopped", "--resume"), start(tmp_path, *new, "--out", "whole")):
        _, errors = run.communicate(timeout=60)
        assert run.returncode == 0, errors
    resumed, whole = (load_checkpoint(tmp_path / name / "last.json")[0] for name in ("stopped", "whole"))
    assert resumed.keys() == whole.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("stage", ["numpy", "click", "gpurnn.tasks.text"])
def test_ctrl_c_during_imports(tmp_path, stage):
    """A module that presses Ctrl-C as it is imported."""
    press = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.05)\n"
    if stage.startswith("gpurnn"):
        code = f"""
import sys, importlib.abc
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {stage!r}:
            import os, signal, time
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
sys.meta_path.insert(0, Finder())
"""
        (tmp_path / "sitecustomize.py").write_text(code)
    else:
        (tmp_path / f"{stage}.py").write_text(press)
    script = tmp_path / "gpurnn"
    script.write_text("import sys\nfrom gpurnn.cli import main\nsys.exit(main())\n")
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for command in (["-m", "gpurnn"], [str(script)]):
        done = subprocess.run(
            [sys.executable, *command, "train", "text", "--help"], env=environment, cwd=ROOT, capture_output=True,
            text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 130, done
        assert "Traceback" not in done.stderr and done.stderr.strip() == "Interrupted."


def test_a_second_ctrl_c_during_imports_ends_at_once(tmp_path):
    press = "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.05)\n"
    code = f"import os, signal, time\n{press}print('noted', flush=True)\n{press}print('still here')"
    (tmp_path / "numpy.py").write_text(code)
    environment = ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "gpurnn", "info"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "noted\n", "\nInterrupted.\n")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_at_any_moment_of_a_start(tmp_path, way):
    """60 times. Until ``_interrupt`` is loaded Python is on its own: its traceback shows no other file of ours."""
    script = tmp_path / "gpurnn"
    script.write_text("import sys\nfrom gpurnn.cli import main\nsys.exit(main())\n")
    command = [sys.executable, *(["-m", "gpurnn"] if way == "module" else [str(script)]), "info"]
    codes = []
    for number in range(60):
        started = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.02 + 0.004 * number)
        started.send_signal(signal.SIGINT)
        _, errors = started.communicate(timeout=60)
        codes.append(started.returncode)
        ours = [line for line in errors.splitlines() if line.startswith(f'  File "{ROOT / "gpurnn"}')]
        assert not [line for line in ours if "__init__.py" not in line and "_interrupt.py" not in line], errors
        assert not [line for line in errors.splitlines() if line.startswith("Error: ")], errors
        # -SIGINT, 130 in a shell: Python ends so where the interrupt came before us, or once passed through its exec()
        assert codes[-1] in (0, 1, 130, -signal.SIGINT), errors
        assert codes[-1] != 130 or errors == "\nInterrupted.\n", errors
    assert codes.count(130) > 10, codes


@pytest.mark.parametrize(
    "words, expected",
    [
        (["python", "-m", "gpurnn", "train"], True),
        (["python", "-X", "dev", "-Im", "gpurnn"], True),
        (["python", "/usr/bin/gpurnn", "info"], True),
        (["python", "C:/Scripts/gpurnn.exe"], True),
        (["python", "train.py", "-m", "gpurnn"], False),
        (["python", "-c", "import gpurnn", "gpurnn"], False),
        (["python", "-m", "pytest", "gpurnn"], False),
        (["python"], False),
    ],
)
def test_which_process_is_the_command(words, expected):
    assert is_command(words) is expected


def test_good_files_have_no_complaints():
    """The judge of tests/hostile.py sees what it should."""
    fine = {"code": 2, "out": "", "err": "Error: a.txt: is empty\n", "seconds": 0.1, "bytes": 10**8, "command": "x"}
    assert hostile.complaints(fine, "a.txt", refused=True) == []
    for change in (
        {"err": "Error: is empty\n"}, {"err": ""}, {"err": "Error: a.txt\nError: a.txt\n"}, {"code": -9}, {"code": 70},
        {"err": "Error: a.txt\x1b\n"}, {"seconds": 11}, {"bytes": 2 * 10**9}, {"out": "Traceback (most"}, {"code": 0},
    ):  # fmt: skip
        assert len(hostile.complaints(fine | change, "a.txt", refused=True)) >= 1, change
