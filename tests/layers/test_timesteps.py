"""Resets and masks in layers without a time loop and in Sequential: each part of a row against the same part alone."""

import numpy as np
import pytest
from helpers import assert_close, backend_of

import gpurnn
from gpurnn import GRU, LSTM, RNN, BatchNorm, Dropout, Embedding, LayerNorm, Linear, Pooling, Sequential, ShapeError
from gpurnn.testing import count_terms

T, B = 7, 6
POOLINGS = [("last", 1), ("last", 2), ("mean", 1), ("max", 1), ("attention", 1)]
ROWS = {  # one string a row: a timestep that is there, one that is not, and in capitals where a sequence begins
    "parts": ["AaaBbCc", "aaaaaaa", "aaBbbbb", "A......", ".......", "ABCDEFG"],
    "no resets": ["aaa.a..", "a.a.a.a", "...aa.a", "....a..", ".......", "aaaaaaa"],
    "holes": ["Aa.a.Bb", "..Aa..a", "a..aB.b", "...a.B.", "....A..", "a.a.a.a"],
}


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def marks(rows):
    """(reset, mask), both (T, B). An empty place that is followed by a capital is not a reset: the capital is."""
    letters = np.array([list(row) for row in rows]).T
    return np.char.isupper(letters), letters != "."


def parts(reset, mask):
    """(b, timesteps) of every sequence, row by row. A row that holds no timestep and no reset has none, if any has."""
    if not reset.any():
        return [(b, np.flatnonzero(mask[:, b])) for b in range(mask.shape[1])]
    found = []
    for b in range(reset.shape[1]):
        number = np.cumsum(reset[:, b])
        for n in range(number[-1] + 1):
            steps = np.flatnonzero((number == n) & mask[:, b])
            if n or len(steps):
                found.append((b, steps))
    return found


def options(backend="cpu", seed=1):
    return {"backend": backend_of(backend), "dtype": "float64", "seed": seed}


MODELS = {
    "recurrent": lambda o: Sequential(LSTM(3, 4, num_layers=2, learn_state=True, **o), GRU(4, 2, **o)),
    "linear around": lambda o: Sequential(
        Linear(3, 4, **o), LayerNorm(4, **o), GRU(4, 3, bidirectional=True, **o), Linear(6, 2, **o)
    ),
    "nested": lambda o: Sequential(
        Sequential(Linear(3, 3, **o)),
        Sequential(RNN(3, 4, reverse=True, **o), BatchNorm(4, **o).eval()),
        Linear(4, 2, **o),
    ),
    **{
        f"pooling, {mode} {directions}": lambda o, mode=mode, directions=directions: Sequential(
            LSTM(3, 2, bidirectional=True, **o), Pooling(4, mode, directions, **o), Dropout(0.0, **o), Linear(4, 2, **o)
        )
        for mode, directions in POOLINGS
    },
}  # fmt: skip


def train(model, x, dy, **given):
    """(y, dx, gradients) of one forward and backward."""
    model.zero_grad()
    y, _, backward = model.forward(x, **given)
    np.testing.assert_array_equal(model(x, **given)[0], y)
    dx, _ = backward(dy(y))
    return y, dx, {name: gradient.copy() for name, gradient in model.grads.items()}


@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_each_part_is_what_it_is_alone(name, rows, batch_first, backend):
    """NaN in x and doutput where no timestep is reaches nothing."""
    model = MODELS[name](options(backend))
    for _, module in model.modules():
        if hasattr(module, "batch_first"):
            module.batch_first = batch_first
    model.flat_params += 0.3 * numbers(*model.flat_params.shape, seed=9)
    reset, mask = marks(ROWS[rows])
    x, dy, whole = numbers(T, B, 3), numbers(T, B, 2, seed=1), parts(reset, mask)
    pooled, turn = name.startswith("pooling"), (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)

    def doutput(b, steps, n):
        return dy.reshape(T * B, 2)[n : n + 1] if pooled else turn(dy[steps, b : b + 1])

    alone = [
        train(model, turn(x[steps, b : b + 1]), lambda y, b=b, steps=steps, n=n: doutput(b, steps, n))
        for n, (b, steps) in enumerate(whole)
    ]
    x[~mask], there = np.nan, np.where(mask[:, :, None], dy, np.nan)
    given = {"mask": turn(mask)} | ({"reset": turn(reset)} if reset.any() else {})
    y, dx, gradients = train(
        model, turn(x), lambda y: dy.reshape(T * B, 2)[: len(y)] if pooled else turn(there), **given
    )
    y, dx, terms = y if pooled else turn(y), turn(dx), count_terms(model, T * B)
    for n, ((b, steps), (y_alone, dx_alone, _)) in enumerate(zip(whole, alone, strict=True)):
        assert_close(y[n] if pooled else y[steps, b], y_alone[0] if pooled else turn(y_alone)[:, 0], terms, "y")
        assert_close(dx[steps, b], turn(dx_alone)[:, 0], terms, "dx")
    assert not dx[~mask].any()
    for key, gradient in gradients.items():
        assert_close(gradient, sum(one[2][key] for one in alone), terms, key)


@pytest.mark.parametrize("name", MODELS)
def test_lengths_are_a_mask(name):
    """To the bit; both together are the timesteps that both leave, and no sequence begins past an end."""
    model, lengths = MODELS[name](options("numpy")), [7, 0, 3, 5, 1, 6]
    inside = np.arange(T)[:, None] < lengths
    reset, mask = marks(ROWS["holes"])
    x = numbers(T, B, 3)

    def dy(y):
        return numbers(*y.shape, seed=1)

    first = train(model, x, dy, mask=inside)
    both = train(model, x, dy, mask=mask, lengths=lengths, reset=reset)
    for other, given in ((first, {"lengths": lengths}), (both, {"mask": mask & inside, "reset": reset & inside})):
        got = train(model, x, dy, **given)
        np.testing.assert_array_equal(got[0], other[0])
        np.testing.assert_array_equal(got[1], other[1])
        assert all((got[2][key] == other[2][key]).all() for key in got[2])


@pytest.mark.parametrize("mode, directions", POOLINGS)
def test_pooling_of_many_lengths_in_a_row(mode, directions):
    """Sequences from 1 to 40 timesteps, in groups of similar length."""
    lengths = [[*range(1, 9), 16], [40, 12], [17, 3, 32]]
    reset = np.zeros((52, 3), bool)
    for b, row in enumerate(lengths):
        reset[np.cumsum([0, *row[:-1]]), b] = True
    pool, x = Pooling(4, mode, directions, **options()), numbers(52, 3, 4)
    y, backward = pool.forward(x, reset=reset)
    dy, where = numbers(*y.shape, seed=1), parts(reset, np.ones_like(reset))
    dx, gradient = backward(dy), pool.flat_grads.copy()
    pool.zero_grad()
    assert len(y) == sum(map(len, lengths)) == len(where)
    for n, (b, steps) in enumerate(where):
        alone, alone_backward = pool.forward(x[steps, b : b + 1])
        assert_close(y[n], alone[0], count_terms(pool, 52))
        assert_close(dx[steps, b], alone_backward(dy[n : n + 1])[:, 0], count_terms(pool, 52))
    assert_close(pool.flat_grads, gradient, count_terms(pool, 52 * 3))


def test_pooling_of_no_timesteps():
    pool, none = Pooling(4, "max", **options()), np.zeros((3, 2), bool)
    x = np.full((3, 2, 4), np.nan)
    assert not pool(x, mask=none).any() and pool(x, mask=none).shape == (2, 4)
    assert pool(x, reset=none, mask=none).shape == (0, 4)
    begun = none.copy()
    begun[1, 1] = True
    y, backward = pool.forward(x, reset=begun, mask=none)  # a sequence that holds nothing
    assert y.shape == (1, 4) and not y.any() and not backward(np.ones((1, 4))).any()
    assert pool(x[:0], reset=none[:0]).shape == (0, 4) and pool(x[:0], mask=none[:0]).shape == (2, 4)


def test_batch_norm_has_statistics_of_what_is_there():
    _, mask = marks(ROWS["holes"])
    model = Sequential(GRU(3, 4, **options()), BatchNorm(4, **options()), GRU(4, 2, **options()))
    x = numbers(T, B, 3)
    _, _, backward = model.forward(np.where(mask[:, :, None], x, np.nan), mask=mask)
    rows = model["0"](x, mask=mask)[0][mask]
    buffers = model["1"].buffers
    assert_close(buffers["running_mean"], 0.1 * rows.mean(axis=0), count_terms(model, T * B))
    assert_close(buffers["running_var"], 0.9 + 0.1 * rows.var(axis=0, ddof=1), count_terms(model, T * B))
    assert np.isfinite(backward(np.full((T, B, 2), np.where(mask, 1, np.nan)[:, :, None]))[0]).all()


def test_batch_norm_behind_a_pooling():
    """It has no time axis any more, and is given none."""
    o, (reset, mask) = options(), marks(ROWS["parts"])
    model = Sequential(GRU(3, 4, **o), Pooling(4, "mean", **o), BatchNorm(4, **o), Linear(4, 2, **o))
    y, _ = model(numbers(T, B, 3), reset=reset, mask=mask)
    assert y.shape == (len(parts(reset, mask)), 2)
    assert model(numbers(T, B, 3), lengths=[3] * B)[0].shape == (B, 2)
    nested = Sequential(GRU(3, 4, **o), Sequential(Pooling(4, "mean", **o)), BatchNorm(4, **o))
    assert nested(numbers(T, B, 3), mask=mask)[0].shape == (B, 4)


def test_ids_and_one_sequence():
    """Integers where no timestep is are looked up, so they must be ids; what comes of them reaches nothing."""
    o, (reset, mask) = options(), marks(ROWS["holes"])
    model = Sequential(Embedding(5, 3, **o), LSTM(3, 4, **o), Linear(4, 5, **o))
    ids = np.random.default_rng(0).integers(0, 5, (T, B))
    dy = numbers(T, B, 5)
    results = []
    for filler in (0, 4):
        model.zero_grad()
        y, _, backward = model.forward(np.where(mask, ids, filler), reset=reset, mask=mask)
        backward(np.where(mask[:, :, None], dy, filler or np.nan))
        results.append((y[mask], model.flat_grads.copy()))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)
    one, _ = model(ids[:, 2], reset=reset[:, 2], mask=mask[:, 2])
    assert_close(one[mask[:, 2]], model(ids, reset=reset, mask=mask)[0][mask[:, 2], 2], count_terms(model, T))
    real = Sequential(Linear(3, 3, **o), GRU(3, 4, **o), Linear(4, 2, **o))
    x = numbers(T, 3)
    x[~mask[:, 2]] = np.nan
    y, _, backward = real.forward(x, mask=mask[:, 2])
    backward(np.where(mask[:, 2, None], y, np.nan))
    assert np.isfinite(real.flat_grads).all() and real.flat_grads.any()


def test_repeated_outputs_have_a_gradient():
    """The output behind the end, which ``masked_output="repeat"`` gives, is used as the last one is."""
    o, inside = options(), np.arange(T)[:, None] < [7, 2, 3, 5, 1, 6]
    model = Sequential(GRU(3, 4, masked_output="repeat", **o), Linear(4, 2, **o))
    pooled = Sequential(model["0"].__class__(3, 4, **o), Pooling(4, "last", **o), Linear(4, 2, **o))
    x, dy = numbers(T, B, 3), numbers(B, 2)
    y, dx, gradients = train(model, x, lambda y: np.concatenate([0 * y[:-1], dy[None]]), mask=inside)
    wanted = train(pooled, x, lambda y: dy, mask=inside)
    terms = count_terms(model, T * B)
    assert_close(y[-1], wanted[0], terms)
    assert_close(dx, wanted[1], terms)
    for key, gradient in gradients.items():
        place, _, rest = key.partition(".")
        assert_close(
            gradient, wanted[2][f"{'2' if place == '1' else place}.{rest}"], terms if place == "0" else 4 * terms
        )
    norm = Sequential(GRU(3, 4, masked_output="repeat", **o), BatchNorm(4, **o), Linear(4, 2, **o))
    _, _, backward = norm.forward(x, mask=inside)  # BatchNorm gives zeros: what Linear makes of them is not read
    backward(np.where(inside[:, :, None], numbers(T, B, 2), np.nan))
    assert np.isfinite(norm.flat_grads).all()


def test_arrays_may_change_after_forward():
    reset, mask = marks(ROWS["holes"])
    model, x, dy = MODELS["linear around"](options()), numbers(T, B, 3), numbers(T, B, 2)
    _, expected, gradients = train(model, x, lambda y: dy, reset=reset, mask=mask)
    model.zero_grad()
    _, _, backward = model.forward(x, reset=reset, mask=mask)
    reset[:], mask[:] = True, False
    np.testing.assert_array_equal(backward(dy)[0], expected)
    assert all((model.grads[key] == gradient).all() for key, gradient in gradients.items())


def test_steps_equal_the_sequence():
    reset, mask = marks(ROWS["holes"])
    o = options()
    model = Sequential(Linear(3, 4, **o), Sequential(GRU(4, 4, **o), BatchNorm(4, **o)), LSTM(4, 2, **o)).eval()
    x = numbers(T, B, 3)
    output, last = model(x, reset=reset, mask=mask)
    state = None
    for t in range(T):
        y, state = model.step(np.where(mask[t, :, None], x[t], np.nan), state, reset=reset[t], mask=mask[t])
        assert_close(y, output[t], count_terms(model, T))
    assert_close(state[1][0], last[1][0], count_terms(model, T))


# ---- layers of a user


class Plain(gpurnn.Module):
    """Doubles; knows no time."""

    def __call__(self, x):
        return 2 * x

    def forward(self, x, retain=False):
        return 2 * x, lambda dy: 2 * dy


class Timed(Plain):
    """Reads lengths."""

    takes_lengths = True

    def forward(self, x, lengths=None, retain=False):
        return super().forward(x)


class Stateful(gpurnn.Sequential):
    def forward(self, x, state=None, lengths=None):
        return super().forward(x, state, lengths)


RESET, MASK = marks(ROWS["holes"])


@pytest.mark.parametrize(
    "layers, given, message",
    [
        ((Timed, GRU), {"mask": MASK}, r"^mask: 0: Timed.forward does not take it.*mask=None"),
        ((Stateful,), {"mask": MASK}, r"^mask: 0: Stateful.forward does not take it"),
        ((Stateful,), {"reset": RESET}, r"^reset: 0: Stateful.forward does not take it.*reset=None"),
        ((Linear,), {"reset": RESET}, r"^reset: no layer here takes it"),
        ((BatchNorm,), {"reset": RESET}, r"^reset: no layer here takes it"),
    ],
)
def test_layers_that_would_ignore_it(layers, given, message):
    o = {"backend": "cpu", "dtype": "float64"}
    makers = {GRU: lambda: GRU(3, 3, **o), Linear: lambda: Linear(3, 3, **o), BatchNorm: lambda: BatchNorm(3, **o)}
    makers |= {Timed: lambda: Timed(**o), Stateful: lambda: Stateful(GRU(3, 3, **o))}
    for model in (Sequential(*[makers[one]() for one in layers]), Sequential(*[makers[one]() for one in layers][:1])):
        with pytest.raises(TypeError, match=message):
            model.forward(numbers(T, B, 3), **given)
        with pytest.raises(TypeError, match=message):
            model(numbers(T, B, 3), **given)
        assert not model.flat_grads.any()
    deep = Sequential(Sequential(*[makers[one]() for one in layers]))
    with pytest.raises(TypeError, match=r"^reset: no|0.0: "):
        deep(numbers(T, B, 3), **given)


def test_steps_that_would_ignore_it():
    class Streaming(Stateful):
        def forward(self, x, state=None, lengths=None, *, reset=None, mask=None):
            return Sequential.forward(self, x, state, lengths, reset=reset, mask=mask)

        def step(self, x, state=None):
            return super().step(x, state)

    model = Sequential(Streaming(GRU(3, 3, backend="cpu", dtype="float64")))
    model(numbers(T, B, 3), reset=RESET)
    with pytest.raises(TypeError, match="^reset: 0: Streaming.step does not take it"):
        model.step(numbers(B, 3), reset=RESET[0])


def test_a_layer_without_time_needs_nothing():
    o = {"backend": "cpu", "dtype": "float64"}
    model = Sequential(Plain(**o), GRU(3, 3, **o), Plain(**o))
    x = np.where(MASK[:, :, None], numbers(T, B, 3), np.nan)
    y, _, backward = model.forward(x, reset=RESET, mask=MASK)
    dx, _ = backward(np.where(MASK[:, :, None], y, np.nan))
    assert np.isfinite(y).all() and np.isfinite(model.flat_grads).all() and not dx[~MASK].any()


@pytest.mark.parametrize("name", ["reset", "mask"])
def test_other_shapes_are_refused(name):
    o = {"backend": "cpu", "dtype": "float64"}
    for layer in (Pooling(3, **o), Sequential(Linear(3, 3, **o), GRU(3, 3, **o)), Sequential(GRU(3, 3, **o))):
        with pytest.raises(ShapeError, match=rf"^{name}: expected one boolean for each timestep, .T, B. = .7, 6."):
            layer.forward(numbers(T, B, 3), **{name: np.ones((B, T), bool)})
        with pytest.raises(gpurnn.DtypeError, match=f"^{name}: expected booleans"):
            layer.forward(numbers(T, B, 3), **{name: np.ones((T, B), int)})


# ---- variational dropout


@pytest.mark.parametrize("batch_first", [False, True])
def test_variational_dropout_has_a_mask_for_each_sequence(batch_first):
    reset, mask = marks(ROWS["holes"])
    layer = Dropout(0.5, True, batch_first=batch_first, **options())
    turn = (lambda a: a.swapaxes(0, 1)) if batch_first else (lambda a: a)
    y, backward = layer.forward(turn(np.ones((T, B, 50))), reset=turn(reset))
    y, dx = turn(y), turn(backward(y))
    np.testing.assert_array_equal(dx, 2 * y)
    drawn = []
    for b, steps in parts(reset, np.ones_like(mask)):
        assert (y[steps, b] == y[steps[0], b]).all()
        drawn.append(y[steps[0], b].tobytes())
    assert len(set(drawn)) == len(drawn) > B and set(np.unique(y)) == {0, 2}
    without = Dropout(0.5, True, batch_first=batch_first, **options())(turn(np.ones((T, B, 50))))
    begun = layer.__class__(0.5, True, batch_first=batch_first, **options())
    again = begun(turn(np.ones((T, B, 50))), reset=turn(np.zeros_like(reset)))
    np.testing.assert_array_equal(again, without)
    assert layer.eval()(turn(y), reset=turn(reset)).shape == turn(y).shape


def test_only_variational_dropout_takes_resets():
    o, x = options(), numbers(T, B, 3)
    Sequential(Dropout(0.5, True, **o)).forward(x, reset=RESET)
    with pytest.raises(TypeError, match="^reset: no layer here takes it"):
        Sequential(Dropout(0.5, **o)).forward(x, reset=RESET)
    with pytest.raises(ShapeError, match="^reset: expected one boolean for each timestep"):
        Dropout(0.5, True, **o)(x, reset=RESET.T)
