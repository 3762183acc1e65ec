// Schedule `grid`: a group of thread blocks walks all of time for R sequences of one direction; each owns U units, their
// recurrent weights and their c. One exchange through L2 a step: forward the new h, backward each block's part of dh.
//
//     grid_forward<LstmCell, float, 8, 1024, 32, 32, 1>      U 8, KP 1024, S 32, KREG 32, R 1
//     grid_backward<LstmCell, float, 8, 1024, 1, 32, 1>      U 8, KP 1024, S 1, KREG 32, R 1
//
//     U     units of a block, a power of two; a group is gridDim.x blocks
//     KP    H rounded up to a multiple of 128
//     S     slices. Forward: of the columns, thread (unit, slice) of U x S. Backward: of the block's own G U rows, thread
//           (4 columns, slice) of KP / 4 x S
//     KREG  of a thread's fours of weights in each row (forward: in numbers, a multiple of 4; backward: fours)
//     R     sequences of a tile, a power of two
//
// A group walks one tile after another: tiles blockIdx.y, blockIdx.y + gridDim.y, ... of direction blockIdx.z. All blocks of
// a launch must be there at once (a cooperative launch); groups do not wait for one another.
//
// Arrays, and sequences past their end, are as in step.cu; order as in block.cu. Sums have a fixed order.

#include "common.cuh"
#include "tile.cuh"
#include "exchange.cuh"
#include "cells/rnn.cuh"
#include "cells/lstm.cuh"
#include "cells/gru.cuh"

// x summed over the lanes that stand a multiple of LANES apart; all of them get the sum.
template <int LANES>
DEVICE float fold(float x) {
#pragma unroll
    for (int apart = LANES; apart < 32; apart *= 2) x += __shfl_xor_sync(0xffffffffu, x, apart);
    return x;
}

// ---- forward

template <template <typename> class CellOf, typename T, int U, int KP, int S, int KREG, int R>
__global__ void __launch_bounds__(U * S, 1) grid_forward(
    const int T_,
    const int B,
    const int H,
    const int W,         // blocks of H in a row of gates
    const int reverse,
    const int keep,      // 0: inference; gates are only read, of h and c only the last state is stored, c in slot T % 2
    const int* __restrict__ lengths,    // [B]  or null
    const int* __restrict__ order,      // [B]  or null
    const T* __restrict__ weight_hh,    // [D, G*H, H]
    const float* __restrict__ bias_ih,  // [D, G*H]  or null
    const float* __restrict__ bias_hh,  // [D, G*H]  or null
    T* gates,                           // [D, T, B, W*H]  in: ax; out: what the cell keeps
    T* h,                               // [D, T+1, B, H]  in: the first slot; out: the others
    float* c,                           // [D, T+1 or 2, B, H]  likewise; or null where the cell has none
    T* __restrict__ output,             // [T, B, D*H]
    const unsigned epoch,               // that no word of `words` has yet, nor one of the next tiles * T
    const int patience,                 // polls
    unsigned long long* words,          // [groups, 2, H*R]
    int* failed)                        // [1]
{
    typedef CellOf<float> Cell;
    constexpr int G = Cell::gates, KS = KP / S, threads = U * S, lanes = U < 32 ? U : 32;
    constexpr int P = threads / (U < 32 ? 32 : U);  // sums that are left of the slices
    constexpr int row_size = S * (KS + 4);          // the 4 numbers between slices keep reading free of bank conflicts
    typedef Weights<T, G, KS, KREG, R, threads> Mine;
    typedef Tile<U, S, R> Place;
    extern __shared__ float4 memory[];
    float* box = (float*)memory;         // [R, row_size]: h
    float* parts = box + R * row_size;   // [P, G, R, U]
    auto* rest = (typename Mine::four*)(parts + P * G * R * U);
    __shared__ int stop;

    const int unit = blockIdx.x * U, d = blockIdx.z, D = gridDim.z, s = threadIdx.x / U;
    const T* W_hh = weight_hh + (size_t)d * G * H * H;
    Mine weights;
    weights.template load<true>((typename Mine::four*)memory, rest, [&](int thread, int g, int k) {
        const int row = unit + thread % U, column = thread / U * KS + k;
        return load_four(W_hh + ((size_t)g * H + row) * H + column, 1, row < H ? H - column : 0, H % 4 == 0);
    });
    Exchange with(words, d * gridDim.y + blockIdx.y, R * H, epoch, patience, failed);
    if (threadIdx.x == 0) stop = 0;

    const size_t slot = (size_t)B * H;
    bool began = false;  // whether a number was ever sent
    for (int tile = blockIdx.y; tile * R < B; tile += gridDim.y) {
        const Place at(T_, B, H, tile, unit, d, reverse, lengths, order);
        const int j = at.j;
        const size_t first = ((size_t)d * (T_ + 1) + (at.back ? T_ : 0)) * slot;
        const size_t first_c = keep ? first : (size_t)d * 2 * slot;
        float h_old[Place::mine], c_old[Place::mine], bias_a[G], bias_r[G], ax[Place::mine][G];
#pragma unroll
        for (int g = 0; g < G; g++) {
            const bool there = bias_ih && j < H;
            bias_a[g] = there ? bias_ih[((size_t)d * G + g) * H + j] : 0.0f;
            bias_r[g] = there ? bias_hh[((size_t)d * G + g) * H + j] : 0.0f;
        }
#pragma unroll
        for (int k = 0; k < Place::mine; k++) {
            const size_t n = (size_t)at.row[k] * H + j;
            const bool there = at.row[k] >= 0;
            h_old[k] = there ? float(h[first + n]) : 0.0f;
            c_old[k] = there && Cell::states == 2 ? c[first_c + n] : 0.0f;
        }
        // Before this tile's first number goes out, the last one's must have come: see exchange.cuh.
        if (began) with.template receive<threads>(0, R * H, [](int) { return true; }, [](int, float) {});
        __syncthreads();
        for (int i = threadIdx.x; i < R * KP; i += threads) {
            const int r = i / KP, k = i % KP, place = tile * R + r;
            const int row = place >= B ? -1 : order ? order[place] : place;
            box[r * row_size + k / KS * (KS + 4) + k % KS] =
                row >= 0 && k < H ? float(h[first + (size_t)row * H + k]) : 0.0f;
        }
        bool fresh = true;

        for (int step = 0; step < T_; step++) {
            const int t = at.back ? T_ - 1 - step : step;
            const bool walks = t < at.longest;  // all of the group alike
            if (walks) {
#pragma unroll
                for (int k = 0; k < Place::mine; k++) {  // asked for before the others' h comes
                    const bool there = t < at.ends[k];
                    const T* row = gates + (((size_t)d * T_ + t) * B + (there ? at.row[k] : 0)) * W * H + j;
#pragma unroll
                    for (int g = 0; g < G; g++) ax[k][g] = there ? float(row[(size_t)g * H]) : 0.0f;
                }
                if (!fresh) {
                    with.template receive<threads>(0, R * H, [](int) { return true; }, [&](int i, float x) {
                        const int r = i % R, k = i / R;
                        box[r * row_size + k / KS * (KS + 4) + k % KS] = x;
                    });
                }
                if (with.lost) *(volatile int*)&stop = 1;  // by many threads, perhaps
                __syncthreads();
                if (stop) return;
                fresh = false;
                float part[G][R];
                weights.multiply(part, [&](int g, int r) { return (const float4*)(box + r * row_size + s * (KS + 4)); });
#pragma unroll
                for (int g = 0; g < G; g++) {
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        const float sum = fold<lanes>(part[g][r]);
                        const int p = U < 32 ? threadIdx.x / 32 : s;
                        if (U >= 32 || threadIdx.x % 32 < U) parts[((p * G + g) * R + r) * U + threadIdx.x % U] = sum;
                    }
                }
                __syncthreads();
            }
            float kept[Place::mine][Cell::kept + 1];
#pragma unroll
            for (int k = 0; k < Place::mine; k++) {
                const int r = s + k * S;
                if (at.row[k] >= 0 && t < at.ends[k]) {
                    float a[G], ah[G], h_new, c_new;
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        ah[g] = bias_r[g];
                        for (int p = 0; p < P; p++) ah[g] += parts[((p * G + g) * R + r) * U + threadIdx.x % U];
                        a[g] = ax[k][g] + bias_a[g];
                    }
                    Cell::forward(a, ah, h_old[k], c_old[k], kept[k], h_new, c_new);
                    h_old[k] = float(T(h_new));  // the state is what is stored
                    if (Cell::states == 2) c_old[k] = c_new;
                }
                if (walks && r < R && j < H) with.send(j * R + r, h_old[k]);  // first of all: the others wait for it
            }
            if (walks) {
                with.next();
                began = true;
            }
#pragma unroll
            for (int k = 0; k < Place::mine; k++) {
                if (at.row[k] < 0) continue;
                const size_t n = (size_t)at.row[k] * H + j;
                const bool live = t < at.ends[k];
                output[((size_t)t * B + at.row[k]) * D * H + (size_t)d * H + j] = T(live ? h_old[k] : 0.0f);
                if (keep || step == T_ - 1) {
                    const size_t now = ((size_t)d * (T_ + 1) + (at.back ? t : t + 1)) * slot + n;
                    h[now] = T(h_old[k]);
                    if (Cell::states == 2) c[keep ? now : ((size_t)d * 2 + T_ % 2) * slot + n] = c_old[k];
                }
                if (keep && live) {
                    T* row = gates + (((size_t)d * T_ + t) * B + at.row[k]) * W * H + j;
#pragma unroll
                    for (int g = 0; g < Cell::kept; g++) row[(size_t)g * H] = T(kept[k][g]);
                }
            }
        }
    }
}

// ---- backward: a block's rows times its d are its part of dh, for all units; the block that owns a unit sums the parts.

template <template <typename> class CellOf, typename T, int U, int KP, int S, int KREG, int R>
__global__ void __launch_bounds__(KP / 4 * S, 1) grid_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const int* __restrict__ order,    // [B]  or null
    const T* __restrict__ weight_hh,  // [D, G*H, H]
    T* gates,                         // [D, T, B, W*H]  in: what forward kept; out: d
    const T* __restrict__ h,          // [D, T+1, B, H]
    const float* __restrict__ c,      // [D, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    float* __restrict__ dh,           // [D, B, H]  in: by the last h; out: by the first
    float* __restrict__ dc,           // [D, B, H]  likewise; or null where the cell has none
    const unsigned epoch,
    const int patience,
    unsigned long long* words,        // [groups, 2, N*N*R*U], N = gridDim.x
    int* failed)                      // [1]
{
    typedef CellOf<float> Cell;
    constexpr int G = Cell::gates, Q = KP / 4, threads = Q * S, OWN = R * U;
    constexpr int RS = (G * U + 4 * S - 1) / (4 * S) * 4;  // rows of a slice
    constexpr int lanes = OWN < 32 ? OWN : 32, P = threads / (OWN < 32 ? 32 : OWN);
    typedef Weights<T, 1, 4 * RS, 4 * KREG, R, threads> Mine;
    typedef Tile<U, threads / U, R> Place;
    extern __shared__ float4 memory[];
    float* box = (float*)memory;        // [R, S * RS]: d of the block's rows
    float* parts = box + R * S * RS;    // [S, R, KP]
    float* sums = parts + S * R * KP;   // [P, OWN]
    auto* rest = (typename Mine::four*)(sums + P * OWN);
    __shared__ int stop;

    const int unit = blockIdx.x * U, d = blockIdx.z, D = gridDim.z, N = gridDim.x;
    const int quad = threadIdx.x % Q, slice = threadIdx.x / Q;
    const T* W_hh = weight_hh + (size_t)d * G * H * H;
    Mine weights;
    weights.template load<false>((typename Mine::four*)memory, rest, [&](int thread, int g, int k) {
        const int i = thread / Q * RS + k / 4, u = unit + i % U, column = thread % Q * 4;
        const bool there = i < G * U && u < H;
        return load_four(W_hh + ((size_t)(i / U) * H + u) * H + column, 1, there ? H - column : 0, H % 4 == 0);
    });
    Exchange with(words, d * gridDim.y + blockIdx.y, N * N * OWN, epoch, patience, failed);
    if (threadIdx.x == 0) stop = 0;
    for (int k = threadIdx.x; k < R * S * RS; k += threads) box[k] = 0.0f;  // rows past the block's stay zero
    __syncthreads();

    const size_t slot = (size_t)B * H;
    for (int tile = blockIdx.y; tile * R < B; tile += gridDim.y) {
        const Place at(T_, B, H, tile, unit, d, reverse, lengths, order);
        const int j = at.j;
        float by_h[Place::mine], by_c[Place::mine];
#pragma unroll
        for (int k = 0; k < Place::mine; k++) {
            const bool there = at.row[k] >= 0;
            const size_t here = (size_t)d * slot + (size_t)at.row[k] * H + j;
            by_h[k] = there ? dh[here] : 0.0f;
            by_c[k] = there && Cell::states == 2 ? dc[here] : 0.0f;
        }
        for (int step = T_ - 1; step >= 0; step--) {
            const int t = at.back ? T_ - 1 - step : step;
#pragma unroll
            for (int k = 0; k < Place::mine; k++) {
                const int r = at.s + k * (threads / U);
                float leaves[Cell::leaves] = {};
                if (at.row[k] >= 0) {
                    const size_t n = (size_t)at.row[k] * H + j;
                    const size_t now = ((size_t)d * (T_ + 1) + (at.back ? t : t + 1)) * slot + n;
                    const size_t old = ((size_t)d * (T_ + 1) + (at.back ? t + 1 : t)) * slot + n;
                    T* row = gates + (((size_t)d * T_ + t) * B + at.row[k]) * W * H + j;
                    if (t < at.ends[k]) {
                        float kept[Cell::kept + 1];
#pragma unroll
                        for (int g = 0; g < Cell::kept; g++) kept[g] = float(row[(size_t)g * H]);
                        if (doutput) by_h[k] += float(doutput[((size_t)t * B + at.row[k]) * D * H + (size_t)d * H + j]);
                        const bool two = Cell::states == 2;
                        Cell::backward(kept, float(h[old]), two ? c[old] : 0.0f, float(h[now]), two ? c[now] : 0.0f,
                                       by_h[k], by_c[k], leaves);
                    }
#pragma unroll
                    for (int g = 0; g < Cell::leaves; g++) row[(size_t)g * H] = T(leaves[g]);
                }
                if (r < R) {
#pragma unroll
                    for (int g = 0; g < G; g++) box[r * S * RS + g * U + threadIdx.x % U] = float(T(leaves[g]));
                }
            }
            if (t >= at.longest) continue;  // all of the group alike
            __syncthreads();
            float4 part[R];
            weights.spread(part, [&](int r) { return (const float4*)(box + r * S * RS + slice * RS); });
#pragma unroll
            for (int r = 0; r < R; r++) *(float4*)(parts + (slice * R + r) * KP + quad * 4) = part[r];
            __syncthreads();
#pragma unroll 1
            for (int r = 0; r < R; r++) {
                for (int k = threadIdx.x; k < H; k += threads) {
                    float sum = 0.0f;
                    for (int p = 0; p < S; p++) sum += parts[(p * R + r) * KP + k];
                    with.send((k / U * N + blockIdx.x) * OWN + r * U + k % U, sum);
                }
            }
            with.next();
            float sum = 0.0f;  // a thread gets parts of one number: OWN divides the threads
            with.template receive<threads>(
                blockIdx.x * N * OWN, N * OWN, [&](int i) { return unit + i % U < H; }, [&](int, float x) { sum += x; });
            sum = fold<lanes>(sum);
            if (OWN >= 32 || threadIdx.x % 32 < OWN) {
                sums[(OWN < 32 ? threadIdx.x / 32 : threadIdx.x / OWN) * OWN + threadIdx.x % OWN] = sum;
            }
            if (with.lost) *(volatile int*)&stop = 1;  // by many threads, perhaps
            __syncthreads();
            if (stop) return;
#pragma unroll
            for (int k = 0; k < Place::mine; k++) {
                const int r = at.s + k * (threads / U);
                if (r >= R) continue;
                for (int p = 0; p < P; p++) by_h[k] += sums[p * OWN + r * U + threadIdx.x % U];
            }
        }
#pragma unroll
        for (int k = 0; k < Place::mine; k++) {
            if (at.row[k] < 0) continue;
            const size_t here = (size_t)d * slot + (size_t)at.row[k] * H + j;
            dh[here] = by_h[k];
            if (Cell::states == 2) dc[here] = by_c[k];
        }
    }
}
