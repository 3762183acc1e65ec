// The optimisers' update of a parameter: of one number, or on a CPU of a vector. gpurnn/optim/ has the same in array code,
// operation by operation.
//
// A file that includes this defines mul, add, subtract, quotient and root first. optimize.cu rounds after each of them, so
// that a GPU gives the bits of the array code; a CPU may fuse a product with a sum.
//
// Python computes the scalars, such as 1 - beta, in the order of Optimizer._scalars. A state that an optimiser does not use
// may be any number.

// decay * average + (1 - decay) * value
template <typename V>
DEVICE V averaged(V average, V value, V decay, V rest) {
    return add(mul(average, decay), mul(value, rest));
}

// The same for the square of a value. The factor is multiplied first, so that the square overflows as late as possible.
template <typename V>
DEVICE V averaged_square(V average, V value, V decay, V rest) {
    return add(mul(average, decay), mul(mul(value, rest), value));
}

template <typename V>
struct Sgd {
    bool first;            // step 1: the buffer takes the gradient
    bool nesterov;
    bool buffered;         // with momentum
    bool decays;           // whether weight_decay is not 0
    V lr, momentum;
    V undamped;            // 1 - dampening
    V weight_decay;

    DEVICE void update(V& p, V g, V& buffer) const {
        if (decays) g = add(mul(p, weight_decay), g);
        if (buffered) {
            buffer = first ? g : add(mul(buffer, momentum), mul(g, undamped));
            g = nesterov ? add(mul(buffer, momentum), g) : buffer;
        }
        p = subtract(p, mul(g, lr));
    }
};

template <typename V>
struct RmsProp {
    bool centered, buffered, decays;
    V lr, alpha;
    V rest;                // 1 - alpha
    V eps, momentum, weight_decay;
    V most;                // the largest finite number

    DEVICE void update(V& p, V g, V& square_avg, V& grad_avg, V& buffer) const {
        if (decays) g = add(mul(p, weight_decay), g);
        V v = square_avg = averaged_square(square_avg, g, alpha, rest);
        if (centered) {
            grad_avg = averaged(grad_avg, g, alpha, rest);
            v = relu(add(v, larger(mul(subtract(V(0), grad_avg), grad_avg), subtract(V(0), most))));  // inf - inf would be NaN
        }
        V step = quotient(g, add(root(v), eps));
        if (buffered) step = buffer = add(mul(buffer, momentum), step);
        p = subtract(p, mul(step, lr));
    }
};

template <typename V>
struct Adam {
    bool amsgrad, decays;
    V shrink;              // 1 - lr * weight_decay where that is decoupled (AdamW), else 1
    V weight_decay;        // 0 where it is decoupled
    V beta1;
    V rest1;               // 1 - beta1
    V beta2;
    V rest2;               // 1 - beta2
    V eps;                 // times sqrt(1 - beta2^step)
    V rate;                // lr sqrt(1 - beta2^step) / (1 - beta1^step)

    DEVICE void update(V& p, V g, V& exp_avg, V& exp_avg_sq, V& largest) const {
        p = mul(p, shrink);
        if (decays) g = add(mul(p, weight_decay), g);
        exp_avg = averaged(exp_avg, g, beta1, rest1);
        V v = exp_avg_sq = averaged_square(exp_avg_sq, g, beta2, rest2);
        if (amsgrad) v = largest = larger(v, largest);
        p = subtract(p, mul(quotient(exp_avg, add(root(v), eps)), rate));
    }
};
