// Persistent tanh RNN: one launch walks all T steps; every block keeps its rows of W_hh in shared memory and the blocks
// exchange h through global memory.
//
//   h[t + 1] = tanh(ax[t] + h[t] W^T)
//
// Legend: T timesteps, B batch, H hidden size. Cooperative launch: all blocks must be resident, or the barrier hangs.

// All threads of the grid wait here. *counter counts the arrivals of blocks and starts at zero; it never falls, so
// that a late reader of one round cannot miss its target. Release and acquire carry the writes of all threads of a
// block, because __syncthreads() orders them before thread 0's arrival.
__device__ void grid_barrier(unsigned* counter, unsigned round) {
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
        const unsigned target = (round + 1) * gridDim.x;
        unsigned arrived;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                         : "=r"(arrived)
                         : "l"(__cvta_generic_to_global(counter))
                         : "memory");
        } while (arrived < target);
    }
    __syncthreads();
}

// grid ceil(H / units), block any; dynamic shared memory (units + B) * H floats.
__global__ void rnn_persistent(int T, int B, int H,
                               int units,            // hidden units of a block
                               const float* ax,      // (T, B, H)      W_ih x + biases
                               const float* weight,  // (H, H)         W_hh
                               float* h,             // (T + 1, B, H)  slot 0: initial state, the others: out
                               unsigned* counter) {  // (1,)           zero
    extern __shared__ float shared[];
    float* rows = shared;             // (units, H)  this block's rows of W_hh
    float* state = rows + units * H;  // (B, H)      h[t]

    const int first = blockIdx.x * units;
    const int owned = min(units, H - first);
    for (int i = threadIdx.x; i < owned * H; i += blockDim.x) rows[i] = weight[first * H + i];

    for (int t = 0; t < T; ++t) {
        const float* h_old = h + t * B * H;
        float* h_new = h + (t + 1) * B * H;
        for (int i = threadIdx.x; i < B * H; i += blockDim.x) state[i] = h_old[i];
        __syncthreads();

        for (int i = threadIdx.x; i < B * owned; i += blockDim.x) {
            const int b = i / owned, unit = i % owned;
            float sum = 0;
            for (int k = 0; k < H; ++k) sum += rows[unit * H + k] * state[b * H + k];
            h_new[b * H + first + unit] = tanhf(ax[(t * B + b) * H + first + unit] + sum);
        }
        grid_barrier(counter, t);
    }
}
