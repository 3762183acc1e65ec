"""Whole recurrent layers on the ``cuda`` backend, executed on the CPU: CudaOps over an emulated device.

The same launches, GEMMs and arrays as on a GPU; gpurnn/check/ says what is compared and what is allowed.
"""

import itertools
import weakref
from dataclasses import replace

import helpers
import numpy as np
import pytest
from cuda_on_cpu import emulator
from helpers import THREAD_ORDERS, assert_close, cuda_ops

import gpurnn
from gpurnn import check
from gpurnn.backends.cuda import step_graphs
from gpurnn.backends.cuda.loop_plan import LoopShape
from gpurnn.backends.cuda.schedules import Device, Problem
from gpurnn.backends.cuda.streams import CudaStreams
from gpurnn.backends.sources import kernel_source
from gpurnn.check import CELLS, OPTIONS, Batch
from gpurnn.dtypes import DTYPES
from gpurnn.errors import BackendError
from gpurnn.testing import count_terms, leaves, worst_error

pytestmark = pytest.mark.emulated

RAGGED_H = {1: False, 7: True, 32: False, 65: True}  # H -> whether its batches are ragged
DTYPE_ORDERS = {"float32": "ascending", "float64": "random", "float16": "interrupted", "bfloat16": "ascending"}
CELLS_AND_DTYPES = list(itertools.product(CELLS, DTYPES))


def build(*args, schedule="step", **options):
    """Here the schedule ``step`` is tested; test_cuda_block.py has the other."""
    return check.build(*args, schedule=schedule, **options)


def twins(*args, schedule="step", **options):
    return check.twins(*args, schedule=schedule, **options)


def compare(*args, schedule="step", **options):
    helpers.compare(*args, schedule=schedule, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CELLS)
def test_every_size(kind, dtype):
    ops = cuda_ops()
    for T, B, H in itertools.product((1, 2, 17), (1, 3, 8), RAGGED_H):
        options = {"proj_size": H // 2} if kind == "lstm projected" else {}
        if kind == "lstm projected" and H == 1:
            continue
        compare(kind, ops, dtype, T, B, ragged=RAGGED_H[H], H=H, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CELLS)
def test_every_option_in_every_size(kind, dtype):
    """Each two of an option, T and B, and H; all three of each cell in one dtype or another."""
    ops = cuda_ops(checked=False)
    first = CELLS_AND_DTYPES.index((kind, dtype))
    for (i, option), (j, H) in itertools.product(enumerate(OPTIONS), enumerate(RAGGED_H)):
        T, B = ((1, 8), (2, 1), (17, 3))[(first + i + j) % 3]
        options = {"H": H} | OPTIONS[option]
        if "hidden_size" in options:
            options["hidden_size"] = [H, max(1, H - 2)]
        smallest = min(options.get("hidden_size", [H]))
        if kind == "lstm projected":
            if smallest == 1:
                continue
            options["proj_size"] = smallest // 2
        compare(kind, ops, dtype, T, B, RAGGED_H[H], option != "learned state", **options)


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype, order", DTYPE_ORDERS.items())
def test_every_option(dtype, order, kind, option, ragged):
    ops = cuda_ops(**THREAD_ORDERS[order])
    compare(kind, ops, dtype, 5, 3, ragged, option != "learned state", **OPTIONS[option])


@pytest.mark.parametrize("arch", ARCHITECTURES := [75, 80, 90, 120])
@pytest.mark.parametrize("kind", CELLS)
def test_architectures_and_orders(kind, arch):
    """Every dtype on every architecture, every cell on every architecture; on sm_90 both in every combination."""
    which = list(CELLS).index(kind) + ARCHITECTURES.index(arch)
    dtypes = DTYPES if arch == 90 else DTYPES[which % 2 :: 2]
    for order, dtype in itertools.product(THREAD_ORDERS.values(), dtypes):
        compare(kind, cuda_ops(arch=arch, **order), dtype, 3, 5, ragged=True, bidirectional=True)


@pytest.mark.parametrize("kind", CELLS)
def test_a_recorded_loop_is_the_loop(kind):
    """The second call of a shape is recorded, later ones are replayed, with new inputs and new weights."""
    ops = cuda_ops()
    options = {"num_layers": 3, "bidirectional": True}
    layer, _, exact = twins(kind, ops, "float32", **options)
    once, _, _ = twins(kind, cuda_ops(graphs=0), "float32", **options)
    for call in range(4):
        layer.flat_params *= 0.9
        once.flat_params *= 0.9
        batch = Batch(exact, 4, 3, ragged=True, seed=call)
        got, expected = batch.run(layer), batch.run(once)
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name}, call {call}")
        inference, state = layer(layer.xp.asarray(batch.x.astype("float32")), lengths=batch.lengths)
        again, state_again = once(once.xp.asarray(batch.x.astype("float32")), lengths=batch.lengths)
        np.testing.assert_array_equal(inference.get(), again.get())
        for mine, other in zip(leaves(state), leaves(state_again), strict=True):
            np.testing.assert_array_equal(mine.get(), other.get())
    assert any(loop.graphs for _, loop in ops.pool.free.values())


def test_a_recorded_loop_takes_any_derivative():
    """With and without ``doutput`` in turn: each its own recording, at addresses that stay."""
    layer, _, exact = twins("lstm", cuda_ops(), "float32")
    once, _, _ = twins("lstm", cuda_ops(graphs=0), "float32")
    batch = Batch(exact, 4, 3, ragged=True)
    for call in range(6):
        results = []
        for one in (layer, once):
            one.zero_grad()
            x, dstate = (one.xp.asarray(a.astype("float32")) for a in (batch.x, batch.dstate[0]))
            output, _, backward = one.forward(x, lengths=batch.lengths)
            dx, _ = backward(output if call % 2 else None, (dstate, dstate))
            results.append((dx.get(), one.flat_grads.get()))
        for mine, expected in zip(*results, strict=True):
            np.testing.assert_array_equal(mine, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_backward_has_the_weights_of_its_forward(dtype):
    """Those that the walk took, also where they are read only once for both ways; recorded or not. They are changed
    through arrays, which nobody sees."""
    layer, _, exact = twins("lstm", cuda_ops(), dtype, bidirectional=True)
    batch, found = Batch(exact, 4, 3, ragged=True), []
    x, dy = (layer.xp.asarray(a.astype(dtype)) for a in (batch.x, batch.doutput))
    for call in range(6):
        layer.zero_grad()
        kept = layer.flat_params.copy()
        _, _, backward = layer.forward(x, lengths=batch.lengths)
        for name in layer.params if call % 2 else ():  # which the products after the walk do not read
            if name.startswith("weight_hh"):
                layer.params[name][...] = layer.params[name] * 2
        backward(dy)
        found.append({name: grad.get() for name, grad in layer.grads.items()})
        layer.flat_params[...] = kept
    for other in found[1:]:
        for name, grad in found[0].items():
            np.testing.assert_array_equal(other[name], grad, err_msg=name)


@pytest.mark.parametrize("schedule", ["step", "block", "grid"])
def test_changed_parameters_are_refused(schedule):
    """Recorded or not, by any schedule, a stack or a wavefront of it."""
    for options in ({}, {"num_layers": 2, "wavefront": 2}):
        layer = build("gru", cuda_ops(), "float32", H=32, schedule=schedule, **options)
        x = layer.xp.asarray(np.ones((4, 2, layer.input_size), "float32"))
        for _ in range(3):
            for name in layer.params:
                layer.zero_grad()
                y, _, backward = layer.forward(x)
                layer.params[name] *= 0.5
                with pytest.raises(RuntimeError, match=f"backward: parameter {name} was changed"):
                    backward(y)
                assert not layer.flat_grads.get().any()
                y, _, backward = layer.forward(x)
                gpurnn.SGD(layer, lr=0.0).step()
                with pytest.raises(RuntimeError, match="backward: parameter weight_ih_l0 was changed"):
                    backward(y)


@pytest.mark.parametrize("schedule", ["step", "block", "grid"])
def test_backward_twice(schedule):
    """By any schedule, recorded or not, a stack or a wavefront of it: the same bits, and one array of them each."""
    for options in ({"bidirectional": True}, {"num_layers": 2, "wavefront": 2}):
        layer = build("lstm", cuda_ops(), "float32", H=32, schedule=schedule, **options)
        x = layer.xp.asarray(np.random.default_rng(0).normal(size=(4, 2, layer.input_size)).astype("float32"))
        for _ in range(3):
            layer.zero_grad()
            y, _, backward = layer.forward(x)
            expected = [a.get() for a in leaves(backward(y))] + [layer.flat_grads.get()]
            with pytest.raises(RuntimeError, match="backward ran already"):
                backward(y)
            _, _, backward = layer.forward(x, retain=True)
            for _ in range(2):
                layer.zero_grad()
                found = [a.get() for a in leaves(backward(y))] + [layer.flat_grads.get()]
                for got, want in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(got, want)


def test_where_nothing_can_be_recorded_launches_go_one_by_one(monkeypatch, caplog):
    ops = cuda_ops()

    def refuse(function):
        raise BackendError("no graphs here")

    monkeypatch.setattr(ops.device, "record", refuse)
    layer, plain, exact = twins("gru", ops, "float64", bidirectional=True)
    batch = Batch(exact, 4, 3, ragged=True)
    with caplog.at_level("WARNING", "gpurnn"):
        for _ in range(4):
            got, expected = batch.run(layer), batch.run(plain)
            for name, value in expected.items():
                assert_close(got[name], value, count_terms(layer, 4), name)
    assert len(caplog.records) == 2 and caplog.text.count("no graphs here") == 2  # forward and backward, once each
    assert [(row["pass"], row["recorded"], row["reason"]) for row in ops.recordings()] == [
        ("forward", False, "no graphs here"), ("backward", False, "no graphs here"),
    ]  # fmt: skip
    assert "launch by launch: no graphs here" in layer.plan(4, 3).reason
    assert "recorded as a CUDA graph" in layer.plan(4, 4).reason


def test_a_model_trains_as_on_numpy(monkeypatch):
    """Embedding, stack, softmax, clip, Adam, state carried from chunk to chunk (truncated BPTT): the same run."""
    ops = cuda_ops()
    monkeypatch.setattr(
        gpurnn.losses.common,
        "array_ops",
        lambda *a: ops if isinstance(a[0], ops.xp.ndarray) else gpurnn.get_backend("numpy"),
    )
    text = np.random.default_rng(0).integers(0, 11, (5, 4, 6))  # 5 chunks of T = 4, B = 6
    runs = []
    for backend in (ops, "numpy"):
        options = {"backend": backend, "dtype": "float64"}
        model = gpurnn.Sequential(
            gpurnn.Embedding(11, 5, seed=1, **options),
            gpurnn.LSTM(5, 7, num_layers=2, dropout=0.2, seed=2, **options),
            gpurnn.Linear(7, 11, seed=3, **options),
        )
        adam, state, losses = gpurnn.Adam(model, lr=0.05), None, []
        for chunk in [*text, *text]:
            ids = model.xp.asarray(chunk)
            model.zero_grad()
            logits, state, backward = model.forward(ids, state)
            loss, dloss = gpurnn.cross_entropy(logits, ids, lengths=[4, 4, 0, 3, 1, 4])
            backward(dloss())
            gpurnn.clip_grad_norm(model, 0.5)
            adam.step()
            losses.append(float(loss))
        runs.append((losses, model.ops.to_numpy(model.flat_params)))
    assert runs[1][0][-1] < runs[1][0][0]
    terms = len(losses) * count_terms(model, 4)
    assert_close(runs[0][0], runs[1][0], terms, "losses")
    assert_close(runs[0][1], runs[1][1], terms, "parameters")


def test_calls_that_overlap_get_a_loop_each():
    ops = cuda_ops()
    layers = twins("lstm", ops, "float32")
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(4, 3, 4)).astype("float32") for _ in range(4)]
    for layer in layers:
        layer.zero_grad()
        calls = [layer.forward(layer.xp.asarray(x.astype(layer.dtype))) for x in xs]
        for output, _, backward in calls:
            backward(output)
    share, detail = worst_error(*({"gradients": helpers.host(one.flat_grads)} for one in layers), "float32", None)
    assert share <= 1, detail


def test_the_pool_is_bounded_and_gets_loops_back():
    ops = cuda_ops(graphs=2)
    layer = build("gru", ops, "float32")
    for T in (1, 2, 3, 4, 5) * 3:
        layer(ops.xp.zeros((T, 2, 4), "float32"))
    assert ops.pool.pooled == len(ops.pool.free) == 2
    kept = layer.forward(ops.xp.zeros((9, 2, 4), "float32"))
    for _ in range(5):  # their backward never runs
        layer.forward(ops.xp.zeros((9, 2, 4), "float32"))
    del kept
    assert ops.pool.pooled == len(ops.pool.free) == 2


def test_the_pool_keeps_no_more_bytes_than_allowed():
    ops = cuda_ops()
    layer = build("lstm", ops, "float32")
    one = 4 * (3 * 2 * 4 * 7 + 4 * 2 * 7 * 2 + 2 * 3 * 2 * 7)  # gates, h and c, output twice, of T 3
    ops.pool.bytes = 2 * one
    for T in (3, 2, 3, 2, 4, 4, 3, 9, 9, 9):
        layer.forward(ops.xp.zeros((T, 2, 4), "float32"))[2](None, None)
    assert 0 < ops.pool.pooled_bytes == sum(loop.nbytes for _, loop in ops.pool.free.values()) <= 2 * one
    assert all(loop.T < 9 for _, loop in ops.pool.free.values())  # larger than all that may be kept


def test_the_plan_names_the_schedule():
    plan = build("lstm", cuda_ops(), "float16", num_layers=2).plan(10, 3)
    assert plan.schedule == "step" and "fused kernel" in plan.reason and "CUDA graph" in plan.reason
    kept, h, c, made = 2 * 10 * 3 * 4 * 7, 2 * 11 * 3 * 7, 2 * 11 * 3 * 7, 10 * 3 * 7
    assert plan.cache_bytes == (kept + h + made) * 2 + c * 4
    assert "launch by launch" in build("gru", cuda_ops(graphs=0), "float32").plan(10, 3).reason


def test_an_empty_batch_and_no_steps():
    for T, B in ((0, 2), (3, 0), (0, 0)):
        for kind in CELLS:
            compare(kind, cuda_ops(), "float32", T, B)


def test_two_runs_give_equal_bits():
    for kind in CELLS:
        runs = []
        for order in THREAD_ORDERS.values():
            layer = build(kind, cuda_ops(**order), "float32", bidirectional=True)
            batch = Batch(build(kind, "numpy", "float64", bidirectional=True), 5, 3, ragged=True)
            runs.append(batch.run(layer))
        for other in runs[1:]:
            for name, value in runs[0].items():
                np.testing.assert_array_equal(other[name], value)


def test_the_gradient_flow_is_recorded():
    """Watching every dh needs the generic walk; its results are the kernels' own."""
    layer, plain, exact = twins("lstm", cuda_ops(), "float64", bidirectional=True)
    batch = Batch(exact, 5, 3, ragged=True)
    flows = []
    for watched in (layer, plain):
        with gpurnn.record_gradient_flow() as flow:
            batch.run(watched)
        flows.append(flow)
    for name, norms in flows[1].items():
        assert_close(flows[0][name].dh, norms.dh, count_terms(layer, 5), name)
        assert_close(flows[0][name].dc, norms.dc, count_terms(layer, 5), name)


def watch_streams(ops, monkeypatch):
    """Raises AssertionError where a layer reads what another stream may not have written yet, or where a loop's arrays
    are given up while another stream may still read them."""
    device, written, loops = ops.device, {}, []
    forward, backward, product, leave = ops.layer_forward, ops.layer_backward, ops.product, CudaStreams.__exit__

    def note(array):
        written[array._host.ctypes.data] = device.tick()

    def ask(array):
        assert device.waited_for(written.get(array._host.ctypes.data, (0, 0))), (
            "a stream does not wait for what it reads"
        )

    def layer_forward(cell, x, *args, **options):
        ask(x)
        saved, finals, output = forward(cell, x, *args, **options)
        note(output)
        loops.append(weakref.ref(saved.lease.loop))
        return saved, finals, output

    def layer_backward(saved, grads, doutput, *args, **options):
        ask(doutput)
        return backward(saved, grads, doutput, *args, **options)

    def product_(a, b, out, *args, **options):
        product(a, b, out, *args, **options)
        note(out)

    def exit(self, *error):
        assert all(loop() for loop in loops), "a loop's arrays were given up too early"
        leave(self, *error)

    monkeypatch.setattr(ops, "layer_forward", layer_forward)
    monkeypatch.setattr(ops, "layer_backward", layer_backward)
    monkeypatch.setattr(ops, "product", product_)
    monkeypatch.setattr(CudaStreams, "__exit__", exit)


def no_wait(monkeypatch):
    on = CudaStreams.on
    monkeypatch.setattr(CudaStreams, "on", lambda self, lane, after=-1: on(self, lane))


def nothing_held(monkeypatch):
    init = CudaStreams.__init__

    def forgetful(self, device, count):
        init(self, device, count)
        self.count = 1

    monkeypatch.setattr(CudaStreams, "__init__", forgetful)


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("error", [None, no_wait, nothing_held])
def test_lanes_of_a_wavefront(error, train, monkeypatch):
    ops = cuda_ops()
    device = ops.device
    layer = build("lstm", ops, "float32", num_layers=3, wavefront=2)
    watch_streams(ops, monkeypatch)
    x = ops.xp.asarray(np.ones((5, 3, 4), np.float32))

    def run():
        if not train:
            return layer(x)
        output, _, backward = layer.forward(x)
        return backward(output)

    if error:
        error(monkeypatch)
        with pytest.raises(AssertionError, match="does not wait" if error is no_wait else "given up too early"):
            run()
        return
    run()
    streams = device.streams(3)
    assert [ptr for ptr, stream in device.xp.cuda.streams.items() if stream.clock[ptr]] == [s.ptr for s in streams]
    for stream in streams:  # the caller's stream has waited for all of them
        assert device.waited_for((stream.ptr, stream.clock[stream.ptr]))


def test_layers_of_a_wavefront_share_the_multiprocessors():
    """All thread blocks of schedule grid of all layers are there at once."""
    ops = cuda_ops()
    limits = ops.device.limits = replace(ops.device.limits, multiprocessors=12)
    problem = Problem(gpurnn.cells.CELLS["lstm"], 64, 5, 2, 1, "float32", False, False)
    for share in (1, 2, 3):
        candidate, _ = ops.choose(replace(problem, concurrent=share), "grid")
        assert candidate.blocks * candidate.groups * share <= limits.multiprocessors
    assert ops.choose(replace(problem, concurrent=12))[0].schedule != "grid"


@pytest.mark.parametrize("kind", CELLS)
def test_a_long_loop_is_a_short_graph_launched_again(kind, monkeypatch):
    """Graphs of a few timesteps, and one for the rest; both give the bits of launches one by one, call after call."""
    monkeypatch.setattr(step_graphs, "_RECORDED", 3)
    for T, graphs in ((3, 1), (4, 2), (6, 1), (7, 2), (11, 2)):
        ops = cuda_ops(checked=False)
        layer, _, exact = twins(kind, ops, "float32", bidirectional=True)
        once, _, _ = twins(kind, cuda_ops(graphs=0, checked=False), "float32", bidirectional=True)
        for call in range(4):
            batch = Batch(exact, T, 3, ragged=call % 2 == 1, seed=call)
            got, expected = batch.run(layer), batch.run(once)
            for name in expected:
                np.testing.assert_array_equal(got[name], expected[name], err_msg=f"{name}, T {T}, call {call}")
        recorded = [graph for _, loop in ops.pool.free.values() for graph in loop.graphs.values()]
        assert recorded and all(len(set(map(id, loop))) == graphs for loop in recorded)
        assert {len(loop) for loop in recorded} == {-(-T // 3)}
        assert all(row["recorded"] for row in ops.recordings())


def test_a_graph_is_of_64_timesteps_at_most():
    ops = cuda_ops(checked=False)
    layer = build("gru", ops, "float32", H=2)
    for _ in range(3):
        layer(ops.xp.zeros((150, 1, 4), "float32"))
    ((_, loop),) = ops.pool.free.values()
    nodes = [len(graph.actions) for graph in loop.graphs["forward"]]
    assert nodes == [2 * 64 + 1] * 2 + [2 * 22 + 1]  # a product and a kernel for each, and what counts them


def test_a_replay_that_is_interrupted_does_not_move_the_next_one(monkeypatch):
    """Ctrl-C between two graphs: the timesteps that were done are forgotten."""
    monkeypatch.setattr(step_graphs, "_RECORDED", 3)
    ops = cuda_ops()
    layer, plain, exact = twins("lstm", ops, "float64")
    batch = Batch(exact, 10, 3, ragged=True)
    for _ in range(2):
        batch.run(layer)
    ((_, loop),) = ops.pool.free.values()
    for name in ("forward", "backward"):
        good, calls = loop.graphs[name], []

        def interrupt(calls=calls, launch=good[0].launch):
            calls.append(0)
            if len(calls) == 2:
                raise KeyboardInterrupt
            launch()

        monkeypatch.setattr(good[0], "launch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batch.run(layer)
        monkeypatch.undo()
        monkeypatch.setattr(step_graphs, "_RECORDED", 3)
        got, expected = batch.run(layer), batch.run(plain)
        for key, value in expected.items():
            assert_close(got[key], value, count_terms(layer, 5), key)


def test_the_output_of_a_recorded_loop_is_the_callers():
    ops = cuda_ops()
    layer = build("lstm", ops, "float32")
    x = [ops.xp.asarray(np.full((4, 2, 4), value, np.float32)) for value in (1, 1, 1, 2)]
    outputs = [layer(one)[0] for one in x]
    np.testing.assert_array_equal(outputs[2].get(), outputs[0].get())  # the fourth call has written elsewhere
    assert np.abs(outputs[3].get() - outputs[2].get()).max() > 1e-3


def test_a_loop_is_recorded_for_one_stream():
    """What was given back on one stream may still run there."""
    ops = cuda_ops()
    layer, x = build("lstm", ops, "float32"), ops.xp.zeros((4, 2, 4), "float32")
    for _ in range(3):
        layer(x)
    with ops.device.streams(1)[0]:
        for _ in range(3):
            layer(x)
    assert ops.pool.pooled == 2 and len({key[-1] for key, _ in ops.pool.free.values()}) == 2


def test_a_plan_holds_for_one_device_and_one_precision():
    ops = cuda_ops()
    ops.device.limits = Device(90, 132, 227 * 1024)
    cell = gpurnn.cells.CELLS["lstm"]
    shape = LoopShape(100, 16, 64, 512, 512, np.dtype("float32"), (False,), True, False, True, "auto")
    plan = ops.loop_plan(cell, shape)
    assert plan is ops.loop_plan(cell, shape) and not plan.by_step and plan.launches["forward"].options["cooperative"]
    assert ops.with_precision("tf32").loop_plan(cell, shape).candidates["forward"].numbers[-1] == 1
    ops.disable("grid")
    other = ops.loop_plan(cell, shape)
    assert other is not plan and other.by_step == ["forward", "backward"] and not other.launches
    assert ops.loop_plan(cell, shape) is other


def test_what_is_chosen_once_is_chosen_again_where_it_must_be():
    """Other precision, another device's limits, other measurements: each its own choice for the same sizes."""
    ops = cuda_ops()
    ops.device.limits = Device(90, 132, 227 * 1024)
    problem = Problem(gpurnn.cells.CELLS["lstm"], 512, 100, 16, 1, "float32", projected=False, backward=False, I=64)
    others = ops, ops.with_precision("tf32"), ops.with_precision("fma")
    plain, tf32, fma = (some.candidates(problem, True, "auto").candidates for some in others)
    assert plain["forward"].kernel == tf32["forward"].kernel == "grid_mma" and fma["forward"].kernel == "grid"
    assert plain["forward"].numbers[-1] == 3 and tf32["forward"].numbers[-1] == 1
    assert all(other is ops.with_precision(other.precision) for other in others)
    assert ops.candidates(problem, True, "auto").candidates is plain
    for cooperative, schedule in ((False, "fused"), (True, "grid"), (False, "fused")) * 3:
        ops.device.limits = replace(ops.device.limits, cooperative=cooperative)
        assert ops.candidates(problem, True, "auto").candidates["forward"].schedule == schedule


def test_epochs_begin_anew_before_they_come_back():
    """An epoch is a word of 32 bits; one that stood in memory before must not be taken for a new one."""
    exchange = cuda_ops().exchange()
    epoch, _, words, _ = exchange.take(300)
    epoch[...] = (1 << 31) - 100
    words[...] = 7
    exchange.done(50)
    assert int(epoch[0]) == (1 << 31) - 50 and (words.get() == 7).all()
    exchange.done(50)
    assert int(epoch[0]) == 0 and not words.get().any()
    exchange.done(5)
    assert int(epoch[0]) == 5 and exchange.take(200)[2] is words
    other, _, more, _ = exchange.take(301)
    assert more is not words and other is not epoch and int(other[0]) == 0


@pytest.mark.parametrize("kind", ["lstm", "gru original", "lstm projected"])
def test_the_bytes_of_a_loop_are_those_of_its_arrays(kind):
    ops = cuda_ops()
    layer = build(kind, ops, "float16", H=8)
    for _ in range(2):
        _, _, backward = layer.forward(ops.xp.zeros((5, 3, 4), "float16"))
    backward(None)
    del backward
    ((_, loop),) = ops.pool.free.values()
    others = [] if loop.others is None else [loop.others]
    arrays = [loop.h, loop.output, loop.output, loop.gates, *others]  # doutput is as output
    assert loop.nbytes == sum(array.nbytes for array in arrays)


def test_a_failed_recording_leaves_the_other_loops_alone(monkeypatch, caplog):
    """One way of one shape; the next shape, and the other way, are recorded."""
    ops = cuda_ops()
    record, refused = ops.device.record, []

    def refuse_once(function):
        if not refused:
            refused.append(function)
            raise BackendError("not this one")
        return record(function)

    monkeypatch.setattr(ops.device, "record", refuse_once)
    layer, plain, exact = twins("lstm", ops, "float64")
    for T in (4, 5):
        batch = Batch(exact, T, 3, ragged=True)
        for _ in range(4):
            got, expected = batch.run(layer), batch.run(plain)
            for name, value in expected.items():
                assert_close(got[name], value, count_terms(layer, 4), name)
    outcomes = [(row["pass"], row["recorded"], row["reason"]) for row in ops.recordings()]
    assert sorted(outcomes) == [
        ("backward", True, ""), ("backward", True, ""), ("forward", False, "not this one"), ("forward", True, ""),
    ]  # fmt: skip
    assert len(caplog.records) == 1 and ops.pool.pooled == 2


@pytest.mark.parametrize("by_step", ["forward", "backward"])
def test_of_two_ways_the_one_by_step_is_recorded(by_step, monkeypatch):
    """The other way is one launch, which needs no graph and could not be in one: a copy to the host belongs to it."""
    ops = cuda_ops()
    choose = ops.choose

    def mixed(problem, wanted="auto"):
        return choose(problem, "step" if problem.backward == (by_step == "backward") else "grid")

    monkeypatch.setattr(ops, "choose", mixed)
    layer, plain, exact = twins("lstm", ops, "float32", H=19, schedule="auto")
    batch = Batch(exact, 4, 3, ragged=True)
    for _ in range(4):
        got, allowed, expected = batch.run(layer), batch.run(plain), batch.run(exact)
        for name, value in expected.items():
            bound = 2 * np.abs(allowed[name] - value).max() + 2 * 2.0**-23 * np.abs(value).max(initial=1)
            assert np.abs(got[name] - value).max() <= bound, name
    assert [(row["pass"], row["recorded"]) for row in ops.recordings()] == [(by_step, True)]


def test_a_loop_too_large_to_be_kept_says_so():
    ops = cuda_ops()
    layer = build("gru", ops, "float32")
    ops.pool.bytes = 1000
    for _ in range(3):
        layer(ops.xp.zeros((9, 2, 4), "float32"))
    (row,) = ops.recordings()
    assert not row["recorded"] and "MB" in row["reason"] and "launch by launch: its arrays" in layer.plan(9, 2).reason


@pytest.mark.parametrize("schedule", ["block", "grid"])
@pytest.mark.parametrize("kind", ["rnn tanh", "lstm", "gru"])
def test_parameters_behind_three_numbers_are_read_in_fours(kind, schedule):
    """Weights of a model lie behind those of other layers: four numbers have to start at 16 bytes all the same."""
    layer, plain, exact = twins(kind, cuda_ops(), "float32", I=3, H=32, schedule=schedule)
    models = [gpurnn.Sequential(gpurnn.LayerNorm(3, backend=one.ops, dtype=one.dtype, seed=1), one)
              for one in (layer, plain, exact)]  # fmt: skip
    x, found = np.random.default_rng(0).normal(size=(3, 2, 3)), []
    for model in models:
        output, _, backward = model.forward(model.xp.asarray(x.astype(model.dtype)))
        backward(output)
        found.append([model.ops.to_numpy(array).astype(float) for array in (output, model.flat_grads)])
    for got, allowed, expected in zip(*found, strict=True):
        bound = 2 * np.abs(allowed - expected).max() + 2 * 2.0**-23 * np.abs(expected).max(initial=1)
        assert np.abs(got - expected).max() <= bound


def odd(ops, array):
    """A copy that starts 2, 4 or 8 bytes behind a multiple of 16: a slice of something larger."""
    whole = ops.xp.empty(array.size + 1, array.dtype)
    part = whole[1:].reshape(array.shape)
    part[...] = array
    assert ops.device.address(part) % 16
    return part


@pytest.mark.parametrize("schedule", ["step", "block", "grid"])
@pytest.mark.parametrize("dtype, precision", [("float32", "float32"), ("float32", "tf32"), ("bfloat16", "float32")])
def test_arrays_that_start_anywhere(schedule, dtype, precision):
    """x, states and doutput as slices that no vector load could take: the same bits as of whole arrays."""
    ops = cuda_ops()
    options = {"schedule": schedule, "precision": precision, "H": 20, "bidirectional": True}
    layer = build("lstm", ops, dtype, **options)
    batch, found = Batch(build("lstm", "numpy", "float64", H=20, bidirectional=True), 3, 3, ragged=False), []
    for placed in (lambda array: array, lambda array: odd(ops, array)):
        layer.zero_grad()
        x, h, c, dy = (placed(ops.xp.asarray(a.astype(layer.dtype))) for a in (batch.x, *batch.state, batch.doutput))
        output, _, backward = layer.forward(x, (h, c))
        dx, _ = backward(dy)
        found.append([output.get(), dx.get(), layer.flat_grads.get()])
    for whole, slices in zip(*found, strict=True):
        np.testing.assert_array_equal(whole, slices)


MUTATIONS = {  # planted error -> layer, piece of the source, what it becomes
    "sign, rnn": ("rnn tanh", "d[0] = in.dstate[0] * (RELU", "d[0] = -in.dstate[0] * (RELU"),
    "derivative of tanh": ("rnn tanh", "drelu(h) : dtanh(h)", "drelu(h) : dsigmoid(h)"),
    "derivative of relu": ("rnn relu", "RELU ? drelu(h)", "RELU ? relu(h)"),
    "sign, lstm i": ("lstm", "d[0] = dc * g", "d[0] = -dc * g"),
    "sign, lstm f": ("lstm", "d[1] = dc * in.state[1]", "d[1] = -dc * in.state[1]"),
    "sign, lstm g": ("lstm", "d[2] = dc * i *", "d[2] = -dc * i *"),
    "sign, lstm o": ("lstm", "d[3] = dh * m", "d[3] = -dh * m"),
    "sign, lstm c": ("lstm", "in.dstate[1] + dh * o", "in.dstate[1] - dh * o"),
    "dc before its own share": ("lstm", "dh * o * dtanh(m)", "dh * dtanh(m)"),
    "forget gate's derivative": ("lstm", "dc * in.state[1] * dsigmoid(f)", "dc * m * dsigmoid(f)"),
    "gates in another order": ("lstm", "f = out.saved[1] = sigmoid(in.ax[1]", "f = out.saved[1] = sigmoid(in.ax[3]"),
    "sign, gru n": ("gru", "d_n = dh * (real(1) - z)", "d_n = -dh * (real(1) - z)"),
    "sign, gru q": ("gru", "d[2] = d_n * r", "d[2] = -d_n * r"),
    "derivative by z": ("gru", "d_n * r;\n        out.d[1] = dh * (in.state[0] - n)",
                        "d_n * r; out.d[1] = dh * (n - in.state[0])"),
    "sign, gru r": ("gru", "d[0] = d_n * q", "d[0] = -d_n * q"),
    "sign, original r": ("gru original", "d[0] = d_inner * in.state[0]", "d[0] = -d_inner * in.state[0]"),
    "sign, original n": ("gru original", "d[2] = dh * (real(1) - z)", "d[2] = -dh * (real(1) - z)"),
    "original, p's way": ("gru original", "dstate[0] += d_inner * r", "dstate[0] += d_inner * in.state[0]"),
    "original, past the end": ("gru original", "at.row[(size_t)Cell::inner * a.H] = zero;", ";"),
    "derivative past the end": ("gru", "out.d[k] = real(0);", "out.d[k] = real(1);"),
    "slot of the reverse direction": ("gru", "reversed ? t + 1 : t)", "reversed ? t : t)"),
    "index of saved gates": ("lstm", "k * a.H] = T(float_of<T>(out.saved", "k * a.H + 1] = T(float_of<T>(out.saved"),
    "unit past the end": ("rnn tanh", "inside(j_ < n)", "inside(j_ <= n)"),
    "length off by one": ("rnn tanh", ">= lengths[pos.b], false", "> lengths[pos.b], false"),
    "projection forgets the end": ("lstm projected", "now.held ? h_now[index]", "!now.held ? h_now[index]"),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_error_is_seen(mutation):
    kind, old, new = MUTATIONS[mutation]
    assert kernel_source("step.cu").count(old) == 1
    with pytest.raises((AssertionError, emulator.KernelError)):
        compare(kind, cuda_ops(edits=[(old, new)]), "float32", 5, 3, ragged=True, bidirectional=True)
