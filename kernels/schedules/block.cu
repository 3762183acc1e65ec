// Schedule `block`: one thread block runs the whole time loop of R sequences of one direction. It waits for no other block.
//
// The recurrent weights are loaded once and stay on the chip: KREG columns of each thread in registers, the others in shared
// memory. c, dh and dc never leave registers. Kernels are named by cell, storage and tile:
//
//     block_forward<lstm, float, 128, 2, 48, 1, 0>     HP 128, S 2, KREG 48, R 1, IP 0
//
//     HP  H rounded up to a multiple of 32; units past H are zeros and are never stored
//     S   slices of a product's sum; thread (j, s) of HP x S has unit j's weights for the columns of slice s
//     KREG columns of a slice in registers, a multiple of 4
//     R   sequences of a tile
//     IP  I rounded up to a multiple of 4, if this kernel multiplies W_ih x itself; 0: `gates` holds ax
//
// A step has two barriers: after the sums of the slices, and after what the next product reads. A cell without a product has
// neither; its thread blocks share the units, HP of them each, and need no more than S = R. Means over the units take a barrier
// more for each stage of them, and shared memory ahead of everything else.
//
// step.cu explains the arrays and what happens past the end of a sequence. order [B] sorts the sequences by length, so that
// a tile's sequences end together; past the longest one of a tile there is no product.

#include "../common.cuh"
#include "../cells/all.cuh"
#include "tile.cuh"
#include "time_loop.cuh"

// ---- the input: W_ih in shared memory, x loaded a step ahead

template <typename T, int G, int HP, int S, int R, int IP>
struct Inputs {
    typedef typename Vec4<T>::type vec4;
    static constexpr int X = IP / 4, threads = HP * S, per_thread = (R * IP + threads - 1) / threads;

    const T* from[per_thread];  // the numbers of x at t = 0 that this thread loads, or null
    T next[per_thread];
    const vec4* weights;        // [G, X, HP]
    size_t step;                // from one t to the next

    DEVICE void load(int I, int H, int B, int first, const T* x, const int* order, vec4* memory, const T* W_ih) {
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
        for (int e = 0; e < per_thread; e++) next[e] = from[e] ? from[e][t * step] : T(0.0f);
    }

    DEVICE void commit(float* x_shared) const {
#pragma unroll
        for (int e = 0; e < per_thread; e++) {
            const int k = threadIdx.x + e * threads;
            if (k < R * IP) x_shared[k] = float(next[e]);
        }
    }

    // Adds the products with the vectors s, s + S, ... of x to this slice's sums, those of gate g to sum place(g).
    template <int SUMS, typename Place>
    DEVICE void multiply(float (&part)[SUMS][R], Place place, const float* x_shared, int j, int s) const {
#pragma unroll 1
        for (int q = s; q < X; q += S) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float4 w = Vec4<T>::unpack(weights[(g * X + q) * HP + j]);
#pragma unroll
                for (int r = 0; r < R; r++) {
                    const float4 v = ((const float4*)x_shared)[r * X + q];
                    const float sum = w.x * v.x + w.y * v.y + w.z * v.z + w.w * v.w;
                    part[place(g)][r] += sum;
                }
            }
        }
    }
};

template <typename T, int G, int HP, int S, int R>
struct Inputs<T, G, HP, S, R, 0> {  // `gates` holds ax
    template <typename... Any> DEVICE void load(Any...) {}
    DEVICE void prefetch(int) {}
    DEVICE void commit(float*) const {}
    template <typename... Any> DEVICE void multiply(Any&&...) const {}
};

// ---- forward

template <typename Cell, typename T, int HP, int S, int KREG, int R, int IP>
struct Gathered {
    static constexpr bool makes_ax = IP > 0;
    static constexpr int G = Cell::gates, Q = Cell::products, KS = HP / S, threads = HP * S, SUMS = sums_of<Cell>(makes_ax);
    typedef Weights<T, Q, KS, KREG, R, threads> ThreadWeights;
    typedef typename ThreadWeights::vec4 vec4;
    ThreadWeights weights;
    Inputs<T, G, HP, S, R, IP> inputs;
    float *h_shared, *partial_sums, *x_shared;  // [R, HP], [S, SUMS, R, HP], [R, IP]
    int j, s;

    DEVICE Gathered(float4* memory, const T* W_hh, const T* W_ih, int I, int H, int B, const T* x, const int* order)
        : h_shared((float*)memory), partial_sums(h_shared + R * HP), x_shared(partial_sums + S * SUMS * R * HP),
          j(threadIdx.x % HP), s(threadIdx.x / HP) {
        auto* w_ih_shared = (vec4*)(x_shared + R * IP);  // [G, IP / 4, HP]
        weights.template load<true>((vec4*)memory, w_ih_shared + G * IP / 4 * HP, [&](int thread, int g, int k) {
            const int row = thread % HP, column = thread / HP * KS + k;
            return load_vec4(W_hh + ((size_t)g * H + row) * H + column, 1, row < H ? H - column : 0, H % 4 == 0);
        });
        inputs.load(I, H, B, blockIdx.x * R, x, order, w_ih_shared, W_ih);
    }

    template <typename Position>
    DEVICE void send(Alone&, const Position&, int k, T h) const {
        if (s + k * S < R) h_shared[(s + k * S) * HP + j] = float(h);
    }

    DEVICE void prefetch(int t) { inputs.prefetch(t); }

    DEVICE void next(Alone&) const {
        inputs.commit(x_shared);
        __syncthreads();
    }

    template <typename Position>
    DEVICE bool run(Alone&, const Position&) {
        float part[SUMS][R] = {};
        weights.multiply(part, [&](int g, int r) { return (const float4*)(h_shared + r * HP + s * KS); });
        auto place = [](int g) { return g < first_apart<Cell> ? g : Q + g - first_apart<Cell>; };
        inputs.multiply(part, place, x_shared, j, s);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int g = 0; g < SUMS; g++) partial_sums[((s * SUMS + g) * R + r) * HP + j] = part[g][r];
        }
        __syncthreads();
        return true;
    }

    DEVICE float add(float sum, int k, int, int g) const {
        const float* from = partial_sums + (s + k * S) * HP + j;
#pragma unroll
        for (int slice = 0; slice < S; slice++) sum += from[(slice * SUMS + g) * R * HP];
        return sum;
    }
};

// Of a cell without a product: nothing is shared.
template <typename Cell>
struct NoProduct {
    static constexpr bool makes_ax = false, loads_ahead = true;
    template <typename... Any> DEVICE void send(Any&&...) const {}
    template <typename... Any> DEVICE void stage(Any&&...) const {}
    DEVICE void next(Alone&) const {}
    template <typename Position>
    DEVICE bool run(Alone&, const Position&) const {
        if (Cell::means) __syncthreads();  // no other barrier divides the means of two steps
        return true;
    }
    DEVICE float add(float start, int, int, int) const { return start; }
    DEVICE float sum(int, int) const { return 0.0f; }
};

template <template <typename> class CellOf, typename T, int HP, int S, int KREG, int R, int IP, bool MARKED = false>
__global__ void __launch_bounds__(HP * S, 1) block_forward(
    const int T_,
    const int B,
    const int H,
    const int I,
    const int W,         // blocks of H in a row of gates
    const int reverse,
    const int save,      // 0: inference; gates are only read, only the last states are stored, others in slot T % 2
    const int* __restrict__ lengths,    // [B]  or null
    const int* __restrict__ order,      // [B]  or null
    const T* __restrict__ weight_hh,    // [D, Q*H, H]  aligned; or null where the cell has no product
    const float* __restrict__ bias_ih,  // [D, G*H]  or null
    const float* __restrict__ bias_hh,  // [D, G*H]  or null
    const float* __restrict__ own,      // [D, N, H]  or null where the cell has none
    const int mask_steps,               // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,      // [D, mask_steps, B, M*H]  or null where the cell draws none
    const T* __restrict__ weight_ih,    // [D, G*H, I]  or null where IP is 0
    const T* __restrict__ x,            // [T, B, I]  likewise; or null
    T* gates,                           // [D, T, B, W*H]  in: ax where IP is 0; out: what the cell saves; or null
    T* h,                               // [D, T+1, B, H]  in: the first slot; out: the others
    float* others,                      // [D, S-1, T+1 or 2, B, H]  likewise; or null where the cell has none
    T* __restrict__ output,             // [T, B, D*H]
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,      // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    typedef CellOf<float> Cell;
    constexpr int Q = Cell::products;
    typedef TilePosition<HP, S, R> Position;
    const Position pos(T_, B, H, blockIdx.x, Q ? 0 : blockIdx.y * HP, blockIdx.z, reverse, lengths, order);
    Alone channel = {(float*)memory};
    const Forward<T> layer = {
        T_, B, H, W, (int)gridDim.z, save, mask_steps, bias_ih, bias_hh, own, mask, gates, h, others, output,
        {marks, reset_h, reset_others}};
    if constexpr (Q) {
        Gathered<Cell, T, HP, S, KREG, R, IP> product(
            memory + vectors_of_means<Position, HP * S>(Cell::means), weight_hh + (size_t)pos.d * Q * H * H,
            weight_ih + (size_t)pos.d * Cell::gates * H * I, I, H, B, x, order);
        time_loop_forward<CellOf, MARKED>(layer, pos, channel, product);
    } else {
        NoProduct<Cell> product;
        time_loop_forward<CellOf, MARKED>(layer, pos, channel, product);
    }
}

// ---- backward: the mirror. Thread (j, s) has column j of W_hh, the rows of slice s.

template <int Q, typename T, int HP, int S, int KREG, int R>
struct Returned {
    static constexpr bool loads_ahead = (R + S - 1) / S * sizeof(T) <= 8;
    static constexpr int KS = HP / S, threads = HP * S;
    typedef Weights<T, Q, KS, KREG, R, threads> ThreadWeights;
    typedef typename ThreadWeights::vec4 vec4;
    ThreadWeights weights;
    float *d_shared, *partial_sums;  // [R, Q, HP]: dgates; [S, R, HP]
    int j, s;

    DEVICE Returned(float4* memory, const T* W_hh, int H)
        : d_shared((float*)memory), partial_sums(d_shared + R * Q * HP), j(threadIdx.x % HP), s(threadIdx.x / HP) {
        auto* w_shared = (vec4*)(partial_sums + S * R * HP);
        weights.template load<false>((vec4*)memory, w_shared, [&](int thread, int g, int k) {
            const int column = thread % HP, row = thread / HP * KS + k;
            return load_vec4(W_hh + ((size_t)g * H + row) * H + column, H, column < H ? H - row : 0, false);
        });
        __syncthreads();
    }

    template <typename Position>
    DEVICE void stage(Alone&, const Position&, int k, const T* dgates) const {
        if (s + k * S >= R) return;
#pragma unroll
        for (int g = 0; g < Q; g++) d_shared[((s + k * S) * Q + g) * HP + j] = float(dgates[g]);
    }

    DEVICE void next(Alone&) const {}

    template <typename Position>
    DEVICE bool run(Alone&, const Position&) {
        __syncthreads();
        float part[Q][R];
        weights.multiply(part, [&](int g, int r) { return (const float4*)(d_shared + (r * Q + g) * HP + s * KS); });
#pragma unroll
        for (int r = 0; r < R; r++) {
            float sum = part[0][r];
#pragma unroll
            for (int g = 1; g < Q; g++) sum += part[g][r];
            partial_sums[(s * R + r) * HP + j] = sum;
        }
        __syncthreads();
        return true;
    }

    DEVICE float sum(int k, int) const {
        const float* from = partial_sums + (s + k * S) * HP + j;
        float sum = 0.0f;
        if (s + k * S >= R) return sum;
#pragma unroll
        for (int slice = 0; slice < S; slice++) sum += from[slice * R * HP];
        return sum;
    }
};

template <template <typename> class CellOf, typename T, int HP, int S, int KREG, int R, bool MARKED = false>
__global__ void __launch_bounds__(HP * S, 1) block_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const int* __restrict__ order,    // [B]  or null
    const T* __restrict__ weight_hh,  // [D, Q*H, H]  aligned; or null where the cell has no product
    T* gates,                         // [D, T, B, W*H]  in: what forward saved; out: dgates
    const T* __restrict__ h,          // [D, T+1, B, H]
    const float* __restrict__ others,  // [D, S-1, T+1, B, H]  or null where the cell has none
    const float* __restrict__ own,    // [D, N, H]  or null where the cell has none
    const int mask_steps,             // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,    // [D, mask_steps, B, M*H]  or null where the cell draws none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    float* __restrict__ dh,           // [D, B, H]  in: of the last h; out: of the first
    float* __restrict__ dothers,      // [D, S-1, B, H]  likewise; or null where the cell has none
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,    // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others,  // [D, S-1, B, H]  likewise; or null
    float* __restrict__ dreset_h,     // [D, B, H]  in, out: sums of gradients; or null
    float* __restrict__ dreset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ float4 memory[];
    typedef CellOf<float> Cell;
    constexpr int Q = Cell::products;
    typedef TilePosition<HP, S, R> Position;
    const Position pos(T_, B, H, blockIdx.x, Q ? 0 : blockIdx.y * HP, blockIdx.z, reverse, lengths, order);
    Alone channel = {(float*)memory};
    const Backward<T> layer = {T_, B, H, W, (int)gridDim.z, mask_steps, own, mask, gates, h, others, doutput, dh, dothers,
                               {marks, reset_h, reset_others, dreset_h, dreset_others}};
    if constexpr (Q) {
        Returned<Q, T, HP, S, KREG, R> product(
            memory + vectors_of_means<Position, HP * S>(Cell::back_means), weight_hh + (size_t)pos.d * Q * H * H, H);
        time_loop_backward<CellOf, MARKED>(layer, pos, channel, product);
    } else {
        NoProduct<Cell> product;
        time_loop_backward<CellOf, MARKED>(layer, pos, channel, product);
    }
}
