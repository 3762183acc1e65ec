"""Parity with torch.nn on the CPU in float64: outputs, states and every gradient, over random configurations."""

import numpy as np
import pytest
from optional import optional

import gpurnn

torch = optional("torch")

KINDS = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}


def relative(ours, theirs):
    """Largest error, relative to the largest entry (or 1e-3, where all entries are tiny)."""
    theirs = theirs.detach().numpy()
    if ours.size == 0:
        assert ours.shape == theirs.shape
        return 0.0
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-3))


def draw(kind, backend, seed):
    """A random configuration: kind, constructor arguments common to both, and the call's shape."""
    rng = np.random.default_rng([seed, *f"{kind} {backend}".encode()])
    options = dict(
        num_layers=int(rng.integers(1, 4)),
        bias=bool(rng.random() < 0.8),
        batch_first=bool(rng.random() < 0.4),
        bidirectional=bool(rng.random() < 0.5),
    )
    hidden = int(rng.integers(1, 41))
    if kind == "lstm" and hidden > 1 and rng.random() < 0.4:
        options["proj_size"] = int(rng.integers(1, hidden))
    if kind == "rnn-relu":
        kind, options["nonlinearity"] = "rnn", "relu"
    call = dict(
        T=int(rng.integers(1, 31)),
        B=int(rng.integers(1, 41)),
        ragged=bool(rng.random() < 0.5),
        state=bool(rng.random() < 0.8),
        single=bool(rng.random() < 0.1),
    )
    return rng, kind, int(rng.integers(1, 41)), hidden, options, call


@pytest.mark.parametrize("seed", [*range(5), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 20))])
@pytest.mark.parametrize("backend", ["numpy", "cpu"])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn", "rnn-relu"])
def test_random_configuration(kind, backend, seed):
    rng, kind, inside, hidden, options, call = draw(kind, backend, seed)
    ours_class, torch_class = (getattr(library, KINDS[kind]) for library in (gpurnn, torch.nn))
    theirs = torch_class(inside, hidden, dtype=torch.float64, **options)
    ours = ours_class(inside, hidden, backend=backend, dtype="float64", seed=seed, **options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.copy_(torch.from_numpy(ours.params[name]))
    assert list(ours.params) == [name for name, _ in theirs.named_parameters()]

    T, B, D, L = call["T"], call["B"], 1 + options["bidirectional"], options["num_layers"]
    single = call["single"]
    x = rng.standard_normal((T, inside) if single else (B, T, inside) if options["batch_first"] else (T, B, inside))
    P = options.get("proj_size", 0) or hidden
    sizes = (P, hidden) if kind == "lstm" else (P,)
    shape = (L * D,) if single else (L * D, B)
    state = tuple(rng.standard_normal((*shape, size)) for size in sizes) if call["state"] else None
    lengths = None if single or not call["ragged"] else rng.integers(1, T + 1, B)
    if lengths is not None:
        lengths[rng.integers(B)] = T  # torch pads to the longest

    tx = torch.from_numpy(x).requires_grad_()
    tstate = None if state is None else tuple(torch.from_numpy(s).requires_grad_() for s in state)
    given = tstate if tstate is None or kind == "lstm" else tstate[0]
    if lengths is None:
        toutput, tfinal = theirs(tx, given)
    else:
        utils = torch.nn.utils.rnn
        packed = utils.pack_padded_sequence(
            tx, torch.from_numpy(lengths), batch_first=options["batch_first"], enforce_sorted=False
        )
        toutput, tfinal = theirs(packed, given)
        toutput, _ = utils.pad_packed_sequence(toutput, batch_first=options["batch_first"])
    tfinal = tfinal if kind == "lstm" else (tfinal,)

    mine = state if state is None or kind == "lstm" else state[0]
    output, final, backward = ours.forward(x, mine, lengths)
    inferred, inferred_final = ours(x, mine, lengths)
    final = final if kind == "lstm" else (final,)
    inferred_final = inferred_final if kind == "lstm" else (inferred_final,)
    assert np.array_equal(output, inferred)
    assert all(np.array_equal(a, b) for a, b in zip(final, inferred_final, strict=True))
    errors = {"output": relative(output, toutput)}
    errors |= {f"state {k}": relative(a, b) for k, (a, b) in enumerate(zip(final, tfinal, strict=True))}

    doutput = rng.standard_normal(output.shape)
    dfinal = tuple(rng.standard_normal(part.shape) for part in final)
    weighted = [(toutput * torch.from_numpy(doutput)).sum()]
    weighted += [(part * torch.from_numpy(d)).sum() for part, d in zip(tfinal, dfinal, strict=True)]
    torch.stack(weighted).sum().backward()
    dx, dinitial = backward(doutput, dfinal if kind == "lstm" else dfinal[0])
    dinitial = dinitial if kind == "lstm" else (dinitial,)
    errors["dx"] = relative(dx, tx.grad)
    if tstate is not None:
        errors |= {f"dstate {k}": relative(d, t.grad) for k, (d, t) in enumerate(zip(dinitial, tstate, strict=True))}
    errors |= {name: relative(ours.grads[name], p.grad) for name, p in theirs.named_parameters()}
    assert max(errors.values()) < 1e-10, errors
