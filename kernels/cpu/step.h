// One timestep of a whole model, for one instruction set: a part of parts.h.

// The weight of a linear layer.
template <typename T>
struct LinearWeight : Packed<T, 1, 2> {
    explicit LinearWeight(const Stage& stage) : Packed<T, 1, 2>(stage.out, stage.in) {
        this->dtype = stage.dtype, this->source = stage.weight, this->n_stride = stage.in, this->k_stride = 1;
        this->values = (T*)stage.packed, this->in_place = !stage.packed;
        if (stage.scales) this->int8 = (const int8_t*)stage.weight, this->scales = stage.scales, this->bits = stage.bits;
    }
};

// y[rows, out] = x[rows, in] W^T + b
template <typename T>
void linear_stage(const Stage& stage) {
    const LinearWeight<T> weight(stage);
    const bool narrow = has_16_bits(stage.dtype);
    std::vector<const T*> rows(stage.rows);
    std::vector<T> products(stage.rows * weight.row()), copy(narrow ? (size_t)stage.rows * stage.in : 0);
    if (narrow) load_numbers(stage.dtype, stage.x, copy.data(), copy.size());
    const T* x = narrow ? copy.data() : (const T*)stage.x;
    for (int row = 0; row < stage.rows; ++row) rows[row] = x + (size_t)row * stage.in;
    product(weight, stage.rows, rows.data(), products.data());
    const T* bias = (const T*)stage.bias;
    for (int row = 0; row < stage.rows; ++row) {
        T* sums = products.data() + row * weight.row();
        for (int n = 0; n < stage.out && bias; ++n) sums[n] += bias[n];
        const size_t place = (size_t)row * stage.out;
        if (narrow)
            store_numbers(stage.dtype, sums, (uint16_t*)stage.y + place, stage.out);  // rounded once, with the bias
        else
            std::memcpy((T*)stage.y + place, sums, stage.out * sizeof(T));
    }
}

// Packs the weight of a linear layer into `to`. Returns the bytes that this takes; without `to` that is all.
template <typename T>
size_t pack_linear(Stage stage, void* to) {
    stage.packed = &stage;  // not in place
    LinearWeight<T> weight(stage);
    weight.values = (T*)to;
    for (int block = 0; to && block < weight.blocks; ++block) weight.pack(block);
    return weight.size() * sizeof(T);
}

size_t pack_stage(const Stage& stage, void* to) {
    return stage.dtype == FLOAT64 ? pack_linear<double>(stage, to) : pack_linear<float>(stage, to);
}

// y[rows, out] = the rows x[rows] of a table of `in` rows
void table_stage(const Stage& stage) {
    const size_t bytes = (size_t)stage.out * (stage.dtype == FLOAT64 ? 8 : 4);
    const int64_t* numbers = (const int64_t*)stage.x;
    for (int row = 0; row < stage.rows; ++row)
        if (numbers[row] < 0 || numbers[row] >= stage.in) throw std::out_of_range("a number that the table has no row for");
    for (int row = 0; row < stage.rows; ++row) {
        const char* from = (const char*)stage.weight + numbers[row] * bytes;
        if (has_16_bits(stage.dtype))
            store_numbers(stage.dtype, (const float*)from, (uint16_t*)stage.y + (size_t)row * stage.out, stage.out);
        else
            std::memcpy((char*)stage.y + row * bytes, from, bytes);
    }
}

void run_step(const Stage* stages, int count) {
    for (const Stage* stage = stages; stage < stages + count; ++stage) {
        const FlushToZero flush;
        if (stage->kind == TABLE)
            table_stage(*stage);
        else if (stage->kind == LINEAR)
            stage->dtype == FLOAT64 ? linear_stage<double>(*stage) : linear_stage<float>(*stage);
        else if (!stage->generated)
            time_loop(stage->passes, stage->directions, stage->threads, false);
        else if (const int problem = stage->generated(stage->passes, stage->directions, stage->threads, 0))
            throw problem;
    }
}
