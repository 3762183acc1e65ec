"""Text into classes: sentiment, topics, names by nationality. ``gpurnn train classify`` on the shell.

>>> from pathlib import Path
>>> from gpurnn.tasks.run import load, prepare
>>> lines = [f"{word} film {n}\\t{label}" for word, label in [("funny", "pos"), ("dull", "neg")] for n in range(20)]
>>> Path("reviews.tsv").write_text("\\n".join(lines), encoding="utf-8") > 0
True
>>> history = prepare("classify", ["reviews.tsv"], "runs/reviews", hidden=8, epochs=2).train()
>>> predict(load("runs/reviews"), ["a funny film", "dull"]).shape                             # (2, V) probabilities
(2, 2)

Words or characters are embedded and read by a recurrent stack, in both directions. Pooling makes one vector of its
states, and a linear layer makes the logits of the classes from it.
"""

from dataclasses import dataclass

import numpy as np

from .. import rng, run_folder
from ..backends import array_ops
from ..data import SequenceBatches, pad
from ..data.labelled import ReadOptions, describe_classes, one_class, read_labelled
from ..data.vocabulary import UNKNOWN, Vocabulary, check_vocabulary, count_words, vocabulary_of
from ..layers import Dropout, Embedding, Linear, Pooling, Sequential
from ..masks import refuse_no_distribution
from .seen import look_up, remember
from .settings import Settings, changed, encoding_setting, recurrent, setting, strict_setting
from .task import Data, Task, check_entries, check_strings, checksum, refuse_one, unknown_note

_FEW_CLASSES = 20  # as many classes may have a text or two each; the error then names one


@dataclass
class ClassifySettings(Settings):
    """The split is stratified: each class is divided in the same shares. It depends on the seed ``split`` alone, so
    that runs with different ``seed`` can be compared.
    """

    text: str | None = setting(
        None, "Column of the texts in a table, by name or number.", shown="found by name or values"
    )
    label: str | None = setting(
        None, "Column of the labels in a table, by name or number.", shown="found by name or values"
    )
    encoding: str | None = encoding_setting()
    strict: bool = strict_setting()
    level: str = setting("words", "Unit that the model reads.", choices=("words", "characters"), of_model=True)
    vocabulary_size: int = setting(
        20000, "At most this many words are in the vocabulary; the others count as unknown.", of_model=True
    )
    embedding: int = setting(32, "Size of a word's or character's vector.", of_model=True)
    bidirectional: bool = setting(True, "Read in both directions.", of_model=True)
    pooling: str = setting(
        "max", "How states become one vector: the last valid one, mean, max or attention.",
        choices=("last", "mean", "max", "attention"), of_model=True,
    )  # fmt: skip
    variational: bool = setting(True, "Drop the same inputs of a text at every timestep.")
    word_dropout: float = setting(
        0.4, "Share of words (not characters) made unknown at random in training.", low=0, high=1, high_open=True
    )
    packed: bool = setting(False, "Put the texts of a batch one behind another, instead of padding them.")
    test: float = setting(0.1, "Share of each class kept for the test.", low=0, high=1, high_open=True)
    split: int = setting(0, "Seed of the split into training, validation and test texts.", minimum=0)
    valid: float = changed(Settings, "valid", 0.1, "Share of each class kept for validation.")
    hidden: int = changed(Settings, "hidden", 32)
    dropout: float = changed(Settings, "dropout", 0.5, "Share of inputs, and of pooled states, dropped.")
    lr: float = changed(Settings, "lr", 2e-3)
    epochs: int = changed(Settings, "epochs", 20)
    patience: int | None = changed(Settings, "patience", 5)

    def __post_init__(self):
        super().__post_init__()
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid:g} and test {self.test:g} leave nothing to train on")


class ClassifyTask(Task):
    """Train a model that sorts texts into classes, on labelled FILEs.

    A FILE may be a table with a text and a label in each row: CSV, tab-separated values or JSON lines. Any other file
    is the texts of one class, one in each line; the class is the file's name without its ending, or the ending alone
    where the names are equal (reviews.pos, reviews.neg). A folder stands for such files in it, or holds a folder for
    each class, with one text in each file.
    """

    name = "classify"
    Settings = ClassifySettings
    watch = ("accuracy", "max")
    examples = """
  gpurnn train classify reviews.csv
  gpurnn train classify reviews.csv --text review --label stars
  gpurnn train classify rt-polarity.pos rt-polarity.neg
  gpurnn train classify names/ --level characters --out runs/names"""
    next = ('gpurnn classify {run} "a text of your own"',)

    def read(self, files, settings, facts=None, scratch=None):
        known = facts
        found = read_examples(files, known and known["classes"], settings)
        examples = list(dict.fromkeys(found.pairs))  # duplicates count once
        classes = known["classes"] if known else sorted({label for _, label in examples})
        if len(classes) < 2:
            raise one_class(files, how_of(settings), classes[0])
        if not known and len(classes) > max(_FEW_CLASSES, len(examples) // 2):
            raise ValueError(
                f"{', '.join(files)}: {len(classes):,} different labels of {len(examples):,} texts, such as "
                f"{classes[0][:40]!r}, are no classes. Which column holds the labels? --label; the texts? --text"
            )
        texts, labels = zip(*examples, strict=True)
        labels = np.array([classes.index(label) for label in labels])
        train, valid, test = split(labels, classes, settings)
        trained_on = [lowered(texts[n], settings) for n in train]
        if known:
            entries = known["vocabulary"]
        elif settings.level == "words":
            entries = count_words(trained_on, settings.vocabulary_size)
        else:
            entries = Vocabulary("".join(trained_on)).entries
            check_entries(files, len(entries), settings, settings.embedding)
        facts = {"classes": classes, "vocabulary": entries, "trained_on": remember((texts[n] for n in train), known)}
        ids, nothing = encode(texts, settings, facts), np.array([UNKNOWN])  # nothing cannot be packed

        def part(chosen, **more):
            if not len(chosen):
                return None
            chosen_ids = [ids[n] if len(ids[n]) or not settings.packed else nothing for n in chosen]
            more |= {"seed": settings.seed, "packed": settings.packed}
            return Labelled(chosen_ids, labels[chosen], settings.batch, **more)

        counts = f"{len(train):,} to train on, {len(valid):,} to validate, {len(test):,} to test"
        return Data(
            part(train, unknown=settings.word_dropout if settings.level == "words" else 0.0),
            part(valid, shuffle=False),
            facts,
            fingerprint={"examples": len(examples), "crc32": checksum(*map("\t".join, examples))},
            summary=f"{len(examples):,} different texts in {len(classes)} classes: {counts}",
            rest=([texts[n] for n in test], labels[test], np.bincount(labels[train]).argmax()),
            notes=(
                *describe_classes(examples),
                *found.notes,
                *(unknown_note(sum(int((ids[n] == UNKNOWN).sum()) for n in train), settings.level) if known else ()),
            ),
        )

    def build(self, settings, facts, backend=None):
        """``Sequential``: ids (T, B) -> logits (B, V)."""
        shared, seeds = {"backend": backend, "dtype": settings.dtype}, settings.seeds()
        directions = 1 + settings.bidirectional
        size = directions * settings.hidden
        drop = settings.dropout
        layers = {
            "embedding": Embedding(
                len(vocabulary_of(facts["vocabulary"])), settings.embedding, std=0.1, seed=next(seeds), **shared
            ),
            "input dropout": Dropout(drop, settings.variational, seed=next(seeds), **shared),
            "recurrent": recurrent(
                settings, settings.embedding, next(seeds), backend, bidirectional=settings.bidirectional
            ),
            "pooling": Pooling(size, settings.pooling, directions, seed=next(seeds), **shared),
            "dropout": Dropout(drop, seed=next(seeds), **shared),
            "linear": Linear(size, len(facts["classes"]), seed=next(seeds), **shared),
        }
        return Sequential(layers)

    def check_facts(self, settings, facts):
        check_strings("classes", facts["classes"])
        check_vocabulary(settings.level, facts["vocabulary"])

    def sizes(self, settings, facts):
        return {"embedding": settings.embedding}

    def uniform_loss(self, settings, facts):
        return float(np.log(len(facts["classes"])))

    def metrics(self, settings, facts):
        return {"accuracy": right_and_all}

    def finish(self, trained, data, history):
        accuracies = [record.get("validation_accuracy") for record in history.epochs]
        texts, labels, commonest = data.rest
        numbers, lines = {}, []
        if data.valid is not None:
            numbers["validation_accuracy"] = round(max(accuracies), 4)
            lines.append(f"Validation accuracy {max(accuracies):.2%} in epoch {1 + accuracies.index(max(accuracies))}.")
        if len(labels):
            found = predict(trained, texts).argmax(axis=1)
            numbers["test_accuracy"] = round(float((found == labels).mean()), 4)
            numbers["test_majority"] = round(float((labels == commonest).mean()), 4)
            numbers["test_examples"] = len(labels)
            lines.append(
                f"Test accuracy {numbers['test_accuracy']:.2%} of {len(labels):,} texts "
                f"({numbers['test_majority']:.2%} by always saying {trained.facts['classes'][commonest]!r})."
            )
        return numbers, "\n".join(lines)

    def evaluate(self, trained, files):
        """Accuracy on labelled files, precision and recall of each class, and the confusion matrix.

        Raises ValueError for a label that the model never saw. The confusion matrix is drawn as ``confusion.png`` in
        the run's folder where Matplotlib is installed.
        """
        classes = trained.facts["classes"]
        examples = read_examples(files, classes, trained.settings)
        texts, labels = zip(*examples.pairs, strict=True)
        truth = np.array([classes.index(label) for label in labels])
        found = predict(trained, texts).argmax(axis=1)
        confusion = np.zeros((len(classes), len(classes)), np.int64)
        np.add.at(confusion, (truth, found), 1)
        right, given, said = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
        rows = {
            name: {"texts": int(given[n]), "recall": _share(right[n], given[n]), "precision": _share(right[n], said[n])}
            for n, name in enumerate(classes)
        }
        numbers = {
            "accuracy": float((truth == found).mean()),
            "texts": len(texts),
            "skipped": examples.skipped,
            "classes": rows,
            "confusion": confusion.tolist(),
            "plot": None,
        }
        width = max(map(len, classes))
        lines = [f"Accuracy  {numbers['accuracy']:.2%} of {len(texts):,} texts"]
        seen = look_up(trained.facts, texts)
        if seen is not None:
            others = seen.judged & ~seen.mask
            numbers["trained_on"] = seen.count
            numbers["accuracy_of_others"] = float((truth == found)[others].mean()) if others.any() else None
            sentence = seen.sentence("texts")
            if seen.count and others.any():
                sentence += f"; accuracy of the other {others.sum():,}: {numbers['accuracy_of_others']:.2%}"
            lines.append(sentence + ".")
        lines.append("")
        lines.append(f"{'class':{width}}   texts  recall  precision")
        for name, row in rows.items():
            recall, precision = ("-" if row[k] is None else f"{row[k]:.1%}" for k in ("recall", "precision"))
            lines.append(f"{name:{width}}{row['texts']:8,}{recall:>8}{precision:>11}")
        lines += ["", *examples.notes] if examples.notes else []
        path = trained.folder / "confusion.png"
        if not run_folder.is_our_file(path):
            return numbers, "\n".join([*lines, "", f"No picture: {path} is not one that gpurnn drew, and stays."])
        from ..plots import plot_confusion

        try:
            plot_confusion(confusion, classes, path, f"Run {path.resolve().parent.name}: confusion matrix")
            numbers["plot"] = str(path)
            lines += ["", f"Confusion matrix: {path}"]
        except ImportError as error:
            lines += ["", f"No confusion.png: {error}"]
        return numbers, "\n".join(lines)


def _share(part, whole):
    return float(part / whole) if whole else None


# ---- reading


def read_examples(files, classes=None, settings=None):
    """The ``Examples`` of labelled files, read as the settings say; classes: the labels there may be, None for any."""
    return read_labelled(files, settings and how_of(settings), classes)


def how_of(settings):
    """How a run of these settings reads its files."""
    return ReadOptions(settings.encoding, settings.text, settings.label, settings.strict)


def split(labels, classes, settings):
    """(training, validation, test) numbers of the examples; each class is divided alike, at least one for each part."""
    parts = ([], [], [])
    shares = (settings.valid, settings.test)
    for number, name in enumerate(classes):
        mine = np.flatnonzero(labels == number)
        if not len(mine):  # a class of the model that the other data do not have
            continue
        order = np.argsort(rng.words(len(mine), settings.split, rng.name_key(f"split {name}")), kind="stable")
        counts = [max(1, round(len(mine) * share)) if share else 0 for share in shares]
        if sum(counts) >= len(mine):
            raise ValueError(
                f"the class {name!r} has too few different texts, {len(mine)}: it needs {counts[0]} to validate, "
                f"{counts[1]} to test and at least 1 to train on"
            )
        cuts = np.cumsum(counts)
        for part, chosen in zip(parts[1:] + parts[:1], np.split(mine[order], cuts), strict=True):
            part.append(chosen)
    return [np.sort(np.concatenate(part)) for part in parts]


def lowered(text, settings):
    """Words are read in lower case, characters as they are."""
    return text.lower() if settings.level == "words" else text


def encode(texts, settings, facts):
    """A list of id arrays, one for each text."""
    vocabulary = vocabulary_of(facts["vocabulary"])
    return [vocabulary.encode(lowered(text, settings)).astype(np.int64) for text in texts]


class Labelled(SequenceBatches):
    """Sequences of ids with one class each; a share ``unknown`` of the ids, another in every epoch, becomes unknown."""

    def __init__(self, inputs, targets, batch_size, *, unknown=0.0, **more):
        super().__init__(inputs, targets, batch_size, per_step=False, **more)
        self.unknown = unknown

    def collate(self, chosen, epoch):
        batch = super().collate(chosen, epoch)
        if self.unknown:
            key = rng.name_key("unknown"), (epoch << 20) + int(chosen[0])  # no two batches of an epoch begin alike
            batch.inputs[~rng.dropout_mask(batch.inputs.shape, self.unknown, self.seed, *key)] = UNKNOWN
        return batch


# ---- measuring


def right_and_all(logits, targets):
    """(how many of the targets have the highest logit, how many there are)."""
    found = array_ops(logits).to_numpy(logits).argmax(axis=1)
    return int((found == targets).sum()), len(targets)


def predict(trained, texts):
    """Probability of each class for each text, (len(texts), V) float64. trained: what ``load`` returns.

    Raises DivergedError where the model's logits are NaN or infinite.
    """
    refuse_one("texts", texts)
    ids = encode(texts, trained.settings, trained.facts)
    model, out = trained.model, np.zeros((len(ids), len(trained.facts["classes"])))
    order = np.argsort([len(x) for x in ids], kind="stable")
    for start in range(0, len(ids), trained.settings.batch):
        chosen = order[start : start + trained.settings.batch]
        lengths = np.array([len(ids[n]) for n in chosen])
        logits, _ = model(model.xp.asarray(pad([ids[n] for n in chosen])), lengths=lengths)
        logits = model.ops.to_numpy(logits).astype(np.float64)
        refuse_no_distribution(logits.max(axis=1))
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        out[chosen] = p / p.sum(axis=1, keepdims=True)
    return out


# ---- the command line


TASK = ClassifyTask()
