"""Threads of the host that share a layer, a stream or a pool: nothing is lost between two of them."""

import sys
import threading
import time

import helpers
import numpy as np
import pytest
from helpers import assert_close

import gpurnn
from gpurnn.attention import Attention
from gpurnn.backends.cuda.graphs import LoopPool
from gpurnn.backends.cuda.loop import Loop


@pytest.fixture(autouse=True)
def often():
    """Threads take turns after every few bytecodes."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work, count=4):
    """``work(number)`` in so many threads; raises what the first of them raised."""
    errors, start = [], threading.Barrier(count)

    def run(number):
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def attend(layer, x):
    context, _, backward = layer.forward(x, x)
    backward(context)


def train(layer, x):
    y, *_, backward = layer.forward(x)
    backward(np.ones_like(y))


N = 200  # numbers of a bias: enough for NumPy to let other threads run while it adds them
LAYERS = {
    "LSTM": (lambda **o: gpurnn.LSTM(N, N, **o), train),
    "LSTM, projected": (lambda **o: gpurnn.LSTM(20, N, proj_size=30, learn_state=True, **o), train),
    "GRU": (lambda **o: gpurnn.GRU(N, N, **o), train),
    "GRU, original": (lambda **o: gpurnn.GRU(20, N, reset_after=False, **o), train),
    "RNN": (lambda **o: gpurnn.RNN(N, N, **o), train),
    "Linear": (lambda **o: gpurnn.Linear(N, N, **o), train),
    "Embedding": (lambda **o: gpurnn.Embedding(9, 4 * N, **o), train),
    "TiedLinear": (lambda **o: gpurnn.Sequential(e := gpurnn.Embedding(9, 4 * N, **o), gpurnn.TiedLinear(e)), train),
    "LayerNorm": (lambda **o: gpurnn.LayerNorm(20 * N, **o), train),
    "BatchNorm": (lambda **o: gpurnn.BatchNorm(20 * N, **o), train),
    "Pooling": (lambda **o: gpurnn.Pooling(N, "attention", **o), train),
    "Attention": (lambda **o: Attention(N, N, "additive", **o), attend),
}


@pytest.mark.long
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("name", LAYERS)
def test_no_gradient_is_lost(name, backend):
    """Of threads that train one layer. Their sums come in any order: each is off by a rounding, none is left out."""
    make, work = LAYERS[name]
    layer = make(backend=backend, seed=1)
    rng, turns, count = np.random.default_rng(0), 12, 4
    if name in ("Embedding", "TiedLinear"):
        x = rng.integers(0, 9, (3, 2))
    else:
        x = rng.standard_normal((3, 2, inputs(layer))).astype("float32")
    work(layer, x)
    one = layer.flat_grads.astype(np.float64)
    layer.zero_grad()

    def several(number):
        for _ in range(turns):
            work(layer, x)

    at_once(several, count)
    total = turns * count
    allowed = total * np.finfo("float32").eps * total * np.abs(one) + 1e-4 * np.abs(one).max()
    assert (np.abs(layer.flat_grads - total * one) <= allowed).all()


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("make", [gpurnn.LSTM, gpurnn.GRU, gpurnn.RNN])
def test_a_retained_backward_in_several_threads(make, dtype, backend):
    """All get what one alone gets: a backward spends what it keeps, and puts it back."""
    layer = make(20, 30, num_layers=2, backend=backend, dtype=dtype, seed=1)
    x = np.random.default_rng(0).standard_normal((10, 8, 20)).astype(dtype)
    y, _, backward = layer.forward(x, retain=True)
    expected, _ = backward(np.ones_like(y))
    one = layer.flat_grads.astype(np.float64)
    layer.zero_grad()

    def several(number):
        for _ in range(8):
            np.testing.assert_array_equal(backward(np.ones_like(y))[0], expected)

    at_once(several)
    assert_close(layer.flat_grads, 32 * one, 32 + 10 * 8, dtype=dtype)  # 32 calls, each adds up T x B terms


def test_of_several_threads_one_runs_a_backward_that_may_run_once():
    layer = gpurnn.GRU(20, 30, backend="cpu", seed=1)
    x, refused = np.random.default_rng(0).standard_normal((10, 8, 20)).astype("float32"), []
    for _ in range(20):
        y, _, backward = layer.forward(x)

        def once(number, y=y, backward=backward):
            try:
                backward(np.ones_like(y))
            except RuntimeError as error:
                refused.append(str(error))

        at_once(once)
    assert len(refused) == 60 and all("ran already" in message for message in refused)


def test_blocks_of_evaluation_in_several_threads():
    model = gpurnn.Sequential(gpurnn.Dropout(0.5), gpurnn.Dropout(0.5), gpurnn.Dropout(0.5))

    def several(number):
        for _ in range(100):
            with model.evaluation():
                assert not any(module.training for _, module in model.modules())

    at_once(several)
    assert all(module.training for _, module in model.modules())


def inputs(layer):
    return getattr(layer, "input_size", None) or getattr(layer, "in_features", None) or getattr(layer, "features", N)


# ---- the pool of loops


class FakeLoop:
    nbytes, by_step, problems = 10, ["forward"], {"forward": "a fake"}

    def __init__(self):
        self.users = 0


def test_a_loop_has_one_user():
    pool = LoopPool(capacity=3)
    pool.take("key", FakeLoop)

    def use(number):
        for _ in range(400):
            loop, lease = pool.take("key", FakeLoop)
            loop.users += 1
            assert loop.users == 1 and lease.loop is loop
            time.sleep(0)
            loop.users -= 1
            del lease

    at_once(use, 8)
    assert 1 <= len(pool.free) == pool.pooled <= 3 and pool.pooled_bytes == 10 * pool.pooled


def test_a_loop_that_comes_back_while_the_pool_is_at_work(monkeypatch):
    """The garbage collector ends a lease at any moment, in the thread that holds the pool's lock, too."""
    pool = LoopPool(capacity=8)
    pool.take("key", FakeLoop)
    leases = [pool.take("key", FakeLoop) for _ in range(4)]
    fits = LoopPool._fits

    def and_one_comes_back(self, loop):
        if leases:
            leases.pop()
        return fits(self, loop)

    monkeypatch.setattr(LoopPool, "_fits", and_one_comes_back)
    for _ in range(4):
        leases.insert(0, pool.take("another", FakeLoop))
    leases.clear()
    pool.take("third", FakeLoop)
    assert pool.pooled == len(pool.free)


def test_loops_that_nobody_uses_are_dropped_on_demand():
    pool = LoopPool(capacity=3)
    leases = [pool.take("key", FakeLoop) for _ in range(3)]
    leases.pop()
    assert len(pool.free) == 1 and pool.pooled == 2
    pool.clear()
    assert not pool.free and pool.pooled == 1 and pool.pooled_bytes == 10
    leases.clear()
    assert len(pool.free) == 1


# ---- the exchange of the schedule grid


@pytest.mark.emulated
@pytest.mark.parametrize("kernel", ["grid", "grid_mma"])
def test_what_blocks_exchange_belongs_to_one_launch(kernel, monkeypatch):
    """A second thread comes between the emptying of the exchange, or its count of epochs, and the launch."""
    ops = helpers.cuda_ops(policy="random", seed=1)
    dtype = "float16" if kernel == "grid_mma" else "float32"
    how = {"precision": "fma"} if kernel == "grid" else {}
    layers = [gpurnn.GRU(5, 19, backend=ops, dtype=dtype, seed=seed, schedule="grid", **how) for seed in (1, 2)]
    x = ops.xp.asarray(np.random.default_rng(0).standard_normal((7, 9, 5)).astype(dtype))
    expected = [layer(x)[0].get() for layer in layers]
    found, between, launch, forward = [], [], ops.kernels.launch, Loop.forward
    other = threading.Thread(target=lambda: found.append(layers[1](x)[0].get()))

    def launch_late(file, *arguments, **how):
        if file == f"{kernel}.cu" and not other.ident:
            other.start()
            other.join(0.3)  # it waits, or is done
            between.extend(found)
        launch(file, *arguments, **how)

    def forward_alone(loop):
        forward(loop)
        if other.ident and other is not threading.current_thread():
            other.join()

    monkeypatch.setattr(ops.kernels, "launch", launch_late)
    monkeypatch.setattr(Loop, "forward", forward_alone)
    found.insert(0, layers[0](x)[0].get())
    assert other.ident, f"{kernel} was not launched"
    assert not between
    for mine, right in zip(found, expected, strict=True):
        np.testing.assert_array_equal(mine, right)


@pytest.mark.emulated
def test_each_thread_has_a_default_stream_of_its_own():
    """Stream 2 is CUDA's per-thread default stream: one address, another stream in each thread."""
    ops = helpers.cuda_ops()
    found = []
    with ops.xp.cuda.streams.setdefault(2, type(ops.xp.cuda.streams[0])(ops.xp.cuda, 2)):
        at_once(lambda number: found.append(ops.exchange()), 3)
        here = ops.exchange()
    assert len({id(exchange) for exchange in (*found, here)}) == 4
    assert ops.exchange() is ops.exchange()


@pytest.mark.emulated
def test_a_choice_that_another_thread_forgets():
    """The table of choices is emptied when it is full, at any moment."""
    ops = helpers.cuda_ops()

    class Forgetful(dict):
        def __setitem__(self, key, value):
            super().__setitem__(key, value)
            self.clear()

    ops._chosen = Forgetful()
    assert gpurnn.LSTM(3, 4, backend=ops)(ops.xp.asarray(np.ones((2, 2, 3), "float32")))[0].shape == (2, 2, 4)
