// What one thread works on in a time loop, for one instruction set: a part of time_loop.h.

// The row of timestep t and sequence b in an array [T, B, F] or [slots, B, F].
template <typename T>
INLINE T* row_at(void* array, const Pass& pass, int t, int b, ptrdiff_t F) {
    return (T*)array + ((ptrdiff_t)t * pass.B + b) * F;
}

// Numbers of `pass.dtype` in memory: `bytes` each.
struct Stored {
    char* at;
    int bytes;
    INLINE Stored operator+(ptrdiff_t n) const { return {at + n * bytes, bytes}; }
};

INLINE bool is_marked(const Pass& pass, int t, int b, int bits) {
    return pass.marks && pass.marks[(ptrdiff_t)t * pass.B + b] & bits;
}

// The sequences and units of one thread, and its scratch memory. Sequences are sorted by length, the longest first; where there
// are marks, in each timestep anew.
template <typename T>
struct Shard {
    std::vector<int> sequences, in_order;  // of this timestep, and as they were dealt
    std::vector<const T*> operands;  // the rows that the next product reads
    std::vector<const T*> old_h;     // the rows of h that this timestep reads
    std::vector<T> products, inner_products;
    std::vector<T> copied_inputs;  // of 16 bits: the rows that the product with W_ih reads
    AlignedBuffer<T> copies;       // likewise for each sequence a row that a product reads or the cell makes, then some of one sequence
    ptrdiff_t copied_row = 0;      // elements of these rows
    // W_ih x of several timesteps. A product of many rows is faster, and its results stay in cache until they are used.
    std::vector<T> input_products;
    std::vector<int> first_row;  // of each of these timesteps in input_products
    AlignedBuffer<T> stages;     // of one sequence: what a cell with means holds from stage to stage
    int first_unit, end_unit;    // [first_unit, end_unit)
    Meeting* meeting = nullptr;  // of the threads that have the other units of the same sequences

    // Deals the sequences out in turn, so that every shard gets some of every length. It takes all units.
    Shard(const Pass& pass, int shard, int shards) : first_unit(0), end_unit(pass.H) {
        std::vector<int> order(pass.B);
        for (int b = 0; b < pass.B; ++b) order[b] = b;
        if (pass.lengths && !pass.marks)
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return pass.lengths[a] > pass.lengths[b]; });
        for (int i = shard; i < pass.B; i += shards) sequences.push_back(order[i]);
        in_order = sequences;
        operands.resize(sequences.size());
        old_h.resize(sequences.size());
    }

    T* copy_of(int i) const { return copies.begin() + i * copied_row; }
    // Memory behind those rows.
    T* copy_of_one() const { return copy_of((int)sequences.size()); }

    // Takes only part `number` of `shards` of the units, in whole blocks of every `Packed`.
    void divide_units(int number, int shards) {
        constexpr int units = 2 * Vec<T>::lanes;
        const ptrdiff_t blocks = (end_unit + units - 1) / units;
        first_unit = std::min(end_unit, (int)(blocks * number / shards) * units);
        end_unit = std::min(end_unit, (int)(blocks * (number + 1) / shards) * units);
    }

    // Waits until every unit's results of this timestep are there.
    void meet() {
        if (meeting) meeting->wait();
    }

    // The end of the shard's elements of h, of which a projection has P.
    int end_of_h(int P) const { return std::min(end_unit, P); }

    // The blocks of a matrix whose outputs are the units, or the elements of h.
    template <typename Matrix>
    int first_block(const Matrix& packed) const { return first_unit / packed.units; }
    template <typename Matrix>
    int end_block(const Matrix& packed) const { return std::min(packed.blocks, (end_unit + packed.units - 1) / packed.units); }

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
