"""Texts into classes: reading labelled files, the split, training beyond the majority, measuring, bad files."""

import collections
import json
import random

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close
from optional import needs

import gpurnn
from gpurnn.cli import main
from gpurnn.tasks.classify import TASK, ClassifySettings, Labelled, predict, read_examples, right_and_all, split
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load
from gpurnn.testing import count_terms
from gpurnn.train.measure import model_context

TINY = {"hidden": 8, "embedding": 8, "batch": 16, "epochs": 10, "lr": 2e-2, "dropout": 0.1, "patience": None, "seed": 1}
GOOD, BAD = ["fine", "good", "moving", "warm"], ["dull", "poor", "empty", "cold"]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])


def reviews(count=240, seed=0):
    """Texts that a telling word somewhere decides; twice as many good ones as bad ones."""
    draw = random.Random(seed)
    for n in range(count):
        words = [draw.choice(["a", "the", "film", "is", "of", "story", "and", "it"]) for _ in range(draw.randint(2, 9))]
        good = n % 3 > 0
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if good else BAD))
        yield " ".join(words), "pos" if good else "neg"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "reviews.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in reviews()))
    return path


# ---- reading


def test_tables_files_and_folders(tmp_path):
    folder = tmp_path / "names"
    folder.mkdir()
    (folder / "Irish.txt").write_bytes("\ufeffO'Shea\r\nBoyle\r\n\r\n".encode())
    (folder / "Czech.txt").write_text("\u010cern\u00fd\n")
    (folder / "LICENSE").write_text("no names\n")
    pairs = [("\u010cern\u00fd", "Czech"), ("O'Shea", "Irish"), ("Boyle", "Irish")]
    assert read_examples([folder]).pairs == pairs
    files = [tmp_path / "rt.pos", tmp_path / "rt.neg"]
    files[0].write_text("fine film\n")
    files[1].write_text("dull\ttab or not\n")  # a table by its first line
    with pytest.raises(ValueError, match="tab or not"):
        read_examples(files, ["pos", "neg"])
    files[1].write_text("dull\n")
    assert read_examples(files).pairs == [("fine film", "pos"), ("dull", "neg")]
    assert read_examples(files[:1], ["pos", "neg"]).pairs == [("fine film", "pos")]  # alone, the known ending counts
    table = tmp_path / "mail.tsv"
    table.write_text("a \t b\t1\none \u0085 line\t 0 \n")
    assert read_examples([table]).pairs == [("a \t b", "1"), ("one \u0085 line", "0")]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "reviews.tsv: is empty"),
        (b" \n\r\n", "reviews.tsv: is empty"),
        (b"caf\xe9\tpos\n", "not UTF-8 text .* at byte 3.*--encoding latin-1"),
        (b"\tpos\n\tneg\nfine\tpos\n", r"line 1 should be a text, a tab and a label, got .\\tpos.\. 2 of 3 rows"),
        (b"fine\tpos\ndull neg\npoor\n", "line 2 should be a text, a tab and a label, got 'dull neg'. 2 of 3 rows"),
        (b"fine\tpos\ndull\tpos\n", "only one class, 'pos'"),
        (
            b'[{"text": "a", "label": 1},\n {"text": "b", "label": 0}]\n',
            "begins with .*list in JSON. Write one object in",
        ),
        (b"fine\tpos\nwarm\tpos\ngood\tpos\ndull\tneg\npoor\tneg\n", "class 'neg' has too few different texts, 2"),
        (
            "".join(f"a text {n}\tnumber {n}\n" for n in range(60)).encode(),
            "60 different labels of 60 texts, such as 'number 0', are no classes.*--label; the texts. --text",
        ),
        (b"a\tpos\n" * 9 + b"b\tneg\n" * 9, "class 'neg' has too few different texts, 1"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    path = tmp_path / "reviews.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare("classify", [path], tmp_path / "run", backend="cpu", **TINY)
    assert not (tmp_path / "run").exists()


def test_a_folder_without_texts(tmp_path):
    with pytest.raises(ValueError, match="holds no .txt, .tsv, .csv, .jsonl or .ndjson files"):
        read_examples([tmp_path])


def test_one_class_in_one_file(tmp_path):
    (tmp_path / "only.txt").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="only one class, 'only'"):
        prepare("classify", [tmp_path / "only.txt"], tmp_path / "run", **TINY)


# ---- the split


def test_the_split_is_stratified_fixed_and_whole():
    labels = np.repeat([0, 1, 2], [200, 50, 7])
    settings = ClassifySettings(seed=1)
    parts = split(labels, "abc", settings)
    assert sorted(np.concatenate(parts)) == list(range(257))
    counts = [collections.Counter(labels[part].tolist()) for part in parts]
    assert counts == [{0: 160, 1: 40, 2: 5}, {0: 20, 1: 5, 2: 1}, {0: 20, 1: 5, 2: 1}]
    again, other = split(labels, "abc", ClassifySettings(seed=2)), split(labels, "abc", ClassifySettings(split=1))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[2], other[2])
    train, valid, test = split(labels, "abc", ClassifySettings(valid=0, test=0, patience=None))
    assert len(train) == 257 and not len(valid) and not len(test)


def test_word_dropout_differs_by_epoch_and_batch_alone():
    inputs = [np.full(30, 5) for _ in range(64)]
    source = Labelled(inputs, np.zeros(64, int), 32, unknown=0.3, seed=1)
    first = source.batch(0, 0).inputs
    assert set(np.unique(first)) == {0, 5} and abs((first == 0).mean() - 0.3) < 4 * np.sqrt(0.21 / first.size)
    np.testing.assert_array_equal(source.batch(0, 0).inputs, first)
    for other in (source.batch(0, 1), source.batch(1, 0)):
        assert not np.array_equal(other.inputs, first)
    assert all((x == 5).all() for x in inputs)


# ---- training and measuring


@pytest.mark.long
@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
def test_it_learns_more_than_the_majority(table, tmp_path, pooling):
    """End to end: always saying 'pos' is right for two of three."""
    run = prepare("classify", [table], tmp_path / "run", backend="cpu", pooling=pooling, **TINY)
    history = run.train(progress=False)
    numbers, told = run.finish(history)
    assert numbers["test_majority"] < 0.75 and numbers["test_accuracy"] > 0.85, told
    assert numbers["validation_accuracy"] == round(max(r["validation_accuracy"] for r in history.epochs), 4)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["result"] == numbers
    trained = load(tmp_path / "run", "cpu")
    p = predict(trained, ["a WARM film", "", "cold", "nothing known here", "a dull story and it is of the film"])
    assert p.shape == (5, 2) and np.allclose(p.sum(axis=1), 1)
    classes = trained.facts["classes"]
    assert [classes[n] for n in p.argmax(axis=1)[[0, 2, 4]]] == ["pos", "neg", "neg"]
    alone = np.concatenate([predict(trained, [text]) for text in ("cold", "")])
    assert_close(p[[2, 1]], alone, 2 * count_terms(trained.model, 11), dtype="float32")  # other sums for other batches


@pytest.mark.long
def test_resumed_equals_uninterrupted(table, tmp_path):
    options = TINY | {"epochs": 3, "schedule": "constant", "level": "characters", "pooling": "attention"}
    whole = prepare("classify", [table], tmp_path / "whole", backend="cpu", **options)
    whole.train(progress=False)
    prepare("classify", [table], tmp_path / "parts", backend="cpu", **options | {"epochs": 1}).train(progress=False)
    parts = prepare("classify", [], tmp_path / "parts", epochs=3, resume=True)
    history = parts.train(progress=False)
    np.testing.assert_array_equal(parts.model.flat_params, whole.model.flat_params)
    assert len(history.epochs) == 3
    table.write_text(table.read_text().replace("dull", "bull"))
    with pytest.raises(ValueError, match="the data are not those"):
        prepare("classify", [], tmp_path / "parts", resume=True)


@pytest.fixture
def trained(table, tmp_path):
    prepare("classify", [table], tmp_path / "run", backend="cpu", **TINY | {"epochs": 2}).train(progress=False)
    return load(tmp_path / "run", "cpu")


@pytest.mark.long
@needs("matplotlib")
def test_evaluation(trained, tmp_path):
    other = tmp_path / "other.tsv"
    texts, labels = zip(*reviews(30, seed=5), strict=True)
    other.write_text("".join(f"{text}\t{label}\n" for text, label in zip(texts, labels, strict=True)))
    numbers, told = TASK.evaluate(trained, [other])
    found = [trained.facts["classes"][n] for n in predict(trained, texts).argmax(axis=1)]
    both = list(zip(labels, found, strict=True))
    assert numbers["accuracy"] == pytest.approx(sum(a == b for a, b in both) / 30) and numbers["texts"] == 30
    assert numbers["confusion"] == [[both.count((a, b)) for b in ("neg", "pos")] for a in ("neg", "pos")]
    row = numbers["classes"]["pos"]
    assert row["texts"] == 20 and row["recall"] == both.count(("pos", "pos")) / 20
    assert row["precision"] == both.count(("pos", "pos")) / found.count("pos")
    assert (tmp_path / "run" / "confusion.png").read_bytes().startswith(b"\x89PNG") and "Accuracy" in told
    other.write_text("fine\tpos\ngood\tgreat\n")
    with pytest.raises(ValueError, match=r"other.tsv: line 2 has a label that the model never saw, 'great'.*neg, pos"):
        TASK.evaluate(trained, [other])


@pytest.mark.parametrize(
    "wrong",
    [{"valid": 0.5, "test": 0.5}, {"pooling": "sum"}, {"word_dropout": 1.0}, {"bidirectional": 1}, {"level": "bytes"}],
)
def test_settings_are_checked(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        ClassifySettings(**wrong)


def test_the_commands(table, tmp_path):
    def call(*arguments, code=0, **options):
        result = CliRunner().invoke(main, list(map(str, arguments)), prog_name="gpurnn", **options)
        assert result.exit_code == code, result.output
        return result

    for command in (["train", "classify"], ["classify"]):
        assert max(map(len, call(*command, "--help").output.splitlines())) <= 80
    options = [f"--{name}={value}" for name, value in TINY.items() if value is not None]
    run = tmp_path / "run"
    arguments = ["--no-progress", "--backend", "cpu", "--out", run, "--no-bidirectional", *options, "--epochs=1"]
    document = json.loads(call("train", "classify", table, *arguments, "--json").stdout)
    assert document["settings"]["bidirectional"] is False and 0 < document["test_accuracy"] <= 1
    shown = call("classify", run, "a fine film", "dull").stdout.splitlines()
    assert len(shown) == 2 and shown[0].endswith("a fine film") and "pos" in shown[0] and "%" in shown[0]
    piped = json.loads(call("classify", run, "--json", "--top", 1, input="caf\u00e9\nfine\n").stdout)
    assert [entry["text"] for entry in piped] == ["caf\u00e9", "fine"] and len(piped[0]["classes"]) == 1
    assert json.loads(call("evaluate", run, table, "--json").stdout)["texts"] == 240
    assert "Missing argument" in call("train", "classify", code=2).stderr
    assert "task classify, not text" in call("sample", run, code=2).stderr


# ---- packed


def test_packed_batches_hold_the_same_texts(table):
    """One label a text, at the place where its vector comes out; with as many timesteps as there are words."""
    settings = [ClassifySettings(**TINY, word_dropout=0.0, packed=packed) for packed in (False, True)]
    (padded, valid, *_), (packed, other, *_) = ((d.train, d.valid) for d in (TASK.read([table], s) for s in settings))
    for plain, rows in ((padded, packed), (valid, other)):
        texts = collections.Counter(
            (tuple(batch.inputs[:n, b]), batch.targets[b])
            for batch in (plain.batch(0, k) for k in range(len(plain)))
            for b, n in enumerate(batch.lengths)
        )
        found = collections.Counter()
        for k in range(len(rows)):
            batch = rows.batch(0, k)
            starts = np.flatnonzero(batch.reset.T)  # row by row
            ends = [*starts[1:], batch.reset.size]
            there, ids = batch.mask.T.ravel(), batch.inputs.T.ravel()
            for start, end, target in zip(starts, ends, batch.targets, strict=True):
                found[tuple(ids[start:end][there[start:end]]), target] += 1
        assert found == texts


@pytest.mark.parametrize("pooling", ["last", "mean", "max", "attention"])
def test_packed_batches_have_the_gradients_of_padded_ones(table, pooling):
    found = []
    for packed in (False, True):
        settings = ClassifySettings(**TINY | {"dropout": 0.0, "dtype": "float64"}, word_dropout=0.0)
        settings.pooling, settings.packed = pooling, packed
        data = TASK.read([table], settings)
        data.train.bucket, model = False, TASK.build(settings, data.facts, "cpu")
        for index in range(3):
            batch = data.train.batch(0, index)
            model.zero_grad()
            logits, _, backward = model.forward(batch.inputs, **model_context(model, batch, None))
            loss, dloss = gpurnn.cross_entropy(logits, batch.targets)
            backward(dloss())
            found.append((float(loss), right_and_all(logits, batch.targets), model.flat_grads.copy()))
    for padded, rows in zip(found[:3], found[3:], strict=True):
        terms = count_terms(model, int(data.train.lengths.max()) * TINY["batch"])
        assert_close(rows[0], padded[0], terms)
        assert rows[1] == padded[1]
        assert_close(rows[2], padded[2], terms)


def test_a_packed_run_learns_and_is_loaded(table, tmp_path):
    run = prepare("classify", [table], tmp_path / "run", packed=True, **TINY)
    history = run.train()
    assert history.epochs[-1]["validation_accuracy"] > 0.9
    trained = load(tmp_path / "run")
    assert trained.settings.packed
    texts, labels = zip(*reviews(), strict=True)
    found = predict(trained, texts).argmax(axis=1)
    assert np.mean([trained.facts["classes"][n] == label for n, label in zip(found, labels, strict=True)]) > 0.9


def test_a_text_without_words_is_packed(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text(
        "".join(f"{text}\t{label}\n" for text, label in [*reviews(60), ("\u200b", "pos"), ("\u0301", "neg")])
    )
    data = TASK.read([path], ClassifySettings(**TINY, packed=True))
    assert all(data.train.lengths > 0)


def test_packed_on_the_shell(table, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items() if value is not None]
    result = CliRunner().invoke(
        main, ["train", "classify", str(table), "--packed", "--out", str(tmp_path / "r"), "--epochs", "1", *options[:3]]
    )
    assert result.exit_code == 0, result.output
