// Schedule `block` on tensor cores, for 16-bit storage and for float as tf32: one thread block runs the whole time loop
// of 8 N sequences of one direction.
//
//     block_mma_forward<LstmCell, __half, 128, 32, 1, 0, true>     HP 128, HELD 32, N 1, IP 0, EVEN
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
#include "words.cuh"
#include "tensor.cuh"
#include "../cells/all.cuh"

// A lane's part of a tile from column k on, whose rows l/4 and l/4 + 8 are units j and j + 1. weights(unit, column) is one
// word.
template <typename T, typename Weights>
DEVICE uint4 tile_of(int j, int k, Weights weights) {
    const int second_half = k + Fragment<T>::K / 2;
    return make_uint4(weights(j, k), weights(j + 1, k), weights(j, second_half), weights(j + 1, second_half));
}

// ---- a lane's position: units j and j + 1 of two sequences of each group

template <int N, bool EVEN>
struct LanePosition {
    static constexpr int per_thread = 2 * N;
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
    DEVICE float2 load_pair(const T* from, int H) const {
        if (EVEN) return ::load_pair(from);
        return make_float2(float(from[0]), has(1, H) ? float(from[1]) : 0.0f);
    }
    template <typename T>
    DEVICE void store_pair(T* to, float a, float b, int H) const {
        if (EVEN) {
            ::store_pair(to, a, b);
        } else {
            to[0] = T(a);
            if (has(1, H)) to[1] = T(b);
        }
    }
};

// ---- the input: x, COLUMNS numbers of each sequence of a tile, loaded a step ahead

template <typename T, int COLUMNS, int ROWS, int THREADS>
struct InputPrefetch {
    static constexpr int per_thread = (ROWS * COLUMNS + THREADS - 1) / THREADS;
    const T* from[per_thread];  // the numbers of x at t = 0 that this thread loads, or null
    T next[per_thread];
    size_t step;  // from one t to the next

    DEVICE InputPrefetch(int I, int B, const T* x, const int* order) {
        step = (size_t)B * I;
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const int k = threadIdx.x + e * THREADS, rank = blockIdx.x * ROWS + k / COLUMNS, i = k % COLUMNS;
            const bool valid = k < ROWS * COLUMNS && rank < B && i < I;
            from[e] = valid ? x + (size_t)(order ? order[rank] : rank) * I + i : nullptr;
        }
    }

    DEVICE void prefetch(int t) {
#pragma unroll
        for (int e = 0; e < per_thread; e++) next[e] = from[e] ? from[e][t * step] : T(0.0f);
    }

    // to: the first row; stride: from one row to the next.
    DEVICE void commit(T* to, int stride) const {
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const int k = threadIdx.x + e * THREADS;
            if (k < ROWS * COLUMNS) store_operand(to + k / COLUMNS * stride + k % COLUMNS, next[e]);
        }
    }
};

template <typename T, int ROWS, int THREADS>
struct InputPrefetch<T, 0, ROWS, THREADS> {  // `gates` holds ax
    DEVICE InputPrefetch(int, int, const T*, const int*) {}
    DEVICE void prefetch(int) {}
    DEVICE void commit(T*, int) const {}
};

// ---- forward

template <template <typename> class CellOf, typename T, int HP, int HELD, int N, int IP, bool EVEN>
__global__ void __launch_bounds__(HP * 2, 1) block_mma_forward(
    const int T_,
    const int B,
    const int H,
    const int I,
    const int W,         // blocks of H in a row of gates
    const int reverse,
    const int save,      // 0: inference; gates are only read, only the last h and c are stored, c in slot T % 2
    const int* __restrict__ lengths,    // [B]  or null
    const int* __restrict__ order,      // [B]  or null
    const T* __restrict__ weight_hh,    // [D, G*H, H]  aligned
    const float* __restrict__ bias_ih,  // [D, G*H]  or null
    const float* __restrict__ bias_hh,  // [D, G*H]  or null
    const T* __restrict__ weight_ih,    // [D, G*H, I]  or null where IP is 0
    const T* __restrict__ x,            // [T, B, I]  likewise; or null
    T* gates,                           // [D, T, B, W*H]  aligned; in: ax where IP is 0; out: what the cell saves; or null
    T* h,                               // [D, T+1, B, H]  aligned; in: the first slot; out: the others
    float* c,                           // [D, T+1 or 2, B, H]  likewise; or null where the cell has none
    T* __restrict__ output)             // [T, B, D*H]  aligned
{
    typedef CellOf<float> Cell;
    constexpr int K = Fragment<T>::K, P = Fragment<T>::P, ROW = Fragment<T>::row;
    constexpr int G = Cell::gates, KT = HP / K, XT = IP / K, threads = HP * 2, x_columns = (XT + 1) / 2 * 2 * K;
    constexpr int stride = HP + x_columns + ROW, buffer_size = 8 * N * stride;
    constexpr int SUMS = G + (IP ? Cell::separate_input_gate : 0);  // the last one: W_ih x of the separate gate
    constexpr int chains = G == 1 ? 4 : 1;  // independent sums of one product, to hide latency
    extern __shared__ uint4 memory[];
    T* hx_shared = (T*)memory;  // [2, 8 N, stride]: h, x; 16 bytes between rows avoid bank conflicts
    const LanePosition<N, EVEN> pos(T_, B, H, reverse, lengths, order);
    const int j = pos.j, lane = pos.lane, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)pos.d * G * H * H;
    const T* W_ih = weight_ih + (size_t)pos.d * G * H * I;
    Fragments<G * (KT + XT), HELD, threads> weights;
    weights.load(memory, memory + 2 * buffer_size * sizeof(T) / 16, [&](int tile) {
        const int g = tile % G, k = tile / G * K + lane % 4 * P;
        if (IP && k >= HP) {
            return tile_of<T>(j, k - HP, [&](int unit, int column) {
                const T* from = W_ih + ((size_t)g * H + unit) * I + column;
                return word<T>([&](int i) { return unit < H && column + i < I ? from[i] : T(0.0f); });
            });
        }
        return tile_of<T>(j, k, [&](int unit, int column) {
            const T* from = W_hh + ((size_t)g * H + unit) * H + column;
            if (EVEN) return unit < H && column < H ? load_word(from) : 0u;
            return word<T>([&](int i) { return unit < H && column + i < H ? from[i] : T(0.0f); });
        });
    });

    const size_t slot = (size_t)B * H;
    const size_t initial_h = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? T_ : 0)) * slot;
    const size_t initial_c = save ? initial_h : (size_t)pos.d * 2 * slot;
    typedef LanePosition<N, EVEN> Position;
    float h_old[2][Position::per_thread], c_old[2][Position::per_thread], bias_a[G][2], bias_r[G][2];  // [unit][sequence]
#pragma unroll
    for (int u = 0; u < 2; u++) {
        const bool unit = j + u < H;
#pragma unroll
        for (int g = 0; g < G; g++) {
            bias_a[g][u] = unit && bias_ih ? bias_ih[((size_t)pos.d * G + g) * H + j + u] : 0.0f;
            bias_r[g][u] = unit && bias_ih ? bias_hh[((size_t)pos.d * G + g) * H + j + u] : 0.0f;
        }
#pragma unroll
        for (int n = 0; n < Position::per_thread; n++) {
            const bool valid = unit && pos.sequence[n] >= 0;
            const size_t i = (size_t)(valid ? pos.sequence[n] : 0) * H + j + u;
            h_old[u][n] = valid ? float(h[initial_h + i]) : 0.0f;
            c_old[u][n] = valid && Cell::states == 2 ? c[initial_c + i] : 0.0f;
        }
    }
#pragma unroll
    for (int n = 0; n < Position::per_thread; n++) {
        store_operands(hx_shared + pos.column(n) * stride + j, h_old[0][n], h_old[1][n]);
    }
    InputPrefetch<T, x_columns, 8 * N, threads> input(I, B, x, order);
    if (T_) {
        input.prefetch(pos.reversed ? T_ - 1 : 0);
        input.commit(hx_shared + HP, stride);
    }
    __syncthreads();

    for (int step = 0; step < T_; step++) {
        const int t = pos.reversed ? T_ - 1 - step : step;
        const T* reads = hx_shared + (step & 1) * buffer_size;
        T* writes = hx_shared + (~step & 1) * buffer_size;
        float2 ax[Position::per_thread][G];
        float sum[N][SUMS][chains][4] = {};
        if (step + 1 < T_) input.prefetch(pos.reversed ? t - 1 : t + 1);  // in flight during the product
        if (t < pos.longest) {
#pragma unroll
            for (int n = 0; n < Position::per_thread && !IP; n++) {
                const bool valid = t < pos.length[n];
                const T* row = gates + (((size_t)pos.d * T_ + t) * B + (valid ? pos.sequence[n] : 0)) * W * H + j;
#pragma unroll
                for (int g = 0; g < G; g++) {
                    ax[n][g] = valid ? pos.load_pair(row + (size_t)g * H, H) : make_float2(0.0f, 0.0f);
                }
            }
#pragma unroll
            for (int k = 0; k < KT + XT; k += 2) {
                uint4 operand[N];
#pragma unroll
                for (int m = 0; m < N; m++) {
                    operand[m] = load_matrices(reads + (m * 8 + lane % 8) * stride + k * K + lane / 8 * ROW);
                }
#pragma unroll
                for (int g = 0; g < G; g++) {
                    const int to = k >= KT && g == G - 1 ? SUMS - 1 : g;
                    const bool last = k + 1 == KT + XT;
                    const uint4 weight = weights.get(k * G + g), next = weights.get((last ? k : k + 1) * G + g);
#pragma unroll
                    for (int m = 0; m < N; m++) {
                        mma(sum[m][to][k % chains], weight, make_uint2(operand[m].x, operand[m].y), T());
                        if (!last) mma(sum[m][to][(k + 1) % chains], next, make_uint2(operand[m].z, operand[m].w), T());
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < Position::per_thread; n++) {
            const bool live = t < pos.length[n];
            float saved[2][Cell::saved_blocks + 1];
#pragma unroll
            for (int u = 0; u < 2; u++) {
                if (live && pos.has(u, H)) {
                    float a[G], ah[G], h_new, c_new;
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        ah[g] = bias_r[g][u];
#pragma unroll
                        for (int k = 0; k < chains; k++) ah[g] += sum[n / 2][g][k][u * 2 + n % 2];
                        a[g] = IP ? bias_a[g][u] : (u ? ax[n][g].y : ax[n][g].x) + bias_a[g][u];
                    }
                    if (SUMS > G) a[G - 1] += sum[n / 2][SUMS - 1][0][u * 2 + n % 2];
                    Cell::forward(a, ah, h_old[u][n], c_old[u][n], saved[u], h_new, c_new);
                    h_old[u][n] = float(T(h_new));  // the state is what is stored
                    if (Cell::states == 2) c_old[u][n] = c_new;
                }
            }
            store_operands(writes + pos.column(n) * stride + j, h_old[0][n], h_old[1][n]);
            if (pos.sequence[n] < 0) continue;
            pos.store_pair(output + ((size_t)t * B + pos.sequence[n]) * D * H + (size_t)pos.d * H + j,
                           live ? h_old[0][n] : 0.0f, live ? h_old[1][n] : 0.0f, H);
            const size_t i = (size_t)pos.sequence[n] * H + j;
            if (save || step == T_ - 1) {
                const size_t new_index = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? t : t + 1)) * slot + i;
                pos.store_pair(h + new_index, h_old[0][n], h_old[1][n], H);
                if (Cell::states == 2) {
                    float* c_now = c + (save ? new_index : ((size_t)pos.d * 2 + T_ % 2) * slot + i);
                    c_now[0] = c_old[0][n];
                    if (pos.has(1, H)) c_now[1] = c_old[1][n];
                }
            }
            if (save && live) {
                T* row = gates + (((size_t)pos.d * T_ + t) * B + pos.sequence[n]) * W * H + j;
#pragma unroll
                for (int g = 0; g < Cell::saved_blocks; g++) {
                    pos.store_pair(row + (size_t)g * H, saved[0][g], saved[1][g], H);
                }
            }
        }
        if (step + 1 < T_) input.commit(writes + HP, stride);
        __syncthreads();
    }
}

// ---- backward: the mirror. A tile's rows are columns of W_hh, its columns are K rows of one gate.

template <template <typename> class CellOf, typename T, int HP, int HELD, int N, bool EVEN>
__global__ void __launch_bounds__(HP * 2, 1) block_mma_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const int* __restrict__ order,    // [B]  or null
    const T* __restrict__ weight_hh,  // [D, G*H, H]  aligned
    T* gates,                         // [D, T, B, W*H]  aligned; in: what forward saved; out: dgates
    const T* __restrict__ h,          // [D, T+1, B, H]  aligned
    const float* __restrict__ c,      // [D, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  aligned; or null
    float* __restrict__ dh,           // [D, B, H]  in: of the last h; out: of the first
    float* __restrict__ dc)           // [D, B, H]  likewise; or null where the cell has none
{
    typedef CellOf<float> Cell;
    constexpr int K = Fragment<T>::K, P = Fragment<T>::P, ROW = Fragment<T>::row;
    constexpr int G = Cell::gates, KT = G * HP / K, threads = HP * 2, stride = G * HP + ROW, buffer_size = 8 * N * stride;
    extern __shared__ uint4 memory[];
    T* d_shared = (T*)memory;  // [2, 8 N, stride]: dgates
    const LanePosition<N, EVEN> pos(T_, B, H, reverse, lengths, order);
    const int j = pos.j, lane = pos.lane, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)pos.d * G * H * H;
    Fragments<KT, HELD, threads> weights;
    weights.load(memory, memory + 2 * buffer_size * sizeof(T) / 16, [&](int tile) {
        const int g = tile / (HP / K), k = tile % (HP / K) * K + lane % 4 * P;
        return tile_of<T>(j, k, [&](int unit, int row) {
            const T* from = W_hh + ((size_t)g * H + row) * H + unit;
            return word<T>([&](int i) { return unit < H && row + i < H ? from[(size_t)i * H] : T(0.0f); });
        });
    });

    const size_t slot = (size_t)B * H;
    typedef LanePosition<N, EVEN> Position;
    float dh_now[2][Position::per_thread], dc_now[2][Position::per_thread];  // [unit][sequence]
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int n = 0; n < Position::per_thread; n++) {
            const bool valid = pos.sequence[n] >= 0 && j + u < H;
            const size_t index = (size_t)pos.d * slot + (size_t)(valid ? pos.sequence[n] : 0) * H + j + u;
            dh_now[u][n] = valid ? dh[index] : 0.0f;
            dc_now[u][n] = valid && Cell::states == 2 ? dc[index] : 0.0f;
        }
    }
    for (int step = T_ - 1; step >= 0; step--) {
        const int t = pos.reversed ? T_ - 1 - step : step;
        T* buffer = d_shared + (step & 1) * buffer_size;
#pragma unroll
        for (int n = 0; n < Position::per_thread; n++) {
            float dgates[2][Cell::preactivations] = {};
            if (pos.sequence[n] >= 0) {
                const size_t i = (size_t)pos.sequence[n] * H + j;
                const size_t new_index = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? t : t + 1)) * slot + i;
                const size_t old_index = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? t + 1 : t)) * slot + i;
                T* row = gates + (((size_t)pos.d * T_ + t) * B + pos.sequence[n]) * W * H + j;
                if (t < pos.length[n]) {
                    float2 saved_pairs[Cell::saved_blocks + 1], doutput_now = make_float2(0.0f, 0.0f);
#pragma unroll
                    for (int g = 0; g < Cell::saved_blocks; g++) saved_pairs[g] = pos.load_pair(row + (size_t)g * H, H);
                    if (doutput) {
                        const T* from = doutput + ((size_t)t * B + pos.sequence[n]) * D * H + (size_t)pos.d * H + j;
                        doutput_now = pos.load_pair(from, H);
                    }
                    const float2 h_old = pos.load_pair(h + old_index, H), h_new = pos.load_pair(h + new_index, H);
#pragma unroll
                    for (int u = 0; u < 2; u++) {
                        if (!pos.has(u, H)) continue;
                        float saved[Cell::saved_blocks + 1];
#pragma unroll
                        for (int g = 0; g < Cell::saved_blocks; g++) saved[g] = u ? saved_pairs[g].y : saved_pairs[g].x;
                        dh_now[u][n] += u ? doutput_now.y : doutput_now.x;
                        const bool has_c = Cell::states == 2;
                        Cell::backward(saved, u ? h_old.y : h_old.x, has_c ? c[old_index + u] : 0.0f,
                                       u ? h_new.y : h_new.x, has_c ? c[new_index + u] : 0.0f, dh_now[u][n], dc_now[u][n],
                                       dgates[u]);
                    }
                }
#pragma unroll
                for (int g = 0; g < Cell::preactivations; g++) {
                    pos.store_pair(row + (size_t)g * H, dgates[0][g], dgates[1][g], H);
                }
            }
#pragma unroll
            for (int g = 0; g < G; g++) {
                store_operands(buffer + pos.column(n) * stride + g * HP + j, dgates[0][g], dgates[1][g]);
            }
        }
        __syncthreads();
        if (t >= pos.longest) continue;  // the same in all threads
        float sum[N][4][4] = {};
#pragma unroll
        for (int k = 0; k < KT; k += 2) {
            const uint4 weight = weights.get(k), next_weight = weights.get(k + 1);
#pragma unroll
            for (int m = 0; m < N; m++) {
                const uint4 operand = load_matrices(buffer + (m * 8 + lane % 8) * stride + k * K + lane / 8 * ROW);
                mma(sum[m][k % 4], weight, make_uint2(operand.x, operand.y), T());
                mma(sum[m][(k + 1) % 4], next_weight, make_uint2(operand.z, operand.w), T());
            }
        }
#pragma unroll
        for (int u = 0; u < 2; u++) {
#pragma unroll
            for (int n = 0; n < Position::per_thread; n++) {
                const int i = u * 2 + n % 2;
                dh_now[u][n] += sum[n / 2][0][i] + sum[n / 2][1][i] + (sum[n / 2][2][i] + sum[n / 2][3][i]);
            }
        }
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
        for (int n = 0; n < Position::per_thread; n++) {
            if (pos.sequence[n] < 0 || !pos.has(u, H)) continue;
            const size_t index = (size_t)pos.d * slot + (size_t)pos.sequence[n] * H + j + u;
            dh[index] = dh_now[u][n];
            if (Cell::states == 2) dc[index] = dc_now[u][n];
        }
    }
}
