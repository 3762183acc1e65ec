"""``bench options``: its data, its protocol, its results file, on data made here."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import ROOT, assert_close

import gpurnn
from bench import options
from bench.cli import main
from bench.options import OPTIONS, PLAIN, Sizes, chosen, load, read_characters, read_rows, run, table, tries

ROWS = Sizes(6, 2, 10, 4, 40, 20, 20, [0.01, 0.1])
TEXT = Sizes(6, 2, 4, 5, 120, 60, 60, [0.01, 0.1])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two tiny tasks: images (8, 8), bright in the upper or the lower half; a text that repeats itself."""
    monkeypatch.setattr(options, "SIZES", {"rows": ROWS, "text": TEXT})
    draw = np.random.default_rng(0)
    labels = {"train": draw.integers(0, 2, 70), "test": draw.integers(0, 2, 30)}
    images = {part: np.zeros((len(y), 8, 8), "uint8") for part, y in labels.items()}
    for part, y in labels.items():
        for n, label in enumerate(y):
            images[part][n, 4 * label : 4 * label + 4] = 180 + n
    np.savez(
        tmp_path / "images.npz", **{f"x_{part}": x for part, x in images.items()},
        **{f"y_{part}": y for part, y in labels.items()},
    )  # fmt: skip
    (tmp_path / "text.txt").write_text("to be, or not to be. " * 20)
    return {"rows": [str(tmp_path / "images.npz")], "text": [str(tmp_path / "text.txt")]}


def document():
    return {"sizes": {"rows": vars(ROWS), "text": vars(TEXT)}, "runs": []}


def records(task, option, *found):
    """Trainings from (arguments, lr, seed, validation of each epoch, test)."""
    return [
        {
            "task": task, "option": option, "arguments": arguments, "lr": lr, "seed": seed,
            "epochs": [{"train_loss": 1.0, "validation": value} for value in validation],
            "best_epoch": int(np.argmin(validation)) + 1, "validation": min(validation), "test": test,
            "cpu_seconds": 1.0,
        }
        for arguments, lr, seed, validation, test in found
    ]  # fmt: skip


# ---- data


def test_parts_of_the_images_have_nothing_in_common_and_are_pooled(files):
    data = read_rows(files["rows"], ROWS)
    parts = [data.train, data.valid, data.test]
    assert [len(part.inputs) for part in parts] == [40, 20, 20]
    seen = [float(x.max()) for part in parts[:2] for x in part.inputs]  # each has a brightness of its own
    assert len(set(seen)) == 60
    batch = data.valid.batch(0, 0)
    assert batch.inputs.shape == (4, 10, 4) and 0 <= batch.inputs.min() < batch.inputs.max() <= 1
    for n, label in enumerate(batch.targets):  # 2 x 2 pixels of one brightness have it as their mean
        assert batch.inputs[2 * label, n].all() and not batch.inputs[2 - 2 * label, n].any()


def test_parts_of_the_text_follow_one_another(files):
    data = read_characters(files["text"], TEXT)
    whole = gpurnn.data.vocabulary.read_text(files["text"])[0]
    got = np.concatenate([data.train.ids, data.valid.ids, data.test.ids])
    assert [len(part.ids) for part in (data.train, data.valid, data.test)] == [120, 60, 60]
    np.testing.assert_array_equal(got, whole[:240])


@pytest.mark.parametrize("task", ["rows", "text"])
def test_too_few_data_are_refused(files, task):
    sizes = replace({"rows": ROWS, "text": TEXT}[task], valid=5000)
    with pytest.raises(ValueError, match="too few (images|characters).*expected 5,?"):
        options.READERS[task](files[task], sizes)


# ---- the protocol


def test_every_option_is_one_of_the_layer_and_differs_from_the_plain_one():
    for name, settings in OPTIONS.items():
        layers = [gpurnn.LSTM(3, 4, backend="numpy", seed=0, **arguments) for arguments in settings]
        assert len({repr(layer) for layer in layers}) == len(settings)
        assert name == PLAIN or repr(gpurnn.LSTM(3, 4, backend="numpy", seed=0)) not in map(repr, layers), name


def test_population_statistics_are_those_of_all_training_data(files):
    data = read_rows(files["rows"], ROWS)
    model = options.build("rows", data, 6, {"batch_norm": 4}, 0)
    before = model.state_dict()
    whole = np.concatenate([data.train.batch(0, n).inputs for n in range(len(data.train))], axis=1)
    gpurnn.recurrent.set_population_statistics(model, whole)
    state = model.state_dict()
    for name, value in before.items():
        assert (value != state[name]).any() == ("running_" in name), name
    x = np.stack(data.train.inputs, axis=1).astype("float64")  # (T, N, I)
    ax = np.split(x @ state["0.weight_ih_l0"].astype("float64").T, 4, axis=-1)
    for k, part in enumerate(ax):  # each gate is normalized by itself
        assert_close(state["0.running_mean_l0"][k], part.mean(axis=1), terms=4 + 40 + 2, dtype="float32")
        assert_close(state["0.running_var_l0"][k], part.var(axis=1, ddof=1), terms=4 + 2 * 40 + 2, dtype="float32")


def test_every_option_has_two_tries():
    for name, settings in OPTIONS.items():
        found = tries(name, [0.1, 0.2], 0.2)
        assert len(found) == 2 and found[0] != found[1]
        assert {lr for lr, _ in found} == ({0.2} if len(settings) == 2 else {0.1, 0.2}), name


def test_validation_chooses_and_the_test_does_not():
    runs = records("rows", "zoneout", ({"zoneout": 0.1}, 1, 0, [3, 2], 1), ({"zoneout": 0.2}, 1, 0, [3, 1], 9))
    runs += records("rows", "zoneout", ({"zoneout": 0.2}, 1, 2, [9], 9), ({"zoneout": 0.2}, 1, 1, [9], 9))
    assert [(r["arguments"]["zoneout"], r["seed"]) for r in chosen(runs, "rows", "zoneout")] == [
        (0.2, 0),
        (0.2, 1),
        (0.2, 2),
    ]
    assert chosen(runs, "text", "zoneout") == chosen(runs, "rows", PLAIN) == []


def test_the_best_epoch_counts_with_its_weights(files, monkeypatch):
    """Validation says that the second of four epochs is the best; the test is of the weights after it."""
    data, measured = read_rows(files["rows"], ROWS), []

    def score(model, batches):
        measured.append((batches, {name: value.copy() for name, value in model.state_dict().items()}))
        return [3.0, 1.0, 1.0, 2.0, 7.0][len(measured) - 1]

    sizes = replace(ROWS, epochs=4)
    record = options.train("rows", replace(data, score=score), sizes, {"batch_norm": True}, 0.1, 0)
    assert (record["best_epoch"], record["validation"], record["test"]) == (2, 1.0, 7.0)
    assert [batches for batches, _ in measured] == [data.valid] * 4 + [data.test]
    assert [epoch["validation"] for epoch in record["epochs"]] == [3.0, 1.0, 1.0, 2.0]
    second, third, tested = measured[1][1], measured[2][1], measured[4][1]
    assert any("running" in name or "mean" in name for name in second)  # the statistics of batch norm, too
    for name, value in tested.items():
        np.testing.assert_array_equal(value, second[name])
    assert any((value != third[name]).any() for name, value in tested.items())
    measured.clear()
    options.train("rows", replace(data, score=score), sizes, {"batch_norm": True}, 0.1, 0, population=True)
    for name, value in measured[4][1].items():  # the training is the same, its statistics are not
        assert (value != second[name]).any() == ("running_" in name), name


def test_scores_are_those_of_the_outputs(files):
    """Percent of wrong classes, and bits per character, computed from the outputs by hand."""
    data = read_rows(files["rows"], ROWS)
    model = options.build("rows", data, 6, {}, 0)
    (one, two) = (data.valid.batch(0, n) for n in range(2))
    wrong = sum((np.argmax(model(batch.inputs)[0], axis=1) != batch.targets).sum() for batch in (one, two))
    assert data.score(model, data.valid) == pytest.approx(5 * wrong, abs=1e-9)  # 20 images
    data = read_characters(files["text"], TEXT)
    model, state, nats = options.build("text", data, 6, {}, 0), None, []
    for n in range(len(data.valid)):
        batch = data.valid.batch(0, n)
        logits, state = model(batch.inputs, state)
        logits = logits.astype("float64")
        p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        nats += list(-np.log(np.take_along_axis(p, batch.targets[..., None], -1)).ravel())
    terms = 6 + data.classes + batch.targets.size  # of a logit, of its softmax, of a batch's mean
    assert_close(data.score(model, data.valid), np.mean(nats) / np.log(2), terms, dtype="float32")


def test_regularization_is_off_where_a_model_is_measured(files):
    """Each option's number is the same when measured twice: nothing is drawn."""
    for task, sizes in (("rows", ROWS), ("text", TEXT)):
        data = options.READERS[task](files[task], sizes)
        for name in ("zoneout", "recurrent_dropout, timestep", "recurrent_dropout, sequence", "weight_dropout"):
            model = options.build(task, data, 6, OPTIONS[name][1], 0)
            assert data.score(model, data.valid) == data.score(model, data.valid) > 0, name


@pytest.mark.long
def test_a_run_has_all_trainings_and_repeats_none(files):
    made, said = document(), []
    run(files, made, seeds=2, options=["coupled", "zoneout"], say=said.append)
    wanted = [(task, option, 3) for task in files for option in (PLAIN, "zoneout", "coupled")][:-1]
    names = [(one["task"], one["option"]) for one in made["runs"]]
    assert [(*name, names.count(name)) for name in dict.fromkeys(names)] == wanted and len(said) == 15
    rate = {task: chosen(made["runs"], task, PLAIN)[0]["lr"] for task in files}
    for one in made["runs"]:
        assert one["option"] != "zoneout" or one["lr"] == rate[one["task"]]
        assert len(one["epochs"]) == 2 and np.isfinite(one["test"])
    before, half = json.dumps(made["runs"]), document() | {"runs": made["runs"][:7]}
    run(files, half, seeds=2, options=["coupled", "zoneout"], say=said.append)
    assert len(said) == 15 + 8  # what was there is not done again, and the rest has the same numbers
    for one, two in zip(json.loads(before), half["runs"], strict=True):
        assert {**one, "cpu_seconds": 0} == {**two, "cpu_seconds": 0}


def test_seeds_change_the_weights_and_the_order(files):
    one, two = (read_rows(files["rows"], ROWS, seed) for seed in (0, 1))
    assert (one.train.batch(0, 0).inputs != two.train.batch(0, 0).inputs).any()
    np.testing.assert_array_equal(one.valid.batch(0, 0).inputs, two.valid.batch(0, 0).inputs)
    weights = [options.build("rows", one, 6, {}, seed).state_dict() for seed in (0, 0, 1)]
    for name, value in weights[0].items():
        np.testing.assert_array_equal(value, weights[1][name])
    assert any((value != weights[2][name]).any() for name, value in weights[0].items())


# ---- the results


def test_the_table_shows_mean_and_range(files):
    made, curve = document(), [9.0] * 2 + [6.0] * 6 + [4.0, 5.0]  # the second of ten epochs is a fifth
    zoneout = {"zoneout": [0.1, 0.5]}
    made["runs"] += records("rows", PLAIN, *(({}, 0.1, seed, curve, 5.0 + seed) for seed in range(3)))
    made["runs"] += records("rows", "layer_norm", *(({"layer_norm": True}, 0.1, s, curve[::-1], 4.0) for s in range(3)))
    made["runs"] += records("rows", "zoneout", *((zoneout, 0.1, s, [4.0 + s] * 10, 8) for s in (0, 1)))
    lines = list(table(made, "rows"))
    assert len(lines) == 5 and {line.count("|") for line in lines} == {9}
    assert lines[2] == "| none | lr 0.1 | 6.00 | 5.00 to 7.00 | 9.00 | 4.00 | 5.00 | 9.0 |"
    assert lines[3] == "| layer_norm | lr 0.1 | 4.00 | 4.00 to 4.00 | 4.00 | 4.00 | 9.00 | 2.0 |"
    assert lines[4] == "| zoneout | [0.1, 0.5], lr 0.1 | 8.00 | 8.00 to 8.00 | 4.50 | 4.50 | 4.50 | 1.0 |"
    assert len(list(table(made, "text"))) == 2


def test_the_committed_results_are_whole():
    found = load(ROOT / "bench" / "results" / "options_cpu.json")["runs"]
    for task, left_out in options.LEFT_OUT.items():
        for option in set(OPTIONS) - set(left_out):
            best = chosen(found, task, option)
            assert [one["seed"] for one in best] == [0, 1, 2], (task, option)
            plain_lr = chosen(found, task, PLAIN)[0]["lr"]
            wanted = tries(option, options.SIZES[task].rates, plain_lr)
            first = [one for one in found if (one["task"], one["option"], one["seed"]) == (task, option, 0)]
            assert [[one["lr"], one["arguments"]] for one in first] == json.loads(json.dumps(wanted)), (task, option)


@pytest.mark.long
def test_the_command_writes_a_file_and_continues_it(files, tmp_path):
    out = tmp_path / "results" / "options.json"
    ask = ["options", "--text", files["text"][0], "--seeds", "1", "--option", "layer_norm", "--out", str(out)]
    done = CliRunner().invoke(main, ask)
    assert done.exit_code == 0, done.output
    assert "| layer_norm |" in done.output and f"written to {out}" in done.output
    found = load(out)
    assert len(found["runs"]) == 4 and found["environment"]["numpy"] and str(tmp_path) not in json.dumps(found)
    again = CliRunner().invoke(main, [*ask, "--option", "zoneout"])
    assert len(load(out)["runs"]) == 6 and again.exit_code == 0
    assert load(out)["runs"][:4] == found["runs"]
    before = out.read_bytes()
    shown = CliRunner().invoke(main, ["options", "--out", str(out)])
    assert shown.exit_code == 0 and "| zoneout |" in shown.output and out.read_bytes() == before


def test_mistakes_are_one_line(files, tmp_path):
    other = tmp_path / "other.json"
    assert "give --mnist, --text or both" in CliRunner().invoke(main, ["options", "--out", str(other)]).output
    for text, said in (('{"format": 2}', "expected results of 'bench options'"), ("{", "other.json")):
        other.write_text(text)
        done = CliRunner().invoke(main, ["options", "--text", files["text"][0], "--out", str(other)])
        assert done.exit_code == 1 and said in done.output, done.output
    old = {"format": options.FORMAT, "kind": options.KIND, "sizes": {"text": vars(TEXT)}, "runs": []}
    other.write_text(json.dumps(old))
    done = CliRunner().invoke(main, ["options", "--text", files["text"][0], "--out", str(other)])
    assert done.exit_code == 1 and "give another --out" in done.output
