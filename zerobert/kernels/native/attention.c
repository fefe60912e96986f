/* Attention over packed tokens, row by row and head by head, forward and backward.
 *
 * The scores of some queries against all keys of their row fit a core's own cache, so they are never
 * written to memory; the backward pass makes them again from queries, keys and the logarithm of each
 * query's sum. Everything is computed in fp32, whatever the values are kept in; only the factors of
 * products are bf16 where the values are and the processor multiplies pairs of them. Rows and heads
 * are independent, so that the result does not depend on the number of threads.
 *
 * Source: Dao et al. 2022, FlashAttention (arXiv:2205.14135); its tiling of the keys is not needed
 * where a row of scores fits the cache. Dropout: weights are dropped after the softmax.
 *
 * D width of a head, L tokens of a row, H = heads * D. A unit is what is multiplied at a time: one
 * value in fp32, or a pair of bf16 ones that are neighbours along the depth of the product. */

#include "native.h"

#include <math.h>

#define QUERIES 64 /* at a time */
#define TILE_ROWS 6
#define TILE_COLUMNS (2 * LANES)

typedef struct {
    const int32_t *starts; /* [rows + 1], each row's first token, and the last one's end */
    int64_t num_rows, num_heads, width;
    int64_t longest; /* tokens of a row */
    int64_t step;    /* from a token to the next one in queries, keys and values */
    int64_t is_bf16;
    int64_t threshold; /* of 65,536 weights so many are dropped */
    int64_t seed;
    int64_t num_threads;
} Shape;

typedef uint32_t __attribute__((may_alias)) Pair; /* of bf16, the first one in the lower bits */

/* How far apart rows of so many values lie, with room for whole tiles: an odd number of cache lines,
 * because rows that are a power of two apart all fall into the same few sets of the cache. */
static inline int64_t stride_of(int64_t columns)
{
    const int64_t line = 16;
    return (rounded_up(columns, TILE_COLUMNS) / line | 1) * line;
}

static int64_t units_of(int64_t values, int in_pairs)
{
    return in_pairs ? (values + 1) / 2 : values;
}

/* sums + the products of a unit with those of a vector. */
static inline __attribute__((always_inline)) Vector plus_products(
    Vector sums, float factor, Vector units, int in_pairs)
{
#if HAS_PAIRS
    if (in_pairs)
        return (Vector)_mm512_dpbf16_ps(
            (__m512)sums, (__m512bh)_mm512_set1_ps(factor), (__m512bh)units);
#endif
    return sums + factor * units;
}

/* A few rows of `multiply`, kept in registers. */
static inline __attribute__((always_inline)) void tile(
    int num_rows, int64_t depth, const float *left, int64_t left_row, int64_t left_column,
    const float *right, int64_t right_row, float *product, int64_t product_row, int adds,
    int in_pairs)
{
    Vector sums[TILE_ROWS][2];
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++)
            sums[i][j] = adds ? *(const Vector *)(product + i * product_row + j * LANES) : (Vector){0};
    for (int64_t k = 0; k < depth; k++) {
        const float *units = right + k * right_row;
        Vector first = *(const Vector *)units, second = *(const Vector *)(units + LANES);
        for (int i = 0; i < num_rows; i++) {
            float factor = left[i * left_row + k * left_column];
            sums[i][0] = plus_products(sums[i][0], factor, first, in_pairs);
            sums[i][1] = plus_products(sums[i][1], factor, second, in_pairs);
        }
    }
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++)
            *(Vector *)(product + i * product_row + j * LANES) = sums[i][j];
}

static inline __attribute__((always_inline)) void multiply_units(
    int64_t rows, int64_t columns, int64_t depth, const float *left, int64_t left_row,
    int64_t left_column, const float *right, int64_t right_row, float *product,
    int64_t product_row, int adds, int in_pairs)
{
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
        int64_t i = 0;
#define TILE(n) \
    tile(n, depth, left + i * left_row, left_row, left_column, right + j, right_row, \
         product + i * product_row + j, product_row, adds, in_pairs)
        for (; i + TILE_ROWS <= rows; i += TILE_ROWS)
            TILE(TILE_ROWS);
        switch (rows - i) {
        case 1: TILE(1); break;
        case 2: TILE(2); break;
        case 3: TILE(3); break;
        case 4: TILE(4); break;
        case 5: TILE(5); break;
        }
#undef TILE
    }
}

/* product[rows, columns] = left[rows, depth] right[depth, columns], or added to it.
 *
 * Whole tiles are computed, so the columns' strides have room for them, as `stride_of` gives. Depth
 * and all strides, how far apart rows, or columns, lie, are counted in units. */
static void multiply(
    int64_t rows, int64_t columns, int64_t depth, const float *left, int64_t left_row,
    int64_t left_column, const float *right, int64_t right_row, float *product,
    int64_t product_row, int adds, int in_pairs)
{
    if (in_pairs)
        multiply_units(rows, columns, depth, left, left_row, left_column, right, right_row, product,
                       product_row, adds, 1);
    else
        multiply_units(rows, columns, depth, left, left_row, left_column, right, right_row, product,
                       product_row, adds, 0);
}

/* e to the power of a number that is not positive, within 2 units in the last place.
 *
 * Source: the polynomial of Cephes' expf (Moshier). */
static inline float exp_of(float x)
{
    x = x < -87.0f ? -87.0f : x;
    float whole = rintf(x * 1.44269504f);
    float rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    return sum * from_bits((uint32_t)((int32_t)whole + 127) << 23);
}

/* A thread's memory, handed out piece by piece. */
typedef struct {
    float *block, *free;
    uint16_t *drawn;
} Scratch;

static int open_scratch(Scratch *scratch, int64_t num_values, int64_t num_numbers)
{
    size_t bytes = (size_t)rounded_up(4 * num_values, 64);
    scratch->block = scratch->free = aligned_alloc(64, bytes);
    scratch->drawn = malloc((size_t)(2 * rounded_up(num_numbers, DRAWS)));
    return scratch->block && scratch->drawn;
}

static float *take(Scratch *scratch, int64_t num_values)
{
    float *values = scratch->free;
    scratch->free += num_values;
    return values;
}

static void close_scratch(Scratch *scratch)
{
    free(scratch->block);
    free(scratch->drawn);
}

/* Read a head of some tokens, [number, width] in units, with zeros behind the values of each. */
static void load_head(
    float *units, const void *tokens, int64_t first, int64_t number, int64_t step, int64_t width,
    int is_bf16, int in_pairs)
{
    const int64_t apart = stride_of(units_of(width, in_pairs));
    for (int64_t i = 0; i < number; i++) {
        float *row = units + i * apart;
        if (in_pairs) {
            memcpy(row, (const uint16_t *)tokens + first + i * step, (size_t)(2 * width));
            memset((uint16_t *)row + width, 0, (size_t)(4 * apart - 2 * width));
        } else {
            load(row, tokens, first + i * step, width, is_bf16);
            memset(row + width, 0, (size_t)(4 * (apart - width)));
        }
    }
}

static void store_head(
    void *tokens, const float *values, int64_t first, int64_t number, int64_t step, int64_t width,
    int is_bf16)
{
    for (int64_t i = 0; i < number; i++)
        store(tokens, values + i * stride_of(width), first + i * step, width, is_bf16);
}

/* [number, width] -> [width, number], both in units, with zeros behind those of each row. */
static void transpose(
    float *restrict columns_first, const float *restrict units, int64_t number, int64_t width)
{
    const int64_t apart = stride_of(width), columns = stride_of(number);
    for (int64_t d = 0; d < width; d++) {
        float *row = columns_first + d * columns;
        for (int64_t i = 0; i < number; i++)
            row[i] = units[i * apart + d];
        for (int64_t i = number; i < columns; i++)
            row[i] = 0.0f;
    }
}

/* A head as `load_head` reads it -> what is multiplied along its tokens: itself, or in `woven` the
 * pairs that each two tokens' values make; an odd one's go with zeros. */
static const float *along_tokens(
    float *restrict woven, const float *restrict head, int64_t number, int64_t width, int in_pairs)
{
    if (!in_pairs)
        return head;
    const int64_t halves = units_of(width, 1), apart = stride_of(halves);
    for (int64_t i = 0; i < number; i += 2) {
        const Pair *even = (const Pair *)(head + i * apart);
        const Pair *odd = i + 1 < number ? even + apart : even;
        Pair *pairs = (Pair *)(woven + i / 2 * stride_of(width));
        uint32_t is_there = i + 1 < number ? 0xFFFFFFFFu : 0u;
        for (int64_t p = 0; p < halves; p++) {
            uint32_t below = even[p], above = odd[p] & is_there;
            pairs[2 * p] = (below & 0xFFFFu) | above << 16;
            pairs[2 * p + 1] = below >> 16 | (above & 0xFFFF0000u);
        }
        for (int64_t d = 2 * halves; d < stride_of(width); d++)
            pairs[d] = 0;
    }
    return woven;
}

/* The pairs of neighbours in each row of [number, columns] values; `columns` is a `stride_of`. */
static void pair_columns(float *restrict pairs, const float *values, int64_t number, int64_t columns)
{
#if HAS_PAIRS
    for (int64_t i = 0; i < number; i++)
        for (int64_t j = 0; j < columns; j += 2 * LANES) {
            const float *row = values + i * columns + j;
            /* The stride is an odd number of vectors: behind the last is nothing. */
            __m512 second = j + LANES < columns ? _mm512_loadu_ps(row + LANES) : _mm512_setzero_ps();
            _mm512_storeu_si512(pairs + i * stride_of(columns / 2) + j / 2,
                                (__m512i)_mm512_cvtne2ps_pbh(second, _mm512_loadu_ps(row)));
        }
#else
    (void)pairs, (void)values, (void)number, (void)columns;
#endif
}

/* The pairs that each two rows of [number, columns] values make; an odd one's go with zeros. */
static void pair_rows(float *restrict pairs, const float *values, int64_t number, int64_t columns)
{
#if HAS_PAIRS
    const __m512i woven = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
        3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < number; i += 2)
        for (int64_t j = 0; j < columns; j += LANES) {
            const float *even = values + i * columns + j;
            __m512 odd = i + 1 < number ? _mm512_loadu_ps(even + columns) : _mm512_setzero_ps();
            __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(odd, _mm512_loadu_ps(even));
            _mm512_storeu_si512(pairs + i / 2 * columns + j,
                                _mm512_permutexvar_epi16(woven, halves));
        }
#else
    (void)pairs, (void)values, (void)number, (void)columns;
#endif
}

static void scale_by(float *values, int64_t number, float factor)
{
    for (int64_t i = 0; i < number; i++)
        values[i] *= factor;
}

/* Products of one query with all keys -> its weights, dropped out, but for a factor, which is
 * returned. A score is `scale` times a product; `log_sum`, too, is in units of the products.
 *
 * The largest is taken off before the others are scaled: then its own exponent is 0 exactly. */
static float weigh(
    float *scores, int64_t number, float scale, const uint16_t *drawn, int64_t threshold,
    float *log_sum)
{
    float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < number; j++)
        most = scores[j] > most ? scores[j] : most;
    if (threshold)
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < number; j++) {
            float weight = exp_of(scale * (scores[j] - most));
            sum += weight;
            scores[j] = drawn[j] >= threshold ? weight : 0.0f;
        }
    else
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < number; j++)
            sum += scores[j] = exp_of(scale * (scores[j] - most));
    *log_sum = most + logf(sum) / scale;
    return scale_of_kept(threshold) / sum;
}

/* Products of one query with all keys -> its weights, dropped out; gradients of those -> gradients of
 * the products.
 *
 * What the gradients have in common is taken from these weights, not from the output, whose rounding
 * to bf16 all keys would share: where they have a mean in common it would tell. */
static void weigh_back(
    float *scores, float *grads, int64_t number, float scale, float log_sum,
    const uint16_t *drawn, int64_t threshold)
{
    float kept = scale_of_kept(threshold), along = 0.0f, total = 0.0f;
    if (threshold)
        for (int64_t j = 0; j < number; j++)
            grads[j] = drawn[j] >= threshold ? kept * grads[j] : 0.0f;
#pragma omp simd reduction(+ : along, total)
    for (int64_t j = 0; j < number; j++) {
        scores[j] = exp_of(scale * (scores[j] - log_sum));
        along += scores[j] * grads[j];
        total += scores[j];
    }
    along /= total;
    for (int64_t j = 0; j < number; j++)
        grads[j] = scale * scores[j] * (grads[j] - along);
    if (threshold)
        for (int64_t j = 0; j < number; j++)
            scores[j] = drawn[j] >= threshold ? kept * scores[j] : 0.0f;
}

/* Mix values by attention.
 *
 * Args:
 *     q, k, v: [tokens, heads, D], tokens being `step` apart.
 *     out: [tokens, heads, D]; tokens that are in no row are not written.
 *     log_sums: [tokens, heads], for the way back; see `weigh`.
 *
 * Returns 0 where there was no memory. */
EXPORTED int64_t attention_forward(
    const Shape *shape, const void *q, const void *k, const void *v, void *out, float *log_sums)
{
    const int is_bf16 = (int)shape->is_bf16, in_pairs = is_bf16 && HAS_PAIRS;
    const int64_t width = shape->width, heads = shape->num_heads, step = shape->step;
    const int64_t depth = units_of(width, in_pairs), apart = stride_of(depth);
    const int64_t wide = stride_of(width), most = stride_of(shape->longest);
    const float scale = 1.0f / sqrtf((float)width);
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        Scratch scratch;
        int64_t num_values = shape->longest * (apart + wide) + depth * most +
                             QUERIES * (apart + wide + 2 * most);
        int has_memory = open_scratch(&scratch, num_values, most);
        float *head_units = take(&scratch, shape->longest * apart);
        float *woven_values = take(&scratch, shape->longest * wide);
        float *keys_first = take(&scratch, depth * most);
        float *queries = take(&scratch, QUERIES * apart), *mixed = take(&scratch, QUERIES * wide);
        float *scores = take(&scratch, QUERIES * most), *paired = take(&scratch, QUERIES * most);
        if (!has_memory) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shape->num_rows * heads; task++) {
            int64_t row = task / heads, head = task % heads, start = shape->starts[row];
            int64_t length = shape->starts[row + 1] - start, columns = stride_of(length);
            int64_t length_units = units_of(length, in_pairs);
            int64_t place = start * step + head * width;
            Numbers numbers;
            if (!has_memory)
                continue;
            begin(&numbers, (uint64_t)shape->seed, (uint32_t)head, (uint32_t)start);
            load_head(head_units, k, place, length, step, width, is_bf16, in_pairs);
            transpose(keys_first, head_units, length, depth);
            load_head(head_units, v, place, length, step, width, is_bf16, in_pairs);
            const float *values = along_tokens(woven_values, head_units, length, width, in_pairs);
            for (int64_t first = 0; first < length; first += QUERIES) {
                int64_t number = length - first < QUERIES ? length - first : QUERIES;
                load_head(queries, q, place + first * step, number, step, width, is_bf16, in_pairs);
                multiply(number, length, depth, queries, apart, 1, keys_first, columns, scores,
                         columns, 0, in_pairs);
                float factors[QUERIES];
                for (int64_t i = 0; i < number; i++) {
                    if (shape->threshold)
                        draw(&numbers, scratch.drawn, length);
                    factors[i] = weigh(scores + i * columns, length, scale, scratch.drawn,
                                       shape->threshold,
                                       &log_sums[(start + first + i) * heads + head]);
                }
                const float *weights = scores;
                int64_t weights_apart = columns;
                if (in_pairs) {
                    pair_columns(paired, scores, number, columns);
                    weights = paired;
                    weights_apart = stride_of(columns / 2);
                }
                multiply(number, width, length_units, weights, weights_apart, 1, values, wide, mixed,
                         wide, 0, in_pairs);
                for (int64_t i = 0; i < number; i++)
                    scale_by(mixed + i * wide, width, factors[i]);
                store_head(out, mixed, ((start + first) * heads + head) * width, number,
                           heads * width, width, is_bf16);
            }
        }
        close_scratch(&scratch);
    }
    return is_done;
}

/* The gradients of queries, keys and values; see `attention_forward`.
 *
 * Args:
 *     log_sums: what `attention_forward` wrote.
 *     out_grad, q_grad, k_grad, v_grad: [tokens, heads, D]; tokens that are in no row are neither
 *         read nor written. */
EXPORTED int64_t attention_backward(
    const Shape *shape, const void *q, const void *k, const void *v, const float *log_sums,
    const void *out_grad, void *q_grad, void *k_grad, void *v_grad)
{
    const int is_bf16 = (int)shape->is_bf16, in_pairs = is_bf16 && HAS_PAIRS;
    const int64_t width = shape->width, heads = shape->num_heads, step = shape->step;
    const int64_t depth = units_of(width, in_pairs), apart = stride_of(depth);
    const int64_t wide = stride_of(width), most = stride_of(shape->longest), all = heads * width;
    const float scale = 1.0f / sqrtf((float)width);
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        Scratch scratch;
        int64_t num_values = shape->longest * (apart + 3 * wide) + 2 * depth * most +
                             QUERIES * (2 * apart + 3 * wide + 4 * most);
        int has_memory = open_scratch(&scratch, num_values, most);
        float *head_units = take(&scratch, shape->longest * apart);
        float *woven_keys = take(&scratch, shape->longest * wide);
        float *key_grads = take(&scratch, shape->longest * wide);
        float *value_grads = take(&scratch, shape->longest * wide);
        float *keys_first = take(&scratch, depth * most), *values_first = take(&scratch, depth * most);
        float *queries = take(&scratch, QUERIES * apart), *grads = take(&scratch, QUERIES * apart);
        float *woven_queries = take(&scratch, QUERIES * wide);
        float *woven_grads = take(&scratch, QUERIES * wide);
        float *query_grads = take(&scratch, QUERIES * wide);
        float *weights = take(&scratch, QUERIES * most), *score_grads = take(&scratch, QUERIES * most);
        float *paired = take(&scratch, QUERIES * most), *woven = take(&scratch, QUERIES * most);
        if (!has_memory) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shape->num_rows * heads; task++) {
            int64_t row = task / heads, head = task % heads, start = shape->starts[row];
            int64_t length = shape->starts[row + 1] - start, columns = stride_of(length);
            int64_t place = start * step + head * width, place_of_grads = start * all + head * width;
            Numbers numbers;
            if (!has_memory)
                continue;
            begin(&numbers, (uint64_t)shape->seed, (uint32_t)head, (uint32_t)start);
            load_head(head_units, v, place, length, step, width, is_bf16, in_pairs);
            transpose(values_first, head_units, length, depth);
            load_head(head_units, k, place, length, step, width, is_bf16, in_pairs);
            transpose(keys_first, head_units, length, depth);
            const float *keys = along_tokens(woven_keys, head_units, length, width, in_pairs);
            for (int64_t first = 0; first < length; first += QUERIES) {
                int64_t number = length - first < QUERIES ? length - first : QUERIES;
                int64_t here = place_of_grads + first * all;
                load_head(queries, q, place + first * step, number, step, width, is_bf16, in_pairs);
                load_head(grads, out_grad, here, number, all, width, is_bf16, in_pairs);
                multiply(number, length, depth, queries, apart, 1, keys_first, columns, weights,
                         columns, 0, in_pairs);
                multiply(number, length, depth, grads, apart, 1, values_first, columns, score_grads,
                         columns, 0, in_pairs);
                for (int64_t i = 0; i < number; i++) {
                    if (shape->threshold)
                        draw(&numbers, scratch.drawn, length);
                    weigh_back(weights + i * columns, score_grads + i * columns, length, scale,
                               log_sums[(start + first + i) * heads + head], scratch.drawn,
                               shape->threshold);
                }
                const float *by_query = score_grads, *by_key = score_grads, *weights_by_key = weights;
                int64_t query_units = units_of(number, in_pairs), by_query_apart = columns;
                if (in_pairs) {
                    pair_rows(woven, weights, number, columns);
                    weights_by_key = woven;
                }
                int adds = first > 0;
                multiply(length, width, query_units, weights_by_key, 1, columns,
                         along_tokens(woven_grads, grads, number, width, in_pairs), wide,
                         value_grads, wide, adds, in_pairs);
                if (in_pairs) {
                    pair_columns(paired, score_grads, number, columns);
                    pair_rows(woven, score_grads, number, columns);
                    by_query = paired;
                    by_query_apart = stride_of(columns / 2);
                    by_key = woven;
                }
                multiply(length, width, query_units, by_key, 1, columns,
                         along_tokens(woven_queries, queries, number, width, in_pairs), wide,
                         key_grads, wide, adds, in_pairs);
                multiply(number, width, units_of(length, in_pairs), by_query, by_query_apart, 1, keys,
                         wide, query_grads, wide, 0, in_pairs);
                store_head(q_grad, query_grads, here, number, all, width, is_bf16);
            }
            store_head(k_grad, key_grads, place_of_grads, length, all, width, is_bf16);
            store_head(v_grad, value_grads, place_of_grads, length, all, width, is_bf16);
        }
        close_scratch(&scratch);
    }
    return is_done;
}
