"""Pictures of a results file."""

from math import log2, nan

from .grid import OTHERS, OURS
from .grid import points as grid_points
from .results_file import beats_floor, device, rivals, timed, times

KINDS = ("size", "T", "B", "H", "roofline", "crossover", "heat")
_FASTEST = 4.0  # times as fast: the end of a heat map's colors
_AGAIN = "measure again"  # the end of a ring's label
_RING = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "markeredgecolor": "red", "linestyle": "none"}


def plot(document, path, kind="size"):
    """Write one picture: PNG or SVG, whichever ``path`` ends in, SVG to a text file.

    kind: "size": microseconds a timestep, case by case; "T", "B" or "H": against that axis, a line for each rival and
    value of the others; "roofline": flop/s against flops a byte under the machine's ceilings; "crossover": how many
    times as fast each rival is as the first, against B x H; "heat": how many times as fast gpurnn-cpu is as the best of
    the others that compute in float32, a square for each B and H. What is faster than a floor or a roof allows has a
    red ring. Raises ValueError where the file has nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not rivals(document):
        raise ValueError("nothing was timed in this file")
    from gpurnn.plots import save_figure

    draw = {"size": _size, "roofline": _roofline, "crossover": _crossover, "heat": _heat}.get(kind) or _axis(kind)
    panels = list(dict.fromkeys((row["case"]["cell"], row["case"]["what"]) for row in document["cases"]))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (cell, what) in zip(axes.flat, panels, strict=False):
        draw(
            axis,
            document,
            [row for row in document["cases"] if (row["case"]["cell"], row["case"]["what"]) == (cell, what)],
        )
        axis.set_title(f"{cell}, {what}")
        axis.grid(alpha=0 if kind == "heat" else 0.3)
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    handles = dict(sorted(handles.items(), key=lambda item: item[0].endswith(_AGAIN)))
    if handles:
        columns = min(4, len(handles))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, fontsize=8)
    if hasattr(path, "write"):
        figure.savefig(path, dpi=120, format="svg")
    else:
        save_figure(figure, path)
    plt.close(figure)


def _label(row, *axes):
    return "\n".join(f"{axis}{row['case'][axis]}" for axis in axes)


def _micros(row, name):
    """(lowest, median, highest) microseconds a timestep."""
    result = timed(row)[name]
    found = times(result["samples"])
    return [seconds / row["steps"] * 1e6 for seconds in (min(found), result["median_s"], max(found))]


def _size(axis, document, rows):
    for number, name in enumerate(rivals(document)):
        here = [(x, *_micros(row, name)) for x, row in enumerate(rows) if name in timed(row)]
        if here:
            x, low, middle, high = zip(*here, strict=True)
            spread = [
                [m - l for m, l in zip(middle, low, strict=True)],
                [h - m for m, h in zip(middle, high, strict=True)],
            ]
            axis.errorbar(x, middle, spread, marker="o", capsize=3, label=name, color=f"C{number}")
        fast = [
            (x, _micros(row, name)[1]) for x, row in enumerate(rows) if name in timed(row) and beats_floor(row, name)
        ]
        _ring(axis, fast, "below the floor")
    for number, kind in enumerate(("cpu", "gpu")):
        here = [
            (x, row["floors"][kind][0] / row["steps"] * 1e6) for x, row in enumerate(rows) if row["floors"].get(kind)
        ]
        if here and any(device(name) == kind for name in rivals(document)):
            axis.plot(*zip(*here, strict=True), "k" + ":-"[number], lw=1, label=f"floor, {kind}")
    varied = [name for name in ("T", "B", "H", "L") if len({row["case"][name] for row in rows}) > 1] or ["B", "H"]
    step = -(-len(rows) // 12)  # more labels than a dozen run into one another
    axis.set_xticks(range(0, len(rows), step), [_label(row, *varied) for row in rows[::step]], fontsize=7)
    axis.set(yscale="log", ylabel="µs per timestep")


def _axis(field):
    def draw(axis, document, rows):
        others = [name for name in ("T", "B", "H", "L", "dtype", "precision") if name != field]
        varied = [name for name in others if len({row["case"][name] for row in rows}) > 1]
        lines = {}
        for row in rows:
            for number, name in enumerate(rivals(document)):
                if name in timed(row):
                    key = number, name, tuple(row["case"][other] for other in varied)
                    lines.setdefault(key, []).append((row["case"][field], _micros(row, name)[1]))
        styles = list(dict.fromkeys(key[2] for key in lines))
        for (number, name, values), points in lines.items():
            what = " ".join(f"{other}{value}" for other, value in zip(varied, values, strict=True))
            marker = "osv^D*Px+<>h"[styles.index(values) % 12]
            axis.plot(
                *zip(*sorted(points), strict=True), marker=marker, color=f"C{number}", label=f"{name} {what}".strip()
            )
        axis.set(xscale="log", yscale="log", xlabel=field, ylabel="µs per timestep")
        ticks = sorted({row["case"][field] for row in rows})
        axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)
        axis.minorticks_off()

    return draw


def _ring(axis, points, what):
    """Draw rings around points that no program can reach, so that nobody takes them for results."""
    if points:
        axis.plot(*zip(*points, strict=True), **_RING, label=f"{what}: a rate was measured too low, {_AGAIN}")


def _roofline(axis, document, rows):
    for number, name in enumerate(rivals(document)):
        here = [(row, *_work(row, name)) for row in rows if name in timed(row)]
        if here:
            axis.plot(*zip(*(point for _, *point in here), strict=True), "o", color=f"C{number}", label=name)
        ceilings = document["ceilings"].get(device(name))
        _ring(axis, [(x, y) for row, x, y in here if y > _roof(ceilings, _arithmetic(row), x)], "above the roof")
    intensities = [row["flops"] / row["bytes"] for row in rows]
    for number, kind in enumerate(("cpu", "gpu")):
        ceilings = document["ceilings"].get(kind)
        if not ceilings or not any(device(name) == kind for name in rivals(document)):
            continue
        for arithmetic in dict.fromkeys(_arithmetic(row) for row in rows):
            rate = ceilings["flops"].get(arithmetic)
            if rate:
                x = sorted({min(intensities) / 2, rate / ceilings["bytes"], max(intensities) * 2})
                roof = [_roof(ceilings, arithmetic, at) for at in x]
                axis.plot(x, roof, "k" + "-:"[number], lw=1, label=f"roof, {kind} {arithmetic}")
    axis.set(xscale="log", yscale="log", xlabel="flops per byte that must move", ylabel="flop/s")
    _plain_ticks(axis.xaxis)


def _work(row, name):
    """(flops a byte, flop/s) of a rival in a case."""
    return row["flops"] / row["bytes"], row["flops"] / timed(row)[name]["median_s"]


def _arithmetic(row):
    case = row["case"]
    return case["precision"] if case["dtype"] == "float32" else case["dtype"]


def _roof(ceilings, arithmetic, intensity):
    """The highest flop/s possible at this many flops a byte; infinite where no rate was measured."""
    rate = ceilings and ceilings["flops"].get(arithmetic)
    return min(rate, ceilings["bytes"] * intensity) if rate else float("inf")


def _plain_ticks(axis):
    """1, 2 and 5 in each decade of a logarithmic axis; more labels run into one another."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _crossover(axis, document, rows):
    base, *others = rivals(document)
    for number, name in enumerate(others, 1):
        here = sorted(
            (row["case"]["B"] * row["case"]["H"], timed(row)[base]["median_s"] / timed(row)[name]["median_s"])
            for row in rows
            if {base, name} <= timed(row).keys()
        )
        if here:
            axis.plot(*zip(*here, strict=True), "o-", color=f"C{number}", label=name)
    axis.axhline(1, color="k", lw=1)
    axis.set(xscale="log", yscale="log", xlabel="B x H", ylabel=f"times as fast as {base}")
    _plain_ticks(axis.yaxis)


def _heat(axis, document, rows):
    """A square for each B and H: green where ours is faster than the best of the others, purple where it is slower."""
    found = {
        (point.row["case"]["H"], point.row["case"]["B"]): point.value
        for point in grid_points(document | {"cases": rows}, rows[0]["case"]["what"])
    }
    if not found:
        raise ValueError(f"no case was timed for {OURS} and for one of {', '.join(OTHERS)}")
    sizes, batches = (sorted({place[n] for place in found}) for n in (0, 1))
    colors = [[log2(found.get((H, B), nan)) for B in batches] for H in sizes]
    limit = log2(_FASTEST)
    axis.imshow(colors, cmap="PRGn", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
    for (H, B), value in found.items():
        color = "white" if abs(log2(value)) > 0.75 * limit else "black"
        middle = {"ha": "center", "va": "center"}
        axis.text(batches.index(B), sizes.index(H), f"{value:.2f}", fontsize=7, color=color, **middle)
    axis.set_xticks(range(len(batches)), [str(B) for B in batches])
    axis.set_yticks(range(len(sizes)), [str(H) for H in sizes])
    axis.set(xlabel="B", ylabel="H")
