// What tensor cores multiply: fragments of matrices that a warp holds together (PTX ISA, mma.m16n8k16 and m16n8k8), from
// sm_80 on. float is multiplied as tf32, its mantissa rounded to 10 bits, or as three bfloat16 numbers.
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

struct Third {  // a bfloat16 number that is part of a float
    unsigned short bits;
};
DEVICE void mma(float (&c)[4], uint4 a, uint2 b, Third) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

#if __has_include(<cuda_bf16.h>)
DEVICE void mma(float (&c)[4], uint4 a, uint2 b, __nv_bfloat16) { mma(c, a, b, Third()); }
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
template <typename T> DEVICE void store_operands(T* to, unsigned two, int) { store_pair(to, two); }
DEVICE void store_operands(float* to, float2 two, int) { *(uint2*)to = make_uint2(tf32(two.x), tf32(two.y)); }
template <typename T> DEVICE void store_operand(T* to, T a, int) { *to = a; }
DEVICE void store_operand(float* to, float a, int) { *(unsigned*)to = tf32(a); }

// ---- strict float32: a float is the sum of three bfloat16 numbers
//
// A bfloat16 has 8 bits of a float's 24, and all of its exponents: each third is what the ones before it leave, rounded to
// nearest, and the three are exactly the float. Of the nine products of two such sums, six are computed. The other three are
// below 2^-24 of the product: a multiply-add rounds away as much. That takes as many instructions as three tf32 products of
// halves, and 6 bytes a number instead of 8. But halves of 11 bits lose up to 2^-22 of a product, several times what a
// multiply-add does, as soon as one product is much larger than the others.
//
// Tensor cores cut what they add off instead of rounding it (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA
// tensor cores, PeerJ Computer Science 7:e330, 2021). So the highest products of 16 columns are summed from zero and then added
// to `high` in float, rounded. The others, 2^-8 of these or less, have a sum of their own, `low`, the smallest first.
//
// What this does not give as multiply-adds do: a finite number above 3.396e38 counts as infinite, and of a number below 2^-102
// the thirds lack what is below 2^-126, which is flushed to zero.

DEVICE unsigned pack_thirds(float a, float b) {
    unsigned two;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(b), "f"(a));
    return two;
}

// The thirds of two neighbours, the highest first.
DEVICE void split(unsigned (&thirds)[3], float a, float b) {
#pragma unroll
    for (int p = 0; p < 3; p++) {
        thirds[p] = pack_thirds(a, b);
        a -= __uint_as_float(thirds[p] << 16);
        b -= __uint_as_float(thirds[p] & 0xffff0000u);
    }
}

// Third `part` of two neighbours.
DEVICE unsigned third(int part, float a, float b) {
    unsigned thirds[3];
    split(thirds, a, b);
    return part == 0 ? thirds[0] : part == 1 ? thirds[1] : thirds[2];
}

// One word of a fragment of a part of numbers, as `word` takes them.
template <typename T, int PARTS, typename Number> DEVICE unsigned word_of_part(int part, Number number) {
    if constexpr (PARTS == 1) return word<T>(number);
    return third(part, number(0), number(1));
}

// Fragment `part` of four neighbouring columns, from this lane's numbers of two rows.
template <int PARTS> DEVICE uint4 fragment(uint2 low, uint2 high, int) { return make_uint4(low.x, high.x, low.y, high.y); }
template <int PARTS> DEVICE uint4 fragment(float4 low, float4 high, int part) {
    if (PARTS == 3) {
        return make_uint4(third(part, low.x, low.y), third(part, high.x, high.y), third(part, low.z, low.w),
                          third(part, high.z, high.w));
    }
    if (part) return make_uint4(tf32(low.z), tf32(high.z), tf32(low.w), tf32(high.w));
    return make_uint4(tf32(low.x), tf32(high.x), tf32(low.y), tf32(high.y));
}

// Stores the thirds of two neighbours, or of one number, `apart` from one another.
DEVICE void store_operands(Third* to, float2 two, int apart) {
    unsigned thirds[3];
    split(thirds, two.x, two.y);
#pragma unroll
    for (int p = 0; p < 3; p++) *(unsigned*)(to + p * apart) = thirds[p];
}
DEVICE void store_operand(Third* to, float a, int apart) {
    unsigned thirds[3];
    split(thirds, a, 0.0f);
#pragma unroll
    for (int p = 0; p < 3; p++) to[p * apart].bits = (unsigned short)thirds[p];
}

// What numbers of type T are multiplied as, in PARTS parts.
template <typename T, int PARTS> struct Multiplied { typedef T type; };
template <> struct Multiplied<float, 3> { typedef Third type; };

// high + low += A B of the thirds of a tile and of its operand.
DEVICE void mma_thirds(float (&high)[4], float (&low)[4], const uint4 (&a)[3], const uint2 (&b)[3]) {
    float highest[4] = {};
    mma(low, a[2], b[0], Third());
    mma(low, a[0], b[2], Third());
    mma(low, a[1], b[1], Third());
    mma(low, a[1], b[0], Third());
    mma(low, a[0], b[1], Third());
    mma(highest, a[0], b[0], Third());
#pragma unroll
    for (int i = 0; i < 4; i++) high[i] += highest[i];
}

// The same with one of the two fragments of B that load_matrices gives, of thirds and of whole numbers, which have one sum.
DEVICE uint2 fragment_of(uint4 two, bool second) { return second ? make_uint2(two.z, two.w) : make_uint2(two.x, two.y); }
DEVICE void multiply(float (&high)[4], float (&low)[4], const uint4 (&a)[3], const uint4 (&b)[3], bool second, float) {
    const uint2 fragments[3] = {fragment_of(b[0], second), fragment_of(b[1], second), fragment_of(b[2], second)};
    mma_thirds(high, low, a, fragments);
}
template <typename T>
DEVICE void multiply(float (&)[4], float (&sum)[4], const uint4 (&a)[1], const uint4 (&b)[1], bool second, T) {
    mma(sum, a[0], fragment_of(b[0], second), T());
}

// The whole sum. Of an infinite number the lower thirds are NaN, and then so is `low`; `high` is what a multiply-add gives.
DEVICE float join_thirds(float high, float low) { return fabsf(low) <= 3.4028235e38f ? high + low : high; }

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
