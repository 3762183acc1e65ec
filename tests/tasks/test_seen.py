"""What a run remembers of its training data, and what it then says of others."""

import json

import numpy as np
import pytest
from sounds import tone, write_wav

from gpurnn.checkpoint import CheckpointError
from gpurnn.data.utterances import read_utterances
from gpurnn.tasks import seen
from gpurnn.tasks.run import prepare
from gpurnn.tasks.seen import check_trained_on, file_digest, look_up, remember
from gpurnn.tasks.series import read_table, score
from gpurnn.tasks.series.forecasts import summary
from gpurnn.tasks.speech import SpeechSettings
from gpurnn.tasks.trained import load, read_run, write_config

TINY = {"epochs": 1, "hidden": 4, "batch": 4, "backend": "cpu", "seed": 1}


def facts_of(things):
    return json.loads(json.dumps({"trained_on": remember(things)}))


def test_what_was_trained_on_is_found():
    facts = facts_of(["a", "b", "b", "\u4e2d\ud800", b"bytes"])
    check_trained_on(facts)
    found = look_up(facts, ["b", "c", "\u4e2d\ud800", "bytes", "b"])
    assert found.mask.tolist() == [True, False, True, True, True] and found.exact and found.count == 4
    sentences = [
        (["b", "c", "a", "bytes", "b"], "4 of these 5 texts"), (["a"], "this text"),
        (["a", "b"], "all of these 2 texts"), (["a", "x"], "1 of these 2 texts"),
    ]  # fmt: skip
    for things, expected in sentences:
        assert look_up(facts, things).sentence("texts") == f"The model was trained on {expected}"
    assert look_up(facts, ["x"]).sentence("texts") == "The model was not trained on this text"
    assert look_up(facts, ["x", "y"]).sentence("texts") == "The model was not trained on any of these 2 texts"
    assert look_up({}, ["a"]) is None and look_up({"trained_on": None}, ["a"]) is None
    check_trained_on({})


def test_of_many_a_sample_is_remembered(monkeypatch):
    """Nine of ten of what is looked up; the estimate lies within four standard deviations."""
    monkeypatch.setattr(seen, "LIMIT", 1000)
    facts = facts_of(f"text {n}" for n in range(20_000))
    assert len(facts["trained_on"]["hashes"]) < 11_000
    found = look_up(facts, [f"text {n}" for n in range(2_000, 22_000)])
    assert not found.exact and not (found.mask & ~found.judged).any()
    judged = int(found.judged.sum())
    assert abs(judged / 20_000 - 1000 / 20_000) < 4 * np.sqrt(1000) / 20_000
    assert abs(found.count / 20_000 - 0.9) < 4 * np.sqrt(0.9 * 0.1 / judged)
    assert found.sentence("texts").startswith("The model was trained on about ")
    (few,) = [text for text in ("text 1", "text 2", "text 3") if not look_up(facts, [text]).judged[0]][:1]
    assert look_up(facts, [few]).count is None
    assert look_up(facts, [few]).sentence("texts") == "It is not known whether the model was trained on this text"


def test_what_a_run_adds_joins_what_its_model_learned_from():
    facts = facts_of(["a", "b"])
    both = {"trained_on": remember(["b", "c"], facts)}
    assert both["trained_on"] == remember(["a", "b", "c"])
    assert look_up(both, "abcd").mask.tolist() == [True, True, True, False]
    assert remember(["a"], both) is both["trained_on"] and remember(["a"], {}) == remember(["a"])


@pytest.mark.parametrize("sizes", [(3000, 400), (600, 700), (3000, 3000)])
def test_what_joins_many(sizes, monkeypatch):
    """The sample is that of all; the number of different things is within four standard deviations, 1/sqrt(LIMIT)."""
    monkeypatch.setattr(seen, "LIMIT", 1000)
    old = [f"old {n}" for n in range(sizes[0])]
    new = [f"new {n}" for n in range(sizes[1])]
    joined = remember(new, facts_of(old))
    whole = remember(old + new)
    check_trained_on({"trained_on": joined})
    assert joined["hashes"] == whole["hashes"]
    assert abs(joined["different"] / whole["different"] - 1) < 4 / np.sqrt(1000)
    assert remember(new, {"trained_on": joined}) is joined


@pytest.mark.parametrize(
    "wrong",
    [
        {"different": 1, "hashes": "AAAA"}, {"different": 2, "hashes": "AAAAAAAAAAA="},
        {"different": 1, "hashes": "AAAA!AAAAAAA="},
        {"different": True, "hashes": ""}, {"different": 1, "hashes": "?"}, {"different": 1, "hashes": 3},
        {"hashes": ""}, [1], 3,
    ],
)  # fmt: skip
def test_damaged_facts_are_refused(wrong):
    with pytest.raises((ValueError, TypeError, LookupError)):
        check_trained_on({"trained_on": wrong})


def test_digests_of_files(tmp_path, monkeypatch):
    monkeypatch.setattr(seen, "_PIECE", 3)
    for name, data in (("a", b"abcdefg"), ("b", b"abcdefg"), ("c", b"abcdefh")):
        (tmp_path / name).write_bytes(data)
    a, b, c = (file_digest(tmp_path / name) for name in "abc")
    assert a == b != c


# ---- what the tasks say


def trained(task, file, folder, **more):
    run = prepare(task, [file], folder, **TINY, **more)
    run.train(progress=False)
    return load(folder, "cpu")


def forget(folder):
    """As of the first edition, which remembered nothing."""
    _, document = read_run(folder)
    del document["facts"]["trained_on"]
    write_config(folder, document)
    return load(folder, "cpu")


@pytest.mark.long
def test_classify_counts_the_texts_of_its_training_part(tmp_path):
    pairs = [(f"{word} film {n}", label) for n in range(20) for word, label in (("fine", "pos"), ("dull", "neg"))]
    path, other = tmp_path / "a.tsv", tmp_path / "b.tsv"
    path.write_text("".join(f"{text}\t{label}\n" for text, label in pairs))
    other.write_text("new film\tpos\ndull film 21\tneg\n")
    model = trained("classify", path, tmp_path / "run")
    numbers, text = model.task.evaluate(model, [path])
    assert numbers["trained_on"] == 32 and "trained on 32 of these 40 texts" in text
    rest = [pair for pair in pairs if not look_up(model.facts, [pair[0]]).mask[0]]
    assert len(rest) == 8
    other_file = tmp_path / "rest.tsv"
    other_file.write_text("".join(f"{text}\t{label}\n" for text, label in rest))
    alone = model.task.evaluate(model, [other_file])[0]
    assert numbers["accuracy_of_others"] == alone["accuracy"] == alone["accuracy_of_others"]
    assert f"accuracy of the other 8: {alone['accuracy']:.2%}" in text
    numbers, text = model.task.evaluate(model, [other])
    assert numbers["trained_on"] == 0 and "not trained on any of these 2 texts" in text
    model = forget(tmp_path / "run")
    numbers, text = model.task.evaluate(model, [path])
    assert "trained_on" not in numbers and "trained on" not in text


@pytest.mark.long
def test_a_resumed_run_remembers_the_same(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"fine {n}\tpos\ndull {n}\tneg\n" for n in range(20)))
    model = trained("classify", path, tmp_path / "run")
    before = model.facts["trained_on"]
    forget(tmp_path / "run")
    prepare("classify", [], tmp_path / "run", resume=True, epochs=2).train(progress=False)
    assert load(tmp_path / "run", "cpu").facts["trained_on"] == before
    _, document = read_run(tmp_path / "run")
    document["facts"]["trained_on"] = 7
    write_config(tmp_path / "run", document)
    with pytest.raises(CheckpointError, match="config.json: is damaged"):
        load(tmp_path / "run", "cpu")


@pytest.mark.long
@pytest.mark.parametrize("task", ["classify", "text"])
def test_a_model_trained_further_remembers_both(task, tmp_path):
    one, two = tmp_path / "a.txt", tmp_path / "b.txt"
    one.write_text("".join(f"fine {n}\tpos\ndull {n}\tneg\n" for n in range(20)))
    two.write_text("".join(f"fine {n}\tpos\ndull {n}\tneg\n" for n in range(30, 50)))
    more = {"steps": 8} if task == "text" else {}
    first = trained(task, one, tmp_path / "one", **more)
    second = trained(task, two, tmp_path / "two", start=tmp_path / "one", **more)
    new = trained(task, two, tmp_path / "new", **more)
    for file in (one, two):
        counts = [model.task.evaluate(model, [file])[0]["trained_on"] for model in (first, new, second)]
        assert counts[2] == counts[0] + counts[1]


@pytest.mark.long
def test_translate_counts_pairs(tmp_path):
    pytest.importorskip("sacrebleu")
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"word {n}\tmot {n}\n" for n in range(20)) + "a b c d e f\tg\n")
    model = trained("translate", path, tmp_path / "run", valid=0.25, longest=5, beam=1)
    numbers, text = model.task.evaluate(model, [path])
    assert numbers["trained_on"] in (15, 16) and f"trained on {numbers['trained_on']} of these 21 pairs" in text
    path.write_text("word 1\tother\n")
    assert model.task.evaluate(model, [path])[0]["trained_on"] == 0


@pytest.mark.long
def test_text_knows_its_files(tmp_path):
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("a gate keeps the state " * 30)
    other.write_text("the state opens the gate " * 30)
    model = trained("text", path, tmp_path / "run", steps=8, valid=0.2)
    copied = tmp_path / "copy.txt"
    copied.write_bytes(path.read_bytes())
    numbers, text = model.task.evaluate(model, [copied, other])
    assert numbers["trained_on"] == 1 and "trained on 1 of these 2 files" in text and "The last 20%" in text
    numbers, text = model.task.evaluate(model, [other])
    assert numbers["trained_on"] == 0 and "not trained on this file" in text and "last 20%" not in text
    model = forget(tmp_path / "run")
    assert "trained_on" not in model.task.evaluate(model, [path])[0]


def test_the_text_that_comes_with_python_is_not_remembered(tmp_path):
    run = prepare("text", [], tmp_path / "run", **TINY | {"batch": 32}, steps=200)
    run.close()
    assert run.data.facts.get("trained_on") is None


def write_series(path, rng, rows=60, header="date,sales"):
    days = np.datetime64("2020-01-01") + np.arange(rows)
    values = rng.normal(size=rows).round(3)
    path.write_text("\n".join([header, *(f"{day},{value}" for day, value in zip(days, values, strict=True))]))


def write_speech(path, rng, utterances=10):
    frames = rng.normal(size=(20 * utterances, 4)).astype("float32")
    np.savez(path, frames=frames, length=[20] * utterances, label=["yes", "no"] * (utterances // 2))


def write_music(path, rng, pieces=10):
    path.write_text(json.dumps([[[int(key)] for key in rng.integers(40, 80, 12)] for _ in range(pieces)]))


def write_images(path, rng, images=20):
    pixels, labels = rng.integers(0, 256, (images, 4, 4), np.uint8), np.arange(images) % 2
    np.savez(path, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)


OTHERS = {  # task: (writes a file, its name, settings, how many of its things are trained on, how many there are, what)
    "series": (write_series, "a.csv", {"window": 5, "horizon": 2, "season": 1}, 42, 54, "windows"),
    "speech": (write_speech, "a.npz", {"bands": 4, "rate": 8000}, 9, 10, "utterances"),
    "music": (write_music, "a.json", {}, 9, 10, "pieces"),
    "longrange": (write_images, "a.npz", {"problem": "rows", "valid": 0.1}, 18, 20, "images"),
}


@pytest.mark.parametrize("task", OTHERS)
def test_every_task_counts_what_it_was_trained_on(task, tmp_path):
    """Of 60 rows 48 are to train on: 42 windows of 5 rows with a horizon of 2. A model trained further knows both."""
    write, name, settings, count, whole, what = OTHERS[task]
    rng = np.random.default_rng(0)
    (tmp_path / "new").mkdir()
    old, new = tmp_path / name, tmp_path / "new" / name
    write(old, rng), write(new, rng)
    first = trained(task, old, tmp_path / "one", **settings)
    numbers, text = first.task.evaluate(first, [str(old)])
    assert numbers["trained_on"] == count and f"trained on {count} of these {whole} {what}." in text
    numbers, text = first.task.evaluate(first, [str(new)])
    assert numbers["trained_on"] == 0 and f"not trained on any of these {whole} {what}." in text
    second = trained(task, new, tmp_path / "two", start=tmp_path / "one")
    assert [second.task.evaluate(second, [str(file)])[0]["trained_on"] for file in (old, new)] == [count, count]
    before = forget(tmp_path / "one")  # as an earlier edition wrote it
    assert "trained_on" not in before.task.evaluate(before, [str(old)])[0]


def test_a_series_is_scored_on_the_windows_it_was_not_trained_on(tmp_path):
    path = tmp_path / "a.csv"
    write_series(path, np.random.default_rng(0))
    model = trained("series", path, tmp_path / "run", window=5, horizon=2, season=1)
    numbers, text = model.task.evaluate(model, [str(path)])
    table = read_table(path, model.facts)
    others = score(model, table, np.arange(46, 58))  # of 54 windows the first 42, which end in rows 4 to 45, are known
    assert numbers["others"] == others and others["windows"] == 12 and others["model"] != numbers["model"]
    assert f"Other 12       {'MAE':>10}" in text
    assert text.endswith(summary(others, "other 12"))


def test_an_utterance_is_known_by_its_sound(tmp_path):
    """Not by its transcript or its features, whose last bits may differ between machines."""
    for number, pitch in enumerate((300, 300, 400)):
        write_wav(tmp_path / f"{number}.wav", tone(pitch))
    (tmp_path / "a.tsv").write_text("0.wav\tyes\n1.wav\tno\n2.wav\tyes\n")
    one, same, other = (read_utterances(tmp_path / "a.tsv", SpeechSettings(bands=b))[0] for b in (8, 8, 9))
    assert one[0].digest == one[1].digest == other[0].digest != one[2].digest
