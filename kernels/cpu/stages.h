// A cell on one vector of units after another; where it averages over all units of a sequence, in stages. A part of time_loop.h.

// A sum over units, in double. Its order is that of the units, whatever number of threads there is.
template <typename T>
struct UnitSum {
    typedef typename Raw<T>::Doubles Doubles;
    Doubles total = {};

    // Adds the first n lanes.
    INLINE void add(Vec<T> x, int n) {
        for (int i = n; i < Vec<T>::lanes; ++i) x.v[i] = 0;
        total += __builtin_convertvector(x.v, Doubles);
    }
    INLINE double sum() const {
        double sum = 0;
        for (int i = 0; i < Vec<T>::lanes; ++i) sum += total[i];
        return sum;
    }
};

// What the two passes of a cell call their stages.
template <typename T, template <typename> class Cell>
struct ForwardStages {
    typedef Cell<Vec<T>> C;
    typedef ForwardIn<C, Vec<T>> In;
    typedef ForwardOut<C, Vec<T>> Out;
    static constexpr int stages = C::stages, means = C::means;
    static constexpr int means_of(int stage) { return stages > 1 ? C::means_of(stage) : 0; }
    template <int stage>
    static INLINE void run(const In& in, Out& out) {
        forward_stage<stage, C>(in, out);
    }
};
template <typename T, template <typename> class Cell>
struct BackwardStages {
    typedef Cell<Vec<T>> C;
    typedef BackwardIn<C, Vec<T>> In;
    typedef BackwardOut<C, Vec<T>> Out;
    static constexpr int stages = C::back_stages, means = C::back_means;
    static constexpr int means_of(int stage) { return stages > 1 ? C::back_means_of(stage) : 0; }
    template <int stage>
    static INLINE void run(const In& in, Out& out) {
        backward_stage<stage, C>(in, out);
    }
};

// Runs a stage and those after it for all units of one sequence. `outs` holds every unit's Out from stage to stage. known: the
// means of the stages before.
template <typename Stages, int stage, int known, typename T, typename Load>
INLINE void run_stages(const Shard<T>& shard, typename Stages::Out* outs, T* means, const Load& load) {
    constexpr int count = Stages::means_of(stage), lanes = Vec<T>::lanes;
    UnitSum<T> sums[some(count)];
    for (int u = 0; u < shard.end_unit; u += lanes) {
        const int n = std::min(lanes, shard.end_unit - u);
        typename Stages::In in;
        load(in, u, n);
        UNROLL for (int k = 0; k < known; ++k) in.mean[k] = Vec<T>(means[k]);
        Stages::template run<stage>(in, outs[u / lanes]);
        UNROLL for (int k = 0; k < count; ++k) sums[k].add(outs[u / lanes].sum[known + k], n);
    }
    for (int k = 0; k < count; ++k) means[known + k] = (T)(sums[k].sum() / shard.end_unit);
    if constexpr (stage + 1 < Stages::stages) run_stages<Stages, stage + 1, known + count>(shard, outs, means, load);
}

// Applies a cell to all units of one sequence. load(in, u, n) and store(out, u, n) are for n units from u on.
template <typename Stages, typename T, typename Load, typename Store>
INLINE void apply_to_units(const Shard<T>& shard, const Load& load, const Store& store) {
    if constexpr (Stages::stages == 1) {
        for_each_vector(shard, [&](int u, int n) INLINE_LAMBDA {
            typename Stages::In in;
            typename Stages::Out out;
            load(in, u, n);
            Stages::template run<0>(in, out);
            store(out, u, n);
        });
    } else {
        typename Stages::Out* outs = (typename Stages::Out*)shard.stages.begin();
        T means[Stages::means];
        run_stages<Stages, 0, 0>(shard, outs, means, load);
        for_each_vector(shard, [&](int u, int n) { store(outs[u / Vec<T>::lanes], u, n); });
    }
}
