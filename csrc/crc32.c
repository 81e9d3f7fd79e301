/* CRC32 as zlib, ZIP and gzip have it: P = 0x104C11DB7, reflected, first and last inverted.
 *
 * Portable form: slicing by 16, after M. E. Kounavis and F. L. Berry, "Novel Table Lookup-Based Algorithms
 * for High-Performance CRC Generation" (IEEE Transactions on Computers, 2008). Combining: the CRC of a
 * concatenation is crc(A) * x^(8 |B|) + crc(B) modulo P, the powers by squaring, as Mark Adler describes for
 * zlib's crc32_combine (https://stackoverflow.com/a/23126768).
 */
#include "ckptengine.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#define POLYNOMIAL 0xEDB88320u /* P without x^32, bit 31 being x^0 */
#define STEP 16384 /* bytes copied before they are checksummed: both stay in the first-level cache */

static uint32_t table[16][256];
static uint32_t squares[32]; /* x^(2^n) mod P */
static const ck_variant *usable[8];
static int n_usable;

bool ck_value_error(ck_error *error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->text, sizeof error->text, format, arguments);
    va_end(arguments);
    error->kind = CK_VALUE;
    return false;
}

bool ck_memory_error(ck_error *error) {
    error->kind = CK_MEMORY;
    return false;
}

uint32_t ck_multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (int i = 0; i < 32; i++) { /* Horner's rule from a's x^0, which is bit 31; b becomes b * x^i */
        product ^= b & (0u - ((a >> (31 - i)) & 1u));
        b = (b >> 1) ^ (POLYNOMIAL & (0u - (b & 1u)));
    }
    return product;
}

uint32_t ck_power(uint64_t exponent) {
    uint32_t power = 0x80000000u; /* x^0 */
    /* P is primitive, so x^(2^32) == x and the squares repeat after 32 */
    for (int n = 0; exponent != 0; exponent >>= 1, n++)
        if (exponent & 1)
            power = ck_multiply(squares[n & 31], power);
    return power;
}

uint32_t ck_shift(uint64_t nbytes) {
    uint32_t power = 0x80000000u;
    for (int n = 3; nbytes != 0; nbytes >>= 1, n++) /* 8 = 2^3 bits to a byte */
        if (nbytes & 1)
            power = ck_multiply(squares[n & 31], power);
    return power;
}

/* A 16-byte lane, loaded little-endian, is a polynomial of 128 terms whose first bit is x^127: its low half H
 * and high half L mean H x^64 + L. Moved nbits ahead it is H x^(nbits+64) + L x^nbits. The carry-less product
 * of two reflected 64-bit halves is the reflected 127-bit product, which as a 128-bit lane reads x times too
 * large, hence the -1. Remainders of 32 bits stand in the upper half of their 64. This is the folding of
 * Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Intel, 2009); the
 * constants are computed, not taken from there. */
void ck_fold_constants(uint64_t nbits, uint64_t pair[2]) {
    pair[0] = (uint64_t)ck_power(nbits + 63) << 32;
    pair[1] = (uint64_t)ck_power(nbits - 1) << 32;
}

uint32_t ck_crc32_portable(uint32_t state, const unsigned char *data, size_t nbytes) {
    for (; nbytes >= 16; data += 16, nbytes -= 16) {
        uint32_t word[4];
        memcpy(word, data, 16);
        word[0] ^= state;
        state = 0;
        for (int i = 0; i < 4; i++) {
            const uint32_t (*row)[256] = (const uint32_t (*)[256])table[12 - 4 * i];
            state ^= row[3][word[i] & 255] ^ row[2][word[i] >> 8 & 255] ^ row[1][word[i] >> 16 & 255] ^
                     row[0][word[i] >> 24];
        }
    }
    for (; nbytes > 0; data++, nbytes--)
        state = state >> 8 ^ table[0][(state ^ *data) & 255];
    return state;
}

uint32_t ck_crc32_copy_portable(uint32_t state, unsigned char *target, const unsigned char *source,
                                size_t nbytes) {
    while (nbytes > 0) {
        size_t part = nbytes < STEP ? nbytes : STEP;
        ck_stream(target, source, part);
        state = ck_crc32_portable(state, source, part);
        target += part, source += part, nbytes -= part;
    }
    return state;
}

static bool always(void) {
    return true;
}

static const ck_variant portable = {"portable", always, ck_crc32_portable, ck_crc32_copy_portable};

/* Whether a variant computes what the portable one does, on this very CPU: emulators and hypervisors that
 * announce instructions which they get wrong must cost speed, never a checkpoint. */
static bool agrees(const ck_variant *variant) {
    _Alignas(64) unsigned char source[1500], target[1500];
    for (size_t i = 0; i < sizeof source; i++)
        source[i] = (unsigned char)(i * 151 + (i >> 3));
    memset(target, 0, sizeof target);
    uint32_t expected = ck_crc32_portable(~0u, source, sizeof source);
    uint32_t copied = variant->copy(~0u, target, source, sizeof source);
    ck_fence();
    return variant->update(~0u, source, sizeof source) == expected && copied == expected &&
           memcmp(target, source, sizeof source) == 0;
}

static void add_usable(const ck_variant *const *list) {
    for (; *list != NULL; list++)
        if ((*list)->usable() && agrees(*list))
            usable[n_usable++] = *list;
}

void ck_init(void) {
    if (n_usable != 0)
        return;
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t state = byte;
        for (int i = 0; i < 8; i++)
            state = (state >> 1) ^ (POLYNOMIAL & (0u - (state & 1u)));
        table[0][byte] = state;
    }
    for (int i = 1; i < 16; i++)
        for (int byte = 0; byte < 256; byte++)
            table[i][byte] = table[i - 1][byte] >> 8 ^ table[0][table[i - 1][byte] & 255];
    squares[0] = 0x40000000u; /* x */
    for (int n = 1; n < 32; n++)
        squares[n] = ck_multiply(squares[n - 1], squares[n - 1]);
    ck_x86_init();
    ck_arm_init();
    add_usable(ck_x86_variants);
    add_usable(ck_arm_variants);
    usable[n_usable++] = &portable;
}

int ck_variants(const ck_variant *const **list) {
    *list = usable;
    return n_usable;
}

const ck_variant *ck_variant_named(const char *name) {
    if (name == NULL)
        return usable[0];
    for (int i = 0; i < n_usable; i++)
        if (strcmp(usable[i]->name, name) == 0)
            return usable[i];
    return NULL;
}
