// Means over the units of a sequence, between the stages of a cell (cells/cell.cuh). They are the same numbers in all
// threads of the sequence: the order of a sum is fixed, a thread's own units, the lanes of a warp, the warps.
//
// `Units` says where the units of a sequence are, all of them in one thread block:
//
//     warps    in as many neighbouring warps; the first one's number is a multiple of it
//     apart    of each of them in every apart-th lane
//     working  the warps of the thread block that have sequences, the first ones
//
// `parts` [warps of the thread block, means, apart] is shared memory. A timestep writes each of its numbers once; a barrier
// must divide it from the next.

// The size of `parts` in vectors of 16 bytes, where each thread has Units::per_thread sequences of `means` floats.
template <typename Units, int THREADS>
DEVICE constexpr int vectors_of_means(int means) {
    return (THREADS / 32 * Units::per_thread * means * Units::apart + 3) / 4;
}

// The means over H units: x[k] is this thread's sum, then the mean of all. row: numbers from a warp to the next.
template <typename Units, int COUNT, typename real>
DEVICE void average(real (&x)[COUNT], real* parts, int row, int H) {
    constexpr int WARPS = Units::warps, APART = Units::apart;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < Units::working) {
#pragma unroll
        for (int k = 0; k < COUNT; k++) {
#pragma unroll
            for (int distance = 16; distance >= APART; distance /= 2) x[k] += __shfl_xor_sync(0xffffffffu, x[k], distance);
            if (lane < APART) parts[warp * row + k * APART + lane] = x[k];
        }
    }
    __syncthreads();
    if (warp >= Units::working) return;
    const real* from = parts + warp / WARPS * WARPS * row + lane % APART;
#pragma unroll
    for (int k = 0; k < COUNT; k++) {
        x[k] = real(0);
#pragma unroll
        for (int w = 0; w < WARPS; w++) x[k] += from[w * row + k * APART];
        x[k] /= real(H);
    }
}

// Sets in.mean[first + m] of this thread's units to the mean of out.sum[first + m], m < COUNT, of each of K sequences.
template <typename Units, int COUNT, int K, int U, typename In, typename Out, typename Valid, typename real>
DEVICE void average_sums(In (&in)[K][U], const Out (&out)[K][U], int first, Valid valid, real* parts, int row, int H) {
    real x[K * COUNT];
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int m = 0; m < COUNT; m++) {
            x[k * COUNT + m] = real(0);
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (valid(k, u)) x[k * COUNT + m] += out[k][u].sum[first + m];
            }
        }
    }
    average<Units>(x, parts + K * first * Units::apart, row, H);
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int m = 0; m < COUNT; m++) in[k][u].mean[first + m] = x[k * COUNT + m];
        }
    }
}

// All stages of a cell but the last one, from `stage` on, where `first` means are known: of a thread's U units of K sequences.
template <typename Units, int stage = 0, int first = 0, typename Cell, typename real, int K, int U, typename Valid, typename Sum>
DEVICE void forward_means(ForwardIn<Cell, real> (&in)[K][U], ForwardOut<Cell, real> (&out)[K][U], Valid valid, Sum* parts,
                          int H) {
    if constexpr (stage + 1 < Cell::stages) {
        constexpr int count = Cell::means_of(stage);
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (valid(k, u)) forward_stage<stage, Cell, real>(in[k][u], out[k][u]);
            }
        }
        average_sums<Units, count>(in, out, first, valid, parts, K * Cell::means * Units::apart, H);
        forward_means<Units, stage + 1, first + count>(in, out, valid, parts, H);
    }
}

template <typename Units, int stage = 0, int first = 0, typename Cell, typename real, int K, int U, typename Valid, typename Sum>
DEVICE void backward_means(BackwardIn<Cell, real> (&in)[K][U], BackwardOut<Cell, real> (&out)[K][U], Valid valid, Sum* parts,
                           int H) {
    if constexpr (stage + 1 < Cell::back_stages) {
        constexpr int count = Cell::back_means_of(stage);
#pragma unroll
        for (int k = 0; k < K; k++) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (valid(k, u)) backward_stage<stage, Cell, real>(in[k][u], out[k][u]);
            }
        }
        average_sums<Units, count>(in, out, first, valid, parts, K * Cell::back_means * Units::apart, H);
        backward_means<Units, stage + 1, first + count>(in, out, valid, parts, H);
    }
}
