"""From features to text: what a trained model hears."""

from pathlib import Path

import numpy as np

from ...ctc import ctc_beam_search, ctc_greedy, ctc_loss
from ...data.vocabulary import Vocabulary
from ...masks import refuse_no_distribution
from .batches import normalised, stacked


def known_rate(trained, file):
    """The sampling rate that the model's features were made at; raises ValueError where it is not known."""
    rate = trained.facts["rate"]
    if rate is None and Path(file).suffix.lower() != ".npz":
        raise ValueError(
            f"{file}: the model was trained on features, and it is not known how they are made from sound: train it "
            "with --rate, and --bands and the other options behind it where they are not the defaults"
        )
    return rate


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
