// Softmax cross-entropy over rows of logits, for one kind of processor: what ../loss.cu says, a row at a time. A part of time_loop.h.

// exp(x) of x <= 0, exact to a last place or two; zero below 2^-126 or 2^-1022; NaN stays NaN.
//
// The way of tanh in vector.h: 2^n exp(r) with x = n ln 2 + r.
template <typename T>
INLINE Vec<T> exp_down(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    constexpr bool is_double = sizeof(T) == 8;
    const Lanes least = Lanes{} + T(is_double ? -708.0 : -87.0);
    Lanes power;
    const Lanes p = series<T>(pick<T>(x.v < least, least, x).v, power);
    return pick<T>(x.v < least, Vec<T>(T(0)), power * p + power);
}

template <typename T>
INLINE double sum_of(Vec<T> x) {
    double sum = 0;
    for (int i = 0; i < Vec<T>::lanes; ++i) sum += x.v[i];
    return sum;
}

template <typename T>
void row_forward(const CrossEntropy& job, ptrdiff_t k) {
    typedef Vec<T> V;
    typedef Vec<double> D;
    constexpr int halves = V::lanes / D::lanes;
    const T* z = (const T*)job.logits + (job.rows ? job.rows[k] : k) * job.V;
    const T none = -std::numeric_limits<T>::infinity();
    V most(none);
    for (ptrdiff_t v = 0; v < job.V; v += V::lanes)
        most = larger(V::load(z + v, (int)std::min<ptrdiff_t>(V::lanes, job.V - v), none), most);
    T high = most.v[0];
    for (int i = 1; i < V::lanes; ++i) high = larger(T(most.v[i]), high);
    D sums[halves], shifts[halves];
    UNROLL for (int half = 0; half < halves; ++half) sums[half] = shifts[half] = D(0);
    for (ptrdiff_t v = 0; v < job.V; v += V::lanes) {
        const int count = (int)std::min<ptrdiff_t>(V::lanes, job.V - v);
        const V e = exp_down(V::load(z + v, count, none) - V(high));
        UNROLL for (int half = 0; half < halves; ++half) {
            D x;
            UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = e.v[half * D::lanes + i];
            sums[half] += x;
        }
        if (job.smoothing == 0) continue;
        const V shift = V::load(z + v, count, high) - V(high);
        UNROLL for (int half = 0; half < halves; ++half) {
            D x;
            UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = shift.v[half * D::lanes + i];
            shifts[half] += x;
        }
    }
    double total = 0, shift = 0;
    for (int half = 0; half < halves; ++half) {
        total += sum_of(sums[half]);
        shift += sum_of(shifts[half]);
    }
    double log_odds = double(T(z[job.labels[k]] - high));
    if (job.smoothing != 0) log_odds = (1 - job.smoothing) * log_odds + job.smoothing * (shift / job.V);
    job.losses[k] = std::log(total) - log_odds;
    ((T*)job.highest)[k] = high;
    job.total[k] = total;
}

template <typename T>
void row_backward(const CrossEntropy& job, ptrdiff_t k) {
    typedef Vec<T> V;
    const ptrdiff_t n = job.rows ? job.rows[k] : k;
    const T *z = (const T*)job.logits + n * job.V, scale = ((const T*)job.scale)[n];
    T* d = (T*)job.dlogits + n * job.V;
    const V high(((const T*)job.highest)[k]), factor(T(scale / job.total[k])), spread(scale * T(job.smoothing / job.V));
    const bool smooth = job.smoothing != 0;
    for (ptrdiff_t v = 0; v < job.V; v += V::lanes) {
        const int count = (int)std::min<ptrdiff_t>(V::lanes, job.V - v);
        V by = exp_down(V::load(z + v, count) - high) * factor;
        if (smooth) by = by - spread;
        by.store(d + v, count);
    }
    d[job.labels[k]] -= scale * T(1 - job.smoothing);
}

template <typename T>
void rows_any(const CrossEntropy& job, int threads, bool back) {
    on_threads(threads, [&](int thread) {
        for (ptrdiff_t k = job.count * thread / threads; k < job.count * (thread + 1) / threads; ++k) {
            if (back)
                row_backward<T>(job, k);
            else
                row_forward<T>(job, k);
        }
    });
}

void cross_entropy(const CrossEntropy* job, int threads, bool back) {
    if (job->is_double)
        rows_any<double>(*job, threads, back);
    else
        rows_any<float>(*job, threads, back);
}
