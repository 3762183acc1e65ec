"""Options of RNN, LSTM and GRU as equations: each combination is a traced cell.

layer_norm          Ba, Kiros, Hinton 2016. LSTM and GRU: LN(W_ih x) and LN(W_hh h), each over all gates with a gain for
                    each number, before the biases; LSTM also LN(c') with gain and bias before the last tanh. RNN: LN of
                    their sum. These are the equations of Haste, too (``weights_from_haste``)
batch_norm          Cooijmans et al. 2017: the same places, normalized over the batch at each timestep
recurrent_dropout   each timestep: on what is written to the state (Semeniuta, Severyn, Barth 2016); or one mask for a
                    sequence on the h that W_hh multiplies (Gal & Ghahramani 2016)
zoneout             units keep their old h (and c) at random (Krueger et al. 2017); h' is made from the c' before its
own
                    zoneout
peephole            i, f read c and o reads c', by a weight for each unit (Gers & Schmidhuber 2000)
coupled             LSTM: i = 1 - f (Greff et al. 2017)
activation          of g and c' (LSTM), of n (GRU); recurrent_activation of the gates
cell_clip           c' is clipped to [-cell_clip, cell_clip]; its gradient is zero where it was
gradient_clip       the gradients with respect to h and c are clipped to [-g, g] at each timestep (Graves 2013)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from ..errors import check_choice, check_flag, check_number, check_size
from . import functions as f
from .functions import ACTIVATIONS, check_activation
from .gru import GRUStep
from .lstm import LSTMStep
from .record import Cell, Parameter
from .rnn import RNNStep
from .symbols import clip_gradient
from .traced import TracedCell


@dataclass(frozen=True)
class Options:
    """The options of a cell; those that it does not have stay at these values, which mean none."""

    layer_norm: bool = False
    batch_norm: int = 0
    recurrent_dropout: float = 0.0
    recurrent_dropout_each: str = "timestep"
    zoneout: tuple[float, float] = (0.0, 0.0)
    peephole: bool = False
    coupled: bool = False
    activation: str | Callable[..., Any] = "tanh"
    recurrent_activation: str | Callable[..., Any] = "sigmoid"
    cell_clip: float = 0.0
    gradient_clip: float = 0.0
    bias: bool = True
    reset_after: bool = True

    @property
    def normed(self) -> bool:
        """Whether pre-activations are normalized, so that biases come after that."""
        return self.layer_norm or bool(self.batch_norm)

    @property
    def name(self) -> str:
        """The options that are set, for the name of the cell."""
        words = []
        for one in fields(self):
            value = getattr(self, one.name)
            if value != one.default and one.name not in ("bias", "recurrent_dropout_each"):
                words.append(value if isinstance(value, str) else getattr(value, "__name__", one.name))
        return "_".join(words).replace("<lambda>", "own")


def checked_options(**given: Any) -> Options:
    """``Options`` of a layer's arguments. Raises TypeError and ValueError that name them."""
    values = {}
    for name, value in given.items():
        if name in ("layer_norm", "peephole", "coupled"):
            value = check_flag(name, value)
        elif name == "batch_norm":
            value = _timesteps(value)
        elif name == "recurrent_dropout":
            value = check_number(name, value, 0, 1)
        elif name == "recurrent_dropout_each":
            value = check_choice(name, value, ("timestep", "sequence"))
        elif name == "zoneout":
            value = _zoneout(value)
        elif name in ("activation", "recurrent_activation"):
            value = check_activation(name, value)
        elif name in ("cell_clip", "gradient_clip"):
            value = check_number(name, value, 0)
        values[name] = value
    options = Options(**values)
    if options.layer_norm and options.batch_norm:
        raise ValueError("layer_norm and batch_norm normalize the same numbers: give one of them")
    return options


def _zoneout(value):
    both = value if isinstance(value, (tuple, list)) else (value, value)
    if len(both) != 2:
        raise ValueError(f"zoneout: expected a rate, or a pair of rates of h and c, got {len(both)} rates")
    return tuple(float(check_number("zoneout", rate, 0, 1)) for rate in both)


def _timesteps(value):
    if value is True:
        return 100
    if isinstance(value, bool):
        return 0
    return check_size("batch_norm", value, 0)


def cell_with(kind: str, plain: Cell | None, **given: Any) -> Cell:
    """The cell of a layer: ``plain`` where no option is set, else a traced one. None: there is no plain one.

    kind: "rnn", "lstm" or "gru". Raises TypeError and ValueError, which name the option.
    """
    bias, reset_after = given.pop("bias"), given.pop("reset_after", True)
    if kind != "lstm" and isinstance(given.get("zoneout"), (tuple, list)):
        raise ValueError(f"zoneout: expected one rate, as {kind.upper()} has one state, h, got {given['zoneout']!r}")
    options = checked_options(**given)
    unset = Options(recurrent_dropout_each=options.recurrent_dropout_each)
    if plain is not None and replace(options, activation="tanh") == unset and (kind == "rnn" or options == unset):
        return plain
    _check_together(options, plain, reset_after)
    return _built(kind, replace(options, bias=bias, reset_after=reset_after))


def _check_together(options, plain, reset_after):
    """Raise ValueError for options that exclude one another."""
    gal = options.recurrent_dropout and options.recurrent_dropout_each == "sequence"
    if not reset_after and (options.normed or gal):
        what = "recurrent_dropout for each sequence" if gal else "normalization"
        raise ValueError(f"{what} needs reset_after=True: the original form has a second product with r h")
    if plain is not None and plain.projects:
        raise ValueError("proj_size: options of the cell do not go together with a projection")


@functools.lru_cache(maxsize=256)
def _built(kind, options):
    """The traced cell of some options, one for all layers that have them."""
    made = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}[kind](options)
    made.maker = (_built, (kind, options))
    return made


def traced_form(cell: Cell) -> TracedCell | None:
    """The traced cell of the equations of a cell in evaluation, without a projection; None where there is none."""
    cell = cell.evaluating
    if isinstance(cell, RNNStep):
        return _built("rnn", Options(activation=cell.nonlinearity))
    if isinstance(cell, LSTMStep):
        return _built("lstm", Options())
    if isinstance(cell, GRUStep):
        return _built("gru", Options(reset_after=cell.reset_after))
    return cell if isinstance(cell, TracedCell) else None


def _activation(chosen):
    return ACTIVATIONS[chosen] if isinstance(chosen, str) else chosen


# ---- what the three share


def _parameters(options, gates, inner, hidden=None):
    """The parameters of the normalizations, and the biases, which come after them. inner: whether c' is normalized."""
    if not options.normed:
        return []
    initial = 0.1 if options.batch_norm else "ones"  # Cooijmans 2017, 4.1
    hidden = gates if hidden is None else hidden
    found = [Parameter("gain_ih", gates, initial), Parameter("gain_hh", hidden, initial)]
    if inner:
        found += [Parameter("gain_c", (), initial), Parameter("bias_c")]
    if options.bias:
        found += [Parameter("bias_ih", gates, "biases"), Parameter("bias_hh", gates, "biases")]
    return found


def _normalized(options, parts):
    """Pre-activations of several gates, normalized."""
    if options.layer_norm:
        return f.normalized_together(*parts)
    return tuple(f.batch_normalized(part, options.batch_norm) for part in parts)


def _preactivations(options, gates, ax, ah, p):
    """Gate -> W_ih x + b_ih, gate -> W_hh h + b_hh, normalized where the options say so. ah: gate -> symbol."""
    inputs, hidden = {gate: getattr(ax, gate) for gate in gates}, dict(ah)
    if options.normed:
        for values, own, bias in ((inputs, "gain_ih", "bias_ih"), (hidden, "gain_hh", "bias_hh")):
            parts = _normalized(options, list(values.values()))
            for gate, part in zip(list(values), parts, strict=True):
                values[gate] = getattr(getattr(p, own), gate) * part
                if options.bias:
                    values[gate] = values[gate] + getattr(getattr(p, bias), gate)
    return inputs, hidden


def _hidden(options, gates, ah, h):
    """Gate -> the symbol of W_hh h, with Gal's dropout of h where the options say so."""
    symbols = {gate: getattr(ah, gate) for gate in gates}
    if options.recurrent_dropout and options.recurrent_dropout_each == "sequence":
        dropped = f.dropout(h, options.recurrent_dropout, "sequence")
        symbols = {gate: symbol(dropped) for gate, symbol in symbols.items()}
    return symbols


def _dropped(options, update):
    """What is written to the state, with Semeniuta's dropout."""
    if options.recurrent_dropout_each == "sequence":
        return update
    return f.dropout(update, options.recurrent_dropout)


def _returned(options, *states):
    """The new states, whose gradients are clipped where the options say so."""
    if options.gradient_clip:
        states = tuple(clip_gradient(state, options.gradient_clip) for state in states)
    return states


def _facts(options, **facts):
    return facts | ({"biases": False} if options.normed else {})


# ---- the three


def _rnn(options):
    act = _activation(options.activation)
    parameters = []
    if options.normed:
        parameters = [Parameter("gain", (), 0.1 if options.batch_norm else "ones")]
        parameters += [Parameter("bias", (), "biases")] if options.bias else []

    def equations(ax, ah, s, p):
        z = ax.z + _hidden(options, ("z",), ah, s.h)["z"]
        if options.normed:
            (z,) = _normalized(options, [z])
            z = p.gain * z + p.bias if options.bias else p.gain * z
        return _returned(options, f.zoneout(act(z), s.h, options.zoneout[0]))

    return TracedCell(equations, ("z",), ("h",), parameters, f"rnn_{options.name}", **_facts(options))


def _lstm(options):
    gates = ("f", "g", "o") if options.coupled else ("i", "f", "g", "o")
    act, gate_act = _activation(options.activation), _activation(options.recurrent_activation)
    parameters = _parameters(options, gates, inner=True)
    if options.peephole:
        parameters += [Parameter(f"p_{gate}", (), "biases") for gate in gates if gate != "g"]

    def equations(ax, ah, s, p):
        inputs, hidden = _preactivations(options, gates, ax, _hidden(options, gates, ah, s.h), p)
        z = {gate: inputs[gate] + hidden[gate] for gate in gates}
        if options.peephole:
            for gate in gates[: gates.index("g")]:
                z[gate] = z[gate] + getattr(p, f"p_{gate}") * s.c
        forget = gate_act(z["f"])
        write = 1 - forget if options.coupled else gate_act(z["i"])
        g = act(z["g"])
        c = forget * s.c + write * _dropped(options, g)
        if options.cell_clip:
            c = f.clip(c, -options.cell_clip, options.cell_clip)
        o = gate_act(z["o"] + p.p_o * c if options.peephole else z["o"])
        shown = c
        if options.normed:
            (normalized,) = _normalized(options, [c])
            shown = p.gain_c * normalized + p.bias_c
        h = o * act(shown)
        h, c = f.zoneout(h, s.h, options.zoneout[0]), f.zoneout(c, s.c, options.zoneout[1])
        return _returned(options, h, c)

    facts = _facts(options, remembers="f", writes=None if options.coupled else "i")
    return TracedCell(equations, gates, ("h", "c"), parameters, f"lstm_{options.name}", **facts)


def _gru(options):
    gates = ("r", "z", "n")
    act, gate_act = _activation(options.activation), _activation(options.recurrent_activation)

    def equations(ax, ah, s, p):
        of_h = gates if options.reset_after else gates[:2]
        inputs, hidden = _preactivations(options, gates, ax, _hidden(options, of_h, ah, s.h), p)
        r, z = gate_act(inputs["r"] + hidden["r"]), gate_act(inputs["z"] + hidden["z"])
        n = _dropped(options, act(inputs["n"] + (r * hidden["n"] if options.reset_after else ah.n(r * s.h))))
        return _returned(options, f.zoneout(n + z * (s.h - n), s.h, options.zoneout[0]))

    parameters = _parameters(options, gates, inner=False)
    return TracedCell(equations, gates, ("h",), parameters, f"gru_{options.name}", **_facts(options, remembers="z"))
