"""``gpurnn train``: what it shows while it trains, what it advises, --from, --lr find, and how a bad training ends."""

import json
import os
import random
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from optional import needs

from gpurnn import get_backend
from gpurnn.checkpoint import load_checkpoint
from gpurnn.cli import main
from gpurnn.run_folder import read_history
from gpurnn.tasks import get_task
from gpurnn.tasks.run import prepare, schedule_ends
from gpurnn.tasks.trained import load, read_run

TINY = ["--hidden", 8, "--steps", 8, "--batch", 4, "--epochs", 2, "--seed", 7, "--backend", "cpu"]


def words(count, letters, seed=0):
    draw = random.Random(seed)
    return " ".join(draw.choice(letters) for _ in range(count))


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Run the command in a folder that holds book.txt and more.txt."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
    Path("book.txt").write_text(words(300, ["gate", "state", "keeps"]))
    Path("more.txt").write_text(words(260, ["state", "gate", "keeps", "zoo"], seed=1))

    def call(*arguments, code=0):
        done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn")
        assert done.exit_code == code, done.output
        return done

    return call


def epoch_lines(text):
    return [line for line in text.splitlines() if line.startswith("epoch ")]


# ---- lines


@pytest.mark.parametrize("more", [[], ["--no-progress"]])
def test_a_line_for_each_epoch(call, more):
    done = call("train", "text", "book.txt", "--out", "run", *TINY, *more)
    lines = epoch_lines(done.stdout)
    records = [record for record in read_history("run/history.jsonl") if record["kind"] == "epoch"]
    assert len(lines) == 2 and "|" not in done.stderr
    for line, record in zip(lines, records, strict=True):
        expected = f"epoch {record['epoch']}/2  train {record['train_loss']:.4f}  valid {record['validation_loss']:.4f}"
        assert line.startswith(expected) and line.endswith(" s")


def test_lines_go_to_standard_error_beside_json(call):
    done = call("train", "text", "book.txt", "--out", "run", *TINY, "--json")
    assert json.loads(done.stdout)["epochs"] == 2 and len(epoch_lines(done.stderr)) == 2


def test_early_stopping_is_said(call):
    options = ["--lr", "1e-30", "--schedule", "constant", "--patience", 1, "--epochs", 9]
    done = call("train", "text", "book.txt", "--out", "run", *TINY, *options)
    assert "stopped after epoch 2: no better for 1 epoch, best epoch 1" in done.stdout
    assert "--from run" in done.stdout and "--resume --epochs" not in done.stdout  # which would stop at once
    again = call("train", "text", "--out", "run", "--resume", "--epochs", 18)
    assert not epoch_lines(again.stdout) and "no better for 1 epoch" in again.stdout


# ---- advice


def commands(text):
    return [shlex.split(line) for line in text.partition("\nNext:\n")[2].splitlines()]


@pytest.mark.long
def test_advice_can_be_pasted_into_a_shell(call):
    Path("my book é.txt").write_bytes(Path("book.txt").read_bytes())
    found = commands(call("train", "text", "my book é.txt", "--out", "my run", *TINY).stdout)
    assert ["gpurnn", "sample", "my run", "--length", "1000"] in found
    assert found[-1] == ["gpurnn", "train", "text", "my book é.txt", "--from", "my run"]
    done = call(*found[-1][1:], "--out", "next")
    assert "From        my run" in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("schedule, helps", [("constant", True), ("plateau", True), ("cosine", False), ("step", False)])
def test_more_epochs_are_advised_where_they_help(call, schedule, helps):
    text = call("train", "text", "book.txt", "--out", "run", *TINY, "--schedule", schedule).stdout
    assert ("--resume --epochs 4" in text) is helps and ("--from run" in text) is not helps


@pytest.mark.parametrize("here", [pytest.param(True, marks=needs("matplotlib")), False])
def test_a_plot_is_advised_where_it_can_be_drawn(call, monkeypatch, here):
    if not here:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert ("gpurnn plot run" in call("train", "text", "book.txt", "--out", "run", *TINY).stdout) is here
    Path("a.csv").write_text("n,y\n" + "".join(f"{n},{n % 7}\n" for n in range(90)))
    sizes = ["--window", 5, "--horizon", 2, "--hidden", 4, "--epochs", 1, "--no-progress"]
    said = call("train", "series", "a.csv", "--out", "series", *sizes).stdout
    assert f"gpurnn forecast series {'--plot forecast.png ' * here}--out forecast.csv" in said
    if not here:
        said = call("plot", "run", code=1).stderr
        assert said == 'Error: plots need Matplotlib: pip install "gpurnn[plot]"\n'


# ---- resume


def test_fewer_epochs_than_there_were_are_refused(call):
    call("train", "text", "book.txt", "--out", "run", *TINY)
    before = Path("run/config.json").read_bytes()
    done = call("train", "text", "--out", "run", "--resume", "--epochs", 1, code=2)
    assert "--epochs should be at least 2, as many as run has had already, got 1" in done.stderr
    assert Path("run/config.json").read_bytes() == before


@pytest.mark.long
def test_the_end_of_the_schedule_is_that_of_its_beginning(call):
    """Whatever --epochs was said since. The note is there where the rate stays low, and only there."""
    for schedule, options in (("cosine", []), ("step", []), ("cosine", ["--warmup", 15, "--accumulate", 2])):
        name = f"{schedule}{len(options)}"
        call("train", "text", "book.txt", "--out", name, *TINY, "--epochs", 3, "--schedule", schedule, *options)
        assert schedule_ends(name, read_run(name)[0]) == 3
        for epochs in (3, 4, 5):
            done = call("train", "text", "--out", name, "--resume", "--epochs", epochs)
            said = f"the {schedule} schedule of the learning rate was made for 3 epochs" in re.sub(
                r"\s+", " ", done.stdout
            )
            assert said is (epochs > 3), done.stdout
            assert read_run(name)[0].epochs == epochs


def test_other_data_are_refused_and_the_cure_is_named(call):
    call("train", "text", "book.txt", "--out", "run", *TINY)
    done = call("train", "text", "more.txt", "--out", "run", "--resume", code=2)
    assert "a resumed run needs the same data" in done.stderr and "--from run" in done.stderr
    done = call("train", "text", "--out", "run", "--resume", "--lr", "0.1", code=2)
    assert "run has --lr 0.004" in done.stderr and "--from run" in done.stderr


# ---- documents


def test_documents_of_a_text(call):
    """Their beginnings count; they are known to a run that begins from this one, and to a sample."""
    done = call("train", "text", "book.txt", "more.txt", "--documents", "files", "--out", "run", *TINY)
    size = sum(len(Path(name).read_text()) + 1 for name in ("book.txt", "more.txt"))
    assert f"{size:,} characters" in done.stdout
    assert json.loads(Path("run/config.json").read_text())["settings"]["documents"] == "files"
    assert json.loads(call("info", "run", "--json").stdout)["changed"]["documents"] == "files"
    found = json.loads(call("evaluate", "run", "more.txt", "--json").stdout)
    assert found["characters"] == len(Path("more.txt").read_text()) + 1
    text = json.loads(call("sample", "run", "--length", 400, "--temperature", 5, "--seed", 1, "--json").stdout)["text"]
    shown = call("sample", "run", "--length", 400, "--temperature", 5, "--seed", 1).stdout
    assert "\x02" in text and shown == text.replace("\x02", r"\x02") + "\n"
    call("train", "text", "more.txt", "--from", "run", "--out", "next", "--epochs", 1)
    assert read_run("next")[0].documents == "files"
    call("train", "text", "book.txt", "--out", "plain", *TINY)
    done = call("train", "text", "more.txt", "--from", "plain", "--out", "x", "--documents", "files", code=2)
    assert "--documents should be 'none', got 'files'" in done.stderr and not Path("x").exists()
    assert "'none', 'lines', 'files'" in call("train", "text", "--documents", "pages", code=2).stderr


# ---- --from


def weights(folder, name="best"):
    arrays, _ = load_checkpoint(Path(folder) / f"{name}.json")
    return {key: array for key, array in sorted(arrays.items()) if key.startswith("model/")}


def of_the_model(run):
    """The facts that a model needs: vocabulary, classes, scaling; not what it was trained on."""
    return {name: fact for name, fact in run[1]["facts"].items() if name != "trained_on"}


@pytest.mark.long
def test_a_model_is_trained_further_on_other_text(call):
    call("train", "text", "book.txt", "--out", "run", *TINY)
    done = call("train", "text", "more.txt", "--from", "run", "--out", "next", "--epochs", 3)
    text = re.sub(r"\s+", " ", done.stdout)
    unknown = Path("more.txt").read_text().count("z") + Path("more.txt").read_text().count("o")
    assert f"{unknown} characters of the data are unknown to the model" in text
    old, new = read_run("run"), read_run("next")
    assert of_the_model(new) == of_the_model(old) and new[0].hidden == 8 and new[0].epochs == 3
    assert new[1]["start"]["run"] == str(Path("run").resolve())
    call("sample", "next", "--length", 5)


def test_the_weights_are_those_of_the_best_epoch_and_the_rest_begins_anew(call):
    """With a rate of next to nothing the new run's weights are the old ones; its history begins with epoch 1."""
    call("train", "text", "book.txt", "--out", "run", *TINY)
    options = ["--lr", "1e-30", "--schedule", "constant", "--epochs", 1]
    call("train", "text", "more.txt", "--from", "run", "--out", "next", *options)
    old, new = weights("run"), weights("next", "last")
    assert all(np.array_equal(old[name], new[name]) for name in old)
    records = read_history("next/history.jsonl")
    assert [r["epoch"] for r in records if r["kind"] == "epoch"] == [1] and records[0]["lr"] == 1e-30


@pytest.mark.long
def test_a_run_from_another_resumes_with_the_same_bits(call):
    """Also where it was stopped before its first checkpoint; then the other run must be as it was."""
    call("train", "text", "book.txt", "--out", "run", *TINY)
    whole = ["train", "text", "more.txt", "--from", "run", "--epochs", 2]
    call(*whole, "--out", "whole")
    prepare("text", ["more.txt"], "parts", start="run", epochs=2).close()  # stopped before it began
    call("train", "text", "--out", "parts", "--resume")
    assert all(np.array_equal(a, b) for a, b in zip(weights("whole").values(), weights("parts").values(), strict=True))
    prepare("text", ["more.txt"], "late", start="run", epochs=2).close()
    call("train", "text", "--out", "run", "--resume", "--epochs", 3)
    done = call("train", "text", "--out", "late", "--resume", code=2)
    assert "was trained on since this run began from it" in done.stderr
    call("train", "text", "--out", "whole", "--resume", "--epochs", 3)  # which has a checkpoint of its own


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--from", "run", "--out", "run", "--overwrite"], "is the folder of the new run itself"),
        (["--from", "run", "--out", "x", "--hidden", 9], "--hidden: expected 8, as the model of"),
        (["--from", "run", "--out", "x", "--cell", "gru"], "--cell: expected 'lstm', as the model of"),
        (["--from", "run", "--out", "run", "--resume"], "--resume and --from exclude each other"),
        (["--from", "nothing", "--out", "x"], "does not exist"),
    ],
)
def test_what_from_refuses(call, arguments, expected):
    call("train", "text", "book.txt", "--out", "run", *TINY)
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert expected in call("train", "text", "more.txt", *arguments, code=2).stderr
    assert not Path("x").exists() and before == {path.name: path.read_bytes() for path in Path("run").iterdir()}


def test_from_refuses_a_folder_that_holds_no_model(call):
    Path("empty").mkdir()
    assert "holds no run" in call("train", "text", "more.txt", "--from", "empty", code=1).stderr
    prepare("text", ["book.txt"], "new", hidden=4, steps=8, batch=4).close()
    assert "holds no checkpoint yet" in call("train", "text", "more.txt", "--from", "new", code=1).stderr
    assert not list(Path("runs").iterdir())


def reviews(count, seed=0, labels=("pos", "neg"), noun="film"):
    draw = random.Random(seed)
    kinds = {"pos": ["good", "fine"], "neg": ["bad", "dull"], "odd": ["weird"]}
    return "".join(f"{draw.choice(kinds[label])} {noun} {n}\t{label}\n" for n in range(count) for label in labels)


def test_more_labelled_texts(call):
    tiny = ["--hidden", 4, "--epochs", 2, "--seed", 1, "--backend", "cpu"]
    Path("a.tsv").write_text(reviews(20))
    Path("b.tsv").write_text(reviews(30, 1, noun="movie"))
    Path("one.tsv").write_text(reviews(30, 2, ["neg"]))
    Path("odd.tsv").write_text(reviews(20, 3, ["pos", "odd"]))
    call("train", "classify", "a.tsv", "--out", "run", *tiny)
    done = call("train", "classify", "b.tsv", "--from", "run", "--out", "more")
    assert "words of the data are unknown to the model" in re.sub(r"\s+", " ", done.stdout)
    assert of_the_model(read_run("more")) == of_the_model(read_run("run"))
    call("train", "classify", "one.tsv", "--from", "run", "--out", "one")
    assert load("one", "cpu").facts["classes"] == ["neg", "pos"]
    assert "a label that the model never saw, 'odd'" in call(
        "train", "classify", "odd.tsv", "--from", "run", "--out", "x", code=2
    ).stderr  # fmt: skip


def test_appended_rows_of_a_series(call):
    rows = [f"{n},{100 + 3 * (n % 6) + 0.1 * n:.2f}\n" for n in range(90)]
    Path("old.csv").write_text("n,x\n" + "".join(rows[:80]))
    Path("new.csv").write_text("n,x\n" + "".join(rows))
    tiny = ["--hidden", 4, "--epochs", 1, "--seed", 1, "--window", 6, "--horizon", 2, "--backend", "cpu"]
    call("train", "series", "old.csv", "--out", "run", *tiny)
    call("train", "series", "new.csv", "--from", "run", "--out", "more")
    assert of_the_model(read_run("more")) == of_the_model(read_run("run"))  # scaling and season, too
    assert "80 rows" in read_run("run")[1]["data"]["summary"] and "90 rows" in read_run("more")[1]["data"]["summary"]
    call("forecast", "more")


# ---- the learning-rate finder


@pytest.mark.long
def test_a_rate_is_found(call):
    done = call("train", "text", "book.txt", "--out", "run", *TINY, "--lr", "find", "--schedule", "constant")
    rate = read_run("run")[0].lr
    assert f"the finder suggests --lr {rate:g}" in done.stdout and 1e-4 < rate < 1
    assert read_history("run/history.jsonl")[0]["lr"] == rate
    call("train", "text", "book.txt", "--out", "again", *TINY, "--lr", rate, "--schedule", "constant")
    assert all(np.array_equal(a, b) for a, b in zip(weights("run").values(), weights("again").values(), strict=True))
    call("train", "text", "--out", "run", "--resume", "--epochs", 3)
    assert read_run("run")[0].lr == rate
    assert "not a valid float" in call("train", "text", "book.txt", *TINY, "--lr", "fast", code=2).stderr


def test_a_resumed_run_has_its_rate(call):
    call("train", "text", "book.txt", "--out", "run", *TINY)
    assert "--lr find" in call("train", "text", "--out", "run", "--resume", "--lr", "find", code=2).stderr


# ---- a training that diverged


@pytest.mark.parametrize("json_too", [False, True])
def test_a_training_that_is_worse_than_guessing_ends_with_1(call, json_too):
    options = ["--lr", 100, "--clip", 0, *(["--json"] if json_too else [])]
    done = call("train", "text", "book.txt", "--out", "run", *TINY, *options, code=1)
    last = done.stderr.splitlines()[-1]
    assert (
        last
        == "Error: the training diverged: try a lower --lr (it was 100) and a limit of the gradient's norm (--clip 1)"
    )
    assert read_run("run")[1]["result"]["diverged"] is True
    if json_too:
        assert json.loads(done.stdout)["diverged"] is True
    else:
        guess = np.log(1 + len(set(Path("book.txt").read_text())))
        assert "Done" not in done.stdout and "Next:" not in done.stdout
        assert re.search(rf"its best loss is [\d.]+, that of blind guessing {guess:.4g}", done.stdout)


def test_a_training_that_learns_nothing_has_not_diverged(call):
    call("train", "text", "book.txt", "--out", "run", *TINY, "--lr", "1e-30")
    assert "diverged" not in read_run("run")[1]["result"]


def test_the_environment_has_a_width(call, monkeypatch):
    """Of 45 columns: no word of our own is broken, no line is longer."""
    monkeypatch.setenv("COLUMNS", "45")
    done = call("train", "text", "book.txt", "--out", "run", *TINY, "--valid", 0)
    head = done.stdout.partition("epoch 1/")[0]
    assert max(map(len, head.splitlines())) <= 45 and "vocabulary" in head and "parameters" in head
    assert os.environ["COLUMNS"] == "45"


# ---- 16 bits


@pytest.mark.long
@pytest.mark.parametrize("dtype, backend", [("float16", "numpy"), ("float16", "cpu"), ("float32", "numpy")])
def test_16_bits_in_array_code_are_advised_against(call, dtype, backend):
    slow = dtype == "float16" and get_backend(backend).name == "numpy"
    how = *TINY, "--dtype", dtype, "--backend", backend
    said = " ".join(call("train", "text", "book.txt", "--out", "run", *how).stdout.split())
    noted = "Note float16 and bfloat16 are array code on the backend numpy" in said
    assert (noted and "use --dtype float32" in said) is slow
    notes = json.loads(call("train", "text", "book.txt", *how, "--json").stdout)["notes"]
    assert any("array code" in note for note in notes) is slow


# ---- names


@pytest.mark.parametrize(
    "words, said",
    [
        ("trian", "No such command 'trian'. Did you mean 'train'"),
        ("train classfy", "No such command 'classfy'. Did you mean 'classify'?"),
        ("train adding", "It is a problem of another task: gpurnn train longrange --problem adding"),
        ("train longrange adding", "'adding' is no file but a problem: --problem adding."),
        ("train text adding", "Path 'adding' does not exist."),
        ("train zzz", "No such command 'zzz'.\n"),
    ],
)
def test_a_near_miss_is_helped(call, words, said):
    assert said in call(*words.split(), code=2).stderr


def test_the_next_command_of_a_problem_runs(call):
    small = ["--hidden", 4, "--steps", 12, "--sequences", 32, "--epochs", 1]
    found = commands(call("train", "longrange", "--out", "run", *small).stdout)
    assert found[0] == ["gpurnn", "evaluate", "run"]
    call(*found[0][1:])
    images = get_task("longrange").Settings(problem="rows")
    assert get_task("longrange").next_commands(images) == ("gpurnn evaluate {run} mnist.npz",)
