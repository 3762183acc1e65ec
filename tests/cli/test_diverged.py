"""A model whose numbers are not finite: its training ends with what there is to tell, and nothing is made of it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from hostile import TINY_TASKS

from gpurnn.cli import main
from gpurnn.data.utterances import read_utterances
from gpurnn.errors import DivergedError
from gpurnn.tasks import music, speech
from gpurnn.tasks import run as runs


@pytest.fixture
def diverged(place, monkeypatch):
    """A function: the run of a task whose weights load as NaN."""

    def load(*arguments, real=runs.load):
        trained = real(*arguments)
        trained.model.flat_params[...] = np.nan
        return trained

    def make(name, **more):
        files, usual = TINY_TASKS[name]
        settings = {"hidden": 4, "epochs": 1, "seed": 1, "batch": 4} | usual | more
        run = runs.prepare(name, files, "run", backend="cpu", **settings)
        history = run.train(progress=False)
        monkeypatch.setattr(runs, "load", load)
        for command in ("sample", "classify", "evaluate", "translate", "transcribe", "compose", "forecast"):
            monkeypatch.setattr(f"gpurnn.cli.{command}.load", load)
        return run, history

    return make


# ---- the end of a training


@pytest.mark.parametrize("name", TINY_TASKS)
def test_a_training_that_diverged_ends_and_says_so(diverged, name):
    run, history = diverged(name)
    if name == "speech":
        run.data.rest = read_utterances("sounds.tsv", run.settings, None)[0]  # a test part
    numbers, text = run.finish(history)
    shown = {"text": "sample", "translate": "translations"}.get(name, "test")
    assert f"No {shown}: the model has diverged" in text and "loss" in text.splitlines()[0]
    assert numbers["diverged"] is True and numbers["best"] > 0
    document = runs.read_run("run")[1]
    assert document["result"] == json.loads(json.dumps(numbers))


def test_the_command_ends_well(diverged):
    diverged("text")
    tiny = ["--hidden", "4", "--epochs", "1", "--batch", "4", "--steps", "8", "--no-progress"]
    done = CliRunner().invoke(main, ["train", "text", "book.txt", "--out", "new", *tiny])
    assert done.exit_code == 1, done.output
    assert "Diverged in" in done.output and "Best validation loss" in done.output and "Next:" not in done.output
    assert "No sample: the model has diverged (its logits are not finite)." in done.output
    assert done.stderr.splitlines()[-1].startswith("Error: the training diverged: try a lower --lr (it was 0.004)")


# ---- use


@pytest.mark.parametrize(
    "name, command",
    [
        ("text", ["sample", "run"]),
        ("classify", ["classify", "run", "text"]),
        ("classify", ["evaluate", "run", "labelled.tsv"]),
        ("translate", ["translate", "run", "word"]),
        ("speech", ["transcribe", "run", "tone.wav"]),
        ("music", ["compose", "run", "--temperature", "0"]),
        ("music", ["compose", "run", "--voices", "2"]),
        ("series", ["forecast", "run"]),
        ("series", ["evaluate", "run", "series.csv"]),
        ("longrange", ["evaluate", "run"]),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else value,
)
def test_nothing_is_made_of_a_model_that_diverged(diverged, name, command):
    diverged(name)
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and "The model has diverged" in done.stderr, done.output
    assert done.stdout == "" and ".csv" not in done.stderr and ".tsv" not in done.stderr
    with pytest.raises(DivergedError):
        CliRunner().invoke(main, ["--debug", *command], catch_exceptions=False)


def test_classes_of_sounds(diverged):
    diverged("speech", target="class")
    with pytest.raises(DivergedError, match="logits"):
        speech.transcribe(runs.load("run"), np.zeros((4, 40)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_key_is_enough(diverged, bad):
    run, _ = diverged("music")
    run.model.eval()
    run.model.params["linear.bias"][7] = bad
    with pytest.raises(DivergedError, match="logits"):
        music.compose(run.model, 3)
