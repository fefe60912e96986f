/* What the compiled kernels share: values of 16 or 32 bits, and random numbers by their place. */

#ifndef ZEROBERT_KERNELS_NATIVE_H
#define ZEROBERT_KERNELS_NATIVE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#define HAS_PAIRS 1 /* products of pairs of bf16, and rounding to it, are instructions */
#else
#define HAS_PAIRS 0
#endif

#define EXPORTED __attribute__((visibility("default")))

/* Values that a vector register holds; GCC cuts vectors where a machine's are shorter. */
#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif
typedef float Vector __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define DRAW_LANES 16
#define DRAWS (2 * DRAW_LANES) /* random numbers made at a time */
#define ROUNDS 10

static inline int64_t rounded_up(int64_t number, int64_t unit)
{
    return (number + unit - 1) / unit * unit;
}

static inline float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t to_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* The bits of the nearest bfloat16, a tie to the even one. */
static inline uint16_t to_bf16(float value)
{
    uint32_t bits = to_bits(value);
    if (value != value)
        return (uint16_t)((bits >> 16) | 0x40); /* not a number stays one */
    return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

/* Read some values of an array of fp32 or bf16. */
static inline void load(
    float *restrict values, const void *restrict array, int64_t first, int64_t number, int is_bf16)
{
    if (is_bf16) {
        const uint16_t *halves = (const uint16_t *)array + first;
        for (int64_t i = 0; i < number; i++)
            values[i] = from_bits((uint32_t)halves[i] << 16);
    } else {
        const float *wholes = (const float *)array + first;
        for (int64_t i = 0; i < number; i++)
            values[i] = wholes[i];
    }
}

/* Write some values of an array of fp32 or bf16. */
static inline void store(
    void *restrict array, const float *restrict values, int64_t first, int64_t number, int is_bf16)
{
    if (is_bf16) {
        uint16_t *halves = (uint16_t *)array + first;
        int64_t i = 0;
#if HAS_PAIRS
        for (; i + LANES <= number; i += LANES)
            _mm256_storeu_si256((__m256i *)(halves + i),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + i)));
#endif
        for (; i < number; i++)
            halves[i] = to_bf16(values[i]);
    } else {
        float *wholes = (float *)array + first;
        for (int64_t i = 0; i < number; i++)
            wholes[i] = values[i];
    }
}

/* What values that are kept are scaled by, where `threshold` of 65,536 are dropped. */
static inline float scale_of_kept(int64_t threshold)
{
    return 65536.0f / (float)(65536 - threshold);
}

/* 16-bit random numbers that are a function of a seed and of a place, so that a mask is made again
 * rather than kept: xoshiro128++ in lanes, each from a state that Philox4x32-10 makes of its counter
 * (lane, row, stream, 0).
 *
 * Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; Blackman and Vigna 2021,
 * "Scrambled linear pseudorandom number generators". */
typedef struct {
    uint32_t words[4][DRAW_LANES];
} Numbers;

static inline void begin(Numbers *numbers, uint64_t seed, uint32_t stream, uint32_t row)
{
    uint32_t words[4][DRAW_LANES];
    uint32_t keys[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (uint32_t lane = 0; lane < DRAW_LANES; lane++) {
        words[0][lane] = lane;
        words[1][lane] = row;
        words[2][lane] = stream;
        words[3][lane] = 0;
    }
    for (int round = 0; round < ROUNDS; round++) {
        for (int lane = 0; lane < DRAW_LANES; lane++) {
            uint64_t left = 0xD2511F53u * (uint64_t)words[0][lane];
            uint64_t right = 0xCD9E8D57u * (uint64_t)words[2][lane];
            words[0][lane] = (uint32_t)(right >> 32) ^ words[1][lane] ^ keys[0];
            words[1][lane] = (uint32_t)right;
            words[2][lane] = (uint32_t)(left >> 32) ^ words[3][lane] ^ keys[1];
            words[3][lane] = (uint32_t)left;
        }
        keys[0] += 0x9E3779B9u;
        keys[1] += 0xBB67AE85u;
    }
    memcpy(numbers->words, words, sizeof words);
}

static inline uint32_t rotated(uint32_t word, int left)
{
    return word << left | word >> (32 - left);
}

/* Draw the next `number`; there must be room for a multiple of DRAWS. */
static inline void draw(Numbers *numbers, uint16_t *drawn, int64_t number)
{
    Numbers state = *numbers;
    uint32_t (*words)[DRAW_LANES] = state.words;
    for (int64_t first = 0; first < number; first += DRAWS) {
        uint32_t out[DRAW_LANES];
        for (int lane = 0; lane < DRAW_LANES; lane++) {
            uint32_t a = words[0][lane], b = words[1][lane], c = words[2][lane], d = words[3][lane];
            out[lane] = rotated(a + d, 7) + a;
            uint32_t shifted = b << 9;
            c ^= a;
            d ^= b;
            words[0][lane] = a ^ d;
            words[1][lane] = b ^ c;
            words[2][lane] = c ^ shifted;
            words[3][lane] = rotated(d, 11);
        }
        memcpy(drawn + first, out, sizeof out);
    }
    *numbers = state;
}

#endif
