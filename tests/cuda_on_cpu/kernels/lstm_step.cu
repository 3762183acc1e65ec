// One fused LSTM step: recurrent product, gates and new state in one launch. Any B, any H.
//
//   gates = ax + h_old W^T        i f o through the logistic function, g through tanh
//   c = f * c_old + i * g
//   h = o * tanh(c)
//
// Legend: B batch, H hidden size. Storage in T; arithmetic in double for double, in float for all other types.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T>
struct Arithmetic {
    using type = float;
};
template <>
struct Arithmetic<double> {
    using type = double;
};

__device__ double widen(double x) { return x; }
__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ void store(double* to, double x) { *to = x; }
__device__ void store(float* to, float x) { *to = x; }
__device__ void store(__half* to, float x) { *to = __float2half(x); }
__device__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }

template <typename Real>
__device__ Real logistic(Real x) {
    return Real(1) / (Real(1) + exp(-x));
}

constexpr int ROWS = 4;    // batch rows of a block
constexpr int UNITS = 16;  // hidden units of a block, and the columns of a tile of h

// grid (ceil(H / UNITS), ceil(B / ROWS)), block (ROWS, UNITS): one thread per (b, unit).
template <typename T>
__global__ void lstm_step(int B, int H,
                          const T* ax,     // (B, 4 H)  W_ih x + biases, gate order i f g o
                          const T* weight, // (4 H, H)  W_hh
                          const T* h_old,  // (B, H)
                          const T* c_old,  // (B, H)
                          T* h,            // (B, H)    out
                          T* c) {          // (B, H)    out
    using Real = typename Arithmetic<T>::type;
    __shared__ Real tile[ROWS][UNITS];

    const int row = threadIdx.x, b = blockIdx.y * ROWS + row;
    const int unit = blockIdx.x * UNITS + threadIdx.y;
    const bool inside = b < B && unit < H;

    Real gates[4] = {0, 0, 0, 0};
    for (int k0 = 0; k0 < H; k0 += UNITS) {
        // Threads outside the matrix help to load and meet the barriers too.
        const int column = k0 + threadIdx.y;
        tile[row][threadIdx.y] = b < B && column < H ? widen(h_old[b * H + column]) : Real(0);
        __syncthreads();

        const int columns = min(UNITS, H - k0);
        if (inside) {
            for (int k = 0; k < columns; ++k) {
                for (int gate = 0; gate < 4; ++gate) {
                    gates[gate] += widen(weight[(gate * H + unit) * H + k0 + k]) * tile[row][k];
                }
            }
        }
        __syncthreads();
    }
    if (!inside) return;

    for (int gate = 0; gate < 4; ++gate) gates[gate] += widen(ax[b * 4 * H + gate * H + unit]);
    const Real i = logistic(gates[0]), f = logistic(gates[1]), g = tanh(gates[2]), o = logistic(gates[3]);
    const Real c_new = f * widen(c_old[b * H + unit]) + i * g;
    store(&c[b * H + unit], c_new);
    store(&h[b * H + unit], o * tanh(c_new));
}
