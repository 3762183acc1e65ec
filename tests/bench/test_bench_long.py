"""Long sequences: what is measured, and how it is shown."""

import json
import sys

import pytest
from click.testing import CliRunner

from bench import long

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks of memory are read from /proc")


@linux
@pytest.mark.long
def test_long_sequences_are_measured_in_both_ways(tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "x.json"
    done = CliRunner().invoke(long.main, ["-T", "3000", "-T", "30000", "--rounds", "1", "--out", str(out)])
    assert done.exit_code == 0, done.output
    document = json.loads(out.read_text(encoding="utf-8"))
    everything, sqrt = document["measured"].values()
    assert [row["T"] for row in everything] == [row["T"] for row in sqrt] == [3000, 30000]
    assert everything[1]["recompute"] == 0 < sqrt[1]["recompute"] < 1
    assert sqrt[1]["beyond_bytes"] < everything[1]["beyond_bytes"] / 2
    assert out.with_suffix(".png").stat().st_size > 1000
    assert done.output.count("\n") == 5


def test_the_best_of_several_turns():
    turns = [{"T": 5, "cpu_s": 2.0, "peak_bytes": 7}, {"T": 5, "cpu_s": 1.0, "peak_bytes": 9}]
    assert long.best(turns) == {"T": 5, "cpu_s": 1.0, "peak_bytes": 7}
