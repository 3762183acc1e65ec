// Schedule `block`: one thread block walks all of time for R sequences of one direction; nobody waits for another block.
//
// The recurrent weights are loaded once and stay on the chip, in registers as far as KREG says, the rest in shared memory;
// c, dh and dc never leave registers. Kernels are named by cell, storage and tile:
//
//     block_forward<LstmCell, float, 128, 2, 48, 1>     HP 128, S 2, KREG 48, R 1
//
//     HP  H rounded up to a multiple of 32; units past H are zeros and are never stored
//     S   slices of a product's sum; thread (j, s) of HP x S has unit j's weights for the columns of slice s
//     KREG columns of a slice that stand in registers, a multiple of 4
//     R   sequences of a tile
//
// A step has two barriers: behind the sums of the slices, and behind what the next product reads.
//
// Arrays, and sequences past their end, are as in step.cu. order [B] says which sequence stands where, so that a tile's
// sequences end together; past the longest one of a tile there is no product.

#include "common.cuh"
#include "words.cuh"
#include "cells/rnn.cuh"
#include "cells/lstm.cuh"
#include "cells/gru.cuh"

// ---- four weights side by side, as few registers as they fill

template <typename T> struct Four;

template <> struct Four<float> {
    typedef float4 type;
    static DEVICE type pack(float a, float b, float c, float d) { return make_float4(a, b, c, d); }
    static DEVICE float4 unpack(type w) { return w; }
    static DEVICE void pin(type& w) {}
};

// Widened weights would not fit: without this the compiler widens all of them once, before the time loop.
template <typename T> struct Four16 {
    typedef uint2 type;
    static DEVICE type pack(T a, T b, T c, T d) { return make_uint2(::pack(a, b), ::pack(c, d)); }
    static DEVICE float4 unpack(type w) {
        const float2 low = ::unpack(w.x, T()), high = ::unpack(w.y, T());
        return make_float4(low.x, low.y, high.x, high.y);
    }
    static DEVICE void pin(type& w) { asm volatile("" : "+r"(w.x), "+r"(w.y)); }
};

#if __has_include(<cuda_fp16.h>)
template <> struct Four<__half> : Four16<__half> {};
#endif
#if __has_include(<cuda_bf16.h>)
template <> struct Four<__nv_bfloat16> : Four16<__nv_bfloat16> {};
#endif

// Numbers `stride` apart, of which only `there` exist, the rest is 0. aligned: where they lie side by side, all at once.
template <typename T>
DEVICE typename Four<T>::type load_four(const T* __restrict__ from, int stride, int there, bool aligned) {
    if (aligned && there > 0) return *(const typename Four<T>::type*)from;
    T w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = i < there ? from[i * stride] : T(0.0f);
    return Four<T>::pack(w[0], w[1], w[2], w[3]);
}

// ---- the weights of one thread: G rows, KS columns

template <typename T, int G, int KS, int KREG, int R, int THREADS>
struct Weights {
    typedef typename Four<T>::type four;
    static constexpr int held = KREG / 4, rest = (KS - KREG) / 4;
    static constexpr int chains = G * R >= 4 ? 1 : 4;  // sums that do not wait for one another

    four registers[G][held > 0 ? held : 1];
    four* shared;  // [G, rest, THREADS]

    // fetch(thread, g, k): four weights of a thread from its column k on. Each thread fetches what is near to what its
    // neighbours fetch, and for whom it may be. Weights come into registers by way of `stage` [8, THREADS], which may be
    // anybody's memory until this returns: loaded directly, all addresses would be computed ahead, and there is no room for
    // them beside the weights.
    template <bool ROWS, typename Fetch>
    DEVICE void load(four* stage, four* memory, Fetch fetch) {
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
            for (int from = 0; from < held; from += 8) {
                const int count = held - from < 8 ? held - from : 8;
                bring<ROWS>(stage, count, [&](int thread, int q) { return fetch(thread, g, 4 * (from + q)); });
                __syncthreads();
#pragma unroll
                for (int q = 0; q < count; q++) registers[g][from + q] = stage[q * THREADS + threadIdx.x];
                __syncthreads();
            }
        }
        for (int g = 0; g < G && rest; g++) {
            bring<ROWS>(memory + g * rest * THREADS, rest,
                        [&](int thread, int q) { return fetch(thread, g, KREG + 4 * q); });
        }
        shared = memory + threadIdx.x;
    }

    // to [count, THREADS] = fetch(thread, q). ROWS: a thread's weights lie side by side, and a warp fetches 4 fours for each
    // of 8 threads; else neighbours' weights do.
    template <bool ROWS, typename Fetch>
    DEVICE static void bring(four* to, int count, Fetch fetch) {
        const int lane = threadIdx.x % 32, steps = ROWS ? (count + 3) / 4 * 4 : count;
#pragma unroll 4
        for (int i = 0; i < steps; i++) {
            const int warp = (i * THREADS + threadIdx.x) / 32;
            const int thread = ROWS ? warp % (THREADS / 8) * 8 + lane % 8 : threadIdx.x;
            const int q = ROWS ? warp / (THREADS / 8) * 4 + lane / 8 : i;
            if (q < count) to[q * THREADS + thread] = fetch(thread, q);
        }
    }

    DEVICE static void add(float* sum, float4 w, float4 x) {
        sum[0] += w.x * x.x;
        sum[1 % chains] += w.y * x.y;
        sum[2 % chains] += w.z * x.z;
        sum[3 % chains] += w.w * x.w;
    }

    // out[g][r]: this slice's part of row g times the numbers at(g, r), in shared memory.
    template <typename At>
    DEVICE void multiply(float (&out)[G][R], At at) {
        float sum[G][R][chains] = {};
#pragma unroll
        for (int q = 0; q < held; q++) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                Four<T>::pin(registers[g][q]);
#pragma unroll
                for (int r = 0; r < R; r++) add(sum[g][r], Four<T>::unpack(registers[g][q]), at(g, r)[q]);
            }
        }
#pragma unroll 2
        for (int q = 0; q < rest; q++) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float4 w = Four<T>::unpack(shared[(g * rest + q) * THREADS]);
#pragma unroll
                for (int r = 0; r < R; r++) add(sum[g][r], w, at(g, r)[held + q]);
            }
        }
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                out[g][r] = sum[g][r][0];
#pragma unroll
                for (int k = 1; k < chains; k++) out[g][r] += sum[g][r][k];
            }
        }
    }
};

// ---- where a thread is: unit j, slice s, and of the tile's sequences those that it owns, r = s, s + S, ...

template <int HP, int S, int R>
struct Tile {
    static constexpr int mine = (R + S - 1) / S;
    int j, s, d, longest;
    bool back;
    int row[mine];   // its sequence, or -1
    int ends[mine];  // its length

    DEVICE Tile(int T_, int B, int H, int reverse, const int* lengths, const int* order) {
        j = threadIdx.x % HP;
        s = threadIdx.x / HP;
        d = blockIdx.z;
        back = reverse >> d & 1;
        longest = 0;
        for (int r = 0; r < R; r++) {
            const int place = blockIdx.x * R + r;
            if (place >= B) break;
            const int length = lengths ? lengths[order ? order[place] : place] : T_;
            longest = length > longest ? length : longest;
        }
#pragma unroll
        for (int k = 0; k < mine; k++) {
            const int r = s + k * S, place = blockIdx.x * R + r;
            const bool here = r < R && place < B && j < H;
            row[k] = !here ? -1 : order ? order[place] : place;
            ends[k] = !here ? 0 : lengths ? lengths[row[k]] : T_;
        }
    }
};

// ---- forward

template <template <typename> class CellOf, typename T, int HP, int S, int KREG, int R>
__global__ void __launch_bounds__(HP * S, 1) block_forward(
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
    constexpr int G = Cell::gates, KS = HP / S, threads = HP * S;
    typedef Weights<T, G, KS, KREG, R, threads> Mine;
    typedef Tile<HP, S, R> Place;
    extern __shared__ float4 memory[];
    float* box = (float*)memory;                                 // [R, HP]: h
    float* parts = box + R * HP;                                 // [S, G, R, HP]: sums of the slices
    auto* rest = (typename Mine::four*)(parts + S * G * R * HP);

    const Place at(T_, B, H, reverse, lengths, order);
    const int j = at.j, s = at.s, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)at.d * G * H * H;
    Mine weights;
    weights.template load<true>((typename Mine::four*)memory, rest, [&](int thread, int g, int k) {
        const int row = thread % HP, column = thread / HP * KS + k;
        return load_four(W_hh + ((size_t)g * H + row) * H + column, 1, row < H ? H - column : 0, H % 4 == 0);
    });

    const size_t slot = (size_t)B * H;
    const size_t first = ((size_t)at.d * (T_ + 1) + (at.back ? T_ : 0)) * slot;
    const size_t first_c = keep ? first : (size_t)at.d * 2 * slot;
    float h_old[Place::mine], c_old[Place::mine], bias_a[G], bias_r[G], ax[Place::mine][G];
#pragma unroll
    for (int g = 0; g < G; g++) {
        const bool there = bias_ih && j < H;
        bias_a[g] = there ? bias_ih[((size_t)at.d * G + g) * H + j] : 0.0f;
        bias_r[g] = there ? bias_hh[((size_t)at.d * G + g) * H + j] : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < Place::mine; k++) {
        const size_t n = (size_t)at.row[k] * H + j;
        const bool there = at.row[k] >= 0;
        h_old[k] = there ? float(h[first + n]) : 0.0f;
        c_old[k] = there && Cell::states == 2 ? c[first_c + n] : 0.0f;
        if (s + k * S < R) box[(s + k * S) * HP + j] = h_old[k];
    }
    __syncthreads();

    for (int step = 0; step < T_; step++) {
        const int t = at.back ? T_ - 1 - step : step;
        if (t < at.longest) {
#pragma unroll
            for (int k = 0; k < Place::mine; k++) {  // asked for before the product, there behind it
                const bool there = t < at.ends[k];
                const T* row = gates + (((size_t)at.d * T_ + t) * B + (there ? at.row[k] : 0)) * W * H + j;
#pragma unroll
                for (int g = 0; g < G; g++) ax[k][g] = there ? float(row[(size_t)g * H]) : 0.0f;
            }
            float part[G][R];
            weights.multiply(part, [&](int g, int r) { return (const float4*)(box + r * HP + s * KS); });
#pragma unroll
            for (int g = 0; g < G; g++) {
#pragma unroll
                for (int r = 0; r < R; r++) parts[((s * G + g) * R + r) * HP + j] = part[g][r];
            }
            __syncthreads();
        }
#pragma unroll
        for (int k = 0; k < Place::mine; k++) {
            if (at.row[k] < 0) continue;
            const int r = s + k * S;
            const size_t n = (size_t)at.row[k] * H + j;
            const bool live = t < at.ends[k];
            float kept[Cell::kept + 1];
            if (live) {
                float a[G], ah[G], h_new, c_new;
#pragma unroll
                for (int g = 0; g < G; g++) {
                    ah[g] = bias_r[g];
                    for (int slice = 0; slice < S; slice++) ah[g] += parts[((slice * G + g) * R + r) * HP + j];
                    a[g] = ax[k][g] + bias_a[g];
                }
                Cell::forward(a, ah, h_old[k], c_old[k], kept, h_new, c_new);
                h_old[k] = float(T(h_new));  // the state is what is stored
                if (Cell::states == 2) c_old[k] = c_new;
                box[r * HP + j] = h_old[k];
            }
            output[((size_t)t * B + at.row[k]) * D * H + (size_t)at.d * H + j] = T(live ? h_old[k] : 0.0f);
            const bool last = step == T_ - 1;
            if (keep || last) {
                const size_t now = ((size_t)at.d * (T_ + 1) + (at.back ? t : t + 1)) * slot + n;
                h[now] = T(h_old[k]);
                if (Cell::states == 2) c[keep ? now : ((size_t)at.d * 2 + T_ % 2) * slot + n] = c_old[k];
            }
            if (keep && live) {
                T* row = gates + (((size_t)at.d * T_ + t) * B + at.row[k]) * W * H + j;
#pragma unroll
                for (int g = 0; g < Cell::kept; g++) row[(size_t)g * H] = T(kept[g]);
            }
        }
        __syncthreads();
    }
}

// ---- backward: its mirror. Here thread (j, s) has the column j of W_hh, for the rows of slice s.

template <template <typename> class CellOf, typename T, int HP, int S, int KREG, int R>
__global__ void __launch_bounds__(HP * S, 1) block_backward(
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
    constexpr int G = Cell::gates, KS = HP / S, threads = HP * S;
    typedef Weights<T, G, KS, KREG, R, threads> Mine;
    typedef Tile<HP, S, R> Place;
    extern __shared__ float4 memory[];
    float* box = (float*)memory;             // [R, G, HP]: d
    float* parts = box + R * G * HP;         // [S, R, HP]: sums of the slices
    auto* rest = (typename Mine::four*)(parts + S * R * HP);

    const Place at(T_, B, H, reverse, lengths, order);
    const int j = at.j, s = at.s, D = gridDim.z;
    const T* W_hh = weight_hh + (size_t)at.d * G * H * H;
    Mine weights;
    weights.template load<false>((typename Mine::four*)memory, rest, [&](int thread, int g, int k) {
        const int column = thread % HP, row = thread / HP * KS + k;
        return load_four(W_hh + ((size_t)g * H + row) * H + column, H, column < H ? H - row : 0, false);
    });

    const size_t slot = (size_t)B * H;
    float by_h[Place::mine], by_c[Place::mine];
#pragma unroll
    for (int k = 0; k < Place::mine; k++) {
        const bool there = at.row[k] >= 0;
        const size_t here = (size_t)at.d * slot + (size_t)at.row[k] * H + j;
        by_h[k] = there ? dh[here] : 0.0f;
        by_c[k] = there && Cell::states == 2 ? dc[here] : 0.0f;
    }
    for (int k = threadIdx.x; k < R * G * HP; k += threads) box[k] = 0.0f;  // units past H stay zero
    __syncthreads();

    for (int step = T_ - 1; step >= 0; step--) {
        const int t = at.back ? T_ - 1 - step : step;
#pragma unroll
        for (int k = 0; k < Place::mine; k++) {
            if (at.row[k] < 0) continue;
            const size_t n = (size_t)at.row[k] * H + j;
            const size_t now = ((size_t)at.d * (T_ + 1) + (at.back ? t : t + 1)) * slot + n;
            const size_t old = ((size_t)at.d * (T_ + 1) + (at.back ? t + 1 : t)) * slot + n;
            T* row = gates + (((size_t)at.d * T_ + t) * B + at.row[k]) * W * H + j;
            float leaves[Cell::leaves];
            if (t < at.ends[k]) {
                float kept[Cell::kept + 1];
#pragma unroll
                for (int g = 0; g < Cell::kept; g++) kept[g] = float(row[(size_t)g * H]);
                if (doutput) by_h[k] += float(doutput[((size_t)t * B + at.row[k]) * D * H + (size_t)at.d * H + j]);
                const bool two = Cell::states == 2;
                Cell::backward(kept, float(h[old]), two ? c[old] : 0.0f, float(h[now]), two ? c[now] : 0.0f, by_h[k],
                               by_c[k], leaves);
            } else {
#pragma unroll
                for (int g = 0; g < Cell::leaves; g++) leaves[g] = 0.0f;
            }
#pragma unroll
            for (int g = 0; g < Cell::leaves; g++) row[(size_t)g * H] = T(leaves[g]);
#pragma unroll
            for (int g = 0; g < G; g++) box[((s + k * S) * G + g) * HP + j] = float(T(leaves[g]));
        }
        if (t >= at.longest) continue;  // all of the tile alike
        __syncthreads();
        float part[G][R];
        weights.multiply(part, [&](int g, int r) { return (const float4*)(box + (r * G + g) * HP + s * KS); });
#pragma unroll
        for (int r = 0; r < R; r++) {
            float sum = part[0][r];
#pragma unroll
            for (int g = 1; g < G; g++) sum += part[g][r];
            parts[(s * R + r) * HP + j] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < Place::mine; k++) {
            const int r = s + k * S;
            if (r >= R) continue;
            float sum = 0.0f;
            for (int slice = 0; slice < S; slice++) sum += parts[(slice * R + r) * HP + j];
            by_h[k] += sum;
        }
    }
#pragma unroll
    for (int k = 0; k < Place::mine; k++) {
        if (at.row[k] < 0) continue;
        const size_t here = (size_t)at.d * slot + (size_t)at.row[k] * H + j;
        dh[here] = by_h[k];
        if (Cell::states == 2) dc[here] = by_c[k];
    }
}
