"""``gpurnn tune``: what it measures, keeps, and how it wins over the estimates; on the emulated GPU, whose own clock is
replaced where figures matter."""

import json
import logging
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers import cuda_ops

from gpurnn.backends import switch as backend
from gpurnn.backends.cuda import schedules
from gpurnn.backends.cuda.schedules import Device, Problem, constants, tuned_table, tuning
from gpurnn.cells import CELLS
from gpurnn.check import build
from gpurnn.cli import main
from gpurnn.errors import BackendError

H200 = Device(90, 132, 227 * 1024, name="NVIDIA H200")


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GPURNN_TUNED", str(tmp_path / "cache" / "tuned.json"))


def problem(**more):
    return Problem(**{"cell": CELLS["lstm"], "H": 128, "T": 512, "B": 16, "directions": 1,
                   "dtype": "float32",
                   "projected": False, "backward": False} | more)  # fmt: skip


LSTM128 = problem()


def known(seconds, problem=LSTM128, device=H200):
    """A table in which this work's ways take so many microseconds: way -> (a timestep, before)."""
    candidates = {candidate: (a * 1e-6, b * 1e-6) for candidate, (a, b) in seconds.items()}
    return tuned_table.Table({tuned_table.key(problem, device): candidates})


def test_what_was_measured_wins():
    found, _ = schedules.candidates(problem(), H200)
    best, other = [candidate for candidate in found if candidate.schedule == "block"][:2]
    grid = next(candidate for candidate in found if candidate.schedule == "grid")
    assert schedules.choose(problem(), H200)[0] == best
    table = known({"step": (1.5, 0), best.key: (2.0, 5), other.key: (1.9, 5), grid.key: (3.0, 5)})
    candidate, reason = schedules.choose(problem(), H200, measured=table)
    assert (
        candidate.schedule == "step"
        and "step: 512 timesteps of 1.50 us, measured" in reason
        and "1.90 us after" in reason
    )
    candidate, reason = schedules.choose(problem(), H200, "block", table)
    assert candidate.key == other.key and candidate.seconds == pytest.approx(1.9e-6) and candidate.measured
    # a call has its own price: worth it where there are many steps
    table = known({"step": (1.5, 0), best.key: (1.0, 50), grid.key: (3.0, 5)})
    assert schedules.choose(problem(), H200, measured=table)[0].key == best.key
    assert schedules.choose(problem(T=50), H200, measured=table)[0].schedule == "step"


def test_where_nothing_was_measured_estimates_count():
    estimated = schedules.choose(problem(), H200)
    table = known({"step": (0.01, 0), "block<128, 2, 40, 1, 0>": (9, 0)})
    for other in ({"H": 96}, {"B": 17}, {"backward": True}, {"dtype": "float16"}, {"tf32": True}, {"directions": 2}):
        assert schedules.choose(problem(**other), H200, measured=table) == schedules.choose(problem(**other), H200)
    assert schedules.choose(problem(), Device(90, 132, 227 * 1024, name="another"), measured=table) == estimated
    assert schedules.choose(problem(), H200, measured=known({"a way of an older version": (0.01, 0)})) == estimated
    assert schedules.choose(problem(B=9), H200, measured=table)[0].schedule == "step"  # up to the next power of two
    # only one schedule was measured: the other's estimate stands beside it
    candidates, _ = schedules.candidates(problem(), H200, known({"step": (1.5, 0)}))
    assert {candidate.measured for candidate in candidates if candidate.schedule == "step"} == {True}
    assert {candidate.measured for candidate in candidates if candidate.schedule == "block"} == {False}


def test_the_table_on_disk(caplog):
    assert not tuned_table.read().entries and not caplog.records
    table = known({"step": (1.5, 0), "block<128, 2, 40, 1, 0>": (0.5, 4)})
    tuned_table.write(table)
    assert tuned_table.read().entries == table.entries
    entry = next(iter(table.entries))
    table.estimates[entry] = {"step": (1e-6, 0.0)}
    tuned_table.write(table)
    assert tuned_table.read().estimates == table.estimates
    (row,) = tuning.rows(table)
    assert row["errors"] == pytest.approx({"step": 1.5})
    for broken in ("{", "[]", '{"format": 99, "entries": []}', '{"format": 1, "entries": [{"work": [1]}]}',
                   '{"format": 1, "entries": [{"work": [1], "ways": {"step": ["a", 0]}}]}'):  # fmt: skip
        tuned_table.path().write_text(broken)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert not tuned_table.read().entries
            assert "schedules are estimated" in caplog.text


def test_the_page_has_the_constants():
    assert constants.markdown() in (Path(constants.__file__).parents[3] / "docs/kernels.md").read_text(encoding="utf-8")
    assert all(one.unit and one.source and getattr(constants, one.name) == one.value for one in constants.TABLE)


def test_buckets():
    assert [tuned_table.bucket(B) for B in (0, 1, 2, 3, 4, 5, 16, 17)] == [1, 1, 2, 4, 4, 8, 16, 32]


def test_works():
    found = tuning.problems(["lstm", "rnn_tanh"], [7, 8], [3], ["float32", "float16"], directions=2, tf32=True)
    assert len(found) == 16 and {one.B for one in found} == {4} and {one.directions for one in found} == {2}
    assert {(one.dtype, one.tf32) for one in found} == {("float32", True), ("float16", False)}
    with pytest.raises(ValueError, match="cell should be one of"):
        tuning.problems(["elman"], [7], [3], ["float32"])


class Clock:
    """Time passes as kernels are launched: each costs what ``prices`` says of its file, a product 3 us."""

    def __init__(self, ops, prices):
        self.now = 0.0
        device = ops.device
        load, product = device.load, device.product

        def priced(file, expression, struct=None):
            kernel = load(file, expression, struct)

            def launch(grid, block, args, **how):
                T = int(args[0])
                fixed, by_step = prices[file]
                device._do(lambda: self.passes(fixed + by_step * T))
                kernel(grid, block, args, **how)

            return launch

        def priced_product(*args, **more):
            run = product(*args, **more)
            return lambda: (device._do(lambda: self.passes(3e-6)), run())

        device.load, device.product = priced, priced_product

    def passes(self, seconds):
        self.now += seconds

    def __call__(self):
        return self.now


@pytest.mark.emulated
@pytest.mark.parametrize("dtype, directions", [("float32", 1), ("float16", 2)])
def test_it_measures_timesteps_and_calls(dtype, directions):
    ops = cuda_ops(checked=False)
    clock = Clock(
        ops, {"step.cu": (2e-6, 0), "fused.cu": (1e-6, 0), "block.cu": (7e-6, 0.5e-6), "block_mma.cu": (9e-6, 0.25e-6)}
    )
    problems = tuning.problems(["gru"], [5], [2], [dtype], directions)
    table = tuning.tune(ops, problems, lengths=(2, 5), least=0.0, clock=clock)
    assert len(table.entries) == 2
    for one in problems:
        timed = table.known(one, ops.device.limits)
        assert {key.partition("<")[0] for key in timed} >= {"step", "block", "fused"}
        assert len(timed) <= 1 + 2 * tuning.OF_EACH_SCHEDULE
        for key, measured in timed.items():
            # panels of the weights and of h; of the weights, and the last product of each direction
            expected = {
                "step": (5e-6, 0),
                "fused": (1e-6, 1e-6 + directions * 3e-6 if one.backward else 2e-6),
                "block": (0.5e-6, 7e-6),
                "block_mma": (0.25e-6, 9e-6),
            }
            assert measured == pytest.approx(expected[key.partition("<")[0]], abs=1e-12), key
    ops.measured = table
    plan = build("gru", ops, dtype, H=5, bidirectional=directions == 2).plan(512, 2)
    assert plan.schedule == "block" and "measured" in plan.reason and "estimated" not in plan.reason
    assert tuning.tune(ops, [], clock=clock).entries == table.entries  # what was known stays


@pytest.mark.emulated
def test_a_way_that_does_not_run_is_left_out(monkeypatch):
    ops = cuda_ops(checked=False)
    load = ops.device.load

    def failing(file, expression, struct):
        if file == "block.cu":
            raise BackendError("does not compile")
        return load(file, expression, struct)

    monkeypatch.setattr(ops.device, "load", failing)
    problems = tuning.problems(["rnn_tanh"], [5], [1], ["float32"])
    table = tuning.tune(ops, problems, lengths=(1, 2), least=0.0)
    for problem in problems:
        assert {key.partition("<")[0] for key in table.known(problem, ops.device.limits)} == {"step", "fused"}


# ---- the command


def call(*arguments, code=0):
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


def test_without_a_gpu_it_says_so():
    if backend.backends()["cuda"] is None:
        pytest.skip("there is one")
    assert "cannot work here" in call("tune", code=1)
    assert "Nothing is known yet" in call("tune", "--show")


@pytest.mark.emulated
def test_the_command(monkeypatch):
    ops = cuda_ops(checked=False)
    ticks = iter(range(10**9))
    monkeypatch.setattr(sys.modules["gpurnn.backends"], "get_backend", lambda name=None: ops)
    monkeypatch.setattr(tuning.measure, "__defaults__", ((1, 2), 0.0, lambda: next(ticks) * 1e-6))
    told = call("tune", "--cell", "rnn_tanh", "--hidden", 5, "--batch", 1)
    assert "rnn_tanh H5 B1 float32 forward" in told and "2 time loops are known" in told
    assert max(map(len, told.splitlines()[:-1])) <= 80
    rows = json.loads(call("tune", "--show", "--json"))["rows"]
    assert all(error > 0 for row in rows for error in row["errors"].values()) and set(rows[0]["errors"]) == set(
        rows[0]["ways"]
    )
    assert len(rows) == 2 and {"step"} < set(rows[0]["ways"])
    assert "kernels are ready for sm_90" in call("warmup", "--dtype", "float32", "--cell", "rnn_tanh", "--hidden", 5)
    assert "Forgotten" in call("tune", "--forget") and "Nothing is known" in call("tune", "--show")


@pytest.mark.parametrize("option", ["--forget", "--dtype=float32"])
def test_a_file_that_is_no_table_stays(tmp_path, monkeypatch, option):
    notes = tmp_path / "notes.json"
    notes.write_text('{"mine": 1}')
    monkeypatch.setenv("GPURNN_TUNED", str(notes))
    done = CliRunner().invoke(main, ["tune", option])
    assert done.exit_code == 2 and "notes.json is not a table" in done.output
    assert notes.read_text() == '{"mine": 1}'
