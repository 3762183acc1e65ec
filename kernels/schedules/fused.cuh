// The product of a tile in a timestep of schedule `fused`: fused.cu says what is multiplied.
//
// The C thread blocks of a cluster share a tile. Each multiplies a C-th of the panels, and then adds up all of their sums for a
// C-th of the sequences, whose cells it computes.

#include "panels.cuh"

constexpr int THREADS = 256, WARPS = THREADS / 32;

// ---- one launch after another (PTX ISA, griddepcontrol), from sm_90 on
//
// The launch of a timestep may begin while the one before it still runs. Until this returns, only what no timestep writes may be
// read: the weights. It returns when the launch before has ended and what it wrote is seen.
DEVICE void wait_for_launch_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- the blocks of a cluster, along y. A cluster of one block needs no GPU that has clusters.

#if __CUDA_ARCH__ >= 900
#define __in_clusters__(C) __cluster_dims__(1, C, 1)
#else
#define __in_clusters__(C)
#endif

template <int C>
DEVICE void meet() {
    if constexpr (C == 1) __syncthreads();
    else {
        asm volatile("barrier.cluster.arrive.release;" ::: "memory");
        asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    }
}

// What lies at the same place of shared memory in block `rank`.
template <int C>
DEVICE float load_of(const float* place, unsigned rank) {
    if constexpr (C == 1) return *place;
    unsigned address = (unsigned)__cvta_generic_to_shared(place);
    asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank));
    float x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address));  // the order of `meet`, and no other
    return x;
}

// How many warps lie along the rows of a tile of `m` x `n` fragments of 16 and of 8: so that they load the least. 0: they cannot.
DEVICE constexpr int warps_along_rows(int m, int n) {
    int best = 0, least = 0;
    for (int along = 1; along <= WARPS; along *= 2) {
        if (m % along || n % (WARPS / along)) continue;
        const int loads = 2 * (m / along) + n / (WARPS / along);
        if (!best || loads < least) best = along, least = loads;
    }
    return best;
}

// ---- ROWS rows of weights times R sequences
//
// A stage of shared memory holds a panel of the weights and one of the sequences. STAGES of them are filled in turn, all but one
// ahead of the product.

template <typename T, int ROWS, int R, int C, int STAGES, int PARTS>
struct TileProduct {
    static constexpr int weight_bytes = ROWS * 128, vector_bytes = R * 128;  // of a part
    static constexpr int stage_bytes = PARTS * (weight_bytes + vector_bytes);
    static constexpr int M_TILES = ROWS / 16, WARPS_M = warps_along_rows(M_TILES, R / 8);
    static constexpr int WARPS_N = WARPS / WARPS_M, M = M_TILES / WARPS_M, N = R / 8 / WARPS_N;
    static constexpr int stride = ROWS + 4;  // of sums: four floats avoid bank conflicts
    static_assert(ROWS % 16 == 0 && R % C == 0 && STAGES > 1, "every warp has whole tiles");

    char* memory;                // shared: [STAGES, stage_bytes]; then the sums, float [R, stride]
    const char *weights, *vectors;  // the tile's rows in the first panel; the launch before this one writes the vectors
    size_t weight_rows, vector_rows;  // bytes of a part of a panel
    int first, count;            // panels of this block
    float sums[M][N][4], high[M][N][4];

    // rows: of all weights, of all vectors; row: the first ones of this tile.
    DEVICE TileProduct(void* memory_, const char* weights_, const char* vectors_, int panels, int rank, int weight_rows_,
                       int weight_row, int vector_rows_, int vector_row)
        : memory((char*)memory_), weights(weights_ + (size_t)weight_row * 128),
          vectors(vectors_ + (size_t)vector_row * 128), weight_rows((size_t)weight_rows_ * 128),
          vector_rows((size_t)vector_rows_ * 128), first(panels * rank / C), count(panels * (rank + 1) / C - first) {}

    template <int BYTES>
    DEVICE static void copy(char* to, const char* from) {
        const unsigned shared = (unsigned)__cvta_generic_to_shared(to);
#pragma unroll
        for (int i = 0; i < (BYTES + THREADS * 16 - 1) / (THREADS * 16); i++) {
            const int at = (i * THREADS + threadIdx.x) * 16;
            if (BYTES % (THREADS * 16) == 0 || at < BYTES) copy_async(shared + at, from + at);
        }
    }

    DEVICE char* stage(int k) const { return memory + k % STAGES * stage_bytes; }
    DEVICE void copy_weights(int k) const {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            copy<weight_bytes>(stage(k) + p * weight_bytes, weights + ((first + k) * PARTS + p) * weight_rows);
        }
    }
    DEVICE void copy_vectors(int k) const {
#pragma unroll
        for (int p = 0; p < PARTS; p++) {
            copy<vector_bytes>(stage(k) + PARTS * weight_bytes + p * vector_bytes,
                               vectors + ((first + k) * PARTS + p) * vector_rows);
        }
    }

    // Multiplies and leaves the sums in shared memory. `meanwhile` is called before the launch before this one has ended.
    template <typename Meanwhile>
    DEVICE void run(Meanwhile meanwhile) {
#pragma unroll
        for (int i = 0; i < M * N * 4; i++) (&sums[0][0][0])[i] = (&high[0][0][0])[i] = 0.0f;
#pragma unroll
        for (int k = 0; k < STAGES - 1; k++) {
            if (k < count) copy_weights(k);
        }
        meanwhile();
        wait_for_launch_before();
        let_next_launch_begin();
#pragma unroll
        for (int k = 0; k < STAGES - 1; k++) {
            if (k < count) copy_vectors(k);
            copies_are_a_group();
        }
#pragma unroll 1
        for (int k = 0; k < count; k++) {
            wait_for_copies<STAGES - 2>();
            __syncthreads();  // all copies of stage k are there, and all warps have read the stage before it
            if (k + STAGES - 1 < count) {
                copy_weights(k + STAGES - 1);
                copy_vectors(k + STAGES - 1);
            }
            copies_are_a_group();
            multiply_stage(stage(k));
        }
        wait_for_copies<0>();
        __syncthreads();
        store_sums();
        meet<C>();  // all sums are there
    }

    DEVICE static uint4 load(const char* rows, int row, int piece) {
        return load_matrices(rows + row * 128 + (piece ^ row % 8) * 16);
    }

    // A panel has four fragments of 32 bytes of columns. Of thirds both halves at once take more registers than there are.
    DEVICE void multiply_stage(const char* from) {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
        const int m0 = warp % WARPS_M * M * 16 + lane % 16, n0 = warp / WARPS_M * N * 8 + lane % 8;
#pragma unroll(PARTS == 3 ? 1 : 2)
        for (int half = 0; half < 2; half++) {
            uint4 vector[N][PARTS];
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int p = 0; p < PARTS; p++) {
                    vector[n][p] = load(from + PARTS * weight_bytes + p * vector_bytes, n0 + n * 8, half * 4 + lane / 8);
                }
            }
#pragma unroll
            for (int second = 0; second < 2; second++) {
#pragma unroll
                for (int m = 0; m < M; m++) {
                    uint4 weight[PARTS];
#pragma unroll
                    for (int p = 0; p < PARTS; p++) {
                        weight[p] = load(from + p * weight_bytes, m0 + m * 16, half * 4 + second * 2 + lane / 16);
                    }
#pragma unroll
                    for (int n = 0; n < N; n++) multiply(high[m][n], sums[m][n], weight, vector[n], second, T());
                }
            }
        }
    }

    DEVICE void store_sums() const {
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
        for (int m = 0; m < M; m++) {
#pragma unroll
            for (int n = 0; n < N; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = (warp % WARPS_M * M + m) * 16 + lane / 4 + i / 2 * 8;
                    const int sequence = (warp / WARPS_M * N + n) * 8 + lane % 4 * 2 + i % 2;
                    const float sum = PARTS == 3 ? join_thirds(high[m][n][i], sums[m][n][i]) : sums[m][n][i];
                    ((float*)memory)[sequence * stride + row] = sum;
                }
            }
        }
    }

    // A block stays while others read its sums.
    DEVICE void leave() const {
        if (C > 1) meet<C>();
    }

    // The whole product of a row with a sequence of the tile.
    DEVICE float sum(int row, int sequence) const {
        float total = 0.0f;
#pragma unroll
        for (int rank = 0; rank < C; rank++) total += load_of<C>((float*)memory + sequence * stride + row, rank);
        return total;
    }
};
