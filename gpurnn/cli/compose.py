"""``gpurnn compose``: a tune, written by a model of music or of ABC text."""

import itertools
import os
from pathlib import Path

import click

from .. import rng, run_folder
from ..data.midi import LOWEST, write_midi
from ..data.rolls import read_parts
from ..data.vocabulary import vocabulary_of
from ..errors import check_size
from ..files import write_text_atomic
from ..tasks.music import compose, compose_abc
from ..tasks.trained import load, read_run
from . import options


@click.command(
    "compose",
    epilog="""\b
Examples:
  gpurnn compose runs/music-1 --steps 128 --voices 4 --tempo 100
  gpurnn compose runs/music-1 --prompt start.mid --prompt-steps 16
  gpurnn compose runs/text-1 --tunes 3 --out tunes.abc    trained on ABC""",
)
@options.run
@click.option("--steps", default=64, help="Frames to write.")
@click.option("--temperature", default=0.8, help="Below 1: safer, duller; above 1: wilder. 0: always the likeliest.")
@click.option("--voices", type=int, help="Keys that sound in every frame  [default: as many as are drawn]")
@click.option("--prompt", help="What the model continues: a file of music; for ABC the tune's first lines.")
@click.option("--prompt-steps", default=16, help="Frames of the prompt that the model reads.")
@click.option("--tempo", default=90.0, help="Quarter notes a minute.")
@click.option("--tunes", default=1, help="ABC: tunes to write.")
@click.option("--length", default=1500, help="ABC: the most characters of a tune.")
@click.option("--seed", type=int, help="Seed of the draws  [default: a fresh one]")
@click.option("--out", type=click.Path(dir_okay=False),
              help="File to write  [default: a new tune.mid or tune.abc in RUN]")  # fmt: skip
@options.overwrite
@options.backend
@options.max_memory
@options.as_json
def command(
    run, steps, temperature, voices, prompt, prompt_steps, tempo, tunes, length, seed, out, overwrite, backend, as_json
):
    """Compose music with the trained model in the folder RUN.

    A run of the task music writes a MIDI file, and a picture beside it if Matplotlib is installed. A run of the task
    text that was trained on ABC writes ABC.
    """
    trained = load(run, backend)
    seed = rng.short_seed() if seed is None else rng.check_seed(seed)
    abc = trained.task.name == "text"
    if not abc and out and Path(out).suffix.lower() not in ("", ".mid", ".midi"):
        raise ValueError(
            f"out: {out} would hold MIDI: name the file such as {Path(out).stem}.mid; its picture goes beside it"
        )
    out = Path(out) if out else _fresh(run, ".abc" if abc else ".mid")
    reads = [*read_run(run)[1]["files"], *([prompt] if prompt and not abc else ())]
    ordinary = run_folder.check_outputs(run, reads, overwrite, out=out)
    if abc:
        if trained.settings.level != "characters":
            raise ValueError(f"{run} was trained on words: ABC tunes need a model of characters")
        made = compose_abc(
            trained.model, vocabulary_of(trained.facts["vocabulary"]), tunes, length, temperature,
            (prompt or "").replace("\\n", "\n"), seed,
        )  # fmt: skip
        text = "\n".join(made)
        write_text_atomic(out, text)
        if as_json:
            options.print_json({"file": str(out), "seed": seed, "tunes": made})
        else:
            options.say(f"{text}\n{out}")
        return
    if trained.task.name != "music":
        raise ValueError(
            f"{run} holds a run of the task {trained.task.name}, expected music, or text that was trained on ABC"
        )
    step = trained.settings.step
    start = None
    if prompt:
        pieces = [piece for part in read_parts([prompt], step).values() for piece in part]
        start = pieces[0][: check_size("prompt_steps", prompt_steps)]
    roll = compose(trained.model, steps, temperature, voices, start, seed)
    write_midi(out, roll, step, tempo)
    files, picture = [str(out)], out.with_suffix(".png")
    if ordinary and not run_folder.is_our_file(picture):
        options.say(f"No picture is drawn: {picture} is not one of gpurnn's, and stays.", err=True)
    elif ordinary:
        try:
            from ..plots import plot_roll

            title = f"{out.name}: {len(roll)} frames, seed {seed}"
            plot_roll(roll, picture, LOWEST, step, 0 if start is None else len(start), title)
            files.append(str(picture))
        except ImportError:
            pass  # no Matplotlib, no picture
    facts = {"files": files, "seed": seed, "frames": len(roll), "notes_per_frame": round(float(roll.sum(1).mean()), 3)}
    if as_json:
        options.print_json(facts)
    else:
        options.say("\n".join([*files, f"{len(roll)} frames, {facts['notes_per_frame']} keys in each, seed {seed}"]))


def _fresh(run, suffix):
    """The first of tune, tune-2, tune-3, ... in a run's folder that is free, as is the name of its picture."""
    for number in itertools.count(1):
        out = Path(run, "tune" if number == 1 else f"tune-{number}").with_suffix(suffix)
        if not (os.path.lexists(out) or os.path.lexists(out.with_suffix(".png"))):
            return out
