/* Attention over packed tokens, row by row and head by head, forward and backward.
 *
 * The scores of some queries against all keys of their row fit a core's own cache, so they are never
 * written to memory; the backward pass makes them again from queries, keys and the logarithm of each
 * query's sum. Everything is computed in fp32, whatever the values are kept in. Rows and heads are
 * independent, so that the result does not depend on the number of threads.
 *
 * Source: Dao et al. 2022, FlashAttention (arXiv:2205.14135); its tiling of the keys is not needed
 * where a row of scores fits the cache. Dropout: weights are dropped after the softmax.
 *
 * D width of a head, L tokens of a row, H = heads * D. */

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

/* How far apart rows of so many values lie, with room for whole tiles: an odd number of cache lines,
 * because rows that are a power of two apart all fall into the same few sets of the cache. */
static inline int64_t stride_of(int64_t columns)
{
    const int64_t line = 16;
    return (rounded_up(columns, TILE_COLUMNS) / line | 1) * line;
}

/* A few rows of `multiply`, kept in registers. */
static inline __attribute__((always_inline)) void tile(
    int num_rows, int64_t depth, const float *left, int64_t left_row, int64_t left_column,
    const float *right, int64_t right_row, float *product, int64_t product_row, int adds)
{
    Vector sums[TILE_ROWS][2];
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++)
            sums[i][j] = adds ? *(const Vector *)(product + i * product_row + j * LANES) : (Vector){0};
    for (int64_t k = 0; k < depth; k++) {
        const float *values = right + k * right_row;
        Vector first = *(const Vector *)values, second = *(const Vector *)(values + LANES);
        for (int i = 0; i < num_rows; i++) {
            float factor = left[i * left_row + k * left_column];
            sums[i][0] += factor * first;
            sums[i][1] += factor * second;
        }
    }
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++)
            *(Vector *)(product + i * product_row + j * LANES) = sums[i][j];
}

/* product[rows, columns] = left[rows, depth] right[depth, columns], or added to it.
 *
 * Whole tiles are computed, so the columns' strides have room for them, as `stride_of` gives. The
 * other numbers are how far apart rows, or columns, lie. */
static void multiply(
    int64_t rows, int64_t columns, int64_t depth, const float *left, int64_t left_row,
    int64_t left_column, const float *right, int64_t right_row, float *product,
    int64_t product_row, int adds)
{
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
        int64_t i = 0;
#define TILE(n) \
    tile(n, depth, left + i * left_row, left_row, left_column, right + j, right_row, \
         product + i * product_row + j, product_row, adds)
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

/* Read a head of some tokens, [number, width], with zeros behind the values of each. */
static void load_head(
    float *values, const void *tokens, int64_t first, int64_t number, int64_t step, int64_t width,
    int is_bf16)
{
    const int64_t apart = stride_of(width);
    for (int64_t i = 0; i < number; i++) {
        float *row = values + i * apart;
        load(row, tokens, first + i * step, width, is_bf16);
        for (int64_t d = width; d < apart; d++)
            row[d] = 0.0f;
    }
}

static void store_head(
    void *tokens, const float *values, int64_t first, int64_t number, int64_t step, int64_t width,
    int is_bf16)
{
    for (int64_t i = 0; i < number; i++)
        store(tokens, values + i * stride_of(width), first + i * step, width, is_bf16);
}

/* [number, width] -> [width, number], with zeros behind the values of each row. */
static void transpose(
    float *restrict columns_first, const float *restrict values, int64_t number, int64_t width)
{
    const int64_t apart = stride_of(width), columns = stride_of(number);
    for (int64_t d = 0; d < width; d++) {
        float *row = columns_first + d * columns;
        for (int64_t i = 0; i < number; i++)
            row[i] = values[i * apart + d];
        for (int64_t i = number; i < columns; i++)
            row[i] = 0.0f;
    }
}

static void scale_by(float *values, int64_t number, float factor)
{
    for (int64_t i = 0; i < number; i++)
        values[i] *= factor;
}

/* Scores of one query -> its weights, dropped out, but for a factor, which is returned; `log_sum` is
 * the logarithm of the sum. */
static float weigh(
    float *scores, int64_t number, const uint16_t *drawn, int64_t threshold, float *log_sum)
{
    float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < number; j++)
        most = scores[j] > most ? scores[j] : most;
    if (threshold)
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < number; j++) {
            float weight = exp_of(scores[j] - most);
            sum += weight;
            scores[j] = drawn[j] >= threshold ? weight : 0.0f;
        }
    else
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < number; j++)
            sum += scores[j] = exp_of(scores[j] - most);
    *log_sum = most + logf(sum);
    return scale_of_kept(threshold) / sum;
}

/* Scores of one query -> its weights, dropped out; gradients of those -> gradients of the scores.
 *
 * Args:
 *     along: the product of the query's output and its gradient. */
static void weigh_back(
    float *scores, float *grads, int64_t number, float log_sum, float along,
    const uint16_t *drawn, int64_t threshold)
{
    float kept = scale_of_kept(threshold);
    if (threshold)
        for (int64_t j = 0; j < number; j++) {
            float weight = exp_of(scores[j] - log_sum);
            float scale = drawn[j] >= threshold ? kept : 0.0f;
            grads[j] = weight * (scale * grads[j] - along);
            scores[j] = weight * scale;
        }
    else
        for (int64_t j = 0; j < number; j++) {
            scores[j] = exp_of(scores[j] - log_sum);
            grads[j] = scores[j] * (grads[j] - along);
        }
}

/* Mix values by attention.
 *
 * Args:
 *     q, k, v: [tokens, heads, D], tokens being `step` apart.
 *     out: [tokens, heads, D]; tokens that are in no row are not written.
 *     log_sums: [tokens, heads], for the way back.
 *
 * Returns 0 where there was no memory. */
EXPORTED int64_t attention_forward(
    const Shape *shape, const void *q, const void *k, const void *v, void *out, float *log_sums)
{
    const int64_t width = shape->width, heads = shape->num_heads, step = shape->step;
    const int64_t wide = stride_of(width), most = stride_of(shape->longest);
    const float scale = 1.0f / sqrtf((float)width);
    const int is_bf16 = (int)shape->is_bf16;
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        Scratch scratch;
        int64_t num_values =
            2 * shape->longest * wide + width * most + QUERIES * (2 * wide + most);
        int has_memory = open_scratch(&scratch, num_values, most);
        float *keys = take(&scratch, shape->longest * wide);
        float *values = take(&scratch, shape->longest * wide);
        float *keys_first = take(&scratch, width * most);
        float *queries = take(&scratch, QUERIES * wide), *mixed = take(&scratch, QUERIES * wide);
        float *scores = take(&scratch, QUERIES * most);
        if (!has_memory) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shape->num_rows * heads; task++) {
            int64_t row = task / heads, head = task % heads, start = shape->starts[row];
            int64_t length = shape->starts[row + 1] - start, columns = stride_of(length);
            int64_t place = start * step + head * width;
            Numbers numbers;
            if (!has_memory)
                continue;
            begin(&numbers, (uint64_t)shape->seed, (uint32_t)head, (uint32_t)start);
            load_head(keys, k, place, length, step, width, is_bf16);
            transpose(keys_first, keys, length, width);
            load_head(values, v, place, length, step, width, is_bf16);
            for (int64_t first = 0; first < length; first += QUERIES) {
                int64_t number = length - first < QUERIES ? length - first : QUERIES;
                load_head(queries, q, place + first * step, number, step, width, is_bf16);
                scale_by(queries, number * wide, scale);
                multiply(number, length, width, queries, wide, 1, keys_first, columns, scores,
                         columns, 0);
                float factors[QUERIES];
                for (int64_t i = 0; i < number; i++) {
                    if (shape->threshold)
                        draw(&numbers, scratch.drawn, length);
                    factors[i] = weigh(scores + i * columns, length, scratch.drawn,
                                       shape->threshold,
                                       &log_sums[(start + first + i) * heads + head]);
                }
                multiply(number, width, length, scores, columns, 1, values, wide, mixed, wide, 0);
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
 *     out, log_sums: what `attention_forward` wrote.
 *     out_grad, q_grad, k_grad, v_grad: [tokens, heads, D]; tokens that are in no row are neither
 *         read nor written. */
EXPORTED int64_t attention_backward(
    const Shape *shape, const void *q, const void *k, const void *v, const void *out,
    const float *log_sums, const void *out_grad, void *q_grad, void *k_grad, void *v_grad)
{
    const int64_t width = shape->width, heads = shape->num_heads, step = shape->step;
    const int64_t wide = stride_of(width), most = stride_of(shape->longest), all = heads * width;
    const float scale = 1.0f / sqrtf((float)width);
    const int is_bf16 = (int)shape->is_bf16;
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        Scratch scratch;
        int64_t num_values =
            3 * shape->longest * wide + 2 * width * most + QUERIES * (3 * wide + 2 * most);
        int has_memory = open_scratch(&scratch, num_values, most);
        float *keys = take(&scratch, shape->longest * wide);
        float *key_grads = take(&scratch, shape->longest * wide);
        float *value_grads = take(&scratch, shape->longest * wide);
        float *keys_first = take(&scratch, width * most), *values_first = take(&scratch, width * most);
        float *queries = take(&scratch, QUERIES * wide), *outs = take(&scratch, QUERIES * wide);
        float *grads = take(&scratch, QUERIES * wide);
        float *weights = take(&scratch, QUERIES * most), *score_grads = take(&scratch, QUERIES * most);
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
            load_head(keys, v, place, length, step, width, is_bf16);
            transpose(values_first, keys, length, width);
            load_head(keys, k, place, length, step, width, is_bf16);
            transpose(keys_first, keys, length, width);
            for (int64_t first = 0; first < length; first += QUERIES) {
                int64_t number = length - first < QUERIES ? length - first : QUERIES;
                int64_t here = place_of_grads + first * all;
                load_head(queries, q, place + first * step, number, step, width, is_bf16);
                scale_by(queries, number * wide, scale);
                load_head(outs, out, here, number, all, width, is_bf16);
                load_head(grads, out_grad, here, number, all, width, is_bf16);
                multiply(number, length, width, queries, wide, 1, keys_first, columns, weights,
                         columns, 0);
                multiply(number, length, width, grads, wide, 1, values_first, columns, score_grads,
                         columns, 0);
                for (int64_t i = 0; i < number; i++) {
                    float along = 0.0f;
#pragma omp simd reduction(+ : along)
                    for (int64_t d = 0; d < width; d++)
                        along += outs[i * wide + d] * grads[i * wide + d];
                    if (shape->threshold)
                        draw(&numbers, scratch.drawn, length);
                    weigh_back(weights + i * columns, score_grads + i * columns, length,
                               log_sums[(start + first + i) * heads + head], along,
                               scratch.drawn, shape->threshold);
                }
                int adds = first > 0;
                multiply(length, width, number, weights, 1, columns, grads, wide, value_grads, wide,
                         adds);
                multiply(length, width, number, score_grads, 1, columns, queries, wide, key_grads,
                         wide, adds);
                multiply(number, width, length, score_grads, columns, 1, keys, wide, outs, wide, 0);
                scale_by(outs, number * wide, scale);
                store_head(q_grad, outs, here, number, all, width, is_bf16);
            }
            store_head(k_grad, key_grads, place_of_grads, length, all, width, is_bf16);
            store_head(v_grad, value_grads, place_of_grads, length, all, width, is_bf16);
        }
        close_scratch(&scratch);
    }
    return is_done;
}
