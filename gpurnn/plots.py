"""Pictures of a run: loss curves and gradient flow, as PNG. Needs matplotlib: ``pip install 'gpurnn[plot]'``."""

import io
import math
from pathlib import Path

import numpy as np

from .errors import FileError, check_shape, printable
from .files import make_folder, write_bytes_atomic
from .run_folder import FLOW, HISTORY, SOFTWARE, read_flow, read_history


def plot_history(records, png):
    """Loss of every logged step and epoch, metrics of each epoch, learning rate and gradient norm.

    records: the dicts of a ``History``, or the path of a ``history.jsonl``. png: the file to write. Raises ValueError
    where there is nothing to draw, ImportError without matplotlib.
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
    loss, below = axes[0], axes[-1]
    if steps:
        loss.plot([r["step"] for r in steps], [r["loss"] for r in steps], color="0.75", lw=1, label="training, step")
    if epochs:
        x = [r["step"] for r in epochs]
        loss.plot(x, [r["train_loss"] for r in epochs], "o-", ms=4, label="training, mean of the epoch")
        measured = [(r["step"], r["validation_loss"]) for r in epochs if r.get("validation_loss") is not None]
        if measured:
            loss.plot(*zip(*measured, strict=True), "s-", ms=4, label="validation")
            best = min(measured, key=lambda point: point[1])
            loss.annotate(f"{best[1]:.4f}", best, textcoords="offset points", xytext=(0, 8), ha="center")
    loss.set_ylabel("loss")
    loss.legend()
    loss.grid(alpha=0.3)
    for name in names:
        points = [r.get(name) for r in epochs]
        axes[1].plot([r["step"] for r in epochs], points, "s-", ms=4, label=plain(name.removeprefix("validation_")))
    if names:
        axes[1].set_ylabel("validation")
        axes[1].legend()
        axes[1].grid(alpha=0.3)
    every = steps or epochs
    x = [r["step"] for r in every]
    norms = [math.nan if r["grad_norm"] is None else r["grad_norm"] for r in every]  # None: no update yet
    below.plot(x, norms, lw=1, color="C2")
    below.set_yscale("log")
    below.set_ylabel("gradient norm", color="C2")
    below.set_xlabel("optimiser step")
    rate = below.twinx()
    rate.plot(x, [r["lr"] for r in every], lw=1, color="C3")
    rate.set_ylabel("learning rate", color="C3")
    rate.set_ylim(bottom=0)
    save_figure(figure, png)


def plot_gradient_flow(flow, png):
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
    save_figure(figure, png)


def plot_roll(roll, png, lowest=21, step=1.0, prompt=0):
    """A piano roll (T, K) of 0 and 1, whose column 0 is the MIDI number ``lowest``: time to the right, pitch upwards.

    step: length of a frame in quarter notes. prompt: frames at the beginning that are drawn in another colour. Raises
    ImportError without matplotlib.
    """
    roll = np.asarray(roll) != 0
    T, keys = roll.shape[0], np.flatnonzero(roll.any(axis=0))
    low, high = (keys[0], keys[-1]) if len(keys) else (0, roll.shape[1] - 1)
    figure = new_figure(min(20, 4 + T / 12), 1.5 + (high - low + 1) / 10)
    axes = figure.subplots()
    for first, last, color in ((0, prompt, "0.5"), (prompt, T, "C0")):
        for key in keys:
            changes = np.flatnonzero(np.diff(roll[first:last, key].astype(int), prepend=0, append=0))
            spans = [((first + a) * step, (b - a) * step) for a, b in zip(changes[::2], changes[1::2], strict=True)]
            axes.broken_barh(spans, (lowest + key - 0.45, 0.9), facecolors=color)
    octaves = [pitch for pitch in range(lowest + low - 2, lowest + high + 3) if pitch % 12 == 0]
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    axes.set_ylim(lowest + low - 2, lowest + high + 2)
    axes.set_xlim(0, max(T, 1) * step)
    axes.set_xlabel("quarter notes")
    axes.grid(alpha=0.3)
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
    axes.plot(x[start:N], truth[start:], color="0.35", lw=1.2, label="truth")
    for number, (first, values) in enumerate(earlier):
        label = None if number else "forecast earlier"
        axes.plot(x[first : first + len(values)], values, color="C0", lw=1.5, label=label)
        axes.axvline(x[first], color="C0", lw=0.5, alpha=0.4)
    axes.plot(x[N:], forecast, color="C3", lw=1.8, marker="." if len(forecast) < 50 else None, label="forecast")
    for number, (level, (low, high)) in enumerate(reversed((intervals or {}).items())):  # the narrower, the darker
        axes.fill_between(x[N:], low, high, color="C3", alpha=0.2 + 0.1 * number, lw=0, label=f"{level} % interval")
    axes.set_ylabel(plain(name))
    axes.set_xlabel("row" if moments is None else None)
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, png)


def plot_run(folder):
    """Draw what a run's folder holds; returns the paths of the PNGs. Raises FileNotFoundError where there is no
    history."""
    folder = Path(folder)
    if not (folder / HISTORY).is_file():
        raise FileNotFoundError(f"{folder} holds no run: {HISTORY} is missing")
    made = [folder / "history.png"]
    plot_history(folder / HISTORY, made[0])
    flow = folder / FLOW
    if flow.is_file() and flow.stat().st_size:
        made.append(folder / "gradient_flow.png")
        plot_gradient_flow(flow, made[-1])
    return made


def plot_attention(alignments, png):
    """What each written word read of the source, as heat maps one below the other, dark for much.

    alignments: a list of (weights (N, T), source: T words, written: N words). png: the file to write. Raises ShapeError
    where words and weights differ in number, ImportError without matplotlib.
    """
    for number, (weights, source, written) in enumerate(alignments):
        check_shape(f"alignments[{number}]", weights, (len(written), len(source)))
    heights = [1.2 + 0.3 * len(written) for _, _, written in alignments]
    widest = max(len(source) for _, source, _ in alignments)
    figure = new_figure(2.5 + 0.6 * widest, sum(heights))
    axes = figure.subplots(len(alignments), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (weights, source, written) in zip(axes, alignments, strict=True):
        image = axis.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(source)), [plain(word) for word in source], rotation=45, ha="left")
        axis.set_yticks(range(len(written)), [plain(word) for word in written])
        axis.tick_params(top=True, labeltop=True, bottom=False, labelbottom=False)
    figure.colorbar(image, ax=axes, label="attention weight")
    save_figure(figure, png)


def _mean(norms):
    return None if norms is None else norms.mean(axis=1)


def new_figure(width, height):
    """An empty Matplotlib figure of this size in inches. Raises ImportError without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'gpurnn[plot]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def plain(text):
    """Text for a picture, in one line of at most 40 characters: control characters as escapes, no formulas."""
    text = printable(text).replace("\n", " ")
    return (text if len(text) <= 40 else text[:39] + "\N{HORIZONTAL ELLIPSIS}").replace("$", r"\$")


def save_figure(figure, path):
    """Write a figure in the format that the file's name ends with, PNG where it says none, with the folders above it.

    Raises what ``write_bytes_atomic`` raises.
    """
    path, data = Path(path), io.BytesIO()
    kind = path.suffix[1:].lower() or "png"
    figure.savefig(data, dpi=120, format=kind, metadata={"Software": SOFTWARE} if kind == "png" else None)
    make_folder(path.parent)
    write_bytes_atomic(path, data.getvalue())
