// Products by warps that share no sums, from operands in shared memory in the order in which lanes need them: of a group of
// 16 P numbers, P in a word, lane l needs the 4 P from 4 P (l%4) on of the sequence in column l/4. These 16 bytes make two
// fragments of B (tensor.cuh). The tensor cores take them for other rows of B than they are; that is right, as the columns of A
// are in the same order.
//
//     group [KT]  x  sequence [R]  x  l%4 [4]  x  16 bytes

// ---- a lane's unit and sequences

// UNITS of a warp: 4, where lane l has unit l/4 % 4 of sequence 2 (l%4) + l/16; or 8, unit l/4 of sequences 2 (l%4) + 0, 1.
// The same in each 8 sequences.
template <int UNITS, int R>
struct WarpPosition : OneUnit {
    static_assert((UNITS == 4 || UNITS == 8) && R <= 16 && (R & (R - 1)) == 0, "see above");
    static constexpr int per_octet = UNITS / 4, per_thread = (R + 7) / 8 * per_octet;  // sequences of a lane, among 8 and all
    int j, d, longest;
    bool reversed;
    int sequence[per_thread];  // index in the batch, or -1
    int length[per_thread];    // 0 where there is none

    // unit: the first one of the thread block.
    DEVICE WarpPosition(int T_, int B, int H, int tile, int unit, int d_, int reverse, const int* lengths, const int* order)
        : j(unit + own_unit()), d(d_), longest(0), reversed(reverse >> d_ & 1) {
        for (int r = 0; r < R && tile * R + r < B; r++) {
            const int steps = lengths ? lengths[order ? order[tile * R + r] : tile * R + r] : T_;
            longest = steps > longest ? steps : longest;
        }
#pragma unroll
        for (int k = 0; k < per_thread; k++) {
            const int rank = tile * R + column(k);
            const bool valid = column(k) < R && rank < B && j < H;
            sequence[k] = !valid ? -1 : order ? order[rank] : rank;
            length[k] = !valid ? 0 : lengths ? lengths[sequence[k]] : T_;
        }
    }

    // Among the units of the block.
    DEVICE static int own_unit() { return threadIdx.x / 32 * UNITS + threadIdx.x % 32 / 4 % UNITS; }

    DEVICE static int column(int k) {
        const int lane = threadIdx.x % 32;
        return k / per_octet * 8 + lane % 4 * 2 + (UNITS == 4 ? lane / 16 : k % per_octet);
    }
};

DEVICE constexpr int units_of_warp(int Q) { return Q > 2 ? 4 : 8; }

// ---- shared memory by its address, which stays in one register

DEVICE uint4 load_shared4(unsigned from) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(from));
    return x;
}
DEVICE float load_shared(unsigned from) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(from));
    return x;
}
DEVICE void store_shared(unsigned to, unsigned word) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(word)); }
template <typename T> DEVICE void store_number(unsigned to, T x) {
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(to), "h"(*(const unsigned short*)&x));
}
DEVICE void store_number(unsigned to, float x) { store_shared(to, tf32(x)); }

// ---- numbers in the order of lanes

template <typename T, int R>
struct Operand {
    static constexpr int N = (R + 7) / 8, P = Fragment<T>::P, GROUP = 16 * P, PIECE = 4 * P;  // PIECE: numbers in 16 bytes

    // Bytes of K numbers of each sequence.
    DEVICE static constexpr int groups(int K) { return (K + GROUP - 1) / GROUP; }
    DEVICE static constexpr int size(int K) { return groups(K) * GROUP * R * (int)sizeof(T); }

    // Where number k of sequence r lies, in bytes.
    DEVICE static int place(int k, int r) {
        return ((k / GROUP * R + r) * 4 + k % GROUP / PIECE) * 16 + k % PIECE * (int)sizeof(T);
    }

    // The number of a group that is the first one in word w of this lane's part of the first (part 0) or the second fragment.
    DEVICE static int number(int part, int w) { return threadIdx.x % 4 * PIECE + (part * 2 + w) * P; }

    // sums[m][n][0] = the product of tiles of weights, MT for each fragment of B, and the operand of KT groups at an address.
    template <int MT, int KT, int CHAINS, typename Weights>
    DEVICE static void multiply(float (&sums)[MT][N][CHAINS][4], const Weights& weights, unsigned operand) {
        const int lane = threadIdx.x % 32;
        operand += lane * 16;
#pragma unroll
        for (int i = 0; i < MT * N * CHAINS * 4; i++) (&sums[0][0][0][0])[i] = 0.0f;
#pragma unroll
        for (int group = 0; group < KT; group++) {
            uint4 b[N];
#pragma unroll
            for (int n = 0; n < N; n++) {  // a column that is no sequence adds to sums that nobody uses
                b[n] = make_uint4(0, 0, 0, 0);
                if (R >= 8 || lane / 4 < R) b[n] = load_shared4(operand + (group * R + n * 8) * 64);
            }
#pragma unroll
            for (int part = 0; part < 2; part++) {
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    const uint4 a = weights.get((group * MT + m) * 2 + part);
#pragma unroll
                    for (int n = 0; n < N; n++) {
                        const uint2 half = part ? make_uint2(b[n].z, b[n].w) : make_uint2(b[n].x, b[n].y);
                        mma(sums[m][n][(group * 2 + part) % CHAINS], a, half, T());
                    }
                }
            }
        }
#pragma unroll
        for (int i = 0; i < MT * N; i++) {
            float(&all)[CHAINS][4] = sums[i / N][i % N];
#pragma unroll
            for (int k = 1; k < CHAINS; k++) {
#pragma unroll
                for (int e = 0; e < 4; e++) all[0][e] += all[k][e];
            }
        }
    }

    // The lane's part of a tile: rows l/4 and l/4 + 8 in both words of a fragment. four(row, n): for the 4 numbers of a group
    // from n on.
    template <typename Four>
    DEVICE static uint4 tile_of_fours(int part, Four four) {
        const int row = threadIdx.x % 32 / 4, n = P == 2 ? number(part, 0) : number(0, 0);
        return fragment<1>(four(row, n), four(row + 8, n), part);
    }

    // The same from single weights: weight(row, n).
    template <typename Weight>
    DEVICE static uint4 tile_of(int part, Weight weight) {
        const int row = threadIdx.x % 32 / 4;
        auto fragment_word = [&](int row, int w) {
            return word<T>([&](int i) { return weight(row, number(part, w) + i); });
        };
        return make_uint4(fragment_word(row, 0), fragment_word(row + 8, 0), fragment_word(row, 1), fragment_word(row + 8, 1));
    }
};

// Independent sums of one product, to hide latency.
DEVICE constexpr int chains_of(int accumulators) { return accumulators == 1 ? 4 : accumulators < 4 ? 2 : 1; }

// ---- neighbouring units in one lane

// This lane's number in a word, with its neighbour's where it has 16 bits: units 2 i and 2 i + 1 are in lanes l and l ^ 4.
template <typename T>
DEVICE unsigned word_of_units(T x) {
    const unsigned both = pack(x, x), other = __shfl_xor_sync(0xffffffffu, both, 4);
    return threadIdx.x & 4 ? __byte_perm(other, both, 0x5410) : __byte_perm(both, other, 0x5410);
}
DEVICE unsigned word_of_units(float x) { return tf32(x); }

// words: of 4 or 8 neighbouring units, the same in the lanes that have them.
template <int WORDS, typename T>
DEVICE void gather_units(unsigned (&words)[WORDS], T x) {
    words[0] = word_of_units(x);
#pragma unroll
    for (int known = 1; known < WORDS; known *= 2) {
        const int distance = known * 4 * Fragment<T>::P;  // in lanes; a unit has 4
        const bool upper = threadIdx.x & distance;
#pragma unroll
        for (int i = 0; i < known; i++) {
            const unsigned other = __shfl_xor_sync(0xffffffffu, words[i], distance);
            words[known + i] = upper ? words[i] : other;
            words[i] = upper ? other : words[i];
        }
    }
}
