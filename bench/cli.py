"""``gpurnn bench``: list, run, show, compare, crossover, plot, report, options, parallel, on-gpu."""

import os
import shlex
import shutil
import sys
import textwrap
import time
from pathlib import Path

import click

from gpurnn.backends.cpu.native import ISAS
from gpurnn.cli.options import FullHelpGroup

from .cases import ITEMSIZE, PASSES, SUITES, select
from .cells import CELLS, PLAIN
from .doubles import DOUBLES
from .options import command as options_command
from .parallel import command as parallel_command
from .plots import KINDS
from .rivals import HIDDEN, RIVALS, USUAL, USUAL_OF_OPTIONS, missing, packages

_STARTED = time.monotonic()  # of this process, nearly
_PAGES = ("README.md", "gpurnn/docs/speed.md")  # with tables made from results
_file = click.argument("file", type=click.Path(exists=True, dir_okay=False))


class _Commands(FullHelpGroup):
    def list_commands(self, ctx):
        return [name for name in super().list_commands(ctx) if not self.commands[name].hidden]


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 80},
)
def main():
    """Time gpurnn's backends and their rivals side by side."""


@main.command("list")
def list_():
    """List the suites, the rivals with what each lacks on this machine, and the cells."""
    suites = {name: f"{len(cases()):5} cases  {text}" for name, (cases, text) in SUITES.items()}
    rivals = {name: f"{text}: {(missing(name) or 'ready').partition('. ')[0]}" for name, (_, _, text) in RIVALS.items()}
    cells = {"--cell": ", ".join(CELLS)}
    click.echo("\n".join([*_columns(suites, indent=14), "", *_columns(rivals), "", *_columns(cells)]))


def _columns(rows, indent=0):
    """Lines of names and texts side by side, wrapped to the terminal; ``indent``: how far a second line goes in."""
    width = max(map(len, rows)) + 2
    for name, text in rows.items():
        yield textwrap.fill(
            f"{name:{width}}{text}", shutil.get_terminal_size().columns, subsequent_indent=" " * (width + indent),
            break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip


@main.command(
    epilog="""\b
Examples:
  gpurnn bench run                               the quick suite, on the CPU
  gpurnn bench run --suite house --cell lstm -H 256 -H 1024 --pass train
  gpurnn bench run --rival gpurnn-cuda --rival torch-cuda --suite flashrnn
Options such as -H replace the suite's own values; repeated ones are combined."""
)
@click.option("--suite", type=click.Choice(list(SUITES)), default="quick")
@click.option(
    "--rival", "names", multiple=True, type=click.Choice([*RIVALS]), help="[default: the usual ones that work here]"
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    type=click.Choice(["cpu", "numpy", "cupy", "cuda"]),
    help="Short for --rival gpurnn-...",
)
@click.option(
    "--cell", multiple=True, type=click.Choice(list(CELLS)), metavar="NAME",
    help="Such as lstm or layer_norm_lstm; `gpurnn bench list` names them.",
)  # fmt: skip
@click.option("-T", "T", multiple=True, type=click.IntRange(1))
@click.option("-B", "B", multiple=True, type=click.IntRange(1))
@click.option("-H", "H", multiple=True, type=click.IntRange(1))
@click.option("-L", "L", multiple=True, type=click.IntRange(1))
@click.option("--dtype", multiple=True, type=click.Choice(list(ITEMSIZE)))
@click.option("--precision", multiple=True, type=click.Choice(["float32", "fma", "tf32"]))
@click.option("--pass", "what", multiple=True, type=click.Choice(PASSES))
@click.option("--bidirectional", is_flag=True, help="Both directions in every case.")
@click.option("--only", multiple=True, help="Only cases with one of these in their name.")
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="Threads of BLAS and torch.")
@click.option("--isa", type=click.Choice(ISAS), help="Instruction set of gpurnn; with avx2 also of torch and JAX.")
@click.option("--rounds", type=click.IntRange(1), default=4, help="Turns of each rival; the median counts.")
@click.option("--seconds", type=float, default=0.08, help="Least duration of a turn; a third more goes before it.")
@click.option("--limit", type=float, help="Most seconds of a rival's turns in a case: fewer turns for slow ones.")
@click.option("--steps", type=click.IntRange(0), default=0, help="Also clock this many runs one by one: p50, p99.")
@click.option(
    "--merge", type=click.Choice(["missing", "all"]),
    help="Keep what --out has: time what is missing there, or time all cases and replace them there.",
)  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file  [default: bench-DATE.json]")
def run(suite, names, backends, only, out, bidirectional, merge, **options):
    """Time the cases of a suite; results are written after each case."""
    from tqdm import tqdm

    from gpurnn.files import fresh_path

    from .report import table
    from .run import run as run_cases

    how = {name: options.pop(name) for name in ("threads", "isa", "rounds", "seconds", "limit", "steps")}
    if merge and not out:
        raise click.UsageError("--merge: give --out, the file that has cases already")
    cases = select(suite, bidirectional=(True,) if bidirectional else (), **options)
    cases = [case for case in cases if not only or any(part in case.name for part in only)]
    if not cases:
        raise click.UsageError(f"--only: no case of this suite has {' or '.join(only)} in its name")
    names = [*names, *(f"gpurnn-{backend}" for backend in backends)]
    usual = USUAL if all(case.cell in PLAIN for case in cases) else (*USUAL, *USUAL_OF_OPTIONS)
    names = names or [name for name in usual if missing(name) is None]
    out = out or str(fresh_path(time.strftime("bench-%Y%m%d-%H%M%S"), ".json"))
    try:
        document = run_cases(
            cases, names, out=out, merge=merge, **how,
            command=shlex.join(["gpurnn", "bench", *(part.replace(out, Path(out).name) for part in sys.argv[1:])]),
            progress=lambda cases: tqdm(cases, unit=" cases", leave=False, disable=None),
        )  # fmt: skip
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for line in table(document, columns=shutil.get_terminal_size().columns):
        click.echo(line)
    click.echo(f"written to {out}")
    if any(result["status"] in ("wrong", "failed") for row in document["cases"] for result in row["results"].values()):
        click.get_current_context().exit(1)


@main.command()
@click.option("--fast", type=click.Choice([*RIVALS]), default="gpurnn-cuda")
@click.option("--slow", type=click.Choice([*RIVALS]), default="gpurnn-cpu")
@click.option("-H", "H", multiple=True, type=click.IntRange(1), default=(64, 128, 256, 512))
@click.option("-B", "B", multiple=True, type=click.IntRange(1), default=(1, 4, 16, 64))
@click.option("--threads", type=click.IntRange(1), default=os.cpu_count(), help="Threads of BLAS and torch.")
@click.option("--out", type=click.Path(dir_okay=False), help="Also write the results here.")
def crossover(fast, slow, H, B, threads, out):
    """Find the batch size from which the GPU wins on this machine, for each cell, pass and H."""
    from tqdm import tqdm

    from .report import crossings
    from .run import run as run_cases

    for name in (fast, slow):
        if missing(name):
            raise click.ClickException(f"{name} cannot run here: {missing(name)}")
    cases = select("quick", H=H, B=B)
    document = run_cases(
        cases, (fast, slow), threads=threads, rounds=3, seconds=0.05, out=out, command="crossover",
        progress=lambda cases: tqdm(cases, unit=" cases", leave=False, disable=None),
    )  # fmt: skip
    for (cell, what, size), batch in crossings(document, fast, slow).items():
        found = "never here" if batch is None else f"from B {batch}"
        click.echo(f"{cell:5}{what:10} H {size:5}  {fast} is faster than {slow} {found}")


@main.command()
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file  [default: probe-DATE.json]")
@click.option("--only", multiple=True, help="Names of measurements.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON instead of lines.")
def probe(out, only, as_json):
    """Measure the GPU: launches, hops between blocks, barriers, clusters, rates."""
    import json

    from tqdm import tqdm

    from gpurnn.files import fresh_path

    from .machine import environment
    from .probe import MEASUREMENTS, lines
    from .probe import probe as measure
    from .probe_device import Gpu
    from .results_file import FORMAT, write

    if missing("gpurnn-cuda"):
        raise click.ClickException(f"no GPU to measure: {missing('gpurnn-cuda')}")
    unknown = set(only) - MEASUREMENTS.keys()
    if unknown:
        raise click.UsageError(f"--only: expected some of {', '.join(MEASUREMENTS)}, got {', '.join(sorted(unknown))}")
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    found = measure(Gpu(), only or tuple(MEASUREMENTS), lambda names: tqdm(names, leave=False, disable=None))
    out = out or str(fresh_path(time.strftime("probe-%Y%m%d-%H%M%S"), ".json"))
    document = {
        "format": FORMAT, "kind": "probe", "started": started, "environment": environment(packages()), "probe": found,
    }  # fmt: skip
    write(out, document)
    if as_json:
        click.echo(json.dumps(document, indent=1))
        return
    for line in lines(found):
        click.echo(line)
    click.echo(f"written to {out}")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, in seconds, instead of a table.")
def host(as_json):
    """Measure the Python of a call on the backend "cuda", over a device that launches nothing: no GPU is needed."""
    import json

    from .host import lines, measure

    found = measure()
    click.echo(json.dumps(found, indent=1) if as_json else "\n".join(lines(found)))


@main.command()
@_file
def show(file):
    """Print the table of a results file."""
    from .report import table
    from .results_file import load

    for line in table(load(file), columns=shutil.get_terminal_size().columns):
        click.echo(line)


@main.command()
@click.argument("old", type=click.Path(exists=True, dir_okay=False))
@click.argument("new", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--fail-below", type=float, help="Exit code 1 where a case is significantly below this many times as fast."
)
def compare(old, new, fail_below):
    """Compare two results files: how many times as fast NEW is as OLD, case by case, each with its 95 % interval."""
    from .report import compare as compare_documents
    from .results_file import load

    rows = compare_documents(load(old), load(new))
    if not rows:
        raise click.ClickException("the files have no timed case in common")
    slow = False
    for case, rival, middle, low, high, significant in rows:
        verdict = "" if significant else "  not significant"
        click.echo(f"{case}  {rival}  {middle:.3f}  [{low:.3f}, {high:.3f}]{verdict}")
        slow |= fail_below is not None and high < fail_below
    if slow:
        click.get_current_context().exit(1)


@main.command()
@_file
@click.option("--kind", type=click.Choice(KINDS), default="size", help="What is drawn; T, B, H: against that axis.")
@click.option("--out", type=click.Path(dir_okay=False), help="PNG or SVG file  [default: beside FILE]")
def plot(file, kind, out):
    """Draw a results file: time against size, roofline or crossover, a panel for each cell and pass."""
    from gpurnn.files import refuse_same

    from .plots import plot as draw
    from .results_file import load

    out = out or str(Path(file).with_suffix(".png" if kind == "size" else f".{kind}.png"))
    refuse_same(out, [file])
    draw(load(file), out, kind)
    click.echo(out)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--html", "page", type=click.Path(dir_okay=False), help="Write one self-contained HTML page instead.")
def report(files, page):
    """Print results files as Markdown tables, or write an HTML page with pictures."""
    from .report import html, markdown
    from .results_file import load

    documents = {Path(file).stem: load(file) for file in files}
    if page:
        _write_page(page, html(documents), files)
        click.echo(page)
        return
    for name, document in documents.items():
        click.echo(f"## {name}\n")
        for line in markdown(document):
            click.echo(line)
        click.echo()


def _write_page(page, text, reads=()):
    from gpurnn.files import refuse_same, write_text_atomic

    refuse_same(page, reads, "html")
    write_text_atomic(page, text)


main.add_command(options_command)
main.add_command(parallel_command)


@main.command()
@click.argument("pages", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@click.option("--results", type=click.Path(exists=True, file_okay=False), default="bench/results")
@click.option("--check", is_flag=True, help="Change nothing; exit code 1 where a table is not what the results say.")
def readme(pages, results, check):
    """Rebuild the tables of PAGES from committed results  [default: README.md and gpurnn/docs/speed.md]."""
    from .report import fill

    stale = False
    for page in pages or _PAGES:
        text = Path(page).read_text(encoding="utf-8")
        made = fill(text, results)
        stale |= made != text
        if not check:
            _write_page(page, made)
            click.echo(f"{page}: {'changed' if made != text else 'as it was'}")
    if check:
        click.get_current_context().exit(int(stale))


@main.command(
    "on-gpu",
    epilog="""\b
Examples:
  python -m bench on-gpu --part A --minutes 5.5
  python -m bench on-gpu --part B --minutes 5      at once after A, chosen by its results
  python -m bench on-gpu --part A --rehearse       the same on the CPU, to see that it is whole
  python -m bench on-gpu --collect runs/on-gpu --to bench/results/h200.json""",
)
@click.option("--part", type=click.Choice(["A", "B"]), default="A", help="A: is it right, how fast; B: what follows.")
@click.option("--minutes", type=click.FloatRange(0.1), default=5.5, help="Everything ends within these.")
@click.option("--out", type=click.Path(file_okay=False), help="Folder of the results  [default: runs/on-gpu]")
@click.option("--rehearse", is_flag=True, help="Small sizes on the emulator of the source checkout.")
@click.option("--collect", type=click.Path(exists=True, file_okay=False), help="Make one document of such a folder.")
@click.option("--to", type=click.Path(dir_okay=False), help="With --collect: the file to write.")
def on_gpu(part, minutes, out, rehearse, collect, to):
    """Run all measurements on a GPU rented by the minute, the most valuable first.

    Part A: versions, a check of every kernel, what the hardware costs, ours against cuDNN. Part B: a profile, tuning
    and tests where all was right, else a search for the cause. Results are appended to result.jsonl one by one, so a
    run that is cut short loses only its last case. The files are result.jsonl, log.txt and tuned.json. If the variable
    OUT names a folder, they are copied there, too.
    """
    from .on_gpu import collected, missing_gpu, run_part

    if collect:
        if not to:
            raise click.UsageError("--collect needs --to, the file to write")
        try:
            collected(collect, to)
        except ValueError as error:
            raise click.ClickException(str(error)) from error
        click.echo(to)
        return
    problem = missing_gpu(rehearse)
    if problem:
        raise click.ClickException(problem)
    mirror = os.environ.get("OUT")
    folder = out or ("runs/on-gpu-rehearsal" if rehearse else "runs/on-gpu")
    if mirror and Path(mirror).resolve() == Path(folder).resolve():
        mirror = None
    click.get_current_context().exit(run_part(part, minutes, folder, rehearse, start=_STARTED, mirror=mirror))


@main.command("gpu-worker", hidden=True)
@click.argument("kind")
@click.option("--answers", type=int, help="File descriptor for the answers.")
@click.option("--once", help="Do this one order instead of those on standard input.")
@click.option("--rehearse", is_flag=True)
def gpu_worker(kind, answers, once, rehearse):
    """A process of on-gpu."""
    from .gpu_orders import Session, work

    if once:
        import json

        session = Session(kind, rehearse)
        session.warm(pool=False)
        click.echo(json.dumps(session.do(json.loads(once)), default=str))
        return
    work(kind, answers, rehearse)


@main.command(hidden=True)
@click.argument("rival", type=click.Choice(["reference", *RIVALS, *DOUBLES, *HIDDEN]))
def worker(rival):
    """A rival's process."""
    from .run import work

    work(rival)
