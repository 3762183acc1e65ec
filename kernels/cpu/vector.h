// A vector that behaves like one number, so that the cells of ../cells/ run on it as they run on a float: a part of
// time_loop.h.
//
// It uses the vector extensions of GCC and Clang, which compile to any instruction set. api.cpp defines VECTOR_BYTES, the bytes
// of a vector register.

#ifndef INLINE
// A vector never crosses a call: every function that takes or returns one is inlined. At the end of a function that returns a
// class like Vec, GCC 12 clears the upper part of the vector registers (vzeroupper), and the returned value with it.
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#endif

// The vectors of a type, and those of as many integers of the same size, bytes and doubles; the format of the type.
template <typename T> struct Raw;
template <> struct Raw<float> {
    typedef float Lanes __attribute__((vector_size(VECTOR_BYTES)));
    typedef int Ints __attribute__((vector_size(VECTOR_BYTES)));
    typedef signed char Bytes __attribute__((vector_size(VECTOR_BYTES / 4)));
    typedef double Doubles __attribute__((vector_size(VECTOR_BYTES * 2)));
    static constexpr int bits = 32, mantissa = 23, bias = 127;
};
template <> struct Raw<double> {
    typedef double Lanes __attribute__((vector_size(VECTOR_BYTES)));
    typedef long long Ints __attribute__((vector_size(VECTOR_BYTES)));
    typedef signed char Bytes __attribute__((vector_size(VECTOR_BYTES / 8)));
    typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int bits = 64, mantissa = 52, bias = 1023;
};

template <typename T>
struct Vec {
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    typedef typename Raw<T>::Lanes Lanes;
    typedef typename Raw<T>::Ints Ints;
    Lanes v;

    Vec() = default;
    INLINE Vec(Lanes lanes) : v(lanes) {}
    // All lanes x. It subtracts zero: the compiler could not drop an added one, as -0 + 0 is not -0.
    INLINE explicit Vec(float x) : v(T(x) - Lanes{}) {}
    INLINE explicit Vec(double x) : v(T(x) - Lanes{}) {}
    INLINE explicit Vec(int x) : v(T(x) - Lanes{}) {}

    // Loads all lanes, or the first `count`; the other lanes are `fill`.
    INLINE static Vec load(const T* from, int count = lanes, T fill = 0) {
        Vec x;
        if (count >= lanes) {
            std::memcpy(&x.v, from, sizeof x.v);
        } else {
            x.v = fill - Lanes{};
            for (int i = 0; i < count; ++i) x.v[i] = from[i];
        }
        return x;
    }
    // 1 and 0 of the first `count` booleans; the other lanes are 0.
    INLINE static Vec from_bools(const bool* from, int count = lanes) {
        typename Raw<T>::Bytes bytes = {};
        if (count >= lanes)
            std::memcpy(&bytes, from, sizeof bytes);
        else
            std::memcpy(&bytes, from, count);
        return __builtin_convertvector(bytes, Lanes);
    }
    INLINE void store(T* to, int count = lanes) const {
        if (count >= lanes) {
            std::memcpy(to, &v, sizeof v);
        } else {
            for (int i = 0; i < count; ++i) to[i] = v[i];
        }
    }
};

template <typename T> INLINE Vec<T> operator+(Vec<T> a, Vec<T> b) { return a.v + b.v; }
template <typename T> INLINE Vec<T> operator-(Vec<T> a, Vec<T> b) { return a.v - b.v; }
template <typename T> INLINE Vec<T> operator*(Vec<T> a, Vec<T> b) { return a.v * b.v; }
template <typename T> INLINE Vec<T> operator/(Vec<T> a, Vec<T> b) { return a.v / b.v; }
template <typename T> INLINE Vec<T> operator-(Vec<T> a) { return -a.v; }
template <typename T> INLINE void operator+=(Vec<T>& a, Vec<T> b) { a.v += b.v; }
template <typename T> INLINE void operator*=(Vec<T>& a, Vec<T> b) { a.v *= b.v; }

// a where the mask is all ones, b where it is zero.
template <typename T>
INLINE Vec<T> select(typename Vec<T>::Ints mask, Vec<T> a, Vec<T> b) {
    typedef typename Vec<T>::Ints Ints;
    return (typename Vec<T>::Lanes)((mask & (Ints)a.v) | (~mask & (Ints)b.v));
}

// N vectors, one from each block of H elements of a row, for the n units from u on. They are what a cell reads or writes.
template <int N, typename T>
INLINE void load_blocks(Vec<T>* to, const T* row, int H, int u, int n) {
    UNROLL for (int g = 0; g < N; ++g) to[g] = Vec<T>::load(row + (size_t)g * H + u, n);
}
template <int N, typename T>
INLINE void store_blocks(const Vec<T>* from, T* row, int H, int u, int n) {
    UNROLL for (int g = 0; g < N; ++g) from[g].store(row + (size_t)g * H + u, n);
}

// Transposes a square of L vectors. In round s = L/2, ..., 2, 1, rows that are s apart exchange elements that are s apart.
template <typename T>
INLINE void transpose(Vec<T>* rows) {
    constexpr int L = Vec<T>::lanes;
    UNROLL for (int s = L / 2; s > 0; s /= 2) {
        typename Vec<T>::Ints first, second;  // shuffle indices into the two rows, one after the other
        UNROLL for (int j = 0; j < L; ++j) {
            first[j] = j & s ? L + j - s : j;
            second[j] = j & s ? L + j : j + s;
        }
        UNROLL for (int i = 0; i < L; ++i) {
            if (i & s) continue;
            const Vec<T> a = rows[i], b = rows[i + s];
#ifdef __clang__
            UNROLL for (int j = 0; j < L; ++j) {
                rows[i].v[j] = first[j] < L ? a.v[first[j] % L] : b.v[first[j] % L];
                rows[i + s].v[j] = second[j] < L ? a.v[second[j] % L] : b.v[second[j] % L];
            }
#else
            rows[i].v = __builtin_shuffle(a.v, b.v, first);
            rows[i + s].v = __builtin_shuffle(a.v, b.v, second);
#endif
        }
    }
}
