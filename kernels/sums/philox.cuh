// Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), bit for bit that of gpurnn/rng.py. It replaces a counter c by four
// random words, which also depend on the key.

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
