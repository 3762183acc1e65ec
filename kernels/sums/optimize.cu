// The optimisers' update, one launch over the flat buffer, and the clipping of the global norm.
//
// The arithmetic is that of gpurnn/optim/, operation by operation and rounded after each, so that both give the same bits
// (except for float numbers that CuPy's -ftz=true flushes to zero). This is why there are mul, add, ...: the compiler must
// not fuse a multiplication with an addition. update.cuh explains the scalars; they lie in device memory, because a CUDA
// graph freezes every argument and they change from update to update.
//
// All arrays have N elements, unless they say otherwise.

#include "../common.cuh"

DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE double mul(double a, double b) { return __dmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE double add(double a, double b) { return __dadd_rn(a, b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
DEVICE double quotient(double a, double b) { return __ddiv_rn(a, b); }
DEVICE float root(float a) { return __fsqrt_rn(a); }
DEVICE double root(double a) { return __dsqrt_rn(a); }

template <typename real>
DEVICE real subtract(real a, real b) {
    return add(a, -b);
}

#include "update.cuh"

// ---- optimisers

template <typename real>
__global__ void sgd(
    const long long N,
    const real* __restrict__ by,         // [6]  first, nesterov, lr, momentum, undamped, weight_decay
    const int* __restrict__ go,          // [1]  0: nothing changes; or null
    const real* __restrict__ grads,
    real* __restrict__ params,           // in, out
    real* __restrict__ momentum_buffer)  // in, out; or null without momentum
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N || (go && !*go)) return;
    const Sgd<real> rule = {by[0] != real(0), by[1] != real(0), momentum_buffer != nullptr, by[5] != real(0), by[2], by[3], by[4],
                            by[5]};
    real p = params[n], buffer = momentum_buffer ? momentum_buffer[n] : real(0);
    rule.update(p, grads[n], buffer);
    params[n] = p;
    if (momentum_buffer) momentum_buffer[n] = buffer;
}

template <typename real>
__global__ void rmsprop(
    const long long N,
    const real* __restrict__ by,         // [7]  lr, alpha, rest, eps, momentum, weight_decay, most
    const int* __restrict__ go,          // [1]  0: nothing changes; or null
    const real* __restrict__ grads,
    real* __restrict__ params,           // in, out
    real* __restrict__ square_avg,       // in, out
    real* __restrict__ grad_avg,         // in, out; or null unless centered
    real* __restrict__ momentum_buffer)  // in, out; or null without momentum
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N || (go && !*go)) return;
    const RmsProp<real> rule = {grad_avg != nullptr, momentum_buffer != nullptr, by[5] != real(0), by[0], by[1], by[2], by[3],
                                by[4], by[5], by[6]};
    real p = params[n], v = square_avg[n];
    real mean = grad_avg ? grad_avg[n] : real(0), buffer = momentum_buffer ? momentum_buffer[n] : real(0);
    rule.update(p, grads[n], v, mean, buffer);
    params[n] = p;
    square_avg[n] = v;
    if (grad_avg) grad_avg[n] = mean;
    if (momentum_buffer) momentum_buffer[n] = buffer;
}

template <typename real>
__global__ void adam(
    const long long N,
    const real* __restrict__ by,        // [8]  shrink, weight_decay, beta1, rest1, beta2, rest2, eps, rate
    const int* __restrict__ go,         // [1]  0: nothing changes; or null
    const real* __restrict__ grads,
    real* __restrict__ params,          // in, out
    real* __restrict__ exp_avg,         // in, out
    real* __restrict__ exp_avg_sq,      // in, out
    real* __restrict__ max_exp_avg_sq)  // in, out; or null without amsgrad
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N || (go && !*go)) return;
    const Adam<real> rule = {max_exp_avg_sq != nullptr, by[1] != real(0), by[0], by[1], by[2], by[3], by[4], by[5], by[6], by[7]};
    real p = params[n], m = exp_avg[n], v = exp_avg_sq[n], largest = max_exp_avg_sq ? max_exp_avg_sq[n] : real(0);
    rule.update(p, grads[n], m, v, largest);
    params[n] = p;
    exp_avg[n] = m;
    exp_avg_sq[n] = v;
    if (max_exp_avg_sq) max_exp_avg_sq[n] = largest;
}

// ---- the global norm
//
// Squares are added in double, in an order that depends on N only: a chunk has 256 threads, each adds every 256th element
// of the chunk, then a tree adds the threads' sums. The host reads nothing in between.

static const int THREADS = 256;

// The sum over the threads of a block, in thread 0.
DEVICE double block_sum(double sum) {
    __shared__ double sums[THREADS];
    sums[threadIdx.x] = sum;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
        __syncthreads();
    }
    return sums[0];
}

template <typename real>
__global__ void norm_partial(
    const long long N,
    const real* __restrict__ grads,
    double* __restrict__ partial)  // [chunks]  out; chunks = gridDim.x
{
    const long long size = (N + gridDim.x - 1) / gridDim.x;
    const long long start = blockIdx.x * size, stop = start + size < N ? start + size : N;
    double sum = 0;
    for (long long n = start + threadIdx.x; n < stop; n += THREADS) sum += mul(double(grads[n]), double(grads[n]));
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// norm[0]: the norm; norm[1]: min(1, max_norm / (norm + 1e-6)), 1 where the norm is not finite.
__global__ void norm_finish(
    const int chunks,
    const double max_norm,
    const double* __restrict__ partial,  // [chunks]
    double* __restrict__ norm)           // [2]  out
{
    double sum = 0;
    for (int k = threadIdx.x; k < chunks; k += THREADS) sum += partial[k];
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        norm[0] = sqrt(sum);
        const double scale = max_norm / (norm[0] + 1e-6);
        norm[1] = scale < 1 && norm[0] - norm[0] == 0 ? scale : 1;
    }
}

template <typename real>
__global__ void scale_grads(
    const long long N,
    const double* __restrict__ norm,  // [2]  of norm_finish
    real* __restrict__ grads)         // in, out
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n < N) grads[n] = mul(grads[n], real(norm[1]));
}

// ---- an update in a CUDA graph
//
// The host reads nothing while such updates run one behind the other. So each decides by itself whether it is made, and
// notes what the host will ask for.

// One thread. Where something was wrong, parameters do not change, in this update and in those after it, until the host
// has seen it.
__global__ void update_verdict(
    const int count,                      // losses
    const double* __restrict__ losses,    // [count]
    const double* __restrict__ norm,      // [1]
    const int* __restrict__ wrong,        // [1]  whether an input was
    const long long* __restrict__ where,  // [2]  row of results; whether a norm that is not finite only skips the update
    bool* __restrict__ alive,             // [1]  in, out: whether nothing was wrong so far
    int* __restrict__ go,                 // [1]  out: whether the update is made
    double* __restrict__ results)         // [rows, 2 + count]  out: alive, the norm, the losses
{
    double* to = results + where[0] * (2 + count);
    bool finite = true;
    for (int k = 0; k < count; k++) {
        to[2 + k] = losses[k];
        finite = finite && losses[k] - losses[k] == 0;
    }
    const bool small = *norm - *norm == 0;
    *alive = *alive && !*wrong && finite && (small || where[1]);
    *go = *alive && small;
    to[0] = *alive;
    to[1] = *norm;
}
