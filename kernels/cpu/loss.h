// Softmax cross-entropy over rows of logits, for one instruction set: ../sums/loss.cu, one row at a time. A part of
// parts.h.

// exp(x) for x <= 0, exact to 2 ulp. It is zero where the result would be subnormal (below 2^-126, in double 2^-1022). NaN
// stays NaN. The method is that of tanh in vector.h: 2^n exp(r), where x = n ln 2 + r.
template <typename T>
INLINE Vec<T> exp_nonpositive(Vec<T> x) {
    typedef typename Vec<T>::Lanes Lanes;
    constexpr bool is_double = sizeof(T) == 8;
    const Lanes lower = Lanes{} + T(is_double ? -708.0 : -87.0);  // ln 2^-1022 = -708.4, ln 2^-126 = -87.3
    typename Vec<T>::Ints n;
    const Lanes p = exp_series<T>(select<T>(x.v < lower, lower, x).v, n), power = power_of_two<T>(n);
    return select<T>(x.v < lower, Vec<T>(T(0)), power * p + power);
}

template <typename T>
INLINE double sum_of_lanes(Vec<T> x) {
    double sum = 0;
    for (int i = 0; i < Vec<T>::lanes; ++i) sum += x.v[i];
    return sum;
}

template <typename T>
void row_forward(const CrossEntropy& job, ptrdiff_t k) {
    typedef Vec<T> V;
    typedef Vec<double> D;
    constexpr int parts = V::lanes / D::lanes;  // vectors of double that hold one V
    const T* z = (const T*)job.logits + (job.rows ? job.rows[k] : k) * job.V;
    const T lowest = -std::numeric_limits<T>::infinity();
    V largest(lowest);
    for (ptrdiff_t v = 0; v < job.V; v += V::lanes)
        largest = larger(V::load(z + v, (int)std::min<ptrdiff_t>(V::lanes, job.V - v), lowest), largest);
    T highest = largest.v[0];
    for (int i = 1; i < V::lanes; ++i) highest = larger(T(largest.v[i]), highest);
    D sums[parts], shifts[parts];
    UNROLL for (int part = 0; part < parts; ++part) sums[part] = shifts[part] = D(0);
    for (ptrdiff_t v = 0; v < job.V; v += V::lanes) {
        const int count = (int)std::min<ptrdiff_t>(V::lanes, job.V - v);
        const V e = exp_nonpositive(V::load(z + v, count, lowest) - V(highest));
        UNROLL for (int part = 0; part < parts; ++part) {
            D x;
            UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = e.v[part * D::lanes + i];
            sums[part] += x;
        }
        if (job.smoothing == 0) continue;
        const V shift = V::load(z + v, count, highest) - V(highest);
        UNROLL for (int part = 0; part < parts; ++part) {
            D x;
            UNROLL for (int i = 0; i < D::lanes; ++i) x.v[i] = shift.v[part * D::lanes + i];
            shifts[part] += x;
        }
    }
    double total = 0, shift = 0;
    for (int part = 0; part < parts; ++part) {
        total += sum_of_lanes(sums[part]);
        shift += sum_of_lanes(shifts[part]);
    }
    double log_odds = double(T(z[job.labels[k]] - highest));
    if (job.smoothing != 0) log_odds = (1 - job.smoothing) * log_odds + job.smoothing * (shift / job.V);
    job.losses[k] = std::log(total) - log_odds;
    ((T*)job.highest)[k] = highest;
    job.total[k] = total;
}

template <typename T>
void row_backward(const CrossEntropy& job, ptrdiff_t k) {
    typedef Vec<T> V;
    const ptrdiff_t n = job.rows ? job.rows[k] : k;
    const T *z = (const T*)job.logits + n * job.V, scale = ((const T*)job.scale)[n];
    T* dlogits = (T*)job.dlogits + n * job.V;
    const V highest(((const T*)job.highest)[k]), factor(T(scale / job.total[k])), uniform(scale * T(job.smoothing / job.V));
    const bool smooth = job.smoothing != 0;
    for (ptrdiff_t v = 0; v < job.V; v += V::lanes) {
        const int count = (int)std::min<ptrdiff_t>(V::lanes, job.V - v);
        V dz = exp_nonpositive(V::load(z + v, count) - highest) * factor;
        if (smooth) dz = dz - uniform;
        dz.store(dlogits + v, count);
    }
    dlogits[job.labels[k]] -= scale * T(1 - job.smoothing);
}

template <typename T>
void cross_entropy_rows(const CrossEntropy& job, int threads, bool backward) {
    on_threads(threads, [&](int thread) {
        for (ptrdiff_t k = job.count * thread / threads; k < job.count * (thread + 1) / threads; ++k) {
            if (backward)
                row_backward<T>(job, k);
            else
                row_forward<T>(job, k);
        }
    });
}

void cross_entropy(const CrossEntropy* job, int threads, bool backward) {
    if (job->is_double)
        cross_entropy_rows<double>(*job, threads, backward);
    else
        cross_entropy_rows<float>(*job, threads, backward);
}
