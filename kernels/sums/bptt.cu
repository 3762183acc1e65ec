// The gradient of a bias is the sum of d over all steps and sequences,
//
//     dbias[m] = sum over n < N of d[n, m],  N = T*B
//
// in a fixed order. Each sum has one owner, so two runs give equal bits. Rows are added in double, as N may be a million.
//
// Stage 1: the rows are cut into chunks. A block adds 32 columns of one chunk: 8 sums, each of every 8th row, then these in
// order.
// Stage 2: one thread for each column adds the chunks in order.
//
// The number of chunks depends on N only, so every GPU gives the same bits.

#include "../common.cuh"

template <typename T>
__global__ void sum_steps_partial(
    const long long N,
    const int M,
    const long long ld,            // distance from one row of d to the next, in elements
    const T* __restrict__ d,       // [N, M], rows ld apart
    double* __restrict__ partial)  // [chunks, M]  out; chunks = gridDim.y
{
    __shared__ double sums[8][32];
    const int m = blockIdx.x * 32 + threadIdx.x;
    const long long rows = (N + gridDim.y - 1) / gridDim.y;  // of a chunk
    const long long start = blockIdx.y * rows, stop = start + rows < N ? start + rows : N;
    double sum = 0;
    if (m < M) {
        for (long long n = start + threadIdx.y; n < stop; n += 8) sum += double(typename Compute<T>::real(d[n * ld + m]));
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && m < M) {
        for (int k = 1; k < 8; k++) sum += sums[k][threadIdx.x];
        partial[(size_t)blockIdx.y * M + m] = sum;
    }
}

template <typename real>
__global__ void sum_steps_finish(
    const int chunks,
    const int M,
    const double* __restrict__ partial,  // [chunks, M]
    real* __restrict__ sums)             // [M]  out
{
    const int m = blockIdx.x * blockDim.x + threadIdx.x;
    if (m >= M) return;
    double sum = 0;
    for (int k = 0; k < chunks; k++) sum += partial[(size_t)k * M + m];
    sums[m] = real(sum);
}
