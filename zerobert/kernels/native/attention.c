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
    int64_t is_bf16;
    int64_t threshold; /* of 65,536 weights so many are dropped */
    int64_t seed;
    int64_t num_threads;
} Shape;

/* A few rows of `multiply`, kept in registers. */
static inline __attribute__((always_inline)) void tile(
    int num_rows, int64_t depth, const float *left, int64_t left_row, int64_t left_column,
    const float *right, float *product, int64_t columns, int adds)
{
    Vector sums[TILE_ROWS][2];
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++)
            sums[i][j] = adds ? *(const Vector *)(product + i * columns + j * LANES) : (Vector){0};
    for (int64_t k = 0; k < depth; k++) {
        const float *values = right + k * columns;
        Vector first = *(const Vector *)values, second = *(const Vector *)(values + LANES);
        for (int i = 0; i < num_rows; i++) {
            float factor = left[i * left_row + k * left_column];
            sums[i][0] += factor * first;
            sums[i][1] += factor * second;
        }
    }
    for (int i = 0; i < num_rows; i++)
        for (int j = 0; j < 2; j++)
            *(Vector *)(product + i * columns + j * LANES) = sums[i][j];
}

/* product[rows, columns] = left[rows, depth] right[depth, columns], or added to it.
 *
 * `columns` is a multiple of TILE_COLUMNS; rows and columns of `left` are any distances apart. */
static void multiply(
    int64_t rows, int64_t columns, int64_t depth, const float *left, int64_t left_row,
    int64_t left_column, const float *right, float *product, int adds)
{
    for (int64_t j = 0; j < columns; j += TILE_COLUMNS) {
        int64_t i = 0;
#define TILE(n) \
    tile(n, depth, left + i * left_row, left_row, left_column, right + j, \
         product + i * columns + j, columns, adds)
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
    uint16_t *numbers;
} Scratch;

static int open_scratch(Scratch *scratch, int64_t num_values, int64_t num_numbers)
{
    size_t bytes = (size_t)rounded_up(4 * num_values, 64);
    scratch->block = scratch->free = aligned_alloc(64, bytes);
    scratch->numbers = malloc((size_t)(2 * rounded_up(num_numbers, DRAWS)));
    return scratch->block && scratch->numbers;
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
    free(scratch->numbers);
}

/* Read a head of some tokens, [number, padded], with zeros behind its values. */
static void load_head(
    float *values, const void *tokens, int64_t first, int64_t number, int64_t step, int64_t width,
    int64_t padded, int is_bf16)
{
    for (int64_t i = 0; i < number; i++) {
        float *row = values + i * padded;
        load(row, tokens, first + i * step, width, is_bf16);
        for (int64_t d = width; d < padded; d++)
            row[d] = 0.0f;
    }
}

static void store_head(
    void *tokens, const float *values, int64_t first, int64_t number, int64_t step, int64_t width,
    int64_t padded, int is_bf16)
{
    for (int64_t i = 0; i < number; i++)
        store(tokens, values + i * padded, first + i * step, width, is_bf16);
}

/* [number, padded] -> [width, columns], with zeros behind the values. */
static void transpose(
    float *restrict columns_first, const float *restrict values, int64_t number, int64_t width,
    int64_t padded, int64_t columns)
{
    for (int64_t d = 0; d < width; d++) {
        float *row = columns_first + d * columns;
        for (int64_t i = 0; i < number; i++)
            row[i] = values[i * padded + d];
        for (int64_t i = number; i < columns; i++)
            row[i] = 0.0f;
    }
}

static void scale_by(float *values, int64_t number, float factor)
{
    for (int64_t i = 0; i < number; i++)
        values[i] *= factor;
}

/* Scores of one query -> its weights, dropped out; returns the logarithm of the sum. */
static float weigh(float *scores, int64_t number, const uint16_t *numbers, int64_t threshold)
{
    float most = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < number; j++)
        most = scores[j] > most ? scores[j] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < number; j++) {
        scores[j] = exp_of(scores[j] - most);
        sum += scores[j];
    }
    float factor = scale_of_kept(threshold) / sum;
    if (threshold)
        for (int64_t j = 0; j < number; j++)
            scores[j] = numbers[j] >= threshold ? scores[j] * factor : 0.0f;
    else
        scale_by(scores, number, factor);
    return most + logf(sum);
}

/* Scores of one query -> its weights, dropped out; gradients of those -> gradients of the scores.
 *
 * Args:
 *     along: the product of the query's output and its gradient. */
static void weigh_back(
    float *scores, float *grads, int64_t number, float log_sum, float along,
    const uint16_t *numbers, int64_t threshold)
{
    float kept = scale_of_kept(threshold);
    if (threshold)
        for (int64_t j = 0; j < number; j++) {
            float weight = exp_of(scores[j] - log_sum);
            float scale = numbers[j] >= threshold ? kept : 0.0f;
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
 *     q, k, v, out: [tokens, heads, D]; tokens that are in no row are not written.
 *     log_sums: [tokens, heads], for the way back.
 *
 * Returns 0 where there was no memory. */
EXPORTED int64_t attention_forward(
    const Shape *shape, const void *q, const void *k, const void *v, void *out, float *log_sums)
{
    const int64_t width = shape->width, heads = shape->num_heads, step = heads * width;
    const int64_t padded = rounded_up(width, TILE_COLUMNS);
    const int64_t most = rounded_up(shape->longest, TILE_COLUMNS);
    const float scale = 1.0f / sqrtf((float)width);
    const int is_bf16 = (int)shape->is_bf16;
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        Scratch scratch;
        int64_t num_values = 2 * most * padded + width * most + QUERIES * (2 * padded + most);
        int has_memory = open_scratch(&scratch, num_values, most);
        float *keys = take(&scratch, most * padded), *values = take(&scratch, most * padded);
        float *keys_first = take(&scratch, width * most);
        float *queries = take(&scratch, QUERIES * padded), *mixed = take(&scratch, QUERIES * padded);
        float *scores = take(&scratch, QUERIES * most);
        if (!has_memory) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shape->num_rows * heads; task++) {
            int64_t row = task / heads, head = task % heads, start = shape->starts[row];
            int64_t length = shape->starts[row + 1] - start, columns = rounded_up(length, TILE_COLUMNS);
            int64_t place = start * step + head * width;
            if (!has_memory)
                continue;
            load_head(keys, k, place, length, step, width, padded, is_bf16);
            transpose(keys_first, keys, length, width, padded, columns);
            load_head(values, v, place, length, step, width, padded, is_bf16);
            for (int64_t first = 0; first < length; first += QUERIES) {
                int64_t number = length - first < QUERIES ? length - first : QUERIES;
                int64_t here = place + first * step;
                load_head(queries, q, here, number, step, width, padded, is_bf16);
                scale_by(queries, number * padded, scale);
                multiply(number, columns, width, queries, padded, 1, keys_first, scores, 0);
                for (int64_t i = 0; i < number; i++) {
                    int64_t token = start + first + i;
                    if (shape->threshold)
                        draw(scratch.numbers, length, (uint64_t)shape->seed, (uint32_t)head,
                             (uint32_t)token);
                    log_sums[token * heads + head] =
                        weigh(scores + i * columns, length, scratch.numbers, shape->threshold);
                }
                multiply(number, padded, length, scores, columns, 1, values, mixed, 0);
                store_head(out, mixed, here, number, step, width, padded, is_bf16);
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
 *     out_grad: [tokens, heads, D].
 *     q_grad, k_grad, v_grad: likewise; tokens that are in no row are not written. */
EXPORTED int64_t attention_backward(
    const Shape *shape, const void *q, const void *k, const void *v, const void *out,
    const float *log_sums, const void *out_grad, void *q_grad, void *k_grad, void *v_grad)
{
    const int64_t width = shape->width, heads = shape->num_heads, step = heads * width;
    const int64_t padded = rounded_up(width, TILE_COLUMNS);
    const int64_t most = rounded_up(shape->longest, TILE_COLUMNS);
    const float scale = 1.0f / sqrtf((float)width);
    const int is_bf16 = (int)shape->is_bf16;
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        Scratch scratch;
        int64_t num_values =
            3 * most * padded + 2 * width * most + QUERIES * (3 * padded + 2 * most);
        int has_memory = open_scratch(&scratch, num_values, most);
        float *keys = take(&scratch, most * padded);
        float *key_grads = take(&scratch, most * padded), *value_grads = take(&scratch, most * padded);
        float *keys_first = take(&scratch, width * most), *values_first = take(&scratch, width * most);
        float *queries = take(&scratch, QUERIES * padded), *outs = take(&scratch, QUERIES * padded);
        float *grads = take(&scratch, QUERIES * padded);
        float *weights = take(&scratch, QUERIES * most), *score_grads = take(&scratch, QUERIES * most);
        if (!has_memory) {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < shape->num_rows * heads; task++) {
            int64_t row = task / heads, head = task % heads, start = shape->starts[row];
            int64_t length = shape->starts[row + 1] - start, columns = rounded_up(length, TILE_COLUMNS);
            int64_t place = start * step + head * width;
            if (!has_memory)
                continue;
            load_head(keys, v, place, length, step, width, padded, is_bf16);
            transpose(values_first, keys, length, width, padded, columns);
            load_head(keys, k, place, length, step, width, padded, is_bf16);
            transpose(keys_first, keys, length, width, padded, columns);
            for (int64_t first = 0; first < length; first += QUERIES) {
                int64_t number = length - first < QUERIES ? length - first : QUERIES;
                int64_t here = place + first * step;
                load_head(queries, q, here, number, step, width, padded, is_bf16);
                scale_by(queries, number * padded, scale);
                load_head(outs, out, here, number, step, width, padded, is_bf16);
                load_head(grads, out_grad, here, number, step, width, padded, is_bf16);
                multiply(number, columns, width, queries, padded, 1, keys_first, weights, 0);
                multiply(number, columns, width, grads, padded, 1, values_first, score_grads, 0);
                for (int64_t i = 0; i < number; i++) {
                    int64_t token = start + first + i;
                    float along = 0.0f;
#pragma omp simd reduction(+ : along)
                    for (int64_t d = 0; d < width; d++)
                        along += outs[i * padded + d] * grads[i * padded + d];
                    if (shape->threshold)
                        draw(scratch.numbers, length, (uint64_t)shape->seed, (uint32_t)head,
                             (uint32_t)token);
                    weigh_back(weights + i * columns, score_grads + i * columns, length,
                               log_sums[token * heads + head], along, scratch.numbers,
                               shape->threshold);
                }
                int adds = first > 0;
                multiply(length, padded, number, weights, 1, columns, grads, value_grads, adds);
                multiply(length, padded, number, score_grads, 1, columns, queries, key_grads, adds);
                multiply(number, padded, length, score_grads, columns, 1, keys, outs, 0);
                scale_by(outs, number * padded, scale);
                store_head(q_grad, outs, here, number, step, width, padded, is_bf16);
            }
            store_head(k_grad, key_grads, place, length, step, width, padded, is_bf16);
            store_head(v_grad, value_grads, place, length, step, width, padded, is_bf16);
        }
        close_scratch(&scratch);
    }
    return is_done;
}
