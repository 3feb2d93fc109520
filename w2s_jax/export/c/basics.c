/* ------------------------------------------------------------------------------------------------ vectors and small functions

The compiler's vector extensions, as wide as the processor's registers; where there are none, a vector is one number and the same
code is plain C99. */

#if defined(W2S_EXACT) /* products are rounded before they are added, so that every processor says the same */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline, unused))
#else
#define INLINE static inline
#endif
#if !defined(__GNUC__) || defined(W2S_PLAIN)
#define LANES 1
#elif defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#elif defined(__wasm_simd128__)
#define LANES 8 /* two of its vectors: a number that is multiplied by both is read once */
#elif defined(__SSE2__) || defined(__ARM_NEON) || defined(__riscv_vector)
#define LANES 4
#else
#define LANES 1
#endif
#if LANES > 1
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias)); /* at any address of a float */
#define LOAD(place) ((vector)*(const loose *)(place))
#define STORE(place, value) (*(loose *)(place) = (loose)(value))
#else
typedef float vector;
#define LOAD(place) (*(place))
#define STORE(place, value) (*(place) = (value))
#endif

/* ReLU. Of a vector, a comparison is a mask of whole bits. */
#if LANES > 1
typedef int32_t mask __attribute__((vector_size(4 * LANES)));
#define RECTIFY(x) ((vector)((mask)(x) & ((x) > (vector){0})))
#define MOST(a, b) ((vector)(((mask)(a) & ((a) > (b))) | ((mask)(b) & ~((a) > (b)))))
#else
#define RECTIFY(x) ((x) > 0.0f ? (x) : 0.0f)
#define MOST(a, b) LARGER(a, b)
#endif

#if defined(__GNUC__)
#define ALIGNED __attribute__((aligned(64)))
#else
#define ALIGNED
#endif

#define PANEL 16 /* columns of a matrix that lie together, filled up with zeros */
#define FILLED(columns) (((columns) + PANEL - 1) / PANEL * PANEL)
#define LARGER(a, b) ((a) > (b) ? (a) : (b))

#define LOUDEST 0x58635fa9u /* the bits of 1e15, whose squares do not overflow yet; all that is not finite is above */

float sqrtf(float);

/* The compiler refuses the file where a structure does not have the bytes that the header promises. */
#define CHECK(type, bytes) typedef char check_##type[sizeof(type) == (bytes) ? 1 : -1];

typedef union {
    float number;
    uint32_t bits;
    int32_t whole;
} pun;

/* Work memory begins where a line of the cache does: vectors then lie in one each. */
#define LINE 64
INLINE void *align(void *memory)
{
    return (char *)memory + (LINE - (uintptr_t)memory % LINE) % LINE;
}

INLINE void copy(float *to, const float *from, int count)
{
    for (int i = 0; i < count; i++)
        to[i] = from[i];
}

INLINE void fill(float *to, float value, int count)
{
    for (int i = 0; i < count; i++)
        to[i] = value;
}

/* e^x to 2 units in the last place for x <= 0; 0 below -87. Taylor's series of what is left of x / ln 2 behind the point. */
INLINE float exponential(float x)
{
    pun shifted, power;
    x = x < -87.0f ? -87.0f : x;
    shifted.number = x * 1.44269504f + 12582912.0f; /* 1.5 · 2^23: what is added to that is rounded to a whole number */
    float whole = shifted.number - 12582912.0f;
    float rest = x - whole * 0.693359375f; /* ln 2 in two parts, the first with few digits: no product is rounded */
    rest = rest + whole * 2.12194440e-4f;
    float sum = 1.0f / 5040.0f;
    sum = sum * rest + 1.0f / 720.0f;
    sum = sum * rest + 1.0f / 120.0f;
    sum = sum * rest + 1.0f / 24.0f;
    sum = sum * rest + 1.0f / 6.0f;
    sum = sum * rest + 0.5f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    power.bits = (shifted.bits + 127u) << 23; /* 2^whole: of the shifted number's bits, the lowest ones are the whole number */
    return x > -87.0f ? sum * power.number : 0.0f;
}

/* ln x to 1e-7 for x from 1e-30 to 1e30. The series of the area tangent of (m - 1) / (m + 1), m between the roots of 1/2 and 2. */
INLINE float logarithm(float x)
{
    pun number, mantissa, exponent;
    number.number = x;
    uint32_t above = number.bits - 0x3f3504f3u; /* the bits of sqrt(1/2) */
    mantissa.bits = (above & 0x007fffffu) + 0x3f3504f3u;
    exponent.bits = (uint32_t)((int32_t)above >> 23) + 0x4b400000u; /* the bits of 1.5 · 2^23: a whole number becomes a float */
    float whole = exponent.number - 12582912.0f;
    float part = (mantissa.number - 1.0f) / (mantissa.number + 1.0f);
    float square = part * part;
    float sum = 2.0f / 9.0f;
    sum = sum * square + 2.0f / 7.0f;
    sum = sum * square + 2.0f / 5.0f;
    sum = sum * square + 2.0f / 3.0f;
    sum = sum * square + 2.0f;
    return whole * 0.693147181f + sum * part;
}

/* ---------------------------------------------------------------------------------------------------------- products of matrices

Rows of the result are summed in registers, as many at once as fit, a column of vectors at a time. */

#define ROWS_1(DO) DO(0)
#define ROWS_2(DO) ROWS_1(DO) DO(1)
#define ROWS_3(DO) ROWS_2(DO) DO(2)
#define ROWS_4(DO) ROWS_3(DO) DO(3)
#define ROWS_5(DO) ROWS_4(DO) DO(4)
#define ROWS_6(DO) ROWS_5(DO) DO(5)
#define ROWS_7(DO) ROWS_6(DO) DO(6)
#define ROWS_8(DO) ROWS_7(DO) DO(7)
#define ROWS_9(DO) ROWS_8(DO) DO(8)
#define ROWS_10(DO) ROWS_9(DO) DO(9)
#define ROWS_11(DO) ROWS_10(DO) DO(10)
#define ROWS_12(DO) ROWS_11(DO) DO(11)
#define ROWS_13(DO) ROWS_12(DO) DO(12)
#if defined(__wasm_simd128__)
#define MOST_ROWS 5
#else
#define MOST_ROWS 13
#endif
#if LANES == PANEL || defined(__aarch64__)
#define MOST_PAIRS 13 /* rows with two sums each: there are 32 registers */
#elif defined(__wasm_simd128__)
#define MOST_PAIRS 2
#else
#define MOST_PAIRS 6
#endif

#define DECLARE_ROW(row) vector sum_##row = zero;
#define ADD_ROW(row) sum_##row += at[(row) * step] * weight;
#define STORE_ROW(row) STORE(c + (row) * wide, sum_##row);
#define DECLARE_PAIR(row) vector sum_##row = zero, more_##row = zero;
#define ADD_PAIR(row) sum_##row += at[(row) * step] * weight; more_##row += at[(row) * step] * other;
#define STORE_PAIR(row) STORE(c + (row) * wide, sum_##row); STORE(c + (row) * wide + LANES, more_##row);

#define DEFINE_BLOCK(rows)                                                                                                       \
    INLINE void block_##rows(float *c, int wide, const float *const *a, int step, const float *b, int taps, int depth)           \
    {                                                                                                                            \
        const vector zero = {0};                                                                                                 \
        ROWS_##rows(DECLARE_ROW)                                                                                                 \
        for (int tap = 0; tap < taps; tap++) {                                                                                   \
            const float *at = a[tap];                                                                                            \
            for (int k = 0; k < depth; k++, at++, b += PANEL) {                                                                  \
                const vector weight = LOAD(b);                                                                                   \
                ROWS_##rows(ADD_ROW)                                                                                             \
            }                                                                                                                    \
        }                                                                                                                        \
        ROWS_##rows(STORE_ROW)                                                                                                   \
    }
/* With few rows, two columns of vectors: a sum has to wait for its last addition, so there have to be enough of them. */
#define DEFINE_PAIR(rows)                                                                                                        \
    INLINE void pair_##rows(float *c, int wide, const float *const *a, int step, const float *b, int taps, int depth,            \
                            int apart)                                                                                           \
    {                                                                                                                            \
        const vector zero = {0};                                                                                                 \
        ROWS_##rows(DECLARE_PAIR)                                                                                                \
        for (int tap = 0; tap < taps; tap++) {                                                                                   \
            const float *at = a[tap];                                                                                            \
            for (int k = 0; k < depth; k++, at++, b += PANEL) {                                                                  \
                const vector weight = LOAD(b), other = LOAD(b + apart);                                                  \
                ROWS_##rows(ADD_PAIR)                                                                                            \
            }                                                                                                                    \
        }                                                                                                                        \
        ROWS_##rows(STORE_PAIR)                                                                                                  \
    }

DEFINE_BLOCK(1)
DEFINE_BLOCK(2)
DEFINE_BLOCK(3)
DEFINE_BLOCK(4)
DEFINE_BLOCK(5)
DEFINE_BLOCK(6)
DEFINE_BLOCK(7)
DEFINE_BLOCK(8)
DEFINE_BLOCK(9)
DEFINE_BLOCK(10)
DEFINE_BLOCK(11)
DEFINE_BLOCK(12)
DEFINE_BLOCK(13)
DEFINE_PAIR(1)
DEFINE_PAIR(2)
DEFINE_PAIR(3)
DEFINE_PAIR(4)
DEFINE_PAIR(5)
DEFINE_PAIR(6)
DEFINE_PAIR(7)
DEFINE_PAIR(8)
DEFINE_PAIR(9)
DEFINE_PAIR(10)
DEFINE_PAIR(11)
DEFINE_PAIR(12)
DEFINE_PAIR(13)

#define BLOCK_CASE(rows)                                                                                                         \
    case rows:                                                                                                                   \
        block_##rows(to, wide, from, step, weights, taps, depth);                                                                \
        break;
#define PAIR_CASE(rows)                                                                                                          \
    case rows:                                                                                                                   \
        pair_##rows(to, wide, from, step, weights, taps, depth, apart);                                                          \
        break;

/* c[row][column] = sum over tap and k of a[tap][row * step + k] * b[tap][k][column].

Rows of c are `wide` numbers apart; behind `columns`, zeros are written up to whole vectors. b lies in panels of PANEL columns:
[panel][tap][k][PANEL]. All sizes are constants wherever this is used, so that nothing is left of what chooses between them. */
INLINE void multiply(float *c, int wide, const float *const *a, int step, const float *b, int rows, int taps, int depth,
                     int columns)
{
    const int blocks = (rows + MOST_ROWS - 1) / MOST_ROWS, block = (rows + blocks - 1) / blocks;
    const int panel = taps * depth * PANEL, apart = LANES < PANEL ? LANES : panel;
    const float *from[W2S_TAPS];
    int column = 0;
    while (column < columns) {
        const int pair = block <= MOST_PAIRS && column + LANES < columns;
        const float *weights = b + column / PANEL * panel + column % PANEL;
        for (int n = 0; n < blocks; n++) {
            const int first = (n + 1) * block <= rows ? n * block : rows - block; /* the last block may repeat rows */
            float *to = c + first * wide + column;
            for (int tap = 0; tap < taps; tap++)
                from[tap] = a[tap] + first * step;
            if (pair)
                switch (block) {
                    PAIR_CASE(1)
                    PAIR_CASE(2)
                    PAIR_CASE(3)
                    PAIR_CASE(4)
                    PAIR_CASE(5)
                    PAIR_CASE(6)
                    PAIR_CASE(7)
                    PAIR_CASE(8)
                    PAIR_CASE(9)
                    PAIR_CASE(10)
                    PAIR_CASE(11)
                    PAIR_CASE(12)
                    PAIR_CASE(13)
                }
            else
                switch (block) {
                    BLOCK_CASE(1)
                    BLOCK_CASE(2)
                    BLOCK_CASE(3)
                    BLOCK_CASE(4)
                    BLOCK_CASE(5)
                    BLOCK_CASE(6)
                    BLOCK_CASE(7)
                    BLOCK_CASE(8)
                    BLOCK_CASE(9)
                    BLOCK_CASE(10)
                    BLOCK_CASE(11)
                    BLOCK_CASE(12)
                    BLOCK_CASE(13)
                }
        }
        column += pair ? 2 * LANES : LANES;
    }
}
