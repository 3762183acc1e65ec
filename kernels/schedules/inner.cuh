// Cells whose products multiply not h but what the cell makes of it before the timestep (Cell::inner_first): dropout of h with
// one mask a sequence. It goes the way of h.

// Gives a step's h, or what the cell makes of it, to all who multiply by it.
template <typename Cell, typename T, int S, int K, typename Product, typename Channel, typename Position, typename Stored>
DEVICE void send_operand(Product& product, Channel& channel, const Position& pos, int k, Stored h,
                         const float (&others)[S][K][Position::units],
                         const unsigned char (&masks)[K][some(Cell::draws)][Position::units], int H) {
    if constexpr (Cell::inner_first) {
        float inner[Position::units] = {};
#pragma unroll
        for (int u = 0; u < Position::units; u++) {
            if (pos.sequence[k] < 0 || !pos.has(u, H)) continue;
            ForwardIn<Cell, typename InCell<T>::real> in;
            in.state[0] = pos.number(h, u, T());
#pragma unroll
            for (int s = 0; s < Cell::states - 1; s++) in.state[s + 1] = others[s][k][u];
#pragma unroll
            for (int m = 0; m < Cell::draws; m++) in.mask[m] = float(masks[k][m][u]);
            inner[u] = Cell::forward_inner(in);
        }
        h = pos.stored(inner, T());
    }
    product.send(channel, pos, k, h);
}

// The mirror, of one unit: the gradients of the old state, with what comes through the product.
template <typename Cell, typename real, int S, int K, int U>
DEVICE void from_operand(const BackwardIn<Cell, real>& in, BackwardOut<Cell, real>& out, float d_inner, int k, int u,
                         float (&dh)[K][U], float (&dothers)[S][K][U]) {
    Cell::backward_inner(in, d_inner, out);
    dh[k][u] = out.dstate[0];
#pragma unroll
    for (int s = 0; s < Cell::states - 1; s++) dothers[s][k][u] = out.dstate[s + 1];
}
