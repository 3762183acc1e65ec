// What runs behind each launch of grid.cu: the epochs go on in device memory, where the next launch reads them. So every
// launch has the same arguments, and a CUDA graph may hold it.

#include "../common.cuh"

static const unsigned END = 1u << 31;  // a launch has fewer epochs, and so none exceeds 32 bits

// One thread block. Before an epoch would come back, all words are emptied and the epochs begin anew.
__global__ void epochs_done(
    const int count,            // epochs of the launch
    const long long size,
    unsigned* epoch,            // [1]  in, out
    unsigned long long* words)  // [size]  in, out
{
    const unsigned next = *epoch + count;
    __syncthreads();  // all threads have read it
    if (next >= END) {
        for (long long n = threadIdx.x; n < size; n += blockDim.x) words[n] = 0;
    }
    if (threadIdx.x == 0) *epoch = next < END ? next : 0;
}
