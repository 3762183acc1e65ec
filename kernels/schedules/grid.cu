// Schedule `grid`: a group of thread blocks runs the whole time loop of R sequences of one direction. Each block owns U
// units, their recurrent weights and their states. The blocks exchange numbers through L2 once a step: forward the new h,
// backward each block's part of dh.
//
//     grid_forward<lstm, float, 8, 1024, 32, 32, 1, 1>      U 8, KP 1024, S 32, KREG 32, R 1, AT 1
//     grid_backward<lstm, float, 8, 1024, 1, 32, 1, 1>      U 8, KP 1024, S 1, KREG 32, R 1, AT 1
//
//     U     units of a block, a power of two; a group is gridDim.y blocks
//     KP    H rounded up to a multiple of 128
//     S     slices. Forward, of the columns: a thread has one unit and one slice, U x S threads. Backward, of the block's
//           Q U rows: a thread has 4 columns and one slice, KP / 4 x S threads
//     KREG  weights in registers. Forward: columns of a thread, a multiple of 4. Backward: rows of its 4 columns
//     R     sequences of a tile, a power of two
//     AT    tiles that a group has at once, 1 or 2. It computes one while the numbers of the other are on their way
//
// A group works on AT tiles after another: tiles blockIdx.z, blockIdx.z + gridDim.z, ... of direction blockIdx.x. All
// blocks of a launch must run at the same time (a cooperative launch). Groups do not wait for one another. The blocks of a
// group, two or more, lie along y: CuPy silently shrinks a cooperative grid that is 1 along y and z.
//
// step.cu explains the arrays and what happens past the end of a sequence, block.cu explains `order`. Sums have a fixed
// order.

#include "../common.cuh"
#include "../cells/all.cuh"
#include "tile.cuh"
#include "exchange.cuh"
#include "time_loop.cuh"

// The sum of x over the lanes whose numbers differ by a multiple of LANES. All of them get it.
template <int LANES>
DEVICE float sum_over_lanes(float x) {
#pragma unroll
    for (int distance = LANES; distance < 32; distance *= 2) x += __shfl_xor_sync(0xffffffffu, x, distance);
    return x;
}

// ---- forward: every block receives all of h and multiplies it by the rows of its units.

template <int Q, typename T, int U, int KP, int S, int KREG, int R>
struct Gathered {
    static constexpr bool makes_ax = false;
    static constexpr int KS = KP / S, threads = U * S, lanes = U < 32 ? U : 32;
    static constexpr int P = threads / (U < 32 ? 32 : U);  // sums of the slices, after a warp has added its own
    static constexpr int row_size = S * (KS + 4);          // 4 numbers between slices avoid bank conflicts
    typedef Weights<T, Q, KS, KREG, R, threads> ThreadWeights;
    ThreadWeights weights;
    float* h_shared;    // [R, row_size]: h
    float* partial_sums;  // [P, Q, R, U]
    int H, s;

    DEVICE Gathered(float4* memory, const T* W_hh, int unit, int H_) : h_shared((float*)memory), H(H_), s(threadIdx.x / U) {
        partial_sums = h_shared + R * row_size;
        auto* w_shared = (typename ThreadWeights::vec4*)(partial_sums + P * Q * R * U);
        weights.template load<true>((typename ThreadWeights::vec4*)memory, w_shared, [&](int thread, int g, int k) {
            const int row = unit + thread % U, column = thread / U * KS + k;
            return load_vec4(W_hh + ((size_t)g * H + row) * H + column, 1, row < H ? H - column : 0, H % 4 == 0);
        });
        for (int i = threadIdx.x; i < R * row_size; i += threads) h_shared[i] = 0.0f;  // columns past H stay zero
        __syncthreads();
    }

    DEVICE static int offset(int r, int k) { return r * row_size + k / KS * (KS + 4) + k % KS; }

    template <typename Position>
    DEVICE void send(Exchange& channel, const Position& pos, int k, T h) const {
        const int r = threadIdx.x / U + k * S;
        if (r < R && pos.j < H) channel.send(pos.j * R + r, float(h));
    }

    DEVICE void next(Exchange& channel) const { channel.next(); }

    template <typename Position>
    DEVICE bool run(Exchange& channel, const Position&) {
        channel.template receive<threads>(
            0, R * H, [](int) { return true; }, [&](int i, float x) { h_shared[offset(i % R, i / R)] = x; });
        if (__syncthreads_or(channel.timed_out)) return false;
        float part[Q][R];
        weights.multiply(part, [&](int g, int r) { return (const float4*)(h_shared + r * row_size + s * (KS + 4)); });
#pragma unroll
        for (int g = 0; g < Q; g++) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float sum = sum_over_lanes<lanes>(part[g][r]);
                const int p = U < 32 ? threadIdx.x / 32 : s;
                if (U >= 32 || threadIdx.x % 32 < U) partial_sums[((p * Q + g) * R + r) * U + threadIdx.x % U] = sum;
            }
        }
        __syncthreads();
        return true;
    }

    DEVICE float add(float start, int k, int, int g) const {
        const float* from = partial_sums + threadIdx.x + k * S * U;
        float sum = 0.0f;
#pragma unroll
        for (int p = 0; p < P; p++) sum += from[(p * Q + g) * R * U];
        return start + sum;
    }
};

template <template <typename> class CellOf, typename T, int U, int KP, int S, int KREG, int R, int AT, bool MARKED = false>
__global__ void __launch_bounds__(U * S, 1) grid_forward(
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
    const unsigned* __restrict__ epoch,  // [1]  neither it nor the next tiles * T epochs occur in `words` yet
    const int poll_limit,               // of one wait
    unsigned long long* words,          // [groups, AT, 2, H*R]
    int* failed,                        // [1]
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,      // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    typedef Gathered<CellOf<float>::products, T, U, KP, S, KREG, R> Product;
    const int unit = blockIdx.y * U, d = blockIdx.x;
    Product product(memory, weight_hh + (size_t)d * CellOf<float>::products * H * H, unit, H);
    auto channel = [&](int k) {
        return Exchange(words, (d * gridDim.z + blockIdx.z) * AT + k, R * H, *epoch, poll_limit, failed);
    };
    const Forward<T> layer = {
        T_, B, H, W, (int)gridDim.x, save, mask_steps, bias_ih, bias_hh, own, mask, gates, h, others, output,
        {marks, reset_h, reset_others}};
    auto position = [&](int tile) { return TilePosition<U, S, R>(T_, B, H, tile, unit, d, reverse, lengths, order); };
    run_tiles<AT, R>(B, position, channel, RunForward<CellOf, MARKED, T, decltype(product)>{layer, product});
}

// ---- backward: a block multiplies its rows by its dgates, which gives its part of dh for all units. The block that owns a
// unit adds up the parts.

template <int Q, typename T, int U, int KP, int S, int KREG, int R>
struct Scattered {
    static constexpr bool loads_ahead = true;
    static constexpr int QUADS = KP / 4, threads = QUADS * S, OWNED = R * U;
    static constexpr int RS = (Q * U + 4 * S - 1) / (4 * S) * 4;  // rows of a slice
    static constexpr int lanes = OWNED < 32 ? OWNED : 32, P = threads / (OWNED < 32 ? 32 : OWNED);
    typedef Weights<T, 1, 4 * RS, 4 * KREG, R, threads> ThreadWeights;
    ThreadWeights weights;
    float* d_shared;    // [R, S * RS]: dgates of the block's rows
    float* partial_sums;  // [S, R, KP]
    float* sums;   // [2, P, OWNED]: in turn, as one tile's may still be read when another's are written
    int turn;      // which of the two this turn has
    int H, unit, quad, slice;

    DEVICE Scattered(float4* memory, const T* W_hh, int unit_, int H_)
        : d_shared((float*)memory), turn(0), H(H_), unit(unit_), quad(threadIdx.x % QUADS), slice(threadIdx.x / QUADS) {
        partial_sums = d_shared + R * S * RS;
        sums = partial_sums + S * R * KP;
        auto* w_shared = (typename ThreadWeights::vec4*)(sums + 2 * P * OWNED);
        weights.template load<false>((typename ThreadWeights::vec4*)memory, w_shared, [&](int thread, int g, int k) {
            const int i = thread / QUADS * RS + k / 4, u = unit + i % U, column = thread % QUADS * 4;
            const bool valid = i < Q * U && u < H;
            return load_vec4(W_hh + ((size_t)(i / U) * H + u) * H + column, 1, valid ? H - column : 0, H % 4 == 0);
        });
        for (int k = threadIdx.x; k < R * S * RS; k += threads) d_shared[k] = 0.0f;  // rows past the block's stay zero
        __syncthreads();
    }

    template <typename Position>
    DEVICE void stage(Exchange&, const Position& pos, int k, const T* dgates) {
        const int r = pos.s + k * (threads / U);
        if (r >= R) return;
#pragma unroll
        for (int g = 0; g < Q; g++) d_shared[r * S * RS + g * U + threadIdx.x % U] = float(dgates[g]);
    }

    DEVICE void next(Exchange& channel) {
        const int N = gridDim.y;
        __syncthreads();
        float4 part[R];
        weights.multiply_transposed(part, [&](int r) { return (const float4*)(d_shared + r * S * RS + slice * RS); });
#pragma unroll
        for (int r = 0; r < R; r++) *(float4*)(partial_sums + (slice * R + r) * KP + quad * 4) = part[r];
        __syncthreads();
#pragma unroll 1
        for (int r = 0; r < R; r++) {
            for (int k = threadIdx.x; k < H; k += threads) {
                float sum = 0.0f;
                for (int p = 0; p < S; p++) sum += partial_sums[(p * R + r) * KP + k];
                channel.send((k / U * N + blockIdx.y) * OWNED + r * U + k % U, sum);
            }
        }
        channel.next();
    }

    template <typename Position>
    DEVICE bool run(Exchange& channel, const Position&) {
        const int N = gridDim.y;
        float sum = 0.0f;  // all that a thread receives belongs to one number: OWNED divides the threads
        channel.template receive<threads>(
            blockIdx.y * N * OWNED, N * OWNED, [&](int i) { return unit + i % U < H; }, [&](int, float x) { sum += x; });
        sum = sum_over_lanes<lanes>(sum);
        turn ^= 1;
        if (OWNED >= 32 || threadIdx.x % 32 < OWNED) {
            sums[turn * P * OWNED + (OWNED < 32 ? threadIdx.x / 32 : threadIdx.x / OWNED) * OWNED + threadIdx.x % OWNED] = sum;
        }
        return !__syncthreads_or(channel.timed_out);
    }

    DEVICE float sum(int k, int) const {
        const int r = threadIdx.x / U + k * (threads / U);
        float sum = 0.0f;
        for (int p = 0; p < P && r < R; p++) sum += sums[(turn * P + p) * OWNED + r * U + threadIdx.x % U];
        return sum;
    }
};

template <template <typename> class CellOf, typename T, int U, int KP, int S, int KREG, int R, int AT, bool MARKED = false>
__global__ void __launch_bounds__(KP / 4 * S, 1) grid_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const int* __restrict__ order,    // [B]  or null
    const T* __restrict__ weight_hh,  // [D, Q*H, H]  aligned
    T* gates,                         // [D, T, B, W*H]  in: what forward saved; out: dgates
    const T* __restrict__ h,          // [D, T+1, B, H]
    const float* __restrict__ others,  // [D, S-1, T+1, B, H]  or null where the cell has none
    const float* __restrict__ own,    // [D, N, H]  or null where the cell has none
    const int mask_steps,             // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,    // [D, mask_steps, B, M*H]  or null where the cell draws none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    float* __restrict__ dh,           // [D, B, H]  in: of the last h; out: of the first
    float* __restrict__ dothers,      // [D, S-1, B, H]  likewise; or null where the cell has none
    const unsigned* __restrict__ epoch,  // [1]
    const int poll_limit,
    unsigned long long* words,        // [groups, AT, 2, N*N*R*U], N = gridDim.y
    int* failed,                      // [1]
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,    // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others,  // [D, S-1, B, H]  likewise; or null
    float* __restrict__ dreset_h,     // [D, B, H]  in, out: sums of gradients; or null
    float* __restrict__ dreset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    typedef Scattered<CellOf<float>::products, T, U, KP, S, KREG, R> Product;
    const int unit = blockIdx.y * U, d = blockIdx.x, N = gridDim.y;
    Product product(memory, weight_hh + (size_t)d * CellOf<float>::products * H * H, unit, H);
    auto channel = [&](int k) {
        return Exchange(words, (d * gridDim.z + blockIdx.z) * AT + k, N * N * R * U, *epoch, poll_limit, failed);
    };
    const Backward<T> layer = {T_, B, H, W, (int)gridDim.x, mask_steps, own, mask, gates, h, others, doutput, dh, dothers,
                               {marks, reset_h, reset_others, dreset_h, dreset_others}};
    auto position = [&](int tile) {
        return TilePosition<U, Product::threads / U, R>(T_, B, H, tile, unit, d, reverse, lengths, order);
    };
    run_tiles<AT, R>(B, position, channel, RunBackward<CellOf, MARKED, T, decltype(product)>{layer, product});
}
