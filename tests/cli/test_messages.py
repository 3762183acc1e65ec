"""Messages of the library in the language of the command line."""

import click
import pytest
from click.testing import CliRunner

from gpurnn.cli import main
from gpurnn.cli.messages import as_options
from gpurnn.cli.train import _train_command
from gpurnn.tasks import TASKS, get_task

TEXT = _train_command(get_task("text"))
SAMPLE = click.Command("sample", params=[click.Option(["--top-p"]), click.Option(["--escape/--no-escape"])])


@pytest.mark.parametrize(
    "message, expected",
    [
        ("the GPU is busy: wait, or use backend='cpu'", "the GPU is busy: wait, or use --backend cpu"),
        ("resume=True continues it", "--resume continues it"),
        ("lr should be a finite number in (0, inf], got -1.0", "--lr should be a finite number in (0, inf], got -1.0"),
        ("schedule='plateau' needs a validation loss: valid should be above 0",
         "--schedule plateau needs a validation loss: --valid should be above 0"),
        ("runs/x has hidden=8, cell='lstm', patience=None: leave it",
         "runs/x has --hidden 8, --cell lstm, no --patience: leave it"),
        ("tied=False, embedding=3", "--no-tied, --embedding 3"),
        ("begin a new run, start='my runs/a b', elsewhere", "begin a new run, --from 'my runs/a b', elsewhere"),
        ("start: runs/a is the folder itself", "--from: runs/a is the folder itself"),
        ("limited to a norm of 1 (clip_norm)", "limited to a norm of 1 (--clip)"),
        ("it holds a run: continue it with --resume, replace it (in Python resume=True, overwrite=True)",
         "it holds a run: continue it with --resume, replace it"),
        ("valid 0.9 and batch 5 leave nothing, hidden", "--valid 0.9 and --batch 5 leave nothing, hidden"),
        # what is no argument stays
        ("b.txt: hidden text, lr_notes.txt and my_valid", "b.txt: hidden text, lr_notes.txt and my_valid"),
        ("run/weight_decay.txt: is empty", "run/weight_decay.txt: is empty"),
        ("the file has 3 epochs, seed 4", "the file has 3 epochs, seed 4"),
        ("'schedule=x' is what the file says, a.lr=3", "'schedule=x' is what the file says, a.lr=3"),
    ],
)  # fmt: skip
def test_arguments_become_options(message, expected):
    assert as_options(message, TEXT) == expected


def test_options_of_other_commands():
    assert as_options("top_p should be at most 1", SAMPLE) == "--top-p should be at most 1"
    assert as_options("escape=False, hidden=3", SAMPLE) == "--no-escape, hidden=3"
    assert as_options("use backend='cpu', resume=True, hidden=3") == "use --backend cpu, --resume, hidden=3"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("train text --lr -1", "--lr should be a finite number"),
        ("train text --weight-decay -1", "--weight-decay should be"),
        ("train text --valid 0 --patience 3", "--patience 3 needs a validation loss: --valid should be above 0"),
        ("train text --valid 0 --schedule plateau", "--schedule plateau needs a validation loss"),
        ("train text --warmup 3 --schedule plateau", "--warmup counts updates, --schedule plateau counts epochs"),
        ("train text --hidden 0", "--hidden should be at least 1"),
        ("train text --vocabulary-size 0", "--vocabulary-size should be at least 1"),
        ("train text --tied --embedding 3 --hidden 4", "hidden size"),
        ("train longrange --dropout 2", "--dropout should be"),
    ],
)
def test_what_reaches_people(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, arguments.split(), prog_name="gpurnn")
    assert done.exit_code == 2 and expected in done.stderr, done.output


@pytest.mark.long
@pytest.mark.parametrize("task", TASKS)
def test_a_setting_below_its_limit_is_named_as_its_option(task, tmp_path, monkeypatch):
    """For every number among the settings of every task."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    for param in _train_command(get_task(task)).params:
        numbers = isinstance(param, click.Option) and param.type in (click.INT, click.FLOAT)
        if numbers and param.name not in ("checkpoint_every",):
            option = max(param.opts, key=len)
            done = CliRunner().invoke(main, ["train", task, *([] if task == "longrange" else ["file"]), option, "-7"])
            if f"{param.name} " in done.stderr.replace("-", "_") and "should" in done.stderr:
                assert f"Error: {option} should" in done.stderr, done.stderr
