"""The character model: what it draws, how it is trained, resumed, loaded and measured."""

import collections
import dataclasses
import itertools
import json
import random

import numpy as np
import pytest
from helpers import assert_close

import gpurnn
from gpurnn.checkpoint import CheckpointError, load_checkpoint
from gpurnn.data import vocabulary as reading
from gpurnn.data.vocabulary import Vocabulary, vocabulary_of
from gpurnn.losses import cross_entropy
from gpurnn.tasks.run import prepare
from gpurnn.tasks.text import TASK, TextSettings, probabilities, sample
from gpurnn.tasks.trained import load

TINY = TextSettings(hidden=12, steps=8, batch=4, epochs=2, schedule="constant", seed=7)
LOGITS = np.log([0.5, 0.05, 0.4, 0.2, 0.3, 0.05])  # entry 0 is the unknown one; the others sum to 1


@pytest.fixture
def book(tmp_path):
    """A file of 900 characters, far from uniform, with characters of one to four bytes."""
    words = ["gate", "caf\u00e9", "\u4e2d\u6587", "\U0001f600", "state", "the"]
    draw = random.Random(0)
    text = " ".join(draw.choice(words) for _ in range(400))[:900]
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    return path


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Most of a tiny run's time would go into its picture."""
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])


def train(book, folder, config=TINY, **options):
    run = prepare("text", [book] if book else [], folder, config, backend="cpu", **options)
    return run, run.train(progress=False)


def build_model(config, vocabulary):
    return TASK.build(config, {"vocabulary": vocabulary.entries}, "cpu")


def load_run(folder):
    trained = load(folder, "cpu")
    return trained.model, vocabulary_of(trained.facts["vocabulary"]), trained.settings


def evaluate_text(folder, files):
    return TASK.evaluate(load(folder, "cpu"), files)[0]


def weights(folder, name="last"):
    arrays, _ = load_checkpoint(folder / f"{name}.json")
    return arrays


# ---- drawing


def test_probabilities_are_the_softmax_without_the_unknown():
    np.testing.assert_allclose(probabilities(LOGITS), [0, 0.05, 0.4, 0.2, 0.3, 0.05], rtol=1e-12)
    hot = np.array([0, 0.05, 0.4, 0.2, 0.3, 0.05]) ** 0.5
    np.testing.assert_allclose(probabilities(LOGITS, 2.0), hot / hot.sum(), rtol=1e-12)


@pytest.mark.parametrize("temperature", [0, 1e-300, 1e-3])
def test_cold_is_greedy(temperature):
    assert_close(probabilities(LOGITS, temperature), [0, 0, 1, 0, 0, 0], len(LOGITS))


@pytest.mark.parametrize("shift", [0, 1e4, -1e4])
def test_probabilities_do_not_overflow(shift):
    np.testing.assert_allclose(probabilities(LOGITS + shift), probabilities(LOGITS), rtol=1e-9)


@pytest.mark.parametrize(
    "k, kept", [(1, [2]), (2, [2, 4]), (4, [1, 2, 3, 4]), (5, [1, 2, 3, 4, 5]), (99, [1, 2, 3, 4, 5])]
)
def test_top_k_keeps_the_likeliest(k, kept):
    p = probabilities(LOGITS, top_k=k)
    np.testing.assert_array_equal(np.flatnonzero(p), kept)  # k = 4: of the two at 0.05 the first
    np.testing.assert_allclose(p[kept], np.exp(LOGITS[kept]) / np.exp(LOGITS[kept]).sum(), rtol=1e-12)


@pytest.mark.parametrize(
    "top_p, kept", [(1e-9, [2]), (0.39, [2]), (0.41, [2, 4]), (0.69, [2, 4]), (0.71, [2, 3, 4]), (1.0, [1, 2, 3, 4, 5])]
)
def test_top_p_keeps_the_smallest_set(top_p, kept):
    p = probabilities(LOGITS, top_p=top_p)
    np.testing.assert_array_equal(np.flatnonzero(p), kept)
    assert p.sum() == pytest.approx(1)


def test_top_p_counts_after_top_k():
    np.testing.assert_array_equal(np.flatnonzero(probabilities(LOGITS, top_k=2, top_p=0.56)), [2])  # 0.4 / 0.7 = 0.571
    np.testing.assert_array_equal(np.flatnonzero(probabilities(LOGITS, top_k=2, top_p=0.58)), [2, 4])


class Fixed:
    """A model whose logits never change."""

    xp = np

    class ops:
        to_numpy = staticmethod(np.asarray)

    def stepper(self, batch):
        return self

    def step(self, x):
        assert x.shape == (1,)
        return LOGITS[None]


@pytest.mark.long
def test_draws_follow_the_distribution():
    model, vocabulary, n = Fixed(), Vocabulary("abcde"), 4000
    drawn = collections.Counter(sample(model, vocabulary, "a", n, temperature=1.0, seed=3))
    expected = dict(zip("abcde", n * np.exp(LOGITS[1:]), strict=True))
    chi_square = sum((drawn[c] - expected[c]) ** 2 / expected[c] for c in expected)
    assert set(drawn) == set("abcde") and chi_square < 18.5  # 4 degrees of freedom: exceeded once in 1000 seeds


def test_sampling_leaves_every_part_in_its_mode():
    """Those that are in evaluation mode alone stay so, also where a step fails."""
    vocabulary = Vocabulary("abcde")
    model = gpurnn.Sequential(
        gpurnn.Embedding(6, 4, backend="cpu", seed=1),
        gpurnn.Dropout(0.5, backend="cpu", seed=2),
        gpurnn.LSTM(4, 4, 2, dropout=0.5, backend="cpu", seed=3),
        gpurnn.Linear(4, 6, backend="cpu", seed=4),
    )
    model[1].eval()
    modes = [module.training for _, module in model.modules()]
    assert modes == [True, True, False, True, True]
    "".join(sample(model, vocabulary, "ab", 5, seed=1))
    assert [module.training for _, module in model.modules()] == modes
    with pytest.raises(ValueError, match="ids: expected numbers from 0 to 5, got 6"):
        model.stepper(1).step([6])
    assert [module.training for _, module in model.modules()] == modes


def test_a_draw_depends_on_seed_and_position_alone():
    def draw(length, seed):
        return "".join(sample(Fixed(), Vocabulary("abcde"), "", length, temperature=1.0, seed=seed))

    assert draw(50, 1) == draw(50, 1) != draw(50, 2)
    assert draw(200, 1).startswith(draw(50, 1))
    assert draw(0, 1) == ""
    assert draw(60, None) != draw(60, None)


@pytest.mark.parametrize(
    "options",
    [
        {"length": -1},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_sample_refuses_at_the_call(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        sample(Fixed(), Vocabulary("abcde"), **options)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_sampling_equals_the_whole_sequence(cell):
    """Streaming with ``step`` draws what the logits of the whole text say, dropout off."""
    config = TextSettings(cell=cell, layers=2, hidden=9, dropout=0.5, dtype="float64", seed=1)
    vocabulary = Vocabulary("abcdefg")
    model = build_model(config, vocabulary).train()
    text = "cab" + "".join(sample(model, vocabulary, "cab", 20, temperature=0))
    ids = vocabulary.encode(text).astype(np.int64)
    logits = model.eval()(ids[:, None])[0][:, 0]
    np.testing.assert_array_equal(logits[2:-1, 1:].argmax(axis=1) + 1, ids[3:])
    assert "".join(sample(model, vocabulary, "cab", 20, temperature=1.7, top_k=1, seed=5)) == text[3:]


def test_prompts(book, tmp_path):
    vocabulary = Vocabulary("ab\n")
    model = build_model(dataclasses.replace(TINY, dtype="float64"), vocabulary)

    def write(prompt):
        return "".join(sample(model, vocabulary, prompt, 30, temperature=1.0, seed=1))

    assert write("") == write("\n")
    assert write("xy") == write("\U0001f600z")  # both unknown
    assert "\ufffd" not in write("x")


# ---- training


def test_training_learns_and_leaves_a_run(book, tmp_path):
    folder = tmp_path / "run"
    run, history = train(book, folder, dataclasses.replace(TINY, epochs=6, lr=2e-2))
    characters = sorted(set(book.read_bytes().decode()))
    result = evaluate_text(folder, [book])
    assert result["nats"] < 0.85 * np.log(len(characters))
    document = json.loads((folder / "config.json").read_text())
    assert document["facts"]["vocabulary"] == "".join(characters)
    assert document["data"]["fingerprint"]["characters"] == 900
    assert TextSettings(**document["settings"]) == run.settings
    model, vocabulary, config = load_run(folder)
    assert not model.training and config == run.settings and vocabulary.entries == "".join(characters)
    best = min(record["validation_loss"] for record in history.epochs)
    numbers, told = run.finish(history)
    assert numbers["nats"] == round(best, 4) and numbers["sample"] in told and len(numbers["sample"]) > 300
    finished = json.loads((folder / "config.json").read_text())
    assert finished.pop("sha256") != document.pop("sha256") and finished == document | {"result": numbers}
    assert (folder / "history.jsonl").exists()


@pytest.mark.long
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_resumed_equals_uninterrupted(book, tmp_path, cell, optimizer):
    config = dataclasses.replace(TINY, cell=cell, optimizer=optimizer, layers=2, dropout=0.3, accumulate=3)
    train(book, tmp_path / "whole", config)
    train(book, tmp_path / "parts", dataclasses.replace(config, epochs=1))
    prepare("text", [], tmp_path / "parts", config, resume=True).train(progress=False)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and len(whole) > 8
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize(
    "schedule, warmup", [("cosine", 0), ("cosine", 5), ("step", 3), ("plateau", 0), ("constant", 4)]
)
def test_schedules_train_and_resume(book, tmp_path, schedule, warmup):
    config = dataclasses.replace(TINY, schedule=schedule, warmup=warmup)
    train(book, tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["schedule"] == schedule
    prepare("text", [], tmp_path, dataclasses.replace(config, epochs=3), resume=True).train(progress=False)


def test_memory_mapped_text_trains_the_same(book, tmp_path, monkeypatch):
    train(book, tmp_path / "memory")
    monkeypatch.setattr(reading, "IN_MEMORY", 100)
    run, _ = train(book, tmp_path / "mapped")
    for name, array in weights(tmp_path / "memory").items():
        np.testing.assert_array_equal(array, weights(tmp_path / "mapped")[name])
    assert evaluate_text(tmp_path / "mapped", [book]) == evaluate_text(tmp_path / "memory", [book])


def test_what_a_resumed_run_refuses(book, tmp_path):
    config = dataclasses.replace(TINY, epochs=1)
    train(book, tmp_path / "run", config)
    with pytest.raises(ValueError, match="hidden=12, lr=0.004.* leave out what differs"):
        prepare("text", [], tmp_path / "run", dataclasses.replace(config, hidden=13, lr=1.0), resume=True)
    with pytest.raises(ValueError, match="already holds a run"):
        train(book, tmp_path / "run", config)
    with pytest.raises(FileNotFoundError, match="holds no run"):
        prepare("text", [], tmp_path / "empty", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "last.json").touch()  # what somebody's own fit left
    with pytest.raises(ValueError, match="already holds a run"):
        train(book, tmp_path / "other", config)
    book.write_text(book.read_text().replace("gate", "tage"))
    with pytest.raises(ValueError, match="900 characters, a vocabulary of 13 then, 900 characters"):
        prepare("text", [], tmp_path / "run", resume=True)


def test_overwrite_replaces_a_run(book, tmp_path):
    train(book, tmp_path, TINY)
    smaller = dataclasses.replace(TINY, hidden=5, epochs=1)
    train(book, tmp_path, smaller, overwrite=True)
    assert load_run(tmp_path)[2] == smaller
    assert weights(tmp_path)["model/recurrent.weight_hh_l0"].shape == (20, 5)


@pytest.mark.parametrize("valid", [0, 0.1, 0.37, 0.9])
@pytest.mark.parametrize("batch, steps", [(1, 1), (1, 30), (4, 8)])
def test_the_length_it_asks_for_is_enough_and_needed(tmp_path, valid, batch, steps):
    path = tmp_path / "text"
    config = dataclasses.replace(TINY, valid=valid, batch=batch, steps=steps, epochs=1)
    path.write_text("a")
    with pytest.raises(ValueError, match="too short: 1 characters") as caught:
        prepare("text", [path], tmp_path / "run", config)
    assert not (tmp_path / "run").exists()
    needed = int(str(caught.value).split("needs ")[1].split()[0])
    path.write_text("ab" * (needed // 2) + "a" * (needed % 2))
    prepare("text", [path], tmp_path / "run", config).train(progress=False)
    path.write_text("a" * (needed - 1))
    with pytest.raises(ValueError, match="too short"):
        prepare("text", [path], tmp_path / "run2", config)


@pytest.mark.parametrize(
    "wrong",
    [
        {"cell": "transformer"},
        {"hidden": 0},
        {"lr": 0},
        {"dropout": 1},
        {"valid": -0.1},
        {"epochs": 0},
        {"optimizer": "x"},
        {"schedule": "x"},
        {"clip": -1},
        {"warmup": -1},
        {"seed": -1},
        {"embedding": 0},
        {"patience": 1, "valid": 0},
        {"schedule": "plateau", "warmup": 1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TextSettings(**wrong)


@pytest.mark.long
@pytest.mark.parametrize("tied", [False, True])
def test_words(tmp_path, tied):
    """Trained on words, written as readable text; the commonest are known."""
    path = tmp_path / "book.txt"
    path.write_text("The gate keeps the state; a state opens the gate.\n" * 60 + "rare\n")
    config = dataclasses.replace(TINY, level="words", vocabulary_size=10, tied=tied, epochs=8, lr=2e-2)
    run, history = train(path, tmp_path / "run", config)
    vocabulary = load_run(tmp_path / "run")[1]
    assert len(vocabulary) == 11 and "rare" not in vocabulary.entries
    numbers, told = run.finish(history)
    assert numbers["sample"].startswith("The gate") and "perplexity" in told
    result = evaluate_text(tmp_path / "run", [path])
    assert result["words"] == 60 * 13 + 2 and result["unknown"] == 1
    assert result["accuracy"] > 0.5  # always "gate": 2 of 13
    written = "".join(sample(run.model, vocabulary, "The gate", 12, temperature=0))
    assert "The gate" + written == "The gate keeps the state; a state opens the gate.\nThe"
    assert ("linear.weight" in run.model.params) is not tied
    if tied:
        with pytest.raises(ValueError, match="tied needs an embedding of the hidden size, 12, got 5"):
            dataclasses.replace(config, embedding=5)


# ---- loading and measuring


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "json", "config", "not a run"])
def test_a_damaged_run_is_named(book, tmp_path, damage):
    train(book, tmp_path, dataclasses.replace(TINY, epochs=1))
    tensors = next(tmp_path.glob("best-*.safetensors"))
    data = bytearray(tensors.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(data[:-9])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "json":
        (tmp_path / "best.json").write_text("{")
    elif damage == "config":
        document = json.loads((tmp_path / "config.json").read_text())
        document["settings"]["hidden"] = 13
        (tmp_path / "config.json").write_text(json.dumps(document))
    else:
        (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        load_run(tmp_path)


def test_evaluation_scores_every_character(book, tmp_path):
    """One sequence at a time, so that the whole text can be scored by hand."""
    config = dataclasses.replace(TINY, epochs=1, batch=1, dtype="float64")
    train(book, tmp_path / "run", config)
    other = tmp_path / "other.txt"
    other.write_text("the gate, the caf\u00e9 X" * 3)  # "," and "X" are unknown
    result = evaluate_text(tmp_path / "run", [other])
    model, vocabulary, _ = load_run(tmp_path / "run")
    ids = vocabulary.encode(other.read_text()).astype(np.int64)
    logits = model(ids[:-1, None])[0]
    nats = float(cross_entropy(logits, ids[1:, None])[0])
    assert result["nats"] == pytest.approx(nats, rel=1e-12)
    assert result["bits"] == pytest.approx(nats / np.log(2)) and result["perplexity"] == pytest.approx(np.exp(nats))
    assert result["accuracy"] == pytest.approx((logits[:, 0].argmax(1) == ids[1:]).mean())
    assert result["characters"] == len(ids) and result["unknown"] == 6


@pytest.mark.parametrize("length", [2, 3, 31, 32, 33, 64, 65, 66, 67, 129, 200])
def test_evaluation_of_ragged_rows(book, tmp_path, length):
    """Side by side, each place starts afresh; every character but the first counts once."""
    train(book, tmp_path / "run", dataclasses.replace(TINY, epochs=1, dtype="float64"))
    other = tmp_path / "other.txt"
    other.write_text(book.read_text()[:length])
    model, vocabulary, config = load_run(tmp_path / "run")
    ids = vocabulary.encode(other.read_text()).astype(np.int64)
    B = max(1, min(config.batch, (length - 1) // config.steps))
    size = -(-(length - 1) // B)
    nats = 0.0
    for start in itertools.takewhile(lambda start: start < length - 1, range(0, B * size, size)):
        part = ids[start : min(start + size, length - 1) + 1]
        nats += float(cross_entropy(model(part[:-1, None])[0], part[1:, None], reduction="sum")[0])
    assert evaluate_text(tmp_path / "run", [other])["nats"] == pytest.approx(nats / (length - 1), rel=1e-12)


def test_evaluation_needs_two_characters(book, tmp_path):
    train(book, tmp_path / "run", dataclasses.replace(TINY, epochs=1))
    book.write_text("a")
    with pytest.raises(ValueError, match="at least 2"):
        evaluate_text(tmp_path / "run", [book])
