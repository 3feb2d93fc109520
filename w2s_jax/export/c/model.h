/* $title

$about
Nothing here allocates memory, keeps state of its own or does anything but arithmetic: all memory comes from the caller, is plain
memory that may be copied and stored, and has to be aligned like a float. Calls that use other memory do not touch each other.
Every function returns W2S_OK or one of the errors below, and has then changed nothing, unless it says so. */

#ifndef W2S_MODEL_H
#define W2S_MODEL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define W2S_VERSION $version
#define W2S_FINGERPRINT 0x${fingerprint}u /* of the weights and of this code */
#define W2S_SAMPLING_RATE $rate
#define W2S_DIMENSIONS $dimensions
#define W2S_MINIMUM_SAMPLES $minimum /* of a recording */
#define W2S_TOKEN_SAMPLES $token     /* from one moment that the pooling sees to the next */
#define W2S_FIRST_SAMPLES $first     /* pushed into a stream before there is a first value */
#define W2S_LATENCY_SAMPLES $latency /* at most, from a sample to the values that have seen it */

enum {
    W2S_OK = 0,
    W2S_ERROR_NULL = -1,    /* a null pointer */
    W2S_ERROR_MEMORY = -2,  /* fewer bytes than are needed, or not aligned like a float */
    W2S_ERROR_LENGTH = -3,  /* fewer samples than W2S_MINIMUM_SAMPLES, or more than some days */
    W2S_ERROR_SAMPLE = -4,  /* a sample that is not finite, or beyond 1e15 */
    W2S_ERROR_SETTING = -5, /* another normalisation, a window that is no multiple of the hop, or a hop shorter than a token */
    W2S_ERROR_STREAM = -6,  /* memory that is no stream of this model */
    W2S_ERROR_EARLY = -7    /* no value yet: fewer samples than W2S_FIRST_SAMPLES */
};

/* The names of the values, in their order. */
extern const char *const w2s_dimensions[W2S_DIMENSIONS];
/* What is known of the model, as JSON. */
extern const char *const w2s_metadata;

/* Whole recordings of any length, $rate Hz, mono: W2S_PREDICT_BYTES of memory → W2S_DIMENSIONS values. Integers are full scale at
32768. */
#ifndef W2S_BATCH
#define W2S_BATCH $batch /* tokens that are multiplied at once, a multiple of 4: fewer need less memory, more are faster */
#endif
#define W2S_PREDICT_BYTES ($predict_base + W2S_BATCH * $predict_token)
size_t w2s_predict_bytes(void); /* the same, for callers that do not read this file */
int w2s_predict(void *memory, size_t bytes, const float *samples, size_t count, float *values);
int w2s_predict_int16(void *memory, size_t bytes, const int16_t *samples, size_t count, float *values);

/* Streams: what was heard in the last `window` samples, at any moment. `hop` samples of it are forgotten at once; the window is a
multiple of the hop, and the hop no shorter than a token. Two ways to normalise the level, which the network needs:

W2S_RUNNING  by mean and variance of all samples so far, from one window on with exponential forgetting. Costs per sample what the
             network costs per sample, whatever the window; memory is W2S_STREAM_BYTES(window, hop). Until a window has been heard,
             values follow the first sounds more than they will later. Values see a sample after at most W2S_LATENCY_SAMPLES.
W2S_WINDOW   each window by its own, exactly as w2s_predict has it. Keeps the samples, W2S_WINDOW_STREAM_BYTES(window), and computes
             all of them anew in w2s_stream_read, whose scratch memory is W2S_PREDICT_BYTES.

The bytes of a stream are its whole state: copied away and back, or to another place, it goes on as if nothing had happened. Scratch
memory (W2S_SCRATCH_BYTES) keeps nothing from call to call, and streams may share it. Samples may be pushed in any pieces, which
changes no bit of any value. */
enum { W2S_RUNNING = 0, W2S_WINDOW = 1 };
#define W2S_SCRATCH_BYTES $scratch_bytes
size_t w2s_scratch_bytes(void);
#define W2S_STREAM_BYTES(window, hop) ($stream_base + ((window) / (hop) - 1) * $stream_block)
#define W2S_WINDOW_STREAM_BYTES(window) (24 + 4 * (window))
size_t w2s_stream_bytes(int normalisation, uint32_t window, uint32_t hop); /* 0 for settings that cannot be */
int w2s_stream_init(void *stream, size_t bytes, int normalisation, uint32_t window, uint32_t hop);
int w2s_stream_reset(void *stream);
/* A sample that is not finite, or beyond 1e15, counts as 0; all are taken, and W2S_ERROR_SAMPLE tells of it. */
int w2s_stream_push(void *stream, void *scratch, size_t bytes, const float *samples, size_t count);
int w2s_stream_push_int16(void *stream, void *scratch, size_t bytes, const int16_t *samples, size_t count);
int w2s_stream_read(const void *stream, void *scratch, size_t bytes, float *values);

#ifdef __cplusplus
}
#endif

#endif
