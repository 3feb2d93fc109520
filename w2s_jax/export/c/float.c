/* --------------------------------------------------------------------------------------------------------- the trunk in float32

A column is one moment of an image: [mel][channel]. What multiplies rows as they lie in memory needs rows of zeros before and behind
them; Winograd's combinations of rows do without. */

typedef float cell;

#define SILENT 0.0f /* what stands outside of the log-mel image */
#define WIDE FILLED(CHANNELS)
#if W2S_KERNEL == 3
#define MARGIN 0
#define PRODUCTS (6 * 2) /* of Winograd's F(4, 3), for each pair of mels */
#define MIXED 4
#else
#define MARGIN REACH
#define PRODUCTS (GROUP * 2)
#define MIXED 0
#endif
#define COLUMN(mels) (((mels) + 2 * MARGIN) * CHANNELS) /* numbers of a column */
#define MORE (WIDE - CHANNELS)                          /* that are read and written behind its last row: whole vectors */
#define APART(mels) (COLUMN(mels) + MORE)               /* from column to column in work memory */
#define IMAGE_COLUMN (BANDS + 2 * REACH)
#define PAIRS(mels) (((mels) + 1) / 2)

typedef struct {
    float products[PRODUCTS * PAIRS(MELS) * WIDE];
    float mixed[LARGER(MIXED * PAIRS(MELS) * WIDE, 1)];
} trunk_work;

INLINE void keep(cell *to, const cell *from, int count)
{
    copy(to, from, count);
}

/* The larger ones of WIDE numbers each. */
INLINE void larger(cell *to, const cell *a, const cell *b)
{
    for (int i = 0; i < WIDE; i += LANES) {
        const vector one = LOAD(a + i), other = LOAD(b + i);
        STORE(to + i, MOST(one, other));
    }
}

INLINE void silence(cell *column)
{
    fill(column, SILENT, IMAGE_COLUMN);
}

INLINE void write_image(cell *column, const float *values)
{
    fill(column, SILENT, REACH);
    copy(column + REACH, values, BANDS);
    fill(column + REACH + BANDS, SILENT, REACH);
}

/* Zeros outside of the image: rows before and behind, columns before the first and from `end` on. */
INLINE void frame(cell *image, int mels, int32_t first, int32_t end)
{
    for (int n = 0; n < GROUP; n++) {
        cell *column = image + n * APART(mels);
        if (first + n < 0 || first + n >= end)
            fill(column, 0.0f, COLUMN(mels));
        fill(column, 0.0f, MARGIN * CHANNELS);
        fill(column + (MARGIN + mels) * CHANNELS, 0.0f, MARGIN * CHANNELS);
    }
}

/* Sums of a convolution → ReLU of them and the bias. `sums` is [GROUP][mels][WIDE]. */
INLINE void finish_direct(cell *image, const float *sums, const float *bias, int mels)
{
    for (int n = 0; n < GROUP; n++)
        for (int mel = 0; mel < mels; mel++) {
            float *to = image + n * APART(mels) + (MARGIN + mel) * CHANNELS;
            for (int at = 0; at < CHANNELS; at += LANES) {
                vector sum = LOAD(sums + (n * mels + mel) * WIDE + at) + LOAD(bias + at);
                STORE(to + at, RECTIFY(sum)); /* what is written too much lies where the next row will be */
            }
        }
}

/* The first convolution: columns of the log-mel image → sums of GROUP columns. */
INLINE void multiply_image(const cell *const *columns, trunk_work *work)
{
    const float *from[W2S_TAPS];
    for (int n = 0; n < GROUP; n++) {
        for (int tap = 0; tap < W2S_KERNEL; tap++)
            from[tap] = columns[n * STRIDE + tap];
        multiply(work->products + n * MELS * WIDE, WIDE, from, STRIDE, first_kernel, MELS, W2S_KERNEL, W2S_KERNEL, CHANNELS);
    }
}

INLINE void finish_image(cell *image, const trunk_work *work)
{
    finish_direct(image, work->products, first_bias, MELS);
}

#if W2S_KERNEL == 3

/* Winograd's F(4, 3) over time and F(2, 3) over mel (Lavin and Gray, arXiv 1509.09308): 4 × 2 numbers of the result need 6 × 4 products
for each pair of channels instead of 8 × 9. A row of four columns is written from rows of six; six combinations of columns, and of each
four combinations of rows, are multiplied by weights that generate.py has combined likewise. */

/* The n-th combination of six columns, from a row's channel on. */
INLINE vector combine(const cell *const *x, int n, int at)
{
    switch (n) {
        case 0:
            return 4.0f * LOAD(x[0] + at) - 5.0f * LOAD(x[2] + at) + LOAD(x[4] + at);
        case 1:
            return (LOAD(x[4] + at) + LOAD(x[3] + at)) - 4.0f * (LOAD(x[2] + at) + LOAD(x[1] + at));
        case 2:
            return (LOAD(x[4] + at) - LOAD(x[3] + at)) - 4.0f * (LOAD(x[2] + at) - LOAD(x[1] + at));
        case 3:
            return (LOAD(x[4] + at) - LOAD(x[2] + at)) + 2.0f * (LOAD(x[3] + at) - LOAD(x[1] + at));
        case 4:
            return (LOAD(x[4] + at) - LOAD(x[2] + at)) - 2.0f * (LOAD(x[3] + at) - LOAD(x[1] + at));
        default:
            return 4.0f * LOAD(x[1] + at) - 5.0f * LOAD(x[3] + at) + LOAD(x[5] + at);
    }
}

/* Of the n-th combination of columns, the four combinations of rows: [4][pair of rows][WIDE]. */
INLINE void mix(float *mixed, const cell *const *x, int n, int mels)
{
    const int pairs = PAIRS(mels), apart = pairs * WIDE;
    const vector zero = {0}; /* the rows before the first and behind the last */
    for (int at = 0; at < CHANNELS; at += LANES) {
        vector a = zero, b = combine(x, n, at);
        for (int pair = 0; pair < pairs; pair++) {
            const int row = 2 * pair + 1;
            const vector c = row < mels ? combine(x, n, row * CHANNELS + at) : zero;
            const vector d = row + 1 < mels ? combine(x, n, (row + 1) * CHANNELS + at) : zero;
            float *to = mixed + pair * WIDE + at;
            STORE(to, a - c);
            STORE(to + apart, b + c);
            STORE(to + 2 * apart, c - b);
            STORE(to + 3 * apart, b - d);
            a = c;
            b = d;
        }
    }
}

#define DECLARE_TWO(row) vector sum_##row = zero, more_##row = zero;
#define ADD_INNER(row)                                                                                                           \
    sum_##row += second[(row) * WIDE] * weight;                                                                                  \
    more_##row += third[(row) * WIDE] * other;
#define TURN(row)                                                                                                                \
    {                                                                                                                            \
        const vector difference = sum_##row - more_##row;                                                                        \
        sum_##row += more_##row;                                                                                                 \
        more_##row = difference;                                                                                                 \
    }
#define ADD_OUTER(row)                                                                                                           \
    sum_##row += first[(row) * WIDE] * weight;                                                                                   \
    more_##row += fourth[(row) * WIDE] * other;
#define STORE_TWO(row)                                                                                                           \
    STORE(c + 2 * (row) * WIDE, sum_##row);                                                                                      \
    STORE(c + (2 * (row) + 1) * WIDE, more_##row);
#define DEFINE_TWO(rows)                                                                                                         \
    INLINE void two_##rows(float *c, const float *mixed, int apart, const float *b)                                              \
    {                                                                                                                            \
        const float *first = mixed, *second = mixed + apart, *third = second + apart, *fourth = third + apart;                   \
        const vector zero = {0};                                                                                                 \
        ROWS_##rows(DECLARE_TWO)                                                                                                 \
        for (int k = 0; k < CHANNELS; k++, second++, third++) {                                                                  \
            const vector weight = LOAD(b + (CHANNELS + k) * PANEL), other = LOAD(b + (2 * CHANNELS + k) * PANEL);                \
            ROWS_##rows(ADD_INNER)                                                                                               \
        }                                                                                                                        \
        ROWS_##rows(TURN)                                                                                                        \
        for (int k = 0; k < CHANNELS; k++, first++, fourth++) {                                                                  \
            const vector weight = LOAD(b + k * PANEL), other = LOAD(b + (3 * CHANNELS + k) * PANEL);                             \
            ROWS_##rows(ADD_OUTER)                                                                                               \
        }                                                                                                                        \
        ROWS_##rows(STORE_TWO)                                                                                                   \
    }

DEFINE_TWO(1)
DEFINE_TWO(2)
DEFINE_TWO(3)
DEFINE_TWO(4)
DEFINE_TWO(5)
DEFINE_TWO(6)
DEFINE_TWO(7)
DEFINE_TWO(8)
DEFINE_TWO(9)
DEFINE_TWO(10)
DEFINE_TWO(11)
DEFINE_TWO(12)
DEFINE_TWO(13)

#define TWO_CASE(rows)                                                                                                           \
    case rows:                                                                                                                   \
        two_##rows(to, mixed + first * WIDE, pairs * WIDE, weights);                                                             \
        break;

/* What is mixed times the weights [panel][4][CHANNELS][PANEL] → sums [2 * pairs][WIDE]. */
INLINE void multiply_mixed(float *sums, const float *mixed, const float *kernel, int pairs)
{
    const int blocks = (pairs + MOST_PAIRS - 1) / MOST_PAIRS, block = (pairs + blocks - 1) / blocks;
    for (int column = 0; column < CHANNELS; column += LANES) {
        const float *weights = kernel + column / PANEL * (4 * CHANNELS * PANEL) + column % PANEL;
        for (int n = 0; n < blocks; n++) {
            const int first = (n + 1) * block <= pairs ? n * block : pairs - block; /* the last block may repeat rows */
            float *to = sums + 2 * first * WIDE + column;
            switch (block) {
                TWO_CASE(1)
                TWO_CASE(2)
                TWO_CASE(3)
                TWO_CASE(4)
                TWO_CASE(5)
                TWO_CASE(6)
                TWO_CASE(7)
                TWO_CASE(8)
                TWO_CASE(9)
                TWO_CASE(10)
                TWO_CASE(11)
                TWO_CASE(12)
                TWO_CASE(13)
            }
        }
    }
}

#define MULTIPLY_COMBINATION(n)                                                                                                  \
    mix(work->mixed, columns, n, mels);                                                                                          \
    multiply_mixed(work->products + (n) * count, work->mixed, kernels[layer] + (n) * (4 * CHANNELS * WIDE), PAIRS(mels));

INLINE void multiply_columns(const cell *const *columns, int mels, int layer, trunk_work *work)
{
    const int count = 2 * PAIRS(mels) * WIDE;
    MULTIPLY_COMBINATION(0)
    MULTIPLY_COMBINATION(1)
    MULTIPLY_COMBINATION(2)
    MULTIPLY_COMBINATION(3)
    MULTIPLY_COMBINATION(4)
    MULTIPLY_COMBINATION(5)
}

INLINE void finish_columns(cell *image, int mels, int layer, const trunk_work *work)
{
    const float *m = work->products, *bias = biases[layer];
    const int count = 2 * PAIRS(mels) * WIDE;
    for (int mel = 0; mel < mels; mel++)
        for (int at = 0; at < CHANNELS; at += LANES) {
            const int i = mel * WIDE + at;
            float *to = image + (MARGIN + mel) * CHANNELS + at;
            const vector b = LOAD(bias + at), m1 = LOAD(m + count + i), m2 = LOAD(m + 2 * count + i);
            const vector m3 = LOAD(m + 3 * count + i), m4 = LOAD(m + 4 * count + i);
            const vector p = m1 + m2, q = m1 - m2, r = m3 + m4, s = m3 - m4;
            const vector y0 = LOAD(m + i) + p + r + b, y1 = q + 2.0f * s + b;
            const vector y2 = p + 4.0f * r + b, y3 = q + 8.0f * s + LOAD(m + 5 * count + i) + b;
            STORE(to, RECTIFY(y0)); /* what is written too much lies where the next row will be, or nothing is */
            STORE(to + APART(mels), RECTIFY(y1));
            STORE(to + 2 * APART(mels), RECTIFY(y2));
            STORE(to + 3 * APART(mels), RECTIFY(y3));
        }
}

#else

INLINE void multiply_columns(const cell *const *columns, int mels, int layer, trunk_work *work)
{
    const float *from[W2S_TAPS];
    for (int n = 0; n < GROUP; n++) {
        for (int tap = 0; tap < W2S_KERNEL; tap++)
            from[tap] = columns[n + tap];
        multiply(work->products + n * mels * WIDE, WIDE, from, CHANNELS, kernels[layer], mels, W2S_KERNEL, W2S_KERNEL * CHANNELS,
                 CHANNELS);
    }
}

INLINE void finish_columns(cell *image, int mels, int layer, const trunk_work *work)
{
    finish_direct(image, work->products, biases[layer], mels);
}

#endif

/* Tokens [TOKENS][TOKEN] → scores and values [TOKENS][PLACES][PARTS][FILLED(FEATURES)]. */
INLINE void multiply_tokens(pun *products, const cell *tokens, int count)
{
    const float *const from[1] = {tokens};
    multiply(&products->number, PARTS * FILLED(FEATURES), from, DEPTH, head_kernel, count * PLACES, 1, DEPTH, PARTS * FILLED(FEATURES));
}
