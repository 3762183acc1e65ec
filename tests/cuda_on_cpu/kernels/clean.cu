// Small kernels that are right, each for one idiom that a careless checker would report. test_cuda_mutations.py plants
// its bugs here too.

// Two buffers, one barrier per step: a thread may run ahead of the slowest by one step and then writes the other
// buffer. One block of n threads, a ring: x[i] becomes the mean of its neighbours, `steps` times.
__global__ void smooth(int steps,
                       const float* x,  // (n,)
                       float* y) {      // (n,)  out
    __shared__ float buffers[2][64];
    const int i = threadIdx.x, n = blockDim.x;
    float mine = x[i];
    for (int t = 0; t < steps; ++t) {
        float* buffer = buffers[t % 2];
        buffer[i] = mine;
        __syncthreads();
        mine = 0.5f * (buffer[(i + 1) % n] + buffer[(i + n - 1) % n]);
    }
    y[i] = mine;
}

// Counts by atomics in shared memory, then one atomic per bin in global memory.
__global__ void histogram(int n, int bins,
                          const int* x,  // (n,)     values 0 .. bins - 1
                          int* counts) { // (bins,)  zero; out
    __shared__ int local[32];
    for (int i = threadIdx.x; i < bins; i += blockDim.x) local[i] = 0;
    __syncthreads();
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1);
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&counts[i], local[i]);
}

// Block 0 hands numbers to block 1 with a volatile flag and fences. Cooperative launch of two blocks of n threads.
__global__ void volatile_flag(const float* x,         // (n,)
                              float* box,             // (n,)  scratch
                              volatile int* flag,     // (1,)  zero
                              float* y) {             // (n,)  out
    const int i = threadIdx.x;
    if (blockIdx.x == 0) {
        box[i] = 2 * x[i];
        __syncthreads();
        if (i == 0) {
            __threadfence();  // release
            *flag = 1;
        }
    } else {
        if (i == 0) {
            while (*flag == 0) {
            }
            __threadfence();  // acquire
        }
        __syncthreads();
        y[i] = box[i] + 1;
    }
}

// Largest float by integer atomics: bits of floats >= 0 are ordered as int, those of negative ones backwards as
// unsigned.
__global__ void float_max(int n,
                          const float* x,  // (n,)
                          float* y) {      // (1,)  -infinity; out
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    if (!signbit(x[i])) {
        atomicMax(reinterpret_cast<int*>(y), __float_as_int(x[i]));
    } else {
        atomicMin(reinterpret_cast<unsigned*>(y), __float_as_uint(x[i]));
    }
}

// Threads beyond the end leave before the barrier; from Volta on the barrier waits for the others only.
__global__ void early_exit(int n,
                           const float* x,  // (n,)
                           float* y) {      // (n,)  out: the array of every block backwards
    __shared__ float tile[64];
    const int first = blockIdx.x * blockDim.x, count = min(static_cast<int>(blockDim.x), n - first);
    if (first + threadIdx.x >= n) return;
    tile[threadIdx.x] = x[first + threadIdx.x];
    __syncthreads();
    y[first + threadIdx.x] = tile[count - 1 - threadIdx.x];
}

// Lanes exchange through shared memory; shuffles and lockstep order nothing, __syncwarp() does. One warp.
__global__ void warp_reverse(const float* x,  // (32,)
                             float* y) {      // (32,)  out
    __shared__ float lanes[32];
    lanes[threadIdx.x] = x[threadIdx.x];
    __syncwarp();
    y[threadIdx.x] = lanes[31 - threadIdx.x];
}

// Four floats at once; x and y lie on 16 bytes.
__global__ void twice_float4(int n,           // a multiple of 4
                             const float* x,  // (n,)
                             float* y) {      // (n,)  out
    const int i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= n) return;
    const float4 v = *reinterpret_cast<const float4*>(&x[i]);
    *reinterpret_cast<float4*>(&y[i]) = make_float4(2 * v.x, 2 * v.y, 2 * v.z, 2 * v.w);
}

// Two of the block's warps meet at a barrier of their own.
template <int ID>
__device__ void pair_barrier() {
    asm volatile("bar.sync %0, 64;" ::"n"(ID) : "memory");
}

// Warp 0 writes, warp 1 reads; warp 2 never comes. Block of 96.
__global__ void named_barrier(const float* x,  // (32,)
                              float* y) {      // (32,)  out
    __shared__ float box[32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp == 0) {
        box[lane] = 3 * x[lane];
        pair_barrier<1>();
    } else if (warp == 1) {
        pair_barrier<1>();
        y[lane] = box[31 - lane];
    }
}
