// The time loop of one generated cell and dtype, which gpurnn/backends/cpu/cells.py compiles at its first use. It puts the struct,
// the macros CELL (its name) and REAL (float or double), and all headers into this text. It is compiled for one instruction set,
// that of the compiler's options.

#include "interface.h"

namespace {

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define ACCUMULATORS 24
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#define ACCUMULATORS 12
#elif defined(__x86_64__)
#define VECTOR_BYTES 16
#define ACCUMULATORS 12
#else
#define VECTOR_BYTES 16
#define ACCUMULATORS 24
#endif

#include "vector.h"
#include "numbers16.h"
#include "functions.h"
#include "gemm.h"
#include "int8.h"
#include "shard.h"
#include "../common.cuh"
#include "../cells/cell.cuh"

namespace generated {
//@ the struct
}

#include "time_loop.h"

}  // namespace

// The size of the struct that the caller fills.
EXPORT int gpurnn_cell_bytes() { return (int)sizeof(Pass); }

EXPORT int gpurnn_cell_time_loop(const Pass* passes, int directions, int threads, int backward) {
    return guarded([=] { run_layer<REAL, generated::CELL>(passes, directions, threads, backward); });
}

EXPORT int gpurnn_cell_pack(const Pass* pass, void* to, int threads, size_t* bytes) {
    return guarded([=] { *bytes = pack_layer<REAL, generated::CELL>(*pass, to, threads); });
}
