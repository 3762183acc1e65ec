"""``gpurnn translate``: sentences translated into another language."""

import sys
from pathlib import Path

import click

from .. import run_folder
from ..data import tokens
from ..data.encodings import input_lines
from ..tasks.trained import load, read_run
from ..tasks.translate import translate, vocabularies
from . import options

_DRAWN = 8  # sentences that one picture of the attention may hold


@click.command(
    "translate",
    epilog="""\b
Examples:
  gpurnn translate runs/translate-1 "Where are you?"
  gpurnn translate runs/translate-1 < sentences.txt > translations.txt
  gpurnn translate runs/translate-1 "I am here." --attention alignment.png""",
)
@options.run
@click.argument("text", nargs=-1)
@click.option("--beam", type=int, help="Width of the beam; 1 is greedy search  [default: the run's]")
@click.option(
    "--length-penalty", type=float, help="0 favors short translations, more favors longer ones  [default: the run's]"
)
@click.option(
    "--attention", type=click.Path(dir_okay=False), help="PNG file to draw: which source words were read for each word."
)
@click.option("--encoding", help="Encoding of the standard input  [default: UTF-8]")
@options.overwrite
@options.backend
@options.max_memory
@options.as_json
def command(run, text, beam, length_penalty, attention, overwrite, encoding, backend, as_json):
    """Translate each TEXT with the model in the folder RUN, or each line of the standard input."""
    trained = load(run, backend, "translate")
    known, _ = vocabularies(trained)
    run_folder.check_outputs(run, read_run(run)[1]["files"], overwrite, attention=attention)
    shown = []
    size = None if as_json or attention else 1 if sys.stdin.isatty() else 8 * trained.settings.batch
    for sentences in [text] if text else input_lines(size, encoding):
        found = translate(trained, sentences, beam, length_penalty)
        unknown = known.unknown([token for translation in found for token in translation.source])
        if unknown:
            options.say(f"The model never saw {', '.join(unknown)}: read as unknown words.", err=True)
        shown += zip(sentences, found, strict=True) if as_json or attention else []
        if not as_json:
            for translation in found:
                options.say(translation.text)
    if as_json:
        documents = [
            {"source": sentence, "translation": one.text, "score": one.score, "source_tokens": tokens.shown(one.source),
             "tokens": tokens.shown(one.tokens), "attention": one.weights.round(4).tolist()}
            for sentence, one in shown
        ]  # fmt: skip
        options.print_json(documents)
    if attention:
        drawn = [one for _, one in shown if one.source]
        if not 0 < len(drawn) <= _DRAWN:
            raise ValueError(f"attention: a picture holds 1 to {_DRAWN} sentences, got {len(drawn)}")
        from ..plots import plot_attention

        alignments = [(one.weights, tokens.shown(one.source), [*tokens.shown(one.tokens), "(end)"]) for one in drawn]
        plot_attention(alignments, attention, f"Run {Path(run).resolve().name}: what each word read")
