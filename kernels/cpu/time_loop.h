// The time loop of one layer on the CPU, for one instruction set: api.cpp includes this file once for each.
//
// A thread runs the whole time loop for its own sequences, so threads never wait for one another inside it. A timestep is one
// product with the recurrent weights and one application of the cell to all units. The weights are packed in the order in which
// the product reads them. Input products (W_ih x) are computed for several timesteps at a time. A loop of a single timestep
// reads its weights without packing them. Results have the same bits for any number of threads, and for a sequence in any
// batch.

// each of these uses what the ones before it define
#include "vector.h"
#include "gemm.h"
#include "shard.h"
#include "../common.cuh"
#include "update.h"
#include "loss.h"
#include "../cells/all.cuh"

// ---- one layer and direction

template <typename T, template <typename> class Cell>
struct Layer {
    typedef Vec<T> V;
    typedef Cell<V> C;
    static constexpr int G = C::gates;
    static constexpr bool reset = C::first_product_gates > 0;     // the original GRU: r acts on h before a second product
    static constexpr int F = reset ? C::first_product_gates : G;  // gates of the first product
    static constexpr int U = F > 1 ? 1 : 2, IU = G > 1 ? 1 : 2;   // vectors of units in a block, of W_hh and of W_ih
    static constexpr int AHEAD = 48;  // rows of x in one input product, about

    const Pass& pass;
    const int timesteps, B, H, P;
    const bool is_backward;
    Packed<T, G, IU> input;                    // W_ih
    Packed<T, F, U> hidden;                    // W_hh, or its rows of r and z
    Packed<T, 1, 2> candidate, projection;     // W_n of the original GRU; W_hr of a projection
    // the transposed weights, which the backward pass multiplies by
    Packed<T, 1, 2> hidden_transposed, candidate_transposed, projection_transposed;
    AlignedBuffer<T> memory;
    size_t product_row = 0;  // elements of the longest row of products

    Layer(const Pass& pass, bool is_backward)
        : pass(pass), timesteps(pass.T), B(pass.B), H(pass.H), P(pass.P), is_backward(is_backward), input(H, pass.I),
          hidden(H, P), candidate(H, P), projection(P, H), hidden_transposed(P, F * H), candidate_transposed(P, H),
          projection_transposed(H, P) {
        size_t size = 0;
        for_each_product([&](auto& packed, const T* source, ptrdiff_t gate, ptrdiff_t n, ptrdiff_t k) {
            packed.source = source, packed.gate_stride = gate, packed.n_stride = n, packed.k_stride = k;
            packed.in_place = timesteps == 1 && k == 1;
            size += packed.size();
            product_row = std::max(product_row, packed.row());
        });
        memory = AlignedBuffer<T>(size);
        T* next = memory.begin();
        for_each_product([&](auto& packed, auto...) { packed.values = next, next += packed.size(); });
    }

    // Calls work(packed, source, stride of a gate, of an output, of a column) for each product of this pass.
    template <typename Work>
    void for_each_product(Work work) {
        const T *hh = (const T*)pass.weight_hh, *hr = (const T*)pass.weight_hr;
        const ptrdiff_t h = H, p = P, one = 1, none = 0;
        if (!is_backward) {
            work(input, (const T*)pass.weight_ih, h * pass.I, (ptrdiff_t)pass.I, one);
            work(hidden, hh, h * p, p, one);
            if (reset) work(candidate, hh + F * h * p, none, p, one);
            if (hr) work(projection, hr, none, h, one);
        } else {
            work(hidden_transposed, hh, none, one, p);
            if (reset) work(candidate_transposed, hh + F * h * p, none, one, p);
            if (hr) work(projection_transposed, hr, none, one, h);
        }
    }

    // Packs this thread's blocks of the weights.
    void pack(int thread, int threads) {
        for_each_product([&](auto& packed, auto...) {
            for (int block = thread; block < packed.blocks && !packed.in_place; block += threads) packed.pack(block);
        });
    }

    // Runs the time loop for one of `shards` shards.
    void run(int number, int shards) {
        // Threads divide a single timestep by units: each weight is read by one thread, and no thread waits for another's
        // results.
        const bool by_units = timesteps == 1 && !is_backward && !reset && !pass.weight_hr;
        const int blocks = hidden.blocks, first_block = by_units ? blocks * number / shards : 0;
        Shard<T> shard(pass, by_units ? 0 : number, by_units ? 1 : shards, product_row, first_block,
                       by_units ? blocks * (number + 1) / shards : blocks);
        for (int s = 0; s < timesteps && !shard.sequences.empty() && shard.first_block < shard.end_block; ++s) {
            const int step = is_backward ? timesteps - 1 - s : s;
            const int t = pass.reverse ? timesteps - 1 - step : step;
            if (is_backward)
                backward(t, shard);
            else
                forward(t, step, shard);
        }
    }

    // The units of a shard, [first_unit, end_unit).
    int first_unit(const Shard<T>& shard) const { return shard.first_block * hidden.units; }
    int end_unit(const Shard<T>& shard) const { return std::min(H, shard.end_block * hidden.units); }

    // Calls work(u, n) for each vector of the shard's units: n units from u on.
    template <typename Work>
    INLINE void for_each_vector(const Shard<T>& shard, Work work) const {
        const int end = end_unit(shard);
        int u = first_unit(shard);
        for (; u + V::lanes <= end; u += V::lanes) work(u, V::lanes);
        if (u < end) work(u, end - u);
    }

    T* gates_at(int t, int b) const { return row_at<T>(pass.gates, pass, pass.save ? t : 0, b, pass.gates_row); }
    // What the projection or the second product reads: m = o tanh(c'), or p = r h. It comes after the saved gates.
    T* inner_at(int t, int b) const { return gates_at(t, b) + (size_t)(reset ? 3 : G) * H; }

    // Gate g of a row of products, plus a bias [.., H] that may be null.
    template <int gates, int vectors>
    static INLINE V with_bias(const T* row, const T* bias, int H, int g, int u, int n) {
        constexpr int units = vectors * V::lanes;
        const V x = V::load(row + ((size_t)(u / units) * gates + g) * units + u % units);
        return bias ? x + V::load(bias + (size_t)g * H + u, n) : x;
    }

    // Computes W_ih x for this timestep and the next ones of the loop.
    void multiply_inputs(int step, Shard<T>& shard) {
        const int size = (int)shard.sequences.size(), steps = std::min(timesteps - step, (AHEAD + size - 1) / size);
        std::vector<const T*> rows;
        shard.first_row.clear();
        for (int s = step; s < step + steps; ++s) {
            const int t = pass.reverse ? timesteps - 1 - s : s;
            shard.first_row.push_back((int)rows.size());
            for (int i = 0; i < shard.active(pass, t); ++i)
                rows.push_back(row_at<T>((void*)pass.x, pass, t, shard.sequences[i], pass.I));
        }
        shard.input_products.resize(std::max(shard.input_products.size(), rows.size() * input.row()));
        static_assert(IU == U, "a block of both products has the same units");
        if (!rows.empty())
            product(input, shard.first_block, shard.end_block, (int)rows.size(), rows.data(), shard.input_products.data());
    }

    // ---- one timestep forward

    // The slots of h and c, the number of sequences that have this timestep, and their rows of W_ih x.
    struct Step {
        int t, old_slot, new_slot, old_c_slot, new_c_slot, count;
        const T* inputs;
    };

    void forward(int t, int number, Shard<T>& shard) {
        Step step;
        step.t = t, step.old_slot = pass.reverse ? t + 1 : t, step.new_slot = pass.reverse ? t : t + 1;
        step.old_c_slot = pass.save ? step.old_slot : number % 2, step.new_c_slot = pass.save ? step.new_slot : 1 - number % 2;
        step.count = shard.active(pass, t);
        const int size = (int)shard.sequences.size(), ahead = (AHEAD + size - 1) / size;
        if (number % ahead == 0) multiply_inputs(number, shard);
        step.inputs = shard.input_products.data() + shard.first_row[number % ahead] * input.row();
        for (int i = 0; i < step.count; ++i) shard.operands[i] = row_at<T>(pass.h, pass, step.old_slot, shard.sequences[i], P);
        product(hidden, shard.first_block, shard.end_block, step.count, shard.operands.data(), shard.products.data());
        if constexpr (reset) apply_reset(step, shard);
        apply_cell(step, shard);
        if (pass.weight_hr) project(step, shard);
        // Where threads share the units of the same sequences, the last one holds their states.
        const bool has_last_unit = shard.end_block == hidden.blocks;
        if (has_last_unit) hold_states(step, shard);
        if (pass.output) write_output(step, shard, first_unit(shard), has_last_unit ? P : end_unit(shard));
    }

    // The original GRU: computes r, z and p = r h, then the second product, W_n p.
    void apply_reset(const Step& step, Shard<T>& shard) {
        const T *bias_ih = (const T*)pass.bias_ih, *bias_hh = (const T*)pass.bias_hh;
        for (int i = 0; i < step.count; ++i) {
            const int b = shard.sequences[i];
            T *gates = gates_at(step.t, b), *p_row = inner_at(step.t, b);
            const T *ax_row = step.inputs + i * input.row(), *ah_row = shard.products.data() + i * hidden.row();
            const T* h_old = shard.operands[i];
            for_each_vector(shard, [&](int u, int n) {
                V ax[2], ah[2], r, z, p;
                for (int g = 0; g < 2; ++g) {
                    ax[g] = with_bias<G, IU>(ax_row, bias_ih, H, g, u, n);
                    ah[g] = with_bias<F, U>(ah_row, bias_hh, H, g, u, n);
                }
                C::reset(ax, ah, V::load(h_old + u, n), r, z, p);
                r.store(gates + u, n);
                z.store(gates + H + u, n);
                p.store(p_row + u, n);
            });
            shard.operands[i] = p_row;
        }
        product(candidate, step.count, shard.operands.data(), shard.products.data());
    }

    // Computes the new h and c; with a projection m in place of h.
    void apply_cell(const Step& step, Shard<T>& shard) {
        const T *bias_ih = (const T*)pass.bias_ih, *bias_hh = (const T*)pass.bias_hh;
        for (int i = 0; i < step.count; ++i) {
            const int b = shard.sequences[i];
            T *gates = gates_at(step.t, b), *h_new_row = row_at<T>(pass.h, pass, step.new_slot, b, P);
            const T* c_old_row = pass.c ? row_at<T>(pass.c, pass, step.old_c_slot, b, H) : nullptr;
            T* c_new_row = pass.c ? row_at<T>(pass.c, pass, step.new_c_slot, b, H) : nullptr;
            T* m_row = pass.weight_hr ? inner_at(step.t, b) : h_new_row;
            const T* h_old_row = row_at<T>(pass.h, pass, step.old_slot, b, P);
            const T* ax_row = step.inputs + i * input.row();
            const T* ah_row = shard.products.data() + i * (reset ? candidate.row() : hidden.row());
            for_each_vector(shard, [&](int u, int n) {
                V ax[G], ah[G], saved[4], h_new(T(0)), c_new(T(0)), h_old(T(0)), c_old(T(0));
                if constexpr (reset) {  // apply_reset has left r and z in gates
                    load_blocks<2>(ax, gates, H, u, n);
                    ax[2] = with_bias<G, IU>(ax_row, bias_ih, H, 2, u, n);
                    ah[2] = V::load(ah_row + u);
                    if (bias_hh) ah[2] += V::load(bias_hh + (size_t)2 * H + u, n);
                } else {
                    for (int g = 0; g < G; ++g) {
                        ax[g] = with_bias<G, IU>(ax_row, bias_ih, H, g, u, n);
                        ah[g] = with_bias<F, U>(ah_row, bias_hh, H, g, u, n);
                    }
                }
                if (G == 3) h_old = V::load(h_old_row + u, n);  // only a GRU reads it, and then P = H
                if (c_old_row) c_old = V::load(c_old_row + u, n);
                C::forward(ax, ah, h_old, c_old, saved, h_new, c_new);
                h_new.store(m_row + u, n);
                if (c_new_row) c_new.store(c_new_row + u, n);
                if (pass.save) store_blocks<C::saved_blocks>(saved, gates, H, u, n);
            });
            shard.operands[i] = m_row;
        }
    }

    // h = W_hr m
    void project(const Step& step, Shard<T>& shard) {
        product(projection, step.count, shard.operands.data(), shard.products.data());
        for (int i = 0; i < step.count; ++i) {
            T* h_new_row = row_at<T>(pass.h, pass, step.new_slot, shard.sequences[i], P);
            std::memcpy(h_new_row, shard.products.data() + i * projection.row(), P * sizeof(T));
        }
    }

    // Past a sequence's end, holds its state. What the weights' gradients read there is zero.
    void hold_states(const Step& step, const Shard<T>& shard) {
        for (int i = step.count; i < (int)shard.sequences.size(); ++i) {
            const int b = shard.sequences[i];
            const auto hold = [&](void* states, int old_slot, int new_slot, int F) {
                std::memcpy(row_at<T>(states, pass, new_slot, b, F), row_at<T>(states, pass, old_slot, b, F), F * sizeof(T));
            };
            hold(pass.h, step.old_slot, step.new_slot, P);
            if (pass.c) hold(pass.c, step.old_c_slot, step.new_c_slot, H);
            if (pass.save && (reset || pass.weight_hr)) std::memset(inner_at(step.t, b), 0, H * sizeof(T));
        }
    }

    // Copies elements [first, end) of each new h to the output; past a sequence's end the output is zero.
    void write_output(const Step& step, const Shard<T>& shard, int first, int end) {
        for (int i = 0; i < (int)shard.sequences.size(); ++i) {
            const int b = shard.sequences[i];
            T* to = row_at<T>(pass.output, pass, step.t, b, pass.output_row) + first;
            if (i < step.count)
                std::memcpy(to, row_at<T>(pass.h, pass, step.new_slot, b, P) + first, (end - first) * sizeof(T));
            else
                std::memset(to, 0, (end - first) * sizeof(T));
        }
    }

    // ---- one timestep backward: dh and dc of the new state become those of the old state

    T* dh_at(int b) const { return (T*)pass.dh + (size_t)b * P; }

    void backward(int t, Shard<T>& shard) {
        const int count = shard.active(pass, t);
        add_output_gradient(t, count, shard);
        if (pass.weight_hr) product(projection_transposed, count, shard.operands.data(), shard.products.data());
        differentiate_cell(t, count, shard);
        if constexpr (reset) differentiate_reset(t, count, shard);
        product(hidden_transposed, count, shard.operands.data(), shard.products.data());
        for (int i = 0; i < count; ++i) {
            T* dh_row = dh_at(shard.sequences[i]);
            const T* product_row = shard.products.data() + i * hidden_transposed.row();
            if (pass.weight_hr)
                std::memcpy(dh_row, product_row, P * sizeof(T));
            else
                for (int p = 0; p < P; ++p) dh_row[p] += product_row[p];
        }
    }

    // Adds the output's gradient to dh. Past a sequence's end, dgates and dh_steps are zero.
    void add_output_gradient(int t, int count, Shard<T>& shard) {
        for (int i = count; i < (int)shard.sequences.size(); ++i) {
            const int b = shard.sequences[i];
            std::memset(gates_at(t, b), 0, (size_t)C::preactivations * H * sizeof(T));
            if (pass.dh_steps) std::memset(row_at<T>(pass.dh_steps, pass, t, b, P), 0, P * sizeof(T));
        }
        for (int i = 0; i < count; ++i) {
            const int b = shard.sequences[i];
            T* dh_row = dh_at(b);
            if (pass.doutput) {
                const T* doutput_row = row_at<T>(pass.doutput, pass, t, b, pass.doutput_row);
                for (int p = 0; p < P; ++p) dh_row[p] += doutput_row[p];
            }
            if (pass.dh_steps) std::memcpy(row_at<T>(pass.dh_steps, pass, t, b, P), dh_row, P * sizeof(T));
            shard.operands[i] = dh_row;
        }
    }

    // Computes dgates in place of the saved gates, and the gradients of the old state that do not go through W_hh.
    void differentiate_cell(int t, int count, Shard<T>& shard) {
        const int old_slot = pass.reverse ? t + 1 : t, new_slot = pass.reverse ? t : t + 1;
        for (int i = 0; i < count; ++i) {
            const int b = shard.sequences[i];
            T *gates = gates_at(t, b), *dc_row = pass.dc ? (T*)pass.dc + (size_t)b * H : nullptr;
            T* dm_row = pass.weight_hr ? shard.products.data() + i * projection_transposed.row() : dh_at(b);
            const T *h_old_row = row_at<T>(pass.h, pass, old_slot, b, P), *h_new_row = row_at<T>(pass.h, pass, new_slot, b, P);
            const T* c_old_row = pass.c ? row_at<T>(pass.c, pass, old_slot, b, H) : nullptr;
            const T* c_new_row = pass.c ? row_at<T>(pass.c, pass, new_slot, b, H) : nullptr;
            for_each_vector(shard, [&](int u, int n) {
                V saved[4], dgates[4], dh = V::load(dm_row + u, n), dc(T(0));
                V h_old(T(0)), h_new(T(0)), c_old(T(0)), c_new(T(0));
                load_blocks<C::saved_blocks>(saved, gates, H, u, n);
                if (c_old_row) {
                    c_old = V::load(c_old_row + u, n), c_new = V::load(c_new_row + u, n), dc = V::load(dc_row + u, n);
                } else {
                    h_old = V::load(h_old_row + u, n), h_new = V::load(h_new_row + u, n);
                }
                C::backward(saved, h_old, c_old, h_new, c_new, dh, dc, dgates);
                store_blocks<C::preactivations>(dgates, gates, H, u, n);
                if (dc_row) dc.store(dc_row + u, n);
                if (!pass.weight_hr) dh.store(dm_row + u, n);
            });
            shard.operands[i] = reset ? gates + (size_t)2 * H : gates;
        }
    }

    // The original GRU: d_p = d_n W_n gives the gradients of r, and of h through p = r h.
    void differentiate_reset(int t, int count, Shard<T>& shard) {
        product(candidate_transposed, count, shard.operands.data(), shard.products.data());
        for (int i = 0; i < count; ++i) {
            const int b = shard.sequences[i];
            T *gates = gates_at(t, b), *dh_row = dh_at(b);
            const T* dp_row = shard.products.data() + i * candidate_transposed.row();
            const T* h_old_row = row_at<T>(pass.h, pass, pass.reverse ? t + 1 : t, b, P);
            for_each_vector(shard, [&](int u, int n) {
                V dh = V::load(dh_row + u, n), dr;
                C::reset_backward(V::load(gates + u, n), V::load(h_old_row + u, n), V::load(dp_row + u, n), dh, dr);
                dr.store(gates + u, n);
                dh.store(dh_row + u, n);
            });
            shard.operands[i] = gates;
        }
    }
};

// ---- all directions of a layer

template <typename T, template <typename> class Cell>
void run_layer(const Pass* passes, int directions, int threads, bool backward) {
    std::vector<std::unique_ptr<Layer<T, Cell>>> layers;
    layers.reserve(directions);
    for (int d = 0; d < directions; ++d) layers.emplace_back(new Layer<T, Cell>(passes[d], backward));
    Barrier packed(threads);
    on_threads(threads, [&](int thread) {
        for (auto& layer : layers) layer->pack(thread, threads);
        packed.wait();
        // If the directions divide the threads, a thread works on one direction only, and its processor reads only those
        // weights.
        const int shards = threads % directions ? threads : threads / directions;
        for (int job = thread; job < directions * shards; job += threads)
            layers[job % directions]->run(job / directions, shards);
    });
}

template <typename T>
void run_cell(const Pass* passes, int directions, int threads, bool backward) {
#define RUN_IF_NAMED(Cell) \
    if (!std::strcmp(passes->cell, #Cell)) return run_layer<T, Cell>(passes, directions, threads, backward);
    FOR_EACH_CELL(RUN_IF_NAMED)
#undef RUN_IF_NAMED
    throw std::invalid_argument("unknown cell");
}

void time_loop(const Pass* passes, int directions, int threads, bool backward) {
    if (passes->is_double)
        run_cell<double>(passes, directions, threads, backward);
    else
        run_cell<float>(passes, directions, threads, backward);
}
