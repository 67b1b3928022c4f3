/* What a decoding step computes for a few rows: products, rotated queries and keys, attention. Called by kernels.py.

   Everything is float32 and dense, but that products, and those of queries with keys, may have operands of bfloat16, in
   pairs of 32 bits, on processors that multiply those. A result depends on its own row alone, not on how many rows or
   threads there are. */

#include "vectors.h"

#if defined(__AVX512F__) && defined(__AVX512VL__) && defined(__AVX512BF16__)
#define HAS_BFLOAT16 1
#include <immintrin.h>
#else
#define HAS_BFLOAT16 0
#endif

typedef float half_vec __attribute__((vector_size(2 * LANES)));
typedef float loose_half __attribute__((vector_size(2 * LANES), aligned(4), may_alias));
typedef uint32_t bits_vec __attribute__((vector_size(4 * LANES)));
typedef uint16_t loose_upper __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

enum { MOST_OUTS = 6, MOST_VECS = 3, WIDEST = MOST_VECS * LANES, CHUNK = 64, LINE = 16 };
enum { PLAIN = 0, NORMED = 1, GATED = 2 };

static inline float silu(float x) { return x / (1.0f + exponential(x < -87.0f ? 87.0f : -x)); }

/* An even number of entries as bfloat16, rounded to the nearest, of ties to the even: words of two, of which the first
   is the lower half. What is not a number stays so: adding to its bits could carry it over to a zero. */
typedef uint16_t loose_short __attribute__((may_alias));
static inline void to_pairs(const float *restrict x, int64_t num, float *restrict words) {
    loose_short *halves = (loose_short *)words;
    for (int64_t i = 0; i < num; i++) {
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        halves[i] = (uint16_t)((bits & 0x7fffffff) <= 0x7f800000 ? rounded : 0x7fc0);
    }
}

/* Entries of a row in the form it is multiplied in: itself, its norm, or silu of them times those k further on. */
static inline void prepare(const float *x, int64_t k, int64_t size, int64_t form, const float *norm, float scale,
                           float *made) {
    if (form == NORMED)
        for (int64_t i = 0; i < size; i++) made[i] = x[i] * scale * norm[i];
    else if (form == GATED)
        for (int64_t i = 0; i < size; i++) made[i] = silu(x[i]) * x[k + i];
    else
        memcpy(made, x, sizeof *x * (size_t)size);
}

/* OUTS rows of weights times the first HALVES half vectors of the WIDE vectors of columns; the rows of weights behind
   them are fetched meanwhile. A processor that multiplies wide vectors in two parts is done sooner with a half.

   Twelve sums stand in registers, if there are as many. They stay there because this is a function of its own, and
   because the columns are volatile: each is read once and kept, where the compiler would read it again for each row of
   weights. */
typedef void multiplier(const float *const *w, const float *columns, int64_t k, const float *ahead,
                        float done[MOST_OUTS][WIDEST]);
#define MULTIPLIER(NAME, OUTS, HALVES, WIDE, ADD, ADD_HALF)                                                            \
    static __attribute__((noinline)) void NAME(const float *const *w, const float *columns, int64_t k,                 \
                                               const float *ahead, float done[MOST_OUTS][WIDEST]) {                    \
        enum { VECS = HALVES / 2, HALF = HALVES % 2 };                                                                 \
        vec sums[OUTS][VECS + 1] = {0}, kept[VECS + 1];                                                                \
        half_vec last[OUTS] = {0}, kept_half = {0};                                                                    \
        for (int64_t i = 0; i < k; i++, columns += WIDE * LANES) {                                                     \
            if (ahead && i % LINE == 0)                                                                                \
                for (int o = 0; o < OUTS; o++) __builtin_prefetch(ahead + o * k + i);                                  \
            for (int v = 0; v < VECS; v++) kept[v] = *(const volatile vec *)(columns + v * LANES);                     \
            if (HALF) kept_half = *(const volatile half_vec *)(columns + VECS * LANES);                                \
            for (int o = 0; o < OUTS; o++) {                                                                           \
                for (int v = 0; v < VECS; v++) ADD(sums[o][v], kept[v], w[o][i]);                                      \
                if (HALF) ADD_HALF(last[o], kept_half, w[o][i]);                                                       \
            }                                                                                                          \
        }                                                                                                              \
        for (int o = 0; o < OUTS; o++) {                                                                               \
            for (int v = 0; v < VECS; v++) *(loose *)(done[o] + v * LANES) = sums[o][v];                               \
            if (HALF) *(loose_half *)(done[o] + VECS * LANES) = last[o];                                               \
        }                                                                                                              \
    }
/* One for each number of half vectors that the rows of a tile fill; see product for the tiles. */
#define MULTIPLIERS(NAME, ADD, ADD_HALF)                                                                               \
    MULTIPLIER(NAME##_1, 6, 1, 2, ADD, ADD_HALF)                                                                       \
    MULTIPLIER(NAME##_2, 6, 2, 2, ADD, ADD_HALF)                                                                       \
    MULTIPLIER(NAME##_3, 6, 3, 2, ADD, ADD_HALF)                                                                       \
    MULTIPLIER(NAME##_4, 6, 4, 2, ADD, ADD_HALF)                                                                       \
    MULTIPLIER(NAME##_5, 4, 5, 3, ADD, ADD_HALF)                                                                       \
    MULTIPLIER(NAME##_6, 4, 6, 3, ADD, ADD_HALF)                                                                       \
    static multiplier *const NAME[] = {NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6};
#define ADD_PRODUCT(SUM, COLUMN, WEIGHT) SUM += COLUMN * WEIGHT
MULTIPLIERS(multiply_numbers, ADD_PRODUCT, ADD_PRODUCT)
#if HAS_BFLOAT16
#define ADD_PAIR(SUM, COLUMN, WEIGHT)                                                                                  \
    SUM = (vec)_mm512_dpbf16_ps((__m512)SUM, (__m512bh)COLUMN, (__m512bh)_mm512_set1_ps(WEIGHT))
#define ADD_PAIR_TO_HALF(SUM, COLUMN, WEIGHT)                                                                          \
    SUM = (half_vec)_mm256_dpbf16_ps((__m256)SUM, (__m256bh)COLUMN, (__m256bh)_mm256_set1_ps(WEIGHT))
#else
#define PAIR_ADDER(NAME, VEC, INTS)                                                                                    \
    static inline VEC NAME(VEC sum, VEC column, float weight) {                                                        \
        int32_t pair;                                                                                                  \
        memcpy(&pair, &weight, sizeof pair);                                                                           \
        INTS columns = (INTS)column, weights = columns - columns + pair, upper = columns - columns - 65536;            \
        return sum + (VEC)(columns << 16) * (VEC)(weights << 16) + (VEC)(columns & upper) * (VEC)(weights & upper);    \
    }
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef int32_t half_ints __attribute__((vector_size(2 * LANES)));
PAIR_ADDER(add_pair, vec, ints)
PAIR_ADDER(add_pair_to_half, half_vec, half_ints)
#define ADD_PAIR(SUM, COLUMN, WEIGHT) SUM = add_pair(SUM, COLUMN, WEIGHT)
#define ADD_PAIR_TO_HALF(SUM, COLUMN, WEIGHT) SUM = add_pair_to_half(SUM, COLUMN, WEIGHT)
#endif
MULTIPLIERS(multiply_pairs, ADD_PAIR, ADD_PAIR_TO_HALF)

/* Whether the processor multiplies pairs itself, which is then twice as fast as float32; else it is slower. */
int64_t multiplies_pairs(void) { return HAS_BFLOAT16; }

/* Columns of results to rows: to[r * width + o] = done[o][r], plus the bias, plus what is there where `add`. */
static inline __attribute__((always_inline)) void store(float done[MOST_OUTS][WIDEST], int64_t rows, int outs,
                                                        int64_t valid, const float *bias, int64_t add, float *to,
                                                        int64_t width) {
    for (int64_t r = 0; r < rows; r++, to += width) {
        if (add)
            for (int o = 0; o < outs; o++) done[o][r] += o < valid ? to[o] : 0;
        if (bias)
            for (int o = 0; o < outs; o++) done[o][r] += o < valid ? bias[o] : 0;
        if (valid == outs)
            for (int o = 0; o < outs; o++) to[o] = done[o][r];
        else
            for (int o = 0; o < valid; o++) to[o] = done[o][r];
    }
}

/* One matrix [outs, k] times the tiles of `vecs` vectors of rows that stand in `room`, `many` outs at a time, as all
   multipliers for tiles of that height have it; see product. */
static inline __attribute__((always_inline)) void multiply(const float *weights, const float *bias, int64_t outs,
                                                           int64_t k, int vecs, int many,
                                                           multiplier *const *multipliers, const float *room, int64_t n,
                                                           float *y, int64_t width, int64_t add) {
    int64_t wide = vecs * LANES, blocks = (outs + many - 1) / many;
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks; block++) {
        int64_t out = block * many, valid = outs - out < many ? outs - out : many;
        const float *w[MOST_OUTS], *next = block + 1 < blocks ? weights + (out + many) * k : NULL;
        for (int o = 0; o < many; o++) w[o] = weights + (o < valid ? out + o : out) * k;
        for (int64_t row = 0; row < n; row += wide) {
            int64_t rows = n - row < wide ? n - row : wide;
            float done[MOST_OUTS][WIDEST];
            multipliers[(2 * rows - 1) / LANES](w, room + row * k, k, row ? NULL : next, done);
            store(done, rows, many, valid, bias ? bias + out : NULL, add, y + row * width + out, width);
        }
    }
}

/* y[n, sum of outs] = or += prepared x[n, k] times the matrices [outs[m], k] transposed, side by side.

   Rows stand in the lanes: `room`, aligned, holds k columns of the rows of each tile, and behind them a scale for each
   row; each weight is read once, where the model has it, and multiplied with all rows. A tile is two vectors of rows,
   or three where those hold all rows. With `pairs` the weights are bfloat16, and x is rounded to it: two entries, of
   which there must be an even number, are one word of 32 bits. */
void product(const float *x, int64_t n, int64_t k, int64_t form, const float *norm, float eps, int64_t matrices,
             const float *const *weights, const float *const *biases, const int64_t *outs, float *y, int64_t add,
             float *room, int64_t pairs, int64_t threads) {
    int64_t words = pairs ? k / 2 : k;
    int64_t vecs = (n + LANES - 1) / LANES, height = vecs == 3 ? 3 : 2, wide = height * LANES;
    int64_t tiles = (n + wide - 1) / wide, parts = (k + CHUNK - 1) / CHUNK, stride = form == GATED ? 2 * k : k;
    int64_t width = 0;
    for (int64_t m = 0; m < matrices; m++) width += outs[m];
    float *scales = room + tiles * wide * words;
#pragma omp parallel num_threads(threads)
    {
        if (form == NORMED) {
#pragma omp for schedule(static)
            for (int64_t r = 0; r < n; r++) scales[r] = scale_of(x + r * stride, k, eps);
        }
#pragma omp for schedule(static)
        for (int64_t task = 0; task < tiles * parts; task++) {
            int64_t first = task / parts * wide, from = task % parts * CHUNK;
            int64_t size = k - from < CHUNK ? k - from : CHUNK, many = pairs ? size / 2 : size;
            float *to = room + first * words + (pairs ? from / 2 : from) * wide, made[CHUNK] = {0}, rounded[CHUNK / 2];
            for (int64_t r = first; r < first + wide; r++, to++) {
                if (r < n) prepare(x + r * stride + from, k, size, form, norm ? norm + from : NULL, scales[r], made);
                else memset(made, 0, sizeof made);
                if (pairs) to_pairs(made, size, rounded);
                for (int64_t i = 0; i < many; i++) to[i * wide] = pairs ? rounded[i] : made[i];
            }
        }
        for (int64_t m = 0, first = 0; m < matrices; first += outs[m++]) {
            const float *w = weights[m], *bias = biases[m];
            multiplier *const *multipliers = pairs ? multiply_pairs : multiply_numbers;
            if (height == 3)
                multiply(w, bias, outs[m], words, 3, 4, multipliers, room, n, y + first, width, add);
            else
                multiply(w, bias, outs[m], words, 2, 6, multipliers, room, n, y + first, width, add);
        }
    }
}

/* The first `heads` heads of every row of x[n, width], in place: normed where there is a norm [heads, size], and
   rotated by cos and sin [n, size]. */
void rotate(float *x, int64_t n, int64_t width, int64_t heads, int64_t size, const float *norm, float eps,
            const float *cos, const float *sin, int64_t threads) {
    int64_t half = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < n; row++)
        for (int64_t head = 0; head < heads; head++) {
            float *low = x + row * width + head * size, *high = low + half;
            const float *c = cos + row * size, *s = sin + row * size;
            if (norm) {
                float scale = scale_of(low, size, eps);
                for (int64_t i = 0; i < size; i++) low[i] *= scale * norm[head * size + i];
            }
            for (int64_t i = 0; i < half; i++) {
                float a = low[i], b = high[i];
                low[i] = a * c[i] - b * s[i];
                high[i] = b * c[half + i] + a * s[half + i];
            }
        }
}

/* Keys stand in blocks of this many tokens, and in a block one entry of all its tokens is side by side, or one pair of
   entries where they are bfloat16: a score is then a lane, and no lanes are added up. Values stand token by token. */
enum { BLOCK = 16 };

static inline int64_t block_before(int64_t t) { return t / BLOCK * BLOCK; }
static inline int64_t block_after(int64_t t) { return block_before(t + BLOCK - 1); }

/* Fetches what is read next: keys and values are larger than the processor's caches. */
static inline void fetch(const float *from, int64_t num) {
    for (int64_t i = 0; i < num; i += LINE) __builtin_prefetch(from + i);
}

/* Scores of four vectors of tokens from t on, of which those at `end` and behind are not stored. Fewer of them would need
   a function of their own, in which a compiler may round differently. */
enum { FOUR = 4 };
#define SCORE(NAME, ADD)                                                                                               \
    static void NAME(const float *query, const float *keys, int64_t words, int64_t t, int64_t end, float scaling,      \
                     const float *ahead, float *scores) {                                                              \
        const float *columns[FOUR];                                                                                    \
        vec sums[FOUR] = {0};                                                                                          \
        for (int v = 0; v < FOUR; v++) {                                                                               \
            int64_t at = t + v * LANES < end ? t + v * LANES : t;                                                      \
            columns[v] = keys + block_before(at) * words + at % BLOCK;                                                 \
        }                                                                                                              \
        for (int64_t i = 0; i < words; i++) {                                                                          \
            if (ahead) fetch(ahead + t * words + i * FOUR * LANES, FOUR * LANES);                                      \
            for (int v = 0; v < FOUR; v++) {                                                                           \
                vec column = *(const loose *)(columns[v] + i * BLOCK);                                                 \
                ADD(sums[v], column, query[i]);                                                                        \
            }                                                                                                          \
        }                                                                                                              \
        for (int v = 0; v < FOUR && t + v * LANES < end; v++) *(loose *)(scores + v * LANES) = sums[v] * scaling;      \
    }
SCORE(score_numbers, ADD_PRODUCT)
SCORE(score_pairs, ADD_PAIR)

/* A query's scores for all tokens of the blocks that hold `from` to `to`; those outside are minus infinity. The values
   of these tokens, `ahead`, are fetched meanwhile. */
static void score(const float *query, const float *keys, int64_t words, int64_t from, int64_t to, float scaling,
                  int64_t pairs, const float *ahead, float *scores) {
    int64_t start = block_before(from), end = block_after(to);
    for (int64_t t = start; t < end; t += FOUR * LANES)
        (pairs ? score_pairs : score_numbers)(query, keys, words, t, end, scaling, ahead, scores + t - start);
    for (int64_t t = start; t < from; t++) scores[t - start] = -INFINITY;
    for (int64_t t = to; t < end; t++) scores[t - start] = -INFINITY;
}

/* The number at place i of what is kept, and the vector that begins there. With `pairs` it is kept in bfloat16, which is
   the upper half of a number's bits. */
static inline float number_at(const float *kept, int64_t i, int64_t pairs) {
    uint16_t upper;
    memcpy(&upper, (const char *)kept + 2 * i, sizeof upper);
    uint32_t bits = (uint32_t)upper << 16;
    float number;
    memcpy(&number, pairs ? (const void *)&bits : (const void *)(kept + i), sizeof number);
    return number;
}
static inline vec vector_at(const float *kept, int64_t i, int64_t pairs) {
    if (!pairs) return *(const loose *)(kept + i);
    return (vec)(__builtin_convertvector(*(const loose_upper *)((const char *)kept + 2 * i), bits_vec) << 16);
}

/* sums[many, size] += weights [many, num], whose rows are `room` apart, times the values [num, size]. */
enum { MOST_SUMS = 3 };
static inline __attribute__((always_inline)) void gather_some(const float *weights, int64_t room, const float *values,
                                                              int64_t num, int64_t size, int64_t pairs, int many,
                                                              const float *ahead, float *sums) {
    enum { KEPT = 4 };
    int64_t first = 0;
    for (; first + KEPT * LANES <= size; first += KEPT * LANES) {
        vec kept[MOST_SUMS][KEPT];
        for (int r = 0; r < many; r++) memcpy(kept[r], sums + r * size + first, sizeof kept[r]);
        for (int64_t t = 0; t < num; t++) {
            if (ahead && !first) fetch(ahead + t * (pairs ? size / 2 : size), pairs ? size / 2 : size);
            for (int j = 0; j < KEPT; j++) {
                vec value = vector_at(values, t * size + first + j * LANES, pairs);
                for (int r = 0; r < many; r++) kept[r][j] += value * weights[r * room + t];
            }
        }
        for (int r = 0; r < many; r++) memcpy(sums + r * size + first, kept[r], sizeof kept[r]);
    }
    for (int64_t t = 0; t < num; t++)
        for (int64_t i = first; i < size; i++)
            for (int r = 0; r < many; r++)
                sums[r * size + i] += number_at(values, t * size + i, pairs) * weights[r * room + t];
}

/* The same for any number of rows of weights. */
static void gather(const float *weights, int64_t repeats, int64_t room, const float *values, int64_t num, int64_t size,
                   int64_t pairs, const float *ahead, float *sums) {
#define GATHER(MANY)                                                                                                   \
    do {                                                                                                               \
        if (pairs) gather_some(weights, room, values, num, size, 1, MANY, ahead, sums);                                \
        else gather_some(weights, room, values, num, size, 0, MANY, ahead, sums);                                      \
    } while (0)
    for (; repeats >= MOST_SUMS; repeats -= MOST_SUMS, weights += MOST_SUMS * room, sums += MOST_SUMS * size) {
        GATHER(MOST_SUMS);
        ahead = NULL;
    }
    if (repeats == 2) GATHER(2);
    if (repeats == 1) GATHER(1);
#undef GATHER
}

static inline float highest_of(const float *x, int64_t n) {
    float highest = x[0], tops[LANES];
    int64_t i = 0;
    if (n >= LANES) {
        memcpy(tops, x, sizeof tops);
        for (i = LANES; i + LANES <= n; i += LANES)
            for (int lane = 0; lane < LANES; lane++) tops[lane] = x[i + lane] > tops[lane] ? x[i + lane] : tops[lane];
        for (int lane = 0; lane < LANES; lane++) highest = tops[lane] > highest ? tops[lane] : highest;
    }
    for (; i < n; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
}

/* Softmax of `many` rows of n scores, in place; rows are `room` apart. A weight below e^-87 of the largest is 0, so that
   what is not seen has none. Each is summed from its first score to its last, four rows at a time, because a sum waits
   for its last addition. */
static inline void softmax(float *scores, int64_t many, int64_t n, int64_t room) {
    enum { ROWS = 4 };
    for (int64_t r = 0; r < many; r++) {
        float *row = scores + r * room, highest = highest_of(row, n);
        for (int64_t t = 0; t < n; t++) {
            float x = row[t] - highest, power = exponential(x);
            row[t] = x < -87.0f ? 0 : power;
        }
    }
    for (int64_t r = 0; r < many; r += ROWS) {
        const float *rows[ROWS];
        float sums[ROWS] = {0};
        for (int64_t j = 0; j < ROWS; j++) rows[j] = scores + (r + j < many ? r + j : r) * room;
        for (int64_t t = 0; t < n; t++)
            for (int j = 0; j < ROWS; j++) sums[j] += rows[j][t];
        for (int64_t j = 0; j < ROWS && r + j < many; j++)
            for (int64_t t = 0; t < n; t++) scores[(r + j) * room + t] /= sums[j];
    }
}

/* The numbers of x as they are kept. */
static inline void put(const float *x, int64_t size, int64_t pairs, float *to) {
    if (pairs) to_pairs(x, size, to);
    else memcpy(to, x, sizeof *to * (size_t)size);
}

/* The next token of n replies, whose row i is in rows[i] and whose prompt, if any, is prompts[prompt_of[i]].

   key and value [n, kv_heads, size], `stride` floats from row to row, are stored at places[i] of the rows [*, kv_heads,
   row_room, size]. The queries [n, kv_heads * repeats, size] then see the prompt's keys, of prompts [*, kv_heads,
   prompt_room, size], and those of the row up to the place, the last `window` of them all. Both rooms are multiples of
   BLOCK; with `pairs`, keys and values are kept in bfloat16, and queries are rounded to it. `scores` is room for threads
   * (repeats * (prompt_room + row_room) + size) floats. */
void attend(const float *query, int64_t query_stride, const float *key, const float *value, int64_t stride, int64_t n,
            int64_t kv_heads, int64_t repeats, int64_t size, float scaling, int64_t window, const float *prompt_keys,
            const float *prompt_values, int64_t prompt_room, const int64_t *prompt_of, const int64_t *prompt_lengths,
            float *row_keys, float *row_values, int64_t row_room, const int64_t *places, float *output, float *scores,
            int64_t pairs, int64_t threads) {
    int64_t room = prompt_room + row_room, words = pairs ? size / 2 : size;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t task = 0; task < n * kv_heads; task++) {
        int64_t head = task / n, row = task % n; /* replies to one prompt come one after the other */
        int64_t prompt = prompt_of ? prompt_of[row] : 0, length = prompt_of ? prompt_lengths[prompt] : 0;
        int64_t end = places[row] + 1, oldest = length + end - window;
        int64_t from = oldest < 0 ? 0 : oldest < length ? oldest : length, own = oldest > length ? oldest - length : 0;
        int64_t of_prompt = from < length ? block_after(length) - block_before(from) : 0;
        int64_t num = of_prompt + block_after(end) - block_before(own);
        const float *keys = prompt_keys + (prompt * kv_heads + head) * prompt_room * words;
        const float *values = prompt_values + (prompt * kv_heads + head) * prompt_room * words;
        float *own_keys = row_keys + (row * kv_heads + head) * row_room * words;
        float *own_values = row_values + (row * kv_heads + head) * row_room * words;
        float *weights = scores + omp_get_thread_num() * (repeats * room + size), *asked = weights + repeats * room;
        float *last = own_keys + block_before(end - 1) * words + (end - 1) % BLOCK;
        put(value + row * stride + head * size, size, pairs, own_values + (end - 1) * words);
        put(key + row * stride + head * size, size, pairs, asked);
        for (int64_t i = 0; i < words; i++) last[i * BLOCK] = asked[i];

        const float *queries = query + row * query_stride + head * repeats * size;
        for (int64_t r = 0; r < repeats; r++) {
            put(queries + r * size, size, pairs, asked);
            float *found = weights + r * room;
            if (of_prompt) score(asked, keys, words, from, length, scaling, pairs, r ? NULL : values, found);
            score(asked, own_keys, words, own, end, scaling, pairs, r ? NULL : own_values, found + of_prompt);
        }
        softmax(weights, repeats, num, room);
        float *to = output + (row * kv_heads + head) * repeats * size;
        memset(to, 0, sizeof *to * (size_t)(repeats * size));
        const float *next = row + 1 < n ? own_keys + (kv_heads * row_room + own) * words : NULL;
        gather(weights + from % BLOCK, repeats, room, values + from * words, length - from, size, pairs, NULL, to);
        gather(weights + of_prompt + own % BLOCK, repeats, room, own_values + own * words, end - own, size, pairs, next,
               to);
    }
}

/* Linear layers of one input, as product takes them; `width` is the sum of their outs. */
typedef struct {
    int64_t matrices;
    const float *const *weights, *const *biases;
    const int64_t *outs;
    int64_t width, pairs;
} linears;

/* A block of a Llama-like model. */
typedef struct {
    const float *norm, *query_key_norm, *mlp_norm;
    linears query_key_value, output, gate_up, down;
    float scaling;
    int64_t window;
} block;

/* Where the keys and values of a block are kept; see attend. */
typedef struct {
    const float *prompt_keys, *prompt_values;
    float *row_keys, *row_values;
} cache;

/* All blocks for the next token of n replies, in place: x[n, width] are embeddings before and states after. One call, so
   that no thread waits for what is between the calls of a step. The rest is as in rotate and attend; states[n, heads and
   kv_heads twice, size], mixed[n, heads, size] and gates[n, 2 * inner] are room, and so are `room` and `scores`. */
void decode(const block *blocks, const cache *caches, int64_t num_blocks, float *x, int64_t n, int64_t width, float eps,
            int64_t heads, int64_t kv_heads, int64_t size, const float *cos, const float *sin, int64_t prompt_room,
            const int64_t *prompt_of, const int64_t *prompt_lengths, int64_t row_room, const int64_t *places,
            float *states, float *mixed, float *gates, float *room, float *scores, int64_t pairs, int64_t threads) {
    int64_t stride = (heads + 2 * kv_heads) * size;
#define LAYERS(L) L->matrices, L->weights, L->biases, L->outs
    for (const block *b = blocks; b < blocks + num_blocks; b++, caches++) {
        const linears *in = &b->query_key_value, *out = &b->output, *up = &b->gate_up, *down = &b->down;
        product(x, n, width, NORMED, b->norm, eps, LAYERS(in), states, 0, room, in->pairs, threads);
        rotate(states, n, stride, heads + kv_heads, size, b->query_key_norm, eps, cos, sin, threads);
        const float *keys = states + heads * size, *values = keys + kv_heads * size;
        attend(states, stride, keys, values, stride, n, kv_heads, heads / kv_heads, size, b->scaling, b->window,
               caches->prompt_keys, caches->prompt_values, prompt_room, prompt_of, prompt_lengths, caches->row_keys,
               caches->row_values, row_room, places, mixed, scores, pairs, threads);
        product(mixed, n, heads * size, PLAIN, NULL, 0, LAYERS(out), x, 1, room, out->pairs, threads);
        product(x, n, width, NORMED, b->mlp_norm, eps, LAYERS(up), gates, 0, room, up->pairs, threads);
        product(gates, n, up->width / 2, GATED, NULL, 0, LAYERS(down), x, 1, room, down->pairs, threads);
    }
#undef LAYERS
}
