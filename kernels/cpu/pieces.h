// api.cpp in several pieces, which can be compiled at once: what the interface and the instruction sets must know of each other. A
// part of api.cpp.
//
// Without GPURNN_PIECE all is one piece, and OF(isa, function) the function itself.

#ifdef GPURNN_PIECE
#define IN_PIECE(number) (GPURNN_PIECE == number)

// What the interface calls of one instruction set.
struct Functions {
    void (*time_loop)(const Pass* passes, int directions, int threads, bool backward);
    size_t (*pack_weights)(const Pass& pass, void* to, int threads);
    size_t (*pack_stage)(const Stage& stage, void* to);
    uint64_t (*fingerprint)(const char* values, size_t bytes, uint64_t before, int threads);
    void (*run_step)(const Stage* stages, int count);
    void (*multiply)(const Product* job, int threads);
    void (*add_rows_any)(const void* rows, ptrdiff_t N, int M, ptrdiff_t row, int dtype, void* sums, int threads);
    void (*update)(const Update* job, int threads);
    void (*round_all)(const float* numbers, ptrdiff_t N, int dtype, void* to, int threads);
    void (*add_squares_any)(const void* values, ptrdiff_t N, int is_double, double* sums, int threads);
    void (*cross_entropy)(const CrossEntropy* job, int threads, bool backward);
    void (*dropout_mask)(ptrdiff_t N, uint64_t seed, unsigned layer, unsigned call, uint64_t threshold, bool* mask, int threads);
};
#define FUNCTIONS                                                                                                            \
    extern const Functions functions = {time_loop,    pack_weights, pack_stage, fingerprint,     run_step,      multiply, \
                                        add_rows_any, update,       round_all,  add_squares_any, cross_entropy, dropout_mask};
#define OF(isa, function) gpurnn::isa::functions.function

namespace gpurnn {
namespace baseline {
extern const Functions functions;
}
namespace avx2 {
extern const Functions functions;
}
namespace avx512 {
extern const Functions functions;
}
}  // namespace gpurnn

#else
#define IN_PIECE(number) 1
#define FUNCTIONS
#define OF(isa, function) isa::function
#endif
