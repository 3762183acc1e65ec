// The walk through time of one layer on the CPU, for one kind of processor: walk.cpp includes this text once for each.
//
// A thread walks all of time for its own sequences, so that threads never wait for one another. A step is one product with the
// recurrent weights, which lie packed in the order in which the product reads them, and one pass of the cell over the units.
// Sums run over k in one order, whatever the threads and the batch: equal bits for any number of threads.

#include "vector.h"

#include "../common.cuh"

#include "../cells/gru.cuh"
#include "../cells/lstm.cuh"
#include "../cells/rnn.cuh"

constexpr int KC = 256;  // columns of a product at a time: their weights stay in the first cache, and sums of sums are more exact

// ---- products: out = A B^T, rows of A anywhere in memory, B packed
//
// A block of B is G x U vectors of outputs: U vectors of neighbouring units for each of G gates, gate outermost. Packed, a
// block is [K][G][U][lanes], with zeros for the units past the end.

template <typename T, int G, int U>
struct Packed {
    static constexpr int lanes = Vec<T>::lanes, units = U * lanes, width = G * units;
    int N, K, blocks;
    T* values;

    // N outputs of each gate, K columns.
    Packed(int N, int K) : N(N), K(K), blocks((N + units - 1) / units), values(nullptr) {}

    size_t row() const { return (size_t)blocks * width; }  // of the products
    size_t size() const { return row() * K; }

    // Element (gate, n, k) of the source stands at gate_stride * gate + n_stride * n + k_stride * k.
    void pack(int block, const T* from, ptrdiff_t gate_stride, ptrdiff_t n_stride, ptrdiff_t k_stride) const {
        constexpr int some = 16;  // columns at a time: whole cache lines of rows that may lie a power of two apart
        T* to = values + (size_t)block * K * width;
        if (G == 1 && n_stride == 1 && (block + 1) * units <= N) {
            for (int k = 0; k < K; ++k) std::memcpy(to + (size_t)k * width, from + block * units + k * k_stride, units * sizeof(T));
            return;
        }
        for (int k0 = 0; k0 < K; k0 += some) {
            const int k1 = k0 + some < K ? k0 + some : K;
            for (int g = 0; g < G; ++g)
                for (int i = 0; i < units; ++i) {
                    const int n = block * units + i;
                    const T* row = from + g * gate_stride + n * n_stride;
                    T* place = to + g * units + i;
                    if (n < N)
                        for (int k = k0; k < k1; ++k) place[(size_t)k * width] = row[k * k_stride];
                    else
                        for (int k = k0; k < k1; ++k) place[(size_t)k * width] = T(0);
                }
        }
    }
};

// R rows times K columns of one block, added to what stands in out unless first; numbers of a row lie `step` apart. Unrolled, so
// that sums are registers.
template <typename T, int R, int V>
INLINE void multiply_tile(int K, const T* const* A, int step, const T* B, T* out, size_t out_row, bool first) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> sums[R][V];
    const T* rows[R];
    UNROLL for (int r = 0; r < R; ++r) {
        rows[r] = A[r];
        UNROLL for (int v = 0; v < V; ++v) sums[r][v] = Vec<T>(0);
    }
    for (ptrdiff_t k = 0; k < (ptrdiff_t)K * step; k += step, B += V * lanes) {
        Vec<T> b[V];
        UNROLL for (int v = 0; v < V; ++v) b[v] = Vec<T>::load(B + v * lanes);
        UNROLL for (int r = 0; r < R; ++r) {
            const Vec<T> a(rows[r][k]);
            UNROLL for (int v = 0; v < V; ++v) sums[r][v].v += a.v * b[v].v;
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < V; ++v) {
            T* to = out + r * out_row + v * lanes;
            (first ? sums[r][v] : Vec<T>::load(to) + sums[r][v]).store(to);
        }
}

// As many rows at once as there are registers, by the number of rows.
template <typename T, int R, int V>
INLINE void multiply_rows(int count, int K, const T* const* A, int step, const T* B, T* out, size_t out_row, bool first) {
    if constexpr (R > 0) {
        if (count == R)
            multiply_tile<T, R, V>(K, A, step, B, out, out_row, first);
        else
            multiply_rows<T, R - 1, V>(count, K, A, step, B, out, out_row, first);
    }
}

// Rows go through a product in groups of nearly equal size, at most `most`: a last row alone would be slow.
struct Groups {
    int count, most, number;
    Groups(int count, int most) : count(count), most(most), number((count + most - 1) / most) {}
    int begin(int group) const { return count * group / number; }
    int end(int group) const { return count * (group + 1) / number; }
};

// out[i] = the products of row A[i] with all blocks, [blocks][G][U][lanes]; numbers of a row lie `step` apart. Of columns
// [begin, end) alone, and added to out unless begin is 0: A[i] then starts at column begin.
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int count, const T* const* A, T* out, int step = 1, int begin = 0, int end = -1) {
    constexpr int V = G * U, most = SUMS / V;
    const Groups groups(count, most);
    const T* rows[most];
    if (end < 0) end = B.K;
    for (int block = 0; block < B.blocks; ++block)
        for (int k0 = begin; k0 < end; k0 += KC) {
            const int K = k0 + KC < end ? KC : end - k0;
            const T* values = B.values + ((size_t)block * B.K + k0) * B.width;
            for (int group = 0; group < groups.number; ++group) {
                const int i0 = groups.begin(group), size = groups.end(group) - i0;
                for (int i = 0; i < size; ++i) rows[i] = A[i0 + i] + (ptrdiff_t)(k0 - begin) * step;
                multiply_rows<T, most, V>(size, K, rows, step, values, out + i0 * B.row() + block * B.width, B.row(), k0 == 0);
            }
        }
}

// ---- any product of two matrices

// C = A B, or C += A B, by `threads` threads that share the rows.
template <typename T>
void matmul(const Product& job, int threads) {
    const ptrdiff_t M = job.M, N = job.N, K = job.K;
    Packed<T, 1, 2> B((int)N, (int)K);
    Lines<T> values(B.size());
    B.values = values.begin();
    Meeting packed(threads);
    on_threads(threads, [&](int thread) {
        for (int block = thread; block < B.blocks; block += threads) B.pack(block, (const T*)job.B, 0, job.b_column, job.b_row);
        packed.wait();
        constexpr int R = SUMS / 2, most = 48, some = 1000;  // rows and columns at a time: they stay in the second cache
        const bool upright = job.a_column == 1;
        const ptrdiff_t first = M * thread / threads, last = M * (thread + 1) / threads;
        std::vector<T> turned(upright ? 0 : most * some), out(most * B.row());
        const T* rows[most];
        for (ptrdiff_t m0 = first; m0 < last; m0 += most) {
            const int count = (int)std::min<ptrdiff_t>(last - m0, most);
            const Groups groups(count, R);
            for (ptrdiff_t k0 = 0; k0 < K; k0 += some) {
                const ptrdiff_t columns = std::min<ptrdiff_t>(K - k0, some);
                const T* A = (const T*)job.A + m0 * job.a_row + k0 * job.a_column;
                for (int i = 0; i < count && upright; ++i) rows[i] = A + i * job.a_row;
                for (int group = 0; group < groups.number && !upright; ++group)  // the rows of a group side by side
                    for (int i = groups.begin(group); i < groups.end(group); ++i)
                        rows[i] = turned.data() + group * R * some + i - groups.begin(group);
                for (ptrdiff_t k = 0; k < columns && !upright; ++k) {
                    const T* column = A + k * job.a_column;
                    T* to = turned.data() + k * R;
                    for (int group = 0; group < groups.number; ++group, to += R * some) {
                        const int i0 = groups.begin(group), size = groups.end(group) - i0;
                        if (size == R && job.a_row == 1)
                            std::memcpy(to, column + i0, R * sizeof(T));
                        else
                            for (int i = 0; i < size; ++i) to[i] = column[(i0 + i) * job.a_row];
                    }
                }
                product(B, count, rows, out.data(), upright ? 1 : R, (int)k0, (int)(k0 + columns));
            }
            for (int i = 0; i < count; ++i) {
                T* C = (T*)job.C + (m0 + i) * job.c_row;
                const T* from = out.data() + i * B.row();
                if (job.accumulate)
                    for (ptrdiff_t n = 0; n < N; ++n) C[n] += from[n];
                else
                    std::memcpy(C, from, N * sizeof(T));
            }
        }
    });
}

void multiply(const Product* job, int threads) {
    if (job->wide)
        matmul<double>(*job, threads);
    else
        matmul<float>(*job, threads);
}

// ---- sums over all steps: sums[M] of N rows of M numbers, `row` apart, added up in double

template <typename T>
void add_rows(const T* rows, ptrdiff_t N, int M, ptrdiff_t row, T* sums, int threads) {
    typedef Vec<double> D;
    constexpr int vectors = SUMS / 2, width = vectors * D::lanes;  // columns at a time: whole cache lines
    on_threads(threads, [&](int thread) {
        for (int m0 = width * thread; m0 < M; m0 += width * threads) {
            const int count = M - m0 < width ? M - m0 : width;
            D total[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) total[v] = D(0);
            for (ptrdiff_t n = 0; n < N; ++n) {
                const T* from = rows + n * row + m0;
                T rest[width];
                if (count < width) {
                    for (int m = 0; m < width; ++m) rest[m] = m < count ? from[m] : T(0);
                    from = rest;
                }
                UNROLL for (int v = 0; v < vectors; ++v) {
                    D x;
                    UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = from[v * D::lanes + i];
                    total[v] += x;
                }
            }
            double whole[width];
            UNROLL for (int v = 0; v < vectors; ++v) total[v].store(whole + v * D::lanes);
            for (int m = 0; m < count; ++m) sums[m0 + m] = (T)whole[m];
        }
    });
}

void add_rows_any(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int wide, void* sums, int threads) {
    if (wide)
        add_rows((const double*)rows, N, M, row, (double*)sums, threads);
    else
        add_rows((const float*)rows, N, M, row, (float*)sums, threads);
}

// ---- one layer and direction

// [T, B, F], or [slots, B, F]: the row of step t and sequence b.
template <typename T>
INLINE T* at(void* array, const Pass& pass, int t, int b, ptrdiff_t F) {
    return (T*)array + ((ptrdiff_t)t * pass.B + b) * F;
}

// N vectors, one from each block of H numbers: what a cell takes and leaves for the units from u on.
template <int N, typename T>
INLINE void load_each(Vec<T>* to, const T* row, int H, int u, int n) {
    for (int g = 0; g < N; ++g) to[g] = Vec<T>::load(row + (size_t)g * H + u, n);
}
template <int N, typename T>
INLINE void store_each(const Vec<T>* from, T* row, int H, int u, int n) {
    for (int g = 0; g < N; ++g) from[g].store(row + (size_t)g * H + u, n);
}

// The sequences of one thread, the longest first, and its scratch.
template <typename T>
struct Share {
    std::vector<int> sequences;
    std::vector<const T*> rows;  // what the next product reads
    std::vector<T> products;

    // The part-th of `parts` shares: sequences of every length for everybody.
    Share(const Pass& pass, int part, int parts, size_t product_row) {
        std::vector<int> order(pass.B);
        for (int b = 0; b < pass.B; ++b) order[b] = b;
        if (pass.lengths)
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return pass.lengths[a] > pass.lengths[b]; });
        for (int i = part; i < pass.B; i += parts) sequences.push_back(order[i]);
        rows.resize(sequences.size());
        products.resize(sequences.size() * product_row);
    }

    // How many sequences are not past their end at step t: they stand in front.
    int active(const Pass& pass, int t) const {
        int count = (int)sequences.size();
        while (pass.lengths && count && pass.lengths[sequences[count - 1]] <= t) --count;
        return count;
    }
};

template <typename T, template <typename> class Cell>
struct Layer {
    typedef Vec<T> V;
    typedef Cell<V> C;
    static constexpr int G = C::gates;
    static constexpr bool reset = C::ready > 0;       // the original GRU: r acts on h before a second product
    static constexpr int F = reset ? C::ready : G;    // gates of the first product
    static constexpr int U = F > 1 ? 1 : 2;

    const Pass& pass;
    const int T_, B, H, P;
    const bool back;
    Packed<T, F, U> hidden;                                  // W_hh, or the rows of r and z
    Packed<T, 1, 2> second, outward;                         // W_n of the original GRU; W_hr of a projection
    Packed<T, 1, 2> hidden_back, second_back, outward_back;  // the same for the way back, transposed
    Lines<T> memory;
    size_t product_row = 0;

    Layer(const Pass& pass, bool back)
        : pass(pass), T_(pass.T), B(pass.B), H(pass.H), P(pass.P), back(back), hidden(H, P), second(H, P), outward(P, H),
          hidden_back(P, F * H), second_back(P, H), outward_back(H, P) {
        size_t size = 0;
        for_each([&](auto& packed, auto...) {
            size += packed.size();
            product_row = std::max(product_row, packed.row());
        });
        memory = Lines<T>(size);
        T* next = memory.begin();
        for_each([&](auto& packed, auto...) { packed.values = next, next += packed.size(); });
    }

    // work(packed, source, stride of a gate, of an output, of a column) for each product of this way through time.
    template <typename Work>
    void for_each(Work work) {
        const T *hh = (const T*)pass.weight_hh, *hr = (const T*)pass.weight_hr;
        const ptrdiff_t h = H, p = P, one = 1, none = 0;
        if (!back) {
            work(hidden, hh, h * p, p, one);
            if (reset) work(second, hh + F * h * p, none, p, one);
            if (hr) work(outward, hr, none, h, one);
        } else {
            work(hidden_back, hh, none, one, p);
            if (reset) work(second_back, hh + F * h * p, none, one, p);
            if (hr) work(outward_back, hr, none, one, h);
        }
    }

    void pack(int part, int parts) {
        for_each([&](auto& packed, const T* from, ptrdiff_t gate, ptrdiff_t n, ptrdiff_t k) {
            for (int block = part; block < packed.blocks; block += parts) packed.pack(block, from, gate, n, k);
        });
    }

    void walk(int part, int parts) {
        Share<T> mine(pass, part, parts, product_row);
        for (int s = 0; s < T_ && !mine.sequences.empty(); ++s) {
            const int step = back ? T_ - 1 - s : s;
            const int t = pass.reverse ? T_ - 1 - step : step;
            if (back)
                backward(t, mine);
            else
                forward(t, step, mine);
        }
    }

    // work(u, n): the units from u on, n of them in a vector.
    template <typename Work>
    INLINE void units(Work work) const {
        int u = 0;
        for (; u + V::lanes <= H; u += V::lanes) work(u, V::lanes);
        if (u < H) work(u, H - u);
    }

    T* kept_at(int t, int b) const { return at<T>(pass.kept, pass, t, b, pass.kept_row); }
    // What a projection or the second product reads: m = o tanh(c'), or p = r h.
    T* inner_at(int t, int b) const { return kept_at(t, b) + (size_t)(reset ? 3 : G) * H; }

    static INLINE V biased(const T* row, const T* bias, int n0, int u, int n) {
        const V x = V::load(row + u, n);
        return bias ? x + V::load(bias + n0 + u, n) : x;
    }
    // W h + b_hh of gate g, from a row of the first product.
    INLINE V of_hidden(const T* row, int g, int u, int n) const {
        constexpr int units = U * V::lanes;
        const V x = V::load(row + ((size_t)(u / units) * F + g) * units + u % units);
        return pass.bias_hh ? x + V::load((const T*)pass.bias_hh + (size_t)g * H + u, n) : x;
    }

    // ---- a step forward

    void forward(int t, int step, Share<T>& mine) {
        const int old_slot = pass.reverse ? t + 1 : t, new_slot = pass.reverse ? t : t + 1;
        const int c_old = pass.keep ? old_slot : step % 2, c_new = pass.keep ? new_slot : 1 - step % 2;
        const int count = mine.active(pass, t), size = (int)mine.sequences.size();
        const T *bias_ih = (const T*)pass.bias_ih, *bias_hh = (const T*)pass.bias_hh;
        for (int i = 0; i < count; ++i) mine.rows[i] = at<T>(pass.h, pass, old_slot, mine.sequences[i], P);
        product(hidden, count, mine.rows.data(), mine.products.data());
        if constexpr (reset) {
            for (int i = 0; i < count; ++i) {
                const int b = mine.sequences[i];
                T *kept = kept_at(t, b), *inner = inner_at(t, b);
                const T *ah_row = mine.products.data() + i * hidden.row(), *h_old = mine.rows[i];
                units([&](int u, int n) {
                    V ax[2], ah[2], r, z, p;
                    for (int g = 0; g < 2; ++g) {
                        ax[g] = biased(kept + (size_t)g * H, bias_ih, g * H, u, n);
                        ah[g] = of_hidden(ah_row, g, u, n);
                    }
                    C::reset(ax, ah, V::load(h_old + u, n), r, z, p);
                    r.store(kept + u, n);
                    z.store(kept + H + u, n);
                    p.store(inner + u, n);
                });
                mine.rows[i] = inner;
            }
            product(second, count, mine.rows.data(), mine.products.data());
        }
        for (int i = 0; i < count; ++i) {
            const int b = mine.sequences[i];
            T *kept = kept_at(t, b), *h_new = at<T>(pass.h, pass, new_slot, b, P);
            T *c_from = pass.c ? at<T>(pass.c, pass, c_old, b, H) : nullptr, *c_to = pass.c ? at<T>(pass.c, pass, c_new, b, H) : nullptr;
            T* m = pass.weight_hr ? inner_at(t, b) : h_new;
            const T* h_old = at<T>(pass.h, pass, old_slot, b, P);
            const T* ah_row = mine.products.data() + i * (reset ? second.row() : hidden.row());
            units([&](int u, int n) {
                V ax[G], ah[G], keep[4], h(T(0)), c(T(0)), h_before(T(0)), c_before(T(0));
                if constexpr (reset) {  // r and z stand activated in their place
                    load_each<2>(ax, kept, H, u, n);
                    ax[2] = biased(kept + (size_t)2 * H, bias_ih, 2 * H, u, n);
                    ah[2] = biased(ah_row, nullptr, 0, u, V::lanes);
                    if (bias_hh) ah[2] += V::load(bias_hh + (size_t)2 * H + u, n);
                } else {
                    for (int g = 0; g < G; ++g) {
                        ax[g] = biased(kept + (size_t)g * H, bias_ih, g * H, u, n);
                        ah[g] = of_hidden(ah_row, g, u, n);
                    }
                }
                if (G == 3) h_before = V::load(h_old + u, n);  // the GRU's; P = H
                if (c_from) c_before = V::load(c_from + u, n);
                C::forward(ax, ah, h_before, c_before, keep, h, c);
                h.store(m + u, n);
                if (c_to) c.store(c_to + u, n);
                if (pass.keep) store_each<C::kept>(keep, kept, H, u, n);
            });
            mine.rows[i] = m;
        }
        if (pass.weight_hr) {
            product(outward, count, mine.rows.data(), mine.products.data());
            for (int i = 0; i < count; ++i)
                std::memcpy(at<T>(pass.h, pass, new_slot, mine.sequences[i], P), mine.products.data() + i * outward.row(), P * sizeof(T));
        }
        for (int i = count; i < size; ++i) {  // past its end the state is held; what weights are multiplied with is zero
            const int b = mine.sequences[i];
            std::memcpy(at<T>(pass.h, pass, new_slot, b, P), at<T>(pass.h, pass, old_slot, b, P), P * sizeof(T));
            if (pass.c) std::memcpy(at<T>(pass.c, pass, c_new, b, H), at<T>(pass.c, pass, c_old, b, H), H * sizeof(T));
            if (reset || pass.weight_hr) std::memset(inner_at(t, b), 0, H * sizeof(T));
        }
        for (int i = 0; i < size && pass.output; ++i) {
            const int b = mine.sequences[i];
            T* to = at<T>(pass.output, pass, t, b, pass.output_row);
            if (i < count)
                std::memcpy(to, at<T>(pass.h, pass, new_slot, b, P), P * sizeof(T));
            else
                std::memset(to, 0, P * sizeof(T));
        }
    }

    // ---- a step back, the mirror of forward: dh and dc by the new state become those by the old one

    void backward(int t, Share<T>& mine) {
        const int old_slot = pass.reverse ? t + 1 : t, new_slot = pass.reverse ? t : t + 1;
        const int count = mine.active(pass, t), size = (int)mine.sequences.size();
        for (int i = count; i < size; ++i) {
            const int b = mine.sequences[i];
            std::memset(kept_at(t, b), 0, (size_t)C::leaves * H * sizeof(T));
            if (pass.dh_steps) std::memset(at<T>(pass.dh_steps, pass, t, b, P), 0, P * sizeof(T));
        }
        for (int i = 0; i < count; ++i) {
            const int b = mine.sequences[i];
            T* dh = (T*)pass.dh + (size_t)b * P;
            if (pass.doutput) {
                const T* from = at<T>(pass.doutput, pass, t, b, pass.doutput_row);
                for (int p = 0; p < P; ++p) dh[p] += from[p];
            }
            if (pass.dh_steps) std::memcpy(at<T>(pass.dh_steps, pass, t, b, P), dh, P * sizeof(T));
            mine.rows[i] = dh;
        }
        if (pass.weight_hr) product(outward_back, count, mine.rows.data(), mine.products.data());
        for (int i = 0; i < count; ++i) {
            const int b = mine.sequences[i];
            T *kept = kept_at(t, b), *dc = pass.dc ? (T*)pass.dc + (size_t)b * H : nullptr;
            T* dm = pass.weight_hr ? mine.products.data() + i * outward_back.row() : (T*)pass.dh + (size_t)b * P;
            const T *h_old = at<T>(pass.h, pass, old_slot, b, P), *h_new = at<T>(pass.h, pass, new_slot, b, P);
            const T *c_old = pass.c ? at<T>(pass.c, pass, old_slot, b, H) : nullptr, *c_new = pass.c ? at<T>(pass.c, pass, new_slot, b, H) : nullptr;
            units([&](int u, int n) {
                V keep[4], d[4], by_h = V::load(dm + u, n), by_c(T(0)), h0(T(0)), h1(T(0)), c0(T(0)), c1(T(0));
                load_each<C::kept>(keep, kept, H, u, n);
                if (c_old) c0 = V::load(c_old + u, n), c1 = V::load(c_new + u, n), by_c = V::load(dc + u, n);
                else h0 = V::load(h_old + u, n), h1 = V::load(h_new + u, n);
                C::backward(keep, h0, c0, h1, c1, by_h, by_c, d);
                store_each<C::leaves>(d, kept, H, u, n);
                if (dc) by_c.store(dc + u, n);
                if (!pass.weight_hr) by_h.store(dm + u, n);
            });
            mine.rows[i] = reset ? kept + (size_t)2 * H : kept;
        }
        if constexpr (reset) {
            product(second_back, count, mine.rows.data(), mine.products.data());
            for (int i = 0; i < count; ++i) {
                const int b = mine.sequences[i];
                T *kept = kept_at(t, b), *dh = (T*)pass.dh + (size_t)b * P;
                const T *d_p = mine.products.data() + i * second_back.row(), *h_old = at<T>(pass.h, pass, old_slot, b, P);
                units([&](int u, int n) {
                    V by_h = V::load(dh + u, n), d_r;
                    C::reset_backward(V::load(kept + u, n), V::load(h_old + u, n), V::load(d_p + u, n), by_h, d_r);
                    d_r.store(kept + u, n);
                    by_h.store(dh + u, n);
                });
                mine.rows[i] = kept;
            }
        }
        product(hidden_back, count, mine.rows.data(), mine.products.data());
        for (int i = 0; i < count; ++i) {
            T* dh = (T*)pass.dh + (size_t)mine.sequences[i] * P;
            const T* through = mine.products.data() + i * hidden_back.row();
            if (pass.weight_hr)
                std::memcpy(dh, through, P * sizeof(T));
            else
                for (int p = 0; p < P; ++p) dh[p] += through[p];
        }
    }

    };

// ---- all directions of a layer, on so many threads

template <typename T, template <typename> class Cell>
void walk_layer(const Pass* passes, int directions, int threads, bool back) {
    std::vector<std::unique_ptr<Layer<T, Cell>>> layers;
    for (int d = 0; d < directions; ++d) layers.emplace_back(new Layer<T, Cell>(passes[d], back));
    Meeting packed(threads);
    on_threads(threads, [&](int thread) {
        for (auto& layer : layers) layer->pack(thread, threads);
        packed.wait();
        // with as many threads as directions each has one to itself, and its weights are read by one processor only
        const int parts = threads % directions ? threads : threads / directions;
        for (int job = thread; job < directions * parts; job += threads) layers[job % directions]->walk(job / directions, parts);
    });
}

template <typename T>
void walk_cell(const Pass* passes, int directions, int threads, bool back) {
    switch (passes->cell) {
        case 0: return walk_layer<T, RnnTanh>(passes, directions, threads, back);
        case 1: return walk_layer<T, RnnRelu>(passes, directions, threads, back);
        case 2: return walk_layer<T, LstmCell>(passes, directions, threads, back);
        case 3: return walk_layer<T, GruCell>(passes, directions, threads, back);
        case 4: return walk_layer<T, GruOriginal>(passes, directions, threads, back);
    }
}

void walk(const Pass* passes, int directions, int threads, bool back) {
    if (passes->wide)
        walk_cell<double>(passes, directions, threads, back);
    else
        walk_cell<float>(passes, directions, threads, back);
}
