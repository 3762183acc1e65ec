"""How much of the data that a model is evaluated on was also in its training data.

A run remembers what it was trained on by hashes of 8 bytes, so that the data themselves are no longer needed:

>>> facts = {"trained_on": remember(["a good film", "a dull film"])}
>>> seen = look_up(facts, ["a dull film", "a new film", "another one"])
>>> seen.mask.tolist(), seen.sentence("texts")
([True, False, False], 'The model was trained on 1 of these 3 texts')

Of more than ``LIMIT`` things only those of the smallest hashes are remembered. They are a random sample, and so are
those of the smallest hashes among what is looked up: the share of these that was trained on stands for all.
"""

import base64
import binascii
import hashlib
from dataclasses import dataclass

import numpy as np

from ..files import open_regular

LIMIT = 1 << 15  # hashes, which take 350 kB in config.json
_SIZE = 8  # bytes of a hash: among 10^6 things two differing ones have the same with a probability of 10^-7
_PIECE = 1 << 20  # bytes of a file that are hashed at once


@dataclass
class Seen:
    """Which of some things were trained on.

    mask: (N,) bool, True for those that were. judged: (N,) bool, True for those of which it is known; all, unless more
    than ``LIMIT`` were trained on.
    """

    mask: np.ndarray
    judged: np.ndarray

    @property
    def exact(self):
        return bool(self.judged.all())

    @property
    def count(self):
        """How many were trained on; an estimate unless it is known of all, None where it is known of none."""
        judged = int(self.judged.sum())
        return round(int(self.mask.sum()) * len(self.mask) / judged) if judged else None

    def sentence(self, what):
        """What ``count`` is, for people; what: the things, in the plural."""
        count, many = self.count, len(self.mask)
        these = f"these {many:,} {what}" if many != 1 else f"this {what.removesuffix('s')}"
        if count is None:
            return f"It is not known whether the model was trained on {these}"
        if many == 1 or not count and self.exact:
            return f"The model was {'' if count else 'not '}trained on {these if many == 1 else f'any of {these}'}"
        if count == many:
            return f"The model was trained on {'all' if self.exact else 'almost all'} of {these}"
        return f"The model was trained on {'' if self.exact else 'about '}{count:,} of {these}"


def remember(things, facts=None):
    """What a run remembers of ``things`` (texts, or bytes), JSON-ready: for its facts, as ``trained_on``.

    facts: those of the run whose model is trained further, which remember what that run was trained on; None for none.
    """
    hashes = np.unique(_hashes(things))
    before = facts and facts.get("trained_on")
    return _joined(before, hashes) if before else _document(len(hashes), hashes[:LIMIT])


def _document(different, hashes):
    return {"different": different, "hashes": base64.b64encode(hashes.astype("<u8").tobytes()).decode()}


def _joined(before, hashes):
    """What is remembered when ``hashes``, in ascending order, join ``before``: as ``remember`` of all would make it,
    only that the number of different things is an estimate where there are too many."""
    known = _remembered(before)
    union = np.union1d(known, hashes)
    complete = len(known) == before["different"]
    if not complete:  # of larger hashes it is not known whether they were trained on before
        union = union[union <= known[-1]]
    chosen = union[:LIMIT]
    if np.array_equal(chosen, known):
        return before
    if complete:
        return _document(len(union), chosen)
    return _document(max(LIMIT + 1, round(LIMIT / (float(chosen[-1]) / 2.0 ** (8 * _SIZE)))), chosen)


def look_up(facts, things):
    """The ``Seen`` of some things by the facts of a run; None where the run remembers nothing, as those of earlier
    versions do not."""
    if facts.get("trained_on") is None:
        return None
    known = _remembered(facts["trained_on"])
    hashes = _hashes(things)
    complete = len(known) == facts["trained_on"]["different"]
    judged = np.full(len(hashes), True) if complete or not len(known) else hashes <= known[-1]
    return Seen(np.isin(hashes, known) & judged, judged)


def say_seen(facts, things, what):
    """({"trained_on": count}, [the sentence]) of ``look_up``, for ``Task.evaluate``; ({}, []) where it is None."""
    seen = look_up(facts, things)
    return ({}, []) if seen is None else ({"trained_on": seen.count}, [f"{seen.sentence(what)}."])


def check_trained_on(facts):
    """Raise ValueError, TypeError or LookupError unless facts remember nothing, or what ``remember`` makes."""
    if facts.get("trained_on") is not None:
        _remembered(facts["trained_on"])


def file_digest(path):
    """A hash of all bytes of a file, as ``bytes``. Raises what ``open_regular`` raises."""
    digest = hashlib.blake2b(digest_size=32)
    with open_regular(path) as file:
        while data := file.read(_PIECE):
            digest.update(data)
    return digest.digest()


def _hashes(things):
    found = (thing if isinstance(thing, bytes) else thing.encode("utf-8", "surrogatepass") for thing in things)
    data = b"".join(hashlib.blake2b(thing, digest_size=_SIZE).digest() for thing in found)
    return np.frombuffer(data, "<u8")


def _remembered(document):
    """The hashes of a ``remember``, in ascending order."""
    try:
        data = base64.b64decode(document["hashes"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"trained_on: hashes: {error}") from error
    count = document["different"]
    if isinstance(count, bool) or not isinstance(count, int) or len(data) != _SIZE * min(count, LIMIT):
        raise ValueError("trained_on: hashes: their number is not the one of what was trained on")
    return np.frombuffer(data, "<u8")
