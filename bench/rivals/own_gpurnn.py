"""An LSTM with peepholes as a cell of one's own: in gpurnn."""

import gpurnn
from gpurnn.cells import sigmoid, tanh


@gpurnn.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole(ax, ah, s, p):
    i = sigmoid(ax.i + ah.i + p.p_i * s.c)
    f = sigmoid(ax.f + ah.f + p.p_f * s.c)
    c = f * s.c + i * tanh(ax.g + ah.g)
    o = sigmoid(ax.o + ah.o + p.p_o * c)
    return o * tanh(c), c


def make(input_size, hidden_size):
    return gpurnn.Recurrent(peephole, input_size, hidden_size, backend="cpu")
