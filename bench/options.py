"""``python -m bench options``: what the options of the LSTM do on real data.

Two tasks. ``rows``: the class of an MNIST image, pooled to 14 x 14 and read row by row. ``text``: the next character
of a text that is short enough to be learned by heart.

The protocol, which is the same for every option:

- The same training data, updates, batches, hidden size, optimizer (Adam, a constant rate, gradients clipped to norm 1)
  and seeds. Only the option differs.
- Two tries, on seed 0, of which the validation data choose one. For an option with a rate of its own the tries are two
  such rates, at the learning rate that was chosen for the plain LSTM. For the others they are two learning rates.
- Of each training the epoch that is best on the validation data counts. Its weights are measured once on the test data.
- The choice is trained with further seeds. All are shown: the mean, the lowest and the highest test result.

Sizes and learning rates were set by trainings of the plain LSTM with seed 0. A results file holds every training of the
protocol, also those that were not chosen.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from gpurnn.files import FileError, make_folder, parse_json, read_bytes, write_text_atomic

FORMAT, KIND = 1, "options"
PLAIN = "none"
POPULATION = "batch_norm, population"  # measured with the statistics of all training data


@dataclass(frozen=True)
class Sizes:
    """The sizes of a task, and its two learning rates. train, valid, test: images or characters; steps: of a batch."""

    hidden: int
    epochs: int
    batch: int
    steps: int
    train: int
    valid: int
    test: int
    rates: list


@dataclass(frozen=True)
class Data:
    """A task that was read: three batch sources, the model's input and output, and the number that is compared."""

    train: object
    valid: object
    test: object
    features: int
    classes: int
    score: object  # function of (model, batch source) -> a number, of which less is better


SIZES = {
    "rows": Sizes(64, 15, 100, 14, 5000, 5000, 10000, [0.006, 0.02]),
    "text": Sizes(128, 36, 16, 50, 40000, 20000, 40000, [0.004, 0.012]),
}
UNITS = {"rows": "wrong, %", "text": "bits per character"}

# Option -> the arguments of its tries. A single one is tried with each learning rate.
OPTIONS = {
    PLAIN: ({},),
    "layer_norm": ({"layer_norm": True},),
    "batch_norm": ({"batch_norm": True},),
    POPULATION: ({"batch_norm": True},),
    "zoneout": ({"zoneout": (0.05, 0.5)}, {"zoneout": (0.15, 0.15)}),
    "recurrent_dropout, timestep": ({"recurrent_dropout": 0.25}, {"recurrent_dropout": 0.5}),
    "recurrent_dropout, sequence": tuple(
        {"recurrent_dropout": rate, "recurrent_dropout_each": "sequence"} for rate in (0.25, 0.5)
    ),
    "weight_dropout": ({"weight_dropout": 0.25}, {"weight_dropout": 0.5}),
    "peephole": ({"peephole": True},),
    "coupled": ({"coupled": True},),
}
LEFT_OUT = {"rows": (), "text": ("batch_norm", POPULATION, "peephole", "coupled")}  # slow array code; no regularizers


# ---- the tasks


def read_rows(files, sizes, seed=0):
    """The images of MNIST in ``files``, pooled by 2 x 2, a row at a timestep. Raises ValueError for too few."""
    import numpy as np

    from gpurnn.data import SequenceBatches
    from gpurnn.data.images import read_images

    parts = read_images(files)
    order = np.random.default_rng(0).permutation(len(parts["train"][0]))
    train, valid = order[: sizes.train], order[sizes.train : sizes.train + sizes.valid]
    _check_enough("images", {"train": (train, sizes.train), "valid": (valid, sizes.valid)})

    def batches(part, chosen, shuffle):
        images, labels = (array[chosen] for array in parts[part])
        N, R, C = images.shape
        pooled = images.reshape(N, R // 2, 2, C // 2, 2).mean(axis=(2, 4), dtype="float32") / 255
        return SequenceBatches(list(pooled), labels, sizes.batch, per_step=False, shuffle=shuffle, seed=seed)

    test = np.arange(len(parts["test"][0]))[: sizes.test]
    return Data(
        batches("train", train, True), batches("train", valid, False), batches("test", test, False),
        parts["train"][0].shape[2] // 2, 10, _wrong,
    )  # fmt: skip


def read_characters(files, sizes, seed=0):
    """The first characters of a text to train with, the next ones for validation, the next ones as a test.

    ``seed`` is not used: the order of a text is what it is. Raises ValueError for a text that is too short.
    """
    from gpurnn.data import TextBatches
    from gpurnn.data.vocabulary import read_text

    ids, vocabulary = read_text(files)
    parts, start = [], 0
    for size in (sizes.train, sizes.valid, sizes.test):
        parts.append(ids[start : start + size])
        start += size
    _check_enough("characters", {"all": (ids[:start], start)})
    train, valid, test = (TextBatches(part, sizes.batch, sizes.steps) for part in parts)
    return Data(train, valid, test, len(vocabulary), len(vocabulary), _bits)


READERS = {"rows": read_rows, "text": read_characters}


def _check_enough(what, parts):
    for name, (found, wanted) in parts.items():
        if len(found) < wanted:
            raise ValueError(f"too few {what} ({name}): expected {wanted:,}, got {len(found):,}")


def _wrong(model, batches):
    """Percent of the images whose class is not the likeliest."""
    import gpurnn

    found = gpurnn.train.measure(model, gpurnn.cross_entropy, batches, {"accuracy": gpurnn.accuracy})
    return 100 * (1 - found["accuracy"])


def _bits(model, batches):
    import gpurnn

    return gpurnn.metrics.bits_per_character(gpurnn.evaluate(model, gpurnn.cross_entropy, batches))


# ---- one training


def build(task, data, hidden, arguments, seed):
    """The model of a task, whose LSTM has these arguments. All options begin with the same other layers."""
    import gpurnn

    shared = {"backend": "cpu"}
    lstm, linear = {"seed": 3 * seed, **shared}, gpurnn.Linear(hidden, data.classes, seed=3 * seed + 1, **shared)
    if task == "rows":
        recurrent = gpurnn.LSTM(data.features, hidden, forget_bias=1.0, **lstm, **arguments)
        return gpurnn.Sequential(recurrent, gpurnn.Pooling(hidden, "last", **shared), linear)
    embedding = gpurnn.Embedding(data.features, hidden // 2, seed=3 * seed + 2, **shared)
    return gpurnn.Sequential(embedding, gpurnn.LSTM(hidden // 2, hidden, forget_bias=1.0, **lstm, **arguments), linear)


def train(task, data, sizes, arguments, lr, seed, population=False):
    """Train once; the record of it, without the option's name. population: as Cooijmans et al. 2017 measure."""
    import numpy as np

    import gpurnn

    model, epochs, best = build(task, data, sizes.hidden, arguments, seed), [], None

    def validate(record, training):
        nonlocal best
        if population:
            whole = [data.train.batch(0, n).inputs for n in range(len(data.train))]
            gpurnn.recurrent.set_population_statistics(model, np.concatenate(whole, axis=1))
        epochs.append({"train_loss": record["train_loss"], "validation": data.score(model, data.valid)})
        if best is None or epochs[-1]["validation"] < best[0]:
            best = epochs[-1]["validation"], len(epochs), model.state_dict()

    started = time.process_time()
    gpurnn.fit(
        model, gpurnn.cross_entropy, data.train, optimizer="adam", lr=lr, epochs=sizes.epochs, clip_norm=1.0,
        callbacks=[validate], progress=False,
    )  # fmt: skip
    model.load_state_dict(best[2])
    return {
        "arguments": arguments, "lr": lr, "seed": seed, "epochs": epochs, "best_epoch": best[1], "validation": best[0],
        "test": data.score(model, data.test), "cpu_seconds": round(time.process_time() - started, 1),
    }  # fmt: skip


# ---- the protocol


def tries(option, rates, plain_lr):
    """(learning rate, arguments) of an option's two tries. plain_lr: what was chosen for the plain LSTM."""
    settings = OPTIONS[option]
    if len(settings) > 1:
        return [(plain_lr, arguments) for arguments in settings]
    return [(lr, settings[0]) for lr in rates]


def chosen(runs, task, option):
    """The trainings of an option's choice, in the order of their seeds: of its tries on seed 0, the one that is best on
    the validation data. Empty where there was none."""
    found = [run for run in runs if (run["task"], run["option"]) == (task, option)]
    first = [run for run in found if run["seed"] == 0]
    if not first:
        return []
    best = min(first, key=lambda run: run["validation"])
    same = [run for run in found if (run["lr"], run["arguments"]) == (best["lr"], best["arguments"])]
    return sorted(same, key=lambda run: run["seed"])


def run(files, document, seeds=3, options=None, save=lambda document: None, say=lambda line: None):
    """Train what ``document["runs"]`` lacks, task by task; ``save`` is called after each training.

    files: task -> its files; a task without files is left out. options: names, with ``PLAIN`` always; None: all.
    """
    runs = document["runs"]
    for task, paths in files.items():
        sizes = Sizes(**document["sizes"][task])
        data = {seed: READERS[task](paths, sizes, seed) for seed in range(seeds)}

        def once(option, lr, arguments, seed, task=task, sizes=sizes, data=data):
            arguments = json.loads(json.dumps(arguments))  # as a results file has them
            key = {"task": task, "option": option, "lr": lr, "arguments": arguments, "seed": seed}
            if any(all(run[name] == value for name, value in key.items()) for run in runs):
                return
            runs.append(key | train(task, data[seed], sizes, arguments, lr, seed, option == POPULATION))
            save(document)
            say(_line(runs[-1]))

        for option in OPTIONS:
            if option in LEFT_OUT[task] or not (options is None or option in (PLAIN, *options)):
                continue
            plain = chosen(runs, task, PLAIN)
            for lr, arguments in tries(option, sizes.rates, plain[0]["lr"] if plain else None):
                once(option, lr, arguments, 0)
            best = chosen(runs, task, option)[0]
            for seed in range(1, seeds):
                once(option, best["lr"], best["arguments"], seed)


def _line(run):
    return (
        f"{run['task']:5} {run['option']:28} lr {run['lr']:g} {run['arguments']} seed {run['seed']}: epoch "
        f"{run['best_epoch']}, validation {run['validation']:.4f}, test {run['test']:.4f}, {run['cpu_seconds']} s"
    )


# ---- the results


def new_document(command):
    """A document without trainings."""
    from .machine import environment

    return {
        "format": FORMAT, "kind": KIND, "command": command,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "environment": environment(()),
        "sizes": {task: asdict(sizes) for task, sizes in SIZES.items()}, "runs": [],
    }  # fmt: skip


def load(path):
    """The document in a file. Raises ValueError where there is none, or where its sizes are not those of today."""
    document = parse_json(read_bytes(path, factor=8), path)
    if not isinstance(document, dict) or (document.get("format"), document.get("kind")) != (FORMAT, KIND):
        raise FileError(f"{path}: expected results of 'bench options' of format {FORMAT}")
    if document["sizes"] != {task: asdict(sizes) for task, sizes in SIZES.items()}:
        raise FileError(f"{path}: its trainings had other sizes: give another --out")
    return document


def table(document, task):
    """Lines of Markdown: a row for each option of a task. Validation results are means; the best of a training may be
    in another epoch with another seed."""
    digits = 2 if task == "rows" else 3
    heads = ("chosen", "test", "lowest to highest", "after a fifth", "best", "last", "best epoch")
    yield f"| {task}, {UNITS[task]} | {' | '.join(heads)} |"
    yield "|---|---|---:|---:|---:|---:|---:|---:|"
    for option in OPTIONS:
        runs = chosen(document["runs"], task, option)
        if not runs:
            continue
        test = [run["test"] for run in runs]
        fifth = max(len(runs[0]["epochs"]) // 5, 1) - 1
        valid = [[run["epochs"][fifth]["validation"] for run in runs], [run["validation"] for run in runs]]
        valid.append([run["epochs"][-1]["validation"] for run in runs])
        settings = [str(value) for value in runs[0]["arguments"].values() if not isinstance(value, (bool, str))]
        cells = [
            option, ", ".join([*settings, f"lr {runs[0]['lr']:g}"]), f"{statistics.mean(test):.{digits}f}",
            f"{min(test):.{digits}f} to {max(test):.{digits}f}",
            *(f"{statistics.mean(values):.{digits}f}" for values in valid),
            f"{statistics.mean(run['best_epoch'] for run in runs):.1f}",
        ]  # fmt: skip
        yield f"| {' | '.join(cells)} |"


@click.command("options")
@click.option("--mnist", type=click.Path(exists=True, dir_okay=False), help="MNIST as an .npz file.")
@click.option(
    "--text", type=click.Path(exists=True, dir_okay=False), help="A text file, of at least 100,000 characters."
)
@click.option("--option", "names", multiple=True, type=click.Choice([*OPTIONS]), help="[default: all]")
@click.option("--seeds", type=click.IntRange(1), default=3)
@click.option("--out", type=click.Path(dir_okay=False), default="options.json", help="What it has is not done again.")
def command(mnist, text, names, seeds, out):
    """Train with each option of the LSTM on MNIST and on a text, and print how good it is.

    Without data it prints what --out holds.
    """
    files = {task: [file] for task, file in (("rows", mnist), ("text", text)) if file}
    if not files and not Path(out).exists():
        raise click.UsageError(f"give --mnist, --text or both, or an --out that is there: {out} is not")
    names_of = " ".join(f"--{'mnist' if task == 'rows' else task} {Path(file).name}" for task, (file,) in files.items())

    def save(document):
        make_folder(Path(out).parent)
        write_text_atomic(out, json.dumps(document, indent=1))

    try:
        document = load(out) if Path(out).exists() else new_document(f"python -m bench options {names_of}")
        run(files, document, seeds, names or None, save, lambda line: click.echo(line, err=True))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for task in SIZES:
        click.echo("\n".join([*table(document, task), ""]))
    if files:
        click.echo(f"written to {out}")
