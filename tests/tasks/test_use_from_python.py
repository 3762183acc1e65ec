"""What the functions of tasks answer to what people pass them in Python."""

from types import SimpleNamespace

import numpy as np
import pytest

from gpurnn.tasks import classify, series, speech, translate
from gpurnn.tasks.run import prepare

TINY = {"window": 4, "horizon": 2, "season": 1, "hidden": 4, "epochs": 1, "seed": 1, "backend": "cpu"}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("n,y\n" + "".join(f"{n},{n % 7}\n" for n in range(60)))
    return path


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_one_file_needs_no_list(table, tmp_path, kind):
    run = prepare("series", kind(table), tmp_path / "run", **TINY)
    run.close()
    assert run.files == [str(table)]


@pytest.mark.parametrize(
    "name, words", [("hidden_size", "Here it is called hidden"), ("horizn", "Did you mean horizon?")]
)
def test_an_unknown_setting_is_answered(table, tmp_path, name, words):
    with pytest.raises(TypeError, match=f"prepare, task series: unknown argument '{name}'. {words}"):
        prepare("series", [table], tmp_path / "run", **{name: 3})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "use, words",
    [
        (
            lambda it: classify.predict(it, "a good film"),
            r"texts: expected a list of texts, got one text: give \[text\]",
        ),
        (lambda it: translate.translate(it, "Go on."), "sentences: expected a list of texts, got one text"),
        (
            lambda it: series.forecast(it, "a.csv"),
            r"table: expected what read_table\(path, trained.facts\) returns, got str",
        ),
        (
            lambda it: speech.transcribe(it, "a.mp3"),
            r"features: expected an array \(T, bands\), got 'a.mp3'. Of a file",
        ),
        (lambda it: speech.transcribe(it, np.zeros(9)), "features: expected an array .*, got ndarray"),
    ],
)
def test_one_text_or_a_path_is_answered(use, words):
    """Before anything is asked of the model."""
    with pytest.raises(TypeError, match=words):
        use(SimpleNamespace())
