/* Copies between strided memory and a byte range of a dense array: row by row, element by element, or by
 * tiles. */
#include "ckptengine.h"

#include <string.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define STREAM_LEAST 1024 /* shorter runs leave too many lines half written */

/* ---- transposing ---- */

/* Tiles of one cache line each way, so that every line of the far side is fetched, or filled, once. A tile is
 * put together from squares of 16 bytes each way: interleaving the halves of n rows log2(n) times transposes
 * them. */

#if defined(__x86_64__)
typedef __m128i vector;
#define LOAD(from) _mm_loadu_si128((const __m128i *)(from))
#define STORE(to, value) _mm_storeu_si128((__m128i *)(to), value)
#define LOW_1(a, b) _mm_unpacklo_epi8(a, b)
#define HIGH_1(a, b) _mm_unpackhi_epi8(a, b)
#define LOW_2(a, b) _mm_unpacklo_epi16(a, b)
#define HIGH_2(a, b) _mm_unpackhi_epi16(a, b)
#define LOW_4(a, b) _mm_unpacklo_epi32(a, b)
#define HIGH_4(a, b) _mm_unpackhi_epi32(a, b)
#define LOW_8(a, b) _mm_unpacklo_epi64(a, b)
#define HIGH_8(a, b) _mm_unpackhi_epi64(a, b)
#elif defined(__aarch64__)
typedef uint8x16_t vector;
#define LOAD(from) vld1q_u8(from)
#define STORE(to, value) vst1q_u8(to, value)
#define AS_8(bits, a) vreinterpretq_u8_u##bits(a)
#define AS(bits, a) vreinterpretq_u##bits##_u8(a)
#define LOW_1(a, b) vzip1q_u8(a, b)
#define HIGH_1(a, b) vzip2q_u8(a, b)
#define LOW_2(a, b) AS_8(16, vzip1q_u16(AS(16, a), AS(16, b)))
#define HIGH_2(a, b) AS_8(16, vzip2q_u16(AS(16, a), AS(16, b)))
#define LOW_4(a, b) AS_8(32, vzip1q_u32(AS(32, a), AS(32, b)))
#define HIGH_4(a, b) AS_8(32, vzip2q_u32(AS(32, a), AS(32, b)))
#define LOW_8(a, b) AS_8(64, vzip1q_u64(AS(64, a), AS(64, b)))
#define HIGH_8(a, b) AS_8(64, vzip2q_u64(AS(64, a), AS(64, b)))
#else
#error "ckptengine runs on x86-64 and aarch64"
#endif

#define LINE 64

/* Turns LINE/size lines of LINE bytes, from_pitch apart, into as many, to_pitch apart. */
#define DEFINE_TILE(size)                                                                                    \
    static inline void tile_##size(const unsigned char *from, int64_t from_pitch, unsigned char *to,         \
                                   int64_t to_pitch) {                                                       \
        enum { N = 16 / size, EDGE = LINE / size };                                                          \
        _Alignas(LINE) unsigned char tile[EDGE * LINE];                                                      \
        for (int line = 0; line < EDGE; line += N)                                                           \
            for (int part = 0; part < LINE / 16; part++) {                                                   \
                vector rows[N], mixed[N];                                                                    \
                for (int i = 0; i < N; i++)                                                                  \
                    rows[i] = LOAD(from + (line + i) * from_pitch + part * 16);                              \
                for (int stage = 1; stage < N; stage *= 2) {                                                 \
                    for (int i = 0; i < N / 2; i++) {                                                        \
                        mixed[2 * i] = LOW_##size(rows[i], rows[i + N / 2]);                                 \
                        mixed[2 * i + 1] = HIGH_##size(rows[i], rows[i + N / 2]);                            \
                    }                                                                                        \
                    for (int i = 0; i < N; i++)                                                              \
                        rows[i] = mixed[i];                                                                  \
                }                                                                                            \
                for (int i = 0; i < N; i++)                                                                  \
                    STORE(tile + (part * N + i) * LINE + line * size, rows[i]);                              \
            }                                                                                                \
        for (int i = 0; i < EDGE; i++)                                                                       \
            memcpy(to + i * to_pitch, tile + i * LINE, LINE);                                                \
    }

DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(4)
DEFINE_TILE(8)

static inline void tile_16(const unsigned char *from, int64_t from_pitch, unsigned char *to,
                           int64_t to_pitch) {
    for (int i = 0; i < LINE / 16; i++)
        for (int j = 0; j < LINE / 16; j++)
            memcpy(to + j * to_pitch + i * 16, from + i * from_pitch + j * 16, 16);
}

/* ---- copies between rows of the dense array and strided memory ---- */

/* Where neighbouring rows are neighbours in memory too (a transposed matrix), whole tiles are transposed and
 * only the edges are copied element by element. */
#define DEFINE_COPIES(size)                                                                                  \
    static void gather_rows_##size(unsigned char *linear, int64_t pitch, const unsigned char *memory,        \
                                   int64_t row_stride, int64_t stride, int64_t rows, int64_t columns) {      \
        for (int64_t row = 0; row < rows; row++) {                                                           \
            unsigned char *target = linear + row * pitch;                                                    \
            const unsigned char *source = memory + row * row_stride;                                         \
            for (int64_t i = 0; i < columns; i++)                                                            \
                memcpy(target + i * size, source + i * stride, size);                                        \
        }                                                                                                    \
    }                                                                                                        \
    static void scatter_rows_##size(const unsigned char *linear, int64_t pitch, unsigned char *memory,       \
                                    int64_t row_stride, int64_t stride, int64_t rows, int64_t columns) {     \
        for (int64_t row = 0; row < rows; row++) {                                                           \
            const unsigned char *source = linear + row * pitch;                                              \
            unsigned char *target = memory + row * row_stride;                                               \
            for (int64_t i = 0; i < columns; i++)                                                            \
                memcpy(target + i * stride, source + i * size, size);                                        \
        }                                                                                                    \
    }                                                                                                        \
    static void gather_##size(unsigned char *linear, int64_t pitch, const unsigned char *memory,             \
                              int64_t row_stride, int64_t stride, int64_t rows, int64_t columns) {           \
        enum { EDGE = LINE / size };                                                                         \
        int64_t tiled_rows = row_stride == size ? rows / EDGE * EDGE : 0, tiled = 0;                         \
        for (; tiled_rows > 0 && tiled + EDGE <= columns; tiled += EDGE)                                     \
            for (int64_t row = 0; row < tiled_rows; row += EDGE)                                             \
                tile_##size(memory + (row * size + tiled * stride), stride,                                  \
                            linear + (row * pitch + tiled * size), pitch);                                   \
        if (tiled < columns && tiled_rows > 0)                                                               \
            gather_rows_##size(linear + tiled * size, pitch, memory + tiled * stride, row_stride, stride,    \
                               tiled_rows, columns - tiled);                                                 \
        if (tiled_rows < rows)                                                                               \
            gather_rows_##size(linear + tiled_rows * pitch, pitch, memory + tiled_rows * row_stride,         \
                               row_stride, stride, rows - tiled_rows, columns);                              \
    }                                                                                                        \
    static void scatter_##size(const unsigned char *linear, int64_t pitch, unsigned char *memory,            \
                               int64_t row_stride, int64_t stride, int64_t rows, int64_t columns) {          \
        enum { EDGE = LINE / size };                                                                         \
        int64_t tiled_rows = row_stride == size ? rows / EDGE * EDGE : 0, tiled = 0;                         \
        for (; tiled_rows > 0 && tiled + EDGE <= columns; tiled += EDGE)                                     \
            for (int64_t row = 0; row < tiled_rows; row += EDGE)                                             \
                tile_##size(linear + (row * pitch + tiled * size), pitch,                                    \
                            memory + (row * size + tiled * stride), stride);                                 \
        if (tiled < columns && tiled_rows > 0)                                                               \
            scatter_rows_##size(linear + tiled * size, pitch, memory + tiled * stride, row_stride, stride,   \
                                tiled_rows, columns - tiled);                                                \
        if (tiled_rows < rows)                                                                               \
            scatter_rows_##size(linear + tiled_rows * pitch, pitch, memory + tiled_rows * row_stride,        \
                                row_stride, stride, rows - tiled_rows, columns);                             \
    }

DEFINE_COPIES(1)
DEFINE_COPIES(2)
DEFINE_COPIES(4)
DEFINE_COPIES(8)
DEFINE_COPIES(16)

void ck_gather(const ck_view *view, int64_t begin, int64_t end, unsigned char *linear) {
    ck_walk walk;
    ck_part part;
    int inner = view->ndim - 1;
    int64_t row_stride = inner > 0 ? view->stride[inner - 1] : 0, stride = view->stride[inner];
    int64_t done = begin;
    for (ck_walk_start(&walk, view, begin, end); ck_walk_next(&walk, &part);) {
        if (part.position > done)
            memset(linear + (done - begin), 0, (size_t)(part.position - done));
        unsigned char *target = linear + (part.position - begin);
        int64_t columns = part.nbytes / view->itemsize;
        if (part.partial) {
            memcpy(target, part.memory, (size_t)part.nbytes);
        } else if (view->contiguous) {
            for (int64_t row = 0; row < part.rows; row++)
                memcpy(target + row * part.pitch, part.memory + row * row_stride, (size_t)part.nbytes);
        } else {
            switch (view->itemsize) {
            case 1:
                gather_1(target, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            case 2:
                gather_2(target, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            case 4:
                gather_4(target, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            case 8:
                gather_8(target, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            default:
                gather_16(target, part.pitch, part.memory, row_stride, stride, part.rows, columns);
            }
        }
        if (part.pitch > part.nbytes)
            for (int64_t row = 0; row + 1 < part.rows; row++)
                memset(target + row * part.pitch + part.nbytes, 0, (size_t)(part.pitch - part.nbytes));
        done = part.position + (part.rows - 1) * part.pitch + part.nbytes;
    }
    if (end > done)
        memset(linear + (done - begin), 0, (size_t)(end - done));
}

static inline void copy_run(unsigned char *target, const unsigned char *source, size_t nbytes) {
    if (nbytes >= STREAM_LEAST)
        ck_stream(target, source, nbytes);
    else
        memcpy(target, source, nbytes);
}

void ck_scatter_view(const ck_view *view, int64_t begin, int64_t end, const unsigned char *linear) {
    ck_walk walk;
    ck_part part;
    int inner = view->ndim - 1;
    int64_t row_stride = inner > 0 ? view->stride[inner - 1] : 0, stride = view->stride[inner];
    for (ck_walk_start(&walk, view, begin, end); ck_walk_next(&walk, &part);) {
        const unsigned char *source = linear + (part.position - begin);
        int64_t columns = part.nbytes / view->itemsize;
        if (part.partial) {
            memcpy(part.memory, source, (size_t)part.nbytes);
        } else if (view->contiguous) {
            for (int64_t row = 0; row < part.rows; row++)
                copy_run(part.memory + row * row_stride, source + row * part.pitch, (size_t)part.nbytes);
        } else {
            switch (view->itemsize) {
            case 1:
                scatter_1(source, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            case 2:
                scatter_2(source, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            case 4:
                scatter_4(source, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            case 8:
                scatter_8(source, part.pitch, part.memory, row_stride, stride, part.rows, columns);
                break;
            default:
                scatter_16(source, part.pitch, part.memory, row_stride, stride, part.rows, columns);
            }
        }
    }
}
