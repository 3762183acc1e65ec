// The time loop of one layer on the CPU, for one instruction set.
//
// A thread runs the whole time loop for its own sequences, so threads never wait for one another inside it. Where sequences are
// too few, threads divide the units instead (by_units): each reads its own share of the weights, and they meet once in a timestep.
// A timestep is one product with the recurrent weights and one application of the cell to all units; a cell may have a second
// product, or none. The weights are packed in the order in which the product reads them, by this code or before by its caller. Input
// products (W_ih x) are computed for several timesteps at a time. A loop of a single timestep packs no weights. Results have the same
// bits for any number of threads, and for a sequence in any batch.
//
// It uses vector.h, gemm.h, shard.h and the cells.

#include "stages.h"
#include "layer.h"
#include "forward.h"
#include "backward.h"

// All directions of a layer.
template <typename T, template <typename> class Cell>
void run_layer(const Pass* passes, int directions, int threads, bool backward) {
    std::vector<std::unique_ptr<Layer<T, Cell>>> layers;
    layers.reserve(directions);
    for (int d = 0; d < directions; ++d) layers.emplace_back(new Layer<T, Cell>(passes[d], backward));
    const bool by_units = passes->by_units;
    // If the directions divide the threads, a thread works on one direction only, and its processor reads only those weights.
    const int shards = threads % directions ? threads : threads / directions;
    Barrier packed(threads);
    std::vector<std::unique_ptr<Meeting>> meetings;
    for (int d = 0; d < directions; ++d) meetings.emplace_back(new Meeting(shards));
    on_threads(threads, [&](int thread) {
        if (!by_units) {
            for (auto& layer : layers)
                if (!layer->is_packed()) layer->pack(thread, threads);
            packed.wait();
        }
        // The threads of a direction are all at its shards at the same time, so they can meet.
        for (int round = 0; round < directions * shards; round += threads) {
            const int d = shards == threads ? round / threads : thread % directions;
            const int number = shards == threads ? thread : thread / directions;
            try {
                layers[d]->run(number, shards, *meetings[d]);
            } catch (...) {
                for (auto& meeting : meetings) meeting->abandon();
                throw;
            }
        }
    });
}

// Packs the weights of a forward pass into `to`, for later passes with these weights. Returns the bytes that this takes; without `to`
// that is all.
template <typename T, template <typename> class Cell>
size_t pack_layer(Pass pass, void* to, int threads) {
    pass.T = 2, pass.packed = to;  // a single timestep would not pack them
    Layer<T, Cell> layer(pass, false);
    if (to) on_threads(threads, [&](int thread) { layer.pack(thread, threads); });
    return layer.size * sizeof(T);
}
