// Products with weights in 8 bits, for one instruction set: a part of parts.h and of cell.cpp.
//
// A weight is a whole number from -127 to 127 times the scale of its row (gpurnn/quantization.py). Weights stay in memory in these
// rows, and are widened in registers. The rows of A that they multiply become whole numbers of 16 bits when a product begins, with
// a scale for each row. Sums of products of whole numbers are exact, so that results have the same bits with every instruction
// set, for any number of threads and in any batch.

// A vector of sums, and the numbers of 16 and of 8 bits whose products go into it.
typedef int Sums __attribute__((vector_size(VECTOR_BYTES)));
typedef short Shorts __attribute__((vector_size(VECTOR_BYTES)));
typedef signed char ShortBytes __attribute__((vector_size(VECTOR_BYTES / 2)));

constexpr int SUM_LANES = VECTOR_BYTES / 4, SHORT_LANES = VECTOR_BYTES / 2;
// Columns whose sums are exact, and how many more may follow at the end. An output's sums lie in four lanes or more, each of which
// has up to 512 products of less than 2^22.
constexpr int EXACT_COLUMNS = 1984, LAST_COLUMNS = 64;
constexpr int LARGEST_SHORT = 127 * 256 + 127;          // both bytes of a number are signed
constexpr int INT8_SUMS = VECTOR_BYTES == 64 ? 24 : 8;  // registers for sums; the others hold numbers and their products
constexpr int INT8_ROWS = 48;                           // rows of A at a time, so that they and their outputs stay in cache

// How a product is computed. vnni: by the instruction vpdpbusd of AVX-512 VNNI, which adds products of four bytes. Weights need not
// be widened then: the two bytes of a number of A are multiplied apart.
template <bool vnni>
struct Int8Form {
    static constexpr int step = vnni ? VECTOR_BYTES : SHORT_LANES;                   // columns at a time
    static constexpr int sums = vnni ? 2 : 1;                                        // of an output
    static constexpr int rows = INT8_SUMS / (SUM_LANES / 4) / sums;                  // most rows of A whose sums are in registers
    static constexpr int quarters(int R) { return 4 * R <= 2 * rows ? 4 * R <= rows ? 4 : 2 : 1; }  // of the outputs at a time
};

bool has_vnni() {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return processor().vnni;
#endif
    return false;
}

// Where a part of the columns of a row begins whose sums are exact, and how many there are: f(number of the part, begin, count).
template <typename Work>
INLINE void for_each_part(int K, const Work& work) {
    for (int number = 0, k0 = 0, count; k0 < K; k0 += count, ++number) {
        count = K - k0 < EXACT_COLUMNS + LAST_COLUMNS ? K - k0 : EXACT_COLUMNS;
        work(number, k0, count);
    }
}

// ---- one instruction for several products

#if defined(__x86_64__) && VECTOR_BYTES == 64
// Adds to each lane the products of four bytes of a, which have no sign, and of b. It is no intrinsic, as this code is not compiled
// for processors with that instruction alone.
INLINE Sums add_byte_products(Sums sums, Sums a, Sums b) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
    return sums;
}
#else
INLINE Sums add_byte_products(Sums sums, Sums, Sums) { return sums; }
#endif

// ---- rows of A in 16 bits

struct ShortValues {
    std::vector<int16_t> values;  // rows of whole steps, with zeros behind the columns
    int row = 0, padded = 0;      // numbers from a row to the next one, and those of its columns
    bool vnni = false;
};

template <typename T>
struct ShortRows : ShortValues {
    std::vector<T> scales;

    // Makes room for `count` rows of K numbers, and writes them.
    void set(int count, int K, const T* const* A) {
        vnni = has_vnni();
        const int step = vnni ? Int8Form<true>::step : Int8Form<false>::step;
        row = padded = (K + step - 1) / step * step;
        if (vnni) row += (K / EXACT_COLUMNS + 1) * SHORT_LANES;
        if (values.size() < (size_t)count * row) values.resize((size_t)count * row);
        if (scales.size() < (size_t)count) scales.resize(count);
        for (int i = 0; i < count; ++i) {
            int16_t* to = values.data() + (size_t)i * row;
            scales[i] = write(A[i], K, to);
            if (vnni) split(K, to);
        }
    }

private:
    // Writes the nearest whole multiples of the row's scale, and returns it. A row that is not finite has the scale NaN; one whose
    // scale would be too small for full precision is zero.
    T write(const T* from, int K, int16_t* to) const {
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
        const T scale = most / LARGEST_SHORT;
        const V nearest(T(1.5) * T(1LL << Raw<T>::mantissa));  // added to a number, it leaves the nearest integer in the low bits
        for (int k = 0; k < padded; k += V::lanes) {
            // a quotient: with a product in its place some compilers would add without rounding it first
            const Ints whole = (Ints)(V::load(from + k, std::max(K - k, 0)).v / V(scale).v + nearest.v) - (Ints)nearest.v;
            const Written shorts = __builtin_convertvector(whole, Written);
            std::memcpy(to + k, &shorts, sizeof shorts);
        }
        return scale;
    }

    // Puts the upper bytes of each step of columns before the lower ones; both are signed. The multiplication takes weights as
    // bytes without a sign, 128 more than they are: behind the columns there are for each part the sums to begin with.
    void split(int K, int16_t* values) const {
        constexpr int step = Int8Form<true>::step;
        for_each_part(K, [&](int number, int k0, int count) INLINE_LAMBDA {
            Sums upper_sums = {}, lower_sums = {};
            const Sums all_128 = Sums{} + (int)0x80808080;
            for (int k = k0; k < k0 + count; k += step) {
                Shorts halves[2];
                ShortBytes upper[2], lower[2];
                std::memcpy(halves, values + k, sizeof halves);
                UNROLL for (int i = 0; i < 2; ++i) {
                    upper[i] = __builtin_convertvector((halves[i] + 128) >> 8, ShortBytes);
                    lower[i] = __builtin_convertvector(halves[i], ShortBytes);
                }
                std::memcpy(values + k, upper, sizeof upper);
                std::memcpy(values + k + SHORT_LANES, lower, sizeof lower);
                Sums bytes[2];
                std::memcpy(bytes, values + k, sizeof bytes);
                upper_sums = add_byte_products(upper_sums, all_128, bytes[0]);
                lower_sums = add_byte_products(lower_sums, all_128, bytes[1]);
            }
            const Sums first = -(upper_sums * 256 + lower_sums);
            std::memcpy(values + padded + number * SHORT_LANES, &first, sizeof first);
        });
    }
};

// ---- sums

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

// Adds a[2i] b[2i] + a[2i + 1] b[2i + 1] to lane i; other processors than x86-64 add pairs of lanes that are farther apart.
INLINE Sums add_products(Sums sums, Shorts a, Shorts b) {
#if defined(__x86_64__) && VECTOR_BYTES == 64
    sums += (Sums)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    sums += (Sums)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
    sums += (Sums)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    typedef int Products __attribute__((vector_size(VECTOR_BYTES * 2)));
    const Products products = __builtin_convertvector(a, Products) * __builtin_convertvector(b, Products);
    Sums halves[2];
    std::memcpy(halves, &products, sizeof halves);
    sums += halves[0] + halves[1];
#endif
    return sums;
}

// Adds lanes that are `step` apart. In the result, `step` sums of a and of b take turns.
template <int step, int... lane>
INLINE Sums merged(Sums a, Sums b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, (lane & step ? SUM_LANES + lane - step : lane)...) +
           __builtin_shufflevector(a, b, (lane & step ? SUM_LANES + lane : lane + step)...);
#else
    return __builtin_shuffle(a, b, Sums{(lane & step ? SUM_LANES + lane - step : lane)...}) +
           __builtin_shuffle(a, b, Sums{(lane & step ? SUM_LANES + lane : lane + step)...});
#endif
}

// Adds up lanes of N vectors, each `apart` from the one before it, to one vector, in which `step` neighbors are of the same one.
template <int N, int step>
INLINE Sums merged(const Sums* vectors, int apart = 1) {
    if constexpr (N == 1)
        return *vectors;
    else
        return merged<step>(merged<N / 2, 2 * step>(vectors, 2 * apart), merged<N / 2, 2 * step>(vectors + apart, 2 * apart),
                            std::make_integer_sequence<int, SUM_LANES>());
}

// A vector of outputs, of which 4e + q is number e of quarter q: where their rows of weights begin, and where in them what is left
// behind whole steps.
struct Int8Outputs {
    const int8_t *rows[SUM_LANES], *rest[SUM_LANES];
    ptrdiff_t next;  // bytes from rows[0] to the first weights of the next vector
    int8_t copies[SUM_LANES][VECTOR_BYTES];

    // Finds what is left of K columns. Near the end of the matrix it is copied, as nothing may be read there.
    void set_rest(int K, int step, const int8_t* end) {
        const int whole = K / step * step;
        for (int n = 0; n < SUM_LANES && whole < K; ++n) {
            rest[n] = rows[n] + whole;
            if (end - rest[n] >= step) continue;
            std::memset(copies[n], 0, step);
            rest[n] = (const int8_t*)std::memcpy(copies[n], rest[n], K - whole);
        }
    }
};

// The sums of R rows of A and of Q quarters of the outputs.
template <bool vnni, int R, int Q>
struct Int8Tile {
    static constexpr int E = SUM_LANES / 4;
    Sums sums[R][Q][E], upper[R][Q][E];  // upper: those of the upper bytes

    // Adds products of a step of columns: those of A from k on, of the weights from `column` on.
    INLINE void add(const int16_t* const* A, const int8_t* const* W, int k, int column, ptrdiff_t ahead) {
        Shorts a[R], more[R];
        UNROLL for (int r = 0; r < R; ++r) {
            std::memcpy(&a[r], A[r] + k, sizeof a[r]);
            if (vnni) std::memcpy(&more[r], A[r] + k + SHORT_LANES, sizeof more[r]);
        }
        UNROLL for (int q = 0; q < Q; ++q)
            UNROLL for (int e = 0; e < E; ++e) {
                const int8_t* from = W[q + 4 * e] + column;
                if (R == 1) __builtin_prefetch(from + ahead);
                if constexpr (vnni) {
                    Sums w;
                    std::memcpy(&w, from, sizeof w);
                    w ^= (int)0x80808080;
                    UNROLL for (int r = 0; r < R; ++r) {
                        upper[r][q][e] = add_byte_products(upper[r][q][e], w, (Sums)a[r]);
                        sums[r][q][e] = add_byte_products(sums[r][q][e], w, (Sums)more[r]);
                    }
                } else {
                    const Shorts w = widened(from);
                    UNROLL for (int r = 0; r < R; ++r) sums[r][q][e] = add_products(sums[r][q][e], a[r], w);
                }
            }
    }

    // Multiplies `columns` columns from k0 on, where A begins, from quarter `first` on. out[r][q] gets four lanes for each output.
    // begin: of each row, the sums to begin with.
    INLINE void multiply(int k0, int columns, const int16_t* const* A, const int16_t* const* begin, const Int8Outputs& outputs,
                         int first, ptrdiff_t ahead, Sums (*out)[4]) {
        constexpr int step = Int8Form<vnni>::step;
        UNROLL for (int r = 0; r < R; ++r) {
            Sums start = {};
            if (vnni) std::memcpy(&start, begin[r], sizeof start);
            UNROLL for (int q = 0; q < Q; ++q)
                UNROLL for (int e = 0; e < E; ++e) sums[r][q][e] = start, upper[r][q][e] = Sums{};
        }
        int k = 0;
        for (; k + step <= columns; k += step) add(A, outputs.rows + first, k, k0 + k, ahead);
        if (k < columns) add(A, outputs.rest + first, k, 0, ahead);
        UNROLL for (int r = 0; r < R; ++r)
            UNROLL for (int q = 0; q < Q; ++q) {
                if (vnni)
                    UNROLL for (int e = 0; e < E; ++e) sums[r][q][e] += upper[r][q][e] * 256;
                out[r][first + q] = merged<E, 4>(sums[r][q]);
            }
    }
};

// Sums of four lanes, each rounded once: they may be larger than 32 bits hold, so that upper and lower halves are added apart.
INLINE Vec<float> rounded_sums(const Sums* sums) {
    Sums upper[4], lower[4];
    UNROLL for (int q = 0; q < 4; ++q) upper[q] = sums[q] >> 16, lower[q] = sums[q] & 0xffff;
    typedef Raw<float>::Lanes Lanes;
    return __builtin_convertvector(merged<4, 1>(upper), Lanes) * 65536.0f + __builtin_convertvector(merged<4, 1>(lower), Lanes);
}

// Sums of products of whole numbers for `count` rows of A from row i on, at most R, and a vector of outputs.
template <bool vnni, int R>
INLINE void sum_int8(int count, int K, const ShortValues& A, int i, const Int8Outputs& outputs, float (*totals)[SUM_LANES]) {
    if constexpr (R > 0) {
        if (count < R) return sum_int8<vnni, R - 1>(count, K, A, i, outputs, totals);
        constexpr int Q = Int8Form<vnni>::quarters(R);
        for_each_part(K, [&](int number, int k0, int columns) INLINE_LAMBDA {
            const int16_t *rows[R], *begin[R];
            UNROLL for (int r = 0; r < R; ++r) {
                const int16_t* row = A.values.data() + (ptrdiff_t)(i + r) * A.row;
                rows[r] = row + k0, begin[r] = row + A.padded + number * SHORT_LANES;
            }
            Sums sums[R][4];
            for (int first = 0; first < 4; first += Q) {
                Int8Tile<vnni, R, Q> tile;
                const ptrdiff_t ahead = first + Q < 4 ? (ptrdiff_t)Q * K : outputs.next - (ptrdiff_t)first * K;
                tile.multiply(k0, columns, rows, begin, outputs, first, ahead, sums);
            }
            for (int r = 0; r < R; ++r) {
                const Vec<float> found = rounded_sums(sums[r]);
                (k0 ? Vec<float>::load(totals[r]) + found : found).store(totals[r]);
            }
        });
    }
}

template <bool vnni>
void sum_int8_rows(int count, int K, const ShortValues& A, int i, const Int8Outputs& outputs, float (*totals)[SUM_LANES]) {
    sum_int8<vnni, Int8Form<vnni>::rows>(count, K, A, i, outputs, totals);
}

// ---- products

// Weights in 8 bits, and their outputs as a `Packed` divides them: blocks of `units` for each of G gates.
struct Int8Matrix {
    const int8_t* values;
    const float* scales;
    int N, K, G, units;
};

// Multiplies rows of A by blocks [first, last). Rows of out are [blocks][G][units]; of a single gate only N outputs are written.
template <typename T>
void multiply_int8(const Int8Matrix& B, int first, int last, int count, const ShortRows<T>& A, T* out, ptrdiff_t out_row) {
    constexpr int lanes = Vec<T>::lanes;
    const auto sum_rows = A.vnni ? sum_int8_rows<VECTOR_BYTES == 64> : sum_int8_rows<false>;
    const RowGroups groups(count, A.vnni ? Int8Form<true>::rows : Int8Form<false>::rows);
    const int width = B.G * B.units, end = B.G == 1 ? std::min(last * width, B.N) : last * width;
    int g = 0, u = 0, block = first;  // of the next vector
    for (int column = first * width; column < end; column += SUM_LANES) {
        Int8Outputs outputs;
        T scales[SUM_LANES];
        for (int i = 0; i < SUM_LANES; i += lanes) {
            for (int j = 0; j < lanes; ++j) {  // a vector's units are neighbors
                const size_t row = (size_t)g * B.N + std::min(block * B.units + u + j, B.N - 1);
                outputs.rows[i + j] = B.values + row * B.K, scales[i + j] = B.scales[row];
            }
            if ((u += lanes) < B.units) continue;
            u = 0;
            if (++g == B.G) g = 0, block += block + 1 < last;
        }
        outputs.next = B.values + ((size_t)g * B.N + block * B.units + u) * B.K - outputs.rows[0];
        outputs.set_rest(B.K, A.vnni ? Int8Form<true>::step : Int8Form<false>::step, B.values + (size_t)B.G * B.N * B.K);
        const int written = std::min(SUM_LANES, end - column);
        for (int group = 0; group < groups.groups; ++group) {
            const int i0 = groups.begin(group), size = groups.end(group) - i0;
            float totals[Int8Form<false>::rows][SUM_LANES];
            sum_rows(size, B.K, A, i0, outputs, totals);
            for (int r = 0; r < size; ++r) {
                T* to = out + (i0 + r) * out_row + column;
                for (int i = 0; i < written; i += lanes) {
                    Vec<T> total;
                    UNROLL for (int j = 0; j < lanes; ++j) total.v[j] = totals[r][i + j];
                    // in this order, as inputs may be near the largest number
                    const Vec<T> scaled = total * Vec<T>::load(scales + i) * Vec<T>(A.scales[i0 + r]);
                    scaled.store(to + i, written - i);
                }
            }
        }
    }
}

// `product` where B has weights in 8 bits.
template <typename T, int G, int U>
void product_int8(const Packed<T, G, U>& B, int first, int last, int count, const T* const* A, T* out, ptrdiff_t out_row) {
    static thread_local ShortRows<T> rows;
    for (int i0 = 0; i0 < count; i0 += INT8_ROWS) {
        const int size = std::min(count - i0, INT8_ROWS);
        rows.set(size, B.K, A + i0);
        multiply_int8(Int8Matrix{B.int8, B.scales, B.N, B.K, G, B.units}, first, last, size, rows, out + i0 * out_row, out_row);
    }
}

// C[M, N] = A[M, K] B^T of a `Product` with scales, whose rows of A are contiguous; its threads divide these rows.
template <typename T>
void matmul_int8(const Product& job, int threads) {
    Packed<T, 1, 2> B((int)job.N, (int)job.K);
    B.int8 = (const int8_t*)job.B, B.scales = job.scales;
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
    const auto set = [](auto& packed, const void* weights, const float* scales, ptrdiff_t first_row) {
        if (scales) packed.int8 = (const int8_t*)weights + first_row * packed.K, packed.scales = scales + first_row;
    };
    set(layer.input, pass.weight_ih, pass.scale_ih, 0);
    set(layer.hidden, pass.weight_hh, pass.scale_hh, 0);
    set(layer.inner, pass.weight_hh, pass.scale_hh, (ptrdiff_t)Layer::F * pass.H);
    set(layer.projection, pass.weight_hr, pass.scale_hr, 0);
}
