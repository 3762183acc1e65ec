// Elman cell (Elman 1990):
//
//     h' = f(ax + ah),  ah = W_hh h + b_hh,  f = tanh or relu
//
// Saves nothing for the backward pass: h' is enough.

template <typename real, bool RELU>
struct rnn : PointwiseCell {
    static constexpr int gates = 1, states = 1, saved = 0, preactivations = 1, first_product = 1, products = 1;

    DEVICE static void forward(const ForwardIn<rnn, real>& in, ForwardOut<rnn, real>& out) {
        const real a = in.ax[0] + in.ah[0];
        out.state[0] = RELU ? relu(a) : tanh(a);
    }

    DEVICE static void backward(const BackwardIn<rnn, real>& in, BackwardOut<rnn, real>& out) {
        const real h = in.new_state[0];
        out.d[0] = in.dstate[0] * (RELU ? drelu(h) : dtanh(h));
        out.dstate[0] = real(0);
    }
};

template <typename real>
using rnn_tanh = rnn<real, false>;
template <typename real>
using rnn_relu = rnn<real, true>;
