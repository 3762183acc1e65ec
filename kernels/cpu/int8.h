// Products with weights in 8 bits, for one instruction set: a part of parts.h and of cell.cpp.
//
// A weight is a whole number from -127 to 127 times the scale of its row (gpurnn/quantization.py). The rows of A that weights
// multiply become whole numbers of 16 or of 8 bits when a product begins, with a scale for each row. Sums of products of whole
// numbers are exact, so that results have the same bits with every instruction set, for any number of threads and in any batch.
//
// As with floats, weights are packed in the order in which products read them: of each block [steps of columns][vectors][outputs]
// [columns of a step], and behind all blocks the scales of their outputs.

// A vector of sums, one for each output, and the numbers of 16 and of 8 bits whose products go into it.
typedef int Sums __attribute__((vector_size(VECTOR_BYTES)));
typedef short Shorts __attribute__((vector_size(VECTOR_BYTES)));
typedef signed char ShortBytes __attribute__((vector_size(VECTOR_BYTES / 2)));

constexpr int SUM_LANES = VECTOR_BYTES / 4;
constexpr int EXACT_COLUMNS = 1984, LAST_COLUMNS = 64;  // whose sums are rounded once, and how many more may follow at the end
constexpr int SHORT_COLUMNS = 512;                      // of numbers of 16 bits, whose sums 32 bits hold
constexpr int INT8_SUMS = VECTOR_BYTES == 64 ? 24 : 8;  // registers for sums; the others hold numbers and their products
constexpr int INT8_ROWS = 48;                           // rows of A at a time, so that they and their outputs stay in cache
constexpr int INT8_VECTORS = 4;                         // most vectors of outputs at a time

// What is multiplied: numbers of 16 bits with widened weights. Or by the instruction vpdpbusd of AVX-512 VNNI, which adds products
// of four bytes: numbers of 8 bits with weights, and those of 16 as two bytes, apart.
enum { SHORTS, ONE_BYTE, TWO_BYTES };

bool has_vnni() {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return __builtin_cpu_supports("avx512vnni");
#endif
    return false;
}

int step_of(bool vnni) { return vnni ? 4 : 2; }  // columns at a time
int largest_whole(int bits) { return bits == 8 ? 127 : 127 * 256 + 127; }  // both bytes of a number are signed

// Where a part of the columns of a row begins whose sums are rounded once, and how many there are: f(number, begin, count).
template <typename Work>
INLINE void for_each_part(int K, const Work& work) {
    for (int number = 0, k0 = 0, count; k0 < K; k0 += count, ++number) {
        count = K - k0 < EXACT_COLUMNS + LAST_COLUMNS ? K - k0 : EXACT_COLUMNS;
        work(number, k0, count);
    }
}

// ---- one instruction for several products

// Adds to each lane the products of four bytes of a, which have no sign, and of b.
#if defined(__x86_64__) && VECTOR_BYTES == 64
// It is no intrinsic, as this code is not compiled for processors with that instruction alone.
INLINE Sums add_byte_products(Sums sums, Sums a, Sums b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
#else
INLINE Sums add_byte_products(Sums sums, Sums, Sums) { return sums; }
#endif

// Adds to each lane the products of two numbers of a and of b.
INLINE Sums add_products(Sums sums, Shorts a, Shorts b) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return sums + (Sums)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return sums + (Sums)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    return sums + (Sums)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
    return sums + ((Sums)a >> 16) * ((Sums)b >> 16) + ((Sums)a << 16 >> 16) * ((Sums)b << 16 >> 16);
}

INLINE Shorts widened(const int8_t* from) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)from));
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)from));
#endif
    ShortBytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Shorts);
}

// Four bytes in every lane.
INLINE Sums repeated(const int8_t* from) {
    int number;
    std::memcpy(&number, from, sizeof number);
    return Sums{} + number;
}

// ---- rows of A in whole numbers

// As tiles read them. Bytes are for VNNI, the upper ones of numbers of 16 bits before the lower ones. It takes weights as bytes
// without a sign, 128 more than they are: `starts` has what sums begin with instead, for each row, part, and byte of a number.
struct WholeRows {
    std::vector<int8_t> bytes;
    std::vector<int> starts;
    int kind = SHORTS, row = 0, padded = 0, parts = 0;  // row: bytes of a row. padded: columns with the zeros behind them

    const int8_t* at(int i) const { return bytes.data() + (ptrdiff_t)i * row; }
    int start(int i, int part, int byte) const { return starts[((size_t)i * parts + part) * 2 + byte]; }
};

template <typename T>
struct RoundedRows : WholeRows {
    std::vector<T> scales;

    // Makes room for `count` rows of K numbers, and writes them.
    void set(int count, int K, const T* const* A, int bits) {
        kind = !has_vnni() ? SHORTS : bits == 8 ? ONE_BYTE : TWO_BYTES;
        padded = (K + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES;
        row = kind == ONE_BYTE ? padded : 2 * padded, parts = K / EXACT_COLUMNS + 1;
        if (bytes.size() < (size_t)count * row) bytes.resize((size_t)count * row);
        if (scales.size() < (size_t)count) scales.resize(count);
        if (kind != SHORTS) starts.resize((size_t)count * parts * 2), shorts.resize(padded);
        for (int i = 0; i < count; ++i) {
            int8_t* to = bytes.data() + (size_t)i * row;
            scales[i] = write(A[i], K, bits, kind == SHORTS ? (int16_t*)to : shorts.data());
            if (kind == SHORTS) continue;
            split(to);
            for_each_part(K, [&](int part, int k0, int columns) INLINE_LAMBDA {
                for (int byte = 0; byte <= (kind == TWO_BYTES); ++byte)
                    starts[((size_t)i * parts + part) * 2 + byte] = start_of(to + byte * padded + k0, columns);
            });
        }
    }

private:
    std::vector<int16_t> shorts;

    // Writes the nearest whole multiples of the row's scale, and returns it. A row that is not finite has the scale NaN; one whose
    // scale would be too small for full precision is zero.
    T write(const T* from, int K, int bits, int16_t* to) const {
        typedef Vec<T> V;
        typedef typename V::Ints Ints;
        typedef std::numeric_limits<T> Limits;
        typedef short Written __attribute__((vector_size(V::lanes * 2)));
        Ints largest = {};
        const Ints magnitude = ~(Ints)V(-T(0)).v;  // all bits but the sign: as integers they are in the order of the numbers
        for (int k = 0; k < K; k += V::lanes) {
            const Ints bits = (Ints)V::load(from + k, K - k).v & magnitude, more = bits > largest;
            largest = (more & bits) | (~more & largest);
        }
        auto found = largest[0];
        for (int i = 1; i < V::lanes; ++i) found = std::max(found, largest[i]);
        T most;
        std::memcpy(&most, &found, sizeof most);
        const bool finite = most <= Limits::max(), zero = most < Limits::min() * 65536;
        if (!finite || zero) {
            std::memset(to, 0, padded * sizeof *to);
            return finite ? T(0) : Limits::quiet_NaN();
        }
        const T scale = most / largest_whole(bits);
        const V nearest(T(1.5) * T(1LL << Raw<T>::mantissa));  // added to a number, it leaves the nearest integer in the low bits
        for (int k = 0; k < padded; k += V::lanes) {
            // a quotient: with a product in its place some compilers would add without rounding it first
            const Ints whole = (Ints)(V::load(from + k, std::max(K - k, 0)).v / V(scale).v + nearest.v) - (Ints)nearest.v;
            const Written shorts = __builtin_convertvector(whole, Written);
            std::memcpy(to + k, &shorts, sizeof shorts);
        }
        return scale;
    }

    // Writes the bytes of `shorts`.
    void split(int8_t* to) const {
        for (int k = 0; k < padded; k += SUM_LANES * 2) {
            Shorts numbers;
            std::memcpy(&numbers, shorts.data() + k, sizeof numbers);
            const ShortBytes lower = __builtin_convertvector(numbers, ShortBytes);
            if (kind == TWO_BYTES) {
                const ShortBytes upper = __builtin_convertvector((numbers + 128) >> 8, ShortBytes);
                std::memcpy(to + k, &upper, sizeof upper);
            }
            std::memcpy(to + (kind == TWO_BYTES) * padded + k, &lower, sizeof lower);
        }
    }

    // -128 times the sum of some bytes; behind the last part are zeros.
    static int start_of(const int8_t* from, int columns) {
        Sums sums = {};
        for (int k = 0; k < columns; k += VECTOR_BYTES) {
            Sums values;
            std::memcpy(&values, from + k, sizeof values);
            sums = add_byte_products(sums, Sums{} + (int)0x80808080, values);
        }
#if defined(__x86_64__) && VECTOR_BYTES == 64
        return -_mm512_reduce_add_epi32((__m512i)sums);
#endif
        return -sums[0];
    }
};

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

// Some rows of A, some vectors of a block of weights, and where their products go, of which `written` columns are written.
struct Int8Operands {
    const WholeRows& A;
    int row, rows, K;
    const int8_t* W;
    ptrdiff_t next;  // bytes from one step of columns to the next
    float* out;
    ptrdiff_t out_row;
    int written;
    const float *scales, *row_scales;  // of outputs and of rows of A; null: sums stay as they are

    Int8Operands rows_from(int i, int count) const {
        return {A, row + i, count, K, W, next, out + i * out_row, out_row, written, scales, row_scales ? row_scales + i : nullptr};
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
                const int left = from.written - v * SUM_LANES;
                if (k0) found = Vec<float>::load(to, left) + found;
                // in this order, as inputs may be near the largest number
                if (is_last && from.scales) found = found * Vec<float>::load(from.scales + v * SUM_LANES) * Vec<float>(from.row_scales[r]);
                found.store(to, left);
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
    const RowGroups groups(from.rows, limit);
    for (int group = 0; group < groups.groups; ++group) {
        const int i = groups.begin(group);
        multiply_int8_rows<kind, limit, V>(from.rows_from(i, groups.end(group) - i));
    }
}

template <int kind>
void multiply_int8(int vectors, const Int8Operands& from) {
    constexpr auto two = multiply_int8_vectors<kind, 2>;
    (vectors == 4 ? multiply_int8_vectors<kind, 4> : vectors == 3 ? multiply_int8_vectors<kind, 3> : vectors == 2 ? two : multiply_int8_vectors<kind, 1>)(from);
}

// ---- products

// How the weights of a `Packed` lie in its memory.
struct Int8Layout {
    int vectors, step, steps;  // of a block; columns of a step; steps of all columns
    size_t vector, block, scales, bytes;  // bytes of a vector of weights, and of a block; where scales begin, and where they end

    template <typename P>
    explicit Int8Layout(const P& B) : vectors((B.width + SUM_LANES - 1) / SUM_LANES), step(step_of(has_vnni())), steps((B.K + step - 1) / step) {
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
    constexpr int lanes = Vec<T>::lanes, is_float = sizeof(T) == sizeof(float), totals_row = INT8_VECTORS * SUM_LANES;
    const int first = begin * SUM_LANES, columns = std::min(written - first, vectors * SUM_LANES);
    const int8_t* W = (const int8_t*)packed + at.block * block + begin * at.vector;
    const float* scales = (const float*)((const int8_t*)packed + at.scales) + ((ptrdiff_t)block * at.vectors + begin) * SUM_LANES;
    float totals[is_float ? 1 : INT8_ROWS * totals_row];
    Int8Operands from = {A, 0, count, K, W, (ptrdiff_t)(at.vectors * at.vector), totals, totals_row, totals_row, nullptr, nullptr};
    if constexpr (is_float)
        from.out = out + first, from.out_row = out_row, from.written = columns, from.scales = scales, from.row_scales = A.scales.data();
    (A.kind == SHORTS ? multiply_int8<SHORTS> : A.kind == ONE_BYTE ? multiply_int8<ONE_BYTE> : multiply_int8<TWO_BYTES>)(vectors, from);
    for (int r = 0; r < count && !is_float; ++r)
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
