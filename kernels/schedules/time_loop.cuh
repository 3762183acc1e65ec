// The time loop of the schedules that keep the weights on the chip: what a thread does for its own units and sequences, and
// when it waits.
//
// `Position` says which these are. A thread has Position::units neighbouring units of Position::per_thread sequences. What it
// loads stays as it is stored, Position::Stored, until it is used: a conversion would wait for the load.
//
// `Product` decides how the matrix product is computed and how its operand reaches this block:
//
//     forward    send       gives an h to all who multiply by it, for this thread's k-th sequence
//                next       ends a step: everything was given
//                prefetch   loads x of a step, where the product multiplies W_ih x itself (makes_ax)
//                run        computes the sums from what all have given; false where this block must give up
//                add        start + sum g, for this thread's k-th sequence and unit u: W_hh h of gate g, with W_ih x where
//                           makes_ax; behind these W_ih x alone, of the gates from first_apart on
//     backward   stage      gives dgates of this thread's k-th sequence
//                next       ends a step: everything was given
//                run        computes dh from what all have staged; false where this block must give up
//                sum        dh, for this thread's k-th sequence and unit u
//                loads_ahead  whether what a step reads is loaded in the step before, in flight while that one waits and
//                           multiplies; false where it does not fit into registers beside the weights
//
// A cell has one product in a timestep, or none; it may make what that multiplies of h (inner.cuh). Where it has means over the
// units (means.cuh), all of a sequence are in one block, and a thread reads for all sequences, turn < 0, before it computes.
//
// A block sends once for each step that it computes: the initial h before the first, nothing after the last. `channel` is
// what the blocks of a group share; a block that is alone has none.

#include "layer.cuh"
#include "means.cuh"
#include "inner.cuh"

#include "forward.cuh"
#include "backward.cuh"

// The whole time loop of one tile; false where the block must give up.
template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_forward(const Forward<T>& a, const Position& pos, Channel& channel, Product& product) {
    ForwardLoop<CellOf, MARKED, T, Position, Channel, Product> loop(a, pos, channel, product);
    while (loop.t != loop.end) {
        if (!loop.step()) return false;
    }
    loop.finish();
    return true;
}

template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_backward(const Backward<T>& a, const Position& pos, Channel& channel, Product& product) {
    BackwardLoop<CellOf, MARKED, T, Position, Channel, Product> loop(a, pos, channel, product);
    while (!loop.done()) {
        if (!loop.step()) return false;
    }
    loop.finish();
    return true;
}

// Of two tiles in turn, each with a channel of its own: while the numbers of one are on their way, the other is computed. Both
// share `product`, which keeps nothing of a tile from one `run` to the next.
template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_forward(const Forward<T>& a, const Position (&pos)[2], Channel (&channel)[2], Product& product) {
    typedef ForwardLoop<CellOf, MARKED, T, Position, Channel, Product> Loop;
    Loop first(a, pos[0], channel[0], product), second(a, pos[1], channel[1], product);
    while (first.t != first.end) {
        if (!first.step() || !second.step()) return false;
    }
    first.finish();
    second.finish();
    return true;
}

template <template <typename> class CellOf, bool MARKED, typename T, typename Position, typename Channel, typename Product>
DEVICE bool time_loop_backward(const Backward<T>& a, const Position (&pos)[2], Channel (&channel)[2], Product& product) {
    typedef BackwardLoop<CellOf, MARKED, T, Position, Channel, Product> Loop;
    Loop first(a, pos[0], channel[0], product), second(a, pos[1], channel[1], product);
    while (!first.done() || !second.done()) {
        if (!first.step() || !second.step()) return false;
    }
    first.finish();
    second.finish();
    return true;
}

// What run_tiles is given. Not lambdas with `auto`: NVRTC 13.0 takes these for functions of the host.
template <template <typename> class CellOf, bool MARKED, typename T, typename Product>
struct RunForward {
    const Forward<T>& layer;
    Product& product;
    template <typename Positions, typename Channels>
    DEVICE bool operator()(const Positions& pos, Channels& channels) const {
        return time_loop_forward<CellOf, MARKED>(layer, pos, channels, product);
    }
};

template <template <typename> class CellOf, bool MARKED, typename T, typename Product>
struct RunBackward {
    const Backward<T>& layer;
    Product& product;
    template <typename Positions, typename Channels>
    DEVICE bool operator()(const Positions& pos, Channels& channels) const {
        return time_loop_backward<CellOf, MARKED>(layer, pos, channels, product);
    }
};
