"""From features to text: what a trained model hears, and when."""

from pathlib import Path

import numpy as np

from ...ctc import ctc_beam_search, ctc_greedy, ctc_loss
from ...data.vocabulary import Vocabulary
from ...errors import described
from ...files import check_room
from ...masks import refuse_no_distribution
from .batches import normalized, stacked


def known_rate(trained, file):
    """The sampling rate that the model's features were made at; raises ValueError where it is not known."""
    rate = trained.facts["rate"]
    if rate is None and Path(file).suffix.lower() != ".npz":
        raise ValueError(
            f"{file}: the model was trained on features, and it is not known how they are made from sound. Train it "
            "with --rate, and with --bands and the options after it where they are not the defaults"
        )
    return rate


def transcribe(trained, features, beam=None):
    """The text, or the class, that a model finds in an utterance.

    Parameters
    ----------
    trained : Trained
        See ``gpurnn.tasks.trained.load``.
    features : (T, bands) array
        Not normalized.
    beam : int, optional
        Texts that the prefix beam search follows at a time; None for the best path.

    Returns
    -------
    dict
        text; for classes also its probability; for transcripts also log_probability, of the text in nats, and
        posteriors (steps, V), float64, the blank first.

    Raises
    ------
    ValueError
        Where the model was trained on another number of bands.
    DivergedError
        Where its logits are not finite.
    """
    if getattr(features, "ndim", None) != 2:
        raise TypeError(
            f"features: expected an array (T, bands), got {described(features)}. Of a file they are "
            "gpurnn.data.utterances.file_features(path, trained.settings, trained.facts['rate'])[0]"
        )
    model, facts = trained.model, trained.facts
    x = stacked(normalized(features, facts), trained.settings.stack)[:, None]
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


def aligned(posteriors, text, characters):
    """Where in time each character of a text is: the steps at which they are most probable.

    The most probable alignment of text and steps (Viterbi) gives each character a run of steps; its place is the step
    at which its probability is highest in that run.

    Parameters
    ----------
    posteriors : (steps, V) array
        Of ``transcribe``.
    text : str
        Its text, which fits into the steps.
    characters : str
        The vocabulary, without the blank.

    Returns
    -------
    list of int
        A step for each character of ``text``, in order.
    """
    ids = Vocabulary(characters).encode(text).astype(np.int64)
    states = np.zeros(2 * len(ids) + 1, np.int64)  # blank, character, blank, character, ..., blank
    states[1::2] = ids
    check_room("the picture", (len(posteriors) + 40) * len(states), "the alignment of characters and steps")
    leap = np.zeros(len(states), bool)  # into a character from the one before, without a blank between
    leap[3::2] = ids[1:] != ids[:-1]
    with np.errstate(divide="ignore"):
        log = np.log(posteriors)
    score = np.full(len(states), -np.inf)
    score[:2] = log[0, states[:2]]
    moves = np.zeros((len(posteriors), len(states)), np.uint8)
    for step in range(1, len(posteriors)):
        before = np.full((3, len(states)), -np.inf)
        before[0], before[1, 1:] = score, score[:-1]
        before[2, 2:] = np.where(leap[2:], score[:-2], -np.inf)
        moves[step] = before.argmax(axis=0)
        score = before.max(axis=0) + log[step, states]
    state = len(states) - 1 if len(states) == 1 or score[-1] >= score[-2] else len(states) - 2
    places = [0] * len(ids)
    peaks = [-1.0] * len(ids)
    for step in range(len(posteriors) - 1, -1, -1):
        number, rest = divmod(state, 2)
        if rest and posteriors[step, states[state]] >= peaks[number]:
            peaks[number], places[number] = posteriors[step, states[state]], step
        state -= int(moves[step, state])
    return places
