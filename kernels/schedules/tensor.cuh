// What tensor cores multiply: fragments of matrices that a warp holds together (PTX ISA, mma.m16n8k16 and m16n8k8), from
// sm_80 on. float is multiplied as tf32, its mantissa rounded to 10 bits.
//
//     A (16 x K, uint4)   B (K x 8, uint2)   C (16 x 8, float[4]):  C += A B,   K = 16, for tf32 8
//
// A word holds P neighbouring numbers, 2 of 16 bits or 1 of tf32. Lane l holds
//     of A  rows l/4 and l/4 + 8, the P columns from P (l%4) on and those K/2 further on
//     of B  column l/4, the rows that have the numbers of these columns
//     of C  rows l/4 (elements 0, 1) and l/4 + 8 (elements 2, 3), columns 2 (l%4) + 0, 1

template <typename T>
struct Fragment {
    static constexpr int K = 32 / sizeof(T), P = 4 / sizeof(T);
    static constexpr int row = 16 / sizeof(T);  // numbers in a row of an 8 x 8 matrix as load_matrices takes it
};

#if __has_include(<cuda_fp16.h>)
DEVICE void mma(float (&c)[4], uint4 a, uint2 b, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
#endif

#if __has_include(<cuda_bf16.h>)
DEVICE void mma(float (&c)[4], uint4 a, uint2 b, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}
#endif

DEVICE void mma(float (&c)[4], uint4 a, uint2 b, float) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Loads four matrices from shared memory, 8 x 8 of 16-bit or 8 x 4 of 32-bit numbers. Lane l gives the address of row l%8 of
// matrix l/8, 16 bytes. If B is stored column by column, these are two neighbouring fragments: (x, y) and (z, w).
DEVICE uint4 load_matrices(const void* row) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
    return m;
}

// ---- operands

DEVICE unsigned tf32(float x) {  // to nearest, ties away from zero
    unsigned word;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
    return word;
}

// One word of a fragment, from the functions number(0) and, for 16 bits, number(1), or from neighbours in memory.
template <typename T, typename Number> DEVICE unsigned word(Number number) {
    if constexpr (sizeof(T) == 2) return pack(number(0), number(1));
    else return tf32(number(0));
}
template <typename T> DEVICE unsigned load_word(const T* from) { return *(const unsigned*)from; }
DEVICE unsigned load_word(const float* from) { return tf32(*from); }

// Store operands where load_matrices will read them: two neighbours, or one.
template <typename T> DEVICE void store_operands(T* to, unsigned two) { store_pair(to, two); }
DEVICE void store_operands(float* to, float2 two) { *(uint2*)to = make_uint2(tf32(two.x), tf32(two.y)); }
template <typename T> DEVICE void store_operand(T* to, T a) { *to = a; }
DEVICE void store_operand(float* to, float a) { *(unsigned*)to = tf32(a); }

// ---- a warp's weights: TILES fragments, HELD of them in registers, the same in every step

template <int TILES, int HELD, int THREADS>
struct Fragments {
    uint4 registers[HELD > 0 ? HELD : 1];
    uint4* shared;  // [TILES - HELD, THREADS]

    // fetch(tile) returns this lane's part of a tile. Weights pass through `staging` [8, THREADS] on their way into
    // registers; Weights::load in tile.cuh says why. `staging` may overlap anything that is written after this returns.
    template <typename Fetch>
    DEVICE void load(uint4* staging, uint4* memory, Fetch fetch) {
        staging += threadIdx.x;
#pragma unroll
        for (int from = 0; from < HELD; from += 8) {
            const int count = HELD - from < 8 ? HELD - from : 8;
#pragma unroll 2
            for (int k = 0; k < count; k++) staging[k * THREADS] = fetch(from + k);
#pragma unroll
            for (int k = 0; k < count; k++) registers[from + k] = staging[k * THREADS];
        }
        __syncthreads();
        shared = memory + threadIdx.x;
#pragma unroll 1
        for (int k = 0; k < TILES - HELD; k++) shared[k * THREADS] = fetch(HELD + k);
    }

    DEVICE uint4 get(int tile) const { return tile < HELD ? registers[tile] : shared[(tile - HELD) * THREADS]; }
};
