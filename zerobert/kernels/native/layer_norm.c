/* Layer norm of `residual + dropout(branch + offset)`, forward and backward, in one pass over memory
 * each; the offset is the bias of the product that made the branch.
 *
 * Statistics and sums are fp32, whatever the values are kept in. The gradients of what all rows share
 * are added up in a fixed number of parts, so that the result does not depend on the number of
 * threads.
 *
 * H values of a row. */

#include "native.h"

#include <math.h>

typedef struct {
    int64_t num_rows, width;
    int64_t is_bf16;
    int64_t has_bf16_weights;
    int64_t threshold; /* of 65,536 values of the branch so many are dropped */
    int64_t seed;
    int64_t num_parts;
    int64_t num_threads;
    double eps;
} Shape;

/* values *= the mask of this row, scaled. */
static void drop_out(float *values, uint16_t *drawn, const Shape *shape, int64_t row)
{
    float kept = scale_of_kept(shape->threshold);
    Numbers numbers;
    begin(&numbers, (uint64_t)shape->seed, 0, (uint32_t)row);
    draw(&numbers, drawn, shape->width);
    for (int64_t i = 0; i < shape->width; i++)
        values[i] = drawn[i] >= shape->threshold ? values[i] * kept : 0.0f;
}

/* Normalise rows.
 *
 * Args:
 *     branch: [rows, H].
 *     offset: [H], or null for none.
 *     residual: [rows, H], or null for none.
 *     weight, bias: [H].
 *     sums: [rows, H], what is normalised, for the way back; null where that is `branch` itself.
 *     means, inverses: [rows], of what is normalised the mean, and 1 / its standard deviation.
 *
 * Returns 0 where there was no memory. */
EXPORTED int64_t layer_norm_forward(
    const Shape *shape, const void *branch, const void *offset, const void *residual,
    const void *weight, const void *bias, void *sums, void *out, float *means, float *inverses)
{
    const int64_t width = shape->width;
    const int is_bf16 = (int)shape->is_bf16;
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        float *memory = malloc((size_t)(4 * 5 * width));
        uint16_t *drawn = malloc((size_t)(2 * rounded_up(width, DRAWS)));
        float *values = memory, *others = memory + width;
        float *weights = memory + 2 * width, *biases = memory + 3 * width;
        float *offsets = memory + 4 * width;
        int has_memory = memory && drawn;
        if (has_memory) {
            load(weights, weight, 0, width, (int)shape->has_bf16_weights);
            load(biases, bias, 0, width, (int)shape->has_bf16_weights);
            if (offset)
                load(offsets, offset, 0, width, (int)shape->has_bf16_weights);
        } else {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(static)
        for (int64_t row = 0; row < shape->num_rows; row++) {
            if (!has_memory)
                continue;
            load(values, branch, row * width, width, is_bf16);
            if (offset)
                for (int64_t i = 0; i < width; i++)
                    values[i] += offsets[i];
            if (shape->threshold)
                drop_out(values, drawn, shape, row);
            if (residual) {
                load(others, residual, row * width, width, is_bf16);
                for (int64_t i = 0; i < width; i++)
                    values[i] += others[i];
            }
            if (sums) { /* what the way back will read is normalised, rounded as it is */
                store(sums, values, row * width, width, is_bf16);
                load(values, sums, row * width, width, is_bf16);
            }
            float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < width; i++)
                sum += values[i];
            float mean = sum / (float)width;
#pragma omp simd reduction(+ : squares)
            for (int64_t i = 0; i < width; i++)
                squares += (values[i] - mean) * (values[i] - mean);
            float inverse = 1.0f / sqrtf(squares / (float)width + (float)shape->eps);
            for (int64_t i = 0; i < width; i++)
                values[i] = (values[i] - mean) * inverse * weights[i] + biases[i];
            store(out, values, row * width, width, is_bf16);
            means[row] = mean;
            inverses[row] = inverse;
        }
        free(memory);
        free(drawn);
    }
    return is_done;
}

/* The gradients; see `layer_norm_forward`.
 *
 * Args:
 *     sums, means, inverses: as the way there left them.
 *     sum_grad: [rows, H], the gradient of the residual, and of the branch where nothing is dropped;
 *         null where nobody asks for it.
 *     branch_grad: likewise, where something is dropped; else null.
 *     weight_grads, bias_grads, offset_grads: [parts, H], to be added up; the last may be null. */
EXPORTED int64_t layer_norm_backward(
    const Shape *shape, const void *out_grad, const void *sums, const void *weight,
    const float *means, const float *inverses, void *sum_grad, void *branch_grad,
    float *weight_grads, float *bias_grads, float *offset_grads)
{
    const int64_t width = shape->width, parts = shape->num_parts;
    const int is_bf16 = (int)shape->is_bf16;
    int is_done = 1;
#pragma omp parallel num_threads((int)shape->num_threads)
    {
        float *memory = malloc((size_t)(4 * 3 * width));
        uint16_t *drawn = malloc((size_t)(2 * rounded_up(width, DRAWS)));
        float *grads = memory, *values = memory + width, *weights = memory + 2 * width;
        int has_memory = memory && drawn;
        if (has_memory)
            load(weights, weight, 0, width, (int)shape->has_bf16_weights);
        else {
#pragma omp atomic write
            is_done = 0;
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            float *weight_grad = weight_grads + part * width, *bias_grad = bias_grads + part * width;
            int64_t first = shape->num_rows * part / parts;
            int64_t end = has_memory ? shape->num_rows * (part + 1) / parts : first;
            memset(weight_grad, 0, (size_t)(4 * width));
            memset(bias_grad, 0, (size_t)(4 * width));
            float *offset_grad = offset_grads ? offset_grads + part * width : NULL;
            if (offset_grad)
                memset(offset_grad, 0, (size_t)(4 * width));
            for (int64_t row = first; row < end; row++) {
                load(grads, out_grad, row * width, width, is_bf16);
                load(values, sums, row * width, width, is_bf16);
                float mean = means[row], inverse = inverses[row], sum = 0.0f, along = 0.0f;
#pragma omp simd reduction(+ : sum, along)
                for (int64_t i = 0; i < width; i++) {
                    float normal = (values[i] - mean) * inverse;
                    bias_grad[i] += grads[i];
                    weight_grad[i] += grads[i] * normal;
                    grads[i] *= weights[i];
                    sum += grads[i];
                    along += grads[i] * normal;
                    values[i] = normal;
                }
                sum /= (float)width;
                along /= (float)width;
                for (int64_t i = 0; i < width; i++)
                    grads[i] = inverse * (grads[i] - sum - values[i] * along);
                if (sum_grad)
                    store(sum_grad, grads, row * width, width, is_bf16);
                if (branch_grad) {
                    drop_out(grads, drawn, shape, row);
                    store(branch_grad, grads, row * width, width, is_bf16);
                }
                if (offset_grad)
                    for (int64_t i = 0; i < width; i++)
                        offset_grad[i] += grads[i];
            }
        }
        free(memory);
        free(drawn);
    }
    return is_done;
}
