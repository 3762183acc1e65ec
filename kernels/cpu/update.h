// Flat arrays, for one instruction set: the optimizers of ../sums/update.cuh, sums of squares for the gradients' norm, and
// dropout masks. A part of parts.h.

// ---- optimizers

template <typename T> INLINE Vec<T> mul(Vec<T> a, Vec<T> b) { return a.v * b.v; }
template <typename T> INLINE Vec<T> add(Vec<T> a, Vec<T> b) { return a.v + b.v; }
template <typename T> INLINE Vec<T> subtract(Vec<T> a, Vec<T> b) { return a.v - b.v; }
template <typename T> INLINE Vec<T> quotient(Vec<T> a, Vec<T> b) { return a.v / b.v; }
template <typename T> INLINE Vec<T> root(Vec<T> a) { return sqrt(a); }

#include "../sums/update.cuh"

// Calls work(begin, end) on each thread with its range of N elements. Ranges start at multiples of 16 elements, a cache line of
// floats, so that no two threads write to the same line.
template <typename Work>
void on_ranges(ptrdiff_t N, int threads, Work work) {
    const ptrdiff_t lines = (N + 15) / 16;
    on_threads(threads, [&](int thread) {
        work(lines * thread / threads * 16, std::min(N, lines * (thread + 1) / threads * 16));
    });
}

// Rounds N floats to a dtype of 16 bits.
void round_all(const float* numbers, ptrdiff_t N, int dtype, void* to, int threads) {
    on_ranges(N, threads, [&](ptrdiff_t begin, ptrdiff_t end) {
        store_numbers(dtype, numbers + begin, (uint16_t*)to + begin, end - begin);
    });
}

// For each optimizer: `set` reads its scalars, in the order of Update::scalars, and which states exist; `apply` updates
// parameters.
template <typename V>
INLINE void set(Sgd<V>& rule, const double* s, const bool* has) {
    rule = {s[0] != 0, s[1] != 0, has[0], s[5] != 0, V(s[2]), V(s[3]), V(s[4]), V(s[5])};
}
template <typename V>
INLINE void apply(const Sgd<V>& rule, V& p, V g, V* state) {
    rule.update(p, g, state[0]);
}
template <typename V>
INLINE void set(RmsProp<V>& rule, const double* s, const bool* has) {
    rule = {has[1], has[2], s[5] != 0, V(s[0]), V(s[1]), V(s[2]), V(s[3]), V(s[4]), V(s[5]), V(s[6])};
}
template <typename V>
INLINE void apply(const RmsProp<V>& rule, V& p, V g, V* state) {
    rule.update(p, g, state[0], state[1], state[2]);
}
template <typename V>
INLINE void set(Adam<V>& rule, const double* s, const bool* has) {
    rule = {has[2], s[1] != 0, V(s[0]), V(s[1]), V(s[2]), V(s[3]), V(s[4]), V(s[5]), V(s[6]), V(s[7])};
}
template <typename V>
INLINE void apply(const Adam<V>& rule, V& p, V g, V* state) {
    rule.update(p, g, state[0], state[1], state[2]);
}

template <typename T, template <typename> class Rule>
void update_each(const Update& job, int threads) {
    typedef Vec<T> V;
    const bool has[3] = {job.arrays[0] != nullptr, job.arrays[1] != nullptr, job.arrays[2] != nullptr};
    Rule<V> rule;
    set(rule, job.scalars, has);
    on_ranges(job.N, threads, [&](ptrdiff_t begin, ptrdiff_t end) {
        for (ptrdiff_t n = begin; n < end; n += V::lanes) {
            const int count = (int)std::min<ptrdiff_t>(V::lanes, end - n);
            T* params = (T*)job.params + n;
            V p = V::load(params, count), state[3];
            UNROLL for (int k = 0; k < 3; ++k)
                state[k] = has[k] ? V::load((const T*)job.arrays[k] + n, count) : V(0);
            apply(rule, p, V::load((const T*)job.grads + n, count), state);
            p.store(params, count);
            UNROLL for (int k = 0; k < 3; ++k)
                if (has[k]) state[k].store((T*)job.arrays[k] + n, count);
        }
    });
}

template <typename T>
void update_any(const Update& job, int threads) {
    switch (job.rule) {
        case 0: return update_each<T, Sgd>(job, threads);
        case 1: return update_each<T, RmsProp>(job, threads);
        case 2: return update_each<T, Adam>(job, threads);
    }
}

void update(const Update* job, int threads) {
    if (job->is_double)
        update_any<double>(*job, threads);
    else
        update_any<float>(*job, threads);
}

// ---- sums of squares

constexpr int SQUARES = 1 << 12;  // elements whose squares go into one partial sum

// sums[i] = the sum of the squares of the i-th SQUARES elements of N, accumulated in double. The order of the sums does not
// depend on the number of threads.
template <typename T>
void add_squares(const T* values, ptrdiff_t N, double* sums, int threads) {
    typedef Vec<double> D;
    constexpr int vectors = 4, width = vectors * D::lanes;
    static_assert(SQUARES % width == 0, "no round crosses a partial sum");
    const ptrdiff_t chunks = (N + SQUARES - 1) / SQUARES;
    on_threads(threads, [&](int thread) {
        for (ptrdiff_t chunk = chunks * thread / threads; chunk < chunks * (thread + 1) / threads; ++chunk) {
            D totals[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) totals[v] = D(0);
            const ptrdiff_t end = std::min(N, (chunk + 1) * SQUARES);
            for (ptrdiff_t n = chunk * SQUARES; n < end; n += width) {
                const T* from = values + n;
                T padded[width];
                if (end - n < width) {
                    for (int i = 0; i < width; ++i) padded[i] = i < end - n ? from[i] : T(0);
                    from = padded;
                }
                UNROLL for (int v = 0; v < vectors; ++v) {
                    D x;
                    UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = from[v * D::lanes + i];
                    totals[v] += x * x;
                }
            }
            double stored[width], sum = 0;
            UNROLL for (int v = 0; v < vectors; ++v) totals[v].store(stored + v * D::lanes);
            for (int i = 0; i < width; ++i) sum += stored[i];
            sums[chunk] = sum;
        }
    });
}

void add_squares_any(const void* values, ptrdiff_t N, int is_double, double* sums, int threads) {
    if (is_double)
        add_squares((const double*)values, N, sums, threads);
    else
        add_squares((const float*)values, N, sums, threads);
}

// ---- dropout masks

// The shift of byte k of a 32-bit word, counted in the order of memory.
constexpr int byte_shift(int k) {
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return 24 - 8 * k;
#else
    return 8 * k;
#endif
}

// mask[4n + k] = word k of philox(counter (n mod 2^32, n div 2^32, layer, call), key seed) >= threshold: ../sums/dropout.cu.
#if VECTOR_BYTES > 16
// Each 64-bit lane of a vector holds a 32-bit word. Two vectors are computed at once, as each of the ten rounds waits for the
// one before.
void dropout_mask(ptrdiff_t N, uint64_t seed, unsigned layer, unsigned call, uint64_t threshold, bool* mask, int threads) {
    typedef unsigned long long Words __attribute__((vector_size(VECTOR_BYTES)));
    typedef unsigned HalfWords __attribute__((vector_size(VECTOR_BYTES / 2)));
    constexpr int lanes = VECTOR_BYTES / 8, vectors = 2;
    const Words limits = Words{} + threshold, low_half = Words{} + 0xFFFFFFFFull;
    const Words m0 = Words{} + 0xD2511F53ull, m1 = Words{} + 0xCD9E8D57ull;
    Words lane{};
    for (int i = 0; i < lanes; ++i) lane[i] = i;
    const ptrdiff_t groups = (N + 3) / 4;
    on_threads(threads, [=](int thread) {
        const ptrdiff_t end = groups * (thread + 1) / threads;
        for (ptrdiff_t n = groups * thread / threads; n < end; n += vectors * lanes) {
            Words c0[vectors], c1[vectors], c2[vectors], c3[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) {
                const Words group = lane + (unsigned long long)(n + v * lanes);
                c0[v] = group & low_half, c1[v] = group >> 32, c2[v] = Words{} + layer, c3[v] = Words{} + call;
            }
            unsigned k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
            UNROLL for (int round = 0; round < 10; ++round) {
                UNROLL for (int v = 0; v < vectors; ++v) {
                    const Words p0 = (c0[v] & low_half) * m0, p1 = (c2[v] & low_half) * m1;
                    c0[v] = (p1 >> 32) ^ c1[v] ^ k0;
                    c2[v] = (p0 >> 32) ^ c3[v] ^ k1;
                    c1[v] = p1 & low_half;
                    c3[v] = p0 & low_half;
                }
                k0 += 0x9E3779B9u;
                k1 += 0xBB67AE85u;
            }
            UNROLL for (int v = 0; v < vectors; ++v) {
                // four booleans for each group, one byte each, in memory order
                const Words words =
                    (Words)((c0[v] >= limits) & 1 << byte_shift(0)) | (Words)((c1[v] >= limits) & 1 << byte_shift(1)) |
                    (Words)((c2[v] >= limits) & 1 << byte_shift(2)) | (Words)((c3[v] >= limits) & 1 << byte_shift(3));
                const auto bytes = __builtin_convertvector(words, HalfWords);
                const ptrdiff_t first = 4 * (n + v * lanes), count = std::min<ptrdiff_t>(4 * end, N) - first;
                if (count >= 4 * lanes)
                    std::memcpy(mask + first, &bytes, sizeof bytes);
                else if (count > 0)
                    std::memcpy(mask + first, &bytes, count);
            }
        }
    });
}
#else  // 128-bit vectors: one group at a time
#include "../sums/philox.cuh"

void dropout_mask(ptrdiff_t N, uint64_t seed, unsigned layer, unsigned call, uint64_t threshold, bool* mask, int threads) {
    const ptrdiff_t groups = (N + 3) / 4;
    on_threads(threads, [=](int thread) {
        for (ptrdiff_t n = groups * thread / threads; n < groups * (thread + 1) / threads; ++n) {
            unsigned c[4] = {(unsigned)n, (unsigned)((uint64_t)n >> 32), layer, call};
            philox(c, (unsigned)seed, (unsigned)(seed >> 32));
            for (int k = 0; k < 4 && n * 4 + k < N; ++k) mask[n * 4 + k] = c[k] >= threshold;
        }
    });
}
#endif
