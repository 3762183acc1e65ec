// Gated recurrent unit in cuDNN's and PyTorch's form (Cho 2014, version 1; reset_after), gates r z n:
//
//     r, z = sigmoid(ax + ah),  ah = W_hh h + b_hh
//     n = tanh(ax_n + r ah_n)
//     h' = (1 - z) n + z h
//
// Saves r z q n with q = ah_n. The gradient of ah is d of r, z, q; the gradient of ax is d of r, z, n.

template <typename real>
struct GruCell {
    static constexpr int gates = 3, states = 1, saved_blocks = 4, preactivations = 4;
    static constexpr int first_product_gates = 0, separate_input_gate = 1;

    DEVICE static void forward(const real* ax, const real* ah, real h, real c, real* saved, real& h_new, real& c_new) {
        const real r = saved[0] = sigmoid(ax[0] + ah[0]);
        const real z = saved[1] = sigmoid(ax[1] + ah[1]);
        const real q = saved[2] = ah[2];
        const real n = saved[3] = tanh(ax[2] + r * q);
        h_new = n + z * (h - n);
    }

    // dh: in, of h'; out, the part of h that does not pass through W_hh. d: of r, z, q, n before their activation.
    DEVICE static void backward(const real* saved, real h, real c, real h_new, real c_new, real& dh, real& dc, real* d) {
        const real r = saved[0], z = saved[1], q = saved[2], n = saved[3];
        d[3] = dh * (real(1) - z) * dtanh(n);
        d[2] = d[3] * r;
        d[1] = dh * (h - n) * dsigmoid(z);
        d[0] = d[3] * q * dsigmoid(r);
        dh *= z;
    }
};

// The original form (Cho 2014, version 3), in which r acts before the second product:
//
//     r, z = sigmoid(ax + ah),  ah = W_hh h + b_hh      reset: before the second product
//     p = r h
//     n = tanh(ax_n + W_n p + b_hn)
//     h' = (1 - z) n + z h
//
// Saves r z n, and p beside them. r and z are the gates of the first product; `reset` overwrites their pre-activations with
// them. In the backward pass `backward` leaves r in d[0] for `reset_backward`, which runs after the product d_p = d_n W_n.

template <typename real>
struct GruOriginal {
    static constexpr int gates = 3, states = 1, saved_blocks = 3, preactivations = 3, first_product_gates = 2;

    DEVICE static void reset(const real* ax, const real* ah, real h, real& r, real& z, real& p) {
        r = sigmoid(ax[0] + ah[0]);
        z = sigmoid(ax[1] + ah[1]);
        p = r * h;
    }

    DEVICE static void forward(const real* ax, const real* ah, real h, real c, real* saved, real& h_new, real& c_new) {
        saved[0] = ax[0];
        const real z = saved[1] = ax[1];
        const real n = saved[2] = tanh(ax[2] + ah[2]);
        h_new = n + z * (h - n);
    }

    DEVICE static void backward(const real* saved, real h, real c, real h_new, real c_new, real& dh, real& dc, real* d) {
        const real r = saved[0], z = saved[1], n = saved[2];
        d[2] = dh * (real(1) - z) * dtanh(n);
        d[1] = dh * (h - n) * dsigmoid(z);
        d[0] = r;
        dh *= z;
    }

    DEVICE static void reset_backward(real r, real h, real d_p, real& dh, real& d_r) {
        d_r = d_p * h * dsigmoid(r);
        dh += d_p * r;
    }
};
