"""The gated recurrent unit in both of its forms."""

from .activations import sigmoid_
from .record import Cell, Product


class GRUStep(Cell):
    """Gated recurrent unit, gates r z n:

        r, z = sigmoid(ax_r + W_r h), sigmoid(ax_z + W_z h)
        n = tanh(ax_n + r (W_n h + b_hn))       reset_after=True: cuDNN's and PyTorch's form (Cho 2014, version 1)
        n = tanh(ax_n + W_n (r h) + b_hn)       reset_after=False: the original form (Cho 2014, version 3)
        h' = (1 - z) n + z h

    With reset_after it saves r z q n, where q = W_n h + b_hn: r multiplies q before ax_n is added, so W_hh's rows of n
    belong to q, and ax_n to n. The original form saves r z n p, where p = r h is what the rows of n multiply.
    """

    gates = inputs = ("r", "z", "n")
    remembers = "z"

    def __init__(self, reset_after=True):
        self.reset_after = reset_after
        if reset_after:
            self.name = "gru"
            self.saved = self.shown = self.preactivations = ("r", "z", "q", "n")
            self.products = (Product(("r", "z", "q")),)
        else:
            self.name = "gru_original"
            self.saved = self.shown = ("r", "z", "n", "p")
            self.preactivations = self.gates
            self.products = Product(("r", "z")), Product(("n",), "p")

    def forward(self, xp, w, ax, old, new, scratch):
        """One timestep; record.py says what the arguments are."""
        (h,), (h_new,), (z, tmp, *_) = old, new, scratch
        H = len(h)
        r_z, r, u = z[: 2 * H], z[:H], z[H : 2 * H]  # u is the gate z of the equations
        if self.reset_after:
            q, n = z[2 * H : 3 * H], z[3 * H :]
            xp.matmul(w.hh, h, out=z[: 3 * H])
            if w.bias_apart is not None:
                xp.add(q, w.bias_apart, out=q)
            xp.add(r_z, ax[: 2 * H], out=r_z)
            sigmoid_(xp, r_z)
            xp.multiply(r, q, out=n)
        else:
            n, p = z[2 * H : 3 * H], z[3 * H :]
            xp.matmul(w.hh[: 2 * H], h, out=r_z)
            xp.add(r_z, ax[: 2 * H], out=r_z)
            sigmoid_(xp, r_z)
            xp.multiply(r, h, out=p)
            xp.matmul(w.hh[2 * H :], p, out=n)
        xp.add(n, ax[2 * H :], out=n)
        xp.tanh(n, out=n)
        xp.subtract(h, n, out=tmp)  # h' = n + z (h - n)
        xp.multiply(tmp, u, out=tmp)
        xp.add(n, tmp, out=h_new)

    def backward(self, xp, w, old, new, dstate, scratch, hook):
        """The gradients of one timestep; record.py says what the arguments are."""
        (h,), (dh,), (z, tmp, d, *_) = old, dstate, scratch
        hook(dh)
        H = len(h)
        r, u = z[:H], z[H : 2 * H]
        d_r, d_u = d[:H], d[H : 2 * H]
        n, d_n = (z[3 * H :], d[3 * H :]) if self.reset_after else (z[2 * H : 3 * H], d[2 * H : 3 * H])
        xp.subtract(h, n, out=d_u)  # with respect to z: dh (h - n) z (1 - z)
        xp.multiply(dh, u, out=tmp)
        xp.subtract(dh, tmp, out=d_n)  # with respect to n: dh (1 - z)
        xp.multiply(d_n, u, out=dh)
        xp.multiply(d_u, dh, out=d_u)
        xp.multiply(n, n, out=n)  # through tanh: 1 - n^2, which overwrites n
        xp.subtract(1, n, out=n)
        xp.multiply(d_n, n, out=d_n)
        # tmp = dh z, the direct path to h; dh becomes the gradient with respect to h
        if self.reset_after:
            q, d_q = z[2 * H : 3 * H], d[2 * H : 3 * H]
            xp.multiply(d_n, r, out=d_q)
            xp.multiply(d_q, q, out=d_r)  # d_n q r, then (1 - r)
            xp.subtract(1, r, out=r)
            xp.multiply(d_r, r, out=d_r)
            xp.matmul(w.hh.T, d[: 3 * H], out=dh)
        else:
            d_p = xp.matmul(w.hh[2 * H :].T, d_n, out=z[3 * H :])
            xp.multiply(d_p, r, out=d_p)
            xp.add(tmp, d_p, out=tmp)
            xp.multiply(d_p, h, out=d_r)  # d_p h r, then (1 - r)
            xp.subtract(1, r, out=r)
            xp.multiply(d_r, r, out=d_r)
            xp.matmul(w.hh[: 2 * H].T, d[: 2 * H], out=dh)
        xp.add(dh, tmp, out=dh)
