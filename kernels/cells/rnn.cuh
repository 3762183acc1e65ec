// Elman cell (Elman 1990):
//
//     h' = f(ax + ah),  ah = W_hh h + b_hh,  f = tanh or relu
//
// Saves nothing for the backward pass: h' is enough.

template <typename real, bool RELU>
struct RnnCell {
    static constexpr int gates = 1, states = 1, saved_blocks = 0, preactivations = 1;
    static constexpr int first_product_gates = 0, separate_input_gate = 0;

    DEVICE static void forward(const real* ax, const real* ah, real h, real c, real* saved, real& h_new, real& c_new) {
        const real a = ax[0] + ah[0];
        h_new = RELU ? relu(a) : tanh(a);
    }

    // dh: in, of h'; out, the part of h that does not pass through W_hh. d: of the pre-activation.
    DEVICE static void backward(const real* saved, real h, real c, real h_new, real c_new, real& dh, real& dc, real* d) {
        d[0] = dh * (RELU ? drelu(h_new) : dtanh(h_new));
        dh = real(0);
    }
};

template <typename real>
using RnnTanh = RnnCell<real, false>;
template <typename real>
using RnnRelu = RnnCell<real, true>;
