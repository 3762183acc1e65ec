"""The equations of every cell as one writes them by hand in torch or in JAX: what there is without gpurnn.

``f`` stands for the functions of either, see ``torch_loop.py`` and ``jax.py``. Products with x, and what normalizes
them, are taken out of the loop, as Haste does. Nothing here is gpurnn's, so each checks the other.
"""

from types import SimpleNamespace

from ..cells import CELLS

EPSILON = 1e-5  # of the normalizations
_UNSET = {
    "layer_norm": False, "batch_norm": 0, "recurrent_dropout": 0.0,
    "recurrent_dropout_each": "timestep", "zoneout": 0.0, "peephole": False, "coupled": False,
    "recurrent_activation": "sigmoid", "cell_clip": 0.0, "gradient_clip": 0.0, "weight_dropout": 0.0,
}  # fmt: skip


class Equations:
    """Those of one case. f: the functions of torch or JAX.

    ``p`` of the methods has a pass's parameters by their names, without the suffix: p.weight_ih, p.gain_hh, ...
    """

    def __init__(self, f, case):
        made = CELLS[case.cell]
        self.f, self.training = f, case.what != "inference"
        self.options = o = SimpleNamespace(**_UNSET | made.options)
        self.states = len(case.record.states)
        self._normalizes = bool(o.layer_norm or o.batch_norm)
        self._each_sequence = made.plain == "rnn" or o.recurrent_dropout_each == "sequence"
        self._step = _STEPS[made.plain or case.cell]

    def dropped_weights(self, p, mask):
        """``p``, with a call's dropout of W_hh. mask: as of W_hh, or None."""
        if mask is None:
            return p
        dropped = p.weight_hh * (mask * (1 / (1 - self.options.weight_dropout)))
        return SimpleNamespace(**vars(p) | {"weight_hh": dropped})

    def scaled(self, masks):
        """The masks of a pass as ``step`` takes them: those of dropout with its scale."""
        rate = self.options.recurrent_dropout
        return [masks[0] * (1 / (1 - rate)), *masks[1:]] if rate and masks else masks

    def inputs(self, p, x):
        """(T, B, G*H): W_ih x + b_ih for all of time, normalized."""
        if hasattr(p, "gain_ih"):
            return self._normalized(self.f.linear(x, p.weight_ih), p.gain_ih, p.bias_ih)
        return self.f.linear(x, p.weight_ih, getattr(p, "bias_ih", None))

    def step(self, p, ax, state, masks):
        """The new states (B, H). ax: (B, G*H). state: the old ones. masks: of the cell's draws, (B, H) each."""
        new = self._step(self, p, ax, state, iter(masks))
        limit = self.options.gradient_clip
        return tuple(self.f.clip_gradient(one, limit) for one in new) if limit else new

    # ---- what several cells have

    def _normalized(self, x, gain, bias):
        if self.options.layer_norm:
            return self.f.layer_norm(x, gain, bias, EPSILON)
        return self.f.batch_norm(x, EPSILON, self.training) * gain + bias

    def _hidden(self, p, h, masks):
        """(B, rows*H): W_hh h + b_hh, normalized."""
        if self._each_sequence:
            h = self._dropped(h, masks)
        if hasattr(p, "gain_hh"):
            return self._normalized(self.f.linear(h, p.weight_hh), p.gain_hh, p.bias_hh)
        return self.f.linear(h, p.weight_hh, getattr(p, "bias_hh", None))

    def _dropped(self, x, masks):
        return x * next(masks) if self.options.recurrent_dropout and self.training else x

    def _written(self, x, masks):
        """What is written to a state."""
        return x if self._each_sequence else self._dropped(x, masks)

    def _zoned(self, new, old, masks, number=0):
        rate = self.options.zoneout
        rate = rate[number] if isinstance(rate, tuple) else rate
        if not rate:
            return new
        return self.f.where(next(masks), new, old) if self.training else old + (1 - rate) * (new - old)

    def _gate(self, x):
        return getattr(self.f, self.options.recurrent_activation)(x)


def _rnn(e, p, ax, s, masks):
    z = ax + e._hidden(p, s[0], masks)
    if e._normalizes:
        z = e._normalized(z, p.gain, p.bias)
    return (e._zoned(e.f.tanh(z), s[0], masks),)


def _gru(e, p, ax, s, masks):
    (xr, xz, xn), (hr, hz, hn) = e.f.split(ax, 3), e.f.split(e._hidden(p, s[0], masks), 3)
    r, z = e._gate(xr + hr), e._gate(xz + hz)
    n = e._written(e.f.tanh(xn + r * hn), masks)
    return (e._zoned(n + z * (s[0] - n), s[0], masks),)


def _lstm(e, p, ax, s, masks):
    h, c, f, o = *s, e.f, e.options
    gates = ax + e._hidden(p, h, masks)
    if o.coupled:
        forget, g, out = f.split(gates, 3)
    else:
        write, forget, g, out = f.split(gates, 4)
    if o.peephole:
        write, forget = write + p.p_i * c, forget + p.p_f * c
    forget = e._gate(forget)
    write = 1 - forget if o.coupled else e._gate(write)
    new = forget * c + write * e._written(f.tanh(g), masks)
    if o.cell_clip:
        new = f.clip(new, -o.cell_clip, o.cell_clip)
    out = e._gate(out + p.p_o * new if o.peephole else out)
    shown = e._normalized(new, p.gain_c, p.bias_c) if e._normalizes else new
    return e._zoned(out * f.tanh(shown), h, masks), e._zoned(new, c, masks, 1)


# ---- from the literature


def _peephole(e, p, ax, s, masks):
    f, c = e.f, s[1]
    i, forget, g, o = f.split(ax + e._hidden(p, s[0], masks), 4)
    new = f.sigmoid(forget + p.p_f * c) * c + f.sigmoid(i + p.p_i * c) * f.tanh(g)
    return f.sigmoid(o + p.p_o * new) * f.tanh(new), new


def _cifg(e, p, ax, s, masks):
    f = e.f
    forget, g, o = f.split(ax + e._hidden(p, s[0], masks), 3)
    forget = f.sigmoid(forget)
    c = forget * s[1] + (1 - forget) * f.tanh(g)
    return f.sigmoid(o) * f.tanh(c), c


def _mgu(e, p, ax, s, masks):
    f, (h,), (xf, xn) = e.f, s, e.f.split(ax, 2)
    (Wf, Wn), (bf, bn) = f.split_rows(p.weight_hh, 2), f.split(p.bias_hh, 2)
    forget = f.sigmoid(xf + f.linear(h, Wf, bf))
    n = f.tanh(xn + f.linear(forget * h, Wn, bn))
    return ((1 - forget) * h + forget * n,)


def _ligru(e, p, ax, s, masks):
    z, n = e.f.split(ax + e._hidden(p, s[0], masks), 2)
    z = e.f.sigmoid(z)
    return (z * s[0] + (1 - z) * e.f.relu(n),)


def _indrnn(e, p, ax, s, masks):
    return (e.f.relu(ax + p.bias_hh + p.u * s[0]),)


def _ugrnn(e, p, ax, s, masks):
    g, n = e.f.split(ax + e._hidden(p, s[0], masks), 2)
    g = e.f.sigmoid(g)
    return (g * s[0] + (1 - g) * e.f.tanh(n),)


def _slstm(e, p, ax, s, masks, log_forget="log_sigmoid"):
    f, (h, c, n, m) = e.f, s
    i, forget, z, o = f.split(ax + e._hidden(p, h, masks), 4)
    forget = getattr(f, log_forget)(forget) + m
    new_m = f.where(n > 0, f.maximum(forget, i), i)
    # without the limit exp is infinite where where() takes the other side, and its gradient NaN
    forget, write = f.exp(f.clip(forget - new_m, None, 0.0)), f.exp(i - new_m)
    c, n = forget * c + write * f.tanh(z), forget * n + write
    return f.sigmoid(o) * (c / n), c, n, new_m


def _slstm_exp(e, p, ax, s, masks):
    return _slstm(e, p, ax, s, masks, "identity")


def _mingru(e, p, ax, s, masks):
    z, n = e.f.split(ax + p.bias_hh, 2)
    z = e.f.sigmoid(z)
    return ((1 - z) * s[0] + z * n,)


def _minlstm(e, p, ax, s, masks):
    forget, i, n = e.f.split(ax + p.bias_hh, 3)
    forget, i = e.f.sigmoid(forget), e.f.sigmoid(i)
    return ((forget * s[0] + i * n) / (forget + i),)


def _mut1(e, p, ax, s, masks):
    f, (h,) = e.f, s
    (xr, xn, xz), (Wr, Wn), (br, bn, bz) = f.split(ax, 3), f.split_rows(p.weight_hh, 2), f.split(p.bias_hh, 3)
    z, r = f.sigmoid(xz + bz), f.sigmoid(xr + f.linear(h, Wr, br))
    n = f.tanh(f.linear(r * h, Wn, bn) + f.tanh(xn))
    return (z * n + (1 - z) * h,)


def _cornn(e, p, ax, s, masks, dt=0.042, gamma=2.7, epsilon=4.7):
    f, (y, z) = e.f, s
    (xy, _), (Wy, Wz), (by, bz) = f.split(ax, 2), f.split_rows(p.weight_hh, 2), f.split(p.bias_hh, 2)
    force = f.tanh(xy + f.linear(y, Wy, by) + f.linear(z, Wz, bz))
    z = z + dt * (force - gamma * y - epsilon * z)
    return y + dt * z, z


_STEPS = {
    "rnn": _rnn, "gru": _gru, "lstm": _lstm, "peephole": _peephole, "cifg": _cifg, "mgu": _mgu, "ligru": _ligru,
    "indrnn": _indrnn, "ugrnn": _ugrnn, "slstm": _slstm, "slstm_exp": _slstm_exp, "mingru": _mingru,
    "minlstm": _minlstm, "mut1": _mut1, "elman": _rnn, "cornn": _cornn,
}  # fmt: skip
