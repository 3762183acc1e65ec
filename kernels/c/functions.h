// Functions of numbers for exported models, in C99 without libm: the series of ../cpu/functions.h.
//
// gpurnn/interop/c copies what a model needs into its header, with the model's name in place of gpurnn: a part ends at a blank
// line, and defines one function. Nothing here converts NaN or a number that is too large to an integer, or shifts a sign bit.

// The number of these bits.
static inline float gpurnn_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// The bits of a number.
static inline uint32_t gpurnn_bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// 2^n. n: from -126 to 127, or 128 for infinity, or less for 0.
static inline float gpurnn_power_of_two(int32_t n) {
    return gpurnn_of_bits((uint32_t)((n > -127 ? n : -127) + 127) << 23);
}

static inline float gpurnn_fabs(float x) {
    return gpurnn_of_bits(gpurnn_bits_of(x) & 0x7fffffffu);
}

static inline float gpurnn_relu(float x) {
    return x < 0.0f ? 0.0f : x;
}

static inline float gpurnn_larger(float a, float b) {
    return a > b || a != a ? a : b;
}

static inline float gpurnn_smaller(float a, float b) {
    return a < b || a != a ? a : b;
}

static inline float gpurnn_where_greater(float a, float b, float x, float y) {
    return a > b ? x : y;
}

// y, or NaN where x is NaN. A choice between y and x would let a compiler compute y only where it is chosen, one by one.
static inline float gpurnn_or_nan(float y, float x) {
    return gpurnn_of_bits(gpurnn_bits_of(y) | (x == x ? 0u : 0x7fc00000u));
}

// x, from -most to most; NaN becomes one of them. In integers, as compilers make vectors of the smaller one of two of these.
static inline float gpurnn_limited(float x, float most) {
    const uint32_t bits = gpurnn_bits_of(x), size = bits & 0x7fffffffu, limit = gpurnn_bits_of(most);
    return gpurnn_of_bits((size < limit ? size : limit) | (bits & 0x80000000u));
}

// Returns exp(r) - 1 and sets n, where x = n ln 2 + r and |r| <= ln 2 / 2, so that exp(x) = 2^n (1 + result). The first
// omitted term of the series, r^8 / 8!, is below half an ulp of r. ln 2 comes in two parts (Cody and Waite), the first with so
// few bits that a whole number of it is exact.
static inline float gpurnn_exp_series(float x, int32_t *n) {
    const float scaled = x * 1.44269504f;
    *n = (int32_t)(scaled + 256.5f) - 256;  // x > -177; a conversion to an integer cuts off
    const float whole = (float)*n;
    const float r = (x - whole * 6.93145752e-01f) - whole * 1.42860677e-06f;
    float p = 1.98412698e-04f;
    p = p * r + 1.38888889e-03f;
    p = p * r + 8.33333333e-03f;
    p = p * r + 4.16666667e-02f;
    p = p * r + 1.66666667e-01f;
    p = p * r + 0.5f;
    return p * r * r + r;
}

// exp(x), exact to 2 ulp. 2^n comes in two factors, as it may be beyond the largest number where exp(x) is not, or subnormal.
static inline float gpurnn_exp(float x) {
    int32_t n;
    const float p = gpurnn_exp_series(gpurnn_limited(x, 104.0f), &n);
    const int32_t first = (n + 256) / 2 - 128;
    const float half = gpurnn_power_of_two(first), y = (half + half * p) * gpurnn_power_of_two(n - first);
    return gpurnn_or_nan(y, x);
}

// exp(x) - 1, exact to 3 ulp, near 0 too. It halves the power, which may be beyond the largest number.
static inline float gpurnn_expm1(float x) {
    int32_t n;
    const float p = gpurnn_exp_series(gpurnn_limited(x, 89.0f), &n);
    const float half = gpurnn_power_of_two(n - 1), y = (half * p + (half - 0.5f)) * 2.0f;
    return gpurnn_or_nan(y, x);
}

// 1 / (1 + exp(-x)), exact to a few ulp, however small it is. exp(-x) is power * (1 + p): the sum power + power * p would be
// NaN where the power is infinite and p < 0.
static inline float gpurnn_sigmoid(float x) {
    int32_t n;
    const float p = gpurnn_exp_series(gpurnn_limited(-x, 89.0f), &n);
    const float y = 1.0f / (1.0f + gpurnn_power_of_two(n) * (1.0f + p));
    return gpurnn_or_nan(y, x);
}

// tanh(x) = e / (e + 2) with the sign of x, where e = exp(2|x|) - 1. Exact to 4 ulp, near 0 too.
static inline float gpurnn_tanh(float x) {
    const uint32_t sign = gpurnn_bits_of(x) & 0x80000000u;
    int32_t n;
    const float p = gpurnn_exp_series(gpurnn_limited(2.0f * gpurnn_fabs(x), 20.0f), &n);
    const float power = gpurnn_power_of_two(n), e = power * p + (power - 1.0f), y = e / (e + 2.0f);
    return gpurnn_or_nan(gpurnn_of_bits(gpurnn_bits_of(y) | sign), x);
}

// log(x) + correction, exact to 2 ulp, of a normal number. x = 2^k (1 + f), with 1 + f from sqrt(1/2) to sqrt(2), and with
// s = f / (2 + f)
//
//     log(1 + f) = 2 atanh(s) = f - (f^2 / 2 - s (f^2 / 2 + R)),  R = 2 s^2 / 3 + 2 s^4 / 5 + 2 s^6 / 7 + ...
static inline float gpurnn_log_series(float x, float correction) {
    const uint32_t bits = gpurnn_bits_of(x) + (0x3f800000u - 0x3f3504f3u);
    const float f = gpurnn_of_bits((bits & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    const float k = (float)((int32_t)(bits >> 23) - 127);
    const float s = f / (f + 2.0f), z = s * s, half_square = f * f * 0.5f;
    float R = 1.81818182e-01f;
    R = R * z + 2.22222222e-01f;
    R = R * z + 2.85714286e-01f;
    R = R * z + 0.4f;
    R = R * z + 6.66666667e-01f;
    return k * 6.93145752e-01f - ((half_square - (s * (half_square + R * z) + (k * 1.42860677e-06f + correction))) - f);
}

// log(x): of 0 and of subnormal numbers -inf, of negative ones NaN; inf and NaN stay.
static inline float gpurnn_log(float x) {
    if (!(x < gpurnn_of_bits(0x7f800000u))) return x;
    if (x < 1.17549435e-38f) return gpurnn_of_bits(x < 0.0f ? 0x7fc00000u : 0xff800000u);
    return gpurnn_log_series(x, 0.0f);
}

// log(1 + x), exact to 3 ulp, near 0 too: what 1 + x loses in rounding is the correction.
static inline float gpurnn_log1p(float x) {
    const float u = x + 1.0f;
    if (!(u < gpurnn_of_bits(0x7f800000u)) || u < 1.17549435e-38f) return gpurnn_log(u);
    return gpurnn_log_series(u, (x - (u - 1.0f)) / u);
}

// log(1 + exp(x)) without overflow.
static inline float gpurnn_softplus(float x) {
    return gpurnn_larger(x, 0.0f) + gpurnn_log1p(gpurnn_exp(-gpurnn_fabs(x)));
}

// The square root, exact to 2 ulp: an estimate of 1 / sqrt(x) from the bits of x, improved by Newton's method.
static inline float gpurnn_sqrt(float x) {
    if (!(x > 0.0f && x < gpurnn_of_bits(0x7f800000u))) return x < 0.0f ? gpurnn_of_bits(0x7fc00000u) : x;
    const int small = x < 1.17549435e-38f;
    const float a = small ? x * 16777216.0f : x;  // 2^24
    float y = gpurnn_of_bits(0x5f375a86u - (gpurnn_bits_of(a) >> 1));
    for (int i = 0; i < 2; ++i) y = y * (1.5f - 0.5f * a * y * y);
    const float root = a * y, better = root + 0.5f * y * (a - root * root);
    return small ? better * 2.44140625e-04f : better;  // 2^-12
}
