"""A run that begins from the model of another one, for every task: prepare(..., start=...)."""

import contextlib
import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hostile import TINY_TASKS

from gpurnn.checkpoint import load_checkpoint
from gpurnn.tasks import get_task
from gpurnn.tasks.run import prepare
from gpurnn.tasks.start import Start
from gpurnn.tasks.trained import load, read_run


def first_run(name, **more):
    files, usual = TINY_TASKS[name]
    settings = {"hidden": 4, "epochs": 1, "seed": 1, "batch": 4} | usual | more
    run = prepare(name, files, "run", backend="cpu", **settings)
    run.finish(run.train(progress=False))
    return files


@pytest.mark.long
@pytest.mark.parametrize("name", TINY_TASKS)
def test_every_task_can_be_trained_further(place, name):
    """The weights are those of the best epoch, the facts and the settings stay, and what is given differs."""
    files = first_run(name, weight_decay=0.25)
    run = prepare(name, files, "next", start="run", epochs=2, lr=0.125, backend="numpy")
    best = load("run", "numpy").model
    assert np.array_equal(run.model.flat_params, best.flat_params) and run.model.training
    history = run.train(progress=False)
    numbers, _ = run.finish(history)
    (old, was), (new, now) = read_run("run"), read_run("next")
    assert now["facts"] == was["facts"] and now["result"] == json.loads(json.dumps(numbers))
    changed = {f.name for f in dataclasses.fields(old) if getattr(old, f.name) != getattr(new, f.name)}
    assert changed == {"epochs", "lr"} and new.weight_decay == 0.25 and len(history.epochs) == 2


@pytest.mark.long
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_cells_and_precisions(place, cell, dtype):
    first_run("text", cell=cell, layers=2)
    run = prepare("text", ["book.txt"], "next", start="run", dtype=dtype, dropout=0.5, backend="cpu")
    run.train(progress=False)
    arrays, document = load_checkpoint("next/last.json")
    assert document["step"] > 0 and read_run("next")[0].cell == cell and read_run("next")[0].dtype == dtype


def test_what_start_excludes(place):
    first_run("text")
    with pytest.raises(ValueError, match="resume and start exclude each other"):
        prepare("text", [], "run", resume=True, start="run")
    with pytest.raises(ValueError, match="holds a run of the task text, not music"):
        prepare("music", ["tunes.json"], "next", start="run")
    with pytest.raises(ValueError, match=r"layers: expected 1, as the model of .*run has, got 3: leave it out"):
        prepare("text", ["book.txt"], "next", start="run", hidden=6, layers=3)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        prepare("text", ["book.txt"], "next", start="nothing")
    assert not (place / "next").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "name, changes",
    [
        ("text", {"level": "words", "vocabulary_size": 9, "tied": True, "embedding": 3}),
        ("classify", {"level": "characters", "vocabulary_size": 9, "pooling": "attention"}),
        ("translate", {"reverse_direction": True, "lowercase": True, "min_count": 1, "max_words": 9}),
        ("speech", {"target": "class", "bands": 30, "rate": 4000, "hop": 5.0, "stack": 1}),
        ("series", {"target": "x", "inputs": "x", "date": "none", "calendar": True, "log": True, "season": 3,
                    "residual": "none", "mode": "every", "interval": "80"}),
        ("longrange", {"problem": "copy", "init": "identity", "chrono": 9, "learn_state": True}),
    ],
)  # fmt: skip
def test_what_decides_the_model_stays(place, name, changes):
    files = first_run(name)
    for setting, value in changes.items():
        with pytest.raises(ValueError, match=f"^{setting}: expected .*, as the model of .*run has, got {value!r}"):
            prepare(name, files, "next", start="run", **{setting: value})
    assert not (place / "next").exists()


@pytest.mark.parametrize("name", TINY_TASKS)
def test_every_setting_of_the_model_is_compared(name):
    """Each of them alone, and none of the others."""
    settings = get_task(name).Settings(hidden=4, seed=1)
    start = Start(Path("run"), settings, {}, 0)
    for f in dataclasses.fields(settings):
        other = copy.copy(settings)
        setattr(other, f.name, "another value")
        if f.metadata.get("of_model"):
            with pytest.raises(ValueError, match=f"^{f.name}: expected"):
                start.check_settings(other)
            setattr(other, f.name, None)
            with contextlib.nullcontext() if getattr(settings, f.name) is None else pytest.raises(ValueError):
                start.check_settings(other)
        else:
            start.check_settings(other)


def test_what_was_found_may_be_given(place):
    """The column that the first run found is no other one; the number of rows that a decoder writes may change."""
    files = first_run("series", mode="recursive")
    facts = read_run("run")[1]["facts"]
    found = {name: facts[name] for name in ("target", "season", "residual")}
    prepare("series", files, "next", start="run", horizon=3, **found).close()
    with pytest.raises(ValueError, match=f"^target: expected {facts['target']!r}, as"):
        prepare("series", files, "other", start="run", target="x")


def test_a_size_that_the_weights_do_not_have(place):
    files = first_run("series")
    with pytest.raises(ValueError, match="was built with horizon=2: leave out what decides its size"):
        prepare("series", files, "next", start="run", horizon=3)


def test_sounds_that_the_model_does_not_fit(place):
    """Characters that it has no output for, and features of another size."""
    first_run("speech")
    table = (place / "sounds.tsv").read_text().splitlines()
    path, _, text = table[0].rpartition("\t")
    (place / "odd.tsv").write_text("\n".join([f"{path}\t{text}\u20ac", *table[1:]]) + "\n")
    with pytest.raises(ValueError, match="vocabulary: the model never saw '\u20ac'"):
        prepare("speech", ["odd.tsv"], "next", start="run")


def test_a_damaged_entry_of_config(place):
    from gpurnn.checkpoint import CheckpointError
    from gpurnn.files import write_json_atomic

    first_run("text")
    prepare("text", ["book.txt"], "next", start="run").close()
    document = read_run("next")[1]
    for damage in ({"run": 3, "crc32": 1}, {"run": "run"}, 7, {"run": "run", "crc32": "x"}):
        write_json_atomic(place / "next" / "config.json", document | {"start": damage})
        with pytest.raises(CheckpointError, match="config.json: is damaged"):
            read_run("next")
