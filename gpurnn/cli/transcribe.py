"""``gpurnn transcribe``: what is said in a recording."""

import click

from .. import run_folder
from ..data.utterances import wav_features
from ..tasks.speech.decode import known_rate, transcribe
from ..tasks.trained import load, read_run
from . import options


@click.command(
    "transcribe",
    epilog="""\b
Examples:
  gpurnn transcribe runs/speech-1 hello.wav
  gpurnn transcribe runs/speech-1 *.wav --beam 16
  gpurnn transcribe runs/speech-1 hello.wav --plot hello.png""",
)
@options.run
@click.argument("files", metavar="FILE.wav...", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@click.option("--beam", type=click.IntRange(1), help="Texts followed at a time  [default: the best path alone]")
@click.option("--plot", type=click.Path(dir_okay=False), help="PNG to draw the first FILE and its characters on.")
@options.backend
@options.max_memory
@options.as_json
def command(run, files, beam, plot, backend, as_json):
    """What is said in each WAV FILE, by the trained model in the folder RUN."""
    trained = load(run, backend, "speech")
    if plot and "classes" in trained.facts:
        raise click.UsageError("--plot shows characters over time: this model knows only classes.")
    run_folder.check_outputs(run, [*files, *read_run(run)[1]["files"]], plot=plot)
    results = []
    for file in files:
        features, _ = wav_features(file, trained.settings, known_rate(trained, file))
        found = transcribe(trained, features, beam)
        if plot and not results:
            from ..plots import plot_transcription

            timing = {"hop": trained.settings.hop / 1000, "stack": trained.settings.stack}
            characters = trained.facts["vocabulary"]
            plot_transcription(features, found["posteriors"], characters, plot, title=found["text"], **timing)
        found.pop("posteriors", None)
        results.append({"file": file} | found)
        if not as_json:
            options.say(f"{file}\t{found['text']}")
    if as_json:
        options.print_json(results)
