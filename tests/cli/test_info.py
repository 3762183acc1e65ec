"""``gpurnn info RUN`` says what a run is: as the run's own files and its training have it."""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from gpurnn.backends.cpu import native
from gpurnn.cli import main
from gpurnn.cli.run_facts import rows_of
from gpurnn.tasks import get_task
from gpurnn.tasks.run import prepare

TINY = {"hidden": 6, "batch": 4, "valid": 0.2, "seed": 3, "backend": "numpy"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of a text run of three epochs and of a classify run, and what ``fit`` returned for each."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("a quiet gate\n" * 60)
    rng = np.random.default_rng(0)
    lines = [f"{''.join(rng.choice(list(letters), 9))}\t{letters}" for letters in ("xay", "xby") for _ in range(40)]
    (folder / "texts.tsv").write_text("\n".join(lines) + "\n")
    histories = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
        for task, file, more in (("text", "book.txt", {"steps": 8}), ("classify", "texts.tsv", {"embedding": 4})):
            with prepare(task, [folder / file], folder / task, epochs=3, **TINY, **more) as run:
                histories[task] = run.train(progress=False), run.model.parameter_count
                run.finish(histories[task][0])
    return folder, histories


@pytest.fixture
def copied(runs, tmp_path, monkeypatch):
    shutil.copytree(runs[0], tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return runs[1]


def info(*arguments, code=0):
    done = CliRunner().invoke(main, ["info", *arguments])
    assert done.exit_code == code, done.output
    return done.output


@pytest.mark.parametrize("task, watched, good", [("text", "loss", min), ("classify", "accuracy", max)])
def test_facts_are_those_of_the_training(copied, task, watched, good):
    facts, (history, parameters) = json.loads(info(task, "--json")), copied[task]
    config = json.loads(Path(task, "config.json").read_text())
    assert [facts[name] for name in ("task", "backend", "settings")] == [task, "numpy", config["settings"]]
    assert (facts["data"], facts["result"]) == (config["data"]["summary"], config["result"])
    assert facts["parameters"] == parameters
    last, scores = history.epochs[-1], [record[f"validation_{watched}"] for record in history.epochs]
    trained = facts["trained"]
    assert (trained["epochs"], trained["of_epochs"], trained["updates"]) == (3, 3, last["step"])
    assert trained["seconds"] >= round(last["seconds"], 3) > 0
    best = {"score": f"validation {watched}", "value": good(scores), "epoch": 1 + scores.index(good(scores))}
    assert trained["best"] == best
    sizes = {file.name: file.stat().st_size for file in Path(task).iterdir()}
    assert facts["bytes"] == sizes


def test_settings_that_differ_from_the_defaults(copied):
    changed = json.loads(info("text", "--json"))["changed"]
    assert changed == {"hidden": 6, "batch": 4, "valid": 0.2, "epochs": 3, "steps": 8}
    output = info("text")
    assert "hidden 6, batch 4, epochs 3, valid 0.2, steps 8; the others are the defaults" in " ".join(output.split())
    assert "seed 3" in output


def test_a_run_with_the_defaults(copied):
    config = json.loads(Path("text", "config.json").read_text())
    defaults = {f.name: f.default for f in fields(get_task("text").Settings)}
    Path("plain").mkdir()
    config.pop("sha256")  # as the first edition wrote it
    Path("plain", "config.json").write_text(json.dumps(config | {"settings": defaults | {"seed": 7}}))
    assert "Settings    the defaults\n" in info("plain")


def test_the_lines(copied):
    output = info("classify")
    assert max(map(len, output.splitlines())) <= 80
    names = [line.split()[0] for line in output.splitlines() if line[0] != " "]
    assert names == ["Run", "Data", "Model", "Settings", "Backend", "Trained", "Best", "Result", "Size"]
    assert "texts.tsv: " in output and "3 of 3 epochs" in output and "validation accuracy" in output
    text = info("text")
    result = next(line for line in text.splitlines() if line.startswith("Result"))
    assert "nats" in result and "sample" not in text  # the sample is long; --json has it


def test_a_result_is_shown_in_short():
    facts = {"result": {"error": 0.123456, "counts": [3, 4, 5], "held_out": True, "sample": "x" * 70}}
    facts["result"]["test"] = {"season": 12, "model": {"mae": 0.123456, "of_each": list(range(9))}, "say": "y" * 70}
    facts["result"]["translations"] = {"a": "b" * 70}
    settings = {"cell": "gru", "layers": 2, "hidden": 3, "dtype": "float32", "seed": 1}
    facts |= {"run": "r", "task": "text", "data": "d", "files": [], "backend": "cpu", "parameters": None, "bytes": {}}
    rows = rows_of(facts | {"settings": settings, "changed": {}, "trained": None})
    assert rows["Result"] == "error 0.1235, counts (3, 4, 5), held out True"
    assert rows["Test"] == "season 12, model (mae 0.1235, of each (9 values))" and "Translations" not in rows
    many = [{"path": f"/data/{n}.txt", "exists": True} for n in range(5)]
    rows = rows_of(facts | {"settings": settings, "changed": {}, "trained": None, "files": many})
    assert rows["Data"] == "0.txt, 4 more files: d"


def test_the_result_of_a_series_is_shown_in_words():
    one = {"mae": 9.0434, "rmse": 12.5, "mase": 0.5, "mse_standardised": 0.1, "mae_standardised": 0.2}
    part = {"windows": 13, "season": 12, "model": one, "naive": one | {"mae": 30.0}}
    part |= {"seasonal_naive": one | {"mae": 20.0}, "calibrated": True}
    part["intervals"] = {"80": {"coverage": 0.8205, "extent": 36.26}}
    settings = {"cell": "gru", "layers": 2, "hidden": 3, "dtype": "float32", "seed": 1}
    facts = {"run": "r", "task": "series", "data": "d", "files": [], "backend": "cpu", "parameters": None, "bytes": {}}
    facts |= {"settings": settings, "changed": {}, "trained": None, "result": {"margins": [1.311], "test": part}}
    rows = rows_of(facts)
    assert "Result" not in rows and rows["Test"] == (
        "13 forecasts, MAE 9.0434, RMSE 12.5, MASE 0.5; seasonal-naive MAE 20, naive MAE 30; "
        "80 % interval: covers 82.0 %, mean width 36.26"
    )
    part |= {"season": 1, "model": one | {"mase": None}, "intervals": {}}
    assert rows_of(facts)["Test"] == "13 forecasts, MAE 9.0434, RMSE 12.5; naive MAE 30"
    del part["naive"]  # not what the task gave: listed
    assert "model (mae 9.043" in rows_of(facts)["Test"]


def test_without_the_last_checkpoint_the_best_one_counts(copied):
    best = json.loads(Path("text", "best.json").read_text())["document"]
    Path("text", "last.json").unlink()
    trained = json.loads(info("text", "--json"))["trained"]
    assert (trained["epochs"], trained["updates"]) == (best["epoch"], best["step"])


def test_data_that_is_gone_is_said(copied):
    facts = json.loads(info("text", "--json"))
    assert facts["files"] == [{"path": facts["files"][0]["path"], "exists": True}]
    os.remove(facts["files"][0]["path"])
    try:
        assert "book.txt (gone): " in info("text")
    finally:
        Path(facts["files"][0]["path"]).write_text("a quiet gate\n" * 60)


def test_before_the_first_checkpoint(copied):
    Path("new").mkdir()
    shutil.copy("text/config.json", "new")
    facts = json.loads(info("new", "--json"))
    assert facts["trained"] is None and facts["parameters"] is None
    assert "no checkpoint yet" in info("new")


@pytest.mark.parametrize("name", ["config.json", "best.json", "last.json", "best tensors", "last tensors"])
def test_a_damaged_run_is_one_line(copied, name):
    stem, _, tensors = name.partition(" ")
    path = next(Path("text").glob(f"{stem}-*.safetensors")) if tensors else Path("text", name)
    path.write_bytes(path.read_bytes()[:-7])
    output = info("text", code=1)
    assert output.count("\n") == 1 and output.startswith(f"Error: {path}")


def test_a_folder_without_a_run(copied):
    assert info(".", code=1) == "Error: . holds no run: config.json is missing\n"
    assert "does not exist" in info("nothing", code=2)


@pytest.mark.parametrize("files, expected", [
    ({"WHEEL": "Root-Is-Purelib: false\nTag: py3-none-manylinux2014_x86_64\nTag: py3-none-manylinux_2_17_x86_64\n"},
     "py3-none-manylinux2014_x86_64, py3-none-manylinux_2_17_x86_64"),
    ({"WHEEL": "Tag: py3-none-any\n", "direct_url.json": '{"url": "file:///x", "archive_info": {}}'}, "py3-none-any"),
    ({"WHEEL": "Tag: py3-none-any\n", "direct_url.json": '{"url": "file:///x", "dir_info": {"editable": true}}'}, None),
    ({}, None),
])  # fmt: skip
def test_the_wheel_of_this_installation(files, expected, monkeypatch):
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: SimpleNamespace(read_text=files.get))
    assert json.loads(info("--json"))["wheel"] == expected
    assert (expected or "no wheel: a checkout") in " ".join(info().split())


@pytest.mark.skipif(native.library_path() is None, reason="gpurnn._native was not built")
def test_the_compiled_code_of_this_installation(monkeypatch):
    monkeypatch.delenv("GPURNN_ISA", raising=False)
    native.load_native.cache_clear()
    found = json.loads(info("--json"))["library"]
    assert found["file"] == native.library_path().name and found["isa"] == found["best_isa"] in native.ISAS
    monkeypatch.setattr(native, "load_native", lambda: (native.ctypes.CDLL(str(native.library_path())), 0))
    text = " ".join(info().split())
    forced = "" if found["best_isa"] == "baseline" else f", by GPURNN_ISA; this processor can {found['best_isa']}"
    assert f"with the instruction set baseline{forced}" in text
    monkeypatch.setattr(native, "load_native", lambda: None)
    assert json.loads(info("--json"))["library"] is None
