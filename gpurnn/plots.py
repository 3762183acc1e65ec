"""Pictures of a run: loss curves and gradient flow, as PNG. Needs matplotlib: ``pip install "gpurnn[plot]"``."""

import io
import itertools
import math
import os
from pathlib import Path

import numpy as np

from .checkpoint import CheckpointError, checkpoint_document
from .errors import FileError, check_shape, printable
from .files import make_folder, read_json, write_bytes_atomic
from .fonts import drawable, families
from .run_folder import CONFIG, FLOW, HISTORY, SOFTWARE, read_flow, read_history

_FEW = 20  # of more classes all names are turned


def plot_history(records, png, *, title="", best_epoch=None):
    """Loss of every logged step and epoch, metrics of each epoch, learning rate and gradient norm.

    records: the dicts of a ``History``, or the path of a ``history.jsonl``. png: the file to write. best_epoch: the
    epoch whose model was kept, which is marked; None marks nothing. Raises ValueError where there is nothing to draw,
    ImportError without matplotlib.
    """
    source = records if isinstance(records, (str, Path)) else "the history"
    records = read_history(records) if isinstance(records, (str, Path)) else list(records)
    steps = [r for r in records if r["kind"] == "step"]
    epochs = [r for r in records if r["kind"] == "epoch"]
    if not steps and not epochs:
        raise FileError(f"{source} is empty: nothing to draw yet")
    last = epochs[-1] if epochs else {}
    names = [name for name in last if name.startswith("validation_") and name != "validation_loss"]
    figure = new_figure(8, 8 if names else 6)
    axes = figure.subplots(3 if names else 2, 1, sharex=True, height_ratios=[3, 2, 1] if names else [3, 1])
    _draw_loss(axes[0], steps, epochs)
    for name in names:
        points = [math.nan if r.get(name) is None else r[name] for r in epochs]
        axes[1].plot([r["step"] for r in epochs], points, "s-", ms=4, label=plain(_short(name)))
    if names:
        axes[1].set_ylabel("validation")
        axes[1].grid(alpha=0.3)
    _draw_rate(axes[-1], steps or epochs)
    best = next((r for r in epochs if r["epoch"] == best_epoch), None)
    if best is not None:
        _mark_best(axes[: 2 if names else 1], best, names)
    for axis in axes[:-1]:
        axis.legend()
    if epochs:
        _add_epochs(axes[0], epochs)
    if title:
        figure.suptitle(plain(title, 100), x=0.01, ha="left", fontsize=11)
    save_figure(figure, png)


def _draw_loss(axis, steps, epochs):
    """The loss of steps and epochs."""
    if steps:
        axis.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="0.75", lw=1, label="training, update")
    if epochs:
        x = [r["step"] for r in epochs]
        axis.plot(x, [r["train_loss"] for r in epochs], "o-", ms=4, label="training, mean of the epoch")
        measured = [(r["step"], r["validation_loss"]) for r in epochs if r.get("validation_loss") is not None]
        if measured:
            axis.plot(*zip(*measured, strict=True), "s-", ms=4, label="validation")
    axis.set_ylabel("loss")
    axis.grid(alpha=0.3)


def _draw_rate(axis, records):
    """Gradient norm and learning rate."""
    x = [r["step"] for r in records]
    norms = [math.nan if r["grad_norm"] is None else r["grad_norm"] for r in records]  # None: no update yet
    axis.plot(x, norms, lw=1, color="C2")
    axis.set_yscale("log")
    axis.set_ylabel("gradient norm", color="C2")
    axis.set_xlabel("update")
    rate = axis.twinx()
    rate.plot(x, [r["lr"] for r in records], lw=1, color="C3")
    rate.set_ylabel("learning rate", color="C3")
    rate.set_ylim(bottom=0)


def _mark_best(axes, best, names):
    """A line through the epoch whose model was kept, and its values."""
    loss = best["train_loss"] if best.get("validation_loss") is None else best["validation_loss"]
    shown = [f"{loss:.4f}"] + (["  ".join(f"{_short(n)} {best[n]:.4g}" for n in names if n in best)] if names else [])
    for axis, text in zip(axes, shown, strict=True):
        axis.axvline(best["step"], color="0.3", lw=1, ls=":", label=plain(f"kept: epoch {best['epoch']}, {text}", 80))


def _add_epochs(axis, epochs):
    """The number of each epoch above its last update; of many epochs, of every second, fifth, tenth and so on."""
    every = next(n * 10**power for power in itertools.count() for n in (1, 2, 5) if n * 10**power * 12 >= len(epochs))
    chosen = [r for r in epochs if r["epoch"] % every == 0]
    above = axis.secondary_xaxis("top")
    above.set_xticks([r["step"] for r in chosen], [str(r["epoch"]) for r in chosen])
    above.set_xlabel("epoch")


def _short(name):
    return name.removeprefix("validation_").replace("_", " ")


def plot_gradient_flow(flow, png, *, title=""):
    """Norm of dL/dh, and of dL/dc where there is a c, against the timestep, on a logarithmic scale.

    flow: a ``GradientFlow``, or the path of a run's ``gradient_flow.jsonl`` (one curve for each epoch, dark is late). A
    curve that falls towards t = 0 is a vanishing gradient, one that rises an exploding one; exact zeros are left out.
    """
    if isinstance(flow, dict):
        moments = [{name: {"dh": n.dh.mean(axis=1), "dc": _mean(n.dc)} for name, n in flow.items()}]
    else:
        moments = [record["layers"] for record in read_flow(flow)]
    if not moments or not moments[-1]:
        place = "" if isinstance(flow, dict) else f"{flow}: "
        raise FileError(f"{place}no gradient flow was recorded: nothing to draw")
    names = list(moments[-1])
    figure = new_figure(8, 2.2 * len(names) + 1)
    axes = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for axis, name in zip(axes, names, strict=True):
        for age, moment in enumerate(moments):
            for kind, color in (("dh", "C0"), ("dc", "C1")):
                if moment[name].get(kind) is None:
                    continue
                norms = np.asarray(moment[name][kind], float)
                shade = 0.25 + 0.75 * (age + 1) / len(moments)
                label = f"dL/d{kind[1]}" if age == len(moments) - 1 else None
                axis.plot(np.where(norms > 0, norms, np.nan), color=color, alpha=shade, lw=1.5, label=label)
        axis.set_yscale("log")
        axis.set_ylabel("norm")
        axis.set_title(plain(name), loc="left", fontsize=10)
        axis.legend()
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("timestep t")
    if title:
        figure.suptitle(plain(title, 100), x=0.01, ha="left", fontsize=11)
    save_figure(figure, png)


def plot_roll(roll, png, lowest=21, step=1.0, prompt=0, title=""):
    """A piano roll (T, K) of 0 and 1, whose column 0 is the MIDI number ``lowest``: time to the right, pitch upwards.

    step: length of a frame in quarter notes. prompt: frames at the beginning that are drawn in another color, with a
    legend. Raises ImportError without matplotlib.
    """
    roll = np.asarray(roll) != 0
    T, keys = roll.shape[0], np.flatnonzero(roll.any(axis=0))
    low, high = (keys[0], keys[-1]) if len(keys) else (0, roll.shape[1] - 1)
    figure = new_figure(min(20, 4 + T / 12), 1.5 + (high - low + 1) / 10)
    axes = figure.subplots()
    for first, last, color, label in ((0, prompt, "0.5", "prompt"), (prompt, T, "C0", "composed")):
        axes.broken_barh([], (0, 1), facecolors=color, label=label)
        for key in keys:
            changes = np.flatnonzero(np.diff(roll[first:last, key].astype(int), prepend=0, append=0))
            spans = [((first + a) * step, (b - a) * step) for a, b in zip(changes[::2], changes[1::2], strict=True)]
            axes.broken_barh(spans, (lowest + key - 0.45, 0.9), facecolors=color)
    octaves = [pitch for pitch in range(lowest + low - 2, lowest + high + 3) if pitch % 12 == 0]
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    axes.set_ylim(lowest + low - 2, lowest + high + 2)
    axes.set_xlim(0, max(T, 1) * step)
    axes.set_xlabel("time in quarter notes")
    axes.set_ylabel("pitch")
    axes.grid(alpha=0.3)
    axes.set_title(plain(title), loc="left")
    if prompt:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    save_figure(figure, png)


def plot_forecast(truth, forecast, png, earlier=(), start=0, moments=None, name="value", *, intervals=None):
    """A series from row ``start`` on, forecasts made earlier beside it, and the forecast of what comes.

    truth: (N,); forecast: of the rows N, N + 1, ...; earlier: pairs of a first row and the values forecast from there;
    moments: datetimes of all rows, those to come included, or None for their numbers. intervals: {a level in per cent:
    (low, high), arrays as forecast}, the narrowest first. Raises ImportError without matplotlib.
    """
    N = len(truth)
    x = np.arange(N + len(forecast)) if moments is None else np.asarray(moments)
    figure = new_figure(10, 4)
    axes = figure.subplots()
    axes.set_title(plain(f"{name}: forecast of the next {len(forecast)} rows"), loc="left", fontsize=11)
    axes.plot(x[start:N], truth[start:], color="0.35", lw=1.2, label="truth")
    for number, (first, values) in enumerate(earlier):
        label = None if number else "forecast earlier"
        axes.plot(x[first : first + len(values)], values, color="C0", lw=1.5, label=label)
        axes.axvline(x[first], color="C0", lw=0.5, alpha=0.4, label=None if number else "its first row")
    joined = slice(max(0, N - 1), None)  # from the last true value on, which is no forecast: it has no dot
    first = truth[joined]
    dots = {"marker": "." if len(forecast) < 50 else None, "markevery": slice(len(first), None)}
    axes.plot(x[joined], [*first, *forecast], color="C3", lw=1.8, label="forecast", **dots)
    for number, (level, (low, high)) in enumerate(reversed((intervals or {}).items())):  # the narrower, the darker
        edges = [*first, *low], [*first, *high]
        axes.fill_between(x[joined], *edges, color="C3", alpha=0.2 + 0.1 * number, lw=0, label=f"{level} % interval")
    axes.set_ylabel(plain(name))
    axes.set_xlabel("row" if moments is None else None)
    if moments is not None:
        _add_year(axes)
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, png)


def _add_year(axes):
    """Write the year below the first date, where no date says it."""
    from matplotlib.dates import num2date

    axes.set_xlim(axes.get_xlim())
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    labels = axes.xaxis.get_major_formatter().format_ticks(ticks)
    if ticks and not any(str(num2date(tick).year) in label for tick, label in zip(ticks, labels, strict=True)):
        axes.set_xticks(ticks, [f"{labels[0]}\n{num2date(ticks[0]).year}", *labels[1:]])


def plot_run(folder):
    """Draw what a run's folder holds; returns the paths of the PNGs. Raises FileNotFoundError where there is no
    history."""
    folder = Path(folder)
    if not (folder / HISTORY).is_file():
        raise FileNotFoundError(f"{folder} holds no run: {HISTORY} is missing")
    made = [folder / "history.png"]
    plot_history(folder / HISTORY, made[0], title=_title_of(folder), best_epoch=_best_epoch_of(folder))
    flow = folder / FLOW
    if flow.is_file() and flow.stat().st_size:
        made.append(folder / "gradient_flow.png")
        plot_gradient_flow(flow, made[-1], title=_title_of(folder))
    return made


def _title_of(folder):
    """The run, its cell and its size; of a folder without settings its name alone."""
    name = Path(os.path.abspath(folder)).name
    try:
        document = read_json(folder / CONFIG)
        settings = document["settings"]
        return f"{name}: {document['task']}, {settings['cell']}, {settings['layers']} x {settings['hidden']} units"
    except (OSError, ValueError, LookupError, TypeError):
        return name


def _best_epoch_of(folder):
    """The epoch of the best checkpoint, None where there is none."""
    try:
        return checkpoint_document(folder / "best.json")["epoch"]
    except (CheckpointError, LookupError, TypeError):
        return None


def plot_attention(alignments, png, title=None):
    """What each written word read of the source, as heat maps one below the other, dark for much.

    alignments: a list of (weights (N, T), source: T words, written: N words). png: the file to write. title: what
    stands above all. Raises ShapeError where words and weights differ in number, ImportError without matplotlib.
    """
    for number, (weights, source, written) in enumerate(alignments):
        check_shape(f"alignments[{number}]", weights, (len(written), len(source)))
    heights = [1.2 + 0.3 * len(written) for _, _, written in alignments]
    widest = max(len(source) for _, source, _ in alignments)
    figure = new_figure(2.5 + 0.6 * widest, sum(heights) + (0.4 if title else 0))
    axes = figure.subplots(len(alignments), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (weights, source, written) in zip(axes, alignments, strict=True):
        image = axis.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(source)), [plain(word) for word in source], rotation=45, ha="left")
        axis.set_yticks(range(len(written)), [plain(word) for word in written])
        axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.colorbar(image, ax=axes, label="attention weight")
    if title:
        figure.suptitle(plain(title), fontsize=10)
    save_figure(figure, png)


def plot_confusion(confusion, classes, png, title=None):
    """A confusion matrix: how many texts of the class of each row are predicted to be of the class of each column.

    The darker a cell, the larger its share of the row.

    confusion: (V, V) counts. classes: the V names. png: the file to write. title: what stands above. Raises ShapeError
    where counts and names differ in number, ImportError without matplotlib.
    """
    V = len(classes)
    check_shape("confusion", confusion, (V, V))
    figure = new_figure(1, 1)  # says what is missing, before any name is looked at
    classes = [plain(name) for name in classes]
    cell = min(0.45, 18 / V)  # inches; of many classes the picture stays within a few thousand pixels
    small = {"fontsize": max(1, round(22 * cell))}
    size = 2.5 + cell * V + 0.18 * cell * max(map(len, classes))
    figure.set_size_inches(size + 1, size)
    axis = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(confusion):
        color = "white" if shares[row, column] > 0.5 else "black"
        number = str(confusion[row, column])
        axis.text(column, row, number, ha="center", va="center", color=color, fontsize=max(1, round(18 * cell)))
    axis.set_xticks(range(V), classes, **small)
    axis.set_yticks(range(V), classes, **small)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("true class")
    figure.colorbar(image, ax=axis, label="color: share of the row; number: texts", shrink=0.8)
    if title:
        axis.set_title(plain(title), fontsize=10)
    if not _are_apart(figure, axis):
        axis.tick_params(axis="x", rotation=90)
    save_figure(figure, png)


def _are_apart(figure, axis):
    """Whether the labels of the horizontal axis, as they would be drawn, leave gaps between them."""
    labels = axis.get_xticklabels()
    if len(labels) > _FEW:
        return False
    figure.draw_without_rendering()
    edges = [label.get_window_extent() for label in labels]
    return all(a.x1 + 4 < b.x0 for a, b in itertools.pairwise(edges))


def plot_transcription(features, posteriors, characters, png, *, places, title, hop, stack):
    """Features (T, bands) of a recording and, above each moment, how probable each character is.

    posteriors: (steps, V), the blank first; characters: a string of the V - 1 others. places: a list of (step, number
    of a character), 1 for the first, each of which is written above its curve. hop: seconds from one frame to the next;
    stack: frames of a step. Raises ImportError without matplotlib.
    """
    frames = len(posteriors) * stack  # the last step may reach past the end
    seconds = frames * hop
    figure = new_figure(max(6, min(16, 3 * seconds)), 5)
    above, below = figure.subplots(2, 1, sharex=True)
    times = (np.arange(len(posteriors)) + 0.5) * seconds / len(posteriors)
    above.plot(times, posteriors[:, 0], lw=1.5, color="0.75", ls=":", label="blank")
    heard = {number for _, number in places}
    for number in range(1, len(characters) + 1):
        label = plain(characters[number - 1].replace(" ", "\N{OPEN BOX}")) if number in heard else None
        above.plot(times, posteriors[:, number], lw=1.5, label=label)
    for step, number in places:
        point = times[step], posteriors[step, number]
        shown = plain(characters[number - 1].replace(" ", "\N{OPEN BOX}"))
        above.annotate(shown, point, textcoords="offset points", xytext=(0, 2), ha="center")
    above.set_ylim(0, 1.15)
    above.set_ylabel("probability")
    above.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, ncols=1 + len(heard) // 10)
    above.set_title(plain(title), loc="left")
    extent = (0, len(features) * hop, 0, features.shape[1])
    below.imshow(features.T, origin="lower", aspect="auto", extent=extent)
    below.set_xlim(0, seconds)
    below.set_ylabel("mel band")
    below.set_xlabel("time in seconds")
    save_figure(figure, png)


def _mean(norms):
    return None if norms is None else norms.mean(axis=1)


def new_figure(width, height):
    """An empty Matplotlib figure of this size in inches. Raises ImportError without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need Matplotlib: pip install "gpurnn[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def plain(text, longest=40):
    """Text for a picture, in one line of at most ``longest`` characters: escapes for control characters and for those
    that no font has, no formulas."""
    text = drawable(printable(text).replace("\n", " "))
    return (text if len(text) <= longest else text[: longest - 1] + "\N{HORIZONTAL ELLIPSIS}").replace("$", r"\$")


def save_figure(figure, path):
    """Write a figure in the format that the file's name ends with, PNG where it says none, with the folders above it.

    Raises what ``write_bytes_atomic`` raises.
    """
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    chosen = families("".join(text.get_text() for text in texts))
    for text in texts if len(chosen) > 1 else ():
        text.set_fontfamily(chosen)
    path, data = Path(path), io.BytesIO()
    kind = path.suffix[1:].lower() or "png"
    figure.savefig(data, dpi=120, format=kind, metadata={"Software": SOFTWARE} if kind == "png" else None)
    make_folder(path.parent)
    write_bytes_atomic(path, data.getvalue())
