// What one dependent step costs on a device, piece by piece: `gpurnn bench probe`. Each kernel takes `steps` steps that
// depend on one another and returns numbers that are right only if every exchange took place. A block that waits in vain
// gives up and says so in *lost: a failed measurement, never a hang.
//
// CLUSTER: blocks of a cluster (sm_90 and later). GRID_SYNC: also compile what needs CUDA's cooperative groups header.
// ASYNC: also compile what needs the asynchronous barriers of sm_90. STORES, FENCE: also compile `stores`.

#ifdef GRID_SYNC
#include <cooperative_groups.h>
#endif

typedef unsigned long long u64;

// Polls until a block is taken for lost: seconds on a GPU. PATIENCE is lower where waiting is slow.
#ifndef PATIENCE
#define PATIENCE 20000000
#endif

// ---- words that carry their epoch: 32 bits of data, 32 bits of epoch, written and read at once

__device__ __forceinline__ void publish(u64* word, unsigned data, unsigned epoch) {
    const u64 both = (u64)data << 32 | epoch;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "l"(both) : "memory");
}

// The data of the first word seen with this epoch or a later one.
__device__ __forceinline__ unsigned await(const u64* word, unsigned epoch, int* lost) {
    u64 both = 0;
    for (int polls = 0; polls < PATIENCE; polls++) {
        asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(__cvta_generic_to_global(word)) : "memory");
        if ((unsigned)both >= epoch) return both >> 32;
    }
    atomicExch(lost, 1);
    return 0;
}

// ---- launches

extern "C" __global__ void nothing() {}

// ---- inside a block

// Every thread hands a number to its neighbour through shared memory. out [threads]: steps.
extern "C" __global__ void block_barrier(int steps, unsigned* out) {
    __shared__ unsigned box[2][1024];
    unsigned value = 0;
    for (int s = 0; s < steps; s++) {
        box[s & 1][threadIdx.x] = value + 1;
        __syncthreads();
        value = box[s & 1][(threadIdx.x + 1) % blockDim.x];
    }
    out[threadIdx.x] = value;
}

#if __CUDA_ARCH__ >= 800
// Weights from shared memory to the tensor cores: each warp loads its tiles of 16 x 16 bfloat16 (all 1) and multiplies
// them with ones. bytes: of all weights, a multiple of 512 x 4 for each warp. out [threads]: steps x tiles x 16.
// LDS: each lane reads its 16 bytes of a tile by itself, as the kernels of schedule grid do, instead of ldmatrix.
extern "C" __global__ void __launch_bounds__(256) weights_read(int steps, int bytes, float* out) {
    extern __shared__ uint4 weights[];
    const unsigned ones = 0x3f803f80, warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int k = threadIdx.x; k < bytes / 16; k += blockDim.x) weights[k] = make_uint4(ones, ones, ones, ones);
    __syncthreads();
    const int tiles = bytes / 512 / warps;  // of 512 bytes, for this warp
    float sum[4][4] = {};                   // four chains, so that no product waits for the one before
    for (int s = 0; s < steps; s++) {
        for (int tile = 0; tile < tiles; tile += 4) {
#pragma unroll
            for (int chain = 0; chain < 4; chain++) {
                unsigned a[4];
                const unsigned from = __cvta_generic_to_shared(weights + (warp * tiles + tile + chain) * 32 + lane);
#ifdef LDS
                asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                             : "r"(from)
                             : "memory");
#else
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                             : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                             : "r"(from)
                             : "memory");
#endif
                asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                             "{%8, %9}, {%0, %1, %2, %3};"
                             : "+f"(sum[chain][0]), "+f"(sum[chain][1]), "+f"(sum[chain][2]), "+f"(sum[chain][3])
                             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(ones), "r"(ones));
            }
        }
    }
    float total = 0;
    for (int chain = 0; chain < 4; chain++) total += sum[chain][0];
    out[threadIdx.x] = total;
}
#endif

// ---- from memory, by one thread

// A chain of loads that go past L1: each word is the index of the next one. chain [n]: word i holds (i + stride) % n.
// out [1]: (start + steps x stride) % n.
extern "C" __global__ void chase(int steps, unsigned start, const unsigned* chain, unsigned* out) {
    unsigned at = start;
    for (int s = 0; s < steps; s++) {
        asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];"
                     : "=r"(at)
                     : "l"(__cvta_generic_to_global(chain + at))
                     : "memory");
    }
    out[0] = at;
}

#ifdef STORES
// STORES stores of every thread, then a fence (FENCE 1) or none. words [STORES, threads]. out [threads]: steps.
extern "C" __global__ void stores(int steps, unsigned* words, unsigned* out) {
    for (int s = 0; s < steps; s++) {
#pragma unroll
        for (int k = 0; k < STORES; k++) {
            asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(
                             __cvta_generic_to_global(words + k * blockDim.x + threadIdx.x)),
                         "r"(s + 1)
                         : "memory");
        }
        if (FENCE) asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    unsigned last = steps;
    for (int k = 0; k < STORES; k++) last = min(last, words[k * blockDim.x + threadIdx.x]);
    out[threadIdx.x] = last;
}
#endif

// ---- between blocks, through L2: all blocks at once on the device (cooperative launch, one block each)
//
// The blocks stand along y: where a grid has none along y and z, CuPy takes it for one-dimensional, and shrinks a
// cooperative one that does not fit instead of refusing it.

// One word goes round: block s % blocks, which has seen step s - 1, publishes step s; all others poll it. words [1], zero.
// out [blocks]: what each block saw last, steps.
extern "C" __global__ void hop_one(int steps, u64* words, unsigned* out, int* lost) {
    unsigned data = 0;
    if (threadIdx.x) return;
    for (int s = 0; s < steps; s++) {
        if (s % gridDim.y == blockIdx.y) {
            publish(words, ++data, s + 1);
        } else {
            data = await(words, s + 1, lost);
        }
    }
    // A block may have seen a later step than it waited for, but none goes beyond the last.
    out[blockIdx.y] = await(words, steps, lost);
}

// Everybody to everybody: each block publishes a word, each thread polls one block's. words [2, blocks], zero. Two
// buffers are enough: who publishes step s + 1 has seen all of step s. out [blocks]: steps.
extern "C" __global__ void hop_all(int steps, u64* words, unsigned* out, int* lost) {
    __shared__ unsigned neighbour;
    unsigned data = 0;
    for (int s = 0; s < steps; s++) {
        u64* here = words + (s & 1) * gridDim.y;
        if (threadIdx.x == 0) publish(here + blockIdx.y, data + 1, s + 1);
        for (int block = threadIdx.x; block < gridDim.y; block += blockDim.x) {
            const unsigned seen = await(here + block, s + 1, lost);
            if (block == (blockIdx.y + 1) % gridDim.y) neighbour = seen;
        }
        __syncthreads();
        data = neighbour;
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.y] = data;
}

// A barrier of one counter: release-add, then poll with acquire. counter [1], zero. box [2, blocks] is exchanged through
// it with plain accesses. out [blocks]: steps.
extern "C" __global__ void hop_counter(int steps, unsigned* counter, unsigned* box, unsigned* out, int* lost) {
    unsigned data = 0;
    for (int s = 0; s < steps; s++) {
        unsigned* here = box + (s & 1) * gridDim.y;
        if (threadIdx.x == 0) here[blockIdx.y] = data + 1;
        __syncthreads();
        if (threadIdx.x == 0) {
            asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
            unsigned arrived = 0;
            int polls = 0;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                             : "=r"(arrived)
                             : "l"(__cvta_generic_to_global(counter))
                             : "memory");
            } while (arrived < (s + 1) * gridDim.y && ++polls < PATIENCE);
            if (arrived < (s + 1) * gridDim.y) atomicExch(lost, 1);
        }
        __syncthreads();
        data = here[(blockIdx.y + 1) % gridDim.y];
    }
    if (threadIdx.x == 0) out[blockIdx.y] = data;
}

#ifdef GRID_SYNC
// CUDA's own barrier of the whole grid. Arguments as above.
extern "C" __global__ void grid_sync(int steps, unsigned* box, unsigned* out) {
    unsigned data = 0;
    for (int s = 0; s < steps; s++) {
        unsigned* here = box + (s & 1) * gridDim.y;
        if (threadIdx.x == 0) here[blockIdx.y] = data + 1;
        cooperative_groups::this_grid().sync();
        data = here[(blockIdx.y + 1) % gridDim.y];
    }
    if (threadIdx.x == 0) out[blockIdx.y] = data;
}
#endif

// ---- between the blocks of a cluster, through their shared memory

#if defined(CLUSTER) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A shared address of this block, as the same place in block `rank` of the cluster.
__device__ __forceinline__ unsigned peer(unsigned address, unsigned rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Every block pushes `words` numbers to every block of its cluster, then the cluster meets. Dynamic shared memory:
// [2, CLUSTER, words]. out [blocks]: steps.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) cluster_push(int steps, int words, unsigned* out) {
    extern __shared__ unsigned box[];
    const unsigned rank = cluster_rank();
    unsigned data = 0;
    for (int s = 0; s < steps; s++) {
        unsigned* here = box + (s & 1) * CLUSTER * words;
        for (int k = threadIdx.x; k < words * CLUSTER; k += blockDim.x) {
            const unsigned to = peer(__cvta_generic_to_shared(here + rank * words + k / CLUSTER), k % CLUSTER);
            asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(to), "r"(data + 1) : "memory");
        }
        cluster_sync();
        data = here[(rank + 1) % CLUSTER * words + threadIdx.x % words];
    }
    cluster_sync();  // a block's shared memory lives as long as the block
    if (threadIdx.x == 0) out[blockIdx.x] = data;
}

#ifdef ASYNC
// The same, each receiver waiting for the bytes it expects at a barrier of its own: no meeting of the cluster.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) cluster_async(int steps, int words, unsigned* out, int* lost) {
    extern __shared__ unsigned box[];
    __shared__ u64 barrier[2];
    const unsigned rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int k = 0; k < 2; k++) {
            const unsigned address = __cvta_generic_to_shared(barrier + k);
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_sync();
    unsigned data = 0;
    for (int s = 0; s < steps; s++) {
        unsigned* here = box + (s & 1) * CLUSTER * words;
        const unsigned mine = __cvta_generic_to_shared(barrier + (s & 1));
        if (threadIdx.x == 0) {
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(mine), "r"(words * CLUSTER * 4)
                         : "memory");
        }
        for (int k = threadIdx.x; k < words * CLUSTER; k += blockDim.x) {
            const unsigned to = peer(__cvta_generic_to_shared(here + rank * words + k / CLUSTER), k % CLUSTER);
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                         "r"(data + 1), "r"(peer(mine, k % CLUSTER))
                         : "memory");
        }
        unsigned done = 0;
        for (int polls = 0; !done && polls < PATIENCE; polls++) {
            asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; "
                         "selp.u32 %0, 1, 0, p; }"
                         : "=r"(done)
                         : "r"(mine), "r"(s >> 1 & 1)
                         : "memory");
        }
        if (!done) atomicExch(lost, 1);
        data = here[(rank + 1) % CLUSTER * words + threadIdx.x % words];
        __syncthreads();  // all have read before anybody's next push lets the others overwrite this buffer
    }
    cluster_sync();
    if (threadIdx.x == 0) out[blockIdx.x] = data;
}
#endif
#endif
