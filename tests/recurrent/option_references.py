"""The options of RNN, LSTM and GRU as torch operations, from the equations of their papers: one layer and direction.

Written apart from gpurnn: a loop over time, whole gates, torch's own layer_norm; its autograd makes the derivatives.
"""

import functools

from optional import optional

torch = optional("torch")


@functools.cache
def activations():
    """Name -> torch's function."""
    return {
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "relu": torch.relu,
        "hard_sigmoid": lambda x: torch.clamp(x / 6 + 0.5, 0, 1),  # torch's own is exact to float32 alone
        "hard_sigmoid_2": lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
        "leaky_relu": torch.nn.functional.leaky_relu,
        "softsign": torch.nn.functional.softsign,
        "softplus": torch.nn.functional.softplus,
        "elu": torch.nn.functional.elu,
        "silu": torch.nn.functional.silu,
        "identity": lambda x: x,
    }


@functools.cache
def clipped_gradient():
    """The identity whose gradient is clipped, as a torch function of (x, limit)."""

    class ClippedGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, limit):
            ctx.limit = limit
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.clamp(-ctx.limit, ctx.limit), None

    return ClippedGradient.apply


def run(kind, p, x, state, lengths, options, masks=None, running=None, training=True):
    """(output, final state) of one layer. p: parameters without suffix. masks: (T or 1, B, M*H) booleans or None.

    state: a list of (B, H). running: (mean, variance), each (normalizations, timesteps, H), read in evaluation.
    """
    T, B, _ = x.shape
    outputs, states = [], list(state)
    for t in range(T):
        drawn = None if masks is None else masks[t if len(masks) > 1 else 0]
        active = (t < lengths)[:, None]
        norm = Norm(options, active, training, running, t)
        new = {"rnn": rnn, "lstm": lstm, "gru": gru}[kind](p, x[t], states, options, Draws(drawn), norm, training)
        if options.get("gradient_clip"):
            new = [clipped_gradient()(part, options["gradient_clip"]) for part in new]
        states = [torch.where(active, after, before) for after, before in zip(new, states, strict=True)]
        outputs.append(torch.where(active, states[0], 0))
    return torch.stack(outputs), states


class Draws:
    """The masks of a timestep, in the order in which the cell draws."""

    def __init__(self, masks):
        self.masks, self.used = masks, 0

    def next(self, like):
        H = like.shape[1]
        mask = self.masks[:, self.used * H : (self.used + 1) * H]
        self.used += 1
        return mask


class Norm:
    """Layer or batch normalization, without gain and bias."""

    def __init__(self, options, active, training, running, t):
        self.layer, self.batch = options.get("layer_norm"), options.get("batch_norm")
        self.active, self.training, self.running, self.t, self.used = active[:, 0], training, running, t, 0

    def __bool__(self):
        return bool(self.layer or self.batch)

    def __call__(self, x, gates):
        if self.layer:
            return torch.nn.functional.layer_norm(x, x.shape[1:])
        parts = []
        for part in x.chunk(gates, 1):
            k, self.used = self.used, self.used + 1
            if self.training:
                some = part[self.active]
                mean, variance = some.mean(0), some.var(0, unbiased=False)
            else:
                place = min(self.t, self.running[0].shape[1] - 1)
                mean, variance = self.running[0][k, place], self.running[1][k, place]
            parts.append((part - mean) / torch.sqrt(variance + 1e-5))
        return torch.cat(parts, 1)


def dropped(x, rate, draws, training):
    return x * draws.next(x) / (1 - rate) if rate and training else x


def zoned(new, old, rate, draws, training):
    if not rate:
        return new
    return torch.where(draws.next(new), new, old) if training else rate * old + (1 - rate) * new


def bias(p, name):
    return p.get(name, 0.0)


def rnn(p, x, states, options, draws, norm, training):
    (h,) = states
    read = dropped(h, options.get("recurrent_dropout", 0), draws, training)
    act = activations()[options.get("nonlinearity", "tanh")]
    z = x @ p["weight_ih"].T + read @ p["weight_hh"].T
    z = p["gain"] * norm(z, 1) + bias(p, "bias") if norm else z + bias(p, "bias_ih") + bias(p, "bias_hh")
    return [zoned(act(z), h, options.get("zoneout", 0), draws, training)]


def preactivations(p, x, h, options, draws, norm, training, gates):
    if options.get("recurrent_dropout_each") == "sequence":
        h = dropped(h, options["recurrent_dropout"], draws, training)
    ax, ah = x @ p["weight_ih"].T, h @ p["weight_hh"].T
    if norm:
        ax, ah = p["gain_ih"] * norm(ax, gates), p["gain_hh"] * norm(ah, gates)
    return ax + bias(p, "bias_ih"), ah + bias(p, "bias_hh")


def update(g, options, draws, training):
    """Semeniuta's dropout."""
    if options.get("recurrent_dropout_each") == "sequence":
        return g
    return dropped(g, options.get("recurrent_dropout", 0), draws, training)


def lstm(p, x, states, options, draws, norm, training):
    h, c = states
    coupled, peephole = options.get("coupled"), options.get("peephole")
    ax, ah = preactivations(p, x, h, options, draws, norm, training, 3 if coupled else 4)
    z = (ax + ah).chunk(3 if coupled else 4, 1)
    z_f, z_g, z_o = z[-3:]
    act = activations()[options.get("activation", "tanh")]
    gate = activations()[options.get("recurrent_activation", "sigmoid")]
    f = gate(z_f + p["p_f"] * c if peephole else z_f)
    i = 1 - f if coupled else gate(z[0] + p["p_i"] * c if peephole else z[0])
    c_new = f * c + i * update(act(z_g), options, draws, training)
    if options.get("cell_clip"):
        c_new = c_new.clamp(-options["cell_clip"], options["cell_clip"])
    o = gate(z_o + p["p_o"] * c_new if peephole else z_o)
    shown = p["gain_c"] * norm(c_new, 1) + p["bias_c"] if norm else c_new
    rates = options.get("zoneout", 0)
    rate_h, rate_c = rates if isinstance(rates, tuple) else (rates, rates)
    h_new = zoned(o * act(shown), h, rate_h, draws, training)
    return [h_new, zoned(c_new, c, rate_c, draws, training)]


def gru(p, x, states, options, draws, norm, training):
    (h,) = states
    act = activations()[options.get("activation", "tanh")]
    gate = activations()[options.get("recurrent_activation", "sigmoid")]
    H = h.shape[1]
    if options.get("reset_after", True):
        ax, ah = preactivations(p, x, h, options, draws, norm, training, 3)
        r, z = gate((ax + ah)[:, :H]), gate((ax + ah)[:, H : 2 * H])
        n = act(ax[:, 2 * H :] + r * ah[:, 2 * H :])
    else:
        ax, W, b = x @ p["weight_ih"].T + bias(p, "bias_ih"), p["weight_hh"], bias(p, "bias_hh") + torch.zeros(3 * H)
        both = ax[:, : 2 * H] + h @ W[: 2 * H].T + b[: 2 * H]
        r, z = gate(both[:, :H]), gate(both[:, H:])
        n = act(ax[:, 2 * H :] + (r * h) @ W[2 * H :].T + b[2 * H :])
    new = (1 - z) * update(n, options, draws, training) + z * h
    return [zoned(new, h, options.get("zoneout", 0), draws, training)]
