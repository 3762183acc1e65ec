"""Music as piano rolls: read it, learn to predict the next frame, compose. ``gpurnn train music`` on the shell.

>>> from pathlib import Path
>>> from gpurnn.data.midi import write_midi
>>> from gpurnn.tasks.run import prepare
>>> from gpurnn.tasks.trained import load
>>> Path("scales.json").write_text(str([[[60, 64, 67], [62, 65, 69], []]] * 20), encoding="utf-8")    # 20 pieces
680
>>> history = prepare("music", ["scales.json"], "runs/scales", cell="gru", hidden=8, epochs=1).train()
>>> roll = compose(load("runs/scales").model, steps=64, voices=4, seed=1)
>>> roll.shape
(64, 88)
>>> write_midi("scale.mid", roll, step=1.0)

A roll is an array (T, 88) of 0 and 1. Column k is the piano's key k, MIDI number 21 + k. A row is a frame: the keys
that sound during one step. The model predicts each frame from those before it, and the first from an empty one. It has
recurrent layers, a linear layer and a sigmoid for each key. The loss of a frame is the sum of its 88 binary
cross-entropies; that of a piece is the mean over its frames (Boulanger-Lewandowski, Bengio, Vincent, "Modeling temporal
dependencies in high-dimensional sequences", ICML 2012; Chung, Gulcehre, Cho, Bengio, arXiv:1412.3555).

ABC tunes are text: ``gpurnn train text tunes.abc`` learns them, and ``gpurnn compose`` writes whole ones.
"""

import re
from dataclasses import dataclass

import numpy as np

from .. import rng
from ..data import Batch, SequenceBatches, pad
from ..data.midi import FRAME_COST, KEYS
from ..data.rolls import SPLITS, read_parts
from ..dtypes import check_dtype
from ..errors import ShapeError, check_number, check_size
from ..files import check_room, max_memory
from ..layers import Dropout, Linear, Sequential
from ..losses import binary_cross_entropy_with_logits
from ..masks import refuse_no_distribution
from .seen import remember, say_seen
from .settings import Settings, changed, recurrent, setting
from .task import Data, Task, check_numbers, checksum
from .text import sample


@dataclass
class MusicSettings(Settings):
    cell: str = changed(Settings, "cell", "gru")
    hidden: int = changed(Settings, "hidden", 64)
    dropout: float = changed(Settings, "dropout", 0.0, "Share of each recurrent layer's outputs dropped.")
    batch: int = changed(Settings, "batch", 8, "Pieces in a batch.")
    lr: float = changed(Settings, "lr", 3e-3)
    epochs: int = changed(Settings, "epochs", 60)
    valid: float = changed(
        Settings, "valid", 0.1, "Share of the pieces kept for validation, where the files name no validation part."
    )
    weight_noise: float = changed(Settings, "weight_noise", 0.075)
    transpose: int = setting(0, "Shift each piece by up to this many semitones, differently in every epoch.", minimum=0)
    strict: bool = setting(
        False, "Refuse a bad file among several, and notes that no piano has, instead of skipping them."
    )
    step: float = setting(1.0, "Length of a frame in quarter notes.", low=0, low_open=True)


class MusicTask(Task):
    """Train a model of polyphonic music on FILEs: piano rolls or MIDI.

    It learns to predict the keys that sound next; 'gpurnn compose' then writes music with it. A FILE is one of these:
    MIDI (.mid), one piece; JSON, a list of pieces, each a list of frames, each a list of MIDI numbers, or such lists
    under "train", "valid" and "test"; .npz with {split}_roll (frames, 88) and {split}_length; a folder of such files.
    A bad file among several, and a note that no piano has, are skipped and counted, unless --strict is given. For ABC
    tunes use 'gpurnn train text'.
    """

    name = "music"
    Settings = MusicSettings
    examples = """
  gpurnn train music chorales.json --hidden 46
  gpurnn train music *.mid --step 0.25 --transpose 5        sixteenth notes
  gpurnn train music rolls.npz --cell lstm --hidden 220 --dropout 0.3"""
    next = ("gpurnn compose {run} --steps 128 --out tune.mid",)

    def read(self, files, settings, facts=None, scratch=None):
        parts = read_parts(files, settings.step, settings.strict)
        if not parts["valid"] and settings.valid:
            every = max(2, round(1 / settings.valid))  # one piece in this many is for validation
            if len(parts["train"]) < every:
                raise ValueError(
                    f"{len(parts['train'])} pieces are too few to keep a share of {settings.valid:g} for validation: "
                    "give more pieces, or set valid to 0"
                )
            whole, parts["valid"] = parts["train"], parts["train"][every - 1 :: every]
            parts["train"] = [piece for n, piece in enumerate(whole) if n % every != every - 1]
        if not parts["train"]:
            raise ValueError(f"{', '.join(files)}: no pieces to train on")
        _check_batches(files, parts["train"] + parts["valid"], settings.batch)
        source = {"batch_size": settings.batch, "dtype": settings.dtype}
        valid = parts["valid"] and settings.valid
        pieces = " / ".join(f"{len(parts[name]):,}" for name in SPLITS)
        frames = " / ".join(f"{sum(map(len, parts[name])):,}" for name in SPLITS)
        return Data(
            RollBatches(parts["train"], transpose=settings.transpose, seed=settings.seed, **source),
            RollBatches(parts["valid"], shuffle=False, **source) if valid else None,
            facts={"keys": key_statistics(parts["train"]), "trained_on": remember(map(bytes, parts["train"]), facts)},
            fingerprint={name: checksum(*parts[name]) for name in SPLITS},
            summary=f"{pieces} pieces, {frames} frames (to train on, validate, test)",
            rest=parts,
        )

    def check_facts(self, settings, facts):
        for name in ("often", "kept", "struck"):
            check_numbers(name, facts["keys"][name], KEYS, 0, 1)

    def build(self, settings, facts, backend=None):
        """``Sequential`` of recurrent layers, dropout and linear layer: rolls (T, B, 88) -> logits (T, B, 88).

        The linear layer's bias begins at each key's log odds in the training pieces.
        """
        shared, seeds = {"backend": backend, "dtype": settings.dtype}, settings.seeds()
        layers = {
            "recurrent": recurrent(settings, KEYS, next(seeds), backend),
            "dropout": Dropout(settings.dropout, seed=next(seeds), **shared),
            "linear": Linear(settings.hidden, KEYS, seed=next(seeds), **shared),
        }
        if not settings.dropout:
            del layers["dropout"]
        model = Sequential(layers)
        often = np.array(facts["keys"]["often"])
        layers["linear"].params["bias"][...] = model.xp.asarray(np.log(often / (1 - often)))
        return model

    def loss(self, settings, facts):
        return frame_loss

    def finish(self, trained, data, history):
        numbers, lines = {}, []
        for name in ("valid", "test"):
            if data.rest[name]:
                numbers[name] = score(trained.model, data.rest[name], trained.facts["keys"])
                lines.append(_summary(numbers[name], "validation" if name == "valid" else name))
        return numbers, "\n".join(lines)

    def evaluate(self, trained, files):
        """How well the model predicts other music: the test part of the files if they name one, else all of it."""
        parts = read_parts(files, trained.settings.step, trained.settings.strict)
        pieces = parts["test"] or [piece for name in SPLITS for piece in parts[name]]
        numbers = score(trained.model, pieces, trained.facts["keys"])
        seen, sentence = say_seen(trained.facts, map(bytes, pieces), "pieces")
        return numbers | seen, "\n".join([_summary(numbers, "test" if parts["test"] else "all"), *sentence])


def _check_batches(files, pieces, batch):
    """Raise FileError if one piece is so long that a batch with it would take too much memory."""
    longest = max(map(len, pieces))
    needed = FRAME_COST * longest * min(batch, len(pieces))
    check_room(", ".join(map(str, files)), needed, f"a batch with a piece of {longest:,} frames")


def _summary(numbers, part):
    return (
        f"{part.capitalize():<11} {numbers['nll']:.4f} nats per frame ({numbers['nll_after_first']:.4f} without each "
        f"piece's first; mean of the pieces {numbers['nll_per_piece']:.4f}); {numbers['pieces']:,} pieces, "
        f"{numbers['frames']:,} frames\n{'':<11} for comparison: {numbers['baseline_often']:.4f} if each key sounds as "
        f"often as in training, {numbers['baseline_repeat']:.4f} if it depends on itself in the frame before"
    )


# ---- batches, loss, score


class RollBatches(SequenceBatches):
    """Piano rolls. The targets are the frames. The input for each is the frame before it; for the first, an empty one.

    pieces: a list of arrays (T_n, 88) of 0 and 1. transpose: the most keys that a piece is shifted by; it stays on the
    piano. The shift is a fresh draw keyed by (seed, epoch, piece). See ``SequenceBatches`` for the rest.
    """

    def __init__(self, pieces, batch_size, transpose=0, dtype="float32", **options):
        super().__init__(pieces, pieces, batch_size, **options)
        self.dtype = check_dtype(dtype)
        self.transpose = check_size("transpose", transpose, minimum=0)

    def collate(self, chosen, epoch):
        rolls = [self.inputs[n] for n in chosen]
        if self.transpose:
            drawn = rng.uniform((len(self.inputs),), 0, 1, self.seed, rng.name_key("transpose"), epoch, np.float64)
            rolls = [_shifted(roll, self.transpose, u) for roll, u in zip(rolls, drawn[chosen], strict=True)]
        targets = pad(rolls).astype(self.dtype)
        inputs = np.zeros_like(targets)
        inputs[1:] = targets[:-1]
        return Batch(inputs, targets, self.lengths[chosen], per_step=True)


def _shifted(roll, most, unit):
    """``roll`` shifted by -most to most keys, chosen evenly by the draw ``unit`` in [0, 1); it stays on the piano."""
    sounding = np.flatnonzero(roll.any(axis=0))
    if not len(sounding):
        return roll
    low, high = -min(most, sounding[0]), min(most, KEYS - 1 - sounding[-1])
    return np.roll(roll, low + int(unit * (high - low + 1)), axis=1)


def frame_loss(logits, rolls, lengths=None):
    """(loss, backward): the binary cross-entropies summed over the keys, the mean over frames; (T, B, 88)."""
    loss, backward = binary_cross_entropy_with_logits(logits, rolls, lengths=lengths)
    return KEYS * loss, lambda dloss=1.0: backward(KEYS * dloss)


def key_statistics(pieces):
    """How the keys behave in ``pieces``: a dict of lists of 88 probabilities.

    often: that the key sounds; kept: that it sounds after a frame in which it sounded; struck: after one in which it
    did not. Each count is raised by one frame with the key and one without, so that no probability is 0 or 1.
    """
    frames = sum(map(len, pieces))
    sounding, before, both = np.zeros((3, KEYS), np.int64)  # frames with a key, after one with it, and of both kinds
    for piece in pieces:
        sounding += np.count_nonzero(piece, axis=0)
        before += np.count_nonzero(piece[:-1], axis=0)
        both += np.count_nonzero(piece[1:] & piece[:-1], axis=0)
    shares = {
        "often": (sounding + 1) / (frames + 2),
        "kept": (both + 1) / (before + 2),
        "struck": (sounding - both + 1) / (frames - before + 2),
    }
    return {name: [float(f"{p:.6g}") for p in ps] for name, ps in shares.items()}


def score(model, pieces, keys):
    """How well a model predicts ``pieces``: a dict of numbers, in nats per frame, summed over the keys.

    nll: the mean over all frames; the first of each piece is predicted from an empty one (T predictions for T frames).
    nll_after_first: the mean over all but the first frame of each piece (T - 1 predictions). nll_per_piece: the mean of
    the pieces' means. baseline_often, baseline_repeat: ``nll`` of a model in which each key sounds with its frequency,
    and of one in which it depends only on itself in the frame before. pieces, frames: how many there are. keys: of
    ``key_statistics``.
    """
    together = 32 if 32 * FRAME_COST * max(map(len, pieces)) <= max_memory() else 1
    batches = RollBatches(pieces, together, shuffle=False, dtype=model.dtype)
    total = after_first = 0.0
    means, frames = [], sum(map(len, pieces))
    for index in range(len(batches)):
        batch = batches.batch(0, index)
        outputs, _ = model(model.xp.asarray(batch.inputs), lengths=batch.lengths)
        losses, _ = binary_cross_entropy_with_logits(outputs, batch.targets, lengths=batch.lengths, reduction="none")
        losses = model.ops.to_numpy(losses.sum(axis=2, dtype=np.float64))  # (T, B), zero past the end
        total += losses.sum()
        after_first += losses[1:].sum()
        means += (losses.sum(axis=0) / batch.lengths).tolist()
    often, sounding, struck = (np.array(keys[name]) for name in ("often", "kept", "struck"))
    baselines = {"often": 0.0, "repeat": 0.0}
    for piece in pieces:
        before = np.vstack([np.zeros((1, KEYS)), piece[:-1]])
        for name, p in (("often", often), ("repeat", np.where(before, sounding, struck))):
            baselines[name] -= np.log(np.where(piece, p, 1 - p)).sum()
    return {
        "nll": float(total / frames),
        "nll_after_first": float(after_first / max(frames - len(pieces), 1)),
        "nll_per_piece": float(np.mean(means)),
        "baseline_often": float(baselines["often"] / frames),
        "baseline_repeat": float(baselines["repeat"] / frames),
        "pieces": len(pieces),
        "frames": frames,
    }


# ---- composing


def compose(model, steps=64, temperature=0.8, voices=None, prompt=None, seed=None):
    """Write music with a model.

    A key sounds with the probability sigmoid(logit / temperature); that is, if logit / temperature plus a logistic
    random number is above 0. At temperature 0 it sounds if its logit is above 0.

    Parameters
    ----------
    model : Module
        Of a run of the task music.
    steps : int
        Frames to write.
    temperature : float
        Below 1 the likely becomes likelier; above 1 less likely.
    voices : int, optional
        Keys that sound in every frame: those with the highest sums. None for as many as are drawn.
    prompt : (T, 88) array, optional
        A roll that the model continues.
    seed : int, optional
        Frame n is drawn with numbers keyed by (seed, n), whatever the backend.

    Returns
    -------
    roll : (len(prompt) + steps, 88) uint8
        The prompt and the new frames.

    Raises
    ------
    ValueError, TypeError, ShapeError
    DivergedError
        If the model's logits are NaN or infinite.
    """
    steps = check_size("steps", steps)
    temperature = check_number("temperature", temperature, 0)
    if voices is not None and check_size("voices", voices) > KEYS:
        raise ValueError(f"voices: a piano has {KEYS} keys, got {voices}")
    roll = np.zeros((0, KEYS)) if prompt is None else np.asarray(prompt)
    if roll.ndim != 2 or roll.shape[1] != KEYS:
        raise ShapeError(f"prompt: expected shape (T, {KEYS}), got {roll.shape}")
    roll, start = np.vstack([roll, np.zeros((steps, KEYS))]).astype(np.uint8), len(roll)
    drawn = rng.uniform((steps, KEYS), 0, 1, rng.check_seed(seed), rng.name_key("compose"), dtype=np.float64)
    with np.errstate(divide="ignore"):
        noise = np.log(drawn) - np.log1p(-drawn)
    frame, stepper = np.zeros((1, KEYS)), model.stepper(1)
    for t in range(start + steps):
        logits = model.ops.to_numpy(stepper.step(model.xp.asarray(frame.astype(model.dtype))))[0]
        if t >= start:
            refuse_no_distribution(logits)
            chances = logits.astype(np.float64)
            if temperature:
                with np.errstate(over="ignore"):
                    chances = chances / temperature + noise[t - start]
            roll[t] = chances > 0
            if voices is not None:
                roll[t] = 0
                roll[t, np.argsort(-chances, kind="stable")[:voices]] = 1
        frame = roll[t : t + 1]
    return roll


_ATTEMPTS = 20


def compose_abc(model, vocabulary, tunes=1, length=1500, temperature=0.8, prompt="", seed=None):
    """Write whole tunes with a model of characters that was trained on ABC; returns a list of strings.

    A tune goes from its X: line to the first empty line. It is thrown away if it has no K: line with notes after it, or
    more than ``length`` characters. prompt: the lines after the X: line that each tune begins with, such as
    "T:Spring\\nM:3/4\\n". seed: of the draws. Raises ValueError if the model writes no tune in 20 attempts.
    """
    made, seed = [], rng.check_seed(seed)
    for number in range(1, check_size("tunes", tunes) + 1):
        opening = f"X: {number}\n{prompt}" if prompt else "X:"
        for _ in range(_ATTEMPTS):
            seed = (seed + 1) % 2**64
            text = opening
            for character in sample(model, vocabulary, "\n\n" + opening, length, temperature, seed=seed):
                text += character
                if text.endswith("\n\n"):
                    break
            found = re.fullmatch(r"X:\s*\d+[ \t]*\n((?:.+\n)*K:.*\n(?:.+\n)+)\n", text)
            if found:
                made.append(f"X: {number}\n{found[1]}")
                break
        else:
            raise ValueError(
                f"the model wrote no whole ABC tune of at most {length} characters in {_ATTEMPTS} attempts: allow more "
                "of them, lower the temperature, or train on ABC for longer"
            )
    return made


TASK = MusicTask()
