"""What came of ``bench on-gpu``: the table that ends a run, and one document for ``bench/results`` and the README."""

import statistics
from collections import Counter

from .ceilings import ceilings_of, floor_seconds
from .gpu_cases import from_dict
from .probe import lines as probe_lines
from .results_file import FORMAT, ratio, times

RIVALS = {"gpurnn": "gpurnn-cuda", "torch": "torch-cuda"}


def lines(records):
    """The records of one run as a table for a terminal."""
    if any(row["rehearsal"] for row in records):
        yield "A REHEARSAL ON THE CPU: no time below is a measurement of a GPU"
    groups = [group for group in dict.fromkeys(row["group"] for row in records) if group not in ("begin", "end")]
    for group in groups:
        rows = [row for row in records if row["group"] == group]
        counts = Counter(row["status"] for row in rows)
        yield f"-- {group}: " + ", ".join(f"{count} {status}" for status, count in counts.items())
        tables = {"headline": _headline, "probe": _probe, "tune": _tune, "variants": _variants}
        yield from tables.get(group, _others)(rows)


def _others(rows):
    """What was not right, those with the same reason together."""
    reasons = {}
    for row in rows:
        if row["status"] not in ("right", "done"):
            reasons.setdefault((row["status"], row.get("reason", "")[:160]), []).append(row["name"])
    for (status, reason), names in reasons.items():
        yield f"   {status}: {', '.join(names)}: {reason}"


def _variants(rows):
    for row in rows:
        yield f"   {row['status']:9} {row['name']}  {row.get('reason', '')[:100]}"


def _tune(rows):
    for row in rows:
        for size in row.get("rows", ()):
            found = [f"{key.partition('<')[0]} {seconds * 1e6:.2f}" for key, (seconds, _) in size["ways"].items()]
            if not row["rehearsal"]:
                yield f"   {size['name']}: us a timestep: {', '.join(found)}"
    yield from _others(rows)


def _probe(rows):
    for row in rows:
        if "probe" in row and not row["rehearsal"]:  # the emulator's clock is made up
            yield from (f"   {line}" for line in probe_lines({row["name"]: row["probe"]}))
    yield from _others([row for row in rows if "probe" not in row])


def _headline(rows):
    timed = [row for row in rows if row.get("rivals", {}).get("gpurnn", {}).get("samples")]
    width = max((len(row["name"]) for row in timed), default=0)
    if timed:
        yield f"   {'case':{width}} {'ours us':>10} {'torch us':>10} {'faster':>8}  {'a timestep':>10}  error / allowed"
    for row in timed:
        error = f"{row['worst']:.2g} / {row['allowed']:.2g}" if "worst" in row else row.get("reason", "")
        yield f"   {row['name']:{width}} {_times(row)}  {error}"
    yield from _others([row for row in rows if row not in timed])


def _times(row):
    """The columns of times; dashes in a rehearsal, whose times are those of a CPU at play."""
    if row["rehearsal"]:
        return f"{'-':>10} {'-':>10} {'-':>8}  {'-':>10}"
    ours, theirs = (row["rivals"].get(kind, {}).get("samples") for kind in ("gpurnn", "torch"))
    middle, steps = statistics.median(times(ours)), from_dict(row["parameters"]).steps
    other = f"{statistics.median(times(theirs)) * 1e6:,.0f}" if theirs else ""
    faster = f"{ratio(theirs, ours)[0]:.2f}x" if theirs else ""
    return f"{middle * 1e6:10,.0f} {other:>10} {faster:>8}  {middle / steps * 1e6:7.2f} us"


# ---- for bench/results


def collect(records):
    """One document of the last runs of both parts, as ``bench run`` writes them, with ``smoke`` and ``probe`` besides.

    Raises ValueError for rehearsals, and where there is nothing that was timed.
    """
    if any(row["rehearsal"] for row in records):
        raise ValueError("there are records of a rehearsal among these: they measure nothing")
    last = {row["part"]: row["run"] for row in records}
    records = [row for row in records if row["run"] == last[row["part"]]]
    groups = {}
    for row in records:
        groups.setdefault(row["group"], []).append(row)
    versions = [row for row in groups.get("versions", ()) if row["name"] == "versions" and "environment" in row]
    if not versions or not groups.get("headline"):
        raise ValueError("there are no versions, or nothing was timed: this is no run of part A")
    version, begin = versions[-1], groups["begin"][0]
    found = {row["name"]: row["probe"] for row in groups.get("probe", ()) if "probe" in row}
    ceilings = {"cpu": None, "gpu": ceilings_of(found)}
    torch = groups.get("torch", [{}])[-1]
    about = {"nvrtc": version.get("nvrtc")} | {key: torch.get(key) for key in ("torch", "torch_cuda", "cudnn")}
    rows = {row["name"]: row for row in groups["headline"] if row["status"] != "left out"}
    recorded = ("name", "status", "reason", "worst", "allowed", "parameters")
    return {
        "format": FORMAT, "kind": "gpu", "command": "gpurnn bench on-gpu", "started": begin["started"],
        "threads": version["environment"]["cpus"], "rounds": 3, "l2": "hot: nothing is flushed between runs",
        "environment": version["environment"] | about, "sources": version["sources"], "ceilings": ceilings,
        "smoke": [{key: row[key] for key in recorded if key in row} for row in groups.get("smoke", ())],
        "probe": found, "tuned": [size for row in groups.get("tune", ()) for size in row.get("rows", ())],
        "cases": [_case(row, ceilings) for row in rows.values()],
    }  # fmt: skip


def _case(row, ceilings):
    case = from_dict(row["parameters"])
    floors = {kind: floor_seconds(case, measured) for kind, measured in ceilings.items() if measured}
    results = {}
    for kind, name in RIVALS.items():
        rival = row.get("rivals", {}).get(kind)
        if rival and rival.get("samples"):
            results[name] = {"status": "timed", "median_s": statistics.median(times(rival["samples"]))} | rival
        else:
            results[name] = {"status": row["status"], "reason": row.get("reason", "")}
    if "worst" in row and results["gpurnn-cuda"]["status"] == "timed":
        results["gpurnn-cuda"] |= {"error": row["worst"], "where": row["where"], "allowed": row["allowed"]}
    about = {"name": case.name, "case": case.as_dict(), "flops": case.flops, "bytes": case.bytes, "steps": case.steps}
    return about | {"floors": floors, "results": results}


def smoke_line(document):
    """One sentence: how many kernels were right, and which not."""
    rows = [row for row in document.get("smoke", ()) if row["status"] != "left out"]
    bad = [row["name"] for row in rows if row["status"] != "right"]
    text = f"{len(rows) - len(bad)} of {len(rows)} layers agree with float64, forward and backward"
    return text + (f"; not: {', '.join(bad)}." if bad else ".")


def probe_table(document):
    """Lines of a Markdown table: what one dependent step costs."""
    yield "| measurement | |"
    yield "|---|---|"
    for name, value in document["probe"].items():
        head, *rest = probe_lines({name: value})
        yield f"| {head} | {'<br>'.join(line.strip() for line in rest)} |"
