"""Translation: reading pairs, training, resuming, translating, BLEU; and the torch model it is compared with."""

import dataclasses
import gzip
import json
import math
import random
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from optional import needs, optional

from gpurnn.checkpoint import load_checkpoint
from gpurnn.cli import main
from gpurnn.data.tokens import TokenVocabulary, tokenize
from gpurnn.losses import cross_entropy
from gpurnn.seq2seq import EncoderDecoder
from gpurnn.tasks.run import prepare
from gpurnn.tasks.trained import load
from gpurnn.tasks.translate import TASK, PairBatches, TranslateSettings, _split, read_pairs, translate

torch = optional("torch")
translation = optional("bench.translation")

TINY = TranslateSettings(
    hidden=48, batch=16, epochs=12, lr=1e-2, dropout=0.0, min_count=1, beam=2, valid_file=None, seed=5
)


def reversals(count, seed, longest=4):
    """Lines whose target is the source backwards, in capitals: no target word stands where its source does."""
    draw = random.Random(seed)
    for _ in range(count):
        words = draw.choices("abcdefg", k=draw.randint(1, longest))
        yield f"{' '.join(words)}\t{' '.join(reversed(words)).upper()}"


def write(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Most of a tiny run's time would go into its picture."""
    monkeypatch.setattr("gpurnn.plots.plot_run", lambda folder: [])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that learned to write backwards, and a file of sentences that it was not trained on."""
    folder = tmp_path_factory.mktemp("reversals")
    seen = set()
    lines = [line for line in reversals(900, 1) if not (line in seen or seen.add(line))]
    train, test = write(folder / "train.tsv", lines[:-60]), write(folder / "test.tsv", lines[-60:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gpurnn.plots.plot_run", lambda folder: [])
        run = prepare("translate", [train], folder / "run", TINY, backend="cpu")
        history = run.train(progress=False)
        numbers, text = run.finish(history)
    return run.folder, test, numbers, text


def command(*arguments, **options):
    return CliRunner().invoke(main, list(map(str, arguments)), **options)


# ---- reading


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_bytes("\ufeffGo.\tVa !\r\n\n  Hi \t Salut\u00a0! \nA\u2028b\tc".encode())
    assert read_pairs(path).pairs == [("Go.", "Va !"), ("Hi", "Salut\u00a0!"), ("A\u2028b", "c")]
    assert read_pairs(path, reverse=True).pairs[0] == ("Va !", "Go.")


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (
            b"no tab\na\n",
            "expected source and target with a tab between them in each line. It begins with 'no tab', 'a'",
        ),
        (b"a\tb\nno tab\nc\n", "line 2 should be a source and a target .* got 'no tab'. 2 of 3 rows are like that"),
        (b"\tb\n", r"line 1 should be a source and a target with a tab between them, got .\\tb."),
        (b"a\t \n", r"line 1 should be a source and a target with a tab between them, got 'a\\t "),
        ("a\tété\n".encode("latin1"), r"is not UTF-8 text .*--encoding latin-1"),
    ],
)
def test_wrong_files_are_refused(tmp_path, content, message):
    path = tmp_path / "pairs.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"pairs.tsv.*{message}"):
        prepare("translate", [path], tmp_path / "run", TINY)
    assert not (tmp_path / "run").exists()
    done = command("train", "translate", path, "--out", tmp_path / "run")
    assert done.exit_code == 2 and "pairs.tsv" in done.output and "Traceback" not in done.output


GOOD = [(f"word {n}", f"mot {n}") for n in range(10)]
LINES = "".join(f"{one}\t{other}\n" for one, other in GOOD)


@pytest.mark.parametrize(
    "name, content, notes",
    [
        ("a.tsv", LINES.encode("utf-16"), []),
        ("a.tsv.gz", gzip.compress(LINES.encode(), mtime=0), []),
        ("a.tsv", LINES.replace("\n", "\tCC-BY 2.0 #7\n"), ["a.tsv: columns 1 and 2 of 3 are read"]),
        ("a.tsv", "".join(f"{n}\t{one}\t{n + 9}\t{other}\n" for n, (one, other) in enumerate(GOOD)),
         ["a.tsv: columns 2 and 4 of 4 are read"]),
        ("a.csv", "Source;Target\n" + LINES.replace("\t", ";"), []),
        ("a.jsonl", "".join(json.dumps({"tgt": other, "id": 1, "src": one}) + "\n" for one, other in GOOD),
         ["a.jsonl: columns 3 and 1 of 3 are read"]),
        ("a.tsv", LINES + "no tab\n\tno source\na\tb\tc\n",
         ["a.tsv: 3 rows without a source and a target skipped, the first in line 11"]),
        ("a.txt", "a heading\n" + LINES, ["a.txt: 1 row without a source and a target skipped, the first in line 1"]),
    ],
)  # fmt: skip
def test_everyday_files(tmp_path, name, content, notes):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = read_pairs(path)
    assert (found.pairs, found.notes, found.skipped) == (
        GOOD,
        notes,
        len([note for note in notes if "skipped" in note]) and int(notes[0].split()[1]),
    )
    assert read_pairs(path, reverse=True).pairs == [pair[::-1] for pair in GOOD]
    if found.skipped:
        with pytest.raises(
            ValueError, match=r"line \d+ should be a source and a target .* got '(no tab'. 3 of 13|a head)"
        ):
            read_pairs(path, strict=True)


@pytest.mark.parametrize(
    "name, header, good, bad, cells",
    [
        ("a.csv", "source,target", "{},{}", "one, two,un", "3, expected 2: a comma inside"),
        ("a.csv", "source,target,by", "{},{},me", "one, two,un,me", "4, expected 3: a comma inside"),
        ("a.tsv", "", "7\t{}\t{}\tme", "7\tone\ttwo\tun\tme", "5, expected 4: a tab inside"),
        ("a.tsv", "", "7\t{}\t{}\tme", "one\tun\tme", r"3, expected 4\)"),
    ],
)
def test_a_row_has_as_many_cells_as_the_header(tmp_path, name, header, good, bad, cells):
    path, rows = tmp_path / name, [header, *(good.format(*pair) for pair in GOOD)]
    path.write_text("\n".join([*rows, bad]))
    found = read_pairs(path)
    assert found.pairs == GOOD and found.skipped == 1 and "the first in line 12" in found.notes[0]
    with pytest.raises(ValueError, match=rf"line 12 should be a source .*\(its cells: {cells}"):
        read_pairs(path, strict=True)
    path.write_text("\n".join([*rows[:3], *[bad] * 11]))  # most rows are wider than the header
    if header:
        with pytest.raises(ValueError, match="11 of 13 rows are like that"):
            read_pairs(path)


def test_a_run_reads_as_it_was_told(tmp_path):
    (tmp_path / "a.tsv").write_bytes((LINES.replace("mot", "\u00e9t\u00e9") + "no tab\n").encode("latin-1"))
    assert "--encoding latin-1" in command("train", "translate", tmp_path / "a.tsv", "--out", tmp_path / "run").output
    train = [
        "train",
        "translate",
        tmp_path / "a.tsv",
        "--encoding=latin-1",
        "--valid-file",
        tmp_path / "a.tsv",
        "--hidden=4",
    ]
    train += ["--epochs=1", "--min-count=1", "--backend=cpu", "--no-progress", "--out", tmp_path / "run"]
    assert "line 11 should be a source and a target" in command(*train, "--strict").output
    done = command(*train)
    assert done.exit_code == 0 and done.output.count("a.tsv: 1 row without a source and a target skipped") == 2
    assert "\u00e9t\u00e9" in load(tmp_path / "run", "cpu").facts["target"]
    run = prepare("translate", [], tmp_path / "run", resume=True, epochs=2)
    run.close()
    assert run.settings.encoding == "latin-1" and not run.settings.strict


def test_settings_and_sizes_are_checked(tmp_path):
    pairs = write(tmp_path / "pairs.tsv", ["a b\tc", "b\td"])
    for settings, message in (
        ({"hidden": 33}, "hidden should be even"),
        ({"attention": "cosine"}, "attention should be one of"),
        ({"sampling": 1.5}, "sampling should be"),
        ({"longest": 1, "valid": 0.0}, None),
        ({"valid": 0.9}, "2 different sources are too few to keep a share of 0.9"),
        ({"min_count": 3, "valid": 0.0}, "no token comes 3 times"),
        ({"valid_file": str(tmp_path / "none.tsv")}, "none.tsv"),
    ):
        arguments = {"batch": 2, "epochs": 1, "backend": "cpu", "min_count": 1, **settings}
        if message is None:
            run = prepare("translate", [pairs], tmp_path / "run", overwrite=True, **arguments)
            assert len(run.data.train.inputs) == 1
            continue
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            prepare("translate", [pairs], tmp_path / "refused", **arguments)
    long = write(tmp_path / "long.tsv", ["a b\tc"])
    with pytest.raises(ValueError, match="no pair to train on has at most 1 tokens"):
        prepare("translate", [long], tmp_path / "refused", longest=1, valid=0.0)


def test_validation_keeps_the_translations_of_a_sentence_together():
    pairs = [(f"s{n % 40}", f"t{n}") for n in range(100)]
    train, valid = _split(pairs, 0.25, seed=3)
    assert sorted(train + valid) == sorted(pairs)
    assert len({s for s, _ in valid}) == 10 and not {s for s, _ in valid} & {s for s, _ in train}
    assert _split(pairs, 0.25, seed=3)[1] == valid != _split(pairs, 0.25, seed=4)[1]


def test_batches_of_pairs():
    source, target = TokenVocabulary(["x", "y"]), TokenVocabulary(["p", "q"])
    pairs = [(["x"], ["p", "q", "p"]), (["X", "y"], ["q"]), (["z", "y", "x"], ["q", "new"])]
    batch = PairBatches(pairs, source, target, 3, shuffle=False).batch(0, 0)
    np.testing.assert_array_equal(batch.inputs[0].T, [[4, 5, 0], [1, 5, 4], [4, 0, 0]])  # by the target's length
    np.testing.assert_array_equal(batch.inputs[1].T, [[2, 5, 0, 0], [2, 5, 1, 0], [2, 4, 5, 4]])
    np.testing.assert_array_equal(batch.targets.T, [[5, 3, 0, 0], [5, 1, 3, 0], [4, 5, 4, 3]])
    assert [part.tolist() for part in batch.lengths] == [[2, 3, 1], [2, 3, 4]]
    assert batch.weight == 9 and batch.loss_options["lengths"] is batch.lengths[1]


# ---- a trained model


@pytest.mark.long
def test_it_learns_what_copying_does_not(trained):
    """Whole sentences right: nearly all, of sentences never seen; the trivial translations stay far below."""
    folder, test, numbers, text = trained
    result, told = TASK.evaluate(load(folder, "cpu"), [test])
    pairs = read_pairs(test).pairs
    found = translate(load(folder, "cpu"), [source for source, _ in pairs])
    right = sum(one.text == target for one, (_, target) in zip(found, pairs, strict=True)) / len(pairs)
    copied = sum(source.upper() == target for source, target in pairs) / len(pairs)
    assert right > 0.9 > 0.4 > copied
    assert result["bleu"] > 90 and result["accuracy"] > 0.97 and result["perplexity"] < 1.3
    assert f"BLEU        {result['bleu']:.2f}" in told
    assert numbers["accuracy"] > 0.97 and len(numbers["translations"]) == 5 and "(given: " in text
    assert load(folder, "cpu").settings.beam == 2


@pytest.mark.long
def test_evaluation_is_what_it_says(trained, tmp_path):
    """BLEU over different sources with all their references; nats over every pair, by hand."""
    from sacrebleu import BLEU

    folder, _, _, _ = trained
    model = load(folder, "cpu")
    path = write(tmp_path / "more.tsv", ["a b c d e\tE D C B A", "g f e d\tD E F G", "a b c d e\tE D C B B", "d\tnew"])
    result, _ = TASK.evaluate(model, [path])
    texts = [one.text for one in translate(model, ["a b c d e", "g f e d", "d"])]
    expected = BLEU().corpus_score(texts, [["E D C B A", "D E F G", "new"], ["E D C B B", None, None]])
    assert result["bleu"] == pytest.approx(expected.score) and "nrefs:var" in result["signature"]
    assert (result["pairs"], result["sentences"], result["unknown"]) == (4, 3, 1)
    source, target = TokenVocabulary(model.facts["source"]), TokenVocabulary(model.facts["target"])
    nats = count = 0
    for one, other in read_pairs(path).pairs:
        ids = target.encode(tokenize(other))
        inputs = source.encode(tokenize(one))[:, None], np.array([2, *ids])[:, None]
        nats += float(cross_entropy(model.model(inputs), np.array([*ids, 3])[:, None], reduction="sum")[0])
        count += len(ids) + 1
    assert result["nats"] == pytest.approx(nats / count, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(result["nats"]))


@pytest.mark.long
def test_without_sacrebleu_it_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    done = command("evaluate", trained[0], trained[1], "--backend", "cpu")
    assert done.exit_code == 1 and 'pip install "gpurnn[translate]"' in done.output


@pytest.mark.long
def test_the_command_translates(trained):
    folder = trained[0]
    done = command("translate", folder, "a b c", "c  b", "", "--backend", "cpu")
    assert done.exit_code == 0 and done.stdout.splitlines() == ["C B A", "B C", ""] and done.stderr == ""
    piped = command("translate", folder, "--beam", 1, "--backend", "cpu", input="a b c\r\n\nc  b\nf")
    assert piped.stdout.splitlines() == ["C B A", "", "B C", "F"]
    assert command("translate", folder, "--backend", "cpu", input="").stdout == ""


def test_words_it_never_saw(trained):
    done = command("translate", trained[0], "a zebra, A b", "--backend", "cpu")
    assert done.exit_code == 0 and done.stdout.strip()
    assert "never saw zebra, ,:" in done.stderr  # A is read as a


@pytest.mark.long
@needs("matplotlib")
def test_json_and_attention(trained, tmp_path):
    png = tmp_path / "alignment.png"
    done = command("translate", trained[0], "a b c", "", "--json", "--attention", png, "--backend", "cpu")
    with_comma = command("translate", trained[0], "a, b", "--json", "--backend", "cpu")
    assert json.loads(with_comma.stdout)[0]["source_tokens"] == ["a", ",", "b"]  # no joiners
    first, empty = json.loads(done.stdout)
    assert first["translation"] == "C B A" and first["tokens"] == ["C", "B", "A"] and first["score"] < 0
    weights = np.array(first["attention"])
    assert weights.shape == (4, 3) and np.abs(weights.sum(axis=1) - 1).max() < 1e-3
    assert empty["translation"] == "" and png.read_bytes().startswith(b"\x89PNG")
    for texts in ([""], ["a"] * 9):
        refused = command("translate", trained[0], *texts, "--attention", tmp_path / "no.png", "--backend", "cpu")
        assert refused.exit_code == 2 and "holds 1 to 8 sentences" in refused.output


def test_wrong_input_of_the_command(trained, tmp_path):
    done = command("translate", trained[0], "--backend", "cpu", input="a\n\xe9\n".encode("latin1"))
    assert done.exit_code == 2 and "standard input, line 2: is not UTF-8" in done.output
    for options, message in (
        (("--beam", 0), "beam should be at least 1"),
        (("--length-penalty", -1), "alpha should be"),
    ):
        done = command("translate", trained[0], "a", *options, "--backend", "cpu")
        assert done.exit_code == 2 and message in done.output
    assert (
        "expected source and target with a tab" in command("evaluate", trained[0], write(tmp_path / "x", ["a"])).output
    )


def test_in_the_other_direction_and_in_small_letters(trained, tmp_path):
    pairs = write(tmp_path / "pairs.tsv", list(reversals(60, 2)))
    options = dataclasses.replace(TINY, reverse_direction=True, lowercase=True, epochs=1, tied=False, embedding=9)
    run = prepare("translate", [pairs], tmp_path / "run", options, backend="cpu")
    run.train(progress=False)
    one = load(run.folder, "cpu")
    assert set(one.facts["source"]) == set(one.facts["target"]) == set("abcdefg")
    assert translate(one, ["C B A"])[0].source == ["c", "b", "a"]
    result, _ = TASK.evaluate(one, [pairs])
    assert "case:lc" in result["signature"] and 0 <= result["bleu"] <= 100


# ---- training


@pytest.mark.long
def test_a_killed_run_with_sampling_and_dropout_ends_in_the_same_bits(tmp_path, monkeypatch):
    pairs = write(tmp_path / "pairs.tsv", list(reversals(80, 3)))
    settings = dataclasses.replace(TINY, epochs=2, dropout=0.2, sampling=0.5, sampling_schedule="sigmoid", layers=2)
    prepare("translate", [pairs], tmp_path / "whole", settings, backend="cpu").train(progress=False)
    forward, calls = EncoderDecoder.forward, []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 8:  # in the second epoch, two steps after a checkpoint
            raise RuntimeError("killed")
        return forward(*arguments, **options)

    monkeypatch.setattr(EncoderDecoder, "forward", killed)
    run = prepare("translate", [pairs], tmp_path / "parts", settings, backend="cpu")
    with pytest.raises(RuntimeError, match="killed"):
        run.train(checkpoint_every=3, progress=False)
    resumed = prepare("translate", [], tmp_path / "parts", resume=True)
    resumed.train(progress=False)
    assert resumed.model.calls == 10
    whole, parts = (load_checkpoint(tmp_path / name / "last.json")[0] for name in ("whole", "parts"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)
    settings = dataclasses.replace(settings, sampling=0.0)
    prepare("translate", [pairs], tmp_path / "plain", settings, backend="cpu").train(progress=False)
    plain = load_checkpoint(tmp_path / "plain" / "last.json")[0]
    assert any((plain[name] != array).any() for name, array in whole.items() if name.startswith("model/"))


def test_a_resumed_run_needs_the_same_pairs(tmp_path):
    pairs = write(tmp_path / "pairs.tsv", list(reversals(40, 4)))
    prepare("translate", [pairs], tmp_path / "run", TINY, backend="cpu")
    prepare("translate", [], tmp_path / "run", resume=True)
    write(pairs, list(reversals(40, 5)))
    with pytest.raises(ValueError, match="the data are not those"):
        prepare("translate", [], tmp_path / "run", resume=True)


def twin_of(run):
    """The torch model of a run about to be trained, from the same weights."""
    settings, facts = run.settings, run.data.facts
    sizes = len(facts["source"]) + 4, len(facts["target"]) + 4, settings.hidden
    twin = translation.Twin(*sizes, score=settings.attention, dropout=settings.dropout, tied=settings.tied)
    state = {name: torch.from_numpy(array) for name, array in run.model.state_dict().items()}
    if settings.tied:
        state["output.weight"] = state["target_embedding.weight"]
    twin.to(getattr(torch, settings.dtype)).load_state_dict(state)
    return twin


@pytest.mark.long
@pytest.mark.parametrize("attention, tied", [("general", True), ("additive", False)])
def test_torch_trained_alike_goes_the_same_way(tmp_path, attention, tied):
    """From the same weights, in float64 and without dropout: the same losses and accuracies in every epoch, hence the
    same translations. This is what the comparison of bench/translation.py rests on."""
    pairs = write(tmp_path / "pairs.tsv", list(reversals(150, 6)))
    settings = dataclasses.replace(TINY, epochs=4, dtype="float64", attention=attention, tied=tied)
    run = prepare("translate", [pairs], tmp_path / "run", settings, backend="cpu")
    twin = twin_of(run)
    theirs = translation.train(twin, settings, run.data, lambda line: None)
    ours = run.train(progress=False).epochs
    assert theirs[-1]["train_loss"] < 0.8 * theirs[0]["train_loss"]
    for one, other in zip(ours, theirs, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-8)
        assert one["validation_accuracy"] == other["validation_accuracy"]
    trained = load(run.folder, "cpu")
    both = [TASK.evaluate(trained, [pairs])[0]]
    trained.model.load_state_dict(twin.weights())
    both.append(TASK.evaluate(trained, [pairs])[0])
    assert both[0]["bleu"] == both[1]["bleu"] and both[0]["nats"] == pytest.approx(both[1]["nats"], rel=1e-7)


@pytest.mark.long
def test_the_command_that_trains_with_torch(trained, tmp_path):
    settings = dataclasses.replace(load(trained[0], "cpu").settings, epochs=1)
    prepare("translate", [trained[0].parent / "train.tsv"], tmp_path / "one", settings, backend="cpu")
    done = CliRunner().invoke(translation.main, [str(tmp_path / "one"), str(trained[1]), "--seed", "2"])
    result = json.loads(done.stdout)
    assert result["seed"] == 2 and result["pairs"] == 60 and result["bleu"] >= 0
    settings = dataclasses.replace(settings, sampling=0.5)
    prepare("translate", [trained[0].parent / "train.tsv"], tmp_path / "two", settings, backend="cpu")
    done = CliRunner().invoke(translation.main, [str(tmp_path / "two"), str(trained[1])])
    assert done.exit_code == 2 and "teacher forcing only" in done.output


@pytest.mark.parametrize(
    "first, pairs", [("English,French", 1), ("id,en,fr", 1), ("en,en", 2), ("English,anglais", 2), ("Source,Target", 1)]
)
def test_a_header_names_languages(tmp_path, first, pairs):
    path, wide = tmp_path / "a.csv", first.count(",") > 1
    path.write_text(f"{first}\n{'1,' * wide}Go on.,Va.\n")
    assert read_pairs(path).pairs[-1] == ("Go on.", "Va.") and len(read_pairs(path).pairs) == pairs
