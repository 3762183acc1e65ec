// Gated recurrent unit in cuDNN's and PyTorch's form (Cho 2014, version 1; reset_after), gates r z n:
//
//     r, z = sigmoid(ax + ah),  ah = W_hh h + b_hh
//     n = tanh(ax_n + r ah_n)
//     h' = (1 - z) n + z h
//
// Saves r z q n with q = ah_n. The gradient of ah is d of r, z, q; the gradient of ax is d of r, z, n.

template <typename real>
struct gru : PointwiseCell {
    static constexpr int gates = 3, states = 1, saved = 4, preactivations = 4, separate = 1, first_product = 3, products = 3;

    DEVICE static void forward(const ForwardIn<gru, real>& in, ForwardOut<gru, real>& out) {
        const real r = out.saved[0] = sigmoid(in.ax[0] + in.ah[0]);
        const real z = out.saved[1] = sigmoid(in.ax[1] + in.ah[1]);
        const real q = out.saved[2] = in.ah[2];
        const real n = out.saved[3] = tanh(in.ax[2] + r * q);
        out.state[0] = n + z * (in.state[0] - n);
    }

    DEVICE static void backward(const BackwardIn<gru, real>& in, BackwardOut<gru, real>& out) {
        const real r = in.saved[0], z = in.saved[1], q = in.saved[2], n = in.saved[3], dh = in.dstate[0];
        const real d_n = dh * (real(1) - z) * dtanh(n);
        out.d[3] = d_n;
        out.d[2] = d_n * r;
        out.d[1] = dh * (in.state[0] - n) * dsigmoid(z);
        out.d[0] = d_n * q * dsigmoid(r);
        out.dstate[0] = dh * z;
    }
};

// The original form (Cho 2014, version 3), in which r acts before the second product:
//
//     r, z = sigmoid(ax + ah),  ah = W_hh h + b_hh
//     inner = p = r h
//     n = tanh(ax_n + ah_n),  ah_n = W_n p + b_hn
//     h' = (1 - z) n + z h
//
// Saves r z n, and p behind them, which the gradient of W_n needs. `backward` leaves r in d[0] for `backward_inner`.

template <typename real>
struct gru_original : PointwiseCell {
    static constexpr int gates = 3, states = 1, saved = 4, preactivations = 3, first_product = 2, products = 3, inner = 3;

    DEVICE static real forward_inner(const ForwardIn<gru_original, real>& in) {
        return sigmoid(in.ax[0] + in.ah[0]) * in.state[0];
    }

    DEVICE static void forward(const ForwardIn<gru_original, real>& in, ForwardOut<gru_original, real>& out) {
        const real r = out.saved[0] = sigmoid(in.ax[0] + in.ah[0]);
        const real z = out.saved[1] = sigmoid(in.ax[1] + in.ah[1]);
        const real n = out.saved[2] = tanh(in.ax[2] + in.ah[2]);
        out.saved[3] = r * in.state[0];
        out.state[0] = n + z * (in.state[0] - n);
    }

    DEVICE static void backward(const BackwardIn<gru_original, real>& in, BackwardOut<gru_original, real>& out) {
        const real r = in.saved[0], z = in.saved[1], n = in.saved[2], dh = in.dstate[0];
        out.d[2] = dh * (real(1) - z) * dtanh(n);
        out.d[1] = dh * (in.state[0] - n) * dsigmoid(z);
        out.d[0] = r;
        out.dstate[0] = dh * z;
    }

    DEVICE static void backward_inner(const BackwardIn<gru_original, real>& in, real d_inner, BackwardOut<gru_original, real>& out) {
        const real r = out.d[0];
        out.d[0] = d_inner * in.state[0] * dsigmoid(r);
        out.dstate[0] += d_inner * r;
    }
};
