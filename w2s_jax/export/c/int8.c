/* ----------------------------------------------------------------------------------------------------------- the trunk in 8 bits

As INT8.md specifies it. A column is one moment of an image: [mel][channel], with REACH rows of zeros before and behind. Rows are read
in whole words, so there is a word more than they need; the weights for what is too much are 0. */

typedef uint8_t cell;

#define SILENT IMAGE_ZERO /* what stands outside of the log-mel image */
#define WIDE FILLED(CHANNELS)
#define WORDS(bytes) (((bytes) + 3) / 4)
#define MARGIN REACH
#define COLUMN(mels) (4 * WORDS(((mels) + 2 * MARGIN) * CHANNELS) + 4) /* bytes of a column */
#define MORE (WIDE - CHANNELS)                                        /* that are written behind its last row */
#define APART(mels) (COLUMN(mels) + MORE)                             /* from column to column in work memory */
#define IMAGE_COLUMN (4 * WORDS(BANDS + 2 * REACH) + 4)

typedef struct {
    int32_t products[GROUP * MELS * WIDE];
} trunk_work;

INLINE void keep(cell *to, const cell *from, int count)
{
    for (int i = 0; i < count; i++)
        to[i] = from[i];
}

INLINE void blank(cell *to, int value, int count)
{
    for (int i = 0; i < count; i++)
        to[i] = (cell)value;
}

INLINE void silence(cell *column)
{
    blank(column, SILENT, IMAGE_COLUMN);
}

/* The nearest whole number from 0 to 255, of two equally near ones the even one. */
INLINE cell quantise(float x)
{
    pun shifted;
    x = x > 0.0f ? x : 0.0f;
    x = x < 255.0f ? x : 255.0f;
    shifted.number = x + 12582912.0f;
    return (cell)(shifted.bits & 255u);
}

#if LANES > 1
typedef mask loose_mask __attribute__((aligned(4), may_alias));
typedef uint8_t byte_vector __attribute__((vector_size(LANES)));
typedef byte_vector loose_bytes __attribute__((aligned(1), may_alias));
#endif

/* The larger ones of WIDE numbers each. */
INLINE void larger(cell *to, const cell *a, const cell *b)
{
#if LANES > 1
    for (int i = 0; i < WIDE; i += LANES) {
        const byte_vector one = *(const loose_bytes *)(a + i), other = *(const loose_bytes *)(b + i);
        const byte_vector first = (byte_vector)(one > other);
        *(loose_bytes *)(to + i) = (one & first) | (other & ~first);
    }
#else
    for (int i = 0; i < WIDE; i++)
        to[i] = LARGER(a[i], b[i]);
#endif
}

/* quantise of (sum + bias) * scale, WIDE of them. */
INLINE void quantise_sums(cell *to, const int32_t *sums_of, const int32_t *bias, const float *scale)
{
#if LANES > 1
    for (int i = 0; i < WIDE; i += LANES) {
        const mask whole = *(const loose_mask *)(sums_of + i) + *(const loose_mask *)(bias + i);
        const vector most = (vector){0} + 255.0f, x = __builtin_convertvector(whole, vector) * LOAD(scale + i);
        const vector above = RECTIFY(x);
        const mask fits = (mask)(above < most);
        const vector within = (vector)(((mask)above & fits) | ((mask)most & ~fits)) + 12582912.0f;
        *(loose_bytes *)(to + i) = __builtin_convertvector((mask)within & 255, byte_vector);
    }
#else
    for (int i = 0; i < CHANNELS; i++)
        to[i] = quantise((float)(sums_of[i] + bias[i]) * scale[i]);
#endif
}

INLINE void write_image(cell *column, const float *values)
{
    silence(column);
    for (int i = 0; i < BANDS; i++)
        column[REACH + i] = quantise(values[i] * IMAGE_STEPS + (float)IMAGE_ZERO);
}

/* ---- sums of products of bytes: c[row][column] = sum over tap and k of a[tap][row * step + k] * b[tap][k][column]

a has no signs, b has; all sums are exact in 32 bits. b lies in panels, four k of a column together: [panel][tap][word][PANEL][4]. */

#if defined(__GNUC__)
/* Four bytes at any address. */
INLINE int32_t word(const void *place)
{
    typedef int32_t loose_word __attribute__((aligned(1), may_alias));
    return *(const loose_word *)place;
}
#endif

#if defined(__AVX512VNNI__) && LANES == PANEL
#include <immintrin.h>
#define DOTS PANEL
typedef __m512i dots;
#define DOTS_ZERO _mm512_setzero_si512()
#define DOTS_LOAD(place) _mm512_loadu_si512((const void *)(place))
#define DOTS_STORE(place, value) _mm512_storeu_si512((void *)(place), value)
#define DOTS_ADD(sum, four, weights) _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(four), weights)
#elif (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))) && !defined(W2S_PLAIN)
#include <immintrin.h>
#define DOTS 8
typedef __m256i dots;
#define DOTS_ZERO _mm256_setzero_si256()
#define DOTS_LOAD(place) _mm256_loadu_si256((const __m256i *)(const void *)(place))
#define DOTS_STORE(place, value) _mm256_storeu_si256((__m256i *)(void *)(place), value)
#if defined(__AVXVNNI__)
#define DOTS_ADD(sum, four, weights) _mm256_dpbusd_avx_epi32(sum, _mm256_set1_epi32(four), weights)
#else
#define DOTS_ADD(sum, four, weights) _mm256_dpbusd_epi32(sum, _mm256_set1_epi32(four), weights)
#endif
#elif defined(__ARM_FEATURE_MATMUL_INT8) && defined(__aarch64__) && !defined(W2S_PLAIN)
#include <arm_neon.h>
#define DOTS 4
typedef int32x4_t dots;
#define DOTS_ZERO vdupq_n_s32(0)
#define DOTS_LOAD(place) vreinterpretq_s32_s8(vld1q_s8(place))
#define DOTS_STORE(place, value) vst1q_s32(place, value)
#define DOTS_ADD(sum, four, weights) vusdotq_s32(sum, vreinterpretq_u8_s32(vdupq_n_s32(four)), vreinterpretq_s8_s32(weights))
#elif defined(__ARM_FEATURE_DOTPROD) && defined(__aarch64__) && !defined(W2S_PLAIN)
#include <arm_neon.h>
#define DOTS 4
typedef int32x4_t dots;
#define DOTS_ZERO vdupq_n_s32(0)
#define DOTS_LOAD(place) vreinterpretq_s32_s8(vld1q_s8(place))
#define DOTS_STORE(place, value) vst1q_s32(place, value)
/* Both factors have signs: 128 is taken off the bytes, and 128 times the weights are added again, 64 and 64. */
INLINE dots add_dots(dots sum, int32_t four, dots weights)
{
    const int8x16_t w = vreinterpretq_s8_s32(weights), half = vdupq_n_s8(64);
    sum = vdotq_s32(vdotq_s32(sum, half, w), half, w);
    return vdotq_s32(sum, vreinterpretq_s8_s32(vdupq_n_s32(four ^ (int32_t)0x80808080u)), w);
}
#define DOTS_ADD(sum, four, weights) add_dots(sum, four, weights)

/* Elsewhere pairs of 16 bits: numbers 0 and 2 of four, then 1 and 3, which exact 32-bit sums of two products add. */
#elif defined(__AVX2__) && !defined(W2S_PLAIN)
#include <immintrin.h>
#define DOTS 8
typedef __m256i dots;
#define DOTS_ZERO _mm256_setzero_si256()
#define DOTS_LOAD(place) _mm256_loadu_si256((const __m256i *)(const void *)(place))
#define DOTS_STORE(place, value) _mm256_storeu_si256((__m256i *)(void *)(place), value)
INLINE dots add_dots(dots sum, int32_t four, dots weights)
{
    const dots even = _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8), odd = _mm256_srai_epi16(weights, 8);
    const dots x = _mm256_set1_epi32(four & 0x00ff00ff), y = _mm256_set1_epi32((four >> 8) & 0x00ff00ff);
    return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(x, even), _mm256_madd_epi16(y, odd)));
}
#define DOTS_ADD(sum, four, weights) add_dots(sum, four, weights)
#define MOST_DOTS 7
#elif defined(__SSE2__) && !defined(W2S_PLAIN)
#include <emmintrin.h>
#define DOTS 4
typedef __m128i dots;
#define DOTS_ZERO _mm_setzero_si128()
#define DOTS_LOAD(place) _mm_loadu_si128((const __m128i *)(const void *)(place))
#define DOTS_STORE(place, value) _mm_storeu_si128((__m128i *)(void *)(place), value)
INLINE dots add_dots(dots sum, int32_t four, dots weights)
{
    const dots even = _mm_srai_epi16(_mm_slli_epi16(weights, 8), 8), odd = _mm_srai_epi16(weights, 8);
    const dots x = _mm_set1_epi32(four & 0x00ff00ff), y = _mm_set1_epi32((four >> 8) & 0x00ff00ff);
    return _mm_add_epi32(sum, _mm_add_epi32(_mm_madd_epi16(x, even), _mm_madd_epi16(y, odd)));
}
#define DOTS_ADD(sum, four, weights) add_dots(sum, four, weights)
#define MOST_DOTS 7
#elif defined(__wasm_simd128__) && !defined(W2S_PLAIN)
#include <wasm_simd128.h>
#define DOTS 4
typedef v128_t dots;
#define DOTS_ZERO wasm_i32x4_const_splat(0)
#define DOTS_LOAD(place) wasm_v128_load(place)
#define DOTS_STORE(place, value) wasm_v128_store(place, value)
INLINE dots add_dots(dots sum, int32_t four, dots weights)
{
    const dots even = wasm_i16x8_shr(wasm_i16x8_shl(weights, 8), 8), odd = wasm_i16x8_shr(weights, 8);
    const dots x = wasm_i32x4_splat(four & 0x00ff00ff), y = wasm_i32x4_splat((four >> 8) & 0x00ff00ff);
    return wasm_i32x4_add(sum, wasm_i32x4_add(wasm_i32x4_dot_i16x8(x, even), wasm_i32x4_dot_i16x8(y, odd)));
}
#define DOTS_ADD(sum, four, weights) add_dots(sum, four, weights)
#define MOST_DOTS 7
#elif defined(__ARM_FEATURE_DSP) && defined(__arm__) && !defined(W2S_PLAIN)
#include <arm_acle.h>
#define DOTS 1
typedef int32_t dots;
#define DOTS_ZERO 0
#define DOTS_LOAD(place) word(place)
#define DOTS_STORE(place, value) (*(place) = (value))
INLINE dots add_dots(dots sum, int32_t four, dots weights)
{
    const int16x2_t even = __sxtb16((int8x4_t)weights), odd = __sxtb16((int8x4_t)((uint32_t)weights >> 8));
    const int16x2_t x = (int16x2_t)__uxtb16((uint8x4_t)four), y = (int16x2_t)__uxtb16((uint8x4_t)((uint32_t)four >> 8));
    return __smlad(y, odd, __smlad(x, even, sum));
}
#define DOTS_ADD(sum, four, weights) add_dots(sum, four, weights)
#define MOST_DOTS 4
#endif
#if defined(DOTS) && !defined(MOST_DOTS)
#define MOST_DOTS MOST_ROWS
#endif

#if defined(DOTS)

#define DECLARE_DOTS(row) dots sum_##row = DOTS_ZERO;
#define ADD_DOTS(row) sum_##row = DOTS_ADD(sum_##row, word(at + (row) * step), weights);
#define STORE_DOTS(row) DOTS_STORE(to + (row) * wide, sum_##row);
#define DOTS_CASE(rows)                                                                                                          \
    case rows: {                                                                                                                 \
        ROWS_##rows(DECLARE_DOTS)                                                                                                \
        for (int tap = 0; tap < taps; tap++) {                                                                                   \
            const cell *at = a[tap] + first * step;                                                                              \
            for (int k = 0; k < words; k++, at += 4, from += 4 * PANEL) {                                                        \
                const dots weights = DOTS_LOAD(from);                                                                            \
                ROWS_##rows(ADD_DOTS)                                                                                            \
            }                                                                                                                    \
        }                                                                                                                        \
        ROWS_##rows(STORE_DOTS)                                                                                                  \
        break;                                                                                                                   \
    }

INLINE void multiply_bytes(int32_t *c, int wide, const cell *const *a, int step, const int8_t *b, int rows, int taps, int depth,
                           int columns)
{
    const int blocks = (rows + MOST_DOTS - 1) / MOST_DOTS, block = (rows + blocks - 1) / blocks, words = WORDS(depth);
    for (int column = 0; column < columns; column += DOTS)
        for (int n = 0; n < blocks; n++) {
            const int first = (n + 1) * block <= rows ? n * block : rows - block; /* the last block may repeat rows */
            const int8_t *from = b + column / PANEL * (taps * words * 4 * PANEL) + column % PANEL * 4;
            int32_t *to = c + first * wide + column;
            switch (block) {
                DOTS_CASE(1)
                DOTS_CASE(2)
                DOTS_CASE(3)
                DOTS_CASE(4)
                DOTS_CASE(5)
                DOTS_CASE(6)
                DOTS_CASE(7)
                DOTS_CASE(8)
                DOTS_CASE(9)
                DOTS_CASE(10)
                DOTS_CASE(11)
                DOTS_CASE(12)
                DOTS_CASE(13)
            }
        }
}

#else

static void multiply_bytes(int32_t *c, int wide, const cell *const *a, int step, const int8_t *b, int rows, int taps, int depth,
                           int columns)
{
    const int words = WORDS(depth);
    for (int column = 0; column < columns; column += PANEL, b += taps * words * 4 * PANEL)
        for (int row = 0; row < rows; row++) {
            const int8_t *from = b;
            int32_t sums_of[PANEL] = {0};
            for (int tap = 0; tap < taps; tap++) {
                const cell *at = a[tap] + row * step;
                for (int k = 0; k < words; k++, at += 4, from += 4 * PANEL) {
                    const int32_t a0 = at[0], a1 = at[1], a2 = at[2], a3 = at[3];
                    for (int i = 0; i < PANEL; i++)
                        sums_of[i] += a0 * from[4 * i] + a1 * from[4 * i + 1] + a2 * from[4 * i + 2] + a3 * from[4 * i + 3];
                }
            }
            for (int i = 0; i < PANEL; i++)
                c[row * wide + column + i] = sums_of[i];
        }
}

#endif

/* Zeros outside of the image: rows before and behind, columns before the first and from `end` on. */
INLINE void frame(cell *image, int mels, int32_t first, int32_t end)
{
    for (int n = 0; n < GROUP; n++) {
        cell *column = image + n * APART(mels);
        if (first + n < 0 || first + n >= end)
            blank(column, 0, COLUMN(mels));
        blank(column, 0, MARGIN * CHANNELS);
        blank(column + (MARGIN + mels) * CHANNELS, 0, COLUMN(mels) - (MARGIN + mels) * CHANNELS);
    }
}

/* Sums of a convolution → ReLU of them and the bias, in steps of the result. */
INLINE void finish(cell *image, const int32_t *sums_of, const int32_t *bias, const float *scale, int mels)
{
    for (int n = 0; n < GROUP; n++)
        for (int mel = 0; mel < mels; mel++) {
            cell *to = image + n * APART(mels) + (MARGIN + mel) * CHANNELS;
            quantise_sums(to, sums_of + (n * mels + mel) * WIDE, bias, scale); /* what is too much lies where nothing is yet */
        }
}

/* The first convolution: columns of the log-mel image → sums of GROUP columns. */
INLINE void multiply_image(const cell *const *columns, trunk_work *work)
{
    for (int n = 0; n < GROUP; n++)
        multiply_bytes(work->products + n * MELS * WIDE, WIDE, columns + n * STRIDE, STRIDE, first_kernel, MELS, W2S_KERNEL,
                       W2S_KERNEL, CHANNELS);
}

INLINE void finish_image(cell *image, const trunk_work *work)
{
    finish(image, work->products, first_bias, first_scale, MELS);
}

INLINE void multiply_columns(const cell *const *columns, int mels, int layer, trunk_work *work)
{
    for (int n = 0; n < GROUP; n++)
        multiply_bytes(work->products + n * mels * WIDE, WIDE, columns + n, CHANNELS, kernels[layer], mels, W2S_KERNEL,
                       W2S_KERNEL * CHANNELS, CHANNELS);
}

INLINE void finish_columns(cell *image, int mels, int layer, const trunk_work *work)
{
    finish(image, work->products, biases[layer], steps_of[layer], mels);
}

/* Tokens [count][TOKEN] → scores and values, or values, [count][PLACES][PARTS][FILLED(FEATURES)]. */
INLINE void multiply_tokens(pun *products, const cell *tokens, int count)
{
    const cell *const from[1] = {tokens};
    multiply_bytes(&products->whole, PARTS * FILLED(FEATURES), from, DEPTH, head_kernel, count * PLACES, 1, DEPTH,
                   PARTS * FILLED(FEATURES));
    for (int row = 0; row < count * PLACES; row++)
        for (int i = 0; i < PARTS * FILLED(FEATURES); i++, products++)
            products->number = (float)products->whole * head_scale[i];
}
