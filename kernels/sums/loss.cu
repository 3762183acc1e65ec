// Softmax cross-entropy over rows of logits z, with label smoothing s:
//
//     highest = max z,   total = sum exp(z - highest)
//     loss = log(total) - (1 - s) (z[label] - highest) - s mean(z - highest)
//     dz = scale (exp(z - highest) / total - (1 - s) [v = label] - s / V)
//
// Only the rows that count are visited. A block of THREADS computes one row: forward reads it twice (the second time from
// cache), backward once. Sums over V are in double and in a fixed order, first within each thread, then by a tree.

#include "../common.cuh"

static const int THREADS = 128;

template <typename real>
__global__ void cross_entropy_forward(
    const int V,
    const real smoothing,
    const real* __restrict__ logits,       // [N, V]
    const long long* __restrict__ rows,    // [count]  which of the N rows count; or null for all. count = gridDim.x
    const long long* __restrict__ labels,  // [count]  0 .. V - 1
    double* __restrict__ losses,           // [count]  out
    real* __restrict__ highest,            // [count]  out
    double* __restrict__ total)            // [count]  out
{
    __shared__ real most[THREADS];
    __shared__ double sums[THREADS], shifts[THREADS];
    const long long k = blockIdx.x;
    const int t = threadIdx.x;
    const real* z = logits + (rows ? rows[k] : k) * V;
    real high = z[0];
    for (int v = t; v < V; v += THREADS) high = larger(z[v], high);
    most[t] = high;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (t < half) most[t] = larger(most[t + half], most[t]);
        __syncthreads();
    }
    high = most[0];
    double sum = 0, shift = 0;
    for (int v = t; v < V; v += THREADS) {
        const real x = z[v] - high;
        sum += double(exp(x));
        shift += double(x);
    }
    sums[t] = sum;
    shifts[t] = shift;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (t < half) {
            sums[t] += sums[t + half];
            shifts[t] += shifts[t + half];
        }
        __syncthreads();
    }
    if (t == 0) {
        double log_odds = double(z[labels[k]] - high);
        if (smoothing != real(0)) log_odds = (1 - double(smoothing)) * log_odds + double(smoothing) * (shifts[0] / V);
        losses[k] = log(sums[0]) - log_odds;
        highest[k] = high;
        total[k] = sums[0];
    }
}

template <typename real>
__global__ void cross_entropy_backward(
    const int V,
    const real smoothing,
    const real* logits,                    // [N, V]
    const long long* __restrict__ rows,    // [count]  or null for all
    const long long* __restrict__ labels,  // [count]
    const real* __restrict__ highest,      // [count]
    const double* __restrict__ total,      // [count]
    const real* __restrict__ scale,        // [N]  the gradient with respect to each row's loss
    real* dlogits)                         // [N, V]  out: the rows that count; may be logits
{
    const long long k = blockIdx.x, n = rows ? rows[k] : k;
    const real* z = logits + n * V;
    const real dloss = scale[n], factor = real(double(dloss) / total[k]), spread = dloss * (smoothing / V);
    for (int v = threadIdx.x; v < V; v += THREADS) {
        real d = exp(z[v] - highest[k]) * factor;
        if (smoothing != real(0)) d -= spread;
        if (v == labels[k]) d -= dloss * (real(1) - smoothing);
        dlogits[n * V + v] = d;
    }
}
