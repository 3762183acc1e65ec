// Matrix products and sums over rows on the CPU, for one instruction set: a part of time_loop.h.
//
// We do not call NumPy's BLAS: its threads keep spinning for milliseconds after a call, on processors that the time loop needs.
// Sums run over k in one order. It does not depend on the number of threads, nor, except for a few rows (FEW_ROWS), on the
// number of rows.

// Columns of a product at a time. Their weights stay in cache (16 KiB for each vector of a block with AVX-512), and sums of
// partial sums are more accurate.
constexpr int CHUNK_COLUMNS = 256;
// With this many rows or fewer, packing the other matrix costs more than it saves.
constexpr int FEW_ROWS = 8;

// ---- out = A B^T, where the rows of A lie anywhere in memory and B is packed
//
// A block of B is G x U vectors of outputs: for each of G gates, the outermost, U vectors of neighboring units. A packed block
// is [K][G][U][lanes], with zeros for the units past the end.

template <typename T, int G, int U>
struct Packed {
    static constexpr int lanes = Vec<T>::lanes, units = U * lanes, width = G * units;
    int N, K, blocks;
    const T* source = nullptr;  // element (gate, n, k) is at gate_stride * gate + n_stride * n + k_stride * k
    ptrdiff_t gate_stride = 0, n_stride = 0, k_stride = 0;
    bool in_place = false;  // not packed: `product` reads the source, as packing does not pay for weights multiplied once
    T* values = nullptr;

    // N outputs of each gate, K columns.
    Packed(int N, int K) : N(N), K(K), blocks((N + units - 1) / units) {}

    size_t row() const { return (size_t)blocks * width; }  // elements of a row of products
    size_t size() const { return in_place ? 0 : row() * K; }

    void pack(int block) const {
        T* block_values = values + (size_t)block * K * width;
        if (G == 1 && n_stride == 1 && (block + 1) * units <= N) {
            const T* row = source + block * units;
            for (int k = 0; k < K; ++k) std::memcpy(block_values + (size_t)k * width, row + k * k_stride, units * sizeof(T));
            return;
        }
        for (int k0 = 0; k0 < K; k0 += lanes) {
            const int count = K - k0 < lanes ? K - k0 : lanes;
            for (int g = 0; g < G; ++g)
                for (int u = 0; u < U; ++u) {
                    const int n0 = block * units + u * lanes;
                    const T* from = source + g * gate_stride + n0 * n_stride + k0 * k_stride;
                    T* to = block_values + (size_t)k0 * width + g * units + u * lanes;
                    if (k_stride == 1) {  // transpose a square in registers
                        Vec<T> square[lanes];
                        UNROLL for (int i = 0; i < lanes; ++i)
                            square[i] = n0 + i < N ? Vec<T>::load(from + i * n_stride, count) : Vec<T>(0);
                        transpose(square);
                        for (int k = 0; k < count; ++k) square[k].store(to + (size_t)k * width);
                    } else {
                        for (int i = 0; i < lanes; ++i)
                            for (int k = 0; k < count; ++k)
                                to[(size_t)k * width + i] = n0 + i < N ? from[i * n_stride + k * k_stride] : T(0);
                    }
                }
        }
    }
};

// Multiplies R rows by K columns of one block. Adds the products to `out`, or stores them if `first`. Elements of a row of A
// are `step` apart. All loops are unrolled, so that the sums are registers.
template <typename T, int R, int V>
INLINE void multiply_tile(int K, const T* const* A, int step, const T* B, T* out, ptrdiff_t out_row, bool first) {
    constexpr int lanes = Vec<T>::lanes;
    Vec<T> sums[R][V];
    const T* rows[R];
    UNROLL for (int r = 0; r < R; ++r) {
        rows[r] = A[r];
        UNROLL for (int v = 0; v < V; ++v) sums[r][v] = Vec<T>(0);
    }
    for (ptrdiff_t k = 0; k < (ptrdiff_t)K * step; k += step, B += V * lanes) {
        Vec<T> b[V];
        UNROLL for (int v = 0; v < V; ++v) b[v] = Vec<T>::load(B + v * lanes);
        UNROLL for (int r = 0; r < R; ++r) {
            const Vec<T> a(rows[r][k]);
            UNROLL for (int v = 0; v < V; ++v) sums[r][v].v += a.v * b[v].v;
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < V; ++v) {
            T* to = out + r * out_row + v * lanes;
            (first ? sums[r][v] : Vec<T>::load(to) + sums[r][v]).store(to);
        }
}

// multiply_tile for `count` rows, at most R.
template <typename T, int R, int V>
INLINE void multiply_rows(int count, int K, const T* const* A, int step, const T* B, T* out, ptrdiff_t out_row, bool first) {
    if constexpr (R > 0) {
        if (count == R)
            multiply_tile<T, R, V>(K, A, step, B, out, out_row, first);
        else
            multiply_rows<T, R - 1, V>(count, K, A, step, B, out, out_row, first);
    }
}

// Divides rows into groups of at most `limit` rows and nearly equal size: a single row left over would be slow.
struct RowGroups {
    int rows, groups;
    RowGroups(int rows, int limit) : rows(rows), groups((rows + limit - 1) / limit) {}
    int begin(int group) const { return rows * group / groups; }
    int end(int group) const { return rows * (group + 1) / groups; }
};

// `product` with weights that are not packed and whose k_stride is 1. For each vector of outputs it keeps a vector of partial
// sums over k for each output, and adds up their lanes at the end.
template <typename T, int G, int U>
void product_in_place(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, T* out, ptrdiff_t out_row,
                      bool add) {
    constexpr int lanes = Vec<T>::lanes;
    for (int column = first * B.width; column < last * B.width; column += lanes) {
        const int g = column % B.width / B.units, n0 = column / B.width * B.units + column % B.units;
        const T* W[lanes];
        for (int i = 0; i < lanes; ++i) W[i] = B.source + g * B.gate_stride + (n0 + i < B.N ? n0 + i : B.N - 1) * B.n_stride;
        for (int row = 0; row < count; ++row) {
            Vec<T> sums[lanes];
            UNROLL for (int i = 0; i < lanes; ++i) sums[i] = Vec<T>(0);
            int k = 0;
            for (; k + 2 * lanes <= B.K; k += 2 * lanes) {
                const Vec<T> a = Vec<T>::load(A[row] + k), b = Vec<T>::load(A[row] + k + lanes);
                UNROLL for (int i = 0; i < lanes; ++i) {
                    sums[i].v += a.v * Vec<T>::load(W[i] + k).v;
                    sums[i].v += b.v * Vec<T>::load(W[i] + k + lanes).v;
                }
            }
            for (; k < B.K; k += lanes) {
                const int left = B.K - k < lanes ? B.K - k : lanes;
                const Vec<T> a = Vec<T>::load(A[row] + k, left);
                UNROLL for (int i = 0; i < lanes; ++i) sums[i].v += a.v * Vec<T>::load(W[i] + k, left).v;
            }
            transpose(sums);
            UNROLL for (int s = lanes / 2; s > 0; s /= 2)
                UNROLL for (int i = 0; i < s; ++i) sums[i] += sums[i + s];
            T* to = out + row * out_row + column;
            (add ? Vec<T>::load(to) + sums[0] : sums[0]).store(to);
        }
    }
}

// Multiplies `count` rows of A by blocks [first, last) of B. Row i of out, out_row elements apart, is [blocks][G][U][lanes].
// Elements of a row of A are `step` apart. Only columns [begin, end) are multiplied: A[i] points at column `begin`. If `add` or
// if begin > 0, the products are added to out, else stored.
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, int step, int begin, int end, T* out,
             ptrdiff_t out_row, bool add) {
    constexpr int V = G * U, limit = ACCUMULATORS / V;
    const RowGroups groups(count, limit);
    const T* rows[limit];
    if (B.in_place) return product_in_place(B, first, last, count, A, out, out_row, add);
    for (int block = first; block < last; ++block)
        for (int k0 = begin; k0 < end; k0 += CHUNK_COLUMNS) {
            const int K = k0 + CHUNK_COLUMNS < end ? CHUNK_COLUMNS : end - k0;
            const T* values = B.values + ((size_t)block * B.K + k0) * B.width;
            for (int group = 0; group < groups.groups; ++group) {
                const int i0 = groups.begin(group), size = groups.end(group) - i0;
                for (int i = 0; i < size; ++i) rows[i] = A[i0 + i] + (ptrdiff_t)(k0 - begin) * step;
                T* to = out + i0 * out_row + block * B.width;
                multiply_rows<T, limit, V>(size, K, rows, step, values, to, out_row, k0 == 0 && !add);
            }
        }
}

// The same for whole contiguous rows of A. Rows of out are B.row() elements apart.
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, T* out) {
    product(B, first, last, count, A, 1, 0, B.K, out, B.row(), false);
}
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int count, const T* const* A, T* out) {
    product(B, 0, B.blocks, count, A, out);
}

// ---- any product of two matrices

// C = A B, or C += A B, on `threads` threads that divide the rows.
template <typename T>
void matmul(const Product& job, int threads) {
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
