/* CRC32 by carry-less multiplication on x86-64, alone or fused with a copy by non-temporal stores.
 *
 * Folding after Gopal et al. (Intel, 2009), see ck_fold_constants. Each function folds several lanes at once,
 * then lane by lane, and leaves the last 16 bytes to the table: that costs a few nanoseconds for each call
 * and needs no second reduction to keep right. Wider registers only widen the lanes.
 */
#include "ckptengine.h"

#if defined(__x86_64__)

#include <cpuid.h>
#include <immintrin.h>
#include <string.h>

#define TARGET_128 __attribute__((target("pclmul,sse4.1")))
#define TARGET_256 __attribute__((target("avx2,pclmul,vpclmulqdq")))
#ifndef TARGET_512 /* tests/native/emulated_avx512.h has its own, for machines without it */
#define TARGET_512 __attribute__((target("avx512f,avx2,pclmul,vpclmulqdq")))
#define NEEDED_512 (SSE41 | PCLMUL | AVX2 | VPCLMUL | AVX512)
#endif
#define INLINE static inline __attribute__((always_inline))

#define LINE 64         /* non-temporal stores fill whole cache lines */
#define FUSED_LEAST 256 /* below this the set-up outweighs the gain */

/* Pairs from ck_fold_constants for the distances between lanes, in bits. */
static uint64_t fold_16[2], fold_64[2], fold_128[2], fold_256[2];

void ck_x86_init(void) {
    ck_fold_constants(128, fold_16);
    ck_fold_constants(512, fold_64);
    ck_fold_constants(1024, fold_128);
    ck_fold_constants(2048, fold_256);
}

/* ---- 128 bits ---- */

TARGET_128 INLINE __m128i fold(__m128i lane, __m128i constants) {
    return _mm_xor_si128(_mm_clmulepi64_si128(lane, constants, 0x00),
                         _mm_clmulepi64_si128(lane, constants, 0x11));
}

/* Folds `n` stored lanes and the rest of the data, lane by lane, and reduces to 32 bits. */
TARGET_128 INLINE uint32_t finish(const unsigned char *lanes, int n, unsigned char *target,
                                  const unsigned char *source, size_t nbytes) {
    const __m128i constants = _mm_loadu_si128((const __m128i *)fold_16);
    __m128i lane = _mm_loadu_si128((const __m128i *)lanes);
    for (int i = 1; i < n; i++)
        lane = _mm_xor_si128(fold(lane, constants), _mm_loadu_si128((const __m128i *)(lanes + 16 * i)));
    if (target != NULL && nbytes > 0)
        memcpy(target, source, nbytes);
    for (; nbytes >= 16; source += 16, nbytes -= 16)
        lane = _mm_xor_si128(fold(lane, constants), _mm_loadu_si128((const __m128i *)source));
    unsigned char last[16];
    _mm_storeu_si128((__m128i *)last, lane);
    return ck_crc32_portable(ck_crc32_portable(0, last, 16), source, nbytes);
}

TARGET_128 INLINE uint32_t run_128(uint32_t state, unsigned char *target, const unsigned char *source,
                                   size_t nbytes) {
    const __m128i constants = _mm_loadu_si128((const __m128i *)fold_64);
    __m128i lane[4];
    for (int i = 0; i < 4; i++) {
        lane[i] = _mm_loadu_si128((const __m128i *)(source + 16 * i));
        if (target != NULL)
            _mm_stream_si128((__m128i *)(target + 16 * i), lane[i]);
    }
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128((int)state));
    size_t at = 64;
    for (; at + 64 <= nbytes; at += 64)
        for (int i = 0; i < 4; i++) {
            __m128i data = _mm_loadu_si128((const __m128i *)(source + at + 16 * i));
            if (target != NULL)
                _mm_stream_si128((__m128i *)(target + at + 16 * i), data);
            lane[i] = _mm_xor_si128(fold(lane[i], constants), data);
        }
    unsigned char lanes[64];
    for (int i = 0; i < 4; i++)
        _mm_storeu_si128((__m128i *)(lanes + 16 * i), lane[i]);
    return finish(lanes, 4, target != NULL ? target + at : NULL, source + at, nbytes - at);
}

/* ---- 256 bits ---- */

TARGET_256 INLINE __m256i fold_wide(__m256i lane, __m256i constants) {
    return _mm256_xor_si256(_mm256_clmulepi64_epi128(lane, constants, 0x00),
                            _mm256_clmulepi64_epi128(lane, constants, 0x11));
}

TARGET_256 INLINE uint32_t run_256(uint32_t state, unsigned char *target, const unsigned char *source,
                                   size_t nbytes) {
    const __m256i constants = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)fold_128));
    __m256i lane[4];
    for (int i = 0; i < 4; i++) {
        lane[i] = _mm256_loadu_si256((const __m256i *)(source + 32 * i));
        if (target != NULL)
            _mm256_stream_si256((__m256i *)(target + 32 * i), lane[i]);
    }
    lane[0] = _mm256_xor_si256(lane[0], _mm256_set_epi64x(0, 0, 0, (long long)state));
    size_t at = 128;
    for (; at + 128 <= nbytes; at += 128)
        for (int i = 0; i < 4; i++) {
            __m256i data = _mm256_loadu_si256((const __m256i *)(source + at + 32 * i));
            if (target != NULL)
                _mm256_stream_si256((__m256i *)(target + at + 32 * i), data);
            lane[i] = _mm256_xor_si256(fold_wide(lane[i], constants), data);
        }
    unsigned char lanes[128];
    for (int i = 0; i < 4; i++)
        _mm256_storeu_si256((__m256i *)(lanes + 32 * i), lane[i]);
    return finish(lanes, 8, target != NULL ? target + at : NULL, source + at, nbytes - at);
}

/* ---- 512 bits ---- */

TARGET_512 INLINE __m512i fold_widest(__m512i lane, __m512i constants, __m512i data) {
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(lane, constants, 0x00),
                                     _mm512_clmulepi64_epi128(lane, constants, 0x11), data,
                                     0x96); /* exclusive or of three */
}

TARGET_512 INLINE uint32_t run_512(uint32_t state, unsigned char *target, const unsigned char *source,
                                   size_t nbytes) {
    const __m512i constants = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)fold_256));
    __m512i lane[4];
    for (int i = 0; i < 4; i++) {
        lane[i] = _mm512_loadu_si512(source + 64 * i);
        if (target != NULL)
            _mm512_stream_si512((void *)(target + 64 * i), lane[i]);
    }
    lane[0] = _mm512_xor_si512(lane[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)state)));
    size_t at = 256;
    for (; at + 256 <= nbytes; at += 256)
        for (int i = 0; i < 4; i++) {
            __m512i data = _mm512_loadu_si512(source + at + 64 * i);
            if (target != NULL)
                _mm512_stream_si512((void *)(target + at + 64 * i), data);
            lane[i] = fold_widest(lane[i], constants, data);
        }
    unsigned char lanes[256];
    for (int i = 0; i < 4; i++)
        _mm512_storeu_si512(lanes + 64 * i, lane[i]);
    return finish(lanes, 16, target != NULL ? target + at : NULL, source + at, nbytes - at);
}

/* ---- the table of variants ---- */

#define DEFINE(width, least, attribute)                                                                      \
    attribute static uint32_t update_##width(uint32_t state, const unsigned char *data, size_t nbytes) {     \
        if (nbytes < (least))                                                                                \
            return ck_crc32_portable(state, data, nbytes);                                                   \
        return run_##width(state, NULL, data, nbytes);                                                       \
    }                                                                                                        \
    attribute static uint32_t copy_##width(uint32_t state, unsigned char *target,                            \
                                           const unsigned char *source, size_t nbytes) {                     \
        if (nbytes < FUSED_LEAST + LINE) {                                                                   \
            if (nbytes > 0)                                                                                  \
                memcpy(target, source, nbytes);                                                              \
            return update_##width(state, source, nbytes);                                                    \
        }                                                                                                    \
        size_t head = (size_t)(-(uintptr_t)target % LINE);                                                   \
        if (head > 0) {                                                                                      \
            memcpy(target, source, head);                                                                    \
            state = ck_crc32_portable(state, source, head);                                                  \
        }                                                                                                    \
        return run_##width(state, target + head, source + head, nbytes - head);                              \
    }

DEFINE(128, 64, TARGET_128)
DEFINE(256, 128, TARGET_256)
DEFINE(512, 256, TARGET_512)

/* Asked of the CPU itself: not every compiler's run-time library answers __builtin_cpu_supports. The bits are
 * those of CPUID leaves 1 and 7 and of XCR0 in the "Intel 64 and IA-32 Architectures Software Developer's
 * Manual". */
enum { SSE41 = 1, PCLMUL = 2, AVX2 = 4, VPCLMUL = 8, AVX512 = 16 };

static int features(void) {
    unsigned a, b, c, d, low = 0, high = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d))
        return 0;
    int found = (c >> 19 & 1 ? SSE41 : 0) | (c >> 1 & 1 ? PCLMUL : 0);
    if (c >> 27 & 1) /* the system saves what XCR0 names */
        __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d))
        return found;
    found |= (b >> 5 & 1 ? AVX2 : 0) | (c >> 10 & 1 ? VPCLMUL : 0);
    return found | ((low & 0xE0) == 0xE0 && b >> 16 & 1 ? AVX512 : 0);
}

static bool have(int wanted) {
    return (features() & wanted) == wanted;
}

static bool usable_128(void) {
    return have(SSE41 | PCLMUL);
}

static bool usable_256(void) {
    return have(SSE41 | PCLMUL | AVX2 | VPCLMUL);
}

static bool usable_512(void) {
    return have(NEEDED_512);
}

static const ck_variant variant_512 = {"vpclmul512", usable_512, update_512, copy_512};
static const ck_variant variant_256 = {"vpclmul", usable_256, update_256, copy_256};
static const ck_variant variant_128 = {"pclmul", usable_128, update_128, copy_128};

const ck_variant *const ck_x86_variants[] = {&variant_512, &variant_256, &variant_128, NULL};

#else

const ck_variant *const ck_x86_variants[] = {NULL};

void ck_x86_init(void) {
}

#endif
