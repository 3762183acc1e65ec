// C += A B on the tensor cores: one warp per tile of 16 x 8, operands through shared memory. Any M, N, K.
//
// Legend: A (M, K), B (K, N), C (M, N), all row-major. In a fragment: g = lane / 4 is the row of A and the column of B,
// t = lane % 4 selects columns of A and rows of B.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

constexpr int WARP = 32, ROWS = 16, COLUMNS = 8;

__device__ unsigned pair(const void* two) { return *static_cast<const unsigned*>(two); }  // two 16-bit numbers at once

// The four 8 x 8 quarters of a 16 x 16 tile of 16-bit numbers, in the order that mma wants: top left, bottom left, top
// right, bottom right. Lane l names row l % 8 of quarter l / 8.
__device__ void load_quarters(unsigned (&a)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// m16n8k8 for sm_75, which knows it for half only.
__device__ void multiply(float (&c)[4], const unsigned (&a)[2], unsigned b, __half) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

#if __CUDA_ARCH__ >= 800
__device__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], __half) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], __nv_bfloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ unsigned tf32(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

__device__ void multiply(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2], float) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Columns of A per mma.
template <typename T>
struct Depth {
    static constexpr int value = __CUDA_ARCH__ >= 800 ? 16 : 8;
};
template <>
struct Depth<float> {
    static constexpr int value = 8;
};

// One mma on the tiles in shared memory: c += a b.
template <bool LDMATRIX, typename T>
__device__ void multiply_tile(float (&c)[4], const T (&a)[ROWS][16], const T (&b)[COLUMNS][Depth<T>::value]) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
#if __CUDA_ARCH__ >= 800
    unsigned fragment[4];
    if constexpr (LDMATRIX) {
        load_quarters(fragment, &a[lane % 16][lane / 16 * 8]);
    } else {
        for (int i = 0; i < 4; ++i) fragment[i] = pair(&a[g + i % 2 * 8][2 * t + i / 2 * 8]);
    }
    const unsigned column[2] = {pair(&b[g][2 * t]), pair(&b[g][2 * t + 8])};
    multiply(c, fragment, column, T());
#else
    const unsigned fragment[2] = {pair(&a[g][2 * t]), pair(&a[g + 8][2 * t])};
    multiply(c, fragment, pair(&b[g][2 * t]), T());
#endif
}

#if __CUDA_ARCH__ >= 800
template <bool LDMATRIX>
__device__ void multiply_tile(float (&c)[4], const float (&a)[ROWS][16], const float (&b)[COLUMNS][8]) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    unsigned fragment[4];
    for (int i = 0; i < 4; ++i) fragment[i] = tf32(a[g + i % 2 * 8][t + i / 2 * 4]);
    const unsigned column[2] = {tf32(b[g][t]), tf32(b[g][t + 4])};
    multiply(c, fragment, column, 0.0f);
}
#endif

// grid (ceil(N / 8), ceil(M / 16)), block 32. T: __half, and from sm_80 __nv_bfloat16 and float (as tf32).
// LDMATRIX: fragments of A by ldmatrix instead of plain loads (16-bit types from sm_80).
template <typename T, bool LDMATRIX>
__global__ void mma_tile(int M, int N, int K,
                         const T* A,  // (M, K)
                         const T* B,  // (K, N)
                         float* C) {  // (M, N)  in and out
    constexpr int DEPTH = Depth<T>::value;
    __shared__ __align__(16) T a[ROWS][16];              // tile of A; ldmatrix wants rows on 16 bytes
    __shared__ __align__(16) T b[COLUMNS][DEPTH];        // tile of B, transposed: pairs along K lie side by side
    const int lane = threadIdx.x, row0 = blockIdx.y * ROWS, column0 = blockIdx.x * COLUMNS;

    // c[0], c[1]: row g, columns 2 t and 2 t + 1; c[2], c[3]: the same of row g + 8
    float c[4];
    for (int i = 0; i < 4; ++i) {
        const int row = row0 + lane / 4 + i / 2 * 8, column = column0 + lane % 4 * 2 + i % 2;
        c[i] = row < M && column < N ? C[row * N + column] : 0.0f;
    }
    for (int k0 = 0; k0 < K; k0 += DEPTH) {
        for (int i = lane; i < ROWS * DEPTH; i += WARP) {
            const int row = i / DEPTH, k = i % DEPTH;
            a[row][k] = row0 + row < M && k0 + k < K ? A[(row0 + row) * K + k0 + k] : T(0.0f);
        }
        for (int i = lane; i < COLUMNS * DEPTH; i += WARP) {
            const int k = i / COLUMNS, column = i % COLUMNS;
            b[column][k] = k0 + k < K && column0 + column < N ? B[(k0 + k) * N + column0 + column] : T(0.0f);
        }
        __syncwarp();
        multiply_tile<LDMATRIX>(c, a, b);
        __syncwarp();
    }
    for (int i = 0; i < 4; ++i) {
        const int row = row0 + lane / 4 + i / 2 * 8, column = column0 + lane % 4 * 2 + i % 2;
        if (row < M && column < N) C[row * N + column] = c[i];
    }
}
