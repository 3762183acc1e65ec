// y = f(a + bias), the last step of a dense layer, and its mirror da = dy * f'(y).
//
// f is a template argument, so a kernel is compiled by a name like these:
//     activate_forward<float, sigmoid<float> >     activate_backward<float, dsigmoid<float> >
//     activate_forward<double, tanh>               activate_backward<double, dtanh<double> >
//
// Every thread walks the array in steps of the whole grid, so any launch size is correct. N is T * B, the rows; N * H may
// pass 2^31, hence the 64-bit index.

#include "common.cuh"

// ---- forward

template <typename real, real f(real)>
__global__ void activate_forward(
    const int N,
    const int H,
    const real* __restrict__ a,     // [N, H]  pre-activations
    const real* __restrict__ bias,  // [H]
    real* __restrict__ y)           // [N, H]  out
{
    const long long size = (long long)N * H;
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x; n < size; n += stride) {
        y[n] = f(a[n] + bias[n % H]);
    }
}

// ---- backward
//
// The derivative by the bias is the sum of da over the rows; that sum over T and B belongs to the weight gradients.

template <typename real, real df(real)>
__global__ void activate_backward(
    const int N,
    const int H,
    const real* __restrict__ y,   // [N, H]  what the forward pass returned
    const real* __restrict__ dy,  // [N, H]
    real* __restrict__ da)        // [N, H]  out
{
    const long long size = (long long)N * H;
    const long long stride = (long long)gridDim.x * blockDim.x;
    for (long long n = (long long)blockIdx.x * blockDim.x + threadIdx.x; n < size; n += stride) {
        da[n] = dy[n] * df(y[n]);
    }
}
