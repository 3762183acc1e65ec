// Schedule `block` on tensor cores, for 16-bit storage and for float as tf32: one thread block runs the whole time loop
// of 8 N sequences of one direction.
//
//     block_mma_forward<lstm, __half, 128, 32, 1, 0, true>     HP 128, HELD 32, N 1, IP 0, EVEN
//
//     HP    H rounded up to a multiple of 32; warp w of HP / 16 owns units 16 w .. 16 w + 15
//     HELD  tiles of 16 x K weights (tensor.cuh) that a warp holds in registers; the others are in shared memory
//     N     groups of 8 sequences that share each tile
//     IP    I rounded up to a multiple of K, if this kernel multiplies W_ih x itself: x adds columns to h, W_ih adds tiles;
//           0: `gates` holds ax
//     EVEN  whether H is even, so that neighbours are loaded and stored together
//
// A product is W h (forward) or W^T dgates (backward) with 8 sequences as columns. All gates of a unit are in one lane, so
// a lane computes the cell from its own sums. Lane l has units 16 w + 2 (l/4) + 0, 1 of sequences 2 (l%4) + 0, 1 of each
// group: rows l/4 and l/4 + 8 of a tile are neighbouring units. c, dh, dc stay in registers. The operand of the product has
// two buffers, so a step needs one barrier. step.cu explains the arrays and what happens past the end of a sequence,
// block.cu explains `order`.

#include "../common.cuh"
#include "../cells/all.cuh"
#include "words.cuh"
#include "tensor.cuh"
#include "time_loop.cuh"

// A lane's part of a tile from column k on, whose rows l/4 and l/4 + 8 are units j and j + 1. weights(unit, column) is one
// word.
template <typename T, typename Weights>
DEVICE uint4 tile_of(int j, int k, Weights weights) {
    const int second_half = k + Fragment<T>::K / 2;
    return make_uint4(weights(j, k), weights(j + 1, k), weights(j, second_half), weights(j + 1, second_half));
}

// ---- a lane's position: units j and j + 1 of two sequences of each group

template <int HP, int N, bool EVEN>
struct LanePosition {
    static constexpr int per_thread = 2 * N, units = 2;
    static constexpr int warps = HP / 16, apart = 4, working = warps;  // as means.cuh has them
    static constexpr bool even = EVEN;
    template <typename T> using Stored = typename Pair<T>::stored;
    int lane, j, d, longest;
    bool reversed;
    int sequence[per_thread];  // index in the batch, or -1
    int length[per_thread];    // 0 where there is none

    DEVICE LanePosition(int T_, int B, int H, int reverse, const int* lengths, const int* order) {
        lane = threadIdx.x % 32;
        j = threadIdx.x / 32 * 16 + lane / 4 * 2;
        d = blockIdx.z;
        reversed = reverse >> d & 1;
        longest = 0;
        for (int r = 0; r < 8 * N; r++) {
            const int rank = blockIdx.x * 8 * N + r;
            if (rank >= B) break;
            const int steps = lengths ? lengths[order ? order[rank] : rank] : T_;
            longest = steps > longest ? steps : longest;
        }
#pragma unroll
        for (int n = 0; n < per_thread; n++) {
            const int rank = blockIdx.x * 8 * N + column(n);
            const bool valid = rank < B && j < H;
            sequence[n] = !valid ? -1 : order ? order[rank] : rank;
            length[n] = !valid ? 0 : lengths ? lengths[sequence[n]] : T_;
        }
    }

    // The column of sequence n in the tile.
    DEVICE int column(int n) const { return n / 2 * 8 + lane % 4 * 2 + n % 2; }

    // Whether unit j + u exists, given that unit j does.
    DEVICE bool has(int u, int H) const { return EVEN || u == 0 || j + 1 < H; }

    // The numbers of both units. Past H the second is loaded as 0 and not stored.
    template <typename T>
    DEVICE Stored<T> load(const T* from, int H) const {
        if (EVEN) return load_pair(from);
        return pack(from[0], has(1, H) ? from[1] : T(0.0f));
    }
    template <typename T>
    DEVICE static float number(Stored<T> stored, int u, T) { return u ? unpack(stored, T()).y : unpack(stored, T()).x; }
    template <typename T> DEVICE static Stored<T> stored(const float (&x)[2], T) { return pack(T(x[0]), T(x[1])); }
    template <typename T>
    DEVICE void store(T* to, Stored<T> stored, int H) const {
        if (EVEN) return store_pair(to, stored);
        to[0] = ((const T*)&stored)[0];
        if (has(1, H)) to[1] = ((const T*)&stored)[1];
    }
};

// ---- the input: x, COLUMNS numbers of each sequence of a tile, loaded a step ahead

template <typename T, int COLUMNS, int ROWS, int THREADS>
struct InputPrefetch {
    static constexpr int per_thread = (ROWS * COLUMNS + THREADS - 1) / THREADS;
    const T* x;
    int I, B;
    int sequence[per_thread];  // whose number of x this thread loads, or -1
    T next[per_thread];

    DEVICE static int place(int e) { return threadIdx.x + e * THREADS; }

    DEVICE void start(int I_, int B_, const T* x_, const int* order) {
        x = x_, I = I_, B = B_;
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const int rank = blockIdx.x * ROWS + place(e) / COLUMNS;
            const bool valid = place(e) < ROWS * COLUMNS && rank < B && place(e) % COLUMNS < I;
            sequence[e] = !valid ? -1 : order ? order[rank] : rank;
        }
    }

    DEVICE void prefetch(int t) {
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const long long n = skip((long long)t * B * I + place(e) % COLUMNS, sequence[e], I);
            next[e] = sequence[e] >= 0 ? x[n] : T(0.0f);
        }
    }

    // to: the first row; stride: from one row to the next.
    DEVICE void commit(T* to, int stride) const {
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const int k = place(e);
            if (k < ROWS * COLUMNS) store_operand(to + k / COLUMNS * stride + k % COLUMNS, next[e]);
        }
    }
};

template <typename T, int ROWS, int THREADS>
struct InputPrefetch<T, 0, ROWS, THREADS> {  // `gates` holds ax
    DEVICE void start(int, int, const T*, const int*) {}
    DEVICE void prefetch(int) {}
    DEVICE void commit(T*, int) const {}
};

// ---- forward

template <typename Cell, typename T, int HP, int HELD, int N, int IP>
struct Gathered {
    static constexpr bool makes_ax = IP > 0;
    static constexpr int K = Fragment<T>::K, P = Fragment<T>::P, ROW = Fragment<T>::row;
    static constexpr int G = Cell::gates, Q = Cell::products;
    static constexpr int KT = HP / K, XT = IP / K, threads = HP * 2, x_columns = (XT + 1) / 2 * 2 * K;
    static constexpr int stride = HP + x_columns + ROW, buffer_size = 8 * N * stride;  // 16 bytes avoid bank conflicts
    static constexpr int SUMS = sums_of<Cell>(makes_ax);
    static constexpr int chains = Q == 1 ? 4 : 1;  // independent sums of one product, to hide latency
    Fragments<Q * KT + G * XT, HELD, threads> weights;  // of each K columns of h, then of each K columns of x
    InputPrefetch<T, x_columns, 8 * N, threads> input;
    T* hx_shared;  // [2, 8 N, stride]: h, x
    int reads;     // offset of the buffer that the next product reads
    float sums[N][SUMS][chains][4];

    template <typename Position>
    DEVICE Gathered(const Position& pos, uint4* memory, const T* W_hh, const T* W_ih, int I, int H, int B, const T* x,
                    const int* order) : hx_shared((T*)memory), reads(buffer_size) {
        const int j = pos.j;
        weights.load(memory, memory + 2 * buffer_size * sizeof(T) / 16, [&](int tile) {
            if (IP && tile >= Q * KT) {
                const int g = (tile - Q * KT) % G, k = (tile - Q * KT) / G * K + pos.lane % 4 * P;
                return tile_of<T>(j, k, [&](int unit, int column) {
                    const T* from = W_ih + ((size_t)g * H + unit) * I + column;
                    return word<T>([&](int i) { return unit < H && column + i < I ? from[i] : T(0.0f); });
                });
            }
            const int g = tile % Q, k = tile / Q * K + pos.lane % 4 * P;
            return tile_of<T>(j, k, [&](int unit, int column) {
                const T* from = W_hh + ((size_t)g * H + unit) * H + column;
                if (Position::even) return unit < H && column < H ? load_word(from) : 0u;
                return word<T>([&](int i) { return unit < H && column + i < H ? from[i] : T(0.0f); });
            });
        });
        input.start(I, B, x, order);
    }

    template <typename Position>
    DEVICE void send(Alone&, const Position& pos, int k, typename Pair<T>::stored h) const {
        store_operands(hx_shared + (buffer_size - reads) + pos.column(k) * stride + pos.j, h);
    }

    DEVICE void prefetch(int t) { input.prefetch(t); }

    DEVICE void next(Alone&) {
        reads = buffer_size - reads;
        input.commit(hx_shared + reads + HP, stride);
        __syncthreads();
    }

    template <typename Position>
    DEVICE bool run(Alone&, const Position& pos) {
        const T* operands = hx_shared + reads + pos.lane % 8 * stride + pos.lane / 8 * ROW;
#pragma unroll
        for (int i = 0; i < N * SUMS * chains * 4; i++) (&sums[0][0][0][0])[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < KT + XT; k += 2) {
            uint4 operand[N];
#pragma unroll
            for (int m = 0; m < N; m++) operand[m] = load_matrices(operands + m * 8 * stride + k * K);
#pragma unroll
            for (int g = 0; g < (k < KT ? Q : G); g++) {
                const int to = k >= KT && g >= first_apart<Cell> ? Q + g - first_apart<Cell> : g;
                const bool last = k + 1 == KT + XT;
                const int tile = k < KT ? k * Q + g : Q * KT + (k - KT) * G + g;
                const uint4 weight = weights.get(tile), next = weights.get(last ? tile : tile + (k < KT ? Q : G));
#pragma unroll
                for (int m = 0; m < N; m++) {
                    mma(sums[m][to][k % chains], weight, make_uint2(operand[m].x, operand[m].y), T());
                    if (!last) mma(sums[m][to][(k + 1) % chains], next, make_uint2(operand[m].z, operand[m].w), T());
                }
            }
        }
        return true;
    }

    DEVICE float add(float sum, int n, int u, int g) const {
#pragma unroll
        for (int k = 0; k < chains; k++) sum += sums[n / 2][g][k][u * 2 + n % 2];
        return sum;
    }
};

template <template <typename> class CellOf, typename T, int HP, int HELD, int N, int IP, bool EVEN, bool MARKED = false>
__global__ void __launch_bounds__(HP * 2, 1) block_mma_forward(
    const int T_,
    const int B,
    const int H,
    const int I,
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
    const T* __restrict__ weight_ih,    // [D, G*H, I]  or null where IP is 0
    const T* __restrict__ x,            // [T, B, I]  likewise; or null
    T* gates,                           // [D, T, B, W*H]  aligned; in: ax where IP is 0; out: what the cell saves; or null
    T* h,                               // [D, T+1, B, H]  aligned; in: the first slot; out: the others
    float* others,                      // [D, S-1, T+1 or 2, B, H]  likewise; or null where the cell has none
    T* __restrict__ output,             // [T, B, D*H]  aligned
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,      // [D, B, H]  aligned; what a reset gives; or null
    const float* __restrict__ reset_others)  // [D, S-1, B, H]  aligned; likewise; or null
{
    extern __shared__ uint4 memory[];
    typedef CellOf<float> Cell;
    typedef LanePosition<HP, N, EVEN> Position;
    const Position pos(T_, B, H, reverse, lengths, order);
    Gathered<Cell, T, HP, HELD, N, IP> product(
        pos, memory + vectors_of_means<Position, HP * 2>(Cell::means), weight_hh + (size_t)pos.d * Cell::products * H * H,
        weight_ih + (size_t)pos.d * Cell::gates * H * I, I, H, B, x, order);
    Alone channel = {(float*)memory};
    const Forward<T> layer = {
        T_, B, H, W, (int)gridDim.z, save, mask_steps, bias_ih, bias_hh, own, mask, gates, h, others, output,
        {marks, reset_h, reset_others}};
    time_loop_forward<CellOf, MARKED>(layer, pos, channel, product);
}

// ---- backward: the mirror. A tile's rows are columns of W_hh, its columns are K rows of one gate.

template <int Q, typename T, int HP, int HELD, int N>
struct Returned {
    static constexpr int K = Fragment<T>::K, P = Fragment<T>::P, ROW = Fragment<T>::row;
    static constexpr int KT = Q * HP / K, threads = HP * 2, stride = Q * HP + ROW, buffer_size = 8 * N * stride;
    static constexpr bool loads_ahead = N == 1 && sizeof(T) == 2 && threads <= 256;
    Fragments<KT, HELD, threads> weights;
    T* d_shared;  // [2, 8 N, stride]: dgates
    int staged;   // offset of the buffer of this step
    float sums[N][4][4];

    template <typename Position>
    DEVICE Returned(const Position& pos, uint4* memory, const T* W_hh, int H) : d_shared((T*)memory), staged(0) {
        weights.load(memory, memory + 2 * buffer_size * sizeof(T) / 16, [&](int tile) {
            const int g = tile / (HP / K), k = tile % (HP / K) * K + pos.lane % 4 * P;
            return tile_of<T>(pos.j, k, [&](int unit, int row) {
                const T* from = W_hh + ((size_t)g * H + row) * H + unit;
                return word<T>([&](int i) { return unit < H && row + i < H ? from[(size_t)i * H] : T(0.0f); });
            });
        });
    }

    template <typename Position, int D>
    DEVICE void stage(Alone&, const Position& pos, int k, const typename Pair<T>::stored (&dgates)[D]) const {
#pragma unroll
        for (int g = 0; g < Q; g++) {
            store_operands(d_shared + staged + pos.column(k) * stride + g * HP + pos.j, dgates[g]);
        }
    }

    DEVICE void next(Alone&) const {}

    template <typename Position>
    DEVICE bool run(Alone&, const Position& pos) {
        const T* operands = d_shared + staged + pos.lane % 8 * stride + pos.lane / 8 * ROW;
        staged = buffer_size - staged;
        __syncthreads();
#pragma unroll
        for (int i = 0; i < N * 16; i++) (&sums[0][0][0])[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < KT; k += 2) {
            const uint4 weight = weights.get(k), next_weight = weights.get(k + 1);
#pragma unroll
            for (int m = 0; m < N; m++) {
                const uint4 operand = load_matrices(operands + m * 8 * stride + k * K);
                mma(sums[m][k % 4], weight, make_uint2(operand.x, operand.y), T());
                mma(sums[m][(k + 1) % 4], next_weight, make_uint2(operand.z, operand.w), T());
            }
        }
        return true;
    }

    DEVICE float sum(int n, int u) const {
        const int i = u * 2 + n % 2;
        return sums[n / 2][0][i] + sums[n / 2][1][i] + (sums[n / 2][2][i] + sums[n / 2][3][i]);
    }
};

template <template <typename> class CellOf, typename T, int HP, int HELD, int N, bool EVEN, bool MARKED = false>
__global__ void __launch_bounds__(HP * 2, 1) block_mma_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const int* __restrict__ order,    // [B]  or null
    const T* __restrict__ weight_hh,  // [D, Q*H, H]  aligned
    T* gates,                         // [D, T, B, W*H]  aligned; in: what forward saved; out: dgates
    const T* __restrict__ h,          // [D, T+1, B, H]  aligned
    const float* __restrict__ others,  // [D, S-1, T+1, B, H]  aligned; or null where the cell has none
    const float* __restrict__ own,    // [D, N, H]  or null where the cell has none
    const int mask_steps,             // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,    // [D, mask_steps, B, M*H]  or null where the cell draws none
    const T* __restrict__ doutput,    // [T, B, D*H]  aligned; or null
    float* __restrict__ dh,           // [D, B, H]  in: of the last h; out: of the first
    float* __restrict__ dothers,      // [D, S-1, B, H]  likewise; or null where the cell has none
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,    // [D, B, H]  aligned; what a reset gives; or null
    const float* __restrict__ reset_others,  // [D, S-1, B, H]  aligned; likewise; or null
    float* __restrict__ dreset_h,     // [D, B, H]  in, out: sums of gradients; or null
    float* __restrict__ dreset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ uint4 memory[];
    typedef CellOf<float> Cell;
    typedef LanePosition<HP, N, EVEN> Position;
    constexpr int Q = Cell::products;
    const Position pos(T_, B, H, reverse, lengths, order);
    Returned<Q, T, HP, HELD, N> product(
        pos, memory + vectors_of_means<Position, HP * 2>(Cell::back_means), weight_hh + (size_t)pos.d * Q * H * H, H);
    Alone channel = {(float*)memory};
    const Backward<T> layer = {T_, B, H, W, (int)gridDim.z, mask_steps, own, mask, gates, h, others, doutput, dh, dothers,
                               {marks, reset_h, reset_others, dreset_h, dreset_others}};
    time_loop_backward<CellOf, MARKED>(layer, pos, channel, product);
}
