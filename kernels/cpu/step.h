// One timestep of a whole model, for one instruction set: a part of parts.h.

// y[rows, out] = x[rows, in] W^T + b
template <typename T>
void linear_stage(const Stage& stage) {
    Product job = {};
    job.is_double = sizeof(T) == 8, job.M = stage.rows, job.N = stage.out, job.K = stage.in;
    job.a_row = stage.in, job.a_column = 1, job.b_row = 1, job.b_column = stage.in, job.c_row = stage.out;
    job.A = stage.x, job.B = stage.weight, job.C = stage.y, job.scales = stage.scales;
    matmul<T>(job, 1);
    const T* bias = (const T*)stage.bias;
    for (int row = 0; row < stage.rows && bias; ++row) {
        T* y = (T*)stage.y + (size_t)row * stage.out;
        for (int n = 0; n < stage.out; ++n) y[n] += bias[n];
    }
}

// y[rows, out] = the rows x[rows] of a table of `in` rows
void table_stage(const Stage& stage) {
    const size_t bytes = (size_t)stage.out * (stage.is_double ? 8 : 4);
    const int64_t* numbers = (const int64_t*)stage.x;
    for (int row = 0; row < stage.rows; ++row)
        if (numbers[row] < 0 || numbers[row] >= stage.in) throw std::out_of_range("a number that the table has no row for");
    for (int row = 0; row < stage.rows; ++row)
        std::memcpy((char*)stage.y + row * bytes, (const char*)stage.weight + numbers[row] * bytes, bytes);
}

void run_step(const Stage* stages, int count) {
    for (const Stage* stage = stages; stage < stages + count; ++stage) {
        const FlushToZero flush;
        if (stage->kind == TABLE)
            table_stage(*stage);
        else if (stage->kind == LINEAR)
            stage->is_double ? linear_stage<double>(*stage) : linear_stage<float>(*stage);
        else if (!stage->generated)
            time_loop(stage->passes, stage->directions, stage->threads, false);
        else if (const int problem = stage->generated(stage->passes, stage->directions, stage->threads, 0))
            throw problem;
    }
}
