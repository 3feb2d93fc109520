/* Raw 16-bit samples, 16 kHz mono, on stdin → a line of values every quarter of a second, of the last five seconds:

    cc -O3 example.c w2s_model.c -lm -o example
    ffmpeg -loglevel error -i speech.wav -ar 16000 -ac 1 -f s16le - | ./example */

#include <stdio.h>

#include "w2s_model.h"

#define HOP (W2S_SAMPLING_RATE / 4)
#define WINDOW (20 * HOP)

/* Words of four bytes, because the memory has to be aligned like a float. */
static float stream[W2S_STREAM_BYTES(WINDOW, HOP) / 4], scratch[(W2S_SCRATCH_BYTES + 3) / 4];

int main(void)
{
    int16_t samples[HOP];
    float values[W2S_DIMENSIONS];
    unsigned long hops = 0;
    size_t count;
    if (w2s_stream_init(stream, sizeof stream, W2S_RUNNING, WINDOW, HOP) != W2S_OK)
        return 1;
    printf("seconds");
    for (int n = 0; n < W2S_DIMENSIONS; n++)
        printf("\t%s", w2s_dimensions[n]);
    printf("\n");
    while ((count = fread(samples, sizeof *samples, HOP, stdin)) > 0) {
        w2s_stream_push_int16(stream, scratch, sizeof scratch, samples, count);
        if (count < HOP || w2s_stream_read(stream, scratch, sizeof scratch, values) != W2S_OK)
            continue;
        printf("%.2f", (double)++hops * HOP / W2S_SAMPLING_RATE);
        for (int n = 0; n < W2S_DIMENSIONS; n++)
            printf("\t%.4f", (double)values[n]);
        printf("\n");
        fflush(stdout);
    }
    return 0;
}
