"""Speech into text, or into classes: log-mel frames, a bidirectional stack, CTC. ``gpurnn train speech`` on the shell.

>>> from gpurnn.tasks.run import prepare
>>> from gpurnn.tasks.trained import load
>>> frames = np.random.default_rng(0).normal(size=(400, 4)).astype("float32")      # of 20 utterances, in 4 bands
>>> np.savez("words.npz", frames=frames, length=[20] * 20, label=["yes", "no"] * 10)
>>> run = prepare("speech", ["words.npz"], "runs/speech", rate=8000, bands=4, hidden=8, epochs=1)
>>> history = run.train()
>>> heard = transcribe(load("runs/speech"), frames[:20])

The model is that of Amodei et al., "Deep Speech 2", ICML 2016, without its convolutions: recurrent layers in both
directions, then a linear layer and CTC (ctc.py), which does not need to know where in time a character is. Between the
recurrent layers there is batch normalization over all valid steps of a batch. For classes the states of the last layer
are pooled over time instead.
"""

import logging
import re
from dataclasses import dataclass, replace

import numpy as np

from ... import rng
from ...data.utterances import read_utterances
from ...data.vocabulary import Vocabulary
from ...errors import check_number, check_size
from ...layers import BatchNorm, Dropout, Linear, Pooling, Sequential
from ...losses import cross_entropy
from ...train import measure
from ..seen import remember, say_seen
from ..settings import Settings, changed, encoding_setting, recurrent, setting
from ..task import Data, Task, check_entries, check_numbers, check_strings, checksum, facts_for_model
from .batches import Utterances, known_classes
from .decode import known_rate, transcribe
from .metrics import known_ctc_loss, word_errors, wrong_characters, wrong_classes, wrong_utterances

__all__ = ["TASK", "SpeechSettings", "SpeechTask", "Utterances", "read_utterances", "transcribe"]

_log = logging.getLogger("gpurnn")
_NOTHING = "A model that writes nothing does as well: train it longer, or on more utterances."


@dataclass
class SpeechSettings(Settings):
    """The features of sound are those of ``log_mel``; one timestep of the model is ``stack`` frames side by side.

    Training utterances are distorted differently in every epoch. They are stretched in time, and some consecutive
    frames and some neighboring bands are set to the mean (Park et al., "SpecAugment", Interspeech 2019).
    """

    target: str = setting(
        "transcript", "What the model learns: to write characters, or to name the class of a whole utterance.",
        choices=("transcript", "class"), of_model=True,
    )  # fmt: skip
    encoding: str | None = encoding_setting()
    concatenate: str | None = setting(
        None, "Train on strings of this many utterances, such as 1-7; each epoch draws new ones.", shown="off"
    )
    strings: int = setting(1000, "With --concatenate: how many strings are made of the test utterances.")
    rate: int | None = setting(
        None, "Sampling rate in Hz; sound of another rate is resampled.", shown="that of the first file", of_model=True
    )
    window: float = setting(25.0, "Length of a frame, ms.", low=0, low_open=True, of_model=True)
    hop: float = setting(10.0, "Time from one frame to the next, ms.", low=0, low_open=True, of_model=True)
    fft: int | None = setting(None, "Points of the Fourier transform.", shown="the next power of 2", of_model=True)
    bands: int = setting(40, "Bands of the mel scale.", of_model=True)
    fmin: float = setting(60.0, "Lowest frequency, Hz.", low=0, of_model=True)
    fmax: float | None = setting(
        None, "Highest frequency, Hz.", low=0, low_open=True, shown="half the rate", of_model=True
    )
    floor: float = setting(1e-6, "Power added before the logarithm.", low=0, low_open=True, of_model=True)
    stack: int = setting(3, "Frames that make one timestep.", of_model=True)
    bidirectional: bool = setting(True, "Read in both directions.", of_model=True)
    normalize: bool = setting(True, "Batch normalization between the layers.", of_model=True)
    pooling: str = setting(
        "mean",
        "For classes: how states become one vector.",
        choices=("last", "mean", "max", "attention"),
        of_model=True,
    )
    stretch: float = setting(0.1, "Largest stretch of an utterance in time, as a share.", low=0, high=1, high_open=True)
    mask_time: int = setting(
        10, "At most this many frames are set to the mean; never more than a fifth of all.", minimum=0
    )
    mask_bands: int = setting(8, "At most this many bands are set to the mean.", minimum=0)
    strict: bool = setting(False, "Refuse a table with a bad line or sound file, instead of skipping it.")
    split: int = setting(0, "Seed of the choice of utterances for validation.", minimum=0)
    layers: int = changed(Settings, "layers", 2)
    hidden: int = changed(Settings, "hidden", 128)
    dropout: float = changed(Settings, "dropout", 0.3, "Share of each layer's outputs dropped.")
    lr: float = changed(Settings, "lr", 3e-3)
    epochs: int = changed(Settings, "epochs", 40)

    def __post_init__(self):
        super().__post_init__()
        counts = self.counts()
        if counts and self.target == "class":
            raise ValueError(
                "concatenate makes strings, which have no class: leave it out, or set target to transcript"
            )

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
    """Train a speech recognizer on FILEs.

    A FILE is a table: each line has the path of a sound file (relative to the table's folder), a tab
    (in a .csv file a comma) and its transcript. With --target class the transcript is the name of a class. Sound is
    WAV, or FLAC, OGG or MP3, which need soundfile (pip install "gpurnn[audio]"). A bad line or sound file is skipped
    and counted, unless --strict is given.

    Or a FILE is an .npz of features: frames (N, bands), the frames of all utterances one after another; length
    (utterances,); label (utterances,); and, if there is a test set, is_test (utterances,). Then --rate and the options
    after it say how the features were made, so that the model can be used on sound.
    """

    name = "speech"
    Settings = SpeechSettings
    examples = """
  gpurnn train speech train.tsv
  gpurnn train speech words.tsv --target class
  gpurnn train speech logmel.npz --concatenate 1-7 --rate 8000 --bands 32"""
    next = ("gpurnn transcribe {run} FILE.wav",)

    def read(self, files, settings, facts=None, scratch=None):
        rate, known = settings.rate or (facts and facts["rate"]), facts
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
                raise ValueError(f"expected at least two classes to learn, got {facts['classes']}")
            known_classes(test, facts)
        else:
            characters = "".join(utterance.text for utterance in rest)
            if not characters:
                raise ValueError("expected transcripts with characters to learn, but all of them are empty")
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
        facts = facts_for_model(files, known, facts, ("rate", "mean"), facts.keys() & {"classes", "vocabulary"})
        facts = facts | {"trained_on": remember((utterance.digest for utterance in train), known)}
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
            best, what = self.best_record(history), "classes" if trained.settings.target == "class" else "characters"
            numbers["validation_error"] = round(best["validation_error"], 4)
            lines.append(
                f"Kept: epoch {best['epoch']}. Validation loss {best['validation_loss']:.4f}, "
                f"{best['validation_error']:.2%} of the {what} are wrong."
            )
            lines += [_NOTHING] if what == "characters" and best["validation_error"] >= 1 else []
        if data.rest:
            result, text = self._measure(trained, data.rest)
            numbers["test"] = result
            lines.append(f"Test:\n{text}")
        return numbers, "\n".join(lines)

    def evaluate(self, trained, files):
        """Loss and error rates on other files, or on their test utterances alone if they have any.

        A model that was trained on strings is also measured on ``settings.strings`` strings of them, the same every
        time. Characters that the model never saw count as errors and are left out of the loss. Raises ValueError for a
        class that it never saw, and for features of another size.
        """
        utterances = []
        for file in files:
            utterances += read_utterances(file, trained.settings, known_rate(trained, file))[0]
        utterances = [u for u in utterances if u.is_test] or utterances
        numbers, text = self._measure(trained, utterances)
        seen, sentence = say_seen(trained.facts, (utterance.digest for utterance in utterances), "utterances")
        return numbers | seen, "\n".join([text, *sentence])

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
                lines.append(f"The model never saw the characters {unknown!r}: each of them counts as an error.")
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
            texts = [utterance.text for utterance in utterances]
            commonest = max(sorted(set(texts)), key=texts.count)
            numbers["majority"] = texts.count(commonest) / len(texts)
            lines.append(
                f"  {numbers['accuracy']:.2%} of the classes are right; always {commonest!r}: {numbers['majority']:.2%}"
            )
        else:
            lines.append(f"  {found['error']:.2%} of the characters are wrong")
            if "word_error" in found:
                lines.append(f"  {found['word_error']:.2%} of the words are wrong")
            lines.append(f"  {found['utterance_error']:.2%} of the utterances have errors")
            lines += [f"  {_NOTHING}"] if found["error"] >= 1 else []
        return numbers, "\n".join(lines)


def _outputs(facts):
    """V: the number of classes, or of characters and the blank."""
    return len(facts["classes"]) if "classes" in facts else len(Vocabulary(facts["vocabulary"]))


def _that_fit(utterances, settings):
    """The utterances whose characters fit into their timesteps. Warns of the others; raises ValueError if none fits."""
    fit = []
    for utterance in utterances:
        text = utterance.text
        needed = len(text) + sum(a == b for a, b in zip(text, text[1:], strict=False))
        if needed <= -(-len(utterance.features) // settings.stack):
            fit.append(utterance)
    if not fit:
        raise ValueError(
            "no transcript fits into its timesteps: each character takes one, and two equal in a row one more. Set "
            f"hop below {settings.hop:g} or stack below {settings.stack}"
        )
    if len(fit) < len(utterances):
        _log.warning(
            "%d of %d utterances are left out: their transcripts have more characters than there are timesteps",
            len(utterances) - len(fit), len(utterances),
        )  # fmt: skip
    return fit


TASK = SpeechTask()
