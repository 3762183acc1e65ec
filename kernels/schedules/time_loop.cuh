// The time loop of the schedules that spread the weights over thread blocks: what a thread does for its own unit and
// sequences, and when it waits. `Product` decides how the matrix product is computed and how its operand reaches this
// block:
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
        const size_t initial_h = ((size_t)d * (T_ + 1) + (pos.reversed ? T_ : 0)) * slot;
        const size_t initial_c = save ? initial_h : (size_t)d * 2 * slot;
        float h_old[Position::per_thread], c_old[Position::per_thread], bias_a[G], bias_r[G], ax[Position::per_thread][G];
#pragma unroll
        for (int g = 0; g < G; g++) {
            const bool valid = bias_ih && j < H;
            bias_a[g] = valid ? bias_ih[((size_t)d * G + g) * H + j] : 0.0f;
            bias_r[g] = valid ? bias_hh[((size_t)d * G + g) * H + j] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            const size_t n = (size_t)pos.sequence[k] * H + j;
            const bool valid = pos.sequence[k] >= 0;
            h_old[k] = valid ? float(h[initial_h + n]) : 0.0f;
            c_old[k] = valid && Cell::states == 2 ? c[initial_c + n] : 0.0f;
        }
        if (pos.longest > 0) {
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) product.send(channel, pos, k, h_old[k]);
            channel.next();
        }

        for (int step = 0; step < T_; step++) {
            const int t = pos.reversed ? T_ - 1 - step : step;
            const bool active = t < pos.longest;  // the same in all threads of the group
            const bool sends = active && (pos.reversed ? t > 0 : t + 1 < pos.longest);
            if (active) {
#pragma unroll
                for (int k = 0; k < Position::per_thread; k++) {  // in flight while the block waits for h
                    const bool valid = t < pos.length[k];
                    const T* row = gates + (((size_t)d * T_ + t) * B + (valid ? pos.sequence[k] : 0)) * W * H + j;
#pragma unroll
                    for (int g = 0; g < G; g++) ax[k][g] = valid ? float(row[(size_t)g * H]) : 0.0f;
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
                if (sends) product.send(channel, pos, k, h_old[k]);  // before any store: the others wait for it
            }
            if (sends) channel.next();
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
                if (pos.sequence[k] < 0) continue;
                const size_t n = (size_t)pos.sequence[k] * H + j;
                const bool live = t < pos.length[k];
                output[((size_t)t * B + pos.sequence[k]) * D * H + (size_t)d * H + j] = T(live ? h_old[k] : 0.0f);
                if (save || step == T_ - 1) {
                    const size_t new_index = ((size_t)d * (T_ + 1) + (pos.reversed ? t : t + 1)) * slot + n;
                    h[new_index] = T(h_old[k]);
                    if (Cell::states == 2) c[save ? new_index : ((size_t)d * 2 + T_ % 2) * slot + n] = c_old[k];
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

// What a backward step reads for one unit of one sequence. It is prefetched, in flight while the step before it waits.
template <typename Cell>
struct Saved {
    float gates[Cell::saved_blocks + 1], h, c, doutput;
};

template <template <typename> class CellOf, typename T, typename Position, typename Channel, typename Product>
DEVICE void time_loop_backward(
    int T_, int B, int H, int W, int unit, int reverse, const int* lengths, const int* order, T* gates, const T* h,
    const float* c, const T* doutput, float* dh, float* dc, Channel& channel, Product& product)
{
    typedef CellOf<float> Cell;
    constexpr int R = Position::rows;
    constexpr bool has_c = Cell::states == 2;
    const int d = blockIdx.x, D = gridDim.x;
    const size_t slot = (size_t)B * H;
    for (int tile = blockIdx.z; tile * R < B; tile += gridDim.z) {
        const Position pos(T_, B, H, tile, unit, d, reverse, lengths, order);
        const int j = pos.j;
        float dh_now[Position::per_thread], dc_now[Position::per_thread];
        float h_new[Position::per_thread], c_new[Position::per_thread];
        Saved<Cell> saved[Position::per_thread];
        auto prefetch = [&](int step) {
            const int t = pos.reversed ? T_ - 1 - step : step;
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
                if (pos.sequence[k] < 0) continue;
                const size_t old_slot = (size_t)d * (T_ + 1) + (pos.reversed ? t + 1 : t);
                const size_t old_index = old_slot * slot + (size_t)pos.sequence[k] * H + j;
                saved[k].h = float(h[old_index]);
                if (has_c) saved[k].c = c[old_index];
                if (t >= pos.length[k]) continue;
                const T* row = gates + (((size_t)d * T_ + t) * B + pos.sequence[k]) * W * H + j;
#pragma unroll
                for (int g = 0; g < Cell::saved_blocks; g++) saved[k].gates[g] = float(row[(size_t)g * H]);
                const size_t n = ((size_t)t * B + pos.sequence[k]) * D * H + (size_t)d * H + j;
                saved[k].doutput = doutput ? float(doutput[n]) : 0.0f;
            }
        };
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            const bool valid = pos.sequence[k] >= 0;
            const size_t n = (size_t)pos.sequence[k] * H + j, index = (size_t)d * slot + n;
            const size_t last = ((size_t)d * (T_ + 1) + (pos.reversed ? 0 : T_)) * slot + n;
            dh_now[k] = valid ? dh[index] : 0.0f;
            dc_now[k] = valid && has_c ? dc[index] : 0.0f;
            h_new[k] = valid ? float(h[last]) : 0.0f;
            c_new[k] = valid && has_c ? c[last] : 0.0f;
        }
        prefetch(T_ - 1);
        for (int step = T_ - 1; step >= 0; step--) {
            const int t = pos.reversed ? T_ - 1 - step : step;
            const bool active = t < pos.longest;  // the same in all threads of the group
            float dgates[Position::per_thread][Cell::preactivations];
#pragma unroll
            for (int k = 0; k < Position::per_thread; k++) {
#pragma unroll
                for (int g = 0; g < Cell::preactivations; g++) dgates[k][g] = 0.0f;
                if (pos.sequence[k] >= 0 && t < pos.length[k]) {
                    dh_now[k] += saved[k].doutput;
                    Cell::backward(saved[k].gates, saved[k].h, saved[k].c, h_new[k], c_new[k], dh_now[k], dc_now[k],
                                   dgates[k]);
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
            for (int k = 0; k < Position::per_thread; k++) dh_now[k] += product.sum(k);
        }
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            if (pos.sequence[k] < 0) continue;
            const size_t index = (size_t)d * slot + (size_t)pos.sequence[k] * H + j;
            dh[index] = dh_now[k];
            if (has_c) dc[index] = dc_now[k];
        }
    }
}
