"""The module of ``torch_loop.py``. It needs torch, so that it is imported only where that runs."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from .equations import Equations


class _ClipGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, limit):
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx, d):
        return d.clamp(-ctx.limit, ctx.limit), None


def _batch_norm(x, epsilon, training):
    """x (..., B, H) over the batch; in evaluation by the running statistics of a layer that has seen nothing."""
    if not training:
        return x * (1 + epsilon) ** -0.5
    variance, mean = torch.var_mean(x, -2, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + epsilon)


FUNCTIONS = SimpleNamespace(
    sigmoid=torch.sigmoid, hard_sigmoid=F.hardsigmoid, log_sigmoid=F.logsigmoid, identity=lambda x: x,
    tanh=torch.tanh, relu=torch.relu, exp=torch.exp, clip=torch.clamp, maximum=torch.maximum, where=torch.where,
    linear=F.linear, split=lambda x, n: x.chunk(n, -1), split_rows=lambda x, n: x.chunk(n, 0),
    layer_norm=lambda x, gain, bias, epsilon: F.layer_norm(x, x.shape[-1:], gain, bias, epsilon),
    batch_norm=_batch_norm, clip_gradient=_ClipGradient.apply,
)  # fmt: skip


class Loop(nn.Module):
    """The layer of a case; its parameters have gpurnn's names."""

    def __init__(self, case, weights):
        super().__init__()
        for name, value in weights.items():
            if not name.startswith("running_"):
                self.register_parameter(name, nn.Parameter(torch.from_numpy(value).clone()))
        self.case, self.equations = case, Equations(FUNCTIONS, case)
        suffixes = ("", "_reverse")[: 2 if case.bidirectional else 1]
        self.passes = [[f"_l{layer}{suffix}" for suffix in suffixes] for layer in range(case.L)]
        self.train(case.what != "inference")

    def parameters_of(self, suffix):
        """The parameters of a pass, without the suffix of their names."""
        named = self._parameters.items()
        return SimpleNamespace(**{name.removesuffix(suffix): p for name, p in named if name.endswith(suffix)})

    def draw(self):
        """For each layer, for each direction the masks of the cell's draws, and that of W_hh or None."""
        return [[self._draw(suffix) for suffix in directions] for directions in self.passes]

    def _draw(self, suffix):
        case, rate = self.case, self.equations.options.weight_dropout
        if not self.training:
            return [], None
        masks = [
            torch.rand(case.T if draw.each == "timestep" else 1, case.B, case.H) >= draw.rate
            for draw in case.record.draws
        ]
        return masks, torch.rand(self._parameters[f"weight_hh{suffix}"].shape) >= rate if rate else None

    def forward(self, x, draws):
        for directions, drawn in zip(self.passes, draws, strict=True):
            outputs = [
                self.one_pass(x, self.parameters_of(suffix), d == 1, *drawn[d]) for d, suffix in enumerate(directions)
            ]
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x

    def one_pass(self, x, p, reverse, masks, weight_mask):
        e, T = self.equations, len(x)
        p = e.dropped_weights(p, weight_mask)
        steps = e.inputs(p, x).unbind(0)
        masks = [mask.unbind(0) * (1 if len(mask) == T else T) for mask in e.scaled(masks)]
        state = (x.new_zeros(x.shape[1], self.case.H),) * e.states
        outputs = [None] * T
        for t in range(T - 1, -1, -1) if reverse else range(T):
            state = e.step(p, steps[t], state, [mask[t] for mask in masks])
            outputs[t] = state[0]
        return torch.stack(outputs)
