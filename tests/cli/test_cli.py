"""The ``gpurnn`` command: what it prints, what it writes, how it ends."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from optional import needs

from gpurnn import cli
from gpurnn.backends import get_backend
from gpurnn.cli import main
from gpurnn.errors import BackendError
from gpurnn.train import TrainingError

TINY = [
    "--hidden",
    "8",
    "--steps",
    "8",
    "--batch",
    "4",
    "--epochs",
    "1",
    "--seed",
    "7",
    "--backend",
    "cpu",
    "--no-progress",
]


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command in a folder of its own that holds book.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "gpurnn.train.run_files.RunFiles.draw", lambda files: None
    )  # most of a tiny run's time is its picture
    draw = random.Random(0)
    text = " ".join(draw.choice(["gate", "caf\u00e9", "\u4e2d\u6587", "\U0001f600", "state"]) for _ in range(300))
    Path("book.txt").write_bytes(text.encode())

    def call(*arguments, code=0):
        result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        if code and code != 130:
            assert result.stderr.strip().splitlines()[-1].startswith("Error: ") and "Traceback" not in result.stderr
        return result

    return call


@pytest.fixture
def trained(call):
    call("train", "text", "book.txt", "--out", "run", *TINY)
    return call


@pytest.mark.parametrize(
    "command", [[], ["train"], ["train", "text"], ["sample"], ["evaluate"], ["plot"], ["info"]], ids=" ".join
)
def test_help_fits_the_terminal(call, command):
    lines = call(*command, "--help").output.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("Usage: gpurnn")


@pytest.mark.parametrize("group", [(), ("train",)])
def test_help_says_of_every_command_what_it_is(group, call):
    """Each summary whole, where click would cut it to a line."""
    text = call(*group, "--help").output
    assert "..." not in text.partition("Commands:")[2]


def test_help_shows_defaults_and_examples(call):
    text = call("train", "text", "-h").output
    assert "Examples:" in text and "--resume" in text and "[default: lstm]" in text
    assert "gpurnn, version" in call("--version").output


def test_train_text_says_what_it_does(call):
    result = call("train", "text", "book.txt", *TINY)
    folder = str(Path("runs", "text-1"))
    for expected in (
        "book.txt: ",
        "characters",
        "parameters",
        get_backend("cpu").name,
        "seed 7",
        "bits per character",
        "Next:",
    ):
        assert expected in result.output
    assert f"gpurnn sample {folder}" in result.output and Path(folder, "config.json").exists()
    call("train", "text", "book.txt", *TINY)
    assert Path("runs", "text-2", "config.json").exists()


def test_train_text_prints_json(call):
    result = call("train", "text", "book.txt", "--json", "--out", "run", *TINY)
    document = json.loads(result.stdout)
    assert document["run"] == "run" and document["settings"]["hidden"] == 8 and document["loss"] == "validation"
    assert 0 < document["nats"] < document["bits"] and 300 < len(document["sample"]) <= 320
    assert "Model" in result.stderr


def test_train_text_without_validation(call):
    document = json.loads(call("train", "text", "book.txt", "--json", "--valid", 0, "--out", "run", *TINY).stdout)
    assert document["loss"] == "training" and document["nats"] > 0
    call("sample", "run")


@pytest.mark.long
@pytest.mark.parametrize("option", ["--layers 2 --dropout 0.2", "--cell gru --flow", "--optimizer sgd --accumulate 2"])
def test_train_text_options(call, option):
    call("train", "text", "book.txt", "--out", "run", *TINY, *option.split())


@pytest.mark.long
def test_resume(trained):
    result = trained("train", "text", "--out", "run", "--resume", "--epochs", 3, "--no-progress")
    assert "book.txt" in result.output
    assert Path("run", "history.jsonl").read_text().count('"kind": "epoch"') == 3
    refused = trained("train", "text", "--out", "run", "--resume", "--hidden", 9, code=2)
    assert "hidden 8" in refused.stderr
    assert "--out" in trained("train", "text", "--resume", code=2).stderr
    assert "exclude" in trained("train", "text", "--resume", "--overwrite", "--out", "run", code=2).stderr
    assert "holds no run" in trained("train", "text", "--resume", "--out", "none", code=1).stderr


def test_a_run_is_not_overwritten_by_accident(trained):
    before = Path("run", "config.json").read_bytes()
    assert "already holds a run" in trained("train", "text", "book.txt", "--out", "run", *TINY, code=2).stderr
    assert Path("run", "config.json").read_bytes() == before
    trained("train", "text", "book.txt", "--out", "run", "--overwrite", *TINY)


@pytest.mark.long
def test_sample(trained):
    arguments = ("sample", "run", "--seed", 3, "--length", 50)
    text = trained(*arguments, "--prompt", "gate ").stdout
    assert text.startswith("gate ") and len(text) == 5 + 50 + 1
    assert text == trained(*arguments, "--prompt", "gate ").stdout
    document = json.loads(trained(*arguments, "--prompt", "gate ", "--json").stdout)
    assert document["prompt"] + document["text"] + "\n" == text and document["seed"] == 3
    unknown = trained(*arguments, "--prompt", "XgXY")
    assert "'XY'" in unknown.stderr and unknown.stdout.startswith("XgXY")
    greedy = {trained("sample", "run", *how).stdout for how in (["--temperature", "0"], ["--top-k", "1"])}
    assert len(greedy) == 1
    assert "--top-p" in trained("sample", "run", "--top-p", "1.5", code=2).stderr


def test_evaluate(trained):
    document = json.loads(trained("evaluate", "run", "book.txt", "--json").stdout)
    assert document["unknown"] == 0 and document["characters"] == len(Path("book.txt").read_bytes().decode())
    Path("other.txt").write_text("gate QQ state")
    assert "2 unknown" in trained("evaluate", "run", "book.txt", "other.txt").output
    assert "FILE" in trained("evaluate", "run", code=2).stderr


def test_info(call):
    lines = call("info").output.splitlines()
    assert max(map(len, lines)) <= 80
    document = json.loads(call("info", "--json").stdout)
    assert document["backends"]["numpy"] is None and document["cpus"] >= 1 and "common.cuh" in document["kernels"]
    for name, reason in document["backends"].items():
        assert any(line.startswith(f"'{name}'") and ("works" in line) == (reason is None) for line in lines)


@pytest.mark.long
@needs("matplotlib")
def test_plot(trained):
    paths = trained("plot", "run").output.split()
    assert paths and all(Path(path).read_bytes().startswith(b"\x89PNG") for path in paths)


def test_plot_without_matplotlib(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install" in trained("plot", "run", code=1).stderr


# ---- errors: one line, the right code


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["train", "text", "missing.txt"], "missing.txt"),
        (["train", "text", "empty.txt"], "empty"),
        (["train", "text", "short.txt"], "needs"),
        (["train", "text", "binary.txt"], "is a picture, not text"),
        (["train", "text", "book.txt", "--hidden", "0"], "hidden"),
        (["train", "text", "book.txt", "--lr", "nan"], "lr"),
        (["train", "text", "book.txt", "--cell", "x"], "--cell"),
        (["train", "text", "book.txt", "--backend", "tpu"], "--backend"),
        (["sample", "missing"], "missing"),
        (["train", "nothing"], "nothing"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_end_with_2(call, arguments, expected):
    Path("empty.txt").touch()
    Path("short.txt").write_text("short")
    Path("binary.txt").write_bytes(b"\x89PNG\r\n\x1a\n")
    result = call(*arguments, code=2)
    assert expected in result.stderr
    assert not Path("runs").exists() or not any(Path("runs").iterdir())


def test_a_damaged_checkpoint_ends_with_1(trained):
    tensors = next(Path("run").glob("best-*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-1])
    result = trained("sample", "run", code=1)
    assert tensors.name in result.stderr and len(result.stderr.splitlines()) == 1
    assert "holds no run" in trained("sample", ".", code=1).stderr


@pytest.mark.parametrize(
    "error, code",
    [
        (TrainingError("the loss is nan"), 1),
        (BackendError("no GPU,\n get one"), 1),
        (OSError(28, "No space left on device"), 1),
        (MemoryError(), 1),
        (ValueError("wrong"), 2),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_become_one_line(call, monkeypatch, error, code):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("gpurnn.tasks.run.Run.train", fail)
    result = call("train", "text", "book.txt", "--out", "run", *TINY, code=code)
    assert sum(line.startswith("Error: ") for line in result.stderr.splitlines()) == 1
    with pytest.raises(type(error)):
        call("--debug", "train", "text", "book.txt", "--out", "run", "--overwrite", *TINY)


def test_divergence_ends_with_1(call):
    result = call("train", "text", "book.txt", *TINY, "--optimizer", "sgd", "--lr", "1e300", "--clip", 0, code=1)
    assert len(result.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(call, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    def save_and_interrupt(run, **_):
        (run.folder / "last.json").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("gpurnn.tasks.run.Run.train", save_and_interrupt)
    result = call("train", "text", "book.txt", "--out", "run", *TINY, code=130)
    assert "gpurnn train text --out run --resume" in result.stderr
    monkeypatch.setattr("gpurnn.cli.sample.load", interrupt)
    call("sample", "run", code=130)


@pytest.mark.slow
def test_end_to_end_in_a_process(tmp_path):
    """The installed command's way: another process, another folder, no CliRunner."""
    environment = dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parents[1]), OMP_NUM_THREADS="1")
    (tmp_path / "book.txt").write_text("a gate keeps the state, a state opens the gate. " * 30)

    def call(*arguments):
        command = [sys.executable, "-W", "error", "-m", "gpurnn", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    tiny = ["--hidden", "8", "--steps", "8", "--batch", "4", "--epochs", "1", "--backend", "cpu", "--json"]
    assert json.loads(call("train", "text", "book.txt", *tiny))["run"] == os.path.join("runs", "text-1")
    assert len(call("sample", "runs/text-1", "--length", "20")) == 21
    assert json.loads(call("evaluate", "runs/text-1", "book.txt", "--json"))["nats"] > 0
    assert json.loads(call("train", "text", "--out", "runs/text-1", "--resume", "--epochs", "2", "--json"))
    assert ".png" in call("plot", "runs/text-1")
    assert json.loads(call("info", "--json"))["gpurnn"]
