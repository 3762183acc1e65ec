// All of the compiled code for one instruction set: api.cpp includes this file once for each, in a namespace. Each part uses
// what those before it define.

#include "vector.h"
#include "numbers16.h"
#include "functions.h"
#include "gemm.h"
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

void time_loop(const Pass* passes, int directions, int threads, bool backward) {
    if (passes->dtype == FLOAT64)
        run_cell<double>(passes, directions, threads, backward);
    else
        run_cell<float>(passes, directions, threads, backward);
}

#include "step.h"
