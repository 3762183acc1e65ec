"""Cells with options in the benchmark: what a case needs, and rivals written by hand that agree with gpurnn."""

import importlib.util
import io
import tokenize

import pytest
from click.testing import CliRunner
from helpers import ROOT
from optional import needs

from bench import own_cell, report
from bench.cases import Case, select
from bench.cells import CELLS, OPTIONS, PLAIN, record
from bench.cli import main
from bench.judge import allowed, furthest, inputs, reference
from bench.rivals import HIDDEN, RIVALS, missing, refuses
from bench.rivals.gpurnn import build, first_draws
from bench.rivals.own_cell import LIBRARIES, code_lines
from bench.rivals.prepared import is_judged
from bench.run import run as run_cases
from gpurnn.cells import library

DRAWING = ("zoneout_lstm", "recurrent_dropout_gru", "variational_dropout_rnn", "weight_dropout_lstm")

# inference where it is more than the output of training: it draws nothing
PASSES = [*((cell, "train") for cell in CELLS), *((cell, "inference") for cell in ("lstm", *DRAWING))]

needs_jax = pytest.mark.skipif(missing("jax") is not None, reason="needs jax")


def agrees(name, case):
    """The largest error of a rival as a share of what is allowed; its results have every gradient that is judged."""
    expected = reference(case, *inputs(case))
    return furthest((RIVALS | HIDDEN)[name][0](case, *inputs(case)).results(), expected)[0] / allowed(case)


@pytest.mark.parametrize("cell", CELLS)
def test_what_a_case_needs_is_what_the_layer_has(cell):
    for case in (Case(cell, 7, 3, 5, 4, L=2, bidirectional=True), Case(cell, 7, 3, 5, 4, what="step", V=11)):
        model = build(case, "numpy", "float32")
        assert case.parameters == model.parameter_count
        grads = [name for name in model.grads if is_judged(name)]
        layers = sum(model.params[name].size for name in model.params if "weight_ih" in name or "weight_hh" in name)
        D = 2 if case.bidirectional else 1
        products = 2 * case.tokens * (layers + D * case.H * case.V)
        assert grads and case.flops == products * (3 if case.what == "step" else 1)


@needs("torch")
@pytest.mark.parametrize("what", ["train", "inference"])
@pytest.mark.parametrize("more", [{"resets": 0.2}, {"heads": 4}], ids=str)
def test_resets_and_heads_in_torch_agree(more, what):
    case = Case("lstm", 9, 6, 8, 5, what=what, **more)
    assert all(agrees(name, case) <= 1 for name in ("gpurnn-cpu", "torch-cpu"))
    assert refuses("jax", case) in ("no resets", "no heads") and refuses("gpurnn-cuda", case) is None
    plain = Case("lstm", 9, 6, 8, 5, what=what)
    assert (case.flops < plain.flops) == ("heads" in more) and case.name != plain.name
    model = build(case, "numpy", "float32")
    assert case.parameters == model.parameter_count


def test_every_option_and_every_cell_of_the_library_has_a_name():
    for kind in PLAIN:
        assert {f"{option}_{kind}" for option in OPTIONS[kind]} <= CELLS.keys()
    cells = {name for name, value in vars(library).items() if getattr(value, "__module__", "") == library.__name__}
    assert {name for name in cells if not name.startswith("_")} <= CELLS.keys()
    assert record("layer_norm_lstm").means and record("zoneout_lstm").draws and not record("lstm").draws
    suite = [case.cell for case in select("cells", what=("train",))]
    assert suite[:3] == list(PLAIN) and {f"{name}_lstm" for name in OPTIONS["lstm"]} < set(suite)


@pytest.mark.long
@needs("torch")
@pytest.mark.parametrize("cell, what", PASSES)
def test_a_loop_in_torch_agrees(cell, what):
    """gpurnn beside them for some cells: to compile each takes longer than all else here, and other tests do."""
    case = Case(cell, 6, 3, 9, 5, L=2, bidirectional=True, what=what)
    ours = ["gpurnn-cpu"] if cell in (*PLAIN, *DRAWING) else []
    for name in (*ours, "torch-loop", "haste-torch"):
        if not (missing(name) or refuses(name, case)):
            assert agrees(name, case) <= 1, name


@pytest.mark.long
@needs_jax
@pytest.mark.parametrize("cell, what", PASSES)
def test_a_scan_in_jax_agrees(cell, what):
    """In both directions for the plain cells and some that draw masks: a scan backward knows nothing of its cell."""
    both = cell in (*PLAIN, *DRAWING)
    assert agrees("jax", Case(cell, 6, 3, 9, 5, bidirectional=both, what=what)) <= 1


@needs("torch")
@pytest.mark.parametrize("cell", DRAWING)
def test_other_masks_and_left_out_masks_are_seen(cell, monkeypatch):
    case = Case(cell, 6, 3, 9, 5, what="train")
    assert agrees("torch-loop", case) <= 1
    masks, weight = first_draws(case)[0][0]
    turned = [[([~mask for mask in masks], None if weight is None else ~weight)]]
    monkeypatch.setattr("bench.rivals.torch_loop.first_draws", lambda case: turned)
    assert agrees("torch-loop", case) > 100


@needs("torch")
def test_equations_with_a_wrong_sign_are_seen(monkeypatch):
    from bench.rivals.torch_module import FUNCTIONS

    case = Case("layer_norm_gru", 6, 3, 9, 5, what="train")
    monkeypatch.setattr(FUNCTIONS, "tanh", lambda x: -x.tanh())
    assert agrees("torch-loop", case) > 100


@needs("torch")
def test_timed_runs_draw_other_masks_each_time():
    case = Case("zoneout_lstm", 6, 3, 9, 5, what="train")
    run = RIVALS["torch-loop"][0](case, *inputs(case)).run
    first, second = (run()["output"].detach().clone() for _ in range(2))
    assert not first.equal(second)


def test_what_takes_which_cell():
    case = Case("layer_norm_lstm", 6, 3, 9, 5)
    assert {refuses(name, case) for name in ("torch-cpu", "onnxruntime", "flashrnn", "torch-cuda-graph")} == {
        "has only the plain cells"
    }
    takers = ("gpurnn-cpu", "gpurnn-cpu-plain", "torch-cpu-plain", "torch-loop", "torch-loop-compile", "haste-torch")
    assert not any(refuses(name, case) for name in takers)
    for cell in ("lstm", "peephole"):  # one without an option, one whose cell has no plain form
        assert refuses("torch-cpu-plain", Case(cell, 6, 3, 9, 5)) == "only for a cell with an option"
    for cell in ("zoneout_lstm", "layer_norm_rnn"):
        assert refuses("haste-torch", Case(cell, 6, 3, 9, 5)) == "only layer norm in LSTM and GRU"
    assert refuses("torch-loop", Case("lstm", 6, 3, 9, 5, what="step")) == "only layers, no whole training step"


@pytest.mark.slow
@needs("torch")
def test_the_command_takes_a_cell_with_an_option(tmp_path):
    out = tmp_path / "x.json"
    sizes = ("-T", "3", "-B", "2", "-H", "4", "--rounds", "2", "--seconds", "0.001", "--threads", "1")
    done = CliRunner().invoke(main, ["run", "--cell", "layer_norm_lstm", *sizes, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "torch-loop" in done.output and "gpurnn-cpu-plain" in done.output
    table = list(report.beside_plain(report.load(out), "train"))
    assert table[0].startswith("| train | milliseconds | beside plain |") and "torch-loop" in table[0]
    assert table[2].startswith("| layer_norm_lstm | ") and len(table) == 3
    assert all(
        sample["cpu_s"] > 0
        for row in report.load(out)["cases"]
        for sample in report.timed(row)["gpurnn-cpu"]["samples"]
    )
    bad = CliRunner().invoke(main, ["run", "--cell", "layer_norm_lstn"])
    assert bad.exit_code == 2 and "layer_norm_lstn" in bad.output


def test_the_table_of_options_says_how_many_times_the_plain_cell_an_option_takes(tmp_path):
    def timed(seconds):
        samples = [{"host_s": seconds * k, "cpu_s": seconds * k * k} for k in (4, 1, 2)]
        return {"status": "timed", "samples": samples, "median_s": seconds}

    case = Case("zoneout_lstm", 6, 3, 9, 5, what="train")
    results = {"gpurnn-cpu": timed(0.003), "gpurnn-cpu-plain": timed(0.002), "torch-loop": timed(0.012)}
    rows = [{"name": case.name, "case": case.as_dict(), "floors": {}, "results": results}]
    rows.append({"name": "plain", "case": case.as_dict() | {"cell": "lstm"}, "results": {"gpurnn-cpu": timed(0.002)}})
    table = list(report.beside_plain({"cases": rows}))
    assert table == [
        "| train | milliseconds | beside plain | torch-loop |", "|---|---:|---:|---:|",
        "| zoneout_lstm | 3.0 | 1.50 | 4.00 |",
    ]  # fmt: skip
    rows[0]["results"]["torch-loop"]["samples"][1]["cpu_s"] = 0.006
    assert list(report.beside_plain({"cases": rows}, "train", "cpu_s"))[2].endswith("| 1.50 | 2.00 |")


@pytest.mark.long
def test_the_plain_cell_is_a_bound_and_is_not_judged():
    case = Case("layer_norm_gru", 6, 3, 9, 5, what="train")
    document = run_cases([case], ["gpurnn-cpu-plain"], threads=1, rounds=1, seconds=0.001)
    result = document["cases"][0]["results"]["gpurnn-cpu-plain"]
    assert result["status"] == "timed" and result["bound"] and "error" not in result


# ---- a cell of one's own in four libraries

OWN = Case("peephole", 6, 3, 9, 5, what="train")


def test_a_cell_of_ones_own_in_gpurnn_agrees():
    assert agrees("own-gpurnn", OWN) <= 1


@needs("torch")
def test_a_cell_of_ones_own_in_torch_agrees(monkeypatch):
    assert agrees("own-torch", OWN) <= 1
    monkeypatch.setattr("torch.nn.Linear.forward", lambda self, x: x @ self.weight.T - self.bias)
    assert agrees("own-torch", OWN) > 100


@pytest.mark.long
@needs_jax
def test_a_cell_of_ones_own_in_jax_agrees():
    assert agrees("own-jax", OWN) <= 1


@pytest.mark.long
@needs_jax
@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="needs keras")
def test_a_cell_of_ones_own_in_keras_agrees():
    document = run_cases([OWN], ["own-keras"], threads=1, rounds=1, seconds=0.001)  # Keras has one backend a process
    result = document["cases"][0]["results"]["own-keras"]
    assert result["status"] == "timed", result


@pytest.mark.parametrize("library", LIBRARIES)
def test_lines_of_code_are_counted(library):
    text = (ROOT / f"bench/rivals/own_{library}.py").read_text(encoding="utf-8")
    ignored = tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in ignored]
    assert code_lines(library) == len({token.start[0] for token in tokens if token.start[0] > 1}) > 8


@pytest.mark.long
def test_the_comparison_of_own_cells_has_lines_and_times(tmp_path, monkeypatch):
    monkeypatch.setattr(own_cell, "RIVALS", ("own-gpurnn",))
    out = tmp_path / "x.json"
    sizes = ("-T", "3", "-B", "2", "-H", "4", "--rounds", "2", "--seconds", "0.001", "--threads", "1")
    done = CliRunner().invoke(own_cell.main, [*sizes, "--out", str(out)])
    assert done.exit_code == 0, done.output
    name, lines, wall, processor = done.output.splitlines()[1].split()
    assert (name, lines) == ("gpurnn", str(code_lines("gpurnn"))) and float(wall) > 0 and float(processor) > 0
    document = report.load(out)
    assert document["lines"].keys() == set(LIBRARIES)
    document["cases"][0]["results"] |= {"own-keras": {"status": "failed", "reason": "No module named 'keras'"}}
    assert list(own_cell.table(document))[-1].endswith("  No module named 'keras'")
