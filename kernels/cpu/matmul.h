// Any product of two matrices, and sums over rows, for one instruction set: a part of parts.h.

// ---- any product of two matrices

// C = A B, or C += A B, on `threads` threads that divide the rows.
template <typename T>
void matmul(const Product& job, int threads) {
    if (job.scales) return matmul_int8<T>(job, threads);
    const ptrdiff_t M = job.M, N = job.N, K = job.K;
    // A tile of ROWS x COLUMNS of A stays in the second-level cache: 192 KB of floats.
    constexpr int R = ACCUMULATORS / 2, ROWS = 48, COLUMNS = 1000;
    Packed<T, 1, 2> B((int)N, (int)K);
    B.source = (const T*)job.B, B.n_stride = job.b_column, B.k_stride = job.b_row;
    B.in_place = M <= FEW_ROWS && job.a_column == 1 && job.b_row == 1 && K <= COLUMNS;
    AlignedBuffer<T> values(B.size());
    B.values = values.begin();
    Barrier packed(threads);
    on_threads(threads, [&](int thread) {
        for (int block = thread; block < B.blocks && !B.in_place; block += threads) B.pack(block);
        packed.wait();
        const bool contiguous = job.a_column == 1;  // the rows of A
        const bool direct = N == (ptrdiff_t)B.row() && K > 0;  // products go straight into C, as no block has padding
        const ptrdiff_t first = M * thread / threads, last = M * (thread + 1) / threads;
        // Where the rows of A are not contiguous, a tile of it is copied: [groups][columns][R].
        std::vector<T> gathered(contiguous ? 0 : ROWS * COLUMNS), padded(direct ? 0 : ROWS * B.row());
        const T* rows[ROWS];
        for (ptrdiff_t m0 = first; m0 < last; m0 += ROWS) {
            const int count = (int)std::min<ptrdiff_t>(last - m0, ROWS);
            const RowGroups groups(count, R);
            T* C = (T*)job.C + m0 * job.c_row;
            for (ptrdiff_t k0 = 0; k0 < K; k0 += COLUMNS) {
                const ptrdiff_t columns = std::min<ptrdiff_t>(K - k0, COLUMNS);
                const T* A = (const T*)job.A + m0 * job.a_row + k0 * job.a_column;
                for (int i = 0; i < count && contiguous; ++i) rows[i] = A + i * job.a_row;
                for (int group = 0; group < groups.groups && !contiguous; ++group)
                    for (int i = groups.begin(group); i < groups.end(group); ++i)
                        rows[i] = gathered.data() + group * R * COLUMNS + i - groups.begin(group);
                for (ptrdiff_t k = 0; k < columns && !contiguous; ++k) {
                    const T* column = A + k * job.a_column;
                    T* to = gathered.data() + k * R;
                    for (int group = 0; group < groups.groups; ++group, to += R * COLUMNS) {
                        const int i0 = groups.begin(group), size = groups.end(group) - i0;
                        if (size == R && job.a_row == 1)
                            std::memcpy(to, column + i0, R * sizeof(T));
                        else
                            for (int i = 0; i < size; ++i) to[i] = column[(i0 + i) * job.a_row];
                    }
                }
                product(B, 0, B.blocks, count, rows, contiguous ? 1 : R, (int)k0, (int)(k0 + columns),
                        direct ? C : padded.data(), direct ? job.c_row : (ptrdiff_t)B.row(), direct && job.accumulate);
            }
            for (int i = 0; i < count && !direct; ++i, C += job.c_row) {
                const T* from = padded.data() + i * B.row();
                if (job.accumulate)
                    for (ptrdiff_t n = 0; n < N; ++n) C[n] += from[n];
                else
                    std::memcpy(C, from, N * sizeof(T));
            }
        }
    });
}

void multiply(const Product* job, int threads) {
    if (job->is_double)
        matmul<double>(*job, threads);
    else
        matmul<float>(*job, threads);
}

// ---- sums over all timesteps: sums[M] of N rows of M elements, `row` apart, accumulated in double

template <typename T>
void add_rows(const T* rows, ptrdiff_t N, int M, ptrdiff_t row, T* sums, int threads) {
    typedef Vec<double> D;
    constexpr int vectors = ACCUMULATORS / 2, width = vectors * D::lanes;  // columns at a time: whole cache lines
    on_threads(threads, [&](int thread) {
        for (int m0 = width * thread; m0 < M; m0 += width * threads) {
            const int count = M - m0 < width ? M - m0 : width;
            D totals[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) totals[v] = D(0);
            for (ptrdiff_t n = 0; n < N; ++n) {
                const T* from = rows + n * row + m0;
                T padded[width];
                if (count < width) {
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

void add_rows_any(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int is_double, void* sums, int threads) {
    if (is_double)
        add_rows((const double*)rows, N, M, row, (double*)sums, threads);
    else
        add_rows((const float*)rows, N, M, row, (float*)sums, threads);
}
