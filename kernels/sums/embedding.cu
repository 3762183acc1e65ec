// The gradient of an embedding table: grad[ids[n]] += d[n], in a fixed order.
//
// The host sorts the ids (stably), so that equal ids form runs. Each thread has one feature. A block takes a chunk of CHUNK
// sorted ids and adds up each run in order. A run inside one chunk is added to the table at once. A run that crosses a
// border leaves its pieces in `partial`; the second kernel's thread for the chunk in which the run begins adds them in
// order. So every sum has one owner, however frequent an id is. Sums are in double.

#include "../common.cuh"

static const int CHUNK = 64;

// Whether the sorted ids n - 1 and n are equal.
DEVICE bool joined(const long long* ids, long long n) { return ids[n - 1] == ids[n]; }

template <typename T>
__global__ void embedding_chunks(
    const long long N,
    const int H,
    const long long* __restrict__ ids,    // [N]  sorted
    const long long* __restrict__ order,  // [N]  which row of d each sorted id belongs to
    const T* __restrict__ d,              // [N, H]
    double* __restrict__ partial,         // [chunks, 2, H]  out: the runs at the start and at the end of a chunk
    typename Compute<T>::real* __restrict__ grad)  // [V, H]  in, out
{
    const int j = blockIdx.y * blockDim.x + threadIdx.x;
    if (j >= H) return;
    const long long chunk = blockIdx.x, start = chunk * CHUNK, stop = start + CHUNK < N ? start + CHUNK : N;
    double sum = 0;
    bool from_before = start > 0 && joined(ids, start);
    int slot = 0;
    for (long long n = start; n < stop; n++) {
        sum += double(typename Compute<T>::real(d[order[n] * H + j]));
        const bool last = n + 1 == stop, goes_on = n + 1 < N && joined(ids, n + 1);
        if (goes_on && !last) continue;
        if (from_before || (last && goes_on)) {
            partial[(chunk * 2 + slot) * H + j] = sum;
        } else {
            grad[ids[n] * H + j] += typename Compute<T>::real(sum);
        }
        sum = 0;
        from_before = false;
        slot = 1;
    }
}

// The runs that cross borders. blockIdx.x is the chunk in which a run begins.
template <typename real>
__global__ void embedding_borders(
    const long long N,
    const int H,
    const long long* __restrict__ ids,   // [N]  sorted
    const double* __restrict__ partial,  // [chunks, 2, H]
    real* __restrict__ grad)             // [V, H]  in, out
{
    const int j = blockIdx.y * blockDim.x + threadIdx.x;
    if (j >= H) return;
    long long chunk = blockIdx.x;
    const long long start = chunk * CHUNK, border = start + CHUNK;
    if (border >= N || !joined(ids, border)) return;  // the last run ends with the chunk
    const long long id = ids[border];
    const bool whole = ids[start] == id;              // the chunk is all one run
    if (whole && start > 0 && joined(ids, start)) return;  // it began earlier
    double sum = partial[(chunk * 2 + !whole) * H + j];
    for (chunk++; chunk * CHUNK < N && ids[chunk * CHUNK] == id; chunk++) sum += partial[chunk * 2 * H + j];
    grad[id * H + j] += real(sum);
}
