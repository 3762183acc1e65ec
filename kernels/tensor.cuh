// What tensor cores take and give: fragments of 16-bit matrices, one warp together (PTX ISA, mma.m16n8k16). sm_80 and later.
//
//     A (16 x 16, uint4)   B (16 x 8, uint2)   C (16 x 8, float[4]):  C += A B
//
// Lane l holds of A rows l/4 and l/4 + 8, columns 2 (l%4) + 0, 1 and 8 more on; of B the same columns' rows, column l/4; of
// C rows l/4 (0, 1) and l/4 + 8 (2, 3), columns 2 (l%4) + 0, 1.

DEVICE void mma(float (&c)[4], uint4 a, uint2 b, __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

DEVICE void mma(float (&c)[4], uint4 a, uint2 b, __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y));
}

// Four 8 x 8 matrices from shared memory; lane l names row l%8 of matrix l/8, 16 bytes. Of B stored column by column, two
// fragments side by side: (x, y) and (z, w).
DEVICE uint4 load_matrices(const void* row) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                 : "r"((unsigned)__cvta_generic_to_shared(row))
                 : "memory");
    return m;
}

// Two 16-bit numbers in one word, the first below.
DEVICE unsigned pack(__half a, __half b) { return __half_as_ushort(a) | (unsigned)__half_as_ushort(b) << 16; }
DEVICE unsigned pack(__nv_bfloat16 a, __nv_bfloat16 b) {
    return __bfloat16_as_ushort(a) | (unsigned)__bfloat16_as_ushort(b) << 16;
}
DEVICE float2 unpack(unsigned two, __half) {
    return make_float2(__half2float(__ushort_as_half(two & 0xffff)), __half2float(__ushort_as_half(two >> 16)));
}
DEVICE float2 unpack(unsigned two, __nv_bfloat16) {
    return make_float2(__uint_as_float(two << 16), __uint_as_float(two & 0xffff0000u));
}
