"""``bench.packed``: all layouts of sequences give what each sequence gives alone; what is wrong is not timed."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from optional import needs

import gpurnn
from bench import layouts, packed
from bench.judge import furthest, inputs

ROOT = Path(__file__).resolve().parents[2]
OURS = ("gpurnn packed", "gpurnn padded", "gpurnn bucketed", "gpurnn resets")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"BATCHES": 2, "SEQUENCES": 5, "ROWS": 3, "STEPS": 40, "MEDIAN": 4, "LONGEST": 9}.items():
        monkeypatch.setattr(packed, name, value)


def problems(H=6):
    return packed.problems((), (), [H])


def test_lengths_without_files_are_drawn():
    lengths = packed.drawn_lengths(1000)
    assert min(lengths) >= 1 and max(lengths) == packed.LONGEST and np.median(lengths) == packed.MEDIAN
    drawn, resets = problems()
    assert (drawn.name, resets.name) == (packed.DRAWN, packed.RESETS)
    assert [len(batch) for batch in drawn.batches] == [5, 5] and drawn.tokens == sum(map(sum, drawn.batches))
    assert resets.tokens == 3 * 40 and len(resets.batches[0]) > 3


def test_lengths_of_texts(tmp_path):
    (tmp_path / "a.txt").write_text("it's fine.\n\nno\n")
    (tmp_path / "b.pos").write_text("one two three\r\n")
    assert packed.text_lengths(tmp_path, "words") == [3, 1, 3]
    assert packed.text_lengths(tmp_path, "characters") == [10, 2, 13]
    assert packed.text_lengths(tmp_path / "a.txt", "words") == [3, 1]


@pytest.mark.parametrize("name", [*layouts.LAYOUTS, *layouts.RESET_LAYOUTS])
def test_every_layout_gives_what_each_sequence_gives_alone(name):
    if name not in OURS:
        needs("torch")
    problem = next(one for one in problems() if name in layouts.layouts_of(one))
    weights, _, _ = inputs(problem.case)
    expected = packed.reference(problem, weights)
    assert expected["output"].shape == expected["dx"].shape == (problem.tokens, 6)
    prepared = packed.Prepared(problem, weights, *layouts.layouts_of(problem)[name])
    prepared.run()
    assert furthest(prepared.results(), expected)[0] <= packed.allowed(problem.case)


def test_bucketed_batches_hold_the_same_sequences():
    drawn, _ = problems()
    mixed, bucketed = (
        [pair for sequences, _, numbers in drawn.data(bucket) for pair in zip(numbers, sequences, strict=True)]
        for bucket in (False, True)
    )
    assert [n for n, _ in mixed] == list(range(10)) != [n for n, _ in bucketed]
    lengths = [len(x) for _, x in bucketed]
    assert lengths == sorted(lengths)
    for (n, x), (m, y) in zip(mixed, sorted(bucketed, key=lambda one: one[0]), strict=True):
        assert n == m and np.array_equal(x, y)
    filled = packed.filled(drawn)
    longest = [max(batch) for batch in drawn.batches]
    assert filled["padded"] == drawn.tokens / (5 * sum(longest)) < filled["bucketed"] <= 1
    assert filled["padded"] < filled["packed"] <= 1


def without(name):
    """What calls the layer with all marks but one."""

    def call(layout, x, doutput, **marks):
        marks.pop(name)
        output, _, backward = layout.layer.forward(x, **marks)
        return output, backward(doutput)[0]

    return call


@pytest.mark.parametrize("name, mark", [("gpurnn packed", "reset"), ("gpurnn resets", "reset")])
def test_a_wrong_layout_is_not_timed(monkeypatch, name, mark):
    monkeypatch.setattr(layouts._Gpurnn, "call", without(mark))
    problem = next(one for one in problems() if name in layouts.layouts_of(one))
    row = packed.measure(problem, rounds=1, seconds=0, names=[name])
    result = row["results"][name]
    assert result["status"] == "wrong" and "samples" not in result and result["error"] > 10 * row["allowed"]
    assert f"  {name:24}wrong: {result['where']}" in packed.table(row)


def test_a_library_that_is_absent_is_named(monkeypatch):
    def absent(problem, weights):
        raise ImportError("No module named 'torch'")

    monkeypatch.setitem(layouts.LAYOUTS, "torch packed", (absent, False))
    row = packed.measure(problems()[0], rounds=1, seconds=0, names=["torch packed", "gpurnn packed"])
    assert row["results"]["torch packed"] == {"status": "not here", "reason": "No module named 'torch'"}
    assert "  torch packed            not here: No module named 'torch'" in packed.table(row)


def test_the_command_writes_and_prints(tmp_path, monkeypatch):
    lines = tmp_path / "texts" / "lines.txt"
    lines.parent.mkdir()
    lines.write_text("".join(f"{'word ' * (n % 7 + 1)}\n" for n in range(12)))
    arguments = ["--words", str(lines), "-H", "5", "--rounds", "2", "--seconds", "0.001", "--out", str(tmp_path / "x")]
    monkeypatch.setattr("sys.argv", ["packed", *arguments])
    done = CliRunner().invoke(packed.main, arguments)
    assert done.exit_code == 0, done.output
    document = json.loads((tmp_path / "x").read_text())
    expected = "python -m bench.packed --words lines.txt -H 5 --rounds 2 --seconds 0.001 --out x"
    assert (document["kind"], document["command"]) == ("packed", expected)
    assert document["environment"]["gpurnn"] == gpurnn.__version__
    words, resets = document["problems"]
    assert words["name"] == "words of lines" and resets["name"] == packed.RESETS
    for row in (words, resets):
        for name in set(row["results"]) & set(OURS):
            samples = row["results"][name]["samples"]
            assert len(samples) == 2 and all(one["cpu_s"] > 0 and one["runs"] > 0 for one in samples)
    assert done.output.startswith("words of lines, H 5: 10 sequences, median ")
    assert f"  {'gpurnn packed':24}" in done.output and "1.00 (1.00 to 1.00)" in done.output
    lines.write_text("too few\n")
    done = CliRunner().invoke(packed.main, arguments)
    assert done.exit_code == 1 and "expected at least 10 sequences, got 1" in done.output


def test_the_page_has_the_figures_of_the_results():
    document = json.loads((ROOT / "bench/results/packed_cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "gpurnn/docs/lengths.md").read_text(encoding="utf-8")
    for name, resets in (("packed", False), ("resets", True)):
        shown = page.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0]
        lines = list(packed.markdown(document, resets))
        assert len(lines) > 2 and shown.splitlines() == lines
    for row in document["problems"]:
        assert all(result["status"] == "timed" and len(result["samples"]) == 4 for result in row["results"].values())
    assert document["threads"] == 1 and document["rounds"] == 4
