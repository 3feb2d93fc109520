/* What runs on an emulated Cortex-M, and on the host for comparison: the values of a recording, of a stream, and what they cost.

Each line is a word and numbers in hexadecimal; the numbers of "whole" and "stream" are the bits of floats. */

#include <stddef.h>
#include <stdint.h>

#include "recording.h" /* const int16_t recording[RECORDING_SAMPLES] */
#include "w2s_model.h"

static void write(const char *text);
static uint32_t ticks(void);

static void write_number(uint32_t number)
{
    char text[10];
    for (int digit = 0; digit < 8; digit++) text[digit + 1] = "0123456789abcdef"[number >> (28 - 4 * digit) & 15];
    text[0] = ' ', text[9] = 0;
    write(text);
}

static void write_line(const char *word, const uint32_t *numbers, int count)
{
    write(word);
    while (count--) write_number(*numbers++);
    write("\n");
}

static uint32_t memory[(W2S_PREDICT_BYTES + 3) / 4];
/* values of the last 5 s, which are forgotten in steps of 0.25 s */
#define WINDOW (5 * W2S_SAMPLING_RATE)
#define HOP (W2S_SAMPLING_RATE / 4)
static uint32_t stream[(W2S_STREAM_BYTES(WINDOW, HOP) + 3) / 4], scratch[(W2S_SCRATCH_BYTES + 3) / 4];

static uint32_t run(void)
{
    union {
        float numbers[W2S_DIMENSIONS];
        uint32_t bits[W2S_DIMENSIONS];
    } values;
    uint32_t began = ticks(), took;
    int error = w2s_predict_int16(memory, sizeof memory, recording, RECORDING_SAMPLES, values.numbers);
    took = ticks() - began;
    if (error) return (uint32_t)error;
    write_line("whole", values.bits, W2S_DIMENSIONS);
    write_line("whole_ticks", &took, 1);
    began = ticks();
    error = w2s_stream_init(stream, sizeof stream, W2S_RUNNING, WINDOW, HOP);
    for (int at = 0; !error && at < RECORDING_SAMPLES; at += 333) {
        const int left = RECORDING_SAMPLES - at;
        error = w2s_stream_push_int16(stream, scratch, sizeof scratch, recording + at, left < 333 ? (size_t)left : 333);
    }
    took = ticks() - began;
    if (error) return (uint32_t)error;
    write_line("stream_ticks", &took, 1);
    began = ticks();
    error = w2s_stream_read(stream, scratch, sizeof scratch, values.numbers);
    took = ticks() - began;
    if (error) return (uint32_t)error;
    write_line("read_ticks", &took, 1);
    write_line("stream", values.bits, W2S_DIMENSIONS);
    took = sizeof memory;
    write_line("whole_bytes", &took, 1);
    took = sizeof stream + sizeof scratch;
    write_line("stream_bytes", &took, 1);
    return 0;
}

#ifdef __arm__
/* Semihosting: the debugger, here QEMU, writes and exits. */
static uint32_t call(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

static void write(const char *text)
{
    call(0x04, text);
}

/* SysTick counts down from 2^24 - 1, and interrupts at 0. */
#define SYSTICK ((volatile uint32_t *)0xe000e010)
static volatile uint32_t rounds;

void count_round(void)
{
    rounds++;
}

static uint32_t ticks(void)
{
    uint32_t before, value;
    do before = rounds, value = SYSTICK[2];
    while (before != rounds);
    return (before << 24) + (0xffffff - value);
}

int main(void)
{
    /* 2,000,000 instructions, which tell how many a tick is */
    uint32_t began = ticks(), took, count = 1000000;
    __asm__ volatile("1: subs %0, #1\n bne 1b" : "+r"(count));
    took = ticks() - began;
    write_line("ticks_of_2_million", &took, 1);
    return (int)run();
}

extern uint32_t data_from[], data_to[], data_end[], bss_to[], bss_end[], stack_end[];

void start(void)
{
    for (uint32_t *from = data_from, *to = data_to; to < data_end;) *to++ = *from++;
    for (uint32_t *to = bss_to; to < bss_end;) *to++ = 0;
    *(volatile uint32_t *)0xe000ed88 |= 0xf << 20; /* CPACR: the floating-point unit */
    __asm__ volatile("dsb\n isb");
    SYSTICK[1] = 0xffffff, SYSTICK[2] = 0, SYSTICK[0] = 7;
    while (!SYSTICK[2]) continue; /* it is loaded at its first tick */
    uint32_t how[2] = {0x20026, (uint32_t)main()}; /* the application has ended, with this code */
    call(0x20, how);
}

static void fault(void)
{
    write("fault\n");
    uint32_t how[2] = {0x20026, 99};
    call(0x20, how);
}

__attribute__((section(".vectors"), used)) static void *const vectors[16] = {
    stack_end, start, fault, fault, fault, fault, fault, 0, 0, 0, 0, fault, fault, 0, fault, count_round,
};
#else
#include <stdio.h>

static void write(const char *text)
{
    fputs(text, stdout);
}

static uint32_t ticks(void)
{
    return 0;
}

int main(void)
{
    return (int)run();
}
#endif
