// What one thread works on in a time loop, for one instruction set: a part of time_loop.h.

// The row of timestep t and sequence b in an array [T, B, F] or [slots, B, F].
template <typename T>
INLINE T* row_at(void* array, const Pass& pass, int t, int b, ptrdiff_t F) {
    return (T*)array + ((ptrdiff_t)t * pass.B + b) * F;
}

INLINE bool is_marked(const Pass& pass, int t, int b, int bits) {
    return pass.marks && pass.marks[(ptrdiff_t)t * pass.B + b] & bits;
}

// The sequences and units of one thread, and its scratch memory. Sequences are sorted by length, the longest first; where there
// are marks, in each timestep anew.
template <typename T>
struct Shard {
    std::vector<int> sequences, in_order;  // of this timestep, and as they were dealt
    std::vector<const T*> operands;  // the rows that the next product reads
    std::vector<T> products, inner_products;
    // W_ih x of several timesteps. A product of many rows is faster, and its results stay in cache until they are used.
    std::vector<T> input_products;
    std::vector<int> first_row;  // of each of these timesteps in input_products
    AlignedBuffer<T> stages;     // of one sequence: what a cell with means holds from stage to stage
    int first_block, end_block;  // blocks of units, [first_block, end_block)
    int first_unit, end_unit;    // the units in them

    // Deals the sequences out in turn, so that every shard gets some of every length. It takes all units.
    Shard(const Pass& pass, int shard, int shards, int blocks)
        : first_block(0), end_block(blocks), first_unit(0), end_unit(pass.H) {
        std::vector<int> order(pass.B);
        for (int b = 0; b < pass.B; ++b) order[b] = b;
        if (pass.lengths && !pass.marks)
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return pass.lengths[a] > pass.lengths[b]; });
        for (int i = shard; i < pass.B; i += shards) sequences.push_back(order[i]);
        in_order = sequences;
        operands.resize(sequences.size());
    }

    // Takes only blocks of `units` units, part `number` of `shards`.
    void divide_units(int number, int shards, int units) {
        const int blocks = end_block;
        first_block = (int)((ptrdiff_t)blocks * number / shards), end_block = (int)((ptrdiff_t)blocks * (number + 1) / shards);
        first_unit = first_block * units, end_unit = std::min(end_unit, end_block * units);
    }

    // Puts the sequences that have a timestep t first, and returns their number.
    int arrange(const Pass& pass, int t) {
        int count = (int)sequences.size();
        if (pass.marks) {
            int from_end = count;
            count = 0;
            for (int b : in_order) sequences[is_marked(pass, t, b, HELD) ? --from_end : count++] = b;
            return count;
        }
        while (pass.lengths && count && pass.lengths[sequences[count - 1]] <= t) --count;
        return count;
    }
};

// Calls work(u, n) for each vector of the shard's units: n units from u on.
template <typename T, typename Work>
INLINE void for_each_vector(const Shard<T>& shard, const Work& work) {
    int u = shard.first_unit;
    for (; u + Vec<T>::lanes <= shard.end_unit; u += Vec<T>::lanes) work(u, Vec<T>::lanes);
    if (u < shard.end_unit) work(u, shard.end_unit - u);
}
