// A number that tells whether an array has changed, for one instruction set: a part of parts.h.

constexpr size_t PIECE = 1 << 16;  // bytes that one thread reads at a time
constexpr uint64_t SPREAD = 0x9E3779B97F4A7C15ull;  // odd, so that multiplying by it loses nothing

// One word more. Any change of one word changes the result, as each step can be undone; changes of several escape by chance once in
// 2^64, though who looks for such changes finds some. The rotation lets the highest bits of a word, such as a sign, reach the others.
template <typename Word>
INLINE Word mixed(Word state, Word word) {
    const Word x = state ^ word;
    return ((x << 31) | (x >> 33)) * SPREAD;
}

typedef uint64_t Words64 __attribute__((vector_size(VECTOR_BYTES)));
#if VECTOR_BYTES < 64
// The products of the lower halves of words and a number of 32 bits.
INLINE Words64 times(Words64 x, uint32_t number) {
    const Words64 numbers = Words64{} + (uint64_t)number;
#if defined(__x86_64__) && VECTOR_BYTES == 32
    return (Words64)_mm256_mul_epu32((__m256i)x, (__m256i)numbers);
#elif defined(__x86_64__)
    return (Words64)_mm_mul_epu32((__m128i)x, (__m128i)numbers);
#elif defined(__aarch64__)
    return (Words64)vmull_u32(vmovn_u64((uint64x2_t)x), vdup_n_u32(number));
#else
    return (x & 0xFFFFFFFFu) * numbers;
#endif
}

// Only AVX-512 multiplies words. Elsewhere each half is multiplied by a prime of 32 bits, so that its bits reach many of the result;
// a change of one word escapes here once in 2^64, too.
template <>
INLINE Words64 mixed(Words64 state, Words64 word) {
    const Words64 x = state ^ word;
    return times(x, 0x9E3779B1u) + times(x >> 32, 0x85EBCA77u);
}
#endif

// Of one piece. Several states in turn, because a step waits for the one before it.
inline uint64_t fingerprint_of_piece(const char* from, size_t bytes) {
    constexpr int count = 8, lanes = VECTOR_BYTES / 8;
    Words64 states[count];
    UNROLL for (int i = 0; i < count; ++i) states[i] = Words64{} + (uint64_t)(i + 1);
    const char* end = from + bytes;
    for (; from + sizeof states <= end; from += sizeof states)
        UNROLL for (int i = 0; i < count; ++i) {
            Words64 words;
            std::memcpy(&words, from + i * sizeof words, sizeof words);
            states[i] = mixed(states[i], words);
        }
    uint64_t total = bytes;
    for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < lanes; ++lane) total = mixed(total, states[i][lane]);
    for (; from < end; from += 8) {
        uint64_t word = 0;
        std::memcpy(&word, from, std::min<size_t>(8, end - from));
        total = mixed(total, word);
    }
    return total;
}

// Of an array after others, whose fingerprint is `before`. It does not depend on the number of threads.
inline uint64_t fingerprint(const char* values, size_t bytes, uint64_t before, int threads) {
    const size_t pieces = (bytes + PIECE - 1) / PIECE;
    std::vector<uint64_t> found(pieces);
    on_threads(threads, [&](int thread) {
        for (size_t piece = pieces * thread / threads; piece < pieces * (thread + 1) / threads; ++piece)
            found[piece] = fingerprint_of_piece(values + piece * PIECE, std::min(PIECE, bytes - piece * PIECE));
    });
    for (const uint64_t one : found) before = mixed(before, one);
    return before;
}
