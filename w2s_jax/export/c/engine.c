/* ----------------------------------------------------------------------------------------- from samples to the log-mel spectrum */

/* A recording in one or two pieces, of numbers of one of both kinds. */
typedef struct {
    const float *numbers;
    const int16_t *integers;
    size_t count;  /* samples in all */
    size_t joint;  /* samples of the first piece */
    const float *behind; /* the second piece */
} recording;

/* Samples [first, first + count), zeros behind the end; how many of them were no usable numbers and became zeros. */
static int fetch(float *to, const recording *from, size_t first, int count)
{
    int refused = 0;
    for (int i = 0; i < count; i++) {
        const size_t at = first + (size_t)i;
        pun sample;
        sample.number = 0.0f;
        if (at < from->count) {
            if (from->integers)
                sample.number = (float)from->integers[at] * (1.0f / 32768.0f);
            else
                sample.number = at < from->joint ? from->numbers[at] : from->behind[at - from->joint];
            if ((sample.bits & 0x7fffffffu) > LOUDEST) {
                sample.number = 0.0f;
                refused++;
            }
        }
        to[i] = sample.number;
    }
    return refused;
}

typedef struct {
    float rows[FRAMES * W2S_FFT];
    float spectrum[FRAMES * FILLED(PARTS_OF_SPECTRUM)];
    float power[FRAMES * BINS];
    float mel[FRAMES * FILLED(BANDS)];
} front_work;

/* FRAMES frames of samples, each with its own mean and scale → FRAMES columns of the log-mel image. */
static void analyse(cell *image, const float *samples, const float *means, const float *scales, front_work *work)
{
    const float *from[1] = {work->rows};
    for (int n = 0; n < FRAMES; n++) {
        const float mean = means[n], scale = scales[n];
        for (int i = 0; i < W2S_FFT; i++)
            work->rows[n * W2S_FFT + i] = (samples[n * W2S_HOP + i] - mean) * scale;
    }
    multiply(work->spectrum, FILLED(PARTS_OF_SPECTRUM), from, W2S_FFT, fourier, FRAMES, 1, W2S_FFT, PARTS_OF_SPECTRUM);
    for (int n = 0; n < FRAMES; n++) {
        const float *real = work->spectrum + n * FILLED(PARTS_OF_SPECTRUM), *imaginary = real + BINS;
        float *power = work->power + n * BINS;
        for (int i = 0; i < BINS; i++)
            power[i] = real[i] * real[i];
        for (int i = 0; i < PARTS_OF_SPECTRUM - BINS; i++)
            power[FIRST_SINE + i] += imaginary[i] * imaginary[i];
    }
    from[0] = work->power;
    multiply(work->mel, FILLED(BANDS), from, BINS, mel_bands, FRAMES, 1, BINS, BANDS);
    for (int i = 0; i < FRAMES * FILLED(BANDS); i++)
        work->mel[i] = logarithm(work->mel[i] > FLOOR ? work->mel[i] : FLOOR);
    for (int n = 0; n < FRAMES; n++)
        write_image(image + n * IMAGE_COLUMN, work->mel + n * FILLED(BANDS));
}

/* -------------------------------------------------------------------------------------------------------------- pooling over time */

#define POOLED (PLACES * FILLED(FEATURES))

#if W2S_ATTENTION

/* Sums over tokens of weights e^(score - largest), and the weighted mean of the values, which loses no digits in long recordings. */
typedef struct {
    float largest[POOLED], sum[POOLED], mean[POOLED];
} sums;

/* What is stored of a completed hop: the logarithm of the sum of e^score, and the mean. */
typedef struct {
    float weight[PLACES * FEATURES], mean[PLACES * FEATURES];
} block;

static void clear(sums *to)
{
    fill(to->largest, -1e30f, POOLED);
    fill(to->sum, 0.0f, POOLED);
    fill(to->mean, 0.0f, POOLED);
}

/* Tokens [first, end) of the products of multiply_tokens. */
static void add_tokens(sums *to, const float *products, int first, int end)
{
    enum { ROW = FILLED(FEATURES), TOKEN_ROW = PLACES * 2 * ROW };
    for (int place = 0; place < PLACES; place++) {
        const float *scores = products + place * 2 * ROW;
        float *largest = to->largest + place * ROW, *sum = to->sum + place * ROW, *mean = to->mean + place * ROW;
        float most[ROW], change[ROW];
        copy(most, largest, ROW);
        for (int n = first; n < end; n++)
            for (int i = 0; i < ROW; i++)
                most[i] = LARGER(most[i], scores[n * TOKEN_ROW + i]);
        for (int i = 0; i < ROW; i++) {
            sum[i] *= exponential(largest[i] - most[i]);
            largest[i] = most[i];
            change[i] = 0.0f;
        }
        for (int n = first; n < end; n++)
            for (int i = 0; i < ROW; i++) {
                const float weight = exponential(scores[n * TOKEN_ROW + i] - most[i]);
                sum[i] += weight;
                change[i] += weight * (scores[n * TOKEN_ROW + ROW + i] - mean[i]);
            }
        for (int i = 0; i < ROW; i++)
            mean[i] += change[i] / sum[i];
    }
}

static void close_block(block *to, const sums *from)
{
    for (int place = 0; place < PLACES; place++)
        for (int i = 0; i < FEATURES; i++) {
            const int at = place * FILLED(FEATURES) + i, packed = place * FEATURES + i;
            to->weight[packed] = from->sum[at] > 0.0f ? from->largest[at] + logarithm(from->sum[at]) : -1e30f;
            to->mean[packed] = from->mean[at];
        }
}

static void add_block(sums *to, const block *from)
{
    for (int place = 0; place < PLACES; place++)
        for (int i = 0; i < FEATURES; i++) {
            const int at = place * FILLED(FEATURES) + i, packed = place * FEATURES + i;
            const float most = LARGER(to->largest[at], from->weight[packed]);
            const float own = to->sum[at] * exponential(to->largest[at] - most);
            const float more = exponential(from->weight[packed] - most);
            to->mean[at] += (from->mean[packed] - to->mean[at]) * (more / (own + more));
            to->sum[at] = own + more;
            to->largest[at] = most;
        }
}

static void finish_pooling(float *pooled, const sums *from)
{
    for (int place = 0; place < PLACES; place++)
        copy(pooled + place * FEATURES, from->mean + place * FILLED(FEATURES), FEATURES);
}

#else

/* Mean of tokens and sum of the squared distances from it (Chan, Golub and LeVeque, 1983). */
typedef struct {
    float count[1], mean[POOLED], squares[POOLED];
} sums;
typedef sums block;

static void clear(sums *to)
{
    to->count[0] = 0.0f;
    fill(to->mean, 0.0f, POOLED);
    fill(to->squares, 0.0f, POOLED);
}

static void add_tokens(sums *to, const float *products, int first, int end)
{
    for (int n = first; n < end; n++) {
        const float *values = products + n * POOLED, share = 1.0f / (to->count[0] += 1.0f);
        for (int i = 0; i < POOLED; i++) {
            const float distance = values[i] - to->mean[i];
            to->mean[i] += distance * share;
            to->squares[i] += distance * (values[i] - to->mean[i]);
        }
    }
}

static void close_block(block *to, const sums *from)
{
    *to = *from;
}

static void add_block(sums *to, const block *from)
{
    const float count = to->count[0] + from->count[0];
    const float share = count > 0.0f ? from->count[0] / count : 0.0f;
    for (int i = 0; i < POOLED; i++) {
        const float distance = from->mean[i] - to->mean[i];
        to->mean[i] += distance * share;
        to->squares[i] += from->squares[i] + distance * distance * share * to->count[0];
    }
    to->count[0] = count;
}

static void finish_pooling(float *pooled, const sums *from)
{
    for (int place = 0; place < PLACES; place++)
        for (int i = 0; i < FEATURES; i++) {
            pooled[place * FEATURES + i] = from->mean[place * FILLED(FEATURES) + i];
#if W2S_DEVIATION
            pooled[(PLACES + place) * FEATURES + i] =
                sqrtf(from->squares[place * FILLED(FEATURES) + i] / from->count[0] + DEVIATION_EPSILON);
#endif
        }
}

#endif

/* The output layer. */
static void answer(float *values, const sums *from)
{
    float pooled[OUTPUT_DEPTH];
    finish_pooling(pooled, from);
#if W2S_GRAM
    float *gram = pooled + PLACES * FEATURES; /* of all pairs of features, the sum over places */
    for (int place = 0; place < PLACES; place++)
        for (int i = 0; i < FEATURES; i++)
            pooled[place * FEATURES + i] += pooled_bias[i];
    for (int i = 0; i < FEATURES; i++)
        for (int j = 0; j < FEATURES; j++) {
            float sum = 0.0f;
            for (int place = 0; place < PLACES; place++)
                sum += pooled[place * FEATURES + i] * pooled[place * FEATURES + j];
            gram[i * FEATURES + j] = sum;
        }
#endif
    for (int n = 0; n < W2S_DIMENSIONS; n++) {
        float sum = output_bias[n];
        for (int i = 0; i < OUTPUT_DEPTH; i++)
            sum += pooled[i] * output_kernel[n][i];
        values[n] = sum;
    }
}

/* --------------------------------------------------------------------------------------------------------------------- the trunk

FRAMES frames go through all layers at once and come out as GROUP tokens, those of some frames before: each layer needs columns that
lie behind those that it writes. It keeps the last columns that it has read. Columns are counted from the first of the recording,
and what comes before that or behind the last is outside of the image. */

#define PRODUCTS_OF_TOKEN (PLACES * PARTS * FILLED(FEATURES))
#define PIECE (FRAMES * W2S_FFT) /* samples that are measured at once */
#define MOST_STEPS (1 << 20)
#define MOST_FRAMES (1 << 30)
#define ENDLESS 0x7fffffff

typedef struct {
    int32_t filled; /* samples that are there */
    int32_t steps;  /* times that the trunk has run; at most MOST_STEPS in a stream, where only the first ones matter */
    float samples[SAMPLES];
    cell image[LARGER(KEPT_OF_IMAGE, 1) * IMAGE_COLUMN];
    cell before[(BEFORE - 1) * 2 * REACH * COLUMN(MELS) + MORE]; /* whole vectors are read of the last row */
    cell after[AFTER * 2 * REACH * COLUMN(MELS_AFTER) + MORE];
    cell largest[MELS_AFTER * WIDE]; /* the maxima of the pool's window that is not complete yet */
} pipeline;

typedef struct {
    union {
        front_work front;
        trunk_work trunk;
        pun products[GROUP * PRODUCTS_OF_TOKEN];
        struct {
            sums all;
            block last;
        } pooling;
    } u;
    float means[FRAMES], scales[FRAMES]; /* of each frame: (sample - mean) * scale is analysed */
    cell image[FRAMES * IMAGE_COLUMN];
    cell narrow[GROUP * APART(MELS_AFTER)]; /* columns behind the pool */
    cell wide[GROUP * APART(MELS)];         /* and before it; at the end of a step tokens, [GROUP][TOKEN] */
} workspace;

/* One convolution in place: GROUP columns of `image`, behind the ones that were kept, become the GROUP columns from `first` on. */
INLINE void convolve(cell *image, cell *kept, int layer, int mels, int32_t first, int32_t end, trunk_work *work)
{
    const cell *columns[2 * REACH + GROUP];
    for (int n = 0; n < 2 * REACH + GROUP; n++)
        columns[n] = n < 2 * REACH ? kept + n * COLUMN(mels) : image + (n - 2 * REACH) * APART(mels);
    multiply_columns(columns, mels, layer, work);
    for (int n = 0; n < 2 * REACH; n++)
        keep(kept + n * COLUMN(mels), columns[n + GROUP], COLUMN(mels));
    finish_columns(image, mels, layer, work);
    frame(image, mels, first, end);
}

/* One function for all layers of a size. */
static void convolve_before(cell *image, cell *kept, int layer, int32_t first, int32_t end, trunk_work *work)
{
    convolve(image, kept, layer, MELS, first, end, work);
}

static void convolve_after(cell *image, cell *kept, int layer, int32_t first, int32_t end, trunk_work *work)
{
    convolve(image, kept, layer, MELS_AFTER, first, end, work);
}

/* Maxima of 3×3 windows, every second one: GROUP columns from `first` on → GROUP / 2. No value is below the zeros around them. */
static void pool(cell *to, const cell *image, cell *largest, int32_t first)
{
    for (int n = 0; n < GROUP; n++) {
        const int last = (first + n) & 1; /* an odd column is the last one of a window, and the first of the next */
        for (int mel = 0; mel < MELS_AFTER; mel++) {
            const cell *from = image + n * APART(MELS) + (MARGIN + 2 * mel) * CHANNELS;
            const cell *above = mel ? from - CHANNELS : from, *below = 2 * mel + 1 < MELS ? from + CHANNELS : from;
            cell *known = largest + mel * WIDE, column[WIDE];
            larger(column, from, above);
            larger(column, column, below);
            if (last) {
                larger(to + (MARGIN + mel) * CHANNELS, known, column); /* what is too much lies where the next row will be */
                keep(known, column, WIDE);
            } else {
                larger(known, known, column);
            }
        }
        if (last)
            to += APART(MELS_AFTER);
    }
}

/* One step: the samples of FRAMES frames → up to GROUP tokens, those of them that are in the image; returns how many.

`frames` is the number of frames of the whole recording, or ENDLESS. */
static int advance(pipeline *p, workspace *w, int32_t frames)
{
    const int32_t end = (frames - 1) / STRIDE + 1, end_after = (end - 1) / 2 + 1;
    const int32_t step = p->steps;
    int count = 0;
    analyse(w->image, p->samples, w->means, w->scales, &w->u.front);
    for (int n = 0; n < FRAMES; n++)
        if (step * FRAMES + n >= frames)
            silence(w->image + n * IMAGE_COLUMN);
    for (int half = 0; half < 2; half++) {
        const cell *columns[KEPT_OF_IMAGE + GROUP * STRIDE];
        int32_t first = (2 * step + half) * GROUP - LAG_OF_IMAGE;
        for (int n = 0; n < KEPT_OF_IMAGE + GROUP * STRIDE; n++)
            columns[n] = n < KEPT_OF_IMAGE ? p->image + n * IMAGE_COLUMN
                                           : w->image + (half * GROUP * STRIDE + n - KEPT_OF_IMAGE) * IMAGE_COLUMN;
        multiply_image(columns, &w->u.trunk);
        finish_image(w->wide, &w->u.trunk);
        frame(w->wide, MELS, first, end);
        for (int n = 0; n < KEPT_OF_IMAGE; n++)
            keep(p->image + n * IMAGE_COLUMN, columns[n + GROUP * STRIDE], IMAGE_COLUMN);
        for (int layer = 0; layer < BEFORE - 1; layer++) {
            first -= REACH;
            convolve_before(w->wide, p->before + layer * (2 * REACH * COLUMN(MELS)), layer, first, end, &w->u.trunk);
        }
        pool(w->narrow + half * (GROUP / 2) * APART(MELS_AFTER), w->wide, p->largest, first);
    }
    int32_t first = step * GROUP - LAG_OF_POOL;
    frame(w->narrow, MELS_AFTER, first, end_after);
    for (int layer = 0; layer < AFTER; layer++) {
        first -= REACH;
        convolve_after(w->narrow, p->after + layer * (2 * REACH * COLUMN(MELS_AFTER)), BEFORE - 1 + layer, first, end_after,
                       &w->u.trunk);
    }
    for (int n = 0; n < GROUP; n++)
        if (first + n >= 0 && first + n < end_after)
            keep(w->wide + count++ * TOKEN, w->narrow + n * APART(MELS_AFTER) + MARGIN * CHANNELS, TOKEN);
    if (frames != ENDLESS || p->steps < MOST_STEPS)
        p->steps++;
    for (int i = 0; i < SAMPLES - FRAMES * W2S_HOP; i++)
        p->samples[i] = p->samples[FRAMES * W2S_HOP + i];
    p->filled = SAMPLES - FRAMES * W2S_HOP;
    return count;
}

/* ---------------------------------------------------------------------------------------------------------------- whole recordings */

typedef struct {
    workspace work;
    pun products[W2S_BATCH * PRODUCTS_OF_TOKEN];
    sums now, all; /* of the block that is being added up, and of those before */
    block done;
    pipeline pipe;
    cell tokens[(W2S_BATCH + GROUP) * TOKEN];
} whole;

CHECK(whole, W2S_PREDICT_BYTES - LINE)

static void reset(pipeline *p)
{
    cell *cells;
    fill(p->samples, 0.0f, SAMPLES);
    p->filled = p->steps = 0;
    for (int n = 0; n < KEPT_OF_IMAGE; n++)
        silence(p->image + n * IMAGE_COLUMN);
    for (cells = p->before; cells < p->before + sizeof p->before / sizeof(cell); cells++)
        *cells = 0;
    for (cells = p->after; cells < p->after + sizeof p->after / sizeof(cell); cells++)
        *cells = 0;
    for (cells = p->largest; cells < p->largest + sizeof p->largest / sizeof(cell); cells++)
        *cells = 0;
}

/* Mean and variance in pieces; 1 if a sample is no usable number. Eight sums side by side, which fit a vector. */
static int measure(const recording *from, float *piece, float *mean, float *variance)
{
    double sums_of[2] = {0.0, 0.0};
    int refused = 0;
    for (int power = 0; power < 2; power++) {
        double part[8] = {0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0};
        const double centre = power ? sums_of[0] / (double)from->count : 0.0;
        for (size_t first = 0; first < from->count; first += PIECE) {
            const int count = from->count - first < PIECE ? (int)(from->count - first) : PIECE;
            refused += fetch(piece, from, first, count);
            for (int i = 0; i < count % 8; i++) {
                const double distance = (double)piece[count - 1 - i] - centre;
                part[i] += power ? distance * distance : distance;
            }
            for (int i = 0; i + 8 <= count; i += 8)
                for (int j = 0; j < 8; j++) {
                    const double distance = (double)piece[i + j] - centre;
                    part[j] += power ? distance * distance : distance;
                }
        }
        for (int j = 0; j < 8; j++)
            sums_of[power] += part[j];
    }
    *mean = (float)(sums_of[0] / (double)from->count);
    *variance = (float)(sums_of[1] / (double)from->count);
    return refused > 0;
}

/* Tokens are multiplied W2S_BATCH at a time: a processor reads the matrix, which is larger than its first cache, so much less often. */
static int predict(void *memory, size_t bytes, const recording *from, float *values)
{
    whole *state = (whole *)align(memory);
    float mean, variance;
    if (bytes < W2S_PREDICT_BYTES || (uintptr_t)memory % sizeof(float))
        return W2S_ERROR_MEMORY;
    if (from->count < W2S_MINIMUM_SAMPLES || from->count / W2S_HOP > MOST_FRAMES)
        return W2S_ERROR_LENGTH;
    if (measure(from, state->work.u.front.rows, &mean, &variance))
        return W2S_ERROR_SAMPLE;
    const float scale = 1.0f / sqrtf(variance + NORM_EPSILON);
    const int32_t frames = 1 + (int32_t)((from->count - W2S_FFT) / W2S_HOP);
    const int32_t end = ((frames - 1) / STRIDE + 2) / 2;
    int32_t done = 0;
    int waiting = 0, batches = 0;
    size_t next = 0;
    reset(&state->pipe);
    clear(&state->now);
    clear(&state->all);
    for (int i = 0; i < (W2S_BATCH + GROUP) * TOKEN; i++)
        state->tokens[i] = 0;
    fill(state->work.means, mean, FRAMES);
    fill(state->work.scales, scale, FRAMES);
    while (done < end) {
        fetch(state->pipe.samples + state->pipe.filled, from, next, SAMPLES - state->pipe.filled);
        next += (size_t)(SAMPLES - state->pipe.filled);
        const int more = advance(&state->pipe, &state->work, frames);
        keep(state->tokens + waiting * TOKEN, state->work.wide, more * TOKEN);
        waiting += more;
        done += more;
        while (waiting >= W2S_BATCH || (waiting && done == end)) {
            const int count = waiting < W2S_BATCH ? waiting : W2S_BATCH;
            multiply_tokens(state->products, state->tokens, W2S_BATCH);
            add_tokens(&state->now, &state->products->number, 0, count);
            waiting -= count;
            keep(state->tokens, state->tokens + count * TOKEN, waiting * TOKEN);
            if (++batches % (TOKENS_OF_BLOCK / W2S_BATCH) == 0) { /* sums of few numbers lose few digits */
                close_block(&state->done, &state->now);
                add_block(&state->all, &state->done);
                clear(&state->now);
            }
        }
    }
    close_block(&state->done, &state->now);
    add_block(&state->all, &state->done);
    answer(values, &state->all);
    return W2S_OK;
}

size_t w2s_predict_bytes(void)
{
    return W2S_PREDICT_BYTES;
}

size_t w2s_scratch_bytes(void)
{
    return W2S_SCRATCH_BYTES;
}

int w2s_predict(void *memory, size_t bytes, const float *samples, size_t count, float *values)
{
    recording from;
    if (!memory || !samples || !values)
        return W2S_ERROR_NULL;
    from.numbers = from.behind = samples;
    from.integers = 0;
    from.count = from.joint = count;
    return predict(memory, bytes, &from, values);
}

int w2s_predict_int16(void *memory, size_t bytes, const int16_t *samples, size_t count, float *values)
{
    recording from;
    if (!memory || !samples || !values)
        return W2S_ERROR_NULL;
    from.numbers = from.behind = 0;
    from.integers = samples;
    from.count = from.joint = count;
    return predict(memory, bytes, &from, values);
}

/* ------------------------------------------------------------------------------------------------------------------------- streams */

typedef struct {
    uint32_t model;
    int32_t normalisation;
    uint32_t window, hop; /* samples */
    uint32_t place;       /* where the next sample, or the next block, is stored */
    uint32_t stored;      /* samples, or blocks */
} about_stream;

/* W2S_RUNNING: the pipeline, the sums of the hop that is being heard, and then window / hop - 1 blocks of those before. */
typedef struct {
    about_stream about;
    float mean, variance; /* of the samples so far */
    uint32_t heard;       /* samples in them, at most the window */
    uint32_t phase;       /* samples from the beginning of the hop to the next token */
    int32_t begun;        /* whether there has been a token */
    sums now;
    pipeline pipe;
} stream;

CHECK(stream, W2S_STREAM_BYTES(1, 1)) /* without a block */
CHECK(block, W2S_STREAM_BYTES(2, 1) - W2S_STREAM_BYTES(1, 1))
CHECK(workspace, W2S_SCRATCH_BYTES - LINE)
CHECK(about_stream, W2S_WINDOW_STREAM_BYTES(0))

size_t w2s_stream_bytes(int normalisation, uint32_t window, uint32_t hop)
{
    if (hop < W2S_TOKEN_SAMPLES || window < W2S_MINIMUM_SAMPLES || window % hop || window / hop > 65536u || window > 0x10000000u)
        return 0;
    if (normalisation == W2S_WINDOW)
        return W2S_WINDOW_STREAM_BYTES((size_t)window);
    return normalisation == W2S_RUNNING ? W2S_STREAM_BYTES((size_t)window, (size_t)hop) : 0;
}

static void restart(void *memory)
{
    about_stream *about = (about_stream *)memory;
    about->place = about->stored = 0;
    if (about->normalisation == W2S_RUNNING) {
        stream *s = (stream *)memory;
        s->mean = s->variance = 0.0f;
        s->heard = s->phase = 0;
        s->begun = 0;
        clear(&s->now);
        reset(&s->pipe);
    }
}

int w2s_stream_init(void *memory, size_t bytes, int normalisation, uint32_t window, uint32_t hop)
{
    about_stream *about = (about_stream *)memory;
    if (!memory)
        return W2S_ERROR_NULL;
    if (!w2s_stream_bytes(normalisation, window, hop))
        return W2S_ERROR_SETTING;
    if (bytes < w2s_stream_bytes(normalisation, window, hop) || (uintptr_t)memory % sizeof(float))
        return W2S_ERROR_MEMORY;
    about->model = W2S_FINGERPRINT;
    about->normalisation = normalisation;
    about->window = window;
    about->hop = hop;
    restart(memory);
    return W2S_OK;
}

/* Whether it is a stream: W2S_OK, or why not. */
static int identify(const void *memory)
{
    const about_stream *about = (const about_stream *)memory;
    if (!memory)
        return W2S_ERROR_NULL;
    if ((uintptr_t)memory % sizeof(float))
        return W2S_ERROR_MEMORY;
    if (about->model != W2S_FINGERPRINT || !w2s_stream_bytes(about->normalisation, about->window, about->hop))
        return W2S_ERROR_STREAM;
    return W2S_OK;
}

/* The same, and whether what says where something lies is within it: memory that was stored may be damaged. */
static int examine(const void *memory)
{
    const about_stream *about = (const about_stream *)memory;
    const int fault = identify(memory);
    if (fault)
        return fault;
    const uint32_t places = about->normalisation == W2S_WINDOW ? about->window : LARGER(about->window / about->hop, 2u) - 1u;
    if (about->place >= places || about->stored > places)
        return W2S_ERROR_STREAM;
    if (about->normalisation == W2S_RUNNING) {
        const stream *s = (const stream *)memory;
        if (s->pipe.filled < 0 || s->pipe.filled >= SAMPLES || s->pipe.steps < 0 || s->pipe.steps > MOST_STEPS ||
            s->heard > about->window || s->phase >= about->hop + W2S_TOKEN_SAMPLES)
            return W2S_ERROR_STREAM;
    }
    return W2S_OK;
}

int w2s_stream_reset(void *memory)
{
    const int fault = identify(memory);
    if (!fault)
        restart(memory);
    return fault;
}

/* Mean and variance of what has been heard, with those samples of a frame that no frame before it had. */
static void hear(stream *s, const float *samples, int count)
{
    float mean = 0.0f, variance = 0.0f;
    for (int i = 0; i < count; i++)
        mean += samples[i];
    mean /= (float)count;
    for (int i = 0; i < count; i++)
        variance += (samples[i] - mean) * (samples[i] - mean);
    variance /= (float)count;
    s->heard = s->about.window - s->heard > (uint32_t)count ? s->heard + (uint32_t)count : s->about.window;
    const float share = (uint32_t)count < s->heard ? (float)count / (float)s->heard : 1.0f;
    const float distance = mean - s->mean;
    s->mean += share * distance;
    s->variance += share * (variance + (1.0f - share) * distance * distance - s->variance);
}

/* FRAMES frames of a stream, which are all there. */
static void listen(stream *s, workspace *work)
{
    enum { NEW = W2S_HOP < W2S_FFT ? W2S_HOP : W2S_FFT };
    for (int n = 0; n < FRAMES; n++) {
        const float *frame_samples = s->pipe.samples + n * W2S_HOP;
        if (s->heard)
            hear(s, frame_samples + W2S_FFT - NEW, NEW);
        else
            hear(s, frame_samples, W2S_FFT);
        work->means[n] = s->mean;
        work->scales[n] = 1.0f / sqrtf(s->variance + NORM_EPSILON);
    }
    const int count = advance(&s->pipe, work, ENDLESS);
    if (!count)
        return;
    for (int i = count * TOKEN; i < GROUP * TOKEN; i++)
        work->wide[i] = 0;
    multiply_tokens(work->u.products, work->wide, GROUP);
    for (int first = 0, end; first < count; first = end) {
        if (s->phase >= s->about.hop) {
            const uint32_t blocks = s->about.window / s->about.hop - 1;
            if (blocks) {
                close_block((block *)(s + 1) + s->about.place, &s->now);
                s->about.place = s->about.place + 1 < blocks ? s->about.place + 1 : 0;
                s->about.stored = s->about.stored < blocks ? s->about.stored + 1 : blocks;
            }
            clear(&s->now);
            s->phase -= s->about.hop;
        }
        for (end = first; end < count && s->phase < s->about.hop; end++)
            s->phase += W2S_TOKEN_SAMPLES;
        add_tokens(&s->now, &work->u.products->number, first, end);
    }
    s->begun = 1;
}

static int push(void *memory, void *scratch, size_t bytes, const recording *from)
{
    about_stream *about = (about_stream *)memory;
    const int fault = examine(memory);
    int refused = 0;
    if (fault)
        return fault;
    if (about->normalisation == W2S_WINDOW) {
        float *samples = (float *)(about + 1);
        for (size_t at = 0; at < from->count;) {
            const uint32_t room = about->window - about->place;
            const int count = (int)(from->count - at < room ? from->count - at : room);
            refused += fetch(samples + about->place, from, at, count);
            at += (size_t)count;
            about->place = (uint32_t)count < room ? about->place + (uint32_t)count : 0;
            about->stored = about->window - about->stored > (uint32_t)count ? about->stored + (uint32_t)count : about->window;
        }
        return refused ? W2S_ERROR_SAMPLE : W2S_OK;
    }
    stream *s = (stream *)memory;
    if (!scratch)
        return W2S_ERROR_NULL;
    if (bytes < W2S_SCRATCH_BYTES || (uintptr_t)scratch % sizeof(float))
        return W2S_ERROR_MEMORY;
    for (size_t at = 0; at < from->count;) {
        const size_t room = (size_t)(SAMPLES - s->pipe.filled);
        const int count = (int)(from->count - at < room ? from->count - at : room);
        refused += fetch(s->pipe.samples + s->pipe.filled, from, at, count) > 0;
        at += (size_t)count;
        s->pipe.filled += count;
        if (s->pipe.filled == SAMPLES)
            listen(s, (workspace *)align(scratch));
    }
    return refused ? W2S_ERROR_SAMPLE : W2S_OK;
}

int w2s_stream_push(void *memory, void *scratch, size_t bytes, const float *samples, size_t count)
{
    recording from;
    if (!samples)
        return W2S_ERROR_NULL;
    from.numbers = from.behind = samples;
    from.integers = 0;
    from.count = from.joint = count;
    return push(memory, scratch, bytes, &from);
}

int w2s_stream_push_int16(void *memory, void *scratch, size_t bytes, const int16_t *samples, size_t count)
{
    recording from;
    if (!samples)
        return W2S_ERROR_NULL;
    from.numbers = from.behind = 0;
    from.integers = samples;
    from.count = from.joint = count;
    return push(memory, scratch, bytes, &from);
}

int w2s_stream_read(const void *memory, void *scratch, size_t bytes, float *values)
{
    const about_stream *about = (const about_stream *)memory;
    const int fault = examine(memory);
    if (fault)
        return fault;
    if (!scratch || !values)
        return W2S_ERROR_NULL;
    if (about->normalisation == W2S_WINDOW) {
        const float *samples = (const float *)(about + 1);
        const uint32_t oldest = about->stored < about->window ? 0 : about->place;
        recording from;
        from.integers = 0;
        from.numbers = samples + oldest;
        from.behind = samples;
        from.count = about->stored;
        from.joint = about->stored - oldest;
        return about->stored < W2S_MINIMUM_SAMPLES ? W2S_ERROR_EARLY : predict(scratch, bytes, &from, values);
    }
    const stream *s = (const stream *)memory;
    if (bytes < W2S_SCRATCH_BYTES || (uintptr_t)scratch % sizeof(float))
        return W2S_ERROR_MEMORY;
    if (!s->begun)
        return W2S_ERROR_EARLY;
    workspace *work = (workspace *)align(scratch);
    sums *all = &work->u.pooling.all;
    block *last = &work->u.pooling.last;
    const block *blocks = (const block *)(s + 1);
    clear(all);
    for (uint32_t n = 0; n < about->stored; n++) /* the oldest first */
        add_block(all, blocks + (about->place + n) % about->stored);
    close_block(last, &s->now);
    add_block(all, last);
    answer(values, all);
    return W2S_OK;
}
