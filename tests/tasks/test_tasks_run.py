"""The frame of the tasks: settings that check themselves and become options, the table of tasks, damaged runs."""

import json
from dataclasses import dataclass, fields
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner

from gpurnn.checkpoint import CheckpointError, save_checkpoint
from gpurnn.cli import main
from gpurnn.cli.root import COMMANDS
from gpurnn.cli.train import _option
from gpurnn.files import write_json_atomic
from gpurnn.tasks import TASKS, get_task
from gpurnn.tasks.run import prepare
from gpurnn.tasks.settings import Settings, changed, kind_of, recurrent, setting
from gpurnn.tasks.task import Task, checksum
from gpurnn.tasks.trained import load, read_run


@dataclass
class Mine(Settings):
    beam_size: int = setting(5, "Beams.", minimum=2)
    share: float | None = setting(None, "A share.", low=0, high=1, shown="half")
    loud: bool = setting(False, "Loudly.")
    name: str = setting("x", "A name.")
    epochs: int = changed(Settings, "epochs", 30)
    valid: float = changed(Settings, "valid", 0.5, "Another help.", high=0.6)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_keeps_to_the_table(task):
    """Defaults that are allowed, an option for every setting."""
    found = get_task(task)
    assert found.name == task
    found.Settings()
    result = CliRunner().invoke(main, ["train", task, "--help"], prog_name="gpurnn")
    missing = [f.name for f in fields(found.Settings) if f"--{f.name.replace('_', '-')} " not in result.output]
    assert result.exit_code == 0 and not missing


@pytest.mark.parametrize(
    "command", [*(("train", task) for task in TASKS), *((name,) for name in COMMANDS)], ids="_".join
)
def test_help_fits_a_terminal(command):
    result = CliRunner().invoke(main, [*command, "--help"], prog_name="gpurnn")
    assert result.exit_code == 0 and max(map(len, result.output.splitlines())) <= 80
    assert "Examples:" in result.output or command[0] in ("evaluate", "info", "plot", "train")


def test_an_unknown_task():
    with pytest.raises(ValueError, match="task should be one of 'text'"):
        get_task("chess")


@pytest.mark.parametrize(
    "wrong, error",
    [
        ({"beam_size": 1}, ValueError),
        ({"beam_size": 2.0}, TypeError),
        ({"share": 1.5}, ValueError),
        ({"loud": 1}, TypeError),
        ({"name": None}, TypeError),
        ({"valid": 0.7}, ValueError),
        ({"valid": -0.1}, ValueError),
        ({"hidden": 0}, ValueError),
    ],
)
def test_settings_check_themselves(wrong, error):
    with pytest.raises(error, match=next(iter(wrong))):
        Mine(**wrong)


def test_settings_have_kinds_and_options():
    by_name = {f.name: f for f in fields(Mine)}
    assert kind_of(by_name["share"]) == (float, True) and kind_of(by_name["beam_size"]) == (int, False)
    assert Mine().epochs == 30 and Mine(share=0.25).share == 0.25 and Mine().share is None
    assert by_name["epochs"].metadata["help"] == "Passes over the data."
    beam, share, loud, cell = (_option(by_name[name]) for name in ("beam_size", "share", "loud", "cell"))
    assert beam.opts == ["--beam-size"] and beam.type is click.INT and beam.default == 5
    assert share.help == "A share.  [default: half]" and share.default is None
    assert loud.secondary_opts == ["--no-loud"] and isinstance(cell.type, click.Choice)
    seeds = Settings(seed=2**64 - 1).seeds()
    assert [next(seeds), next(seeds)] == [2**64 - 1, 0]


def test_recurrent_stack():
    stack = recurrent(Settings(cell="lstm", layers=2, hidden=3, dropout=0.5), 4, 7, "cpu", bidirectional=True)
    assert (stack.num_layers, stack.hidden_size, stack.dropout) == (2, 3, 0.5)
    single = recurrent(Settings(cell="gru", dropout=0.5), 4, 7, "cpu")
    assert single.dropout == 0


def test_checksum_is_that_of_all_together():
    assert checksum("ab", b"c") == checksum("abc") != checksum("acb")


def test_runs_that_are_not_right(tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("a gate keeps the state. " * 20)
    options = {"hidden": 4, "steps": 4, "batch": 2, "backend": "cpu"}
    with pytest.raises(ValueError, match="needs files"):
        prepare("classify", [], tmp_path / "none")
    run = prepare("text", [book], tmp_path / "run", epochs=1, **options)
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        load(tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run of the task text, not classify"):
        read_run(tmp_path / "run", "classify")
    for damage in ({"facts": {}}, {"facts": {"vocabulary": ""}}, {"facts": {"vocabulary": 3}}):
        write_json_atomic(tmp_path / "run" / "config.json", run.document | damage)
        save_checkpoint(tmp_path / "run" / "last.json", {"model/recurrent.weight_hh_l0": np.zeros((16, 4))}, {})
        with pytest.raises(CheckpointError, match="config.json: is damaged"):
            load(tmp_path / "run", "cpu")
    write_json_atomic(tmp_path / "run" / "config.json", run.document | {"task": "chess"})
    with pytest.raises(CheckpointError, match="config.json: is damaged"):
        read_run(tmp_path / "run")


def test_a_checksum_is_the_crc_32_of_everything_in_order():
    import zlib

    array = np.arange(5, dtype=np.int32)
    assert checksum("ab", array, b"c") == zlib.crc32(b"ab" + array.tobytes() + b"c") and checksum() == 0


@pytest.mark.parametrize("task, valid, best", [("translate", True, 2), ("translate", False, 3), ("speech", True, 3)])
def test_the_result_is_of_the_epoch_that_is_kept(task, valid, best):
    """That of the best accuracy, where fit watches it, although its loss is not the lowest."""
    values = [(0.2, 5.0), (0.6, 4.0), (0.6, 3.0), (0.4, 3.5)]
    epochs = [
        {"epoch": n, "train_loss": 9 - n if n < 4 else 8, "validation_loss": loss if valid else None}
        | ({"validation_accuracy": accuracy} if valid else {})
        for n, (accuracy, loss) in enumerate(values, 1)
    ]
    history, task = SimpleNamespace(epochs=epochs), get_task(task)
    assert task.best_record(history)["epoch"] == best
    numbers, text = Task.finish(task, None, SimpleNamespace(valid=[] if valid else None), history)
    loss = epochs[best - 1]["validation_loss" if valid else "train_loss"]
    assert numbers == {"loss": "validation" if valid else "training", "best": loss} and f"{loss:.4f}" in text


@pytest.mark.parametrize("task", ["music", "classify"])
def test_a_run_without_validation_and_test_says_its_loss(tmp_path, task):
    path = tmp_path / ("a.json" if task == "music" else "a.tsv")
    path.write_text(json.dumps([[[60], [62, 64]]] * 4) if task == "music" else "fine a\tp\nfine b\tp\ndull c\tn\n")
    more = {"test": 0.0, "patience": None} if task == "classify" else {}
    run = prepare(task, [path], tmp_path / "run", valid=0.0, hidden=4, epochs=1, seed=1, backend="cpu", **more)
    numbers, text = run.finish(run.train(progress=False))
    assert numbers["loss"] == "training" and f"training loss {numbers['best']:.4f}" in text.lower()
