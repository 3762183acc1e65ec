// Any product of two matrices, and sums over rows, for one instruction set: a part of parts.h.

// ---- any product of two matrices

// Row m of C becomes `from`, or the sum of both. scratch: for N numbers of 16 bits.
template <typename T>
void add_row(const Product& job, ptrdiff_t m, T* from, std::vector<T>& scratch) {
    const ptrdiff_t N = job.N;
    if (has_16_bits(job.c_dtype)) {
        uint16_t* C = (uint16_t*)job.C + m * job.c_row;
        if (job.accumulate) {
            scratch.resize(std::max(scratch.size(), (size_t)N));
            load_numbers(job.c_dtype, C, scratch.data(), N);
            for (ptrdiff_t n = 0; n < N; ++n) from[n] = scratch[n] + from[n];
        }
        return store_numbers(job.c_dtype, from, C, N);
    }
    T* C = (T*)job.C + m * job.c_row;
    if (job.accumulate)
        for (ptrdiff_t n = 0; n < N; ++n) C[n] += from[n];
    else
        std::memcpy(C, from, N * sizeof(T));
}

// C = A B, or C += A B, on `threads` threads that divide the rows.
template <typename T>
void matmul(const Product& job, int threads) {
    if (job.bits) return matmul_int8<T>(job, threads);
    const ptrdiff_t M = job.M, N = job.N, K = job.K;
    // A tile of ROWS x COLUMNS of A stays in the second-level cache: 192 KB of floats.
    constexpr int R = ACCUMULATORS / 2, ROWS = 48, COLUMNS = 1000;
    Packed<T, 1, 2> B((int)N, (int)K);
    const bool narrow = has_16_bits(job.dtype), narrow_c = has_16_bits(job.c_dtype);
    B.source = job.B, B.source_dtype = job.dtype, B.n_stride = job.b_column, B.k_stride = job.b_row;
    B.in_place = M <= FEW_ROWS && job.a_column == 1 && job.b_row == 1 && K <= COLUMNS;
    if (narrow && B.in_place) B.dtype = job.dtype;  // what is packed becomes floats
    const bool has_room = B.size() * sizeof(T) <= job.room_bytes;
    AlignedBuffer<T> values(has_room ? 0 : B.size());
    B.values = has_room ? (T*)job.room : values.begin();
    Barrier packed(threads);
    on_threads(threads, [&](int thread) {
        for (int block = thread; block < B.blocks && !B.in_place; block += threads) B.pack(block);
        packed.wait();
        const bool contiguous = job.a_column == 1;  // the rows of A
        const bool direct = N == (ptrdiff_t)B.row() && K > 0 && !narrow_c;  // products go straight into C, as no block has padding
        const ptrdiff_t first = M * thread / threads, last = M * (thread + 1) / threads;
        // Where the rows of A are not contiguous, a tile of it is copied: [groups][columns][R]. Of 16 bits it is copied anyway.
        const ptrdiff_t copied_row = std::min<ptrdiff_t>(K, COLUMNS), copied_rows = std::min<ptrdiff_t>(ROWS, last - first);
        std::vector<T> gathered(!contiguous ? ROWS * COLUMNS : narrow ? copied_rows * copied_row : 0), padded(direct ? 0 : ROWS * B.row());
        const T* rows[ROWS];
        T copy[ROWS];
        for (ptrdiff_t m0 = first; m0 < last; m0 += ROWS) {
            const int count = (int)std::min<ptrdiff_t>(last - m0, ROWS);
            const Groups groups(count, R);
            T* C = direct ? (T*)job.C + m0 * job.c_row : nullptr;
            for (ptrdiff_t k0 = 0; k0 < K; k0 += COLUMNS) {
                const ptrdiff_t columns = std::min<ptrdiff_t>(K - k0, COLUMNS);
                const ptrdiff_t place = m0 * job.a_row + k0 * job.a_column;
                const T* A = narrow ? nullptr : (const T*)job.A + place;
                const uint16_t* A16 = narrow ? (const uint16_t*)job.A + place : nullptr;
                for (int i = 0; i < count && contiguous; ++i) {
                    rows[i] = narrow ? gathered.data() + i * copied_row : A + i * job.a_row;
                    if (narrow) load_numbers(job.dtype, A16 + i * job.a_row, (T*)rows[i], columns);
                }
                for (int group = 0; group < groups.groups && !contiguous; ++group)
                    for (int i = groups.begin(group); i < groups.end(group); ++i)
                        rows[i] = gathered.data() + group * R * COLUMNS + i - groups.begin(group);
                for (ptrdiff_t k = 0; k < columns && !contiguous; ++k) {
                    const T* column = narrow ? copy : A + k * job.a_column;
                    const ptrdiff_t a_row = narrow ? 1 : job.a_row;
                    if (narrow && job.a_row == 1) load_numbers(job.dtype, A16 + k * job.a_column, copy, count);
                    for (int i = 0; i < count && narrow && job.a_row != 1; ++i)
                        load_numbers(job.dtype, A16 + k * job.a_column + i * job.a_row, copy + i, 1);
                    T* to = gathered.data() + k * R;
                    for (int group = 0; group < groups.groups; ++group, to += R * COLUMNS) {
                        const int i0 = groups.begin(group), size = groups.end(group) - i0;
                        if (size == R && a_row == 1)
                            std::memcpy(to, column + i0, R * sizeof(T));
                        else
                            for (int i = 0; i < size; ++i) to[i] = column[(i0 + i) * a_row];
                    }
                }
                product(B, 0, B.blocks, count, rows, contiguous ? 1 : R, (int)k0, (int)(k0 + columns),
                        direct ? C : padded.data(), direct ? job.c_row : (ptrdiff_t)B.row(), direct && job.accumulate);
            }
            for (int i = 0; i < count && !direct; ++i) add_row(job, m0 + i, padded.data() + i * B.row(), gathered);
        }
    });
}

void multiply(const Product* job, int threads) {
    if (job->dtype == FLOAT64)
        matmul<double>(*job, threads);
    else
        matmul<float>(*job, threads);
}

// ---- sums over all timesteps: sums[M] of N rows of M elements, `row` apart, accumulated in double; float for 16 bits

template <typename T>
void add_rows(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int dtype, T* sums, int threads) {
    typedef Vec<double> D;
    constexpr int vectors = ACCUMULATORS / 2, width = vectors * D::lanes;  // columns at a time: whole cache lines
    on_threads(threads, [&](int thread) {
        for (int m0 = width * thread; m0 < M; m0 += width * threads) {
            const int count = M - m0 < width ? M - m0 : width;
            D totals[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) totals[v] = D(0);
            for (ptrdiff_t n = 0; n < N; ++n) {
                const T* from = (const T*)rows + n * row + m0;
                T padded[width];
                if (has_16_bits(dtype)) {
                    std::fill(padded + count, padded + width, T(0));
                    load_numbers(dtype, (const uint16_t*)rows + n * row + m0, padded, count);
                    from = padded;
                } else if (count < width) {
                    for (int m = 0; m < width; ++m) padded[m] = m < count ? from[m] : T(0);
                    from = padded;
                }
                UNROLL for (int v = 0; v < vectors; ++v) {
                    D x;
                    UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = from[v * D::lanes + i];
                    totals[v] += x;
                }
            }
            double stored[width];
            UNROLL for (int v = 0; v < vectors; ++v) totals[v].store(stored + v * D::lanes);
            for (int m = 0; m < count; ++m) sums[m0 + m] = (T)stored[m];
        }
    });
}

void add_rows_any(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int dtype, void* sums, int threads) {
    if (dtype == FLOAT64)
        add_rows(rows, N, M, row, dtype, (double*)sums, threads);
    else
        add_rows(rows, N, M, row, dtype, (float*)sums, threads);
}
