// Schedule `cluster` on tensor cores, for 16-bit storage and for float as tf32, from sm_90 on: a cluster of thread blocks runs
// the whole time loop of R sequences of one direction. Each block owns U units, their recurrent weights and their states. The
// blocks exchange numbers through their shared memory once a step: forward the new h, backward sums of dh.
//
//     cluster_forward<lstm, __half, 16, 8, 32, 8>     C 16, WARPS 8, HELD 32, R 8
//
//     C      thread blocks of a cluster, a power of two
//     WARPS  of a block. U is 4 WARPS; 8 WARPS where at most 2 gates multiply h
//     HELD   tiles of weights (tensor.cuh) that a warp holds in registers; the others are in shared memory
//     R      sequences of a tile, a power of two up to 16; they are columns of a product that has 8 or 16
//
// Forward, a warp computes all gates of its own units: W h, whose h it reads whole. A tile has 4 gates of 4 units, or 2 gates
// of 8, so that lanes have the gates of a cell among themselves. No warp waits for another one of its block.
//
// Backward, a block multiplies its own dgates by its rows of W, which gives a part of dh of all units of the layer. It sends
// each block that block's part; a receiver adds up C parts, in the order of the blocks.
//
// Groups of sequences, tiles and arrays are as in grid.cu; the grid is (D, C, clusters of a direction).

#include "../common.cuh"
#include "../cells/all.cuh"
#include "tile.cuh"
#include "tensor.cuh"
#include "lanes.cuh"
#include "cluster.cuh"
#include "time_loop.cuh"

// ---- forward

template <int Q, typename T, int C, int WARPS, int HELD, int R>
struct Gathered {
    static constexpr bool makes_ax = false;
    static_assert((C & (C - 1)) == 0, "a power of two");
    static constexpr int UNITS = units_of_warp(Q), U = WARPS * UNITS, MT = (Q * UNITS + 15) / 16;
    typedef Operand<T, R> Numbers;
    typedef WarpPosition<UNITS, R> Position;
    static constexpr int N = Numbers::N, KT = Numbers::groups(C * U), chains = chains_of(MT * N);
    static constexpr int slot_bytes = Numbers::size(C * U), turn_bytes = C * U * R * (int)sizeof(T);
    static constexpr int sent = UNITS < Numbers::PIECE ? UNITS : Numbers::PIECE;  // units that one lane sends together
    static_assert(HELD <= MT * KT * 2, "no more than there are");
    Fragments<MT * KT * 2, HELD, WARPS * 32> weights;
    float gates[Position::per_thread][MT * 16 / UNITS];

    // A tile's row r is unit r % UNITS and gate r / UNITS.
    DEVICE Gathered(float4* memory, const T* W_hh, int unit, int H) {
        weights.load((uint4*)memory, (uint4*)memory + 1 + 2 * slot_bytes / 16, [&](int tile) {
            const int m = tile / 2 % MT, group = tile / 2 / MT;
            return Numbers::tile_of_fours(tile % 2, [&](int row, int n) {
                const int u = unit + threadIdx.x / 32 * UNITS + row % UNITS, g = m * (16 / UNITS) + row / UNITS;
                const int column = group * Numbers::GROUP + n, count = g < Q && u < H ? H - column : 0;
                return load_vec4(W_hh + ((size_t)g * H + u) * H + column, 1, count, H % 4 == 0);
            });
        });
        __syncthreads();
    }

    template <typename Channel>
    DEVICE void send(Channel& channel, const Position&, int k, T h) const {
        unsigned words[sent / Numbers::P];
        gather_units(words, h);
        const int column = Position::column(k), own = Position::own_unit();
        const int place = Numbers::place(blockIdx.y * U + own / sent * sent, column);
#pragma unroll
        for (int to = 0; to < C; to += sent) {  // each of the lanes that have these words sends them to other blocks
            if (column < R && to + own % sent < C) channel.send(to + own % sent, place, words);
        }
    }

    template <typename Channel>
    DEVICE void next(Channel& channel) const { channel.next(); }

    template <typename Channel>
    DEVICE bool run(Channel& channel, const Position&) {
        float sums[MT][N][chains][4];
        channel.wait();
        if (__any_sync(0xffffffffu, channel.timed_out)) return false;
        Numbers::template multiply<MT, KT>(sums, weights, channel.slot());
        __syncwarp();  // all lanes have read before one of them sends
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int m = 0; m < MT; m++) distribute(sums[m][n][0], n, m);
        }
        return true;
    }

    // Sums are in rows l/4, l/4 + 8 of columns 2 (l%4) + 0, 1. With 4 units, lanes l and l ^ 16 have two gates each of the same
    // unit, and exchange them so that each has all four of one column.
    DEVICE void distribute(const float (&sum)[4], int n, int m) {
        if constexpr (UNITS == 8) {
#pragma unroll
            for (int i = 0; i < 4; i++) gates[n * 2 + i % 2][i / 2] = sum[i];
        } else {
            const bool upper = threadIdx.x & 16;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float own = upper ? sum[2 * i + 1] : sum[2 * i];
                const float other = __shfl_xor_sync(0xffffffffu, upper ? sum[2 * i] : sum[2 * i + 1], 16);
                gates[n][m * 4 + 2 * i] = upper ? other : own;
                gates[n][m * 4 + 2 * i + 1] = upper ? own : other;
            }
        }
    }

    DEVICE float add(float start, int k, int, int g) const { return start + gates[k][g]; }
};

template <template <typename> class CellOf, typename T, int C, int WARPS, int HELD, int R, bool MARKED = false>
__global__ void __launch_bounds__(WARPS * 32, 1) __cluster_dims__(1, C, 1) cluster_forward(
    const int T_,
    const int B,
    const int H,
    const int W,         // blocks of H in a row of gates
    const int reverse,
    const int save,      // 0: inference; gates are only read, only the last states are stored, others in slot T % 2
    const int* __restrict__ lengths,    // [B]  or null
    const int* __restrict__ order,      // [B]  or null
    const T* __restrict__ weight_hh,    // [D, Q*H, H]  aligned
    const float* __restrict__ bias_ih,  // [D, G*H]  or null
    const float* __restrict__ bias_hh,  // [D, G*H]  or null
    const float* __restrict__ own,      // [D, N, H]  or null where the cell has none
    const int mask_steps,               // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,      // [D, mask_steps, B, M*H]  or null where the cell draws none
    T* gates,                           // [D, T, B, W*H]  in: ax; out: what the cell saves
    T* h,                               // [D, T+1, B, H]  in: the first slot; out: the others
    float* others,                      // [D, S-1, T+1 or 2, B, H]  likewise; or null where the cell has none
    T* __restrict__ output,             // [T, B, D*H]
    const int poll_limit,               // of one wait
    int* failed,                        // [1]
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,      // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    typedef Gathered<CellOf<float>::products, T, C, WARPS, HELD, R> Product;
    const int unit = blockIdx.y * Product::U, d = blockIdx.x;
    Product product(memory, weight_hh + (size_t)d * CellOf<float>::products * H * H, unit, H);
    Cluster<C, Product::slot_bytes, Product::turn_bytes> channel(memory, 16 + 2 * Product::slot_bytes, poll_limit, failed);
    const Forward<T> layer = {
        T_, B, H, W, (int)gridDim.x, save, mask_steps, bias_ih, bias_hh, own, mask, gates, h, others, output,
        {marks, reset_h, reset_others}};
    for (int tile = blockIdx.z; tile * R < B; tile += gridDim.z) {
        const typename Product::Position pos(T_, B, H, tile, unit, d, reverse, lengths, order);
        if (!time_loop_forward<CellOf, MARKED>(layer, pos, channel, product)) break;
    }
    cluster_barrier();  // a block that gives up stays until nobody sends it anything
}

// ---- backward: the rows are all units of the layer, the columns are the block's own rows of W_hh, unit by unit

template <int Q, typename T, int C, int WARPS, int HELD, int R>
struct Returned {
    static constexpr bool loads_ahead = true;
    static constexpr int UNITS = units_of_warp(Q), U = WARPS * UNITS;
    typedef Operand<T, R> Numbers;
    typedef WarpPosition<UNITS, R> Position;
    static constexpr int MT = (C * U + 16 * WARPS - 1) / (16 * WARPS);  // tiles of 16 units for each warp
    static constexpr int N = Numbers::N, KT = Numbers::groups(Q * U), chains = chains_of(MT * N);
    static constexpr int slot_bytes = C * U * R * 4, buffer_bytes = Numbers::size(Q * U);
    static_assert((C & (C - 1)) == 0 && HELD <= MT * KT * 2, "as in forward");
    Fragments<MT * KT * 2, HELD, WARPS * 32> weights;
    unsigned parts;  // shared address of [C, U / 4, R, 4]: what this block has received
    bool lost;       // it is not all there

    // A tile's rows l/4 and l/4 + 8 are units 2 (l/4) and 2 (l/4) + 1 of the tile.
    DEVICE Returned(float4* memory, const T* W_hh, int unit, int H) {
        weights.load((uint4*)memory, (uint4*)memory + 1 + 2 * (slot_bytes + buffer_bytes) / 16, [&](int tile) {
            const int first = (threadIdx.x / 32 * MT + tile / 2 % MT) * 16, group = tile / 2 / MT;
            return Numbers::tile_of(tile % 2, [&](int row, int n) {
                const int u = first + row % 8 * 2 + row / 8, k = group * Numbers::GROUP + n, own = unit + k / Q;
                return k < Q * U && own < H && u < H ? W_hh[((size_t)(k % Q) * H + own) * H + u] : T(0.0f);
            });
        });
        __syncthreads();
    }

    // The shared address of this step's dgates, an Operand. Two buffers alternate, so that one barrier is enough for a step.
    template <typename Channel>
    DEVICE static unsigned buffer_of(const Channel& channel) { return channel.behind() + channel.turn % 2 * buffer_bytes; }

    template <typename Channel>
    DEVICE void stage(Channel& channel, const Position&, int k, const T* dgates) {
        const int column = Position::column(k), own = Position::own_unit() * Q;
        if (column >= R) return;
        const unsigned to = buffer_of(channel);
        if constexpr (Q % 2 == 0 && sizeof(T) == 2) {
#pragma unroll
            for (int g = 0; g < Q; g += 2) {
                store_shared(to + Numbers::place(own + g, column), pack(dgates[g], dgates[g + 1]));
            }
        } else {
#pragma unroll
            for (int g = 0; g < Q; g++) store_number(to + Numbers::place(own + g, column), dgates[g]);
        }
    }

    // Multiplies what is staged and sends it. `lost` is the same in all threads of the block here.
    template <typename Channel>
    DEVICE void next(Channel& channel) {
        float sums[MT][N][chains][4];
        lost = __syncthreads_or(channel.timed_out);
        if (lost) return;
        Numbers::template multiply<MT, KT>(sums, weights, buffer_of(channel));
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (int m = 0; m < MT; m++) send(channel, sums[m][n][0], n, m);
        }
        channel.next();
    }

    template <typename Channel>
    DEVICE bool run(Channel& channel, const Position&) {
        if (lost) return false;
        channel.wait();
        parts = channel.slot();
        lost = channel.timed_out;
        return true;
    }

    // Lanes l and l ^ 4 have 2 units each of the same two columns; each sends 4 units of one.
    template <typename Channel>
    DEVICE static void send(Channel& channel, const float (&sum)[4], int n, int m) {
        const int lane = threadIdx.x % 32;
        const bool odd = lane & 4;
        float own[2], other[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            own[i] = odd ? sum[2 * i + 1] : sum[2 * i];
            other[i] = __shfl_xor_sync(0xffffffffu, odd ? sum[2 * i] : sum[2 * i + 1], 4);
        }
        const unsigned words[4] = {
            __float_as_uint(odd ? other[0] : own[0]), __float_as_uint(odd ? other[1] : own[1]),
            __float_as_uint(odd ? own[0] : other[0]), __float_as_uint(odd ? own[1] : other[1])};
        const int unit = (threadIdx.x / 32 * MT + m) * 16 + lane / 8 * 4, column = n * 8 + lane % 4 * 2 + odd;
        if (column < R && unit < C * U) channel.send(unit / U, place(blockIdx.y, unit % U, column) * 4, words);
    }

    DEVICE static int place(int from, int unit, int column) {
        return ((from * (U / 4) + unit / 4) * R + column) * 4 + unit % 4;
    }

    DEVICE float sum(int k, int) const {
        if (lost) return 0.0f;  // the next step ends
        const int column = Position::column(k) < R ? Position::column(k) : 0;
        const unsigned first = parts + place(0, Position::own_unit(), column) * 4;
        float total[4] = {};
#pragma unroll
        for (int from = 0; from < C; from++) total[from % 4] += load_shared(first + from * (U * R * 4));
        return total[0] + total[1] + (total[2] + total[3]);
    }
};

template <template <typename> class CellOf, typename T, int C, int WARPS, int HELD, int R, bool MARKED = false>
__global__ void __launch_bounds__(WARPS * 32, 1) __cluster_dims__(1, C, 1) cluster_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const int* __restrict__ order,    // [B]  or null
    const T* __restrict__ weight_hh,  // [D, Q*H, H]
    T* gates,                         // [D, T, B, W*H]  in: what forward saved; out: dgates
    const T* __restrict__ h,          // [D, T+1, B, H]
    const float* __restrict__ others,  // [D, S-1, T+1, B, H]  or null where the cell has none
    const float* __restrict__ own,    // [D, N, H]  or null where the cell has none
    const int mask_steps,             // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,    // [D, mask_steps, B, M*H]  or null where the cell draws none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    float* __restrict__ dh,           // [D, B, H]  in: of the last h; out: of the first
    float* __restrict__ dothers,      // [D, S-1, B, H]  likewise; or null where the cell has none
    const int poll_limit,
    int* failed,                      // [1]
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,    // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others,  // [D, S-1, B, H]  likewise; or null
    float* __restrict__ dreset_h,     // [D, B, H]  in, out: sums of gradients; or null
    float* __restrict__ dreset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    typedef Returned<CellOf<float>::products, T, C, WARPS, HELD, R> Product;
    const int unit = blockIdx.y * Product::U, d = blockIdx.x;
    Product product(memory, weight_hh + (size_t)d * CellOf<float>::products * H * H, unit, H);
    constexpr int received = Product::slot_bytes;
    Cluster<C, received, received> channel(memory, 16 + 2 * (received + Product::buffer_bytes), poll_limit, failed);
    const Backward<T> layer = {T_, B, H, W, (int)gridDim.x, mask_steps, own, mask, gates, h, others, doutput, dh, dothers,
                               {marks, reset_h, reset_others, dreset_h, dreset_others}};
    for (int tile = blockIdx.z; tile * R < B; tile += gridDim.z) {
        const typename Product::Position pos(T_, B, H, tile, unit, d, reverse, lengths, order);
        if (!time_loop_backward<CellOf, MARKED>(layer, pos, channel, product)) break;
    }
    cluster_barrier();  // as in forward
}
