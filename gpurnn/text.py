"""A character language model: read text, train on it, sample from it, measure it. ``gpurnn train text`` on the shell.

>>> run = gpurnn.text.prepare_text(["book.txt"], "runs/book", gpurnn.text.CharConfig(epochs=3))
>>> run.train()
>>> model, vocabulary, config = gpurnn.text.load_run("runs/book")
>>> "".join(gpurnn.text.sample(model, vocabulary, "Once upon", length=200, temperature=0.8))

The model predicts each character from those before it: embedding, recurrent layers, linear layer, softmax. It is
trained by truncated back-propagation through time: B places of the text are read side by side, T characters at a time,
and the recurrent state is carried from one piece to the next.
"""

import itertools
import json
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from . import optim, rng
from .checkpoint import CheckpointError, remove_checkpoint, write_json_atomic
from .data import TextBatches
from .errors import check_choice, check_number, check_size
from .layers import Dropout, Embedding, Linear, Sequential
from .losses import cross_entropy
from .metrics import accuracy, bits_per_character, perplexity
from .module import check_dtype
from .recurrent import GRU, LSTM, RNN
from .training import fit, load_weights
from .vocabulary import UNKNOWN, Vocabulary, read_text, split

# ---- model and run

CELLS = {"lstm": LSTM, "gru": GRU, "rnn": RNN}
OPTIMIZERS = {"adam": optim.Adam, "adamw": optim.AdamW, "rmsprop": optim.RMSprop, "sgd": optim.SGD}
SCHEDULES = ("constant", "cosine", "step", "plateau")
_MAY_CHANGE = ("epochs", "patience")  # what a resumed run may have otherwise than the run it continues


@dataclass
class CharConfig:
    """Everything that decides a training run; ``config.json`` in its folder.

    layers, hidden: L and H. embedding: size of a character's vector; None: ``hidden``, or the vocabulary's size where
    that is smaller. steps, batch: T and B, characters of one piece and pieces side by side. warmup: optimiser steps in
    which the learning rate rises to ``lr``. clip: largest norm of the gradient, 0 for none. valid: share of the text,
    at its end, kept for validation. patience: epochs without a better validation loss before training stops, None for
    never. accumulate: pieces whose gradients are summed for one optimiser step. seed: None draws one.
    """

    cell: str = "lstm"
    layers: int = 1
    hidden: int = 256
    embedding: int | None = None
    dropout: float = 0.0
    steps: int = 64
    batch: int = 32
    optimizer: str = "adam"
    lr: float = 4e-3
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: int = 0
    clip: float = 1.0
    epochs: int = 5
    valid: float = 0.1
    patience: int | None = None
    accumulate: int = 1
    dtype: str = "float32"
    seed: int | None = None

    def __post_init__(self):
        check_choice("cell", self.cell, CELLS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("layers", "hidden", "steps", "batch", "epochs", "accumulate"):
            check_size(name, getattr(self, name))
        for name in ("embedding", "patience"):
            if getattr(self, name) is not None:
                check_size(name, getattr(self, name))
        check_size("warmup", self.warmup, minimum=0)
        check_number("lr", self.lr, 0, low_open=True)
        for name in ("weight_decay", "clip"):
            check_number(name, getattr(self, name), 0)
        for name in ("dropout", "valid"):
            check_number(name, getattr(self, name), 0, 1, high_open=True)
        self.dtype = check_dtype(self.dtype).name
        self.seed = rng.check_seed(self.seed)
        if self.valid == 0 and (self.schedule == "plateau" or self.patience):
            raise ValueError("schedule 'plateau' and patience need a validation loss: valid should be above 0")
        if self.warmup and self.schedule == "plateau":
            raise ValueError("warmup counts optimiser steps, schedule 'plateau' epochs: choose another schedule")


def build_model(config, vocabulary_size, backend=None):
    """``Sequential`` of embedding, recurrent layers, dropout and linear layer: ids (T, B) -> logits (T, B, V)."""
    V, H = vocabulary_size, config.hidden
    inside = config.embedding or min(H, V)
    shared = {"backend": backend, "dtype": config.dtype}
    seeds = ((config.seed + n) % 2**64 for n in range(4))  # each layer draws initial values of its own
    recurrent = {"dropout": config.dropout if config.layers > 1 else 0.0}
    if config.cell == "lstm":
        recurrent["forget_bias"] = 1.0  # remember at first: Jozefowicz et al., ICML 2015
    layers = {
        "embedding": Embedding(V, inside, seed=next(seeds), **shared),
        "recurrent": CELLS[config.cell](inside, H, config.layers, seed=next(seeds), **recurrent, **shared),
        "dropout": Dropout(config.dropout, seed=next(seeds), **shared),
        "linear": Linear(H, V, seed=next(seeds), **shared),
    }
    if not config.dropout:
        del layers["dropout"]
    return Sequential(layers)


@dataclass
class TextRun:
    """A run about to be trained: what is trained on what. Made by ``prepare_text``.

    characters: length of the whole text; opening: its first word, or 20 characters; files: absolute paths, none for the
    built-in text; resume: whether ``train`` goes on from the folder's last checkpoint.
    """

    folder: Path
    config: CharConfig
    files: list
    characters: int
    opening: str
    vocabulary: Vocabulary
    model: object
    train_batches: object
    valid_batches: object
    resume: bool = False

    def train(self, *, checkpoint_every=None, progress=True, flow=False):
        """Train to the end, writing to ``folder``; returns ``fit``'s History and raises what ``fit`` raises."""
        config = self.config
        optimizer = OPTIMIZERS[config.optimizer](self.model, lr=config.lr, weight_decay=config.weight_decay)
        updates = -(-len(self.train_batches) // config.accumulate)
        with np.errstate(over="ignore", invalid="ignore"):  # fit says what is not finite
            return fit(
                self.model,
                cross_entropy,
                self.train_batches,
                optimizer=optimizer,
                epochs=config.epochs,
                validation=self.valid_batches,
                schedule=_schedule(config, optimizer, updates),
                schedule_every="epoch" if config.schedule == "plateau" else "step",
                clip_norm=config.clip or None,
                accumulate=config.accumulate,
                out=self.folder,
                resume=self.resume,
                overwrite=not self.resume,
                checkpoint_every=checkpoint_every,
                patience=config.patience,
                progress=progress,
                flow=flow,
            )


def prepare_text(files=(), folder="runs/text", config=None, *, backend=None, resume=False, overwrite=False):
    """Read the text, build the model and write ``config.json``; returns the ``TextRun`` to ``train()``.

    files: UTF-8 text files, none for ``builtin_text()``. folder: of the run; one that holds a run already is refused
    unless ``resume`` or ``overwrite``. resume: files, config and backend may be left out; what is given and differs
    from the run in the folder, other than ``epochs`` and ``patience``, raises ValueError, and so does changed text.
    Raises ValueError also for a text too short for one batch, and what ``read_text`` raises.
    """
    folder, files = Path(folder), [str(Path(file).resolve()) for file in files]
    saved = vocabulary = None
    if resume:
        old, saved = read_config(folder)
        config = config or old
        changed = [f.name for f in fields(old) if getattr(old, f.name) != getattr(config, f.name)]
        refused = [name for name in changed if name not in _MAY_CHANGE]
        if refused:
            was = ", ".join(f"{name} {getattr(old, name)}" for name in refused)
            raise ValueError(f"a resumed run keeps its settings, {folder} has {was}: leave out what differs")
        files, backend = files or saved["text"]["files"], backend or saved["backend"]
        vocabulary = Vocabulary(saved["vocabulary"])
    elif not overwrite and any((folder / name).exists() for name in ("config.json", "last.json", "history.jsonl")):
        raise ValueError(f"{folder} already holds a run: continue it with resume, replace it with overwrite")
    config = config or CharConfig()
    disk = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.is_dir())
    ids, vocabulary = read_text(files, vocabulary, disk)
    text = {"files": files, "characters": len(ids), "crc32": zlib.crc32(ids)}
    if saved and text | {"files": None} != saved["text"] | {"files": None}:
        raise ValueError(
            f"the text is not the one that {folder} was trained on ({saved['text']['characters']} characters then, "
            f"{len(ids)} now): a resumed run needs the same text"
        )
    train_batches, valid_batches = _batches(ids, config)
    model = build_model(config, len(vocabulary), backend)
    document = {
        "task": "text",
        "backend": model.ops.name,
        "config": asdict(config),
        "text": text,
        "vocabulary": vocabulary.characters,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:
        for name in ("last.json", "best.json"):  # before config.json says what no longer fits them
            remove_checkpoint(folder / name)
    write_json_atomic(folder / "config.json", document)
    opening = "".join(vocabulary.decode(ids[:20]).partition(" ")[:2])
    return TextRun(folder, config, files, len(ids), opening, vocabulary, model, train_batches, valid_batches, resume)


def _batches(ids, config):
    """Training and validation batches; the validation part may be read with fewer sequences side by side."""
    batch, steps, valid = config.batch, config.steps, config.valid

    def fits(length):
        train_part, valid_part = split(range(length), valid)
        return len(train_part) > batch * steps and (not valid or len(valid_part) > steps)

    if not fits(len(ids)):
        least = max((batch * steps + 0.5) / (1 - valid), (steps + 0.5) / valid if valid else 0)  # rounding in split
        raise ValueError(
            f"the text is too short: {len(ids)} characters, one batch of {batch} sequences of {steps} steps needs "
            f"{next(filter(fits, itertools.count(int(least))))} (validation share {valid:g}). Give more text, or a "
            "smaller batch or fewer steps"
        )
    train_ids, valid_ids = split(ids, valid)
    rows = min(batch, (len(valid_ids) - 1) // steps)
    return TextBatches(train_ids, batch, steps), TextBatches(valid_ids, rows, steps) if valid else None


def _schedule(config, optimizer, updates):
    """The learning-rate schedule of ``config`` for ``updates`` optimiser steps an epoch."""
    total = config.epochs * updates
    if config.schedule == "plateau":
        return optim.PlateauSchedule(optimizer, factor=0.5, patience=1)
    after = None
    if config.schedule == "cosine":
        after = optim.CosineSchedule(optimizer, total=max(1, total - config.warmup), min_lr=config.lr / 20)
    if config.schedule == "step":
        after = optim.StepSchedule(optimizer, max(1, total // 3), 0.3)
    return optim.WarmupSchedule(optimizer, config.warmup, after=after) if config.warmup else after


def read_config(folder):
    """(CharConfig, whole document) of a run's ``config.json``.

    Raises FileNotFoundError where there is none, CheckpointError for one that is damaged.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run: {path} is missing")
    try:
        document = json.loads(path.read_bytes())
        Vocabulary(document["vocabulary"])
        document["text"]["characters"], document["text"]["files"], document["backend"]
        return CharConfig(**document["config"]), document
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged, or is not of a text run: {error!r}") from error


def load_run(folder, backend=None):
    """(model in evaluation mode, vocabulary, config) of a run: its best checkpoint, else its last.

    Raises FileNotFoundError where there is no run, CheckpointError for a damaged one.
    """
    config, document = read_config(folder)
    vocabulary = Vocabulary(document["vocabulary"])
    path = Path(folder) / "best.json"
    if not path.exists():
        path = Path(folder) / "last.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint yet: train it to the end of an epoch first")
    model = build_model(config, len(vocabulary), backend)
    load_weights(model, path)
    return model.eval(), vocabulary, config


# ---- sampling and measuring


def sample(model, vocabulary, prompt="", length=300, temperature=0.8, top_k=None, top_p=None, seed=None):
    """Iterator over ``length`` characters that the model writes after ``prompt``, one at a time.

    temperature: logits are divided by it; 0 takes the likeliest character always. top_k: only the k likeliest; top_p:
    only the smallest set of likeliest characters with at least this probability together (Holtzman et al., ICLR 2020),
    after top_k. seed: character n is drawn with a number keyed by (seed, n), whatever the backend.

    An empty prompt is taken as a line end. Characters of the prompt that the vocabulary does not have count as unknown
    (``vocabulary.unknown(prompt)`` names them); the unknown entry is never drawn. Raises ValueError and TypeError.
    """
    check_size("length", length, minimum=0)
    check_number("temperature", temperature, 0)
    if top_k is not None:
        check_size("top_k", top_k)
    if top_p is not None:
        check_number("top_p", top_p, 0, 1, low_open=True)
    draws = rng.uniform((length,), 0, 1, rng.check_seed(seed), rng.name_key("sample"), dtype=np.float64)
    return _sample(model, vocabulary, vocabulary.encode(prompt or "\n"), draws, temperature, top_k, top_p)


def _sample(model, vocabulary, ids, draws, temperature, top_k, top_p):
    state = None
    waiting = list(ids)
    for draw in draws:
        for index in waiting:
            logits, state = _eval_step(model, index, state)
        p = probabilities(logits, temperature, top_k, top_p)
        total = np.cumsum(p)  # in vocabulary order: rounding of the logits hardly moves the borders
        index = min(int(np.searchsorted(total, draw * total[-1], side="right")), int(np.flatnonzero(p)[-1]))
        yield vocabulary.decode(index)
        waiting = [index]


def _eval_step(model, index, state):
    """Logits (V,) on the host and the new state after one character; without dropout, whatever the mode."""
    training = model.training
    model.eval()
    try:
        logits, state = model.step(model.xp.asarray([int(index)]), state)
    finally:
        model.train(training)
    return model.ops.to_numpy(logits)[0], state


def probabilities(logits, temperature=1.0, top_k=None, top_p=None):
    """Probabilities (V,), float64, of drawing each character; see ``sample``. logits (V,); entry 0 gets none."""
    logits = np.array(logits, dtype=np.float64)
    logits[UNKNOWN] = -np.inf
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


def evaluate_text(folder, files, backend=None):
    """How well a run predicts other text: a dict of numbers.

    nats, bits, perplexity: mean cross-entropy per character in nats and in bits, and its exponential; accuracy: share
    of characters that were the likeliest; characters: length of the text, of which all but the first are predicted;
    unknown: how many of them the vocabulary does not have (they count as the unknown entry).

    The text is read at up to ``config.batch`` places side by side, each starting from a zero state.
    Raises what ``load_run`` and ``read_text`` raise, ValueError for less than two characters.
    """
    model, vocabulary, config = load_run(folder, backend)
    ids, _ = read_text(files, vocabulary)
    predicted = len(ids) - 1
    if predicted < 1:
        raise ValueError(f"the text is too short: {len(ids)} characters, at least 2 are needed")
    B = max(1, min(config.batch, predicted // config.steps))
    size = -(-predicted // B)  # characters of one sequence, the last one may be shorter
    starts = np.arange(B) * size
    nats = right = unknown = 0
    state = None
    for t in range(0, size, config.steps):
        T = min(config.steps, size - t)
        places = starts + np.arange(t, t + T)[:, None]
        lengths = np.clip(np.minimum(predicted - starts, size) - t, 0, T)
        places = np.minimum(places, predicted - 1)  # past a sequence's end: not read
        inputs, targets = (model.xp.asarray(ids[p].astype(np.int64)) for p in (places, places + 1))
        logits, state = model(inputs, state, lengths)
        nats += float(cross_entropy(logits, targets, lengths=lengths, reduction="sum")[0])
        count = int(lengths.sum())
        right += round(accuracy(logits, targets, lengths=lengths) * count)
    for start in range(0, len(ids), 1 << 20):
        unknown += int(np.count_nonzero(ids[start : start + (1 << 20)] == UNKNOWN))
    mean = nats / predicted
    return {
        "nats": mean,
        "bits": bits_per_character(mean),
        "perplexity": perplexity(mean),
        "accuracy": right / predicted,
        "characters": len(ids),
        "unknown": unknown,
    }
