/* What WebAssembly has to have besides w2s_model.c. */

#include "w2s_model.h"

float sqrtf(float x);
float sqrtf(float x) /* there is no library, but an instruction */
{
    __asm__("local.get %0\n f32.sqrt\n local.set %0" : "+r"(x));
    return x;
}

/* The macros of the header that JavaScript needs, and the names of the values and the metadata as addresses of text. */
uint32_t w2s_constant(int which);
uint32_t w2s_constant(int which)
{
    switch (which) {
    case 0: return W2S_SAMPLING_RATE;
    case 1: return W2S_DIMENSIONS;
    case 2: return W2S_PREDICT_BYTES;
    case 3: return W2S_SCRATCH_BYTES;
    case 4: return (uint32_t)(size_t)w2s_metadata;
    default: return which < 5 + W2S_DIMENSIONS ? (uint32_t)(size_t)w2s_dimensions[which - 5] : 0;
    }
}
