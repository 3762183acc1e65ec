"""An LSTM with peepholes as a cell of one's own: in torch."""

import torch
from torch import nn


class Peephole(nn.Module):
    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.ih = nn.Linear(input_size, 4 * hidden_size)
        self.hh = nn.Linear(hidden_size, 4 * hidden_size)
        self.p_i, self.p_f, self.p_o = (nn.Parameter(torch.zeros(hidden_size)) for _ in range(3))

    def forward(self, x):
        h = c = x.new_zeros(x.shape[1], self.hh.in_features)
        outputs = []
        for ax in self.ih(x).unbind():
            i, f, g, o = (ax + self.hh(h)).chunk(4, 1)
            i = torch.sigmoid(i + self.p_i * c)
            f = torch.sigmoid(f + self.p_f * c)
            c = f * c + i * torch.tanh(g)
            o = torch.sigmoid(o + self.p_o * c)
            h = o * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs), (h, c)


def make(input_size, hidden_size):
    return Peephole(input_size, hidden_size)
