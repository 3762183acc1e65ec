// Products of matrices and vectors for exported models, in C99; see functions.h. y = W x + bias, where bias may be NULL.
//
// A matrix is cut into stripes of 32 rows, then of 8, then one of what is left, each with its columns one after another: a
// compiler turns sums of a stripe into vectors without changing their order. Matrices whose x is quantized are row by row instead:
// sums of integers may have any order.

// The sums of a stripe.
static inline void gpurnn_stripe_float32(const float *w, size_t height, size_t columns, const float *x, float *sum) {
    for (size_t r = 0; r < height; ++r) sum[r] = 0.0f;
    for (size_t c = 0; c < columns; ++c) {
        for (size_t r = 0; r < height; ++r) sum[r] += w[height * c + r] * x[c];
    }
}

static inline void gpurnn_stripe_int8(const int8_t *w, size_t height, size_t columns, const float *x, float *sum) {
    for (size_t r = 0; r < height; ++r) sum[r] = 0.0f;
    for (size_t c = 0; c < columns; ++c) {
        for (size_t r = 0; r < height; ++r) sum[r] += (float)w[height * c + r] * x[c];
    }
}

// What a stripe begins with: how many rows, where so many are left.
static inline size_t gpurnn_height(size_t rows) {
    return rows >= 32 ? 32 : rows >= 8 ? 8 : rows;
}

static void gpurnn_product_float32(const float *w, size_t rows, size_t columns, const float *bias, const float *x, float *y) {
    float sum[32];
    for (size_t row = 0, height; row < rows; row += height, w += height * columns) {
        height = gpurnn_height(rows - row);
        if (height == 32) {  // the compiler knows this height
            gpurnn_stripe_float32(w, 32, columns, x, sum);
        } else {
            gpurnn_stripe_float32(w, height, columns, x, sum);
        }
        for (size_t r = 0; r < height; ++r) y[row + r] = bias ? sum[r] + bias[row + r] : sum[r];
    }
}

// scale: of each row.
static void gpurnn_product_int8(const int8_t *w, const float *scale, size_t rows, size_t columns, const float *bias, const float *x,
                                float *y) {
    float sum[32];
    for (size_t row = 0, height; row < rows; row += height, w += height * columns) {
        height = gpurnn_height(rows - row);
        if (height == 32) {
            gpurnn_stripe_int8(w, 32, columns, x, sum);
        } else {
            gpurnn_stripe_int8(w, height, columns, x, sum);
        }
        for (size_t r = 0; r < height; ++r) {
            const float product = scale[row + r] * sum[r];
            y[row + r] = bias ? product + bias[row + r] : product;
        }
    }
}

// Sets q to whole numbers from -most to most and returns what they count, so that x is about result * q. NaN makes it NaN.
static float gpurnn_quantize(const float *x, size_t columns, float most, int16_t *q) {
    float largest = 0.0f;
    for (size_t c = 0; c < columns; ++c) {
        const float a = gpurnn_fabs(x[c]);
        largest = a > largest || a != a ? a : largest;
    }
    const float each = largest / most;
    for (size_t c = 0; c < columns; ++c) {
        const float a = each > 0.0f ? gpurnn_limited(x[c] / each, most) : 0.0f;
        q[c] = (int16_t)(a + (a < 0.0f ? -0.5f : 0.5f));
    }
    return each;
}

// x: whole numbers that count ``each``, so small that no sum is beyond 31 bits.
static void gpurnn_product_int16(const int8_t *w, const float *scale, size_t rows, size_t columns, const float *bias,
                                 const int16_t *x, float each, float *y) {
    for (size_t row = 0; row < rows; ++row, w += columns) {
        int32_t sum = 0;
        for (size_t c = 0; c < columns; ++c) sum += (int32_t)w[c] * (int32_t)x[c];
        const float product = scale[row] * each * (float)sum;
        y[row] = bias ? product + bias[row] : product;
    }
}

// Matrices of which only some blocks of 8 rows and 4 columns are stored, each column by column: blocks has for each 8 rows how
// many there are, then their places, counted in blocks. The last rows and columns may make smaller blocks.
static inline size_t gpurnn_up_to(size_t left, size_t most) {
    return left < most ? left : most;
}

// Adds the products of a block to the sums of its rows. GCC would turn the short loop into single numbers, not into vectors.
static inline void gpurnn_block(const float *w, size_t height, size_t width, const float *x, float *sum) {
    if (height == 8 && width == 4) {
        GPURNN_LOOP
        for (size_t r = 0; r < 8; ++r) sum[r] += (w[r] * x[0] + w[8 + r] * x[1]) + (w[16 + r] * x[2] + w[24 + r] * x[3]);
        return;
    }
    for (size_t c = 0; c < width; ++c) {
        for (size_t r = 0; r < height; ++r) sum[r] += w[height * c + r] * x[c];
    }
}

static void gpurnn_blocks_float32(const float *w, const uint16_t *blocks, size_t rows, size_t columns, const float *bias,
                                  const float *x, float *y) {
    for (size_t row = 0; row < rows; row += 8) {
        const size_t height = gpurnn_up_to(rows - row, 8), count = *blocks++;
        float sum[8] = {0.0f};
        for (size_t b = 0; b < count; ++b) {
            const size_t first = (size_t)4 * *blocks++, width = gpurnn_up_to(columns - first, 4);
            gpurnn_block(w, height, width, x + first, sum);
            w += height * width;
        }
        for (size_t r = 0; r < height; ++r) y[row + r] = bias ? sum[r] + bias[row + r] : sum[r];
    }
}

// A block as floats.
static inline void gpurnn_unpack(const int8_t *w, size_t n, float *unpacked) {
    if (n == 32) {
        for (size_t k = 0; k < 32; ++k) unpacked[k] = (float)w[k];
    } else {
        for (size_t k = 0; k < n; ++k) unpacked[k] = (float)w[k];
    }
}

static void gpurnn_blocks_int8(const int8_t *w, const float *scale, const uint16_t *blocks, size_t rows, size_t columns,
                               const float *bias, const float *x, float *y) {
    for (size_t row = 0; row < rows; row += 8) {
        const size_t height = gpurnn_up_to(rows - row, 8), count = *blocks++;
        float sum[8] = {0.0f}, unpacked[32];
        for (size_t b = 0; b < count; ++b) {
            const size_t first = (size_t)4 * *blocks++, width = gpurnn_up_to(columns - first, 4);
            gpurnn_unpack(w, height * width, unpacked);
            gpurnn_block(unpacked, height, width, x + first, sum);
            w += height * width;
        }
        for (size_t r = 0; r < height; ++r) {
            const float product = scale[row + r] * sum[r];
            y[row + r] = bias ? product + bias[row + r] : product;
        }
    }
}

static inline void gpurnn_whole_block(const int8_t *w, size_t height, size_t width, const int16_t *x, int32_t *sum) {
    int32_t part[32];
    if (height == 8 && width == 4) {
        for (size_t k = 0; k < 32; ++k) part[k] = w[k];
        GPURNN_LOOP
        for (size_t r = 0; r < 8; ++r) sum[r] += part[r] * x[0] + part[8 + r] * x[1] + part[16 + r] * x[2] + part[24 + r] * x[3];
        return;
    }
    for (size_t c = 0; c < width; ++c) {
        for (size_t r = 0; r < height; ++r) sum[r] += w[height * c + r] * x[c];
    }
}

static void gpurnn_blocks_int16(const int8_t *w, const float *scale, const uint16_t *blocks, size_t rows, size_t columns,
                                const float *bias, const int16_t *x, float each, float *y) {
    for (size_t row = 0; row < rows; row += 8) {
        const size_t height = gpurnn_up_to(rows - row, 8), count = *blocks++;
        int32_t sum[8] = {0};
        for (size_t b = 0; b < count; ++b) {
            const size_t first = (size_t)4 * *blocks++, width = gpurnn_up_to(columns - first, 4);
            gpurnn_whole_block(w, height, width, x + first, sum);
            w += height * width;
        }
        for (size_t r = 0; r < height; ++r) {
            const float product = scale[row + r] * each * (float)sum[r];
            y[row + r] = bias ? product + bias[row + r] : product;
        }
    }
}

// Where a row of a matrix of stripes begins, and how far apart its numbers are.
static size_t gpurnn_row_of_stripes(size_t rows, size_t columns, size_t row, size_t *apart) {
    size_t first = 0;
    while (first + gpurnn_height(rows - first) <= row) first += gpurnn_height(rows - first);
    *apart = gpurnn_height(rows - first);
    return first * columns + (row - first);
}

static void gpurnn_row_float32(const float *w, size_t apart, size_t columns, float *y) {
    for (size_t c = 0; c < columns; ++c) y[c] = w[apart * c];
}

static void gpurnn_row_int8(const int8_t *w, float scale, size_t apart, size_t columns, float *y) {
    for (size_t c = 0; c < columns; ++c) y[c] = scale * (float)w[apart * c];
}

// The mean of n numbers, in 16 sums.
static float gpurnn_mean(const float *x, size_t n) {
    float sum[16] = {0.0f};
    for (size_t k = 0; k < n; ++k) sum[k % 16] += x[k];
    for (size_t k = 8; k > 0; k /= 2) {
        for (size_t j = 0; j < k; ++j) sum[j] += sum[j + k];
    }
    return sum[0] / (float)n;
}
