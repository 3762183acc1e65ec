"""``gpurnn classify``: the class of each text."""

from dataclasses import replace

import click
import numpy as np

from ..data.encodings import input_lines
from ..data.labelled import read_labelled
from ..data.vocabulary import vocabulary_of
from ..files import naming
from ..tasks.classify import how_of, lowered, predict
from ..tasks.trained import load
from . import options


@click.command(
    "classify",
    epilog="""\b
Examples:
  gpurnn classify runs/classify-1 "a moving and funny film" "dull"
  gpurnn classify runs/classify-1 --json < texts.txt
  gpurnn classify runs/classify-1 --file reviews.csv --text review""",
)
@options.run
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--file", "files", multiple=True, type=options.INPUT,
              help="A table, or one text on each line, as for training; may be repeated.")  # fmt: skip
@click.option(
    "--encoding", help="Encoding of the files  [default: the run's], or of the standard input  [default: UTF-8]"
)
@options.reading("text")
@click.option(
    "--top", type=click.IntRange(1), default=3, help="How many of the likeliest classes to show for each text."
)
@options.backend
@options.max_memory
@options.as_json
def command(run, texts, files, encoding, text, top, backend, as_json):
    """Name the class of each TEXT, with the trained model in the folder RUN.

    Without a TEXT or a --file, each line of the standard input is a text.
    """
    if texts and files:
        raise click.UsageError("give TEXTs or --file, not both.")
    trained = load(run, backend, "classify")
    classes = trained.facts["classes"]
    if files:
        how = how_of(trained.settings)
        how = replace(how, label=None, text=text or how.text, encoding=encoding or how.encoding)
        with naming(files):
            found = read_labelled(files, how, classes, labels=False)
        for note in found.notes:
            options.say(options.row("Note", note), err=True)
        texts = [one for one, _ in found.pairs]
    elif not texts:
        texts = [line for lines in input_lines(None, encoding) for line in lines]
    vocabulary = vocabulary_of(trained.facts["vocabulary"])
    unseen = [one for one in texts if one.strip() and not vocabulary.encode(lowered(one, trained.settings)).any()]
    if unseen:
        of = f" of {len(unseen):,} of {len(texts):,} texts" if len(texts) > 1 else ""
        options.say(f"The model knows nothing{of}: {unseen[0][:60]!r}. It only guesses.", err=True)
    results = []
    for one, p in zip(texts, predict(trained, texts), strict=True):
        likeliest = np.argsort(-p, kind="stable")[:top]
        results.append({"text": one, "classes": {classes[n]: round(float(p[n]), 4) for n in likeliest}})
    if as_json:
        options.print_json(results)
        return
    for result in results:
        shares = "  ".join(f"{name} {p:.1%}" for name, p in result["classes"].items())
        options.say(f"{shares}  {' '.join(result['text'].split())}")  # a cell of a table may have several lines
