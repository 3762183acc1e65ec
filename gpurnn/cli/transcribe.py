"""``gpurnn transcribe``: the text of what is said in recordings."""

from pathlib import Path

import click

from .. import run_folder
from ..data.audio import is_silent, read_audio
from ..data.utterances import sound_features
from ..errors import DivergedError, one_line
from ..tasks.speech.decode import aligned, known_rate, transcribe
from ..tasks.trained import load, read_run
from . import options


@click.command(
    "transcribe",
    epilog="""\b
Examples:
  gpurnn transcribe runs/speech-1 hello.wav
  gpurnn transcribe runs/speech-1 *.flac --beam 16
  gpurnn transcribe runs/speech-1 hello.wav --plot hello.png""",
)
@options.run
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--beam", type=click.IntRange(1), help="Width of the beam: texts followed at once  [default: the best path alone]"
)
@click.option("--plot", type=click.Path(dir_okay=False), help="PNG file to draw: the first FILE and its characters.")
@options.overwrite
@options.backend
@options.max_memory
@options.as_json
@click.pass_context
def command(ctx, run, files, beam, plot, overwrite, backend, as_json):
    """Write down what is said in each sound FILE, with the trained model in the folder RUN.

    A FILE is WAV; or FLAC, OGG or MP3, which needs soundfile (pip install "gpurnn[audio]"). A bad file among several is
    skipped and named on standard error; the exit code is then 1.
    """
    trained = load(run, backend, "speech")
    if plot and "classes" in trained.facts:
        raise click.UsageError("--plot shows characters over time: this model knows only classes.")
    run_folder.check_outputs(run, [*files, *read_run(run)[1]["files"]], overwrite, plot=plot)
    rates = [known_rate(trained, file) for file in files]
    results = []
    for file, rate in zip(files, rates, strict=True):
        try:
            features, silent = _features(file, trained.settings, rate)
            found = transcribe(trained, features, beam)
        except (ValueError, OSError, ImportError) as error:
            if len(files) == 1 or isinstance(error, DivergedError):
                raise
            text = one_line(error, 2000)
            options.say(f"Error: {text}", err=True)
            results.append({"file": file, "error": text})
            continue
        if silent:
            options.say(f"Note: {file} is silent. What is heard in it means nothing.", err=True)
        if plot:
            _plot(plot, file, features, found, trained)
            plot = None
        found.pop("posteriors", None)
        results.append({"file": file} | found | {"silent": silent})
        if not as_json:
            options.say(f"{file}\t{found['text']}")
    heard = [result["text"] for result in results if "text" in result]
    if "vocabulary" in trained.facts and heard and not any(heard):
        options.say("Note: nothing is heard in any file. A model that is trained too little hears nothing.", err=True)
    if as_json:
        options.print_json(results)
    if any("error" in result for result in results):
        ctx.exit(1)


def _features(file, settings, rate):
    """(features, whether it is silent) of a sound file."""
    samples, given = read_audio(file)
    return sound_features(samples, given, settings, rate, file)[0], is_silent(samples)


def _plot(png, file, features, found, trained):
    from ..plots import plot_transcription

    characters, settings = trained.facts["vocabulary"], trained.settings
    steps = aligned(found["posteriors"], found["text"], characters)
    places = [(step, characters.index(character) + 1) for step, character in zip(steps, found["text"], strict=True)]
    timing = {"hop": settings.hop / 1000, "stack": settings.stack}
    title = f"{Path(file).name}: {found['text'] or 'nothing is heard'}"
    plot_transcription(features, found["posteriors"], characters, png, places=places, title=title, **timing)
