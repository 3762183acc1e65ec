// What the exchange of schedule grid (exchange.cuh) costs by itself: `gpurnn bench probe`, measurement `ring`. All
// blocks of a group send a part of a slot and receive all of it, with the loads of grid_mma.cu, and compute nothing. Unlike
// there, a poll loads again only what is missing, and a batch is asked for when the one before it has come.
//
// LOADS: loads of a lane in a step, of 8 bytes each, so that a block of 8 warps receives 2 x LOADS KB. WORDS_SENT: words
// that a thread sends at most. Blocks stand along y, groups along z.

#include "common.cuh"
#include "exchange.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS, BATCH = 8;  // loads that wait together, as in grid_mma.cu

// words [groups, 2 x 16 slots, 512 x LOADS], all bits set. out [groups, blocks, THREADS]: steps.
extern "C" __global__ void __launch_bounds__(THREADS) ring(int steps, int poll_limit, unsigned* words, unsigned* out,
                                                          int* failed) {
    constexpr int size = WARPS * LOADS * 64;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int sent = (size + gridDim.y - 1) / gridDim.y, first = blockIdx.y * sent;
    Ring<WORDS_SENT> ring(words, blockIdx.z, size, poll_limit, failed);
    unsigned seen = 0;
    auto send = [&] {
#pragma unroll
        for (int k = 0; k < WORDS_SENT; k++) {
            const int i = k * THREADS + threadIdx.x;
            if (i < sent && first + i < size) ring.send(k, first + i, seen + 1);
        }
        ring.next();
    };
    send();
    for (int s = 0; s < steps; s++) {
        unsigned least = 0xffffffffu, most = 0;
        ring.acquire();
#pragma unroll
        for (int from = 0; from < LOADS; from += BATCH) {
            constexpr int together = LOADS < BATCH ? LOADS : BATCH;
            unsigned received[together][2];
            unsigned missing = 0;
#pragma unroll
            for (int i = 0; i < together; i++) {
                received[i][0] = received[i][1] = seen + 1;
                if (from + i < LOADS) missing |= 1u << i;
            }
            auto load = [&](int i) { ring.load(received[i], ((warp * LOADS + from + i) * 32 + lane) * 2); };
            ring.load_missing<together>(missing, load);
            ring.wait<together>(
                missing, load, [&](int i) { return received[i][0] != ring.EMPTY && received[i][1] != ring.EMPTY; });
#pragma unroll
            for (int i = 0; i < together; i++) {
                least = min(least, min(received[i][0], received[i][1]));
                most = max(most, max(received[i][0], received[i][1]));
            }
        }
        if (__syncthreads_or(ring.timed_out)) return;
        __syncthreads();                        // where the warps' sums meet in grid_mma.cu
        seen = least == most ? most : 1u << 31;  // everybody sends the same number: anything else is an error
        if (s + 1 < steps) send();
    }
    out[(blockIdx.z * gridDim.y + blockIdx.y) * THREADS + threadIdx.x] = seen;
}
