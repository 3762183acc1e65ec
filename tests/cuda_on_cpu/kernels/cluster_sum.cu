// Every row minus its mean: a cluster of four blocks shares a row and exchanges partial sums through distributed shared
// memory. sm_90 and later.
constexpr int BLOCKS = 4, THREADS = 64;

// All threads of the cluster wait here; what they wrote before, shared memory included, is seen behind it.
__device__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// The float that block `rank` of the cluster keeps at the place where this block keeps `own`.
__device__ float peer(const float* own, unsigned rank) {
    unsigned address;
    float x;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(static_cast<unsigned>(__cvta_generic_to_shared(own))), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
    return x;
}

// grid (BLOCKS * rows), block THREADS.
__global__ void __cluster_dims__(BLOCKS, 1, 1) cluster_sum(int n,
                                                           const float* x,  // (rows, n)
                                                           float* y) {      // (rows, n)  out
    __shared__ float sums[THREADS];
    __shared__ float partial;
    const int row = blockIdx.x / BLOCKS, first = cluster_rank() * THREADS + threadIdx.x;

    float sum = 0;
    for (int i = first; i < n; i += BLOCKS * THREADS) sum += x[row * n + i];
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        sum = 0;
        for (int i = 0; i < THREADS; ++i) sum += sums[i];
        partial = sum;
    }
    cluster_barrier();  // the partial sums are complete

    sum = 0;
    for (unsigned rank = 0; rank < BLOCKS; ++rank) sum += peer(&partial, rank);
    for (int i = first; i < n; i += BLOCKS * THREADS) y[row * n + i] = x[row * n + i] - sum / n;
    cluster_barrier();  // nobody leaves while a peer may still read its shared memory
}
