/* What lies between the matrix products of Llama-like blocks, and its gradients, in float32. Called by
   compiled_layers.py. Each row is one pass over memory, and its result does not depend on the rows beside it or on how
   many threads there are. Rows are dense if nothing else is said. */

#include "vectors.h"

/* y[n, size] = norm * x / sqrt(mean(x^2) + eps); scales[n] are the factors. */
void norm_forward(const float *x, int64_t n, int64_t size, const float *norm, float eps, float *y, float *scales,
                  int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row++) {
        const float *from = x + row * size;
        float *to = y + row * size, scale = scales[row] = scale_of(from, size, eps);
        for (int64_t i = 0; i < size; i++) to[i] = norm[i] * (from[i] * scale);
    }
}

/* The gradient of x, and that of the norm in parts [n / part, size], each the sum over `part` rows. */
void norm_backward(const float *grad, const float *x, int64_t n, int64_t size, const float *norm, const float *scales,
                   float *of_x, float *of_norm, int64_t part, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t first = 0; first < n; first += part) {
        float *sums = of_norm + first / part * size;
        memset(sums, 0, sizeof *sums * (size_t)size);
        for (int64_t row = first; row < n && row < first + part; row++) {
            const float *from = x + row * size, *given = grad + row * size;
            float *to = of_x + row * size, scale = scales[row];
            for (int64_t i = 0; i < size; i++) to[i] = norm[i] * given[i], sums[i] += given[i] * (from[i] * scale);
            float along = dot(to, from, size) / (float)size * scale * scale;
            for (int64_t i = 0; i < size; i++) to[i] = scale * (to[i] - along * from[i]);
        }
    }
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(x < -87.0f ? 87.0f : -x)); }

/* y = silu(gate) * up, of `num` entries. */
void gate_forward(const float *gate, const float *up, int64_t num, float *y, int64_t threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < num; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}

void gate_backward(const float *grad, const float *gate, const float *up, int64_t num, float *of_gate, float *of_up,
                   int64_t threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads)
    for (int64_t i = 0; i < num; i++) {
        float open = sigmoid(gate[i]);
        of_up[i] = grad[i] * gate[i] * open;
        of_gate[i] = grad[i] * up[i] * open * (1.0f + gate[i] * (1.0f - open));
    }
}

/* y[n, heads, size] = x, of which tokens and heads are `token` and `head` apart, with the pairs (i, i + size / 2) rotated
   by cos and sin [n, size]; `back` is the transposed rotation. */
void turn(const float *x, int64_t token, int64_t head, int64_t n, int64_t heads, int64_t size, const float *cos,
          const float *sin, int64_t back, float *y, int64_t threads) {
    int64_t half = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row++)
        for (int64_t h = 0; h < heads; h++) {
            const float *low = x + row * token + h * head, *high = low + half, *c = cos + row * size;
            const float *s = sin + row * size, *first = back ? s + half : s, *second = back ? s : s + half;
            float *to = y + (row * heads + h) * size, sign = back ? -1.0f : 1.0f;
            for (int64_t i = 0; i < half; i++) {
                to[i] = low[i] * c[i] - sign * high[i] * first[i];
                to[half + i] = high[i] * c[half + i] + sign * low[i] * second[i];
            }
        }
}
