"""Batches of utterances, and how features are prepared for the model."""

import numpy as np

from ... import rng
from ...data import Batch, order_batches, pad
from ...data.vocabulary import Vocabulary
from ...dtypes import check_dtype


class Utterances:
    """A batch source (data/batches.py) of utterances, or of ``strings`` strings of several utterances if that is not 0.

    Features are normalized by the mean and deviation in ``facts``; in training they are also distorted, see
    ``SpeechSettings``. Draws are keyed by (seed, epoch). Targets: (B,) classes; or a list of B arrays of characters, in
    which ``UNKNOWN`` stands for every character that the vocabulary lacks.
    """

    def __init__(self, utterances, settings, facts, strings=0, *, training=False):
        self.settings, self.training, self.seed = settings, training, settings.seed if training else settings.split
        self.dtype = check_dtype(settings.dtype)
        self.made, self.count = strings, strings or len(utterances)
        self.features = [normalized(utterance.features, facts) for utterance in utterances]
        self.lengths = np.array([len(x) for x in self.features])
        self.joint = None
        if "classes" in facts:
            self.targets = known_classes(utterances, facts)
        else:
            vocabulary = Vocabulary(facts["vocabulary"])
            self.targets = [vocabulary.encode(utterance.text).astype(np.int64) for utterance in utterances]
            self.joint = vocabulary.encode(facts["joint"]).astype(np.int64)
        self._last = (None, None)

    def __len__(self):
        return -(-self.count // self.settings.batch)

    def strings(self, epoch):
        """For each sequence of this epoch, the numbers of its utterances: a list of arrays."""
        everyone = len(self.features)
        if not self.made:
            return list(np.arange(everyone)[:, None])
        low, high = self.settings.counts()
        counts = rng.uniform((self.count,), low, high + 1, self.seed, rng.name_key("counts"), epoch, np.float64)
        counts = counts.astype(np.int64)
        rounds = -(-int(counts.sum()) // everyone)  # each round has every utterance once, in another order
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
            return Batch(inputs, np.array(targets), lengths, loss_options={}, weight=weight, per_step=False)
        return Batch(inputs, targets, lengths, weight=weight)

    def _joined(self, targets):
        if self.joint is None:
            return targets[0]
        return np.concatenate([part for target in targets for part in (self.joint, target)][1:])


def normalized(features, facts):
    """(features - mean) / deviation of the training part. Raises ValueError for another number of bands."""
    mean, std = (np.array(facts[name], np.float32) for name in ("mean", "std"))
    if features.shape[1] != len(mean):
        raise ValueError(f"features: expected {len(mean)} bands, as in training, got {features.shape[1]}")
    return (features - mean) / std


def stacked(features, count):
    """``count`` frames at a time side by side: (T, bands) -> (ceil(T / count), count * bands), zeros at the end."""
    T, bands = features.shape
    whole = np.zeros((-(-T // count) * count, bands), features.dtype)
    whole[:T] = features
    return whole.reshape(-1, count * bands)


def distorted(features, settings, draws):
    """Normalized features (T, bands), stretched in time, with some frames and some bands set to 0.

    draws: 5 numbers in [0, 1).
    """
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


def known_classes(utterances, facts):
    """The number of each utterance's class, (B,). Raises ValueError for a class that is not in ``facts``."""
    classes = {name: number for number, name in enumerate(facts["classes"])}
    unknown = sorted({utterance.text for utterance in utterances} - set(classes))
    if unknown:
        raise ValueError(f"the model never saw the class {unknown[0]!r}: it knows {', '.join(classes)}")
    return np.array([classes[utterance.text] for utterance in utterances], np.int64)
