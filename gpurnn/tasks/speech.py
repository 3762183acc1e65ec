"""Speech into text, or into classes: log-mel frames, a bidirectional stack, CTC. ``gpurnn train speech`` on the shell.

>>> from gpurnn.tasks.run import prepare
>>> from gpurnn.tasks.trained import load
>>> frames = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")      # of 20 utterances, in 4 bands
>>> np.savez("words.npz", frames=frames, length=[20] * 20, label=["yes", "no"] * 10)
>>> run = prepare("speech", ["words.npz"], "runs/speech", rate=8000, bands=4, hidden=8, epochs=1)
>>> history = run.train()
>>> heard = transcribe(load("runs/speech"), frames[:20])

The model is that of Amodei et al., "Deep Speech 2", ICML 2016, without its convolutions: recurrent layers in both
directions, with batch normalisation of what goes from one to the next, over all valid steps of a batch; then a linear
layer and CTC (ctc.py), which needs no word of where in time a character is. For classes the states of the last layer
are pooled over time instead.
"""

import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import rng
from ..ctc import ctc_beam_search, ctc_greedy, ctc_loss
from ..data import Batch, order_batches, pad
from ..data.audio import log_mel, read_wav, resample
from ..data.npz import read_npz
from ..data.vocabulary import UNKNOWN, Vocabulary, read_lines
from ..dtypes import check_dtype
from ..errors import FileError, check_number, check_size
from ..files import check_room, naming
from ..layers import BatchNorm, Dropout, Linear, Pooling, Sequential
from ..losses import cross_entropy
from ..masks import refuse_no_distribution
from ..metrics import edit_distance
from ..train import measure
from .classify import right_and_all
from .settings import Settings, changed, recurrent, setting
from .task import Data, Task, check_entries, check_numbers, check_strings, checksum, of_the_model

_log = logging.getLogger("gpurnn")
_NPZ_FACTOR = 6  # how many times the features' size their statistics take in memory
_UTTERANCE_COST = 1000  # bytes of memory for an utterance besides its features


@dataclass
class SpeechSettings(Settings):
    """The features of sound are those of ``log_mel``; one timestep of the model is ``stack`` frames side by side.

    Training utterances are distorted anew in every epoch: stretched in time, and with a stretch of time and a stretch
    of bands set to the mean (Park et al., "SpecAugment", Interspeech 2019).
    """

    target: str = setting(
        "transcript", "What a model is trained to say: the characters, or the whole as one of some classes.",
        choices=("transcript", "class"),
    )  # fmt: skip
    concatenate: str | None = setting(
        None, "Train on strings of this many utterances, such as 1-7, drawn anew in each epoch.", shown="off"
    )
    strings: int = setting(1000, "With --concatenate: strings made of the test utterances.")
    rate: int | None = setting(None, "Sampling rate that sound is brought to.", shown="that of the first file")
    window: float = setting(25.0, "Milliseconds of a frame.", low=0, low_open=True)
    hop: float = setting(10.0, "Milliseconds from one frame to the next.", low=0, low_open=True)
    fft: int | None = setting(None, "Points of the Fourier transform.", shown="the next power of 2")
    bands: int = setting(40, "Bands of the mel scale.")
    fmin: float = setting(60.0, "Lowest frequency, Hz.", low=0)
    fmax: float | None = setting(None, "Highest frequency, Hz.", low=0, low_open=True, shown="half the rate")
    floor: float = setting(1e-6, "Power added before the logarithm.", low=0, low_open=True)
    stack: int = setting(3, "Frames that make one timestep.")
    bidirectional: bool = setting(True, "Read in both directions.")
    normalize: bool = setting(True, "Batch normalisation between the layers.")
    pooling: str = setting(
        "mean", "For classes: how states become one vector.", choices=("last", "mean", "max", "attention")
    )
    stretch: float = setting(0.1, "Utterances are stretched by up to this share.", low=0, high=1, high_open=True)
    mask_time: int = setting(10, "Frames set to the mean at most, and at most a fifth of all.", minimum=0)
    mask_bands: int = setting(8, "Bands set to the mean at most.", minimum=0)
    split: int = setting(0, "Which utterances are for validation: the seed of their choice.", minimum=0)
    layers: int = changed(Settings, "layers", 2)
    hidden: int = changed(Settings, "hidden", 128)
    dropout: float = changed(Settings, "dropout", 0.3, "Share of each layer's outputs dropped.")
    lr: float = changed(Settings, "lr", 3e-3)
    epochs: int = changed(Settings, "epochs", 40)

    def __post_init__(self):
        super().__post_init__()
        counts = self.counts()
        if counts and self.target == "class":
            raise ValueError("concatenate makes strings, which have no class: leave it out, or take target transcript")

    def counts(self):
        """(fewest, most) utterances of a string, or None."""
        if self.concatenate is None:
            return None
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", self.concatenate)
        counts = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= counts[0] <= counts[1]:
            raise ValueError(f"concatenate should be a number, or two such as 1-7, got {self.concatenate!r}")
        return counts

    def strings_of(self, utterances):
        """How many strings use this many utterances once, on average; 0 where none are made."""
        return max(1, round(2 * utterances / sum(self.counts()))) if self.concatenate else 0


class SpeechTask(Task):
    """Train a speech recogniser on FILEs.

    A FILE is a table with the path of a WAV file (seen from the table's folder), a tab and its transcript in each line;
    or an .npz of features: frames (N, bands), the frames of all utterances one after another; length (utterances,);
    label (utterances,); and, where there is a test set, is_test (utterances,). With --target class a transcript is the
    name of a class. With an .npz, --rate and the options behind it say how its features were made, so that the model
    can be used on WAV files.
    """

    name = "speech"
    Settings = SpeechSettings
    examples = """
  gpurnn train speech train.tsv
  gpurnn train speech words.tsv --target class
  gpurnn train speech logmel.npz --concatenate 1-7 --rate 8000 --bands 32"""
    next = ("gpurnn transcribe {run} FILE.wav",)

    def read(self, files, settings, facts=None, scratch=None):
        rate, known = settings.rate, facts
        utterances = []
        for file in files:
            more, rate = read_utterances(file, settings, rate)
            utterances += more
        given = {utterance.features.shape[1] for utterance in utterances}
        if len(given) > 1:
            raise ValueError(f"the files have features of different sizes: {sorted(given)}")
        test = [utterance for utterance in utterances if utterance.is_test]
        rest = [utterance for utterance in utterances if not utterance.is_test]
        joint = " " if any(len(utterance.text) > 1 for utterance in utterances) else ""
        if settings.target == "class":
            facts = {"classes": sorted({utterance.text for utterance in rest})}
            if len(facts["classes"]) < 2:
                raise ValueError(f"there are fewer than two classes to learn: {facts['classes']}")
            _known_classes(test, facts)
        else:
            characters = "".join(utterance.text for utterance in rest)
            if not characters:
                raise ValueError("there is no transcript with any characters to learn")
            strung = settings.counts() and settings.counts()[1] > 1
            facts = {"vocabulary": Vocabulary(characters + (joint if strung else "")).entries, "joint": joint}
            rest = _that_fit(rest, settings)
            steps = max(len(utterance.features) for utterance in utterances) // settings.stack
            width = (1 + settings.bidirectional) * settings.hidden
            check_entries(files, len(facts["vocabulary"]), settings, width, steps)
        order = np.argsort(rng.words(len(rest), settings.split, rng.name_key("split")), kind="stable")
        count = max(1, round(len(rest) * settings.valid)) if settings.valid else 0
        if count >= len(rest):
            raise ValueError(f"too few utterances, {len(rest)}, to keep {count} of them for validation")
        valid, train = ([rest[n] for n in np.sort(part)] for part in np.split(order, [count]))
        frames = np.concatenate([utterance.features for utterance in train]).astype(np.float64)
        mean, std = frames.mean(axis=0), np.maximum(frames.std(axis=0), 1e-3)
        facts |= {"rate": rate, "mean": mean.astype(np.float32).tolist(), "std": std.astype(np.float32).tolist()}
        facts = of_the_model(files, known, facts, ("rate", "mean"), facts.keys() & {"classes", "vocabulary"})
        texts, features = ([getattr(utterance, name) for utterance in utterances] for name in ("text", "features"))
        kind = f"{len(facts['classes'])} classes" if "classes" in facts else f"{len(facts['vocabulary'])} characters"
        return Data(
            Utterances(train, settings, facts, settings.strings_of(len(train)), training=True),
            Utterances(valid, settings, facts, settings.strings_of(len(valid))) if valid else None,
            facts,
            fingerprint={"utterances": len(utterances), "crc32": checksum("\t".join(texts), *features)},
            summary=f"{len(utterances):,} utterances, {kind}: {len(train):,} to train on, {len(valid):,} to validate, "
            f"{len(test):,} to test",
            rest=test,
        )

    def build(self, settings, facts, backend=None):
        """``Sequential``: features (T, B, stack * bands) -> logits, (T, B, V) for transcripts, (B, V) for classes."""
        shared, seeds = {"backend": backend, "dtype": settings.dtype}, settings.seeds()
        size, directions = settings.stack * len(facts["mean"]), 1 + settings.bidirectional
        layers = {}
        for n in range(settings.layers):
            if n and settings.normalize:
                layers[f"norm {n}"] = BatchNorm(size, seed=next(seeds), **shared)
            layers[f"recurrent {n}"] = recurrent(
                replace(settings, layers=1), size, next(seeds), backend, bidirectional=settings.bidirectional
            )
            layers[f"dropout {n}"] = Dropout(settings.dropout, seed=next(seeds), **shared)
            size = directions * settings.hidden
        if settings.target == "class":
            layers["pooling"] = Pooling(size, settings.pooling, directions, seed=next(seeds), **shared)
        layers["linear"] = Linear(size, _outputs(facts), seed=next(seeds), **shared)
        return Sequential(layers)

    def check_facts(self, settings, facts):
        if facts["rate"] is not None:
            check_number("rate", check_size("rate", facts["rate"]), 1, 2**32)
        check_numbers("mean", facts["mean"])
        check_numbers("std", facts["std"], len(facts["mean"]), 0)
        if settings.target == "class":
            check_strings("classes", facts["classes"])
        else:
            check_strings("vocabulary and joint", [facts["vocabulary"], facts["joint"]])

    def sizes(self, settings, facts):
        return {"stack": settings.stack * len(facts["mean"])}

    def loss(self, settings, facts):
        return cross_entropy if settings.target == "class" else known_ctc_loss

    def metrics(self, settings, facts):
        if settings.target == "class":
            return {"error": wrong_classes}
        metrics = {"error": wrong_characters, "utterance_error": wrong_utterances}
        if " " in facts["vocabulary"]:
            metrics["word_error"] = word_errors(Vocabulary(facts["vocabulary"]))
        return metrics

    def finish(self, trained, data, history):
        numbers, lines = {}, []
        if data.valid is not None:
            best = min(history.epochs, key=lambda record: record["validation_loss"])
            numbers["validation_error"] = round(best["validation_error"], 4)
            lines.append(
                f"Validation error {best['validation_error']:.2%} in epoch {best['epoch']}, of the lowest loss."
            )
        if data.rest:
            result, text = self._measure(trained, data.rest)
            numbers["test"] = result
            lines.append(f"Test:\n{text}")
        return numbers, "\n".join(lines)

    def evaluate(self, trained, files):
        """Loss and error rates on other files, of their test utterances alone where they have any; with a model that
        was trained on strings also of ``settings.strings`` strings of them, the same ones every time.

        Characters that the model never saw are errors, and are left out of the loss. Raises ValueError for a class that
        it never saw, and for features that it was not trained on.
        """
        utterances = []
        for file in files:
            utterances += read_utterances(file, trained.settings, known_rate(trained, file))[0]
        return self._measure(trained, [u for u in utterances if u.is_test] or utterances)

    def _measure(self, trained, utterances):
        settings, facts = trained.settings, trained.facts
        numbers, text = self._rates(trained, utterances, 0)
        lines = [text]
        if settings.concatenate:
            numbers["strings"], text = self._rates(trained, utterances, settings.strings)
            lines.append(f"Strings of {settings.concatenate} of them:\n{text}")
        if settings.target == "transcript":
            unknown = Vocabulary(facts["vocabulary"]).unknown("".join(utterance.text for utterance in utterances))
            if unknown:
                numbers["unknown"] = unknown
                lines.append(f"The model never saw {unknown!r}: errors, all of them.")
        return numbers, "\n".join(lines)

    def _rates(self, trained, utterances, strings):
        """(numbers, text for people) of utterances, or of strings of them."""
        settings, facts = trained.settings, trained.facts
        batches = Utterances(utterances, settings, facts, strings)
        found = measure(trained.model, self.loss(settings, facts), batches, self.metrics(settings, facts))
        numbers = {"utterances": strings or len(utterances)} | found
        lines = [f"  {numbers['utterances']:,} utterances, loss {found['loss']:.4f}"]
        if settings.target == "class":
            numbers["accuracy"] = 1 - found["error"]
            lines.append(f"  {numbers['accuracy']:.2%} of the classes are right")
        else:
            lines.append(f"  {found['error']:.2%} of the characters are wrong")
            if "word_error" in found:
                lines.append(f"  {found['word_error']:.2%} of the words are wrong")
            lines.append(f"  {found['utterance_error']:.2%} of the utterances have errors")
        return numbers, "\n".join(lines)


def _outputs(facts):
    """V: the classes, or the characters behind the blank."""
    return len(facts["classes"]) if "classes" in facts else len(Vocabulary(facts["vocabulary"]))


def known_rate(trained, file):
    """The sampling rate that the model's features were made at; raises ValueError where it is not known."""
    rate = trained.facts["rate"]
    if rate is None and Path(file).suffix.lower() != ".npz":
        raise ValueError(
            f"{file}: the model was trained on features, and it is not known how they are made from sound: train it "
            "with --rate, and --bands and the other options behind it where they are not the defaults"
        )
    return rate


# ---- reading


@dataclass
class Utterance:
    """features: (T, bands) float32, T of at least 1, not normalised."""

    features: np.ndarray
    text: str
    is_test: bool = False


def read_utterances(file, settings, rate=None):
    """(list of ``Utterance``, sampling rate) of a table of WAV files or an .npz of features; see ``SpeechTask``.

    rate: what sound is brought to, None for the rate of the first WAV file. Raises ValueError that names the file, and
    in a table the line.
    """
    file = Path(file)
    if file.suffix.lower() == ".npz":
        return _read_features(file, settings, rate), rate
    if file.suffix.lower() == ".wav":
        raise ValueError(f"{file}: give a table, with the path of a WAV file, a tab and its transcript in each line")
    from tqdm import tqdm

    lines = [(n, line) for n, line in enumerate(read_lines(file), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file}: is empty")
    utterances = []
    for n, line in tqdm(lines, desc="reading", unit=" files", leave=False, disable=None):
        path, tab, text = line.partition("\t")
        if not (tab and path.strip()) or "\0" in path:
            raise FileError(f"{file}: line {n} should be a path, a tab and a transcript, got {line[:60]!r}")
        try:
            features, rate = wav_features(file.parent / path.strip(), settings, rate)
        except (ValueError, OSError) as error:
            raise FileError(f"{file}: line {n}: {error}") from error
        utterances.append(Utterance(features, text.strip()))
    return utterances, rate


def wav_features(path, settings, rate=None):
    """(log-mel features (T, bands) of a WAV file, the sampling rate they are of)."""
    samples, given = read_wav(path)
    rate = rate or given
    names = ("window", "hop", "fft", "bands", "fmin", "fmax", "floor")
    options = {name: getattr(settings, name) for name in names}
    with naming([path]):
        return log_mel(resample(samples, given, rate), rate, **options), rate


def _read_features(file, settings, rate):
    found = read_npz(file, {"frames", "length", "label", "is_test"}.__contains__, _NPZ_FACTOR)
    missing = [name for name in ("frames", "length", "label") if name not in found]
    if missing:
        raise ValueError(f"{file}: lacks the arrays {', '.join(missing)}")
    frames, length, label = found["frames"], found["length"], found["label"]
    check_room(file, _UTTERANCE_COST * label.size, f"its {label.size:,} utterances")
    is_test = found.get("is_test", np.zeros(label.shape, bool)).astype(bool)
    if frames.ndim != 2 or frames.dtype.kind != "f":
        raise ValueError(f"{file}: frames should be numbers (N, bands), got {frames.dtype} {frames.shape}")
    if not (length.shape == label.shape == is_test.shape == (label.size,)) or length.dtype.kind not in "iu":
        raise ValueError(
            f"{file}: length, label and is_test should be one for each utterance, got {length.dtype} {length.shape}, "
            f"{label.shape} and {is_test.shape}"
        )
    if not len(length) or length.min() < 1 or length.sum() != len(frames):
        raise ValueError(f"{file}: {len(frames)} frames, but lengths of at least 1 should add up to them")
    if not np.isfinite(frames).all():
        raise ValueError(f"{file}: frames that are not finite")
    if rate is not None and frames.shape[1] != settings.bands:
        raise ValueError(f"{file}: has {frames.shape[1]} bands, where bands is {settings.bands}")
    parts = np.split(frames.astype(np.float32), np.cumsum(length)[:-1])
    return [Utterance(*each) for each in zip(parts, map(str, label.tolist()), is_test.tolist(), strict=True)]


def _that_fit(utterances, settings):
    """Those whose characters fit into their timesteps; says how many do not, raises ValueError where none does."""
    fit = []
    for utterance in utterances:
        text = utterance.text
        needed = len(text) + sum(a == b for a, b in zip(text, text[1:], strict=False))
        if needed <= -(-len(utterance.features) // settings.stack):
            fit.append(utterance)
    if not fit:
        raise ValueError(
            "no transcript fits into its timesteps, one for each character and one more between two equal ones: take a "
            f"smaller hop than {settings.hop:g} or stack fewer frames than {settings.stack}"
        )
    if len(fit) < len(utterances):
        _log.warning(
            "%d of %d utterances are left out: their transcripts have more characters than there are timesteps",
            len(utterances) - len(fit), len(utterances),
        )  # fmt: skip
    return fit


# ---- batches


class Utterances:
    """A batch source (data.py) of utterances, or of ``strings`` of them; 0 for none.

    Features are normalised by the facts' mean and deviation; in training also distorted, see ``SpeechSettings``. What
    is drawn is keyed by (seed, epoch). Targets: (B,) classes; or a list of B arrays of characters, in which ``UNKNOWN``
    stands for all that the vocabulary lacks.
    """

    def __init__(self, utterances, settings, facts, strings=0, *, training=False):
        self.settings, self.training, self.seed = settings, training, settings.seed if training else settings.split
        self.dtype = check_dtype(settings.dtype)
        self.made, self.count = strings, strings or len(utterances)
        self.features = [normalised(utterance.features, facts) for utterance in utterances]
        self.lengths = np.array([len(x) for x in self.features])
        self.joint = None
        if "classes" in facts:
            self.targets = _known_classes(utterances, facts)
        else:
            vocabulary = Vocabulary(facts["vocabulary"])
            self.targets = [vocabulary.encode(utterance.text).astype(np.int64) for utterance in utterances]
            self.joint = vocabulary.encode(facts["joint"]).astype(np.int64)
        self._last = (None, None)

    def __len__(self):
        return -(-self.count // self.settings.batch)

    def strings(self, epoch):
        """The numbers of the utterances that each sequence of this epoch is made of, a list of arrays."""
        everyone = len(self.features)
        if not self.made:
            return list(np.arange(everyone)[:, None])
        low, high = self.settings.counts()
        counts = rng.uniform((self.count,), low, high + 1, self.seed, rng.name_key("counts"), epoch, np.float64)
        counts = counts.astype(np.int64)
        rounds = -(-int(counts.sum()) // everyone)  # everyone once, in another order each time
        drawn = rng.words(rounds * everyone, self.seed, rng.name_key("strings"), epoch).reshape(rounds, everyone)
        chosen = np.argsort(drawn, axis=1, kind="stable").reshape(-1)
        return np.split(chosen[: counts.sum()], np.cumsum(counts)[:-1])

    def batch(self, epoch, index):
        if not 0 <= index < len(self):
            raise IndexError(f"index: this source has batches 0 to {len(self) - 1}, got {index}")
        if self._last[0] != epoch:
            strings = self.strings(epoch)
            lengths = np.array([self.lengths[string].sum() for string in strings])
            order = order_batches(lengths, self.settings.batch, self.seed, epoch, shuffle=self.training)
            starts = np.cumsum([0, *map(len, strings)])  # of each string among all places
            draws = rng.uniform((starts[-1], 5), 0, 1, self.seed, rng.name_key("distortions"), epoch, np.float64)
            self._last = epoch, (strings, order, starts, draws)
        strings, order, starts, draws = self._last[1]
        inputs, targets = [], []
        for n in order[index]:
            parts = [self.features[utterance] for utterance in strings[n]]
            if self.training:
                parts = [distorted(x, self.settings, draws[starts[n] + place]) for place, x in enumerate(parts)]
            inputs.append(stacked(np.concatenate(parts), self.settings.stack))
            targets.append(self._joined([self.targets[utterance] for utterance in strings[n]]))
        lengths, weight = np.array([len(x) for x in inputs]), len(inputs)
        inputs = pad(inputs).astype(self.dtype, copy=False)
        if self.joint is None:
            return Batch(inputs, np.array(targets), lengths, loss_options={}, weight=weight)
        return Batch(inputs, targets, lengths, weight=weight)

    def _joined(self, targets):
        if self.joint is None:
            return targets[0]
        return np.concatenate([part for target in targets for part in (self.joint, target)][1:])


def normalised(features, facts):
    """(features - mean) / deviation of the training part's frames. Raises ValueError for another number of bands."""
    mean, std = (np.array(facts[name], np.float32) for name in ("mean", "std"))
    if features.shape[1] != len(mean):
        raise ValueError(f"features of {features.shape[1]} bands, the model was trained on {len(mean)}")
    return (features - mean) / std


def stacked(features, count):
    """Frames (T, bands) side by side, ``count`` at a time: (ceil(T / count), count * bands), zeros at the end."""
    T, bands = features.shape
    whole = np.zeros((-(-T // count) * count, bands), features.dtype)
    whole[:T] = features
    return whole.reshape(-1, count * bands)


def distorted(features, settings, draws):
    """Normalised features (T, bands) with another length and two stretches of zeros; draws: 5 numbers in [0, 1)."""
    T, bands = features.shape
    wanted = max(1, round(T * (1 + settings.stretch * (2 * draws[0] - 1))))
    place = np.linspace(0, T - 1, wanted)
    left = np.minimum(place.astype(np.int64), max(T - 2, 0))
    share = (place - left)[:, None].astype(np.float32)
    features = features[left] * (1 - share) + features[np.minimum(left + 1, T - 1)] * share
    width = int(draws[1] * (min(settings.mask_time, wanted // 5) + 1))
    start = int(draws[2] * (wanted - width + 1))
    features[start : start + width] = 0
    width = int(draws[3] * (min(settings.mask_bands, bands - 1) + 1))
    start = int(draws[4] * (bands - width + 1))
    features[:, start : start + width] = 0
    return features


def _known_classes(utterances, facts):
    """The number of each utterance's class, (B,). Raises ValueError for one that there is not."""
    classes = {name: number for number, name in enumerate(facts["classes"])}
    unknown = sorted({utterance.text for utterance in utterances} - set(classes))
    if unknown:
        raise ValueError(f"a class that the model never saw, {unknown[0]!r}: it knows {', '.join(classes)}")
    return np.array([classes[utterance.text] for utterance in utterances], np.int64)


# ---- loss and metrics: of (outputs, targets, lengths), as ``fit`` and ``measure`` call them


def known_ctc_loss(logits, targets, *, lengths):
    """CTC of the targets without their unknown characters; what does not fit counts as 0."""
    return ctc_loss(logits, [target[target != UNKNOWN] for target in targets], lengths=lengths, zero_infinity=True)


def wrong_classes(logits, targets):
    right, count = right_and_all(logits, targets)
    return count - right, count


def wrong_characters(logits, targets, *, lengths):
    found = ctc_greedy(logits, lengths=lengths)
    return sum(map(edit_distance, found, (target.tolist() for target in targets))), sum(map(len, targets))


def wrong_utterances(logits, targets, *, lengths):
    found = ctc_greedy(logits, lengths=lengths)
    return sum(a != b.tolist() for a, b in zip(found, targets, strict=True)), len(targets)


def word_errors(vocabulary):
    """The metric of words, which spaces part; characters that the vocabulary lacks make a word wrong."""

    def wrong_words(logits, targets, *, lengths):
        said, meant = (
            [vocabulary.decode(ids).split() for ids in many] for many in (ctc_greedy(logits, lengths=lengths), targets)
        )
        return sum(map(edit_distance, said, meant)), sum(map(len, meant))

    return wrong_words


# ---- use


def transcribe(trained, features, beam=None):
    """What the model hears in features (T, bands), not normalised: a dict.

    text; for classes also probability; for transcripts log_probability, of the text in nats, and posteriors (steps, V),
    float64, with the blank in front. beam: of the prefix beam search; None for the best path.
    """
    model, facts = trained.model, trained.facts
    x = stacked(normalised(features, facts), trained.settings.stack)[:, None]
    logits, _ = model(model.xp.asarray(x.astype(model.dtype)), lengths=[len(x)])
    logits = model.ops.to_numpy(logits).astype(np.float64)
    refuse_no_distribution(logits.max(axis=-1))
    p = np.exp(logits - logits.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    if "classes" in facts:
        return {"text": facts["classes"][p[0].argmax()], "probability": float(p[0].max())}
    ids = ctc_beam_search(logits, beam)[0][0][0] if beam else ctc_greedy(logits)[0]
    loss, _ = ctc_loss(logits, [ids], reduction="sum")
    text = Vocabulary(facts["vocabulary"]).decode(ids)
    return {"text": text, "log_probability": -float(loss), "posteriors": p[:, 0]}


def plot_transcription(features, found, trained, png):
    """Draw features (T, bands) and above each moment how probable each character is; found: of ``transcribe``."""
    from ..plots import new_figure, plain, save_figure

    settings, posteriors = trained.settings, found["posteriors"]
    frames = len(posteriors) * settings.stack  # the last step may reach past the end
    seconds = frames * settings.hop / 1000
    figure = new_figure(max(6, min(16, 3 * seconds)), 5)
    above, below = figure.subplots(2, 1, sharex=True)
    times = (np.arange(len(posteriors)) + 0.5) * seconds / len(posteriors)
    for number, character in enumerate("\N{EMPTY SET}" + trained.facts["vocabulary"]):
        line = posteriors[:, number]
        shown = {"color": "0.75", "ls": ":"} if number == UNKNOWN else {}
        above.plot(times, line, lw=1.5, **shown)
        peaks = np.flatnonzero((line > 0.5) & (line >= np.roll(line, 1)) & (line > np.roll(line, -1)))
        for step in peaks if number != UNKNOWN else ():
            above.annotate(plain(character), (times[step], line[step]), ha="center", va="bottom")
    above.set_ylim(0, 1.15)
    above.set_ylabel("probability (dotted: blank)")
    above.set_title(plain(found["text"]))
    extent = (0, len(features) * settings.hop / 1000, 0, features.shape[1])
    below.imshow(features.T, origin="lower", aspect="auto", extent=extent)
    below.set_xlim(0, seconds)
    below.set_ylabel("mel band")
    below.set_xlabel("seconds")
    save_figure(figure, png)


TASK = SpeechTask()
