// A vector of numbers that behaves like one number, so that the cells of ../cells/ run on it as they run on a float.
//
// Written with the vector extensions of GCC and Clang, which turn into whatever instructions the file is compiled for. VECTOR_BYTES
// and ACCUMULATORS are set by api.cpp: bytes of a vector register, and how many registers a product may use for its sums.

#ifndef INLINE
// A vector never crosses a call: what takes or returns one is always inlined. GCC 12 clears the upper part of the vector
// registers (vzeroupper) at the end of a function that returns a class like Vec, and with it what is returned.
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
#endif

// The vectors of a type, and of whole numbers of the same size.
template <typename T> struct Raw;
template <> struct Raw<float> {
    typedef float Lanes __attribute__((vector_size(VECTOR_BYTES)));
    typedef int Whole __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int bits = 32, mantissa = 23, bias = 127;
};
template <> struct Raw<double> {
    typedef double Lanes __attribute__((vector_size(VECTOR_BYTES)));
    typedef long long Whole __attribute__((vector_size(VECTOR_BYTES)));
    static constexpr int bits = 64, mantissa = 52, bias = 1023;
};

template <typename T>
struct Vec {
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    typedef typename Raw<T>::Lanes Lanes;
    typedef typename Raw<T>::Whole Whole;
    Lanes v;

    Vec() = default;
    INLINE Vec(Lanes lanes) : v(lanes) {}
    // all lanes x; minus zero, for x + 0 is not x where x is -0, and would stay in the code
    INLINE explicit Vec(float x) : v(T(x) - Lanes{}) {}
    INLINE explicit Vec(double x) : v(T(x) - Lanes{}) {}
    INLINE explicit Vec(int x) : v(T(x) - Lanes{}) {}

    // All lanes, or the first `count` of them with `rest` behind.
    INLINE static Vec load(const T* from, int count = lanes, T rest = 0) {
        Vec x;
        if (count >= lanes) {
            std::memcpy(&x.v, from, sizeof x.v);
        } else {
            x.v = rest - Lanes{};
            for (int i = 0; i < count; ++i) x.v[i] = from[i];
        }
        return x;
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
template <typename T> INLINE void operator+=(Vec<T>& a, Vec<T> b) { a.v += b.v; }
template <typename T> INLINE void operator*=(Vec<T>& a, Vec<T> b) { a.v *= b.v; }

// `yes` where the mask is all ones, `no` where it is zero.
template <typename T>
INLINE Vec<T> pick(typename Vec<T>::Whole mask, Vec<T> yes, Vec<T> no) {
    typedef typename Vec<T>::Whole Whole;
    return (typename Vec<T>::Lanes)((mask & (Whole)yes.v) | (~mask & (Whole)no.v));
}

// The rows of a square become its columns: at each of the halvings s, elements s apart change places between rows s apart.
template <typename T>
INLINE void transpose(Vec<T>* rows) {
    constexpr int L = Vec<T>::lanes;
    UNROLL for (int s = L / 2; s > 0; s /= 2) {
        typename Vec<T>::Whole first, second;  // of both rows one behind the other, what comes into each
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

// As common.cuh has them for one number.
template <typename T>
INLINE Vec<T> relu(Vec<T> x) {
    return pick(x.v < typename Vec<T>::Lanes{}, Vec<T>(T(0)), x);
}
template <typename T>
INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
    return pick(a.v > b.v || a.v != a.v, a, b);
}
template <typename T>
INLINE Vec<T> drelu(Vec<T> y) {
    return pick(y.v > typename Vec<T>::Lanes{}, Vec<T>(T(1)), Vec<T>(T(0)));
}

// exp(x) = power (1 + the result), power = 2^n with x = n ln 2 + r, |r| <= ln 2 / 2: exp(r) - 1 by its series, whose first term
// left out is below half a last place of r: r^8 / 8! in float, r^14 / 14! in double.
template <typename T>
INLINE typename Vec<T>::Lanes series(typename Vec<T>::Lanes x, typename Vec<T>::Lanes& power) {
    typedef typename Vec<T>::Lanes Lanes;
    typedef typename Vec<T>::Whole Whole;
    constexpr bool is_double = sizeof(T) == 8;
    constexpr int terms = is_double ? 13 : 7;
    // Adding and taking away 1.5 2^mantissa rounds to the nearest whole number, which then stands in the lowest bits.
    const Lanes round = Lanes{} + T(is_double ? 6755399441055744.0 : 12582912.0);
    const Lanes shifted = x * T(1.44269504088896340736) + round;
    const Lanes n = shifted - round;
    // ln 2 in two parts, the first with so few bits that n times it is exact
    const Lanes r = (x - n * T(is_double ? 6.93147180369123816490e-01 : 6.93145752e-01)) -
                    n * T(is_double ? 1.90821492927058770002e-10 : 1.42860677e-06);
    Lanes p = Lanes{} + T(inverse_factorial(terms));
    UNROLL for (int k = terms - 1; k >= 2; --k) p = p * r + T(inverse_factorial(k));
    power = (Lanes)(((Whole)shifted - (Whole)round + Raw<T>::bias) << Raw<T>::mantissa);
    return p * r * r + r;
}

// tanh(x) = e / (e + 2) with e = exp(2|x|) - 1, and the sign of x: exact to a few last places, near 0 too; NaN stays NaN.
template <typename T>
INLINE Vec<T> tanh(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    typedef typename Vec<T>::Whole Whole;
    constexpr bool is_double = sizeof(T) == 8;
    const Whole sign_bit = (Whole{} + 1) << (Raw<T>::bits - 1);
    const Whole sign = (Whole)x.v & sign_bit;
    Lanes a = (Lanes)((Whole)x.v & ~sign_bit);
    a = a + a;
    const Lanes most = Lanes{} + T(is_double ? 40 : 20);  // tanh is 1 from here on
    a = pick<T>(a > most, most, a).v;
    Lanes power;
    const Lanes p = series<T>(a, power);
    const Lanes e = power * p + (power - T(1));
    const Lanes y = e / (e + T(2));
    return (Lanes)((Whole)y | sign);
}

// sigmoid(x) = 1 / (1 + exp(-x)), exact to a few last places however small it is; NaN stays NaN.
//
// 1 + p is rounded as power (1 + p) is, and times an infinite power it is infinite, whatever the sign of p.
template <typename T>
INLINE Vec<T> sigmoid(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    constexpr bool is_double = sizeof(T) == 8;
    const Lanes most = Lanes{} + T(is_double ? 710 : 89);   // here the power is infinite
    const Lanes least = Lanes{} - T(is_double ? 40 : 20);   // 1 + exp is 1 from here on
    const Lanes down = -x.v;
    const Lanes a = pick<T>(down > most, most, down).v;
    Lanes power;
    const Lanes p = series<T>(pick<T>(a < least, least, a).v, power);
    return T(1) / (T(1) + power * (T(1) + p));
}
