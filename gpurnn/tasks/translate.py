"""Translation: pairs of sentences in, a model that translates out. ``gpurnn train translate`` on the shell.

>>> from pathlib import Path
>>> from gpurnn.tasks.run import load, prepare
>>> lines = [f"{n} cats\\t{n} chats" for n in ("one", "two", "three")] * 10
>>> Path("pairs.tsv").write_text("\\n".join(lines), encoding="utf-8") > 0
True
>>> history = prepare("translate", ["pairs.tsv"], "runs/fra", hidden=8, epochs=1, valid=0.5).train()
>>> found = [translation.text for translation in translate(load("runs/fra"), ["two cats"])]

The model is the encoder-decoder of seq2seq.py, trained by teacher forcing, with scheduled sampling where asked for; the
text is cut into the tokens of tokens.py.
"""

import os
from dataclasses import dataclass
from functools import partial

import numpy as np

from .. import rng
from ..attention import SCORES
from ..backends import array_ops
from ..data import Batch, SequenceBatches, pad
from ..data.pairs import read_pairs
from ..data.tokens import END, START, UNKNOWN, TokenVocabulary, detokenize, tokenize
from ..errors import check_size
from ..losses import cross_entropy
from ..metrics import accuracy, perplexity
from ..seq2seq import SAMPLING, EncoderDecoder, Sampling, beam_search
from ..train import measure
from .seen import remember, say_seen
from .settings import Settings, changed, encoding_setting, setting, strict_setting
from .task import Data, Task, check_entries, check_strings, checksum, refuse_one

_SHOWN = 5  # sentences translated for people after training


@dataclass
class TranslateSettings(Settings):
    """beam, length_penalty: how the trained model is decoded unless a call says otherwise."""

    embedding: int | None = setting(None, "Size of a word's vector.", shown="--hidden", of_model=True)
    attention: str = setting(
        "general",
        "Score of the attention: Luong's dot or general, or Bahdanau's additive.",
        choices=SCORES,
        of_model=True,
    )
    tied: bool = setting(True, "The output layer shares the target words' vectors.", of_model=True)
    label_smoothing: float = setting(0.1, "Share of each target's probability spread over all words.", low=0, high=1)
    sampling: float = setting(
        0.0,
        "Scheduled sampling: share of the words that the decoder reads from its own output by the end of training.",
        low=0,
        high=1,
    )
    sampling_schedule: str = setting("linear", "How that share rises.", choices=SAMPLING)
    reverse_direction: bool = setting(False, "Translate from the second column to the first.", of_model=True)
    lowercase: bool = setting(False, "Read and write in lower case only.", of_model=True)
    min_count: int = setting(2, "Words that occur less often than this are unknown to the model.", of_model=True)
    max_words: int | None = setting(
        None, "At most this many words are in a vocabulary.", shown="no limit", of_model=True
    )
    longest: int = setting(100, "Pairs with more tokens than this on a side are left out.")
    encoding: str | None = encoding_setting()
    strict: bool = strict_setting()
    valid_file: str | None = setting(None, "Pairs for validation.", shown="a share of FILE, see --valid")
    beam: int = setting(5, "Size of the beam when the trained model translates.")
    length_penalty: float = setting(
        0.6, "Exponent of the length penalty that divides the scores; 0 favors short translations.", low=0
    )
    dropout: float = changed(
        Settings, "dropout", 0.3, "Share of embeddings, of the output's inputs and between layers."
    )
    batch: int = changed(Settings, "batch", 64)
    lr: float = changed(Settings, "lr", 2e-3)
    epochs: int = changed(Settings, "epochs", 12)

    def __post_init__(self):
        super().__post_init__()
        if self.hidden % 2:
            raise ValueError(f"hidden should be even, half of it for each direction of the encoder; got {self.hidden}")
        if self.valid_file is not None:
            self.valid_file = os.path.abspath(self.valid_file)


class TranslateTask(Task):
    """Train a translation model on FILEs of lines 'source<TAB>target', or CSV files.

    An encoder reads the source in both directions, a decoder with attention writes the target; 'gpurnn translate' then
    translates new sentences, 'gpurnn evaluate' measures BLEU on a file of pairs.
    """

    name = "translate"
    shows = "translations"
    Settings = TranslateSettings
    examples = """
  gpurnn train translate fra.tsv                 a tenth of it for validation
  gpurnn train translate train.tsv --valid-file valid.tsv --epochs 20
  gpurnn train translate train.tsv --reverse-direction --attention additive"""
    next = ('gpurnn translate {run} "A sentence."', "gpurnn evaluate {run} test.tsv")
    watch = ("accuracy", "max")

    def read(self, files, settings, facts=None, scratch=None):
        pairs, notes = _read(files, settings)
        if settings.valid_file is None:
            train, valid = _split(pairs, settings.valid, settings.seed)
        else:
            train, (valid, more) = pairs, _read([settings.valid_file], settings)
            notes += more
        tokens = [tuple(tokenize(text, settings.lowercase) for text in pair) for pair in train]
        fits = [max(map(len, pair)) <= settings.longest for pair in tokens]
        short = [pair for pair, fit in zip(tokens, fits, strict=True) if fit]
        if not short:
            raise ValueError(f"{', '.join(map(str, files))}: no pair to train on has at most {settings.longest} tokens")
        if facts:
            source, target = TokenVocabulary(facts["source"]), TokenVocabulary(facts["target"])
        else:
            source, target = (
                TokenVocabulary.of(side, settings.min_count, settings.max_words) for side in zip(*short, strict=True)
            )
            if settings.max_words is None:
                steps, inside = max(len(tokens) for _, tokens in short), settings.embedding or settings.hidden
                check_entries(files, len(source), settings, inside)
                check_entries(files, len(target), settings, inside + settings.hidden, steps)
        batches = PairBatches(short, source, target, settings.batch, seed=settings.seed)
        checked = None
        if valid:
            checked = [tuple(tokenize(text, settings.lowercase) for text in pair) for pair in valid]
            checked = PairBatches(checked, source, target, settings.batch, shuffle=False)
        left_out = f", {len(tokens) - len(short):,} too long" if len(short) < len(tokens) else ""
        return Data(
            batches,
            checked,
            facts={
                "source": source.tokens,
                "target": target.tokens,
                "batches": len(batches),
                "trained_on": remember(("\t".join(pair) for pair, fit in zip(train, fits, strict=True) if fit), facts),
            },
            fingerprint={"pairs": len(pairs), "crc32": checksum(*(text for pair in pairs + valid for text in pair))},
            summary=f"{len(short):,} pairs to train on{left_out}, {len(valid):,} for validation, "
            f"{len(source):,} and {len(target):,} words",
            rest=valid,
            notes=tuple(notes),
        )

    def build(self, settings, facts, backend=None):
        """An ``EncoderDecoder`` over the vocabularies of ``facts``."""
        model = EncoderDecoder(
            len(TokenVocabulary(facts["source"])),
            len(TokenVocabulary(facts["target"])),
            settings.hidden,
            embedding=settings.embedding,
            layers=settings.layers,
            cell=settings.cell,
            score=settings.attention,
            dropout=settings.dropout,
            tied=settings.tied,
            backend=backend,
            dtype=settings.dtype,
            seed=settings.seed,
        )
        if settings.sampling:
            calls = settings.epochs * check_size("batches", facts["batches"])
            model.sampling = Sampling(settings.sampling, calls, settings.sampling_schedule)
        return model

    def check_facts(self, settings, facts):
        for name in ("source", "target"):
            check_strings(name, facts[name])

    def sizes(self, settings, facts):
        return {"embedding": settings.embedding or 1}

    def loss(self, settings, facts):
        return partial(cross_entropy, label_smoothing=settings.label_smoothing)

    def metrics(self, settings, facts):
        """accuracy: share of the target's tokens, ends included, that are the likeliest after the true ones before."""
        return {"accuracy": _accuracy}

    def finish(self, trained, data, history):
        numbers, summary = super().finish(trained, data, history)
        if not data.rest:
            return numbers, summary
        right = self.best_record(history)["validation_accuracy"]
        chosen = list(dict(data.rest).items())[:_SHOWN]
        found = translate(trained, [source for source, _ in chosen])
        lines = [
            f"  {source}\n    -> {one.text}   (given: {target})"
            for (source, target), one in zip(chosen, found, strict=True)
        ]
        numbers |= {
            "accuracy": round(right, 6),
            "translations": {s: t.text for (s, _), t in zip(chosen, found, strict=True)},
        }
        return numbers, f"{summary} Accuracy {right:.2%} of tokens. Translations:\n" + "\n".join(lines)

    def evaluate(self, trained, files):
        """BLEU of the translations of all different sources, and how well the given translations are predicted.

        bleu: by sacrebleu, with all translations of a source in the files as its references; signature: sacrebleu's.
        nats, perplexity, accuracy: for each token of the given translations, ends included; unknown: their tokens that
        are not in the vocabulary, counted as the unknown one. Raises ImportError without sacrebleu, and what
        ``read_pairs`` raises.
        """
        settings = trained.settings
        pairs, notes = _read(files, settings)
        score = bleu_scorer(settings.lowercase)
        references = {}
        for source, target in pairs:
            references.setdefault(source, []).append(target)
        texts = [translation.text for translation in translate(trained, list(references))]
        most = max(map(len, references.values()))
        table = [[refs[n] if n < len(refs) else None for refs in references.values()] for n in range(most)]
        bleu = score.corpus_score(texts, table)

        source, target = vocabularies(trained)
        tokens = [tuple(tokenize(text, settings.lowercase) for text in pair) for pair in pairs]
        batches = PairBatches(tokens, source, target, settings.batch, shuffle=False)
        measured = measure(trained.model, cross_entropy, batches, self.metrics(settings, trained.facts))
        unknown = sum(int((ids == UNKNOWN).sum()) for ids in batches.targets)
        numbers = {
            "bleu": bleu.score,
            "signature": str(score.get_signature()),
            "nats": measured["loss"],
            "perplexity": perplexity(measured["loss"]),
            "accuracy": measured["accuracy"],
            "pairs": len(pairs),
            "sentences": len(texts),
            "unknown": unknown,
            "beam": settings.beam,
            "length_penalty": settings.length_penalty,
        }
        orders = ", ".join(f"{precision:.1f}" for precision in bleu.precisions)
        lines = (
            f"BLEU        {bleu.score:.2f} (1 to 4 words: {orders}; brevity penalty {bleu.bp:.3f})",
            f"Signature   {numbers['signature']}",
            f"Decoding    beam {settings.beam}, length penalty {settings.length_penalty:g}",
            f"Perplexity  {numbers['perplexity']:.3f} ({numbers['nats']:.4f} nats) for each token given those before",
            f"Accuracy    {numbers['accuracy']:.2%} of tokens were the likeliest",
            f"Data        {len(pairs):,} pairs, {len(texts):,} different sources, {unknown:,} unknown target tokens",
            *notes,
        )
        seen, sentence = say_seen(trained.facts, map("\t".join, pairs), "pairs")
        return numbers | seen, "\n".join([*lines, *sentence])


def _accuracy(outputs, targets, lengths):
    count = int(np.sum(lengths))
    return round(accuracy(outputs, array_ops(outputs).xp.asarray(targets), lengths=lengths) * count), count


def bleu_scorer(lowercase=False):
    """sacrebleu's ``BLEU`` (Post, WMT 2018) with its defaults. Raises ImportError, with the command, without it."""
    try:
        from sacrebleu import BLEU
    except ImportError as error:
        raise ImportError('BLEU needs sacrebleu. Run: pip install "gpurnn[translate]"') from error
    return BLEU(lowercase=lowercase)


# ---- pairs


def _read(files, settings):
    """(pairs of all files, notes), read as the settings say."""
    found = [read_pairs(file, settings.reverse_direction, settings.encoding, settings.strict) for file in files]
    return [pair for one in found for pair in one.pairs], [note for one in found for note in one.notes]


def _split(pairs, share, seed):
    """(training pairs, validation pairs): ``share`` of the different sources, drawn by seed, with all their pairs."""
    if not share:
        return pairs, []
    sources = list(dict.fromkeys(source for source, _ in pairs))
    count = max(1, round(share * len(sources)))
    if count >= len(sources):
        raise ValueError(f"valid: {len(sources)} different sources are too few to keep a share of {share:g}")
    drawn = np.argsort(rng.words(len(sources), seed, rng.name_key("validation")), kind="stable")
    held_out = {sources[n] for n in drawn[:count]}
    return [pair for pair in pairs if pair[0] not in held_out], [pair for pair in pairs if pair[0] in held_out]


class PairBatches(SequenceBatches):
    """Batches of pairs for an ``EncoderDecoder``: inputs (source (T, B), ``START`` and target (U, B)), targets the
    target with ``END``. Pairs with targets of similar length go together, as the output is the costliest part.

    pairs: (source tokens, target tokens); source, target: ``TokenVocabulary``. The source is encoded leniently.
    """

    def __init__(self, pairs, source, target, batch_size, *, shuffle=True, seed=0):
        self.sources = [source.encode(tokens, lenient=True) for tokens, _ in pairs]
        ids = [target.encode(tokens) for _, tokens in pairs]
        inputs = [np.concatenate([[START], one]) for one in ids]
        targets = [np.concatenate([one, [END]]) for one in ids]
        super().__init__(inputs, targets, batch_size, shuffle=shuffle, seed=seed)

    def collate(self, chosen, epoch):
        sources = [self.sources[n] for n in chosen]
        lengths = np.array([len(ids) for ids in sources], np.int64), self.lengths[chosen]
        inputs = pad(sources), pad([self.inputs[n] for n in chosen])
        targets = pad([self.targets[n] for n in chosen])
        weight = int(lengths[1].sum())
        return Batch(inputs, targets, lengths, loss_options={"lengths": lengths[1]}, weight=weight, per_step=True)


def vocabularies(trained):
    """The ``TokenVocabulary`` of source and target."""
    return TokenVocabulary(trained.facts["source"]), TokenVocabulary(trained.facts["target"])


# ---- translating


@dataclass
class Translation:
    """A translated sentence: text; score: log-probability over the length penalty; source and tokens: what was read and
    written, as tokens; weights (len(tokens) + 1, len(source)): what each token, the end last, read of the source."""

    text: str
    score: float
    source: list
    tokens: list
    weights: np.ndarray


def translate(trained, sentences, beam=None, length_penalty=None):
    """The best ``Translation`` of each sentence; beam, length_penalty: the run's where None, see ``beam_search``.

    Words that the model never saw are read as the unknown one. A sentence without any token gives an empty text.
    """
    refuse_one("sentences", sentences)
    settings, (source, target) = trained.settings, vocabularies(trained)
    beam = settings.beam if beam is None else beam
    alpha = settings.length_penalty if length_penalty is None else length_penalty
    read = [tokenize(sentence, settings.lowercase) for sentence in sentences]
    found = [Translation("", 0.0, [], [], np.zeros((1, 0))) for _ in read]
    order = sorted((n for n in range(len(read)) if read[n]), key=lambda n: len(read[n]))
    for start in range(0, len(order), settings.batch):
        chosen = order[start : start + settings.batch]
        ids = [source.encode(read[n], lenient=True) for n in chosen]
        lengths = np.array([len(one) for one in ids], np.int64)
        searched = beam_search(trained.model, trained.model.xp.asarray(pad(ids)), lengths, beam=beam, alpha=alpha)
        for n, hypotheses in zip(chosen, searched, strict=True):
            best = hypotheses[0]
            tokens = target.decode(best.ids)
            found[n] = Translation(detokenize(tokens), best.score, read[n], tokens, best.weights[:, : len(read[n])])
    return found


TASK = TranslateTask()
