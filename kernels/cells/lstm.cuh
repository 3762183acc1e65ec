// Long short-term memory (Hochreiter & Schmidhuber 1997, forget gate Gers 2000), gates i f g o:
//
//     i, f, o = sigmoid(ax + ah),  g = tanh(ax + ah),  ah = W_hh h + b_hh
//     c' = f c + i g
//     h' = o tanh(c')
//
// Saves i f g o.

template <typename real>
struct lstm : PointwiseCell {
    static constexpr int gates = 4, states = 2, saved = 4, preactivations = 4, first_product = 4, products = 4;

    DEVICE static void forward(const ForwardIn<lstm, real>& in, ForwardOut<lstm, real>& out) {
        const real c_old = in.state[1];  // read first: compilers choose by it which product of c to fuse with the addition
        const real i = out.saved[0] = sigmoid(in.ax[0] + in.ah[0]);
        const real f = out.saved[1] = sigmoid(in.ax[1] + in.ah[1]);
        const real g = out.saved[2] = tanh(in.ax[2] + in.ah[2]);
        const real o = out.saved[3] = sigmoid(in.ax[3] + in.ah[3]);
        const real c = out.state[1] = f * c_old + i * g;
        out.state[0] = o * tanh(c);
    }

    DEVICE static void backward(const BackwardIn<lstm, real>& in, BackwardOut<lstm, real>& out) {
        const real i = in.saved[0], f = in.saved[1], g = in.saved[2], o = in.saved[3];
        const real m = tanh(in.new_state[1]);
        const real dh = in.dstate[0], dc = in.dstate[1] + dh * o * dtanh(m);
        out.d[3] = dh * m * dsigmoid(o);
        out.d[2] = dc * i * dtanh(g);
        out.d[1] = dc * in.state[1] * dsigmoid(f);
        out.d[0] = dc * g * dsigmoid(i);
        out.dstate[1] = dc * f;
        out.dstate[0] = real(0);
    }
};
