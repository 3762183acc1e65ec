"""``gpurnn export RUN weights.safetensors`` and ``gpurnn info FILE``."""

import dataclasses
import json

import numpy as np
import pytest
from click.testing import CliRunner
from hostile import good_files

import gpurnn
from gpurnn.checkpoint import load_checkpoint
from gpurnn.cli import main
from gpurnn.model_file import read_facts
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load
from gpurnn.testing import leaves

pytestmark = pytest.mark.long
SHARED = {"hidden": 6, "epochs": 1, "seed": 1, "backend": "numpy", "batch": 4}
IDS = np.array([[1, 2], [3, 4], [5, 6]])
WINDOW = np.linspace(-1, 1, 6 * 2 * 1, dtype="float32").reshape(6, 2, 1)
RUNS = {  # name -> task, files, settings, inputs of a call
    "text": ("text", ["book.txt"], {"steps": 8, "tied": True, "dtype": "float16"}, [IDS]),
    "translate": ("translate", ["pairs.tsv"], {"layers": 2}, [(IDS, IDS)]),
    "series": ("series", ["series.csv"], {"window": 6, "horizon": 2}, [WINDOW]),
    "recursive": (
        "series", ["series.csv"], {"window": 6, "horizon": 2, "mode": "recursive", "interval": "80"},
        [(WINDOW, WINDOW[:2, :, :0])],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run of each, and its model file."""
    folder = tmp_path_factory.mktemp("runs")
    good_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.train.run_files.RunFiles.draw", lambda files: None)
        for name, (task, files, settings, _) in RUNS.items():
            with prepare(task, [folder / file for file in files], folder / name, **SHARED | settings) as run:
                run.train(progress=False)
            call("export", folder / name, folder / f"{name}.safetensors")
    return folder


def call(*arguments, code=0):
    done = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn")
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == code, done.output
    return done


@pytest.mark.parametrize("name", RUNS)
def test_a_run_loads_as_a_model(name, folder, tmp_path):
    model, expected = gpurnn.load(folder / f"{name}.safetensors", "numpy"), load(folder / name, "numpy").model
    gpurnn.save(model, tmp_path / "again.safetensors")
    for other in (model, gpurnn.load(tmp_path / "again.safetensors", "numpy")):
        assert repr(other) == repr(expected) and type(other) is type(expected)
        for one, two in zip(leaves(other(*RUNS[name][3])), leaves(expected(*RUNS[name][3])), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", RUNS)
def test_a_model_of_a_run_trains_on(name, folder):
    model = gpurnn.load(folder / f"{name}.safetensors", "numpy").train()
    *_, (outputs, backward) = [(found[0], found[-1]) for found in [model.forward(*RUNS[name][3])]]
    backward(np.ones_like(outputs))
    assert model.flat_grads.any()


def test_moments_stay_behind(folder):
    arrays, _ = load_checkpoint(folder / "translate" / "last.json")
    assert any(name.startswith("optimizer/") for name in arrays)
    size = (folder / "translate.safetensors").stat().st_size
    assert size < sum(array.nbytes for array in arrays.values())
    assert b"optimizer/" not in (folder / "translate.safetensors").read_bytes()


def test_what_the_run_was_is_said(folder):
    facts = json.loads(call("info", folder / "text.safetensors", "--json").output)
    config = json.loads((folder / "text" / "config.json").read_text())
    assert facts["run"]["task"] == "text" and facts["run"]["facts"] == config["facts"]
    assert facts["run"]["settings"] == config["settings"] and facts["run"]["files"] == ["book.txt"]
    assert facts["sizes"] == {"vocabulary": len(config["facts"]["vocabulary"])}
    assert facts["dtype"] == "float16" and facts["bytes"] == (folder / "text.safetensors").stat().st_size
    model = load(folder / "text", "numpy").model
    assert facts["parameters"] == model.parameter_count
    assert [layer["name"] for layer in facts["layers"]] == [name for name, _ in model.modules()]
    shown = call("info", folder / "text.safetensors").output
    assert "Model       Sequential, " in shown and f"{model.parameter_count:,} parameters, float16" in shown
    assert "recurrent: LSTM(6, 6, reset_to='initial')" in shown and "task text, 1 epochs" in shown
    assert f"vocabulary {facts['sizes']['vocabulary']}" in shown
    assert "source 8, target 8" in call("info", folder / "translate.safetensors").output


def test_a_file_without_a_run(tmp_path):
    layer = gpurnn.Recurrent(gpurnn.cells.mgu, 2, 3, backend="numpy").freeze("weight_ih_l0")
    gpurnn.save(layer, tmp_path / "m.safetensors")
    shown = call("info", tmp_path / "m.safetensors").output
    assert "Model       Recurrent(mgu, 2, 3), 42 parameters, float32" in shown
    assert "Frozen      weight_ih_l0" in shown and "Run" not in shown
    facts = json.loads(call("info", tmp_path / "m.safetensors", "--json").output)
    assert facts["run"] is None and facts["sizes"] == {} and facts["frozen"] == ["weight_ih_l0"]
    many = gpurnn.Sequential(*(gpurnn.Linear(1, 1, backend="numpy") for _ in range(23)))
    gpurnn.save(many, tmp_path / "m.safetensors")
    shown = call("info", tmp_path / "m.safetensors").output
    assert "Layer 20    19: Linear(1, 1), 2 parameters" in shown and "Layers      3 more" in shown


def test_bad_files_are_refused_in_one_line(folder, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes((folder / "text.safetensors").read_bytes()[:-1])
    assert f"Error: {path}: is damaged" in call("info", path, code=1).output
    (tmp_path / "book.txt").write_text("text")
    assert "should name a .safetensors file" in call("info", tmp_path / "book.txt", code=2).output


@pytest.mark.parametrize("option", [("--weights", "float16"), ("--no-states",), ("--part", "encoder")])
def test_options_of_onnx_are_refused(option, folder, tmp_path):
    done = call("export", folder / "translate", tmp_path / "m.safetensors", *option, code=2)
    name = option[0].replace("--no-", "--")
    assert f"{name}: a .safetensors has no such option: leave it out" in done.output
    assert not list(tmp_path.iterdir())


def with_run(data, change):
    """A file whose words on its run are changed, without a digest."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["run"] = json.dumps(json.loads(header["__metadata__"]["run"]) | change)
    del header["__metadata__"]["sha256"]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_a_vocabulary_that_marks_documents(folder, tmp_path):
    path, facts = tmp_path / "m.safetensors", {"vocabulary": {"entries": "\nab", "begins": "\n"}, "classes": 7}
    path.write_bytes(with_run((folder / "text.safetensors").read_bytes(), {"facts": facts}))
    assert read_facts(path)["sizes"] == {"vocabulary": 3}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"task": 3}, "run: task should be str, got int"),
        ({"progress": {"epoch": "x"}}, "run: epoch should be a number"),
        ({"data": {"summary": None}}, "the summary of its data should be a text"),
        ({"facts": []}, "run: facts should be dict"),
    ],
)
def test_what_a_file_says_of_its_run_is_checked(change, words, folder, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(with_run((folder / "text.safetensors").read_bytes(), change))
    with pytest.raises(gpurnn.CheckpointError, match=words):
        gpurnn.load(tmp_path / "m.safetensors", "numpy")


def test_import_makes_a_run_of_it(folder, tmp_path):
    """Which says, computes and samples what the exported run does."""
    file, again = tmp_path / "text.safetensors", tmp_path / "again"
    call("export", folder / "text", file)
    call("import", file, again)
    first, second = load(folder / "text", "numpy"), load(again, "numpy")
    assert first.facts == second.facts and first.settings == second.settings
    for name, value in first.model.state_dict().items():
        np.testing.assert_array_equal(second.model.state_dict()[name], value)
    sampled = [call("sample", run, "--length", "20", "--seed", "3").output for run in (folder / "text", again)]
    assert sampled[0] == sampled[1]
    assert "already holds a run" in call("import", file, again, code=2).output
    gpurnn.save(first.model, file)
    assert "says nothing of a run" in call("import", file, tmp_path / "other", code=2).output


def test_import_refuses_a_model_that_is_not_that_of_its_settings(folder, tmp_path):
    file = tmp_path / "text.safetensors"
    call("export", folder / "text", file)

    settings = load(folder / "text", "numpy").settings
    settings = dataclasses.asdict(settings) | {"cell": "gru" if settings.cell != "gru" else "lstm"}
    file.write_bytes(with_run(file.read_bytes(), {"settings": settings}))
    assert "its model is not that of its settings" in call("import", file, tmp_path / "run", code=2).output
    assert not (tmp_path / "run").exists()
