// Schedule `fused`: a launch for each timestep, which multiplies on tensor cores and computes the cells. For layers whose weights
// fit on no GPU at once, or that have so many sequences that a product is worth more than a launch.
//
//     fused_forward<lstm, __half, 32, 64, 1, 4, 1>     U 32, R 64, C 1, STAGES 4, PARTS 1
//
//     U       units of a tile: Q U rows of W_hh in forward, U columns in backward; 16, 32 or 64
//     R       sequences of a tile
//     C       thread blocks of a cluster, which share a tile; 1 needs no clusters
//     STAGES  of shared memory
//     PARTS   1: numbers are multiplied as they are stored, float as tf32. 3: as three bfloat16 numbers (tensor.cuh)
//
// A launch waits for the one before only when it has begun to load weights (fused.cuh). What a product reads is in panels
// (panels.cuh): the weights, made once a call by to_panels; the vectors, h or d, made by the timestep before, in two slots that
// alternate. The cell part of a timestep is that of step.cu, which explains the arrays, `step` and `done`.
//
// Weights: in forward the rows are W_hh's, tile by tile, of a tile gate by gate; in backward they are W_hh's columns, and the columns
// are its rows, gate by gate, each gate filled up to whole panels.

#include "../common.cuh"
#include "../cells/all.cuh"
#include "words.cuh"
#include "tensor.cuh"
#include "step.cuh"
#include "fused.cuh"

// Puts matrices into panels; a thread makes a piece. rows: of a gate in panels. TRANSPOSED: as backward reads weights.
template <typename T, int PARTS, bool TRANSPOSED>
__global__ void to_panels(
    const int Q,       // gates
    const int count,   // rows of a gate
    const int width,   // columns
    const int U,       // units of a tile
    const int rows,    // of a panel
    const int panels,  // of a gate where TRANSPOSED, else of a row
    const T* __restrict__ from,  // [D, Q*count, width]
    unsigned char* to)           // [D, panels, PARTS, rows, 128]  aligned; out, or [D, Q*panels, PARTS, rows, 128]
{
    typedef Panels<T, PARTS> P;
    const int pieces = (TRANSPOSED ? Q : 1) * panels * 8, n = blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= pieces * rows) return;
    const int row = TRANSPOSED ? n % rows : n / pieces, first = (TRANSPOSED ? n / rows : n % pieces) * P::piece;
    from += (size_t)blockIdx.z * Q * count * width;
    to += (size_t)blockIdx.z * pieces / 8 * PARTS * rows * 128;
    const int unit = row / (Q * U) * U + row % U, gate = TRANSPOSED ? first / (panels * P::columns) : row % (Q * U) / U;
#pragma unroll
    for (int i = 0; i < P::piece; i++) {
        const int column = first + i, within = TRANSPOSED ? column % (panels * P::columns) : unit;
        const int across = TRANSPOSED ? row : column;
        const bool inside = within < count && across < width;
        P::store((char*)to, rows, row, column, inside ? from[((size_t)gate * count + within) * width + across] : T(0.0f));
    }
}

// ---- a thread's cells of a tile: of one unit, TOGETHER sequences at a time, so that what they read is asked for at once

template <int U, int R, int C>
struct Turns {
    static constexpr int at_once = THREADS / U, sequences = R / C;  // of the block's threads; of the block
    static constexpr int turns = sequences < at_once ? 1 : sequences / at_once, together = turns < 4 ? turns : 4;
    static_assert(THREADS % U == 0 && turns % together == 0, "whole turns");

    // The position `n` turns after a thread's first one.
    DEVICE static Position further(Position pos, int n, int first, int B) {
        pos.b += n * at_once;
        pos.inside = pos.inside && pos.b < B && first < sequences;
        return pos;
    }

    // The row of that position in the tile, or some row. row: the block's first one.
    DEVICE static int within(int row, int first, int n) { return row + (first + n * at_once) % sequences; }

    // turn(first): of sequences first, first + at_once, ... of the block, `together` of them.
    template <typename Turn>
    DEVICE static void run(Turn turn) {
#pragma unroll 1
        for (int first = threadIdx.x / U; first < at_once * turns; first += at_once * together) turn(first);
    }
};

// Asks for a row of `gates` of each sequence of the block, in L2.
template <int U, int R, int C, typename T>
DEVICE void ask_for_gates(const T* gates, const Position& first, int T_, int B, int H, int W, int blocks) {
    for (int n = threadIdx.x; n < R / C * blocks; n += THREADS) {
        const int b = first.b + n / blocks;
        const size_t row = ((size_t)first.d * T_ + first.t) * B + b;
        if (b < B) asm volatile("prefetch.global.L2 [%0];" ::"l"(gates + (row * W + n % blocks) * H + first.j));
    }
}

// ---- forward

template <template <typename> class CellOf, typename T, int U, int R, int C, int STAGES, int PARTS, bool MARKED = false>
__global__ void __launch_bounds__(THREADS, 1) __in_clusters__(C) fused_forward(
    const int T_,
    const int B,
    const int H,
    const int W,         // blocks of H in a row of gates
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int save,      // 0: inference; gates are only read, others has 2 slots used in turn
    const int* __restrict__ lengths,    // [B]  or null
    const float* __restrict__ bias_ih,  // [D, G*H]  or null
    const float* __restrict__ bias_hh,  // [D, G*H]  or null
    const float* __restrict__ own,      // [D, N, H]  or null where the cell has none
    const int mask_steps,               // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,      // [D, mask_steps, B, M*H]  or null where the cell draws none
    const unsigned char* __restrict__ weights,  // [D, panels, PARTS, weight rows, 128]  aligned
    unsigned char* vectors,             // [2, D, panels, PARTS, vector rows, 128]  aligned; in: h, the slot step % 2; out: the other
    const int panels,
    const int weight_rows,
    const int vector_rows,
    T* gates,                           // [D, T, B, W*H]  in: ax; out: what the cell saves
    T* h,                               // [D, T+1, B, H]  out: the new slot
    T* h_now,                           // [D, B, H]  in: h; out: h'
    float* others,                      // [D, S-1, T+1 or 2, B, H]  out: the new slot; or null where the cell has none
    T* __restrict__ output,             // [T, B, D*H]  out
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,      // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ uint4 memory[];
    typedef typename InCell<T>::real real;
    typedef CellOf<real> Cell;
    typedef Turns<U, R, C> Turn;
    constexpr int K = Turn::together;
    static_assert(Cell::stages == 1 && Cell::first_product == Cell::products, "one product, and no means");
    const int s = steps_before(step, done), rank = blockIdx.y % C, tile_row = blockIdx.y / C * R, row = rank * Turn::sequences;
    const int j = blockIdx.x * U + threadIdx.x % U;
    const size_t bytes = (size_t)panels * PARTS * 128;
    const char* const read_from = (char*)vectors + (s % 2 * gridDim.z + blockIdx.z) * bytes * vector_rows;
    char* const written = (char*)vectors + ((1 - s % 2) * gridDim.z + blockIdx.z) * bytes * vector_rows;
    TileProduct<T, Cell::products * U, R, C, STAGES, PARTS> product(
        memory, (const char*)weights + blockIdx.z * bytes * weight_rows, read_from, panels, rank, weight_rows,
        blockIdx.x * Cell::products * U, vector_rows, tile_row);
    product.run([&] {
        const Position pos(T_, H, s, reverse, blockIdx.x * U, tile_row + row);
        ask_for_gates<U, R, C>(gates, pos, T_, B, H, W, Cell::gates);
    });

    const Forward<T> a = {T_, B, H, W, save, mask_steps, bias_ih, bias_hh, own, mask, nullptr, gates, h, h_now, others, nullptr,
                          output, {marks, reset_h, reset_others}};
    float bias_a[Cell::gates], bias_r[Cell::gates];
#pragma unroll
    for (int g = 0; g < Cell::gates; g++) {
        const bool valid = bias_ih && j < H;
        bias_a[g] = valid ? bias_ih[((size_t)blockIdx.z * Cell::gates + g) * H + j] : 0.0f;
        bias_r[g] = valid ? bias_hh[((size_t)blockIdx.z * Cell::gates + g) * H + j] : 0.0f;
    }
    Turn::run([&](int first) {
        const Position start(T_, H, s, reverse, j, tile_row + row + first);
        const ForwardPlace<T> at_start(a, start, s);
        ForwardLoaded<Cell, T> loaded[K];
        StepMarks now[K];
        float ah[K][Cell::products];
#pragma unroll
        for (int n = 0; n < K; n++) {
            const Position pos = Turn::further(start, n, first, B);
            if (pos.inside) now[n] = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
#pragma unroll
            for (int g = 0; g < Cell::products; g++) ah[n][g] = product.sum(g * U + threadIdx.x % U, Turn::within(row, first, n));
        }
#pragma unroll
        for (int n = 0; n < K; n++) {
            const Position pos = Turn::further(start, n, first, B);
            loaded[n].load(a, pos, now[n], ForwardPlace<T>(a, at_start, n * Turn::at_once), pos.inside && !now[n].held);
        }
#pragma unroll
        for (int n = 0; n < K; n++) {
            const Position pos = Turn::further(start, n, first, B);
            if (!pos.inside) continue;
            const ForwardPlace<T> at(a, at_start, n * Turn::at_once);
            T h_next;
            if (now[n].held) {
                h_next = hold<Cell>(a, pos, now[n], at);
            } else {
                ForwardIn<Cell, real> in;
                ForwardOut<Cell, real> out;
                read(loaded[n], in, [&](int k) { return bias_a[k]; }, [&](int k) { return bias_r[k]; },
                     [&](int k) { return ah[n][k]; });
                Cell::forward(in, out);
                h_next = write(a, pos, now[n], at, out);
            }
            Panels<T, PARTS>::store(written, vector_rows, pos.b, j, h_next);
        }
    });
    product.leave();
}

// ---- backward
//
// dh is complete when the product of the timestep before, in the order of backward, is added to it. That of the last one is left
// to a GEMM.

template <template <typename> class CellOf, typename T, int U, int R, int C, int STAGES, int PARTS, bool MARKED = false>
__global__ void __launch_bounds__(THREADS, 1) __in_clusters__(C) fused_backward(
    const int T_,
    const int B,
    const int H,
    const int W,
    const int step,
    const int* done,     // [1]  or null
    const int reverse,
    const int* __restrict__ lengths,  // [B]  or null
    const float* __restrict__ own,    // [D, N, H]  or null where the cell has none
    const int mask_steps,             // T, or 1: the same masks in all timesteps
    const bool* __restrict__ mask,    // [D, mask_steps, B, M*H]  or null where the cell draws none
    const unsigned char* __restrict__ weights,  // [D, Q*panels, PARTS, weight rows, 128]  aligned
    unsigned char* vectors,           // [2, D, Q*panels, PARTS, vector rows, 128]  aligned; in: d, the slot step % 2; out: the other
    const int panels,                 // of a gate
    const int weight_rows,
    const int vector_rows,
    T* gates,                         // [D, T, B, W*H]  in: what forward saved; out: d
    const T* __restrict__ h,          // [D, T+1, B, H]
    const float* __restrict__ others,  // [D, S-1, T+1, B, H]  or null where the cell has none
    const T* __restrict__ doutput,    // [T, B, D*H]  or null
    float* dh,                        // [D, B, H]  in: of h', without the product; out: of h, likewise
    float* __restrict__ dothers,      // [D, S-1, B, H]  likewise; or null where the cell has none
    const unsigned char* __restrict__ marks,  // [D, T, B]  or null unless MARKED
    const T* __restrict__ reset_h,    // [D, B, H]  what a reset gives; or null
    const float* __restrict__ reset_others,  // [D, S-1, B, H]  likewise; or null
    float* __restrict__ dreset_h,     // [D, B, H]  in, out: sums of gradients; or null
    float* __restrict__ dreset_others)  // [D, S-1, B, H]  likewise; or null
{
    extern __shared__ uint4 memory[];
    typedef typename InCell<T>::real real;
    typedef CellOf<real> Cell;
    typedef Turns<U, R, C> Turn;
    constexpr int K = Turn::together, Q = Cell::products;
    static_assert(Cell::back_stages == 1 && Cell::first_product == Q, "one product, and no means");
    const int count = steps_before(step, done), s = T_ - 1 - count, rank = blockIdx.y % C, tile_row = blockIdx.y / C * R;
    const int row = rank * Turn::sequences, j = blockIdx.x * U + threadIdx.x % U;
    const size_t bytes = (size_t)Q * panels * PARTS * 128;
    const char* const read_from = (char*)vectors + (count % 2 * gridDim.z + blockIdx.z) * bytes * vector_rows;
    char* const written = (char*)vectors + ((1 - count % 2) * gridDim.z + blockIdx.z) * bytes * vector_rows;
    TileProduct<T, U, R, C, STAGES, PARTS> product(
        memory, (const char*)weights + blockIdx.z * bytes * weight_rows, read_from, Q * panels, rank, weight_rows, blockIdx.x * U,
        vector_rows, tile_row);
    product.run([&] {
        const Position pos(T_, H, s, reverse, blockIdx.x * U, tile_row + row);
        ask_for_gates<U, R, C>(gates, pos, T_, B, H, W, Cell::saved);
    });

    const Backward<T> a = {T_, B, H, W, mask_steps, own, mask, gates, h, others, doutput, nullptr, dh, dothers, nullptr,
                           {marks, reset_h, reset_others, dreset_h, dreset_others}};
    Turn::run([&](int first) {
        const Position start(T_, H, s, reverse, j, tile_row + row + first);
        const BackwardPlace<T> at_start(a, start);
        BackwardLoaded<Cell, T> loaded[K];
        StepMarks now[K];
        float complete[K];
#pragma unroll
        for (int n = 0; n < K; n++) {
            const Position pos = Turn::further(start, n, first, B);
            if (pos.inside) now[n] = marks_of<MARKED>(pos, lengths, marks, T_, B, reverse);
            complete[n] = pos.inside ? dh[BackwardPlace<T>(a, at_start, n * Turn::at_once).index] : 0.0f;
            complete[n] += product.sum(threadIdx.x % U, Turn::within(row, first, n));
        }
#pragma unroll
        for (int n = 0; n < K; n++) {
            const Position pos = Turn::further(start, n, first, B);
            if (!pos.inside) continue;
            const BackwardPlace<T> at(a, at_start, n * Turn::at_once);
            dh[at.index] = complete[n];
            if (now[n].next_reset) reset_gradients<Cell>(a, pos, at);
            if (now[n].held && now[n].shown) add_shown(a, at);
        }
#pragma unroll
        for (int n = 0; n < K; n++) {
            const Position pos = Turn::further(start, n, first, B);
            const BackwardPlace<T> at(a, at_start, n * Turn::at_once);
            loaded[n].load(a, pos, now[n], at, pos.inside && !now[n].held);
        }
#pragma unroll
        for (int n = 0; n < K; n++) {
            const Position pos = Turn::further(start, n, first, B);
            if (!pos.inside) continue;
            const BackwardPlace<T> at(a, at_start, n * Turn::at_once);
            BackwardOut<Cell, real> out;
            if (now[n].held) {
#pragma unroll
                for (int k = 0; k < Cell::preactivations; k++) out.d[k] = real(0.0f);
            } else {
                BackwardIn<Cell, real> in;
                loaded[n].read(in);
                Cell::backward(in, out);
                write_dstate(a, pos, at, out);
            }
            write_d<Cell>(a, at, out, [&](int k, T d) {
                Panels<T, PARTS>::store(written, vector_rows, pos.b, k * panels * Panels<T, PARTS>::columns + j, d);
            });
        }
    });
    product.leave();
}
