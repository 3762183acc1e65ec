"""``python -m bench.c_export``: the table of exported headers."""

import shutil

import pytest
from click.testing import CliRunner

from bench import c_export


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_the_table_has_bytes_times_and_errors(monkeypatch):
    monkeypatch.setattr(c_export, "FLAGS", ("-O1",))
    monkeypatch.setattr(c_export, "MODELS", {"GRU": ("GRU", 256, 2)})
    arguments = ["--turns", "1", "--steps", "1", "--hidden", "16", "--no-onnx"]
    done = CliRunner().invoke(c_export.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.output.splitlines()[2:]]
    assert [row[:2] for row in rows] == [
        [name, form + less] for name in c_export.MODELS for less in ("", ", a quarter of the blocks")
        for form in c_export.FORMS
    ]  # fmt: skip
    for _, form, _, *times, error in rows:
        assert all(float(one) > 0 for one in times)
        assert 0 < float(error) < (0.05 if "int8" in form else 1e-5)
    assert rows[0][2] == f"{2 * 4 * (2 * 48 * 16 + 2 * 48):,}"


def test_a_compiler_that_is_not_here():
    done = CliRunner().invoke(c_export.main, ["--compiler", "no-such-compiler"])
    assert done.exit_code == 1 and "--compiler: no-such-compiler is not here" in done.output
