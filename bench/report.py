"""What came out: tables for the terminal and for Markdown, comparison of two runs, plots."""

import json
import random
import statistics
from pathlib import Path

from .run import FORMAT, times


def load(path):
    """A document that ``run`` wrote. Raises ValueError where it is none."""
    document = json.loads(Path(path).read_text())
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a benchmark file of format {FORMAT}")
    return document


def timed(row):
    """Rival -> its result, of those that were timed in a case."""
    return {name: result for name, result in row["results"].items() if result["status"] == "timed"}


def table(document, base=None, columns=80):
    """Lines for a terminal ``columns`` wide: microseconds a run, and how many times as fast as ``base`` that is.

    A line for each case where that fits, else one for each rival below its case.
    """
    names = list(dict.fromkeys(name for row in document["cases"] for name in timed(row)))
    if not names:
        yield "nothing was timed"
    else:
        base = base if base in names else names[0]
        width = max(len(row["name"]) for row in document["cases"])
        flat = width + 18 * len(names) + 8 <= columns
        if flat:
            yield f"{'case':{width}}" + "".join(f"{name:>18}" for name in names) + f"{'floor':>8}"
        for row in document["cases"]:
            found = timed(row)
            best = min((result["median_s"] for result in found.values()), default=None)
            share = "" if best is None else f"{row['floor_s'] / best:.0%}"
            cells = {name: _cell(row, name, base) for name in names}
            if flat:
                yield f"{row['name']:{width}}" + "".join(f"{cell:>18}" for cell in cells.values()) + f"{share:>8}"
            else:
                yield f"{row['name']}  (floor {share})"
                yield from (f"  {name:16}{cell:>20}" for name, cell in cells.items())
        yield f"x: times as fast as {base}; floor: the CPU's least time / the best here"
    reasons = {}
    for row in document["cases"]:
        for name, result in row["results"].items():
            if result["status"] != "timed":
                reasons.setdefault((name, result["status"], result["reason"]), []).append(row["name"])
    for (name, status, reason), cases in reasons.items():
        yield f"{name}: {status} in {len(cases)} of {len(document['cases'])} cases: {reason}"


def _cell(row, name, base):
    found = timed(row)
    if name not in found:
        return row["results"].get(name, {"status": "-"})["status"]
    text = f"{found[name]['median_s'] * 1e6:,.0f} us"
    if base in found and name != base:
        text += f" {ratio(found[base]['samples'], found[name]['samples'])[0]:.2f}x"
    return text


def ratio(a, b):
    """(median, low, high): how many times as fast b is as a, pair by pair, with the 95 % interval of that median.

    a, b: samples of one run, taken in turns. The interval is a bootstrap's over the pairs (2,000 draws, fixed seed).
    """
    pairs = [x / y for x, y in zip(times(a), times(b), strict=False)]
    return interval(lambda draw: statistics.median(draw.choices(pairs, k=len(pairs))), statistics.median(pairs))


def interval(draw_one, middle):
    draw = random.Random(0)
    drawn = sorted(draw_one(draw) for _ in range(2000))
    return middle, drawn[50], drawn[-51]


def compare(old, new):
    """For each case and rival in both documents: (case, rival, times as fast, low, high, whether significant)."""
    before = {(row["name"], name): result for row in old["cases"] for name, result in timed(row).items()}
    rows = []
    for row in new["cases"]:
        for name, result in timed(row).items():
            if (row["name"], name) not in before:
                continue
            a, b = times(before[row["name"], name]["samples"]), times(result["samples"])
            middle, low, high = interval(
                lambda draw, a=a, b=b: (
                    statistics.median(draw.choices(a, k=len(a))) / statistics.median(draw.choices(b, k=len(b)))
                ),
                statistics.median(a) / statistics.median(b),
            )
            rows.append((row["name"], name, middle, low, high, low > 1 or high < 1))
    return rows


def crossings(document, fast, slow):
    """(cell, pass, H) -> the least B from which on ``fast`` is the faster one in every larger B too, or None."""
    wins = {}
    for row in document["cases"]:
        found, case = timed(row), row["case"]
        if fast in found and slow in found:
            key = case["cell"], case["what"], case["H"]
            wins.setdefault(key, {})[case["B"]] = found[fast]["median_s"] < found[slow]["median_s"]
    least = {}
    for key, by_batch in wins.items():
        least[key] = None
        for batch in sorted(by_batch, reverse=True):
            if not by_batch[batch]:
                break
            least[key] = batch
    return least


def markdown(document):
    """A table for a README or a page, with the machine and the date above it."""
    machine = document["environment"]
    gpu = machine["gpu"]["name"] if machine["gpu"] else "no GPU"
    names = list(dict.fromkeys(name for row in document["cases"] for name in timed(row)))
    yield (
        f"{machine['cpu']}, {document['threads']} threads, {gpu}; NumPy {machine['numpy']}, torch {machine['torch']}; "
        f"{document['started'][:10]}. Microseconds a run, the median of {document['rounds']}."
    )
    yield ""
    yield "| case | " + " | ".join(names) + " |"
    yield "|---|" + "---|" * len(names)
    for row in document["cases"]:
        found = timed(row)
        cells = [f"{found[name]['median_s'] * 1e6:,.0f}" if name in found else "-" for name in names]
        yield f"| {row['name']} | " + " | ".join(cells) + " |"


def plot(document, path):
    """One panel for each cell and pass: microseconds a timestep against B x H, a line for each rival, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((row["case"]["cell"], row["case"]["what"]) for row in document["cases"]))
    columns = min(3, max(1, len(panels)))
    rows = -(-max(1, len(panels)) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.5 * columns, 3.4 * rows), squeeze=False, layout="constrained")
    names = list(dict.fromkeys(name for row in document["cases"] for name in timed(row)))
    for k, (cell, what) in enumerate(panels):
        axis = axes[k // columns][k % columns]
        cases = [row for row in document["cases"] if (row["case"]["cell"], row["case"]["what"]) == (cell, what)]
        labels = [f"B{row['case']['B']}\nH{row['case']['H']}" for row in cases]
        for color, name in enumerate(names):
            points = [(x, timed(row)[name]) for x, row in enumerate(cases) if name in timed(row)]
            if not points:
                continue
            steps = [cases[x]["steps"] for x, _ in points]
            middle = [result["median_s"] / n * 1e6 for (_, result), n in zip(points, steps, strict=True)]
            spread = [sorted(times(result["samples"])) for _, result in points]
            low = [m - s[0] / n * 1e6 for m, s, n in zip(middle, spread, steps, strict=True)]
            high = [s[-1] / n * 1e6 - m for m, s, n in zip(middle, spread, steps, strict=True)]
            axis.errorbar(
                [x for x, _ in points], middle, [low, high], marker="o", capsize=3, label=name, color=f"C{color}"
            )
        floors = [row["floor_s"] / row["steps"] * 1e6 for row in cases]
        axis.plot(range(len(cases)), floors, "k:", label="floor (CPU)")
        axis.set(title=f"{cell}, {what}", yscale="log", ylabel="µs per timestep")
        axis.set_xticks(range(len(cases)), labels, fontsize=7)
        axis.grid(alpha=0.3)
    for k in range(len(panels), rows * columns):
        axes[k // columns][k % columns].set_visible(False)
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, dpi=120)
    plt.close(figure)
