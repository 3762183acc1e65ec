// The functions of ../common.cuh, and exp, log and their kin, on vectors: a part of time_loop.h.

// The vector forms of functions in ../common.cuh.
template <typename T>
INLINE Vec<T> relu(Vec<T> x) {
    return select(x.v < typename Vec<T>::Lanes{}, Vec<T>(T(0)), x);
}
template <typename T>
INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
    return select(a.v > b.v || a.v != a.v, a, b);
}
template <typename T>
INLINE Vec<T> smaller(Vec<T> a, Vec<T> b) {
    return select(a.v < b.v || a.v != a.v, a, b);
}
template <typename T>
INLINE Vec<T> where_greater(Vec<T> a, Vec<T> b, Vec<T> x, Vec<T> y) {
    return select(a.v > b.v, x, y);
}
template <typename T>
INLINE Vec<T> fabs(Vec<T> x) {
    typedef typename Vec<T>::Ints Ints;
    return (typename Vec<T>::Lanes)((Ints)x.v & ~((Ints{} + 1) << (Raw<T>::bits - 1)));
}
template <typename T>
INLINE Vec<T> sqrt(Vec<T> x) {
    UNROLL for (int i = 0; i < Vec<T>::lanes; ++i) x.v[i] = std::sqrt(x.v[i]);
    return x;
}
template <typename T>
INLINE Vec<T> drelu(Vec<T> y) {
    return select(y.v > typename Vec<T>::Lanes{}, Vec<T>(T(1)), y);
}

// ln 2 in two parts (Cody and Waite), the first with so few bits that a whole number of it is exact.
template <typename T> constexpr T LN2_HIGH = T(sizeof(T) == 8 ? 6.93147180369123816490e-01 : 6.93145752e-01);
template <typename T> constexpr T LN2_LOW = T(sizeof(T) == 8 ? 1.90821492927058770002e-10 : 1.42860677e-06);

// 2^n. n: whole numbers.
template <typename T>
INLINE typename Vec<T>::Lanes power_of_two(typename Vec<T>::Ints n) {
    return (typename Vec<T>::Lanes)((n + Raw<T>::bias) << Raw<T>::mantissa);
}

// Returns exp(r) - 1 and sets n, where x = n ln 2 + r and |r| <= ln 2 / 2, so that exp(x) = 2^n (1 + result). The first
// omitted term of the series is below half an ulp of r: r^8 / 8! in float, r^14 / 14! in double.
template <typename T>
INLINE typename Vec<T>::Lanes exp_series(typename Vec<T>::Lanes x, typename Vec<T>::Ints& whole) {
    typedef typename Vec<T>::Lanes Lanes;
    typedef typename Vec<T>::Ints Ints;
    constexpr bool is_double = sizeof(T) == 8;
    constexpr int terms = is_double ? 13 : 7;
    // Adding 1.5 * 2^mantissa rounds to the nearest integer, which is then in the lowest bits. Subtracting it gives that
    // integer.
    const Lanes round = Lanes{} + T(is_double ? 6755399441055744.0 : 12582912.0);
    const Lanes shifted = x * T(1.44269504088896340736) + round;
    const Lanes n = shifted - round;
    const Lanes r = (x - n * LN2_HIGH<T>) - n * LN2_LOW<T>;
    Lanes p = Lanes{} + T(inverse_factorial(terms));
    UNROLL for (int k = terms - 1; k >= 2; --k) p = p * r + T(inverse_factorial(k));
    whole = (Ints)shifted - (Ints)round;
    return p * r * r + r;
}

// tanh(x) = e / (e + 2) with the sign of x, where e = exp(2|x|) - 1. Exact to 4 ulp, near 0 too. NaN stays NaN.
template <typename T>
INLINE Vec<T> tanh(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    typedef typename Vec<T>::Ints Ints;
    constexpr bool is_double = sizeof(T) == 8;
    const Ints sign_bit = (Ints{} + 1) << (Raw<T>::bits - 1);
    const Ints sign = (Ints)x.v & sign_bit;
    Lanes a = (Lanes)((Ints)x.v & ~sign_bit);
    a = a + a;
    const Lanes limit = Lanes{} + T(is_double ? 40 : 20);  // of 2|x|; tanh rounds to 1 from here on
    a = select<T>(a > limit, limit, a).v;
    Ints n;
    const Lanes p = exp_series<T>(a, n), power = power_of_two<T>(n);
    const Lanes e = power * p + (power - T(1));
    const Lanes y = e / (e + T(2));
    return (Lanes)((Ints)y | sign);
}

// sigmoid(x) = 1 / (1 + exp(-x)), exact to a few ulp, however small it is. NaN stays NaN.
//
// exp(-x) is power * (1 + p), which rounds once, as a product with a power of two is exact. The sum power + power * p would be
// NaN where the power is infinite and p < 0.
template <typename T>
INLINE Vec<T> sigmoid(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    constexpr bool is_double = sizeof(T) == 8;
    const Lanes upper = Lanes{} + T(is_double ? 710 : 89);  // power is infinite here
    const Lanes lower = Lanes{} - T(is_double ? 40 : 20);   // 1 + exp(-x) rounds to 1 from here down
    const Lanes negated = -x.v;
    const Lanes a = select<T>(negated > upper, upper, negated).v;
    typename Vec<T>::Ints n;
    const Lanes p = exp_series<T>(select<T>(a < lower, lower, a).v, n), power = power_of_two<T>(n);
    return T(1) / (T(1) + power * (T(1) + p));
}

// x between two bounds. NaN stays NaN.
template <typename T>
INLINE typename Vec<T>::Lanes within(typename Vec<T>::Lanes x, T lower, T upper) {
    typedef typename Vec<T>::Lanes Lanes;
    const Lanes low = Lanes{} + lower, high = Lanes{} + upper;
    x = select<T>(x > high, high, x).v;
    return select<T>(x < low, low, x).v;
}

// exp(x), exact to 2 ulp. 2^n comes in two factors, as it may be beyond the largest number where exp(x) is not, or subnormal.
template <typename T>
INLINE Vec<T> exp(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    constexpr bool is_double = sizeof(T) == 8;
    typename Vec<T>::Ints n;
    const Lanes p = exp_series<T>(within<T>(x.v, is_double ? -746 : -104, is_double ? 710 : 89), n);
    const Lanes half = power_of_two<T>(n >> 1);
    return (half + half * p) * power_of_two<T>(n - (n >> 1));
}

// exp(x) - 1, exact to 3 ulp, near 0 too, down to twice the smallest normal number. It halves the power, which may be beyond the
// largest number.
template <typename T>
INLINE Vec<T> expm1(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    constexpr bool is_double = sizeof(T) == 8;
    typename Vec<T>::Ints n;
    const Lanes p = exp_series<T>(within<T>(x.v, is_double ? -40 : -20, is_double ? 710 : 89), n);
    const Lanes half = power_of_two<T>(n - 1);
    return (half * p + (half - T(0.5))) * T(2);
}

// log(x) + correction, exact to 2 ulp. x = 2^k (1 + f), with 1 + f from sqrt(1/2) to sqrt(2), and with s = f / (2 + f)
//
//     log(1 + f) = 2 atanh(s) = f - (f^2 / 2 - s (f^2 / 2 + R)),  R = 2 s^2 / 3 + 2 s^4 / 5 + 2 s^6 / 7 + ...
//
// where f is exact. The first omitted term of R is below half an ulp of 1: s^2 < 0.0295.
template <typename T>
INLINE Vec<T> log_series(Vec<T> x, typename Vec<T>::Lanes correction) {
    typedef typename Vec<T>::Lanes Lanes;
    typedef typename Vec<T>::Ints Ints;
    constexpr bool is_double = sizeof(T) == 8;
    constexpr int terms = is_double ? 10 : 5;
    const Ints one = (Ints)(Lanes{} + T(1)), root = (Ints)(Lanes{} + T(0.70710678118654752440));
    const Ints bits = (Ints)x.v + (one - root);
    const Ints mantissa = ((Ints{} + 1) << Raw<T>::mantissa) - 1;
    const Lanes f = (Lanes)((bits & mantissa) + root) - T(1);
    // k as a number: added to the bits of 1.5 * 2^mantissa, it is added to the number
    const Lanes round = Lanes{} + T(is_double ? 6755399441055744.0 : 12582912.0);
    const Lanes k = (Lanes)((Ints)round + ((bits >> Raw<T>::mantissa) - Raw<T>::bias)) - round;
    const Lanes s = f / (f + T(2)), z = s * s, half_square = f * f * T(0.5);
    Lanes R = Lanes{} + T(2.0 / (2 * terms + 1));
    UNROLL for (int i = terms - 1; i >= 1; --i) R = R * z + T(2.0 / (2 * i + 1));
    return k * LN2_HIGH<T> - ((half_square - (s * (half_square + R * z) + (k * LN2_LOW<T> + correction))) - f);
}

// log(x) where log_series has no number: of 0 and of subnormal numbers -inf, of negative ones NaN; inf and NaN stay.
template <typename T>
INLINE Vec<T> log_special(Vec<T> x, Vec<T> log) {
    typedef typename Vec<T>::Lanes Lanes;
    const T inf = std::numeric_limits<T>::infinity();
    log = select<T>(x.v < Lanes{} + std::numeric_limits<T>::min(), Vec<T>(-inf), log);
    log = select<T>(x.v < Lanes{}, Vec<T>(std::numeric_limits<T>::quiet_NaN()), log);
    return select<T>(x.v < inf, log, x);
}

template <typename T>
INLINE Vec<T> log(Vec<T> x) {
    return log_special(x, log_series(x, typename Vec<T>::Lanes{}));
}

// log(1 + x), exact to 3 ulp, near 0 too: what 1 + x loses in rounding is the correction.
template <typename T>
INLINE Vec<T> log1p(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    const Lanes u = x.v + T(1), lost = (x.v - (u - T(1))) / u;
    return log_special(Vec<T>(u), log_series(Vec<T>(u), lost));
}
