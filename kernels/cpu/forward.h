// One timestep forward of a layer: a part of time_loop.h.

// The slots of h and of the other states, the number of sequences that have this timestep, and their rows of W_ih x.
template <typename T, template <typename> class Cell>
struct Layer<T, Cell>::Step {
    int t, old_slot, new_slot, old_other, new_other, count;
    const T* inputs;
};

template <typename T, template <typename> class Cell>
void Layer<T, Cell>::forward(int t, int number, Shard<T>& shard) {
    Step step;
    step.t = t, step.old_slot = pass.reverse ? t + 1 : t, step.new_slot = pass.reverse ? t : t + 1;
    step.old_other = pass.save ? step.old_slot : number % 2, step.new_other = pass.save ? step.new_slot : 1 - number % 2;
    const int size = (int)shard.sequences.size(), ahead = (AHEAD + size - 1) / size;
    if (number % ahead == 0) multiply_inputs(number, shard);
    step.count = shard.arrange(pass, t);
    step.inputs = shard.input_products.data() + shard.first_row[number % ahead] * input.row();
    for (int i = 0; i < step.count; ++i) shard.old_h[i] = read(old_h(step, shard.sequences[i]), shard.copy_of(i), P);
    if constexpr (F > 0)
        product(hidden, shard.first_block(hidden), shard.end_block(hidden), step.count, shard.old_h.data(),
                shard.products.data());
    if constexpr (R > 0) multiply_inner(step, shard);
    apply_cell(step, shard);
    if (pass.weight_hr) project(step, shard);
    // Where threads share the units of the same sequences, the last one holds their states.
    const bool has_last_unit = shard.end_unit == H;
    if (has_last_unit) hold_states(step, shard);
    if (pass.output) write_output(step, shard, shard.first_unit, has_last_unit ? P : shard.end_unit);
    shard.meet();
}

// Computes W_ih x for this timestep and the next ones of the loop.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::multiply_inputs(int step, Shard<T>& shard) {
    const int size = (int)shard.sequences.size(), steps = std::min(timesteps - step, (AHEAD + size - 1) / size);
    std::vector<const T*> rows;
    shard.first_row.clear();
    for (int s = step; s < step + steps; ++s) {
        const int t = pass.reverse ? timesteps - 1 - s : s;
        shard.first_row.push_back((int)rows.size());
        const int count = shard.arrange(pass, t);
        for (int i = 0; i < count; ++i) rows.push_back((const T*)stored_at(pass.x, t, shard.sequences[i], pass.I).at);
    }
    if (narrow) {
        shard.copied_inputs.resize(std::max(shard.copied_inputs.size(), rows.size() * pass.I));
        for (size_t i = 0; i < rows.size(); ++i) {
            T* copy = shard.copied_inputs.data() + i * pass.I;
            load_numbers(pass.dtype, rows[i], copy, pass.I);
            rows[i] = copy;
        }
    }
    shard.input_products.resize(std::max(shard.input_products.size(), rows.size() * input.row()));
    if (!rows.empty())
        product(input, shard.first_block(input), shard.end_block(input), (int)rows.size(), rows.data(),
                shard.input_products.data());
}

// Gate g of a row of products of packed weights, plus the bias, [.., H] or null, of gate `of`.
template <typename T, int gates, int vectors>
INLINE Vec<T> with_bias(const Packed<T, gates, vectors>& packed, const T* row, int g, const T* bias, int of, int u, int n) {
    constexpr int units = vectors * Vec<T>::lanes;
    const Vec<T> x = Vec<T>::load(row + ((size_t)(u / units) * gates + g) * units + u % units);
    return bias ? x + Vec<T>::load(bias + (size_t)of * packed.N + u, n) : x;
}

// What a cell gets. `after_inner`: with the second product.
template <typename T, template <typename> class Cell>
template <bool after_inner>
INLINE void Layer<T, Cell>::load_forward(ForwardIn<C, V>& in, const ForwardRows<T, S>& rows, int u, int n) const {
    const T *bias_ih = (const T*)pass.bias_ih, *bias_hh = (const T*)pass.bias_hh;
    UNROLL for (int g = 0; g < G; ++g) {
        in.ax[g] = with_bias(input, rows.ax, g, bias_ih, g, u, n);
        if (g < F)
            in.ah[g] = with_bias(hidden, rows.ah, g, bias_hh, g, u, n);
        else if (g >= F + R && bias_hh)
            in.ax[g] += V::load(bias_hh + (size_t)g * H + u, n);
        else if (after_inner && g < F + R)
            in.ah[g] = with_bias(inner, rows.inner_ah, g - F, bias_hh, g, u, n);
    }
    load_states(in.state, rows.state, u, n);
    load_constants(in, rows.masks, u, n);
}

// The h, and the state s, that a timestep reads.
template <typename T, template <typename> class Cell>
Stored Layer<T, Cell>::old_h(const Step& step, int b) const {
    return old_h_at(step.t, step.old_slot, b);
}
template <typename T, template <typename> class Cell>
const T* Layer<T, Cell>::old_other(const Step& step, int s, int b) const {
    return old_other_at(s, step.t, step.old_other, b);
}

// The rows of sequence number i of the shard.
template <typename T, template <typename> class Cell>
ForwardRows<T, Layer<T, Cell>::S> Layer<T, Cell>::forward_rows(const Step& step, const Shard<T>& shard, int i) const {
    const int b = shard.sequences[i];
    ForwardRows<T, S> rows;
    rows.ax = step.inputs + i * input.row(), rows.ah = shard.products.data() + i * hidden.row();
    rows.inner_ah = R ? shard.inner_products.data() + i * inner.row() : nullptr;
    rows.state[0] = shard.old_h[i];
    for (int s = 1; s < S; ++s) rows.state[s] = old_other(step, s, b);
    rows.masks = masks_at(step.t, b);
    return rows;
}

// What the equations make of h before a second product, and that product.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::multiply_inner(const Step& step, Shard<T>& shard) {
    static_assert(C::stages == 1, "a second product waits for no means");
    for (int i = 0; i < step.count; ++i) {
        const ForwardRows<T, S> rows = forward_rows(step, shard, i);
        const Stored saved = gates_at(step.t, shard.sequences[i]) + (ptrdiff_t)C::inner * H;
        T* inner_row = place(saved, shard.copy_of_one() + (size_t)i * H);
        for_each_vector(shard, [&](int u, int n) {
            ForwardIn<C, V> in;
            load_forward<false>(in, rows, u, n);
            C::forward_inner(in).store(inner_row + u, n);
        });
        write(inner_row, saved, H);
        shard.operands[i] = inner_row;
    }
    product(inner, step.count, shard.operands.data(), shard.inner_products.data());
}

// Computes the new states; with a projection, what it multiplies in place of h.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::apply_cell(const Step& step, Shard<T>& shard) {
    for (int i = 0; i < step.count; ++i) {
        const int b = shard.sequences[i];
        const ForwardRows<T, S> rows = forward_rows(step, shard, i);
        const Stored saved = gates_at(step.t, b), made = pass.weight_hr ? projected_at(step.t, b) : h_at(step.new_slot, b);
        T *gates = place(saved, shard.copy_of_one()), *new_rows[S];
        new_rows[0] = place(made, shard.copy_of(i));  // in the place of h, unit by unit
        for (int s = 1; s < S; ++s) new_rows[s] = other_at(s, step.new_other, b);
        apply_to_units<ForwardStages<T, Cell>>(
            shard, [&](auto& in, int u, int n) INLINE_LAMBDA { load_forward<true>(in, rows, u, n); },
            [&](const auto& out, int u, int n) INLINE_LAMBDA {
                UNROLL for (int s = 0; s < S; ++s) out.state[s].store(new_rows[s] + u, n);
                if (pass.save) store_blocks<C::saved>(out.saved, gates, H, u, n);
            });
        if (pass.save) write_units(gates, saved, C::saved, shard);
        write_units(new_rows[0], made, 1, shard);
        shard.operands[i] = new_rows[0];
    }
}

// h = W_hr m
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::project(const Step& step, Shard<T>& shard) {
    product(projection, step.count, shard.operands.data(), shard.products.data());
    for (int i = 0; i < step.count; ++i)
        copy_to(h_at(step.new_slot, shard.sequences[i]), shard.products.data() + i * projection.row(), P);
}

// Past a sequence's end, and where a mask says so, holds its states. What the weights' gradients read there is zero.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::hold_states(const Step& step, const Shard<T>& shard) {
    for (int i = step.count; i < (int)shard.sequences.size(); ++i) {
        const int b = shard.sequences[i];
        const Stored h = h_at(step.new_slot, b);
        std::memcpy(h.at, old_h(step, b).at, P * h.bytes);
        for (int s = 1; s < S; ++s)
            std::memcpy(other_at(s, step.new_other, b), old_other(step, s, b), H * sizeof(T));
        if constexpr (R > 0)
            if (pass.save) std::memset((gates_at(step.t, b) + (ptrdiff_t)C::inner * H).at, 0, H * h.bytes);
        if (pass.save && pass.weight_hr) std::memset(projected_at(step.t, b).at, 0, H * h.bytes);
    }
}

// Copies elements [first, end) of each new h to the output. Where a sequence is held, the output is zero unless it is shown.
template <typename T, template <typename> class Cell>
void Layer<T, Cell>::write_output(const Step& step, const Shard<T>& shard, int first, int end) {
    for (int i = 0; i < (int)shard.sequences.size(); ++i) {
        const int b = shard.sequences[i];
        const Stored to = stored_at(pass.output, step.t, b, pass.output_row) + first;
        if (i < step.count)
            std::memcpy(to.at, (h_at(step.new_slot, b) + first).at, (end - first) * to.bytes);
        else if (is_marked(pass, step.t, b, SHOWN))
            std::memcpy(to.at, (old_h(step, b) + first).at, (end - first) * to.bytes);
        else
            std::memset(to.at, 0, (end - first) * to.bytes);
    }
}
