"""One way to a model's weights: ``save_weights`` and ``load_weights``, whoever wrote the file; errors that say what a
file is and which function reads it."""

import json
import re
import shutil

import numpy as np
import pytest

import gpurnn
from gpurnn import CheckpointError, Linear, Sequential, load_checkpoint, load_weights, save_checkpoint, save_weights
from gpurnn.data import SequenceBatches

OPTIONS = {"backend": "cpu", "dtype": "float64"}


def build(seed=1, outputs=3):
    return Sequential(
        {
            "rnn": gpurnn.LSTM(4, 5, seed=seed, **OPTIONS),
            "norm": gpurnn.BatchNorm(5, **OPTIONS),
            "head": Linear(5, outputs, seed=seed, **OPTIONS),
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(Folder of a run of ``fit``, its model.)"""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    source = SequenceBatches(
        [rng.standard_normal((4, 4)) for _ in range(4)], [rng.integers(0, 3, 4) for _ in range(4)], 2
    )
    model = build()
    adam = gpurnn.Adam(model)
    gpurnn.fit(model, gpurnn.cross_entropy, source, optimizer=adam, epochs=1, out=folder, progress=False)
    return folder, model


def assert_loaded(model, path, expected):
    load_weights(model, path)
    for name, value in expected.state_dict().items():
        np.testing.assert_array_equal(model.state_dict()[name], value)


@pytest.mark.long
def test_every_file_with_weights_goes_in_the_same_way(run, tmp_path):
    folder, model = run
    for path in (folder / "last.json", str(folder / "best.json"), folder):
        assert_loaded(build(seed=2), path, model)
    save_weights(model, tmp_path / "weights.json")
    assert_loaded(build(seed=2), tmp_path / "weights.json", model)
    save_checkpoint(tmp_path / "own.json", model.state_dict(), {"epoch": 3})
    assert_loaded(build(seed=2), tmp_path / "own.json", model)
    shutil.copytree(folder, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "best.json").unlink()
    assert_loaded(build(seed=2), tmp_path / "unfinished", model)


def test_the_oldest_way_still_works(tmp_path):
    model = build()
    save_weights(model, tmp_path / "weights.json")
    arrays, document = load_checkpoint(tmp_path / "weights.json")
    assert document["kind"] == "weights"
    other = build(seed=2)
    other.load_state_dict(arrays)
    np.testing.assert_array_equal(other.flat_params, model.flat_params)


def test_names_with_the_prefix_of_fit(tmp_path):
    model = Sequential({"model/a": Linear(2, 2, seed=1, **OPTIONS)})
    save_weights(model, tmp_path / "weights.json")
    assert_loaded(Sequential({"model/a": Linear(2, 2, seed=2, **OPTIONS)}), tmp_path / "weights.json", model)


def refuse(path, message, model=None, error=CheckpointError):
    model = build(seed=2) if model is None else model
    before = model.state_dict()
    with pytest.raises(error, match=message) as caught:
        load_weights(model, path)
    for name, value in before.items():
        np.testing.assert_array_equal(model.state_dict()[name], value)
    return str(caught.value)


def test_what_does_not_fit(run, tmp_path):
    folder, model = run
    said = refuse(folder / "last.json", "last.json: does not fit this model: ", build(outputs=2))
    assert "head.weight: expected shape (2, 5), got (3, 5)" in said
    save_checkpoint(tmp_path / "half.json", {k: v for k, v in model.state_dict().items() if "rnn" in k}, {})
    assert "missing ['norm.weight'" in refuse(tmp_path / "half.json", "half.json: does not fit this model: ")
    save_checkpoint(tmp_path / "other.json", {"score": np.zeros(3)}, {})
    refuse(
        tmp_path / "other.json",
        r"other.json: holds no weights of this model: its arrays are score, the model's rnn.weight_ih_l0, .*\. "
        r"load_checkpoint\(path\) reads arrays of any kind",
    )


def test_other_files_are_called_by_their_name(run, tmp_path):
    folder, model = run
    (tensors,) = folder.glob("best-*.safetensors")
    for reader in (lambda path: load_weights(model, path), load_checkpoint):
        for path, message in (
            (tensors, r"best-\w+.safetensors holds the arrays of a checkpoint: give its .json file, .*best.json"),
            ("model.safetensors", r"model.safetensors: .*model.load_state_dict\(safetensors.numpy.load_file\(path\)\)"),
            ("model.pt", r"model.pt: .*model.load_state_dict\(torch.load\(path\)\)"),
            ("model.pth", r"model.pth: .*model.load_state_dict\(torch.load\(path\)\)"),
            ("model.npz", r"model.npz: .*model.load_state_dict\(numpy.load\(path\)\)"),
            ("weights", r"path should name the checkpoint's .json file, got 'weights'"),
        ):
            with pytest.raises(ValueError, match=message):
                reader(path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"task": "text", "settings": {}}))
    refuse(config, r"config.json: describes a run of the task text: gpurnn.tasks.run.load\(folder\) reads it")
    (tmp_path / "numbers.json").write_text("[1]")
    refuse(tmp_path / "numbers.json", "numbers.json: is not a gpurnn checkpoint")
    refuse(tmp_path, re.escape(f"{tmp_path}: holds no best.json and no last.json"))
    refuse(tmp_path / "none.json", "none.json: cannot be read")


def test_arguments_in_the_wrong_place(tmp_path):
    model, path = build(), tmp_path / "weights.json"
    for function, name in ((load_weights, "load_weights"), (save_weights, "save_weights")):
        for wrong in (path, str(path)):
            with pytest.raises(TypeError, match=rf"^{name}: expected the model first .* {name}\(model, path\)$"):
                function(wrong, model)
        with pytest.raises(
            TypeError, match=r"^model: expected .*, got dict. .* save_checkpoint\(path, arrays, document\)"
        ):
            function(model.state_dict(), path)
        with pytest.raises(TypeError, match="^path: expected the name of a file, got int"):
            function(model, 3)
        with pytest.raises(TypeError, match="^model: expected a gpurnn layer or model, got NoneType"):
            function(None, path)
    with pytest.raises(
        TypeError, match=r"^arrays: expected .*, got Sequential. Give model.state_dict\(\), or .*save_weig"
    ):
        save_checkpoint(path, model, {})
    with pytest.raises(TypeError, match="^arrays: expected a mapping, name -> array, got list$"):
        save_checkpoint(path, [np.ones(3)], {})
    with pytest.raises(TypeError, match="^path: expected the name of a .json file, got dict"):
        save_checkpoint(model.state_dict(), path, {})
    with pytest.raises(TypeError, match="^path: expected the name of a .json file, got NoneType"):
        load_checkpoint(None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".pth", ".safetensors", ""])
def test_weights_are_saved_as_json(tmp_path, suffix):
    for save in (save_weights, lambda model, path: save_checkpoint(path, model.state_dict(), {})):
        with pytest.raises(ValueError, match=rf"path should end in \.json, .*got '.*weights{suffix}'") as caught:
            save(build(), tmp_path / f"weights{suffix}")
        assert "load" not in str(caught.value)


def test_a_folder_that_is_missing(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, fault in (
        ("none", "does not exist: make it first"),
        ("file", "is no folder"),
        ("a/b", "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=rf"w.json: could not be saved: the folder .*{folder} {fault}"):
            save_weights(build(), tmp_path / folder / "w.json")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_load_state_dict_names_the_loader_of_files(run):
    folder, model = run
    arrays, document = load_checkpoint(folder / "last.json")
    with pytest.raises(KeyError, match=r"these are the arrays of a checkpoint of fit: load_weights\(model, path\)"):
        model.load_state_dict(arrays)
    for wrong in (folder / "last.json", str(folder), (arrays, document), 3, None):
        with pytest.raises(
            TypeError, match=r"mapping: expected name -> array, got \w+.*load_weights\(model, path\) reads"
        ):
            model.load_state_dict(wrong)
    with np.load(save_npz(folder, model)) as file:
        model.load_state_dict(file)


def save_npz(folder, model):
    np.savez(folder / "weights.npz", **model.state_dict())
    return folder / "weights.npz"


def test_fit_does_not_resume_from_weights_alone(tmp_path):
    model = build()
    save_weights(model, tmp_path / "last.json")
    source = SequenceBatches([np.zeros((4, 4))], [np.zeros(4, int)], 1)
    with pytest.raises(
        CheckpointError, match=r"last.json: holds no run that could be continued: load_weights\(model, path\)"
    ):
        gpurnn.fit(
            model, gpurnn.cross_entropy, source, optimizer=gpurnn.Adam(model), epochs=1, out=tmp_path, resume=True,
            progress=False,
        )  # fmt: skip


def test_a_run_is_loaded_by_its_folder(run):
    from gpurnn.tasks.trained import load

    with pytest.raises(FileNotFoundError, match=r"last.json is a file: .*load_weights\(model, path\)"):
        load(run[0] / "last.json")
