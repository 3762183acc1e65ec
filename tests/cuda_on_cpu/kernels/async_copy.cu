// y = A x, with tiles of A copied asynchronously into two buffers: one tile travels while the other is used.
// sm_80 and later.
//
// Legend: A (M, K) row-major. Any M, K.
constexpr int ROWS = 16, TILE = 16, THREADS = 64;

// BYTES from global to shared memory; zeros where `inside` is false.
template <int BYTES>
__device__ void copy_async(float* to, const float* from, bool inside) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(
                     static_cast<unsigned>(__cvta_generic_to_shared(to))),
                 "l"(__cvta_generic_to_global(from)), "n"(BYTES), "r"(inside ? BYTES : 0)
                 : "memory");
}

__device__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are still on their way.
template <int PENDING>
__device__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// grid ceil(M / ROWS), block THREADS. WIDTH: floats per copy, 4 where K is a multiple of 4, else 1.
template <int WIDTH>
__global__ void async_copy(int M, int K,
                           const float* A,  // (M, K)
                           const float* x,  // (K,)
                           float* y) {      // (M,)  out
    __shared__ __align__(16) float tiles[2][ROWS][TILE];
    __shared__ float quarters[4][ROWS];
    const int row0 = blockIdx.x * ROWS, count = (K + TILE - 1) / TILE;

    auto load = [&](int tile) {
        for (int i = threadIdx.x; i < ROWS * TILE / WIDTH; i += THREADS) {
            const int row = i * WIDTH / TILE, k = i * WIDTH % TILE;
            const bool inside = row0 + row < M && tile * TILE + k < K;
            const float* from = inside ? A + (row0 + row) * K + tile * TILE + k : A;
            copy_async<WIDTH * sizeof(float)>(&tiles[tile % 2][row][k], from, inside);
        }
    };

    const int row = threadIdx.x % ROWS, quarter = threadIdx.x / ROWS;  // four threads share a row of the tile
    float sum = 0;
    load(0);
    copy_commit();
    for (int tile = 0; tile < count; ++tile) {
        if (tile + 1 < count) load(tile + 1);
        copy_commit();  // in the last round an empty group, so that the count of groups below stays right
        copy_wait<1>();
        __syncthreads();
        for (int k = quarter * TILE / 4; k < (quarter + 1) * TILE / 4; ++k) {
            if (tile * TILE + k < K) sum += tiles[tile % 2][row][k] * x[tile * TILE + k];
        }
        __syncthreads();  // the next load overwrites this tile
    }
    quarters[quarter][row] = sum;
    __syncthreads();
    if (quarter == 0 && row0 + row < M) {
        y[row0 + row] = quarters[0][row] + quarters[1][row] + quarters[2][row] + quarters[3][row];
    }
}
