"""A language model: read text, train on it, sample from it, measure it. ``gpurnn train text`` on the shell.

>>> from pathlib import Path
>>> from gpurnn.tasks.run import load, prepare
>>> Path("book.txt").write_text("Once upon a time. " * 300, encoding="utf-8")
5400
>>> history = prepare("text", ["book.txt"], "runs/book", hidden=16, epochs=1).train()
>>> trained = load("runs/book")
>>> vocabulary = vocabulary_of(trained.facts["vocabulary"])
>>> len("".join(sample(trained.model, vocabulary, "Once upon", length=200, temperature=0.8)))
200

The model predicts each character, or word, from those before it: embedding, recurrent layers, linear layer, softmax. It
is trained by truncated back-propagation through time: B parts of the text are read side by side, T characters at a
time, and the recurrent state is carried on from each T characters to the next. Where the text is documents, the state
is reset before each of them.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from .. import rng
from ..data import TextBatches
from ..data.encodings import text_files
from ..data.vocabulary import (
    START_OF_TEXT,
    UNKNOWN,
    check_vocabulary,
    read_text,
    saved_vocabulary,
    split,
    vocabulary_of,
)
from ..errors import check_number, check_size
from ..layers import Dropout, Embedding, Linear, Sequential, TiedLinear
from ..losses import cross_entropy
from ..masks import refuse_no_distribution
from ..metrics import accuracy, bits_per_character, perplexity
from .seen import file_digest, remember, say_seen
from .settings import Settings, changed, encoding_setting, recurrent, setting
from .task import Data, Task, check_entries, checksum, unknown_note

BEGINS = {"none": None, "lines": "\n", "files": START_OF_TEXT}  # what stands before a document


@dataclass
class TextSettings(Settings):
    """steps, batch: T and B, the characters or words in a piece, and the pieces that are read side by side. Lengths are
    counted in the unit of ``level``.
    """

    level: str = setting(
        "characters", "Unit that the model reads and writes.", choices=("characters", "words"), of_model=True
    )
    vocabulary_size: int = setting(
        10000, "Size of the vocabulary of words: the commonest ones; the others become <unk>.", of_model=True
    )
    embedding: int | None = setting(
        None, "Size of a character's or word's vector.", shown="--hidden, at most the vocabulary's size", of_model=True
    )
    tied: bool = setting(False, "The output layer shares the embedding's weights.", of_model=True)
    documents: str = setting(
        "none", "Parts of the text that have nothing to do with one another: the state is reset before each.",
        choices=tuple(BEGINS),
    )  # fmt: skip
    steps: int = setting(64, "Sequence length: characters or words that the gradient flows back through.")
    encoding: str | None = encoding_setting()
    valid: float = changed(Settings, "valid", 0.1, "Share of the text, at its end, kept for validation.")

    def __post_init__(self):
        super().__post_init__()
        if self.tied and self.embedding not in (None, self.hidden):
            raise ValueError(f"tied needs an embedding of the hidden size, {self.hidden}, got {self.embedding}")


class TextTask(Task):
    """Train a language model on text FILEs, joined in order. A folder stands for the .txt files in it.

    It learns to predict the next character or word; 'gpurnn sample' then writes text with it. Without a FILE it trains
    on the English help texts that come with Python.
    """

    name = "text"
    Settings = TextSettings
    shows = "sample"
    train_needs_files = False
    examples = """
  gpurnn train text                              about a minute on a laptop
  gpurnn train text book1.txt book2.txt --epochs 10 --out runs/books
  gpurnn train text book.txt --cell gru --layers 2 --dropout 0.2
  gpurnn train text book.txt --level words --tied --dropout 0.5
  gpurnn train text names.txt --documents lines"""
    next = ("gpurnn sample {run} --length 1000",)

    def read(self, files, settings, facts=None, scratch=None):
        known, unit = facts and _known(facts, settings), settings.level
        paths, begins = text_files(files), BEGINS[settings.documents]
        ids, vocabulary = read_text(
            paths, known, scratch, level=unit, size=settings.vocabulary_size, encoding=settings.encoding, begins=begins
        )
        if unit == "characters" and not known:
            V = len(vocabulary)
            width = settings.hidden + (settings.embedding or min(settings.hidden, V))
            check_entries(files, V, settings, width, settings.steps)
        train, valid = _batches(ids, settings, vocabulary.begins)
        opening = "".join(vocabulary.decode(ids[:20]).partition(" ")[: 2 if unit == "characters" else 1])  # a word
        return Data(
            train,
            valid,
            facts={
                "vocabulary": saved_vocabulary(vocabulary),
                "trained_on": remember(map(file_digest, paths), facts) if paths else facts and facts.get("trained_on"),
            },
            fingerprint={unit: len(ids), "crc32": checksum(ids)},
            summary=f"{len(ids):,} {unit}, a vocabulary of {len(vocabulary) - 1:,}",
            rest=opening if begins is None else "",
            notes=unknown_note(_unknown(ids), unit) if known else (),
        )

    def build(self, settings, facts, backend=None):
        """``Sequential`` of embedding, recurrent layers, dropout and linear layer: ids (T, B) -> logits (T, B, V)."""
        V = len(vocabulary_of(facts["vocabulary"]))
        inner, inside = settings.hidden, settings.embedding or min(settings.hidden, V)
        shared, seeds = {"backend": backend, "dtype": settings.dtype}, settings.seeds()
        inside, std = (inner, inner**-0.5) if settings.tied else (inside, 1.0)  # tied: logits of about 1 at first
        embedding = Embedding(V, inside, std=std, seed=next(seeds), **shared)
        layers = {
            "embedding": embedding,
            "recurrent": recurrent(settings, inside, next(seeds), backend, reset_to="initial"),
            "dropout": Dropout(settings.dropout, seed=next(seeds), **shared),
            "linear": TiedLinear(embedding) if settings.tied else Linear(inner, V, seed=next(seeds), **shared),
        }
        if not settings.dropout:
            del layers["dropout"]
        return Sequential(layers)

    def check_facts(self, settings, facts):
        check_vocabulary(settings.level, facts["vocabulary"], BEGINS[settings.documents])

    def sizes(self, settings, facts):
        return {} if settings.tied or not settings.embedding else {"embedding": settings.embedding}

    def uniform_loss(self, settings, facts):
        return float(np.log(len(vocabulary_of(facts["vocabulary"]))))

    def finish(self, trained, data, history):
        vocabulary, opening = vocabulary_of(trained.facts["vocabulary"]), data.rest
        text = "".join([opening, *sample(trained.model, vocabulary, opening, seed=trained.settings.seed)])
        kind = "training" if data.valid is None else "validation"
        loss = min(record["train_loss" if data.valid is None else "validation_loss"] for record in history.epochs)
        nats, bits = round(loss, 4), round(bits_per_character(loss), 4)
        summary = f"Best {kind} loss {nats} nats = {_per(bits, loss, trained.settings)}. A sample:\n\n{text}"
        return {"loss": kind, "nats": nats, "bits": bits, "sample": text}, summary

    def evaluate(self, trained, files):
        """How well the model predicts other text.

        nats, bits, perplexity: mean cross-entropy per character (or word) in nats and in bits, and its exponential;
        accuracy: share of characters that were the likeliest; characters (or words): length of the text, of which all
        but the first are predicted; unknown: how many of them the vocabulary does not have (they count as the unknown
        entry).

        Up to ``settings.batch`` pieces of the text are read side by side, each from a zero state. Where the run has
        documents the state is reset before each, and what begins a document counts as one of the characters.
        Raises what ``read_text`` raises, ValueError for less than two characters.
        """
        result, unit = _measure(trained, files), trained.settings.level
        lines = [
            f"Cross-entropy  {result['nats']:.4f} nats = {result['bits']:.4f} bits per {unit[:-1]}",
            f"Perplexity     {result['perplexity']:.3f}",
            f"Accuracy       {result['accuracy']:.2%} of the next {unit} were the likeliest",
            f"Text           {result[unit]:,} {unit}, {result['unknown']:,} unknown to the model",
        ]
        numbers, seen = say_seen(trained.facts, map(file_digest, text_files(files)), "files")
        if numbers.get("trained_on") and trained.settings.valid:
            seen.append(f"(The last {trained.settings.valid:.0%} of its training text was kept for validation.)")
        return result | numbers, "\n".join(lines + seen)


def _per(bits, nats, settings):
    """A loss in the usual number of its level."""
    return f"perplexity {perplexity(nats):.2f}" if settings.level == "words" else f"{bits} bits per character"


def _known(facts, settings):
    """The vocabulary of a model, with what begins a document in this run; the model's own run may have had others."""
    entries = vocabulary_of(facts["vocabulary"]).entries
    try:
        return vocabulary_of({"entries": entries, "begins": BEGINS[settings.documents]})
    except ValueError:
        raise ValueError(
            f"documents should be 'none', got {settings.documents!r}: {BEGINS[settings.documents]!r}, which stands "
            "before each document, is not in the model's vocabulary. Leave it out, or train a new model"
        ) from None


def _batches(ids, settings, begins):
    """Training and validation batches; the validation part may be read with fewer sequences side by side."""
    batch, steps, valid = settings.batch, settings.steps, settings.valid

    def fits(length):
        train_part, valid_part = split(range(length), valid)
        return len(train_part) > batch * steps and (not valid or len(valid_part) > steps)

    if not fits(len(ids)):
        least = max((batch * steps + 0.5) / (1 - valid), (steps + 0.5) / valid if valid else 0)  # rounding in split
        raise ValueError(
            f"the text is too short: {len(ids)} {settings.level}, a batch of {batch} sequences of {steps} steps needs "
            f"{next(filter(fits, itertools.count(int(least))))} (validation share {valid:g}). Give more text, or a "
            "smaller batch or fewer steps"
        )
    train_ids, valid_ids = split(ids, valid)
    rows = min(batch, (len(valid_ids) - 1) // steps)
    train = TextBatches(train_ids, batch, steps, begins=begins)
    return train, TextBatches(valid_ids, rows, steps, begins=begins) if valid else None


# ---- sampling and measuring


def sample(model, vocabulary, prompt="", length=300, temperature=0.8, top_k=None, top_p=None, seed=None):
    """Iterator over ``length`` characters that the model writes after ``prompt``, one at a time.

    A model of words gives words, each with the space before it where one belongs.

    temperature: logits are divided by it; 0 takes the likeliest character always. top_k: only the k likeliest; top_p:
    only the smallest set of likeliest characters with at least this probability together (Holtzman et al., ICLR 2020),
    after top_k. seed: character n is drawn with a number keyed by (seed, n), whatever the backend.

    A vocabulary with ``begins`` is that of a model of documents. The text then begins as a document does: the initial
    state reads what stands before one, and then the prompt. Where the model writes that again, another document begins.
    Otherwise an empty prompt is taken as a line end.

    Characters of the prompt that the vocabulary does not have count as unknown (``vocabulary.unknown(prompt)`` names
    them); the unknown entry is never drawn. Raises ValueError and TypeError.
    """
    check_size("length", length, minimum=0)
    check_number("temperature", temperature, 0)
    if top_k is not None:
        check_size("top_k", top_k)
    if top_p is not None:
        check_number("top_p", top_p, 0, 1, low_open=True)
    draws = rng.uniform((length,), 0, 1, rng.check_seed(seed), rng.name_key("sample"), dtype=np.float64)
    if vocabulary.begins is None:
        ids = vocabulary.encode(prompt or "\n").tolist()
    else:
        ids = [vocabulary.begins, *vocabulary.encode(prompt).tolist()]
    return _sample(model, vocabulary, ids, draws, temperature, top_k, top_p)


def _sample(model, vocabulary, ids, draws, temperature, top_k, top_p):
    stepper = model.stepper(1)
    waiting, written = ids, list(ids)
    shown = vocabulary.decode(written)
    for draw in draws:
        for index in waiting:
            if index == vocabulary.begins:
                stepper.reset()
            logits = model.ops.to_numpy(stepper.step(model.xp.asarray([index])))[0]
        p = probabilities(logits, temperature, top_k, top_p)
        total = np.cumsum(p)  # in vocabulary order: rounding of the logits hardly moves the borders
        index = min(int(np.searchsorted(total, draw * total[-1], side="right")), int(np.flatnonzero(p)[-1]))
        written.append(index)
        before, shown = shown, vocabulary.decode(written)  # the space before a word depends on what it follows
        yield shown[len(before) :]
        waiting = [index]


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (V,), float64, of drawing each character; see ``sample``. logits (V,); entry 0 gets none.

    Raises ValueError for logits that are NaN or infinite; -inf is one that is never drawn.
    """
    logits = np.array(logits, dtype=np.float64)
    logits[UNKNOWN] = -np.inf
    refuse_no_distribution(logits.max(keepdims=True))
    if temperature == 0:
        return np.eye(1, len(logits), int(logits.argmax()))[0]
    with np.errstate(over="ignore"):  # to -inf at a tiny temperature
        p = np.exp((logits - logits.max()) / temperature)
    likeliest = np.argsort(-logits, kind="stable")  # equal ones in vocabulary order
    if top_k is not None:
        p[likeliest[top_k:]] = 0
    p /= p.sum()
    if top_p is not None and top_p < 1:
        before = np.cumsum(p[likeliest]) - p[likeliest]  # probability of all that are likelier
        p[likeliest[1:][before[1:] >= top_p]] = 0
        p /= p.sum()
    return p


def _measure(trained, files):
    """The numbers of ``TextTask.evaluate``."""
    model, settings = trained.model, trained.settings
    unit = settings.level
    vocabulary = vocabulary_of(trained.facts["vocabulary"])
    ids, _ = read_text(text_files(files), vocabulary, level=unit, encoding=settings.encoding)
    predicted = len(ids) - 1
    if predicted < 1:
        raise ValueError(f"the text is too short: {len(ids)} {unit}, at least 2 are needed")
    B = max(1, min(settings.batch, predicted // settings.steps))
    size = -(-predicted // B)  # of one sequence, the last one may be shorter
    starts = np.arange(B) * size
    nats = right = 0
    state = None
    for t in range(0, size, settings.steps):
        T = min(settings.steps, size - t)
        places = starts + np.arange(t, t + T)[:, None]
        lengths = np.clip(np.minimum(predicted - starts, size) - t, 0, T)
        places = np.minimum(places, predicted - 1)  # past a sequence's end: not read
        inputs, targets = (model.xp.asarray(ids[p].astype(np.int64)) for p in (places, places + 1))
        reset = None if vocabulary.begins is None else inputs == vocabulary.begins
        logits, state = model(inputs, state, lengths, reset=reset)
        nats += float(cross_entropy(logits, targets, lengths=lengths, reduction="sum")[0])
        count = int(lengths.sum())
        right += round(accuracy(logits, targets, lengths=lengths) * count)
    mean = nats / predicted
    return {
        "nats": mean,
        "bits": bits_per_character(mean),
        "perplexity": perplexity(mean),
        "accuracy": right / predicted,
        unit: len(ids),
        "unknown": _unknown(ids),
    }


def _unknown(ids):
    """How many of the ids stand for what the vocabulary does not have; read in parts, as they may lie on disk."""
    parts = range(0, len(ids), 1 << 20)
    return sum(int(np.count_nonzero(ids[start : start + (1 << 20)] == UNKNOWN)) for start in parts)


# ---- the command line


TASK = TextTask()
