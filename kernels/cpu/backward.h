// One timestep backward of a layer: the gradients of the new states become those of the old ones. A part of time_loop.h.

template <typename T, template <typename> class Cell>
void Layer<T, Cell>::backward(int t, Shard<T>& shard) {
    const int count = shard.arrange(pass, t);
    add_output_gradient(t, count, shard);
    if (pass.weight_hr) product(projection_transposed, count, shard.operands.data(), shard.products.data());
    differentiate_cell(t, count, shard);
    if constexpr (R > 0) differentiate_inner(t, count, shard);
    if constexpr (F > 0) {
        shard.meet();  // the product reads the dgates of all units
        for (int i = 0; i < count; ++i) shard.operands[i] = read(gates_at(t, shard.sequences[i]), shard.copy_of(i), F * H);
        product(hidden_transposed, shard.first_block(hidden_transposed), shard.end_block(hidden_transposed), count,
                shard.operands.data(), shard.products.data());
        for (int i = 0; i < count; ++i) {
            T* dh_row = dstate_at(0, shard.sequences[i]);
            const T* product_row = shard.products.data() + i * hidden_transposed.row();
            if (pass.weight_hr)
                std::memcpy(dh_row, product_row, P * sizeof(T));
            else
                for (int p = shard.first_unit; p < shard.end_of_h(P); ++p) dh_row[p] += product_row[p];
        }
    }
    if (pass.marks && pass.dreset_h) reset_gradients(t, shard);
}

// Where a sequence was reset, moves the gradients of the state to what the reset gave: they do not go further back.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::reset_gradients(int t, const Shard<T>& shard) {
    for (int b : shard.sequences) {
        if (!is_marked(pass, t, b, RESET)) continue;
        for (int s = 0; s < S; ++s) {
            T *from = dstate_at(s, b), *to = dreset_at(s, b);
            const int first = shard.first_unit, end = s ? shard.end_unit : shard.end_of_h(P);
            for (int u = first; u < end; ++u) to[u] += from[u];
            std::fill(from + first, from + end, T(0));
        }
    }
}

template <typename T, template <typename> class Cell>
void Layer<T, Cell>::add_doutput(int t, int b, const Shard<T>& shard) const {
    if (!pass.doutput) return;
    const int first = shard.first_unit, count = shard.end_of_h(P) - first;
    T* dh_row = dstate_at(0, b) + first;
    const T* doutput_row = read(stored_at(pass.doutput, t, b, pass.doutput_row) + first, shard.copy_of_one(), count);
    for (int p = 0; p < count; ++p) dh_row[p] += doutput_row[p];
}

// Adds the output's gradient to dh. Where a sequence is held, dgates and dh_steps are zero.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::add_output_gradient(int t, int count, Shard<T>& shard) {
    for (int i = count; i < (int)shard.sequences.size(); ++i) {
        const int b = shard.sequences[i];
        for (int g = 0; g < C::preactivations; ++g) {
            const Stored gate = gates_at(t, b) + (ptrdiff_t)g * H + shard.first_unit;
            std::memset(gate.at, 0, (shard.end_unit - shard.first_unit) * gate.bytes);
        }
        if (pass.dh_steps) std::memset(stored_at(pass.dh_steps, t, b, P).at, 0, P * bytes_of(pass.dtype));
        if (is_marked(pass, t, b, SHOWN)) add_doutput(t, b, shard);
    }
    for (int i = 0; i < count; ++i) {
        const int b = shard.sequences[i];
        T* dh_row = dstate_at(0, b);
        add_doutput(t, b, shard);
        if (pass.dh_steps) copy_to(stored_at(pass.dh_steps, t, b, P), dh_row, P);
        shard.operands[i] = dh_row;
    }
}

template <typename T, template <typename> class Cell>
BackwardRows<T, Layer<T, Cell>::S> Layer<T, Cell>::backward_rows(int t, int b, const Shard<T>& shard) const {
    const int old_slot = pass.reverse ? t + 1 : t, new_slot = pass.reverse ? t : t + 1;
    BackwardRows<T, S> rows;
    T *gates = shard.copy_of_one(), *old_h = gates + (size_t)K * H, *new_h = old_h + H;
    rows.gates = read_units(gates_at(t, b), gates, K, shard), rows.masks = masks_at(t, b);
    const int blocks = pass.weight_hr ? 0 : 1;  // of a projection the equations read no h
    rows.state[0] = read_units(old_h_at(t, old_slot, b), old_h, blocks, shard);
    rows.new_state[0] = read_units(h_at(new_slot, b), new_h, blocks, shard);
    for (int s = 1; s < S; ++s) rows.state[s] = old_other_at(s, t, old_slot, b), rows.new_state[s] = other_at(s, new_slot, b);
    for (int s = 0; s < S; ++s) rows.dstate[s] = dstate_at(s, b);
    return rows;
}

template <typename T, template <typename> class Cell>
INLINE void Layer<T, Cell>::load_backward(BackwardIn<C, V>& in, const BackwardRows<T, S>& rows, int u, int n) const {
    load_blocks<C::saved>(in.saved, rows.gates, H, u, n);
    load_states(in.state, rows.state, u, n);
    load_states(in.new_state, rows.new_state, u, n);
    UNROLL for (int s = 0; s < S; ++s) in.dstate[s] = V::load(rows.dstate[s] + u, n);
    load_constants(in, rows.masks, u, n);
}

// Computes dgates in place of the saved gates, and the gradients of the old states that do not go through W_hh.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::differentiate_cell(int t, int count, Shard<T>& shard) {
    for (int i = 0; i < count; ++i) {
        BackwardRows<T, S> rows = backward_rows(t, shard.sequences[i], shard);
        if (pass.weight_hr) rows.dstate[0] = shard.products.data() + i * projection_transposed.row();
        apply_to_units<BackwardStages<T, Cell>>(
            shard, [&](auto& in, int u, int n) INLINE_LAMBDA { load_backward(in, rows, u, n); },
            [&](const auto& out, int u, int n) INLINE_LAMBDA {
                store_blocks<C::preactivations>(out.d, rows.gates, H, u, n);
                UNROLL for (int s = 1; s < S; ++s) out.dstate[s].store(rows.dstate[s] + u, n);
                if (!pass.weight_hr) out.dstate[0].store(rows.dstate[0] + u, n);
            });
        write_units(rows.gates, gates_at(t, shard.sequences[i]), C::preactivations, shard);
    }
}

// The second product transposed gives the gradient of `inner`; that goes into d of the first product and the old states.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::differentiate_inner(int t, int count, Shard<T>& shard) {
    static_assert(C::inner >= C::preactivations && C::inner < C::saved, "`inner` is saved behind what backward makes");
    for (int i = 0; i < count; ++i)
        shard.operands[i] = read(gates_at(t, shard.sequences[i]) + (ptrdiff_t)F * H, shard.copy_of(i), R * H);
    product(inner_transposed, count, shard.operands.data(), shard.products.data());
    for (int i = 0; i < count; ++i) {
        const BackwardRows<T, S> rows = backward_rows(t, shard.sequences[i], shard);
        const T* d_inner = shard.products.data() + i * inner_transposed.row();
        for_each_vector(shard, [&](int u, int n) {
            BackwardIn<C, V> in;
            BackwardOut<C, V> out;
            load_backward(in, rows, u, n);
            load_blocks<C::preactivations>(out.d, rows.gates, H, u, n);
            UNROLL for (int s = 0; s < S; ++s) out.dstate[s] = in.dstate[s];
            C::backward_inner(in, V::load(d_inner + u, n), out);
            UNROLL for (int g = 0; g < C::preactivations; ++g)
                if (g < F || g >= F + R) out.d[g].store(rows.gates + (size_t)g * H + u, n);
            UNROLL for (int s = 0; s < S; ++s) out.dstate[s].store(rows.dstate[s] + u, n);
        });
        write_units(rows.gates, gates_at(t, shard.sequences[i]), C::preactivations, shard);
    }
}
