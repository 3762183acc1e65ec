// What schedules without tensor cores share: a thread's recurrent weights; and, of others too, its position in a tile of
// sequences.

#include "words.cuh"

// ---- four neighbouring weights in as few registers as possible

template <typename T> struct Vec4;

template <> struct Vec4<float> {
    typedef float4 type;
    static DEVICE type pack(float a, float b, float c, float d) { return make_float4(a, b, c, d); }
    static DEVICE float4 unpack(type w) { return w; }
    static DEVICE void pin(type& w) {}
};

// Weights of 16 bits are converted to float where they are used. `pin` hides their value from the compiler: it would
// otherwise convert all of them once, before the time loop, and they would not fit into registers.
template <typename T> struct Vec4Of16 {
    typedef uint2 type;
    static DEVICE type pack(T a, T b, T c, T d) { return make_uint2(::pack(a, b), ::pack(c, d)); }
    static DEVICE float4 unpack(type w) {
        const float2 low = ::unpack(w.x, T()), high = ::unpack(w.y, T());
        return make_float4(low.x, low.y, high.x, high.y);
    }
    static DEVICE void pin(type& w) { asm volatile("" : "+r"(w.x), "+r"(w.y)); }
};

#if __has_include(<cuda_fp16.h>)
template <> struct Vec4<__half> : Vec4Of16<__half> {};
#endif
#if __has_include(<cuda_bf16.h>)
template <> struct Vec4<__nv_bfloat16> : Vec4Of16<__nv_bfloat16> {};
#endif

// Four numbers, `stride` apart. Only the first `count` exist, the others are 0. aligned: they are neighbours and start at a
// multiple of their size, so that one load reads them.
template <typename T>
DEVICE typename Vec4<T>::type load_vec4(const T* __restrict__ from, int stride, int count, bool aligned) {
    if (aligned && count > 0) return *(const typename Vec4<T>::type*)from;
    T w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) w[i] = i < count ? from[i * stride] : T(0.0f);
    return Vec4<T>::pack(w[0], w[1], w[2], w[3]);
}

// ---- the weights of one thread: G rows, KS columns

template <typename T, int G, int KS, int KREG, int R, int THREADS>
struct Weights {
    typedef typename Vec4<T>::type vec4;
    static constexpr int in_registers = KREG / 4, in_shared = (KS - KREG) / 4;
    static constexpr int chains = G * R >= 4 ? 1 : 4;  // independent sums of one product, to hide latency

    vec4 registers[G][in_registers > 0 ? in_registers : 1];
    vec4* shared;  // [G, in_shared, THREADS]

    // fetch(thread, g, k) returns four weights of a thread, from its column k on. Loads are coalesced: a thread may fetch
    // weights that another thread will hold. Weights pass through `staging` [8, THREADS] on their way into registers: for
    // direct loads the compiler would compute all addresses first, and they do not fit beside the weights. `staging` may
    // overlap anything that is written after this returns.
    template <bool ROWS, typename Fetch>
    DEVICE void load(vec4* staging, vec4* memory, Fetch fetch) {
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
            for (int from = 0; from < in_registers; from += 8) {
                const int count = in_registers - from < 8 ? in_registers - from : 8;
                copy_to_shared<ROWS>(staging, count, [&](int thread, int q) { return fetch(thread, g, 4 * (from + q)); });
                __syncthreads();
#pragma unroll
                for (int q = 0; q < 8; q++) {
                    if (from + q < in_registers) registers[g][from + q] = staging[q * THREADS + threadIdx.x];
                }
                __syncthreads();
            }
        }
        for (int g = 0; g < G && in_shared; g++) {
            copy_to_shared<ROWS>(memory + g * in_shared * THREADS, in_shared,
                        [&](int thread, int q) { return fetch(thread, g, KREG + 4 * q); });
        }
        shared = memory + threadIdx.x;
    }

    // to [count, THREADS] = fetch(thread, q). ROWS: a thread's weights are neighbours in memory, and a warp fetches 4
    // vectors for each of 8 threads. Otherwise the weights of neighbouring threads are neighbours.
    template <bool ROWS, typename Fetch>
    DEVICE static void copy_to_shared(vec4* to, int count, Fetch fetch) {
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

    // out[g][r], g < G: this slice's columns of row g times the numbers at operand(g, r) in shared memory.
    template <int SUMS, typename Operand>
    DEVICE void multiply(float (&out)[SUMS][R], Operand operand) {
        float sum[G][R][chains] = {};
#pragma unroll
        for (int q = 0; q < in_registers; q++) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                Vec4<T>::pin(registers[g][q]);
#pragma unroll
                for (int r = 0; r < R; r++) add(sum[g][r], Vec4<T>::unpack(registers[g][q]), operand(g, r)[q]);
            }
        }
#pragma unroll 2
        for (int q = 0; q < in_shared; q++) {
#pragma unroll
            for (int g = 0; g < G; g++) {
                const float4 w = Vec4<T>::unpack(shared[(g * in_shared + q) * THREADS]);
#pragma unroll
                for (int r = 0; r < R; r++) add(sum[g][r], w, operand(g, r)[in_registers + q]);
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

    // The transposed product, where a vector holds four columns of one row. out[r]: four sums over this thread's rows, of
    // weights times the numbers at operand(r).
    template <typename Operand>
    DEVICE void multiply_transposed(float4 (&out)[R], Operand operand) {
        static_assert(G == 1 && in_registers % 4 == 0 && in_shared % 4 == 0, "one set of rows, in fours");
#pragma unroll
        for (int r = 0; r < R; r++) out[r] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
        for (int q = 0; q < in_registers; q += 4) {
#pragma unroll
            for (int i = 0; i < 4; i++) Vec4<T>::pin(registers[0][q + i]);
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float4 x = operand(r)[q / 4];
#pragma unroll
                for (int i = 0; i < 4; i++) add(out[r], Vec4<T>::unpack(registers[0][q + i]), pick(x, i));
            }
        }
#pragma unroll 1
        for (int q = 0; q < in_shared; q += 4) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float4 x = operand(r)[(in_registers + q) / 4];
#pragma unroll
                for (int i = 0; i < 4; i++) add(out[r], Vec4<T>::unpack(shared[(q + i) * THREADS]), pick(x, i));
            }
        }
    }

    DEVICE static void add(float4& sum, float4 w, float x) {
        sum.x += w.x * x;
        sum.y += w.y * x;
        sum.z += w.z * x;
        sum.w += w.w * x;
    }

    DEVICE static float pick(float4 x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
};

// ---- a thread with one unit, as LanePosition in block_mma.cu has two

struct OneUnit {
    static constexpr int units = 1;
    template <typename T> using Stored = T;
    DEVICE static constexpr bool has(int, int) { return true; }
    template <typename T> DEVICE static T load(const T* from, int) { return *from; }
    template <typename T> DEVICE static float number(T stored, int, T) { return float(stored); }
    template <typename T> DEVICE static T stored(const float (&x)[1], T) { return T(x[0]); }
    template <typename T> DEVICE static void store(T* to, T stored, int) { *to = stored; }
};

// ---- a thread's position: unit j, slice s, and the sequences of the tile that it owns, r = s, s + S, ...

template <int HP, int S, int R>
struct TilePosition : OneUnit {
    static constexpr int rows = R, slices = S, per_thread = (R + S - 1) / S;
    static constexpr int warps = HP / 32, apart = 1, working = HP / 32 * (R < S ? R : S);  // as means.cuh has them
    int j, s, d, count, longest;
    bool reversed;
    int sequence[per_thread];  // index in the batch, or -1
    int length[per_thread];    // 0 where there is none

    // unit: the first one of the thread block.
    DEVICE TilePosition(
        int T_, int B, int H, int tile, int unit, int d_, int reverse, const int* lengths, const int* order)
    {
        j = unit + threadIdx.x % HP;
        s = threadIdx.x / HP;
        d = d_;
        reversed = reverse >> d & 1;
        count = B - tile * R < R ? B - tile * R : R;
        longest = 0;
        for (int r = 0; r < R; r++) {
            const int rank = tile * R + r;
            if (rank >= B) break;
            const int steps = lengths ? lengths[order ? order[rank] : rank] : T_;
            longest = steps > longest ? steps : longest;
        }
#pragma unroll
        for (int k = 0; k < per_thread; k++) {
            const int r = s + k * S, rank = tile * R + r;
            const bool valid = r < R && rank < B && j < H;
            sequence[k] = !valid ? -1 : order ? order[rank] : rank;
            length[k] = !valid ? 0 : lengths ? lengths[sequence[k]] : T_;
        }
    }
};
