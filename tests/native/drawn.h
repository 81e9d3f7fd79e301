/* What the checks of the core draw and compare with: numbers of one fixed seed, tensors whose dimensions lie
 * in any order with gaps and signs, a bit-by-bit CRC and copies element by element. */
#ifndef DRAWN_H
#define DRAWN_H

#include "ckptengine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILL 0xA5

static uint64_t seed = 0x9E3779B97F4A7C15u;

/* xorshift64*, Vigna, "An experimental exploration of Marsaglia's xorshift generators, scrambled" (2016) */
static uint64_t draw(void) {
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545F4914F6CDD1Du;
}

static int64_t below(int64_t limit) {
    return (int64_t)(draw() >> 1) % limit;
}

static int64_t one_of(const int64_t *values, int64_t n) {
    return values[below(n)];
}

static void randomize(unsigned char *bytes, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i++)
        bytes[i] = (unsigned char)(draw() >> 56);
}

static uint32_t reference_crc(uint32_t crc, const unsigned char *data, int64_t nbytes) {
    uint32_t state = ~crc;
    for (int64_t i = 0; i < nbytes; i++) {
        state ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            state = state >> 1 ^ (0xEDB88320u & (0u - (state & 1)));
    }
    return ~state;
}

#define CHECK(condition, ...)                                                                                \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);                                           \
            printf(__VA_ARGS__);                                                                             \
            printf("\n");                                                                                    \
            exit(1);                                                                                         \
        }                                                                                                    \
    } while (0)

static bool filled(const unsigned char *bytes, int64_t nbytes) {
    for (int64_t i = 0; i < nbytes; i++)
        if (bytes[i] != FILL)
            return false;
    return true;
}

typedef struct {
    int64_t itemsize, ndim, nbytes, elements;
    int64_t dense[6], offset[6], box[6], stride[6];
    unsigned char *memory, *first; /* all of it, and the box's first element */
    int64_t memory_nbytes;
} tensor;

/* A box within a dense shape, and memory for it in a random order of dimensions with random gaps and signs.
 */
static void draw_tensor(tensor *t, bool destination, int64_t longest) {
    static const int64_t sizes[] = {1, 2, 4, 8, 16};
    int64_t order[6], pitch, base = 0;
    memset(t, 0, sizeof *t);
    t->itemsize = one_of(sizes, 5);
    t->ndim = below(5);
    t->nbytes = t->itemsize;
    for (int64_t i = 0; i < t->ndim; i++) {
        order[i] = i;
        t->box[i] = 1 + below(longest);
        t->offset[i] = destination ? below(3) * below(2) : 0;
        t->dense[i] = t->offset[i] + t->box[i] + below(3) * below(2);
        t->nbytes *= t->dense[i];
    }
    for (int64_t i = t->ndim - 1; i > 0; i--) {
        int64_t other = below(2) ? below(i + 1) : i, swapped = order[i];
        order[i] = order[other];
        order[other] = swapped;
    }
    pitch = t->itemsize;
    for (int64_t i = t->ndim - 1; i >= 0; i--) {
        int64_t d = order[i], step = below(3) == 0 ? 2 : 1;
        int64_t sign = below(4) == 0 ? -1 : 1;
        t->stride[d] = sign * pitch * step;
        if (!destination && below(12) == 0)
            t->stride[d] = 0;
        else
            pitch *= t->box[d] * step;
        if (t->stride[d] < 0)
            base -= t->stride[d] * (t->box[d] - 1);
    }
    t->memory_nbytes = pitch;
    t->memory = malloc((size_t)pitch);
    CHECK(t->memory != NULL, "memory");
    t->first = t->memory + base;
}

/* Calls back for each element of the dense array, with its memory or NULL where it lies outside of the box.
 */
static void each(const tensor *t, unsigned char *dense,
                 void (*visit)(unsigned char *dense, unsigned char *memory, int64_t size)) {
    int64_t at[6] = {0}, elements = t->nbytes / t->itemsize;
    for (int64_t element = 0; element < elements; element++) {
        bool inside = true;
        int64_t place = 0;
        for (int64_t i = 0; i < t->ndim; i++) {
            int64_t index = at[i] - t->offset[i];
            inside = inside && index >= 0 && index < t->box[i];
            place += index * t->stride[i];
        }
        visit(dense + element * t->itemsize, inside ? t->first + place : NULL, t->itemsize);
        for (int64_t i = t->ndim - 1; i >= 0 && ++at[i] == t->dense[i]; i--)
            at[i] = 0;
    }
}

static void take_from(unsigned char *dense, unsigned char *memory, int64_t size) {
    if (memory != NULL)
        memcpy(dense, memory, (size_t)size);
    else
        memset(dense, 0, (size_t)size);
}

static void give_to(unsigned char *dense, unsigned char *memory, int64_t size) {
    if (memory != NULL)
        memcpy(memory, dense, (size_t)size);
}

static int64_t append(int64_t *ops, int64_t length, const int64_t *values, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        ops[length++] = values[i];
    return length;
}

#endif
