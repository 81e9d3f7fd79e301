/* The 512-bit instructions of crc32_x86.c, each as four of 128 bits, so that the path for AVX-512 is checked
 * on machines without it. The check program is built with -include of this file. */
#include <immintrin.h>

#include <stdbool.h>

#define TARGET_512 __attribute__((target("pclmul,sse4.1")))
#define NEEDED_512 (SSE41 | PCLMUL)
#define EMULATED TARGET_512 static inline __attribute__((always_inline))

typedef struct {
    __m128i part[4];
} emulated_512;

EMULATED emulated_512 emulated_load(const void *from) {
    emulated_512 value;
    for (int i = 0; i < 4; i++)
        value.part[i] = _mm_loadu_si128((const __m128i *)from + i);
    return value;
}

EMULATED void emulated_store(void *to, emulated_512 value) {
    for (int i = 0; i < 4; i++)
        _mm_storeu_si128((__m128i *)to + i, value.part[i]);
}

EMULATED emulated_512 emulated_xor(emulated_512 a, emulated_512 b) {
    for (int i = 0; i < 4; i++)
        a.part[i] = _mm_xor_si128(a.part[i], b.part[i]);
    return a;
}

EMULATED emulated_512 emulated_broadcast(__m128i value) {
    return (emulated_512){{value, value, value, value}};
}

EMULATED emulated_512 emulated_extend(__m128i value) {
    __m128i zero = _mm_setzero_si128();
    return (emulated_512){{value, zero, zero, zero}};
}

EMULATED emulated_512 emulated_multiply(emulated_512 a, emulated_512 b, bool high) {
    for (int i = 0; i < 4; i++)
        a.part[i] = high ? _mm_clmulepi64_si128(a.part[i], b.part[i], 0x11)
                         : _mm_clmulepi64_si128(a.part[i], b.part[i], 0x00);
    return a;
}

/* where the compiler's own are macros */
#undef _mm512_clmulepi64_epi128
#undef _mm512_ternarylogic_epi64

#define __m512i emulated_512
#define _mm512_loadu_si512(from) emulated_load(from)
#define _mm512_storeu_si512(to, value) emulated_store(to, value)
#define _mm512_stream_si512(to, value) emulated_store(to, value)
#define _mm512_xor_si512(a, b) emulated_xor(a, b)
#define _mm512_broadcast_i32x4(value) emulated_broadcast(value)
#define _mm512_zextsi128_si512(value) emulated_extend(value)
#define _mm512_clmulepi64_epi128(a, b, which) emulated_multiply(a, b, (which) == 0x11)
#define _mm512_ternarylogic_epi64(a, b, c, table) emulated_xor(emulated_xor(a, b), c)
