"""``gpurnn sample``: text written by a trained model."""

import itertools

import click

from .. import rng
from ..data.vocabulary import vocabulary_of
from ..tasks.text import sample
from ..tasks.trained import load
from . import options


@click.command(
    "sample",
    epilog="""\b
Examples:
  gpurnn sample runs/text-1 --prompt "The " --length 1000
  gpurnn sample runs/text-1 --temperature 0        the likeliest each time
  gpurnn sample runs/text-1 --top-p 0.9 --seed 1   the same text each time""",
)
@options.run
@click.option("--prompt", default="", show_default=False, help="Text that the model continues.")
@click.option("--length", default=300, help="Characters or words to write.")
@click.option(
    "--temperature", default=0.8, help="Below 1: safer, duller text; above 1: wilder. 0: always the likeliest."
)
@click.option("--top-k", type=int, help="Choose among the K likeliest only.")
@click.option("--top-p", type=float, help="Choose among the likeliest, whose probabilities add up to P.")
@click.option("--seed", type=int, help="Seed of the draws  [default: a fresh one]")
@options.backend
@options.max_memory
@options.as_json
def command(run, prompt, length, temperature, top_k, top_p, seed, backend, as_json):
    """Write text with the trained model in the folder RUN."""
    trained = load(run, backend, "text")
    vocabulary = vocabulary_of(trained.facts["vocabulary"])
    seed = rng.short_seed() if seed is None else rng.check_seed(seed)
    characters = sample(trained.model, vocabulary, prompt, length, temperature, top_k, top_p, seed)
    unknown = vocabulary.unknown(prompt)
    if unknown:
        options.say(f"The model never saw {unknown!r} of the prompt: taken as unknown.", err=True)
    if as_json:
        options.print_json({"prompt": prompt, "unknown": unknown, "seed": seed, "text": "".join(characters)})
        return
    options.say_pieces(itertools.chain([prompt], characters))
