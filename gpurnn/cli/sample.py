"""``gpurnn sample``: a text model writes."""

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
@click.option("--prompt", default="", show_default=False, help="What the model continues.")
@click.option("--length", default=300, help="Characters or words to write.")
@click.option("--temperature", default=0.8, help="Below 1: more likely, duller text; above: wilder. 0: the likeliest.")
@click.option("--top-k", type=int, help="Choose among the K likeliest only.")
@click.option("--top-p", type=float, help="Choose among the likeliest that have probability P together.")
@click.option("--seed", type=int, help="Seed of the draws  [default: a fresh one]")
@options.backend
@options.max_memory
@options.as_json
def command(run, prompt, length, temperature, top_k, top_p, seed, backend, as_json):
    """Let the trained model in the folder RUN write text."""
    trained = load(run, backend, "text")
    vocabulary = vocabulary_of(trained.facts["vocabulary"])
    seed = rng.check_seed(seed)
    characters = sample(trained.model, vocabulary, prompt, length, temperature, top_k, top_p, seed)
    unknown = vocabulary.unknown(prompt)
    if unknown:
        options.say(f"The model never saw {unknown!r} of the prompt: taken as unknown.", err=True)
    if as_json:
        options.print_json({"prompt": prompt, "unknown": unknown, "seed": seed, "text": "".join(characters)})
        return
    options.say_pieces(itertools.chain([prompt], characters))
