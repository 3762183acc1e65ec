// Products with weights of 16 bits, which become floats in registers, for one instruction set: a part of time_loop.h. They have the
// bits of products with the same numbers as floats.

// Adds the products of R rows with one column to the sums.
template <int dtype, int second, int R, int V, int width>
INLINE void add_column(Vec<float> (&sums)[R][V], const float* const* A, ptrdiff_t k, const uint16_t* B) {
    constexpr int lanes = Vec<float>::lanes;
    Vec<float> b[V];
    UNROLL for (int v = 0; v < V; ++v) b[v] = load_packed<dtype, second, width * lanes>(B, v * lanes);
    UNROLL for (int r = 0; r < R; ++r) {
        const Vec<float> a(A[r][k]);
        UNROLL for (int v = 0; v < V; ++v) sums[r][v].v += a.v * b[v].v;
    }
}

// multiply_tile of gemm.h with packed weights of 16 bits, for `count` rows, at most R.
template <int dtype, int R, int V, int width>
INLINE void multiply_halves(int count, int K, const float* const* A, const uint16_t* B, float* out, ptrdiff_t out_row, bool first) {
    typedef Vec<float> W;
    if (count < R) {
        if constexpr (R > 1) multiply_halves<dtype, R - 1, V, width>(count, K, A, B, out, out_row, first);
        return;
    }
    W sums[R][V];
    const float* rows[R];
    UNROLL for (int r = 0; r < R; ++r) {
        rows[r] = A[r];
        UNROLL for (int v = 0; v < V; ++v) sums[r][v] = W(0);
    }
    ptrdiff_t k = 0;
    for (; k + 1 < K; k += 2, B += 2 * width * W::lanes) {
        add_column<dtype, 0, R, V, width>(sums, rows, k, B);
        add_column<dtype, 1, R, V, width>(sums, rows, k + 1, B);
    }
    if (k < K) add_column<dtype, 0, R, V, width>(sums, rows, k, B);
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int v = 0; v < V; ++v) {
            float* to = out + r * out_row + v * W::lanes;
            (first ? sums[r][v] : W::load(to) + sums[r][v]).store(to);
        }
}

// multiply_block of gemm.h likewise, with at most `rows_at_once` rows of `vectors_at_once` vectors, or one more.
template <int dtype, int rows_at_once, int vectors_at_once, int begin, int width>
INLINE void multiply_block_of_halves(int count, const float* const* A, ptrdiff_t offset, int K, const uint16_t* B, float* out,
                                     ptrdiff_t out_row, bool first) {
    constexpr int parts = std::max(1, (width - begin) / vectors_at_once), V = (width - begin) / parts;
    constexpr int limit = V > vectors_at_once ? ACCUMULATORS / 4 : rows_at_once, lanes = Vec<float>::lanes;
    const Groups groups(count, limit);
    const float* rows[limit];
    for (int group = 0; group < groups.groups; ++group) {
        const int i0 = groups.begin(group), size = groups.end(group) - i0;
        for (int i = 0; i < size; ++i) rows[i] = A[i0 + i] + offset;
        const uint16_t* from = B + (dtype == BFLOAT16 ? 2 : 1) * begin * lanes;
        multiply_halves<dtype, limit, V, width>(size, K, rows, from, out + i0 * out_row + begin * lanes, out_row, first);
    }
    if constexpr (begin + V < width)
        multiply_block_of_halves<dtype, rows_at_once, vectors_at_once, begin + V, width>(count, A, offset, K, B, out, out_row, first);
}

// `product` of gemm.h with packed weights of 16 bits.
template <int dtype, int G, int U>
void product_of_halves(const Packed<float, G, U>& B, int first, int last, int count, const float* const* A, float* out,
                       ptrdiff_t out_row) {
    for (int block = first; block < last; ++block)
        for (int k0 = 0; k0 < B.K; k0 += CHUNK_COLUMNS) {
            const int K = std::min(CHUNK_COLUMNS, B.K - k0);
            const uint16_t* values = B.halves(block, k0);
            float* to = out + block * B.width;
            // Beside the sums, converted vectors and a mask of bfloat16 need registers.
            constexpr int rows = dtype == FLOAT16 ? 6 : 5;
            if constexpr (ACCUMULATORS >= 24)
                multiply_block_of_halves<dtype, 6, 4, 0, G * U>(count, A, k0, K, values, to, out_row, k0 == 0);
            else if (count <= 4)
                multiply_block_of_halves<dtype, 2, 4, 0, G * U>(count, A, k0, K, values, to, out_row, k0 == 0);
            else
                multiply_block_of_halves<dtype, rows, 2, 0, G * U>(count, A, k0, K, values, to, out_row, k0 == 0);
        }
}

// Where the weights of a `Packed` lie that is not packed.
struct Unpacked {
    const void* source;
    ptrdiff_t gate_stride, n_stride;
    int N, K, width, units;  // width, units: those of a block
};

// Those at even places of two vectors, and those at odd ones.
INLINE void split(Vec<float>& a, Vec<float>& b) {
    constexpr int lanes = Vec<float>::lanes;
    const Vec<float> first = a, second = b;
#ifdef __clang__
    UNROLL for (int i = 0; i < lanes; ++i) {
        a.v[i] = i < lanes / 2 ? first.v[2 * i % lanes] : second.v[2 * i % lanes];
        b.v[i] = i < lanes / 2 ? first.v[(2 * i + 1) % lanes] : second.v[(2 * i + 1) % lanes];
    }
#else
    Vec<float>::Ints even;
    UNROLL for (int i = 0; i < lanes; ++i) even[i] = 2 * i;
    a.v = __builtin_shuffle(first.v, second.v, even);
    b.v = __builtin_shuffle(first.v, second.v, even + 1);
#endif
}

// Two vectors of weights that are not packed: numbers of 16 bits, or floats that are rounded to these. Of bfloat16 they are split:
// one instruction makes floats of every second number. What they are multiplied by is split likewise.
template <int dtype>
struct Halved {
    typedef uint16_t Number;
    static INLINE void load_two(const Number* from, Vec<float>& a, Vec<float>& b) {
        if constexpr (dtype == FLOAT16) {
            a = load_halves<dtype>(from), b = load_halves<dtype>(from + Vec<float>::lanes);
        } else {
            Words both;
            std::memcpy(&both, from, sizeof both);
            a = (Vec<float>::Lanes)(both << 16), b = (Vec<float>::Lanes)(both & 0xFFFF0000u);
        }
    }
};
template <int dtype>
struct Rounded {
    typedef float Number;
    static INLINE void load_two(const Number* from, Vec<float>& a, Vec<float>& b) {
        a = from_halves<dtype>(to_halves<dtype>(Vec<float>::load(from)));
        b = from_halves<dtype>(to_halves<dtype>(Vec<float>::load(from + Vec<float>::lanes)));
        if constexpr (dtype == BFLOAT16) split(a, b);
    }
};
struct Ready {  // what `load_two` has made
    typedef float Number;
    static INLINE void load_two(const Number* from, Vec<float>& a, Vec<float>& b) {
        a = Vec<float>::load(from), b = Vec<float>::load(from + Vec<float>::lanes);
    }
};

// Products of a row of A with as many rows of weights as a vector has numbers, in whole pairs of vectors, K columns.
template <typename Weights>
INLINE Vec<float> multiply_rows_in_place(const typename Weights::Number* const* rows, const float* A, int K) {
    constexpr int lanes = Vec<float>::lanes;
    Vec<float> sums[lanes];
    UNROLL for (int i = 0; i < lanes; ++i) sums[i] = Vec<float>(0);
    for (int k = 0; k < K; k += 2 * lanes) {
        const Vec<float> a = Vec<float>::load(A + k), b = Vec<float>::load(A + k + lanes);
        UNROLL for (int i = 0; i < lanes; ++i) {
            Vec<float> v, w;
            Weights::load_two(rows[i] + k, v, w);
            sums[i].v += a.v * v.v;
            sums[i].v += b.v * w.v;
        }
    }
    transpose(sums);
    UNROLL for (int s = lanes / 2; s > 0; s /= 2)
        UNROLL for (int i = 0; i < s; ++i) sums[i] += sums[i + s];
    return sums[0];
}

// product_in_place of gemm.h with weights that `Weights` loads. Of many rows of A the weights become floats once.
template <int dtype, typename Weights>
void product_in_place16(const Unpacked& B, int first, int last, int count, const float* const* A, float* out, ptrdiff_t out_row,
                        bool add) {
    typedef Vec<float> W;
    typedef typename Weights::Number Number;
    constexpr int lanes = W::lanes, pair = 2 * lanes, few = 2;
    const int whole = B.K / pair * pair, rest = B.K - whole, K = rest ? whole + pair : whole;
    // The rows of A, split and filled up with zeros; then the last columns of the weights, filled up; then weights as floats.
    const size_t many = count > few ? (size_t)lanes * K : 0;
    AlignedBuffer<float> memory((size_t)count * K + many);
    Number last_columns[lanes][pair] = {};
    float *a_rows = memory.begin(), *floats = a_rows + (size_t)count * K;
    for (int row = 0; row < count; ++row)
        for (int k = 0; k < K; k += pair) {
            W a = W::load(A[row] + k, B.K - k), b = W::load(A[row] + k + lanes, std::max(0, B.K - k - lanes));
            if constexpr (dtype == BFLOAT16) split(a, b);
            a.store(a_rows + (size_t)row * K + k), b.store(a_rows + (size_t)row * K + k + lanes);
        }
    for (int column = first * B.width; column < last * B.width; column += lanes) {
        const int g = column % B.width / B.units, n0 = column / B.width * B.units + column % B.units;
        const Number *rows[lanes], *ends[lanes];
        const float *ready[lanes];
        for (int i = 0; i < lanes; ++i) {
            rows[i] = (const Number*)B.source + g * B.gate_stride + std::min(n0 + i, B.N - 1) * B.n_stride;
            if (rest) std::memcpy(last_columns[i], rows[i] + whole, rest * sizeof(Number));
            ends[i] = last_columns[i];
            ready[i] = floats + (size_t)i * K;
            for (int k = 0; k < K && many; k += pair) {
                W a, b;
                Weights::load_two(k < whole ? rows[i] + k : ends[i], a, b);
                a.store(floats + (size_t)i * K + k), b.store(floats + (size_t)i * K + k + lanes);
            }
        }
        for (int row = 0; row < count; ++row) {
            const float* a = a_rows + (size_t)row * K;
            float* to = out + row * out_row + column;
            W sum = many ? multiply_rows_in_place<Ready>(ready, a, whole) : multiply_rows_in_place<Weights>(rows, a, whole);
            if (rest) sum += multiply_rows_in_place<Weights>(ends, a + whole, pair);
            (add ? W::load(to) + sum : sum).store(to);
        }
    }
}

// `product` of gemm.h where the weights are to have 16 bits: see Packed::dtype.
template <int dtype, int G, int U>
void product16(const Packed<float, G, U>& B, int first, int last, int count, const float* const* A, float* out, ptrdiff_t out_row,
               bool add) {
    if (!B.in_place) return product_of_halves<dtype>(B, first, last, count, A, out, out_row);
    const Unpacked weights = {B.source, B.gate_stride, B.n_stride, B.N, B.K, B.width, B.units};
    if (B.source_dtype == FLOAT32)
        product_in_place16<dtype, Rounded<dtype>>(weights, first, last, count, A, out, out_row, add);
    else
        product_in_place16<dtype, Halved<dtype>>(weights, first, last, count, A, out, out_row, add);
}
