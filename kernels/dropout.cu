// Dropout masks by Philox4x32-10 (Salmon et al. 2011), bit for bit those of gpurnn/rng.py:
//
//     keep[4n + k] = word k of philox(counter (n mod 2^32, n div 2^32, layer, call), key seed) >= threshold
//
// One thread draws the four words of a counter.

#include "common.cuh"

static const unsigned MULTIPLIER_0 = 0xD2511F53u, MULTIPLIER_1 = 0xCD9E8D57u;
static const unsigned WEYL_0 = 0x9E3779B9u, WEYL_1 = 0xBB67AE85u;

DEVICE void philox(unsigned* c, unsigned k0, unsigned k1) {
    for (int round = 0; round < 10; round++) {
        const unsigned long long p0 = (unsigned long long)c[0] * MULTIPLIER_0, p1 = (unsigned long long)c[2] * MULTIPLIER_1;
        c[0] = unsigned(p1 >> 32) ^ c[1] ^ k0;
        c[1] = unsigned(p1);
        c[2] = unsigned(p0 >> 32) ^ c[3] ^ k1;
        c[3] = unsigned(p0);
        k0 += WEYL_0;
        k1 += WEYL_1;
    }
}

__global__ void keep_mask(
    const long long N,
    const unsigned long long seed,
    const unsigned layer,
    const unsigned call,
    const unsigned long long threshold,  // 0 .. 2^32
    bool* __restrict__ keep)             // [N]  out
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n * 4 >= N) return;
    unsigned c[4] = {unsigned(n), unsigned(n >> 32), layer, call};
    philox(c, unsigned(seed), unsigned(seed >> 32));
    for (int k = 0; k < 4 && n * 4 + k < N; k++) keep[n * 4 + k] = c[k] >= threshold;
}
