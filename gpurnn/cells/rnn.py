"""The Elman cell."""

from .record import Cell, Product


class RNNStep(Cell):
    """Elman cell: h' = act(ax + W_hh h), act = tanh or relu (Elman 1990). Saves nothing, because h' is enough."""

    gates = preactivations = inputs = ("z",)
    products = (Product(("z",)),)

    def __init__(self, nonlinearity="tanh"):
        self.nonlinearity = nonlinearity
        self.name = {"tanh": "rnn_tanh", "relu": "rnn_relu"}[nonlinearity]

    def forward(self, xp, w, ax, old, new, scratch):
        """One timestep; record.py says what the arguments are."""
        z = scratch.z
        xp.matmul(w.hh, old[0], out=z)
        xp.add(z, ax, out=z)
        if self.nonlinearity == "tanh":
            xp.tanh(z, out=new[0])
        else:
            xp.maximum(z, 0, out=new[0])

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        """The gradients of one timestep; record.py says what the arguments are."""
        (h_new,), (dh,), (_, tmp, d, *_) = new, dstate, scratch
        hook(dh)
        if self.nonlinearity == "tanh":
            xp.multiply(h_new, h_new, out=tmp)  # dz = dh (1 - h'^2)
            xp.multiply(tmp, dh, out=tmp)
            xp.subtract(dh, tmp, out=d)
        else:
            xp.multiply(dh, h_new > 0, out=d)
            xp.copyto(d, h_new, where=h_new != h_new)  # NaN: so is the derivative
        xp.matmul(w.hh.T, d, out=dh)
