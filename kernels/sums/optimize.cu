// The optimisers' update, one launch over the flat buffer, and the clipping of the global norm.
//
// The arithmetic is that of gpurnn/optim/, operation by operation and rounded after each, so that both give the same bits
// (except for float numbers that CuPy's -ftz=true flushes to zero). This is why there are mul, add, ...: the compiler must
// not fuse a multiplication with an addition. update.cuh explains the scalars.
//
// All arrays have N elements.

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
    const int first,           // step 1: the buffer takes the gradient
    const int nesterov,
    const real lr,
    const real momentum,
    const real undamped,       // 1 - dampening
    const real weight_decay,
    const real* __restrict__ grads,
    real* __restrict__ params,           // in, out
    real* __restrict__ momentum_buffer)  // in, out; or null without momentum
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const Sgd<real> rule = {first != 0, nesterov != 0, momentum_buffer != nullptr, weight_decay != real(0), lr, momentum, undamped,
                            weight_decay};
    real p = params[n], buffer = momentum_buffer ? momentum_buffer[n] : real(0);
    rule.update(p, grads[n], buffer);
    params[n] = p;
    if (momentum_buffer) momentum_buffer[n] = buffer;
}

template <typename real>
__global__ void rmsprop(
    const long long N,
    const real lr,
    const real alpha,
    const real rest,           // 1 - alpha
    const real eps,
    const real momentum,
    const real weight_decay,
    const real most,           // the largest finite number
    const real* __restrict__ grads,
    real* __restrict__ params,           // in, out
    real* __restrict__ square_avg,       // in, out
    real* __restrict__ grad_avg,         // in, out; or null unless centered
    real* __restrict__ momentum_buffer)  // in, out; or null without momentum
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const RmsProp<real> rule = {grad_avg != nullptr, momentum_buffer != nullptr, weight_decay != real(0), lr, alpha, rest, eps,
                                momentum, weight_decay, most};
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
    const real shrink,         // 1 - lr * weight_decay where that is decoupled (AdamW), else 1
    const real weight_decay,   // 0 where it is decoupled
    const real beta1,
    const real rest1,          // 1 - beta1
    const real beta2,
    const real rest2,          // 1 - beta2
    const real eps,            // times sqrt(1 - beta2^step)
    const real rate,           // lr sqrt(1 - beta2^step) / (1 - beta1^step)
    const real* __restrict__ grads,
    real* __restrict__ params,          // in, out
    real* __restrict__ exp_avg,         // in, out
    real* __restrict__ exp_avg_sq,      // in, out
    real* __restrict__ max_exp_avg_sq)  // in, out; or null without amsgrad
{
    const long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= N) return;
    const Adam<real> rule = {max_exp_avg_sq != nullptr, weight_decay != real(0), shrink, weight_decay, beta1, rest1, beta2, rest2,
                             eps, rate};
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
