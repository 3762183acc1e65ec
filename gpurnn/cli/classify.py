"""``gpurnn classify``: which class a text is of."""

import click
import numpy as np

from ..data.encodings import input_lines
from ..tasks.classify import predict
from ..tasks.trained import load
from . import options


@click.command(
    "classify",
    epilog="""\b
Examples:
  gpurnn classify runs/classify-1 "a moving and funny film" "dull"
  gpurnn classify runs/classify-1 --json < texts.txt""",
)
@options.run
@click.argument("texts", metavar="[TEXT]...", nargs=-1)
@click.option("--top", type=click.IntRange(1), default=3, help="Classes to show for each text, the likeliest.")
@options.backend
@options.max_memory
@options.as_json
def command(run, texts, top, backend, as_json):
    """Which class each TEXT is of, by the trained model in the folder RUN.

    Without a TEXT, each line of the standard input is one.
    """
    trained = load(run, backend, "classify")
    texts = texts or [line for lines in input_lines(None) for line in lines]
    results = []
    for text, p in zip(texts, predict(trained, texts), strict=True):
        likeliest = np.argsort(-p, kind="stable")[:top]
        results.append(
            {"text": text, "classes": {trained.facts["classes"][n]: round(float(p[n]), 4) for n in likeliest}}
        )
    if as_json:
        options.print_json(results)
        return
    for result in results:
        options.say("  ".join(f"{name} {p:.1%}" for name, p in result["classes"].items()) + f"  {result['text']}")
