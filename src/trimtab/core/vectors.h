/* What compiled kernels have in common: the vectors of the processor, e^x and sums over a row. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16 };
#elif defined(__AVX__)
enum { LANES = 8 };
#else
enum { LANES = 4 };
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* e^x for x <= 88, within 2 units in the last place: 2^n times a polynomial (minimax, as in Cephes' expf). */
static inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f), r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return p * power;
}

/* a . b, of which the lanes are added one after the other. */
static inline float dot(const float *a, const float *b, int64_t n) {
    vec even = {0}, odd = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= n; i += 2 * LANES) {
        even += *(const loose *)(a + i) * *(const loose *)(b + i);
        odd += *(const loose *)(a + i + LANES) * *(const loose *)(b + i + LANES);
    }
    vec lanes = even + odd;
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

/* By what a norm multiplies a row: 1 / sqrt(mean(row^2) + eps). */
static inline float scale_of(const float *row, int64_t n, float eps) {
    return 1.0f / sqrtf(dot(row, row, n) / (float)n + eps);
}
