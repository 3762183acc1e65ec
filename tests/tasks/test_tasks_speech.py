"""Speech: words of tones learned from WAV files, strings made of single ones, and files that are refused."""

import itertools
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import assert_close
from optional import needs
from sounds import tone, word, write_wav, write_words

from gpurnn import testing
from gpurnn.cli import main
from gpurnn.data import wav
from gpurnn.data.audio import read_audio
from gpurnn.data.utterances import Utterance, read_utterances, sound_features
from gpurnn.data.vocabulary import Vocabulary
from gpurnn.errors import FileError
from gpurnn.metrics import error_rate
from gpurnn.tasks.run import prepare
from gpurnn.tasks.speech import TASK, SpeechSettings
from gpurnn.tasks.speech.batches import Utterances, distorted, stacked
from gpurnn.tasks.speech.decode import aligned, transcribe
from gpurnn.tasks.speech.metrics import word_errors
from gpurnn.tasks.trained import load

SMALL = {
    "cell": "gru", "layers": 1, "hidden": 16, "bands": 12, "stack": 2, "batch": 4, "lr": 2e-2, "dropout": 0.0,
    "epochs": 10, "valid": 0.1, "seed": 1, "strings": 20,
}  # fmt: skip


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Most of a tiny run's time would go into its picture."""
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])
    wav.say_once.cache_clear()


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Table of 90 single tones to learn from."""
    return write_words(tmp_path_factory.mktemp("speech") / "letters", list("abc") * 30, 0)


@pytest.fixture(scope="module")
def strings(tmp_path_factory):
    """Table of 20 words of one to four tones to be measured by."""
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abc"), rng.integers(1, 5))) for _ in range(20)]
    return write_words(tmp_path_factory.mktemp("speech") / "strings", texts, 1)


@pytest.fixture(scope="module")
def listener(letters, tmp_path_factory):
    """A run that learned strings of one to four tones from single ones."""
    folder = tmp_path_factory.mktemp("speech") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.plots.plot_run", lambda folder: [])
        run = prepare("speech", [letters], folder, backend="cpu", concatenate="1-4", **SMALL)
        run.finish(run.train(progress=False))
    return folder


def gpurnn(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result


def some_utterances(count, bands=3, seed=0, letters="abc"):
    rng = np.random.default_rng(seed)
    return [
        Utterance(rng.standard_normal((rng.integers(5, 12), bands)).astype(np.float32), letters[n % len(letters)])
        for n in range(count)
    ]


def facts_of(vocabulary="abc", bands=3, joint=""):
    return {"vocabulary": vocabulary, "joint": joint, "rate": None, "mean": [0.0] * bands, "std": [1.0] * bands}


# ---- end to end


@pytest.mark.long
def test_strings_are_learned_from_single_tones(listener, strings):
    trained = load(listener, "cpu")
    numbers, text = TASK.evaluate(trained, [strings])
    said = [line.split("\t")[1] for line in strings.read_text().splitlines()]
    trivial = min(error_rate([guess] * len(said), said) for guess in ["", *set(said)])
    assert numbers["error"] < 0.1 < 0.5 < trivial
    assert numbers["utterances"] == numbers["strings"]["utterances"] == 20
    assert numbers["strings"]["error"] < 0.15
    assert f"{numbers['error']:.2%} of the characters are wrong" in text
    result = json.loads((listener / "config.json").read_text())["result"]
    assert result["validation_error"] < 0.2 and "test" not in result


@pytest.mark.long
def test_classes_are_learned(letters, strings, tmp_path):
    settings = SMALL | {"target": "class", "epochs": 4, "pooling": "attention"}
    run = prepare("speech", [letters], tmp_path / "run", backend="cpu", **settings)
    run.finish(run.train(progress=False))
    table = write_words(tmp_path / "more", list("abccba") * 3, 5)
    trained = load(tmp_path / "run", "cpu")
    numbers, text = TASK.evaluate(trained, [table])
    assert numbers["accuracy"] > 0.9  # by chance 1/3
    assert f"{numbers['accuracy']:.2%} of the classes are right" in text
    found = transcribe(trained, sound_features(*read_audio(tmp_path / "more" / "0.wav"), trained.settings, 4000)[0])
    assert found["text"] == "a" and 0.5 < found["probability"] <= 1
    with pytest.raises(ValueError, match="the model never saw the class '[abc]+': it knows a, b, c"):
        TASK.evaluate(trained, [strings])


@pytest.mark.long
@needs("matplotlib")
def test_the_command_line(letters, listener, tmp_path, strings):
    options = [f"--{name}={value}" for name, value in (SMALL | {"epochs": 1}).items()]
    out = gpurnn("train", "speech", letters, *options, "--out", tmp_path / "run", "--no-progress", "--backend", "cpu")
    assert "90 utterances, 3 characters: 81 to train on, 9 to validate, 0 to test" in " ".join(out.output.split())
    assert "gpurnn transcribe" in out.output
    paths = [strings.parent / f"{n}.wav" for n in (0, 1)]
    said = [line.split("\t")[1] for line in strings.read_text().splitlines()][:2]
    lines = gpurnn("transcribe", listener, *paths).stdout
    assert lines == "".join(f"{path}\t{text}\n" for path, text in zip(paths, said, strict=True))
    png = tmp_path / "heard.png"
    found = json.loads(gpurnn("transcribe", listener, *paths, "--beam", 4, "--plot", png, "--json").stdout)
    assert [one["text"] for one in found] == said and all(-5 < one["log_probability"] < 0 for one in found)
    assert png.read_bytes()[:4] == b"\x89PNG"
    numbers = json.loads(gpurnn("evaluate", listener, strings, "--json").stdout)
    assert numbers["error"] < 0.1


@pytest.mark.long
def test_a_run_from_before_strict_was_a_setting(listener, tmp_path):
    shutil.copytree(listener, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    document = json.loads(config.read_text())
    assert document["settings"].pop("strict") is False
    del document["sha256"]
    config.write_text(json.dumps(document))
    assert load(tmp_path / "run", "cpu").settings.strict is False


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits(letters, tmp_path):
    settings = SMALL | {"concatenate": "1-3", "schedule": "constant", "dropout": 0.2, "layers": 2}
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    prepare("speech", [letters], whole, backend="cpu", **settings | {"epochs": 2}).train(progress=False)
    prepare("speech", [letters], halved, backend="cpu", **settings | {"epochs": 1}).train(progress=False)
    prepare("speech", folder=halved, resume=True, epochs=2).train(progress=False)
    one, other = (load(folder, "cpu").model.state_dict() for folder in (whole, halved))
    assert all(np.array_equal(one[name], other[name]) for name in one)


# ---- the model


@pytest.mark.parametrize("target", ["transcript", "class"])
def test_finite_differences(target):
    settings = SpeechSettings(target=target, layers=2, hidden=4, stack=2, dropout=0.0, dtype="float64", seed=3)
    facts = facts_of() | ({"classes": ["a", "b", "c"]} if target == "class" else {})
    batch = Utterances(some_utterances(5), settings, facts).batch(0, 0)
    model, loss = TASK.build(settings, facts, "cpu"), TASK.loss(settings, facts)

    def value():
        outputs, _, backward = model.forward(batch.inputs, lengths=batch.lengths)
        found, dloss = loss(outputs, batch.targets, **batch.loss_options)
        return float(found), lambda: backward(dloss())

    model.zero_grad()
    value()[1]()
    direction = np.random.default_rng(0).standard_normal(model.flat_params.size)
    exact, start, step = model.flat_grads @ direction, model.flat_params.copy(), 1e-6
    found = []
    for sign in (1, -1):
        model.flat_params[...] = start + sign * step * direction
        found.append(value()[0])
    assert abs((found[0] - found[1]) / (2 * step) - exact) < 1e-6 * abs(exact)


# ---- batches


def test_batches_depend_on_epoch_and_index_alone():
    settings = SpeechSettings(concatenate="1-3", batch=4, stack=2, seed=5)
    utterances, facts = some_utterances(20), facts_of()
    source, other = (Utterances(utterances, settings, facts, 10, training=True) for _ in range(2))
    assert len(source) == 3
    seen = {(epoch, index): source.batch(epoch, index) for epoch in (0, 1) for index in range(3)}
    for epoch, index in [(1, 2), (0, 1), (1, 0), (0, 0), (0, 2), (1, 1)]:
        again = other.batch(epoch, index)
        assert np.array_equal(again.inputs, seen[epoch, index].inputs)
        assert np.array_equal(again.lengths, seen[epoch, index].lengths)
        assert all(map(np.array_equal, again.targets, seen[epoch, index].targets))
    assert not np.array_equal(seen[0, 0].inputs, seen[1, 0].inputs)
    assert sum(batch.weight for (epoch, _), batch in seen.items() if epoch == 0) == 10


def test_training_follows_the_seed_and_validation_the_split():
    """Two runs that differ in the seed alone are measured on the same strings; two with another split train alike."""
    options, utterances = {"concatenate": "1-3", "batch": 2}, some_utterances(9)

    def drawn(training, **changed):
        source = Utterances(utterances, SpeechSettings(**options, **changed), facts_of(), 12, training=training)
        return [source.batch(0, index).inputs.tobytes() for index in range(len(source))]

    for training, its_own, other in ((True, "seed", "split"), (False, "split", "seed")):
        base = {"seed": 1, "split": 1}
        assert drawn(training, **base) == drawn(training, **(base | {other: 2}))
        assert drawn(training, **base) != drawn(training, **(base | {its_own: 2}))


def is_normalized(features, expected):
    """Whether these are the normalized features: float32, rounded in the subtraction and in the division."""
    return np.abs(features - expected).max() <= testing.allowed_rounding(expected, "float32", 2)


def test_strings_are_their_utterances_one_behind_the_other():
    settings = SpeechSettings(concatenate="2-3", batch=50, stack=2)
    utterances, facts = some_utterances(12), facts_of() | {"mean": [1.0, 2.0, 3.0], "std": [2.0, 0.5, 1.0]}
    source = Utterances(utterances, settings, facts, 40)
    strings = source.strings(0)
    assert {len(string) for string in strings} == {2, 3}
    uses = np.bincount(np.concatenate(strings), minlength=12)
    assert uses.max() - uses.min() <= 1  # everyone in turn
    batch = source.batch(0, 0)
    wanted = {}
    for string in strings:
        x = (np.concatenate([utterances[n].features for n in string]) - [1, 2, 3]) / [2, 0.5, 1]
        wanted["".join(utterances[n].text for n in string), len(x)] = x
    for b, target in enumerate(batch.targets):
        steps = batch.lengths[b]
        flat = batch.inputs[:steps, b].reshape(-1, 3)
        text = Vocabulary("abc").decode(target)
        x = wanted.get((text, 2 * steps), wanted.get((text, 2 * steps - 1)))
        assert len(flat) - len(x) in (0, 1) and np.all(flat[len(x) :] == 0) and np.all(batch.inputs[steps:, b] == 0)
        # another string may say the same in as many frames
        assert is_normalized(flat[: len(x)], x) or list(map(len, strings)).count(len(text)) > 1


def test_words_are_joined_by_spaces():
    utterances = [Utterance(np.zeros((9, 3), np.float32), text) for text in ("ab", "ca")]
    settings = SpeechSettings(concatenate="2", stack=1)
    source = Utterances(utterances, settings, facts_of(" abc", joint=" "), 3)
    said = {Vocabulary(" abc").decode(target) for target in source.batch(0, 0).targets}
    assert said <= {"ab ca", "ca ab"} and said
    wrong = word_errors(Vocabulary(" abc"))
    path = Vocabulary(" abc").encode("ab cc").astype(int)
    logits = np.eye(5)[np.stack([path, [0] * 5], axis=1)]
    assert wrong(logits, [path, path[:2]], lengths=[5, 5]) == (1 + 0, 3) or path[3] == path[4]


def test_stacked():
    x = np.arange(10.0).reshape(5, 2)
    assert stacked(x, 1).tolist() == x.tolist()
    assert stacked(x, 2).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]


def test_distortions():
    x = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    settings = SpeechSettings(stretch=0.5, mask_time=10, mask_bands=4)
    assert np.array_equal(distorted(x, settings, [0.5, 0, 0, 0, 0]), x)  # neither stretched nor masked
    half, longer = (distorted(x, settings, [draw, 0, 0, 0, 0]) for draw in (0, 1))
    assert len(half) == 20 and len(longer) == 60
    np.testing.assert_array_equal(longer[[0, -1]], x[[0, -1]])
    assert_close(longer[1], x[0] + (x[1] - x[0]) * 39 / 59, 5, dtype="float32")  # two shares, two products, a sum
    almost = 1 - 1e-9
    masked = distorted(x, settings, [0.5, almost, 0.5, almost, almost])
    zeros = masked == 0
    assert zeros.all(axis=1).nonzero()[0].tolist() == list(range(16, 24))  # a fifth of 40, though mask_time is 10
    assert zeros.all(axis=0).nonzero()[0].tolist() == [8, 9, 10, 11]
    assert np.array_equal(masked[~zeros], x[~zeros])
    for T in (1, 2, 3):
        assert len(distorted(x[:T], settings, [0.3, almost, almost, almost, almost])) >= 1


# ---- files


def save_features(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {
        "frames": rng.standard_normal((40, 3)).astype(np.float16), "length": np.full(8, 5), "label": np.arange(8) % 2,
        "is_test": np.arange(8) % 4 == 0,
    } | changes  # fmt: skip
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_features_of_an_npz(tmp_path):
    path = save_features(tmp_path / "a.npz")
    utterances, rate = read_utterances(path, SpeechSettings())
    assert rate is None and [u.text for u in utterances] == list("01010101")
    assert [u.is_test for u in utterances] == [True, False, False, False] * 2
    frames = np.load(path)["frames"]
    assert np.array_equal(utterances[1].features, frames[5:10].astype(np.float32))
    data = TASK.read([str(path)], SpeechSettings(valid=0.2, split=1))
    assert (data.train.count, data.valid.count, len(data.rest)) == (5, 1, 2)
    # the validation and test parts have no say in the normalisation
    rest = [u.features for u in utterances if not u.is_test]
    mean, std = data.facts["mean"], data.facts["std"]
    train = np.concatenate([x for x in rest if not is_normalized(data.valid.features[0], (x - mean) / std)])
    assert len(train) == 25
    exact = train.astype(np.float64)  # the facts are float32
    assert_close(mean, exact.mean(axis=0), 1, dtype="float32")
    assert_close(std, exact.std(axis=0), 1, dtype="float32")
    save_features(tmp_path / "b.npz", is_test=None, label=np.array(["yes", "no"] * 4))
    utterances, _ = read_utterances(tmp_path / "b.npz", SpeechSettings())
    assert utterances[0].text == "yes" and not any(u.is_test for u in utterances)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"label": None, "length": None}, "lacks the arrays length, label"),
        ({"length": np.full(8, 6)}, "that add up to the 40 frames"),
        ({"length": np.array([0, 10, 5, 5, 5, 5, 5, 5])}, "length should hold numbers of at least 1"),
        ({"label": np.array(1)}, "should be one for each utterance"),
        ({"length": np.full(7, 5)}, "should be one for each utterance"),
        ({"length": np.full(8, 5.0)}, "should be one for each utterance"),
        ({"frames": np.zeros(40, np.float32)}, r"frames should be numbers \(N, bands\), got float32 \(40,\)"),
        ({"frames": np.full((40, 3), np.nan)}, "frames holds numbers that are not finite"),
        ({"frames": np.array([[{}]])}, "is not an .npz file of arrays, or is damaged"),
    ],
)
def test_damaged_features(tmp_path, changes, message):
    path = save_features(tmp_path / "a.npz", **changes)
    with pytest.raises(ValueError, match=f"a.npz: .*{message}"):
        read_utterances(path, SpeechSettings())


def test_features_that_do_not_go_together(tmp_path, listener):
    path = save_features(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="a.npz: has 3 bands, but bands is 40"):
        TASK.read([path], SpeechSettings(rate=8000))
    with pytest.raises(ValueError, match="the model never saw the class '2': it knows 0, 1"):
        TASK.read([save_features(path, label=np.array([2, 0, 1, 0, 0, 0, 1, 0]))], SpeechSettings(target="class"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="a.npz: is not an .npz file of arrays, or is damaged"):
        read_utterances(path, SpeechSettings())
    save_features(path)
    with pytest.raises(ValueError, match="has 3 bands, but bands is 12"):
        TASK.evaluate(load(listener, "cpu"), [path])
    other = save_features(tmp_path / "b.npz", frames=np.zeros((40, 4), np.float32))
    with pytest.raises(ValueError, match=r"features of different sizes: \[3, 4\]"):
        TASK.read([path, other], SpeechSettings())


def test_a_model_of_features_alone_takes_no_sound(tmp_path):
    path = save_features(tmp_path / "a.npz")
    run = prepare("speech", [path], tmp_path / "run", backend="cpu", **SMALL | {"epochs": 1, "stack": 1})
    run.train(progress=False)
    wav = write_wav(tmp_path / "a.wav", np.zeros(100))
    result = gpurnn("transcribe", tmp_path / "run", wav, code=2)
    assert "not known how they are made from sound. Train it with --rate" in result.output


def test_a_table_in_another_encoding(tmp_path):
    write_wav(tmp_path / "a.wav", tone(300))
    (tmp_path / "a.tsv").write_text("a.wav\tcaf\u00e9\n", encoding="latin-1")
    with pytest.raises(FileError, match="in line 1, at byte 9.* --encoding latin-1"):
        read_utterances(tmp_path / "a.tsv", SpeechSettings())
    (utterance,), _ = read_utterances(tmp_path / "a.tsv", SpeechSettings(encoding="latin-1"))
    assert utterance.text == "caf\u00e9"


def test_damaged_tables(tmp_path):
    table, settings = tmp_path / "a.tsv", SpeechSettings(strict=True)
    write_wav(tmp_path / "good.wav", np.zeros(1000))
    cut = write_wav(tmp_path / "cut.wav", np.zeros(1000))
    cut.write_bytes(cut.read_bytes()[:-100])
    for text, message in [
        ("", "a.tsv: is empty"),
        ("\n \n", "a.tsv: is empty"),
        ("good.wav\tyes\ngood.wav yes\n", "a.tsv: line 2: expected a path, a tab and a transcript, got 'good.wav yes'"),
        ("\tyes\n", "a.tsv: line 1: expected a path"),
        ("good.wav\tyes\n\ncut.wav\tno\n", "a.tsv: line 3: .*cut.wav: is cut off"),
        ("none.wav\tyes\n", "a.tsv: line 1: .*none.wav"),
    ]:
        table.write_text(text)
        with pytest.raises(FileError, match=message):
            read_utterances(table, settings)
    with pytest.raises(ValueError, match="good.wav: give a table"):
        read_utterances(tmp_path / "good.wav", settings)
    table.write_bytes(b"good.wav\t\xff\n")
    with pytest.raises(ValueError, match="a.tsv: is not UTF-8"):
        read_utterances(table, settings)


def test_a_bad_line_of_many_is_skipped_and_counted(tmp_path, caplog):
    write_wav(tmp_path / "good.wav", tone(300))
    cut = write_wav(tmp_path / "cut.wav", tone(300))
    cut.write_bytes(cut.read_bytes()[:-100])
    table = tmp_path / "a.tsv"
    table.write_text("cut.wav\tno\ngood.wav\ta\nno tab\nnone.wav\tno\nno tab\ngood.wav\tb\n")
    utterances, rate = read_utterances(table, SpeechSettings())
    assert [utterance.text for utterance in utterances] == ["a", "b"] and rate == 8000
    (said,) = [record.getMessage().splitlines() for record in caplog.records]
    assert said[0] == f"{table}: 4 of 6 lines skipped:" and said[4] == "  and 1 more"
    assert "line 1: " in said[1] and "cut.wav: is cut off" in said[1]
    assert said[2] == "  line 3: expected a path, a tab and a transcript, got 'no tab'"
    assert said[3] == f"  line 4: {tmp_path / 'none.wav'}: No such file or directory"
    table.write_text("none.wav\tno\nno tab\n")
    with pytest.raises(FileError, match=r"a.tsv: line 1: .*none.wav.* \(none of the 2 lines can be used\)"):
        read_utterances(table, SpeechSettings())


def test_a_header_is_left_out(tmp_path, caplog):
    write_wav(tmp_path / "good.wav", tone(300))
    write_wav(tmp_path / "bare", tone(300))
    table = tmp_path / "a.tsv"
    table.write_text("path\ttext\ngood.wav\ta\n")
    utterances, _ = read_utterances(table, SpeechSettings())
    assert [utterance.text for utterance in utterances] == ["a"]
    assert "a.tsv: line 1 is taken for the names of the columns" in caplog.text
    table.write_text("bare\ta\nnone\tb\n")  # a file without a suffix is no header, nor is a later line
    caplog.clear()
    assert len(read_utterances(table, SpeechSettings())[0]) == 1 and "names of the columns" not in caplog.text
    table.write_text("path\ttext\n")
    with pytest.raises(FileError, match="is empty"):
        read_utterances(table, SpeechSettings())


def test_a_table_of_comma_separated_values(tmp_path, caplog):
    write_wav(tmp_path / "good.wav", tone(300))
    table, settings = tmp_path / "a.csv", SpeechSettings(strict=True)
    table.write_text('good.wav,yes\n"good.wav","no, never"\n')
    assert [one.text for one in read_utterances(table, settings)[0]] == ["yes", "no, never"]
    table.write_text('"file","text"\ngood.wav,a\n')
    assert [one.text for one in read_utterances(table, settings)[0]] == ["a"]
    table.write_text("good.wav\tyes, sir\n")
    assert [one.text for one in read_utterances(table, settings)[0]] == ["yes, sir"]
    for text, message in [
        ("good.wav,no, never\n", "line 1: expected a path, a comma and a transcript .in double quotes"),
        ("no comma\ngood.wav,a\n", "line 1: expected a path, a comma and a transcript"),
        ('good.wav,a\ngood.wav,"a\n', "line 2: "),
        (",a\n", "line 1: expected a path"),
        ("good.wav\tyes\tann\n", "line 1: expected two columns, a path and a transcript, got 3: leave out the others"),
    ]:
        table.write_text(text)
        with pytest.raises(FileError, match=message):
            read_utterances(table, settings)


@pytest.mark.long
def test_a_model_that_writes_nothing_is_named(letters, tmp_path):
    """Its error is 100 %; of classes the share of the commonest stands beside what is right."""
    for target in ("transcript", "class"):
        run = prepare("speech", [letters], tmp_path / target, backend="cpu", **SMALL | {"epochs": 1, "target": target})
        run.finish(run.train(progress=False))
        trained = load(tmp_path / target, "cpu")
        linear = trained.model.linear
        linear.params["weight"][...] = 0
        linear.params["bias"][...] = 0
        linear.params["bias"][0] = 9  # the blank, or the class "a"
        numbers, text = TASK.evaluate(trained, [letters])
        if target == "class":
            assert numbers["majority"] == 1 / 3 and "; always 'a': 33.33%" in text
        else:
            assert numbers["error"] == 1 and "A model that writes nothing does as well" in text


def test_silent_recordings_are_counted(tmp_path, caplog):
    write_wav(tmp_path / "a.wav", tone(300))
    write_wav(tmp_path / "b.wav", np.zeros(4000))
    (tmp_path / "a.tsv").write_text("a.wav\ta\nb.wav\tb\nb.wav\tc\n")
    read_utterances(tmp_path / "a.tsv", SpeechSettings())
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path / 'a.tsv'}: silent recordings: 2 of 3"]


def test_transcribe_goes_on_after_a_bad_file(listener, strings, tmp_path):
    good, (bad, mute) = strings.parent / "0.wav", (tmp_path / "bad.mp3", tmp_path / "mute.wav")
    bad.write_bytes(b"not sound")
    write_wav(mute, np.full(2000, 0.25), 4000)
    said = strings.read_text().splitlines()[0].split("\t")[1]
    done = gpurnn("transcribe", listener, good, bad, good, code=1)
    assert done.stdout == f"{good}\t{said}\n" * 2
    assert done.stderr.startswith(f"Error: {bad}: is not WAV, FLAC, OGG or MP3 by its first bytes")
    done = gpurnn("transcribe", listener, bad, good, mute, "--json", code=1)
    first, second, third = json.loads(done.stdout)
    assert first["file"] == str(bad) and "is not WAV" in first["error"]
    assert second["text"] == said and not second["silent"] and third["silent"] and "error" not in third
    assert f"Note: {mute} is silent. What is heard in it means nothing." in done.stderr
    assert "is not WAV" in gpurnn("transcribe", listener, bad, code=2).stderr  # alone it is the command's error


@pytest.mark.parametrize("text, said", [("", True), ("a", False)])
def test_a_model_that_hears_nothing_is_named(listener, strings, tmp_path, monkeypatch, text, said):
    """Bad files have no say in it."""
    bad = tmp_path / "bad.mp3"
    bad.write_bytes(b"not sound")
    monkeypatch.setattr("gpurnn.cli.transcribe.transcribe", lambda *_: {"text": text})
    done = gpurnn("transcribe", listener, bad, strings.parent / "0.wav", code=1)
    assert ("nothing is heard in any file" in done.stderr) is said


def test_posteriors_are_the_softmax_of_every_step(listener, strings):
    trained = load(listener, "cpu")
    features, _ = sound_features(*read_audio(strings.parent / "2.wav"), trained.settings, 4000)
    found = transcribe(trained, features)
    p = found["posteriors"]
    assert p.shape == (-(-len(features) // 2), 4) and p.dtype == np.float64  # two frames a step; the blank and a, b, c
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=4 * np.finfo(np.float64).eps)
    assert 0 <= p.min() < 0.1
    path = [int(number) for number, _ in itertools.groupby(p.argmax(axis=1)) if number]
    assert "".join(" abc"[number] for number in path) == found["text"]


# ---- places of characters


def test_every_character_has_its_place():
    p = np.full((9, 3), 0.05)
    for step, number in enumerate([1, 1, 0, 1, 2, 2, 0, 0, 2]):
        p[step, number] = 0.9
    p[1, 1] = 0.8
    p[5, 2] = 0.95
    assert aligned(p, "aabb", "ab") == [0, 3, 5, 8]
    assert aligned(p, "ab", "ab") != aligned(p, "ba", "ab")
    assert aligned(p, "", "ab") == []
    assert aligned(p[:1], "a", "ab") == [0]
    assert aligned(p[:2], "ab", "ab") == [0, 1]
    assert aligned(p[:3], "aa", "ab") == [0, 2]  # two alike need a blank between them


def test_the_alignment_is_the_most_probable_one():
    """Against all ways to say a text in five steps, written out."""
    draw = np.random.default_rng(3)
    for text in ("a", "ab", "aa", "aba", "bb"):
        p = draw.dirichlet(np.ones(3), 5)
        ways = [way for way in itertools.product(range(3), repeat=5) if said_by(way) == text]
        best = max(ways, key=lambda way: np.log(p[range(5), way]).sum())
        wanted, start = [], 0
        for number, group in itertools.groupby(best):
            run = range(start, start := start + len(list(group)))
            if number:
                wanted.append(run[p[run, number].argmax()])
        assert aligned(p, text, "ab") == wanted


def said_by(way):
    return "".join("ab"[number - 1] for number, _ in itertools.groupby(way) if number)


@needs("matplotlib")
def test_the_picture_names_each_character_once(listener, strings, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, data, **_: (drawn.append(figure), data.write(b"png")))
    path = strings.parent / "3.wav"
    said = strings.read_text().splitlines()[3].split("\t")[1]
    gpurnn("transcribe", listener, tmp_path / "none.wav", code=2)
    gpurnn("transcribe", listener, path, "--plot", tmp_path / "a.png")
    above, below = drawn[0].axes
    assert "".join(text.get_text() for text in above.texts) == said
    assert above.get_title("left") == f"3.wav: {said}" and below.get_xlabel() == "time in seconds"
    assert [text.get_text() for text in above.get_legend().get_texts()] == ["blank", *sorted(set(said))]


@pytest.mark.long
@needs("scipy")
def test_stereo_at_another_rate_is_heard_alike(listener, tmp_path):
    sound = word("abca", np.random.default_rng(3), 44100)
    path = write_wav(tmp_path / "a.wav", np.stack([1.5 * sound, 0.5 * sound], axis=1), 44100)
    result = gpurnn("transcribe", listener, path)
    assert result.stdout == f"{path}\tabca\n"


def test_characters_that_were_never_seen_are_errors(listener, strings, tmp_path):
    table = tmp_path / "a.tsv"
    table.write_text(f"{strings.parent / '0.wav'}\t{'x' * 5}\n")
    numbers, text = TASK.evaluate(load(listener, "cpu"), [table])
    assert numbers["unknown"] == "x" and numbers["error"] >= 1 and np.isfinite(numbers["loss"])
    assert "never saw the characters 'x'" in text


def test_transcripts_longer_than_their_sound(tmp_path, caplog):
    write_wav(tmp_path / "a.wav", np.zeros(1240))  # 14 frames: 5 steps of 3
    table = tmp_path / "a.tsv"
    table.write_text("a.wav\tabcde\na.wav\tabab\na.wav\taabb\na.wav\tabcdef\n")
    data = TASK.read([table], SpeechSettings(valid=0.0, bands=10))
    assert data.train.count == 2 and data.valid is None
    assert "2 of 4 utterances are left out" in caplog.text
    table.write_text("a.wav\tabcdef\n")
    with pytest.raises(ValueError, match="no transcript fits into its timesteps"):
        TASK.read([table], SpeechSettings(bands=10))
    table.write_text("a.wav\t\n")
    with pytest.raises(ValueError, match="but all of them are empty"):
        TASK.read([table], SpeechSettings(bands=10))
    table.write_text("a.wav\ta\n")
    with pytest.raises(ValueError, match="too few utterances, 1"):
        TASK.read([table], SpeechSettings(bands=10))
    with pytest.raises(ValueError, match="at least two classes to learn, got"):
        TASK.read([table], SpeechSettings(bands=10, target="class"))


@pytest.mark.parametrize("text", ["", "0-3", "3-1", "a", "1-2-3", "-2"])
def test_counts_that_are_none(text):
    with pytest.raises(ValueError, match="concatenate should be a number, or two such as 1-7"):
        SpeechSettings(concatenate=text)


def test_strings_have_no_class():
    with pytest.raises(ValueError, match="concatenate makes strings"):
        SpeechSettings(concatenate="1-3", target="class")
    assert SpeechSettings(concatenate="4").counts() == (4, 4)


def test_a_model_trained_further_hears_sound_of_another_rate(tmp_path, letters):
    """It is resampled to the rate that the model knows."""
    prepare("speech", [letters], tmp_path / "old", **SMALL | {"epochs": 1}).train(progress=False)
    for number in range(20):
        write_wav(tmp_path / f"{number}.wav", tone(300, rate=16000), rate=16000)
    (tmp_path / "new.tsv").write_text("".join(f"{number}.wav\ta\n" for number in range(20)))
    run = prepare("speech", [tmp_path / "new.tsv"], tmp_path / "new", start=tmp_path / "old", epochs=1)
    assert run.data.facts["rate"] == load(tmp_path / "old").facts["rate"] != 16000
    run.train(progress=False)
