// The seam between cells and schedules: what a schedule gives to a cell in a timestep, and what it gets back, of one unit of one
// sequence. A cell says how many of each it has:
//
//     gates                G   blocks of W_ih
//     states               S   the first is h, the output
//     parameters           N   vectors of H besides weights and biases, such as peepholes
//     draws                M   random masks
//     saved                    blocks that forward saves for backward
//     preactivations           blocks that backward makes: for each gate the gradient with respect to ah (to ax, where it has no
//                              product with W_hh); then to ax of the gates where that differs; then to each parameter
//     separate                 how many gates differ so: the last `separate` ones. Their ax and ah meet only after an equation
//     first_product, products  gates whose ah is W_hh h, the first ones; all gates with an ah. Those between multiply `inner`
//                              instead, which `forward_inner` makes from the first ones: a second product in the timestep
//     inner_first              whether all gates with an ah multiply `inner`, and the old state and masks that a sequence has
//                              in all timesteps make it: one product, whose vector is known before the timestep
//     stages, means, locals    see below
//
//     forward          in: ax ah state p mask         out: state saved
//     forward_inner    in: ax ah state p mask         out: inner; forward computes again what both need
//     backward         in: saved state new_state p mask dstate    out: d, and dstate, which lacks what passes through W_hh
//     backward_inner   in: saved state new_state p mask d_inner   adds to d of the first product and to dstate, which it also reads
//
// `inner` is also the place of a saved block: that which forward_inner makes, for the gradient of the weights. d lies where `saved`
// was. So what backward_inner reads of it, and `inner` itself, lie behind the first `preactivations` blocks; or `backward` leaves
// it in a d that backward_inner overwrites.
//
// Means over all units of a sequence (layer norm) divide a cell into stages. A stage puts what is to be averaged into out.sum,
// and what later stages need into out.local; the schedule averages, and calls the next stage with in.mean. A cell without means
// has one stage. Stage s makes `Cell::means_of(s)` of them, numbered on from the stage before; backward has its own stages.

// A cell without some of these still needs arrays of one element.
DEVICE constexpr int some(int count) { return count > 0 ? count : 1; }

template <typename Cell, typename real>
struct ForwardIn {
    real ax[some(Cell::gates)], ah[some(Cell::gates)], state[Cell::states], p[some(Cell::parameters)], mask[some(Cell::draws)];
    real mean[some(Cell::means)];
};

template <typename Cell, typename real>
struct ForwardOut {
    real state[Cell::states], saved[some(Cell::saved)], local[some(Cell::locals)], sum[some(Cell::means)];
};

template <typename Cell, typename real>
struct BackwardIn {
    real saved[some(Cell::saved)], state[Cell::states], new_state[Cell::states], p[some(Cell::parameters)];
    real mask[some(Cell::draws)], dstate[Cell::states], mean[some(Cell::back_means)];
};

template <typename Cell, typename real>
struct BackwardOut {
    real dstate[Cell::states], d[some(Cell::preactivations)], local[some(Cell::back_locals)], sum[some(Cell::back_means)];
};

// What a cell has none of unless it says so.
struct PointwiseCell {
    static constexpr int parameters = 0, draws = 0, separate = 0;
    static constexpr bool inner_first = false;
    static constexpr int stages = 1, means = 0, locals = 0, back_stages = 1, back_means = 0, back_locals = 0;
    DEVICE static constexpr int means_of(int stage) { return 0; }
    DEVICE static constexpr int back_means_of(int stage) { return 0; }
};

// One stage of a cell.
template <int stage, typename Cell, typename real>
DEVICE void forward_stage(const ForwardIn<Cell, real>& in, ForwardOut<Cell, real>& out) {
    if constexpr (Cell::stages == 1) Cell::forward(in, out);
    else Cell::template forward<stage>(in, out);
}
template <int stage, typename Cell, typename real>
DEVICE void backward_stage(const BackwardIn<Cell, real>& in, BackwardOut<Cell, real>& out) {
    if constexpr (Cell::back_stages == 1) Cell::backward(in, out);
    else Cell::template backward<stage>(in, out);
}
