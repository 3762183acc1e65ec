"""Long short-term memory."""

from .activations import sigmoid_
from .record import Cell, Product


class LSTMStep(Cell):
    """Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate Gers 2000), gates i f g o:

        i, f, o = sigmoid(z_i, z_f, z_o), g = tanh(z_g), z = ax + W_hh h
        c' = f c + i g,   m = o tanh(c'),   h' = m, or W_hr m with a projection (Sak 2014)

    Saves i f g o; with a projection also m, which ``backward`` does not overwrite.
    """

    name, states = "lstm", ("h", "c")
    gates = saved = shown = preactivations = inputs = ("i", "f", "g", "o")
    products = (Product(("i", "f", "g", "o")),)
    may_project, remembers, writes = True, "f", "i"

    def __init__(self, projection=False):
        if projection:
            self.saved, self.projects = (*self.gates, "m"), "m"

    def forward(self, xp, w, ax, old, new, scratch):
        """One timestep; record.py says what the arguments are."""
        (h, c), (h_new, c_new), (z, tmp, *_) = old, new, scratch
        H = len(c)
        z4 = z[: 4 * H]
        xp.matmul(w.hh, h, out=z4)
        xp.add(z4, ax, out=z4)
        i_f, i, f, g, o = z[: 2 * H], z[:H], z[H : 2 * H], z[2 * H : 3 * H], z[3 * H : 4 * H]
        sigmoid_(xp, i_f)
        xp.tanh(g, out=g)
        sigmoid_(xp, o)
        xp.multiply(i, g, out=tmp)
        xp.multiply(f, c, out=c_new)
        xp.add(c_new, tmp, out=c_new)
        xp.tanh(c_new, out=tmp)
        if self.projects:
            m = z[4 * H :]
            xp.multiply(o, tmp, out=m)
            xp.matmul(w.hr, m, out=h_new)
        else:
            xp.multiply(o, tmp, out=h_new)

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        """The gradients of one timestep; record.py says what the arguments are."""
        (_, c), (h_new, c_new), (dh, dc), (z, tmp, d, *_) = old, new, dstate, scratch
        H = len(c)
        i_f, i, f, g, o = z[: 2 * H], z[:H], z[H : 2 * H], z[2 * H : 3 * H], z[3 * H : 4 * H]
        d_i, d_f, d_g, d_o = d[:H], d[H : 2 * H], d[2 * H : 3 * H], d[3 * H :]
        m = z[4 * H :] if self.projects else h_new
        dm = xp.matmul(w.hr.T, dh, out=d_i) if self.projects else dh
        xp.tanh(c_new, out=tmp)
        xp.multiply(dm, tmp, out=d_o)  # with respect to o: dm tanh(c')
        xp.multiply(m, tmp, out=tmp)  # with respect to c': dm o (1 - tanh(c')^2) = dm (o - m tanh(c'))
        xp.subtract(o, tmp, out=tmp)
        xp.multiply(tmp, dm, out=tmp)
        xp.add(dc, tmp, out=dc)
        hook(dh, dc)
        xp.multiply(dc, g, out=d_i)
        xp.multiply(dc, c, out=d_f)
        xp.multiply(dc, i, out=d_g)
        xp.multiply(dc, f, out=dc)
        xp.multiply(g, g, out=tmp)  # through tanh: d (1 - g^2)
        xp.multiply(tmp, d_g, out=tmp)
        xp.subtract(d_g, tmp, out=d_g)
        for gate, d_gate in ((i_f, d[: 2 * H]), (o, d_o)):  # through sigmoid: d s (1 - s); from here on z is destroyed
            xp.multiply(d_gate, gate, out=d_gate)
            xp.subtract(1, gate, out=gate)
            xp.multiply(d_gate, gate, out=d_gate)
        xp.matmul(w.hh.T, d, out=dh)
