// The time loop of the schedules that spread the weights over thread blocks: what a thread does for its own unit and sequences,
// and when it waits. `Product` decides how the matrix product is computed and how its operand reaches this block:
//
//     forward    send       sends an h to all blocks
//                receive    receives what all blocks have sent
//                multiply   leaves the sums where every thread of the block finds them
//                sum        W_hh h of gate g, for this thread's unit and its k-th sequence
//     backward   stage      takes dgates of this thread's unit and its k-th sequence
//                run        computes dh from what all blocks have staged; false where this block must give up
//                sum        dh, for this thread's unit and its k-th sequence
//
// A block sends once for each step that it computes: the initial h before the first, nothing after the last.

template <template <typename> class CellOf, typename T, typename Position, typename Channel, typename Product>
DEVICE void time_loop_forward(
    int T_, int B, int H, int W, int unit, int reverse, int save, const int* lengths, const int* order,
    const float* bias_ih, const float* bias_hh, T* gates, T* h, float* c, T* output, Channel& channel, Product& product)
{
    typedef CellOf<float> Cell;
    constexpr int G = Cell::gates, R = Position::rows;
    const int d = blockIdx.x, D = gridDim.x;
    const size_t slot = (size_t)B * H;
    for (int tile = blockIdx.z; tile * R < B; tile += gridDim.z) {
        const Position pos(T_, B, H, tile, unit, d, reverse, lengths, order);
        const int j = pos.j;
        const size_t first = ((size_t)d * (T_ + 1) + (pos.reversed ? T_ : 0)) * slot;
        const size_t first_c = save ? first : (size_t)d * 2 * slot;
        float h_old[Position::per_thread], c_old[Position::per_thread], bias_a[G], bias_r[G], ax[Position::per_thread][G];
#pragma unroll
        for (int g = 0; g < G; g++) {
            const bool there = bias_ih && j < H;
            bias_a[g] = there ? bias_ih[((size_t)d * G + g) * H + j] : 0.0f;
            bias_r[g] = there ? bias_hh[((size_t)d * G + g) * H + j] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            const size_t n = (size_t)pos.sequence[k] * H + j;
            const bool there = pos.sequence[k] >= 0;
            h_old[k] = there ? float(h[first + n]) : 0.0f;
            c_old[k] = there && Cell::states == 2 ? c[first_c + n] : 0.0f;
        }
        if (pos.longest > 0) {
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) product.send(channel, pos, k, h_old[k]);
            channel.next();
        }

        for (int step = 0; step < T_; step++) {
            const int t = pos.reversed ? T_ - 1 - step : step;
            const bool active = t < pos.longest;  // all of the group alike
            const bool sends = active && (pos.reversed ? t > 0 : t + 1 < pos.longest);
            if (active) {
#pragma unroll
                for (int k = 0; k < Position::per_thread; k++) {  // asked for before the others' h comes
                    const bool there = t < pos.length[k];
                    const T* row = gates + (((size_t)d * T_ + t) * B + (there ? pos.sequence[k] : 0)) * W * H + j;
#pragma unroll
                    for (int g = 0; g < G; g++) ax[k][g] = there ? float(row[(size_t)g * H]) : 0.0f;
                }
                product.receive(channel, pos);
                if (__syncthreads_or(channel.timed_out)) return;
                product.multiply();
                __syncthreads();
            }
            float saved[Position::per_thread][Cell::saved_blocks + 1];
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
                if (pos.sequence[k] >= 0 && t < pos.length[k]) {
                    float a[G], ah[G], h_new, c_new;
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        ah[g] = bias_r[g] + product.sum(k, g);
                        a[g] = ax[k][g] + bias_a[g];
                    }
                    Cell::forward(a, ah, h_old[k], c_old[k], saved[k], h_new, c_new);
                    h_old[k] = float(T(h_new));  // the state is what is stored
                    if (Cell::states == 2) c_old[k] = c_new;
                }
                if (sends) product.send(channel, pos, k, h_old[k]);  // first of all: the others wait for it
            }
            if (sends) channel.next();
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
                if (pos.sequence[k] < 0) continue;
                const size_t n = (size_t)pos.sequence[k] * H + j;
                const bool live = t < pos.length[k];
                output[((size_t)t * B + pos.sequence[k]) * D * H + (size_t)d * H + j] = T(live ? h_old[k] : 0.0f);
                if (save || step == T_ - 1) {
                    const size_t now = ((size_t)d * (T_ + 1) + (pos.reversed ? t : t + 1)) * slot + n;
                    h[now] = T(h_old[k]);
                    if (Cell::states == 2) c[save ? now : ((size_t)d * 2 + T_ % 2) * slot + n] = c_old[k];
                }
                if (save && live) {
                    T* row = gates + (((size_t)d * T_ + t) * B + pos.sequence[k]) * W * H + j;
#pragma unroll
                    for (int g = 0; g < Cell::saved_blocks; g++) row[(size_t)g * H] = T(saved[k][g]);
                }
            }
        }
    }
}

// What a step back reads of one number: asked for while the step before still waits.
template <typename Cell>
struct Saved {
    float gates[Cell::saved_blocks + 1], h, c, by_output;
};

template <template <typename> class CellOf, typename T, typename Position, typename Channel, typename Product>
DEVICE void time_loop_backward(
    int T_, int B, int H, int W, int unit, int reverse, const int* lengths, const int* order, T* gates, const T* h,
    const float* c, const T* doutput, float* dh, float* dc, Channel& channel, Product& product)
{
    typedef CellOf<float> Cell;
    constexpr int R = Position::rows;
    constexpr bool two = Cell::states == 2;
    const int d = blockIdx.x, D = gridDim.x;
    const size_t slot = (size_t)B * H;
    for (int tile = blockIdx.z; tile * R < B; tile += gridDim.z) {
        const Position pos(T_, B, H, tile, unit, d, reverse, lengths, order);
        const int j = pos.j;
        float by_h[Position::per_thread], by_c[Position::per_thread], h_new[Position::per_thread], c_new[Position::per_thread];
        Saved<Cell> saved[Position::per_thread];
        auto prefetch = [&](int step) {
            const int t = pos.reversed ? T_ - 1 - step : step;
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
                if (pos.sequence[k] < 0) continue;
                const size_t old = ((size_t)d * (T_ + 1) + (pos.reversed ? t + 1 : t)) * slot + (size_t)pos.sequence[k] * H + j;
                saved[k].h = float(h[old]);
                if (two) saved[k].c = c[old];
                if (t >= pos.length[k]) continue;
                const T* row = gates + (((size_t)d * T_ + t) * B + pos.sequence[k]) * W * H + j;
#pragma unroll
                for (int g = 0; g < Cell::saved_blocks; g++) saved[k].gates[g] = float(row[(size_t)g * H]);
                const size_t n = ((size_t)t * B + pos.sequence[k]) * D * H + (size_t)d * H + j;
                saved[k].by_output = doutput ? float(doutput[n]) : 0.0f;
            }
        };
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            const bool there = pos.sequence[k] >= 0;
            const size_t n = (size_t)pos.sequence[k] * H + j, here = (size_t)d * slot + n;
            const size_t last = ((size_t)d * (T_ + 1) + (pos.reversed ? 0 : T_)) * slot + n;
            by_h[k] = there ? dh[here] : 0.0f;
            by_c[k] = there && two ? dc[here] : 0.0f;
            h_new[k] = there ? float(h[last]) : 0.0f;
            c_new[k] = there && two ? c[last] : 0.0f;
        }
        prefetch(T_ - 1);
        for (int step = T_ - 1; step >= 0; step--) {
            const int t = pos.reversed ? T_ - 1 - step : step;
            const bool active = t < pos.longest;  // all of the group alike
            float dgates[Position::per_thread][Cell::preactivations];
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
#pragma unroll
                for (int g = 0; g < Cell::preactivations; g++) dgates[k][g] = 0.0f;
                if (pos.sequence[k] >= 0 && t < pos.length[k]) {
                    by_h[k] += saved[k].by_output;
                    Cell::backward(saved[k].gates, saved[k].h, saved[k].c, h_new[k], c_new[k], by_h[k], by_c[k], dgates[k]);
                }
                h_new[k] = saved[k].h;
                c_new[k] = saved[k].c;
                if (active) product.stage(channel, pos, k, dgates[k]);
            }
            if (step > 0) prefetch(step - 1);
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
                if (pos.sequence[k] < 0) continue;
                T* row = gates + (((size_t)d * T_ + t) * B + pos.sequence[k]) * W * H + j;
#pragma unroll
                for (int g = 0; g < Cell::preactivations; g++) row[(size_t)g * H] = T(dgates[k][g]);
            }
            if (!active) continue;
            if (!product.run(channel, pos)) return;
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) by_h[k] += product.sum(k);
        }
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            if (pos.sequence[k] < 0) continue;
            const size_t here = (size_t)d * slot + (size_t)pos.sequence[k] * H + j;
            dh[here] = by_h[k];
            if (two) dc[here] = by_c[k];
        }
    }
}
