// A number that tells whether an array has changed, for one instruction set: a part of parts.h.

constexpr size_t PIECE = 1 << 16;  // bytes that one thread reads at a time
constexpr uint64_t SPREAD = 0x9E3779B97F4A7C15ull;  // odd, so that multiplying by it loses nothing

// One word more. Any change of one word changes the result, as each step can be undone; changes of several escape once in 2^64. The
// rotation lets the highest bits of a word, such as a sign, reach the others.
template <typename Word>
INLINE Word mixed(Word state, Word word) {
    const Word x = state ^ word;
    return ((x << 31) | (x >> 33)) * SPREAD;
}

// Of one piece. Several states in turn, because a step waits for the one before it.
inline uint64_t fingerprint_of_piece(const char* from, size_t bytes) {
    typedef uint64_t Words __attribute__((vector_size(VECTOR_BYTES)));
    constexpr int count = 4, lanes = VECTOR_BYTES / 8;
    Words states[count];
    UNROLL for (int i = 0; i < count; ++i) states[i] = Words{} + (uint64_t)(i + 1);
    const char* end = from + bytes;
    for (; from + sizeof states <= end; from += sizeof states)
        UNROLL for (int i = 0; i < count; ++i) {
            Words words;
            std::memcpy(&words, from + i * sizeof words, sizeof words);
            states[i] = mixed(states[i], words);
        }
    uint64_t total = bytes;
    for (int i = 0; i < count; ++i)
        for (int lane = 0; lane < lanes; ++lane) total = mixed<uint64_t>(total, states[i][lane]);
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
