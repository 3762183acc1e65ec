// What every kernel file includes first: the legend, the qualifiers, the activations and their derivatives.
//
// Legend (the whole project)
//     T  timesteps                G  gates (RNN 1, GRU 3, LSTM 4); Q of them have a product with W_hh
//     B  batch (sequences)        S  states (RNN, GRU 1; LSTM 2)
//                                 N  vectors of a cell's own parameters; M  its random masks
//     I  input size               L  layers
//     H  hidden size              D  directions (1 or 2)
//     V  vocabulary / classes
//
// Gates are in the order of PyTorch and cuDNN: LSTM i f g o; GRU r z n.
// Arrays are C-contiguous and time-major, [T, B, ...]: the rightmost index changes fastest. d + name is the gradient of the
// loss with respect to it: dh, dgates, dx. `real` is the compute type, float or double.
// "aligned": the array starts at a multiple of 16 bytes, so that one instruction reads or writes several numbers. Each
// launch checks it.
//
// CuPy compiles with -ftz=true: float numbers below 2^-126 are flushed to zero, unlike in NumPy.
//
// This text is also plain C++, without intrinsics, so that the same cells can be compiled for the CPU.

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#else
#include <cmath>
#ifdef INLINE  // set by cpu/vector.h, which says why
#define DEVICE INLINE
#else
#define DEVICE inline
#endif
using std::exp;
using std::expm1;
using std::fabs;
using std::log;
using std::log1p;
using std::sqrt;
using std::tanh;
#endif

// ---- types
//
// Compute<T>::real is the type that T is computed in: float for half and bfloat16, otherwise T. A CUDA installation without
// the headers of the 16-bit types still compiles the other types.

#ifdef __CUDACC__
#if __has_include(<cuda_fp16.h>)
#include <cuda_fp16.h>
#endif
#if __has_include(<cuda_bf16.h>)
#include <cuda_bf16.h>
#endif
#endif

template <typename T> struct Compute { typedef float real; };
template <> struct Compute<double> { typedef double real; };

// ---- activations
//
// The derivatives take the activated value y = f(x), not x: the backward pass needs only the gates that the forward pass has
// saved. tanh(x) itself is the built-in function.

// 1 / x to one last place. On a GPU a single instruction in float, which gives 0 where x is above 2^126.
DEVICE float reciprocal(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
}
DEVICE double reciprocal(double x) { return 1.0 / x; }

// sigmoid(x) = 1 / (1 + exp(-x)), exact to 4 last places however small it is. (1 + tanh(x / 2)) / 2 is not: from x = -12 on
// it is the difference of two numbers that are nearly equal. An exp that overflows gives 0.
template <typename real>
DEVICE real sigmoid(real x) {
    return reciprocal(real(1) + exp(-x));
}

// As exact as y where y is small. Where y is close to 1 it has lost what is below its own last place, and so has 1 - y: to
// store 1 - y as well would cost more instructions in each gate than this is worth.
template <typename real>
DEVICE real dsigmoid(real y) {
    return y * (real(1) - y);
}

template <typename real>
DEVICE real dtanh(real y) {
    return (real(1) - y) * (real(1) + y);  // as exact as 1 - y * y, and more so where |y| is close to 1
}

// NaN stays NaN.
template <typename real>
DEVICE real relu(real x) {
    return x < real(0) ? real(0) : x;
}

// The derivative from y = relu(x), which is 0 (then so is the derivative), positive, or NaN (then so is the derivative).
template <typename real>
DEVICE real drelu(real y) {
    return y > real(0) ? real(1) : y;
}

// The larger of two numbers; NaN stays NaN.
template <typename real>
DEVICE real larger(real a, real b) {
    return a > b || a != a ? a : b;
}

// ---- functions of generated cells, besides those above and exp expm1 log log1p sqrt fabs

// The smaller of two numbers; NaN stays NaN.
template <typename real>
DEVICE real smaller(real a, real b) {
    return a < b || a != a ? a : b;
}

// x where a > b, otherwise y.
template <typename real>
DEVICE real where_greater(real a, real b, real x, real y) {
    return a > b ? x : y;
}

// log(1 + exp(x)), as exact where it is small as where it is large: exp never overflows here.
template <typename real>
DEVICE real softplus(real x) {
    return larger(x, real(0)) + log1p(exp(-fabs(x)));
}

#ifdef __CUDACC__
// ---- arithmetic for cells whose numbers are stored as T of 16 bits
//
// Brief<T> is a float whose exp, sigmoid and tanh take fewer instructions. exp loses up to 60 of float's last places where x is
// close to -88 or 88, which is less than a hundredth of the last place of half. For bfloat16 the instruction tanh.approx will do: its
// relative error is at most 2^-11, a quarter of what storing the result adds (PTX ISA).

template <typename T>
struct Brief {
    float x;
    Brief() = default;
    DEVICE Brief(float x_) : x(x_) {}
    DEVICE operator float() const { return x; }
    DEVICE friend Brief operator+(Brief a, Brief b) { return a.x + b.x; }
    DEVICE friend Brief operator-(Brief a, Brief b) { return a.x - b.x; }
    DEVICE friend Brief operator*(Brief a, Brief b) { return a.x * b.x; }
    DEVICE friend Brief operator/(Brief a, Brief b) { return a.x / b.x; }
    DEVICE friend Brief operator-(Brief a) { return -a.x; }
    DEVICE friend bool operator<(Brief a, Brief b) { return a.x < b.x; }
    DEVICE friend bool operator>(Brief a, Brief b) { return a.x > b.x; }
    DEVICE friend bool operator!=(Brief a, Brief b) { return a.x != b.x; }
    DEVICE Brief& operator+=(Brief b) { return *this = *this + b; }
};

template <typename T>
DEVICE Brief<T> exp(Brief<T> a) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a.x * 1.44269504f));
    return y;
}
template <typename T> DEVICE Brief<T> reciprocal(Brief<T> a) { return reciprocal(a.x); }
template <typename T> DEVICE Brief<T> tanh(Brief<T> a) { return tanhf(a.x); }
template <typename T> DEVICE Brief<T> expm1(Brief<T> a) { return expm1f(a.x); }
template <typename T> DEVICE Brief<T> log(Brief<T> a) { return logf(a.x); }
template <typename T> DEVICE Brief<T> log1p(Brief<T> a) { return log1pf(a.x); }
template <typename T> DEVICE Brief<T> sqrt(Brief<T> a) { return sqrtf(a.x); }
template <typename T> DEVICE Brief<T> fabs(Brief<T> a) { return fabsf(a.x); }

#if __has_include(<cuda_bf16.h>)
DEVICE Brief<__nv_bfloat16> tanh(Brief<__nv_bfloat16> a) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(a.x));
    return y;
}
#endif

// The type that a cell computes in: InCell<T>::real.
template <typename T> struct InCell { typedef Brief<T> real; };
template <> struct InCell<float> { typedef float real; };
template <> struct InCell<double> { typedef double real; };
#endif
