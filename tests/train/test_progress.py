"""What a training shows: lines and a bar in terminals of several widths, lines alone in a pipe."""

import ast
import os
import re
import select
import struct
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT

import gpurnn
from gpurnn.train.progress import Progress, duration, epoch_line, fitted, show_loss

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
FIT = """
import numpy as np, gpurnn
text = gpurnn.TextBatches(np.arange(4001) % 5, batch_size=4, steps=10)
shared = {"backend": "cpu", "seed": 1}
model = gpurnn.Sequential(gpurnn.Embedding(5, 8, **shared), gpurnn.GRU(8, 16, **shared), gpurnn.Linear(16, 5, **shared))
gpurnn.fit(model, gpurnn.cross_entropy, text, optimizer="sgd", lr=0.0, epochs=9, patience=2, validation=text,
           metrics={"accuracy": gpurnn.accuracy})
"""


def in_terminal(command, columns, folder):
    """(exit code, all that a terminal of this width receives)."""
    fcntl, termios = pytest.importorskip("fcntl"), pytest.importorskip("termios")
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in ("COLUMNS", "LINES")}
    child = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True
    )
    os.close(theirs)
    data = b""
    while True:
        select.select([ours], [], [], 60)
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        data += part
    os.close(ours)
    return child.wait(timeout=60), data.decode()


def screen(text):
    """What stays on the screen: each line as the last carriage return left it."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown).rstrip())
    return lines


EPOCH = r"epoch (\d)/9  train 1\.\d{4}  valid 1\.\d{4}  accuracy \d+\.\d%(  best)?  \d s"


@pytest.mark.long
@pytest.mark.parametrize("columns", [120, 80, 45])
def test_fit_in_a_terminal(tmp_path, columns):
    code, text = in_terminal([sys.executable, "-W", "error", "-c", FIT], columns, tmp_path)
    assert code == 0, text
    shown = " ".join(line.strip() for line in screen(text) if line)
    shown = re.sub(r" +", " ", shown)
    flat = re.sub(" +", " ", EPOCH)
    assert [match[0] for match in re.findall(flat, shown)] == ["1", "2", "3"], text
    assert shown.endswith("stopped after epoch 3: no better for 2 epochs, best epoch 1")
    assert not any("|" in line for line in screen(text)), "the bar goes when training ends"
    bars = [part for part in re.split(r"[\r\n]", text) if "|" in part and "loss" in part]
    assert bars and all(len(bar) < columns for bar in bars) and max(map(len, bars)) > columns - 4
    inner = max(len(bar.split("|")[1]) for bar in bars)
    assert inner >= (8 if columns == 45 else 20), bars[-1]
    for line in screen(text):
        assert len(line) <= columns, line


def test_fit_in_a_pipe(tmp_path):
    """Lines, whole, on standard error; no bar, no carriage return; nothing on standard output."""
    done = subprocess.run(
        [sys.executable, "-c", FIT], cwd=tmp_path, env=ENVIRONMENT | {"COLUMNS": "30"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "" and "\r" not in done.stderr
    *epochs, last = done.stderr.splitlines()
    assert [re.fullmatch(EPOCH, line)[1] for line in epochs] == ["1", "2", "3"], done.stderr
    assert "best" in epochs[0] and "best" not in epochs[1] + epochs[2]
    assert last == "stopped after epoch 3: no better for 2 epochs, best epoch 1"


COMMAND = [
    sys.executable, "-W", "error", "-m", "gpurnn", "train", "text", "book.txt", "--hidden", "8", "--steps", "8",
    "--batch", "4", "--epochs", "2", "--seed", "1", "--backend", "cpu",
]  # fmt: skip


def words(text):
    """The words of an output, but for times, which differ, and for the sample, which is the model's."""
    text = re.sub(r"\d+ s\b", "", text)
    return text.partition("A sample:")[0].split() + text.partition("Next:")[2].split()


@pytest.mark.long
@pytest.mark.parametrize("columns", [80, 45])
def test_the_command_in_a_terminal(tmp_path, columns):
    """The words of a pipe, none broken; no line is longer than the terminal, but for commands to paste."""
    (tmp_path / "book.txt").write_text("a gate keeps the state, a state opens the gate. " * 30)
    options = {"cwd": tmp_path, "env": ENVIRONMENT, "capture_output": True, "text": True}
    pipe = subprocess.run([*COMMAND, "--out", "run"], **options)
    assert pipe.returncode == 0 and pipe.stderr == "" and "\r" not in pipe.stdout
    code, text = in_terminal([*COMMAND, "--out", "run", "--overwrite"], columns, tmp_path)
    assert code == 0, text
    shown = screen(text)
    assert words("\n".join(shown)) == words(pipe.stdout)
    before = shown[: shown.index("Next:")]
    assert max(map(len, before)) <= columns and not any("|" in line for line in shown)
    assert any("|" in part for part in re.split(r"[\r\n]", text))
    _, quiet = in_terminal([*COMMAND, "--out", "run", "--overwrite", "--no-progress"], columns, tmp_path)
    assert "|" not in quiet and words("\n".join(screen(quiet))) == words(pipe.stdout)


@pytest.mark.long
def test_in_a_notebook_lines_go_to_standard_output(tmp_path):
    code = f"import builtins\nbuiltins.__IPYTHON__ = True\n{FIT}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 4


def test_lines():
    record = {"epoch": 1, "train_loss": 2.0, "validation_loss": None, "seconds": 75.2}
    assert epoch_line(record, 2, False) == "epoch 1/2  train 2.0000  1 min 15 s"
    record |= {"validation_loss": 1.5, "validation_word_error": 0.25}
    assert epoch_line(record, 2, True) == "epoch 1/2  train 2.0000  valid 1.5000  word error 25.0%  best  1 min 15 s"
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 3599.7, 86400)] == [
        "0 s", "59 s", "1 min 0 s", "1 h 0 min", "24 h 0 min"
    ]  # fmt: skip


class Terminal:
    def isatty(self):
        return True


def test_a_line_is_broken_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert fitted("one two  three four five", Terminal()) == "one two  three four\n  five"
    assert fitted("x" * 30, Terminal()) == "x" * 30


def test_lines_go_where_they_are_wanted(capfd):
    lines = []
    batch = np.zeros((3, 2, 2), "float32"), np.zeros((3, 2, 1), "float32")
    model = gpurnn.Linear(2, 1, backend="cpu")
    options = {"optimizer": "adam", "epochs": 2, "progress": False}
    gpurnn.fit(model, gpurnn.mse, [batch], callbacks=[Progress(lines.append, bar=False)], **options)
    assert [line.split("  ")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.long
def test_nothing_else_prints():
    """What people read comes from cli/; fit's lines are the one exception."""
    printing = set()
    for path in (ROOT / "gpurnn").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            printing.add(path.relative_to(ROOT / "gpurnn").as_posix())
    assert {place for place in printing if not place.startswith(("cli/", "bench/"))} == {"train/progress.py"}


def test_a_line_that_cannot_be_written_ends_no_training(monkeypatch):
    def full(line):
        raise OSError(28, "No space left on device")

    batch = np.zeros((3, 2, 2), "float32"), np.zeros((3, 2, 1), "float32")
    model = gpurnn.Linear(2, 1, backend="cpu")
    options = {"optimizer": "adam", "epochs": 2}
    history = gpurnn.fit(model, gpurnn.mse, [batch], callbacks=[Progress(full)], progress=False, **options)
    assert len(history.epochs) == 2
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, None)  # a program without a console
    assert len(gpurnn.fit(model, gpurnn.mse, [batch], progress=True, **options).epochs) == 2


def test_shares_are_per_cent_and_large_losses_short():
    values = {"error": 0.41667, "utterance_error": 1.0, "accuracy": 0.5, "word_error_rate": 1.25, "squared_error": 0.5}
    record = {"epoch": 1, "train_loss": -7.3447e31, "validation_loss": 123456.7, "seconds": 1}
    line = epoch_line(record | {f"validation_{name}": value for name, value in values.items()}, 2, False)
    shares = "error 41.7%  utterance error 100.0%  accuracy 50.0%  word error rate 125.0%  squared error 0.5000"
    assert line == f"epoch 1/2  train -7.3e31  valid 1.2e5  {shares}  1 s"
    assert [show_loss(value) for value in (99999.0, float("inf"), float("nan"))] == ["99999.0000", "inf", "nan"]
