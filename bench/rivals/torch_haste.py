"""Haste's LayerNormLSTM and LayerNormGRU, written as its own fall-back is: a loop in TorchScript.

It needs torch, so that it is imported only where that runs.
"""

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

from .equations import EPSILON
from .torch_module import Loop


def _haste_lstm(ax: Tensor, R: Tensor, gain: Tensor, bias: Tensor, gain_c: Tensor, bias_c: Tensor, epsilon: float):
    H = R.shape[1]
    h = torch.zeros(ax.shape[1], H)
    c = torch.zeros(ax.shape[1], H)
    outputs = []
    for step in ax.unbind(0):
        v = F.layer_norm(F.linear(h, R), [4 * H], gain, bias, epsilon) + step
        i, f, g, o = v.chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(F.layer_norm(c, [H], gain_c, bias_c, epsilon))
        outputs.append(h)
    return torch.stack(outputs)


def _haste_gru(ax: Tensor, R: Tensor, gain: Tensor, bias: Tensor, epsilon: float):
    H = R.shape[1]
    h = torch.zeros(ax.shape[1], H)
    outputs = []
    for step in ax.unbind(0):
        hr, hz, hn = F.layer_norm(F.linear(h, R), [3 * H], gain, bias, epsilon).chunk(3, 1)
        xr, xz, xn = step.chunk(3, 1)
        z = torch.sigmoid(xz + hz)
        h = z * h + (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        outputs.append(h)
    return torch.stack(outputs)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch compiles it all the same
    _haste_lstm, _haste_gru = torch.jit.script(_haste_lstm), torch.jit.script(_haste_gru)


class HasteLoop(Loop):
    """Haste's LayerNormLSTM and LayerNormGRU, gates in gpurnn's order."""

    def one_pass(self, x, p, reverse, masks, weight_mask):
        ax = self.equations.inputs(p, x)
        ax = ax.flip(0) if reverse else ax
        if hasattr(p, "gain_c"):
            found = _haste_lstm(ax, p.weight_hh, p.gain_hh, p.bias_hh, p.gain_c, p.bias_c, EPSILON)
        else:
            found = _haste_gru(ax, p.weight_hh, p.gain_hh, p.bias_hh, EPSILON)
        return found.flip(0) if reverse else found
