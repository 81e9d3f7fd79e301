/* CRC32 on aarch64: polynomial multiplication (PMULL), fused with a copy, and the CRC32 instructions. */
#include "ckptengine.h"

#if defined(__aarch64__)

#include <arm_acle.h>
#include <arm_neon.h>
#include <string.h>
#include <sys/auxv.h>

#define TARGET_PMULL __attribute__((target("+crypto")))
#define TARGET_CRC __attribute__((target("+crc")))
#define INLINE static inline __attribute__((always_inline))

#define HAS_PMULL (1u << 4) /* HWCAP_PMULL and HWCAP_CRC32 of <asm/hwcap.h>, which not every libc ships */
#define HAS_CRC32 (1u << 7)
#define STEP 16384

/* Pairs from ck_fold_constants for the distances between lanes. */
static uint64_t fold_16[2], fold_64[2];

void ck_arm_init(void) {
    ck_fold_constants(128, fold_16);
    ck_fold_constants(512, fold_64);
}

/* ---- PMULL ---- */

TARGET_PMULL INLINE uint64x2_t fold(uint64x2_t lane, const uint64_t constants[2]) {
    poly128_t low = vmull_p64((poly64_t)vgetq_lane_u64(lane, 0), (poly64_t)constants[0]);
    poly128_t high = vmull_p64((poly64_t)vgetq_lane_u64(lane, 1), (poly64_t)constants[1]);
    return veorq_u64(vreinterpretq_u64_p128(low), vreinterpretq_u64_p128(high));
}

INLINE uint64x2_t load(const unsigned char *source) {
    return vreinterpretq_u64_u8(vld1q_u8(source));
}

TARGET_PMULL INLINE uint32_t run_pmull(uint32_t state, unsigned char *target, const unsigned char *source,
                                       size_t nbytes) {
    const uint64_t far[2] = {fold_64[0], fold_64[1]}, near[2] = {fold_16[0], fold_16[1]};
    uint64x2_t lane[4];
    for (int i = 0; i < 4; i++) {
        lane[i] = load(source + 16 * i);
        if (target != NULL)
            vst1q_u8(target + 16 * i, vreinterpretq_u8_u64(lane[i]));
    }
    lane[0] = veorq_u64(lane[0], vsetq_lane_u64(state, vdupq_n_u64(0), 0));
    size_t at = 64;
    for (; at + 64 <= nbytes; at += 64)
        for (int i = 0; i < 4; i++) {
            uint64x2_t data = load(source + at + 16 * i);
            if (target != NULL)
                vst1q_u8(target + at + 16 * i, vreinterpretq_u8_u64(data));
            lane[i] = veorq_u64(fold(lane[i], far), data);
        }
    for (int i = 1; i < 4; i++)
        lane[0] = veorq_u64(fold(lane[0], near), lane[i]);
    if (target != NULL && at < nbytes)
        memcpy(target + at, source + at, nbytes - at);
    for (; at + 16 <= nbytes; at += 16)
        lane[0] = veorq_u64(fold(lane[0], near), load(source + at));
    unsigned char last[16];
    vst1q_u8(last, vreinterpretq_u8_u64(lane[0]));
    return ck_crc32_portable(ck_crc32_portable(0, last, 16), source + at, nbytes - at);
}

TARGET_PMULL static uint32_t update_pmull(uint32_t state, const unsigned char *data, size_t nbytes) {
    if (nbytes < 64)
        return ck_crc32_portable(state, data, nbytes);
    return run_pmull(state, NULL, data, nbytes);
}

TARGET_PMULL static uint32_t copy_pmull(uint32_t state, unsigned char *target, const unsigned char *source,
                                        size_t nbytes) {
    if (nbytes < 64)
        return ck_crc32_copy_portable(state, target, source, nbytes);
    return run_pmull(state, target, source, nbytes);
}

static bool usable_pmull(void) {
    return (getauxval(AT_HWCAP) & HAS_PMULL) != 0;
}

/* ---- CRC32 instructions ---- */

TARGET_CRC static uint32_t update_crc(uint32_t state, const unsigned char *data, size_t nbytes) {
    for (; nbytes >= 8; data += 8, nbytes -= 8) {
        uint64_t word;
        memcpy(&word, data, 8);
        state = __crc32d(state, word);
    }
    for (; nbytes > 0; data++, nbytes--)
        state = __crc32b(state, *data);
    return state;
}

static uint32_t copy_crc(uint32_t state, unsigned char *target, const unsigned char *source, size_t nbytes) {
    while (nbytes > 0) {
        size_t part = nbytes < STEP ? nbytes : STEP;
        memcpy(target, source, part);
        state = update_crc(state, source, part);
        target += part, source += part, nbytes -= part;
    }
    return state;
}

static bool usable_crc(void) {
    return (getauxval(AT_HWCAP) & HAS_CRC32) != 0;
}

static const ck_variant variant_pmull = {"pmull", usable_pmull, update_pmull, copy_pmull};
static const ck_variant variant_crc = {"armcrc", usable_crc, update_crc, copy_crc};

const ck_variant *const ck_arm_variants[] = {&variant_pmull, &variant_crc, NULL};

#else

const ck_variant *const ck_arm_variants[] = {NULL};

void ck_arm_init(void) {
}

#endif
