// One timestep of a whole model, for one instruction set: a part of parts.h.

// y[rows, out] = x[rows, in] W^T + b
template <typename T>
void linear_stage(const Stage& stage) {
    Product job = {};
    job.dtype = stage.dtype, job.c_dtype = sizeof(T) == 8 ? FLOAT64 : FLOAT32, job.M = stage.rows, job.N = stage.out, job.K = stage.in;
    job.a_row = stage.in, job.a_column = 1, job.b_row = 1, job.b_column = stage.in, job.c_row = stage.out;
    job.A = stage.x, job.B = stage.weight;
    const size_t size = (size_t)stage.rows * stage.out;
    std::vector<T> sums(has_16_bits(stage.dtype) ? size : 0);  // rounded once, with the bias
    T* y = sums.empty() ? (T*)stage.y : sums.data();
    job.C = y;
    matmul<T>(job, 1);
    const T* bias = (const T*)stage.bias;
    for (int row = 0; row < stage.rows && bias; ++row)
        for (int n = 0; n < stage.out; ++n) y[(size_t)row * stage.out + n] += bias[n];
    if (!sums.empty()) store_numbers(stage.dtype, y, stage.y, size);
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
