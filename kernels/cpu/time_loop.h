// The walk through time of one layer on the CPU, for one kind of processor: api.cpp includes this text once for each.
//
// A thread walks all of time for its own sequences, so that threads never wait for one another. A step is one product with the
// recurrent weights, packed in the order in which the product reads them, and one pass of the cell over the units; the products
// of the input are made some steps ahead. A single step alone reads its weights where they stand. Bits are equal for any number
// of threads, and for a sequence in any batch.

#include "vector.h"

#include "gemm.h"

#include "../common.cuh"

#include "update.h"

#include "loss.h"

#include "../cells/all.cuh"

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
    // W_ih x of some steps ahead: a product with many rows is quicker, and what it leaves stays in cache until it is used
    std::vector<T> inputs;
    std::vector<int> first;  // where in `inputs` the rows of each of these steps begin
    int begin, end;          // the blocks of units that are this thread's

    // The part-th of `parts` shares: sequences of every length for everybody.
    Share(const Pass& pass, int part, int parts, size_t product_row, int begin, int end) : begin(begin), end(end) {
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
    static constexpr bool reset = C::first_product_gates > 0;       // the original GRU: r acts on h before a second product
    static constexpr int F = reset ? C::first_product_gates : G;    // gates of the first product
    static constexpr int U = F > 1 ? 1 : 2;

    const Pass& pass;
    const int T_, B, H, P;
    const bool back;
    static constexpr int IU = G > 1 ? 1 : 2, AHEAD = 48;     // rows of x multiplied at once, about
    Packed<T, G, IU> input;                                  // W_ih
    Packed<T, F, U> hidden;                                  // W_hh, or the rows of r and z
    Packed<T, 1, 2> second, outward;                         // W_n of the original GRU; W_hr of a projection
    Packed<T, 1, 2> hidden_back, second_back, outward_back;  // the same for the way back, transposed
    AlignedBuffer<T> memory;
    size_t product_row = 0;

    Layer(const Pass& pass, bool back)
        : pass(pass), T_(pass.T), B(pass.B), H(pass.H), P(pass.P), back(back), input(H, pass.I), hidden(H, P), second(H, P),
          outward(P, H), hidden_back(P, F * H), second_back(P, H), outward_back(H, P) {
        size_t size = 0;
        for_each([&](auto& packed, const T* from, ptrdiff_t gate, ptrdiff_t n, ptrdiff_t k) {
            packed.from = from, packed.gate_stride = gate, packed.n_stride = n, packed.k_stride = k;
            packed.once = T_ == 1 && k == 1;
            size += packed.size();
            product_row = std::max(product_row, packed.row());
        });
        memory = AlignedBuffer<T>(size);
        T* next = memory.begin();
        for_each([&](auto& packed, auto...) { packed.values = next, next += packed.size(); });
    }

    // work(packed, source, stride of a gate, of an output, of a column) for each product of this way through time.
    template <typename Work>
    void for_each(Work work) {
        const T *hh = (const T*)pass.weight_hh, *hr = (const T*)pass.weight_hr;
        const ptrdiff_t h = H, p = P, one = 1, none = 0;
        if (!back) {
            work(input, (const T*)pass.weight_ih, h * pass.I, (ptrdiff_t)pass.I, one);
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
        for_each([&](auto& packed, auto...) {
            for (int block = part; block < packed.blocks && !packed.once; block += parts) packed.pack(block);
        });
    }

    void run(int part, int parts) {
        // A single step is shared by units, so that each weight is read by one thread, where none has to wait for another's.
        const bool by_units = T_ == 1 && !back && !reset && !pass.weight_hr;
        const int blocks = hidden.blocks, begin = by_units ? blocks * part / parts : 0;
        Share<T> mine(pass, by_units ? 0 : part, by_units ? 1 : parts, product_row, begin,
                      by_units ? blocks * (part + 1) / parts : blocks);
        for (int s = 0; s < T_ && !mine.sequences.empty() && mine.begin < mine.end; ++s) {
            const int step = back ? T_ - 1 - s : s;
            const int t = pass.reverse ? T_ - 1 - step : step;
            if (back)
                backward(t, mine);
            else
                forward(t, step, mine);
        }
    }

    // The first of these units, and the one behind the last.
    int begin(const Share<T>& mine) const { return mine.begin * hidden.units; }
    int end(const Share<T>& mine) const { return std::min(H, mine.end * hidden.units); }

    // work(u, n): the units from u on, n of them in a vector.
    template <typename Work>
    INLINE void units(const Share<T>& mine, Work work) const {
        const int end = this->end(mine);
        int u = begin(mine);
        for (; u + V::lanes <= end; u += V::lanes) work(u, V::lanes);
        if (u < end) work(u, end - u);
    }

    T* gates_at(int t, int b) const { return at<T>(pass.gates, pass, pass.save ? t : 0, b, pass.gates_row); }
    // What a projection or the second product reads: m = o tanh(c'), or p = r h.
    T* inner_at(int t, int b) const { return gates_at(t, b) + (size_t)(reset ? 3 : G) * H; }

    // Of a row of products, gate g with a bias [.., H] or none.
    template <int gates, int U_>
    static INLINE V of(const T* row, const T* bias, int H, int g, int u, int n) {
        constexpr int units = U_ * V::lanes;
        const V x = V::load(row + ((size_t)(u / units) * gates + g) * units + u % units);
        return bias ? x + V::load(bias + (size_t)g * H + u, n) : x;
    }

    // The products of the input for this step and the next ones of the walk.
    void multiply_inputs(int step, Share<T>& mine) {
        const int size = (int)mine.sequences.size(), steps = std::min(T_ - step, (AHEAD + size - 1) / size);
        std::vector<const T*> rows;
        mine.first.clear();
        for (int s = step; s < step + steps; ++s) {
            const int t = pass.reverse ? T_ - 1 - s : s;
            mine.first.push_back((int)rows.size());
            for (int i = 0; i < mine.active(pass, t); ++i)
                rows.push_back(at<T>((void*)pass.x, pass, t, mine.sequences[i], pass.I));
        }
        mine.inputs.resize(std::max(mine.inputs.size(), rows.size() * input.row()));
        static_assert(IU == U, "a block of both products has the same units");
        if (!rows.empty()) product(input, mine.begin, mine.end, (int)rows.size(), rows.data(), mine.inputs.data());
    }

    // ---- a step forward

    void forward(int t, int step, Share<T>& mine) {
        const int old_slot = pass.reverse ? t + 1 : t, new_slot = pass.reverse ? t : t + 1;
        const int c_old = pass.save ? old_slot : step % 2, c_new = pass.save ? new_slot : 1 - step % 2;
        const int count = mine.active(pass, t), size = (int)mine.sequences.size();
        const T *bias_ih = (const T*)pass.bias_ih, *bias_hh = (const T*)pass.bias_hh;
        const int ahead = (AHEAD + size - 1) / size;
        if (step % ahead == 0) multiply_inputs(step, mine);
        const T* inputs = mine.inputs.data() + mine.first[step % ahead] * input.row();
        for (int i = 0; i < count; ++i) mine.rows[i] = at<T>(pass.h, pass, old_slot, mine.sequences[i], P);
        product(hidden, mine.begin, mine.end, count, mine.rows.data(), mine.products.data());
        if constexpr (reset) {
            for (int i = 0; i < count; ++i) {
                const int b = mine.sequences[i];
                T *gates = gates_at(t, b), *inner = inner_at(t, b);
                const T *ax_row = inputs + i * input.row(), *ah_row = mine.products.data() + i * hidden.row();
                const T* h_old = mine.rows[i];
                units(mine, [&](int u, int n) {
                    V ax[2], ah[2], r, z, p;
                    for (int g = 0; g < 2; ++g) {
                        ax[g] = of<G, IU>(ax_row, bias_ih, H, g, u, n);
                        ah[g] = of<F, U>(ah_row, bias_hh, H, g, u, n);
                    }
                    C::reset(ax, ah, V::load(h_old + u, n), r, z, p);
                    r.store(gates + u, n);
                    z.store(gates + H + u, n);
                    p.store(inner + u, n);
                });
                mine.rows[i] = inner;
            }
            product(second, count, mine.rows.data(), mine.products.data());
        }
        for (int i = 0; i < count; ++i) {
            const int b = mine.sequences[i];
            T *gates = gates_at(t, b), *h_new = at<T>(pass.h, pass, new_slot, b, P);
            const T* c_from = pass.c ? at<T>(pass.c, pass, c_old, b, H) : nullptr;
            T* c_to = pass.c ? at<T>(pass.c, pass, c_new, b, H) : nullptr;
            T* m = pass.weight_hr ? inner_at(t, b) : h_new;
            const T* h_old = at<T>(pass.h, pass, old_slot, b, P);
            const T* ax_row = inputs + i * input.row();
            const T* ah_row = mine.products.data() + i * (reset ? second.row() : hidden.row());
            units(mine, [&](int u, int n) {
                V ax[G], ah[G], saved[4], h(T(0)), c(T(0)), h_before(T(0)), c_before(T(0));
                if constexpr (reset) {  // r and z stand activated in their place
                    load_each<2>(ax, gates, H, u, n);
                    ax[2] = of<G, IU>(ax_row, bias_ih, H, 2, u, n);
                    ah[2] = V::load(ah_row + u);
                    if (bias_hh) ah[2] += V::load(bias_hh + (size_t)2 * H + u, n);
                } else {
                    for (int g = 0; g < G; ++g) {
                        ax[g] = of<G, IU>(ax_row, bias_ih, H, g, u, n);
                        ah[g] = of<F, U>(ah_row, bias_hh, H, g, u, n);
                    }
                }
                if (G == 3) h_before = V::load(h_old + u, n);  // the GRU's; P = H
                if (c_from) c_before = V::load(c_from + u, n);
                C::forward(ax, ah, h_before, c_before, saved, h, c);
                h.store(m + u, n);
                if (c_to) c.store(c_to + u, n);
                if (pass.save) store_each<C::saved_blocks>(saved, gates, H, u, n);
            });
            mine.rows[i] = m;
        }
        if (pass.weight_hr) {
            product(outward, count, mine.rows.data(), mine.products.data());
            for (int i = 0; i < count; ++i) {
                T* h_new = at<T>(pass.h, pass, new_slot, mine.sequences[i], P);
                std::memcpy(h_new, mine.products.data() + i * outward.row(), P * sizeof(T));
            }
        }
        const bool whole_rows = mine.end == hidden.blocks;  // of several threads with the same sequences the last
        for (int i = count; i < size && whole_rows; ++i) {  // past its end the state is held; what weights multiply is zero
            const int b = mine.sequences[i];
            std::memcpy(at<T>(pass.h, pass, new_slot, b, P), at<T>(pass.h, pass, old_slot, b, P), P * sizeof(T));
            if (pass.c) std::memcpy(at<T>(pass.c, pass, c_new, b, H), at<T>(pass.c, pass, c_old, b, H), H * sizeof(T));
            if (pass.save && (reset || pass.weight_hr)) std::memset(inner_at(t, b), 0, H * sizeof(T));
        }
        for (int i = 0; i < size && pass.output; ++i) {
            const int b = mine.sequences[i];
            T* to = at<T>(pass.output, pass, t, b, pass.output_row);
            const int from = begin(mine), behind = whole_rows ? P : end(mine);
            if (i < count)
                std::memcpy(to + from, at<T>(pass.h, pass, new_slot, b, P) + from, (behind - from) * sizeof(T));
            else
                std::memset(to + from, 0, (behind - from) * sizeof(T));
        }
    }

    // ---- a step back, the mirror of forward: dh and dc by the new state become those by the old one

    void backward(int t, Share<T>& mine) {
        const int old_slot = pass.reverse ? t + 1 : t, new_slot = pass.reverse ? t : t + 1;
        const int count = mine.active(pass, t), size = (int)mine.sequences.size();
        for (int i = count; i < size; ++i) {
            const int b = mine.sequences[i];
            std::memset(gates_at(t, b), 0, (size_t)C::preactivations * H * sizeof(T));
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
            T *gates = gates_at(t, b), *dc = pass.dc ? (T*)pass.dc + (size_t)b * H : nullptr;
            T* dm = pass.weight_hr ? mine.products.data() + i * outward_back.row() : (T*)pass.dh + (size_t)b * P;
            const T *h_old = at<T>(pass.h, pass, old_slot, b, P), *h_new = at<T>(pass.h, pass, new_slot, b, P);
            const T* c_old = pass.c ? at<T>(pass.c, pass, old_slot, b, H) : nullptr;
            const T* c_new = pass.c ? at<T>(pass.c, pass, new_slot, b, H) : nullptr;
            units(mine, [&](int u, int n) {
                V saved[4], d[4], by_h = V::load(dm + u, n), by_c(T(0)), h0(T(0)), h1(T(0)), c0(T(0)), c1(T(0));
                load_each<C::saved_blocks>(saved, gates, H, u, n);
                if (c_old) c0 = V::load(c_old + u, n), c1 = V::load(c_new + u, n), by_c = V::load(dc + u, n);
                else h0 = V::load(h_old + u, n), h1 = V::load(h_new + u, n);
                C::backward(saved, h0, c0, h1, c1, by_h, by_c, d);
                store_each<C::preactivations>(d, gates, H, u, n);
                if (dc) by_c.store(dc + u, n);
                if (!pass.weight_hr) by_h.store(dm + u, n);
            });
            mine.rows[i] = reset ? gates + (size_t)2 * H : gates;
        }
        if constexpr (reset) {
            product(second_back, count, mine.rows.data(), mine.products.data());
            for (int i = 0; i < count; ++i) {
                const int b = mine.sequences[i];
                T *gates = gates_at(t, b), *dh = (T*)pass.dh + (size_t)b * P;
                const T *d_p = mine.products.data() + i * second_back.row(), *h_old = at<T>(pass.h, pass, old_slot, b, P);
                units(mine, [&](int u, int n) {
                    V by_h = V::load(dh + u, n), d_r;
                    C::reset_backward(V::load(gates + u, n), V::load(h_old + u, n), V::load(d_p + u, n), by_h, d_r);
                    d_r.store(gates + u, n);
                    by_h.store(dh + u, n);
                });
                mine.rows[i] = gates;
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
void run_layer(const Pass* passes, int directions, int threads, bool back) {
    std::vector<std::unique_ptr<Layer<T, Cell>>> layers;
    layers.reserve(directions);
    for (int d = 0; d < directions; ++d) layers.emplace_back(new Layer<T, Cell>(passes[d], back));
    Barrier packed(threads);
    on_threads(threads, [&](int thread) {
        for (auto& layer : layers) layer->pack(thread, threads);
        packed.wait();
        // with as many threads as directions each has one to itself, and its weights are read by one processor only
        const int parts = threads % directions ? threads : threads / directions;
        for (int job = thread; job < directions * parts; job += threads)
            layers[job % directions]->run(job / directions, parts);
    });
}

template <typename T>
void run_cell(const Pass* passes, int directions, int threads, bool back) {
    switch (passes->cell) {
        case 0: return run_layer<T, RnnTanh>(passes, directions, threads, back);
        case 1: return run_layer<T, RnnRelu>(passes, directions, threads, back);
        case 2: return run_layer<T, LstmCell>(passes, directions, threads, back);
        case 3: return run_layer<T, GruCell>(passes, directions, threads, back);
        case 4: return run_layer<T, GruOriginal>(passes, directions, threads, back);
    }
}

void time_loop(const Pass* passes, int directions, int threads, bool back) {
    if (passes->is_double)
        run_cell<double>(passes, directions, threads, back);
    else
        run_cell<float>(passes, directions, threads, back);
}
