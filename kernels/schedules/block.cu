// Schedule `block`: one thread block runs the whole time loop of R sequences of one direction. It waits for no other block.
//
// The recurrent weights are loaded once and stay on the chip: KREG columns of each thread in registers, the others in shared
// memory. c, dh and dc never leave registers. Kernels are named by cell, storage and tile:
//
//     block_forward<LstmCell, float, 128, 2, 48, 1, 0>     HP 128, S 2, KREG 48, R 1, IP 0
//
//     HP  H rounded up to a multiple of 32; units past H are zeros and are never stored
//     S   slices of a product's sum; thread (j, s) of HP x S has unit j's weights for the columns of slice s
//     KREG columns of a slice in registers, a multiple of 4
//     R   sequences of a tile
//     IP  I rounded up to a multiple of 4, if this kernel multiplies W_ih x itself; 0: `gates` holds ax
//
// Cell::separate_input_gate: whether the last gate takes W_ih x and W_hh h separately; otherwise only their sum matters.
//
// A step has two barriers: after the sums of the slices, and after what the next product reads.
//
// step.cu explains the arrays and what happens past the end of a sequence. order [B] sorts the sequences by length, so that
// a tile's sequences end together; past the longest one of a tile there is no product.

#include "../common.cuh"
#include "tile.cuh"
#include "../cells/all.cuh"

// ---- the input: W_ih in shared memory, x loaded a step ahead

template <typename T, int G, int HP, int S, int R, int IP>
struct Inputs {
    typedef typename Vec4<T>::type vec4;
    static constexpr int X = IP / 4, threads = HP * S, per_thread = (R * IP + threads - 1) / threads;

    const T* from[per_thread];  // the numbers of x at t = 0 that this thread loads, or null
    float next[per_thread];
    const vec4* weights;        // [G, X, HP]
    size_t step;                // from one t to the next

    DEVICE Inputs(int I, int H, int B, int first, const T* x, const int* order, vec4* memory, const T* W_ih) {
        step = (size_t)B * I;
        weights = memory;
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const int k = threadIdx.x + e * threads, rank = first + k / IP, i = k % IP;
            const bool valid = k < R * IP && rank < B && i < I;
            from[e] = valid ? x + (size_t)(order ? order[rank] : rank) * I + i : nullptr;
        }
        for (int k = threadIdx.x; k < G * X * HP; k += threads) {
            const int unit = k % HP, q = k / HP % X, g = k / HP / X;
            memory[k] = load_vec4(W_ih + ((size_t)g * H + unit) * I + 4 * q, 1, unit < H ? I - 4 * q : 0, false);
        }
    }

    DEVICE void prefetch(int t) {
#pragma unroll
        for (int e = 0; e < per_thread; e++) next[e] = from[e] ? float(from[e][t * step]) : 0.0f;
    }

    DEVICE void commit(float* x_shared) const {
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const int k = threadIdx.x + e * threads;
            if (k < R * IP) x_shared[k] = next[e];
        }
    }

    // Adds the products with the vectors s, s + S, ... of x to this slice's sums. SEPARATE: those of the last gate go to
    // `separate`.
    template <int SEPARATE>
    DEVICE void multiply(float (&part)[G][R], float (&separate)[R], const float* x_shared, int j, int s) const {
#pragma unroll 1
        for (int q = s; q < X; q += S) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float4 w = Vec4<T>::unpack(weights[(g * X + q) * HP + j]);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float4 v = ((const float4*)x_shared)[r * X + q];
                    const float sum = w.x * v.x + w.y * v.y + w.z * v.z + w.w * v.w;
                    (SEPARATE && g == G - 1 ? separate[r] : part[g][r]) += sum;
                }
            }
        }
    }
};

template <typename T, int G, int HP, int S, int R>
struct Inputs<T, G, HP, S, R, 0> {  // `gates` holds ax
    template <typename... Any> DEVICE Inputs(Any...) {}
    DEVICE void prefetch(int) {}
    DEVICE void commit(float*) const {}
    template <int SEPARATE, typename... Any> DEVICE void multiply(Any&&...) const {}
};

// ---- forward

template <template <typename> class CellOf, typename T, int HP, int S, int KREG, int R, int IP>
__global__ void __launch_bounds__(HP * S, 1) block_forward(
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
    T* gates,                           // [D, T, B, W*H]  in: ax where IP is 0; out: what the cell saves; or null
    T* h,                               // [D, T+1, B, H]  in: the first slot; out: the others
    float* c,                           // [D, T+1 or 2, B, H]  likewise; or null where the cell has none
    T* __restrict__ output)             // [T, B, D*H]
{
    typedef CellOf<float> Cell;
    constexpr int G = Cell::gates, KS = HP / S, threads = HP * S;
    constexpr int SUMS = G + (IP ? Cell::separate_input_gate : 0);  // the last one: W_ih x of the separate gate
    typedef Weights<T, G, KS, KREG, R, threads> ThreadWeights;
    typedef Inputs<T, G, HP, S, R, IP> Input;
    typedef TilePosition<HP, S, R> Position;
    extern __shared__ float4 memory[];
    float* h_shared = (float*)memory;                                        // [R, HP]
    float* partial_sums = h_shared + R * HP;                                 // [S, SUMS, R, HP]
    float* x_shared = partial_sums + S * SUMS * R * HP;                      // [R, IP]
    auto* w_ih_shared = (typename ThreadWeights::vec4*)(x_shared + R * IP);  // [G, IP / 4, HP]
    auto* w_hh_shared = w_ih_shared + G * IP / 4 * HP;

    const Position pos(T_, B, H, blockIdx.x, 0, blockIdx.z, reverse, lengths, order);
    const int j = pos.j, s = pos.s, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)pos.d * G * H * H;
    ThreadWeights weights;
    weights.template load<true>((typename ThreadWeights::vec4*)memory, w_hh_shared, [&](int thread, int g, int k) {
        const int row = thread % HP, column = thread / HP * KS + k;
        return load_vec4(W_hh + ((size_t)g * H + row) * H + column, 1, row < H ? H - column : 0, H % 4 == 0);
    });
    Input inputs(I, H, B, blockIdx.x * R, x, order, w_ih_shared, weight_ih + (size_t)pos.d * G * H * I);

    const size_t slot = (size_t)B * H;
    const size_t initial_h = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? T_ : 0)) * slot;
    const size_t initial_c = save ? initial_h : (size_t)pos.d * 2 * slot;
    float h_old[Position::per_thread], c_old[Position::per_thread], bias_a[G], bias_r[G], ax[Position::per_thread][G];
#pragma unroll
    for (int g = 0; g < G; g++) {
        const bool valid = bias_ih && j < H;
        bias_a[g] = valid ? bias_ih[((size_t)pos.d * G + g) * H + j] : 0.0f;
        bias_r[g] = valid ? bias_hh[((size_t)pos.d * G + g) * H + j] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < Position::per_thread; k++) {
        const size_t n = (size_t)pos.sequence[k] * H + j;
        const bool valid = pos.sequence[k] >= 0;
        h_old[k] = valid ? float(h[initial_h + n]) : 0.0f;
        c_old[k] = valid && Cell::states == 2 ? c[initial_c + n] : 0.0f;
        if (s + k * S < R) h_shared[(s + k * S) * HP + j] = h_old[k];
    }
    if (T_) {
        inputs.prefetch(pos.reversed ? T_ - 1 : 0);
        inputs.commit(x_shared);
    }
    __syncthreads();

    for (int step = 0; step < T_; step++) {
        const int t = pos.reversed ? T_ - 1 - step : step;
        const bool has_next = IP && step + 1 < T_;
        if (has_next) inputs.prefetch(pos.reversed ? t - 1 : t + 1);  // in flight during the product
        if (t < pos.longest) {
#pragma unroll
            for (int k = 0; k < Position::per_thread && !IP; k++) {
                const bool valid = t < pos.length[k];
                const T* row = gates + (((size_t)pos.d * T_ + t) * B + (valid ? pos.sequence[k] : 0)) * W * H + j;
#pragma unroll
                for (int g = 0; g < G; g++) ax[k][g] = valid ? float(row[(size_t)g * H]) : 0.0f;
            }
            float part[G][R], separate[R] = {};
            weights.multiply(part, [&](int g, int r) { return (const float4*)(h_shared + r * HP + s * KS); });
            inputs.template multiply<Cell::separate_input_gate>(part, separate, x_shared, j, s);
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int g = 0; g < SUMS; g++) {
                    partial_sums[((s * SUMS + g) * R + r) * HP + j] = g < G ? part[g % G][r] : separate[r];
                }
            }
            __syncthreads();
        }
        if (has_next) inputs.commit(x_shared);
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            if (pos.sequence[k] < 0) continue;
            const int r = s + k * S;
            const size_t n = (size_t)pos.sequence[k] * H + j;
            const bool live = t < pos.length[k];
            float saved[Cell::saved_blocks + 1];
            if (live) {
                float a[G], ah[G], h_new, c_new;
#pragma unroll
                for (int g = 0; g < G; g++) {
                    ah[g] = bias_r[g];
                    for (int slice = 0; slice < S; slice++) ah[g] += partial_sums[((slice * SUMS + g) * R + r) * HP + j];
                    a[g] = IP ? bias_a[g] : ax[k][g] + bias_a[g];
                }
                for (int slice = 0; slice < S && SUMS > G; slice++) {
                    a[G - 1] += partial_sums[((slice * SUMS + G) * R + r) * HP + j];
                }
                Cell::forward(a, ah, h_old[k], c_old[k], saved, h_new, c_new);
                h_old[k] = float(T(h_new));  // the state is what is stored
                if (Cell::states == 2) c_old[k] = c_new;
                h_shared[r * HP + j] = h_old[k];
            }
            output[((size_t)t * B + pos.sequence[k]) * D * H + (size_t)pos.d * H + j] = T(live ? h_old[k] : 0.0f);
            const bool last = step == T_ - 1;
            if (save || last) {
                const size_t new_index = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? t : t + 1)) * slot + n;
                h[new_index] = T(h_old[k]);
                if (Cell::states == 2) c[save ? new_index : ((size_t)pos.d * 2 + T_ % 2) * slot + n] = c_old[k];
            }
            if (save && live) {
                T* row = gates + (((size_t)pos.d * T_ + t) * B + pos.sequence[k]) * W * H + j;
#pragma unroll
                for (int g = 0; g < Cell::saved_blocks; g++) row[(size_t)g * H] = T(saved[g]);
            }
        }
        __syncthreads();
    }
}

// ---- backward: the mirror. Thread (j, s) has column j of W_hh, the rows of slice s.

template <template <typename> class CellOf, typename T, int HP, int S, int KREG, int R>
__global__ void __launch_bounds__(HP * S, 1) block_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const int* __restrict__ order,    // [B]  or null
    const T* __restrict__ weight_hh,  // [D, G*H, H]  aligned
    T* gates,                         // [D, T, B, W*H]  in: what forward saved; out: dgates
    const T* __restrict__ h,          // [D, T+1, B, H]
    const float* __restrict__ c,      // [D, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    float* __restrict__ dh,           // [D, B, H]  in: of the last h; out: of the first
    float* __restrict__ dc)           // [D, B, H]  likewise; or null where the cell has none
{
    typedef CellOf<float> Cell;
    constexpr int G = Cell::gates, KS = HP / S, threads = HP * S;
    typedef Weights<T, G, KS, KREG, R, threads> ThreadWeights;
    typedef TilePosition<HP, S, R> Position;
    extern __shared__ float4 memory[];
    float* d_shared = (float*)memory;             // [R, G, HP]: dgates
    float* partial_sums = d_shared + R * G * HP;  // [S, R, HP]
    auto* w_hh_shared = (typename ThreadWeights::vec4*)(partial_sums + S * R * HP);

    const Position pos(T_, B, H, blockIdx.x, 0, blockIdx.z, reverse, lengths, order);
    const int j = pos.j, s = pos.s, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)pos.d * G * H * H;
    ThreadWeights weights;
    weights.template load<false>((typename ThreadWeights::vec4*)memory, w_hh_shared, [&](int thread, int g, int k) {
        const int column = thread % HP, row = thread / HP * KS + k;
        return load_vec4(W_hh + ((size_t)g * H + row) * H + column, H, column < H ? H - row : 0, false);
    });

    const size_t slot = (size_t)B * H;
    float dh_now[Position::per_thread], dc_now[Position::per_thread];
#pragma unroll
    for (int k = 0; k < Position::per_thread; k++) {
        const bool valid = pos.sequence[k] >= 0;
        const size_t index = (size_t)pos.d * slot + (size_t)pos.sequence[k] * H + j;
        dh_now[k] = valid ? dh[index] : 0.0f;
        dc_now[k] = valid && Cell::states == 2 ? dc[index] : 0.0f;
    }
    for (int k = threadIdx.x; k < R * G * HP; k += threads) d_shared[k] = 0.0f;  // units past H stay zero
    __syncthreads();

    for (int step = T_ - 1; step >= 0; step--) {
        const int t = pos.reversed ? T_ - 1 - step : step;
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            if (pos.sequence[k] < 0) continue;
            const size_t n = (size_t)pos.sequence[k] * H + j;
            const size_t new_index = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? t : t + 1)) * slot + n;
            const size_t old_index = ((size_t)pos.d * (T_ + 1) + (pos.reversed ? t + 1 : t)) * slot + n;
            T* row = gates + (((size_t)pos.d * T_ + t) * B + pos.sequence[k]) * W * H + j;
            float dgates[Cell::preactivations];
            if (t < pos.length[k]) {
                float saved[Cell::saved_blocks + 1];
#pragma unroll
                for (int g = 0; g < Cell::saved_blocks; g++) saved[g] = float(row[(size_t)g * H]);
                if (doutput) dh_now[k] += float(doutput[((size_t)t * B + pos.sequence[k]) * D * H + (size_t)pos.d * H + j]);
                const bool has_c = Cell::states == 2;
                Cell::backward(saved, float(h[old_index]), has_c ? c[old_index] : 0.0f, float(h[new_index]),
                               has_c ? c[new_index] : 0.0f, dh_now[k], dc_now[k], dgates);
            } else {
#pragma unroll
                for (int g = 0; g < Cell::preactivations; g++) dgates[g] = 0.0f;
            }
#pragma unroll
            for (int g = 0; g < Cell::preactivations; g++) row[(size_t)g * H] = T(dgates[g]);
#pragma unroll
            for (int g = 0; g < G; g++) d_shared[((s + k * S) * G + g) * HP + j] = float(T(dgates[g]));
        }
        if (t >= pos.longest) continue;  // the same in all threads
        __syncthreads();
        float part[G][R];
        weights.multiply(part, [&](int g, int r) { return (const float4*)(d_shared + (r * G + g) * HP + s * KS); });
#pragma unroll
        for (int r = 0; r < R; r++) {
            float sum = part[0][r];
#pragma unroll
            for (int g = 1; g < G; g++) sum += part[g][r];
            partial_sums[(s * R + r) * HP + j] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < Position::per_thread; k++) {
            const int r = s + k * S;
            if (r >= R) continue;
            float sum = 0.0f;
            for (int slice = 0; slice < S; slice++) sum += partial_sums[(slice * R + r) * HP + j];
            dh_now[k] += sum;
        }
    }
#pragma unroll
    for (int k = 0; k < Position::per_thread; k++) {
        if (pos.sequence[k] < 0) continue;
        const size_t index = (size_t)pos.d * slot + (size_t)pos.sequence[k] * H + j;
        dh[index] = dh_now[k];
        if (Cell::states == 2) dc[index] = dc_now[k];
    }
}
