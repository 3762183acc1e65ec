"""Texts of documents: the state is reset before each, in training, validation, evaluation and sampling alike."""

import dataclasses
import json
import random

import numpy as np
import pytest

from gpurnn.checkpoint import CheckpointError, load_checkpoint
from gpurnn.data.vocabulary import START_OF_TEXT, Vocabulary, WordVocabulary, saved_vocabulary, vocabulary_of
from gpurnn.losses import cross_entropy
from gpurnn.tasks.run import prepare
from gpurnn.tasks.text import TASK, TextSettings, sample
from gpurnn.tasks.trained import load

TINY = TextSettings(hidden=12, steps=8, batch=4, epochs=2, schedule="constant", dtype="float64", seed=7)
BEGINS = {"lines": "\n", "files": START_OF_TEXT}


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Most of a tiny run's time would go into its picture."""
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])


@pytest.fixture
def books(tmp_path):
    """Five files of lines that are 1 to 40 characters long, so that many batches have documents of an earlier one."""
    draw, paths = random.Random(0), []
    for number in range(5):
        lines = [" ".join(draw.choices(["gate", "state", "the"], k=draw.randint(0, 8))) for _ in range(9)]
        paths.append(tmp_path / f"{number}.txt")
        paths[-1].write_text("\n".join(lines))
    return paths


def train(files, folder, settings, **options):
    run = prepare("text", files, folder, settings, backend="cpu", **options)
    return run, run.train(progress=False)


def nats_alone(model, ids, begins):
    """The sum of -log p of all ids but the first, each document by itself, with what begins it, from no state."""
    total, firsts = 0.0, [0, *(place for place in range(1, len(ids) - 1) if ids[place] == begins), len(ids) - 1]
    for first, end in zip(firsts, firsts[1:], strict=False):
        part = ids[first : end + 1].astype(np.int64)
        total += float(cross_entropy(model(part[:-1, None])[0], part[1:, None], reduction="sum")[0])
    return total, len(firsts) - 1


def rows(ids, count, size):
    """``count`` pieces of ``size`` predicted ids, the last may be shorter."""
    return [ids[start : start + size + 1] for start in range(0, len(ids) - 1, size)][:count]


@pytest.mark.parametrize("level", ["characters", "words"])
@pytest.mark.parametrize("documents", ["lines", "files"])
def test_training_validation_and_evaluation_reset_where_documents_begin(books, tmp_path, documents, level):
    settings = dataclasses.replace(TINY, documents=documents, level=level, lr=1e-30, epochs=1, valid=0.3, batch=2)
    run, history = train(books, tmp_path / "run", settings)
    trained = load(tmp_path / "run", "cpu")
    vocabulary = vocabulary_of(trained.facts["vocabulary"])
    text = ""
    for book in books:
        text += ("" if text.endswith(BEGINS[documents]) else BEGINS[documents]) + book.read_text()
    ids = vocabulary.encode(text)
    cut = len(ids) - round(len(ids) * 0.3)
    record = history.epochs[0]
    for name, part in (("train_loss", ids[:cut]), ("validation_loss", ids[cut:])):
        count = 2 if name == "train_loss" else min(2, (len(part) - 1) // 8)
        size = (len(part) - 1) // count
        found = [nats_alone(trained.model, row, vocabulary.begins) for row in rows(part, count, size)]
        assert sum(parts for _, parts in found) > count  # there are borders
        expected = sum(nats for nats, _ in found) / (count * size)
        assert record[name] == pytest.approx(expected, rel=1e-9), name
    numbers, _ = TASK.evaluate(trained, books)
    size = -(-(len(ids) - 1) // 2)
    found = [nats_alone(trained.model, row, vocabulary.begins) for row in rows(ids, 2, size)]
    assert numbers["nats"] == pytest.approx(sum(nats for nats, _ in found) / (len(ids) - 1), rel=1e-9)
    assert numbers[level] == len(ids) and numbers["unknown"] == 0


@pytest.mark.parametrize("documents", ["lines", "files"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_each_sample_begins_as_a_document_does(documents, cell):
    settings = TextSettings(cell=cell, layers=2, hidden=9, dtype="float64", documents=documents, seed=1)
    begins = BEGINS[documents]
    vocabulary = Vocabulary("abc" + begins, begins)
    model = TASK.build(settings, {"vocabulary": saved_vocabulary(vocabulary)}, "cpu")
    for prompt in ("", "ab", f"a{begins}b"):
        text = begins + prompt + "".join(sample(model, vocabulary, prompt, 60, temperature=2.0, top_k=4, seed=3))
        assert text.count(begins) > 4
        ids, place = vocabulary.encode(text).astype(np.int64), len(prompt) + 1
        pieces = [f"{begins}{one}" for one in text.split(begins)[1:]]
        alone = np.concatenate([model(vocabulary.encode(one).astype(np.int64)[:, None])[0][:, 0] for one in pieces])
        greedy = "".join(sample(model, vocabulary, text[1:place], 1, temperature=0))
        assert vocabulary.encode(greedy)[0] == alone[place - 1, 1:].argmax() + 1
        for n in range(place, len(ids)):  # the same draw from the logits of its document alone
            draws = draw_numbers(60, 3)
            p = np.exp((alone[n - 1] - alone[n - 1].max()) / 2.0)
            p[0] = 0
            total = np.cumsum(p)
            assert np.searchsorted(total, draws[n - place] * total[-1], side="right") == ids[n]


def draw_numbers(length, seed):
    from gpurnn import rng

    return rng.uniform((length,), 0, 1, rng.check_seed(seed), rng.name_key("sample"), dtype=np.float64)


def test_a_sample_of_words_begins_without_a_space():
    settings = TextSettings(hidden=9, documents="files", level="words", seed=1)
    vocabulary = WordVocabulary(["gate", "the", START_OF_TEXT], START_OF_TEXT)
    model = TASK.build(settings, {"vocabulary": saved_vocabulary(vocabulary)}, "cpu")
    text = "".join(sample(model, vocabulary, "", 30, temperature=3.0, seed=1))
    assert START_OF_TEXT in text[1:-1] and not text.startswith(" ")
    assert f" {START_OF_TEXT}" not in text and f"{START_OF_TEXT} " not in text
    assert vocabulary.encode(text).size == 30


def test_the_result_of_a_run_begins_as_a_document_does(books, tmp_path):
    run, history = train(books, tmp_path / "run", dataclasses.replace(TINY, documents="files"))
    numbers, _ = run.finish(history)
    trained = load(tmp_path / "run", "cpu")
    vocabulary = vocabulary_of(trained.facts["vocabulary"])
    assert numbers["sample"] == "".join(sample(trained.model, vocabulary, "", seed=7))


@pytest.mark.parametrize("documents", ["lines", "files"])
def test_resumed_equals_uninterrupted(books, tmp_path, documents):
    settings = dataclasses.replace(TINY, documents=documents, layers=2, dropout=0.3, dtype="float32")
    train(books, tmp_path / "whole", settings)
    train(books, tmp_path / "parts", dataclasses.replace(settings, epochs=1))
    prepare("text", [], tmp_path / "parts", settings, resume=True).train(progress=False)
    whole, parts = (load_checkpoint(tmp_path / name / "last.json")[0] for name in ("whole", "parts"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    train(books, tmp_path / "none", dataclasses.replace(settings, documents="none"))
    other = load_checkpoint(tmp_path / "none" / "last.json")[0]["model/recurrent.weight_hh_l0"]
    assert not np.array_equal(whole["model/recurrent.weight_hh_l0"], other)


def test_a_run_can_begin_from_one_with_other_documents(books, tmp_path):
    """The vocabulary stays; what begins a document in it is the new run's. What it lacks is refused."""
    for name in ("none", "lines"):
        train(books, tmp_path / name, dataclasses.replace(TINY, documents=name))
    for old, new in (("none", "lines"), ("lines", "none"), ("lines", "lines")):
        settings = dataclasses.replace(TINY, documents=new, epochs=1)
        folder = tmp_path / f"{old}-{new}"
        train(books[:3], folder, settings, start=tmp_path / old)
        vocabulary = vocabulary_of(load(folder, "cpu").facts["vocabulary"])
        assert vocabulary.entries == "\n aeghst"
        assert vocabulary.begins == (None if new == "none" else 1)
    with pytest.raises(ValueError, match=r"documents should be 'none', got 'files': '\\x02', which .* is not in"):
        files = dataclasses.replace(TINY, documents="files")
        train(books, tmp_path / "no", files, start=tmp_path / "none")
    assert not (tmp_path / "no").exists()


def test_runs_of_before_there_were_documents(books, tmp_path):
    settings = dataclasses.replace(TINY, epochs=1)
    train(books, tmp_path / "run", settings)
    expected = TASK.evaluate(load(tmp_path / "run", "cpu"), books)
    path = tmp_path / "run" / "config.json"
    document = json.loads(path.read_text())
    assert document["settings"].pop("documents") == "none" and isinstance(document["facts"]["vocabulary"], str)
    del document["sha256"]  # as the first version had none
    path.write_text(json.dumps(document))
    trained = load(tmp_path / "run", "cpu")
    assert trained.settings.documents == "none" and TASK.evaluate(trained, books) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"settings": "none"},
        {"settings": "files"},
        {"vocabulary": "\n aeghst"},
        {"vocabulary": {"entries": " aeghst", "begins": "\n"}},
        {"vocabulary": {"entries": "\n aeghst"}},
        {"vocabulary": {"entries": "\n aeghst", "begins": 1}},
    ],
)
def test_settings_and_vocabulary_agree_on_documents(books, tmp_path, change):
    train(books, tmp_path, dataclasses.replace(TINY, documents="lines", epochs=1))
    document = json.loads((tmp_path / "config.json").read_text())
    del document["sha256"]
    if "settings" in change:
        document["settings"]["documents"] = change["settings"]
    else:
        document["facts"]["vocabulary"] = change["vocabulary"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match=r"config\.json: is damaged"):
        load(tmp_path, "cpu")
