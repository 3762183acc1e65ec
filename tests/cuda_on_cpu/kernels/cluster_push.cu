// A ring of numbers: in each step every block of a cluster sends its number to all blocks by asynchronous stores and adds up
// what it receives. Two slots, an mbarrier for each. sm_90 and later.
constexpr int BLOCKS = 4;

__device__ unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

__device__ unsigned in_block(unsigned address, unsigned rank) {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}

__device__ void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ void expect(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ bool ended(unsigned barrier, unsigned parity) {
    unsigned yes;
    asm volatile("{ .reg .pred over; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 over, [%1], %2; "
                 "selp.u32 %0, 1, 0, over; }"
                 : "=r"(yes) : "r"(barrier), "r"(parity) : "memory");
    return yes;
}

// grid (BLOCKS * rows), block 32: lane l sends to block l, and all lanes read.
__global__ void __cluster_dims__(BLOCKS, 1, 1) cluster_push(int steps,
                                                            const float* x,  // (rows, BLOCKS)
                                                            float* y) {      // (rows, BLOCKS)  out
    __shared__ float2 slots[2][BLOCKS];
    __shared__ unsigned long long barriers[2];
    const unsigned rank = blockIdx.x % BLOCKS, lane = threadIdx.x, to = lane % BLOCKS;
    if (lane == 0) {
        for (int k = 0; k < 2; ++k) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barriers + k)) : "memory");
            expect(shared_address(barriers + k), sizeof slots[0]);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    cluster_barrier();  // all mbarriers are there

    float number = x[blockIdx.x];
    for (int step = 0; step < steps; ++step) {
        const int slot = step % 2;
        const unsigned barrier = shared_address(barriers + slot);
        if (lane < BLOCKS) {
            asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::
                             "r"(in_block(shared_address(&slots[slot][rank]), to)), "f"(number), "f"(number + step),
                         "r"(in_block(barrier, to))
                         : "memory");
        }
        while (!ended(barrier, step / 2 % 2)) {
        }
        if (lane == 0) expect(barrier, sizeof slots[0]);
        float sum = 0;
        for (int from = 0; from < BLOCKS; ++from) sum += (from + 1) * slots[slot][from].x + slots[slot][from].y;
        number = sum / 16;
        __syncwarp();  // all lanes have read before one of them says, by sending, that they have
    }
    if (lane == 0) y[blockIdx.x] = number;
    cluster_barrier();  // nobody leaves while a peer may still write into its shared memory
}
