/* Copies that go past the cache, for what will not be read again soon. */
#include "ckptengine.h"

#include <string.h>

#if defined(__x86_64__)

#include <emmintrin.h>

#define LINE 64 /* non-temporal stores should fill whole cache lines */

void ck_stream(unsigned char *target, const unsigned char *source, size_t nbytes) {
    size_t head = (size_t)(-(uintptr_t)target % LINE);
    if (nbytes < head + LINE) {
        memcpy(target, source, nbytes);
        return;
    }
    memcpy(target, source, head);
    size_t at = head;
    for (; at + LINE <= nbytes; at += LINE)
        for (int i = 0; i < LINE; i += 16)
            _mm_stream_si128((__m128i *)(target + at + i),
                             _mm_loadu_si128((const __m128i *)(source + at + i)));
    memcpy(target + at, source + at, nbytes - at);
}

void ck_fence(void) {
    _mm_sfence();
}

#else

/* Elsewhere the processor itself notices whole lines being written; joining the threads orders the stores. */

void ck_stream(unsigned char *target, const unsigned char *source, size_t nbytes) {
    memcpy(target, source, nbytes);
}

void ck_fence(void) {
}

#endif
