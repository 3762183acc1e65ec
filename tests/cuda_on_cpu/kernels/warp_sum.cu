// Sums: by a warp, by a block, by the whole grid. Fixed order, one owner per output, no float atomics.

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffff;

// The sum over the warp, in every lane.
__device__ float warp_sum_all(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL, x, offset);
    return x;
}

// The sum over the warp, in lane 0.
__device__ float warp_sum(float x) {
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_down_sync(ALL, x, offset);
    return x;
}

// The sum over the block, in thread 0. The block is whole warps. Before a second call the block must meet a barrier.
__device__ float block_sum(float x) {
    __shared__ float partial[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    x = warp_sum(x);
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    if (warp == 0) x = warp_sum(lane < blockDim.x / WARP ? partial[lane] : 0.0f);
    return x;
}

// One warp per row. grid ceil(rows / warps of a block).
__global__ void row_sum_warp(int rows, int n,
                             const float* x,  // (rows, n)
                             float* y) {      // (rows,)  out
    const int lane = threadIdx.x % WARP, row = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (row >= rows) return;  // whole warps leave
    float sum = 0;
    for (int i = lane; i < n; i += WARP) sum += x[row * n + i];
    sum = warp_sum_all(sum);
    if (lane == 0) y[row] = sum;
}

// One block per row. grid rows.
__global__ void row_sum_block(int n,
                              const float* x,  // (rows, n)
                              float* y) {      // (rows,)  out
    float sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += x[blockIdx.x * n + i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) y[blockIdx.x] = sum;
}

// The whole grid sums one array: every block leaves its part in global memory, and the block that arrives last adds
// the parts, in an order that does not depend on which one that is. The ticket is a relaxed atomic: the fence before it
// releases this block's part, the fence behind it acquires the parts of all others.
__global__ void grid_sum(int n,
                         const float* x,       // (n,)
                         float* part,          // (blocks,)  scratch
                         unsigned* tickets,    // (1,)       zero
                         float* y) {           // (1,)       out
    __shared__ bool last;
    float sum = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = sum;
        __threadfence();  // release
        last = atomicAdd(tickets, 1) == gridDim.x - 1;
        __threadfence();  // acquire
    }
    __syncthreads();
    if (!last) return;

    sum = 0;
    for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) sum += part[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *y = sum;
}
