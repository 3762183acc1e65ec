// Products with weights in 8 bits, for one instruction set: a part of parts.h and of cell.cpp.
//
// A weight is a whole number from -127 to 127 times the scale of its row (gpurnn/quantization.py). The rows of A that weights
// multiply become whole numbers of 16 or of 8 bits when a product begins, with a scale for each row. Sums of products of whole
// numbers are exact, so that results have the same bits with every instruction set, for any number of threads and in any batch.
//
// As with floats, weights are packed in the order in which products read them: of each block [steps of columns][vectors][outputs]
// [columns of a step], and behind all blocks the scales of their outputs.

#include "int8_rows.h"

// ---- sums

// Sums of R rows of A and V vectors of outputs: `lower` of lower bytes, where these are apart.
template <int kind, int R, int V>
struct Int8Tile {
    Sums sums[R][V], lower[R][V];

    // Adds products of `steps` steps of columns. next: bytes of W from one to the next. padded: from upper to lower bytes.
    INLINE void add(int steps, const int8_t* const* rows, int padded, const int8_t* W, ptrdiff_t next) {
        const int8_t* A[R];
        UNROLL for (int r = 0; r < R; ++r) A[r] = rows[r];
        for (ptrdiff_t k = 0; k < steps * (ptrdiff_t)4; k += 4, W += next) {
            Sums w[V];
            UNROLL for (int v = 0; v < V; ++v)
                if constexpr (kind == SHORTS)
                    w[v] = (Sums)widened(W + v * VECTOR_BYTES / 2);
                else
                    std::memcpy(&w[v], W + v * VECTOR_BYTES, sizeof w[v]);
            UNROLL for (int r = 0; r < R; ++r) {
                const Sums a = repeated(A[r] + k), b = kind == TWO_BYTES ? repeated(A[r] + padded + k) : a;
                UNROLL for (int v = 0; v < V; ++v)
                    if constexpr (kind == SHORTS) {
                        sums[r][v] = add_products(sums[r][v], (Shorts)a, (Shorts)w[v]);
                    } else {
                        sums[r][v] = add_byte_products(sums[r][v], w[v], a);
                        if (kind == TWO_BYTES) lower[r][v] = add_byte_products(lower[r][v], w[v], b);
                    }
            }
        }
    }
};

// Sums, each rounded once: lower + upper * 65536, where one of 32 bits may not hold them. Both are exact as floats.
INLINE Vec<float> rounded_sums(Sums lower, Sums upper) {
    typedef Raw<float>::Lanes Lanes;
    return __builtin_convertvector(upper, Lanes) * 65536.0f + __builtin_convertvector(lower, Lanes);
}

// Some rows of A, some vectors of a block of weights, and where their products go.
struct Int8Operands {
    const WholeRows& A;
    int row, rows, K;
    const int8_t* W;
    ptrdiff_t next;  // bytes from one step of columns to the next
    float* out;
    ptrdiff_t out_row;
    const float *scales, *row_scales;  // of outputs and of rows of A; null: sums stay as they are

    Int8Operands rows_from(int i, int count) const {
        return {A, row + i, count, K, W, next, out + i * out_row, out_row, scales, row_scales ? row_scales + i : nullptr};
    }
};

// Multiplies at most R rows by V vectors.
template <int kind, int R, int V>
INLINE void multiply_int8_tile(const Int8Operands& from) {
    constexpr int step = kind == SHORTS ? 2 : 4, at_once = kind == SHORTS ? SHORT_COLUMNS : EXACT_COLUMNS + LAST_COLUMNS;
    for_each_part(from.K, [&](int part, int k0, int columns) INLINE_LAMBDA {
        Int8Tile<kind, R, V> tile;
        Sums total[R][V], upper[R][V];  // of SHORTS
        for (int k = k0; k < k0 + columns; k += at_once) {
            const int8_t* A[R];
            UNROLL for (int r = 0; r < R; ++r) {
                const int i = from.row + std::min(r, from.rows - 1);
                A[r] = from.A.at(i) + (kind == SHORTS ? 2 : 1) * k;
                const Sums begin = kind == SHORTS ? Sums{} : Sums{} + from.A.start(i, part, 0);
                const Sums more = kind == TWO_BYTES ? Sums{} + from.A.start(i, part, 1) : Sums{};
                UNROLL for (int v = 0; v < V; ++v) tile.sums[r][v] = begin, tile.lower[r][v] = more;
            }
            const int steps = (std::min(at_once, k0 + columns - k) + step - 1) / step;
            tile.add(steps, A, from.A.padded, from.W + k / step * from.next, from.next);
            if constexpr (kind == SHORTS)
                UNROLL for (int r = 0; r < R; ++r)
                    UNROLL for (int v = 0; v < V; ++v) {
                        const Sums low = tile.sums[r][v] & 0xffff, high = tile.sums[r][v] >> 16;
                        total[r][v] = k == k0 ? low : total[r][v] + low, upper[r][v] = k == k0 ? high : upper[r][v] + high;
                    }
        }
        const bool is_last = k0 + columns == from.K;
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int v = 0; v < V; ++v) {
                if (r >= from.rows) break;
                Vec<float> found;
                if constexpr (kind == ONE_BYTE) {
                    found = __builtin_convertvector(tile.sums[r][v], Raw<float>::Lanes);
                } else if constexpr (kind == TWO_BYTES) {
                    const Sums rest = ((tile.sums[r][v] & 255) << 8) + tile.lower[r][v];
                    found = rounded_sums(rest & 0xffff, (tile.sums[r][v] >> 8) + (rest >> 16));
                } else {
                    found = rounded_sums(total[r][v], upper[r][v]);
                }
                float* to = from.out + r * from.out_row + v * SUM_LANES;
                if (k0) found = Vec<float>::load(to) + found;
                // in this order, as inputs may be near the largest number
                if (is_last && from.scales)
                    found = found * Vec<float>::load(from.scales + v * SUM_LANES) * Vec<float>(from.row_scales[r]);
                found.store(to);
            }
    });
}

// The same in tiles of R rows, or of fewer where that is enough.
template <int kind, int R, int V>
INLINE void multiply_int8_rows(const Int8Operands& from) {
    constexpr int fewer = R > 4 ? 4 : R > 2 ? 2 : 1;
    if constexpr (R > 1)
        if (from.rows <= fewer) return multiply_int8_rows<kind, fewer, V>(from);
    multiply_int8_tile<kind, R, V>(from);
}

template <int kind, int V>
void multiply_int8_vectors(const Int8Operands& from) {
    constexpr int limit = std::min(8, INT8_SUMS / V / (kind == TWO_BYTES ? 2 : 1));
    const Groups groups(from.rows, limit);
    for (int group = 0; group < groups.groups; ++group) {
        const int i = groups.begin(group);
        multiply_int8_rows<kind, limit, V>(from.rows_from(i, groups.end(group) - i));
    }
}

template <int kind>
void multiply_int8(int vectors, const Int8Operands& from) {
    constexpr auto two = multiply_int8_vectors<kind, 2>;
    constexpr auto one = multiply_int8_vectors<kind, 1>, three = multiply_int8_vectors<kind, 3>, four = multiply_int8_vectors<kind, 4>;
    (vectors == 4 ? four : vectors == 3 ? three : vectors == 2 ? two : one)(from);
}

// ---- products

// How the weights of a `Packed` lie in its memory.
struct Int8Layout {
    int vectors, step, steps;  // of a block; columns of a step; steps of all columns
    size_t vector, block, scales, bytes;  // bytes of a vector of weights, and of a block; where scales begin, and where they end

    template <typename P>
    explicit Int8Layout(const P& B)
        : vectors((B.width + SUM_LANES - 1) / SUM_LANES), step(step_of(has_vnni())), steps((B.K + step - 1) / step) {
        vector = (size_t)SUM_LANES * step, block = vector * vectors * steps;
        scales = (block * B.blocks + 63) / 64 * 64;
        bytes = (scales + (size_t)B.blocks * vectors * SUM_LANES * sizeof(float) + 63) / 64 * 64;
    }
};

template <typename P>
size_t int8_bytes(const P& B) { return Int8Layout(B).bytes; }

// Packs a block, with zeros for outputs and columns past the end.
template <typename P>
void pack_int8(const P& B, int block) {
    const Int8Layout at(B);
    int8_t* to = (int8_t*)B.values + at.block * block;
    float* scales = (float*)((int8_t*)B.values + at.scales) + (size_t)block * at.vectors * SUM_LANES;
    const int sign = at.step == 4 ? 0x80 : 0;
    for (int c = 0; c < at.vectors * SUM_LANES; ++c) {
        const int g = c / B.units, n = block * B.units + c % B.units;
        const bool is_output = c < B.width && n < B.N;
        const size_t row = (size_t)g * B.N + n;
        scales[c] = is_output ? B.scales[row] : 0;
        for (int s = 0; s < at.steps; ++s)
            for (int j = 0; j < at.step; ++j) {
                const int k = s * at.step + j, w = is_output && k < B.K ? B.int8[row * B.K + k] : 0;
                to[(size_t)s * at.vectors * at.vector + (size_t)c * at.step + j] = (int8_t)(w ^ sign);
            }
    }
}

// Multiplies rows of A by some vectors of a block, from `begin` on. Rows of out begin at those of the block, of whose columns
// `written` are written.
template <typename T>
void multiply_int8_block(const Int8Layout& at, const void* packed, int block, int begin, int vectors, int K, int count,
                         const RoundedRows<T>& A, T* out, ptrdiff_t out_row, int written) {
    constexpr int lanes = Vec<T>::lanes, totals_row = INT8_VECTORS * SUM_LANES;
    const int first = begin * SUM_LANES, columns = std::min(written - first, vectors * SUM_LANES);
    const bool direct = sizeof(T) == sizeof(float) && columns == vectors * SUM_LANES;
    const int8_t* W = (const int8_t*)packed + at.block * block + begin * at.vector;
    const float* scales = (const float*)((const int8_t*)packed + at.scales) + ((ptrdiff_t)block * at.vectors + begin) * SUM_LANES;
    float totals[INT8_ROWS * totals_row];
    Int8Operands from = {A, 0, count, K, W, (ptrdiff_t)(at.vectors * at.vector), totals, totals_row, nullptr, nullptr};
    if (direct) from.out = (float*)out + first, from.out_row = out_row, from.scales = scales, from.row_scales = (float*)A.scales.data();
    if (VECTOR_BYTES < 64 || A.kind == SHORTS)
        multiply_int8<SHORTS>(vectors, from);
    else if constexpr (VECTOR_BYTES == 64)
        (A.kind == ONE_BYTE ? multiply_int8<ONE_BYTE> : multiply_int8<TWO_BYTES>)(vectors, from);
    for (int r = 0; r < count && !direct; ++r)
        for (int c = 0; c < columns; c += lanes) {
            Vec<T> total, scale;
            UNROLL for (int j = 0; j < lanes; ++j) total.v[j] = totals[r * totals_row + c + j], scale.v[j] = scales[c + j];
            const Vec<T> scaled = total * scale * Vec<T>(A.scales[r]);
            scaled.store(out + r * out_row + first + c, columns - c);
        }
}

// `product` where B has weights in 8 bits. Of a single gate only N outputs are written.
template <typename T, int G, int U>
void product_int8(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, T* out, ptrdiff_t out_row) {
    static thread_local RoundedRows<T> rows;
    const Int8Layout at(B);
    const int parts = (at.vectors + INT8_VECTORS - 1) / INT8_VECTORS;
    for (int i0 = 0; i0 < count; i0 += INT8_ROWS) {
        const int size = std::min(count - i0, INT8_ROWS);
        rows.set(size, B.K, A + i0, B.bits);
        for (int block = first; block < last; ++block)
            for (int part = 0; part < parts; ++part) {
                const int begin = at.vectors * part / parts, end = at.vectors * (part + 1) / parts;
                const int written = G == 1 ? std::min(B.width, B.N - block * B.units) : B.width;
                if (begin * SUM_LANES < written)
                    multiply_int8_block(at, B.values, block, begin, end - begin, B.K, size, rows,
                                        out + i0 * out_row + block * B.width, out_row, written);
            }
    }
}

// C[M, N] = A[M, K] B^T of a `Product` with packed weights in 8 bits, whose rows of A are contiguous; its threads divide these rows.
template <typename T>
void matmul_int8(const Product& job, int threads) {
    Packed<T, 1, 2> B((int)job.N, (int)job.K);
    B.values = (T*)job.B, B.bits = job.bits;
    on_threads(threads, [&](int thread) {
        std::vector<const T*> rows;
        const ptrdiff_t first = job.M * thread / threads, last = job.M * (thread + 1) / threads;
        for (ptrdiff_t m = first; m < last; ++m) rows.push_back((const T*)job.A + m * job.a_row);
        product_int8(B, 0, B.blocks, (int)rows.size(), rows.data(), (T*)job.C + first * job.c_row, job.c_row);
    });
}

// Says of each matrix of a layer where its weights in 8 bits are, if it has them.
template <typename Layer>
void set_int8(Layer& layer) {
    const Pass& pass = layer.pass;
    const auto set = [&](auto& packed, const void* weights, const float* scales, ptrdiff_t first_row) {
        if (scales) packed.int8 = (const int8_t*)weights + first_row * packed.K, packed.scales = scales + first_row;
        packed.bits = pass.bits;
    };
    set(layer.input, pass.weight_ih, pass.scale_ih, 0);
    set(layer.hidden, pass.weight_hh, pass.scale_hh, 0);
    set(layer.inner, pass.weight_hh, pass.scale_hh, (ptrdiff_t)Layer::F * pass.H);
    set(layer.projection, pass.weight_hr, pass.scale_hr, 0);
}
