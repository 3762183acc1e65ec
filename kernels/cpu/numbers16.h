// Numbers of 16 bits in memory, and the floats that they are computed in, for one instruction set: a part of time_loop.h.
//
// A float is rounded to the nearest number of 16 bits, and to the even one of two that are equally near. What is too large becomes
// infinite, NaN stays NaN. Subnormal numbers of float16 are normal ones of float: FlushToZero does not touch them.

// As many numbers of 16 bits as a vector has floats.
typedef unsigned short Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef unsigned Words __attribute__((vector_size(VECTOR_BYTES)));  // of the same number

template <int dtype>
INLINE Vec<float> from_halves(Halves halves) {
    typedef Vec<float>::Lanes Lanes;
    if constexpr (dtype == BFLOAT16) return (Lanes)(__builtin_convertvector(halves, Words) << 16);
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (Lanes)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)halves);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return (Lanes)_mm256_cvtph_ps((__m128i)halves);
#elif defined(__aarch64__)
    return (Lanes)vcvt_f32_f16((float16x4_t)halves);
#else
    typedef Vec<float>::Ints Ints;
    const Words bits = __builtin_convertvector(halves, Words), size = bits & 0x7FFF, moved = size << 13;
    // the exponent's bias is 112 less; that of infinity and NaN, 31, becomes 255
    const Words normal = moved + (112u << 23), special = moved + (224u << 23);
    const Lanes subnormal = __builtin_convertvector((Ints)size, Lanes) * 0x1p-24f;
    const Words is_special = (Words)((Ints)size >= 0x7C00), is_subnormal = (Words)((Ints)size < 0x400);
    const Words found = (is_special & special) | (is_subnormal & (Words)subnormal) | (~(is_special | is_subnormal) & normal);
    return (Lanes)(found | (bits & 0x8000) << 16);
#endif
}

// Floats whose upper halves are x rounded to bfloat16.
INLINE Words round_to_bfloat(Vec<float> x) {
    const Words bits = (Words)x.v, nan = (Words)(x.v != x.v), rounded = bits + 0x7FFF + (bits >> 16 & 1);
    return (nan & (bits | 0x400000)) | (~nan & rounded);
}

template <int dtype>
INLINE Halves to_halves(Vec<float> x) {
    if constexpr (dtype == BFLOAT16) {
        const Words bits = round_to_bfloat(x) >> 16;
#if defined(__x86_64__) && VECTOR_BYTES == 32
        return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits), _mm256_extracti128_si256((__m256i)bits, 1));
#else
        return __builtin_convertvector(bits, Halves);
#endif
    }
#if defined(__x86_64__) && VECTOR_BYTES == 64
    return (Halves)_mm512_maskz_cvtps_ph(0xFFFF, (__m512)x.v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__x86_64__) && VECTOR_BYTES == 32
    return (Halves)_mm256_cvtps_ph((__m256)x.v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
    return (Halves)vcvt_f16_f32((float32x4_t)x.v);
#else
    typedef Vec<float>::Lanes Lanes;
    typedef Vec<float>::Ints Ints;
    const Words bits = (Words)x.v;
    const Words size = bits & 0x7FFFFFFF, sign = (bits & 0x80000000) >> 16;
    const Words normal = ((size + 0xFFF + (size >> 13 & 1)) >> 13) - (112 << 10);
    // In a sum with 1/2 the last place is the smallest number of float16, 2^-24.
    const Words subnormal = (Words)((Lanes)size + 0.5f) - 0x3F000000;
    const Words nan = (size >> 13 & 0x3FF) | 0x7E00, inf = Words{} + 0x7C00;
    const Words is_nan = (Words)((Ints)size > 0x7F800000), is_inf = (Words)((Ints)size >= 0x477FF000) & ~is_nan;  // 65520
    const Words is_subnormal = (Words)((Ints)size < 0x38800000), is_normal = ~(is_nan | is_inf | is_subnormal);  // 2^-14
    const Words found = (is_nan & nan) | (is_inf & inf) | (is_subnormal & subnormal) | (is_normal & normal);
    return __builtin_convertvector(found | sign, Halves);
#endif
}

// The first `count` of a vector's numbers at `from`; the others are 0.
template <int dtype>
INLINE Vec<float> load_halves(const uint16_t* from, int count = Vec<float>::lanes) {
    Halves halves{};
    std::memcpy(&halves, from, count >= Vec<float>::lanes ? sizeof halves : count * sizeof *from);
    return from_halves<dtype>(halves);
}

template <int dtype>
void load_all_halves(const uint16_t* from, float* to, ptrdiff_t n) {
    constexpr int lanes = Vec<float>::lanes;
    for (; n >= lanes; n -= lanes, from += lanes, to += lanes) load_halves<dtype>(from).store(to);
    if (n) load_halves<dtype>(from, (int)n).store(to, (int)n);
}

template <int dtype>
void store_all_halves(const float* from, uint16_t* to, ptrdiff_t n) {
    constexpr int lanes = Vec<float>::lanes;
    for (; n > 0; n -= lanes, from += lanes, to += lanes) {
        const Halves halves = to_halves<dtype>(Vec<float>::load(from, n < lanes ? (int)n : lanes));
        std::memcpy(to, &halves, n < lanes ? n * sizeof *to : sizeof halves);
    }
}

// n numbers of a dtype of 16 bits as floats, and back.
template <typename T>
void load_numbers(int dtype, const void* from, T* to, ptrdiff_t n) {
    if constexpr (sizeof(T) == 4)
        dtype == FLOAT16 ? load_all_halves<FLOAT16>((const uint16_t*)from, to, n)
                         : load_all_halves<BFLOAT16>((const uint16_t*)from, to, n);
}
template <typename T>
void store_numbers(int dtype, const T* from, void* to, ptrdiff_t n) {
    if constexpr (sizeof(T) == 4)
        dtype == FLOAT16 ? store_all_halves<FLOAT16>(from, (uint16_t*)to, n)
                         : store_all_halves<BFLOAT16>(from, (uint16_t*)to, n);
}

// ---- two columns of packed weights
//
// A packed block with weights of 16 bits is [(K+1)/2][2][G][U][lanes]: two columns at a time. In bfloat16 the numbers of both are one
// after another, [(K+1)/2][G][U][lanes][2]. So one instruction makes a float of either half of a word, where it takes two to make a
// word of each half.

// Packs two columns, `width` floats each; of one alone there is no second.
template <int dtype>
void pack_two(const float* columns, int count, int width, uint16_t* to) {
    constexpr int lanes = Vec<float>::lanes;
    if (dtype == FLOAT16) return store_all_halves<dtype>(columns, to, (ptrdiff_t)count * width);
    for (int n = 0; n < width; n += lanes) {
        const Words upper = round_to_bfloat(count > 1 ? Vec<float>::load(columns + width + n) : Vec<float>(0));
        const Words both = (upper & 0xFFFF0000u) | round_to_bfloat(Vec<float>::load(columns + n)) >> 16;
        std::memcpy(to + 2 * n, &both, sizeof both);
    }
}

// The vector at `n` of the first or second of two packed columns.
template <int dtype, int second, int width>
INLINE Vec<float> load_packed(const uint16_t* columns, int n) {
    if constexpr (dtype == FLOAT16) return load_halves<dtype>(columns + second * width + n);
    Words both;
    std::memcpy(&both, columns + 2 * n, sizeof both);
    return (typename Vec<float>::Lanes)(second ? both & 0xFFFF0000u : both << 16);
}
