// Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate Gers 2000), gates i f g o:
//
//     i, f, o = sigmoid(ax + ah),  g = tanh(ax + ah),  ah = W_hh h + b_hh
//     c' = f c + i g
//     h' = o tanh(c')
//
// Saves i f g o.

template <typename real>
struct LstmCell {
    static constexpr int gates = 4, states = 2, saved_blocks = 4, preactivations = 4;
    static constexpr int first_product_gates = 0, separate_input_gate = 0;

    DEVICE static void forward(const real* ax, const real* ah, real h, real c, real* saved, real& h_new, real& c_new) {
        const real i = saved[0] = sigmoid(ax[0] + ah[0]);
        const real f = saved[1] = sigmoid(ax[1] + ah[1]);
        const real g = saved[2] = tanh(ax[2] + ah[2]);
        const real o = saved[3] = sigmoid(ax[3] + ah[3]);
        c_new = f * c + i * g;
        h_new = o * tanh(c_new);
    }

    // dh, dc: in, of h' and c'; out, the parts of h and c that do not pass through W_hh. d: of the pre-activations.
    DEVICE static void backward(const real* saved, real h, real c, real h_new, real c_new, real& dh, real& dc, real* d) {
        const real i = saved[0], f = saved[1], g = saved[2], o = saved[3];
        const real m = tanh(c_new);
        d[3] = dh * m * dsigmoid(o);
        dc += dh * o * dtanh(m);
        d[2] = dc * i * dtanh(g);
        d[1] = dc * c * dsigmoid(f);
        d[0] = dc * g * dsigmoid(i);
        dc *= f;
        dh = real(0);
    }
};
