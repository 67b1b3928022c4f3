/* Attention over token trees and its gradients, in float32. Called by compiled_attention.py.

   Up to sixteen queries of one branch are a block: they stand in the lanes, and a key or an entry of a value is one
   number for all of them. Nothing is padded but the last block of a branch, and no lanes are added up, so that a result
   depends on its own tree alone, not on the trees beside it or on how many threads there are. */

#include "vectors.h"

enum { WIDE = 16, VECS = WIDE / LANES, OUTS = 12 / VECS, DEEP = 128 };

/* Queries `first` to `first + count - 1` of the row. They see the stretch of `num_seen` tokens from `seen` on, their
   prompt, and the tokens from `start` on up to themselves. */
typedef struct {
    int64_t first, count, start, seen, num_seen;
} block;

/* [tokens, heads, size] with the distance of two tokens and of two heads. */
typedef struct {
    const float *at;
    int64_t token, head;
} states;

/* to[n, WIDE], of rows `apart`, = or += x[n, k] times the columns [k, WIDE], of rows `stride`. Entries of x are `next`
   apart in n and `deep` in k. Twelve sums stand in registers; what is beyond n is computed and not stored. */
static inline __attribute__((always_inline)) void multiply_some(const float *x, int64_t next, int64_t deep, int64_t n,
                                                                const float *columns, int64_t stride, int64_t k,
                                                                float *to, int64_t apart, int add) {
    vec sums[OUTS][VECS] = {0};
    const float *rows[OUTS];
    for (int o = 0; o < OUTS; o++) rows[o] = x + (o < n ? o : 0) * next;
    for (int64_t i = 0; i < k; i++, columns += stride) {
        vec kept[VECS];
        for (int v = 0; v < VECS; v++) kept[v] = *(const loose *)(columns + v * LANES);
        for (int o = 0; o < OUTS; o++)
            for (int v = 0; v < VECS; v++) sums[o][v] += kept[v] * rows[o][i * deep];
    }
    for (int o = 0; o < OUTS && o < n; o++)
        for (int v = 0; v < VECS; v++) {
            loose *place = (loose *)(to + o * apart + v * LANES);
            if (add) *place += sums[o][v];
            else *place = sums[o][v];
        }
}

/* The same for any n. A long sum is made in parts, whose entries stay in the processor's cache. */
static void multiply(const float *x, int64_t next, int64_t deep, int64_t n, const float *columns, int64_t stride,
                     int64_t k, float *to, int64_t apart, int add) {
    do {
        int64_t part = k < DEEP ? k : DEEP;
        for (int64_t i = 0; i < n; i += OUTS) {
            if (deep == 1) multiply_some(x + i * next, next, 1, n - i, columns, stride, part, to + i * apart, apart, add);
            else multiply_some(x + i, 1, deep, n - i, columns, stride, part, to + i * apart, apart, add);
        }
        x += part * deep, columns += part * stride, k -= part, add = 1;
    } while (k > 0);
}

/* to[size, WIDE] = scaling * x[count, size], of rows `token`, transposed; zeros in the lanes behind. */
static void stand(const float *x, int64_t token, int64_t count, int64_t size, float scaling, float *to) {
    for (int64_t lane = 0; lane < WIDE; lane++)
        for (int64_t i = 0; i < size; i++) to[i * WIDE + lane] = lane < count ? scaling * x[lane * token + i] : 0;
}

/* The keys that some query of a block sees, in two stretches of the row: of the prompt, and of its own branch. */
typedef struct {
    int64_t start[2], num[2], many;
} sight;

/* A query and a key have their distances in the sequence: prompt and branch are one, of which the block is the end. */
static sight seen_by(block b, int64_t window) {
    int64_t all = b.num_seen + b.first - b.start + b.count, oldest = all - b.count + 1 - window;
    int64_t from = oldest < 0 ? 0 : oldest, skipped = from < b.num_seen ? from : b.num_seen;
    return (sight){{b.seen + skipped, b.start + from - skipped},
                   {b.num_seen - skipped, all - b.num_seen - (from - skipped)},
                   all - from};
}

/* scores[many, WIDE] = the products of the keys or values in sight with the columns [size, WIDE]. */
static void meet(const states *of, int64_t head, sight in, const float *columns, int64_t size, float *scores) {
    for (int part = 0; part < 2; scores += in.num[part++] * WIDE)
        if (in.num[part])
            multiply(of->at + in.start[part] * of->token + head * of->head, of->token, 1, in.num[part], columns, WIDE,
                     size, scores, WIDE, 0);
}

/* to[size, WIDE] = the sum of the keys or values in sight, each times its weights [many, WIDE]. */
static void gather(const states *of, int64_t head, sight in, const float *weights, int64_t size, float *to) {
    for (int part = 0; part < 2; weights += in.num[part++] * WIDE)
        multiply(of->at + in.start[part] * of->token + head * of->head, 1, of->token, size, weights, WIDE, in.num[part],
                 to, WIDE, part);
}

/* Scores of what a query does not see, later tokens and those outside of its window, become minus infinity. */
static void hide(block b, sight in, int64_t window, float *scores) {
    for (int64_t key = in.many - b.count + 1; key < in.many; key++)
        for (int64_t lane = 0; lane < key - (in.many - b.count); lane++) scores[key * WIDE + lane] = -INFINITY;
    for (int64_t key = 0; key < in.many - window; key++)
        for (int64_t lane = key + window - (in.many - b.count); lane < b.count; lane++)
            if (lane >= 0) scores[key * WIDE + lane] = -INFINITY;
}

/* e^x, and 0 for x below -87. */
static inline float weight_of(float x) {
    float power = exponential(x);
    return x < -87.0f ? 0 : power;
}

/* output [tokens, heads, size], and lse [tokens, heads] the logarithms of the sums of e^score. `in` are the queries, keys
   and values. A token sees the last `window` tokens of those that its block sees. `room` holds `each` floats for every
   thread: WIDE for each entry of a head twice, and twice for each token that is seen. */
void attend_forward(const states *in, const block *blocks, int64_t num_blocks, int64_t heads, int64_t repeats,
                    int64_t size, float scaling, int64_t window, float *output, float *lse, float *room, int64_t each,
                    int64_t threads) {
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t task = 0; task < num_blocks * heads; task++) {
        block b = blocks[task / heads];
        sight seen = seen_by(b, window);
        int64_t head = task % heads;
        float *asked = room + omp_get_thread_num() * each, *found = asked + size * WIDE, *scores = found + size * WIDE;
        stand(in[0].at + b.first * in[0].token + head * in[0].head, in[0].token, b.count, size, scaling, asked);
        meet(&in[1], head / repeats, seen, asked, size, scores);
        hide(b, seen, window, scores);
        float top[WIDE], sum[WIDE] = {0};
        memcpy(top, scores, sizeof top);
        for (float *s = scores; s < scores + seen.many * WIDE; s += WIDE)
            for (int lane = 0; lane < WIDE; lane++) top[lane] = s[lane] > top[lane] ? s[lane] : top[lane];
        for (float *s = scores; s < scores + seen.many * WIDE; s += WIDE)
            for (int lane = 0; lane < WIDE; lane++) sum[lane] += s[lane] = weight_of(s[lane] - top[lane]);
        gather(&in[2], head / repeats, seen, scores, size, found);
        for (int64_t lane = 0; lane < b.count; lane++) {
            float *to = output + ((b.first + lane) * heads + head) * size, part = 1 / sum[lane];
            for (int64_t i = 0; i < size; i++) to[i] = found[i * WIDE + lane] * part;
            lse[(b.first + lane) * heads + head] = top[lane] + logf(sum[lane]);
        }
    }
}

/* Adds to the gradients of queries, keys and values, each [tokens, heads, size]: those of a key or value are apart for
   every query head that reads it. The blocks of tree t begin at bounds[t]; what a tree adds, one thread adds in one
   order. `grad` and `output` are dense. */
void attend_backward(const states *in, const float *grad, const float *output, const float *lse, const block *blocks,
                     const int64_t *bounds, int64_t num_trees, int64_t heads, int64_t repeats, int64_t size,
                     float scaling, int64_t window, float *const *gradients, float *room, int64_t each,
                     int64_t threads) {
    int64_t row = heads * size;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < num_trees * heads; task++) {
        int64_t head = task % heads;
        for (int64_t number = bounds[task / heads]; number < bounds[task / heads + 1]; number++) {
            block b = blocks[number];
            sight seen = seen_by(b, window);
            int64_t place = b.first * row + head * size;
            const float *query = in[0].at + b.first * in[0].token + head * in[0].head, *given = grad + place;
            float *asked = room + omp_get_thread_num() * each, *wanted = asked + size * WIDE;
            float *weights = wanted + size * WIDE, *slopes = weights + seen.many * WIDE;
            stand(query, in[0].token, b.count, size, scaling, asked);
            stand(given, row, b.count, size, 1, wanted);
            meet(&in[1], head / repeats, seen, asked, size, weights);
            meet(&in[2], head / repeats, seen, wanted, size, slopes);
            hide(b, seen, window, weights);
            float sums[WIDE] = {0}, mean[WIDE] = {0};
            for (int64_t lane = 0; lane < b.count; lane++) {
                sums[lane] = lse[(b.first + lane) * heads + head];
                mean[lane] = dot(given + lane * row, output + place + lane * row, size);
            }
            for (int64_t at = 0; at < seen.many * WIDE; at += WIDE)
                for (int lane = 0; lane < WIDE; lane++) {
                    float weight = weight_of(weights[at + lane] - sums[lane]);
                    weights[at + lane] = weight;
                    slopes[at + lane] = scaling * weight * (slopes[at + lane] - mean[lane]);
                }
            gather(&in[1], head / repeats, seen, slopes, size, asked);
            for (int64_t lane = 0; lane < b.count; lane++)
                for (int64_t i = 0; i < size; i++) gradients[0][place + lane * row + i] = asked[i * WIDE + lane];
            for (int part = 0; part < 2; part++) {
                int64_t to = seen.start[part] * row + head * size;
                for (int64_t i = 0; i < size; i += WIDE) {
                    multiply(slopes, WIDE, 1, seen.num[part], query + i, in[0].token, b.count, gradients[1] + to + i,
                             row, 1);
                    multiply(weights, WIDE, 1, seen.num[part], given + i, row, b.count, gradients[2] + to + i, row, 1);
                }
                slopes += seen.num[part] * WIDE, weights += seen.num[part] * WIDE;
            }
        }
    }
}
