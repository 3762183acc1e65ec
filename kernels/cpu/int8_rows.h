// Rows of numbers as whole numbers of 16 or of 8 bits, and the instructions that multiply these, for one instruction set: a part
// of int8.h.

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
