// Products of matrices on the CPU, and sums over rows, for one kind of processor: a part of time_loop.h.
//
// NumPy's BLAS would do as well, but for its threads: they go on looking for work for milliseconds, on the processors that the
// walk needs. Sums run over k in one order, whatever the threads, and but for a few rows
// (FEW) whatever their number.

// Columns of a product at a time: their weights stay in the first cache, and sums of sums are more exact.
constexpr int KC = 256;
// Rows of a product that are not worth packing what they are multiplied with, at most.
constexpr int FEW = 8;

// ---- out = A B^T, rows of A anywhere in memory, B packed
//
// A block of B is G x U vectors of outputs: U vectors of neighbouring units for each of G gates, gate outermost. Packed, a
// block is [K][G][U][lanes], with zeros for the units past the end.

template <typename T, int G, int U>
struct Packed {
    static constexpr int lanes = Vec<T>::lanes, units = U * lanes, width = G * units;
    int N, K, blocks;
    const T* source = nullptr;  // element (gate, n, k) is at gate_stride * gate + n_stride * n + k_stride * k
    ptrdiff_t gate_stride = 0, n_stride = 0, k_stride = 0;
    bool in_place = false;  // weights that are multiplied once are not worth packing: product reads them where they stand
    T* values = nullptr;

    // N outputs of each gate, K columns.
    Packed(int N, int K) : N(N), K(K), blocks((N + units - 1) / units) {}

    size_t row() const { return (size_t)blocks * width; }  // of the products
    size_t size() const { return in_place ? 0 : row() * K; }

    void pack(int number) const {
        T* to = values + (size_t)number * K * width;
        if (G == 1 && n_stride == 1 && (number + 1) * units <= N) {
            const T* row = source + number * units;
            for (int k = 0; k < K; ++k) std::memcpy(to + (size_t)k * width, row + k * k_stride, units * sizeof(T));
            return;
        }
        for (int k0 = 0; k0 < K; k0 += lanes) {
            const int count = K - k0 < lanes ? K - k0 : lanes;
            for (int g = 0; g < G; ++g)
                for (int u = 0; u < U; ++u) {
                    const int n0 = number * units + u * lanes;
                    const T* corner = source + g * gate_stride + n0 * n_stride + k0 * k_stride;
                    T* place = to + (size_t)k0 * width + g * units + u * lanes;
                    if (k_stride == 1) {  // a square, whose rows lie side by side
                        Vec<T> square[lanes];
                        UNROLL for (int i = 0; i < lanes; ++i)
                            square[i] = n0 + i < N ? Vec<T>::load(corner + i * n_stride, count) : Vec<T>(0);
                        transpose(square);
                        for (int k = 0; k < count; ++k) square[k].store(place + (size_t)k * width);
                    } else {
                        for (int i = 0; i < lanes; ++i)
                            for (int k = 0; k < count; ++k)
                                place[(size_t)k * width + i] = n0 + i < N ? corner[i * n_stride + k * k_stride] : T(0);
                    }
                }
        }
    }
};

// R rows times K columns of one block, added to what stands in out unless first; numbers of a row lie `step` apart. Unrolled, so
// that sums are registers.
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

// As many rows at once as there are registers, by the number of rows.
template <typename T, int R, int V>
INLINE void multiply_rows(int count, int K, const T* const* A, int step, const T* B, T* out, ptrdiff_t out_row, bool first) {
    if constexpr (R > 0) {
        if (count == R)
            multiply_tile<T, R, V>(K, A, step, B, out, out_row, first);
        else
            multiply_rows<T, R - 1, V>(count, K, A, step, B, out, out_row, first);
    }
}

// Rows go through a product in groups of nearly equal size, at most `most`: a last row alone would be slow.
struct Groups {
    int count, most, number;
    Groups(int count, int most) : count(count), most(most), number((count + most - 1) / most) {}
    int begin(int group) const { return count * group / number; }
    int end(int group) const { return count * (group + 1) / number; }
};

// The products of rows with weights that are not packed and whose k_stride is 1: for a vector of outputs so many vectors of sums
// over k, each lane a part, then over the lanes.
template <typename T, int G, int U>
void product_in_place(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, T* out, ptrdiff_t out_row,
                  bool add) {
    constexpr int lanes = Vec<T>::lanes;
    for (int place = first * B.width; place < last * B.width; place += lanes) {
        const int g = place % B.width / B.units, n0 = place / B.width * B.units + place % B.units;
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
                const int some = B.K - k < lanes ? B.K - k : lanes;
                const Vec<T> a = Vec<T>::load(A[row] + k, some);
                UNROLL for (int i = 0; i < lanes; ++i) sums[i].v += a.v * Vec<T>::load(W[i] + k, some).v;
            }
            transpose(sums);
            UNROLL for (int s = lanes / 2; s > 0; s /= 2)
                UNROLL for (int i = 0; i < s; ++i) sums[i] += sums[i + s];
            T* to = out + row * out_row + place;
            (add ? Vec<T>::load(to) + sums[0] : sums[0]).store(to);
        }
    }
}

// Row i of out, out_row numbers apart, = the products of row A[i] with blocks [first, last), [blocks][G][U][lanes]; numbers of
// a row of A lie `step` apart. Of columns [begin, end) alone: A[i] then starts at column begin. With `add` they are added to
// what is there, and so are those of columns behind the first ones.
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, int step, int begin, int end, T* out,
             ptrdiff_t out_row, bool add) {
    constexpr int V = G * U, most = ACCUMULATORS / V;
    const Groups groups(count, most);
    const T* rows[most];
    if (B.in_place) return product_in_place(B, first, last, count, A, out, out_row, add);
    for (int block = first; block < last; ++block)
        for (int k0 = begin; k0 < end; k0 += KC) {
            const int K = k0 + KC < end ? KC : end - k0;
            const T* values = B.values + ((size_t)block * B.K + k0) * B.width;
            for (int group = 0; group < groups.number; ++group) {
                const int i0 = groups.begin(group), size = groups.end(group) - i0;
                for (int i = 0; i < size; ++i) rows[i] = A[i0 + i] + (ptrdiff_t)(k0 - begin) * step;
                T* to = out + i0 * out_row + block * B.width;
                multiply_rows<T, most, V>(size, K, rows, step, values, to, out_row, k0 == 0 && !add);
            }
        }
}

// The same of whole rows, their numbers side by side, into rows of B.row() numbers.
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, T* out) {
    product(B, first, last, count, A, 1, 0, B.K, out, B.row(), false);
}
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int count, const T* const* A, T* out) {
    product(B, 0, B.blocks, count, A, out);
}

// ---- any product of two matrices

// C = A B, or C += A B, by `threads` threads that share the rows.
template <typename T>
void matmul(const Product& job, int threads) {
    const ptrdiff_t M = job.M, N = job.N, K = job.K;
    constexpr int R = ACCUMULATORS / 2, most = 48, some = 1000;  // rows and columns at a time: they stay in the second cache
    Packed<T, 1, 2> B((int)N, (int)K);
    B.source = (const T*)job.B, B.n_stride = job.b_column, B.k_stride = job.b_row;
    B.in_place = M <= FEW && job.a_column == 1 && job.b_row == 1 && K <= some;
    AlignedBuffer<T> values(B.size());
    B.values = values.begin();
    Barrier packed(threads);
    on_threads(threads, [&](int thread) {
        for (int block = thread; block < B.blocks && !B.in_place; block += threads) B.pack(block);
        packed.wait();
        const bool upright = job.a_column == 1;
        const bool whole = N == (ptrdiff_t)B.row() && K > 0;  // then the sums are C's rows themselves
        const ptrdiff_t first = M * thread / threads, last = M * (thread + 1) / threads;
        std::vector<T> turned(upright ? 0 : most * some), rest(whole ? 0 : most * B.row());
        const T* rows[most];
        for (ptrdiff_t m0 = first; m0 < last; m0 += most) {
            const int count = (int)std::min<ptrdiff_t>(last - m0, most);
            const Groups groups(count, R);
            T* C = (T*)job.C + m0 * job.c_row;
            for (ptrdiff_t k0 = 0; k0 < K; k0 += some) {
                const ptrdiff_t columns = std::min<ptrdiff_t>(K - k0, some);
                const T* A = (const T*)job.A + m0 * job.a_row + k0 * job.a_column;
                for (int i = 0; i < count && upright; ++i) rows[i] = A + i * job.a_row;
                for (int group = 0; group < groups.number && !upright; ++group)  // the rows of a group side by side
                    for (int i = groups.begin(group); i < groups.end(group); ++i)
                        rows[i] = turned.data() + group * R * some + i - groups.begin(group);
                for (ptrdiff_t k = 0; k < columns && !upright; ++k) {
                    const T* column = A + k * job.a_column;
                    T* to = turned.data() + k * R;
                    for (int group = 0; group < groups.number; ++group, to += R * some) {
                        const int i0 = groups.begin(group), size = groups.end(group) - i0;
                        if (size == R && job.a_row == 1)
                            std::memcpy(to, column + i0, R * sizeof(T));
                        else
                            for (int i = 0; i < size; ++i) to[i] = column[(i0 + i) * job.a_row];
                    }
                }
                product(B, 0, B.blocks, count, rows, upright ? 1 : R, (int)k0, (int)(k0 + columns), whole ? C : rest.data(),
                        whole ? job.c_row : (ptrdiff_t)B.row(), whole && job.accumulate);
            }
            for (int i = 0; i < count && !whole; ++i, C += job.c_row) {
                const T* from = rest.data() + i * B.row();
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

// ---- sums over all steps: sums[M] of N rows of M numbers, `row` apart, added up in double

template <typename T>
void add_rows(const T* rows, ptrdiff_t N, int M, ptrdiff_t row, T* sums, int threads) {
    typedef Vec<double> D;
    constexpr int vectors = ACCUMULATORS / 2, width = vectors * D::lanes;  // columns at a time: whole cache lines
    on_threads(threads, [&](int thread) {
        for (int m0 = width * thread; m0 < M; m0 += width * threads) {
            const int count = M - m0 < width ? M - m0 : width;
            D total[vectors];
            UNROLL for (int v = 0; v < vectors; ++v) total[v] = D(0);
            for (ptrdiff_t n = 0; n < N; ++n) {
                const T* from = rows + n * row + m0;
                T rest[width];
                if (count < width) {
                    for (int m = 0; m < width; ++m) rest[m] = m < count ? from[m] : T(0);
                    from = rest;
                }
                UNROLL for (int v = 0; v < vectors; ++v) {
                    D x;
                    UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = from[v * D::lanes + i];
                    total[v] += x;
                }
            }
            double whole[width];
            UNROLL for (int v = 0; v < vectors; ++v) total[v].store(whole + v * D::lanes);
            for (int m = 0; m < count; ++m) sums[m0 + m] = (T)whole[m];
        }
    });
}

void add_rows_any(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int is_double, void* sums, int threads) {
    if (is_double)
        add_rows((const double*)rows, N, M, row, (double*)sums, threads);
    else
        add_rows((const float*)rows, N, M, row, (float*)sums, threads);
}

