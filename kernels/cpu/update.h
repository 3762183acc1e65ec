// What follows the gradients, for one kind of processor: the optimisers of ../update.cuh, and the global norm. A part of walk.h.

template <typename T> INLINE Vec<T> mul(Vec<T> a, Vec<T> b) { return a.v * b.v; }
template <typename T> INLINE Vec<T> add(Vec<T> a, Vec<T> b) { return a.v + b.v; }
template <typename T> INLINE Vec<T> subtract(Vec<T> a, Vec<T> b) { return a.v - b.v; }
template <typename T> INLINE Vec<T> quotient(Vec<T> a, Vec<T> b) { return a.v / b.v; }
template <typename T>
INLINE Vec<T> root(Vec<T> a) {
    UNROLL for (int i = 0; i < Vec<T>::lanes; ++i) a.v[i] = std::sqrt(a.v[i]);
    return a;
}

#include "../update.cuh"

// work(begin, end) on so many threads: parts of N numbers that end where a cache line does.
template <typename Work>
void on_parts(ptrdiff_t N, int threads, Work work) {
    const ptrdiff_t lines = (N + 15) / 16;
    on_threads(threads, [&](int thread) {
        work(lines * thread / threads * 16, std::min(N, lines * (thread + 1) / threads * 16));
    });
}

// Each optimiser: what it is told, and its step.
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
    on_parts(job.N, threads, [&](ptrdiff_t begin, ptrdiff_t end) {
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
    if (job->wide)
        update_any<double>(*job, threads);
    else
        update_any<float>(*job, threads);
}

// sums[i] = the squares of the i-th SQUARES numbers of N, added up in double: one order, whatever the threads.
template <typename T>
void add_squares(const T* numbers, ptrdiff_t N, double* sums, int threads) {
    typedef Vec<double> D;
    constexpr int vectors = 4, width = vectors * D::lanes;
    static_assert(SQUARES % width == 0, "whole rounds");
    const ptrdiff_t chunks = (N + SQUARES - 1) / SQUARES;
    on_threads(threads, [&](int thread) {
        for (ptrdiff_t chunk = chunks * thread / threads; chunk < chunks * (thread + 1) / threads; ++chunk) {
            D total[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) total[v] = D(0);
            const ptrdiff_t end = std::min(N, (chunk + 1) * SQUARES);
            for (ptrdiff_t n = chunk * SQUARES; n < end; n += width) {
                const T* from = numbers + n;
                T rest[width];
                if (end - n < width) {
                    for (int i = 0; i < width; ++i) rest[i] = i < end - n ? from[i] : T(0);
                    from = rest;
                }
                UNROLL for (int v = 0; v < vectors; ++v) {
                    D x;
                    UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = from[v * D::lanes + i];
                    total[v] += x * x;
                }
            }
            double whole[width], sum = 0;
            UNROLL for (int v = 0; v < vectors; ++v) total[v].store(whole + v * D::lanes);
            for (int i = 0; i < width; ++i) sum += whole[i];
            sums[chunk] = sum;
        }
    });
}

void add_squares_any(const void* numbers, ptrdiff_t N, int wide, double* sums, int threads) {
    if (wide)
        add_squares((const double*)numbers, N, sums, threads);
    else
        add_squares((const float*)numbers, N, sums, threads);
}
