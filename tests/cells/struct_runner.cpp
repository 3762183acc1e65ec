// Runs one timestep of generated cells, forward and backward, over H units of B sequences, with the products that a schedule would
// make. It reads numbers from standard input and writes numbers to standard output, in the order of `run` below.
#include <cstdio>
#include <cstdlib>
#include <vector>
#include "common.cuh"
#include "cells/cell.cuh"

namespace generated {
//@ the structs
}

typedef std::vector<double> Numbers;

static Numbers read_numbers(size_t count) {
    Numbers numbers(count);
    if (count && fread(numbers.data(), sizeof(double), count, stdin) != count) abort();
    return numbers;
}

static void write_number(double number) { fwrite(&number, sizeof(double), 1, stdout); }

// The product of rows [first, last) of W_hh (rows, H) with the vectors (H, B), added to `out` at the same rows.
static void multiply(const Numbers& hh, int H, int B, int first, int last, const Numbers& vector, Numbers& out) {
    for (int row = first; row < last; row++)
        for (int k = 0; k < H; k++)
            for (int b = 0; b < B; b++) out[row * B + b] += hh[row * H + k] * vector[k * B + b];
}
static Numbers multiply_transposed(const Numbers& hh, int H, int B, int first, int last, const Numbers& d) {
    Numbers out(H * B);
    for (int row = first; row < last; row++)
        for (int k = 0; k < H; k++)
            for (int b = 0; b < B; b++) out[k * B + b] += hh[row * H + k] * d[row * B + b];
    return out;
}

// The mean of each sum over the units of a sequence, into in.mean of all of them.
template <typename In, typename Out>
static void average(std::vector<In>& in, std::vector<Out>& out, int H, int B, int from, int count) {
    for (int b = 0; b < B; b++)
        for (int k = from; k < from + count; k++) {
            double sum = 0;
            for (int u = 0; u < H; u++) sum += out[u * B + b].sum[k];
            for (int u = 0; u < H; u++) in[u * B + b].mean[k] = sum / H;
        }
}
template <int stage, typename Cell>
static void run_forward(std::vector<ForwardIn<Cell, double>>& in, std::vector<ForwardOut<Cell, double>>& out, int H, int B, int from) {
    for (int i = 0; i < H * B; i++) forward_stage<stage, Cell, double>(in[i], out[i]);
    average(in, out, H, B, from, Cell::means_of(stage));
    if constexpr (stage + 1 < Cell::stages) run_forward<stage + 1, Cell>(in, out, H, B, from + Cell::means_of(stage));
}
template <int stage, typename Cell>
static void run_backward(std::vector<BackwardIn<Cell, double>>& in, std::vector<BackwardOut<Cell, double>>& out, int H, int B, int from) {
    for (int i = 0; i < H * B; i++) backward_stage<stage, Cell, double>(in[i], out[i]);
    average(in, out, H, B, from, Cell::back_means_of(stage));
    if constexpr (stage + 1 < Cell::back_stages) run_backward<stage + 1, Cell>(in, out, H, B, from + Cell::back_means_of(stage));
}

// In: W_hh, ax, b_hh apart from b_ih as ah's start (rows, B), old states, parameters (vectors, H), masks, dstates.
// Out: new states, saved blocks, d, dstates.
template <typename Cell>
static void run(int H, int B) {
    const int rows = Cell::products * H, first = Cell::first_product * H, N = H * B;
    const Numbers hh = read_numbers(rows * H), ax = read_numbers(Cell::gates * N);
    Numbers ah = read_numbers(Cell::products * N);
    const Numbers state = read_numbers(Cell::states * N), p = read_numbers(Cell::parameters * H);
    const Numbers mask = read_numbers(Cell::draws * N), dstate = read_numbers(Cell::states * N);
    multiply(hh, H, B, 0, first, Numbers(state.begin(), state.begin() + N), ah);
    std::vector<ForwardIn<Cell, double>> in(N);
    std::vector<ForwardOut<Cell, double>> out(N);
    std::vector<BackwardIn<Cell, double>> back_in(N);
    std::vector<BackwardOut<Cell, double>> back(N);
    auto fill = [&](int from) {
        for (int i = 0; i < N; i++) {
            for (int g = 0; g < Cell::gates; g++) in[i].ax[g] = ax[g * N + i];
            for (int g = 0; g < from; g++) in[i].ah[g] = ah[g * N + i];
            for (int k = 0; k < Cell::states; k++) in[i].state[k] = back_in[i].state[k] = state[k * N + i];
            for (int k = 0; k < Cell::parameters; k++) in[i].p[k] = back_in[i].p[k] = p[k * H + i / B];
            for (int k = 0; k < Cell::draws; k++) in[i].mask[k] = back_in[i].mask[k] = mask[k * N + i];
        }
    };
    fill(Cell::first_product);
    if constexpr (Cell::first_product < Cell::products) {
        Numbers inner(N);
        for (int i = 0; i < N; i++) inner[i] = Cell::forward_inner(in[i]);
        multiply(hh, H, B, first, rows, inner, ah);
        fill(Cell::products);
        run_forward<0, Cell>(in, out, H, B, 0);
        for (int i = 0; i < N; i++) out[i].saved[Cell::inner] = inner[i];
    } else {
        run_forward<0, Cell>(in, out, H, B, 0);
    }
    for (int i = 0; i < N; i++) {
        for (int k = 0; k < Cell::saved; k++) back_in[i].saved[k] = out[i].saved[k];
        for (int k = 0; k < Cell::states; k++) {
            back_in[i].new_state[k] = out[i].state[k];
            back_in[i].dstate[k] = dstate[k * N + i];
        }
    }
    run_backward<0, Cell>(back_in, back, H, B, 0);
    Numbers d(Cell::products * N);
    auto collect = [&] {
        for (int i = 0; i < N; i++)
            for (int g = 0; g < Cell::products; g++) d[g * N + i] = back[i].d[g];
    };
    if constexpr (Cell::first_product < Cell::products) {
        collect();
        const Numbers d_inner = multiply_transposed(hh, H, B, first, rows, d);
        for (int i = 0; i < N; i++) Cell::backward_inner(back_in[i], d_inner[i], back[i]);
    }
    collect();
    const Numbers dh = multiply_transposed(hh, H, B, 0, first, d);
    for (int k = 0; k < Cell::states; k++)
        for (int i = 0; i < N; i++) write_number(out[i].state[k]);
    for (int k = 0; k < Cell::saved; k++)
        for (int i = 0; i < N; i++) write_number(out[i].saved[k]);
    for (int k = 0; k < Cell::preactivations; k++)
        for (int i = 0; i < N; i++) write_number(back[i].d[k]);
    for (int k = 0; k < Cell::states; k++)
        for (int i = 0; i < N; i++) write_number(back[i].dstate[k] + (k ? 0 : dh[i]));
}

int main(int, char** words) {
    const int which = atoi(words[1]), H = atoi(words[2]), B = atoi(words[3]);
    //@ the calls
    return 0;
}
