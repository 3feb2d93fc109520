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
#define W2S_PREDICT_BYTES $predict_bytes
int w2s_predict(void *memory, size_t bytes, const float *samples, size_t count, float *values);
int w2s_predict_int16(void *memory, size_t bytes, const int16_t *samples, size_t count, float *values);

#ifdef __cplusplus
}
#endif

#endif
