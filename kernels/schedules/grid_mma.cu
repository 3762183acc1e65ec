// Schedule `grid` on tensor cores: a group of thread blocks runs the whole time loop of R sequences of one direction. Each
// block owns U units, their recurrent weights and their states. The blocks exchange numbers through L2 once a step: forward
// the new h, backward dgates.
//
//     grid_mma_forward<lstm, __half, 16, 768, 24, 8, 1, 1, 1>      U 16, KP 768, HELD 24, R 8, P 1, AT 1, PARTS 1
//
//     U     units of a block: 8, 16 or 32; a group is gridDim.y blocks
//     KP    H rounded up to a multiple of 128
//     HELD  tiles of weights (tensor.cuh) that a warp holds in registers; the others are in shared memory
//     R     sequences of a tile, a power of two up to 16; they are columns of a product that has 8 or 16
//     P     blocks that share a multiprocessor, 1 or 2. Two belong to different groups: one computes while the other waits
//     AT    tiles that a group has at once, 1 or 2. It computes one while the numbers of the other are on their way
//     PARTS 1: numbers are multiplied as they are stored, float as tf32. 3: float as three bfloat16 numbers (tensor.cuh)
//
// A product is W h (forward; its rows are the block's gates) or W^T dgates (backward; its rows are the block's units). The
// 8 warps share its columns, and each warp waits only for the numbers of its own columns. These lie in L2 in the order in
// which a lane needs them, two neighbouring 16-bit numbers or one float in a word, so that they go from L2 through registers
// into the tensor cores. A float is sent whole: its thirds would be half as many bytes again, and only one warp of a block
// needs it, which splits it. Weights are split before the first step: to split them in each would take more instructions
// than to multiply them. The warps' sums are added up through shared memory, in a fixed order. Groups, tiles and arrays are as
// in grid.cu.

#include "../common.cuh"
#include "../cells/all.cuh"
#include "tile.cuh"
#include "tensor.cuh"
#include "exchange.cuh"
#include "time_loop.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// ---- M rows by 16 K columns of weights, times 16 K numbers of R sequences; K is a multiple of WARPS
//
// A group is 16 columns, and a warp has K / WARPS neighbouring groups. Of a group, lane l loads the 4 numbers from 4 (l%4)
// on of the sequence in column l/4, in words of one float or two 16-bit numbers. Two words make a fragment of B, and so do two
// words of thirds. The tensor cores take them for other rows of B than they are; that is right, as the columns of A are in the
// same order.
template <typename T, int M, int K, int HELD, int R, int P, int PARTS>
struct WarpProduct {
    static_assert(PARTS == 1 || (PARTS == 3 && sizeof(T) == 4), "only a float has thirds");
    static constexpr int N = (R + 7) / 8, MT = (M + 15) / 16, KT = K / WARPS;
    static constexpr int WORDS = sizeof(T), F = PARTS == 3 ? 3 : WORDS / 2;  // words of a lane, and fragments of a group
    // independent sums of one product, to hide latency
    static constexpr int chains = MT * (PARTS == 3 ? N : 1) >= 4 ? 1 : MT > 1 ? 2 : 4;
    static constexpr int stride = 16 * MT + 4;  // from one column of sums to the next: avoids bank conflicts
    static constexpr int batch = (PARTS == 3 ? 4 : 8) / (N * P);  // groups that are loaded at once
    static constexpr int partial_sums_size = WARPS * 8 * N * stride;
    static constexpr int slot_words = K * N * 32 * WORDS;  // words of the exchange
    typedef Fragments<MT * KT * F, HELD, THREADS> WarpWeights;
    WarpWeights weights;
    float* partial_sums;  // [WARPS, 8 N, stride]
    float sums[MT][N][chains][4], high[PARTS == 3 ? MT : 1][N][4];
    int warp, lane;

    // four(i, group, k): of row i, the columns of a group from k on; 0 where there are none.
    template <typename Four>
    DEVICE WarpProduct(float4* memory, Four four)
        : partial_sums((float*)memory), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
        weights.load((uint4*)memory, (uint4*)(partial_sums + partial_sums_size), [&](int tile) {
            const int i = tile / F % MT * 16 + lane / 4, group = warp * KT + tile / F / MT, k = lane % 4 * 4;
            return fragment<PARTS>(four(i, group, k), four(i + 8, group, k), tile % F);
        });
        __syncthreads();
    }

    // Which sequence of the tile is in a column, and the reverse. Two sequences that a warp sums together are 4 columns
    // apart, to avoid bank conflicts.
    DEVICE static int sequence(int column) { return column % 4 * 2 + column / 4; }
    DEVICE static int column(int r) { return r / 8 * 8 + r % 2 * 4 + r % 8 / 2; }

    // Where number k of a group, of sequence r, lies in a slot.
    DEVICE static int offset(int group, int r, int k) { return ((group * N + r / 8) * 8 + column(r) % 8) * 16 + k; }

    // sums = the product with what the other blocks send for the first `sequences` of the tile. units(group): how many
    // numbers of a group exist.
    template <typename Channel, typename Units>
    DEVICE void receive(Channel& channel, int sequences, Units units) {
#pragma unroll
        for (int i = 0; i < MT * N * chains * 4; i++) (&sums[0][0][0][0])[i] = 0.0f;
#pragma unroll
        for (int i = 0; i < MT * N * 4 && PARTS == 3; i++) (&high[0][0][0])[i] = 0.0f;
        channel.acquire();
        // The words of a batch are asked for before those of the batch before it are waited for: all of them, as branches would
        // cost more than words that nobody sends.
        constexpr int together = KT < batch ? KT : batch, COUNT = together * N;
        const int k = lane % 4 * 4;
        unsigned both[2][COUNT][WORDS];
        auto load = [&](int from) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                const int place = (((warp * KT + from) * N + i) * 32 + lane) * WORDS;
                if (from + i / N < KT) channel.load(both[from / batch % 2][i], place);
            }
        };
        load(0);
#pragma unroll
        for (int from = 0; from < KT; from += batch) {
            const int group = warp * KT + from;
            auto& words = both[from / batch % 2];
            if (from + batch < KT) load(from + batch);
            bool empty = false;  // one comparison a word; who has to look closer is late anyhow, or at the edge of H or B
#pragma unroll
            for (int i = 0; i < COUNT * WORDS; i++) {
                if (from + i / WORDS / N < KT) empty = empty || words[i / WORDS][i % WORDS] == Channel::EMPTY;
            }
            if (empty) {
                // Hidden from the compiler, which would otherwise keep all that follows from them in registers.
                int first = k, column = sequence(lane / 4);
                asm volatile("" : "+r"(first), "+r"(column));
                auto sent = [&](int i, int w) {
                    return i % N * 8 + column < sequences && first + w * Fragment<T>::P < units(group + i / N);
                };
                for (int polls = 0; !channel.timed_out; polls++) {  // all words again: to choose some would take registers
                    bool late = false;
#pragma unroll
                    for (int i = 0; i < COUNT * WORDS; i++) {
                        const bool is_empty = words[i / WORDS][i % WORDS] == Channel::EMPTY;
                        if (from + i / WORDS / N < KT) late = late || (is_empty && sent(i / WORDS, i % WORDS));
                    }
                    if (!late) break;
                    channel.count(polls);
                    load(from);
                }
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
#pragma unroll
                    for (int w = 0; w < WORDS; w++) words[i][w] = sent(i, w) ? words[i][w] : 0;
                }
            }
            __syncwarp();
#pragma unroll
            for (int q = 0; q < together; q++) {
                if (from + q >= KT) continue;
                if constexpr (PARTS == 3) multiply_thirds(from + q, words + q * N);
#pragma unroll
                for (int f = 0; f < F && PARTS == 1; f++) {
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        const uint4 a = weights.get(((from + q) * MT + m) * F + f);
#pragma unroll
                        for (int n = 0; n < N; n++) {
                            const unsigned* b = words[q * N + n] + 2 * f;
                            mma(sums[m][n][((from + q) * F + f) % chains], a, make_uint2(b[0], b[1]), T());
                        }
                    }
                }
            }
        }
    }

    // Adds the products of the warp's k-th group with a lane's words of N columns of floats.
    DEVICE void multiply_thirds(int k, const unsigned (*words)[WORDS]) {
        uint2 b[N][3];
#pragma unroll
        for (int n = 0; n < N; n++) {
            unsigned thirds[2][3];
#pragma unroll
            for (int w = 0; w < 2; w++) {
                split(thirds[w], __uint_as_float(words[n][2 * w]), __uint_as_float(words[n][2 * w + 1]));
            }
#pragma unroll
            for (int p = 0; p < 3; p++) b[n][p] = make_uint2(thirds[0][p], thirds[1][p]);
        }
#pragma unroll
        for (int m = 0; m < MT; m++) {
            const int tile = (k * MT + m) * F;
            const uint4 a[3] = {weights.get(tile), weights.get(tile + 1), weights.get(tile + 2)};
#pragma unroll
            for (int n = 0; n < N; n++) mma_thirds(high[m][n], sums[m][n][k % chains], a, b[n]);
        }
    }

    // Stores the warps' sums where every thread finds them.
    DEVICE void store_sums() {
#pragma unroll
        for (int m = 0; m < MT; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float sum = sums[m][n][0][i];
#pragma unroll
                    for (int k = 1; k < chains; k++) sum += sums[m][n][k][i];
                    if (PARTS == 3) sum = join_thirds(high[m][n][i], sum);
                    const int col = n * 8 + lane % 4 * 2 + i % 2;
                    partial_sums[(warp * 8 * N + col) * stride + m * 16 + lane / 4 + i / 2 * 8] = sum;
                }
            }
        }
    }

    // Past the last sequence it is that of some other one: a branch here would keep the loads of several sums apart.
    DEVICE float sum(int row, int r) const {
        const float* from = partial_sums + column(r < R ? r : R - 1) * stride + row;
        float part[WARPS];
#pragma unroll
        for (int p = 0; p < WARPS; p++) part[p] = from[p * 8 * N * stride];
#pragma unroll
        for (int step = 1; step < WARPS; step *= 2) {
#pragma unroll
            for (int p = 0; p < WARPS; p += 2 * step) part[p] += part[p + step];
        }
        return part[0];
    }

    // Sends x of this thread's k-th sequence as the thread's i-th word: number pos.j, counted from the beginning of
    // `group`. All lanes of a warp call this together.
    template <typename Channel, typename Position>
    DEVICE static void send(Channel& channel, const Position& pos, int k, int i, int group, float x) {
        const int number = offset(group + pos.j / 16, pos.s + k * Position::slices, pos.j % 16);
        if constexpr (F == 1) {
            const float next = __shfl_down_sync(0xffffffffu, x, 1);
            if (pos.j % 2 == 0 && pos.sequence[k] >= 0) channel.send(i, number / 2, pack(T(x), T(next)));
        } else if (pos.sequence[k] >= 0) {
            channel.send(i, number, PARTS == 3 ? __float_as_uint(x) : tf32(x));
        }
    }
};

// ---- forward

template <int Q, typename T, int U, int KP, int HELD, int R, int P, int PARTS>
struct Gathered {
    static constexpr bool makes_ax = false;
    typedef WarpProduct<T, Q * U, KP / 16, HELD, R, P, PARTS> Inner;
    Inner inner;
    int H;

    DEVICE Gathered(float4* memory, const T* W_hh, int unit, int H_)
        : inner(memory, [&](int i, int group, int k) {
              const int u = unit + i % U, column = group * 16 + k;
              const int count = i < Q * U && u < H_ ? H_ - column : 0;
              return load_vec4(W_hh + ((size_t)(i / U) * H_ + u) * H_ + column, 1, count, H_ % 4 == 0);
          }), H(H_) {}

    template <typename Channel, typename Position>
    DEVICE void send(Channel& channel, const Position& pos, int k, T h) const {
        Inner::send(channel, pos, k, k, 0, float(h));
    }

    template <typename Channel>
    DEVICE void next(Channel& channel) const { channel.next(); }

    template <typename Channel, typename Position>
    DEVICE bool run(Channel& channel, const Position& pos) {
        inner.receive(channel, pos.count, [&](int group) { return H - group * 16; });
        if (__syncthreads_or(channel.timed_out)) return false;
        inner.store_sums();
        __syncthreads();
        return true;
    }

    DEVICE float add(float start, int k, int, int g) const {
        return start + inner.sum(g * U + threadIdx.x % U, threadIdx.x / U + k * (THREADS / U));
    }
};

template <template <typename> class CellOf, typename T, int U, int KP, int HELD, int R, int P, int AT, int PARTS,
          bool MARKED = false>
__global__ void __launch_bounds__(THREADS, P) grid_mma_forward(
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
    unsigned* words,                    // [groups, AT, 32, slot] of WarpProduct, aligned; all bits set
    int* failed,                        // [1]
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,      // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    const int unit = blockIdx.y * U, d = blockIdx.x;
    Gathered<CellOf<float>::products, T, U, KP, HELD, R, P, PARTS> product(
        memory, weight_hh + (size_t)d * CellOf<float>::products * H * H, unit, H);
    typedef TilePosition<U, THREADS / U, R> Position;
    const Forward<T> layer = {
        T_, B, H, W, (int)gridDim.x, save, mask_steps, bias_ih, bias_hh, own, mask, gates, h, others, output,
        {marks, reset_h, reset_others}};
    typedef Ring<Position::per_thread> Channel;
    auto channel = [&](int k) {
        return Channel(words, (d * gridDim.z + blockIdx.z) * AT + k, product.inner.slot_words, poll_limit, failed);
    };
    auto position = [&](int tile) { return Position(T_, B, H, tile, unit, d, reverse, lengths, order); };
    run_tiles<AT, R>(B, position, channel, RunForward<CellOf, MARKED, T, decltype(product)>{layer, product});
}

// ---- backward: the mirror. The rows are the block's units, the columns are the rows of W_hh, gate by gate.

template <int Q, typename T, int U, int KP, int HELD, int R, int P, int PARTS>
struct Returned {
    static constexpr bool loads_ahead = true;
    static constexpr int gate = KP / 16;  // groups of one gate
    typedef WarpProduct<T, U, Q * gate, HELD, R, P, PARTS> Inner;
    Inner inner;
    int H;

    DEVICE Returned(float4* memory, const T* W_hh, int unit, int H_)
        : inner(memory, [&](int i, int group, int k) {
              const int u = unit + i, row = group % gate * 16 + k;
              const int count = i < U && u < H_ ? H_ - row : 0;
              return load_vec4(W_hh + ((size_t)(group / gate) * H_ + row) * H_ + u, H_, count, false);
          }), H(H_) {}

    template <typename Channel, typename Position>
    DEVICE void stage(Channel& channel, const Position& pos, int k, const T* dgates) {
#pragma unroll
        for (int g = 0; g < Q; g++) Inner::send(channel, pos, k, k * Q + g, g * gate, float(dgates[g]));
    }

    template <typename Channel>
    DEVICE void next(Channel& channel) const { channel.next(); }

    template <typename Channel, typename Position>
    DEVICE bool run(Channel& channel, const Position& pos) {
        inner.receive(channel, pos.count, [&](int group) { return H - group % gate * 16; });
        if (__syncthreads_or(channel.timed_out)) return false;
        inner.store_sums();
        __syncthreads();
        return true;
    }

    DEVICE float sum(int k, int) const { return inner.sum(threadIdx.x % U, threadIdx.x / U + k * (THREADS / U)); }
};

template <template <typename> class CellOf, typename T, int U, int KP, int HELD, int R, int P, int AT, int PARTS,
          bool MARKED = false>
__global__ void __launch_bounds__(THREADS, P) grid_mma_backward(
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
    unsigned* words,                  // [groups, AT, 32, slot] of WarpProduct, aligned; all bits set
    int* failed,                      // [1]
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,    // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others,  // [D, S-1, B, H]  likewise; or null
    float* __restrict__ dreset_h,     // [D, B, H]  in, out: sums of gradients; or null
    float* __restrict__ dreset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    const int unit = blockIdx.y * U, d = blockIdx.x;
    Returned<CellOf<float>::products, T, U, KP, HELD, R, P, PARTS> product(
        memory, weight_hh + (size_t)d * CellOf<float>::products * H * H, unit, H);
    typedef TilePosition<U, THREADS / U, R> Position;
    constexpr int words_sent = Position::per_thread * CellOf<float>::products;
    const Backward<T> layer = {T_, B, H, W, (int)gridDim.x, mask_steps, own, mask, gates, h, others, doutput, dh, dothers,
                               {marks, reset_h, reset_others, dreset_h, dreset_others}};
    typedef Ring<words_sent> Channel;
    auto channel = [&](int k) {
        return Channel(words, (d * gridDim.z + blockIdx.z) * AT + k, product.inner.slot_words, poll_limit, failed);
    };
    auto position = [&](int tile) { return Position(T_, B, H, tile, unit, d, reverse, lengths, order); };
    run_tiles<AT, R>(B, position, channel, RunBackward<CellOf, MARKED, T, decltype(product)>{layer, product});
}
