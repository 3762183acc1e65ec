// One layer and direction: its weights, and where things are. A part of time_loop.h; its passes are in forward.h and backward.h.

// Where a cell reads one sequence in one timestep forward: products, the states before it, masks.
template <typename T, int S>
struct ForwardRows {
    const T *ax, *ah, *inner_ah, *state[S];
    const bool* masks;
};

// Likewise backward, with the gradients that it overwrites.
template <typename T, int S>
struct BackwardRows {
    T *gates, *dstate[S];
    const T *state[S], *new_state[S];
    const bool* masks;
};

template <typename T, template <typename> class Cell>
struct Layer {
    typedef Vec<T> V;
    typedef Cell<V> C;
    // F and R: gates whose product is with h, and with what the equations make of it (`inner`)
    static constexpr int G = C::gates, S = C::states, N = C::parameters, M = C::draws, F = C::first_product, R = C::products - F;
    static constexpr int K = C::saved > C::preactivations ? C::saved : C::preactivations;
    static constexpr int U = G > 1 ? 1 : 2;  // vectors of units in a block of W_ih; the rest likewise, of W_hh
    static constexpr int HU = R == 0 ? U : F > 1 ? 1 : 2, RU = R > 1 ? 1 : 2;
    static constexpr int AHEAD = 48;  // rows of x in one input product, about

    const Pass& pass;
    const int timesteps, B, H, P;
    const bool is_backward;
    const bool narrow;              // whether numbers have 16 bits in memory
    Packed<T, G, U> input;          // W_ih
    Packed<T, some(F), HU> hidden;  // the rows of W_hh that multiply h
    Packed<T, some(R), RU> inner;   // and the others
    Packed<T, 1, 2> projection;     // W_hr
    // the transposed weights, which the backward pass multiplies by
    Packed<T, 1, 2> hidden_transposed, inner_transposed, projection_transposed;
    AlignedBuffer<T> memory;
    size_t size = 0;         // elements of the packed weights
    size_t product_row = 0;  // elements of the longest row of products

    Layer(const Pass& pass, bool is_backward)
        : pass(pass), timesteps(pass.T), B(pass.B), H(pass.H), P(pass.P), is_backward(is_backward),
          narrow(has_16_bits(pass.dtype)), input(H, pass.I), hidden(H, P), inner(H, P), projection(P, H),
          hidden_transposed(P, F * H), inner_transposed(P, R * H), projection_transposed(H, P) {
        set_int8(*this);
        for_each_product([&](auto& packed, const void* source, ptrdiff_t gate, ptrdiff_t n, ptrdiff_t k) {
            packed.dtype = pass.dtype, packed.source_dtype = pass.weights_dtype, packed.source = source;
            packed.gate_stride = gate, packed.n_stride = n, packed.k_stride = k;
            packed.in_place = timesteps == 1 && !packed.int8 && !pass.flat && !is_packed() && k == 1;
            size += packed.size();
            product_row = std::max(product_row, packed.row());
        });
        T* next = (T*)(is_packed() ? pass.packed : pass.room);
        if (!is_packed() && size * sizeof(T) > pass.room_bytes) {
            memory = AlignedBuffer<T>(size);
            next = memory.begin();
        }
        for_each_product([&](auto& packed, auto...) { packed.values = next, next += packed.size(); });
    }

    // Calls work(packed, source, stride of a gate, of an output, of a column) for each product of this pass.
    template <typename Work>
    void for_each_product(Work work) {
        const int bytes = bytes_of(pass.weights_dtype);
        const void *hh = pass.weight_hh, *hr = pass.weight_hr, *hh_inner = R ? (char*)hh + (ptrdiff_t)F * H * P * bytes : hh;
        const ptrdiff_t h = H, p = P, one = 1, none = 0;
        if (!is_backward) {
            work(input, pass.weight_ih, h * pass.I, (ptrdiff_t)pass.I, one);
            if (F) work(hidden, hh, h * p, p, one);
            if (R) work(inner, hh_inner, h * p, p, one);
            if (hr) work(projection, hr, none, h, one);
        } else {
            if (F) work(hidden_transposed, hh, none, one, p);
            if (R) work(inner_transposed, hh_inner, none, one, p);
            if (hr) work(projection_transposed, hr, none, one, h);
        }
    }

    // Whether the caller has the packed weights.
    bool is_packed() const { return pass.packed && !is_backward; }

    // Packs this thread's blocks of the weights, where threads divide the sequences.
    void pack(int thread, int threads) {
        for_each_product([&](auto& packed, auto...) {
            for (int block = thread; block < packed.blocks && !packed.in_place; block += threads) packed.pack(block);
        });
    }

    // Packs the blocks of a shard's units, which no other thread reads.
    void pack(const Shard<T>& shard) {
        for_each_product([&](auto& packed, auto...) {
            for (int block = shard.first_block(packed); block < shard.end_block(packed) && !packed.in_place; ++block)
                packed.pack(block);
        });
    }

    // Runs the time loop for one of `shards` shards. meeting: of their threads, where they divide the units: in each timestep
    // every thread reads what all of them have computed. A flat timestep runs as several smaller ones, whose products stay in
    // cache until they are used.
    void run(int number, int shards, Meeting& meeting) {
        if (pass.by_units) {
            Shard<T> shard(pass, 0, 1);
            shard.divide_units(number, shards);
            if (!is_packed()) pack(shard);
            shard.meeting = timesteps > 1 || is_backward ? &meeting : nullptr;
            return run(shard);
        }
        const int parts = pass.flat ? (B + AHEAD * shards - 1) / (AHEAD * shards) : 1;
        for (int part = 0; part < parts; ++part) {
            Shard<T> shard(pass, number + part * shards, shards * parts);
            run(shard);
        }
    }

    void run(Shard<T>& shard) {
        if (shard.sequences.empty()) return;
        const size_t sequences = shard.sequences.size();
        shard.products.resize(sequences * product_row);
        if (narrow) {
            shard.copied_row = std::max({H, P, is_backward ? std::max(F, R) * H : 0});
            const size_t inner_rows = R && !is_backward ? sequences * H : 0;
            shard.copies = AlignedBuffer<T>(sequences * shard.copied_row + inner_rows + (size_t)(K + 2) * H + P);
        }
        if (R && !is_backward) shard.inner_products.resize(shard.sequences.size() * inner.row());
        const size_t held = is_backward ? C::back_stages > 1 ? sizeof(BackwardOut<C, V>) : 0
                                        : C::stages > 1 ? sizeof(ForwardOut<C, V>) : 0;
        shard.stages = AlignedBuffer<T>((H + V::lanes - 1) / V::lanes * held / sizeof(T));
        for (int s = 0; s < timesteps; ++s) {
            const int step = is_backward ? timesteps - 1 - s : s;
            const int t = pass.reverse ? timesteps - 1 - step : step;
            if (is_backward)
                backward(t, shard);
            else
                forward(t, step, shard);
        }
    }

    // ---- the rows of a timestep and sequence

    Stored stored_at(const void* array, int t, int b, ptrdiff_t F) const {
        const int bytes = bytes_of(pass.dtype);
        return {(char*)array + ((ptrdiff_t)t * B + b) * F * bytes, bytes};
    }
    Stored gates_at(int t, int b) const { return stored_at(pass.gates, pass.save ? t : 0, b, pass.gates_row); }
    // What the projection multiplies. It comes after the other blocks.
    Stored projected_at(int t, int b) const { return gates_at(t, b) + (ptrdiff_t)K * H; }
    Stored h_at(int slot, int b) const { return stored_at(pass.h, slot, b, P); }
    // State s, which is not h.
    T* other_at(int s, int slot, int b) const {
        return row_at<T>((T*)pass.others + (s - 1) * pass.state_stride, pass, slot, b, H);
    }
    // What h, or state s, is before timestep t: that in a slot, or what a reset gives.
    Stored old_h_at(int t, int slot, int b) const {
        return is_marked(pass, t, b, RESET) ? stored_at(pass.reset_h, 0, b, P) : h_at(slot, b);
    }
    const T* old_other_at(int s, int t, int slot, int b) const {
        return is_marked(pass, t, b, RESET) ? (const T*)pass.reset_others + ((ptrdiff_t)(s - 1) * B + b) * H : other_at(s, slot, b);
    }
    // The gradient of what a reset gives as state s.
    T* dreset_at(int s, int b) const {
        return s ? (T*)pass.dreset_others + ((ptrdiff_t)(s - 1) * B + b) * H : (T*)pass.dreset_h + (ptrdiff_t)b * P;
    }
    // The gradient of state s, where the pass has arrived.
    T* dstate_at(int s, int b) const {
        return s ? (T*)pass.dothers + ((ptrdiff_t)(s - 1) * B + b) * H : (T*)pass.dh + (ptrdiff_t)b * P;
    }
    const bool* masks_at(int t, int b) const { return pass.masks + t * pass.mask_step + (ptrdiff_t)b * M * H; }

    // ---- numbers in memory as numbers that are computed with. Of 16 bits these are in a copy; otherwise they are the same.

    INLINE T* place(Stored row, T* copy) const { return narrow ? copy : (T*)row.at; }
    // n numbers of a row.
    INLINE T* read(Stored row, T* copy, int n) const {
        if (narrow) load_numbers(pass.dtype, row.at, copy, n);
        return place(row, copy);
    }
    // Of `blocks` blocks of H the shard's units.
    T* read_units(Stored row, T* copy, int blocks, const Shard<T>& shard) const {
        for (int g = 0, u = shard.first_unit; g < blocks && narrow; ++g, u += H)
            load_numbers(pass.dtype, (row + u).at, copy + u, shard.end_unit - shard.first_unit);
        return place(row, copy);
    }
    // Puts what `place` or `read` gave back into the row.
    INLINE void write(const T* numbers, Stored row, int n) const {
        if (narrow) store_numbers(pass.dtype, numbers, row.at, n);
    }
    void write_units(const T* numbers, Stored row, int blocks, const Shard<T>& shard) const {
        for (int g = 0, u = shard.first_unit; g < blocks && narrow; ++g, u += H)
            store_numbers(pass.dtype, numbers + u, (row + u).at, shard.end_unit - shard.first_unit);
    }
    // Copies numbers that lie elsewhere.
    void copy_to(Stored row, const T* numbers, int n) const {
        if (narrow)
            store_numbers(pass.dtype, numbers, row.at, n);
        else
            std::memcpy(row.at, numbers, n * sizeof(T));
    }

    // A state as an equation reads it. Of a projection it reads no h.
    INLINE void load_states(V* to, const T* const* rows, int u, int n) const {
        to[0] = pass.weight_hr ? V(T(0)) : V::load(rows[0] + u, n);
        UNROLL for (int s = 1; s < S; ++s) to[s] = V::load(rows[s] + u, n);
    }
    // The cell's own parameters, and its masks as numbers.
    template <typename In>
    INLINE void load_constants(In& in, const bool* masks, int u, int n) const {
        load_blocks<N>(in.p, (const T*)pass.own, H, u, n);
        UNROLL for (int k = 0; k < M; ++k) in.mask[k] = V::from_bools(masks + (size_t)k * H + u, n);
    }

    // ---- one timestep forward: forward.h

    struct Step;
    void forward(int t, int number, Shard<T>& shard);
    void multiply_inputs(int step, Shard<T>& shard);
    Stored old_h(const Step& step, int b) const;
    const T* old_other(const Step& step, int s, int b) const;
    ForwardRows<T, S> forward_rows(const Step& step, const Shard<T>& shard, int i) const;
    template <bool after_inner>
    void load_forward(ForwardIn<C, V>& in, const ForwardRows<T, S>& rows, int u, int n) const;
    void multiply_inner(const Step& step, Shard<T>& shard);
    void apply_cell(const Step& step, Shard<T>& shard);
    void project(const Step& step, Shard<T>& shard);
    void hold_states(const Step& step, const Shard<T>& shard);
    void write_output(const Step& step, const Shard<T>& shard, int first, int end);

    // ---- one timestep backward: backward.h

    void backward(int t, Shard<T>& shard);
    void add_output_gradient(int t, int count, Shard<T>& shard);
    void add_doutput(int t, int b, const Shard<T>& shard) const;
    void reset_gradients(int t, const Shard<T>& shard);
    BackwardRows<T, S> backward_rows(int t, int b, const Shard<T>& shard) const;
    void load_backward(BackwardIn<C, V>& in, const BackwardRows<T, S>& rows, int u, int n) const;
    void differentiate_cell(int t, int count, Shard<T>& shard);
    void differentiate_inner(int t, int count, Shard<T>& shard);
};
