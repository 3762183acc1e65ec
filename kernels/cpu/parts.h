// All of the compiled code for one instruction set: api.cpp includes this file once for each, in a namespace. Each part uses
// what those before it define.

#include "vector.h"
#include "numbers16.h"
#include "functions.h"
#include "gemm.h"
#include "int8.h"
#include "matmul.h"
#include "shard.h"
#include "../common.cuh"
#include "update.h"
#include "loss.h"
#include "../cells/all.cuh"
#include "time_loop.h"

template <typename T>
void run_cell(const Pass* passes, int directions, int threads, bool backward) {
#define RUN_IF_NAMED(Cell) \
    if (!std::strcmp(passes->cell, #Cell)) return run_layer<T, Cell>(passes, directions, threads, backward);
    FOR_EACH_CELL(RUN_IF_NAMED)
#undef RUN_IF_NAMED
    throw std::invalid_argument("unknown cell");
}

template <typename T>
size_t pack_cell(const Pass& pass, void* to, int threads) {
#define PACK_IF_NAMED(Cell) \
    if (!std::strcmp(pass.cell, #Cell)) return pack_layer<T, Cell>(pass, to, threads);
    FOR_EACH_CELL(PACK_IF_NAMED)
#undef PACK_IF_NAMED
    throw std::invalid_argument("unknown cell");
}

size_t pack_weights(const Pass& pass, void* to, int threads) {
    return pass.dtype == FLOAT64 ? pack_cell<double>(pass, to, threads) : pack_cell<float>(pass, to, threads);
}

void time_loop(const Pass* passes, int directions, int threads, bool backward) {
    if (passes->dtype == FLOAT64)
        run_cell<double>(passes, directions, threads, backward);
    else
        run_cell<float>(passes, directions, threads, backward);
}

#include "fingerprint.h"
#include "step.h"
