/* --------------------------------------------------------------------------------------------------------- the trunk in float32

A column is one moment of an image: [mel][channel], with MARGIN rows of zeros before and behind. */

typedef float cell;

#define SILENT 0.0f                                    /* what stands outside of the log-mel image */
#define COLUMN(mels) (((mels) + 2 * MARGIN) * CHANNELS) /* numbers of a column */
#define APART(mels) (COLUMN(mels) + PANEL)              /* from column to column in work memory: whole vectors are written */
#define IMAGE_COLUMN (BANDS + 2 * MARGIN)
#define WIDE FILLED(CHANNELS)
#if W2S_KERNEL == 3
#define PRODUCTS 6 /* of Winograd's F(4, 3) */
#else
#define PRODUCTS GROUP
#endif

typedef struct {
    float mixed[COLUMN(MELS)];
    float products[PRODUCTS * MELS * WIDE];
} trunk_work;

INLINE void keep(cell *to, const cell *from, int count)
{
    copy(to, from, count);
}

INLINE void silence(cell *column)
{
    fill(column, SILENT, IMAGE_COLUMN);
}

INLINE void write_image(cell *column, const float *values)
{
    fill(column, SILENT, MARGIN);
    copy(column + MARGIN, values, BANDS);
    fill(column + MARGIN + BANDS, SILENT, MARGIN);
}

/* Zeros outside of the image: rows before and behind, columns before the first and from `end` on. */
INLINE void frame(cell *image, int mels, int apart, int32_t first, int32_t end)
{
    for (int n = 0; n < GROUP; n++) {
        cell *column = image + n * apart;
        if (first + n < 0 || first + n >= end) {
            fill(column, 0.0f, (mels + 2 * MARGIN) * CHANNELS);
        } else {
            fill(column, 0.0f, MARGIN * CHANNELS);
            fill(column + (MARGIN + mels) * CHANNELS, 0.0f, MARGIN * CHANNELS);
        }
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
            from[tap] = columns[n * STRIDE + tap] + MARGIN - REACH;
        multiply(work->products + n * MELS * WIDE, WIDE, from, STRIDE, first_kernel, MELS, W2S_KERNEL, W2S_KERNEL, CHANNELS);
    }
}

INLINE void finish_image(cell *image, const trunk_work *work)
{
    finish_direct(image, work->products, first_bias, MELS);
}

#if W2S_KERNEL == 3

/* The n-th of the six combinations of columns in Winograd's F(4, 3): each is multiplied once, for all four outputs. */
INLINE void mix(float *mixed, const cell *const *x, int n, int count)
{
    switch (n) {
        case 0:
            for (int i = 0; i < count; i++)
                mixed[i] = 4.0f * x[0][i] - 5.0f * x[2][i] + x[4][i];
            break;
        case 1:
            for (int i = 0; i < count; i++)
                mixed[i] = (x[4][i] + x[3][i]) - 4.0f * (x[2][i] + x[1][i]);
            break;
        case 2:
            for (int i = 0; i < count; i++)
                mixed[i] = (x[4][i] - x[3][i]) - 4.0f * (x[2][i] - x[1][i]);
            break;
        case 3:
            for (int i = 0; i < count; i++)
                mixed[i] = (x[4][i] - x[2][i]) + 2.0f * (x[3][i] - x[1][i]);
            break;
        case 4:
            for (int i = 0; i < count; i++)
                mixed[i] = (x[4][i] - x[2][i]) - 2.0f * (x[3][i] - x[1][i]);
            break;
        default:
            for (int i = 0; i < count; i++)
                mixed[i] = 4.0f * x[1][i] - 5.0f * x[3][i] + x[5][i];
    }
}

INLINE void multiply_columns(const cell *const *columns, int mels, int layer, trunk_work *work)
{
    const float *const from[1] = {work->mixed + (MARGIN - REACH) * CHANNELS};
    const int count = mels * WIDE;
    for (int n = 0; n < 6; n++) {
        mix(work->mixed, columns, n, COLUMN(mels));
        multiply(work->products + n * count, WIDE, from, CHANNELS, kernels[layer] + n * (3 * CHANNELS * WIDE), mels, 1, 3 * CHANNELS,
                 CHANNELS);
    }
}

INLINE void finish_columns(cell *image, int mels, int layer, const trunk_work *work)
{
    const float *m = work->products, *bias = biases[layer];
    const int count = mels * WIDE;
    for (int mel = 0; mel < mels; mel++)
        for (int at = 0; at < CHANNELS; at += LANES) {
            const int i = mel * WIDE + at;
            float *to = image + (MARGIN + mel) * CHANNELS + at;
            const vector b = LOAD(bias + at), m1 = LOAD(m + count + i), m2 = LOAD(m + 2 * count + i);
            const vector m3 = LOAD(m + 3 * count + i), m4 = LOAD(m + 4 * count + i);
            const vector p = m1 + m2, q = m1 - m2, r = m3 + m4, s = m3 - m4;
            const vector y0 = LOAD(m + i) + p + r + b, y1 = q + 2.0f * s + b;
            const vector y2 = p + 4.0f * r + b, y3 = q + 8.0f * s + LOAD(m + 5 * count + i) + b;
            STORE(to, RECTIFY(y0)); /* what is written too much lies where the next row will be, or a margin */
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
            from[tap] = columns[n + tap] + (MARGIN - REACH) * CHANNELS;
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
INLINE void multiply_tokens(float *products, const cell *tokens, int count)
{
    const float *const from[1] = {tokens};
    multiply(products, PARTS * FILLED(FEATURES), from, DEPTH, head_kernel, count * PLACES, 1, DEPTH, PARTS * FILLED(FEATURES));
}
