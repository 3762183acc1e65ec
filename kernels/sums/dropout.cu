// Dropout masks, bit for bit those of gpurnn/rng.py:
//
//     mask[4n + k] = word k of philox(counter (n mod 2^32, n div 2^32, layer, call), key seed) >= threshold
//
// One thread draws the four words of a counter. In a CUDA graph `call` counts from a number in device memory: arguments
// are frozen there.

#include "../common.cuh"
#include "philox.cuh"

__global__ void dropout_mask(
    const long long N,
    const unsigned long long seed,
    const unsigned layer,
    const unsigned call,
    const unsigned* __restrict__ calls,  // [1]  added to call; or null
    const unsigned long long threshold,  // 0 .. 2^32
    bool* __restrict__ mask)             // [N]  out: which numbers stay
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n * 4 >= N) return;
    unsigned c[4] = {unsigned(n), unsigned(n >> 32), layer, call + (calls ? *calls : 0)};
    philox(c, unsigned(seed), unsigned(seed >> 32));
    for (int k = 0; k < 4 && n * 4 + k < N; k++) mask[n * 4 + k] = c[k] >= threshold;
}
