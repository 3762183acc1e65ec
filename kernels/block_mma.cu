// Schedule `block` on tensor cores, for 16-bit storage: one thread block walks all of time for 8 sequences of one direction.
//
//     block_mma_forward<LstmCell, __half, 128, 32, true>     HP 128, HELD 32, EVEN
//
//     HP    H rounded up to a multiple of 32; warp w of HP / 16 owns units 16 w .. 16 w + 15
//     HELD  tiles of 16 x 16 weights that a warp holds in registers; the rest stands in shared memory
//     EVEN  whether H is even, so that neighbours are loaded and stored together
//
// A product is W h (forward) or W^T d (backward) with 8 sequences as columns, all gates of a unit in one lane: what a lane
// gets out of the tensor cores it needs itself. Lane l has units 16 w + 2 (l/4) + 0, 1 of sequences 2 (l%4) + 0, 1, so
// rows l/4 and l/4 + 8 of a tile stand for neighbouring units. c, dh, dc stay in registers. What the product reads has two
// buffers, and a step one barrier. Arrays, and sequences past their end, are as in step.cu; order as in block.cu.

#include "common.cuh"
#include "tensor.cuh"
#include "cells/rnn.cuh"
#include "cells/lstm.cuh"
#include "cells/gru.cuh"

// ---- a warp's weights: TILES fragments, the same in every step

template <int TILES, int HELD, int THREADS>
struct Fragments {
    uint4 registers[HELD > 0 ? HELD : 1];
    uint4* shared;  // [TILES - HELD, THREADS]

    // fetch(tile): this lane's part. Into registers by way of `stage` [8, THREADS], which may be anybody's memory until this
    // returns (why: Weights::load in block.cu).
    template <typename Fetch>
    DEVICE void load(uint4* stage, uint4* memory, Fetch fetch) {
        stage += threadIdx.x;
#pragma unroll
        for (int from = 0; from < HELD; from += 8) {
            const int count = HELD - from < 8 ? HELD - from : 8;
#pragma unroll 2
            for (int k = 0; k < count; k++) stage[k * THREADS] = fetch(from + k);
#pragma unroll
            for (int k = 0; k < count; k++) registers[from + k] = stage[k * THREADS];
        }
        __syncthreads();
        shared = memory + threadIdx.x;
#pragma unroll 1
        for (int k = 0; k < TILES - HELD; k++) shared[k * THREADS] = fetch(HELD + k);
    }

    DEVICE uint4 get(int tile) const { return tile < HELD ? registers[tile] : shared[(tile - HELD) * THREADS]; }
};

// ---- where a lane is: units j, j + 1 of two sequences

template <bool EVEN>
struct Lane {
    int lane, j, d, longest;
    bool back;
    int row[2];   // its sequences, or -1
    int ends[2];  // their lengths, 0 where there is none

    DEVICE Lane(int T_, int B, int H, int reverse, const int* lengths, const int* order) {
        lane = threadIdx.x % 32;
        j = threadIdx.x / 32 * 16 + lane / 4 * 2;
        d = blockIdx.z;
        back = reverse >> d & 1;
        longest = 0;
        for (int r = 0; r < 8; r++) {
            const int place = blockIdx.x * 8 + r;
            if (place >= B) break;
            const int length = lengths ? lengths[order ? order[place] : place] : T_;
            longest = length > longest ? length : longest;
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int place = blockIdx.x * 8 + lane % 4 * 2 + n;
            const bool here = place < B && j < H;
            row[n] = !here ? -1 : order ? order[place] : place;
            ends[n] = !here ? 0 : lengths ? lengths[row[n]] : T_;
        }
    }

    // Whether unit j + u is inside, where unit j is.
    DEVICE bool has(int u, int H) const { return EVEN || u == 0 || j + 1 < H; }

    // Two neighbours' numbers; the second is 0, or not stored, past H.
    template <typename T>
    DEVICE float2 get(const T* at, int H) const {
        if (EVEN) return unpack(*(const unsigned*)at, T());
        return make_float2(float(at[0]), has(1, H) ? float(at[1]) : 0.0f);
    }
    template <typename T>
    DEVICE void put(T* at, float a, float b, int H) const {
        if (EVEN) {
            *(unsigned*)at = pack(T(a), T(b));
        } else {
            at[0] = T(a);
            if (has(1, H)) at[1] = T(b);
        }
    }
};

// ---- forward

template <template <typename> class CellOf, typename T, int HP, int HELD, bool EVEN>
__global__ void __launch_bounds__(HP * 2, 1) block_mma_forward(
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
    T* __restrict__ output)             // [T, B, D*H]
{
    typedef CellOf<float> Cell;
    constexpr int G = Cell::gates, KT = HP / 16, threads = HP * 2, stride = HP + 8;
    constexpr int chains = G == 1 ? 4 : 1;  // sums that do not wait for one another
    extern __shared__ uint4 memory[];
    T* box = (T*)memory;  // [2, 8, stride]: h; the 8 numbers between rows keep their reading free of bank conflicts
    const Lane<EVEN> at(T_, B, H, reverse, lengths, order);
    const int j = at.j, lane = at.lane, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)at.d * G * H * H;
    Fragments<G * KT, HELD, threads> weights;
    weights.load(memory, memory + 2 * 8 * stride * sizeof(T) / 16, [&](int tile) {
        const int g = tile % G, k = tile / G * 16 + lane % 4 * 2;
        auto one = [&](int unit, int column) {
            return unit < H && column < H ? W_hh[((size_t)g * H + unit) * H + column] : T(0.0f);
        };
        return make_uint4(pack(one(j, k), one(j, k + 1)), pack(one(j + 1, k), one(j + 1, k + 1)),
                          pack(one(j, k + 8), one(j, k + 9)), pack(one(j + 1, k + 8), one(j + 1, k + 9)));
    });

    const size_t slot = (size_t)B * H;
    const size_t first = ((size_t)at.d * (T_ + 1) + (at.back ? T_ : 0)) * slot;
    const size_t first_c = keep ? first : (size_t)at.d * 2 * slot;
    float h_old[2][2], c_old[2][2], bias_a[G][2], bias_r[G][2];  // [unit][sequence]
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const bool unit = j + u < H;
#pragma unroll
        for (int g = 0; g < G; g++) {
            bias_a[g][u] = unit && bias_ih ? bias_ih[((size_t)at.d * G + g) * H + j + u] : 0.0f;
            bias_r[g][u] = unit && bias_ih ? bias_hh[((size_t)at.d * G + g) * H + j + u] : 0.0f;
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const bool there = unit && at.row[n] >= 0;
            const size_t i = (size_t)(there ? at.row[n] : 0) * H + j + u;
            h_old[u][n] = there ? float(h[first + i]) : 0.0f;
            c_old[u][n] = there && Cell::states == 2 ? c[first_c + i] : 0.0f;
            box[(lane % 4 * 2 + n) * stride + j + u] = T(h_old[u][n]);
        }
    }
    __syncthreads();

    for (int step = 0; step < T_; step++) {
        const int t = at.back ? T_ - 1 - step : step;
        const T* reads = box + (step & 1) * 8 * stride;
        T* writes = box + (~step & 1) * 8 * stride;
        float2 ax[2][G];
        float sum[G][chains][4] = {};
        if (t < at.longest) {
#pragma unroll
            for (int n = 0; n < 2; n++) {  // asked for before the product, there behind it
                const bool there = t < at.ends[n];
                const T* row = gates + (((size_t)at.d * T_ + t) * B + (there ? at.row[n] : 0)) * W * H + j;
#pragma unroll
                for (int g = 0; g < G; g++) ax[n][g] = there ? at.get(row + (size_t)g * H, H) : make_float2(0.0f, 0.0f);
            }
#pragma unroll
            for (int k = 0; k < KT; k += 2) {
                const uint4 two = load_matrices(reads + lane % 8 * stride + k * 16 + lane / 8 * 8);
#pragma unroll
                for (int g = 0; g < G; g++) {
                    mma(sum[g][k % chains], weights.get(k * G + g), make_uint2(two.x, two.y), T());
                    mma(sum[g][(k + 1) % chains], weights.get((k + 1) * G + g), make_uint2(two.z, two.w), T());
                }
            }
        }
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const bool live = t < at.ends[n];
            float kept[2][Cell::kept + 1];
#pragma unroll
            for (int u = 0; u < 2; u++) {
                if (live && at.has(u, H)) {
                    float a[G], ah[G], h_new, c_new;
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        ah[g] = bias_r[g][u];
#pragma unroll
                        for (int k = 0; k < chains; k++) ah[g] += sum[g][k][u * 2 + n];
                        a[g] = (u ? ax[n][g].y : ax[n][g].x) + bias_a[g][u];
                    }
                    Cell::forward(a, ah, h_old[u][n], c_old[u][n], kept[u], h_new, c_new);
                    h_old[u][n] = float(T(h_new));  // the state is what is stored
                    if (Cell::states == 2) c_old[u][n] = c_new;
                }
                writes[(lane % 4 * 2 + n) * stride + j + u] = T(h_old[u][n]);
            }
            if (at.row[n] < 0) continue;
            at.put(output + ((size_t)t * B + at.row[n]) * D * H + (size_t)at.d * H + j, live ? h_old[0][n] : 0.0f,
                   live ? h_old[1][n] : 0.0f, H);
            const size_t i = (size_t)at.row[n] * H + j;
            if (keep || step == T_ - 1) {
                const size_t now = ((size_t)at.d * (T_ + 1) + (at.back ? t : t + 1)) * slot + i;
                at.put(h + now, h_old[0][n], h_old[1][n], H);
                if (Cell::states == 2) {
                    float* c_now = c + (keep ? now : ((size_t)at.d * 2 + T_ % 2) * slot + i);
                    c_now[0] = c_old[0][n];
                    if (at.has(1, H)) c_now[1] = c_old[1][n];
                }
            }
            if (keep && live) {
                T* row = gates + (((size_t)at.d * T_ + t) * B + at.row[n]) * W * H + j;
#pragma unroll
                for (int g = 0; g < Cell::kept; g++) at.put(row + (size_t)g * H, kept[0][g], kept[1][g], H);
            }
        }
        __syncthreads();
    }
}

// ---- backward: its mirror. A tile's rows are columns of W_hh, its columns 16 rows of one gate.

template <template <typename> class CellOf, typename T, int HP, int HELD, bool EVEN>
__global__ void __launch_bounds__(HP * 2, 1) block_mma_backward(
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
    float* __restrict__ dc)           // [D, B, H]  likewise; or null where the cell has none
{
    typedef CellOf<float> Cell;
    constexpr int G = Cell::gates, KT = G * HP / 16, threads = HP * 2, stride = G * HP + 8;
    extern __shared__ uint4 memory[];
    T* box = (T*)memory;  // [2, 8, stride]: d
    const Lane<EVEN> at(T_, B, H, reverse, lengths, order);
    const int j = at.j, lane = at.lane, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)at.d * G * H * H;
    Fragments<KT, HELD, threads> weights;
    weights.load(memory, memory + 2 * 8 * stride * sizeof(T) / 16, [&](int tile) {
        const int g = tile / (HP / 16), k = tile % (HP / 16) * 16 + lane % 4 * 2;
        auto one = [&](int unit, int row) {
            return unit < H && row < H ? W_hh[((size_t)g * H + row) * H + unit] : T(0.0f);
        };
        return make_uint4(pack(one(j, k), one(j, k + 1)), pack(one(j + 1, k), one(j + 1, k + 1)),
                          pack(one(j, k + 8), one(j, k + 9)), pack(one(j + 1, k + 8), one(j + 1, k + 9)));
    });

    const size_t slot = (size_t)B * H;
    float by_h[2][2], by_c[2][2];  // [unit][sequence]
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const bool there = at.row[n] >= 0 && j + u < H;
            const size_t here = (size_t)at.d * slot + (size_t)(there ? at.row[n] : 0) * H + j + u;
            by_h[u][n] = there ? dh[here] : 0.0f;
            by_c[u][n] = there && Cell::states == 2 ? dc[here] : 0.0f;
        }
    }
    for (int step = T_ - 1; step >= 0; step--) {
        const int t = at.back ? T_ - 1 - step : step;
        T* mine = box + (step & 1) * 8 * stride;
#pragma unroll
        for (int n = 0; n < 2; n++) {
            float leaves[2][Cell::leaves] = {};
            if (at.row[n] >= 0) {
                const size_t i = (size_t)at.row[n] * H + j;
                const size_t now = ((size_t)at.d * (T_ + 1) + (at.back ? t : t + 1)) * slot + i;
                const size_t old = ((size_t)at.d * (T_ + 1) + (at.back ? t + 1 : t)) * slot + i;
                T* row = gates + (((size_t)at.d * T_ + t) * B + at.row[n]) * W * H + j;
                if (t < at.ends[n]) {
                    float2 two[Cell::kept + 1], by_output = make_float2(0.0f, 0.0f);
#pragma unroll
                    for (int g = 0; g < Cell::kept; g++) two[g] = at.get(row + (size_t)g * H, H);
                    if (doutput) {
                        by_output = at.get(doutput + ((size_t)t * B + at.row[n]) * D * H + (size_t)at.d * H + j, H);
                    }
                    const float2 h_old = at.get(h + old, H), h_new = at.get(h + now, H);
#pragma unroll
                    for (int u = 0; u < 2; u++) {
                        if (!at.has(u, H)) continue;
                        float kept[Cell::kept + 1];
#pragma unroll
                        for (int g = 0; g < Cell::kept; g++) kept[g] = u ? two[g].y : two[g].x;
                        by_h[u][n] += u ? by_output.y : by_output.x;
                        const bool both = Cell::states == 2;
                        Cell::backward(kept, u ? h_old.y : h_old.x, both ? c[old + u] : 0.0f, u ? h_new.y : h_new.x,
                                       both ? c[now + u] : 0.0f, by_h[u][n], by_c[u][n], leaves[u]);
                    }
                }
#pragma unroll
                for (int g = 0; g < Cell::leaves; g++) at.put(row + (size_t)g * H, leaves[0][g], leaves[1][g], H);
            }
#pragma unroll
            for (int g = 0; g < G; g++) {
                *(unsigned*)(mine + (lane % 4 * 2 + n) * stride + g * HP + j) = pack(T(leaves[0][g]), T(leaves[1][g]));
            }
        }
        __syncthreads();
        if (t >= at.longest) continue;  // all of the block alike
        float sum[4][4] = {};
#pragma unroll
        for (int k = 0; k < KT; k += 2) {
            const uint4 two = load_matrices(mine + lane % 8 * stride + k * 16 + lane / 8 * 8);
            mma(sum[k % 4], weights.get(k), make_uint2(two.x, two.y), T());
            mma(sum[(k + 1) % 4], weights.get(k + 1), make_uint2(two.z, two.w), T());
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int n = 0; n < 2; n++) {
                by_h[u][n] += sum[0][u * 2 + n] + sum[1][u * 2 + n] + (sum[2][u * 2 + n] + sum[3][u * 2 + n]);
            }
        }
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (at.row[n] < 0 || !at.has(u, H)) continue;
            const size_t here = (size_t)at.d * slot + (size_t)at.row[n] * H + j + u;
            dh[here] = by_h[u][n];
            if (Cell::states == 2) dc[here] = by_c[u][n];
        }
    }
}
