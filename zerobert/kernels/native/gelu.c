/* GELU of `wide + bias`, forward and backward, in one pass over memory each.
 *
 * Everything is computed in fp32, whatever the values are kept in. The gradient of the bias is added
 * up in a fixed number of parts, so that the result does not depend on the number of threads.
 *
 * I values of a row. Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415), the exact form. */

#include "native.h"

#include <math.h>

#define BLOCK 256 /* values that are worked on at a time, in the fastest cache */

/* Beyond, the normal distribution is 0 or 1 to within 2e-8. */
#define EDGE 5.5f

typedef struct {
    int64_t num_rows, width;
    int64_t is_bf16;
    int64_t has_bf16_bias;
    int64_t num_parts;
    int64_t num_threads;
} Shape;

/* With P the normal distribution, (P(x) - 1/2) / x within 4e-8, and (d/dx x P(x) - 1/2) / x within
 * 2e-7, both times x, up to the edge: polynomials in 2 (x / EDGE)^2 - 1, lowest power first. Fitted by
 * least squares at Chebyshev's points, weighted until the largest error was least. */
static const float SHARE[] = {
    1.285519366e-01f,  -6.417247506e-02f, 4.773698969e-02f,  -3.878726687e-02f, 3.208174192e-02f,
    -2.611246828e-02f, 2.028797706e-02f,  -1.467136721e-02f, 1.046863398e-02f,  -7.674667606e-03f,
    4.236360917e-03f,  -1.229403554e-03f, 1.023857406e-03f,  -1.368828494e-03f, 5.380742037e-04f};
static const float SLOPE[] = {
    1.287591682e-01f,  -6.574014008e-02f, 5.367087270e-02f,  -5.372582348e-02f, 6.018722984e-02f,
    -6.885716885e-02f, 7.533517513e-02f,  -7.291939965e-02f, 6.065644917e-02f,  -5.308633417e-02f,
    4.956641085e-02f,  -2.782333426e-02f, 4.100737531e-03f,  -6.425111686e-03f, 1.212023847e-02f,
    -4.909808531e-03f};

#define LENGTH_OF(series) ((int)(sizeof(series) / sizeof(series)[0]))

/* x times a series at x, which is within the edges. */
static inline __attribute__((always_inline)) float times_series(
    float x, const float *series, int length)
{
    float place = x * x * (2.0f / (EDGE * EDGE)) - 1.0f, sum = series[length - 1];
#pragma GCC unroll 16
    for (int k = length - 2; k >= 0; k--)
        sum = sum * place + series[k];
    return x * sum;
}

/* Of a row, the block's values that there are. */
static inline int64_t number_at(int64_t first, int64_t width)
{
    return width - first < BLOCK ? width - first : BLOCK;
}

/* out = GELU(wide + bias).
 *
 * Args:
 *     wide, out: [rows, I].
 *     bias: [I].
 *
 * Returns 0 where there was no memory. */
EXPORTED int64_t gelu_forward(const Shape *shape, const void *wide, const void *bias, void *out)
{
    const int64_t width = shape->width;
    const int is_bf16 = (int)shape->is_bf16;
    float *biases = malloc((size_t)(4 * width));
    if (!biases)
        return 0;
    load(biases, bias, 0, width, (int)shape->has_bf16_bias);
#pragma omp parallel for schedule(static) num_threads((int)shape->num_threads)
    for (int64_t row = 0; row < shape->num_rows; row++)
        for (int64_t first = 0; first < width; first += BLOCK) {
            float values[BLOCK];
            int64_t number = number_at(first, width), place = row * width + first;
            load(values, wide, place, number, is_bf16);
            for (int64_t i = 0; i < number; i++) {
                float x = values[i] + biases[first + i], size = fabsf(x);
                float near = size > EDGE ? EDGE : size;
                /* The larger of x and 0, less what GELU is below it. */
                float below = near * (0.5f - times_series(near, SHARE, LENGTH_OF(SHARE)));
                values[i] = 0.5f * (x + size) - below;
            }
            store(out, values, place, number, is_bf16);
        }
    free(biases);
    return 1;
}

/* The gradients; see `gelu_forward`.
 *
 * Args:
 *     out_grad, wide_grad: [rows, I].
 *     bias_grads: [parts, I], to be added up. */
EXPORTED int64_t gelu_backward(
    const Shape *shape, const void *out_grad, const void *wide, const void *bias, void *wide_grad,
    float *bias_grads)
{
    const int64_t width = shape->width, parts = shape->num_parts;
    const int is_bf16 = (int)shape->is_bf16;
    float *biases = malloc((size_t)(4 * width));
    if (!biases)
        return 0;
    load(biases, bias, 0, width, (int)shape->has_bf16_bias);
#pragma omp parallel for schedule(static) num_threads((int)shape->num_threads)
    for (int64_t part = 0; part < parts; part++) {
        float *bias_grad = bias_grads + part * width;
        int64_t end = shape->num_rows * (part + 1) / parts;
        memset(bias_grad, 0, (size_t)(4 * width));
        for (int64_t row = shape->num_rows * part / parts; row < end; row++)
            for (int64_t first = 0; first < width; first += BLOCK) {
                float values[BLOCK], grads[BLOCK];
                int64_t number = number_at(first, width), place = row * width + first;
                load(values, wide, place, number, is_bf16);
                load(grads, out_grad, place, number, is_bf16);
                for (int64_t i = 0; i < number; i++) {
                    float x = values[i] + biases[first + i];
                    float near = x < -EDGE ? -EDGE : x > EDGE ? EDGE : x;
                    grads[i] *= 0.5f + times_series(near, SLOPE, LENGTH_OF(SLOPE));
                    bias_grad[first + i] += grads[i];
                }
                store(wide_grad, grads, place, number, is_bf16);
            }
    }
    free(biases);
    return 1;
}
