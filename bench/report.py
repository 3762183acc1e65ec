"""Results as tables for the terminal and for Markdown, as a comparison of two runs, as a page with pictures."""

import io
import json
import re
import statistics
import textwrap
from html import escape
from pathlib import Path

from .gpu_results import probe_table, smoke_line
from .grid import floor_lines, overview
from .grid import lines as grid_lines
from .latency import latency_table
from .plots import KINDS, plot
from .results_file import beats_floor, device, faster, floor, interval, load, machine_line, rivals, timed, times

_COLUMN = 28  # columns of a terminal for a rival: time, ratio and share
_OURS, _PLAIN = "gpurnn-cpu", "gpurnn-cpu-plain"  # the columns of ``beside_plain``
ABOVE = "!"  # marks a share of the floor above 100 %


def table(document, base=None, columns=80):
    """Lines for a terminal ``columns`` wide: microseconds a run, how many times as fast ``base`` is, and the floor's
    share in the time; a line for each case where that fits, else one for each rival below its case."""
    names, lines = rivals(document), []
    if not names:
        yield "nothing was timed"
    else:
        base = base if base in names else names[0]
        width, room = max(len(row["name"]) for row in document["cases"]), max(map(len, names)) + 2
        flat = width + _COLUMN * len(names) <= columns
        if flat:
            yield f"{'case':{width}}" + "".join(f"{name:>{_COLUMN}}" for name in names)
        for row in document["cases"]:
            cells = {name: "".join(_cells(row, name, base)) for name in names}
            if flat:
                yield f"{row['name']:{width}}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells.values())
            else:
                yield row["name"]
                yield from (f"  {name:{room}}{cell:>{_COLUMN}}" for name, cell in cells.items())
        lines = [f"x: how many times as fast {base} is; %: the floor's share in the time"]
    for line in (*lines, *notes(document)):
        yield from textwrap.wrap(
            line, max(columns, 40), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )


def notes(document):
    """Lines below a table: what sets the floors, set-up, memory, and who was left out why."""
    names = rivals(document)
    if names:
        for kind in ("cpu", "gpu"):
            here = [row for row in document["cases"] if any(device(name) == kind for name in timed(row))]
            reasons = sorted({row["floors"][kind][1] for row in here if row["floors"].get(kind)})
            if reasons:
                yield f"floor, {kind}: the longest of products, bytes and dependent steps; set by {', '.join(reasons)}"
        yield from above_line(document)
        setup = {
            name: [timed(row)[name].get("setup_s") for row in document["cases"] if name in timed(row)] for name in names
        }
        parts = [f"{name} {max(found):.2g} s" for name, found in setup.items() if None not in found and found]
        if parts:
            yield "set-up and first run, outside the clock, at most: " + ", ".join(parts)
    reasons = {}
    for row in document["cases"]:
        for name, result in row["results"].items():
            if result["status"] != "timed":
                reasons.setdefault((name, result["status"], result["reason"]), []).append(row["name"])
    for (name, status, reason), cases in reasons.items():
        yield f"{name}: {status} in {len(cases)} of {len(document['cases'])} cases: {reason}"


def above_line(document):
    """The line that says what ``ABOVE`` means, where a rival beats its floor."""
    above = [(row["name"], name) for row in document["cases"] for name in timed(row) if beats_floor(row, name)]
    if above:
        yield (
            f"{ABOVE}: faster than the floor, {len(above)} times: its rates were measured too low, on a busy "
            "machine, or in memory where the case fits into a cache. Measure again on an idle machine"
        )


def _cells(row, name, base):
    """(time, ratio, floor) as text of fixed widths."""
    found = timed(row)
    if name not in found:
        return row["results"].get(name, {"status": "-"})["status"], "", ""
    times_as_fast = ""
    if base in found and name != base:
        times_as_fast = f"{faster(found[name]['samples'], found[base]['samples']):.2f}x"
    share = floor(row, name)
    shown = f"{share[0]:.0%}{ABOVE if beats_floor(row, name) else ''}" if share else ""
    return f"{found[name]['median_s'] * 1e6:,.0f} us", f"{times_as_fast:>7}", f"{shown:>7}"


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
    """(cell, pass, H) -> the smallest B at which and above which ``fast`` is always faster, or None."""
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


def markdown(document, base=None):
    """Lines of a table for a page: microseconds a run, how many times as fast ``base`` is, the floor's share."""
    names = rivals(document)
    base = base if base in names else (names or [None])[0]
    yield machine_line(document)
    if "smoke" in document:
        yield smoke_line(document)
    yield f"Microseconds a run; x: how many times as fast {base} is; %: the floor's share in the time."
    yield from (f"{line}." for line in above_line(document))
    yield ""
    yield "| case | " + " | ".join(names) + " |"
    yield "|---|" + "---:|" * len(names)
    for row in document["cases"]:
        cells = (" ".join(" ".join(_cells(row, name, base)).split()) for name in names)
        yield f"| {row['name']} | " + " | ".join(cells) + " |"


def summary(document, base, other, bound=None, only=None):
    """Lines of a small table: a row for each B and H, a column for each cell and pass, in it how many times as fast
    ``base`` is as ``other``, and in brackets the same for ``bound``, what ``base`` cannot exceed.

    bound: "-" is the same as None. only: the one pass that is shown, such as "train"."""
    columns = dict.fromkeys((row["case"]["cell"], row["case"]["what"]) for row in document["cases"])
    columns = [column for column in columns if only in (None, column[1])]
    lines = {}
    for row in document["cases"]:
        found, case = timed(row), row["case"]
        if {base, other} <= found.keys():
            text = f"{faster(found[other]['samples'], found[base]['samples']):.2f}"
            if bound in found:
                text += f" ({faster(found[other]['samples'], found[bound]['samples']):.2f})"
            lines.setdefault((case["B"], case["H"]), {})[case["cell"], case["what"]] = text
    yield "| B, H | " + " | ".join(f"{cell} {what}" for cell, what in columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    for (B, H), cells in lines.items():
        yield f"| {B}, {H} | " + " | ".join(cells.get(column, "-") for column in columns) + " |"


def beside_plain(document, what="train", clock="host_s"):
    """Lines of a table of one pass: for each cell with an option the time of gpurnn-cpu, how many times that of the
    plain cell it is, and how many times as fast gpurnn-cpu is as each other rival.

    The least of all turns counts, as other work on the machine only adds to it. clock: "host_s", or "cpu_s" for
    processor time, which says something of one thread on a busy machine."""
    rows = [row for row in document["cases"] if row["case"]["what"] == what and {_OURS, _PLAIN} <= timed(row).keys()]
    others = [name for name in rivals(document) if name not in (_OURS, _PLAIN)]
    yield f"| {what} | milliseconds | beside plain | " + " | ".join(others) + " |"
    yield "|---|" + "---:|" * (len(others) + 2)
    for row in rows:
        least = {name: min(sample[clock] for sample in result["samples"]) for name, result in timed(row).items()}
        ours = least[_OURS]
        cells = [f"{ours * 1e3:.1f}", f"{ours / least[_PLAIN]:.2f}"]
        cells += [f"{least[name] / ours:.2f}" if name in least else "-" for name in others]
        yield f"| {row['case']['cell']} | " + " | ".join(cells) + " |"


TABLES = {  # word of a marker -> (lines of a table, which of a rival's turns counts)
    "probe": (probe_table, "median"),
    "cells": (beside_plain, "least"),
    "grid": (grid_lines, "median"),
    "floor": (floor_lines, "median"),
    "latency": (latency_table, "median"),
}


def fill(text, folder):
    """A page with the tables between its markers made anew from the results in ``folder``.

    A marker names a file and the arguments of ``summary``, or the file alone for ``markdown``:
    ``<!-- bench cpu.json base other [bound [pass]] -->`` ... ``<!-- end -->``. A word of ``TABLES`` names another
    table, whose arguments follow; ``overview`` takes several files, joined by +. Raises ValueError for a marker without
    its end, for results of a rehearsal, and where a table has nothing to show.
    """

    def made(found):
        names, *arguments = found[1].split()
        documents = [load(Path(folder) / name) for name in names.split("+")]
        document = documents[0]
        if any(one.get("rehearsal") for one in documents):
            raise ValueError(f"{names}: a rehearsal measures nothing")
        if arguments[:1] == ["overview"]:
            lines = overview(documents, *arguments[1:])
        elif len(documents) > 1:
            raise ValueError(f"{names}: only an overview takes several files")
        elif not arguments:
            lines = markdown(document)
        else:
            make, counted = TABLES.get(arguments[0], (summary, "median"))
            given = arguments[1:] if arguments[0] in TABLES else arguments
            lines = [machine_line(document, counted), "", *make(document, *given)]
        return "\n".join([f"<!-- bench {found[1]} -->", *lines, "<!-- end -->"])

    if text.count("<!-- bench ") != text.count("<!-- end -->"):
        raise ValueError("a marker <!-- bench ... --> has no <!-- end -->")
    return re.sub(r"<!-- bench (.+?) -->\n.*?<!-- end -->", made, text, flags=re.S)


def html(documents):
    """One self-contained page of several documents, name -> document: tables, pictures, environment, reasons."""
    parts = [_HEAD]
    for name, document in documents.items():
        parts.append(f"<h2>{escape(name)}</h2><p>{escape(machine_line(document))}</p>")
        names = rivals(document)
        if names:
            rows = [
                f"<tr><td>{escape(row['name'])}"
                + "".join("<td>" + escape(" ".join(" ".join(_cells(row, rival, names[0])).split())) for rival in names)
                for row in document["cases"]
            ]
            heads = "".join(f"<th>{escape(rival)}" for rival in names)
            parts.append(f"<table><tr><th>case{heads}\n" + "\n".join(rows) + "</table>")
            parts.append("<p>" + "<br>".join(escape(line) for line in notes(document)) + "</p>")
            fields = ["size", *(axis for axis in "TBH" if len({row["case"][axis] for row in document["cases"]}) > 2)]
            for kind in [
                kind
                for kind in KINDS
                if kind in fields or (kind == "crossover" and len(names) > 1) or kind == "roofline"
            ]:
                picture = io.StringIO()
                plot(document, picture, kind)
                parts.append(f"<details open><summary>{kind}</summary>{_inline(picture.getvalue())}</details>")
        facts = {
            key: document.get(key)
            for key in ("command", "started", "threads", "rounds", "l2", "environment", "ceilings")
        }
        parts.append(f"<details><summary>machine</summary><pre>{escape(json.dumps(facts, indent=1))}</pre></details>")
    return "\n".join(parts) + "\n</html>\n"


def _inline(svg):
    return svg[svg.index("<svg") :]


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>gpurnn benchmark</title><style>
body { font: 15px/1.4 sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .15em .7em; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f3f3f3 } svg { max-width: 100% }
</style><h1>gpurnn benchmark</h1>"""
