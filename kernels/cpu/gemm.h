// Matrix products with packed weights on the CPU, for one instruction set: a part of time_loop.h.
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
    int dtype = sizeof(T) == 8 ? FLOAT64 : FLOAT32, source_dtype = dtype;  // of `values`, to which they are rounded; of `source`
    const void* source = nullptr;  // element (gate, n, k) is at gate_stride * gate + n_stride * n + k_stride * k
    ptrdiff_t gate_stride = 0, n_stride = 0, k_stride = 0;
    bool in_place = false;  // not packed: `product` reads the source, as packing does not pay for weights multiplied once
    T* values = nullptr;
    const int8_t* int8 = nullptr;   // weights in 8 bits in place of `source`, with the scales of their rows: see int8.h
    const float* scales = nullptr;
    int bits = 16;  // of the whole numbers that they are multiplied by

    // N outputs of each gate, K columns.
    Packed(int N, int K) : N(N), K(K), blocks((N + units - 1) / units) {}

    size_t row() const { return (size_t)blocks * width; }  // elements of a row of products
    size_t size() const {
        if (int8) return int8_bytes(*this) / sizeof(T);
        return in_place ? 0 : has_16_bits(dtype) ? row() * ((K + 1) / 2) : row() * K;
    }
    // The columns of a block from k0 on, of 16 bits: see weights16.h. k0 is even.
    uint16_t* halves(int block, int k0) const {
        return (uint16_t*)values + ((size_t)block * ((K + 1) / 2) * 2 + k0) * width;
    }

    void pack(int block) const {
        if (int8) return pack_int8(*this, block);
        if (!has_16_bits(dtype)) {
            // Several cache lines of a row, one after another, before the next row
            for (int k0 = 0; k0 < K; k0 += CHUNK_COLUMNS)
                pack_columns(block, k0, std::min(CHUNK_COLUMNS, K - k0), values + ((size_t)block * K + k0) * width);
            return;
        }
        for (int k0 = 0; k0 < K; k0 += lanes) {
            const int count = K - k0 < lanes ? K - k0 : lanes;
            T columns[lanes * width];
            pack_columns(block, k0, count, columns);
            if constexpr (sizeof(T) == 4)
                for (int k = 0; k < count; k += 2)
                    (dtype == FLOAT16 ? pack_two<FLOAT16> : pack_two<BFLOAT16>)(columns + k * width, std::min(2, count - k), width,
                                                                                halves(block, k0 + k));
        }
    }

    // Packs `count` columns of a block from k0 on.
    void pack_columns(int block, int k0, int count, T* to) const {
        if (G == 1 && n_stride == 1) {
            const int n = std::min(units, N - block * units);
            for (int k = 0; k < count; ++k, to += width) {
                copy_source(block * units + (k0 + k) * k_stride, n, to);
                std::fill(to + n, to + units, T(0));
            }
            return;
        }
        for (int g = 0; g < G; ++g)
            for (int u = 0; u < U; ++u, to += lanes)
                for (int k = 0; k < count; k += lanes)
                    pack_square(g, block * units + u * lanes, k0 + k, std::min(lanes, count - k), to + (size_t)k * width);
    }

    // Packs `count` columns of a vector of outputs, at most as many as it has lanes.
    INLINE void pack_square(int g, int n0, int k0, int count, T* to) const {
        const ptrdiff_t place = g * gate_stride + n0 * n_stride + k0 * k_stride;
        T copy[lanes * lanes];
        const bool copied = has_16_bits(source_dtype) || k_stride != 1;
        const T* from = copied ? copy : (const T*)source + place;
        const ptrdiff_t row = copied ? lanes : n_stride;
        for (int i = 0; i < lanes && n0 + i < N && copied; ++i)
            if (k_stride == 1)
                copy_source(place + i * n_stride, count, copy + i * lanes);
            else
                for (int k = 0; k < count; ++k) copy_source(place + i * n_stride + k * k_stride, 1, copy + i * lanes + k);
        Vec<T> square[lanes];  // transposed in registers
        if (count == lanes && n0 + lanes <= N) {
            UNROLL for (int i = 0; i < lanes; ++i) square[i] = Vec<T>::load(from + i * row);
            transpose(square);
            UNROLL for (int k = 0; k < lanes; ++k) square[k].store(to + (size_t)k * width);
            return;
        }
        UNROLL for (int i = 0; i < lanes; ++i) square[i] = n0 + i < N ? Vec<T>::load(from + i * row, count) : Vec<T>(0);
        transpose(square);
        for (int k = 0; k < count; ++k) square[k].store(to + (size_t)k * width);
    }

    // n neighbors of the source from a place on.
    void copy_source(ptrdiff_t place, int n, T* to) const {
        if (has_16_bits(source_dtype))
            load_numbers(source_dtype, (const uint16_t*)source + place, to, n);
        else
            std::memcpy(to, (const T*)source + place, n * sizeof(T));
    }
};

// Multiplies R rows by K columns of some neighboring blocks, `next` elements apart: of V vectors of each, which is `width` vectors
// wide. Adds the products to `out`, or stores them if `first`. Elements of a row of A are `step` apart. All loops are unrolled, so
// that the sums are registers.
template <typename T, int R, int blocks, int V, int width>
INLINE void multiply_tile(int K, const T* const* A, int step, const T* B, ptrdiff_t next, T* out, ptrdiff_t out_row, bool first) {
    constexpr int lanes = Vec<T>::lanes, N = blocks * V;
    Vec<T> sums[R][N];
    const T* rows[R];
    UNROLL for (int r = 0; r < R; ++r) {
        rows[r] = A[r];
        UNROLL for (int n = 0; n < N; ++n) sums[r][n] = Vec<T>(0);
    }
    for (ptrdiff_t k = 0; k < (ptrdiff_t)K * step; k += step, B += width * lanes) {
        if constexpr (2 * V == width) __builtin_prefetch(B + V * lanes);  // the other half: no prefetcher asks for it
        Vec<T> b[N];
        UNROLL for (int n = 0; n < N; ++n) b[n] = Vec<T>::load(B + n / V * next + n % V * lanes);
        UNROLL for (int r = 0; r < R; ++r) {
            const Vec<T> a(rows[r][k]);
            UNROLL for (int n = 0; n < N; ++n) sums[r][n].v += a.v * b[n].v;
        }
    }
    UNROLL for (int r = 0; r < R; ++r)
        UNROLL for (int n = 0; n < N; ++n) {
            T* to = out + r * out_row + (n / V * width + n % V) * lanes;
            (first ? sums[r][n] : Vec<T>::load(to) + sums[r][n]).store(to);
        }
}

// multiply_tile for `count` rows, at most R.
template <typename T, int R, int blocks, int V, int width>
INLINE void multiply_rows(int count, int K, const T* const* A, int step, const T* B, ptrdiff_t next, T* out, ptrdiff_t out_row,
                          bool first) {
    if constexpr (R > 0) {
        if (count == R)
            multiply_tile<T, R, blocks, V, width>(K, A, step, B, next, out, out_row, first);
        else
            multiply_rows<T, R - 1, blocks, V, width>(count, K, A, step, B, next, out, out_row, first);
    }
}

// multiply_tile of R rows for `count` whole blocks, at most `blocks`.
template <typename T, int R, int blocks, int width>
INLINE void multiply_blocks(int count, int K, const T* const* A, int step, const T* B, ptrdiff_t next, T* out, ptrdiff_t out_row,
                            bool first) {
    if constexpr (blocks > 0) {
        if (count == blocks)
            multiply_tile<T, R, blocks, width, width>(K, A, step, B, next, out, out_row, first);
        else
            multiply_blocks<T, R, blocks - 1, width>(count, K, A, step, B, next, out, out_row, first);
    }
}

// Divides rows or blocks into groups of at most `limit` and nearly equal size: a single one left over would be slow.
struct Groups {
    int all, groups;
    Groups(int all, int limit) : all(all), groups((all + limit - 1) / limit) {}
    int begin(int group) const { return (int)((int64_t)all * group / groups); }
    int end(int group) const { return begin(group + 1); }
};

// Multiplies all rows by K columns of one block of `width` vectors, or of `blocks` narrow ones, from vector `begin` on: at most
// `most` vectors of a block at a time, so that several rows have sums in registers. Element k of row i is A[i][offset + k * step].
template <typename T, int blocks, int most, int begin, int width>
INLINE void multiply_block(int count, const T* const* A, ptrdiff_t offset, int K, int step, const T* B, ptrdiff_t next, T* out,
                           ptrdiff_t out_row, bool first) {
    constexpr int parts = (width - begin + most - 1) / most, V = (width - begin) / parts, limit = ACCUMULATORS / (blocks * V);
    constexpr int lanes = Vec<T>::lanes;
    const Groups groups(count, limit);
    const T* rows[limit];
    for (int group = 0; group < groups.groups; ++group) {
        const int i0 = groups.begin(group), size = groups.end(group) - i0;
        for (int i = 0; i < size; ++i) rows[i] = A[i0 + i] + offset;
        T* to = out + i0 * out_row + begin * lanes;
        multiply_rows<T, limit, blocks, V, width>(size, K, rows, step, B + begin * lanes, next, to, out_row, first);
    }
    if constexpr (begin + V < width)
        multiply_block<T, blocks, most, begin + V, width>(count, A, offset, K, step, B, next, out, out_row, first);
}

// `product` with weights that are not packed and whose k_stride is 1. For each vector of outputs it keeps a vector of partial
// sums over k for each output, and adds up their lanes at the end.
template <typename T, int G, int U>
void product_in_place(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, T* out, ptrdiff_t out_row,
                      bool add) {
    constexpr int lanes = Vec<T>::lanes;
    for (int column = first * B.width; column < last * B.width; column += lanes) {
        const int g = column % B.width / B.units, n0 = column / B.width * B.units + column % B.units;
        const T* W[lanes];
        for (int i = 0; i < lanes; ++i) W[i] = (const T*)B.source + g * B.gate_stride + (n0 + i < B.N ? n0 + i : B.N - 1) * B.n_stride;
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

#include "weights16.h"

// `product` with packed weights and at most R rows: with several blocks at a time, as few sums would wait for one another.
template <int R, typename T, int G, int U>
void product_of_few(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, int step, int begin, int end, T* out,
                    ptrdiff_t out_row, bool add) {
    if (count < R) {
        if constexpr (R > 1) product_of_few<R - 1>(B, first, last, count, A, step, begin, end, out, out_row, add);
        return;
    }
    constexpr int width = G * U, most = ACCUMULATORS < 24 ? 6 : 8;  // vectors at a time: more streams of memory are slower
    constexpr int limit = std::max(1, std::min(most, ACCUMULATORS / R) / width);
    const Groups groups(last - first, limit);
    const T* rows[R];
    for (int group = 0; group < groups.groups; ++group)
        for (int k0 = begin; k0 < end; k0 += CHUNK_COLUMNS) {
            const int block = first + groups.begin(group), K = k0 + CHUNK_COLUMNS < end ? CHUNK_COLUMNS : end - k0;
            for (int r = 0; r < R; ++r) rows[r] = A[r] + (ptrdiff_t)(k0 - begin) * step;
            multiply_blocks<T, R, limit, width>(groups.end(group) - groups.begin(group), K, rows, step,
                                                B.values + ((size_t)block * B.K + k0) * B.width, (ptrdiff_t)B.K * B.width,
                                                out + block * B.width, out_row, k0 == 0 && !add);
        }
}

// Multiplies `count` rows of A by blocks [first, last) of B. Row i of out, out_row elements apart, is [blocks][G][U][lanes].
// Elements of a row of A are `step` apart. Only columns [begin, end) are multiplied: A[i] points at column `begin`. If `add` or
// if begin > 0, the products are added to out, else stored.
template <typename T, int G, int U>
void product(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, int step, int begin, int end, T* out,
             ptrdiff_t out_row, bool add) {
    if (B.int8) return product_int8(B, first, last, count, A, out, out_row);
    if constexpr (sizeof(T) == 4) {
        if (B.dtype == FLOAT16) return product16<FLOAT16>(B, first, last, count, A, out, out_row, add);
        if (B.dtype == BFLOAT16) return product16<BFLOAT16>(B, first, last, count, A, out, out_row, add);
    }
    if (B.in_place) return product_in_place(B, first, last, count, A, out, out_row, add);
    constexpr int width = G * U, few = ACCUMULATORS / (2 * width);  // rows that leave sums for two blocks
    if constexpr (few > 0)
        if (count <= few) return product_of_few<few>(B, first, last, count, A, step, begin, end, out, out_row, add);
    // With 16 registers four vectors leave sums for 3 rows, and two for 6: 4 or 5 rows go at once then.
    constexpr int most = ACCUMULATORS < 24 && width == 4 ? 2 : 4;
    const bool halves = most == 2 && count > 3 && count < 6;
    constexpr int pair = ACCUMULATORS >= 24 && width == 2 ? 2 : 1;  // narrow blocks at once: 6 rows of 4 vectors, not 12 of 2
    for (int block = first, blocks; block < last; block += blocks) {
        blocks = count >= 10 && block + pair <= last ? pair : 1;
        for (int k0 = begin; k0 < end; k0 += CHUNK_COLUMNS) {
            const int K = k0 + CHUNK_COLUMNS < end ? CHUNK_COLUMNS : end - k0;
            const T* values = B.values + ((size_t)block * B.K + k0) * B.width;
            const ptrdiff_t offset = (ptrdiff_t)(k0 - begin) * step, next = (ptrdiff_t)B.K * B.width;
            const bool stores = k0 == 0 && !add;
            T* to = out + block * B.width;
            if (halves)
                multiply_block<T, 1, most, 0, width>(count, A, offset, K, step, values, next, to, out_row, stores);
            else if (blocks == pair)
                multiply_block<T, pair, 4, 0, width>(count, A, offset, K, step, values, next, to, out_row, stores);
            else
                multiply_block<T, 1, 4, 0, width>(count, A, offset, K, step, values, next, to, out_row, stores);
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
